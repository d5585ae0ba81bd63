//! Running another program with a time limit.
//!
//! No program is started through a shell, and none is waited for longer than the caller says: when
//! its time is over the program and everything it started in its process group is ended.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Most bytes kept of each of a program's two outputs; the rest is read and dropped.
pub const OUTPUT_BYTES_MAX: usize = 1 << 20;

/// Longest pause between two looks at a program that has closed its outputs but not ended, or whose
/// outputs are kept open by a program it left behind.
const POLL_MAX: Duration = Duration::from_millis(20);

/// How long a program may tidy up between SIGTERM and SIGKILL.
const TERM_GRACE: Duration = Duration::from_millis(200);

/// How long outputs are still read after the program itself ended.
const DRAIN: Duration = Duration::from_millis(100);

/// Directories searched after `$PATH`, which need not have the sbin ones (`spec/ocf-agents.md` §1.2).
const PATH_EXTRA: [&str; 5] = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// What a program left when it ended by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit code, or 128 plus the number of the signal that ended it.
    pub code: i32,
    /// Standard output, at most [`OUTPUT_BYTES_MAX`] bytes.
    pub stdout: String,
    /// Standard error, at most [`OUTPUT_BYTES_MAX`] bytes.
    pub stderr: String,
}

impl Output {
    /// Whether the program ended with exit code 0.
    #[must_use]
    pub const fn success(&self) -> bool {
        self.code == 0
    }
}

/// Why a program gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// It is not installed.
    #[error("The program {program} was not found in $PATH or the system's sbin directories; install it.")]
    NotFound {
        /// What was looked for.
        program: String,
    },
    /// The system refused to start or to watch it.
    #[error("Running \"{command}\" failed: {source}.")]
    Start {
        /// Program and arguments.
        command: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It did not end in time and was killed.
    #[error("\"{command}\" did not end within {} ms and was killed.", limit.as_millis())]
    TimedOut {
        /// Program and arguments.
        command: String,
        /// The time it had.
        limit: Duration,
    },
}

/// Finds an executable file by name in `$PATH` and then in the system's directories; a name with a
/// slash is taken as it is.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    find_program_in(name, std::env::split_paths(&search_path()))
}

/// As [`find_program`], in the given directories.
pub fn find_program_in(name: &str, directories: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    let executable = |path: &Path| {
        path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|path| executable(path));
    }
    directories.into_iter().map(|directory| directory.join(name)).find(|path| executable(path))
}

/// `$PATH` with the system's directories appended where they are missing.
fn search_path() -> OsString {
    let mut directories: Vec<PathBuf> =
        std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
    for extra in PATH_EXTRA {
        if !directories.iter().any(|have| have == Path::new(extra)) {
            directories.push(extra.into());
        }
    }
    std::env::join_paths(directories).unwrap_or_else(|_| OsString::from("/usr/sbin:/sbin:/usr/bin:/bin"))
}

/// Runs a program and returns how it ended, or kills it when `limit` is over.
///
/// It gets no input, the C locale and, on top of our environment, `extra_env`.
pub fn run(
    program: &Path,
    args: &[&str],
    extra_env: &[(&str, &str)],
    limit: Duration,
) -> Result<Output, ChildError> {
    let command_text = || {
        let mut text = program.display().to_string();
        for arg in args {
            text.push(' ');
            text.push_str(arg);
        }
        text
    };
    let give_up = Instant::now().checked_add(limit);
    let mut command = Command::new(program);
    command
        .args(args)
        .env("LC_ALL", OsStr::new("C"))
        .env("PATH", search_path())
        .envs(extra_env.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = command.spawn().map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => ChildError::NotFound { program: program.display().to_string() },
        _ => ChildError::Start { command: command_text(), source },
    })?;

    let (sender, chunks) = channel();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let mut collected = Collected { open: 2, stdout: Vec::new(), stderr: Vec::new() };
    read_into(stdout, sender.clone(), Chunk::Out);
    read_into(stderr, sender, Chunk::Err);

    match wait(&mut child, &chunks, &mut collected, give_up) {
        Ok(Some(status)) => {
            collected.drain(&chunks, Instant::now() + DRAIN);
            Ok(Output {
                code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
                stdout: lossy(&collected.stdout),
                stderr: lossy(&collected.stderr),
            })
        }
        Ok(None) => {
            end(&mut child);
            Err(ChildError::TimedOut { command: command_text(), limit })
        }
        Err(source) => {
            end(&mut child);
            Err(ChildError::Start { command: command_text(), source })
        }
    }
}

/// Waits for the end of the child, collecting its output meanwhile; `None` when the time is over.
fn wait(
    child: &mut Child,
    chunks: &Receiver<Chunk>,
    collected: &mut Collected,
    give_up: Option<Instant>,
) -> std::io::Result<Option<ExitStatus>> {
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let now = Instant::now();
        let left = give_up.map_or(POLL_MAX, |at| at.saturating_duration_since(now));
        if left.is_zero() {
            return Ok(None);
        }
        // The usual end is both outputs closing, which wakes us at once; the pause covers the rest.
        collected.drain(chunks, now + pause.min(left));
        pause = (pause * 2).min(POLL_MAX);
    }
}

