//! P_UUIDS110 and P_CURRENT_UUID: what a peer is shown, and what is learned from what it shows
//! (`spec/state-machine.md` §8.6 to §8.8, `spec/wire-protocol.md` §4.10).
//!
//! A disk that is on its way out must not speak for the volume, nor follow a generation.

use crate::connection::PeerUuids;
use crate::core::{Core, Todo};
use crate::io::LogLevel;
use crate::tables::finished::{self, Announce, FinishedAction};
use crate::tables::uuid::{self, Received, ReceivedCurrent, UuidSet, is_just_created, same};
use crate::types::{NodeId, VolumeNr};
use palisade_metadata::{DeviceFlags, PeerFlags};
use palisade_wire::enums::{DiskState, ReplState, Role, WireProtocol};
use palisade_wire::{CurrentUuid, Packet, UuidFlags, Uuids110};

impl Core {
    /// What a peer is shown (`spec/state-machine.md` §8.7), with the flags of §1.8.
    pub(crate) fn presented(&self, n: NodeId, v: VolumeNr) -> Option<(UuidSet, UuidFlags, u64)> {
        let d = self.devs.get(&v)?;
        // A disk that is on its way out does not speak for the volume any more.
        if matches!(self.st.disk(v), DiskState::Failed | DiskState::Detaching) {
            return None;
        }
        let set = self.uuid_set(v)?;
        let l = d.ldev.as_ref()?;
        let source = self.sync_source(v).filter(|(s, _)| *s != n);
        let targets = self.st.peers_of(v).filter(|(_, p)| {
            matches!(p.repl, ReplState::SyncTarget | ReplState::PausedSyncT | ReplState::WFBitMapT)
        });
        let target_of = targets
            .filter(|(m, _)| {
                self.pds
                    .get(&(*m, v))
                    .and_then(|p| p.uuids.as_ref())
                    .is_some_and(|u| !same(u.set.current, set.current))
            })
            .fold(0, |a, (m, _)| a | m.mask().0);
        let shown = set.presented(self.known_nodes(v), source.map(|s| s.1), target_of);
        let c = self.conns.get(&n)?;
        let disk = self.st.disk(v);
        let synchronous = c.net.protocol == WireProtocol::C;
        let lost_writes = self.pds.get(&(n, v)).is_some_and(|p| p.lost_writes);
        let inconsistent = disk == DiskState::Inconsistent
            || (matches!(disk, DiskState::Negotiating | DiskState::Attaching)
                && !l.sb.flags.contains(DeviceFlags::CONSISTENT));
        // What was withheld for lack of quorum ends with a crash: under protocol C its survivors have all that counts.
        let withheld = (d.primary_lost_quorum || lost_writes) && !(d.crashed_primary && synchronous);
        let flags = UuidFlags::NONE
            .with(UuidFlags::DISCARD_MY_DATA, c.discard_my_data)
            .with(UuidFlags::CRASHED_PRIMARY, d.crashed_primary || (d.crashed_replica && synchronous))
            .with(UuidFlags::INCONSISTENT, inconsistent)
            .with(UuidFlags::STABLE, self.st.stable())
            .with(UuidFlags::RECONNECT, c.was_connected && !self.st.connected(n) && !lost_writes)
            .with(UuidFlags::PRIMARY_LOST_QUORUM, withheld)
            .with(UuidFlags::SYNC_TARGET, source.is_some());
        let bits = l.slot(n).map_or(0, |s| l.bitmap.weight(s));
        Some((shown, flags, bits))
    }

    /// The generation of a connecting peer that is as good as the exposed one: no write was completed since.
    pub(crate) fn unproven_match(&self, n: NodeId, v: VolumeNr) -> Option<u64> {
        let theirs = self.pds.get(&(n, v))?.uuids.as_ref()?.set.current;
        let unproven = &self.devs.get(&v)?.unproven;
        let matches = !self.st.connected(n) && unproven.iter().any(|u| same(*u, theirs));
        // Writes on their way to others would be missing here; those that are withheld are issued anew.
        let on_their_way =
            !self.frozen() && self.requests.values().any(|r| r.vnr == v && r.submitted && !r.completed);
        (matches && !on_their_way).then_some(theirs)
    }

