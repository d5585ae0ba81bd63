//! Option values on their way to an engine.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Options whose value must not reach a log.
const SECRET_NAMES: &[&str] = &["shared-secret"];

/// Option names and canonical values, as validated by `palisade-conf`.
///
/// Numbers are decimal in the base unit of `spec/drbd-conf.md` §10, booleans `yes` or `no`,
/// enumerations the keyword. `Debug` hides the value of secrets; serialisation does not.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Options(pub BTreeMap<String, String>);

impl Options {
    /// No options.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The value of `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Whether the boolean `name` is `yes`; `None` when not given.
    #[must_use]
    pub fn flag(&self, name: &str) -> Option<bool> {
        self.get(name).map(|v| v == "yes")
    }

    /// Sets `name`.
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.0.insert(name.into(), value.into());
    }

    /// Whether nothing is given.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Names and values, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    /// Whether the value of `name` is a secret that must not be logged.
    #[must_use]
    pub fn is_secret(name: &str) -> bool {
        SECRET_NAMES.contains(&name)
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        for (name, value) in self.iter() {
            map.entry(&name, &if Self::is_secret(name) { "(hidden)" } else { value });
        }
        map.finish()
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Options {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(iter: I) -> Self {
        Self(iter.into_iter().map(|(k, v)| (k.into(), v.into())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_hides_the_secret() {
        let options: Options = [("shared-secret", "geheim"), ("protocol", "C")].into_iter().collect();
        let text = format!("{options:?}");
        assert!(!text.contains("geheim"), "{text}");
        assert!(text.contains("protocol"), "{text}");
        assert!(serde_json::to_string(&options).unwrap().contains("geheim"));
    }
}
