//! Scenarios as text: what an administrator, a front end or fate does, and what the cluster looks like then.
//!
//! ```text
//! # Why this scenario exists.
//! nodes a b
//! up a b
//! promote a force
//! wait uptodate
//! ----
//! ok
//!
//! status
//! ----
//! a Primary UpToDate
//!   b Connected Secondary Established UpToDate
//! ...
//! ```
//!
//! A block is commands up to a line `----` and the expected output up to an empty line; a block in which nothing
//! has anything to say prints `ok`. With `PALISADE_REWRITE=1` the expected parts are written anew.

use crate::commands::Runner;
use std::path::Path;

/// Runs the text; returns it with the expected parts replaced by what happened.
///
/// # Errors
/// A line that is no command, or a violated invariant.
pub fn run(text: &str, trace: bool) -> Result<String, String> {
    let mut runner = Runner::new(trace);
    let mut out = String::new();
    let mut lines = text.lines().enumerate();
    let mut said = String::new();
    while let Some((nr, line)) = lines.next() {
        out.push_str(line);
        out.push('\n');
        let command = line.trim();
        if command.is_empty() || command.starts_with('#') {
            continue;
        }
        if command != "----" {
            if trace {
                println!("=== {command}");
            }
            let r = runner.command(command).map_err(|e| format!("line {}: {command}: {e}", nr + 1))?;
            said.push_str(&r);
            if let Some(f) = runner.failure() {
                return Err(format!("line {}: {command}: {f}\n{}", nr + 1, runner.status()));
            }
            continue;
        }
        if said.is_empty() {
            said.push_str("ok\n");
        }
        out.push_str(&said);
        said.clear();
        out.push('\n');
        for (_, line) in lines.by_ref() {
            if line.trim().is_empty() {
                break;
            }
        }
    }
    while out.ends_with("\n\n") {
        out.pop();
    }
    Ok(out)
}

/// Runs a scenario file and compares (or, with `rewrite`, replaces) its expected parts.
///
/// # Errors
/// The difference, line by line, or what went wrong.
pub fn run_file(path: &Path, rewrite: bool, trace: bool) -> Result<(), String> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| format!("The scenario {} cannot be read: {e}.", path.display()))?;
    let got = run(&text, trace).map_err(|e| format!("{}: {e}", path.display()))?;
    if got.trim_end() == text.trim_end() {
        return Ok(());
    }
    if rewrite {
        return std::fs::write(path, got)
            .map_err(|e| format!("The scenario {} cannot be written: {e}.", path.display()));
    }
    let mut diff = format!("{}: the outcome differs\n", path.display());
    for d in differences(&text, &got) {
        diff.push_str(&d);
        diff.push('\n');
    }
    Err(diff)
}

/// A plain line diff: common head and tail are left out.
fn differences(old: &str, new: &str) -> Vec<String> {
    let (a, b): (Vec<&str>, Vec<&str>) = (old.trim_end().lines().collect(), new.trim_end().lines().collect());
    let head = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
    let tail = a[head..].iter().rev().zip(b[head..].iter().rev()).take_while(|(x, y)| x == y).count();
    let context = head.saturating_sub(6);
    let mut out: Vec<String> = a[context..head].iter().map(|l| format!("  {l}")).collect();
    out.extend(a[head..a.len() - tail].iter().map(|l| format!("- {l}")));
    out.extend(b[head..b.len() - tail].iter().map(|l| format!("+ {l}")));
    out
}
