//! Device and peer flags (`spec/metadata.md` §5).

use std::fmt;
use std::ops::{BitOr, BitOrAssign};

macro_rules! flag_set {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $flag:ident = $value:expr;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub u32);

        impl $name {
            $($(#[$fdoc])* pub const $flag: Self = Self($value);)*
            /// No flag at all.
            pub const NONE: Self = Self(0);

            /// All bits, known or not, as stored.
            pub const fn bits(self) -> u32 {
                self.0
            }

            /// Whether every bit of `other` is set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Sets (`on`) or clears the bits of `other`; returns whether anything changed.
            pub fn set(&mut self, other: Self, on: bool) -> bool {
                let old = self.0;
                self.0 = if on { old | other.0 } else { old & !other.0 };
                self.0 != old
            }

            /// A copy with the bits of `other` set.
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// A copy with the bits of `other` cleared.
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }
        }

        impl BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                self.with(other)
            }
        }

        impl BitOrAssign for $name {
            fn bitor_assign(&mut self, other: Self) {
                self.0 |= other.0;
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x}"), self.0)?;
                $(if self.contains(Self::$flag) { write!(f, " {}", stringify!($flag))?; })*
                f.write_str(")")
            }
        }
    };
}

flag_set! {
    /// Device flags, u32 at 0x38 of the superblock (`spec/metadata.md` §5.1). Unknown bits are kept.
    DeviceFlags {
        /// Data is from one point in time.
        CONSISTENT = 0x001;
        /// A primary may have written to the backing device: the activity log counts after a crash.
        PRIMARY_IND = 0x002;
        /// v08 only: the replication link was up.
        CONNECTED_IND = 0x004;
        /// v08 only: all bits were about to be set.
        FULL_SYNC = 0x008;
        /// The disk state was Consistent or UpToDate rather than Outdated.
        WAS_UP_TO_DATE = 0x010;
        /// v08 only: the peer's disk was Outdated.
        PEER_OUTDATED = 0x020;
        /// This node was Primary and neither demoted nor detached cleanly.
        CRASHED_PRIMARY = 0x040;
        /// The activity log was applied or is empty: attaching is allowed.
        AL_CLEAN = 0x080;
        /// Activity-log updates are off; the log on disk means nothing.
        AL_DISABLED = 0x100;
        /// Was Primary when quorum was lost.
        PRIMARY_LOST_QUORUM = 0x200;
        /// Had quorum at the last state change; gives the members mask its meaning.
        HAVE_QUORUM = 0x400;
    }
}

impl DeviceFlags {
    /// The bits that v08 keeps for its single peer and v09 keeps per peer.
    pub const V08_PEER_BITS: Self = Self(0x02c);
}

flag_set! {
    /// Flags of one peer slot, v09 (`spec/metadata.md` §5.2). Unknown bits are kept.
    PeerFlags {
        /// The replication link was up.
        CONNECTED = 0x0000_0001;
        /// The peer's disk was Inconsistent or Outdated.
        OUTDATED = 0x0000_0002;
        /// A fencing policy other than dont-care was configured.
        FENCING = 0x0000_0004;
        /// All bits towards this peer are to be set.
        FULL_SYNC = 0x0000_0008;
        /// The peer had a disk at some time.
        DEVICE_SEEN = 0x0000_0010;
        /// This node id has been seen in the cluster.
        NODE_EXISTS = 0x0001_0000;
        /// In memory only: a bitmap slot is assigned. Cleared by [`crate::Superblock::encode`].
        HAVE_BITMAP = 0x8000_0000;
    }
}

impl PeerFlags {
    /// The names the text dump prints, joined by ` | `; unknown bits as `0x<hex>=?`.
    pub fn dump_names(self) -> String {
        const NAMES: [(PeerFlags, &str); 6] = [
            (PeerFlags::CONNECTED, "connected"),
            (PeerFlags::OUTDATED, "<=outdated"),
            (PeerFlags::FENCING, "fencing"),
            (PeerFlags::FULL_SYNC, "full-sync"),
            (PeerFlags::DEVICE_SEEN, "seen"),
            (PeerFlags::NODE_EXISTS, "exists"),
        ];
        let mut rest = self;
        let mut out: Vec<String> = Vec::new();
        for (flag, name) in NAMES {
            if rest.set(flag, false) {
                out.push(name.to_owned());
            }
        }
        if rest.0 != 0 {
            out.push(format!("{:#x}=?", rest.0));
        }
        out.join(" | ")
    }
}
