//! The writer's side of the data path: front-end requests, epochs, acknowledgements, peer-acks
//! (`spec/wire-protocol.md` §9, `spec/state-machine.md` §12.1, §13, §16).
//!
//! A write goes: waits for frozen I/O, a new generation, overlapping writes; takes its range and its extents; waits
//! until the extents are hot; is submitted to the local disk and to every peer at once; completes to the
//! front end when every leg its protocol asks for has answered; is forgotten when every peer has acknowledged the
//! barrier of its epoch, which is also when its extents may cool down.

use crate::activity_log::Grant;
use crate::connection::SentEpoch;
use crate::core::{Core, IoTag, Todo};
use crate::device::{Ldev, Waiting};
use crate::intervals::Holder;
use crate::io::{BlockId, BlockOp, BlockResult, IoError, Output, Stream};
use crate::types::{BATCH_SIZE_MAX, BIO_SIZE_MAX, NodeId, NodeMask, SECTOR, Time, VolumeNr};
use bytes::Bytes;
use palisade_wire::enums::{ConnState, DiskState, ReplState, WireProtocol};
use palisade_wire::{
    Barrier, BlockAck, BlockDesc, ConfirmStable, Dagtag, Data, DpFlags, Features, Packet, PeerAck, Trim,
};
use std::collections::BTreeMap;

/// What a write does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Payload {
    Data { data: Bytes, fua: bool },
    Discard,
    Zeroes { unmap: bool },
}

/// One leg of a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Leg {
    /// Asked, not answered.
    Pending,
    /// On the peer (protocol A: on its way), or on the local disk.
    Ok,
    /// The peer or the disk could not write it.
    Failed,
    /// The link went away first.
    Lost,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerLeg {
    pub node: NodeId,
    pub leg: Leg,
    /// What counts for completion: nothing (A), receipt (B), the write (C).
    pub needed: bool,
    /// The barrier of the epoch (or the loss of the link) settled it.
    pub settled: bool,
    /// The link it went over is gone.
    pub gone: bool,
    /// The peer's disk was UpToDate: its success alone makes the write good.
    pub up_to_date: bool,
}

/// A write of the front end.
#[derive(Debug)]
pub(crate) struct Request {
    pub block: BlockId,
    pub vnr: VolumeNr,
    pub sector: u64,
    pub len: u32,
    pub payload: Payload,
    pub local: Option<Leg>,
    /// The own disk was UpToDate: its success alone makes the write good.
    pub local_up_to_date: bool,
    pub peers: Vec<PeerLeg>,
    pub dagtag: u64,
    pub epoch: u32,
    pub submitted: bool,
    pub completed: bool,
    pub al_held: bool,
}

/// A flush of the front end.
#[derive(Debug)]
pub(crate) struct FlushRequest {
    pub block: BlockId,
    pub vnr: VolumeNr,
    pub local_pending: bool,
    /// Somebody with current data made it stable: the local disk, or an UpToDate peer by its barrier
    /// acknowledgement.
    pub good: bool,
    /// Peers that have not acknowledged the barrier of this epoch yet.
    pub peers: BTreeMap<NodeId, u32>,
}

/// A submitted write in dagtag order, until its peer-ack is decided.
#[derive(Debug)]
pub(crate) struct TransferLogEntry {
    pub dagtag: u64,
    pub id: u64,
    /// Set when the write is settled everywhere: nodes that have it, nodes it was sent to.
    pub settled: Option<(NodeMask, NodeMask)>,
    pub sectors: u64,
}

/// Peer-acks that are still being merged (`spec/wire-protocol.md` §9.9).
#[derive(Debug, Default)]
pub(crate) struct PeerAckBatch {
    pub mask: NodeMask,
    pub sectors: u64,
    pub last: BTreeMap<NodeId, u64>,
    pub since: Option<Time>,
}

/// What a peer gets of a write (`spec/wire-protocol.md` §9.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Share {
    Data,
    OutOfSync,
    Nothing,
}

impl Core {
    pub(crate) fn block_request(&mut self, id: BlockId, v: VolumeNr, op: BlockOp) {
        let Some(d) = self.devs.get_mut(&v) else {
            self.block_done(id, BlockResult::Invalid);
            return;
        };
        let (sector, len, max) = match &op {
            BlockOp::Read { sector, len } => (*sector, u64::from(*len), BIO_SIZE_MAX),
            BlockOp::Write { sector, data, .. } => (*sector, data.len() as u64, BIO_SIZE_MAX),
            BlockOp::Discard { sector, len } | BlockOp::WriteZeroes { sector, len, .. } => {
                (*sector, u64::from(*len), BATCH_SIZE_MAX)
            }
            BlockOp::Flush => (0, SECTOR, BIO_SIZE_MAX),
        };
        let flush = op == BlockOp::Flush;
        let end = sector.checked_add(len / SECTOR);
        if len == 0
            || !len.is_multiple_of(SECTOR)
            || len > u64::from(max)
            || (!flush && end.is_none_or(|e| e > d.size))
        {
            self.block_done(id, BlockResult::Invalid);
            return;
        }
        if !self.is_primary() {
            self.block_done(id, BlockResult::NotPrimary);
            return;
        }
        if self.io_must_fail() {
            self.block_done(id, BlockResult::IoError);
            return;
        }
        if let Some(d) = self.devs.get_mut(&v) {
            d.app_pending += 1;
            d.waiting.push_back(Waiting { id, op });
        }
        self.kick(v);
    }

