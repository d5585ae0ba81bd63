//! Resynchronisation: bitmap exchange, target, source, and how it ends
//! (`spec/state-machine.md` §11, `spec/wire-protocol.md` §8, §10).
//!
//! The target asks, the source answers. A request holds its range at the target from the asking on against writes of
//! *other* nodes, from the answer on against everybody; at the source from the read until the target's
//! acknowledgement. Each request names the position in the Primary's write stream the target had reached, and the
//! source answers only when it is as far: so resync data is never older than what it replaces.

use crate::core::{AfterHandler, Core, IoTag, Todo};
use crate::intervals::Holder;
use crate::io::{Event, HandlerCall, IoError, LogLevel, Output, Stream};
use crate::state::State;
use crate::tables::rate::{RateController, Turn};
use crate::tables::uuid::{TargetFinished, same};
use crate::types::{AL_EXTENT_SHIFT, BIO_SIZE_MAX, NodeId, NodeMask, SECTOR, Time, VolumeNr};
use bytes::Bytes;
use palisade_metadata::PeerFlags;
use palisade_wire::bitmap::{Progress, Receiver, Sender};
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role};
use palisade_wire::{
    BlockDesc, BlockReq, DagtagReq, Data, Features, FlushAck, FlushForward, FlushRequests, HeaderKind,
    Packet, PeerDagtag, PeersInSync, UuidFlags,
};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Turns of the rate controller.
const TURN: Duration = Duration::from_millis(100);
/// Sectors in an activity-log extent, the step of P_PEERS_IN_SYNC.
const STEP: u64 = 1 << AL_EXTENT_SHIFT;

/// How far a request of the target got.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum TargetPhase {
    Asked,
    /// Answered; waits for I/O in progress in its range.
    Received(Bytes),
    Writing,
}

/// A request of the target.
#[derive(Debug)]
pub(crate) struct TargetRequest {
    pub sector: u64,
    pub len: u32,
    pub phase: TargetPhase,
}

/// How far the end of a resync got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ending {
    No,
    /// A ping is out: a dead source must be noticed first.
    Ping,
    /// The own disk is being flushed.
    Flush,
}

/// A resync as target.
#[derive(Debug)]
pub(crate) struct TargetState {
    pub start_uuid: u64,
    /// Tells this resync's flush from an earlier one's.
    pub start_serial: u64,
    pub unstable: bool,
    pub cursor: u64,
    pub pending: BTreeMap<u64, TargetRequest>,
    pub in_flight: u64,
    pub sectors_in: u64,
    pub last_turn: Time,
    pub rate: RateController,
    pub failed: bool,
    pub ending: Ending,
    /// P_FLUSH_REQUESTS_ACKs that are awaited: (from, primary).
    pub flush_wait: BTreeSet<(NodeId, NodeId)>,
    pub flush_sequence: u64,
}

impl TargetState {
    fn new(now: Time) -> Self {
        Self {
            start_uuid: 0,
            start_serial: 0,
            unstable: false,
            cursor: 0,
            pending: BTreeMap::new(),
            in_flight: 0,
            sectors_in: 0,
            last_turn: now - TURN,
            rate: RateController::new(),
            failed: false,
            ending: Ending::No,
            flush_wait: BTreeSet::new(),
            flush_sequence: 0,
        }
    }
}

/// How far a request at the source got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SourcePhase {
    /// Waits for the start of the resync, the Primary's stream, or writes in its range.
    Waiting,
    Reading,
    /// Answered; the range is held until the acknowledgement.
    Answered,
}

/// A request at the source.
#[derive(Debug)]
pub(crate) struct SourceRequest {
    pub sector: u64,
    pub len: u32,
    pub node: NodeId,
    pub dagtag: u64,
    pub phase: SourcePhase,
    pub lock: u64,
}

impl Core {
    // ----- bitmap exchange -----

