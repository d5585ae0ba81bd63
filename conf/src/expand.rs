//! Inheritance (spec/drbd-conf.md §8): from `common` or a template to the resource, to the volumes of each
//! host, to each connection and each volume of a peer.
//!
//! An option present at the narrower level stays. A copy goes to the front of the list and is marked; if a
//! second source offers another value for a copied option, nobody can say which is meant: an error.

use std::collections::BTreeSet;

use crate::error::{Error, Loc, Problem};
use crate::model::{
    Body, Common, Connection, DiskOptions, Host, HostKind, MetaDisk, PeerVolume, ProxyOptions, Resource,
    Volume,
};
use crate::options::OptionList;

struct Inherit<'a> {
    at: Loc,
    resource: &'a str,
    problems: Vec<Problem>,
}

impl Inherit<'_> {
    fn list(&mut self, narrow: &mut OptionList, wide: &OptionList) {
        for option in &wide.deduplicated() {
            match narrow.get(option.name()) {
                Some(present) if present.inherited && present.value() != option.value() => {
                    self.problems.push(Problem::Ambiguous {
                        at: self.at.clone(),
                        resource: self.resource.to_owned(),
                        option: option.name().to_owned(),
                        first: present.shown(),
                        second: option.shown(),
                    });
                }
                Some(_) => {}
                None => {
                    let mut copy = option.clone();
                    copy.inherited = true;
                    narrow.push_front(copy);
                }
            }
        }
    }

    fn disk(&mut self, narrow: &mut DiskOptions, wide: &DiskOptions) {
        self.list(&mut narrow.attach, &wide.attach);
        self.list(&mut narrow.device, &wide.device);
        self.list(&mut narrow.peer_device, &wide.peer_device);
    }

    fn proxy(&mut self, narrow: &mut ProxyOptions, wide: &ProxyOptions) {
        self.list(&mut narrow.options, &wide.options);
        for line in &wide.plugins {
            if !narrow.plugins.contains(line) {
                narrow.plugins.insert(0, line.clone());
            }
        }
    }

    fn body(&mut self, narrow: &mut Body, wide: &Body) {
        self.list(&mut narrow.net, &wide.net);
        self.disk(&mut narrow.disk, &wide.disk);
        self.list(&mut narrow.startup, &wide.startup);
        self.proxy(&mut narrow.proxy, &wide.proxy);
        self.list(&mut narrow.handlers, &wide.handlers);
        self.list(&mut narrow.options, &wide.options);
        narrow.stacked_timeouts |= wide.stacked_timeouts;
    }
}

/// The resource with everything inherited; `connections` are all of them, with hosts and addresses known.
pub(crate) fn expand(
    resource: &Resource,
    common: Option<&Common>,
    connections: Vec<Connection>,
) -> Result<Body, Error> {
    let mut body = resource.body.clone();
    let mut inherit = Inherit { at: resource.at.resolved(), resource: &resource.name, problems: Vec::new() };
    if let Some(wide) = resource.template.as_deref().or(common) {
        inherit.body(&mut body, &wide.body);
    }
    for host in &mut body.hosts {
        for volume in &mut host.volumes {
            inherit.disk(&mut volume.options, &body.disk);
            finish_volume(volume, matches!(host.kind, HostKind::Stacked { .. }));
        }
    }
    for wide in std::mem::take(&mut body.volumes) {
        for host in &mut body.hosts {
            if let Some(volume) = host.volume_mut(wide.vnr) {
                inherit.disk(&mut volume.options, &wide.options);
            }
        }
    }
    body.meshes.clear();
    body.connections = connections;
    for connection in &mut body.connections {
        inherit.list(&mut connection.net, &body.net);
        connection.paths.iter_mut().for_each(|path| path.implicit = false);
        for endpoint in connection.paths.iter_mut().flat_map(|path| &mut path.endpoints) {
            if let Some(proxy) = &mut endpoint.proxy {
                inherit.proxy(&mut proxy.options, &body.proxy);
            }
        }
        let hosts: Vec<usize> = connection
            .paths
            .first()
            .map(|path| path.endpoints.iter().filter_map(|endpoint| endpoint.host).collect())
            .unwrap_or_default();
        for index in &hosts {
            let Some(host) = body.hosts.get(*index) else { continue };
            for volume in &connection.volumes {
                if host.volume(volume.vnr).is_none() {
                    inherit.problems.push(Problem::UnknownVolume {
                        at: connection.at.resolved(),
                        resource: resource.name.clone(),
                        vnr: volume.vnr,
                        host: host.joined(" "),
                    });
                }
            }
        }
        let mut known: BTreeSet<u32> = connection.volumes.iter().map(|volume| volume.vnr).collect();
        let ends: Vec<&Host> = hosts.iter().filter_map(|index| body.hosts.get(*index)).collect();
        for volume in ends.iter().flat_map(|host| &host.volumes) {
            if known.insert(volume.vnr) {
                connection.volumes.push(PeerVolume { vnr: volume.vnr, options: OptionList::default() });
            }
        }
        for peer in &mut connection.volumes {
            inherit.list(&mut peer.options, &connection.disk);
            for volume in ends.iter().filter_map(|host| host.volume(peer.vnr)) {
                inherit.list(&mut peer.options, &volume.options.peer_device);
            }
        }
    }
    for host in &mut body.hosts {
        host.proxy = None;
    }
    Error::check(inherit.problems)?;
    Ok(body)
}

/// What missing volume statements mean.
fn finish_volume(volume: &mut Volume, stacked: bool) {
    volume.device = volume.device_path();
    if stacked {
        volume.meta_disk = Some(MetaDisk::Internal);
    } else if volume.is_diskless() {
        volume.meta_disk = None;
    } else if volume.meta_disk.is_none() {
        volume.meta_disk = Some(MetaDisk::Internal);
    }
}
