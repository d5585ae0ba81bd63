//! Who synchronises to whom: the comparison of two nodes' generation identifiers.
//!
//! [`uuid_compare`] is `spec/state-machine.md` §9.2 to §9.4 row by row, [`missed_end_without_bits`] and
//! [`by_disk_states`] are steps 4 and 5 of §9.5, [`resulting_repl`] is step 14. Both ends run this on
//! mirrored inputs and must come to mirrored results. What lies between, split brain and the policies that
//! may change the direction, is in `split_brain`.

use palisade_wire::enums::{DiskState, ReplState, Role, WireProtocol};
use palisade_wire::{Features, UuidFlags};

use super::uuid::{NOT_MEANINGFUL, SYNC_UUID_OFFSET, UuidSet, is_generation, is_just_created, same};

pub use super::strategy::{Rule, Strategy};

use Strategy::{
    NoSync, RequiresProto, Retry, SplitBrainAutoRecover, SplitBrainDisconnect, SyncSourceCopyBitmap,
    SyncSourceIfBothFailed, SyncSourceSetBitmap, SyncSourceUseBitmap, SyncTargetClearBitmap,
    SyncTargetIfBothFailed, SyncTargetSetBitmap, SyncTargetUseBitmap, UnrelatedData,
};

/// Correction that goes with a result of §9.3 or §9.4 below protocol 110.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Clear the own slot for the peer; the old value goes to the history.
    OwnSlotToHistory,
    /// The same in the copy of the peer's identifiers.
    PeerSlotToHistory,
    /// In the copy of the peer's identifiers move the newest history entry back into its slot for self.
    PeerHistoryToSlot,
    /// Move the newest own history entry back into the own slot for the peer.
    OwnHistoryToSlot,
}

/// One side of the comparison.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// Node id.
    pub node_id: u8,
    /// Present role.
    pub role: Role,
    /// Disk; an own disk that is Negotiating is replaced by its metadata state (§4.3) before.
    pub disk: DiskState,
    /// Identifiers as presented to the other side (§8.7).
    pub uuids: &'a UuidSet,
    /// Bits set in the bitmap for the other side.
    pub bits: u64,
    /// The flags that go with the identifiers (§1.8).
    pub flags: UuidFlags,
    /// This side was source of a resync and missed its end (§8.8).
    pub missed_end: bool,
    /// This side has quorum for the volume.
    pub quorate: bool,
}

impl Side<'_> {
    /// Whether all bits of `flag` are set.
    pub fn has(&self, flag: UuidFlags) -> bool {
        self.flags.contains(flag)
    }

    /// The disk state that counts: INCONSISTENT tells the truth while the state says Negotiating (§1.8).
    pub fn real_disk(&self) -> DiskState {
        match self.disk {
            DiskState::Negotiating if self.has(UuidFlags::INCONSISTENT) => DiskState::Inconsistent,
            disk => disk,
        }
    }

    fn crashed(&self) -> bool {
        self.has(UuidFlags::CRASHED_PRIMARY)
    }

    fn lost_quorum(&self) -> bool {
        self.has(UuidFlags::PRIMARY_LOST_QUORUM)
    }

    fn reconnects(&self) -> bool {
        self.has(UuidFlags::RECONNECT)
    }
}

/// Everything the comparison of one volume looks at.
#[derive(Clone, Copy, Debug)]
pub struct Compare<'a> {
    /// Self.
    pub me: Side<'a>,
    /// The peer, from its packets.
    pub peer: Side<'a>,
    /// Agreed protocol version.
    pub apv: u32,
    /// Agreed features.
    pub features: Features,
    /// Replication protocol of the connection.
    pub protocol: WireProtocol,
    /// Self is the RESOLVE_CONFLICTS end of the connection (§9.3).
    pub resolve_conflicts: bool,
    /// Part of the connect handshake.
    pub connecting: bool,
    /// Own identifiers, flags or bits changed since they were sent to this peer.
    pub changed_since_sent: bool,
}

/// The outcome of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What to do.
    pub strategy: Strategy,
    /// Why.
    pub rule: Rule,
    /// With [`Strategy::SyncSourceCopyBitmap`]: the node id whose bitmap is to be copied. A node id without a
    /// slot of its own stands for the day-0 bitmap. `None`: there is none, set all bits.
    pub copy_from: Option<u8>,
    /// Correction of identifiers that goes with it.
    pub repair: Option<Repair>,
}

