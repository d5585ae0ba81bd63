//! The parameters of the agent: one table that the meta-data are printed from and the values are read
//! with (`spec/ocf-agents.md` §2.1).

use std::time::Duration;

use palisade_cluster::Environment;
use palisade_cluster::ocf::is_true;

/// Type of a parameter in the meta-data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    String,
    /// A decimal number.
    Integer,
    /// A truth value (`spec/ocf-agents.md` §1.9).
    Boolean,
}

impl Kind {
    /// The word of the meta-data.
    pub const fn word(self) -> &'static str {
        match self {
            Self::String => "string",
            Self::Integer => "integer",
            Self::Boolean => "boolean",
        }
    }
}

/// One row of the table.
#[derive(Debug)]
pub struct Definition {
    /// Name, without `OCF_RESKEY_`.
    pub name: &'static str,
    /// Type.
    pub kind: Kind,
    /// Value when Pacemaker gives none; `None` for a parameter that must be given.
    pub default: Option<&'static str>,
    /// Whether no two resources may have the same value.
    pub unique: bool,
    /// One line.
    pub short: &'static str,
    /// Everything.
    pub long: &'static str,
}

const fn optional(
    name: &'static str,
    kind: Kind,
    default: &'static str,
    short: &'static str,
    long: &'static str,
) -> Definition {
    Definition { name, kind, default: Some(default), unique: false, short, long }
}

/// Scores when `adjust_master_score` is not given or not usable.
pub const SCORES_DEFAULT: Scores = Scores { consistent: 0, remote: 10, local: 1000, good: 10_000 };

const RESOURCE: Definition = Definition {
    name: "drbd_resource",
    kind: Kind::String,
    default: None,
    unique: true,
    short: "Name of the DRBD resource",
    long: "The name of the resource in the DRBD configuration.",
};
const CONFIG: Definition = optional(
    "drbdconf",
    Kind::String,
    "/etc/drbd.conf",
    "Path of drbd.conf",
    "Full path of the DRBD configuration file.",
);
const SCORES: Definition = optional(
    "adjust_master_score",
    Kind::String,
    "0 10 1000 10000",
    "Promotion scores",
    "Four non-decreasing numbers: the promotion score of a node whose data are (1) only Consistent, \
     (2) not UpToDate here but on a reachable peer, (3) UpToDate here while the state of a peer's disk is not \
     known, (4) UpToDate here and known or promoted. A score of 0 means that the node is not promoted. \
     The distances leave room for location rules in between.",
);
const STOP_OUTDATES: Definition = optional(
    "stop_outdates_secondary",
    Kind::Boolean,
    "false",
    "Outdate a Secondary that is stopped",
    "When an instance is stopped, or loses a peer, while another node stays promoted, mark the local data as \
     Outdated. Useful where the peers of a stopped node cannot tell a clean stop from a failure.",
);
const IGNORE_NOTIFY: Definition = optional(
    "ignore_missing_notifications",
    Kind::Boolean,
    "false",
    "Do not insist on notify=true",
    "Without clone notifications promotion scores are adjusted only by the recurring monitor. This makes the \
     agent accept such a configuration, which may make sense for a single instance.",
);
const WFC_TIMEOUT: Definition = optional(
    "wfc_timeout",
    Kind::Integer,
    "5",
    "Seconds to wait for peers in start",
    "How many seconds the start action waits for the connections to the peers. An empty or non-numeric value \
     means not to wait. A connection that does not come up in time does not fail the start.",
);
const PEER_PRIMARY: Definition = optional(
    "remove_master_score_if_peer_primary",
    Kind::String,
    "false",
    "Remove the score while a peer is Primary",
    "Whether to remove the promotion score while a peer with UpToDate data is Primary: true, false, or \
     'unexpected', that is only if the cluster does not know of a promoted instance there.",
);
const FAIL_EARLY: Definition = optional(
    "fail_promote_early_if_peer_primary",
    Kind::Boolean,
    "false",
    "Fail promotion while a peer is unexpectedly Primary",
    "Let a promotion fail after its first attempt if a peer is Primary although the cluster does not know of a \
     promoted instance there. Otherwise it is retried until the operation's timeout.",
);
const UNFENCE: Definition = optional(
    "unfence_if_all_uptodate",
    Kind::Boolean,
    "false",
    "Unfence when all peers are UpToDate",
    "Run the unfence-peer handler when the promoted instance finds the data of all nodes UpToDate.",
);
const UNFENCE_ARGS: Definition = optional(
    "unfence_extra_args",
    Kind::String,
    "--quiet --flock-required --flock-timeout 0 --unfence-only-if-owner-match",
    "Additional arguments of the unfence handler",
    "Arguments that the unfence handler finds in OCF_RESKEY_unfence_extra_args when it is run because of \
     unfence_if_all_uptodate.",
);
const VERSION_GE: Definition = optional(
    "require_drbd_module_version_ge",
    Kind::String,
    "8.0.0",
    "Oldest accepted DRBD version",
    "The agent refuses to run with a DRBD older than this version (x.y.z). Empty: no limit.",
);
const VERSION_LT: Definition = optional(
    "require_drbd_module_version_lt",
    Kind::String,
    "10.0.0",
    "First DRBD version that is not accepted",
    "The agent refuses to run with this version of DRBD (x.y.z) or a newer one. Empty: no limit.",
);
const CONNECT_LATE: Definition = optional(
    "connect_only_after_promote",
    Kind::Boolean,
    "false",
    "Connect only after promotion",
    "Attach the disks in start, but configure the network only after promotion. Meant for the upper layer of \
     stacked resources only: every promotion then begins a new data generation.",
);

