//! Events: what `events2` prints (`spec/cli.md` §13).
//!
//! An event carries the whole value of its object, as the kernel's notifications do; what changed
//! is worked out by whoever prints it. [`diff`] makes the events of a transition between two
//! states in the reference's order, so an engine needs nothing but its states.

use serde::{Deserialize, Serialize};

use crate::{ConnectionStatus, DeviceStatus, PathStatus, PeerDeviceStatus, ResourceStatus};

/// What happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Part of the initial state.
    Exists,
    /// New.
    Create,
    /// Different from before.
    Change,
    /// Gone; the value is the last one.
    Destroy,
}

impl Action {
    /// The word printed.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exists => "exists",
            Self::Create => "create",
            Self::Change => "change",
            Self::Destroy => "destroy",
        }
    }
}

/// Start or end of a handler's run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HelperPhase {
    /// It is about to run.
    Call,
    /// It ended with that raw wait status (exit code times 256).
    Response {
        /// Wait status.
        status: i32,
    },
}

/// One event. Objects are named by resource, node id, connection name and volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum Event {
    /// A resource; its lists are empty.
    Resource {
        /// What happened.
        action: Action,
        /// The resource.
        value: Box<ResourceStatus>,
        /// Whether promoting would be allowed.
        may_promote: bool,
        /// How good a candidate for promotion this node is.
        promotion_score: u32,
    },
    /// A volume.
    Device {
        /// What happened.
        action: Action,
        /// Resource name.
        resource: String,
        /// The volume.
        value: Box<DeviceStatus>,
    },
    /// A connection; its lists are empty.
    Connection {
        /// What happened.
        action: Action,
        /// Resource name.
        resource: String,
        /// The connection.
        value: Box<ConnectionStatus>,
    },
    /// A volume seen over a connection.
    PeerDevice {
        /// What happened.
        action: Action,
        /// Resource name.
        resource: String,
        /// Node id of the peer.
        peer_node_id: i32,
        /// Connection name.
        conn_name: String,
        /// The peer device.
        value: Box<PeerDeviceStatus>,
    },
    /// A path.
    Path {
        /// What happened.
        action: Action,
        /// Resource name.
        resource: String,
        /// Node id of the peer.
        peer_node_id: i32,
        /// Connection name.
        conn_name: String,
        /// The path.
        value: Box<PathStatus>,
    },
    /// A handler runs or ran.
    Helper {
        /// Start or end.
        phase: HelperPhase,
        /// Resource name.
        resource: String,
        /// Node id and connection name of the peer it is about.
        peer: Option<(i32, String)>,
        /// Volume and minor it is about.
        device: Option<(u16, u32)>,
        /// Handler name.
        helper: String,
    },
    /// End of the initial state: `exists -`.
    ExistsEnd,
}

/// The events of the transition from `old` to `new`.
///
/// `None` means the resource does not exist. Pass `initial` to get `exists` instead of `create`
/// (without the closing [`Event::ExistsEnd`]). Parents are created before and destroyed after their
/// children.
#[must_use]
pub fn diff(old: Option<&ResourceStatus>, new: Option<&ResourceStatus>, initial: bool) -> Vec<Event> {
    let mut differ = Differ { out: Vec::new(), born: if initial { Action::Exists } else { Action::Create } };
    match (old, new) {
        (None, None) => {}
        (_, Some(new)) => differ.update(old, new),
        (Some(old), None) => differ.destroy(old),
    }
    differ.out
}

struct Differ {
    out: Vec<Event>,
    born: Action,
}

impl Differ {
    fn update(&mut self, old: Option<&ResourceStatus>, new: &ResourceStatus) {
        self.resource(old, new);
        self.connections(old, new);
        self.devices(old, new);
        for connection in &new.connections {
            let before = old.and_then(|o| o.connection(connection.peer_node_id));
            self.peer_devices(new, before, connection);
            self.paths(new, before, connection);
            self.lost_peer_devices(new, before, connection);
        }
        let Some(old) = old else { return };
        for gone in old.connections.iter().filter(|c| new.connection(c.peer_node_id).is_none()) {
            self.destroy_connection(&old.name, gone);
        }
        for gone in old.devices.iter().filter(|d| new.device(d.volume).is_none()) {
            self.device(Action::Destroy, &old.name, gone);
        }
    }

