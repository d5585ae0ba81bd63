//! What once went wrong and must not come back. Each test is named after what must hold; its comment says what
//! happened instead.

mod apart;
mod resync;

use crate::harness::{Cluster, EXTENT, Slow, V, id, net};
use palisade_core::config::{DiskConfig, Fencing, NetConfig, OnIoError, QuorumOption, ReadBalancing};
use palisade_core::io::{BlockOp, BlockResult, Command, Stream};
use palisade_wire::enums::{DiskState, ReplState, Role, WireProtocol};
use palisade_wire::{BlockReq, Packet};
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);

/// Formed, one write done and peer-acked: extent 0 is hot everywhere, later extents are cold.
fn quiet(n: u8) -> Cluster {
    let mut c = Cluster::formed(n);
    c.write(0, 0, 4096, 1);
    c.advance(SECOND);
    c
}

fn demote(c: &mut Cluster, i: usize) {
    c.ok(i, Command::Demote { force: false });
}

fn promote(c: &mut Cluster, i: usize) {
    c.ok(i, Command::Promote { force: false });
}

fn detach(c: &mut Cluster, i: usize, force: bool) {
    c.ok(i, Command::Detach { vnr: V, force });
    c.wait("diskless", |c| c.disk(i) == DiskState::Diskless);
}

/// The sockets break, and the nodes connect again at once.
fn blink(c: &mut Cluster, a: u8, b: u8) {
    c.break_link(a, b);
    c.settle();
}

fn set_disk(c: &mut Cluster, i: usize, disk: DiskConfig) {
    c.ok(i, Command::SetDisk { vnr: V, disk });
}

/// Both nodes of two have these options for each other.
fn set_net(c: &mut Cluster, net: &NetConfig) {
    for i in 0..2 {
        c.ok(i, Command::SetNet { peer: id(1 - i as u8), net: Box::new(net.clone()) });
    }
}

/// Two nodes; node 1 missed the write of 4 to sector 64, and its link is cut.
fn behind() -> Cluster {
    let mut c = quiet(2);
    c.cut_link(0, 1);
    c.write(0, 64, 4096, 4);
    c
}

/// Two nodes; a write of node 0 waits for its own journal.
fn write_waits_at_the_primary() -> (Cluster, u64) {
    let mut c = quiet(2);
    c.slow(0, Slow::Meta);
    let w = c.submit_write(0, EXTENT, 7);
    (c, w)
}

/// Two nodes; node 1 has lost the Primary while a write of it (of 5) waited for the journal here.
fn write_of_the_lost_primary_waits() -> Cluster {
    let mut c = quiet(2);
    c.slow(1, Slow::Meta);
    c.submit_write(0, EXTENT, 5);
    c.cut_link(0, 1);
    c
}

/// Node 1 becomes UpToDate without the Primary, and is promoted and written to.
fn survivor_takes_over(c: &mut Cluster) {
    c.wait("survivor UpToDate", |c| c.disk(1) == DiskState::UpToDate);
    promote(c, 1);
    c.write(1, 0, 4096, 3);
}

/// The Primary (node 0) is lost in a write of 9 to sector 64 that only node 2 got; nodes 1 and 2 settle it.
fn lose_the_primary_in_a_write(c: &mut Cluster) {
    c.lose(|from, to, _| from == 0 && to == 1);
    c.submit_write(0, 64, 9);
    c.cut_links(&[(0, 1), (0, 2)]);
    c.lose_nothing();
    c.wait("survivors", |c| {
        (1..3).all(|i| c.disk(i) == DiskState::UpToDate && c.repl(i, 3 - i as u8) == ReplState::Established)
    });
}

/// A node has sent a packet of this kind since the test cleared what was sent.
fn sent_by(c: &Cluster, from: u8, kind: impl Fn(&Packet) -> bool) -> bool {
    c.sent.iter().any(|s| s.from == from && kind(&s.packet))
}

fn sent_to(c: &Cluster, to: u8, kind: impl Fn(&Packet) -> bool) -> bool {
    c.sent.iter().any(|s| s.to == to && kind(&s.packet))
}

// ----- generations -----

