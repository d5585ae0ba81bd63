//! What links do: establishing, carrying packets, cutting, breaking.

use crate::link::{Parcel, Session, Wired, stream_index};
use crate::world::{MS, US, What, World, end_of, node_id, pair};
use bytes::{Bytes, BytesMut};
use palisade_core::io::{CodecCtx, Input, LinkError};
use palisade_wire::{Packet, Stream};

impl World {
    pub(crate) fn try_connect(&mut self, key: (usize, usize)) {
        let d = self.delay((MS, 20 * MS));
        let Some(l) = self.links.get_mut(&key) else { return };
        if l.ready() {
            l.connecting = true;
            l.attempt += 1;
            let attempt = l.attempt;
            self.schedule(self.now + d, What::Connect { link: key, attempt });
        }
    }

    pub(crate) fn establish(&mut self, key: (usize, usize), attempt: u64) {
        let up = [self.delay((US, 500 * US)), self.delay((US, 500 * US))];
        self.next += 1;
        let id = self.next;
        let now = self.now;
        let Some(l) = self.links.get_mut(&key) else { return };
        if l.attempt != attempt || !l.connecting {
            return;
        }
        l.connecting = false;
        if !l.ready() {
            return;
        }
        l.want = [false; 2];
        l.session = Some(Session {
            id,
            up: [false; 2],
            open: [true; 2],
            send: [CodecCtx::initial(); 2],
            receive: [CodecCtx::initial(); 2],
            last: [[0; 2]; 2],
            dead: [false; 2],
            stalled: [Vec::new(), Vec::new()],
            earliest: [now + up[1], now + up[0]],
        });
        for (end, d) in up.into_iter().enumerate() {
            self.schedule(now + d, What::LinkUp { link: key, session: id, end });
        }
    }

    #[allow(clippy::too_many_arguments)] // One output, field by field.
    pub(crate) fn send(
        &mut self,
        n: usize,
        peer: usize,
        stream: Stream,
        volume: Option<u16>,
        packet: &Packet,
        digest: &Bytes,
        bulk: Bytes,
    ) {
        let end = end_of(n, peer);
        let key = pair(n, peer);
        let Some(s) = self.links.get_mut(&key).and_then(|l| l.session.as_mut()) else {
            self.fail(format!("{}: {packet:?} sent to {} without a link", self.name(n), self.name(peer)));
            return;
        };
        if !s.open[end] || !s.up[end] {
            return;
        }
        let mut head = BytesMut::new();
        if let Err(e) = palisade_wire::encode(packet, volume, &s.send[end], digest, bulk.len(), &mut head) {
            self.fail(format!("{}: {packet:?} cannot be encoded: {e}", self.name(n)));
            return;
        }
        self.post(key, end, Parcel::Packet(Wired { stream, head: head.freeze(), bulk }));
    }

    /// Puts a parcel on its way.
    pub(crate) fn post(&mut self, key: (usize, usize), direction: usize, parcel: Parcel) {
        let d = self.delay(self.speed.net);
        let end_stream = if self.steady { 0 } else { self.rng.below(2) as usize };
        let now = self.now;
        let Some(l) = self.links.get_mut(&key) else { return };
        let slow = l.slow[direction];
        let Some(s) = l.session.as_mut() else { return };
        if s.dead[direction] {
            return;
        }
        let stream = match &parcel {
            Parcel::Packet(p) => stream_index(p.stream),
            // The receiver may see the end of either stream first.
            Parcel::End => end_stream,
        };
        let at = (now + d + slow).max(s.last[direction][stream] + 1).max(s.earliest[direction] + 1);
        s.last[direction][stream] = at;
        let session = s.id;
        self.schedule(at, What::Arrival { link: key, session, direction, parcel });
    }

    pub(crate) fn arrival(&mut self, key: (usize, usize), id: u64, direction: usize, parcel: Parcel) {
        let Some(l) = self.links.get_mut(&key) else { return };
        let cut = l.cut[direction];
        let Some(s) = l.session.as_mut().filter(|s| s.id == id) else { return };
        let to = 1 - direction;
        if s.dead[direction] || !s.open[to] {
            return;
        }
        if cut || !s.stalled[direction].is_empty() {
            s.stalled[direction].push(parcel);
            return;
        }
        self.deliver(key, id, direction, parcel);
    }

    pub(crate) fn deliver(&mut self, key: (usize, usize), id: u64, direction: usize, parcel: Parcel) {
        let to = 1 - direction;
        let (me, peer) = if to == 0 { key } else { (key.1, key.0) };
        let Some(s) = self.session(key, id) else { return };
        if !s.open[to] {
            return;
        }
        let ctx = s.receive[to];
        let Parcel::Packet(w) = parcel else {
            self.end_of_stream(key, id, to);
            return;
        };
        match unpack(&w, &ctx) {
            Ok((volume, packet, digest)) => {
                let peer = node_id(peer);
                let input = Input::Packet { peer, stream: w.stream, volume, packet, digest, data: w.bulk };
                self.input(me, input);
            }
            Err(e) => {
                let text =
                    format!("{}: a packet from {} cannot be decoded: {e}", self.name(me), self.name(peer));
                self.fail(text);
            }
        }
    }

