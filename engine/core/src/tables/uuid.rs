//! Generation identifiers of one volume: what they are and how each event moves them.
//!
//! A [`UuidSet`] is plain data; every method is one row or one numbered list of `spec/state-machine.md` §8.
//! Random numbers come from the caller. Nothing here writes anything: whoever changes a set must bring it to
//! stable storage before acting on it. Choosing a resync from two sets is `compare`'s job.

use palisade_wire::enums::{DiskState, Role};

use super::{NODES, node_bit};

/// Current UUID of a device that never had data (§8.1).
pub const JUST_CREATED: u64 = 4;
/// Bit 0: this node was Primary in that generation; never compared (§8.1).
pub const PRIMARY_BIT: u64 = 1;
/// A bitmap UUID that says nothing: no slot, or sync target from that node (§8.7 "presented").
pub const NOT_MEANINGFUL: u64 = u64::MAX;
/// Added to a bitmap UUID to form the sync UUID for peers below protocol 110 (§8.7).
pub const SYNC_UUID_OFFSET: u64 = 1 << 48;

/// Whether two UUIDs name the same generation; the primary bit does not matter (§8.1).
pub fn same(a: u64, b: u64) -> bool {
    a & !PRIMARY_BIT == b & !PRIMARY_BIT
}

/// Whether this current UUID says "never had data"; 0 counts as such (§8.1).
pub fn is_just_created(uuid: u64) -> bool {
    same(uuid, JUST_CREATED) || same(uuid, 0)
}

/// Whether a bitmap UUID names a generation: neither 0 nor [`NOT_MEANINGFUL`].
pub fn is_generation(uuid: u64) -> bool {
    !same(uuid, 0) && uuid != NOT_MEANINGFUL
}

/// Makes a random number a usable UUID with the wanted primary bit.
fn fresh(random: u64, primary: bool) -> u64 {
    let base = random & !PRIMARY_BIT;
    // The three reserved values must not come out of the dice.
    let base =
        if is_just_created(base) || same(base, NOT_MEANINGFUL) { base ^ SYNC_UUID_OFFSET } else { base };
    with_primary(base, primary)
}

fn with_primary(uuid: u64, primary: bool) -> u64 {
    if primary { uuid | PRIMARY_BIT } else { uuid & !PRIMARY_BIT }
}

/// The identifiers one node keeps, or presents, for one volume (§8.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UuidSet {
    /// Generation of the data on this disk.
    pub current: u64,
    /// Per node id: the generation from which on the bitmap slot of that node records changes; 0 = in sync.
    /// In a peer's set, node ids the packet did not carry are [`NOT_MEANINGFUL`].
    pub bitmap: [u64; NODES],
    /// Per node id: position in the write stream when the bitmap UUID was set.
    pub bitmap_dagtag: [u64; NODES],
    /// Former current UUIDs, newest first.
    pub history: [u64; NODES],
}

impl Default for UuidSet {
    fn default() -> Self {
        Self { current: JUST_CREATED, bitmap: [0; NODES], bitmap_dagtag: [0; NODES], history: [0; NODES] }
    }
}

/// Inputs of [`UuidSet::new_current`].
#[derive(Clone, Copy, Debug)]
pub struct NewCurrent<'a> {
    /// Own node id.
    pub own_id: u8,
    /// Self is Primary.
    pub primary: bool,
    /// Present position in the write stream.
    pub dagtag: u64,
    /// Mask of configured peers.
    pub configured: u64,
    /// Disk state of each peer; `DUnknown` where there is none.
    pub pdsk: &'a [DiskState; NODES],
    /// Mask of nodes that are not to be counted as having the new generation (§8.6). In the forced variant
    /// [`initial_resync_targets`].
    pub weak: u64,
    /// Mask of node ids with an allocated bitmap slot.
    pub has_slot: u64,
    /// Number of bitmap slots in the metadata.
    pub max_peers: u8,
    /// For the new current UUID.
    pub random: u64,
    /// For the bitmap UUID of an initial resync, used if the current UUID is just created.
    pub random_initial: u64,
    /// Promotion that had to call its own data UpToDate: the packet goes out without NEW_DATAGEN.
    pub forced: bool,
}

