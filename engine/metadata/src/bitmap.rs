//! The bitmap: which blocks are out of sync towards which peer (`spec/metadata.md` §6).
//!
//! In memory every slot is a plain vector of 64-bit words with a running count of set bits. On disk the
//! 32-bit little-endian words of all slots are interleaved: word `w` of slot `s` is on-disk word
//! `w × slots + s`. [`Bitmap::encode_block`] and [`Bitmap::load_block`] convert one 4 KiB block, and the
//! bitmap remembers which on-disk blocks changed since they were last taken for writing.

use std::ops::Range;

use crate::layout::{bitmap_bits, bitmap_bytes, check_bytes_per_bit};
use crate::{BLOCK_SIZE, Block, LayoutError, PEERS_MAX, SECTOR_SIZE};

const WORDS32_PER_BLOCK: u64 = BLOCK_SIZE as u64 / 4;

/// Why a bitmap cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BitmapError {
    /// Slots or granularity out of range.
    #[error(transparent)]
    Geometry(#[from] LayoutError),
    /// The bitmap does not fit into memory.
    #[error(
        "There is not enough memory for a bitmap of {slots} slots with {bits} bits each; use a larger \
         bitmap block size or fewer slots."
    )]
    OutOfMemory {
        /// Slots asked for.
        slots: u32,
        /// Bits per slot.
        bits: u64,
    },
}

#[derive(Clone, Debug)]
struct Slot {
    words: Vec<u64>,
    weight: u64,
}

/// A bitmap of some slots over one device. 1 = out of sync.
///
/// Methods take a slot number below [`Bitmap::slots`] and **panic** on a larger one: a lost mark would
/// be worse. Superblock checks refuse metadata with such bitmap indexes. Bit and sector ranges are cut
/// to the device.
#[derive(Clone, Debug)]
pub struct Bitmap {
    slots: Vec<Slot>,
    bits: u64,
    sectors: u64,
    bytes_per_bit: u32,
    disk_blocks: u64,
    dirty: Vec<u64>,
    dirty_count: u64,
}

impl Bitmap {
    /// An all-clear bitmap for a device of `sectors`, no block dirty.
    pub fn new(slots: u32, sectors: u64, bytes_per_bit: u32) -> Result<Self, BitmapError> {
        Self::build(slots, bitmap_bits(sectors, bytes_per_bit.max(512)), sectors, bytes_per_bit, {
            bitmap_bytes(sectors, slots, bytes_per_bit.max(512)) / BLOCK_SIZE as u64
        })
    }

    /// Like [`Bitmap::new`], but every bit that the on-disk blocks hold is kept, padding included. The
    /// tools need that: dumps show padding bits and apply-al sets them (§12.3).
    pub fn with_padding(slots: u32, sectors: u64, bytes_per_bit: u32) -> Result<Self, BitmapError> {
        let bytes = bitmap_bytes(sectors, slots, bytes_per_bit.max(512));
        let bits = (bytes / 4).div_ceil(u64::from(slots.max(1))) * 32;
        let sectors = bits.saturating_mul(u64::from(bytes_per_bit) / SECTOR_SIZE);
        Self::build(slots, bits, sectors, bytes_per_bit, bytes / BLOCK_SIZE as u64)
    }

