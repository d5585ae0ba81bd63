//! The variable length code for run lengths in P_COMPRESSED_BITMAP (§8.3).
//!
//! A code word is a prefix and data bits, least significant first; `run = data + base`:
//!
//! | prefix value | prefix bits | data bits | smallest run | largest run |
//! |---|---|---|---|---|
//! | 0x00 | 1 | 1 | 1 | 2 |
//! | 0x01 | 2 | 1 | 3 | 4 |
//! | 0x03 | 3 | 2 | 5 | 8 |
//! | 0x07 | 4 | 3 | 9 | 16 |
//! | 0x0f | 5 | 5 | 17 | 48 |
//! | 0x1f | 6 | 8 | 49 | 304 |
//! | 0x3f | 8 | 13 | 305 | 8496 |
//! | 0x7f | 8 | 21 | 8497 | 2105648 |
//! | 0xbf | 8 | 34 | 2105649 | 17181974832 |
//! | 0xff | 8 | 56 | 17181974833 | 72057611219902768 |

struct Level {
    prefix: u64,
    prefix_bits: u32,
    data_bits: u32,
    base: u64,
}

impl Level {
    const fn bits(&self) -> u32 {
        self.prefix_bits + self.data_bits
    }

    const fn run_max(&self) -> u64 {
        self.base + (1 << self.data_bits) - 1
    }
}

const fn level(prefix: u64, prefix_bits: u32, data_bits: u32, base: u64) -> Level {
    Level { prefix, prefix_bits, data_bits, base }
}

const LEVELS: [Level; 10] = [
    level(0x00, 1, 1, 1),
    level(0x01, 2, 1, 3),
    level(0x03, 3, 2, 5),
    level(0x07, 4, 3, 9),
    level(0x0f, 5, 5, 17),
    level(0x1f, 6, 8, 49),
    level(0x3f, 8, 13, 305),
    level(0x7f, 8, 21, 8497),
    level(0xbf, 8, 34, 2_105_649),
    level(0xff, 8, 56, 17_181_974_833),
];

/// Largest run length that can be encoded.
pub const RUN_MAX: u64 = LEVELS[9].run_max();

/// Appends code words to a byte string of limited size.
#[derive(Debug)]
pub struct Encoder {
    code: Vec<u8>,
    bits: usize,
    bits_max: usize,
}

impl Encoder {
    /// An encoder for at most `bytes_max` bytes.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self { code: Vec::new(), bits: 0, bits_max: bytes_max.saturating_mul(8) }
    }

    /// Appends one run. Returns false, and does nothing, if it does not fit or cannot be encoded
    /// (0 and above [`RUN_MAX`]).
    pub fn push(&mut self, run: u64) -> bool {
        let Some(level) = LEVELS.iter().find(|level| (level.base..=level.run_max()).contains(&run)) else {
            return false;
        };
        let width = level.bits() as usize;
        if self.bits + width > self.bits_max {
            return false;
        }
        let mut word = (run - level.base) << level.prefix_bits | level.prefix;
        let mut left = width;
        while left > 0 {
            let used = self.bits % 8;
            if used == 0 {
                self.code.push(0);
            }
            if let Some(last) = self.code.last_mut() {
                *last |= (word << used) as u8;
            }
            let step = left.min(8 - used);
            word = word.checked_shr(step as u32).unwrap_or(0);
            left -= step;
            self.bits += step;
        }
        true
    }

    /// Unused bits in the last byte, 0 to 7.
    #[must_use]
    pub fn pad_bits(&self) -> u8 {
        (self.bits.wrapping_neg() % 8) as u8
    }

    /// Bytes so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.code.len()
    }

    /// Whether nothing was appended.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.code.is_empty()
    }

    /// The code.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.code
    }
}

/// The code ends within a code word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The compressed bitmap ends within a code word.")]
pub struct Truncated;

/// Reads run lengths.
#[derive(Debug)]
pub struct Decoder<'a> {
    code: &'a [u8],
    at: usize,
    end: usize,
}

