//! The replica's side of the data path: writes from a peer, their epochs and acknowledgements, peer-acks
//! (`spec/wire-protocol.md` §9).
//!
//! Epochs of one writer are applied in order: a write is submitted only when its epoch is the oldest unfinished
//! one, and a barrier is acknowledged when every write of its epoch is finished and flushed. A write holds its
//! activity-log extents until the writer's peer-ack says which nodes have it.

use crate::activity_log::Grant;
use crate::connection::{ReceivedEpoch, Unacked};
use crate::core::{Core, IoTag, Todo};
use crate::device::Ldev;
use crate::intervals::Holder;
use crate::io::{IoError, LogLevel, Output};
use crate::resync::LostPosition;
use crate::types::{NodeId, NodeMask, SECTOR, VolumeNr};
use bytes::Bytes;
use palisade_wire::enums::{ConnState, DiskState, ReplState};
use palisade_wire::{BarrierAck, BlockAck, BlockDesc, ConfirmStable, DpFlags, Features, Packet};

/// Epochs, notes and requests of one peer that may wait at once; a sane peer stays far below.
const QUEUED_MAX: usize = 4096;

/// What a replicated write does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum PeerPayload {
    Data(Bytes),
    /// Discard or zero.
    Zero {
        unmap: bool,
        discard: bool,
    },
}

/// A write of a peer.
#[derive(Debug)]
pub(crate) struct PeerRequest {
    pub peer: NodeId,
    pub vnr: VolumeNr,
    pub sector: u64,
    pub len: u32,
    pub payload: PeerPayload,
    pub block_id: u64,
    pub flags: DpFlags,
    /// The oldest epoch: may be submitted.
    pub turn: bool,
    /// Its extents are hot (or need not be).
    pub hot: bool,
    pub al_asked: bool,
    /// Holds references on its extents.
    pub al_held: bool,
    pub locked: bool,
    pub submitted: bool,
    /// Its link is gone: it is still applied, but nobody awaits an answer, and it puts its extents back itself.
    pub orphan: bool,
}

/// Fixed part of a replicated write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerWrite {
    pub sector: u64,
    pub len: u32,
    pub block_id: u64,
    pub seq_num: u32,
    pub flags: DpFlags,
}

impl Core {
    /// Packets of the data path that name a volume.
    pub(crate) fn data_packet(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        packet: Packet,
        digest: &Bytes,
        data: Bytes,
    ) {
        if !self.st.connected(n) && !matches!(packet, Packet::OutOfSync(_)) {
            self.drop_link(n, ConnState::ProtocolError, "data before the connection is established");
            return;
        }
        match packet {
            Packet::Data(d) => {
                let w = PeerWrite {
                    sector: d.sector,
                    len: data.len() as u32,
                    block_id: d.block_id,
                    seq_num: d.seq_num,
                    flags: d.dp_flags,
                };
                if !self.digest_ok(n, digest, &data) {
                    return;
                }
                self.peer_write(n, v, w, PeerPayload::Data(data));
            }
            Packet::Trim(t) => {
                let zero = !self.conns.get(&n).is_some_and(|c| c.features.contains(Features::WZEROES));
                let w = PeerWrite {
                    sector: t.sector,
                    len: t.size,
                    block_id: t.block_id,
                    seq_num: t.seq_num,
                    flags: t.dp_flags,
                };
                self.peer_write(n, v, w, PeerPayload::Zero { unmap: true, discard: !zero });
            }
            Packet::Zeroes(t) => {
                let w = PeerWrite {
                    sector: t.sector,
                    len: t.size,
                    block_id: t.block_id,
                    seq_num: t.seq_num,
                    flags: t.dp_flags,
                };
                let unmap = t.dp_flags.contains(DpFlags::DISCARD);
                self.peer_write(n, v, w, PeerPayload::Zero { unmap, discard: false });
            }
            Packet::OutOfSync(o) => self.got_out_of_sync(n, v, o.sector, o.blksize),
            Packet::WriteAck(a) => self.got_write_ack(n, v, &a, false, false),
            Packet::WriteAckInSync(a) => self.got_write_ack(n, v, &a, false, true),
            Packet::RecvAck(a) => self.got_write_ack(n, v, &a, true, false),
            Packet::NegAck(a) => self.got_neg_ack(n, v, &a),
            Packet::DataRequest(r) => self.got_read_request(n, v, &r),
            Packet::DataReply(d) => {
                if self.digest_ok(n, digest, &data) {
                    self.got_read_reply(n, &d, data);
                }
            }
            Packet::NegDreply(a) => self.got_read_refusal(n, a.block_id),
            Packet::PeersInSync(p) => self.got_peers_in_sync(n, v, &p),
            other => self.resync_packet(n, v, &other, digest, data),
        }
    }

