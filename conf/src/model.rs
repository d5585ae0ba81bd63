//! The configuration as written, in the field's words. [`crate::Config::load`] makes it; `expand` derives
//! from it what is in effect.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, FileName, Loc, Notice};
use crate::options::{Class, OptionList};
use crate::view::HostIdentity;

/// Most host sections in one resource: node ids reach from 0 to 32 (spec/drbd-conf.md §5).
pub const HOSTS_MAX: usize = 64;
/// Most resources in one configuration.
pub const RESOURCES_MAX: usize = 16_384;
/// Most volumes in one list.
pub const VOLUMES_MAX: usize = 4096;
/// Most connections of one resource, those made of meshes included.
pub const CONNECTIONS_MAX: usize = 4096;
/// Most settings in one list of options.
pub const SETTINGS_MAX: usize = 256;

/// A loaded, checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    pub(crate) file: Arc<FileName>,
    /// `global { }`, if present.
    pub global: Option<Global>,
    /// `common { }`, if present.
    pub common: Option<Common>,
    pub(crate) resources: Vec<Resource>,
    /// Remarks made while loading; the caller prints them.
    pub notices: Vec<Notice>,
}

/// `global { }` (spec/drbd-conf.md §10).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Global {
    /// Where it starts.
    pub at: Loc,
    /// What is set in it; flags have the value `yes`.
    pub options: OptionList,
}

impl Global {
    /// Whether a flag such as `disable-ip-verification` is set.
    #[must_use]
    pub fn is_set(&self, name: &str) -> bool {
        self.options.get(name).is_some()
    }
}

/// `common { }` or the content of a template file.
#[derive(Debug, Clone)]
pub struct Common {
    /// Where it starts.
    pub at: Loc,
    /// Its statements; host sections are not allowed in it.
    pub body: Body,
}

/// One resource.
#[derive(Debug, Clone)]
pub struct Resource {
    /// Its name.
    pub name: String,
    /// Where its body starts.
    pub at: Loc,
    /// The statements as written.
    pub body: Body,
    /// Replaces the common section for this resource.
    pub template: Option<Arc<Common>>,
    /// Links of volumes carry the volume number even where there is no `volume` section.
    pub(crate) numbered_links: bool,
    /// All connections, those of meshes and the implicit one included, with hosts and addresses known.
    pub(crate) connections: Vec<Connection>,
    /// Everything inherited and every connection made explicit; an error if that cannot be done, which
    /// stops all commands but a plain dump.
    pub(crate) expanded: Result<Body, Error>,
    /// Volumes of the resources named in `resync-after` and `stacked-on-top-of`, by resource name; no
    /// entry for a resource that does not exist.
    pub(crate) foreign: BTreeMap<String, Vec<ForeignVolume>>,
}

/// A volume of another resource on some hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ForeignVolume {
    pub host: HostKind,
    pub vnr: u32,
    pub minor: u32,
    pub device: String,
}

/// The statements of `common` or `resource`.
#[derive(Debug, Clone, Default)]
pub struct Body {
    /// `template-file`, as written.
    pub template_file: Option<String>,
    /// Volumes at this level, sorted by number.
    pub volumes: Vec<Volume>,
    /// `on`, `floating` and `stacked-on-top-of`.
    pub hosts: Vec<Host>,
    /// `connection`.
    pub connections: Vec<Connection>,
    /// `connection-mesh`.
    pub meshes: Vec<Mesh>,
    /// `options`.
    pub options: OptionList,
    /// `net`, `protocol`, and what older sections moved here.
    pub net: OptionList,
    /// `disk`.
    pub disk: DiskOptions,
    /// `startup`.
    pub startup: OptionList,
    /// `stacked-timeouts` in `startup`.
    pub stacked_timeouts: bool,
    /// `handlers`.
    pub handlers: OptionList,
    /// `proxy`.
    pub proxy: ProxyOptions,
}

