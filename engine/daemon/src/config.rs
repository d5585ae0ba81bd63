//! What this process knows about the resource besides the core: names, paths, option texts, devices.

use palisade_control::{
    ConnectionState, MetaIndex, Options, RunningBacking, RunningConnection, RunningPath, RunningPeerDevice,
    RunningResource, RunningVolume,
};
use std::collections::BTreeMap;

/// An attached backing device.
#[derive(Clone, Debug)]
pub(crate) struct LocalBacking {
    pub disk: String,
    pub meta_disk: String,
    pub meta_index: MetaIndex,
    pub options: Options,
}

/// A volume.
#[derive(Clone, Debug)]
pub(crate) struct LocalVolume {
    pub minor: u32,
    /// Intentionally diskless.
    pub client: bool,
    pub options: Options,
    pub backing: Option<LocalBacking>,
}

/// A peer.
#[derive(Clone, Debug)]
pub(crate) struct LocalPeer {
    pub name: String,
    pub options: Options,
    pub paths: Vec<RunningPath>,
    pub peer_devices: BTreeMap<u16, Options>,
    /// `bitmap` of the peer devices.
    pub diskful: bool,
    /// `peer-tiebreaker` of the peer devices.
    pub tiebreaker: bool,
}

/// Everything told by the administrator.
#[derive(Clone, Debug, Default)]
pub(crate) struct Local {
    pub node_id: Option<u8>,
    pub options: Options,
    pub volumes: BTreeMap<u16, LocalVolume>,
    pub peers: BTreeMap<u8, LocalPeer>,
    pub handlers: BTreeMap<String, String>,
    pub config_file: String,
    pub node_names: BTreeMap<u8, String>,
}

impl Local {
    /// Volume number of a minor.
    pub(crate) fn volume_of(&self, minor: u32) -> Option<u16> {
        self.volumes.iter().find(|(_, v)| v.minor == minor).map(|(nr, _)| *nr)
    }

    /// The running configuration. Secrets are in it: it goes to root only.
    pub(crate) fn running(&self, name: &str, state: impl Fn(u8) -> ConnectionState) -> RunningResource {
        let volumes = self
            .volumes
            .iter()
            .map(|(volume, v)| RunningVolume {
                volume: *volume,
                minor: v.minor,
                client: v.client,
                device_options: v.options.clone(),
                backing: v.backing.as_ref().map(|b| RunningBacking {
                    disk: b.disk.clone(),
                    meta_disk: b.meta_disk.clone(),
                    meta_index: b.meta_index,
                    options: b.options.clone(),
                }),
            })
            .collect();
        let connections = self
            .peers
            .iter()
            .map(|(id, p)| RunningConnection {
                peer_node_id: *id,
                name: p.name.clone(),
                connection_state: state(*id),
                paths: p.paths.clone(),
                options: p.options.clone(),
                peer_devices: p
                    .peer_devices
                    .iter()
                    .map(|(volume, options)| RunningPeerDevice { volume: *volume, options: options.clone() })
                    .collect(),
            })
            .collect();
        RunningResource {
            name: name.to_owned(),
            node_id: self.node_id.map_or(-1, i32::from),
            options: self.options.clone(),
            volumes,
            connections,
            handlers: self.handlers.clone(),
        }
    }
}
