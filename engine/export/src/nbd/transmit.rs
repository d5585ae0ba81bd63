//! Transmission: request headers in, checked requests out; replies in, reply bytes out.

use super::negotiate::{ID_ALLOCATION, ID_OUT_OF_SYNC};
use super::proto::{self, Reader};
use super::session::{Close, Phase, Session};
use crate::{BlockRequest, Errno, Extent, Op, Reply};
use bytes::{BufMut, Bytes};

/// Most extents sent in one reply; a client asks again for the rest.
const EXTENTS_MAX: usize = 16 * 1024;

/// Error numbers of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum WireError {
    None = 0,
    Perm = 1,
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
    NotSupported = 95,
    Shutdown = 108,
}

impl From<Errno> for WireError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::Io => Self::Io,
            Errno::NoSpace => Self::NoSpace,
            Errno::Invalid => Self::Invalid,
            Errno::NotSupported => Self::NotSupported,
            Errno::Shutdown => Self::Shutdown,
            Errno::Perm => Self::Perm,
        }
    }
}

/// A write whose payload is being received.
#[derive(Debug, Clone, Copy)]
pub(super) struct Write {
    cookie: u64,
    offset: u64,
    fua: bool,
}

/// What an unanswered request needs for its reply.
#[derive(Debug)]
pub(super) struct Pending {
    cookie: u64,
    pub bytes: usize,
    kind: Kind,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Read { offset: u64, len: u32 },
    Status { len: u64, one: bool },
    Plain,
}

/// A request header as it came.
struct Header {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    len: u32,
}

fn parse_header(bytes: &[u8]) -> Option<(u32, Header)> {
    let mut r = Reader(bytes);
    let magic = r.u32()?;
    let (flags, command) = (r.u16()?, r.u16()?);
    let (cookie, offset, len) = (r.u64()?, r.u64()?, r.u32()?);
    Some((magic, Header { flags, command, cookie, offset, len }))
}

impl Session {
    pub(super) fn step_request(&mut self) -> bool {
        let Some((magic, header)) = self.peek(proto::REQUEST_LEN).and_then(parse_header) else {
            return false;
        };
        self.skip(proto::REQUEST_LEN);
        if magic != proto::REQUEST_MAGIC {
            self.close(Close::Protocol("wrong request magic"));
            return false;
        }
        if header.command == proto::CMD_DISC {
            self.close(Close::Requested);
            return false;
        }
        match self.check(&header) {
            Ok(()) => self.accept(&header),
            Err(error) if header.command == proto::CMD_WRITE => {
                let left = header.len as usize;
                self.phase = Phase::PayloadSkip { cookie: header.cookie, error, left };
            }
            Err(error) => self.put_error(&header, error),
        }
        true
    }

    /// Whether a request may be passed on.
    fn check(&self, header: &Header) -> Result<(), WireError> {
        let export = self.chosen.and_then(|index| self.exports.get(index)).ok_or(WireError::Invalid)?;
        let allowed = match header.command {
            proto::CMD_READ => proto::CMD_FLAG_FUA | proto::CMD_FLAG_DF,
            proto::CMD_WRITE | proto::CMD_FLUSH | proto::CMD_TRIM => proto::CMD_FLAG_FUA,
            proto::CMD_WRITE_ZEROES => {
                proto::CMD_FLAG_FUA | proto::CMD_FLAG_NO_HOLE | proto::CMD_FLAG_FAST_ZERO
            }
            proto::CMD_BLOCK_STATUS => proto::CMD_FLAG_FUA | proto::CMD_FLAG_REQ_ONE,
            _ => return Err(WireError::Invalid),
        };
        if header.flags & !allowed != 0 {
            return Err(WireError::Invalid);
        }
        if header.command == proto::CMD_FLUSH {
            let empty = header.offset == 0 && header.len == 0;
            return if empty { Ok(()) } else { Err(WireError::Invalid) };
        }
        let writes = matches!(header.command, proto::CMD_WRITE | proto::CMD_TRIM | proto::CMD_WRITE_ZEROES);
        if writes && export.read_only {
            return Err(WireError::Perm);
        }
        if header.command == proto::CMD_TRIM && !export.discard {
            return Err(WireError::Invalid);
        }
        if header.command == proto::CMD_BLOCK_STATUS
            && (header.len == 0 || !(self.contexts.allocation || self.contexts.out_of_sync))
        {
            return Err(WireError::Invalid);
        }
        let payload = matches!(header.command, proto::CMD_READ | proto::CMD_WRITE);
        if payload && header.len > self.limits.payload_max {
            return Err(WireError::Invalid);
        }
        let block = u64::from(export.block_min.max(1));
        if !header.offset.is_multiple_of(block) || !u64::from(header.len).is_multiple_of(block) {
            return Err(WireError::Invalid);
        }
        match header.offset.checked_add(u64::from(header.len)) {
            Some(end) if end <= self.size => Ok(()),
            // Protocol: a write beyond the end is "no space", anything else is invalid.
            _ if matches!(header.command, proto::CMD_WRITE | proto::CMD_WRITE_ZEROES) => {
                Err(WireError::NoSpace)
            }
            _ => Err(WireError::Invalid),
        }
    }