fn end(child: &mut Child) {
    let group = i32::try_from(child.id()).ok().map(Pid::from_raw);
    let signal = |which| {
        if let Some(group) = group {
            // The group may be gone already; there is nothing else to do about it.
            let _ = killpg(group, which);
        }
    };
    signal(Signal::SIGTERM);
    let until = Instant::now() + TERM_GRACE;
    while Instant::now() < until {
        if !matches!(child.try_wait(), Ok(None)) {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(Signal::SIGKILL);
    // A killed process may sit in an uninterruptible system call: look once more, never wait.
    let _ = child.try_wait();
}

enum Chunk {
    Out(Vec<u8>),
    Err(Vec<u8>),
    Closed,
}

struct Collected {
    open: usize,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Collected {
    /// Takes what arrives until both outputs are closed or `until` is reached.
    fn drain(&mut self, chunks: &Receiver<Chunk>, until: Instant) {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if self.open == 0 {
                // Closed outputs mean that the end is near, not that it is there.
                std::thread::sleep(left.min(Duration::from_millis(1)));
                return;
            }
            match chunks.recv_timeout(left) {
                Ok(Chunk::Out(bytes)) => append(&mut self.stdout, &bytes),
                Ok(Chunk::Err(bytes)) => append(&mut self.stderr, &bytes),
                Ok(Chunk::Closed) => {
                    self.open -= 1;
                    if self.open == 0 {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => return,
                Err(RecvTimeoutError::Disconnected) => self.open = 0,
            }
        }
    }
}

fn append(kept: &mut Vec<u8>, bytes: &[u8]) {
    let room = OUTPUT_BYTES_MAX.saturating_sub(kept.len());
    kept.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
}

fn read_into<R: Read + Send + 'static>(source: Option<R>, to: Sender<Chunk>, wrap: fn(Vec<u8>) -> Chunk) {
    std::thread::spawn(move || {
        let mut buffer = [0_u8; 8192];
        if let Some(mut source) = source {
            loop {
                match source.read(&mut buffer) {
                    Ok(count @ 1..) => {
                        let bytes = buffer.get(..count).unwrap_or_default().to_vec();
                        if to.send(wrap(bytes)).is_err() {
                            return;
                        }
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Ok(_) | Err(_) => break,
                }
            }
        }
        // Nobody listens any more when the caller has given up.
        let _ = to.send(Chunk::Closed);
    });
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, limit_ms: u64) -> Result<Output, ChildError> {
        run(Path::new("/bin/sh"), &["-c", script], &[("EXTRA", "e")], Duration::from_millis(limit_ms))
    }

    #[test]
    fn outputs_and_code_are_kept_apart() {
        let output = sh("echo out $EXTRA $LC_ALL; echo err >&2; exit 17", 5000).unwrap();
        assert_eq!(output, Output { code: 17, stdout: "out e C\n".into(), stderr: "err\n".into() });
        assert!(!output.success());
    }

    #[test]
    fn a_signal_is_128_and_its_number() {
        assert_eq!(sh("kill -9 $$", 5000).unwrap().code, 137);
    }

    #[test]
    fn time_over_kills_the_whole_group() {
        let begun = Instant::now();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("late");
        let script = format!("(sleep 1; touch {}) & sleep 30", file.display());
        assert!(matches!(sh(&script, 100), Err(ChildError::TimedOut { .. })));
        assert!(begun.elapsed() < Duration::from_secs(1));
        std::thread::sleep(Duration::from_millis(1200));
        assert!(!file.exists(), "a grandchild outlived its time");
    }

    #[test]
    fn deaf_program_is_killed() {
        let begun = Instant::now();
        assert!(matches!(
            sh("trap '' TERM; while :; do sleep 1; done", 100),
            Err(ChildError::TimedOut { .. })
        ));
        assert!(begun.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn a_daemon_left_behind_does_not_hold_us() {
        let begun = Instant::now();
        let output = sh("sleep 3 & echo started", 10_000).unwrap();
        assert_eq!(output.stdout, "started\n");
        assert!(begun.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn endless_output_is_cut() {
        let output = sh("head -c 3000000 /dev/zero", 10_000).unwrap();
        assert_eq!(output.stdout.len(), OUTPUT_BYTES_MAX);
        assert!(output.success());
    }

    #[test]
    fn absent_program_says_so() {
        let error = run(Path::new("/nonexistent/x"), &[], &[], Duration::from_secs(1)).unwrap_err();
        assert!(matches!(error, ChildError::NotFound { .. }));
    }

    #[test]
    fn search_takes_executables_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tool");
        std::fs::write(&path, "").unwrap();
        let find = || find_program_in("tool", [dir.path().to_owned()]);
        assert_eq!(find(), None);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find(), Some(path.clone()));
        assert_eq!(find_program_in(&path.display().to_string(), []), Some(path));
        assert!(find_program("sh").is_some());
    }
}
