//! An established link: one receive and one send at a time per stream, everything bounded.

use crate::core_api::{Stream, Time};
use crate::ring::{Buf, Fd, Op, SEND_CHUNKS_MAX};
use bytes::{Bytes, BytesMut};
use palisade_export::{AlignedBuf, BufferPool};
use palisade_wire::{
    DecodeCtx, Header, Packet, WireError, check_header, decode_fixed, decode_header, encode, fixed_len,
};
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::time::Duration;

/// Names a link; never used again for another one.
pub type LinkId = u64;

/// Bytes asked from a stream at once. Small payloads are copied out of this buffer into aligned ones.
const STAGING_LEN: usize = 128 << 10;
/// Payloads with at least this many bytes still to come are received straight into their buffer.
const DIRECT_MIN: usize = 16 << 10;
/// Queued bytes beyond which front ends wait.
pub const SEND_QUEUE_SOFT: usize = 32 << 20;
/// Bytes of one send.
const SEND_BYTES_MAX: usize = 2 << 20;

/// A packet that came in.
#[derive(Debug)]
pub struct Received {
    /// Volume of the header.
    pub volume: Option<u16>,
    /// Fixed part.
    pub packet: Packet,
    /// Digest.
    pub digest: Bytes,
    /// Bulk data, aligned to 4096 bytes.
    pub data: Bytes,
}

/// A packet whose bulk data is not complete.
#[derive(Debug)]
struct Partial {
    header: Header,
    packet: Packet,
    digest: Bytes,
    /// None while the ring receives into it.
    buf: Option<AlignedBuf>,
    len: usize,
    filled: usize,
}

/// Bytes on their way in.
#[derive(Debug)]
struct Inbound {
    staging: Option<AlignedBuf>,
    start: usize,
    end: usize,
    partial: Option<Partial>,
}

impl Inbound {
    fn new(pool: &BufferPool) -> Self {
        Self { staging: Some(pool.alloc(STAGING_LEN)), start: 0, end: 0, partial: None }
    }

    /// The next complete packet. One at a time: what a packet changes holds for the next one.
    fn next(
        &mut self,
        stream: Stream,
        ctx: &DecodeCtx,
        pool: &BufferPool,
    ) -> Result<Option<Received>, WireError> {
        if let Some(partial) = &self.partial {
            if partial.filled < partial.len {
                return Ok(None);
            }
            return Ok(self.partial.take().and_then(|p| {
                let data = p.buf?.freeze();
                Some(Received { volume: p.header.volume, packet: p.packet, digest: p.digest, data })
            }));
        }
        let Some(staging) = &self.staging else { return Ok(None) };
        let waiting = staging.get(self.start..self.end).unwrap_or_default();
        let Some(header) = decode_header(waiting)? else { return Ok(None) };
        check_header(&header, stream, ctx)?;
        let fixed = fixed_len(&header, ctx)?;
        let Some(fixed_bytes) = waiting.get(header.header_len..header.header_len + fixed) else {
            return Ok(None);
        };
        let (packet, digest) = decode_fixed(&header, Bytes::copy_from_slice(fixed_bytes), stream, ctx)?;
        let len = (header.length as usize).saturating_sub(fixed);
        self.start += header.header_len + fixed;
        if len == 0 {
            let data = Bytes::new();
            return Ok(Some(Received { volume: header.volume, packet, digest, data }));
        }
        let mut buf = pool.alloc(len);
        let here = waiting.get(header.header_len + fixed..).unwrap_or_default();
        let filled = here.len().min(len);
        let (now, _) = here.split_at(filled);
        if let Some(to) = buf.get_mut(..filled) {
            to.copy_from_slice(now);
        }
        self.start += filled;
        if filled == len {
            let data = buf.freeze();
            return Ok(Some(Received { volume: header.volume, packet, digest, data }));
        }
        self.partial = Some(Partial { header, packet, digest, buf: Some(buf), len, filled });
        Ok(None)
    }

    /// What to receive into next; none while a receive is running.
    fn take_buffer(&mut self) -> Option<(Buf, bool)> {
        if let Some(partial) = &mut self.partial
            && partial.len - partial.filled >= DIRECT_MIN
        {
            let (buf, start) = (partial.buf.take()?, partial.filled);
            return Some((Buf::Aligned { buf, start }, true));
        }
        let mut buf = self.staging.take()?;
        buf.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        Some((Buf::Aligned { buf, start: self.end }, false))
    }

