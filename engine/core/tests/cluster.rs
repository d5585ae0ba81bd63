//! Cores wired together directly: what a cluster does when nothing goes wrong but the things a test asks for.

#![allow(clippy::unwrap_used, clippy::panic)]

use bytes::Bytes;
use palisade_core::config::{CoreConfig, DiskConfig, NetConfig, QuorumOption, ResourceConfig};
use palisade_core::io::{
    AdminId, Backing, BlockId, BlockOp, BlockResult, Command, Input, LinkError, Output, PeerSpec,
};
use palisade_core::types::{NodeId, Time, VolumeNr};
use palisade_core::{AdminError, Core};
use palisade_metadata::{Bitmap, Geometry, Kind, Layout, Superblock, Version};
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

const V: VolumeNr = VolumeNr(0);
const DISK: u64 = 8 << 20;

fn id(n: u8) -> NodeId {
    NodeId::new(n).unwrap()
}

struct Node {
    core: Core,
    data: Vec<u8>,
    meta: BTreeMap<u64, Bytes>,
    dialing: BTreeSet<NodeId>,
    admin: BTreeMap<u64, Result<(), AdminError>>,
    blocks: BTreeMap<u64, BlockResult>,
}

struct Cluster {
    nodes: Vec<Node>,
    now: Time,
    links: BTreeSet<(u8, u8)>,
    cut: BTreeSet<(u8, u8)>,
    /// Links that swallow packets.
    silent: BTreeSet<(u8, u8)>,
    inbox: VecDeque<(usize, Input)>,
    next: u64,
    trace: bool,
}

fn layout() -> Layout {
    Layout::compute(Kind::Internal, DISK, None, Geometry::new(3)).unwrap()
}

impl Cluster {
    fn new(n: u8, quorum: QuorumOption) -> Self {
        let mut c = Self {
            nodes: Vec::new(),
            now: Time(1_000_000_000),
            links: BTreeSet::new(),
            cut: BTreeSet::new(),
            silent: BTreeSet::new(),
            inbox: VecDeque::new(),
            next: 1,
            trace: std::env::var("TRACE").is_ok(),
        };
        for i in 0..n {
            let core = Core::new(CoreConfig {
                name: format!("r{i}"),
                node_id: id(i),
                resource: ResourceConfig { quorum, ..ResourceConfig::default() },
                seed: [i + 1; 32],
            });
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
            c.ok(i, Command::NewVolume { vnr: V, minor: 0 });
            for p in (0..n).filter(|p| *p as usize != i) {
                let net = NetConfig {
                    auth: Some(("sha256".into(), palisade_core::auth::Secret::new("secret"))),
                    ..NetConfig::default()
                };
                c.ok(i, Command::NewPeer(PeerSpec { id: id(p), name: format!("n{p}"), net, diskful: true }));
            }
            c.attach(i);
        }
        for i in 0..n as usize {
            for p in (0..n).filter(|p| *p as usize != i) {
                c.ok(i, Command::Connect { peer: id(p), discard_my_data: false, tentative: false });
            }
        }
        c.settle();
        c
    }

    fn attach(&mut self, i: usize) {
        let l = layout();
        let superblock = self.nodes[i].meta.get(&l.md_offset).map_or_else(
            || Superblock::fresh(Version::V09, &l),
            |b| {
                let mut block = [0u8; 4096];
                block.copy_from_slice(b);
                let mut sb = Superblock::decode(&block).unwrap();
                sb.mark_clean();
                sb
            },
        );
        let mut bitmap = Bitmap::new(3, superblock.effective_size_sectors, 4096).unwrap();
        for nr in 0..bitmap.disk_blocks() {
            if let Some(b) = self.nodes[i].meta.get(&l.bitmap_block_pos(nr)) {
                let mut block = [0u8; 4096];
                block.copy_from_slice(b);
                bitmap.load_block(nr, &block);
            }
        }
        let backing = Backing {
            superblock,
            bitmap,
            layout: l,
            logical_block_size: 512,
            physical_block_size: 4096,
            discard: true,
            discard_zeroes: true,
        };
        self.ok(i, Command::Attach { vnr: V, backing: Box::new(backing), disk: DiskConfig::default() });
    }

    fn admin(&mut self, i: usize, c: Command) -> Result<(), AdminError> {
        let a = self.next;
        self.next += 1;
        self.inbox.push_back((i, Input::Admin(AdminId(a), c)));
        self.settle();
        for _ in 0..200 {
            if let Some(r) = self.nodes[i].admin.remove(&a) {
                return r;
            }
            self.advance(Duration::from_millis(50));
        }
        panic!("command not answered: {:?}", self.nodes[i].core.state());
    }

