//! What is fuzzed of `palisade-wire`: any bytes may be refused, none may panic, and what is accepted
//! survives a round trip. Used by the libFuzzer targets and by an ordinary test.

use bytes::{Bytes, BytesMut};
use palisade_wire::bitmap::{Progress, Receiver, Sender};
use palisade_wire::{
    Cmd, CompressedBitmap, DecodeCtx, Features, Header, HeaderKind, Packet, Stream, check_header, decode,
    decode_header, encode, max_payload, min_payload,
};

/// Bytes in front of the packets that choose the context.
pub const PREFIX_LEN: usize = 8;

/// The first [`PREFIX_LEN`] bytes are APV, features (2), three digest lengths, stream and command. With
/// command 0 a stream of packets follows; with another the payload of a packet with a matching header.
pub fn wire_decode(input: &[u8]) {
    let Some((prefix, rest)) = input.split_first_chunk::<PREFIX_LEN>() else { return };
    let [apv, high, low, data, verify, csums, stream, cmd] = *prefix;
    let ctx = DecodeCtx {
        apv: apv.into(),
        features: Features(u16::from_be_bytes([high, low]).into()),
        data_digest_len: usize::from(data % 65),
        verify_digest_len: usize::from(verify % 65),
        csums_digest_len: usize::from(csums % 65),
    };
    let stream = if stream % 2 == 0 { Stream::Data } else { Stream::Control };
    match usize::from(cmd).checked_sub(1) {
        None => wire_stream(stream, &ctx, rest),
        Some(index) => {
            let kind = if ctx.apv >= 100 { HeaderKind::H100 } else { HeaderKind::H80 };
            let cmd = Cmd::ALL[index % Cmd::ALL.len()];
            let header_len = kind.header_len();
            wire_packet(
                &Header { kind, volume: Some(0), cmd, length: rest.len() as u32, header_len },
                stream,
                &ctx,
                rest,
            );
        }
    }
}

fn wire_stream(stream: Stream, ctx: &DecodeCtx, mut rest: &[u8]) {
    while let Ok(Some(header)) = decode_header(rest) {
        if check_header(&header, stream, ctx).is_err() {
            return;
        }
        let length = header.length as usize;
        assert!((min_payload(header.cmd, ctx)..=max_payload(header.cmd, ctx)).contains(&length));
        assert!(length <= (1 << 20) + 4096, "{} asks for {length} bytes", header.cmd);
        let Some(payload) = rest.get(header.header_len..header.header_len + length) else { return };
        rest = &rest[header.header_len + length..];
        wire_packet(&header, stream, ctx, payload);
    }
}

fn wire_packet(header: &Header, stream: Stream, ctx: &DecodeCtx, payload: &[u8]) {
    let Ok((packet, digest, bulk)) = decode(header, Bytes::copy_from_slice(payload), stream, ctx) else {
        return;
    };
    let mut out = BytesMut::new();
    encode(&packet, header.volume, ctx, &digest, bulk.len(), &mut out)
        .expect("what was received can be sent");
    out.extend_from_slice(&bulk);
    let again = decode_header(&out).expect("a header was written").expect("it is complete");
    let payload = out.freeze().slice(again.header_len..);
    let second = decode(&again, payload, stream, ctx).expect("what was sent can be received");
    assert_eq!(second, (packet, digest, bulk));
}

/// Feeds a receiver with arbitrary packets, and sends an arbitrary bitmap.
pub fn wire_bitmap(input: &[u8]) {
    let Some(([kind, size @ .., flags], rest)) = input.split_first_chunk::<5>() else { return };
    let kind = if kind % 2 == 0 { HeaderKind::H100 } else { HeaderKind::H80 };
    let [high, middle, low] = *size;
    // Enough for several packets, few enough for many runs per second.
    let bits = u64::from(u32::from_be_bytes([0, high, middle, low])) % 70_000;
    receive(bits, kind, rest);
    send(bits, kind, flags % 2 == 0, rest);
}

/// Each packet: one byte "plain or encoding", two bytes length.
fn receive(bits: u64, kind: HeaderKind, mut rest: &[u8]) {
    let mut receiver = Receiver::new(bits, kind);
    while let Some(([encoding, high, low], tail)) = rest.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes([*high, *low]) % 4096).min(tail.len());
        let (packet, tail) = tail.split_at(length);
        rest = tail;
        let progress = if encoding & 0x0f == 0 {
            receiver.plain(packet, |index, word| {
                assert!(word != 0 && index * 64 + 64 - u64::from(word.leading_zeros()) <= bits);
            })
        } else {
            receiver.compressed(*encoding, packet, |first, count| {
                assert!(count > 0 && first + count <= bits);
            })
        };
        if progress != Ok(Progress::More) {
            return;
        }
    }
}

/// The bitmap repeats `pattern`, with a stretch of alternating bits, which does not compress.
fn send(bits: u64, kind: HeaderKind, use_rle: bool, pattern: &[u8]) {
    let bit = |bit: u64| match pattern.get((bit / 128) as usize % pattern.len().max(1)) {
        Some(byte) if byte % 4 == 3 => bit & 1 == 0,
        Some(byte) => byte >> (bit / 16 % 8) & 1 == 1,
        None => false,
    };
    let words: Vec<u64> = (0..bits.div_ceil(64))
        .map(|index| (0..64).filter(|i| index * 64 + i < bits && bit(index * 64 + i)).map(|i| 1 << i).sum())
        .collect();
    let mut received = vec![0u64; words.len()];
    let mut receiver = Receiver::new(bits, kind);
    let mut sender = Sender::new(bits, kind, use_rle);
    let mut last = Progress::More;
    let run_at = |at: u64| (words[(at / 64) as usize] >> (at % 64) & 1 == 1, 1);
    while let Some((packet, bulk)) = sender.next_packet(run_at, |index| words[index as usize]) {
        assert_eq!(last, Progress::More, "a packet behind the end");
        assert!(bulk.len() <= 4096);
        last = match packet {
            Packet::CompressedBitmap(CompressedBitmap { encoding }) => {
                receiver.compressed(encoding, &bulk, |first, count| {
                    for bit in first..first + count {
                        received[(bit / 64) as usize] |= 1 << (bit % 64);
                    }
                })
            }
            _ => receiver.plain(&bulk, |index, word| received[index as usize] |= word),
        }
        .expect("what was sent can be received");
    }
    assert_eq!(last, Progress::Done);
    assert_eq!(received, words);
}
