//! The tables of `spec/state-machine.md` §10 and the steps of §9.5, row by row.

use super::super::fixtures;
use super::super::uuid::UuidSet;
use super::*;
use Strategy::{
    NoSync, SplitBrainDisconnect, SyncSourceSetBitmap, SyncSourceUseBitmap, SyncTargetSetBitmap,
    SyncTargetUseBitmap,
};
use palisade_wire::enums::WireProtocol;

const DISCARD: UuidFlags = UuidFlags::DISCARD_MY_DATA;
const BASE: u64 = 0xb0;

fn set(current: u64, slot_for: usize, slot: u64) -> UuidSet {
    fixtures::set(current, &[(slot_for, slot)], &[0xf0])
}

fn negotiation<'a>(mine: &'a UuidSet, its: &'a UuidSet) -> Negotiation<'a> {
    let mut compare = fixtures::compare(mine, its);
    (compare.me.bits, compare.peer.bits) = (10, 10);
    Negotiation {
        compare,
        policies: Policies {
            after_sb_0pri: AfterSb::Disconnect,
            after_sb_1pri: AfterSb::Disconnect,
            after_sb_2pri: AfterSb::Disconnect,
            always_asbp: false,
            rr_conflict: RrConflict::Disconnect,
            quorum_enabled: false,
            tentative: false,
        },
        phase: Phase::Connect,
        attaching: false,
        lost_primary: None,
        demoted: None,
    }
}

