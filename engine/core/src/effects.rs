//! What follows from a state change that became current (`spec/state-machine.md` §5).

use crate::config::OnNoQuorum;
use crate::core::{AfterHandler, Core, Todo};
use crate::io::{Event, HandlerCall, LogLevel, Output};
use crate::state::State;
use crate::types::{NodeId, NodeMask, VolumeNr};
use palisade_metadata::{DeviceFlags, PeerFlags};
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role};
use palisade_wire::{Packet, StateWord};
use std::collections::BTreeSet;

/// How long a survivor waits for another's position in a lost Primary's stream.
const RECONCILE_MAX: std::time::Duration = std::time::Duration::from_secs(5);

fn had_data(d: DiskState) -> bool {
    d >= DiskState::Inconsistent && d != DiskState::DUnknown && d != DiskState::Outdated
}

/// What bits between replicas of one generation mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum EqualBits {
    /// Not of one generation, or it is not for these two to decide.
    Unknown,
    /// Neither lacks anything.
    Settled,
    MineToSend,
    TheirsToSend,
}

impl Core {
    pub(crate) fn effects(&mut self, old: &State, tag: &str) {
        self.log_change(old, tag);
        for v in self.vnrs() {
            let q = self.quorum_of(&self.st, v);
            if let Some(d) = self.devs.get_mut(&v) {
                d.had_quorum = q.real;
            }
        }
        let unconfirmed: BTreeSet<(NodeId, VolumeNr)> = self
            .pds
            .keys()
            .copied()
            .filter(|(n, v)| old.connected(*n) && !self.st.connected(*n) && self.has_unconfirmed(*n, *v))
            .collect();
        // 1. Links that went away: writers and readers learn first, with the new suspension flags in force.
        for n in self.peers() {
            if old.connected(n) && !self.st.connected(n) {
                self.connection_lost(n, old);
            }
        }
        for n in self.peers() {
            if !old.connected(n) && self.st.connected(n) {
                self.members = self.members.with(n);
                for c in self.conns.values_mut().filter(|c| c.peer_dagtag.is_some_and(|d| d.0 == n)) {
                    c.peer_dagtag = None;
                }
                if let Some(c) = self.conns.get_mut(&n) {
                    c.was_connected = true;
                    c.discard_my_data = false;
                    c.tx_dagtag = Some(self.dagtag);
                }
                // The peer counts from here (`spec/wire-protocol.md` §4.4).
                self.send_data(n, None, Packet::Dagtag(palisade_wire::Dagtag { dagtag: self.dagtag }));
                self.count_in_unproven(n);
            }
        }
        self.mark_generations(old, &unconfirmed);
        for v in self.vnrs() {
            self.both_up_to_date(v);
            self.quorum_marks(old, v);
        }
        self.replication_changes(old);
        for v in self.vnrs() {
            self.write_flags(v);
            self.disk_changes(old, v);
        }
        for v in std::mem::take(&mut self.identifiers_first) {
            self.send_uuids_to_all(v, None, false);
        }
        self.send_states(old);
        if old.role != self.st.role {
            self.role_changed(old);
        }
        if old.stable() != self.st.stable() || old.primary_peers() != self.st.primary_peers() {
            let got_stable = !old.stable() && self.st.stable();
            for v in self.vnrs() {
                self.todo(Todo::SendUuids { vnr: v, except: None, got_stable });
            }
        }
        for v in self.vnrs() {
            let regained =
                old.devs.get(&v).is_some_and(|d| !d.quorum) && self.st.devs.get(&v).is_some_and(|d| d.quorum);
            if regained && self.is_primary() && old.role == Role::Primary {
                self.todo(Todo::NewGeneration(v));
            }
        }
        if old.suspended() && !self.st.suspended() {
            self.todo(Todo::Thaw);
        }
        for v in self.vnrs() {
            self.todo(Todo::Kick(v));
            self.todo(Todo::KickPeers(v));
        }
        self.front_ends();
        self.emit_events(old);
    }

