//! Cluster-wide changes: two-phase commit, as initiator and as participant
//! (`spec/state-machine.md` §6, `spec/wire-protocol.md` §5.4).
//!
//! An [`Operation`] is something this node wants (promote, connect, ...). Operations run one after the other. One
//! that concerns the cluster becomes a [`Transaction`]; so does one another node started. There is at most one
//! transaction at a time.
//!
//! Here are their types, and what initiator and participant have in common. A lost link or a timeout must never be
//! taken for an agreement.

mod initiator;
mod operations;
mod participant;

use crate::core::Core;
use crate::io::{AdminId, LogLevel};
use crate::tables::refusal::Refusal;
use crate::types::{NodeId, NodeMask, Time, VolumeNr};
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role};
use palisade_wire::{StateWord, TwopcFlags};

/// Finished transactions remembered, to tell late packets.
const FINISHED_MAX: usize = 64;

/// What a graceful disconnect offers (`spec/state-machine.md` §7.4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Offer {
    Nothing,
    OutdateSelf,
    OutdatePeer,
}

/// A change that may concern the whole cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Change {
    Promote {
        up_to_date: bool,
        outdate_peers: bool,
    },
    Demote {
        force: bool,
    },
    Connect(NodeId),
    Disconnect(NodeId, Offer),
    /// Attaching -> Negotiating.
    Negotiate(VolumeNr),
    Detach(VolumeNr),
    Resync {
        peer: NodeId,
        vnr: VolumeNr,
        to: ReplState,
    },
    /// Nothing changes; everybody learns who is there (`spec/state-machine.md` §6.8).
    LostPeer,
}

impl Change {
    fn target(self) -> Option<NodeId> {
        match self {
            Self::Connect(n) | Self::Disconnect(n, _) | Self::Resync { peer: n, .. } => Some(n),
            _ => None,
        }
    }

    fn vnr(self) -> Option<VolumeNr> {
        match self {
            Self::Negotiate(v) | Self::Detach(v) | Self::Resync { vnr: v, .. } => Some(v),
            _ => None,
        }
    }

    /// The change as mask and value, from the initiator's view.
    fn words(self, own_role: Role) -> (StateWord, StateWord) {
        let z = StateWord(0);
        match self {
            Self::Promote { up_to_date, .. } => {
                let (m, v) = (StateWord::ROLE_MASK, z.with_role(Role::Primary));
                if up_to_date {
                    (StateWord(m | StateWord::DISK_MASK), v.with_disk(DiskState::UpToDate))
                } else {
                    (StateWord(m), v)
                }
            }
            Self::Demote { .. } => (StateWord(StateWord::ROLE_MASK), z.with_role(Role::Secondary)),
            Self::Connect(_) => (
                StateWord(StateWord::CONN_MASK | StateWord::ROLE_MASK),
                z.with_conn(ConnState::Connected.as_u8()).with_role(own_role),
            ),
            Self::Disconnect(_, offer) => {
                let v = z.with_conn(ConnState::Disconnecting.as_u8());
                match offer {
                    Offer::Nothing => (StateWord(StateWord::CONN_MASK), v),
                    Offer::OutdateSelf => (
                        StateWord(StateWord::CONN_MASK | StateWord::DISK_MASK),
                        v.with_disk(DiskState::Outdated),
                    ),
                    Offer::OutdatePeer => (
                        StateWord(StateWord::CONN_MASK | StateWord::PDSK_MASK),
                        v.with_pdsk(DiskState::Outdated),
                    ),
                }
            }
            Self::Negotiate(_) => (StateWord(StateWord::DISK_MASK), z.with_disk(DiskState::Negotiating)),
            Self::Detach(_) => (StateWord(StateWord::DISK_MASK), z.with_disk(DiskState::Detaching)),
            Self::Resync { to, .. } => (StateWord(StateWord::CONN_MASK), z.with_conn(to.as_u8())),
            Self::LostPeer => (z, z),
        }
    }
}

/// Where an operation is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// Not begun, or to be tried again.
    Begin,
    /// Waiting for answers to pings, so that a dead peer is noticed before the decision.
    Pinging { until: Time },
    /// Waiting for disks to become more than Consistent.
    Settling { until: Time },
    /// Its transaction is under way.
    Running,
    /// Again at this time.
    Later(Time),
}

/// Something this node wants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operation {
    pub change: Change,
    pub admin: Option<AdminId>,
    pub stage: Stage,
    pub force: bool,
    pub tries: u32,
    /// Whole attempts of a promotion (§7.1: at most 4).
    pub attempts: u32,
    pub started: Time,
}

/// A transaction in progress.
#[derive(Debug)]
pub(crate) struct Transaction {
    pub tid: u32,
    pub initiator: NodeId,
    pub target: Option<NodeId>,
    pub vnr: Option<VolumeNr>,
    pub mask: StateWord,
    pub val: StateWord,
    /// This node's own operation.
    pub own: Option<Change>,
    /// Whom this node answers.
    pub parents: NodeMask,
    /// Told PREPARE, and not answered yet.
    pub waiting: NodeMask,
    pub told: NodeMask,
    /// What went into the forwarded PREPARE.
    pub nodes_to_reach: NodeMask,
    pub reply: Reply,
    pub retry: bool,
    pub refused: Option<NodeId>,
    /// Local evaluation said no.
    pub local_no: bool,
    /// The answer given to the parents.
    pub answered: Option<Answer>,
    pub deadline: Time,
    pub started: Time,
    /// A commit is on its way through the connect handshake.
    pub waits_for_params: bool,
}

