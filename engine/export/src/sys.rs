//! The system calls of this crate, each behind a safe function.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_long(result: libc::c_long) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as libc::c_int) }
}

fn owned(fd: libc::c_int) -> OwnedFd {
    // SAFETY: callers pass a descriptor the kernel has just made for them.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

pub(crate) fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// A counter that makes a descriptor readable.
#[derive(Debug)]
pub(crate) struct EventFd(OwnedFd);

impl EventFd {
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers.
        let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        Ok(Self(owned(fd)))
    }

    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight readable bytes. A full counter (EAGAIN) is as readable as can be.
        let _ = unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    pub fn clear(&self) {
        let mut count = [0u8; 8];
        // SAFETY: eight writable bytes. An empty counter (EAGAIN) is what we want.
        let _ = unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until a descriptor is ready; gives the returned events of each.
pub(crate) fn poll<const N: usize>(wanted: [(BorrowedFd<'_>, i16); N]) -> io::Result<[i16; N]> {
    let mut fds = wanted.map(|(fd, events)| {
        // A negative descriptor is skipped by poll.
        let fd = if events == 0 { -1 } else { fd.as_raw_fd() };
        libc::pollfd { fd, events, revents: 0 }
    });
    loop {
        // SAFETY: `fds` is an array of N entries.
        let result = check(unsafe { libc::poll(fds.as_mut_ptr(), N as libc::nfds_t, -1) });
        match result {
            Ok(_) => return Ok(fds.map(|fd| fd.revents)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Reads into two buffers, the second after the first is full.
pub(crate) fn read_two(fd: BorrowedFd<'_>, first: &mut [u8], second: &mut [u8]) -> io::Result<usize> {
    let parts = [io::IoSliceMut::new(first), io::IoSliceMut::new(second)];
    // SAFETY: IoSliceMut is ABI compatible with iovec, and both slices are exclusively ours.
    let result = unsafe { libc::readv(fd.as_raw_fd(), parts.as_ptr().cast(), 2) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Writes some buffers in one call; never raises SIGPIPE on a socket (`socket` says it is one).
pub(crate) fn write_all_of(fd: BorrowedFd<'_>, parts: &[io::IoSlice<'_>], socket: bool) -> io::Result<usize> {
    let count = parts.len().min(libc::UIO_MAXIOV as usize);
    let result = if socket {
        // SAFETY: all-zero is a valid msghdr (no name, no control data).
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = parts.as_ptr().cast_mut().cast();
        message.msg_iovlen = count as _;
        // SAFETY: IoSlice is ABI compatible with iovec; `count` entries are valid and only read.
        unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) }
    } else {
        // SAFETY: as above.
        unsafe { libc::writev(fd.as_raw_fd(), parts.as_ptr().cast(), count as libc::c_int) }
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Tells the kernel that the calling thread serves a block device: its memory allocations must not
/// wait for block I/O, which might be our own. Threads started later inherit it.
///
/// # Errors
/// Needs `CAP_SYS_RESOURCE` and Linux 5.6.
pub fn set_io_flusher() -> io::Result<()> {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: no pointers.
    check(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) }).map(drop)
}

/// Gives the calling thread its own descriptor table with nothing in it but the standard streams
/// and `keep`.
///
/// Why: a thread that waits in the kernel for an answer of our own file system must not hold the
/// descriptor through which we answer. If the process is killed, the last reference to that descriptor
/// has to go although this thread still waits; its going is what ends the wait.
pub(crate) fn isolate_descriptors(keep: &[RawFd]) -> io::Result<()> {
    // SAFETY: affects only the calling thread's view of the descriptor table.
    check(unsafe { libc::unshare(libc::CLONE_FILES) })?;
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    keep.sort_unstable();
    let mut first = 3u32;
    for last in keep.into_iter().map(Some).chain([None]) {
        let end = last.map_or(u32::MAX, |fd| fd.saturating_sub(1));
        if first <= end {
            // SAFETY: closes entries of this thread's private table; the descriptors that other threads
            // own are entries of another table.
            check_long(unsafe { libc::syscall(libc::SYS_close_range, first, end, 0u32) })?;
        }
        first = last.map_or(first, |fd| first.max(fd.saturating_add(1)));
    }
    Ok(())
}

/// Whether a node is a block or character special file, and its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DevNumber {
    pub major: u32,
    pub minor: u32,
}

impl std::fmt::Display for DevNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl DevNumber {
    /// From `major:minor`.
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

/// The device number of the block device a path leads to, without asking a remote or user-space
/// file system: cached attributes are enough, because what we look for is never there.
pub(crate) fn block_device_of(path: &CStr) -> Option<DevNumber> {
    // SAFETY: all-zero is a valid statx buffer.
    let mut buf: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_STATX_DONT_SYNC | libc::AT_NO_AUTOMOUNT;
    // SAFETY: a terminated path and a writable buffer.
    let result = unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), flags, libc::STATX_TYPE, &raw mut buf) };
    let is_block = u32::from(buf.stx_mode) & libc::S_IFMT == libc::S_IFBLK;
    (result == 0 && is_block).then_some(DevNumber { major: buf.stx_rdev_major, minor: buf.stx_rdev_minor })
}

/// Makes a block device node.
pub(crate) fn make_block_node(path: &Path, mode: u32, dev: DevNumber) -> io::Result<()> {
    let c = c_path(path)?;
    let number = libc::makedev(dev.major, dev.minor);
    // SAFETY: a terminated path.
    check(unsafe { libc::mknod(c.as_ptr(), libc::S_IFBLK | mode, number) }).map(drop)
}

/// Opens a block device by its number, whether or not this /dev has a node for it.
///
/// A container's /dev is often a private tmpfs in which new devices do not appear; then a node is made
/// in `scratch` for the moment of opening.
pub(crate) fn open_block(dev: DevNumber, usual: &Path, scratch: &Path, exclusive: bool) -> io::Result<File> {
    let flags = libc::O_CLOEXEC | if exclusive { libc::O_EXCL } else { 0 };
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags);
    if block_device_of(&c_path(usual)?) == Some(dev) {
        return options.open(usual);
    }
    let name = format!(".palisade-{}-{}-{}", dev.major, dev.minor, std::process::id());
    let node = scratch.join(name);
    let _ = std::fs::remove_file(&node);
    make_block_node(&node, 0o600, dev)?;
    let file = options.open(&node);
    let _ = std::fs::remove_file(&node);
    file
}

/// `ioctl` without an argument beyond a number.
pub(crate) fn ioctl_number(fd: BorrowedFd<'_>, request: libc::c_ulong, argument: u64) -> io::Result<i32> {
    // SAFETY: used only with requests whose argument is a number.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument as libc::c_ulong) })
}

/// `ioctl` that reads or fills one structure.
///
/// # Safety
/// `request` must read or write at most `size_of::<T>()` bytes at its argument, and what it writes must
/// be a valid `T`.
pub(crate) unsafe fn ioctl_struct<T>(
    fd: BorrowedFd<'_>,
    request: libc::c_ulong,
    argument: &mut T,
) -> io::Result<i32> {
    // SAFETY: the caller's promise.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(argument)) })
}

/// Mounts a FUSE file system that no directory shows, and gives a descriptor of its root.
///
/// Nothing of it can be left behind: it lives exactly as long as descriptors and the loop device hold
/// it, and a killed engine leaves no dead mount point.
pub(crate) fn mount_fuse_detached(fuse: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const FSCONFIG_SET_STRING: u32 = 1;
    const FSCONFIG_CMD_CREATE: u32 = 6;
    const CLOEXEC: u32 = 1;
    // SAFETY: a terminated name.
    let context = owned(check_long(unsafe { libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), CLOEXEC) })?);
    let fd = CString::new(fuse.as_raw_fd().to_string())?;
    let settings = [
        (c"source", c"palisade"),
        (c"fd", fd.as_c_str()),
        (c"rootmode", c"40000"),
        (c"user_id", c"0"),
        (c"group_id", c"0"),
    ];
    for (key, value) in settings {
        // SAFETY: terminated strings, which the kernel copies.
        check_long(unsafe {
            let context = context.as_raw_fd();
            libc::syscall(libc::SYS_fsconfig, context, FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr(), 0)
        })?;
    }
    let nothing = std::ptr::null::<libc::c_char>();
    // SAFETY: this command takes no key and no value.
    check_long(unsafe {
        let context = context.as_raw_fd();
        libc::syscall(libc::SYS_fsconfig, context, FSCONFIG_CMD_CREATE, nothing, nothing, 0)
    })?;
    let attributes = (libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC) as u32;
    // SAFETY: numbers only.
    let mount =
        check_long(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOEXEC, attributes) })?;
    Ok(owned(mount))
}