    fn log_change(&mut self, old: &State, tag: &str) {
        let mut lines: Vec<(Option<NodeId>, Option<VolumeNr>, String)> = Vec::new();
        if old.role != self.st.role {
            lines.push((None, None, format!("role( {} -> {} )", old.role, self.st.role)));
        }
        for (name, a, b) in [
            ("susp-io(user)", old.susp_user, self.st.susp_user),
            ("susp-io(no-disk)", old.susp_nod, self.st.susp_nod),
            ("susp-io(fencing)", old.susp_fen, self.st.susp_fen),
            ("susp-io(quorum)", old.susp_quorum, self.st.susp_quorum),
            ("force-io-failures", old.fail_io, self.st.fail_io),
        ] {
            if a != b {
                let w = |x| if x { "yes" } else { "no" };
                lines.push((None, None, format!("{name}( {} -> {} )", w(a), w(b))));
            }
        }
        for (n, c) in &self.st.conns {
            let Some(o) = old.conns.get(n) else { continue };
            let mut t = Vec::new();
            if o.cstate != c.cstate {
                t.push(format!("conn( {} -> {} )", o.cstate, c.cstate));
            }
            if o.peer_role != c.peer_role {
                t.push(format!("peer( {} -> {} )", o.peer_role, c.peer_role));
            }
            if !t.is_empty() {
                lines.push((Some(*n), None, t.join(" ")));
            }
        }
        for (v, d) in &self.st.devs {
            let Some(o) = old.devs.get(v) else { continue };
            let mut t = Vec::new();
            if o.disk != d.disk {
                t.push(format!("disk( {} -> {} )", o.disk, d.disk));
            }
            if o.quorum != d.quorum {
                let w = |x| if x { "yes" } else { "no" };
                t.push(format!("quorum( {} -> {} )", w(o.quorum), w(d.quorum)));
            }
            if !t.is_empty() {
                lines.push((None, Some(*v), t.join(" ")));
            }
        }
        for ((n, v), p) in &self.st.pds {
            let Some(o) = old.pds.get(&(*n, *v)) else { continue };
            let mut t = Vec::new();
            if o.pdsk != p.pdsk {
                t.push(format!("pdsk( {} -> {} )", o.pdsk, p.pdsk));
            }
            if o.repl != p.repl {
                t.push(format!("repl( {} -> {} )", o.repl, p.repl));
            }
            if !t.is_empty() {
                lines.push((Some(*n), Some(*v), t.join(" ")));
            }
        }
        for (n, v, text) in lines {
            let scope = self.scope(n, v);
            self.log(LogLevel::Info, scope, format!("{text} [{tag}]"));
        }
    }

    /// A peer at a generation before the exposed one is told the latter, and has it from here on.
    fn count_in_unproven(&mut self, n: NodeId) {
        let Some(c) = self.conns.get_mut(&n).filter(|c| c.shows_unproven) else { return };
        c.shows_unproven = false;
        for v in self.vnrs() {
            let Some(d) = self.devs.get(&v).filter(|d| !d.unproven.is_empty()) else { continue };
            let exposed = d.exposed_uuid;
            self.send_uuids(n, v, palisade_wire::UuidFlags::NONE, 0);
            if let Some(u) = self.pds.get_mut(&(n, v)).and_then(|p| p.uuids.as_mut()) {
                u.set.current = exposed;
            }
        }
    }

    /// `spec/state-machine.md` §8.4 and the immediate cases of §8.5.
    fn mark_generations(&mut self, old: &State, unconfirmed: &BTreeSet<(NodeId, VolumeNr)>) {
        if self.st.role != Role::Primary {
            return;
        }
        for v in self.vnrs() {
            let (disk, old_disk) = (self.st.disk(v), old.disk(v));
            if old.role != Role::Primary {
                self.need_generation(v);
                continue;
            }
            if !self.st.data_accessible(v) && disk < DiskState::Inconsistent {
                continue;
            }
            let mut now = false;
            for (n, p) in self.st.peers_of(v).map(|(n, p)| (n, *p)).collect::<Vec<_>>() {
                let before = old.pdsk(n, v);
                let lost = had_data(before) && !had_data(p.pdsk);
                if lost || (p.repl == ReplState::Ahead && old.repl(n, v) != ReplState::Ahead) {
                    self.need_generation(v);
                }
                if before == DiskState::UpToDate
                    && matches!(p.pdsk, DiskState::Failed | DiskState::Inconsistent)
                    && p.repl <= ReplState::Established
                {
                    now = true;
                }
                if unconfirmed.contains(&(n, v)) {
                    now = true;
                    if self.st.devs.get(&v).is_none_or(|d| !d.quorum)
                        && let Some(p) = self.pds.get_mut(&(n, v))
                    {
                        p.lost_writes = true;
                    }
                }
            }
            if old_disk > DiskState::Failed && disk <= DiskState::Failed && self.st.data_accessible(v) {
                self.need_generation(v);
                now = true;
            }
            if now {
                self.todo(Todo::NewGeneration(v));
            }
        }
    }

