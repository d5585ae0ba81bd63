//! Which engine serves a resource.
//!
//! `/etc/palisade/palisade.toml` may say so:
//!
//! ```toml
//! engine = "bundled"        # or "kernel", for every resource
//! [resource.r0]
//! engine = "kernel"         # for this one
//! ```
//!
//! Where it is silent, the kernel serves what its module knows and the bundled engine the rest.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

/// Where the settings are, if `PALISADE_CONFIG` does not name another file.
const PATH_DEFAULT: &str = "/etc/palisade/palisade.toml";

/// The two kinds of engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// Palisade's own.
    Bundled,
    /// The kernel's DRBD module.
    Kernel,
}

/// Contents of `palisade.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Engine of every resource that has none of its own.
    #[serde(default)]
    pub engine: Option<Engine>,
    /// Settings of single resources.
    #[serde(default)]
    pub resource: BTreeMap<String, ResourceSettings>,
}

/// Settings of one resource.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResourceSettings {
    /// Its engine.
    #[serde(default)]
    pub engine: Option<Engine>,
}

/// Why the settings could not be read.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// The file is there but cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{}: {text}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line.
        text: String,
    },
}

impl Settings {
    /// Reads `$PALISADE_CONFIG` or `/etc/palisade/palisade.toml`; defaults if there is no such file.
    ///
    /// # Errors
    /// If the file cannot be read or understood.
    pub fn load() -> Result<Self, SettingsError> {
        let path = std::env::var_os("PALISADE_CONFIG")
            .filter(|v| !v.is_empty())
            .map_or_else(|| PathBuf::from(PATH_DEFAULT), PathBuf::from);
        Self::load_from(&path)
    }

    /// Reads that file; defaults if it does not exist.
    ///
    /// # Errors
    /// If the file cannot be read or understood.
    pub fn load_from(path: &Path) -> Result<Self, SettingsError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(SettingsError::Read { path: path.to_owned(), source }),
        };
        toml::from_str(&text).map_err(|e| SettingsError::Parse {
            path: path.to_owned(),
            text: e.to_string().trim_end().to_owned(),
        })
    }

    /// The engine fixed for a resource, if any.
    #[must_use]
    pub fn engine_of(&self, resource: &str) -> Option<Engine> {
        self.resource.get(resource).and_then(|r| r.engine).or(self.engine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resource_wins_over_the_global_setting() {
        let s: Settings =
            toml::from_str("engine = \"bundled\"\n[resource.r0]\nengine = \"kernel\"\n").unwrap();
        assert_eq!(s.engine_of("r0"), Some(Engine::Kernel));
        assert_eq!(s.engine_of("r1"), Some(Engine::Bundled));
    }

    #[test]
    fn misspelled_keys_are_refused() {
        assert!(toml::from_str::<Settings>("engin = \"bundled\"\n").is_err());
        assert!(toml::from_str::<Settings>("engine = \"linux\"\n").is_err());
    }
}