    fn give_buffer(&mut self, buf: AlignedBuf, start: usize, received: usize) {
        let reached = (start + received).min(buf.len());
        match &mut self.partial {
            Some(partial) if partial.buf.is_none() => {
                partial.filled = reached;
                partial.buf = Some(buf);
            }
            _ => {
                self.staging = Some(buf);
                self.end = reached;
                self.fill_partial();
            }
        }
    }

    /// Moves staged bytes into a payload that waits for them.
    fn fill_partial(&mut self) {
        let (Some(partial), Some(staging)) = (&mut self.partial, &self.staging) else { return };
        let Some(buf) = &mut partial.buf else { return };
        let here = staging.get(self.start..self.end).unwrap_or_default();
        let count = here.len().min(partial.len - partial.filled);
        let (now, _) = here.split_at(count);
        if let Some(to) = buf.get_mut(partial.filled..partial.filled + count) {
            to.copy_from_slice(now);
        }
        partial.filled += count;
        self.start += count;
    }
}

/// Bytes on their way out.
#[derive(Debug, Default)]
struct Outbound {
    /// Headers and fixed parts not yet sealed into a chunk.
    head: BytesMut,
    queue: VecDeque<Bytes>,
    /// Bytes in `queue`, without `head` and what is being sent.
    queued: usize,
    sending: usize,
    /// Since when nothing moved although something is being sent.
    stalled_since: Option<Time>,
}

impl Outbound {
    fn seal(&mut self) {
        if !self.head.is_empty() {
            let chunk = self.head.split().freeze();
            self.queued += chunk.len();
            self.queue.push_back(chunk);
        }
    }

    fn waiting(&self) -> usize {
        self.queued + self.head.len() + self.sending
    }

    fn take_chunks(&mut self) -> Vec<Bytes> {
        self.seal();
        let mut chunks = Vec::new();
        let mut bytes = 0;
        while chunks.len() < SEND_CHUNKS_MAX && bytes < SEND_BYTES_MAX {
            let Some(chunk) = self.queue.pop_front() else { break };
            bytes += chunk.len();
            chunks.push(chunk);
        }
        self.queued -= bytes;
        self.sending = bytes;
        chunks
    }

    /// Puts back what was not sent.
    fn sent(&mut self, chunks: Vec<Bytes>, count: usize) {
        self.sending = 0;
        let rest = crate::ring::unsent(chunks, count);
        for chunk in rest.into_iter().rev() {
            self.queued += chunk.len();
            self.queue.push_front(chunk);
        }
    }
}

#[derive(Debug)]
struct StreamIo {
    fd: Fd,
    inbound: Inbound,
    outbound: Outbound,
    receiving: bool,
    ended: bool,
}

impl StreamIo {
    fn new(fd: Fd, pool: &BufferPool) -> Self {
        Self {
            fd,
            inbound: Inbound::new(pool),
            outbound: Outbound::default(),
            receiving: false,
            ended: false,
        }
    }
}

/// Both streams to one peer.
#[derive(Debug)]
pub struct Link {
    /// Node id of the peer.
    pub peer: u8,
    data: StreamIo,
    control: StreamIo,
    rx: DecodeCtx,
    tx: DecodeCtx,
    /// Set when the core gave the link up: what is queued is still sent until then, nothing is delivered.
    pub closing: Option<Time>,
    /// Set when the control stream ended: until then the data stream may still deliver what was sent before.
    pub control_gone: Option<Time>,
    /// The core takes no data of this peer for the moment.
    pub paused: bool,
    /// The peer was told that nothing more will come.
    pub finished: bool,
    pool: BufferPool,
}

impl Link {
    /// A link over two connected sockets.
    pub fn new(peer: u8, data: Fd, control: Fd, pool: BufferPool) -> Self {
        crate::sys::tune_link(data.as_fd(), true);
        crate::sys::tune_link(control.as_fd(), false);
        Self {
            peer,
            data: StreamIo::new(data, &pool),
            control: StreamIo::new(control, &pool),
            rx: DecodeCtx::initial(),
            tx: DecodeCtx::initial(),
            closing: None,
            control_gone: None,
            paused: false,
            finished: false,
            pool,
        }
    }

