//! Cluster-wide changes: two-phase commit, as initiator and as participant
//! (`spec/state-machine.md` §6, `spec/wire-protocol.md` §5.4).
//!
//! An [`Operation`] is something this node wants (promote, connect, ...). Operations run one after the other. One
//! that concerns the cluster becomes a [`Transaction`]; so does one another node started. There is at most one
//! transaction at a time.

use crate::connection::{Phase, Veto};
use crate::core::Core;
use crate::io::{AdminId, LogLevel};
use crate::state::{Options, State};
use crate::tables::distances::{self, Distances};
use crate::tables::refusal::Refusal;
use crate::types::{NodeId, NodeMask, Time, VolumeNr};
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role};
use palisade_wire::{Packet, StateWord, TwopcBody, TwopcFlags, TwopcReply, TwopcRequest};
use std::time::Duration;

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
    pub(crate) fn queue_operation(&mut self, change: Change, admin: Option<AdminId>, force: bool) {
        self.operations.push_back(Operation {
            change,
            admin,
            stage: Stage::Begin,
            force,
            tries: 0,
            attempts: 0,
            started: self.now,
        });
    }

    pub(crate) fn queue_lost_peer(&mut self) {
        let waiting =
            self.operations.iter().any(|o| o.change == Change::LostPeer && o.stage != Stage::Running);
        if !waiting {
            self.queue_operation(Change::LostPeer, None, false);
        }
    }

    /// Starts what can start. Returns whether something was done.
    pub(crate) fn run_operations(&mut self) -> bool {
        if self.transaction.is_some() {
            return false;
        }
        for i in 0..self.operations.len() {
            let Some(op) = self.operations.get(i) else { break };
            let due = match op.stage {
                Stage::Begin => true,
                Stage::Later(t) | Stage::Pinging { until: t } | Stage::Settling { until: t } => {
                    self.now >= t || self.stage_over(op.stage)
                }
                Stage::Running => false,
            };
            if due && let Some(op) = self.operations.remove(i) {
                self.step(op);
                return true;
            }
            // A promotion or demotion that waits is not overtaken by another role change, but lets
            // connections, lost peers and disks change meanwhile: it waits for exactly those.
        }
        false
    }

    fn stage_over(&self, s: Stage) -> bool {
        match s {
            Stage::Pinging { .. } => {
                self.conns.values().all(|c| c.ping_sent.is_none() || !self.st.connected(c.peer))
            }
            Stage::Settling { .. } => !self.unsettled(),
            _ => false,
        }
    }

    /// Some disk will soon be more or less than Consistent (`spec/state-machine.md` §7.1).
    fn unsettled(&self) -> bool {
        self.st.devs.values().any(|d| matches!(d.disk, DiskState::Consistent | DiskState::Negotiating))
            || self.st.pds.iter().any(|((n, _), p)| {
                self.st.connected(*n)
                    && (p.pdsk == DiskState::Consistent
                        || p.repl == ReplState::WFBitMapT
                        || p.repl == ReplState::WFBitMapS)
            })
            || self.pds.values().any(|p| p.reconciliation)
            || self.operations.iter().any(|o| o.change == Change::LostPeer)
    }

    fn step(&mut self, mut op: Operation) {
        match op.change {
            Change::Promote { .. } => match op.stage {
                Stage::Begin => {
                    let until = self.ping_all();
                    op.stage = Stage::Pinging { until };
                    self.operations.push_front(op);
                }
                Stage::Pinging { .. } if self.unsettled() && op.attempts == 0 => {
                    let wait = self.cfg.resource.auto_promote_timeout + Duration::from_millis(500);
                    op.stage = Stage::Settling { until: self.now + wait };
                    self.operations.push_front(op);
                }
                _ if self.orphans() => {
                    op.stage = Stage::Later(self.now + Duration::from_millis(10));
                    self.operations.push_front(op);
                }
                _ => self.attempt(op),
            },
            Change::Demote { force } => self.step_demote(op, force),
            Change::Connect(n) => self.step_connect(op, n),
            _ => self.attempt(op),
        }
    }

    /// Writes of a lost link are still on their way to the disk: nothing new may overtake them, neither a
    /// resync nor a Primary.
    fn orphans(&self) -> bool {
        self.peer_requests.values().any(|r| r.orphan)
    }

    /// Pings every connected peer; returns when the last answer is due.
    fn ping_all(&mut self) -> Time {
        let mut until = self.now;
        for n in self.st.connected_mask().iter().collect::<Vec<_>>() {
            self.ping(n);
            if let Some(c) = self.conns.get(&n) {
                until = until.max(self.now + c.net.ping_timeout);
            }
        }
        until
    }

    /// Drains application writes, then demotes.
    fn step_demote(&mut self, mut op: Operation, force: bool) {
        if !self.is_primary() {
            self.answer(op.admin, Ok(()));
            return;
        }
        let busy = !force
            && (!self.requests.is_empty()
                || !self.transfer_log.is_empty()
                || self.devs.values().any(|d| d.app_pending > 0));
        let in_use = self.devs.values().any(|d| d.openers_rw > 0);
        if in_use && !force {
            self.answer(op.admin, Err(Refusal::DeviceInUse.into()));
            return;
        }
        if force && in_use {
            self.force("demote", |s| s.fail_io = true);
        }
        if force {
            self.fail_all_requests();
        }
        if busy && self.now.since(op.started) > self.cfg.resource.twopc_timeout * 2 {
            self.conclude(op, Err(Refusal::Timeout));
            return;
        }
        if busy {
            self.flush_peer_acks();
            self.close_epoch();
            op.stage = Stage::Later(self.now + Duration::from_millis(20));
            self.operations.push_front(op);
            return;
        }
        self.attempt(op);
    }

    fn step_connect(&mut self, mut op: Operation, n: NodeId) {
        let Some(c) = self.conns.get(&n) else { return };
        if c.phase != Phase::Ready && c.phase != Phase::Protocol || self.st.cstate(n) != ConnState::Connecting
        {
            return;
        }
        if self.orphans() {
            op.stage = Stage::Later(self.now + Duration::from_millis(10));
            self.operations.push_back(op);
            return;
        }
        // A generation being created while UUIDs are exchanged would void the handshake.
        if self
            .st
            .devs
            .keys()
            .any(|v| self.devs.get(v).and_then(|d| d.ldev.as_ref()).is_some_and(|l| !l.meta.then.is_empty()))
        {
            op.stage = Stage::Later(self.now + Duration::from_millis(10));
            self.operations.push_back(op);
            return;
        }
        self.attempt(op);
    }

    /// The change on the local states.
    fn apply(me: &Core, s: &mut State, change: Change) {
        match change {
            Change::Promote { up_to_date, outdate_peers } => {
                s.role = Role::Primary;
                if up_to_date {
                    for v in me.st.devs.keys() {
                        let nobody = !me.st.peers_of(*v).any(|(n, p)| {
                            me.st.connected(n)
                                && p.pdsk == DiskState::UpToDate
                                && p.repl >= ReplState::Established
                        });
                        if let Some(d) = s.devs.get_mut(v)
                            && nobody
                            && d.disk >= DiskState::Inconsistent
                        {
                            d.disk = DiskState::UpToDate;
                        }
                    }
                }
                if outdate_peers {
                    for ((n, _), p) in &mut s.pds {
                        if !me.st.connected(*n) && p.pdsk == DiskState::DUnknown {
                            p.pdsk = DiskState::Outdated;
                        }
                    }
                }
            }
            Change::Demote { .. } => s.role = Role::Secondary,
            Change::Connect(n) => me.apply_connect(s, n),
            Change::Disconnect(n, offer) => {
                if let Some(c) = s.conns.get_mut(&n) {
                    c.cstate = ConnState::Disconnecting;
                }
                match offer {
                    Offer::Nothing => {}
                    Offer::OutdateSelf => {
                        for d in s.devs.values_mut().filter(|d| d.disk > DiskState::Outdated) {
                            d.disk = DiskState::Outdated;
                        }
                    }
                    Offer::OutdatePeer => {
                        for ((m, _), p) in &mut s.pds {
                            if *m == n && p.pdsk > DiskState::Outdated {
                                p.pdsk = DiskState::Outdated;
                            }
                        }
                    }
                }
            }
            Change::Negotiate(v) => {
                if let Some(d) = s.devs.get_mut(&v) {
                    d.disk = DiskState::Negotiating;
                }
            }
            Change::Detach(v) => {
                if let Some(d) = s.devs.get_mut(&v) {
                    d.disk = DiskState::Detaching;
                }
            }
            Change::Resync { peer, vnr, to } => {
                if let Some(p) = s.pds.get_mut(&(peer, vnr)) {
                    p.repl = to;
                }
            }
            Change::LostPeer => {}
        }
    }

    /// Applies the verdict of the handshake of every volume (`spec/state-machine.md` §7.3).
    fn apply_connect(&self, s: &mut State, n: NodeId) {
        if let Some(c) = s.conns.get_mut(&n) {
            c.cstate = ConnState::Connected;
            c.peer_role = self.conns.get(&n).map_or(Role::Unknown, |c| c.peer_role_hint);
        }
        for ((m, v), p) in &self.pds {
            if *m != n {
                continue;
            }
            let Some(neg) = p.negotiated else { continue };
            if let Some(x) = s.pds.get_mut(&(n, *v)) {
                x.repl = neg.repl;
                x.pdsk = neg.pdsk;
                x.pause.peer = neg.peer_pause;
                x.peer_quorum = neg.peer_quorum;
            }
            if let (Some(d), Some(disk)) = (s.devs.get_mut(v), neg.own_disk) {
                d.disk = disk;
            }
        }
    }

    fn options(change: Change) -> Options {
        Options { ignore_openers: matches!(change, Change::Demote { force: true }), ..Options::default() }
    }

    fn attempt(&mut self, mut op: Operation) {
        let change = op.change;
        let target = change.target();
        if let Some(t) = target
            && !matches!(change, Change::Connect(_))
            && !self.st.connected(t)
        {
            self.conclude(op, Err(Refusal::NeedConnection));
            return;
        }
        // Local evaluation. A connect is evaluated when the handshake is complete.
        if !matches!(change, Change::Connect(_))
            && let Err(r) = self.would(Self::options(change), |s| Self::apply(self, s, change))
        {
            self.refused(op, r);
            return;
        }
        let mut direct = self.st.connected_mask();
        if let Some(t) = target {
            direct = direct.with(t);
        }
        if direct.is_empty() {
            self.commit_local(change);
            if matches!(change, Change::LostPeer) {
                self.members = self.me.mask();
                self.commit_lost_peer(self.me, NodeMask::EMPTY, true);
                self.recalc("lost-peer");
            }
            self.conclude(op, Ok(()));
            return;
        }
        let tid = self.rng.tid();
        let (mask, val) = change.words(self.st.role);
        let mut reply = Reply { reachable: self.reachable(), ..Reply::default() };
        match change {
            Change::Connect(n) => reply.reachable = reply.reachable.with(n),
            Change::Disconnect(n, _) => {
                reply.reachable = reply.reachable.without(n);
                reply.target_reachable = n.mask();
            }
            _ => {}
        }
        let to_reach = direct.with(self.me).not();
        op.stage = Stage::Running;
        op.tries += 1;
        self.operations.push_front(op);
        let scope = self.scope(None, change.vnr());
        self.log(
            LogLevel::Info,
            scope,
            format!(
                "Preparing cluster-wide state change {tid}: {}->{} {change:?}",
                self.me,
                target.map_or(-1, |t| i32::from(t.get()))
            ),
        );
        self.transaction = Some(Transaction {
            tid,
            initiator: self.me,
            target,
            vnr: change.vnr(),
            mask,
            val,
            own: Some(change),
            parents: NodeMask::EMPTY,
            waiting: direct,
            told: direct,
            nodes_to_reach: to_reach,
            reply,
            retry: false,
            refused: None,
            local_no: false,
            answered: None,
            deadline: self.now + self.cfg.resource.twopc_timeout,
            started: self.now,
            waits_for_params: matches!(change, Change::Connect(_)),
        });
        for n in direct.iter().collect::<Vec<_>>() {
            self.send_prepare(n);
        }
        if let Change::Connect(n) = change {
            self.send_params(n);
        }
    }

    fn request(&self, t: &Transaction, body: TwopcBody) -> TwopcRequest {
        TwopcRequest {
            tid: t.tid,
            flags: TwopcFlags::HAS_FLAGS.with(TwopcFlags::HAS_REACHABLE, true),
            initiator: t.initiator.get(),
            target: t.target.map(NodeId::get),
            nodes_to_reach: t.nodes_to_reach.0,
            body,
        }
    }

    fn send_prepare(&mut self, n: NodeId) {
        let Some(t) = &self.transaction else { return };
        let p = self.request(t, TwopcBody::State { mask: t.mask, val: t.val });
        let vol = t.vnr.map(|v| v.0);
        self.send_data_vol(n, vol, Packet::TwopcPrepare(p));
        self.ping(n);
    }

    fn send_verdict(&mut self, t: &Transaction, commit: bool, flags: TwopcFlags) {
        let (primary, reachable) = if commit {
            let reach = match t.own {
                Some(Change::Disconnect(..)) => t.reply.target_reachable,
                _ => t.reply.reachable,
            };
            (t.reply.primary.0, reach.0)
        } else {
            (0, 0)
        };
        let mut p = self.request(t, TwopcBody::Verdict { primary_nodes: primary, detail: reachable });
        p.flags |= flags;
        let vol = t.vnr.map(|v| v.0);
        for n in t.told.iter() {
            let packet = if commit { Packet::TwopcCommit(p) } else { Packet::TwopcAbort(p) };
            self.send_data_vol(n, vol, packet);
        }
    }

    /// The initiator looks whether phase 1 is over.
    pub(crate) fn phase_one(&mut self) {
        let Some(t) = &self.transaction else { return };
        let Some(change) = t.own else {
            self.participant_answers();
            return;
        };
        let verdict = if t.retry {
            Some(Err(Refusal::ConcurrentChange))
        } else if let Change::Connect(n) = change
            && let Some(v) = self.connect_veto(n)
        {
            Some(Err(match v {
                Veto::Retry => Refusal::HandshakeRetry,
                Veto::Disconnect => Refusal::HandshakeDisconnect,
            }))
        } else if t.refused.is_some() {
            Some(Err(Refusal::RefusedByPeer))
        } else if t.waiting.is_empty() {
            match change {
                Change::Connect(n) if !self.handshake_ready(n) => None,
                _ => Some(Ok(())),
            }
        } else {
            None
        };
        let Some(verdict) = verdict else { return };
        let verdict = verdict.and_then(|()| self.phase_two_checks(change));
        match verdict {
            Ok(()) => self.commit_own(change),
            Err(r) => self.abort_own(r),
        }
    }

    fn phase_two_checks(&self, change: Change) -> Result<(), Refusal> {
        let Some(t) = &self.transaction else { return Ok(()) };
        if matches!(change, Change::Promote { .. } | Change::Connect(_)) {
            let promoting = matches!(change, Change::Promote { .. });
            let mut primary = t.reply.primary;
            let mut weak = t.reply.weak;
            if promoting || self.is_primary() {
                primary = primary.with(self.me);
                let reach =
                    if let Change::Connect(n) = change { self.reachable().with(n) } else { self.reachable() };
                if self.st.all_data_accessible() && !self.st.devs.is_empty() {
                    weak = weak.or(reach.not());
                }
            }
            let conns = |f: &dyn Fn(&crate::connection::Connection) -> bool| {
                self.conns.values().filter(|c| f(c)).fold(NodeMask::EMPTY, |m, c| m.with(c.peer)).0
            };
            distances::check(&Distances {
                primary_nodes: primary.0,
                weak_nodes: weak.0,
                reachable_nodes: t.reply.reachable.0,
                connections: conns(&|_| true),
                two_primaries: conns(&|c| c.net.two_primaries),
                new_primary_has_disk: self.st.devs.values().any(|d| d.disk > DiskState::Attaching),
            })?;
        }
        self.would(Self::options(change), |s| Self::apply(self, s, change)).map(|_| ())
    }

    fn commit_own(&mut self, change: Change) {
        let Some(mut t) = self.transaction.take() else { return };
        self.remember(t.initiator, t.tid);
        if let Change::Disconnect(..) = change
            && !t.reply.reachable.and(t.reply.target_reachable).is_empty()
        {
            let union = t.reply.reachable.or(t.reply.target_reachable);
            t.reply.reachable = union;
            t.reply.target_reachable = union;
        }
        let becomes = matches!(change, Change::Promote { .. });
        let stays = self.is_primary() && !matches!(change, Change::Demote { .. });
        if becomes || stays {
            t.reply.primary = t.reply.primary.with(self.me);
            let reach =
                if let Change::Connect(n) = change { self.reachable().with(n) } else { self.reachable() };
            if self.st.all_data_accessible() && !self.st.devs.is_empty() {
                t.reply.weak = t.reply.weak.or(reach.not());
            }
        }
        let mut flags = TwopcFlags::NONE;
        if !t.reply.primary.is_empty() && t.reply.weak.is_empty() {
            flags = TwopcFlags::PRI_INCAPABLE;
        }
        let scope = self.scope(None, t.vnr);
        let ms = self.now.since(t.started).as_millis();
        self.log(
            LogLevel::Info,
            &scope,
            format!(
                "State change {}: primary_nodes={:X}, weak_nodes={:X}",
                t.tid, t.reply.primary.0, t.reply.weak.0
            ),
        );
        self.log(LogLevel::Info, scope, format!("Committing cluster-wide state change {} ({ms}ms)", t.tid));
        // On every stream the verdict comes before what follows from it.
        self.send_verdict(&t, true, flags);
        self.commit_local(change);
        let incapable = flags.contains(TwopcFlags::PRI_INCAPABLE);
        self.update_members(t.reply.reachable);
        match change {
            Change::LostPeer => self.commit_lost_peer(self.me, t.reply.primary, incapable),
            _ => self.outdate_if_cut_off(t.reply.primary, incapable),
        }
        self.recalc("commit");
        if let Some(i) = self.operations.iter().position(|o| o.stage == Stage::Running)
            && let Some(op) = self.operations.remove(i)
        {
            self.conclude(op, Ok(()));
        }
    }

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

    fn commit_local(&mut self, change: Change) {
        // The rules were checked in phase 1; what changed since then must not undo a commit.
        let new = {
            let mut s = self.st.clone();
            Self::apply(self, &mut s, change);
            s
        };
        if let Change::Negotiate(v) = change {
            self.negotiate(v);
        }
        self.primary_is_back(&new);
        self.force(tag(change), move |s| *s = new);
        match change {
            Change::Promote { up_to_date, .. } => {
                for c in self.conns.values_mut() {
                    c.discard_my_data = false;
                }
                if up_to_date {
                    let scope = self.scope(None, None);
                    self.log(LogLevel::Warn, scope, "Forced to consider local data as UpToDate!");
                    for v in self.vnrs() {
                        self.new_generation(v, true);
                    }
                }
            }
            Change::Disconnect(n, _) => self.disconnecting(n),
            _ => {}
        }
    }

    fn abort_own(&mut self, r: Refusal) {
        let Some(t) = self.transaction.take() else { return };
        self.remember(t.initiator, t.tid);
        let scope = self.scope(None, t.vnr);
        let ms = self.now.since(t.started).as_millis();
        self.log(
            LogLevel::Info,
            scope,
            format!("Aborting cluster-wide state change {} ({ms}ms) rv = {}", t.tid, r.code()),
        );
        self.send_verdict(&t, false, TwopcFlags::NONE);
        if let Some(i) = self.operations.iter().position(|o| o.stage == Stage::Running)
            && let Some(op) = self.operations.remove(i)
        {
            self.refused(op, r);
        }
    }

    /// An attempt failed: again, or give up (`spec/state-machine.md` §6.3, §7.1, §7.3, §7.4).
    fn refused(&mut self, mut op: Operation, r: Refusal) {
        if let Change::Connect(n) = op.change {
            self.connect_refused(n, op, r);
            return;
        }
        if matches!(r, Refusal::ConcurrentChange | Refusal::Timeout | Refusal::InTransientState) {
            let base = self.cfg.resource.twopc_retry_timeout.as_nanos() as u64;
            let n = self.conns.len().max(1) as u64;
            let wait = self.rng.up_to(base * n * (1 << op.tries.min(5)));
            // Endless patience would hide a stuck cluster: an administrator gets an answer.
            if op.admin.is_some() && self.now.since(op.started) > self.cfg.resource.twopc_timeout * 2 {
                self.conclude(op, Err(r));
                return;
            }
            op.stage = Stage::Later(self.now + Duration::from_nanos(wait + 1_000_000));
            op.tries += 1;
            self.operations.push_back(op);
            return;
        }
        if let Change::Promote { up_to_date, outdate_peers } = op.change {
            op.attempts += 1;
            let again = match r {
                _ if op.attempts > 4 => None,
                Refusal::NoUpToDateData if op.force && !up_to_date => {
                    Some(Change::Promote { up_to_date: true, outdate_peers })
                }
                Refusal::NoQuorum | Refusal::PrimaryNeedsFencing if op.force && !outdate_peers => {
                    Some(Change::Promote { up_to_date, outdate_peers: true })
                }
                Refusal::TwoPrimaries if op.attempts == 1 => Some(op.change),
                _ => None,
            };
            if let Some(change) = again {
                op.change = change;
                op.stage = if r == Refusal::TwoPrimaries {
                    Stage::Later(self.now + Duration::from_millis(500))
                } else {
                    Stage::Begin
                };
                self.operations.push_front(op);
                return;
            }
        }
        if let Change::Disconnect(n, _) = op.change {
            let lost = !self.st.connected(n);
            match r {
                Refusal::AlreadyStandAlone => return self.conclude(op, Ok(())),
                Refusal::RefusedByPeer | Refusal::NeedConnection if lost => {
                    self.disconnect_now(n);
                    return self.conclude(op, Ok(()));
                }
                Refusal::IsDiskless | Refusal::LowerThanOutdated => {
                    self.disconnect_now(n);
                    return self.conclude(op, Ok(()));
                }
                _ => {}
            }
        }
        self.conclude(op, Err(r));
    }

    fn conclude(&mut self, op: Operation, r: Result<(), Refusal>) {
        let mut answer = r.map_err(crate::core::AdminError::from);
        if let Err(e) = &mut answer {
            if r == Err(Refusal::NoQuorum) {
                for v in self.vnrs() {
                    if let Some(x) = self.quorum_of(&self.st, v).explanation {
                        e.info.push(x.to_string());
                    }
                }
            }
            let scope = self.scope(None, op.change.vnr());
            let text = format!("State change failed: {} ({})", e.text, e.code);
            self.log(LogLevel::Warn, scope, text);
        }
        self.answer(op.admin, answer);
        self.down_step();
    }

    /// Remembers a finished transaction.
    fn remember(&mut self, initiator: NodeId, tid: u32) {
        self.finished_tids.push_back((initiator.get(), tid));
        while self.finished_tids.len() > FINISHED_MAX {
            self.finished_tids.pop_front();
        }
    }

    // ----- participant -----

    /// A P_TWOPC_PREPARE (`spec/state-machine.md` §6.4).
    pub(crate) fn twopc_prepare(&mut self, from: NodeId, volume: Option<u16>, r: TwopcRequest) {
        let TwopcBody::State { mask, val } = r.body else { return };
        let Some(initiator) = NodeId::new(r.initiator) else { return };
        let answer_at_once = |core: &mut Core, a: Answer| {
            core.send_answer(
                from,
                volume,
                r.tid,
                initiator,
                a,
                Reply { reachable: core.reachable(), ..Reply::default() },
            );
        };
        if self.finished_tids.contains(&(r.initiator, r.tid)) {
            return;
        }
        if let Some(t) = &mut self.transaction {
            if t.initiator == initiator && t.tid == r.tid {
                // A duplicate through another path.
                t.parents = t.parents.with(from);
                t.waiting = t.waiting.without(from);
                if let Some(a) = t.answered {
                    let reply = t.reply;
                    self.send_answer(from, volume, r.tid, initiator, a, reply);
                } else {
                    self.phase_one();
                }
                return;
            }
            if t.own.is_some() && initiator < self.me {
                // The lower id wins where two transactions meet at an initiator.
                let (mine, theirs) = (t.tid, r.tid);
                let scope = self.scope(Some(from), None);
                self.log(
                    LogLevel::Info,
                    scope,
                    format!("Aborting local state change {mine} to yield to remote state change {theirs}"),
                );
                self.abort_own(Refusal::ConcurrentChange);
            } else {
                let scope = self.scope(Some(from), None);
                self.log(
                    LogLevel::Info,
                    scope,
                    format!("Rejecting concurrent remote state change {}", r.tid),
                );
                answer_at_once(self, Answer::Retry);
                return;
            }
        }
        let target = r.target.and_then(NodeId::new);
        let vnr = volume.map(VolumeNr);
        let forward = self.st.connected_mask().and(NodeMask(r.nodes_to_reach)).without(from).without(self.me);
        let nodes_to_reach = NodeMask(r.nodes_to_reach).and(forward.not()).without(self.me);
        let connect = target == Some(self.me)
            && mask.0 & StateWord::CONN_MASK != 0
            && val.conn() == ConnState::Connected.as_u8();
        let mut t = Transaction {
            tid: r.tid,
            initiator,
            target,
            vnr,
            mask,
            val,
            own: None,
            parents: from.mask(),
            waiting: forward,
            told: forward,
            nodes_to_reach,
            reply: self.own_reply(initiator, target, mask, val),
            retry: false,
            refused: None,
            local_no: false,
            answered: None,
            deadline: self.now + self.cfg.resource.twopc_timeout,
            started: self.now,
            waits_for_params: connect,
        };
        if connect {
            let ready = self.st.cstate(from) == ConnState::Connecting
                && self.conns.get(&from).is_some_and(|c| c.phase == Phase::Ready);
            if !ready || from != initiator || self.orphans() {
                answer_at_once(self, Answer::Retry);
                return;
            }
        } else {
            match self.evaluate_remote(&t) {
                Ok(()) => {}
                Err(Refusal::InTransientState) => {
                    answer_at_once(self, Answer::Retry);
                    return;
                }
                Err(why) => {
                    let scope = self.scope(Some(from), vnr);
                    self.log(
                        LogLevel::Info,
                        scope,
                        format!("Declining remote state change {}: {} ({})", r.tid, why, why.code()),
                    );
                    t.local_no = true;
                }
            }
        }
        self.transaction = Some(t);
        for n in forward.iter().collect::<Vec<_>>() {
            self.send_prepare(n);
        }
        if connect {
            self.send_params(from);
        }
        self.phase_one();
    }

    /// Answers NO to a transaction this engine has no part in.
    pub(crate) fn decline(&mut self, from: NodeId, volume: Option<u16>, r: &TwopcRequest, why: &str) {
        let Some(initiator) = NodeId::new(r.initiator) else { return };
        let scope = self.scope(Some(from), volume.map(VolumeNr));
        self.log(LogLevel::Warn, scope, format!("Declining remote state change {}: {why}", r.tid));
        self.remember(initiator, r.tid);
        let reply = Reply { reachable: self.reachable(), ..Reply::default() };
        self.send_answer(from, volume, r.tid, initiator, Answer::No, reply);
    }

    fn own_reply(&self, initiator: NodeId, target: Option<NodeId>, mask: StateWord, val: StateWord) -> Reply {
        let mut reachable = self.reachable();
        if target == Some(self.me) && mask.0 & StateWord::CONN_MASK != 0 {
            if val.conn() == ConnState::Connected.as_u8() {
                reachable = reachable.with(initiator);
            } else if val.conn() == ConnState::Disconnecting.as_u8() {
                reachable = reachable.without(initiator);
            }
        }
        let mut reply = Reply { reachable, ..Reply::default() };
        if self.is_primary() {
            reply.primary = self.me.mask();
            if self.st.all_data_accessible() && !self.st.devs.is_empty() {
                reply.weak = reachable.not();
            }
        }
        reply
    }

    /// The remote change seen from here (`spec/state-machine.md` §6.6).
    fn apply_remote(&self, s: &mut State, t: &Transaction) {
        let (mask, val) = (t.mask.0, t.val);
        let init = t.initiator;
        if t.target == Some(self.me) {
            match t.vnr {
                Some(v) => {
                    if mask & StateWord::CONN_MASK != 0
                        && let Some(r) = ReplState::from_u8(val.conn())
                        && let Some(p) = s.pds.get_mut(&(init, v))
                    {
                        p.repl = mirrored(r);
                    }
                }
                None => {
                    if mask & StateWord::CONN_MASK != 0 && val.conn() == ConnState::Connected.as_u8() {
                        self.apply_connect(s, init);
                        if mask & StateWord::ROLE_MASK != 0
                            && let (Some(c), Some(r)) = (s.conns.get_mut(&init), val.role())
                        {
                            c.peer_role = r;
                        }
                    } else if mask & StateWord::CONN_MASK != 0
                        && val.conn() == ConnState::Disconnecting.as_u8()
                    {
                        if let Some(c) = s.conns.get_mut(&init) {
                            c.cstate = ConnState::TearDown;
                        }
                        if mask & StateWord::DISK_MASK != 0 {
                            for ((n, _), p) in &mut s.pds {
                                if *n == init && p.pdsk > DiskState::Outdated {
                                    p.pdsk = DiskState::Outdated;
                                }
                            }
                        }
                        if mask & StateWord::PDSK_MASK != 0 {
                            for d in s.devs.values_mut().filter(|d| d.disk > DiskState::Outdated) {
                                d.disk = DiskState::Outdated;
                            }
                        }
                    }
                }
            }
        } else if t.target.is_none() && self.st.connected(init) {
            if mask & StateWord::ROLE_MASK != 0
                && let (Some(c), Some(r)) = (s.conns.get_mut(&init), val.role())
            {
                c.peer_role = r;
            }
            if mask & StateWord::DISK_MASK != 0
                && let Some(d) = val.disk()
            {
                for ((n, v), p) in &mut s.pds {
                    if *n == init && t.vnr.is_none_or(|x| x == *v) {
                        p.pdsk = d;
                    }
                }
            }
        }
    }

    fn evaluate_remote(&self, t: &Transaction) -> Result<(), Refusal> {
        // Only the role matters for a node that is neither target nor neighbour (§6.7).
        let promotes =
            t.mask.0 & StateWord::ROLE_MASK != 0 && t.val.role() == Some(Role::Primary) && t.target.is_none();
        if promotes && !self.st.connected(t.initiator) && self.is_primary() {
            let two = self.conns.values().any(|c| c.net.two_primaries);
            let disk = self.st.devs.values().any(|d| d.disk > DiskState::Attaching);
            return match (two, disk) {
                (false, _) => Err(Refusal::TwoPrimaries),
                (true, true) => Err(Refusal::WeaklyConnected),
                (true, false) => Ok(()),
            };
        }
        self.would(Options::default(), |s| self.apply_remote(s, t)).map(|_| ())
    }

    /// Answers the parents when everything below has answered.
    fn participant_answers(&mut self) {
        let Some(t) = &self.transaction else { return };
        if t.answered.is_some() || !t.waiting.is_empty() {
            return;
        }
        let mut answer = if t.retry {
            Answer::Retry
        } else if t.local_no || t.refused.is_some() {
            Answer::No
        } else {
            Answer::Yes
        };
        if t.waits_for_params {
            match self.connect_veto(t.initiator) {
                Some(Veto::Retry) => answer = Answer::Retry,
                Some(Veto::Disconnect) => answer = Answer::No,
                None if !self.handshake_ready(t.initiator) => return,
                None if answer == Answer::Yes => {
                    if let Err(why) = self.evaluate_remote(t) {
                        answer = if why == Refusal::InTransientState { Answer::Retry } else { Answer::No };
                        let scope = self.scope(Some(t.initiator), None);
                        let text = format!("Declining to connect: {} ({})", why, why.code());
                        self.log(LogLevel::Warn, scope, text);
                    }
                }
                None => {}
            }
        }
        let Some(t) = &mut self.transaction else { return };
        t.answered = Some(answer);
        let (parents, tid, initiator, reply, vol) =
            (t.parents, t.tid, t.initiator, t.reply, t.vnr.map(|v| v.0));
        for n in parents.iter() {
            self.send_answer(n, vol, tid, initiator, answer, reply);
        }
    }

    fn send_answer(
        &mut self,
        to: NodeId,
        vol: Option<u16>,
        tid: u32,
        initiator: NodeId,
        a: Answer,
        r: Reply,
    ) {
        let reply = TwopcReply {
            tid,
            initiator: initiator.get().into(),
            reachable_nodes: r.reachable.0,
            primary_nodes: r.primary.0,
            weak_nodes: r.weak.0,
        };
        let p = match a {
            Answer::Yes => Packet::TwopcYes(reply),
            Answer::No => Packet::TwopcNo(reply),
            Answer::Retry => Packet::TwopcRetry(reply),
        };
        self.send_control_vol(to, vol, p);
    }

    /// A reply to a PREPARE this node sent or forwarded.
    pub(crate) fn twopc_reply(&mut self, from: NodeId, r: TwopcReply, a: Answer) {
        let Some(t) = &mut self.transaction else { return };
        if t.tid != r.tid || u32::from(t.initiator.get()) != r.initiator || !t.waiting.has(from) {
            return;
        }
        t.waiting = t.waiting.without(from);
        let reach = NodeMask(r.reachable_nodes);
        if t.target == Some(from) && matches!(t.own, Some(Change::Disconnect(..))) {
            t.reply.target_reachable = t.reply.target_reachable.or(reach);
        } else {
            t.reply.reachable = t.reply.reachable.or(reach);
        }
        t.reply.primary = t.reply.primary.or(NodeMask(r.primary_nodes));
        t.reply.weak = t.reply.weak.or(NodeMask(r.weak_nodes));
        match a {
            Answer::Yes => {}
            Answer::Retry => t.retry = true,
            Answer::No => {
                t.refused = Some(from);
                if t.own.is_some() {
                    let scope = self.scope(Some(from), None);
                    let text = format!("Declined by peer (id: {from}), see the log there");
                    self.log(LogLevel::Info, scope, text);
                }
            }
        }
        self.phase_one();
    }

    /// A verdict.
    pub(crate) fn twopc_verdict(&mut self, from: NodeId, r: TwopcRequest, commit: bool) {
        let Some(initiator) = NodeId::new(r.initiator) else { return };
        let matches = self
            .transaction
            .as_ref()
            .is_some_and(|t| t.tid == r.tid && t.initiator == initiator && t.own.is_none());
        if !matches {
            if !commit && !self.finished_tids.contains(&(r.initiator, r.tid)) {
                // A late PREPARE of an aborted transaction must not start it again; and others may wait.
                self.remember(initiator, r.tid);
                let forward =
                    self.st.connected_mask().and(NodeMask(r.nodes_to_reach)).without(from).without(self.me);
                for n in forward.iter().collect::<Vec<_>>() {
                    let mut q = r;
                    q.nodes_to_reach &= !forward.0;
                    self.send_data_vol(n, None, Packet::TwopcAbort(q));
                }
            }
            return;
        }
        let Some(t) = self.transaction.take() else { return };
        self.remember(initiator, r.tid);
        let vol = t.vnr.map(|v| v.0);
        for n in t.told.iter() {
            let mut q = r;
            q.nodes_to_reach = t.nodes_to_reach.0;
            let p = if commit { Packet::TwopcCommit(q) } else { Packet::TwopcAbort(q) };
            self.send_data_vol(n, vol, p);
        }
        if !commit {
            if t.waits_for_params {
                self.connect_aborted(initiator);
            }
            return;
        }
        let TwopcBody::Verdict { primary_nodes, detail } = r.body else { return };
        let reachable =
            if r.flags.contains(TwopcFlags::HAS_REACHABLE) { NodeMask(detail) } else { NodeMask::EMPTY };
        self.commit_remote(
            &t,
            NodeMask(primary_nodes),
            reachable,
            r.flags.contains(TwopcFlags::PRI_INCAPABLE),
        );
    }

    fn commit_remote(&mut self, t: &Transaction, primary: NodeMask, reachable: NodeMask, incapable: bool) {
        let init = t.initiator;
        let new = {
            let mut s = self.st.clone();
            self.apply_remote(&mut s, t);
            // A neighbour became Primary: who it does not reach is behind from now on.
            let promotes = t.target.is_none()
                && t.mask.0 & StateWord::ROLE_MASK != 0
                && t.val.role() == Some(Role::Primary)
                && self.st.connected(init);
            if promotes {
                for ((n, _), p) in &mut s.pds {
                    if !self.st.connected(*n)
                        && p.pdsk == DiskState::DUnknown
                        && reachable.has(*n)
                        && self.conns.get(n).is_some_and(|c| c.diskful)
                    {
                        p.pdsk = DiskState::Outdated;
                    }
                }
            }
            s
        };
        let was_connected = self.st.connected(init);
        self.primary_is_back(&new);
        self.force("remote", move |s| *s = new);
        if t.target == Some(self.me) && was_connected && self.st.cstate(init) == ConnState::TearDown {
            self.torn_down(init);
        }
        self.update_members(reachable);
        if t.mask.0 == 0 {
            self.commit_lost_peer(init, primary, incapable);
        } else {
            self.outdate_if_cut_off(primary, incapable);
        }
        if t.target.is_none() && t.mask.0 & StateWord::ROLE_MASK != 0 && t.val.role() == Some(Role::Secondary)
        {
            for v in self.vnrs() {
                self.write_bitmap(v);
            }
        }
        self.recalc("remote commit");
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

    /// Earliest time an operation or the transaction wants to be looked at.
    pub(crate) fn operations_deadline(&self) -> Option<Time> {
        let t = self.transaction.as_ref().map(|t| t.deadline);
        let o = if self.transaction.is_some() {
            None
        } else {
            self.operations
                .iter()
                .filter_map(|o| match o.stage {
                    Stage::Later(t) | Stage::Pinging { until: t } | Stage::Settling { until: t } => Some(t),
                    _ => None,
                })
                .min()
        };
        t.into_iter().chain(o).min()
    }
}

fn mirrored(r: ReplState) -> ReplState {
    use ReplState as R;
    match r {
        R::StartingSyncS => R::StartingSyncT,
        R::StartingSyncT => R::StartingSyncS,
        R::WFBitMapS => R::WFBitMapT,
        R::WFBitMapT => R::WFBitMapS,
        R::VerifyS => R::VerifyT,
        R::SyncSource => R::SyncTarget,
        R::SyncTarget => R::SyncSource,
        r => r,
    }
}

fn tag(c: Change) -> &'static str {
    match c {
        Change::Promote { .. } => "primary",
        Change::Demote { .. } => "secondary",
        Change::Connect(_) => "connected",
        Change::Disconnect(..) => "disconnected",
        Change::Negotiate(_) => "attach",
        Change::Detach(_) => "detach",
        Change::Resync { .. } => "resync",
        Change::LostPeer => "lost-peer",
    }
}