    /// Checks a data integrity digest.
    pub(crate) fn digest_ok(&mut self, n: NodeId, digest: &Bytes, data: &Bytes) -> bool {
        let Some(alg) = self.conns.get(&n).and_then(|c| c.peer_integrity.clone()) else { return true };
        if crate::write::digest_of(&alg, data) == *digest {
            return true;
        }
        self.drop_link(n, ConnState::ProtocolError, "Digest integrity check FAILED");
        false
    }

    fn inside(&self, v: VolumeNr, sector: u64, len: u32) -> bool {
        len > 0
            && u64::from(len).is_multiple_of(SECTOR)
            && self
                .devs
                .get(&v)
                .is_some_and(|d| sector.checked_add(u64::from(len) / SECTOR).is_some_and(|e| e <= d.size))
    }

    fn peer_write(&mut self, n: NodeId, v: VolumeNr, w: PeerWrite, payload: PeerPayload) {
        if !self.inside(v, w.sector, w.len) {
            self.drop_link(n, ConnState::ProtocolError, "write outside of the device");
            return;
        }
        if self.is_primary() && self.write_conflicts(v, &w) {
            // Without cluster software that prevents this the replicas would silently differ (§9.7).
            self.drop_link(n, ConnState::ProtocolError, "Concurrent writes detected");
            return;
        }
        let sectors = u64::from(w.len) / SECTOR;
        let usable =
            self.st.disk(v) >= DiskState::Inconsistent && self.devs.get(&v).is_some_and(|d| d.ldev.is_some());
        let id = self.id();
        let Some(c) = self.conns.get_mut(&n) else { return };
        c.rx_dagtag += sectors;
        let dagtag = c.rx_dagtag;
        if c.received_epochs.is_empty() {
            c.received_epochs.push_back(ReceivedEpoch::default());
        }
        let oldest = c.received_epochs.len() == 1;
        let Some(e) = c.received_epochs.back_mut() else { return };
        e.count += 1;
        e.block_ids.push(w.block_id);
        if !usable {
            // Counted in the epoch, but refused.
            self.send_ack(n, v, w.sector, w.len, w.block_id, Packet::NegAck);
            return;
        }
        e.unfinished += 1;
        e.volumes.insert(v);
        if !oldest {
            e.queued.push_back(id);
        }
        c.buffered += u64::from(w.len);
        c.unacked.push_back(Unacked {
            dagtag,
            vnr: v,
            sector: w.sector,
            len: w.len,
            done: false,
            al: false,
            id,
        });
        if w.flags.contains(DpFlags::SEND_RECEIVE_ACK) {
            self.send_ack(n, v, w.sector, w.len, w.block_id, Packet::RecvAck);
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.received += sectors;
            p.unacked += 1;
        }
        self.peer_requests.insert(
            id,
            PeerRequest {
                peer: n,
                vnr: v,
                sector: w.sector,
                len: w.len,
                payload,
                block_id: w.block_id,
                flags: w.flags,
                turn: oldest,
                hot: false,
                al_asked: false,
                al_held: false,
                locked: false,
                submitted: false,
                orphan: false,
            },
        );
        if let Some(d) = self.devs.get_mut(&v) {
            d.peer_waiting.push_back(id);
        }
        let _ = w.seq_num;
        // PRIMARY_IND must be on disk before the first replicated write (`spec/metadata.md` §9.1).
        self.kick_peers(v);
    }

