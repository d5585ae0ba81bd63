//! What must hold between statements (spec/drbd-conf.md §4 to §7, §9), and the facts that follow from them:
//! volumes of the resource level in every host section, computed node ids, hosts behind endpoints.
//! Findings of all resources are collected.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::error::{Error, Loc, Notice, Problem};
use crate::expand;
use crate::model::{
    Address, CONNECTIONS_MAX, Config, Connection, ConnectionPath, Endpoint, EndpointName, ForeignVolume,
    Host, HostKind, Resource, Volume, hostnames_equal,
};
use crate::options::OptionList;
use crate::parse::Output;

/// Turns what was parsed into a configuration.
pub(crate) fn finish(out: Output) -> Result<Config, Error> {
    Error::check_fatal(out.problems).map_err(|error| error.after(&out.notices))?;
    let mut config = Config {
        file: out.file,
        global: out.global,
        common: out.common,
        resources: out.resources,
        notices: out.notices,
    };
    let mut problems = Vec::new();
    name_stacked_hosts(&mut config.resources, &mut problems);
    for resource in &mut config.resources {
        merge_volumes(resource, &mut problems);
    }
    let mut connections = Vec::with_capacity(config.resources.len());
    for resource in &mut config.resources {
        connections.push(resolve_connections(resource, &mut config.notices, &mut problems));
    }
    for (resource, connections) in config.resources.iter_mut().zip(&connections) {
        node_ids(resource, connections, &mut problems);
        complete(resource, &mut problems);
    }
    if let Err(problem) = unique(&config.resources) {
        problems.push(problem);
        return Err(Error::fatal(problems).after(&config.notices));
    }
    addresses(&config.resources, &connections, &mut problems);
    Error::check(problems).map_err(|error| error.after(&config.notices))?;

    let foreign: BTreeMap<String, Vec<ForeignVolume>> =
        config.resources.iter().map(|resource| (resource.name.clone(), volumes_of(resource))).collect();
    for (resource, connections) in config.resources.iter_mut().zip(connections) {
        resource.expanded = expand::expand(resource, config.common.as_ref(), connections.clone());
        resource.connections = connections;
        resource.numbered_links =
            config.global.as_ref().is_some_and(|global| global.is_set("udev-always-use-vnr"));
        resource.foreign = named_resources(resource)
            .into_iter()
            .filter_map(|name| foreign.get(&name).map(|volumes| (name, volumes.clone())))
            .collect();
    }
    Ok(config)
}

/// Which resource a `resync-after` value is about, and which of its volumes.
pub(crate) fn resync_after(value: &str) -> (&str, Option<u32>) {
    match value.rsplit_once('/') {
        Some((name, vnr)) if vnr.parse::<u32>().is_ok() => (name, vnr.parse().ok()),
        _ => (value, None),
    }
}

/// Resources this one refers to.
fn named_resources(resource: &Resource) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    if let Ok(body) = &resource.expanded {
        for host in &body.hosts {
            if let HostKind::Stacked { lower, .. } = &host.kind {
                names.insert(lower.clone());
            }
            for volume in &host.volumes {
                if let Some(value) = volume.options.attach.value("resync-after") {
                    names.insert(resync_after(value).0.to_owned());
                }
            }
        }
    }
    names
}

fn volumes_of(resource: &Resource) -> Vec<ForeignVolume> {
    let mut volumes = Vec::new();
    for host in &resource.body.hosts {
        for volume in &host.volumes {
            if let (Some(minor), Some(device)) = (volume.minor, volume.device_path()) {
                volumes.push(ForeignVolume { host: host.kind.clone(), vnr: volume.vnr, minor, device });
            }
        }
    }
    volumes
}

