//! The one table of options: names, ranges, defaults, units, and how a value is checked
//! (spec/drbd-conf.md §10 and §2 for units).

mod table;

use std::fmt;

use crate::error::Shown;

/// Which list an option belongs to. `disk { }` holds three of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// `net`: per connection.
    Net,
    /// `disk`: per attached backing device.
    Attach,
    /// `disk`: per minor, known before attaching.
    Device,
    /// `disk`: per volume of a peer.
    PeerDevice,
    /// `options`: per resource.
    Resource,
    /// `startup`.
    Startup,
    /// `handlers`.
    Handler,
    /// `proxy` and proxy `options`.
    Proxy,
    /// `global`.
    Global,
}

impl Class {
    /// Name of the section that holds such options.
    #[must_use]
    pub fn section(self) -> &'static str {
        match self {
            Class::Net => "net",
            Class::Attach | Class::Device | Class::PeerDevice => "disk",
            Class::Resource => "options",
            Class::Startup => "startup",
            Class::Handler => "handlers",
            Class::Proxy => "proxy",
            Class::Global => "global",
        }
    }

    /// The `drbdsetup` commands that take such options: the one that creates the object first.
    #[must_use]
    pub fn commands(self) -> &'static [&'static str] {
        match self {
            Class::Net => &["new-peer", "net-options"],
            Class::Attach => &["attach", "disk-options"],
            Class::Device => &["new-minor"],
            Class::PeerDevice => &["peer-device-options"],
            Class::Resource => &["new-resource", "resource-options"],
            Class::Startup => &["wait-connect-resource", "wait-sync-resource"],
            Class::Handler | Class::Proxy | Class::Global => &[],
        }
    }
}

/// What a plain number counts; a suffix is always about bytes and is converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Just a number.
    Plain,
    /// Tenths of a second.
    Deciseconds,
    /// Seconds.
    Seconds,
    /// Milliseconds.
    Milliseconds,
    /// Bytes.
    Bytes,
    /// 512-byte sectors.
    Sectors,
    /// KiB per second.
    KibPerSecond,
    /// Nodes.
    Nodes,
}

impl Unit {
    /// Bytes one step of the unit stands for when a value has a suffix.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Unit::Sectors => 512,
            Unit::KibPerSecond => 1024,
            _ => 1,
        }
    }
}

/// The shape of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `yes` or `no`.
    Bool {
        /// Value when not set.
        default: bool,
    },
    /// A number within a range, in the base unit.
    Number {
        /// Smallest value.
        min: u64,
        /// Largest value.
        max: u64,
        /// Value when not set.
        default: u64,
        /// Base unit.
        unit: Unit,
        /// Values outside of the range pass and are clamped by the engine.
        clamps: bool,
    },
    /// One of some words.
    Enum {
        /// The words.
        words: &'static [&'static str],
        /// Value when not set.
        default: &'static str,
    },
    /// A number within a range or one of some words.
    NumberOrWord {
        /// Smallest number.
        min: u64,
        /// Largest number.
        max: u64,
        /// The words.
        words: &'static [&'static str],
        /// Value when not set.
        default: &'static str,
    },
    /// Any text up to a length in bytes.
    Text {
        /// Longest text.
        max_len: usize,
    },
    /// `RESOURCE` or `RESOURCE/VOLUME` in a file, a minor (or -1) on a command line.
    Dependency,
}

/// One option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionSpec {
    /// Name as written in files.
    pub name: &'static str,
    /// List it belongs to.
    pub class: Class,
    /// Shape of its value.
    pub kind: Kind,
}

/// A checked value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Canonical {
    /// `yes` or `no`.
    Bool(bool),
    /// Number in the base unit.
    Number(u64),
    /// Word of an enumeration, in its standard spelling.
    Word(&'static str),
    /// Free text.
    Text(String),
}

impl fmt::Display for Canonical {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Canonical::Bool(value) => f.write_str(if *value { "yes" } else { "no" }),
            Canonical::Number(value) => write!(f, "{value}"),
            Canonical::Word(value) => f.write_str(value),
            Canonical::Text(value) => f.write_str(value),
        }
    }
}

