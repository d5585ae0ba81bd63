//! Learning from a peer's UUID packet that a resync has ended elsewhere, or that its end was missed.
//!
//! Both tables of `spec/state-machine.md` §8.8, as a function from two UUID sets to a list of actions.

use super::node_bit;
use super::uuid::{UuidSet, is_generation, is_just_created, nodes, same};

/// Inputs of [`detect_finished_resyncs`].
#[derive(Clone, Copy, Debug)]
pub struct Detect<'a> {
    /// Agreed protocol version.
    pub apv: u32,
    /// Own node id.
    pub own_id: u8,
    /// Node id of the sender.
    pub sender: u8,
    /// Still handshaking: repl is Off.
    pub handshaking: bool,
    /// Own identifiers.
    pub mine: &'a UuidSet,
    /// The sender's, as in the packet.
    pub theirs: &'a UuidSet,
    /// One side flags SYNC_TARGET.
    pub sync_target_flag: bool,
    /// Own bitmap UUID for the sender as last sent to it.
    pub my_slot_sent: u64,
    /// Bits are set on at least one side.
    pub any_bits: bool,
    /// Mask of node ids that have a slot here or are known to exist.
    pub known: u64,
    /// Mask of node ids self is just synchronising with.
    pub syncing_with: u64,
}

/// One thing to do because a resync has ended (§8.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishedAction {
    /// Remember that the sender was source and missed the end: rule b of §9.3.
    MarkPeerMissedEnd,
    /// Remember that self was source and missed the end: rule a of §9.3.
    MarkSelfMissedEnd,
    /// Log that a missed end without bits needs nothing.
    LogMissedEnd,
    /// [`UuidSet::clear_slot`] for this node.
    ClearSlot(u8),
    /// Clear all bits of this node's bitmap.
    ClearBits(u8),
    /// Copy the bitmap of one node to another, and [`UuidSet::copy_slot`].
    CopySlot {
        /// Has the right bitmap.
        from: u8,
        /// Gets it.
        to: u8,
    },
}

/// Who has to get the own UUIDs after the actions (§8.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Announce {
    /// Nobody: nothing changed.
    #[default]
    Nobody,
    /// Everybody but the sender of the packet.
    AllButSender,
    /// Everybody.
    All,
}

/// What a UUID packet tells about resyncs that ended elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Detected {
    /// In order. Write the bitmap, with application writes held back, before announcing.
    pub actions: Vec<FinishedAction>,
    /// Who to tell.
    pub announce: Announce,
}

/// Draws the conclusions from a UUID packet (§8.8, both tables).
///
/// The reference additionally copies a bitmap between two own slots which the peer reports as equal. That
/// report does not prove that both nodes have the same data (a target sets the slots of all older nodes to
/// one value when its resync ends), so it is left out: the price is a larger resync, never a missed block.
pub fn detect_finished_resyncs(input: &Detect<'_>) -> Detected {
    let equal = same(input.mine.current, input.theirs.current)
        && !is_just_created(input.mine.current)
        && !input.sync_target_flag;
    match (input.handshaking, equal) {
        (true, true) => missed_ends(input),
        (true, false) => Detected::default(),
        (false, _) => ends_elsewhere(input, equal),
    }
}

fn missed_ends(input: &Detect<'_>) -> Detected {
    use FinishedAction::{ClearSlot, LogMissedEnd, MarkPeerMissedEnd, MarkSelfMissedEnd};
    let (mine, its) = (input.my_slot_sent, input.theirs.slot(input.own_id));
    let older = |slot: u64| is_generation(slot) && !same(slot, input.mine.current);
    let legacy = input.apv < 124;
    let actions = match (older(its) && same(mine, 0), same(its, 0) && older(mine)) {
        (true, _) if input.any_bits => vec![MarkPeerMissedEnd],
        (true, _) if legacy => vec![LogMissedEnd, MarkPeerMissedEnd],
        (true, _) => vec![LogMissedEnd],
        (_, true) if input.any_bits => vec![MarkSelfMissedEnd],
        (_, true) if legacy => vec![ClearSlot(input.sender), MarkSelfMissedEnd],
        (_, true) => vec![ClearSlot(input.sender)],
        (false, false) => vec![],
    };
    Detected { announce: announce(&actions), actions }
}

fn ends_elsewhere(input: &Detect<'_>, equal: bool) -> Detected {
    let mut actions = vec![];
    for node in nodes(input.known & !input.syncing_with & !node_bit(input.own_id)) {
        let its = input.theirs.slot(if node == input.sender { input.own_id } else { node });
        if its != 0 || input.mine.slot(node) == 0 {
            continue;
        }
        if equal {
            actions.push(FinishedAction::ClearSlot(node));
            if node != input.sender {
                actions.push(FinishedAction::ClearBits(node));
            }
        } else if let Some(from) = reached_by(input, node) {
            actions.push(FinishedAction::CopySlot { from, to: node });
        }
    }
    Detected { announce: announce(&actions), actions }
}