/// A stacked section is for the hosts of its lower resource.
fn name_stacked_hosts(resources: &mut [Resource], problems: &mut Vec<Problem>) {
    let kinds: HashMap<String, Vec<HostKind>> = resources
        .iter()
        .map(|resource| {
            (resource.name.clone(), resource.body.hosts.iter().map(|host| host.kind.clone()).collect())
        })
        .collect();
    for resource in resources {
        for host in &mut resource.body.hosts {
            let HostKind::Stacked { lower, hosts, floating } = &mut host.kind else { continue };
            let Some(found) = kinds.get(lower.as_str()) else {
                problems.push(Problem::LowerUndefined {
                    at: resource.at.resolved(),
                    resource: resource.name.clone(),
                    lower: lower.clone(),
                });
                continue;
            };
            for kind in found {
                match kind {
                    HostKind::On(names) => hosts.extend(names.iter().cloned()),
                    HostKind::Floating(address) => {
                        hosts.push(address.host_name());
                        floating.push(address.clone());
                    }
                    // A stack of more than two levels names its hosts at the lowest one only.
                    HostKind::Stacked { .. } | HostKind::This => {}
                }
            }
        }
    }
}

/// Copies missing statements of the resource level's volumes into the host sections.
fn merge_volumes(resource: &mut Resource, problems: &mut Vec<Problem>) {
    let body = &mut resource.body;
    let lists = || std::iter::once(&body.volumes).chain(body.hosts.iter().map(|host| &host.volumes));
    let implicit = lists().flatten().any(|volume| volume.implicit);
    if implicit && lists().flatten().any(|volume| !volume.implicit && volume.vnr != 0) {
        problems
            .push(Problem::MixedInResource { at: resource.at.resolved(), resource: resource.name.clone() });
        return;
    }
    for host in &mut body.hosts {
        let mut added = Vec::new();
        for wide in &body.volumes {
            let stacked = matches!(host.kind, HostKind::Stacked { .. });
            match host.volume_mut(wide.vnr) {
                Some(volume) => fill(volume, wide, stacked),
                None => {
                    let mut volume = Volume::new(wide.at.clone(), wide.vnr, wide.implicit);
                    fill(&mut volume, wide, stacked);
                    volume.from_resource.volume = true;
                    added.push(volume);
                }
            }
        }
        host.volumes.append(&mut added);
        host.volumes.sort_by_key(|volume| volume.vnr);
    }
}

/// Takes missing statements from the resource level's volume. A stacked volume lies on the lower device.
fn fill(volume: &mut Volume, wide: &Volume, stacked: bool) {
    if volume.minor.is_none() && volume.device.is_none() {
        volume.minor = wide.minor;
        volume.device.clone_from(&wide.device);
        volume.from_resource.device = true;
    }
    if volume.disk.is_none() && !stacked {
        volume.disk.clone_from(&wide.disk);
        volume.from_resource.disk = wide.disk.is_some();
    }
    if volume.meta_disk.is_none() && !stacked {
        volume.meta_disk.clone_from(&wide.meta_disk);
        volume.from_resource.meta_disk = true;
    }
    volume.tiebreaker = volume.tiebreaker.or(wide.tiebreaker);
}

/// The host section an endpoint's host name means: the exact name first.
fn host_by_name(hosts: &[Host], name: &str) -> Option<usize> {
    let named = |test: &dyn Fn(&str) -> bool| {
        hosts.iter().position(|host| {
            !matches!(host.kind, HostKind::Stacked { .. }) && host.names().iter().any(|name| test(name))
        })
    };
    named(&|host| host == name).or_else(|| named(&|host| hostnames_equal(host, name))).or_else(|| {
        hosts.iter().position(|host| match &host.kind {
            HostKind::Floating(address) => format!("{}:{}", address.host, address.port) == name,
            HostKind::Stacked { hosts, .. } => hosts.iter().any(|host| hostnames_equal(host, name)),
            _ => false,
        })
    })
}

