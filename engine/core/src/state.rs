//! The scalar states of a resource and what a change of them implies: sanitizing, hard and soft rules.
//!
//! Everything here is a pure function of two [`State`]s (before and wanted) and the [`Facts`] that do not
//! change with them. A change goes: copy, modify, [`sanitize`], [`check_hard`], [`check_soft`], become current
//! (`spec/state-machine.md` §2). What follows from a change that became current is in `effects.rs`.

use crate::config::{Fencing, OnNoData, OnNoQuorum};
use crate::tables::quorum::Quorum;
use crate::tables::refusal::Refusal;
use crate::types::{NodeId, NodeMask, VolumeNr};
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role};
use std::collections::BTreeMap;

/// Reasons for a resync to pause (`spec/state-machine.md` §11.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pause {
    /// The local administrator.
    pub user: bool,
    /// The peer asked for it.
    pub peer: bool,
    /// Another connection of this volume resyncs.
    pub other_connection: bool,
    /// This node would be source but is itself Inconsistent.
    pub inconsistent: bool,
}

impl Pause {
    /// Whether the resync may not run.
    #[must_use]
    pub fn any(self) -> bool {
        self.user || self.peer || self.other_connection || self.inconsistent
    }
    /// What the peer is told as `aftr_isp` (`spec/state-machine.md` §1.6).
    #[must_use]
    pub fn after(self) -> bool {
        self.other_connection || self.inconsistent
    }
}

/// State of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConnStates {
    /// Connection state.
    pub cstate: ConnState,
    /// The peer's role, Unknown while not connected.
    pub peer_role: Role,
}

/// State of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DevStates {
    /// Own disk.
    pub disk: DiskState,
    /// Whether the volume has quorum (true while quorum is off).
    pub quorum: bool,
}

/// State of a volume towards a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PdStates {
    /// Replication state.
    pub repl: ReplState,
    /// The peer's disk as this node believes it.
    pub pdsk: DiskState,
    /// Why a resync is paused.
    pub pause: Pause,
    /// The peer says it has quorum.
    pub peer_quorum: bool,
}

/// All scalar states of a resource.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    /// Own role.
    pub role: Role,
    /// Frozen by the administrator.
    pub susp_user: bool,
    /// Frozen because no data is accessible.
    pub susp_nod: bool,
    /// Frozen until a lost peer is fenced.
    pub susp_fen: bool,
    /// Frozen for lack of quorum.
    pub susp_quorum: bool,
    /// Frozen until a pending new current UUID is on disk.
    pub susp_uuid: bool,
    /// A forced demotion fails all I/O until the last opener is gone.
    pub fail_io: bool,
    /// Connections.
    pub conns: BTreeMap<NodeId, ConnStates>,
    /// Volumes.
    pub devs: BTreeMap<VolumeNr, DevStates>,
    /// Volumes per peer.
    pub pds: BTreeMap<(NodeId, VolumeNr), PdStates>,
}

impl State {
    /// No volume, no peer, Secondary.
    #[must_use]
    pub fn new() -> Self {
        Self {
            role: Role::Secondary,
            susp_user: false,
            susp_nod: false,
            susp_fen: false,
            susp_quorum: false,
            susp_uuid: false,
            fail_io: false,
            conns: BTreeMap::new(),
            devs: BTreeMap::new(),
            pds: BTreeMap::new(),
        }
    }

    /// Whether I/O is frozen for any reason.
    #[must_use]
    pub fn suspended(&self) -> bool {
        self.susp_user || self.susp_nod || self.susp_fen || self.susp_quorum || self.susp_uuid
    }

    /// Own disk of a volume.
    #[must_use]
    pub fn disk(&self, v: VolumeNr) -> DiskState {
        self.devs.get(&v).map_or(DiskState::Diskless, |d| d.disk)
    }

    /// Connection state.
    #[must_use]
    pub fn cstate(&self, n: NodeId) -> ConnState {
        self.conns.get(&n).map_or(ConnState::StandAlone, |c| c.cstate)
    }

    /// Whether the handshake with the peer is finished.
    #[must_use]
    pub fn connected(&self, n: NodeId) -> bool {
        self.cstate(n) == ConnState::Connected
    }

