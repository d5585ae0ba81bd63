//! The core itself: what it holds, how an input is taken, how a state change is made.

use crate::config::{CoreConfig, PeerDeviceConfig, ResourceConfig};
use crate::connection::{Connection, PeerDevice};
use crate::device::Devices;
use crate::io::{AdminId, BlockId, Event, HandlerCall, HandlerId, Input, IoId, LogLevel, Output};
use crate::read::ReadRequest;
use crate::replica::PeerRequest;
use crate::resync::LostPosition;
use crate::state::{self, Facts, Options, PdFacts, State};
use crate::tables::quorum::{PeerFacts, Quorum, QuorumInput, quorum};
use crate::tables::refusal::Refusal;
use crate::tables::uuid::same;
use crate::twopc::{Operation, Transaction};
use crate::types::{Entropy, NodeId, NodeMask, Time, VolumeNr};
use crate::write::{FlushRequest, PeerAckBatch, Request, TransferLogEntry};
use palisade_metadata::PeerFlags;
use palisade_wire::enums::{DiskState, ReplState, Role};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What an I/O completion belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum IoTag {
    AppWrite(u64),
    AppRead(u64),
    PeerWrite(u64),
    PeerRead {
        peer: NodeId,
        id: u64,
    },
    ResyncSourceRead {
        peer: NodeId,
        id: u64,
        lock: u64,
    },
    ResyncTargetWrite {
        peer: NodeId,
        id: u64,
    },
    EpochFlush {
        peer: NodeId,
        serial: u64,
    },
    AppFlush {
        id: u64,
    },
    ResyncFlush {
        peer: NodeId,
        serial: u64,
    },
    /// Before the position in a lost Primary's stream is told.
    ReconcileFlush,
    Meta,
}

/// Work that follows from a state change and is done after it (`spec/state-machine.md` §5.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Todo {
    /// Send the bitmap to start a resync.
    SendBitmap(NodeId, VolumeNr),
    /// The own bitmap and the peer's are merged: go on to the resync.
    BitmapDone(NodeId, VolumeNr),
    /// Requests and front-end queue of a volume may go on.
    Kick(VolumeNr),
    /// Replicated writes of a volume may go on.
    KickPeers(VolumeNr),
    /// Create a pending generation now.
    NewGeneration(VolumeNr),
    /// See whether a detached or failed disk is idle.
    DiskGone(VolumeNr),
    /// Tell all peers the own UUIDs, except one.
    SendUuids { vnr: VolumeNr, except: Option<NodeId>, got_stable: bool },
    /// See whether the resync as target is complete.
    CheckResyncEnd(NodeId, VolumeNr),
    /// Exchange positions in the stream of a lost Primary.
    Reconcile,
    /// Re-examine requests that were held while frozen.
    Thaw,
}

/// What to do when a handler ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum AfterHandler {
    Nothing,
    BeforeResync { peer: NodeId, vnr: VolumeNr, source: bool },
}

/// A command's refusal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AdminError {
    /// State-change result (negative) or configuration error (101..=176), `spec/state-machine.md` §3.1.
    pub code: i32,
    /// The reference's text.
    pub text: String,
    /// Explanations for the administrator.
    pub info: Vec<String>,
}

impl std::fmt::Display for AdminError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "({}) {}", self.code, self.text)?;
        for i in &self.info {
            write!(f, "; {i}")?;
        }
        Ok(())
    }
}

impl std::error::Error for AdminError {}

impl From<Refusal> for AdminError {
    fn from(r: Refusal) -> Self {
        Self { code: r.code(), text: r.to_string(), info: Vec::new() }
    }
}

impl From<crate::tables::refusal::ConfigError> for AdminError {
    fn from(e: crate::tables::refusal::ConfigError) -> Self {
        Self { code: e.code(), text: e.to_string(), info: Vec::new() }
    }
}

/// The replication state machine of one resource on one node. See the crate's documentation for the loop a
/// caller runs.
pub struct Core {
    pub(crate) cfg: CoreConfig,
    pub(crate) me: NodeId,
    pub(crate) now: Time,
    pub(crate) out: VecDeque<Output>,
    pub(crate) rng: Entropy,
    pub(crate) st: State,
    pub(crate) devs: Devices,
    pub(crate) conns: BTreeMap<NodeId, Connection>,
    pub(crate) pds: BTreeMap<(NodeId, VolumeNr), PeerDevice>,
    pub(crate) todo: VecDeque<Todo>,
    pub(crate) next_id: u64,
    pub(crate) ios: BTreeMap<u64, (VolumeNr, IoTag)>,
    pub(crate) handlers: BTreeMap<u64, AfterHandler>,

