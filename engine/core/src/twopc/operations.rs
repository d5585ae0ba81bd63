//! What this node wants: the queue of operations, their stages, their tries and their end
//! (`spec/state-machine.md` §7).
//!
//! An operation is never forgotten: it concludes with a success or a refusal, and its administrator is told.

use super::{Change, Operation, Stage};
use crate::connection::Phase;
use crate::core::Core;
use crate::io::{AdminId, LogLevel};
use crate::tables::refusal::Refusal;
use crate::types::{NodeId, Time};
use palisade_wire::enums::{ConnState, DiskState, ReplState};
use std::time::Duration;

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
    pub(super) fn orphans(&self) -> bool {
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

    /// An attempt failed: again, or give up (`spec/state-machine.md` §6.3, §7.1, §7.3, §7.4).
    pub(super) fn refused(&mut self, mut op: Operation, r: Refusal) {
        if let Change::Connect(n) = op.change {
            self.connect_refused(n, op, r);
            return;
        }
        if matches!(r, Refusal::ConcurrentChange | Refusal::Timeout | Refusal::InTransientState) {
            let base = self.cfg.resource.twopc_retry_timeout.as_nanos() as u64;
            let n = self.conns.len().max(1) as u64;
            let wait = self.rng.up_to(base * n * (1 << op.tries.min(5)));
            // Endless patience would hide a stuck cluster: an administrator gets an answer.
            let asked = op.admin.is_some() || self.is_down_step(&op);
            if asked && self.now.since(op.started) > self.cfg.resource.twopc_timeout * 2 {
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

    /// A graceful disconnect on the way down, from a peer that is still there.
    fn is_down_step(&self, op: &Operation) -> bool {
        let connected = matches!(op.change, Change::Disconnect(n, _) if self.st.connected(n));
        self.down.is_some() && op.admin.is_none() && connected
    }

    pub(super) fn conclude(&mut self, op: Operation, r: Result<(), Refusal>) {
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
        if let Err(e) = &answer
            && self.is_down_step(&op)
        {
            // Trying again would not change the answer.
            let mut e = e.clone();
            e.info.push("failed to disconnect".to_owned());
            let id = self.down.take();
            self.answer(id, Err(e));
        }
        self.answer(op.admin, answer);
        self.down_step();
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

pub(super) fn tag(c: Change) -> &'static str {
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
