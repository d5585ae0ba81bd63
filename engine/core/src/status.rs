//! A snapshot of everything visible, for the control plane.

use crate::core::Core;
use crate::state::State;
use crate::types::{NodeId, VolumeNr};
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role};
use std::ops::Range;

/// The resource.
#[derive(Clone, Debug)]
pub struct Status {
    /// Own role.
    pub role: Role,
    /// All states.
    pub state: State,
    /// Volumes.
    pub devices: Vec<DeviceStatus>,
    /// Connections.
    pub connections: Vec<ConnectionStatus>,
}

/// A volume.
#[derive(Clone, Debug)]
pub struct DeviceStatus {
    /// Volume number.
    pub vnr: VolumeNr,
    /// Minor.
    pub minor: u32,
    /// Own disk.
    pub disk: DiskState,
    /// Intentionally diskless.
    pub client: bool,
    /// Has quorum.
    pub quorum: bool,
    /// Size, KiB.
    pub size_kib: u64,
    /// Read, KiB.
    pub read_kib: u64,
    /// Written, KiB.
    pub written_kib: u64,
    /// Journal writes.
    pub al_writes: u64,
    /// Bitmap writes.
    pub bm_writes: u64,
    /// Requests of the front end in progress.
    pub upper_pending: u32,
    /// Operations of the backing device in progress.
    pub lower_pending: u32,
    /// Current UUID (or the exposed one while diskless).
    pub current_uuid: u64,
    /// Bitmap UUIDs by node id; empty while diskless.
    pub bitmap_uuids: Vec<u64>,
    /// History UUIDs; empty while diskless.
    pub history_uuids: Vec<u64>,
    /// Device flags of the metadata.
    pub md_flags: u32,
    /// Per-peer flags of the metadata by node id; empty while diskless.
    pub md_peer_flags: Vec<u32>,
}

/// A connection.
#[derive(Clone, Debug)]
pub struct ConnectionStatus {
    /// Peer.
    pub peer: NodeId,
    /// Name.
    pub name: String,
    /// Connection state.
    pub cstate: ConnState,
    /// Peer's role.
    pub peer_role: Role,
    /// Agreed protocol version, 0 when there is no link.
    pub apv: u32,
    /// Application data in flight, KiB.
    pub ap_in_flight_kib: u64,
    /// Resync data in flight, KiB.
    pub rs_in_flight_kib: u64,
    /// Volumes.
    pub peer_devices: Vec<PeerDeviceStatus>,
}

/// A volume towards a peer.
#[derive(Clone, Debug)]
pub struct PeerDeviceStatus {
    /// Volume.
    pub vnr: VolumeNr,
    /// Replication state.
    pub repl: ReplState,
    /// Peer's disk.
    pub pdsk: DiskState,
    /// Intentionally diskless peer.
    pub client: bool,
    /// Reasons of a paused resync: user, peer, dependency.
    pub pause: crate::state::Pause,
    /// Received from the peer, KiB.
    pub received_kib: u64,
    /// Sent to the peer, KiB.
    pub sent_kib: u64,
    /// Out of sync, KiB.
    pub out_of_sync_kib: u64,
    /// Writes awaiting the peer's acknowledgement.
    pub pending: u32,
    /// Writes of the peer awaiting ours.
    pub unacked: u32,
    /// Bits at the start of the resync, KiB.
    pub resync_total_kib: u64,
    /// Done in the running or last resync, KiB.
    pub resync_done_kib: u64,
    /// Milliseconds since the resync began; 0 when none runs.
    pub resync_ms: u64,
    /// Failed in this resync, KiB.
    pub resync_failed_kib: u64,
    /// Bitmap UUID towards the peer.
    pub bitmap_uuid: u64,
}

impl Core {
    /// Everything visible.
    #[must_use]
    pub fn status(&self) -> Status {
        let devices = self
            .devs
            .values()
            .map(|d| {
                let l = d.ldev.as_ref();
                DeviceStatus {
                    vnr: d.vnr,
                    minor: d.minor,
                    disk: self.st.disk(d.vnr),
                    client: d.client,
                    quorum: self.st.devs.get(&d.vnr).is_some_and(|x| x.quorum),
                    size_kib: d.size / 2,
                    read_kib: d.read_sectors / 2,
                    written_kib: d.written_sectors / 2,
                    al_writes: d.al_writes,
                    bm_writes: d.bm_writes,
                    upper_pending: d.app_pending,
                    lower_pending: d.disk_ios,
                    current_uuid: d.current_uuid(),
                    bitmap_uuids: l
                        .map(|l| l.sb.peers.iter().map(|p| p.bitmap_uuid).collect())
                        .unwrap_or_default(),
                    history_uuids: l.map(|l| l.sb.history.to_vec()).unwrap_or_default(),
                    md_flags: l.map_or(0, |l| l.sb.flags.bits()),
                    md_peer_flags: l
                        .map(|l| l.sb.peers.iter().map(|p| p.flags.bits()).collect())
                        .unwrap_or_default(),
                }
            })
            .collect();
        let connections = self.conns.values().map(|c| self.connection_status(c)).collect();
        Status { role: self.st.role, state: self.st.clone(), devices, connections }
    }

