//! A transaction of another node: PREPARE, forwarding, the aggregated answer, the verdict
//! (`spec/state-machine.md` §6.4).
//!
//! A participant decides nothing: once it has said yes, it must never change its states before the verdict is there.

use super::{Answer, Change, Reply, Transaction};
use crate::connection::{Phase, Veto};
use crate::core::Core;
use crate::io::LogLevel;
use crate::state::{Options, State};
use crate::tables::refusal::Refusal;
use crate::types::{NodeId, NodeMask, VolumeNr};
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role};
use palisade_wire::{Packet, StateWord, TwopcBody, TwopcFlags, TwopcReply, TwopcRequest};

impl Core {
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
    pub(super) fn participant_answers(&mut self) {
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
