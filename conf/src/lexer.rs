//! Tokens of the configuration language (spec/drbd-conf.md §2). Longest match wins, and among equally long
//! ones the more special class. Keywords are words here; the parser tells them apart by text.

use std::sync::Arc;

use crate::error::{FileName, Loc, Problem, Shown};

/// Longest unquoted word.
pub(crate) const WORD_LENGTH_MAX: usize = 128;
/// Longest quoted string, in characters or backslash pairs.
pub(crate) const STRING_LENGTH_MAX: usize = 255;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Integer,
    Ipv4,
    Ipv6,
    Version,
    Word,
    /// The first 129 characters of a longer word: a name too long, and an option value cut in two.
    WordCut,
    Quoted,
    Punct(u8),
    Other,
    End,
}

#[derive(Clone)]
pub(crate) struct Token {
    pub kind: Kind,
    pub text: String,
    pub line: u32,
}

impl Token {
    pub fn is(&self, punct: u8) -> bool {
        self.kind == Kind::Punct(punct)
    }

    /// The text if this token may be a keyword: quoting takes that away.
    pub fn keyword(&self) -> &str {
        if self.kind == Kind::Word { &self.text } else { "" }
    }
}

pub(crate) struct Lexer {
    text: Vec<u8>,
    at: usize,
    line: u32,
    pub file: Arc<FileName>,
}

impl Lexer {
    pub fn new(file: Arc<FileName>, text: Vec<u8>) -> Self {
        Self { text, at: 0, line: 1, file }
    }

    pub fn loc(&self, line: u32) -> Loc {
        Loc::new(&self.file, line)
    }

