//! The session's state, its limits, and the way of bytes into it.

use super::output::Output;
use super::transmit::Pending;
use super::{proto, transmit};
use crate::{AlignedBuf, BlockRequest, BufferPool, Errno, Reply};
use bytes::{BufMut, Bytes};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Bytes asked from the connection at once while no large payload is expected. A payload's first
/// part that arrives together with its header is copied out of it, so this is also the most that is
/// ever copied of one request.
const STAGING_LEN: usize = 32 * 1024;

/// One device that clients may choose by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// The name clients ask for, at most 4096 bytes.
    pub name: String,
    /// A line for people.
    pub description: String,
    /// Size in bytes, a multiple of `block_min`.
    pub size: u64,
    /// Smallest addressable block in bytes, a power of two up to 64 KiB.
    pub block_min: u32,
    /// Preferred request size and alignment in bytes, a power of two not below `block_min`.
    pub block_preferred: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Offer TRIM.
    pub discard: bool,
    /// The disks turn.
    pub rotational: bool,
}

/// Bounds of one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Unanswered requests.
    pub requests_max: usize,
    /// Payload bytes of unanswered requests; one request is always admitted.
    pub inflight_bytes_max: usize,
    /// Largest READ or WRITE in bytes; the protocol wants 32 MiB.
    pub payload_max: u32,
    /// Reply bytes not yet taken, beyond which no more requests are read.
    pub output_bytes_max: usize,
    /// Options before the client must have chosen an export.
    pub options_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            requests_max: 256,
            inflight_bytes_max: 64 << 20,
            payload_max: 32 << 20,
            output_bytes_max: 64 << 20,
            options_max: 1024,
        }
    }
}

/// Why a session takes no more input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Close {
    /// The client said good-bye.
    #[error("The NBD client ended the connection.")]
    Requested,
    /// The stream ended without a good-bye.
    #[error("The NBD client's connection was cut.")]
    Cut,
    /// The client does not speak NBD.
    #[error("The NBD client broke the protocol ({0}); the connection is closed.")]
    Protocol(&'static str),
    /// The engine ended it.
    #[error("The NBD export was withdrawn.")]
    Withdrawn,
}

/// A buffer to receive into, owned by the caller for the duration of the receive. Its memory does
/// not move when the value is moved.
#[derive(Debug)]
pub struct InputBuf {
    buf: AlignedBuf,
    start: usize,
    payload: bool,
}

impl InputBuf {
    /// The bytes to fill, from the front; never empty.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        self.buf.get_mut(self.start..).unwrap_or_default()
    }

    /// These are the rest of one payload: all of them will come before anything can be done with them.
    #[must_use]
    pub fn is_payload(&self) -> bool {
        self.payload
    }
}

/// What the next bytes are.
#[derive(Debug)]
pub(super) enum Phase {
    /// Client flags.
    Hello,
    /// Option header, then its data.
    Option,
    /// Data of an option too long to keep.
    OptionSkip { option: u32, left: usize },
    /// Request header.
    Request,
    /// Payload of a write; `buf` is none while the caller receives into it.
    Payload { write: transmit::Write, buf: Option<AlignedBuf>, filled: usize },
    /// Payload of a write that is refused already.
    PayloadSkip { cookie: u64, error: transmit::WireError, left: usize },
    /// No more input is taken.
    Closed(Close),
}

/// One connection of one NBD client. See the [module](super) for its use.
#[derive(Debug)]
pub struct Session {
    pub(super) exports: Arc<[Export]>,
    pub(super) chosen: Option<usize>,
    /// Size of the chosen export, in bytes; changes with [`Self::set_size`].
    pub(super) size: u64,
    pub(super) limits: Limits,
    pub(super) pool: BufferPool,
    pub(super) phase: Phase,
    pub(super) no_zeroes: bool,
    pub(super) structured: bool,
    pub(super) options_seen: u32,
    /// Contexts chosen, and for which export name.
    pub(super) contexts: super::negotiate::Contexts,
    /// Received and not yet understood; `start..end` of the staging buffer.
    staging: Option<AlignedBuf>,
    start: usize,
    end: usize,
    pub(super) output: Output,
    pub(super) requests: VecDeque<BlockRequest>,
    pub(super) pending: HashMap<u64, Pending>,
    pub(super) pending_bytes: usize,
    pub(super) next_id: u64,
}

