//! The DRBD wire protocol: bytes in, structs out (`spec/wire-protocol.md`).
//!
//! Everything two nodes say to each other over their two TCP streams is a [`Packet`] here. This
//! crate knows no sockets, no clock and no cryptography, and never copies bulk data: the fixed
//! part of a packet becomes a struct, digests and data blocks stay [`bytes::Bytes`] beside it.
//!
//! Reading a stream:
//! 1. [`decode_header`] on what has arrived; `None` means "read more".
//! 2. [`check_header`] refuses a packet that may not arrive on this stream, under this agreed
//!    protocol version (APV) or with this length, before anything of it is buffered.
//! 3. [`decode`] on the whole payload, or [`fixed_len`] and [`decode_fixed`] to read the bulk data
//!    into a buffer of the caller's own.
//!
//! Writing: [`encode`] appends header, fixed part and digest; the caller sends the bulk data after.
//!
//! [`DecodeCtx`] holds what both ends agreed on. It changes in the middle of a stream (features,
//! P_PROTOCOL_UPDATE), so packets are to be decoded one by one, in order.
#![forbid(unsafe_code)]

pub mod bitmap;
mod bits;
mod body;
mod cmd;
mod codec;
pub mod enums;
mod error;
mod header;
mod negotiate;
pub mod packets;
mod state_word;
mod twopc;
pub mod vli;

pub use bits::{DpFlags, Features, TwopcFlags, UuidFlags};
pub use cmd::{Cmd, Packet, Stream, Streams, Tail};
pub use codec::{DecodeCtx, check_header, decode, decode_fixed, encode, fixed_len, max_payload, min_payload};
pub use enums::{AfterSb, ConnState, DiskState, ReplState, Role, StateReply, WireProtocol};
pub use error::WireError;
pub use header::{Header, HeaderKind, decode_header};
pub use negotiate::NegotiationError;
pub use packets::*;
pub use state_word::StateWord;
pub use twopc::{TwopcBody, TwopcReply, TwopcRequest};

/// Lowest protocol version any kernel accepts; in force until features are agreed (§3, §4.1).
pub const APV_MIN: u32 = 86;
/// Newest protocol version described by the specification (§1.3).
pub const APV_MAX: u32 = 124;
/// Newest version of the 8.4 family (§1.3).
pub const APV_MAX_84: u32 = 101;
/// First version of DRBD 9: node ids, two-phase commit, new disk state numbers (§11.2).
pub const APV_V9: u32 = 110;
/// Header plus payload of one bitmap packet never exceed this many bytes (§1.1).
pub const BITMAP_PACKET_MAX: usize = 4096;
/// Length in bytes of every fixed algorithm-name field (§1.1).
pub const ALG_FIELD_LEN: usize = 64;
/// Node ids are 0..32 (§1.1).
pub const PEERS_MAX: usize = 32;
/// History UUIDs a DRBD 9 node sends (§1.1).
pub const HISTORY_UUIDS: usize = 32;
/// Longest digest in bytes that is accepted; no hash the kernel offers is longer.
pub const DIGEST_LEN_MAX: usize = 64;
/// Bytes of an authentication challenge (§4.3).
pub const CHALLENGE_LEN: usize = 64;
/// block_id of resync traffic below APV 122 (§1.1).
pub const ID_SYNCER: u64 = u64::MAX;
/// P_OV_RESULT block_id "skipped", APV < 122 (§1.1).
pub const ID_SKIP: u64 = 4710;
/// P_OV_RESULT block_id "in sync", APV < 122 (§1.1).
pub const ID_IN_SYNC: u64 = 4711;
/// P_OV_RESULT block_id "out of sync", APV < 122 (§1.1).
pub const ID_OUT_OF_SYNC: u64 = 4712;
/// Current UUID of a device that was never synced; compared exactly (§1.1, §4.11).
pub const UUID_JUST_CREATED: u64 = 4;
/// "Was primary" bit of a UUID; ignored when UUIDs are compared (§1.1).
pub const UUID_PRIMARY: u64 = 1;
/// Added to a bitmap UUID to form a sync UUID, APV < 110 (§1.1).
pub const UUID_NEW_BM_OFFSET: u64 = 0x0001_0000_0000_0000;
/// Highest sector a packet may name: its byte offset still fits a signed 64 bit integer.
pub const SECTOR_MAX: u64 = (i64::MAX as u64) / 512;

/// Largest data block or read request in bytes under `apv` (§1.1).
#[must_use]
pub fn max_bio_size(apv: u32) -> u32 {
    match apv {
        0..=94 => 32 << 10,
        95..=99 => 128 << 10,
        _ => 1 << 20,
    }
}

/// Largest P_TRIM, P_ZEROES or P_WSAME in bytes: 128 MiB, 4 MiB without `ff:WSAME` (§1.1).
#[must_use]
pub fn max_batch_size(features: Features) -> u32 {
    if features.contains(Features::WSAME) { 128 << 20 } else { 4 << 20 }
}