    fn rest(&self) -> &[u8] {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn skip_blanks(&mut self) {
        while let Some(&byte) = self.text.get(self.at) {
            match byte {
                b'\n' => self.line = self.line.saturating_add(1),
                b' ' | b'\t' | b'\r' => {}
                b'#' => {
                    let comment =
                        self.rest().iter().position(|&byte| byte == b'\n').unwrap_or(self.rest().len());
                    self.at += comment;
                    continue;
                }
                _ => return,
            }
            self.at += 1;
        }
    }

    /// The next token; [`Kind::End`] again and again at the end.
    pub fn next(&mut self) -> Result<Token, Problem> {
        self.skip_blanks();
        let Some(&first) = self.text.get(self.at) else {
            return Ok(Token { kind: Kind::End, text: String::new(), line: self.line });
        };
        if first == b'"' {
            return self.quoted();
        }
        let rest = self.rest();
        let (kind, length) = if matches!(first, b'{' | b'}' | b';' | b'[' | b']') {
            (Kind::Punct(first), 1)
        } else {
            let word = rest.iter().take_while(|&&byte| is_word(byte)).count();
            let ipv6 = ipv6_length(rest);
            match word {
                _ if ipv6 > word => (Kind::Ipv6, ipv6),
                0 if first == b':' => (Kind::Punct(b':'), 1),
                0 => (Kind::Other, utf8_length(rest)),
                _ if word > WORD_LENGTH_MAX => (Kind::WordCut, WORD_LENGTH_MAX + 1),
                _ => (classify(rest.get(..word).unwrap_or_default()), word),
            }
        };
        let text = String::from_utf8_lossy(rest.get(..length).unwrap_or_default()).into_owned();
        self.at += length;
        Ok(Token { kind, text, line: self.line })
    }

    fn quoted(&mut self) -> Result<Token, Problem> {
        let mut value = Vec::new();
        let mut length = 0_usize;
        let mut at = self.at + 1;
        // It may be a secret, so it stays out of `Debug`.
        let shown = |end: usize| {
            let raw = self.text.get(self.at..end.min(self.at + 20)).unwrap_or_default();
            Shown::new(&String::from_utf8_lossy(raw), true)
        };
        let end = loop {
            match self.text.get(at) {
                Some(b'"') => break at + 1,
                None | Some(b'\n') => {
                    return Err(Problem::UnterminatedString { at: self.loc(self.line), text: shown(at + 1) });
                }
                Some(b'\\') => match self.text.get(at + 1) {
                    None | Some(b'\n') => {
                        return Err(Problem::UnterminatedString {
                            at: self.loc(self.line),
                            text: shown(at + 2),
                        });
                    }
                    Some(&byte) => {
                        value.push(byte);
                        at += 2;
                    }
                },
                Some(&byte) => {
                    value.push(byte);
                    at += 1;
                }
            }
            length += 1;
            if length > STRING_LENGTH_MAX {
                return Err(Problem::StringTooLong { at: self.loc(self.line), text: shown(at) });
            }
        };
        let Ok(text) = String::from_utf8(value) else {
            return Err(Problem::NotUtf8 { at: self.loc(self.line) });
        };
        self.at = end;
        Ok(Token { kind: Kind::Quoted, text, line: self.line })
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'_' | b'-')
}

/// Length of the character at the start of `text`, one byte if it is not UTF-8.
fn utf8_length(text: &[u8]) -> usize {
    (1..=4)
        .find(|&length| text.get(..length).is_some_and(|bytes| std::str::from_utf8(bytes).is_ok()))
        .unwrap_or(1)
}

fn classify(word: &[u8]) -> Kind {
    let digits = |text: &[u8]| !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let number = match word.split_last() {
        Some((b'M' | b'K' | b'G' | b's', number)) => number,
        _ => word,
    };
    if digits(number) && number.len() <= 8 {
        return Kind::Integer;
    }
    let groups: Vec<&[u8]> = word.split(|&byte| byte == b'.').collect();
    match groups.len() {
        4 if groups.iter().all(|group| digits(group) && group.len() <= 3) => Kind::Ipv4,
        3 if groups.iter().all(|group| digits(group)) => Kind::Version,
        _ => Kind::Word,
    }
}

/// Longest IPv6 address at the start of `text`: up to six groups, colon, optional group, colon, up to six
/// groups, optional scope; or `::ffff:` and an IPv4 address.
fn ipv6_length(text: &[u8]) -> usize {
    let group = |at: usize| {
        text.get(at..).unwrap_or_default().iter().take(4).take_while(|byte| byte.is_ascii_hexdigit()).count()
    };
    let colon = |at: usize| text.get(at) == Some(&b':');
    let mut best = 0;
    let mut lead = 0;
    for leading in 0..=6 {
        // `lead` is the end of `leading` groups with their separating colons, the last colon left out.
        if leading > 0 {
            let start = if leading == 1 { 0 } else { lead + 1 };
            if leading > 1 && !colon(lead) {
                break;
            }
            let length = group(start);
            if length == 0 {
                break;
            }
            lead = start + length;
        }
        if !colon(lead) {
            continue;
        }
        let middle = lead + 1 + group(lead + 1);
        if !colon(middle) {
            continue;
        }
        let mut end = middle + 1;
        for trailing in 0..6 {
            let start = if trailing == 0 { end } else { end + 1 };
            if trailing > 0 && !colon(end) {
                break;
            }
            let length = group(start);
            if length == 0 {
                break;
            }
            end = start + length;
        }
        best = best.max(end);
    }
    if text.get(..7).is_some_and(|head| head.eq_ignore_ascii_case(b"::ffff:")) {
        let tail = text.get(7..).unwrap_or_default();
        let length = tail.iter().take_while(|&&byte| byte.is_ascii_digit() || byte == b'.').count();
        if classify(tail.get(..length).unwrap_or_default()) == Kind::Ipv4 {
            best = best.max(7 + length);
        }
    }
    if best > 0 && text.get(best) == Some(&b'%') {
        let scope =
            text.get(best + 1..).unwrap_or_default().iter().take_while(|&&byte| is_word(byte)).count();
        if scope > 0 {
            best += 1 + scope;
        }
    }
    best
}

/// Words that are never names unless quoted. `internal`, `protocol`, `plugin` and the words of `startup` are
/// known by their place only.
const KEYWORDS: &[&str] = &[
    "global",
    "common",
    "resource",
    "include",
    "skip",
    "on",
    "floating",
    "stacked-on-top-of",
    "disk",
    "net",
    "options",
    "startup",
    "handlers",
    "proxy",
    "syncer",
    "device",
    "meta-disk",
    "flexible-meta-disk",
    "volume",
    "connection",
    "connection-mesh",
    "hosts",
    "host",
    "template-file",
    "node-id",
    "address",
    "port",
    "via",
    "path",
    "inside",
    "outside",
    "outside-address",
    "minor",
    "ipv4",
    "ipv6",
    "sdp",
    "ssocks",
    "sci",
    "udev-always-use-vnr",
    "disable-ip-verification",
    "minor-count",
    "dialog-refresh",
    "cmd-timeout-short",
    "cmd-timeout-medium",
    "cmd-timeout-long",
    "usage-count",
    "yes",
    "no",
    "ask",
    "tiebreaker",
    "_this_host",
    "_remote_host",
    "_peer_node_id",
    "_cstate",
    "_unknown",
    "_is_standalone",
    "require-drbd-module-version-eq",
    "require-drbd-module-version-ne",
    "require-drbd-module-version-gt",
    "require-drbd-module-version-ge",
    "require-drbd-module-version-lt",
    "require-drbd-module-version-le",
];

pub(crate) fn is_keyword(word: &str) -> bool {
    KEYWORDS.contains(&word)
}

/// Whether `text` is read as one word when it stands without quotes.
pub(crate) fn is_bare_word(text: &str) -> bool {
    !text.is_empty() && text.len() <= WORD_LENGTH_MAX && text.bytes().all(is_word)
}

/// Whether `text` is read as a name when it stands without quotes: no keyword, number or address.
pub(crate) fn is_bare_name(text: &str) -> bool {
    is_bare_word(text) && !is_keyword(text) && classify(text.as_bytes()) == Kind::Word
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str) -> Vec<(Kind, String)> {
        let file = Arc::new(FileName::new("x", "x"));
        let mut lexer = Lexer::new(file, text.as_bytes().to_vec());
        let mut tokens = Vec::new();
        loop {
            let token = lexer.next().unwrap();
            if token.kind == Kind::End {
                return tokens;
            }
            tokens.push((token.kind, token.text));
        }
    }

