//! `proxy-up`, `proxy-down` and the proxy part of `adjust`: lines of `drbd-proxy-ctl` (`spec/cli.md` §6).
//! It never guesses what a running proxy is set to: a connection that is known to it is left to the
//! administrator.

use palisade_conf::{Address, ProxyView, hostnames_equal};

use super::bring_up::chain;
use super::exec::{Exec, Line};
use super::objects::{Object, no_resources, take_apart, unknown};
use super::request::Request;
use super::site::Site;
use super::{EXIT_INVALID, EXIT_USAGE};
use crate::cli::Failure;

pub type ProxyFn = fn(&ProxyView) -> Vec<Line>;

/// Runs lines about every proxied connection the objects name.
pub fn run(lines: ProxyFn, site: &Site, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let mut code = 0;
    for object in &request.objects {
        let proxies = if object == "all" { all(site) } else { named(site, object) };
        match proxies {
            Err(failure) => code = code.max(failure.report()),
            Ok(proxies) => {
                for proxy in &proxies {
                    code = code.max(chain(&proxy.resource, &lines(proxy), exec));
                }
            }
        }
    }
    Ok(code)
}

fn proxies_of(site: &Site, resource: &palisade_conf::Resource) -> Result<Vec<ProxyView>, Failure> {
    resource.proxies(&site.host).map_err(|e| Failure::new(i32::from(e.exit_code()), e.to_string()))
}

fn all(site: &Site) -> Result<Vec<ProxyView>, Failure> {
    let mut found = Vec::new();
    for resource in site.config.resources() {
        found.extend(proxies_of(site, resource)?);
    }
    if found.is_empty() { Err(no_resources(site, false)) } else { Ok(found) }
}

fn named(site: &Site, text: &str) -> Result<Vec<ProxyView>, Failure> {
    let Object { resource: name, peer, .. } = take_apart(text)?;
    let Some(resource) = site.config.resource(name) else {
        return Err(unknown(site, text));
    };
    let host = &site.host.name;
    let invalid = |text: String| Failure::new(EXIT_INVALID, text);
    let mut found = proxies_of(site, resource)?;
    if found.is_empty() {
        return Err(invalid(if resource.has_proxies() {
            format!("The proxy config in resource {name} is not for {host}.")
        } else {
            format!("There is no proxy config for the peer in resource {name}.")
        }));
    }
    if let Some(peer) = peer {
        found.retain(|proxy| proxy.peer_names.iter().any(|name| hostnames_equal(name, peer)));
        if found.is_empty() {
            return Err(invalid(format!(
                "In resource '{name}', no proxy config for connection from '{host}' to '{peer}'."
            )));
        }
    }
    Ok(found)
}

fn ctl<S: Into<String>>(commands: impl IntoIterator<Item = S>) -> Line {
    Line::proxy_ctl(commands.into_iter().flat_map(|command| ["-c".to_owned(), command.into()]))
}

pub fn up(proxy: &ProxyView) -> Vec<Line> {
    let short = |address: &Address| {
        let text = address.to_string();
        text.split_once(':').map_or_else(|| text.clone(), |(_, rest)| rest.to_owned())
    };
    let addresses = [&proxy.own_inside, &proxy.peer_outside, &proxy.own_outside, &proxy.own].map(short);
    let mut add = format!("add connection {} {}", proxy.name, addresses.join(" "));
    let mut settings = Vec::new();
    for option in &proxy.options.options {
        add.push_str(&format!(" --{}={}", option.name(), option.value()));
        settings.push(format!("set {} {} {}", option.name(), proxy.name, option.value()));
    }
    let plugins = &proxy.options.plugins;
    let plugin = |index: usize, text: &str| format!("set plugin {} {index} {text}", proxy.name);
    settings.extend(plugins.iter().enumerate().map(|(index, text)| plugin(index, text)));
    if !plugins.is_empty() {
        settings.push(plugin(plugins.len(), "END"));
    }
    let mut lines = vec![ctl([add])];
    if !settings.is_empty() {
        lines.push(ctl(settings));
    }
    lines
}

pub fn down(proxy: &ProxyView) -> Vec<Line> {
    vec![ctl([format!("del connection {}", proxy.name)])]
}

/// The lines that bring a proxy to what is configured: everything if it does not know the connection.
pub fn adjust(proxy: &ProxyView, exec: &Exec<'_>) -> Result<Vec<Line>, Failure> {
    let settings = match std::env::var_os("FAKE_DRBD_PROXY_CTL") {
        Some(file) => std::fs::read_to_string(&file).map_err(|e| {
            Failure::new(EXIT_INVALID, format!("Cannot read {}: {e}.", std::path::Path::new(&file).display()))
        })?,
        None => exec.output(&ctl([format!("show proxy-settings {}", proxy.name)])).unwrap_or_default(),
    };
    if settings.trim().is_empty() {
        return Ok(up(proxy));
    }
    Err(Failure::new(
        EXIT_USAGE,
        format!(
            "Comparing the settings of a running proxy is not supported; use 'drbdadm proxy-down {0}' and \
             'drbdadm proxy-up {0}'.",
            proxy.resource
        ),
    ))
}
