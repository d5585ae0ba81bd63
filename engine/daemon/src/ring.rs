//! A safe wrapper around one io_uring: operations own their buffers and descriptors until they complete.
//!
//! An [`Op`] is handed in with a token and comes back with it and the result. Because the ring keeps the
//! operation, and with it every byte the kernel reads or writes, nothing can be freed or changed under it.
//! Nothing here knows what the bytes mean.

#![allow(unsafe_code)]

use bytes::Bytes;
use io_uring::{IoUring, opcode, squeue, types};
use palisade_export::AlignedBuf;
use palisade_export::nbd::InputBuf;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

/// A descriptor shared by whoever uses it and the operations on it; closed with the last of them.
pub type Fd = Rc<OwnedFd>;

/// Submission queue entries; the kernel's completion queue has twice as many and keeps what overflows.
const ENTRIES: u32 = 1024;
/// Chunks of one send; the kernel takes at most 1024 (`UIO_MAXIOV`).
pub const SEND_CHUNKS_MAX: usize = 256;

/// Memory to receive into.
#[derive(Debug)]
pub enum Buf {
    /// Part of an aligned buffer, from `start` on.
    Aligned {
        /// Memory.
        buf: AlignedBuf,
        /// Bytes in front that stay as they are.
        start: usize,
    },
    /// What an NBD session wants filled.
    Nbd(InputBuf),
    /// Plain memory, all of it.
    Plain(Vec<u8>),
}

impl Buf {
    fn space(&mut self) -> &mut [u8] {
        match self {
            Self::Aligned { buf, start } => buf.get_mut(*start..).unwrap_or_default(),
            Self::Nbd(input) => input.as_mut_slice(),
            Self::Plain(memory) => memory,
        }
    }
}

/// Chunks of one send with the structures the kernel reads.
#[derive(Debug)]
pub struct Message {
    /// What is sent, in order.
    pub chunks: Vec<Bytes>,
    iov: Vec<libc::iovec>,
    header: Box<libc::msghdr>,
}

/// An address as the kernel wants it.
#[derive(Debug)]
pub struct Address {
    storage: Box<libc::sockaddr_storage>,
    len: libc::socklen_t,
}

/// One operation.
#[derive(Debug)]
pub enum Op {
    /// Receive from a socket; the result is the number of bytes.
    Recv {
        /// Socket.
        fd: Fd,
        /// Where to.
        buf: Buf,
        /// Only complete when the buffer is full (or the stream ended).
        all: bool,
    },
    /// Send on a socket; the result is the number of bytes.
    Send {
        /// Socket.
        fd: Fd,
        /// What.
        message: Message,
    },
    /// Accept a connection; the new socket is in [`Done::socket`].
    Accept {
        /// Listening socket.
        fd: Fd,
    },
    /// Connect a socket.
    Connect {
        /// Socket.
        fd: Fd,
        /// Where to.
        address: Address,
    },
    /// Wait until a descriptor is readable.
    Poll {
        /// Descriptor.
        fd: Fd,
    },
    /// Read from a file or device.
    Read {
        /// File.
        fd: Fd,
        /// Byte position of the first byte still missing.
        pos: u64,
        /// Memory; everything from `start` on is filled.
        buf: AlignedBuf,
        /// Bytes already there.
        start: usize,
    },
    /// Write to a file or device.
    Write {
        /// File.
        fd: Fd,
        /// Byte position.
        pos: u64,
        /// What.
        data: Bytes,
        /// Stable when complete.
        dsync: bool,
    },
    /// Make everything written durable.
    Sync {
        /// File.
        fd: Fd,
    },
    /// `fallocate(2)`.
    Allocate {
        /// File.
        fd: Fd,
        /// Byte position.
        pos: u64,
        /// Bytes.
        len: u64,
        /// `FALLOC_FL_*`.
        mode: i32,
    },
    /// Cancel another operation, which completes in any case.
    Cancel {
        /// What [`Ring::push`] gave.
        key: Key,
    },
}

impl Op {
    /// A send of the given chunks, at most [`SEND_CHUNKS_MAX`] of them.
    #[must_use]
    pub fn send(fd: Fd, chunks: Vec<Bytes>) -> Self {
        let iov = chunks
            .iter()
            .map(|c| libc::iovec { iov_base: c.as_ptr().cast_mut().cast(), iov_len: c.len() })
            .collect();
        // SAFETY: all-zero is a valid msghdr: no name, no vectors, no control data.
        let header = Box::new(unsafe { std::mem::zeroed::<libc::msghdr>() });
        Self::Send { fd, message: Message { chunks, iov, header } }
    }

    /// A connect to `to`.
    #[must_use]
    pub fn connect(fd: Fd, to: SocketAddr) -> Self {
        let (storage, len) = crate::sys::sockaddr(to);
        Self::Connect { fd, address: Address { storage: Box::new(storage), len } }
    }
}

/// Names an operation in flight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key {
    slot: u32,
    serial: u32,
}

impl Key {
    fn user_data(self) -> u64 {
        u64::from(self.serial) << 32 | u64::from(self.slot)
    }
}

/// A completed operation.
#[derive(Debug)]
pub struct Done<T> {
    /// As handed in.
    pub token: T,
    /// As handed in; buffers are filled or written.
    pub op: Op,
    /// Not negative, or the error.
    pub result: io::Result<u32>,
    /// The new connection of a successful accept.
    pub socket: Option<Fd>,
}

struct Slot<T> {
    serial: u32,
    job: Option<(T, Op)>,
}

