//! Metadata made by the reference tool: decode, dump, apply, convert, move, create, restore.

use std::collections::BTreeMap;

use crate::common::{Sparse, archive, header, layout, tool_image};
use palisade_metadata::gi::{dstate, gi_line, pretty_kib, show_gi};
use palisade_metadata::image::{self, BlockIo, Extent, Fill, Metadata};
use palisade_metadata::*;

type Files = BTreeMap<String, Vec<u8>>;

fn text<'a>(files: &'a Files, path: &str) -> &'a str {
    std::str::from_utf8(files.get(path).unwrap_or_else(|| panic!("{path}"))).unwrap()
}

fn dump_text(header: &DumpHeader<'_>, md: &Metadata) -> String {
    let mut out = Vec::new();
    dump(&mut out, header, &md.superblock, &md.layout, &md.bitmap, true).unwrap();
    String::from_utf8(out).unwrap()
}

#[track_caller]
fn assert_text(ours: &str, expected: &str, what: &str) {
    for (n, (a, b)) in ours.lines().zip(expected.lines()).enumerate() {
        assert_eq!(a, b, "{what}, line {}", n + 1);
    }
    assert_eq!(ours, expected, "{what}");
}

fn images(files: &Files) -> Vec<String> {
    let names = files.keys().filter_map(|f| f.strip_suffix(".layout"));
    names.filter(|f| !f.contains("out-9.22")).map(str::to_owned).collect()
}

fn case_dir(image: &str) -> &str {
    image.rsplit_once('/').unwrap().0
}

#[test]
fn every_image_decodes_and_encodes_to_the_same_bytes() {
    let files = archive("tool.tar.zst");
    let mut cases = std::collections::BTreeSet::new();
    for name in images(&files) {
        let (device, kind) = tool_image(&files, &name);
        let recorded = layout(&files[&format!("{name}.layout")]);
        let md = image::read_metadata(&device, kind, None, Extent::Padded).unwrap();
        let sb = &md.superblock;
        assert_eq!(sb.version.name(), recorded["format"], "{name}");
        for (key, ours) in [
            ("md_offset", md.layout.md_offset),
            ("al_offset", md.layout.al_pos()),
            ("bm_offset", md.layout.bitmap_pos()),
            ("area_offset", md.layout.area_start()),
        ] {
            assert_eq!(ours.to_string(), recorded[key], "{name}: {key}");
        }
        // Superblock, layout and bitmap as we would write them.
        let copy = device.clone();
        image::write_superblock(&copy, &md.layout, sb).unwrap();
        let blocks: Vec<u64> = (0..md.bitmap.disk_blocks()).collect();
        image::write_bitmap_blocks(&copy, &md.layout, &md.bitmap, &blocks).unwrap();
        assert_eq!(copy.differs(&device), [], "{name}");
        let computed = Layout::compute(kind, device.size, None, sb.geometry()).unwrap();
        assert_eq!(computed, md.layout, "{name}");
        // The exact bitmap agrees with the padded one.
        let exact = image::read_bitmap(&device, sb, &md.layout, Extent::Exact).unwrap();
        for slot in 0..exact.slots() {
            assert_eq!(exact.weight(slot), md.bitmap.count(slot, 0..exact.bits()), "{name}");
        }
        let found = image::find_existing(&device).unwrap();
        assert!(
            found.iter().any(|f| f.kind == kind && f.version() == Some(sb.version) && f.invalid.is_none()),
            "{name}: {found:?}"
        );
        if sb.is_clean() && device.size >= 2 << 20 {
            let check = DriverCheck { kind, device_bytes: device.size, node_id: None };
            sb.check_driver(&check).unwrap();
        }
        cases.insert(case_dir(&name).to_owned());
    }
    assert_eq!(cases.len(), 22);
}

