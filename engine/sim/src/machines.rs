//! What happens to machines: start, power loss, kill, restart; and the requests of their front ends.

use crate::disk::{to_bytes, to_stamps};
use crate::front::stamp;
use crate::link::Parcel;
use crate::node::{PendingIo, Request, RequestKind, VOLUME};
use crate::world::{FrontOp, MS, What, World, end_of, node_id, pair};
use palisade_core::io::{AdminId, BlockId, BlockOp, BlockResult, Command, Input};
use palisade_wire::enums::{ConnState, DiskState, Role};
use std::fmt::Write as _;

impl World {
    /// Starts a node: resource, volume, peers; then, if wanted, disk and connections.
    pub fn start(&mut self, n: usize, attach: bool, connect: bool) {
        if self.nodes[n].core.is_some() {
            return;
        }
        self.say(|| format!("start {}", self.name(n)));
        let seed = self.rng.seed();
        let node = &mut self.nodes[n];
        node.life += 1;
        node.core = Some(node.boot(node_id(n), seed));
        self.command(n, Command::NewVolume { vnr: VOLUME, minor: n as u32 });
        if !self.nodes[n].diskful() {
            self.command(n, Command::SetClient(VOLUME));
        }
        for m in (0..self.nodes.len()).filter(|m| *m != n) {
            if self.nodes[n].config.unconfigured.contains(&m) {
                continue;
            }
            let spec = self.nodes[n].peer_spec(node_id(m), m, self.name(m), self.nodes[m].diskful());
            self.command(n, Command::NewPeer(spec));
            let opts = self.nodes[n].config.peer_device.clone();
            self.command(n, Command::SetPeerDevice { vnr: VOLUME, peer: node_id(m), opts });
        }
        if attach && self.nodes[n].diskful() {
            self.attach(n);
        }
        if connect {
            for m in (0..self.nodes.len()).filter(|m| *m != n) {
                if self.nodes[n].config.unconfigured.contains(&m) {
                    continue;
                }
                self.connect(n, m, false);
            }
        }
    }

    /// Attaches the backing device. Returns the command's number, 0 when it could not be issued.
    pub fn attach(&mut self, n: usize) -> u64 {
        if self.nodes[n].attached || !self.nodes[n].ios.is_empty() {
            return 0;
        }
        match self.nodes[n].attach() {
            Ok(c) => self.command(n, c),
            Err(e) => {
                let name = self.name(n).to_string();
                self.fail(format!("{name}: the metadata cannot be attached: {e}"));
                0
            }
        }
    }

    /// Starts connecting.
    pub fn connect(&mut self, n: usize, peer: usize, discard_my_data: bool) -> u64 {
        self.command(n, Command::Connect { peer: node_id(peer), discard_my_data, tentative: false })
    }

    /// Issues a command; its answer appears in the node's `answers` under the number returned.
    pub fn command(&mut self, n: usize, c: Command) -> u64 {
        self.next += 1;
        let id = self.next;
        let text = match &c {
            Command::Attach { .. } => "Attach".to_string(),
            c => format!("{c:?}"),
        };
        if self.nodes[n].core.is_none() {
            return 0;
        }
        self.nodes[n].commands.insert(id, text);
        self.input(n, Input::Admin(AdminId(id), c));
        id
    }