/// The ring. `T` says what a completion is about.
pub struct Ring<T> {
    uring: IoUring,
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

impl<T> Ring<T> {
    /// A new ring.
    ///
    /// # Errors
    /// The kernel has no io_uring or forbids it.
    pub fn new() -> io::Result<Self> {
        let mut best = IoUring::builder();
        best.setup_single_issuer().setup_coop_taskrun().setup_defer_taskrun();
        let uring = best.build(ENTRIES).or_else(|_| IoUring::new(ENTRIES))?;
        Ok(Self { uring, slots: Vec::new(), free: Vec::new() })
    }

    /// Queues an operation; it starts with the next [`Self::wait`] at the latest.
    pub fn push(&mut self, token: T, op: Op) -> Key {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { serial: 0, job: None });
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        let entry = &mut self.slots[slot as usize];
        entry.serial = entry.serial.wrapping_add(1);
        let key = Key { slot, serial: entry.serial };
        let (_, op) = entry.job.insert((token, op));
        let sqe = prepare(op).user_data(key.user_data());
        loop {
            // SAFETY: everything the entry points to is owned by the slot (heap memory that does not move) and
            // stays there until the completion is taken out in `next`.
            if unsafe { self.uring.submission().push(&sqe) }.is_ok() {
                return key;
            }
            // Full: hand over what is there. Errors (EBUSY, EINTR) pass by trying again.
            let _ = self.uring.submit();
        }
    }

    /// Submits what is queued and waits until something completed or the time is over.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        let result = match limit {
            None => self.uring.submit_and_wait(1),
            Some(limit) => {
                let time = types::Timespec::from(limit);
                let args = types::SubmitArgs::new().timespec(&time);
                self.uring.submitter().submit_with_args(1, &args)
            }
        };
        match result {
            Ok(_) => Ok(()),
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
                ) =>
            {
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// The next completion that arrived.
    pub fn next(&mut self) -> Option<Done<T>> {
        loop {
            let cqe = self.uring.completion().next()?;
            let data = cqe.user_data();
            let (slot, serial) = ((data & u64::from(u32::MAX)) as u32, (data >> 32) as u32);
            let Some(entry) = self.slots.get_mut(slot as usize) else { continue };
            if entry.serial != serial {
                continue;
            }
            let Some((token, op)) = entry.job.take() else { continue };
            self.free.push(slot);
            let result = u32::try_from(cqe.result()).map_err(|_| io::Error::from_raw_os_error(-cqe.result()));
            let socket = match op {
                Op::Accept { .. } if cqe.result() >= 0 => {
                    // SAFETY: a successful accept gives a new descriptor that nobody else owns, and each
                    // completion is taken out once.
                    Some(Rc::new(unsafe { OwnedFd::from_raw_fd(cqe.result()) }))
                }
                _ => None,
            };
            return Some(Done { token, op, result, socket });
        }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // The kernel may still use the memory of what is in flight: it must outlive the ring.
        for slot in self.slots.drain(..) {
            std::mem::forget(slot.job);
        }
    }
}

/// What of `chunks` remains after `count` bytes were sent.
#[must_use]
pub fn unsent(chunks: Vec<Bytes>, mut count: usize) -> Vec<Bytes> {
    let mut rest = Vec::new();
    for mut chunk in chunks {
        let done = count.min(chunk.len());
        count -= done;
        if done < chunk.len() {
            let _ = chunk.split_to(done);
            rest.push(chunk);
        }
    }
    rest
}

fn len32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(1 << 30)
}

/// The submission entry of an operation whose memory is at its final place.
fn prepare(op: &mut Op) -> squeue::Entry {
    let raw = |fd: &Fd| types::Fd(fd.as_raw_fd());
    match op {
        Op::Recv { fd, buf, all } => {
            let space = buf.space();
            let flags = if *all { libc::MSG_WAITALL } else { 0 };
            opcode::Recv::new(raw(fd), space.as_mut_ptr(), len32(space.len())).flags(flags).build()
        }
        Op::Send { fd, message } => {
            message.header.msg_iov = message.iov.as_mut_ptr();
            message.header.msg_iovlen = message.iov.len();
            let flags = libc::MSG_NOSIGNAL as u32;
            opcode::SendMsg::new(raw(fd), std::ptr::from_ref(&*message.header)).flags(flags).build()
        }
        Op::Accept { fd } => opcode::Accept::new(raw(fd), std::ptr::null_mut(), std::ptr::null_mut())
            .flags(libc::SOCK_CLOEXEC)
            .build(),
        Op::Connect { fd, address } => {
            let at = std::ptr::from_ref(&*address.storage).cast::<libc::sockaddr>();
            opcode::Connect::new(raw(fd), at, address.len).build()
        }
        Op::Poll { fd } => opcode::PollAdd::new(raw(fd), libc::POLLIN as u32).build(),
        Op::Read { fd, pos, buf, start } => {
            let space = buf.get_mut(*start..).unwrap_or_default();
            opcode::Read::new(raw(fd), space.as_mut_ptr(), len32(space.len())).offset(*pos).build()
        }
        Op::Write { fd, pos, data, dsync } => {
            let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
            opcode::Write::new(raw(fd), data.as_ptr(), len32(data.len())).offset(*pos).rw_flags(flags).build()
        }
        Op::Sync { fd } => opcode::Fsync::new(raw(fd)).flags(types::FsyncFlags::DATASYNC).build(),
        Op::Allocate { fd, pos, len, mode } => {
            opcode::Fallocate::new(raw(fd), *len).offset(*pos).mode(*mode).build()
        }
        Op::Cancel { key } => opcode::AsyncCancel::new(key.user_data()).build(),
    }
}