/// A write waited for its journal when the link broke. It was then submitted without a new generation; the
/// handshake found equal UUIDs and wiped its bit (`spec/state-machine.md` §8.4, §8.5).
#[test]
fn a_write_released_by_the_journal_after_a_link_loss_is_of_a_new_generation() {
    let (mut c, w) = write_waits_at_the_primary();
    assert_eq!(c.result(0, w), None);
    c.cut_link(0, 1);
    c.release();
    assert_eq!(c.completion(0, w), BlockResult::Done);
    c.heal();
    c.assert_heals();
    assert_eq!(c.byte(1, EXTENT), 7);
}

/// Between the comparison of generations and the commit of the connect, a write started a generation the peer never
/// heard of: both ended Established and UpToDate, different (`spec/state-machine.md` §7.3).
#[test]
fn a_write_during_a_connect_reaches_the_peer() {
    for primary in [0, 1] {
        let mut c = quiet(2);
        if primary == 1 {
            demote(&mut c, 0);
            promote(&mut c, 1);
        }
        c.write(primary, 0, 4096, 2);
        c.advance(SECOND);
        c.cut_link(0, 1);
        c.hold(|_, _, p| matches!(p, Packet::TwopcYes(_) | Packet::TwopcCommit(_)));
        c.mend(0, 1);
        assert!(c.held_packets() > 0, "the handshake is stopped before its commit");
        let w = c.submit_write(primary, 64, 9);
        c.deliver();
        assert_eq!(c.completion(primary, w), BlockResult::Done);
        c.advance(3 * SECOND);
        c.assert_heals();
        assert_eq!(c.byte(1 - primary, 64), 9);
    }
}

/// As above, with the write at many moments and the links blinking.
#[test]
fn writes_while_links_blink_reach_everybody() {
    for primary in 0..3usize {
        let mut c = Cluster::formed(3);
        if primary != 0 {
            demote(&mut c, 0);
            promote(&mut c, primary);
        }
        for k in 0..6u8 {
            let peer = (primary as u8 + 1 + k % 2) % 3;
            c.hold(|_, _, p| matches!(p, Packet::TwopcYes(_) | Packet::TwopcCommit(_)));
            blink(&mut c, primary as u8, peer);
            c.advance(Duration::from_millis(100));
            c.submit_write(primary, 64, k + 1);
            c.deliver();
            c.advance(3 * SECOND);
        }
        c.assert_heals();
        assert_eq!(c.byte(primary, 64), 6);
    }
}

/// A Primary that lost its disk made no generation, because the disk was still there when it tried. What it wrote to
/// its peer meanwhile was missing after the attach, in sync (`spec/state-machine.md` §8.5 "own disk failed").
#[test]
fn a_disk_the_primary_left_is_behind_when_it_comes_back() {
    for (nodes, force) in [(2, false), (2, true), (3, false), (3, true)] {
        let mut c = quiet(nodes);
        c.write(0, 8, 4096, 3);
        detach(&mut c, 0, force);
        c.write(0, 16, 4096, 4);
        assert_eq!(c.read(0, 16), 4);
        c.attach(0);
        c.assert_heals();
        assert_eq!(c.byte(0, 16), 4);
    }
}

/// The same with a write in progress on the disk.
#[test]
fn a_disk_that_is_detached_during_a_write_is_behind() {
    let mut c = quiet(2);
    c.slow(0, Slow::Write);
    let w = c.submit_write(0, 8, 3);
    c.begin(0, Command::Detach { vnr: V, force: true });
    c.release();
    c.wait("diskless", |c| c.disk(0) == DiskState::Diskless);
    assert_eq!(c.completion(0, w), BlockResult::Done);
    c.write(0, 16, 4096, 4);
    c.attach(0);
    c.assert_heals();
    assert_eq!((c.byte(0, 8), c.byte(0, 16)), (3, 4));
}