    pub(crate) fn need_generation(&mut self, v: VolumeNr) {
        if let Some(d) = self.devs.get_mut(&v) {
            d.new_uuid_needed = true;
        }
    }

    /// Own disk and a peer's both UpToDate: nobody is a crashed Primary any more (§5.1).
    fn both_up_to_date(&mut self, v: VolumeNr) {
        if self.st.disk(v) != DiskState::UpToDate {
            return;
        }
        let peer = self.st.peers_of(v).any(|(n, p)| {
            self.st.connected(n) && p.pdsk == DiskState::UpToDate && p.repl == ReplState::Established
        });
        if peer && let Some(d) = self.devs.get_mut(&v) {
            d.crashed_primary = false;
            d.crashed_replica = false;
        }
        let upd: Vec<NodeId> = self
            .st
            .peers_of(v)
            .filter(|(_, p)| p.pdsk == DiskState::UpToDate && p.repl == ReplState::Established)
            .map(|x| x.0)
            .collect();
        for n in upd {
            if let Some(u) = self.pds.get_mut(&(n, v)).and_then(|p| p.uuids.as_mut()) {
                u.flags = u.flags.with(palisade_wire::UuidFlags::CRASHED_PRIMARY, false);
            }
        }
    }

    fn quorum_marks(&mut self, old: &State, v: VolumeNr) {
        let had = old.devs.get(&v).is_none_or(|d| d.quorum);
        let has = self.st.devs.get(&v).is_some_and(|d| d.quorum);
        let primary = self.is_primary();
        let Some(d) = self.devs.get_mut(&v) else { return };
        if had && !has && primary {
            d.primary_lost_quorum = true;
            let call = HandlerCall {
                name: "quorum-lost",
                vnr: Some(v),
                peer: None,
                cstate: None,
                up_to_date_nodes: None,
            };
            self.run_handler(call, AfterHandler::Nothing);
        } else if has {
            d.primary_lost_quorum = false;
        }
    }

    fn replication_changes(&mut self, old: &State) {
        use ReplState as R;
        for (n, v) in self.pds.keys().copied().collect::<Vec<_>>() {
            let (was, is) = (old.repl(n, v), self.st.repl(n, v));
            if was == is {
                continue;
            }
            match is {
                R::WFBitMapS => {
                    self.begin_exchange(n, v);
                    self.todo(Todo::SendBitmap(n, v));
                }
                R::WFBitMapT => {
                    self.begin_exchange(n, v);
                    self.resync_target_starts(n, v);
                }
                R::StartingSyncS | R::StartingSyncT => self.starting_sync(n, v, is == R::StartingSyncT),
                R::SyncTarget | R::PausedSyncT => self.resync_running(n, v, true),
                R::SyncSource | R::PausedSyncS => self.resync_running(n, v, false),
                R::Established => {
                    if matches!(was, R::SyncTarget | R::PausedSyncT | R::SyncSource | R::PausedSyncS) {
                        self.resync_stopped(n, v);
                    }
                    if was < R::Established {
                        self.established(n, v);
                    }
                }
                R::Off if was > R::Established => {
                    self.resync_stopped(n, v);
                }
                _ => {}
            }
        }
    }

    /// A volume is connected without a resync: equal generations mean equal data (`spec/metadata.md` §9.4), unless
    /// bits say otherwise. Those are never dropped: they are resynced, from the Primary or else from the lower id.
    pub(crate) fn established(&mut self, n: NodeId, v: VolumeNr) {
        self.todo(Todo::Kick(v));
        self.todo(Todo::KickPeers(v));
        match self.bits_between_equals(n, v) {
            EqualBits::Unknown | EqualBits::TheirsToSend => {}
            EqualBits::Settled => self.clear_slot(n, v),
            // Both know of the bits by the identifiers' packets; the source asks.
            EqualBits::MineToSend => {
                let change = crate::twopc::Change::Resync { peer: n, vnr: v, to: ReplState::WFBitMapS };
                self.queue_operation(change, None, false);
            }
        }
    }

