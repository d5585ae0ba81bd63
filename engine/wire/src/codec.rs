//! From bytes to [`Packet`] and back, and the limits that hold before anything is buffered.

use bytes::{BufMut, Bytes, BytesMut};

use crate::body::Reader;
use crate::header::{HeaderKind, put_header};
use crate::{
    APV_MIN, APV_V9, BITMAP_PACKET_MAX, CHALLENGE_LEN, Cmd, DIGEST_LEN_MAX, Features, Header, Packet, Stream,
    Streams, Tail, WireError, max_bio_size,
};

/// What both ends agreed on, as far as packet layouts depend on it. One per direction, because each
/// side has its own integrity algorithm (§4.5). All lengths are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeCtx {
    /// Agreed protocol version; [`APV_MIN`] until features are agreed.
    pub apv: u32,
    /// Agreed features.
    pub features: Features,
    /// Digest before data: of the *sender's* data-integrity-alg, 0 without.
    pub data_digest_len: usize,
    /// Digest of the verify-alg; 0 without, then no verify reply is accepted.
    pub verify_digest_len: usize,
    /// Digest of the csums-alg; 0 without, then no checksum request is accepted.
    pub csums_digest_len: usize,
}

impl DecodeCtx {
    /// What holds before features are agreed.
    #[must_use]
    pub const fn initial() -> Self {
        Self {
            apv: APV_MIN,
            features: Features::NONE,
            data_digest_len: 0,
            verify_digest_len: 0,
            csums_digest_len: 0,
        }
    }

    fn header_len(&self) -> usize {
        if self.apv >= 100 { HeaderKind::H100.header_len() } else { HeaderKind::H80.header_len() }
    }
}

impl Default for DecodeCtx {
    fn default() -> Self {
        Self::initial()
    }
}

/// Length in bytes of digest and bulk data after the fixed part: smallest digest, largest digest,
/// smallest bulk, largest bulk.
fn tail_range(cmd: Cmd, ctx: &DecodeCtx) -> [usize; 4] {
    let bitmap_max = BITMAP_PACKET_MAX - ctx.header_len();
    match cmd.tail() {
        Tail::Nothing => [0, 0, 0, 0],
        Tail::Block => [ctx.data_digest_len, ctx.data_digest_len, 512, max_bio_size(ctx.apv) as usize],
        Tail::CsumsDigest => [ctx.csums_digest_len, ctx.csums_digest_len, 0, 0],
        Tail::VerifyDigest => [ctx.verify_digest_len, ctx.verify_digest_len, 0, 0],
        Tail::Response => [1, DIGEST_LEN_MAX, 0, 0],
        // 8.4 accepts longer challenges, DRBD 9 does not (§4.3).
        Tail::Challenge if ctx.apv >= APV_V9 => [0, 0, CHALLENGE_LEN, CHALLENGE_LEN],
        Tail::Challenge => [0, 0, CHALLENGE_LEN, 2 * CHALLENGE_LEN],
        Tail::Words => [0, 0, 0, bitmap_max],
        Tail::Code => [0, 0, 1, bitmap_max - 1],
    }
}

/// Smallest payload in bytes `cmd` can have.
#[must_use]
pub fn min_payload(cmd: Cmd, ctx: &DecodeCtx) -> usize {
    let [digest, _, bulk, _] = tail_range(cmd, ctx);
    cmd.body_range(ctx).0 + digest + bulk
}

/// Largest payload in bytes `cmd` can have; never more than 1 MiB and some headers.
#[must_use]
pub fn max_payload(cmd: Cmd, ctx: &DecodeCtx) -> usize {
    let [_, digest, _, bulk] = tail_range(cmd, ctx);
    cmd.body_range(ctx).1 + digest + bulk
}

/// Checks what was agreed and the payload length; the same for both directions.
fn check_length(cmd: Cmd, length: usize, ctx: &DecodeCtx) -> Result<(), WireError> {
    let digest_missing = match cmd.tail() {
        Tail::CsumsDigest => ctx.csums_digest_len == 0,
        Tail::VerifyDigest => ctx.verify_digest_len == 0,
        _ => false,
    };
    if digest_missing || !cmd.is_agreed(ctx) {
        return Err(WireError::NotAgreed { cmd, apv: ctx.apv, features: ctx.features.0 });
    }
    let (min, max) = (min_payload(cmd, ctx), max_payload(cmd, ctx));
    let unit = match cmd.tail() {
        Tail::Block => 512,
        Tail::Words => 8,
        _ => 1,
    };
    if length < min || length > max || !(length - min).is_multiple_of(unit) {
        return Err(WireError::Length { cmd, length: length as u64, min: min as u64, max: max as u64 });
    }
    Ok(())
}

