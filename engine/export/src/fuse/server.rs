//! The FUSE file system of one file: requests from `/dev/fuse` to the engine, answers back.
//!
//! One thread reads; it copies payloads out of the kernel, which would hold up the engine's loop.
//! Answers are written by whoever has them: writing to `/dev/fuse` never waits.

use super::Note;
use super::proto::{self, Header, Reader};
use crate::channel::Sender;
use crate::sys::{self, EventFd};
use crate::{BlockRequest, BufferPool, Op, Reply};
use bytes::Bytes;
use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Unanswered requests and their payload bytes, beyond which none are read from the kernel.
const REQUESTS_MAX: usize = 512;
const PAYLOAD_BYTES_MAX: usize = 64 << 20;

/// Payloads up to this size are copied out of the receive buffer; larger ones keep it.
const COPY_MAX: usize = 64 * 1024;

/// What the file is like.
#[derive(Debug, Clone)]
pub(super) struct FileParams {
    pub name: Vec<u8>,
    pub block: u32,
    pub read_only: bool,
    pub discard: bool,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Read(u32),
    Write(u32),
    Plain,
}

#[derive(Debug, Default)]
struct Pending {
    kinds: HashMap<u64, Kind>,
    bytes: usize,
    stalled: bool,
    dead: bool,
}

impl Pending {
    fn is_full(&self) -> bool {
        self.kinds.len() >= REQUESTS_MAX || self.bytes >= PAYLOAD_BYTES_MAX
    }

    fn may_grow(&self) -> bool {
        !self.dead && !self.is_full()
    }
}

impl Kind {
    fn bytes(self) -> usize {
        match self {
            Self::Read(len) | Self::Write(len) => len as usize,
            Self::Plain => 0,
        }
    }
}

/// One `/dev/fuse` connection. When the last reference goes, the kernel ends the file system and fails
/// whatever still waits.
#[derive(Debug)]
pub(super) struct Connection {
    fuse: OwnedFd,
    wake: EventFd,
    file: FileParams,
    size: AtomicU64,
    pending: Mutex<Pending>,
}

impl Connection {
    pub fn new(fuse: OwnedFd, file: FileParams, size: u64) -> io::Result<Self> {
        sys::set_nonblocking(fuse.as_fd())?;
        let pending = Mutex::new(Pending::default());
        Ok(Self { fuse, wake: EventFd::new()?, file, size: AtomicU64::new(size), pending })
    }

    /// Mounts the file system, nowhere; gives its root.
    pub fn mount(&self) -> io::Result<OwnedFd> {
        sys::mount_fuse_detached(self.fuse.as_fd())
    }