    pub(crate) fn finish_block(&mut self, v: VolumeNr, id: BlockId, r: BlockResult) {
        if let Some(d) = self.devs.get_mut(&v) {
            d.app_pending = d.app_pending.saturating_sub(1);
        }
        self.block_done(id, r);
    }

    /// Requests that did not start fail now.
    pub(crate) fn fail_waiting(&mut self, r: &BlockResult) {
        for v in self.vnrs() {
            let waiting: Vec<Waiting> =
                self.devs.get_mut(&v).map(|d| d.waiting.drain(..).collect()).unwrap_or_default();
            for w in waiting {
                self.finish_block(v, w.id, r.clone());
            }
            if *r == BlockResult::IoError {
                // Prepared but not submitted: nothing of them left this node.
                let ready: Vec<u64> =
                    self.devs.get_mut(&v).map(|d| d.ready.drain(..).collect()).unwrap_or_default();
                for id in ready {
                    self.abandon(id);
                }
            }
        }
    }

    /// A forced demotion or a changed policy: everything pending completes with an error.
    pub(crate) fn fail_all_requests(&mut self) {
        self.fail_waiting(&BlockResult::IoError);
        // Prepared, but nothing of them left this node: they must not be carried out after all.
        for v in self.vnrs() {
            let prepared: Vec<u64> = self
                .devs
                .get_mut(&v)
                .map(|d| d.al_wait_app.drain(..).map(|x| x.1).chain(d.ready.drain(..)).collect())
                .unwrap_or_default();
            for id in prepared {
                self.abandon(id);
            }
        }
        let ids: Vec<u64> = self.requests.iter().filter(|(_, r)| !r.completed).map(|(id, _)| *id).collect();
        for id in ids {
            self.complete(id, BlockResult::IoError);
        }
        let reads: Vec<u64> = self.reads.keys().copied().collect();
        for id in reads {
            self.finish_read(id, BlockResult::IoError);
        }
        let flushes: Vec<u64> = self.flushes.keys().copied().collect();
        for id in flushes {
            if let Some(f) = self.flushes.remove(&id) {
                self.finish_block(f.vnr, f.block, BlockResult::IoError);
            }
        }
        self.held.clear();
    }

    /// A prepared write that never was submitted.
    fn abandon(&mut self, id: u64) {
        let Some(r) = self.requests.remove(&id) else { return };
        if let Some(d) = self.devs.get_mut(&r.vnr) {
            d.locks.remove(id, r.sector);
            if r.al_held
                && let Some(l) = &mut d.ldev
            {
                l.al.put(Ldev::extents(r.sector, r.len));
            }
        }
        if !r.completed {
            self.finish_block(r.vnr, r.block, BlockResult::IoError);
        }
    }

    /// Starts what can start, in order; a request overtakes only requests it does not overlap.
    pub(crate) fn kick(&mut self, v: VolumeNr) {
        if self.io_must_fail() && self.is_primary() {
            self.fail_waiting(&BlockResult::IoError);
        }
        if self.st.suspended() || !self.is_primary() {
            return;
        }
        if self.devs.get(&v).is_some_and(|d| d.new_uuid_needed && !d.ready.is_empty()) {
            self.new_generation(v, false);
        }
        while self.may_write(v) {
            let Some(id) = self.devs.get_mut(&v).and_then(|d| d.ready.pop_front()) else { break };
            self.submit(id);
        }
        let mut blocked: Vec<(u64, u64)> = Vec::new();
        let mut i = 0;
        while let Some(w) = self.devs.get(&v).and_then(|d| d.waiting.get(i)) {
            let range = match &w.op {
                BlockOp::Flush => None,
                BlockOp::Read { sector, len } => Some((*sector, *sector + u64::from(*len) / SECTOR, false)),
                BlockOp::Write { sector, data, .. } => {
                    Some((*sector, *sector + data.len() as u64 / SECTOR, true))
                }
                BlockOp::Discard { sector, len } | BlockOp::WriteZeroes { sector, len, .. } => {
                    Some((*sector, *sector + u64::from(*len) / SECTOR, true))
                }
            };
            let overtakes = range.is_none_or(|(s, e, _)| !blocked.iter().any(|(bs, be)| s < *be && *bs < e));
            if overtakes && self.start(v, i) {
                continue;
            }
            if let Some((s, e, true)) = range {
                blocked.push((s, e));
            }
            i += 1;
            // A pending generation or a full log stops every write; looking further only costs time.
            if blocked.len() > 64 {
                break;
            }
        }
    }

