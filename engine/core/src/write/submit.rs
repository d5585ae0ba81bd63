//! From the start of a write to its legs: range, extents, the local disk, what each peer gets
//! (`spec/wire-protocol.md` §9.1).
//!
//! A write is never submitted before its extents are in a committed journal transaction.

use super::{Leg, Payload, PeerLeg, Request, TransferLogEntry, digest_of};
use crate::activity_log::Grant;
use crate::core::{Core, IoTag};
use crate::device::Ldev;
use crate::intervals::Holder;
use crate::io::{BlockId, BlockResult, Output, Stream};
use crate::tables::uuid::{is_generation, same};
use crate::types::{BIO_SIZE_MAX, NodeId, NodeMask, SECTOR, VolumeNr};
use bytes::Bytes;
use palisade_wire::enums::{DiskState, ReplState, WireProtocol};
use palisade_wire::{BlockDesc, Dagtag, Data, DpFlags, Features, Packet, Trim};

/// What a peer gets of a write (`spec/wire-protocol.md` §9.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Share {
    Data,
    OutOfSync,
    Nothing,
}

impl Core {
    pub(super) fn start_write(
        &mut self,
        v: VolumeNr,
        i: usize,
        block: BlockId,
        sector: u64,
        len: u32,
        payload: Payload,
    ) -> bool {
        if !self.st.data_accessible(v) {
            self.take_waiting(v, i);
            self.finish_block(v, block, BlockResult::IoError);
            return true;
        }
        if self.devs.get(&v).is_some_and(|d| d.new_uuid_needed) {
            self.new_generation(v, false);
        }
        if !self.may_write(v) {
            return false;
        }
        let end = sector + u64::from(len) / SECTOR;
        // A resync passes once, the application could keep a block busy for ever (`spec/state-machine.md` §11.5).
        if self.resync_waits_for(v, sector, end) {
            return false;
        }
        let Some(d) = self.devs.get_mut(&v) else { return false };
        if d.locks.overlapping(sector, end).next().is_some() {
            return false;
        }
        let mut after = None;
        let mut al_held = false;
        if let Some(l) = &mut d.ldev
            && d.cfg.al_updates
        {
            match l.al.get(Ldev::extents(sector, len)) {
                Grant::Full => {
                    self.close_epoch();
                    return false;
                }
                Grant::Hot => al_held = true,
                Grant::After(seq) => {
                    al_held = true;
                    after = Some(seq);
                }
            }
        }
        d.waiting.remove(i);
        let id = self.id();
        if let Some(d) = self.devs.get_mut(&v) {
            d.locks.insert(id, sector, end, Holder::App);
            if let Some(seq) = after {
                d.al_wait_app.push((seq, id));
            }
        }
        self.requests.insert(
            id,
            Request {
                block,
                vnr: v,
                sector,
                len,
                payload,
                local: None,
                local_up_to_date: false,
                peers: Vec::new(),
                dagtag: 0,
                epoch: 0,
                submitted: false,
                completed: false,
                al_held,
            },
        );
        if after.is_some() {
            self.meta_next(v);
        } else {
            self.submit(id);
        }
        true
    }

    /// No generation is due, and what must be on disk before the next write is.
    pub(super) fn may_write(&self, v: VolumeNr) -> bool {
        self.gate_open(v)
            && self.devs.get(&v).is_none_or(|d| !d.new_uuid_needed)
            && !self.conns.values().any(|c| c.shows_unproven)
    }

    fn equal_generation(&self, n: NodeId, v: VolumeNr) -> bool {
        let own = self.devs.get(&v).map_or(0, crate::device::Device::current_uuid);
        let theirs = self.pds.get(&(n, v)).and_then(|p| p.uuids.as_ref()).map_or(0, |u| u.set.current);
        is_generation(own) && same(own, theirs)
    }