    fn write_conflicts(&self, v: VolumeNr, w: &PeerWrite) -> bool {
        let end = w.sector + u64::from(w.len) / SECTOR;
        self.devs.get(&v).is_some_and(|d| d.locks.overlapping(w.sector, end).any(|(_, h)| h == Holder::App))
    }

    /// Whether the link's data stream may be read further: a bound on what is buffered for the disk.
    #[must_use]
    pub fn may_receive(&self, n: NodeId) -> bool {
        self.conns.get(&n).is_none_or(|c| {
            c.buffered <= u64::from(c.net.max_buffers) * 4096
                && c.received_epochs.len() <= QUEUED_MAX
                && c.oos_after.len() <= QUEUED_MAX
                && c.reads_served.len() <= QUEUED_MAX
                && c.flush_requests.len() <= QUEUED_MAX
        })
    }

    /// Submits replicated writes that may go.
    pub(crate) fn kick_peers(&mut self, v: VolumeNr) {
        let ids: Vec<u64> =
            self.devs.get(&v).map(|d| d.peer_waiting.iter().copied().collect()).unwrap_or_default();
        let mut blocked: Vec<(u64, u64)> = Vec::new();
        let mut al_full = None;
        for id in ids {
            let Some(r) = self.peer_requests.get(&id) else {
                self.unqueue_peer(v, id);
                continue;
            };
            let (n, sector, len, turn) = (r.peer, r.sector, r.len, r.turn);
            let end = sector + u64::from(len) / SECTOR;
            if !r.al_asked && al_full.is_none() {
                match self.ask_extents(v, sector, len) {
                    Grant::Full => al_full = Some(n),
                    g => self.extents_granted(id, g),
                }
            }
            let Some(r) = self.peer_requests.get(&id) else { continue };
            let clash = blocked.iter().any(|(s, e)| sector < *e && *s < end);
            let ready = turn && r.hot && !clash && self.gate_open(v);
            if ready && self.range_free(v, n, sector, end) {
                self.submit_peer(id);
            } else {
                blocked.push((sector, end));
            }
        }
        self.meta_next(v);
        if let Some(n) = al_full {
            self.confirm_stable(n);
        }
    }

    fn unqueue_peer(&mut self, v: VolumeNr, id: u64) {
        if let Some(d) = self.devs.get_mut(&v) {
            d.peer_waiting.retain(|x| *x != id);
        }
    }

    fn ask_extents(&mut self, v: VolumeNr, sector: u64, len: u32) -> Grant {
        let Some(d) = self.devs.get_mut(&v) else { return Grant::Hot };
        match &mut d.ldev {
            Some(l) if d.cfg.al_updates => l.al.get(Ldev::extents(sector, len)),
            _ => Grant::Hot,
        }
    }

    fn extents_granted(&mut self, id: u64, g: Grant) {
        let Some(r) = self.peer_requests.get_mut(&id) else { return };
        r.al_asked = true;
        let (n, v) = (r.peer, r.vnr);
        match g {
            Grant::After(seq) => {
                if let Some(d) = self.devs.get_mut(&v) {
                    d.al_wait_peer.push((seq, id));
                }
            }
            _ => r.hot = true,
        }
        let held = self.devs.get(&v).is_some_and(|d| d.cfg.al_updates && d.ldev.is_some());
        if let Some(r) = self.peer_requests.get_mut(&id) {
            r.al_held = held;
        }
        if let Some(u) = self.conns.get_mut(&n).and_then(|c| c.unacked.iter_mut().rev().find(|u| u.id == id))
        {
            u.al = held;
        }
    }

