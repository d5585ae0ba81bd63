//! `connection`, `path`, endpoints, `via` and `connection-mesh`.

use super::resource::{new_connection, no_proxy_options};
use super::{Parsed, Parser};
use crate::error::{Loc, Notice, Problem};
use crate::model::{
    Connection, ConnectionPath, Endpoint, EndpointName, HOSTS_MAX, Mesh, PeerVolume, Proxy, VOLUMES_MAX,
};
use crate::options::OptionList;

impl Parser<'_> {
    pub(super) fn connection(&mut self) -> Parsed<Connection> {
        if !self.peek()?.is(b'{') {
            let name = self.string("{")?;
            let at = self.here();
            self.out.notices.push(Notice::NamedConnection { at, name });
        }
        self.punct(b'{')?;
        let mut connection = new_connection(self.here());
        let mut has_net = false;
        loop {
            let token = self.next()?;
            let at = self.here();
            if token.is(b'}') {
                break;
            }
            match token.keyword() {
                "host" | "address" | "_this_host" | "_remote_host" => {
                    let endpoint = self.endpoint(token.keyword())?;
                    self.add_endpoint(&mut connection, endpoint, at);
                }
                "path" => {
                    if connection.paths.iter().any(|path| path.implicit) {
                        self.out.problems.push(Problem::MixedPaths { at });
                    }
                    let path = self.path()?;
                    connection.paths.push(path);
                    self.at_most(connection.paths.len(), 64, "paths")?;
                }
                "net" => {
                    if has_net {
                        return Err(Box::new(Problem::TwoNetsInConnection { at }));
                    }
                    has_net = true;
                    self.net_section(&mut connection.net)?;
                }
                "disk" => {
                    // A second section replaces the first, as in the reference.
                    connection.disk = OptionList::default();
                    self.peer_device_section(&mut connection.disk)?;
                }
                "volume" => {
                    let volume = self.peer_volume()?;
                    connection.volumes.push(volume);
                    self.at_most(connection.volumes.len(), VOLUMES_MAX, "volumes")?;
                }
                "_peer_node_id" => {
                    connection.peer_node_id = Some(self.plain_integer("_peer_node_id")?);
                    self.punct(b';')?;
                }
                "_cstate" => {
                    connection.cstate = Some(self.next()?.text);
                    self.punct(b';')?;
                }
                "_is_standalone" => {
                    connection.cstate = Some("StandAlone".to_owned());
                    self.punct(b';')?;
                }
                "_unknown" => {
                    self.next()?;
                    self.punct(b';')?;
                }
                "skip" => self.skip()?,
                _ => return self.expected("host | net | skip | }", &token),
            }
        }
        if connection.paths.is_empty() && connection.peer_node_id.is_none() {
            self.out.problems.push(Problem::NoPath { at: connection.at.clone() });
        }
        Ok(connection)
    }

    /// An endpoint written directly in a connection makes its implicit path.
    fn add_endpoint(&mut self, connection: &mut Connection, endpoint: Endpoint, at: Loc) {
        match connection.paths.first_mut() {
            None => connection.paths.push(ConnectionPath {
                at: connection.at.clone(),
                implicit: true,
                endpoints: vec![endpoint],
            }),
            Some(path) if !path.implicit => self.out.problems.push(Problem::MixedPaths { at }),
            Some(path) if path.endpoints.len() >= 2 => {
                self.out
                    .problems
                    .push(Problem::TooManyEndpoints { at: connection.at.clone(), what: "connection" });
            }
            Some(path) => path.endpoints.push(endpoint),
        }
    }

    fn path(&mut self) -> Parsed<ConnectionPath> {
        self.punct(b'{')?;
        let mut path = ConnectionPath { at: self.here(), implicit: false, endpoints: Vec::new() };
        loop {
            let token = self.next()?;
            if token.is(b'}') {
                return Ok(path);
            }
            match token.keyword() {
                "host" | "address" | "_this_host" | "_remote_host" => {
                    let endpoint = self.endpoint(token.keyword())?;
                    if path.endpoints.len() >= 2 {
                        let at = path.at.clone();
                        self.out.problems.push(Problem::TooManyEndpoints { at, what: "path" });
                        self.at_most(self.out.problems.len(), 1000, "bad endpoints")?;
                    } else {
                        path.endpoints.push(endpoint);
                    }
                }
                _ => return self.expected("host | }", &token),
            }
        }
    }

    fn endpoint(&mut self, keyword: &str) -> Parsed<Endpoint> {
        let mut endpoint = Endpoint {
            at: self.here(),
            name: EndpointName::Address,
            address: None,
            port: None,
            proxy: None,
            outside: None,
            host: None,
        };
        match keyword {
            "host" => {
                endpoint.name = EndpointName::Host(self.string("TK_STRING")?);
                match self.peek()?.keyword() {
                    "address" => {
                        self.next()?;
                        endpoint.address = Some(self.address()?);
                    }
                    "port" => {
                        self.next()?;
                        endpoint.port = Some(self.port()?);
                    }
                    _ => {}
                }
            }
            _ => {
                endpoint.address = Some(self.address()?);
                endpoint.name = match keyword {
                    "_this_host" => EndpointName::This,
                    "_remote_host" => EndpointName::Remote,
                    _ => EndpointName::Address,
                };
            }
        }
        let token = self.next()?;
        if token.is(b';') {
            // A dump has another one here.
            if endpoint.name == EndpointName::Address && self.peek()?.is(b';') {
                self.next()?;
            }
            return Ok(endpoint);
        }
        if token.keyword() != "via" {
            let located = endpoint.address.is_some() || endpoint.port.is_some();
            return self.expected(if located { "via | ; " } else { "address | port | ;" }, &token);
        }
        let token = self.next()?;
        match token.keyword() {
            "outside-address" => {
                endpoint.outside = Some(self.address()?);
                self.punct(b';')?;
            }
            "proxy" => endpoint.proxy = Some(self.proxy_on()?),
            _ => return self.expected("TK_PROXY", &token),
        }
        Ok(endpoint)
    }

    /// `on NAME... { inside ...; outside ...; options { } }`.
    pub(super) fn proxy_on(&mut self) -> Parsed<Proxy> {
        self.keyword("on", "TK_ON")?;
        let hosts = self.names_before_brace()?;
        let at = self.here();
        let (mut inside, mut outside, mut options) = (None, None, no_proxy_options());
        loop {
            let token = self.next()?;
            match token.keyword() {
                _ if token.is(b'}') => break,
                "inside" => {
                    inside = Some(self.address()?);
                    self.punct(b';')?;
                }
                "outside" => {
                    outside = Some(self.address()?);
                    self.punct(b';')?;
                }
                "options" => self.proxy_options(&mut options)?,
                _ => return self.expected("inside | outside", &token),
            }
        }
        let missing = |key: &'static str| {
            Box::new(Problem::ProxyAddressMissing { at: at.clone(), hosts: hosts.join(" "), key })
        };
        let inside = inside.ok_or_else(|| missing("inside"))?;
        let outside = outside.ok_or_else(|| missing("outside"))?;
        Ok(Proxy { at, hosts, inside, outside, options })
    }

    /// `volume N { disk { } }`.
    fn peer_volume(&mut self) -> Parsed<PeerVolume> {
        let vnr = self.plain_integer("volume")?;
        self.punct(b'{')?;
        let mut volume = PeerVolume { vnr, options: OptionList::default() };
        loop {
            let token = self.next()?;
            if token.is(b'}') {
                return Ok(volume);
            }
            if token.keyword() != "disk" {
                return self.expected("TK_DISK", &token);
            }
            self.peer_device_section(&mut volume.options)?;
        }
    }

    pub(super) fn mesh(&mut self) -> Parsed<Mesh> {
        self.punct(b'{')?;
        let mut mesh = Mesh { at: self.here(), hosts: Vec::new(), net: OptionList::default() };
        let mut has_net = false;
        loop {
            let token = self.next()?;
            let at = self.here();
            match token.keyword() {
                _ if token.is(b'}') => return Ok(mesh),
                "hosts" => {
                    mesh.hosts.push(self.string("TK_STRING")?);
                    loop {
                        let token = self.next()?;
                        if token.is(b';') {
                            break;
                        }
                        mesh.hosts.push(self.name(token, "TK_STRING | ';'")?);
                        self.at_most(mesh.hosts.len(), HOSTS_MAX * 4, "hosts in a mesh")?;
                    }
                }
                "net" => {
                    if has_net {
                        return Err(Box::new(Problem::TwoNetsInMesh { at }));
                    }
                    has_net = true;
                    self.net_section(&mut mesh.net)?;
                }
                _ => return self.expected("hosts | net | }", &token),
            }
        }
    }
}
