//! Nodes that were apart: whose data counts when they meet again.

use super::{SECOND, demote, detach, quiet, sent_by};
use crate::harness::{Cluster, EXTENT, V, id};
use palisade_core::config::{OnNoData, ResourceConfig};
use palisade_core::io::{BlockResult, Command, Stream};
use palisade_wire::enums::{DiskState, ReplState};
use palisade_wire::{Packet, PeersInSync};
use std::cell::Cell;

/// Without data the Primary (node 0) waits.
fn patient(nodes: u8) -> Cluster {
    let mut c = quiet(nodes);
    let patient = ResourceConfig { on_no_data: OnNoData::SuspendIo, ..ResourceConfig::default() };
    c.ok(0, Command::SetResource(patient));
    c
}

/// What the node says after the next connect stays on the way, if it is of this kind.
fn hold_after_the_connect(c: &mut Cluster, node: u8, kind: fn(&Packet) -> bool) {
    let connected = Cell::new(false);
    c.hold(move |from, _, p| {
        connected.set(connected.get() || matches!(p, Packet::TwopcCommit(_)));
        from == node && connected.get() && kind(p)
    });
}

// ----- diskless Primaries -----

/// The link broke before the peer heard of the generation that the Primary began as its disk went; nothing was ever
/// written in it, and yet the peer was taken as outdated for want of it: writes hung (`spec/state-machine.md` §9.8).
#[test]
fn a_peer_that_missed_nothing_but_the_name_of_a_generation_serves_the_diskless_primary() {
    let mut c = patient(2);
    c.lose(|from, _, p| from == 0 && matches!(p, Packet::CurrentUuid(_)));
    detach(&mut c, 0, false);
    c.cut_link(0, 1);
    c.lose_nothing();
    let w = c.submit_write(0, 8, 3);
    c.advance(SECOND);
    assert_eq!(c.result(0, w), None);
    c.heal();
    assert_eq!(c.completion(0, w), BlockResult::Done);
    assert_eq!((c.read(0, 8), c.byte(1, 8)), (3, 3));
    c.attach(0);
    c.assert_heals();
}

/// The same with another replica at hand: a write during the handshake went to that one alone, and then the peer
/// counted as current (§9.8).
#[test]
fn a_write_waits_while_the_diskless_primary_shows_an_earlier_generation() {
    let mut c = patient(3);
    c.cut_links(&[(0, 2), (1, 2)]);
    detach(&mut c, 0, true);
    c.hold(|from, _, p| from == 2 && matches!(p, Packet::TwopcYes(_)));
    c.mend(0, 2);
    c.advance(SECOND / 5);
    assert!(c.held_packets() > 0, "the handshake is stopped before its commit");
    let w = c.submit_write(0, 8, 3);
    c.deliver();
    assert_eq!(c.completion(0, w), BlockResult::Done);
    assert_eq!((c.byte(1, 8), c.byte(2, 8)), (3, 3));
    c.heal();
    c.attach(0);
    c.assert_heals();
}

/// An Outdated peer with the very data a diskless Primary works on was Outdated to it until it said otherwise
/// (`spec/state-machine.md` §4.6).
#[test]
fn a_peer_at_the_generation_of_the_diskless_primary_counts_at_once() {
    let mut c = patient(2);
    detach(&mut c, 0, false);
    c.write(0, 0, 4096, 2);
    c.cut_link(0, 1);
    c.ok(1, Command::Outdate(V));
    hold_after_the_connect(&mut c, 1, |p| matches!(p, Packet::State(_)));
    c.mend(0, 1);
    c.wait("connected", |c| c.connected(0, 1));
    assert_eq!(c.nodes[0].core.state().pdsk(id(1), V), DiskState::UpToDate);
    let w = c.submit_write(0, 8, 3);
    assert_eq!(c.result(0, w), Some(&BlockResult::Done));
    c.deliver();
    c.attach(0);
    c.assert_heals();
}

