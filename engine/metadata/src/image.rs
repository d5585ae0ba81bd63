//! Whole metadata areas on files and block devices.
//!
//! Everything goes through [`BlockIo`] in aligned 4 KiB units or multiples of them. Functions that
//! write keep the order in which things must be durable, with a flush between the steps.

mod moved;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use crate::al::{self, Replay, initialized_block};
use crate::superblock::MAGIC_V07;
use crate::{
    Applied, ApplyError, BLOCK_SIZE, Bitmap, BitmapError, Block, DecodeError, INDEXED_SECTORS, Kind, Layout,
    LayoutError, ParsedDump, SECTOR_SIZE, Superblock, ToolError, Version, apply_al as apply, be32, md_offset,
};

pub use moved::{move_internal, read_moved};

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Blocks moved at a time.
const CHUNK_BLOCKS: u64 = 256;
/// Highest index of indexed metadata (§2).
const INDEX_MAX: u32 = 255;

/// A device that metadata lives on.
///
/// Buffers are multiples of 4 KiB at positions that are multiples of 4 KiB, but not aligned in memory:
/// an implementation over direct I/O has to bounce them.
pub trait BlockIo {
    /// Fills `buf` from byte position `pos`.
    fn read_at(&self, pos: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes all of `buf` to byte position `pos`.
    fn write_at(&self, pos: u64, buf: &[u8]) -> io::Result<()>;
    /// Returns when everything written is durable.
    fn flush(&self) -> io::Result<()>;
    /// Size in bytes.
    fn size(&self) -> io::Result<u64>;
}

impl BlockIo for File {
    fn read_at(&self, pos: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buf, pos)
    }

    fn write_at(&self, pos: u64, buf: &[u8]) -> io::Result<()> {
        self.write_all_at(buf, pos)
    }

    fn flush(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn size(&self) -> io::Result<u64> {
        // The length in the inode is 0 for block devices.
        let mut file = self;
        file.seek(SeekFrom::End(0))
    }
}

/// Why metadata could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// I/O failed.
    #[error("The {what} could not be {action} at byte {pos}: {source}; check the metadata device.")]
    Io {
        /// Part of the metadata.
        what: &'static str,
        /// `read`, `written` or `flushed`.
        action: &'static str,
        /// Byte position.
        pos: u64,
        /// Cause.
        source: io::Error,
    },
    /// The superblock's place is outside of the device.
    #[error("The metadata device has only {0} bytes, which is too small for metadata at that place.")]
    NoRoom(u64),
    /// No superblock there.
    #[error(transparent)]
    NoMetadata(#[from] DecodeError),
    /// There is one, but it is not valid for this device.
    #[error(transparent)]
    Invalid(#[from] ToolError),
    /// Positions or sizes cannot be.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The bitmap cannot be held.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// The activity log cannot be applied.
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

/// Which bits of the bitmap to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Those of the last agreed size: what the engine works on.
    Exact,
    /// All that the on-disk blocks hold: what the tools dump and apply-al marks.
    Padded,
}

/// What new bitmap space is filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Nothing is out of sync.
    Zeros,
    /// Everything is out of sync.
    Ones,
    /// What is there is kept.
    Leave,
}

/// Everything read from one metadata area.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// Superblock; its last agreed size is cut to what is usable.
    pub superblock: Superblock,
    /// The last agreed size as stored, if it was too big.
    pub clamped_from: Option<u64>,
    /// Where things are.
    pub layout: Layout,
    /// Bitmap for the last agreed size (empty while that is 0).
    pub bitmap: Bitmap,
    /// What the activity log says.
    pub replay: Replay,
}

fn read(io: &dyn BlockIo, what: &'static str, pos: u64, buf: &mut [u8]) -> Result<(), ImageError> {
    let action = "read";
    io.read_at(pos, buf).map_err(|source| ImageError::Io { what, action, pos, source })
}

fn write(io: &dyn BlockIo, what: &'static str, pos: u64, buf: &[u8]) -> Result<(), ImageError> {
    let action = "written";
    io.write_at(pos, buf).map_err(|source| ImageError::Io { what, action, pos, source })
}

