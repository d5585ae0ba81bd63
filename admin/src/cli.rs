//! What the tools share: failures, option scanning, suggestions, printed command lines.

use std::io::Write;

use palisade_conf::options::{self, Class};
use palisade_control::Options;

/// Why a command ends early: a text for stderr (may be empty) and the exit status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: i32,
    pub text: String,
}

impl Failure {
    pub fn new(code: i32, text: impl Into<String>) -> Self {
        Self { code, text: text.into() }
    }

    /// Prints the text and gives the exit status.
    pub fn report(&self) -> i32 {
        if !self.text.is_empty() {
            eprintln!("{}", self.text.trim_end_matches('\n'));
        }
        self.code
    }
}

/// Writes to stdout. A reader that went away must not keep a command from being done.
pub fn print(text: &str) {
    let _ = try_print(text);
}

/// Writes to stdout; false if nobody reads any more.
pub fn try_print(text: &str) -> bool {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
}

/// ` Did you mean 'X'?` for the closest of some words, if one is close.
pub fn suggestion<'a>(word: &str, words: impl Iterator<Item = &'a str>) -> String {
    const LONGEST: usize = 64;
    if word.len() > LONGEST {
        return String::new();
    }
    let limit = (word.len() / 3).max(1);
    words
        .map(|w| (distance(word.as_bytes(), w.as_bytes()), w))
        .min_by_key(|(d, _)| *d)
        .filter(|(d, _)| *d <= limit)
        .map(|(_, w)| format!(" Did you mean '{w}'?"))
        .unwrap_or_default()
}

/// Edit distance where exchanging neighbours counts one.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let width = b.len() + 1;
    let mut rows: Vec<Vec<usize>> = vec![(0..width).collect()];
    let at = |rows: &[Vec<usize>], i: usize, j: usize| {
        rows.get(i).and_then(|r| r.get(j)).copied().unwrap_or(usize::MAX / 2)
    };
    for (i, x) in a.iter().enumerate() {
        rows.push(vec![i + 1]);
        for (j, y) in b.iter().enumerate() {
            let mut best = (at(&rows, i, j) + usize::from(x != y))
                .min(at(&rows, i, j + 1) + 1)
                .min(at(&rows, i + 1, j) + 1);
            let swapped = i > 0 && j > 0 && a.get(i - 1) == Some(y) && b.get(j - 1) == Some(x);
            if swapped {
                best = best.min(at(&rows, i - 1, j - 1) + 1);
            }
            if let Some(row) = rows.last_mut() {
                row.push(best);
            }
        }
    }
    at(&rows, a.len(), b.len())
}

/// Shape of a verb's own option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// Nothing, or `=yes`/`=no`.
    Switch,
    /// A value.
    Value,
    /// Nothing, or a value behind `=`.
    Optional,
}

