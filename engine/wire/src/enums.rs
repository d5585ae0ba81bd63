//! Numbers with names that travel on the wire (§1.2, `spec/state-machine.md` §1.1 to §1.5).
//!
//! Order is meaningful: "better" is numerically greater, so the types are `Ord` by value.

use std::fmt;

macro_rules! wire_enum {
    ($(#[$meta:meta])* $name:ident: $repr:ty { $($(#[$vmeta:meta])* $variant:ident = $value:literal $text:literal,)* }) => {
        $(#[$meta])*
        #[repr($repr)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$vmeta])* $variant = $value,)*
        }

        impl $name {
            /// Every value, in ascending order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The value with this number, if there is one.
            #[must_use]
            pub const fn from_u8(number: u8) -> Option<Self> {
                match number {
                    $($value => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The number on the wire.
            #[must_use]
            pub const fn as_u8(self) -> u8 {
                self as u8
            }

            /// The printed name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }
    };
}

wire_enum! {
    /// Role of a node (`spec/state-machine.md` §1.1); two bits in a state word.
    Role: u8 {
        /// Only for a peer that is not connected.
        Unknown = 0 "Unknown",
        /// May write.
        Primary = 1 "Primary",
        /// May not write.
        Secondary = 2 "Secondary",
    }
}

wire_enum! {
    /// Disk state in DRBD 9 numbers (`spec/state-machine.md` §1.2); four bits in a state word.
    DiskState: u8 {
        /// No local backing disk.
        Diskless = 0 "Diskless",
        /// Metadata is being read; transient.
        Attaching = 1 "Attaching",
        /// Removal in progress; transient, unknown to 8.4.
        Detaching = 2 "Detaching",
        /// The backing disk failed; transient.
        Failed = 3 "Failed",
        /// Attached while connected, the handshake is pending.
        Negotiating = 4 "Negotiating",
        /// Mixture of data generations; not usable alone.
        Inconsistent = 5 "Inconsistent",
        /// Consistent but superseded.
        Outdated = 6 "Outdated",
        /// Only for a peer: not known.
        DUnknown = 7 "DUnknown",
        /// Consistent, unknown whether current.
        Consistent = 8 "Consistent",
        /// Current.
        UpToDate = 9 "UpToDate",
    }
}

impl DiskState {
    /// The number sent to a peer below APV 110: Detaching becomes Failed, the rest shifts (§1.2).
    #[must_use]
    pub const fn to_84(self) -> u8 {
        disk_to_84(self as u8)
    }

    /// The state a peer below APV 110 means by `number` (§1.2).
    #[must_use]
    pub const fn from_84(number: u8) -> Option<Self> {
        Self::from_u8(disk_from_84(number))
    }
}

/// DRBD 9 disk number to 8.4 number: one less above 2 (§1.2).
pub(crate) const fn disk_to_84(number: u8) -> u8 {
    if number > 2 { number - 1 } else { number }
}

/// 8.4 disk number to DRBD 9 number: one more from 2 on (§1.2).
pub(crate) const fn disk_from_84(number: u8) -> u8 {
    if number >= 2 { number.saturating_add(1) } else { number }
}

wire_enum! {
    /// State of a connection (`spec/state-machine.md` §1.3).
    ConnState: u8 {
        /// No network activity configured or allowed.
        StandAlone = 0 "StandAlone",
        /// On the way to StandAlone.
        Disconnecting = 1 "Disconnecting",
        /// Before trying to connect again.
        Unconnected = 2 "Unconnected",
        /// Lost: request timeout.
        Timeout = 3 "Timeout",
        /// Lost: socket error.
        BrokenPipe = 4 "BrokenPipe",
        /// Lost: ping timeout or generic failure.
        NetworkFailure = 5 "NetworkFailure",
        /// Lost: invalid packet.
        ProtocolError = 6 "ProtocolError",
        /// The peer announced a graceful disconnect.
        TearDown = 7 "TearDown",
        /// Trying to connect, or handshake unfinished.
        Connecting = 8 "Connecting",
        /// Handshake finished.
        Connected = 9 "Connected",
    }
}

wire_enum! {
    /// Replication state of one volume towards one peer (`spec/state-machine.md` §1.4).
    ReplState: u8 {
        /// Not replicating; the same number as [`ConnState::Connected`].
        Off = 9 "Off",
        /// Replicating, no resync.
        Established = 10 "Established",
        /// Full resync as source is being prepared.
        StartingSyncS = 11 "StartingSyncS",
        /// Full resync as target is being prepared.
        StartingSyncT = 12 "StartingSyncT",
        /// Source side of the bitmap exchange.
        WFBitMapS = 13 "WFBitMapS",
        /// Target side of the bitmap exchange.
        WFBitMapT = 14 "WFBitMapT",
        /// Target waits for P_SYNC_UUID (APV < 110 only).
        WFSyncUUID = 15 "WFSyncUUID",
        /// Source of a running resync.
        SyncSource = 16 "SyncSource",
        /// Target of a running resync.
        SyncTarget = 17 "SyncTarget",
        /// Initiator of an online verify.
        VerifyS = 18 "VerifyS",
        /// The other side of an online verify.
        VerifyT = 19 "VerifyT",
        /// Source of a paused resync.
        PausedSyncS = 20 "PausedSyncS",
        /// Target of a paused resync.
        PausedSyncT = 21 "PausedSyncT",
        /// Congested: marks out of sync instead of replicating.
        Ahead = 22 "Ahead",
        /// The other side of Ahead.
        Behind = 23 "Behind",
    }
}

wire_enum! {
    /// Replication protocol of P_PROTOCOL (§1.2, §9.2).
    WireProtocol: u8 {
        /// Complete when the data was handed to TCP.
        A = 1 "A",
        /// Complete when the peer received the data.
        B = 2 "B",
        /// Complete when the peer wrote the data.
        C = 3 "C",
    }
}

wire_enum! {
    /// After-split-brain policies of P_PROTOCOL (§1.2), named as in the configuration.
    AfterSb: u8 {
        /// No automatic recovery.
        Disconnect = 0 "disconnect",
        /// Keep the older primary's data.
        DiscardYoungerPrimary = 1 "discard-younger-primary",
        /// Keep the younger primary's data.
        DiscardOlderPrimary = 2 "discard-older-primary",
        /// Keep the data of the node that wrote, if only one did.
        DiscardZeroChanges = 3 "discard-zero-changes",
        /// Keep the data of the node that wrote more.
        DiscardLeastChanges = 4 "discard-least-changes",
        /// Discard this node's data; mirrored by the peer.
        DiscardLocal = 5 "discard-local",
        /// Discard the peer's data; mirrored by the peer.
        DiscardRemote = 6 "discard-remote",
        /// Only if both ways to decide agree.
        Consensus = 7 "consensus",
        /// Keep the primary's data.
        DiscardSecondary = 8 "discard-secondary",
        /// Run the pri-lost-after-sb handler.
        CallPriLostAfterSb = 9 "call-pri-lost-after-sb",
        /// As after-sb-0pri, even against a primary.
        ViolentlyAs0p = 10 "violently-as0p",
        /// Try to connect again.
        RetryConnect = 11 "retry-connect",
        /// Decide by disk states.
        AutoDiscard = 12 "auto-discard",
    }
}

impl AfterSb {
    /// The same policy seen from the peer: discard-local and discard-remote swap (§4.5).
    #[must_use]
    pub const fn mirrored(self) -> Self {
        match self {
            Self::DiscardLocal => Self::DiscardRemote,
            Self::DiscardRemote => Self::DiscardLocal,
            other => other,
        }
    }
}

/// Return code of P_STATE_CHG_REPLY and P_CONN_ST_CHG_REPLY; 1 and above is success (§1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StateReply(pub i32);

macro_rules! state_replies {
    ($($(#[$meta:meta])* $name:ident = $value:literal,)*) => {
        impl StateReply {
            $($(#[$meta])* pub const $name: Self = Self($value);)*

            /// The code's name in the specification; `None` for a number it does not list.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

state_replies! {
    /// The cluster wide change was not needed.
    CW_NO_NEED = 4,
    /// The cluster wide change succeeded.
    CW_SUCCESS = 3,
    /// The state is as requested already.
    NOTHING_TO_DO = 2,
    /// The change was made.
    SUCCESS = 1,
    /// Refused for an unnamed reason.
    UNKNOWN_ERROR = 0,
    /// Two primaries are not allowed.
    TWO_PRIMARIES = -1,
    /// There is no UpToDate disk.
    NO_UP_TO_DATE_DISK = -2,
    /// There is no local disk.
    NO_LOCAL_DISK = -4,
    /// The peer has no disk.
    NO_REMOTE_DISK = -5,
    /// A connected node would become Outdated.
    CONNECTED_OUTDATES = -6,
    /// A primary may not do this.
    PRIMARY_NOP = -7,
    /// A resync is running.
    RESYNC_RUNNING = -8,
    /// The connection is StandAlone already.
    ALREADY_STANDALONE = -9,
    /// The peer refused the cluster wide change.
    CW_FAILED_BY_PEER = -10,
    /// The device is diskless.
    IS_DISKLESS = -11,
    /// The device is open.
    DEVICE_IN_USE = -12,
    /// The network is not configured.
    NO_NET_CONFIG = -13,
    /// No verify-alg is configured.
    NO_VERIFY_ALG = -14,
    /// A connection is needed.
    NEED_CONNECTION = -15,
    /// The disk is below Outdated.
    LOWER_THAN_OUTDATED = -16,
    /// Not supported by the peer.
    NOT_SUPPORTED = -17,
    /// A transient state forbids the change for now.
    IN_TRANSIENT_STATE = -18,
    /// Another state change is in progress.
    CONCURRENT_ST_CHG = -19,
    /// The peer is primary on another volume.
    O_VOL_PEER_PRI = -20,
    /// The change was interrupted.
    INTERRUPTED = -21,
    /// A read-only opener prevents the change.
    PRIMARY_READER = -22,
    /// The change timed out.
    TIMEOUT = -23,
    /// The node is only weakly connected.
    WEAKLY_CONNECTED = -24,
    /// There is no quorum.
    NO_QUORUM = -25,
    /// The attached disk has no bitmap for a peer.
    ATTACH_NO_BITMAP = -26,
    /// The handshake decided to disconnect.
    HANDSHAKE_DISCONNECT = -27,
    /// The handshake is to be tried again.
    HANDSHAKE_RETRY = -28,
}

impl StateReply {
    /// Whether the peer agreed.
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.0 >= 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_numbers_shift_for_8_4() {
        // Columns of the table in §1.2.
        let table = [0, 1, 2, 2, 3, 4, 5, 6, 7, 8];
        for (disk, expected) in DiskState::ALL.iter().zip(table) {
            assert_eq!(disk.to_84(), expected, "{disk}");
        }
        assert_eq!(DiskState::from_84(2), Some(DiskState::Failed));
        assert_eq!(DiskState::from_84(8), Some(DiskState::UpToDate));
        assert_eq!(DiskState::from_84(9), None);
    }

    #[test]
    fn numbers_and_names() {
        assert_eq!(ReplState::from_u8(8), None);
        assert_eq!(ReplState::from_u8(23), Some(ReplState::Behind));
        assert_eq!(ConnState::Connected.as_u8(), ReplState::Off.as_u8());
        assert!(DiskState::UpToDate > DiskState::Consistent);
        assert_eq!(format!("{:>9}", Role::Primary), "  Primary");
        assert_eq!(AfterSb::DiscardLocal.mirrored(), AfterSb::DiscardRemote);
        assert_eq!(AfterSb::Consensus.mirrored(), AfterSb::Consensus);
        assert_eq!(StateReply(-19).name(), Some("CONCURRENT_ST_CHG"));
        assert_eq!(StateReply(-3).name(), None);
        assert!(StateReply::SUCCESS.is_success() && !StateReply::UNKNOWN_ERROR.is_success());
    }
}