    fn destroy(&mut self, old: &ResourceStatus) {
        for connection in &old.connections {
            self.destroy_connection(&old.name, connection);
        }
        for device in &old.devices {
            self.device(Action::Destroy, &old.name, device);
        }
        self.out.push(resource_event(Action::Destroy, old));
    }

    fn resource(&mut self, old: Option<&ResourceStatus>, new: &ResourceStatus) {
        let event = resource_event(self.born, new);
        let Some(old) = old else {
            self.out.push(event);
            return;
        };
        if resource_event(self.born, old) != event {
            self.out.push(resource_event(Action::Change, new));
        }
    }

    fn connections(&mut self, old: Option<&ResourceStatus>, new: &ResourceStatus) {
        for connection in &new.connections {
            let value = without_children(connection);
            let action = match old.and_then(|o| o.connection(connection.peer_node_id)) {
                None => self.born,
                Some(before) if without_children(before) != value => Action::Change,
                Some(_) => continue,
            };
            self.out.push(Event::Connection { action, resource: new.name.clone(), value: Box::new(value) });
        }
    }

    fn devices(&mut self, old: Option<&ResourceStatus>, new: &ResourceStatus) {
        for device in &new.devices {
            match old.and_then(|o| o.device(device.volume)) {
                None => self.device(self.born, &new.name, device),
                Some(before) if before != device => self.device(Action::Change, &new.name, device),
                Some(_) => {}
            }
        }
    }

    fn peer_devices(
        &mut self,
        resource: &ResourceStatus,
        old: Option<&ConnectionStatus>,
        new: &ConnectionStatus,
    ) {
        let find = |volume| old.and_then(|o| o.peer_devices.iter().find(|p| p.volume == volume));
        for peer_device in &new.peer_devices {
            match find(peer_device.volume) {
                None => self.peer_device(self.born, &resource.name, new, peer_device),
                Some(before) if before != peer_device => {
                    self.peer_device(Action::Change, &resource.name, new, peer_device);
                }
                Some(_) => {}
            }
        }
    }

    fn paths(&mut self, resource: &ResourceStatus, old: Option<&ConnectionStatus>, new: &ConnectionStatus) {
        let before = old.map(paths_of).unwrap_or_default();
        let same =
            |a: &PathStatus, b: &PathStatus| a.this_host == b.this_host && a.remote_host == b.remote_host;
        for path in paths_of(new) {
            match before.iter().find(|p| same(p, path)) {
                None => self.path(self.born, &resource.name, new, path),
                Some(was) if was != path => self.path(Action::Change, &resource.name, new, path),
                Some(_) => {}
            }
        }
        for gone in before {
            if !paths_of(new).iter().any(|p| same(p, gone)) {
                self.path(Action::Destroy, &resource.name, new, gone);
            }
        }
    }

    fn lost_peer_devices(
        &mut self,
        resource: &ResourceStatus,
        old: Option<&ConnectionStatus>,
        new: &ConnectionStatus,
    ) {
        for gone in old.map(|o| o.peer_devices.as_slice()).unwrap_or_default() {
            if !new.peer_devices.iter().any(|p| p.volume == gone.volume) {
                self.peer_device(Action::Destroy, &resource.name, new, gone);
            }
        }
    }

    fn destroy_connection(&mut self, resource: &str, connection: &ConnectionStatus) {
        for path in paths_of(connection) {
            self.path(Action::Destroy, resource, connection, path);
        }
        for peer_device in &connection.peer_devices {
            self.peer_device(Action::Destroy, resource, connection, peer_device);
        }
        self.out.push(Event::Connection {
            action: Action::Destroy,
            resource: resource.to_owned(),
            value: Box::new(without_children(connection)),
        });
    }