    /// The peer's role.
    #[must_use]
    pub fn peer_role(&self, n: NodeId) -> Role {
        self.conns.get(&n).map_or(Role::Unknown, |c| c.peer_role)
    }

    /// Replication state.
    #[must_use]
    pub fn repl(&self, n: NodeId, v: VolumeNr) -> ReplState {
        self.pds.get(&(n, v)).map_or(ReplState::Off, |p| p.repl)
    }

    /// The peer's disk.
    #[must_use]
    pub fn pdsk(&self, n: NodeId, v: VolumeNr) -> DiskState {
        self.pds.get(&(n, v)).map_or(DiskState::DUnknown, |p| p.pdsk)
    }

    /// Peers of a volume with their states.
    pub fn peers_of(&self, v: VolumeNr) -> impl Iterator<Item = (NodeId, &PdStates)> + '_ {
        self.pds.iter().filter(move |((_, pv), _)| *pv == v).map(|((n, _), p)| (*n, p))
    }

    /// Connected peers.
    #[must_use]
    pub fn connected_mask(&self) -> NodeMask {
        self.conns
            .iter()
            .filter(|(_, c)| c.cstate == ConnState::Connected)
            .fold(NodeMask::EMPTY, |m, (n, _)| m.with(*n))
    }

    /// Connected Primary peers.
    #[must_use]
    pub fn primary_peers(&self) -> NodeMask {
        self.conns
            .iter()
            .filter(|(_, c)| c.cstate == ConnState::Connected && c.peer_role == Role::Primary)
            .fold(NodeMask::EMPTY, |m, (n, _)| m.with(*n))
    }

    /// UpToDate data of the volume can be reached: own disk or a connected peer's.
    #[must_use]
    pub fn data_accessible(&self, v: VolumeNr) -> bool {
        self.disk(v) == DiskState::UpToDate
            || self.peers_of(v).any(|(n, p)| {
                p.pdsk == DiskState::UpToDate && self.connected(n) && p.repl >= ReplState::Established
            })
    }

    /// The same for every volume.
    #[must_use]
    pub fn all_data_accessible(&self) -> bool {
        self.devs.keys().all(|v| self.data_accessible(*v))
    }

    /// The node is Primary or sees no Primary (`spec/state-machine.md` §9.7).
    #[must_use]
    pub fn stable(&self) -> bool {
        self.role == Role::Primary || self.primary_peers().is_empty()
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}

/// What sanitizing needs to know besides the states.
#[derive(Debug)]
pub(crate) struct PdFacts {
    pub fencing: Fencing,
    pub two_primaries: bool,
    /// The peer is configured with a bitmap (may have a disk).
    pub diskful: bool,
    /// Metadata flags of the peer's slot.
    pub md_fencing: bool,
    pub md_outdated: bool,
    pub md_seen: bool,
    /// UUIDs of the peer are known and its current equals the own current.
    pub same_current: bool,
    pub uuids_received: bool,
    pub peer_stable: bool,
    pub got_stable: bool,
    pub bits: u64,
    /// As the peer last told.
    pub peer_bits: u64,
    /// Winding down: requests of the resync are still out.
    pub resync_active: bool,
    pub reconciliation: bool,
    /// The result of an attach negotiation with this peer is awaited.
    pub negotiating: bool,
}

/// See [`PdFacts`].
pub(crate) struct Facts<'a> {
    pub pd: BTreeMap<(NodeId, VolumeNr), PdFacts>,
    /// The metadata says CONSISTENT / WAS_UP_TO_DATE.
    pub md_consistent: BTreeMap<VolumeNr, (bool, bool)>,
    pub openers_rw: BTreeMap<VolumeNr, u32>,
    pub openers_ro: BTreeMap<VolumeNr, u32>,
    pub on_no_quorum: OnNoQuorum,
    pub on_no_data: OnNoData,
    /// Evaluates quorum of a volume in the given state.
    pub quorum: &'a dyn Fn(&State, VolumeNr) -> Quorum,
    /// Nodes without connection object which exist by the metadata and must be considered before trusting
    /// own Consistent data: their slot carries FENCING and not OUTDATED.
    pub unknown_fencing_peers: BTreeMap<VolumeNr, bool>,
}

