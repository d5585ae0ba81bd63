//! Requests of the front end until they start: checks, the queue, what may overtake what.
//!
//! Each request is answered exactly once; a write must never overtake a request it overlaps.

use super::Payload;
use crate::core::Core;
use crate::device::{Ldev, Waiting};
use crate::io::{BlockId, BlockOp, BlockResult};
use crate::types::{BATCH_SIZE_MAX, BIO_SIZE_MAX, SECTOR, VolumeNr};

impl Core {
    pub(crate) fn block_request(&mut self, id: BlockId, v: VolumeNr, op: BlockOp) {
        let Some(d) = self.devs.get_mut(&v) else {
            self.block_done(id, BlockResult::Invalid);
            return;
        };
        let (sector, len, max) = match &op {
            BlockOp::Read { sector, len } => (*sector, u64::from(*len), BIO_SIZE_MAX),
            BlockOp::Write { sector, data, .. } => (*sector, data.len() as u64, BIO_SIZE_MAX),
            BlockOp::Discard { sector, len } | BlockOp::WriteZeroes { sector, len, .. } => {
                (*sector, u64::from(*len), BATCH_SIZE_MAX)
            }
            BlockOp::Flush => (0, SECTOR, BIO_SIZE_MAX),
        };
        let flush = op == BlockOp::Flush;
        let end = sector.checked_add(len / SECTOR);
        if len == 0
            || !len.is_multiple_of(SECTOR)
            || len > u64::from(max)
            || (!flush && end.is_none_or(|e| e > d.size))
        {
            self.block_done(id, BlockResult::Invalid);
            return;
        }
        if !self.is_primary() {
            self.block_done(id, BlockResult::NotPrimary);
            return;
        }
        if self.io_must_fail() {
            self.block_done(id, BlockResult::IoError);
            return;
        }
        if let Some(d) = self.devs.get_mut(&v) {
            d.app_pending += 1;
            d.waiting.push_back(Waiting { id, op });
        }
        self.kick(v);
    }

    pub(crate) fn finish_block(&mut self, v: VolumeNr, id: BlockId, r: BlockResult) {
        if let Some(d) = self.devs.get_mut(&v) {
            d.app_pending = d.app_pending.saturating_sub(1);
        }
        self.block_done(id, r);
    }

    /// Requests that did not start fail now.
    pub(crate) fn fail_waiting(&mut self, r: &BlockResult) {
        for v in self.vnrs() {
            let waiting: Vec<Waiting> =
                self.devs.get_mut(&v).map(|d| d.waiting.drain(..).collect()).unwrap_or_default();
            for w in waiting {
                self.finish_block(v, w.id, r.clone());
            }
            if *r == BlockResult::IoError {
                // Prepared but not submitted: nothing of them left this node.
                let ready: Vec<u64> =
                    self.devs.get_mut(&v).map(|d| d.ready.drain(..).collect()).unwrap_or_default();
                for id in ready {
                    self.abandon(id);
                }
            }
        }
    }

    /// A forced demotion or a changed policy: everything pending completes with an error.
    pub(crate) fn fail_all_requests(&mut self) {
        self.fail_waiting(&BlockResult::IoError);
        // Prepared, but nothing of them left this node: they must not be carried out after all.
        for v in self.vnrs() {
            let prepared: Vec<u64> = self
                .devs
                .get_mut(&v)
                .map(|d| d.al_wait_app.drain(..).map(|x| x.1).chain(d.ready.drain(..)).collect())
                .unwrap_or_default();
            for id in prepared {
                self.abandon(id);
            }
        }
        let ids: Vec<u64> = self.requests.iter().filter(|(_, r)| !r.completed).map(|(id, _)| *id).collect();
        for id in ids {
            self.complete(id, BlockResult::IoError);
        }
        let reads: Vec<u64> = self.reads.keys().copied().collect();
        for id in reads {
            self.finish_read(id, BlockResult::IoError);
        }
        let flushes: Vec<u64> = self.flushes.keys().copied().collect();
        for id in flushes {
            if let Some(f) = self.flushes.remove(&id) {
                self.finish_block(f.vnr, f.block, BlockResult::IoError);
            }
        }
        self.held.clear();
    }

