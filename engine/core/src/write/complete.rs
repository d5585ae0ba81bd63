//! The answers of the legs, and the completion to the front end (`spec/state-machine.md` §13, §16).
//!
//! A write is never reported as done unless an UpToDate disk that is still there has it; what is withheld by a freeze
//! stays withheld until the thaw.

use super::{Leg, Payload};
use crate::core::{Core, IoTag, Todo};
use crate::device::Waiting;
use crate::io::{BlockOp, BlockResult, IoError, Output};
use crate::types::{NodeId, NodeMask, SECTOR, VolumeNr};
use bytes::Bytes;
use palisade_wire::BlockAck;
use palisade_wire::enums::{ConnState, DiskState};

impl Core {
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
    pub(super) fn maybe_complete(&mut self, id: u64) {
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
            let v = r.vnr;
            if let Some(d) = self.devs.get_mut(&v) {
                d.unproven.clear();
            }
            BlockResult::Done
        } else {
            BlockResult::IoError
        };
        self.complete(id, result);
    }

    /// Frozen for a reason that decides whether unconfirmed writes may complete.
    pub(crate) fn frozen(&self) -> bool {
        self.st.susp_fen || self.st.susp_quorum || self.st.susp_nod || self.st.susp_uuid
    }

    pub(super) fn complete(&mut self, id: u64, result: BlockResult) {
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
        let everywhere = r.peers.iter().all(|l| l.leg != Leg::Pending);
        if everywhere && let Payload::Data { data, .. } = &mut r.payload {
            // Nobody needs it again; the request itself stays until its epoch is acknowledged.
            *data = Bytes::new();
        }
        if submitted {
            self.completed_in_epoch(epoch, everywhere);
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
        self.completed_in_epoch(epoch, false);
        self.settle_request(id);
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

    /// The local disk could not write (`spec/state-machine.md` §13.1).
    fn local_write_failed(&mut self, v: VolumeNr, sector: u64, len: u32) {
        if let Some(l) = self.ldev(v) {
            l.mark_others(sector..sector + u64::from(len) / SECTOR, NodeMask::EMPTY);
        }
        self.disk_error(v, false);
    }
}