/// How a change is done (`spec/state-machine.md` §2).
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Options {
    /// An event, not a request: no soft rules.
    pub hard: bool,
    /// A graceful or committed end of a connection: no crashed-primary suspicion.
    pub ignore_openers: bool,
}

fn is_target(r: ReplState) -> bool {
    matches!(
        r,
        ReplState::StartingSyncT
            | ReplState::WFBitMapT
            | ReplState::WFSyncUUID
            | ReplState::SyncTarget
            | ReplState::PausedSyncT
    )
}

fn lost(c: ConnState) -> bool {
    matches!(
        c,
        ConnState::Timeout
            | ConnState::BrokenPipe
            | ConnState::NetworkFailure
            | ConnState::ProtocolError
            | ConnState::Unconnected
    )
}

/// Disk state by the metadata flags (`spec/state-machine.md` §4.3).
pub(crate) fn disk_state_from_md(
    consistent: bool,
    was_up_to_date: bool,
    may_be_up_to_date: bool,
) -> DiskState {
    match (consistent, was_up_to_date) {
        (false, _) => DiskState::Inconsistent,
        (true, false) => DiskState::Outdated,
        (true, true) if may_be_up_to_date => DiskState::UpToDate,
        (true, true) => DiskState::Consistent,
    }
}

/// `spec/state-machine.md` §4.6, "may be up to date".
pub(crate) fn may_be_up_to_date(s: &State, f: &Facts<'_>, v: VolumeNr) -> bool {
    for (n, p) in s.peers_of(v) {
        let Some(x) = f.pd.get(&(n, v)) else { continue };
        if x.reconciliation {
            return false;
        }
        // A diskless Primary works on another generation.
        if s.connected(n)
            && s.peer_role(n) == Role::Primary
            && p.pdsk == DiskState::Diskless
            && x.uuids_received
            && !x.same_current
        {
            return false;
        }
        if !x.md_fencing {
            continue;
        }
        let ok = match p.pdsk {
            DiskState::Consistent | DiskState::UpToDate => s.connected(n),
            DiskState::Inconsistent | DiskState::Outdated => true,
            DiskState::Diskless => !x.md_seen || !x.diskful,
            _ => !x.diskful || x.md_outdated,
        };
        if !ok {
            return false;
        }
    }
    !f.unknown_fencing_peers.get(&v).copied().unwrap_or(false)
}

fn clamp(d: DiskState, lo: DiskState, hi: DiskState) -> DiskState {
    d.clamp(lo, hi)
}

