//! What a command is about: `all`, `RES`, `RES/VOL`, `RES:PEER`, `RES:PEER/VOL`, `minor-N`
//! (`spec/cli.md` §1).

use std::rc::Rc;

use palisade_conf::view::{HostView, PathView, PeerView, VolumeView};
use palisade_conf::{Problem, hostnames_equal};

use super::verbs::{Iterates, Verb};
use super::{EXIT_INVALID, EXIT_USAGE, Request, Site};
use crate::cli::{Failure, suggestion};

/// One thing a command runs on.
#[derive(Debug, Clone)]
pub struct Target {
    /// The argument it came from.
    pub object: String,
    pub view: Rc<HostView>,
    /// Its volume, for commands on volumes.
    pub volume: Option<VolumeView>,
    /// Its connection, for commands on connections.
    pub peer: Option<PeerView>,
    /// Its path, for commands on paths.
    pub path: Option<PathView>,
    /// The volume number that was named, if any.
    pub named_volume: Option<u32>,
}

/// An argument taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Object<'a> {
    resource: &'a str,
    peer: Option<&'a str>,
    volume: Option<u32>,
}

fn take_apart(text: &str) -> Object<'_> {
    let (rest, volume) = match text.rsplit_once('/') {
        Some((rest, volume)) if volume.parse::<u32>().is_ok() => (rest, volume.parse().ok()),
        _ => (text, None),
    };
    match rest.split_once(':') {
        Some((resource, peer)) => Object { resource, peer: Some(peer), volume },
        None => Object { resource: rest, peer: None, volume },
    }
}

/// The targets of a command, and the exit status of the arguments that were none.
pub fn resolve(verb: &Verb, site: &Site, request: &Request) -> Result<(Vec<Target>, i32), Failure> {
    let mut targets = Vec::new();
    let mut code = 0;
    let all = [String::from("all")];
    let objects = if request.objects.is_empty() { &all[..] } else { &request.objects };
    check_repeated(verb, objects)?;
    for text in objects {
        let result = if text == "all" {
            add_all(verb, site, request.stacked, &mut targets)
        } else {
            add_named(verb, site, text, &mut targets)
        };
        if let Err(failure) = result {
            code = code.max(failure.report());
        }
    }
    if NEED_EVERY_DISK.contains(&verb.name) && code == 0 && objects.iter().any(|o| o == "all") {
        let mine = site.config.resources().iter().filter_map(|r| r.view_as(&site.host).ok());
        if mine.flat_map(|view| view.volumes).any(|v| v.disk.is_none()) {
            code = no_disk(verb).report();
        }
    }
    Ok((targets, code))
}

/// These complain about diskless volumes even when nobody named one.
const NEED_EVERY_DISK: &[&str] = &["create-md", "sh-md-dev", "sh-md-idx"];

fn no_disk(verb: &Verb) -> Failure {
    let name = verb.name;
    let text = format!("The {name} command requires a local disk, but the configuration gives none.");
    Failure::new(EXIT_INVALID, text)
}

/// The same connection may not be named twice, directly or through its resource.
fn check_repeated(verb: &Verb, objects: &[String]) -> Result<(), Failure> {
    if !matches!(verb.iterates, Iterates::Connection | Iterates::Path | Iterates::PeerDevice) {
        return Ok(());
    }
    for (i, text) in objects.iter().enumerate() {
        if objects.get(..i).is_some_and(|before| before.contains(text)) {
            return Err(Failure::new(
                EXIT_USAGE,
                format!("USAGE_BUG: {text} would enable an already enabled connection"),
            ));
        }
    }
    Ok(())
}