/// A diskless Primary whose disk failed before the superblock with its new generation was durable went on with an
/// exposed UUID that nobody had heard of (`spec/state-machine.md` §8.5, `spec/wire-protocol.md` §4.10).
#[test]
fn a_generation_that_died_with_the_disk_does_not_lock_its_primary_out() {
    let mut c = quiet(3);
    c.cut_links(&[(0, 2), (1, 2)]);
    c.slow(0, Slow::Meta);
    let w = c.submit_write(0, 8, 3);
    c.fail_held();
    c.wait("diskless", |c| c.disk(0) == DiskState::Diskless);
    assert_eq!(c.completion(0, w), BlockResult::Done);
    blink(&mut c, 0, 1);
    c.wait("back", |c| c.connected(0, 1));
    c.write(0, 16, 4096, 4);
    c.heal();
    c.attach(0);
    c.assert_heals();
    assert_eq!(c.byte(2, 16), 4);
}

/// A bitmap with bits was cleared because the current UUIDs were equal: a Primary died and at the same moment the
/// survivors lost each other; only one had the last write (`spec/state-machine.md` §9.5: bits stay).
#[test]
fn survivors_that_lost_each_other_too_end_equal() {
    let mut c = quiet(3);
    c.lose(|from, to, _| from.min(to) == 0 && from.max(to) == 2);
    let w = c.submit_write(0, 64, 9);
    assert_eq!(c.result(0, w), None);
    c.cut_links(&[(0, 1), (0, 2), (1, 2)]);
    c.advance(SECOND);
    c.lose_nothing();
    c.mend(1, 2);
    c.advance(5 * SECOND);
    c.wait("survivors agree", |c| {
        c.repl(1, 2) == ReplState::Established && c.repl(2, 1) == ReplState::Established
    });
    assert!(c.nodes[1].data == c.nodes[2].data, "survivors differ");
}

// ----- orphans: writes of a Primary whose link is gone -----

/// A received write that waited for its journal was carried out after this node had become Primary, on top of newer
/// data (`spec/state-machine.md` §7.1: what was received is written before the loss is over).
#[test]
fn a_promotion_waits_for_the_writes_of_the_lost_primary() {
    let mut c = write_of_the_lost_primary_waits();
    let promotion = c.begin(1, Command::Promote { force: false });
    c.advance(4 * SECOND);
    let early = c.submit_write(1, EXTENT, 6);
    c.release();
    c.advance(5 * SECOND);
    if c.result(1, early) != Some(&BlockResult::Done) {
        c.answer(1, promotion).expect("the promotion was answered").expect("the promotion succeeded");
        c.write(1, EXTENT, 4096, 6);
    }
    assert_eq!(c.byte(1, EXTENT), 6, "the new Primary's write was overwritten by an old one");
}

/// Such a write also landed on top of newer resync data, after its bit was cleared (`spec/state-machine.md` §11.5).
#[test]
fn a_resync_waits_for_the_writes_of_the_lost_primary() {
    let mut c = write_of_the_lost_primary_waits();
    c.advance(SECOND);
    c.write(0, EXTENT, 4096, 6);
    c.heal();
    c.advance(5 * SECOND);
    c.release();
    c.advance(5 * SECOND);
    c.assert_heals();
    assert_eq!(c.byte(1, EXTENT), 6);
}

/// A peer that never lost that Primary, has no disk, or is of another make never tells its position; the survivor
/// stayed Consistent for ever (`spec/state-machine.md` §16.3 "diskless nodes ignored").
#[test]
fn a_diskless_tiebreaker_does_not_hold_up_the_survivor() {
    for tells_its_position in [true, false] {
        let mut c = quiet(3);
        detach(&mut c, 2, false);
        c.write(0, 0, 4096, 2);
        if !tells_its_position {
            c.lose(|from, _, p| from == 2 && matches!(p, Packet::PeerDagtag(_)));
        }
        c.cut_links(&[(0, 1), (0, 2)]);
        survivor_takes_over(&mut c);
    }
}

/// In a partial mesh the third node had not lost the Primary: it was never connected to it (§16.3).
#[test]
fn survivors_of_a_partial_mesh_go_on() {
    let mut c = quiet(3);
    demote(&mut c, 0);
    c.cut_link(0, 2);
    c.advance(2 * SECOND);
    promote(&mut c, 0);
    c.write(0, 0, 4096, 2);
    c.advance(2 * SECOND);
    c.cut_link(0, 1);
    survivor_takes_over(&mut c);
}

