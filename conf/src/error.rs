//! What can be wrong with a configuration. Texts, places and exit codes are those administrators and their
//! scripts know (spec/drbd-conf.md §9).

use std::fmt;
use std::sync::Arc;

/// The two names of a configuration file.
#[derive(Debug, PartialEq, Eq)]
pub struct FileName {
    /// As it was named: used while parsing.
    pub given: String,
    /// Canonical: used by later checks and by `dump`.
    pub canonical: String,
}

impl FileName {
    /// A file known under both names.
    #[must_use]
    pub fn new(given: &str, canonical: &str) -> Self {
        Self { given: given.to_owned(), canonical: canonical.to_owned() }
    }
}

/// A line of a configuration file; prints as `FILE:LINE`.
#[derive(Clone, PartialEq, Eq)]
pub struct Loc {
    file: Arc<FileName>,
    line: u32,
    canonical: bool,
}

impl Loc {
    /// Line `line` (from 1) of `file`.
    #[must_use]
    pub fn new(file: &Arc<FileName>, line: u32) -> Self {
        Self { file: Arc::clone(file), line, canonical: false }
    }

    /// The same place, printed with the canonical file name.
    #[must_use]
    pub fn resolved(&self) -> Self {
        Self { canonical: true, ..self.clone() }
    }

    /// The same file without a line: what the reference prints for statements it made up itself.
    #[must_use]
    pub fn implied(&self) -> Self {
        Self { line: 0, canonical: true, ..self.clone() }
    }

    /// Name of the file as this place prints it.
    #[must_use]
    pub fn file(&self) -> &str {
        if self.canonical { &self.file.canonical } else { &self.file.given }
    }

    /// Line number, from 1; 0 for implied statements.
    #[must_use]
    pub fn line(&self) -> u32 {
        self.line
    }
}

impl fmt::Display for Loc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file(), self.line)
    }
}

impl fmt::Debug for Loc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Text out of a configuration that is cut to 20 characters when shown and hidden in `Debug` output if it
/// may be part of a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Shown {
    text: String,
    secret: bool,
}

impl Shown {
    /// Text to show; `secret` hides it from `Debug`.
    #[must_use]
    pub fn new(text: &str, secret: bool) -> Self {
        let mut cut: String = text.chars().take(20).collect();
        if cut.len() < text.len() {
            cut.push_str("...");
        }
        Self { text: cut, secret }
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.secret { f.write_str("(hidden)") } else { write!(f, "{:?}", self.text) }
    }
}

