//! One simulated machine: its configuration, its devices, and the core while it runs.

use crate::disk::{DataDisk, MetaDisk};
use palisade_core::config::{CoreConfig, DiskConfig, NetConfig, PeerDeviceConfig, ResourceConfig};
use palisade_core::io::{Backing, Command, PeerSpec};
use palisade_core::types::{NodeId, VolumeNr};
use palisade_core::{AdminError, Core};
use palisade_metadata::image::{self, Extent};
use palisade_metadata::{Geometry, Kind, Layout, Superblock, Version, al};
use std::collections::{BTreeMap, BTreeSet};

/// The only volume there is.
pub const VOLUME: VolumeNr = VolumeNr(0);
/// Bytes of a metadata device: superblock, 32 KiB of activity log, the bitmap.
const META_BYTES: usize = 192 << 10;

/// How a node is configured; survives its crashes.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Name in scenarios.
    pub name: String,
    /// Resource options.
    pub resource: ResourceConfig,
    /// Network options towards each node (its own place is unused).
    pub net: Vec<NetConfig>,
    /// Disk options.
    pub disk: DiskConfig,
    /// Options of the resync controller.
    pub peer_device: PeerDeviceConfig,
    /// Sectors of the data device; 0: intentionally diskless.
    pub sectors: u64,
    /// Bitmap slots of its metadata.
    pub max_peers: u32,
    /// Handler name to exit status; those not named succeed.
    pub handlers: BTreeMap<String, i32>,
    /// Peers without a connection object.
    pub unconfigured: BTreeSet<usize>,
}

impl NodeConfig {
    /// Defaults for one of `nodes` nodes.
    #[must_use]
    pub fn new(name: &str, nodes: usize, sectors: u64) -> Self {
        Self {
            name: name.into(),
            resource: ResourceConfig::default(),
            net: vec![NetConfig::default(); nodes],
            disk: DiskConfig::default(),
            peer_device: PeerDeviceConfig::default(),
            sectors,
            max_peers: nodes.saturating_sub(1).max(1) as u32,
            handlers: BTreeMap::new(),
            unconfigured: BTreeSet::new(),
        }
    }
}

/// A disk or metadata operation in flight.
#[derive(Clone, Debug)]
pub enum PendingIo {
    /// Read.
    Read {
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u32,
    },
    /// Write, discard or write-zeroes.
    Write {
        /// First sector.
        sector: u64,
        /// New contents.
        stamps: Vec<u64>,
        /// Stable on completion.
        fua: bool,
    },
    /// Flush of what was completed up to that sequence number.
    Flush(u64),
    /// Metadata write, after a flush of the data completed up to that sequence number.
    Meta {
        /// Byte position.
        pos: u64,
        /// Blocks.
        data: bytes::Bytes,
        /// See above.
        flush: u64,
    },
}

/// A front-end request in progress.
#[derive(Clone, Debug)]
pub struct Request {
    /// What it does.
    pub kind: RequestKind,
    /// First sector.
    pub sector: u64,
    /// Sectors.
    pub count: u64,
    /// When it was issued, nanoseconds.
    pub issued: u64,
    /// The term of office as Primary in which it was issued.
    pub era: u64,
}

/// Kinds of front-end requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestKind {
    /// Read.
    Read,
    /// Write, discard, write-zeroes.
    Write {
        /// Forced unit access.
        fua: bool,
    },
    /// Flush.
    Flush,
}

/// A machine.
#[derive(Debug)]
pub struct Node {
    /// Configuration.
    pub config: NodeConfig,
    /// Runs while this is `Some`.
    pub core: Option<Core>,
    /// Counts starts: events of former lives are ignored.
    pub life: u64,
    /// Data device.
    pub data: DataDisk,
    /// Metadata device; `None` for diskless nodes.
    pub meta: Option<MetaDisk>,
    /// The core holds the backing device.
    pub attached: bool,
    /// Operations in flight.
    pub ios: BTreeMap<u64, PendingIo>,
    /// When the timer event is due, if one is queued, and its number.
    pub timer: Option<(u64, u64)>,
    /// Calls of the timer at one moment.
    pub timer_calls: (u64, u32),
    /// Front ends may be served.
    pub front_end: bool,
    /// Term of office, unique in the cluster; changes with every promotion.
    pub era: u64,
    /// Requests in progress by number.
    pub requests: BTreeMap<u64, Request>,
    /// Commands in progress: number to text.
    pub commands: BTreeMap<u64, String>,
    /// Answers.
    pub answers: BTreeMap<u64, Result<(), AdminError>>,
    /// Extents named by the activity log on disk; recomputed after it was written.
    pub hot: Option<BTreeSet<u32>>,
    /// Layout of the attached metadata.
    pub layout: Option<Layout>,
    /// Writers that hold the device open.
    pub openers: u32,
    /// Reads and writes of the data device fail from now on.
    pub failing: bool,
    /// Handlers run so far.
    pub handlers_run: Vec<String>,
    /// Size announced to front ends, bytes.
    pub size: u64,
}

