//! The superblock (`spec/metadata.md` §4).

use crate::layout::{Geometry, Kind, Layout, LayoutError, md_offset};
use crate::{
    BLOCK_SIZE, BYTES_PER_BIT_MIN, Block, DeviceFlags, HISTORY_LEN, PEERS_MAX, PeerFlags, SECTOR_SIZE,
    UUID_JUST_CREATED, be32, be64, put,
};

/// v07 magic, recognised only to be refused or reported.
pub(crate) const MAGIC_V07: u32 = 0x8374_026a;
const MAGIC_V08: u32 = 0x8374_026b;
const MAGIC_V08_IN_USE: u32 = 0x8374_026c;
const MAGIC_V09: u32 = 0x8374_026d;

const AT_FLAGS: usize = 0x38;
const AT_MAGIC: usize = 0x3c;
const AT_PEERS: usize = 0x70;
const AT_HISTORY: usize = AT_PEERS + PEERS_MAX * PEER_SIZE;
const PEER_SIZE: usize = 32;

/// Metadata format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Version {
    /// DRBD 8.4: one peer, two history UUIDs.
    V08,
    /// DRBD 9.
    V09,
}

impl Version {
    /// The keyword: `v08`, `v09`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V08 => "v08",
            Self::V09 => "v09",
        }
    }
}

/// What is kept about one node id, 32 bytes at `0x70 + 32 × node_id` (`spec/metadata.md` §4.3):
///
/// | +off | size | field |
/// |---|---|---|
/// | 0x00 | u64 | bitmap UUID |
/// | 0x08 | u64 | dagtag when the bitmap UUID was set |
/// | 0x10 | u32 | flags |
/// | 0x14 | s32 | bitmap index, −1 = none |
/// | 0x18 | 8 | zero |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerSlot {
    /// Bitmap UUID towards that node.
    pub bitmap_uuid: u64,
    /// Stamp, in sectors written, taken when the bitmap UUID was set.
    pub bitmap_dagtag: u64,
    /// Flags; [`PeerFlags::HAVE_BITMAP`] is neither read nor written.
    pub flags: PeerFlags,
    /// Bitmap slot of that node, −1 = none. See [`PeerSlot::slot`].
    pub bitmap_index: i32,
}

impl PeerSlot {
    /// A slot nobody uses.
    pub const EMPTY: Self =
        Self { bitmap_uuid: 0, bitmap_dagtag: 0, flags: PeerFlags::NONE, bitmap_index: -1 };

    /// The bitmap slot, if one is assigned.
    pub fn slot(&self) -> Option<usize> {
        usize::try_from(self.bitmap_index).ok()
    }

    /// A day-0 slot: no bitmap, no flags; its UUID stands for all unassigned bitmap slots (§9.5).
    pub const fn is_day0(&self) -> bool {
        self.bitmap_index == -1 && self.flags.0 == 0
    }
}

impl Default for PeerSlot {
    fn default() -> Self {
        Self::EMPTY
    }
}

/// A superblock of either version.
///
/// v08 has one peer: its bitmap UUID is kept in `peers[0]` with bitmap index 0, `max_peers` is 1, and
/// its three peer flags stay among the device flags where the disk has them. Fields a version does not
/// have are not written.
///
/// | offset | v08 | v09 |
/// |---|---|---|
/// | 0x00 | effective size | same |
/// | 0x08 | current UUID | same |
/// | 0x10 | bitmap UUID | members mask |
/// | 0x18 | history 0, 1 | zero |
/// | 0x28 | device UUID | zero |
/// | 0x30 | zero | device UUID |
/// | 0x38 | flags, magic, md size, AL offset, AL extents, bitmap offset, bytes per bit, max bio size | same |
/// | 0x58 | AL stripes, stripe size | max peers, node id |
/// | 0x60 | zero | AL stripes, stripe size |
/// | 0x70 | zero | 32 peer slots, 32 history UUIDs |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Format.
    pub version: Version,
    /// v08 only: the magic says "in use" (unclean).
    pub v08_in_use: bool,
    /// Last agreed size, sectors; 0 = never agreed.
    pub effective_size_sectors: u64,
    /// Current UUID; bit 0 = was Primary.
    pub current_uuid: u64,
    /// Members mask, bit n = node id n.
    pub members: u64,
    /// Identifies the device across resizes; never interpreted.
    pub device_uuid: u64,
    /// Device flags.
    pub flags: DeviceFlags,
    /// Sectors of the metadata area.
    pub md_size_sectors: u32,
    /// Activity log, sectors relative to the superblock.
    pub al_offset: i32,
    /// Number of activity-log slots at the last write; informational.
    pub al_nr_extents: u32,
    /// Bitmap, sectors relative to the superblock.
    pub bm_offset: i32,
    /// Data bytes per bitmap bit.
    pub bm_bytes_per_bit: u32,
    /// Largest request of the peers, bytes; informational.
    pub max_peer_bio_size: u32,
    /// Bitmap slots.
    pub max_peers: u32,
    /// Own node id, −1 = not yet assigned.
    pub node_id: i32,
    /// Activity-log stripes.
    pub al_stripes: u32,
    /// Blocks per activity-log stripe.
    pub al_stripe_size_4k: u32,
    /// By node id.
    pub peers: [PeerSlot; PEERS_MAX],
    /// History UUIDs, youngest first.
    pub history: [u64; HISTORY_LEN],
}