fn flush(io: &dyn BlockIo, what: &'static str) -> Result<(), ImageError> {
    io.flush().map_err(|source| ImageError::Io { what, action: "flushed", pos: 0, source })
}

fn size(io: &dyn BlockIo) -> Result<u64, ImageError> {
    let (what, action) = ("device size", "read");
    io.size().map_err(|source| ImageError::Io { what, action, pos: 0, source })
}

fn read_block(io: &dyn BlockIo, what: &'static str, pos: u64) -> Result<Block, ImageError> {
    let mut block = [0; BLOCK_SIZE];
    read(io, what, pos, &mut block)?;
    Ok(block)
}

/// Reads the superblock and checks it as the tools do (§4.4). `data_sectors` is the size of the data
/// device of external metadata, if known. Returns the superblock with its last agreed size cut to what
/// is usable, where things are, and the size before it was cut.
pub fn read_superblock(
    io: &dyn BlockIo,
    kind: Kind,
    data_sectors: Option<u64>,
) -> Result<(Superblock, Layout, Option<u64>), ImageError> {
    let bytes = size(io)?;
    let pos = md_offset(kind, bytes).ok_or(ImageError::NoRoom(bytes))?;
    let mut superblock = Superblock::decode(&read_block(io, "superblock", pos)?)?;
    superblock.check_tool(kind, bytes)?;
    let layout = Layout::of_superblock(kind, bytes, data_sectors, &superblock)?;
    let usable = superblock.tool_usable_sectors(kind, bytes).unwrap_or(0);
    let clamped = superblock.clamp_effective_size(usable.min(layout.bitmap_covers_sectors()));
    Ok((superblock, layout, clamped))
}

/// Reads a whole metadata area. The bitmap is that of the last agreed size (§8.14); the engine resizes
/// it to the size it determines.
pub fn read_metadata(
    io: &dyn BlockIo,
    kind: Kind,
    data_sectors: Option<u64>,
    extent: Extent,
) -> Result<Metadata, ImageError> {
    let (superblock, layout, clamped_from) = read_superblock(io, kind, data_sectors)?;
    let bitmap = read_bitmap(io, &superblock, &layout, extent)?;
    let replay = read_log(io, &superblock, &layout)?;
    Ok(Metadata { superblock, clamped_from, layout, bitmap, replay })
}

/// Reads the bitmap of the last agreed size.
pub fn read_bitmap(
    io: &dyn BlockIo,
    superblock: &Superblock,
    layout: &Layout,
    extent: Extent,
) -> Result<Bitmap, ImageError> {
    let (slots, sectors) = (superblock.max_peers, superblock.effective_size_sectors);
    let mut bitmap = match extent {
        Extent::Exact => Bitmap::new(slots, sectors, superblock.bm_bytes_per_bit),
        Extent::Padded => Bitmap::with_padding(slots, sectors, superblock.bm_bytes_per_bit),
    }?;
    let on_disk = layout.bm_area_sectors * SECTOR_SIZE / BLOCK;
    let end = bitmap.disk_blocks().min(on_disk);
    let mut buf = vec![0; (CHUNK_BLOCKS * BLOCK) as usize];
    for first in (0..end).step_by(CHUNK_BLOCKS as usize) {
        let count = CHUNK_BLOCKS.min(end - first);
        let part = &mut buf[..(count * BLOCK) as usize];
        read(io, "bitmap", layout.bitmap_block_pos(first), part)?;
        for (nr, block) in (first..).zip(part.as_chunks::<BLOCK_SIZE>().0) {
            // Untouched memory of a large clean bitmap stays unbacked.
            if *block != [0; BLOCK_SIZE] {
                bitmap.load_block(nr, block);
            }
        }
    }
    Ok(bitmap)
}