fn add_all(verb: &Verb, site: &Site, stacked: bool, targets: &mut Vec<Target>) -> Result<(), Failure> {
    let mut any = false;
    if site.config.resources().is_empty() {
        return Err(Failure::new(EXIT_USAGE, "no resources defined!"));
    }
    for resource in site.config.resources() {
        if resource.is_ignored(&site.host) {
            continue;
        }
        let view = match resource.view_as(&site.host) {
            Ok(view) => Rc::new(view),
            Err(e) if matches!(e.problems(), [Problem::ProxyNode { .. }]) => continue,
            Err(e) => return Err(Failure::new(i32::from(e.exit_code()), e.to_string())),
        };
        if view.stacked_on.is_some() != stacked {
            continue;
        }
        any = true;
        add(verb, "all", &view, None, None, targets);
    }
    if any {
        return Ok(());
    }
    if stacked {
        let host = &site.host.name;
        return Err(Failure::new(
            EXIT_USAGE,
            format!("WARN: nothing stacked for this host ({host}), nothing to do in stacked mode!"),
        ));
    }
    Err(Failure::new(
        EXIT_USAGE,
        format!(
            "WARN: no normal resources defined for this host ({})!?\nMisspelled name of the local machine with the \
             'on' keyword ?",
            site.host.name
        ),
    ))
}

fn add_named(verb: &Verb, site: &Site, text: &str, targets: &mut Vec<Target>) -> Result<(), Failure> {
    if let Some(minor) = text.strip_prefix("minor-").and_then(|n| n.parse::<u32>().ok()) {
        return add_minor(verb, site, text, minor, targets);
    }
    let object = take_apart(text);
    let names = site.config.resources().iter().map(|r| r.name.as_str());
    let unknown = || {
        let hint = suggestion(object.resource, names);
        Failure::new(
            EXIT_USAGE,
            format!("'{}' not defined in your config (for this host).{hint}", object.resource),
        )
    };
    let Some(resource) = site.config.resource(object.resource).filter(|r| !r.is_ignored(&site.host)) else {
        return Err(unknown());
    };
    let view =
        resource.view_as(&site.host).map_err(|e| Failure::new(i32::from(e.exit_code()), e.to_string()))?;
    if let Some(vnr) = object.volume
        && !view.volumes.iter().any(|v| v.vnr == vnr)
    {
        return Err(Failure::new(EXIT_USAGE, format!("Resource '{}' has no volume {vnr}", object.resource)));
    }
    if let Some(name) = object.peer {
        check_peer(site, &view, text, name)?;
    }
    check_volume_use(verb, &view, object.volume)?;
    let view = Rc::new(view);
    let count = targets.len();
    add(verb, text, &view, object.volume, object.peer, targets);
    let wants_disk = matches!(verb.iterates, Iterates::Disk | Iterates::DiskAndPeer);
    if wants_disk && targets.len() == count && object.peer.is_none() {
        return Err(no_disk(verb));
    }
    Ok(())
}

fn check_peer(site: &Site, view: &HostView, text: &str, name: &str) -> Result<(), Failure> {
    if view.peers.iter().any(|p| is_peer(p, name)) {
        return Ok(());
    }
    let own =
        hostnames_equal(name, &site.host.name) || view.host_names.iter().any(|n| hostnames_equal(n, name));
    Err(Failure::new(
        EXIT_USAGE,
        if own {
            format!("Host name '{name}' (from '{text}') is not a peer, but the local node")
        } else {
            let hint = suggestion(name, view.peers.iter().flat_map(|p| &p.host_names).map(String::as_str));
            format!("Not a valid connection ({text}) for this host{hint}")
        },
    ))
}

fn is_peer(peer: &PeerView, name: &str) -> bool {
    peer.connection_name == name || peer.host_names.iter().any(|n| hostnames_equal(n, name))
}

