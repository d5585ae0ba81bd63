//! What a seed stands for: a cluster, and a list of things that happen to it.
//!
//! Every step carries what it needs, so that a step can be left out without changing the others.

use crate::node::NodeConfig;
use crate::rng::Rng;
use crate::world::{MS, SECOND, Speed, US};
use palisade_core::config::{OnNoQuorum, QuorumOption, ReadBalancing, RrConflict};
use palisade_wire::enums::{AfterSb, WireProtocol};
use std::time::Duration;

/// Something that happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// The cluster manager wants a Primary there, unless there is one elsewhere.
    Promote(usize),
    /// It gives up the Primary role.
    Demote(usize),
    /// Front ends of whoever is Primary issue requests.
    Load {
        /// Requests.
        count: u32,
        /// Longest pause between two, nanoseconds.
        gap: u64,
        /// What they do.
        seed: u64,
    },
    /// Both directions lose everything.
    Cut(usize, usize),
    /// One direction loses everything.
    CutOneWay(usize, usize),
    /// No link of that node works.
    Isolate(usize),
    /// That pair's link works again.
    Heal(usize, usize),
    /// All links work again.
    HealAll,
    /// The sockets of that pair break.
    Reset(usize, usize),
    /// Packets of one direction take that much longer, nanoseconds.
    Slow(usize, usize, u64),
    /// Power loss.
    Crash(usize),
    /// Power loss of all nodes at once.
    CrashAll,
    /// The process dies.
    Kill(usize),
    /// A dead node starts.
    Restart(usize),
    /// Administrator's disconnect.
    Disconnect(usize, usize, bool),
    /// Administrator's connect.
    Connect(usize, usize),
    /// Administrator's detach.
    Detach(usize, bool),
    /// Administrator's attach.
    Attach(usize),
    /// Full resync towards this node.
    Invalidate(usize),
    /// Resync of that peer.
    InvalidateRemote(usize, usize),
    /// The data device fails.
    FailDisk(usize),
    /// The data device works again.
    RepairDisk(usize),
    /// Freeze front ends.
    SuspendIo(usize),
    /// Thaw them.
    ResumeIo(usize),
    /// Pause resync.
    PauseSync(usize, usize),
    /// Continue it.
    ResumeSync(usize, usize),
}

/// A step of the plan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// When, nanoseconds after the cluster is ready.
    pub at: u64,
    /// What.
    pub op: Op,
}

/// A cluster and its fate.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The seed it was made from.
    pub seed: u64,
    /// Nodes.
    pub nodes: Vec<NodeConfig>,
    /// Delays.
    pub speed: Speed,
    /// Start with equal disks rather than with an initial resync.
    pub skip_initial_sync: bool,
    /// Without quorum: promote only nodes that must have everything.
    pub careful: bool,
    /// What happens, in order of time.
    pub steps: Vec<Step>,
}

fn settings(rng: &mut Rng) -> (Vec<NodeConfig>, bool) {
    let count = [2, 2, 2, 3, 3, 3, 3, 3, 4, 5][rng.below(10) as usize];
    let sectors = [1u64 << 11, 2 << 11, 6 << 11, 9 << 11][rng.below(4) as usize];
    let tiebreaker = count >= 3 && rng.chance(25);
    let names = ["a", "b", "c", "d", "e"];
    let mut nodes: Vec<NodeConfig> = (0..count).map(|n| NodeConfig::new(names[n], count, sectors)).collect();
    if tiebreaker {
        nodes[rng.below(count as u64) as usize].sectors = 0;
    }
    let quorum = count >= 3;
    let protocol = match rng.below(10) {
        0 => WireProtocol::A,
        1 => WireProtocol::B,
        _ => WireProtocol::C,
    };
    let io_error = rng.chance(50);
    let ping = Duration::from_secs(rng.range(1, 10));
    let timeout = Duration::from_millis(rng.range(20, 60) * 100);
    let integrity = rng.chance(15);
    let rle = rng.chance(70);
    let epoch = if rng.chance(30) { rng.range(20, 60) as u32 } else { 2048 };
    let rate = [250, 4_000, 102_400, 102_400][rng.below(4) as usize];
    let al_extents = if rng.chance(30) { 7 } else { 1237 };
    for node in &mut nodes {
        if quorum {
            node.resource.quorum = QuorumOption::Majority;
        }
        node.resource.on_no_quorum = if io_error { OnNoQuorum::IoError } else { OnNoQuorum::SuspendIo };
        node.resource.twopc_timeout = Duration::from_secs(5);
        node.disk.al_extents = al_extents;
        node.disk.read_balancing =
            if rng.chance(20) { ReadBalancing::RoundRobin } else { ReadBalancing::PreferLocal };
        node.max_peers = count as u32 - 1 + rng.below(2) as u32;
        node.peer_device.rate.resync_rate = rate;
        node.peer_device.rate.max_rate = rate.max(4_000);
        for net in &mut node.net {
            net.protocol = protocol;
            net.ping_int = ping;
            net.timeout = timeout;
            net.use_rle = rle;
            net.max_epoch_size = epoch;
            net.integrity_alg = integrity.then(|| "sha1".to_string());
            net.rr_conflict = RrConflict::Disconnect;
            net.after_sb_0pri = AfterSb::Disconnect;
        }
    }
    (nodes, !quorum)
}

