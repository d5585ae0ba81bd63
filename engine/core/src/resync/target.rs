//! The target: what to ask for next, and what becomes of the answers (`spec/state-machine.md` §11.3 to §11.5).
//!
//! A block counts as in sync only when its data is written here; it must never be asked for without its range held.

use super::{Ending, TURN, TargetPhase, TargetRequest};
use crate::core::{Core, IoTag, Todo};
use crate::intervals::Holder;
use crate::io::{Event, IoError, Output};
use crate::tables::rate::Turn;
use crate::types::{BIO_SIZE_MAX, NodeId, SECTOR, Time, VolumeNr};
use bytes::Bytes;
use palisade_wire::enums::{ConnState, ReplState};
use palisade_wire::{BlockDesc, BlockReq, DagtagReq, Data, Features, Packet};

impl Core {
    pub(crate) fn resync_deadline(&self) -> Option<Time> {
        let running = self.pds.iter().any(|((n, v), _)| self.st.repl(*n, *v) == ReplState::SyncTarget);
        if running { self.resync_timer } else { None }
    }

    pub(crate) fn resync_timers(&mut self) {
        let Some(t) = self.resync_timer else { return };
        if self.now < t {
            return;
        }
        let targets: Vec<(NodeId, VolumeNr)> =
            self.pds.keys().copied().filter(|(n, v)| self.st.repl(*n, *v) == ReplState::SyncTarget).collect();
        if targets.is_empty() {
            self.resync_timer = None;
            return;
        }
        self.resync_timer = Some(self.now + TURN);
        for (n, v) in targets {
            self.resync_turn(n, v);
        }
    }

    fn resync_turn(&mut self, n: NodeId, v: VolumeNr) {
        let now = self.now;
        let max_buffers = self.conns.get(&n).map_or(2048, |c| c.net.max_buffers);
        let Some(p) = self.pds.get_mut(&(n, v)) else { return };
        let Some(t) = &mut p.target else { return };
        let turn = Turn {
            elapsed_ms: now.since(t.last_turn).as_millis() as u64,
            sectors_in: t.sectors_in,
            in_flight: t.in_flight,
            max_buffers,
            block_sectors: 8,
        };
        t.last_turn = now;
        t.sectors_in = 0;
        let quota = t.rate.turn(&p.cfg.rate, &turn);
        self.ask(n, v, quota);
        self.event(Event::PeerDevice(n, v));
        self.todo(Todo::CheckResyncEnd(n, v));
    }

    /// Keeps requests on their way between the turns, unless the application needs the disk and `c-min-rate` says
    /// that it comes first.
    fn refill(&mut self, n: NodeId, v: VolumeNr) {
        let active = self.devs.get(&v).and_then(|d| d.ldev.as_ref()).is_some_and(|l| l.al.is_in_use());
        let max_buffers = self.conns.get(&n).map_or(2048, |c| c.net.max_buffers);
        if self.st.repl(n, v) != ReplState::SyncTarget {
            return;
        }
        let Some(p) = self.pds.get(&(n, v)) else { return };
        let Some(t) = &p.target else { return };
        if active && p.cfg.rate.min_rate != 0 {
            return;
        }
        let quota = t.rate.refill(&p.cfg.rate, t.in_flight, max_buffers);
        let asked = self.ask(n, v, quota);
        if let Some(t) = self.pds.get_mut(&(n, v)).and_then(|p| p.target.as_mut()) {
            t.rate.refilled(asked);
        }
    }