    /// Tries to start the i-th waiting request; true if it left the queue.
    fn start(&mut self, v: VolumeNr, i: usize) -> bool {
        let Some(w) = self.devs.get(&v).and_then(|d| d.waiting.get(i)) else { return false };
        let (id, op) = (w.id, w.op.clone());
        match op {
            BlockOp::Flush => {
                self.take_waiting(v, i);
                self.start_flush(v, id);
                true
            }
            BlockOp::Read { sector, len } => {
                self.take_waiting(v, i);
                self.start_read(v, id, sector, len);
                true
            }
            BlockOp::Write { sector, data, fua } => {
                let len = data.len() as u32;
                self.start_write(v, i, id, sector, len, Payload::Data { data, fua })
            }
            BlockOp::Discard { sector, len } => self.start_write(v, i, id, sector, len, Payload::Discard),
            BlockOp::WriteZeroes { sector, len, unmap } => {
                self.start_write(v, i, id, sector, len, Payload::Zeroes { unmap })
            }
        }
    }

    fn take_waiting(&mut self, v: VolumeNr, i: usize) {
        if let Some(d) = self.devs.get_mut(&v) {
            d.waiting.remove(i);
        }
    }

    fn start_write(
        &mut self,
        v: VolumeNr,
        i: usize,
        block: BlockId,
        sector: u64,
        len: u32,
        payload: Payload,
    ) -> bool {
        if !self.st.data_accessible(v) {
            self.take_waiting(v, i);
            self.finish_block(v, block, BlockResult::IoError);
            return true;
        }
        if self.devs.get(&v).is_some_and(|d| d.new_uuid_needed) {
            self.new_generation(v, false);
        }
        if !self.may_write(v) {
            return false;
        }
        let end = sector + u64::from(len) / SECTOR;
        // A resync passes once, the application could keep a block busy for ever (`spec/state-machine.md` §11.5).
        if self.resync_waits_for(v, sector, end) {
            return false;
        }
        let Some(d) = self.devs.get_mut(&v) else { return false };
        if d.locks.overlapping(sector, end).next().is_some() {
            return false;
        }
        let mut after = None;
        let mut al_held = false;
        if let Some(l) = &mut d.ldev
            && d.cfg.al_updates
        {
            match l.al.get(Ldev::extents(sector, len)) {
                Grant::Full => return false,
                Grant::Hot => al_held = true,
                Grant::After(seq) => {
                    al_held = true;
                    after = Some(seq);
                }
            }
        }
        d.waiting.remove(i);
        let id = self.id();
        if let Some(d) = self.devs.get_mut(&v) {
            d.locks.insert(id, sector, end, Holder::App);
            if let Some(seq) = after {
                d.al_wait_app.push((seq, id));
            }
        }
        self.requests.insert(
            id,
            Request {
                block,
                vnr: v,
                sector,
                len,
                payload,
                local: None,
                local_up_to_date: false,
                peers: Vec::new(),
                dagtag: 0,
                epoch: 0,
                submitted: false,
                completed: false,
                al_held,
            },
        );
        if after.is_some() {
            self.meta_next(v);
        } else {
            self.submit(id);
        }
        true
    }

    /// No generation is due, and what must be on disk before the next write is.
    fn may_write(&self, v: VolumeNr) -> bool {
        self.gate_open(v) && self.devs.get(&v).is_none_or(|d| !d.new_uuid_needed)
    }

    fn share(&self, n: NodeId, v: VolumeNr) -> Share {
        use ReplState as R;
        if !self.st.connected(n) {
            return Share::Nothing;
        }
        let (repl, pdsk) = (self.st.repl(n, v), self.st.pdsk(n, v));
        match (repl, pdsk) {
            (R::Ahead | R::WFBitMapS, _) => Share::OutOfSync,
            (r, DiskState::UpToDate) if r >= R::Established => Share::Data,
            (r, DiskState::Inconsistent) if r == R::Established || (r >= R::WFBitMapT && r < R::Ahead) => {
                Share::Data
            }
            (r, DiskState::Outdated | DiskState::Consistent) if r >= R::Established => Share::OutOfSync,
            _ => Share::Nothing,
        }
    }

