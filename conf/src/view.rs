//! What one host needs to know about a resource to bring it up.

use std::net::IpAddr;

use crate::check::resync_after;
use crate::error::{Error, Loc, Problem};
use crate::model::{
    Address, Body, Connection, Endpoint, ForeignVolume, Host, HostKind, MetaDisk, Proxy, Resource, Volume,
    hostnames_equal,
};
use crate::options::{Class, OptionList, SetOption, find_in};

/// Who is looking: `uname -n`, and for `floating` sections the addresses of this host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostIdentity {
    /// Host name.
    pub name: String,
    /// Addresses of interfaces that are up.
    pub addresses: Vec<IpAddr>,
}

impl From<&str> for HostIdentity {
    fn from(name: &str) -> Self {
        Self { name: name.to_owned(), addresses: Vec::new() }
    }
}

impl HostIdentity {
    /// Whether the address (text of the configuration, scope allowed) is one of this host. For tests the
    /// host name may equal the address (spec/drbd-conf.md §4).
    pub(crate) fn owns(&self, address: &Address) -> bool {
        self.name == address.host || self.has(address)
    }

    fn has(&self, address: &Address) -> bool {
        let bare = address.host.split('%').next().unwrap_or_default();
        bare.parse::<IpAddr>().is_ok_and(|ip| self.addresses.contains(&ip))
    }
}

/// One resource as seen from one host. Options are those explicitly set (here or at a wider level), each
/// once, with the value as written; [`SetOption::canonical`] converts units.
#[derive(Debug, Clone)]
pub struct HostView {
    /// Name of the resource.
    pub resource: String,
    /// Where it is defined, with the canonical name of the file.
    pub at: Loc,
    /// Names this host's section is for.
    pub host_names: Vec<String>,
    /// Own node id.
    pub node_id: u32,
    /// Own volumes, sorted by number.
    pub volumes: Vec<VolumeView>,
    /// The other ends, in the order of the connections.
    pub peers: Vec<PeerView>,
    /// Resource options.
    pub options: OptionList,
    /// Handlers: command lines for `/bin/sh -c`.
    pub handlers: OptionList,
    /// Startup options.
    pub startup: OptionList,
    /// `stacked-timeouts`.
    pub stacked_timeouts: bool,
    /// The lower resource if this one is stacked here.
    pub stacked_on: Option<String>,
}

/// A volume of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeView {
    /// Volume number.
    pub vnr: u32,
    /// Minor number.
    pub minor: u32,
    /// Device path, such as `/dev/drbd10`.
    pub device: String,
    /// Backing device; none for a diskless volume. For a stacked resource, the lower device.
    pub disk: Option<String>,
    /// Where its metadata are; none for a diskless volume.
    pub meta_disk: Option<MetaDisk>,
    /// Made without a `volume` section.
    pub implicit: bool,
    /// Its link by resource name carries the volume number.
    pub has_numbered_link: bool,
    /// Options for attaching; `resync-after` holds a minor or is left out, see
    /// [`Resource::resync_after_problems`].
    pub attach_options: OptionList,
    /// Options for creating the minor (`diskless` is up to the caller).
    pub device_options: OptionList,
}

/// One connection.
#[derive(Debug, Clone)]
pub struct PeerView {
    /// The peer's node id.
    pub node_id: u32,
    /// The peer's names; the first is the usual one.
    pub host_names: Vec<String>,
    /// Name of the connection: `_name`, or all host names joined with `_`.
    pub connection_name: String,
    /// Paths in order.
    pub paths: Vec<PathView>,
    /// Options of the connection, without `_name`.
    pub net: OptionList,
    /// Volumes of the peer, in the order in which their options are set.
    pub volumes: Vec<PeerVolumeView>,
    /// The peer has no disk in any volume.
    pub diskless: bool,
    /// Whether the connection was made up for two hosts or a mesh.
    pub implicit: bool,
}

impl PeerView {
    /// The peer's first host name.
    #[must_use]
    pub fn host_name(&self) -> &str {
        self.host_names.first().map_or("", String::as_str)
    }
}

/// One path of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathView {
    /// Where this host listens.
    pub own: Address,
    /// What this host connects to: the local proxy's inside, the peer's outside address, or its address.
    pub peer: Address,
    /// The proxy on this side.
    pub own_proxy: Option<Proxy>,
    /// The proxy on the peer's side.
    pub peer_proxy: Option<Proxy>,
}

