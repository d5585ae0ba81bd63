//! From the comparison to the action: reconciliation, split brain, policies, the Primary that shall be target.
//!
//! [`negotiate`] is `spec/state-machine.md` §9.5 from start to end, with §10 in its middle, as a pure function:
//! facts in, [`Outcome`] out. It runs no handler and demotes nobody; it says who has to.

use palisade_wire::Features;
use palisade_wire::UuidFlags;
use palisade_wire::enums::{DiskState, ReplState, Role};

use super::compare::{
    Compare, Rule, Side, Strategy, Verdict, by_disk_states, by_disk_states_text, missed_end_without_bits,
    resulting_repl, uuid_compare,
};

pub use palisade_wire::enums::AfterSb;

/// The option `rr-conflict`: what to do when a Primary is to become sync target (§9.5 step 11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum RrConflict {
    /// `disconnect`
    #[default]
    Disconnect,
    /// `retry-connect`
    RetryConnect,
    /// `call-pri-lost`
    CallPriLost,
    /// `violently`
    Violently,
    /// `auto-discard`
    AutoDiscard,
}

/// The options that decide.
#[derive(Clone, Copy, Debug)]
pub struct Policies {
    /// `after-sb-0pri`.
    pub after_sb_0pri: AfterSb,
    /// `after-sb-1pri`.
    pub after_sb_1pri: AfterSb,
    /// `after-sb-2pri`.
    pub after_sb_2pri: AfterSb,
    /// `always-asbp`.
    pub always_asbp: bool,
    /// `rr-conflict`.
    pub rr_conflict: RrConflict,
    /// The option `quorum` is not `off`.
    pub quorum_enabled: bool,
    /// `connect --tentative`: a dry run.
    pub tentative: bool,
}

/// When the comparison runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// While connecting.
    Connect,
    /// While attaching to a disk, connected already.
    Attach,
    /// Again on an established connection (§9.6).
    Again,
}

/// A Primary that both sides lost, and how far they got in its write stream (§9.5 step 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LostPrimary {
    /// The peer named it.
    pub named_by_peer: bool,
    /// Self named it.
    pub named_by_me: bool,
    /// Own position (dagtag).
    pub my_position: u64,
    /// The peer's position (dagtag).
    pub peer_position: u64,
}

/// Everything that goes into a negotiation about one volume.
#[derive(Clone, Copy, Debug)]
pub struct Negotiation<'a> {
    /// The two sides.
    pub compare: Compare<'a>,
    /// Options.
    pub policies: Policies,
    /// Occasion.
    pub phase: Phase,
    /// The own disk is the one being attached: its state is that of the metadata, nobody uses its data yet.
    pub attaching: bool,
    /// The common lost Primary, if there is one.
    pub lost_primary: Option<LostPrimary>,
    /// How the demotion asked for by [`Action::Demote`] went. Repeat the call with otherwise the same
    /// input; what the first call logged and ran is not named again.
    pub demoted: Option<bool>,
}

/// What has to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Go to this replication state, after modifying the bitmap as the strategy wants (§9.5 step 13).
    Go(ReplState),
    /// The handshake answers retry.
    Retry,
    /// Drop the connection; it becomes StandAlone.
    Disconnect,
    /// Attaching only: no result from this peer; the connection stays.
    NoResult,
    /// Try to demote self, without waiting, under this change tag; then call [`negotiate`] again.
    Demote(&'static str),
}

/// Handlers to run, in this order, before the action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// Split brain found.
    InitialSplitBrain,
    /// Split brain stays.
    SplitBrain,
    /// A Primary is to be overwritten.
    PriLost,
    /// A Primary has lost after split brain and cannot be demoted.
    PriLostAfterSb,
}

impl Handler {
    /// The name in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::InitialSplitBrain => "initial-split-brain",
            Self::SplitBrain => "split-brain",
            Self::PriLost => "pri-lost",
            Self::PriLostAfterSb => "pri-lost-after-sb",
        }
    }
}