/// All parameters, in the order of the meta-data.
pub const DEFINITIONS: [&Definition; 13] = [
    &RESOURCE,
    &CONFIG,
    &SCORES,
    &STOP_OUTDATES,
    &IGNORE_NOTIFY,
    &WFC_TIMEOUT,
    &PEER_PRIMARY,
    &FAIL_EARLY,
    &UNFENCE,
    &UNFENCE_ARGS,
    &VERSION_GE,
    &VERSION_LT,
    &CONNECT_LATE,
];

/// The four values of `adjust_master_score`, non-decreasing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scores {
    /// C: all local data Consistent.
    pub consistent: u32,
    /// R: only a peer has UpToDate data.
    pub remote: u32,
    /// L: local data UpToDate, a peer's not known.
    pub local: u32,
    /// G: local data UpToDate and nothing unknown.
    pub good: u32,
}

/// `remove_master_score_if_peer_primary` (`spec/ocf-agents.md` §2.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerPrimaryRule {
    /// Score as if nobody were Primary.
    Ignore,
    /// Remove the score.
    Remove,
    /// Remove the score if the cluster does not know of the promotion.
    RemoveIfUnexpected,
}

/// A DRBD version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Major, minor, patch.
    pub parts: [u32; 3],
}

impl Version {
    /// Reads `x.y.z`, each part 0..255.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = [0; 3];
        let mut words = text.split('.');
        for part in &mut parts {
            let word = words.next()?;
            let digits = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
            *part = word.parse().ok().filter(|value| digits && *value < 256)?;
        }
        words.next().is_none().then_some(Self { parts })
    }

    /// The version in a version code `0xMMmmpp`; 0 means that there is none.
    pub fn from_code(code: u32) -> Option<Self> {
        (code != 0).then_some(Self { parts: [code >> 16, code >> 8 & 0xff, code & 0xff] })
    }

    /// Whether this is the 8.x line, which knows one peer only.
    pub const fn single_peer(self) -> bool {
        self.parts[0] < 9
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [major, minor, patch] = self.parts;
        write!(f, "{major}.{minor}.{patch}")
    }
}

