//! Reads: from the own disk, or from a peer (`spec/state-machine.md` §13.2, `spec/wire-protocol.md` §9.11).

use crate::config::ReadBalancing;
use crate::core::{Core, IoTag};
use crate::io::{BlockId, BlockResult, IoError, Output, Stream};
use crate::types::{BIO_SIZE_MAX, NodeId, NodeMask, SECTOR, VolumeNr};
use bytes::Bytes;
use palisade_wire::enums::{ConnState, DiskState, ReplState};
use palisade_wire::{BlockReq, Data, DpFlags, Packet};

/// A read of the front end.
#[derive(Debug)]
pub(crate) struct ReadRequest {
    pub block: BlockId,
    pub vnr: VolumeNr,
    pub sector: u64,
    pub len: u32,
    /// Peers that could not serve it.
    pub tried: NodeMask,
    pub local_failed: bool,
    /// Waits for data to become accessible.
    pub parked: bool,
}

impl Core {
    pub(crate) fn start_read(&mut self, v: VolumeNr, block: BlockId, sector: u64, len: u32) {
        let id = self.id();
        self.reads.insert(
            id,
            ReadRequest {
                block,
                vnr: v,
                sector,
                len,
                tried: NodeMask::EMPTY,
                local_failed: false,
                parked: false,
            },
        );
        if let Some(d) = self.devs.get_mut(&v) {
            d.read_sectors += u64::from(len) / SECTOR;
        }
        self.route_read(id);
    }

    /// Finds somebody to read from.
    fn route_read(&mut self, id: u64) {
        let Some(r) = self.reads.get(&id) else { return };
        let (v, sector, len, tried, local_failed) = (r.vnr, r.sector, r.len, r.tried, r.local_failed);
        let local = !local_failed && self.local_read_ok(v, sector, len);
        let remote = self.read_source(v, tried);
        let balance = self.devs.get(&v).map(|d| d.cfg.read_balancing).unwrap_or_default();
        let prefer_remote = match balance {
            ReadBalancing::PreferLocal => false,
            ReadBalancing::PreferRemote => true,
            ReadBalancing::RoundRobin => {
                self.read_toggle = !self.read_toggle;
                self.read_toggle
            }
        };
        match (local, remote) {
            (true, Some(n)) if prefer_remote => self.read_remote(id, n),
            (true, _) => {
                let io = self.io(v, IoTag::AppRead(id));
                self.emit(Output::DiskRead { id: io, vnr: v, sector, len });
            }
            (false, Some(n)) => self.read_remote(id, n),
            (false, None) if self.st.susp_nod => {
                if let Some(r) = self.reads.get_mut(&id) {
                    r.parked = true;
                    r.tried = NodeMask::EMPTY;
                }
            }
            (false, None) => self.finish_read(id, BlockResult::IoError),
        }
    }

    fn local_read_ok(&self, v: VolumeNr, sector: u64, len: u32) -> bool {
        let Some(l) = self.devs.get(&v).and_then(|d| d.ldev.as_ref()) else { return false };
        match self.st.disk(v) {
            DiskState::UpToDate => true,
            DiskState::Inconsistent => {
                let bits = l.bitmap.bits_touching(sector..sector + u64::from(len) / SECTOR);
                (0..l.bitmap.slots()).all(|s| l.bitmap.count(s, bits.clone()) == 0)
            }
            _ => false,
        }
    }

    fn read_source(&self, v: VolumeNr, tried: NodeMask) -> Option<NodeId> {
        let mut best: Option<(u8, NodeId)> = None;
        for (n, p) in self.st.peers_of(v) {
            let Some(c) = self.conns.get(&n) else { continue };
            let usable = self.st.connected(n)
                && p.repl >= ReplState::Established
                && p.pdsk == DiskState::UpToDate
                && c.net.allow_remote_read
                && !tried.has(n);
            // A synchronous peer surely has the data.
            let rank = c.net.protocol.as_u8();
            if usable && best.is_none_or(|(r, _)| rank > r) {
                best = Some((rank, n));
            }
        }
        best.map(|b| b.1)
    }

    fn read_remote(&mut self, id: u64, n: NodeId) {
        let Some(r) = self.reads.get(&id) else { return };
        let (v, sector, len) = (r.vnr, r.sector, r.len);
        self.close_epochs_before(n, self.epoch);
        if let Some(c) = self.conns.get_mut(&n) {
            c.reads.insert(id, id);
        }
        self.send_data(n, Some(v), Packet::DataRequest(BlockReq { sector, block_id: id, blksize: len }));
    }

    pub(crate) fn finish_read(&mut self, id: u64, result: BlockResult) {
        if let Some(r) = self.reads.remove(&id) {
            self.finish_block(r.vnr, r.block, result);
        }
    }

    pub(crate) fn app_read_done(&mut self, v: VolumeNr, id: u64, result: Result<Bytes, IoError>) {
        match result {
            Ok(data) => self.finish_read(id, BlockResult::Data(data)),
            Err(_) => {
                if let Some(r) = self.reads.get_mut(&id) {
                    r.local_failed = true;
                    let (sector, len) = (r.sector, r.len);
                    if let Some(l) = self.ldev(v) {
                        l.mark_others(sector..sector + u64::from(len) / SECTOR, NodeMask::EMPTY);
                    }
                }
                self.disk_error(v, false);
                self.route_read(id);
            }
        }
    }

