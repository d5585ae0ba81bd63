//! The promotion score: one decision table (`spec/ocf-agents.md` §2.4).

use super::facts::{Facts, LocalData};
use super::parameters::Scores;

/// What to do with the score of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreChange {
    /// Set it. Never 0.
    Set(u32),
    /// Take it away: this node is not to be promoted.
    Remove,
    /// Leave it as it is.
    Keep,
}

impl ScoreChange {
    /// A computed value of 0 means to remove the score; values are never negative, which some versions
    /// of Pacemaker answer with a restart.
    const fn set(score: u32) -> Self {
        if score == 0 { Self::Remove } else { Self::Set(score) }
    }
}

/// The table: the first row that fits decides. `peer_primary_removes` is the outcome of the rule of §2.5.
pub const fn decide(facts: &Facts, scores: Scores, peer_primary_removes: bool) -> ScoreChange {
    let Scores { consistent, remote, local, good } = scores;
    if !facts.quorum || peer_primary_removes {
        return ScoreChange::Remove;
    }
    if facts.client {
        return if (facts.primary && facts.some_peer_up_to_date) || facts.all_peers_up_to_date() {
            ScoreChange::set(good.saturating_sub(1))
        } else if facts.some_peer_up_to_date {
            ScoreChange::set(local.saturating_sub(1))
        } else {
            ScoreChange::Remove
        };
    }
    match facts.local {
        LocalData::UpToDate if facts.primary => ScoreChange::set(good),
        LocalData::UpToDate if facts.peer_unknown => ScoreChange::set(local),
        LocalData::UpToDate => ScoreChange::set(good),
        _ if facts.some_peer_up_to_date => ScoreChange::set(remote),
        LocalData::Transitional => ScoreChange::Keep,
        LocalData::Consistent => ScoreChange::set(consistent),
        LocalData::Unusable => ScoreChange::Remove,
    }
}

/// Whether this is the moment to run the unfence handler, if that was asked for: row 7 of the table.
pub const fn may_unfence(facts: &Facts) -> bool {
    facts.quorum
        && facts.primary
        && matches!(facts.local, LocalData::UpToDate)
        && facts.all_peers_up_to_date()
}