/// The values for one run. Text that [`super::validate`] has to judge is kept as it came.
#[derive(Debug, Clone)]
pub struct Parameters {
    /// `drbd_resource`; empty if it was not given.
    pub resource: String,
    /// `drbdconf`.
    pub config: String,
    /// `adjust_master_score`.
    pub scores: Scores,
    /// `stop_outdates_secondary`.
    pub stop_outdates_secondary: bool,
    /// `ignore_missing_notifications`.
    pub ignore_missing_notifications: bool,
    /// `wfc_timeout`; `None` means not to wait.
    pub connect_wait: Option<Duration>,
    /// `remove_master_score_if_peer_primary`.
    pub peer_primary: PeerPrimaryRule,
    /// `fail_promote_early_if_peer_primary`.
    pub fail_promote_early: bool,
    /// `unfence_if_all_uptodate`.
    pub unfence: bool,
    /// `unfence_extra_args`.
    pub unfence_extra_args: String,
    /// `require_drbd_module_version_ge`.
    pub version_ge: String,
    /// `require_drbd_module_version_lt`.
    pub version_lt: String,
    /// `connect_only_after_promote`.
    pub connect_only_after_promote: bool,
}

impl Parameters {
    /// Reads all parameters. Scores that cannot be used are reported in the log and replaced by the default.
    pub fn read(env: &Environment) -> Self {
        let text = |definition: &Definition| {
            env.parameter(definition.name).or(definition.default).unwrap_or_default().to_owned()
        };
        let flag = |definition: &Definition| is_true(&text(definition));
        let scores = text(&SCORES);
        let scores = Scores::parse(&scores).unwrap_or_else(|| {
            tracing::error!(
                "adjust_master_score must be four non-decreasing numbers, but is \"{scores}\"; using the default."
            );
            SCORES_DEFAULT
        });
        let peer_primary = match text(&PEER_PRIMARY).as_str() {
            "unexpected" => PeerPrimaryRule::RemoveIfUnexpected,
            other if is_true(other) => PeerPrimaryRule::Remove,
            _ => PeerPrimaryRule::Ignore,
        };
        let wait = text(&WFC_TIMEOUT);
        let digits = wait.bytes().all(|byte| byte.is_ascii_digit());
        Self {
            resource: text(&RESOURCE),
            config: text(&CONFIG),
            scores,
            stop_outdates_secondary: flag(&STOP_OUTDATES),
            ignore_missing_notifications: flag(&IGNORE_NOTIFY),
            connect_wait: wait.parse().ok().filter(|_| digits).map(Duration::from_secs),
            peer_primary,
            fail_promote_early: flag(&FAIL_EARLY),
            unfence: flag(&UNFENCE),
            unfence_extra_args: text(&UNFENCE_ARGS),
            version_ge: text(&VERSION_GE),
            version_lt: text(&VERSION_LT),
            connect_only_after_promote: flag(&CONNECT_LATE),
        }
    }

    /// Whether the accepted versions are those that nothing is outside of.
    pub fn any_version(&self) -> bool {
        let default =
            |text: &str, definition: &Definition| text.is_empty() || Some(text) == definition.default;
        default(&self.version_ge, &VERSION_GE) && default(&self.version_lt, &VERSION_LT)
    }
}

impl Scores {
    /// Reads four non-decreasing decimal numbers.
    fn parse(text: &str) -> Option<Self> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        let number = |position: usize| {
            let word = *words.get(position)?;
            // `parse` alone would take a sign.
            word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok())?
        };
        let scores = Self { consistent: number(0)?, remote: number(1)?, local: number(2)?, good: number(3)? };
        let ordered = scores.consistent <= scores.remote
            && scores.remote <= scores.local
            && scores.local <= scores.good;
        (words.len() == 4 && ordered && scores.good <= SCORE_MAX).then_some(scores)
    }
}