    pub(crate) transaction: Option<Transaction>,
    /// Transactions known to be finished, newest last: late packets of them are ignored.
    pub(crate) finished_tids: VecDeque<(u8, u32)>,
    pub(crate) operations: VecDeque<Operation>,
    pub(crate) members: NodeMask,
    pub(crate) down: Option<AdminId>,

    // Writer.
    pub(crate) requests: BTreeMap<u64, Request>,
    pub(crate) reads: BTreeMap<u64, ReadRequest>,
    pub(crate) flushes: BTreeMap<u64, FlushRequest>,
    pub(crate) transfer_log: VecDeque<TransferLogEntry>,
    pub(crate) dagtag: u64,
    pub(crate) epoch: u32,
    pub(crate) epoch_writes: u32,
    /// Writes of the current epoch not yet completed.
    pub(crate) epoch_open_writes: u32,
    /// A write of the current epoch was completed before every replica had it: nothing that follows may overtake it.
    pub(crate) epoch_must_end: bool,
    /// When the first write of the current epoch was sent, and when a write of it was last sent or completed.
    pub(crate) epoch_since: Time,
    pub(crate) epoch_touched: Time,
    pub(crate) peer_acks: PeerAckBatch,
    /// Completed writes withheld while frozen.
    pub(crate) held: BTreeSet<u64>,

    // Replica.
    pub(crate) peer_requests: BTreeMap<u64, PeerRequest>,
    /// Volumes whose identifiers every peer gets before it gets the next states.
    pub(crate) identifiers_first: BTreeSet<VolumeNr>,
    /// Reads of peers behind replicated writes of the same range: id, peer, volume.
    pub(crate) peer_reads_waiting: Vec<(u64, NodeId, VolumeNr)>,
    pub(crate) flush_sequence: u64,
    /// The Primary lost last, and how far this node got in its stream.
    pub(crate) lost_primary: Option<LostPosition>,
    /// When the survivors stop waiting for each other's positions.
    pub(crate) reconcile_until: Option<Time>,
    /// Flushes that are awaited before that position is told; `None` when it was, or there is none.
    pub(crate) reconcile_flushes: Option<u32>,
    pub(crate) read_toggle: bool,
    pub(crate) resync_timer: Option<Time>,
    pub(crate) watch: crate::watch::Watch,
    pub(crate) front_end: bool,
    pub(crate) events: BTreeSet<Event>,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core")
            .field("name", &self.cfg.name)
            .field("me", &self.me)
            .field("st", &self.st)
            .finish()
    }
}

impl Core {
    /// A resource without volumes and peers, Secondary.
    #[must_use]
    pub fn new(cfg: CoreConfig) -> Self {
        let me = cfg.node_id;
        let rng = Entropy::new(cfg.seed);
        Self {
            cfg,
            me,
            now: Time(0),
            out: VecDeque::new(),
            rng,
            st: State::new(),
            devs: Devices::new(),
            conns: BTreeMap::new(),
            pds: BTreeMap::new(),
            todo: VecDeque::new(),
            next_id: 1,
            ios: BTreeMap::new(),
            handlers: BTreeMap::new(),
            transaction: None,
            finished_tids: VecDeque::new(),
            operations: VecDeque::new(),
            members: me.mask(),
            down: None,
            requests: BTreeMap::new(),
            reads: BTreeMap::new(),
            flushes: BTreeMap::new(),
            transfer_log: VecDeque::new(),
            dagtag: 0,
            epoch: 0,
            epoch_writes: 0,
            epoch_open_writes: 0,
            epoch_must_end: false,
            epoch_since: Time(0),
            epoch_touched: Time(0),
            peer_acks: PeerAckBatch::default(),
            held: BTreeSet::new(),
            peer_requests: BTreeMap::new(),
            identifiers_first: BTreeSet::new(),
            peer_reads_waiting: Vec::new(),
            flush_sequence: 0,
            lost_primary: None,
            reconcile_until: None,
            reconcile_flushes: None,
            read_toggle: false,
            resync_timer: None,
            watch: crate::watch::Watch::default(),
            front_end: false,
            events: BTreeSet::new(),
        }
    }

