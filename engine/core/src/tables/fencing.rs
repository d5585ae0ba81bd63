//! When the fence-peer handler runs, and what its exit code means.
//!
//! `spec/state-machine.md` §14.3 to §14.5, exit codes §1.5.

use palisade_wire::enums::{ConnState, DiskState, ReplState, Role};

pub use crate::config::Fencing;

/// What the loss of a connection asks for (§14.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct OnPeerLost {
    /// Call fence-peer, asynchronously.
    pub call: bool,
    /// Suspend I/O (susp_fen) until the outcome is known.
    pub suspend: bool,
}

/// A connection was lost; `pdsk` are the peer's disks of all volumes after the loss (§14.3).
pub fn on_peer_lost(policy: Fencing, role: Role, pdsk: &[DiskState]) -> OnPeerLost {
    let concerned = role == Role::Primary && pdsk.iter().any(|disk| *disk >= DiskState::DUnknown);
    OnPeerLost {
        call: concerned && policy >= Fencing::ResourceOnly,
        suspend: concerned && policy == Fencing::ResourceAndStonith,
    }
}

/// The last look before the handler is started (§14.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BeforeCall {
    /// Start it.
    Call,
    /// The peer is back: nothing to fence, and the suspension ends by §14.5.
    Reconnected,
    /// Self has nothing to protect: lift the suspension and call nothing.
    NothingToProtect,
}

/// Whether to call the handler now; `disks` are the own disks of all volumes.
pub fn before_call(cstate: ConnState, disks: &[DiskState], intentionally_diskless: bool) -> BeforeCall {
    let usable = disks.iter().max().is_some_and(|disk| *disk >= DiskState::Consistent);
    match cstate {
        ConnState::Connected => BeforeCall::Reconnected,
        _ if usable || intentionally_diskless => BeforeCall::Call,
        _ => BeforeCall::NothingToProtect,
    }
}

/// How a handler ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandlerExit {
    /// It exited with this status.
    Code(u8),
    /// It was killed, could not be started, or took too long.
    Failed,
}

/// The change of state a fence-peer result asks for (§14.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The disks of this peer become so.
    PeerDisk(DiskState),
    /// The own disks become Outdated.
    OutdateSelf,
    /// Nothing.
    Nothing,
}

/// The meaning of a fence-peer result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceResult {
    /// What to change.
    pub change: Change,
    /// The peer is known not to go on with newer data.
    pub fenced: bool,
    /// With `resource-and-stonith`: I/O stays frozen.
    pub stays_frozen: bool,
    /// To be logged as an error rather than as information.
    pub is_error: bool,
    /// Lines for the log.
    pub log: Vec<String>,
}

/// Interprets the end of a fence-peer handler (§14.4). `disk` is the best own disk.
///
/// If the peer has reconnected meanwhile the result is ignored: ask [`ignored_text`] instead.
pub fn fence_result(exit: HandlerExit, policy: Fencing, disk: DiskState) -> FenceResult {
    let HandlerExit::Code(code) = exit else {
        return broken("fence-peer helper broken, it did not exit".to_owned(), policy);
    };
    let outdated = Change::PeerDisk(DiskState::Outdated);
    let (change, explanation) = match code {
        3 => (Change::PeerDisk(DiskState::Inconsistent), "peer is inconsistent or worse"),
        4 => (outdated, "peer was fenced"),
        5 if disk == DiskState::UpToDate => (outdated, "peer is unreachable, assumed to be dead"),
        5 => (Change::Nothing, "peer unreachable, doing nothing since disk != UpToDate"),
        6 => (Change::OutdateSelf, "peer is active"),
        7 => (outdated, "peer was stonithed"),
        _ => return broken(format!("fence-peer helper broken, returned {code}"), policy),
    };
    let fenced = matches!(change, Change::PeerDisk(_));
    let unexpected = code == 7 && policy != Fencing::ResourceAndStonith;
    let mut log = vec![format!("fence-peer helper returned {code} ({explanation})")];
    if code == 6 {
        log.push("Peer is primary, outdating myself.".to_owned());
    }
    if unexpected {
        log.push("fence-peer() = 7 && fencing != Stonith !!!".to_owned());
    }
    let stays_frozen = !fenced && policy == Fencing::ResourceAndStonith;
    FenceResult { change, fenced, stays_frozen, is_error: unexpected, log }
}

fn broken(text: String, policy: Fencing) -> FenceResult {
    FenceResult {
        change: Change::Nothing,
        fenced: false,
        stays_frozen: policy == Fencing::ResourceAndStonith,
        is_error: true,
        log: vec![text],
    }
}

/// The log text if the peer has reconnected while the handler ran (§14.3, §14.5).
pub fn ignored_text() -> &'static str {
    "Ignoring fence-peer exit code"
}

/// How a suspension for fencing ends (§14.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lift {
    /// Not yet.
    Wait,
    /// Create the pending UUID, then resume; requests waiting for the lost peer are completed as lost.
    NewUuidAndResume,
    /// Drop the pending UUID, resume and send the requests again.
    ResumeAndResend,
}

/// What is known about one lost peer device when the suspension is looked at.
#[derive(Clone, Copy, Debug)]
pub struct LostPeer {
    /// The peer's disk as self believes it.
    pub pdsk: DiskState,
    /// Replication state towards it.
    pub repl: ReplState,
}

