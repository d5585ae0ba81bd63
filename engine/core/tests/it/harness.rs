//! Cores wired together directly: disks, links and the clock are in the hands of the test.
//!
//! Everything happens at once unless a test holds it back: I/O of one kind on one node ([`Cluster::slow`]) or
//! packets ([`Cluster::hold`]). `TRACE=1` prints packets and log lines.

use bytes::Bytes;
use palisade_core::auth::Secret;
use palisade_core::config::{CoreConfig, DiskConfig, NetConfig, QuorumOption, ResourceConfig};
use palisade_core::io::{
    AdminId, Backing, BlockId, BlockOp, BlockResult, Command, Input, IoError, IoId, LinkError, Output,
    PeerSpec, Stream,
};
use palisade_core::types::{NodeId, Time, VolumeNr};
use palisade_core::{AdminError, Core};
use palisade_metadata::al::{initialized_block, replay};
use palisade_metadata::{Bitmap, Geometry, Kind, Layout, Superblock, Version, apply_al};
use palisade_wire::Packet;
use palisade_wire::enums::{ConnState, DiskState, ReplState};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// The only volume.
pub const V: VolumeNr = VolumeNr(0);
/// Bytes of a backing device: three activity-log extents, the last one shared with the metadata.
const DISK: u64 = 12 << 20;
/// Sectors of an activity-log extent.
pub const EXTENT: u64 = 8192;

pub fn id(n: u8) -> NodeId {
    NodeId::new(n).unwrap()
}

/// Options every connection starts with.
pub fn net() -> NetConfig {
    NetConfig { auth: Some(("sha256".into(), Secret::new("secret"))), ..NetConfig::default() }
}

fn layout() -> Layout {
    Layout::compute(Kind::Internal, DISK, None, Geometry::new(3)).unwrap()
}

fn pair(a: u8, b: u8) -> (u8, u8) {
    (a.min(b), a.max(b))
}

/// I/O that a node can be slow with. What is written is on disk when the write completes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Slow {
    /// Metadata writes.
    Meta,
    Read,
    /// Data writes.
    Write,
    Flush,
}

/// An operation the disk has not completed.
struct HeldIo {
    node: usize,
    io: IoId,
    /// Result of a read.
    data: Bytes,
    /// First sector and payload of a data write.
    write: Option<(u64, Bytes)>,
    /// Position and payload of a metadata write.
    meta: Option<(u64, Bytes)>,
}

impl HeldIo {
    fn new(node: usize, io: IoId) -> Self {
        Self { node, io, data: Bytes::new(), write: None, meta: None }
    }
}

type Choice = Box<dyn Fn(u8, u8, &Packet) -> bool>;

/// A packet a core has sent.
pub struct Sent {
    pub from: u8,
    pub to: u8,
    pub packet: Packet,
    pub data: Bytes,
}

pub struct Node {
    pub core: Core,
    pub data: Vec<u8>,
    meta: BTreeMap<u64, [u8; 4096]>,
    dialing: BTreeSet<NodeId>,
    admin: BTreeMap<u64, Result<(), AdminError>>,
    blocks: BTreeMap<u64, BlockResult>,
}

pub struct Cluster {
    pub nodes: Vec<Node>,
    now: Time,
    quorum: QuorumOption,
    links: BTreeSet<(u8, u8)>,
    cut: BTreeSet<(u8, u8)>,
    inbox: VecDeque<(usize, Input)>,
    next: u64,
    starts: u8,
    trace: bool,
    slow: BTreeSet<(usize, Slow)>,
    held_io: Vec<HeldIo>,
    lose: Option<Choice>,
    hold: Option<Choice>,
    held_packets: Vec<(usize, Input)>,
    /// What was sent, until a test clears it.
    pub sent: Vec<Sent>,
}

// ----- making a cluster -----