    /// Queues a checked request, or begins to gather its payload.
    fn accept(&mut self, header: &Header) {
        let Header { cookie, offset, len, .. } = *header;
        let fua = header.flags & proto::CMD_FLAG_FUA != 0;
        let len64 = u64::from(len);
        match header.command {
            proto::CMD_FLUSH => self.queue(cookie, Kind::Plain, Op::Flush),
            // Nothing to do is done; the engine's requests are never empty.
            _ if len == 0 && header.command == proto::CMD_READ => {
                self.put_read(cookie, offset, Bytes::new());
            }
            _ if len == 0 => self.put_simple(cookie, WireError::None),
            proto::CMD_READ => self.queue(cookie, Kind::Read { offset, len }, Op::Read { offset, len }),
            proto::CMD_WRITE => {
                let buf = Some(self.pool.alloc(len as usize));
                self.phase = Phase::Payload { write: Write { cookie, offset, fua }, buf, filled: 0 };
            }
            proto::CMD_TRIM => self.queue(cookie, Kind::Plain, Op::Discard { offset, len: len64, fua }),
            proto::CMD_WRITE_ZEROES => {
                let may_unmap = header.flags & proto::CMD_FLAG_NO_HOLE == 0;
                let fast = header.flags & proto::CMD_FLAG_FAST_ZERO != 0;
                let op = Op::WriteZeroes { offset, len: len64, may_unmap, fua, fast };
                self.queue(cookie, Kind::Plain, op);
            }
            _ => {
                let one = header.flags & proto::CMD_FLAG_REQ_ONE != 0;
                let op = Op::BlockStatus { offset, len: len64, one };
                self.queue(cookie, Kind::Status { len: len64, one }, op);
            }
        }
    }

    pub(super) fn step_payload(&mut self) -> bool {
        if !self.gather() {
            return false;
        }
        let phase = std::mem::replace(&mut self.phase, Phase::Request);
        if let Phase::Payload { write, buf: Some(buf), .. } = phase {
            let Write { cookie, offset, fua } = write;
            self.queue(cookie, Kind::Plain, Op::Write { offset, data: buf.freeze(), fua });
        }
        true
    }

    fn queue(&mut self, cookie: u64, kind: Kind, op: Op) {
        let id = self.next_id;
        self.next_id += 1;
        let bytes = op.payload_len();
        self.pending_bytes += bytes;
        self.pending.insert(id, Pending { cookie, bytes, kind });
        self.requests.push_back(BlockRequest { id, op });
    }

    /// Turns the engine's answer into bytes.
    pub(super) fn put_reply(&mut self, pending: &Pending, reply: Reply) {
        let cookie = pending.cookie;
        match (pending.kind, reply) {
            (Kind::Plain, Reply::Done) => self.put_simple(cookie, WireError::None),
            (Kind::Read { offset, len }, Reply::Data(data)) if data.len() == len as usize => {
                self.put_read(cookie, offset, data);
            }
            (Kind::Status { len, one }, Reply::Status(extents)) => {
                self.put_status(cookie, len, one, &extents);
            }
            (kind, reply) => {
                let error = match reply {
                    Reply::Error(errno) => errno.into(),
                    // An answer of the wrong kind is a defect of the engine: fail closed.
                    _ => WireError::Io,
                };
                self.put_error_of(cookie, !matches!(kind, Kind::Plain), error);
            }
        }
    }

