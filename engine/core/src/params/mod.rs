//! The per-volume packets of a handshake and what they say later: sizes, UUIDs, states
//! (`spec/wire-protocol.md` §4.6–4.12, §5.2).
//!
//! This file sends them and hands what arrives to its room; what is for a volume that is not here must never change
//! anything.

mod generations;
mod sizes;
mod states;
mod uuids;

use crate::connection::Veto;
use crate::core::Core;
use crate::io::LogLevel;
use crate::types::{NodeId, NodeMask, VolumeNr};
use bytes::Bytes;
use palisade_wire::enums::ConnState;
use palisade_wire::{Dagtag, Packet, SyncParam, UuidFlags};

impl Core {
    /// The own per-volume packets of a connect attempt, once per attempt.
    pub(crate) fn send_params(&mut self, n: NodeId) {
        // Which generation to show depends on the peer's.
        let unproven = self.pds.iter().any(|((m, v), p)| {
            *m == n && !p.identifiers_received && self.devs.get(v).is_some_and(|d| !d.unproven.is_empty())
        });
        let Some(c) = self.conns.get_mut(&n) else { return };
        if c.params_sent {
            return;
        }
        c.params_held = unproven;
        if unproven {
            return;
        }
        c.params_sent = true;
        self.name_lost_primary(n);
        for v in self.vnrs() {
            self.send_volume_params(n, v);
        }
        self.phase_one();
    }

    /// The peer's identifiers are here.
    fn send_held_params(&mut self, n: NodeId) {
        if self.conns.get(&n).is_some_and(|c| c.params_held) {
            self.send_params(n);
        }
    }

    pub(crate) fn send_volume_params(&mut self, n: NodeId, v: VolumeNr) {
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.tx_seq = 0;
        }
        let r = self.pds.get(&(n, v)).map(|p| p.cfg.rate).unwrap_or_default();
        self.send_data(
            n,
            Some(v),
            Packet::SyncParam89(SyncParam {
                resync_rate: r.resync_rate,
                c_plan_ahead: r.plan_ahead,
                c_delay_target: r.delay_target,
                c_fill_target: r.fill_target,
                c_max_rate: r.max_rate,
                ..SyncParam::default()
            }),
        );
        self.send_sizes(n, v);
        self.send_uuids(n, v, UuidFlags::NONE, 0);
        let word = self.state_word(&self.st, n, v);
        self.send_data(n, Some(v), Packet::State(word));
    }

    /// Every packet that belongs to a volume (or is not about the connection itself).
    pub(crate) fn volume_packet(
        &mut self,
        n: NodeId,
        volume: Option<VolumeNr>,
        packet: Packet,
        digest: &Bytes,
        data: Bytes,
    ) {
        // Connection-scoped packets of the data path.
        match packet {
            Packet::Barrier(b) => return self.got_barrier(n, b.barrier),
            Packet::BarrierAck(a) => return self.got_barrier_ack(n, a.barrier, a.set_size),
            Packet::ConfirmStable(c) => return self.got_confirm_stable(n, &c),
            Packet::PeerAck(a) => return self.got_peer_ack(n, NodeMask(a.mask), a.dagtag),
            Packet::Dagtag(Dagtag { dagtag }) => {
                if let Some(c) = self.conns.get_mut(&n) {
                    c.rx_dagtag = dagtag;
                }
                return;
            }
            Packet::PeerDagtag(d) => return self.got_peer_dagtag(n, d.node_id, d.dagtag),
            Packet::FlushRequests(f) => return self.got_flush_requests(n, f.flush_sequence),
            Packet::FlushForward(f) => {
                return self.got_flush_forward(n, f.flush_sequence, f.initiator_node_id);
            }
            Packet::FlushRequestsAck(f) => return self.got_flush_ack(n, f.flush_sequence, f.primary_node_id),
            Packet::UnplugRemote | Packet::DelayProbe(_) => return,
            _ => {}
        }
        let known = volume.filter(|v| self.pds.contains_key(&(n, *v)));
        let Some(v) = known else {
            // Configuration for a volume that is not here is drained (`spec/wire-protocol.md` §7.2).
            let config = matches!(
                packet,
                Packet::SyncParam89(_)
                    | Packet::Sizes(_)
                    | Packet::Uuids110(_)
                    | Packet::State(_)
                    | Packet::CurrentUuid(_)
                    | Packet::EnableReplicationNext(_)
            );
            if !config {
                self.drop_link(n, ConnState::ProtocolError, "packet for an unknown volume");
            }
            return;
        };
        match packet {
            Packet::SyncParam89(s) => self.got_sync_param(n, &s),
            Packet::Sizes(s) => self.got_sizes(n, v, &s),
            Packet::Uuids110(u) => self.got_uuids(n, v, &u),
            Packet::CurrentUuid(u) => self.got_current_uuid(n, v, &u),
            Packet::State(w) => self.got_state(n, v, w),
            Packet::Bitmap => self.got_plain_bitmap(n, v, &data),
            Packet::CompressedBitmap(c) => self.got_compressed_bitmap(n, v, c.encoding, &data),
            other => self.data_packet(n, v, other, digest, data),
        }
    }

    fn got_sync_param(&mut self, n: NodeId, s: &SyncParam) {
        if !s.csums_alg.is_empty() && !self.st.connected(n) {
            self.veto_all(
                n,
                Veto::Disconnect,
                "the peer configures csums-alg and this node does not; make it equal",
            );
        }
    }

    fn veto(&mut self, n: NodeId, v: VolumeNr, veto: Veto, why: &str) {
        let scope = self.scope(Some(n), Some(v));
        self.log(LogLevel::Error, scope, why);
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.veto = Some(veto);
        }
        self.phase_one();
    }

    fn veto_all(&mut self, n: NodeId, veto: Veto, why: &str) {
        if let Some(v) = self.vnrs().first() {
            self.veto(n, *v, veto, why);
        }
    }
}
