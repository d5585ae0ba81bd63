//! What a command is about: `all`, `RES`, `RES/VOL`, `RES:PEER`, `RES:PEER/VOL`, `minor-N`
//! (`spec/cli.md` §1). An object that cannot be understood is an error, never left out.

use std::collections::BTreeSet;
use std::io::IsTerminal;
use std::rc::Rc;

use palisade_conf::view::{HostView, PathView, PeerView, VolumeView};
use palisade_conf::{Problem, Resource, hostnames_equal};

use super::request::Request;
use super::site::Site;
use super::verbs::{Iterates, Verb};
use super::{EXIT_FATAL, EXIT_INVALID, EXIT_USAGE};
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

/// What the objects of a command stand for.
#[derive(Debug, Default)]
pub struct Resolved {
    pub targets: Vec<Target>,
    /// Resources of which only a proxy runs here, for commands that care.
    pub proxy_nodes: Vec<String>,
    /// Exit status of the objects that stand for nothing.
    pub code: i32,
}

/// An argument taken apart.
#[derive(Debug, PartialEq, Eq)]
pub struct Object<'a> {
    pub resource: &'a str,
    pub peer: Option<&'a str>,
    pub volume: Option<u32>,
}

pub fn take_apart(text: &str) -> Result<Object<'_>, Failure> {
    let (rest, volume) = match text.rsplit_once('/') {
        Some((rest, volume)) => (rest, Some(number(volume)?)),
        None => (text, None),
    };
    Ok(match rest.split_once(':') {
        Some((resource, peer)) => Object { resource, peer: Some(peer), volume },
        None => Object { resource: rest, peer: None, volume },
    })
}

fn number(text: &str) -> Result<u32, Failure> {
    text.parse().map_err(|_| Failure::new(EXIT_FATAL, format!("{text} is not a valid number")))
}

/// What the objects of a command stand for; without any, everything.
pub fn resolve(verb: &Verb, site: &Site, request: &Request) -> Result<Resolved, Failure> {
    let mut found = Resolved::default();
    let all = [String::from("all")];
    let objects = if request.objects.is_empty() { &all[..] } else { &request.objects };
    for text in objects {
        let known = found.targets.len();
        let result = if text == "all" {
            add_all(verb, site, request.stacked, &mut found)
        } else {
            add_named(verb, site, text, &mut found)
        };
        if let Err(failure) = result {
            found.code = found.code.max(failure.report());
            if failure.code >= EXIT_FATAL {
                found.targets.clear();
                return Ok(found);
            }
        }
        let (before, new) = found.targets.split_at(known);
        if text != "all" && is_repeated(verb, before, new) {
            let text = format!("USAGE_BUG: {text} would enable an already enabled connection");
            return Err(Failure::new(EXIT_USAGE, text));
        }
    }
    complain_about_resync_after(site, &found)?;
    Ok(found)
}

/// The same connection may not be named twice, directly or through its resource.
fn is_repeated(verb: &Verb, before: &[Target], new: &[Target]) -> bool {
    if matches!(verb.iterates, Iterates::Volume | Iterates::Disk | Iterates::PathOfVolume) {
        return false;
    }
    // A resource stands for all its connections, a command on whole resources for the one it names.
    let peers = |target: &Target| target.peer.as_ref().map(|peer| peer.node_id);
    let volumes = |target: &Target| target.volume.as_ref().map(|volume| volume.vnr);
    let meets = |a: &Target, b: &Target| {
        a.object != "all"
            && a.view.resource == b.view.resource
            && (peers(a).is_none() || peers(b).is_none() || peers(a) == peers(b))
            && volumes(a) == volumes(b)
    };
    new.iter().any(|b| before.iter().any(|a| meets(a, b)))
}

/// Says which `resync-after` cannot be followed. Somebody at a terminal can put it right first.
fn complain_about_resync_after(site: &Site, found: &Resolved) -> Result<(), Failure> {
    let mut seen = BTreeSet::new();
    let mut problems = Vec::new();
    for target in &found.targets {
        let name = &target.view.resource;
        if let (true, Some(resource)) = (seen.insert(name), site.config.resource(name)) {
            problems.extend(resource.resync_after_problems(&site.host));
        }
    }
    for problem in &problems {
        eprintln!("{problem}");
    }
    if !problems.is_empty() && std::io::stdin().is_terminal() && std::io::stdout().is_terminal() {
        return Err(Failure::new(EXIT_INVALID, ""));
    }
    Ok(())
}