    /// What the bits between this node and a peer of the same generation mean.
    pub(crate) fn bits_between_equals(&self, n: NodeId, v: VolumeNr) -> EqualBits {
        let Some(u) = self.pds.get(&(n, v)).and_then(|p| p.uuids.as_ref()) else { return EqualBits::Unknown };
        let same =
            self.devs.get(&v).is_some_and(|d| crate::tables::uuid::same(u.set.current, d.current_uuid()));
        let (disk, pdsk) = (self.st.disk(v), self.st.pdsk(n, v));
        let (primary, peer_primary) = (self.is_primary(), self.st.peer_role(n) == Role::Primary);
        // Beside current data, what was cut off may be behind by just the bits.
        let least = |other: DiskState| {
            if other == DiskState::UpToDate { DiskState::Outdated } else { DiskState::Consistent }
        };
        if !same || pdsk < least(disk) || disk < least(pdsk) {
            return EqualBits::Unknown;
        }
        let bits = |m: NodeId| {
            let l = self.devs.get(&v).and_then(|d| d.ldev.as_ref());
            l.and_then(|l| l.slot(m).map(|s| l.bitmap.weight(s))).unwrap_or(0)
        };
        // Both are replicas of the same Primary, in sync with it: the bits are only what is not known yet.
        let common = self.st.primary_peers().and(NodeMask(u.node_mask)).iter().any(|p| {
            !u.flags.contains(palisade_wire::UuidFlags::STABLE)
                && self.st.repl(p, v) == ReplState::Established
                && self.st.pdsk(p, v) == DiskState::UpToDate
                && bits(p) == 0
        });
        let (mine, theirs) = (bits(n), u.dirty_bits);
        if common || mine == 0 && theirs == 0 {
            return EqualBits::Settled;
        }
        let diskless_primary = !self.st.primary_peers().is_empty();
        let source = match (primary, peer_primary) {
            (true, false) => true,
            (false, true) => false,
            (true, true) => return EqualBits::Unknown,
            // One of them was cut off. The other knows what it lacks unless a Primary still writes.
            (false, false) if disk > pdsk && self.st.stable() => true,
            (false, false) if disk < pdsk && u.flags.contains(palisade_wire::UuidFlags::STABLE) => false,
            (false, false) if disk != pdsk => return EqualBits::Unknown,
            // Bits on one side only: a diskless Primary wrote there without the other.
            (false, false) if diskless_primary && (mine == 0 || theirs == 0) => mine > 0,
            (false, false) => self.me < n,
        };
        if source { EqualBits::MineToSend } else { EqualBits::TheirsToSend }
    }

    /// Metadata flags of a volume (`spec/state-machine.md` §5.1, `spec/metadata.md` §9).
    pub(crate) fn write_flags(&mut self, v: VolumeNr) {
        let st = &self.st;
        let disk = st.disk(v);
        if disk <= DiskState::Attaching || disk == DiskState::Negotiating {
            return;
        }
        let someone_primary = st.role == Role::Primary || !st.primary_peers().is_empty();
        let elsewhere = st.peers_of(v).any(|(n, p)| st.connected(n) && p.pdsk == DiskState::UpToDate);
        let peer_writes_in_flight = self.peer_requests.values().any(|r| r.vnr == v)
            || self.conns.values().any(|c| c.unacked.iter().any(|u| u.vnr == v));
        let quorum = st.devs.get(&v).is_some_and(|d| d.quorum);
        let primary = st.role == Role::Primary;
        let peers: Vec<(NodeId, ReplState, DiskState, bool, bool)> = st
            .peers_of(v)
            .filter_map(|(n, p)| {
                let c = self.conns.get(&n)?;
                Some((n, p.repl, p.pdsk, c.net.fencing != crate::config::Fencing::DontCare, c.diskful))
            })
            .collect();
        let members = self.members;
        let lost_writes = self.pds.iter().any(|((_, pv), p)| *pv == v && p.lost_writes);
        let Some(dev) = self.devs.get_mut(&v) else { return };
        let crashed = dev.crashed_primary;
        let lost_quorum = dev.primary_lost_quorum;
        let crashed_replica = dev.crashed_replica;
        let Some(l) = &mut dev.ldev else { return };
        let f = &mut l.sb.flags;
        f.set(DeviceFlags::AL_CLEAN, false);
        f.set(DeviceFlags::CRASHED_PRIMARY, crashed || (primary && disk != DiskState::Detaching));
        f.set(DeviceFlags::PRIMARY_LOST_QUORUM, lost_quorum || lost_writes);
        if disk >= DiskState::Inconsistent {
            f.set(DeviceFlags::CONSISTENT, disk > DiskState::Inconsistent);
            f.set(DeviceFlags::WAS_UP_TO_DATE, disk > DiskState::Outdated);
        } else if someone_primary && elsewhere {
            f.set(DeviceFlags::WAS_UP_TO_DATE, false);
        }
        if someone_primary && disk != DiskState::Detaching {
            f.set(DeviceFlags::PRIMARY_IND, true);
        } else if !peer_writes_in_flight
            && !crashed_replica
            && (disk == DiskState::Detaching || (!someone_primary && disk >= DiskState::Inconsistent))
        {
            f.set(DeviceFlags::PRIMARY_IND, false);
        }
        f.set(DeviceFlags::HAVE_QUORUM, quorum);
        l.sb.members = members.0;
        for (n, repl, pdsk, fencing, diskful) in peers {
            let p = &mut l.sb.peers[n.idx()];
            if p.slot().is_none() {
                continue;
            }
            p.flags.set(PeerFlags::CONNECTED, repl > ReplState::Off);
            p.flags.set(PeerFlags::OUTDATED, matches!(pdsk, DiskState::Inconsistent | DiskState::Outdated));
            p.flags.set(PeerFlags::FENCING, fencing);
            if pdsk >= DiskState::Inconsistent && pdsk != DiskState::DUnknown {
                p.flags.set(PeerFlags::DEVICE_SEEN, true);
            } else if pdsk == DiskState::Diskless && !diskful {
                p.flags.set(PeerFlags::DEVICE_SEEN, false);
            }
        }
        self.superblock_changed(v);
        if someone_primary {
            self.gate_writes_on_superblock(v);
        }
    }