/// Writes the given blocks of the bitmap; neighbours go out together. Does not flush.
pub fn write_bitmap_blocks(
    io: &dyn BlockIo,
    layout: &Layout,
    bitmap: &Bitmap,
    blocks: &[u64],
) -> Result<(), ImageError> {
    let mut buf = Vec::new();
    for run in blocks.chunk_by(|a, b| a + 1 == *b) {
        for part in run.chunks(CHUNK_BLOCKS as usize) {
            buf.clear();
            for nr in part {
                let mut block = [0; BLOCK_SIZE];
                bitmap.encode_block(*nr, &mut block);
                buf.extend_from_slice(&block);
            }
            if let Some(first) = part.first() {
                write(io, "bitmap", layout.bitmap_block_pos(*first), &buf)?;
            }
        }
    }
    Ok(())
}

/// Reads the activity log in whatever format it is (§7.5, §15).
pub fn read_log(io: &dyn BlockIo, superblock: &Superblock, layout: &Layout) -> Result<Replay, ImageError> {
    let read_nr = |n| read_block(io, "activity log", layout.al_block_pos(n));
    let head = [read_nr(0)?, read_nr(1)?];
    match al::format_of(&head, superblock) {
        al::Format::Current => al::replay_with(superblock.al_stripes, superblock.al_stripe_size_4k, read_nr),
        al::Format::Old => al::replay_old(superblock.al_nr_extents, read_nr),
        al::Format::PersistentMemory => {
            al::replay_pmem(superblock.al_nr_extents, layout.al_blocks(), read_nr)
        }
    }
}

/// Fills the activity log with initialized blocks (§7.4). Does not flush.
pub fn initialize_log(io: &dyn BlockIo, layout: &Layout) -> Result<(), ImageError> {
    let end = layout.al_blocks();
    let chunk = initialized_block().repeat(CHUNK_BLOCKS.min(end) as usize);
    for first in (0..end).step_by(CHUNK_BLOCKS as usize) {
        let count = CHUNK_BLOCKS.min(end - first);
        let part = &chunk[..(count * BLOCK) as usize];
        write(io, "activity log", layout.al_block_pos(first), part)?;
    }
    Ok(())
}

/// Writes the superblock. Does not flush.
pub fn write_superblock(
    io: &dyn BlockIo,
    layout: &Layout,
    superblock: &Superblock,
) -> Result<(), ImageError> {
    write(io, "superblock", layout.md_offset, &superblock.encode())
}

/// Fills from `start` to `end`. What is right already is not written: on thin or sparse storage nothing
/// is allocated for nothing.
fn fill(io: &dyn BlockIo, what: &'static str, start: u64, end: u64, fill: Fill) -> Result<(), ImageError> {
    let byte = match fill {
        Fill::Zeros => 0,
        Fill::Ones => 0xff,
        Fill::Leave => return Ok(()),
    };
    let wanted = vec![byte; (CHUNK_BLOCKS * BLOCK) as usize];
    let mut there = wanted.clone();
    let mut pos = start;
    while pos < end {
        let len = (end - pos).min(CHUNK_BLOCKS * BLOCK) as usize;
        read(io, what, pos, &mut there[..len])?;
        if there[..len] != wanted[..len] {
            write(io, what, pos, &wanted[..len])?;
        }
        pos += len as u64;
    }
    Ok(())
}

/// Creates metadata: invalidates what was there, initializes the activity log, zeroes the whole bitmap
/// area and writes `superblock` last. Start from [`Layout::compute`] and [`Superblock::fresh`], and ask
/// [`find_existing`] first. A crash in between leaves no valid metadata.
pub fn create_md(io: &dyn BlockIo, layout: &Layout, superblock: &Superblock) -> Result<(), ImageError> {
    create_md_filled(io, layout, superblock, Fill::Zeros)
}

/// Like [`create_md`] with a bitmap area filled as wanted.
pub fn create_md_filled(
    io: &dyn BlockIo,
    layout: &Layout,
    superblock: &Superblock,
    bitmap: Fill,
) -> Result<(), ImageError> {
    prepare(io, layout, bitmap)?;
    write_superblock(io, layout, superblock)?;
    flush(io, "superblock")
}

