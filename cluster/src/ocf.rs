//! The contract between Pacemaker and an agent: exit codes and environment (`spec/ocf-agents.md` §1).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::time::Duration;

use crate::notify::Notification;

/// Result of an agent's action (`spec/ocf-agents.md` §1.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ExitCode {
    /// The action succeeded; for `monitor`: running and not promoted.
    Success = 0,
    /// Failed; Pacemaker may restart or move the resource.
    Generic = 1,
    /// Called with wrong arguments.
    Args = 2,
    /// The agent does not know the action.
    Unimplemented = 3,
    /// Not permitted on this node.
    Permission = 4,
    /// Something this node needs is missing; the resource can run elsewhere.
    Installed = 5,
    /// The resource is configured wrongly; it can run nowhere.
    Configured = 6,
    /// Cleanly stopped; an answer of `monitor`.
    NotRunning = 7,
    /// Running in the promoted role; an answer of `monitor`.
    RunningPromoted = 8,
    /// Failed in the promoted role; an answer of `monitor`.
    FailedPromoted = 9,
}

impl ExitCode {
    /// The number that the process exits with.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.code())
    }
}

/// Operation timeout that Pacemaker uses when none is configured (`spec/ocf-agents.md` §1.2).
pub const OPERATION_TIMEOUT_DEFAULT: Duration = Duration::from_secs(20);

/// What Pacemaker told the agent: a snapshot of the `OCF_*`, `HA_*` and `PCMK_*` variables.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    variables: BTreeMap<String, String>,
}

impl Environment {
    /// Takes the snapshot from this process's environment. Values that are not UTF-8 are kept with
    /// replacement characters, so that a check of allowed characters refuses them.
    #[must_use]
    pub fn from_process() -> Self {
        Self::from_vars(std::env::vars_os())
    }

    /// Takes the snapshot from any list of variables; others than `OCF_*`, `HA_*` and `PCMK_*` are left out.
    pub fn from_vars<I, K, V>(vars: I) -> Self
    where
        I: IntoIterator<Item = (K, V)>,
        K: Into<OsString>,
        V: Into<OsString>,
    {
        let variables = vars
            .into_iter()
            .map(|(name, value)| (text(name.into()), text(value.into())))
            .filter(|(name, _)| ["OCF_", "HA_", "PCMK_"].iter().any(|prefix| name.starts_with(prefix)))
            .collect();
        Self { variables }
    }

    /// A variable by its full name; set to nothing is `Some("")`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str)
    }

    /// Instance parameter `OCF_RESKEY_<name>`.
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.variables.get(&format!("OCF_RESKEY_{name}")).map(String::as_str)
    }

    /// Meta attribute `OCF_RESKEY_CRM_meta_<name>`, dashes written as underscores.
    #[must_use]
    pub fn meta(&self, name: &str) -> Option<&str> {
        self.variables.get(&format!("OCF_RESKEY_CRM_meta_{name}")).map(String::as_str)
    }

    /// A meta attribute that was renamed with the roles: the newer spelling wins (`spec/ocf-agents.md` §1.2).
    #[must_use]
    pub fn meta_renamed(&self, new: &str, old: &str) -> Option<&str> {
        self.meta(new).or_else(|| self.meta(old))
    }

    /// Name of the resource instance, `default` outside the cluster.
    #[must_use]
    pub fn instance(&self) -> &str {
        self.get("OCF_RESOURCE_INSTANCE").filter(|name| !name.is_empty()).unwrap_or("default")
    }

    /// Interval of a recurring monitor; zero for everything else, where Pacemaker leaves it out.
    #[must_use]
    pub fn interval(&self) -> Duration {
        self.milliseconds("interval").unwrap_or(Duration::ZERO)
    }

    /// True for a monitor that only asks whether the resource happens to run (`spec/ocf-agents.md` §1.9).
    #[must_use]
    pub fn is_probe(&self, action: &str) -> bool {
        action == "monitor" && self.interval().is_zero()
    }

    /// Time after which Pacemaker gives up on this action.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.milliseconds("timeout").filter(|limit| !limit.is_zero()).unwrap_or(OPERATION_TIMEOUT_DEFAULT)
    }

    /// Name of this node in the cluster, if Pacemaker gave it.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        self.meta("on_node").filter(|name| !name.is_empty())
    }

    /// The notification variables (`spec/ocf-agents.md` §1.3).
    #[must_use]
    pub fn notification(&self) -> Notification {
        Notification::from_environment(self)
    }

    fn milliseconds(&self, name: &str) -> Option<Duration> {
        self.meta(name)?.trim().parse().ok().map(Duration::from_millis)
    }
}