/// The result of a negotiation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What to do.
    pub action: Action,
    /// The final strategy and its reason.
    pub verdict: Verdict,
    /// Handlers to run first.
    pub handlers: Vec<Handler>,
    /// Lines for the log, in order.
    pub log: Vec<String>,
    /// As target: force checksum-based resync, the bitmaps are pessimistic (§9.5 step 6).
    pub force_checksums: bool,
    /// As target of a skipped resync: clear the slot for this peer into the history (§9.5 step 12).
    pub clear_slot: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Source,
    Target,
}

impl Direction {
    fn source_if(condition: bool) -> Self {
        if condition { Self::Source } else { Self::Target }
    }

    fn strategy(self) -> Strategy {
        match self {
            Self::Source => Strategy::SyncSourceUseBitmap,
            Self::Target => Strategy::SyncTargetUseBitmap,
        }
    }

    fn node_name(self) -> &'static str {
        match self {
            Self::Source => "this",
            Self::Target => "peer",
        }
    }
}

/// What a policy says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Recovery {
    Solved(Direction),
    Unresolved,
    Demote(&'static str),
}

impl From<Option<Direction>> for Recovery {
    fn from(direction: Option<Direction>) -> Self {
        direction.map_or(Self::Unresolved, Self::Solved)
    }
}

/// Decides about one volume (§9.5 steps 1 to 14, §10).
pub fn negotiate(n: &Negotiation<'_>) -> Outcome {
    let mut work = Work { n, c: n.compare, out: Outcome::start(uuid_compare(&n.compare)) };
    match work.decide() {
        Ok(()) => work.finish(),
        Err(action) => work.out.action = action,
    }
    if n.phase == Phase::Attach && work.out.action == Action::Disconnect {
        work.out.action = Action::NoResult;
    }
    work.out
}

impl Outcome {
    fn start(verdict: Verdict) -> Self {
        Self {
            action: Action::Disconnect,
            verdict,
            handlers: vec![],
            log: vec![verdict.log_line()],
            force_checksums: false,
            clear_slot: false,
        }
    }
}

struct Work<'n, 'a> {
    n: &'n Negotiation<'a>,
    /// The two sides; the own role changes here when self was demoted in between.
    c: Compare<'a>,
    out: Outcome,
}

impl Work<'_, '_> {
    /// The steps in order; `Err` is an action that ends the negotiation.
    fn decide(&mut self) -> Result<(), Action> {
        self.out.verdict = missed_end_without_bits(&self.c, self.out.verdict);
        self.terminal()?;
        self.wait_for_survivor()?;
        if let Some(verdict) = by_disk_states(&self.c, &self.out.verdict) {
            self.out.verdict = verdict;
            self.log(by_disk_states_text(&self.c, verdict.strategy));
        }
        self.reconcile();
        self.ignore_while_unstable();
        if self.strategy().is_split_brain() {
            self.split_brain()?;
        }
        self.reverse_by_discard();
        self.rr_conflict()?;
        self.skip_without_uptodate_source();
        self.dry_run()
    }

    fn strategy(&self) -> Strategy {
        self.out.verdict.strategy
    }

    fn set(&mut self, strategy: Strategy) {
        self.out.verdict = self.out.verdict.with_strategy(strategy);
    }

    fn log(&mut self, text: impl Into<String>) {
        self.out.log.push(text.into());
    }

    /// Steps 1 to 4.
    fn terminal(&mut self) -> Result<(), Action> {
        match self.strategy() {
            Strategy::Retry => Err(Action::Retry),
            Strategy::UnrelatedData => {
                self.log("Unrelated data, aborting!");
                Err(Action::Disconnect)
            }
            Strategy::RequiresProto(version) => {
                self.log(format!("To resolve this both sides have to support at least protocol {version}"));
                // Only step 4 asks for 124, and there the peer's cleanup resolves it.
                Err(if version == 124 { Action::Retry } else { Action::Disconnect })
            }
            _ => Ok(()),
        }
    }

