//! Every packet kernels were recorded with is decoded and encoded again to the same bytes.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use common::{Agreement, Counts, Raw, captures, links};
use palisade_wire::bitmap::{Progress, Receiver, Sender};
use palisade_wire::{Cmd, DecodeCtx, Packet, decode, encode};

/// Payload bytes the specification calls undefined and recorded kernels did not zero; they are sent
/// as zero (§14, point 12).
fn undefined(cmd: Cmd) -> Option<std::ops::Range<usize>> {
    match cmd {
        // L5: "send 0, ignore"; kernels leave bytes of an earlier packet there (§6).
        Cmd::DataRequest | Cmd::RsDataRequest => Some(20..24),
        // L9: "8.4 and v9 leave it uninitialised for P_OUT_OF_SYNC" (§6).
        Cmd::OutOfSync => Some(12..16),
        _ => None,
    }
}

fn normalised(raw: &Raw) -> Vec<u8> {
    let mut bytes = raw.bytes.to_vec();
    if let Some(range) = undefined(raw.header.cmd) {
        let start = raw.header.header_len;
        bytes[start + range.start..start + range.end].fill(0);
    }
    bytes
}

/// One direction of a bitmap transfer that is being collected.
struct Transfer {
    receiver: Receiver,
    bits: u64,
    words: Vec<u64>,
    packets: Vec<(Packet, Bytes)>,
}

impl Transfer {
    fn add(&mut self, packet: Packet, bulk: Bytes) -> Progress {
        let words = &mut self.words;
        let progress = match &packet {
            Packet::CompressedBitmap(head) => {
                self.receiver.compressed(head.encoding, &bulk, |first, count| {
                    for bit in first..first + count {
                        words[(bit / 64) as usize] |= 1 << (bit % 64);
                    }
                })
            }
            _ => self.receiver.plain(&bulk, |index, word| words[index as usize] |= word),
        };
        self.packets.push((packet, bulk));
        progress.unwrap()
    }

    /// The same bitmap is sent in the same packets as the kernel's.
    fn check(&self, raw: &Raw) {
        let use_rle = matches!(self.packets[0].0, Packet::CompressedBitmap(_));
        let mut sender = Sender::new(self.bits, raw.header.kind, use_rle);
        let bit = |bit: u64| (self.words[(bit / 64) as usize] >> (bit % 64) & 1 == 1, 1);
        for expected in &self.packets {
            let sent = sender.next_packet(bit, |index| self.words[index as usize]);
            assert_eq!(sent.as_ref(), Some(expected));
        }
        assert_eq!(sender.next_packet(bit, |_| 0), None);
    }
}

#[derive(Default)]
struct Totals {
    packets: Counts,
    undefined: Counts,
    transfers: usize,
}

fn check_packet(raw: &Raw, ctx: &DecodeCtx, totals: &mut Totals) -> (Packet, Bytes) {
    let cmd = raw.header.cmd;
    let (packet, digest, bulk) = decode(&raw.header, raw.payload(), raw.stream, ctx).unwrap();
    let mut out = BytesMut::new();
    encode(&packet, raw.header.volume, ctx, &digest, bulk.len(), &mut out).unwrap();
    out.extend_from_slice(&bulk);
    let expected = normalised(raw);
    assert_eq!(out, expected, "{cmd} in frame {}", raw.frame);
    if expected != raw.bytes {
        *totals.undefined.entry(cmd.name()).or_default() += 1;
    }
    *totals.packets.entry(cmd.name()).or_default() += 1;
    (packet, bulk)
}

fn check_capture(path: &Path, totals: &mut Totals) {
    for link in links(path) {
        let mut agreement = Agreement::default();
        let mut transfers: BTreeMap<(usize, Option<u16>), Transfer> = BTreeMap::new();
        let mut d_size: BTreeMap<(usize, Option<u16>), u64> = BTreeMap::new();
        for raw in &link {
            let ctx = agreement.ctx(raw);
            let (packet, bulk) = check_packet(raw, &ctx, totals);
            agreement.observe(raw, &packet);
            let key = (raw.side, raw.header.volume);
            match packet {
                Packet::Sizes(sizes) => {
                    d_size.insert(key, sizes.d_size);
                }
                Packet::Bitmap | Packet::CompressedBitmap(_) => {
                    // Both have a disk; the device is as large as the smaller one.
                    let sectors = (0..2).filter_map(|side| d_size.get(&(side, key.1))).min().unwrap();
                    let bits = sectors.div_ceil(8);
                    let transfer = transfers.entry(key).or_insert_with(|| Transfer {
                        receiver: Receiver::new(bits, raw.header.kind),
                        bits,
                        words: vec![0; bits.div_ceil(64) as usize],
                        packets: Vec::new(),
                    });
                    if transfer.add(packet, bulk) == Progress::Done {
                        transfer.check(raw);
                        transfers.remove(&key);
                        totals.transfers += 1;
                    }
                }
                _ => {}
            }
        }
    }
}

/// Packets no recording contains; the round trips of `roundtrip.rs` have to do for them.
const NEVER_RECORDED: &[&str] = &[
    "P_SYNC_PARAM",
    "P_SUPERSEDED",
    "P_NEG_DREPLY",
    "P_NEG_RS_DREPLY",
    "P_DELAY_PROBE",
    "P_RS_CANCEL",
    "P_RETRY_WRITE",
    "P_RS_THIN_REQ",
    "P_RS_DEALLOCATED",
    "P_WSAME",
    "P_CONFIRM_STABLE",
    "P_RS_CANCEL_AHEAD",
    "P_RS_CSUM_DAGTAG_REQ",
    "P_RS_NEG_ACK",
    "P_ENABLE_REPLICATION_NEXT",
    "P_ENABLE_REPLICATION",
];

/// Packets in all recordings; an independent dissector counts the same.
const TOTAL: usize = 35358;

#[test]
fn every_recorded_packet_is_reproduced() {
    let mut totals = Totals::default();
    for path in captures() {
        let name = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().display().to_string();
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            check_capture(&path, &mut totals);
        }));
        assert!(checked.is_ok(), "the failure above is in {name}");
    }
    // The list above names nothing that need not be there.
    let undefined = [("P_DATA_REQUEST", 33), ("P_OUT_OF_SYNC", 249), ("P_RS_DATA_REQUEST", 20)];
    assert_eq!(totals.undefined, undefined.into());
    assert_eq!((totals.packets.values().sum::<usize>(), totals.transfers), (TOTAL, 165));
    let missing: Vec<_> =
        Cmd::ALL.iter().map(|cmd| cmd.name()).filter(|name| !totals.packets.contains_key(name)).collect();
    assert_eq!(missing, NEVER_RECORDED);
}