fn op(rng: &mut Rng, n: usize) -> Op {
    let a = rng.below(n as u64) as usize;
    let b = (a + 1 + rng.below(n as u64 - 1) as usize) % n;
    let half = rng.chance(50);
    match rng.below(100) {
        0..=29 => {
            Op::Load { count: rng.range(1, 40) as u32, gap: rng.range(10, 3000) * US, seed: rng.draw() }
        }
        30..=41 => Op::Promote(a),
        42..=46 => Op::Demote(a),
        47..=49 => Op::Cut(a, b),
        50..=51 => Op::CutOneWay(a, b),
        52..=54 => Op::Isolate(a),
        55..=58 => Op::Heal(a, b),
        59..=63 => Op::HealAll,
        64..=66 => Op::Reset(a, b),
        67..=68 => Op::Slow(a, b, rng.below(300) * MS),
        69..=72 => Op::Crash(a),
        73 => Op::CrashAll,
        74..=76 => Op::Kill(a),
        77..=82 => Op::Restart(a),
        83..=84 => Op::Disconnect(a, b, half),
        85..=87 => Op::Connect(a, b),
        88 => Op::Detach(a, half),
        89..=91 => Op::Attach(a),
        92 => Op::Invalidate(a),
        93 => Op::InvalidateRemote(a, b),
        94 => Op::FailDisk(a),
        95 => Op::RepairDisk(a),
        96 => Op::SuspendIo(a),
        97 => Op::ResumeIo(a),
        98 => Op::PauseSync(a, b),
        _ => Op::ResumeSync(a, b),
    }
}

impl Plan {
    /// The plan of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let (nodes, careful) = settings(&mut rng);
        let net = rng.range(20, 500) * US;
        let disk = rng.range(10, 500) * US;
        let speed = Speed {
            net: (net, net * 4),
            disk: (disk, disk * 8),
            meta: (disk, disk * 8),
            spikes: rng.below(6),
        };
        let count = rng.range(4, 30) as usize;
        // Some plans are hectic, some leave time for every timeout.
        let pause = [200 * MS, SECOND, 5 * SECOND][rng.below(3) as usize];
        let calm = rng.chance(15);
        let early = nodes.iter().flat_map(|n| &n.net).any(|n| n.protocol != WireProtocol::C);
        let mut at = 0;
        let mut steps = vec![
            Step { at: 0, op: Op::Promote(rng.below(nodes.len() as u64) as usize) },
            Step { at: 100 * MS, op: Op::Load { count: 20, gap: MS, seed: rng.draw() } },
        ];
        for _ in 0..count {
            at += rng.range(MS, pause);
            let op = op(&mut rng, nodes.len());
            if calm && matches!(op, Op::Crash(_) | Op::CrashAll) {
                continue;
            }
            // Early acknowledged writes are on one disk only for a while: its loss is theirs.
            if early && matches!(op, Op::FailDisk(_) | Op::Detach(..)) {
                continue;
            }
            steps.push(Step { at, op });
        }
        Self { seed, nodes, speed, skip_initial_sync: rng.chance(60), careful, steps }
    }
}