/// The third node lost the Primary earlier, while this one was still connected to it (§16.3).
#[test]
fn survivors_that_lost_the_primary_one_after_the_other_go_on() {
    let mut c = quiet(3);
    c.cut_link(0, 2);
    c.advance(2 * SECOND);
    c.write(0, 0, 4096, 2);
    c.advance(2 * SECOND);
    c.cut_link(0, 1);
    survivor_takes_over(&mut c);
}

/// A position told during an earlier, short loss of the Primary was compared with one of the final loss: a resync that
/// only one side started, or cleared bits (§16.3).
#[test]
fn positions_of_an_earlier_loss_do_not_count() {
    let mut c = quiet(3);
    blink(&mut c, 0, 2);
    c.advance(3 * SECOND);
    c.wait("back", Cluster::all_up_to_date);
    c.write(0, 0, 4096, 2);
    lose_the_primary_in_a_write(&mut c);
    c.advance(2 * SECOND);
    assert!(c.nodes[1].data == c.nodes[2].data, "survivors differ");
    assert_eq!((c.byte(1, 64), c.oos(1, 2), c.oos(2, 1)), (9, 0, 0));
}

/// A restarted Primary counts from zero; survivors compared positions of different lives
/// (`spec/wire-protocol.md` §4.4 step 8: P_DAGTAG at connect).
#[test]
fn positions_start_anew_with_the_primary() {
    let mut c = quiet(3);
    for k in 0..20 {
        c.write(0, 8 * k, 4096, 2);
    }
    c.crash(0);
    c.advance(SECOND);
    c.start(0);
    c.advance(3 * SECOND);
    c.wait("back", Cluster::all_up_to_date);
    promote(&mut c, 0);
    c.write(0, 0, 4096, 3);
    lose_the_primary_in_a_write(&mut c);
    assert_eq!((c.byte(1, 64), c.byte(2, 64)), (9, 9));
}

// ----- locks and links -----

/// The locks of ranges asked for when the link broke stayed for ever: writes to them hung
/// (`spec/state-machine.md` §11.5 "a lost connection aborts its resync requests").
#[test]
fn a_link_loss_during_a_resync_gives_its_ranges_back() {
    let mut c = behind();
    c.slow(1, Slow::Write);
    c.mend(0, 1);
    c.advance(SECOND);
    assert!(c.held() > 0, "the resync data is on its way to the disk");
    c.cut_link(0, 1);
    c.release();
    c.write(0, 64, 4096, 5);
    c.heal();
    c.assert_heals();
}

/// The other way round: resync data still on its way to the disk did not hold its range any more, and a newer write
/// was in flight beside it (§11.5 "released when the data is on disk").
#[test]
fn resync_data_holds_its_range_until_it_is_on_disk() {
    let mut c = quiet(3);
    demote(&mut c, 0);
    c.cut_links(&[(0, 2), (1, 2)]);
    promote(&mut c, 0);
    c.write(0, 64, 4096, 5);
    c.advance(SECOND);
    c.slow(2, Slow::Write);
    c.mend(1, 2);
    c.advance(SECOND);
    c.mend(0, 2);
    c.advance(SECOND);
    assert!(c.writes_in_flight(2, 64) > 0, "the resync data is on its way to the disk");
    c.cut_link(1, 2);
    c.submit_write(0, 64, 6);
    c.advance(SECOND / 5);
    assert_eq!(c.writes_in_flight(2, 64), 1);
    c.release();
    c.heal();
    c.assert_heals();
    assert_eq!(c.byte(2, 64), 6);
}

/// A forced demotion answered its writes and freed their ranges while the disk was still busy with them
/// (`spec/state-machine.md` §7.2).
#[test]
fn a_failed_write_holds_its_range_until_the_disk_is_done() {
    let mut c = quiet(2);
    c.slow(0, Slow::Write);
    let w = c.submit_write(0, 64, 5);
    c.begin(0, Command::Demote { force: true });
    c.advance(SECOND);
    assert_eq!(c.nodes[0].core.state().role, Role::Secondary);
    assert!(c.result(0, w).is_some());
    promote(&mut c, 1);
    c.submit_write(1, 64, 6);
    assert_eq!(c.writes_in_flight(0, 64), 1);
    c.release();
    c.advance(SECOND);
    c.assert_heals();
    assert_eq!(c.byte(0, 64), 6);
}

