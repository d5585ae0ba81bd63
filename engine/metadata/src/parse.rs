//! Reading text dumps (restore-md, verify-dump; `spec/metadata.md` §12.1, §12.2).

use crate::layout::check_bytes_per_bit;
use crate::superblock::{PeerSlot, Superblock, Version};
use crate::{DeviceFlags, HISTORY_LEN, PEERS_MAX, PeerFlags};

/// Longest string token.
const STRING_MAX: usize = 20;
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

/// Why a dump was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Something else was expected.
    #[error("Parse error in line {line}: {expected} expected, {seen}")]
    Unexpected {
        /// Line, from 1.
        line: u32,
        /// What should be there.
        expected: String,
        /// What is there.
        seen: String,
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
    Bad(&'a str),
    End,
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
            let slot = usize::try_from(n).ok().filter(|n| *n < PEERS_MAX && !seen[*n]);
            let Some(slot) = slot else {
                return Err(ParseError::Range { what: "peer", value: n, line });
            };
            seen[slot] = true;
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
                other => return Err(self.unexpected("64-bit hex number, 'times' or '}'", &other)),
            };
            self.symbol(';')?;
            match runs.last_mut() {
                Some(last) if last.word == word => last.count = last.count.saturating_add(count),
                _ => runs.push(Run { count, word }),
            }
        }
    }

    fn index(&mut self, wanted: u32) -> Result<(), ParseError> {
        self.symbol('[')?;
        let line = self.line;
        let value = self.num()?;
        if value != i64::from(wanted) {
            return Err(ParseError::Range { what: "bitmap", value, line });
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
            other => Err(self.unexpected(&format!("'{keyword}'"), &other)),
        }
    }

    fn symbol(&mut self, symbol: char) -> Result<(), ParseError> {
        match self.next() {
            Token::Symbol(s) if s == symbol => Ok(()),
            other => Err(self.unexpected(&format!("'{symbol}'"), &other)),
        }
    }

    fn text(&mut self) -> Result<&'a str, ParseError> {
        match self.next() {
            Token::Text(text) => Ok(text),
            other => Err(self.unexpected("string", &other)),
        }
    }

    fn hex32(&mut self) -> Result<u32, ParseError> {
        match self.next() {
            Token::Hex32(value) => Ok(value),
            other => Err(self.unexpected("32-bit hex number", &other)),
        }
    }

    fn hex64(&mut self) -> Result<u64, ParseError> {
        match self.next() {
            Token::Hex64(value) => Ok(value),
            other => Err(self.unexpected("64-bit hex number", &other)),
        }
    }

    fn num(&mut self) -> Result<i64, ParseError> {
        match self.next() {
            Token::Num(value) => Ok(value),
            other => Err(self.unexpected("number", &other)),
        }
    }

    fn unexpected(&self, expected: &str, seen: &Token<'_>) -> ParseError {
        let seen = match seen {
            Token::Word(w) => format!("'{w}' seen"),
            Token::Text(t) => format!("\"{t}\" seen"),
            Token::Hex32(v) => format!("0x{v:08X} seen"),
            Token::Hex64(v) => format!("0x{v:016X} seen"),
            Token::Num(v) => format!("{v} seen"),
            Token::Symbol(c) => format!("'{c}' seen"),
            Token::Bad(t) => format!("unknown token '{}' seen", t.escape_debug()),
            Token::End => "end of file seen".to_owned(),
        };
        ParseError::Unexpected { line: self.line, expected: expected.to_owned(), seen }
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
            let token = self.take(if closed { len + 2 } else { 1 });
            return if closed { Token::Text(&token[1..=len]) } else { Token::Bad(token) };
        }
        let part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let len = self.rest.find(|c| !part(c)).unwrap_or(self.rest.len());
        let token = self.take(len.max(first.len_utf8()));
        if let Some(hex) = token.strip_prefix("0x") {
            let digits = hex.bytes().all(|b| b.is_ascii_hexdigit());
            return match (hex.len(), digits, u64::from_str_radix(hex, 16)) {
                (16, true, Ok(value)) => Token::Hex64(value),
                (8, true, Ok(value)) => Token::Hex32(value as u32),
                _ => Token::Bad(token),
            };
        }
        let digits = token.strip_prefix('-').unwrap_or(token);
        if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
            return match token.parse() {
                Ok(value) if digits.len() <= DIGITS_MAX => Token::Num(value),
                _ => Token::Bad(token),
            };
        }
        if token.starts_with(|c: char| c.is_ascii_lowercase()) {
            Token::Word(token)
        } else {
            Token::Bad(token)
        }
    }
}
