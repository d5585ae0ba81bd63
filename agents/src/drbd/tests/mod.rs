//! Tests of the agent against an engine, a cluster and a clock that are made up.

mod actions;
mod score;
mod validate;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::Duration;

use palisade_cluster::child::ChildError;
use palisade_cluster::{Environment, ExitCode, PacemakerError};
use palisade_control::{
    ConnectionState, ConnectionStatus, DeviceStatus, DiskState, PeerDeviceStatus, ReplicationState,
    ResourceStatus, ResyncSuspended, Role, WriteOrdering,
};

use super::Action;
use super::actions::{Agent, Clock, Cluster};
use super::parameters::{Parameters, Version};
use super::replicator::{Change, Configuration, Replicator, ReplicatorError};

/// A resource with these local disks and one peer per list of peer disks.
pub fn resource(role: Role, disks: &[DiskState], peers: &[&[DiskState]]) -> ResourceStatus {
    let devices = disks.iter().zip(0..).map(|(disk, volume)| device(volume, *disk)).collect();
    let connections = peers.iter().zip(1..).map(|(disks, node)| peer(node, disks)).collect();
    ResourceStatus {
        name: "r0".into(),
        node_id: 0,
        role,
        suspended_user: false,
        suspended_no_data: false,
        suspended_fencing: false,
        suspended_quorum: false,
        force_io_failures: false,
        write_ordering: WriteOrdering::default(),
        devices,
        connections,
    }
}

fn device(volume: u16, disk_state: DiskState) -> DeviceStatus {
    DeviceStatus {
        volume,
        minor: u32::from(volume),
        disk_state,
        client: false,
        open: None,
        quorum: true,
        backing_dev: None,
        statistics: None,
    }
}

fn peer(node: i32, disks: &[DiskState]) -> ConnectionStatus {
    let peer_devices = disks.iter().zip(0..).map(|(disk, volume)| peer_device(volume, *disk)).collect();
    ConnectionStatus {
        peer_node_id: node,
        name: format!("node{node}"),
        connection_state: ConnectionState::Connected,
        congested: false,
        peer_role: Role::Secondary,
        tls: None,
        ap_in_flight: None,
        rs_in_flight: None,
        paths: None,
        peer_devices,
    }
}

fn peer_device(volume: u16, peer_disk_state: DiskState) -> PeerDeviceStatus {
    PeerDeviceStatus {
        volume,
        replication_state: ReplicationState::Established,
        peer_disk_state,
        peer_client: false,
        resync_suspended: ResyncSuspended::default(),
        received: 0,
        sent: 0,
        out_of_sync: 0,
        pending: 0,
        unacked: 0,
        resync_done_percent: None,
        stable: true,
        sync: None,
    }
}

/// A healthy resource of two nodes.
pub fn healthy(role: Role) -> ResourceStatus {
    resource(role, &[DiskState::UpToDate], &[&[DiskState::UpToDate]])
}

/// An engine that does what it is told, unless an answer is waiting in `answers`.
pub struct Engine {
    pub state: RefCell<Option<ResourceStatus>>,
    /// What `up` makes.
    pub configured: ResourceStatus,
    pub calls: RefCell<Vec<String>>,
    pub answers: RefCell<VecDeque<Result<(), ReplicatorError>>>,
    /// The engine does not do what it says it did.
    pub inert: Cell<bool>,
    /// The engine does not answer.
    pub hangs: Cell<bool>,
    pub bundled: bool,
    pub version: Option<Version>,
    /// The exit code of the tool if there is none.
    pub configuration: Result<Configuration, i32>,
    clock: std::rc::Rc<FakeClock>,
}

pub fn refused(code: i32) -> ReplicatorError {
    ReplicatorError::Refused { command: "drbdadm".into(), code, message: "no".into() }
}

pub fn no_data() -> ReplicatorError {
    ReplicatorError::NoUpToDateData { command: "drbdadm primary".into(), message: "no".into() }
}

fn timed_out(limit: Duration) -> ChildError {
    ChildError::TimedOut { command: "x".into(), limit }
}

impl Replicator for Engine {
    fn status(&self, limit: Duration) -> Result<Option<ResourceStatus>, ReplicatorError> {
        if self.hangs.get() {
            self.clock.pause(limit);
            return Err(timed_out(limit).into());
        }
        self.clock.pause(Duration::from_millis(5));
        Ok(self.state.borrow().clone())
    }

