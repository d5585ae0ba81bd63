//! The grammar (spec/drbd-conf.md §3), one function per production. A syntax error stops at once; bad
//! values are collected, as the reference does.

mod connection;
mod resource;
mod section;

use std::collections::{BTreeSet, HashMap};
use std::io::ErrorKind;
use std::sync::Arc;

use crate::error::{Error, FileName, Loc, Notice, Problem, Shown};
use crate::lexer::{Kind, Lexer, Token, is_keyword};
use crate::model::{Address, Common, Family, Global, RESOURCES_MAX, Resource};
use crate::options::{self, Class, OptionList, SetOption, Unit};
use crate::source::{FILE_SIZE_MAX, Source, is_pattern};

/// Deepest nesting of included files.
const INCLUDE_DEPTH_MAX: usize = 64;

/// A syntax error that ends parsing.
pub(crate) type Parsed<T> = Result<T, Box<Problem>>;

/// The version of the loaded engine, for `require-drbd-module-version-*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ModuleVersion(pub u32, pub u32, pub u32);

impl std::fmt::Display for ModuleVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// What parsing leaves behind.
pub(crate) struct Output {
    pub file: Arc<FileName>,
    pub global: Option<Global>,
    pub common: Option<Common>,
    pub resources: Vec<Resource>,
    pub notices: Vec<Notice>,
    pub problems: Vec<Problem>,
}

pub(crate) struct Parser<'a> {
    source: &'a dyn Source,
    version: Option<ModuleVersion>,
    lexer: Lexer,
    peeked: Option<Token>,
    /// Line of the token taken last.
    line: u32,
    /// A secret was the last option value: what follows may be part of it.
    after_secret: bool,
    /// Settings in the section that is being read.
    settings: usize,
    files_read: BTreeSet<String>,
    seen: HashMap<(&'static str, String), Loc>,
    out: Output,
}

/// Opens a file; the problem says why not.
pub(crate) fn open(source: &dyn Source, path: &str) -> Result<Vec<u8>, Problem> {
    match source.read(path) {
        Ok(text) if text.len() > FILE_SIZE_MAX => {
            Err(Problem::FileTooLarge { path: path.to_owned(), limit: FILE_SIZE_MAX })
        }
        Ok(text) => Ok(text),
        Err(error) if error.kind() == ErrorKind::IsADirectory => {
            Err(Problem::IsDirectory { path: path.to_owned() })
        }
        Err(error) => Err(Problem::CannotOpen { path: path.to_owned(), reason: error.to_string() }),
    }
}

impl<'a> Parser<'a> {
    /// Parses `path`, what it includes, and the further files of `options`.
    pub fn run(
        source: &'a dyn Source,
        path: &str,
        options: &crate::LoadOptions<'_>,
    ) -> Result<Output, Error> {
        let text = open(source, path)?;
        let file = Arc::new(if path == "-" {
            FileName::new("STDIN", "STDIN")
        } else {
            FileName::new(path, &source.canonical(path))
        });
        let mut parser = Parser {
            source,
            version: options.module_version,
            lexer: Lexer::new(Arc::clone(&file), text),
            peeked: None,
            line: 1,
            after_secret: false,
            settings: 0,
            files_read: BTreeSet::from([file.canonical.clone()]),
            seen: HashMap::new(),
            out: Output {
                file,
                global: None,
                common: None,
                resources: Vec::new(),
                notices: Vec::new(),
                problems: Vec::new(),
            },
        };
        parser.files_read.extend(options.already_read.iter().map(|path| source.canonical(path)));
        let mut result = parser.file(0);
        for path in options.more {
            if result.is_ok() {
                let text = open(source, path)?;
                result = parser.nested(path, text, |parser| parser.file(0));
            }
        }
        if let Err(problem) = result {
            parser.out.problems.push(*problem);
        }
        Ok(parser.out)
    }

    // ---- tokens ----