    #[test]
    fn classes() {
        for (text, kind) in [
            ("8K", Kind::Integer),
            ("4194304s", Kind::Integer),
            ("400k", Kind::Word),
            ("123456789", Kind::Word),
            ("198.51.100.11", Kind::Ipv4),
            ("9.2.0", Kind::Version),
            ("9.2", Kind::Word),
            ("::1", Kind::Ipv6),
            ("2001:db8::", Kind::Ipv6),
            ("2001:db8:0:1::a", Kind::Ipv6),
            ("1:2:3:4:5:6:7:8", Kind::Ipv6),
            ("::ffff:192.0.2.1", Kind::Ipv6),
            ("fe80::2%br-1.5", Kind::Ipv6),
            ("64K-striping", Kind::Word),
            ("\"on\"", Kind::Quoted),
            ("*", Kind::Other),
            ("é", Kind::Other),
            ("'", Kind::Other),
        ] {
            let tokens = all(text);
            assert_eq!(tokens.len(), 1, "{text}: {tokens:?}");
            assert_eq!(tokens[0].0, kind, "{text}");
        }
    }

    #[test]
    fn comments_strings_and_lines() {
        let tokens = all("a#b\n\"x\\\"y\\\\z\\q\" 1.2.3.4:7 # end");
        let texts: Vec<&str> = tokens.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(texts, ["a", "x\"y\\zq", "1.2.3.4", ":", "7"]);
    }
}