    /// What of a range of sectors some peer may lack: runs of sectors from its start on, each lacking or not,
    /// at most `runs_max`, so that they may end before the range does. Empty without a disk.
    #[must_use]
    pub fn out_of_sync(&self, v: VolumeNr, sectors: Range<u64>, runs_max: usize) -> Vec<(u64, bool)> {
        let Some(l) = self.devs.get(&v).and_then(|d| d.ldev.as_ref()) else { return Vec::new() };
        let words: Vec<&[u64]> =
            self.conns.keys().filter_map(|n| l.slot(*n)).map(|s| l.bitmap.words(s)).collect();
        let bits = l.bitmap.bits_touching(sectors.clone());
        let mut runs: Vec<(u64, bool)> = Vec::new();
        let mut at = sectors.start;
        let mut bit = bits.start;
        while bit < bits.end {
            let word = words.iter().fold(0, |or, w| or | w.get((bit / 64) as usize).copied().unwrap_or(0));
            let lacking = word >> (bit % 64) & 1 == 1;
            // Mostly all of a word is alike.
            let alike = bit.is_multiple_of(64) && matches!(word, 0 | u64::MAX);
            let next = if alike { bits.end.min(bit + 64) } else { bit + 1 };
            let end = l.bitmap.sectors_of_bits(bit..next).end.min(sectors.end);
            let full = runs.len() >= runs_max;
            match runs.last_mut() {
                Some(last) if last.1 == lacking => last.0 += end - at,
                _ if full => break,
                _ => runs.push((end - at, lacking)),
            }
            (at, bit) = (end, next);
        }
        runs
    }

    fn connection_status(&self, c: &crate::connection::Connection) -> ConnectionStatus {
        let n = c.peer;
        let ap: u64 = c
            .sent_epochs
            .iter()
            .flat_map(|e| &e.writes)
            .filter_map(|id| self.requests.get(id))
            .map(|r| u64::from(r.len))
            .sum();
        let rs: u64 = self
            .pds
            .iter()
            .filter(|((m, _), _)| *m == n)
            .map(|(_, p)| p.target.as_ref().map_or(0, |t| t.in_flight))
            .sum();
        let peer_devices = self
            .pds
            .iter()
            .filter(|((m, _), _)| *m == n)
            .map(|((_, v), p)| {
                let l = self.devs.get(v).and_then(|d| d.ldev.as_ref());
                let oos = l.and_then(|l| l.slot(n).map(|s| l.bitmap.out_of_sync_sectors(s))).unwrap_or(0);
                let per_bit = l.map_or(8, |l| l.bitmap.sectors_per_bit());
                let st = self.st.pds.get(&(n, *v));
                PeerDeviceStatus {
                    vnr: *v,
                    repl: self.st.repl(n, *v),
                    pdsk: self.st.pdsk(n, *v),
                    client: !c.diskful,
                    pause: st.map(|s| s.pause).unwrap_or_default(),
                    received_kib: p.received / 2,
                    sent_kib: p.sent_sectors / 2,
                    out_of_sync_kib: oos / 2,
                    pending: p.pending,
                    unacked: p.unacked,
                    resync_total_kib: p.resync_total_bits * per_bit / 2,
                    resync_done_kib: p.resync_done_sectors / 2,
                    resync_ms: if p.resyncing {
                        self.now.since(p.resync_start).as_millis() as u64
                    } else {
                        0
                    },
                    resync_failed_kib: p.resync_failed_bits * per_bit / 2,
                    bitmap_uuid: l.map_or(0, |l| l.sb.peers[n.idx()].bitmap_uuid),
                }
            })
            .collect();
        ConnectionStatus {
            peer: n,
            name: c.name.clone(),
            cstate: self.st.cstate(n),
            peer_role: self.st.peer_role(n),
            apv: if c.link { c.apv } else { 0 },
            ap_in_flight_kib: ap / 1024,
            rs_in_flight_kib: rs / 2,
            peer_devices,
        }
    }
}