/// The three lists of `disk { }`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// Options of the backing device.
    pub attach: OptionList,
    /// Options of the minor.
    pub device: OptionList,
    /// Options of the peers' volumes.
    pub peer_device: OptionList,
}

impl DiskOptions {
    /// Whether nothing is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.attach.is_empty() && self.device.is_empty() && self.peer_device.is_empty()
    }

    /// All settings: attach, device, peer-device.
    pub fn iter(&self) -> impl Iterator<Item = &crate::options::SetOption> {
        self.attach.iter().chain(&self.device).chain(&self.peer_device)
    }

    pub(crate) fn list_mut(&mut self, class: Class) -> Option<&mut OptionList> {
        match class {
            Class::Attach => Some(&mut self.attach),
            Class::Device => Some(&mut self.device),
            Class::PeerDevice => Some(&mut self.peer_device),
            _ => None,
        }
    }
}

/// Options of a proxy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProxyOptions {
    /// Named options.
    pub options: OptionList,
    /// Lines of `plugin { }`: words joined by one blank, without the semicolon.
    pub plugins: Vec<String>,
}

impl ProxyOptions {
    /// Whether nothing is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.options.is_empty() && self.plugins.is_empty()
    }
}

/// A network endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    /// Family.
    pub family: Family,
    /// Text of the address as written, without brackets; not checked further.
    pub host: String,
    /// Port, 1 to 65535.
    pub port: u16,
}

impl fmt::Display for Address {
    /// The form of `drbdsetup` arguments: `ipv4:198.51.100.1:7789`, `ipv6:[2001:db8::1]:7789`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.family {
            Family::Ipv6 => write!(f, "{}:[{}]:{}", self.family, self.host, self.port),
            _ => write!(f, "{}:{}:{}", self.family, self.host, self.port),
        }
    }
}

impl Address {
    /// The form of configuration files: `ipv4 198.51.100.1:7789`.
    #[must_use]
    pub fn configured(&self) -> String {
        match self.family {
            Family::Ipv6 => format!("{} [{}]:{}", self.family, self.host, self.port),
            _ => format!("{} {}:{}", self.family, self.host, self.port),
        }
    }

    /// Loopback addresses may be used by many resources.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.host.starts_with("127.") || self.host == "::1"
    }

    /// The display name of a floating host section: every character but letters, digits and `+-._` becomes
    /// `_` (spec/drbd-conf.md §4).
    #[must_use]
    pub fn host_name(&self) -> String {
        format!("{}:{}", self.host, self.port)
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.' | '_') { c } else { '_' })
            .collect()
    }
}

/// Address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// TCP over IPv4.
    Ipv4,
    /// TCP over IPv6.
    Ipv6,
    /// Super sockets; also written `sci`.
    Ssocks,
    /// Sockets direct protocol.
    Sdp,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Ipv4 => "ipv4",
            Family::Ipv6 => "ipv6",
            Family::Ssocks => "ssocks",
            Family::Sdp => "sdp",
        })
    }
}

/// What a host section is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostKind {
    /// `on NAME...`: one of the named hosts.
    On(Vec<String>),
    /// `floating ADDRESS`: whichever host owns the address.
    Floating(Address),
    /// `stacked-on-top-of RESOURCE`: a host of the lower resource.
    Stacked {
        /// The lower resource.
        lower: String,
        /// Names of all its hosts.
        hosts: Vec<String>,
        /// Addresses of its floating hosts.
        floating: Vec<Address>,
    },
    /// `_this_host`: only in descriptions of a running resource.
    This,
}

/// A host section.
#[derive(Debug, Clone)]
pub struct Host {
    /// Where its body starts.
    pub at: Loc,
    /// Which hosts it is for.
    pub kind: HostKind,
    /// Node id, set or computed.
    pub node_id: Option<u32>,
    /// Its address; that of the section head for floating ones.
    pub address: Option<Address>,
    /// Volumes, sorted by number; those of the resource level are merged in.
    pub volumes: Vec<Volume>,
    /// `options`: kept and dumped, used by no command.
    pub options: OptionList,
    /// `proxy on ... { }`.
    pub proxy: Option<Proxy>,
}

