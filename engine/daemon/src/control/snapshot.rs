//! The core's state in the model that clients know (`palisade-control`).

use crate::core_api::Core;
use crate::engine::Engine;
use crate::front::device::NodeState;
use palisade_control::{
    ConnectionState, ConnectionStatus, DeviceStatistics, DeviceStatus, DiskState, GenerationInfo, PathStatus,
    PeerDeviceStatus, ReplicationState, ResourceStatus, ResyncSuspended, Role, SyncDetails, WriteOrdering,
};
use palisade_core::status as core;
use palisade_metadata::{DeviceFlags, PeerFlags};
use palisade_wire::enums as wire;

/// Both models spell the states alike.
fn named<T: std::str::FromStr>(name: &impl ToString, otherwise: T) -> T {
    name.to_string().parse().unwrap_or(otherwise)
}

fn role(r: wire::Role) -> Role {
    named(&r, Role::Unknown)
}

fn disk(d: wire::DiskState) -> DiskState {
    named(&d, DiskState::DUnknown)
}

impl Engine {
    /// The whole state; none before `new-resource`.
    pub(crate) fn resource_status(&self) -> Option<ResourceStatus> {
        let core = self.core.as_ref()?;
        let status = core.status();
        let state = &status.state;
        let mut out = ResourceStatus {
            name: self.name.clone(),
            node_id: self.local.node_id.map_or(-1, i32::from),
            role: role(status.role),
            suspended_user: state.susp_user,
            suspended_no_data: state.susp_nod,
            suspended_fencing: state.susp_fen,
            suspended_quorum: state.susp_quorum,
            force_io_failures: state.fail_io,
            write_ordering: self.write_ordering(),
            devices: status.devices.iter().map(|d| self.device_status(d)).collect(),
            connections: status.connections.iter().map(|c| self.connection_status(c)).collect(),
        };
        out.sort();
        Some(out)
    }

    fn write_ordering(&self) -> WriteOrdering {
        let option = |name: &str| {
            let volumes = self.local.volumes.values();
            volumes.filter_map(|v| v.backing.as_ref()).all(|b| b.options.flag(name) != Some(false))
        };
        match (option("disk-flushes"), option("disk-drain")) {
            (true, _) => WriteOrdering::Flush,
            (false, true) => WriteOrdering::Drain,
            (false, false) => WriteOrdering::None,
        }
    }

    fn device_status(&self, d: &core::DeviceStatus) -> DeviceStatus {
        let volume = self.local.volumes.get(&d.vnr.0);
        let nbd = self.nbd_openers(d.vnr) > 0;
        // Who has the node open is only known by searching all processes.
        let open = if nbd {
            Some(true)
        } else if self.front.nodes.get(&d.vnr).is_some_and(|n| n.state != NodeState::CleaningUp) {
            None
        } else {
            Some(false)
        };
        DeviceStatus {
            volume: d.vnr.0,
            minor: d.minor,
            disk_state: disk(d.disk),
            client: d.client,
            open,
            quorum: d.quorum,
            backing_dev: volume.and_then(|v| v.backing.as_ref()).map(|b| b.disk.clone()),
            statistics: Some(DeviceStatistics {
                size: d.size_kib,
                read: d.read_kib,
                written: d.written_kib,
                al_writes: d.al_writes,
                bm_writes: d.bm_writes,
                upper_pending: d.upper_pending.into(),
                lower_pending: d.lower_pending.into(),
                al_suspended: false,
                blocked_upper: false,
                blocked_lower: false,
            }),
        }
    }

    fn connection_status(&self, c: &core::ConnectionStatus) -> ConnectionStatus {
        let peer = c.peer.get();
        let established = self.net.peers.get(&peer).and_then(|p| p.established);
        let paths = self.local.peers.get(&peer).map(|p| {
            p.paths
                .iter()
                .map(|path| PathStatus {
                    this_host: path.local.clone(),
                    remote_host: path.remote.clone(),
                    established: established.is_some_and(|e| {
                        e.local.ip() == path.local.address && e.remote.ip() == path.remote.address
                    }),
                })
                .collect()
        });
        ConnectionStatus {
            peer_node_id: peer.into(),
            name: c.name.clone(),
            connection_state: named(&c.cstate, ConnectionState::StandAlone),
            congested: false,
            peer_role: role(c.peer_role),
            tls: None,
            ap_in_flight: Some(c.ap_in_flight_kib * 2),
            rs_in_flight: Some(c.rs_in_flight_kib * 2),
            paths,
            peer_devices: c.peer_devices.iter().map(peer_device_status).collect(),
        }
    }