/// A volume as kept by a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerVolumeView {
    /// Volume number.
    pub vnr: u32,
    /// The peer has no disk for it.
    pub diskless: bool,
    /// Peer-device options; with `bitmap no` for diskless peers and `peer-tiebreaker no` for peers whose
    /// volume is no tiebreaker.
    pub options: OptionList,
}

impl Resource {
    /// Index of this host's section.
    fn own_section(&self, me: &HostIdentity) -> Option<usize> {
        self.body.hosts.iter().position(|host| host.kind.is_for(me))
    }

    /// Whether no host section is for `me`: `all` skips the resource then.
    #[must_use]
    pub fn is_ignored(&self, me: &HostIdentity) -> bool {
        self.own_section(me).is_none() && !self.is_proxy_node(me)
    }

    /// Whether this host only runs a proxy of the resource.
    #[must_use]
    pub fn is_proxy_node(&self, me: &HostIdentity) -> bool {
        let named = self.proxy_hosts().any(|name| hostnames_equal(name, &me.name));
        named && self.own_section(me).is_none()
    }

    /// Whether any of its connections passes through a proxy.
    #[must_use]
    pub fn has_proxies(&self) -> bool {
        self.proxy_hosts().next().is_some()
    }

    fn proxy_hosts(&self) -> impl Iterator<Item = &String> {
        let endpoints = self.body.connections.iter().flat_map(|connection| &connection.paths);
        let proxies = endpoints
            .flat_map(|path| &path.endpoints)
            .filter_map(|endpoint| endpoint.proxy.as_ref())
            .chain(self.body.hosts.iter().filter_map(|host| host.proxy.as_ref()));
        proxies.flat_map(|proxy| &proxy.hosts)
    }

    /// Whether the resource lies on top of another one.
    #[must_use]
    pub fn is_stacked(&self) -> bool {
        self.body.hosts.iter().any(|host| matches!(host.kind, HostKind::Stacked { .. }))
    }

    /// At most one host section may be for one host.
    pub(crate) fn two_sections(&self, me: &HostIdentity) -> Option<Problem> {
        let mut own = self.body.hosts.iter().filter(|host| host.kind.is_for(me));
        let (first, second) = (own.next()?, own.next()?);
        Some(Problem::TwoSectionsForHost {
            at: first.at.resolved(),
            resource: self.name.clone(),
            first: first.joined(" "),
            second: second.joined(" "),
        })
    }

    /// The checks that depend on the host, made before commands and dumps but not while loading
    /// (spec/drbd-conf.md §9).
    ///
    /// # Errors
    /// No host section at all, several for this host, proxies on one side only.
    pub fn command_checks(&self, me: &HostIdentity) -> Result<(), Error> {
        let mut problems = Vec::new();
        let at = self.at.resolved();
        let resource = || self.name.clone();
        problems.extend(self.two_sections(me));
        if self.body.hosts.is_empty() {
            problems.push(Problem::NoHostSection {
                at: at.clone(),
                resource: resource(),
                host: me.name.clone(),
            });
        }
        let proxies = self.body.hosts.iter().filter(|host| host.proxy.is_some()).count();
        if proxies != 0 && proxies != self.body.hosts.len() {
            problems.push(Problem::ProxyInSomeHosts { at: at.clone(), resource: resource() });
        }
        for connection in self.expanded.as_ref().map(|body| body.connections.as_slice()).unwrap_or_default() {
            for path in &connection.paths {
                let proxies = path.endpoints.iter().filter(|endpoint| endpoint.proxy.is_some()).count();
                if proxies == 1 {
                    let at = if connection.implicit { at.implied() } else { connection.at.resolved() };
                    problems.push(Problem::ProxyInSomeEndpoints { at, resource: resource() });
                }
            }
        }
        Error::check(problems)
    }

    /// Checks that the address of this host's section exists here (spec/drbd-conf.md §8.2). The caller
    /// decides when that matters (`disable-ip-verification`, dry runs).
    ///
    /// # Errors
    /// [`Problem::AddressNotLocal`].
    pub fn check_address(&self, me: &HostIdentity) -> Result<(), Error> {
        use crate::model::Family::{Ipv4, Ipv6};
        let Some(host) = self.own_section(me).and_then(|index| self.body.hosts.get(index)) else {
            return Ok(());
        };
        match &host.address {
            Some(address) if matches!(address.family, Ipv4 | Ipv6) && !me.has(address) => {
                Err(Problem::AddressNotLocal {
                    file: host.at.resolved().file().to_owned(),
                    resource: self.name.clone(),
                    host: host.joined(" "),
                    address: address.host.clone(),
                }
                .into())
            }
            _ => Ok(()),
        }
    }

