//! The running configuration of a resource: what `drbdsetup show` prints and `adjust` compares.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{ConnectionState, Endpoint, MetaIndex, Options};

/// The running configuration. Options hold every value that is known, defaults included or not:
/// an absent option has its default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RunningResource {
    /// Resource name.
    pub name: String,
    /// Own node id; -1 before `new-resource`.
    pub node_id: i32,
    /// Resource options.
    pub options: Options,
    /// Volumes by number.
    pub volumes: Vec<RunningVolume>,
    /// Connections.
    pub connections: Vec<RunningConnection>,
    /// Handlers last told to the engine.
    #[serde(default)]
    pub handlers: BTreeMap<String, String>,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RunningVolume {
    /// Volume number.
    pub volume: u16,
    /// Device number.
    pub minor: u32,
    /// Intentionally diskless.
    pub client: bool,
    /// Device options given at `new-minor` (without `diskless`).
    #[serde(default)]
    pub device_options: Options,
    /// What is attached.
    pub backing: Option<RunningBacking>,
}

/// An attached backing device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RunningBacking {
    /// Path of the backing device.
    pub disk: String,
    /// Path of the metadata device; the backing device for internal metadata.
    pub meta_disk: String,
    /// Where the metadata is.
    pub meta_index: MetaIndex,
    /// Disk options, with `size` if a size was asked for.
    pub options: Options,
}

/// A connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RunningConnection {
    /// Node id of the peer.
    pub peer_node_id: u8,
    /// Connection name.
    pub name: String,
    /// State of the connection.
    pub connection_state: ConnectionState,
    /// Paths.
    pub paths: Vec<RunningPath>,
    /// Net options (without `_name`).
    pub options: Options,
    /// Peer-device options by volume.
    pub peer_devices: Vec<RunningPeerDevice>,
}

/// A path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RunningPath {
    /// Own end.
    pub local: Endpoint,
    /// The peer's end.
    pub remote: Endpoint,
}

/// Peer-device options of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RunningPeerDevice {
    /// Volume number.
    pub volume: u16,
    /// Peer-device options.
    pub options: Options,
}
