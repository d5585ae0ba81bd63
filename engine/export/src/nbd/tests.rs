//! The session against hand-made clients: good ones, clumsy ones, hostile ones.
#![allow(clippy::unwrap_used, clippy::panic)]

use super::proto::{self, Reader};
use super::*;
use crate::{ALIGN, BufferPool, Errno, Extent, Op, Reply};
use bytes::{BufMut, Bytes};
use std::sync::Arc;

const SIZE: u64 = 1 << 20;

fn export(name: &str) -> Export {
    Export {
        name: name.into(),
        description: "a volume".into(),
        size: SIZE,
        block_min: 512,
        block_preferred: 4096,
        read_only: false,
        discard: true,
        rotational: false,
    }
}

fn session_of(exports: Vec<Export>) -> Session {
    Session::new(Arc::from(exports), Limits::default(), BufferPool::new(1 << 20))
}

fn output(session: &mut Session) -> Vec<u8> {
    session.take_output().concat()
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u64(proto::OPT_MAGIC);
    out.put_u32(kind);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out
}

fn go(kind: u32, name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_u32(name.len() as u32);
    data.put_slice(name.as_bytes());
    data.put_u16(wanted.len() as u16);
    wanted.iter().for_each(|w| data.put_u16(*w));
    option(kind, &data)
}

fn context(kind: u32, name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_u32(name.len() as u32);
    data.put_slice(name.as_bytes());
    data.put_u32(queries.len() as u32);
    for query in queries {
        data.put_u32(query.len() as u32);
        data.put_slice(query.as_bytes());
    }
    option(kind, &data)
}

/// Option replies: option, type, data.
fn replies(bytes: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let mut r = Reader(bytes);
    let mut all = Vec::new();
    while !r.0.is_empty() {
        assert_eq!(r.u64(), Some(proto::OPT_REPLY_MAGIC));
        let (option, kind) = (r.u32().unwrap(), r.u32().unwrap());
        all.push((option, kind, r.string().unwrap().to_vec()));
    }
    all
}

fn request(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u32(proto::REQUEST_MAGIC);
    out.put_u16(flags);
    out.put_u16(command);
    out.put_u64(cookie);
    out.put_u64(offset);
    out.put_u32(len);
    out
}

fn simple(error: u32, cookie: u64) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u32(proto::SIMPLE_REPLY_MAGIC);
    out.put_u32(error);
    out.put_u64(cookie);
    out
}

/// A session in transmission: structured replies and both contexts if so asked.
fn ready(structured: bool) -> Session {
    let mut s = session_of(vec![export("r0/0")]);
    assert_eq!(output(&mut s).len(), 18);
    s.receive(&3u32.to_be_bytes());
    if structured {
        s.receive(&option(proto::OPT_STRUCTURED_REPLY, &[]));
        let both = [CONTEXT_ALLOCATION, CONTEXT_OUT_OF_SYNC];
        s.receive(&context(proto::OPT_SET_META_CONTEXT, "r0/0", &both));
    }
    s.receive(&go(proto::OPT_GO, "r0/0", &[proto::INFO_BLOCK_SIZE]));
    assert_eq!(s.export(), Some(0));
    output(&mut s);
    s
}

#[test]
fn the_greeting_and_the_options() {
    let mut s = session_of(vec![export("r0/0"), export("r0/1")]);
    let hello = output(&mut s);
    assert_eq!(hello, [b"NBDMAGICIHAVEOPT".as_slice(), &[0, 3]].concat());
    s.receive(&1u32.to_be_bytes());
    s.receive(&option(proto::OPT_LIST, &[]));
    let list = replies(&output(&mut s));
    assert_eq!(list.len(), 3);
    assert_eq!(list[1].2, b"\0\0\0\x04r0/1a volume");
    assert_eq!(list[2].1, proto::REP_ACK);

    for (bytes, expected) in [
        (option(5, &[]), proto::REP_ERR_UNSUP),
        (option(11, &[]), proto::REP_ERR_UNSUP),
        (option(proto::OPT_LIST, b"x"), proto::REP_ERR_INVALID),
        (option(proto::OPT_LIST, &[0; 20_000]), proto::REP_ERR_TOO_BIG),
        (option(proto::OPT_GO, b"\0\0\0\x09short"), proto::REP_ERR_INVALID),
        (go(proto::OPT_GO, "r1", &[]), proto::REP_ERR_UNKNOWN),
        (go(proto::OPT_INFO, "", &[]), proto::REP_ERR_UNKNOWN),
        (context(proto::OPT_SET_META_CONTEXT, "r0/0", &[]), proto::REP_ERR_INVALID),
    ] {
        s.receive(&bytes);
        let got = replies(&output(&mut s));
        assert_eq!((got.len(), got[0].1), (1, expected));
    }

    s.receive(&option(proto::OPT_STRUCTURED_REPLY, &[]));
    s.receive(&context(proto::OPT_LIST_META_CONTEXT, "r0/0", &["base:"]));
    s.receive(&context(proto::OPT_LIST_META_CONTEXT, "r0/0", &[]));
    s.receive(&context(proto::OPT_SET_META_CONTEXT, "r0/0", &["base:", CONTEXT_OUT_OF_SYNC, "x:y"]));
    let names: Vec<_> = replies(&output(&mut s))
        .into_iter()
        .filter(|reply| reply.1 == proto::REP_META_CONTEXT)
        .map(|reply| String::from_utf8(reply.2[4..].to_vec()).unwrap())
        .collect();
    assert_eq!(names, [CONTEXT_ALLOCATION, CONTEXT_ALLOCATION, CONTEXT_OUT_OF_SYNC, CONTEXT_OUT_OF_SYNC]);

    s.receive(&go(proto::OPT_GO, "r0/1", &[proto::INFO_NAME, proto::INFO_BLOCK_SIZE]));
    let info = replies(&output(&mut s));
    assert_eq!(info.iter().map(|i| i.1).collect::<Vec<_>>(), [3, 3, 3, 1]);
    assert_eq!(s.export(), Some(1));
    // The contexts were chosen for another export.
    s.receive(&request(0, proto::CMD_BLOCK_STATUS, 1, 0, 512));
    assert!(s.next_request().is_none());
}

