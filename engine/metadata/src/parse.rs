//! Reading text dumps (restore-md, verify-dump; `spec/metadata.md` §12.1, §12.2).

use crate::layout::check_bytes_per_bit;
use crate::superblock::{PeerSlot, Superblock, Version};
use crate::{Bitmap, DeviceFlags, HISTORY_LEN, PEERS_MAX, PeerFlags};

/// Longest string token.
const STRING_MAX: usize = 20;
/// Most characters shown of what is no token.
const SHOWN_MAX: usize = 64;
const STRING: &str = "short quoted string (\"..up to 20 characters, no newline..\")";
const WORD_OR_END: &str = "repeat count, 16-digit hex number, or closing brace (})";
/// Most digits of a number.
const DIGITS_MAX: usize = 19;

/// `count` equal 64-bit words of one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Repetitions.
    pub count: u64,
    /// The word, lowest block number in the least significant bit.
    pub word: u64,
}

/// A dump, parsed completely; nothing depends on a device yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParsedDump {
    /// All fields of the file. Sizes and offsets are 0: [`Superblock::set_layout`] fills them.
    pub superblock: Superblock,
    /// Words of each slot, run-length coded, possibly shorter or longer than the bitmap.
    pub bitmaps: Vec<Vec<Run>>,
}

impl ParsedDump {
    /// Whether a section has words behind the end of `bitmap`; restoring drops them.
    pub fn reaches_beyond(&self, bitmap: &Bitmap) -> bool {
        self.bitmaps.iter().enumerate().take(bitmap.slots()).any(|(slot, runs)| {
            let words = runs.iter().fold(0, |sum: u64, run| sum.saturating_add(run.count));
            words > bitmap.words(slot).len() as u64
        })
    }
}

/// Why a dump was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Something else was expected.
    #[error("{bad}Parse error in line {line}: {expected} expected{seen}")]
    Unexpected {
        /// A line about what is no token at all, or nothing.
        bad: String,
        /// Line, from 1.
        line: u32,
        /// What should be there.
        expected: String,
        /// What is there instead, with the punctuation before it.
        seen: String,
    },
    /// A bitmap out of order.
    #[error("Parse error in line {line}: Expected peer slot {expected} but found {found}")]
    Bitmap {
        /// Line, from 1.
        line: u32,
        /// What should be there.
        expected: u32,
        /// What is there.
        found: i64,
    },
    /// A node id that cannot be.
    #[error("Parse error in line {line}: Slot {slot} out of range")]
    Slot {
        /// Line, from 1.
        line: u32,
        /// What is there.
        slot: i64,
    },
    /// A node id that was there already.
    #[error("Parse error in line {line}: Peer slot {slot} defined multiple times")]
    Again {
        /// Line, from 1.
        line: u32,
        /// What is there.
        slot: i64,
    },
    /// Another version.
    #[error("dump is '{found}' you requested '{wanted}'.")]
    Version {
        /// In the file.
        found: String,
        /// Asked for.
        wanted: &'static str,
    },
    /// Bytes per bit.
    #[error("Invalid value for bm-byte-per-bit: {0}; it must be a power of two from 4096 to 1048576.")]
    BytesPerBit(i64),
    /// A number beyond its field.
    #[error("The number {value} for {what} in line {line} is out of range; correct the dump.")]
    Range {
        /// Keyword.
        what: &'static str,
        /// Value.
        value: i64,
        /// Line, from 1.
        line: u32,
    },
}

#[derive(Clone, Debug, PartialEq)]
enum Token<'a> {
    Word(&'a str),
    Text(&'a str),
    Hex32(u32),
    Hex64(u64),
    Num(i64),
    Symbol(char),
    /// Why it is none, and what was read of it.
    Bad(&'static str, &'a str),
    Character(char),
    End,
}

const KEYWORDS: &[&str] = &[
    "version",
    "max-peers",
    "node-id",
    "current-uuid",
    "flags",
    "members",
    "peer",
    "bitmap-index",
    "bitmap-uuid",
    "bitmap-dagtag",
    "history-uuids",
    "uuid",
    "gc",
    "la-size-sect",
    "bm-byte-per-bit",
    "device-uuid",
    "la-peer-max-bio-size",
    "al-stripes",
    "al-stripe-size-4k",
    "bm",
    "bitmap",
    "times",
];

fn symbol_name(symbol: char) -> &'static str {
    match symbol {
        ';' => "semicolon",
        '[' => "opening bracket",
        ']' => "closing bracket",
        '{' => "opening brace",
        _ => "closing brace",
    }
}

