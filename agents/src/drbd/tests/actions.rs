//! What each action does in each state, and that it ends in time.

use std::time::Duration;

use palisade_cluster::ExitCode;
use palisade_control::Role::{Primary, Secondary};
use palisade_control::{ConnectionState, DiskState, ResourceStatus};

use super::{Node, SCORE_BEFORE, healthy, no_data, refused, resource};
use crate::drbd::Action;
use crate::drbd::actions::Clock;

fn lonely() -> ResourceStatus {
    let mut status = resource(Secondary, &[DiskState::UpToDate], &[&[DiskState::DUnknown]]);
    status.connections[0].connection_state = ConnectionState::Connecting;
    status
}

fn peer_is_primary() -> ResourceStatus {
    let mut status = healthy(Secondary);
    status.connections[0].peer_role = Primary;
    status
}

fn ended_in_time(node: &Node) {
    assert!(node.clock.elapsed() <= node.clock.limit(), "{:?}", node.clock.elapsed());
}

#[test]
fn monitor_answers_from_the_state_and_scores() {
    for (state, code, score) in [
        (None, ExitCode::NotRunning, None),
        (Some(healthy(Secondary)), ExitCode::Success, Some(10_000)),
        (Some(healthy(Primary)), ExitCode::RunningPromoted, Some(10_000)),
        (Some(lonely()), ExitCode::Success, Some(1000)),
    ] {
        let node = Node::new(state).with("CRM_meta_interval", "10000");
        assert_eq!(node.run(Action::Monitor), code);
        assert_eq!(node.cluster.score.get(), score);
        assert!(
            node.engine.calls.borrow().is_empty(),
            "a monitor changes nothing and reads no configuration"
        );
    }
}

#[test]
fn a_probe_of_what_does_not_run_leaves_no_trace() {
    let node = Node::new(None);
    assert_eq!(node.run(Action::Monitor), ExitCode::NotRunning);
    assert_eq!(node.cluster.score.get(), Some(SCORE_BEFORE));
    let node = Node::new(Some(healthy(Primary)));
    assert_eq!(node.run(Action::Monitor), ExitCode::RunningPromoted);
    assert_eq!(node.cluster.score.get(), Some(10_000));
}

#[test]
fn monitor_of_an_engine_that_hangs_fails_in_time() {
    let node = Node::new(Some(healthy(Primary)));
    node.engine.hangs.set(true);
    assert_eq!(node.run(Action::Monitor), ExitCode::Generic);
    ended_in_time(&node);
}

#[test]
fn a_hanging_attribute_daemon_does_not_fail_the_monitor() {
    let node = Node::new(Some(healthy(Primary)));
    node.cluster.hangs.set(true);
    assert_eq!(node.run(Action::Monitor), ExitCode::RunningPromoted);
    ended_in_time(&node);
}

#[test]
fn without_time_no_score_is_written() {
    let node = Node::new(Some(healthy(Primary)));
    node.clock.pause(node.clock.limit());
    assert_eq!(node.run(Action::Monitor), ExitCode::RunningPromoted);
    assert_eq!(node.cluster.score.get(), Some(SCORE_BEFORE));
}

#[test]
fn a_transitional_disk_keeps_the_score() {
    let node = Node::new(Some(resource(Secondary, &[DiskState::Attaching], &[])));
    assert_eq!(node.run(Action::Monitor), ExitCode::Success);
    assert_eq!((node.cluster.score.get(), node.cluster.writes.get()), (Some(SCORE_BEFORE), 0));
}

#[test]
fn status_touches_nothing() {
    let node = Node::new(Some(healthy(Primary)));
    assert_eq!(node.run(Action::Status), ExitCode::RunningPromoted);
    assert_eq!(node.cluster.writes.get(), 0);
}

#[test]
fn start_brings_up_and_scores() {
    let node = Node::new(None);
    assert_eq!(node.run(Action::Start), ExitCode::Success);
    assert_eq!(node.calls(), ["Up"]);
    assert_eq!((node.cluster.score.get(), node.role()), (Some(10_000), Some(Secondary)));
    assert_eq!(node.seconds(), 0);
}

#[test]
fn start_of_what_runs_connects_and_succeeds() {
    let node = Node::new(Some(healthy(Secondary)));
    assert_eq!(node.run(Action::Start), ExitCode::Success);
    assert_eq!(node.calls(), ["Adjust"]);
}

#[test]
fn start_of_a_primary_demotes_first() {
    let node = Node::new(Some(healthy(Primary)));
    assert_eq!(node.run(Action::Start), ExitCode::Success);
    assert_eq!(node.calls(), ["Secondary", "Adjust"]);
    assert_eq!(node.role(), Some(Secondary));
}

