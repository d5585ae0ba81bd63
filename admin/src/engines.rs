//! Finding, starting and asking the engines of this node.
#![allow(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt};
use palisade_control::{
    Backend, Client, ClientError, Command, Engine, Kernel, NESTED_ENV, Reply, ResourceStatus, Settings,
    running_resources,
};

use crate::cli::Failure;

/// An engine answers at once unless it is stuck.
pub const QUERY_LIMIT: Duration = Duration::from_secs(10);
/// A state change may need the agreement of all peers, which may be repeated; the engine has the
/// shorter limits (`twopc-timeout`, at most 60 s).
pub const CHANGE_LIMIT: Duration = Duration::from_secs(300);
/// From starting an engine until it listens.
const START_LIMIT: Duration = Duration::from_secs(20);
/// From granting the end to the end of the process.
const END_LIMIT: Duration = Duration::from_secs(20);
const START_POLL: Duration = Duration::from_millis(10);

const EXIT_COMMUNICATION: i32 = 20;

/// Which program serves what a command is about.
pub enum Server {
    /// Our engine.
    Bundled,
    /// The kernel, through this tool.
    Kernel(Kernel),
}

/// The server of a resource. Without kernel module and settings this asks nobody.
pub fn server_of(resource: &str) -> Result<Server, Failure> {
    refuse_nesting()?;
    let backend = Backend::of(resource, QUERY_LIMIT)
        .map_err(|e| Failure::new(EXIT_COMMUNICATION, format!("{resource}: {e}.")))?;
    Ok(match backend {
        Backend::Bundled => Server::Bundled,
        Backend::Kernel(kernel) => Server::Kernel(kernel),
    })
}

/// The server of a minor: the kernel if it has the minor.
pub fn server_of_minor(minor: u32) -> Result<Server, Failure> {
    refuse_nesting()?;
    if let Some(kernel) = loaded_kernel()? {
        let all = kernel
            .status(None, QUERY_LIMIT)
            .map_err(|e| Failure::new(EXIT_COMMUNICATION, format!("{minor}: {e}.")))?;
        if all.iter().any(|r| r.devices.iter().any(|d| d.minor == minor)) {
            return Ok(Server::Kernel(kernel));
        }
    }
    Ok(Server::Bundled)
}

/// The kernel's tools if the module is loaded and not switched off by the settings.
pub fn loaded_kernel() -> Result<Option<Kernel>, Failure> {
    let settings = Settings::load().map_err(|e| Failure::new(EXIT_COMMUNICATION, format!("{e}.")))?;
    if settings.engine == Some(Engine::Bundled) || !Kernel::loaded() {
        return Ok(None);
    }
    Ok(Kernel::find().ok())
}

/// The real `drbdsetup` runs the tools it finds by name: if that is us, we must not ask it again.
pub fn refuse_nesting() -> Result<(), Failure> {
    if std::env::var_os(NESTED_ENV).is_some() {
        return Err(Failure::new(
            EXIT_COMMUNICATION,
            "palisade was called as a tool of the kernel's DRBD; put drbd-utils before palisade in PATH.",
        ));
    }
    Ok(())
}

/// Connects to the engine of a resource.
pub fn connect(resource: &str) -> Result<Client, ClientError> {
    Client::connect(resource, QUERY_LIMIT)
}

/// Sends one command.
pub fn call(resource: &str, command: Command) -> Result<Reply, ClientError> {
    let limit = match command {
        Command::Status | Command::Show | Command::GetGi { .. } | Command::TimeoutType { .. } => QUERY_LIMIT,
        _ => CHANGE_LIMIT,
    };
    connect(resource)?.call(command, limit)
}

/// Sends the command that ends an engine and waits until its process is gone, so that its devices are
/// free and its socket does not answer the next command.
pub fn end(resource: &str, command: Command) -> Result<Reply, ClientError> {
    let mut client = connect(resource)?;
    let pid = getsockopt(&client, sockopt::PeerCredentials).map(|c| c.pid()).ok();
    let reply = client.call(command, CHANGE_LIMIT)?;
    if matches!(reply, Reply::Ok { .. }) {
        let give_up = Instant::now() + END_LIMIT;
        while pid.is_some_and(is_alive) {
            if Instant::now() >= give_up {
                return Err(ClientError::Timeout {
                    resource: resource.to_owned(),
                    what: "end of the process".to_owned(),
                    limit: END_LIMIT,
                });
            }
            std::thread::sleep(START_POLL);
        }
    }
    Ok(reply)
}

/// Whether the process runs; one that only waits to be collected does not.
fn is_alive(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    !matches!(state, Some('Z' | 'X') | None)
}

/// States of all our engines by resource name. Engines that end meanwhile or have no resource yet
/// are left out.
pub fn bundled_statuses() -> Result<Vec<ResourceStatus>, Failure> {
    let names = running_resources().map_err(|e| {
        Failure::new(EXIT_COMMUNICATION, format!("Cannot list the engines in the runtime directory: {e}."))
    })?;
    let mut all = Vec::new();
    for name in names {
        match palisade_control::bundled_status(&name, QUERY_LIMIT) {
            Ok(status) => all.extend(status),
            Err(e) => return Err(Failure::new(EXIT_COMMUNICATION, format!("{e}."))),
        }
    }
    Ok(all)
}