/// Implied changes (`spec/state-machine.md` §4), in its order.
pub(crate) fn sanitize(old: &State, new: &mut State, f: &Facts<'_>) {
    use DiskState as D;
    use ReplState as R;
    let mut maybe_crashed_primary = false;
    // 4.1
    for (n, c) in &mut new.conns {
        let was = old.conns.get(n);
        if c.cstate < ConnState::Connected {
            c.peer_role = Role::Unknown;
        }
        if was.is_some_and(|w| w.cstate == ConnState::Connected && w.peer_role == Role::Primary)
            && lost(c.cstate)
        {
            maybe_crashed_primary = true;
        }
    }
    let connected: BTreeMap<NodeId, bool> =
        new.conns.iter().map(|(n, c)| (*n, c.cstate == ConnState::Connected)).collect();
    let is_connected = |n: NodeId| connected.get(&n).copied().unwrap_or(false);

    // 4.4: a lost link.
    for ((n, _), p) in &mut new.pds {
        if !is_connected(*n) {
            p.repl = R::Off;
            p.peer_quorum = false;
            p.pause.other_connection = false;
            p.pause.inconsistent = false;
        }
        if p.repl < R::Established {
            p.pause.peer = false;
            if !(D::Inconsistent..=D::DUnknown).contains(&p.pdsk) && !is_connected(*n) {
                p.pdsk = D::DUnknown;
            }
        }
    }

    for v in new.devs.keys().copied().collect::<Vec<_>>() {
        let old_disk = old.disk(v);
        // 4.2
        let mut disk = new.disk(v);
        if disk == D::Detaching && old_disk == D::Diskless {
            disk = D::Diskless;
        }
        // 4.3: the negotiation ends when every connected peer with a disk delivered a result.
        if disk == D::Negotiating {
            let peers: Vec<_> = new.peers_of(v).map(|(n, p)| (n, *p)).collect();
            let open = peers.iter().any(|(n, p)| {
                is_connected(*n)
                    && p.pdsk >= D::Negotiating
                    && f.pd.get(&(*n, v)).is_some_and(|x| x.negotiating)
            });
            if !open {
                let (c, u) = f.md_consistent.get(&v).copied().unwrap_or((false, false));
                disk = if peers.iter().any(|(_, p)| p.repl == R::WFBitMapT) {
                    D::Inconsistent
                } else if peers
                    .iter()
                    .any(|(n, p)| is_connected(*n) && p.repl == R::Established && p.pdsk == D::UpToDate && c)
                {
                    D::UpToDate
                } else {
                    disk_state_from_md(c, u, may_be_up_to_date(new, f, v))
                };
            }
        }
        if let Some(d) = new.devs.get_mut(&v) {
            d.disk = disk;
        }
        // 4.4: no resync without disks; clamps.
        for n in new.conns.keys().copied().collect::<Vec<_>>() {
            let Some(p) = new.pds.get_mut(&(n, v)) else { continue };
            if p.repl > R::Established && (disk <= D::Failed || p.pdsk <= D::Failed) {
                p.repl = R::Established;
            }
            match p.repl {
                R::WFBitMapT | R::StartingSyncT | R::WFSyncUUID | R::Behind => {
                    disk = clamp(disk, D::Inconsistent, D::Outdated);
                    p.pdsk = clamp(p.pdsk, D::Inconsistent, D::UpToDate);
                }
                R::SyncTarget | R::PausedSyncT => {
                    disk = D::Inconsistent;
                    p.pdsk = clamp(p.pdsk, D::Inconsistent, D::UpToDate);
                }
                R::WFBitMapS | R::StartingSyncS | R::PausedSyncS | R::Ahead => {
                    disk = clamp(disk, D::Inconsistent, D::UpToDate);
                    p.pdsk = clamp(p.pdsk, D::Inconsistent, D::Consistent);
                }
                R::SyncSource => {
                    disk = clamp(disk, D::Inconsistent, D::UpToDate);
                    p.pdsk = D::Inconsistent;
                }
                R::VerifyS | R::VerifyT => {
                    disk = clamp(disk, D::Inconsistent, D::UpToDate);
                    p.pdsk = clamp(p.pdsk, D::Inconsistent, D::UpToDate);
                }
                R::Off | R::Established => {}
            }
        }
        if let Some(d) = new.devs.get_mut(&v) {
            d.disk = disk;
        }
        select_sync_target(old, new, f, v);
        raise_or_lower(old, new, f, v, maybe_crashed_primary);
    }

    // 4.4: freeze until the lost peer is fenced.
    if new.role == Role::Primary {
        for ((n, v), p) in &new.pds {
            let stonith = f.pd.get(&(*n, *v)).is_some_and(|x| x.fencing == Fencing::ResourceAndStonith);
            if stonith && p.repl < R::Established && p.pdsk == D::DUnknown && old.pdsk(*n, *v) != D::DUnknown
            {
                new.susp_fen = true;
            }
        }
        // §14.5: everybody is back, or known to be behind.
        let settled = new.pds.iter().all(|((n, v), p)| {
            let stonith = f.pd.get(&(*n, *v)).is_some_and(|x| x.fencing == Fencing::ResourceAndStonith);
            !stonith || p.repl >= R::Established || p.pdsk <= D::Outdated
        });
        if settled {
            new.susp_fen = false;
        }
    }

    // 4.8
    for v in new.devs.keys().copied().collect::<Vec<_>>() {
        let q = (f.quorum)(new, v).have;
        if let Some(d) = new.devs.get_mut(&v) {
            d.quorum = q;
        }
    }
    new.susp_quorum = f.on_no_quorum == OnNoQuorum::SuspendIo && new.devs.values().any(|d| !d.quorum);
    if new.role == Role::Primary && f.on_no_data == OnNoData::SuspendIo {
        let lost_data = new.devs.keys().any(|v| old.data_accessible(*v) && !new.data_accessible(*v));
        if lost_data {
            new.susp_nod = true;
        } else if new.all_data_accessible() {
            new.susp_nod = false;
        }
    } else {
        new.susp_nod = false;
    }
    if new.role != Role::Primary {
        new.susp_fen = false;
    }
    if new.fail_io && f.openers_rw.values().chain(f.openers_ro.values()).all(|n| *n == 0) {
        new.fail_io = false;
    }
}

