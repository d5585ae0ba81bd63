//! What the agent asks of the replication, whichever engine serves the resource.
//!
//! States come as structs from `palisade-control`. Changes go through `drbdadm`, since only that reads the
//! configuration: the one of the `palisade` program that was installed with this agent, else the one of
//! drbd-utils.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use palisade_cluster::child::{self, ChildError, Output};
use palisade_control::{Backend, BackendError, ClientError, Engine, Kernel, ResourceStatus, Settings};

use super::parameters::Version;

/// A change of the resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change<'a> {
    /// Create, attach and connect everything that is configured.
    Up,
    /// Bring everything to what is configured; also from nothing.
    Adjust,
    /// As `Adjust`, but leave the network alone.
    AdjustDisks,
    /// Become Primary.
    Primary,
    /// Become Secondary.
    Secondary,
    /// Remove everything that is configured.
    Down,
    /// Remove everything that runs, whatever the configuration says.
    DownRunning,
    /// Mark the local data as outdated.
    Outdate,
    /// Run the unfence handler with these additional arguments.
    Unfence(&'a str),
}

/// Why a change or a question failed.
#[derive(Debug, thiserror::Error)]
pub enum ReplicatorError {
    /// Neither engine's tools are installed.
    #[error(
        "Neither palisade nor drbdadm was found beside the agent, in $PATH or in the system's sbin directories; \
         install palisade or drbd-utils."
    )]
    NoTools,
    /// A tool could not be run or took too long.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// Promotion was refused: this node has no access to UpToDate data.
    #[error("{command}: no access to UpToDate data: {message}")]
    NoUpToDateData {
        /// Program and arguments.
        command: String,
        /// Its standard error on one line.
        message: String,
    },
    /// A tool refused.
    #[error("{command} ended with exit code {code}: {message}")]
    Refused {
        /// Program and arguments.
        command: String,
        /// Its exit code.
        code: i32,
        /// Its standard error on one line.
        message: String,
    },
    /// The state could not be found out.
    #[error("The state of the resource could not be read: {0}")]
    State(#[from] BackendError),
}

impl ReplicatorError {
    /// The configuration is sound but has no such resource for this host.
    pub const fn not_defined(&self) -> bool {
        matches!(self, Self::Refused { code: NOT_DEFINED, .. })
    }
}

/// What the agent needs to know of the resource's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Configuration {
    /// `allow-two-primaries` is set.
    pub two_primaries: bool,
}

/// One resource and its engine. Every call ends within the limit it is given.
pub trait Replicator {
    /// The state; `None` if the resource does not run.
    fn status(&self, limit: Duration) -> Result<Option<ResourceStatus>, ReplicatorError>;

    /// Carries out a change and returns when it is done or refused.
    fn change(&self, change: Change<'_>, limit: Duration) -> Result<(), ReplicatorError>;

    /// Reads the configuration; an error if it is broken or does not have the resource for this host.
    fn configuration(&self, limit: Duration) -> Result<Configuration, ReplicatorError>;

    /// Version of the engine, if there is one.
    fn version(&self, limit: Duration) -> Result<Option<Version>, ReplicatorError>;

    /// Whether the engine came with this agent, so that there is nothing to install or load.
    fn bundled(&self) -> bool;
}

/// Exit code of `primary` when there is no UpToDate data (`spec/cli.md` §16).
const NO_UP_TO_DATE_DATA: i32 = 17;

/// `drbdadm` and `drbdsetup` of drbd-utils.
#[derive(Debug)]
struct DrbdUtils {
    drbdadm: PathBuf,
    drbdsetup: PathBuf,
}

/// Exit code of `drbdadm` for a resource that the configuration does not have for this host; a broken
/// configuration gives 10 (`spec/drbd-conf.md` §9).
const NOT_DEFINED: i32 = 1;

/// The installed tools, of either engine.
#[derive(Debug)]
pub struct Tools {
    resource: String,
    config: String,
    palisade: Option<PathBuf>,
    drbd_utils: Option<DrbdUtils>,
    /// The kernel serves the resource: so it was set up, or so it was seen.
    kernel: Cell<bool>,
    /// The resource is the upper layer of a stack, and its tool wants to be told (`spec/ocf-agents.md` §2.8).
    stacked: Cell<bool>,
}

impl Tools {
    /// Finds the tools for a resource.
    pub fn find(resource: &str, config: &str) -> Self {
        let palisade = std::env::var("PALISADE_ADMIN")
            .ok()
            .and_then(|path| child::find_program_in(&path, []))
            .or_else(|| std::env::current_exe().ok().and_then(|agent| beside(&agent)))
            .or_else(|| child::find_program("palisade"));
        let drbd_utils = Kernel::find().ok().and_then(|kernel| {
            let drbdadm = kernel.drbdadm().ok()?.to_owned();
            Some(DrbdUtils { drbdadm, drbdsetup: kernel.drbdsetup().to_owned() })
        });
        // Settings that cannot be read are reported by the first question for the state.
        let engine = Settings::load().ok().and_then(|settings| settings.engine_of(resource));
        Self {
            resource: resource.to_owned(),
            config: config.to_owned(),
            palisade,
            drbd_utils,
            kernel: Cell::new(engine == Some(Engine::Kernel)),
            stacked: Cell::new(false),
        }
    }

