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
mod tests {
    use super::super::uuid::{JUST_CREATED, PRIMARY_BIT};
    use super::*;

    const A: u64 = 0xa0;
    const B: u64 = 0xb0;
    const C: u64 = 0xc0;

    /// Node 0 is self, node 1 the peer.
    fn set(current: u64, bitmap: &[(usize, u64)], history: &[u64]) -> UuidSet {
        let mut s = UuidSet { current, ..UuidSet::default() };
        for (n, uuid) in bitmap {
            s.bitmap[*n] = *uuid;
        }
        for (slot, uuid) in s.history.iter_mut().zip(history) {
            *slot = *uuid;
        }
        s
    }

    fn side(node_id: u8, uuids: &UuidSet) -> Side<'_> {
        Side {
            node_id,
            role: Role::Secondary,
            disk: DiskState::UpToDate,
            uuids,
            bits: 1,
            flags: UuidFlags::STABLE,
            missed_end: false,
            quorate: true,
        }
    }

    fn compare<'a>(mine: &'a UuidSet, its: &'a UuidSet) -> Compare<'a> {
        Compare {
            me: side(0, mine),
            peer: side(1, its),
            apv: 124,
            features: Features::ALL,
            protocol: WireProtocol::C,
            resolve_conflicts: true,
            connecting: true,
            changed_since_sent: false,
        }
    }

    fn mirrored<'a>(c: &Compare<'a>) -> Compare<'a> {
        Compare { me: c.peer, peer: c.me, resolve_conflicts: !c.resolve_conflicts, ..*c }
    }

    /// The table of §9.2, with the result and with what the other side finds.
    #[test]
    fn rules_in_order() {
        let none: &[(usize, u64)] = &[];
        let rows = [
            (
                set(4, none, &[]),
                set(0, none, &[]),
                NoSync,
                Rule::JustCreatedBoth,
                NoSync,
                Rule::JustCreatedBoth,
            ),
            (
                set(JUST_CREATED, none, &[]),
                set(A, none, &[]),
                SyncTargetSetBitmap,
                Rule::JustCreatedSelf,
                SyncSourceSetBitmap,
                Rule::JustCreatedPeer,
            ),
            (
                set(A, none, &[]),
                set(A | PRIMARY_BIT, none, &[]),
                NoSync,
                Rule::BothOff,
                NoSync,
                Rule::BothOff,
            ),
            (
                set(A, none, &[]),
                set(B, &[(0, A | PRIMARY_BIT)], &[]),
                SyncTargetUseBitmap,
                Rule::BitmapPeer,
                SyncSourceUseBitmap,
                Rule::BitmapSelf,
            ),
            (
                set(A, none, &[]),
                set(B, &[(0, C), (5, A)], &[]),
                SyncTargetClearBitmap,
                Rule::BitmapPeerOther,
                SyncSourceCopyBitmap,
                Rule::BitmapSelfOther,
            ),
            (
                set(A, none, &[]),
                set(B, none, &[C, A]),
                SyncTargetSetBitmap,
                Rule::HistoryPeer,
                SyncSourceSetBitmap,
                Rule::HistorySelf,
            ),
            (
                set(A, &[(1, C | PRIMARY_BIT)], &[]),
                set(B, &[(0, C)], &[]),
                SplitBrainAutoRecover,
                Rule::BitmapBoth,
                SplitBrainAutoRecover,
                Rule::BitmapBoth,
            ),
            (
                set(A, none, &[0x10, C]),
                set(B, none, &[0x20, 0x30, C]),
                SplitBrainDisconnect,
                Rule::HistoryBoth,
                SplitBrainDisconnect,
                Rule::HistoryBoth,
            ),
            (
                set(A, none, &[0x10]),
                set(B, none, &[0x20]),
                UnrelatedData,
                Rule::HistoryBoth,
                UnrelatedData,
                Rule::HistoryBoth,
            ),
        ];
        for (mine, its, strategy, rule, its_strategy, its_rule) in &rows {
            let c = compare(mine, its);
            let (v, w) = (uuid_compare(&c), uuid_compare(&mirrored(&c)));
            assert_eq!((v.strategy, v.rule), (*strategy, *rule));
            assert_eq!((w.strategy, w.rule), (*its_strategy, *its_rule), "the other side of {rule}");
            assert_eq!(w.copy_from, (*its_strategy == SyncSourceCopyBitmap).then_some(5));
        }
    }

    /// What kernels concluded from what they saw of each other.
    #[test]
    fn as_the_kernel() {
        let hex = |text: &str| u64::from_str_radix(text, 16).expect("hexadecimal");
        let mut count = 0;
        for line in include_str!("../../tests/data/uuid_compare.txt").lines().filter(|l| !l.starts_with('#'))
        {
            let words: Vec<&str> = line.split(' ').collect();
            let parse = |words: &[&str], peer: usize| {
                let uuids = set(hex(words[0]), &[(peer, hex(words[1]))], &[hex(words[2]), hex(words[3])]);
                (uuids, words[4].parse::<u64>().expect("bits"), UuidFlags(hex(words[5])))
            };
            let (mine, my_bits, my_flags) = parse(&words[..6], 1);
            let (its, its_bits, its_flags) = parse(&words[6..12], 0);
            let mut c = compare(&mine, &its);
            (c.me.bits, c.me.flags) = (my_bits, my_flags);
            (c.peer.bits, c.peer.flags) = (its_bits, its_flags);
            let v = uuid_compare(&c);
            assert_eq!(
                (v.strategy.to_string().as_str(), v.rule.to_string().as_str()),
                (words[12], words[13]),
                "{line}"
            );
            count += 1;
        }
        assert!(count > 50, "{count}");
    }

    #[test]
    fn earlier_rules_win() {
        let mine = set(A, &[(1, B)], &[]);
        let its = set(B, &[(0, A)], &[A]);
        assert_eq!(uuid_compare(&compare(&mine, &its)).rule, Rule::BitmapPeer);
        let changed = Compare { changed_since_sent: true, ..compare(&mine, &its) };
        assert_eq!(uuid_compare(&changed), Verdict::new(Retry, Rule::InitialHandshakeChanged));
        assert_eq!(
            uuid_compare(&changed).log_line(),
            "uuid_compare()=retry by rule=initial-handshake-changed"
        );
        let attach = Compare { connecting: false, ..changed };
        assert_eq!(uuid_compare(&attach).rule, Rule::BitmapPeer);
        let void = set(A, &[(1, NOT_MEANINGFUL)], &[]);
        let void_too = set(B, &[(0, NOT_MEANINGFUL)], &[]);
        assert_eq!(
            uuid_compare(&compare(&void, &void_too)).strategy,
            UnrelatedData,
            "two empty slots are no split brain"
        );
    }

    const CRASHED: UuidFlags = UuidFlags::CRASHED_PRIMARY;
    const LOST: UuidFlags = UuidFlags::PRIMARY_LOST_QUORUM;
    const RECONNECT: UuidFlags = UuidFlags::RECONNECT;
    const NONE: UuidFlags = UuidFlags::NONE;

    /// Rows c to p of §9.3: apv, protocol, own flags, peer's flags, strategy, rule.
    #[test]
    fn equal_currents_rows() {
        use WireProtocol::{A as PA, B as PB, C as PC};
        let rows = [
            (120, PC, RECONNECT, RECONNECT, NoSync, Rule::Reconnected),
            (120, PC, RECONNECT | LOST, RECONNECT, NoSync, Rule::Reconnected),
            (121, PA, CRASHED, NONE, SyncSourceUseBitmap, Rule::CrashedPrimary),
            (121, PB, NONE, CRASHED, SyncTargetUseBitmap, Rule::CrashedPrimary),
            (121, PA, CRASHED, CRASHED, SyncTargetIfBothFailed, Rule::BothOff),
            (120, PA, CRASHED, NONE, SyncSourceIfBothFailed, Rule::BothOff),
            (121, PC, CRASHED, NONE, SyncSourceIfBothFailed, Rule::BothOff),
            (124, PC, NONE, LOST, SyncTargetIfBothFailed, Rule::LostQuorum),
            (124, PC, LOST, NONE, SyncSourceIfBothFailed, Rule::LostQuorum),
            (124, PC, LOST, LOST, SyncSourceIfBothFailed, Rule::LostQuorum),
            (119, PC, RECONNECT, RECONNECT, NoSync, Rule::Reconnected),
            (119, PC, RECONNECT | LOST, RECONNECT, SyncSourceIfBothFailed, Rule::LostQuorum),
            (124, PC, RECONNECT, CRASHED, SyncSourceIfBothFailed, Rule::LostQuorum),
            (119, PC, RECONNECT, CRASHED, SyncSourceIfBothFailed, Rule::Reconnected),
            (124, PC, CRASHED, RECONNECT, SyncTargetIfBothFailed, Rule::LostQuorum),
            (119, PC, CRASHED, RECONNECT, SyncTargetIfBothFailed, Rule::Reconnected),
            (124, PC, NONE, RECONNECT, NoSync, Rule::LostQuorum),
            (119, PC, RECONNECT, NONE, NoSync, Rule::Reconnected),
            (124, PC, CRASHED, CRASHED, SyncTargetIfBothFailed, Rule::BothOff),
            (124, PC, NONE, CRASHED, SyncTargetIfBothFailed, Rule::BothOff),
            (124, PC, NONE, NONE, NoSync, Rule::BothOff),
        ];
        let uuids = set(A, &[], &[]);
        for (apv, protocol, mine, its, strategy, rule) in rows {
            let mut c = Compare { apv, protocol, ..compare(&uuids, &uuids) };
            (c.me.flags, c.peer.flags) = (mine, its);
            let v = uuid_compare(&c);
            assert_eq!((v.strategy, v.rule), (strategy, rule), "{apv} {mine:?} {its:?}");
        }
        let mut c = compare(&uuids, &uuids);
        (c.me.flags, c.peer.flags) = (RECONNECT, RECONNECT);
        c.me.missed_end = true;
        assert_eq!(uuid_compare(&c).rule, Rule::SyncSourceMissedFinish);
        assert_eq!(uuid_compare(&mirrored(&c)).rule, Rule::SyncTargetPeerMissedFinish);
        assert_eq!(uuid_compare(&mirrored(&c)).strategy, SyncTargetUseBitmap);
    }

    /// Both sides must agree whatever the flags: 6 protocol versions, all flags, marks, protocols, ends.
    #[test]
    fn equal_currents_are_mirrored() {
        let uuids = set(A, &[], &[]);
        let flags =
            |n: u32| NONE.with(CRASHED, n & 1 != 0).with(LOST, n & 2 != 0).with(RECONNECT, n & 4 != 0);
        for apv in [86, 118, 119, 120, 121, 124] {
            for n in 0..(8 * 8 * 3 * 2 * 2) {
                let mut c = Compare { apv, ..compare(&uuids, &uuids) };
                (c.me.flags, c.peer.flags) = (flags(n), flags(n / 8));
                c.me.missed_end = n / 64 % 3 == 1;
                c.peer.missed_end = n / 64 % 3 == 2;
                c.resolve_conflicts = n / 192 % 2 == 0;
                c.protocol = if n / 384 == 0 { WireProtocol::A } else { WireProtocol::C };
                let (v, w) = (uuid_compare(&c), uuid_compare(&mirrored(&c)));
                assert_eq!(v.strategy.inverse().unwrap_or(NoSync), w.strategy, "{c:?}");
            }
        }
    }

    /// The first table of §9.3.
    #[test]
    fn missed_finish_below_110() {
        let plain = set(A, &[], &[B, C]);
        let source = set(A, &[(1, B)], &[B]);
        let cases = [
            (
                &source,
                &plain,
                101,
                SyncSourceUseBitmap,
                Rule::SyncSourceMissedFinish,
                Some(Repair::OwnSlotToHistory),
            ),
            (&source, &plain, 90, RequiresProto(91), Rule::SyncSourceMissedFinish, None),
        ];
        for (mine, its, apv, strategy, rule, repair) in cases {
            let v = uuid_compare(&Compare { apv, ..compare(mine, its) });
            assert_eq!((v.strategy, v.rule, v.repair), (strategy, rule, repair));
        }
        let other = set(A, &[], &[C]);
        let v = uuid_compare(&Compare { apv: 101, ..compare(&source, &other) });
        assert_eq!((v.strategy, v.rule), (SyncSourceUseBitmap, Rule::SyncSourcePeerMissedFinish));

        let its = set(A, &[(0, B)], &[C]);
        let v = uuid_compare(&Compare { apv: 101, ..compare(&plain, &its) });
        assert_eq!((v.strategy, v.rule), (SyncTargetUseBitmap, Rule::SyncTargetPeerMissedFinish));
        assert_eq!(v.repair, Some(Repair::PeerSlotToHistory));
        let v = uuid_compare(&Compare { apv: 101, ..compare(&other, &its) });
        assert_eq!((v.strategy, v.rule), (SyncTargetUseBitmap, Rule::SyncTargetMissedFinish));
        let v = uuid_compare(&Compare { apv: 90, ..compare(&other, &its) });
        assert_eq!(v.strategy, RequiresProto(91));
        let v = uuid_compare(&Compare { apv: 110, ..compare(&plain, &its) });
        assert_eq!(v.rule, Rule::BothOff, "not from protocol 110 on");
    }

    /// §9.4.
    #[test]
    fn missed_start_below_110() {
        let offset = A + SYNC_UUID_OFFSET;
        let target = set(A, &[], &[C]);
        let cases = [
            (101, set(B, &[(0, offset)], &[A]), SyncTargetUseBitmap),
            (95, set(B, &[], &[A, C]), SyncTargetUseBitmap),
            (90, set(B, &[], &[A, C]), RequiresProto(91)),
        ];
        for (apv, source, strategy) in &cases {
            let c = Compare { apv: *apv, ..compare(&target, source) };
            let v = uuid_compare(&c);
            assert_eq!((v.strategy, v.rule), (*strategy, Rule::SyncTargetMissedStart));
            let w = uuid_compare(&mirrored(&c));
            assert_eq!(w.rule, Rule::SyncSourceMissedStart);
            if *apv > 90 {
                assert_eq!(v.repair, Some(Repair::PeerHistoryToSlot));
                assert_eq!((w.strategy, w.repair), (SyncSourceUseBitmap, Some(Repair::OwnHistoryToSlot)));
            }
        }
        let source = set(B, &[(0, offset)], &[A]);
        assert_eq!(uuid_compare(&compare(&target, &source)).rule, Rule::HistoryPeer, "not from 110 on");
    }

    #[test]
    fn step4_missed_end_without_bits() {
        let uuids = set(A, &[], &[]);
        let mut c = Compare { apv: 123, ..compare(&uuids, &uuids) };
        (c.me.bits, c.peer.bits) = (0, 0);
        let source = Verdict::new(SyncSourceUseBitmap, Rule::SyncSourceMissedFinish);
        let target = Verdict::new(SyncTargetUseBitmap, Rule::SyncTargetPeerMissedFinish);
        assert_eq!(missed_end_without_bits(&c, source).strategy, Retry);
        assert_eq!(missed_end_without_bits(&c, target), target);
        c.me.role = Role::Primary;
        assert_eq!(missed_end_without_bits(&c, target).strategy, RequiresProto(124));
        c.peer.bits = 1;
        assert_eq!(missed_end_without_bits(&c, source), source);
        c.peer.bits = 0;
        c.apv = 124;
        assert_eq!(missed_end_without_bits(&c, source), source);
    }

    #[test]
    fn step5_disk_states() {
        use DiskState::{Attaching, Consistent, DUnknown, Inconsistent, Outdated, UpToDate};
        let uuids = set(A, &[], &[]);
        let no_sync = Verdict::new(NoSync, Rule::BothOff);
        let failed = Verdict::new(SyncTargetIfBothFailed, Rule::LostQuorum);
        let bitmap = Verdict::new(SyncTargetUseBitmap, Rule::BitmapPeer);
        let rows = [
            (119, UpToDate, Inconsistent, no_sync, Some(SyncSourceUseBitmap)),
            (119, Inconsistent, Outdated, no_sync, Some(SyncTargetUseBitmap)),
            (119, UpToDate, Outdated, no_sync, None),
            (119, UpToDate, Outdated, failed, Some(SyncSourceUseBitmap)),
            (119, Outdated, Consistent, failed, Some(SyncTargetUseBitmap)),
            (119, UpToDate, UpToDate, failed, None),
            (119, UpToDate, DUnknown, failed, None),
            (119, UpToDate, Attaching, failed, None),
            (119, UpToDate, Inconsistent, bitmap, None),
            (118, UpToDate, Inconsistent, no_sync, Some(SyncSourceUseBitmap)),
            (118, UpToDate, Outdated, failed, None),
            (118, Inconsistent, UpToDate, failed, None),
            (
                118,
                Inconsistent,
                UpToDate,
                Verdict::new(SyncSourceIfBothFailed, Rule::BothOff),
                Some(SyncTargetUseBitmap),
            ),
        ];
        for (apv, mine, its, verdict, want) in rows {
            let mut c = Compare { apv, ..compare(&uuids, &uuids) };
            (c.me.disk, c.peer.disk) = (mine, its);
            let got = by_disk_states(&c, &verdict);
            assert_eq!(got.map(|v| v.strategy), want, "{apv} {mine:?}/{its:?} {verdict:?}");
            assert!(got.is_none_or(|v| v.rule == verdict.rule));
        }
        let mut c = compare(&uuids, &uuids);
        c.peer.disk = DiskState::Negotiating;
        c.peer.flags = UuidFlags::INCONSISTENT;
        assert_eq!(by_disk_states(&c, &no_sync).map(|v| v.strategy), Some(SyncSourceUseBitmap));
        let text = by_disk_states_text(&c, SyncSourceUseBitmap);
        assert_eq!(text, "strategy = source-use-bitmap due to disk states. (UpToDate/Inconsistent)");
    }

    /// The would-be target presents the UUID of a third node it syncs from.
    #[test]
    fn step5_target_of_a_third_node() {
        let no_sync = Verdict::new(NoSync, Rule::BothOff);
        let rows = [
            (set(A, &[(1, B)], &[]), set(A, &[(0, B)], &[]), SyncSourceUseBitmap, None),
            (set(A, &[], &[]), set(A, &[], &[]), SyncSourceUseBitmap, None),
            (set(A, &[(1, C), (7, B)], &[]), set(A, &[(0, B)], &[]), SyncSourceCopyBitmap, Some(7)),
            (set(A, &[(1, C)], &[]), set(A, &[(0, B)], &[]), SyncSourceSetBitmap, None),
            (set(A, &[(1, C)], &[]), set(A, &[(0, NOT_MEANINGFUL)], &[]), SyncSourceSetBitmap, None),
        ];
        for (source, target, strategy, copy_from) in &rows {
            let mut c = compare(source, target);
            c.peer.disk = DiskState::Inconsistent;
            c.peer.flags = UuidFlags::SYNC_TARGET;
            let v = by_disk_states(&c, &no_sync).expect("disks differ");
            assert_eq!((v.strategy, v.copy_from), (*strategy, *copy_from));
            let w = by_disk_states(&mirrored(&c), &no_sync).expect("disks differ");
            assert_eq!(Some(w.strategy), strategy.inverse());
        }
    }

    #[test]
    fn step14_replication_state() {
        use ReplState::{Established, WFBitMapS, WFBitMapT};
        use Role::{Primary as P, Secondary as S};
        let rows = [
            (NoSync, P, S, Some(Established)),
            (SyncSourceCopyBitmap, S, S, Some(WFBitMapS)),
            (SyncTargetClearBitmap, S, P, Some(WFBitMapT)),
            (SyncSourceIfBothFailed, S, S, Some(WFBitMapS)),
            (SyncTargetIfBothFailed, S, S, Some(WFBitMapT)),
            (SyncSourceIfBothFailed, S, P, Some(WFBitMapT)),
            (SyncTargetIfBothFailed, P, S, Some(WFBitMapS)),
            (SyncTargetIfBothFailed, P, P, Some(Established)),
            (SplitBrainDisconnect, S, S, None),
            (Retry, S, S, None),
        ];
        for (strategy, own, peer, want) in rows {
            assert_eq!(resulting_repl(strategy, own, peer), want, "{strategy}");
        }
    }
}