impl Session {
    /// A session that begins with the greeting. With one export, the empty name means that one.
    #[must_use]
    pub fn new(exports: Arc<[Export]>, limits: Limits, pool: BufferPool) -> Self {
        let mut session = Self::bare(exports, limits, pool, Phase::Hello);
        session.output.header(|out| {
            out.put_u64(proto::NBD_MAGIC);
            out.put_u64(proto::OPT_MAGIC);
            out.put_u16(proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES);
        });
        session
    }

    /// A session that is past negotiation, as the kernel's client expects it: simple replies.
    #[must_use]
    pub fn transmission(export: Export, limits: Limits, pool: BufferPool) -> Self {
        let mut session = Self::bare(Arc::new([export]), limits, pool, Phase::Request);
        session.choose(0);
        session
    }

    fn bare(exports: Arc<[Export]>, limits: Limits, pool: BufferPool, phase: Phase) -> Self {
        let staging = Some(pool.alloc(STAGING_LEN));
        Self {
            exports,
            chosen: None,
            size: 0,
            limits,
            pool,
            phase,
            no_zeroes: false,
            structured: false,
            options_seen: 0,
            contexts: super::negotiate::Contexts::default(),
            staging,
            start: 0,
            end: 0,
            output: Output::default(),
            requests: VecDeque::new(),
            pending: HashMap::new(),
            pending_bytes: 0,
            next_id: 0,
        }
    }

    pub(super) fn choose(&mut self, index: usize) {
        self.chosen = Some(index);
        self.size = self.exports.get(index).map_or(0, |export| export.size);
    }

    /// Index of the export the client chose, once it did; requests come only after that.
    #[must_use]
    pub fn export(&self) -> Option<usize> {
        self.chosen
    }

    /// The device has another size, in bytes. NBD cannot tell the client; later requests are
    /// checked against it.
    pub fn set_size(&mut self, size: u64) {
        self.size = size;
    }

    /// A buffer for the next receive, or none when nothing may be received now.
    pub fn take_input(&mut self) -> Option<InputBuf> {
        self.advance();
        if self.is_stalled() {
            return None;
        }
        match &mut self.phase {
            Phase::Closed(_) => None,
            Phase::Payload { buf, filled, .. } if self.start == self.end => {
                buf.take().map(|buf| InputBuf { buf, start: *filled, payload: true })
            }
            _ => {
                let mut buf = self.staging.take()?;
                // What was not understood is a piece of a header or an option: short.
                buf.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
                Some(InputBuf { buf, start: self.end, payload: false })
            }
        }
    }

    /// Gives a buffer back after `received` bytes were put into it; 0 means end of stream or error.
    pub fn give_input(&mut self, input: InputBuf, received: usize) {
        let InputBuf { buf: memory, start, payload } = input;
        let reached = (start + received).min(memory.len());
        if payload {
            if let Phase::Payload { buf, filled, .. } = &mut self.phase {
                *buf = Some(memory);
                *filled = reached;
            }
        } else {
            self.staging = Some(memory);
            self.end = reached;
        }
        if received == 0 {
            self.close(Close::Cut);
        }
        self.advance();
    }

    /// Takes bytes by copy; returns how many were accepted (fewer when too much is in flight).
    pub fn receive(&mut self, mut bytes: &[u8]) -> usize {
        let offered = bytes.len();
        while !bytes.is_empty() {
            let Some(mut input) = self.take_input() else { break };
            let space = input.as_mut_slice();
            let len = space.len().min(bytes.len());
            let (now, later) = bytes.split_at(len);
            space[..len].copy_from_slice(now);
            self.give_input(input, len);
            bytes = later;
        }
        offered - bytes.len()
    }

    /// The next request for the engine.
    pub fn next_request(&mut self) -> Option<BlockRequest> {
        self.advance();
        self.requests.pop_front()
    }

    /// Answers a request; unknown identifiers are ignored.
    pub fn complete(&mut self, id: u64, reply: Reply) {
        let Some(pending) = self.pending.remove(&id) else { return };
        self.pending_bytes -= pending.bytes;
        if self.closed() != Some(Close::Cut) {
            self.put_reply(&pending, reply);
        }
        self.advance();
    }