/// Why a block is no superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// No magic of any version.
    #[error("No DRBD metadata was found: the magic number is {0:#010x}; create metadata first (create-md).")]
    BadMagic(u32),
}

impl Superblock {
    /// Fresh metadata as create-md makes it: Inconsistent, just created, activity log clean
    /// (`spec/metadata.md` §4.1, §4.2). The caller sets sizes, UUIDs and flags it knows better.
    pub fn fresh(version: Version, layout: &Layout) -> Self {
        let mut peers = [PeerSlot::EMPTY; PEERS_MAX];
        if version == Version::V08 {
            peers[0].bitmap_index = 0;
        }
        let mut sb = Self {
            version,
            v08_in_use: false,
            effective_size_sectors: 0,
            current_uuid: UUID_JUST_CREATED,
            members: 0,
            device_uuid: 0,
            flags: DeviceFlags::AL_CLEAN,
            md_size_sectors: 0,
            al_offset: 0,
            al_nr_extents: 257,
            bm_offset: 0,
            bm_bytes_per_bit: BYTES_PER_BIT_MIN,
            max_peer_bio_size: 0,
            max_peers: 1,
            node_id: -1,
            al_stripes: 1,
            al_stripe_size_4k: 8,
            peers,
            history: [0; HISTORY_LEN],
        };
        sb.set_layout(layout);
        sb
    }

    /// Takes over geometry, sizes and offsets of `layout`.
    pub fn set_layout(&mut self, layout: &Layout) {
        self.md_size_sectors = layout.md_size_sectors;
        self.al_offset = layout.al_offset;
        self.bm_offset = layout.bm_offset;
        self.bm_bytes_per_bit = layout.geometry.bytes_per_bit;
        self.max_peers = layout.geometry.max_peers;
        self.al_stripes = layout.geometry.al_stripes;
        self.al_stripe_size_4k = layout.geometry.al_stripe_size_4k;
    }

    /// Reads a block. Only the magic is judged here; see [`Superblock::check_tool`] and
    /// [`Superblock::check_driver`].
    pub fn decode(block: &Block) -> Result<Self, DecodeError> {
        let magic = be32(block, AT_MAGIC);
        let version = match magic {
            MAGIC_V08 | MAGIC_V08_IN_USE => Version::V08,
            MAGIC_V09 => Version::V09,
            other => return Err(DecodeError::BadMagic(other)),
        };
        let signed = |at| i32::from_be_bytes(be32(block, at).to_be_bytes());
        let mut sb = Self {
            version,
            v08_in_use: magic == MAGIC_V08_IN_USE,
            effective_size_sectors: be64(block, 0x00),
            current_uuid: be64(block, 0x08),
            members: 0,
            device_uuid: 0,
            flags: DeviceFlags(be32(block, AT_FLAGS)),
            md_size_sectors: be32(block, 0x40),
            al_offset: signed(0x44),
            al_nr_extents: be32(block, 0x48),
            bm_offset: signed(0x4c),
            bm_bytes_per_bit: be32(block, 0x50),
            max_peer_bio_size: be32(block, 0x54),
            max_peers: 1,
            node_id: -1,
            al_stripes: 0,
            al_stripe_size_4k: 0,
            peers: [PeerSlot::EMPTY; PEERS_MAX],
            history: [0; HISTORY_LEN],
        };
        match version {
            Version::V08 => {
                sb.peers[0].bitmap_uuid = be64(block, 0x10);
                sb.peers[0].bitmap_index = 0;
                sb.history[0] = be64(block, 0x18);
                sb.history[1] = be64(block, 0x20);
                sb.device_uuid = be64(block, 0x28);
                sb.al_stripes = be32(block, 0x58);
                sb.al_stripe_size_4k = be32(block, 0x5c);
                if sb.al_stripes == 0 && sb.al_stripe_size_4k == 0 {
                    // Written before 8.4 knew stripes (§4.1).
                    (sb.al_stripes, sb.al_stripe_size_4k) = (1, 8);
                }
            }
            Version::V09 => {
                sb.members = be64(block, 0x10);
                sb.device_uuid = be64(block, 0x30);
                sb.max_peers = be32(block, 0x58);
                sb.node_id = signed(0x5c);
                sb.al_stripes = be32(block, 0x60);
                sb.al_stripe_size_4k = be32(block, 0x64);
                for (n, peer) in sb.peers.iter_mut().enumerate() {
                    let at = AT_PEERS + n * PEER_SIZE;
                    *peer = PeerSlot {
                        bitmap_uuid: be64(block, at),
                        bitmap_dagtag: be64(block, at + 0x08),
                        flags: PeerFlags(be32(block, at + 0x10)),
                        bitmap_index: signed(at + 0x14),
                    };
                }
                for (n, uuid) in sb.history.iter_mut().enumerate() {
                    *uuid = be64(block, AT_HISTORY + n * 8);
                }
            }
        }
        Ok(sb)
    }