    fn io(&mut self, stream: Stream) -> &mut StreamIo {
        match stream {
            Stream::Data => &mut self.data,
            Stream::Control => &mut self.control,
        }
    }

    /// Changes the parameters of one direction for the packets that follow.
    pub fn set_codec(&mut self, receive: bool, ctx: DecodeCtx) {
        *(if receive { &mut self.rx } else { &mut self.tx }) = ctx;
    }

    /// Queues a packet.
    ///
    /// # Errors
    /// The packet cannot be encoded under what was agreed.
    pub fn send(
        &mut self,
        stream: Stream,
        volume: Option<u16>,
        packet: &Packet,
        digest: &[u8],
        data: Bytes,
    ) -> Result<(), WireError> {
        let ctx = self.tx;
        let out = &mut self.io(stream).outbound;
        encode(packet, volume, &ctx, digest, data.len(), &mut out.head)?;
        if !data.is_empty() {
            out.seal();
            out.queued += data.len();
            out.queue.push_back(data);
        }
        Ok(())
    }

    /// The send to start now, if one is due and none is running.
    pub fn next_send(&mut self, stream: Stream, now: Time) -> Option<Op> {
        let io = self.io(stream);
        if io.outbound.sending > 0 || io.ended {
            return None;
        }
        let chunks = io.outbound.take_chunks();
        if chunks.is_empty() {
            return None;
        }
        io.outbound.stalled_since = Some(now);
        Some(Op::send(Fd::clone(&io.fd), chunks))
    }