    /// Sends requests for up to so many sectors, the last one as large as it comes. Returns the sectors asked for.
    fn ask(&mut self, n: NodeId, v: VolumeNr, quota: u64) -> u64 {
        let (node, dagtag) = self.position();
        let dagtags = self.conns.get(&n).is_some_and(|c| c.features.contains(Features::RESYNC_DAGTAG));
        if self.peer_requests.values().any(|r| r.orphan) {
            return 0;
        }
        let mut asked = 0;
        let mut skipped = 0;
        while asked < quota {
            let Some((start, end)) = self.next_dirty(n, v) else { break };
            let len = ((end - start) * SECTOR) as u32;
            let Some(d) = self.devs.get_mut(&v) else { return asked };
            let busy = d.locks.overlapping(start, end).any(|_| true);
            if busy {
                // Its bits stay; the next round over the bitmap finds it again.
                skipped += 1;
                if skipped > 1024 {
                    break;
                }
                continue;
            }
            let id = self.id();
            if let Some(d) = self.devs.get_mut(&v) {
                d.locks.insert(id, start, end, Holder::ResyncAsked(n));
            }
            if let Some(t) = self.pds.get_mut(&(n, v)).and_then(|p| p.target.as_mut()) {
                t.pending.insert(id, TargetRequest { sector: start, len, phase: TargetPhase::Asked });
                t.in_flight += end - start;
            }
            asked += end - start;
            let packet = if dagtags {
                Packet::RsDagtagReq(DagtagReq {
                    sector: start,
                    block_id: id,
                    blksize: len,
                    dagtag_node_id: node.get().into(),
                    dagtag,
                })
            } else {
                Packet::RsDataRequest(BlockReq { sector: start, block_id: id, blksize: len })
            };
            self.send_data(n, Some(v), packet);
        }
        asked
    }

    /// The position in the Primary's stream (`spec/wire-protocol.md` §10.4).
    fn position(&self) -> (NodeId, u64) {
        if self.is_primary() {
            return (self.me, self.dagtag);
        }
        let primary = self.st.primary_peers().iter().next();
        primary
            .and_then(|p| self.conns.get(&p).map(|c| (p, c.rx_dagtag)))
            .or_else(|| NodeId::new(0).map(|z| (z, 0)))
            .unwrap_or((self.me, 0))
    }

    /// The next run of dirty blocks behind the cursor, at most 1 MiB, aligned to its size class.
    fn next_dirty(&mut self, n: NodeId, v: VolumeNr) -> Option<(u64, u64)> {
        let l = self.devs.get(&v)?.ldev.as_ref()?;
        let slot = l.slot(n)?;
        let t = self.pds.get_mut(&(n, v))?.target.as_mut()?;
        let per_bit = l.bitmap.sectors_per_bit();
        let max_bits = (u64::from(BIO_SIZE_MAX) / SECTOR / per_bit).max(1);
        let first = match l.bitmap.next_set(slot, t.cursor) {
            Some(b) => b,
            None => {
                if t.pending.is_empty() && t.cursor > 0 {
                    t.cursor = 0;
                    l.bitmap.next_set(slot, 0)?
                } else {
                    return None;
                }
            }
        };
        let run_end = l.bitmap.next_clear(slot, first).unwrap_or(l.bitmap.bits());
        let boundary = (first / max_bits + 1) * max_bits;
        let last = run_end.min(boundary);
        t.cursor = last;
        let r = l.bitmap.sectors_of_bits(first..last);
        Some((r.start, r.end))
    }

    /// Out-of-sync notes of a source name new work behind the cursor.
    pub(crate) fn resync_more(&mut self, n: NodeId, v: VolumeNr, sector: u64) {
        let per_bit =
            self.devs.get(&v).and_then(|d| d.ldev.as_ref()).map_or(8, |l| l.bitmap.sectors_per_bit());
        if let Some(t) = self.pds.get_mut(&(n, v)).and_then(|p| p.target.as_mut()) {
            t.cursor = t.cursor.min(sector / per_bit);
            t.ending = Ending::No;
        }
    }