    /// Everything to be sent now, in order.
    pub fn take_output(&mut self) -> Vec<Bytes> {
        self.advance();
        self.output.take()
    }

    /// Bytes that [`Self::take_output`] would give.
    #[must_use]
    pub fn output_len(&self) -> usize {
        self.output.len()
    }

    /// Requests handed out, or to be handed out, that have no answer yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Ends the session from our side: requests not yet handed out are refused with "shutting down",
    /// those handed out still want their answer, and nothing more is read.
    pub fn withdraw(&mut self) {
        self.close(Close::Withdrawn);
        for request in std::mem::take(&mut self.requests) {
            self.complete(request.id, Reply::Error(Errno::Shutdown));
        }
    }

    /// Answers everything that is unanswered with an error.
    pub fn fail_all(&mut self, errno: Errno) {
        self.requests.clear();
        let unanswered: Vec<u64> = self.pending.keys().copied().collect();
        for id in unanswered {
            if let Some(pending) = self.pending.remove(&id) {
                self.pending_bytes -= pending.bytes;
                self.put_reply(&pending, Reply::Error(errno));
            }
        }
    }

    /// Why no more input is taken, if that is so.
    #[must_use]
    pub fn closed(&self) -> Option<Close> {
        match self.phase {
            Phase::Closed(why) => Some(why),
            _ => None,
        }
    }

    /// Nothing will come in, nothing is in flight, nothing is left to send: close the connection.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.closed().is_some() && self.pending.is_empty() && self.output.len() == 0
    }

    pub(super) fn close(&mut self, why: Close) {
        if self.closed().is_some() {
            return;
        }
        self.phase = Phase::Closed(why);
        if why == Close::Cut {
            self.output.clear();
        }
    }

    /// Whether answers must come or go before more input is looked at.
    fn is_stalled(&self) -> bool {
        self.pending.len() >= self.limits.requests_max
            || self.pending_bytes >= self.limits.inflight_bytes_max
            || self.output.len() >= self.limits.output_bytes_max
    }

    /// Understands as much of the input as it may.
    fn advance(&mut self) {
        while !self.is_stalled() && self.step() {}
    }

    /// One step; false when more input is needed.
    fn step(&mut self) -> bool {
        match &self.phase {
            Phase::Hello => self.step_hello(),
            Phase::Option => self.step_option(),
            Phase::OptionSkip { option, left } => {
                let (option, left) = (*option, *left);
                let left = left - self.skip(left);
                if left == 0 {
                    self.refuse_long_option(option);
                    self.phase = Phase::Option;
                } else {
                    self.phase = Phase::OptionSkip { option, left };
                }
                left == 0
            }
            Phase::Request => self.step_request(),
            Phase::Payload { .. } => self.step_payload(),
            Phase::PayloadSkip { cookie, error, left } => {
                let (cookie, error, left) = (*cookie, *error, *left);
                let left = left - self.skip(left);
                if left == 0 {
                    self.put_simple(cookie, error);
                    self.phase = Phase::Request;
                } else {
                    self.phase = Phase::PayloadSkip { cookie, error, left };
                }
                left == 0
            }
            Phase::Closed(_) => false,
        }
    }

    /// The next `len` bytes without taking them, if they are there. Never more than the staging
    /// buffer can hold.
    pub(super) fn peek(&self, len: usize) -> Option<&[u8]> {
        let have = self.staging.as_ref()?.get(self.start..self.end)?;
        have.get(..len)
    }

    /// Drops up to `len` received bytes; returns how many.
    pub(super) fn skip(&mut self, len: usize) -> usize {
        if self.staging.is_none() {
            return 0;
        }
        let len = len.min(self.end - self.start);
        self.start += len;
        len
    }

    /// Moves received bytes into the payload that is being gathered; true when it is complete.
    pub(super) fn gather(&mut self) -> bool {
        let Phase::Payload { buf: Some(buf), filled, .. } = &mut self.phase else { return false };
        if let Some(have) = self.staging.as_ref().and_then(|s| s.get(self.start..self.end)) {
            let space = buf.get_mut(*filled..).unwrap_or_default();
            let len = have.len().min(space.len());
            space[..len].copy_from_slice(&have[..len]);
            *filled += len;
            self.start += len;
        }
        *filled == buf.len()
    }
}