#[test]
fn dumps_are_byte_identical() {
    let files = archive("tool.tar.zst");
    let mut compared = 0;
    for name in images(&files) {
        let (dir, image) = name.rsplit_once('/').unwrap();
        let dumps: &[&str] = match image {
            "image" => &["dump-md", "dump-md-unclean"],
            "image-after" => &["dump-md-after"],
            "image-v09" => &["dump-md-v09"],
            _ => &[],
        };
        for dump in dumps {
            let path = format!("{dir}/expected/{dump}.stdout");
            // The newer tool is wrong about the last extent.
            let older = path.replace("expected", "out-9.22");
            let last = dir.contains("40-") && files.contains_key(&older);
            let Some(expected) = files.get(&path) else { continue };
            let expected = std::str::from_utf8(expected).unwrap();
            let fixed = if last { format!("{dir}/out-9.22/{image}") } else { name.clone() };
            let fixed = if files.contains_key(&format!("{fixed}.zst")) { fixed } else { name.clone() };
            let (device, kind) = tool_image(&files, &fixed);
            let md = image::read_metadata(&device, kind, None, Extent::Padded).unwrap();
            let mut expected = expected.to_owned();
            if last {
                // 9.22 does not know members.
                expected = text(&files, &older).to_owned();
                expected = with_members(&expected);
            }
            assert_text(&dump_text(&header(&expected), &md), &expected, &path);
            compared += 1;
            if md.superblock.is_clean() {
                let parsed = parse_dump(&expected, md.superblock.version).unwrap();
                let mut sb = parsed.superblock;
                sb.set_layout(&md.layout);
                sb.al_nr_extents = md.superblock.al_nr_extents;
                assert_eq!(sb, md.superblock, "{path}");
            } else {
                let mut none = Vec::new();
                let refused = palisade_metadata::dump(
                    &mut none,
                    &header(&expected),
                    &md.superblock,
                    &md.layout,
                    &md.bitmap,
                    false,
                );
                assert!(matches!(refused, Err(DumpError::Unclean)) && none.is_empty());
                assert!(parse_dump(&expected, md.superblock.version).is_err());
            }
        }
    }
    assert!(compared >= 20, "{compared}");
}

fn with_members(dump: &str) -> String {
    let mut out = String::new();
    for line in dump.lines() {
        out += line;
        out += "\n";
        if line.starts_with("flags 0x") {
            out += "members 0x0000000000000000;\n";
        }
    }
    out
}

#[test]
fn applying_the_log_gives_the_recorded_image() {
    let files = archive("tool.tar.zst");
    let mut applied = 0;
    for name in images(&files) {
        let dir = case_dir(&name);
        let number = dir.strip_prefix("cases/").unwrap();
        if !name.ends_with("/image") || !(number.starts_with('2') || number.starts_with("40")) {
            continue;
        }
        let older = format!("{dir}/out-9.22/image-after");
        let known = files.contains_key(&format!("{older}.zst"));
        let after = if known { older } else { format!("{dir}/image-after") };
        let (device, kind) = tool_image(&files, &name);
        let (expected, _) = tool_image(&files, &after);
        let (result, md) = image::apply_al(&device, kind, None).unwrap();
        assert_eq!(device.differs(&expected), [], "{name}");
        assert!(md.superblock.is_clean());
        let stderr = format!("{dir}/out-9.22/apply-al.stderr");
        let stderr =
            if files.contains_key(&stderr) { stderr } else { format!("{dir}/expected/apply-al.stderr") };
        let mut ours = String::new();
        if md.replay.invalid_blocks > 0 {
            ours += &format!("{} corrupt AL transactions found\n", md.replay.invalid_blocks);
        }
        if result.marked_bits > 0 {
            let size = pretty_kib(result.marked_bytes / 1024);
            ours += &format!("Marked additional {size} as out-of-sync based on AL.\n");
        }
        assert_eq!(ours + "exit code 0\n", text(&files, &stderr), "{name}");
        // Again: nothing changes.
        image::apply_al(&device, kind, None).unwrap();
        assert_eq!(device.differs(&expected), [], "{name}");
        applied += 1;
    }
    assert_eq!(applied, 8);
}

#[test]
fn created_metadata_is_that_of_the_tool() {
    let files = archive("tool.tar.zst");
    for (case, version, peers) in [
        ("01-v08-internal-64m", Version::V08, 1),
        ("02-v09-internal-1g-p1", Version::V09, 1),
        ("03-v09-internal-1t-p7", Version::V09, 7),
        ("04-v09-internal-unaligned-p2", Version::V09, 2),
        ("05-v09-indexed1-p3", Version::V09, 3),
        ("06-v08-flexext-1m", Version::V08, 1),
        ("33-v09-preprovisioned", Version::V09, 3),
    ] {
        let (expected, kind) = tool_image(&files, &format!("cases/{case}/image"));
        let layout = Layout::compute(kind, expected.size, None, Geometry::new(peers)).unwrap();
        let mut sb = Superblock::fresh(version, &layout);
        if case.starts_with("06") {
            sb.max_peer_bio_size = 131_072;
        }
        if case.starts_with("33") {
            sb.effective_size_sectors = (60 << 20) / SECTOR_SIZE;
            sb.max_peer_bio_size = 1 << 20;
            sb.current_uuid = 0x1234_5678_9ABC_DEF0;
            sb.flags |= DeviceFlags::CONSISTENT | DeviceFlags::WAS_UP_TO_DATE;
            for (n, peer) in sb.peers.iter_mut().enumerate() {
                peer.flags.set(PeerFlags::OUTDATED, true);
                peer.flags.set(PeerFlags::DEVICE_SEEN, n == 1 || n == 2);
            }
        }
        let device = Sparse::new(expected.size);
        // Leftovers in the area must vanish.
        device.write_at(layout.bitmap_pos() + 8192, &[0xa5; BLOCK_SIZE]).unwrap();
        device.write_at(layout.al_block_pos(3), &[0xa5; BLOCK_SIZE]).unwrap();
        image::create_md(&device, &layout, &sb).unwrap();
        assert_eq!(device.differs(&expected), [], "{case}");
    }
}

