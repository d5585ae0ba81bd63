//! The whole cluster: virtual time, the queue of what happens next, and what each core wants done.

use crate::disk::{to_bytes, to_stamps};
use crate::front::{History, stamp};
use crate::link::{Link, Parcel, Session, Wired, stream_index};
use crate::node::{Node, NodeConfig, PendingIo, Request, RequestKind, VOLUME};
use crate::rng::Rng;
use bytes::{Bytes, BytesMut};
use palisade_core::Core;
use palisade_core::io::{
    AdminId, BlockId, BlockOp, BlockResult, CodecCtx, Command, HandlerId, Input, IoError, IoId, LinkError,
    Output,
};
use palisade_core::types::{NodeId, Time};
use palisade_wire::enums::{ConnState, DiskState, Role};
use palisade_wire::{Packet, Stream};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::fmt::Write as _;

/// A microsecond in the simulator's unit.
pub const US: u64 = 1_000;
/// A millisecond.
pub const MS: u64 = 1_000_000;
/// A second.
pub const SECOND: u64 = 1_000_000_000;

/// Events queued at most; more means that something multiplies.
const QUEUE_MAX: usize = 100_000;
/// Operations of one node in flight at most.
const IOS_MAX: usize = 4_000;
/// Outputs of one input at most.
const OUTPUTS_MAX: usize = 50_000;
/// Timer calls at one moment at most.
const TIMER_CALLS_MAX: u32 = 200;

/// How fast things are, nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    /// Network delay: lowest, highest.
    pub net: (u64, u64),
    /// Disk operations.
    pub disk: (u64, u64),
    /// Metadata writes.
    pub meta: (u64, u64),
    /// Percent of operations that take twenty times as long.
    pub spikes: u64,
}

impl Default for Speed {
    fn default() -> Self {
        Self { net: (50 * US, 400 * US), disk: (30 * US, 300 * US), meta: (50 * US, 500 * US), spikes: 2 }
    }
}

enum What {
    Timer { node: usize, number: u64 },
    Io { node: usize, life: u64, id: u64 },
    Arrival { link: (usize, usize), session: u64, direction: usize, parcel: Parcel },
    Connect { link: (usize, usize), attempt: u64 },
    LinkUp { link: (usize, usize), session: u64, end: usize },
    LinkDown { node: usize, life: u64, peer: usize, why: LinkError },
    Reset { link: (usize, usize), session: u64, end: usize },
    Handler { node: usize, life: u64, id: u64, exit: Option<i32> },
    Plan(usize),
}

struct Event {
    at: u64,
    order: u64,
    what: What,
}

impl PartialEq for Event {
    fn eq(&self, o: &Self) -> bool {
        self.order == o.order
    }
}
impl Eq for Event {}
impl PartialOrd for Event {
    fn partial_cmp(&self, o: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(o))
    }
}
impl Ord for Event {
    fn cmp(&self, o: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(o.at, o.order))
    }
}

/// The cluster.
pub struct World {
    /// Nanoseconds since the start.
    pub now: u64,
    /// Chance.
    pub rng: Rng,
    /// Machines.
    pub nodes: Vec<Node>,
    /// Links by pair of node indices, the lower first.
    pub links: BTreeMap<(usize, usize), Link>,
    /// What front ends may read.
    pub history: History,
    /// Delays.
    pub speed: Speed,
    /// The first violation.
    pub failure: Option<String>,
    /// Print what happens.
    pub trace: bool,
    /// Events handled.
    pub steps: u64,
    /// Acknowledged writes; reads checked.
    pub counts: (u64, u64),
    /// Terms of office that completed writes and were followed by another one.
    pub past_writers: BTreeSet<u64>,
    /// The term of office that completed the last write.
    pub writer: u64,
    /// Reads are checked against the history.
    pub check_reads: bool,
    /// Two Primaries may write (scripted split brain, dual primary).
    pub check_writers: bool,
    /// Steps of the plan that are due; taken by the runner.
    pub due: Vec<usize>,
    /// Something changed since the replicas were compared last.
    pub dirty: bool,
    /// Outcome of front-end requests, when asked for.
    pub results: BTreeMap<u64, bool>,
    /// Log lines of the cores, newest last, when asked for.
    pub log: Option<Vec<String>>,
    queue: BinaryHeap<Reverse<Event>>,
    order: u64,
    next: u64,
    eras: u64,
}

