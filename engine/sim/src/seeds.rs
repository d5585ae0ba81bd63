//! Runs plans and makes failing ones smaller.

use crate::front::show_stamp;
use crate::node::VOLUME;
use crate::plan::{Op, Plan};
use crate::rng::Rng;
use crate::world::{FrontOp, MS, SECOND, World};
use palisade_core::io::Command;
use palisade_core::types::NodeId;
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role, WireProtocol};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Longest time until a new cluster is connected and UpToDate.
const SETUP_NS: u64 = 300 * SECOND;
/// Longest time until a healed cluster is whole again.
const HEAL_NS: u64 = 400 * SECOND;
/// Requests of one front end in progress at most.
const REQUESTS_MAX: usize = 64;
/// How long a healed cluster may stay apart before somebody looks after it.
const PATIENCE_NS: u64 = 60 * SECOND;
/// Events of one seed at most.
const STEPS_MAX: u64 = 3_000_000;

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The violated invariant, if any.
    pub failure: Option<String>,
    /// Events, acknowledged writes, reads checked.
    pub counts: (u64, u64, u64),
    /// A split brain was reported and an administrator had to choose a side.
    pub administrator: bool,
    /// States at the end.
    pub status: String,
}

struct Run<'a> {
    w: World,
    plan: &'a Plan,
    /// Without quorum: who may be promoted, by what the last Primary knew.
    eligible: BTreeSet<usize>,
    /// The last Primary, if it was stopped as one.
    stopped: Option<usize>,
    administrator: bool,
    loads: Vec<(u64, u64, Rng, u32)>,
}

fn id(n: usize) -> NodeId {
    NodeId::from_u32(n as u32).unwrap_or_else(|| unreachable!("a cluster has at most 32 nodes"))
}

/// Runs a plan.
#[must_use]
pub fn run(plan: &Plan, trace: bool) -> Outcome {
    let mut w = World::new(plan.seed, plan.nodes.clone());
    w.trace = trace;
    w.speed = plan.speed;
    w.history.lossy = plan.nodes.iter().flat_map(|n| &n.net).any(|c| c.protocol != WireProtocol::C);
    let eligible = (0..plan.nodes.len()).collect();
    let mut r = Run { w, plan, eligible, stopped: None, administrator: false, loads: Vec::new() };
    r.all();
    Outcome {
        failure: r.w.failure.clone(),
        counts: (r.w.steps, r.w.counts.0, r.w.counts.1),
        administrator: r.administrator,
        status: r.w.status(),
    }
}

