//! `palisaded RESOURCE`: the replication engine of one resource.
//!
//! One process, one thread around one io_uring, around the state machine of `palisade-core`. What the rooms
//! are: [`engine`] is the loop, [`net`] the peers, [`disk`] the backing devices, [`front`] the block front
//! ends, [`control`] the clients, [`handlers`] the administrator's scripts; [`ring`] and [`sys`] talk to the
//! kernel. Nothing here decides what a packet or a state means: that is the core's.

mod config;
mod control;
mod core_api;
mod disk;
mod engine;
mod flow;
mod front;
mod handlers;
mod net;
mod options;
mod process;
mod ring;
mod sys;

use palisade_control::runtime_dir;
use std::process::ExitCode;

/// Exit status when another engine serves the resource.
const EXIT_TAKEN: u8 = 2;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let name = match (args.next(), args.next()) {
        (Some(flag), None) if flag == "--help" || flag == "-h" => {
            println!(
                "usage: palisaded RESOURCE\n\nRuns the replication engine of RESOURCE; drbdadm starts it."
            );
            return ExitCode::SUCCESS;
        }
        (Some(flag), None) if flag == "--version" => {
            println!("palisaded {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        (Some(name), None) if is_resource_name(&name) => name,
        _ => {
            eprintln!("usage: palisaded RESOURCE");
            return ExitCode::from(64);
        }
    };
    process::start_log();
    let runtime = runtime_dir();
    let lock = match process::claim(&runtime, &name) {
        Ok(Some(lock)) => lock,
        Ok(None) => {
            tracing::error!("another engine already serves resource {name}; stop it first");
            return ExitCode::from(EXIT_TAKEN);
        }
        Err(e) => {
            tracing::error!("{} cannot be used: {e}", runtime.display());
            return ExitCode::FAILURE;
        }
    };
    process::harden();
    let notifier = process::Notifier::from_environment();
    let ended = engine::Engine::new(&name, runtime, notifier).and_then(|mut engine| engine.run());
    drop(lock);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            tracing::error!("the engine of resource {name} cannot go on: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the name can be part of a file name.
fn is_resource_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 127
        && !name.starts_with(['.', '-'])
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-+.".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::is_resource_name;

    #[test]
    fn names_stay_inside_the_runtime_directory() {
        assert!(is_resource_name("r0") && is_resource_name("my-data.1"));
        for bad in ["", ".", "../x", "a/b", "-x", "a b"] {
            assert!(!is_resource_name(bad), "{bad}");
        }
    }
}
