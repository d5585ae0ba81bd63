//! The device node `/dev/drbdN`: one trait, whatever carries it.

use crate::{BlockRequest, Reply};
use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

/// What carries a device node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    /// The kernel's NBD client, fed through a socket pair.
    KernelNbd,
    /// A one-file FUSE file system under a loop device.
    FuseLoop,
}

/// How a device node shall look.
#[derive(Debug, Clone)]
pub struct DeviceParams {
    /// The `N` of `/dev/drbdN`.
    pub minor: u32,
    /// Size in bytes, a multiple of `logical_block`.
    pub size: u64,
    /// Logical block size in bytes: 512 or 4096.
    pub logical_block: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Tell the kernel that space can be given back. False when the engine could only write zeroes:
    /// a `mkfs` that discards the whole device would then write all of it.
    pub discard: bool,
    /// Where the node goes, normally `/dev`.
    pub dev_dir: PathBuf,
    /// Symbolic links to make to the node and to remove with it, such as
    /// `/dev/drbd/by-res/r0/0`; missing parents are created.
    pub links: Vec<PathBuf>,
}

impl DeviceParams {
    /// A writable `/dev/drbdN` with 512-byte blocks and no links.
    #[must_use]
    pub fn new(minor: u32, size: u64) -> Self {
        let dev_dir = PathBuf::from("/dev");
        Self { minor, size, logical_block: 512, read_only: false, discard: true, dev_dir, links: Vec::new() }
    }

    /// Refuses what no block device can be.
    pub(crate) fn check(&self) -> Result<(), DeviceError> {
        let reason = if !matches!(self.logical_block, 512 | 4096) {
            format!("a logical block size of {} bytes is not possible (512 or 4096 is)", self.logical_block)
        } else if self.size == 0 || !self.size.is_multiple_of(u64::from(self.logical_block)) {
            format!("a size of {} bytes is not a multiple of {} bytes", self.size, self.logical_block)
        } else if self.minor >= 1 << 20 {
            format!("{} is not a minor number (0 to 1048575)", self.minor)
        } else {
            return Ok(());
        };
        Err(DeviceError::Invalid { node: self.node(), reason })
    }

    /// The path of the node.
    #[must_use]
    pub fn node(&self) -> PathBuf {
        self.dev_dir.join(format!("drbd{}", self.minor))
    }
}

/// Something a device backend tells the engine.
#[derive(Debug)]
pub enum DeviceEvent {
    /// Answer it with [`DeviceExport::complete`].
    Request(BlockRequest),
    /// [`DeviceExport::attach`] ended; on success the node exists.
    Attached(Result<(), DeviceError>),
    /// [`DeviceExport::resize`] ended.
    Resized(Result<(), DeviceError>),
    /// [`DeviceExport::detach`] ended. [`DeviceError::InUse`] names the users, and the device is
    /// as it was before.
    Detached(Result<(), DeviceError>),
    /// The kernel's side went away by itself (unmounted or disconnected by an administrator); the
    /// device is detached, its requests are forgotten.
    Lost(String),
}

/// A block device node served by the engine.
///
/// `attach`, `resize` and `detach` only start the work: the kernel may send requests meanwhile which
/// the engine must answer for the call to end. The results come as [`DeviceEvent`]s. One such
/// operation can run at a time; another one in that time reports [`DeviceError::Busy`].
pub trait DeviceExport: Send {
    /// What carries this device.
    fn kind(&self) -> BackendKind;

    /// Readable (poll, io_uring) whenever [`Self::next_event`] has something; it is an eventfd which
    /// `next_event` resets itself.
    fn event_fd(&self) -> BorrowedFd<'_>;

    /// The next event, or none; call until none after [`Self::event_fd`] became readable.
    fn next_event(&mut self) -> Option<DeviceEvent>;

    /// Answers a request. Unknown identifiers (after a forced detach) are ignored.
    fn complete(&mut self, id: u64, reply: Reply);

    /// Begins to create the node; leftovers of a dead process for this minor are removed first.
    fn attach(&mut self, params: DeviceParams);

    /// Begins to remove what a dead process left of the node and its kernel device; ends as a detach does.
    ///
    /// The new engine never takes the old device over: what its users have cached may be older than the data,
    /// if another node was Primary meanwhile. They got I/O errors since the engine died, and go on getting them.
    fn clean_up(&mut self, params: DeviceParams);

    /// Begins to change the size, in bytes.
    fn resize(&mut self, size: u64);

    /// Who uses the device now. Reads `/proc` and `/sys` (some milliseconds), never the device.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    fn in_use(&self) -> io::Result<Vec<User>>;

    /// Begins to remove the node. Without `force` it is refused while somebody uses the device.
    /// With `force` every unanswered and every later request fails with an I/O error.
    fn detach(&mut self, force: bool);
}

/// Somebody who uses a device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum User {
    /// A file system is mounted from it.
    Mount {
        /// Mount point as seen by that process.
        path: PathBuf,
        /// A process in whose mount namespace it is.
        pid: u32,
        /// That process's name.
        process: String,
    },
    /// It is swap space.
    Swap,
    /// Another block device is built on it.
    Holder {
        /// Its kernel name, such as `dm-3`.
        device: String,
    },
    /// A process has it open.
    Open {
        /// Process identifier.
        pid: u32,
        /// Process name.
        process: String,
    },
    /// The kernel says it is open, but not by whom (another PID namespace, or the kernel itself).
    Unknown,
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { path, pid, process } => {
                write!(f, "mounted on {} (seen by {process}, PID {pid})", path.display())
            }
            Self::Swap => f.write_str("used as swap space"),
            Self::Holder { device } => write!(f, "held by block device {device}"),
            Self::Open { pid, process } => write!(f, "held open by {process} (PID {pid})"),
            Self::Unknown => f.write_str("held open by something this process cannot see"),
        }
    }
}

/// Why an operation on a device node failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Somebody uses it.
    #[error("{node} is in use: {}; stop that first, or detach by force", list(.users))]
    InUse {
        /// The node.
        node: PathBuf,
        /// At least one user.
        users: Vec<User>,
    },
    /// The node or the kernel device belongs to somebody else.
    #[error("{node} cannot be created: {owner}; choose another minor or remove that one")]
    Foreign {
        /// The node.
        node: PathBuf,
        /// What is in the way.
        owner: String,
    },
    /// Parameters make no sense.
    #[error("{node} cannot be created: {reason}")]
    Invalid {
        /// The node.
        node: PathBuf,
        /// Which and why.
        reason: String,
    },
    /// Attach, resize or detach while another of them runs, or in the wrong state.
    #[error("the device cannot be changed now: {0}; try again when that has ended")]
    Busy(&'static str),
    /// The operating system refused.
    #[error("{what} failed: {source}; {hint}")]
    System {
        /// What was tried, on what.
        what: String,
        /// The error of the system call.
        source: io::Error,
        /// What the user can do.
        hint: &'static str,
    },
}

fn list(users: &[User]) -> String {
    users.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
