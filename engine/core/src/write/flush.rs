//! Flushes of the application (`spec/wire-protocol.md` §9.12).
//!
//! A flush is never done before the local cache is flushed and every replica under protocol C has acknowledged the barrier
//! behind the last write.

use super::FlushRequest;
use crate::core::{Core, IoTag};
use crate::io::{BlockId, BlockResult, Output};
use crate::types::{NodeId, VolumeNr};
use palisade_wire::enums::{DiskState, ReplState, WireProtocol};
use std::collections::BTreeMap;

impl Core {
    /// Everything completed before is stable when this completes: the local cache is flushed, and every replica
    /// under protocol C has acknowledged the barrier behind the last write.
    pub(super) fn start_flush(&mut self, v: VolumeNr, block: BlockId) {
        if !self.st.data_accessible(v) {
            self.finish_block(v, block, BlockResult::IoError);
            return;
        }
        self.close_epoch();
        let peers: BTreeMap<NodeId, u32> =
            self.conns.values().filter_map(|c| c.sent_epochs.back().map(|e| (c.peer, e.number))).collect();
        let local =
            self.st.disk(v) >= DiskState::Inconsistent && self.devs.get(&v).is_some_and(|d| d.ldev.is_some());
        // An UpToDate peer without open epoch has everything on stable storage already.
        let good = self.st.peers_of(v).any(|(n, p)| {
            self.st.connected(n)
                && p.pdsk == DiskState::UpToDate
                && p.repl >= ReplState::Established
                && !peers.contains_key(&n)
        });
        let id = self.id();
        self.flushes.insert(id, FlushRequest { block, vnr: v, local_pending: local, good, peers });
        if local {
            let io = self.io(v, IoTag::AppFlush { id });
            self.emit(Output::DiskFlush { id: io, vnr: v });
        }
        self.maybe_finish_flush(id);
    }

    pub(crate) fn app_flush_done(&mut self, v: VolumeNr, id: u64, ok: bool) {
        if let Some(f) = self.flushes.get_mut(&id) {
            f.local_pending = false;
            f.good |= ok;
        }
        if !ok {
            self.disk_error(v, true);
        }
        self.maybe_finish_flush(id);
    }

    pub(super) fn barrier_acked(&mut self, n: NodeId, number: u32) {
        let ids: Vec<u64> = self
            .flushes
            .iter()
            .filter(|(_, f)| f.peers.get(&n) == Some(&number))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            if let Some(f) = self.flushes.get_mut(&id) {
                f.peers.remove(&n);
                f.good |= self.st.pdsk(n, f.vnr) == DiskState::UpToDate;
            }
            self.maybe_finish_flush(id);
        }
    }

    pub(super) fn maybe_finish_flush(&mut self, id: u64) {
        let Some(f) = self.flushes.get(&id) else { return };
        // Protocols A and B promise the local disk alone, as long as there is one that is UpToDate.
        let alone = f.good && self.st.disk(f.vnr) == DiskState::UpToDate;
        let waits =
            |n: &NodeId| !alone || self.conns.get(n).is_some_and(|c| c.net.protocol == WireProtocol::C);
        if f.local_pending || f.peers.keys().any(waits) || self.frozen() {
            return;
        }
        let (v, block) = (f.vnr, f.block);
        let bad = !f.good || self.io_must_fail();
        self.flushes.remove(&id);
        self.finish_block(v, block, if bad { BlockResult::IoError } else { BlockResult::Done });
    }
}
