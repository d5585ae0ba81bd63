//! The kernel's DRBD, driven through the installed `drbdsetup` and `drbdadm`.
//!
//! The reference's names may also be links to our own program: a tool that is ours is never run
//! from here, so that nothing calls itself in a circle.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::ResourceStatus;
use crate::kernel_text::parse_status_text;

/// Set for every tool started here; our own multicall program refuses to act as a kernel tool when
/// it sees it.
pub const NESTED_ENV: &str = "PALISADE_KERNEL_TOOL";

const OUTPUT_BYTES_MAX: u64 = 16 << 20;
const SEARCH_ALSO: &[&str] = &["/usr/sbin", "/sbin", "/usr/bin"];

/// Why the kernel could not be asked.
#[derive(Debug, Error)]
pub enum KernelError {
    /// No usable tool is installed.
    #[error("no '{tool}' of drbd-utils found in PATH; install drbd-utils to drive the kernel's DRBD")]
    NoTool {
        /// Its name.
        tool: &'static str,
    },
    /// The tool did not start.
    #[error("cannot run {}: {source}", path.display())]
    Spawn {
        /// The tool.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The tool did not end in time and was killed.
    #[error("'{command}' did not end within {} ms and was killed", limit.as_millis())]
    Timeout {
        /// What was run.
        command: String,
        /// How long was waited.
        limit: Duration,
    },
    /// The tool failed.
    #[error("'{command}' failed with exit code {code}: {stderr}")]
    Failed {
        /// What was run.
        command: String,
        /// Exit code, or 128 plus the signal.
        code: i32,
        /// What it said.
        stderr: String,
    },
    /// The output is not understood.
    #[error("cannot understand the output of '{command}': {what}")]
    Output {
        /// What was run.
        command: String,
        /// What is wrong with it.
        what: String,
    },
}

/// What a tool left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolOutput {
    /// Exit code, or 128 plus the signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// The kernel's engine.
#[derive(Debug, Clone)]
pub struct Kernel {
    drbdsetup: PathBuf,
    drbdadm: Option<PathBuf>,
    version_file: PathBuf,
}

impl Kernel {
    /// Whether the module is loaded.
    #[must_use]
    pub fn loaded() -> bool {
        Path::new("/proc/drbd").exists() || Path::new("/sys/module/drbd").exists()
    }

    /// The installed tools.
    ///
    /// # Errors
    /// If there is no `drbdsetup` that is not ours.
    pub fn find() -> Result<Self, KernelError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        Self::find_in(std::env::split_paths(&path).chain(SEARCH_ALSO.iter().map(PathBuf::from)))
    }

    /// The tools in these directories, first match.
    ///
    /// # Errors
    /// If there is no `drbdsetup` that is not ours.
    pub fn find_in(directories: impl Iterator<Item = PathBuf>) -> Result<Self, KernelError> {
        let directories: Vec<PathBuf> = directories.collect();
        let tool = |name: &str| directories.iter().map(|d| d.join(name)).find(|p| is_foreign_tool(p));
        let drbdsetup = tool("drbdsetup").ok_or(KernelError::NoTool { tool: "drbdsetup" })?;
        Ok(Self { drbdsetup, drbdadm: tool("drbdadm"), version_file: PathBuf::from("/proc/drbd") })
    }

    /// The same tools, but the module's version is read from `path` instead of `/proc/drbd`.
    #[must_use]
    pub fn with_version_file(mut self, path: PathBuf) -> Self {
        self.version_file = path;
        self
    }

    /// Path of the reference's `drbdadm`.
    ///
    /// # Errors
    /// If none is installed.
    pub fn drbdadm(&self) -> Result<&Path, KernelError> {
        self.drbdadm.as_deref().ok_or(KernelError::NoTool { tool: "drbdadm" })
    }

    /// Path of the reference's `drbdsetup`.
    #[must_use]
    pub fn drbdsetup(&self) -> &Path {
        &self.drbdsetup
    }