/// Why a value is refused. The text completes the sentence "Value is ...".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// Not one of the words.
    #[error("not valid.{}", allowed(.words))]
    NotValid {
        /// Words to print; none for number-or-word options.
        words: &'static [&'static str],
    },
    /// Not a boolean word.
    #[error("not 'yes' or 'no'.")]
    NotYesNo,
    /// Not digits with an optional unit.
    #[error("not a number.")]
    NotANumber,
    /// Below the range.
    #[error("too small.")]
    TooSmall,
    /// Above the range.
    #[error("too big.")]
    TooBig,
    /// Text above its length.
    #[error("too long.\nmax len: {max_len}")]
    TooLong {
        /// Longest text in bytes.
        max_len: usize,
    },
}

fn allowed(words: &[&str]) -> String {
    if words.is_empty() { String::new() } else { format!("\nAllowed values are: {}", words.join(" | ")) }
}

/// All options, section by section in the order of the reference's lists.
#[must_use]
pub fn table() -> &'static [OptionSpec] {
    table::TABLE
}

/// The options of one class, in order.
pub fn of(class: Class) -> impl Iterator<Item = &'static OptionSpec> {
    table().iter().filter(move |spec| spec.class == class)
}

/// Finds an option by name in a section (`net`, `disk`, `options`, ...) or for a `drbdsetup` command
/// (`new-peer`, `attach`, ...). `bitmap` in `disk` is the attach option.
#[must_use]
pub fn find(section_or_command: &str, name: &str) -> Option<&'static OptionSpec> {
    table().iter().find(|spec| {
        spec.name == name
            && (spec.class.section() == section_or_command
                || spec.class.commands().contains(&section_or_command))
    })
}

/// Finds an option by name in one class.
#[must_use]
pub fn find_in(class: Class, name: &str) -> Option<&'static OptionSpec> {
    of(class).find(|spec| spec.name == name)
}

/// The option whose name is most like `name`, if any is close enough to be worth suggesting.
#[must_use]
pub fn nearest(name: &str) -> Option<&'static OptionSpec> {
    if name.len() > 64 {
        return None;
    }
    let limit = (name.len() / 3).max(1);
    table()
        .iter()
        .filter(|spec| !spec.name.starts_with('_'))
        .map(|spec| (distance(name.as_bytes(), spec.name.as_bytes()), spec))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, _)| *distance <= limit)
        .map(|(_, spec)| spec)
}