impl Run<'_> {
    fn count(&self) -> usize {
        self.w.nodes.len()
    }

    fn failed(&mut self) -> bool {
        if self.w.steps > STEPS_MAX {
            self.w.fail("more than 3000000 events: something goes round in circles");
        }
        self.w.failure.is_some()
    }

    fn all(&mut self) {
        self.set_up();
        if self.failed() {
            return;
        }
        let start = self.w.now;
        for (i, s) in self.plan.steps.iter().enumerate() {
            self.w.plan(start + s.at, i);
        }
        let end = start + self.plan.steps.last().map_or(0, |s| s.at) + 2 * SECOND;
        while self.w.now < end && !self.failed() {
            let next = self.loads.iter().map(|l| l.0).min().unwrap_or(end).min(end);
            let mut n = 0;
            while self.w.step(next) {
                n += 1;
                if !self.w.due.is_empty() {
                    break;
                }
                if n % 64 == 0 {
                    self.w.compare_replicas();
                }
            }
            for i in std::mem::take(&mut self.w.due) {
                self.step(self.plan.steps[i].op);
            }
            self.front_ends();
        }
        if self.failed() {
            return;
        }
        self.heal();
        if !self.failed() {
            self.finale();
        }
    }

    fn set_up(&mut self) {
        for n in 0..self.count() {
            if let Err(e) = self.w.nodes[n].create_md() {
                self.w.fail(format!("create-md: {e}"));
            }
        }
        for n in 0..self.count() {
            self.w.restart(n);
        }
        let all = |w: &World| {
            (0..w.nodes.len()).all(|a| {
                let Some(c) = w.core(a) else { return false };
                (0..w.nodes.len()).filter(|b| *b != a).all(|b| {
                    c.state().connected(id(b)) && c.state().repl(id(b), VOLUME) == ReplState::Established
                })
            })
        };
        self.until(SETUP_NS, "the new nodes do not connect", all);
        let Some(first) = (0..self.count()).find(|n| self.w.nodes[*n].diskful()) else { return };
        if self.plan.skip_initial_sync {
            let c = Command::NewCurrentUuid { vnr: VOLUME, clear_bitmap: true, force_resync: false };
            self.w.command(first, c);
        } else {
            self.w.command(first, Command::Promote { force: true });
        }
        self.until(SETUP_NS, "the new disks do not become UpToDate", World::all_up_to_date);
        if !self.plan.skip_initial_sync {
            self.w.command(first, Command::Demote { force: false });
            self.until(SETUP_NS, "the first demotion is not answered", World::all_answered);
        }
    }

    fn until(&mut self, ns: u64, what: &str, done: impl Fn(&World) -> bool) {
        let end = self.w.now + ns;
        while !self.failed() {
            self.w.run_for(20 * MS);
            if done(&self.w) {
                self.w.compare_replicas();
                return;
            }
            if self.w.now >= end {
                self.w.fail(format!("stuck: {what}"));
            }
        }
    }

    /// What the Primary `n` knows its successors may be, as it stops.
    fn leaves(&mut self, n: usize) {
        let Some(c) = self.w.core(n) else { return };
        let s = c.state();
        if s.role != Role::Primary {
            return;
        }
        let mut e: BTreeSet<usize> = (0..self.count())
            .filter(|m| {
                *m != n
                    && s.connected(id(*m))
                    && s.repl(id(*m), VOLUME) == ReplState::Established
                    && s.pdsk(id(*m), VOLUME) == DiskState::UpToDate
            })
            .collect();
        e.insert(n);
        self.eligible = e;
    }

    fn step(&mut self, op: Op) {
        if self.w.trace {
            println!("{:>12.6} ### {op:?}", self.w.now as f64 / 1e9);
        }
        let w = &mut self.w;
        let vnr = VOLUME;
        match op {
            Op::Load { count, gap, seed } => self.loads.push((w.now, gap, Rng::new(seed), count)),
            Op::Promote(n) => self.promote(n),
            Op::Demote(n) => {
                self.leaves(n);
                self.w.openers(n, 0);
                self.w.command(n, Command::Demote { force: false });
            }
            Op::Cut(a, b) => {
                w.set_cut(a, b, true);
                w.set_cut(b, a, true);
            }
            Op::CutOneWay(a, b) => w.set_cut(a, b, true),
            Op::Isolate(a) => {
                for b in (0..w.nodes.len()).filter(|b| *b != a) {
                    w.set_cut(a, b, true);
                    w.set_cut(b, a, true);
                }
            }
            Op::Heal(a, b) => {
                w.set_cut(a, b, false);
                w.set_cut(b, a, false);
            }
            Op::HealAll => self.heal_links(),
            Op::Reset(a, b) => w.reset_link(a, b),
            Op::Slow(a, b, ns) => {
                if let Some(l) = w.links.get_mut(&(a.min(b), a.max(b))) {
                    l.slow[usize::from(a > b)] = ns;
                }
            }
            Op::Crash(n) => self.stop(n, true),
            Op::CrashAll => {
                for n in 0..self.count() {
                    self.leaves(n);
                }
                for n in 0..self.count() {
                    self.stop(n, true);
                }
            }
            Op::Kill(n) => self.stop(n, false),
            Op::Restart(n) => w.restart(n),
            _ if w.nodes[target(op)].core.is_none() => {}
            Op::Disconnect(n, m, force) => {
                w.command(n, Command::Disconnect { peer: id(m), force });
            }
            Op::Connect(a, b) => {
                w.connect(a, b, false);
                w.connect(b, a, false);
            }
            // Giving up the last current copy is the administrator's loss, not the engine's.
            Op::Detach(n, _) | Op::Invalidate(n) if !w.another_current(n) => {}
            Op::Detach(n, force) => {
                self.leaves(n);
                self.w.command(n, Command::Detach { vnr, force });
            }
            Op::Attach(n) => {
                if w.nodes[n].diskful() {
                    w.attach(n);
                }
            }
            Op::Invalidate(n) => {
                w.command(n, Command::Invalidate { vnr, from: None, reset_bitmap: true });
            }
            Op::InvalidateRemote(_, m) if !w.another_current(m) => {}
            Op::InvalidateRemote(n, m) => {
                w.command(n, Command::InvalidateRemote { vnr, peer: id(m), reset_bitmap: true });
            }
            Op::FailDisk(n) => w.nodes[n].failing = true,
            Op::RepairDisk(n) => w.nodes[n].failing = false,
            Op::SuspendIo(n) => {
                w.command(n, Command::SuspendIo(vnr));
            }
            Op::ResumeIo(n) => {
                w.command(n, Command::ResumeIo(vnr));
            }
            Op::PauseSync(n, m) => {
                w.command(n, Command::PauseSync { vnr, peer: id(m) });
            }
            Op::ResumeSync(n, m) => {
                w.command(n, Command::ResumeSync { vnr, peer: id(m) });
            }
        }
    }

    fn stop(&mut self, n: usize, power: bool) {
        self.leaves(n);
        let was_primary = self.w.core(n).is_some_and(|c| c.state().role == Role::Primary);
        self.w.stop(n, power);
        if was_primary {
            self.stopped = Some(n);
        }
        // Protocols A and B may lose what the peer has not written yet.
        if was_primary && self.plan.nodes[n].net.iter().any(|c| c.protocol != WireProtocol::C) {
            self.w.history.give_up();
        }
    }

    fn promote(&mut self, n: usize) {
        let becomes = |m: usize| self.w.nodes[m].commands.values().any(|c| c.starts_with("Promote"));
        let other = (0..self.count()).any(|m| {
            m != n && (becomes(m) || self.w.core(m).is_some_and(|c| c.state().role == Role::Primary))
        });
        if self.plan.careful {
            let synced = self.w.core(n).is_some_and(|c| {
                let s = c.state();
                (0..self.count()).filter(|m| *m != n).all(|m| {
                    s.connected(id(m))
                        && s.repl(id(m), VOLUME) == ReplState::Established
                        && s.pdsk(id(m), VOLUME) == DiskState::UpToDate
                        && s.disk(VOLUME) == DiskState::UpToDate
                })
            });
            if other || !(synced || self.eligible.contains(&n)) {
                return;
            }
        }
        let Some(core) = self.w.core(n) else { return };
        let alone = core.state().connected_mask().is_empty();
        // Alone it goes on with what its disk kept, whatever its peers have of the writes before.
        if self.stopped == Some(n) && alone {
            self.w.only_copy(n);
        }
        self.w.command(n, Command::Promote { force: false });
    }

    /// Issues what the running loads want now.
    fn front_ends(&mut self) {
        let now = self.w.now;
        let mut loads = std::mem::take(&mut self.loads);
        for (next, gap, rng, left) in loads.iter_mut().filter(|l| l.0 <= now) {
            *left -= 1;
            *next = now + rng.below(*gap);
            let primaries = self.w.primaries();
            let Some(n) = primaries.get(rng.below(primaries.len() as u64) as usize).copied() else {
                continue;
            };
            let sectors = self.w.nodes[n].size / 512;
            if self.w.nodes[n].requests.len() >= REQUESTS_MAX || sectors < 64 {
                continue;
            }
            // A small hot area makes requests meet; some go anywhere.
            let area = if rng.chance(70) { 64 } else { sectors - 32 };
            let sector = rng.below(area);
            let count = [1, 8, 8, 16, 3][rng.below(5) as usize];
            let op = match rng.below(100) {
                0..=59 => FrontOp::Write { sector, count, fua: rng.chance(10) },
                60..=84 => FrontOp::Read { sector, count },
                85..=89 => FrontOp::Zero { sector, count, discard: rng.chance(50) },
                _ => FrontOp::Flush,
            };
            if self.w.nodes[n].openers == 0 {
                self.w.openers(n, 1);
            }
            self.w.request(n, op);
        }
        loads.retain(|l| l.3 > 0);
        self.loads = loads;
    }

    fn heal_links(&mut self) {
        let keys: Vec<_> = self.w.links.keys().copied().collect();
        for (a, b) in keys {
            self.w.set_cut(a, b, false);
            self.w.set_cut(b, a, false);
        }
    }

    /// Does what an administrator would: everything on, everything connected, nothing paused.
    fn heal(&mut self) {
        if self.w.trace {
            println!("{:>12.6} ### heal everything", self.w.now as f64 / 1e9);
        }
        self.heal_links();
        for l in self.w.links.values_mut() {
            l.slow = [0; 2];
        }
        for n in 0..self.count() {
            self.w.nodes[n].failing = false;
            self.w.restart(n);
        }
        let end = self.w.now + HEAL_NS;
        let mut patience = self.w.now + PATIENCE_NS;
        loop {
            self.w.run_for(5 * SECOND);
            self.w.compare_replicas();
            self.w.check_bounds();
            let frozen = (0..self.count()).any(|n| self.w.core(n).is_some_and(|c| c.state().suspended()));
            if self.failed() || (self.w.all_up_to_date() && self.w.all_answered() && !frozen) {
                return;
            }
            if self.w.now >= end {
                let mut text = self.w.status().replace('\n', " |");
                for n in &self.w.nodes {
                    for c in n.commands.values() {
                        text += &format!(" unanswered: {} {c}", n.config.name);
                    }
                    if !n.requests.is_empty() {
                        text += &format!(" {} requests of {}", n.requests.len(), n.config.name);
                    }
                }
                self.w.fail(format!("stuck: the healed cluster does not become whole: {text}"));
                return;
            }
            // A Primary that lost quorum while another one took over has to give up.
            let primaries: Vec<usize> = (0..self.count())
                .filter(|n| self.w.core(*n).is_some_and(|c| c.state().role == Role::Primary))
                .collect();
            if primaries.len() > 1 {
                for n in primaries {
                    let has = |d: &palisade_core::state::DevStates| d.quorum;
                    if self.w.core(n).is_some_and(|c| !c.state().devs.get(&VOLUME).is_some_and(has)) {
                        self.w.openers(n, 0);
                        self.w.command(n, Command::Demote { force: true });
                    }
                }
            }
            if self.w.now >= patience {
                patience = self.w.now + PATIENCE_NS;
                self.choose_a_side();
            }
            for n in 0..self.count() {
                let Some(c) = self.w.core(n) else { continue };
                let s = c.state().clone();
                if s.susp_user {
                    self.w.command(n, Command::ResumeIo(VOLUME));
                }
                if self.w.nodes[n].diskful() && !self.w.nodes[n].attached {
                    self.w.attach(n);
                }
                for m in (0..self.count()).filter(|m| *m != n) {
                    if s.cstate(id(m)) == ConnState::StandAlone {
                        self.w.connect(n, m, false);
                    }
                    if s.pds.get(&(id(m), VOLUME)).is_some_and(|p| p.pause.user) {
                        self.w.command(n, Command::ResumeSync { vnr: VOLUME, peer: id(m) });
                    }
                }
            }
        }
    }

    /// What is left to an administrator: connections that are refused because both sides have data of their own. One
    /// side keeps its data, the others discard theirs.
    fn choose_a_side(&mut self) {
        let apart = |w: &World, n: usize, m: usize| {
            w.core(n).is_some_and(|c| c.state().cstate(id(m)) == ConnState::StandAlone)
        };
        let refused = (0..self.count()).any(|n| (0..self.count()).any(|m| m != n && apart(&self.w, n, m)));
        let rank = |n: &usize| {
            let s = self.w.core(*n)?.state();
            let primary = s.role == Role::Primary;
            let quorum = s.devs.get(&VOLUME).is_some_and(|d| d.quorum);
            Some((s.disk(VOLUME), primary && quorum, primary, s.connected_mask().iter().count()))
        };
        let Some(keep) = (0..self.count()).max_by_key(rank).filter(|_| refused) else { return };
        if self.w.trace {
            println!("{:>12.6} ### the data of {} is kept", self.w.now as f64 / 1e9, self.w.name(keep));
        }
        self.administrator = true;
        self.w.start_over(keep);
        for n in 0..self.count() {
            let joined = self.w.core(keep).is_some_and(|c| n == keep || c.state().connected(id(n)));
            if !joined {
                self.w.openers(n, 0);
                self.w.command(n, Command::Demote { force: true });
            }
            for m in (0..self.count()).filter(|m| *m != n) {
                if apart(&self.w, n, m) {
                    self.w.connect(n, m, !joined);
                }
            }
        }
    }

    /// The healed cluster works: somebody can be Primary, reads everything right and writes.
    fn finale(&mut self) {
        if self.w.primaries().is_empty() {
            let n = (self.plan.seed % self.count() as u64) as usize;
            let c = self.w.command(n, Command::Promote { force: false });
            self.until(60 * SECOND, "the last promotion is not answered", World::all_answered);
            if let Some(Err(e)) = self.w.nodes[n].answers.get(&c) {
                let text = format!("a healed cluster refuses a promotion: {e}");
                self.w.fail(text);
                return;
            }
        }
        let Some(n) = self.w.primaries().first().copied() else { return };
        let sectors = self.w.nodes[n].size / 512;
        for s in (0..sectors).step_by(256) {
            self.w.request(n, FrontOp::Read { sector: s, count: 256.min(sectors - s) });
        }
        for i in 0..8 {
            self.w.request(n, FrontOp::Write { sector: i * 11 % sectors, count: 4, fua: false });
        }
        self.w.request(n, FrontOp::Flush);
        self.until(60 * SECOND, "the last requests are not answered", World::all_answered);
        self.w.run_for(2 * SECOND);
        self.w.dirty = true;
        self.w.compare_replicas();
        if self.failed() {
            return;
        }
        // Not only those that claim it: all replicas are equal now.
        let disks: Vec<usize> = (0..self.count()).filter(|m| self.w.nodes[*m].diskful()).collect();
        for m in &disks {
            let (x, y) = (&self.w.nodes[disks[0]].data.current, &self.w.nodes[*m].data.current);
            if let Some(s) = x.iter().zip(y).position(|(p, q)| p != q) {
                let text = format!(
                    "the healed replicas differ: sector {s} is {} on {} and {} on {}",
                    show_stamp(x[s]),
                    self.w.name(disks[0]),
                    show_stamp(y[s]),
                    self.w.name(*m)
                );
                self.w.fail(text);
                return;
            }
        }
    }
}