    fn drbdadm(
        &self,
        args: &[&str],
        env: &[(&str, &str)],
        limit: Duration,
    ) -> Result<Output, ReplicatorError> {
        let mut all = vec!["-c", &self.config];
        if self.stacked.get() {
            all.push("--stacked");
        }
        all.extend_from_slice(args);
        self.run("drbdadm", &all, env, limit)
    }

    fn run(
        &self,
        tool: &'static str,
        args: &[&str],
        env: &[(&str, &str)],
        limit: Duration,
    ) -> Result<Output, ReplicatorError> {
        let (program, args) = match (&self.palisade, &self.drbd_utils) {
            (Some(palisade), _) if self.bundled() => (palisade, [&[tool], args].concat()),
            (_, Some(utils)) if tool == "drbdsetup" => (&utils.drbdsetup, args.to_vec()),
            (_, Some(utils)) => (&utils.drbdadm, args.to_vec()),
            (_, None) => return Err(ReplicatorError::NoTools),
        };
        tracing::debug!("Calling {} {}", program.display(), args.join(" "));
        let output = child::run(program, &args, env, limit)?;
        if output.success() {
            return Ok(output);
        }
        let command = format!("{tool} {}", args.join(" "));
        let message = output.stderr.split_whitespace().collect::<Vec<_>>().join(" ");
        Err(match output.code {
            NO_UP_TO_DATE_DATA => ReplicatorError::NoUpToDateData { command, message },
            code => ReplicatorError::Refused { command, code, message },
        })
    }

    /// Runs a command of drbdadm on the resource; if that knows the resource as a stacked one only, again
    /// with `--stacked`, and so from then on.
    fn on_resource(
        &self,
        command: &[&str],
        env: &[(&str, &str)],
        limit: Duration,
    ) -> Result<Output, ReplicatorError> {
        let args = [command, &[self.resource.as_str()]].concat();
        let plain = self.drbdadm(&args, env, limit);
        let not_defined = plain.as_ref().is_err_and(ReplicatorError::not_defined);
        if !not_defined || self.stacked.get() || self.bundled() {
            return plain;
        }
        self.stacked.set(true);
        if self.drbdadm(&["sh-dev", &self.resource], &[], limit).is_err() {
            self.stacked.set(false);
            return plain;
        }
        self.drbdadm(&args, env, limit)
    }
}

impl Replicator for Tools {
    fn status(&self, limit: Duration) -> Result<Option<ResourceStatus>, ReplicatorError> {
        let backend = Backend::of(&self.resource, limit)?;
        if matches!(backend, Backend::Kernel(_)) {
            self.kernel.set(true);
        }
        match backend.status(&self.resource, limit) {
            // The bundled engine cannot have a resource of such a name, so it does not run there.
            Err(BackendError::Client(ClientError::BadName { .. })) => Ok(None),
            state => Ok(state?),
        }
    }

    fn change(&self, change: Change<'_>, limit: Duration) -> Result<(), ReplicatorError> {
        let words: &[&str] = match change {
            Change::Up => &["up"],
            Change::Adjust => &["adjust"],
            Change::AdjustDisks => &["adjust", "--skip-net"],
            Change::Primary => &["primary"],
            Change::Secondary => &["secondary"],
            Change::Down => &["down"],
            Change::Outdate => &["outdate"],
            Change::DownRunning => {
                return self.run("drbdsetup", &["down", &self.resource], &[], limit).map(drop);
            }
            Change::Unfence(arguments) => {
                let env = [("OCF_RESKEY_unfence_extra_args", arguments)];
                return self.on_resource(&["unfence-peer"], &env, limit).map(drop);
            }
        };
        self.on_resource(words, &[], limit).map(drop)
    }

