//! When a superblock counts as valid: for the tools (`spec/metadata.md` §4.4) and for attaching
//! (`spec/metadata.md` §8.3–8.8).

use crate::layout::{AL_BLOCKS_MAX, AL_BLOCKS_MIN, Kind, bitmap_bytes, check_bytes_per_bit, md_offset};
use crate::{
    BYTES_PER_BIT_MIN, INDEXED_SECTORS, PEERS_MAX, SECTOR_SIZE, SECTORS_PER_BLOCK, Superblock, Version,
};

/// Bitmap slots the tools know; larger numbers are read as this.
const TOOL_PEERS_MAX: u32 = 31;
/// The driver wants at least 1 MiB of metadata device.
const DRIVER_SECTORS_MIN: u64 = 2048;

/// Why the tools treat a superblock as "no metadata" (`spec/metadata.md` §4.4).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ToolError {
    /// A count or an id out of its range.
    #[error("The superblock's {what} is {found}, which is not in {low} to {high}; the metadata is damaged.")]
    OutOfRange {
        /// Field.
        what: &'static str,
        /// Value found.
        found: i64,
        /// Smallest valid value.
        low: i64,
        /// Largest valid value.
        high: i64,
    },
    /// An offset or size that does not follow from the device.
    #[error(
        "The superblock's {what} is {found}, but {expected} was expected on this device; the metadata \
         belongs to another placement or the device was resized (check-resize)."
    )]
    Mismatch {
        /// Field.
        what: &'static str,
        /// Value found.
        found: i64,
        /// Value computed.
        expected: i64,
    },
}

/// Circumstances of an attach.
#[derive(Clone, Copy, Debug)]
pub struct DriverCheck {
    /// Configured placement.
    pub kind: Kind,
    /// Size of the metadata device, bytes.
    pub device_bytes: u64,
    /// Configured node id, 0…31; `None` with v08.
    pub node_id: Option<u8>,
}

/// Why a device is not attached (`spec/metadata.md` §8.3–8.9).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// The activity log was not applied.
    #[error("The metadata is unclean: apply the activity log first (apply-al).")]
    Unclean,
    /// Bytes per bit.
    #[error(
        "The superblock says {0} bytes per bitmap bit, which is not supported; create the metadata \
         anew (create-md)."
    )]
    BytesPerBit(u32),
    /// Activity-log geometry.
    #[error(
        "The superblock says {stripes} activity-log stripes of {stripe_size_4k} blocks, which is not \
         supported; create the metadata anew (create-md)."
    )]
    AlGeometry {
        /// Stripes.
        stripes: u32,
        /// Blocks per stripe.
        stripe_size_4k: u32,
    },
    /// Offsets that contradict each other or the device.
    #[error("The superblock is inconsistent: {0}; create the metadata anew (create-md).")]
    Offsets(&'static str),
    /// Another node's metadata.
    #[error(
        "The metadata belongs to node id {found}, but node id {configured} is configured; correct the \
         configuration or create the metadata anew (create-md)."
    )]
    NodeId {
        /// Stored.
        found: i32,
        /// Configured.
        configured: u8,
    },
    /// A bitmap index that cannot be.
    #[error(
        "The superblock assigns bitmap slot {index} to node id {node_id}, which is impossible with \
         {max_peers} slots; create the metadata anew (create-md)."
    )]
    BitmapIndex {
        /// Node id.
        node_id: usize,
        /// Index stored.
        index: i32,
        /// Slots.
        max_peers: u32,
    },
    /// The metadata device is too small.
    #[error("The metadata device has {have} sectors, but at least {need} are needed; enlarge it.")]
    DeviceTooSmall {
        /// Sectors it has.
        have: u64,
        /// Sectors needed.
        need: u64,
    },
}

impl DriverError {
    /// The result code a kernel driver answers with (numbers of `spec/metadata.md` §8).
    pub const fn code(&self) -> u32 {
        match self {
            Self::Unclean => 165,
            Self::DeviceTooSmall { .. } => 112,
            _ => 119,
        }
    }
}

impl Superblock {
    /// Sectors of the activity log as stored, whatever the values are.
    fn al_sectors_stored(&self) -> i64 {
        i64::try_from(self.geometry().al_sectors()).unwrap_or(i64::MAX)
    }