/// Finds the hosts of all endpoints, fills in addresses and makes implicit connections explicit. The
/// statements themselves only learn which host section they are about.
fn resolve_connections(
    resource: &mut Resource,
    notices: &mut Vec<Notice>,
    problems: &mut Vec<Problem>,
) -> Vec<Connection> {
    let name = resource.name.clone();
    let body = &mut resource.body;
    let mut connections = Vec::new();
    for connection in &mut body.connections {
        let mut resolved = connection.clone();
        for (path, out) in connection.paths.iter_mut().zip(&mut resolved.paths) {
            if path.endpoints.len() != 2 {
                let what = if path.implicit { "connection" } else { "path" };
                problems.push(Problem::TwoEndpoints { at: path.at.resolved(), resource: name.clone(), what });
                continue;
            }
            for (endpoint, out) in path.endpoints.iter_mut().zip(&mut out.endpoints) {
                match resolve(&body.hosts, &name, endpoint) {
                    Ok((host, address)) => {
                        endpoint.host = Some(host);
                        out.host = Some(host);
                        out.address = Some(address);
                    }
                    Err(problem) => problems.push(*problem),
                }
            }
        }
        connections.push(resolved);
    }
    mesh_connections(resource, &mut connections, problems);
    let body = &resource.body;
    if body.connections.is_empty() && body.meshes.is_empty() {
        match body.hosts.as_slice() {
            [a, b] if a.address.is_some() && b.address.is_some() => {
                connections.push(implicit_connection(&resource.at, [(0, a), (1, b)], OptionList::default()));
            }
            hosts if hosts.len() > 2 => notices.push(Notice::NeedsConnections { resource: name }),
            _ => {}
        }
    }
    connections
}

fn resolve(hosts: &[Host], resource: &str, endpoint: &Endpoint) -> Result<(usize, Address), Box<Problem>> {
    let at = endpoint.at.resolved();
    let resource = resource.to_owned();
    let EndpointName::Host(name) = &endpoint.name else {
        let host = hosts.iter().position(|host| host.address == endpoint.address);
        return match (host, &endpoint.address) {
            (Some(host), Some(address)) => Ok((host, address.clone())),
            (_, address) => {
                let address = address.as_ref().map(ToString::to_string).unwrap_or_default();
                Err(Box::new(Problem::EndpointAddress { at, resource, address }))
            }
        };
    };
    let Some(index) = host_by_name(hosts, name) else {
        return Err(Box::new(Problem::EndpointHost { at, resource, host: name.clone() }));
    };
    let own = hosts.get(index).and_then(|host| host.address.clone());
    let address = match (&endpoint.address, own, endpoint.port) {
        (Some(address), _, _) => address.clone(),
        (None, Some(own), port) => Address { port: port.unwrap_or(own.port), ..own },
        (None, None, port) => {
            let what = if port.is_some() { "address" } else { "address and port" };
            return Err(Box::new(Problem::NoAddress { at, resource, host: name.clone(), what }));
        }
    };
    Ok((index, address))
}

fn implicit_connection(at: &Loc, ends: [(usize, &Host); 2], net: OptionList) -> Connection {
    let endpoints = ends
        .into_iter()
        .map(|(index, host)| Endpoint {
            at: host.at.clone(),
            name: match &host.kind {
                HostKind::Stacked { .. } => EndpointName::Address,
                _ => EndpointName::Host(host.names().first().cloned().unwrap_or_default()),
            },
            address: host.address.clone(),
            port: None,
            proxy: host.proxy.clone(),
            outside: None,
            host: Some(index),
        })
        .collect();
    Connection {
        at: at.clone(),
        implicit: true,
        paths: vec![ConnectionPath { at: at.clone(), implicit: true, endpoints }],
        net,
        disk: OptionList::default(),
        volumes: Vec::new(),
        peer_node_id: None,
        cstate: None,
    }
}

