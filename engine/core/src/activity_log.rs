//! The activity log in memory: which 4 MiB extents may be receiving writes, and the next journal
//! transaction (`spec/metadata.md` §7, `spec/state-machine.md` §16.1).
//!
//! A write may only be submitted while its extents are *hot*: named by a committed transaction. Extents stay
//! hot after the last write left them, until their slot is needed for another one. This type knows nothing
//! of disks: it says which extents a transaction evicts (their bitmap blocks go to disk first) and what the
//! journal block contains.

use palisade_metadata::al::{Transaction, TransactionKind, Update};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Extents changed by one transaction at most (`spec/metadata.md` §1).
const UPDATES_MAX: usize = 64;
/// Context entries in one transaction (`spec/metadata.md` §1).
const CONTEXT_MAX: usize = 919;
/// A free slot.
const FREE: u32 = u32::MAX;

#[derive(Debug)]
struct Extent {
    slot: u16,
    /// Writes that hold the extent.
    refs: u32,
    /// Transaction that makes it hot; it is hot once `committed >= ready_at`.
    ready_at: u64,
    /// Position in the least-recently-used order; only meaningful while `refs == 0`.
    stamp: u64,
}

/// What became of a request for extents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Grant {
    /// All hot: go on.
    Hot,
    /// References are taken; go on when this transaction is committed.
    After(u64),
    /// No free slot: nothing was taken, try again when references were put back.
    Full,
}

/// What a transaction writes.
#[derive(Debug)]
pub struct Prepared {
    /// Extents whose slot is reused: changed bitmap blocks of these go to disk before the block.
    pub evicted: Vec<u32>,
    /// The journal block.
    pub block: Transaction,
}

/// The activity log of one volume.
#[derive(Debug)]
pub struct ActivityLog {
    slots: Vec<u32>,
    extents: BTreeMap<u32, Extent>,
    /// Unreferenced extents, oldest first.
    idle: BTreeMap<u64, u32>,
    free: Vec<u16>,
    /// Changes for the next transaction: slot, new extent, old extent.
    pending: Vec<(u16, u32, u32)>,
    next_stamp: u64,
    /// Sequence of the transaction being collected.
    building: u64,
    committed: u64,
    in_flight: Option<u64>,
    number: u32,
    context_cursor: usize,
}

impl ActivityLog {
    /// An empty log with so many slots.
    #[must_use]
    pub fn new(slots: u16) -> Self {
        Self {
            slots: vec![FREE; slots as usize],
            extents: BTreeMap::new(),
            idle: BTreeMap::new(),
            free: (0..slots).rev().collect(),
            pending: Vec::new(),
            next_stamp: 0,
            building: 1,
            committed: 0,
            in_flight: None,
            number: 0,
            context_cursor: 0,
        }
    }

    /// Asks for a range of extents. Takes a reference on each, or (when `Full`) on none.
    pub fn get(&mut self, range: RangeInclusive<u32>) -> Grant {
        let missing = range.clone().filter(|e| !self.extents.contains_key(e)).count();
        // Extents of the range itself must not be evicted to make room for their neighbours.
        let own_idle = range.clone().filter(|e| self.extents.get(e).is_some_and(|x| x.refs == 0)).count();
        if missing > self.free.len() + self.idle.len() - own_idle {
            return Grant::Full;
        }
        let mut after = 0;
        for e in range.clone() {
            if let Some(x) = self.extents.get_mut(&e) {
                if x.refs == 0 {
                    self.idle.remove(&x.stamp);
                }
                x.refs += 1;
                after = after.max(x.ready_at);
            }
        }
        for e in range {
            if self.extents.contains_key(&e) {
                continue;
            }
            let (slot, old) = match self.free.pop() {
                Some(slot) => (slot, FREE),
                None => {
                    let Some((_, old)) = self.idle.pop_first() else { return Grant::Full };
                    let Some(x) = self.extents.remove(&old) else { return Grant::Full };
                    (x.slot, old)
                }
            };
            if self.pending.len().is_multiple_of(UPDATES_MAX) && !self.pending.is_empty() {
                self.building += 1;
            }
            self.pending.push((slot, e, old));
            after = after.max(self.building);
            self.extents.insert(e, Extent { slot, refs: 1, ready_at: self.building, stamp: 0 });
        }
        if after > self.committed { Grant::After(after) } else { Grant::Hot }
    }

    /// Puts back the references of a range taken by [`Self::get`].
    pub fn put(&mut self, range: RangeInclusive<u32>) {
        for e in range {
            if let Some(x) = self.extents.get_mut(&e) {
                debug_assert!(x.refs > 0, "activity log reference put back twice");
                x.refs = x.refs.saturating_sub(1);
                // An extent whose transaction is not even written must not be evicted before it is.
                if x.refs == 0 {
                    x.stamp = self.next_stamp;
                    self.idle.insert(self.next_stamp, e);
                    self.next_stamp += 1;
                }
            }
        }
    }

