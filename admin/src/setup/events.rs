//! `events2`: the events of all engines in one stream (`spec/cli.md` §13).
//!
//! Every control socket in the runtime directory is subscribed to, the directory is watched for new
//! ones, and the lines of the kernel's own `drbdsetup events2` are mixed in where the module is loaded.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Child, ChildStdout, Command as Process, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use palisade_control::render::EventPrinter;
use palisade_control::{
    Action, Client, ClientError, Event, EventBatch, EventStream, NESTED_ENV, running_resources, runtime_dir,
};

use super::{Call, EXIT_USAGE, hand_over, unsupported};
use crate::cli::{Failure, try_print};
use crate::engines::{self, QUERY_LIMIT, Server};
use crate::system::Local;

/// A socket appears in the directory a moment before its engine listens.
const APPEAR_LIMIT: Duration = Duration::from_secs(2);
const APPEAR_POLL: Duration = Duration::from_millis(10);
/// Where the module's tools end their present state.
const EXISTS_END: &str = "exists -";

pub fn events2(c: &Call<'_>) -> Result<i32, Failure> {
    for flag in ["poll", "diff"] {
        if c.scanned.flag(flag).is_some_and(|v| v != "no") {
            return Err(unsupported(&format!("events2 --{flag}")));
        }
    }
    engines::refuse_nesting()?;
    let wanted = c.scanned.words.first().filter(|w| *w != "all").cloned();
    let mut kernel = None;
    match &wanted {
        Some(name) => {
            if let Server::Kernel(tool) = engines::server_of(name)? {
                return hand_over(&tool, c.args);
            }
        }
        None => kernel = engines::loaded_kernel()?.map(|k| KernelEvents::start(&k, c.args)).transpose()?,
    }
    let mut follower = Follower {
        printer: EventPrinter::new(c.scanned.is_set("statistics"), c.scanned.is_set("full")),
        timestamps: c.scanned.is_set("timestamps"),
        wanted,
        streams: BTreeMap::new(),
    };
    // The watch comes before the first look, so that no engine is missed in between.
    let watch = watch_directory()?;
    follower.present_state(kernel.as_mut())?;
    if c.scanned.is_set("now") {
        return Ok(0);
    }
    follower.follow(&watch, kernel)
}

fn watch_directory() -> Result<Inotify, Failure> {
    let directory = runtime_dir();
    let failed = |e: &dyn std::fmt::Display| {
        Failure::new(EXIT_USAGE, format!("Cannot watch {}: {e}.", directory.display()))
    };
    if !directory.is_dir() {
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.recursive(true).create(&directory).map_err(|e| failed(&e))?;
    }
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(|e| failed(&e))?;
    watch
        .add_watch(&directory, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)
        .map_err(|e| failed(&e))?;
    Ok(watch)
}

struct Follower {
    printer: EventPrinter,
    timestamps: bool,
    wanted: Option<String>,
    streams: BTreeMap<String, EventStream>,
}

impl Follower {
    fn wants(&self, resource: &str) -> bool {
        self.wanted.as_ref().is_none_or(|w| w == resource)
    }

    /// Prints `exists` lines of everything, closed by one `exists -`.
    fn present_state(&mut self, kernel: Option<&mut KernelEvents>) -> Result<(), Failure> {
        let mut out = String::new();
        if let Some(kernel) = kernel {
            kernel.present_state(&mut out)?;
        }
        let names = running_resources()
            .map_err(|e| Failure::new(EXIT_USAGE, format!("Cannot list the engines: {e}.")))?;
        let mut now = now_us();
        for name in names {
            if !self.wants(&name) {
                continue;
            }
            let Ok((stream, first)) = subscribe(&name) else { continue };
            now = first.time_us;
            self.batch(&first, None, &mut out);
            self.streams.insert(name, stream);
        }
        self.line(now, EXISTS_END, &mut out);
        show(&out);
        Ok(())
    }

