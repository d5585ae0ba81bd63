//! Where the parts of the metadata are and how large they are (`spec/metadata.md` §2, §3).

use crate::al::CONTEXT_PER_TRANSACTION;
use crate::superblock::Superblock;
use crate::{
    AL_EXTENTS_MAX, BLOCK_SIZE, BYTES_PER_BIT_MAX, BYTES_PER_BIT_MIN, DEVICE_SECTORS_MAX, INDEXED_SECTORS,
    PEERS_MAX, SECTOR_SIZE, SECTORS_PER_BLOCK,
};

const BLOCK: u64 = BLOCK_SIZE as u64;
/// The smallest activity log: 32 KiB (§1).
pub(crate) const AL_BLOCKS_MIN: u64 = 8;
/// The largest activity log the driver accepts: 16 GiB (§8.6).
pub(crate) const AL_BLOCKS_MAX: u64 = 4_194_304;
/// No metadata device is smaller (§13.2).
const DEVICE_BYTES_MIN: u64 = 68 << 10;

/// How the metadata is placed; the keyword in the configuration (`spec/metadata.md` §2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// At the end of the backing device (`internal`, `flex-internal`).
    Internal,
    /// A device of its own (`flexible`, `flex-external`).
    FlexExternal,
    /// The n-th 128 MiB area of a shared device.
    Indexed(u32),
}

impl Kind {
    /// Whether data and metadata share one device.
    pub const fn is_internal(self) -> bool {
        matches!(self, Self::Internal)
    }

    /// The code drivers use: internal −3 (flexible), flexible external −2, indexed ≥ 0 (§1).
    pub fn index_code(self) -> i32 {
        match self {
            Self::Internal => -3,
            Self::FlexExternal => -2,
            Self::Indexed(n) => i32::try_from(n).unwrap_or(i32::MAX),
        }
    }
}

/// What decides the size of the parts, apart from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bitmap slots, 1…32.
    pub max_peers: u32,
    /// Data bytes per bitmap bit, a power of two in 4096…1 MiB.
    pub bytes_per_bit: u32,
    /// Stripes of the activity log.
    pub al_stripes: u32,
    /// Blocks (4 KiB) per stripe.
    pub al_stripe_size_4k: u32,
}

impl Geometry {
    /// The default geometry (4 KiB per bit, one stripe of 32 KiB) for `max_peers` slots.
    pub const fn new(max_peers: u32) -> Self {
        Self { max_peers, bytes_per_bit: BYTES_PER_BIT_MIN, al_stripes: 1, al_stripe_size_4k: 8 }
    }

    /// Blocks of the activity-log ring.
    pub const fn al_blocks(&self) -> u64 {
        self.al_stripes as u64 * self.al_stripe_size_4k as u64
    }

    /// Sectors of the activity-log area.
    pub const fn al_sectors(&self) -> u64 {
        self.al_blocks().saturating_mul(SECTORS_PER_BLOCK)
    }

    /// Whether the activity log has the classic size, 1 × 32 KiB.
    pub const fn is_classic_al(&self) -> bool {
        self.al_stripes == 1 && self.al_stripe_size_4k == 8
    }

    /// Checks every field against its range.
    pub fn check(&self) -> Result<(), LayoutError> {
        if self.max_peers == 0 || self.max_peers as usize > PEERS_MAX {
            return Err(LayoutError::MaxPeers(self.max_peers));
        }
        check_bytes_per_bit(self.bytes_per_bit)?;
        if !(AL_BLOCKS_MIN..=AL_BLOCKS_MAX).contains(&self.al_blocks()) {
            return Err(LayoutError::AlSize {
                stripes: self.al_stripes,
                stripe_size_4k: self.al_stripe_size_4k,
            });
        }
        Ok(())
    }
}

pub(crate) fn check_bytes_per_bit(bytes: u32) -> Result<(), LayoutError> {
    if bytes.is_power_of_two() && (BYTES_PER_BIT_MIN..=BYTES_PER_BIT_MAX).contains(&bytes) {
        Ok(())
    } else {
        Err(LayoutError::BytesPerBit(bytes))
    }
}

