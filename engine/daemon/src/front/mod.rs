//! Block front ends of this process: NBD clients and `/dev/drbdN`, present only while Primary.
//!
//! - [`nbd`]: listeners and connections;
//! - [`device`]: device nodes;
//! - [`extents`]: block status;
//! - here: requests of both, cut to the sizes the core takes and put together again.

pub mod device;
pub mod extents;
pub mod nbd;

use crate::core_api::{BlockId, BlockOp, BlockResult, Input, VolumeNr};
use crate::engine::{Engine, NOTHING};
use bytes::Bytes;
use device::Node;
use extents::Looking;
use nbd::{Client, Listeners};
use palisade_export::{AlignedBuf, BlockRequest, Errno, Op, Reply};
use std::collections::{BTreeMap, HashMap};

/// Largest read or write the core takes, bytes.
const PIECE_MAX: u64 = 1 << 20;
/// Largest discard or write-zeroes the core takes, bytes.
const RANGE_MAX: u64 = 128 << 20;
/// Pieces of one request at the core at a time.
const PIECES_MAX: u32 = 32;
/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Who asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Origin {
    /// An NBD connection.
    Nbd(u64),
    /// The device node of a volume.
    Device(VolumeNr),
}

/// What a request does, per piece.
#[derive(Debug)]
enum Action {
    Read { whole: Option<AlignedBuf> },
    Write { data: Bytes, fua: bool },
    Discard,
    Zero { unmap: bool },
}

/// A request on its way through the core.
#[derive(Debug)]
struct Request {
    origin: Origin,
    id: u64,
    vnr: VolumeNr,
    action: Action,
    start: u64,
    next: u64,
    end: u64,
    running: u32,
    error: Option<Errno>,
    /// A flush follows the last piece.
    flush: bool,
    result: Option<Bytes>,
}

/// All front ends.
#[derive(Default)]
pub(crate) struct Front {
    /// This node is Primary.
    pub present: bool,
    /// Sizes by volume, bytes; 0 is not known.
    pub sizes: BTreeMap<VolumeNr, u64>,
    /// Why a device node could not even be begun.
    pub(crate) failure: Option<String>,
    pub(crate) nodes: BTreeMap<VolumeNr, Node>,
    pub(crate) listeners: BTreeMap<VolumeNr, Listeners>,
    pub(crate) clients: HashMap<u64, Client>,
    requests: HashMap<u64, Request>,
    /// Block request to request and byte position.
    pieces: HashMap<u64, (u64, u64)>,
    next: u64,
    looking: HashMap<u64, Looking>,
}

impl Engine {
    /// The core says whether this node is Primary.
    pub(crate) fn front_end(&mut self, present: bool) {
        self.front.present = present;
        self.status_changed = true;
        let volumes: Vec<VolumeNr> = self.local.volumes.keys().map(|v| VolumeNr(*v)).collect();
        for vnr in volumes {
            if present {
                self.volume_appears(vnr);
            } else {
                self.volume_disappears(vnr);
            }
        }
    }

    /// The core says how large a volume is.
    pub(crate) fn device_size(&mut self, vnr: VolumeNr, size: u64) {
        self.front.sizes.insert(vnr, size);
        self.status_changed = true;
        if !self.front.present {
            return;
        }
        if self.front.nodes.contains_key(&vnr) {
            self.node_resize(vnr, size);
            for client in self.front.clients.values_mut().filter(|c| c.vnr == vnr) {
                client.session.set_size(size);
            }
        } else {
            self.volume_appears(vnr);
        }
    }

    pub(crate) fn volume_appears(&mut self, vnr: VolumeNr) {
        let size = self.front.sizes.get(&vnr).copied().unwrap_or(0);
        if size > 0 {
            self.nbd_listen(vnr);
            self.node_attach(vnr, size);
        }
    }

    fn volume_disappears(&mut self, vnr: VolumeNr) {
        self.nbd_withdraw(vnr);
        self.node_remove(vnr);
    }