    pub(super) fn got_resync_data(&mut self, n: NodeId, v: VolumeNr, d: &Data, data: Bytes) {
        let Some(t) = self.pds.get_mut(&(n, v)).and_then(|p| p.target.as_mut()) else {
            // Of a resync that was stopped here; the source must get its acknowledgement all the same.
            self.send_ack(n, v, d.sector, data.len() as u32, d.block_id, Packet::RsNegAck);
            return;
        };
        let ok = t.pending.get(&d.block_id).is_some_and(|r| {
            r.sector == d.sector && r.len as usize == data.len() && r.phase == TargetPhase::Asked
        });
        if !ok {
            self.drop_link(n, ConnState::ProtocolError, "resync data that matches no request");
            return;
        }
        t.sectors_in += data.len() as u64 / SECTOR;
        if let Some(r) = t.pending.get_mut(&d.block_id) {
            r.phase = TargetPhase::Received(data);
        }
        if let Some(dev) = self.devs.get_mut(&v) {
            let end = d.sector
                + u64::from(
                    self.pds
                        .get(&(n, v))
                        .and_then(|p| p.target.as_ref())
                        .and_then(|t| t.pending.get(&d.block_id))
                        .map_or(0, |r| r.len),
                ) / SECTOR;
            dev.locks.remove(d.block_id, d.sector);
            // From here on nobody else starts in this range.
            dev.locks.insert(d.block_id, d.sector, end, Holder::ResyncWrite);
        }
        self.write_resync_data(n, v);
    }

    /// Writes answers whose range has no other I/O in progress.
    pub(crate) fn write_resync_data(&mut self, n: NodeId, v: VolumeNr) {
        let ready: Vec<u64> = {
            let (Some(t), Some(d)) =
                (self.pds.get(&(n, v)).and_then(|p| p.target.as_ref()), self.devs.get(&v))
            else {
                return;
            };
            t.pending
                .iter()
                .filter(|(id, r)| {
                    let end = r.sector + u64::from(r.len) / SECTOR;
                    matches!(r.phase, TargetPhase::Received(_))
                        && d.locks.overlapping(r.sector, end).all(|(k, _)| k == **id)
                })
                .map(|(id, _)| *id)
                .collect()
        };
        for id in ready {
            let Some(r) = self
                .pds
                .get_mut(&(n, v))
                .and_then(|p| p.target.as_mut())
                .and_then(|t| t.pending.get_mut(&id))
            else {
                continue;
            };
            let TargetPhase::Received(data) = std::mem::replace(&mut r.phase, TargetPhase::Writing) else {
                continue;
            };
            let sector = r.sector;
            let io = self.io(v, IoTag::ResyncTargetWrite { peer: n, id });
            self.emit(Output::DiskWrite { id: io, vnr: v, sector, data, fua: false });
        }
    }

    pub(crate) fn target_write_done(&mut self, v: VolumeNr, n: NodeId, id: u64, result: Result<(), IoError>) {
        let Some(r) =
            self.pds.get_mut(&(n, v)).and_then(|p| p.target.as_mut()).and_then(|t| t.pending.remove(&id))
        else {
            // The resync was stopped while the write was on its way; its bits are still set.
            if let Some(d) = self.devs.get_mut(&v)
                && let Some(sector) = d.stopped_writes.remove(&id)
            {
                d.locks.remove(id, sector);
            }
            self.todo(Todo::Kick(v));
            self.todo(Todo::KickPeers(v));
            return;
        };
        let range = r.sector..r.sector + u64::from(r.len) / SECTOR;
        if let Some(d) = self.devs.get_mut(&v) {
            d.locks.remove(id, r.sector);
            d.written_sectors += range.end - range.start;
        }
        let Some(t) = self.pds.get_mut(&(n, v)).and_then(|p| p.target.as_mut()) else { return };
        t.in_flight = t.in_flight.saturating_sub(range.end - range.start);
        if t.unstable
            && let Some(d) = self.devs.get_mut(&v)
        {
            d.stable_resync = false;
        }
        let Some(t) = self.pds.get_mut(&(n, v)).and_then(|p| p.target.as_mut()) else { return };
        if result.is_err() {
            t.failed = true;
            self.send_ack(n, v, r.sector, r.len, id, Packet::RsNegAck);
            self.disk_error(v, false);
            return;
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.resync_done_sectors += range.end - range.start;
            p.received += range.end - range.start;
        }
        self.now_in_sync_with(n, v, range.clone(), true);
        self.send_ack(n, v, r.sector, r.len, id, Packet::RsWriteAck);
        self.area_finished(n, v, range);
        self.todo(Todo::CheckResyncEnd(n, v));
        self.todo(Todo::Kick(v));
        self.todo(Todo::KickPeers(v));
        self.serve_waiting(v);
        self.winding_down(n, v);
        self.refill(n, v);
    }