/// Why a layout cannot exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Slot count out of range.
    #[error("The number of bitmap slots (max peers) is {0}; choose 1 to 31.")]
    MaxPeers(u32),
    /// Bitmap granularity out of range.
    #[error("The bitmap block size is {0} bytes; choose a power of two from 4096 to 1048576.")]
    BytesPerBit(u32),
    /// Activity log too small or too large.
    #[error(
        "The activity log has {stripes} stripes of {stripe_size_4k} blocks; stripes times stripe size \
         must be from 32 KiB to 16 GiB."
    )]
    AlSize {
        /// Stripes asked for.
        stripes: u32,
        /// Blocks per stripe asked for.
        stripe_size_4k: u32,
    },
    /// Indexed metadata has one geometry only.
    #[error(
        "Indexed metadata allows only one activity-log stripe of 32 KiB and 4096 bytes per bitmap bit; \
         use flexible metadata for another geometry."
    )]
    IndexedGeometry,
    /// The metadata does not fit.
    #[error(
        "The metadata device has {have} bytes, but this metadata needs at least {need}; use a larger \
         device or a larger bitmap block size."
    )]
    DeviceTooSmall {
        /// Size of the device in bytes.
        have: u64,
        /// Size needed in bytes.
        need: u64,
    },
    /// More than 1 PiB, or the offsets do not fit their 32-bit fields.
    #[error(
        "A device of {0} bytes is too large for this metadata; the limit is 1 PiB, and with internal \
         metadata bitmaps below 1 TiB: use a larger bitmap block size."
    )]
    DeviceTooLarge(u64),
    /// The superblock's own offsets point outside of the device.
    #[error(
        "The superblock places its {what} outside of the metadata device; the metadata is damaged or \
         belongs to another device size."
    )]
    OutsideDevice {
        /// Which area.
        what: &'static str,
    },
}

/// Absolute byte position of the superblock on a metadata device of `device_bytes` bytes, if it can
/// lie there at all (`spec/metadata.md` §2).
pub fn md_offset(kind: Kind, device_bytes: u64) -> Option<u64> {
    let pos = match kind {
        Kind::Internal => device_bytes.checked_sub(BLOCK)? / BLOCK * BLOCK,
        Kind::FlexExternal => 0,
        Kind::Indexed(n) => u64::from(n) * u64::from(INDEXED_SECTORS) * SECTOR_SIZE,
    };
    (pos.checked_add(BLOCK)? <= device_bytes).then_some(pos)
}

/// Bits needed for `sectors` of data, without any padding: `ceil(sectors × 512 / bytes_per_bit)`.
pub fn bitmap_bits(sectors: u64, bytes_per_bit: u32) -> u64 {
    sectors.div_ceil((u64::from(bytes_per_bit) / SECTOR_SIZE).max(1))
}

/// Bytes the bitmap of `sectors` of data occupies on disk, all slots (`spec/metadata.md` §3.1).
/// Saturates for sizes far beyond [`DEVICE_SECTORS_MAX`].
pub fn bitmap_bytes(sectors: u64, max_peers: u32, bytes_per_bit: u32) -> u64 {
    let per_slot = bitmap_bits(sectors, bytes_per_bit).div_ceil(64) * 8;
    per_slot.saturating_mul(u64::from(max_peers)).div_ceil(BLOCK).saturating_mul(BLOCK)
}

/// Data sectors that the reference *tool* says an external bitmap area of `area_sectors` covers; used
/// only to clamp the last agreed size as it does (`spec/metadata.md` §3.3).
pub fn tool_max_sectors(area_sectors: u64, max_peers: u32, bytes_per_bit: u32) -> u64 {
    let bits = area_sectors * SECTOR_SIZE * 8 / 64 / u64::from(max_peers.max(1)) * 64;
    bits.saturating_mul(u64::from(bytes_per_bit) / SECTOR_SIZE).min(DEVICE_SECTORS_MAX)
}