    /// State of one resource (an empty list if the kernel does not know it) or of all.
    ///
    /// # Errors
    /// If the tool fails or says something that is not understood.
    pub fn status(
        &self,
        resource: Option<&str>,
        limit: Duration,
    ) -> Result<Vec<ResourceStatus>, KernelError> {
        let old = self.is_84();
        let mut args = vec!["status"];
        args.extend(resource);
        args.extend(if old { &["--verbose", "--statistics"][..] } else { &["--json"] });
        let out = run_tool(&self.drbdsetup, &args, Nested::Yes, limit)?;
        let command = || command_line(&self.drbdsetup, &args);
        if out.code == 10 && resource.is_some() {
            return Ok(Vec::new());
        }
        if out.code != 0 {
            return Err(KernelError::Failed {
                command: command(),
                code: out.code,
                stderr: out.stderr.trim().to_owned(),
            });
        }
        let mut all = if old {
            parse_status_text(&out.stdout).map_err(|what| KernelError::Output { command: command(), what })?
        } else {
            serde_json::from_str::<Vec<ResourceStatus>>(&out.stdout)
                .map_err(|e| KernelError::Output { command: command(), what: e.to_string() })?
        };
        for resource in &mut all {
            resource.sort();
        }
        Ok(all)
    }

    /// Runs `drbdsetup` with these arguments.
    ///
    /// # Errors
    /// If it does not start or end. A non-zero exit code is no error here.
    pub fn run_drbdsetup<S: AsRef<OsStr>>(
        &self,
        args: &[S],
        limit: Duration,
    ) -> Result<ToolOutput, KernelError> {
        run_tool(&self.drbdsetup, args, Nested::Yes, limit)
    }

    /// Runs `drbdadm` with these arguments.
    ///
    /// # Errors
    /// If none is installed, or it does not start or end. A non-zero exit code is no error here.
    pub fn run_drbdadm<S: AsRef<OsStr>>(
        &self,
        args: &[S],
        limit: Duration,
    ) -> Result<ToolOutput, KernelError> {
        run_tool(self.drbdadm()?, args, Nested::Yes, limit)
    }

    /// Whether the loaded module is an 8.x one, whose `drbdsetup` has no `--json`.
    fn is_84(&self) -> bool {
        std::fs::read_to_string(&self.version_file)
            .ok()
            .and_then(|t| t.lines().next().map(|l| l.trim_start_matches("version:").trim().starts_with("8.")))
            .unwrap_or(false)
    }
}

/// Whether that file can be run and is not our own program, directly or through links.
fn is_foreign_tool(path: &Path) -> bool {
    let Ok(real) = path.canonicalize() else { return false };
    let Ok(meta) = real.metadata() else { return false };
    if !meta.is_file() || meta.mode() & 0o111 == 0 {
        return false;
    }
    if real.file_name().is_some_and(|n| n.to_string_lossy().starts_with("palisade")) {
        return false;
    }
    let own = std::env::current_exe().and_then(std::fs::metadata);
    !own.is_ok_and(|own| own.dev() == meta.dev() && own.ino() == meta.ino())
}

fn command_line<S: AsRef<OsStr>>(tool: &Path, args: &[S]) -> String {
    let mut line = tool.file_name().unwrap_or(tool.as_os_str()).to_string_lossy().into_owned();
    for arg in args {
        line.push(' ');
        line.push_str(&arg.as_ref().to_string_lossy());
    }
    line
}

/// Whether [`NESTED_ENV`] is set for a tool.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nested {
    Yes,
    No,
}