/// A generation was made; put the set on stable storage before the first write in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewGeneration {
    /// To be restored as current if the metadata cannot be written.
    pub old_current: u64,
    /// What went into the bitmap UUIDs: the old current, or a random value for an initial resync.
    pub rotated: u64,
    /// The rotated value is such a random value; the reference logs it.
    pub initial: bool,
    /// Mask of node ids whose bitmap UUID was set.
    pub slots: u64,
    /// Announce with the flag NEW_DATAGEN.
    pub new_datagen: bool,
}

/// Inputs of [`UuidSet::receive_new_current`].
#[derive(Clone, Copy, Debug)]
pub struct ReceivedCurrent<'a> {
    /// Own node id.
    pub own_id: u8,
    /// Own role.
    pub own_role: Role,
    /// Own disk.
    pub own_disk: DiskState,
    /// Self is SyncTarget, PausedSyncT or Behind of somebody.
    pub sync_target: bool,
    /// Role of the sender.
    pub sender_role: Role,
    /// The packet carries NEW_DATAGEN.
    pub new_datagen: bool,
    /// The new current UUID.
    pub current: u64,
    /// The sender's weak mask.
    pub weak: u64,
    /// The sender's position in the write stream.
    pub dagtag: u64,
    /// Mask of configured peers.
    pub configured: u64,
    /// Disk state of each peer; `DUnknown` where there is none.
    pub pdsk: &'a [DiskState; NODES],
    /// Mask of node ids with an allocated bitmap slot.
    pub has_slot: u64,
}

/// What a received new current UUID means for the receiver (§8.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Self is being synchronised: only note that this peer is at the new generation.
    Recorded,
    /// Self is at the new generation now. Forward the UUIDs to neighbours that are Established, sync targets
    /// of self, or diskless.
    Adopted {
        /// The current UUID until now.
        old_current: u64,
    },
    /// Self did not take part: own disk becomes Outdated.
    Outdated,
    /// Known already, or nothing a Primary could follow.
    Unchanged,
}

/// Inputs of [`UuidSet::resync_finished_target`].
#[derive(Clone, Copy, Debug)]
pub struct TargetFinished<'a> {
    /// Own node id.
    pub own_id: u8,
    /// Self is Primary.
    pub primary: bool,
    /// Node id of the source.
    pub source: u8,
    /// What the source presents.
    pub source_uuids: &'a UuidSet,
    /// Mask of nodes known to be at the source's current UUID.
    pub same_generation: u64,
    /// What [`UuidSet::resync_starting_target`] returned.
    pub start_uuid: u64,
    /// Present position in the write stream.
    pub dagtag: u64,
}

impl UuidSet {
    /// The bitmap UUID for `node`; 0 for a node id that does not exist.
    pub fn slot(&self, node: u8) -> u64 {
        self.bitmap.get(usize::from(node)).copied().unwrap_or(0)
    }

    /// The position at which the bitmap UUID for `node` was set.
    pub fn slot_dagtag(&self, node: u8) -> u64 {
        self.bitmap_dagtag.get(usize::from(node)).copied().unwrap_or(0)
    }

    /// Sets a bitmap UUID and stamps it; clearing it clears the stamp.
    pub fn set_slot(&mut self, node: u8, uuid: u64, dagtag: u64) {
        let index = usize::from(node);
        if let (Some(slot), Some(stamp)) = (self.bitmap.get_mut(index), self.bitmap_dagtag.get_mut(index)) {
            *slot = uuid;
            *stamp = if uuid == 0 { 0 } else { dagtag };
        }
    }

    /// Clears a bitmap UUID; the old value goes to the history.
    pub fn clear_slot(&mut self, own_id: u8, node: u8) {
        let old = self.slot(node);
        self.set_slot(node, 0, 0);
        self.push_history(own_id, old);
    }

    /// Gives `to` the bitmap UUID and stamp of `from`; the old value goes to the history.
    pub fn copy_slot(&mut self, own_id: u8, from: u8, to: u8) {
        let old = self.slot(to);
        self.set_slot(to, self.slot(from), self.slot_dagtag(from));
        self.push_history(own_id, old);
    }