    /// Ends a node: power loss, or only the process dies.
    pub fn stop(&mut self, n: usize, power: bool) {
        if self.nodes[n].core.is_none() {
            return;
        }
        self.say(|| format!("{} {}", if power { "power loss" } else { "kill" }, self.name(n)));
        let mut rng = self.rng.clone();
        self.rng.draw();
        let now = self.now;
        let node = &mut self.nodes[n];
        node.core = None;
        node.life += 1;
        node.timer = None;
        node.front_end = false;
        node.attached = false;
        node.openers = 0;
        node.commands.clear();
        node.hot = None;
        let data = &mut node.data;
        for io in std::mem::take(&mut node.ios).into_values() {
            match io {
                PendingIo::Write { sector, stamps, .. } => data.arrived_partly(&mut rng, sector, &stamps),
                PendingIo::Meta { pos, data, .. } => {
                    if let Some(m) = &node.meta {
                        m.torn(&mut rng, pos, &data);
                    }
                }
                PendingIo::Read { .. } | PendingIo::Flush(_) => {}
            }
        }
        for (id, r) in std::mem::take(&mut node.requests) {
            if matches!(r.kind, RequestKind::Write { .. }) {
                self.history.orphan(id, r.sector, r.count, now);
            }
        }
        if power {
            self.nodes[n].data.power_loss(&mut rng);
        }
        // A killed node keeps its disk's contents. But as after a power loss, a peer that comes back may be the
        // one to go by: only a flush makes a write outlive the end of all who have it.
        {
            // Zeroes bear no number: a replica may have them from before.
            let held = |s: u64, stamp: u64| {
                stamp != 0
                    && self.nodes.iter().any(|m| {
                        m.core.as_ref().is_some_and(|c| c.state().disk(VOLUME) == DiskState::UpToDate)
                            && m.data.current.get(s as usize) == Some(&stamp)
                    })
            };
            self.history.power_loss(held);
        }
        for m in (0..self.nodes.len()).filter(|m| *m != n) {
            let (key, end) = (pair(n, m), end_of(n, m));
            let Some(l) = self.links.get_mut(&key) else { continue };
            l.want[end] = false;
            l.connecting = false;
            let Some(s) = l.session.as_mut() else { continue };
            if s.open[end] {
                if power {
                    s.open[end] = false;
                    s.dead[end] = true;
                } else {
                    self.post(key, end, Parcel::End);
                    if let Some(s) = self.links.get_mut(&key).and_then(|l| l.session.as_mut()) {
                        s.open[end] = false;
                    }
                }
            }
            self.forget_session(key);
        }
        self.dirty = true;
    }

    /// Acknowledged writes that were not flushed are not certain any more unless `n` has them.
    pub fn only_copy(&mut self, n: usize) {
        let current = &self.nodes[n].data.current;
        self.history.power_loss(|s, stamp| stamp != 0 && current.get(s as usize) == Some(&stamp));
    }

    /// An administrator chose a side: what it has counts from here on.
    pub fn start_over(&mut self, n: usize) {
        self.history.start_over(&self.nodes[n].data.current, self.now);
        self.past_writers.clear();
        self.writer = (0, 0);
    }

    /// Starts a node that was stopped; peers that still believe in its old connections get resets.
    pub fn restart(&mut self, n: usize) {
        if self.nodes[n].core.is_some() {
            return;
        }
        for m in (0..self.nodes.len()).filter(|m| *m != n) {
            let (key, end) = (pair(n, m), end_of(n, m));
            let d = self.now + self.delay((MS, 100 * MS));
            let Some(s) = self.links.get_mut(&key).and_then(|l| l.session.as_ref()) else { continue };
            if !s.open[end] {
                let (session, cut) = (s.id, self.links[&key].cut != [false; 2]);
                if !cut {
                    self.schedule(d, What::Reset { link: key, session, end: 1 - end });
                }
            }
        }
        self.start(n, true, true);
    }

    /// Number of writers that hold the device open.
    pub fn openers(&mut self, n: usize, rw: u32) {
        self.nodes[n].openers = rw;
        self.input(n, Input::Openers { vnr: VOLUME, rw, ro: 0 });
    }

    /// Issues a front-end request. Returns its number.
    pub fn request(&mut self, n: usize, op: FrontOp) -> u64 {
        self.next += 1;
        let id = self.next;
        let (kind, sector, count, op) = match op {
            FrontOp::Read { sector, count } => {
                (RequestKind::Read, sector, count, BlockOp::Read { sector, len: count as u32 * 512 })
            }
            FrontOp::Write { sector, count, fua } => {
                let stamps: Vec<u64> = (sector..sector + count).map(|s| stamp(id, s)).collect();
                self.history.issue(id, sector, &stamps, self.now);
                let data = to_bytes(&stamps);
                (RequestKind::Write { fua }, sector, count, BlockOp::Write { sector, data, fua })
            }
            FrontOp::Zero { sector, count, discard } => {
                self.history.issue(id, sector, &vec![0; count as usize], self.now);
                let len = count as u32 * 512;
                let op = if discard {
                    BlockOp::Discard { sector, len }
                } else {
                    BlockOp::WriteZeroes { sector, len, unmap: false }
                };
                (RequestKind::Write { fua: false }, sector, count, op)
            }
            FrontOp::Flush => (RequestKind::Flush, 0, 0, BlockOp::Flush),
        };
        let era = self.nodes[n].era;
        self.nodes[n].requests.insert(id, Request { kind, sector, count, issued: self.now, era });
        self.input(n, Input::Block { id: BlockId(id), vnr: VOLUME, op });
        id
    }

