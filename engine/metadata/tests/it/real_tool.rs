//! What we write, the packaged `drbdmeta` (package drbd-utils) reads, and the other way round.

use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::process::{Command, Output};

use crate::common::{archive, header, kind, layout};
use palisade_metadata::al::{FREE_EXTENT, Transaction, TransactionKind, Update};
use palisade_metadata::image::{self, BlockIo, Extent};
use palisade_metadata::*;

const DRBDMETA: &str = "/usr/sbin/drbdmeta";

/// Runs the tool on `path`; fails if it is not installed.
fn drbdmeta(version: Version, path: &Path, index: &str, args: &[&str]) -> Output {
    Command::new(DRBDMETA)
        .args(["--force", "-", version.name()])
        .arg(path)
        .arg(index)
        .args(args)
        .env("TZ", "UTC")
        .output()
        .unwrap_or_else(|e| panic!("{DRBDMETA} must be installed (package drbd-utils): {e}"))
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// Our dump, with the lines that drbdmeta before 9.3 prints differently taken out of both.
fn compare_dumps(version: Version, path: &Path, index: &str, what: &str) {
    let theirs = drbdmeta(version, path, index, &["dump-md"]);
    let theirs = String::from_utf8(theirs.stdout).unwrap();
    assert!(theirs.starts_with("# DRBD meta data dump"), "{what}: {theirs}");
    let md = image::read_metadata(&open(path), kind(index), None, Extent::Padded).unwrap();
    let mut ours = Vec::new();
    dump(&mut ours, &header(&theirs), &md.superblock, &md.layout, &md.bitmap, true).unwrap();
    let ours = String::from_utf8(ours).unwrap();
    let common = |text: &str| -> Vec<String> {
        let v08_flags = |l: &str| version == Version::V08 && l.starts_with("    flags ");
        let lines = text.lines().filter(|l| !l.starts_with("members ") && !v08_flags(l));
        lines.map(str::to_owned).collect()
    };
    let (ours, theirs) = (common(&ours), common(&theirs));
    for (n, (a, b)) in ours.iter().zip(&theirs).enumerate() {
        assert_eq!(a, b, "{what}, line {}", n + 1);
    }
    assert_eq!(ours.len(), theirs.len(), "{what}");
}

/// Whole contents, without the members mask, which drbdmeta 9.22 loses.
fn contents(path: &Path, index: &str) -> Vec<u8> {
    let file = open(path);
    let (mut sb, layout, _) = image::read_superblock(&file, kind(index), None).unwrap();
    sb.members = 0;
    image::write_superblock(&file, &layout, &sb).unwrap();
    let mut bytes = vec![0; (layout.area_end() - layout.area_start()) as usize];
    file.read_at(layout.area_start(), &mut bytes).unwrap();
    bytes
}

/// Applies the log with both programs and compares the whole areas.
fn compare_apply(version: Version, path: &Path, index: &str, what: &str) {
    let copy = path.with_extension("copy");
    fs::copy(path, &copy).unwrap();
    let theirs = drbdmeta(version, &copy, index, &["apply-al"]);
    assert!(theirs.status.success(), "{what}: {theirs:?}");
    image::apply_al(&open(path), kind(index), None).unwrap();
    assert!(contents(path, index) == contents(&copy, index), "{what}: areas differ");
}

fn transaction(number: u32, updates: &[(u16, u32)], slots: &[u32]) -> Block {
    let transaction = Transaction {
        number,
        kind: TransactionKind::Update,
        updates: updates.iter().map(|&(slot, extent)| Update { slot, extent }).collect(),
        context_size: slots.len() as u16,
        context_start: 0,
        context: slots.to_vec(),
    };
    transaction.encode().unwrap()
}

#[test]
fn the_tool_reads_what_we_write() {
    let dir = tempfile::tempdir().unwrap();
    let peers = Geometry::new;
    let coarse = Geometry { bytes_per_bit: 65536, ..peers(2) };
    let striped = Geometry { al_stripes: 3, al_stripe_size_4k: 5, ..peers(7) };
    for (n, (version, index, bytes, geometry)) in [
        (Version::V09, "internal", (64 << 20) + 1536, peers(1)),
        (Version::V09, "internal", 96 << 20, peers(31)),
        (Version::V09, "internal", 200 << 20, coarse),
        (Version::V09, "internal", 48 << 20, striped),
        (Version::V09, "flex-external", 1 << 20, peers(3)),
        (Version::V09, "flex-external", 2 << 20, striped),
        (Version::V09, "1", 256 << 20, peers(3)),
        (Version::V08, "internal", 32 << 20, peers(1)),
        (Version::V08, "flex-external", 1 << 20, peers(1)),
    ]
    .into_iter()
    .enumerate()
    {
        let what = format!("{n}: {version:?} {index} {geometry:?}");
        let path = dir.path().join(format!("{n}.img"));
        let file = open(&path);
        file.set_len(bytes).unwrap();
        let layout = Layout::compute(kind(index), bytes, Some(60 << 11), geometry).unwrap();
        let mut sb = Superblock::fresh(version, &layout);
        image::create_md(&file, &layout, &sb).unwrap();
        compare_dumps(version, &path, index, &what);

        sb.effective_size_sectors = layout.usable_sectors - 3;
        sb.current_uuid = 0x0123_4567_89AB_CDEF;
        sb.device_uuid = 0xFEDC_BA98_7654_3210;
        sb.history[..2].copy_from_slice(&[17, 0xFFFF_0000_FFFF_0000]);
        sb.flags |= DeviceFlags::CONSISTENT | DeviceFlags::WAS_UP_TO_DATE;
        sb.peers[0].bitmap_uuid = 42;
        if version == Version::V09 {
            sb.node_id = 1;
            sb.members = 3;
            sb.peers[0].bitmap_index = 0;
            sb.peers[31].flags = PeerFlags(0x8001_001f).without(PeerFlags::HAVE_BITMAP);
            sb.peers[30].flags = PeerFlags(0x0100_0008);
        }
        let mut bitmap = Bitmap::new(sb.max_peers, sb.effective_size_sectors, sb.bm_bytes_per_bit).unwrap();
        for slot in 0..bitmap.slots() {
            let at = slot as u64 * 37;
            bitmap.set_range(slot, at..at + 3);
            bitmap.set_range(slot, 500 + at..2000);
            let end = bitmap.bits();
            bitmap.set_range(slot, end - 2 - at.min(20)..end);
        }
        let blocks = bitmap.take_dirty();
        image::write_bitmap_blocks(&file, &layout, &bitmap, &blocks).unwrap();
        image::write_superblock(&file, &layout, &sb).unwrap();
        compare_dumps(version, &path, index, &what);
        let dumped = drbdmeta(version, &path, index, &["dump-md"]);
        assert!(dumped.status.success(), "{what}: {dumped:?}");
        let parsed = parse_dump(std::str::from_utf8(&dumped.stdout).unwrap(), version).unwrap();
        assert_eq!(parsed.superblock.current_uuid, sb.current_uuid);
        let verify = dir.path().join("verify.dump");
        fs::write(&verify, &dumped.stdout).unwrap();
        let verified = drbdmeta(version, &path, index, &["verify-dump", verify.to_str().unwrap()]);
        assert!(verified.status.success(), "{what}: {verified:?}");

        // A primary that crashed, with a counter that wraps and a slot that is used again.
        sb.flags |= DeviceFlags::PRIMARY_IND | DeviceFlags::CRASHED_PRIMARY;
        sb.mark_in_use();
        image::write_superblock(&file, &layout, &sb).unwrap();
        let mut slots = [FREE_EXTENT; 67];
        for k in 0..20u32 {
            let number = (u32::MAX - 7).wrapping_add(k);
            let update = ((k % 6) as u16, k % 10);
            let block = transaction(number, &[update], &slots);
            // The reference walks the ring, which is wrong where the counter wraps in an odd ring.
            let number = if geometry.al_blocks().is_power_of_two() { number } else { k };
            let block = if number == k { transaction(k, &[update], &slots) } else { block };
            file.write_at(layout.al_transaction_pos(number), &block).unwrap();
            slots[usize::from(update.0)] = update.1;
        }
        compare_dumps(version, &path, index, &what);
        // drbdmeta 9.22 refuses to apply a log to coarser bitmaps.
        if geometry.bytes_per_bit == BYTES_PER_BIT_MIN {
            compare_apply(version, &path, index, &what);
            compare_dumps(version, &path, index, &what);
        }
    }
}

#[test]
fn both_apply_the_logs_that_kernels_left_behind() {
    let files = archive("kernel.tar.zst");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("device.img");
    let mut compared = 0;
    for name in files.keys().filter_map(|f| f.strip_suffix(".raw")) {
        // The same state in many scenarios: these have extents in the log.
        if !["al-in-use", "after-crash", "syncing", "survivor"].iter().any(|s| name.contains(s)) {
            continue;
        }
        let recorded = layout(&files[&format!("{name}.layout")]);
        let _ = fs::remove_file(&path);
        let file = open(&path);
        file.set_len(recorded["device_size"].parse().unwrap()).unwrap();
        file.write_at(recorded["area_offset"].parse().unwrap(), &files[&format!("{name}.raw")]).unwrap();
        let version = if name.starts_with("8.4") { Version::V08 } else { Version::V09 };
        compare_dumps(version, &path, "internal", name);
        compare_apply(version, &path, "internal", name);
        compare_dumps(version, &path, "internal", name);
        compared += 1;
    }
    assert!(compared >= 10, "{compared}");
}

#[test]
fn large_bitmaps_dump_in_the_same_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.img");
    let file = open(&path);
    let bytes = 80 << 20;
    file.set_len(bytes).unwrap();
    let slots = 7;
    let layout = Layout::compute(Kind::FlexExternal, bytes, None, Geometry::new(slots)).unwrap();
    let mut sb = Superblock::fresh(Version::V09, &layout);
    sb.effective_size_sectors = layout.usable_sectors - 12345;
    image::create_md(&file, &layout, &sb).unwrap();
    let mut bitmap = Bitmap::new(slots, sb.effective_size_sectors, 4096).unwrap();
    // Words of one slot in a piece of the reference's buffer.
    let unit = 4096 * u64::from(slots);
    let piece_bits = (32 << 20) / unit * unit / 4 / u64::from(slots) * 32;
    for (slot, before, after) in [(0, 8, 8), (1, 16, 4), (2, 8, 40), (3, 24, 24), (4, 3, 3), (5, 12, 100)] {
        let at = piece_bits * (1 + slot as u64 % 2);
        bitmap.set_range(slot, at - before * 32..at + after * 32);
    }
    bitmap.set_all(6);
    let blocks = bitmap.take_dirty();
    image::write_bitmap_blocks(&file, &layout, &bitmap, &blocks).unwrap();
    image::write_superblock(&file, &layout, &sb).unwrap();
    compare_dumps(Version::V09, &path, "flex-external", "large");
}