/// The resources `all` stands for.
pub fn views(site: &Site, stacked: bool) -> Result<Vec<Rc<HostView>>, Failure> {
    let mut views = Vec::new();
    for resource in site.config.resources().iter().filter(|r| !r.is_ignored(&site.host)) {
        match resource.view_as(&site.host) {
            Ok(view) if view.stacked_on.is_some() == stacked => views.push(Rc::new(view)),
            Ok(_) => {}
            Err(e) if is_proxy_node(&e) => {}
            Err(e) => return Err(Failure::new(i32::from(e.exit_code()), e.to_string())),
        }
    }
    Ok(views)
}

fn is_proxy_node(error: &palisade_conf::Error) -> bool {
    matches!(error.problems(), [Problem::ProxyNode { .. }])
}

fn add_all(verb: &Verb, site: &Site, stacked: bool, found: &mut Resolved) -> Result<(), Failure> {
    if site.config.resources().is_empty() {
        return Err(Failure::new(EXIT_USAGE, "no resources defined!"));
    }
    let views = views(site, stacked)?;
    let resources = site.config.resources().iter();
    let proxied: Vec<String> =
        resources.filter(|r| r.is_proxy_node(&site.host)).map(|r| r.name.clone()).collect();
    if views.is_empty() && proxied.is_empty() {
        return Err(no_resources(site, stacked));
    }
    for view in views {
        if verb.one_volume {
            check_volume_use(verb, &view, &view.resource, None)?;
        }
        add(verb, "all", &view, None, None, &mut found.targets);
    }
    if verb.on_proxy_nodes {
        found.proxy_nodes.extend(proxied);
    }
    Ok(())
}

/// `all` stands for nothing on this host.
pub fn no_resources(site: &Site, stacked: bool) -> Failure {
    let host = &site.host.name;
    Failure::new(
        EXIT_USAGE,
        if stacked {
            format!("WARN: nothing stacked for this host ({host}), nothing to do in stacked mode!")
        } else {
            format!(
                "WARN: no normal resources defined for this host ({host})!?\nMisspelled name of the local \
                 machine with the 'on' keyword ?"
            )
        },
    )
}

/// An object that stands for nothing.
pub fn unknown(site: &Site, text: &str) -> Failure {
    let name = text.split([':', '/']).next().unwrap_or(text);
    let names = site.config.resources().iter().map(|r| r.name.as_str()).filter(|other| *other != name);
    let hint = suggestion(name, names);
    Failure::new(EXIT_USAGE, format!("'{text}' not defined in your config (for this host).{hint}"))
}

/// An object whose resource is known, but not what else it names.
fn mismatch(text: &str, why: &str) -> Failure {
    Failure::new(EXIT_USAGE, format!("{why}\n'{text}' unexpected ctx_by_* result r=-2"))
}

pub fn add_named(verb: &Verb, site: &Site, text: &str, found: &mut Resolved) -> Result<(), Failure> {
    let (resource, object) = match text.strip_prefix("minor-") {
        Some(minor) => {
            let (resource, vnr) = owner_of(site, number(minor)?).ok_or_else(|| unknown(site, text))?;
            (resource, Object { resource: &resource.name, peer: None, volume: Some(vnr) })
        }
        None => {
            let object = take_apart(text)?;
            let resource = site.config.resource(object.resource);
            let here = resource.filter(|resource| !resource.is_ignored(&site.host));
            (here.ok_or_else(|| unknown(site, text))?, object)
        }
    };
    let view = match resource.view_as(&site.host) {
        Ok(view) => Rc::new(view),
        Err(e) if is_proxy_node(&e) && verb.on_proxy_nodes => {
            found.proxy_nodes.push(resource.name.clone());
            return Ok(());
        }
        Err(e) => return Err(Failure::new(i32::from(e.exit_code()), e.to_string())),
    };
    if let Some(vnr) = object.volume
        && !view.volumes.iter().any(|v| v.vnr == vnr)
    {
        let why = format!("Resource '{}' has no volume {vnr}", object.resource);
        return Err(mismatch(text, &why));
    }
    if let Some(name) = object.peer {
        check_peer(site, &view, text, name)?;
    }
    check_volume_use(verb, &view, text, object.volume)?;
    let targets = &mut found.targets;
    let count = targets.len();
    add(verb, text, &view, object.volume, object.peer, targets);
    let wants_disk = matches!(verb.iterates, Iterates::Disk | Iterates::DiskAndPeer);
    if wants_disk && targets.len() == count {
        let name = verb.name;
        let text = format!("The {name} command requires a local disk, but the configuration gives none.");
        return Err(Failure::new(EXIT_INVALID, text));
    }
    Ok(())
}

