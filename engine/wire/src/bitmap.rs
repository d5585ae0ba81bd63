//! Transfer of a bitmap in P_BITMAP and P_COMPRESSED_BITMAP packets (§8).
//!
//! Neither packet carries a position: both sides count. A compressed packet advances by its runs, a
//! plain one by words, starting at the multiple of 64 bits at or below the current bit. The transfer
//! ends with a compressed packet that reaches the end, or with an empty plain packet after the end.
//!
//! One bit per 4 KiB; bit i of the device is bit (i mod 64) of the little endian word (i div 64).

use bytes::Bytes;
use thiserror::Error;

use crate::vli::{Decoder, Encoder, Truncated};
use crate::{BITMAP_PACKET_MAX, CompressedBitmap, HeaderKind, Packet};

/// Bits of a bitmap word.
const WORD_BITS: u64 = 64;
const WORD_BYTES: usize = 8;
/// Bit 7 of the encoding byte: the first run is a run of set bits.
const FIRST_RUN_SET: u8 = 0x80;

/// A bitmap packet that does not fit the transfer; the connection has to be dropped (§13).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum BitmapError {
    /// A plain packet of another length than the position dictates.
    #[error(
        "The peer sent {found} bytes of plain bitmap where {expected} belong; both nodes must have the same device size."
    )]
    PlainLength {
        /// Bytes that belong here.
        expected: usize,
        /// Bytes sent.
        found: usize,
    },
    /// A run of set bits beyond the end.
    #[error(
        "The peer's compressed bitmap sets {count} bits from bit {first} on, but the device has only {bits}; both nodes must have the same device size."
    )]
    Overrun {
        /// First bit of the run.
        first: u64,
        /// Length of the run.
        count: u64,
        /// Bits of the device.
        bits: u64,
    },
    /// An unknown code.
    #[error("The peer sent a compressed bitmap with the unknown encoding {encoding:#04x}.")]
    Encoding {
        /// The encoding byte.
        encoding: u8,
    },
    /// The code ends within a code word.
    #[error(transparent)]
    Truncated(#[from] Truncated),
    /// A packet after the end.
    #[error("The peer sent a compressed bitmap packet after the end of its bitmap.")]
    AfterEnd,
}

/// Position in one direction of a transfer.
#[derive(Debug, Clone, Copy)]
struct Cursor {
    bits: u64,
    /// Next bit; after plain packets it may lie beyond the end.
    next: u64,
    header_len: usize,
}

impl Cursor {
    const fn new(bits: u64, kind: HeaderKind) -> Self {
        Self { bits, next: 0, header_len: kind.header_len() }
    }

    /// Words the next plain packet has to carry, 0 at the end.
    fn plain_words(&self) -> usize {
        let left = self.bits.div_ceil(WORD_BITS).saturating_sub(self.next / WORD_BITS);
        let fit = (BITMAP_PACKET_MAX - self.header_len) / WORD_BYTES;
        usize::try_from(left).unwrap_or(usize::MAX).min(fit)
    }

    fn advance_plain(&mut self, words: usize) {
        self.next = (self.next / WORD_BITS + words as u64) * WORD_BITS;
    }

    fn at_end(&self) -> bool {
        self.next >= self.bits
    }
}

/// Whether more packets belong to a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The transfer goes on.
    More,
    /// This was the last packet.
    Done,
}

/// Receiving side of a transfer.
#[derive(Debug)]
pub struct Receiver {
    cursor: Cursor,
}

impl Receiver {
    /// A transfer of `bits` bits in packets with headers of type `kind`.
    #[must_use]
    pub const fn new(bits: u64, kind: HeaderKind) -> Self {
        Self { cursor: Cursor::new(bits, kind) }
    }

    /// Takes the words of a P_BITMAP. `or_word(index, word)` is called for each word with set bits;
    /// bits beyond the end are cleared.
    ///
    /// # Errors
    /// The length is not the one that belongs here.
    pub fn plain(
        &mut self,
        words: &[u8],
        mut or_word: impl FnMut(u64, u64),
    ) -> Result<Progress, BitmapError> {
        let count = self.cursor.plain_words();
        if words.len() != count * WORD_BYTES {
            return Err(BitmapError::PlainLength { expected: count * WORD_BYTES, found: words.len() });
        }
        let (chunks, _) = words.as_chunks::<WORD_BYTES>();
        for (index, chunk) in (self.cursor.next / WORD_BITS..).zip(chunks) {
            let inside = self.cursor.bits - index * WORD_BITS;
            let mask = if inside < WORD_BITS { (1 << inside) - 1 } else { u64::MAX };
            let word = u64::from_le_bytes(*chunk) & mask;
            if word != 0 {
                or_word(index, word);
            }
        }
        self.cursor.advance_plain(count);
        Ok(if count == 0 { Progress::Done } else { Progress::More })
    }