    fn share(&self, n: NodeId, v: VolumeNr) -> Share {
        use ReplState as R;
        if !self.st.connected(n) {
            return Share::Nothing;
        }
        let (repl, pdsk) = (self.st.repl(n, v), self.st.pdsk(n, v));
        match (repl, pdsk) {
            (R::Ahead | R::WFBitMapS, _) => Share::OutOfSync,
            (r, DiskState::UpToDate) if r >= R::Established => Share::Data,
            (r, DiskState::Inconsistent) if r == R::Established || (r >= R::WFBitMapT && r < R::Ahead) => {
                Share::Data
            }
            // It has what this node has, and only waits to be told so.
            (R::Established, DiskState::Consistent) if self.equal_generation(n, v) => Share::Data,
            (r, DiskState::Outdated | DiskState::Consistent) if r >= R::Established => Share::OutOfSync,
            _ => Share::Nothing,
        }
    }

    /// Local disk and peers at once.
    pub(super) fn submit(&mut self, id: u64) {
        let Some(r) = self.requests.get(&id) else { return };
        if r.completed {
            self.abandon(id);
            return;
        }
        let (v, sector, len, payload) = (r.vnr, r.sector, r.len, r.payload.clone());
        let sectors = u64::from(len) / SECTOR;
        self.close_epoch_before(v);
        let before = self.dagtag;
        self.dagtag += sectors;
        let dagtag = self.dagtag;
        let epoch = self.write_in_epoch();
        let mut legs = Vec::new();
        let mut have = NodeMask::EMPTY;
        for n in self.peers() {
            match self.share(n, v) {
                Share::Nothing => {}
                Share::OutOfSync => {
                    // Earlier epochs end before the note (`spec/wire-protocol.md` §9.3).
                    self.close_epochs_before(n, epoch);
                    self.send_data(n, Some(v), Packet::OutOfSync(BlockDesc { sector, blksize: len }));
                }
                Share::Data => {
                    have = have.with(n);
                    legs.push(self.send_write(n, v, id, sector, len, &payload, before, epoch));
                }
            }
        }
        let disk = self.st.disk(v);
        if let Some(d) = self.devs.get_mut(&v) {
            if let Some(l) = &mut d.ldev {
                // Whoever does not get the data is behind from now on.
                l.mark_others(sector..sector + sectors, have);
            }
            d.written_sectors += sectors;
        }
        let local = disk >= DiskState::Inconsistent && self.devs.get(&v).is_some_and(|d| d.ldev.is_some());
        if let Some(r) = self.requests.get_mut(&id) {
            r.submitted = true;
            r.dagtag = dagtag;
            r.epoch = epoch;
            r.peers = legs;
            r.local = local.then_some(Leg::Pending);
            r.local_up_to_date = disk == DiskState::UpToDate;
        }
        self.transfer_log.push_back(TransferLogEntry { dagtag, id, settled: None, sectors });
        if local {
            let zeroes = self.discard_zeroes(v);
            let io = self.io(v, IoTag::AppWrite(id));
            self.emit(match payload {
                Payload::Data { data, fua } => Output::DiskWrite { id: io, vnr: v, sector, data, fua },
                Payload::Discard => {
                    Output::DiskZero { id: io, vnr: v, sector, len, unmap: true, discard: zeroes }
                }
                Payload::Zeroes { unmap } => {
                    Output::DiskZero { id: io, vnr: v, sector, len, unmap, discard: false }
                }
            });
        }
        self.maybe_complete(id);
    }