#[test]
fn start_waits_for_peers_as_long_as_it_is_told() {
    for (wait, seconds) in [("5", 5), ("17", 17), ("0", 0), ("", 0), ("no", 0)] {
        let mut node = Node::new(None).with("wfc_timeout", wait);
        node.engine.configured = lonely();
        assert_eq!(node.run(Action::Start), ExitCode::Success);
        assert_eq!((node.seconds(), node.cluster.score.get()), (seconds, Some(1000)), "{wait:?}");
    }
    let mut node = Node::new(None).with("wfc_timeout", "4000");
    node.engine.configured = lonely();
    assert_eq!(node.run(Action::Start), ExitCode::Success);
    ended_in_time(&node);
}

#[test]
fn start_does_not_wait_for_a_peer_that_is_given_up() {
    let mut node = Node::new(None);
    node.engine.configured = lonely();
    node.engine.configured.connections[0].connection_state = ConnectionState::StandAlone;
    assert_eq!(node.run(Action::Start), ExitCode::Success);
    assert_eq!(node.seconds(), 0);
}

#[test]
fn start_tries_twice() {
    let node = Node::new(None).answering([Err(refused(10))]);
    assert_eq!(node.run(Action::Start), ExitCode::Success);
    assert_eq!(node.calls(), ["Up", "Up"]);
    let node = Node::new(None).answering([Err(refused(10)), Err(refused(10))]);
    assert_eq!(node.run(Action::Start), ExitCode::Generic);
    assert_eq!(node.calls(), ["Up", "Up"]);
}

#[test]
fn start_that_never_shows_effect_ends_in_time() {
    let node = Node::new(Some(healthy(Primary)));
    node.engine.inert.set(true);
    assert_eq!(node.run(Action::Start), ExitCode::Generic);
    ended_in_time(&node);
    let node = Node::new(None);
    node.engine.inert.set(true);
    assert_eq!(node.run(Action::Start), ExitCode::Generic);
    ended_in_time(&node);
}

#[test]
fn connect_only_after_promote_leaves_the_network_to_promote() {
    let mut node = Node::new(None).with("connect_only_after_promote", "true");
    node.engine.configured = lonely();
    assert_eq!(node.run(Action::Start), ExitCode::Success);
    assert_eq!((node.calls(), node.seconds()), (vec!["AdjustDisks".to_owned()], 0));
    assert_eq!(node.run(Action::Promote), ExitCode::Success);
    assert_eq!(node.calls(), ["AdjustDisks", "Primary", "Adjust"]);
}

#[test]
fn promote_promotes_and_is_idempotent() {
    let node = Node::new(Some(healthy(Secondary)));
    assert_eq!(node.run(Action::Promote), ExitCode::Success);
    assert_eq!((node.role(), node.seconds()), (Some(Primary), 0));
    assert_eq!(node.run(Action::Promote), ExitCode::Success);
    assert_eq!(node.calls(), ["Primary"]);
}

#[test]
fn promote_retries_what_passes() {
    let node =
        Node::new(Some(healthy(Secondary))).answering([Err(refused(11)), Err(no_data()), Err(refused(11))]);
    assert_eq!(node.run(Action::Promote), ExitCode::Success);
    assert_eq!((node.calls().len(), node.seconds()), (4, 0), "a fail-over waits for this");
}

#[test]
fn promote_without_data_fails_after_15_seconds() {
    let node = Node::new(Some(lonely())).answering((0..100).map(|_| Err(no_data())));
    assert_eq!(node.run(Action::Promote), ExitCode::Generic);
    assert_eq!(node.seconds(), 15);
}

#[test]
fn promote_that_is_always_refused_ends_in_time() {
    let node = Node::new(Some(lonely())).answering((0..100).map(|_| Err(refused(11))));
    assert_eq!(node.run(Action::Promote), ExitCode::Generic);
    ended_in_time(&node);
    assert!(node.seconds() >= 58);
}

#[test]
fn promote_of_what_does_not_run_fails_slowly() {
    let node = Node::new(None);
    assert_eq!(node.run(Action::Promote), ExitCode::Generic);
    assert_eq!(node.seconds(), 15);
    assert!(node.calls().is_empty());
}

#[test]
fn promote_fails_early_only_if_the_primary_peer_is_unexpected() {
    let bob = || Some(vec!["bob".to_owned()]);
    for (early, promoted, max, gives_up) in [
        ("true", Some(vec![]), "1", true),
        ("true", Some(vec!["Alice".to_owned()]), "1", true),
        ("true", bob(), "1", false),
        ("true", None, "1", false),
        ("true", Some(vec![]), "2", false),
        ("false", Some(vec![]), "1", false),
    ] {
        let mut node = Node::new(Some(peer_is_primary()))
            .with("fail_promote_early_if_peer_primary", early)
            .with("CRM_meta_promoted_max", max)
            .with("CRM_meta_clone_max", "2")
            .answering((0..100).map(|_| Err(refused(11))));
        node.engine.configuration = Ok(crate::drbd::replicator::Configuration { two_primaries: true });
        node.cluster.promoted = promoted.clone();
        assert_eq!(node.run(Action::Promote), ExitCode::Generic);
        let tried_once = node.calls() == ["Primary"];
        assert_eq!(tried_once, gives_up, "{early} {promoted:?} {max}");
        assert_eq!(node.cluster.score.get().is_none(), gives_up);
        assert!(node.cluster.located.get() <= 1, "the cluster is asked once");
        assert!(node.seconds() >= 15);
        ended_in_time(&node);
    }
}

