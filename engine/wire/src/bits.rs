//! Bit sets of the protocol: features, data flags, UUID flags, two-phase-commit flags.

macro_rules! bits {
    ($(#[$meta:meta])* $name:ident: $repr:ty { $($(#[$fmeta:meta])* $flag:ident = $value:expr,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(pub $repr);

        impl $name {
            /// No bit set.
            pub const NONE: Self = Self(0);
            $($(#[$fmeta])* pub const $flag: Self = Self($value);)*

            /// Whether all bits of `other` are set.
            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// `self` with the bits of `other` set or cleared.
            #[must_use]
            pub const fn with(self, other: Self, on: bool) -> Self {
                if on { Self(self.0 | other.0) } else { Self(self.0 & !other.0) }
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }

        impl std::ops::BitOrAssign for $name {
            fn bitor_assign(&mut self, other: Self) {
                self.0 |= other.0;
            }
        }

        impl std::ops::BitAnd for $name {
            type Output = Self;
            fn bitand(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let mut rest = self.0;
                let mut separator = "";
                write!(f, concat!(stringify!($name), "("))?;
                $(if rest & $value == $value {
                    write!(f, concat!("{}", stringify!($flag)), separator)?;
                    rest &= !$value;
                    separator = "|";
                })*
                if rest != 0 || self.0 == 0 {
                    write!(f, "{separator}{rest:#x}")?;
                }
                write!(f, ")")
            }
        }
    };
}
pub(crate) use bits;

bits! {
    /// Feature flags of P_CONNECTION_FEATURES (§4.2); agreed = AND of both sides.
    Features: u32 {
        /// P_TRIM may be used.
        TRIM = 1,
        /// P_RS_THIN_REQ and P_RS_DEALLOCATED may be used.
        THIN_RESYNC = 2,
        /// P_SIZES carries the limits trailer; batch requests up to 128 MiB.
        WSAME = 4,
        /// P_ZEROES may be used; P_TRIM need not zero.
        WZEROES = 8,
        /// Resync and verify requests carry a dagtag dependency.
        RESYNC_DAGTAG = 16,
        /// New layout of the two-phase-commit request.
        TWOPC_V2 = 32,
        /// A diskful node sends its new current UUID to diskless peers when the initial resync is skipped.
        RS_SKIP_UUID = 64,
        /// P_ENABLE_REPLICATION(_NEXT) may be used.
        RESYNC_WITHOUT_REPLICATION = 128,
        /// P_SIZES carries the bitmap granularity.
        BM_BLOCK_SHIFT = 256,
        /// P_PEER_DAGTAG may precede the handshake packets.
        RECONCILE_RECONNECT = 512,
    }
}

impl Features {
    /// What 8.4.11 offers (§4.2).
    pub const V84: Self = Self(15);
    /// What 9.2.18 offers (§4.2).
    pub const V9_2_18: Self = Self(127);
    /// What 9.2.19 and 9.3.3 add of what the engine speaks: [`Features::RECONCILE_RECONNECT`].
    pub const V9_2_19: Self = Self(127 | 512);
    /// Everything the specification describes (9.3.3, §4.2).
    pub const ALL: Self = Self(1023);
}

bits! {
    /// dp_flags of data packets (§6.1).
    DpFlags: u32 {
        /// Obsolete, ignored.
        HARDBARRIER = 1,
        /// Hint: synchronous write.
        RW_SYNC = 2,
        /// The receiver may clear bits and answer with an "in sync" ack.
        MAY_SET_IN_SYNC = 4,
        /// Obsolete hint.
        UNPLUG = 8,
        /// Write through to stable storage before the write ack.
        FUA = 16,
        /// Flush the volatile cache before this write.
        FLUSH = 32,
        /// Discard.
        DISCARD = 64,
        /// Answer with P_RECV_ACK (protocol B).
        SEND_RECEIVE_ACK = 128,
        /// Answer with P_WRITE_ACK (protocol C, or while MAY_SET_IN_SYNC).
        SEND_WRITE_ACK = 256,
        /// Set on P_WSAME.
        WSAME = 512,
        /// Write zeroes.
        ZEROES = 1024,
    }
}

bits! {
    /// Flags of P_UUIDS (bits 0 to 3) and P_UUIDS110 (§4.9).
    UuidFlags: u64 {
        /// The sender wants to be sync target.
        DISCARD_MY_DATA = 1,
        /// The sender crashed as primary.
        CRASHED_PRIMARY = 1 << 1,
        /// The disk is Inconsistent.
        INCONSISTENT = 1 << 2,
        /// Adopt this UUID and become UpToDate without a resync.
        SKIP_INITIAL_SYNC = 1 << 3,
        /// A primary created a new current UUID.
        NEW_DATAGEN = 1 << 4,
        /// The sender is primary or has no primary neighbour.
        STABLE = 1 << 5,
        /// The sender became stable.
        GOT_STABLE = 1 << 6,
        /// The receiver must compare UUIDs now.
        RESYNC = 1 << 7,
        /// The sender saw this peer before.
        RECONNECT = 1 << 8,
        /// With RESYNC: the reason is a diskless primary.
        DISKLESS_PRIMARY = 1 << 9,
        /// The sender was primary when it lost quorum.
        PRIMARY_LOST_QUORUM = 1 << 10,
        /// The sender is sync target of another node.
        SYNC_TARGET = 1 << 11,
        /// Bits 56 to 63 hold the node id of an unallocated bitmap slot.
        HAS_UNALLOC = 1 << 12,
    }
}

impl UuidFlags {
    /// The node id of the advertised unallocated slot, if [`Self::HAS_UNALLOC`] is set (§4.9).
    #[must_use]
    pub const fn unallocated_slot(self) -> Option<u8> {
        if self.contains(Self::HAS_UNALLOC) { Some((self.0 >> 56) as u8) } else { None }
    }

    /// `self` with an unallocated slot for `node_id` advertised.
    #[must_use]
    pub const fn with_unallocated_slot(self, node_id: u8) -> Self {
        Self((self.0 & (u64::MAX >> 8)) | Self::HAS_UNALLOC.0 | ((node_id as u64) << 56))
    }
}

bits! {
    /// Flags of a two-phase-commit request, `ff:2PC_V2` only (§5.4).
    TwopcFlags: u32 {
        /// Always set by senders.
        HAS_FLAGS = 0x8000_0000,
        /// The COMMIT carries reachable_nodes; set in every state change request.
        HAS_REACHABLE = 0x4000_0000,
        /// COMMIT: there are primaries but none has access to data.
        PRI_INCAPABLE = 0x2000_0000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets() {
        let flags = DpFlags::FUA | DpFlags::FLUSH;
        assert!(flags.contains(DpFlags::FUA) && !flags.contains(DpFlags::DISCARD));
        assert_eq!(flags.with(DpFlags::FUA, false), DpFlags::FLUSH);
        assert_eq!(format!("{:?}", flags | DpFlags(1 << 20)), "DpFlags(FUA|FLUSH|0x100000)");
        assert_eq!(format!("{:?}", Features::NONE), "Features(0x0)");
        assert_eq!(Features::ALL & Features::V84, Features::V84);
    }

    #[test]
    fn unallocated_slot() {
        let flags = UuidFlags::STABLE.with_unallocated_slot(31);
        assert_eq!(flags.0, 0x1f00_0000_0000_1020);
        assert_eq!(flags.unallocated_slot(), Some(31));
        assert_eq!(UuidFlags::STABLE.unallocated_slot(), None);
    }
}