    #[allow(clippy::too_many_arguments)]
    fn send_write(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        id: u64,
        sector: u64,
        len: u32,
        payload: &Payload,
        before: u64,
        epoch: u32,
    ) -> PeerLeg {
        self.close_epochs_before(n, epoch);
        let repl = self.st.repl(n, v);
        let up_to_date = self.st.pdsk(n, v) == DiskState::UpToDate;
        let own_copy = self.st.disk(v) == DiskState::UpToDate;
        let syncing = matches!(
            repl,
            ReplState::SyncSource | ReplState::SyncTarget | ReplState::PausedSyncS | ReplState::PausedSyncT
        );
        let seq_num = self.next_seq(n, v);
        let sectors = u64::from(len) / SECTOR;
        let Some(c) = self.conns.get_mut(&n) else {
            return PeerLeg {
                node: n,
                leg: Leg::Lost,
                needed: false,
                settled: true,
                gone: true,
                up_to_date: false,
            };
        };
        // Protocols A and B build on the local copy. Without one a write is nowhere until a peer has stored it.
        let protocol = if own_copy { c.net.protocol } else { WireProtocol::C };
        let announce = c.tx_dagtag != Some(before);
        c.tx_dagtag = Some(before + sectors);
        let features = c.features;
        let integrity = c.net.integrity_alg.clone();
        self.sent_in_epoch(n, epoch, id);
        if announce {
            self.send_data(n, None, Packet::Dagtag(Dagtag { dagtag: before }));
        }
        let mut flags = DpFlags::NONE
            .with(DpFlags::SEND_RECEIVE_ACK, protocol == WireProtocol::B)
            .with(DpFlags::SEND_WRITE_ACK, protocol == WireProtocol::C || syncing)
            .with(DpFlags::MAY_SET_IN_SYNC, syncing);
        let trim = |flags| Trim { sector, block_id: id, seq_num, dp_flags: flags, size: len };
        match payload {
            Payload::Data { data, fua } => {
                flags = flags.with(DpFlags::FUA, *fua).with(DpFlags::RW_SYNC, *fua);
                let digest = integrity.map_or_else(Bytes::new, |a| digest_of(&a, data));
                let p = Packet::Data(Data { sector, block_id: id, seq_num, dp_flags: flags });
                self.send(n, Stream::Data, Some(v.0), p, digest, data.clone());
            }
            Payload::Discard => {
                self.send_data(n, Some(v), Packet::Trim(trim(flags | DpFlags::DISCARD)));
            }
            Payload::Zeroes { unmap } if features.contains(Features::WZEROES) && integrity.is_none() => {
                let f = flags | DpFlags::ZEROES;
                self.send_data(n, Some(v), Packet::Zeroes(trim(f.with(DpFlags::DISCARD, *unmap))));
            }
            Payload::Zeroes { .. } => {
                // With an integrity algorithm kernels expect a digest that nobody sends (§6.4): the data itself.
                self.send_zero_data(n, v, id, sector, len, flags, seq_num, integrity.as_deref());
            }
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.pending += 1;
            p.sent_sectors += sectors;
        }
        PeerLeg {
            node: n,
            leg: Leg::Pending,
            needed: protocol != WireProtocol::A || syncing && up_to_date,
            settled: false,
            gone: false,
            up_to_date,
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn send_zero_data(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        id: u64,
        sector: u64,
        len: u32,
        flags: DpFlags,
        seq_num: u32,
        integrity: Option<&str>,
    ) {
        if len > BIO_SIZE_MAX {
            // Too large for one data packet; a trim without WZEROES semantics is executed as zero-out.
            let t = Trim { sector, block_id: id, seq_num, dp_flags: flags | DpFlags::DISCARD, size: len };
            self.send_data(n, Some(v), Packet::Trim(t));
            return;
        }
        let data = Bytes::from(vec![0u8; len as usize]);
        let digest = integrity.map_or_else(Bytes::new, |a| digest_of(a, &data));
        let p = Packet::Data(Data { sector, block_id: id, seq_num, dp_flags: flags });
        self.send(n, Stream::Data, Some(v.0), p, digest, data);
    }

    /// A discarded range reads back as zeroes; otherwise a discard is carried out as zeroing, so that all
    /// replicas stay equal.
    pub(crate) fn discard_zeroes(&self, v: VolumeNr) -> bool {
        self.devs.get(&v).and_then(|d| d.ldev.as_ref()).is_some_and(|l| l.discard_zeroes)
    }

    pub(crate) fn next_seq(&mut self, n: NodeId, v: VolumeNr) -> u32 {
        let Some(p) = self.pds.get_mut(&(n, v)) else { return 0 };
        p.tx_seq = p.tx_seq.wrapping_add(1);
        p.tx_seq
    }
}
