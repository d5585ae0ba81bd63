//! The names of what a handshake can result in: strategies and the rules that choose them.
//!
//! `spec/state-machine.md` §9.1 to §9.3 and §9.5; the printed names are what kernel DRBD 9.2 logs, which leaves
//! out the `sync-` in front of `source` and `target`.

use std::fmt;

/// The result of the comparison; the names are the logged ones (§9.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// Nothing to do.
    NoSync,
    /// Source, but only if no Primary kept running.
    SyncSourceIfBothFailed,
    /// Target, but only if no Primary kept running.
    SyncTargetIfBothFailed,
    /// Source, with the bits set on both sides.
    SyncSourceUseBitmap,
    /// Target, with the bits set on both sides.
    SyncTargetUseBitmap,
    /// Source of everything.
    SyncSourceSetBitmap,
    /// Target of everything.
    SyncTargetSetBitmap,
    /// Source, with the bitmap of another slot ([`Verdict::copy_from`]).
    SyncSourceCopyBitmap,
    /// Target, own bits cleared first: the source's decide.
    SyncTargetClearBitmap,
    /// Both went on from the same generation.
    SplitBrainAutoRecover,
    /// Both went on, and only the history is common.
    SplitBrainDisconnect,
    /// Nothing in common.
    UnrelatedData,
    /// The handshake has to be repeated.
    Retry,
    /// Cannot be decided below this protocol version.
    RequiresProto(u32),
}

use Strategy::{
    NoSync, RequiresProto, Retry, SplitBrainAutoRecover, SplitBrainDisconnect, SyncSourceCopyBitmap,
    SyncSourceIfBothFailed, SyncSourceSetBitmap, SyncSourceUseBitmap, SyncTargetClearBitmap,
    SyncTargetIfBothFailed, SyncTargetSetBitmap, SyncTargetUseBitmap, UnrelatedData,
};

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NoSync => "no-sync",
            SyncSourceIfBothFailed => "source-if-both-failed",
            SyncTargetIfBothFailed => "target-if-both-failed",
            SyncSourceUseBitmap => "source-use-bitmap",
            SyncTargetUseBitmap => "target-use-bitmap",
            SyncSourceSetBitmap => "source-set-bitmap",
            SyncTargetSetBitmap => "target-set-bitmap",
            SyncSourceCopyBitmap => "source-copy-bitmap",
            SyncTargetClearBitmap => "target-clear-bitmap",
            SplitBrainAutoRecover => "split-brain-auto-recover",
            SplitBrainDisconnect => "split-brain-disconnect",
            UnrelatedData => "unrelated-data",
            Retry => "retry",
            RequiresProto(version) => return write!(f, "requires-proto-{version}"),
        })
    }
}

impl Strategy {
    /// Self is (or may become) source.
    pub fn is_source(self) -> bool {
        matches!(
            self,
            SyncSourceIfBothFailed | SyncSourceUseBitmap | SyncSourceSetBitmap | SyncSourceCopyBitmap
        )
    }

    /// Self is (or may become) target.
    pub fn is_target(self) -> bool {
        matches!(
            self,
            SyncTargetIfBothFailed | SyncTargetUseBitmap | SyncTargetSetBitmap | SyncTargetClearBitmap
        )
    }

    /// It only matters when no Primary kept running.
    pub fn is_if_both_failed(self) -> bool {
        matches!(self, SyncSourceIfBothFailed | SyncTargetIfBothFailed)
    }

    /// Not recovered yet split brain.
    pub fn is_split_brain(self) -> bool {
        matches!(self, SplitBrainAutoRecover | SplitBrainDisconnect)
    }

    /// The same resync the other way round; `None` if this is no resync.
    pub fn inverse(self) -> Option<Self> {
        Some(match self {
            SyncSourceIfBothFailed => SyncTargetIfBothFailed,
            SyncTargetIfBothFailed => SyncSourceIfBothFailed,
            SyncSourceUseBitmap => SyncTargetUseBitmap,
            SyncTargetUseBitmap => SyncSourceUseBitmap,
            SyncSourceSetBitmap => SyncTargetSetBitmap,
            SyncTargetSetBitmap => SyncSourceSetBitmap,
            SyncSourceCopyBitmap => SyncTargetClearBitmap,
            SyncTargetClearBitmap => SyncSourceCopyBitmap,
            NoSync
            | SplitBrainAutoRecover
            | SplitBrainDisconnect
            | UnrelatedData
            | Retry
            | RequiresProto(_) => {
                return None;
            }
        })
    }

    /// The same direction, but everything; `None` if this is no resync.
    pub fn full(self) -> Option<Self> {
        match self {
            _ if self.is_source() => Some(SyncSourceSetBitmap),
            _ if self.is_target() => Some(SyncTargetSetBitmap),
            _ => None,
        }
    }