    /// Node ids whose bitmap UUID is `uuid`, ascending.
    pub fn slots_with(&self, uuid: u64) -> impl Iterator<Item = u8> + '_ {
        (0..)
            .zip(self.bitmap)
            .filter(move |(_, slot)| *slot != NOT_MEANINGFUL && same(*slot, uuid))
            .map(|(n, _)| n)
    }

    /// Whether `uuid` is a former generation of this set.
    pub fn in_history(&self, uuid: u64) -> bool {
        !same(uuid, 0) && self.history.iter().any(|h| same(*h, uuid))
    }

    /// Inserts a former generation at the front (§8.2). Own slot means nothing and is not looked at.
    pub fn push_history(&mut self, own_id: u8, uuid: u64) {
        if is_just_created(uuid) || uuid == NOT_MEANINGFUL || same(uuid, self.current) {
            return;
        }
        let empty = self.history[0] == 0;
        if !empty && (self.in_history(uuid) || self.slots_with(uuid).any(|n| n != own_id)) {
            return;
        }
        self.history.rotate_right(1);
        self.history[0] = uuid & !PRIMARY_BIT;
    }

    /// A real current UUID and nothing else: typical after presetting the same UUID everywhere (§8.3).
    pub fn is_day0(&self) -> bool {
        !is_just_created(self.current) && self.bitmap == [0; NODES] && self.history == [0; NODES]
    }

    /// Creates a new generation on a node with a disk, if there is a reason to (§8.5, steps 1 to 6).
    ///
    /// Returns `None`, with the set unchanged, when nobody could tell the difference.
    pub fn new_current(&mut self, input: &NewCurrent<'_>) -> Option<NewGeneration> {
        let day0 = self.is_day0();
        let old_current = self.current;
        let initial = is_just_created(old_current);
        let rotated = if initial { fresh(input.random_initial, false) } else { old_current };
        let (slots, counted) = self.rotation(input, rotated);
        if !counted && !day0 {
            return None;
        }
        for node in nodes(slots) {
            self.set_slot(node, rotated, input.dagtag);
        }
        let mut current = fresh(input.random, input.primary);
        if same(current, old_current) {
            current ^= SYNC_UUID_OFFSET;
        }
        self.current = current;
        if day0 {
            self.push_history(input.own_id, old_current);
        }
        Some(NewGeneration { old_current, rotated, initial, slots, new_datagen: !input.forced })
    }

    /// Steps 2 and 3 of §8.5: which slots take the old generation, and whether one of them is a reason.
    fn rotation(&self, input: &NewCurrent<'_>, rotated: u64) -> (u64, bool) {
        let mut slots = 0;
        let mut counted = false;
        let mut unused_slots = u32::from(input.max_peers).saturating_sub(input.has_slot.count_ones());
        for (node, (uuid, pdsk)) in (0u8..).zip(self.bitmap.iter().zip(input.pdsk)) {
            let bit = node_bit(node);
            let has_slot = input.has_slot & bit != 0;
            let open = same(*uuid, 0) || same(*uuid, rotated);
            if node == input.own_id {
                continue;
            }
            if input.configured & bit != 0 {
                if open && lags(*pdsk, input.weak & bit != 0, has_slot) {
                    slots |= bit;
                    counted = true;
                }
                continue;
            }
            let falls_to_it = !has_slot && unused_slots > 0;
            unused_slots -= u32::from(falls_to_it);
            if open {
                slots |= bit;
                counted |= has_slot || falls_to_it;
            }
        }
        (slots, counted)
    }

    /// Follows a Primary to its new generation (§8.6).
    pub fn receive_new_current(&mut self, input: &ReceivedCurrent<'_>) -> Received {
        let from_primary = input.new_datagen || input.sender_role == Role::Primary;
        match input.own_role {
            _ if is_just_created(input.current) || same(input.current, self.current) => Received::Unchanged,
            _ if input.sync_target => Received::Recorded,
            _ if from_primary => self.adopt(input),
            Role::Primary => Received::Unchanged,
            _ => Received::Outdated,
        }
    }

    fn adopt(&mut self, input: &ReceivedCurrent<'_>) -> Received {
        let old_current = self.current;
        for node in nodes(!node_bit(input.own_id)) {
            let (bit, slot) = (node_bit(node), self.slot(node));
            let weak = input.weak & bit != 0;
            let pdsk = input.pdsk.get(usize::from(node)).copied().unwrap_or(DiskState::DUnknown);
            let no_disk =
                input.configured & bit != 0 && pdsk == DiskState::Diskless && input.has_slot & bit == 0;
            if !weak && slot != 0 {
                self.set_slot(node, with_primary(input.current, false), input.dagtag);
            }
            let open = slot == 0 || same(slot, old_current);
            let rotates = weak && open && !no_disk && !is_just_created(old_current);
            if rotates && input.own_disk == DiskState::UpToDate {
                self.set_slot(node, old_current, input.dagtag);
            }
        }
        self.current = with_primary(input.current, input.own_role == Role::Primary);
        self.push_history(input.own_id, old_current);
        Received::Adopted { old_current }
    }

    /// Start of a resync as target (§8.7). `source_slot` is the source's bitmap UUID for self. Returns the
    /// "resync start UUID" to keep until the end.
    ///
    /// A just-created node takes over `source_slot`, so that an interrupted initial sync goes on with the
    /// bitmap; that value is also the start UUID, because a slot must never hold "just created".
    pub fn resync_starting_target(&mut self, source_slot: u64) -> u64 {
        if is_just_created(self.current) && is_generation(source_slot) && !is_just_created(source_slot) {
            self.current = with_primary(source_slot, false);
        }
        self.current
    }

    /// End of a resync as target of a stable source (§8.7). Returns the mask of nodes that are now known to
    /// be older: their pdsk is Outdated.
    ///
    /// Slots are set before anything is pushed, so that no generation gets lost because it was still
    /// found in a slot that is cleared a moment later.
    pub fn resync_finished_target(&mut self, input: &TargetFinished<'_>) -> u64 {
        let old_current = self.current;
        let source = input.source_uuids;
        self.current = with_primary(source.current, input.primary);
        let known_equal = input.same_generation | node_bit(input.source) | node_bit(input.own_id);
        let mut older = 0;
        for (node, uuid) in (0u8..).zip(source.bitmap) {
            let bit = node_bit(node);
            // After an initial sync that began from nothing, every bit for that node is set: the source's own
            // mark for it is then the right one.
            let from = if is_just_created(input.start_uuid) { uuid } else { input.start_uuid };
            if uuid != 0 && known_equal & bit == 0 && is_generation(from) {
                older |= bit;
                self.set_slot(node, from, input.dagtag);
            } else {
                self.set_slot(node, 0, 0);
            }
        }
        for uuid in source.history.iter().rev().chain(&source.bitmap) {
            self.push_history(input.own_id, *uuid);
        }
        self.push_history(input.own_id, old_current);
        older
    }

    /// End of a resync as target of an unstable source: only the slot for it is cleared (§8.7).
    pub fn resync_finished_unstable(&mut self, own_id: u8, source: u8) {
        self.clear_slot(own_id, source);
    }

    /// Start of a resync as source of a peer below protocol 110: the sync UUID to send (§8.7). The test for
    /// "just created" is exact here (`spec/wire-protocol.md` §4.11).
    pub fn sync_uuid_for_legacy_target(&mut self, own_id: u8, target: u8, random: u64, dagtag: u64) -> u64 {
        let old = self.slot(target);
        let uuid = if old == 0 || old == JUST_CREATED {
            fresh(random, false)
        } else {
            old.wrapping_add(SYNC_UUID_OFFSET)
        };
        self.set_slot(target, uuid, dagtag);
        self.push_history(own_id, old);
        uuid
    }

    /// What self shows to others (§8.7): `known` is the mask of node ids with a slot or a NODE_EXISTS flag,
    /// `sync_source` the current UUID of the node self is sync target of (then the packet carries
    /// SYNC_TARGET), `target_of` the mask of nodes self is target from at another generation.
    pub fn presented(&self, known: u64, sync_source: Option<u64>, target_of: u64) -> Self {
        let mut set = self.clone();
        set.current = sync_source.unwrap_or(self.current);
        for (node, slot) in (0u8..).zip(&mut set.bitmap) {
            let bit = node_bit(node);
            if known & bit == 0 || (*slot == 0 && target_of & bit != 0) {
                *slot = NOT_MEANINGFUL;
            } else if *slot == 0 && is_generation(self.current) && !same(set.current, self.current) {
                // 0 would mean equal to the generation shown; the data of those nodes is that of the real one.
                *slot = self.current;
            }
        }
        set
    }
}

