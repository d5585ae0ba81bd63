//! `wait-connect-*` and `wait-sync-*`: wait until peers are there (`spec/cli.md` §11).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use palisade_control::{
    Action, Client, ClientError, Command, ConnectionState, Event, EventBatch, Payload, Refusal,
    ReplicationState, Reply, TimeoutType, code,
};

use super::verbs::node_id;
use super::{Call, EXIT_USAGE, hand_over};
use crate::cli::Failure;
use crate::engines::{self, QUERY_LIMIT, Server};

const EXIT_TIMEOUT: i32 = 5;

pub fn connect(c: &Call<'_>) -> Result<i32, Failure> {
    wait(c, |state| state >= ReplicationState::Established)
}

pub fn sync(c: &Call<'_>) -> Result<i32, Failure> {
    wait(c, |state| state == ReplicationState::Established)
}

/// What is waited for and how long, in seconds; 0 is for ever.
struct Limits {
    wfc: u64,
    degraded: u64,
    outdated: u64,
    after_sb: bool,
}

impl Limits {
    fn of(c: &Call<'_>) -> Self {
        let seconds =
            |name: &str| c.scanned.options.get(name).and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
        let wfc = seconds("wfc-timeout");
        // A cluster known to be degraded is not waited for longer than a healthy one.
        let lowered = |name: &str| {
            let value = seconds(name);
            if wfc > 0 && (wfc < value || value == 0) && c.scanned.options.get(name).is_some() {
                eprintln!("{name} has to be shorter than wfc-timeout");
                eprintln!("{name} implicitly set to wfc-timeout ({wfc}s)");
                wfc
            } else if wfc > 0 && value == 0 {
                wfc
            } else {
                value
            }
        };
        Self {
            wfc,
            degraded: lowered("degr-wfc-timeout"),
            outdated: lowered("outdated-wfc-timeout"),
            after_sb: c.scanned.options.flag("wait-after-sb") == Some(true),
        }
    }

    fn deadline(&self, kind: TimeoutType, start: Instant) -> Option<Instant> {
        let seconds = match kind {
            TimeoutType::Default => self.wfc,
            TimeoutType::Degraded => self.degraded,
            TimeoutType::Outdated => self.outdated,
        };
        (seconds > 0).then(|| start + Duration::from_secs(seconds))
    }
}

/// A peer device waited for.
struct Awaited {
    replication: ReplicationState,
    deadline: Option<Instant>,
}

struct Waiter {
    limits: Limits,
    start: Instant,
    peer: Option<i32>,
    volume: Option<u16>,
    done: fn(ReplicationState) -> bool,
    awaited: BTreeMap<(i32, u16), Awaited>,
    connections: BTreeMap<i32, ConnectionState>,
}

fn wait(c: &Call<'_>, done: fn(ReplicationState) -> bool) -> Result<i32, Failure> {
    let name = c.word(0);
    if let Server::Kernel(kernel) = engines::server_of(name)? {
        return hand_over(&kernel, c.args);
    }
    let peer = c.scanned.words.get(1).map(|w| node_id(w).map(i32::from)).transpose()?;
    let volume = if c.scanned.words.len() > 2 { Some(c.number(2, "volume number")?) } else { None };
    let mut waiter = Waiter {
        limits: Limits::of(c),
        start: Instant::now(),
        peer,
        volume,
        done,
        awaited: BTreeMap::new(),
        connections: BTreeMap::new(),
    };
    waiter.run(name).map_err(|e| match e {
        ClientError::NotRunning { .. } => {
            let refusal = Refusal::new(code::RES_NOT_KNOWN);
            Failure::new(refusal.exit_code(), refusal.render(name))
        }
        e => Failure::new(EXIT_USAGE, format!("{e}.")),
    })
}

impl Waiter {
    fn run(&mut self, name: &str) -> Result<i32, ClientError> {
        let mut stream = Client::connect(name, QUERY_LIMIT)?.subscribe(QUERY_LIMIT)?;
        let first = stream.next_batch(Some(QUERY_LIMIT))?;
        self.learn(name, &first)?;
        loop {
            if let Some(code) = self.verdict(Instant::now()) {
                return Ok(code);
            }
            let limit = self.next_deadline().map(|d| d.saturating_duration_since(Instant::now()).max(MOMENT));
            match stream.next_batch(limit) {
                Ok(batch) => self.learn(name, &batch)?,
                Err(ClientError::Timeout { .. }) => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn learn(&mut self, name: &str, batch: &EventBatch) -> Result<(), ClientError> {
        for event in &batch.events {
            match event {
                Event::Connection { action, value, .. } if self.selects_peer(value.peer_node_id) => {
                    if *action == Action::Destroy {
                        self.connections.remove(&value.peer_node_id);
                    } else {
                        self.connections.insert(value.peer_node_id, value.connection_state);
                    }
                }
                Event::PeerDevice { action, peer_node_id, value, .. }
                    if self.selects_peer(*peer_node_id) && self.volume.is_none_or(|v| v == value.volume) =>
                {
                    let key = (*peer_node_id, value.volume);
                    if *action == Action::Destroy {
                        self.awaited.remove(&key);
                    } else if let Some(awaited) = self.awaited.get_mut(&key) {
                        awaited.replication = value.replication_state;
                    } else {
                        let deadline = self.limits.deadline(timeout_type(name, key)?, self.start);
                        self.awaited.insert(key, Awaited { replication: value.replication_state, deadline });
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn selects_peer(&self, peer_node_id: i32) -> bool {
        self.peer.is_none_or(|p| p == peer_node_id)
    }

    /// The exit status once there is nothing left to wait for.
    fn verdict(&self, now: Instant) -> Option<i32> {
        let given_up = |state: &ConnectionState| {
            matches!(state, ConnectionState::StandAlone | ConnectionState::Disconnecting)
        };
        if !self.limits.after_sb && self.connections.values().any(given_up) {
            return Some(0);
        }
        let missing: Vec<&Awaited> = self.awaited.values().filter(|a| !(self.done)(a.replication)).collect();
        if missing.is_empty() {
            return Some(0);
        }
        let expired = |a: &&Awaited| a.deadline.is_some_and(|d| d <= now);
        missing.iter().all(expired).then_some(EXIT_TIMEOUT)
    }

    fn next_deadline(&self) -> Option<Instant> {
        let now = Instant::now();
        self.awaited.values().filter_map(|a| a.deadline).filter(|d| *d > now).min()
    }
}

/// A time-out that is over at once would never let the socket be read.
const MOMENT: Duration = Duration::from_millis(1);

fn timeout_type(name: &str, (peer, volume): (i32, u16)) -> Result<TimeoutType, ClientError> {
    let peer_node_id = u8::try_from(peer).unwrap_or(u8::MAX);
    let reply = Client::connect(name, QUERY_LIMIT)?
        .call(Command::TimeoutType { peer_node_id, volume }, QUERY_LIMIT)?;
    Ok(match reply {
        Reply::Ok { payload: Payload::Timeout(kind), .. } => kind,
        _ => TimeoutType::Default,
    })
}
