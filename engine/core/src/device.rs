//! A volume: its backing device, its metadata on the way to disk, and the requests that wait for something.

use crate::activity_log::{ActivityLog, Prepared};
use crate::config::DiskConfig;
use crate::intervals::Intervals;
use crate::io::{BlockId, BlockOp};
use crate::types::{NodeId, VolumeNr};
use palisade_metadata::{Bitmap, Layout, Superblock};
use std::collections::{BTreeMap, VecDeque};

/// A front-end request that could not start yet.
#[derive(Debug)]
pub(crate) struct Waiting {
    pub id: BlockId,
    pub op: BlockOp,
}

/// What runs when the superblock of a certain generation is on stable storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// Tell the peers about a new current UUID (`NEW_DATAGEN`), then let writes go on.
    AnnounceGeneration { weak: u64, forced: bool },
}

/// The metadata operation on its way; there is one at a time, which orders them and keeps two writes of one
/// block from being in flight together.
#[derive(Debug)]
pub(crate) enum MetaJob {
    Superblock {
        generation: u64,
    },
    /// Changed bitmap blocks of evicted extents first, then the journal block (`spec/metadata.md` §7.3).
    ActivityLog {
        prepared: Prepared,
        block_written: bool,
    },
    Bitmap {
        generation: u64,
    },
}

/// Metadata bookkeeping of an attached volume.
#[derive(Debug, Default)]
pub(crate) struct MetaState {
    pub job: Option<MetaJob>,
    pub job_ios: u32,
    pub job_failed: bool,
    /// Changes of the superblock so far, and the last one on disk.
    pub sb_generation: u64,
    pub sb_durable: u64,
    /// The same for requests to write the whole dirty bitmap.
    pub bm_generation: u64,
    pub bm_durable: u64,
    pub then: Vec<(u64, Then)>,
    /// FULL_SYNC flags are set and fall when the bitmap is on disk.
    pub full_sync: bool,
    /// No write reaches the data area before this superblock generation is durable: PRIMARY_IND, a new
    /// current UUID.
    pub write_gate: u64,
}

/// An attached backing device.
#[derive(Debug)]
pub(crate) struct Ldev {
    pub sb: Superblock,
    pub bitmap: Bitmap,
    pub layout: Layout,
    pub al: ActivityLog,
    pub meta: MetaState,
    pub logical_block_size: u32,
    pub physical_block_size: u32,
    pub discard: bool,
    pub discard_zeroes: bool,
    /// Superblock as last handed to a write; a change against it starts the next.
    pub written: Option<Box<[u8; 4096]>>,
}

impl Ldev {
    /// Bitmap slot of a node.
    pub fn slot(&self, n: NodeId) -> Option<usize> {
        self.sb.peers.get(n.idx()).and_then(palisade_metadata::PeerSlot::slot)
    }

    /// Sets the range out of sync in every slot but those of the nodes in `except`: unassigned slots track
    /// writes since day 0 (`spec/metadata.md` §6).
    pub fn mark_others(&mut self, sectors: std::ops::Range<u64>, except: crate::types::NodeMask) {
        let keep: Vec<usize> = except.iter().filter_map(|n| self.slot(n)).collect();
        for slot in 0..self.bitmap.slots() {
            if !keep.contains(&slot) {
                self.bitmap.set_out_of_sync(slot, sectors.clone());
            }
        }
    }

    /// Extents of a sector range.
    pub fn extents(sector: u64, len: u32) -> std::ops::RangeInclusive<u32> {
        let last = sector + (u64::from(len) / 512).max(1) - 1;
        let e = |s: u64| u32::try_from(s >> crate::types::AL_EXTENT_SHIFT).unwrap_or(u32::MAX - 1);
        e(sector)..=e(last)
    }
}

/// A volume.
#[derive(Debug)]
pub(crate) struct Device {
    pub vnr: VolumeNr,
    pub minor: u32,
    /// Intentionally diskless.
    pub client: bool,
    pub cfg: DiskConfig,
    pub ldev: Option<Ldev>,
    /// Size shown, sectors; 0 until known.
    pub size: u64,
    /// Size a front end was last told, bytes.
    pub told_size: Option<u64>,
    /// Generation of the data the application sees while diskless.
    pub exposed_uuid: u64,
    /// Generations exposed before it, while no write was completed in it: a peer may not have heard of the last ones.
    pub unproven: Vec<u64>,
    pub openers_rw: u32,
    pub openers_ro: u32,
    /// A new current UUID must be created before the next write.
    pub new_uuid_needed: bool,
    /// Crashed as Primary: from the metadata at attach, dropped when own disk and a peer are UpToDate.
    pub crashed_primary: bool,
    /// Crashed while a peer was Primary: its journal's extents may differ from every other replica. Presented as a
    /// crashed Primary, because nothing else makes equal generations compare their bits.
    pub crashed_replica: bool,
    /// A resync from a stable source was completed, and no data of an unstable one came since (§11.9).
    pub stable_resync: bool,
    pub primary_lost_quorum: bool,
    pub had_quorum: bool,
    /// Front-end requests that wait, in order.
    pub waiting: VecDeque<Waiting>,
    /// Writes that hold their range and their extents and wait for the journal: sequence and request.
    pub al_wait_app: Vec<(u64, u64)>,
    pub al_wait_peer: Vec<(u64, u64)>,
    /// Writes ready to be submitted, held back by a suspension or the write gate.
    pub ready: VecDeque<u64>,
    /// Replicated writes which wait for an extent, a range or the write gate, in order of arrival.
    pub peer_waiting: VecDeque<u64>,
    pub locks: Intervals,
    /// Writes of a resync that was stopped, still with the disk: id and sector of their lock.
    pub stopped_writes: BTreeMap<u64, u64>,
    /// Disk operations in flight.
    pub disk_ios: u32,
    /// Reads served locally / sent (status counters), sectors.
    pub read_sectors: u64,
    pub written_sectors: u64,
    pub al_writes: u64,
    pub bm_writes: u64,
    /// Requests of the front end not yet completed.
    pub app_pending: u32,
}

impl Device {
    pub fn new(vnr: VolumeNr, minor: u32) -> Self {
        Self {
            vnr,
            minor,
            client: false,
            cfg: DiskConfig::default(),
            ldev: None,
            size: 0,
            told_size: None,
            exposed_uuid: 0,
            unproven: Vec::new(),
            openers_rw: 0,
            openers_ro: 0,
            new_uuid_needed: false,
            crashed_primary: false,
            crashed_replica: false,
            stable_resync: false,
            primary_lost_quorum: false,
            had_quorum: false,
            waiting: VecDeque::new(),
            al_wait_app: Vec::new(),
            al_wait_peer: Vec::new(),
            ready: VecDeque::new(),
            peer_waiting: VecDeque::new(),
            locks: Intervals::default(),
            stopped_writes: BTreeMap::new(),
            disk_ios: 0,
            read_sectors: 0,
            written_sectors: 0,
            al_writes: 0,
            bm_writes: 0,
            app_pending: 0,
        }
    }

    /// Current generation: the metadata's, or the exposed one while diskless.
    pub fn current_uuid(&self) -> u64 {
        self.ldev.as_ref().map_or(self.exposed_uuid, |l| l.sb.current_uuid)
    }
}

/// Volume number to device.
pub(crate) type Devices = BTreeMap<VolumeNr, Device>;
