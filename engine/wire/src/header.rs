//! The three packet headers (§3).
//!
//! | type | layout |
//! |---|---|
//! | h80 | magic `0x83740267` (4), command (2), length (2) |
//! | h95 | magic `0x835a` (2), command (2), length (4) |
//! | h100 | magic `0x8620ec20` (4), volume (2), command (2), length (4), zero (4) |

use bytes::{Buf, BufMut};

use crate::{Cmd, WireError, max_bio_size};

const MAGIC_H80: u32 = 0x8374_0267;
const MAGIC_H95: u16 = 0x835a;
const MAGIC_H100: u32 = 0x8620_ec20;
const NO_VOLUME: u16 = 0xffff;

/// Header type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HeaderKind {
    /// 8 bytes, 16 bit length.
    H80,
    /// 8 bytes, 32 bit length.
    H95,
    /// 16 bytes, with a volume number.
    H100,
}

impl HeaderKind {
    /// Bytes of the header itself.
    #[must_use]
    pub const fn header_len(self) -> usize {
        match self {
            Self::H80 | Self::H95 => 8,
            Self::H100 => 16,
        }
    }

    /// The type to send a packet of `length` payload bytes with (§3).
    #[must_use]
    pub(crate) fn for_sending(cmd: Cmd, length: usize, apv: u32) -> Self {
        match cmd {
            Cmd::InitialData | Cmd::InitialMeta | Cmd::ConnectionFeatures => Self::H80,
            _ if apv >= 100 => Self::H100,
            _ if apv >= 95 && length + 8 > max_bio_size(94) as usize => Self::H95,
            _ => Self::H80,
        }
    }

    /// Whether a packet on the data stream may have this header (§3). Below 100 both short types
    /// pass from 95 on, because 8.3 sends small packets with h80.
    #[must_use]
    pub(crate) fn fits(self, cmd: Cmd, apv: u32) -> bool {
        match (cmd, self) {
            // A kernel with a raised minimum version sends its features packet with h100.
            (Cmd::ConnectionFeatures, _) => true,
            (Cmd::InitialData | Cmd::InitialMeta, kind) => kind == Self::H80,
            (_, Self::H100) => apv >= 100,
            (_, Self::H95) => (95..100).contains(&apv),
            (_, Self::H80) => apv < 100,
        }
    }
}

/// A decoded packet header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Which of the three types it was.
    pub kind: HeaderKind,
    /// Volume number; `None` on the wire is 0xffff. Always 0 in h80 and h95, and 0 in connection
    /// scoped packets of 8.4.
    pub volume: Option<u16>,
    /// The command.
    pub cmd: Cmd,
    /// Payload bytes after the header.
    pub length: u32,
    /// Bytes of the header itself.
    pub header_len: usize,
}

/// Decodes the header at the start of `buf`; `None` means more bytes are needed.
///
/// Any of the three types is accepted: pings can arrive with another type than the agreed version
/// calls for (§2.7). [`crate::check_header`] is strict where kernels are.
///
/// # Errors
/// Unknown magic, non-zero h100 pad, unknown command.
pub fn decode_header(mut buf: &[u8]) -> Result<Option<Header>, WireError> {
    let Some(magic) = buf.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes)) else {
        return Ok(None);
    };
    let kind = match magic {
        MAGIC_H80 => HeaderKind::H80,
        MAGIC_H100 => HeaderKind::H100,
        _ if (magic >> 16) as u16 == MAGIC_H95 => HeaderKind::H95,
        found => return Err(WireError::BadMagic { found }),
    };
    if buf.len() < kind.header_len() {
        return Ok(None);
    }
    let (volume, number, length) = match kind {
        HeaderKind::H80 => {
            buf.advance(4);
            (Some(0), buf.get_u16(), u32::from(buf.get_u16()))
        }
        HeaderKind::H95 => {
            buf.advance(2);
            (Some(0), buf.get_u16(), buf.get_u32())
        }
        HeaderKind::H100 => {
            buf.advance(4);
            let volume = buf.get_u16();
            let number = buf.get_u16();
            let length = buf.get_u32();
            let found = buf.get_u32();
            if found != 0 {
                return Err(WireError::BadHeaderPad { found });
            }
            ((volume != NO_VOLUME).then_some(volume), number, length)
        }
    };
    let cmd = Cmd::from_u16(number).ok_or(WireError::UnknownCommand { number })?;
    Ok(Some(Header { kind, volume, cmd, length, header_len: kind.header_len() }))
}