    pub(crate) fn begin_exchange(&mut self, n: NodeId, v: VolumeNr) {
        let bits = self.devs.get(&v).and_then(|d| d.ldev.as_ref()).map_or(0, |l| l.bitmap.bits());
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.target_done = None;
            p.bitmap.packets = 0;
            p.bitmap.sent = false;
            p.bitmap.received = false;
            p.bitmap.receiver = Some(Receiver::new(bits, HeaderKind::H100));
        }
    }

    pub(crate) fn send_bitmap(&mut self, n: NodeId, v: VolumeNr) {
        let rle = self.conns.get(&n).is_some_and(|c| c.net.use_rle);
        let Some(l) = self.devs.get(&v).and_then(|d| d.ldev.as_ref()) else { return };
        let Some(slot) = l.slot(n) else { return };
        let bits = l.bitmap.bits();
        let mut sender = Sender::new(bits, HeaderKind::H100, rle);
        let mut packets = Vec::new();
        loop {
            let run_at = |bit: u64| {
                if l.bitmap.test(slot, bit) {
                    (true, l.bitmap.next_clear(slot, bit).unwrap_or(bits).max(bit + 1) - bit)
                } else {
                    (false, l.bitmap.next_set(slot, bit).unwrap_or(bits).max(bit + 1) - bit)
                }
            };
            let words = l.bitmap.words(slot);
            let word_at = |i: u64| usize::try_from(i).ok().and_then(|i| words.get(i)).copied().unwrap_or(0);
            match sender.next_packet(run_at, word_at) {
                Some(p) => packets.push(p),
                None => break,
            }
        }
        for (packet, data) in packets {
            self.send(n, Stream::Data, Some(v.0), packet, Bytes::new(), data);
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.bitmap.sent = true;
        }
    }

    pub(crate) fn got_plain_bitmap(&mut self, n: NodeId, v: VolumeNr, data: &Bytes) {
        self.got_bitmap(n, v, |r, l, slot| {
            let mut words = Vec::new();
            let done = r.plain(data, |i, w| words.push((i, w)))?;
            for (i, w) in words {
                l.or_words(slot, usize::try_from(i).unwrap_or(usize::MAX), &[w]);
            }
            Ok(done)
        });
    }

    pub(crate) fn got_compressed_bitmap(&mut self, n: NodeId, v: VolumeNr, encoding: u8, data: &Bytes) {
        self.got_bitmap(n, v, |r, l, slot| {
            r.compressed(encoding, data, |first, count| {
                l.set_range(slot, first..first + count);
            })
        });
    }

    fn got_bitmap(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        take: impl FnOnce(
            &mut Receiver,
            &mut palisade_metadata::Bitmap,
            usize,
        ) -> Result<Progress, palisade_wire::bitmap::BitmapError>,
    ) {
        use ReplState as R;
        if !matches!(self.st.repl(n, v), R::WFBitMapS | R::WFBitMapT) {
            self.drop_link(n, ConnState::ProtocolError, "unexpected bitmap");
            return;
        }
        let (Some(p), Some(l)) =
            (self.pds.get_mut(&(n, v)), self.devs.get_mut(&v).and_then(|d| d.ldev.as_mut()))
        else {
            return;
        };
        p.bitmap.packets += 1;
        let (Some(r), Some(slot)) = (&mut p.bitmap.receiver, l.slot(n)) else { return };
        match take(r, &mut l.bitmap, slot) {
            Ok(Progress::More) => {}
            Ok(Progress::Done) => {
                p.bitmap.received = true;
                p.bitmap.receiver = None;
                if !p.bitmap.sent {
                    self.send_bitmap(n, v);
                }
                self.write_bitmap(v);
                self.todo(Todo::BitmapDone(n, v));
            }
            Err(e) => {
                let text = format!("bad bitmap: {e}");
                self.drop_link(n, ConnState::ProtocolError, &text);
            }
        }
    }

    /// Both bitmaps are merged: the handlers may still object.
    pub(crate) fn bitmap_done(&mut self, n: NodeId, v: VolumeNr) {
        let source = match self.st.repl(n, v) {
            ReplState::WFBitMapS => true,
            ReplState::WFBitMapT => false,
            _ => return,
        };
        let call = HandlerCall {
            name: if source { "before-resync-source" } else { "before-resync-target" },
            vnr: Some(v),
            peer: Some(n),
            cstate: Some(ConnState::Connected.name()),
            up_to_date_nodes: None,
        };
        self.run_handler(call, AfterHandler::BeforeResync { peer: n, vnr: v, source });
    }

    pub(crate) fn handler_done(&mut self, id: crate::io::HandlerId, exit: Option<i32>) {
        match self.handlers.remove(&id.0) {
            Some(AfterHandler::BeforeResync { peer, vnr, source }) => {
                let objects = exit.is_none_or(|e| e > 0 && !(source && e == 3));
                if objects {
                    let scope = self.scope(Some(peer), Some(vnr));
                    let text = format!("before-resync handler returned {exit:?}, dropping connection.");
                    self.log(LogLevel::Error, scope, text);
                    self.disconnect_now(peer);
                    return;
                }
                let (from, to) = if source {
                    (ReplState::WFBitMapS, ReplState::SyncSource)
                } else {
                    (ReplState::WFBitMapT, ReplState::SyncTarget)
                };
                if self.st.repl(peer, vnr) == from {
                    self.force("receive-bitmap", |s| {
                        if let Some(p) = s.pds.get_mut(&(peer, vnr)) {
                            p.repl = to;
                        }
                    });
                }
            }
            Some(AfterHandler::Nothing) | None => {}
        }
    }

    // ----- start -----

    /// Full resync being prepared: all bits (`spec/state-machine.md` §12.3).
    pub(crate) fn starting_sync(&mut self, n: NodeId, v: VolumeNr, target: bool) {
        self.set_all_bits(v, (!target).then_some(n));
        let to = if target { ReplState::WFBitMapT } else { ReplState::WFBitMapS };
        self.force("start-sync", |s| {
            if let Some(p) = s.pds.get_mut(&(n, v)) {
                p.repl = to;
            }
        });
    }

    /// Sets all bits of one slot or of all, crash-safe: FULL_SYNC stays in the superblock until the bitmap is on disk.
    pub(crate) fn set_all_bits(&mut self, v: VolumeNr, only: Option<NodeId>) {
        let me = self.me;
        let Some(l) = self.ldev(v) else { return };
        for n in NodeId::all().filter(|n| *n != me && only.is_none_or(|o| o == *n)) {
            if let Some(s) = l.slot(n) {
                l.bitmap.set_all(s);
                l.sb.peers[n.idx()].flags.set(PeerFlags::FULL_SYNC, true);
                l.meta.full_sync = true;
            }
        }
        self.superblock_changed(v);
        self.write_bitmap(v);
    }

    pub(crate) fn resync_target_starts(&mut self, n: NodeId, v: VolumeNr) {
        let source_slot =
            self.pds.get(&(n, v)).and_then(|p| p.uuids.as_ref()).map_or(0, |u| u.set.bitmap[self.me.idx()]);
        let Some(mut set) = self.uuid_set(v) else { return };
        let start = set.resync_starting_target(source_slot);
        self.store_uuids(v, &set);
        let now = self.now;
        let serial = self.id();
        let unstable = self.source_unstable(n, v);
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            let mut t = TargetState::new(now);
            t.start_uuid = start;
            t.start_serial = serial;
            t.unstable = unstable;
            p.target = Some(t);
        }
    }

    /// The source may itself be behind a Primary this node does not get data from (§11.9).
    fn source_unstable(&self, n: NodeId, v: VolumeNr) -> bool {
        let Some(u) = self.pds.get(&(n, v)).and_then(|p| p.uuids.as_ref()) else { return true };
        if u.flags.contains(UuidFlags::STABLE) {
            return false;
        }
        let authoritative = NodeMask(u.node_mask);
        !authoritative.has(self.me) && self.st.primary_peers().is_empty()
    }

    /// SyncSource/SyncTarget (or paused) was entered.
    pub(crate) fn resync_running(&mut self, n: NodeId, v: VolumeNr, target: bool) {
        let now = self.now;
        let bits = self
            .devs
            .get(&v)
            .and_then(|d| d.ldev.as_ref())
            .and_then(|l| l.slot(n).map(|s| l.bitmap.weight(s)))
            .unwrap_or(0);
        let Some(p) = self.pds.get_mut(&(n, v)) else { return };
        let fresh =
            if target { p.target.as_ref().is_none_or(|t| t.flush_sequence == 0) } else { !p.resyncing };
        p.resyncing = true;
        if target && p.target.is_none() {
            p.target = Some(TargetState::new(now));
        }
        if fresh {
            p.resync_total_bits = bits;
            p.resync_start = now;
            p.resync_done_sectors = 0;
            let role = if target { "SyncTarget" } else { "SyncSource" };
            let scope = self.scope(Some(n), Some(v));
            self.log(
                LogLevel::Info,
                scope,
                format!("Began resync as {role} (will sync {} KB [{bits} bits set]).", bits * 4),
            );
            if target {
                self.request_flushes(n, v);
            }
        }
        self.resync_timer = Some(now);
        if target {
            self.todo(Todo::CheckResyncEnd(n, v));
        } else if let Some(disk) = self.pds.get_mut(&(n, v)).and_then(|p| p.target_done.take()) {
            self.force("peer-state", |s| {
                if let Some(p) = s.pds.get_mut(&(n, v)) {
                    p.repl = ReplState::Established;
                    p.pdsk = disk;
                }
            });
            self.source_finished(n, v);
        } else if self.st.repl(n, v) == ReplState::PausedSyncS {
            self.cancel_requests(n, v, false);
        } else {
            self.serve_waiting(v);
        }
        self.event(Event::PeerDevice(n, v));
    }

    /// The resync ended or was aborted.
    pub(crate) fn resync_stopped(&mut self, n: NodeId, v: VolumeNr) {
        let Some(p) = self.pds.get_mut(&(n, v)) else { return };
        p.resyncing = false;
        let target = p.target.take();
        let (start, bytes) = (p.resync_start, p.resync_done_sectors * SECTOR);
        self.cancel_requests(n, v, true);
        let source = self.pds.get_mut(&(n, v)).map(|p| std::mem::take(&mut p.source)).unwrap_or_default();
        if let Some(d) = self.devs.get_mut(&v) {
            for (id, r) in target.into_iter().flat_map(|t| t.pending) {
                release(d, id, &r);
            }
            for r in source.values() {
                d.locks.remove(r.lock, r.sector);
            }
        }
        let ms = self.now.since(start).as_millis().max(1) as u64;
        let scope = self.scope(Some(n), Some(v));
        self.log(
            LogLevel::Info,
            scope,
            format!(
                "Resync done or stopped (total {} sec; {} KB; {} K/sec)",
                ms / 1000,
                bytes / 1024,
                bytes / 1024 * 1000 / ms
            ),
        );
        self.write_bitmap(v);
        self.todo(Todo::Kick(v));
        self.todo(Todo::KickPeers(v));
        self.event(Event::PeerDevice(n, v));
        self.recalc("resync-stopped");
    }

    /// Ranges held for a peer whose link is gone.
    pub(crate) fn drop_resync_locks(&mut self, n: NodeId) {
        for v in self.vnrs() {
            if let Some(p) = self.pds.get_mut(&(n, v)) {
                p.resyncing = false;
                let target = p.target.take();
                let source = std::mem::take(&mut p.source);
                if let Some(d) = self.devs.get_mut(&v) {
                    for (id, r) in target.into_iter().flat_map(|t| t.pending) {
                        release(d, id, &r);
                    }
                    for r in source.values() {
                        d.locks.remove(r.lock, r.sector);
                    }
                }
            }
            // The lost peer may have been the Primary others wait for.
            self.serve_waiting(v);
        }
        for p in self.pds.values_mut() {
            if let Some(t) = &mut p.target {
                t.flush_wait.retain(|(from, primary)| *from != n && *primary != n);
            }
        }
    }

    // ----- target -----

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

    /// Sends requests for up to so many sectors.
    fn ask(&mut self, n: NodeId, v: VolumeNr, quota: u64) {
        let (node, dagtag) = self.position();
        let dagtags = self.conns.get(&n).is_some_and(|c| c.features.contains(Features::RESYNC_DAGTAG));
        if self.peer_requests.values().any(|r| r.orphan) {
            return;
        }
        let mut asked = 0;
        let mut skipped = 0;
        while asked < quota {
            let Some((start, end)) = self.next_dirty(n, v) else { break };
            let len = ((end - start) * SECTOR) as u32;
            let Some(d) = self.devs.get_mut(&v) else { return };
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

    /// Packets of resync and verify.
    pub(crate) fn resync_packet(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        packet: &Packet,
        digest: &Bytes,
        data: Bytes,
    ) {
        match *packet {
            Packet::RsDataRequest(r) => {
                let q = DagtagReq {
                    sector: r.sector,
                    block_id: r.block_id,
                    blksize: r.blksize,
                    dagtag_node_id: 0,
                    dagtag: 0,
                };
                self.got_resync_request(n, v, &q);
            }
            Packet::RsDagtagReq(r) | Packet::RsThinDagtagReq(r) => self.got_resync_request(n, v, &r),
            Packet::RsThinReq(r) => {
                let q = DagtagReq {
                    sector: r.sector,
                    block_id: r.block_id,
                    blksize: r.blksize,
                    dagtag_node_id: 0,
                    dagtag: 0,
                };
                self.got_resync_request(n, v, &q);
            }
            Packet::RsDataReply(d) => {
                if self.digest_ok(n, digest, &data) {
                    self.got_resync_data(n, v, &d, data);
                }
            }
            Packet::RsWriteAck(a) => self.got_resync_ack(n, v, a.block_id, a.sector, a.blksize, true),
            Packet::RsNegAck(a) => self.got_resync_ack(n, v, a.block_id, a.sector, a.blksize, false),
            Packet::NegRsDreply(a) => self.resync_refused(n, v, a.block_id, true),
            Packet::RsCancel(a) | Packet::RsCancelAhead(a) => self.resync_refused(n, v, a.block_id, false),
            Packet::RsIsInSync(a) => self.got_in_sync(n, v, a.block_id),
            _ => self.drop_link(
                n,
                ConnState::ProtocolError,
                "packet for a feature that was not agreed or configured",
            ),
        }
    }

    fn got_resync_data(&mut self, n: NodeId, v: VolumeNr, d: &Data, data: Bytes) {
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
    fn now_in_sync_with(&mut self, n: NodeId, v: VolumeNr, range: std::ops::Range<u64>, wrote: bool) {
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
    fn resync_refused(&mut self, n: NodeId, v: VolumeNr, id: u64, failed: bool) {
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

    fn got_in_sync(&mut self, n: NodeId, v: VolumeNr, id: u64) {
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

    /// Whether the resync as target is complete; the steps to its end (§11.6).
    pub(crate) fn check_resync_end(&mut self, n: NodeId, v: VolumeNr) {
        if self.st.repl(n, v) != ReplState::SyncTarget {
            return;
        }
        let left = self
            .devs
            .get(&v)
            .and_then(|d| d.ldev.as_ref())
            .and_then(|l| l.slot(n).map(|s| l.bitmap.weight(s)))
            .unwrap_or(0);
        let st = &self.st;
        let Some(p) = self.pds.get_mut(&(n, v)) else { return };
        let failed_bits = p.resync_failed_bits;
        let Some(t) = &mut p.target else { return };
        // Whoever turned out not to have current data, or not to be Primary, has nothing to flush towards here.
        t.flush_wait.retain(|(from, primary)| {
            st.peer_role(*primary) == Role::Primary
                && st.connected(*from)
                && (from == primary || st.pdsk(*from, v) == DiskState::UpToDate)
        });
        let remaining = if t.failed { left.saturating_sub(failed_bits) } else { left };
        if remaining > 0 || !t.pending.is_empty() || !t.flush_wait.is_empty() {
            // Work came back; and if nothing is out, do not wait for the next turn when the pipe is empty.
            return;
        }
        if t.ending == Ending::No {
            t.ending = Ending::Ping;
            self.ping(n);
        }
    }

    pub(crate) fn resync_ping_answered(&mut self, n: NodeId, v: VolumeNr) {
        let Some(t) = self.pds.get_mut(&(n, v)).and_then(|p| p.target.as_mut()) else { return };
        if t.ending != Ending::Ping {
            return;
        }
        t.ending = Ending::Flush;
        let serial = t.start_serial;
        let id = self.io(v, IoTag::ResyncFlush { peer: n, serial });
        self.emit(Output::DiskFlush { id, vnr: v });
    }

    pub(crate) fn resync_flushed(&mut self, v: VolumeNr, n: NodeId, serial: u64, ok: bool) {
        let left = self
            .devs
            .get(&v)
            .and_then(|d| d.ldev.as_ref())
            .and_then(|l| l.slot(n).map(|s| l.bitmap.weight(s)))
            .unwrap_or(0);
        let Some(p) = self.pds.get_mut(&(n, v)) else { return };
        let failed_bits = p.resync_failed_bits;
        let Some(t) = &mut p.target else { return };
        if t.ending != Ending::Flush || t.start_serial != serial {
            return;
        }
        t.ending = Ending::No;
        if !ok {
            self.disk_error(v, true);
            return;
        }
        let more = if t.failed { left > failed_bits } else { left > 0 };
        if more || !t.pending.is_empty() || self.st.repl(n, v) != ReplState::SyncTarget {
            return;
        }
        self.target_finished(n, v);
    }

    fn target_finished(&mut self, n: NodeId, v: VolumeNr) {
        let Some(p) = self.pds.get(&(n, v)) else { return };
        let Some(t) = &p.target else { return };
        let stable_before = self.devs.get(&v).is_some_and(|d| d.stable_resync);
        // The Primary may have been lost on the way: what the source got from it since is not known here.
        // Nor is it known here what a Primary wrote of which this node got the notes only.
        let noted = self.st.primary_peers().iter().any(|m| {
            m != n
                && self.st.pdsk(m, v) == DiskState::UpToDate
                && self
                    .devs
                    .get(&v)
                    .and_then(|d| d.ldev.as_ref())
                    .is_some_and(|l| l.slot(m).is_some_and(|s| l.bitmap.weight(s) > 0))
        });
        let unstable = (t.unstable && !stable_before) || self.source_unstable(n, v) || noted;
        let (failed, start_uuid) = (t.failed, t.start_uuid);
        let Some(source) = p.uuids.clone() else { return };
        let source_disk = self.st.pdsk(n, v);
        let mut older = 0;
        if !failed && let Some(mut set) = self.uuid_set(v) {
            if unstable {
                set.resync_finished_unstable(self.me.get(), n.get());
            } else {
                let same_generation = self
                    .pds
                    .iter()
                    .filter(|((m, pv), p)| {
                        *pv == v
                            && self.st.connected(*m)
                            && p.uuids.as_ref().is_some_and(|u| {
                                same(u.set.current, source.set.current)
                                    && !u.flags.contains(UuidFlags::SYNC_TARGET)
                            })
                    })
                    .fold(0, |a, ((m, _), _)| a | m.mask().0);
                older = set.resync_finished_target(&TargetFinished {
                    own_id: self.me.get(),
                    primary: self.is_primary(),
                    source: n.get(),
                    source_uuids: &source.set,
                    same_generation,
                    start_uuid,
                    dagtag: self.dagtag,
                });
            }
            self.store_uuids(v, &set);
            if let Some(l) = self.ldev(v)
                && let Some(s) = l.slot(n)
            {
                l.bitmap.clear_all(s);
            }
        }
        if failed {
            let scope = self.scope(Some(n), Some(v));
            self.log(
                LogLevel::Error,
                scope,
                "Resync finished with failed blocks; the disk stays Inconsistent",
            );
        } else if unstable {
            let scope = self.scope(Some(n), Some(v));
            self.log(LogLevel::Warn, scope, "Peer was unstable during resync");
        } else {
            // Before the states, so that nobody compares a new state with old identifiers.
            self.identifiers_first.insert(v);
        }
        let crashed_source = source.flags.contains(UuidFlags::CRASHED_PRIMARY);
        if !failed
            && !unstable
            && crashed_source
            && source_disk < DiskState::UpToDate
            && let Some(d) = self.devs.get_mut(&v)
        {
            d.crashed_primary = true;
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.resync_failed_bits = 0;
            if let Some(u) = p.uuids.as_mut().filter(|_| !failed) {
                u.dirty_bits = 0;
            }
        }
        if let Some(d) = self.devs.get_mut(&v) {
            d.stable_resync |= !failed && !unstable;
        }
        self.force("resync-finished", |s| {
            if let Some(p) = s.pds.get_mut(&(n, v)) {
                p.repl = ReplState::Established;
                if failed {
                    p.pdsk = DiskState::UpToDate;
                }
            }
            if !failed && let Some(d) = s.devs.get_mut(&v) {
                d.disk = if unstable { DiskState::Outdated } else { source_disk.max(DiskState::Outdated) };
            }
            for ((m, pv), p) in &mut s.pds {
                if *pv == v
                    && NodeMask(older).has(*m)
                    && p.pdsk > DiskState::Outdated
                    && p.repl < ReplState::Established
                {
                    p.pdsk = DiskState::Outdated;
                }
                // Other sources of this volume have nothing left to give.
                if *pv == v && *m != n && !failed && !unstable && matches!(p.repl, ReplState::PausedSyncT) {
                    p.repl = ReplState::Established;
                }
            }
        });
        let call = HandlerCall {
            name: "after-resync-target",
            vnr: Some(v),
            peer: Some(n),
            cstate: Some(ConnState::Connected.name()),
            up_to_date_nodes: None,
        };
        self.run_handler(call, AfterHandler::Nothing);
        self.superblock_changed(v);
        self.write_bitmap(v);
    }

    // ----- source -----

    fn got_resync_request(&mut self, n: NodeId, v: VolumeNr, r: &DagtagReq) {
        use ReplState as R;
        let size = self.devs.get(&v).map_or(0, |d| d.size);
        let end = r.sector.checked_add(u64::from(r.blksize) / SECTOR);
        let aligned = u64::from(r.blksize).is_multiple_of(SECTOR);
        if !aligned || end.is_none_or(|e| e > size) || r.blksize == 0 || r.blksize > BIO_SIZE_MAX {
            self.drop_link(n, ConnState::ProtocolError, "resync request outside of the device");
            return;
        }
        let repl = self.st.repl(n, v);
        if !matches!(repl, R::SyncSource | R::WFBitMapS) {
            self.send_ack(n, v, r.sector, r.blksize, r.block_id, Packet::RsCancel);
            return;
        }
        if self.st.disk(v) < DiskState::Outdated {
            self.send_ack(n, v, r.sector, r.blksize, r.block_id, Packet::NegRsDreply);
            return;
        }
        let lock = self.id();
        let node = NodeId::from_u32(r.dagtag_node_id).unwrap_or(self.me);
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            if p.source.len() > 8192 || p.source.contains_key(&r.block_id) {
                self.drop_link(n, ConnState::ProtocolError, "too many or duplicate resync requests");
                return;
            }
            p.source.insert(
                r.block_id,
                SourceRequest {
                    sector: r.sector,
                    len: r.blksize,
                    node,
                    dagtag: r.dagtag,
                    phase: SourcePhase::Waiting,
                    lock,
                },
            );
        }
        self.serve_waiting(v);
    }

    /// The Primary's stream has not reached the position this request depends on.
    fn behind(&self, r: &SourceRequest) -> bool {
        r.dagtag != 0
            && r.node != self.me
            && self.st.connected(r.node)
            && self.conns.get(&r.node).is_some_and(|c| c.rx_dagtag < r.dagtag)
    }

    /// A resync request waits only for writes in this range to end.
    pub(crate) fn resync_waits_for(&self, v: VolumeNr, start: u64, end: u64) -> bool {
        self.pds.iter().any(|((n, pv), p)| {
            *pv == v
                && self.st.repl(*n, v) == ReplState::SyncSource
                && p.source.values().any(|r| {
                    r.phase == SourcePhase::Waiting
                        && r.sector < end
                        && start < r.sector + u64::from(r.len) / SECTOR
                        && !self.behind(r)
                })
        })
    }

    /// Requests that will not be answered now: a target which is paused or finished as well holds their ranges until it
    /// hears of them, also against its resync from another source.
    pub(crate) fn cancel_requests(&mut self, n: NodeId, v: VolumeNr, reading: bool) {
        let Some(p) = self.pds.get_mut(&(n, v)) else { return };
        let cancelled: Vec<u64> = p
            .source
            .iter()
            .filter(|(_, r)| r.phase == SourcePhase::Waiting || (reading && r.phase == SourcePhase::Reading))
            .map(|(id, _)| *id)
            .collect();
        for id in cancelled {
            let Some(r) = self.pds.get_mut(&(n, v)).and_then(|p| p.source.remove(&id)) else { continue };
            if let Some(d) = self.devs.get_mut(&v) {
                d.locks.remove(r.lock, r.sector);
            }
            if self.st.connected(n) {
                self.send_ack(n, v, r.sector, r.len, id, Packet::RsCancel);
            }
        }
    }

    /// Reads for requests whose conditions are met.
    pub(crate) fn serve_waiting(&mut self, v: VolumeNr) {
        let mut ready = Vec::new();
        for ((n, pv), p) in &self.pds {
            if *pv != v || self.st.repl(*n, v) != ReplState::SyncSource {
                continue;
            }
            for (id, r) in &p.source {
                if r.phase != SourcePhase::Waiting {
                    continue;
                }
                if self.behind(r) {
                    continue;
                }
                let end = r.sector + u64::from(r.len) / SECTOR;
                let Some(d) = self.devs.get(&v) else { continue };
                let busy = d.locks.overlapping(r.sector, end).any(|(_, h)| h != Holder::ResyncRead)
                    || d.peer_waiting
                        .iter()
                        .filter_map(|w| self.peer_requests.get(w))
                        .any(|w| w.sector < end && r.sector < w.sector + u64::from(w.len) / SECTOR);
                if !busy {
                    ready.push((*n, *id));
                }
            }
        }
        for (n, id) in ready {
            let Some(r) = self.pds.get_mut(&(n, v)).and_then(|p| p.source.get_mut(&id)) else { continue };
            r.phase = SourcePhase::Reading;
            let (sector, len, lock) = (r.sector, r.len, r.lock);
            if let Some(d) = self.devs.get_mut(&v) {
                d.locks.insert(lock, sector, sector + u64::from(len) / SECTOR, Holder::ResyncRead);
                d.read_sectors += u64::from(len) / SECTOR;
            }
            let io = self.io(v, IoTag::ResyncSourceRead { peer: n, id, lock });
            self.emit(Output::DiskRead { id: io, vnr: v, sector, len });
        }
    }

    /// `lock` is this node's own name of the request: the peer's may have been used again since.
    pub(crate) fn source_read_done(
        &mut self,
        v: VolumeNr,
        n: NodeId,
        id: u64,
        lock: u64,
        result: Result<Bytes, IoError>,
    ) {
        let Some(r) = self
            .pds
            .get_mut(&(n, v))
            .and_then(|p| p.source.get_mut(&id))
            .filter(|r| r.lock == lock && r.phase == SourcePhase::Reading)
        else {
            return;
        };
        let (sector, len) = (r.sector, r.len);
        match result {
            Ok(data) => {
                r.phase = SourcePhase::Answered;
                let digest = self
                    .conns
                    .get(&n)
                    .and_then(|c| c.net.integrity_alg.as_deref().map(|a| crate::write::digest_of(a, &data)))
                    .unwrap_or_default();
                let d = Data { sector, block_id: id, seq_num: 0, dp_flags: palisade_wire::DpFlags::NONE };
                self.send(n, Stream::Data, Some(v.0), Packet::RsDataReply(d), digest, data);
            }
            Err(_) => {
                if let Some(p) = self.pds.get_mut(&(n, v)) {
                    p.source.remove(&id);
                }
                if let Some(d) = self.devs.get_mut(&v) {
                    d.locks.remove(lock, sector);
                }
                self.send_ack(n, v, sector, len, id, Packet::NegRsDreply);
                self.disk_error(v, false);
            }
        }
    }

    fn got_resync_ack(&mut self, n: NodeId, v: VolumeNr, id: u64, sector: u64, len: u32, ok: bool) {
        let r = self.pds.get_mut(&(n, v)).and_then(|p| p.source.remove(&id));
        let Some(r) = r.filter(|r| r.sector == sector && r.len == len && r.phase == SourcePhase::Answered)
        else {
            // Of a resync that was stopped here.
            if self.st.repl(n, v) == ReplState::SyncSource {
                self.drop_link(n, ConnState::ProtocolError, "resync acknowledgement without request");
            }
            return;
        };
        let range = r.sector..r.sector + u64::from(r.len) / SECTOR;
        if let Some(d) = self.devs.get_mut(&v) {
            d.locks.remove(r.lock, r.sector);
        }
        if ok {
            if let Some(p) = self.pds.get_mut(&(n, v)) {
                p.resync_done_sectors += range.end - range.start;
                p.sent_sectors += range.end - range.start;
            }
            self.now_in_sync_with(n, v, range.clone(), false);
            self.area_finished(n, v, range);
        }
        self.todo(Todo::Kick(v));
        self.todo(Todo::KickPeers(v));
        self.serve_waiting(v);
    }

    /// The target says it is done.
    pub(crate) fn source_finished(&mut self, n: NodeId, v: VolumeNr) {
        let equal = self.pds.get(&(n, v)).and_then(|p| p.uuids.as_ref()).is_some_and(|u| {
            self.devs.get(&v).is_some_and(|d| same(u.set.current, d.current_uuid()))
                && !u.flags.contains(UuidFlags::SYNC_TARGET)
        });
        // Bits that are left were not served: the peer finished with another source, which need not be equal to this node.
        let left = self
            .devs
            .get(&v)
            .and_then(|d| d.ldev.as_ref())
            .is_some_and(|l| l.slot(n).is_some_and(|s| l.bitmap.weight(s) > 0));
        if equal && self.st.pdsk(n, v) >= DiskState::Outdated && !left {
            self.clear_slot(n, v);
            self.todo(Todo::SendUuids { vnr: v, except: Some(n), got_stable: false });
        }
        self.write_bitmap(v);
    }

    // ----- peers in sync (§11.8) -----

    /// Part of the device was finished with a partner: tell whoever is equal there.
    fn area_finished(&mut self, n: NodeId, v: VolumeNr, range: std::ops::Range<u64>) {
        if self.conns.len() < 2 {
            return;
        }
        let size = self.devs.get(&v).map_or(0, |d| d.size);
        let mut step = range.start / STEP * STEP;
        while step < range.end {
            let area = step..(step + STEP).min(size);
            self.tell_in_sync(n, v, area);
            step += STEP;
        }
    }

    fn tell_in_sync(&mut self, n: NodeId, v: VolumeNr, area: std::ops::Range<u64>) {
        use ReplState as R;
        let Some(l) = self.devs.get(&v).and_then(|d| d.ldev.as_ref()) else { return };
        if self.writes_open(v, &area) {
            return;
        }
        let clean = |m: NodeId| {
            l.slot(m).is_some_and(|s| l.bitmap.count(s, l.bitmap.bits_touching(area.clone())) == 0)
        };
        if !clean(n) {
            return;
        }
        let mut mask = self.me.mask();
        for (m, p) in self.st.peers_of(v) {
            let state = matches!(
                p.repl,
                R::Established | R::SyncSource | R::SyncTarget | R::PausedSyncS | R::PausedSyncT
            );
            // Bits the peer reported and nobody resynced yet speak for themselves.
            let reported = self.pds.get(&(m, v)).and_then(|p| p.uuids.as_ref()).map_or(0, |u| u.dirty_bits);
            let settled = p.repl != R::Established || reported == 0;
            if state && settled && p.pdsk >= DiskState::Inconsistent && clean(m) {
                mask = mask.with(m);
            }
        }
        let size = ((area.end - area.start) * SECTOR) as u32;
        let tell: Vec<NodeId> = mask.iter().filter(|m| *m != self.me).collect();
        if tell.len() < 2 {
            return;
        }
        for m in tell {
            self.send_control(
                m,
                Some(v),
                Packet::PeersInSync(PeersInSync { sector: area.start, mask: mask.0, size }),
            );
        }
    }

    /// Writes in the area of which not everybody's fate is known.
    fn writes_open(&self, v: VolumeNr, area: &std::ops::Range<u64>) -> bool {
        let hit = |sector: u64, len: u32| sector < area.end && area.start < sector + u64::from(len) / SECTOR;
        let extents = (area.start >> AL_EXTENT_SHIFT)..=(area.end.saturating_sub(1) >> AL_EXTENT_SHIFT);
        let hot = self
            .devs
            .get(&v)
            .and_then(|d| d.ldev.as_ref())
            .is_some_and(|l| extents.clone().any(|e| u32::try_from(e).is_ok_and(|e| l.al.in_use(e))));
        hot || self.requests.values().any(|r| r.vnr == v && r.submitted && hit(r.sector, r.len))
            || self.conns.values().any(|c| c.unacked.iter().any(|u| u.vnr == v && hit(u.sector, u.len)))
    }

    pub(crate) fn got_peers_in_sync(&mut self, n: NodeId, v: VolumeNr, p: &PeersInSync) {
        let size = self.devs.get(&v).map_or(0, |d| d.size);
        let end = p.sector.saturating_add(u64::from(p.size) / SECTOR).min(size);
        if p.sector >= end || !NodeMask(p.mask).has(self.me) {
            return;
        }
        let mut changed = 0;
        let me = self.me;
        if self.writes_open(v, &(p.sector..end)) {
            return;
        }
        if let Some(l) = self.ldev(v) {
            for m in NodeMask(p.mask).iter().filter(|m| *m != me) {
                if let Some(s) = l.slot(m) {
                    changed += l.bitmap.set_in_sync(s, p.sector..end);
                }
            }
        }
        if changed > 0 {
            self.write_bitmap(v);
            for m in self.peers() {
                self.todo(Todo::CheckResyncEnd(m, v));
            }
        }
        let _ = n;
    }

    // ----- flush before finishing (`spec/wire-protocol.md` §10.7) -----

    fn request_flushes(&mut self, n: NodeId, v: VolumeNr) {
        // The own peer-acks as well: one that says that this node lacks a write must not follow the resync of it.
        self.close_epoch();
        self.flush_peer_acks();
        self.flush_sequence += 1;
        let sequence = self.flush_sequence;
        let modern = |c: &crate::connection::Connection| c.apv >= 123;
        let primaries: Vec<NodeId> =
            self.st.primary_peers().iter().filter(|p| self.conns.get(p).is_some_and(modern)).collect();
        let mut wait = BTreeSet::new();
        for p in &primaries {
            for m in self.st.connected_mask().iter() {
                let counts = self.conns.get(&m).is_some_and(modern)
                    && (m == *p || self.st.pdsk(m, v) == DiskState::UpToDate)
                    && self.st.repl(m, v) >= ReplState::Established;
                if counts {
                    wait.insert((m, *p));
                }
            }
        }
        if let Some(t) = self.pds.get_mut(&(n, v)).and_then(|p| p.target.as_mut()) {
            t.flush_sequence = sequence;
            t.flush_wait = wait;
        }
        for p in primaries {
            self.send_data(p, None, Packet::FlushRequests(FlushRequests { flush_sequence: sequence }));
        }
    }

    pub(crate) fn got_flush_requests(&mut self, n: NodeId, sequence: u64) {
        let dagtag = self.dagtag;
        if let Some(c) = self.conns.get_mut(&n) {
            c.flush_requests.push_back((sequence, dagtag));
        }
        self.close_epoch();
        self.flush_peer_acks();
        self.answer_flush_requests();
    }

    /// Answers when every peer-ack up to the noted position is out.
    pub(crate) fn answer_flush_requests(&mut self) {
        if self.conns.values().all(|c| c.flush_requests.is_empty()) {
            return;
        }
        let oldest = self.transfer_log.front().map(|e| e.dagtag);
        let mut due = Vec::new();
        for c in self.conns.values_mut() {
            while let Some((sequence, dagtag)) = c.flush_requests.front().copied() {
                if oldest.is_some_and(|o| o <= dagtag) {
                    break;
                }
                c.flush_requests.pop_front();
                due.push((c.peer, sequence));
            }
        }
        if due.is_empty() {
            return;
        }
        self.flush_peer_acks();
        due.retain(|(n, _)| self.st.connected(*n));
        for (n, sequence) in due {
            for m in self.st.connected_mask().iter().collect::<Vec<_>>() {
                if m == n {
                    let a = FlushAck { flush_sequence: sequence, primary_node_id: self.me.get().into() };
                    self.send_data(n, None, Packet::FlushRequestsAck(a));
                } else {
                    let f = FlushForward { flush_sequence: sequence, initiator_node_id: n.get().into() };
                    self.send_control(m, None, Packet::FlushForward(f));
                }
            }
        }
    }

    pub(crate) fn got_flush_forward(&mut self, n: NodeId, sequence: u64, initiator: u32) {
        // Whoever asked may be gone, or in a new handshake.
        if let Some(i) = NodeId::from_u32(initiator).filter(|i| self.st.connected(*i)) {
            let a = FlushAck { flush_sequence: sequence, primary_node_id: n.get().into() };
            self.send_data(i, None, Packet::FlushRequestsAck(a));
        }
    }

    pub(crate) fn got_flush_ack(&mut self, n: NodeId, sequence: u64, primary: u32) {
        let Some(primary) = NodeId::from_u32(primary) else { return };
        let mut check = Vec::new();
        for ((m, v), p) in &mut self.pds {
            if let Some(t) = &mut p.target
                && t.flush_sequence == sequence
                && t.flush_wait.remove(&(n, primary))
            {
                check.push((*m, *v));
            }
        }
        for (m, v) in check {
            self.todo(Todo::CheckResyncEnd(m, v));
        }
    }

    // ----- after the loss of a Primary (`spec/wire-protocol.md` §10.8) -----

    /// When everything received from the lost Primary is written, flushes; then the survivors compare.
    ///
    /// Equal positions end in cleared bits on both sides: what they promise must not sit in a volatile cache.
    pub(crate) fn reconcile_when_written(&mut self) {
        let waits = self.pds.values().any(|p| p.reconciliation);
        if !waits || self.reconcile_flushes.is_some() || self.peer_requests.values().any(|r| r.orphan) {
            return;
        }
        let mut flushes = 0;
        for v in self.vnrs() {
            if self.st.disk(v) >= DiskState::Inconsistent {
                let id = self.io(v, IoTag::ReconcileFlush);
                self.emit(Output::DiskFlush { id, vnr: v });
                flushes += 1;
            }
        }
        self.reconcile_flushes = Some(flushes);
        if flushes == 0 {
            self.tell_position();
        }
    }

    pub(crate) fn reconcile_flushed(&mut self, v: VolumeNr, ok: bool) {
        if !ok {
            self.disk_error(v, true);
        }
        let Some(n) = &mut self.reconcile_flushes else { return };
        *n = n.saturating_sub(1);
        if *n == 0 {
            self.tell_position();
        }
    }

    fn tell_position(&mut self) {
        self.reconcile_flushes = None;
        // Another Primary may have been lost while the flush ran.
        if self.peer_requests.values().any(|r| r.orphan) {
            return;
        }
        let peers: BTreeSet<NodeId> =
            self.pds.iter().filter(|(_, p)| p.reconciliation).map(|((n, _), _)| *n).collect();
        for n in peers {
            self.send_peer_dagtag(n);
        }
    }

    /// Tells another survivor how far this node got in the lost Primary's stream.
    fn send_peer_dagtag(&mut self, m: NodeId) {
        let Some((lost, dagtag)) = self.lost_primary else { return };
        if !self.st.connected(m) || self.st.connected(lost) {
            self.reconciled(m);
            return;
        }
        for v in self.vnrs() {
            if self.st.disk(v) >= DiskState::Inconsistent {
                self.send_uuids(m, v, UuidFlags::NONE, 0);
            }
        }
        self.send_data(m, None, Packet::PeerDagtag(PeerDagtag { dagtag, node_id: lost.get().into() }));
        if let Some(c) = self.conns.get_mut(&m) {
            c.position_told = true;
        }
        self.compare_dagtags(m);
    }

    /// Somebody never told its position: it did not lose that Primary, or is gone itself. What the bits say is resynced.
    pub(crate) fn reconcile_timer(&mut self) {
        if self.reconcile_until.is_none_or(|t| self.now < t) {
            return;
        }
        self.reconcile_until = None;
        let open: Vec<(NodeId, VolumeNr)> =
            self.pds.iter().filter(|(_, p)| p.reconciliation).map(|(k, _)| *k).collect();
        if open.is_empty() {
            return;
        }
        for (n, _) in &open {
            self.reconciled(*n);
        }
        self.recalc("reconciliation");
        for (n, v) in open {
            if self.st.repl(n, v) == ReplState::Established {
                self.established(n, v);
            }
        }
        self.queue_lost_peer();
    }

    fn reconciled(&mut self, n: NodeId) {
        for v in self.vnrs() {
            if let Some(p) = self.pds.get_mut(&(n, v)) {
                p.reconciliation = false;
            }
        }
    }

    /// The lost Primary is connected again, and still Primary: it knows its writes, positions do not matter any more.
    pub(crate) fn primary_is_back(&mut self, new: &State) {
        let back =
            self.lost_primary.is_some_and(|(n, _)| new.connected(n) && new.peer_role(n) == Role::Primary);
        if back {
            for p in self.pds.values_mut() {
                p.reconciliation = false;
            }
        }
    }

    pub(crate) fn got_peer_dagtag(&mut self, n: NodeId, lost: u32, dagtag: u64) {
        let Some(lost) = NodeId::from_u32(lost) else { return };
        if let Some(c) = self.conns.get_mut(&n) {
            c.peer_dagtag = Some((lost, dagtag));
        }
        if self.st.connected(lost) {
            // Perhaps it is just not noticed here yet.
            self.ping(lost);
        }
        self.compare_dagtags(n);
    }

    fn compare_dagtags(&mut self, n: NodeId) {
        let Some((lost, mine)) = self.lost_primary else { return };
        let Some((theirs_of, theirs)) = self.conns.get(&n).and_then(|c| c.peer_dagtag) else { return };
        let told = self.conns.get(&n).is_some_and(|c| c.position_told);
        if theirs_of != lost || self.st.connected(lost) || !self.st.connected(n) || !told {
            return;
        }
        if let Some(c) = self.conns.get_mut(&n) {
            c.peer_dagtag = None;
            c.position_told = false;
        }
        self.reconciled(n);
        for v in self.vnrs() {
            let usable = self.st.disk(v) >= DiskState::Consistent
                && self.st.pdsk(n, v) >= DiskState::Consistent
                && self.st.repl(n, v) == ReplState::Established;
            let equal =
                self.pds.get(&(n, v)).and_then(|p| p.uuids.as_ref()).is_some_and(|u| {
                    self.devs.get(&v).is_some_and(|d| same(u.set.current, d.current_uuid()))
                });
            if !usable || !equal {
                continue;
            }
            let scope = self.scope(Some(n), Some(v));
            match mine.cmp(&theirs) {
                std::cmp::Ordering::Equal => {
                    if let Some(l) = self.ldev(v)
                        && let Some(s) = l.slot(n)
                    {
                        l.bitmap.clear_all(s);
                    }
                    self.write_bitmap(v);
                }
                order => {
                    let to = if order.is_gt() { ReplState::WFBitMapS } else { ReplState::WFBitMapT };
                    self.log(LogLevel::Info, scope, format!(
                        "reconciliation resync after the loss of node {lost}: own position {mine}, peer's {theirs}"
                    ));
                    self.force("reconciliation", |s| {
                        if let Some(p) = s.pds.get_mut(&(n, v)) {
                            p.repl = to;
                        }
                    });
                }
            }
        }
        self.recalc("reconciled");
        self.queue_lost_peer();
    }
}

/// Gives the range of a target's request back, or remembers it until the disk is done with it.
fn release(d: &mut crate::device::Device, id: u64, r: &TargetRequest) {
    if r.phase == TargetPhase::Writing {
        d.stopped_writes.insert(id, r.sector);
    } else {
        d.locks.remove(id, r.sector);
    }
}