    pub(crate) fn peer_write_hot(&mut self, id: u64) {
        if let Some(r) = self.peer_requests.get_mut(&id) {
            r.hot = true;
        }
    }

    /// Nothing in flight that this write must wait for (`spec/state-machine.md` §11.5).
    fn range_free(&self, v: VolumeNr, n: NodeId, start: u64, end: u64) -> bool {
        self.devs.get(&v).is_none_or(|d| {
            d.locks.overlapping(start, end).all(|(_, h)| matches!(h, Holder::ResyncAsked(p) if p == n))
        })
    }

    fn submit_peer(&mut self, id: u64) {
        let Some(r) = self.peer_requests.get_mut(&id) else { return };
        r.submitted = true;
        r.locked = true;
        let (v, sector, len, payload, flags) = (r.vnr, r.sector, r.len, r.payload.clone(), r.flags);
        self.unqueue_peer(v, id);
        if let Some(d) = self.devs.get_mut(&v) {
            d.locks.insert(id, sector, sector + u64::from(len) / SECTOR, Holder::PeerWrite);
            d.written_sectors += u64::from(len) / SECTOR;
        }
        let zeroes = self.discard_zeroes(v);
        let io = self.io(v, IoTag::PeerWrite(id));
        self.emit(match payload {
            PeerPayload::Data(data) => {
                Output::DiskWrite { id: io, vnr: v, sector, data, fua: flags.contains(DpFlags::FUA) }
            }
            PeerPayload::Zero { unmap, discard } => {
                Output::DiskZero { id: io, vnr: v, sector, len, unmap, discard: discard && zeroes }
            }
        });
    }

    pub(crate) fn peer_write_done(&mut self, v: VolumeNr, id: u64, result: Result<(), IoError>) {
        let Some(r) = self.peer_requests.get_mut(&id) else { return };
        if result == Err(IoError::Unsupported)
            && r.payload != (PeerPayload::Zero { unmap: false, discard: false })
        {
            r.payload = PeerPayload::Zero { unmap: false, discard: false };
            let (sector, len) = (r.sector, r.len);
            let io = self.io(v, IoTag::PeerWrite(id));
            self.emit(Output::DiskZero { id: io, vnr: v, sector, len, unmap: false, discard: false });
            return;
        }
        let Some(r) = self.peer_requests.remove(&id) else { return };
        if r.orphan {
            self.orphan_done(v, id, &r, result);
            return;
        }
        let n = r.peer;
        let range = r.sector..r.sector + u64::from(r.len) / SECTOR;
        if let Some(d) = self.devs.get_mut(&v) {
            d.locks.remove(id, r.sector);
        }
        let repl = self.st.repl(n, v);
        let syncing = matches!(
            repl,
            ReplState::SyncSource | ReplState::SyncTarget | ReplState::PausedSyncS | ReplState::PausedSyncT
        );
        let in_sync = result.is_ok() && syncing && r.flags.contains(DpFlags::MAY_SET_IN_SYNC);
        if let Some(l) = self.ldev(v) {
            match (result.is_ok(), l.slot(n)) {
                (true, Some(s)) if in_sync => {
                    l.bitmap.set_in_sync(s, range.clone());
                }
                (true, _) => {}
                (false, _) => l.mark_others(range.clone(), NodeMask::EMPTY),
            }
        }
        // A writer without usable data of its own gets it back by resync.
        if result.is_ok()
            && self.st.pdsk(n, v) < DiskState::Inconsistent
            && let Some(l) = self.ldev(v)
            && let Some(s) = l.slot(n)
        {
            l.bitmap.set_out_of_sync(s, range);
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.unacked = p.unacked.saturating_sub(1);
        }
        if result.is_err() {
            self.send_ack(n, v, r.sector, r.len, r.block_id, Packet::NegAck);
        } else if r.flags.contains(DpFlags::SEND_WRITE_ACK) || in_sync {
            self.send_ack(n, v, r.sector, r.len, r.block_id, |a| {
                if in_sync { Packet::WriteAckInSync(a) } else { Packet::WriteAck(a) }
            });
        }
        if let Some(c) = self.conns.get_mut(&n) {
            c.buffered = c.buffered.saturating_sub(u64::from(r.len));
            if let Ok(i) = c.unacked.binary_search_by_key(&id, |u| u.id)
                && let Some(u) = c.unacked.get_mut(i)
            {
                u.done = true;
            }
            if let Some(e) = c.received_epochs.front_mut() {
                e.unfinished = e.unfinished.saturating_sub(1);
            }
        }
        if result.is_err() {
            self.disk_error(v, false);
        }
        self.oldest_epoch(n);
        self.apply_out_of_sync(n);
        self.todo(Todo::KickPeers(v));
        self.todo(Todo::Kick(v));
        if in_sync {
            self.todo(Todo::CheckResyncEnd(n, v));
        }
        self.write_flags_when_idle(v);
    }

