//! The tables of `spec/state-machine.md` §9 and the steps 4, 5 and 14 of §9.5, row by row.

use super::super::fixtures::{compare, set};
use super::super::uuid::{JUST_CREATED, PRIMARY_BIT};
use super::*;

const A: u64 = 0xa0;
const B: u64 = 0xb0;
const C: u64 = 0xc0;

fn mirrored<'a>(c: &Compare<'a>) -> Compare<'a> {
    Compare { me: c.peer, peer: c.me, resolve_conflicts: !c.resolve_conflicts, ..*c }
}

/// The table of §9.2, with the result and with what the other side finds.
#[test]
fn rules_in_order() {
    let none: &[(usize, u64)] = &[];
    let rows = [
        (set(4, none, &[]), set(0, none, &[]), NoSync, Rule::JustCreatedBoth, NoSync, Rule::JustCreatedBoth),
        (
            set(JUST_CREATED, none, &[]),
            set(A, none, &[]),
            SyncTargetSetBitmap,
            Rule::JustCreatedSelf,
            SyncSourceSetBitmap,
            Rule::JustCreatedPeer,
        ),
        (set(A, none, &[]), set(A | PRIMARY_BIT, none, &[]), NoSync, Rule::BothOff, NoSync, Rule::BothOff),
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
    for line in include_str!("../../../tests/data/uuid_compare.txt").lines().filter(|l| !l.starts_with('#')) {
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
    assert_eq!(uuid_compare(&changed).log_line(), "uuid_compare()=retry by rule=initial-handshake-changed");
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
    let flags = |n: u32| NONE.with(CRASHED, n & 1 != 0).with(LOST, n & 2 != 0).with(RECONNECT, n & 4 != 0);
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