    /// The block to write; unused bytes are zero.
    pub fn encode(&self) -> Block {
        let mut block = [0; BLOCK_SIZE];
        let magic = match (self.version, self.v08_in_use) {
            (Version::V08, false) => MAGIC_V08,
            (Version::V08, true) => MAGIC_V08_IN_USE,
            (Version::V09, _) => MAGIC_V09,
        };
        put(&mut block, 0x00, &self.effective_size_sectors.to_be_bytes());
        put(&mut block, 0x08, &self.current_uuid.to_be_bytes());
        put(&mut block, AT_FLAGS, &self.flags.0.to_be_bytes());
        put(&mut block, AT_MAGIC, &magic.to_be_bytes());
        put(&mut block, 0x40, &self.md_size_sectors.to_be_bytes());
        put(&mut block, 0x44, &self.al_offset.to_be_bytes());
        put(&mut block, 0x48, &self.al_nr_extents.to_be_bytes());
        put(&mut block, 0x4c, &self.bm_offset.to_be_bytes());
        put(&mut block, 0x50, &self.bm_bytes_per_bit.to_be_bytes());
        put(&mut block, 0x54, &self.max_peer_bio_size.to_be_bytes());
        match self.version {
            Version::V08 => {
                put(&mut block, 0x10, &self.peers[0].bitmap_uuid.to_be_bytes());
                put(&mut block, 0x18, &self.history[0].to_be_bytes());
                put(&mut block, 0x20, &self.history[1].to_be_bytes());
                put(&mut block, 0x28, &self.device_uuid.to_be_bytes());
                put(&mut block, 0x58, &self.al_stripes.to_be_bytes());
                put(&mut block, 0x5c, &self.al_stripe_size_4k.to_be_bytes());
            }
            Version::V09 => {
                put(&mut block, 0x10, &self.members.to_be_bytes());
                put(&mut block, 0x30, &self.device_uuid.to_be_bytes());
                put(&mut block, 0x58, &self.max_peers.to_be_bytes());
                put(&mut block, 0x5c, &self.node_id.to_be_bytes());
                put(&mut block, 0x60, &self.al_stripes.to_be_bytes());
                put(&mut block, 0x64, &self.al_stripe_size_4k.to_be_bytes());
                for (n, peer) in self.peers.iter().enumerate() {
                    let at = AT_PEERS + n * PEER_SIZE;
                    let flags = peer.flags.without(PeerFlags::HAVE_BITMAP);
                    put(&mut block, at, &peer.bitmap_uuid.to_be_bytes());
                    put(&mut block, at + 0x08, &peer.bitmap_dagtag.to_be_bytes());
                    put(&mut block, at + 0x10, &flags.0.to_be_bytes());
                    put(&mut block, at + 0x14, &peer.bitmap_index.to_be_bytes());
                }
                for (n, uuid) in self.history.iter().enumerate() {
                    put(&mut block, AT_HISTORY + n * 8, &uuid.to_be_bytes());
                }
            }
        }
        block
    }

