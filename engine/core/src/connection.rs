//! A connection and its volumes' replication bookkeeping: the data, not the rules.

use crate::config::{NetConfig, PeerDeviceConfig};
use crate::io::{CodecCtx, PeerSpec};
use crate::resync::{SourceRequest, TargetState};
use crate::tables::uuid::UuidSet;
use crate::types::{NodeId, Time, VolumeNr};
use palisade_wire::enums::{DiskState, ReplState, Role};
use palisade_wire::{Features, UuidFlags};
use std::collections::{BTreeMap, VecDeque};

/// How far the handshake of a link got (`spec/wire-protocol.md` §4.4).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Phase {
    /// No link.
    Down,
    /// Features sent, the peer's awaited.
    Features,
    /// Challenge sent, the peer's awaited.
    Challenge,
    /// Response sent, the peer's awaited.
    Response,
    /// P_PROTOCOL sent, the peer's awaited (the lower node also starts its transaction).
    Protocol,
    /// Ready for the connect transaction.
    Ready,
}

/// Verdict of the handshake of one volume, applied when the connect transaction commits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Negotiated {
    pub repl: ReplState,
    pub pdsk: DiskState,
    pub own_disk: Option<DiskState>,
    pub peer_pause: bool,
    pub peer_quorum: bool,
}

/// What the handshake decided against a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Veto {
    /// Try again later.
    Retry,
    /// Go StandAlone.
    Disconnect,
}

/// How far the bitmap exchange is.
#[derive(Debug, Default)]
pub(crate) struct BitmapExchange {
    /// Takes the peer's packets.
    pub receiver: Option<palisade_wire::bitmap::Receiver>,
    /// Packets taken so far.
    pub packets: u64,
    /// The generation of the own data as it began.
    pub generation: u64,
    /// The own bitmap was sent.
    pub sent: bool,
    /// The peer's bitmap is complete.
    pub received: bool,
}

/// What a peer last told about its generations.
#[derive(Clone, Debug)]
pub(crate) struct PeerUuids {
    pub set: UuidSet,
    pub dirty_bits: u64,
    pub flags: UuidFlags,
    pub node_mask: u64,
}

/// A volume towards a peer.
#[derive(Debug)]
pub(crate) struct PeerDevice {
    pub cfg: PeerDeviceConfig,
    /// Last UUIDs the peer sent.
    pub uuids: Option<PeerUuids>,
    /// A diskless peer's exposed UUID.
    pub peer_exposed: Option<u64>,
    /// Sizes the peer announced, sectors.
    pub d_size: u64,
    pub u_size: u64,
    pub c_size: u64,
    pub peer_max_bio: u32,
    /// The peer's UUIDs came over this link.
    pub identifiers_received: bool,
    pub sizes_received: bool,
    /// What was sent in this handshake (own current, own slot, bits): a change means "retry".
    pub sent: Option<(u64, u64, u64)>,
    pub negotiated: Option<Negotiated>,
    /// An attach waits for the result of the comparison with this peer.
    pub negotiating: bool,
    pub veto: Option<Veto>,
    pub bitmap: BitmapExchange,
    /// Sequence number of packets sent for this volume.
    pub tx_seq: u32,
    /// Replication state the peer told last.
    pub peer_repl: ReplState,
    /// As source: the target was done before this side had left WFBitMapS; its disk then.
    pub target_done: Option<DiskState>,
    pub target: Option<TargetState>,
    pub source: BTreeMap<u64, SourceRequest>,
    /// Counters of the status, sectors.
    pub received: u64,
    pub sent_sectors: u64,
    pub pending: u32,
    pub unacked: u32,
    /// The resync was aborted or ended: reported once.
    pub resyncing: bool,
    pub resync_total_bits: u64,
    pub resync_start: Time,
    pub resync_failed_bits: u64,
    /// Sectors read as source or written as target in the last or running resync.
    pub resync_done_sectors: u64,
    /// Our own UUIDs last sent to the peer were flagged just so; used by finished-resync detection.
    pub sent_slot: u64,
    /// Writes of this node were lost on the way to the peer and no new generation tells so (no quorum): until they
    /// are resynced this node presents itself to the peer as a Primary that lost quorum.
    pub lost_writes: bool,
    /// A reconciliation with this peer is pending.
    pub reconciliation: bool,
    /// The peer said GOT_STABLE and the comparison is to be run again.
    pub got_stable: bool,
    /// Resync as source whose missed end was detected (`spec/state-machine.md` §8.8).
    pub missed_end_source: bool,
    pub missed_end_target: bool,
}

