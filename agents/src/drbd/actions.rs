//! The actions (`spec/ocf-agents.md` §2.6): look at the state, take one step, look again, until the state is
//! the wanted one or the time is over.

use std::cell::OnceCell;
use std::time::{Duration, Instant};

use palisade_cluster::notify::contains;
use palisade_cluster::{Environment, ExitCode, NotifyOperation, NotifyPhase, Pacemaker, PacemakerError, ocf};
use palisade_control::{ResourceStatus, Role};

use super::Action;
use super::facts::{Facts, connected};
use super::parameters::{Parameters, PeerPrimaryRule};
use super::replicator::{Change, Replicator, ReplicatorError};
use super::score::{ScoreChange, decide, may_unfence};
use super::validate;

/// Pause between two looks at the state while something is awaited.
const PAUSE: Duration = Duration::from_millis(200);

/// Pauses before a step that was refused is tried again: short at first, because a fail-over waits for
/// it, then doubling up to the longest.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(100);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(1);

/// A promotion does not fail before it ran this long: a fast failure would have the cluster run demote, stop,
/// start and promote in a tight loop.
const PROMOTE_FAIL_MIN: Duration = Duration::from_secs(15);

/// Part of an action's time that is kept for writing the score and for ending.
const SCORE_RESERVE: Duration = Duration::from_secs(2);

/// A step that succeeded is followed by a look at once. More of them than any action needs mean that
/// success has no effect.
const STEPS_AT_ONCE: u32 = 3;

/// How often `start` tries to bring the resource up.
const UP_TRIES: u32 = 2;

/// The time of one action.
pub trait Clock {
    /// Since the action began.
    fn elapsed(&self) -> Duration;
    /// When the action has to be over, since it began.
    fn limit(&self) -> Duration;
    /// Lets time pass.
    fn pause(&self, duration: Duration);

    /// What is left of the action's time.
    fn left(&self) -> Duration {
        self.limit().saturating_sub(self.elapsed())
    }
}

/// Real time.
#[derive(Debug)]
pub struct SystemClock {
    began: Instant,
    limit: Duration,
}

/// Kept back from Pacemaker's timeout, so that the agent ends by itself.
const MARGIN_MAX: Duration = Duration::from_millis(700);

impl SystemClock {
    /// For an action that began then and that Pacemaker kills after `timeout`.
    pub fn new(began: Instant, timeout: Duration) -> Self {
        Self { began, limit: timeout.saturating_sub(MARGIN_MAX.min(timeout / 4)) }
    }
}

impl Clock for SystemClock {
    fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    fn limit(&self) -> Duration {
        self.limit
    }

    fn pause(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

/// What the agent asks of the cluster. Every call ends within the limit it is given.
pub trait Cluster {
    /// Sets the promotion score of this node.
    fn set_score(&self, score: u32, limit: Duration) -> Result<(), PacemakerError>;
    /// Removes it.
    fn remove_score(&self, limit: Duration) -> Result<(), PacemakerError>;
    /// Where the cluster knows promoted instances.
    fn promoted_nodes(&self, limit: Duration) -> Result<Vec<String>, PacemakerError>;
}

impl Cluster for Pacemaker {
    fn set_score(&self, score: u32, limit: Duration) -> Result<(), PacemakerError> {
        self.set_promotion_score(score, limit)
    }

    fn remove_score(&self, limit: Duration) -> Result<(), PacemakerError> {
        self.remove_promotion_score(limit)
    }

    fn promoted_nodes(&self, limit: Duration) -> Result<Vec<String>, PacemakerError> {
        Pacemaker::promoted_nodes(self, limit)
    }
}

type State = Option<ResourceStatus>;

/// How an action's loop goes.
#[derive(Debug, Default)]
struct Progress {
    /// Steps that succeeded.
    steps: u32,
    /// The last pause after a refusal.
    pause: Duration,
    /// The last refusal.
    complaint: Option<String>,
}

/// One run of the agent.
pub struct Agent<'a> {
    env: &'a Environment,
    params: &'a Parameters,
    replicator: &'a dyn Replicator,
    cluster: &'a dyn Cluster,
    clock: &'a dyn Clock,
    /// Names of this node: of the host and in the cluster.
    own_names: Vec<String>,
    /// Promoted instances elsewhere, asked for once; `None` if the cluster gave no answer.
    promoted_elsewhere: OnceCell<Option<bool>>,
}

impl<'a> Agent<'a> {
    /// Prepares a run.
    pub const fn new(
        env: &'a Environment,
        params: &'a Parameters,
        replicator: &'a dyn Replicator,
        cluster: &'a dyn Cluster,
        clock: &'a dyn Clock,
        own_names: Vec<String>,
    ) -> Self {
        Self { env, params, replicator, cluster, clock, own_names, promoted_elsewhere: OnceCell::new() }
    }