#[test]
fn the_oldest_way_in() {
    let mut s = session_of(vec![export("r0/0")]);
    output(&mut s);
    s.receive(&1u32.to_be_bytes());
    s.receive(&option(proto::OPT_EXPORT_NAME, b""));
    let reply = output(&mut s);
    assert_eq!(reply.len(), 8 + 2 + 124);
    assert_eq!(reply[..8], SIZE.to_be_bytes());
    let mut s = session_of(vec![export("r0/0")]);
    s.receive(&1u32.to_be_bytes());
    s.receive(&option(proto::OPT_EXPORT_NAME, b"nope"));
    assert!(matches!(s.closed(), Some(Close::Protocol(_))));
}

#[test]
fn large_minimum_blocks_must_have_been_seen() {
    let mut s = session_of(vec![Export { block_min: 4096, ..export("r0/0") }]);
    output(&mut s);
    s.receive(&3u32.to_be_bytes());
    s.receive(&go(proto::OPT_GO, "", &[]));
    assert_eq!(replies(&output(&mut s))[0].1, proto::REP_ERR_BLOCK_SIZE_REQD);
    s.receive(&go(proto::OPT_GO, "", &[proto::INFO_BLOCK_SIZE]));
    assert_eq!(s.export(), Some(0));
}

#[test]
fn payloads_arrive_aligned_however_they_are_cut() {
    let payload: Vec<u8> = (0..200_000u32).map(|i| i as u8).take(199_680).collect();
    for step in [1000, 33_333, 1 << 20] {
        let mut s = ready(false);
        let mut stream = request(proto::CMD_FLAG_FUA, proto::CMD_WRITE, 9, 4096, payload.len() as u32);
        stream.extend_from_slice(&payload);
        stream.extend_from_slice(&request(0, proto::CMD_FLUSH, 10, 0, 0));
        stream.chunks(step).for_each(|part| assert_eq!(s.receive(part), part.len()));
        let write = s.next_request().unwrap();
        let Op::Write { offset: 4096, data, fua: true } = &write.op else { panic!("{write:?}") };
        assert_eq!(data.as_ptr() as usize % ALIGN, 0);
        assert_eq!(data, &payload);
        let flush = s.next_request().unwrap();
        assert_eq!(flush.op, Op::Flush);
        s.complete(flush.id, Reply::Done);
        s.complete(write.id, Reply::Error(Errno::NoSpace));
        assert_eq!(output(&mut s), [simple(0, 10), simple(28, 9)].concat());
    }
}

#[test]
fn reads_pass_the_data_on_without_a_copy() {
    for structured in [false, true] {
        let mut s = ready(structured);
        s.receive(&request(proto::CMD_FLAG_DF * u16::from(structured), proto::CMD_READ, 7, 512, 1024));
        let read = s.next_request().unwrap();
        assert_eq!(read.op, Op::Read { offset: 512, len: 1024 });
        let data = Bytes::from(vec![5; 1024]);
        s.complete(read.id, Reply::Data(data.clone()));
        let chunks = s.take_output();
        assert_eq!(chunks.len(), 2);
        assert_eq!(chunks[1].as_ptr(), data.as_ptr());
        if structured {
            assert_eq!(chunks[0][..8], [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1]);
            assert_eq!(chunks[0][16..28], [0, 0, 4, 8, 0, 0, 0, 0, 0, 0, 2, 0]);
        } else {
            assert_eq!(chunks[0], simple(0, 7));
        }
        // An answer of the wrong length never reaches the client as data.
        s.receive(&request(0, proto::CMD_READ, 8, 0, 512));
        let read = s.next_request().unwrap();
        s.complete(read.id, Reply::Data(Bytes::from_static(b"short")));
        let reply = output(&mut s);
        assert_eq!(reply.len(), if structured { 26 } else { 16 });
    }
}