impl Node {
    /// A machine that is down, its devices empty.
    #[must_use]
    pub fn new(config: NodeConfig) -> Self {
        let meta = (config.sectors > 0).then(|| MetaDisk::new(META_BYTES));
        Self {
            data: DataDisk::new(config.sectors),
            meta,
            config,
            core: None,
            life: 0,
            attached: false,
            ios: BTreeMap::new(),
            timer: None,
            timer_calls: (0, 0),
            front_end: false,
            era: 0,
            requests: BTreeMap::new(),
            commands: BTreeMap::new(),
            answers: BTreeMap::new(),
            hot: None,
            layout: None,
            openers: 0,
            failing: false,
            handlers_run: Vec::new(),
            size: 0,
        }
    }

    /// Whether it is meant to have a disk.
    #[must_use]
    pub fn diskful(&self) -> bool {
        self.meta.is_some()
    }

    /// A fresh core for this node.
    #[must_use]
    pub fn boot(&self, id: NodeId, seed: [u8; 32]) -> Core {
        Core::new(CoreConfig { name: "r0".into(), node_id: id, resource: self.config.resource.clone(), seed })
    }

    /// Creates metadata as the tool does.
    ///
    /// # Errors
    /// The metadata code's own.
    pub fn create_md(&self) -> Result<(), String> {
        let Some(meta) = &self.meta else { return Ok(()) };
        let layout = Layout::compute(
            Kind::FlexExternal,
            META_BYTES as u64,
            Some(self.config.sectors),
            Geometry::new(self.config.max_peers),
        )
        .map_err(|e| e.to_string())?;
        let sb = Superblock::fresh(Version::V09, &layout);
        image::create_md(meta, &layout, &sb).map_err(|e| e.to_string())
    }

    /// Changes the superblock directly, as `drbdmeta set-gi` does.
    ///
    /// # Errors
    /// The metadata code's own.
    pub fn edit_superblock(&self, f: impl FnOnce(&mut Superblock)) -> Result<(), String> {
        let Some(meta) = &self.meta else { return Err("there is no metadata on a diskless node".into()) };
        let (mut sb, layout, _) = image::read_superblock(meta, Kind::FlexExternal, Some(self.config.sectors))
            .map_err(|e| e.to_string())?;
        f(&mut sb);
        image::write_superblock(meta, &layout, &sb).map_err(|e| e.to_string())
    }

    /// Reads the metadata as a real attach does: activity log applied, then everything read again.
    ///
    /// # Errors
    /// The metadata code's own.
    pub fn attach(&mut self) -> Result<Command, String> {
        let Some(meta) = &self.meta else { return Err("the node is diskless".into()) };
        let sectors = Some(self.config.sectors);
        let kind = Kind::FlexExternal;
        image::apply_al(meta, kind, sectors).map_err(|e| e.to_string())?;
        let md = image::read_metadata(meta, kind, sectors, Extent::Exact).map_err(|e| e.to_string())?;
        self.attached = true;
        self.hot = None;
        self.layout = Some(md.layout);
        Ok(Command::Attach {
            vnr: VOLUME,
            backing: Box::new(Backing {
                superblock: md.superblock,
                bitmap: md.bitmap,
                layout: md.layout,
                logical_block_size: 512,
                physical_block_size: 4096,
                discard: true,
                discard_zeroes: true,
            }),
            disk: self.config.disk.clone(),
        })
    }

    /// The peer object for node `n`.
    #[must_use]
    pub fn peer_spec(&self, id: NodeId, n: usize, name: &str, diskful: bool) -> PeerSpec {
        PeerSpec { id, name: name.into(), net: self.config.net[n].clone(), diskful }
    }

    /// Extents the activity log on disk names now.
    pub fn hot_extents(&mut self) -> &BTreeSet<u32> {
        if self.hot.is_none() {
            let hot = match (&self.meta, &self.layout) {
                (Some(meta), Some(layout)) => {
                    let len = layout.al_blocks() as usize * 4096;
                    let g = layout.geometry;
                    al::replay(g.al_stripes, g.al_stripe_size_4k, &meta.read(layout.al_pos(), len))
                        .hot_extents
                }
                _ => BTreeSet::new(),
            };
            self.hot = Some(hot);
        }
        self.hot.get_or_insert_with(BTreeSet::new)
    }
}
