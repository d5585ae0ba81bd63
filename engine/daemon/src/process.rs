//! The process itself: one per resource, its log, and what it tells its supervisor.

use crate::core_api::Time;
use crate::sys;
use std::fs::{DirBuilder, File};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::Duration;
use tracing_subscriber::EnvFilter;

/// Makes the runtime directory and takes the lock of the resource. Keep the file open.
///
/// # Errors
/// `Ok(None)`: another engine serves the resource.
pub(crate) fn claim(runtime: &Path, resource: &str) -> io::Result<Option<File>> {
    DirBuilder::new().recursive(true).mode(0o700).create(runtime)?;
    let path = runtime.join(format!("{resource}.lock"));
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    Ok(if sys::lock_file(file.as_fd())? { Some(file) } else { None })
}

/// Keeps the process alive and able to write under memory pressure; all of it as far as allowed.
pub(crate) fn harden() {
    if let Err(e) = palisade_export::set_io_flusher() {
        tracing::debug!("PR_SET_IO_FLUSHER is not possible: {e}");
    }
    if let Err(e) = sys::lock_memory() {
        tracing::debug!("memory cannot be locked: {e}");
    }
    if let Err(e) = std::fs::write("/proc/self/oom_score_adj", "-900") {
        tracing::debug!("the OOM score cannot be lowered: {e}");
    }
}

/// Logs to stderr where somebody reads it, else to syslog. `RUST_LOG` filters.
pub(crate) fn start_log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    let journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let stderr_is_null = std::fs::read_link("/proc/self/fd/2").is_ok_and(|p| p == Path::new("/dev/null"));
    if stderr_is_null && let Ok(socket) = syslog_socket() {
        let writer = move || Syslog { socket: socket.try_clone().ok() };
        builder.with_ansi(false).without_time().with_level(true).with_writer(writer).init();
    } else if journal {
        builder.with_ansi(false).without_time().with_writer(io::stderr).init();
    } else {
        builder.with_ansi(io::stderr().is_terminal()).with_writer(io::stderr).init();
    }
}

fn syslog_socket() -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect("/dev/log")?;
    // A log daemon that hangs must not hang the data path.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// One line for the log daemon.
struct Syslog {
    socket: Option<UnixDatagram>,
}

impl Write for Syslog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // daemon.notice or daemon.err; the level is also in the text.
        let severity = if line.trim_ascii_start().starts_with(b"ERROR") { 27 } else { 29 };
        let mut message = format!("<{severity}>palisaded[{}]: ", std::process::id()).into_bytes();
        message.extend_from_slice(line.trim_ascii());
        if let Some(socket) = &self.socket {
            // What the log daemon cannot take is lost.
            let _ = socket.send(&message);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Messages to the service manager (`sd_notify(3)`).
pub(crate) struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
    next: Option<Time>,
}

impl Notifier {
    /// As the environment says.
    pub(crate) fn from_environment() -> Self {
        let address = std::env::var("NOTIFY_SOCKET").ok().and_then(|name| match name.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name).ok(),
            None => SocketAddr::from_pathname(&name).ok(),
        });
        let socket = address.and_then(|a| UnixDatagram::unbound().ok().map(|s| (s, a)));
        let ours = std::env::var("WATCHDOG_PID").map_or(true, |p| p == std::process::id().to_string());
        let watchdog = std::env::var("WATCHDOG_USEC").ok().and_then(|t| t.parse().ok()).filter(|_| ours);
        let watchdog = watchdog.filter(|_| socket.is_some()).map(|us: u64| Duration::from_micros(us / 2));
        Self { socket, watchdog, next: watchdog.map(|_| Time(0)) }
    }

    fn send(&self, text: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(e) = socket.send_to_addr(text.as_bytes(), address)
        {
            tracing::warn!("the service manager cannot be told: {e}");
        }
    }

    /// The control socket listens.
    pub(crate) fn ready(&self, resource: &str) {
        self.send(&format!("READY=1\nSTATUS=serving resource {resource}"));
    }

    /// The end is near.
    pub(crate) fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// When to show the next sign of life.
    pub(crate) fn deadline(&self) -> Option<Time> {
        self.next
    }

    /// Shows a sign of life if it is time.
    pub(crate) fn tick(&mut self, now: Time) {
        if let (Some(every), Some(next)) = (self.watchdog, self.next)
            && next <= now
        {
            self.send("WATCHDOG=1");
            self.next = Some(now + every);
        }
    }
}