#[test]
fn block_status_speaks_both_contexts() {
    let mut s = ready(true);
    s.receive(&request(0, proto::CMD_BLOCK_STATUS, 3, 0, 8192));
    let status = s.next_request().unwrap();
    assert_eq!(status.op, Op::BlockStatus { offset: 0, len: 8192, one: false });
    let extent = |len, hole, out_of_sync| Extent { len, hole, zero: hole, out_of_sync };
    let extents = vec![extent(4096, false, false), extent(1024, false, true), extent(9999, true, true)];
    s.complete(status.id, Reply::Status(extents.clone()));
    let expected = [chunk(0, 5, 3, &[1, 5120, 0, 3072, 3]), chunk(1, 5, 3, &[2, 4096, 0, 4096, 1])];
    assert_eq!(output(&mut s), expected.concat());
    s.receive(&request(proto::CMD_FLAG_REQ_ONE, proto::CMD_BLOCK_STATUS, 4, 0, 8192));
    let status = s.next_request().unwrap();
    s.complete(status.id, Reply::Status(extents));
    assert_eq!(output(&mut s), [chunk(0, 5, 4, &[1, 5120, 0]), chunk(1, 5, 4, &[2, 4096, 0])].concat());
}

fn chunk(flags: u16, kind: u16, cookie: u64, words: &[u32]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u32(proto::STRUCTURED_REPLY_MAGIC);
    out.put_u16(flags);
    out.put_u16(kind);
    out.put_u64(cookie);
    out.put_u32(words.len() as u32 * 4);
    words.iter().for_each(|word| out.put_u32(*word));
    out
}

#[test]
fn wrong_requests_get_an_error_and_the_stream_goes_on() {
    let cases = [
        (0, proto::CMD_READ, 0, 511, 22),
        (0, proto::CMD_READ, 100, 512, 22),
        (0, proto::CMD_READ, SIZE, 512, 22),
        (0, proto::CMD_READ, u64::MAX - 511, 512, 22),
        (0, proto::CMD_READ, 0, 33 << 20, 22),
        (0x8000, proto::CMD_READ, 0, 512, 22),
        (0, proto::CMD_WRITE, SIZE, 512, 28),
        (0, proto::CMD_WRITE, 0, 33 << 20, 22),
        (proto::CMD_FLAG_DF, proto::CMD_WRITE, 0, 1024, 22),
        (0, proto::CMD_WRITE_ZEROES, SIZE - 512, 1024, 28),
        (0, proto::CMD_TRIM, SIZE - 512, 1024, 22),
        (0, proto::CMD_FLUSH, 512, 512, 22),
        (0, proto::CMD_BLOCK_STATUS, 0, 512, 22),
        (0, 5, 0, 512, 22),
        (0, 999, 0, 512, 22),
        (0, proto::CMD_READ, 0, 0, 0),
        (0, proto::CMD_WRITE, 512, 0, 0),
        (0, proto::CMD_TRIM, 512, 0, 0),
    ];
    let mut s = ready(false);
    for (flags, command, offset, len, error) in cases {
        s.receive(&request(flags, command, 77, offset, len));
        if command == proto::CMD_WRITE {
            let zeroes = vec![0; 1 << 20];
            let mut left = len as usize;
            while left > 0 {
                let now = left.min(zeroes.len());
                assert_eq!(s.receive(&zeroes[..now]), now);
                left -= now;
            }
        }
        assert!(s.next_request().is_none(), "{command} {offset} {len}");
        assert_eq!(output(&mut s), simple(error, 77), "{command} {offset} {len}");
    }
    s.receive(&request(proto::CMD_FLAG_NO_HOLE | proto::CMD_FLAG_FAST_ZERO, 6, 1, 0, 512));
    let op = s.next_request().unwrap().op;
    assert_eq!(op, Op::WriteZeroes { offset: 0, len: 512, may_unmap: false, fua: false, fast: true });
}

#[test]
fn read_only_is_kept() {
    let mut s = session_of(vec![Export { read_only: true, ..export("") }]);
    s.receive(&3u32.to_be_bytes());
    s.receive(&go(proto::OPT_GO, "", &[]));
    let info = &replies(&output(&mut s)[18..])[0].2;
    assert_ne!(info[11] & proto::TX_READ_ONLY as u8, 0);
    s.receive(&request(0, proto::CMD_WRITE, 5, 0, 512));
    s.receive(&[0; 512]);
    s.receive(&request(0, proto::CMD_TRIM, 6, 0, 512));
    assert!(s.next_request().is_none());
    assert_eq!(output(&mut s), [simple(1, 5), simple(1, 6)].concat());
}