fn text(value: OsString) -> String {
    value.into_string().unwrap_or_else(|raw| raw.to_string_lossy().into_owned())
}

/// The meaning that resource agents give to a boolean parameter's text (`spec/ocf-agents.md` §1.9):
/// a fixed list is true, everything else false.
#[must_use]
pub fn is_true(text: &str) -> bool {
    matches!(text, "yes" | "true" | "1" | "YES" | "TRUE" | "True" | "ja" | "on" | "ON")
}

/// Reports why an action fails: to the log, and to standard error with the prefix that makes
/// Pacemaker show it in `crm_mon` (`spec/ocf-agents.md` §1.1). The last reason of a run is shown.
pub fn exit_reason(environment: &Environment, reason: &str) {
    tracing::error!("{reason}");
    let prefix = environment.get("OCF_EXIT_REASON_PREFIX").unwrap_or("ocf-exit-reason:");
    let line = format!("{prefix}{}\n", reason.replace('\n', " "));
    // A caller that closed our standard error must not turn a reason into a different failure.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(vars: &[(&str, &str)]) -> Environment {
        Environment::from_vars(vars.iter().copied())
    }

    #[test]
    fn exit_codes_are_those_of_the_contract() {
        let all = [
            (ExitCode::Success, 0),
            (ExitCode::Generic, 1),
            (ExitCode::Args, 2),
            (ExitCode::Unimplemented, 3),
            (ExitCode::Permission, 4),
            (ExitCode::Installed, 5),
            (ExitCode::Configured, 6),
            (ExitCode::NotRunning, 7),
            (ExitCode::RunningPromoted, 8),
            (ExitCode::FailedPromoted, 9),
        ];
        for (code, number) in all {
            assert_eq!(code.code(), number);
        }
    }

    #[test]
    fn absent_variables_have_pacemakers_defaults() {
        let env = environment(&[]);
        assert_eq!(env.instance(), "default");
        assert_eq!(env.interval(), Duration::ZERO);
        assert_eq!(env.timeout(), Duration::from_secs(20));
        assert_eq!(env.node(), None);
        assert!(env.is_probe("monitor"));
        assert!(!env.is_probe("start"));
    }

    #[test]
    fn nonsense_numbers_fall_back() {
        for bad in ["", "x", "-1", "0", "99999999999999999999999"] {
            let env = environment(&[("OCF_RESKEY_CRM_meta_timeout", bad)]);
            assert_eq!(env.timeout(), Duration::from_secs(20), "{bad:?}");
        }
        let env = environment(&[("OCF_RESKEY_CRM_meta_interval", "10000")]);
        assert!(!env.is_probe("monitor"));
    }

    #[test]
    fn newer_spelling_wins() {
        let old = ("OCF_RESKEY_CRM_meta_master_max", "1");
        let new = ("OCF_RESKEY_CRM_meta_promoted_max", "2");
        assert_eq!(environment(&[old]).meta_renamed("promoted_max", "master_max"), Some("1"));
        assert_eq!(environment(&[old, new]).meta_renamed("promoted_max", "master_max"), Some("2"));
    }

    #[test]
    fn foreign_variables_are_left_out() {
        let env = environment(&[("PATH", "/bin"), ("OCF_ROOT", "/x"), ("HA_debug", "1")]);
        assert_eq!(env.get("PATH"), None);
        assert_eq!(env.get("OCF_ROOT"), Some("/x"));
        assert_eq!(env.get("HA_debug"), Some("1"));
    }

    #[test]
    fn truth_is_a_fixed_list() {
        for yes in ["yes", "true", "1", "YES", "TRUE", "True", "ja", "on", "ON"] {
            assert!(is_true(yes), "{yes}");
        }
        for no in ["", "no", "Yes", "On", "2", "false", " yes"] {
            assert!(!is_true(no), "{no}");
        }
    }
}
