//! `drbdsetup`: one low-level command to one engine (`spec/cli.md` §10 to §16).

mod events;
mod query;
mod verbs;
mod wait;

use std::process::{Command as Process, Stdio};
use std::time::{Duration, Instant};

use palisade_control::{ClientError, Command, Kernel, NESTED_ENV, Payload, Refusal, Reply};

use crate::cli::{Failure, Scanned, scan, suggestion};
use crate::engines;
pub use query::running;
use verbs::{VERBS, Verb};

/// Exit status for arguments that are not understood and for communication problems.
pub const EXIT_USAGE: i32 = 20;
/// Exit status for objects that do not exist.
pub const EXIT_NOT_FOUND: i32 = 10;

/// First and longest pause before a command refused with "in transient state" is repeated.
const RETRY_FIRST: Duration = Duration::from_micros(62_500);
const RETRY_LONGEST: Duration = Duration::from_secs(10);
const RETRY_TOTAL: Duration = Duration::from_secs(120);

/// A command about to run.
pub struct Call<'a> {
    pub args: &'a [String],
    pub scanned: Scanned,
}

impl Call<'_> {
    /// The word at a place that the verb's usage guarantees.
    pub fn word(&self, index: usize) -> &str {
        self.scanned.words.get(index).map_or("", String::as_str)
    }

    pub fn number<T: std::str::FromStr>(&self, index: usize, what: &str) -> Result<T, Failure> {
        let word = self.word(index);
        word.parse().map_err(|_| Failure::new(EXIT_USAGE, format!("'{word}' is not a {what}")))
    }

    /// A minor: a number, `/dev/drbdN` or a device node of DRBD.
    pub fn minor(&self, index: usize) -> Result<u32, Failure> {
        let word = self.word(index);
        minor_of(word).ok_or_else(|| {
            Failure::new(EXIT_USAGE, format!("Cannot determine minor device number of device '{word}'"))
        })
    }
}

/// The minor a word stands for.
pub fn minor_of(word: &str) -> Option<u32> {
    const DRBD_MAJOR: u64 = 147;
    const MINOR_MAX: u32 = (1 << 20) - 1;
    let number = word.strip_prefix("/dev/drbd").unwrap_or(word);
    if let Ok(minor) = number.parse::<u32>() {
        return (minor <= MINOR_MAX).then_some(minor);
    }
    let rdev = std::os::unix::fs::MetadataExt::rdev(&std::fs::metadata(word).ok()?);
    (nix::sys::stat::major(rdev) == DRBD_MAJOR)
        .then(|| u32::try_from(nix::sys::stat::minor(rdev)).ok())
        .flatten()
}

/// Runs `drbdsetup` with these arguments; prints and gives the exit status.
pub fn main(args: &[String]) -> i32 {
    run(args).unwrap_or_else(|f| f.report())
}

fn run(args: &[String]) -> Result<i32, Failure> {
    let mut args = args.to_vec();
    let first = args.first().map(String::as_str).unwrap_or_default();
    if matches!(first, "" | "help" | "--help" | "-h") {
        let code = if first.is_empty() { EXIT_USAGE } else { 0 };
        crate::cli::print(&usage(args.get(1).map(String::as_str)));
        return Ok(code);
    }
    // The old order, object before command, is still taken.
    if verb_named(first).is_none() && args.get(1).is_some_and(|second| verb_named(second).is_some()) {
        args.swap(0, 1);
    }
    let name = args.first().cloned().unwrap_or_default();
    let Some(verb) = verb_named(&name) else {
        if let Some(known) = NOT_YET.iter().find(|v| **v == name) {
            return Err(unsupported(known));
        }
        let names = VERBS.iter().map(|v| v.name);
        return Err(Failure::new(
            EXIT_USAGE,
            format!("drbdsetup: Unknown command '{name}'.{}", suggestion(&name, names)),
        ));
    };
    let rest = args.get(1..).unwrap_or_default();
    let scanned = scan(rest, &verb.accepts).map_err(|e| Failure::new(EXIT_USAGE, e))?;
    check_words(verb, &scanned.words)?;
    (verb.run)(&Call { args: &args, scanned })
}

/// Verbs of the reference that no engine of ours has.
const NOT_YET: &[&str] = &["rename-resource", "xml-help", "udev"];

fn verb_named(name: &str) -> Option<&'static Verb> {
    VERBS.iter().find(|v| v.name == name)
}

