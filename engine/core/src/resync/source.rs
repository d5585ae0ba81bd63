//! The source: requests of targets, the reads for them, and their acknowledgements
//! (`spec/state-machine.md` §11.5, `spec/wire-protocol.md` §10).
//!
//! It must never answer from a range that is being written, nor before it is as far in the Primary's stream as the
//! target was when it asked.

use super::{SourcePhase, SourceRequest};
use crate::core::{Core, IoTag, Todo};
use crate::intervals::Holder;
use crate::io::{IoError, Output, Stream};
use crate::tables::uuid::same;
use crate::types::{BIO_SIZE_MAX, NodeId, SECTOR, VolumeNr};
use bytes::Bytes;
use palisade_wire::enums::{ConnState, DiskState, ReplState};
use palisade_wire::{DagtagReq, Data, Packet, UuidFlags};

impl Core {
    pub(super) fn got_resync_request(&mut self, n: NodeId, v: VolumeNr, r: &DagtagReq) {
        use ReplState as R;
        let size = self.devs.get(&v).map_or(0, |d| d.size);
        let end = r.sector.checked_add(u64::from(r.blksize) / SECTOR);
        let aligned = u64::from(r.blksize).is_multiple_of(SECTOR);
        if !aligned || end.is_none_or(|e| e > size) || r.blksize == 0 || r.blksize > BIO_SIZE_MAX {
            self.drop_link(n, ConnState::ProtocolError, "resync request outside of the device");
            return;
        }
        let repl = self.st.repl(n, v);
        if !matches!(repl, R::SyncSource | R::WFBitMapS) {
            self.send_ack(n, v, r.sector, r.blksize, r.block_id, Packet::RsCancel);
            return;
        }
        if self.st.disk(v) < DiskState::Outdated {
            self.send_ack(n, v, r.sector, r.blksize, r.block_id, Packet::NegRsDreply);
            return;
        }
        let lock = self.id();
        let node = NodeId::from_u32(r.dagtag_node_id).unwrap_or(self.me);
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            if p.source.len() > 8192 || p.source.contains_key(&r.block_id) {
                self.drop_link(n, ConnState::ProtocolError, "too many or duplicate resync requests");
                return;
            }
            p.source.insert(
                r.block_id,
                SourceRequest {
                    sector: r.sector,
                    len: r.blksize,
                    node,
                    dagtag: r.dagtag,
                    phase: SourcePhase::Waiting,
                    lock,
                },
            );
        }
        self.serve_waiting(v);
    }

    /// The Primary's stream has not reached the position this request depends on.
    fn behind(&self, r: &SourceRequest) -> bool {
        r.dagtag != 0
            && r.node != self.me
            && self.st.connected(r.node)
            && self.conns.get(&r.node).is_some_and(|c| c.rx_dagtag < r.dagtag)
    }

    /// A resync request waits only for writes in this range to end.
    pub(crate) fn resync_waits_for(&self, v: VolumeNr, start: u64, end: u64) -> bool {
        self.pds.iter().any(|((n, pv), p)| {
            *pv == v
                && self.st.repl(*n, v) == ReplState::SyncSource
                && p.source.values().any(|r| {
                    r.phase == SourcePhase::Waiting
                        && r.sector < end
                        && start < r.sector + u64::from(r.len) / SECTOR
                        && !self.behind(r)
                })
        })
    }

    /// Requests that will not be answered now: a target which is paused or finished as well holds their ranges until it
    /// hears of them, also against its resync from another source.
    pub(super) fn cancel_requests(&mut self, n: NodeId, v: VolumeNr, reading: bool) {
        let Some(p) = self.pds.get_mut(&(n, v)) else { return };
        let cancelled: Vec<u64> = p
            .source
            .iter()
            .filter(|(_, r)| r.phase == SourcePhase::Waiting || (reading && r.phase == SourcePhase::Reading))
            .map(|(id, _)| *id)
            .collect();
        for id in cancelled {
            let Some(r) = self.pds.get_mut(&(n, v)).and_then(|p| p.source.remove(&id)) else { continue };
            if let Some(d) = self.devs.get_mut(&v) {
                d.locks.remove(r.lock, r.sector);
            }
            if self.st.connected(n) {
                self.send_ack(n, v, r.sector, r.len, id, Packet::RsCancel);
            }
        }
    }

    /// Reads for requests whose conditions are met.
    pub(crate) fn serve_waiting(&mut self, v: VolumeNr) {
        let mut ready = Vec::new();
        for ((n, pv), p) in &self.pds {
            if *pv != v || self.st.repl(*n, v) != ReplState::SyncSource {
                continue;
            }
            for (id, r) in &p.source {
                if r.phase != SourcePhase::Waiting {
                    continue;
                }
                if self.behind(r) {
                    continue;
                }
                let end = r.sector + u64::from(r.len) / SECTOR;
                let Some(d) = self.devs.get(&v) else { continue };
                let busy = d.locks.overlapping(r.sector, end).any(|(_, h)| h != Holder::ResyncRead)
                    || d.peer_waiting
                        .iter()
                        .filter_map(|w| self.peer_requests.get(w))
                        .any(|w| w.sector < end && r.sector < w.sector + u64::from(w.len) / SECTOR);
                if !busy {
                    ready.push((*n, *id));
                }
            }
        }
        for (n, id) in ready {
            let Some(r) = self.pds.get_mut(&(n, v)).and_then(|p| p.source.get_mut(&id)) else { continue };
            r.phase = SourcePhase::Reading;
            let (sector, len, lock) = (r.sector, r.len, r.lock);
            if let Some(d) = self.devs.get_mut(&v) {
                d.locks.insert(lock, sector, sector + u64::from(len) / SECTOR, Holder::ResyncRead);
                d.read_sectors += u64::from(len) / SECTOR;
            }
            let io = self.io(v, IoTag::ResyncSourceRead { peer: n, id, lock });
            self.emit(Output::DiskRead { id: io, vnr: v, sector, len });
        }
    }

    /// `lock` is this node's own name of the request: the peer's may have been used again since.
    pub(crate) fn source_read_done(
        &mut self,
        v: VolumeNr,
        n: NodeId,
        id: u64,
        lock: u64,
        result: Result<Bytes, IoError>,
    ) {
        let Some(r) = self
            .pds
            .get_mut(&(n, v))
            .and_then(|p| p.source.get_mut(&id))
            .filter(|r| r.lock == lock && r.phase == SourcePhase::Reading)
        else {
            return;
        };
        let (sector, len) = (r.sector, r.len);
        match result {
            Ok(data) => {
                r.phase = SourcePhase::Answered;
                let digest = self
                    .conns
                    .get(&n)
                    .and_then(|c| c.net.integrity_alg.as_deref().map(|a| crate::write::digest_of(a, &data)))
                    .unwrap_or_default();
                let d = Data { sector, block_id: id, seq_num: 0, dp_flags: palisade_wire::DpFlags::NONE };
                self.send(n, Stream::Data, Some(v.0), Packet::RsDataReply(d), digest, data);
            }
            Err(_) => {
                if let Some(p) = self.pds.get_mut(&(n, v)) {
                    p.source.remove(&id);
                }
                if let Some(d) = self.devs.get_mut(&v) {
                    d.locks.remove(lock, sector);
                }
                self.send_ack(n, v, sector, len, id, Packet::NegRsDreply);
                self.disk_error(v, false);
            }
        }
    }

    pub(super) fn got_resync_ack(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        id: u64,
        sector: u64,
        len: u32,
        ok: bool,
    ) {
        let r = self.pds.get_mut(&(n, v)).and_then(|p| p.source.remove(&id));
        let Some(r) = r.filter(|r| r.sector == sector && r.len == len && r.phase == SourcePhase::Answered)
        else {
            // Of a resync that was stopped here.
            if self.st.repl(n, v) == ReplState::SyncSource {
                self.drop_link(n, ConnState::ProtocolError, "resync acknowledgement without request");
            }
            return;
        };
        let range = r.sector..r.sector + u64::from(r.len) / SECTOR;
        if let Some(d) = self.devs.get_mut(&v) {
            d.locks.remove(r.lock, r.sector);
        }
        if ok {
            if let Some(p) = self.pds.get_mut(&(n, v)) {
                p.resync_done_sectors += range.end - range.start;
                p.sent_sectors += range.end - range.start;
            }
            self.now_in_sync_with(n, v, range.clone(), false);
            self.area_finished(n, v, range);
        }
        self.todo(Todo::Kick(v));
        self.todo(Todo::KickPeers(v));
        self.serve_waiting(v);
    }

    /// The target says it is done.
    pub(crate) fn source_finished(&mut self, n: NodeId, v: VolumeNr) {
        let equal = self.pds.get(&(n, v)).and_then(|p| p.uuids.as_ref()).is_some_and(|u| {
            self.devs.get(&v).is_some_and(|d| same(u.set.current, d.current_uuid()))
                && !u.flags.contains(UuidFlags::SYNC_TARGET)
        });
        // Bits that are left were not served: the peer finished with another source, which need not be equal to this node.
        let left = self
            .devs
            .get(&v)
            .and_then(|d| d.ldev.as_ref())
            .is_some_and(|l| l.slot(n).is_some_and(|s| l.bitmap.weight(s) > 0));
        if equal && self.st.pdsk(n, v) >= DiskState::Outdated && !left {
            self.clear_slot(n, v);
            self.todo(Todo::SendUuids { vnr: v, except: Some(n), got_stable: false });
        }
        self.write_bitmap(v);
    }
}