/// A peer that was counted in at the handshake got no writes until it was heard to be UpToDate
/// (`spec/wire-protocol.md` §9.1).
#[test]
fn a_consistent_peer_of_the_same_generation_gets_the_writes() {
    let mut c = patient(3);
    c.cut_links(&[(0, 2), (1, 2)]);
    detach(&mut c, 0, true);
    hold_after_the_connect(&mut c, 2, |_| true);
    c.mend(0, 2);
    c.wait("connected", |c| c.connected(0, 2));
    assert_eq!(c.nodes[0].core.state().pdsk(id(2), V), DiskState::Consistent);
    let w = c.submit_write(0, 8, 3);
    assert_eq!(c.byte(2, 8), 3);
    c.deliver();
    assert_eq!(c.completion(0, w), BlockResult::Done);
    c.heal();
    c.attach(0);
    c.assert_heals();
}

// ----- replicas cut off from their Primary -----

/// Bits between two replicas only say what was not yet known to be everywhere when one of them was cut off. That one
/// made the other, which was up to date beside the Primary, a target (`spec/state-machine.md` §9.5).
#[test]
fn a_replica_cut_off_from_the_primary_does_not_resync_one_beside_it() {
    let mut c = quiet(3);
    // Everywhere and stable, but that is not told any more.
    c.lose(|_, _, p| matches!(p, Packet::PeerAck(_)));
    c.write(0, 64, 4096, 5);
    c.advance(SECOND);
    c.cut_links(&[(0, 1), (1, 2)]);
    c.lose_nothing();
    assert!(c.oos(1, 2) > 0);
    assert_eq!(c.disk(1), DiskState::Consistent);
    c.sent.clear();
    c.mend(1, 2);
    c.wait("back", |c| c.connected(1, 2));
    c.advance(SECOND);
    let target = sent_by(&c, 2, |p| matches!(p, Packet::RsDataRequest(_) | Packet::RsDagtagReq(_)));
    assert!(!target && c.disk(2) == DiskState::UpToDate);
    c.heal();
    c.assert_heals();
}

/// Both had bits, and the lower number decided: what only the other one had got of the lost Primary's last write was
/// undone (`spec/state-machine.md` §16.3).
#[test]
fn of_survivors_that_were_apart_the_one_that_got_further_is_the_source() {
    // They may meet before they dare to call themselves UpToDate.
    for pause in [SECOND, std::time::Duration::ZERO] {
        let mut c = quiet(3);
        c.write(0, 64, 4096, 5);
        c.lose(|from, to, _| from == 0 && to == 1);
        c.submit_write(0, 64, 9);
        c.cut_links(&[(0, 1), (0, 2), (1, 2)]);
        c.lose_nothing();
        assert_eq!((c.byte(1, 64), c.byte(2, 64)), (5, 9));
        c.advance(pause);
        assert!(c.oos(1, 2) > 0 && c.oos(2, 1) > 0);
        c.mend(1, 2);
        c.wait("survivors agree", |c| {
            c.repl(1, 2) == ReplState::Established && c.repl(2, 1) == ReplState::Established
        });
        c.advance(SECOND);
        assert_eq!((c.byte(1, 64), c.byte(2, 64)), (9, 9));
        assert_eq!((c.oos(1, 2), c.oos(2, 1)), (0, 0));
    }
}