    fn next(&mut self) -> Parsed<Token> {
        let token = match self.peeked.take() {
            Some(token) => token,
            None => self.lexer.next()?,
        };
        self.line = token.line;
        Ok(token)
    }

    fn peek(&mut self) -> Parsed<&Token> {
        let token = match self.peeked.take() {
            Some(token) => token,
            None => self.lexer.next()?,
        };
        Ok(self.peeked.insert(token))
    }

    fn here(&self) -> Loc {
        self.lexer.loc(self.line)
    }

    fn expected<T>(&self, expected: &str, got: &Token) -> Parsed<T> {
        Err(Box::new(Problem::Expected {
            at: self.lexer.loc(got.line),
            expected: expected.to_owned(),
            got: Shown::new(&got.text, self.after_secret),
        }))
    }

    fn punct(&mut self, punct: u8) -> Parsed<()> {
        let token = self.next()?;
        if token.is(punct) {
            self.after_secret = false;
            return Ok(());
        }
        self.expected(&char::from(punct).to_string(), &token)
    }

    /// A name: quoted, or a word that is no keyword.
    fn string(&mut self, expected: &str) -> Parsed<String> {
        let token = self.next()?;
        self.name(token, expected)
    }

    fn name(&self, token: Token, expected: &str) -> Parsed<String> {
        match token.kind {
            Kind::Quoted => Ok(token.text),
            Kind::Word if !is_keyword(&token.text) => Ok(token.text),
            Kind::WordCut => Err(Box::new(Problem::TokenTooLong {
                at: self.lexer.loc(token.line),
                text: Shown::new(&token.text, false),
            })),
            _ => self.expected(expected, &token),
        }
    }

    fn keyword(&mut self, word: &str, expected: &str) -> Parsed<()> {
        let token = self.next()?;
        if token.keyword() == word { Ok(()) } else { self.expected(expected, &token) }
    }

    /// An integer token; its text.
    fn integer(&mut self) -> Parsed<String> {
        let token = self.next()?;
        if token.kind == Kind::Integer { Ok(token.text) } else { self.expected("TK_INTEGER", &token) }
    }

    /// An integer without range, such as a volume number.
    fn plain_integer(&mut self, what: &str) -> Parsed<u32> {
        self.ranged(what, 0, u32::MAX.into()).map(|value| u32::try_from(value).unwrap_or(u32::MAX))
    }

    /// An integer within a range; out of it, a problem is noted and the value passed on cut to the range.
    fn ranged(&mut self, what: &str, min: u64, max: u64) -> Parsed<u64> {
        let text = self.integer()?;
        let value = options::number(&text, Unit::Plain).unwrap_or(u64::MAX);
        if value < min || value > max {
            let (at, what) = (self.here(), what.to_owned());
            self.out.problems.push(Problem::OutOfRange { at, what, text, value, min, max });
        }
        Ok(value.clamp(min, max))
    }

    /// Strings up to `{`, at least one.
    fn names_before_brace(&mut self) -> Parsed<Vec<String>> {
        let first = if self.peek()?.is(b'{') { "TK_STRING" } else { "TK_STRING | '{'" };
        let mut names = vec![self.string(first)?];
        loop {
            let token = self.next()?;
            if token.is(b'{') {
                return Ok(names);
            }
            names.push(self.name(token, "TK_STRING | '{'")?);
            self.at_most(names.len(), 256, "names in one statement")?;
        }
    }

    fn at_most(&self, count: usize, limit: usize, what: &'static str) -> Parsed<()> {
        if count <= limit { Ok(()) } else { Err(Box::new(Problem::TooMany { at: self.here(), what, limit })) }
    }

    /// Refuses a second use of something.
    fn once(&mut self, what: &'static str, key: String, at: &Loc) -> Parsed<()> {
        if let Some(first) = self.seen.get(&(what, key.clone())) {
            return Err(Box::new(Problem::Conflict { at: at.clone(), first: first.clone(), what, key }));
        }
        self.seen.insert((what, key), at.clone());
        Ok(())
    }

    // ---- files ----

