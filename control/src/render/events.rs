//! `drbdsetup events2` lines (`spec/cli.md` §13).

use std::collections::HashMap;

use super::{backing_dev, blocked_text, done_percent, progress, rate_and_eta, yes_no};
use crate::{
    Action, ConnectionStatus, DeviceStatus, Event, HelperPhase, PathStatus, PeerDeviceStatus, ResourceStatus,
};

/// Turns events into lines; remembers the last values so that change lines show only what changed.
#[derive(Debug, Default)]
pub struct EventPrinter {
    statistics: bool,
    full: bool,
    known: HashMap<Key, Known>,
}

/// Last values of an object.
#[derive(Debug)]
struct Known {
    groups: Vec<Group>,
    /// The line of its end.
    gone: String,
}

/// An object; ordered by connection, then as objects are destroyed.
#[derive(Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Clone)]
enum Key {
    Path(String, i32, String),
    PeerDevice(String, i32, u16),
    Connection(String, i32),
    Device(String, u16),
    Resource(String),
}

impl Key {
    fn resource(&self) -> &str {
        match self {
            Self::Path(r, ..)
            | Self::PeerDevice(r, ..)
            | Self::Connection(r, _)
            | Self::Device(r, _)
            | Self::Resource(r) => r,
        }
    }
}

/// Values that are printed together when one of them changes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    text: String,
    /// Shown only with `--statistics`.
    statistics: bool,
}

impl Group {
    fn plain(text: impl Into<String>) -> Self {
        Self { text: text.into(), statistics: false }
    }

    fn counters(text: impl Into<String>) -> Self {
        Self { text: text.into(), statistics: true }
    }
}

impl EventPrinter {
    /// A printer; `full` prints all values on each change and implies `statistics`.
    #[must_use]
    pub fn new(statistics: bool, full: bool) -> Self {
        Self { statistics: statistics || full, full, known: HashMap::new() }
    }

    /// The line of an event without time stamp and newline; `None` if it shows nothing new.
    pub fn line(&mut self, event: &Event) -> Option<String> {
        match event {
            Event::Resource { action, value, may_promote, promotion_score } => {
                let groups = resource_groups(value, *may_promote, *promotion_score);
                let ids = format!("resource name:{}", value.name);
                self.object(*action, Key::Resource(value.name.clone()), &ids, &ids, groups, false)
            }
            Event::Device { action, resource, value } => {
                let gone = format!("device name:{resource} volume:{}", value.volume);
                let ids = format!("{gone} minor:{}", value.minor);
                let key = Key::Device(resource.clone(), value.volume);
                self.object(*action, key, &ids, &gone, device_groups(value), false)
            }
            Event::Connection { action, resource, value } => {
                let ids = format!(
                    "connection name:{resource} peer-node-id:{} conn-name:{}",
                    value.peer_node_id, value.name
                );
                let key = Key::Connection(resource.clone(), value.peer_node_id);
                self.object(*action, key, &ids, &ids, connection_groups(value), false)
            }
            Event::PeerDevice { action, resource, peer_node_id, conn_name, value } => {
                let ids = format!(
                    "peer-device name:{resource} peer-node-id:{peer_node_id} conn-name:{conn_name} volume:{}",
                    value.volume
                );
                let key = Key::PeerDevice(resource.clone(), *peer_node_id, value.volume);
                self.object(*action, key, &ids, &ids, peer_device_groups(value), true)
            }
            Event::Path { action, resource, peer_node_id, conn_name, value } => {
                let ends = format!("local:{} peer:{}", value.this_host, value.remote_host);
                let ids =
                    format!("path name:{resource} peer-node-id:{peer_node_id} conn-name:{conn_name} {ends}");
                let key = Key::Path(resource.clone(), *peer_node_id, ends);
                self.object(*action, key, &ids, &ids, path_groups(value), false)
            }
            Event::Helper { phase, resource, peer, device, helper } => {
                Some(helper_line(*phase, resource, peer.as_ref(), *device, helper))
            }
            Event::ExistsEnd => Some("exists -".to_owned()),
        }
    }

    /// The lines of the end of everything known about a resource, children first. For an engine that
    /// ended without saying so.
    pub fn forget(&mut self, resource: &str) -> Vec<String> {
        let mut keys: Vec<Key> = self.known.keys().filter(|k| k.resource() == resource).cloned().collect();
        keys.sort();
        keys.iter().filter_map(|k| self.known.remove(k)).map(|k| k.gone).collect()
    }