    /// The preference value of §9.1: the greater, the less has to be transferred.
    pub fn preference(self) -> Option<u8> {
        match self {
            NoSync => Some(5),
            SyncSourceIfBothFailed | SyncTargetIfBothFailed => Some(4),
            SyncSourceUseBitmap | SyncTargetUseBitmap => Some(3),
            SyncSourceSetBitmap | SyncTargetSetBitmap => Some(2),
            SyncSourceCopyBitmap | SyncTargetClearBitmap => Some(1),
            SplitBrainAutoRecover | SplitBrainDisconnect | UnrelatedData | Retry | RequiresProto(_) => None,
        }
    }
}

macro_rules! rules {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Which row decided; the names are the logged ones (§9.2, §9.3, §9.5 step 6).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Rule {
            $($(#[$doc])* $name,)*
        }

        impl fmt::Display for Rule {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$name => $text,)* })
            }
        }
    };
}

rules! {
    /// Own identifiers changed since they were sent.
    InitialHandshakeChanged = "initial-handshake-changed",
    /// Neither ever had data.
    JustCreatedBoth = "just-created-both",
    /// Self never had data.
    JustCreatedSelf = "just-created-self",
    /// The peer never had data.
    JustCreatedPeer = "just-created-peer",
    /// Self was source and missed the end of the resync.
    SyncSourceMissedFinish = "sync-source-missed-finish",
    /// The peer was target and missed the end (below protocol 110).
    SyncSourcePeerMissedFinish = "sync-source-peer-missed-finish",
    /// The peer was source and missed the end of the resync.
    SyncTargetPeerMissedFinish = "sync-target-peer-missed-finish",
    /// Self was target and missed the end (below protocol 110).
    SyncTargetMissedFinish = "sync-target-missed-finish",
    /// Connected before, nothing restarted since.
    Reconnected = "reconnected",
    /// A Primary crashed that may have completed writes the other missed.
    CrashedPrimary = "crashed-primary",
    /// A Primary lost quorum.
    LostQuorum = "lost-quorum",
    /// At least one side was restarted.
    BothOff = "both-off",
    /// The peer has a bitmap for self from own generation on.
    BitmapPeer = "bitmap-peer",
    /// The peer has a bitmap for another node from own generation on.
    BitmapPeerOther = "bitmap-peer-other",
    /// Self was target and missed the start (below protocol 110).
    SyncTargetMissedStart = "sync-target-missed-start",
    /// Self has a bitmap for the peer from its generation on.
    BitmapSelf = "bitmap-self",
    /// Self has a bitmap for another node from the peer's generation on.
    BitmapSelfOther = "bitmap-self-other",
    /// Self was source and missed the start (below protocol 110).
    SyncSourceMissedStart = "sync-source-missed-start",
    /// Own generation is in the peer's history.
    HistoryPeer = "history-peer",
    /// The peer's generation is in the own history.
    HistorySelf = "history-self",
    /// Both branched from the same generation.
    BitmapBoth = "bitmap-both",
    /// Something in both histories is common; also reported when no row matched at all.
    HistoryBoth = "history-both",
    /// A lost Primary's writes: who has bits is source.
    ReconcileBitmap = "reconcile-bitmap",
    /// A lost Primary's writes: who is further in its stream is source.
    ReconcileDagtag = "reconcile-dagtag",
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strategies() {
        let all = [
            NoSync,
            SyncSourceIfBothFailed,
            SyncTargetIfBothFailed,
            SyncSourceUseBitmap,
            SyncTargetUseBitmap,
            SyncSourceSetBitmap,
            SyncTargetSetBitmap,
            SyncSourceCopyBitmap,
            SyncTargetClearBitmap,
            SplitBrainAutoRecover,
            SplitBrainDisconnect,
            UnrelatedData,
            Retry,
            RequiresProto(91),
        ];
        let names = "no-sync source-if-both-failed target-if-both-failed source-use-bitmap \
            target-use-bitmap source-set-bitmap target-set-bitmap source-copy-bitmap \
            target-clear-bitmap split-brain-auto-recover split-brain-disconnect unrelated-data retry \
            requires-proto-91";
        let preferences = [5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0, 0, 0];
        for ((strategy, name), preference) in all.into_iter().zip(names.split_whitespace()).zip(preferences) {
            assert_eq!(strategy.to_string(), name);
            assert_eq!(strategy.preference().unwrap_or(0), preference);
            assert_eq!(strategy.inverse().and_then(Strategy::inverse), strategy.inverse().map(|_| strategy));
            let resync = strategy.is_source() || strategy.is_target();
            assert_eq!((strategy.inverse().is_some(), strategy.full().is_some()), (resync, resync));
            assert_eq!(strategy.is_source(), strategy.inverse().is_some_and(Strategy::is_target));
        }
    }
}