    fn file(&mut self, depth: usize) -> Parsed<()> {
        loop {
            let token = self.next()?;
            let at = self.here();
            match token.keyword() {
                "global" => self.global(&at)?,
                "common" => {
                    self.once("resource section", "common".to_owned(), &at)?;
                    self.punct(b'{')?;
                    let body = self.resource_body(None)?.body;
                    self.out.common = Some(Common { at, body });
                }
                "resource" => {
                    let resource = self.resource()?;
                    self.out.resources.push(resource);
                    self.at_most(self.out.resources.len(), RESOURCES_MAX, "resources")?;
                }
                "skip" => self.skip()?,
                "include" => self.include(depth)?,
                word if word.starts_with("require-drbd-module-version-") => {
                    let operator = word.rsplit('-').next().unwrap_or_default().to_owned();
                    self.module_version(&operator, &token)?;
                }
                _ if token.kind == Kind::End => return Ok(()),
                _ => return self.unknown_statement(&token),
            }
        }
    }

    fn unknown_statement(&self, token: &Token) -> Parsed<()> {
        self.expected(
            "global | common | resource | skip | include |\n\trequire-drbd-module-version-{eq,ne,gt,ge,lt,le}",
            token,
        )
    }

    /// Parses another file in between.
    fn nested<T>(
        &mut self,
        path: &str,
        text: Vec<u8>,
        parse: impl FnOnce(&mut Self) -> Parsed<T>,
    ) -> Parsed<T> {
        let name = Arc::new(FileName::new(path, &self.source.canonical(path)));
        self.files_read.insert(name.canonical.clone());
        let outer = std::mem::replace(&mut self.lexer, Lexer::new(name, text));
        let peeked = self.peeked.take();
        let line = std::mem::replace(&mut self.line, 1);
        let result = parse(self)?;
        // After an error the places of the inner file must stay, so nothing is restored then.
        self.lexer = outer;
        self.peeked = peeked;
        self.line = line;
        Ok(result)
    }

    /// `name` as seen from the file that is being read.
    fn beside(&self, name: &str) -> String {
        match self.lexer.file.given.rsplit_once('/') {
            Some((folder, _)) if !name.starts_with('/') => format!("{folder}/{name}"),
            _ => name.to_owned(),
        }
    }

    fn include(&mut self, depth: usize) -> Parsed<()> {
        let name = self.string("TK_STRING")?;
        let at = self.here();
        self.punct(b';')?;
        if depth >= INCLUDE_DEPTH_MAX {
            return Err(Box::new(Problem::IncludeTooDeep { at, path: name, limit: INCLUDE_DEPTH_MAX }));
        }
        let pattern = self.beside(&name);
        let found = self.source.glob(&pattern);
        if found.is_empty() {
            if is_pattern(&name) {
                self.out.notices.push(Notice::NoIncludeMatch { at, pattern: name });
                return Ok(());
            }
            return Err(Box::new(Problem::MissingFile { at, what: "include", path: name }));
        }
        for path in found {
            if self.files_read.contains(&self.source.canonical(&path)) {
                continue;
            }
            let text = match open(self.source, &path) {
                Ok(text) => text,
                Err(Problem::CannotOpen { .. }) => {
                    return Err(Box::new(Problem::MissingFile { at, what: "include", path }));
                }
                Err(problem) => return Err(Box::new(problem)),
            };
            self.nested(&path, text, |parser| parser.file(depth + 1))?;
        }
        Ok(())
    }

    /// Swallows tokens up to the end of the next block; a stray `}` before it has to be made up for.
    fn skip(&mut self) -> Parsed<()> {
        let start = self.here();
        let mut depth = 0_i64;
        loop {
            let token = self.next()?;
            match token.kind {
                Kind::Punct(b'{') => depth += 1,
                Kind::Punct(b'}') if depth == 1 => return Ok(()),
                Kind::Punct(b'}') => depth -= 1,
                Kind::End => return Err(Box::new(Problem::SkipAtEof { at: start })),
                _ => {}
            }
        }
    }