/// Step 2 of §8.5: a configured peer does not take part in the next generation.
fn lags(pdsk: DiskState, weak: bool, has_slot: bool) -> bool {
    let behind = pdsk <= DiskState::DUnknown && pdsk != DiskState::Negotiating;
    let diskless_by_intent = pdsk == DiskState::Diskless && !has_slot;
    (behind || weak) && !diskless_by_intent
}

/// The node ids in a mask, ascending.
pub(super) fn nodes(mask: u64) -> impl Iterator<Item = u8> {
    (0u8..).take(NODES).filter(move |n| mask & node_bit(*n) != 0)
}

/// The weak mask for UUID packets (§8.6): every node but self if UpToDate, and but the configured peers that
/// take part. Bits beyond the last node id are set too, as kernels send them.
pub fn weak_nodes(own_id: u8, own_disk: DiskState, configured: u64, pdsk: &[DiskState; NODES]) -> u64 {
    let mut strong = if own_disk == DiskState::UpToDate { node_bit(own_id) } else { 0 };
    for (node, disk) in (0u8..).zip(pdsk) {
        let behind = *disk <= DiskState::Failed || matches!(disk, DiskState::DUnknown | DiskState::Outdated);
        if !behind {
            strong |= node_bit(node) & configured;
        }
    }
    !strong
}