/// Whether the suspension ends; `lost` are the peer devices it began with, and `by_user` says that
/// resume-io was given or that the own disk is gone, so that there is nothing left to fence with.
pub fn lift(lost: &[LostPeer], by_user: bool) -> Lift {
    if !lost.is_empty() && lost.iter().all(|peer| peer.repl >= ReplState::Established) {
        return Lift::ResumeAndResend;
    }
    // A peer that is back needs no fencing; the others must be known to be behind.
    let harmless = |peer: &LostPeer| peer.repl >= ReplState::Established || peer.pdsk <= DiskState::Outdated;
    if by_user || lost.iter().all(harmless) { Lift::NewUuidAndResume } else { Lift::Wait }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DiskState::{Consistent, DUnknown, Diskless, Inconsistent, Outdated, UpToDate};
    use Fencing::{DontCare, ResourceAndStonith, ResourceOnly};

    /// The table of §14.3.
    #[test]
    fn peer_lost() {
        let rows = [
            (DontCare, Role::Primary, DUnknown, false, false),
            (ResourceOnly, Role::Primary, DUnknown, true, false),
            (ResourceAndStonith, Role::Primary, DUnknown, true, true),
            (ResourceAndStonith, Role::Secondary, DUnknown, false, false),
            (ResourceAndStonith, Role::Primary, Outdated, false, false),
            (ResourceAndStonith, Role::Primary, Consistent, true, true),
        ];
        for (policy, role, pdsk, call, suspend) in rows {
            let want = OnPeerLost { call, suspend };
            assert_eq!(on_peer_lost(policy, role, &[Outdated, pdsk]), want, "{policy:?} {role} {pdsk}");
        }
        assert_eq!(on_peer_lost(ResourceAndStonith, Role::Primary, &[]), OnPeerLost::default());
    }

    #[test]
    fn before_the_call() {
        let gone = ConnState::NetworkFailure;
        assert_eq!(before_call(gone, &[Inconsistent, Consistent], false), BeforeCall::Call);
        assert_eq!(before_call(gone, &[Inconsistent], false), BeforeCall::NothingToProtect);
        assert_eq!(before_call(gone, &[Diskless], true), BeforeCall::Call);
        assert_eq!(before_call(gone, &[], false), BeforeCall::NothingToProtect);
        assert_eq!(before_call(ConnState::Connecting, &[UpToDate], false), BeforeCall::Call);
        assert_eq!(before_call(ConnState::Connected, &[UpToDate], false), BeforeCall::Reconnected);
    }

    /// The table of §14.4.
    #[test]
    fn exit_codes() {
        let stonith = ResourceAndStonith;
        let rows = [
            (3, ResourceOnly, UpToDate, Change::PeerDisk(Inconsistent), true, false, false),
            (4, ResourceOnly, Consistent, Change::PeerDisk(Outdated), true, false, false),
            (5, stonith, UpToDate, Change::PeerDisk(Outdated), true, false, false),
            (5, stonith, Consistent, Change::Nothing, false, true, false),
            (6, ResourceOnly, UpToDate, Change::OutdateSelf, false, false, false),
            (6, stonith, UpToDate, Change::OutdateSelf, false, true, false),
            (7, stonith, UpToDate, Change::PeerDisk(Outdated), true, false, false),
            (7, ResourceOnly, UpToDate, Change::PeerDisk(Outdated), true, false, true),
            (0, stonith, UpToDate, Change::Nothing, false, true, true),
            (1, ResourceOnly, UpToDate, Change::Nothing, false, false, true),
            (127, stonith, UpToDate, Change::Nothing, false, true, true),
        ];
        for (code, policy, disk, change, fenced, stays_frozen, is_error) in rows {
            let got = fence_result(HandlerExit::Code(code), policy, disk);
            let flags = (got.change, got.fenced, got.stays_frozen, got.is_error);
            assert_eq!(flags, (change, fenced, stays_frozen, is_error), "{code} {policy:?} {disk}");
        }
        let killed = fence_result(HandlerExit::Failed, stonith, UpToDate);
        assert_eq!((killed.change, killed.stays_frozen), (Change::Nothing, true));
    }

    #[test]
    fn texts() {
        let log = |code| fence_result(HandlerExit::Code(code), ResourceOnly, UpToDate).log;
        assert!(log(4)[0].starts_with("fence-peer helper returned 4 ("));
        assert_eq!(log(6)[1], "Peer is primary, outdating myself.");
        assert_eq!(log(9), ["fence-peer helper broken, returned 9"]);
        assert_eq!(ignored_text(), "Ignoring fence-peer exit code");
    }

    /// The table of §14.5.
    #[test]
    fn lifting() {
        let gone = |pdsk| LostPeer { pdsk, repl: ReplState::Off };
        let back = LostPeer { pdsk: UpToDate, repl: ReplState::Established };
        assert_eq!(lift(&[gone(Outdated), gone(Inconsistent)], false), Lift::NewUuidAndResume);
        assert_eq!(lift(&[gone(Outdated), gone(DUnknown)], false), Lift::Wait);
        assert_eq!(lift(&[back, back], false), Lift::ResumeAndResend);
        assert_eq!(lift(&[back, gone(DUnknown)], false), Lift::Wait);
        assert_eq!(lift(&[back, gone(Outdated)], false), Lift::NewUuidAndResume);
        assert_eq!(lift(&[gone(DUnknown)], true), Lift::NewUuidAndResume);
        assert_eq!(lift(&[], false), Lift::NewUuidAndResume);
    }
}
