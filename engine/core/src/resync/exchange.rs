//! The bitmap exchange before a resync, and the handlers that may still object
//! (`spec/state-machine.md` §11, `spec/wire-protocol.md` §8).
//!
//! Received bits are merged into the own slot; this file must never drop a bit.

use crate::core::{AfterHandler, Core, Todo};
use crate::io::{HandlerCall, LogLevel, Stream};
use crate::tables::uuid::same;
use crate::types::{NodeId, VolumeNr};
use bytes::Bytes;
use palisade_wire::HeaderKind;
use palisade_wire::bitmap::{Progress, Receiver, Sender};
use palisade_wire::enums::{ConnState, DiskState, ReplState};

impl Core {
    pub(crate) fn begin_exchange(&mut self, n: NodeId, v: VolumeNr) {
        let bits = self.devs.get(&v).and_then(|d| d.ldev.as_ref()).map_or(0, |l| l.bitmap.bits());
        let generation = self.devs.get(&v).map_or(0, crate::device::Device::current_uuid);
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.target_done = None;
            p.bitmap.packets = 0;
            p.bitmap.generation = generation;
            p.bitmap.sent = false;
            p.bitmap.received = false;
            p.bitmap.receiver = Some(Receiver::new(bits, HeaderKind::H100));
        }
    }

    pub(crate) fn send_bitmap(&mut self, n: NodeId, v: VolumeNr) {
        let rle = self.conns.get(&n).is_some_and(|c| c.net.use_rle);
        let Some(l) = self.devs.get(&v).and_then(|d| d.ldev.as_ref()) else { return };
        let Some(slot) = l.slot(n) else { return };
        let bits = l.bitmap.bits();
        let mut sender = Sender::new(bits, HeaderKind::H100, rle);
        let mut packets = Vec::new();
        loop {
            let run_at = |bit: u64| {
                if l.bitmap.test(slot, bit) {
                    (true, l.bitmap.next_clear(slot, bit).unwrap_or(bits).max(bit + 1) - bit)
                } else {
                    (false, l.bitmap.next_set(slot, bit).unwrap_or(bits).max(bit + 1) - bit)
                }
            };
            let words = l.bitmap.words(slot);
            let word_at = |i: u64| usize::try_from(i).ok().and_then(|i| words.get(i)).copied().unwrap_or(0);
            match sender.next_packet(run_at, word_at) {
                Some(p) => packets.push(p),
                None => break,
            }
        }
        for (packet, data) in packets {
            self.send(n, Stream::Data, Some(v.0), packet, Bytes::new(), data);
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.bitmap.sent = true;
        }
    }

    pub(crate) fn got_plain_bitmap(&mut self, n: NodeId, v: VolumeNr, data: &Bytes) {
        self.got_bitmap(n, v, |r, l, slot| {
            let mut words = Vec::new();
            let done = r.plain(data, |i, w| words.push((i, w)))?;
            for (i, w) in words {
                l.or_words(slot, usize::try_from(i).unwrap_or(usize::MAX), &[w]);
            }
            Ok(done)
        });
    }

    pub(crate) fn got_compressed_bitmap(&mut self, n: NodeId, v: VolumeNr, encoding: u8, data: &Bytes) {
        self.got_bitmap(n, v, |r, l, slot| {
            r.compressed(encoding, data, |first, count| {
                l.set_range(slot, first..first + count);
            })
        });
    }

    fn got_bitmap(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        take: impl FnOnce(
            &mut Receiver,
            &mut palisade_metadata::Bitmap,
            usize,
        ) -> Result<Progress, palisade_wire::bitmap::BitmapError>,
    ) {
        use ReplState as R;
        if !matches!(self.st.repl(n, v), R::WFBitMapS | R::WFBitMapT) {
            self.drop_link(n, ConnState::ProtocolError, "unexpected bitmap");
            return;
        }
        let (Some(p), Some(l)) =
            (self.pds.get_mut(&(n, v)), self.devs.get_mut(&v).and_then(|d| d.ldev.as_mut()))
        else {
            return;
        };
        p.bitmap.packets += 1;
        let (Some(r), Some(slot)) = (&mut p.bitmap.receiver, l.slot(n)) else { return };
        match take(r, &mut l.bitmap, slot) {
            Ok(Progress::More) => {}
            Ok(Progress::Done) => {
                p.bitmap.received = true;
                p.bitmap.receiver = None;
                if !p.bitmap.sent {
                    self.send_bitmap(n, v);
                }
                self.write_bitmap(v);
                self.todo(Todo::BitmapDone(n, v));
            }
            Err(e) => {
                let text = format!("bad bitmap: {e}");
                self.drop_link(n, ConnState::ProtocolError, &text);
            }
        }
    }

    /// Both bitmaps are merged: the handlers may still object.
    pub(crate) fn bitmap_done(&mut self, n: NodeId, v: VolumeNr) {
        let source = match self.st.repl(n, v) {
            ReplState::WFBitMapS => true,
            ReplState::WFBitMapT => false,
            _ => return,
        };
        let call = HandlerCall {
            name: if source { "before-resync-source" } else { "before-resync-target" },
            vnr: Some(v),
            peer: Some(n),
            cstate: Some(ConnState::Connected.name()),
            up_to_date_nodes: None,
        };
        self.run_handler(call, AfterHandler::BeforeResync { peer: n, vnr: v, source });
    }

    pub(crate) fn handler_done(&mut self, id: crate::io::HandlerId, exit: Option<i32>) {
        match self.handlers.remove(&id.0) {
            Some(AfterHandler::BeforeResync { peer, vnr, source }) => {
                let objects = exit.is_none_or(|e| e > 0 && !(source && e == 3));
                if objects {
                    let scope = self.scope(Some(peer), Some(vnr));
                    let text = format!("before-resync handler returned {exit:?}, dropping connection.");
                    self.log(LogLevel::Error, scope, text);
                    self.disconnect_now(peer);
                    return;
                }
                let (from, to) = if source {
                    (ReplState::WFBitMapS, ReplState::SyncSource)
                } else if self.overtaken(peer, vnr) {
                    // As for other sources that were paused until then: this one has nothing left to give.
                    (ReplState::WFBitMapT, ReplState::Established)
                } else {
                    (ReplState::WFBitMapT, ReplState::SyncTarget)
                };
                if self.st.repl(peer, vnr) == from {
                    let overtaken = to == ReplState::Established;
                    let disk = if overtaken { self.disk_after_overtaking(vnr) } else { None };
                    self.force("receive-bitmap", |s| {
                        if let Some(p) = s.pds.get_mut(&(peer, vnr)) {
                            p.repl = to;
                        }
                        let target = |p: ReplState| matches!(p, ReplState::WFBitMapT | ReplState::SyncTarget);
                        let waits = s.peers_of(vnr).any(|(_, p)| target(p.repl));
                        if let Some(d) = s.devs.get_mut(&vnr)
                            && let Some(disk) = disk
                            && !waits
                        {
                            d.disk = d.disk.max(disk);
                        }
                    });
                }
            }
            Some(AfterHandler::Nothing) | None => {}
        }
    }

    /// A resync from another source ended since the exchange with this one began, and was worth at least as much.
    fn overtaken(&self, n: NodeId, v: VolumeNr) -> bool {
        let (Some(p), Some(d)) = (self.pds.get(&(n, v)), self.devs.get(&v)) else { return false };
        let (Some(theirs), Some(own)) = (p.uuids.as_ref(), self.uuid_set(v)) else { return false };
        let its = theirs.set.current;
        !same(p.bitmap.generation, d.current_uuid()) && (same(its, own.current) || own.in_history(its))
    }

    /// The disk is what the source made it whose resync overtook all others.
    fn disk_after_overtaking(&self, v: VolumeNr) -> Option<DiskState> {
        let l = self.devs.get(&v).and_then(|d| d.ldev.as_ref())?;
        let current = self.devs.get(&v)?.current_uuid();
        self.st
            .peers_of(v)
            .filter(|(m, p)| {
                let equal = |u: &crate::connection::PeerUuids| same(u.set.current, current);
                p.repl == ReplState::Established
                    && self.pds.get(&(*m, v)).and_then(|p| p.uuids.as_ref()).is_some_and(equal)
                    && l.slot(*m).is_some_and(|s| l.bitmap.weight(s) == 0)
            })
            .map(|(_, p)| p.pdsk)
            .max()
    }
}