fn pair(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

/// Which end of its link with `b` node `a` is.
fn end_of(a: usize, b: usize) -> usize {
    usize::from(a > b)
}

fn node_id(i: usize) -> NodeId {
    NodeId::from_u32(i as u32).unwrap_or_else(|| unreachable!("a cluster has at most 32 nodes"))
}

impl World {
    /// A cluster of machines that are down, without metadata.
    #[must_use]
    pub fn new(seed: u64, configs: Vec<NodeConfig>) -> Self {
        let sectors = configs.iter().map(|c| c.sectors).max().unwrap_or(0);
        let nodes: Vec<Node> = configs.into_iter().map(Node::new).collect();
        let mut links = BTreeMap::new();
        for b in 0..nodes.len() {
            for a in 0..b {
                links.insert((a, b), Link::default());
            }
        }
        Self {
            now: SECOND,
            rng: Rng::new(seed),
            nodes,
            links,
            history: History::new(sectors),
            speed: Speed::default(),
            failure: None,
            trace: false,
            steps: 0,
            counts: (0, 0),
            past_writers: BTreeSet::new(),
            writer: 0,
            check_reads: true,
            check_writers: true,
            due: Vec::new(),
            dirty: false,
            results: BTreeMap::new(),
            log: None,
            queue: BinaryHeap::new(),
            order: 0,
            next: 1,
            eras: 0,
        }
    }

    /// Name of a node.
    #[must_use]
    pub fn name(&self, n: usize) -> &str {
        &self.nodes[n].config.name
    }

    /// A core, if its node runs.
    #[must_use]
    pub fn core(&self, n: usize) -> Option<&Core> {
        self.nodes[n].core.as_ref()
    }

    /// Records the first violation.
    pub fn fail(&mut self, why: impl Into<String>) {
        if self.failure.is_none() {
            let why = why.into();
            self.say(|| format!("VIOLATION: {why}"));
            self.failure = Some(why);
        }
    }

    fn say(&self, f: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>12.6} {}", self.now as f64 / 1e9, f());
        }
    }

    fn schedule(&mut self, at: u64, what: What) {
        self.order += 1;
        self.queue.push(Reverse(Event { at: at.max(self.now), order: self.order, what }));
        if self.queue.len() > QUEUE_MAX {
            self.fail("more than 100000 events are queued: something multiplies without bound");
        }
    }

    /// Has the runner woken at that time with the step's number in `due`.
    pub fn plan(&mut self, at: u64, step: usize) {
        self.schedule(at, What::Plan(step));
    }

    fn delay(&mut self, range: (u64, u64)) -> u64 {
        let d = self.rng.range(range.0, range.1);
        if self.rng.chance(self.speed.spikes) { d * 20 } else { d }
    }

    /// Handles the next event if it is due by `until`; false when there is none.
    pub fn step(&mut self, until: u64) -> bool {
        if self.failure.is_some() || self.queue.peek().is_none_or(|Reverse(e)| e.at > until) {
            self.now = self.now.max(until);
            return false;
        }
        let Some(Reverse(e)) = self.queue.pop() else { return false };
        self.now = e.at;
        self.steps += 1;
        self.dispatch(e.what);
        true
    }

    /// Runs for so long, until a violation or until a planned step is due.
    pub fn run_for(&mut self, ns: u64) {
        let until = self.now + ns;
        while self.step(until) {}
    }

    fn dispatch(&mut self, what: What) {
        match what {
            What::Timer { node, number } => {
                let n = &mut self.nodes[node];
                if n.timer.is_none_or(|(_, x)| x != number) || n.core.is_none() {
                    return;
                }
                n.timer = None;
                let calls = if n.timer_calls.0 == self.now { n.timer_calls.1 + 1 } else { 0 };
                n.timer_calls = (self.now, calls);
                if calls > TIMER_CALLS_MAX {
                    let name = self.name(node).to_string();
                    self.fail(format!("{name}: next_timeout does not move on after Input::Timer"));
                    return;
                }
                self.input(node, Input::Timer);
            }
            What::Io { node, life, id } => self.io_completed(node, life, id),
            What::Arrival { link, session, direction, parcel } => {
                self.arrival(link, session, direction, parcel);
            }
            What::Connect { link, attempt } => self.establish(link, attempt),
            What::LinkUp { link, session, end } => {
                let Some(s) = self.session(link, session) else { return };
                if !s.open[end] || s.up[end] {
                    return;
                }
                s.up[end] = true;
                let (me, peer) = if end == 0 { link } else { (link.1, link.0) };
                self.input(me, Input::LinkUp { peer: node_id(peer), resolve_conflicts: end == 1 });
            }
            What::LinkDown { node, life, peer, why } => {
                if self.nodes[node].life == life {
                    self.input(node, Input::LinkDown { peer: node_id(peer), why });
                }
            }
            What::Reset { link, session, end } => self.end_of_stream(link, session, end),
            What::Handler { node, life, id, exit } => {
                if self.nodes[node].life == life {
                    self.input(node, Input::HandlerDone { id: HandlerId(id), exit });
                }
            }
            What::Plan(step) => self.due.push(step),
        }
    }

    fn session(&mut self, link: (usize, usize), id: u64) -> Option<&mut Session> {
        self.links.get_mut(&link)?.session.as_mut().filter(|s| s.id == id)
    }

    /// Hands an input to a running core and carries out what it wants.
    pub fn input(&mut self, n: usize, input: Input) {
        let Some(mut core) = self.nodes[n].core.take() else { return };
        self.dirty = true;
        if self.trace {
            let text = match &input {
                Input::Admin(id, Command::Attach { .. }) => format!("Admin({id:?}, Attach)"),
                input => short(&format!("{input:?}")),
            };
            self.say(|| format!("{} <- {text}", self.name(n)));
        }
        core.handle(Time(self.now), input);
        let mut outputs = Vec::new();
        while let Some(o) = core.poll_output() {
            outputs.push(o);
            if outputs.len() > OUTPUTS_MAX {
                self.fail(format!("{}: one input made more than 50000 outputs", self.name(n)));
                break;
            }
        }
        let due = core.next_timeout();
        self.nodes[n].core = Some(core);
        for o in outputs {
            self.output(n, o);
        }
        self.arm(n, due.map(|t| t.0));
    }

    fn arm(&mut self, n: usize, due: Option<u64>) {
        let Some(due) = due else {
            self.nodes[n].timer = None;
            return;
        };
        let due = due.max(self.now);
        if self.nodes[n].timer.is_some_and(|(t, _)| t == due) {
            return;
        }
        self.next += 1;
        let number = self.next;
        self.nodes[n].timer = Some((due, number));
        self.schedule(due, What::Timer { node: n, number });
    }

    fn output(&mut self, n: usize, o: Output) {
        if self.trace {
            match &o {
                Output::Event(_) => {}
                Output::Log { scope, text, .. } => {
                    self.say(|| format!("{} log {scope}: {text}", self.name(n)))
                }
                o => {
                    let text = short(&format!("{o:?}"));
                    self.say(|| format!("{} -> {text}", self.name(n)));
                }
            }
        }
        match o {
            Output::AdminDone(id, r) => {
                let node = &mut self.nodes[n];
                if node.commands.remove(&id.0).is_none() {
                    let name = self.name(n).to_string();
                    self.fail(format!("{name}: command {} was answered twice", id.0));
                    return;
                }
                node.answers.insert(id.0, r);
            }
            Output::BlockDone(id, r) => self.block_done(n, id.0, &r),
            Output::Connect(peer) => {
                let peer = usize::from(peer.get());
                let key = pair(n, peer);
                if let Some(l) = self.links.get_mut(&key) {
                    l.want[end_of(n, peer)] = true;
                }
                self.try_connect(key);
            }
            Output::CloseLink(peer) => self.close_link(n, usize::from(peer.get())),
            Output::Send { peer, stream, volume, packet, digest, data } => {
                self.send(n, usize::from(peer.get()), stream, volume, &packet, &digest, data);
            }
            Output::SetCodec { peer, receive, ctx } => {
                let peer = usize::from(peer.get());
                let end = end_of(n, peer);
                if let Some(s) = self.links.get_mut(&pair(n, peer)).and_then(|l| l.session.as_mut()) {
                    if receive { s.receive[end] = ctx } else { s.send[end] = ctx }
                }
            }
            Output::DiskRead { id, sector, len, .. } => self.submit(n, id, PendingIo::Read { sector, len }),
            Output::DiskWrite { id, sector, data, fua, .. } => match to_stamps(&data) {
                Some(stamps) => {
                    self.check_journal(n, sector, stamps.len() as u64);
                    self.submit(n, id, PendingIo::Write { sector, stamps, fua });
                }
                None => {
                    let name = self.name(n).to_string();
                    self.fail(format!("{name}: a write to sector {sector} carries a damaged payload"));
                }
            },
            Output::DiskZero { id, sector, len, .. } => {
                let stamps = vec![0; len as usize / 512];
                self.check_journal(n, sector, stamps.len() as u64);
                self.submit(n, id, PendingIo::Write { sector, stamps, fua: false });
            }
            Output::DiskFlush { id, .. } => {
                let upto = self.nodes[n].data.sequence();
                self.submit(n, id, PendingIo::Flush(upto));
            }
            Output::MetaWrite { id, pos, data, .. } => {
                let flush = self.nodes[n].data.sequence();
                self.submit(n, id, PendingIo::Meta { pos, data, flush });
            }
            Output::DropBacking(_) => {
                self.nodes[n].attached = false;
                self.nodes[n].layout = None;
            }
            Output::DeviceSize { size, .. } => self.nodes[n].size = size,
            Output::FrontEnd { present } => {
                self.nodes[n].front_end = present;
                if present {
                    self.eras += 1;
                    self.nodes[n].era = self.eras;
                }
            }
            Output::RunHandler { id, call } => {
                self.nodes[n].handlers_run.push(call.name.to_string());
                let exit = self.nodes[n].config.handlers.get(call.name).copied();
                let exit = if call.name == "fence-peer" { exit } else { Some(exit.unwrap_or(0)) };
                let d = self.delay((MS, 50 * MS));
                let life = self.nodes[n].life;
                self.schedule(self.now + d, What::Handler { node: n, life, id: id.0, exit });
            }
            Output::Event(_) => {}
            Output::Log { scope, text, .. } => {
                if let Some(l) = &mut self.log {
                    l.push(format!("{} {scope}: {text}", self.nodes[n].config.name));
                }
            }
        }
    }

    // ----- disks -----

    fn submit(&mut self, n: usize, id: IoId, io: PendingIo) {
        let node = &self.nodes[n];
        let name = &node.config.name;
        let range = |io: &PendingIo| match io {
            PendingIo::Read { sector, len } => Some((*sector, sector + u64::from(*len) / 512, false)),
            PendingIo::Write { sector, stamps, .. } => Some((*sector, sector + stamps.len() as u64, true)),
            _ => None,
        };
        let mut wrong = None;
        if !node.attached {
            wrong = Some(format!("{name}: {io:?} on a backing device that was released"));
        }
        if let Some((a, b, w)) = range(&io) {
            if b > node.data.sectors() || a >= b {
                wrong = Some(format!("{name}: I/O of sectors {a}..{b} is outside of the device"));
            }
            let clash = node.ios.values().filter_map(range).find(|(x, y, z)| *x < b && a < *y && *z && w);
            if let Some((x, y, _)) = clash {
                wrong = Some(format!("{name}: I/O of sectors {a}..{b} overlaps one in flight ({x}..{y})"));
            }
        }
        if let PendingIo::Meta { pos, data, .. } = &io {
            let end = pos + data.len() as u64;
            let clash = node.ios.values().any(|o| match o {
                PendingIo::Meta { pos: p, data: d, .. } => *p < end && *pos < p + d.len() as u64,
                _ => false,
            });
            if clash || pos % 4096 != 0 || data.len() % 4096 != 0 || data.is_empty() {
                wrong = Some(format!("{name}: metadata write at {pos} is misaligned or overlaps another"));
            }
        }
        if node.ios.len() > IOS_MAX {
            wrong = Some(format!("{name}: more than {IOS_MAX} operations are in flight"));
        }
        if let Some(w) = wrong {
            self.fail(w);
            return;
        }
        let d = match &io {
            PendingIo::Meta { .. } | PendingIo::Flush(_) => self.delay(self.speed.meta),
            _ => self.delay(self.speed.disk),
        };
        let life = self.nodes[n].life;
        self.nodes[n].ios.insert(id.0, io);
        self.schedule(self.now + d, What::Io { node: n, life, id: id.0 });
    }

    /// A write must not touch an extent that the journal on disk does not name, unless the disk is known to be
    /// a mixture anyway.
    fn check_journal(&mut self, n: usize, sector: u64, count: u64) {
        let node = &mut self.nodes[n];
        let disk = node.core.as_ref().map_or(DiskState::Diskless, |c| c.state().disk(VOLUME));
        if !node.config.disk.al_updates || disk <= DiskState::Inconsistent || count == 0 {
            return;
        }
        let extents = (sector >> 13) as u32..=((sector + count - 1) >> 13) as u32;
        let hot = node.hot_extents();
        if let Some(cold) = extents.into_iter().find(|e| !hot.contains(e)) {
            let name = self.name(n).to_string();
            self.fail(format!(
                "{name}: write to sector {sector} while extent {cold} is not in the activity log on disk"
            ));
        }
    }

    fn io_completed(&mut self, n: usize, life: u64, id: u64) {
        let node = &mut self.nodes[n];
        if node.life != life {
            return;
        }
        let Some(io) = node.ios.remove(&id) else { return };
        let result = match io {
            PendingIo::Read { .. } | PendingIo::Write { .. } if node.failing => Err(IoError::Failed),
            PendingIo::Read { sector, len } => {
                let mut stamps = node.data.read(sector, len);
                // A front end may read what it is writing: each sector is old or new.
                for w in node.ios.values() {
                    let PendingIo::Write { sector: first, stamps: new, .. } = w else { continue };
                    for (s, v) in (*first..).zip(new) {
                        let at = s.checked_sub(sector).and_then(|i| stamps.get_mut(i as usize));
                        if let Some(old) = at.filter(|_| self.rng.chance(50)) {
                            *old = *v;
                        }
                    }
                }
                Ok(to_bytes(&stamps))
            }
            PendingIo::Write { sector, stamps, fua } => {
                node.data.write(sector, &stamps, fua);
                Ok(Bytes::new())
            }
            PendingIo::Flush(upto) => {
                node.data.flushed(upto);
                Ok(Bytes::new())
            }
            PendingIo::Meta { pos, data, flush } => {
                node.data.flushed(flush);
                node.hot = None;
                if node.meta.as_ref().is_some_and(|m| m.write(pos, &data)) {
                    Ok(Bytes::new())
                } else {
                    Err(IoError::Failed)
                }
            }
        };
        self.input(n, Input::IoDone { id: IoId(id), result });
    }

    // ----- links -----

    fn try_connect(&mut self, key: (usize, usize)) {
        let d = self.delay((MS, 20 * MS));
        let Some(l) = self.links.get_mut(&key) else { return };
        if l.ready() {
            l.connecting = true;
            l.attempt += 1;
            let attempt = l.attempt;
            self.schedule(self.now + d, What::Connect { link: key, attempt });
        }
    }

    fn establish(&mut self, key: (usize, usize), attempt: u64) {
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
    fn send(
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
    fn post(&mut self, key: (usize, usize), direction: usize, parcel: Parcel) {
        let d = self.delay(self.speed.net);
        let end_stream = self.rng.below(2) as usize;
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

    fn arrival(&mut self, key: (usize, usize), id: u64, direction: usize, parcel: Parcel) {
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

    fn deliver(&mut self, key: (usize, usize), id: u64, direction: usize, parcel: Parcel) {
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
    fn end_of_stream(&mut self, key: (usize, usize), id: u64, end: usize) {
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

    fn forget_session(&mut self, key: (usize, usize)) {
        if let Some(l) = self.links.get_mut(&key)
            && l.session.as_ref().is_some_and(|s| s.open == [false; 2])
        {
            l.session = None;
        }
    }

    fn close_link(&mut self, n: usize, peer: usize) {
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
            let d = self.rng.range(US, 200 * US);
            let life = self.nodes[n].life;
            self.schedule(self.now + d, What::LinkDown { node: n, life, peer, why: LinkError::Closed });
        }
        self.try_connect(key);
    }

    /// Cuts (or mends) one direction.
    pub fn set_cut(&mut self, from: usize, to: usize, cut: bool) {
        let direction = end_of(from, to);
        let key = pair(from, to);
        let kill = self.rng.chance(50);
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
                let d = self.now + self.rng.range(US, 50 * MS);
                self.schedule(d, What::Reset { link: key, session: id, end: 0 });
                let d = self.now + self.rng.range(US, 50 * MS);
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
                let d = self.now + self.rng.range(MS, 50 * MS);
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
            let d = self.now + self.rng.range(US, 5 * MS);
            self.schedule(d, What::Reset { link: key, session: id, end });
        }
    }

    // ----- machines -----

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
        self.rng.next();
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
            let held = |s: u64, stamp: u64| {
                self.nodes.iter().any(|m| {
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

    /// Starts a node that was stopped; peers that still believe in its old connections get resets.
    pub fn restart(&mut self, n: usize) {
        if self.nodes[n].core.is_some() {
            return;
        }
        for m in (0..self.nodes.len()).filter(|m| *m != n) {
            let (key, end) = (pair(n, m), end_of(n, m));
            let d = self.now + self.rng.range(MS, 100 * MS);
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

    // ----- front ends -----

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

    fn block_done(&mut self, n: usize, id: u64, r: &BlockResult) {
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
                self.history.answer(id, req.sector, req.count, self.now, ok, fua);
                if ok {
                    self.counts.0 += 1;
                    self.wrote(n, req.era);
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
                if !self.check_reads {
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

    /// At most one Primary completes writes: terms of office do not interleave.
    fn wrote(&mut self, n: usize, era: u64) {
        if self.writer == era || !self.check_writers {
            self.writer = era;
            return;
        }
        if self.past_writers.contains(&era) {
            let name = self.name(n).to_string();
            self.fail(format!("{name}: two Primaries complete writes at the same time"));
        }
        self.past_writers.insert(self.writer);
        self.writer = era;
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

/// What a front end does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontOp {
    /// Read `count` sectors.
    Read {
        /// First sector.
        sector: u64,
        /// Sectors.
        count: u64,
    },
    /// Write `count` sectors of new content.
    Write {
        /// First sector.
        sector: u64,
        /// Sectors.
        count: u64,
        /// Forced unit access.
        fua: bool,
    },
    /// Discard or write zeroes.
    Zero {
        /// First sector.
        sector: u64,
        /// Sectors.
        count: u64,
        /// Discard.
        discard: bool,
    },
    /// Flush.
    Flush,
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

/// A text of bounded length for traces.
#[must_use]
pub fn short(s: &str) -> String {
    if s.len() <= 300 { s.to_string() } else { s.chars().take(300).collect::<String>() + "..." }
}