/// What is aggregated.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Reply {
    pub reachable: NodeMask,
    pub target_reachable: NodeMask,
    pub primary: NodeMask,
    pub weak: NodeMask,
}

/// A participant's answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    Yes,
    No,
    Retry,
}

impl Core {
    /// The members are whoever takes part (`spec/state-machine.md` §6.7).
    fn update_members(&mut self, reachable: NodeMask) {
        let quorate = self.st.devs.values().all(|d| d.quorum)
            || self.st.connected_mask().iter().any(|n| {
                self.st.devs.keys().all(|v| self.st.pds.get(&(n, *v)).is_some_and(|p| p.peer_quorum))
            });
        if quorate && !reachable.is_empty() {
            self.members = NodeMask(reachable.0 & u64::from(u32::MAX)).with(self.me);
        }
    }

    /// Remembers a finished transaction.
    fn remember(&mut self, initiator: NodeId, tid: u32) {
        self.finished_tids.push_back((initiator.get(), tid));
        while self.finished_tids.len() > FINISHED_MAX {
            self.finished_tids.pop_front();
        }
    }

    /// There is a Primary this node cannot reach: own data will be superseded (§6.7).
    fn outdate_if_cut_off(&mut self, primary: NodeMask, incapable: bool) {
        let far = NodeMask(primary.0 & u64::from(u32::MAX)).and(self.reachable().not());
        if far.is_empty() || incapable || self.is_primary() {
            return;
        }
        self.force("far-away", |s| {
            for d in s.devs.values_mut().filter(|d| d.disk > DiskState::Outdated) {
                d.disk = DiskState::Outdated;
            }
        });
    }

    /// Commit of the empty transaction (§6.7).
    fn commit_lost_peer(&mut self, initiator: NodeId, primary: NodeMask, incapable: bool) {
        if self.is_primary() {
            if initiator != self.me && !self.st.connected(initiator) {
                self.force("lost-peer", |s| {
                    for ((n, _), p) in &mut s.pds {
                        if *n == initiator && p.pdsk > DiskState::Outdated {
                            p.pdsk = DiskState::Outdated;
                        }
                    }
                });
            }
            return;
        }
        let far = NodeMask(primary.0 & u64::from(u32::MAX)).and(self.reachable().not());
        if !far.is_empty() && !incapable {
            // The Primary is not lost, only this node is.
            for p in self.pds.values_mut() {
                p.reconciliation = false;
            }
            self.outdate_if_cut_off(primary, incapable);
            return;
        }
        let reconciling: Vec<VolumeNr> =
            self.pds.iter().filter(|(_, p)| p.reconciliation).map(|((_, v), _)| *v).collect();
        let may: Vec<VolumeNr> = self.vnrs().into_iter().filter(|v| !reconciling.contains(v)).collect();
        let other_generation: Vec<VolumeNr> = self
            .pds
            .iter()
            .filter(|((n, v), p)| {
                self.st.connected(*n)
                    && self.st.peer_role(*n) == Role::Primary
                    && self.st.pdsk(*n, *v) == DiskState::Diskless
                    && p.peer_exposed.is_some_and(|u| {
                        self.devs.get(v).is_none_or(|d| !crate::tables::uuid::same(u, d.current_uuid()))
                    })
            })
            .map(|((_, v), _)| *v)
            .collect();
        self.force("lost-peer", |s| {
            for (v, d) in &mut s.devs {
                if d.disk == DiskState::Consistent && may.contains(v) && !other_generation.contains(v) {
                    d.disk = DiskState::UpToDate;
                }
            }
        });
    }

    /// A link of the running transaction is gone (§6.4).
    pub(crate) fn transaction_lost_peer(&mut self, n: NodeId) {
        let Some(t) = &mut self.transaction else { return };
        let was_parent = t.parents.has(n);
        t.parents = t.parents.without(n);
        let was_waiting = t.waiting.has(n);
        t.told = t.told.without(n);
        t.waiting = t.waiting.without(n);
        if t.own.is_some() {
            if was_waiting || t.target == Some(n) {
                t.retry = true;
            }
            self.phase_one();
            return;
        }
        if was_waiting {
            t.retry = true;
        }
        if was_parent && t.parents.is_empty() {
            self.transaction_aborts();
            return;
        }
        self.phase_one();
    }

    /// A participant gives up: nobody will tell the verdict.
    fn transaction_aborts(&mut self) {
        let Some(t) = self.transaction.take() else { return };
        self.remember(t.initiator, t.tid);
        self.send_verdict(&t, false, TwopcFlags::NONE);
        if t.waits_for_params {
            self.connect_aborted(t.initiator);
        }
    }

    pub(crate) fn transaction_timer(&mut self) {
        let Some(t) = &self.transaction else { return };
        if self.now < t.deadline {
            return;
        }
        let scope = self.scope(None, None);
        let text = format!("Two-phase commit {} timeout", t.tid);
        let own = t.own.is_some();
        self.log(LogLevel::Warn, scope, text);
        if own {
            self.abort_own(Refusal::Timeout);
        } else {
            self.transaction_aborts();
        }
    }
}