impl PeerDevice {
    pub fn new(cfg: PeerDeviceConfig) -> Self {
        Self {
            cfg,
            uuids: None,
            peer_exposed: None,
            d_size: 0,
            u_size: 0,
            c_size: 0,
            peer_max_bio: 0,
            sizes_received: false,
            sent: None,
            negotiated: None,
            negotiating: false,
            veto: None,
            bitmap: BitmapExchange::default(),
            tx_seq: 0,
            peer_repl: ReplState::Off,
            target_done: None,
            target: None,
            source: BTreeMap::new(),
            received: 0,
            sent_sectors: 0,
            pending: 0,
            unacked: 0,
            resyncing: false,
            resync_total_bits: 0,
            resync_start: Time(0),
            resync_failed_bits: 0,
            resync_done_sectors: 0,
            sent_slot: 0,
            identifiers_received: false,
            lost_writes: false,
            reconciliation: false,
            got_stable: false,
            missed_end_source: false,
            missed_end_target: false,
        }
    }

    /// Forgets what belongs to one link.
    pub fn reset_link(&mut self) {
        self.sizes_received = false;
        self.identifiers_received = false;
        self.sent = None;
        self.negotiated = None;
        self.negotiating = false;
        self.reconciliation = false;
        self.veto = None;
        self.bitmap = BitmapExchange::default();
        self.tx_seq = 0;
        self.peer_repl = ReplState::Off;
        self.target_done = None;
        self.target = None;
        self.source.clear();
        self.pending = 0;
        self.unacked = 0;
        self.got_stable = false;
        self.missed_end_source = false;
        self.missed_end_target = false;
    }
}

/// Writes of one epoch sent to one peer, not yet barrier-acked.
#[derive(Debug)]
pub(crate) struct SentEpoch {
    pub number: u32,
    pub writes: Vec<u64>,
    pub confirmed: usize,
    pub barrier_sent: bool,
    pub since: Time,
}

/// Writes of one epoch received from one peer.
#[derive(Debug, Default)]
pub(crate) struct ReceivedEpoch {
    /// Set when the P_BARRIER came.
    pub barrier: Option<u32>,
    pub count: u32,
    /// Already reported by P_CONFIRM_STABLE.
    pub confirmed: u32,
    pub unfinished: u32,
    /// Arrived, to be started when this epoch is the oldest.
    pub queued: VecDeque<u64>,
    pub volumes: std::collections::BTreeSet<VolumeNr>,
    pub flushes: u32,
    pub flushing: bool,
    /// The flush is for a P_CONFIRM_STABLE of so many writes.
    pub confirming: u32,
    /// Tells this epoch's flushes from those of an earlier link.
    pub serial: u64,
    pub flush_failed: bool,
    /// Block ids in order, for P_CONFIRM_STABLE.
    pub block_ids: Vec<u64>,
}