    fn ok(&mut self, i: usize, c: Command) {
        let text = format!("{c:?}");
        if let Err(e) = self.admin(i, c) {
            panic!("node {i}: {text}: {e}");
        }
    }

    fn io(&mut self, i: usize, op: BlockOp) -> BlockResult {
        let b = self.next;
        self.next += 1;
        self.inbox.push_back((i, Input::Block { id: BlockId(b), vnr: V, op }));
        self.settle();
        for _ in 0..40 {
            if let Some(r) = self.nodes[i].blocks.remove(&b) {
                return r;
            }
            self.advance(Duration::from_millis(50));
        }
        panic!("request not completed: {:?}", self.nodes[i].core.state());
    }

    fn write(&mut self, i: usize, sector: u64, len: usize, byte: u8) {
        let r = self.io(i, BlockOp::Write { sector, data: Bytes::from(vec![byte; len]), fua: false });
        assert_eq!(r, BlockResult::Done);
    }

    fn linked(&self, a: u8, b: u8) -> bool {
        self.links.contains(&(a.min(b), a.max(b)))
    }

    fn settle(&mut self) {
        for _ in 0..200_000 {
            if let Some((i, input)) = self.inbox.pop_front() {
                if let Input::Packet { peer, .. } = &input
                    && !self.linked(i as u8, peer.get())
                {
                    continue;
                }
                if self.trace
                    && let Input::Packet { peer, packet, data, .. } = &input
                {
                    eprintln!("  {peer} -> {i}: {packet:?} +{}", data.len());
                }
                if let Input::LinkDown { peer, .. } = &input {
                    let p = peer.get();
                    self.links.remove(&((i as u8).min(p), (i as u8).max(p)));
                }
                let now = self.now;
                self.nodes[i].core.handle(now, input);
                self.drain(i);
            } else if !self.dial() {
                return;
            }
        }
        panic!("the cluster does not settle");
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
                    self.inbox
                        .push_back((a as usize, Input::LinkUp { peer: id(b), resolve_conflicts: false }));
                    self.inbox
                        .push_back((b as usize, Input::LinkUp { peer: id(a), resolve_conflicts: true }));
                    return true;
                }
            }
        }
        false
    }

    fn break_link(&mut self, a: u8, b: u8) {
        if self.links.remove(&(a.min(b), a.max(b))) {
            for (x, y) in [(a, b), (b, a)] {
                self.inbox
                    .push_back((x as usize, Input::LinkDown { peer: id(y), why: LinkError::BrokenPipe }));
            }
        }
    }

    fn cut_link(&mut self, a: u8, b: u8) {
        self.cut.insert((a.min(b), a.max(b)));
        self.break_link(a, b);
        self.settle();
    }

    fn heal(&mut self) {
        self.cut.clear();
        self.settle();
        self.advance(Duration::from_secs(3));
    }

    fn drain(&mut self, i: usize) {
        while let Some(o) = self.nodes[i].core.poll_output() {
            let mut done = None;
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
                    self.inbox.push_back((
                        n.idx(),
                        Input::LinkDown { peer: id(i as u8), why: LinkError::BrokenPipe },
                    ));
                }
                Output::Send { peer, stream, volume, packet, digest, data } => {
                    let (a, b) = (peer.get().min(i as u8), peer.get().max(i as u8));
                    if self.linked(a, b) && !self.silent.contains(&(a, b)) {
                        self.inbox.push_back((
                            peer.idx(),
                            Input::Packet { peer: id(i as u8), stream, volume, packet, digest, data },
                        ));
                    }
                }
                Output::DiskRead { id, sector, len, .. } => {
                    let at = sector as usize * 512;
                    let data = Bytes::copy_from_slice(&self.nodes[i].data[at..at + len as usize]);
                    done = Some((id, data));
                }
                Output::DiskWrite { id, sector, data, .. } => {
                    let at = sector as usize * 512;
                    self.nodes[i].data[at..at + data.len()].copy_from_slice(&data);
                    done = Some((id, Bytes::new()));
                }
                Output::DiskZero { id, sector, len, .. } => {
                    let at = sector as usize * 512;
                    self.nodes[i].data[at..at + len as usize].fill(0);
                    done = Some((id, Bytes::new()));
                }
                Output::DiskFlush { id, .. } => done = Some((id, Bytes::new())),
                Output::MetaWrite { id, pos, data, .. } => {
                    self.nodes[i].meta.insert(pos, data);
                    done = Some((id, Bytes::new()));
                }
                Output::RunHandler { id, .. } => {
                    self.inbox.push_back((i, Input::HandlerDone { id, exit: Some(0) }));
                }
                Output::Log { level, scope, text } => {
                    if self.trace {
                        eprintln!("{i} {level:?} {scope}: {text}");
                    }
                }
                Output::SetCodec { .. }
                | Output::DropBacking(_)
                | Output::DeviceSize { .. }
                | Output::FrontEnd { .. }
                | Output::Event(_) => {}
            }
            if let Some((id, data)) = done {
                self.inbox.push_back((i, Input::IoDone { id, result: Ok(data) }));
            }
        }
    }

    fn advance(&mut self, d: Duration) {
        let end = self.now + d;
        loop {
            let next = self.nodes.iter().filter_map(|n| n.core.next_timeout()).min().filter(|t| *t <= end);
            let Some(t) = next else { break };
            self.now = self.now.max(t);
            for i in 0..self.nodes.len() {
                self.inbox.push_back((i, Input::Timer));
            }
            self.settle();
        }
        self.now = end;
        for i in 0..self.nodes.len() {
            self.inbox.push_back((i, Input::Timer));
        }
        self.settle();
    }

    fn disk(&self, i: usize) -> DiskState {
        self.nodes[i].core.state().disk(V)
    }

    fn all_up_to_date(&self) -> bool {
        let n = self.nodes.len();
        (0..n).all(|i| {
            self.disk(i) == DiskState::UpToDate
                && (0..n).filter(|p| *p != i).all(|p| {
                    let s = self.nodes[i].core.state();
                    s.repl(id(p as u8), V) == ReplState::Established
                        && s.pdsk(id(p as u8), V) == DiskState::UpToDate
                })
        })
    }

    fn wait(&mut self, what: &str, f: impl Fn(&Self) -> bool) {
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

    fn assert_equal(&self) {
        for n in &self.nodes[1..] {
            assert!(n.data == self.nodes[0].data, "replicas differ");
        }
    }

    fn oos(&self, i: usize, p: u8) -> u64 {
        self.nodes[i]
            .core
            .status()
            .connections
            .iter()
            .find(|c| c.peer == id(p))
            .map_or(0, |c| c.peer_devices[0].out_of_sync_kib)
    }
}