/// Edit distance (insert, delete, replace).
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, &x) in a.iter().enumerate() {
        let mut next = Vec::with_capacity(row.len());
        next.push(i + 1);
        for (pair, &y) in row.windows(2).zip(b) {
            let &[diagonal, up] = pair else { continue };
            let left = next.last().copied().unwrap_or(0);
            next.push((diagonal + usize::from(x != y)).min(up + 1).min(left + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

impl OptionSpec {
    /// Whether the value must not appear in logs and `Debug` output.
    #[must_use]
    pub fn is_secret(&self) -> bool {
        self.name == "shared-secret"
    }

    /// Whether the value may be left out (`yes`) and the name prefixed with `no-`.
    #[must_use]
    pub fn is_bool(&self) -> bool {
        matches!(self.kind, Kind::Bool { .. })
    }

    /// The value in effect when nothing is set.
    #[must_use]
    pub fn default(&self) -> Canonical {
        match self.kind {
            Kind::Bool { default } => Canonical::Bool(default),
            Kind::Number { default, .. } => Canonical::Number(default),
            Kind::Enum { default, .. } | Kind::NumberOrWord { default, .. } => Canonical::Word(default),
            Kind::Text { .. } => Canonical::Text(String::new()),
            Kind::Dependency => Canonical::Text("-1".to_owned()),
        }
    }

    /// Checks a value as written in a file: units `K M G s`, words, `yes`/`no`, lengths.
    ///
    /// # Errors
    /// Why the value is refused.
    pub fn validate(&self, text: &str) -> Result<Canonical, OptionError> {
        match self.kind {
            Kind::Bool { .. } => match text {
                "yes" => Ok(Canonical::Bool(true)),
                "no" => Ok(Canonical::Bool(false)),
                _ => Err(OptionError::NotYesNo),
            },
            Kind::Number { clamps: true, unit, .. } => number(text, unit).map(Canonical::Number),
            Kind::Number { min, max, unit, .. } => ranged(text, unit, min, max).map(Canonical::Number),
            Kind::Enum { words, .. } => words
                .iter()
                .find(|word| **word == text || (self.name == "protocol" && word.eq_ignore_ascii_case(text)))
                .map(|word| Canonical::Word(word))
                .ok_or(OptionError::NotValid { words }),
            Kind::NumberOrWord { min, max, words, .. } => match words.iter().find(|word| **word == text) {
                Some(word) => Ok(Canonical::Word(word)),
                None => match ranged(text, Unit::Plain, min, max) {
                    Err(OptionError::NotANumber) => Err(OptionError::NotValid { words: &[] }),
                    other => other.map(Canonical::Number),
                },
            },
            Kind::Text { max_len } if text.len() > max_len => Err(OptionError::TooLong { max_len }),
            Kind::Text { .. } | Kind::Dependency => Ok(Canonical::Text(text.to_owned())),
        }
    }
}

fn ranged(text: &str, unit: Unit, min: u64, max: u64) -> Result<u64, OptionError> {
    let value = number(text, unit)?;
    if value < min {
        Err(OptionError::TooSmall)
    } else if value > max {
        Err(OptionError::TooBig)
    } else {
        Ok(value)
    }
}

/// A number in the base unit: digits and at most one suffix; conversion to a larger unit rounds up
/// (spec/drbd-conf.md §2).
pub(crate) fn number(text: &str, unit: Unit) -> Result<u64, OptionError> {
    // The reference reads a negative number as an enormous one.
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let (digits, suffix) = match digits.chars().last() {
        Some('K' | 'k') => (digits.get(..digits.len() - 1), Some(1 << 10)),
        Some('M' | 'm') => (digits.get(..digits.len() - 1), Some(1 << 20)),
        Some('G' | 'g') => (digits.get(..digits.len() - 1), Some(1 << 30)),
        Some('s') => (digits.get(..digits.len() - 1), Some(512)),
        _ => (Some(digits), None),
    };
    let digits = digits.unwrap_or_default();
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(OptionError::NotANumber);
    }
    let value: u64 = digits.parse().map_err(|_| OptionError::TooBig)?;
    if negative && value > 0 {
        return Err(OptionError::TooBig);
    }
    match suffix {
        None => Ok(value),
        Some(factor) => {
            value.checked_mul(factor).map(|bytes| bytes.div_ceil(unit.bytes())).ok_or(OptionError::TooBig)
        }
    }
}

/// An option that was set.
#[derive(Clone, PartialEq, Eq)]
pub struct SetOption {
    /// Which option.
    pub spec: &'static OptionSpec,
    value: String,
    /// Copied from a wider level.
    pub inherited: bool,
}

impl SetOption {
    /// Sets `spec` to `value` (as written).
    #[must_use]
    pub fn new(spec: &'static OptionSpec, value: impl Into<String>) -> Self {
        Self { spec, value: value.into(), inherited: false }
    }

    /// Name of the option.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.spec.name
    }

    /// The value as written: what commands are given.
    #[must_use]
    pub fn value(&self) -> &str {
        &self.value
    }

    /// The value in the base unit or standard spelling.
    ///
    /// # Errors
    /// Why the value is refused; values out of a loaded configuration were checked already.
    pub fn canonical(&self) -> Result<Canonical, OptionError> {
        self.spec.validate(&self.value)
    }

    /// The value for messages.
    pub(crate) fn shown(&self) -> Shown {
        Shown::new(&self.value, self.spec.is_secret())
    }
}

impl fmt::Debug for SetOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = if self.spec.is_secret() { "(hidden)" } else { &self.value };
        write!(f, "{}={value}", self.name())
    }
}

