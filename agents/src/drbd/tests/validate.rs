//! Checks before an action, and the exit codes they give.

use palisade_cluster::{Environment, ExitCode};
use palisade_control::Role::Secondary;

use super::{Node, healthy};
use crate::drbd::Action;
use crate::drbd::parameters::{Parameters, Version};
use crate::drbd::replicator::Configuration;
use crate::drbd::validate::{Problem, environment};

const ACTIONS: [Action; 9] = [
    Action::Start,
    Action::Stop,
    Action::Promote,
    Action::Demote,
    Action::Monitor,
    Action::Status,
    Action::Notify,
    Action::Reload,
    Action::ValidateAll,
];

fn check(action: Action, vars: &[(&str, &str)]) -> Result<(), Problem> {
    let base = [("drbd_resource", "r0"), ("CRM_meta_notify", "true")];
    let vars =
        base.iter().chain(vars).map(|(name, value)| (format!("OCF_RESKEY_{name}"), (*value).to_owned()));
    let env = Environment::from_vars(vars);
    environment(action, &env, &Parameters::read(&env))
}

fn reason(action: Action, vars: &[(&str, &str)]) -> (ExitCode, String) {
    let problem = check(action, vars).unwrap_err();
    (problem.code, problem.reason)
}

#[test]
fn a_plain_configuration_is_fine() {
    let shape = [
        ("CRM_meta_clone_max", "3"),
        ("CRM_meta_clone_node_max", "1"),
        ("CRM_meta_promoted_max", "1"),
        ("CRM_meta_promoted_node_max", "1"),
    ];
    for action in ACTIONS {
        assert_eq!(check(action, &[]), Ok(()), "{action:?}");
        assert_eq!(check(action, &shape), Ok(()), "{action:?}");
        assert_eq!(check(action, &[("drbd_resource", "a-Z_0.9:x@y+z%=/")]), Ok(()), "{action:?}");
    }
}

#[test]
fn a_missing_or_odd_name_is_a_configuration_error_everywhere() {
    for action in ACTIONS {
        for name in ["", "r 0", "r0;reboot", "r0\n", "$(x)", "-r0", "ä", "r\u{fffd}"] {
            let (code, _) = reason(action, &[("drbd_resource", name)]);
            assert_eq!(code, ExitCode::Configured, "{action:?} {name:?}");
        }
    }
}

#[test]
fn the_clone_must_have_the_shape_that_the_agent_serves() {
    let bad = [
        ("clone_node_max", "2", "clone-node-max = 1"),
        ("promoted_node_max", "2", "promoted-node-max = 1"),
        ("master_node_max", "0", "promoted-node-max = 1"),
        ("promoted_max", "3", "promoted-max <= 2"),
        ("master_max", "x", "promoted-max <= 2"),
    ];
    for (name, found, expected) in bad {
        let name = format!("CRM_meta_{name}");
        let (code, text) = reason(Action::Monitor, &[(&name, found)]);
        assert_eq!(code, ExitCode::Configured);
        assert_eq!(text, format!("meta parameter misconfigured, expected {expected}, but found {found}."));
        assert_eq!(check(Action::Stop, &[(&name, found)]), Ok(()), "stop does not care");
    }
}

#[test]
fn notifications_are_needed_where_the_score_depends_on_them() {
    for action in ACTIONS {
        let off = [("CRM_meta_notify", "false")];
        let needs = matches!(
            action,
            Action::Start | Action::Promote | Action::Demote | Action::Notify | Action::Reload
        );
        assert_eq!(check(action, &off).is_err(), needs, "{action:?}");
        assert_eq!(check(action, &[off[0], ("ignore_missing_notifications", "true")]), Ok(()));
        assert_eq!(check(action, &[off[0], ("CRM_meta_notify_start_uname", " ")]), Ok(()));
    }
    let (code, text) = reason(Action::Start, &[("CRM_meta_notify", "no")]);
    assert_eq!(code, ExitCode::Configured);
    assert!(text.starts_with("you really should enable notify when using this RA"));
}