    /// A Primary that crashed and is back before a survivor has settled its loss: the survivor is only Consistent
    /// yet, and step 5 would have the crashed disk, whose cache lost acknowledged writes, overwrite it. Once the
    /// survivor knows that it is UpToDate, the comparison has the right result.
    fn wait_for_survivor(&mut self) -> Result<(), Action> {
        let came_back = |crashed: &Side<'_>, survivor: &Side<'_>| {
            crashed.has(UuidFlags::CRASHED_PRIMARY)
                && !survivor.has(UuidFlags::CRASHED_PRIMARY)
                && survivor.has(UuidFlags::RECONNECT)
                && crashed.real_disk() == DiskState::UpToDate
                && survivor.real_disk() == DiskState::Consistent
        };
        let (me, peer) = (&self.c.me, &self.c.peer);
        let early = self.n.phase == Phase::Connect
            && self.strategy().is_if_both_failed()
            && (came_back(me, peer) || came_back(peer, me));
        if early {
            self.log("The survivor of a crashed Primary is not UpToDate yet; retrying");
            return Err(Action::Retry);
        }
        Ok(())
    }

    /// Step 6.
    fn reconcile(&mut self) {
        let (me, peer) = (&self.c.me, &self.c.peer);
        let clean = [UuidFlags::CRASHED_PRIMARY, UuidFlags::PRIMARY_LOST_QUORUM]
            .iter()
            .all(|flag| !me.has(*flag) && !peer.has(*flag));
        let applies = self.n.phase == Phase::Connect
            && self.c.features.contains(Features::RECONCILE_RECONNECT)
            && self.strategy() == Strategy::NoSync
            // The reference wants UpToDate. Survivors that meet before they dare to call themselves so are compared as well.
            && me.real_disk() >= DiskState::Consistent
            && peer.real_disk() >= DiskState::Consistent
            && clean;
        let Some(lost) = self.n.lost_primary.filter(|_| applies) else { return };
        let (direction, rule) = match (me.bits > 0, peer.bits > 0) {
            (false, false) => return,
            (true, true) if !lost.named_by_peer => return,
            _ if !lost.named_by_peer && !lost.named_by_me => return,
            (true, false) => (Direction::Source, Rule::ReconcileBitmap),
            (false, true) => (Direction::Target, Rule::ReconcileBitmap),
            (true, true) if lost.my_position != lost.peer_position => {
                (Direction::source_if(lost.my_position > lost.peer_position), Rule::ReconcileDagtag)
            }
            (true, true) => (Direction::source_if(me.node_id < peer.node_id), Rule::ReconcileBitmap),
        };
        self.out.verdict = Verdict::new(direction.strategy(), rule);
        self.out.force_checksums = direction == Direction::Target;
        self.log(self.out.verdict.log_line());
    }

    /// Step 7.
    fn ignore_while_unstable(&mut self) {
        let stable = self.c.me.has(UuidFlags::STABLE) && self.c.peer.has(UuidFlags::STABLE);
        if self.strategy() == Strategy::SplitBrainAutoRecover && !stable {
            self.log("Ignore Split-Brain, for now, at least one side unstable");
            self.set(Strategy::NoSync);
        }
    }

