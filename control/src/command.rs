//! What can be asked of an engine: the low-level verbs, typed (`spec/cli.md` §11).

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Endpoint, Options};

/// Where in the metadata device the metadata of a volume begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MetaIndex {
    /// At the end of the backing device.
    Internal,
    /// The whole external metadata device (`flexible` in `drbdsetup`, `flex-external` in `drbdmeta`).
    FlexExternal,
    /// The slot of 128 MiB with that number of an external device.
    Index(u8),
}

impl fmt::Display for MetaIndex {
    /// The word `drbdsetup attach` takes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Internal => f.write_str("internal"),
            Self::FlexExternal => f.write_str("flexible"),
            Self::Index(n) => write!(f, "{n}"),
        }
    }
}

impl FromStr for MetaIndex {
    type Err = String;
    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "internal" | "flex-internal" => Ok(Self::Internal),
            "flexible" | "flex-external" => Ok(Self::FlexExternal),
            n => n
                .parse()
                .map(Self::Index)
                .map_err(|_| format!("'{n}' is no metadata index; expected internal, flexible or 0..255")),
        }
    }
}

/// A command to the engine of one resource.
///
/// The resource is the one whose socket it is sent to. Volumes with a local view are named by
/// minor, peers by node id, as `drbdsetup` does. Where `set_defaults` is true, options that are not
/// given go back to their defaults; otherwise they keep their value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum Command {
    /// Makes the resource. First command to a fresh engine.
    NewResource {
        /// Name; must be the one the engine was started for.
        name: String,
        /// Own node id, 0..31.
        node_id: u8,
        /// Resource options.
        options: Options,
    },
    /// Changes resource options.
    ResourceOptions {
        /// Resource options.
        options: Options,
        /// Reset the others.
        set_defaults: bool,
    },
    /// Makes a volume.
    NewMinor {
        /// Device number of `/dev/drbdN`.
        minor: u32,
        /// Volume number in the resource.
        volume: u16,
        /// Device options; `diskless=yes` for an intentionally diskless volume.
        options: Options,
    },
    /// Removes a volume without disk.
    DelMinor {
        /// Device number.
        minor: u32,
    },
    /// Makes a connection, in StandAlone.
    NewPeer {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Connection name shown by status.
        name: String,
        /// Net options (without `_name`).
        options: Options,
    },
    /// Disconnects and removes a connection.
    DelPeer {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Do not ask the peer.
        force: bool,
    },
    /// Frees the bitmap slot of a removed peer.
    ForgetPeer {
        /// Node id of the peer.
        peer_node_id: u8,
    },
    /// Adds a path to a connection.
    NewPath {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Own end.
        local: Endpoint,
        /// The peer's end.
        remote: Endpoint,
    },
    /// Removes a path.
    DelPath {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Own end.
        local: Endpoint,
        /// The peer's end.
        remote: Endpoint,
    },
    /// Changes net options.
    NetOptions {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Net options.
        options: Options,
        /// Reset the others.
        set_defaults: bool,
    },
    /// Changes peer-device options.
    PeerDeviceOptions {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Volume number.
        volume: u16,
        /// Peer-device options.
        options: Options,
        /// Reset the others.
        set_defaults: bool,
    },
    /// Attaches a backing device.
    Attach {
        /// Device number.
        minor: u32,
        /// Path of the backing device.
        backing_device: String,
        /// Path of the metadata device; the backing device itself for internal metadata.
        meta_device: String,
        /// Where the metadata is.
        meta_index: MetaIndex,
        /// Attach options.
        options: Options,
    },
    /// Changes disk options of an attached volume.
    DiskOptions {
        /// Device number.
        minor: u32,
        /// Disk options.
        options: Options,
        /// Reset the others.
        set_defaults: bool,
    },
    /// Detaches the backing device.
    Detach {
        /// Device number.
        minor: u32,
        /// Do not wait for I/O of a failed device.
        force: bool,
        /// The volume becomes intentionally diskless.
        diskless: bool,
    },
    /// Starts connecting.
    Connect {
        /// Node id of the peer.
        peer_node_id: u8,
        /// In a split brain this side's changes are given up.
        discard_my_data: bool,
        /// Only find out what would happen.
        tentative: bool,
    },
    /// Goes to StandAlone.
    Disconnect {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Do not ask the peer.
        force: bool,
    },
    /// Promotes.
    Primary {
        /// Declare the own data good.
        force: bool,
    },
    /// Demotes.
    Secondary {
        /// Fail the I/O of openers.
        force: bool,
    },
    /// Marks the own data as outdated.
    Outdate {
        /// Device number.
        minor: u32,
    },
    /// Declares the own data bad and resyncs it.
    Invalidate {
        /// Device number.
        minor: u32,
        /// Resync everything instead of what the bitmap says.
        reset_bitmap: bool,
        /// The node to sync from; any when absent.
        sync_from: Option<u8>,
    },
    /// Declares a peer's data bad.
    InvalidateRemote {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Volume number.
        volume: u16,
        /// Resync everything instead of what the bitmap says.
        reset_bitmap: bool,
    },
    /// Begins a new data generation.
    NewCurrentUuid {
        /// Device number.
        minor: u32,
        /// Declare all copies equal (skip the initial sync).
        clear_bitmap: bool,
        /// Resync all peers from here.
        force_resync: bool,
    },
    /// Holds new I/O.
    SuspendIo {
        /// Device number.
        minor: u32,
    },
    /// Releases I/O held by the user, by fencing or for lack of data.
    ResumeIo {
        /// Device number.
        minor: u32,
    },
    /// Pauses resync with a peer.
    PauseSync {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Volume number.
        volume: u16,
    },
    /// Ends a pause set here.
    ResumeSync {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Volume number.
        volume: u16,
    },
    /// Adopts a new size of the backing devices.
    Resize {
        /// Device number.
        minor: u32,
        /// Wanted size in 512-byte sectors; as large as possible when absent.
        size_sectors: Option<u64>,
        /// Do not ask peers that are away.
        assume_peer_has_space: bool,
        /// Do not resync the new part.
        assume_clean: bool,
        /// New number of activity-log stripes.
        al_stripes: Option<u32>,
        /// New activity-log stripe size in KiB.
        al_stripe_size_kib: Option<u32>,
    },
    /// Starts an online verify.
    Verify {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Volume number.
        volume: u16,
        /// First sector.
        start_sector: Option<u64>,
        /// Last sector.
        stop_sector: Option<u64>,
    },
    /// Tells the engine what to run on events; replaces what was told before.
    Handlers {
        /// Handler name to the text given to `/bin/sh -c`.
        handlers: BTreeMap<String, String>,
        /// The configuration file, for `DRBD_CONF`.
        config_file: String,
        /// Host names by node id, for `DRBD_NODE_ID_n`.
        node_names: BTreeMap<u8, String>,
    },
    /// Takes everything down and ends the engine.
    Down,
    /// Ends an engine without volumes and connections.
    DelResource,
    /// Asks for [`Payload::Status`](crate::Payload::Status).
    Status,
    /// Asks for [`Payload::Running`](crate::Payload::Running).
    Show,
    /// Asks for [`Payload::GenerationInfo`](crate::Payload::GenerationInfo).
    GetGi {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Volume number.
        volume: u16,
    },
    /// Asks which start-up timeout applies: [`Payload::Timeout`](crate::Payload::Timeout).
    TimeoutType {
        /// Node id of the peer.
        peer_node_id: u8,
        /// Volume number.
        volume: u16,
    },
    /// Turns the connection into an event stream: after the reply come
    /// [`ServerMessage::Events`](crate::ServerMessage::Events), first the present state.
    Subscribe,
}