#[test]
fn restoring_a_dump_gives_the_same_image() {
    let files = archive("tool.tar.zst");
    for case in ["10-v08-internal-bitmap", "11-v09-flexext-p3-bitmap", "12-v09-internal-p31"] {
        let (expected, kind) = tool_image(&files, &format!("cases/{case}/image"));
        let dump = text(&files, &format!("cases/{case}/expected/dump-md.stdout"));
        let version = if case.contains("v08") { Version::V08 } else { Version::V09 };
        let parsed = parse_dump(dump, version).unwrap();
        let device = Sparse::new(expected.size);
        let md = image::restore_md(&device, kind, None, None, &parsed).unwrap();
        assert_eq!(device.differs(&expected), [], "{case}");
        assert_text(&dump_text(&header(dump), &md), dump, case);
    }
}

#[test]
fn input_dumps_parse_and_broken_ones_name_the_line() {
    let files = archive("tool.tar.zst");
    let mut parsed = 0;
    for (path, bytes) in files.iter().filter(|(path, _)| path.starts_with("inputs/")) {
        let text = std::str::from_utf8(bytes).unwrap();
        let (version, other) = if text.contains("\"v08\"") {
            (Version::V08, Version::V09)
        } else {
            (Version::V09, Version::V08)
        };
        let dump = parse_dump(text, version).unwrap_or_else(|e| panic!("{path}: {e}"));
        assert_eq!(dump.bitmaps.len(), dump.superblock.max_peers as usize, "{path}");
        assert!(matches!(parse_dump(text, other), Err(ParseError::Version { .. })), "{path}");
        let broken = text.replacen("device-uuid 0x", "device-uuid ", 1);
        let line = 1 + text[..text.find("device-uuid").unwrap()].matches('\n').count();
        let error = parse_dump(&broken, version).unwrap_err().to_string();
        assert!(error.contains(&format!("Parse error in line {line}: a 16-digit")), "{error}");
        parsed += 1;
    }
    assert!(parsed > 5);
}

#[test]
fn generation_identifiers_print_as_recorded() {
    let files = archive("tool.tar.zst");
    let mut compared = 0;
    for name in images(&files) {
        let (dir, image) = name.rsplit_once('/').unwrap();
        if image != "image" {
            continue;
        }
        let (device, kind) = tool_image(&files, &name);
        let (sb, ..) = image::read_superblock(&device, kind, None).unwrap();
        for (path, bytes) in files.range(format!("{dir}/expected/")..format!("{dir}/expected0")) {
            let file = path.rsplit_once('/').unwrap().1;
            let Some(file) = file.strip_suffix(".stdout") else { continue };
            let node = |rest: &str| rest.trim_start_matches('.').parse().unwrap_or(0);
            let ours = if file == "read-dev-uuid" {
                format!("{:016X}\n", sb.device_uuid)
            } else if file == "dstate" {
                format!("{}\n", dstate(&sb))
            } else if let Some(rest) = file.strip_prefix("get-gi") {
                if rest.starts_with('-') {
                    continue;
                }
                format!("{}\n", gi_line(&sb, node(rest)))
            } else if let Some(rest) = file.strip_prefix("show-gi") {
                show_gi(&sb, node(rest))
            } else {
                continue;
            };
            assert_text(&ours, std::str::from_utf8(bytes).unwrap(), path);
            compared += 1;
        }
    }
    assert!(compared > 40, "{compared}");
}