/// Positions and sizes of one metadata area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Placement.
    pub kind: Kind,
    /// What it was computed from.
    pub geometry: Geometry,
    /// Absolute byte position of the superblock.
    pub md_offset: u64,
    /// Sectors of the whole metadata area, as stored in the superblock.
    pub md_size_sectors: u32,
    /// Activity log, sectors relative to the superblock.
    pub al_offset: i32,
    /// Bitmap, sectors relative to the superblock.
    pub bm_offset: i32,
    /// Sectors of the bitmap area.
    pub bm_area_sectors: u64,
    /// Data sectors usable with this layout, at most [`DEVICE_SECTORS_MAX`]. For external metadata this
    /// is what the bitmap area covers, cut to the data device if its size was given.
    pub usable_sectors: u64,
}

impl Layout {
    /// Lays out new metadata on a device of `device_bytes`. `data_sectors` is the data device's size for
    /// external metadata (`None`: unknown); it is ignored for internal metadata.
    pub fn compute(
        kind: Kind,
        device_bytes: u64,
        data_sectors: Option<u64>,
        geometry: Geometry,
    ) -> Result<Self, LayoutError> {
        geometry.check()?;
        if device_bytes / SECTOR_SIZE > DEVICE_SECTORS_MAX {
            return Err(LayoutError::DeviceTooLarge(device_bytes));
        }
        let too_small = |need| LayoutError::DeviceTooSmall { have: device_bytes, need };
        if device_bytes < DEVICE_BYTES_MIN {
            return Err(too_small(DEVICE_BYTES_MIN));
        }
        let md_offset = md_offset(kind, device_bytes).ok_or(too_small(DEVICE_BYTES_MIN))?;
        let al = geometry.al_sectors();
        let (md_size, al_offset, bm_offset) = match kind {
            Kind::Internal => {
                let bytes =
                    bitmap_bytes(device_bytes / SECTOR_SIZE, geometry.max_peers, geometry.bytes_per_bit);
                let md_size = SECTORS_PER_BLOCK + al + bytes / SECTOR_SIZE;
                let need = md_size * SECTOR_SIZE;
                if need > md_offset + BLOCK {
                    return Err(too_small(need));
                }
                let offset = |sectors: u64| {
                    i32::try_from(-(sectors.min(1 << 40) as i64))
                        .map_err(|_| LayoutError::DeviceTooLarge(device_bytes))
                };
                (md_size, offset(al)?, offset(md_size - SECTORS_PER_BLOCK)?)
            }
            Kind::FlexExternal | Kind::Indexed(_) => {
                let indexed = matches!(kind, Kind::Indexed(_));
                let classic = geometry.is_classic_al() && geometry.bytes_per_bit == BYTES_PER_BIT_MIN;
                if indexed && !classic {
                    return Err(LayoutError::IndexedGeometry);
                }
                let md_size = if indexed {
                    u64::from(INDEXED_SECTORS)
                } else {
                    // The field has 32 bits; no bitmap needs more than 2 TiB.
                    (device_bytes / SECTOR_SIZE).min(u64::from(u32::MAX) & !7)
                };
                let need = md_offset + if indexed { md_size * SECTOR_SIZE } else { 0 };
                let need = need.max((2 * SECTORS_PER_BLOCK + al) * SECTOR_SIZE);
                if device_bytes < need {
                    return Err(too_small(need));
                }
                let bm = i32::try_from(SECTORS_PER_BLOCK + al)
                    .map_err(|_| LayoutError::DeviceTooLarge(device_bytes))?;
                (md_size, SECTORS_PER_BLOCK as i32, bm)
            }
        };
        let md_size_sectors =
            u32::try_from(md_size).map_err(|_| LayoutError::DeviceTooLarge(device_bytes))?;
        Self::place(kind, geometry, md_offset, md_size_sectors, al_offset, bm_offset, data_sectors)
            .ok_or(too_small(DEVICE_BYTES_MIN))
    }

    /// The layout that existing metadata states itself, checked only to lie inside the device. Use the
    /// superblock's own checks ([`Superblock::check_tool`], [`Superblock::check_driver`]) first.
    pub fn of_superblock(
        kind: Kind,
        device_bytes: u64,
        data_sectors: Option<u64>,
        superblock: &Superblock,
    ) -> Result<Self, LayoutError> {
        let outside = |what| LayoutError::OutsideDevice { what };
        let md_offset = md_offset(kind, device_bytes).ok_or(outside("superblock"))?;
        Self::of_superblock_at(kind, md_offset, device_bytes, data_sectors, superblock)
    }

