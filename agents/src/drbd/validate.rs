//! Checks before an action (`spec/ocf-agents.md` §2.2).
//!
//! What Pacemaker told us is checked before every action. What is on the host is checked only where it
//! matters, by `start`, `reload` and `validate-all`: a fail-over must not wait for questions whose answers
//! were known when the resource started, and a monitor tells what runs even while somebody edits the
//! configuration.

use std::time::Duration;

use palisade_cluster::{Environment, ExitCode};

use super::Action;
use super::parameters::{Parameters, Version};
use super::replicator::{Replicator, ReplicatorError};

/// Why an action cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What the agent exits with.
    pub code: ExitCode,
    /// A sentence for the administrator.
    pub reason: String,
    /// The resource is unknown here: its promotion score has to go.
    pub drop_score: bool,
}

impl Problem {
    fn configured(reason: impl Into<String>) -> Self {
        Self { code: ExitCode::Configured, reason: reason.into(), drop_score: false }
    }

    fn installed(reason: impl Into<String>) -> Self {
        Self { code: ExitCode::Installed, reason: reason.into(), drop_score: false }
    }
}

/// How many instances may be promoted in the cluster; 1 if Pacemaker does not say.
pub fn promoted_max(env: &Environment) -> Option<u32> {
    env.meta_renamed("promoted_max", "master_max").map_or(Some(1), |text| text.trim().parse().ok())
}

/// The checks that need nothing but the environment; the first problem decides.
pub fn environment(action: Action, env: &Environment, params: &Parameters) -> Result<(), Problem> {
    let name_only = || resource_name(&params.resource);
    if action == Action::Stop {
        // A stop that fails gets the node fenced: it needs a name and nothing else.
        return name_only();
    }
    version_limit("require_drbd_module_version_ge", &params.version_ge)?;
    version_limit("require_drbd_module_version_lt", &params.version_lt)?;
    clone_shape(env)?;
    if !name_is_plain(&params.config) {
        return Err(Problem::configured(format!(
            "drbdconf must be a path without blanks or special characters, but is \"{}\".",
            params.config
        )));
    }
    name_only()?;
    let needs_notify =
        matches!(action, Action::Start | Action::Promote | Action::Demote | Action::Notify | Action::Reload);
    if needs_notify && !params.ignore_missing_notifications && !env.notification().enabled {
        return Err(Problem::configured(
            "you really should enable notify when using this RA (or set ignore_missing_notifications=true)",
        ));
    }
    Ok(())
}

/// The checks of the host; the first problem decides. `limit` is for each question.
pub fn host(
    action: Action,
    env: &Environment,
    params: &Parameters,
    replicator: &dyn Replicator,
    limit: Duration,
) -> Result<(), Problem> {
    let two_promoted = promoted_max(env).is_some_and(|max| max > 1);
    let all = matches!(action, Action::Start | Action::Reload | Action::ValidateAll);
    if all {
        let version = engine_version(env, params, replicator, limit)?;
        version_in_range(params, version)?;
        peers_fit(env, version, two_promoted)?;
        if let Err(error) = std::fs::File::open(&params.config) {
            return Err(Problem::installed(format!(
                "The configuration file {} cannot be read: {error}.",
                params.config
            )));
        }
    }
    let dual = two_promoted && matches!(action, Action::Start | Action::Promote);
    if !all && !dual {
        return Ok(());
    }
    let configuration =
        replicator.configuration(limit).map_err(|error| configuration_problem(params, &error))?;
    if dual && !configuration.two_primaries {
        return Err(Problem::configured(format!(
            "master-max > 1, but DRBD resource {} does not allow-two-primaries.",
            params.resource
        )));
    }
    Ok(())
}

/// A file that somebody is just editing is told apart from one without the resource: only the latter means
/// that this node cannot serve it.
fn configuration_problem(params: &Parameters, error: &ReplicatorError) -> Problem {
    if error.not_defined() {
        tracing::error!("{error}");
        let (resource, config) = (&params.resource, &params.config);
        let reason = format!("DRBD resource {resource} not found in configuration file {config}.");
        return Problem { drop_score: true, ..Problem::installed(reason) };
    }
    Problem::installed(format!("The configuration file {} cannot be used: {error}", params.config))
}