    /// Local disk and peers at once.
    fn submit(&mut self, id: u64) {
        let Some(r) = self.requests.get(&id) else { return };
        if r.completed {
            self.abandon(id);
            return;
        }
        let (v, sector, len, payload) = (r.vnr, r.sector, r.len, r.payload.clone());
        let sectors = u64::from(len) / SECTOR;
        let max_epoch = self.conns.values().map(|c| c.net.max_epoch_size).min().unwrap_or(2048).max(1);
        if self.epoch_completed || self.epoch_writes >= max_epoch {
            self.close_epoch();
        }
        let before = self.dagtag;
        self.dagtag += sectors;
        let dagtag = self.dagtag;
        self.epoch_writes += 1;
        self.epoch_open_writes += 1;
        let epoch = self.epoch;
        let mut legs = Vec::new();
        let mut have = NodeMask::EMPTY;
        for n in self.peers() {
            match self.share(n, v) {
                Share::Nothing => {}
                Share::OutOfSync => {
                    // Earlier epochs end before the note (`spec/wire-protocol.md` §9.3).
                    self.close_epochs_before(n, epoch);
                    self.send_data(n, Some(v), Packet::OutOfSync(BlockDesc { sector, blksize: len }));
                }
                Share::Data => {
                    have = have.with(n);
                    legs.push(self.send_write(n, v, id, sector, len, &payload, before, epoch));
                }
            }
        }
        let disk = self.st.disk(v);
        if let Some(d) = self.devs.get_mut(&v) {
            if let Some(l) = &mut d.ldev {
                // Whoever does not get the data is behind from now on.
                l.mark_others(sector..sector + sectors, have);
            }
            d.written_sectors += sectors;
        }
        let local = disk >= DiskState::Inconsistent && self.devs.get(&v).is_some_and(|d| d.ldev.is_some());
        if let Some(r) = self.requests.get_mut(&id) {
            r.submitted = true;
            r.dagtag = dagtag;
            r.epoch = epoch;
            r.peers = legs;
            r.local = local.then_some(Leg::Pending);
            r.local_up_to_date = disk == DiskState::UpToDate;
        }
        self.transfer_log.push_back(TransferLogEntry { dagtag, id, settled: None, sectors });
        if local {
            let zeroes = self.discard_zeroes(v);
            let io = self.io(v, IoTag::AppWrite(id));
            self.emit(match payload {
                Payload::Data { data, fua } => Output::DiskWrite { id: io, vnr: v, sector, data, fua },
                Payload::Discard => {
                    Output::DiskZero { id: io, vnr: v, sector, len, unmap: true, discard: zeroes }
                }
                Payload::Zeroes { unmap } => {
                    Output::DiskZero { id: io, vnr: v, sector, len, unmap, discard: false }
                }
            });
        }
        self.maybe_complete(id);
    }