impl Verdict {
    /// A verdict without copy source and repair.
    pub fn new(strategy: Strategy, rule: Rule) -> Self {
        Self { strategy, rule, copy_from: None, repair: None }
    }

    fn with_repair(self, repair: Repair) -> Self {
        let decided = !matches!(self.strategy, RequiresProto(_));
        Self { repair: decided.then_some(repair), ..self }
    }

    /// Another strategy by the same rule.
    pub fn with_strategy(self, strategy: Strategy) -> Self {
        Self { strategy, copy_from: None, ..self }
    }

    /// The log line both sides print (§9.1).
    pub fn log_line(&self) -> String {
        format!("uuid_compare()={} by rule={}", self.strategy, self.rule)
    }
}

/// Compares the generation identifiers (§9.2).
pub fn uuid_compare(c: &Compare<'_>) -> Verdict {
    let (mine, its) = (c.me.uuids, c.peer.uuids);
    let (own_slot, peer_slot) = (mine.slot(c.peer.node_id), its.slot(c.me.node_id));
    match (is_just_created(mine.current), is_just_created(its.current)) {
        _ if c.connecting && c.changed_since_sent => Verdict::new(Retry, Rule::InitialHandshakeChanged),
        (true, true) => Verdict::new(NoSync, Rule::JustCreatedBoth),
        (true, false) => Verdict::new(SyncTargetSetBitmap, Rule::JustCreatedSelf),
        (false, true) => Verdict::new(SyncSourceSetBitmap, Rule::JustCreatedPeer),
        _ if same(mine.current, its.current) => equal_currents(c),
        _ if same(mine.current, peer_slot) => Verdict::new(SyncTargetUseBitmap, Rule::BitmapPeer),
        _ if other_slot(its, mine.current, c).is_some() => {
            Verdict::new(SyncTargetClearBitmap, Rule::BitmapPeerOther)
        }
        _ if target_missed_start(c) => {
            legacy(c, SyncTargetUseBitmap, Rule::SyncTargetMissedStart).with_repair(Repair::PeerHistoryToSlot)
        }
        _ if same(its.current, own_slot) => Verdict::new(SyncSourceUseBitmap, Rule::BitmapSelf),
        _ if other_slot(mine, its.current, c).is_some() => Verdict {
            copy_from: other_slot(mine, its.current, c),
            ..Verdict::new(SyncSourceCopyBitmap, Rule::BitmapSelfOther)
        },
        _ if source_missed_start(c) => {
            legacy(c, SyncSourceUseBitmap, Rule::SyncSourceMissedStart).with_repair(Repair::OwnHistoryToSlot)
        }
        _ if its.in_history(mine.current) => Verdict::new(SyncTargetSetBitmap, Rule::HistoryPeer),
        _ if mine.in_history(its.current) => Verdict::new(SyncSourceSetBitmap, Rule::HistorySelf),
        _ if is_generation(own_slot) && same(own_slot, peer_slot) => {
            Verdict::new(SplitBrainAutoRecover, Rule::BitmapBoth)
        }
        _ if mine.history.iter().any(|h| its.in_history(*h)) => {
            Verdict::new(SplitBrainDisconnect, Rule::HistoryBoth)
        }
        _ => Verdict::new(UnrelatedData, Rule::HistoryBoth),
    }
}

/// A slot for a third node that records `uuid`; node ids of the two sides are no third nodes.
fn other_slot(set: &UuidSet, uuid: u64, c: &Compare<'_>) -> Option<u8> {
    set.slots_with(uuid).find(|node| *node != c.me.node_id && *node != c.peer.node_id)
}

/// The repairs of §9.3 and §9.4 exist from protocol 91 on.
fn legacy(c: &Compare<'_>, strategy: Strategy, rule: Rule) -> Verdict {
    Verdict::new(if c.apv < 91 { RequiresProto(91) } else { strategy }, rule)
}

/// The packet with the sync UUID was lost on the way to self (§9.4).
fn target_missed_start(c: &Compare<'_>) -> bool {
    let (mine, its) = (c.me.uuids, c.peer.uuids);
    let newest = its.history[0];
    let matches = if c.apv < 96 {
        same(mine.history[0], its.history[1])
    } else {
        same(newest.wrapping_add(SYNC_UUID_OFFSET), its.slot(c.me.node_id))
    };
    c.apv < 110 && same(mine.current, newest) && matches
}