    fn configuration(&self, limit: Duration) -> Result<Configuration, ReplicatorError> {
        let dump = self.on_resource(&["dump"], &[], limit)?;
        Ok(Configuration { two_primaries: two_primaries(&dump.stdout) })
    }

    fn version(&self, limit: Duration) -> Result<Option<Version>, ReplicatorError> {
        let output = self.run("drbdadm", &["--version"], &[], limit)?;
        if let Some(version) = version_code(&output.stdout) {
            return Ok(Some(version));
        }
        // The module may be installed and not loaded yet.
        let Some(modinfo) = child::find_program("modinfo") else { return Ok(None) };
        let output = child::run(&modinfo, &["-F", "version", "drbd"], &[], limit)?;
        Ok(Version::parse(output.stdout.trim()))
    }

    fn bundled(&self) -> bool {
        self.palisade.is_some() && !self.kernel.get()
    }
}

/// The `palisade` program of the installation that an agent belongs to: `PREFIX/sbin/palisade` for an agent
/// below `PREFIX/lib`, or one in the agent's own directory.
fn beside(agent: &Path) -> Option<PathBuf> {
    let agent = agent.canonicalize().ok()?;
    let own = agent.parent()?.join("palisade");
    let installed = agent
        .ancestors()
        .skip(1)
        .filter(|directory| directory.file_name().is_some_and(|name| name == "lib" || name == "libexec"))
        .filter_map(Path::parent)
        .map(|prefix| prefix.join("sbin/palisade"));
    installed
        .chain([own])
        .filter_map(|path| path.to_str().map(str::to_owned))
        .find_map(|path| child::find_program_in(&path, []))
}

/// Whether a dumped resource allows two Primaries: a bare `allow-two-primaries;` or one with `yes`.
fn two_primaries(dump: &str) -> bool {
    dump.lines().any(|line| {
        let mut words = line.trim().trim_end_matches(';').split_ascii_whitespace();
        words.next() == Some("allow-two-primaries") && matches!(words.next(), None | Some("yes"))
    })
}

/// The kernel's version in the shell assignments of `drbdadm --version` (`spec/cli.md` §2).
fn version_code(assignments: &str) -> Option<Version> {
    let code = assignments.lines().find_map(|line| line.strip_prefix("DRBD_KERNEL_VERSION_CODE=0x"))?;
    u32::from_str_radix(code.trim(), 16).ok().and_then(Version::from_code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn executable(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn palisade_is_found_from_the_agents_place() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let agent = root.join("usr/lib/ocf/resource.d/palisade/drbd");
        let handler = root.join("usr/lib/palisade/palisade-agents");
        executable(&agent, "");
        executable(&handler, "");
        assert_eq!(beside(&agent), None);
        let palisade = root.join("usr/sbin/palisade");
        executable(&palisade, "");
        assert_eq!(beside(&agent), Some(palisade.clone()));
        assert_eq!(beside(&handler), Some(palisade.clone()));
        let link = root.join("elsewhere");
        std::os::unix::fs::symlink(&agent, &link).unwrap();
        assert_eq!(beside(&link), Some(palisade));
        let built = root.join("target/debug/palisade-agents");
        executable(&built, "");
        executable(&built.with_file_name("palisade"), "");
        assert_eq!(beside(&built), Some(built.with_file_name("palisade")));
    }

    fn tools(root: &Path, palisade: bool, script: &str) -> Tools {
        let path = |name: &str| root.join(name);
        for name in ["palisade", "drbdadm", "drbdsetup"] {
            executable(
                &path(name),
                &format!("#!/bin/sh\necho \"$(basename $0) $*\" >>{}/calls\n{script}", root.display()),
            );
        }
        Tools {
            resource: "r0".into(),
            config: "/etc/drbd.conf".into(),
            palisade: palisade.then(|| path("palisade")),
            drbd_utils: Some(DrbdUtils { drbdadm: path("drbdadm"), drbdsetup: path("drbdsetup") }),
            kernel: Cell::new(false),
            stacked: Cell::new(false),
        }
    }

    fn calls(root: &Path) -> String {
        std::fs::read_to_string(root.join("calls")).unwrap()
    }

    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn changes_are_the_verbs_of_drbdadm() {
        let root = tempfile::tempdir().unwrap();
        let tools = tools(
            root.path(),
            true,
            "[ \"$4\" != unfence-peer ] || echo \"$OCF_RESKEY_unfence_extra_args\" >>$(dirname $0)/calls",
        );
        for change in [
            Change::Up,
            Change::Adjust,
            Change::AdjustDisks,
            Change::Primary,
            Change::Secondary,
            Change::Down,
            Change::DownRunning,
            Change::Outdate,
            Change::Unfence("--quiet"),
        ] {
            tools.change(change, LIMIT).unwrap();
        }
        let c = "palisade drbdadm -c /etc/drbd.conf";
        let expected = format!(
            "{c} up r0\n{c} adjust r0\n{c} adjust --skip-net r0\n{c} primary r0\n{c} secondary r0\n{c} down r0\n\
             palisade drbdsetup down r0\n{c} outdate r0\n{c} unfence-peer r0\n--quiet\n"
        );
        assert_eq!(calls(root.path()), expected);
    }

    #[test]
    fn without_palisade_the_installed_tools_are_used() {
        let root = tempfile::tempdir().unwrap();
        let tools = tools(root.path(), false, "");
        tools.change(Change::Up, LIMIT).unwrap();
        tools.change(Change::DownRunning, LIMIT).unwrap();
        assert_eq!(calls(root.path()), "drbdadm -c /etc/drbd.conf up r0\ndrbdsetup down r0\n");
    }

    #[test]
    fn a_resource_of_the_kernel_is_driven_by_its_tools() {
        let root = tempfile::tempdir().unwrap();
        let tools = tools(root.path(), true, "");
        assert!(tools.bundled());
        tools.kernel.set(true);
        assert!(!tools.bundled());
        tools.change(Change::Primary, LIMIT).unwrap();
        assert_eq!(calls(root.path()), "drbdadm -c /etc/drbd.conf primary r0\n");
    }

    #[test]
    fn exit_code_17_is_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let refused = tools(root.path(), true, "exit 17").change(Change::Primary, LIMIT);
        assert!(matches!(refused, Err(ReplicatorError::NoUpToDateData { .. })));
        let refused = tools(root.path(), true, "echo 'no\nway' >&2; exit 11").change(Change::Primary, LIMIT);
        let text = refused.unwrap_err().to_string();
        assert!(text.ends_with("primary r0 ended with exit code 11: no way"), "{text}");
    }

    #[test]
    fn a_stacked_resource_is_found_out_once() {
        let root = tempfile::tempdir().unwrap();
        let tools = tools(root.path(), false, "[ \"$3\" = --stacked ] || exit 1");
        tools.change(Change::Up, LIMIT).unwrap();
        tools.change(Change::Primary, LIMIT).unwrap();
        let c = "drbdadm -c /etc/drbd.conf";
        let expected =
            format!("{c} up r0\n{c} --stacked sh-dev r0\n{c} --stacked up r0\n{c} --stacked primary r0\n");
        assert_eq!(calls(root.path()), expected);
    }

    #[test]
    fn a_resource_that_is_not_stacked_either_fails_plainly() {
        let root = tempfile::tempdir().unwrap();
        let tools = tools(root.path(), false, "exit 1");
        assert!(tools.configuration(LIMIT).unwrap_err().not_defined());
        assert!(!tools.stacked.get());
    }

    #[test]
    fn a_broken_configuration_is_not_a_missing_resource() {
        let root = tempfile::tempdir().unwrap();
        let tools = tools(root.path(), false, "exit 10");
        assert!(!tools.configuration(LIMIT).unwrap_err().not_defined());
        assert_eq!(calls(root.path()).lines().count(), 1);
    }

    #[test]
    fn no_tools_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let mut tools = tools(root.path(), false, "");
        tools.drbd_utils = None;
        assert!(matches!(tools.change(Change::Up, LIMIT), Err(ReplicatorError::NoTools)));
    }

    #[test]
    fn two_primaries_bare_or_yes() {
        assert!(two_primaries("net {\n    allow-two-primaries;\n}"));
        assert!(two_primaries("net {\n    allow-two-primaries yes;\n}"));
        assert!(!two_primaries("net {\n    allow-two-primaries no;\n}"));
        assert!(!two_primaries("# allow-two-primaries\n"));
    }

    #[test]
    fn version_of_the_kernel() {
        let text = "DRBDADM_API_VERSION=2\nDRBD_KERNEL_VERSION_CODE=0x090212\nDRBD_KERNEL_VERSION=9.2.18\n";
        assert_eq!(version_code(text).unwrap().to_string(), "9.2.18");
        assert_eq!(version_code("DRBD_KERNEL_VERSION_CODE=0x000000\n"), None);
        assert_eq!(version_code(""), None);
    }
}
