//! The state names of the field, with the reference's spelling (`spec/netlink.md` §6).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A word that is no state of the kind asked for.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{word}' is not a {kind}")]
pub struct UnknownState {
    /// What was expected, for example `disk state`.
    pub kind: &'static str,
    /// What was found.
    pub word: String,
}

macro_rules! states {
    ($(#[$doc:meta])* $name:ident, $kind:literal, { $($(#[$vdoc:meta])* $variant:ident = $value:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[repr(u8)]
        pub enum $name {
            $($(#[$vdoc])* $variant = $value,)+
        }

        impl $name {
            /// Every value, in numeric order.
            pub const ALL: &'static [$name] = &[$($name::$variant,)+];

            /// The reference's spelling.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => stringify!($variant),)+ }
            }

            /// The number used on the netlink interface (`spec/netlink.md` §6).
            #[must_use]
            pub const fn number(self) -> u8 { self as u8 }

            /// The state with that netlink number.
            #[must_use]
            pub fn from_number(number: u8) -> Option<Self> {
                Self::ALL.iter().copied().find(|s| s.number() == number)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.pad(self.as_str()) }
        }

        impl FromStr for $name {
            type Err = UnknownState;
            fn from_str(word: &str) -> Result<Self, UnknownState> {
                Self::ALL
                    .iter()
                    .copied()
                    .find(|s| s.as_str() == word)
                    .ok_or_else(|| UnknownState { kind: $kind, word: word.to_owned() })
            }
        }
    };
}

states!(
    /// Role of a node for a resource.
    Role, "role", {
        /// Not known (a peer that is not connected).
        Unknown = 0,
        /// May be opened for writing.
        Primary = 1,
        /// Replicates only.
        Secondary = 2,
    }
);

states!(
    /// State of a disk, one's own or a peer's. The order is meaningful: better data is greater.
    DiskState, "disk state", {
        /// No disk attached.
        Diskless = 0,
        /// Reading the metadata.
        Attaching = 1,
        /// Being detached.
        Detaching = 2,
        /// Failed with an I/O error, detaching follows.
        Failed = 3,
        /// Attached; the peers decide what the data is worth.
        Negotiating = 4,
        /// Data is a mix of generations.
        Inconsistent = 5,
        /// Consistent, but known to be older than another copy.
        Outdated = 6,
        /// Not known (a peer that is not connected).
        DUnknown = 7,
        /// Consistent; whether it is current is not known.
        Consistent = 8,
        /// Current.
        UpToDate = 9,
    }
);

states!(
    /// State of a connection.
    ConnectionState, "connection state", {
        /// Not configured to connect.
        StandAlone = 0,
        /// Going to StandAlone.
        Disconnecting = 1,
        /// Between two attempts.
        Unconnected = 2,
        /// Lost: the peer did not answer in time.
        Timeout = 3,
        /// Lost: sending failed.
        BrokenPipe = 4,
        /// Lost: the network failed.
        NetworkFailure = 5,
        /// Lost: the peer said something that cannot be understood.
        ProtocolError = 6,
        /// Lost: the peer said goodbye.
        TearDown = 7,
        /// Trying to reach the peer.
        Connecting = 8,
        /// Connected.
        Connected = 9,
    }
);

states!(
    /// State of the replication of one volume with one peer.
    ReplicationState, "replication state", {
        /// Not replicating.
        Off = 9,
        /// Replicating.
        Established = 10,
        /// Starting a full sync as source.
        StartingSyncS = 11,
        /// Starting a full sync as target.
        StartingSyncT = 12,
        /// Waiting for the bitmap exchange, as source.
        WFBitMapS = 13,
        /// Waiting for the bitmap exchange, as target.
        WFBitMapT = 14,
        /// Waiting for the source's identifiers.
        WFSyncUUID = 15,
        /// Sending a resync.
        SyncSource = 16,
        /// Receiving a resync.
        SyncTarget = 17,
        /// Verifying, this side asks.
        VerifyS = 18,
        /// Verifying, this side answers.
        VerifyT = 19,
        /// Resync as source is paused.
        PausedSyncS = 20,
        /// Resync as target is paused.
        PausedSyncT = 21,
        /// Stopped replicating because of congestion, source side.
        Ahead = 22,
        /// Stopped replicating because of congestion, target side.
        Behind = 23,
    }
);

impl ReplicationState {
    /// Whether a resync or verify runs or is paused, that is whether `done:` is shown.
    #[must_use]
    pub const fn is_syncing(self) -> bool {
        matches!(
            self,
            Self::SyncSource
                | Self::SyncTarget
                | Self::VerifyS
                | Self::VerifyT
                | Self::PausedSyncS
                | Self::PausedSyncT
        )
    }

    /// Whether an online verify runs.
    #[must_use]
    pub const fn is_verifying(self) -> bool {
        matches!(self, Self::VerifyS | Self::VerifyT)
    }
}

/// How writes are kept in order on the backing device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum WriteOrdering {
    /// No ordering needed or known.
    #[default]
    None,
    /// By waiting for requests.
    Drain,
    /// By cache flushes.
    Flush,
    /// By barriers.
    Barrier,
}

impl WriteOrdering {
    /// The reference's spelling.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Drain => "drain",
            Self::Flush => "flush",
            Self::Barrier => "barrier",
        }
    }
}

impl FromStr for WriteOrdering {
    type Err = UnknownState;
    fn from_str(word: &str) -> Result<Self, UnknownState> {
        [Self::None, Self::Drain, Self::Flush, Self::Barrier]
            .into_iter()
            .find(|w| w.as_str() == word)
            .ok_or_else(|| UnknownState { kind: "write ordering", word: word.to_owned() })
    }
}
