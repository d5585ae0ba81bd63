//! When a barrier ends an epoch of the writer (`spec/wire-protocol.md` §9.3).

use crate::harness::{Cluster, Slow, V, id, net};
use palisade_core::config::NetConfig;
use palisade_core::io::{BlockOp, BlockResult, Command};
use palisade_wire::Packet;
use palisade_wire::enums::{DiskState, WireProtocol};
use std::time::Duration;

fn barriers(c: &Cluster) -> usize {
    c.sent.iter().filter(|s| s.from == 0 && matches!(s.packet, Packet::Barrier(_))).count()
}

/// A pair without open epoch, and nothing noted of what was sent.
fn pair() -> Cluster {
    let mut c = Cluster::formed(2);
    c.advance(Duration::from_secs(2));
    c.sent.clear();
    c
}

#[test]
fn writes_on_every_disk_at_completion_share_an_epoch() {
    let mut c = pair();
    for n in 0..50 {
        c.write(0, n * 8, 4096, 1);
    }
    assert_eq!(barriers(&c), 0);
    c.advance(Duration::from_millis(50));
    assert_eq!(barriers(&c), 1, "an idle writer ends it");
    c.advance(Duration::from_secs(5));
    assert_eq!(barriers(&c), 1);
    c.assert_equal();
}

#[test]
fn a_flush_ends_the_epoch_and_waits_for_the_barrier() {
    let mut c = pair();
    c.write(0, 0, 4096, 1);
    c.hold(|from, _, p| from == 0 && matches!(p, Packet::Barrier(_)));
    let flush = c.submit(0, BlockOp::Flush);
    assert_eq!(c.result(0, flush), None);
    c.deliver();
    assert_eq!(c.result(0, flush), Some(&BlockResult::Done));
    assert_eq!(barriers(&c), 1);
}

#[test]
fn no_epoch_of_a_busy_writer_gets_old() {
    let mut c = pair();
    for n in 0..300 {
        c.write(0, n * 8, 4096, 1);
        c.advance(Duration::from_millis(10));
    }
    assert!((2..=4).contains(&barriers(&c)), "{} in three seconds", barriers(&c));
}

/// A pair under this protocol.
fn pair_under(protocol: WireProtocol) -> Cluster {
    let mut c = pair();
    for i in 0..2 {
        let net = Box::new(NetConfig { protocol, ..net() });
        c.ok(i, Command::SetNet { peer: id(1 - i as u8), net });
    }
    c.break_link(0, 1);
    c.settle();
    c.wait("back", Cluster::all_up_to_date);
    c.advance(Duration::from_secs(2));
    c.sent.clear();
    c
}

/// A replica with a slow disk held up applications that were promised their own disk only
/// (`spec/wire-protocol.md` §9.12).
#[test]
fn a_flush_waits_for_the_replica_under_protocol_c_only() {
    for protocol in [WireProtocol::A, WireProtocol::B, WireProtocol::C] {
        let mut c = pair_under(protocol);
        c.slow(1, Slow::Flush);
        c.write(0, 0, 4096, 1);
        let flush = c.submit(0, BlockOp::Flush);
        assert_eq!(c.result(0, flush).is_none(), protocol == WireProtocol::C, "{protocol:?}");
        c.release();
        assert_eq!(c.result(0, flush), Some(&BlockResult::Done));
        c.assert_heals();
    }
}

/// Under protocols A and B no replica tells what it has written: without a disk here a write was done only with the next
/// barrier (§9.2).
#[test]
fn without_an_own_copy_every_protocol_waits_for_the_write_at_the_replica() {
    for protocol in [WireProtocol::A, WireProtocol::B, WireProtocol::C] {
        let mut c = pair_under(protocol);
        c.ok(0, Command::Detach { vnr: V, force: false });
        c.wait("diskless", |c| c.disk(0) == DiskState::Diskless);
        c.slow(1, Slow::Write);
        c.hold(|from, _, p| from == 0 && matches!(p, Packet::Barrier(_)));
        let w = c.submit_write(0, 64, 3);
        assert_eq!(c.result(0, w), None, "{protocol:?}");
        c.release();
        assert_eq!(c.result(0, w), Some(&BlockResult::Done), "{protocol:?}");
        assert_eq!(c.byte(1, 64), 3);
    }
}

/// The replica may not have the first write yet: only a barrier keeps the second behind it.
#[test]
fn under_protocol_a_a_completed_write_ends_its_epoch() {
    let mut c = pair_under(WireProtocol::A);
    c.slow(1, Slow::Write);
    for n in 1..4 {
        let w = c.submit_write(0, n * 8, 1);
        assert_eq!(c.result(0, w), Some(&BlockResult::Done));
        assert_eq!(barriers(&c), n as usize);
    }
    c.release();
    c.assert_heals();
}
