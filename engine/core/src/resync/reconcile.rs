//! The survivors of a lost Primary compare how far they got in its stream (`spec/wire-protocol.md` §10.8).
//!
//! A position must never be told before what it stands for is on stable storage: equal positions end in cleared bits.

use crate::core::{Core, IoTag};
use crate::io::{LogLevel, Output};
use crate::state::State;
use crate::tables::uuid::same;
use crate::types::{NodeId, VolumeNr};
use palisade_wire::enums::{DiskState, ReplState, Role};
use palisade_wire::{Features, Packet, PeerDagtag, UuidFlags};
use std::collections::{BTreeMap, BTreeSet};

/// How far this node got in the stream of a Primary that it lost.
#[derive(Clone, Debug)]
pub(crate) struct LostPosition {
    pub node: NodeId,
    pub dagtag: u64,
    /// Current UUIDs then.
    pub generations: BTreeMap<VolumeNr, u64>,
}

impl Core {
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
        let Some(&LostPosition { node: lost, dagtag, .. }) = self.lost_primary.as_ref() else { return };
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
        let back = self
            .lost_primary
            .as_ref()
            .is_some_and(|l| new.connected(l.node) && new.peer_role(l.node) == Role::Primary);
        if back {
            for p in self.pds.values_mut() {
                p.reconciliation = false;
            }
        }
    }

    /// The position to name in a handshake: of a Primary that is still lost, in the generation that is still the own.
    fn position_to_name(&self, n: NodeId) -> Option<(NodeId, u64)> {
        let l = self.lost_primary.as_ref()?;
        let back = self.st.connected(l.node) && self.st.peer_role(l.node) == Role::Primary;
        let same_data =
            l.generations.iter().all(|(v, u)| self.devs.get(v).is_some_and(|d| same(d.current_uuid(), *u)));
        (l.node != n && !back && same_data).then_some((l.node, l.dagtag))
    }

    /// Before the volumes' packets of a handshake (`ff:RECONCILE_RECONNECT`): survivors that were apart when they lost
    /// the Primary compare how far they got.
    pub(crate) fn name_lost_primary(&mut self, n: NodeId) {
        let position = self.position_to_name(n);
        let Some(c) = self.conns.get_mut(&n) else { return };
        c.position_named = position.filter(|_| c.features.contains(Features::RECONCILE_RECONNECT));
        if let Some((lost, dagtag)) = c.position_named {
            self.send_data(n, None, Packet::PeerDagtag(PeerDagtag { dagtag, node_id: lost.get().into() }));
        }
    }

    pub(crate) fn got_peer_dagtag(&mut self, n: NodeId, lost: u32, dagtag: u64) {
        let Some(lost) = NodeId::from_u32(lost) else { return };
        if !self.st.connected(n) {
            if let Some(c) = self.conns.get_mut(&n) {
                c.position_received = Some((lost, dagtag));
            }
            return;
        }
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
        let Some(&LostPosition { node: lost, dagtag: mine, .. }) = self.lost_primary.as_ref() else { return };
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