    fn disk_changes(&mut self, old: &State, v: VolumeNr) {
        let (was, is) = (old.disk(v), self.st.disk(v));
        if was == is {
            return;
        }
        if matches!(is, DiskState::Failed | DiskState::Detaching) {
            self.disk_leaves(v);
        }
        if is >= DiskState::Inconsistent && was < DiskState::Inconsistent {
            self.todo(Todo::KickPeers(v));
        }
        self.determine_size(v);
    }

    /// The word about a volume for a peer (`spec/wire-protocol.md` §5.1).
    pub(crate) fn state_word(&self, st: &State, n: NodeId, v: VolumeNr) -> StateWord {
        let p = st.pds.get(&(n, v));
        let repl = p.map_or(ReplState::Off, |p| p.repl);
        let conn = if repl > ReplState::Off { repl.as_u8() } else { st.cstate(n).as_u8() };
        let mut disk = st.disk(v);
        if disk == DiskState::Attaching {
            // Not before the cluster agreed to it.
            disk = DiskState::Diskless;
        }
        StateWord(0)
            .with_role(st.role)
            .with_peer(st.peer_role(n))
            .with_conn(conn)
            .with_disk(disk)
            .with_pdsk(p.map_or(DiskState::DUnknown, |p| p.pdsk))
            .with_susp(st.susp_user || st.susp_quorum || st.susp_uuid)
            .with_aftr_isp(p.is_some_and(|p| p.pause.after()))
            .with_peer_isp(p.is_some_and(|p| p.pause.peer))
            .with_user_isp(p.is_some_and(|p| p.pause.user))
            .with_susp_nod(st.susp_nod)
            .with_susp_fen(st.susp_fen)
            .with_quorum(st.devs.get(&v).is_some_and(|d| d.quorum))
    }

    pub(crate) fn send_state(&mut self, n: NodeId, v: VolumeNr) {
        let word = self.state_word(&self.st, n, v);
        self.send_data(n, Some(v), Packet::State(word));
    }

    fn send_states(&mut self, old: &State) {
        for (n, v) in self.st.pds.keys().copied().collect::<Vec<_>>() {
            if !self.st.connected(n) {
                continue;
            }
            let fresh = !old.connected(n);
            // What the peer believes about itself does not interest it.
            let mask = !(StateWord::PEER_MASK | StateWord::PDSK_MASK);
            let changed = (self.state_word(&self.st, n, v).0 ^ self.state_word(old, n, v).0) & mask != 0;
            if fresh || changed {
                self.send_state(n, v);
            }
        }
    }