    pub(crate) fn block_done(&mut self, n: usize, id: u64, r: &BlockResult) {
        let name = self.nodes[n].config.name.clone();
        let Some(req) = self.nodes[n].requests.remove(&id) else {
            self.fail(format!("{name}: request {id} was answered twice"));
            return;
        };
        let ok = matches!(r, BlockResult::Done | BlockResult::Data(_));
        self.history.reading =
            self.nodes.iter().flat_map(|n| n.requests.values()).any(|r| r.kind == RequestKind::Read);
        if !ok {
            self.results.insert(id, false);
        }
        match req.kind {
            RequestKind::Write { fua } => {
                let superseded = self.superseded(req.era);
                let nodes = &self.nodes;
                let held = |s: u64, stamp: u64| {
                    stamp == 0
                        || nodes
                            .iter()
                            .any(|m| m.core.is_some() && m.data.current.get(s as usize) == Some(&stamp))
                };
                let certain = ok && !(superseded && self.history.lossy);
                self.history.answer(id, (req.sector, req.count), self.now, certain, fua, held);
                if ok {
                    self.counts.0 += 1;
                }
                if certain {
                    self.wrote(n, req.era, req.issued);
                }
            }
            RequestKind::Flush if ok => self.history.flushed(req.issued),
            RequestKind::Flush => {}
            RequestKind::Read => {
                let BlockResult::Data(d) = r else { return };
                self.counts.1 += 1;
                let stamps = to_stamps(d).filter(|s| s.len() as u64 == req.count);
                let Some(stamps) = stamps else {
                    self.fail(format!("{name}: a read of sector {} returned damaged data", req.sector));
                    return;
                };
                // A Primary that is cut off reads its own copy until it notices, whatever its successor wrote since.
                if !self.check_reads || self.superseded(req.era) {
                    return;
                }
                for (s, v) in (req.sector..).zip(stamps) {
                    if let Err(e) = self.history.check(s, v, req.issued, self.now) {
                        self.fail(format!("{name}: wrong data read: {e}"));
                        return;
                    }
                }
            }
        }
    }

    /// Another node was promoted since that term of office began, and is Primary.
    fn superseded(&self, era: u64) -> bool {
        self.nodes.iter().any(|m| m.front_end && m.era > era)
    }

    /// At most one Primary writes: terms of office do not interleave. What was issued before the successor began
    /// may complete later, once every replica that missed it is known to be lost.
    pub(crate) fn wrote(&mut self, n: usize, era: u64, issued: u64) {
        if self.writer.0 == era || !self.check_writers {
            self.writer.0 = era;
            return;
        }
        if self.past_writers.contains(&era) {
            if issued < self.writer.1 {
                return;
            }
            let name = self.name(n).to_string();
            self.fail(format!("{name}: two Primaries complete writes at the same time"));
        }
        self.past_writers.insert(self.writer.0);
        self.writer = (era, self.now);
    }

    /// Nodes which are Primary and serve front ends.
    #[must_use]
    pub fn primaries(&self) -> Vec<usize> {
        (0..self.nodes.len())
            .filter(|n| {
                self.nodes[*n].front_end && self.core(*n).is_some_and(|c| c.state().role == Role::Primary)
            })
            .collect()
    }

    /// The states of all nodes, one line per node and connection.
    #[must_use]
    pub fn status(&self) -> String {
        let mut out = String::new();
        for node in &self.nodes {
            let name = &node.config.name;
            let Some(core) = &node.core else {
                let _ = writeln!(out, "{name} down");
                continue;
            };
            let st = core.state();
            let s = core.status();
            let _ = write!(out, "{name} {} {}", st.role, st.disk(VOLUME));
            for d in &s.devices {
                if !d.quorum {
                    out.push_str(" no-quorum");
                }
            }
            let reasons = [
                (st.susp_user, "user"),
                (st.susp_nod, "no-data"),
                (st.susp_fen, "fencing"),
                (st.susp_quorum, "quorum"),
                (st.susp_uuid, "uuid"),
            ];
            let suspended: Vec<&str> = reasons.iter().filter(|r| r.0).map(|r| r.1).collect();
            if !suspended.is_empty() {
                let _ = write!(out, " suspended:{}", suspended.join(","));
            }
            out.push('\n');
            for c in &s.connections {
                let _ = write!(out, "  {} {}", c.name, c.cstate);
                if c.cstate == ConnState::Connected {
                    let _ = write!(out, " {}", c.peer_role);
                }
                for p in &c.peer_devices {
                    let _ = write!(out, " {} {}", p.repl, p.pdsk);
                    if p.out_of_sync_kib > 0 {
                        let _ = write!(out, " oos:{}", p.out_of_sync_kib);
                    }
                }
                out.push('\n');
            }
        }
        out
    }
}
