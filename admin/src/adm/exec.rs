//! Runs or prints planned lines. What is printed is what would run: nothing is added or left out.

use std::os::unix::process::CommandExt;
use std::process::{Command as Process, Stdio};

use palisade_control::{ClientError, Command, Options, Reply};

use super::EXIT_FATAL;
use super::request::Request;
use crate::cli::{command_line, print};
use crate::{engines, meta, setup};

/// A back-end tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    Drbdsetup,
    Drbdmeta,
    ProxyCtl,
}

impl Tool {
    const fn name(self) -> &'static str {
        match self {
            Self::Drbdsetup => "drbdsetup",
            Self::Drbdmeta => "drbdmeta",
            Self::ProxyCtl => "drbd-proxy-ctl",
        }
    }
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

    pub fn proxy_ctl<S: Into<String>>(args: impl IntoIterator<Item = S>) -> Self {
        Self { tool: Tool::ProxyCtl, args: args.into_iter().map(Into::into).collect() }
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
        self.show_if_asked(resource, line);
        if self.request.dry_run { 0 } else { self.run_unshown(line) }
    }

    /// Prints the line in a dry run and with `-v`.
    pub fn show_if_asked(&self, resource: &str, line: &Line) {
        if self.request.dry_run || self.request.verbose > 0 {
            self.show(resource, &self.text(line));
        }
    }

    /// Runs a line and prints nothing of its own.
    pub fn run_unshown(&self, line: &Line) -> i32 {
        match (self.program(line.tool), line.tool) {
            (Some(program), _) => run_process(program, Process::new(program).args(&line.args)),
            (None, Tool::Drbdsetup) => setup::main(&line.args),
            (None, Tool::Drbdmeta) => meta::main(&line.args),
            (None, Tool::ProxyCtl) => {
                let name = line.tool.name();
                run_process(name, Process::new(name).args(&line.args))
            }
        }
    }

    /// Runs a line whose messages nobody wants.
    pub fn run_silently(&self, line: &Line) -> i32 {
        let process = match self.program(line.tool) {
            Some(program) => {
                let mut process = Process::new(program);
                process.args(&line.args);
                Ok(process)
            }
            None => own_tool(line.tool, &line.args),
        };
        process.map_or(EXIT_FATAL, |mut process| {
            run_process(line.tool.name(), process.stdout(Stdio::null()).stderr(Stdio::null()))
        })
    }

    /// What a program prints; `None` if it cannot be run or fails.
    pub fn output(&self, line: &Line) -> Option<String> {
        let program = self.program(line.tool).unwrap_or(line.tool.name());
        let output = Process::new(program).args(&line.args).stderr(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The program that was given for a tool.
    fn program(&self, tool: Tool) -> Option<&str> {
        match tool {
            Tool::Drbdsetup => self.request.drbdsetup.as_deref(),
            Tool::Drbdmeta => self.request.drbdmeta.as_deref(),
            Tool::ProxyCtl => self.request.proxy_ctl.as_deref(),
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
        let mut words = vec![self.program(line.tool).unwrap_or(line.tool.name()).to_owned()];
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

/// This program as one of its tools. A program that is no part of it is taken from PATH.
pub fn own_tool(tool: Tool, args: &[String]) -> std::io::Result<Process> {
    let mut process = match tool {
        Tool::ProxyCtl => Process::new(tool.name()),
        Tool::Drbdsetup | Tool::Drbdmeta => {
            let mut process = Process::new(std::env::current_exe()?);
            process.arg0(tool.name());
            process
        }
    };
    process.args(args);
    Ok(process)
}

fn run_process(program: &str, process: &mut Process) -> i32 {
    match process.stdin(Stdio::inherit()).status() {
        Ok(status) => status.code().unwrap_or(EXIT_FATAL),
        Err(e) => {
            eprintln!("Cannot run {program}: {e}.");
            EXIT_FATAL
        }
    }
}
