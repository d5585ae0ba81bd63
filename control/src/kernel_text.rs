//! Reads `drbdsetup status --verbose --statistics`, the only complete view 8.4 gives.

use std::collections::HashMap;
use std::str::FromStr;

use crate::{
    ConnectionState, ConnectionStatus, DeviceStatistics, DeviceStatus, DiskState, PeerDeviceStatus,
    ReplicationState, ResourceStatus, ResyncSuspended, Role, SyncDetails, WriteOrdering,
};

type Fields<'a> = HashMap<&'a str, &'a str>;

/// The resources in that text; the error names what was not understood.
pub(crate) fn parse_status_text(text: &str) -> Result<Vec<ResourceStatus>, String> {
    let mut out: Vec<ResourceStatus> = Vec::new();
    for object in objects(text) {
        object.add_to(&mut out)?;
    }
    Ok(out)
}

/// An object's line with its continuation lines.
struct Object<'a> {
    indent: usize,
    /// First word if it is no `key:value`.
    name: Option<&'a str>,
    fields: Fields<'a>,
}

/// Objects stand at indent 0, 2 and 4; continuation lines are indented by 4 more than their object.
fn objects(text: &str) -> Vec<Object<'_>> {
    let mut out: Vec<Object<'_>> = Vec::new();
    for line in text.lines() {
        let body = line.trim_start();
        if body.is_empty() || body.starts_with('#') {
            continue;
        }
        let indent = line.len() - body.len();
        let mut words = body.split_ascii_whitespace().peekable();
        let continues = out.last().is_some_and(|o| {
            let peer_device = indent == 4 && body.split_ascii_whitespace().any(is_peer_device_word);
            indent == o.indent + 4 && !peer_device
        });
        if !continues {
            let name = words.next_if(|w| indent < 4 && !is_field(w));
            out.push(Object { indent, name, fields: HashMap::new() });
        }
        if let Some(object) = out.last_mut() {
            object.fields.extend(words.filter_map(|w| w.split_once(':')));
        }
    }
    out
}

fn is_field(word: &str) -> bool {
    ["volume:", "minor:", "disk:"].iter().any(|p| word.starts_with(p))
}

fn is_peer_device_word(word: &str) -> bool {
    word.starts_with("replication:") || word.starts_with("peer-disk:")
}

impl Object<'_> {
    fn add_to(&self, out: &mut Vec<ResourceStatus>) -> Result<(), String> {
        if self.indent == 0 {
            out.push(self.resource()?);
            return Ok(());
        }
        let resource = out.last_mut().ok_or("an object before the first resource")?;
        if self.indent == 4 {
            let connection =
                resource.connections.last_mut().ok_or("a peer device before the first connection")?;
            connection.peer_devices.push(self.peer_device()?);
        } else if self.name.is_none() {
            resource.devices.push(self.device()?);
        } else {
            resource.connections.push(self.connection()?);
        }
        Ok(())
    }

    fn get<T: FromStr>(&self, key: &str) -> Result<Option<T>, String> {
        match self.fields.get(key) {
            None => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| format!("'{key}:{text}'")),
        }
    }

    fn need<T: FromStr>(&self, key: &str) -> Result<T, String> {
        self.get(key)?.ok_or_else(|| format!("no '{key}' in a line of {}", self.name.unwrap_or("a volume")))
    }

    fn count(&self, key: &str) -> Result<u64, String> {
        Ok(self.get(key)?.unwrap_or(0))
    }

    fn yes(&self, key: &str) -> bool {
        self.fields.get(key) == Some(&"yes")
    }

    fn listed(&self, key: &str, word: &str) -> bool {
        self.fields.get(key).is_some_and(|list| list.split(',').any(|w| w == word))
    }

    fn resource(&self) -> Result<ResourceStatus, String> {
        Ok(ResourceStatus {
            name: self.name.ok_or("a resource without name")?.to_owned(),
            node_id: self.get("node-id")?.unwrap_or(-1),
            role: self.need::<Role>("role")?,
            suspended_user: self.listed("suspended", "user"),
            suspended_no_data: self.listed("suspended", "no-data"),
            suspended_fencing: self.listed("suspended", "fencing"),
            suspended_quorum: self.listed("suspended", "quorum"),
            force_io_failures: self.yes("force-io-failures"),
            write_ordering: self.get::<WriteOrdering>("write-ordering")?.unwrap_or_default(),
            devices: Vec::new(),
            connections: Vec::new(),
        })
    }

    fn device(&self) -> Result<DeviceStatus, String> {
        let statistics = if self.fields.contains_key("size") {
            Some(DeviceStatistics {
                size: self.count("size")?,
                read: self.count("read")?,
                written: self.count("written")?,
                al_writes: self.count("al-writes")?,
                bm_writes: self.count("bm-writes")?,
                upper_pending: self.count("upper-pending")?,
                lower_pending: self.count("lower-pending")?,
                al_suspended: self.yes("al-suspended"),
                blocked_upper: self.listed("blocked", "upper"),
                blocked_lower: self.listed("blocked", "lower"),
            })
        } else {
            None
        };
        Ok(DeviceStatus {
            volume: self.get("volume")?.unwrap_or(0),
            minor: self.need("minor")?,
            disk_state: self.need::<DiskState>("disk")?,
            client: self.yes("client"),
            open: self.fields.get("open").and_then(|o| match *o {
                "yes" => Some(true),
                "no" => Some(false),
                _ => None,
            }),
            quorum: self.fields.get("quorum") != Some(&"no"),
            backing_dev: self.fields.get("backing_dev").filter(|d| **d != "none").map(|d| (*d).to_owned()),
            statistics,
        })
    }

    fn connection(&self) -> Result<ConnectionStatus, String> {
        Ok(ConnectionStatus {
            peer_node_id: self.get("node-id")?.unwrap_or(-1),
            name: self.name.unwrap_or_default().to_owned(),
            connection_state: self.need::<ConnectionState>("connection")?,
            congested: self.yes("congested"),
            peer_role: self.get::<Role>("role")?.unwrap_or(Role::Unknown),
            tls: self.fields.get("tls").map(|t| *t == "yes"),
            ap_in_flight: self.get("ap-in-flight")?,
            rs_in_flight: self.get("rs-in-flight")?,
            paths: None,
            peer_devices: Vec::new(),
        })
    }

    fn peer_device(&self) -> Result<PeerDeviceStatus, String> {
        Ok(PeerDeviceStatus {
            volume: self.get("volume")?.unwrap_or(0),
            replication_state: self.get::<ReplicationState>("replication")?.unwrap_or(ReplicationState::Off),
            peer_disk_state: self.get::<DiskState>("peer-disk")?.unwrap_or(DiskState::DUnknown),
            peer_client: self.yes("peer-client"),
            resync_suspended: self.get::<ResyncSuspended>("resync-suspended")?.unwrap_or_default(),
            received: self.count("received")?,
            sent: self.count("sent")?,
            out_of_sync: self.count("out-of-sync")?,
            pending: self.count("pending")?,
            unacked: self.count("unacked")?,
            resync_done_percent: self.get("done")?,
            stable: true,
            sync: None::<SyncDetails>,
        })
    }
}