#[test]
fn conversion_gives_the_recorded_images() {
    let files = archive("tool.tar.zst");
    let dir = "cases/31-convert-v08-v09-v08";
    let (v08, kind) = tool_image(&files, &format!("{dir}/image-v08"));
    let (v09, _) = tool_image(&files, &format!("{dir}/image-v09"));
    let (again, _) = tool_image(&files, &format!("{dir}/image-v08-again"));
    let convert = |device: &Sparse, expected: &Sparse, to_v09: bool| {
        let (sb, layout, _) = image::read_superblock(device, kind, None).unwrap();
        let new =
            if to_v09 { sb.convert_to_v09(kind, device.size) } else { sb.convert_to_v08(kind, device.size) };
        let copy = device.clone();
        image::write_superblock(&copy, &layout, &new.unwrap()).unwrap();
        assert_eq!(copy.differs(expected), []);
    };
    convert(&v08, &v09, true);
    convert(&v09, &again, false);
}

#[test]
fn metadata_moves_with_a_grown_device() {
    let files = archive("tool.tar.zst");
    let dir = "cases/32-v09-resize-256m-1g";
    let (mut device, kind) = tool_image(&files, &format!("{dir}/image"));
    let (expected, _) = tool_image(&files, &format!("{dir}/image-after"));
    let last_bytes = std::mem::replace(&mut device.size, expected.size);
    assert!(image::read_superblock(&device, kind, None).is_err());
    let md = image::read_moved(&device, last_bytes, Extent::Padded).unwrap();
    let dump = text(&files, &format!("{dir}/expected/dump-md-moved.stdout"));
    let moved = Moved {
        device: "md.img",
        current_bytes: device.size,
        last_bytes,
        expected_md_offset: md_offset(kind, device.size).unwrap(),
    };
    let header = DumpHeader { moved: Some(moved), ..header(dump) };
    assert_text(&dump_text(&header, &md), dump, "moved");
    image::move_internal(&device, last_bytes, Fill::Zeros).unwrap();
    assert_eq!(device.differs(&expected), []);
}

/// Runs `work` on copies of `device` that fail after 0, 1, 2, … writes; calls `after` with each.
fn with_crashes(
    device: &Sparse,
    work: impl Fn(&Sparse) -> Result<(), image::ImageError>,
    after: impl Fn(&Sparse),
) {
    for n in 0..1000 {
        let copy = device.clone();
        copy.writes_left.replace(Some(n));
        let done = work(&copy).is_ok();
        copy.writes_left.replace(None);
        after(&copy);
        if done {
            assert!(n > 2);
            return;
        }
    }
    panic!("never done");
}

#[test]
fn an_interrupted_apply_can_be_repeated() {
    let files = archive("tool.tar.zst");
    let dir = "cases/20-v09-al-basic";
    let (device, kind) = tool_image(&files, &format!("{dir}/image"));
    let (expected, _) = tool_image(&files, &format!("{dir}/image-after"));
    let apply = |device: &Sparse| image::apply_al(device, kind, None).map(|_| ());
    with_crashes(&device, apply, |crashed| {
        apply(crashed).unwrap();
        assert_eq!(crashed.differs(&expected), []);
    });
}

#[test]
fn an_interrupted_create_leaves_no_valid_metadata() {
    let files = archive("tool.tar.zst");
    let (device, kind) = tool_image(&files, "cases/12-v09-internal-p31/image");
    let layout = Layout::compute(kind, device.size, None, Geometry::new(31)).unwrap();
    let fresh = Superblock::fresh(Version::V09, &layout);
    let (old, ..) = image::read_superblock(&device, kind, None).unwrap();
    let create = |device: &Sparse| image::create_md(device, &layout, &fresh);
    with_crashes(&device, create, |crashed| match image::read_superblock(crashed, kind, None) {
        Ok((sb, ..)) if sb == old => assert_eq!(crashed.differs(&device), []),
        Ok((sb, ..)) => assert_eq!(sb, fresh),
        Err(error) => assert!(matches!(error, image::ImageError::NoMetadata(_)), "{error}"),
    });
}