fn target(op: Op) -> usize {
    match op {
        Op::Promote(n)
        | Op::Demote(n)
        | Op::Isolate(n)
        | Op::Crash(n)
        | Op::Kill(n)
        | Op::Restart(n)
        | Op::Detach(n, _)
        | Op::Attach(n)
        | Op::Invalidate(n)
        | Op::FailDisk(n)
        | Op::RepairDisk(n)
        | Op::SuspendIo(n)
        | Op::ResumeIo(n)
        | Op::Cut(n, _)
        | Op::CutOneWay(n, _)
        | Op::Heal(n, _)
        | Op::Reset(n, _)
        | Op::Slow(n, ..)
        | Op::Disconnect(n, ..)
        | Op::Connect(n, _)
        | Op::InvalidateRemote(n, _)
        | Op::PauseSync(n, _)
        | Op::ResumeSync(n, _) => n,
        Op::Load { .. } | Op::HealAll | Op::CrashAll => 0,
    }
}

/// Runs a plan; a panic of a core is a failure like any other.
#[must_use]
pub fn run_caught(plan: &Plan) -> Outcome {
    let r = std::panic::catch_unwind(|| run(plan, false));
    r.unwrap_or_else(|e| {
        let text = e.downcast_ref::<String>().cloned();
        let text = text.or_else(|| e.downcast_ref::<&str>().map(|s| (*s).to_string()));
        Outcome {
            administrator: false,
            failure: Some(format!("panic: {}", text.unwrap_or_default())),
            counts: (0, 0, 0),
            status: String::new(),
        }
    })
}

