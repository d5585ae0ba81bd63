//! How a resync ends at the target: flushes of the Primaries, a ping to the source, the own flush, new identifiers
//! (`spec/state-machine.md` §11.6, `spec/wire-protocol.md` §10.7).
//!
//! A disk must never be called UpToDate before what was resynced is on stable storage, nor while somebody may still
//! send a write that came before.

use super::Ending;
use crate::core::{AfterHandler, Core, IoTag, Todo};
use crate::io::{HandlerCall, LogLevel, Output};
use crate::tables::uuid::{TargetFinished, same};
use crate::types::{NodeId, NodeMask, VolumeNr};
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role};
use palisade_wire::{FlushAck, FlushForward, FlushRequests, Packet, UuidFlags};
use std::collections::BTreeSet;

impl Core {
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
        // The data is the source's now, the position is not.
        self.lost_primary = None;
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

    pub(super) fn request_flushes(&mut self, n: NodeId, v: VolumeNr) {
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
}
