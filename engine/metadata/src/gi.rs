//! Generation identifiers as text: `get-gi`, `show-gi`, `dstate` (`spec/metadata.md` §13.5).

use std::fmt::Write as _;

use crate::{DeviceFlags, PeerFlags, PeerSlot, SECTOR_SIZE, Superblock, Version};

const V08_FLAGS: [DeviceFlags; 7] = [
    DeviceFlags::CONSISTENT,
    DeviceFlags::WAS_UP_TO_DATE,
    DeviceFlags::PRIMARY_IND,
    DeviceFlags::CONNECTED_IND,
    DeviceFlags::FULL_SYNC,
    DeviceFlags::PEER_OUTDATED,
    DeviceFlags::CRASHED_PRIMARY,
];
const V09_FLAGS: [DeviceFlags; 7] = [
    DeviceFlags::CONSISTENT,
    DeviceFlags::WAS_UP_TO_DATE,
    DeviceFlags::PRIMARY_IND,
    DeviceFlags::CRASHED_PRIMARY,
    DeviceFlags::AL_CLEAN,
    DeviceFlags::AL_DISABLED,
    DeviceFlags::PRIMARY_LOST_QUORUM,
];
const V09_PEER_FLAGS: [PeerFlags; 5] = [
    PeerFlags::CONNECTED,
    PeerFlags::OUTDATED,
    PeerFlags::FENCING,
    PeerFlags::FULL_SYNC,
    PeerFlags::DEVICE_SEEN,
];

const FRAME_HEAD: &str = "
       +--<  Current data generation UUID  >-
       |               +--<  Bitmap's base data generation UUID  >-
       |               |                 +--<  younger history UUID  >-
       |               |                 |         +-<  older history  >-
       V               V                 V         V
";
const V08_FRAME: &str = "                                                                    ^ ^ ^ ^ ^ ^ ^
                                      -<  Data consistency flag  >--+ | | | | | |
                             -<  Data was/is currently up-to-date  >--+ | | | | |
                                  -<  Node was/is currently primary  >--+ | | | |
                                  -<  Node was/is currently connected  >--+ | | |
         -<  Node was in the progress of setting all bits in the bitmap  >--+ | |
                        -<  The peer's disk was out-dated or inconsistent  >--+ |
      -<  This node was a crashed primary, and has not seen its peer since   >--+

";
const V09_FRAME: &str =
    "                                                                    ^ ^ ^ ^ ^ ^ ^ ^ ^ ^ ^ ^
                                      -<  Data consistency flag  >--+ | | | | | | | | | | |
                             -<  Data was/is currently up-to-date  >--+ | | | | | | | | | |
                                  -<  Node was/is currently primary  >--+ | | | | | | | | |
 -<  This node was a crashed primary, and has not seen its peer since  >--+ | | | | | | | |
             -<  The activity-log was applied, the disk can be attached  >--+ | | | | | | |
        -<  The activity-log was disabled, peer is completely out of sync  >--+ | | | | | |
                              -<  This node was primary when it lost quorum  >--+ | | | | |
                                          -<  Node was/is currently connected  >--+ | | | |
                              -<  The peer's disk was out-dated or inconsistent  >--+ | | |
                                 -<   A fence policy other the dont-care was used  >--+ | |
                  -<  Node was in the progress of marking all blocks as out of sync  >--+ |
                     -<  At least once we saw this node with a backing device attached >--+

";

/// The `get-gi` line towards `node_id` (ignored with v08), without a line end:
/// `CUR:BM:H0:H1:` and the flags as 0/1.
pub fn gi_line(sb: &Superblock, node_id: usize) -> String {
    let at = if sb.version == Version::V08 { 0 } else { node_id };
    let peer = sb.peers.get(at).copied().unwrap_or(PeerSlot::EMPTY);
    let mut line = String::new();
    for uuid in [sb.current_uuid, peer.bitmap_uuid, sb.history[0], sb.history[1]] {
        let _ = write!(line, "{uuid:016X}:");
    }
    let device = if sb.version == Version::V08 { V08_FLAGS } else { V09_FLAGS };
    let mut flags: Vec<bool> = device.iter().map(|f| sb.flags.contains(*f)).collect();
    if sb.version == Version::V09 {
        flags.extend(V09_PEER_FLAGS.iter().map(|f| peer.flags.contains(*f)));
    }
    let flags: Vec<&str> = flags.into_iter().map(|on| if on { "1" } else { "0" }).collect();
    line + &flags.join(":")
}

/// The whole `show-gi` text towards `node_id`.
pub fn show_gi(sb: &Superblock, node_id: usize) -> String {
    let mut text = format!("{FRAME_HEAD}{}\n", gi_line(sb, node_id));
    match sb.version {
        Version::V08 => {
            text += V08_FRAME;
            let _ = writeln!(text, "flags:{}", v08_state(sb));
            let state = if sb.is_clean() { "clean" } else { "need apply-al" };
            let _ = writeln!(text, "meta-data: {state}");
        }
        Version::V09 => text += V09_FRAME,
    }
    let sectors = sb.effective_size_sectors;
    if sectors == 0 {
        text += "zero size device -- never seen peer yet?\n";
    } else {
        let size = pretty_kib(sectors / (1024 / SECTOR_SIZE));
        let _ = writeln!(text, "last agreed size: {size} ({sectors} sectors)");
        let _ = writeln!(text, "last agreed max bio size: {} Byte", sb.max_peer_bio_size);
    }
    text
}

fn v08_state(sb: &Superblock) -> String {
    let has = |flag| sb.flags.contains(flag);
    let mut text = String::new();
    if has(DeviceFlags::CRASHED_PRIMARY) {
        text += " crashed";
    }
    text += if has(DeviceFlags::PRIMARY_IND) { " Primary" } else { " Secondary" };
    text += if has(DeviceFlags::CONNECTED_IND) { ", Connected" } else { ", StandAlone" };
    text += match (has(DeviceFlags::CONSISTENT), has(DeviceFlags::WAS_UP_TO_DATE)) {
        (false, _) => ", Inconsistent",
        (true, false) => ", Outdated",
        (true, true) => ", UpToDate",
    };
    if has(DeviceFlags::FULL_SYNC) {
        text += ", need full sync";
    }
    if has(DeviceFlags::PEER_OUTDATED) {
        text += ", peer Outdated";
    }
    text
}

/// The disk state the superblock alone tells, as `dstate` prints it.
pub fn dstate(sb: &Superblock) -> &'static str {
    let has = |flag| sb.flags.contains(flag);
    if !has(DeviceFlags::CONSISTENT) {
        "Inconsistent"
    } else if !has(DeviceFlags::WAS_UP_TO_DATE) {
        "Outdated"
    } else if has(DeviceFlags::PEER_OUTDATED) {
        "UpToDate"
    } else {
        "Consistent"
    }
}

/// A size in KiB as the tools print it: `24 MB`, `8192 KB`.
pub fn pretty_kib(kib: u64) -> String {
    const UNITS: [&str; 6] = ["KB", "MB", "GB", "TB", "PB", "EB"];
    let (mut n, mut unit) = (kib, 0);
    while n >= 10_000 && unit + 1 < UNITS.len() {
        n = n / 1024 + (n % 1024) / 512;
        unit += 1;
    }
    format!("{n} {}", UNITS[unit])
}