/// Invalidates the superblock, then initializes the activity log and fills the bitmap area.
fn prepare(io: &dyn BlockIo, layout: &Layout, bitmap: Fill) -> Result<(), ImageError> {
    write(io, "superblock", layout.md_offset, &[0; BLOCK_SIZE])?;
    flush(io, "superblock")?;
    initialize_log(io, layout)?;
    let start = layout.bitmap_pos();
    fill(io, "bitmap", start, start + layout.bm_area_sectors * SECTOR_SIZE, bitmap)?;
    flush(io, "bitmap")
}

/// Makes the bitmap slot of a node that is forgotten one of those that count since day 0 (§9.5): it gets
/// the bits of a slot that nobody uses, or all bits if every slot is in use. Bits are only added, so
/// that a crash before the superblock says the same costs nothing but time. Durable on return.
pub fn release_slot(
    io: &dyn BlockIo,
    superblock: &Superblock,
    layout: &Layout,
    slot: usize,
) -> Result<(), ImageError> {
    let mut bitmap = read_bitmap(io, superblock, layout, Extent::Exact)?;
    if slot >= bitmap.slots() {
        return Ok(());
    }
    match superblock.free_bitmap_slot() {
        Some(free) => {
            let words = bitmap.words(free).to_vec();
            bitmap.or_words(slot, 0, &words);
        }
        None => {
            bitmap.set_all(slot);
        }
    }
    let blocks = bitmap.take_dirty();
    write_bitmap_blocks(io, layout, &bitmap, &blocks)?;
    flush(io, "bitmap")
}

/// Zeroes the superblock only (wipe-md).
pub fn wipe_md(io: &dyn BlockIo, kind: Kind) -> Result<(), ImageError> {
    let bytes = size(io)?;
    let pos = md_offset(kind, bytes).ok_or(ImageError::NoRoom(bytes))?;
    write(io, "superblock", pos, &[0; BLOCK_SIZE])?;
    flush(io, "superblock")
}

/// Applies the activity log (apply-al, §7.5): bitmap, ring, superblock, each durable before the next.
/// Needed before every attach. Returns what was done and the metadata as it is now, its bitmap padded.
pub fn apply_al(
    io: &dyn BlockIo,
    kind: Kind,
    data_sectors: Option<u64>,
) -> Result<(Applied, Metadata), ImageError> {
    let mut md = read_metadata(io, kind, data_sectors, Extent::Padded)?;
    let before = md.superblock.clone();
    let applied = apply(&mut md.superblock, &md.replay, &mut md.bitmap)?;
    let blocks = md.bitmap.take_dirty();
    write_bitmap_blocks(io, &md.layout, &md.bitmap, &blocks)?;
    flush(io, "bitmap")?;
    if applied.reinitialize_ring {
        initialize_log(io, &md.layout)?;
        flush(io, "activity log")?;
    }
    if md.superblock != before {
        write_superblock(io, &md.layout, &md.superblock)?;
        flush(io, "superblock")?;
    }
    Ok((applied, md))
}

/// The superblock that [`restore_md`] writes, its place, and the last agreed size if it was too big.
/// Offsets are computed for the granularity and the log of the dump.
pub fn restored(
    io: &dyn BlockIo,
    kind: Kind,
    data_sectors: Option<u64>,
    al_geometry: Option<(u32, u32)>,
    dump: &ParsedDump,
) -> Result<(Superblock, Layout, Option<u64>), ImageError> {
    let mut superblock = dump.superblock.clone();
    if let Some((stripes, size)) = al_geometry {
        (superblock.al_stripes, superblock.al_stripe_size_4k) = (stripes, size);
    }
    let bytes = size(io)?;
    let layout = Layout::compute(kind, bytes, data_sectors, superblock.geometry())?;
    superblock.set_layout(&layout);
    let usable = superblock.tool_usable_sectors(kind, bytes).unwrap_or(0);
    let clamped_from = superblock.clamp_effective_size(usable.min(layout.bitmap_covers_sectors()));
    Ok((superblock, layout, clamped_from))
}