/// A verb's own option.
pub type Flag = (&'static str, Takes);

/// Scanned arguments of a verb.
#[derive(Debug, Clone, Default)]
pub struct Scanned {
    /// What is no option, in order.
    pub words: Vec<String>,
    /// Options out of the option table, canonical values.
    pub options: Options,
    /// The verb's own options in the order given; the value of a switch is `yes` or `no`.
    pub flags: Vec<(String, String)>,
}

impl Scanned {
    /// Value of a verb's own option, the last one given.
    pub fn flag(&self, name: &str) -> Option<&str> {
        self.flags.iter().rev().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// Whether a switch is on.
    pub fn is_set(&self, name: &str) -> bool {
        self.flag(name) == Some("yes")
    }

    /// How often a switch was given.
    pub fn count(&self, name: &str) -> usize {
        self.flags.iter().filter(|(n, v)| n == name && v == "yes").count()
    }
}

/// What a verb accepts.
#[derive(Debug, Clone, Copy)]
pub struct Accepts {
    /// Its own options.
    pub flags: &'static [Flag],
    /// Classes of the option table.
    pub classes: &'static [Class],
    /// Other spellings of its own options.
    pub aliases: &'static [(&'static str, &'static str)],
}

/// Sorts arguments into words and options. Options may stand anywhere; `--` ends them.
///
/// # Errors
/// The sentence that says which option is wrong.
pub fn scan(args: &[String], accepts: &Accepts) -> Result<Scanned, String> {
    let mut out = Scanned::default();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        if arg == "--" {
            out.words.extend(rest.by_ref().cloned());
            break;
        }
        let Some(body) = arg.strip_prefix("--") else {
            out.words.push(arg.clone());
            continue;
        };
        let (name, given) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (body, None),
        };
        let name = accepts.aliases.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, n)| *n);
        if let Some((flag, takes)) = accepts.flags.iter().find(|(n, _)| *n == name) {
            let value = match (takes, given) {
                (Takes::Switch, None) => "yes".to_owned(),
                (Takes::Switch, Some(v)) if v == "yes" || v == "no" => v,
                (Takes::Switch, Some(v)) => return Err(format!("Option --{flag}: invalid argument '{v}'")),
                (Takes::Optional, v) => v.unwrap_or_default(),
                (Takes::Value, Some(v)) => v,
                (Takes::Value, None) => {
                    rest.next().cloned().ok_or_else(|| format!("Option --{flag} requires a value"))?
                }
            };
            out.flags.push(((*flag).to_owned(), value));
            continue;
        }
        let Some(spec) = accepts.classes.iter().find_map(|c| options::find_in(*c, name)) else {
            let known = accepts
                .flags
                .iter()
                .map(|(n, _)| *n)
                .chain(accepts.classes.iter().flat_map(|c| options::of(*c)).map(|s| s.name));
            return Err(format!("unrecognized option '--{name}'.{}", suggestion(name, known)));
        };
        let text = match given {
            Some(text) => text,
            None if spec.is_bool() => "yes".to_owned(),
            None => rest.next().cloned().ok_or_else(|| format!("Option --{name} requires a value"))?,
        };
        let shown = if spec.is_secret() { "(hidden)" } else { &text };
        let value = spec
            .validate(&text)
            .map_err(|e| format!("Option --{name}: invalid argument '{shown}': value is {e}"))?;
        out.options.set(spec.name, value.to_string());
    }
    Ok(out)
}

/// Quotes a word as the reference prints it (`spec/cli.md` §1).
fn quoted(word: &str) -> String {
    let mut out = String::with_capacity(word.len());
    for c in word.chars() {
        if !(c.is_ascii_alphanumeric() || "%+-./:=@_".contains(c)) {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// A command line as printed by a dry run.
pub fn command_line(words: &[String]) -> String {
    words.iter().map(|w| quoted(w)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|w| (*w).to_owned()).collect()
    }

    #[test]
    fn options_stand_anywhere_and_are_canonical() {
        let accepts = Accepts {
            flags: &[("force", Takes::Switch)],
            classes: &[Class::Net],
            aliases: &[("overwrite-data-of-peer", "force")],
        };
        let args = strings(&["--protocol=a", "r0", "--overwrite-data-of-peer", "--timeout", "30", "1"]);
        let s = scan(&args, &accepts).unwrap();
        assert_eq!(s.words, ["r0", "1"]);
        assert!(s.is_set("force"));
        assert_eq!(s.options.get("protocol"), Some("A"));
        assert_eq!(s.options.get("timeout"), Some("30"));
    }

    #[test]
    fn a_wrong_secret_is_not_repeated_in_the_message() {
        let accepts = Accepts { flags: &[], classes: &[Class::Net], aliases: &[] };
        let secret = "x".repeat(200);
        let text = scan(&[format!("--shared-secret={secret}")], &accepts).unwrap_err();
        assert!(!text.contains(&secret), "{text}");
    }

    #[test]
    fn misspelled_words_get_a_suggestion() {
        let words = ["primary", "secondary"];
        assert_eq!(suggestion("priamry", words.into_iter()), " Did you mean 'primary'?");
        assert_eq!(suggestion("frobnicate", words.into_iter()), "");
    }

    #[test]
    fn printed_lines_are_quoted_for_the_shell() {
        assert_eq!(
            command_line(&strings(&["/bin/sh", "-c", "/bin/true fence"])),
            "/bin/sh -c /bin/true\\ fence"
        );
    }
}
