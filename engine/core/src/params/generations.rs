//! Generation identifiers of this node: where they are kept, how a new one is made and announced
//! (`spec/state-machine.md` §8).
//!
//! A generation must never be announced before it is on disk, nor be made of itself while a peer is being told the
//! present one.

use crate::core::{Core, Todo};
use crate::io::LogLevel;
use crate::tables::uuid::{self, UuidSet, is_generation, same};
use crate::types::{NodeId, SECTOR, VolumeNr};
use palisade_metadata::PeerFlags;
use palisade_wire::enums::{DiskState, ReplState};
use palisade_wire::{CurrentUuid, Packet, UuidFlags};

/// Generations without a completed write that are remembered; more only means that a peer is taken as outdated.
const UNPROVEN_MAX: usize = 16;

impl Core {
    /// Identifiers as this node keeps them.
    pub(crate) fn uuid_set(&self, v: VolumeNr) -> Option<UuidSet> {
        let l = self.devs.get(&v)?.ldev.as_ref()?;
        let mut s = UuidSet { current: l.sb.current_uuid, history: l.sb.history, ..UuidSet::default() };
        for (i, p) in l.sb.peers.iter().enumerate() {
            s.bitmap[i] = p.bitmap_uuid;
            s.bitmap_dagtag[i] = p.bitmap_dagtag;
        }
        Some(s)
    }

    /// Stores changed identifiers; they are on disk when the superblock is.
    pub(crate) fn store_uuids(&mut self, v: VolumeNr, s: &UuidSet) {
        if let Some(l) = self.ldev(v) {
            l.sb.current_uuid = s.current;
            l.sb.history = s.history;
            for (i, p) in l.sb.peers.iter_mut().enumerate() {
                p.bitmap_uuid = s.bitmap[i];
                p.bitmap_dagtag = s.bitmap_dagtag[i];
            }
        }
        self.superblock_changed(v);
    }

    /// Node ids with a slot or known to exist.
    pub(super) fn known_nodes(&self, v: VolumeNr) -> u64 {
        let Some(l) = self.devs.get(&v).and_then(|d| d.ldev.as_ref()) else { return 0 };
        l.sb.peers
            .iter()
            .enumerate()
            .filter(|(_, p)| p.slot().is_some() || p.flags.contains(PeerFlags::NODE_EXISTS))
            .fold(0, |m, (i, _)| m | 1 << i)
    }

    /// The peer this volume is sync target of, with its current UUID.
    pub(super) fn sync_source(&self, v: VolumeNr) -> Option<(NodeId, u64)> {
        use ReplState as R;
        let n = self
            .st
            .peers_of(v)
            .find(|(_, p)| matches!(p.repl, R::SyncTarget | R::PausedSyncT | R::Behind))
            .map(|x| x.0)?;
        let u = self.pds.get(&(n, v))?.uuids.as_ref()?.set.current;
        Some((n, u))
    }

    pub(super) fn pdsk_array(&self, v: VolumeNr) -> [DiskState; 32] {
        let mut a = [DiskState::DUnknown; 32];
        for (n, p) in self.st.peers_of(v) {
            a[n.idx()] = p.pdsk;
        }
        a
    }

    pub(super) fn configured_mask(&self) -> u64 {
        self.conns.keys().fold(0, |m, n| m | n.mask().0)
    }

    pub(super) fn slot_mask(&self, v: VolumeNr) -> u64 {
        let Some(l) = self.devs.get(&v).and_then(|d| d.ldev.as_ref()) else { return 0 };
        l.sb.peers.iter().enumerate().filter(|(_, p)| p.slot().is_some()).fold(0, |m, (i, _)| m | 1 << i)
    }

    /// Nodes that are not counted as having a new generation (`spec/state-machine.md` §8.6).
    pub(super) fn weak_mask(&self, v: VolumeNr) -> u64 {
        uuid::weak_nodes(self.me.get(), self.st.disk(v), self.configured_mask(), &self.pdsk_array(v))
    }

    /// Creates the pending generation (`spec/state-machine.md` §8.5); writes wait until it is on disk.
    pub(crate) fn new_generation(&mut self, v: VolumeNr, forced: bool) {
        let Some(d) = self.devs.get_mut(&v) else { return };
        if !d.new_uuid_needed && !forced {
            return;
        }
        if !self.is_primary() && !forced {
            return;
        }
        if self.st.devs.get(&v).is_none_or(|d| !d.quorum) {
            return;
        }
        // A peer is being told the present generation; it would compare what is gone when it commits.
        let handshaking = self.conns.values().any(|c| c.params_sent && !self.st.connected(c.peer));
        if handshaking && !forced {
            return;
        }
        if let Some(d) = self.devs.get_mut(&v) {
            d.new_uuid_needed = false;
        }
        // A disk that is on its way out does not take part in the new generation, its metadata must not say so.
        let Some(mut set) = self.uuid_set(v).filter(|_| self.st.disk(v) > DiskState::Failed) else {
            self.new_exposed_generation(v);
            return;
        };
        let pdsk = self.pdsk_array(v);
        let weak = if forced {
            let established = self
                .st
                .peers_of(v)
                .filter(|(_, p)| p.repl >= ReplState::Established)
                .fold(0, |m, (n, _)| m | n.mask().0);
            uuid::initial_resync_targets(established, &pdsk)
        } else {
            self.weak_mask(v)
        };
        let input = uuid::NewCurrent {
            own_id: self.me.get(),
            primary: self.is_primary(),
            dagtag: self.dagtag,
            configured: self.configured_mask(),
            pdsk: &pdsk,
            weak,
            has_slot: self.slot_mask(v),
            max_peers: self.devs.get(&v).and_then(|d| d.ldev.as_ref()).map_or(0, |l| l.sb.max_peers as u8),
            random: self.rng.next_u64(),
            random_initial: self.rng.next_u64(),
            forced,
        };
        let Some(g) = set.new_current(&input) else { return };
        // The generation itself tells those peers now.
        for ((n, pv), p) in &mut self.pds {
            if *pv == v && g.slots & n.mask().0 != 0 {
                p.lost_writes = false;
            }
        }
        self.store_uuids(v, &set);
        self.gate_writes_on_superblock(v);
        let scope = self.scope(None, Some(v));
        self.log(
            LogLevel::Info,
            scope,
            format!("new current UUID: {:016X} weak: {:016X}", set.current, self.weak_mask(v)),
        );
        let weak = self.weak_mask(v);
        self.when_durable(v, crate::device::Then::AnnounceGeneration { weak, forced });
    }

