//! The metadata device: opening it alone, questions, and the note of where metadata was last seen.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, ErrorKind, IsTerminal, Write as _};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::libc;
use palisade_control::runtime_dir;
use palisade_metadata::Kind;
use palisade_metadata::image::BlockIo;

use super::{EXIT_ARGUMENT, EXIT_USAGE, Job};
use crate::cli::{Failure, print};
use crate::{engines, setup};

/// Nothing smaller holds metadata (`spec/metadata.md` §13.2).
const DEVICE_BYTES_MIN: u64 = 68 << 10;
const LOCK_WAIT: Duration = Duration::from_secs(1);
const LOCK_POLL: Duration = Duration::from_millis(20);

/// Asking before something is lost (`spec/metadata.md` §13.3).
#[derive(Debug, Clone, Copy)]
pub struct Question {
    pub force: bool,
    pub quiet: bool,
}

impl Question {
    /// Whether the answer is yes. `context` is printed before the question.
    pub fn ask(self, context: &[&str], question: &str) -> bool {
        if self.force && self.quiet {
            return true;
        }
        for line in context {
            eprintln!("{line}");
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

/// An opened metadata device.
#[derive(Debug)]
pub struct Device {
    pub file: File,
    pub path: String,
    pub bytes: u64,
}

impl Device {
    /// Opens the device. Internal and flexible external metadata are opened exclusively when something
    /// will be written; a device in use is then refused, or the user asked.
    pub fn open(
        path: &str,
        kind: Kind,
        read_only: bool,
        never_ask: bool,
        question: Question,
    ) -> Result<Self, Failure> {
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
            if never_ask && !question.force {
                return Err(failed(&std::io::Error::from(ErrorKind::ResourceBusy)));
            }
            if !question.ask(&[], "Exclusive open failed. Do it anyways?") {
                print("Operation canceled.\n");
                return Err(Failure::new(EXIT_USAGE, ""));
            }
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

fn note_path(minor: u32) -> PathBuf {
    let directory = std::env::var_os("PALISADE_STATE_DIR")
        .filter(|v| !v.is_empty())
        .map_or_else(|| PathBuf::from("/var/lib/drbd"), PathBuf::from);
    directory.join(format!("drbd-minor-{minor}.lkbd"))
}

/// Notes where the internal metadata of a minor is (`spec/metadata.md` §10.2).
pub fn remember_location(minor: u32, path: &str, bytes: u64, uuid: Option<u64>) -> std::io::Result<()> {
    let note = note_path(minor);
    if let Some(directory) = note.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let mut text = format!("{bytes}\t{path}\n");
    if let Some(uuid) = uuid {
        text.push_str(&format!("uuid:\t{uuid:016X}\n"));
    }
    let fresh = note.with_extension("lkbd.new");
    let mut file = File::create(&fresh)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&fresh, &note)
}

/// Removes the note.
pub fn forget_location(minor: u32) {
    let _ = std::fs::remove_file(note_path(minor));
}

/// The noted size, if it differs from the present one and belongs to this device.
pub fn last_known_bytes(job: &Job) -> Option<u64> {
    if job.kind != Kind::Internal {
        return None;
    }
    let text = std::fs::read_to_string(note_path(job.minor?)).ok()?;
    let (bytes, _) = text.lines().next()?.split_once('\t')?;
    let bytes: u64 = bytes.parse().ok()?;
    let noted_uuid = text
        .lines()
        .nth(1)
        .and_then(|l| l.strip_prefix("uuid:"))
        .and_then(|u| u64::from_str_radix(u.trim(), 16).ok());
    if bytes >= job.device.bytes {
        return None;
    }
    let found = palisade_metadata::image::read_moved(
        &job.device.file,
        bytes,
        palisade_metadata::image::Extent::Exact,
    )
    .ok()?;
    let same = noted_uuid.is_none_or(|u| u == found.superblock.device_uuid) || job.question.force;
    (same && found.superblock.version == job.version).then_some(bytes)
}
