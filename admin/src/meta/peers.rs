//! Entries of nodes: `forget-peer` frees one, `repair-md` undoes what old kernels left in those of nodes
//! that never were there (`spec/metadata.md` §9.5, §13.5). `repair-md` writes only if an entry is wrong,
//! and never touches an entry in use.

use palisade_metadata::{PeerSlot, Superblock, Version, image};

use super::resize::move_from;
use super::{EXIT_ARGUMENT, EXIT_FAILED, EXIT_USAGE, Job, NO_METADATA};
use crate::cli::Failure;

/// Frees the slot of a node: it counts since day 0 from now on, and so does the entry's UUID, so that a
/// new node can start there.
pub fn forget_peer(job: &mut Job) -> Result<i32, Failure> {
    let (mut superblock, layout) = job.superblock(NO_METADATA)?;
    if superblock.version == Version::V08 {
        return Err(Failure::new(EXIT_USAGE, "The forget-peer command needs v09 metadata"));
    }
    let node_id = job.node_id();
    let own = usize::try_from(superblock.node_id).ok();
    if own == Some(node_id) {
        return Err(Failure::new(EXIT_ARGUMENT, format!("Node id {node_id} is this node's own.")));
    }
    let day0 = superblock.peers.iter().enumerate().rev();
    let day0 = day0.filter(|(id, p)| Some(*id) != own && *id != node_id && p.is_day0());
    let day0 = day0.map(|(_, p)| *p).next().unwrap_or_default();
    if let Some(slot) = superblock.bitmap_slot(node_id) {
        image::release_slot(&job.device.file, &superblock, &layout, slot).map_err(|e| job.io_failure(&e))?;
    }
    let Some(entry) = superblock.peers.get_mut(node_id) else {
        return Err(Failure::new(EXIT_ARGUMENT, format!("There is no entry for node id {node_id}.")));
    };
    *entry = PeerSlot { bitmap_uuid: day0.bitmap_uuid, bitmap_dagtag: day0.bitmap_dagtag, ..PeerSlot::EMPTY };
    job.store(&layout, &superblock)?;
    Ok(0)
}

pub fn repair_md(job: &mut Job) -> Result<i32, Failure> {
    if job.probe()?.is_none()
        && let Some(last) = job.last_known_bytes()
    {
        if job.device.file.dry_run {
            eprintln!("The metadata is where the device ended before it grew (see check-resize).");
            return Ok(EXIT_FAILED);
        }
        move_from(job, last)?;
    }
    let (mut superblock, layout) = job.superblock(NO_METADATA)?;
    let repairs = repairs(&superblock);
    if repairs.is_empty() {
        return Ok(0);
    }
    for Repair { node_id, found, expected } in &repairs {
        eprintln!("Peer slot {node_id} has \"day0\" UUID 0x{found:016X}, expected 0x{expected:016X}");
    }
    if job.scanned.is_set("tentative") {
        return Ok(EXIT_FAILED);
    }
    eprintln!("Repairing metadata");
    for repair in &repairs {
        if let Some(peer) = superblock.peers.get_mut(repair.node_id) {
            peer.bitmap_uuid = repair.expected;
        }
    }
    job.store(&layout, &superblock)?;
    Ok(0)
}

/// An entry with the wrong UUID.
#[derive(Debug, PartialEq, Eq)]
struct Repair {
    node_id: usize,
    found: u64,
    expected: u64,
}

/// All day-0 entries stand for the same moment: that of the highest node id is right.
fn repairs(superblock: &Superblock) -> Vec<Repair> {
    if superblock.version == Version::V08 {
        return Vec::new();
    }
    let own = usize::try_from(superblock.node_id).ok();
    let peers = superblock.peers.iter().enumerate();
    let day0: Vec<(usize, u64)> = peers
        .filter(|(id, peer)| Some(*id) != own && peer.is_day0())
        .map(|(id, peer)| (id, peer.bitmap_uuid))
        .collect();
    let Some((_, expected)) = day0.last().copied() else { return Vec::new() };
    let wrong = day0.into_iter().filter(|(_, uuid)| *uuid != expected);
    wrong.map(|(node_id, found)| Repair { node_id, found, expected }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use palisade_metadata::{Geometry, Kind, Layout};

    #[test]
    fn day0_entries_follow_the_highest_one_and_others_stay() {
        let layout = Layout::compute(Kind::Internal, 64 << 20, None, Geometry::new(3)).unwrap();
        let mut superblock = Superblock::fresh(Version::V09, &layout);
        superblock.node_id = 1;
        for (id, uuid) in [(0, 5), (1, 6), (2, 7), (31, 9)] {
            superblock.peers[id].bitmap_uuid = uuid;
        }
        superblock.peers[0] = PeerSlot { bitmap_index: 0, ..superblock.peers[0] };
        let repairs = repairs(&superblock);
        assert!(repairs.iter().all(|r| r.expected == 9 && ![0, 1, 31].contains(&r.node_id)));
        assert_eq!(repairs[0], Repair { node_id: 2, found: 7, expected: 9 });
        assert_eq!(repairs.len(), 29);
    }
}