    /// The rules under which the tools accept a superblock on a device of `device_bytes` bytes
    /// (§4.4). More than 31 slots are judged as 31.
    pub fn check_tool(&self, kind: Kind, device_bytes: u64) -> Result<(), ToolError> {
        let range = |what, found: i64, low, high| {
            let ok = (low..=high).contains(&found);
            if ok { Ok(()) } else { Err(ToolError::OutOfRange { what, found, low, high }) }
        };
        let equal = |what, found: i64, expected: i64| {
            if found == expected { Ok(()) } else { Err(ToolError::Mismatch { what, found, expected }) }
        };
        let max_peers = self.max_peers.min(TOOL_PEERS_MAX);
        range("number of bitmap slots", max_peers.into(), 1, TOOL_PEERS_MAX.into())?;
        range("node id", self.node_id.into(), -1, 31)?;
        for peer in self.peers.iter().take(max_peers as usize) {
            range("bitmap index", peer.bitmap_index.into(), -1, 31)?;
        }
        // Not among the reference's rules, but nothing can be computed without it.
        if let Err(_bad) = check_bytes_per_bit(self.bm_bytes_per_bit) {
            range("number of bytes per bitmap bit", self.bm_bytes_per_bit.into(), 4096, 1 << 20)?;
            equal("number of bytes per bitmap bit", self.bm_bytes_per_bit.into(), 4096)?;
        }
        let al = self.al_sectors_stored();
        if kind.is_internal() {
            let bytes = bitmap_bytes(device_bytes / SECTOR_SIZE, max_peers, self.bm_bytes_per_bit);
            let bm = i64::try_from(bytes / SECTOR_SIZE).unwrap_or(i64::MAX);
            let before = al.saturating_add(bm);
            equal("activity-log offset", self.al_offset.into(), -al)?;
            equal("size", self.md_size_sectors.into(), before.saturating_add(8))?;
            equal("bitmap offset", self.bm_offset.into(), -before)
        } else {
            equal("activity-log offset", self.al_offset.into(), 8)?;
            equal("bitmap offset", self.bm_offset.into(), al.saturating_add(8))
        }
    }

    /// The rules under which a device is attached (§8.3–8.9). Run it after the activity log was applied.
    pub fn check_driver(&self, check: &DriverCheck) -> Result<(), DriverError> {
        if !self.is_clean() {
            return Err(DriverError::Unclean);
        }
        let bpb = self.bm_bytes_per_bit;
        let v08_other = self.version == Version::V08 && bpb != BYTES_PER_BIT_MIN;
        if check_bytes_per_bit(bpb).is_err() || v08_other {
            return Err(DriverError::BytesPerBit(bpb));
        }
        let blocks = match (self.al_stripes, self.al_stripe_size_4k) {
            (0, 0) => 8,
            (stripes, size) => u64::from(stripes) * u64::from(size),
        };
        if !(AL_BLOCKS_MIN..=AL_BLOCKS_MAX).contains(&blocks) {
            return Err(DriverError::AlGeometry {
                stripes: self.al_stripes,
                stripe_size_4k: self.al_stripe_size_4k,
            });
        }
        self.check_offsets(check, (blocks * SECTORS_PER_BLOCK) as i64)?;
        self.check_nodes(check)
    }

    fn check_offsets(&self, check: &DriverCheck, al_expected: i64) -> Result<(), DriverError> {
        let ensure = |ok, why| if ok { Ok(()) } else { Err(DriverError::Offsets(why)) };
        ensure((1..=PEERS_MAX as u32).contains(&self.max_peers), "it has an impossible slot count")?;
        let (al, bm) = (i64::from(self.al_offset), i64::from(self.bm_offset));
        let md_size = i64::from(self.md_size_sectors);
        let (al_area, bm_area) = if al < 0 {
            ensure(check.kind.is_internal(), "it says internal, the configuration external")?;
            ensure(bm <= al, "the bitmap overlaps the activity log")?;
            (-al, al - bm)
        } else {
            ensure(!check.kind.is_internal(), "it says external, the configuration internal")?;
            ensure(al == 8, "the activity log is not behind the superblock")?;
            ensure(bm >= 8 + al_expected, "the bitmap overlaps the activity log")?;
            (bm - 8, md_size - bm)
        };
        if matches!(check.kind, Kind::Indexed(_)) {
            let classic = al_expected == 64
                && bm == 72
                && self.bm_bytes_per_bit == BYTES_PER_BIT_MIN
                && md_size == i64::from(INDEXED_SECTORS);
            ensure(classic, "indexed metadata must have the classic 128 MiB geometry")?;
        }
        let sectors = check.device_bytes / SECTOR_SIZE;
        let need = match check.kind {
            Kind::Indexed(n) => u64::from(INDEXED_SECTORS) * (u64::from(n) + 1),
            Kind::Internal | Kind::FlexExternal => DRIVER_SECTORS_MIN,
        };
        if sectors < need {
            return Err(DriverError::DeviceTooSmall { have: sectors, need });
        }
        let position = md_offset(check.kind, check.device_bytes).unwrap_or(0) / SECTOR_SIZE;
        let first = position as i64 + if al < 0 { bm } else { 0 };
        ensure(sectors as i64 - md_size >= first && first >= 0, "it is larger than the device")?;
        ensure(al_area % 8 == 0 && al_area >= 64, "the activity log is too small or unaligned")?;
        ensure(al_area == al_expected, "the activity log's area does not match its geometry")?;
        ensure(bm % 8 == 0, "the bitmap is not aligned to 4 KiB")?;
        let bytes = bitmap_bytes(self.effective_size_sectors, self.max_peers, self.bm_bytes_per_bit);
        let needed = i64::try_from(bytes / SECTOR_SIZE).unwrap_or(i64::MAX);
        ensure(bm_area >= needed, "the bitmap is too small for the last agreed size")
    }