/// One finding. The text is the reference's, including its continuation lines.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the text of each variant says what its fields are
pub enum Problem {
    #[error("Can not open '{path}'.")]
    CannotOpen { path: String, reason: String },
    #[error("Cannot parse directory '{path}' as config file.")]
    IsDirectory { path: String },
    #[error("Configuration file '{path}' is larger than {limit} bytes; split it into included files.")]
    FileTooLarge { path: String, limit: usize },
    #[error(
        "{at}: include files are nested deeper than {limit} levels; include '{path}' from an outer file."
    )]
    IncludeTooDeep { at: Loc, path: String, limit: usize },
    #[error("{at}: text in double quotes is not UTF-8; save the file in UTF-8 encoding.")]
    NotUtf8 { at: Loc },
    #[error("{at}: Token too long >>>{text}<<<")]
    TokenTooLong { at: Loc, text: Shown },
    #[error("{at}: Double quoted string too long >>>{text}...<<<")]
    StringTooLong { at: Loc, text: Shown },
    #[error("{at}: Unterminated double quoted string\n  we don't allow embedded newlines\n  >>>{text}...<<<")]
    UnterminatedString { at: Loc, text: Shown },
    #[error("{at}: Parse error: '{expected}' expected,\n\tbut got '{got}'")]
    Expected { at: Loc, expected: String, got: Shown },
    #[error("{at}: Parse error: while parsing value ('{value}')\nfor {option}. Value is {reason}")]
    BadValue { at: Loc, option: String, value: Shown, reason: crate::options::OptionError },
    #[error("{at}: {what} {text} => {value} out of range [{min}..{max}].")]
    OutOfRange { at: Loc, what: String, text: String, value: u64, min: u64, max: u64 },
    #[error("{at}: conflicting use of {what} '{key}' ...\n{first}: {what} '{key}' first used here.")]
    Conflict { at: Loc, first: Loc, what: &'static str, key: String },
    #[error("{at}: Failed to open {what} file '{path}'.")]
    MissingFile { at: Loc, what: &'static str, path: String },
    #[error("{at}: reached eof while parsing this skip block.")]
    SkipAtEof { at: Loc },
    #[error("Resource name is empty.")]
    EmptyName,
    #[error("Resource name is invalid - please don't use control characters.")]
    ControlCharacterInName,
    #[error("{at}: in the common section, there are no host sections allowed.")]
    HostInCommon { at: Loc },
    #[error("{at}: address statement not allowed for floating {{}} host sections")]
    AddressInFloating { at: Loc },
    #[error("{at}: device name must start with /dev/drbd\n\t(/dev/ is optional, but drbd is required)")]
    DeviceName { at: Loc },
    #[error("{at}: no minor given nor device name contains a minor number")]
    NoMinor { at: Loc },
    #[error(
        "{at}: explicit minor number must match with device name\n\tTry \"device /dev/drbd{minor} minor {minor};\",\n\tor leave off either device name or explicit minor.\n\tArbitrary device names must start with /dev/drbd_\n\tmind the '_'! (/dev/ is optional, but drbd_ is required)"
    )]
    MinorMismatch { at: Loc, minor: u32 },
    #[error("{at}: only two 'host' keywords per {what} allowed")]
    TooManyEndpoints { at: Loc, what: &'static str },
    #[error("{at}: connection without a single path (maybe empty?) not allowed")]
    NoPath { at: Loc },
    #[error("{at}: only one 'net' section per connection allowed")]
    TwoNetsInConnection { at: Loc },
    #[error("{at}: only one 'net' section allowed")]
    TwoNetsInMesh { at: Loc },
    #[error("{at}: Explicit and implicit paths not allowed")]
    MixedPaths { at: Loc },
    #[error("{at}: expected \"{{\" after \"proxy\" keyword")]
    ProxyPlugin { at: Loc },
    #[error("{at}: Missing \";\" before  \"}}\"")]
    PluginSemicolon { at: Loc },
    #[error("{at}: mixing explicit and implicit volumes is not allowed")]
    MixedVolumes { at: Loc },
    #[error("{at}: in section: proxy on {hosts} {{ ... }} }}: '{key}' keyword missing.")]
    ProxyAddressMissing { at: Loc, hosts: String, key: &'static str },
    #[error("{at}: Validation error: drbd-module-version {running} {operator} {wanted} not true")]
    ModuleVersion { at: Loc, running: String, operator: &'static str, wanted: String },
    #[error("Could not get drbd-module-version, Module not loaded?")]
    NoModuleVersion { at: Loc },
    #[error("{at}: more than {limit} {what}; the file is not a plausible configuration.")]
    TooMany { at: Loc, what: &'static str, limit: usize },

    // Checks after parsing.
    #[error("{at}: in resource {resource}, on {host} {{ ... }}: '{key}' keyword missing.")]
    Missing { at: Loc, resource: String, host: String, key: &'static str },
    #[error("{at}: in resource {resource}:\n\ta host sections ('on {host} {{ ... }}') is missing.")]
    NoHostSection { at: Loc, resource: String, host: String },
    #[error("{at}: in resource {resource}, on {host} {{ ... }}: volume {vnr} not defined on {other}")]
    VolumeNotDefined { at: Loc, resource: String, host: String, vnr: u32, other: String },
    #[error("{at}: in resource {resource}, on {host} {{ ... }}: volume {vnr} missing (present on {other})")]
    VolumeMissing { at: Loc, resource: String, host: String, vnr: u32, other: String },
    #[error(
        "{at}: in resource {resource}, on {host} resp. {other}: volume {vnr} must not be implicit on one but not the other"
    )]
    ImplicitOnOneSide { at: Loc, resource: String, host: String, other: String, vnr: u32 },
    #[error("{at}: in resource {resource}: you must not mix implicit and explicit volumes")]
    MixedInResource { at: Loc, resource: String },
    #[error("{at}: in resource {resource}, referenced resource '{lower}' not defined.")]
    LowerUndefined { at: Loc, resource: String, lower: String },
    #[error(
        "{at}: in resource {resource} a hostname (\"{host}\") is given\nwith a \"host\" keyword, has no \"address\" keyword, and no matching\nhost section (\"on\" keyword)"
    )]
    EndpointHost { at: Loc, resource: String, host: String },
    #[error(
        "{at}: in resource {resource} the endpoint address {address} belongs to no host section; name the host with a \"host\" keyword or correct the address"
    )]
    EndpointAddress { at: Loc, resource: String, address: String },
    #[error("{at}: Resource {resource}, host {host}: cannot determine which {what} to use")]
    NoAddress { at: Loc, resource: String, host: String, what: &'static str },
    #[error(
        "\"connection-mesh\" (for \"{resource}\") with a host (\"{host}\") that has no \"address\" defined"
    )]
    MeshNoAddress { at: Loc, resource: String, host: String },
    #[error(
        "{at}: in resource {resource}:\n\tThere is no 'on' section for hostname '{host}' named in the connection-mesh"
    )]
    MeshHost { at: Loc, resource: String, host: String },
    #[error(
        "{at}: in resource {resource}:\n\tThere is a drbd-8.x proxy config syntax within an 'on' section and you are using a 'connection-mesh' section."
    )]
    MeshWithProxy { at: Loc, resource: String },
    #[error("{at}: Resource {resource}: {what} needs to have two endpoints")]
    TwoEndpoints { at: Loc, resource: String, what: &'static str },
    #[error(
        "{at}: Resource {resource}: There is a reference to a volume {vnr} that is not known in this resource on host {host}"
    )]
    UnknownVolume { at: Loc, resource: String, vnr: u32, host: String },
    #[error("{at}: in resource {resource}\n    {endpoint} is also used {other_at} (resource {other})")]
    AddressConflict { at: Loc, resource: String, endpoint: String, other_at: Loc, other: String },
    #[error("{at}: in resource {resource} {endpoint} is used for both endpoints")]
    SameEndpoint { at: Loc, resource: String, endpoint: String },
    #[error(
        "{at}: in resource {resource}, on {first} {{ ... }} ... on {second} {{ ... }}:\n\tThere are multiple host sections for this node."
    )]
    TwoSectionsForHost { at: Loc, resource: String, first: String, second: String },
    #[error(
        "{at}: in resource {resource}, ambiguous inheritance for option \"{option}\".\nshould be \"{first}\" and \"{second}\" at the same time."
    )]
    Ambiguous { at: Loc, resource: String, option: String, first: Shown, second: Shown },
    #[error("BAD LUCK, equal hashes")]
    EqualHashes { at: Loc, resource: String },
    #[error(
        "{at}: in resource {resource}:\n\tEither all 'on' sections must contain a proxy subsection, or none."
    )]
    ProxyInSomeHosts { at: Loc, resource: String },
    #[error(
        "{at}: in connection in resource {resource}:\nEither all 'host' statements must have a proxy subsection, or none."
    )]
    ProxyInSomeEndpoints { at: Loc, resource: String },
    #[error("{file}: in resource {resource}, on {host}:\n\tIP {address} not found on this host.")]
    AddressNotLocal { file: String, resource: String, host: String, address: String },
    #[error(
        "{at}: in resource {resource}:\n\tresource '{target}' mentioned in 'resync-after' option is not known{on_host}."
    )]
    ResyncAfterUnknown { at: Loc, resource: String, target: String, on_host: &'static str },
    #[error(
        "{at}: in resource {resource}:\n\tresync-after contains '{target}', which is ambiguous, since it contains {volumes} volumes"
    )]
    ResyncAfterAmbiguous { at: Loc, resource: String, target: String, volumes: usize },
    #[error("'{resource}' not defined in your config (for this host).")]
    NotDefinedHere { resource: String },
    #[error("'{resource}' ignored, since this host ({host}) is a proxy node, not a DRBD node.")]
    ProxyNode { resource: String, host: String },
}

