//! The whole cluster: virtual time, the queue of what happens next, and what each core wants done.

use crate::disk::{to_bytes, to_stamps};
use crate::front::History;
use crate::link::{Link, Parcel, Session};
use crate::node::{Node, NodeConfig, PendingIo, VOLUME};
use crate::rng::Rng;
use bytes::Bytes;
use palisade_core::Core;
use palisade_core::io::{Command, HandlerId, Input, IoError, IoId, LinkError, Output};
use palisade_core::types::{NodeId, Time};
use palisade_wire::enums::DiskState;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

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

pub(crate) enum What {
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

pub(crate) struct Event {
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
    /// Every delay is the middle of its range: scenarios do not change with the number of draws.
    pub steady: bool,
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
    /// The term of office that completed the last write, and when it completed its first.
    pub writer: (u64, u64),
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
    pub(crate) queue: BinaryHeap<Reverse<Event>>,
    order: u64,
    pub(crate) next: u64,
    eras: u64,
}

pub(crate) fn pair(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

/// Which end of its link with `b` node `a` is.
pub(crate) fn end_of(a: usize, b: usize) -> usize {
    usize::from(a > b)
}

pub(crate) fn node_id(i: usize) -> NodeId {
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
            steady: false,
            failure: None,
            trace: false,
            steps: 0,
            counts: (0, 0),
            past_writers: BTreeSet::new(),
            writer: (0, 0),
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

    pub(crate) fn say(&self, f: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>12.6} {}", self.now as f64 / 1e9, f());
        }
    }

    pub(crate) fn schedule(&mut self, at: u64, what: What) {
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

    pub(crate) fn delay(&mut self, range: (u64, u64)) -> u64 {
        if self.steady {
            return range.0.midpoint(range.1);
        }
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

    pub(crate) fn dispatch(&mut self, what: What) {
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
                // The note about a closed link comes before its successor is up, or not at all.
                let stale = why == palisade_core::io::LinkError::Closed && self.link_is_up(node, peer);
                if self.nodes[node].life == life && !stale {
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

    pub(crate) fn session(&mut self, link: (usize, usize), id: u64) -> Option<&mut Session> {
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

    pub(crate) fn arm(&mut self, n: usize, due: Option<u64>) {
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

    pub(crate) fn output(&mut self, n: usize, o: Output) {
        if self.trace {
            match &o {
                Output::Event(_) => {}
                Output::Log { scope, text, .. } => {
                    self.say(|| format!("{} log {scope}: {text}", self.name(n)));
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
                    // Protocols A and B: the predecessor may have completed what only it has, and goes on to.
                    if self.history.lossy && (0..self.nodes.len()).any(|m| m != n && self.nodes[m].front_end)
                    {
                        self.history.give_up();
                    }
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

    pub(crate) fn submit(&mut self, n: usize, id: IoId, io: PendingIo) {
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
    pub(crate) fn check_journal(&mut self, n: usize, sector: u64, count: u64) {
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

    pub(crate) fn io_completed(&mut self, n: usize, life: u64, id: u64) {
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

/// A text of bounded length for traces.
#[must_use]
pub fn short(s: &str) -> String {
    if s.len() <= 300 { s.to_string() } else { s.chars().take(300).collect::<String>() + "..." }
}