/// One active target per volume (`spec/state-machine.md` §4.5).
fn select_sync_target(old: &State, new: &mut State, f: &Facts<'_>, v: VolumeNr) {
    use ReplState as R;
    let bits = |n: NodeId| f.pd.get(&(n, v)).map_or(0, |x| x.bits);
    let candidates: Vec<NodeId> = new
        .peers_of(v)
        .filter(|(_, p)| {
            matches!(p.repl, R::SyncTarget | R::PausedSyncT)
                && !p.pause.user
                && !p.pause.peer
                && p.pdsk >= DiskState::Outdated
        })
        .map(|(n, _)| n)
        .collect();
    let active = candidates.iter().copied().find(|n| old.repl(*n, v) == R::SyncTarget);
    let winding = f.pd.iter().any(|((n, pv), x)| {
        *pv == v && x.resync_active && !candidates.contains(n) && is_target(old.repl(*n, v))
    });
    let disk = |n: NodeId| new.pdsk(n, v);
    let best = candidates.iter().copied().min_by_key(|n| (std::cmp::Reverse(disk(*n)), bits(*n)));
    let chosen = match (active, best) {
        (Some(a), Some(b)) if disk(b) > disk(a) => Some(b),
        // Switching costs a resync its momentum: only for an advantage of 256 bits.
        (Some(a), Some(b)) if disk(b) == disk(a) && bits(b) + 256 <= bits(a) => Some(b),
        (Some(a), _) => Some(a),
        (None, b) if !winding => b,
        _ => None,
    };
    let target_of_someone = new.peers_of(v).any(|(_, p)| is_target(p.repl));
    let inconsistent = new.disk(v) <= DiskState::Inconsistent;
    for n in new.conns.keys().copied().collect::<Vec<_>>() {
        let Some(p) = new.pds.get_mut(&(n, v)) else { continue };
        match p.repl {
            R::SyncTarget | R::PausedSyncT => {
                p.pause.other_connection = chosen.is_some_and(|c| c != n) || (chosen.is_none() && winding);
                p.pause.inconsistent = false;
                p.repl = if p.pause.any() { R::PausedSyncT } else { R::SyncTarget };
            }
            R::SyncSource | R::PausedSyncS => {
                p.pause.other_connection = target_of_someone;
                p.pause.inconsistent = inconsistent;
                p.repl = if p.pause.any() { R::PausedSyncS } else { R::SyncSource };
                if p.repl == R::SyncSource {
                    p.pdsk = DiskState::Inconsistent;
                }
            }
            _ => {
                p.pause.other_connection = false;
                p.pause.inconsistent = false;
            }
        }
    }
}