    fn put_error(&mut self, header: &Header, error: WireError) {
        let chunked = matches!(header.command, proto::CMD_READ | proto::CMD_BLOCK_STATUS);
        self.put_error_of(header.cookie, chunked, error);
    }

    /// Commands that answer with data must answer in chunks once structured replies are agreed on.
    fn put_error_of(&mut self, cookie: u64, chunked: bool, error: WireError) {
        if !(chunked && self.structured) {
            self.put_simple(cookie, error);
            return;
        }
        self.put_chunk(cookie, proto::REPLY_FLAG_DONE, proto::REPLY_ERROR, 6);
        self.output.header(|out| {
            out.put_u32(error as u32);
            out.put_u16(0);
        });
    }

    pub(super) fn put_simple(&mut self, cookie: u64, error: WireError) {
        self.output.header(|out| {
            out.put_u32(proto::SIMPLE_REPLY_MAGIC);
            out.put_u32(error as u32);
            out.put_u64(cookie);
        });
    }

    fn put_chunk(&mut self, cookie: u64, flags: u16, kind: u16, len: u32) {
        self.output.header(|out| {
            out.put_u32(proto::STRUCTURED_REPLY_MAGIC);
            out.put_u16(flags);
            out.put_u16(kind);
            out.put_u64(cookie);
            out.put_u32(len);
        });
    }

    fn put_read(&mut self, cookie: u64, offset: u64, data: Bytes) {
        if !self.structured {
            self.put_simple(cookie, WireError::None);
        } else if data.is_empty() {
            self.put_chunk(cookie, proto::REPLY_FLAG_DONE, proto::REPLY_NONE, 0);
        } else {
            // One chunk for the whole read: "do not fragment" is kept always.
            let len = 8 + data.len() as u32;
            self.put_chunk(cookie, proto::REPLY_FLAG_DONE, proto::REPLY_OFFSET_DATA, len);
            self.output.header(|out| out.put_u64(offset));
        }
        if !data.is_empty() {
            self.output.payload(data);
        }
    }

    fn put_status(&mut self, cookie: u64, len: u64, one: bool, extents: &[Extent]) {
        let allocation = describe(extents, len, one, |extent| {
            u32::from(extent.hole) * proto::STATE_HOLE + u32::from(extent.zero) * proto::STATE_ZERO
        });
        let out_of_sync =
            describe(extents, len, one, |extent| u32::from(extent.out_of_sync) * proto::STATE_OUT_OF_SYNC);
        if allocation.is_empty() || out_of_sync.is_empty() {
            self.put_error_of(cookie, true, WireError::Io);
            return;
        }
        let mut chunks = Vec::new();
        if self.contexts.allocation {
            chunks.push((ID_ALLOCATION, allocation));
        }
        if self.contexts.out_of_sync {
            chunks.push((ID_OUT_OF_SYNC, out_of_sync));
        }
        let last = chunks.len().saturating_sub(1);
        for (index, (id, runs)) in chunks.iter().enumerate() {
            let flags = if index == last { proto::REPLY_FLAG_DONE } else { 0 };
            let len = 4 + 8 * runs.len() as u32;
            self.put_chunk(cookie, flags, proto::REPLY_BLOCK_STATUS, len);
            self.output.header(|out| {
                out.put_u32(*id);
                for (len, state) in runs {
                    out.put_u32(*len);
                    out.put_u32(*state);
                }
            });
        }
    }
}

/// Runs of one context: equal neighbours merged, nothing beyond the range, at most one if so asked.
fn describe(extents: &[Extent], len: u64, one: bool, state: impl Fn(&Extent) -> u32) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    let runs_max = if one { 1 } else { EXTENTS_MAX };
    let mut left = len;
    for extent in extents {
        // Fits: the range of a request is less than 4 GiB.
        let run = extent.len.min(left) as u32;
        left -= u64::from(run);
        let state = state(extent);
        let full = runs.len() == runs_max;
        match runs.last_mut() {
            _ if run == 0 => break,
            Some(last) if last.1 == state => last.0 += run,
            _ if full => break,
            _ => runs.push((run, state)),
        }
    }
    runs
}
