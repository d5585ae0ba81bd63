//! The state of a resource as everyone sees it: the `status --json` schema (`spec/cli.md` §12.2).
//!
//! The serialised names are those of the schema, so that the reference's own JSON decodes into
//! these types. Fields the schema lacks but the text output needs come in addition and default to
//! something harmless. Derived values (`percent-in-sync`, rates) are computed when rendering.

use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{ConnectionState, DiskState, Endpoint, ReplicationState, Role, WriteOrdering};

/// One resource on this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ResourceStatus {
    /// Resource name.
    pub name: String,
    /// Own node id; -1 if not known (8.4).
    #[serde(default = "unknown_node_id")]
    pub node_id: i32,
    /// Own role.
    pub role: Role,
    /// I/O is held on the user's wish.
    #[serde(default)]
    pub suspended_user: bool,
    /// I/O is held because no current data is reachable.
    #[serde(default)]
    pub suspended_no_data: bool,
    /// I/O is held until a peer is fenced.
    #[serde(default)]
    pub suspended_fencing: bool,
    /// I/O is held for lack of quorum.
    #[serde(default)]
    pub suspended_quorum: bool,
    /// A forced demote makes remaining I/O fail.
    #[serde(default)]
    pub force_io_failures: bool,
    /// How write order is kept.
    #[serde(default)]
    pub write_ordering: WriteOrdering,
    /// Volumes, by number.
    #[serde(default)]
    pub devices: Vec<DeviceStatus>,
    /// Connections, by name.
    #[serde(default)]
    pub connections: Vec<ConnectionStatus>,
}

/// One volume on this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceStatus {
    /// Volume number.
    pub volume: u16,
    /// Device number.
    pub minor: u32,
    /// State of the own disk.
    pub disk_state: DiskState,
    /// Intentionally diskless.
    #[serde(default)]
    pub client: bool,
    /// Whether someone has the device open; absent if not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open: Option<bool>,
    /// Whether the partition has quorum.
    #[serde(default = "yes")]
    pub quorum: bool,
    /// Backing device; not part of the schema.
    #[serde(default, rename = "backing_dev", skip_serializing_if = "Option::is_none")]
    pub backing_dev: Option<String>,
    /// Counters, if known.
    #[serde(flatten, default)]
    pub statistics: Option<DeviceStatistics>,
}

/// Counters of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DeviceStatistics {
    /// Size in KiB.
    pub size: u64,
    /// KiB read from the disk.
    pub read: u64,
    /// KiB written to the disk.
    pub written: u64,
    /// Activity-log transactions.
    pub al_writes: u64,
    /// Bitmap writes.
    pub bm_writes: u64,
    /// Requests of the upper layer in flight.
    pub upper_pending: u64,
    /// Requests to the disk in flight.
    pub lower_pending: u64,
    /// Activity-log updates are held; not part of the schema.
    #[serde(default)]
    pub al_suspended: bool,
    /// The upper side is congested; not part of the schema.
    #[serde(default)]
    pub blocked_upper: bool,
    /// The lower side is congested; not part of the schema.
    #[serde(default)]
    pub blocked_lower: bool,
}

/// One connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ConnectionStatus {
    /// Node id of the peer; -1 if not known (8.4).
    #[serde(default = "unknown_node_id")]
    pub peer_node_id: i32,
    /// Connection name, usually the peer's host name.
    #[serde(default)]
    pub name: String,
    /// State of the connection.
    pub connection_state: ConnectionState,
    /// The link backs up.
    #[serde(default)]
    pub congested: bool,
    /// Role of the peer.
    pub peer_role: Role,
    /// Encrypted; absent if not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<bool>,
    /// Sectors of application writes in flight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ap_in_flight: Option<u64>,
    /// Sectors of resync in flight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rs_in_flight: Option<u64>,
    /// Paths; absent if not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paths: Option<Vec<PathStatus>>,
    /// The volumes as seen over this connection, by number.
    #[serde(default, rename = "peer_devices")]
    pub peer_devices: Vec<PeerDeviceStatus>,
}

/// One path of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStatus {
    /// Own end.
    pub this_host: Endpoint,
    /// The peer's end.
    pub remote_host: Endpoint,
    /// Whether it carries or could carry traffic now.
    pub established: bool,
}

