//! What a cluster does when nothing goes wrong but the things a test asks for.

use crate::harness::{Cluster, V, id};
use palisade_core::config::QuorumOption;
use palisade_core::io::{BlockOp, BlockResult, Command};
use palisade_wire::enums::{ConnState, DiskState, Role};
use std::time::Duration;

#[test]
fn two_nodes_form_and_replicate() {
    let mut c = Cluster::formed(2);
    c.write(0, 0, 4096, 0xaa);
    c.write(0, 8192, 65536, 0xbb);
    assert_eq!(c.io(0, BlockOp::Flush), BlockResult::Done);
    c.assert_equal();
    assert_eq!(c.oos(0, 1), 0);
    c.ok(0, Command::Demote { force: false });
    c.ok(1, Command::Promote { force: false });
    c.write(1, 16, 512, 0xcc);
    c.assert_equal();
    assert_eq!(c.nodes[0].core.state().peer_role(id(1)), Role::Primary);
}

#[test]
fn skip_initial_sync() {
    let mut c = Cluster::new(2, QuorumOption::Off);
    c.ok(0, Command::NewCurrentUuid { vnr: V, clear_bitmap: true, force_resync: false });
    c.wait("uptodate", Cluster::all_up_to_date);
    assert_eq!(c.oos(0, 1) + c.oos(1, 0), 0);
}

#[test]
fn a_node_that_was_away_gets_exactly_what_it_missed() {
    let mut c = Cluster::formed(3);
    c.write(0, 0, 4096, 1);
    // Its epoch ends: node 2 is known to have it for good.
    c.advance(Duration::from_millis(100));
    c.cut_link(0, 2);
    c.cut_link(1, 2);
    c.advance(Duration::from_secs(2));
    c.write(0, 80, 4096, 2);
    c.write(0, 8000, 8192, 3);
    assert_eq!(c.oos(0, 2), 12);
    c.advance(Duration::from_secs(1));
    assert_eq!(c.oos(1, 2), 12);
    c.heal();
    c.wait("resync", Cluster::all_up_to_date);
    c.assert_equal();
    c.advance(Duration::from_secs(2));
    for (i, p) in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)] {
        assert_eq!(c.oos(i, p), 0, "{i} towards {p}");
    }
}

#[test]
fn the_survivors_of_a_lost_primary_go_on() {
    let mut c = Cluster::formed(3);
    c.write(0, 0, 4096, 1);
    c.cut_link(0, 1);
    c.cut_link(0, 2);
    c.wait("survivors", |c| c.disk(1) == DiskState::UpToDate && c.disk(2) == DiskState::UpToDate);
    c.ok(1, Command::Promote { force: false });
    c.write(1, 800, 4096, 7);
    assert_eq!(c.nodes[1].core.state().cstate(id(2)), ConnState::Connected);
    // The old Primary gives up and comes back as target.
    c.ok(0, Command::Demote { force: false });
    c.heal();
    c.wait("back", Cluster::all_up_to_date);
    c.assert_equal();
}

#[test]
fn quorum_majority_stops_the_minority() {
    let mut c = Cluster::formed_with_quorum();
    c.write(0, 0, 4096, 1);
    c.cut_link(0, 1);
    c.write(0, 0, 4096, 2);
    c.cut_link(0, 2);
    c.advance(Duration::from_secs(1));
    assert!(c.nodes[0].core.state().susp_quorum);
    c.ok(1, Command::Promote { force: false });
    c.write(1, 8, 4096, 3);
}

#[test]
fn detach_and_attach_resync_what_was_missed() {
    let mut c = Cluster::formed(2);
    c.ok(1, Command::Detach { vnr: V, force: false });
    c.wait("diskless", |c| c.disk(1) == DiskState::Diskless);
    c.write(0, 160, 4096, 9);
    c.attach(1);
    c.wait("attached", Cluster::all_up_to_date);
    c.assert_equal();
}

#[test]
fn invalidate_resyncs_everything() {
    let mut c = Cluster::formed(2);
    c.write(0, 160, 4096, 9);
    c.ok(1, Command::Invalidate { vnr: V, from: None, reset_bitmap: true });
    c.wait("resync", Cluster::all_up_to_date);
    c.assert_equal();
}

#[test]
fn split_brain_is_refused_and_resolved_by_discarding() {
    let mut c = Cluster::formed(2);
    c.ok(0, Command::Demote { force: false });
    c.cut_link(0, 1);
    for i in 0..2 {
        c.ok(i, Command::Promote { force: false });
        c.write(i, 8 * i as u64, 4096, 1 + i as u8);
        c.ok(i, Command::Demote { force: false });
    }
    c.heal();
    c.wait("standalone", |c| {
        (0..2).all(|i| c.nodes[i].core.state().cstate(id(1 - i as u8)) == ConnState::StandAlone)
    });
    c.ok(1, Command::Connect { peer: id(0), discard_my_data: true, tentative: false });
    c.ok(0, Command::Connect { peer: id(1), discard_my_data: false, tentative: false });
    c.wait("resolved", Cluster::all_up_to_date);
    c.assert_equal();
}

#[test]
fn down_takes_everything_apart() {
    let mut c = Cluster::formed(3);
    c.ok(0, Command::Demote { force: false });
    for i in 0..3 {
        c.ok(i, Command::Down);
        assert_eq!(c.disk(i), DiskState::Diskless);
    }
}

#[test]
fn a_refused_down_is_answered() {
    let mut c = Cluster::formed(2);
    c.write(0, 160, 4096, 9);
    c.ok(0, Command::Detach { vnr: V, force: false });
    c.wait("diskless", |c| c.disk(0) == DiskState::Diskless);
    // The last data of a diskless Primary.
    let refused = c.admin(1, Command::Down).unwrap_err();
    assert_eq!(refused.code, -10, "{refused}");
    assert!(refused.info.contains(&"failed to disconnect".to_owned()), "{refused:?}");
    assert!(c.connected(1, 0) && c.disk(1) == DiskState::UpToDate);
    assert_eq!(c.read(0, 160), 9);
    c.ok(0, Command::Demote { force: false });
    c.ok(1, Command::Down);
    assert_eq!(c.disk(1), DiskState::Diskless);
}

#[test]
fn what_peers_lack_is_told_in_runs() {
    let mut c = Cluster::formed(2);
    c.cut_link(0, 1);
    c.advance(Duration::from_secs(2));
    c.write(0, 1600, 8192, 1);
    let core = &c.nodes[0].core;
    assert_eq!(core.out_of_sync(V, 0..4096, 9), [(1600, false), (16, true), (2480, false)]);
    assert_eq!(core.out_of_sync(V, 0..4096, 2), [(1600, false), (16, true)]);
    assert_eq!(core.out_of_sync(V, 1604..1700, 9), [(12, true), (84, false)]);
}

#[test]
fn writes_lost_with_the_quorum_are_issued_again() {
    let mut c = Cluster::formed_with_quorum();
    c.write(0, 0, 4096, 1);
    // Sent into a dead cable on both links: nobody else gets it.
    c.lose(|from, to, _| from == 0 || to == 0);
    let lost = c.submit_write(0, 64, 5);
    c.cut_link(0, 1);
    c.cut_link(0, 2);
    c.lose_nothing();
    c.advance(Duration::from_secs(2));
    assert_eq!(c.result(0, lost), None, "completed without quorum");
    c.heal();
    c.wait("uptodate", Cluster::all_up_to_date);
    assert_eq!(c.result(0, lost), Some(&BlockResult::Done));
    c.assert_equal();
    assert_eq!(c.byte(1, 64), 5);
}