    /// A Primary without disk starts a generation of which only the peers keep record, if somebody could tell the
    /// difference (`spec/state-machine.md` §8.5).
    fn new_exposed_generation(&mut self, v: VolumeNr) {
        let exposed = self.devs.get(&v).map_or(0, crate::device::Device::current_uuid);
        let diskful = |i: u8| NodeId::new(i).and_then(|n| self.conns.get(&n)).is_none_or(|c| c.diskful);
        let unmarked = self.st.peers_of(v).any(|(n, p)| {
            self.st.connected(n)
                && p.pdsk == DiskState::UpToDate
                && self
                    .pds
                    .get(&(n, v))
                    .and_then(|p| p.uuids.as_ref())
                    .is_some_and(|u| (0u8..32).any(|i| i != n.get() && u.set.slot(i) == 0 && diskful(i)))
        });
        let absent_and_current = self.st.peers_of(v).any(|(n, p)| {
            let absent = (p.pdsk < DiskState::Consistent || p.repl < ReplState::Established)
                && self.conns.get(&n).is_some_and(|c| c.diskful);
            let last = self.pds.get(&(n, v)).and_then(|p| p.uuids.as_ref());
            absent
                && last.is_none_or(|u| {
                    (u.set.current == 0 || same(u.set.current, exposed))
                        && !u.flags.contains(UuidFlags::SYNC_TARGET)
                })
        });
        if !unmarked && !absent_and_current {
            return;
        }
        let uuid = self.rng.next_u64() | uuid::PRIMARY_BIT;
        let weak = self.weak_mask(v);
        if let Some(d) = self.devs.get_mut(&v) {
            d.exposed_uuid = uuid;
            if is_generation(exposed) && d.unproven.len() < UNPROVEN_MAX {
                d.unproven.push(exposed);
            }
        }
        // Whoever takes part follows; that is what is known of it from now on.
        for ((n, pv), p) in &mut self.pds {
            if *pv == v
                && weak & n.mask().0 == 0
                && let Some(u) = &mut p.uuids
            {
                u.set.current = uuid;
            }
        }
        let scope = self.scope(None, Some(v));
        self.log(LogLevel::Info, scope, format!("new exposed current UUID: {uuid:016X} weak: {weak:016X}"));
        self.close_epoch();
        for n in self.st.connected_mask().iter().collect::<Vec<_>>() {
            self.send_data(n, Some(v), Packet::CurrentUuid(CurrentUuid { uuid, weak_nodes: weak }));
        }
    }

    /// The new generation is on disk: the peers may follow.
    pub(crate) fn announce_generation(&mut self, v: VolumeNr, weak: u64, forced: bool) {
        // Writes of the old generation end here for every replica.
        self.close_epoch();
        let extra = if forced { UuidFlags::NONE } else { UuidFlags::NEW_DATAGEN };
        for n in self.st.connected_mask().iter().collect::<Vec<_>>() {
            if self.st.repl(n, v) >= ReplState::Established {
                self.send_uuids(n, v, extra, weak);
            }
        }
        self.todo(Todo::Kick(v));
    }

    /// Clears bits and bitmap UUID towards a peer that is known to be equal.
    pub(crate) fn clear_slot(&mut self, n: NodeId, v: VolumeNr) {
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.lost_writes = false;
            if let Some(u) = &mut p.uuids {
                u.dirty_bits = 0;
            }
        }
        let me = self.me.get();
        if let Some(mut set) = self.uuid_set(v) {
            set.clear_slot(me, n.get());
            self.store_uuids(v, &set);
        }
        if let Some(l) = self.ldev(v)
            && let Some(s) = l.slot(n)
            && l.bitmap.weight(s) > 0
        {
            l.bitmap.clear_all(s);
            self.mark_open_writes(n, v);
            self.write_bitmap(v);
        }
    }

    /// What a peer tells about the past says nothing of writes on their way: whoever does not get them is behind.
    pub(super) fn mark_open_writes(&mut self, n: NodeId, v: VolumeNr) {
        let open = self
            .requests
            .values()
            .filter(|r| r.vnr == v && r.submitted && !r.peers.iter().any(|l| l.node == n && !l.gone));
        let ranges: Vec<_> = open.map(|r| r.sector..r.sector + u64::from(r.len) / SECTOR).collect();
        if let Some(l) = self.ldev(v)
            && let Some(s) = l.slot(n)
        {
            for r in ranges {
                l.bitmap.set_out_of_sync(s, r);
            }
        }
    }
}
