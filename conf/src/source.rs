//! Where configuration text comes from. Everything else in this crate is free of I/O; a test hands in
//! [`MemorySource`], a program hands in [`FileSource`].

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;

/// No configuration file of more bytes than this is read.
pub const FILE_SIZE_MAX: usize = 4 << 20;
/// An include pattern that matches more files than this is cut off.
pub const GLOB_MATCHES_MAX: usize = 4096;

/// Reads configuration files. Paths are the text found in the configuration (relative ones are already
/// joined with the folder of the including file).
pub trait Source {
    /// The content of `path`; the name `-` means standard input.
    ///
    /// # Errors
    /// Whatever reading gives; [`io::ErrorKind::IsADirectory`] for a folder.
    fn read(&self, path: &str) -> io::Result<Vec<u8>>;
    /// Existing files that match a glob(7) pattern, in byte order.
    fn glob(&self, pattern: &str) -> Vec<String>;
    /// The identity of a file: absolute and free of symbolic links where that can be found out. A file is
    /// read at most once per run, and later messages print this name.
    fn canonical(&self, path: &str) -> String;
}

/// The real file system.
#[derive(Debug, Default, Clone, Copy)]
pub struct FileSource;

impl Source for FileSource {
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        let limit = FILE_SIZE_MAX as u64 + 1;
        if path == "-" {
            io::stdin().lock().take(limit).read_to_end(&mut text)?;
        } else {
            let file = std::fs::File::open(path)?;
            if file.metadata()?.is_dir() {
                return Err(io::Error::from(io::ErrorKind::IsADirectory));
            }
            file.take(limit).read_to_end(&mut text)?;
        }
        Ok(text)
    }

    fn glob(&self, pattern: &str) -> Vec<String> {
        let (mut found, rest) = match pattern.strip_prefix('/') {
            Some(rest) => (vec!["/".to_owned()], rest),
            None => (vec![String::new()], pattern),
        };
        for part in rest.split('/').filter(|part| !part.is_empty()) {
            let mut next = Vec::new();
            for base in &found {
                if is_pattern(part) {
                    let folder = if base.is_empty() { "." } else { base.as_str() };
                    let Ok(entries) = std::fs::read_dir(folder) else { continue };
                    let mut names: Vec<String> = entries
                        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                        .filter(|name| glob_match(part.as_bytes(), name.as_bytes()))
                        .collect();
                    names.sort_unstable();
                    next.extend(names.iter().map(|name| join(base, name)));
                } else {
                    let path = join(base, part);
                    if Path::new(&path).exists() {
                        next.push(path);
                    }
                }
                next.truncate(GLOB_MATCHES_MAX);
            }
            found = next;
        }
        found
    }

    fn canonical(&self, path: &str) -> String {
        std::fs::canonicalize(path)
            .ok()
            .and_then(|path| path.to_str().map(str::to_owned))
            .unwrap_or_else(|| path.to_owned())
    }
}

/// Files held in memory, for tests and for text that came over a socket.
#[derive(Debug, Default, Clone)]
pub struct MemorySource {
    files: BTreeMap<String, Vec<u8>>,
}

impl MemorySource {
    /// No files.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One file.
    #[must_use]
    pub fn with(mut self, path: &str, text: impl Into<Vec<u8>>) -> Self {
        self.files.insert(path.to_owned(), text.into());
        self
    }
}

impl Source for MemorySource {
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let is_folder = || path == "." || self.files.keys().any(|name| name.starts_with(&format!("{path}/")));
        match self.files.get(path) {
            Some(text) => Ok(text.clone()),
            None if is_folder() => Err(io::Error::from(io::ErrorKind::IsADirectory)),
            None => Err(io::Error::from(io::ErrorKind::NotFound)),
        }
    }

    fn glob(&self, pattern: &str) -> Vec<String> {
        let parts: Vec<&str> = pattern.split('/').collect();
        self.files
            .keys()
            .filter(|name| {
                let names: Vec<&str> = name.split('/').collect();
                names.len() == parts.len()
                    && parts
                        .iter()
                        .zip(&names)
                        .all(|(part, name)| glob_match(part.as_bytes(), name.as_bytes()))
            })
            .take(GLOB_MATCHES_MAX)
            .cloned()
            .collect()
    }

    fn canonical(&self, path: &str) -> String {
        path.to_owned()
    }
}

fn join(base: &str, name: &str) -> String {
    if base.is_empty() || base.ends_with('/') { format!("{base}{name}") } else { format!("{base}/{name}") }
}

/// Whether `text` contains glob(7) wildcards.
pub(crate) fn is_pattern(text: &str) -> bool {
    text.bytes().any(|byte| matches!(byte, b'*' | b'?' | b'['))
}

/// Matches one path component. Backtracks to the last `*` only, so the cost is bounded by the product of
/// the two lengths.
fn glob_match(pattern: &[u8], name: &[u8]) -> bool {
    if name.first() == Some(&b'.') && pattern.first() != Some(&b'.') {
        return false;
    }
    let (mut p, mut n) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    loop {
        let step = match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, n));
                p += 1;
                continue;
            }
            Some(&wanted) => match name.get(n) {
                Some(&byte) => one(pattern, p, wanted, byte),
                None => None,
            },
            None if n == name.len() => return true,
            None => None,
        };
        match (step, retry) {
            (Some(length), _) => {
                p += length;
                n += 1;
            }
            (None, Some((back, at))) if at < name.len() => {
                p = back;
                n = at + 1;
                retry = Some((back, at + 1));
            }
            _ => return false,
        }
    }
}

/// Length of the pattern element at `p` if it matches `byte`.
fn one(pattern: &[u8], p: usize, wanted: u8, byte: u8) -> Option<usize> {
    match wanted {
        b'?' => Some(1),
        b'\\' => (pattern.get(p + 1) == Some(&byte)).then_some(2),
        b'[' => {
            let body = pattern.get(p + 1..)?;
            let negated = matches!(body.first(), Some(b'!' | b'^'));
            let body = body.get(usize::from(negated)..)?;
            let end = 1 + body.get(1..)?.iter().position(|&end| end == b']')?;
            let set = body.get(..end)?;
            let mut hit = false;
            let mut rest = set;
            while let Some((&low, tail)) = rest.split_first() {
                match tail {
                    [b'-', high, more @ ..] => {
                        hit |= (low..=*high).contains(&byte);
                        rest = more;
                    }
                    _ => {
                        hit |= low == byte;
                        rest = tail;
                    }
                }
            }
            (hit != negated).then_some(end + 2 + usize::from(negated))
        }
        _ => (wanted == byte).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards() {
        for (pattern, name, expected) in [
            ("*.res", "a.res", true),
            ("*.res", ".a.res", false),
            ("*.res", "a.resx", false),
            ("00-*.inc", "00-global.inc", true),
            ("[a-c]?.conf", "bx.conf", true),
            ("[!a-c]?.conf", "bx.conf", false),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "aXbY", false),
            ("[", "x", false),
            ("", "", true),
        ] {
            assert_eq!(glob_match(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn real_files() {
        let here = env!("CARGO_MANIFEST_DIR");
        let found = FileSource.glob(&format!("{here}/s*c/sou*.rs"));
        assert_eq!(found, vec![format!("{here}/src/source.rs")]);
        assert!(FileSource.read(here).is_err());
    }
}