    /// Takes one request of a front end.
    pub(crate) fn front_request(&mut self, origin: Origin, vnr: VolumeNr, request: BlockRequest) {
        let id = request.id;
        let (action, start, len, flush) = match request.op {
            Op::Flush => {
                self.front.next += 1;
                let key = self.front.next;
                let action = Action::Discard;
                let r = Request::new(origin, id, vnr, action, (0, 0), true);
                self.front.requests.insert(key, r);
                self.front_advance(key);
                return;
            }
            Op::BlockStatus { offset, len, .. } => {
                self.block_status(origin, id, vnr, offset..offset.saturating_add(len));
                return;
            }
            Op::WriteZeroes { fast: true, .. } => {
                self.front_reply(origin, id, Reply::Error(Errno::NotSupported));
                return;
            }
            Op::Read { offset, len } => {
                let whole = (u64::from(len) > PIECE_MAX).then(|| self.pool.alloc(len as usize));
                (Action::Read { whole }, offset, u64::from(len), false)
            }
            Op::Write { offset, data, fua } => {
                let len = data.len() as u64;
                (Action::Write { data, fua }, offset, len, false)
            }
            Op::Discard { offset, len, fua } => (Action::Discard, offset, len, fua),
            Op::WriteZeroes { offset, len, may_unmap, fua, fast: false } => {
                (Action::Zero { unmap: may_unmap }, offset, len, fua)
            }
        };
        self.front.next += 1;
        let key = self.front.next;
        let r = Request::new(origin, id, vnr, action, (start, start.saturating_add(len)), flush);
        self.front.requests.insert(key, r);
        self.front_advance(key);
    }

    /// Starts the pieces that may start, or answers.
    fn front_advance(&mut self, key: u64) {
        loop {
            let Some(r) = self.front.requests.get_mut(&key) else { return };
            let stop = r.error.is_some();
            if r.next < r.end && !stop && r.running < PIECES_MAX {
                let (at, op) = r.next_piece();
                let vnr = r.vnr;
                self.front_piece(key, at, vnr, op);
            } else if r.running > 0 {
                return;
            } else if r.flush && !stop {
                r.flush = false;
                r.running += 1;
                let vnr = r.vnr;
                self.front_piece(key, 0, vnr, BlockOp::Flush);
                return;
            } else if let Some(r) = self.front.requests.remove(&key) {
                let (origin, id) = (r.origin, r.id);
                let reply = r.reply();
                self.front_reply(origin, id, reply);
                return;
            }
        }
    }

    fn front_piece(&mut self, key: u64, at: u64, vnr: VolumeNr, op: BlockOp) {
        self.front.next += 1;
        let id = self.front.next;
        self.front.pieces.insert(id, (key, at));
        self.inbox.push_back(Input::Block { id: BlockId(id), vnr, op });
    }

    /// The core finished a piece.
    pub(crate) fn block_done(&mut self, id: BlockId, result: BlockResult) {
        let Some((key, at)) = self.front.pieces.remove(&id.0) else { return };
        if let Some(r) = self.front.requests.get_mut(&key) {
            r.piece_done(at, result);
            self.front_advance(key);
        }
    }

    fn front_reply(&mut self, origin: Origin, id: u64, reply: Reply) {
        match origin {
            Origin::Nbd(client) => {
                if let Some(client) = self.front.clients.get_mut(&client) {
                    client.session.complete(id, reply);
                }
            }
            Origin::Device(vnr) => {
                if let Some(node) = self.front.nodes.get_mut(&vnr) {
                    node.export.complete(id, reply);
                }
            }
        }
    }

    /// Takes requests that had to wait because a peer's stream was full.
    pub(crate) fn front_resume(&mut self) {
        if self.net.is_congested() {
            return;
        }
        let clients: Vec<u64> = self.front.clients.keys().copied().collect();
        for id in clients {
            self.nbd_pull(id);
        }
        let nodes: Vec<VolumeNr> =
            self.front.nodes.iter().filter(|(_, n)| n.waiting).map(|(v, _)| *v).collect();
        for vnr in nodes {
            self.node_pull(vnr);
        }
    }

    /// Sends what front ends are to get.
    pub(crate) fn flush_front(&mut self) {
        let clients: Vec<u64> = self.front.clients.keys().copied().collect();
        for id in clients {
            self.nbd_flush(id);
        }
    }
}

impl Request {
    fn new(
        origin: Origin,
        id: u64,
        vnr: VolumeNr,
        action: Action,
        (start, end): (u64, u64),
        flush: bool,
    ) -> Self {
        Self {
            origin,
            id,
            vnr,
            action,
            start,
            next: start,
            end,
            running: 0,
            error: None,
            flush,
            result: None,
        }
    }