/// A write that had failed with a forced demotion, still waiting for its journal, was carried out after the next
/// promotion (§7.2).
#[test]
fn a_write_that_failed_is_not_carried_out_later() {
    let (mut c, w) = write_waits_at_the_primary();
    let demotion = c.begin(0, Command::Demote { force: true });
    c.release();
    c.advance(SECOND);
    assert_eq!(c.result(0, w), Some(&BlockResult::IoError));
    c.answer(0, demotion).expect("answered").expect("demoted");
    promote(&mut c, 0);
    c.advance(SECOND);
    assert_eq!((c.byte(0, EXTENT), c.byte(1, EXTENT)), (0, 0));
    // The epoch it was counted in is closed all the same.
    c.write(0, EXTENT, 4096, 8);
    c.advance(60 * SECOND);
    c.assert_heals();
}

/// Slow source reads were found by the peer's name for the request; after a reconnect the peer may use the name again,
/// and got the data of another block (`spec/wire-protocol.md` §6.2: opaque).
#[test]
fn a_slow_resync_read_answers_only_its_own_request() {
    let mut c = quiet(2);
    c.write(0, 64, 4096, 0xaa);
    c.write(0, 128, 4096, 0xbb);
    c.cut_link(0, 1);
    for sector in [64, 128, 192] {
        let byte = c.byte(0, sector);
        c.write(0, sector, 4096, byte);
    }
    // The real resync goes on beside; its requests and what is injected here never meet.
    let request = |sector| Packet::RsDataRequest(BlockReq { sector, block_id: 0x7777, blksize: 4096 });
    let mine = |p: &Packet| matches!(p, Packet::RsDataReply(d) if d.block_id == 0x7777);
    c.lose(move |from, to, p| {
        mine(p) || from == 1 && to == 0 && matches!(p, Packet::RsDataRequest(_) | Packet::RsDagtagReq(_))
    });
    c.slow(0, Slow::Read);
    c.mend(0, 1);
    c.wait("resync", |c| c.repl(0, 1) == ReplState::SyncSource);
    c.inject(1, 0, Stream::Data, request(64));
    assert_eq!(c.held(), 1);
    blink(&mut c, 0, 1);
    c.wait("resync", |c| c.repl(0, 1) == ReplState::SyncSource && c.connected(0, 1));
    c.sent.clear();
    c.inject(1, 0, Stream::Data, request(128));
    assert_eq!(c.held(), 2);
    c.release_one();
    assert!(!c.sent.iter().any(|s| mine(&s.packet)), "answered with another request's data");
    c.release();
    let reply = c.sent.iter().find(|s| mine(&s.packet)).expect("the request is answered");
    assert_eq!(reply.data[0], 0xbb);
    // A new link lets the real resync go on.
    c.lose_nothing();
    blink(&mut c, 0, 1);
    c.assert_heals();
}

// ----- flushes, epochs, acknowledgements -----

/// A flush issued for an epoch of the previous link acknowledged a barrier of the new one
/// (`spec/wire-protocol.md` §9.4).
#[test]
fn a_barrier_is_acknowledged_by_its_own_flush() {
    let mut c = quiet(2);
    c.slow(1, Slow::Flush);
    c.submit_write(0, 0, 2);
    c.advance(SECOND);
    let earlier = c.held();
    assert!(earlier > 0, "the flush of the first epoch is out");
    blink(&mut c, 0, 1);
    c.advance(3 * SECOND);
    // The end of the resync waits for a flush too.
    c.wait("back", |c| c.repl(0, 1) == ReplState::SyncSource);
    let before = c.held();
    let w = c.submit_write(0, 64, 3);
    c.advance(SECOND);
    assert_eq!(c.result(0, w), Some(&BlockResult::Done));
    assert!(c.held() > before, "the flush of the second epoch is out");
    c.sent.clear();
    for _ in 0..before {
        c.release_one();
    }
    let acked = |c: &Cluster| sent_by(c, 1, |p| matches!(p, Packet::BarrierAck(_)));
    assert!(!acked(&c), "acknowledged before its writes are stable");
    c.release();
    assert!(acked(&c));
    c.assert_heals();
}