impl Cluster {
    /// All nodes configured, attached to fresh disks and connecting.
    pub fn new(n: u8, quorum: QuorumOption) -> Self {
        let mut c = Self {
            nodes: Vec::new(),
            now: Time(1_000_000_000),
            quorum,
            links: BTreeSet::new(),
            cut: BTreeSet::new(),
            inbox: VecDeque::new(),
            next: 1,
            starts: 0,
            trace: std::env::var_os("TRACE").is_some(),
            slow: BTreeSet::new(),
            held_io: Vec::new(),
            lose: None,
            hold: None,
            held_packets: Vec::new(),
            sent: Vec::new(),
        };
        for i in 0..n {
            let core = c.new_core(i);
            c.nodes.push(Node {
                core,
                data: vec![0; layout().usable_sectors as usize * 512],
                meta: BTreeMap::new(),
                dialing: BTreeSet::new(),
                admin: BTreeMap::new(),
                blocks: BTreeMap::new(),
            });
        }
        for i in 0..n as usize {
            c.configure(i);
            c.attach(i);
        }
        for i in 0..n as usize {
            c.connect(i);
        }
        c
    }

    /// Connected, UpToDate, node 0 Primary.
    pub fn formed(n: u8) -> Self {
        let mut c = Self::new(n, QuorumOption::Off);
        c.wait_connected();
        c.ok(0, Command::Promote { force: true });
        c.wait("initial sync", Self::all_up_to_date);
        c.assert_equal();
        c
    }

    /// Three nodes with `quorum majority`, UpToDate without an initial sync, node 0 Primary.
    pub fn formed_with_quorum() -> Self {
        let mut c = Self::new(3, QuorumOption::Majority);
        c.wait_connected();
        c.ok(0, Command::NewCurrentUuid { vnr: V, clear_bitmap: true, force_resync: false });
        c.wait("uptodate", Self::all_up_to_date);
        c.ok(0, Command::Promote { force: false });
        c
    }

    fn new_core(&mut self, i: u8) -> Core {
        self.starts += 1;
        Core::new(CoreConfig {
            name: format!("r{i}"),
            node_id: id(i),
            resource: ResourceConfig { quorum: self.quorum, ..ResourceConfig::default() },
            seed: [self.starts; 32],
        })
    }

    fn peers_of(&self, i: usize) -> impl Iterator<Item = u8> + use<> {
        (0..self.nodes.len() as u8).filter(move |p| *p as usize != i)
    }

    fn configure(&mut self, i: usize) {
        self.ok(i, Command::NewVolume { vnr: V, minor: 0 });
        for p in self.peers_of(i) {
            self.ok(
                i,
                Command::NewPeer(PeerSpec { id: id(p), name: format!("n{p}"), net: net(), diskful: true }),
            );
        }
    }

    fn connect(&mut self, i: usize) {
        for p in self.peers_of(i) {
            self.ok(i, Command::Connect { peer: id(p), discard_my_data: false, tentative: false });
        }
    }

    pub fn attach(&mut self, i: usize) {
        self.attach_with(i, DiskConfig::default());
    }

    /// Reads the metadata as it was written, with the activity log applied (`spec/metadata.md` §7.5, §8).
    pub fn attach_with(&mut self, i: usize, disk: DiskConfig) {
        let layout = layout();
        let meta = &mut self.nodes[i].meta;
        let mut superblock = meta
            .get(&layout.md_offset)
            .map_or_else(|| Superblock::fresh(Version::V09, &layout), |b| Superblock::decode(b).unwrap());
        let mut bitmap = Bitmap::new(3, superblock.effective_size_sectors, 4096).unwrap();
        for nr in 0..bitmap.disk_blocks() {
            if let Some(block) = meta.get(&layout.bitmap_block_pos(nr)) {
                bitmap.load_block(nr, block);
            }
        }
        let mut ring = Vec::new();
        for nr in 0..layout.al_blocks() {
            ring.extend(meta.get(&layout.al_block_pos(nr)).copied().unwrap_or_else(initialized_block));
        }
        let log = replay(superblock.al_stripes, superblock.al_stripe_size_4k, &ring);
        let applied = apply_al(&mut superblock, &log, &mut bitmap).unwrap();
        for nr in bitmap.take_dirty() {
            let mut block = [0; 4096];
            bitmap.encode_block(nr, &mut block);
            meta.insert(layout.bitmap_block_pos(nr), block);
        }
        if applied.reinitialize_ring {
            for nr in 0..layout.al_blocks() {
                meta.insert(layout.al_block_pos(nr), initialized_block());
            }
        }
        meta.insert(layout.md_offset, superblock.encode());
        let backing = Backing {
            superblock,
            bitmap,
            layout,
            logical_block_size: 512,
            physical_block_size: 4096,
            discard: true,
            discard_zeroes: true,
        };
        self.ok(i, Command::Attach { vnr: V, backing: Box::new(backing), disk });
    }