    /// Carries out an action.
    pub fn run(&self, action: Action) -> ExitCode {
        let limit = self.work_time();
        if let Err(problem) = validate::host(action, self.env, self.params, self.replicator, limit) {
            self.reason(&problem.reason);
            if problem.drop_score {
                self.remove_score();
            }
            return problem.code;
        }
        match action {
            Action::Start => self.start(),
            Action::Stop => self.stop(),
            Action::Promote => self.promote(),
            Action::Demote => self.demote(),
            Action::Monitor => self.monitor(),
            Action::Status => {
                self.status().map_or_else(|error| self.failed(&error), |state| code_of(state.as_ref()))
            }
            Action::Notify => self.notify(),
            Action::Reload => self.reload(),
            Action::ValidateAll => ExitCode::Success,
        }
    }

    fn monitor(&self) -> ExitCode {
        match self.status() {
            // A probe of something that does not run leaves no trace.
            Ok(None) if self.env.is_probe("monitor") => ExitCode::NotRunning,
            Ok(state) => {
                self.update_score(state.as_ref());
                code_of(state.as_ref())
            }
            Err(error) => self.failed(&error),
        }
    }

    fn start(&self) -> ExitCode {
        let mut tries = 0;
        let mut adjusted = false;
        let mut progress = Progress::default();
        let wanted = if self.params.connect_only_after_promote { Change::AdjustDisks } else { Change::Up };
        loop {
            let step = match self.status() {
                Err(error) => Err(error),
                Ok(Some(status)) if status.role == Role::Primary => {
                    tracing::warn!("{} is already Primary, demoting.", self.params.resource);
                    self.change(Change::Secondary)
                }
                Ok(Some(_)) if adjusted => return self.started(),
                Ok(state) => {
                    tries += 1;
                    let change = match state {
                        None => wanted,
                        // Runs already, perhaps in part.
                        Some(_) if self.params.connect_only_after_promote => Change::AdjustDisks,
                        Some(_) => Change::Adjust,
                    };
                    let done = self.change(change);
                    adjusted = done.is_ok();
                    if tries >= UP_TRIES
                        && let Err(error) = &done
                    {
                        self.reason(&format!("failed to attach: {error}"));
                        return ExitCode::Generic;
                    }
                    done
                }
            };
            if !self.again(step, &mut progress) {
                return self.out_of_time("start", &progress);
            }
        }
    }

    /// The resource is up: give the peers a moment to connect, so that the first score is a good one.
    fn started(&self) -> ExitCode {
        let wait = self.params.connect_wait.filter(|_| !self.params.connect_only_after_promote);
        let until = self.clock.elapsed() + wait.unwrap_or_default().min(self.work_time());
        loop {
            let state = match self.status() {
                Ok(state) => state,
                Err(error) => return self.failed(&error),
            };
            let Some(status) = &state else {
                self.reason(&format!("{} vanished while it was being started.", self.params.resource));
                return ExitCode::Generic;
            };
            let late = self.clock.elapsed() >= until;
            if connected(status) || late {
                if late && wait.is_some_and(|wait| !wait.is_zero()) {
                    tracing::info!("Not all peers of {} are connected yet.", self.params.resource);
                }
                self.update_score(state.as_ref());
                return ExitCode::Success;
            }
            self.clock.pause(PAUSE);
        }
    }

