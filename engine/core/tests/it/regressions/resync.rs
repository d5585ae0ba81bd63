//! Resyncs that stalled, starved, were disturbed or left bits behind.

use super::{SECOND, behind, blink, detach, quiet, set_disk};
use crate::harness::{EXTENT, Slow, V, id};
use palisade_core::config::DiskConfig;
use palisade_core::io::{Command, Stream};
use palisade_wire::enums::{DiskState, ReplState};
use palisade_wire::{DagtagReq, Packet, PeersInSync};
use std::time::Duration;

/// When the requests of a resync that was paused were all answered, nobody looked whether the other source may go on
/// (`spec/state-machine.md` §4.5).
#[test]
fn the_next_source_takes_over_from_a_paused_one() {
    let mut c = quiet(3);
    c.cut_links(&[(0, 2), (1, 2)]);
    c.write(0, 64, 65536, 5);
    c.write(0, EXTENT, 65536, 5);
    c.slow(2, Slow::Write);
    c.mend(0, 2);
    c.mend(1, 2);
    c.advance(SECOND);
    let active = (0..2).find(|p| c.repl(2, *p) == ReplState::SyncTarget).expect("a resync runs");
    assert!(c.held() > 0);
    c.ok(2, Command::PauseSync { vnr: V, peer: id(active) });
    c.advance(SECOND);
    c.release();
    c.wait("UpToDate from the other source", |c| c.disk(2) == DiskState::UpToDate);
    c.ok(2, Command::ResumeSync { vnr: V, peer: id(active) });
    c.assert_heals();
}

/// Two writes at a time to one block kept the range busy for ever; the resync never got it
/// (`spec/state-machine.md` §11.5: new application I/O waits for the resync request).
#[test]
fn a_busy_block_does_not_starve_the_resync() {
    let mut c = behind();
    c.slow(0, Slow::Write);
    for k in 0..3 {
        c.submit_write(0, 64, k);
    }
    c.mend(0, 1);
    for k in 0..200u8 {
        c.advance(Duration::from_millis(25));
        if c.held() > 0 {
            c.release_one();
        }
        c.submit_write(0, 64, k);
    }
    assert_eq!(c.repl(0, 1), ReplState::Established, "the resync starves");
    c.release();
    c.assert_heals();
}

/// Without a journal (`al-updates no`) an area with writes in progress looked quiet, and of a large area only the first
/// extent was looked at: bits were cleared that stood for something (`spec/wire-protocol.md` §9.10).
#[test]
fn an_area_with_open_writes_is_not_declared_in_sync() {
    for (al_updates, claimed_from) in [(false, 64), (true, 0), (false, 0)] {
        let mut c = quiet(3);
        set_disk(&mut c, 0, DiskConfig { al_updates, ..DiskConfig::default() });
        c.cut_links(&[(0, 2), (1, 2)]);
        let sector = EXTENT + 64;
        c.write(0, sector, 4096, 2);
        c.advance(SECOND);
        assert_eq!(c.oos(0, 2), 4);
        c.hold(|from, to, _| (from, to) == (1, 0));
        c.submit_write(0, sector, 3);
        let area = PeersInSync { sector: claimed_from, mask: 0b111, size: (2 * EXTENT * 512) as u32 };
        c.inject(1, 0, Stream::Control, Packet::PeersInSync(area));
        assert_eq!(c.oos(0, 2), 4);
        c.deliver();
        c.heal();
        c.assert_heals();
    }
}

/// A resync request whose size is no multiple of a sector led to a disk error, and so to a detach
/// (`spec/wire-protocol.md` §10.1).
#[test]
fn a_peer_cannot_make_a_disk_fail_with_an_odd_request() {
    let mut c = behind();
    c.hold(|from, to, p| (from, to) == (0, 1) && matches!(p, Packet::RsDataReply(_)));
    c.mend(0, 1);
    c.wait("resync", |c| c.repl(0, 1) == ReplState::SyncSource);
    let odd = DagtagReq { sector: 64, block_id: 0x7777, blksize: 100, dagtag_node_id: 0, dagtag: 0 };
    c.inject(1, 0, Stream::Data, Packet::RsDagtagReq(odd));
    assert_eq!(c.disk(0), DiskState::UpToDate);
    c.deliver();
    c.assert_heals();
}

/// A resync of all bits and one of the bits there are, from either side (`spec/state-machine.md` §12.3).
#[test]
fn invalidating_either_side_ends() {
    let mut c = quiet(2);
    for reset_bitmap in [false, true] {
        c.ok(0, Command::InvalidateRemote { vnr: V, peer: id(1), reset_bitmap });
        c.assert_heals();
        c.ok(1, Command::Invalidate { vnr: V, from: None, reset_bitmap });
        c.assert_heals();
    }
}

/// A pause that began before the link was there, with writes to the blocks concerned (`spec/state-machine.md` §11.2).
#[test]
fn a_paused_resync_goes_on() {
    let mut c = quiet(2);
    c.cut_link(0, 1);
    c.write(0, 16, 65536, 4);
    c.ok(0, Command::PauseSync { vnr: V, peer: id(1) });
    c.heal();
    assert_eq!(c.repl(0, 1), ReplState::PausedSyncS);
    c.write(0, 24, 4096, 5);
    c.ok(0, Command::ResumeSync { vnr: V, peer: id(1) });
    c.assert_heals();
}

/// Links that break while the replica's disk is slow, again and again (`spec/state-machine.md` §11.7).
#[test]
fn blinking_links_and_slow_disks_end_equal() {
    let mut c = quiet(3);
    for k in 0..12u8 {
        let p = 1 + k % 2;
        c.slow(p as usize, Slow::Write);
        for j in 0..4u8 {
            c.submit_write(0, 64 * u64::from(j), k + j);
        }
        blink(&mut c, 0, p);
        c.release();
        c.advance(2 * SECOND);
    }
    c.assert_heals();
}

/// A disk that missed writes while its peers' links changed (`spec/state-machine.md` §7.5).
#[test]
fn an_attach_after_changes_among_the_others_gets_what_it_missed() {
    let mut c = quiet(3);
    detach(&mut c, 2, false);
    c.write(0, 16, 4096, 4);
    c.cut_link(0, 1);
    c.write(0, 24, 4096, 5);
    c.heal();
    c.advance(2 * SECOND);
    c.attach(2);
    c.assert_heals();
}

/// A diskless Primary loses one of its two replicas (`spec/state-machine.md` §8.5 "creation without local disk").
#[test]
fn replicas_of_a_diskless_primary_end_equal() {
    let mut c = quiet(3);
    detach(&mut c, 0, false);
    c.write(0, 16, 4096, 4);
    c.cut_links(&[(0, 2), (1, 2)]);
    c.write(0, 24, 4096, 5);
    c.heal();
    c.wait("both UpToDate", |c| c.disk(1) == DiskState::UpToDate && c.disk(2) == DiskState::UpToDate);
    c.attach(0);
    c.assert_heals();
}