    fn split_brain_text(&self) -> &'static str {
        match self.n.phase {
            Phase::Attach => "Split-Brain detected during attach",
            Phase::Connect | Phase::Again => "Split-Brain detected",
        }
    }

    /// Steps 8 and 9 (§10.2 to §10.6).
    fn split_brain(&mut self) -> Result<(), Action> {
        self.out.handlers.push(Handler::InitialSplitBrain);
        let ambiguous = self.strategy() == Strategy::SplitBrainDisconnect;
        let primaries = self.primaries();
        let recovery = if !ambiguous || self.n.policies.always_asbp {
            self.recover(primaries)
        } else {
            Recovery::Unresolved
        };
        let (direction, how) = match recovery {
            Recovery::Demote(tag) => return Err(Action::Demote(tag)),
            Recovery::Solved(direction) => {
                (Some(direction), format!("{primaries} primaries, automatically solved"))
            }
            Recovery::Unresolved => (self.discard_my_data(), "manually solved".to_owned()),
        };
        let subject = self.split_brain_text();
        let Some(direction) = direction else {
            self.set(Strategy::SplitBrainDisconnect);
            self.log(match self.n.phase {
                Phase::Attach => format!("{subject} but unresolved, dropping the disk!"),
                Phase::Connect | Phase::Again => format!("{subject} but unresolved, dropping connection!"),
            });
            self.out.handlers.push(Handler::SplitBrain);
            return Err(Action::Disconnect);
        };
        self.log(format!("{subject}, {how}. Sync from {} node", direction.node_name()));
        self.set(direction.strategy());
        if let Some(full) = self.strategy().full().filter(|_| ambiguous) {
            self.log("Doing a full sync, since UUIDs where ambiguous.");
            self.set(full);
        }
        Ok(())
    }

    fn primaries(&self) -> usize {
        [self.c.me.role, self.c.peer.role].iter().filter(|role| **role == Role::Primary).count()
    }

    /// §10.2.
    fn recover(&mut self, primaries: usize) -> Recovery {
        let (me, peer) = (self.c.me, self.c.peer);
        if self.n.policies.quorum_enabled && self.c.apv >= 113 && me.quorate != peer.quorate {
            return Recovery::Solved(Direction::source_if(me.quorate));
        }
        let policies = self.n.policies;
        match primaries {
            0 => self.no_primary(policies.after_sb_0pri).into(),
            1 => self.one_primary(policies.after_sb_1pri),
            _ => self.two_primaries(policies.after_sb_2pri),
        }
    }

    /// after-sb-0pri (§10.3).
    fn no_primary(&mut self, policy: AfterSb) -> Option<Direction> {
        let (me, peer) = (self.c.me, self.c.peer);
        let opened_as_primary = (me.uuids.slot(peer.node_id) & 1 == 1, peer.uuids.slot(me.node_id) & 1 == 1);
        match (policy, opened_as_primary) {
            (AfterSb::Disconnect, _) => None,
            (AfterSb::DiscardYoungerPrimary, (false, true)) => Some(Direction::Target),
            (AfterSb::DiscardYoungerPrimary, (true, false)) => Some(Direction::Source),
            (AfterSb::DiscardOlderPrimary, (false, true)) => Some(Direction::Source),
            (AfterSb::DiscardOlderPrimary, (true, false)) => Some(Direction::Target),
            (AfterSb::DiscardYoungerPrimary | AfterSb::DiscardOlderPrimary, _) => {
                self.log(format!("{policy} found no decision, going on with discard-zero-changes"));
                self.zero_changes().or_else(|| Some(self.least_changes()))
            }
            (AfterSb::DiscardZeroChanges, _) => self.zero_changes(),
            (AfterSb::DiscardLeastChanges, _) => Some(self.least_changes()),
            (AfterSb::DiscardLocal, _) => Some(Direction::Target),
            (AfterSb::DiscardRemote, _) => Some(Direction::Source),
            (
                AfterSb::Consensus
                | AfterSb::DiscardSecondary
                | AfterSb::CallPriLostAfterSb
                | AfterSb::ViolentlyAs0p
                | AfterSb::RetryConnect
                | AfterSb::AutoDiscard,
                _,
            ) => self.configuration_error(),
        }
    }

    fn zero_changes(&self) -> Option<Direction> {
        match (self.c.me.bits, self.c.peer.bits) {
            (0, 0) => Some(Direction::source_if(!self.c.resolve_conflicts)),
            (_, 0) => Some(Direction::Source),
            (0, _) => Some(Direction::Target),
            (_, _) => None,
        }
    }

    fn least_changes(&self) -> Direction {
        match self.c.me.bits.cmp(&self.c.peer.bits) {
            std::cmp::Ordering::Less => Direction::Target,
            std::cmp::Ordering::Greater => Direction::Source,
            std::cmp::Ordering::Equal => Direction::source_if(!self.c.resolve_conflicts),
        }
    }

    /// after-sb-1pri (§10.4).
    fn one_primary(&mut self, policy: AfterSb) -> Recovery {
        let as_0pri = self.n.policies.after_sb_0pri;
        let for_the_primary = Direction::source_if(self.c.me.role == Role::Primary);
        match policy {
            AfterSb::Disconnect => Recovery::Unresolved,
            AfterSb::Consensus => self.no_primary(as_0pri).filter(|d| *d == for_the_primary).into(),
            AfterSb::ViolentlyAs0p => self.no_primary(as_0pri).into(),
            AfterSb::DiscardSecondary => Recovery::Solved(for_the_primary),
            AfterSb::CallPriLostAfterSb => self.call_pri_lost("after-sb-1pri"),
            _ => self.configuration_error().into(),
        }
    }

    /// after-sb-2pri (§10.4).
    fn two_primaries(&mut self, policy: AfterSb) -> Recovery {
        match policy {
            AfterSb::Disconnect => Recovery::Unresolved,
            AfterSb::ViolentlyAs0p => self.no_primary(self.n.policies.after_sb_0pri).into(),
            AfterSb::CallPriLostAfterSb => self.call_pri_lost("after-sb-2pri"),
            _ => self.configuration_error().into(),
        }
    }

    fn call_pri_lost(&mut self, tag: &'static str) -> Recovery {
        let direction = self.no_primary(self.n.policies.after_sb_0pri);
        if direction != Some(Direction::Target) || self.c.me.role != Role::Primary {
            return direction.into();
        }
        let Some(demoted) = self.n.demoted else { return Recovery::Demote(tag) };
        // The first call has said and run everything up to here.
        self.out.log.clear();
        self.out.handlers.clear();
        if demoted {
            self.c.me.role = Role::Secondary;
            self.log("Successfully gave up primary role.");
            return Recovery::Solved(Direction::Target);
        }
        self.out.handlers.push(Handler::PriLostAfterSb);
        Recovery::Unresolved
    }

    fn configuration_error(&mut self) -> Option<Direction> {
        self.log("Configuration error.");
        None
    }

    /// §10.5.
    fn discard_my_data(&self) -> Option<Direction> {
        match self.discard_flags() {
            (true, false) => Some(Direction::Target),
            (false, true) => Some(Direction::Source),
            (true, true) | (false, false) => None,
        }
    }

    fn discard_flags(&self) -> (bool, bool) {
        (self.c.me.has(UuidFlags::DISCARD_MY_DATA), self.c.peer.has(UuidFlags::DISCARD_MY_DATA))
    }

    /// Step 10.
    fn reverse_by_discard(&mut self) {
        let strategy = self.strategy();
        let new_source = match self.discard_flags() {
            (true, false) if strategy.is_source() => self.c.peer.real_disk(),
            (false, true) if strategy.is_target() => self.c.me.real_disk(),
            _ => return,
        };
        if self.c.apv < 121 {
            return;
        }
        match strategy.inverse() {
            Some(inverse) if new_source > DiskState::Inconsistent => {
                self.log("Resync direction reversed by --discard-my-data. Reverting to older data!");
                self.set(inverse);
            }
            Some(_) => self.log("Ignoring --discard-my-data"),
            None => self.log("Can not reverse resync direction (requested via --discard-my-data)"),
        }
    }

    /// Blocks would be overwritten. Strategies that set or copy bits only later count as having bits: a
    /// running Primary must not be overwritten completely because its bitmap is still empty.
    fn overwrites(&self) -> bool {
        let later = !matches!(self.strategy(), Strategy::SyncTargetUseBitmap | Strategy::SyncSourceUseBitmap);
        later || self.c.me.bits > 0 || self.c.peer.bits > 0
    }

    fn would_overwrite_primary(&self) -> bool {
        let strategy = self.strategy();
        strategy.is_target()
            && !strategy.is_if_both_failed()
            && !self.n.attaching
            && self.c.me.role == Role::Primary
            && self.c.me.real_disk() >= DiskState::Consistent
            && self.overwrites()
    }

    /// Step 11.
    ///
    /// Where auto-discard does not apply the reference lets the resync overwrite the Primary. Here that takes
    /// an explicit `violently`; everything else drops the connection.
    fn rr_conflict(&mut self) -> Result<(), Action> {
        let policy = self.n.policies.rr_conflict;
        if policy == RrConflict::AutoDiscard {
            self.auto_discard();
        }
        if !self.would_overwrite_primary() {
            return Ok(());
        }
        if policy == RrConflict::Violently {
            self.log("Becoming SyncTarget as Primary, as configured: data in use changes!");
            return Ok(());
        }
        self.log("I shall become SyncTarget, but I am primary!");
        match policy {
            RrConflict::RetryConnect => Err(Action::Retry),
            RrConflict::CallPriLost => {
                self.out.handlers.push(Handler::PriLost);
                Err(Action::Disconnect)
            }
            RrConflict::Disconnect | RrConflict::AutoDiscard | RrConflict::Violently => {
                Err(Action::Disconnect)
            }
        }
    }

    /// A running Primary becomes source towards one that crashed; both sides come to the same result.
    fn auto_discard(&mut self) {
        let (me, peer) = (&self.c.me, &self.c.peer);
        let rule_applies = self.out.verdict.rule == Rule::CrashedPrimary && self.n.phase != Phase::Attach;
        let to = match self.strategy() {
            _ if !rule_applies || !self.overwrites() => return,
            Strategy::SyncTargetUseBitmap
                if me.role == Role::Primary && me.real_disk() >= DiskState::Consistent =>
            {
                Strategy::SyncSourceUseBitmap
            }
            Strategy::SyncSourceUseBitmap
                if peer.role == Role::Primary && peer.real_disk() >= DiskState::Consistent =>
            {
                Strategy::SyncTargetUseBitmap
            }
            _ => return,
        };
        self.log("Resync direction reversed by auto-discard: the running Primary is the source.");
        self.set(to);
    }

    /// Step 12, first half.
    fn skip_without_uptodate_source(&mut self) {
        let (source, target) = match self.out.verdict.rule {
            Rule::SyncSourceMissedFinish if self.strategy().is_source() => (self.c.me.real_disk(), false),
            Rule::SyncTargetPeerMissedFinish if self.strategy().is_target() => {
                (self.c.peer.real_disk(), true)
            }
            _ => return,
        };
        if source != DiskState::UpToDate {
            self.log("Resync skipped: its source is not UpToDate");
            self.set(Strategy::NoSync);
            self.out.clear_slot = target;
        }
    }

    fn repl(&self) -> ReplState {
        // Everything that leads to no state has ended the negotiation before.
        resulting_repl(self.strategy(), self.c.me.role, self.c.peer.role).unwrap_or(ReplState::Off)
    }

    /// Step 12, second half.
    fn dry_run(&mut self) -> Result<(), Action> {
        if !self.n.policies.tentative {
            return Ok(());
        }
        let state = match self.repl() {
            ReplState::WFBitMapS => Some(ReplState::SyncSource),
            ReplState::WFBitMapT => Some(ReplState::SyncTarget),
            _ => None,
        };
        self.log(match state {
            None => "dry-run connect: No resync, would become Connected immediately.".to_owned(),
            Some(state) => {
                format!("dry-run connect: Would become {state}, doing a {} resync.", self.strategy())
            }
        });
        Err(Action::Disconnect)
    }

    /// Step 14.
    fn finish(&mut self) {
        if self.strategy() == Strategy::NoSync && self.c.me.bits > 0 {
            self.log(format!("No resync, but {} bits in bitmap!", self.c.me.bits));
        }
        self.out.force_checksums &= self.strategy().is_target();
        self.out.action = Action::Go(self.repl());
    }
}

#[cfg(test)]
mod tests;
