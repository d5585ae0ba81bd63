//! The activity log: transactions, ring placement and recovery (`spec/metadata.md` §7).
//!
//! The log lists the 4 MiB extents that may be receiving writes. Ordering a writer must keep (§7.3):
//! bitmap blocks of an evicted extent are durable before the transaction that evicts it is written, and
//! the transaction is durable before the first write to its new extents is started.

use std::collections::BTreeSet;

pub use crate::al_old::{Format, format_of, replay_old, replay_pmem};

use crate::{AL_EXTENTS_MAX, BLOCK_SIZE, Block, be16, be32, crc32c_raw, put};

/// Extent number meaning "this slot is free".
pub const FREE_EXTENT: u32 = u32::MAX;
/// Most slot changes in one transaction.
pub const UPDATES_PER_TRANSACTION: usize = 64;
/// Context entries in one transaction.
pub const CONTEXT_PER_TRANSACTION: usize = 919;

pub(crate) const MAGIC: u32 = 0x69cb_65a2;
/// Magic of a log that lives in persistent memory (§15.2).
pub const MAGIC_PMEM: u32 = 0x6aa6_67a6;
const TYPE_UPDATE: u16 = 0;
const TYPE_INITIALIZED: u16 = 0xffff;
const SLOT_UNUSED: u16 = 0xffff;
const AT_CRC: usize = 8;
const AT_SLOTS: usize = 36;
const AT_EXTENTS: usize = 164;
const AT_CONTEXT: usize = 420;

/// One slot change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update {
    /// Slot, `0..context_size`.
    pub slot: u16,
    /// The extent now in that slot (`sector >> 13`), or [`FREE_EXTENT`].
    pub extent: u32,
}

/// What a valid block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionKind {
    /// Carries updates and context.
    Update,
    /// Written by create-md and apply-al; empty.
    Initialized,
}

/// One transaction block (§7.1):
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | u32 | magic |
/// | 4 | u32 | number |
/// | 8 | u32 | CRC-32C |
/// | 12 | u16 | type |
/// | 14 | u16 | number of updates |
/// | 16 | u16 | context size |
/// | 18 | u16 | context start |
/// | 36 | 64 × u16 | slots of the updates |
/// | 164 | 64 × u32 | extents of the updates |
/// | 420 | 919 × u32 | context |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// Transaction number; wraps.
    pub number: u32,
    /// Kind of block.
    pub kind: TransactionKind,
    /// At most [`UPDATES_PER_TRANSACTION`] changes.
    pub updates: Vec<Update>,
    /// Total number of slots of the log.
    pub context_size: u16,
    /// Slot of the first context entry.
    pub context_start: u16,
    /// Contents of the slots from `context_start` **before** the updates, at most
    /// [`CONTEXT_PER_TRANSACTION`].
    pub context: Vec<u32>,
}

/// Why a transaction cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AlError {
    /// Too many updates.
    #[error("An activity-log transaction holds {0} updates, but at most 64 fit; split it.")]
    TooManyUpdates(usize),
    /// Too much context.
    #[error("An activity-log transaction holds {0} context entries, but at most 919 fit; split it.")]
    TooMuchContext(usize),
}

impl Transaction {
    /// The block to write, with its checksum.
    pub fn encode(&self) -> Result<Block, AlError> {
        if self.kind == TransactionKind::Initialized {
            return Ok(initialized_block());
        }
        if self.updates.len() > UPDATES_PER_TRANSACTION {
            return Err(AlError::TooManyUpdates(self.updates.len()));
        }
        if self.context.len() > CONTEXT_PER_TRANSACTION {
            return Err(AlError::TooMuchContext(self.context.len()));
        }
        // Everything from the slot array on is 0xff where unused.
        let mut block = [0xff; BLOCK_SIZE];
        block[..AT_SLOTS].fill(0);
        put(&mut block, 0, &MAGIC.to_be_bytes());
        put(&mut block, 4, &self.number.to_be_bytes());
        put(&mut block, 12, &TYPE_UPDATE.to_be_bytes());
        put(&mut block, 14, &(self.updates.len() as u16).to_be_bytes());
        put(&mut block, 16, &self.context_size.to_be_bytes());
        put(&mut block, 18, &self.context_start.to_be_bytes());
        for (k, update) in self.updates.iter().enumerate() {
            put(&mut block, AT_SLOTS + 2 * k, &update.slot.to_be_bytes());
            put(&mut block, AT_EXTENTS + 4 * k, &update.extent.to_be_bytes());
        }
        for (k, extent) in self.context.iter().enumerate() {
            put(&mut block, AT_CONTEXT + 4 * k, &extent.to_be_bytes());
        }
        seal(&mut block);
        Ok(block)
    }