/// Runs a tool with empty input, collects its output, kills it at the limit.
pub(crate) fn run_tool<S: AsRef<OsStr>>(
    tool: &Path,
    args: &[S],
    nested: Nested,
    limit: Duration,
) -> Result<ToolOutput, KernelError> {
    let deadline = Instant::now() + limit;
    let mut command = Command::new(tool);
    if nested == Nested::Yes {
        command.env(NESTED_ENV, "1");
    }
    let mut child = command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| KernelError::Spawn { path: tool.to_owned(), source })?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let timeout = |mut child: Child| {
        let _ = child.kill();
        let _ = child.wait();
        KernelError::Timeout { command: command_line(tool, args), limit }
    };
    let left = || deadline.saturating_duration_since(Instant::now());
    let Ok(stdout) = stdout.recv_timeout(left()) else { return Err(timeout(child)) };
    let Ok(stderr) = stderr.recv_timeout(left()) else { return Err(timeout(child)) };
    // Both pipes are closed, so the child is about to end.
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if left().is_zero() => return Err(timeout(child)),
            Ok(None) => std::thread::sleep(Duration::from_millis(2)),
            Err(source) => return Err(KernelError::Spawn { path: tool.to_owned(), source }),
        }
    };
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    let code = status.code().unwrap_or_else(|| 128 + signal.unwrap_or(0));
    Ok(ToolOutput { code, stdout, stderr })
}

fn collect<R: Read + Send + 'static>(pipe: Option<R>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            // A tool that says more than this is cut; parsing then reports it.
            let _ = pipe.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes);
        }
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn script(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn our_own_program_is_never_taken_for_the_reference() {
        let dir = tempfile::tempdir().unwrap();
        script(dir.path(), "palisade", "exit 0");
        let ours = dir.path().join("ours");
        std::fs::create_dir(&ours).unwrap();
        symlink(dir.path().join("palisade"), ours.join("drbdsetup")).unwrap();
        assert!(matches!(Kernel::find_in([ours.clone()].into_iter()), Err(KernelError::NoTool { .. })));
        // Under its own inode too, whatever it is called.
        let copy = dir.path().join("copy");
        std::fs::create_dir(&copy).unwrap();
        symlink(std::env::current_exe().unwrap(), copy.join("drbdsetup")).unwrap();
        assert!(Kernel::find_in([copy.clone()].into_iter()).is_err());
        let real = dir.path().join("real");
        std::fs::create_dir(&real).unwrap();
        let tool = script(&real, "drbdsetup", "exit 0");
        let found = Kernel::find_in([ours, copy, real].into_iter()).unwrap();
        assert_eq!(found.drbdsetup(), tool);
        assert!(matches!(found.drbdadm(), Err(KernelError::NoTool { tool: "drbdadm" })));
    }

    #[test]
    fn tools_get_the_mark_and_their_outcome_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        script(dir.path(), "drbdsetup", "echo \"$PALISADE_KERNEL_TOOL $*\"; echo oops >&2; exit 17");
        let kernel = Kernel::find_in(std::iter::once(dir.path().to_owned())).unwrap();
        let out = kernel.run_drbdsetup(&["primary", "r0"], LIMIT).unwrap();
        assert_eq!((out.code, out.stdout.as_str(), out.stderr.as_str()), (17, "1 primary r0\n", "oops\n"));
    }

    #[test]
    fn a_tool_that_hangs_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        script(dir.path(), "drbdsetup", "exec sleep 60");
        let kernel = Kernel::find_in(std::iter::once(dir.path().to_owned())).unwrap();
        let start = Instant::now();
        let error = kernel.run_drbdsetup(&["status"], Duration::from_millis(100)).unwrap_err();
        assert!(matches!(error, KernelError::Timeout { .. }), "{error}");
        assert!(start.elapsed() < LIMIT);
    }

    #[test]
    fn status_of_the_newer_module_is_json_and_unknown_resources_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let text = include_str!("../tests/data/status-9.2.18.json");
        std::fs::write(dir.path().join("json"), text).unwrap();
        let here = dir.path().display();
        script(
            dir.path(),
            "drbdsetup",
            &format!(
                "case \"$*\" in 'status r0 --json') cat {here}/json;; *) printf '[\\n]\\n'; exit 10;; esac"
            ),
        );
        let kernel = Kernel::find_in(std::iter::once(dir.path().to_owned()))
            .unwrap()
            .with_version_file(dir.path().join("none"));
        assert_eq!(kernel.status(Some("r0"), LIMIT).unwrap()[0].name, "r0");
        assert!(kernel.status(Some("r1"), LIMIT).unwrap().is_empty());
        assert!(matches!(kernel.status(None, LIMIT), Err(KernelError::Failed { code: 10, .. })));
    }
}