    fn build(
        slots: u32,
        bits: u64,
        sectors: u64,
        bytes_per_bit: u32,
        disk_blocks: u64,
    ) -> Result<Self, BitmapError> {
        if slots == 0 || slots as usize > PEERS_MAX {
            return Err(LayoutError::MaxPeers(slots).into());
        }
        check_bytes_per_bit(bytes_per_bit)?;
        let dirty_words = disk_blocks.div_ceil(64);
        let words = bits.div_ceil(64);
        let slot_vec = (0..slots)
            .map(|_| zeroed(words).map(|words| Slot { words, weight: 0 }))
            .collect::<Option<Vec<_>>>();
        match (slot_vec, zeroed(dirty_words)) {
            (Some(slots), Some(dirty)) => {
                Ok(Self { slots, bits, sectors, bytes_per_bit, disk_blocks, dirty, dirty_count: 0 })
            }
            _ => Err(BitmapError::OutOfMemory { slots, bits }),
        }
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Bits per slot; the last one may cover a partial block.
    pub fn bits(&self) -> u64 {
        self.bits
    }

    /// Sectors of the device.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Data bytes per bit.
    pub fn bytes_per_bit(&self) -> u32 {
        self.bytes_per_bit
    }

    /// Sectors per bit.
    pub fn sectors_per_bit(&self) -> u64 {
        u64::from(self.bytes_per_bit) / SECTOR_SIZE
    }

    /// Every bit that overlaps the sectors: what *out of sync* marks.
    pub fn bits_touching(&self, sectors: Range<u64>) -> Range<u64> {
        if sectors.is_empty() {
            return 0..0;
        }
        let per_bit = self.sectors_per_bit();
        self.cut(sectors.start / per_bit..sectors.end.div_ceil(per_bit))
    }

    /// Every bit whose block lies completely inside the sectors, the last partial block counting as
    /// complete when the range reaches the device's end: what *in sync* clears.
    pub fn bits_inside(&self, sectors: Range<u64>) -> Range<u64> {
        let per_bit = self.sectors_per_bit();
        let end = if sectors.end >= self.sectors { self.bits } else { sectors.end / per_bit };
        self.cut(sectors.start.div_ceil(per_bit)..end)
    }

    /// The sectors a range of bits covers, cut to the device.
    pub fn sectors_of_bits(&self, bits: Range<u64>) -> Range<u64> {
        let per_bit = self.sectors_per_bit();
        let at = |bit: u64| bit.saturating_mul(per_bit).min(self.sectors);
        at(bits.start)..at(bits.end)
    }

    fn cut(&self, range: Range<u64>) -> Range<u64> {
        let end = range.end.min(self.bits);
        range.start.min(end)..end
    }

    /// Marks sectors out of sync; returns the number of bits that changed.
    pub fn set_out_of_sync(&mut self, slot: usize, sectors: Range<u64>) -> u64 {
        let bits = self.bits_touching(sectors);
        self.set_range(slot, bits)
    }

    /// Marks sectors in sync; returns the number of bits that changed.
    pub fn set_in_sync(&mut self, slot: usize, sectors: Range<u64>) -> u64 {
        let bits = self.bits_inside(sectors);
        self.clear_range(slot, bits)
    }

    /// Sets bits; returns how many were clear before.
    pub fn set_range(&mut self, slot: usize, bits: Range<u64>) -> u64 {
        self.modify(slot, bits, |word, mask| word | mask)
    }

    /// Clears bits; returns how many were set before.
    pub fn clear_range(&mut self, slot: usize, bits: Range<u64>) -> u64 {
        self.modify(slot, bits, |word, mask| word & !mask)
    }

    /// Sets every bit of a slot; returns how many were clear before.
    pub fn set_all(&mut self, slot: usize) -> u64 {
        self.set_range(slot, 0..self.bits)
    }

    /// Clears every bit of a slot; returns how many were set before.
    pub fn clear_all(&mut self, slot: usize) -> u64 {
        self.clear_range(slot, 0..self.bits)
    }

    /// Whether a bit is set; bits beyond the end are not.
    pub fn test(&self, slot: usize, bit: u64) -> bool {
        let words = &self.slots[slot].words;
        words.get((bit / 64) as usize).is_some_and(|w| w >> (bit % 64) & 1 == 1)
    }

    /// Number of set bits in a range.
    pub fn count(&self, slot: usize, bits: Range<u64>) -> u64 {
        let words = &self.slots[slot].words;
        pieces(self.cut(bits)).map(|(w, mask)| u64::from((words[w] & mask).count_ones())).sum()
    }

    /// Number of set bits of a slot, kept up to date.
    pub fn weight(&self, slot: usize) -> u64 {
        self.slots[slot].weight
    }

    /// Out-of-sync sectors of a slot, as status shows them: whole blocks.
    pub fn out_of_sync_sectors(&self, slot: usize) -> u64 {
        self.weight(slot).saturating_mul(self.sectors_per_bit())
    }

    /// First set bit at or after `from`.
    pub fn next_set(&self, slot: usize, from: u64) -> Option<u64> {
        self.find(slot, from, |word| word)
    }

    /// First clear bit at or after `from`, below [`Bitmap::bits`].
    pub fn next_clear(&self, slot: usize, from: u64) -> Option<u64> {
        self.find(slot, from, |word| !word)
    }

    fn find(&self, slot: usize, from: u64, view: impl Fn(u64) -> u64) -> Option<u64> {
        if from >= self.bits {
            return None;
        }
        let words = &self.slots[slot].words;
        let first = (from / 64) as usize;
        let mut mask = u64::MAX << (from % 64);
        for (w, word) in words.iter().enumerate().skip(first) {
            let hit = view(*word) & mask;
            if hit != 0 {
                let bit = w as u64 * 64 + u64::from(hit.trailing_zeros());
                return (bit < self.bits).then_some(bit);
            }
            mask = u64::MAX;
        }
        None
    }

    /// The words of a slot, 64 bits each, lowest block number in the least significant bit. Bits beyond
    /// the end are zero.
    pub fn words(&self, slot: usize) -> &[u64] {
        &self.slots[slot].words
    }

    /// Ors words received from a peer into a slot, starting at word `first`; words beyond the end are
    /// ignored. Returns the number of bits newly set.
    pub fn or_words(&mut self, slot: usize, first: usize, words: &[u64]) -> u64 {
        let mut changed = 0;
        for (k, word) in words.iter().enumerate() {
            let Some(w) = first.checked_add(k) else { break };
            if w >= self.slots[slot].words.len() {
                break;
            }
            let new = self.slots[slot].words[w] | (word & self.valid_mask(w));
            changed += self.store(slot, w, new);
        }
        changed
    }

    /// Makes slot `to` equal to slot `from`; returns the number of bits that changed.
    pub fn copy_slot(&mut self, from: usize, to: usize) -> u64 {
        (0..self.slots[from].words.len()).map(|w| self.store(to, w, self.slots[from].words[w])).sum()
    }

    /// Changes the device size. Every bit of the new area becomes `fill`, a previously partial last
    /// block included when `fill` is set, because part of it is new. Blocks whose contents changed are
    /// dirty; if the bitmap moves on disk the caller marks all blocks ([`Bitmap::mark_all_dirty`]).
    pub fn resize(&mut self, sectors: u64, fill: bool) -> Result<(), BitmapError> {
        let slots = self.slots.len() as u32;
        let bits = bitmap_bits(sectors, self.bytes_per_bit);
        let disk_blocks = bitmap_bytes(sectors, slots, self.bytes_per_bit) / BLOCK_SIZE as u64;
        let first_new = if fill { self.sectors / self.sectors_per_bit() } else { self.bits }.min(self.bits);
        for slot in 0..self.slots.len() {
            if bits < self.bits {
                self.clear_range(slot, bits..self.bits);
            }
        }
        let oom = BitmapError::OutOfMemory { slots, bits };
        let words = usize::try_from(bits.div_ceil(64)).map_err(|_| oom.clone())?;
        let dirty_words = usize::try_from(disk_blocks.div_ceil(64)).map_err(|_| oom.clone())?;
        // Reserve everything before changing anything.
        for slot in &mut self.slots {
            let more = words.saturating_sub(slot.words.len());
            slot.words.try_reserve_exact(more).map_err(|_| oom.clone())?;
        }
        let more = dirty_words.saturating_sub(self.dirty.len());
        self.dirty.try_reserve_exact(more).map_err(|_| oom)?;

        for slot in &mut self.slots {
            slot.words.resize(words, 0);
        }
        let grown_from = (bits > self.bits || sectors > self.sectors).then_some(first_new);
        (self.bits, self.sectors, self.disk_blocks) = (bits, sectors, disk_blocks);
        self.dirty.resize(dirty_words, 0);
        if let (Some(last), rest @ 1..) = (self.dirty.last_mut(), disk_blocks % 64) {
            *last &= (1 << rest) - 1;
        }
        self.dirty_count = self.dirty.iter().map(|w| u64::from(w.count_ones())).sum();
        if let (Some(from), true) = (grown_from, fill) {
            for slot in 0..self.slots.len() {
                self.set_range(slot, from..bits);
            }
        }
        Ok(())
    }

    fn modify(&mut self, slot: usize, bits: Range<u64>, op: impl Fn(u64, u64) -> u64) -> u64 {
        let mut changed = 0;
        for (w, mask) in pieces(self.cut(bits)) {
            let new = op(self.slots[slot].words[w], mask);
            changed += self.store(slot, w, new);
        }
        changed
    }

    /// Replaces one word; keeps weight and dirty blocks; returns the number of changed bits.
    fn store(&mut self, slot: usize, w: usize, new: u64) -> u64 {
        let target = &mut self.slots[slot];
        let old = std::mem::replace(&mut target.words[w], new);
        let diff = old ^ new;
        if diff == 0 {
            return 0;
        }
        target.weight = target.weight - u64::from(old.count_ones()) + u64::from(new.count_ones());
        let slots = self.slots.len() as u64;
        for (half, part) in [diff as u32, (diff >> 32) as u32].into_iter().enumerate() {
            if part != 0 {
                let word = (2 * w as u64 + half as u64) * slots + slot as u64;
                self.mark_dirty(word / WORDS32_PER_BLOCK);
            }
        }
        u64::from(diff.count_ones())
    }

    /// Mask of the meaningful bits of word `w`.
    fn valid_mask(&self, w: usize) -> u64 {
        match self.bits.saturating_sub(w as u64 * 64) {
            0 => 0,
            n @ 1..64 => (1 << n) - 1,
            _ => u64::MAX,
        }
    }

    // ---- on-disk form ----

    /// 4 KiB blocks the bitmap occupies on disk.
    pub fn disk_blocks(&self) -> u64 {
        self.disk_blocks
    }

    /// On-disk blocks that hold the given bits of **any** slot. Cut to the device.
    pub fn blocks_of_bits(&self, bits: Range<u64>) -> Range<u64> {
        let bits = self.cut(bits);
        if bits.is_empty() {
            return 0..0;
        }
        let slots = self.slots.len() as u64;
        let first = bits.start / 32 * slots;
        let last = (bits.end - 1) / 32 * slots + slots - 1;
        let end = (last / WORDS32_PER_BLOCK + 1).min(self.disk_blocks);
        (first / WORDS32_PER_BLOCK).min(end)..end
    }

    /// Writes on-disk block `nr` into `out`; zero beyond the end.
    pub fn encode_block(&self, nr: u64, out: &mut Block) {
        let (words, _) = out.as_chunks_mut::<4>();
        self.walk_block(nr, |k, position| {
            words[k] = match position {
                Some((slot, w, half)) => {
                    let word = self.slots[slot].words[w];
                    (if half == 0 { word as u32 } else { (word >> 32) as u32 }).to_le_bytes()
                }
                None => [0; 4],
            };
        });
    }

    /// Takes over on-disk block `nr`, as read; padding is ignored, the block is not dirty by that.
    /// Returns the number of bits that changed.
    pub fn load_block(&mut self, nr: u64, block: &Block) -> u64 {
        let (words, _) = block.as_chunks::<4>();
        let mut updates: Vec<(usize, usize, u32, u32)> = Vec::new();
        self.walk_block(nr, |k, position| {
            let Some((slot, w, half)) = position else { return };
            let new = u32::from_le_bytes(words[k]);
            let old = (self.slots[slot].words[w] >> (32 * half)) as u32;
            let new = new & (self.valid_mask(w) >> (32 * half)) as u32;
            if new != old {
                updates.push((slot, w, half, new));
            }
        });
        let mut changed = 0;
        for (slot, w, half, new) in updates {
            let slot = &mut self.slots[slot];
            let old = (slot.words[w] >> (32 * half)) as u32;
            slot.words[w] ^= u64::from(old ^ new) << (32 * half);
            slot.weight = slot.weight - u64::from(old.count_ones()) + u64::from(new.count_ones());
            changed += u64::from((old ^ new).count_ones());
        }
        changed
    }

    /// Calls `f` for each 32-bit word of a block with (slot, word, half), `None` for padding.
    fn walk_block(&self, nr: u64, mut f: impl FnMut(usize, Option<(usize, usize, u32)>)) {
        let slots = self.slots.len() as u64;
        let first = nr.saturating_mul(WORDS32_PER_BLOCK);
        let words32 = self.bits.div_ceil(64) * 2;
        let (mut w, mut slot) = (first / slots, first % slots);
        for k in 0..WORDS32_PER_BLOCK as usize {
            let inside = w < words32;
            f(k, inside.then_some((slot as usize, (w / 2) as usize, (w % 2) as u32)));
            slot += 1;
            if slot == slots {
                (slot, w) = (0, w + 1);
            }
        }
    }

    /// Marks a block as to be written, for example again after a failed write.
    pub fn mark_dirty(&mut self, block: u64) {
        if block >= self.disk_blocks {
            return;
        }
        let word = &mut self.dirty[(block / 64) as usize];
        let bit = 1 << (block % 64);
        self.dirty_count += u64::from(*word & bit == 0);
        *word |= bit;
    }

    /// Marks all blocks as to be written.
    pub fn mark_all_dirty(&mut self) {
        for block in 0..self.disk_blocks {
            self.mark_dirty(block);
        }
    }

    /// Number of blocks that changed and were not taken yet.
    pub fn dirty_count(&self) -> u64 {
        self.dirty_count
    }

    /// Whether a block is to be written.
    pub fn is_dirty(&self, block: u64) -> bool {
        self.dirty.get((block / 64) as usize).is_some_and(|w| w >> (block % 64) & 1 == 1)
    }

    /// Takes all dirty blocks in ascending order; they count as clean from now on. The caller writes
    /// them, and calls [`Bitmap::mark_dirty`] for those that failed.
    pub fn take_dirty(&mut self) -> Vec<u64> {
        self.take_dirty_in(0..self.disk_blocks)
    }

    /// Like [`Bitmap::take_dirty`] for a range of blocks, see [`Bitmap::blocks_of_bits`].
    pub fn take_dirty_in(&mut self, blocks: Range<u64>) -> Vec<u64> {
        let mut taken = Vec::new();
        if self.dirty_count == 0 {
            return taken;
        }
        for (w, mask) in pieces(blocks.start.min(self.disk_blocks)..blocks.end.min(self.disk_blocks)) {
            let mut hit = self.dirty[w] & mask;
            self.dirty[w] &= !mask;
            self.dirty_count -= u64::from(hit.count_ones());
            while hit != 0 {
                taken.push(w as u64 * 64 + u64::from(hit.trailing_zeros()));
                hit &= hit - 1;
            }
        }
        taken
    }
}

/// Splits a bit range into (word, mask) pieces.
fn pieces(bits: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let words = if bits.start < bits.end { bits.start / 64..bits.end.div_ceil(64) } else { 0..0 };
    words.map(move |w| {
        let low = u64::MAX << bits.start.saturating_sub(w * 64).min(63);
        let high = match bits.end - w * 64 {
            n @ 0..64 => (1 << n) - 1,
            _ => u64::MAX,
        };
        (w as usize, low & high)
    })
}

/// Zeroed words whose pages are only backed once written; `None` if the memory is not to be had.
fn zeroed(words: u64) -> Option<Vec<u64>> {
    let words = usize::try_from(words).ok()?;
    // A trial reservation turns the abort of a failing allocation into a value.
    Vec::<u64>::new().try_reserve_exact(words).ok()?;
    Some(vec![0; words])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(slots: u32, bits: u64) -> Bitmap {
        Bitmap::new(slots, bits * 8, 4096).unwrap()
    }

    #[test]
    fn ranges_keep_weight_and_report_changes() {
        let mut b = bitmap(3, 1000);
        assert_eq!(b.set_range(1, 60..70), 10);
        assert_eq!(b.set_range(1, 0..65), 60);
        assert_eq!(b.weight(1), 70);
        assert_eq!((b.weight(0), b.weight(2)), (0, 0));
        assert_eq!(b.clear_range(1, 10..20), 10);
        assert_eq!(b.count(1, 5..25), 10);
        assert_eq!(b.next_clear(1, 0), Some(10));
        assert_eq!(b.next_set(1, 10), Some(20));
        assert_eq!(b.next_set(1, 70), None);
        assert_eq!(b.set_range(1, 990..5000), 10);
        assert_eq!(b.set_all(2), 1000);
        assert_eq!(b.next_clear(2, 0), None);
        assert_eq!(b.copy_slot(1, 2), 1000 - b.weight(1));
        assert_eq!(b.words(1), b.words(2));
        let (start, end) = (7, 3);
        assert_eq!(b.clear_range(1, start..end), 0);
    }

    #[test]
    fn rounding_follows_the_direction() {
        let mut b = Bitmap::new(1, 8 * 10 + 3, 4096).unwrap();
        assert_eq!(b.bits(), 11);
        assert_eq!(b.set_out_of_sync(0, 7..9), 2);
        assert_eq!(b.set_in_sync(0, 7..9), 0);
        assert_eq!(b.set_in_sync(0, 0..15), 1);
        assert!(b.test(0, 1));
        assert_eq!(b.set_out_of_sync(0, 79..80), 1);
        assert_eq!(b.set_out_of_sync(0, 80..83), 1);
        assert_eq!(b.set_in_sync(0, 80..82), 0);
        assert_eq!(b.set_in_sync(0, 80..83), 1);
        assert_eq!(b.set_out_of_sync(0, 5..5), 0);
        assert_eq!(b.sectors_of_bits(10..11), 80..83);
    }

    #[test]
    fn on_disk_position_is_that_of_the_formula() {
        for slots in [1u32, 2, 3, 7, 31, 32] {
            let mut b = bitmap(slots, 5000);
            for (n, slot) in [(0u64, 0u64), (33, 1), (4097, 2), (4999, 6), (64, 31), (2112, 0), (1056, 31)] {
                let slot = slot.min(u64::from(slots) - 1);
                b.take_dirty();
                b.set_range(slot as usize, n..n + 1);
                let byte = ((n >> 5) * u64::from(slots) + slot) * 4 + ((n & 31) >> 3);
                assert_eq!(b.take_dirty(), [byte / 4096]);
                assert!(b.blocks_of_bits(n..n + 1).contains(&(byte / 4096)));
                let mut block = [0; BLOCK_SIZE];
                b.encode_block(byte / 4096, &mut block);
                assert_eq!(block[(byte % 4096) as usize] >> (n & 7) & 1, 1);
                b.clear_range(slot as usize, n..n + 1);
            }
        }
    }

    #[test]
    fn padding_is_ignored_on_load() {
        let mut b = bitmap(2, 100);
        assert_eq!(b.load_block(0, &[0xff; BLOCK_SIZE]), 200);
        assert_eq!((b.weight(0), b.weight(1), b.dirty_count()), (100, 100, 0));
        let mut out = [0xaa; BLOCK_SIZE];
        b.encode_block(0, &mut out);
        assert_eq!(out.iter().map(|b| b.count_ones()).sum::<u32>(), 200);
        let mut padded = Bitmap::with_padding(2, 100 * 8, 4096).unwrap();
        assert_eq!(padded.load_block(0, &[0xff; BLOCK_SIZE]), 32768);
        b.encode_block(77, &mut out);
        assert!(out.iter().all(|b| *b == 0));
    }

    #[test]
    fn resize_fills_the_new_area() {
        let mut b = Bitmap::new(2, 83, 4096).unwrap();
        b.set_range(0, 3..4);
        b.resize(800, true).unwrap();
        // Bit 10 was partial: its block has new sectors.
        assert_eq!((b.bits(), b.weight(0), b.weight(1)), (100, 91, 90));
        b.resize(83, false).unwrap();
        assert_eq!((b.bits(), b.weight(0), b.weight(1)), (11, 2, 1));
        b.resize(8000, false).unwrap();
        assert_eq!((b.bits(), b.weight(0), b.next_set(1, 11)), (1000, 2, None));
        b.resize(0, false).unwrap();
        assert_eq!((b.bits(), b.weight(0), b.dirty_count()), (0, 0, 0));
    }

    #[test]
    fn dirty_blocks_can_be_taken_by_range() {
        let mut b = bitmap(4, 100_000);
        b.set_range(0, 0..100_000);
        let all = b.disk_blocks();
        assert_eq!(b.dirty_count(), (100_000u64.div_ceil(32) * 4).div_ceil(1024));
        let extent = b.blocks_of_bits(1024..2048);
        assert_eq!(b.take_dirty_in(extent.clone()), extent.collect::<Vec<_>>());
        b.mark_dirty(0);
        b.mark_dirty(all);
        assert_eq!(b.take_dirty().first(), Some(&0));
        assert_eq!(b.dirty_count(), 0);
        b.mark_all_dirty();
        assert_eq!(b.take_dirty().len() as u64, all);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert!(matches!(Bitmap::new(0, 8, 4096), Err(BitmapError::Geometry(_))));
        assert!(matches!(Bitmap::new(33, 8, 4096), Err(BitmapError::Geometry(_))));
        assert!(matches!(Bitmap::new(1, 8, 0), Err(BitmapError::Geometry(_))));
        let huge = Bitmap::new(32, u64::MAX, 4096);
        assert!(matches!(huge, Err(BitmapError::OutOfMemory { .. })));
    }
}