/// A received write that waits for the writer's peer-ack.
#[derive(Debug)]
pub(crate) struct Unacked {
    pub dagtag: u64,
    pub vnr: VolumeNr,
    pub sector: u64,
    pub len: u32,
    /// Written (or failed) here.
    pub done: bool,
    /// Holds activity-log references.
    pub al: bool,
    pub id: u64,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub peer: NodeId,
    pub name: String,
    pub net: NetConfig,
    /// The peer may have a disk (`bitmap yes`).
    pub diskful: bool,
    pub discard_my_data: bool,
    pub tentative: bool,
    /// A link exists (between LinkUp and LinkDown).
    pub link: bool,
    /// `Connect` was asked of the caller and neither a link came nor `CloseLink` was asked.
    pub dialing: bool,
    pub phase: Phase,
    pub apv: u32,
    pub features: Features,
    pub codec: CodecCtx,
    pub resolve_conflicts: bool,
    pub challenge: [u8; 64],
    /// The peer gave its discard-my-data flag in P_PROTOCOL.
    pub peer_discard_my_data: bool,
    /// Data integrity algorithm of the peer's direction.
    pub peer_integrity: Option<String>,
    /// The own per-volume packets of this connect attempt were sent.
    pub params_sent: bool,
    /// The own packets wait for the peer's identifiers.
    pub params_held: bool,
    /// The peer was shown a generation before the exposed one: writes wait for the end of the handshake.
    pub shows_unproven: bool,
    pub ping_due: Time,
    /// A P_PING is out since.
    pub ping_sent: Option<Time>,
    pub connect_started: Time,
    pub features_deadline: Option<Time>,
    /// Writer's side.
    pub sent_epochs: VecDeque<SentEpoch>,
    pub tx_dagtag: Option<u64>,
    /// Replica's side.
    pub received_epochs: VecDeque<ReceivedEpoch>,
    pub rx_dagtag: u64,
    pub unacked: VecDeque<Unacked>,
    /// Remote reads out: id to request.
    pub reads: BTreeMap<u64, u64>,
    pub reads_served: BTreeMap<u64, (u64, u32, u64)>,
    /// Bytes received and not yet written or answered.
    pub buffered: u64,
    /// P_OUT_OF_SYNC notes that wait for earlier writes.
    pub oos_after: VecDeque<(u64, VolumeNr, u64, u32)>,
    pub was_connected: bool,
    /// P_FLUSH_REQUESTS of this peer that wait for peer-acks: sequence, dagtag.
    pub flush_requests: VecDeque<(u64, u64)>,
    pub peer_dagtag: Option<(NodeId, u64)>,
    /// The own position in the lost Primary's stream was sent.
    pub position_told: bool,
    /// Positions in the stream of a lost Primary as told in this handshake, by self and by the peer.
    pub position_named: Option<(NodeId, u64)>,
    pub position_received: Option<(NodeId, u64)>,
    pub peer_role_hint: Role,
}

impl Connection {
    pub fn new(spec: PeerSpec) -> Self {
        Self {
            peer: spec.id,
            name: spec.name,
            net: spec.net,
            diskful: spec.diskful,
            discard_my_data: false,
            tentative: false,
            link: false,
            dialing: false,
            phase: Phase::Down,
            apv: 0,
            features: Features::NONE,
            codec: CodecCtx::initial(),
            resolve_conflicts: false,
            challenge: [0; 64],
            peer_discard_my_data: false,
            peer_integrity: None,
            params_sent: false,
            params_held: false,
            shows_unproven: false,
            ping_due: Time(0),
            ping_sent: None,
            connect_started: Time(0),
            features_deadline: None,
            sent_epochs: VecDeque::new(),
            tx_dagtag: None,
            received_epochs: VecDeque::new(),
            rx_dagtag: 0,
            unacked: VecDeque::new(),
            reads: BTreeMap::new(),
            reads_served: BTreeMap::new(),
            buffered: 0,
            oos_after: VecDeque::new(),
            was_connected: false,
            flush_requests: VecDeque::new(),
            peer_dagtag: None,
            position_told: false,
            position_named: None,
            position_received: None,
            peer_role_hint: Role::Unknown,
        }
    }

    /// Oldest writes first: forget everything that belongs to one link (the caller has dealt with it).
    pub fn reset_link(&mut self) {
        self.link = false;
        self.phase = Phase::Down;
        self.params_sent = false;
        self.params_held = false;
        self.shows_unproven = false;
        self.ping_sent = None;
        self.features_deadline = None;
        self.tx_dagtag = None;
        self.buffered = 0;
        self.flush_requests.clear();
        self.reads_served.clear();
        self.oos_after.clear();
        self.peer_dagtag = None;
        self.position_told = false;
        self.position_named = None;
        self.position_received = None;
        self.peer_discard_my_data = false;
    }
}
