//! libFuzzer target; see `entries/wire.rs`.
#![no_main]

#[allow(dead_code)]
#[path = "../entries/wire.rs"]
mod entries;

libfuzzer_sys::fuzz_target!(|input: &[u8]| entries::wire_bitmap(input));
