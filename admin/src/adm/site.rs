//! The configuration and this host.

use palisade_conf::{
    BUNDLED_ENGINE, Config, FileSource, HostIdentity, LoadOptions, ModuleVersion, Notice, Problem,
};

use super::{EXIT_INVALID, Request};
use crate::cli::Failure;

/// What commands are planned from.
pub struct Site {
    pub config: Config,
    pub host: HostIdentity,
    /// The file loaded, as given.
    pub file: String,
}

impl Site {
    pub fn load(request: &Request) -> Result<Self, Failure> {
        let file = match &request.config_file {
            Some(file) => file.clone(),
            None => palisade_conf::default_file("/etc", &FileSource).ok_or_else(|| {
                Failure::new(EXIT_INVALID, "Can not open '/etc/drbd.conf': No such file or directory")
            })?,
        };
        let more: Vec<&str> = request.config_to_test.iter().map(String::as_str).collect();
        let already_read: Vec<&str> = request.config_to_exclude.iter().map(String::as_str).collect();
        let options = LoadOptions {
            more: &more,
            already_read: &already_read,
            module_version: Some(pretended_version().unwrap_or(BUNDLED_ENGINE)),
        };
        let config = Config::load_with(&file, &FileSource, &options)
            .map_err(|e| Failure::new(i32::from(e.exit_code()), format!("{e}{}", did_you_mean(&e))))?;
        for notice in &config.notices {
            if request.verbose > 0 || !matches!(notice, Notice::NoIncludeMatch { .. }) {
                eprintln!("{notice}");
            }
        }
        let host = host();
        if request.verb != "dump" {
            let invalid = |e: palisade_conf::Error| Failure::new(i32::from(e.exit_code()), e.to_string());
            config.check(&host).map_err(invalid)?;
            for resource in config.resources().iter().filter(|_| request.verb != "sh-nop") {
                resource.command_checks(&host).map_err(invalid)?;
            }
        }
        Ok(Self { config, host, file })
    }
}

/// The option that a misspelled word is most like.
fn did_you_mean(error: &palisade_conf::Error) -> String {
    let Some(Problem::Expected { got, .. }) = error.problems().last() else { return String::new() };
    palisade_conf::options::nearest(&got.to_string())
        .map(|spec| format!("\n\tDid you mean '{}'?", spec.name))
        .unwrap_or_default()
}

/// Host name and addresses; `__DRBD_NODE__` pretends another host.
fn host() -> HostIdentity {
    if let Ok(name) = std::env::var("__DRBD_NODE__")
        && !name.is_empty()
    {
        eprintln!("   found __DRBD_NODE__ in environment");
        eprintln!("   PRETENDING that I am >>{name}<<\n");
        return HostIdentity { name, addresses: Vec::new() };
    }
    let name = nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default();
    let addresses = nix::ifaddrs::getifaddrs().map_or_else(
        |_| Vec::new(),
        |all| {
            all.filter_map(|i| i.address)
                .filter_map(|a| {
                    let v4 = a.as_sockaddr_in().map(|a| std::net::IpAddr::V4(a.ip()));
                    v4.or_else(|| a.as_sockaddr_in6().map(|a| std::net::IpAddr::V6(a.ip())))
                })
                .collect()
        },
    );
    HostIdentity { name, addresses }
}

/// `DRBD_DRIVER_VERSION_OVERRIDE=X.Y.Z`
fn pretended_version() -> Option<ModuleVersion> {
    let text = std::env::var("DRBD_DRIVER_VERSION_OVERRIDE").ok()?;
    let mut parts = text.split('.').map(str::parse);
    match (parts.next(), parts.next(), parts.next()) {
        (Some(Ok(a)), Some(Ok(b)), Some(Ok(c))) => Some(ModuleVersion(a, b, c)),
        _ => None,
    }
}