    fn check_nodes(&self, check: &DriverCheck) -> Result<(), DriverError> {
        let Some(configured) = check.node_id.filter(|_| self.version == Version::V09) else {
            return Ok(());
        };
        if self.node_id != -1 && self.node_id != i32::from(configured) {
            return Err(DriverError::NodeId { found: self.node_id, configured });
        }
        for (node_id, peer) in self.peers.iter().enumerate() {
            let index = peer.bitmap_index;
            let own = node_id == usize::from(configured);
            let possible = (0..i64::from(self.max_peers)).contains(&i64::from(index));
            if index != -1 && (own || !possible) {
                let max_peers = self.max_peers;
                return Err(DriverError::BitmapIndex { node_id, index, max_peers });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Geometry, Layout};

    const BYTES: u64 = 64 << 20;

    fn fresh(kind: Kind, device_bytes: u64) -> (Superblock, DriverCheck) {
        let layout = Layout::compute(kind, device_bytes, None, Geometry::new(3)).unwrap();
        let mut sb = Superblock::fresh(Version::V09, &layout);
        sb.peers[0].bitmap_index = 2;
        (sb, DriverCheck { kind, device_bytes, node_id: Some(1) })
    }

    #[test]
    fn fresh_metadata_passes_both() {
        for (kind, bytes) in
            [(Kind::Internal, BYTES + 1536), (Kind::FlexExternal, 1 << 20), (Kind::Indexed(1), 300 << 20)]
        {
            let (sb, check) = fresh(kind, bytes);
            sb.check_tool(kind, bytes).unwrap();
            sb.check_driver(&check).unwrap();
            let other = if kind.is_internal() { Kind::FlexExternal } else { Kind::Internal };
            assert!(sb.check_tool(other, bytes).is_err());
            let check = DriverCheck { kind: other, ..check };
            assert!(matches!(sb.check_driver(&check), Err(DriverError::Offsets(_))));
        }
    }

    #[test]
    fn a_resized_device_hides_internal_metadata_from_the_tools() {
        let (sb, _) = fresh(Kind::Internal, BYTES);
        let error = sb.check_tool(Kind::Internal, 4 * BYTES).unwrap_err();
        assert!(matches!(error, ToolError::Mismatch { what: "size", .. }), "{error}");
    }

    #[test]
    fn every_rule_of_the_attach_can_fail() {
        type Change = fn(&mut Superblock, &mut DriverCheck);
        let changes: [(u32, Change); 17] = [
            (165, |sb, _| sb.mark_in_use()),
            (119, |sb, _| sb.bm_bytes_per_bit = 2048),
            (119, |sb, _| sb.bm_bytes_per_bit = 3 << 12),
            (119, |sb, _| sb.al_stripes = 0),
            (119, |sb, _| sb.al_stripe_size_4k = 7),
            (119, |sb, _| sb.al_stripes = u32::MAX),
            (119, |sb, _| sb.max_peers = 33),
            (119, |sb, _| sb.max_peers = 0),
            (119, |sb, _| sb.bm_offset = sb.al_offset + 8),
            (119, |sb, _| sb.bm_offset -= 1),
            (119, |sb, _| sb.al_offset -= 8),
            (119, |sb, _| sb.md_size_sectors = 1 << 20),
            (119, |sb, _| sb.effective_size_sectors = 1 << 30),
            (119, |sb, _| sb.node_id = 2),
            (119, |sb, _| sb.peers[1].bitmap_index = 0),
            (119, |sb, _| sb.peers[31].bitmap_index = 3),
            (112, |_, check| check.device_bytes = 1 << 19),
        ];
        for (n, (code, change)) in changes.into_iter().enumerate() {
            let (mut sb, mut check) = fresh(Kind::Internal, BYTES);
            change(&mut sb, &mut check);
            let error = sb.check_driver(&check).expect_err(&format!("change {n}"));
            assert_eq!(error.code(), code, "change {n}: {error}");
        }
    }

    #[test]
    fn a_v08_driver_knows_only_small_bits() {
        let (mut sb, check) = fresh(Kind::Internal, BYTES);
        sb.version = Version::V08;
        sb.bm_bytes_per_bit = 8192;
        assert_eq!(sb.check_driver(&check), Err(DriverError::BytesPerBit(8192)));
    }

    #[test]
    fn the_tools_refuse_values_out_of_range() {
        for change in [
            (|sb| sb.max_peers = 0) as fn(&mut Superblock),
            |sb| sb.node_id = 32,
            |sb| sb.peers[2].bitmap_index = 32,
            |sb| sb.peers[0].bitmap_index = -2,
            |sb| sb.bm_bytes_per_bit = 0,
            |sb| sb.al_offset = 8,
        ] {
            let (mut sb, _) = fresh(Kind::Internal, BYTES);
            change(&mut sb);
            assert!(sb.check_tool(Kind::Internal, BYTES).is_err(), "{sb:?}");
        }
    }
}
