//! System calls without a safe wrapper in the standard library: sockets that bind before they connect,
//! descriptor locks, device facts, signals and process attributes.

#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A socket address in the kernel's form, and its length in bytes.
#[must_use]
pub fn sockaddr(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: all-zero is a valid sockaddr_storage.
    let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
    let at = std::ptr::from_mut(&mut storage);
    let len = match address {
        SocketAddr::V4(a) => {
            let sin = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: a.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(a.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: sockaddr_storage is large and aligned enough for every address family.
            unsafe { at.cast::<libc::sockaddr_in>().write(sin) };
            mem::size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(a) => {
            let sin6 = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: a.port().to_be(),
                sin6_flowinfo: a.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: a.ip().octets() },
                sin6_scope_id: a.scope_id(),
            };
            // SAFETY: as above.
            unsafe { at.cast::<libc::sockaddr_in6>().write(sin6) };
            mem::size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, len as libc::socklen_t)
}

/// The order of two addresses as the transport compares them: family, port, then IP, in network order
/// (`spec/wire-protocol.md` §2.3).
#[must_use]
pub fn compare_addresses(a: SocketAddr, b: SocketAddr) -> std::cmp::Ordering {
    let bytes = |address: SocketAddr| -> Vec<u8> {
        let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 } as u16;
        let mut out = family.to_ne_bytes().to_vec();
        out.extend(address.port().to_be_bytes());
        match address {
            SocketAddr::V4(a) => out.extend(a.ip().octets()),
            SocketAddr::V6(a) => {
                out.extend(a.flowinfo().to_ne_bytes());
                out.extend(a.ip().octets());
            }
        }
        out
    };
    bytes(a).cmp(&bytes(b))
}

/// A TCP socket bound to `local` with an ephemeral port.
///
/// # Errors
/// The address is not there, or no descriptor is left.
pub fn tcp_socket(local: IpAddr) -> io::Result<OwnedFd> {
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no pointers; the result is checked.
    let raw = check(unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    let (storage, len) = sockaddr(SocketAddr::new(local, 0));
    // SAFETY: the address is valid for `len` bytes.
    check(unsafe { libc::bind(raw, std::ptr::from_ref(&storage).cast(), len) })?;
    Ok(fd)
}

/// Sets an integer socket option.
///
/// # Errors
/// The socket refuses.
pub fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    let len = mem::size_of::<i32>() as libc::socklen_t;
    // SAFETY: the value is an int and lives through the call.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, std::ptr::from_ref(&value).cast(), len) })
        .map(drop)
}

/// What both sockets of a link get: no delay, and on the data socket keepalive as the kernel's transport
/// sets it (`spec/wire-protocol.md` §2.5).
pub fn tune_link(fd: BorrowedFd<'_>, keepalive: bool) {
    let mut options = vec![(libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)];
    if keepalive {
        options.extend([
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
            (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 23),
            (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 23),
            (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 9),
        ]);
    }
    for (level, name, value) in options {
        if let Err(error) = set_option(fd, level, name, value) {
            tracing::debug!("socket option {name} cannot be set: {error}");
        }
    }
}

/// Whether a TCP socket is in state ESTABLISHED.
#[must_use]
pub fn is_established(fd: BorrowedFd<'_>) -> bool {
    const TCP_ESTABLISHED: u8 = 1;
    // SAFETY: all-zero is a valid tcp_info.
    let mut info: libc::tcp_info = unsafe { mem::zeroed() };
    let mut len = mem::size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            std::ptr::from_mut(&mut info).cast(),
            &raw mut len,
        )
    };
    result == 0 && info.tcpi_state == TCP_ESTABLISHED
}

/// Sends a few bytes on a fresh socket, whose buffer is empty.
///
/// # Errors
/// The socket is not connected any more.
pub fn send_now(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the buffer is valid for its length.
    let sent = unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    if usize::try_from(sent) == Ok(bytes.len()) { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ends both directions; receives in flight complete. Errors do not matter: it is ended then.
pub fn shutdown(fd: BorrowedFd<'_>) {
    // SAFETY: no pointers.
    unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_RDWR) };
}

/// Says that nothing more will be sent.
pub fn shutdown_write(fd: BorrowedFd<'_>) {
    // SAFETY: no pointers.
    unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_WR) };
}

/// Takes an exclusive lock on a file, without waiting. `false`: someone else has it.
///
/// # Errors
/// Locks are not possible there.
pub fn lock_file(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: no pointers.
    match check(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(e) => Err(e),
    }
}

/// Takes an exclusive lock on a byte range that lasts as long as the open file. `false`: someone has it.
///
/// # Errors
/// Locks are not possible there.
pub fn lock_range(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<bool> {
    // SAFETY: all-zero is a valid flock structure.
    let mut lock: libc::flock = unsafe { mem::zeroed() };
    lock.l_type = libc::F_WRLCK as i16;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = i64::try_from(start).unwrap_or(i64::MAX);
    lock.l_len = i64::try_from(len).unwrap_or(0);
    // SAFETY: the structure is valid for the call.
    match check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, std::ptr::from_ref(&lock)) }) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Logical and physical block size of a block device, bytes.
///
/// # Errors
/// Not a block device.
pub fn block_sizes(fd: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    const BLKSSZGET: libc::Ioctl = 0x1268;
    const BLKPBSZGET: libc::Ioctl = 0x127b;
    let (mut logical, mut physical): (libc::c_int, libc::c_uint) = (512, 512);
    // SAFETY: writes one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), BLKSSZGET, &raw mut logical) })?;
    // SAFETY: writes one unsigned int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), BLKPBSZGET, &raw mut physical) })?;
    Ok((u32::try_from(logical).unwrap_or(512), physical))
}