    /// Takes a P_COMPRESSED_BITMAP. `set_run(first, count)` is called for each run of set bits.
    ///
    /// # Errors
    /// Unknown code, a set run beyond the end, an incomplete code word, nothing left to transfer.
    pub fn compressed(
        &mut self,
        encoding: u8,
        code: &[u8],
        mut set_run: impl FnMut(u64, u64),
    ) -> Result<Progress, BitmapError> {
        if encoding & 0x0f != CompressedBitmap::RLE_VLI {
            return Err(BitmapError::Encoding { encoding });
        }
        let Cursor { bits, next, .. } = self.cursor;
        if next >= bits {
            return Err(BitmapError::AfterEnd);
        }
        let mut first = next;
        let mut set = encoding & FIRST_RUN_SET != 0;
        for run in Decoder::new(code, encoding >> 4 & 7) {
            let count = run?;
            // bits <= 2^63 and count <= 2^57, but `bits` is the caller's: do not rely on it.
            let end = first.saturating_add(count);
            if set {
                if end > bits {
                    return Err(BitmapError::Overrun { first, count, bits });
                }
                set_run(first, count);
            }
            first = end.min(bits);
            set = !set;
        }
        self.cursor.next = first;
        Ok(if self.cursor.at_end() { Progress::Done } else { Progress::More })
    }
}

/// Sending side of a transfer.
#[derive(Debug)]
pub struct Sender {
    cursor: Cursor,
    use_rle: bool,
    done: bool,
}

impl Sender {
    /// A transfer of `bits` bits in packets with headers of type `kind`; `use_rle` as configured and
    /// only with APV >= 90.
    #[must_use]
    pub const fn new(bits: u64, kind: HeaderKind, use_rle: bool) -> Self {
        Self { cursor: Cursor::new(bits, kind), use_rle, done: false }
    }

    /// The next packet and its bulk data; `None` when everything was sent.
    ///
    /// `run_at(bit)` tells whether the bit is set and how many bits from there on surely are alike
    /// (at least 1; neighbours are merged, what lies beyond the end is cut). `word_at(index)` gives
    /// 64 bits. Both must describe the same bitmap in every call for one transfer, or bits that
    /// change meanwhile must be announced to the peer in another way.
    pub fn next_packet(
        &mut self,
        run_at: impl FnMut(u64) -> (bool, u64),
        word_at: impl FnMut(u64) -> u64,
    ) -> Option<(Packet, Bytes)> {
        if self.done {
            return None;
        }
        if self.use_rle
            && !self.cursor.at_end()
            && let Some(packet) = self.compressed(run_at)
        {
            return Some(packet);
        }
        Some(self.plain(word_at))
    }

    fn compressed(&mut self, mut run_at: impl FnMut(u64) -> (bool, u64)) -> Option<(Packet, Bytes)> {
        let Cursor { bits, next, header_len } = self.cursor;
        let mut encoder = Encoder::new(BITMAP_PACKET_MAX - header_len - 1);
        let mut at = next;
        let mut ahead = run_at(at);
        let first_set = ahead.0;
        while at < bits {
            let set = ahead.0;
            let mut end = at;
            while end < bits && ahead.0 == set {
                end = end.saturating_add(ahead.1.max(1)).min(bits);
                if end < bits {
                    ahead = run_at(end);
                }
            }
            if !encoder.push(end - at) {
                break;
            }
            at = end;
        }
        // Mandatory: what is longer than the bits it stands for goes out plain (§8.3).
        let code_bits = encoder.len() as u64 * 8;
        if code_bits == 0 || code_bits > at - next {
            return None;
        }
        self.cursor.next = at;
        self.done = self.cursor.at_end();
        let polarity = if first_set { FIRST_RUN_SET } else { 0 };
        let encoding = polarity | encoder.pad_bits() << 4 | CompressedBitmap::RLE_VLI;
        let packet = Packet::CompressedBitmap(CompressedBitmap { encoding });
        Some((packet, encoder.into_bytes().into()))
    }

