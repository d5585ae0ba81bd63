//! What the tests of the comparison and of what follows from it compare: two UpToDate Secondaries, self is node 0.
//!
//! For tests only; nothing here may stand for a default of the product.

use super::compare::{Compare, Side};
use super::uuid::UuidSet;
use palisade_wire::enums::{DiskState, Role, WireProtocol};
use palisade_wire::{Features, UuidFlags};

/// Identifiers: the current one, bitmap slots by node, history from the newest.
pub(super) fn set(current: u64, bitmap: &[(usize, u64)], history: &[u64]) -> UuidSet {
    let mut s = UuidSet { current, ..UuidSet::default() };
    for (n, uuid) in bitmap {
        s.bitmap[*n] = *uuid;
    }
    for (slot, uuid) in s.history.iter_mut().zip(history) {
        *slot = *uuid;
    }
    s
}

fn side(node_id: u8, uuids: &UuidSet) -> Side<'_> {
    Side {
        node_id,
        role: Role::Secondary,
        disk: DiskState::UpToDate,
        uuids,
        bits: 1,
        flags: UuidFlags::STABLE,
        missed_end: false,
        quorate: true,
    }
}

pub(super) fn compare<'a>(mine: &'a UuidSet, its: &'a UuidSet) -> Compare<'a> {
    Compare {
        me: side(0, mine),
        peer: side(1, its),
        apv: 124,
        features: Features::ALL,
        protocol: WireProtocol::C,
        resolve_conflicts: true,
        connecting: true,
        changed_since_sent: false,
    }
}
