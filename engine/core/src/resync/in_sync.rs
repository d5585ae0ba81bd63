//! Telling third nodes that an area is equal everywhere: P_PEERS_IN_SYNC (`spec/state-machine.md` §11.8).
//!
//! Neither side may clear a bit for an area with writes whose fate is open.

use crate::core::{Core, Todo};
use crate::types::{AL_EXTENT_SHIFT, NodeId, NodeMask, SECTOR, VolumeNr};
use palisade_wire::enums::{DiskState, ReplState};
use palisade_wire::{Packet, PeersInSync};

/// Sectors in an activity-log extent, the step of P_PEERS_IN_SYNC.
const STEP: u64 = 1 << AL_EXTENT_SHIFT;

impl Core {
    /// Part of the device was finished with a partner: tell whoever is equal there.
    pub(super) fn area_finished(&mut self, n: NodeId, v: VolumeNr, range: std::ops::Range<u64>) {
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
            if state
                && settled
                && p.pdsk >= DiskState::Inconsistent
                && !self.changes_elsewhere(m, v)
                && clean(m)
            {
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

    /// The peer receives data by a resync that this node has no part in.
    fn changes_elsewhere(&self, m: NodeId, v: VolumeNr) -> bool {
        self.st.repl(m, v) == ReplState::Established && self.st.pdsk(m, v) < DiskState::UpToDate
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
            // What another source wrote here meanwhile is not in the teller's picture.
            let outdated =
                l.slot(n).is_none_or(|s| l.bitmap.count(s, l.bitmap.bits_touching(p.sector..end)) > 0);
            if outdated {
                return;
            }
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
    }
}