/// Pacemaker's INFINITY; larger scores mean the same.
const SCORE_MAX: u32 = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> Parameters {
        Parameters::read(&Environment::from_vars(
            vars.iter().map(|(name, value)| (format!("OCF_RESKEY_{name}"), (*value).to_owned())),
        ))
    }

    #[test]
    fn defaults() {
        let params = read(&[]);
        assert_eq!(params.resource, "");
        assert_eq!(params.config, "/etc/drbd.conf");
        assert_eq!(params.scores, SCORES_DEFAULT);
        assert_eq!(params.connect_wait, Some(Duration::from_secs(5)));
        assert_eq!(params.peer_primary, PeerPrimaryRule::Ignore);
        assert!(params.any_version());
        assert!(!params.stop_outdates_secondary && !params.ignore_missing_notifications);
        assert!(!params.fail_promote_early && !params.unfence && !params.connect_only_after_promote);
        assert!(params.unfence_extra_args.contains("--unfence-only-if-owner-match"));
    }

    #[test]
    fn default_of_the_table_and_of_the_code_agree() {
        assert_eq!(SCORES.default.and_then(Scores::parse), Some(SCORES_DEFAULT));
    }

    #[test]
    fn every_parameter_is_read() {
        let params = read(&[
            ("drbd_resource", "r0"),
            ("drbdconf", "/etc/other.conf"),
            ("adjust_master_score", "1 2 3 4"),
            ("stop_outdates_secondary", "true"),
            ("ignore_missing_notifications", "yes"),
            ("wfc_timeout", "17"),
            ("remove_master_score_if_peer_primary", "unexpected"),
            ("fail_promote_early_if_peer_primary", "1"),
            ("unfence_if_all_uptodate", "on"),
            ("unfence_extra_args", "--quiet"),
            ("require_drbd_module_version_ge", "9.0.0"),
            ("require_drbd_module_version_lt", "9.3.0"),
            ("connect_only_after_promote", "true"),
        ]);
        assert_eq!((params.resource.as_str(), params.config.as_str()), ("r0", "/etc/other.conf"));
        assert_eq!(params.scores, Scores { consistent: 1, remote: 2, local: 3, good: 4 });
        assert!(params.stop_outdates_secondary && params.ignore_missing_notifications);
        assert_eq!(params.connect_wait, Some(Duration::from_secs(17)));
        assert_eq!(params.peer_primary, PeerPrimaryRule::RemoveIfUnexpected);
        assert!(params.fail_promote_early && params.unfence && params.connect_only_after_promote);
        assert_eq!(params.unfence_extra_args, "--quiet");
        assert!(!params.any_version());
    }

    #[test]
    fn unusable_scores_become_the_default() {
        for bad in
            ["", "1 2 3", "1 2 3 4 5", "4 3 2 1", "a b c d", "-1 2 3 4", "1 2 3 +4", "0 0 0 9999999999"]
        {
            assert_eq!(read(&[("adjust_master_score", bad)]).scores, SCORES_DEFAULT, "{bad:?}");
        }
        let flat = read(&[("adjust_master_score", "5  5 5\t5")]).scores;
        assert_eq!(flat, Scores { consistent: 5, remote: 5, local: 5, good: 5 });
    }

    #[test]
    fn an_empty_or_odd_wait_is_none() {
        for none in ["", "no", "-1", "+3", "5s"] {
            assert_eq!(read(&[("wfc_timeout", none)]).connect_wait, None, "{none:?}");
        }
        assert_eq!(read(&[("wfc_timeout", "0")]).connect_wait, Some(Duration::ZERO));
    }

    #[test]
    fn versions() {
        assert_eq!(Version::parse("9.2.18").unwrap().to_string(), "9.2.18");
        assert_eq!(Version::from_code(0x09_02_12).unwrap().to_string(), "9.2.18");
        assert_eq!(Version::from_code(0), None);
        assert!(Version::parse("8.4.11").unwrap().single_peer());
        assert!(Version::parse("10.0.0") > Version::parse("9.3.0"));
        for bad in ["", "9", "9.2", "9.2.", "9.2.1.0", "9.2.x", "9.+2.1", "9.2.256", "9.2.1-rc1"] {
            assert_eq!(Version::parse(bad), None, "{bad:?}");
        }
    }
}
