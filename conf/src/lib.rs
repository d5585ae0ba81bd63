//! The drbd.conf language: lexer, parser, model, inheritance, `dump`, and every option in one table.
//!
//! [`Config::load`] reads a configuration through a [`Source`] and checks it; [`Resource::view`] answers
//! what one host needs to bring a resource up; [`Config::dump`] prints the configuration the way
//! `drbdadm dump` does; [`options`] is the option table. Nothing in here touches the kernel, the network or
//! a clock, and the only I/O is [`Source`]'s.
//!
//! The language is described in spec/drbd-conf.md; error texts, places and exit codes are the reference's,
//! so that scripts which read them go on working.

#![forbid(unsafe_code)]
// A problem ends the run and is made once: boxing it would only clutter the signatures.
#![allow(clippy::result_large_err)]

mod check;
pub mod dump;
pub mod error;
mod expand;
mod lexer;
pub mod model;
pub mod options;
mod parse;
mod proxies;
pub mod source;
pub mod view;
mod xml;

pub use error::{Error, Loc, Notice, Problem};
pub use model::{
    Address, Body, Common, Config, Connection, Family, Global, Host, HostKind, MetaDisk, Resource,
    hostnames_equal,
};
pub use parse::ModuleVersion;
pub use proxies::ProxyView;
pub use source::{FileSource, MemorySource, Source};
pub use view::{HostIdentity, HostView};

/// The version of kernel module whose behaviour the bundled engine has.
pub const BUNDLED_ENGINE: ModuleVersion = ModuleVersion(9, 3, 0);

/// Names a configuration file may have, the preferred one first (spec/drbd-conf.md §1).
pub const DEFAULT_FILES: &[&str] =
    &["drbd-90.conf", "drbd-84.conf", "drbd-83.conf", "drbd-82.conf", "drbd-08.conf", "drbd.conf"];

/// The configuration file in a folder such as `/etc`: the first readable of [`DEFAULT_FILES`].
#[must_use]
pub fn default_file(folder: &str, source: &dyn Source) -> Option<String> {
    DEFAULT_FILES.iter().map(|name| format!("{folder}/{name}")).find(|path| source.read(path).is_ok())
}

/// How to load a configuration.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions<'a> {
    /// Further files, parsed after the main one (`drbdadm -t`).
    pub more: &'a [&'a str],
    /// Files that count as read already, so that includes skip them (`drbdadm -E`).
    pub already_read: &'a [&'a str],
    /// What `require-drbd-module-version-*` compares with. Without it such a statement is an error.
    pub module_version: Option<ModuleVersion>,
}

impl Config {
    /// Reads and checks `path` (`-` is standard input) and everything it includes.
    /// `require-drbd-module-version-*` statements compare with [`BUNDLED_ENGINE`]; use
    /// [`Config::load_with`] for the version of a kernel module.
    ///
    /// # Errors
    /// Everything that is wrong, see [`Problem`].
    pub fn load(path: &str, source: &dyn Source) -> Result<Self, Error> {
        let options = LoadOptions { module_version: Some(BUNDLED_ENGINE), ..LoadOptions::default() };
        Self::load_with(path, source, &options)
    }

    /// Like [`Config::load`], with all choices.
    ///
    /// # Errors
    /// Everything that is wrong, see [`Problem`].
    pub fn load_with(path: &str, source: &dyn Source, options: &LoadOptions<'_>) -> Result<Self, Error> {
        check::finish(parse::Parser::run(source, path, options)?)
    }

    /// What every command but a plain dump needs: each resource can be expanded, and no two of its host
    /// sections are for `host`.
    ///
    /// # Errors
    /// The findings of all resources.
    pub fn check(&self, host: &HostIdentity) -> Result<(), Error> {
        let mut problems = Vec::new();
        for resource in &self.resources {
            problems.extend(resource.two_sections(host));
            if let Err(error) = &resource.expanded {
                problems.extend(error.problems().iter().cloned());
            }
        }
        Error::check(problems)
    }

    /// Whether the addresses of host sections need not exist on this host.
    #[must_use]
    pub fn ip_verification_disabled(&self) -> bool {
        self.global.as_ref().is_some_and(|global| global.is_set("disable-ip-verification"))
    }

    /// Parses the description of running resources (`drbdsetup show`): the same grammar with the words
    /// `_this_host`, `_remote_host`, `_peer_node_id`, `_cstate`. Nothing is inherited or checked.
    ///
    /// # Errors
    /// Syntax errors and bad values.
    pub fn parse_running(text: &str) -> Result<Vec<Resource>, Error> {
        let source = MemorySource::new().with("drbdsetup show", text);
        let out = parse::Parser::run(&source, "drbdsetup show", &LoadOptions::default())?;
        Error::check_fatal(out.problems)?;
        Ok(out.resources)
    }
}
