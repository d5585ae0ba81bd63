//! Runs or prints planned lines.

use std::process::{Command as Process, Stdio};

use palisade_control::{ClientError, Command, Options, Reply};

use super::{EXIT_FATAL, Request};
use crate::cli::{command_line, print};
use crate::{engines, meta, setup};

/// A back-end tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    Drbdsetup,
    Drbdmeta,
}

/// A back-end command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub tool: Tool,
    pub args: Vec<String>,
}

impl Line {
    pub fn setup<S: Into<String>>(args: impl IntoIterator<Item = S>) -> Self {
        Self { tool: Tool::Drbdsetup, args: args.into_iter().map(Into::into).collect() }
    }

    pub fn meta<S: Into<String>>(args: impl IntoIterator<Item = S>) -> Self {
        Self { tool: Tool::Drbdmeta, args: args.into_iter().map(Into::into).collect() }
    }

    /// Adds further arguments.
    pub fn with<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }
}

/// How lines are run.
pub struct Exec<'a> {
    request: &'a Request,
}

impl<'a> Exec<'a> {
    pub fn new(request: &'a Request) -> Self {
        Self { request }
    }

    pub fn dry_run(&self) -> bool {
        self.request.dry_run
    }

    /// Runs a line for a resource; complains about failures and gives the exit status.
    pub fn run(&self, resource: &str, line: &Line) -> i32 {
        let code = self.run_quietly(resource, line);
        if code >= 10 {
            eprintln!("Command '{}' terminated with exit code {code}", self.text(&without_secrets(line)));
        }
        code
    }

    /// As [`Exec::run`] without complaint, where a fall-back follows.
    pub fn run_quietly(&self, resource: &str, line: &Line) -> i32 {
        if self.request.dry_run || self.request.verbose > 0 {
            self.show(resource, &self.text(line));
        }
        if self.request.dry_run {
            return 0;
        }
        let program = match line.tool {
            Tool::Drbdsetup => &self.request.drbdsetup,
            Tool::Drbdmeta => &self.request.drbdmeta,
        };
        match (program, line.tool) {
            (Some(program), _) => spawn(program, &line.args),
            (None, Tool::Drbdsetup) => setup::main(&line.args),
            (None, Tool::Drbdmeta) => meta::main(&line.args),
        }
    }

    /// Prints a line of a dry run, and its variable with `-n`.
    pub fn show(&self, resource: &str, text: &str) {
        if let Some(name) = &self.request.sh_varname {
            print(&format!("{name}={resource}\n"));
        }
        print(&format!("{text}\n"));
    }

    /// Tells the engine what to run on events. This has no line: the kernel calls `drbdadm` instead.
    pub fn tell_handlers(&self, resource: &str, command: Command) -> i32 {
        if self.request.dry_run {
            return 0;
        }
        match engines::call(resource, command) {
            Ok(Reply::Ok { .. }) => 0,
            Ok(Reply::Refused(refusal)) => {
                eprint!("{}", refusal.render(resource));
                refusal.exit_code()
            }
            Ok(Reply::Unsupported { verb }) => setup::unsupported(&verb).report(),
            Err(ClientError::NotRunning { .. }) => 0,
            Err(e) => {
                eprintln!("{e}.");
                EXIT_FATAL
            }
        }
    }

    fn text(&self, line: &Line) -> String {
        let (given, name) = match line.tool {
            Tool::Drbdsetup => (&self.request.drbdsetup, "drbdsetup"),
            Tool::Drbdmeta => (&self.request.drbdmeta, "drbdmeta"),
        };
        let mut words = vec![given.clone().unwrap_or_else(|| name.to_owned())];
        words.extend(line.args.iter().cloned());
        command_line(&words)
    }
}

/// What ends up in logs.
fn without_secrets(line: &Line) -> Line {
    let hide = |word: &String| match word.split_once('=') {
        Some((name, _)) if Options::is_secret(name.trim_start_matches("--")) => format!("{name}=(hidden)"),
        _ => word.clone(),
    };
    Line { tool: line.tool, args: line.args.iter().map(hide).collect() }
}

fn spawn(program: &str, args: &[String]) -> i32 {
    match Process::new(program).args(args).stdin(Stdio::inherit()).status() {
        Ok(status) => status.code().unwrap_or(EXIT_FATAL),
        Err(e) => {
            eprintln!("Cannot run {program}: {e}.");
            EXIT_FATAL
        }
    }
}