    fn promote(&self) -> ExitCode {
        let code = self.promote_now();
        let until = PROMOTE_FAIL_MIN.min(self.clock.limit());
        let wait = until.saturating_sub(self.clock.elapsed());
        if code != ExitCode::Success && !wait.is_zero() {
            tracing::warn!(
                "promotion failed; sleep {} # to prevent tight recovery loop",
                wait.as_secs_f32().ceil()
            );
            self.clock.pause(wait);
        }
        code
    }

    fn promote_now(&self) -> ExitCode {
        let mut progress = Progress::default();
        let mut first = true;
        loop {
            let step = match self.status() {
                Err(error) => Err(error),
                Ok(None) => {
                    self.reason("cannot promote a resource that was not started");
                    return ExitCode::Generic;
                }
                Ok(Some(status)) if status.role == Role::Primary => return self.promoted(),
                Ok(Some(status)) => {
                    // The first attempt is always made: it makes the engine ask the peer.
                    if !first && self.unexpected_primary(&Facts::of(&status)) {
                        if self.params.fail_promote_early {
                            self.reason("Peer node already/still Primary");
                            self.remove_score();
                            return ExitCode::Generic;
                        }
                        tracing::info!("A peer of {} is Primary unexpectedly.", self.params.resource);
                    }
                    first = false;
                    self.change(Change::Primary)
                }
            };
            // A lost peer's disk may still be judged (fencing, quorum): data that are not good enough
            // now can be in a moment. Failing earlier would gain nothing.
            let no_data = matches!(step, Err(ReplicatorError::NoUpToDateData { .. }));
            if no_data && self.clock.elapsed() + RETRY_PAUSE_MAX > PROMOTE_FAIL_MIN {
                return self.refused_promotion();
            }
            if !self.again(step, &mut progress) {
                return if no_data {
                    self.refused_promotion()
                } else {
                    self.out_of_time("promote", &progress)
                };
            }
        }
    }

    fn refused_promotion(&self) -> ExitCode {
        self.reason("Refusing to be promoted to Primary without access to UpToDate data");
        ExitCode::Generic
    }

    fn promoted(&self) -> ExitCode {
        if self.params.connect_only_after_promote {
            self.log_failure(self.change(Change::Adjust));
        }
        ExitCode::Success
    }

    fn demote(&self) -> ExitCode {
        let mut progress = Progress::default();
        loop {
            let step = match self.status() {
                Err(error) => Err(error),
                Ok(None) => {
                    tracing::error!("{} does not run and cannot be demoted.", self.params.resource);
                    return ExitCode::NotRunning;
                }
                Ok(Some(status)) if status.role != Role::Primary => return ExitCode::Success,
                Ok(Some(_)) => self.change(Change::Secondary),
            };
            if !self.again(step, &mut progress) {
                return self.out_of_time("demote", &progress);
            }
        }
    }

    fn stop(&self) -> ExitCode {
        let mut progress = Progress::default();
        let mut downed = false;
        loop {
            // An engine that does not answer must leave time to end it.
            let state = self.replicator.status(self.work_time().min(self.clock.limit() / 4));
            let step = match state {
                Ok(None) => {
                    if !downed {
                        // An engine may be there that has no resource yet; there is nothing to hear from it.
                        let _ = self.change(Change::DownRunning);
                    }
                    self.maybe_outdate(None);
                    self.remove_score();
                    return ExitCode::Success;
                }
                Ok(Some(status)) if status.role == Role::Primary => {
                    tracing::warn!("{} still Primary, demoting.", self.params.resource);
                    self.change(Change::Secondary)
                }
                // What cannot be asked can perhaps be taken down.
                Ok(Some(_)) | Err(_) => {
                    downed = true;
                    // The configuration may be gone or broken by now.
                    self.change(Change::Down).or_else(|_| self.change(Change::DownRunning))
                }
            };
            if !self.again(step, &mut progress) {
                return self.out_of_time("stop", &progress);
            }
        }
    }