/// Writes a parsed dump (restore-md, §12.5): the complete bitmap, short sections filled with zeros, then
/// the superblock. `al_geometry` overrides stripes and stripe size of the dump. The activity log is
/// initialized, unlike by the reference, so that the result can be attached.
pub fn restore_md(
    io: &dyn BlockIo,
    kind: Kind,
    data_sectors: Option<u64>,
    al_geometry: Option<(u32, u32)>,
    dump: &ParsedDump,
) -> Result<Metadata, ImageError> {
    let (superblock, layout, clamped_from) = restored(io, kind, data_sectors, al_geometry, dump)?;
    let mut bitmap = Bitmap::with_padding(
        superblock.max_peers,
        superblock.effective_size_sectors,
        superblock.bm_bytes_per_bit,
    )?;
    for (slot, runs) in dump.bitmaps.iter().enumerate().take(bitmap.slots()) {
        let mut word = 0;
        for run in runs {
            let end = (bitmap.words(slot).len() as u64).min(run.count.saturating_add(word));
            for w in word..end {
                if run.word != 0 {
                    bitmap.or_words(slot, w as usize, &[run.word]);
                }
            }
            word = end;
        }
    }
    prepare(io, &layout, Fill::Zeros)?;
    let blocks = bitmap.take_dirty();
    write_bitmap_blocks(io, &layout, &bitmap, &blocks)?;
    flush(io, "bitmap")?;
    write_superblock(io, &layout, &superblock)?;
    flush(io, "superblock")?;
    let replay = read_log(io, &superblock, &layout)?;
    Ok(Metadata { superblock, clamped_from, layout, bitmap, replay })
}

/// Format of metadata that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FoundFormat {
    /// v07 (DRBD 0.7), recognised by its magic only.
    V07,
    /// v08 or v09.
    Known(Box<Superblock>),
}

/// Metadata found on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Placement it was found at.
    pub kind: Kind,
    /// Byte position of the superblock.
    pub position: u64,
    /// What it is.
    pub format: FoundFormat,
    /// Why it is not valid there, for example because the device was resized; the magic is there.
    pub invalid: Option<ToolError>,
}

impl Found {
    /// Version of v08/v09 metadata.
    pub fn version(&self) -> Option<Version> {
        match &self.format {
            FoundFormat::V07 => None,
            FoundFormat::Known(sb) => Some(sb.version),
        }
    }
}

/// Looks for metadata of any version at every place it can be: the internal position, v07's fixed
/// internal one, flexible external, and each index that lies on the device.
pub fn find_existing(io: &dyn BlockIo) -> Result<Vec<Found>, ImageError> {
    let bytes = size(io)?;
    let mut places: Vec<(Kind, u64)> = Vec::new();
    if let Some(pos) = md_offset(Kind::Internal, bytes) {
        places.push((Kind::Internal, pos));
    }
    let area = u64::from(INDEXED_SECTORS) * SECTOR_SIZE;
    if let Some(pos) = (bytes / BLOCK * BLOCK).checked_sub(area).filter(|pos| *pos > 0) {
        places.push((Kind::Internal, pos));
    }
    for n in 0..=INDEX_MAX {
        let Some(pos) = md_offset(Kind::Indexed(n), bytes) else { break };
        places.push((if n == 0 { Kind::FlexExternal } else { Kind::Indexed(n) }, pos));
    }
    let mut found: Vec<Found> = Vec::new();
    for (kind, position) in places {
        let block = read_block(io, "superblock", position)?;
        let (kind, format, invalid) = match Superblock::decode(&block) {
            Ok(sb) => {
                let indexed0 = kind == Kind::FlexExternal && sb.md_size_sectors == INDEXED_SECTORS;
                let kind = if indexed0 { Kind::Indexed(0) } else { kind };
                let invalid = sb.check_tool(kind, bytes).err();
                (kind, FoundFormat::Known(Box::new(sb)), invalid)
            }
            // v07 has its magic behind the size in KiB and five counters (§15.3).
            Err(_) if be32(&block, 0x1c) == MAGIC_V07 => (kind, FoundFormat::V07, None),
            Err(_) => continue,
        };
        if found.iter().all(|f| f.position != position) {
            found.push(Found { kind, position, format, invalid });
        }
    }
    Ok(found)
}
