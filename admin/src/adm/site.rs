//! The configuration and this host.

use palisade_conf::{
    BUNDLED_ENGINE, Config, FileSource, HostIdentity, LoadOptions, ModuleVersion, Notice, Problem,
};

use super::EXIT_INVALID;
use super::request::Request;
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
        let invalid = |e: palisade_conf::Error| {
            tell(e.notices(), request);
            let mut text = format!("{e}{}", did_you_mean(&e));
            if request.verb == "sh-nop" && !e.is_fatal() {
                text.push_str(&format!("\ncommand sh-nop exited with code {}", e.exit_code()));
            }
            Failure::new(i32::from(e.exit_code()), text)
        };
        let config = Config::load_with(&file, &FileSource, &options).map_err(invalid)?;
        tell(&config.notices, request);
        let host = host();
        // A dump makes its own checks: it also shows what cannot be expanded.
        if !matches!(request.verb.as_str(), "dump" | "dump-xml") {
            config.check(&host).map_err(invalid)?;
            for resource in config.resources().iter().filter(|_| request.verb != "sh-nop") {
                resource.command_checks(&host).map_err(invalid)?;
            }
        }
        Ok(Self { config, host, file })
    }
}

/// Prints remarks about the configuration.
fn tell(notices: &[Notice], request: &Request) {
    for notice in notices {
        if request.verbose > 0 || !matches!(notice, Notice::NoIncludeMatch { .. }) {
            eprintln!("{notice}");
        }
    }
}

/// The option that a misspelled word is most like. A word that is right somewhere else is not misspelled.
fn did_you_mean(error: &palisade_conf::Error) -> String {
    let Some(Problem::Expected { got, .. }) = error.problems().last() else { return String::new() };
    let got = got.to_string();
    palisade_conf::options::nearest(&got)
        .filter(|spec| spec.name != got)
        .map(|spec| format!("\n\tDid you mean '{}'?", spec.name))
        .unwrap_or_default()
}

/// The host that is pretended to be this one.
fn pretended_name() -> Option<String> {
    std::env::var("__DRBD_NODE__").ok().filter(|name| !name.is_empty())
}

/// Says before anything else that another host is pretended.
pub fn announce_pretence() {
    if let Some(name) = pretended_name() {
        eprintln!("\n   found __DRBD_NODE__ in environment\n   PRETENDING that I am >>{name}<<\n");
    }
}

/// Host name and addresses.
fn host() -> HostIdentity {
    let real_name =
        || nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned()).unwrap_or_default();
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
    HostIdentity { name: pretended_name().unwrap_or_else(real_name), addresses }
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