    #[allow(clippy::too_many_arguments)]
    fn send_write(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        id: u64,
        sector: u64,
        len: u32,
        payload: &Payload,
        before: u64,
        epoch: u32,
    ) -> PeerLeg {
        self.close_epochs_before(n, epoch);
        let now = self.now;
        let repl = self.st.repl(n, v);
        let up_to_date = self.st.pdsk(n, v) == DiskState::UpToDate;
        let syncing = matches!(
            repl,
            ReplState::SyncSource | ReplState::SyncTarget | ReplState::PausedSyncS | ReplState::PausedSyncT
        );
        let seq_num = self.next_seq(n, v);
        let sectors = u64::from(len) / SECTOR;
        let Some(c) = self.conns.get_mut(&n) else {
            return PeerLeg {
                node: n,
                leg: Leg::Lost,
                needed: false,
                settled: true,
                gone: true,
                up_to_date: false,
            };
        };
        let protocol = c.net.protocol;
        let announce = c.tx_dagtag != Some(before);
        c.tx_dagtag = Some(before + sectors);
        if c.sent_epochs.back().is_none_or(|e| e.number != epoch || e.barrier_sent) {
            c.sent_epochs.push_back(SentEpoch {
                number: epoch,
                writes: Vec::new(),
                confirmed: 0,
                barrier_sent: false,
                since: now,
            });
        }
        if let Some(e) = c.sent_epochs.back_mut() {
            e.writes.push(id);
        }
        let features = c.features;
        let integrity = c.net.integrity_alg.clone();
        if announce {
            self.send_data(n, None, Packet::Dagtag(Dagtag { dagtag: before }));
        }
        let mut flags = DpFlags::NONE
            .with(DpFlags::SEND_RECEIVE_ACK, protocol == WireProtocol::B)
            .with(DpFlags::SEND_WRITE_ACK, protocol == WireProtocol::C || syncing)
            .with(DpFlags::MAY_SET_IN_SYNC, syncing);
        let trim = |flags| Trim { sector, block_id: id, seq_num, dp_flags: flags, size: len };
        match payload {
            Payload::Data { data, fua } => {
                flags = flags.with(DpFlags::FUA, *fua).with(DpFlags::RW_SYNC, *fua);
                let digest = integrity.map_or_else(Bytes::new, |a| digest_of(&a, data));
                let p = Packet::Data(Data { sector, block_id: id, seq_num, dp_flags: flags });
                self.send(n, Stream::Data, Some(v.0), p, digest, data.clone());
            }
            Payload::Discard => {
                self.send_data(n, Some(v), Packet::Trim(trim(flags | DpFlags::DISCARD)));
            }
            Payload::Zeroes { unmap } if features.contains(Features::WZEROES) && integrity.is_none() => {
                let f = flags | DpFlags::ZEROES;
                self.send_data(n, Some(v), Packet::Zeroes(trim(f.with(DpFlags::DISCARD, *unmap))));
            }
            Payload::Zeroes { .. } => {
                // With an integrity algorithm kernels expect a digest that nobody sends (§6.4): the data itself.
                self.send_zero_data(n, v, id, sector, len, flags, seq_num, integrity.as_deref());
            }
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.pending += 1;
            p.sent_sectors += sectors;
        }
        PeerLeg {
            node: n,
            leg: Leg::Pending,
            needed: protocol != WireProtocol::A || syncing && up_to_date,
            settled: false,
            gone: false,
            up_to_date,
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn send_zero_data(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        id: u64,
        sector: u64,
        len: u32,
        flags: DpFlags,
        seq_num: u32,
        integrity: Option<&str>,
    ) {
        if len > BIO_SIZE_MAX {
            // Too large for one data packet; a trim without WZEROES semantics is executed as zero-out.
            let t = Trim { sector, block_id: id, seq_num, dp_flags: flags | DpFlags::DISCARD, size: len };
            self.send_data(n, Some(v), Packet::Trim(t));
            return;
        }
        let data = Bytes::from(vec![0u8; len as usize]);
        let digest = integrity.map_or_else(Bytes::new, |a| digest_of(a, &data));
        let p = Packet::Data(Data { sector, block_id: id, seq_num, dp_flags: flags });
        self.send(n, Stream::Data, Some(v.0), p, digest, data);
    }

    /// A discarded range reads back as zeroes; otherwise a discard is carried out as zeroing, so that all
    /// replicas stay equal.
    pub(crate) fn discard_zeroes(&self, v: VolumeNr) -> bool {
        self.devs.get(&v).and_then(|d| d.ldev.as_ref()).is_some_and(|l| l.discard_zeroes)
    }

    pub(crate) fn next_seq(&mut self, n: NodeId, v: VolumeNr) -> u32 {
        let Some(p) = self.pds.get_mut(&(n, v)) else { return 0 };
        p.tx_seq = p.tx_seq.wrapping_add(1);
        p.tx_seq
    }

    /// Ends the current epoch for every peer.
    pub(crate) fn close_epoch(&mut self) {
        if self.epoch_writes == 0 {
            self.epoch_completed = false;
            return;
        }
        self.epoch = self.epoch.wrapping_add(1);
        self.epoch_writes = 0;
        self.epoch_open_writes = 0;
        self.epoch_completed = false;
        for n in self.peers() {
            self.close_epochs_before(n, self.epoch);
        }
    }

    pub(crate) fn close_epochs_before(&mut self, n: NodeId, epoch: u32) {
        let Some(c) = self.conns.get_mut(&n) else { return };
        let mut barriers = Vec::new();
        for e in c.sent_epochs.iter_mut().filter(|e| !e.barrier_sent && e.number != epoch) {
            e.barrier_sent = true;
            barriers.push(e.number);
        }
        for b in barriers {
            // The number is opaque to the peer; kernels write it in host byte order.
            self.send_data(n, None, Packet::Barrier(Barrier { barrier: b.swap_bytes() }));
        }
    }

    /// An idle writer closes a finished epoch promptly.
    pub(crate) fn close_idle_epoch(&mut self) -> bool {
        if self.epoch_completed && self.epoch_open_writes == 0 && self.epoch_writes > 0 {
            self.close_epoch();
            return true;
        }
        false
    }

    pub(crate) fn app_write_done(&mut self, v: VolumeNr, id: u64, result: Result<(), IoError>) {
        let unsupported = result == Err(IoError::Unsupported);
        let Some(r) = self.requests.get_mut(&id) else { return };
        if unsupported && r.payload == Payload::Discard {
            // A discard is only a hint here, but all replicas must end up equal: write zeroes.
            r.payload = Payload::Zeroes { unmap: true };
            let (sector, len) = (r.sector, r.len);
            let io = self.io(v, IoTag::AppWrite(id));
            self.emit(Output::DiskZero { id: io, vnr: v, sector, len, unmap: false, discard: false });
            return;
        }
        r.local = Some(if result.is_ok() { Leg::Ok } else { Leg::Failed });
        let (sector, len, completed) = (r.sector, r.len, r.completed);
        if completed && let Some(d) = self.devs.get_mut(&v) {
            // Another node may be Primary by now.
            d.locks.remove(id, sector);
            self.todo(Todo::KickPeers(v));
        }
        if result.is_err() {
            self.local_write_failed(v, sector, len);
        }
        self.maybe_complete(id);
        self.settle_request(id);
        self.todo(Todo::Kick(v));
    }

    /// A write ack of any kind.
    pub(crate) fn got_write_ack(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        a: &BlockAck,
        received_only: bool,
        in_sync: bool,
    ) {
        let Some(r) = self.requests.get_mut(&a.block_id).filter(|r| r.vnr == v && r.sector == a.sector)
        else {
            self.drop_link(n, ConnState::ProtocolError, "acknowledgement of an unknown write");
            return;
        };
        let (sector, len) = (r.sector, r.len);
        let Some(leg) = r.peers.iter_mut().find(|l| l.node == n) else {
            self.drop_link(n, ConnState::ProtocolError, "acknowledgement of a write that was not sent");
            return;
        };
        if leg.leg == Leg::Pending {
            if received_only {
                // Protocol B: enough for completion, the write itself is confirmed by the barrier.
                leg.needed = false;
            } else {
                leg.leg = Leg::Ok;
            }
            if let Some(p) = self.pds.get_mut(&(n, v)) {
                p.pending = p.pending.saturating_sub(1);
            }
        }
        let local_failed = r.local == Some(Leg::Failed);
        if in_sync
            && !local_failed
            && let Some(l) = self.ldev(v)
            && let Some(s) = l.slot(n)
        {
            l.bitmap.set_in_sync(s, sector..sector + u64::from(len) / SECTOR);
        }
        self.maybe_complete(a.block_id);
    }

    pub(crate) fn got_neg_ack(&mut self, n: NodeId, v: VolumeNr, a: &BlockAck) {
        let (sector, len) = (a.sector, a.blksize);
        let size = self.devs.get(&v).map_or(0, |d| d.size);
        let end = sector.saturating_add(u64::from(len) / SECTOR).min(size);
        if let Some(l) = self.ldev(v)
            && let Some(s) = l.slot(n)
            && sector < end
        {
            l.bitmap.set_out_of_sync(s, sector..end);
        }
        if let Some(leg) =
            self.requests.get_mut(&a.block_id).and_then(|r| r.peers.iter_mut().find(|l| l.node == n))
        {
            leg.leg = Leg::Failed;
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.pending = p.pending.saturating_sub(1);
        }
        self.maybe_complete(a.block_id);
    }

    /// Completes a write to the front end when every leg it needs has answered.
    fn maybe_complete(&mut self, id: u64) {
        let Some(r) = self.requests.get(&id) else { return };
        if r.completed || !r.submitted || r.local == Some(Leg::Pending) {
            return;
        }
        if r.peers.iter().any(|l| l.needed && l.leg == Leg::Pending) {
            return;
        }
        if r.local != Some(Leg::Ok) && r.peers.iter().any(|l| l.leg == Leg::Pending) {
            // Only the peers can still make this write good: their barrier tells, also with protocol A and B.
            self.close_epoch();
            return;
        }
        let lost = r.peers.iter().any(|l| l.leg == Leg::Lost);
        if lost && self.frozen() {
            // Whether this write may be completed is what the freeze is about.
            self.held.insert(id);
            return;
        }
        // A copy on a disk that is gone since is no copy: another replica may serve this range from now on.
        let disk = self.st.disk(r.vnr) >= DiskState::Outdated;
        let good = r.local == Some(Leg::Ok) && r.local_up_to_date && disk
            || r.peers.iter().any(|l| l.up_to_date && l.leg == Leg::Ok);
        let result = if lost && self.io_must_fail() {
            BlockResult::IoError
        } else if good {
            BlockResult::Done
        } else {
            BlockResult::IoError
        };
        self.complete(id, result);
    }

    /// Frozen for a reason that decides whether unconfirmed writes may complete.
    fn frozen(&self) -> bool {
        self.st.susp_fen || self.st.susp_quorum || self.st.susp_nod || self.st.susp_uuid
    }

    fn complete(&mut self, id: u64, result: BlockResult) {
        let Some(r) = self.requests.get_mut(&id) else { return };
        debug_assert!(!r.completed, "no completion twice");
        if r.completed {
            return;
        }
        r.completed = true;
        let (v, block, sector, epoch, submitted) = (r.vnr, r.block, r.sector, r.epoch, r.submitted);
        // A forced demotion completes writes the disk still has: their range stays taken.
        if r.local != Some(Leg::Pending)
            && let Some(d) = self.devs.get_mut(&v)
        {
            d.locks.remove(id, sector);
        }
        if submitted && epoch == self.epoch {
            self.epoch_completed = true;
            self.epoch_open_writes = self.epoch_open_writes.saturating_sub(1);
        }
        self.finish_block(v, block, result);
        self.settle_request(id);
        self.todo(Todo::Kick(v));
        self.todo(Todo::KickPeers(v));
    }

    /// Suspension ended: withheld completions and waiting requests go on.
    pub(crate) fn thaw(&mut self) {
        // Not completed, so whoever did not get them may get them again: they are issued anew, to everybody.
        let held: Vec<u64> = std::mem::take(&mut self.held).into_iter().collect();
        for id in held.into_iter().rev() {
            self.issue_again(id);
        }
        for id in self.flushes.keys().copied().collect::<Vec<_>>() {
            self.maybe_finish_flush(id);
        }
        for v in self.vnrs() {
            self.todo(Todo::Kick(v));
            self.retry_reads(v);
        }
    }

    /// Puts a write that was withheld back to the front of the queue.
    fn issue_again(&mut self, id: u64) {
        let Some(r) = self.requests.get_mut(&id) else { return };
        if r.completed {
            return;
        }
        r.completed = true;
        let (v, block, sector, len) = (r.vnr, r.block, r.sector, r.len);
        let op = match &r.payload {
            Payload::Data { data, fua } => BlockOp::Write { sector, data: data.clone(), fua: *fua },
            Payload::Discard => BlockOp::Discard { sector, len },
            Payload::Zeroes { unmap } => BlockOp::WriteZeroes { sector, len, unmap: *unmap },
        };
        let epoch = r.epoch;
        if let Some(d) = self.devs.get_mut(&v) {
            d.locks.remove(id, sector);
            d.waiting.push_front(Waiting { id: block, op });
        }
        if epoch == self.epoch {
            self.epoch_completed = true;
            self.epoch_open_writes = self.epoch_open_writes.saturating_sub(1);
        }
        self.settle_request(id);
    }

    pub(crate) fn got_barrier_ack(&mut self, n: NodeId, barrier: u32, set_size: u32) {
        let number = barrier.swap_bytes();
        let Some(c) = self.conns.get_mut(&n) else { return };
        let ok = c.sent_epochs.front().is_some_and(|e| {
            e.barrier_sent && e.number == number && e.writes.len() - e.confirmed == set_size as usize
        });
        if !ok {
            self.drop_link(n, ConnState::ProtocolError, "P_BARRIER_ACK out of order or with a wrong count");
            return;
        }
        let Some(e) = c.sent_epochs.pop_front() else { return };
        for id in e.writes {
            self.leg_settled(n, id);
        }
        self.barrier_acked(n, number);
        self.advance_transfer_log();
    }

    pub(crate) fn got_confirm_stable(&mut self, n: NodeId, c: &ConfirmStable) {
        let Some(conn) = self.conns.get_mut(&n) else { return };
        let Some(e) = conn.sent_epochs.front_mut() else {
            self.drop_link(n, ConnState::ProtocolError, "P_CONFIRM_STABLE without writes");
            return;
        };
        let from = e.confirmed;
        let to = from + c.set_size as usize;
        let ok = c.set_size > 0
            && e.writes.get(from) == Some(&c.oldest_block_id)
            && e.writes.get(to - 1) == Some(&c.youngest_block_id);
        if !ok {
            self.drop_link(
                n,
                ConnState::ProtocolError,
                "P_CONFIRM_STABLE out of order or with a wrong count",
            );
            return;
        }
        e.confirmed = to;
        let writes: Vec<u64> = e.writes.get(from..to).unwrap_or_default().to_vec();
        for id in writes {
            self.leg_settled(n, id);
        }
        self.advance_transfer_log();
        self.flush_peer_acks();
    }

    /// The peer has the write on stable storage (or reported that it failed).
    fn leg_settled(&mut self, n: NodeId, id: u64) {
        if let Some(l) = self.requests.get_mut(&id).and_then(|r| r.peers.iter_mut().find(|l| l.node == n)) {
            if l.leg == Leg::Pending {
                l.leg = Leg::Ok;
            }
            l.settled = true;
        }
        self.maybe_complete(id);
        self.settle_request(id);
    }

    /// Forgets a write that is settled everywhere; its extents may cool down.
    fn settle_request(&mut self, id: u64) {
        let Some(r) = self.requests.get(&id) else { return };
        let settled =
            r.submitted && r.completed && r.local != Some(Leg::Pending) && r.peers.iter().all(|l| l.settled);
        if !settled {
            return;
        }
        let Some(r) = self.requests.remove(&id) else { return };
        let mut mask = NodeMask::EMPTY;
        let mut sent = NodeMask::EMPTY;
        if r.local == Some(Leg::Ok) {
            mask = mask.with(self.me);
        }
        for l in &r.peers {
            if l.leg == Leg::Ok {
                mask = mask.with(l.node);
            }
            // Whoever refused it, or had it on an earlier link, does not wait for its peer-ack.
            if !matches!(l.leg, Leg::Lost | Leg::Failed) && !l.gone {
                sent = sent.with(l.node);
            }
        }
        if let Some(d) = self.devs.get_mut(&r.vnr) {
            if r.al_held
                && let Some(l) = &mut d.ldev
            {
                l.al.put(Ldev::extents(r.sector, r.len));
            }
            self.todo(Todo::Kick(r.vnr));
        }
        if let Ok(i) = self.transfer_log.binary_search_by_key(&r.dagtag, |e| e.dagtag)
            && let Some(e) = self.transfer_log.get_mut(i)
        {
            debug_assert_eq!(e.id, id);
            e.settled = Some((mask, sent));
        }
        self.advance_transfer_log();
    }

    /// Peer-acks go out in the order of the stream (`spec/wire-protocol.md` §9.9).
    fn advance_transfer_log(&mut self) {
        while let Some((mask, sent)) = self.transfer_log.front().and_then(|e| e.settled) {
            let Some(e) = self.transfer_log.pop_front() else { break };
            if self.peer_acks.mask != mask && !self.peer_acks.last.is_empty() {
                self.flush_peer_acks();
            }
            self.peer_acks.mask = mask;
            self.peer_acks.sectors += e.sectors;
            for n in sent.iter() {
                self.peer_acks.last.insert(n, e.dagtag);
            }
            if self.peer_acks.since.is_none() && !self.peer_acks.last.is_empty() {
                self.peer_acks.since = Some(self.now);
            }
            if self.peer_acks.sectors >= self.cfg.resource.peer_ack_window_sectors {
                self.flush_peer_acks();
            }
        }
        self.answer_flush_requests();
    }

    pub(crate) fn flush_peer_acks(&mut self) {
        let batch = std::mem::take(&mut self.peer_acks);
        for (n, dagtag) in batch.last {
            self.send_control(n, None, Packet::PeerAck(PeerAck { mask: batch.mask.0, dagtag }));
        }
    }

    pub(crate) fn peer_ack_deadline(&self) -> Option<Time> {
        self.peer_acks.since.map(|t| t + self.cfg.resource.peer_ack_delay)
    }

    pub(crate) fn peer_ack_timer(&mut self) {
        if self.peer_ack_deadline().is_some_and(|t| self.now >= t) {
            self.flush_peer_acks();
            self.answer_flush_requests();
        }
    }

    /// A peer was lost: its legs are lost, its blocks out of sync.
    pub(crate) fn writer_lost_peer(&mut self, n: NodeId) {
        self.peer_acks.last.remove(&n);
        for r in self.requests.values_mut() {
            for l in r.peers.iter_mut().filter(|l| l.node == n) {
                l.gone = true;
            }
        }
        for e in &mut self.transfer_log {
            if let Some((_, sent)) = &mut e.settled {
                *sent = sent.without(n);
            }
        }
        let Some(c) = self.conns.get_mut(&n) else { return };
        let epochs = std::mem::take(&mut c.sent_epochs);
        for id in epochs.into_iter().flat_map(|e| e.writes) {
            let Some(r) = self.requests.get_mut(&id) else { continue };
            let (v, sector, len) = (r.vnr, r.sector, r.len);
            let Some(l) = r.peers.iter_mut().find(|l| l.node == n && !l.settled) else { continue };
            l.leg = Leg::Lost;
            l.settled = true;
            if let Some(ld) = self.ldev(v)
                && let Some(s) = ld.slot(n)
            {
                ld.bitmap.set_out_of_sync(s, sector..sector + u64::from(len) / SECTOR);
            }
            self.maybe_complete(id);
            self.settle_request(id);
        }
        let waiting: Vec<u64> =
            self.flushes.iter().filter(|(_, f)| f.peers.contains_key(&n)).map(|(id, _)| *id).collect();
        for id in waiting {
            if let Some(f) = self.flushes.get_mut(&id) {
                f.peers.remove(&n);
            }
            self.maybe_finish_flush(id);
        }
    }

    /// Writes were sent to the peer and it did not confirm them.
    pub(crate) fn has_unconfirmed(&self, n: NodeId, v: VolumeNr) -> bool {
        self.requests
            .values()
            .any(|r| r.vnr == v && r.submitted && r.peers.iter().any(|l| l.node == n && !l.settled))
    }

    pub(crate) fn oldest_unacked(&self, n: NodeId) -> Option<Time> {
        self.conns.get(&n)?.sent_epochs.front().map(|e| e.since)
    }

    // ----- flushes -----

    /// Everything completed before is stable everywhere when this completes: the local cache is flushed, and
    /// every replica has acknowledged the barrier behind the last write.
    fn start_flush(&mut self, v: VolumeNr, block: BlockId) {
        if !self.st.data_accessible(v) {
            self.finish_block(v, block, BlockResult::IoError);
            return;
        }
        self.close_epoch();
        let peers: BTreeMap<NodeId, u32> =
            self.conns.values().filter_map(|c| c.sent_epochs.back().map(|e| (c.peer, e.number))).collect();
        let local =
            self.st.disk(v) >= DiskState::Inconsistent && self.devs.get(&v).is_some_and(|d| d.ldev.is_some());
        // An UpToDate peer without open epoch has everything on stable storage already.
        let good = self.st.peers_of(v).any(|(n, p)| {
            self.st.connected(n)
                && p.pdsk == DiskState::UpToDate
                && p.repl >= ReplState::Established
                && !peers.contains_key(&n)
        });
        let id = self.id();
        self.flushes.insert(id, FlushRequest { block, vnr: v, local_pending: local, good, peers });
        if local {
            let io = self.io(v, IoTag::AppFlush { id });
            self.emit(Output::DiskFlush { id: io, vnr: v });
        }
        self.maybe_finish_flush(id);
    }

    pub(crate) fn app_flush_done(&mut self, v: VolumeNr, id: u64, ok: bool) {
        if let Some(f) = self.flushes.get_mut(&id) {
            f.local_pending = false;
            f.good |= ok;
        }
        if !ok {
            self.disk_error(v, true);
        }
        self.maybe_finish_flush(id);
    }

    fn barrier_acked(&mut self, n: NodeId, number: u32) {
        let ids: Vec<u64> = self
            .flushes
            .iter()
            .filter(|(_, f)| f.peers.get(&n) == Some(&number))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            if let Some(f) = self.flushes.get_mut(&id) {
                f.peers.remove(&n);
                f.good |= self.st.pdsk(n, f.vnr) == DiskState::UpToDate;
            }
            self.maybe_finish_flush(id);
        }
    }

    fn maybe_finish_flush(&mut self, id: u64) {
        let Some(f) = self.flushes.get(&id) else { return };
        if f.local_pending || !f.peers.is_empty() || self.frozen() {
            return;
        }
        let (v, block) = (f.vnr, f.block);
        let bad = !f.good || self.io_must_fail();
        self.flushes.remove(&id);
        self.finish_block(v, block, if bad { BlockResult::IoError } else { BlockResult::Done });
    }

    /// The local disk could not write (`spec/state-machine.md` §13.1).
    fn local_write_failed(&mut self, v: VolumeNr, sector: u64, len: u32) {
        if let Some(l) = self.ldev(v) {
            l.mark_others(sector..sector + u64::from(len) / SECTOR, NodeMask::EMPTY);
        }
        self.disk_error(v, false);
    }
}

pub(crate) fn digest_of(alg: &str, data: &[u8]) -> Bytes {
    crate::auth::DigestAlg::parse(alg).map_or_else(|_| Bytes::new(), |a| crate::auth::digest(a, data).into())
}
