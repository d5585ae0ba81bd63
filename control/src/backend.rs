//! One view of a resource, whichever engine serves it. What agents and handlers use.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::client::running_resources;
use crate::kernel::{Nested, run_tool};
use crate::{
    Client, ClientError, Engine, Kernel, KernelError, ResourceStatus, Settings, SettingsError, ToolOutput,
};

/// Why a resource could not be asked or driven.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum BackendError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("cannot list the engines in the runtime directory: {0}")]
    List(std::io::Error),
    #[error(
        "the program 'palisade' is neither beside this program nor in PATH; install it or set PALISADE_ADMIN"
    )]
    NoAdmin,
}

/// The engine that serves a resource.
#[derive(Debug, Clone)]
pub enum Backend {
    /// Palisade's own.
    Bundled,
    /// The kernel's.
    Kernel(Kernel),
}

impl Backend {
    /// The engine of a resource: what `palisade.toml` fixes; else the kernel if its module knows the
    /// resource; else the bundled one.
    ///
    /// # Errors
    /// If the settings or the kernel cannot be read.
    pub fn of(resource: &str, limit: Duration) -> Result<Self, BackendError> {
        let fixed = Settings::load()?.engine_of(resource);
        match fixed {
            Some(Engine::Bundled) => Ok(Self::Bundled),
            Some(Engine::Kernel) => Ok(Self::Kernel(Kernel::find()?)),
            None => match loaded_kernel() {
                Some(kernel) if !kernel.status(Some(resource), limit)?.is_empty() => Ok(Self::Kernel(kernel)),
                _ => Ok(Self::Bundled),
            },
        }
    }

    /// State of the resource; `None` if the engine does not have it (it is down).
    ///
    /// # Errors
    /// If the engine does not answer within `limit`.
    pub fn status(&self, resource: &str, limit: Duration) -> Result<Option<ResourceStatus>, BackendError> {
        match self {
            Self::Kernel(kernel) => {
                Ok(kernel.status(Some(resource), limit)?.into_iter().find(|r| r.name == resource))
            }
            Self::Bundled => bundled_status(resource, limit),
        }
    }

    /// Runs `drbdadm` of this engine with these arguments.
    ///
    /// # Errors
    /// If it is not installed or does not end within `limit`. A non-zero exit code is no error here.
    pub fn drbdadm<S: AsRef<OsStr>>(&self, args: &[S], limit: Duration) -> Result<ToolOutput, BackendError> {
        match self {
            Self::Kernel(kernel) => Ok(kernel.run_drbdadm(args, limit)?),
            Self::Bundled => Ok(run_admin("drbdadm", args, limit)?),
        }
    }

    /// Runs `drbdsetup` of this engine with these arguments.
    ///
    /// # Errors
    /// If it is not installed or does not end within `limit`. A non-zero exit code is no error here.
    pub fn drbdsetup<S: AsRef<OsStr>>(
        &self,
        args: &[S],
        limit: Duration,
    ) -> Result<ToolOutput, BackendError> {
        match self {
            Self::Kernel(kernel) => Ok(kernel.run_drbdsetup(args, limit)?),
            Self::Bundled => Ok(run_admin("drbdsetup", args, limit)?),
        }
    }
}

/// State of every resource on this node, of both engines, sorted by name. A resource both have is
/// taken from the kernel. Engines that end while being asked are left out.
///
/// # Errors
/// If an engine or the kernel does not answer within `limit` each.
pub fn all_status(limit: Duration) -> Result<Vec<ResourceStatus>, BackendError> {
    let mut all = match loaded_kernel() {
        Some(kernel) => kernel.status(None, limit)?,
        None => Vec::new(),
    };
    for name in running_resources().map_err(BackendError::List)? {
        if !all.iter().any(|r| r.name == name) {
            all.extend(bundled_status(&name, limit)?);
        }
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

/// State of a resource of the bundled engine; `None` if no engine runs for it.
///
/// # Errors
/// If the engine does not answer within `limit`.
pub fn bundled_status(resource: &str, limit: Duration) -> Result<Option<ResourceStatus>, BackendError> {
    let deadline = Instant::now() + limit;
    let left = || deadline.saturating_duration_since(Instant::now());
    let answer = Client::connect(resource, limit).and_then(|mut c| c.status(left()));
    match answer {
        Ok(status) => Ok(status),
        Err(ClientError::NotRunning { .. } | ClientError::Closed { .. }) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The kernel's tools if the module is loaded. A kernel that cannot be driven for lack of tools
/// serves nothing we could see.
fn loaded_kernel() -> Option<Kernel> {
    if Kernel::loaded() { Kernel::find().ok() } else { None }
}

/// Runs our own multicall program as `tool`.
fn run_admin<S: AsRef<OsStr>>(tool: &str, args: &[S], limit: Duration) -> Result<ToolOutput, BackendError> {
    let admin = admin_program().ok_or(BackendError::NoAdmin)?;
    let mut all: Vec<&OsStr> = vec![OsStr::new(tool)];
    all.extend(args.iter().map(AsRef::as_ref));
    Ok(run_tool(&admin, &all, Nested::No, limit)?)
}

/// `$PALISADE_ADMIN`, else `palisade` beside this program, in the usual places or in PATH.
fn admin_program() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("PALISADE_ADMIN").filter(|v| !v.is_empty()) {
        return Some(PathBuf::from(path));
    }
    let beside = std::env::current_exe().ok().and_then(|e| e.parent().map(|d| d.join("palisade")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(["/usr/sbin", "/usr/local/sbin"].iter().map(|d| Path::new(d).join("palisade")))
        .chain(std::env::split_paths(&path).map(|d| d.join("palisade")))
        .find(|p| p.is_file())
}