/// A write finished, the next one failed the disk: the barrier was acknowledged without a flush, and the writer forgot
/// a write that was only in a cache (§9.4).
#[test]
fn no_barrier_is_acknowledged_for_a_disk_that_failed() {
    let mut c = quiet(2);
    c.hold(|from, _, p| from == 0 && matches!(p, Packet::Barrier(_)));
    c.write(0, 0, 4096, 2);
    c.slow(1, Slow::Write);
    c.submit_write(0, 8, 3);
    c.sent.clear();
    c.fail_held();
    c.wait("failed", |c| c.disk(1) <= DiskState::Failed);
    c.deliver();
    c.advance(2 * SECOND);
    assert!(!sent_by(&c, 1, |p| matches!(p, Packet::BarrierAck(_))));
    c.wait("diskless", |c| c.disk(1) == DiskState::Diskless);
    assert!(c.oos(0, 1) >= 8, "both writes count as missing");
    c.attach(1);
    c.assert_heals();
}

/// A full journal made the replica report what is stable: it counted finished writes, not the finished prefix, and
/// named one that still waited (`spec/wire-protocol.md` §9.5).
#[test]
fn only_a_finished_prefix_is_confirmed_as_stable() {
    let mut c = Cluster::formed(2);
    let disk = DiskConfig { al_extents: 2, ..DiskConfig::default() };
    detach(&mut c, 1, false);
    c.attach_with(1, disk);
    c.assert_heals();
    c.write(0, 0, 4096, 1);
    c.advance(SECOND);
    // One epoch: no barrier may end it.
    c.hold(|_, _, p| matches!(p, Packet::Barrier(_) | Packet::PeerAck(_)));
    c.sent.clear();
    c.slow(1, Slow::Meta);
    let waits = c.submit_write(0, EXTENT, 2);
    let hot = c.submit_write(0, 0, 3);
    c.submit_write(0, 2 * EXTENT, 4);
    c.advance(SECOND / 5);
    assert_eq!(c.result(0, hot), Some(&BlockResult::Done));
    assert_eq!(c.result(0, waits), None, "reported as written, but it waits for the journal");
    assert!(!c.sent.iter().any(|s| matches!(s.packet, Packet::ConfirmStable(_))));
    c.deliver();
    c.release();
    c.advance(5 * SECOND);
    assert!(c.connected(0, 1));
    c.assert_heals();
}

/// A journal without room for an open epoch stalls nobody (§9.5).
#[test]
fn a_full_journal_at_the_replica_goes_on() {
    let mut c = Cluster::formed(2);
    detach(&mut c, 1, false);
    c.attach_with(1, DiskConfig { al_extents: 1, ..DiskConfig::default() });
    c.assert_heals();
    let writes: Vec<u64> = (0..9u8).map(|k| c.submit_write(0, EXTENT * u64::from(k % 3), k)).collect();
    for w in writes {
        assert_eq!(c.completion(0, w), BlockResult::Done);
    }
    assert!(c.connected(0, 1));
    c.assert_heals();
}

/// A flush that waited for its only replica was answered Done when that one was lost, though nobody had flushed
/// (`spec/wire-protocol.md` §9.12).
#[test]
fn a_flush_nobody_did_is_not_done() {
    let mut c = quiet(2);
    detach(&mut c, 0, false);
    c.slow(1, Slow::Flush);
    c.submit_write(0, 0, 3);
    let f = c.submit(0, BlockOp::Flush);
    assert_eq!(c.result(0, f), None);
    c.cut_link(0, 1);
    c.advance(SECOND);
    assert_ne!(c.result(0, f), Some(&BlockResult::Done));
}

/// A replica that refused a write with its disk got a peer-ack for it and dropped the link
/// (`spec/wire-protocol.md` §9.9).
#[test]
fn a_replica_that_refused_a_write_gets_no_peer_ack_for_it() {
    let mut c = quiet(2);
    c.hold(|from, to, _| (from, to) == (1, 0));
    c.begin(1, Command::Detach { vnr: V, force: true });
    c.sent.clear();
    c.submit_write(0, 0, 3);
    c.deliver();
    c.advance(SECOND);
    assert!(sent_by(&c, 1, |p| matches!(p, Packet::NegAck(_))));
    assert!(!sent_to(&c, 1, |p| matches!(p, Packet::PeerAck(_))));
    assert!(c.connected(0, 1) && c.connected(1, 0));
    c.attach(1);
    c.assert_heals();
}