impl<'a> Decoder<'a> {
    /// A decoder for `code`, whose last `pad_bits` bits are unused.
    #[must_use]
    pub fn new(code: &'a [u8], pad_bits: u8) -> Self {
        let end = code.len().saturating_mul(8).saturating_sub(pad_bits.into());
        Self { code, at: 0, end }
    }

    /// The next (up to) 64 bits, zero filled.
    fn peek(&self) -> u64 {
        let bytes = self.code.iter().skip(self.at / 8).take(9);
        let wide = bytes.zip(0u32..).fold(0u128, |wide, (byte, i)| wide | u128::from(*byte) << (8 * i));
        (wide >> (self.at % 8)) as u64
    }
}

impl Iterator for Decoder<'_> {
    type Item = Result<u64, Truncated>;

    /// The next run length, always >= 1. After an error there is nothing more.
    fn next(&mut self) -> Option<Self::Item> {
        let left = self.end.checked_sub(self.at).filter(|left| *left > 0)?;
        let word = self.peek();
        let matching = |level: &&Level| {
            let mask = (1u64 << level.prefix_bits) - 1;
            word & mask == level.prefix
        };
        // A prefix that matches always exists: the last one is eight set bits.
        let level = LEVELS.iter().find(matching).filter(|level| level.bits() as usize <= left);
        let Some(level) = level else {
            self.at = self.end;
            return Some(Err(Truncated));
        };
        self.at += level.bits() as usize;
        let data = word >> level.prefix_bits & ((1u64 << level.data_bits) - 1);
        Some(Ok(data + level.base))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code_of(run: u64) -> (u64, usize) {
        let mut encoder = Encoder::new(8);
        assert!(encoder.push(run), "{run}");
        let bits = encoder.len() * 8 - usize::from(encoder.pad_bits());
        let bytes = encoder.into_bytes();
        (bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)), bits)
    }

    fn stream_order((value, bits): (u64, usize)) -> String {
        (0..bits).map(|bit| if value >> bit & 1 == 1 { '1' } else { '0' }).collect()
    }

    #[test]
    fn check_values_of_the_specification() {
        let strings =
            [(1, "00"), (2, "01"), (3, "100"), (4, "101"), (5, "11000"), (9, "1110000"), (17, "1111000000")];
        for (run, expected) in strings {
            assert_eq!(stream_order(code_of(run)), expected);
        }
        assert_eq!(code_of(100), (0x0cdf, 14));
        assert_eq!(code_of(262_144), (0x03de_cf7f, 29));
        assert_eq!(code_of(261_944), (0x03de_077f, 29));
    }

    #[test]
    fn levels_are_without_gaps() {
        let mut next = 1;
        for level in &LEVELS {
            assert_eq!(level.base, next);
            next = level.run_max() + 1;
            for run in [level.base, level.run_max()] {
                let mut encoder = Encoder::new(9);
                // The bit in front makes the word straddle bytes.
                assert!(encoder.push(1) && (encoder.push(run) || level.bits() > 62), "{run}");
                let pad = encoder.pad_bits();
                let bytes = encoder.into_bytes();
                let runs: Result<Vec<_>, _> = Decoder::new(&bytes, pad).collect();
                assert_eq!(runs, Ok(vec![1, run]));
            }
        }
        assert_eq!(RUN_MAX, 72_057_611_219_902_768);
        let mut encoder = Encoder::new(100);
        assert!(!encoder.push(0) && !encoder.push(RUN_MAX + 1) && encoder.is_empty());
    }

    #[test]
    fn truncated_code_words() {
        assert_eq!(Decoder::new(&[0x0f], 0).collect::<Vec<_>>(), [Err(Truncated)]);
        assert_eq!(Decoder::new(&[0x00], 7).collect::<Vec<_>>(), [Err(Truncated)]);
        assert_eq!(Decoder::new(&[0x00], 6).collect::<Vec<_>>(), [Ok(1)]);
        assert_eq!(Decoder::new(&[], 7).next(), None);
    }

    #[test]
    fn a_full_encoder_refuses() {
        let mut encoder = Encoder::new(1);
        assert!((0..4).all(|_| encoder.push(1)));
        assert!(!encoder.push(1));
        assert_eq!((encoder.len(), encoder.pad_bits()), (1, 0));
    }
}