    /// Reads a block; `None` if magic, checksum or type say it is no transaction (torn or foreign).
    /// Entries that recovery ignores (§7.5 step 5) are left out.
    pub fn decode(block: &Block) -> Option<Self> {
        let (number, kind) = identify(block)?;
        let context_size = be16(block, 16);
        let context_start = be16(block, 18);
        let mut transaction =
            Self { number, kind, updates: Vec::new(), context_size, context_start, context: vec![] };
        if kind == TransactionKind::Initialized {
            return Some(transaction);
        }
        let valid = usize::from(be16(block, 14));
        for k in 0..UPDATES_PER_TRANSACTION {
            let slot = be16(block, AT_SLOTS + 2 * k);
            if k < valid || slot != SLOT_UNUSED {
                transaction.updates.push(Update { slot, extent: be32(block, AT_EXTENTS + 4 * k) });
            }
        }
        transaction.context = (0..CONTEXT_PER_TRANSACTION).map(|k| be32(block, AT_CONTEXT + 4 * k)).collect();
        let inside = usize::from(context_size).saturating_sub(usize::from(context_start));
        while transaction.context.len() > inside && transaction.context.last() == Some(&FREE_EXTENT) {
            transaction.context.pop();
        }
        Some(transaction)
    }
}

/// Number and kind of a valid block.
fn identify(block: &Block) -> Option<(u32, TransactionKind)> {
    if be32(block, 0) != MAGIC || be32(block, AT_CRC) != checksum(block) {
        return None;
    }
    // Only 0xffff is empty: recovery treats every other type as an update block.
    let kind = match be16(block, 12) {
        TYPE_INITIALIZED => TransactionKind::Initialized,
        _ => TransactionKind::Update,
    };
    Some((be32(block, 4), kind))
}

fn checksum(block: &Block) -> u32 {
    let crc = crc32c_raw(0, &block[..AT_CRC]);
    let crc = crc32c_raw(crc, &[0; 4]);
    crc32c_raw(crc, &block[AT_CRC + 4..])
}

fn seal(block: &mut Block) {
    let crc = checksum(block);
    put(block, AT_CRC, &crc.to_be_bytes());
}

/// The block that fills the whole ring after create-md and apply-al (§7.4).
pub fn initialized_block() -> Block {
    let mut block = [0; BLOCK_SIZE];
    put(&mut block, 0, &MAGIC.to_be_bytes());
    put(&mut block, 12, &TYPE_INITIALIZED.to_be_bytes());
    seal(&mut block);
    block
}

/// Physical block of the log area that transaction `number` belongs to (§7.2). 0 for an empty geometry.
pub fn ring_block(number: u32, stripes: u32, stripe_size_4k: u32) -> u64 {
    let (stripes, size) = (u64::from(stripes), u64::from(stripe_size_4k));
    let Some(t) = u64::from(number).checked_rem(stripes * size) else { return 0 };
    (t % stripes) * size + t / stripes
}

/// What recovery concluded from the ring (§7.5 step 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All blocks initialized (or only the very first write was torn): nothing to do.
    Clean,
    /// At least one update block: the hot set counts.
    Replayed,
    /// No valid block at all (error 1).
    NoUsableLog,
    /// No update block, and not cleanly initialized either (error 2).
    NoUpdate,
}