    /// A paused target has nothing out any more: another may run now.
    fn winding_down(&mut self, n: NodeId, v: VolumeNr) {
        let idle =
            self.pds.get(&(n, v)).and_then(|p| p.target.as_ref()).is_some_and(|t| t.pending.is_empty());
        if idle && self.st.repl(n, v) == ReplState::PausedSyncT {
            self.recalc("resync-idle");
        }
    }

    /// A block is equal to the partner's now; whether others have it is for P_PEERS_IN_SYNC to say.
    pub(super) fn now_in_sync_with(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        range: std::ops::Range<u64>,
        wrote: bool,
    ) {
        let Some(l) = self.devs.get_mut(&v).and_then(|d| d.ldev.as_mut()) else { return };
        let mut news = Vec::new();
        if wrote {
            // Those who wait for this node to resync them have its bitmap of before.
            for (m, p) in self.st.peers_of(v) {
                if m != n
                    && matches!(p.repl, ReplState::SyncSource | ReplState::PausedSyncS | ReplState::WFBitMapS)
                    && let Some(s) = l.slot(m)
                {
                    // Even where the bit was set: its acknowledgement may only be on the way.
                    l.bitmap.set_out_of_sync(s, range.clone());
                    news.push(m);
                }
            }
            l.mark_others(range.clone(), n.mask());
        }
        if let Some(s) = l.slot(n) {
            l.bitmap.set_in_sync(s, range.clone());
        }
        let blksize = u32::try_from((range.end - range.start) * SECTOR).unwrap_or(u32::MAX);
        for m in news {
            self.send_data(m, Some(v), Packet::OutOfSync(BlockDesc { sector: range.start, blksize }));
        }
    }

    /// P_RS_CANCEL (try again later) or P_NEG_RS_DREPLY (failed).
    pub(super) fn resync_refused(&mut self, n: NodeId, v: VolumeNr, id: u64, failed: bool) {
        let Some(t) = self.pds.get_mut(&(n, v)).and_then(|p| p.target.as_mut()) else { return };
        let Some(r) = t.pending.remove(&id) else { return };
        let sectors = u64::from(r.len) / SECTOR;
        t.in_flight = t.in_flight.saturating_sub(sectors);
        t.failed |= failed;
        if let Some(d) = self.devs.get_mut(&v) {
            d.locks.remove(id, r.sector);
        }
        if failed && let Some(p) = self.pds.get_mut(&(n, v)) {
            p.resync_failed_bits += sectors / 8;
        }
        self.todo(Todo::CheckResyncEnd(n, v));
        self.todo(Todo::KickPeers(v));
        self.winding_down(n, v);
    }

    pub(super) fn got_in_sync(&mut self, n: NodeId, v: VolumeNr, id: u64) {
        let Some(t) = self.pds.get_mut(&(n, v)).and_then(|p| p.target.as_mut()) else { return };
        let Some(r) = t.pending.remove(&id) else { return };
        let range = r.sector..r.sector + u64::from(r.len) / SECTOR;
        t.in_flight = t.in_flight.saturating_sub(range.end - range.start);
        t.sectors_in += range.end - range.start;
        if let Some(d) = self.devs.get_mut(&v) {
            d.locks.remove(id, r.sector);
        }
        self.now_in_sync_with(n, v, range, false);
        self.todo(Todo::CheckResyncEnd(n, v));
        self.winding_down(n, v);
    }
}