/// An Outdated replica that was about to be resynced met one that was as far behind, but did not know it, and called
/// itself UpToDate for a moment (`spec/state-machine.md` §4.6).
#[test]
fn a_node_about_to_receive_data_stays_outdated_whatever_others_say() {
    let mut c = quiet(3);
    c.cut_links(&[(0, 1), (0, 2), (1, 2)]);
    c.ok(2, Command::Outdate(V));
    c.wait("alone", |c| c.disk(2) == DiskState::Outdated);
    c.write(0, 64, 4096, 5);
    demote(&mut c, 0);
    c.hold(|from, _, p| from == 0 && matches!(p, Packet::Bitmap | Packet::CompressedBitmap(_)));
    c.mend(0, 2);
    c.wait("target", |c| c.repl(2, 0) == ReplState::WFBitMapT);
    c.sent.clear();
    c.mend(1, 2);
    c.wait("back", |c| c.connected(1, 2));
    let current = sent_by(&c, 2, |p| matches!(p, Packet::State(s) if s.disk() == Some(DiskState::UpToDate)));
    assert!(!current && c.disk(2) == DiskState::Outdated);
    c.deliver();
    c.heal();
    c.assert_heals();
}

/// A write that was withheld when the Primary lost quorum came back with the Primary after its crash, over the heads of
/// those that had gone on (`spec/state-machine.md` §9.3).
#[test]
fn a_write_withheld_for_quorum_ends_with_the_crash_of_its_primary() {
    let mut c = Cluster::formed_with_quorum();
    c.cut_link(0, 1);
    c.write(0, 64, 4096, 5);
    c.advance(SECOND);
    c.lose(|from, _, p| from == 0 && matches!(p, Packet::Data(_)));
    let w = c.submit_write(0, 64, 9);
    c.cut_link(0, 2);
    c.lose_nothing();
    c.advance(SECOND);
    assert_eq!((c.result(0, w), c.byte(0, 64)), (None, 9));
    c.wait("survivors", |c| (1..3).all(|i| c.disk(i) == DiskState::UpToDate));
    c.crash(0);
    c.sent.clear();
    c.start(0);
    c.mend(0, 2);
    c.wait("back", |c| c.repl(0, 2) == ReplState::Established && c.disk(0) == DiskState::UpToDate);
    let target = sent_by(&c, 2, |p| matches!(p, Packet::RsDataRequest(_) | Packet::RsDagtagReq(_)));
    assert_eq!((c.byte(0, 64), c.byte(2, 64), target), (5, 5, false));
}

// ----- bits -----

/// A node that lacks a write told that the block was in sync before it: the bits for a third node went
/// (`spec/wire-protocol.md` §9.10).
#[test]
fn a_teller_that_is_behind_itself_declares_nothing_in_sync() {
    let mut c = quiet(3);
    c.cut_links(&[(0, 1), (0, 2), (1, 2)]);
    let sector = EXTENT + 64;
    c.write(0, sector, 4096, 2);
    c.advance(SECOND);
    c.hold(|from, to, p| (from, to) == (0, 1) && matches!(p, Packet::RsDataReply(_)));
    c.mend(0, 1);
    c.wait("resync", |c| c.repl(0, 1) == ReplState::SyncSource);
    let area = PeersInSync { sector, mask: 0b111, size: 4096 };
    c.inject(1, 0, Stream::Control, Packet::PeersInSync(area));
    assert_eq!(c.oos(0, 2), 4);
    c.deliver();
    c.heal();
    c.assert_heals();
    assert_eq!(c.byte(2, sector), 2);
}

/// An Outdated node made another one, Outdated like it, a target that then counted as current
/// (`spec/state-machine.md` §12.3).
#[test]
fn an_outdated_node_cannot_invalidate_another() {
    let mut c = quiet(2);
    demote(&mut c, 0);
    c.cut_link(0, 1);
    c.ok(0, Command::Outdate(V));
    c.ok(1, Command::Outdate(V));
    c.heal();
    for reset_bitmap in [false, true] {
        assert_eq!((c.disk(0), c.disk(1)), (DiskState::Outdated, DiskState::Outdated));
        let refused = c.admin(0, Command::InvalidateRemote { vnr: V, peer: id(1), reset_bitmap });
        assert!(refused.is_err());
        c.advance(SECOND);
    }
    assert_eq!(c.repl(0, 1), ReplState::Established);
}