/// Options that were set, in order. A later setting of the same option wins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OptionList(Vec<SetOption>);

impl OptionList {
    /// The settings in order.
    pub fn iter(&self) -> std::slice::Iter<'_, SetOption> {
        self.0.iter()
    }

    /// Whether nothing is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many settings there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The setting of an option.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&SetOption> {
        self.0.iter().rev().find(|option| option.name() == name)
    }

    /// The value of an option as written.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<&str> {
        self.get(name).map(SetOption::value)
    }

    /// Adds a setting at the end.
    pub fn push(&mut self, option: SetOption) {
        self.0.push(option);
    }

    pub(crate) fn push_front(&mut self, option: SetOption) {
        self.0.insert(0, option);
    }

    /// Without an option.
    pub fn remove(&mut self, name: &str) {
        self.0.retain(|option| option.name() != name);
    }

    /// Keeps the last setting of each option only.
    #[must_use]
    pub fn deduplicated(&self) -> Self {
        let last = |index: usize, option: &SetOption| {
            !self.0.iter().skip(index + 1).any(|later| later.spec == option.spec)
        };
        Self(
            self.0
                .iter()
                .enumerate()
                .filter(|(i, option)| last(*i, option))
                .map(|(_, o)| o.clone())
                .collect(),
        )
    }
}

impl<'a> IntoIterator for &'a OptionList {
    type Item = &'a SetOption;
    type IntoIter = std::slice::Iter<'a, SetOption>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_units() {
        let rate = find("disk", "resync-rate").unwrap();
        assert_eq!(rate.validate("100"), Ok(Canonical::Number(100)));
        assert_eq!(rate.validate("20M"), Ok(Canonical::Number(20 << 10)));
        assert_eq!(rate.validate("1s"), Ok(Canonical::Number(1)), "rounds up");
        assert_eq!(rate.validate("0"), Err(OptionError::TooSmall));
        assert_eq!(rate.validate("99999999999999999999"), Err(OptionError::TooBig));
        assert_eq!(rate.validate("10q"), Err(OptionError::NotANumber));
        assert_eq!(find("disk", "size").unwrap().validate("2G"), Ok(Canonical::Number(4 << 20)));
        assert_eq!(find("net", "max-epoch-size").unwrap().validate("2K"), Ok(Canonical::Number(2048)));
        assert_eq!(find("startup", "wfc-timeout").unwrap().validate("-1"), Err(OptionError::TooBig));
        assert_eq!(find("options", "quorum").unwrap().validate("majority"), Ok(Canonical::Word("majority")));
        assert_eq!(find("options", "quorum").unwrap().validate("33"), Err(OptionError::TooBig));
        assert_eq!(find("net", "protocol").unwrap().validate("c"), Ok(Canonical::Word("C")));
    }

    #[test]
    fn defaults_are_valid_and_names_unique() {
        for (index, spec) in table().iter().enumerate() {
            let default = spec.default().to_string();
            if !matches!(spec.name, "discard-granularity" | "minor-count") {
                assert!(spec.validate(&default).is_ok(), "{} {default}", spec.name);
            }
            let twin = table().iter().skip(index + 1).any(|o| o.class == spec.class && o.name == spec.name);
            assert!(!twin, "{}", spec.name);
        }
    }

    #[test]
    fn suggestions() {
        assert_eq!(nearest("resync-rat").map(|spec| spec.name), Some("resync-rate"));
        assert_eq!(nearest("allow-two-primarys").map(|spec| spec.name), Some("allow-two-primaries"));
        assert_eq!(nearest("xyzzy"), None);
    }

    #[test]
    fn secrets_stay_out_of_debug() {
        let option = SetOption::new(find("net", "shared-secret").unwrap(), "hunter2");
        assert!(!format!("{option:?}").contains("hunter2"));
    }
}