    /// The end learns that the other one closed.
    pub(crate) fn end_of_stream(&mut self, key: (usize, usize), id: u64, end: usize) {
        let Some(s) = self.session(key, id) else { return };
        if !s.open[end] {
            return;
        }
        s.open[end] = false;
        let was_up = s.up[end];
        let (me, peer) = if end == 0 { key } else { (key.1, key.0) };
        self.forget_session(key);
        if was_up {
            self.input(me, Input::LinkDown { peer: node_id(peer), why: LinkError::BrokenPipe });
        } else if let Some(l) = self.links.get_mut(&key) {
            l.want[end] = self.nodes[me].core.is_some();
        }
        self.try_connect(key);
    }

    pub(crate) fn forget_session(&mut self, key: (usize, usize)) {
        if let Some(l) = self.links.get_mut(&key)
            && l.session.as_ref().is_some_and(|s| s.open == [false; 2])
        {
            l.session = None;
        }
    }

    pub(crate) fn link_is_up(&self, n: usize, peer: usize) -> bool {
        let session = self.links.get(&pair(n, peer)).and_then(|l| l.session.as_ref());
        session.is_some_and(|s| s.up[end_of(n, peer)])
    }

    pub(crate) fn close_link(&mut self, n: usize, peer: usize) {
        let end = end_of(n, peer);
        let key = pair(n, peer);
        let Some(l) = self.links.get_mut(&key) else { return };
        l.want[end] = false;
        l.connecting = false;
        let Some(s) = l.session.as_mut() else { return };
        if !s.open[end] {
            return;
        }
        let was_up = s.up[end];
        self.post(key, end, Parcel::End);
        if let Some(s) = self.links.get_mut(&key).and_then(|l| l.session.as_mut()) {
            s.open[end] = false;
        }
        self.forget_session(key);
        if was_up {
            let d = self.delay((US, 200 * US));
            let life = self.nodes[n].life;
            self.schedule(self.now + d, What::LinkDown { node: n, life, peer, why: LinkError::Closed });
        }
        self.try_connect(key);
    }

    /// Cuts (or mends) one direction.
    pub fn set_cut(&mut self, from: usize, to: usize, cut: bool) {
        let direction = end_of(from, to);
        let key = pair(from, to);
        let kill = self.steady || self.rng.chance(50);
        let Some(l) = self.links.get_mut(&key) else { return };
        if l.cut[direction] == cut {
            return;
        }
        l.cut[direction] = cut;
        self.say(|| format!("{} {} -> {}", if cut { "cut" } else { "heal" }, self.name(from), self.name(to)));
        if cut {
            return;
        }
        let Some(l) = self.links.get_mut(&key) else { return };
        if let Some(s) = l.session.as_mut() {
            let id = s.id;
            let stalled = std::mem::take(&mut s.stalled[direction]);
            if stalled.is_empty() {
            } else if kill {
                // The sender gave up retransmitting: a reset, noticed by both.
                s.dead = [true; 2];
                let d = self.now + self.delay((US, 50 * MS));
                self.schedule(d, What::Reset { link: key, session: id, end: 0 });
                let d = self.now + self.delay((US, 50 * MS));
                self.schedule(d, What::Reset { link: key, session: id, end: 1 });
            } else {
                for p in stalled {
                    self.deliver(key, id, direction, p);
                }
            }
            // Half-open ends learn now.
            if let Some(s) = self.session(key, id)
                && s.open != [true; 2]
            {
                let end = usize::from(s.open[1]);
                let d = self.now + self.delay((MS, 50 * MS));
                self.schedule(d, What::Reset { link: key, session: id, end });
            }
        }
        self.try_connect(key);
    }

    /// Breaks an established link: both ends see a reset, soon.
    pub fn reset_link(&mut self, a: usize, b: usize) {
        let key = pair(a, b);
        self.say(|| format!("reset {} - {}", self.name(key.0), self.name(key.1)));
        let Some(s) = self.links.get_mut(&key).and_then(|l| l.session.as_mut()) else { return };
        s.dead = [true; 2];
        let id = s.id;
        for end in 0..2 {
            let d = self.now + self.delay((US, 5 * MS));
            self.schedule(d, What::Reset { link: key, session: id, end });
        }
    }
}

fn unpack(w: &Wired, ctx: &CodecCtx) -> Result<(Option<u16>, Packet, Bytes), String> {
    let header = palisade_wire::decode_header(&w.head).map_err(|e| e.to_string())?;
    let header = header.ok_or_else(|| "the header is short".to_string())?;
    let fixed = w.head.slice(header.header_len..);
    if fixed.len() + w.bulk.len() != header.length as usize {
        return Err("the length in the header is not that of the packet".into());
    }
    let (packet, digest) =
        palisade_wire::decode_fixed(&header, fixed, w.stream, ctx).map_err(|e| e.to_string())?;
    Ok((header.volume, packet, digest))
}
