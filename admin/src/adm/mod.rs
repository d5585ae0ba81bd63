//! `drbdadm`: reads the configuration and plans low-level commands (`spec/cli.md` §1 to §9).

mod adjust;
mod bring_up;
mod exec;
mod lines;
mod metadata;
mod objects;
mod running;
mod sh;
mod site;
mod verbs;

use std::process::{Command as Process, Stdio};

use palisade_conf::dump::DumpOptions;
use palisade_control::NESTED_ENV;

use crate::cli::{self, Accepts, Failure, Scanned, print, suggestion};
use crate::engines::{self, Server};
use exec::Exec;
use objects::Target;
use site::Site;
use verbs::{Runs, VERBS, Verb};

pub const EXIT_USAGE: i32 = 1;
pub const EXIT_INVALID: i32 = 10;
/// A result this bad ends the program at once.
pub const EXIT_FATAL: i32 = 20;

/// What the command line says.
#[derive(Debug, Default)]
pub struct Request {
    pub dry_run: bool,
    pub verbose: usize,
    pub stacked: bool,
    pub config_file: Option<String>,
    pub config_to_test: Vec<String>,
    pub config_to_exclude: Vec<String>,
    pub drbdsetup: Option<String>,
    pub drbdmeta: Option<String>,
    pub sh_varname: Option<String>,
    pub verb: String,
    pub objects: Vec<String>,
    /// Options and words for the back end, as given.
    pub extra: Vec<String>,
    /// The same, sorted.
    pub scanned: Scanned,
    /// Words before the command: arguments for the back end.
    pub words: Vec<String>,
}

/// Runs `drbdadm` with these arguments; prints and gives the exit status.
pub fn main(args: &[String]) -> i32 {
    run(args).unwrap_or_else(|f| f.report())
}

fn run(args: &[String]) -> Result<i32, Failure> {
    let Some(mut request) = parse(args)? else { return Ok(0) };
    let Some(verb) = VERBS.iter().find(|v| v.name == request.verb) else {
        return Err(unknown_command(&request.verb));
    };
    if !request.config_to_test.is_empty() && !matches!(verb.name, "dump" | "sh-nop") {
        return Err(Failure::new(
            EXIT_USAGE,
            "The --config-to-test (-t) option is only allowed with the dump and sh-nop commands",
        ));
    }
    let site = Site::load(&request)?;
    request.config_file = Some(bring_up::absolute(&site.file));
    let exec = Exec::new(&request);
    match verb.runs {
        Runs::Once(run) => run(&site, &exec, &request),
        Runs::Dump => dump(&site, &request),
        _ => run_on_objects(verb, &site, &exec, &request),
    }
}

fn dump(site: &Site, request: &Request) -> Result<i32, Failure> {
    let options = DumpOptions { expanded: request.verbose > 0 };
    let invalid = |e: palisade_conf::Error| Failure::new(i32::from(e.exit_code()), e.to_string());
    if request.objects.is_empty() || request.objects.iter().any(|o| o == "all") {
        print(&site.config.dump(&site.host, options).map_err(invalid)?);
        if !site.config.ip_verification_disabled() {
            for resource in site.config.resources() {
                resource.check_address(&site.host).map_err(invalid)?;
            }
        }
        return Ok(0);
    }
    for name in &request.objects {
        print(&site.config.dump_resource(name, &site.host, options).map_err(invalid)?);
    }
    Ok(0)
}