    /// The node dies; operations its disk was slow with never happen.
    pub fn crash(&mut self, i: usize) {
        self.held_io.retain(|h| h.node != i);
        self.slow.retain(|(n, _)| *n != i);
        for p in self.peers_of(i) {
            self.break_link(i as u8, p);
        }
        self.inbox.retain(|(n, _)| *n != i);
        let core = self.new_core(i as u8);
        let node = &mut self.nodes[i];
        node.core = core;
        node.dialing.clear();
        node.blocks.clear();
        self.settle();
    }

    /// The node is back after [`Self::crash`].
    pub fn start(&mut self, i: usize) {
        self.configure(i);
        self.attach(i);
        self.connect(i);
    }
}

// ----- commands and I/O -----

impl Cluster {
    /// Hands a command in without waiting for the answer.
    pub fn begin(&mut self, i: usize, c: Command) -> u64 {
        let a = self.next;
        self.next += 1;
        self.inbox.push_back((i, Input::Admin(AdminId(a), c)));
        self.settle();
        a
    }

    pub fn answer(&mut self, i: usize, a: u64) -> Option<Result<(), AdminError>> {
        self.nodes[i].admin.remove(&a)
    }

    pub fn admin(&mut self, i: usize, c: Command) -> Result<(), AdminError> {
        let a = self.begin(i, c);
        for _ in 0..200 {
            if let Some(r) = self.answer(i, a) {
                return r;
            }
            self.advance(Duration::from_millis(50));
        }
        panic!("command not answered: {:?}", self.nodes[i].core.state());
    }

    pub fn ok(&mut self, i: usize, c: Command) {
        let text = format!("{c:?}");
        if let Err(e) = self.admin(i, c) {
            panic!("node {i}: {text}: {e}");
        }
    }

    /// Hands a request in without waiting for its completion.
    pub fn submit(&mut self, i: usize, op: BlockOp) -> u64 {
        let b = self.next;
        self.next += 1;
        self.inbox.push_back((i, Input::Block { id: BlockId(b), vnr: V, op }));
        self.settle();
        b
    }

    /// A write of 4 KiB, not waited for.
    pub fn submit_write(&mut self, i: usize, sector: u64, byte: u8) -> u64 {
        self.submit(i, BlockOp::Write { sector, data: Bytes::from(vec![byte; 4096]), fua: false })
    }

    pub fn result(&self, i: usize, b: u64) -> Option<&BlockResult> {
        self.nodes[i].blocks.get(&b)
    }

    /// Waits up to two seconds.
    pub fn completion(&mut self, i: usize, b: u64) -> BlockResult {
        for _ in 0..40 {
            if let Some(r) = self.nodes[i].blocks.remove(&b) {
                return r;
            }
            self.advance(Duration::from_millis(50));
        }
        panic!("request not completed: {:?}", self.nodes[i].core.state());
    }

    pub fn io(&mut self, i: usize, op: BlockOp) -> BlockResult {
        let b = self.submit(i, op);
        self.completion(i, b)
    }

    pub fn write(&mut self, i: usize, sector: u64, len: usize, byte: u8) {
        let r = self.io(i, BlockOp::Write { sector, data: Bytes::from(vec![byte; len]), fua: false });
        assert_eq!(r, BlockResult::Done);
    }

    /// The first byte a read through node `i` gives.
    pub fn read(&mut self, i: usize, sector: u64) -> u8 {
        match self.io(i, BlockOp::Read { sector, len: 4096 }) {
            BlockResult::Data(d) => d[0],
            other => panic!("read gave {other:?}"),
        }
    }

