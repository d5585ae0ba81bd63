//! `drbdadm`: reads the configuration and plans low-level commands (`spec/cli.md` §1 to §9). It never talks
//! to an engine itself: everything it does is a line of a back-end tool that a dry run would print.

mod adjust;
mod bring_up;
mod exec;
mod lines;
mod metadata;
mod objects;
mod plain;
mod proxy;
mod request;
mod running;
mod sh;
mod site;
mod usage;
mod verbs;
mod waiting;

use std::io::IsTerminal;
use std::process::{Command as Process, Stdio};

use palisade_control::NESTED_ENV;

use crate::cli::{Failure, print};
use crate::engines::{self, Server};
use exec::Exec;
use objects::Target;
use request::{Request, unknown_command};
use site::Site;
use verbs::{EachFn, Runs, Verb};

pub const EXIT_USAGE: i32 = 1;
pub const EXIT_INVALID: i32 = 10;
/// A result this bad ends the program at once.
pub const EXIT_FATAL: i32 = 20;

/// Runs `drbdadm` with these arguments; prints and gives the exit status.
pub fn main(args: &[String]) -> i32 {
    site::announce_pretence();
    run(args).unwrap_or_else(|f| f.report())
}

fn run(args: &[String]) -> Result<i32, Failure> {
    let Some(mut request) = Request::parse(args)? else { return Ok(0) };
    let Some(verb) = verbs::find(&request.verb) else {
        return Err(unknown_command(&request.verb));
    };
    let site = Site::load(&request)?;
    request.config_file = Some(bring_up::absolute(&site.file));
    let exec = Exec::new(&request);
    match verb.runs {
        Runs::Once(run) | Runs::Query(run) => {
            let names_nothing = matches!(verb.runs, Runs::Once(_));
            if names_nothing && !request.objects.is_empty() {
                eprintln!("This command will ignore resource names!");
            }
            let code = run(&site, &exec, &request)?;
            if code != 0 && (names_nothing || request.objects.is_empty()) {
                eprintln!("command {} exited with code {code}", verb.name);
            }
            Ok(code)
        }
        _ if request.objects.is_empty() => {
            print(&usage::usage(Some(verb)));
            print("\nNo resource names specified\n");
            Ok(EXIT_USAGE)
        }
        Runs::Proxy(lines) => proxy::run(lines, &site, &exec, &request),
        Runs::Each(_) | Runs::Together(_) => run_on_objects(verb, &site, &exec, &request),
    }
}

fn run_on_objects(verb: &Verb, site: &Site, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let mut found = objects::resolve(verb, site, request)?;
    if must_find_address(verb, site, request) {
        for target in &found.targets {
            if let Some(resource) = site.config.resource(&target.view.resource) {
                resource
                    .check_address(&site.host)
                    .map_err(|e| Failure::new(i32::from(e.exit_code()), e.to_string()))?;
            }
        }
    }
    let mut code = found.code;
    if verb.needs_engine && !request.dry_run {
        code = code.max(hand_over_kernel_resources(verb, request, &mut found.targets)?);
    }
    let result = match verb.runs {
        Runs::Together(run) => run(site, &found, exec, request)?,
        Runs::Each(run) => each(&found.targets, exec, request, run)?,
        Runs::Once(_) | Runs::Query(_) | Runs::Proxy(_) => 0,
    };
    Ok(code.max(result))
}

/// Dry runs of scripts are made for other hosts (`spec/drbd-conf.md` §8.2).
fn must_find_address(verb: &Verb, site: &Site, request: &Request) -> bool {
    let for_here = !request.dry_run || std::io::stdin().is_terminal();
    let uses_net = verb.checks_address && !request.scanned.is_set("skip-net");
    uses_net && for_here && !site.config.ip_verification_disabled()
}

/// Runs a command on each target; inside one resource the first failure ends it.
fn each(targets: &[Target], exec: &Exec<'_>, request: &Request, run: EachFn) -> Result<i32, Failure> {
    let mut worst = 0;
    let mut failed: Option<(&str, &str)> = None;
    for target in targets {
        let place = (target.object.as_str(), target.view.resource.as_str());
        if failed == Some(place) {
            continue;
        }
        let code = run(target, exec, request).unwrap_or_else(|f| f.report());
        worst = worst.max(code);
        if code >= EXIT_FATAL {
            return Ok(code);
        }
        if code != 0 {
            failed = Some(place);
        }
    }
    Ok(worst)
}

/// Resources of the kernel are served by the reference's own `drbdadm`.
fn hand_over_kernel_resources(
    verb: &Verb,
    request: &Request,
    targets: &mut Vec<Target>,
) -> Result<i32, Failure> {
    let mut worst = 0;
    let mut done: Vec<String> = Vec::new();
    let mut kept = Vec::new();
    for target in targets.drain(..) {
        let Server::Kernel(kernel) = engines::server_of(&target.view.resource)? else {
            kept.push(target);
            continue;
        };
        let object =
            if target.object == "all" { target.view.resource.clone() } else { target.object.clone() };
        if done.contains(&object) {
            continue;
        }
        let tool = kernel.drbdadm().map_err(|e| Failure::new(EXIT_FATAL, format!("{e}.")))?;
        let mut process = Process::new(tool);
        if let Some(file) = &request.config_file {
            process.args(["-c", file]);
        }
        process.args(std::iter::repeat_n("-v", request.verbose));
        if !request.words.is_empty() {
            process.arg("--").args(&request.words);
        }
        process.arg(verb.name).args(&request.extra).arg(&object);
        let status = process
            .env(NESTED_ENV, "1")
            .stdin(Stdio::inherit())
            .status()
            .map_err(|e| Failure::new(EXIT_FATAL, format!("Cannot run {}: {e}.", tool.display())))?;
        worst = worst.max(status.code().unwrap_or(EXIT_FATAL));
        done.push(object);
    }
    *targets = kept;
    Ok(worst)
}