    /// The next piece and its byte position.
    fn next_piece(&mut self) -> (u64, BlockOp) {
        let at = self.next;
        let max = match self.action {
            Action::Read { .. } | Action::Write { .. } => PIECE_MAX,
            Action::Discard | Action::Zero { .. } => RANGE_MAX,
        };
        let bytes = (self.end - at).min(max);
        self.next = at + bytes;
        self.running += 1;
        let (sector, len) = (at / SECTOR, u32::try_from(bytes).unwrap_or(0));
        let op = match &self.action {
            Action::Read { .. } => BlockOp::Read { sector, len },
            Action::Write { data, fua } => {
                let from = usize::try_from(at - self.start).unwrap_or(usize::MAX).min(data.len());
                let to = from.saturating_add(len as usize).min(data.len());
                BlockOp::Write { sector, data: data.slice(from..to), fua: *fua }
            }
            Action::Discard => BlockOp::Discard { sector, len },
            Action::Zero { unmap } => BlockOp::WriteZeroes { sector, len, unmap: *unmap },
        };
        (at, op)
    }

    fn piece_done(&mut self, at: u64, result: BlockResult) {
        self.running -= 1;
        let error = match result {
            BlockResult::Done => return,
            BlockResult::Data(data) => {
                match &mut self.action {
                    Action::Read { whole: Some(whole) } => {
                        let from = usize::try_from(at - self.start).unwrap_or(usize::MAX);
                        if let Some(to) = whole.get_mut(from..).and_then(|w| w.get_mut(..data.len())) {
                            to.copy_from_slice(&data);
                        }
                    }
                    _ => self.result = Some(data),
                }
                return;
            }
            BlockResult::IoError => Errno::Io,
            BlockResult::NotPrimary => Errno::Shutdown,
            BlockResult::Invalid => Errno::Invalid,
        };
        self.error.get_or_insert(error);
    }

    fn reply(self) -> Reply {
        match (self.error, self.action) {
            (Some(errno), _) => Reply::Error(errno),
            (None, Action::Read { whole: Some(whole) }) => Reply::Data(whole.freeze()),
            (None, Action::Read { whole: None }) => Reply::Data(self.result.unwrap_or(NOTHING)),
            _ => Reply::Done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(action: Action, len: u64) -> Request {
        Request::new(Origin::Nbd(1), 1, VolumeNr(0), action, (4096, 4096 + len), false)
    }

    #[test]
    fn a_large_write_is_cut_without_gaps() {
        let data = Bytes::from((0..5 << 19).map(|n| (n >> 12) as u8).collect::<Vec<_>>());
        let len = data.len() as u64;
        let mut r = request(Action::Write { data: data.clone(), fua: true }, len);
        let mut seen = Vec::new();
        while r.next < r.end {
            let (at, BlockOp::Write { sector, data, fua }) = r.next_piece() else { panic!("write") };
            assert_eq!((at, at - 4096, fua), (sector * 512, seen.len() as u64, true));
            seen.extend_from_slice(&data);
        }
        assert_eq!(seen, data);
        assert_eq!(r.running, 3);
    }

    #[test]
    fn pieces_of_a_read_are_put_together_and_an_error_wins() {
        let pool = palisade_export::BufferPool::new(0);
        let len = 3 << 20;
        let mut r = request(Action::Read { whole: Some(pool.alloc(len)) }, len as u64);
        let mut places = Vec::new();
        while r.next < r.end {
            places.push(r.next_piece().0);
        }
        for at in places.iter().rev() {
            r.piece_done(*at, BlockResult::Data(Bytes::from(vec![(at >> 20) as u8; 1 << 20])));
        }
        let Reply::Data(data) = r.reply() else { panic!("data") };
        assert_eq!((data[0], data[1 << 20], data[len - 1]), (0, 1, 2));
        let mut r = request(Action::Discard, 300 << 20);
        while r.next < r.end {
            r.next_piece();
        }
        for result in [BlockResult::Done, BlockResult::IoError, BlockResult::Done] {
            r.piece_done(0, result);
        }
        assert_eq!(r.reply(), Reply::Error(Errno::Io));
    }
}