    fn reload(&self) -> ExitCode {
        match self.status() {
            Err(error) => self.failed(&error),
            Ok(None) => {
                self.remove_score();
                self.reason("cannot reload a resource that was not started");
                ExitCode::Generic
            }
            Ok(Some(_)) => {
                let done = self.change(Change::Adjust);
                if let Ok(state) = self.status() {
                    self.update_score(state.as_ref());
                }
                done.map_or_else(|error| self.failed(&error), |()| ExitCode::Success)
            }
        }
    }

    /// Never fails: Pacemaker ignores the result, and what went wrong is in the log.
    fn notify(&self) -> ExitCode {
        let told = self.env.notification();
        let (Some(phase), Some(operation)) = (told.phase, told.operation) else { return ExitCode::Success };
        let start = operation == NotifyOperation::Start;
        if phase == NotifyPhase::Pre && !start {
            return ExitCode::Success;
        }
        let Some(state) = self.known_state() else { return ExitCode::Success };
        if start && !self.params.connect_only_after_promote && state.is_some() {
            self.log_failure(self.change(Change::Adjust));
        }
        if phase == NotifyPhase::Pre {
            return ExitCode::Success;
        }
        // What adjusting changed has to show in the score.
        let state = if start { self.known_state() } else { Some(state) };
        let Some(state) = state else { return ExitCode::Success };
        self.update_score(state.as_ref());
        if let Some(status) = state.as_ref().filter(|_| !start)
            && Facts::of(status).peer_unknown
        {
            self.maybe_outdate(Some(status));
        }
        ExitCode::Success
    }

    /// Rule of `stop_outdates_secondary` (`spec/ocf-agents.md` §2.9). Nodes that are promoted in the same
    /// transition are left out on purpose: they may be our own successor on the same disks.
    fn maybe_outdate(&self, state: Option<&ResourceStatus>) {
        if !self.params.stop_outdates_secondary {
            return;
        }
        let told = self.env.notification();
        let Some(promoted) = told.promoted.iter().find(|name| !contains(&self.own_names, name)) else {
            return;
        };
        if contains(&told.stop, promoted) {
            return;
        }
        if state.is_some_and(|status| status.role == Role::Primary) {
            tracing::error!(
                crit = true,
                "resource internal SPLIT BRAIN: {} is Primary here, and {promoted} is promoted as well.",
                self.params.resource
            );
            return;
        }
        tracing::info!("Outdating {}, because {promoted} is promoted.", self.params.resource);
        self.log_failure(self.change(Change::Outdate));
        self.remove_score();
    }

    fn update_score(&self, state: Option<&ResourceStatus>) {
        let Some(status) = state else { return self.remove_score() };
        let facts = Facts::of(status);
        match decide(&facts, self.params.scores, self.peer_primary_removes(&facts)) {
            ScoreChange::Set(score) => self.score(|limit| self.cluster.set_score(score, limit)),
            ScoreChange::Remove => self.remove_score(),
            ScoreChange::Keep => {}
        }
        if self.params.unfence && may_unfence(&facts) {
            let unfence = Change::Unfence(&self.params.unfence_extra_args);
            self.log_failure(self.replicator.change(unfence, self.clock.left()));
        }
    }

    fn remove_score(&self) {
        self.score(|limit| self.cluster.remove_score(limit));
    }

    /// A cluster that does not take the score must not fail the action.
    fn score(&self, write: impl FnOnce(Duration) -> Result<(), PacemakerError>) {
        let left = self.clock.left();
        if left.is_zero() {
            tracing::warn!("No time is left to write the promotion score of {}.", self.params.resource);
        } else if let Err(error) = write(left) {
            tracing::warn!("The promotion score of {} was not written: {error}", self.params.resource);
        }
    }