    /// Sends the own identifiers (or, diskless, the exposed one) to a peer.
    pub(crate) fn send_uuids(&mut self, n: NodeId, v: VolumeNr, extra: UuidFlags, mask: u64) {
        let Some((set, flags, bits)) = self.presented(n, v) else {
            let uuid = self
                .devs
                .get(&v)
                .map_or(0, |d| if d.exposed_uuid == 0 { d.current_uuid() } else { d.exposed_uuid });
            let unproven = self.unproven_match(n, v);
            if let Some(c) = self.conns.get_mut(&n).filter(|_| unproven.is_some()) {
                c.shows_unproven = true;
            }
            let uuid = unproven.unwrap_or(uuid);
            let weak = if self.is_primary() { self.weak_mask(v) } else { 0 };
            self.send_data(n, Some(v), Packet::CurrentUuid(CurrentUuid { uuid, weak_nodes: weak }));
            return;
        };
        let flags = flags | extra;
        let node_mask = if mask != 0 {
            mask
        } else if !flags.contains(UuidFlags::STABLE) {
            self.st.primary_peers().0
        } else if self.is_primary() && !self.st.connected(n) {
            self.weak_mask(v)
        } else {
            0
        };
        let known = self.known_nodes(v);
        let bitmap_uuids: Vec<(u8, u64)> =
            (0u8..32).filter(|i| known & (1 << i) != 0).map(|i| (i, set.bitmap[i as usize])).collect();
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.sent = Some((set.current, set.bitmap[n.idx()], bits));
            p.sent_slot = set.bitmap[n.idx()];
        }
        self.send_data(
            n,
            Some(v),
            Packet::Uuids110(Uuids110 {
                current: set.current,
                dirty_bits: bits,
                flags,
                node_mask,
                bitmap_uuids,
                history: set.history.to_vec(),
            }),
        );
    }

    pub(crate) fn send_uuids_to_all(&mut self, v: VolumeNr, except: Option<NodeId>, got_stable: bool) {
        if self.devs.get(&v).is_none_or(|d| d.ldev.is_none()) {
            return;
        }
        for n in self.st.connected_mask().iter().collect::<Vec<_>>() {
            if Some(n) != except && self.st.repl(n, v) >= ReplState::Established {
                let extra = if got_stable { UuidFlags::GOT_STABLE } else { UuidFlags::NONE };
                self.send_uuids(n, v, extra, 0);
            }
        }
    }

    pub(super) fn got_uuids(&mut self, n: NodeId, v: VolumeNr, u: &Uuids110) {
        let mut set =
            UuidSet { current: u.current, bitmap: [uuid::NOT_MEANINGFUL; 32], ..UuidSet::default() };
        for (i, x) in &u.bitmap_uuids {
            set.bitmap[*i as usize] = *x;
        }
        for (a, b) in set.history.iter_mut().zip(&u.history) {
            *a = *b;
        }
        self.note_nodes(n, v, u);
        let got_stable = u.flags.contains(UuidFlags::GOT_STABLE);
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.peer_exposed = None;
            p.got_stable = got_stable;
            p.uuids = Some(PeerUuids {
                set: set.clone(),
                dirty_bits: u.dirty_bits,
                flags: u.flags,
                node_mask: u.node_mask,
            });
            p.identifiers_received = true;
        }
        if self.st.repl(n, v) < ReplState::Established {
            self.send_held_params(n);
            return;
        }
        if u.flags.contains(UuidFlags::SKIP_INITIAL_SYNC) {
            self.skip_initial_sync(n, v, u.current);
            return;
        }
        self.follow_generation(n, v, u.current, u.flags.contains(UuidFlags::NEW_DATAGEN), u.node_mask);
        self.detect_finished(n, v, false);
        self.recalc("uuids");
        let established = self.st.repl(n, v) == ReplState::Established;
        if established && got_stable && self.st.stable() {
            self.send_uuids(n, v, UuidFlags::RESYNC, 0);
            self.reconsider(n, v);
        } else if established && u.flags.contains(UuidFlags::RESYNC) {
            self.reconsider(n, v);
        } else if established
            && self.st.disk(v) == DiskState::Inconsistent
            && self.st.pdsk(n, v) == DiskState::UpToDate
            && !self.is_sync_target(v)
        {
            // The peer was forced to be UpToDate while both were Inconsistent.
            self.reconsider(n, v);
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.got_stable = false;
        }
        self.todo(Todo::CheckResyncEnd(n, v));
    }

    /// Nodes that a peer mentions exist (`spec/metadata.md` §9.2).
    fn note_nodes(&mut self, n: NodeId, v: VolumeNr, u: &Uuids110) {
        let skip = u.flags.unallocated_slot();
        let _ = n;
        if let Some(l) = self.ldev(v) {
            for (i, _) in &u.bitmap_uuids {
                if Some(*i) == skip {
                    continue;
                }
                if let Some(p) = l.sb.peers.get_mut(*i as usize)
                    && p.slot().is_none()
                {
                    p.flags.set(PeerFlags::NODE_EXISTS, true);
                }
            }
        }
        self.superblock_changed(v);
    }

    /// A diskless peer's exposed generation, or a new one of a diskless Primary.
    pub(super) fn got_current_uuid(&mut self, n: NodeId, v: VolumeNr, u: &CurrentUuid) {
        if let Some(l) = self.ldev(v)
            && l.slot(n).is_none()
        {
            l.sb.peers[n.idx()].flags.set(PeerFlags::NODE_EXISTS, true);
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.peer_exposed = Some(u.uuid);
            p.uuids = None;
            p.identifiers_received = true;
        }
        self.send_held_params(n);
        self.superblock_changed(v);
        if self.st.repl(n, v) >= ReplState::Established && u.uuid != 0 {
            let primary = self.st.peer_role(n) == Role::Primary;
            self.follow_generation(n, v, u.uuid, primary, u.weak_nodes);
            self.recalc("current-uuid");
        }
    }

    /// A peer has a new current UUID (`spec/state-machine.md` §8.6).
    fn follow_generation(&mut self, n: NodeId, v: VolumeNr, current: u64, new_datagen: bool, weak: u64) {
        use ReplState as R;
        // What an attaching disk has is what is being found out.
        if matches!(self.st.disk(v), DiskState::Attaching | DiskState::Negotiating) {
            return;
        }
        // A disk on its way out gets none of the writes of the new generation.
        let leaving = matches!(self.st.disk(v), DiskState::Detaching | DiskState::Failed);
        let Some(mut set) = self.uuid_set(v).filter(|_| !leaving) else {
            if self.st.peer_role(n) == Role::Primary
                && new_datagen
                && let Some(d) = self.devs.get_mut(&v)
            {
                d.exposed_uuid = current;
            }
            return;
        };
        let pdsk = self.pdsk_array(v);
        let sync_target = self
            .st
            .peers_of(v)
            .any(|(_, p)| matches!(p.repl, R::SyncTarget | R::PausedSyncT | R::Behind | R::WFBitMapT));
        // Only what a Primary announces as new is followed; anything else is a matter of the comparison. Nor does
        // who gets no data from it, by its own word, follow it.
        if !new_datagen || weak & self.me.mask().0 != 0 {
            return;
        }
        let sender_dagtag = self.conns.get(&n).map_or(0, |c| c.rx_dagtag);
        let r = set.receive_new_current(&ReceivedCurrent {
            own_id: self.me.get(),
            own_role: self.st.role,
            own_disk: self.st.disk(v),
            sync_target,
            sender_role: self.st.peer_role(n),
            new_datagen,
            current,
            weak,
            dagtag: sender_dagtag,
            configured: self.configured_mask(),
            pdsk: &pdsk,
            has_slot: self.slot_mask(v),
        });
        match r {
            Received::Adopted { .. } => {
                self.store_uuids(v, &set);
                self.gate_writes_on_superblock(v);
                let scope = self.scope(Some(n), Some(v));
                self.log(LogLevel::Info, scope, format!("receiver updated UUIDs to {current:016X}"));
                for m in self.st.connected_mask().iter().filter(|m| *m != n).collect::<Vec<_>>() {
                    if self.st.repl(m, v) >= R::Established {
                        self.send_uuids(m, v, UuidFlags::NONE, 0);
                    }
                }
                // It is the diskless Primary's data that this disk has, by the Primary's own word.
                let settled = !self.pds.values().any(|p| p.reconciliation);
                if settled
                    && self.st.disk(v) == DiskState::Consistent
                    && self.st.pdsk(n, v) == DiskState::Diskless
                {
                    self.force("counted-in", |s| {
                        if let Some(d) = s.devs.get_mut(&v) {
                            d.disk = DiskState::UpToDate;
                        }
                    });
                }
            }
            Received::Outdated => self.force("moved-on", |s| {
                if let Some(d) = s.devs.get_mut(&v)
                    && d.disk > DiskState::Outdated
                {
                    d.disk = DiskState::Outdated;
                }
            }),
            Received::Recorded | Received::Unchanged => {}
        }
    }

    /// What a UUID packet tells about resyncs that ended (`spec/state-machine.md` §8.8).
    pub(super) fn detect_finished(&mut self, n: NodeId, v: VolumeNr, handshaking: bool) {
        use ReplState as R;
        let Some(mut set) = self.uuid_set(v) else { return };
        let Some((shown, my_flags, my_bits)) = self.presented(n, v) else { return };
        let Some(p) = self.pds.get(&(n, v)) else { return };
        let Some(u) = p.uuids.clone() else { return };
        let syncing_with =
            self.st.peers_of(v).filter(|(_, p)| p.repl > R::Established).fold(0, |m, (x, _)| m | x.mask().0);
        let det = finished::detect_finished_resyncs(&finished::Detect {
            apv: self.conns.get(&n).map_or(0, |c| c.apv),
            own_id: self.me.get(),
            sender: n.get(),
            handshaking,
            mine: &shown,
            theirs: &u.set,
            sync_target_flag: u.flags.contains(UuidFlags::SYNC_TARGET)
                || my_flags.contains(UuidFlags::SYNC_TARGET),
            my_slot_sent: p.sent_slot,
            any_bits: my_bits > 0 || u.dirty_bits > 0,
            known: self.known_nodes(v),
            syncing_with,
        });
        if det.actions.is_empty() {
            return;
        }
        // Whoever is not equal to this node cannot tell that a third one is.
        let sender_equal = my_bits == 0 && self.st.repl(n, v) == R::Established;
        for a in &det.actions {
            match *a {
                FinishedAction::ClearBits(_) if !sender_equal => {}
                FinishedAction::MarkPeerMissedEnd => {
                    if let Some(p) = self.pds.get_mut(&(n, v)) {
                        p.missed_end_target = true;
                    }
                }
                FinishedAction::MarkSelfMissedEnd => {
                    if let Some(p) = self.pds.get_mut(&(n, v)) {
                        p.missed_end_source = true;
                    }
                }
                FinishedAction::LogMissedEnd => {}
                FinishedAction::ClearSlot(x) => set.clear_slot(self.me.get(), x),
                FinishedAction::ClearBits(x) => {
                    if let Some(x) = NodeId::new(x)
                        && let Some(l) = self.ldev(v)
                        && let Some(s) = l.slot(x)
                    {
                        l.bitmap.clear_all(s);
                        self.mark_open_writes(x, v);
                    }
                }
                FinishedAction::CopySlot { from, to } => {
                    set.copy_slot(self.me.get(), from, to);
                    if let (Some(f), Some(t)) = (NodeId::new(from), NodeId::new(to))
                        && let Some(l) = self.ldev(v)
                        && let (Some(f), Some(t)) = (l.slot(f), l.slot(t))
                    {
                        l.bitmap.copy_slot(f, t);
                    }
                }
            }
        }
        self.store_uuids(v, &set);
        self.write_bitmap(v);
        match det.announce {
            Announce::Nobody => {}
            Announce::AllButSender => {
                self.todo(Todo::SendUuids { vnr: v, except: Some(n), got_stable: false });
            }
            Announce::All => self.todo(Todo::SendUuids { vnr: v, except: None, got_stable: false }),
        }
    }

    /// The peer declared all replicas equal (`spec/state-machine.md` §7.10).
    fn skip_initial_sync(&mut self, n: NodeId, v: VolumeNr, current: u64) {
        let fresh = self.devs.get(&v).is_some_and(|d| d.ldev.is_some() && is_just_created(d.current_uuid()));
        if !fresh {
            return;
        }
        let scope = self.scope(Some(n), Some(v));
        self.log(LogLevel::Info, scope, "Accepted new current UUID, preparing to skip initial sync");
        self.declare_equal(v, current);
        self.force("skip-initial-sync", |s| {
            if let Some(d) = s.devs.get_mut(&v) {
                d.disk = DiskState::UpToDate;
            }
            if let Some(p) = s.pds.get_mut(&(n, v)) {
                p.pdsk = DiskState::UpToDate;
            }
        });
    }

    /// All bits and bitmap UUIDs cleared, one current UUID.
    pub(crate) fn declare_equal(&mut self, v: VolumeNr, current: u64) {
        let Some(mut set) = self.uuid_set(v) else { return };
        let old = set.current;
        set.current = current;
        set.bitmap = [0; 32];
        set.bitmap_dagtag = [0; 32];
        set.push_history(self.me.get(), old);
        if let Some(l) = self.ldev(v) {
            for s in 0..l.bitmap.slots() {
                l.bitmap.clear_all(s);
            }
        }
        self.store_uuids(v, &set);
        self.write_bitmap(v);
    }
}