    /// The resource as seen from the host called `hostname`.
    ///
    /// # Errors
    /// [`Problem::NotDefinedHere`] if no host section is for it, [`Problem::ProxyNode`] if it only runs a
    /// proxy, and everything that keeps the resource from being used.
    pub fn view(&self, hostname: &str) -> Result<HostView, Error> {
        self.view_as(&HostIdentity::from(hostname))
    }

    /// Like [`Resource::view`], with the addresses that `floating` sections are matched by.
    ///
    /// # Errors
    /// As for [`Resource::view`].
    pub fn view_as(&self, me: &HostIdentity) -> Result<HostView, Error> {
        self.command_checks(me)?;
        let body = self.expanded.as_ref().map_err(Clone::clone)?;
        let Some((index, host)) =
            self.own_section(me).and_then(|index| body.hosts.get(index).map(|host| (index, host)))
        else {
            return Err(if self.is_proxy_node(me) {
                Problem::ProxyNode { resource: self.name.clone(), host: me.name.clone() }.into()
            } else {
                Problem::NotDefinedHere { resource: self.name.clone() }.into()
            });
        };
        let stacked_on = match &host.kind {
            HostKind::Stacked { lower, .. } => Some(lower.clone()),
            _ => None,
        };
        Ok(HostView {
            resource: self.name.clone(),
            at: self.at.resolved(),
            host_names: host.names(),
            node_id: self.id_of(host)?,
            volumes: host.volumes.iter().filter_map(|volume| self.volume(volume, host, me)).collect(),
            peers: self.peers(body, index)?,
            options: body.options.deduplicated(),
            handlers: body.handlers.deduplicated(),
            startup: body.startup.deduplicated(),
            stacked_timeouts: body.stacked_timeouts,
            stacked_on,
        })
    }

    fn id_of(&self, host: &Host) -> Result<u32, Error> {
        host.node_id.ok_or_else(|| {
            Problem::Missing {
                at: host.at.resolved(),
                resource: self.name.clone(),
                host: host.joined(" "),
                key: "node-id",
            }
            .into()
        })
    }

    /// The device under a volume of a stacked resource.
    pub(crate) fn lower_device(&self, lower: &str, vnr: u32) -> Option<&str> {
        let volume = self.foreign.get(lower)?.iter().find(|volume| volume.vnr == vnr)?;
        Some(&volume.device)
    }