    /// Rule of `remove_master_score_if_peer_primary` (`spec/ocf-agents.md` §2.5).
    fn peer_primary_removes(&self, facts: &Facts) -> bool {
        match self.params.peer_primary {
            PeerPrimaryRule::Ignore => false,
            PeerPrimaryRule::Remove => !facts.primary && facts.healthy_peer_primary,
            PeerPrimaryRule::RemoveIfUnexpected => {
                let unexpected = self.unexpected_primary(facts);
                if unexpected {
                    tracing::info!("A peer of {} is Primary unexpectedly: no score.", self.params.resource);
                }
                unexpected
            }
        }
    }

    /// A healthy peer is Primary, and the cluster says that no other node's instance is promoted.
    fn unexpected_primary(&self, facts: &Facts) -> bool {
        if facts.primary || !facts.healthy_peer_primary || validate::promoted_max(self.env) != Some(1) {
            return false;
        }
        let elsewhere = self.promoted_elsewhere.get_or_init(|| {
            let nodes = self.cluster.promoted_nodes(self.work_time());
            let nodes = nodes.inspect_err(|error| tracing::warn!("{error}")).ok()?;
            Some(nodes.iter().any(|node| !contains(&self.own_names, node)))
        });
        *elsewhere == Some(false)
    }

    fn status(&self) -> Result<State, ReplicatorError> {
        self.replicator.status(self.work_time())
    }

    /// The state, or a line in the log.
    fn known_state(&self) -> Option<State> {
        self.status().inspect_err(|error| tracing::error!("{error}")).ok()
    }

    fn change(&self, change: Change<'_>) -> Result<(), ReplicatorError> {
        self.replicator.change(change, self.work_time())
    }

    /// What an engine may use of the time that is left.
    fn work_time(&self) -> Duration {
        let left = self.clock.left();
        left.saturating_sub(SCORE_RESERVE.min(left / 4))
    }

    /// Whether there is time for another look. A refused step is logged when its reason is a new one, and
    /// followed by a pause.
    fn again(&self, step: Result<(), ReplicatorError>, progress: &mut Progress) -> bool {
        let pause = match step {
            Ok(()) => {
                progress.steps += 1;
                if progress.steps <= STEPS_AT_ONCE { Duration::ZERO } else { PAUSE }
            }
            Err(error) => {
                let text = error.to_string();
                if progress.complaint.as_ref() != Some(&text) {
                    tracing::error!("{text}");
                }
                progress.complaint = Some(text);
                progress.pause = (progress.pause * 2).clamp(RETRY_PAUSE_MIN, RETRY_PAUSE_MAX);
                progress.pause
            }
        };
        if self.clock.left() <= pause.max(PAUSE) {
            return false;
        }
        self.clock.pause(pause);
        true
    }

    fn out_of_time(&self, what: &str, progress: &Progress) -> ExitCode {
        let seconds = self.clock.elapsed().as_secs();
        let last = progress.complaint.as_deref().unwrap_or("the state did not become the wanted one");
        self.reason(&format!("{what} of {} gave up after {seconds} s: {last}", self.params.resource));
        ExitCode::Generic
    }

    fn failed(&self, error: &ReplicatorError) -> ExitCode {
        self.reason(&error.to_string());
        match error {
            ReplicatorError::NoTools => ExitCode::Installed,
            _ => ExitCode::Generic,
        }
    }

    fn log_failure(&self, result: Result<(), ReplicatorError>) {
        if let Err(error) = result {
            tracing::error!("{error}");
        }
    }

    fn reason(&self, text: &str) {
        ocf::exit_reason(self.env, text);
    }
}

/// The answer of a monitor.
fn code_of(state: Option<&ResourceStatus>) -> ExitCode {
    match state {
        None => ExitCode::NotRunning,
        Some(status) if status.role == Role::Primary => ExitCode::RunningPromoted,
        Some(_) => ExitCode::Success,
    }
}
