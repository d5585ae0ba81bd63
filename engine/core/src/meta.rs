//! Metadata on its way to disk, and where I/O completions go.
//!
//! One metadata job per volume is in flight: a superblock, an activity-log transaction (bitmap blocks of evicted
//! extents, then the journal block), or the dirty bitmap. That orders them and keeps two writes of one block
//! apart (`spec/metadata.md` §7.3, §9).

use crate::core::{Core, IoTag, Todo};
use crate::device::{Ldev, MetaJob, Then};
use crate::io::{IoError, IoId, LogLevel, Output};
use crate::types::VolumeNr;
use bytes::Bytes;
use palisade_wire::enums::DiskState;

/// Bitmap blocks written at once.
const BITMAP_WRITES_MAX: usize = 64;

impl Core {
    pub(crate) fn ldev(&mut self, v: VolumeNr) -> Option<&mut Ldev> {
        self.devs.get_mut(&v)?.ldev.as_mut()
    }

    /// The superblock in memory may differ from the one on disk.
    pub(crate) fn superblock_changed(&mut self, v: VolumeNr) {
        if let Some(l) = self.ldev(v) {
            let now = l.sb.encode();
            if l.written.as_deref() != Some(&now) {
                l.written = Some(Box::new(now));
                l.meta.sb_generation += 1;
                self.meta_next(v);
            }
        }
    }

    /// No further write reaches the data area before the superblock as it is now is on disk.
    pub(crate) fn gate_writes_on_superblock(&mut self, v: VolumeNr) {
        if let Some(l) = self.ldev(v) {
            l.meta.write_gate = l.meta.sb_generation;
        }
    }

    /// Whether writes may reach the data area.
    pub(crate) fn gate_open(&self, v: VolumeNr) -> bool {
        self.devs.get(&v).and_then(|d| d.ldev.as_ref()).is_none_or(|l| l.meta.sb_durable >= l.meta.write_gate)
    }

    /// Runs `then` when the superblock as it is now is on disk.
    pub(crate) fn when_durable(&mut self, v: VolumeNr, then: Then) {
        if let Some(l) = self.ldev(v) {
            l.meta.then.push((l.meta.sb_generation, then));
        }
        self.run_then(v);
    }

    /// Writes all changed bitmap blocks soon.
    pub(crate) fn write_bitmap(&mut self, v: VolumeNr) {
        if let Some(l) = self.ldev(v)
            && l.bitmap.dirty_count() > 0
        {
            l.meta.bm_generation += 1;
            self.meta_next(v);
        }
    }

    /// Starts the next metadata job if none is running.
    pub(crate) fn meta_next(&mut self, v: VolumeNr) {
        let Some(d) = self.devs.get_mut(&v) else { return };
        let Some(l) = &mut d.ldev else { return };
        // After a failure the metadata stays as it is: what it could not take was never announced.
        if l.meta.job.is_some() || l.meta.job_failed {
            return;
        }
        let mut writes: Vec<(u64, Bytes)> = Vec::new();
        let job = if l.meta.sb_generation > l.meta.sb_durable {
            writes.push((l.layout.md_offset, Bytes::copy_from_slice(&l.sb.encode())));
            MetaJob::Superblock { generation: l.meta.sb_generation }
        } else if let Some(prepared) = l.al.prepare() {
            let mut blocks = Vec::new();
            for e in &prepared.evicted {
                let first = u64::from(*e) << crate::types::AL_EXTENT_SHIFT;
                let bits = l.bitmap.bits_touching(first..first + (1 << crate::types::AL_EXTENT_SHIFT));
                blocks.extend(l.bitmap.take_dirty_in(l.bitmap.blocks_of_bits(bits)));
            }
            for nr in blocks {
                writes.push((l.layout.bitmap_block_pos(nr), encode_bitmap(l, nr)));
            }
            d.bm_writes += writes.len() as u64;
            let mut block_written = false;
            if writes.is_empty() {
                block_written = true;
                writes.extend(journal_write(l, &prepared));
                d.al_writes += 1;
            }
            MetaJob::ActivityLog { prepared, block_written }
        } else if l.meta.bm_generation > l.meta.bm_durable {
            let all = l.bitmap.take_dirty();
            let (now, later) = all.split_at(all.len().min(BITMAP_WRITES_MAX));
            for nr in later {
                l.bitmap.mark_dirty(*nr);
            }
            for nr in now {
                writes.push((l.layout.bitmap_block_pos(*nr), encode_bitmap(l, *nr)));
            }
            d.bm_writes += writes.len() as u64;
            if writes.is_empty() {
                // An activity-log transaction wrote the blocks already.
                l.meta.bm_durable = l.meta.bm_generation;
                self.bitmap_durable(v);
                return;
            }
            let generation = if later.is_empty() { l.meta.bm_generation } else { l.meta.bm_durable };
            MetaJob::Bitmap { generation }
        } else {
            return;
        };
        l.meta.job = Some(job);
        l.meta.job_ios = 0;
        self.meta_writes(v, writes);
    }

    fn meta_writes(&mut self, v: VolumeNr, writes: Vec<(u64, Bytes)>) {
        for (pos, data) in writes {
            let id = self.io(v, IoTag::Meta);
            if let Some(l) = self.ldev(v) {
                l.meta.job_ios += 1;
            }
            self.emit(Output::MetaWrite { id, vnr: v, pos, data });
        }
    }

