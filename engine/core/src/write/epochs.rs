//! Epochs, barriers and peer-acks: when a completed write may be forgotten (`spec/wire-protocol.md` §9.4, §9.5, §9.9).
//!
//! A write is never forgotten, and its extents never cool down, before every peer has confirmed it as stable or is
//! known to lack it.

use super::Leg;
use crate::core::{Core, Todo};
use crate::device::Ldev;
use crate::types::{NodeId, NodeMask, Time, VolumeNr};
use palisade_wire::enums::ConnState;
use palisade_wire::{ConfirmStable, Packet, PeerAck};

impl Core {
    pub(crate) fn got_barrier_ack(&mut self, n: NodeId, barrier: u32, set_size: u32) {
        let number = barrier.swap_bytes();
        let Some(c) = self.conns.get_mut(&n) else { return };
        let ok = c.sent_epochs.front().is_some_and(|e| {
            e.barrier_sent && e.number == number && e.writes.len() - e.confirmed == set_size as usize
        });
        if !ok {
            self.drop_link(n, ConnState::ProtocolError, "P_BARRIER_ACK out of order or with a wrong count");
            return;
        }
        let Some(e) = c.sent_epochs.pop_front() else { return };
        for id in e.writes {
            self.leg_settled(n, id);
        }
        self.barrier_acked(n, number);
        self.advance_transfer_log();
    }

    pub(crate) fn got_confirm_stable(&mut self, n: NodeId, c: &ConfirmStable) {
        let Some(conn) = self.conns.get_mut(&n) else { return };
        let Some(e) = conn.sent_epochs.front_mut() else {
            self.drop_link(n, ConnState::ProtocolError, "P_CONFIRM_STABLE without writes");
            return;
        };
        let from = e.confirmed;
        let to = from + c.set_size as usize;
        let ok = c.set_size > 0
            && e.writes.get(from) == Some(&c.oldest_block_id)
            && e.writes.get(to - 1) == Some(&c.youngest_block_id);
        if !ok {
            self.drop_link(
                n,
                ConnState::ProtocolError,
                "P_CONFIRM_STABLE out of order or with a wrong count",
            );
            return;
        }
        e.confirmed = to;
        let writes: Vec<u64> = e.writes.get(from..to).unwrap_or_default().to_vec();
        for id in writes {
            self.leg_settled(n, id);
        }
        self.advance_transfer_log();
        self.flush_peer_acks();
    }

    /// The peer has the write on stable storage (or reported that it failed).
    fn leg_settled(&mut self, n: NodeId, id: u64) {
        if let Some(l) = self.requests.get_mut(&id).and_then(|r| r.peers.iter_mut().find(|l| l.node == n)) {
            if l.leg == Leg::Pending {
                l.leg = Leg::Ok;
            }
            l.settled = true;
        }
        self.maybe_complete(id);
        self.settle_request(id);
    }

    /// Forgets a write that is settled everywhere; its extents may cool down.
    pub(super) fn settle_request(&mut self, id: u64) {
        let Some(r) = self.requests.get(&id) else { return };
        let settled =
            r.submitted && r.completed && r.local != Some(Leg::Pending) && r.peers.iter().all(|l| l.settled);
        if !settled {
            return;
        }
        let Some(r) = self.requests.remove(&id) else { return };
        let mut mask = NodeMask::EMPTY;
        let mut sent = NodeMask::EMPTY;
        if r.local == Some(Leg::Ok) {
            mask = mask.with(self.me);
        }
        for l in &r.peers {
            if l.leg == Leg::Ok {
                mask = mask.with(l.node);
            }
            // Whoever refused it, or had it on an earlier link, does not wait for its peer-ack.
            if !matches!(l.leg, Leg::Lost | Leg::Failed) && !l.gone {
                sent = sent.with(l.node);
            }
        }
        if let Some(d) = self.devs.get_mut(&r.vnr) {
            if r.al_held
                && let Some(l) = &mut d.ldev
            {
                l.al.put(Ldev::extents(r.sector, r.len));
            }
            self.todo(Todo::Kick(r.vnr));
        }
        if let Ok(i) = self.transfer_log.binary_search_by_key(&r.dagtag, |e| e.dagtag)
            && let Some(e) = self.transfer_log.get_mut(i)
        {
            debug_assert_eq!(e.id, id);
            e.settled = Some((mask, sent));
        }
        self.advance_transfer_log();
    }

    /// Peer-acks go out in the order of the stream (`spec/wire-protocol.md` §9.9).
    fn advance_transfer_log(&mut self) {
        while let Some((mask, sent)) = self.transfer_log.front().and_then(|e| e.settled) {
            let Some(e) = self.transfer_log.pop_front() else { break };
            if self.peer_acks.mask != mask && !self.peer_acks.last.is_empty() {
                self.flush_peer_acks();
            }
            self.peer_acks.mask = mask;
            self.peer_acks.sectors += e.sectors;
            for n in sent.iter() {
                self.peer_acks.last.insert(n, e.dagtag);
            }
            if self.peer_acks.since.is_none() && !self.peer_acks.last.is_empty() {
                self.peer_acks.since = Some(self.now);
            }
            if self.peer_acks.sectors >= self.cfg.resource.peer_ack_window_sectors {
                self.flush_peer_acks();
            }
        }
        self.answer_flush_requests();
    }

    pub(crate) fn flush_peer_acks(&mut self) {
        let batch = std::mem::take(&mut self.peer_acks);
        for (n, dagtag) in batch.last {
            self.send_control(n, None, Packet::PeerAck(PeerAck { mask: batch.mask.0, dagtag }));
        }
    }

    pub(crate) fn peer_ack_deadline(&self) -> Option<Time> {
        self.peer_acks.since.map(|t| t + self.cfg.resource.peer_ack_delay)
    }

    pub(crate) fn peer_ack_timer(&mut self) {
        if self.peer_ack_deadline().is_some_and(|t| self.now >= t) {
            self.flush_peer_acks();
            self.answer_flush_requests();
        }
    }

    /// Writes were sent to the peer and it did not confirm them.
    pub(crate) fn has_unconfirmed(&self, n: NodeId, v: VolumeNr) -> bool {
        self.requests
            .values()
            .any(|r| r.vnr == v && r.submitted && r.peers.iter().any(|l| l.node == n && !l.settled))
    }

    pub(crate) fn oldest_unacked(&self, n: NodeId) -> Option<Time> {
        self.conns.get(&n)?.sent_epochs.front().map(|e| e.since)
    }
}