/// Checks a header before anything of its payload is read: stream, header type, what was agreed,
/// length (§3, §13).
///
/// # Errors
/// The connection has to be dropped.
pub fn check_header(header: &Header, stream: Stream, ctx: &DecodeCtx) -> Result<(), WireError> {
    let cmd = header.cmd;
    match (cmd.streams(), stream) {
        (Streams::Both, _) | (Streams::Data, Stream::Data) | (Streams::Control, Stream::Control) => {}
        _ => return Err(WireError::WrongStream { cmd, stream }),
    }
    // The control stream accepts any type: a peer may answer before it knows the version (§2.7).
    if stream == Stream::Data && !header.kind.fits(cmd, ctx.apv) {
        return Err(WireError::WrongHeader { cmd, kind: header.kind, apv: ctx.apv });
    }
    check_length(cmd, header.length as usize, ctx)
}

/// Bytes of the payload before the bulk data: fixed part and digest. The rest is bulk data.
///
/// # Errors
/// As [`check_header`], without stream and header type.
pub fn fixed_len(header: &Header, ctx: &DecodeCtx) -> Result<usize, WireError> {
    let length = header.length as usize;
    check_length(header.cmd, length, ctx)?;
    let (min, max) = header.cmd.body_range(ctx);
    let [_, digest, _, _] = tail_range(header.cmd, ctx);
    // Without bulk data, the length is what the header says; with it, the fixed part has one length.
    Ok(length.min(if min == max { max + digest } else { max }))
}

/// Decodes fixed part and digest, the first [`fixed_len`] bytes of a payload. For callers that read
/// the bulk data into a buffer of their own.
///
/// # Errors
/// The packet is not acceptable (see [`check_header`]), or a field holds a value without meaning.
pub fn decode_fixed(
    header: &Header,
    mut fixed: Bytes,
    stream: Stream,
    ctx: &DecodeCtx,
) -> Result<(Packet, Bytes), WireError> {
    check_header(header, stream, ctx)?;
    let cmd = header.cmd;
    let expected = fixed_len(header, ctx)?;
    if fixed.len() != expected {
        let (announced, given) = (expected as u64, fixed.len() as u64);
        return Err(WireError::Incomplete { cmd, announced, given });
    }
    let (min, max) = cmd.body_range(ctx);
    let body_len = if min == max { max } else { expected };
    let digest = fixed.split_off(body_len.min(expected));
    let packet = Packet::get(&mut Reader::new(cmd, &fixed), ctx)?;
    Ok((packet, digest))
}

/// Decodes a packet from its header and complete payload. Returns the fixed part, the digest and the
/// bulk data; both are slices of `payload`, empty where there are none.
///
/// # Errors
/// As [`decode_fixed`], or `payload` is not as long as the header says.
pub fn decode(
    header: &Header,
    mut payload: Bytes,
    stream: Stream,
    ctx: &DecodeCtx,
) -> Result<(Packet, Bytes, Bytes), WireError> {
    check_header(header, stream, ctx)?;
    if payload.len() != header.length as usize {
        return Err(WireError::Incomplete {
            cmd: header.cmd,
            announced: header.length.into(),
            given: payload.len() as u64,
        });
    }
    let bulk = payload.split_off(fixed_len(header, ctx)?);
    let (packet, digest) = decode_fixed(header, payload, stream, ctx)?;
    Ok((packet, digest, bulk))
}

/// Appends header, fixed part and digest of a packet to `out`. The length field covers `bulk_len`
/// bytes more, which the caller has to send next.
///
/// `volume` `None` is written as 0xffff. Only h100 headers carry a volume.
///
/// # Errors
/// The packet breaks a rule the receiver would drop the connection for; `out` is unchanged then.
pub fn encode(
    packet: &Packet,
    volume: Option<u16>,
    ctx: &DecodeCtx,
    digest: &[u8],
    bulk_len: usize,
    out: &mut BytesMut,
) -> Result<(), WireError> {
    let cmd = packet.cmd();
    let start = out.len();
    // Exact where it matters: only packets with bulk data can need h95, and their bodies are fixed.
    let length_max = cmd.body_range(ctx).1.saturating_add(digest.len()).saturating_add(bulk_len);
    let kind = HeaderKind::for_sending(cmd, length_max, ctx.apv);
    let body_start = start + kind.header_len();
    out.put_bytes(0, kind.header_len());
    let result = put_body(packet, ctx, digest, bulk_len, body_start, out);
    if result.is_err() {
        out.truncate(start);
        return result;
    }
    let length = out.len() - body_start + bulk_len;
    if let Some(mut head) = out.get_mut(start..body_start) {
        put_header(kind, volume, cmd, length as u32, &mut head);
    }
    Ok(())
}

fn put_body(
    packet: &Packet,
    ctx: &DecodeCtx,
    digest: &[u8],
    bulk_len: usize,
    body_start: usize,
    out: &mut BytesMut,
) -> Result<(), WireError> {
    let cmd = packet.cmd();
    packet.put(ctx, out)?;
    let [digest_min, digest_max, _, _] = tail_range(cmd, ctx);
    if !(digest_min..=digest_max).contains(&digest.len()) {
        let (min, max) = (digest_min as u64, digest_max as u64);
        return Err(WireError::Length { cmd, length: digest.len() as u64, min, max });
    }
    out.put_slice(digest);
    check_length(cmd, (out.len() - body_start).saturating_add(bulk_len), ctx)
}
