//! Every scenario file has the outcome it states.
#![allow(clippy::unwrap_used)] // A test: what cannot be read fails it.

use palisade_sim::scenario::run_file;
use std::path::{Path, PathBuf};

fn files(folder: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let all = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
    let mut files: Vec<_> = all.filter(|f| f.extension().is_some_and(|e| e == "txt")).collect();
    files.sort();
    files
}

#[test]
fn all_scenarios() {
    let rewrite = std::env::var_os("PALISADE_REWRITE").is_some();
    let files = files("scenarios");
    let wrong: Vec<String> = files.iter().filter_map(|f| run_file(f, rewrite, false).err()).collect();
    assert!(files.len() >= 30, "only {} scenarios", files.len());
    assert!(wrong.is_empty(), "{} of {} scenarios:\n{}", wrong.len(), files.len(), wrong.join("\n"));
}

/// Scenarios in `scenarios/open` state what should happen and does not yet. One that passes belongs one folder up.
#[test]
fn open_scenarios_are_still_open() {
    let passing: Vec<PathBuf> =
        files("scenarios/open").into_iter().filter(|f| run_file(f, false, false).is_ok()).collect();
    assert!(passing.is_empty(), "these have the outcome they state; move them to scenarios/: {passing:?}");
}