#[test]
fn the_score_follows_the_peer_primary_rule() {
    for (rule, promoted, removed) in [
        ("false", Some(vec![]), false),
        ("true", Some(vec!["bob".to_owned()]), true),
        ("unexpected", Some(vec![]), true),
        ("unexpected", Some(vec!["bob".to_owned()]), false),
        ("unexpected", None, false),
    ] {
        let mut node = Node::new(Some(peer_is_primary())).with("remove_master_score_if_peer_primary", rule);
        node.cluster.promoted = promoted.clone();
        assert_eq!(node.run(Action::Monitor), ExitCode::Success);
        assert_eq!(node.cluster.score.get().is_none(), removed, "{rule} {promoted:?}");
        let primary = Node::new(Some(healthy(Primary))).with("remove_master_score_if_peer_primary", rule);
        assert_eq!(primary.run(Action::Monitor), ExitCode::RunningPromoted);
        assert_eq!(primary.cluster.score.get(), Some(10_000));
    }
}

#[test]
fn demote_demotes_and_is_idempotent() {
    let node = Node::new(Some(healthy(Primary)));
    assert_eq!(node.run(Action::Demote), ExitCode::Success);
    assert_eq!(node.run(Action::Demote), ExitCode::Success);
    assert_eq!((node.calls(), node.role()), (vec!["Secondary".to_owned()], Some(Secondary)));
    assert_eq!(Node::new(None).run(Action::Demote), ExitCode::NotRunning);
}

#[test]
fn demote_of_an_open_device_retries_and_ends_in_time() {
    let node = Node::new(Some(healthy(Primary))).answering([Err(refused(11)), Err(refused(11))]);
    assert_eq!(node.run(Action::Demote), ExitCode::Success);
    let node = Node::new(Some(healthy(Primary))).answering((0..100).map(|_| Err(refused(11))));
    assert_eq!(node.run(Action::Demote), ExitCode::Generic);
    ended_in_time(&node);
}

#[test]
fn stop_takes_down_from_every_state() {
    for (state, calls) in [
        (None, &["DownRunning"][..]),
        (Some(healthy(Secondary)), &["Down"]),
        (Some(healthy(Primary)), &["Secondary", "Down"]),
    ] {
        let node = Node::new(state);
        assert_eq!(node.run(Action::Stop), ExitCode::Success);
        assert_eq!((node.calls(), node.role()), (calls.iter().map(|c| (*c).to_owned()).collect(), None));
        assert_eq!(node.cluster.score.get(), None);
    }
}

#[test]
fn stop_of_what_was_never_configured_succeeds() {
    let mut node = Node::new(None).with("drbdconf", "/nonexistent").answering([Err(refused(10))]);
    node.engine.configuration = Err(1);
    node.engine.bundled = false;
    assert_eq!(node.run(Action::Stop), ExitCode::Success);
}

#[test]
fn stop_without_a_configuration_ends_what_runs() {
    let node = Node::new(Some(healthy(Secondary))).answering([Err(refused(10))]);
    assert_eq!(node.run(Action::Stop), ExitCode::Success);
    assert_eq!(node.calls(), ["Down", "DownRunning"]);
}

#[test]
fn stop_ends_an_engine_that_does_not_answer() {
    let node = Node::new(Some(healthy(Secondary)));
    node.engine.hangs.set(true);
    assert_eq!(node.run(Action::Stop), ExitCode::Success);
    assert_eq!(node.role(), None);
    ended_in_time(&node);
}

#[test]
fn stop_that_cannot_end_it_fails_in_time() {
    for state in [healthy(Primary), healthy(Secondary)] {
        let node = Node::new(Some(state)).answering((0..200).map(|_| Err(refused(11))));
        assert_eq!(node.run(Action::Stop), ExitCode::Generic);
        ended_in_time(&node);
    }
}

#[test]
fn reload_adjusts_what_runs() {
    let node = Node::new(Some(healthy(Secondary)));
    assert_eq!(node.run(Action::Reload), ExitCode::Success);
    assert_eq!((node.calls(), node.cluster.score.get()), (vec!["Adjust".to_owned()], Some(10_000)));
    let node = Node::new(Some(healthy(Secondary))).answering([Err(refused(10))]);
    assert_eq!(node.run(Action::Reload), ExitCode::Generic);
    let node = Node::new(None);
    assert_eq!(node.run(Action::Reload), ExitCode::Generic);
    assert_eq!(node.cluster.score.get(), None);
}