impl Command {
    /// The `drbdsetup` verb.
    #[must_use]
    pub const fn verb(&self) -> &'static str {
        match self {
            Self::NewResource { .. } => "new-resource",
            Self::ResourceOptions { .. } => "resource-options",
            Self::NewMinor { .. } => "new-minor",
            Self::DelMinor { .. } => "del-minor",
            Self::NewPeer { .. } => "new-peer",
            Self::DelPeer { .. } => "del-peer",
            Self::ForgetPeer { .. } => "forget-peer",
            Self::NewPath { .. } => "new-path",
            Self::DelPath { .. } => "del-path",
            Self::NetOptions { .. } => "net-options",
            Self::PeerDeviceOptions { .. } => "peer-device-options",
            Self::Attach { .. } => "attach",
            Self::DiskOptions { .. } => "disk-options",
            Self::Detach { .. } => "detach",
            Self::Connect { .. } => "connect",
            Self::Disconnect { .. } => "disconnect",
            Self::Primary { .. } => "primary",
            Self::Secondary { .. } => "secondary",
            Self::Outdate { .. } => "outdate",
            Self::Invalidate { .. } => "invalidate",
            Self::InvalidateRemote { .. } => "invalidate-remote",
            Self::NewCurrentUuid { .. } => "new-current-uuid",
            Self::SuspendIo { .. } => "suspend-io",
            Self::ResumeIo { .. } => "resume-io",
            Self::PauseSync { .. } => "pause-sync",
            Self::ResumeSync { .. } => "resume-sync",
            Self::Resize { .. } => "resize",
            Self::Verify { .. } => "verify",
            Self::Handlers { .. } => "handlers",
            Self::Down => "down",
            Self::DelResource => "del-resource",
            Self::Status => "status",
            Self::Show => "show",
            Self::GetGi { .. } => "get-gi",
            Self::TimeoutType { .. } => "timeout-type",
            Self::Subscribe => "events2",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ClientMessage, FrameDecoder, encode};

    #[test]
    fn commands_survive_the_wire() {
        let commands = vec![
            Command::NewResource {
                name: "r0".into(),
                node_id: 3,
                options: [("quorum", "majority")].into_iter().collect(),
            },
            Command::NewPath {
                peer_node_id: 1,
                local: "ipv4:10.0.0.1:7788".parse().unwrap(),
                remote: "ipv6:[fd00::1]:7788".parse().unwrap(),
            },
            Command::Handlers {
                handlers: BTreeMap::from([("fence-peer".into(), "/bin/true".into())]),
                config_file: "/etc/drbd.conf".into(),
                node_names: BTreeMap::from([(0, "a".into()), (1, "b".into())]),
            },
            Command::Down,
        ];
        for command in commands {
            let message = ClientMessage::Request { id: 7, command };
            let mut decoder = FrameDecoder::new();
            decoder.push(&encode(&message).unwrap());
            assert_eq!(decoder.next_message::<ClientMessage>().unwrap(), Some(message));
        }
    }
}