/// A peer-ack for writes of an earlier link was sent on the next one and dropped it (§9.9).
#[test]
fn writes_of_an_earlier_link_get_no_peer_ack() {
    let mut c = quiet(3);
    c.slow(2, Slow::Flush);
    c.submit_write(0, 0, 3);
    c.advance(SECOND / 3);
    blink(&mut c, 0, 1);
    c.advance(3 * SECOND);
    c.wait("back", |c| c.connected(0, 1) && c.repl(0, 1) == ReplState::Established);
    c.sent.clear();
    c.release();
    c.advance(SECOND / 3);
    let stale = sent_to(&c, 1, |p| matches!(p, Packet::PeerAck(_)));
    assert!(!stale && c.connected(0, 1));
    c.assert_heals();
}

/// References on journal extents outlived the journal; the next one got back what it never gave
/// (`spec/metadata.md` §7.3).
#[test]
fn references_on_the_journal_end_with_it() {
    let mut c = quiet(2);
    c.slow(1, Slow::Flush);
    let w = c.submit_write(0, 0, 3);
    assert_eq!(c.result(0, w), Some(&BlockResult::Done));
    detach(&mut c, 0, true);
    c.attach(0);
    c.advance(SECOND);
    c.slow(0, Slow::Write);
    c.submit_write(0, 8, 4);
    c.release();
    c.advance(SECOND);
    c.assert_heals();
}

// ----- attach, disks -----

/// The peer answered the attach with its UUIDs but not its state; the disk stayed Negotiating
/// (`spec/wire-protocol.md` §4.12).
#[test]
fn an_attach_that_missed_nothing_ends() {
    for primary in [true, false] {
        let mut c = quiet(2);
        if !primary {
            demote(&mut c, 0);
        }
        detach(&mut c, 1, false);
        c.attach(1);
        c.assert_heals();
    }
}

/// With `on-io-error pass_on` a failed flush left the disk in use with no bits set, though what was lost is unknown
/// (`spec/state-machine.md` §13.1).
#[test]
fn a_disk_that_cannot_flush_is_detached() {
    let mut c = quiet(2);
    set_disk(&mut c, 0, DiskConfig { on_io_error: OnIoError::PassOn, ..DiskConfig::default() });
    c.write(0, 8, 4096, 2);
    c.slow(0, Slow::Flush);
    let f = c.submit(0, BlockOp::Flush);
    c.advance(SECOND);
    c.fail_held();
    c.wait("diskless", |c| c.disk(0) == DiskState::Diskless);
    // The peer's is good.
    assert_eq!(c.completion(0, f), BlockResult::Done);
    assert_eq!(c.read(0, 8), 2);
}

/// With `on-io-error pass_on` the peer's acknowledgement cleared the bit of a block whose local write had failed: the
/// old data was read again (§13.1).
#[test]
fn a_block_whose_local_write_failed_is_not_read_locally() {
    let mut c = quiet(2);
    set_disk(&mut c, 0, DiskConfig { on_io_error: OnIoError::PassOn, ..DiskConfig::default() });
    c.hold(|from, _, _| from == 1);
    c.slow(0, Slow::Write);
    let w = c.submit_write(0, 0, 7);
    c.fail_held();
    c.deliver();
    assert_eq!(c.completion(0, w), BlockResult::Done);
    c.advance(SECOND);
    assert_eq!(c.read(0, 0), 7);
    c.assert_heals();
}

/// A write whose only good replica was lost was Done because the own, Inconsistent disk had it; the resync then
/// overwrote it (§13.1: only UpToDate counts).
#[test]
fn a_write_on_an_inconsistent_disk_alone_is_not_done() {
    let mut c = quiet(2);
    detach(&mut c, 0, false);
    c.write(0, 0, 4096, 2);
    c.hold(|from, _, p| {
        from == 1 && matches!(p, Packet::RsDataReply(_) | Packet::WriteAck(_) | Packet::WriteAckInSync(_))
    });
    c.attach(0);
    c.wait("resync", |c| c.repl(0, 1) == ReplState::SyncTarget);
    let w = c.submit_write(0, 2 * EXTENT, 9);
    c.cut_link(0, 1);
    c.advance(SECOND);
    assert_ne!(c.result(0, w), Some(&BlockResult::Done));
}