/// Resource and volume that have a minor.
pub fn owner_of_minor(minor: u32) -> Result<Option<(String, u16)>, Failure> {
    Ok(bundled_statuses()?.into_iter().find_map(|r| {
        let volume = r.devices.iter().find(|d| d.minor == minor)?.volume;
        Some((r.name, volume))
    }))
}

/// Makes sure that an engine listens for the resource.
pub fn start(resource: &str) -> Result<(), Failure> {
    match connect(resource) {
        Ok(_) => return Ok(()),
        Err(ClientError::NotRunning { .. }) => {}
        Err(e) => return Err(Failure::new(EXIT_COMMUNICATION, format!("{e}."))),
    }
    if let Some(unit_file) = systemd_unit_file() {
        return start_unit(resource, &unit_file);
    }
    let program = daemon_program().ok_or_else(|| {
        Failure::new(
            EXIT_COMMUNICATION,
            "The engine 'palisaded' is neither beside this program nor in PATH; install it or set PALISADED.",
        )
    })?;
    let child = spawn_detached(&program, resource).map_err(|e| {
        Failure::new(EXIT_COMMUNICATION, format!("Cannot start {} for '{resource}': {e}.", program.display()))
    })?;
    wait_until_listening(resource, child, &program)
}

/// The unit template, if systemd runs this machine and the template is installed.
fn systemd_unit_file() -> Option<PathBuf> {
    if !Path::new("/run/systemd/system").is_dir() || std::env::var_os("PALISADED").is_some() {
        return None;
    }
    ["/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"]
        .iter()
        .map(|d| Path::new(d).join("palisaded@.service"))
        .find(|p| p.is_file())
}

fn start_unit(resource: &str, unit_file: &Path) -> Result<(), Failure> {
    let unit = format!("palisaded@{}.service", systemd_escape(resource));
    let status = Process::new("systemctl").args(["start", &unit]).stdin(Stdio::null()).status();
    match status {
        Ok(s) if s.success() => {}
        Ok(s) => {
            return Err(Failure::new(
                EXIT_COMMUNICATION,
                format!("'systemctl start {unit}' failed ({s}); see 'journalctl -u {unit}'."),
            ));
        }
        Err(e) => {
            return Err(Failure::new(
                EXIT_COMMUNICATION,
                format!("Cannot run systemctl to start {unit} of {}: {e}.", unit_file.display()),
            ));
        }
    }
    connect(resource).map(|_| ()).map_err(|e| Failure::new(EXIT_COMMUNICATION, format!("{e}.")))
}

/// Escapes a resource name for the instance of a unit, as systemd-escape does.
fn systemd_escape(name: &str) -> String {
    name.bytes()
        .enumerate()
        .map(|(i, b)| match b {
            b'/' => "-".to_owned(),
            b'.' if i > 0 => ".".to_owned(),
            b if b.is_ascii_alphanumeric() || b == b'_' || b == b':' => char::from(b).to_string(),
            b => format!("\\x{b:02x}"),
        })
        .collect()
}

/// `$PALISADED`, else `palisaded` beside this program, in the usual place or in PATH.
fn daemon_program() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("PALISADED").filter(|v| !v.is_empty()) {
        return Some(PathBuf::from(path));
    }
    let beside = std::env::current_exe().ok().and_then(|e| e.parent().map(|d| d.join("palisaded")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::iter::once(PathBuf::from("/usr/sbin/palisaded")))
        .chain(std::env::split_paths(&path).map(|d| d.join("palisaded")))
        .find(|p| p.is_file())
}

fn spawn_detached(program: &Path, resource: &str) -> std::io::Result<Child> {
    let mut process = Process::new(program);
    process.arg(resource).current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: setsid is async-signal-safe and touches no memory of this process.
    unsafe {
        process.pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(std::io::Error::from));
    }
    process.spawn()
}

fn wait_until_listening(resource: &str, mut child: Child, program: &Path) -> Result<(), Failure> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        // Asked before connecting, so that an engine that lost a race against another one is seen
        // as success once the other one listens.
        let ended = child.try_wait().ok().flatten();
        match connect(resource) {
            Ok(_) => return Ok(()),
            Err(ClientError::NotRunning { .. } | ClientError::Closed { .. }) => {}
            Err(e) => return Err(Failure::new(EXIT_COMMUNICATION, format!("{e}."))),
        }
        if let Some(status) = ended {
            return Err(Failure::new(
                EXIT_COMMUNICATION,
                format!(
                    "The engine {} of resource '{resource}' ended at once ({status}); see the system log.",
                    program.display()
                ),
            ));
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Failure::new(
                EXIT_COMMUNICATION,
                format!(
                    "The engine {} of resource '{resource}' did not listen within {} s; see the system log.",
                    program.display(),
                    START_LIMIT.as_secs()
                ),
            ));
        }
        std::thread::sleep(START_POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_names_are_escaped() {
        assert_eq!(systemd_escape("r0"), "r0");
        assert_eq!(systemd_escape("my-res.1"), "my\\x2dres.1");
        assert_eq!(systemd_escape(".a"), "\\x2ea");
    }
}