/// The weak set of the forced variant (§8.5 step 7): peers that are to receive an initial resync.
pub fn initial_resync_targets(established: u64, pdsk: &[DiskState; NODES]) -> u64 {
    (0u8..)
        .zip(pdsk)
        .filter(|(_, disk)| **disk == DiskState::Inconsistent)
        .fold(0, |mask, (node, _)| mask | node_bit(node) & established)
}

#[cfg(test)]
mod tests {
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

    fn disks(pairs: &[(usize, DiskState)]) -> [DiskState; NODES] {
        let mut all = [DiskState::DUnknown; NODES];
        for (n, disk) in pairs {
            all[*n] = *disk;
        }
        all
    }

    /// Node 0 of three, two slots, all taken.
    fn input(pdsk: &[DiskState; NODES]) -> NewCurrent<'_> {
        NewCurrent {
            own_id: 0,
            primary: true,
            dagtag: 77,
            configured: 0b110,
            pdsk,
            weak: 0,
            has_slot: 0b110,
            max_peers: 2,
            random: 0x1111_0000,
            random_initial: 0x2222_0000,
            forced: false,
        }
    }

    #[test]
    fn comparison_ignores_the_primary_bit() {
        assert!(same(A, A | PRIMARY_BIT) && !same(A, B));
        assert!(is_just_created(0) && is_just_created(4) && is_just_created(5) && !is_just_created(6));
        assert_eq!(fresh(JUST_CREATED, true), JUST_CREATED ^ SYNC_UUID_OFFSET | PRIMARY_BIT);
        assert!(!is_just_created(fresh(1, false)) && is_generation(fresh(u64::MAX, true)));
    }

    #[test]
    fn push_history() {
        let mut s = set(A);
        for refused in [0, JUST_CREATED, A, A | PRIMARY_BIT, NOT_MEANINGFUL] {
            s.push_history(0, refused);
            assert_eq!(s.history[0], 0);
        }
        s.bitmap[1] = B;
        s.push_history(0, B | PRIMARY_BIT);
        assert_eq!(s.history[0], B, "an empty history takes it although a slot has it; the primary bit goes");
        s.bitmap[2] = C;
        s.push_history(0, C);
        s.push_history(0, B);
        assert_eq!(s.history[..2], [B, 0], "in a slot, or in the history already");
        for n in 0..40 {
            s.push_history(0, 0x1000 + n * 2);
        }
        assert_eq!((s.history[0], s.history[31]), (0x1000 + 78, 0x1000 + 16));
    }

    #[test]
    fn day0() {
        assert!(set(A).is_day0());
        assert!(!set(JUST_CREATED).is_day0());
        assert!(!UuidSet { bitmap: slots(&[(3, A)]), ..set(A) }.is_day0());
        assert!(!UuidSet { history: slots(&[(0, B)]), ..set(A) }.is_day0());
    }

    #[test]
    fn no_generation_when_all_peers_follow() {
        let pdsk = disks(&[(1, DiskState::UpToDate), (2, DiskState::UpToDate)]);
        let mut s = UuidSet { history: slots(&[(0, B)]), ..set(A) };
        let before = s.clone();
        assert_eq!(s.new_current(&input(&pdsk)), None);
        assert_eq!(s, before);
    }

    #[test]
    fn one_period_one_generation() {
        let pdsk = disks(&[(1, DiskState::UpToDate)]);
        let mut s = UuidSet { history: slots(&[(0, B)]), ..set(A | PRIMARY_BIT) };
        let made = s.new_current(&input(&pdsk)).expect("peer 2 is absent");
        assert_eq!(s.slot(2), A | PRIMARY_BIT, "the rotated value keeps its own primary bit");
        assert_eq!((s.slot(1), s.slot_dagtag(2)), (0, 77));
        assert_eq!(s.current, 0x1111_0001);
        assert_eq!(s.history[0], B, "only in day0 condition the old current goes into the history");
        assert_eq!(made.slots & 0b110, 0b100);
        assert!(made.new_datagen && !made.initial);
        assert_eq!(made.old_current, A | PRIMARY_BIT);

        let again = NewCurrent { random: 0x3333_0000, ..input(&pdsk) };
        assert_eq!(s.new_current(&again), None, "the slot of the absent node is already non-zero");
        s.bitmap[2] = s.current;
        assert!(s.new_current(&again).is_some(), "a slot at the current generation is open again");
    }

    /// Which states of one configured peer are a reason (§8.5 step 2).
    #[test]
    fn reasons() {
        use DiskState::*;
        let cases = [
            (Diskless, true, false, true),
            (Diskless, false, false, false),
            (Diskless, false, true, false),
            (Attaching, true, false, true),
            (Detaching, true, false, true),
            (Failed, true, false, true),
            (Negotiating, true, false, false),
            (Negotiating, true, true, true),
            (Inconsistent, true, false, true),
            (Outdated, true, false, true),
            (DUnknown, true, false, true),
            (DUnknown, false, false, true),
            (Consistent, true, false, false),
            (UpToDate, true, false, false),
            (UpToDate, true, true, true),
        ];
        for (disk, has_slot, weak, reason) in cases {
            let pdsk = disks(&[(1, disk)]);
            let mut i = input(&pdsk);
            (i.configured, i.max_peers) = (0b10, 1);
            (i.has_slot, i.weak) = (if has_slot { 0b10 } else { 0 }, if weak { 0b10 } else { 0 });
            i.max_peers = i.has_slot.count_ones() as u8;
            let mut s = UuidSet { history: slots(&[(0, B)]), ..set(A) };
            assert_eq!(s.new_current(&i).is_some(), reason, "{disk:?} slot={has_slot} weak={weak}");
        }
    }

    #[test]
    fn unassigned_slots_are_a_reason_once() {
        let pdsk = disks(&[(1, DiskState::UpToDate), (2, DiskState::UpToDate)]);
        let mut s = UuidSet { history: slots(&[(0, B)]), ..set(A) };
        let i = NewCurrent { max_peers: 3, ..input(&pdsk) };
        assert!(s.new_current(&i).is_some());
        assert!((3..32).all(|n| s.slot(n) == A), "all other ids take it, the first of them was the reason");
        assert_eq!((s.slot(0), s.slot(1), s.slot(2)), (0, 0, 0));
        assert_eq!(s.new_current(&NewCurrent { random: 0x5550, ..i }), None);
    }

    #[test]
    fn day0_always_makes_one_and_keeps_the_old_in_history() {
        let pdsk = disks(&[(1, DiskState::UpToDate), (2, DiskState::UpToDate)]);
        let mut s = set(A);
        assert!(s.new_current(&input(&pdsk)).is_some());
        assert_eq!(s.history[0], A);
    }

    #[test]
    fn initial_sync() {
        let pdsk = disks(&[(1, DiskState::Inconsistent), (2, DiskState::DUnknown)]);
        let mut s = UuidSet::default();
        let i = NewCurrent { forced: true, weak: initial_resync_targets(0b110, &pdsk), ..input(&pdsk) };
        assert_eq!(i.weak, 0b010);
        let made = s.new_current(&i).expect("peers are behind");
        assert!(made.initial && !made.new_datagen);
        assert_eq!((s.slot(1), s.slot(2), made.rotated), (0x2222_0000, 0x2222_0000, 0x2222_0000));
        assert_eq!(s.history[0], 0);
        let mut stuck = UuidSet { history: slots(&[(0, B)]), ..set(0x1111_0000) };
        assert!(stuck.new_current(&i).is_some());
        assert!(!same(stuck.current, 0x1111_0000), "a repeated random number is still a new generation");
    }

    #[test]
    fn weak_mask() {
        let pdsk = disks(&[
            (1, DiskState::UpToDate),
            (2, DiskState::Outdated),
            (3, DiskState::Consistent),
            (4, DiskState::Inconsistent),
            (5, DiskState::Failed),
        ]);
        let configured = 0b111_1110;
        assert_eq!(weak_nodes(0, DiskState::UpToDate, configured, &pdsk), !0b1_1011);
        assert_eq!(weak_nodes(0, DiskState::Diskless, configured, &pdsk), !0b1_1010);
    }

    fn received(pdsk: &[DiskState; NODES]) -> ReceivedCurrent<'_> {
        ReceivedCurrent {
            own_id: 1,
            own_role: Role::Secondary,
            own_disk: DiskState::UpToDate,
            sync_target: false,
            sender_role: Role::Primary,
            new_datagen: true,
            current: C | PRIMARY_BIT,
            weak: 0xffff_fff4,
            dagtag: 9,
            configured: 0b1101,
            pdsk,
            has_slot: 0b1101,
        }
    }

    #[test]
    fn follows_the_primary() {
        let pdsk = disks(&[(0, DiskState::UpToDate), (3, DiskState::UpToDate)]);
        let mut s = UuidSet { bitmap: slots(&[(3, B)]), ..set(A) };
        let got = s.receive_new_current(&ReceivedCurrent { weak: 0xffff_fff4, ..received(&pdsk) });
        assert_eq!(got, Received::Adopted { old_current: A });
        assert_eq!((s.current, s.slot(0), s.slot(2), s.slot_dagtag(2)), (C, 0, A, 9));
        assert_eq!(s.slot(3), C, "non-weak: nothing differs from it as of now");
        assert_eq!(s.slot(1), 0, "own slot stays");
        assert_eq!(s.history[0], A);
        assert_eq!(
            s.receive_new_current(&received(&pdsk)),
            Received::Unchanged,
            "forwarded copies do nothing"
        );
    }

    #[test]
    fn follows_without_rotating_unless_uptodate() {
        let pdsk = disks(&[]);
        let mut s = set(A);
        let got =
            s.receive_new_current(&ReceivedCurrent { own_disk: DiskState::Outdated, ..received(&pdsk) });
        assert_eq!((got, s.slot(2), s.history[0]), (Received::Adopted { old_current: A }, 0, A));
        let mut s = set(A);
        let diskless = disks(&[(2, DiskState::Diskless)]);
        let i = ReceivedCurrent { configured: 0b1101, has_slot: 0b1001, ..received(&diskless) };
        s.receive_new_current(&i);
        assert_eq!((s.slot(2), s.slot(4)), (0, A), "no slot for a peer that never has a disk");
    }

    #[test]
    fn other_receivers() {
        let pdsk = disks(&[]);
        let base = received(&pdsk);
        let cases = [
            (ReceivedCurrent { sync_target: true, ..base }, Received::Recorded),
            (
                ReceivedCurrent { new_datagen: false, sender_role: Role::Secondary, ..base },
                Received::Outdated,
            ),
            (ReceivedCurrent { new_datagen: false, ..base }, Received::Adopted { old_current: A }),
            (
                ReceivedCurrent {
                    new_datagen: false,
                    sender_role: Role::Secondary,
                    own_role: Role::Primary,
                    ..base
                },
                Received::Unchanged,
            ),
            (ReceivedCurrent { current: 0, ..base }, Received::Unchanged),
        ];
        for (i, want) in cases {
            let mut s = set(A);
            assert_eq!(s.receive_new_current(&i), want);
            assert_eq!(s != set(A), matches!(want, Received::Adopted { .. }));
        }
    }

    #[test]
    fn target_of_a_stable_source() {
        // Source 0: at C; node 2 is behind since B, node 3 too but known to be back, node 4 has no slot.
        let source = UuidSet {
            bitmap: slots(&[(1, A), (2, B), (3, B), (4, NOT_MEANINGFUL), (0, NOT_MEANINGFUL)]),
            history: slots(&[(0, 0xd0), (1, 0xe0)]),
            ..set(C | PRIMARY_BIT)
        };
        let mut s = UuidSet { bitmap: slots(&[(0, 0xf0), (5, 0xf0)]), ..set(A) };
        let start = s.resync_starting_target(source.slot(1));
        assert_eq!((start, s.current), (A, A), "no change of the current until the end");
        let older = s.resync_finished_target(&TargetFinished {
            own_id: 1,
            primary: false,
            source: 0,
            source_uuids: &source,
            same_generation: 0b1000,
            start_uuid: start,
            dagtag: 5,
        });
        assert_eq!(older, 0b1_0100);
        assert_eq!(s.current, C);
        assert_eq!(s.bitmap, slots(&[(2, A), (4, A)]));
        assert_eq!(s.slot_dagtag(2), 5);
        for generation in [0xd0, 0xe0, B] {
            assert!(s.in_history(generation), "{generation:#x}");
        }
        assert_eq!(s.slots_with(A).count(), 2, "the own old current lives on in the slots");
        assert!(s.history[0] != 0 && !s.in_history(NOT_MEANINGFUL));
    }

    #[test]
    fn target_of_an_initial_sync() {
        let source = UuidSet { bitmap: slots(&[(1, A), (2, B)]), ..set(C) };
        let mut s = UuidSet::default();
        let start_uuid = s.resync_starting_target(A | PRIMARY_BIT);
        assert_eq!((s.current, start_uuid), (A, A), "an interruption continues with the bitmap");
        let finished = TargetFinished {
            own_id: 1,
            primary: false,
            source: 0,
            source_uuids: &source,
            same_generation: 0,
            start_uuid,
            dagtag: 5,
        };
        s.resync_finished_target(&finished);
        assert_eq!((s.current, s.slot(2)), (C, A));

        let mut s = UuidSet::default();
        let start_uuid = s.resync_starting_target(0);
        assert_eq!(start_uuid, JUST_CREATED);
        s.resync_finished_target(&TargetFinished { start_uuid, ..finished });
        assert_eq!((s.current, s.slot(2)), (C, B), "a slot never holds the just-created value");
    }

    #[test]
    fn unstable_and_legacy() {
        let mut s = UuidSet { bitmap: slots(&[(0, B), (2, C)]), ..set(A) };
        s.resync_finished_unstable(1, 0);
        assert_eq!((s.current, s.slot(0), s.slot(2), s.history[0]), (A, 0, C, B));

        let mut s = UuidSet { bitmap: slots(&[(1, B)]), ..set(A) };
        assert_eq!(s.sync_uuid_for_legacy_target(0, 1, 0x9990, 1), 0x0001_0000_0000_00b0);
        assert_eq!((s.slot(1), s.history[0]), (0x0001_0000_0000_00b0, B));
        s.bitmap[1] = 5;
        assert_eq!(
            s.sync_uuid_for_legacy_target(0, 1, 0x9990, 1),
            0x0001_0000_0000_0005,
            "the test for 4 is exact"
        );
        s.bitmap[1] = 4;
        assert_eq!(s.sync_uuid_for_legacy_target(0, 1, 0x9990, 1), 0x9990);
    }

    #[test]
    fn presented() {
        let s = UuidSet { bitmap: slots(&[(1, B), (5, C)]), ..set(A) };
        assert_eq!(s.presented(0b110, None, 0).bitmap[..4], [NOT_MEANINGFUL, B, 0, NOT_MEANINGFUL]);
        let p = s.presented(0b110, Some(C), 0b110);
        assert_eq!((p.current, p.slot(1), p.slot(2)), (C, B, NOT_MEANINGFUL));
        // What the data is at, while a third node's generation is shown: its source goes on from there.
        assert_eq!(s.presented(0b110, Some(C), 0).slot(2), A);
    }
}