    fn orphan_done(&mut self, v: VolumeNr, id: u64, r: &PeerRequest, result: Result<(), IoError>) {
        if let Some(d) = self.devs.get_mut(&v) {
            d.locks.remove(id, r.sector);
            if r.al_held
                && let Some(l) = &mut d.ldev
            {
                l.al.put(Ldev::extents(r.sector, r.len));
            }
        }
        if result.is_err() {
            if let Some(l) = self.ldev(v) {
                l.mark_others(r.sector..r.sector + u64::from(r.len) / SECTOR, NodeMask::EMPTY);
            }
            self.disk_error(v, false);
        }
        self.todo(Todo::KickPeers(v));
        self.todo(Todo::Kick(v));
        self.write_flags_when_idle(v);
        self.reconcile_when_written();
    }

    /// PRIMARY_IND may be dropped once the last replicated write of a gone Primary is done.
    fn write_flags_when_idle(&mut self, v: VolumeNr) {
        if !self.is_primary() && self.st.primary_peers().is_empty() {
            self.write_flags(v);
        }
    }

    pub(crate) fn send_ack(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        sector: u64,
        blksize: u32,
        block_id: u64,
        f: impl FnOnce(BlockAck) -> Packet,
    ) {
        let seq_num = self.next_seq(n, v);
        self.send_control(n, Some(v), f(BlockAck { sector, block_id, blksize, seq_num }));
    }

    // ----- epochs -----

    pub(crate) fn got_barrier(&mut self, n: NodeId, barrier: u32) {
        let Some(c) = self.conns.get_mut(&n) else { return };
        if c.received_epochs.is_empty() {
            c.received_epochs.push_back(ReceivedEpoch::default());
        }
        if let Some(e) = c.received_epochs.back_mut() {
            e.barrier = Some(barrier);
        }
        c.received_epochs.push_back(ReceivedEpoch::default());
        self.oldest_epoch(n);
    }

