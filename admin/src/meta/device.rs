//! The metadata device: opening it alone, reading and writing it, and questions before something is lost.

use std::cell::Cell;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, ErrorKind, IsTerminal};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use palisade_control::runtime_dir;
use palisade_metadata::Kind;
use palisade_metadata::image::BlockIo;

use super::{EXIT_ARGUMENT, EXIT_USAGE};
use crate::cli::{Failure, print};
use crate::{engines, setup};

/// Nothing smaller holds metadata (`spec/metadata.md` §13.2).
const DEVICE_BYTES_MIN: u64 = 68 << 10;
const LOCK_WAIT: Duration = Duration::from_secs(1);
const LOCK_POLL: Duration = Duration::from_millis(20);

/// Asking before something is lost (`spec/metadata.md` §13.3).
#[derive(Debug, Default)]
pub struct Question {
    pub force: bool,
    pub quiet: bool,
    /// Questions that nobody saw.
    pub suppressed: Cell<u32>,
}

impl Question {
    /// Whether the answer is yes. `context` is printed before the question.
    pub fn ask(&self, context: &[&str], question: &str) -> bool {
        if self.force && self.quiet {
            self.suppressed.set(self.suppressed.get().saturating_add(1));
            return true;
        }
        if !context.is_empty() {
            eprintln!("\n{}", context.join("\n"));
        }
        eprintln!("\n{question}");
        if self.force {
            eprintln!("*** confirmation forced via --force option ***");
            return true;
        }
        if !std::io::stdin().is_terminal() {
            eprintln!("stdin not a TTY, not waiting for confirmation");
            return false;
        }
        eprint!("[need to type 'yes' to confirm] ");
        let mut answer = String::new();
        let read = std::io::stdin().lock().read_line(&mut answer);
        read.is_ok() && answer.trim_end_matches('\n') == "yes"
    }
}

/// The opened file; tells what it does if wanted, and writes nothing in a dry run.
#[derive(Debug)]
pub struct MetaFile {
    file: File,
    pub dry_run: bool,
    verbose: bool,
}

impl MetaFile {
    fn tell(&self, what: &str, pos: u64, bytes: usize, note: &str) {
        if self.verbose {
            eprintln!("{what} {bytes} bytes at {pos}{note}");
        }
    }
}

impl BlockIo for MetaFile {
    fn read_at(&self, pos: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.tell("read", pos, buf.len(), "");
        self.file.read_at(pos, buf)
    }

    fn write_at(&self, pos: u64, buf: &[u8]) -> std::io::Result<()> {
        if self.dry_run {
            self.tell("write", pos, buf.len(), " SKIPPED DUE TO DRY-RUN");
            return Ok(());
        }
        self.tell("write", pos, buf.len(), "");
        self.file.write_at(pos, buf)
    }

    fn flush(&self) -> std::io::Result<()> {
        if self.dry_run { Ok(()) } else { self.file.flush() }
    }

    fn size(&self) -> std::io::Result<u64> {
        self.file.size()
    }
}

/// How a device is opened.
#[derive(Debug, Clone, Copy)]
pub struct Opening {
    pub read_only: bool,
    /// A device in use is refused without a question: commands that run unattended.
    pub never_ask: bool,
    pub dry_run: bool,
    /// Tell every read and write.
    pub verbose: bool,
}

/// An opened metadata device.
#[derive(Debug)]
pub struct Device {
    pub file: MetaFile,
    pub path: String,
    pub bytes: u64,
}