/// The engine's version, asked for only if something depends on it.
fn engine_version(
    env: &Environment,
    params: &Parameters,
    replicator: &dyn Replicator,
    limit: Duration,
) -> Result<Option<Version>, Problem> {
    let many_peers = meta_number(env, "clone_max").is_some_and(|max| max > 2);
    if replicator.bundled() && params.any_version() && !many_peers {
        return Ok(None);
    }
    let version = replicator.version(limit).map_err(|error| Problem::installed(error.to_string()))?;
    match version {
        None if !replicator.bundled() => Err(Problem::installed("DRBD kernel (module) not available?")),
        None if !params.any_version() => {
            Err(Problem::installed("The version of the engine is not known, but a certain one is required."))
        }
        version => Ok(version),
    }
}

fn version_limit(name: &str, text: &str) -> Result<(), Problem> {
    if text.is_empty() || Version::parse(text).is_some() {
        return Ok(());
    }
    Err(Problem::configured(format!("{name} must be a version such as 9.2.0, but is \"{text}\".")))
}

fn version_in_range(params: &Parameters, version: Option<Version>) -> Result<(), Problem> {
    let Some(version) = version else { return Ok(()) };
    let too_old = Version::parse(&params.version_ge).is_some_and(|limit| version < limit);
    let too_new = Version::parse(&params.version_lt).is_some_and(|limit| version >= limit);
    if too_old || too_new {
        return Err(Problem::installed(format!(
            "DRBD {version} is not in the required range: at least {}, below {}.",
            params.version_ge, params.version_lt
        )));
    }
    Ok(())
}

/// What the agent can serve: one instance per node, at most two promoted.
fn clone_shape(env: &Environment) -> Result<(), Problem> {
    let exactly_one = |name: &str, text: Option<&str>| match text {
        None => Ok(()),
        Some(found) if found.trim() == "1" => Ok(()),
        Some(found) => Err(misconfigured(name, "= 1", found)),
    };
    exactly_one("clone-node-max", env.meta("clone_node_max"))?;
    exactly_one("promoted-node-max", env.meta_renamed("promoted_node_max", "master_node_max"))?;
    match env.meta_renamed("promoted_max", "master_max") {
        Some(found) if promoted_max(env).is_none_or(|max| max > 2) => {
            Err(misconfigured("promoted-max", "<= 2", found))
        }
        _ => Ok(()),
    }
}

/// The 8.x line and dual-primary operation know two nodes only. Without `clone-max` Pacemaker takes the
/// number of nodes, which is not ours to judge.
fn peers_fit(env: &Environment, version: Option<Version>, two_promoted: bool) -> Result<(), Problem> {
    if !two_promoted && !version.is_some_and(Version::single_peer) {
        return Ok(());
    }
    match env.meta("clone_max") {
        Some(found) if meta_number(env, "clone_max").is_none_or(|max| max > 2) => {
            Err(misconfigured("clone-max", "<= 2", found))
        }
        _ => Ok(()),
    }
}

fn misconfigured(name: &str, expected: &str, found: &str) -> Problem {
    Problem::configured(format!(
        "meta parameter misconfigured, expected {name} {expected}, but found {found}."
    ))
}

fn meta_number(env: &Environment, name: &str) -> Option<u32> {
    env.meta(name)?.trim().parse().ok()
}

fn resource_name(name: &str) -> Result<(), Problem> {
    if name.is_empty() {
        return Err(Problem::configured("The parameter drbd_resource is missing."));
    }
    // A name that looks like an option would be taken for one by the tools.
    if !name_is_plain(name) || name.starts_with('-') {
        return Err(Problem::configured(format!(
            "drbd_resource must be a name without blanks or special characters, but is \"{name}\"."
        )));
    }
    Ok(())
}

/// The allowed characters of names and paths (`spec/ocf-agents.md` §2.1).
fn name_is_plain(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-%+./:=@_".contains(&byte))
}
