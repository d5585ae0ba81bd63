//! The writer's epochs: when a barrier ends one (`spec/wire-protocol.md` §9.3).
//!
//! A barrier costs the replica a drain and a flush, and what follows waits for both. It is needed for three things:
//! to keep the order of writes the replica may not have yet, to make a flush of the application good everywhere,
//! and to let go of writes (their extents, their peer-acks). So an epoch ends before the next write when a write of
//! it was completed that some replica may not have (protocols A and B); at a flush; when it is full, idle or old;
//! and when it holds much of the activity log. A write that was completed by every replica's own answer
//! (protocol C) is on all their disks before anything that depends on it is sent: no barrier could order them better.

use crate::connection::SentEpoch;
use crate::core::Core;
use crate::types::{NodeId, Time, VolumeNr};
use palisade_wire::{Barrier, Packet};
use std::time::Duration;

/// An epoch without writes for so long is over: the writer has nothing that would wait for the barrier.
const IDLE: Duration = Duration::from_millis(20);
/// No epoch lasts longer: what is lost with a replica, and what waits for its flush, stays small.
const AGE_MAX: Duration = Duration::from_secs(1);

impl Core {
    /// A write is about to be sent: ends the epoch it must not belong to.
    pub(crate) fn close_epoch_before(&mut self, v: VolumeNr) {
        let full = self.conns.values().map(|c| c.net.max_epoch_size).min().unwrap_or(2048).max(1);
        if self.epoch_must_end || self.epoch_writes >= full || self.epoch_holds_much(v) {
            self.close_epoch();
        }
    }

    /// Half of the activity log is in use, and nothing that would give it back is on its way.
    fn epoch_holds_much(&self, v: VolumeNr) -> bool {
        self.devs.get(&v).and_then(|d| d.ldev.as_ref()).is_some_and(|l| l.al.is_crowded())
            && self.conns.values().all(|c| c.sent_epochs.iter().all(|e| !e.barrier_sent))
    }

    /// Counts a write in; the number of its epoch.
    pub(crate) fn write_in_epoch(&mut self) -> u32 {
        if self.epoch_writes == 0 {
            self.epoch_since = self.now;
        }
        self.epoch_touched = self.now;
        self.epoch_writes += 1;
        self.epoch_open_writes += 1;
        self.epoch
    }

    /// A write was completed to the front end. `everywhere`: every replica it was sent to has answered for its disk.
    pub(crate) fn completed_in_epoch(&mut self, epoch: u32, everywhere: bool) {
        if epoch == self.epoch {
            self.epoch_open_writes = self.epoch_open_writes.saturating_sub(1);
            self.epoch_must_end |= !everywhere;
            self.epoch_touched = self.now;
        }
    }

    /// Ends the current epoch for every peer.
    pub(crate) fn close_epoch(&mut self) {
        self.epoch_must_end = false;
        if self.epoch_writes == 0 {
            return;
        }
        self.epoch = self.epoch.wrapping_add(1);
        self.epoch_writes = 0;
        self.epoch_open_writes = 0;
        for n in self.peers() {
            self.close_epochs_before(n, self.epoch);
        }
    }

    pub(crate) fn close_epochs_before(&mut self, n: NodeId, epoch: u32) {
        let now = self.now;
        let Some(c) = self.conns.get_mut(&n) else { return };
        let mut barriers = Vec::new();
        for e in c.sent_epochs.iter_mut().filter(|e| !e.barrier_sent && e.number != epoch) {
            e.barrier_sent = true;
            e.since = now;
            barriers.push(e.number);
        }
        for b in barriers {
            // The number is opaque to the peer; kernels write it in host byte order.
            self.send_data(n, None, Packet::Barrier(Barrier { barrier: b.swap_bytes() }));
        }
    }

    /// The epoch the next write to `n` belongs to.
    pub(crate) fn sent_in_epoch(&mut self, n: NodeId, epoch: u32, id: u64) {
        let since = self.now;
        let Some(c) = self.conns.get_mut(&n) else { return };
        match c.sent_epochs.back_mut().filter(|e| e.number == epoch && !e.barrier_sent) {
            Some(e) => e.writes.push(id),
            None => c.sent_epochs.push_back(SentEpoch {
                number: epoch,
                writes: vec![id],
                confirmed: 0,
                barrier_sent: false,
                since,
            }),
        }
    }

    /// Whether nothing but time is missing to the end of the epoch, and when that is over.
    pub(crate) fn epoch_deadline(&self) -> Option<Time> {
        if self.epoch_writes == 0 {
            return None;
        }
        // A peer that does not answer is found out by the age of what it owes; an open epoch is not owed yet.
        let owed = self.conns.values().filter(|c| c.net.ko_count > 0);
        let age = owed.map(|c| c.net.timeout * c.net.ko_count / 4).min().unwrap_or(AGE_MAX).min(AGE_MAX);
        let old = self.epoch_since + age;
        Some(if self.epoch_open_writes > 0 {
            old
        } else if self.epoch_must_end {
            self.epoch_touched
        } else {
            old.min(self.epoch_touched + IDLE)
        })
    }

    /// Ends an epoch whose time has come.
    pub(crate) fn close_due_epoch(&mut self) -> bool {
        let due = self.epoch_deadline().is_some_and(|t| t <= self.now);
        if due {
            self.close_epoch();
        }
        due
    }
}
