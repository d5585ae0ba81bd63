//! Entering and leaving a resync, on either side (`spec/state-machine.md` §11.2, §12.3).
//!
//! Whoever leaves gives back every range it held, except those the disk still writes to: no range may stay taken
//! for ever, none may be free under a write in flight.

use super::{TargetPhase, TargetRequest, TargetState};
use crate::core::{Core, Todo};
use crate::io::{Event, LogLevel};
use crate::types::{NodeId, NodeMask, SECTOR, VolumeNr};
use palisade_metadata::PeerFlags;
use palisade_wire::UuidFlags;
use palisade_wire::enums::ReplState;

impl Core {
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
    pub(super) fn source_unstable(&self, n: NodeId, v: VolumeNr) -> bool {
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
}

/// Gives the range of a target's request back, or remembers it until the disk is done with it.
fn release(d: &mut crate::device::Device, id: u64, r: &TargetRequest) {
    if r.phase == TargetPhase::Writing {
        d.stopped_writes.insert(id, r.sector);
    } else {
        d.locks.remove(id, r.sector);
    }
}