impl Problem {
    /// For a word nobody knows, the option it may have been meant to be.
    #[must_use]
    pub fn suggestion(&self) -> Option<&'static crate::options::OptionSpec> {
        match self {
            Problem::Expected { got, .. } if !got.secret => {
                crate::options::nearest(got.text.strip_suffix("...").unwrap_or(&got.text))
            }
            _ => None,
        }
    }
}

/// Remarks that stop nothing; the caller prints them to standard error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Notice {
    #[error("{at}: You should put the global {{}} section\n\tin front of any resource {{}} section")]
    GlobalAfterResource { at: Loc },
    #[error("{at}: explicitly named connections are deprecated!\n\tits name ('{name}') will be ignored")]
    NamedConnection { at: Loc, name: String },
    #[error(
        "{at}: arbitrary device names (/dev/drbd_...) are no longer generated from current udev rules.\n\tYou may need to manually mknod {device} b 147 {minor}\n\tYou should no longer use them."
    )]
    ArbitraryDevice { at: Loc, device: String, minor: u32 },
    #[error(
        "Resource {resource}:\n\tUse explicit 'connection' sections (or a 'connection-mesh' section) with more than two 'on' sections."
    )]
    NeedsConnections { resource: String },
    /// Only worth printing when verbose.
    #[error("{at}: no match for include pattern '{pattern}'.")]
    NoIncludeMatch { at: Loc, pattern: String },
}