fn run_on_objects(verb: &Verb, site: &Site, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    if request.objects.is_empty() {
        print(&usage(Some(verb)));
        print("\nNo resource names specified\n");
        return Ok(EXIT_USAGE);
    }
    let (mut targets, mut code) = objects::resolve(verb, site, request)?;
    if verb.checks_address && !request.dry_run && !site.config.ip_verification_disabled() {
        for target in &targets {
            if let Some(resource) = site.config.resource(&target.view.resource) {
                resource
                    .check_address(&site.host)
                    .map_err(|e| Failure::new(i32::from(e.exit_code()), e.to_string()))?;
            }
        }
    }
    if verb.needs_engine && !request.dry_run {
        code = code.max(hand_over_kernel_resources(verb, request, &mut targets)?);
    }
    let result = match verb.runs {
        Runs::Up => bring_up::up(&targets, exec, request)?,
        Runs::Adjust => adjust::adjust(&targets, exec, request)?,
        Runs::Each(run) => each(&targets, exec, request, run)?,
        Runs::Once(_) | Runs::Dump => 0,
    };
    Ok(code.max(result))
}

/// Runs a command on each target; inside one resource the first failure ends it.
fn each(
    targets: &[Target],
    exec: &Exec<'_>,
    request: &Request,
    run: fn(&Target, &Exec<'_>, &Request) -> Result<i32, Failure>,
) -> Result<i32, Failure> {
    let mut worst = 0;
    let mut failed: Option<&str> = None;
    for target in targets {
        if failed == Some(target.object.as_str()) {
            continue;
        }
        let code = run(target, exec, request).unwrap_or_else(|f| f.report());
        worst = worst.max(code);
        if code >= EXIT_FATAL {
            return Ok(code);
        }
        if code != 0 {
            failed = Some(&target.object);
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

fn unknown_command(name: &str) -> Failure {
    const NOT_YET: &[&str] = &[
        "proxy-up",
        "proxy-down",
        "adjust-with-progress",
        "wait-con-int",
        "dump-xml",
        "sh-list-adjustable",
        "repair-md",
        "dump-superblock",
    ];
    if NOT_YET.contains(&name) {
        return crate::setup::unsupported(name);
    }
    let hint = suggestion(name, VERBS.iter().map(|v| v.name));
    Failure::new(EXIT_USAGE, format!("drbdadm: Unknown command '{name}'{hint}"))
}

/// `None` when there is nothing left to do (help and version).
fn parse(args: &[String]) -> Result<Option<Request>, Failure> {
    let mut request = Request::default();
    let mut rest = args.iter().cloned().collect::<std::collections::VecDeque<String>>();
    let mut options_end = false;
    let wrong = |text: String| Failure::new(EXIT_USAGE, text);
    while let Some(arg) = rest.pop_front() {
        if arg == "--" {
            options_end = true;
            continue;
        }
        let is_option = arg.len() > 1 && arg.starts_with('-') && !options_end;
        let verb = VERBS.iter().find(|v| v.name == request.verb);
        if !is_option {
            word(&mut request, arg, options_end);
            if !request.verb.is_empty() {
                options_end = false;
            }
            continue;
        }
        let (name, given) = split_option(&arg);
        let mut value = |what: &str| {
            given
                .clone()
                .or_else(|| rest.pop_front())
                .ok_or_else(|| wrong(format!("{what} requires a value")))
        };
        match name.as_str() {
            "-S" | "--stacked" => request.stacked = true,
            "-d" | "--dry-run" if verb.is_none_or(|v| v.name != "connect") || name == "-d" => {
                request.dry_run = true;
            }
            "-v" | "--verbose" => request.verbose += 1,
            "-c" | "--config-file" => request.config_file = Some(value("-c")?),
            "-t" | "--config-to-test" => request.config_to_test.push(value("-t")?),
            "-E" | "--config-to-exclude" => request.config_to_exclude.push(value("-E")?),
            "-s" | "--drbdsetup" => request.drbdsetup = Some(value("-s")?),
            "-m" | "--drbdmeta" => request.drbdmeta = Some(value("-m")?),
            "-p" | "--drbd-proxy-ctl" => {
                value("-p")?;
            }
            "-n" | "--sh-varname" => request.sh_varname = Some(var_name(value("-n")?)?),
            "-W" | "--setup-option" => request.extra.push(value("-W")?),
            "-h" | "--help" => {
                print(&usage(verb));
                return Ok(None);
            }
            "-V" | "--version" => {
                print(&version());
                return Ok(None);
            }
            _ if arg.starts_with("--") => request.extra.push(arg),
            _ => return Err(wrong(format!("drbdadm: invalid option '{arg}'\ntry 'drbdadm help'"))),
        }
    }
    if request.verb == "help" {
        let verb = request.objects.first().and_then(|name| VERBS.iter().find(|v| v.name == name));
        print(&usage(verb));
        return Ok(None);
    }
    if request.verb.is_empty() {
        if let Some(word) = request.words.first() {
            return Err(unknown_command(word));
        }
        print(&usage(None));
        print("\nNo command specified\n");
        return Err(Failure::new(EXIT_USAGE, ""));
    }
    back_end_options(&mut request)?;
    Ok(Some(request))
}

/// The first word that is a command is the command; what stands before it is for the back end.
fn word(request: &mut Request, arg: String, after_dashes: bool) {
    if !request.verb.is_empty() {
        request.objects.push(arg);
    } else if arg == "help" || VERBS.iter().any(|v| v.name == arg) {
        request.verb = arg;
    } else if let Some((_, name)) = OLD_NAMES.iter().find(|(old, _)| *old == arg) {
        eprintln!("'drbdadm {arg}' is deprecated, use 'drbdadm {name}' instead.");
        request.verb = (*name).to_owned();
    } else if after_dashes && arg.starts_with("--") {
        request.extra.push(arg);
    } else {
        request.words.push(arg);
    }
}

const OLD_NAMES: &[(&str, &str)] = &[("state", "role"), ("outdate-peer", "fence-peer")];

/// `--name=value`, `-xvalue` or a bare option.
fn split_option(arg: &str) -> (String, Option<String>) {
    if arg.starts_with("--") {
        return match arg.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (arg.to_owned(), None),
        };
    }
    let mut chars = arg.chars();
    let short: String = chars.by_ref().take(2).collect();
    let value = chars.as_str();
    (short, (!value.is_empty()).then(|| value.trim_start_matches('=').to_owned()))
}

fn var_name(name: String) -> Result<String, Failure> {
    if name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        Ok(name)
    } else {
        Err(Failure::new(EXIT_USAGE, "shell variable names (-n) are made of letters, digits and '_'"))
    }
}

/// Checks the options for the back end against the command.
fn back_end_options(request: &mut Request) -> Result<(), Failure> {
    let Some(verb) = VERBS.iter().find(|v| v.name == request.verb) else { return Ok(()) };
    // Values may be given as a word of their own; then they were taken for objects.
    let mut extra = request.extra.clone();
    for option in &mut extra {
        let name = option.trim_start_matches("--").to_owned();
        let flag = verb.accepts.flags.iter().find(|(n, _)| *n == name);
        let needs_value = flag.is_some_and(|(_, takes)| *takes == cli::Takes::Value)
            || (flag.is_none()
                && !option.contains('=')
                && verb
                    .accepts
                    .classes
                    .iter()
                    .find_map(|c| palisade_conf::options::find_in(*c, &name))
                    .is_some_and(|spec| !spec.is_bool()));
        if needs_value && !request.objects.is_empty() {
            *option = format!("{option}={}", request.objects.remove(0));
        }
    }
    let fail = |e: String| {
        let known = e.starts_with("unrecognized option").then(|| {
            let option = e.split('\'').nth(1).unwrap_or_default().trim_start_matches("--").to_owned();
            VERBS.iter().any(|v| accepts(&v.accepts, &option))
        });
        let text = match known {
            Some(true) => {
                let short = e.split_inclusive('\'').take(2).collect::<String>();
                format!("drbdadm: {short}\ntry 'drbdadm help {}'", verb.name)
            }
            Some(false) => format!("drbdadm: {}\ntry 'drbdadm help'", e.trim_end_matches('.')),
            None => format!("drbdadm: {e}"),
        };
        Failure::new(EXIT_USAGE, text)
    };
    request.scanned = cli::scan(&extra, &verb.accepts).map_err(fail)?;
    request.extra = extra.into_iter().map(|o| real_name(&o, &verb.accepts)).collect();
    Ok(())
}

fn real_name(option: &str, accepts: &Accepts) -> String {
    let body = option.trim_start_matches("--");
    let (name, value) = body.split_once('=').map_or((body, None), |(n, v)| (n, Some(v)));
    let name = accepts.aliases.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, real)| *real);
    value.map_or_else(|| format!("--{name}"), |v| format!("--{name}={v}"))
}