    fn device(&mut self, action: Action, resource: &str, device: &DeviceStatus) {
        self.out.push(Event::Device {
            action,
            resource: resource.to_owned(),
            value: Box::new(device.clone()),
        });
    }

    fn peer_device(
        &mut self,
        action: Action,
        resource: &str,
        connection: &ConnectionStatus,
        value: &PeerDeviceStatus,
    ) {
        self.out.push(Event::PeerDevice {
            action,
            resource: resource.to_owned(),
            peer_node_id: connection.peer_node_id,
            conn_name: connection.name.clone(),
            value: Box::new(value.clone()),
        });
    }

    fn path(&mut self, action: Action, resource: &str, connection: &ConnectionStatus, value: &PathStatus) {
        self.out.push(Event::Path {
            action,
            resource: resource.to_owned(),
            peer_node_id: connection.peer_node_id,
            conn_name: connection.name.clone(),
            value: Box::new(value.clone()),
        });
    }
}

fn paths_of(connection: &ConnectionStatus) -> &[PathStatus] {
    connection.paths.as_deref().unwrap_or_default()
}

fn without_children(connection: &ConnectionStatus) -> ConnectionStatus {
    ConnectionStatus { paths: None, peer_devices: Vec::new(), name: connection.name.clone(), ..*connection }
}

fn resource_event(action: Action, resource: &ResourceStatus) -> Event {
    Event::Resource {
        action,
        may_promote: resource.may_promote(),
        promotion_score: resource.promotion_score(),
        value: Box::new(ResourceStatus {
            devices: Vec::new(),
            connections: Vec::new(),
            name: resource.name.clone(),
            ..*resource
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ReplicationState, Role};

    fn sample() -> ResourceStatus {
        let all: Vec<ResourceStatus> =
            serde_json::from_str(include_str!("../tests/data/status-9.2.18.json")).unwrap();
        let mut r0 = all.into_iter().next().unwrap();
        r0.connections[0].paths = Some(vec![PathStatus {
            this_host: "10.0.0.1:7788".parse().unwrap(),
            remote_host: "10.0.0.2:7788".parse().unwrap(),
            established: true,
        }]);
        r0
    }

    fn words(events: &[Event]) -> Vec<String> {
        let mut printer = crate::render::EventPrinter::new(false, false);
        events
            .iter()
            .filter_map(|e| printer.line(e))
            .map(|l| l.split(' ').take(2).collect::<Vec<_>>().join(" "))
            .collect()
    }

    #[test]
    fn parents_come_first_and_go_last() {
        let r0 = sample();
        assert_eq!(
            words(&diff(None, Some(&r0), true)),
            ["exists resource", "exists connection", "exists device", "exists peer-device", "exists path"]
        );
        assert_eq!(
            words(&diff(Some(&r0), None, false)),
            [
                "destroy path",
                "destroy peer-device",
                "destroy connection",
                "destroy device",
                "destroy resource"
            ]
        );
        assert!(diff(Some(&r0), Some(&r0), false).is_empty());
    }

    #[test]
    fn change_lines_hold_what_changed() {
        let before = sample();
        let mut after = before.clone();
        after.role = Role::Secondary;
        after.connections[0].peer_devices[0].replication_state = ReplicationState::WFBitMapS;
        let mut printer = crate::render::EventPrinter::new(false, false);
        for event in diff(None, Some(&before), false) {
            printer.line(&event);
        }
        let lines: Vec<String> =
            diff(Some(&before), Some(&after), false).iter().filter_map(|e| printer.line(e)).collect();
        assert_eq!(
            lines,
            [
                "change resource name:r0 role:Secondary may_promote:yes promotion_score:10102",
                "change peer-device name:r0 peer-node-id:1 conn-name:vm2 volume:0 replication:WFBitMapS"
            ]
        );
    }
}
