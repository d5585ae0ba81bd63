//! `palisade`: the reference's `drbdadm`, `drbdsetup` and `drbdmeta` in one program.
//!
//! What runs is chosen by the name it is called by, or by the first argument of `palisade`.
//! `drbdadm` plans lines of `drbdsetup` and `drbdmeta`, prints them in a dry run, and otherwise
//! hands them to the same functions those names run. The specification is `spec/cli.md`.

mod adm;
mod cli;
mod engines;
mod meta;
mod setup;
mod system;

use std::path::Path;
use std::process::ExitCode;

/// A tool of this program: its name and what it does with its arguments.
type Tool = (&'static str, fn(&[String]) -> i32);

const TOOLS: &[Tool] = &[("drbdadm", adm::main), ("drbdsetup", setup::main), ("drbdmeta", meta::main)];

const EXIT_USAGE: i32 = 20;

fn main() -> ExitCode {
    let mut args = std::env::args_os().map(|a| a.to_string_lossy().into_owned());
    let called = args.next().unwrap_or_default();
    let called = Path::new(&called).file_name().map_or(called.clone(), |n| n.to_string_lossy().into_owned());
    let mut args: Vec<String> = args.collect();
    if let Some((_, run)) = tool(&called) {
        return exit(run(&args));
    }
    if args.first().is_some_and(|a| a == "--version" || a == "-V") {
        println!("palisade {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    if args.is_empty() || args.first().is_some_and(|a| a == "--help" || a == "-h" || a == "help") {
        println!("USAGE: palisade {{drbdadm|drbdsetup|drbdmeta}} ARGUMENTS...\n");
        println!("The same tools run when palisade is called by one of these names.");
        return exit(if args.is_empty() { EXIT_USAGE } else { 0 });
    }
    let name = args.remove(0);
    let Some((_, run)) = tool(&name) else {
        let names = TOOLS.iter().map(|(n, _)| *n);
        eprintln!("palisade: unknown tool '{name}'.{}", cli::suggestion(&name, names));
        return exit(EXIT_USAGE);
    };
    exit(run(&args))
}

fn tool(name: &str) -> Option<&'static Tool> {
    TOOLS.iter().find(|(n, _)| *n == name)
}

fn exit(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}
