//! Every scenario file has the outcome it states.

use palisade_sim::scenario::run_file;
use std::path::Path;

#[test]
fn all_scenarios() {
    let rewrite = std::env::var_os("PALISADE_REWRITE").is_some();
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    let wrong: Vec<String> = files.iter().filter_map(|f| run_file(f, rewrite, false).err()).collect();
    assert!(files.len() >= 30, "only {} scenarios", files.len());
    assert!(wrong.is_empty(), "{} of {} scenarios:\n{}", wrong.len(), files.len(), wrong.join("\n"));
}