/// Result of reading the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// Verdict.
    pub outcome: Outcome,
    /// Extents in the log's slots at its end: to be marked out of sync after a crash.
    pub hot_extents: BTreeSet<u32>,
    /// Blocks with a wrong magic or checksum.
    pub invalid_blocks: u64,
    /// Blocks with updates.
    pub update_blocks: u64,
    /// Number of the newest transaction.
    pub newest_number: Option<u32>,
    /// Entries for slots that cannot exist (≥ 65534), skipped.
    pub bad_slots: u64,
}

/// Reads a whole log area of `stripes × stripe_size_4k` blocks held in memory. Missing blocks count as
/// invalid.
pub fn replay(stripes: u32, stripe_size_4k: u32, area: &[u8]) -> Replay {
    let (blocks, _) = area.as_chunks::<BLOCK_SIZE>();
    let read = |n: u64| {
        let block = usize::try_from(n).ok().and_then(|n| blocks.get(n));
        Ok::<Block, std::convert::Infallible>(*block.unwrap_or(&[0; BLOCK_SIZE]))
    };
    match replay_with(stripes, stripe_size_4k, read) {
        Ok(replay) => replay,
        Err(never) => match never {},
    }
}

/// Like [`replay`], reading physical blocks one at a time through `read`; the update blocks are read a
/// second time, in the order of their numbers.
///
/// The order is that of the transaction numbers by signed difference. The reference walks the ring
/// instead, which is the same except where the counter wraps in a ring whose size is no power of two:
/// there only the numbers are right (§7.2).
pub fn replay_with<E>(
    stripes: u32,
    stripe_size_4k: u32,
    mut read: impl FnMut(u64) -> Result<Block, E>,
) -> Result<Replay, E> {
    let blocks = u64::from(stripes) * u64::from(stripe_size_4k);
    let mut updates: Vec<(u32, u64)> = Vec::new();
    let (mut invalid, mut initialized, mut first_invalid) = (0, 0, false);
    for index in 0..blocks.min(crate::layout::AL_BLOCKS_MAX) {
        let physical = ring_block(index as u32, stripes, stripe_size_4k);
        match identify(&read(physical)?) {
            None => {
                invalid += 1;
                first_invalid |= index == 0;
            }
            Some((_, TransactionKind::Initialized)) => initialized += 1,
            Some((number, TransactionKind::Update)) => updates.push((number, physical)),
        }
    }
    let mut replay = Replay {
        outcome: Outcome::Replayed,
        hot_extents: BTreeSet::new(),
        invalid_blocks: invalid,
        update_blocks: updates.len() as u64,
        newest_number: None,
        bad_slots: 0,
    };
    let Some(&(base, _)) = updates.first() else {
        replay.outcome = match (initialized, invalid) {
            (0, _) => Outcome::NoUsableLog,
            (_, 0) => Outcome::Clean,
            (_, 1) if first_invalid => Outcome::Clean,
            _ => Outcome::NoUpdate,
        };
        return Ok(replay);
    };
    updates.sort_by_key(|(number, _)| number.wrapping_sub(base) as i32);
    replay.newest_number = updates.last().map(|(number, _)| *number);
    let mut slots = vec![FREE_EXTENT; AL_EXTENTS_MAX as usize];
    for (_, physical) in updates {
        let Some(transaction) = Transaction::decode(&read(physical)?) else {
            // Changed between the two reads; treat like a torn block.
            replay.invalid_blocks += 1;
            continue;
        };
        replay.bad_slots += assign(&mut slots, &transaction);
    }
    replay.hot_extents = slots.into_iter().filter(|e| *e != FREE_EXTENT).collect();
    Ok(replay)
}

