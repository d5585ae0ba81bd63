//! What the score depends on, derived from the status of a resource (`spec/ocf-agents.md` §2.3).

use palisade_control::{ConnectionState, DiskState, ReplicationState, ResourceStatus, Role};

/// The worst state among the disks of this node, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LocalData {
    /// A disk is missing, failed, not current, or nobody knows.
    Unusable,
    /// A disk is being attached: what it holds is not known yet, but soon.
    Transitional,
    /// Data are consistent; whether they are the newest is not known.
    Consistent,
    /// All data are the newest.
    UpToDate,
}

impl LocalData {
    /// Every state has its place; an attaching or unknown disk never counts as good.
    const fn of(disk: DiskState) -> Self {
        match disk {
            DiskState::UpToDate => Self::UpToDate,
            DiskState::Consistent => Self::Consistent,
            DiskState::Attaching | DiskState::Negotiating => Self::Transitional,
            DiskState::Diskless
            | DiskState::Detaching
            | DiskState::Failed
            | DiskState::Inconsistent
            | DiskState::Outdated
            | DiskState::DUnknown => Self::Unusable,
        }
    }
}

/// The facts of one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// This node is Primary.
    pub primary: bool,
    /// Every volume has quorum. Those of a diskless client count as well.
    pub quorum: bool,
    /// There are volumes, and all of them are diskless on purpose.
    pub client: bool,
    /// The worst disk of this node; without any disk [`LocalData::Unusable`].
    pub local: LocalData,
    /// A peer is Primary and all its volumes are UpToDate.
    pub healthy_peer_primary: bool,
    /// Some peer has all volumes UpToDate.
    pub some_peer_up_to_date: bool,
    /// Some peer has not: one that is there to hold data.
    pub some_peer_not_up_to_date: bool,
    /// The state of a peer's disk is not known.
    pub peer_unknown: bool,
}

impl Facts {
    /// Derives the facts.
    pub fn of(status: &ResourceStatus) -> Self {
        let disks = status.devices.iter().filter(|device| !is_client(device.disk_state, device.client));
        let mut facts = Self {
            primary: status.role == Role::Primary,
            quorum: status.devices.iter().all(|device| device.quorum),
            client: !status.devices.is_empty() && disks.clone().count() == 0,
            local: disks.map(|device| LocalData::of(device.disk_state)).min().unwrap_or(LocalData::Unusable),
            healthy_peer_primary: false,
            some_peer_up_to_date: false,
            some_peer_not_up_to_date: false,
            peer_unknown: false,
        };
        for connection in &status.connections {
            let volumes = &connection.peer_devices;
            if !volumes.is_empty() && volumes.iter().all(|volume| volume.peer_client) {
                continue;
            }
            let up_to_date = !volumes.is_empty()
                && volumes.iter().all(|volume| volume.peer_disk_state == DiskState::UpToDate);
            facts.some_peer_up_to_date |= up_to_date;
            facts.some_peer_not_up_to_date |= !up_to_date;
            facts.peer_unknown |= volumes.iter().any(|volume| volume.peer_disk_state == DiskState::DUnknown);
            facts.healthy_peer_primary |= up_to_date && connection.peer_role == Role::Primary;
        }
        facts
    }

    /// All peers that hold data, at least one, have all volumes UpToDate.
    pub const fn all_peers_up_to_date(&self) -> bool {
        self.some_peer_up_to_date && !self.some_peer_not_up_to_date
    }
}

/// Whether every peer is connected with all volumes, or given up: there is nothing left to wait for
/// (`spec/cli.md` §11, wait commands).
pub fn connected(status: &ResourceStatus) -> bool {
    status.connections.iter().all(|connection| match connection.connection_state {
        ConnectionState::StandAlone | ConnectionState::Disconnecting => true,
        ConnectionState::Connected => {
            connection.peer_devices.iter().all(|volume| volume.replication_state != ReplicationState::Off)
        }
        _ => false,
    })
}

fn is_client(disk: DiskState, client: bool) -> bool {
    disk == DiskState::Diskless && client
}