struct Parser<'a> {
    rest: &'a str,
    line: u32,
}

/// Parses a dump of the wanted version.
pub fn parse_dump(text: &str, wanted: Version) -> Result<ParsedDump, ParseError> {
    let mut p = Parser { rest: text, line: 1 };
    p.word("version")?;
    let found = p.text()?;
    p.symbol(';')?;
    if found != wanted.name() {
        return Err(ParseError::Version { found: found.to_owned(), wanted: wanted.name() });
    }
    let mut sb = empty(wanted);
    match wanted {
        Version::V08 => p.v08_body(&mut sb)?,
        Version::V09 => p.v09_body(&mut sb)?,
    }
    p.common(&mut sb)?;
    let mut bitmaps = Vec::new();
    for n in 0..sb.max_peers {
        if wanted == Version::V08 {
            p.word("bm")?;
        } else {
            p.word("bitmap")?;
            p.index(n)?;
        }
        bitmaps.push(p.words()?);
    }
    match p.next() {
        Token::End => Ok(ParsedDump { superblock: sb, bitmaps }),
        other => Err(p.unexpected("end of file", &other)),
    }
}

fn empty(version: Version) -> Superblock {
    let mut peers = [PeerSlot::EMPTY; PEERS_MAX];
    if version == Version::V08 {
        peers[0].bitmap_index = 0;
    }
    Superblock {
        version,
        v08_in_use: false,
        effective_size_sectors: 0,
        current_uuid: 0,
        members: 0,
        device_uuid: 0,
        flags: DeviceFlags::NONE,
        md_size_sectors: 0,
        al_offset: 0,
        al_nr_extents: 257,
        bm_offset: 0,
        bm_bytes_per_bit: 0,
        max_peer_bio_size: 0,
        max_peers: 1,
        node_id: -1,
        al_stripes: 0,
        al_stripe_size_4k: 0,
        peers,
        history: [0; HISTORY_LEN],
    }
}

impl<'a> Parser<'a> {
    fn v08_body(&mut self, sb: &mut Superblock) -> Result<(), ParseError> {
        self.word("uuid")?;
        self.symbol('{')?;
        let mut uuids = [0; 4];
        for uuid in &mut uuids {
            *uuid = self.hex64()?;
            self.symbol(';')?;
        }
        [sb.current_uuid, sb.peers[0].bitmap_uuid, sb.history[0], sb.history[1]] = uuids;
        sb.flags = DeviceFlags(self.field("flags", Self::hex32)?);
        self.symbol('}')
    }

    fn v09_body(&mut self, sb: &mut Superblock) -> Result<(), ParseError> {
        sb.max_peers = self.ranged("max-peers", 1, 31)? as u32;
        sb.node_id = self.ranged("node-id", -1, 31)? as i32;
        sb.current_uuid = self.field("current-uuid", Self::hex64)?;
        sb.flags = DeviceFlags(self.field("flags", Self::hex32)?);
        // The only optional element: tools before 9.3 do not know it.
        if self.peek() == Token::Word("members") {
            sb.members = self.field("members", Self::hex64)?;
        }
        let mut seen = [false; PEERS_MAX];
        for _ in 0..PEERS_MAX {
            self.word("peer")?;
            self.symbol('[')?;
            let line = self.line;
            let n = self.num()?;
            let slot = usize::try_from(n).ok().filter(|n| *n < PEERS_MAX);
            let slot = slot.ok_or(ParseError::Slot { line, slot: n })?;
            if std::mem::replace(&mut seen[slot], true) {
                return Err(ParseError::Again { line, slot: n });
            }
            self.symbol(']')?;
            self.symbol('{')?;
            sb.peers[slot] = PeerSlot {
                bitmap_index: self.ranged("bitmap-index", -1, 31)? as i32,
                bitmap_uuid: self.field("bitmap-uuid", Self::hex64)?,
                bitmap_dagtag: self.field("bitmap-dagtag", Self::hex64)?,
                flags: PeerFlags(self.field("flags", Self::hex32)?),
            };
            self.symbol('}')?;
        }
        self.word("history-uuids")?;
        self.symbol('{')?;
        for uuid in &mut sb.history {
            *uuid = self.hex64()?;
            self.symbol(';')?;
        }
        self.symbol('}')
    }

