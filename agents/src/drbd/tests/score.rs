//! Every row of the score table, and every way that disks become facts.

use palisade_control::DiskState::{
    Attaching, Consistent, DUnknown, Detaching, Diskless, Failed, Inconsistent, Negotiating, Outdated,
    UpToDate,
};
use palisade_control::Role::{Primary, Secondary};
use palisade_control::{DiskState, ResourceStatus};

use super::resource;
use crate::drbd::facts::{Facts, LocalData};
use crate::drbd::parameters::{SCORES_DEFAULT, Scores};
use crate::drbd::score::ScoreChange::{Keep, Remove, Set};
use crate::drbd::score::{ScoreChange, decide, may_unfence};

fn score(status: &ResourceStatus) -> ScoreChange {
    decide(&Facts::of(status), SCORES_DEFAULT, false)
}

fn client(status: ResourceStatus) -> ResourceStatus {
    let mut status = status;
    for device in &mut status.devices {
        device.client = true;
    }
    status
}

#[test]
fn row_1_no_quorum() {
    for role in [Primary, Secondary] {
        let mut status = resource(role, &[UpToDate, UpToDate], &[&[UpToDate, UpToDate]]);
        assert_eq!(score(&status), Set(10_000));
        status.devices[1].quorum = false;
        assert_eq!(score(&status), Remove);
        let mut status = client(resource(role, &[Diskless], &[&[UpToDate]]));
        status.devices[0].quorum = false;
        assert_eq!(score(&status), Remove, "a client without quorum");
    }
}

#[test]
fn row_2_peer_primary_rule() {
    let status = resource(Secondary, &[UpToDate], &[&[UpToDate]]);
    assert_eq!(decide(&Facts::of(&status), SCORES_DEFAULT, true), Remove);
}

#[test]
fn rows_3_to_6_diskless_client() {
    let of = |role, peers: &[&[DiskState]]| score(&client(resource(role, &[Diskless], peers)));
    assert_eq!(of(Primary, &[&[UpToDate], &[Inconsistent]]), Set(9999), "row 3");
    assert_eq!(of(Secondary, &[&[UpToDate], &[UpToDate]]), Set(9999), "row 4");
    assert_eq!(of(Secondary, &[&[UpToDate], &[DUnknown]]), Set(999), "row 5");
    assert_eq!(of(Secondary, &[&[Outdated]]), Remove, "row 6");
    assert_eq!(of(Primary, &[&[DUnknown]]), Remove, "row 6");
    assert_eq!(of(Secondary, &[]), Remove, "row 6");
}

#[test]
fn a_resource_without_volumes_is_no_client() {
    assert_eq!(score(&resource(Secondary, &[], &[&[UpToDate]])), Set(10));
    assert_eq!(score(&resource(Secondary, &[], &[])), Remove);
}

#[test]
fn rows_7_to_9_local_data_are_up_to_date() {
    let of = |role, peers: &[&[DiskState]]| score(&resource(role, &[UpToDate], peers));
    assert_eq!(of(Primary, &[&[DUnknown]]), Set(10_000), "row 7");
    assert_eq!(of(Secondary, &[&[DUnknown]]), Set(1000), "row 8");
    assert_eq!(of(Secondary, &[&[UpToDate], &[DUnknown]]), Set(1000), "row 8");
    assert_eq!(of(Secondary, &[&[UpToDate]]), Set(10_000), "row 9");
    assert_eq!(of(Secondary, &[&[Outdated]]), Set(10_000), "row 9");
    assert_eq!(of(Secondary, &[]), Set(10_000), "row 9");
}

#[test]
fn row_7_unfences_only_a_primary_among_good_peers() {
    let may = |role, disk, peers: &[&[DiskState]]| may_unfence(&Facts::of(&resource(role, &[disk], peers)));
    assert!(may(Primary, UpToDate, &[&[UpToDate], &[UpToDate]]));
    assert!(!may(Secondary, UpToDate, &[&[UpToDate]]));
    assert!(!may(Primary, UpToDate, &[&[UpToDate], &[Inconsistent]]));
    assert!(!may(Primary, UpToDate, &[]));
    assert!(!may(Primary, Inconsistent, &[&[UpToDate]]));
    let mut status = resource(Primary, &[UpToDate], &[&[UpToDate]]);
    status.devices[0].quorum = false;
    assert!(!may_unfence(&Facts::of(&status)));
}

