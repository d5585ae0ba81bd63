//! Activity logs in older or special formats, read only (`spec/metadata.md` §15.1, §15.2).

use std::collections::BTreeSet;

use crate::al::{FREE_EXTENT, MAGIC_PMEM, Outcome, Replay};
use crate::{AL_EXTENTS_MAX, BLOCK_SIZE, Block, Superblock, Version, be32};

const OLD_MAGIC: u32 = 0x8374_0267;
const OLD_SECTORS: u64 = 64;
const OLD_PER_SECTOR: u32 = 61;
const SECTOR: usize = 512;

/// How an activity log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// 4 KiB transactions, DRBD 8.4 and later.
    Current,
    /// 512-byte transactions, DRBD 8.3 and earlier.
    Old,
    /// One extent number per slot in persistent memory.
    PersistentMemory,
}

/// Tells the format from the first two blocks of the log and the superblock (§7, end).
pub fn format_of(head: &[Block; 2], superblock: &Superblock) -> Format {
    let magic = |b: &Block| be32(b, 0);
    if magic(&head[0]) == MAGIC_PMEM {
        Format::PersistentMemory
    } else if superblock.version == Version::V09
        || superblock.v08_in_use
        || !superblock.geometry().is_classic_al()
        || head.iter().any(|b| magic(b) == crate::al::MAGIC)
    {
        Format::Current
    } else {
        Format::Old
    }
}

fn replayed(slots: impl IntoIterator<Item = u32>) -> Replay {
    let hot_extents: BTreeSet<u32> = slots.into_iter().filter(|e| *e != FREE_EXTENT).collect();
    Replay {
        outcome: Outcome::Replayed,
        hot_extents,
        invalid_blocks: 0,
        update_blocks: 0,
        newest_number: None,
        bad_slots: 0,
    }
}

/// Reads a log of DRBD 8.3: sectors of magic, number, 62 × (slot, extent), XOR of the extents. The
/// first entry is the update, the others context. No valid sector is not an error.
pub fn replay_old<E>(al_nr_extents: u32, mut read: impl FnMut(u64) -> Result<Block, E>) -> Result<Replay, E> {
    let ring = u64::from(al_nr_extents.div_ceil(OLD_PER_SECTOR)) + 1;
    let per_block = (BLOCK_SIZE / SECTOR) as u64;
    let mut valid: Vec<(u32, Vec<(u32, u32)>)> = Vec::new();
    let (mut invalid, mut base) = (0, None);
    for sector in 0..ring.min(OLD_SECTORS) {
        let block = read(sector / per_block)?;
        let at = (sector % per_block) as usize * SECTOR;
        let entry = |k: usize| (be32(&block, at + 8 + 8 * k), be32(&block, at + 12 + 8 * k));
        let entries: Vec<(u32, u32)> = (0..=OLD_PER_SECTOR as usize).map(entry).collect();
        let xor = entries.iter().fold(0, |x, (_, extent)| x ^ extent);
        if be32(&block, at) != OLD_MAGIC || be32(&block, at + 8 + 8 * 62) != xor {
            invalid += 1;
            continue;
        }
        let number = be32(&block, at + 4);
        base.get_or_insert(number);
        valid.push((number, entries));
    }
    let base = base.unwrap_or(0);
    valid.sort_by_key(|(number, _)| number.wrapping_sub(base) as i32);
    let mut slots = vec![FREE_EXTENT; AL_EXTENTS_MAX as usize];
    let mut bad_slots = 0;
    for (_, entries) in &valid {
        // Context first, the update (entry 0) last.
        for (slot, extent) in entries[1..].iter().chain(&entries[..1]) {
            match slots.get_mut(*slot as usize) {
                _ if *extent == FREE_EXTENT => {}
                Some(entry) => *entry = *extent,
                None => bad_slots += 1,
            }
        }
    }
    let mut replay = replayed(slots);
    replay.invalid_blocks = invalid;
    replay.update_blocks = valid.len() as u64;
    replay.newest_number = valid.last().map(|(number, _)| *number);
    replay.bad_slots = bad_slots;
    Ok(replay)
}

/// Reads a log in persistent memory: magic, then one extent number per slot.
pub fn replay_pmem<E>(
    al_nr_extents: u32,
    blocks: u64,
    mut read: impl FnMut(u64) -> Result<Block, E>,
) -> Result<Replay, E> {
    let words = BLOCK_SIZE as u64 / 4;
    let end = (u64::from(al_nr_extents.min(AL_EXTENTS_MAX)) + 1).min(blocks * words);
    let mut slots = Vec::new();
    for nr in 0..end.div_ceil(words) {
        let block = read(nr)?;
        let inside = (nr * words).max(1)..((nr + 1) * words).min(end);
        slots.extend(inside.map(|w| be32(&block, (w % words) as usize * 4)));
    }
    Ok(replayed(slots))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::put;

    #[test]
    fn old_transactions_are_replayed_in_order() {
        let mut block = [0; BLOCK_SIZE];
        // Numbers 7, 6: slot 0 gets extent 5, then 9; slot 3 comes from the context.
        for (sector, number, extent) in [(0, 7u32, 9u32), (1, 6, 5)] {
            let at = sector * SECTOR;
            put(&mut block, at, &OLD_MAGIC.to_be_bytes());
            put(&mut block, at + 4, &number.to_be_bytes());
            for k in 0..62 {
                put(&mut block, at + 12 + 8 * k, &FREE_EXTENT.to_be_bytes());
            }
            put(&mut block, at + 12, &extent.to_be_bytes());
            put(&mut block, at + 16, &3u32.to_be_bytes());
            put(&mut block, at + 20, &77u32.to_be_bytes());
            // 60 free entries cancel out in the XOR.
            put(&mut block, at + 504, &(extent ^ 77).to_be_bytes());
        }
        let read = |_| Ok::<_, ()>(block);
        let replay = replay_old(61, read).unwrap();
        assert_eq!(replay.hot_extents, BTreeSet::from([9, 77]));
        assert_eq!((replay.newest_number, replay.invalid_blocks), (Some(7), 0));
        let none = replay_old(257, |_| Ok::<_, ()>([0; BLOCK_SIZE])).unwrap();
        assert!(none.hot_extents.is_empty());
    }

    #[test]
    fn persistent_memory_holds_one_extent_per_slot() {
        let mut block = [0xff; BLOCK_SIZE];
        put(&mut block, 0, &MAGIC_PMEM.to_be_bytes());
        put(&mut block, 8, &4u32.to_be_bytes());
        let replay = replay_pmem(257, 8, |_| Ok::<_, ()>(block)).unwrap();
        assert_eq!(replay.hot_extents, BTreeSet::from([4]));
    }
}