/// `spec/state-machine.md` §4.6.
fn raise_or_lower(old: &State, new: &mut State, f: &Facts<'_>, v: VolumeNr, maybe_crashed_primary: bool) {
    use DiskState as D;
    use ReplState as R;
    let mut disk = new.disk(v);
    // Whoever is about to receive data is not made current by what others say.
    let target = new.peers_of(v).any(|(_, p)| is_target(p.repl));
    for (n, p) in
        new.pds.iter().filter(|((_, pv), _)| *pv == v).map(|((n, _), p)| (*n, *p)).collect::<Vec<_>>()
    {
        let Some(x) = f.pd.get(&(n, v)) else { continue };
        let was = old.pds.get(&(n, v)).copied();
        let newly_established = p.repl == R::Established && was.is_none_or(|w| w.repl < R::Established);
        let old_pdsk = was.map_or(D::DUnknown, |w| w.pdsk);
        if disk == D::Outdated
            && !target
            && p.repl == R::Established
            && p.pdsk >= D::Consistent
            && x.uuids_received
            && x.peer_stable
            && x.same_current
            && (newly_established || x.got_stable || old_pdsk == D::Outdated)
            && x.bits + x.peer_bits == 0
        {
            disk = p.pdsk;
        }
        if newly_established && disk == D::Consistent && may_be_up_to_date(new, f, v) {
            disk = D::UpToDate;
        }
        if p.repl == R::Established
            && old_pdsk == D::Consistent
            && p.pdsk == D::UpToDate
            && x.peer_stable
            && disk == D::Consistent
        {
            disk = D::UpToDate;
        }
        // A diskless Primary connects: its generation decides.
        if newly_established && new.peer_role(n) == Role::Primary && p.pdsk == D::Diskless && x.uuids_received
        {
            if x.same_current && disk >= D::Outdated && !target {
                disk = D::UpToDate;
            } else if !x.same_current && disk == D::UpToDate {
                disk = D::Consistent;
            }
        }
    }
    if maybe_crashed_primary
        && new.primary_peers().is_empty()
        && disk == D::UpToDate
        && new.role == Role::Secondary
    {
        // Sole authority (§4.6): the lost Primary had no usable data and nobody else has any.
        let lost_primary_useless = old
            .conns
            .iter()
            .filter(|(n, c)| c.peer_role == Role::Primary && !new.connected(**n))
            .all(|(n, _)| old.pdsk(*n, v) <= D::Outdated);
        let nobody_else = !new.peers_of(v).any(|(_, p)| p.pdsk >= D::Consistent);
        if !(lost_primary_useless && nobody_else) {
            disk = D::Consistent;
        }
    }
    if let Some(d) = new.devs.get_mut(&v) {
        d.disk = disk;
    }
}

/// Rules that are never skipped (`spec/state-machine.md` §3.2).
pub(crate) fn check_hard(old: &State, new: &State) -> Result<(), Refusal> {
    use ConnState as C;
    for (n, c) in &new.conns {
        let from = old.cstate(*n);
        let to = c.cstate;
        if from == to {
            continue;
        }
        match from {
            C::StandAlone if to == C::Disconnecting => return Err(Refusal::AlreadyStandAlone),
            C::StandAlone if to != C::Unconnected => return Err(Refusal::NeedConnection),
            C::Disconnecting if to != C::StandAlone => return Err(Refusal::InTransientState),
            C::Timeout | C::BrokenPipe | C::NetworkFailure | C::ProtocolError | C::TearDown
                if to != C::Unconnected && to != C::Disconnecting =>
            {
                return Err(Refusal::InTransientState);
            }
            _ => {}
        }
    }
    for (v, d) in &new.devs {
        if old.disk(*v) == DiskState::Diskless && matches!(d.disk, DiskState::Failed | DiskState::Detaching) {
            return Err(Refusal::IsDiskless);
        }
    }
    Ok(())
}