    /// `always`: counters alone make a line even where they are not shown.
    fn object(
        &mut self,
        action: Action,
        key: Key,
        ids: &str,
        gone: &str,
        groups: Vec<Group>,
        always: bool,
    ) -> Option<String> {
        if action == Action::Destroy {
            self.known.remove(&key);
            return Some(format!("destroy {gone}"));
        }
        let before = self.known.remove(&key);
        let mut line = format!("{} {ids}", action.as_str());
        let mut changed = action != Action::Change || self.full;
        for group in &groups {
            let same = before.as_ref().is_some_and(|b| b.groups.contains(group));
            if action == Action::Change && same && !self.full {
                continue;
            }
            changed |= !same && (always || !group.statistics || self.statistics);
            if !group.text.is_empty() && (self.statistics || !group.statistics) {
                line.push(' ');
                line.push_str(&group.text);
            }
        }
        self.known.insert(key, Known { groups, gone: format!("destroy {gone}") });
        changed.then_some(line)
    }
}

fn resource_groups(r: &ResourceStatus, may_promote: bool, promotion_score: u32) -> Vec<Group> {
    vec![
        Group::plain(format!("role:{}", r.role)),
        Group::plain(format!("suspended:{}", r.suspended_text())),
        Group::plain(format!("force-io-failures:{}", yes_no(r.force_io_failures))),
        Group::counters(format!("write-ordering:{}", r.write_ordering.as_str())),
        Group::plain(format!("may_promote:{} promotion_score:{promotion_score}", yes_no(may_promote))),
    ]
}

fn connection_groups(c: &ConnectionStatus) -> Vec<Group> {
    let mut counters = format!("congested:{}", yes_no(c.congested));
    for (name, value) in [("ap-in-flight", c.ap_in_flight), ("rs-in-flight", c.rs_in_flight)] {
        if let Some(value) = value {
            counters.push_str(&format!(" {name}:{value}"));
        }
    }
    vec![
        Group::plain(format!("connection:{}", c.connection_state)),
        Group::plain(format!("role:{}", c.peer_role)),
        Group::counters(counters),
    ]
}

fn device_groups(d: &DeviceStatus) -> Vec<Group> {
    let mut state =
        format!("backing_dev:{} disk:{} client:{}", backing_dev(d), d.disk_state, yes_no(d.client));
    if let Some(open) = d.open {
        state.push_str(&format!(" open:{}", yes_no(open)));
    }
    state.push_str(&format!(" quorum:{}", yes_no(d.quorum)));
    let mut groups = vec![Group::plain(state)];
    if let Some(s) = &d.statistics {
        groups.push(Group::counters(format!(
            "size:{} read:{} written:{} al-writes:{} bm-writes:{} upper-pending:{} lower-pending:{}",
            s.size, s.read, s.written, s.al_writes, s.bm_writes, s.upper_pending, s.lower_pending
        )));
        groups.push(Group::counters(format!("al-suspended:{}", yes_no(s.al_suspended))));
        groups.push(Group::counters(format!("blocked:{}", blocked_text(s))));
    }
    groups
}

fn peer_device_groups(p: &PeerDeviceStatus) -> Vec<Group> {
    let mut groups = vec![
        Group::plain(format!("replication:{}", p.replication_state)),
        Group::plain(format!("peer-disk:{} peer-client:{}", p.peer_disk_state, yes_no(p.peer_client))),
        Group::plain(format!("resync-suspended:{}", p.resync_suspended)),
    ];
    if let Some(done) = done_percent(p) {
        groups.push(Group::plain(format!("done:{done:.2}")));
    }
    let mut counters = format!(
        "received:{} sent:{} out-of-sync:{} pending:{} unacked:{}",
        p.received, p.sent, p.out_of_sync, p.pending, p.unacked
    );
    if let Some(progress) = progress(p).filter(|_| p.replication_state.is_syncing()) {
        let (dbdt1, eta) = rate_and_eta(&progress);
        counters.push_str(&format!(" dbdt1:{dbdt1} eta:{eta}"));
    }
    groups.push(Group::counters(counters));
    groups
}

fn path_groups(p: &PathStatus) -> Vec<Group> {
    vec![Group::plain(format!("established:{}", yes_no(p.established)))]
}

fn helper_line(
    phase: HelperPhase,
    resource: &str,
    peer: Option<&(i32, String)>,
    device: Option<(u16, u32)>,
    helper: &str,
) -> String {
    let mut line = match phase {
        HelperPhase::Call => format!("call helper name:{resource}"),
        HelperPhase::Response { .. } => format!("response helper name:{resource}"),
    };
    if let Some((id, name)) = peer {
        line.push_str(&format!(" peer-node-id:{id} conn-name:{name}"));
    }
    if let Some((volume, minor)) = device {
        line.push_str(&format!(" volume:{volume} minor:{minor}"));
    }
    line.push_str(&format!(" helper:{helper}"));
    if let HelperPhase::Response { status } = phase {
        line.push_str(&format!(" status:{status}"));
    }
    line
}