/// Runs `change` on a negotiation after both sides went on from [`BASE`]; the slots carry these primary bits.
fn split(ps: u64, pp: u64, change: impl Fn(&mut Negotiation<'_>)) -> Outcome {
    let (mine, its) = (set(0xa0, 1, BASE | ps), set(0xc0, 0, BASE | pp));
    let mut n = negotiation(&mine, &its);
    change(&mut n);
    negotiate(&n)
}

fn unresolved(outcome: &Outcome) -> bool {
    outcome.verdict.strategy == SplitBrainDisconnect
        && outcome.action == Action::Disconnect
        && outcome.handlers.last() == Some(&Handler::SplitBrain)
}

/// Some(true): self is source.
fn winner(outcome: &Outcome) -> Option<bool> {
    match outcome.action {
        Action::Go(ReplState::WFBitMapS) => Some(true),
        Action::Go(ReplState::WFBitMapT) => Some(false),
        _ => {
            assert!(unresolved(outcome), "{outcome:?}");
            None
        }
    }
}

/// The table of §10.3: option, primary bits of both slots, both bit counts, resolver, self is source.
#[test]
fn after_sb_0pri() {
    use AfterSb::*;
    let rows = [
        (Disconnect, 0, 0, 0, 0, true, None),
        (DiscardYoungerPrimary, 0, 1, 9, 9, true, Some(false)),
        (DiscardYoungerPrimary, 1, 0, 9, 9, true, Some(true)),
        (DiscardYoungerPrimary, 1, 1, 9, 0, true, Some(true)),
        (DiscardYoungerPrimary, 0, 0, 8, 9, true, Some(false)),
        (DiscardOlderPrimary, 0, 1, 9, 9, true, Some(true)),
        (DiscardOlderPrimary, 1, 0, 9, 9, true, Some(false)),
        (DiscardOlderPrimary, 0, 0, 0, 9, true, Some(false)),
        (DiscardZeroChanges, 0, 0, 0, 0, true, Some(false)),
        (DiscardZeroChanges, 0, 0, 0, 0, false, Some(true)),
        (DiscardZeroChanges, 0, 0, 1, 0, true, Some(true)),
        (DiscardZeroChanges, 0, 0, 0, 1, true, Some(false)),
        (DiscardZeroChanges, 0, 0, 1, 1, true, None),
        (DiscardLeastChanges, 0, 0, 1, 2, true, Some(false)),
        (DiscardLeastChanges, 0, 0, 2, 1, true, Some(true)),
        (DiscardLeastChanges, 0, 0, 2, 2, true, Some(false)),
        (DiscardLeastChanges, 0, 0, 2, 2, false, Some(true)),
        (DiscardLocal, 0, 0, 9, 0, true, Some(false)),
        (DiscardRemote, 0, 0, 0, 9, true, Some(true)),
    ];
    for (policy, ps, pp, cs, cp, resolver, want) in rows {
        let got = split(ps, pp, |n| {
            n.policies.after_sb_0pri = policy;
            (n.compare.me.bits, n.compare.peer.bits) = (cs, cp);
            n.compare.resolve_conflicts = resolver;
        });
        assert_eq!(winner(&got), want, "{policy} {ps}{pp} {cs}/{cp} {resolver}");
        assert_eq!(got.handlers[0], Handler::InitialSplitBrain);
        // The other side must come to the mirrored result.
        let other = split(pp, ps, |n| {
            n.policies.after_sb_0pri = policy.mirrored();
            (n.compare.me.bits, n.compare.peer.bits) = (cp, cs);
            n.compare.resolve_conflicts = !resolver;
        });
        assert_eq!(winner(&other), want.map(|source| !source), "mirror of {policy}");
    }
    for policy in [Consensus, DiscardSecondary, CallPriLostAfterSb, ViolentlyAs0p, RetryConnect, AutoDiscard]
    {
        let got = split(0, 0, |n| n.policies.after_sb_0pri = policy);
        assert!(unresolved(&got) && got.log.iter().any(|l| l == "Configuration error."), "{policy}");
    }
}

fn with_roles(n: &mut Negotiation<'_>, mine: Role, its: Role) {
    (n.compare.me.role, n.compare.peer.role) = (mine, its);
    // What follows a solved split brain is tested apart.
    n.policies.rr_conflict = RrConflict::Violently;
}

/// The table of §10.4 with one Primary: option, 0pri option, self is Primary, self is source.
#[test]
fn after_sb_1pri() {
    use AfterSb::*;
    let rows = [
        (Disconnect, DiscardLocal, true, None),
        (Consensus, DiscardLocal, true, None),
        (Consensus, DiscardLocal, false, Some(false)),
        (Consensus, DiscardRemote, true, Some(true)),
        (Consensus, DiscardRemote, false, None),
        (Consensus, Disconnect, true, None),
        (ViolentlyAs0p, DiscardLocal, true, Some(false)),
        (ViolentlyAs0p, DiscardRemote, true, Some(true)),
        (DiscardSecondary, Disconnect, true, Some(true)),
        (DiscardSecondary, Disconnect, false, Some(false)),
        (CallPriLostAfterSb, DiscardRemote, true, Some(true)),
        (CallPriLostAfterSb, DiscardRemote, false, Some(true)),
        (CallPriLostAfterSb, DiscardLocal, false, Some(false)),
        (CallPriLostAfterSb, Disconnect, true, None),
        (DiscardLeastChanges, DiscardLocal, true, None),
    ];
    for (policy, zero, primary, want) in rows {
        let got = split(0, 0, |n| {
            let (mine, its) =
                if primary { (Role::Primary, Role::Secondary) } else { (Role::Secondary, Role::Primary) };
            with_roles(n, mine, its);
            (n.policies.after_sb_0pri, n.policies.after_sb_1pri) = (zero, policy);
        });
        assert_eq!(winner(&got), want, "{policy} {zero} {primary}");
    }
}

#[test]
fn after_sb_2pri() {
    use AfterSb::*;
    let rows = [
        (Disconnect, DiscardLocal, None),
        (Consensus, DiscardLocal, None),
        (DiscardSecondary, DiscardLocal, None),
        (ViolentlyAs0p, DiscardLocal, Some(false)),
        (ViolentlyAs0p, DiscardRemote, Some(true)),
        (CallPriLostAfterSb, DiscardRemote, Some(true)),
        (AutoDiscard, DiscardRemote, None),
    ];
    for (policy, zero, want) in rows {
        let got = split(0, 0, |n| {
            with_roles(n, Role::Primary, Role::Primary);
            (n.policies.after_sb_0pri, n.policies.after_sb_2pri) = (zero, policy);
        });
        assert_eq!(winner(&got), want, "{policy} {zero}");
    }
}

#[test]
fn demotion_after_split_brain() {
    for (roles, tag) in [
        ((Role::Primary, Role::Secondary), "after-sb-1pri"),
        ((Role::Primary, Role::Primary), "after-sb-2pri"),
    ] {
        let run = |demoted| {
            split(0, 0, |n| {
                (n.compare.me.role, n.compare.peer.role) = roles;
                n.policies.after_sb_0pri = AfterSb::DiscardLocal;
                n.policies.after_sb_1pri = AfterSb::CallPriLostAfterSb;
                n.policies.after_sb_2pri = AfterSb::CallPriLostAfterSb;
                n.demoted = demoted;
            })
        };
        let ask = run(None);
        assert_eq!((ask.action, ask.handlers), (Action::Demote(tag), vec![Handler::InitialSplitBrain]));
        let yes = run(Some(true));
        assert_eq!(yes.action, Action::Go(ReplState::WFBitMapT), "no rr-conflict: self is Secondary now");
        assert_eq!(yes.log[0], "Successfully gave up primary role.");
        assert_eq!(yes.handlers, []);
        let no = run(Some(false));
        assert!(unresolved(&no));
        assert_eq!(no.handlers, [Handler::PriLostAfterSb, Handler::SplitBrain]);
    }
}

#[test]
fn texts() {
    let got = split(0, 0, |n| n.policies.after_sb_0pri = AfterSb::DiscardRemote);
    assert_eq!(
        got.log,
        [
            "uuid_compare()=split-brain-auto-recover by rule=bitmap-both",
            "Split-Brain detected, 0 primaries, automatically solved. Sync from this node",
        ]
    );
    let got = split(0, 0, |_| {});
    assert_eq!(got.log[1], "Split-Brain detected but unresolved, dropping connection!");
    let got = split(0, 0, |n| n.phase = Phase::Attach);
    assert_eq!(got.action, Action::NoResult);
    assert!(got.log[1].contains("during attach"));
    let names: Vec<_> =
        [Handler::InitialSplitBrain, Handler::SplitBrain, Handler::PriLost, Handler::PriLostAfterSb]
            .map(Handler::name)
            .into();
    assert_eq!(names, ["initial-split-brain", "split-brain", "pri-lost", "pri-lost-after-sb"]);
}

#[test]
fn quorum_decides_first() {
    let quorate = |me, peer, apv| {
        split(0, 0, |n| {
            n.policies.quorum_enabled = true;
            n.policies.after_sb_0pri = AfterSb::DiscardLocal;
            n.compare.apv = apv;
            (n.compare.me.quorate, n.compare.peer.quorate) = (me, peer);
        })
    };
    assert_eq!(winner(&quorate(true, false, 118)), Some(true));
    assert_eq!(winner(&quorate(false, true, 118)), Some(false));
    assert_eq!(winner(&quorate(true, true, 118)), Some(false), "policy");
    assert_eq!(winner(&quorate(true, false, 101)), Some(false), "policy");
}

/// Only the history is common: bitmaps are of no use.
fn ambiguous(change: impl Fn(&mut Negotiation<'_>)) -> Outcome {
    let (mine, its) = (set(0xa0, 1, 0), set(0xc0, 0, 0));
    let mut n = negotiation(&mine, &its);
    change(&mut n);
    negotiate(&n)
}

#[test]
fn ambiguous_split_brain() {
    let policy = |always| {
        ambiguous(|n| {
            n.policies.after_sb_0pri = AfterSb::DiscardRemote;
            n.policies.always_asbp = always;
        })
    };
    assert!(unresolved(&policy(false)));
    let solved = policy(true);
    assert_eq!(solved.verdict.strategy, SyncSourceSetBitmap);
    assert_eq!(solved.log[2], "Doing a full sync, since UUIDs where ambiguous.");
}

/// §10.5.
#[test]
fn discard_my_data() {
    let flags = |mine, its| {
        move |n: &mut Negotiation<'_>| {
            n.compare.me.flags = n.compare.me.flags.with(DISCARD, mine);
            n.compare.peer.flags = n.compare.peer.flags.with(DISCARD, its);
        }
    };
    let rows = [
        (true, false, Some((SyncTargetUseBitmap, SyncTargetSetBitmap))),
        (false, true, Some((SyncSourceUseBitmap, SyncSourceSetBitmap))),
        (true, true, None),
        (false, false, None),
    ];
    for (mine, its, want) in rows {
        let (plain, full) = (split(0, 0, flags(mine, its)), ambiguous(flags(mine, its)));
        match want {
            None => assert!(unresolved(&plain) && unresolved(&full)),
            Some((use_bitmap, set_bitmap)) => {
                assert_eq!((plain.verdict.strategy, full.verdict.strategy), (use_bitmap, set_bitmap));
                assert!(plain.log[1].starts_with("Split-Brain detected, manually solved. Sync from"));
            }
        }
    }
}

#[test]
fn unstable_nodes_wait() {
    let got = split(0, 0, |n| n.compare.peer.flags = UuidFlags::NONE);
    assert_eq!((got.verdict.strategy, got.action), (NoSync, Action::Go(ReplState::Established)));
    assert_eq!(got.log[1], "Ignore Split-Brain, for now, at least one side unstable");
    assert_eq!(got.log[2], "No resync, but 10 bits in bitmap!");
    assert_eq!(got.handlers, []);
}

/// The peer has newer data: self is to be target by rule bitmap-peer.
fn target(change: impl Fn(&mut Negotiation<'_>)) -> Outcome {
    let (mine, its) = (set(BASE, 1, 0), set(0xc0, 0, BASE));
    let mut n = negotiation(&mine, &its);
    change(&mut n);
    negotiate(&n)
}

/// Step 10.
#[test]
fn discard_reverses_direction() {
    let newer_discards = |apv, disk| {
        target(|n| {
            n.compare.apv = apv;
            n.compare.peer.flags |= DISCARD;
            n.compare.me.disk = disk;
        })
    };
    let got = newer_discards(121, DiskState::UpToDate);
    assert_eq!(got.verdict.strategy, SyncSourceUseBitmap);
    assert_eq!(got.log[1], "Resync direction reversed by --discard-my-data. Reverting to older data!");
    assert_eq!(newer_discards(120, DiskState::UpToDate).verdict.strategy, SyncTargetUseBitmap);
    let got = newer_discards(121, DiskState::Inconsistent);
    assert_eq!(
        (got.verdict.strategy, got.log[1].as_str()),
        (SyncTargetUseBitmap, "Ignoring --discard-my-data")
    );
    let got = target(|n| n.compare.me.flags |= DISCARD);
    assert_eq!((got.verdict.strategy, got.log.len()), (SyncTargetUseBitmap, 1), "no contradiction");
}

/// Step 11.
#[test]
fn primary_as_target() {
    let run = |rr, disk, bits| {
        target(|n| {
            n.policies.rr_conflict = rr;
            (n.compare.me.role, n.compare.me.disk) = (Role::Primary, disk);
            (n.compare.me.bits, n.compare.peer.bits) = (0, bits);
        })
    };
    let go = Action::Go(ReplState::WFBitMapT);
    let up = DiskState::UpToDate;
    let rows = [
        (RrConflict::Disconnect, up, 1, Action::Disconnect),
        (RrConflict::Disconnect, up, 0, go),
        (RrConflict::Disconnect, DiskState::Consistent, 1, Action::Disconnect),
        (RrConflict::Disconnect, DiskState::Outdated, 1, go),
        (RrConflict::RetryConnect, up, 1, Action::Retry),
        (RrConflict::CallPriLost, up, 1, Action::Disconnect),
        (RrConflict::Violently, up, 1, go),
        (RrConflict::AutoDiscard, up, 1, Action::Disconnect),
    ];
    for (rr, disk, bits, want) in rows {
        let got = run(rr, disk, bits);
        assert_eq!(got.action, want, "{rr:?} {disk} {bits}");
        let said = got.log.iter().any(|l| l == "I shall become SyncTarget, but I am primary!");
        assert_eq!(said, want != go);
        assert_eq!(got.handlers == [Handler::PriLost], rr == RrConflict::CallPriLost);
    }
    let (mine, its) = (set(4, 1, 0), set(0xc0, 0, BASE));
    let mut n = negotiation(&mine, &its);
    n.compare.me.role = Role::Primary;
    (n.compare.me.bits, n.compare.peer.bits) = (0, 0);
    assert_eq!(negotiate(&n).action, Action::Disconnect, "a full sync overwrites, bits or not");
}

#[test]
fn auto_discard() {
    let uuids = set(0xa0, 1, 0);
    let mut n = negotiation(&uuids, &uuids);
    n.compare.protocol = WireProtocol::A;
    n.compare.me.role = Role::Primary;
    n.compare.peer.flags |= UuidFlags::CRASHED_PRIMARY;
    n.policies.rr_conflict = RrConflict::AutoDiscard;
    let got = negotiate(&n);
    assert_eq!((got.verdict.strategy, got.verdict.rule), (SyncSourceUseBitmap, Rule::CrashedPrimary));
    let c = n.compare;
    n.compare = Compare { me: Side { node_id: 0, ..c.peer }, peer: Side { node_id: 1, ..c.me }, ..c };
    assert_eq!(negotiate(&n).verdict.strategy, SyncTargetUseBitmap, "the crashed one mirrors it");
}

/// Step 6.
#[test]
fn reconcile() {
    let uuids = set(0xa0, 2, BASE);
    let lost = LostPrimary { named_by_peer: true, named_by_me: true, my_position: 5, peer_position: 5 };
    let by_me = LostPrimary { named_by_peer: false, ..lost };
    let ahead = LostPrimary { my_position: 6, ..lost };
    let behind = LostPrimary { my_position: 4, ..lost };
    let rows = [
        (Some(lost), 1, 0, SyncSourceUseBitmap, Rule::ReconcileBitmap),
        (Some(lost), 0, 1, SyncTargetUseBitmap, Rule::ReconcileBitmap),
        (Some(by_me), 0, 1, SyncTargetUseBitmap, Rule::ReconcileBitmap),
        (Some(by_me), 1, 1, NoSync, Rule::BothOff),
        (Some(ahead), 1, 1, SyncSourceUseBitmap, Rule::ReconcileDagtag),
        (Some(behind), 1, 1, SyncTargetUseBitmap, Rule::ReconcileDagtag),
        (Some(lost), 1, 1, SyncSourceUseBitmap, Rule::ReconcileBitmap),
        (Some(lost), 0, 0, NoSync, Rule::BothOff),
        (None, 1, 1, NoSync, Rule::BothOff),
    ];
    for (lost_primary, mine, its, strategy, rule) in rows {
        let mut n = Negotiation { lost_primary, ..negotiation(&uuids, &uuids) };
        (n.compare.me.bits, n.compare.peer.bits) = (mine, its);
        let got = negotiate(&n);
        assert_eq!(
            (got.verdict.strategy, got.verdict.rule),
            (strategy, rule),
            "{lost_primary:?} {mine}/{its}"
        );
        assert_eq!(got.force_checksums, strategy == SyncTargetUseBitmap);
    }
    let mut n = Negotiation { lost_primary: Some(lost), ..negotiation(&uuids, &uuids) };
    n.compare.features = Features::V9_2_18;
    assert_eq!(negotiate(&n).verdict.strategy, NoSync);
    n.compare.features = Features::ALL;
    n.compare.peer.disk = DiskState::Consistent;
    assert_eq!(negotiate(&n).verdict.strategy, SyncSourceUseBitmap);
    n.compare.peer.disk = DiskState::Outdated;
    assert_eq!(negotiate(&n).verdict.strategy, NoSync);
}

/// Steps 1 to 4.
#[test]
fn terminal_verdicts() {
    let (mine, its) = (set(0xa0, 1, 0), UuidSet { current: 0xc0, ..UuidSet::default() });
    let mut n = negotiation(&mine, &its);
    let got = negotiate(&n);
    assert_eq!((got.action, got.log[1].as_str()), (Action::Disconnect, "Unrelated data, aborting!"));
    n.compare.changed_since_sent = true;
    assert_eq!(negotiate(&n).action, Action::Retry);

    let old = set(0xa0, 1, BASE);
    let plain = UuidSet { current: 0xa0, ..UuidSet::default() };
    let mut n = negotiation(&old, &plain);
    n.compare.apv = 90;
    let got = negotiate(&n);
    let text = "To resolve this both sides have to support at least protocol 91";
    assert_eq!((got.action, got.log[1].as_str()), (Action::Disconnect, text));

    let mut n = negotiation(&plain, &plain);
    (n.compare.apv, n.compare.peer.missed_end) = (123, true);
    (n.compare.me.bits, n.compare.peer.bits) = (0, 0);
    n.compare.me.role = Role::Primary;
    assert_eq!(negotiate(&n).action, Action::Retry, "requires-proto-124 behaves as retry");
}

/// Step 12.
#[test]
fn missed_end_needs_an_uptodate_source() {
    let uuids = set(0xa0, 2, BASE);
    for (source, disk, strategy, clear_slot) in [
        (true, DiskState::UpToDate, SyncSourceUseBitmap, false),
        (true, DiskState::Outdated, NoSync, false),
        (false, DiskState::UpToDate, SyncTargetUseBitmap, false),
        (false, DiskState::Outdated, NoSync, true),
    ] {
        let mut n = negotiation(&uuids, &uuids);
        let side = if source { &mut n.compare.me } else { &mut n.compare.peer };
        (side.missed_end, side.disk) = (true, disk);
        let got = negotiate(&n);
        assert_eq!((got.verdict.strategy, got.clear_slot), (strategy, clear_slot));
    }
}

#[test]
fn dry_run() {
    let got = target(|n| n.policies.tentative = true);
    assert_eq!(got.action, Action::Disconnect);
    assert_eq!(got.log[1], "dry-run connect: Would become SyncTarget, doing a target-use-bitmap resync.");
    let uuids = set(0xa0, 2, BASE);
    let mut n = negotiation(&uuids, &uuids);
    n.policies.tentative = true;
    assert_eq!(negotiate(&n).log[1], "dry-run connect: No resync, would become Connected immediately.");
}

#[test]
fn by_disk_states_is_logged() {
    let uuids = set(0xa0, 2, BASE);
    let mut n = negotiation(&uuids, &uuids);
    n.compare.me.disk = DiskState::Inconsistent;
    let got = negotiate(&n);
    assert_eq!(got.action, Action::Go(ReplState::WFBitMapT));
    assert_eq!(got.log[1], "strategy = target-use-bitmap due to disk states. (Inconsistent/UpToDate)");
}