/// One volume as seen over one connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PeerDeviceStatus {
    /// Volume number.
    pub volume: u16,
    /// Replication state.
    pub replication_state: ReplicationState,
    /// State of the peer's disk.
    pub peer_disk_state: DiskState,
    /// The peer is intentionally diskless.
    #[serde(default)]
    pub peer_client: bool,
    /// Why resync is paused.
    #[serde(default)]
    pub resync_suspended: ResyncSuspended,
    /// KiB received.
    #[serde(default)]
    pub received: u64,
    /// KiB sent.
    #[serde(default)]
    pub sent: u64,
    /// KiB out of sync.
    #[serde(default)]
    pub out_of_sync: u64,
    /// Requests sent and not answered.
    #[serde(default)]
    pub pending: u64,
    /// Requests received and not answered.
    #[serde(default)]
    pub unacked: u64,
    /// Percentage of a running resync, where the source gives no details (8.4).
    #[serde(default, rename = "percent-resync-done", skip_serializing_if = "Option::is_none")]
    pub resync_done_percent: Option<f64>,
    /// Whether the peer's data generation is known to be stable; not part of the schema. Counts
    /// for `may_promote` (`spec/cli.md` §13).
    #[serde(default = "yes")]
    pub stable: bool,
    /// Progress of a running resync or verify.
    #[serde(flatten, default)]
    pub sync: Option<SyncDetails>,
}

/// Progress of a resync or verify. Sizes are 512-byte sectors, times milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SyncDetails {
    /// Sectors to go through altogether.
    pub rs_total: u64,
    /// Time since the start.
    pub rs_dt_start_ms: u64,
    /// Time spent paused.
    pub rs_paused_ms: u64,
    /// Span of the short window.
    pub rs_dt0_ms: u64,
    /// Sectors done in the short window.
    pub rs_db0_sectors: u64,
    /// Span of the long window.
    pub rs_dt1_ms: u64,
    /// Sectors done in the long window.
    pub rs_db1_sectors: u64,
    /// Sectors that failed.
    #[serde(default)]
    pub rs_failed: u64,
    /// Sectors found equal by checksum.
    #[serde(default)]
    pub rs_same_csum: u64,
    /// Rate the controller wants, KiB/s; 0 if it gives none.
    #[serde(default)]
    pub want: f64,
    /// Present while an online verify runs.
    #[serde(flatten, default)]
    pub verify: Option<VerifyDetails>,
}

/// Progress of an online verify, in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VerifyDetails {
    /// First sector.
    pub ov_start_sector: u64,
    /// Last sector.
    pub ov_stop_sector: u64,
    /// Present sector.
    pub ov_position: u64,
    /// Sectors left.
    pub ov_left: u64,
    /// Sectors skipped.
    pub ov_skipped: u64,
}

/// Reasons why a resync is paused; in text `no` or the reasons joined by commas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ResyncSuspended {
    /// By the administrator here.
    pub user: bool,
    /// By the peer.
    pub peer: bool,
    /// By `resync-after`.
    pub dependency: bool,
    /// By the limit of parallel resyncs.
    pub max_parallel: bool,
}

impl ResyncSuspended {
    /// Whether any reason holds.
    #[must_use]
    pub const fn any(self) -> bool {
        self.user || self.peer || self.dependency || self.max_parallel
    }
}

impl fmt::Display for ResyncSuspended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reasons = [
            (self.user, "user"),
            (self.peer, "peer"),
            (self.dependency, "dependency"),
            (self.max_parallel, "max-parallel"),
        ];
        f.write_str(&joined(&reasons))
    }
}

impl Serialize for ResyncSuspended {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ResyncSuspended {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

impl std::str::FromStr for ResyncSuspended {
    type Err = crate::UnknownState;
    fn from_str(text: &str) -> Result<Self, crate::UnknownState> {
        let mut out = Self::default();
        for word in text.split(',') {
            match word {
                "no" => {}
                "user" => out.user = true,
                "peer" => out.peer = true,
                "dependency" => out.dependency = true,
                "max-parallel" => out.max_parallel = true,
                other => {
                    return Err(crate::UnknownState {
                        kind: "reason to pause a resync",
                        word: other.to_owned(),
                    });
                }
            }
        }
        Ok(out)
    }
}

/// The names whose flag is set, comma separated, or `no`.
fn joined(reasons: &[(bool, &str)]) -> String {
    let set: Vec<&str> = reasons.iter().filter(|(on, _)| *on).map(|(_, name)| *name).collect();
    if set.is_empty() { "no".to_owned() } else { set.join(",") }
}

fn unknown_node_id() -> i32 {
    -1
}

fn yes() -> bool {
    true
}

impl ResourceStatus {
    /// Whether I/O is held for any reason.
    #[must_use]
    pub const fn suspended(&self) -> bool {
        self.suspended_user || self.suspended_no_data || self.suspended_fencing || self.suspended_quorum
    }

