//! DRBD's on-disk metadata, bit for bit: superblock, activity log, bitmap and the text dump.
//!
//! Formats v08 (DRBD 8.4) and v09 (DRBD 9), as `spec/metadata.md` describes them. Everything except
//! [`image`] is pure: bytes in, structs out. [`image`] moves whole metadata areas through the small
//! [`image::BlockIo`] trait. Nothing here knows a clock, a random source or a block device.
//!
//! Where to start: [`Layout`] says where things are, [`Superblock`] what is known about the data and
//! the peers, [`Bitmap`] what is out of sync, [`al`] what may be out of sync after a crash.
//!
//! Units: *sector* = 512 bytes, *block* = 4096 bytes. Superblock and activity log are big-endian, the
//! bitmap is little-endian (`spec/metadata.md`, "Units").
#![forbid(unsafe_code)]

pub mod al;
mod al_old;
mod apply;
pub mod bitmap;
mod crc32c;
mod dump;
mod flags;
pub mod gi;
pub mod image;
mod layout;
mod parse;
mod superblock;
mod validate;

pub use apply::{Applied, ApplyError, apply_al};
pub use bitmap::{Bitmap, BitmapError};
pub use crc32c::crc32c_raw;
pub use dump::{DumpError, DumpHeader, Moved, dump};
pub use flags::{DeviceFlags, PeerFlags};
pub use layout::{
    Geometry, Kind, Layout, LayoutError, bitmap_bits, bitmap_bytes, md_offset, tool_max_sectors,
};
pub use parse::{ParseError, ParsedDump, Run, parse_dump};
pub use superblock::{DecodeError, PeerSlot, Superblock, Version};
pub use validate::{DriverCheck, DriverError, ToolError};

/// Bytes of a metadata block: the unit of all metadata I/O.
pub const BLOCK_SIZE: usize = 4096;
/// Bytes of a sector, the unit of sizes and offsets in the superblock.
pub const SECTOR_SIZE: u64 = 512;
/// Sectors per block.
pub const SECTORS_PER_BLOCK: u64 = 8;
/// Peer slots (node ids) in a v09 superblock (`spec/metadata.md` §1).
pub const PEERS_MAX: usize = 32;
/// History UUIDs in a v09 superblock; v08 has the first two.
pub const HISTORY_LEN: usize = 32;
/// The UUID of freshly created metadata, meaning "no data yet" (`spec/metadata.md` §1).
pub const UUID_JUST_CREATED: u64 = 4;
/// Bytes covered by one activity-log extent (4 MiB).
pub const AL_EXTENT_SIZE: u64 = 4 << 20;
/// Sectors covered by one activity-log extent.
pub const AL_EXTENT_SECTORS: u64 = AL_EXTENT_SIZE / SECTOR_SIZE;
/// Smallest number of activity-log slots that can be configured.
pub const AL_EXTENTS_MIN: u32 = 67;
/// Largest number of activity-log slots that can be configured.
pub const AL_EXTENTS_MAX: u32 = 65534;
/// Smallest and default number of bytes per bitmap bit.
pub const BYTES_PER_BIT_MIN: u32 = 4096;
/// Largest number of bytes per bitmap bit.
pub const BYTES_PER_BIT_MAX: u32 = 1 << 20;
/// Sectors of one indexed metadata area (128 MiB).
pub const INDEXED_SECTORS: u32 = 262_144;
/// Largest device in sectors (1 PiB).
pub const DEVICE_SECTORS_MAX: u64 = 1 << 41;

/// One 4 KiB metadata block.
pub type Block = [u8; BLOCK_SIZE];

/// Reads a big-endian `u16`; bytes beyond the end count as zero.
pub(crate) fn be16(block: &Block, at: usize) -> u16 {
    u16::from_be_bytes(field(block, at))
}

pub(crate) fn be32(block: &Block, at: usize) -> u32 {
    u32::from_be_bytes(field(block, at))
}

pub(crate) fn be64(block: &Block, at: usize) -> u64 {
    u64::from_be_bytes(field(block, at))
}

fn field<const N: usize>(block: &Block, at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(src) = block.get(at..at + N) {
        out.copy_from_slice(src);
    }
    out
}

/// Stores `bytes` at `at`; the callers' offsets are constants inside the block.
pub(crate) fn put(block: &mut Block, at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}