/// Rules for requests (`spec/state-machine.md` §3.3), in its order.
pub(crate) fn check_soft(old: &State, new: &State, f: &Facts<'_>, o: Options) -> Result<(), Refusal> {
    use ConnState as C;
    use DiskState as D;
    use ReplState as R;
    let promoting = old.role != Role::Primary && new.role == Role::Primary;
    let demoting = old.role == Role::Primary && new.role != Role::Primary;
    let two_primaries = |n: &NodeId| f.pd.iter().any(|((m, _), x)| m == n && x.two_primaries);
    // 1, 3
    if promoting {
        for (n, c) in &new.conns {
            if c.peer_role == Role::Primary && !two_primaries(n) {
                return Err(Refusal::TwoPrimaries);
            }
        }
        if old.fail_io {
            return Err(Refusal::DeviceInUse);
        }
    }
    // 4..8
    for (n, c) in &new.conns {
        let from = old.cstate(*n);
        if c.cstate == C::Disconnecting && from == C::StandAlone {
            return Err(Refusal::AlreadyStandAlone);
        }
        if c.cstate == C::Connecting && from < C::Unconnected {
            return Err(Refusal::NoNetConfig);
        }
        let becomes_primary = c.peer_role == Role::Primary && old.peer_role(*n) != Role::Primary;
        if becomes_primary && !two_primaries(n) {
            if new.role == Role::Primary {
                return Err(Refusal::TwoPrimaries);
            }
            if !new.fail_io && f.openers_ro.values().any(|x| *x > 0) {
                return Err(Refusal::PrimaryReader);
            }
        }
    }
    for (v, d) in &new.devs {
        let from = old.disk(*v);
        if demoting && f.openers_rw.get(v).is_some_and(|x| *x > 0) && !o.ignore_openers {
            return Err(Refusal::DeviceInUse);
        }
        if from == D::Diskless && d.disk > D::Attaching {
            return Err(Refusal::IsDiskless);
        }
        let resync_ends =
            new.peers_of(*v).any(|(n, p)| old.repl(n, *v) == R::SyncTarget && p.repl == R::Established);
        if d.disk == D::Outdated
            && from < D::Outdated
            && !matches!(from, D::Attaching | D::Negotiating)
            && !resync_ends
        {
            return Err(Refusal::LowerThanOutdated);
        }
        let no_data = |s: &State| s.role == Role::Primary && !s.data_accessible(*v);
        if no_data(new) && !no_data(old) {
            return Err(Refusal::NoUpToDateData);
        }
        if f.openers_ro.get(v).is_some_and(|x| *x > 0) && old.data_accessible(*v) && !new.data_accessible(*v)
        {
            return Err(Refusal::NoUpToDateData);
        }
        if new.role == Role::Primary && !d.quorum && (promoting || old.devs.get(v).is_none_or(|x| x.quorum)) {
            return Err(Refusal::NoQuorum);
        }
    }
    for ((n, v), p) in &new.pds {
        let Some(x) = f.pd.get(&(*n, *v)) else { continue };
        let (disk, from) = (new.disk(*v), old.repl(*n, *v));
        let unfenced = |s: &State| {
            s.role == Role::Primary && s.repl(*n, *v) < R::Established && s.pdsk(*n, *v) > D::Outdated
        };
        if x.fencing >= Fencing::ResourceOnly && unfenced(new) && !unfenced(old) {
            return Err(Refusal::PrimaryNeedsFencing);
        }
        if p.repl > R::Established && disk < D::Inconsistent {
            return Err(Refusal::NoLocalDisk);
        }
        if p.repl > R::Established && p.pdsk < D::Inconsistent {
            return Err(Refusal::NoRemoteDisk);
        }
        if ((is_target(from) && p.repl == R::WFBitMapT)
            || (matches!(from, R::StartingSyncS | R::WFBitMapS | R::SyncSource | R::PausedSyncS)
                && p.repl == R::WFBitMapS))
            && from != p.repl
        {
            return Err(Refusal::ResyncRunning);
        }
        if matches!(p.repl, R::StartingSyncS | R::StartingSyncT) && from != p.repl {
            if from > R::Established {
                return Err(Refusal::ResyncRunning);
            }
            if from < R::Established {
                return Err(Refusal::NeedConnection);
            }
        }
        if matches!(p.repl, R::SyncSource | R::SyncTarget) && from < R::Off {
            return Err(Refusal::NeedConnection);
        }
        if !x.diskful && old.pdsk(*n, *v) == D::Diskless && p.pdsk > D::Attaching && p.pdsk != D::DUnknown {
            return Err(Refusal::AttachNoBitmap);
        }
    }
    // 19: Outdated while connected (§3.4).
    for (v, d) in &new.devs {
        if d.disk != D::Outdated || old.disk(*v) <= D::Outdated {
            continue;
        }
        let ok = if new.role == Role::Primary {
            new.peers_of(*v).any(|(_, p)| p.pdsk == D::UpToDate && p.repl == R::WFBitMapT)
        } else {
            new.primary_peers().is_empty()
                || new.peers_of(*v).any(|(_, p)| is_target(p.repl) || p.repl == R::Behind)
                || new
                    .primary_peers()
                    .iter()
                    .any(|n| new.pdsk(n, *v) == D::Diskless && old.repl(n, *v) < R::Established)
        };
        if !ok {
            return Err(Refusal::ConnectedOutdates);
        }
    }
    Ok(())
}