/// The same, seen from the source (§9.4).
fn source_missed_start(c: &Compare<'_>) -> bool {
    let (mine, its) = (c.me.uuids, c.peer.uuids);
    let newest = mine.history[0];
    let matches = if c.apv < 96 {
        same(mine.history[1], its.history[0])
    } else {
        same(newest.wrapping_add(SYNC_UUID_OFFSET), mine.slot(c.peer.node_id))
    };
    c.apv < 110 && same(newest, its.current) && matches
}

/// Rows of §9.3 for every protocol, in order.
fn equal_currents(c: &Compare<'_>) -> Verdict {
    if let Some(verdict) = equal_currents_legacy(c) {
        return verdict;
    }
    let (me, peer) = (&c.me, &c.peer);
    let a_or_b = c.protocol != WireProtocol::C;
    let both_reconnect = me.reconnects() && peer.reconnects();
    let star = if c.apv < 120 { Rule::Reconnected } else { Rule::LostQuorum };
    let side = |resolver: Strategy, other: Strategy| if c.resolve_conflicts { resolver } else { other };
    let (strategy, rule) = match (me.crashed(), peer.crashed()) {
        _ if me.missed_end => (SyncSourceUseBitmap, Rule::SyncSourceMissedFinish),
        _ if peer.missed_end => (SyncTargetUseBitmap, Rule::SyncTargetPeerMissedFinish),
        _ if c.apv >= 120 && both_reconnect => (NoSync, Rule::Reconnected),
        (true, false) if c.apv >= 121 && a_or_b => (SyncSourceUseBitmap, Rule::CrashedPrimary),
        (false, true) if c.apv >= 121 && a_or_b => (SyncTargetUseBitmap, Rule::CrashedPrimary),
        _ if !me.lost_quorum() && peer.lost_quorum() => (SyncTargetIfBothFailed, Rule::LostQuorum),
        _ if me.lost_quorum() && !peer.lost_quorum() => (SyncSourceIfBothFailed, Rule::LostQuorum),
        _ if me.lost_quorum() => (side(SyncSourceIfBothFailed, SyncTargetIfBothFailed), Rule::LostQuorum),
        _ if both_reconnect => (NoSync, Rule::Reconnected),
        (_, true) if me.reconnects() => (SyncSourceIfBothFailed, star),
        (true, _) if peer.reconnects() => (SyncTargetIfBothFailed, star),
        _ if me.reconnects() || peer.reconnects() => (NoSync, star),
        (true, true) => (side(SyncTargetIfBothFailed, SyncSourceIfBothFailed), Rule::BothOff),
        (true, false) => (SyncSourceIfBothFailed, Rule::BothOff),
        (false, true) => (SyncTargetIfBothFailed, Rule::BothOff),
        (false, false) => (NoSync, Rule::BothOff),
    };
    Verdict::new(strategy, rule)
}

/// Rows of §9.3 below protocol 110: exactly one slot is empty, so one side missed the end of a resync.
fn equal_currents_legacy(c: &Compare<'_>) -> Option<Verdict> {
    let (mine, its) = (c.me.uuids, c.peer.uuids);
    let (my_slot, its_slot) = (mine.slot(c.peer.node_id), its.slot(c.me.node_id));
    let self_missed = same(my_slot, its.history[0]) && same(its.history[0], mine.history[0]);
    let peer_missed = same(mine.history[0], its_slot) && same(mine.history[1], its.history[0]);
    match (my_slot == 0, its_slot == 0) {
        _ if c.apv >= 110 => None,
        (false, true) if self_missed => Some(
            legacy(c, SyncSourceUseBitmap, Rule::SyncSourceMissedFinish)
                .with_repair(Repair::OwnSlotToHistory),
        ),
        (false, true) => Some(legacy(c, SyncSourceUseBitmap, Rule::SyncSourcePeerMissedFinish)),
        (true, false) if peer_missed => Some(
            legacy(c, SyncTargetUseBitmap, Rule::SyncTargetPeerMissedFinish)
                .with_repair(Repair::PeerSlotToHistory),
        ),
        (true, false) => Some(legacy(c, SyncTargetUseBitmap, Rule::SyncTargetMissedFinish)),
        (true, true) | (false, false) => None,
    }
}