#[test]
fn every_notification_does_its_part_and_succeeds() {
    for (phase, operation, adjusts, scores) in [
        ("pre", "start", true, false),
        ("post", "start", true, true),
        ("pre", "promote", false, false),
        ("pre", "demote", false, false),
        ("pre", "stop", false, false),
        ("post", "promote", false, true),
        ("post", "demote", false, true),
        ("post", "stop", false, true),
        ("", "", false, false),
    ] {
        let node = Node::new(Some(healthy(Secondary))).told(phase, operation).answering([Err(refused(10))]);
        assert_eq!(node.run(Action::Notify), ExitCode::Success);
        assert_eq!(!node.calls().is_empty(), adjusts, "{phase} {operation}");
        assert_eq!(node.cluster.score.get() == Some(10_000), scores, "{phase} {operation}");
        assert!(!node.calls().contains(&"Outdate".to_owned()));
    }
}

#[test]
fn notify_connects_nothing_that_waits_for_promotion() {
    let node =
        Node::new(Some(healthy(Secondary))).with("connect_only_after_promote", "true").told("post", "start");
    assert_eq!(node.run(Action::Notify), ExitCode::Success);
    assert!(node.calls().is_empty());
    assert_eq!(node.cluster.score.get(), Some(10_000));
}

#[test]
fn notify_of_a_stopped_or_hanging_resource_succeeds() {
    let node = Node::new(None).told("post", "start");
    assert_eq!(node.run(Action::Notify), ExitCode::Success);
    assert!(node.calls().is_empty());
    node.engine.hangs.set(true);
    assert_eq!(node.run(Action::Notify), ExitCode::Success);
    ended_in_time(&node);
}

#[test]
fn a_secondary_that_lost_its_peer_outdates_itself_only_where_told() {
    for (rule, promoted, stop, promote, outdates) in [
        ("false", "bob", " ", " ", false),
        ("true", "bob", " ", " ", true),
        ("true", "alice", " ", " ", false),
        ("true", "ALICE bob", " ", " ", true),
        ("true", " ", " ", "bob", false),
        ("true", "bob", "bob", " ", false),
    ] {
        let outdate = |node: Node| {
            node.with("stop_outdates_secondary", rule)
                .with("CRM_meta_notify_promoted_uname", promoted)
                .with("CRM_meta_notify_stop_uname", stop)
                .with("CRM_meta_notify_promote_uname", promote)
        };
        for operation in ["stop", "promote", "demote"] {
            let node = outdate(Node::new(Some(lonely())).told("post", operation));
            assert_eq!(node.run(Action::Notify), ExitCode::Success);
            assert_eq!(node.calls() == ["Outdate"], outdates, "{rule} {promoted} {stop} {promote}");
            assert_eq!(node.cluster.score.get().is_none(), outdates);
        }
        let node = outdate(Node::new(Some(healthy(Secondary))));
        assert_eq!(node.run(Action::Stop), ExitCode::Success);
        assert_eq!(node.calls().contains(&"Outdate".to_owned()), outdates, "{rule} {promoted} {stop}");
    }
}

#[test]
fn a_primary_never_outdates_itself() {
    let mut split = lonely();
    split.role = Primary;
    let node = Node::new(Some(split))
        .with("stop_outdates_secondary", "true")
        .with("CRM_meta_notify_promoted_uname", "bob")
        .told("post", "stop");
    assert_eq!(node.run(Action::Notify), ExitCode::Success);
    assert!(node.calls().is_empty());
    assert_eq!(node.cluster.score.get(), Some(10_000));
}

#[test]
fn unfencing_is_run_with_its_arguments_and_only_if_wanted() {
    let run = |wanted: &str, role| {
        let node = Node::new(Some(healthy(role)))
            .with("unfence_if_all_uptodate", wanted)
            .with("unfence_extra_args", "--quiet")
            .answering([Err(refused(1))]);
        node.run(Action::Monitor);
        node.calls()
    };
    assert_eq!(run("true", Primary), ["Unfence(\"--quiet\")"]);
    assert!(run("true", Secondary).is_empty());
    assert!(run("false", Primary).is_empty());
}

#[test]
fn the_agent_ends_before_pacemakers_timeout() {
    use crate::drbd::actions::SystemClock;
    let limit = |timeout| SystemClock::new(std::time::Instant::now(), Duration::from_millis(timeout)).limit();
    assert_eq!(limit(20_000), Duration::from_millis(19_300));
    assert_eq!(limit(1000), Duration::from_millis(750));
}
