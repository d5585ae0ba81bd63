//! What must be true of the whole cluster (design §3), seen from outside of the cores.

use crate::front::show_stamp;
use crate::node::VOLUME;
use crate::world::World;
use palisade_core::status::PeerDeviceStatus;
use palisade_core::types::NodeId;
use palisade_wire::enums::{DiskState, ReplState};

fn id(n: usize) -> NodeId {
    NodeId::from_u32(n as u32).unwrap_or_else(|| unreachable!("a cluster has at most 32 nodes"))
}

impl World {
    /// Nothing is on its way on any link and no disk or front end is busy.
    #[must_use]
    pub fn idle(&self) -> bool {
        self.nodes.iter().all(|n| n.ios.is_empty() && n.requests.is_empty())
            && self.links.values().filter_map(|l| l.session.as_ref()).all(|s| {
                s.stalled.iter().all(Vec::is_empty) && s.last.as_flattened().iter().all(|t| *t <= self.now)
            })
    }

    /// What `a` believes about its volume towards `b`.
    #[must_use]
    pub fn peer_device(&self, a: usize, b: usize) -> Option<PeerDeviceStatus> {
        let s = self.core(a)?.status();
        s.connections.into_iter().find(|c| c.peer == id(b))?.peer_devices.into_iter().next()
    }

    fn sees_equal(&self, a: usize, b: usize) -> bool {
        self.core(a).is_some_and(|c| {
            let s = c.state();
            s.disk(VOLUME) == DiskState::UpToDate
                && s.connected(id(b))
                && s.repl(id(b), VOLUME) == ReplState::Established
                && s.pdsk(id(b), VOLUME) == DiskState::UpToDate
        })
    }

    /// Replicas that claim to be equal are equal: connected, both UpToDate, no bits either way, nothing under way.
    pub fn compare_replicas(&mut self) {
        if !self.dirty || self.failure.is_some() || !self.idle() {
            return;
        }
        self.dirty = false;
        let keys: Vec<_> = self.links.keys().copied().collect();
        for (a, b) in keys {
            if !self.sees_equal(a, b) || !self.sees_equal(b, a) {
                continue;
            }
            let clean = |x: Option<PeerDeviceStatus>| {
                x.is_some_and(|p| p.out_of_sync_kib == 0 && p.pending == 0 && p.unacked == 0)
            };
            if !clean(self.peer_device(a, b)) || !clean(self.peer_device(b, a)) {
                continue;
            }
            let (x, y) = (&self.nodes[a].data.current, &self.nodes[b].data.current);
            let wrong = x.iter().zip(y).position(|(p, q)| p != q);
            if let Some(s) = wrong {
                let count = x.iter().zip(y).filter(|(p, q)| p != q).count();
                let text = format!(
                    "silent divergence: sector {s} is {} on {} and {} on {} ({count} sectors differ)",
                    show_stamp(x[s]),
                    self.name(a),
                    show_stamp(y[s]),
                    self.name(b)
                );
                self.fail(text);
                return;
            }
        }
    }

    /// Every node runs, every connection is up, every disk is UpToDate and nothing is out of sync.
    #[must_use]
    pub fn all_up_to_date(&self) -> bool {
        (0..self.nodes.len()).all(|a| {
            let Some(c) = self.core(a) else { return false };
            let st = c.state();
            let own = if self.nodes[a].diskful() { DiskState::UpToDate } else { DiskState::Diskless };
            st.disk(VOLUME) == own
                && (0..self.nodes.len())
                    .filter(|b| *b != a && !self.nodes[a].config.unconfigured.contains(b))
                    .all(|b| {
                        let peer =
                            if self.nodes[b].diskful() { DiskState::UpToDate } else { DiskState::Diskless };
                        st.connected(id(b))
                            && st.repl(id(b), VOLUME) == ReplState::Established
                            && st.pdsk(id(b), VOLUME) == peer
                            && self.peer_device(a, b).is_none_or(|p| p.out_of_sync_kib == 0)
                    })
        })
    }

    /// A node connected with `n` that has current data and sees no other need to resync than `n`'s.
    #[must_use]
    pub fn another_current(&self, n: usize) -> bool {
        self.core(n).is_some_and(|c| {
            (0..self.nodes.len()).any(|m| {
                m != n
                    && c.state().connected(id(m))
                    && c.state().repl(id(m), VOLUME) == ReplState::Established
                    && self.core(m).is_some_and(|c| c.state().disk(VOLUME) == DiskState::UpToDate)
            })
        })
    }

    /// Every running node has finished what it was told: no command and no request unanswered.
    #[must_use]
    pub fn all_answered(&self) -> bool {
        self.nodes.iter().all(|n| n.commands.is_empty() && n.requests.is_empty())
    }

    /// Bounds on what a node keeps for its front ends and peers.
    pub fn check_bounds(&mut self) {
        for n in 0..self.nodes.len() {
            let Some(c) = self.core(n) else { continue };
            let s = c.status();
            let device = s.devices.iter().map(|d| d.upper_pending.max(d.lower_pending)).max().unwrap_or(0);
            let peers = s.connections.iter().flat_map(|c| &c.peer_devices);
            let peer = peers.map(|p| p.pending.max(p.unacked)).max().unwrap_or(0);
            if device.max(peer) > 10_000 {
                let text = format!("{}: a queue counts {device} or {peer} entries", self.name(n));
                self.fail(text);
            }
        }
    }
}