    pub(crate) fn got_read_reply(&mut self, n: NodeId, d: &Data, data: Bytes) {
        if self.conns.get_mut(&n).and_then(|c| c.reads.remove(&d.block_id)).is_none() {
            // Failed over to another source meanwhile, or never asked for.
            if !self.reads.contains_key(&d.block_id) {
                self.drop_link(n, ConnState::ProtocolError, "read reply that was not asked for");
            }
            return;
        }
        let ok =
            self.reads.get(&d.block_id).is_some_and(|r| r.sector == d.sector && r.len as usize == data.len());
        if ok {
            self.finish_read(d.block_id, BlockResult::Data(data));
        } else if self.reads.contains_key(&d.block_id) {
            // Asked elsewhere when the link is gone.
            if let Some(c) = self.conns.get_mut(&n) {
                c.reads.insert(d.block_id, d.block_id);
            }
            self.drop_link(n, ConnState::ProtocolError, "read reply with the wrong position or size");
        }
    }

    pub(crate) fn got_read_refusal(&mut self, n: NodeId, id: u64) {
        if self.conns.get_mut(&n).and_then(|c| c.reads.remove(&id)).is_some() {
            if let Some(r) = self.reads.get_mut(&id) {
                r.tried = r.tried.with(n);
            }
            self.route_read(id);
        }
    }

    pub(crate) fn reads_lost_peer(&mut self, n: NodeId) {
        let ids: Vec<u64> = self
            .conns
            .get_mut(&n)
            .map(|c| std::mem::take(&mut c.reads).into_keys().collect())
            .unwrap_or_default();
        for id in ids {
            self.route_read(id);
        }
    }

    /// Data is accessible again.
    pub(crate) fn retry_reads(&mut self, v: VolumeNr) {
        let ids: Vec<u64> =
            self.reads.iter().filter(|(_, r)| r.vnr == v && r.parked).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(r) = self.reads.get_mut(&id) {
                r.parked = false;
                r.local_failed = false;
            }
            self.route_read(id);
        }
    }

    // ----- serving a peer -----

    pub(crate) fn got_read_request(&mut self, n: NodeId, v: VolumeNr, r: &BlockReq) {
        let size = self.devs.get(&v).map_or(0, |d| d.size);
        let end = r.sector.checked_add(u64::from(r.blksize) / SECTOR);
        let bad = r.blksize == 0
            || r.blksize > BIO_SIZE_MAX
            || !u64::from(r.blksize).is_multiple_of(SECTOR)
            || end.is_none_or(|e| e > size);
        if bad {
            self.drop_link(n, ConnState::ProtocolError, "read request outside of the device");
            return;
        }
        if self.st.disk(v) != DiskState::UpToDate {
            self.send_ack(n, v, r.sector, r.blksize, r.block_id, Packet::NegDreply);
            return;
        }
        let id = self.id();
        if let Some(c) = self.conns.get_mut(&n) {
            c.reads_served.insert(id, (r.sector, r.blksize, r.block_id));
        }
        self.peer_reads_waiting.push((id, n, v));
        self.serve_peer_reads(v);
    }

    /// Reads for peers, each after the replicated writes of its range that came before it: with protocols A and
    /// B the writer may have them acknowledged already.
    pub(crate) fn serve_peer_reads(&mut self, v: VolumeNr) {
        let mut later = Vec::new();
        for (id, n, rv) in std::mem::take(&mut self.peer_reads_waiting) {
            let served = self.conns.get(&n).and_then(|c| c.reads_served.get(&id));
            let Some((sector, len, _)) = served.copied() else { continue };
            let end = sector + u64::from(len) / SECTOR;
            let busy = self.peer_requests.iter().any(|(w, r)| {
                *w < id && r.vnr == rv && r.sector < end && sector < r.sector + u64::from(r.len) / SECTOR
            });
            if busy || rv != v {
                later.push((id, n, rv));
                continue;
            }
            if self.devs.get(&v).is_none_or(|d| d.ldev.is_none()) {
                self.peer_read_done(v, n, id, Err(IoError::Failed));
                continue;
            }
            let io = self.io(v, IoTag::PeerRead { peer: n, id });
            self.emit(Output::DiskRead { id: io, vnr: v, sector, len });
        }
        self.peer_reads_waiting.extend(later);
    }

    pub(crate) fn peer_read_done(&mut self, v: VolumeNr, n: NodeId, id: u64, result: Result<Bytes, IoError>) {
        let served = self.conns.get_mut(&n).and_then(|c| c.reads_served.remove(&id));
        let Some((sector, len, block_id)) = served else { return };
        match result {
            Ok(data) => {
                let digest = self
                    .conns
                    .get(&n)
                    .and_then(|c| c.net.integrity_alg.as_deref().map(|a| crate::write::digest_of(a, &data)))
                    .unwrap_or_default();
                let d = Data { sector, block_id, seq_num: 0, dp_flags: DpFlags::NONE };
                self.send(n, Stream::Data, Some(v.0), Packet::DataReply(d), digest, data);
            }
            Err(_) => {
                self.send_ack(n, v, sector, len, block_id, Packet::NegDreply);
                self.disk_error(v, false);
            }
        }
    }
}