fn check_volume_use(verb: &Verb, view: &HostView, volume: Option<u32>) -> Result<(), Failure> {
    let explicit = view.volumes.iter().any(|v| !v.implicit);
    let whole = matches!(verb.iterates, Iterates::Resource | Iterates::Connection | Iterates::Path);
    if whole && volume.is_some() && explicit && !verb.takes_volume {
        return Err(Failure::new(
            EXIT_USAGE,
            format!("{} operates on whole resources, but you specified a specific volume!", verb.name),
        ));
    }
    if verb.one_volume && volume.is_none() && explicit {
        return Err(Failure::new(
            EXIT_USAGE,
            format!(
                "{} requires a specific volume id, but none is specified.\nTry '{} {}/<vnr>'",
                verb.name, verb.name, view.resource
            ),
        ));
    }
    Ok(())
}

fn add_minor(
    verb: &Verb,
    site: &Site,
    text: &str,
    minor: u32,
    targets: &mut Vec<Target>,
) -> Result<(), Failure> {
    for resource in site.config.resources().iter().filter(|r| !r.is_ignored(&site.host)) {
        let Ok(view) = resource.view_as(&site.host) else { continue };
        let Some(vnr) = view.volumes.iter().find(|v| v.minor == minor).map(|v| v.vnr) else { continue };
        let view = Rc::new(view);
        let volume = matches!(verb.iterates, Iterates::Resource).then_some(None).unwrap_or(Some(vnr));
        add(verb, text, &view, volume, None, targets);
        return Ok(());
    }
    Err(Failure::new(EXIT_USAGE, format!("'{text}' not defined in your config (for this host).")))
}

fn add(
    verb: &Verb,
    object: &str,
    view: &Rc<HostView>,
    vnr: Option<u32>,
    peer: Option<&str>,
    targets: &mut Vec<Target>,
) {
    let base = Target {
        object: object.to_owned(),
        view: Rc::clone(view),
        volume: None,
        peer: None,
        path: None,
        named_volume: vnr,
    };
    let volumes = || view.volumes.iter().filter(|v| vnr.is_none_or(|n| n == v.vnr));
    let peers = || view.peers.iter().filter(|p| peer.is_none_or(|name| is_peer(p, name)));
    match verb.iterates {
        Iterates::Resource => {
            let named = peer.and_then(|_| peers().next().cloned());
            targets.push(Target { peer: named, ..base });
        }
        Iterates::Volume | Iterates::Disk => {
            let named = peer.and_then(|_| peers().next().cloned());
            for volume in volumes().filter(|v| verb.iterates == Iterates::Volume || v.disk.is_some()) {
                targets.push(Target { volume: Some(volume.clone()), peer: named.clone(), ..base.clone() });
            }
        }
        Iterates::Connection => {
            targets.extend(peers().map(|p| Target { peer: Some(p.clone()), ..base.clone() }));
        }
        Iterates::Path => {
            for p in peers() {
                for path in &p.paths {
                    targets.push(Target { peer: Some(p.clone()), path: Some(path.clone()), ..base.clone() });
                }
            }
        }
        Iterates::PeerDevice | Iterates::DiskAndPeer => {
            for volume in volumes().filter(|v| verb.iterates == Iterates::PeerDevice || v.disk.is_some()) {
                for p in peers() {
                    targets.push(Target {
                        volume: Some(volume.clone()),
                        peer: Some(p.clone()),
                        ..base.clone()
                    });
                }
                // A host that is alone has its own entry only.
                if view.peers.is_empty() {
                    targets.push(Target { volume: Some(volume.clone()), ..base.clone() });
                }
            }
        }
        Iterates::PathOfVolume => {
            for volume in volumes() {
                for p in peers() {
                    for path in &p.paths {
                        targets.push(Target {
                            volume: Some(volume.clone()),
                            peer: Some(p.clone()),
                            path: Some(path.clone()),
                            ..base.clone()
                        });
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_taken_apart_at_the_last_slash() {
        assert_eq!(take_apart("r0"), Object { resource: "r0", peer: None, volume: None });
        assert_eq!(take_apart("r0/3"), Object { resource: "r0", peer: None, volume: Some(3) });
        assert_eq!(take_apart("r0:b/0"), Object { resource: "r0", peer: Some("b"), volume: Some(0) });
    }
}