    fn common(&mut self, sb: &mut Superblock) -> Result<(), ParseError> {
        let u32_max = i64::from(u32::MAX);
        sb.effective_size_sectors = self.ranged("la-size-sect", 0, i64::MAX)? as u64;
        let bytes = self.field("bm-byte-per-bit", Self::num)?;
        sb.bm_bytes_per_bit = u32::try_from(bytes)
            .ok()
            .filter(|b| check_bytes_per_bit(*b).is_ok())
            .ok_or(ParseError::BytesPerBit(bytes))?;
        sb.device_uuid = self.field("device-uuid", Self::hex64)?;
        sb.max_peer_bio_size = self.ranged("la-peer-max-bio-size", 0, u32_max)? as u32;
        sb.al_stripes = self.ranged("al-stripes", 0, u32_max)? as u32;
        sb.al_stripe_size_4k = self.ranged("al-stripe-size-4k", 0, u32_max)? as u32;
        Ok(())
    }

    fn words(&mut self) -> Result<Vec<Run>, ParseError> {
        self.symbol('{')?;
        let mut runs: Vec<Run> = Vec::new();
        loop {
            let line = self.line;
            let (count, word) = match self.next() {
                Token::Symbol('}') => return Ok(runs),
                Token::Hex64(word) => (1, word),
                Token::Num(count) => {
                    self.word("times")?;
                    let count = u64::try_from(count).map_err(|_| ParseError::Range {
                        what: "times",
                        value: count,
                        line,
                    })?;
                    (count, self.hex64()?)
                }
                other => return Err(self.unexpected(WORD_OR_END, &other)),
            };
            self.symbol(';')?;
            match runs.last_mut() {
                Some(last) if last.word == word => last.count = last.count.saturating_add(count),
                _ => runs.push(Run { count, word }),
            }
        }
    }

    fn index(&mut self, expected: u32) -> Result<(), ParseError> {
        self.symbol('[')?;
        let line = self.line;
        let found = self.num()?;
        if found != i64::from(expected) {
            return Err(ParseError::Bitmap { line, expected, found });
        }
        self.symbol(']')
    }

    /// `keyword value ;`
    fn field<T>(
        &mut self,
        keyword: &'static str,
        value: impl FnOnce(&mut Self) -> Result<T, ParseError>,
    ) -> Result<T, ParseError> {
        self.word(keyword)?;
        let value = value(self)?;
        self.symbol(';')?;
        Ok(value)
    }

    fn ranged(&mut self, what: &'static str, low: i64, high: i64) -> Result<i64, ParseError> {
        let line = self.line;
        let value = self.field(what, Self::num)?;
        if (low..=high).contains(&value) { Ok(value) } else { Err(ParseError::Range { what, value, line }) }
    }

    fn word(&mut self, keyword: &'static str) -> Result<(), ParseError> {
        match self.next() {
            Token::Word(w) if w == keyword => Ok(()),
            other => Err(self.unexpected(&format!("keyword '{keyword}'"), &other)),
        }
    }

    fn symbol(&mut self, symbol: char) -> Result<(), ParseError> {
        match self.next() {
            Token::Symbol(s) if s == symbol => Ok(()),
            other => Err(self.unexpected(&format!("{} ({symbol})", symbol_name(symbol)), &other)),
        }
    }

