//! Sector ranges of requests in flight, with what holds them.

use std::collections::BTreeMap;

/// Longest range, sectors: bounds how far back an overlap can start.
const LEN_MAX: u64 = (crate::types::BATCH_SIZE_MAX as u64) / crate::types::SECTOR;

/// Who holds a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Holder {
    /// A write of this node's front end.
    App,
    /// A replicated write.
    PeerWrite,
    /// A resync request as target, sent but not answered: locked against everybody but this peer.
    ResyncAsked(crate::types::NodeId),
    /// Resync data being written.
    ResyncWrite,
    /// A resync read as source, until the target acknowledged.
    ResyncRead,
}

/// A set of ranges, several may start at the same sector.
#[derive(Debug, Default)]
pub(crate) struct Intervals {
    by_start: BTreeMap<(u64, u64), (u64, Holder)>,
}

impl Intervals {
    /// Adds `[start, end)` under a unique key.
    pub fn insert(&mut self, key: u64, start: u64, end: u64, holder: Holder) {
        debug_assert!(end - start <= LEN_MAX);
        self.by_start.insert((start, key), (end, holder));
    }

    /// Removes what was inserted with this key and start.
    pub fn remove(&mut self, key: u64, start: u64) -> bool {
        self.by_start.remove(&(start, key)).is_some()
    }

    /// Everything overlapping `[start, end)`.
    pub fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, Holder)> + '_ {
        self.by_start
            .range((start.saturating_sub(LEN_MAX), 0)..(end, 0))
            .filter(move |(_, (e, _))| *e > start)
            .map(|((_, key), (_, holder))| (*key, *holder))
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.by_start.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_overlaps_by_either_end() {
        let mut s = Intervals::default();
        s.insert(1, 8, 16, Holder::App);
        s.insert(2, 8, 24, Holder::ResyncRead);
        let keys = |a, b| s.overlapping(a, b).map(|x| x.0).collect::<Vec<_>>();
        assert_eq!(keys(0, 8), Vec::<u64>::new());
        assert_eq!(keys(0, 9), vec![1, 2]);
        assert_eq!(keys(16, 17), vec![2]);
        assert_eq!(keys(24, 30), Vec::<u64>::new());
    }
}