// ----- reads -----

/// A replica read its disk although an overlapping write had been received before: under protocol A the application
/// got data older than what it had written (`spec/wire-protocol.md` §9.11).
#[test]
fn a_remote_read_sees_the_writes_before_it() {
    let mut c = quiet(2);
    set_net(&mut c, &NetConfig { protocol: WireProtocol::A, ..net() });
    blink(&mut c, 0, 1);
    c.wait("back", Cluster::all_up_to_date);
    set_disk(&mut c, 0, DiskConfig { read_balancing: ReadBalancing::PreferRemote, ..DiskConfig::default() });
    c.slow(1, Slow::Write);
    let w = c.submit_write(0, 0, 7);
    assert_eq!(c.result(0, w), Some(&BlockResult::Done), "protocol A");
    let r = c.submit(0, BlockOp::Read { sector: 0, len: 4096 });
    c.advance(SECOND / 5);
    c.release();
    match c.completion(0, r) {
        BlockResult::Data(d) => assert_eq!(d[0], 7),
        other => panic!("{other:?}"),
    }
}

/// The link was dropped for a reply of the wrong size, but the read was no longer known to wait for that peer: it never
/// completed (§9.11).
#[test]
fn a_read_answered_wrongly_goes_to_another_replica() {
    let mut c = quiet(3);
    detach(&mut c, 0, false);
    c.hold(|_, to, p| to == 0 && matches!(p, Packet::DataReply(_)));
    let r = c.submit(0, BlockOp::Read { sector: 0, len: 4096 });
    c.tamper(|data| *data = data.slice(..512));
    c.deliver();
    assert!(matches!(c.completion(0, r), BlockResult::Data(_)));
}

// ----- fencing, quorum, administration -----

/// Fencing froze I/O and nothing ever thawed it, also when the peer was back (`spec/state-machine.md` §14.5).
#[test]
fn fencing_thaws_when_the_peer_is_back() {
    let mut c = quiet(2);
    set_net(&mut c, &NetConfig { fencing: Fencing::ResourceAndStonith, ..net() });
    c.cut_link(0, 1);
    let w = c.submit_write(0, 8, 3);
    c.advance(SECOND);
    c.heal();
    assert_eq!(c.completion(0, w), BlockResult::Done);
    c.assert_heals();
}

/// A Primary frozen for want of quorum does not demote, until it is forced to (`spec/state-machine.md` §7.2 "suspended
/// I/O makes it block until resumed or forced").
#[test]
fn a_frozen_primary_can_be_forced_down() {
    let mut c = Cluster::formed_with_quorum();
    c.write(0, 0, 4096, 1);
    c.cut_links(&[(0, 1), (0, 2)]);
    let w = c.submit_write(0, 8, 3);
    c.advance(SECOND);
    assert_eq!(c.result(0, w), None);
    let polite = c.begin(0, Command::Demote { force: false });
    c.advance(5 * SECOND);
    assert!(c.answer(0, polite).is_none());
    c.ok(0, Command::Demote { force: true });
    assert!(c.result(0, w).is_some());
    c.advance(SECOND);
    assert!(c.answer(0, polite).is_some());
    c.ok(0, Command::Down);
}

/// More requests than a sane peer ever has wait in the socket, not in memory (`spec/wire-protocol.md` §9.11).
#[test]
fn a_flood_of_reads_is_left_in_the_socket() {
    let mut c = Cluster::new(2, QuorumOption::Off);
    c.wait_connected();
    c.ok(0, Command::NewCurrentUuid { vnr: V, clear_bitmap: true, force_resync: false });
    c.wait("uptodate", Cluster::all_up_to_date);
    c.slow(1, Slow::Read);
    for block_id in 0..5000 {
        if !c.nodes[1].core.may_receive(id(0)) {
            return;
        }
        c.inject(0, 1, Stream::Data, Packet::DataRequest(BlockReq { sector: 0, block_id, blksize: 512 }));
    }
    panic!("the core takes any number of reads");
}