    fn text(&mut self) -> Result<&'a str, ParseError> {
        match self.next() {
            Token::Text(text) => Ok(text),
            other => Err(self.unexpected(STRING, &other)),
        }
    }

    fn hex32(&mut self) -> Result<u32, ParseError> {
        match self.next() {
            Token::Hex32(value) => Ok(value),
            other => Err(self.unexpected("an 8-digit hex number", &other)),
        }
    }

    fn hex64(&mut self) -> Result<u64, ParseError> {
        match self.next() {
            Token::Hex64(value) => Ok(value),
            other => Err(self.unexpected("a 16-digit hex number", &other)),
        }
    }

    fn num(&mut self) -> Result<i64, ParseError> {
        match self.next() {
            Token::Num(value) => Ok(value),
            other => Err(self.unexpected("number ([0-9], up to 20 digits)", &other)),
        }
    }

    fn unexpected(&self, expected: &str, seen: &Token<'_>) -> ParseError {
        let mut bad = String::new();
        let seen = match seen {
            Token::Word(w) => format!(", not '{w}'"),
            Token::Text(t) => format!(", not '{t}'"),
            Token::Hex32(_) | Token::Hex64(_) | Token::Num(_) => ", not some number".to_owned(),
            Token::Symbol(c) => format!(", not '{c}'"),
            Token::Bad(why, text) => {
                let text: String = text.chars().take(SHOWN_MAX).collect();
                bad = format!("line {}: {why}: {text} ...\n", self.line);
                String::new()
            }
            Token::Character(c) => {
                let shown = c.escape_debug();
                format!("; got invalid input character '\\x{:x}' [{shown}]", u32::from(*c))
            }
            Token::End => ", but end of file encountered".to_owned(),
        };
        ParseError::Unexpected { bad, line: self.line, expected: expected.to_owned(), seen }
    }

    fn peek(&self) -> Token<'a> {
        Self { rest: self.rest, line: self.line }.next()
    }

    fn take(&mut self, bytes: usize) -> &'a str {
        let (token, rest) = self.rest.split_at_checked(bytes).unwrap_or((self.rest, ""));
        self.rest = rest;
        token
    }

    fn skip_space(&mut self) {
        loop {
            let trimmed = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
            let space = &self.rest[..self.rest.len() - trimmed.len()];
            self.line = self.line.saturating_add(space.matches('\n').count() as u32);
            self.rest = trimmed;
            if !trimmed.starts_with('#') {
                return;
            }
            self.take(trimmed.find('\n').unwrap_or(trimmed.len()));
        }
    }

    fn next(&mut self) -> Token<'a> {
        self.skip_space();
        let Some(first) = self.rest.chars().next() else { return Token::End };
        if "{}[];".contains(first) {
            self.take(1);
            return Token::Symbol(first);
        }
        if first == '"' {
            let inner = &self.rest[1..];
            let len = inner.find(['"', '\n']).unwrap_or(inner.len());
            let closed = inner[len..].starts_with('"') && (1..=STRING_MAX).contains(&len);
            if closed {
                return Token::Text(&self.take(len + 2)[1..=len]);
            }
            let empty = inner.starts_with('"');
            let shown = if empty { 1 } else { inner.floor_char_boundary(len.min(STRING_MAX)) };
            return Token::Bad("invalid string", self.take(1 + shown));
        }
        let part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let len = self.rest.find(|c| !part(c)).unwrap_or(self.rest.len());
        if len == 0 {
            self.take(first.len_utf8());
            return Token::Character(first);
        }
        let token = self.take(len);
        if let Some(hex) = token.strip_prefix("0x") {
            let digits = hex.bytes().all(|b| b.is_ascii_hexdigit());
            return match (hex.len(), digits, u64::from_str_radix(hex, 16)) {
                (16, true, Ok(value)) => Token::Hex64(value),
                (8, true, Ok(value)) => Token::Hex32(value as u32),
                _ => Token::Bad("invalid hex number (only 8 or 16 hex digits accepted)", token),
            };
        }
        let digits = token.strip_prefix('-').unwrap_or(token);
        if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
            return match token.parse() {
                Ok(value) if digits.len() <= DIGITS_MAX => Token::Num(value),
                _ => Token::Bad("number too big", token),
            };
        }
        if KEYWORDS.contains(&token) { Token::Word(token) } else { Token::Bad("unknown token", token) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said_in_the_words_of_the_reference() {
        let head = "version \"v09\";\nmax-peers 1; ";
        let string = "short quoted string (\"..up to 20 characters, no newline..\") expected";
        for (text, said) in [
            ("version", format!("Parse error in line 1: {string}, but end of file encountered")),
            ("version 5;", format!("Parse error in line 1: {string}, not some number")),
            ("max-peers", "Parse error in line 1: keyword 'version' expected, not 'max-peers'".to_owned()),
            ("version \"v09\" peer", "Parse error in line 1: semicolon (;) expected, not 'peer'".to_owned()),
            (
                "zork",
                "line 1: unknown token: zork ...\nParse error in line 1: keyword 'version' expected"
                    .to_owned(),
            ),
            (
                &format!("{head}="),
                "Parse error in line 2: keyword 'node-id' expected; got invalid input character '\\x3d' [=]"
                    .to_owned(),
            ),
            (
                "version \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\";",
                format!(
                    "line 1: invalid string: \"aaaaaaaaaaaaaaaaaaaa ...\nParse error in line 1: {string}"
                ),
            ),
        ] {
            assert_eq!(parse_dump(text, Version::V09).unwrap_err().to_string(), said, "{text}");
        }
        // Whatever a file holds is an error and no panic.
        for odd in ["ä", "\"ää", "\"äääääääääääää\n", "\"", "-", "0x", "--5", "\0", "version \"", "\"ä\"ä"]
        {
            for text in [odd.to_owned(), format!("version {odd}"), format!("{head}{odd}")] {
                assert!(parse_dump(&text, Version::V09).is_err(), "{text}");
            }
        }
    }
}