    fn role_changed(&mut self, old: &State) {
        if self.is_primary() {
            // The stream of this node starts where it stopped; nothing is promised about the front ends yet.
            for v in self.vnrs() {
                if let Some(l) = self.devs.get_mut(&v).and_then(|d| d.ldev.as_mut()) {
                    if !crate::tables::uuid::is_just_created(l.sb.current_uuid) {
                        l.sb.current_uuid |= crate::tables::uuid::PRIMARY_BIT;
                    }
                    self.superblock_changed(v);
                    self.gate_writes_on_superblock(v);
                }
            }
        } else if old.role == Role::Primary {
            for v in self.vnrs() {
                if let Some(d) = self.devs.get_mut(&v) {
                    d.new_uuid_needed = false;
                    if let Some(l) = &mut d.ldev {
                        if !crate::tables::uuid::is_just_created(l.sb.current_uuid) {
                            l.sb.current_uuid &= !crate::tables::uuid::PRIMARY_BIT;
                        }
                        self.superblock_changed(v);
                        self.write_bitmap(v);
                    }
                }
            }
            // "I am Secondary now", for all volumes (`spec/wire-protocol.md` §4.12).
            for n in self.st.connected_mask().iter().collect::<Vec<_>>() {
                self.send_data(n, None, Packet::State(StateWord(0).with_role(Role::Secondary)));
            }
        }
    }

    /// Front ends are there exactly while Primary.
    fn front_ends(&mut self) {
        let want = self.is_primary();
        if want != self.front_end {
            self.front_end = want;
            self.emit(Output::FrontEnd { present: want });
        }
        if !want {
            self.fail_waiting(&crate::io::BlockResult::NotPrimary);
        } else if self.io_must_fail() {
            self.fail_waiting(&crate::io::BlockResult::IoError);
        }
    }

    /// I/O of a Primary fails instead of waiting.
    pub(crate) fn io_must_fail(&self) -> bool {
        self.st.fail_io
            || (self.cfg.resource.on_no_quorum == OnNoQuorum::IoError
                && self.st.devs.values().any(|d| !d.quorum))
    }

    fn emit_events(&mut self, old: &State) {
        let susp = |s: &State| (s.role, s.susp_user, s.susp_nod, s.susp_fen, s.susp_quorum, s.fail_io);
        if susp(old) != susp(&self.st) {
            self.event(Event::Resource);
        }
        for (v, d) in self.st.devs.clone() {
            if old.devs.get(&v) != Some(&d) {
                self.event(Event::Device(v));
            }
        }
        for (n, c) in self.st.conns.clone() {
            if old.conns.get(&n) != Some(&c) {
                self.event(Event::Connection(n));
            }
        }
        for (k, p) in self.st.pds.clone() {
            if old.pds.get(&k) != Some(&p) {
                self.event(Event::PeerDevice(k.0, k.1));
            }
        }
    }

    /// Everything that ends with a connection.
    fn connection_lost(&mut self, n: NodeId, old: &State) {
        let peer_was_primary = old.peer_role(n) == Role::Primary;
        let cstate = self.st.cstate(n);
        let ungraceful = !matches!(cstate, ConnState::Disconnecting | ConnState::TearDown);
        self.writer_lost_peer(n);
        self.replica_lost_peer(n, peer_was_primary);
        self.reads_lost_peer(n);
        self.drop_resync_locks(n);
        for v in self.vnrs() {
            if let Some(p) = self.pds.get_mut(&(n, v)) {
                p.reset_link();
            }
        }
        self.transaction_lost_peer(n);
        if ungraceful && self.members.has(n) {
            self.queue_lost_peer();
        }
        if ungraceful && peer_was_primary {
            for m in self.st.connected_mask().iter().filter(|m| *m != n).collect::<Vec<_>>() {
                let diskful = self.conns.get(&m).is_some_and(|c| c.diskful);
                for v in self.vnrs() {
                    let usable = diskful && self.st.pdsk(m, v) >= DiskState::Consistent;
                    if let Some(p) = self.pds.get_mut(&(m, v)) {
                        p.reconciliation |= usable;
                    }
                }
            }
            // A position told about another Primary, or an earlier life of this one, compares nothing.
            for c in self.conns.values_mut().filter(|c| c.peer_dagtag.is_some_and(|d| d.0 != n)) {
                c.peer_dagtag = None;
            }
            self.reconcile_until = Some(self.now + RECONCILE_MAX);
            self.todo(Todo::Reconcile);
        }
        let call = HandlerCall {
            name: "disconnected",
            vnr: None,
            peer: Some(n),
            cstate: Some(cstate.name()),
            up_to_date_nodes: None,
        };
        self.run_handler(call, AfterHandler::Nothing);
    }

    /// Nodes whose link exists, self included.
    pub(crate) fn reachable(&self) -> NodeMask {
        self.st.connected_mask().with(self.me)
    }
}