    /// Finishes the oldest epoch when it is complete, and starts the next.
    fn oldest_epoch(&mut self, n: NodeId) {
        loop {
            let Some(c) = self.conns.get_mut(&n) else { return };
            let Some(e) = c.received_epochs.front_mut() else { return };
            let Some(barrier) = e.barrier else { return };
            if e.unfinished > 0 || e.flushing && e.flushes > 0 {
                return;
            }
            if !e.flushing {
                e.flushing = true;
                let volumes: Vec<VolumeNr> = e.volumes.iter().copied().collect();
                let mut flushes = Vec::new();
                let gone = volumes.iter().any(|v| {
                    self.devs.get(v).is_some_and(|d| d.cfg.disk_flushes)
                        && self.st.disk(*v) < DiskState::Inconsistent
                });
                if gone {
                    // Writes of this epoch went to a disk that can not be flushed any more: the writer must not
                    // take them for stable.
                    let why = "the disk of a replicated epoch is gone before it was flushed";
                    self.drop_link(n, ConnState::BrokenPipe, why);
                    return;
                }
                for v in volumes {
                    let flush = self.devs.get(&v).is_some_and(|d| d.cfg.disk_flushes && d.ldev.is_some());
                    if flush && self.st.disk(v) >= DiskState::Inconsistent {
                        flushes.push(v);
                    }
                }
                let serial = self.id();
                if let Some(e) = self.conns.get_mut(&n).and_then(|c| c.received_epochs.front_mut()) {
                    e.flushes = flushes.len() as u32;
                    e.serial = serial;
                }
                let some = !flushes.is_empty();
                for v in flushes {
                    let id = self.io(v, IoTag::EpochFlush { peer: n, serial });
                    self.emit(Output::DiskFlush { id, vnr: v });
                }
                if some {
                    return;
                }
                continue;
            }
            let set_size = e.count - e.confirmed;
            c.received_epochs.pop_front();
            self.send_control(n, None, Packet::BarrierAck(BarrierAck { barrier, set_size }));
            self.next_epoch(n);
        }
    }

    fn next_epoch(&mut self, n: NodeId) {
        let Some(e) = self.conns.get_mut(&n).and_then(|c| c.received_epochs.front_mut()) else { return };
        let ids: Vec<u64> = e.queued.drain(..).collect();
        for id in ids {
            if let Some(r) = self.peer_requests.get_mut(&id) {
                r.turn = true;
                let v = r.vnr;
                self.todo(Todo::KickPeers(v));
            }
        }
    }

    pub(crate) fn epoch_flushed(&mut self, v: VolumeNr, n: NodeId, serial: u64, ok: bool) {
        if !ok {
            self.disk_error(v, true);
        }
        let Some(e) = self.conns.get_mut(&n).and_then(|c| c.received_epochs.front_mut()) else { return };
        if !e.flushing || e.flushes == 0 || e.serial != serial {
            return;
        }
        e.flushes -= 1;
        e.flush_failed |= !ok;
        if e.flushes > 0 {
            return;
        }
        let ok = !e.flush_failed;
        if e.confirming > 0 {
            self.confirmed_stable(n, ok);
        } else if ok {
            self.oldest_epoch(n);
        } else {
            // What is not known to be stable is never called stable: the writer finds out by the loss.
            self.drop_link(n, ConnState::BrokenPipe, "flush of a replicated epoch failed");
        }
    }

    /// The log has no room for the next write of an open epoch: report what is stable, so that the writer
    /// sends its peer-ack (`spec/wire-protocol.md` §9.5). Only a finished prefix of the epoch can be reported.
    fn confirm_stable(&mut self, n: NodeId) {
        let serial = self.id();
        let unfinished: Vec<u64> =
            self.peer_requests.values().filter(|r| r.peer == n && !r.orphan).map(|r| r.block_id).collect();
        let Some(c) = self.conns.get_mut(&n) else { return };
        if c.received_epochs.len() != 1 {
            return;
        }
        let Some(e) = c.received_epochs.front_mut() else { return };
        if e.flushing || e.barrier.is_some() {
            return;
        }
        let from = e.confirmed as usize;
        let done = e.block_ids.iter().skip(from).take_while(|b| !unfinished.contains(b)).count();
        if done == 0 {
            return;
        }
        let volumes: Vec<VolumeNr> = e.volumes.iter().copied().collect();
        e.flushing = true;
        e.confirming = done as u32;
        e.serial = serial;
        e.flushes = volumes.len() as u32;
        for v in volumes {
            let id = self.io(v, IoTag::EpochFlush { peer: n, serial });
            self.emit(Output::DiskFlush { id, vnr: v });
        }
    }