    fn module_version(&mut self, operator: &str, statement: &Token) -> Parsed<()> {
        let token = self.next()?;
        if token.kind != Kind::Version {
            return self.expected("TK_KMODVERS", &token);
        }
        let at = self.here();
        self.punct(b';')?;
        let mut numbers = token.text.split('.').map(|number| number.parse().unwrap_or(u32::MAX));
        let mut number = || numbers.next().unwrap_or(0);
        let wanted = ModuleVersion(number(), number(), number());
        let Some(running) = self.version else {
            self.out.problems.push(Problem::NoModuleVersion { at });
            return Ok(());
        };
        // The reference compares unsigned differences, so that `ge` is always true; here the documented
        // meaning is offered (spec/drbd-conf.md §3.4).
        let (operator, holds) = match operator {
            "eq" => ("==", running == wanted),
            "ne" => ("!=", running != wanted),
            "gt" => (">", running > wanted),
            "ge" => (">=", running >= wanted),
            "lt" => ("<", running < wanted),
            "le" => ("<=", running <= wanted),
            _ => return self.unknown_statement(statement),
        };
        if !holds {
            let (running, wanted) = (running.to_string(), wanted.to_string());
            return Err(Box::new(Problem::ModuleVersion { at, running, operator, wanted }));
        }
        Ok(())
    }

    fn global(&mut self, at: &Loc) -> Parsed<()> {
        self.once("global section", "global".to_owned(), at)?;
        if !self.out.resources.is_empty() {
            self.out.notices.push(Notice::GlobalAfterResource { at: at.clone() });
        }
        self.punct(b'{')?;
        let mut list = OptionList::default();
        loop {
            let token = self.next()?;
            if token.is(b'}') {
                break;
            }
            let Some(spec) = options::find_in(Class::Global, token.keyword()) else {
                return self.expected("dialog-refresh | minor-count | disable-ip-verification", &token);
            };
            let value = match spec.kind {
                options::Kind::Number { min, max, .. } => self.ranged(spec.name, min, max)?.to_string(),
                options::Kind::Enum { words, .. } => {
                    let token = self.next()?;
                    if !words.contains(&token.keyword()) {
                        return self.expected(&words.join(" | "), &token);
                    }
                    token.text
                }
                _ => "yes".to_owned(),
            };
            self.punct(b';')?;
            list.push(SetOption::new(spec, value));
        }
        self.out.global = Some(Global { at: at.clone(), options: list });
        Ok(())
    }

    // ---- addresses ----

    /// `[family] ADDRESS : PORT`.
    fn address(&mut self) -> Parsed<Address> {
        const EXPECTED: &str = "ssocks | sdp | ipv4 | ipv6 | <ipv4 address> ";
        let token = self.next()?;
        let (family, host) = match token.keyword() {
            "ipv6" => {
                self.punct(b'[')?;
                let token = self.next()?;
                if token.kind != Kind::Ipv6 {
                    return self.expected("TK_IPADDR6", &token);
                }
                self.punct(b']')?;
                (Family::Ipv6, token.text)
            }
            word @ ("ipv4" | "sdp" | "ssocks" | "sci") => {
                let family = match word {
                    "ipv4" => Family::Ipv4,
                    "sdp" => Family::Sdp,
                    _ => Family::Ssocks,
                };
                let token = self.next()?;
                if token.kind != Kind::Ipv4 {
                    return self.expected("TK_IPADDR", &token);
                }
                (family, token.text)
            }
            _ if token.kind == Kind::Ipv4 => (Family::Ipv4, token.text),
            _ => return self.expected(EXPECTED, &token),
        };
        self.punct(b':')?;
        let port = self.port()?;
        Ok(Address { family, host, port })
    }

    fn port(&mut self) -> Parsed<u16> {
        Ok(u16::try_from(self.ranged("port", 1, 65535)?).unwrap_or(u16::MAX))
    }
}
