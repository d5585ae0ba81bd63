//! Runs scenarios and seeds of the simulator.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let trace = args.iter().any(|a| a == "--trace");
    let words: Vec<&str> = args.iter().map(String::as_str).filter(|a| !a.starts_with("--")).collect();
    match words.as_slice() {
        ["scenario", files @ ..] if !files.is_empty() => {
            let rewrite = std::env::var_os("PALISADE_REWRITE").is_some();
            let mut bad = 0;
            for f in files {
                if let Err(e) = palisade_sim::scenario::run_file(Path::new(f), rewrite, trace) {
                    println!("{e}");
                    bad += 1;
                }
            }
            ExitCode::from(u8::from(bad > 0))
        }
        _ => ExitCode::from(2),
    }
}