    fn confirmed_stable(&mut self, n: NodeId, ok: bool) {
        let Some(e) = self.conns.get_mut(&n).and_then(|c| c.received_epochs.front_mut()) else { return };
        e.flushing = false;
        let set_size = std::mem::take(&mut e.confirming);
        let (from, to) = (e.confirmed as usize, (e.confirmed + set_size) as usize);
        let youngest = to.checked_sub(1).and_then(|i| e.block_ids.get(i).copied());
        if let (true, Some(oldest_block_id), Some(youngest_block_id)) =
            (ok, e.block_ids.get(from).copied(), youngest)
        {
            e.confirmed += set_size;
            let p = ConfirmStable { oldest_block_id, youngest_block_id, set_size };
            self.send_control(n, None, Packet::ConfirmStable(p));
        }
        self.oldest_epoch(n);
    }

    // ----- peer-acks -----

    pub(crate) fn got_peer_ack(&mut self, n: NodeId, mask: NodeMask, dagtag: u64) {
        let Some(c) = self.conns.get_mut(&n) else { return };
        if !c.unacked.iter().any(|u| u.dagtag == dagtag) {
            self.drop_link(n, ConnState::ProtocolError, "P_PEER_ACK for no pending write");
            return;
        }
        let mut acked = Vec::new();
        while c.unacked.front().is_some_and(|u| u.dagtag <= dagtag) {
            if let Some(u) = c.unacked.pop_front() {
                acked.push(u);
            }
        }
        for u in acked {
            self.peer_acked(n, mask, &u);
        }
        self.todo.extend(self.devs.keys().map(|v| Todo::KickPeers(*v)));
        for v in self.vnrs() {
            self.write_flags_when_idle(v);
        }
    }

    /// Who has the write, who has not (`spec/wire-protocol.md` §9.9).
    fn peer_acked(&mut self, writer: NodeId, mask: NodeMask, u: &Unacked) {
        let range = u.sector..u.sector + u64::from(u.len) / SECTOR;
        let (me, v) = (self.me, u.vnr);
        if let Some(l) = self.ldev(v) {
            let mut covered = Vec::new();
            for x in NodeId::all().filter(|x| *x != me) {
                let Some(s) = l.slot(x) else { continue };
                covered.push(s);
                if !mask.has(x) {
                    l.bitmap.set_out_of_sync(s, range.clone());
                } else if x != writer && mask.has(me) {
                    l.bitmap.set_in_sync(s, range.clone());
                }
            }
            for s in (0..l.bitmap.slots()).filter(|s| !covered.contains(s)) {
                l.bitmap.set_out_of_sync(s, range.clone());
            }
            if u.al {
                l.al.put(Ldev::extents(u.sector, u.len));
            }
        }
        let sources: Vec<NodeId> = self
            .st
            .peers_of(v)
            .filter(|(x, p)| {
                !mask.has(*x)
                    && *x != writer
                    && matches!(p.repl, ReplState::SyncSource | ReplState::PausedSyncS | ReplState::WFBitMapS)
            })
            .map(|x| x.0)
            .collect();
        for x in sources {
            self.send_data(x, Some(v), Packet::OutOfSync(BlockDesc { sector: u.sector, blksize: u.len }));
        }
    }