    /// A packet that node `from` did not think of.
    pub fn inject(&mut self, from: u8, to: usize, stream: Stream, packet: Packet) {
        self.inbox.push_back((
            to,
            Input::Packet {
                peer: id(from),
                stream,
                volume: Some(V.0),
                packet,
                digest: Bytes::new(),
                data: Bytes::new(),
            },
        ));
        self.settle();
    }
}

// ----- slow disks -----

impl Cluster {
    pub fn slow(&mut self, i: usize, what: Slow) {
        self.slow.insert((i, what));
    }

    /// Disks are fast again and complete everything, oldest first.
    pub fn release(&mut self) {
        self.slow.clear();
        for h in std::mem::take(&mut self.held_io) {
            self.land(h);
        }
        self.settle();
    }

    /// The oldest operation completes; what comes later is still held.
    pub fn release_one(&mut self) {
        let h = self.held_io.remove(0);
        self.land(h);
        self.settle();
    }

    /// Everything held fails.
    pub fn fail_held(&mut self) {
        self.slow.clear();
        for h in std::mem::take(&mut self.held_io) {
            self.inbox.push_back((h.node, Input::IoDone { id: h.io, result: Err(IoError::Failed) }));
        }
        self.settle();
    }

    pub fn held(&self) -> usize {
        self.held_io.len()
    }

    /// Data writes in progress that touch the sector.
    pub fn writes_in_flight(&self, i: usize, sector: u64) -> usize {
        let touches = |(at, data): &(u64, Bytes)| *at <= sector && sector < at + data.len() as u64 / 512;
        self.held_io.iter().filter(|h| h.node == i && h.write.as_ref().is_some_and(touches)).count()
    }

    fn land(&mut self, h: HeldIo) {
        if let Some((sector, data)) = h.write {
            let at = sector as usize * 512;
            self.nodes[h.node].data[at..at + data.len()].copy_from_slice(&data);
        }
        if let Some((pos, data)) = h.meta {
            for (nr, block) in data.as_chunks().0.iter().enumerate() {
                self.nodes[h.node].meta.insert(pos + nr as u64 * 4096, *block);
            }
        }
        self.inbox.push_back((h.node, Input::IoDone { id: h.io, result: Ok(h.data) }));
    }
}

// ----- links -----

impl Cluster {
    /// Packets that are lost from now on.
    pub fn lose(&mut self, choice: impl Fn(u8, u8, &Packet) -> bool + 'static) {
        self.lose = Some(Box::new(choice));
    }

    pub fn lose_nothing(&mut self) {
        self.lose = None;
    }

    /// Packets that stay on the way from now on.
    pub fn hold(&mut self, choice: impl Fn(u8, u8, &Packet) -> bool + 'static) {
        self.hold = Some(Box::new(choice));
    }

    /// Held packets arrive.
    pub fn deliver(&mut self) {
        self.hold = None;
        self.inbox.extend(std::mem::take(&mut self.held_packets));
        self.settle();
    }

    /// Changes the data of held packets.
    pub fn tamper(&mut self, change: impl Fn(&mut Bytes)) {
        for (_, input) in &mut self.held_packets {
            if let Input::Packet { data, .. } = input {
                change(data);
            }
        }
    }

    pub fn held_packets(&self) -> usize {
        self.held_packets.len()
    }

    /// The sockets break; the nodes connect again at once.
    pub fn break_link(&mut self, a: u8, b: u8) {
        let of_link = |(to, input): &(usize, Input)| match input {
            Input::Packet { peer, .. } => pair(*to as u8, peer.get()) == pair(a, b),
            _ => false,
        };
        self.held_packets.retain(|p| !of_link(p));
        if self.links.remove(&pair(a, b)) {
            for (x, y) in [(a, b), (b, a)] {
                self.inbox
                    .push_back((x as usize, Input::LinkDown { peer: id(y), why: LinkError::BrokenPipe }));
            }
        }
    }

    pub fn cut_link(&mut self, a: u8, b: u8) {
        self.cut_links(&[(a, b)]);
    }

    /// All at the same moment.
    pub fn cut_links(&mut self, links: &[(u8, u8)]) {
        for (a, b) in links {
            self.cut.insert(pair(*a, *b));
            self.break_link(*a, *b);
        }
        self.settle();
    }