    /// Volumes of another resource on this host.
    fn foreign_here<'a>(
        &'a self,
        name: &str,
        me: &'a HostIdentity,
    ) -> Option<impl Iterator<Item = &'a ForeignVolume>> {
        let volumes = self.foreign.get(name)?;
        Some(volumes.iter().filter(|volume| volume.host.is_for(me)))
    }

    fn volume(&self, volume: &Volume, host: &Host, me: &HostIdentity) -> Option<VolumeView> {
        let disk = match &host.kind {
            HostKind::Stacked { lower, .. } => self
                .foreign_here(lower, me)?
                .find(|below| below.vnr == volume.vnr)
                .map(|below| below.device.clone()),
            _ => volume.disk.clone().filter(|_| !volume.is_diskless()),
        };
        let mut attach_options = OptionList::default();
        for option in &volume.options.attach.deduplicated() {
            if option.name() != "resync-after" {
                attach_options.push(option.clone());
            } else if let Ok(minor) = self.resync_minor(option.value(), me) {
                attach_options.push(SetOption::new(option.spec, minor.to_string()));
            }
        }
        Some(VolumeView {
            vnr: volume.vnr,
            minor: volume.minor?,
            device: volume.device_path()?,
            meta_disk: volume.meta_disk.clone().filter(|_| disk.is_some()),
            disk,
            implicit: volume.implicit,
            has_numbered_link: !volume.implicit || self.numbered_links,
            attach_options,
            device_options: volume.options.device.deduplicated(),
        })
    }

    /// The minor a `resync-after` value stands for on this host.
    fn resync_minor(&self, value: &str, me: &HostIdentity) -> Result<u32, Problem> {
        let (target, vnr) = resync_after(value);
        let at = self.at.resolved();
        let resource = self.name.clone();
        let Some(volumes) = self.foreign_here(target, me) else {
            return Err(Problem::ResyncAfterUnknown { at, resource, target: target.to_owned(), on_host: "" });
        };
        let volumes: Vec<&ForeignVolume> = volumes.filter(|v| vnr.is_none_or(|vnr| vnr == v.vnr)).collect();
        match volumes.as_slice() {
            [volume] => Ok(volume.minor),
            [] => Err(Problem::ResyncAfterUnknown {
                at,
                resource,
                target: target.to_owned(),
                on_host: " on this host",
            }),
            _ => Err(Problem::ResyncAfterAmbiguous {
                at,
                resource,
                target: value.to_owned(),
                volumes: volumes.len(),
            }),
        }
    }

    /// What is wrong with the `resync-after` options on this host. The view leaves such an option out; the
    /// reference treats it as fatal only when run from a terminal.
    #[must_use]
    pub fn resync_after_problems(&self, me: &HostIdentity) -> Vec<Problem> {
        let Ok(body) = &self.expanded else { return Vec::new() };
        let Some(host) = self.own_section(me).and_then(|index| body.hosts.get(index)) else {
            return Vec::new();
        };
        let values = host.volumes.iter().filter_map(|volume| volume.options.attach.value("resync-after"));
        values.filter_map(|value| self.resync_minor(value, me).err()).collect()
    }

    fn peers(&self, body: &Body, own: usize) -> Result<Vec<PeerView>, Error> {
        let mut peers = Vec::new();
        for connection in &body.connections {
            let mut paths = Vec::new();
            let mut peer_index = None;
            for path in &connection.paths {
                let [a, b] = path.endpoints.as_slice() else { continue };
                let (mine, theirs) = if a.host == Some(own) { (a, b) } else { (b, a) };
                let (true, Some(index)) = (mine.host == Some(own), theirs.host) else { continue };
                if index == own {
                    continue;
                }
                if let Some(path) = path_view(mine, theirs) {
                    paths.push(path);
                    peer_index.get_or_insert(index);
                }
            }
            let Some(peer) = peer_index.and_then(|index| body.hosts.get(index)) else { continue };
            peers.push(self.peer(connection, peer, paths)?);
        }
        Ok(peers)
    }

    fn peer(&self, connection: &Connection, peer: &Host, paths: Vec<PathView>) -> Result<PeerView, Error> {
        let stacked = matches!(peer.kind, HostKind::Stacked { .. });
        let mut net = connection.net.deduplicated();
        let connection_name = net.value("_name").map_or_else(|| peer.joined("_"), str::to_owned);
        net.remove("_name");
        let volumes: Vec<PeerVolumeView> = connection
            .volumes
            .iter()
            .map(|volume| {
                let theirs = peer.volume(volume.vnr);
                let diskless = !stacked && theirs.is_none_or(Volume::is_diskless);
                let mut options = volume.options.deduplicated();
                let mut append = |name: &str| {
                    if let Some(spec) = find_in(Class::PeerDevice, name) {
                        options.remove(name);
                        options.push(SetOption::new(spec, "no"));
                    }
                };
                if diskless {
                    append("bitmap");
                }
                if theirs.is_some_and(|theirs| theirs.tiebreaker == Some(false)) {
                    append("peer-tiebreaker");
                }
                PeerVolumeView { vnr: volume.vnr, diskless, options }
            })
            .collect();
        Ok(PeerView {
            node_id: self.id_of(peer)?,
            host_names: peer.names(),
            connection_name,
            paths,
            net,
            diskless: !volumes.is_empty() && volumes.iter().all(|volume| volume.diskless),
            volumes,
            implicit: connection.implicit,
        })
    }
}

fn path_view(mine: &Endpoint, theirs: &Endpoint) -> Option<PathView> {
    let peer = match (&mine.proxy, &theirs.outside) {
        (Some(proxy), _) => &proxy.inside,
        (None, Some(outside)) => outside,
        (None, None) => theirs.address.as_ref()?,
    };
    Some(PathView {
        own: mine.address.clone()?,
        peer: peer.clone(),
        own_proxy: mine.proxy.clone(),
        peer_proxy: theirs.proxy.clone(),
    })
}
