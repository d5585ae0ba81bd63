//! The fuzz entry functions on random and on damaged valid inputs, without a fuzzer.
#![allow(clippy::unwrap_used)]

#[path = "../../../fuzz/entries/wire.rs"]
mod entries;
#[path = "common/examples.rs"]
mod examples;

use entries::{PREFIX_LEN, wire_bitmap, wire_decode};
use palisade_wire::{Cmd, DecodeCtx, Features, Stream, Streams, max_payload, min_payload};

/// Xorshift; the seed is fixed, so a failure is found again.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

fn inputs() -> Vec<Vec<u8>> {
    let input = |(_, stream, apv, features, text, bulk): &examples::Example| {
        let [.., high, low] = features.to_be_bytes();
        let stream = u8::from(*stream == Stream::Control);
        let mut input = vec![*apv as u8, high, low, 0, 4, 4, stream, 0];
        input.extend(examples::bytes(text));
        input.resize(input.len() + bulk, 0x11);
        input
    };
    examples::EXAMPLES.iter().map(input).collect()
}

#[test]
fn valid_packets_with_damage() {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let inputs = inputs();
    for round in 0..20_000 {
        let mut input = inputs[round % inputs.len()].clone();
        // Mostly in the part that is interpreted.
        let head = input.len().min(PREFIX_LEN + 120);
        for _ in 0..numbers.below(4) {
            let (at, bit) = (numbers.below(head), numbers.below(8));
            match numbers.below(4) {
                0 => input[at] ^= 1 << bit,
                1 => input[at] = numbers.next() as u8,
                2 => input[at] = 0xff,
                _ => input.truncate(at.max(PREFIX_LEN + 1)),
            }
            if input.len() < head {
                break;
            }
        }
        if round % 7 == 0 {
            input.extend_from_slice(&inputs[numbers.below(inputs.len())][PREFIX_LEN..]);
        }
        wire_decode(&input);
    }
}

#[test]
fn random_payloads_behind_valid_headers() {
    let mut numbers = Numbers(0x2545_f491_4f6c_dd1d);
    for _ in 0..20_000 {
        let index = numbers.below(Cmd::ALL.len());
        let cmd = Cmd::ALL[index];
        let apv = [86u32, 88, 94, 96, 101, 118, 121, 124][numbers.below(8)];
        let control = u8::from(cmd.streams() == Streams::Control);
        let features = if numbers.below(4) == 0 { 0x0f } else { 0x3ff };
        let ctx = DecodeCtx {
            apv,
            features: Features(features),
            data_digest_len: 0,
            verify_digest_len: 4,
            csums_digest_len: 4,
        };
        let (min, max) = (min_payload(cmd, &ctx), max_payload(cmd, &ctx));
        // Now and then of a wrong length.
        let len = min + numbers.below((max - min + 1).min(600)) + usize::from(numbers.below(9) == 0);
        let [.., high, low] = features.to_be_bytes();
        let mut input = vec![apv as u8, high, low, 0, 4, 4, control, index as u8 + 1];
        // Few set bits, so that many fields have sensible values.
        let density = numbers.below(64);
        input.extend((0..len).map(|_| if numbers.below(64) < density { numbers.next() as u8 } else { 0 }));
        wire_decode(&input);
    }
}

#[test]
fn random_bytes() {
    let mut numbers = Numbers(0xdead_beef_cafe_f00d);
    for _ in 0..5_000 {
        let len = numbers.below(80);
        wire_decode(&numbers.bytes(len));
    }
}

#[test]
fn random_bitmaps() {
    let mut numbers = Numbers(0x0123_4567_89ab_cdef);
    for round in 0..3_000 {
        let len = 5 + numbers.below(60);
        let mut input = numbers.bytes(len);
        // Small and large devices.
        if round % 8 != 0 {
            input[1..3].fill(0);
        }
        wire_bitmap(&input);
    }
}
