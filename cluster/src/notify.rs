//! Clone notifications (`spec/ocf-agents.md` §1.3).

use crate::ocf::{Environment, is_true};

/// Before or after the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotifyPhase {
    /// The operation is about to be carried out.
    Pre,
    /// The operation was carried out.
    Post,
}

/// The operation that is being announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotifyOperation {
    /// Instances start.
    Start,
    /// Instances stop.
    Stop,
    /// Instances are promoted.
    Promote,
    /// Instances are demoted.
    Demote,
}

/// The notification variables of one call. All lists describe the state **before** the transition,
/// also in a `post` notification.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notification {
    /// `pre` or `post`; absent when this is not a notification.
    pub phase: Option<NotifyPhase>,
    /// What is announced; absent when this is not a notification.
    pub operation: Option<NotifyOperation>,
    /// Whether the clone was configured with `notify=true`.
    pub enabled: bool,
    /// Nodes where an instance starts.
    pub start: Vec<String>,
    /// Nodes where an instance stops.
    pub stop: Vec<String>,
    /// Nodes where an instance is promoted.
    pub promote: Vec<String>,
    /// Nodes where an instance is demoted.
    pub demote: Vec<String>,
    /// Nodes with a promoted instance.
    pub promoted: Vec<String>,
}

impl Notification {
    pub(crate) fn from_environment(env: &Environment) -> Self {
        let phase = match env.meta("notify_type") {
            Some("pre") => Some(NotifyPhase::Pre),
            Some("post") => Some(NotifyPhase::Post),
            _ => None,
        };
        let operation = match env.meta("notify_operation") {
            Some("start") => Some(NotifyOperation::Start),
            Some("stop") => Some(NotifyOperation::Stop),
            Some("promote") => Some(NotifyOperation::Promote),
            Some("demote") => Some(NotifyOperation::Demote),
            _ => None,
        };
        let list = |new: &str, old: &str| names(env.meta_renamed(new, old));
        Self {
            phase,
            operation,
            enabled: env.meta("notify").is_some_and(is_true) || env.meta("notify_start_uname").is_some(),
            start: list("notify_start_uname", "notify_start_uname"),
            stop: list("notify_stop_uname", "notify_stop_uname"),
            promote: list("notify_promote_uname", "notify_promote_uname"),
            demote: list("notify_demote_uname", "notify_demote_uname"),
            promoted: list("notify_promoted_uname", "notify_master_uname"),
        }
    }

    /// Nodes with a promoted instance once the transition is over: before − demoted − stopped + promoted.
    #[must_use]
    pub fn promoted_after(&self) -> Vec<&str> {
        let gone = |name: &str| contains(&self.demote, name) || contains(&self.stop, name);
        let mut after: Vec<&str> = self.promoted.iter().map(String::as_str).filter(|n| !gone(n)).collect();
        for name in &self.promote {
            if !after.iter().any(|have| have.eq_ignore_ascii_case(name)) {
                after.push(name);
            }
        }
        after
    }
}

/// Whether a node is in a list of nodes; names of nodes are compared without case (`spec/ocf-agents.md` §2.10).
#[must_use]
pub fn contains(list: &[String], name: &str) -> bool {
    list.iter().any(|have| have.eq_ignore_ascii_case(name))
}

fn names(list: Option<&str>) -> Vec<String> {
    list.unwrap_or_default().split_ascii_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notification(vars: &[(&str, &str)]) -> Notification {
        Environment::from_vars(
            vars.iter()
                .map(|(name, value)| (format!("OCF_RESKEY_CRM_meta_notify{name}"), (*value).to_owned())),
        )
        .notification()
    }

    #[test]
    fn post_promote_as_pacemaker_sends_it() {
        let told = notification(&[
            ("", "true"),
            ("_type", "post"),
            ("_operation", "promote"),
            ("_master_uname", " "),
            ("_promoted_uname", " "),
            ("_slave_uname", "alice bob"),
            ("_promote_uname", "alice"),
            ("_start_uname", " "),
        ]);
        assert_eq!((told.phase, told.operation), (Some(NotifyPhase::Post), Some(NotifyOperation::Promote)));
        assert!(told.enabled);
        assert!(told.promoted.is_empty() && told.start.is_empty());
        assert_eq!(told.promoted_after(), ["alice"]);
    }

    #[test]
    fn fail_over_moves_the_role() {
        let told = notification(&[
            ("_master_uname", "Alice"),
            ("_demote_uname", "alice"),
            ("_stop_uname", "alice"),
            ("_promote_uname", "bob"),
        ]);
        assert_eq!(told.promoted, ["Alice"]);
        assert_eq!(told.promoted_after(), ["bob"]);
    }

    #[test]
    fn renamed_list_wins_over_the_old_one() {
        let told = notification(&[("_master_uname", "old"), ("_promoted_uname", "new")]);
        assert_eq!(told.promoted, ["new"]);
    }

    #[test]
    fn lists_without_the_flag_mean_enabled() {
        assert!(notification(&[("_start_uname", " ")]).enabled);
        assert!(!notification(&[("", "false")]).enabled);
        assert!(!notification(&[]).enabled);
    }

    #[test]
    fn outside_a_notification_everything_is_empty() {
        assert_eq!(notification(&[]), Notification::default());
        assert_eq!(notification(&[("_type", "during"), ("_operation", "migrate")]), Notification::default());
    }
}