/// What kind of failure it is: the text without names and numbers.
#[must_use]
pub fn kind(failure: &str) -> String {
    let text = failure.split_once(": ").filter(|(head, _)| head.len() == 1).map_or(failure, |x| x.1);
    if text.starts_with("stuck: the healed") {
        let words = [
            "Attaching",
            "Negotiating",
            "Inconsistent",
            "Outdated",
            "Consistent",
            "DUnknown",
            "oos",
            "WFBitMapS",
            "WFBitMapT",
            "PausedSync",
            "SyncSource",
            "SyncTarget",
            "Connecting",
            "StandAlone",
            "Disconnecting",
            "Unconnected",
            "suspended",
            "no-quorum",
            "Diskless",
            "unanswered",
            "requests of",
        ];
        let found: Vec<&str> = words.into_iter().filter(|w| text.contains(w)).collect();
        return format!("stuck: {}", found.join(" "));
    }
    text.chars().filter(|c| !c.is_ascii_digit()).take(40).collect()
}

/// Leaves out steps while the plan still fails in the same way, for so long.
#[must_use]
pub fn minimise(plan: &Plan, failure: &str, budget: Duration) -> Plan {
    let started = Instant::now();
    let wanted = kind(failure);
    let mut best = plan.clone();
    let mut size = best.steps.len() / 2;
    while size > 0 {
        let mut at = 0;
        while at < best.steps.len() {
            if started.elapsed() > budget {
                return best;
            }
            let mut less = best.clone();
            less.steps.drain(at..(at + size).min(best.steps.len()));
            if run_caught(&less).failure.is_some_and(|f| kind(&f) == wanted) {
                best = less;
            } else {
                at += size;
            }
        }
        size /= 2;
    }
    best
}

/// What is wrong in a seed that is known to fail (`open-seeds.txt`).
#[must_use]
pub fn open(seed: u64) -> Option<&'static str> {
    include_str!("../open-seeds.txt").lines().filter(|l| !l.starts_with('#')).find_map(|l| {
        let (number, why) = l.split_once(' ')?;
        (number.parse() == Ok(seed)).then_some(why)
    })
}