    /// A send completed. `false`: the stream is broken.
    pub fn sent(&mut self, stream: Stream, op: Op, result: std::io::Result<u32>) -> bool {
        let io = self.io(stream);
        let Op::Send { message, .. } = op else { return false };
        match result {
            Ok(count) => {
                io.outbound.sent(message.chunks, count as usize);
                io.outbound.stalled_since = None;
                true
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {
                io.outbound.sent(message.chunks, 0);
                true
            }
            Err(_) => {
                io.outbound.sending = 0;
                io.ended = true;
                false
            }
        }
    }

    /// The receive to start now, if none is running and the stream goes on.
    pub fn next_receive(&mut self, stream: Stream) -> Option<Op> {
        let io = self.io(stream);
        if io.receiving || io.ended {
            return None;
        }
        let (buf, all) = io.inbound.take_buffer()?;
        io.receiving = true;
        Some(Op::Recv { fd: Fd::clone(&io.fd), buf, all })
    }

    /// A receive completed. `false`: the stream ended or broke.
    pub fn received(&mut self, stream: Stream, op: Op, result: std::io::Result<u32>) -> bool {
        let io = self.io(stream);
        io.receiving = false;
        let Op::Recv { buf: Buf::Aligned { buf, start }, .. } = op else { return false };
        let (count, good) = match result {
            Ok(0) => (0, false),
            Ok(count) => (count as usize, true),
            Err(e) => (0, matches!(e.kind(), std::io::ErrorKind::Interrupted)),
        };
        io.inbound.give_buffer(buf, start, count);
        io.ended |= !good;
        good
    }

    /// Forgets what arrived and was not delivered.
    pub fn discard(&mut self) {
        for io in [&mut self.data, &mut self.control] {
            if !io.receiving {
                io.inbound.partial = None;
                (io.inbound.start, io.inbound.end) = (0, 0);
            }
        }
    }

    /// Whether a stream will not deliver any more bytes.
    pub fn ended(&self, stream: Stream) -> bool {
        match stream {
            Stream::Data => self.data.ended,
            Stream::Control => self.control.ended,
        }
    }

    /// The next packet of a stream.
    ///
    /// # Errors
    /// Bytes that are no acceptable packet; the link has to end.
    pub fn next_packet(&mut self, stream: Stream) -> Result<Option<Received>, WireError> {
        if self.closing.is_some() {
            return Ok(None);
        }
        let (ctx, pool) = (self.rx, self.pool.clone());
        self.io(stream).inbound.next(stream, &ctx, &pool)
    }

    /// Whether so much waits to be sent that front ends should wait.
    pub fn is_congested(&self) -> bool {
        self.data.outbound.waiting() > SEND_QUEUE_SOFT
    }

    /// Whether everything queued was handed to the kernel.
    pub fn is_flushed(&self) -> bool {
        (self.data.outbound.waiting() == 0 || self.data.ended)
            && (self.control.outbound.waiting() == 0 || self.control.ended)
    }

    /// When a send has been blocked for too long: `timeout` on the control stream, `timeout` times
    /// `ko-count` on the data stream (`spec/wire-protocol.md` §2.7).
    pub fn send_deadline(&self, timeout: Duration, ko_count: u32) -> Option<Time> {
        let of = |io: &StreamIo, limit: Duration| io.outbound.stalled_since.map(|t| t + limit);
        let data = if ko_count == 0 { None } else { of(&self.data, timeout * ko_count) };
        [data, of(&self.control, timeout)].into_iter().flatten().min()
    }

    /// Tells the peer that nothing more will come.
    pub fn finish_sending(&self) {
        crate::sys::shutdown_write(self.data.fd.as_fd());
        crate::sys::shutdown_write(self.control.fd.as_fd());
    }

    /// Ends both streams; operations in flight complete.
    pub fn abort(&self) {
        crate::sys::shutdown(self.data.fd.as_fd());
        crate::sys::shutdown(self.control.fd.as_fd());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use palisade_wire::{Data, DpFlags};

    fn ctx() -> DecodeCtx {
        DecodeCtx { apv: 124, ..DecodeCtx::initial() }
    }

    fn stream_of(sizes: &[usize]) -> Vec<u8> {
        let mut out = Vec::new();
        for (n, size) in sizes.iter().enumerate() {
            let mut head = BytesMut::new();
            let packet = if *size == 0 {
                Packet::Ping
            } else {
                Packet::Data(Data { sector: n as u64, block_id: 1, seq_num: 1, dp_flags: DpFlags::NONE })
            };
            encode(&packet, Some(0), &ctx(), &[], *size, &mut head).unwrap();
            out.extend_from_slice(&head);
            out.extend(std::iter::repeat_n(n as u8, *size));
        }
        out
    }

    #[test]
    fn packets_survive_any_cut_and_payloads_are_aligned() {
        let sizes = [4096, 512, 1 << 20, 65536, 4096];
        let bytes = stream_of(&sizes);
        let pool = BufferPool::new(1 << 20);
        for step in [1 << 20, 100_000, 4099, 700] {
            let mut inbound = Inbound::new(&pool);
            let (mut at, mut got) = (0, Vec::new());
            while at < bytes.len() || inbound.partial.is_some() {
                let Some((Buf::Aligned { mut buf, start }, _)) = inbound.take_buffer() else {
                    panic!("buffer")
                };
                let space = buf.get_mut(start..).unwrap();
                assert!(!space.is_empty(), "room for progress");
                let count = space.len().min(bytes.len() - at).min(step);
                space[..count].copy_from_slice(&bytes[at..at + count]);
                at += count;
                inbound.give_buffer(buf, start, count);
                while let Some(r) = inbound.next(Stream::Data, &ctx(), &pool).unwrap() {
                    assert_eq!(r.data.as_ptr() as usize % 4096, 0);
                    assert!(r.data.iter().all(|b| usize::from(*b) == got.len()));
                    got.push(r.data.len());
                }
            }
            assert_eq!(got, sizes, "step {step}");
        }
    }

    #[test]
    fn a_hostile_length_is_refused_from_the_header() {
        let pool = BufferPool::new(1 << 20);
        let mut inbound = Inbound::new(&pool);
        let Some((Buf::Aligned { mut buf, start }, _)) = inbound.take_buffer() else { panic!("buffer") };
        let header = [0x86, 0x20, 0xec, 0x20, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0];
        buf.get_mut(start..start + 16).unwrap().copy_from_slice(&header);
        inbound.give_buffer(buf, start, 16);
        assert!(inbound.next(Stream::Data, &ctx(), &pool).is_err());
        assert!(inbound.partial.is_none());
    }

    #[test]
    fn what_was_not_sent_is_sent_again_in_order() {
        let mut out = Outbound::default();
        for chunk in ["abc", "defg", "hi"] {
            out.queue.push_back(Bytes::from(chunk));
            out.queued += chunk.len();
        }
        let chunks = out.take_chunks();
        assert_eq!((out.sending, out.queued), (9, 0));
        out.sent(chunks, 5);
        assert_eq!(out.queue.iter().map(|c| c.to_vec()).collect::<Vec<_>>().concat(), b"fghi");
        assert_eq!(out.waiting(), 4);
    }
}
