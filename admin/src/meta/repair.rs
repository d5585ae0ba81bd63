//! `repair-md`: undoes what old kernels left in the entries of nodes that never were there
//! (`spec/metadata.md` §13.5). It writes only if an entry is wrong, and never touches an entry in use.

use palisade_metadata::{Kind, Superblock, Version};

use super::{EXIT_FAILED, Job, NO_METADATA, check_resize};
use crate::cli::Failure;

pub fn repair_md(job: &mut Job) -> Result<i32, Failure> {
    if job.superblock("").is_err()
        && job.kind == Kind::Internal
        && super::device::last_known_bytes(job).is_some()
    {
        check_resize(job)?;
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
    use palisade_metadata::{Geometry, Layout, PeerSlot};

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