    /// The writer is gone: nobody else may have what it had not acknowledged (§9.8).
    pub(crate) fn replica_lost_peer(&mut self, n: NodeId, primary: bool) {
        let Some(c) = self.conns.get_mut(&n) else { return };
        let unacked = std::mem::take(&mut c.unacked);
        c.received_epochs.clear();
        let oos = std::mem::take(&mut c.oos_after);
        if primary {
            self.lost_primary = Some(LostPosition {
                node: n,
                dagtag: self.conns.get(&n).map_or(0, |c| c.rx_dagtag),
                generations: self.devs.iter().map(|(v, d)| (*v, d.current_uuid())).collect(),
            });
        }
        for u in unacked {
            let range = u.sector..u.sector + u64::from(u.len) / SECTOR;
            if let Some(l) = self.ldev(u.vnr) {
                l.mark_others(range, n.mask());
                if u.al && u.done {
                    l.al.put(Ldev::extents(u.sector, u.len));
                }
            }
        }
        for (_, v, sector, len) in oos {
            self.mark_out_of_sync(n, v, sector, len);
        }
        // Writes which were received but not started are still applied: they belong to the stream up to the position
        // this node reports for the lost writer.
        for r in self.peer_requests.values_mut().filter(|r| r.peer == n) {
            r.turn = true;
            r.orphan = true;
        }
        for v in self.vnrs() {
            self.todo(Todo::KickPeers(v));
            self.write_bitmap(v);
        }
    }

    /// P_OUT_OF_SYNC: after all writes received before it.
    fn got_out_of_sync(&mut self, n: NodeId, v: VolumeNr, sector: u64, len: u32) {
        if !self.inside(v, sector, len) {
            self.drop_link(n, ConnState::ProtocolError, "P_OUT_OF_SYNC outside of the device");
            return;
        }
        let newest = self
            .peer_requests
            .iter()
            .filter(|(_, r)| r.peer == n && r.vnr == v && !r.orphan)
            .map(|(id, _)| *id)
            .max();
        match newest {
            Some(id) => {
                if let Some(c) = self.conns.get_mut(&n) {
                    c.oos_after.push_back((id, v, sector, len));
                }
            }
            None => self.mark_out_of_sync(n, v, sector, len),
        }
    }

    fn apply_out_of_sync(&mut self, n: NodeId) {
        loop {
            let Some(c) = self.conns.get_mut(&n) else { return };
            let Some((id, v, sector, len)) = c.oos_after.front().copied() else { return };
            let busy =
                self.peer_requests.iter().any(|(x, r)| *x <= id && r.peer == n && r.vnr == v && !r.orphan);
            if busy {
                return;
            }
            c.oos_after.pop_front();
            self.mark_out_of_sync(n, v, sector, len);
        }
    }

    fn mark_out_of_sync(&mut self, n: NodeId, v: VolumeNr, sector: u64, len: u32) {
        if let Some(l) = self.ldev(v)
            && let Some(s) = l.slot(n)
        {
            let set = l.bitmap.set_out_of_sync(s, sector..sector + u64::from(len) / SECTOR);
            if set > 0 {
                self.resync_more(n, v, sector);
                self.write_bitmap(v);
            }
        }
    }

    /// The local disk failed (`spec/state-machine.md` §13.1).
    pub(crate) fn disk_error(&mut self, v: VolumeNr, metadata: bool) {
        use crate::config::OnIoError;
        let Some(d) = self.devs.get(&v) else { return };
        let policy = d.cfg.on_io_error;
        if self.st.disk(v) <= DiskState::Failed {
            return;
        }
        let scope = self.scope(None, Some(v));
        if !metadata && policy == OnIoError::PassOn {
            self.log(LogLevel::Error, scope, "IO error on the backing device, passed on");
            self.force("io-error", |s| {
                if let Some(d) = s.devs.get_mut(&v)
                    && d.disk > DiskState::Inconsistent
                {
                    d.disk = DiskState::Inconsistent;
                }
            });
            return;
        }
        self.log(LogLevel::Error, scope, "IO error on the backing device, detaching");
        if policy == OnIoError::CallLocalIoError {
            let call = crate::io::HandlerCall {
                name: "local-io-error",
                vnr: Some(v),
                peer: None,
                cstate: None,
                up_to_date_nodes: None,
            };
            self.run_handler(call, crate::core::AfterHandler::Nothing);
        }
        self.force("io-error", |s| {
            if let Some(d) = s.devs.get_mut(&v) {
                d.disk = DiskState::Failed;
            }
        });
    }
}