/// The resource and volume that have a minor on this host.
fn owner_of(site: &Site, minor: u32) -> Option<(&Resource, u32)> {
    let mut resources = site.config.resources().iter().filter(|r| !r.is_ignored(&site.host));
    resources.find_map(|resource| {
        let view = resource.view_as(&site.host).ok()?;
        let volume = view.volumes.iter().find(|v| v.minor == minor)?;
        Some((resource, volume.vnr))
    })
}

fn check_peer(site: &Site, view: &HostView, text: &str, name: &str) -> Result<(), Failure> {
    /// The reference tries three readings of the word and says so each time.
    const SAID: usize = 3;
    if view.peers.iter().any(|p| is_peer(p, name)) {
        return Ok(());
    }
    let own =
        hostnames_equal(name, &site.host.name) || view.host_names.iter().any(|n| hostnames_equal(n, name));
    if own {
        let sentence = format!("Host name '{name}' (from '{text}') is not a peer, but the local node");
        return Err(mismatch(text, &[sentence.as_str(); SAID].join("\n")));
    }
    let hint = suggestion(name, view.peers.iter().flat_map(|p| &p.host_names).map(String::as_str));
    Err(mismatch(text, &format!("Not a valid connection ({text}) for this host{hint}")))
}

fn is_peer(peer: &PeerView, name: &str) -> bool {
    peer.connection_name == name || peer.host_names.iter().any(|n| hostnames_equal(n, name))
}

fn check_volume_use(verb: &Verb, view: &HostView, text: &str, volume: Option<u32>) -> Result<(), Failure> {
    let explicit = view.volumes.iter().any(|v| !v.implicit);
    let whole = matches!(verb.iterates, Iterates::Resource | Iterates::Connection | Iterates::Path);
    let name = verb.name;
    if whole && volume.is_some() && explicit && !verb.takes_volume {
        return Err(Failure::new(
            EXIT_USAGE,
            format!("{name} operates on whole resources, but you specified a specific volume!"),
        ));
    }
    if verb.one_volume && volume.is_none() && explicit {
        return Err(Failure::new(
            EXIT_USAGE,
            format!(
                "{name} requires a specific volume id, but none is specified.\n\
                 Try '{name} minor-<minor_number>' or '{name} {text}/<vnr>'"
            ),
        ));
    }
    Ok(())
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

/// A resource, or the parts of it that were named.
#[derive(Debug)]
pub struct Scope {
    pub view: Rc<HostView>,
    /// Node ids; `None` for all peers.
    peers: Option<BTreeSet<u32>>,
    /// Volume numbers; `None` for all volumes.
    volumes: Option<BTreeSet<u32>>,
}

impl Scope {
    /// The resources of targets, each once.
    pub fn of(targets: &[Target]) -> Vec<Self> {
        let mut scopes: Vec<Self> = Vec::new();
        for target in targets {
            let one = |id: Option<u32>| id.map(|id| BTreeSet::from([id]));
            let peers = one(target.peer.as_ref().map(|peer| peer.node_id));
            let volumes = one(target.named_volume);
            let join = |known: &mut Option<BTreeSet<u32>>, new: Option<BTreeSet<u32>>| match (known, new) {
                (Some(known), Some(new)) => known.extend(new),
                (known, _) => *known = None,
            };
            match scopes.iter_mut().find(|scope| scope.view.resource == target.view.resource) {
                Some(scope) => {
                    join(&mut scope.peers, peers);
                    join(&mut scope.volumes, volumes);
                }
                None => scopes.push(Self { view: Rc::clone(&target.view), peers, volumes }),
            }
        }
        scopes
    }

    pub fn has_peer(&self, node_id: u32) -> bool {
        self.peers.as_ref().is_none_or(|peers| peers.contains(&node_id))
    }

    pub fn has_volume(&self, vnr: u32) -> bool {
        self.volumes.as_ref().is_none_or(|volumes| volumes.contains(&vnr))
    }

    pub fn peers(&self) -> impl Iterator<Item = &PeerView> {
        self.view.peers.iter().filter(|peer| self.has_peer(peer.node_id))
    }

    pub fn volumes(&self) -> impl Iterator<Item = &VolumeView> {
        self.view.volumes.iter().filter(|volume| self.has_volume(volume.vnr))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_taken_apart_at_the_last_slash() {
        assert_eq!(take_apart("r0"), Ok(Object { resource: "r0", peer: None, volume: None }));
        assert_eq!(take_apart("r0/3"), Ok(Object { resource: "r0", peer: None, volume: Some(3) }));
        assert_eq!(take_apart("r0:b/0"), Ok(Object { resource: "r0", peer: Some("b"), volume: Some(0) }));
        assert!(take_apart("r0/x").is_err());
    }
}