#[test]
fn odd_paths_and_versions_are_configuration_errors() {
    for (name, value) in [
        ("drbdconf", "/etc/a b"),
        ("drbdconf", "/etc/$x"),
        ("require_drbd_module_version_ge", "nine"),
        ("require_drbd_module_version_lt", "9.2"),
    ] {
        assert_eq!(reason(Action::ValidateAll, &[(name, value)]).0, ExitCode::Configured, "{name}");
        assert_eq!(check(Action::Stop, &[(name, value)]), Ok(()), "stop does not care");
    }
    assert_eq!(check(Action::Start, &[("require_drbd_module_version_ge", "")]), Ok(()));
}

fn node() -> Node {
    Node::new(Some(healthy(Secondary)))
}

#[test]
fn validate_all_of_a_sound_host() {
    let node = node();
    assert_eq!(node.run(Action::ValidateAll), ExitCode::Success);
    assert_eq!(*node.engine.calls.borrow(), ["configuration"]);
    assert_eq!(node.cluster.writes.get(), 0);
}

#[test]
fn an_unknown_resource_is_not_installed_and_has_no_score() {
    for action in [Action::ValidateAll, Action::Start, Action::Reload] {
        let mut node = node();
        node.engine.configuration = Err(1);
        assert_eq!(node.run(action), ExitCode::Installed, "{action:?}");
        assert_eq!(node.cluster.score.get(), None);
    }
}

#[test]
fn a_broken_configuration_keeps_the_score() {
    let mut node = node();
    node.engine.configuration = Err(10);
    assert_eq!(node.run(Action::ValidateAll), ExitCode::Installed);
    assert_eq!(node.cluster.writes.get(), 0);
}

#[test]
fn what_runs_is_told_and_ended_without_a_configuration() {
    for (action, code) in [
        (Action::Monitor, ExitCode::Success),
        (Action::Status, ExitCode::Success),
        (Action::Notify, ExitCode::Success),
        (Action::Promote, ExitCode::Success),
        (Action::Demote, ExitCode::Success),
        (Action::Stop, ExitCode::Success),
    ] {
        let mut node = node().with("drbdconf", "/nonexistent/drbd.conf");
        node.engine.configuration = Err(1);
        assert_eq!(node.run(action), code, "{action:?}");
    }
}

#[test]
fn an_unreadable_configuration_is_not_installed() {
    let node = node().with("drbdconf", "/nonexistent/drbd.conf");
    assert_eq!(node.run(Action::Start), ExitCode::Installed);
}

#[test]
fn two_promoted_instances_need_the_option() {
    for action in [Action::Start, Action::Promote] {
        let mut node = node().with("CRM_meta_promoted_max", "2").with("CRM_meta_clone_max", "2");
        assert_eq!(node.run(action), ExitCode::Configured, "{action:?}");
        node.engine.configuration = Ok(Configuration { two_primaries: true });
        assert_eq!(node.run(action), ExitCode::Success, "{action:?}");
    }
    let three = node().with("CRM_meta_promoted_max", "2").with("CRM_meta_clone_max", "3");
    assert_eq!(three.run(Action::Start), ExitCode::Configured);
}

#[test]
fn the_8_line_knows_two_nodes() {
    for (version, max, code) in [
        ("8.4.11", "3", ExitCode::Configured),
        ("8.4.11", "2", ExitCode::Success),
        ("9.0.0", "3", ExitCode::Success),
    ] {
        let mut node = node().with("CRM_meta_clone_max", max);
        node.engine.version = Version::parse(version);
        assert_eq!(node.run(Action::ValidateAll), code, "{version} {max}");
    }
}

#[test]
fn versions_are_checked_against_the_range() {
    for (ge, lt, code) in [
        ("9.2.18", "9.3.0", ExitCode::Success),
        ("9.2.19", "9.3.0", ExitCode::Installed),
        ("9.0.0", "9.2.18", ExitCode::Installed),
        ("", "", ExitCode::Success),
    ] {
        let mut node =
            node().with("require_drbd_module_version_ge", ge).with("require_drbd_module_version_lt", lt);
        node.engine.version = Version::parse("9.2.18");
        assert_eq!(node.run(Action::ValidateAll), code, "{ge} {lt}");
    }
}

#[test]
fn without_any_engine_there_is_nothing_to_start() {
    let mut node = node();
    node.engine.bundled = false;
    assert_eq!(node.run(Action::ValidateAll), ExitCode::Installed);
    node.engine.version = Version::parse("9.2.18");
    assert_eq!(node.run(Action::ValidateAll), ExitCode::Success);
}
