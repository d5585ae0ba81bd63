//! Captures for tests: pcap files to TCP streams to raw packets, and what both ends agreed on.
//!
//! Only what the recordings in `tests/captures` need: little endian pcap, Ethernet, IPv4 without
//! fragments, whole packets.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use palisade_wire::{
    AlgName, Cmd, ConnectionFeatures, DecodeCtx, Header, HeaderKind, Packet, Stream, decode_header,
};

/// Every recording, in order of its path.
pub fn captures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures");
    let mut paths = Vec::new();
    for version in ["8.4.11", "9.2.18"] {
        for entry in std::fs::read_dir(root.join(version)).unwrap() {
            paths.push(entry.unwrap().path());
        }
    }
    paths.sort();
    assert_eq!(paths.len(), 56, "all recordings are there");
    paths
}

struct Segment {
    frame: usize,
    src: (u32, u16),
    dst: (u32, u16),
    seq: u32,
    flags: u8,
    data: Vec<u8>,
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn le32(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn segments(path: &Path) -> Vec<Segment> {
    let file = std::fs::File::open(path).unwrap();
    let pcap = zstd::decode_all(file).unwrap();
    assert_eq!(le32(&pcap, 0), 0xa1b2_c3d4, "{}: a little endian pcap file", path.display());
    assert_eq!(le32(&pcap, 20), 1, "Ethernet");
    let mut found = Vec::new();
    let (mut at, mut frame) = (24, 0);
    while at + 16 <= pcap.len() {
        let (kept, length) = (le32(&pcap, at + 8), le32(&pcap, at + 12));
        let Some(bytes) = pcap.get(at + 16..at + 16 + kept) else { break };
        assert_eq!(kept, length, "frame {frame} is whole");
        at += 16 + kept;
        frame += 1;
        found.extend(segment(frame, bytes));
    }
    found
}

fn segment(frame: usize, bytes: &[u8]) -> Option<Segment> {
    let ip = &bytes[14..];
    if be16(bytes, 12) != 0x0800 || ip[9] != 6 {
        return None;
    }
    let header = usize::from(ip[0] & 15) * 4;
    // Segments of exactly 64 KiB or more carry total length 0 with segmentation offload.
    let total = match be16(ip, 2) {
        0 => ip.len(),
        total => usize::from(total),
    };
    let tcp = &ip[header..total];
    let data = tcp[usize::from(tcp[12] >> 4) * 4..].to_vec();
    Some(Segment {
        frame,
        src: (be32(ip, 12), be16(tcp, 0)),
        dst: (be32(ip, 16), be16(tcp, 2)),
        seq: be32(tcp, 4),
        flags: tcp[13],
        data,
    })
}

/// What one end of a TCP connection sent.
#[derive(Default)]
struct Half {
    address: u32,
    data: Vec<u8>,
    /// (offset, frame in which the bytes from there on became available), ascending.
    seen: Vec<(usize, usize)>,
    next_seq: Option<u32>,
    /// Behind a gap: sequence number to bytes.
    waiting: HashMap<u32, Vec<u8>>,
}

impl Half {
    fn add(&mut self, segment: &Segment) {
        if segment.flags & SYN != 0 {
            self.next_seq.get_or_insert(segment.seq.wrapping_add(1));
        }
        if segment.data.is_empty() {
            return;
        }
        assert!(self.next_seq.is_some(), "every recording begins before the connections");
        let longest = self.waiting.entry(segment.seq).or_default();
        if longest.len() < segment.data.len() {
            longest.clone_from(&segment.data);
        }
        while let Some(seq) = self.ready() {
            let data = self.waiting.remove(&seq).unwrap();
            let next = self.next_seq.unwrap();
            let fresh = data.get(next.wrapping_sub(seq) as usize..).unwrap_or_default();
            if !fresh.is_empty() {
                self.seen.push((self.data.len(), segment.frame));
                self.data.extend_from_slice(fresh);
                self.next_seq = Some(next.wrapping_add(fresh.len() as u32));
            }
        }
    }

    fn ready(&self) -> Option<u32> {
        let next = self.next_seq?;
        self.waiting.keys().copied().find(|seq| next.wrapping_sub(*seq).cast_signed() >= 0)
    }

    fn frame_at(&self, offset: usize) -> usize {
        let index = self.seen.partition_point(|(start, _)| *start <= offset);
        self.seen[index - 1].1
    }
}

/// One TCP connection; `halves[0]` is what the initiator sent.
struct Tcp {
    syn: u32,
    first: usize,
    closed: Option<usize>,
    halves: [Half; 2],
}

impl Tcp {
    fn role(&self) -> Option<Stream> {
        let header = decode_header(&self.halves[0].data).ok()??;
        match header.cmd {
            Cmd::InitialData => Some(Stream::Data),
            Cmd::InitialMeta => Some(Stream::Control),
            _ => None,
        }
    }

    fn ends(&self) -> (u32, u32) {
        let (a, b) = (self.halves[0].address, self.halves[1].address);
        (a.min(b), a.max(b))
    }

    /// Frame with the first byte behind the P_INITIAL_DATA, in either direction.
    fn began(&self) -> Option<usize> {
        let starts = self.halves.iter().zip([8, 0]);
        starts.filter(|(half, start)| half.data.len() > *start).map(|(h, s)| h.frame_at(s)).min()
    }
}

fn connections(path: &Path) -> Vec<Tcp> {
    let mut live: HashMap<[(u32, u16); 2], usize> = HashMap::new();
    let mut all: Vec<Tcp> = Vec::new();
    for segment in segments(path) {
        let key = [segment.src.min(segment.dst), segment.src.max(segment.dst)];
        let opening = segment.flags & (SYN | ACK) == SYN;
        let known = live.get(&key).copied();
        let index = match known {
            Some(index) if !opening || all[index].syn == segment.seq => index,
            // Packets of a connection from before the recording, or a reset to nothing.
            None if !opening => continue,
            _ => {
                let half = |address| Half { address, ..Half::default() };
                let halves = [half(segment.src.0), half(segment.dst.0)];
                all.push(Tcp { syn: segment.seq, first: segment.frame, closed: None, halves });
                live.insert(key, all.len() - 1);
                all.len() - 1
            }
        };
        let tcp = &mut all[index];
        if segment.flags & (FIN | RST) != 0 {
            tcp.closed.get_or_insert(segment.frame);
        }
        let side = usize::from(segment.src.0 != tcp.halves[0].address);
        tcp.halves[side].add(&segment);
    }
    all
}

/// A packet cut out of a stream by its header alone.
pub struct Raw {
    pub frame: usize,
    pub stream: Stream,
    /// 0: the end with the lower address.
    pub side: usize,
    pub header: Header,
    /// Header and payload.
    pub bytes: Bytes,
}

impl Raw {
    pub fn payload(&self) -> Bytes {
        self.bytes.slice(self.header.header_len..)
    }
}

/// The packets of one connection (a data and a control stream) in the order they were seen.
pub type Link = Vec<Raw>;

/// Every connection of a recording.
pub fn links(path: &Path) -> Vec<Link> {
    let all = connections(path);
    let by_role = |role| all.iter().filter(move |tcp| tcp.role() == Some(role));
    let mut controls: Vec<&Tcp> = by_role(Stream::Control).collect();
    let mut found = Vec::new();
    for data in by_role(Stream::Data) {
        let mut link = cut(data, Stream::Data);
        if let Some(began) = data.began() {
            let fits = |tcp: &&Tcp| {
                tcp.ends() == data.ends() && tcp.first <= began && tcp.closed.is_none_or(|end| end >= began)
            };
            let best =
                controls.iter().enumerate().filter(|(_, tcp)| fits(tcp)).max_by_key(|(_, tcp)| tcp.first);
            if let Some(index) = best.map(|(index, _)| index) {
                link.extend(cut(controls.remove(index), Stream::Control));
            }
        }
        link.sort_by_key(|raw| raw.frame);
        found.push(link);
    }
    // Control sockets that never got a partner.
    found.extend(controls.into_iter().map(|tcp| cut(tcp, Stream::Control)));
    found
}

fn cut(tcp: &Tcp, stream: Stream) -> Link {
    let mut link = Vec::new();
    for half in &tcp.halves {
        let side = usize::from(half.address != tcp.ends().0);
        let bytes = Bytes::copy_from_slice(&half.data);
        let mut at = 0;
        // The last packet may be cut off: sockets are closed in the middle of a stream.
        while let Some(header) = decode_header(&bytes[at..]).unwrap() {
            let end = at + header.header_len + header.length as usize;
            if end > bytes.len() {
                break;
            }
            let frame = half.frame_at(end - 1);
            link.push(Raw { frame, stream, side, header, bytes: bytes.slice(at..end) });
            at = end;
        }
    }
    link
}

/// What both ends of a connection have announced so far.
#[derive(Default)]
pub struct Agreement {
    features: [Option<ConnectionFeatures>; 2],
    integrity: [AlgName; 2],
    verify: AlgName,
    csums: AlgName,
}

fn digest_len(alg: &AlgName) -> usize {
    match alg.as_str() {
        "" => 0,
        "crc32c" => 4,
        "md5" => 16,
        "sha1" => 20,
        "sha256" => 32,
        other => panic!("the recordings do not use {other}"),
    }
}

impl Agreement {
    /// The context in which a packet has to be decoded.
    pub fn ctx(&self, raw: &Raw) -> DecodeCtx {
        let [Some(a), Some(b)] = &self.features else { return DecodeCtx::initial() };
        // A peer that has not read the features yet answers an early ping like that (§2.7).
        if raw.stream == Stream::Control && raw.header.kind == HeaderKind::H80 {
            return DecodeCtx::initial();
        }
        let (apv, features) = a.negotiate(b).unwrap();
        DecodeCtx {
            apv,
            features,
            data_digest_len: digest_len(&self.integrity[raw.side]),
            verify_digest_len: digest_len(&self.verify),
            csums_digest_len: digest_len(&self.csums),
        }
    }

    /// Takes note of what a packet announces.
    pub fn observe(&mut self, raw: &Raw, packet: &Packet) {
        match packet {
            Packet::ConnectionFeatures(features) => self.features[raw.side] = Some(*features),
            Packet::Protocol(protocol) | Packet::ProtocolUpdate(protocol) => {
                self.integrity[raw.side] = protocol.integrity_alg.clone();
            }
            Packet::SyncParam89(param) => {
                self.verify = param.verify_alg.clone();
                self.csums = param.csums_alg.clone();
            }
            _ => {}
        }
    }
}

/// Counts by command name.
pub type Counts = BTreeMap<&'static str, usize>;