    /// The next transaction, when there are changes and none is on its way.
    pub fn prepare(&mut self) -> Option<Prepared> {
        if self.in_flight.is_some() || self.pending.is_empty() {
            return None;
        }
        let n = self.pending.len().min(UPDATES_MAX);
        let updates: Vec<(u16, u32, u32)> = self.pending.drain(..n).collect();
        let seq = self.committed + 1;
        if self.pending.is_empty() {
            self.building = seq + 1;
        }
        let start = self.context_cursor;
        let end = (start + CONTEXT_MAX).min(self.slots.len());
        let context = self.slots.get(start..end).unwrap_or_default().to_vec();
        self.context_cursor = if end >= self.slots.len() { 0 } else { end };
        let block = Transaction {
            number: self.number,
            kind: TransactionKind::Update,
            updates: updates
                .iter()
                .map(|(slot, extent, _)| Update { slot: *slot, extent: *extent })
                .collect(),
            context_size: u16::try_from(self.slots.len()).unwrap_or(u16::MAX),
            context_start: u16::try_from(start).unwrap_or(u16::MAX),
            context,
        };
        for (slot, extent, _) in &updates {
            if let Some(s) = self.slots.get_mut(*slot as usize) {
                *s = *extent;
            }
        }
        self.in_flight = Some(seq);
        Some(Prepared { evicted: updates.iter().map(|u| u.2).filter(|e| *e != FREE).collect(), block })
    }

    /// The journal block is on stable storage. Returns the sequence up to which waiters may go on.
    pub fn commit(&mut self) -> u64 {
        if let Some(seq) = self.in_flight.take() {
            self.committed = seq;
            self.number = self.number.wrapping_add(1);
        }
        self.committed
    }

    /// Whether some write holds an extent.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        self.extents.len() > self.idle.len()
    }

    /// Whether writes hold more than half of the slots.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        (self.extents.len() - self.idle.len()) * 2 > self.slots.len()
    }

    /// Whether some write holds the extent.
    #[must_use]
    pub fn in_use(&self, extent: u32) -> bool {
        self.extents.get(&extent).is_some_and(|x| x.refs > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cold_extent_waits_for_its_transaction_and_neighbours_share_it() {
        let mut al = ActivityLog::new(67);
        assert_eq!(al.get(0..=0), Grant::After(1));
        assert_eq!(al.get(1..=1), Grant::After(1));
        let p = al.prepare().unwrap();
        assert_eq!(p.block.updates.len(), 2);
        assert!(al.prepare().is_none());
        // Asked for while the first is on its way: the next transaction.
        assert_eq!(al.get(2..=2), Grant::After(2));
        assert_eq!(al.get(0..=0), Grant::After(1));
        al.commit();
        assert_eq!(al.get(0..=1), Grant::Hot);
        assert_eq!(al.prepare().unwrap().block.updates, vec![Update { slot: 2, extent: 2 }]);
    }

    #[test]
    fn more_than_64_changes_take_two_transactions() {
        let mut al = ActivityLog::new(100);
        for e in 0..64 {
            assert_eq!(al.get(e..=e), Grant::After(1));
        }
        assert_eq!(al.get(64..=64), Grant::After(2));
        assert_eq!(al.prepare().unwrap().block.updates.len(), 64);
        assert_eq!(al.get(65..=65), Grant::After(2));
        assert_eq!(al.commit(), 1);
        assert_eq!(al.prepare().unwrap().block.updates.len(), 2);
        assert_eq!(al.commit(), 2);
        assert_eq!(al.get(64..=65), Grant::Hot);
    }

    #[test]
    fn evicts_the_least_recently_used_and_never_a_held_one() {
        let mut al = ActivityLog::new(2);
        assert_eq!(al.get(0..=1), Grant::After(1));
        al.prepare().unwrap();
        al.commit();
        assert_eq!(al.get(5..=5), Grant::Full);
        al.put(1..=1);
        assert_eq!(al.get(5..=5), Grant::After(2));
        let p = al.prepare().unwrap();
        assert_eq!(p.evicted, vec![1]);
        al.commit();
        assert_eq!(al.get(5..=5), Grant::Hot);
        al.put(5..=5);
        al.put(0..=0);
        // A range may not evict its own idle members.
        assert_eq!(al.get(0..=1), Grant::Full);
    }

    #[test]
    fn held_extents_make_it_crowded_idle_ones_do_not() {
        let mut al = ActivityLog::new(4);
        al.get(0..=1);
        assert!(al.is_in_use() && !al.is_crowded());
        al.get(2..=2);
        assert!(al.is_crowded());
        al.prepare().unwrap();
        al.commit();
        al.put(0..=2);
        assert!(!al.is_in_use() && !al.is_crowded());
    }
}