/// One connection per unordered pair of a mesh, in list order.
fn mesh_connections(resource: &Resource, connections: &mut Vec<Connection>, problems: &mut Vec<Problem>) {
    let hosts = &resource.body.hosts;
    for mesh in &resource.body.meshes {
        let at = mesh.at.resolved();
        let name = resource.name.clone();
        let mut members: Vec<(usize, &Host)> = Vec::new();
        for wanted in &mesh.hosts {
            let found = host_by_name(hosts, wanted).and_then(|index| Some((index, hosts.get(index)?)));
            let Some((index, host)) = found else {
                // The reference gives the place of the resource here.
                let at = resource.at.resolved();
                problems.push(Problem::MeshHost { at, resource: name.clone(), host: wanted.clone() });
                continue;
            };
            if host.proxy.is_some() {
                problems.push(Problem::MeshWithProxy { at: at.clone(), resource: name.clone() });
            }
            if host.address.is_none() {
                problems.push(Problem::MeshNoAddress {
                    at: at.clone(),
                    resource: name.clone(),
                    host: wanted.clone(),
                });
                continue;
            }
            if members.iter().all(|(known, _)| *known != index) {
                members.push((index, host));
            }
        }
        // Options of the mesh count as inherited.
        let mut net = OptionList::default();
        for option in &mesh.net.deduplicated() {
            let mut option = option.clone();
            option.inherited = true;
            net.push_front(option);
        }
        for (position, first) in members.iter().enumerate() {
            for second in members.iter().skip(position + 1) {
                if connections.len() >= CONNECTIONS_MAX {
                    problems.push(Problem::TooMany { at, what: "connections", limit: CONNECTIONS_MAX });
                    return;
                }
                connections.push(implicit_connection(&mesh.at, [*first, *second], net.clone()));
            }
        }
    }
}