fn check_words(verb: &Verb, words: &[String]) -> Result<(), Failure> {
    let needed = verb.words.iter().filter(|w| !w.starts_with('[')).count();
    if let Some(missing) = verb.words.get(words.len()).filter(|_| words.len() < needed) {
        return Err(Failure::new(
            EXIT_USAGE,
            format!("Missing argument '{missing}'\n{}", usage(Some(verb.name))),
        ));
    }
    match words.get(verb.words.len()..) {
        Some(excess) if !excess.is_empty() => {
            Err(Failure::new(EXIT_USAGE, format!("Excess arguments: {}", excess.join(" "))))
        }
        _ => Ok(()),
    }
}

fn usage(verb: Option<&str>) -> String {
    let Some(verb) = verb.and_then(verb_named) else {
        let mut text = String::from("USAGE: drbdsetup COMMAND ARGUMENTS [OPTIONS]\n\nCommands:\n");
        for verb in VERBS {
            text.push_str(&format!("  {} {}\n", verb.name, verb.words.join(" ")));
        }
        text.push_str("\nUse 'drbdsetup help COMMAND' for the options of a command.\n");
        return text;
    };
    let mut text = format!("USAGE: drbdsetup {} {} [OPTIONS]\n", verb.name, verb.words.join(" "));
    let options = verb
        .accepts
        .flags
        .iter()
        .map(|(n, _)| *n)
        .chain(verb.accepts.classes.iter().flat_map(|c| palisade_conf::options::of(*c)).map(|s| s.name));
    for name in options.filter(|n| !n.starts_with('_')) {
        text.push_str(&format!("  --{name}\n"));
    }
    text
}

/// The refusal of a verb no engine of ours has.
pub fn unsupported(verb: &str) -> Failure {
    Failure::new(EXIT_USAGE, format!("not supported by the bundled engine yet: {verb}"))
}

/// Runs the reference's `drbdsetup` for the kernel with the same arguments.
pub fn hand_over(kernel: &Kernel, args: &[String]) -> Result<i32, Failure> {
    let tool = kernel.drbdsetup();
    let status = Process::new(tool)
        .args(args)
        .env(NESTED_ENV, "1")
        .stdin(Stdio::inherit())
        .status()
        .map_err(|e| Failure::new(EXIT_USAGE, format!("Cannot run {}: {e}.", tool.display())))?;
    Ok(status.code().unwrap_or(EXIT_USAGE))
}

/// Sends a command to the engine of `resource` and prints the outcome about `object`.
pub fn order(resource: &str, object: &str, command: &Command) -> Result<i32, Failure> {
    ask(resource, object, command).map(|_| 0)
}

/// As [`order`], but gives the payload.
pub fn ask(resource: &str, object: &str, command: &Command) -> Result<Payload, Failure> {
    let give_up = Instant::now() + RETRY_TOTAL;
    let mut pause = RETRY_FIRST;
    loop {
        let ends = matches!(command, Command::Down | Command::DelResource);
        let send = if ends { engines::end } else { engines::call };
        let reply = match send(resource, command.clone()) {
            Ok(reply) => reply,
            Err(ClientError::NotRunning { .. }) => {
                let refusal = Refusal::new(palisade_control::code::RES_NOT_KNOWN);
                return Err(Failure::new(refusal.exit_code(), refusal.render(object)));
            }
            Err(e) => return Err(Failure::new(EXIT_USAGE, format!("{e}."))),
        };
        match reply {
            Reply::Ok { payload, warnings } => {
                if !warnings.is_empty() {
                    eprintln!("warnings from kernel:");
                    warnings.iter().for_each(|w| eprintln!("{w}"));
                }
                return Ok(payload);
            }
            Reply::Refused(r)
                if r.code == palisade_control::code::IN_TRANSIENT_STATE && Instant::now() < give_up =>
            {
                std::thread::sleep(pause);
                pause = (pause * 2).min(RETRY_LONGEST);
            }
            Reply::Refused(refusal) => {
                return Err(Failure::new(refusal.exit_code(), refusal.render(object)));
            }
            Reply::Unsupported { verb } => return Err(unsupported(&verb)),
        }
    }
}

/// The resource that has a minor, or the refusal of the reference.
pub fn resource_of_minor(minor: u32) -> Result<(String, u16), Failure> {
    engines::owner_of_minor(minor)?.ok_or_else(|| {
        let refusal = Refusal::new(palisade_control::code::MINOR_INVALID);
        Failure::new(refusal.exit_code(), refusal.render(&minor.to_string()))
    })
}

/// State of the own disk of a minor of ours.
pub fn own_dstate(minor: u32) -> Result<String, Failure> {
    Ok(query::dstate_of(minor)?.split('/').next().unwrap_or_default().to_owned())
}