/// §9.5 step 4: below protocol 124 a missed end without any bits resolves itself by the peer's cleanup.
pub fn missed_end_without_bits(c: &Compare<'_>, verdict: Verdict) -> Verdict {
    if c.apv >= 124 || c.me.bits != 0 || c.peer.bits != 0 {
        return verdict;
    }
    match (verdict.strategy, verdict.rule) {
        (SyncSourceUseBitmap, Rule::SyncSourceMissedFinish) => verdict.with_strategy(Retry),
        (SyncTargetUseBitmap, Rule::SyncTargetPeerMissedFinish) if c.me.role == Role::Primary => {
            verdict.with_strategy(RequiresProto(124))
        }
        _ => verdict,
    }
}

/// §9.5 step 5: the disk states decide where the identifiers are equal. `None`: they have no say. The log
/// text is [`by_disk_states_text`].
pub fn by_disk_states(c: &Compare<'_>, verdict: &Verdict) -> Option<Verdict> {
    let (mine, its) = (c.me.real_disk(), c.peer.real_disk());
    let no_sync = verdict.strategy == NoSync;
    let one_inconsistent = (mine == DiskState::Inconsistent) != (its == DiskState::Inconsistent);
    let usable = mine >= DiskState::Inconsistent && its >= DiskState::Inconsistent;
    let known = mine != DiskState::DUnknown && its != DiskState::DUnknown;
    let weak_rule = matches!(verdict.rule, Rule::Reconnected | Rule::LostQuorum | Rule::BothOff);
    let asked = if c.apv >= 119 {
        (weak_rule && verdict.strategy.is_if_both_failed()) || (no_sync && one_inconsistent)
    } else {
        (verdict.rule == Rule::BothOff || no_sync) && one_inconsistent
    };
    if !asked || !usable || !known || mine == its {
        return None;
    }
    let (strategy, copy_from) = if mine > its { source_bitmap(c) } else { (target_bitmap(c), None) };
    Some(Verdict { copy_from, ..Verdict::new(strategy, verdict.rule) })
}

/// The log line of step 5 of §9.5.
pub fn by_disk_states_text(c: &Compare<'_>, strategy: Strategy) -> String {
    format!("strategy = {strategy} due to disk states. ({}/{})", c.me.real_disk(), c.peer.real_disk())
}

/// Which of the two sides' slots fits a target that presents a third node's current UUID (§9.5 step 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    Use,
    Other(u8),
    Missing,
}

/// The source looks where its slots hold what the target presents for it.
fn fit(c: &Compare<'_>, source: &Side<'_>, target: &Side<'_>) -> Fit {
    let wanted = target.uuids.slot(source.node_id);
    let slot = source.uuids.slot(target.node_id);
    let equal_currents = same(source.uuids.current, target.uuids.current);
    let level = same(slot, wanted) && wanted != NOT_MEANINGFUL && (equal_currents || is_generation(wanted));
    match other_slot(source.uuids, wanted, c) {
        _ if !target.has(UuidFlags::SYNC_TARGET) || level => Fit::Use,
        Some(node) if is_generation(wanted) => Fit::Other(node),
        _ => Fit::Missing,
    }
}

fn source_bitmap(c: &Compare<'_>) -> (Strategy, Option<u8>) {
    match fit(c, &c.me, &c.peer) {
        Fit::Use => (SyncSourceUseBitmap, None),
        Fit::Other(node) => (SyncSourceCopyBitmap, Some(node)),
        Fit::Missing => (SyncSourceSetBitmap, None),
    }
}

fn target_bitmap(c: &Compare<'_>) -> Strategy {
    match fit(c, &c.peer, &c.me) {
        Fit::Use => SyncTargetUseBitmap,
        Fit::Other(_) => SyncTargetClearBitmap,
        Fit::Missing => SyncTargetSetBitmap,
    }
}

/// The replication state a strategy leads to (§9.5 step 14); `None` if it does not lead to a connection.
pub fn resulting_repl(strategy: Strategy, own: Role, peer: Role) -> Option<ReplState> {
    let primary = (own == Role::Primary, peer == Role::Primary);
    match strategy {
        NoSync => Some(ReplState::Established),
        _ if strategy.is_if_both_failed() && primary != (false, false) => Some(match primary {
            (true, true) => ReplState::Established,
            (true, false) => ReplState::WFBitMapS,
            (false, _) => ReplState::WFBitMapT,
        }),
        _ if strategy.is_source() => Some(ReplState::WFBitMapS),
        _ if strategy.is_target() => Some(ReplState::WFBitMapT),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