/// Growing by less than the metadata is large: the new place overlaps the old one.
#[test]
fn an_interrupted_move_is_the_old_metadata_the_new_one_or_a_full_sync() {
    let files = archive("tool.tar.zst");
    let (device, kind) = tool_image(&files, "cases/12-v09-internal-p31/image");
    let (mut day0, layout, _) = image::read_superblock(&device, kind, None).unwrap();
    day0.peers[20] = PeerSlot { bitmap_uuid: 77, ..PeerSlot::EMPTY };
    image::write_superblock(&device, &layout, &day0).unwrap();
    for grown in [4096, 64 << 10, 512 << 10, 8 << 20] {
        let last_bytes = device.size;
        let mut device = device.clone();
        device.size += grown;
        let old = image::read_moved(&device, last_bytes, Extent::Exact).unwrap();
        let whole = device.clone();
        image::move_internal(&whole, last_bytes, Fill::Zeros).unwrap();
        let new = image::read_metadata(&whole, kind, None, Extent::Exact).unwrap();
        let same = |a: &Bitmap, b: &Bitmap| (0..31).all(|slot| a.words(slot) == b.words(slot));
        assert!(same(&new.bitmap, &old.bitmap));
        assert_eq!(new.superblock.current_uuid, old.superblock.current_uuid);
        let go = |device: &Sparse| image::move_internal(device, last_bytes, Fill::Zeros).map(|_| ());
        with_crashes(&device, go, |crashed| match image::read_metadata(crashed, kind, None, Extent::Exact) {
            Ok(md) if md.superblock == new.superblock => assert!(same(&md.bitmap, &new.bitmap)),
            Ok(md) => {
                for (now, before) in md.superblock.peers.iter().zip(&old.superblock.peers) {
                    let kept = before.slot().map_or(0, |_| before.bitmap_uuid);
                    assert_eq!(now.bitmap_uuid, kept);
                    assert!(now.flags.contains(PeerFlags::FULL_SYNC));
                }
                image::apply_al(crashed, kind, None).unwrap();
            }
            Err(_) => {
                let md = image::read_moved(crashed, last_bytes, Extent::Exact).unwrap();
                assert!(md.superblock == old.superblock && same(&md.bitmap, &old.bitmap));
            }
        });
    }
}

#[test]
fn a_released_slot_keeps_its_bits_and_gets_those_of_a_slot_nobody_uses() {
    let files = archive("tool.tar.zst");
    let (device, kind) = tool_image(&files, "cases/11-v09-flexext-p3-bitmap/image");
    let md = image::read_metadata(&device, kind, None, Extent::Exact).unwrap();
    let mut sb = md.superblock;
    for (used, peer) in sb.peers.iter_mut().enumerate() {
        peer.bitmap_index = if used == 5 { 1 } else { -1 };
    }
    let release = |device: &Sparse, sb: &Superblock| {
        image::release_slot(device, sb, &md.layout, 1).unwrap();
        image::read_bitmap(device, sb, &md.layout, Extent::Exact).unwrap()
    };
    let shared = release(&device.clone(), &sb);
    for bit in 0..shared.bits() {
        assert_eq!(shared.test(1, bit), md.bitmap.test(0, bit) || md.bitmap.test(1, bit), "{bit}");
        assert_eq!(
            (shared.test(0, bit), shared.test(2, bit)),
            (md.bitmap.test(0, bit), md.bitmap.test(2, bit))
        );
    }
    assert!(shared.weight(1) > md.bitmap.weight(1));
    (sb.peers[0].bitmap_index, sb.peers[2].bitmap_index) = (0, 2);
    let full = release(&device.clone(), &sb);
    assert_eq!((full.weight(1), full.weight(0)), (full.bits(), md.bitmap.weight(0)));
}

#[test]
fn an_interrupted_restore_leaves_the_old_metadata_none_or_the_new() {
    let files = archive("tool.tar.zst");
    let (device, kind) = tool_image(&files, "cases/12-v09-internal-p31/image");
    let dump =
        text(&files, "cases/12-v09-internal-p31/expected/dump-md.stdout").replace("peers 31;", "peers 7;");
    let dump = &dump[..dump.find("bitmap[7] {").unwrap()];
    let dump = dump.replace("bitmap-index 1", "bitmap-index 0");
    let parsed = parse_dump(&dump, Version::V09).unwrap();
    let (old, ..) = image::read_superblock(&device, kind, None).unwrap();
    let restore = |device: &Sparse| image::restore_md(device, kind, None, None, &parsed).map(|_| ());
    let whole = device.clone();
    restore(&whole).unwrap();
    with_crashes(&device, restore, |crashed| match image::read_superblock(crashed, kind, None) {
        Ok((sb, ..)) if sb == old => assert_eq!(crashed.differs(&device), []),
        Ok(_) => assert_eq!(crashed.differs(&whole), []),
        Err(error) => assert!(matches!(error, image::ImageError::NoMetadata(_)), "{error}"),
    });
}