    /// State of one connection.
    pub(crate) fn connection_state(&self, peer: u8) -> ConnectionState {
        let state = self.core.as_ref().map(Core::state);
        let found = state.and_then(|s| s.conns.iter().find(|(n, _)| n.get() == peer));
        found.map_or(ConnectionState::StandAlone, |(_, c)| named(&c.cstate, ConnectionState::StandAlone))
    }

    /// Generation identifiers of a volume towards a peer; none while diskless.
    pub(crate) fn generation_info(&self, peer: u8, volume: u16) -> Option<GenerationInfo> {
        let status = self.core.as_ref()?.status();
        let d = status.devices.iter().find(|d| d.vnr.0 == volume)?;
        let node = usize::from(peer);
        let bitmap = *d.bitmap_uuids.get(node)?;
        let flags = DeviceFlags(d.md_flags);
        let of_peer = PeerFlags(*d.md_peer_flags.get(node)?);
        let history = [d.history_uuids.first(), d.history_uuids.get(1)].map(|u| u.copied().unwrap_or(0));
        Some(GenerationInfo {
            current: d.current_uuid,
            bitmap,
            history,
            consistent: flags.contains(DeviceFlags::CONSISTENT),
            was_up_to_date: flags.contains(DeviceFlags::WAS_UP_TO_DATE),
            primary: flags.contains(DeviceFlags::PRIMARY_IND),
            crashed_primary: flags.contains(DeviceFlags::CRASHED_PRIMARY),
            al_clean: flags.contains(DeviceFlags::AL_CLEAN),
            al_disabled: flags.contains(DeviceFlags::AL_DISABLED),
            primary_lost_quorum: flags.contains(DeviceFlags::PRIMARY_LOST_QUORUM),
            peer_connected: of_peer.contains(PeerFlags::CONNECTED),
            peer_outdated: of_peer.contains(PeerFlags::OUTDATED),
            peer_fencing: of_peer.contains(PeerFlags::FENCING),
            peer_full_sync: of_peer.contains(PeerFlags::FULL_SYNC),
            peer_device_seen: of_peer.contains(PeerFlags::DEVICE_SEEN),
        })
    }
}

fn peer_device_status(p: &core::PeerDeviceStatus) -> PeerDeviceStatus {
    PeerDeviceStatus {
        volume: p.vnr.0,
        replication_state: named(&p.repl, ReplicationState::Off),
        peer_disk_state: disk(p.pdsk),
        peer_client: p.client,
        resync_suspended: ResyncSuspended {
            user: p.pause.user,
            peer: p.pause.peer,
            dependency: p.pause.other_connection || p.pause.inconsistent,
            max_parallel: false,
        },
        received: p.received_kib,
        sent: p.sent_kib,
        out_of_sync: p.out_of_sync_kib,
        pending: p.pending.into(),
        unacked: p.unacked.into(),
        resync_done_percent: None,
        stable: true,
        sync: sync_details(p),
    }
}

/// Progress of a running resync; one window, since its start.
fn sync_details(p: &core::PeerDeviceStatus) -> Option<SyncDetails> {
    use wire::ReplState::{PausedSyncS, PausedSyncT, SyncSource, SyncTarget};
    matches!(p.repl, SyncSource | SyncTarget | PausedSyncS | PausedSyncT).then(|| {
        let done = p.resync_total_kib.saturating_sub(p.out_of_sync_kib) * 2;
        SyncDetails {
            rs_total: p.resync_total_kib * 2,
            rs_dt_start_ms: p.resync_ms,
            rs_paused_ms: 0,
            rs_dt0_ms: p.resync_ms,
            rs_db0_sectors: done,
            rs_dt1_ms: p.resync_ms,
            rs_db1_sectors: done,
            rs_failed: p.resync_failed_kib * 2,
            rs_same_csum: 0,
            want: 0.0,
            verify: None,
        }
    })
}