    /// Takes one input. `now` must never go back.
    pub fn handle(&mut self, now: Time, input: Input) {
        self.now = self.now.max(now);
        match input {
            Input::Admin(id, command) => self.admin(id, command),
            Input::Block { id, vnr, op } => self.block_request(id, vnr, op),
            Input::Openers { vnr, rw, ro } => self.openers(vnr, rw, ro),
            Input::LinkUp { peer, resolve_conflicts } => self.link_up(peer, resolve_conflicts),
            Input::LinkDown { peer, why } => self.link_down(peer, why),
            Input::Packet { peer, stream, volume, packet, digest, data } => {
                self.packet(peer, stream, volume, packet, &digest, data);
            }
            Input::IoDone { id, result } => self.io_done(id, result),
            Input::HandlerDone { id, exit } => self.handler_done(id, exit),
            Input::Timer => {}
        }
        self.timers();
        self.settle();
    }

    /// The next thing to do, until `None`.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.out.pop_front()
    }

    /// Own node id.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        self.me
    }

    /// The scalar states.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.st
    }

    /// Resource options in force.
    #[must_use]
    pub fn resource_config(&self) -> &ResourceConfig {
        &self.cfg.resource
    }

    /// Follow-up work until there is none.
    fn settle(&mut self) {
        loop {
            if let Some(t) = self.todo.pop_front() {
                self.do_todo(t);
            } else if !self.run_operations() && !self.close_due_epoch() {
                break;
            }
        }
        for e in std::mem::take(&mut self.events) {
            self.out.push_back(Output::Event(e));
        }
    }

    fn do_todo(&mut self, t: Todo) {
        match t {
            Todo::SendBitmap(n, v) => self.send_bitmap(n, v),
            Todo::BitmapDone(n, v) => self.bitmap_done(n, v),
            Todo::Kick(v) => self.kick(v),
            Todo::KickPeers(v) => {
                self.kick_peers(v);
                for n in self.peers() {
                    self.write_resync_data(n, v);
                }
                self.serve_waiting(v);
                self.serve_peer_reads(v);
            }
            Todo::NewGeneration(v) => self.new_generation(v, false),
            Todo::DiskGone(v) => self.disk_gone(v),
            Todo::SendUuids { vnr, except, got_stable } => self.send_uuids_to_all(vnr, except, got_stable),
            Todo::CheckResyncEnd(n, v) => self.check_resync_end(n, v),
            Todo::Reconcile => self.reconcile_when_written(),
            Todo::Thaw => self.thaw(),
        }
    }

    pub(crate) fn todo(&mut self, t: Todo) {
        if !self.todo.contains(&t) {
            self.todo.push_back(t);
        }
    }

    pub(crate) fn id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    pub(crate) fn io(&mut self, vnr: VolumeNr, tag: IoTag) -> IoId {
        let id = self.id();
        self.ios.insert(id, (vnr, tag));
        if let Some(d) = self.devs.get_mut(&vnr) {
            d.disk_ios += 1;
        }
        IoId(id)
    }

    pub(crate) fn emit(&mut self, o: Output) {
        self.out.push_back(o);
    }

    pub(crate) fn block_done(&mut self, id: BlockId, r: crate::io::BlockResult) {
        self.emit(Output::BlockDone(id, r));
    }

    pub(crate) fn answer(&mut self, id: Option<AdminId>, r: Result<(), AdminError>) {
        if let Some(id) = id {
            self.emit(Output::AdminDone(id, r));
        }
    }

    pub(crate) fn event(&mut self, e: Event) {
        self.events.insert(e);
    }

    pub(crate) fn log(&mut self, level: LogLevel, scope: impl Into<String>, text: impl Into<String>) {
        let (scope, text) = (scope.into(), text.into());
        self.emit(Output::Log { level, scope, text });
    }

    pub(crate) fn scope(&self, n: Option<NodeId>, v: Option<VolumeNr>) -> String {
        let mut s = self.cfg.name.clone();
        if let Some(v) = v {
            s += &format!("/{v}");
        }
        if let Some(c) = n.and_then(|n| self.conns.get(&n)) {
            s += &format!(" {}", c.name);
        }
        s
    }

    pub(crate) fn run_handler(&mut self, call: HandlerCall, then: AfterHandler) {
        let id = self.id();
        self.handlers.insert(id, then);
        self.emit(Output::RunHandler { id: HandlerId(id), call });
    }

    pub(crate) fn vnrs(&self) -> Vec<VolumeNr> {
        self.devs.keys().copied().collect()
    }

    pub(crate) fn peers(&self) -> Vec<NodeId> {
        self.conns.keys().copied().collect()
    }

    pub(crate) fn new_peer_device(&mut self, n: NodeId, v: VolumeNr) {
        let diskful = self.conns.get(&n).is_some_and(|c| c.diskful);
        let mut pdsk = if diskful { DiskState::DUnknown } else { DiskState::Diskless };
        if let Some(l) = self.devs.get(&v).and_then(|d| d.ldev.as_ref())
            && l.sb.peers[n.idx()].flags.contains(PeerFlags::OUTDATED)
        {
            pdsk = DiskState::Outdated;
        }
        self.pds.insert((n, v), PeerDevice::new(PeerDeviceConfig::default()));
        self.st.pds.insert(
            (n, v),
            state::PdStates {
                repl: ReplState::Off,
                pdsk,
                pause: state::Pause::default(),
                peer_quorum: false,
            },
        );
    }

    /// Quorum of a volume in a (perhaps only wanted) state.
    pub(crate) fn quorum_of(&self, s: &State, v: VolumeNr) -> Quorum {
        let dev = self.devs.get(&v);
        let ldev = dev.and_then(|d| d.ldev.as_ref());
        let mut peers = Vec::new();
        for n in NodeId::all().filter(|n| *n != self.me) {
            let slot = ldev.map(|l| l.sb.peers[n.idx()]);
            let flag = |f: PeerFlags| slot.is_some_and(|p| p.flags.contains(f));
            let conn = self.conns.get(&n);
            let has_slot = slot.is_some_and(|p| p.slot().is_some());
            if conn.is_none() && !has_slot && !flag(PeerFlags::NODE_EXISTS) && !flag(PeerFlags::DEVICE_SEEN) {
                continue;
            }
            peers.push(PeerFacts {
                configured: conn.is_some(),
                connected: s.connected(n) && s.repl(n, v) >= ReplState::Established,
                pdsk: if conn.is_some() { s.pdsk(n, v) } else { DiskState::DUnknown },
                announces_quorum: s.pds.get(&(n, v)).is_some_and(|p| p.peer_quorum),
                member: self.members.has(n),
                has_slot,
                exists: flag(PeerFlags::NODE_EXISTS),
                seen_with_disk: flag(PeerFlags::DEVICE_SEEN),
                outdated_flag: flag(PeerFlags::OUTDATED),
                allow_remote_read: conn.is_none_or(|c| c.net.allow_remote_read),
                bitmap_no: conn.is_some_and(|c| !c.diskful),
                tiebreaker: conn.is_some_and(|c| c.net.tiebreaker),
            });
        }
        quorum(&QuorumInput {
            own_disk: s.disk(v),
            self_intentionally_diskless: dev.is_some_and(|d| d.client),
            quorum: self.cfg.resource.quorum,
            minimum_redundancy: self.cfg.resource.quorum_minimum_redundancy,
            had_quorum: dev.is_some_and(|d| d.had_quorum),
            peers: &peers,
        })
    }

    pub(crate) fn with_facts<R>(&self, f: impl FnOnce(&Facts<'_>) -> R) -> R {
        let mut pd = BTreeMap::new();
        for ((n, v), p) in &self.pds {
            let Some(c) = self.conns.get(n) else { continue };
            let dev = self.devs.get(v);
            let ldev = dev.and_then(|d| d.ldev.as_ref());
            let slot = ldev.map(|l| l.sb.peers[n.idx()]);
            let flag = |f: PeerFlags| slot.is_some_and(|p| p.flags.contains(f));
            let own = dev.map_or(0, crate::device::Device::current_uuid);
            let peer_current = p.uuids.as_ref().map(|u| u.set.current).or(p.peer_exposed);
            pd.insert(
                (*n, *v),
                PdFacts {
                    fencing: c.net.fencing,
                    two_primaries: c.net.two_primaries,
                    diskful: c.diskful,
                    md_fencing: flag(PeerFlags::FENCING),
                    md_outdated: flag(PeerFlags::OUTDATED),
                    md_seen: flag(PeerFlags::DEVICE_SEEN),
                    same_current: peer_current.is_some_and(|u| same(u, own)),
                    uuids_received: peer_current.is_some(),
                    peer_stable: p
                        .uuids
                        .as_ref()
                        .is_some_and(|u| u.flags.contains(palisade_wire::UuidFlags::STABLE)),
                    got_stable: p.got_stable,
                    peer_bits: p.uuids.as_ref().map_or(0, |u| u.dirty_bits),
                    bits: ldev.and_then(|l| l.slot(*n).map(|s| l.bitmap.weight(s))).unwrap_or(0),
                    resync_active: p.target.as_ref().is_some_and(|t| !t.pending.is_empty()),
                    reconciliation: p.reconciliation,
                    negotiating: p.negotiating,
                },
            );
        }
        let mut md_consistent = BTreeMap::new();
        let mut unknown_fencing_peers = BTreeMap::new();
        for (v, d) in &self.devs {
            let Some(l) = &d.ldev else { continue };
            use palisade_metadata::DeviceFlags as F;
            md_consistent
                .insert(*v, (l.sb.flags.contains(F::CONSISTENT), l.sb.flags.contains(F::WAS_UP_TO_DATE)));
            let unknown = NodeId::all().filter(|n| *n != self.me && !self.conns.contains_key(n)).any(|n| {
                let p = l.sb.peers[n.idx()];
                (p.slot().is_some() || p.flags.contains(PeerFlags::NODE_EXISTS))
                    && p.flags.contains(PeerFlags::FENCING)
                    && !p.flags.contains(PeerFlags::OUTDATED)
            });
            unknown_fencing_peers.insert(*v, unknown);
        }
        let q = |s: &State, v: VolumeNr| self.quorum_of(s, v);
        f(&Facts {
            pd,
            md_consistent,
            openers_rw: self.devs.iter().map(|(v, d)| (*v, d.openers_rw)).collect(),
            openers_ro: self.devs.iter().map(|(v, d)| (*v, d.openers_ro)).collect(),
            on_no_quorum: self.cfg.resource.on_no_quorum,
            on_no_data: self.cfg.resource.on_no_data,
            quorum: &q,
            unknown_fencing_peers,
        })
    }

    /// What a change would lead to, or why it is refused (`PREPARE`).
    pub(crate) fn would(&self, o: Options, f: impl FnOnce(&mut State)) -> Result<State, Refusal> {
        let mut new = self.st.clone();
        f(&mut new);
        self.with_facts(|facts| {
            state::sanitize(&self.st, &mut new, facts);
            state::check_hard(&self.st, &new)?;
            if !o.hard {
                state::check_soft(&self.st, &new, facts, o)?;
            }
            Ok(())
        })?;
        Ok(new)
    }

    /// Makes a change. `Ok(false)`: nothing changed.
    pub(crate) fn change(
        &mut self,
        tag: &str,
        o: Options,
        f: impl FnOnce(&mut State),
    ) -> Result<bool, Refusal> {
        let new = self.would(o, f)?;
        if new == self.st {
            return Ok(false);
        }
        let old = std::mem::replace(&mut self.st, new);
        self.effects(&old, tag);
        Ok(true)
    }

    /// An event that cannot be refused.
    pub(crate) fn force(&mut self, tag: &str, f: impl FnOnce(&mut State)) {
        let _ = self.change(tag, Options { hard: true, ..Options::default() }, f);
    }

    /// Re-evaluates what depends on facts outside of the states.
    pub(crate) fn recalc(&mut self, tag: &str) {
        self.force(tag, |_| {});
    }

    fn openers(&mut self, vnr: VolumeNr, rw: u32, ro: u32) {
        if let Some(d) = self.devs.get_mut(&vnr) {
            d.openers_rw = rw;
            d.openers_ro = ro;
        }
        self.recalc("openers");
    }

    pub(crate) fn is_primary(&self) -> bool {
        self.st.role == Role::Primary
    }

    /// When to call `handle(_, Input::Timer)` at the latest.
    #[must_use]
    pub fn next_timeout(&self) -> Option<Time> {
        self.next_deadline()
    }
}