impl HostKind {
    /// Whether a section of this kind is for `me`.
    #[must_use]
    pub fn is_for(&self, me: &HostIdentity) -> bool {
        let named = |names: &[String]| names.iter().any(|name| hostnames_equal(name, &me.name));
        match self {
            HostKind::On(names) => named(names),
            HostKind::Floating(address) => me.owns(address),
            HostKind::Stacked { hosts, floating, .. } => {
                named(hosts) || floating.iter().any(|address| me.owns(address))
            }
            HostKind::This => false,
        }
    }
}

impl Host {
    /// The names it is for.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        match &self.kind {
            HostKind::On(names) => names.clone(),
            HostKind::Floating(address) => vec![address.host_name()],
            HostKind::Stacked { hosts, .. } => hosts.clone(),
            HostKind::This => vec!["_this_host".to_owned()],
        }
    }

    /// A volume by number; volumes are sorted.
    #[must_use]
    pub fn volume(&self, vnr: u32) -> Option<&Volume> {
        let index = self.volumes.binary_search_by_key(&vnr, |volume| volume.vnr).ok()?;
        self.volumes.get(index)
    }

    pub(crate) fn volume_mut(&mut self, vnr: u32) -> Option<&mut Volume> {
        let index = self.volumes.binary_search_by_key(&vnr, |volume| volume.vnr).ok()?;
        self.volumes.get_mut(index)
    }

    /// All names joined with `sep`.
    pub(crate) fn joined(&self, sep: &str) -> String {
        self.names().join(sep)
    }
}

/// A volume of a resource or host section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Where its statements start.
    pub at: Loc,
    /// Volume number.
    pub vnr: u32,
    /// Made by `device`, `disk` or `meta-disk` outside of any `volume` section.
    pub implicit: bool,
    /// Device path, `/dev/drbdN`; none if only a minor was given.
    pub device: Option<String>,
    /// Minor number.
    pub minor: Option<u32>,
    /// Backing device; `none` for a diskless volume.
    pub disk: Option<String>,
    /// Where its metadata are.
    pub meta_disk: Option<MetaDisk>,
    /// `disk { }`.
    pub options: DiskOptions,
    /// `tiebreaker yes|no`.
    pub tiebreaker: Option<bool>,
    /// What came from the resource level.
    pub(crate) from_resource: FromResource,
    /// A `disk { }` section is present.
    pub(crate) has_disk_section: bool,
}

/// Which statements of a host's volume were copied from the resource level.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct FromResource {
    pub volume: bool,
    pub device: bool,
    pub disk: bool,
    pub meta_disk: bool,
}

impl Volume {
    pub(crate) fn new(at: Loc, vnr: u32, implicit: bool) -> Self {
        Self {
            at,
            vnr,
            implicit,
            device: None,
            minor: None,
            disk: None,
            meta_disk: None,
            options: DiskOptions::default(),
            tiebreaker: None,
            from_resource: FromResource::default(),
            has_disk_section: false,
        }
    }

    /// Path of the device: as written or made from the minor.
    #[must_use]
    pub fn device_path(&self) -> Option<String> {
        self.device.clone().or_else(|| self.minor.map(|minor| format!("/dev/drbd{minor}")))
    }

    /// Whether this host keeps no data of the volume.
    #[must_use]
    pub fn is_diskless(&self) -> bool {
        self.disk.as_deref().is_none_or(|disk| disk == "none")
    }
}

/// Where metadata are kept (spec/drbd-conf.md §6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetaDisk {
    /// At the end of the backing device.
    Internal,
    /// On a device of its own.
    Flexible(String),
    /// In slot `index` of 128 MiB on a shared device.
    Indexed {
        /// The device.
        device: String,
        /// The slot.
        index: u32,
    },
}