    pub fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
    }

    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes the engine's answer on.
    pub fn complete(&self, id: u64, reply: Reply) {
        let kind = {
            let mut pending = self.pending();
            let Some(kind) = pending.kinds.remove(&id) else { return };
            pending.bytes -= kind.bytes();
            if pending.stalled && !pending.is_full() {
                pending.stalled = false;
                self.wake.signal();
            }
            kind
        };
        match (kind, reply) {
            (Kind::Read(len), Reply::Data(data)) if data.len() == len as usize => self.answer(id, 0, &data),
            (Kind::Write(len), Reply::Done) => self.answer(id, 0, &proto::write_reply(len)),
            (Kind::Plain, Reply::Done) => self.answer(id, 0, &[]),
            (_, Reply::Error(errno)) => self.answer(id, errno.linux(), &[]),
            // An answer of the wrong kind is a defect of the engine: fail closed.
            _ => self.answer(id, libc::EIO, &[]),
        }
    }

    /// Fails everything that waits, now and from now on, and lets the thread end.
    pub fn kill(&self) {
        let waiting: Vec<u64> = {
            let mut pending = self.pending();
            pending.dead = true;
            pending.bytes = 0;
            pending.kinds.drain().map(|(id, _)| id).collect()
        };
        for id in waiting {
            self.answer(id, libc::EIO, &[]);
        }
        self.wake.signal();
    }

    fn answer(&self, unique: u64, error: i32, payload: &[u8]) {
        let header = proto::reply_header(unique, error, payload.len());
        let parts = [IoSlice::new(&header), IoSlice::new(payload)];
        if let Err(failure) = sys::write_all_of(self.fuse.as_fd(), &parts, false) {
            // ENOENT: the requester was interrupted. ENODEV: the file system is gone.
            if !matches!(failure.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) {
                tracing::warn!(unique, %failure, "The kernel did not take an answer of the block device.");
            }
        }
    }

    fn answer_kind(&self, unique: u64, result: Result<Vec<u8>, i32>) {
        match result {
            Ok(payload) => self.answer(unique, 0, &payload),
            Err(error) => self.answer(unique, error, &[]),
        }
    }

    /// Serves until [`Self::kill`] or the end of the file system; gives the reason of the latter.
    pub fn serve(&self, pool: &BufferPool, requests: &Sender<Note>) -> Option<String> {
        let mut head = [0u8; proto::HEAD_LEN];
        let mut body = pool.alloc(proto::IO_MAX);
        loop {
            let stalled = {
                let mut pending = self.pending();
                if pending.dead {
                    return None;
                }
                pending.stalled = pending.is_full();
                pending.stalled
            };
            let wanted = if stalled { 0 } else { libc::POLLIN };
            let ready = match sys::poll([(self.fuse.as_fd(), wanted), (self.wake.as_fd(), libc::POLLIN)]) {
                Ok(ready) => ready,
                Err(error) => return Some(format!("waiting for the kernel failed: {error}")),
            };
            if ready[1] != 0 {
                self.wake.clear();
                continue;
            }
            // As long as the kernel has more, the extra poll is saved.
            while self.pending().may_grow() {
                let len = match sys::read_two(self.fuse.as_fd(), &mut head, &mut body) {
                    Ok(len) => len,
                    Err(error) => match error.raw_os_error() {
                        Some(libc::EAGAIN) => break,
                        // The request was interrupted while we were reading it.
                        Some(libc::ENOENT | libc::EINTR) => continue,
                        Some(libc::ENODEV) => return Some("the loop device was released".into()),
                        _ => return Some(format!("reading from /dev/fuse failed: {error}")),
                    },
                };
                let Some(header) = Header::parse(head.get(..len.min(head.len())).unwrap_or_default()) else {
                    return Some("the kernel sent a request that is too short".into());
                };
                if header.len as usize != len {
                    return Some("the kernel sent a request with a wrong length".into());
                }
                if header.opcode == proto::DESTROY {
                    self.answer(header.unique, 0, &[]);
                    return Some("the file system was unmounted".into());
                }
                let payload_len = len.saturating_sub(proto::HEAD_LEN);
                if header.opcode == proto::WRITE && payload_len > COPY_MAX {
                    let mut full = std::mem::replace(&mut body, pool.alloc(proto::IO_MAX));
                    full.truncate(payload_len);
                    self.write(header, &head, full.freeze(), requests);
                } else if header.opcode == proto::WRITE {
                    let payload = pool.copy_from(body.get(..payload_len).unwrap_or_default());
                    self.write(header, &head, payload.freeze(), requests);
                } else {
                    let mut arguments =
                        head.get(proto::HEADER_LEN..len.min(head.len())).unwrap_or_default().to_vec();
                    arguments.extend_from_slice(body.get(..payload_len).unwrap_or_default());
                    self.dispatch(header, &arguments, requests);
                }
            }
        }
    }

    fn write(&self, header: Header, head: &[u8; proto::HEAD_LEN], data: Bytes, requests: &Sender<Note>) {
        let mut r = Reader(head.get(proto::HEADER_LEN..).unwrap_or_default());
        let (Some(_handle), Some(offset), Some(len)) = (r.u64(), r.u64(), r.u32()) else { return };
        let result = if data.len() != len as usize || !self.is_inside(offset, u64::from(len)) {
            Err(libc::EINVAL)
        } else if self.file.read_only {
            Err(libc::EROFS)
        } else {
            Ok(Op::Write { offset, data, fua: false })
        };
        self.queue(header.unique, Kind::Write(len), result, requests);
    }

    fn dispatch(&self, header: Header, arguments: &[u8], requests: &Sender<Note>) {
        let unique = header.unique;
        match header.opcode {
            proto::INIT => self.answer_kind(unique, init(arguments)),
            proto::LOOKUP => {
                let name = arguments.strip_suffix(&[0]);
                let found = header.node == proto::ROOT && name == Some(self.file.name.as_slice());
                let result = if found { Ok(proto::entry_reply(self.size())) } else { Err(libc::ENOENT) };
                self.answer_kind(unique, result);
            }
            proto::GETATTR => self.answer(unique, 0, &proto::attributes_reply(header.node, self.size())),
            proto::OPEN if header.node == proto::FILE => self.answer(unique, 0, &proto::open_reply()),
            proto::STATFS => self.answer(unique, 0, &proto::statfs_reply(self.size(), self.file.block)),
            proto::FLUSH | proto::ACCESS => self.answer(unique, 0, &[]),
            proto::RELEASE => {
                self.answer(unique, 0, &[]);
                requests.send(Note::Released);
            }
            proto::FSYNC => self.queue(unique, Kind::Plain, Ok(Op::Flush), requests),
            proto::READ => {
                let (result, len) = self.read(arguments);
                self.queue(unique, Kind::Read(len), result, requests);
            }
            proto::FALLOCATE => self.queue(unique, Kind::Plain, self.fallocate(arguments), requests),
            proto::FORGET | proto::BATCH_FORGET | proto::INTERRUPT => {}
            _ => self.answer(unique, libc::ENOSYS, &[]),
        }
    }

    fn read(&self, arguments: &[u8]) -> (Result<Op, i32>, u32) {
        let mut r = Reader(arguments);
        let (Some(_handle), Some(offset), Some(len)) = (r.u64(), r.u64(), r.u32()) else {
            return (Err(libc::EINVAL), 0);
        };
        let fits = len as usize <= proto::IO_MAX && self.is_inside(offset, u64::from(len));
        (if fits { Ok(Op::Read { offset, len }) } else { Err(libc::EINVAL) }, len)
    }

    /// The loop device punches a hole both to discard and to write zeroes that may be unmapped, and
    /// counts on zeroes in both cases; so both are [`Op::WriteZeroes`].
    fn fallocate(&self, arguments: &[u8]) -> Result<Op, i32> {
        let mut r = Reader(arguments);
        let (Some(_handle), Some(offset), Some(len), Some(mode)) = (r.u64(), r.u64(), r.u64(), r.u32())
        else {
            return Err(libc::EINVAL);
        };
        let may_unmap = mode & libc::FALLOC_FL_PUNCH_HOLE as u32 != 0;
        let zero_range = mode & libc::FALLOC_FL_ZERO_RANGE as u32 != 0;
        if !(may_unmap || zero_range) || (may_unmap && !self.file.discard) {
            return Err(libc::EOPNOTSUPP);
        }
        if self.file.read_only {
            return Err(libc::EROFS);
        }
        if !self.is_inside(offset, len) {
            return Err(libc::EINVAL);
        }
        Ok(Op::WriteZeroes { offset, len, may_unmap, fua: false, fast: false })
    }

    /// Not empty, within the file, and in whole blocks.
    fn is_inside(&self, offset: u64, len: u64) -> bool {
        let block = u64::from(self.file.block.max(1));
        len != 0
            && offset.is_multiple_of(block)
            && len.is_multiple_of(block)
            && offset.checked_add(len).is_some_and(|end| end <= self.size())
    }

    fn queue(&self, unique: u64, kind: Kind, op: Result<Op, i32>, requests: &Sender<Note>) {
        let op = match op {
            Ok(op) => op,
            Err(error) => return self.answer(unique, error, &[]),
        };
        {
            let mut pending = self.pending();
            if pending.dead {
                drop(pending);
                return self.answer(unique, libc::EIO, &[]);
            }
            pending.bytes += kind.bytes();
            pending.kinds.insert(unique, kind);
        }
        requests.send(Note::Request(BlockRequest { id: unique, op }));
    }
}

fn init(arguments: &[u8]) -> Result<Vec<u8>, i32> {
    let mut r = Reader(arguments);
    let (Some(major), Some(_minor), Some(readahead), Some(flags)) = (r.u32(), r.u32(), r.u32(), r.u32())
    else {
        return Err(libc::EINVAL);
    };
    if major < proto::MAJOR {
        return Err(libc::EPROTO);
    }
    Ok(proto::init_reply(readahead, flags))
}

/// Starts the thread that serves a connection.
pub(super) fn spawn(
    connection: &Arc<Connection>,
    pool: BufferPool,
    requests: Sender<Note>,
) -> io::Result<std::thread::JoinHandle<()>> {
    let connection = Arc::clone(connection);
    std::thread::Builder::new().name("fuse".into()).spawn(move || {
        if let Err(error) = sys::set_io_flusher() {
            tracing::warn!(%error, "The FUSE thread is not exempt from waiting for block I/O.");
        }
        if let Some(reason) = connection.serve(&pool, &requests) {
            requests.send(Note::Gone(reason));
        }
    })
}
