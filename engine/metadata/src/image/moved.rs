//! Internal metadata of a device that grew: found where the device ended, moved to where it ends now
//! (`spec/metadata.md` §10.2). At every moment either the old metadata is valid for the old size or the
//! new one for the new size, and a bitmap that is not complete yet is never taken for one.

use super::{
    BLOCK, BlockIo, CHUNK_BLOCKS, Extent, Fill, ImageError, Metadata, fill, flush, read, read_bitmap,
    read_block, read_log, size, write, write_superblock,
};
use crate::{DeviceFlags, Kind, Layout, PeerFlags, PeerSlot, SECTOR_SIZE, Superblock, Version, md_offset};

/// Like [`super::read_metadata`] for internal metadata that lies where the device ended when it had
/// `last_bytes` bytes. Nothing of it is judged by the present size.
pub fn read_moved(io: &dyn BlockIo, last_bytes: u64, extent: Extent) -> Result<Metadata, ImageError> {
    let (mut superblock, layout) = old(io, last_bytes)?;
    let usable = superblock.tool_usable_sectors(Kind::Internal, last_bytes).unwrap_or(0);
    let clamped_from = superblock.clamp_effective_size(usable);
    let bitmap = read_bitmap(io, &superblock, &layout, extent)?;
    let replay = read_log(io, &superblock, &layout)?;
    Ok(Metadata { superblock, clamped_from, layout, bitmap, replay })
}

fn old(io: &dyn BlockIo, last_bytes: u64) -> Result<(Superblock, Layout), ImageError> {
    let pos = md_offset(Kind::Internal, last_bytes).ok_or(ImageError::NoRoom(last_bytes))?;
    let superblock = Superblock::decode(&read_block(io, "superblock", pos)?)?;
    superblock.check_tool(Kind::Internal, last_bytes)?;
    let layout = Layout::of_superblock(Kind::Internal, last_bytes, None, &superblock)?;
    Ok((superblock, layout))
}

/// Moves internal metadata to the end of a device that grew from `last_bytes` (check-resize): activity
/// log and bitmap are copied, the rest of the new bitmap area is filled, then the new superblock is
/// written and flushed before the old area is wiped. Returns the new superblock and layout.
///
/// Where the areas overlap, copying destroys the old metadata. A superblock that asks for a full sync is
/// then at the new place first.
pub fn move_internal(
    io: &dyn BlockIo,
    last_bytes: u64,
    rest: Fill,
) -> Result<(Superblock, Layout), ImageError> {
    let bytes = size(io)?;
    let (mut superblock, old) = old(io, last_bytes)?;
    let new = Layout::compute(Kind::Internal, bytes, None, superblock.geometry())?;
    if bytes < last_bytes || superblock.effective_size_sectors > new.usable_sectors {
        return Err(ImageError::NoRoom(bytes));
    }
    superblock.set_layout(&new);
    if new.md_offset != old.md_offset && new.area_start() < old.area_end() {
        write_superblock(io, &new, &full_sync(&superblock))?;
        flush(io, "superblock")?;
    }
    // The new log never reaches the old bitmap, so it goes first.
    copy(io, "activity log", old.al_pos(), new.al_pos(), old.al_blocks() * BLOCK)?;
    let old_bytes = old.bm_area_sectors * SECTOR_SIZE;
    copy(io, "bitmap", old.bitmap_pos(), new.bitmap_pos(), old_bytes)?;
    fill(io, "bitmap", new.bitmap_pos() + old_bytes, new.al_pos(), rest)?;
    flush(io, "bitmap")?;
    write_superblock(io, &new, &superblock)?;
    flush(io, "superblock")?;
    if new.md_offset != old.md_offset {
        let end = old.area_end().min(new.area_start());
        fill(io, "old metadata", old.area_start(), end, Fill::Zeros)?;
        flush(io, "old metadata")?;
    }
    Ok((superblock, new))
}

/// The superblock for the time in which neither place holds a whole bitmap.
fn full_sync(superblock: &Superblock) -> Superblock {
    let mut marked = superblock.clone();
    match marked.version {
        Version::V08 => {
            marked.flags.set(DeviceFlags::FULL_SYNC, true);
        }
        Version::V09 => {
            for peer in &mut marked.peers {
                if peer.slot().is_none() {
                    // The slots nobody uses do not count since day 0 any more.
                    *peer = PeerSlot { bitmap_uuid: 0, bitmap_dagtag: 0, ..*peer };
                }
                peer.flags.set(PeerFlags::FULL_SYNC, true);
            }
        }
    }
    // All bits cover what the activity log would add, and a log that is half copied must not stop apply-al.
    marked.flags.set(DeviceFlags::PRIMARY_IND, false);
    marked
}

/// Copies between areas that may overlap, in the direction that keeps the source intact.
fn copy(io: &dyn BlockIo, what: &'static str, from: u64, to: u64, bytes: u64) -> Result<(), ImageError> {
    if from == to {
        return Ok(());
    }
    let step = CHUNK_BLOCKS * BLOCK;
    let pieces = bytes.div_ceil(step);
    let mut buf = vec![0; step as usize];
    for n in 0..pieces {
        let at = if to > from { pieces - 1 - n } else { n } * step;
        let part = &mut buf[..step.min(bytes - at) as usize];
        read(io, what, from + at, part)?;
        write(io, what, to + at, part)?;
    }
    Ok(())
}
