//! `resource`, `common`, host sections and volumes.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::section::DiskLevel;
use super::{Parsed, Parser, open};
use crate::error::{Loc, Notice, Problem, Shown};
use crate::lexer::{Kind, Token};
use crate::model::{
    Body, CONNECTIONS_MAX, Common, Connection, DiskOptions, HOSTS_MAX, Host, HostKind, MetaDisk,
    ProxyOptions, Resource, VOLUMES_MAX, Volume,
};
use crate::options::{Class, OptionList, SetOption, find_in};

/// A body and the template that stands in for `common`.
pub(super) struct ParsedBody {
    pub body: Body,
    pub template: Option<Arc<Common>>,
}

/// Accepts implicit volume statements at one level.
struct Statements<'s> {
    /// Prefix of the uniqueness keys.
    key: &'s str,
    /// In a host section each may stand once; in a resource a later one replaces an earlier one, but for
    /// `device`.
    in_host: bool,
}

impl Parser<'_> {
    pub(super) fn resource(&mut self) -> Parsed<Resource> {
        let name = self.string("TK_STRING")?;
        if name.is_empty() {
            return Err(Box::new(Problem::EmptyName));
        }
        if name.chars().any(char::is_control) {
            return Err(Box::new(Problem::ControlCharacterInName));
        }
        self.punct(b'{')?;
        let at = self.here();
        self.once("resource section", name.clone(), &at)?;
        let parsed = self.resource_body(Some(&name))?;
        Ok(Resource {
            name,
            at,
            body: parsed.body,
            template: parsed.template,
            numbered_links: false,
            connections: Vec::new(),
            expanded: Ok(Body::default()),
            foreign: BTreeMap::new(),
        })
    }

    /// The statements up to `}` or the end of the file. Without a name it is a common section.
    pub(super) fn resource_body(&mut self, name: Option<&str>) -> Parsed<ParsedBody> {
        let is_common = name.is_none();
        let key = name.unwrap_or("common").to_owned();
        let mut body = Body::default();
        let mut template = None;
        loop {
            let token = self.next()?;
            if token.is(b'}') || token.kind == Kind::End {
                self.sort_volumes(&mut body.volumes)?;
                return Ok(ParsedBody { body, template });
            }
            let at = self.here();
            match token.keyword() {
                "protocol" => self.protocol(&key, &at, &mut body.net)?,
                "on" | "floating" | "stacked-on-top-of" | "_this_host" if is_common => {
                    return Err(Box::new(Problem::HostInCommon { at }));
                }
                "on" | "floating" | "stacked-on-top-of" | "_this_host" => {
                    let host = self.host(&key, token.keyword())?;
                    body.hosts.push(host);
                    self.at_most(body.hosts.len(), HOSTS_MAX, "host sections")?;
                }
                "disk" if self.peek()?.is(b'{') => {
                    self.once("disk section", format!("{key}:disk"), &at)?;
                    self.disk_section(DiskLevel::Resource, &mut body.disk, Some(&mut body.net))?;
                }
                "net" => {
                    self.once("net section", format!("{key}:net"), &at)?;
                    self.net_section(&mut body.net)?;
                }
                "options" => {
                    self.once("resource options section", format!("{key}:res_options"), &at)?;
                    self.resource_options(&mut body.options)?;
                }
                "startup" => {
                    self.once("startup section", format!("{key}:startup"), &at)?;
                    self.startup_section(&mut body)?;
                }
                "handlers" => {
                    self.once("handlers section", format!("{key}:handlers"), &at)?;
                    self.handlers_section(&mut body.handlers)?;
                }
                "proxy" => {
                    self.once("proxy section", format!("{key}:proxy"), &at)?;
                    self.proxy_options(&mut body.proxy)?;
                }
                "syncer" => {
                    self.once("syncer section", format!("{key}:syncer"), &at)?;
                    self.syncer_section(&mut body)?;
                }
                "device" | "disk" | "meta-disk" | "flexible-meta-disk" => {
                    self.implicit(&Statements { key: &key, in_host: false }, &token, &mut body.volumes)?;
                }
                "volume" => self.volume(&mut body.volumes)?,
                "connection" => {
                    let connection = self.connection()?;
                    body.connections.push(connection);
                    self.at_most(body.connections.len(), CONNECTIONS_MAX, "connections")?;
                }
                "connection-mesh" => {
                    let mesh = self.mesh()?;
                    body.meshes.push(mesh);
                    self.at_most(body.meshes.len(), CONNECTIONS_MAX, "meshes")?;
                }
                "template-file" => {
                    let (file, common) = self.template_file()?;
                    body.template_file = Some(file);
                    template = Some(Arc::new(common));
                }
                "skip" => self.skip()?,
                _ => {
                    return self.expected(
                        "protocol | on | disk | net | syncer | startup | handlers | connection | ignore-on | stacked-on-top-of | skip",
                        &token,
                    );
                }
            }
        }
    }

    fn protocol(&mut self, key: &str, at: &Loc, net: &mut OptionList) -> Parsed<()> {
        self.once("protocol statement", format!("{key}: protocol"), at)?;
        let token = self.next()?;
        let Some(spec) = find_in(Class::Net, "protocol") else { return self.expected("protocol", &token) };
        if let Err(reason) = spec.validate(&token.text) {
            let value = Shown::new(&token.text, false);
            self.out.problems.push(Problem::BadValue {
                at: self.here(),
                option: spec.name.to_owned(),
                value,
                reason,
            });
        }
        self.punct(b';')?;
        net.push(SetOption::new(spec, token.text));
        Ok(())
    }

    /// `template-file NAME;`: the file holds one `common` section.
    fn template_file(&mut self) -> Parsed<(String, Common)> {
        let name = self.string("TK_STRING")?;
        let at = self.here();
        self.punct(b';')?;
        let path = self.beside(&name);
        let text = match open(self.source, &path) {
            Ok(text) => text,
            Err(Problem::CannotOpen { .. }) => {
                return Err(Box::new(Problem::MissingFile { at, what: "template", path: name }));
            }
            Err(problem) => return Err(Box::new(problem)),
        };
        // Sections of the template do not collide with those of the common section.
        let seen = std::mem::take(&mut self.seen);
        let common = self.nested(&path, text, |parser| {
            parser.keyword("common", "common")?;
            let at = parser.here();
            parser.punct(b'{')?;
            let body = parser.resource_body(None)?.body;
            Ok(Common { at, body })
        })?;
        self.seen = seen;
        Ok((name, common))
    }

    // ---- hosts ----

    fn host(&mut self, resource: &str, keyword: &str) -> Parsed<Host> {
        let (kind, address) = match keyword {
            "on" => {
                let names = self.names_before_brace()?;
                let at = self.here();
                for name in &names {
                    self.once("host section", format!("{resource}: on {name}"), &at)?;
                }
                (HostKind::On(names), None)
            }
            "floating" => {
                let address = self.address()?;
                let at = self.here();
                self.once("host section", format!("{resource}: on {}:{}", address.host, address.port), &at)?;
                let token = self.next()?;
                let kind = HostKind::Floating(address.clone());
                if token.is(b';') {
                    return Ok(self.new_host(kind, Some(address)));
                }
                if !token.is(b'{') {
                    return self.expected("{ | ;", &token);
                }
                (kind, Some(address))
            }
            "_this_host" => {
                self.punct(b'{')?;
                (HostKind::This, None)
            }
            _ => {
                let lower = self.string("TK_STRING")?;
                self.punct(b'{')?;
                let at = self.here();
                self.once("stacked-on-top-of", format!("stacked:{lower}"), &at)?;
                (HostKind::Stacked { lower, hosts: Vec::new(), floating: Vec::new() }, None)
            }
        };
        let host = self.new_host(kind, address);
        self.host_body(resource, host)
    }

    fn new_host(&self, kind: HostKind, address: Option<crate::model::Address>) -> Host {
        Host {
            at: self.here(),
            kind,
            node_id: None,
            address,
            volumes: Vec::new(),
            options: OptionList::default(),
            proxy: None,
        }
    }

    fn host_body(&mut self, resource: &str, mut host: Host) -> Parsed<Host> {
        let stacked = matches!(host.kind, HostKind::Stacked { .. });
        let floating = matches!(host.kind, HostKind::Floating(_));
        let name = match &host.kind {
            // A host may have the name of the lower resource.
            HostKind::Stacked { lower, .. } => format!("stacked-on-top-of {lower}"),
            _ => host.names().first().cloned().unwrap_or_default(),
        };
        let key = format!("{resource}:{name}");
        loop {
            let token = self.next()?;
            if token.is(b'}') {
                self.sort_volumes(&mut host.volumes)?;
                return Ok(host);
            }
            let at = self.here();
            match token.keyword() {
                "node-id" => {
                    let id = self.ranged("node-id", 0, 32)?;
                    self.once("node-id statement", format!("{key}:node-id"), &at)?;
                    self.punct(b';')?;
                    // Descriptions of running resources carry ids of the same resource again.
                    if !matches!(host.kind, HostKind::This) {
                        self.once("node-id", format!("{resource}:{id}"), &at)?;
                    }
                    host.node_id = u32::try_from(id).ok();
                }
                "address" if floating => return Err(Box::new(Problem::AddressInFloating { at })),
                "address" => {
                    self.once("address statement", format!("{key}:address"), &at)?;
                    let known = self.out.problems.len();
                    host.address = Some(self.address()?);
                    self.punct(b';')?;
                    // A bad port is told once by the address and once by the statement.
                    if let Some(problem) = self.out.problems.get(known).cloned() {
                        self.out.problems.push(problem);
                    }
                }
                "proxy" => host.proxy = Some(self.proxy_on()?),
                "device" => {
                    self.implicit(&Statements { key: &key, in_host: true }, &token, &mut host.volumes)?;
                }
                "volume" => self.volume(&mut host.volumes)?,
                "options" if !stacked => self.resource_options(&mut host.options)?,
                "disk" if !stacked && self.peek()?.is(b'{') => {
                    self.once("disk section", format!("{key}:disk"), &at)?;
                    let mut options = DiskOptions::default();
                    self.disk_section(DiskLevel::Volume, &mut options, None)?;
                    if let Some(volume) = self.implicit_volume(&mut host.volumes, &at) {
                        volume.options = options;
                        volume.has_disk_section = true;
                    }
                }
                "disk" | "meta-disk" | "flexible-meta-disk" if !stacked => {
                    self.implicit(&Statements { key: &key, in_host: true }, &token, &mut host.volumes)?;
                }
                "skip" if !stacked => self.skip()?,
                _ if stacked => {
                    return self.expected("device | address | proxy | volume | node-id", &token);
                }
                _ => {
                    return self.expected(
                        "disk | device | address | meta-disk | flexible-meta-disk | node-id | skip",
                        &token,
                    );
                }
            }
        }
    }

    // ---- volumes ----

    /// The implicit volume 0 of a list. Where there are numbered ones, the statement is noted as a problem and
    /// goes nowhere.
    fn implicit_volume<'v>(&mut self, volumes: &'v mut Vec<Volume>, at: &Loc) -> Option<&'v mut Volume> {
        if volumes.is_empty() {
            volumes.push(Volume::new(at.clone(), 0, true));
        }
        let found = volumes.iter_mut().find(|volume| volume.implicit);
        if found.is_none() {
            self.out.problems.push(Problem::MixedVolumes { at: at.clone() });
        }
        found
    }

    /// A volume statement outside of any volume section.
    fn implicit(
        &mut self,
        statements: &Statements<'_>,
        token: &Token,
        volumes: &mut Vec<Volume>,
    ) -> Parsed<()> {
        let at = self.here();
        self.at_most(self.out.problems.len(), 1000, "misplaced statements")?;
        match self.implicit_volume(volumes, &at) {
            Some(volume) => self.volume_statement(token, &at, Some(statements), volume),
            None => {
                let mut nowhere = Volume::new(at.clone(), 0, true);
                self.volume_statement(token, &at, Some(statements), &mut nowhere)
            }
        }
    }

    /// `volume N { ... }`.
    fn volume(&mut self, volumes: &mut Vec<Volume>) -> Parsed<()> {
        let vnr = self.plain_integer("volume")?;
        self.punct(b'{')?;
        let mut volume = Volume::new(self.here(), vnr, false);
        loop {
            let token = self.next()?;
            let at = self.here();
            match token.keyword() {
                _ if token.is(b'}') => break,
                "disk" if self.peek()?.is(b'{') => {
                    volume.options = DiskOptions::default();
                    self.disk_section(DiskLevel::Volume, &mut volume.options, None)?;
                    volume.has_disk_section = true;
                }
                "device" | "disk" | "meta-disk" | "flexible-meta-disk" => {
                    self.volume_statement(&token, &at, None, &mut volume)?;
                }
                "tiebreaker" => {
                    let token = self.next()?;
                    volume.tiebreaker = match token.keyword() {
                        "yes" => Some(true),
                        "no" => Some(false),
                        _ => return self.expected("yes | no", &token),
                    };
                    self.punct(b';')?;
                }
                "skip" => self.skip()?,
                _ => return self.expected("device | disk | meta-disk | flex-meta-disk | }", &token),
            }
        }
        volumes.push(volume);
        self.at_most(volumes.len(), VOLUMES_MAX, "volumes")
    }

    fn volume_statement(
        &mut self,
        token: &Token,
        at: &Loc,
        unique: Option<&Statements<'_>>,
        volume: &mut Volume,
    ) -> Parsed<()> {
        let word = token.keyword();
        let name = if word == "flexible-meta-disk" { "meta-disk" } else { word };
        if let Some(statements) = unique
            && (statements.in_host || name == "device")
        {
            let what = match name {
                "device" => "device statement",
                "disk" => "disk statement",
                _ => "meta-disk statement",
            };
            self.once(what, format!("{}:{name}", statements.key), at)?;
        }
        match word {
            "device" => return self.device(volume),
            "disk" => {
                volume.disk = Some(self.string("TK_STRING | {")?);
                self.punct(b';')?;
            }
            "meta-disk" => volume.meta_disk = Some(self.meta_disk()?),
            _ => {
                let token = self.next()?;
                volume.meta_disk = Some(if token.text == "internal" {
                    MetaDisk::Internal
                } else {
                    MetaDisk::Flexible(self.name(token, "TK_STRING")?)
                });
                self.punct(b';')?;
            }
        }
        Ok(())
    }

    /// `device PATH [minor N];` or `device minor N;`.
    fn device(&mut self, volume: &mut Volume) -> Parsed<()> {
        let token = self.next()?;
        let at = self.here();
        if token.keyword() == "minor" {
            volume.minor = Some(self.plain_integer("minor")?);
            return self.punct(b';');
        }
        let name = self.name(token, "TK_STRING | minor")?;
        let short = name.strip_prefix("/dev/").unwrap_or(&name);
        let rest = short.strip_prefix("drbd");
        if rest.is_none() {
            self.out.problems.push(Problem::DeviceName { at: at.clone() });
        }
        let explicit = {
            let token = self.next()?;
            match token.keyword() {
                "minor" => {
                    let minor = self.plain_integer("minor")?;
                    self.punct(b';')?;
                    Some(minor)
                }
                _ if token.is(b';') => None,
                _ => return self.expected("minor | ;", &token),
            }
        };
        let Some(rest) = rest else {
            if explicit.is_none() {
                self.out.problems.push(Problem::NoMinor { at });
            }
            return Ok(());
        };
        let device = format!("/dev/{short}");
        let named: Option<u32> =
            if rest.bytes().all(|byte| byte.is_ascii_digit()) { rest.parse().ok() } else { None };
        match (explicit, named) {
            (None, None) => self.out.problems.push(Problem::NoMinor { at }),
            (Some(minor), None) if rest.starts_with('_') => {
                self.out.notices.push(Notice::ArbitraryDevice { at, device: device.clone(), minor });
            }
            (Some(minor), named) if named != Some(minor) => {
                self.out.problems.push(Problem::MinorMismatch { at, minor });
            }
            _ => {}
        }
        volume.minor = explicit.or(named);
        volume.device = Some(device);
        Ok(())
    }

    /// `internal;`, `DEVICE;` or `DEVICE [N];`.
    fn meta_disk(&mut self) -> Parsed<MetaDisk> {
        let token = self.next()?;
        if token.text == "internal" {
            self.punct(b';')?;
            return Ok(MetaDisk::Internal);
        }
        let device = self.name(token, "TK_STRING")?;
        let token = self.next()?;
        if token.is(b';') {
            return Ok(MetaDisk::Flexible(device));
        }
        if !token.is(b'[') {
            return self.expected("[ | ;", &token);
        }
        let index = self.plain_integer("meta-disk index")?;
        self.punct(b']')?;
        self.punct(b';')?;
        Ok(MetaDisk::Indexed { device, index })
    }

    fn sort_volumes(&self, volumes: &mut [Volume]) -> Parsed<()> {
        volumes.sort_by_key(|volume| volume.vnr);
        self.at_most(volumes.len(), VOLUMES_MAX, "volumes")
    }
}

/// Options of a proxy, empty.
pub(super) fn no_proxy_options() -> ProxyOptions {
    ProxyOptions::default()
}

/// A connection to fill.
pub(super) fn new_connection(at: Loc) -> Connection {
    Connection {
        at,
        implicit: false,
        paths: Vec::new(),
        net: OptionList::default(),
        disk: OptionList::default(),
        volumes: Vec::new(),
        peer_node_id: None,
        cstate: None,
    }
}