    fn plain(&mut self, mut word_at: impl FnMut(u64) -> u64) -> (Packet, Bytes) {
        let count = self.cursor.plain_words();
        let first = self.cursor.next / WORD_BITS;
        let mut words = Vec::with_capacity(count * WORD_BYTES);
        for index in first..first + count as u64 {
            let inside = self.cursor.bits - index * WORD_BITS;
            let mask = if inside < WORD_BITS { (1 << inside) - 1 } else { u64::MAX };
            words.extend_from_slice(&(word_at(index) & mask).to_le_bytes());
        }
        self.cursor.advance_plain(count);
        self.done = count == 0;
        (Packet::Bitmap, words.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H100: HeaderKind = HeaderKind::H100;

    fn word_of(run_at: impl Fn(u64) -> (bool, u64)) -> impl Fn(u64) -> u64 {
        move |index| (0..64).filter(|bit| run_at(index * 64 + bit).0).map(|bit| 1 << bit).sum()
    }

    #[test]
    fn a_plain_packet_restarts_at_a_word() {
        // Runs of 4 fill a packet: 10877 code words of 3 bits for 43508 bits, which is 52 bits into
        // word 679. What follows does not compress.
        let run_at = |bit: u64| if bit < 43508 { (bit / 4 % 2 == 1, 1) } else { (bit & 1 == 0, 1) };
        let bits = 43508 + 8000;
        let mut sender = Sender::new(bits, H100, true);
        let mut receiver = Receiver::new(bits, H100);
        let mut last_set = 0;

        let (packet, code) = sender.next_packet(run_at, word_of(run_at)).unwrap();
        assert_eq!(packet, Packet::CompressedBitmap(CompressedBitmap { encoding: 0x12 }));
        assert_eq!(code.len(), 4079);
        let progress = receiver.compressed(0x12, &code, |first, count| last_set = first + count);
        assert_eq!((progress, last_set), (Ok(Progress::More), 43504));

        let (packet, words) = sender.next_packet(run_at, word_of(run_at)).unwrap();
        assert_eq!((packet, words.len()), (Packet::Bitmap, 8 * (805 - 679)));
        let mut indices = Vec::new();
        assert_eq!(receiver.plain(&words, |index, _| indices.push(index)), Ok(Progress::More));
        assert_eq!((indices[0], indices.len()), (679, 126));

        // A plain packet that reaches the end needs an empty one behind it.
        let (packet, words) = sender.next_packet(run_at, word_of(run_at)).unwrap();
        assert_eq!((packet, words.len()), (Packet::Bitmap, 0));
        assert_eq!(receiver.plain(&words, |_, _| {}), Ok(Progress::Done));
        assert_eq!(sender.next_packet(run_at, word_of(run_at)), None);
    }

    #[test]
    fn code_longer_than_its_bits_goes_out_plain() {
        // Runs of 2 take 2 bits each, a run of 1 as well: 16 bits of code for 16 or for 15 bits.
        let run_at = |bit: u64| (bit / 2 % 2 == 1, 1);
        for (bits, compressed) in [(16, true), (15, false)] {
            let (packet, _) = Sender::new(bits, H100, true).next_packet(run_at, word_of(run_at)).unwrap();
            assert_eq!(packet != Packet::Bitmap, compressed, "{bits}");
        }
        let (packet, _) = Sender::new(16, H100, false).next_packet(run_at, word_of(run_at)).unwrap();
        assert_eq!(packet, Packet::Bitmap);
    }

    #[test]
    fn plain_packets_have_a_dictated_length() {
        let clear = |_| (false, u64::MAX);
        for (kind, full) in [(H100, 4080), (HeaderKind::H80, 4088)] {
            let mut sender = Sender::new(64 * 600, kind, false);
            let mut lengths = Vec::new();
            while let Some((_, words)) = sender.next_packet(clear, |_| 0) {
                lengths.push(words.len());
            }
            assert_eq!(lengths, [full, 4800 - full, 0]);
        }
        let mut receiver = Receiver::new(4086, H100);
        let wrong = receiver.plain(&[0; 504], |_, _| {});
        assert_eq!(wrong, Err(BitmapError::PlainLength { expected: 512, found: 504 }));
        // Surplus bits of the last word are dropped.
        let mut last = 0;
        assert_eq!(receiver.plain(&[0xff; 512], |_, word| last = word), Ok(Progress::More));
        assert_eq!(last, u64::MAX >> 10);
    }

    #[test]
    fn what_a_receiver_refuses() {
        let mut receiver = Receiver::new(64, H100);
        let mut compressed = |encoding, code: &[u8]| receiver.compressed(encoding, code, |_, _| {});
        assert_eq!(compressed(0x01, &[0]), Err(BitmapError::Encoding { encoding: 1 }));
        assert_eq!(compressed(0x02, &[0xff]), Err(BitmapError::Truncated(Truncated)));
        // 100 set bits of 64; a clear run of 100 is clipped.
        let overrun = Err(BitmapError::Overrun { first: 0, count: 100, bits: 64 });
        assert_eq!(compressed(0xa2, &[0xdf, 0x0c]), overrun);
        assert_eq!(compressed(0x22, &[0xdf, 0x0c]), Ok(Progress::Done));
        assert_eq!(compressed(0x22, &[0xdf, 0x0c]), Err(BitmapError::AfterEnd));
    }

    #[test]
    fn an_empty_device() {
        let mut sender = Sender::new(0, H100, true);
        assert_eq!(sender.next_packet(|_| (false, 1), |_| 0), Some((Packet::Bitmap, Bytes::new())));
        assert_eq!(sender.next_packet(|_| (false, 1), |_| 0), None);
        assert_eq!(Receiver::new(0, H100).plain(&[], |_, _| {}), Ok(Progress::Done));
    }
}