    fn meta_done(&mut self, v: VolumeNr, ok: bool) {
        let Some(d) = self.devs.get_mut(&v) else { return };
        let Some(l) = &mut d.ldev else { return };
        l.meta.job_ios = l.meta.job_ios.saturating_sub(1);
        l.meta.job_failed |= !ok;
        if l.meta.job_ios > 0 {
            return;
        }
        if l.meta.job_failed {
            l.meta.job = None;
            let scope = self.scope(None, Some(v));
            self.log(LogLevel::Error, scope, "meta data write failed");
            self.disk_error(v, true);
            return;
        }
        match l.meta.job.take() {
            Some(MetaJob::Superblock { generation }) => {
                l.meta.sb_durable = generation;
                self.run_then(v);
                self.todo(Todo::Kick(v));
                self.todo(Todo::KickPeers(v));
            }
            Some(MetaJob::ActivityLog { prepared, block_written: false }) => {
                let writes: Vec<_> = journal_write(l, &prepared).into_iter().collect();
                l.meta.job = Some(MetaJob::ActivityLog { prepared, block_written: true });
                d.al_writes += 1;
                self.meta_writes(v, writes);
                return;
            }
            Some(MetaJob::ActivityLog { .. }) => {
                let seq = l.al.commit();
                self.extents_hot(v, seq);
            }
            Some(MetaJob::Bitmap { generation }) => {
                l.meta.bm_durable = generation;
                self.bitmap_durable(v);
            }
            None => {}
        }
        self.meta_next(v);
    }

    /// The bitmap on disk says all that FULL_SYNC stood for.
    fn bitmap_durable(&mut self, v: VolumeNr) {
        let Some(l) = self.ldev(v) else { return };
        if l.meta.full_sync && l.meta.bm_durable == l.meta.bm_generation {
            l.meta.full_sync = false;
            for p in &mut l.sb.peers {
                p.flags.set(palisade_metadata::PeerFlags::FULL_SYNC, false);
            }
            self.superblock_changed(v);
        }
    }

    fn run_then(&mut self, v: VolumeNr) {
        let Some(l) = self.ldev(v) else { return };
        let durable = l.meta.sb_durable;
        let (ready, rest): (Vec<_>, Vec<_>) = l.meta.then.drain(..).partition(|(g, _)| *g <= durable);
        l.meta.then = rest;
        for (_, t) in ready {
            match t {
                Then::AnnounceGeneration { weak, forced } => self.announce_generation(v, weak, forced),
            }
        }
    }

    /// Writes whose extents became hot.
    fn extents_hot(&mut self, v: VolumeNr, seq: u64) {
        let Some(d) = self.devs.get_mut(&v) else { return };
        let (app, rest): (Vec<_>, Vec<_>) = d.al_wait_app.drain(..).partition(|(s, _)| *s <= seq);
        d.al_wait_app = rest;
        let (peer, rest): (Vec<_>, Vec<_>) = d.al_wait_peer.drain(..).partition(|(s, _)| *s <= seq);
        d.al_wait_peer = rest;
        d.ready.extend(app.into_iter().map(|x| x.1));
        for (_, id) in peer {
            self.peer_write_hot(id);
        }
        self.todo(Todo::Kick(v));
        self.todo(Todo::KickPeers(v));
    }

    pub(crate) fn io_done(&mut self, id: IoId, result: Result<Bytes, IoError>) {
        let Some((v, tag)) = self.ios.remove(&id.0) else { return };
        if let Some(d) = self.devs.get_mut(&v) {
            d.disk_ios = d.disk_ios.saturating_sub(1);
        }
        match tag {
            IoTag::Meta => self.meta_done(v, result.is_ok()),
            IoTag::AppWrite(r) => self.app_write_done(v, r, result.map(drop)),
            IoTag::AppRead(r) => self.app_read_done(v, r, result),
            IoTag::PeerWrite(r) => self.peer_write_done(v, r, result.map(drop)),
            IoTag::PeerRead { peer, id } => self.peer_read_done(v, peer, id, result),
            IoTag::ResyncSourceRead { peer, id, lock } => self.source_read_done(v, peer, id, lock, result),
            IoTag::ResyncTargetWrite { peer, id } => self.target_write_done(v, peer, id, result.map(drop)),
            IoTag::EpochFlush { peer, serial } => self.epoch_flushed(v, peer, serial, result.is_ok()),
            IoTag::AppFlush { id } => self.app_flush_done(v, id, result.is_ok()),
            IoTag::ReconcileFlush => self.reconcile_flushed(v, result.is_ok()),
            IoTag::ResyncFlush { peer, serial } => self.resync_flushed(v, peer, serial, result.is_ok()),
        }
        if matches!(self.st.disk(v), DiskState::Failed | DiskState::Detaching) {
            self.todo(Todo::DiskGone(v));
        }
    }
}

fn encode_bitmap(l: &Ldev, nr: u64) -> Bytes {
    let mut block = [0u8; 4096];
    l.bitmap.encode_block(nr, &mut block);
    Bytes::copy_from_slice(&block)
}

fn journal_write(l: &Ldev, p: &crate::activity_log::Prepared) -> Option<(u64, Bytes)> {
    let block = p.block.encode().ok()?;
    Some((l.layout.al_transaction_pos(p.block.number), Bytes::copy_from_slice(&block)))
}