    /// Like [`Layout::of_superblock`] with the superblock at a position given by the caller, which is
    /// how metadata left behind by a resize is read (`spec/metadata.md` §10.2).
    pub fn of_superblock_at(
        kind: Kind,
        md_offset: u64,
        device_bytes: u64,
        data_sectors: Option<u64>,
        superblock: &Superblock,
    ) -> Result<Self, LayoutError> {
        let geometry = superblock.geometry();
        geometry.check()?;
        let outside = |what| LayoutError::OutsideDevice { what };
        let layout = Self::place(
            kind,
            geometry,
            md_offset,
            superblock.md_size_sectors,
            superblock.al_offset,
            superblock.bm_offset,
            data_sectors,
        )
        .ok_or(outside("bitmap"))?;
        let inside = |pos: i128, bytes: u64| pos >= 0 && pos + i128::from(bytes) <= i128::from(device_bytes);
        if !inside(layout.relative(layout.al_offset), geometry.al_blocks() * BLOCK) {
            return Err(outside("activity log"));
        }
        if !inside(layout.relative(layout.bm_offset), layout.bm_area_sectors * SECTOR_SIZE) {
            return Err(outside("bitmap"));
        }
        Ok(layout)
    }

    /// Derives the dependent fields; `None` if the bitmap area would be negative.
    fn place(
        kind: Kind,
        geometry: Geometry,
        md_offset: u64,
        md_size_sectors: u32,
        al_offset: i32,
        bm_offset: i32,
        data_sectors: Option<u64>,
    ) -> Option<Self> {
        let end = match kind {
            Kind::Internal => i64::from(al_offset),
            Kind::FlexExternal => i64::from(md_size_sectors) & !7,
            Kind::Indexed(_) => i64::from(INDEXED_SECTORS),
        };
        let bm_area_sectors = u64::try_from(end - i64::from(bm_offset)).ok()?;
        let mut layout = Self {
            kind,
            geometry,
            md_offset,
            md_size_sectors,
            al_offset,
            bm_offset,
            bm_area_sectors,
            usable_sectors: 0,
        };
        let first = u64::try_from(layout.relative(bm_offset)).ok()? / SECTOR_SIZE;
        let covered = layout.bitmap_covers_sectors();
        let limit = if kind.is_internal() { first } else { data_sectors.unwrap_or(u64::MAX) };
        layout.usable_sectors = covered.min(limit).min(DEVICE_SECTORS_MAX);
        Some(layout)
    }

    /// Absolute byte position of something `sectors` away from the superblock.
    fn relative(&self, sectors: i32) -> i128 {
        i128::from(self.md_offset) + i128::from(sectors) * i128::from(SECTOR_SIZE)
    }

    /// Absolute byte position of something that was checked to lie at or behind position 0.
    fn absolute(&self, sectors: i32) -> u64 {
        u64::try_from(self.relative(sectors)).unwrap_or(0)
    }

    /// Data sectors the bitmap area covers: the smaller of the driver's two limits (§3.3).
    pub fn bitmap_covers_sectors(&self) -> u64 {
        let peers = u64::from(self.geometry.max_peers.max(1));
        let bits = self.bm_area_sectors * 64 / peers * 64;
        let sectors_per_bit = u64::from(self.geometry.bytes_per_bit) / SECTOR_SIZE;
        let capacity = self.bm_area_sectors * SECTOR_SIZE / BLOCK * BLOCK / peers * 8;
        bits.min(capacity / 64 * 64).saturating_mul(sectors_per_bit)
    }

    /// Absolute byte position of the activity log.
    pub fn al_pos(&self) -> u64 {
        self.absolute(self.al_offset)
    }

    /// Blocks of the activity-log ring.
    pub fn al_blocks(&self) -> u64 {
        self.geometry.al_blocks()
    }