impl fmt::Display for MetaDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MetaDisk::Internal => f.write_str("internal"),
            MetaDisk::Flexible(device) => f.write_str(device),
            MetaDisk::Indexed { device, index } => write!(f, "{device} [{index}]"),
        }
    }
}

/// `connection { }`.
#[derive(Debug, Clone)]
pub struct Connection {
    /// Where its body starts.
    pub at: Loc,
    /// Made up for two hosts or out of a mesh.
    pub implicit: bool,
    /// Paths, each with two endpoints.
    pub paths: Vec<ConnectionPath>,
    /// `net { }`.
    pub net: OptionList,
    /// `disk { }`: peer-device options for all volumes.
    pub disk: OptionList,
    /// `volume N { disk { } }`.
    pub volumes: Vec<PeerVolume>,
    /// `_peer_node_id`, only in descriptions of a running resource.
    pub peer_node_id: Option<u32>,
    /// `_cstate`, only in descriptions of a running resource.
    pub cstate: Option<String>,
}

/// One path of a connection.
#[derive(Debug, Clone)]
pub struct ConnectionPath {
    /// Where it starts.
    pub at: Loc,
    /// Endpoints are written directly in the connection.
    pub implicit: bool,
    /// Two of them once checked.
    pub endpoints: Vec<Endpoint>,
}

/// One end of a path.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Where it is.
    pub at: Loc,
    /// How it is named.
    pub name: EndpointName,
    /// Address; taken from the host section where missing.
    pub address: Option<Address>,
    /// `port N`: overrides the host section's port.
    pub port: Option<u16>,
    /// `via proxy`.
    pub proxy: Option<Proxy>,
    /// `via outside-address`: what the peer contacts.
    pub outside: Option<Address>,
    /// Index of the host section in the resource, known after checking.
    pub(crate) host: Option<usize>,
}

/// How an endpoint names its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndpointName {
    /// `host NAME`.
    Host(String),
    /// `address ADDRESS`.
    Address,
    /// `_this_host ADDRESS`.
    This,
    /// `_remote_host ADDRESS`.
    Remote,
}

/// `volume N { disk { } }` in a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerVolume {
    /// Volume number.
    pub vnr: u32,
    /// Peer-device options.
    pub options: OptionList,
}

/// `connection-mesh { }`.
#[derive(Debug, Clone)]
pub struct Mesh {
    /// Where its body starts.
    pub at: Loc,
    /// Names of the hosts.
    pub hosts: Vec<String>,
    /// `net { }`.
    pub net: OptionList,
}

/// A proxy between two hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Where it is.
    pub at: Loc,
    /// Hosts it may run on.
    pub hosts: Vec<String>,
    /// Address towards the local engine.
    pub inside: Address,
    /// Address towards the peer's proxy.
    pub outside: Address,
    /// Its options.
    pub options: ProxyOptions,
}

/// Whether two host names mean the same host: case does not matter, and unless both have a domain only the
/// parts before the first dot count (spec/drbd-conf.md §4).
#[must_use]
pub fn hostnames_equal(a: &str, b: &str) -> bool {
    if a.contains('.') && b.contains('.') {
        return a.eq_ignore_ascii_case(b);
    }
    let short = |name: &str| name.split('.').next().unwrap_or_default().to_ascii_lowercase();
    short(a) == short(b)
}

impl Config {
    /// All resources in the order of the files.
    #[must_use]
    pub fn resources(&self) -> &[Resource] {
        &self.resources
    }

    /// A resource by name.
    #[must_use]
    pub fn resource(&self, name: &str) -> Option<&Resource> {
        self.resources.iter().find(|resource| resource.name == name)
    }

    /// Canonical name of the main file.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.file.canonical
    }
}