    /// The cable is good again; the nodes connect.
    pub fn mend(&mut self, a: u8, b: u8) {
        self.cut.remove(&pair(a, b));
        self.settle();
    }

    pub fn heal(&mut self) {
        self.cut.clear();
        self.settle();
        self.advance(Duration::from_secs(3));
    }

    pub fn linked(&self, a: u8, b: u8) -> bool {
        self.links.contains(&pair(a, b))
    }

    fn dial(&mut self) -> bool {
        for a in 0..self.nodes.len() as u8 {
            for b in a + 1..self.nodes.len() as u8 {
                let both = self.nodes[a as usize].dialing.contains(&id(b))
                    && self.nodes[b as usize].dialing.contains(&id(a));
                if both && !self.cut.contains(&(a, b)) && !self.linked(a, b) {
                    self.nodes[a as usize].dialing.remove(&id(b));
                    self.nodes[b as usize].dialing.remove(&id(a));
                    self.links.insert((a, b));
                    for (x, y, resolve_conflicts) in [(a, b, false), (b, a, true)] {
                        self.inbox.push_back((x as usize, Input::LinkUp { peer: id(y), resolve_conflicts }));
                    }
                    return true;
                }
            }
        }
        false
    }
}

// ----- running -----

impl Cluster {
    /// Until nothing is left to do without time passing.
    pub fn settle(&mut self) {
        for _ in 0..200_000 {
            if self.inbox.is_empty() && !self.dial() {
                return;
            }
            self.step();
        }
        panic!("the cluster does not settle");
    }

    /// One input.
    fn step(&mut self) {
        let Some((i, input)) = self.inbox.pop_front() else { return };
        match &input {
            Input::Packet { peer, .. } if !self.linked(i as u8, peer.get()) => return,
            Input::Packet { peer, packet, data, .. } if self.trace => {
                eprintln!("  {peer} -> {i}: {packet:?} +{}", data.len());
            }
            Input::LinkDown { peer, .. } => {
                self.links.remove(&pair(i as u8, peer.get()));
            }
            _ => {}
        }
        let now = self.now;
        self.nodes[i].core.handle(now, input);
        while let Some(o) = self.nodes[i].core.poll_output() {
            self.output(i, o);
        }
    }

    fn output(&mut self, i: usize, o: Output) {
        match o {
            Output::AdminDone(a, r) => {
                self.nodes[i].admin.insert(a.0, r);
            }
            Output::BlockDone(b, r) => {
                self.nodes[i].blocks.insert(b.0, r);
            }
            Output::Connect(n) => {
                self.nodes[i].dialing.insert(n);
            }
            Output::CloseLink(n) => {
                self.nodes[i].dialing.remove(&n);
                // What was sent before still arrives.
                self.inbox
                    .push_back((n.idx(), Input::LinkDown { peer: id(i as u8), why: LinkError::BrokenPipe }));
            }
            Output::Send { peer, stream, volume, packet, digest, data } => {
                let (from, to) = (i as u8, peer.get());
                self.sent.push(Sent { from, to, packet: packet.clone(), data: data.clone() });
                let is = |c: &Option<Choice>| c.as_ref().is_some_and(|c| c(from, to, &packet));
                let (lost, held) = (is(&self.lose), is(&self.hold));
                let input = Input::Packet { peer: id(from), stream, volume, packet, digest, data };
                if !self.linked(from, to) || lost {
                } else if held {
                    self.held_packets.push((to as usize, input));
                } else {
                    self.inbox.push_back((to as usize, input));
                }
            }
            Output::DiskRead { id, sector, len, .. } => {
                let at = sector as usize * 512;
                let data = Bytes::copy_from_slice(&self.nodes[i].data[at..at + len as usize]);
                self.operation(Slow::Read, HeldIo { data, ..HeldIo::new(i, id) });
            }
            Output::DiskWrite { id, sector, data, .. } => {
                self.operation(Slow::Write, HeldIo { write: Some((sector, data)), ..HeldIo::new(i, id) });
            }
            Output::DiskZero { id, sector, len, .. } => {
                let zeroes = Bytes::from(vec![0; len as usize]);
                self.operation(Slow::Write, HeldIo { write: Some((sector, zeroes)), ..HeldIo::new(i, id) });
            }
            Output::DiskFlush { id, .. } => self.operation(Slow::Flush, HeldIo::new(i, id)),
            Output::MetaWrite { id, pos, data, .. } => {
                self.operation(Slow::Meta, HeldIo { meta: Some((pos, data)), ..HeldIo::new(i, id) });
            }
            Output::RunHandler { id, .. } => {
                self.inbox.push_back((i, Input::HandlerDone { id, exit: Some(0) }));
            }
            Output::Log { level, scope, text } if self.trace => eprintln!("{i} {level:?} {scope}: {text}"),
            Output::Log { .. }
            | Output::SetCodec { .. }
            | Output::DropBacking(_)
            | Output::DeviceSize { .. }
            | Output::FrontEnd { .. }
            | Output::Event(_) => {}
        }
    }