    /// Absolute byte position of physical block `n` (`0..al_blocks()`) of the activity-log area.
    pub fn al_block_pos(&self, n: u64) -> u64 {
        self.al_pos() + n * BLOCK
    }

    /// Absolute byte position at which transaction `number` is written (§7.2).
    pub fn al_transaction_pos(&self, number: u32) -> u64 {
        self.al_block_pos(crate::al::ring_block(
            number,
            self.geometry.al_stripes,
            self.geometry.al_stripe_size_4k,
        ))
    }

    /// The most activity-log slots this ring can carry (§7.3).
    pub fn al_extents_max(&self) -> u32 {
        let n = self.al_blocks();
        if n > 72 { AL_EXTENTS_MAX } else { (n.saturating_sub(1) as u32) * CONTEXT_PER_TRANSACTION as u32 }
    }

    /// Absolute byte position of the bitmap.
    pub fn bitmap_pos(&self) -> u64 {
        self.absolute(self.bm_offset)
    }

    /// Absolute byte position of 4 KiB block `n` of the bitmap.
    pub fn bitmap_block_pos(&self, n: u64) -> u64 {
        self.bitmap_pos() + n * BLOCK
    }

    /// First byte of the whole metadata area.
    pub fn area_start(&self) -> u64 {
        if self.kind.is_internal() { self.bitmap_pos() } else { self.md_offset }
    }