    fn change(&self, change: Change<'_>, limit: Duration) -> Result<(), ReplicatorError> {
        assert!(!limit.is_zero(), "{change:?} got no time");
        self.clock.pause(Duration::from_millis(20));
        self.calls.borrow_mut().push(format!("{change:?}"));
        self.answers.borrow_mut().pop_front().unwrap_or(Ok(()))?;
        if self.inert.get() {
            return Ok(());
        }
        let mut state = self.state.borrow_mut();
        match change {
            Change::Up | Change::Adjust | Change::AdjustDisks if state.is_none() => {
                *state = Some(self.configured.clone());
            }
            Change::Down | Change::DownRunning => {
                *state = None;
                self.hangs.set(false);
            }
            Change::Primary | Change::Secondary => {
                if let Some(status) = state.as_mut() {
                    status.role = if change == Change::Primary { Role::Primary } else { Role::Secondary };
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn configuration(&self, _limit: Duration) -> Result<Configuration, ReplicatorError> {
        self.calls.borrow_mut().push("configuration".into());
        self.configuration.map_err(refused)
    }

    fn version(&self, _limit: Duration) -> Result<Option<Version>, ReplicatorError> {
        self.calls.borrow_mut().push("version".into());
        Ok(self.version)
    }

    fn bundled(&self) -> bool {
        self.bundled
    }
}

pub struct FakeClock {
    now: Cell<Duration>,
    limit: Duration,
}

impl Clock for FakeClock {
    fn elapsed(&self) -> Duration {
        self.now.get()
    }

    fn limit(&self) -> Duration {
        self.limit
    }

    fn pause(&self, duration: Duration) {
        self.now.set(self.now.get() + duration);
    }
}

/// The cluster; keeps the score.
pub struct Attributes {
    pub score: Cell<Option<u32>>,
    pub writes: Cell<u32>,
    /// Where instances are promoted; no answer if absent.
    pub promoted: Option<Vec<String>>,
    pub located: Cell<u32>,
    pub hangs: Cell<bool>,
    clock: std::rc::Rc<FakeClock>,
}

impl Attributes {
    fn write(&self, score: Option<u32>, limit: Duration) -> Result<(), PacemakerError> {
        assert!(!limit.is_zero(), "a score was written without time");
        if self.hangs.get() {
            self.clock.pause(limit);
            return Err(timed_out(limit).into());
        }
        self.writes.set(self.writes.get() + 1);
        self.score.set(score);
        Ok(())
    }
}

impl Cluster for Attributes {
    fn set_score(&self, score: u32, limit: Duration) -> Result<(), PacemakerError> {
        self.write(Some(score), limit)
    }

    fn remove_score(&self, limit: Duration) -> Result<(), PacemakerError> {
        self.write(None, limit)
    }

    fn promoted_nodes(&self, limit: Duration) -> Result<Vec<String>, PacemakerError> {
        self.located.set(self.located.get() + 1);
        self.promoted.clone().ok_or_else(|| timed_out(limit).into())
    }
}

/// The score that is there before an action, to see whether it is touched.
pub const SCORE_BEFORE: u32 = 42;

/// A node `alice` with everything around the agent.
pub struct Node {
    pub vars: Vec<(String, String)>,
    pub engine: Engine,
    pub cluster: Attributes,
    pub clock: std::rc::Rc<FakeClock>,
    _config: tempfile::NamedTempFile,
}

impl Node {
    /// With that state and 60 s for the action.
    pub fn new(state: Option<ResourceStatus>) -> Self {
        let clock = std::rc::Rc::new(FakeClock { now: Cell::default(), limit: Duration::from_secs(60) });
        let config = tempfile::NamedTempFile::new().unwrap();
        let engine = Engine {
            state: RefCell::new(state),
            configured: healthy(Role::Secondary),
            calls: RefCell::default(),
            answers: RefCell::default(),
            inert: Cell::new(false),
            hangs: Cell::new(false),
            bundled: true,
            version: None,
            configuration: Ok(Configuration { two_primaries: false }),
            clock: clock.clone(),
        };
        let cluster = Attributes {
            score: Cell::new(Some(SCORE_BEFORE)),
            writes: Cell::new(0),
            promoted: Some(Vec::new()),
            located: Cell::new(0),
            hangs: Cell::new(false),
            clock: clock.clone(),
        };
        let path = config.path().to_str().unwrap().to_owned();
        Self { vars: Vec::new(), engine, cluster, clock, _config: config }
            .with("drbd_resource", "r0")
            .with("drbdconf", &path)
            .with("CRM_meta_notify", "true")
    }

    /// With a variable `OCF_RESKEY_*`.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.vars.push((format!("OCF_RESKEY_{name}"), value.to_owned()));
        self
    }

    /// With notification variables.
    pub fn told(self, phase: &str, operation: &str) -> Self {
        self.with("CRM_meta_notify_type", phase).with("CRM_meta_notify_operation", operation)
    }

    /// With answers of the engine to the next changes.
    pub fn answering(self, answers: impl IntoIterator<Item = Result<(), ReplicatorError>>) -> Self {
        self.engine.answers.borrow_mut().extend(answers);
        self
    }

    pub fn run(&self, action: Action) -> ExitCode {
        let env = Environment::from_vars(self.vars.clone());
        let params = Parameters::read(&env);
        if let Err(problem) = super::validate::environment(action, &env, &params) {
            return problem.code;
        }
        let names = vec!["alice".to_owned()];
        Agent::new(&env, &params, &self.engine, &self.cluster, &*self.clock, names).run(action)
    }

    pub fn calls(&self) -> Vec<String> {
        self.engine.calls.borrow().iter().filter(|call| *call != "configuration").cloned().collect()
    }

    pub fn role(&self) -> Option<Role> {
        self.engine.state.borrow().as_ref().map(|status| status.role)
    }

    pub fn seconds(&self) -> u64 {
        self.clock.elapsed().as_secs()
    }
}
