//! The 32 bit state word (§5.1, `spec/state-machine.md` §1.6).

use std::fmt;

use crate::enums::{DiskState, Role, disk_from_84, disk_to_84};

/// A state word, or a mask or value of a state change request.
///
/// | bits | field | bits | field |
/// |---|---|---|---|
/// | 0..1 | role of the sender | 18 | aftr_isp |
/// | 2..3 | role of the receiver | 19 | peer_isp |
/// | 4..8 | connection or replication state | 20 | user_isp |
/// | 9..12 | disk of the sender | 21 | susp_nod |
/// | 13..16 | disk of the receiver | 22 | susp_fen |
/// | 17 | susp | 23 | quorum |
///
/// Disk states are DRBD 9 numbers; the codec translates P_STATE below APV 110. Words in state
/// change requests are never translated, see [`StateWord::to_84`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct StateWord(pub u32);

macro_rules! flags {
    ($($(#[$meta:meta])* $get:ident $with:ident $mask:ident = $bit:literal,)*) => {
        $(
            $(#[$meta])*
            pub const $mask: u32 = 1 << $bit;

            $(#[$meta])*
            #[must_use]
            pub const fn $get(self) -> bool {
                self.0 & Self::$mask != 0
            }

            $(#[$meta])*
            #[must_use]
            pub const fn $with(self, on: bool) -> Self {
                if on { Self(self.0 | Self::$mask) } else { Self(self.0 & !Self::$mask) }
            }
        )*
    };
}

impl StateWord {
    /// Mask of the sender's role.
    pub const ROLE_MASK: u32 = 0x3;
    /// Mask of the receiver's role.
    pub const PEER_MASK: u32 = 0xc;
    /// Mask of the connection or replication state.
    pub const CONN_MASK: u32 = 0x1f0;
    /// Mask of the sender's disk state.
    pub const DISK_MASK: u32 = 0x1e00;
    /// Mask of the receiver's disk state.
    pub const PDSK_MASK: u32 = 0x1_e000;

    flags! {
        /// I/O is suspended by the user (DRBD 9: also by quorum or UUID).
        susp with_susp SUSP_MASK = 17,
        /// Resync is paused by a dependency.
        aftr_isp with_aftr_isp AFTR_ISP_MASK = 18,
        /// The peer asked for a pause of the resync.
        peer_isp with_peer_isp PEER_ISP_MASK = 19,
        /// The local user asked for a pause of the resync.
        user_isp with_user_isp USER_ISP_MASK = 20,
        /// I/O is suspended: no data accessible.
        susp_nod with_susp_nod SUSP_NOD_MASK = 21,
        /// I/O is suspended: fencing in progress.
        susp_fen with_susp_fen SUSP_FEN_MASK = 22,
        /// The sender has quorum (DRBD 9; set when quorum is off).
        quorum with_quorum QUORUM_MASK = 23,
    }

    const fn field(self, mask: u32) -> u8 {
        ((self.0 & mask) >> mask.trailing_zeros()) as u8
    }

    const fn with_field(self, mask: u32, value: u8) -> Self {
        Self((self.0 & !mask) | (((value as u32) << mask.trailing_zeros()) & mask))
    }

    /// Role of the sender; `None` for the undefined number 3 (a mask word).
    #[must_use]
    pub const fn role(self) -> Option<Role> {
        Role::from_u8(self.field(Self::ROLE_MASK))
    }

    /// Role of the receiver as the sender sees it; `None` for the undefined number 3.
    #[must_use]
    pub const fn peer(self) -> Option<Role> {
        Role::from_u8(self.field(Self::PEER_MASK))
    }

    /// Raw number of the [`crate::ReplState`] if above 9, else of the [`crate::ConnState`].
    #[must_use]
    pub const fn conn(self) -> u8 {
        self.field(Self::CONN_MASK)
    }

    /// Disk state of the sender; `None` for an undefined number (a mask word).
    #[must_use]
    pub const fn disk(self) -> Option<DiskState> {
        DiskState::from_u8(self.field(Self::DISK_MASK))
    }

    /// Disk state of the receiver as the sender sees it; `None` for an undefined number.
    #[must_use]
    pub const fn pdsk(self) -> Option<DiskState> {
        DiskState::from_u8(self.field(Self::PDSK_MASK))
    }

    /// With the sender's role.
    #[must_use]
    pub const fn with_role(self, role: Role) -> Self {
        self.with_field(Self::ROLE_MASK, role as u8)
    }

    /// With the receiver's role.
    #[must_use]
    pub const fn with_peer(self, role: Role) -> Self {
        self.with_field(Self::PEER_MASK, role as u8)
    }

    /// With the connection or replication state; only the low five bits of `number` are used.
    #[must_use]
    pub const fn with_conn(self, number: u8) -> Self {
        self.with_field(Self::CONN_MASK, number)
    }

    /// With the sender's disk state.
    #[must_use]
    pub const fn with_disk(self, disk: DiskState) -> Self {
        self.with_field(Self::DISK_MASK, disk as u8)
    }

    /// With the receiver's disk state.
    #[must_use]
    pub const fn with_pdsk(self, disk: DiskState) -> Self {
        self.with_field(Self::PDSK_MASK, disk as u8)
    }

    /// Both disk fields from DRBD 9 to 8.4 numbers (§1.2). Only meaningful for values, not masks.
    #[must_use]
    pub const fn to_84(self) -> Self {
        self.with_field(Self::DISK_MASK, disk_to_84(self.field(Self::DISK_MASK)))
            .with_field(Self::PDSK_MASK, disk_to_84(self.field(Self::PDSK_MASK)))
    }

    /// Both disk fields from 8.4 to DRBD 9 numbers (§1.2); 15 has no counterpart and stays 15.
    #[must_use]
    pub const fn from_84(self) -> Self {
        const fn convert(number: u8) -> u8 {
            if number == 15 { 15 } else { disk_from_84(number) }
        }
        self.with_field(Self::DISK_MASK, convert(self.field(Self::DISK_MASK)))
            .with_field(Self::PDSK_MASK, convert(self.field(Self::PDSK_MASK)))
    }

    /// Whether every enumerated field holds a defined number, as in a P_STATE of any kernel.
    #[must_use]
    pub const fn is_state(self) -> bool {
        self.role().is_some()
            && self.peer().is_some()
            && self.conn() <= crate::ReplState::Behind as u8
            && self.disk().is_some()
            && self.pdsk().is_some()
    }
}

impl fmt::Debug for StateWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut fields = f.debug_struct("StateWord");
        fields.field("raw", &format_args!("{:#x}", self.0));
        if self.is_state() {
            fields.field("role", &self.role()).field("peer", &self.peer());
            fields.field("conn", &self.conn());
            fields.field("disk", &self.disk()).field("pdsk", &self.pdsk());
        }
        fields.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enums::ReplState;

    #[test]
    fn examples_of_the_specification() {
        // §5.1: mask conn|disk, value Disconnecting and Outdated.
        assert_eq!(StateWord::CONN_MASK | StateWord::DISK_MASK, 8176);
        let value = StateWord::default().with_conn(1).with_disk(DiskState::Outdated);
        assert_eq!(value.0, 3088);
        // §12.2: the P_STATE of a DRBD 9 node in the handshake; §12.1: the same from 8.4.
        let word = StateWord::default()
            .with_role(Role::Secondary)
            .with_conn(8)
            .with_disk(DiskState::UpToDate)
            .with_pdsk(DiskState::DUnknown)
            .with_quorum(true);
        assert_eq!(word.0, 0x0080_f282);
        assert_eq!(word.with_quorum(false).to_84().0, 0x0000_d082);
        assert_eq!(StateWord(0xd082).from_84(), word.with_quorum(false));
    }

    #[test]
    fn fields_do_not_touch_each_other() {
        let full = StateWord(u32::MAX);
        let word = full.with_conn(ReplState::Ahead.as_u8()).with_peer(Role::Unknown);
        assert_eq!(word.conn(), 22);
        assert_eq!(word.peer(), Some(Role::Unknown));
        assert_eq!(word.0 | StateWord::CONN_MASK | StateWord::PEER_MASK, u32::MAX);
        assert_eq!(full.disk(), None);
        assert!(!full.is_state() && StateWord(2).is_state());
        assert!(!full.with_susp(false).susp() && full.with_susp(false).aftr_isp());
    }

    #[test]
    fn old_numbers_survive_a_round_trip() {
        for number in 0..=15u8 {
            let old = StateWord::default()
                .with_field(StateWord::DISK_MASK, number)
                .with_field(StateWord::PDSK_MASK, number);
            if number < 15 {
                assert_eq!(old.from_84().to_84(), old);
            }
        }
    }
}