impl Device {
    /// Opens the device. Internal and flexible external metadata are opened exclusively when something
    /// will be written; a device in use is then refused, or the user asked.
    pub fn open(path: &str, kind: Kind, how: Opening, question: &Question) -> Result<Self, Failure> {
        let read_only = how.read_only || how.dry_run;
        let failed = |e: &std::io::Error| {
            let text = e
                .raw_os_error()
                .map_or_else(|| e.to_string(), |code| nix::errno::Errno::from_raw(code).desc().to_owned());
            Failure::new(EXIT_USAGE, format!("open({path}) failed: {text}"))
        };
        let exclusive = !read_only && !matches!(kind, Kind::Indexed(_));
        let open =
            |flags: i32| OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path);
        let is_device = std::fs::metadata(path).map_err(|e| failed(&e))?.file_type().is_block_device();
        let mut busy = false;
        let file = match open(if exclusive && is_device { libc::O_EXCL } else { 0 }) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::ResourceBusy => {
                busy = true;
                open(0).map_err(|e| failed(&e))?
            }
            Err(e) => return Err(failed(&e)),
        };
        // A plain file cannot be opened exclusively; an engine that has it attached holds its lock.
        if exclusive && !is_device {
            busy = matches!(file.try_lock(), Err(TryLockError::WouldBlock));
        }
        if busy {
            if how.never_ask && !question.force {
                return Err(failed(&std::io::Error::from(ErrorKind::ResourceBusy)));
            }
            if !question.ask(&[], "Exclusive open failed. Do it anyways?") {
                print("Operation canceled.\n");
                return Err(Failure::new(EXIT_USAGE, ""));
            }
        }
        if is_device {
            // What an engine wrote past the page cache must not be hidden by what is in there. This is a
            // hint to the kernel, and nothing depends on it if nobody else has the device open.
            let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
        let bytes = file.size().map_err(|e| failed(&e))?;
        if bytes < DEVICE_BYTES_MIN {
            return Err(Failure::new(
                EXIT_ARGUMENT,
                format!("{path} is only {bytes} bytes. That's not enough."),
            ));
        }
        if let Kind::Indexed(n) = kind {
            const AREA_BYTES: u64 = 128 << 20;
            let start = u64::from(n) * AREA_BYTES;
            if start.saturating_add(AREA_BYTES) > bytes {
                return Err(Failure::new(
                    EXIT_ARGUMENT,
                    format!(
                        "Device too small: expecting meta data block at\nbyte offset {start}, but {path} is only \
                         {bytes} bytes."
                    ),
                ));
            }
        }
        let file = MetaFile { file, dry_run: how.dry_run, verbose: how.verbose };
        Ok(Self { file, path: path.to_owned(), bytes })
    }
}

/// Whether an engine has a disk attached to the minor.
pub fn is_attached(minor: u32) -> Result<bool, Failure> {
    if let Some(kernel) = engines::loaded_kernel()? {
        let out = kernel
            .run_drbdsetup(&["dstate", &minor.to_string()], engines::QUERY_LIMIT)
            .map_err(|e| Failure::new(EXIT_USAGE, format!("{e}.")))?;
        let own = out.stdout.trim().split('/').next().unwrap_or_default().to_owned();
        if out.code == 0 && !matches!(own.as_str(), "Diskless" | "Unconfigured") {
            return Ok(true);
        }
    }
    // The device of an engine that does not answer must not be touched: errors are passed on.
    Ok(match engines::owner_of_minor(minor)? {
        None => false,
        Some(_) => setup::own_dstate(minor)? != "Diskless",
    })
}

/// Holds the minor against other runs of this tool.
pub fn lock_minor(minor: u32) -> Result<File, Failure> {
    let directory = runtime_dir();
    let path = directory.join(format!("drbd-147-{minor}.lock"));
    let failed = |e: &dyn std::fmt::Display| {
        Failure::new(EXIT_USAGE, format!("Cannot lock minor {minor} with {}: {e}.", path.display()))
    };
    let mut builder = std::fs::DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(&directory).map_err(|e| failed(&e))?;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|e| failed(&e))?;
    let give_up = Instant::now() + LOCK_WAIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < give_up => std::thread::sleep(LOCK_POLL),
            Err(TryLockError::WouldBlock) => return Err(failed(&"another drbdmeta is at work")),
            Err(TryLockError::Error(e)) => return Err(failed(&e)),
        }
    }
}