    /// The reasons in the order of `spec/cli.md` §12.1, or `no`.
    #[must_use]
    pub fn suspended_text(&self) -> String {
        joined(&[
            (self.suspended_user, "user"),
            (self.suspended_no_data, "no-data"),
            (self.suspended_fencing, "fencing"),
            (self.suspended_quorum, "quorum"),
        ])
    }

    /// The volume with that number.
    #[must_use]
    pub fn device(&self, volume: u16) -> Option<&DeviceStatus> {
        self.devices.iter().find(|d| d.volume == volume)
    }

    /// The connection to that node.
    #[must_use]
    pub fn connection(&self, peer_node_id: i32) -> Option<&ConnectionStatus> {
        self.connections.iter().find(|c| c.peer_node_id == peer_node_id)
    }

    /// Sorts as the reference prints: connections by name with unnamed ones last, volumes by number.
    pub fn sort(&mut self) {
        self.devices.sort_by_key(|d| d.volume);
        self.connections.sort_by(|a, b| (a.name.is_empty(), &a.name).cmp(&(b.name.is_empty(), &b.name)));
        for connection in &mut self.connections {
            connection.peer_devices.sort_by_key(|p| p.volume);
        }
    }

    /// Whether promoting would be allowed (`spec/cli.md` §13, `may_promote`).
    #[must_use]
    pub fn may_promote(&self) -> bool {
        let no_primary = self.role != Role::Primary
            && !self
                .connections
                .iter()
                .any(|c| c.connection_state == ConnectionState::Connected && c.peer_role == Role::Primary);
        no_primary
            && !self.devices.is_empty()
            && !self.force_io_failures
            && self.devices.iter().all(|d| {
                d.quorum
                    && (d.disk_state == DiskState::UpToDate
                        || self
                            .peer_devices_of(d.volume)
                            .any(|p| p.peer_disk_state == DiskState::UpToDate && p.stable))
            })
    }

    /// How good a candidate for promotion this node is (`spec/cli.md` §13, `promotion_score`).
    #[must_use]
    pub fn promotion_score(&self) -> u32 {
        if self.devices.is_empty() || self.force_io_failures || self.devices.iter().any(|d| !d.quorum) {
            return 0;
        }
        let replicas = |d: &DeviceStatus| {
            usize::from(d.disk_state == DiskState::UpToDate)
                + self.peer_devices_of(d.volume).filter(|p| p.peer_disk_state == DiskState::UpToDate).count()
        };
        let fewest = self.devices.iter().map(replicas).min().unwrap_or(0);
        if fewest == 0 {
            return 0;
        }
        let with_data = self.devices.iter().all(|d| {
            matches!(d.disk_state, DiskState::UpToDate | DiskState::Consistent | DiskState::Inconsistent)
        });
        let local = self.devices.iter().filter(|d| d.disk_state == DiskState::UpToDate).count();
        let capped = |n: usize| u32::try_from(n.min(99)).unwrap_or(99);
        u32::from(with_data) * 10_000 + 100 * capped(local) + capped(fewest)
    }

    fn peer_devices_of(&self, volume: u16) -> impl Iterator<Item = &PeerDeviceStatus> {
        self.connections.iter().flat_map(|c| &c.peer_devices).filter(move |p| p.volume == volume)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDED: &str = include_str!("../tests/data/status-9.2.18.json");

    #[test]
    fn the_reference_output_decodes() {
        let all: Vec<ResourceStatus> = serde_json::from_str(RECORDED).unwrap();
        let r0 = &all[0];
        assert_eq!((r0.name.as_str(), r0.node_id, r0.role), ("r0", 0, Role::Primary));
        assert_eq!(r0.devices[0].statistics.unwrap().size, 4056);
        assert_eq!(r0.connections[0].peer_devices[0].replication_state, ReplicationState::Established);
        assert_eq!(r0.promotion_score(), 10102);
        assert!(!r0.may_promote());
    }

    #[test]
    fn our_own_form_round_trips() {
        let mut all: Vec<ResourceStatus> = serde_json::from_str(RECORDED).unwrap();
        let pd = &mut all[0].connections[0].peer_devices[0];
        pd.resync_suspended = ResyncSuspended { user: true, dependency: true, ..Default::default() };
        pd.sync = Some(SyncDetails {
            rs_total: 100,
            rs_dt_start_ms: 1,
            rs_paused_ms: 2,
            rs_dt0_ms: 3,
            rs_db0_sectors: 4,
            rs_dt1_ms: 5,
            rs_db1_sectors: 6,
            rs_failed: 0,
            rs_same_csum: 0,
            want: 250.0,
            verify: None,
        });
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(serde_json::from_str::<Vec<ResourceStatus>>(&text).unwrap(), all);
    }
}