/// The node whose state `node` has reached: the sender's generation is recorded in its slot, later than ours
/// for `node`.
fn reached_by(input: &Detect<'_>, node: u8) -> Option<u8> {
    if input.sync_target_flag || is_just_created(input.theirs.current) {
        return None;
    }
    let mine = input.mine;
    mine.slots_with(input.theirs.current)
        .filter(|from| {
            *from != node && *from != input.own_id && mine.slot_dagtag(*from) > mine.slot_dagtag(node)
        })
        .max_by_key(|from| mine.slot_dagtag(*from))
}

fn announce(actions: &[FinishedAction]) -> Announce {
    let copied = actions.iter().any(|a| matches!(a, FinishedAction::CopySlot { .. }));
    let cleared = actions.iter().any(|a| matches!(a, FinishedAction::ClearSlot(_)));
    match (copied, cleared) {
        (true, _) => Announce::All,
        (false, true) => Announce::AllButSender,
        (false, false) => Announce::Nobody,
    }
}

#[cfg(test)]
mod tests {
    use super::super::NODES;
    use super::super::uuid::{NOT_MEANINGFUL, PRIMARY_BIT};
    use super::*;

    const A: u64 = 0xa0;
    const B: u64 = 0xb0;
    const C: u64 = 0xc0;

    fn set(current: u64) -> UuidSet {
        UuidSet { current, ..UuidSet::default() }
    }

    fn slots(pairs: &[(usize, u64)]) -> [u64; NODES] {
        let mut all = [0; NODES];
        for (n, uuid) in pairs {
            all[*n] = *uuid;
        }
        all
    }

    fn detect(apv: u32, handshaking: bool, mine: &UuidSet, theirs: &UuidSet, any_bits: bool) -> Detected {
        detect_finished_resyncs(&Detect {
            apv,
            own_id: 0,
            sender: 1,
            handshaking,
            mine,
            theirs,
            sync_target_flag: false,
            my_slot_sent: mine.slot(1),
            any_bits,
            known: 0b1110,
            syncing_with: 0,
        })
    }

    /// First table of §8.8.
    #[test]
    fn ends_missed_while_apart() {
        use FinishedAction::*;
        let plain = set(A);
        let its = UuidSet { bitmap: slots(&[(0, B)]), ..set(A) };
        let mine = UuidSet { bitmap: slots(&[(1, B)]), ..set(A | PRIMARY_BIT) };
        let cases = [
            (&plain, &its, true, 124, vec![MarkPeerMissedEnd]),
            (&plain, &its, false, 124, vec![LogMissedEnd]),
            (&plain, &its, false, 123, vec![LogMissedEnd, MarkPeerMissedEnd]),
            (&mine, &plain, true, 124, vec![MarkSelfMissedEnd]),
            (&mine, &plain, false, 124, vec![ClearSlot(1)]),
            (&mine, &plain, false, 123, vec![ClearSlot(1), MarkSelfMissedEnd]),
            (&plain, &plain, true, 124, vec![]),
            (&mine, &its, true, 124, vec![]),
        ];
        for (mine, theirs, bits, apv, want) in cases {
            assert_eq!(detect(apv, true, mine, theirs, bits).actions, want);
        }
        let at_current = UuidSet { bitmap: slots(&[(0, A)]), ..set(A) };
        assert_eq!(
            detect(124, true, &plain, &at_current, true).actions,
            vec![],
            "a slot at the current generation"
        );
        let void = UuidSet { bitmap: slots(&[(0, NOT_MEANINGFUL)]), ..set(A) };
        assert_eq!(detect(124, true, &plain, &void, true).actions, vec![]);
        assert_eq!(detect(124, true, &set(C), &its, true).actions, vec![], "different generations");
    }

    /// Second table of §8.8.
    #[test]
    fn ends_elsewhere() {
        use FinishedAction::*;
        let mine = UuidSet { bitmap: slots(&[(1, B), (2, B), (3, C)]), ..set(A) };
        let got = detect(124, false, &mine, &set(A), false);
        assert_eq!(got.actions, [ClearSlot(1), ClearSlot(2), ClearBits(2), ClearSlot(3), ClearBits(3)]);
        assert_eq!(got.announce, Announce::AllButSender);

        let theirs = UuidSet { bitmap: slots(&[(0, B), (3, B)]), ..set(A) };
        assert_eq!(detect(124, false, &mine, &theirs, false).actions, [ClearSlot(2), ClearBits(2)]);

        // The sender is at C, which we know from node 3; node 2 is level with the sender.
        let mut mine = UuidSet { bitmap_dagtag: slots(&[(2, 10), (3, 20)]), ..mine };
        mine.bitmap[1] = 0;
        let theirs = UuidSet { bitmap: slots(&[(3, NOT_MEANINGFUL)]), ..set(C) };
        let got = detect(124, false, &mine, &theirs, false);
        assert_eq!(got, Detected { actions: vec![CopySlot { from: 3, to: 2 }], announce: Announce::All });
        mine.bitmap_dagtag[3] = 10;
        assert_eq!(detect(124, false, &mine, &theirs, false), Detected::default(), "not newer");

        let mut applied = UuidSet { bitmap_dagtag: slots(&[(2, 10), (3, 20)]), ..mine };
        applied.copy_slot(0, 3, 2);
        assert_eq!((applied.slot(2), applied.slot_dagtag(2), applied.history[0]), (C, 20, B));
    }
}