/// Writes a header. `length` was checked against the command's limits; that it fits h80's 16 bits
/// follows from them.
pub(crate) fn put_header(
    kind: HeaderKind,
    volume: Option<u16>,
    cmd: Cmd,
    length: u32,
    out: &mut impl BufMut,
) {
    match kind {
        HeaderKind::H80 => {
            out.put_u32(MAGIC_H80);
            out.put_u16(cmd.number());
            out.put_u16(length as u16);
        }
        HeaderKind::H95 => {
            out.put_u16(MAGIC_H95);
            out.put_u16(cmd.number());
            out.put_u32(length);
        }
        HeaderKind::H100 => {
            out.put_u32(MAGIC_H100);
            out.put_u16(volume.unwrap_or(NO_VOLUME));
            out.put_u16(cmd.number());
            out.put_u32(length);
            out.put_u32(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_three_types() {
        let h80 = [0x83, 0x74, 0x02, 0x67, 0xff, 0xfe, 0x00, 0x48];
        let header = decode_header(&h80).unwrap().unwrap();
        assert_eq!((header.kind, header.length, header.header_len), (HeaderKind::H80, 72, 8));
        assert_eq!(header.cmd, Cmd::ConnectionFeatures);
        let h95 = [0x83, 0x5a, 0x00, 0x00, 0x00, 0x01, 0x00, 0x18];
        let header = decode_header(&h95).unwrap().unwrap();
        assert_eq!((header.kind, header.length), (HeaderKind::H95, 65560));
        assert_eq!((header.cmd, header.volume), (Cmd::Data, Some(0)));
        let mut h100 = [0x86, 0x20, 0xec, 0x20, 0xff, 0xff, 0, 0x13, 0, 0, 0, 0, 0, 0, 0, 0];
        let header = decode_header(&h100).unwrap().unwrap();
        assert_eq!((header.cmd, header.volume, header.length), (Cmd::Ping, None, 0));
        h100[15] = 1;
        assert_eq!(decode_header(&h100), Err(WireError::BadHeaderPad { found: 1 }));
    }

    #[test]
    fn more_bytes_are_asked_for() {
        let h100 = [0x86, 0x20, 0xec, 0x20, 0xff, 0xff, 0, 0x13, 0, 0, 0, 0, 0, 0, 0, 0];
        for len in 0..16 {
            assert_eq!(decode_header(&h100[..len]), Ok(None));
        }
        assert_eq!(decode_header(b"SSH-"), Err(WireError::BadMagic { found: 0x5353_482d }));
        for number in [0x05u16, 0x06, 0x25, 0x26, 0x37, 0x3f, 0x5a, 0x100, 0xffff] {
            let mut bytes = [0x83, 0x74, 0x02, 0x67, 0, 0, 0, 0];
            bytes[4..6].copy_from_slice(&number.to_be_bytes());
            assert_eq!(decode_header(&bytes), Err(WireError::UnknownCommand { number }));
        }
    }

    #[test]
    fn sending_type_by_version() {
        assert_eq!(HeaderKind::for_sending(Cmd::Ping, 0, 101), HeaderKind::H100);
        assert_eq!(HeaderKind::for_sending(Cmd::Data, 32760, 96), HeaderKind::H80);
        assert_eq!(HeaderKind::for_sending(Cmd::Data, 32761, 96), HeaderKind::H95);
        assert_eq!(HeaderKind::for_sending(Cmd::Data, 32792, 94), HeaderKind::H80);
        assert_eq!(HeaderKind::for_sending(Cmd::ConnectionFeatures, 72, 124), HeaderKind::H80);
    }
}