fn formed(n: u8) -> Cluster {
    let mut c = Cluster::new(n, QuorumOption::Off);
    c.wait("connected", |c| {
        (0..n as usize).all(|i| c.nodes[i].core.state().connected_mask().iter().count() == n as usize - 1)
    });
    c.ok(0, Command::Promote { force: true });
    c.wait("initial sync", Cluster::all_up_to_date);
    c.assert_equal();
    c
}

#[test]
fn two_nodes_form_and_replicate() {
    let mut c = formed(2);
    c.write(0, 0, 4096, 0xaa);
    c.write(0, 8192, 65536, 0xbb);
    assert_eq!(c.io(0, BlockOp::Flush), BlockResult::Done);
    c.assert_equal();
    assert_eq!(c.oos(0, 1), 0);
    c.ok(0, Command::Demote { force: false });
    c.ok(1, Command::Promote { force: false });
    c.write(1, 16, 512, 0xcc);
    c.assert_equal();
    assert_eq!(c.nodes[0].core.state().peer_role(id(1)), Role::Primary);
}

#[test]
fn skip_initial_sync() {
    let mut c = Cluster::new(2, QuorumOption::Off);
    c.ok(0, Command::NewCurrentUuid { vnr: V, clear_bitmap: true, force_resync: false });
    c.wait("uptodate", Cluster::all_up_to_date);
    assert_eq!(c.oos(0, 1) + c.oos(1, 0), 0);
}

#[test]
fn a_node_that_was_away_gets_exactly_what_it_missed() {
    let mut c = formed(3);
    c.write(0, 0, 4096, 1);
    c.cut_link(0, 2);
    c.cut_link(1, 2);
    c.advance(Duration::from_secs(2));
    c.write(0, 80, 4096, 2);
    c.write(0, 8000, 8192, 3);
    assert_eq!(c.oos(0, 2), 12);
    c.advance(Duration::from_secs(1));
    assert_eq!(c.oos(1, 2), 12);
    c.heal();
    c.wait("resync", Cluster::all_up_to_date);
    c.assert_equal();
    c.advance(Duration::from_secs(2));
    for (i, p) in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)] {
        assert_eq!(c.oos(i, p), 0, "{i} towards {p}");
    }
}