#[test]
fn too_much_in_flight_waits() {
    let limits = Limits { requests_max: 2, ..Limits::default() };
    let mut s = Session::transmission(export("x"), limits, BufferPool::new(0));
    let three: Vec<u8> = (0..3).flat_map(|i| request(0, proto::CMD_READ, i, 0, 512)).collect();
    s.receive(&three);
    let first = s.next_request().unwrap();
    let second = s.next_request().unwrap();
    assert!(s.next_request().is_none());
    assert!(s.take_input().is_none());
    s.complete(second.id, Reply::Error(Errno::Io));
    assert_eq!(s.next_request().unwrap().id, 2);
    s.complete(first.id, Reply::Error(Errno::Io));
    assert!(s.take_input().is_some());

    let limits = Limits { output_bytes_max: 1000, ..Limits::default() };
    let mut s = Session::transmission(export("x"), limits, BufferPool::new(0));
    let many = request(0, 999, 1, 0, 0).repeat(10_000);
    assert!(s.receive(&many) < many.len());
    assert!(s.output_len() < 1100);
}

#[test]
fn the_end_of_a_session() {
    // Good-bye with something in flight: the answer still goes out.
    let mut s = ready(false);
    s.receive(&[request(0, proto::CMD_FLUSH, 1, 0, 0), request(0, proto::CMD_DISC, 2, 0, 0)].concat());
    let flush = s.next_request().unwrap();
    assert_eq!(s.closed(), Some(Close::Requested));
    assert!(!s.is_finished());
    s.complete(flush.id, Reply::Done);
    assert_eq!(output(&mut s), simple(0, 1));
    assert!(s.is_finished());

    // Cut: nobody to answer.
    let mut s = ready(false);
    s.receive(&request(0, proto::CMD_FLUSH, 1, 0, 0));
    let flush = s.next_request().unwrap();
    let input = s.take_input().unwrap();
    s.give_input(input, 0);
    assert_eq!(s.closed(), Some(Close::Cut));
    s.complete(flush.id, Reply::Done);
    assert!(s.is_finished());

    // Withdrawn: what the engine has not seen is refused.
    let mut s = ready(false);
    s.receive(&request(0, proto::CMD_FLUSH, 1, 0, 0).repeat(2));
    let flush = s.next_request().unwrap();
    s.withdraw();
    assert_eq!(output(&mut s), simple(108, 1));
    s.complete(flush.id, Reply::Done);
    assert_eq!(output(&mut s), simple(0, 1));
    assert!(s.is_finished() && s.take_input().is_none() && s.next_request().is_none());
}

/// A xorshift generator: the seeds in failures are the whole state.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn random_bytes_never_panic_and_never_escape_the_limits() {
    for seed in 1..3000u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut s = if seed.is_multiple_of(3) {
            session_of(vec![export("a")])
        } else {
            ready(seed.is_multiple_of(2))
        };
        s.limits.payload_max = 1 << 20;
        let mut waiting = Vec::new();
        for _ in 0..40 {
            let mut bytes = match random.next() % 4 {
                0 => (0..random.next() % 60).map(|_| random.next() as u8).collect(),
                1 => option(random.next() as u32 % 12, &random.next().to_be_bytes()),
                2 => go(proto::OPT_GO, "a", &[3]),
                _ => {
                    let flags = (random.next() % 32) as u16 & random.next() as u16;
                    let offset = (random.next() % SIZE) & !511;
                    let len = random.next() as u32 & 0x3_fe00;
                    let mut all = request(flags, random.next() as u16 % 8, 1, offset, len);
                    all.resize(all.len() + (random.next() % 3) as usize * len as usize / 2, 1);
                    all
                }
            };
            if random.next().is_multiple_of(8) && !bytes.is_empty() {
                let at = random.next() as usize % bytes.len();
                bytes[at] ^= 1 << (random.next() % 8);
            }
            s.receive(&bytes);
            while let Some(request) = s.next_request() {
                waiting.push(request);
            }
            assert!(s.in_flight() <= s.limits.requests_max);
            if random.next().is_multiple_of(2) {
                for request in waiting.drain(..) {
                    let (Op::Read { offset, .. } | Op::Write { offset, .. }) = request.op else {
                        s.complete(request.id, Reply::Done);
                        continue;
                    };
                    assert!(offset + request.op.payload_len() as u64 <= SIZE);
                    s.complete(request.id, Reply::Data(Bytes::from(vec![0; request.op.payload_len()])));
                }
                s.take_output();
            }
        }
    }
}