/// Smallest unit of direct I/O on a file: `(memory, offset)` in bytes; `None` where it is not possible or
/// the kernel cannot tell.
#[must_use]
pub fn direct_alignment(fd: BorrowedFd<'_>) -> Option<(u32, u32)> {
    const STATX_DIOALIGN: u32 = 0x2000;
    // SAFETY: all-zero is a valid statx structure.
    let mut stat: libc::statx = unsafe { mem::zeroed() };
    // SAFETY: the path is an empty C string and the structure is written by the kernel.
    let result = unsafe {
        libc::statx(fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, STATX_DIOALIGN, &raw mut stat)
    };
    (result == 0 && stat.stx_mask & STATX_DIOALIGN != 0 && stat.stx_dio_offset_align != 0)
        .then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

/// The first byte at or after `pos` that a file has allocated, or the first it has not; `None` when there is none.
///
/// # Errors
/// The file system cannot tell.
pub fn seek_allocated(fd: BorrowedFd<'_>, pos: u64, allocated: bool) -> io::Result<Option<u64>> {
    let whence = if allocated { libc::SEEK_DATA } else { libc::SEEK_HOLE };
    let pos = libc::off64_t::try_from(pos).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: no memory is involved; nobody uses the position of the open file.
    let found = unsafe { libc::lseek64(fd.as_raw_fd(), pos, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            e => Err(e),
        },
    }
}

/// A descriptor that becomes readable on SIGTERM and SIGINT, which are blocked for the process.
///
/// # Errors
/// No descriptor is left.
pub fn signal_fd() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use; the signals are valid numbers.
    let raw = unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))?;
        check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?
    };
    // SAFETY: a fresh descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Takes one signal off a [`signal_fd`].
pub fn take_signal(fd: BorrowedFd<'_>) -> Option<u32> {
    // SAFETY: all-zero is a valid structure.
    let mut info: libc::signalfd_siginfo = unsafe { mem::zeroed() };
    let size = mem::size_of::<libc::signalfd_siginfo>();
    // SAFETY: the kernel writes at most `size` bytes.
    let got = unsafe { libc::read(fd.as_raw_fd(), std::ptr::from_mut(&mut info).cast(), size) };
    (usize::try_from(got) == Ok(size)).then_some(info.ssi_signo)
}

/// Lets a child start with no signal blocked.
///
/// # Errors
/// None in practice.
pub fn unblock_signals() -> io::Result<()> {
    // SAFETY: the set is initialised by sigemptyset; async-signal-safe.
    unsafe {
        let mut set: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut set);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut())).map(drop)
    }
}

/// Runs `hook` in the child between fork and exec.
pub fn in_child(command: &mut std::process::Command, hook: fn() -> io::Result<()>) {
    use std::os::unix::process::CommandExt;
    // SAFETY: callers hand in functions that only make system calls.
    unsafe { command.pre_exec(hook) };
}

/// A descriptor that becomes readable when the process ended.
///
/// # Errors
/// The process is gone already, or the kernel is too old.
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: no pointers.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let raw = RawFd::try_from(raw).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    check(raw)?;
    // SAFETY: a fresh descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Kills the process group that `pid` leads.
pub fn kill_group(pid: u32) {
    if let Ok(pid) = libc::pid_t::try_from(pid)
        && pid > 1
    {
        // SAFETY: no pointers; the group was made by us for this child, which is not reaped yet.
        unsafe { libc::kill(-pid, libc::SIGKILL) };
    }
}

/// Keeps all memory of the process in RAM.
///
/// # Errors
/// Not allowed.
pub fn lock_memory() -> io::Result<()> {
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // With a finite limit, a later allocation could fail where it would not without the lock.
    // SAFETY: the structure is valid for the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | MCL_ONFAULT) }).map(drop)
}

/// Only pages that are touched; otherwise every thread's stack would be resident.
const MCL_ONFAULT: libc::c_int = 4;

/// Sets the file mode mask and returns the old one.
pub fn set_umask(mask: u32) -> u32 {
    // SAFETY: no pointers, cannot fail.
    unsafe { libc::umask(mask) }
}

/// Nanoseconds on the monotonic clock that also counts suspended time: what timeouts are about.
#[must_use]
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is written by the kernel.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Random bytes of the operating system.
///
/// # Errors
/// There are none.
pub fn random_bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut out = [0; N];
    // SAFETY: the buffer is valid for its length.
    let got = unsafe { libc::getrandom(out.as_mut_ptr().cast(), N, 0) };
    if usize::try_from(got) == Ok(N) { Ok(out) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cmp::Ordering;

    #[test]
    fn addresses_compare_by_port_before_ip() {
        let a = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(compare_addresses(a("10.0.0.2:7788"), a("10.0.0.1:7788")), Ordering::Greater);
        assert_eq!(compare_addresses(a("10.0.0.1:7789"), a("10.0.0.2:7788")), Ordering::Greater);
        assert_eq!(compare_addresses(a("10.0.0.1:256"), a("10.0.0.2:255")), Ordering::Greater);
        assert_eq!(compare_addresses(a("[fd00::1]:1"), a("[fd00::2]:1")), Ordering::Less);
    }
}