/// CRC-32C with the reference's initial value and no final inversion.
fn crc32c(text: &str) -> i32 {
    let mut crc: u32 = 0x1a65_6f21;
    for byte in text.bytes() {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    crc.cast_signed()
}

/// Computes the node ids of two hosts that have none; otherwise all must be given (spec/drbd-conf.md §5).
fn node_ids(resource: &mut Resource, connections: &[Connection], problems: &mut Vec<Problem>) {
    let at = resource.at.resolved();
    let implied =
        matches!(connections, [connection] if connection.implicit) && resource.body.meshes.is_empty();
    let hosts = &mut resource.body.hosts;
    if let ([a, b], true) = (hosts.as_mut_slice(), implied)
        && a.node_id.is_none()
        && b.node_id.is_none()
    {
        let by = |address: Option<&Address>| address.map(|address| crc32c(&address.host)).unwrap_or_default();
        let outside = |host: &Host| by(host.proxy.as_ref().map(|proxy| &proxy.outside));
        let mut hashes = (by(a.address.as_ref()), by(b.address.as_ref()));
        if hashes.0 == hashes.1 {
            hashes = (outside(a), outside(b));
        }
        if hashes.0 == hashes.1 {
            problems.push(Problem::EqualHashes { at, resource: resource.name.clone() });
            return;
        }
        a.node_id = Some(u32::from(hashes.0 < hashes.1));
        b.node_id = Some(u32::from(hashes.1 < hashes.0));
        return;
    }
    for host in hosts.iter().filter(|host| host.node_id.is_none()) {
        problems.push(Problem::Missing {
            at: host.at.resolved(),
            resource: resource.name.clone(),
            host: host.joined(" "),
            key: "node-id",
        });
    }
}

/// Statements every volume needs, and equal sets of volumes on all hosts.
fn complete(resource: &Resource, problems: &mut Vec<Problem>) {
    for host in &resource.body.hosts {
        let missing = |key| Problem::Missing {
            at: host.at.resolved(),
            resource: resource.name.clone(),
            host: host.joined(" "),
            key,
        };
        let stacked = matches!(host.kind, HostKind::Stacked { .. });
        for volume in &host.volumes {
            if volume.minor.is_none() {
                problems.push(missing("device"));
            }
            if volume.disk.is_none() && volume.meta_disk.is_some() && !stacked {
                problems.push(missing("disk"));
            }
        }
    }
    let Some((first, others)) = resource.body.hosts.split_first() else { return };
    let at = first.at.resolved();
    for other in others {
        let names = (resource.name.clone(), first.joined(" "), other.joined(" "));
        for volume in &first.volumes {
            let twin = other.volume(volume.vnr);
            let (vnr, at) = (volume.vnr, at.clone());
            let (resource, host, other) = names.clone();
            match twin {
                None => problems.push(Problem::VolumeNotDefined { at, resource, host, vnr, other }),
                Some(twin) if twin.implicit != volume.implicit => {
                    problems.push(Problem::ImplicitOnOneSide { at, resource, host, other, vnr });
                }
                Some(_) => {}
            }
        }
        for volume in &other.volumes {
            if first.volume(volume.vnr).is_none() {
                let (resource, host, other) = names.clone();
                let (vnr, at) = (volume.vnr, at.clone());
                problems.push(Problem::VolumeMissing { at, resource, host, vnr, other });
            }
        }
    }
}

/// Minors, devices, inherited disks and metadata slots are used once per host.
fn unique(resources: &[Resource]) -> Result<(), Problem> {
    let mut seen: HashMap<(&'static str, String), Loc> = HashMap::new();
    let mut once = |what: &'static str, key: String, at: Loc| match seen.entry((what, key.clone())) {
        std::collections::hash_map::Entry::Occupied(first) => {
            Err(Problem::Conflict { at, first: first.get().clone(), what, key })
        }
        std::collections::hash_map::Entry::Vacant(slot) => {
            slot.insert(at);
            Ok(())
        }
    };
    for resource in resources {
        for host in &resource.body.hosts {
            let stacked = matches!(host.kind, HostKind::Stacked { .. });
            for name in host.names() {
                for volume in &host.volumes {
                    let at = volume.at.resolved();
                    if !stacked || host.names().first() == Some(&name) {
                        once("volume", format!("{}:{name}:{}", resource.name, volume.vnr), at.clone())?;
                    }
                    if let Some(minor) = volume.minor {
                        once("device-minor", format!("device-minor:{name}:{minor}"), at.clone())?;
                    }
                    if let Some(device) = &volume.device {
                        once("device", format!("device:{name}:{device}"), at.clone())?;
                    }
                    if volume.is_diskless() {
                        continue;
                    }
                    if let (Some(disk), true) = (&volume.disk, volume.from_resource.disk) {
                        once("disk", format!("disk:{name}:{disk}"), at.implied())?;
                    }
                    match &volume.meta_disk {
                        Some(crate::model::MetaDisk::Indexed { device, index }) => {
                            once("meta-disk", format!("{name}:{device}[{index}]"), at)?;
                        }
                        Some(crate::model::MetaDisk::Flexible(device)) => {
                            once("meta-disk", format!("{name}:{device}[flexible]"), at)?;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    Ok(())
}

/// No endpoint is used by two resources or for both ends of a path; loopback addresses are exempt.
fn addresses(resources: &[Resource], connections: &[Vec<Connection>], problems: &mut Vec<Problem>) {
    let mut used: HashMap<&Address, (usize, Loc)> = HashMap::new();
    for (index, (resource, connections)) in resources.iter().zip(connections).enumerate() {
        let mut reported: BTreeSet<&Address> = BTreeSet::new();
        for connection in connections {
            let at = if connection.implicit { connection.at.implied() } else { connection.at.resolved() };
            for path in &connection.paths {
                let ends: Vec<&Address> =
                    path.endpoints.iter().filter_map(|end| end.address.as_ref()).collect();
                if let [a, b] = ends.as_slice()
                    && a == b
                    && !a.is_loopback()
                {
                    problems.push(Problem::SameEndpoint {
                        at: at.clone(),
                        resource: resource.name.clone(),
                        endpoint: a.to_string(),
                    });
                    continue;
                }
                for address in ends.into_iter().filter(|address| !address.is_loopback()) {
                    let (owner, first) = used.entry(address).or_insert_with(|| (index, at.clone()));
                    if *owner != index && reported.insert(address) {
                        problems.push(Problem::AddressConflict {
                            at: at.clone(),
                            resource: resource.name.clone(),
                            endpoint: address.to_string(),
                            other_at: first.clone(),
                            other: resources.get(*owner).map(|other| other.name.clone()).unwrap_or_default(),
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
    fn resync_after_forms() {
        assert_eq!(resync_after("r0"), ("r0", None));
        assert_eq!(resync_after("r0/3"), ("r0", Some(3)));
        assert_eq!(resync_after("a/b"), ("a/b", None));
    }
}