    /// Slots, granularity and activity-log size as stored.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            max_peers: self.max_peers,
            bytes_per_bit: self.bm_bytes_per_bit,
            al_stripes: self.al_stripes,
            al_stripe_size_4k: self.al_stripe_size_4k,
        }
    }

    /// Whether attaching is allowed without applying the activity log first (§8.3).
    pub fn is_clean(&self) -> bool {
        self.flags.contains(DeviceFlags::AL_CLEAN) && !self.v08_in_use
    }

    /// Marks the metadata as in use: to be written when a device is attached (§9.1).
    pub fn mark_in_use(&mut self) {
        self.flags.set(DeviceFlags::AL_CLEAN, false);
        self.v08_in_use = self.version == Version::V08;
    }

    /// Marks the activity log as applied (§7.5 step 9).
    pub fn mark_clean(&mut self) {
        self.flags.set(DeviceFlags::AL_CLEAN, true);
        self.v08_in_use = false;
    }

    /// The bitmap slot assigned to `node_id`, if any.
    pub fn bitmap_slot(&self, node_id: usize) -> Option<usize> {
        self.peers.get(node_id)?.slot()
    }

    /// The lowest bitmap slot that no node uses, if one is left (§8.10).
    pub fn free_bitmap_slot(&self) -> Option<usize> {
        (0..self.max_peers as usize).find(|s| self.peers.iter().all(|p| p.slot() != Some(*s)))
    }

    /// Cuts a last agreed size above `usable_sectors`; returns the old value if it was too big (§4.4).
    pub fn clamp_effective_size(&mut self, usable_sectors: u64) -> Option<u64> {
        let old = self.effective_size_sectors;
        (old > usable_sectors).then(|| {
            self.effective_size_sectors = usable_sectors;
            old
        })
    }

    /// The v09 superblock that create-md makes out of this v08 one; bitmap and activity log stay where
    /// they are (§11). The bitmap UUID is lost, flags of the peer go to peer slot 0.
    pub fn convert_to_v09(&self, kind: Kind, device_bytes: u64) -> Result<Self, LayoutError> {
        let mut sb = self.converted(Version::V09, kind, device_bytes)?;
        let peer = &mut sb.peers[0];
        for (device, flag) in V08_PEER_FLAGS {
            peer.flags.set(flag, self.flags.contains(device));
        }
        sb.flags = self.flags.without(DeviceFlags::V08_PEER_BITS);
        sb.v08_in_use = false;
        if self.v08_in_use {
            // v09 has no second magic: the missing flag says the same (§8.3).
            sb.flags.set(DeviceFlags::AL_CLEAN, false);
        }
        Ok(sb)
    }

    /// The v08 superblock that create-md makes out of this v09 one, from peer slot 0 (§11). A bitmap
    /// with more than one slot is not meaningful afterwards: a full sync is needed.
    pub fn convert_to_v08(&self, kind: Kind, device_bytes: u64) -> Result<Self, LayoutError> {
        let mut sb = self.converted(Version::V08, kind, device_bytes)?;
        let peer = self.peers[0];
        sb.peers[0].bitmap_uuid = peer.bitmap_uuid;
        for (device, flag) in V08_PEER_FLAGS {
            sb.flags.set(device, peer.flags.contains(flag));
        }
        Ok(sb)
    }

    fn converted(&self, version: Version, kind: Kind, device_bytes: u64) -> Result<Self, LayoutError> {
        let geometry = Geometry { max_peers: 1, ..self.geometry() };
        let layout = Layout::compute(kind, device_bytes, None, geometry)?;
        let mut sb = Self::fresh(version, &layout);
        sb.effective_size_sectors = self.effective_size_sectors;
        sb.current_uuid = self.current_uuid;
        sb.device_uuid = self.device_uuid;
        sb.flags = self.flags;
        sb.al_nr_extents = self.al_nr_extents;
        sb.max_peer_bio_size = self.max_peer_bio_size;
        sb.history[..2].copy_from_slice(&self.history[..2]);
        Ok(sb)
    }

    /// Data sectors the reference tool considers usable; it clamps the last agreed size to that (§3.3,
    /// §4.4). `None` when the superblock cannot lie on such a device.
    pub fn tool_usable_sectors(&self, kind: Kind, device_bytes: u64) -> Option<u64> {
        let area = match kind {
            Kind::Internal => {
                let first =
                    i128::from(md_offset(kind, device_bytes)? / SECTOR_SIZE) + i128::from(self.bm_offset);
                return u64::try_from(first).ok();
            }
            Kind::FlexExternal | Kind::Indexed(_) => {
                i64::from(self.md_size_sectors) - i64::from(self.bm_offset)
            }
        };
        let area = u64::try_from(area).ok()?;
        Some(crate::tool_max_sectors(area, self.max_peers, self.bm_bytes_per_bit))
    }
}

/// Device flags of v08 that belong to the peer in v09 (§5.1).
const V08_PEER_FLAGS: [(DeviceFlags, PeerFlags); 3] = [
    (DeviceFlags::CONNECTED_IND, PeerFlags::CONNECTED),
    (DeviceFlags::FULL_SYNC, PeerFlags::FULL_SYNC),
    (DeviceFlags::PEER_OUTDATED, PeerFlags::OUTDATED),
];