#[test]
fn row_10_only_a_peer_is_good() {
    for disk in [Diskless, Attaching, Detaching, Failed, Negotiating, Inconsistent, Outdated, Consistent] {
        let status = resource(Secondary, &[disk], &[&[UpToDate], &[DUnknown]]);
        assert_eq!(score(&status), Set(10), "{disk}");
    }
    let partly = resource(Secondary, &[Inconsistent, UpToDate], &[&[UpToDate, Outdated]]);
    assert_eq!(score(&partly), Remove, "no peer is good in every volume");
}

#[test]
fn rows_11_to_13_nobody_is_good() {
    let expected = [
        (Diskless, Remove),
        (Attaching, Keep),
        (Detaching, Remove),
        (Failed, Remove),
        (Negotiating, Keep),
        (Inconsistent, Remove),
        (Outdated, Remove),
        (DUnknown, Remove),
        (Consistent, Remove),
    ];
    for (disk, change) in expected {
        for peers in [&[][..], &[&[DUnknown][..]][..], &[&[Outdated][..]][..]] {
            assert_eq!(score(&resource(Secondary, &[disk], peers)), change, "{disk}");
        }
    }
    let scores = Scores { consistent: 5, ..SCORES_DEFAULT };
    let status = resource(Secondary, &[Consistent, UpToDate], &[&[DUnknown, DUnknown]]);
    assert_eq!(decide(&Facts::of(&status), scores, false), Set(5), "row 12");
}

#[test]
fn the_worst_disk_counts() {
    let order = [
        (&[UpToDate, UpToDate][..], LocalData::UpToDate),
        (&[UpToDate, Consistent], LocalData::Consistent),
        (&[UpToDate, Consistent, Attaching], LocalData::Transitional),
        (&[UpToDate, Negotiating], LocalData::Transitional),
        (&[UpToDate, Consistent, Attaching, Inconsistent], LocalData::Unusable),
        (&[UpToDate, DUnknown], LocalData::Unusable),
        (&[], LocalData::Unusable),
    ];
    for (disks, worst) in order {
        assert_eq!(Facts::of(&resource(Secondary, disks, &[])).local, worst, "{disks:?}");
    }
}

#[test]
fn a_disk_lost_unwillingly_makes_no_client() {
    let facts = Facts::of(&resource(Primary, &[Diskless], &[&[UpToDate]]));
    assert!(!facts.client);
    assert_eq!(facts.local, LocalData::Unusable);
}

#[test]
fn client_peers_hold_no_data_and_are_left_out() {
    let mut status = resource(Secondary, &[UpToDate], &[&[UpToDate], &[Diskless]]);
    assert!(!Facts::of(&status).all_peers_up_to_date());
    status.connections[1].peer_devices[0].peer_client = true;
    assert!(Facts::of(&status).all_peers_up_to_date());
    status.connections[1].peer_devices[0].peer_disk_state = DUnknown;
    assert!(!Facts::of(&status).peer_unknown);
}

#[test]
fn a_peer_is_good_only_in_all_volumes() {
    let facts = Facts::of(&resource(Secondary, &[UpToDate, UpToDate], &[&[UpToDate, Inconsistent]]));
    assert!(!facts.some_peer_up_to_date && facts.some_peer_not_up_to_date);
    let facts = Facts::of(&resource(Secondary, &[UpToDate], &[&[]]));
    assert!(!facts.some_peer_up_to_date);
}

#[test]
fn the_healthy_peer_must_be_the_primary_one() {
    let mut status = resource(Secondary, &[UpToDate], &[&[UpToDate], &[Inconsistent]]);
    status.connections[1].peer_role = Primary;
    assert!(!Facts::of(&status).healthy_peer_primary);
    status.connections[0].peer_role = Primary;
    assert!(Facts::of(&status).healthy_peer_primary);
}

#[test]
fn scores_of_zero_remove() {
    let zero = Scores { consistent: 0, remote: 0, local: 0, good: 0 };
    for disks in [&[UpToDate][..], &[Consistent], &[Inconsistent]] {
        for role in [Primary, Secondary] {
            let status = resource(role, disks, &[&[UpToDate], &[DUnknown]]);
            assert_eq!(decide(&Facts::of(&status), zero, false), Remove);
            assert_eq!(decide(&Facts::of(&client(status)), zero, false), Remove);
        }
    }
}