    fn operation(&mut self, kind: Slow, h: HeldIo) {
        if self.slow.contains(&(h.node, kind)) {
            self.held_io.push(h);
        } else {
            self.land(h);
        }
    }

    /// Time passes.
    pub fn advance(&mut self, d: Duration) {
        let end = self.now + d;
        loop {
            let next = self.nodes.iter().filter_map(|n| n.core.next_timeout()).min().filter(|t| *t <= end);
            let Some(t) = next else { break };
            self.now = self.now.max(t);
            self.tick();
        }
        self.now = end;
        self.tick();
    }

    fn tick(&mut self) {
        self.inbox.extend((0..self.nodes.len()).map(|i| (i, Input::Timer)));
        self.settle();
    }

    /// Up to a minute.
    pub fn wait(&mut self, what: &str, f: impl Fn(&Self) -> bool) {
        for _ in 0..1200 {
            if f(self) {
                return;
            }
            self.advance(Duration::from_millis(50));
        }
        for n in &self.nodes {
            eprintln!("{:#?}", n.core.state());
        }
        panic!("waited in vain for: {what}");
    }

    pub fn wait_connected(&mut self) {
        let others = self.nodes.len() - 1;
        self.wait("connected", |c| {
            c.nodes.iter().all(|n| n.core.state().connected_mask().iter().count() == others)
        });
    }
}

// ----- what is seen -----

impl Cluster {
    pub fn disk(&self, i: usize) -> DiskState {
        self.nodes[i].core.state().disk(V)
    }

    pub fn repl(&self, i: usize, p: u8) -> ReplState {
        self.nodes[i].core.state().repl(id(p), V)
    }

    pub fn connected(&self, i: usize, p: u8) -> bool {
        self.nodes[i].core.state().cstate(id(p)) == ConnState::Connected
    }

    /// First byte of a sector on the disk.
    pub fn byte(&self, i: usize, sector: u64) -> u8 {
        self.nodes[i].data[sector as usize * 512]
    }

    /// KiB out of sync towards a peer.
    pub fn oos(&self, i: usize, p: u8) -> u64 {
        let status = self.nodes[i].core.status();
        let c = status.connections.iter().find(|c| c.peer == id(p));
        c.map_or(0, |c| c.peer_devices[0].out_of_sync_kib)
    }

    pub fn all_up_to_date(&self) -> bool {
        (0..self.nodes.len()).all(|i| {
            self.disk(i) == DiskState::UpToDate
                && self.peers_of(i).all(|p| {
                    self.repl(i, p) == ReplState::Established
                        && self.nodes[i].core.state().pdsk(id(p), V) == DiskState::UpToDate
                })
        })
    }

    pub fn assert_equal(&self) {
        for n in &self.nodes[1..] {
            assert!(n.data == self.nodes[0].data, "replicas differ");
        }
    }

    /// Everybody is UpToDate and equal; after a while nobody thinks otherwise.
    pub fn assert_heals(&mut self) {
        self.wait("everybody UpToDate", Self::all_up_to_date);
        self.advance(Duration::from_secs(1));
        self.assert_equal();
        self.wait("no bits left", |c| {
            c.all_up_to_date() && (0..c.nodes.len()).all(|i| c.peers_of(i).all(|p| c.oos(i, p) == 0))
        });
    }
}
