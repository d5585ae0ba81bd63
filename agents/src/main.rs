//! The OCF resource agents in one program: which agent runs is decided by the name it is called by,
//! or by the first argument when it is called by its own name (`palisade-agents drbd monitor`).
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

mod drbd;

/// An agent: takes the arguments after its name, returns the OCF exit code.
type Agent = fn(&[OsString]) -> ExitCode;

const AGENTS: [(&str, Agent); 1] = [("drbd", drbd::main)];

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    for position in 0..args.len().min(2) {
        let (called, rest) = args.split_at(position + 1);
        let name = called.last().and_then(|path| Path::new(path).file_name());
        if let Some((_, agent)) = AGENTS.iter().find(|(known, _)| name.is_some_and(|name| name == *known)) {
            return agent(rest);
        }
    }
    let known: Vec<&str> = AGENTS.iter().map(|(name, _)| *name).collect();
    eprintln!("Usage: palisade-agents AGENT ACTION\nAgents: {}", known.join(" "));
    palisade_cluster::ExitCode::Args.into()
}