fn accepts(accepts: &Accepts, name: &str) -> bool {
    accepts.flags.iter().any(|(n, _)| *n == name)
        || accepts.classes.iter().any(|c| palisade_conf::options::find_in(*c, name).is_some())
}

fn usage(verb: Option<&Verb>) -> String {
    const GENERAL: &str = "GENERAL OPTIONS:\n  --stacked, -S\n  --dry-run, -d\n  --verbose, -v\n  \
                           --config-file=..., -c ...\n  --config-to-test=..., -t ...\n  --config-to-exclude=..., -E ...\n  \
                           --drbdsetup=..., -s ...\n  --drbdmeta=..., -m ...\n  --drbd-proxy-ctl=..., -p ...\n  \
                           --sh-varname=..., -n ...\n  --version, -V\n  --setup-option=..., -W ...\n  --help, -h\n";
    let mut text = match verb {
        Some(verb) => format!("\nUSAGE: drbdadm {} [OPTION...] {{all|RESOURCE...}}\n\n{GENERAL}", verb.name),
        None => format!("\nUSAGE: drbdadm COMMAND [OPTION...] {{all|RESOURCE...}}\n\n{GENERAL}"),
    };
    match verb {
        Some(verb) => {
            let names = verb
                .accepts
                .flags
                .iter()
                .map(|(n, takes)| match takes {
                    cli::Takes::Value => format!("  --{n}=...\n"),
                    _ => format!("  --{n}[=...]\n"),
                })
                .chain(verb.accepts.classes.iter().flat_map(|c| palisade_conf::options::of(*c)).map(|s| {
                    if s.is_bool() {
                        format!("  --{}[=...]\n", s.name)
                    } else {
                        format!("  --{}=...\n", s.name)
                    }
                }))
                .collect::<Vec<_>>();
            if !names.is_empty() {
                text.push_str(&format!("\nOPTIONS FOR {}:\n{}", verb.name, names.concat()));
            }
        }
        None => {
            text.push_str("\nCOMMANDS:\n");
            for verb in VERBS.iter().filter(|v| !v.name.starts_with("sh-")) {
                text.push_str(&format!("  {}\n", verb.name));
            }
        }
    }
    let number = env!("CARGO_PKG_VERSION");
    text.push_str(&format!("\nVersion: 9.22.0\npalisade {number}\n"));
    text
}

/// Shell assignments as the reference prints them; the version is that of the tools we stand in for.
fn version() -> String {
    let kernel = palisade_conf::BUNDLED_ENGINE;
    let code = |a: u32, b: u32, c: u32| a << 16 | b << 8 | c;
    format!(
        "DRBDADM_BUILDTAG=palisade-{}\nDRBDADM_API_VERSION=2\nDRBD_KERNEL_VERSION_CODE=0x{:06x}\n\
         DRBD_KERNEL_VERSION={}.{}.{}\nDRBDADM_VERSION_CODE=0x{:06x}\nDRBDADM_VERSION=9.22.0\n",
        env!("CARGO_PKG_VERSION"),
        code(kernel.0, kernel.1, kernel.2),
        kernel.0,
        kernel.1,
        kernel.2,
        code(9, 22, 0),
    )
}