/// Opens a file below a directory descriptor for reading and writing.
pub(crate) fn open_at(directory: RawFd, name: &CStr) -> io::Result<File> {
    // SAFETY: a terminated name; a wrong descriptor is an error of the call.
    let fd = check(unsafe { libc::openat(directory, name.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) })?;
    Ok(File::from(owned(fd)))
}

/// Asks a file system for the current attributes of a file below a directory descriptor.
pub(crate) fn refresh_attributes(directory: RawFd, name: &CStr) -> io::Result<u64> {
    // SAFETY: all-zero is a valid statx buffer.
    let mut buf: libc::statx = unsafe { std::mem::zeroed() };
    let flags = libc::AT_STATX_FORCE_SYNC;
    // SAFETY: a terminated name and a writable buffer.
    check(unsafe { libc::statx(directory, name.as_ptr(), flags, libc::STATX_SIZE, &raw mut buf) })?;
    Ok(buf.stx_size)
}

/// A connected pair of stream sockets.
pub(crate) fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: room for two descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) })?;
    Ok((owned(fds[0]), owned(fds[1])))
}

/// A generic netlink socket.
pub(crate) fn netlink_socket() -> io::Result<File> {
    const NETLINK_GENERIC: libc::c_int = 16;
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_NETLINK, kind, NETLINK_GENERIC) })?;
    Ok(File::from(owned(fd)))
}

/// Makes a descriptor non-blocking.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) }).map(drop)
}

/// The number of a device from its metadata.
pub(crate) fn dev_number(metadata: &std::fs::Metadata) -> DevNumber {
    DevNumber { major: libc::major(metadata.rdev()), minor: libc::minor(metadata.rdev()) }
}