    /// A prepared write that never was submitted.
    pub(super) fn abandon(&mut self, id: u64) {
        let Some(r) = self.requests.remove(&id) else { return };
        if let Some(d) = self.devs.get_mut(&r.vnr) {
            d.locks.remove(id, r.sector);
            if r.al_held
                && let Some(l) = &mut d.ldev
            {
                l.al.put(Ldev::extents(r.sector, r.len));
            }
        }
        if !r.completed {
            self.finish_block(r.vnr, r.block, BlockResult::IoError);
        }
    }

    /// Starts what can start, in order; a request overtakes only requests it does not overlap.
    pub(crate) fn kick(&mut self, v: VolumeNr) {
        if self.io_must_fail() && self.is_primary() {
            self.fail_waiting(&BlockResult::IoError);
        }
        if self.st.suspended() || !self.is_primary() {
            return;
        }
        if self.devs.get(&v).is_some_and(|d| d.new_uuid_needed && !d.ready.is_empty()) {
            self.new_generation(v, false);
        }
        while self.may_write(v) {
            let Some(id) = self.devs.get_mut(&v).and_then(|d| d.ready.pop_front()) else { break };
            self.submit(id);
        }
        let mut blocked: Vec<(u64, u64)> = Vec::new();
        let mut i = 0;
        while let Some(w) = self.devs.get(&v).and_then(|d| d.waiting.get(i)) {
            let range = match &w.op {
                BlockOp::Flush => None,
                BlockOp::Read { sector, len } => Some((*sector, *sector + u64::from(*len) / SECTOR, false)),
                BlockOp::Write { sector, data, .. } => {
                    Some((*sector, *sector + data.len() as u64 / SECTOR, true))
                }
                BlockOp::Discard { sector, len } | BlockOp::WriteZeroes { sector, len, .. } => {
                    Some((*sector, *sector + u64::from(*len) / SECTOR, true))
                }
            };
            let overtakes = range.is_none_or(|(s, e, _)| !blocked.iter().any(|(bs, be)| s < *be && *bs < e));
            if overtakes && self.start(v, i) {
                continue;
            }
            if let Some((s, e, true)) = range {
                blocked.push((s, e));
            }
            i += 1;
            // A pending generation or a full log stops every write; looking further only costs time.
            if blocked.len() > 64 {
                break;
            }
        }
    }

    /// Tries to start the i-th waiting request; true if it left the queue.
    fn start(&mut self, v: VolumeNr, i: usize) -> bool {
        let Some(w) = self.devs.get(&v).and_then(|d| d.waiting.get(i)) else { return false };
        let (id, op) = (w.id, w.op.clone());
        match op {
            BlockOp::Flush => {
                self.take_waiting(v, i);
                self.start_flush(v, id);
                true
            }
            BlockOp::Read { sector, len } => {
                self.take_waiting(v, i);
                self.start_read(v, id, sector, len);
                true
            }
            BlockOp::Write { sector, data, fua } => {
                let len = data.len() as u32;
                self.start_write(v, i, id, sector, len, Payload::Data { data, fua })
            }
            BlockOp::Discard { sector, len } => self.start_write(v, i, id, sector, len, Payload::Discard),
            BlockOp::WriteZeroes { sector, len, unmap } => {
                self.start_write(v, i, id, sector, len, Payload::Zeroes { unmap })
            }
        }
    }

    pub(super) fn take_waiting(&mut self, v: VolumeNr, i: usize) {
        if let Some(d) = self.devs.get_mut(&v) {
            d.waiting.remove(i);
        }
    }
}
