//! Metadata written by kernel DRBD 8.4.11 and 9.2.18.

use std::collections::BTreeMap;

use crate::common::{Sparse, archive, header, layout};
use palisade_metadata::image::{self, Extent};
use palisade_metadata::*;

/// vm1's device was enlarged in that scenario: the recorded area is not the end of it.
const NOT_THE_END: &str = "9.2.18_43-unrelated-sizes/02-after-down.vm1.vol0";

fn names(files: &BTreeMap<String, Vec<u8>>) -> impl Iterator<Item = &str> {
    files.keys().filter_map(|f| f.strip_suffix(".raw")).filter(|f| *f != NOT_THE_END)
}

fn device(files: &BTreeMap<String, Vec<u8>>, name: &str) -> Sparse {
    let layout = layout(&files[&format!("{name}.layout")]);
    let device = Sparse::new(layout["device_size"].parse().unwrap());
    device.fill(layout["area_offset"].parse().unwrap(), &files[&format!("{name}.raw")][..]);
    device
}

#[test]
fn every_image_decodes_and_dumps_as_recorded() {
    let files = archive("kernel.tar.zst");
    let (mut images, mut dumps, mut unclean) = (0, 0, 0);
    for name in names(&files) {
        let device = device(&files, name);
        let md = image::read_metadata(&device, Kind::Internal, None, Extent::Padded)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let sb = &md.superblock;
        // One scenario has an 8.4 node beside a 9 node.
        let v08 = name.starts_with("8.4") || name.contains("44-peer-8.4") && name.contains("vm2");
        assert_eq!(sb.version == Version::V08, v08, "{name}");
        let copy = device.clone();
        image::write_superblock(&copy, &md.layout, sb).unwrap();
        let blocks: Vec<u64> = (0..md.bitmap.disk_blocks()).collect();
        image::write_bitmap_blocks(&copy, &md.layout, &md.bitmap, &blocks).unwrap();
        assert_eq!(copy.differs(&device), [], "{name}");
        // Every transaction of the kernel comes back as the same bytes.
        for nr in 0..md.layout.al_blocks() {
            let mut block = [0; BLOCK_SIZE];
            image::BlockIo::read_at(&device, md.layout.al_block_pos(nr), &mut block).unwrap();
            let transaction =
                al::Transaction::decode(&block).unwrap_or_else(|| panic!("{name}: block {nr} of the log"));
            assert_eq!(transaction.encode().unwrap(), block, "{name}: {transaction:?}");
        }
        assert_eq!(md.replay.invalid_blocks, 0, "{name}");
        images += 1;
        let Some(recorded) = files.get(&format!("{name}.dump.txt")) else { continue };
        let recorded = std::str::from_utf8(recorded).unwrap();
        let mut ours = Vec::new();
        if let Some(dump_text) = recorded.strip_suffix("# rc=0\n") {
            let header = header(dump_text);
            dump(&mut ours, &header, sb, &md.layout, &md.bitmap, false).unwrap();
            assert_eq!(as_of_922(&String::from_utf8(ours).unwrap()), dump_text, "{name}");
            dumps += 1;
        } else {
            let header = DumpHeader { date: "", host: "", command: "", moved: None };
            let refused = dump(&mut ours, &header, sb, &md.layout, &md.bitmap, false).unwrap_err();
            assert_eq!(format!("{refused}\n# rc=1\n"), recorded, "{name}");
            unclean += 1;
        }
    }
    assert_eq!((images, dumps > 10, unclean > 50), (149, true, true));
}

/// drbdmeta 9.22 does not know members, and prints zero flags for v08.
fn as_of_922(dump: &str) -> String {
    let mut out = String::new();
    for line in dump.lines().filter(|l| !l.starts_with("members ")) {
        let v08_flags = dump.contains("\"v08\"") && line.starts_with("    flags ");
        out += if v08_flags { "    flags 0x00000000;" } else { line };
        out += "\n";
    }
    out
}

#[test]
fn the_log_of_a_crashed_primary_marks_the_extents_in_it() {
    let files = archive("kernel.tar.zst");
    for (scenario, slots) in [("8.4.11_16-primary-crash", 1), ("9.2.18_16-primary-crash", 3)] {
        let device = device(&files, &format!("{scenario}/02-after-crash.vm1.vol0"));
        let (applied, md) = image::apply_al(&device, Kind::Internal, None).unwrap();
        assert!(applied.reinitialize_ring && applied.ignored.is_none());
        assert!(md.replay.hot_extents.contains(&0), "{scenario}");
        let hot = md.replay.hot_extents.len() as u64;
        assert_eq!(md.bitmap.slots(), slots);
        for slot in 0..slots {
            assert_eq!(md.bitmap.weight(slot), 1024 * hot, "{scenario}");
        }
        let again = image::read_metadata(&device, Kind::Internal, None, Extent::Exact).unwrap();
        assert!(again.superblock.is_clean());
        assert!(again.superblock.flags.contains(DeviceFlags::PRIMARY_IND));
        assert_eq!(again.replay.outcome, al::Outcome::Clean);
    }
}

#[test]
fn clean_kernel_metadata_passes_the_checks_of_an_attach() {
    let files = archive("kernel.tar.zst");
    for name in names(&files) {
        let device = device(&files, name);
        let kind = Kind::Internal;
        let (mut sb, ..) = image::read_superblock(&device, kind, None).unwrap();
        let node_id = u8::try_from(sb.node_id).ok();
        let check = DriverCheck { kind, device_bytes: device.size, node_id };
        if !sb.is_clean() {
            assert_eq!(sb.check_driver(&check).unwrap_err().code(), 165);
            sb.mark_clean();
        }
        sb.check_driver(&check).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}