    fn follow(&mut self, watch: &Inotify, mut kernel: Option<KernelEvents>) -> Result<i32, Failure> {
        let stdout = std::io::stdout();
        loop {
            let names: Vec<String> = self.streams.keys().cloned().collect();
            let ready = {
                let mut fds: Vec<PollFd<'_>> = vec![
                    PollFd::new(watch.as_fd(), PollFlags::POLLIN),
                    // Only errors: the reader went away.
                    PollFd::new(stdout.as_fd(), PollFlags::empty()),
                ];
                fds.extend(self.streams.values().map(|s| PollFd::new(s.as_fd(), PollFlags::POLLIN)));
                fds.extend(kernel.as_ref().map(|k| PollFd::new(k.fd(), PollFlags::POLLIN)));
                match poll(&mut fds, PollTimeout::NONE) {
                    Ok(_) => {}
                    Err(nix::errno::Errno::EINTR) => continue,
                    Err(e) => return Err(Failure::new(EXIT_USAGE, format!("Cannot wait for events: {e}."))),
                }
                fds.iter().map(|fd| fd.any().unwrap_or(false)).collect::<Vec<bool>>()
            };
            let mut ready = ready.into_iter();
            let directory_changed = ready.next().unwrap_or(false);
            if ready.next().unwrap_or(false) {
                return Ok(0);
            }
            for name in names {
                if ready.next().unwrap_or(false) {
                    self.read_stream(&name);
                }
            }
            if ready.next().unwrap_or(false)
                && let Some(events) = kernel.as_mut()
                && !events.forward()
            {
                kernel = None;
            }
            if directory_changed {
                self.new_sockets(watch);
            }
        }
    }

    fn read_stream(&mut self, name: &str) {
        let Some(stream) = self.streams.get_mut(name) else { return };
        let (batches, open) = stream.arrived().unwrap_or_else(|_| (Vec::new(), false));
        let mut out = String::new();
        for batch in &batches {
            self.batch(batch, None, &mut out);
        }
        if !open {
            self.streams.remove(name);
            let now = now_us();
            for line in self.printer.forget(name) {
                self.line(now, &line, &mut out);
            }
        }
        show(&out);
    }

    /// Follows engines that were started since.
    fn new_sockets(&mut self, watch: &Inotify) {
        let mut out = String::new();
        while let Ok(events) = watch.read_events() {
            let names = events
                .into_iter()
                .filter_map(|e| e.name)
                .filter_map(|n| n.to_str().and_then(|n| n.strip_suffix(".sock")).map(str::to_owned));
            for name in names.collect::<Vec<_>>() {
                if !self.wants(&name) {
                    continue;
                }
                // A new socket under a known name: the old engine is gone.
                if self.streams.remove(&name).is_some() {
                    let now = now_us();
                    for line in self.printer.forget(&name) {
                        self.line(now, &line, &mut out);
                    }
                }
                let Some((stream, first)) = subscribe_when_listening(&name) else { continue };
                self.batch(&first, Some(Action::Create), &mut out);
                self.streams.insert(name, stream);
            }
        }
        show(&out);
    }

    /// Adds the lines of a batch; `instead` replaces `exists`.
    fn batch(&mut self, batch: &EventBatch, instead: Option<Action>, out: &mut String) {
        for event in &batch.events {
            if matches!(event, Event::ExistsEnd) {
                continue;
            }
            let replaced = instead.map(|action| with_action(event.clone(), action));
            if let Some(line) = self.printer.line(replaced.as_ref().unwrap_or(event)) {
                self.line(batch.time_us, &line, out);
            }
        }
    }

    fn line(&self, time_us: u64, line: &str, out: &mut String) {
        const MICROS: u64 = 1_000_000;
        if self.timestamps {
            out.push_str(&Local::at(time_us / MICROS).iso(time_us % MICROS));
            out.push(' ');
        }
        out.push_str(line);
        out.push('\n');
    }
}

/// Lost output ends the program: there is nobody to follow events for.
fn show(text: &str) {
    if !text.is_empty() && !try_print(text) {
        std::process::exit(0);
    }
}

fn with_action(mut event: Event, with: Action) -> Event {
    match &mut event {
        Event::Resource { action, .. }
        | Event::Device { action, .. }
        | Event::Connection { action, .. }
        | Event::PeerDevice { action, .. }
        | Event::Path { action, .. } => *action = with,
        Event::Helper { .. } | Event::ExistsEnd => {}
    }
    event
}

fn subscribe(name: &str) -> Result<(EventStream, EventBatch), ClientError> {
    let mut stream = Client::connect(name, QUERY_LIMIT)?.subscribe(QUERY_LIMIT)?;
    let first = stream.next_batch(Some(QUERY_LIMIT))?;
    Ok((stream, first))
}

fn subscribe_when_listening(name: &str) -> Option<(EventStream, EventBatch)> {
    let give_up = Instant::now() + APPEAR_LIMIT;
    loop {
        match subscribe(name) {
            Ok(both) => return Some(both),
            Err(ClientError::NotRunning { .. }) if Instant::now() < give_up => {
                std::thread::sleep(APPEAR_POLL);
            }
            Err(_) => return None,
        }
    }
}

fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

/// The lines of the kernel's `drbdsetup events2`.
struct KernelEvents {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl KernelEvents {
    fn start(kernel: &palisade_control::Kernel, args: &[String]) -> Result<Self, Failure> {
        let failed = |e: &dyn std::fmt::Display| {
            Failure::new(EXIT_USAGE, format!("Cannot run {}: {e}.", kernel.drbdsetup().display()))
        };
        let mut child = Process::new(kernel.drbdsetup())
            .args(args)
            .env(NESTED_ENV, "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| failed(&e))?;
        let stdout = child.stdout.take().ok_or_else(|| failed(&"it has no output"))?;
        Ok(Self { child, lines: BufReader::new(stdout) })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.lines.get_ref().as_fd()
    }

    /// Copies the lines up to the end of the present state, without that end.
    fn present_state(&mut self, out: &mut String) -> Result<(), Failure> {
        loop {
            let mut line = String::new();
            let read = self
                .lines
                .read_line(&mut line)
                .map_err(|e| Failure::new(EXIT_USAGE, format!("Cannot read the kernel's events: {e}.")))?;
            if read == 0 || line.trim_end().ends_with(EXISTS_END) {
                return Ok(());
            }
            out.push_str(&line);
        }
    }

    /// Copies what has arrived; false when the tool ended.
    fn forward(&mut self) -> bool {
        let mut out = String::new();
        loop {
            let mut line = String::new();
            match self.lines.read_line(&mut line) {
                Ok(0) | Err(_) => {
                    show(&out);
                    return false;
                }
                Ok(_) => out.push_str(&line),
            }
            // Only whole lines are written by the tool; what is left would block.
            if self.lines.buffer().is_empty() {
                show(&out);
                return true;
            }
        }
    }
}

impl Drop for KernelEvents {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
