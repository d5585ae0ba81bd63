//! The command line of `drbdadm`: options before and behind the command, words for the back end, objects
//! (`spec/cli.md` §1, §2). It reads no configuration and runs nothing.

use std::collections::VecDeque;

use palisade_conf::options;

use super::verbs::{self, VERBS, Verb};
use super::{EXIT_USAGE, usage};
use crate::cli::{self, Accepts, Failure, Scanned, print, suggestion};

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
    pub proxy_ctl: Option<String>,
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

const OLD_NAMES: &[(&str, &str)] = &[("state", "role"), ("outdate-peer", "fence-peer")];

impl Request {
    /// `None` when there is nothing left to do (help and version).
    pub fn parse(args: &[String]) -> Result<Option<Self>, Failure> {
        let mut request = Self::default();
        let mut rest: VecDeque<String> = args.iter().cloned().collect();
        let mut options_end = false;
        while let Some(arg) = rest.pop_front() {
            if arg == "--" {
                options_end = true;
            } else if options_end || arg.len() < 2 || !arg.starts_with('-') {
                request.word(arg, options_end);
                options_end &= request.verb.is_empty();
            } else if !request.option(arg, &mut rest)? {
                return Ok(None);
            }
        }
        if request.verb == "help" {
            let name = request.objects.first();
            print(&usage::usage(name.and_then(|name| verbs::find(name))));
            return Ok(None);
        }
        let Some(verb) = verbs::find(&request.verb) else {
            if let Some(word) = request.words.first() {
                return Err(unknown_command(word));
            }
            print(&usage::usage(None));
            print("\nNo command specified\n");
            return Err(Failure::new(EXIT_USAGE, ""));
        };
        if !request.config_to_test.is_empty() && !matches!(verb.name, "dump" | "dump-xml" | "sh-nop") {
            return Err(Failure::new(
                EXIT_USAGE,
                "The --config-to-test (-t) option is only allowed with the dump and sh-nop commands",
            ));
        }
        request.back_end_options(verb)?;
        Ok(Some(request))
    }

    /// One option and its value; false if the program has done what it was asked for.
    fn option(&mut self, arg: String, rest: &mut VecDeque<String>) -> Result<bool, Failure> {
        let wrong = |text: String| Failure::new(EXIT_USAGE, text);
        let (name, given) = split_option(&arg);
        let mut value = || {
            given
                .clone()
                .or_else(|| rest.pop_front())
                .ok_or_else(|| wrong(format!("drbdadm: {name} requires a value\ntry 'drbdadm help'")))
        };
        match name.as_str() {
            "-S" | "--stacked" => self.stacked = true,
            // `connect --dry-run` asks the back end to try.
            "-d" | "--dry-run" if name == "-d" || self.verb != "connect" => self.dry_run = true,
            "-v" | "--verbose" => self.verbose += 1,
            "-c" | "--config-file" => self.config_file = Some(value()?),
            "-t" | "--config-to-test" => self.config_to_test.push(value()?),
            "-E" | "--config-to-exclude" => self.config_to_exclude.push(value()?),
            "-s" | "--drbdsetup" => self.drbdsetup = Some(value()?),
            "-m" | "--drbdmeta" => self.drbdmeta = Some(value()?),
            "-p" | "--drbd-proxy-ctl" => self.proxy_ctl = Some(value()?),
            "-n" | "--sh-varname" => self.sh_varname = Some(var_name(value()?)?),
            "-W" | "--setup-option" => self.extra.push(value()?),
            "-h" | "--help" => {
                print(&usage::usage(verbs::find(&self.verb)));
                return Ok(false);
            }
            "-V" | "--version" => {
                print(&usage::version());
                return Ok(false);
            }
            _ if arg.starts_with("--") => self.extra.push(arg),
            _ => return Err(wrong(format!("drbdadm: invalid option '{arg}'\ntry 'drbdadm help'"))),
        }
        Ok(true)
    }

    /// The first word that is a command is the command; what stands before it is for the back end.
    fn word(&mut self, arg: String, after_dashes: bool) {
        if !self.verb.is_empty() {
            self.objects.push(arg);
        } else if arg == "help" || verbs::find(&arg).is_some() {
            self.verb = arg;
        } else if let Some((_, name)) = OLD_NAMES.iter().find(|(old, _)| *old == arg) {
            eprintln!("'drbdadm {arg}' is deprecated, use 'drbdadm {name}' instead.");
            self.verb = (*name).to_owned();
        } else if after_dashes && arg.starts_with("--") {
            self.extra.push(arg);
        } else {
            self.words.push(arg);
        }
    }

    /// Checks the options for the back end against the command.
    fn back_end_options(&mut self, verb: &Verb) -> Result<(), Failure> {
        // Values may be given as a word of their own; then they were taken for objects.
        let mut extra = self.extra.clone();
        for option in &mut extra {
            if !option.contains('=')
                && wants_value(&verb.accepts, option.trim_start_matches("--"))
                && !self.objects.is_empty()
            {
                *option = format!("{option}={}", self.objects.remove(0));
            }
        }
        let fail = |e: String| {
            let Some(option) = e.strip_prefix("unrecognized option '--").and_then(|e| e.split('\'').next())
            else {
                return Failure::new(EXIT_USAGE, format!("drbdadm: {e}"));
            };
            let text = if VERBS.iter().any(|verb| accepts(&verb.accepts, option)) {
                format!("drbdadm: unrecognized option '--{option}'\ntry 'drbdadm help {}'", verb.name)
            } else {
                format!("drbdadm: {}\ntry 'drbdadm help'", e.trim_end_matches('.'))
            };
            Failure::new(EXIT_USAGE, text)
        };
        self.scanned = cli::scan(&extra, &verb.accepts).map_err(fail)?;
        self.extra = extra.into_iter().map(|o| real_name(&o, &verb.accepts)).collect();
        if let (false, Some(word)) = (verb.takes_words, self.words.first()) {
            return Err(Failure::new(
                EXIT_USAGE,
                format!("drbdadm: the {} command takes no word '{word}' for the back end", verb.name),
            ));
        }
        Ok(())
    }
}

pub fn unknown_command(name: &str) -> Failure {
    let hint = suggestion(name, VERBS.iter().map(|v| v.name));
    Failure::new(EXIT_USAGE, format!("drbdadm: Unknown command '{name}'{hint}"))
}

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

fn wants_value(accepts: &Accepts, name: &str) -> bool {
    match accepts.flags.iter().find(|(flag, _)| *flag == name) {
        Some((_, takes)) => *takes == cli::Takes::Value,
        None => {
            let mut specs = accepts.classes.iter().filter_map(|class| options::find_in(*class, name));
            specs.next().is_some_and(|spec| !spec.is_bool())
        }
    }
}

fn real_name(option: &str, accepts: &Accepts) -> String {
    let body = option.trim_start_matches("--");
    let (name, value) = body.split_once('=').map_or((body, None), |(n, v)| (n, Some(v)));
    let name = accepts.aliases.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, real)| *real);
    value.map_or_else(|| format!("--{name}"), |v| format!("--{name}={v}"))
}

fn accepts(accepts: &Accepts, name: &str) -> bool {
    accepts.flags.iter().any(|(n, _)| *n == name)
        || accepts.aliases.iter().any(|(alias, _)| *alias == name)
        || accepts.classes.iter().any(|c| options::find_in(*c, name).is_some())
}