/// One or more problems, in the order they were found. Prints one per line (or more, see [`Problem`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    problems: Vec<Problem>,
    fatal: bool,
    notices: Vec<Notice>,
}

impl Error {
    pub(crate) fn check(problems: Vec<Problem>) -> Result<(), Self> {
        if problems.is_empty() { Ok(()) } else { Err(Self { problems, fatal: false, notices: Vec::new() }) }
    }

    /// Like [`Error::check`] where the last problem ended reading.
    pub(crate) fn check_fatal(problems: Vec<Problem>) -> Result<(), Self> {
        if problems.is_empty() { Ok(()) } else { Err(Self::fatal(problems)) }
    }

    /// Problems of which the last ended reading.
    pub(crate) fn fatal(problems: Vec<Problem>) -> Self {
        Self { problems, fatal: true, notices: Vec::new() }
    }

    /// With the remarks made before the problems were found.
    pub(crate) fn after(self, notices: &[Notice]) -> Self {
        Self { notices: notices.to_vec(), ..self }
    }

    /// Remarks made before the problems were found; the caller prints them first.
    #[must_use]
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    /// The problems.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// Whether the last problem ended reading, so that there may be more behind it.
    #[must_use]
    pub fn is_fatal(&self) -> bool {
        self.fatal
    }

    /// The exit code `drbdadm` ends with: 10 invalid configuration, 20 unreadable file, 1 bad name
    /// (spec/drbd-conf.md §9).
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self.problems.first() {
            Some(
                Problem::CannotOpen { .. }
                | Problem::IsDirectory { .. }
                | Problem::FileTooLarge { .. }
                | Problem::EqualHashes { .. },
            ) => 20,
            Some(
                Problem::EmptyName
                | Problem::ControlCharacterInName
                | Problem::NotDefinedHere { .. }
                | Problem::ProxyNode { .. },
            ) => 1,
            _ => 10,
        }
    }
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        Self::fatal(vec![problem])
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