/// Context first, then updates; returns how many entries named an impossible slot.
fn assign(slots: &mut [u32], transaction: &Transaction) -> u64 {
    let start = usize::from(transaction.context_start);
    let size = usize::from(transaction.context_size);
    let context = transaction.context.iter().enumerate().map(|(k, e)| (start + k, *e));
    let context = context.filter(|(slot, extent)| *extent != FREE_EXTENT || *slot < size);
    let updates = transaction.updates.iter().map(|u| (usize::from(u.slot), u.extent));
    let mut bad = 0;
    for (slot, extent) in context.chain(updates) {
        match slots.get_mut(slot) {
            Some(entry) => *entry = extent,
            None => bad += 1,
        }
    }
    bad
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initialized_block_is_that_of_the_specification() {
        let block = initialized_block();
        let head = [0x69, 0xcb, 0x65, 0xa2, 0, 0, 0, 0, 0x70, 0x9c, 0xc6, 0x51, 0xff, 0xff, 0, 0, 0, 0, 0, 0];
        assert_eq!(block[..20], head);
        assert!(block[20..].iter().all(|b| *b == 0));
    }

    #[test]
    fn transactions_go_round_the_stripes() {
        let order: Vec<u64> = (0..7).map(|t| ring_block(t, 2, 3)).collect();
        assert_eq!(order, [0, 3, 1, 4, 2, 5, 0]);
        assert_eq!(ring_block(9, 0, 0), 0);
    }

    fn update(number: u32, updates: &[(u16, u32)], slots: &[u32]) -> Transaction {
        Transaction {
            number,
            kind: TransactionKind::Update,
            updates: updates.iter().map(|&(slot, extent)| Update { slot, extent }).collect(),
            context_size: slots.len() as u16,
            context_start: 0,
            context: slots.to_vec(),
        }
    }

    #[test]
    fn encode_and_decode_agree() {
        let t = update(u32::MAX, &[(3, 9), (0, FREE_EXTENT)], &[FREE_EXTENT; 67]);
        assert_eq!(Transaction::decode(&t.encode().unwrap()), Some(t));
        let too_many = update(0, &[(0, 0); 65], &[]);
        assert_eq!(too_many.encode(), Err(AlError::TooManyUpdates(65)));
        assert_eq!(update(0, &[], &[0; 920]).encode(), Err(AlError::TooMuchContext(920)));
    }

    fn ring(stripes: u32, size: u32) -> Vec<u8> {
        initialized_block().repeat((stripes * size) as usize)
    }

    fn place(area: &mut [u8], stripes: u32, size: u32, t: &Transaction) {
        let at = ring_block(t.number, stripes, size) as usize * BLOCK_SIZE;
        area[at..at + BLOCK_SIZE].copy_from_slice(&t.encode().unwrap());
    }

    #[test]
    fn outcomes_of_the_table() {
        let mut area = ring(1, 8);
        assert_eq!(replay(1, 8, &area).outcome, Outcome::Clean);
        area[..BLOCK_SIZE].fill(1);
        assert_eq!(replay(1, 8, &area).outcome, Outcome::Clean);
        area[BLOCK_SIZE..2 * BLOCK_SIZE].fill(1);
        assert_eq!(replay(1, 8, &area).outcome, Outcome::NoUpdate);
        assert_eq!(replay(1, 8, &[0; 8 * BLOCK_SIZE]).outcome, Outcome::NoUsableLog);
        place(&mut area, 1, 8, &update(5, &[(0, 7)], &[FREE_EXTENT; 67]));
        let result = replay(1, 8, &area);
        assert_eq!((result.outcome, result.invalid_blocks), (Outcome::Replayed, 2));
        assert_eq!(result.hot_extents, BTreeSet::from([7]));
        assert_eq!(result.newest_number, Some(5));
    }

    #[test]
    fn a_counter_wrap_keeps_the_order_in_an_odd_ring() {
        // 3 × 3 blocks: 2^32 mod 9 is 4, so the position jumps at the wrap.
        let mut area = ring(3, 3);
        let mut slots = [FREE_EXTENT; 67];
        for (k, number) in (0..6).map(|k| (k, (u32::MAX - 2).wrapping_add(k))) {
            place(&mut area, 3, 3, &update(number, &[(0, k)], &slots));
            slots[0] = k;
        }
        let result = replay(3, 3, &area);
        assert_eq!(result.hot_extents, BTreeSet::from([5]));
        assert_eq!(result.newest_number, Some(2));
    }
}
