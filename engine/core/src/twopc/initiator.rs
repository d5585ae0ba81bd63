//! A transaction of this node: local evaluation, PREPARE, the checks before phase 2, the verdict
//! (`spec/state-machine.md` §6).
//!
//! Nothing is committed here before everybody who was asked has agreed; the verdict leaves on every stream before
//! what follows from it.

use super::operations::tag;
use super::{Change, Offer, Operation, Reply, Stage, Transaction};
use crate::connection::Veto;
use crate::core::Core;
use crate::effects::EqualBits;
use crate::io::LogLevel;
use crate::state::{Options, State};
use crate::tables::distances::{self, Distances};
use crate::tables::refusal::Refusal;
use crate::types::{NodeId, NodeMask};
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role};
use palisade_wire::{Packet, TwopcBody, TwopcFlags, TwopcRequest};

impl Core {
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
    pub(super) fn apply_connect(&self, s: &mut State, n: NodeId) {
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

    pub(super) fn attempt(&mut self, mut op: Operation) {
        let change = op.change;
        let target = change.target();
        if let Some(t) = target
            && !matches!(change, Change::Connect(_))
            && !self.st.connected(t)
        {
            self.conclude(op, Err(Refusal::NeedConnection));
            return;
        }
        // What was queued for the bits of equal replicas may have lost its reason while it waited.
        if let Change::Resync { peer, vnr, .. } = change
            && op.admin.is_none()
            && self.bits_between_equals(peer, vnr) != EqualBits::MineToSend
        {
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

    pub(super) fn send_prepare(&mut self, n: NodeId) {
        let Some(t) = &self.transaction else { return };
        let p = self.request(t, TwopcBody::State { mask: t.mask, val: t.val });
        let vol = t.vnr.map(|v| v.0);
        self.send_data_vol(n, vol, Packet::TwopcPrepare(p));
        self.ping(n);
    }

    pub(super) fn send_verdict(&mut self, t: &Transaction, commit: bool, flags: TwopcFlags) {
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

    pub(super) fn abort_own(&mut self, r: Refusal) {
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
}