#[test]
fn the_survivors_of_a_lost_primary_go_on() {
    let mut c = formed(3);
    c.write(0, 0, 4096, 1);
    c.cut_link(0, 1);
    c.cut_link(0, 2);
    c.wait("survivors", |c| c.disk(1) == DiskState::UpToDate && c.disk(2) == DiskState::UpToDate);
    c.ok(1, Command::Promote { force: false });
    c.write(1, 800, 4096, 7);
    assert_eq!(c.nodes[1].core.state().cstate(id(2)), ConnState::Connected);
    // The old Primary gives up and comes back as target.
    c.ok(0, Command::Demote { force: false });
    c.heal();
    c.wait("back", Cluster::all_up_to_date);
    c.assert_equal();
}

#[test]
fn quorum_majority_stops_the_minority() {
    let mut c = Cluster::new(3, QuorumOption::Majority);
    c.wait("connected", |c| (0..3).all(|i| c.nodes[i].core.state().connected_mask().iter().count() == 2));
    c.ok(0, Command::NewCurrentUuid { vnr: V, clear_bitmap: true, force_resync: false });
    c.wait("uptodate", Cluster::all_up_to_date);
    c.ok(0, Command::Promote { force: false });
    c.write(0, 0, 4096, 1);
    c.cut_link(0, 1);
    c.write(0, 0, 4096, 2);
    c.cut_link(0, 2);
    c.advance(Duration::from_secs(1));
    assert!(c.nodes[0].core.state().susp_quorum);
    c.ok(1, Command::Promote { force: false });
    c.write(1, 8, 4096, 3);
}

#[test]
fn detach_and_attach_resync_what_was_missed() {
    let mut c = formed(2);
    c.ok(1, Command::Detach { vnr: V, force: false });
    c.wait("diskless", |c| c.disk(1) == DiskState::Diskless);
    c.write(0, 160, 4096, 9);
    c.attach(1);
    c.wait("attached", Cluster::all_up_to_date);
    c.assert_equal();
}

#[test]
fn invalidate_resyncs_everything() {
    let mut c = formed(2);
    c.write(0, 160, 4096, 9);
    c.ok(1, Command::Invalidate { vnr: V, from: None, reset_bitmap: true });
    c.wait("resync", Cluster::all_up_to_date);
    c.assert_equal();
}

#[test]
fn split_brain_is_refused_and_resolved_by_discarding() {
    let mut c = formed(2);
    c.ok(0, Command::Demote { force: false });
    c.cut_link(0, 1);
    for i in 0..2 {
        c.ok(i, Command::Promote { force: false });
        c.write(i, 8 * i as u64, 4096, 1 + i as u8);
        c.ok(i, Command::Demote { force: false });
    }
    c.heal();
    c.wait("standalone", |c| {
        (0..2).all(|i| c.nodes[i].core.state().cstate(id(1 - i as u8)) == ConnState::StandAlone)
    });
    c.ok(1, Command::Connect { peer: id(0), discard_my_data: true, tentative: false });
    c.ok(0, Command::Connect { peer: id(1), discard_my_data: false, tentative: false });
    c.wait("resolved", Cluster::all_up_to_date);
    c.assert_equal();
}

#[test]
fn down_takes_everything_apart() {
    let mut c = formed(3);
    c.ok(0, Command::Demote { force: false });
    for i in 0..3 {
        c.ok(i, Command::Down);
        assert_eq!(c.disk(i), DiskState::Diskless);
    }
}

#[test]
fn writes_lost_with_the_quorum_are_issued_again() {
    let mut c = Cluster::new(3, QuorumOption::Majority);
    c.wait("connected", |c| (0..3).all(|i| c.nodes[i].core.state().connected_mask().iter().count() == 2));
    c.ok(0, Command::NewCurrentUuid { vnr: V, clear_bitmap: true, force_resync: false });
    c.wait("uptodate", Cluster::all_up_to_date);
    c.ok(0, Command::Promote { force: false });
    c.write(0, 0, 4096, 1);
    // Sent into a dead cable on both links: nobody else gets it.
    c.silent = [(0, 1), (0, 2)].into();
    c.inbox.push_back((
        0,
        Input::Block {
            id: BlockId(900_000),
            vnr: V,
            op: BlockOp::Write { sector: 64, data: Bytes::from(vec![5; 4096]), fua: false },
        },
    ));
    c.settle();
    c.cut_link(0, 1);
    c.cut_link(0, 2);
    c.silent.clear();
    c.advance(Duration::from_secs(2));
    assert!(!c.nodes[0].blocks.contains_key(&900_000), "completed without quorum");
    c.heal();
    c.wait("uptodate", Cluster::all_up_to_date);
    assert_eq!(c.nodes[0].blocks.get(&900_000), Some(&BlockResult::Done));
    c.assert_equal();
    assert_eq!(c.nodes[1].data[64 * 512], 5);
}