    /// First byte behind the whole metadata area.
    pub fn area_end(&self) -> u64 {
        if self.kind.is_internal() {
            self.md_offset + BLOCK
        } else {
            self.bitmap_pos() + self.bm_area_sectors * SECTOR_SIZE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Row = (u64, i32, u32, u64);

    /// Rows of `spec/metadata.md` §3.2: device, slots, then bytes per bit 4096 and 65536, each with
    /// bitmap bytes, bitmap offset, metadata sectors and usable sectors.
    #[rustfmt::skip]
    const INTERNAL: [(u64, u32, [Row; 2]); 12] = [
        (1 << 30, 1, [(32768, -128, 136, 2_097_016), (4096, -72, 80, 2_097_072)]),
        (1 << 30, 2, [(65536, -192, 200, 2_096_952), (4096, -72, 80, 2_097_072)]),
        (1 << 30, 7, [(229_376, -512, 520, 2_096_632), (16384, -96, 104, 2_097_048)]),
        (1 << 30, 31, [(1_015_808, -2048, 2056, 2_095_096), (65536, -192, 200, 2_096_952)]),
        (1 << 40, 1, [(33_554_432, -65600, 65608, 2_147_418_040), (2_097_152, -4160, 4168, 2_147_479_480)]),
        (1 << 40, 2, [(67_108_864, -131_136, 131_144, 2_147_352_504), (4_194_304, -8256, 8264, 2_147_475_384)]),
        (1 << 40, 7, [(234_881_024, -458_816, 458_824, 2_147_024_824), (14_680_064, -28736, 28744, 2_147_454_904)]),
        (1 << 40, 31, [(1_040_187_392, -2_031_680, 2_031_688, 2_145_451_960), (65_011_712, -127_040, 127_048, 2_147_356_600)]),
        (1 << 50, 1, [(34_359_738_368, -67_108_928, 67_108_936, 2_198_956_146_616), (2_147_483_648, -4_194_368, 4_194_376, 2_199_019_061_176)]),
        (1 << 50, 2, [(68_719_476_736, -134_217_792, 134_217_800, 2_198_889_037_752), (4_294_967_296, -8_388_672, 8_388_680, 2_199_014_866_872)]),
        (1 << 50, 7, [(240_518_168_576, -469_762_112, 469_762_120, 2_198_553_493_432), (15_032_385_536, -29_360_192, 29_360_200, 2_198_993_895_352)]),
        (1 << 50, 31, [(1_065_151_889_408, -2_080_374_848, 2_080_374_856, 2_196_942_880_696), (66_571_993_088, -130_023_488, 130_023_496, 2_198_893_232_056)]),
    ];

    #[test]
    fn internal_layouts_of_the_table() {
        for (device, max_peers, rows) in INTERNAL {
            for (bytes_per_bit, row) in [4096, 65536].into_iter().zip(rows) {
                let geometry = Geometry { bytes_per_bit, ..Geometry::new(max_peers) };
                let l = Layout::compute(Kind::Internal, device, None, geometry).unwrap();
                let bytes = bitmap_bytes(device / SECTOR_SIZE, max_peers, bytes_per_bit);
                assert_eq!((bytes, l.bm_offset, l.md_size_sectors, l.usable_sectors), row);
                assert_eq!((l.al_offset, l.md_offset), (-64, device - 4096));
                assert_eq!(l.bm_area_sectors * SECTOR_SIZE, bytes);
                assert_eq!(l.bitmap_pos() + bytes, l.al_pos());
                assert_eq!((l.area_start(), l.area_end()), (l.bitmap_pos(), device));
            }
        }
    }

    #[test]
    fn smallest_external_devices() {
        for (gib, max_peers, device) in
            [(1, 1, 69632), (1, 2, 102_400), (1024, 1, 33_591_296), (1024, 7, 234_917_888)]
        {
            let data = gib << 21;
            let compute = |bytes| {
                let geometry = Geometry::new(max_peers);
                Layout::compute(Kind::FlexExternal, bytes, Some(data), geometry).unwrap()
            };
            assert_eq!(compute(device).usable_sectors, data);
            if device > 69632 {
                assert!(compute(device - 4096).usable_sectors < data);
            }
        }
    }

    #[test]
    fn slots_the_ring_can_carry() {
        let layout = |stripes, size| {
            let geometry = Geometry { al_stripes: stripes, al_stripe_size_4k: size, ..Geometry::new(1) };
            Layout::compute(Kind::FlexExternal, 64 << 20, None, geometry).unwrap()
        };
        assert_eq!(layout(1, 8).al_extents_max(), 6433);
        assert_eq!(layout(1, 72).al_extents_max(), 65249);
        assert_eq!(layout(7, 16).al_extents_max(), 65534);
        let striped = layout(7, 16);
        assert_eq!(striped.al_transaction_pos(8), 4096 + (16 + 1) * 4096);
    }

    #[test]
    fn impossible_layouts_are_refused() {
        let compute = |kind, bytes, geometry| Layout::compute(kind, bytes, None, geometry);
        let classic = Geometry::new(1);
        let with = |al_stripes, al_stripe_size_4k, bytes_per_bit, max_peers| Geometry {
            max_peers,
            bytes_per_bit,
            al_stripes,
            al_stripe_size_4k,
        };
        for (kind, bytes, geometry) in [
            (Kind::Internal, 65536, classic),
            (Kind::Internal, 0, classic),
            (Kind::Internal, u64::MAX, classic),
            (Kind::Internal, 1 << 20, Geometry::new(0)),
            (Kind::Internal, 1 << 20, Geometry::new(33)),
            (Kind::Internal, 1 << 20, with(1, 7, 4096, 1)),
            (Kind::Internal, 1 << 20, with(u32::MAX, u32::MAX, 4096, 1)),
            (Kind::Internal, 1 << 20, with(1, 8, 5000, 1)),
            (Kind::Internal, 1 << 20, with(1, 8, 2 << 20, 1)),
            (Kind::Internal, 1 << 20, with(1, 300, 4096, 1)),
            (Kind::Internal, 1 << 50, with(1, 8, 4096, 32)),
            (Kind::FlexExternal, 70000, with(2, 8, 4096, 1)),
            (Kind::Indexed(0), 1 << 30, with(2, 8, 4096, 1)),
            (Kind::Indexed(0), 1 << 30, with(1, 8, 8192, 1)),
            (Kind::Indexed(2), 300 << 20, classic),
            (Kind::Indexed(u32::MAX), 1 << 30, classic),
        ] {
            let result = compute(kind, bytes, geometry);
            assert!(result.is_err(), "{kind:?} {bytes} {geometry:?}: {result:?}");
        }
        assert_eq!(compute(Kind::Indexed(1), 256 << 20, classic).unwrap().md_offset, 128 << 20);
    }
}
