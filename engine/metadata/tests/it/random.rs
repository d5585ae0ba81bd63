//! Arbitrary bytes into every decoder: an answer or an error, never a panic.

use crate::common::Sparse;
use palisade_metadata::image::{self, BlockIo, Extent};
use palisade_metadata::*;
use proptest::prelude::*;

fn block() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), BLOCK_SIZE),
        Just(vec![0xff; BLOCK_SIZE]),
        Just(vec![0; BLOCK_SIZE]),
    ]
}

fn as_block(bytes: &[u8]) -> Block {
    bytes.try_into().unwrap()
}

fn sealed(bytes: &[u8]) -> Block {
    let mut block = as_block(bytes);
    block[..4].copy_from_slice(&0x69cb_65a2u32.to_be_bytes());
    block[8..12].fill(0);
    let crc = crc32c_raw(0, &block);
    block[8..12].copy_from_slice(&crc.to_be_bytes());
    block
}

const KINDS: [Kind; 3] = [Kind::Internal, Kind::FlexExternal, Kind::Indexed(1)];

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn superblocks(
        bytes in block(),
        magic in 0x6au8..0x6f,
        kind in 0usize..3,
        size in any::<u64>(),
        small in any::<bool>(),
    ) {
        let mut bytes = bytes;
        bytes[0x3c..0x40].copy_from_slice(&[0x83, 0x74, 0x02, magic]);
        let size = if small { size % (1 << 30) } else { size };
        if let Ok(sb) = Superblock::decode(&as_block(&bytes)) {
            prop_assert_eq!(Superblock::decode(&sb.encode()).map(|s| s.encode()), Ok(sb.encode()));
            let kind = KINDS[kind];
            let _ = sb.check_tool(kind, size);
            let check = DriverCheck { kind, device_bytes: size, node_id: Some(3) };
            let _ = sb.check_driver(&check);
            let mut clean = sb.clone();
            clean.mark_clean();
            let _ = clean.check_driver(&check);
            let _ = Layout::of_superblock(kind, size, None, &sb);
            let _ = sb.tool_usable_sectors(kind, size);
            let _ = gi::show_gi(&sb, 31);
            let _ = sb.convert_to_v08(kind, size);
            let _ = sb.convert_to_v09(kind, size);
            let _ = sb.free_bitmap_slot();
        }
    }

    /// Fields that pass more checks: the geometry is sane, everything else arbitrary.
    #[test]
    fn devices(
        bytes in block(),
        al in proptest::collection::vec(block(), 8),
        bitmap in block(),
        kind in 0usize..3,
        peers in 0u32..34,
        shift in 10u32..22,
        la in any::<u64>(),
    ) {
        let kind = KINDS[kind];
        let device = Sparse::new(if kind == Kind::Indexed(1) { 256 << 20 } else { 3 << 20 });
        let geometry = Geometry { bytes_per_bit: 1 << shift, ..Geometry::new(peers) };
        let Ok(layout) = Layout::compute(kind, device.size, None, geometry) else { return Ok(()) };
        let mut bytes = as_block(&bytes);
        bytes[0x3c..0x40].copy_from_slice(&[0x83, 0x74, 0x02, 0x6d]);
        let mut sb = Superblock::decode(&bytes).unwrap();
        sb.set_layout(&layout);
        sb.effective_size_sectors = la;
        sb.node_id = 1;
        for (n, peer) in sb.peers.iter_mut().enumerate() {
            peer.bitmap_index = n as i32 - 1;
        }
        image::write_superblock(&device, &layout, &sb).unwrap();
        for (n, block) in al.iter().enumerate() {
            let block = if n % 3 == 0 { as_block(block) } else { sealed(block) };
            device.write_at(layout.al_block_pos(n as u64), &block).unwrap();
        }
        device.write_at(layout.bitmap_pos(), &bitmap).unwrap();
        image::find_existing(&device).unwrap();
        for extent in [Extent::Exact, Extent::Padded] {
            if let Ok(md) = image::read_metadata(&device, kind, None, extent) {
                let header = DumpHeader { date: "", host: "", command: "", moved: None };
                dump(&mut Vec::new(), &header, &md.superblock, &md.layout, &md.bitmap, true).unwrap();
            }
        }
        let _ = image::apply_al(&device, kind, None);
        let _ = image::move_internal(&device, 2 << 20, image::Fill::Zeros);
    }

    #[test]
    fn transactions(bytes in block()) {
        let _ = al::Transaction::decode(&as_block(&bytes));
        let block = sealed(&bytes);
        let transaction = al::Transaction::decode(&block).unwrap();
        prop_assert_eq!(transaction.number.to_be_bytes(), &block[4..8]);
        let _ = transaction.encode();
    }

    #[test]
    fn rings(blocks in proptest::collection::vec(block(), 0..9), a in 0u32..5, b in 0u32..5) {
        let area: Vec<u8> = blocks.iter().flat_map(|b| sealed(b)).collect();
        let _ = al::replay(a, b, &area);
        let _ = al::replay_old(a * 100, |n| Ok::<_, ()>(blocks.get(n as usize).map_or([0; 4096], |b| as_block(b))));
        let _ = al::replay_pmem(a * 1000, 8, |_| Ok::<_, ()>([7; 4096]));
    }

    #[test]
    fn dumps(text in "\\PC{0,200}", cut in any::<prop::sample::Index>()) {
        let _ = parse_dump(&text, Version::V09);
        let start = "version \"v08\"; uuid { 0x0000000000000004; 0x0000000000000000; \
            0x0000000000000000; 0x0000000000000000; flags 0x00000080; } la-size-sect 8; \
            bm-byte-per-bit 4096; device-uuid 0x0000000000000000; la-peer-max-bio-size 0; \
            al-stripes 1; al-stripe-size-4k 8; bm { 9223372036854775807 times 0xFFFFFFFFFFFFFFFF; \
            9223372036854775807 times 0xFFFFFFFFFFFFFFFF; 1 times 0xFFFFFFFFFFFFFFFF; }";
        prop_assert!(parse_dump(start, Version::V08).is_ok());
        let head = &start[..cut.index(start.len())];
        let _ = parse_dump(&(head.to_owned() + &text), Version::V08);
        let broken = head.to_owned() + " ?";
        prop_assert!(parse_dump(&broken, Version::V08).is_err());
    }

    /// The bitmap against a plain model.
    #[test]
    fn bitmap_operations(
        slots in 1u32..33,
        sectors in 1u64..40_000,
        ops in proptest::collection::vec((0u8..7, 0usize..32, 0u64..42_000, 0u64..900), 1..25),
    ) {
        let mut bitmap = Bitmap::new(slots, sectors, 4096).unwrap();
        let bits = bitmap.bits() as usize;
        let mut model = vec![vec![false; bits]; slots as usize];
        for (op, slot, start, len) in ops {
            let slot = slot % slots as usize;
            let end = start + len;
            let before = model[slot].clone();
            let touching = |b: u64| b * 8 < end.min(sectors) && (b + 1) * 8 > start && len > 0;
            let inside = |b: u64| b * 8 >= start && ((b + 1) * 8).min(sectors) <= end;
            let changed = match op {
                0 | 1 => {
                    (0..bits).filter(|b| touching(*b as u64)).for_each(|b| model[slot][b] = true);
                    bitmap.set_out_of_sync(slot, start..end)
                }
                2 | 3 => {
                    (0..bits).filter(|b| inside(*b as u64)).for_each(|b| model[slot][b] = false);
                    bitmap.set_in_sync(slot, start..end)
                }
                4 => {
                    let from = (slot + 1) % slots as usize;
                    model[slot] = model[from].clone();
                    bitmap.copy_slot(from, slot)
                }
                5 => {
                    model[slot].fill(true);
                    bitmap.set_all(slot)
                }
                _ => {
                    model[slot].fill(false);
                    bitmap.clear_all(slot)
                }
            };
            let differs = before.iter().zip(&model[slot]).filter(|(a, b)| a != b).count();
            prop_assert_eq!(changed, differs as u64);
            let weight = model[slot].iter().filter(|b| **b).count();
            prop_assert_eq!(bitmap.weight(slot), weight as u64);
            let next = (start as usize..bits).find(|b| model[slot][*b]);
            prop_assert_eq!(bitmap.next_set(slot, start), next.map(|b| b as u64));
        }
        let mut copy = Bitmap::new(slots, sectors, 4096).unwrap();
        let dirty = bitmap.take_dirty();
        for nr in 0..bitmap.disk_blocks() {
            let mut block = [0; BLOCK_SIZE];
            bitmap.encode_block(nr, &mut block);
            prop_assert!(dirty.contains(&nr) || block == [0; BLOCK_SIZE]);
            copy.load_block(nr, &block);
        }
        for slot in 0..slots as usize {
            prop_assert_eq!(copy.words(slot), bitmap.words(slot));
            prop_assert_eq!(copy.weight(slot), bitmap.weight(slot));
        }
    }
}
