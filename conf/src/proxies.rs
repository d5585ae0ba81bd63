//! Connections that pass through a proxy on one host: what `drbd-proxy-ctl` is told about them. It knows
//! nothing of that tool's words.

use crate::error::Error;
use crate::model::{Address, Endpoint, Host, ProxyOptions, Resource, hostnames_equal};
use crate::view::HostIdentity;

/// A path of a connection whose proxy runs on this host.
#[derive(Debug, Clone)]
pub struct ProxyView {
    /// Name of the resource.
    pub resource: String,
    /// `RESOURCE-PEER-OWN`, with the names of the two hosts that replicate.
    pub name: String,
    /// The peer's host names.
    pub peer_names: Vec<String>,
    /// The peer's node id; computed ones included.
    pub peer_node_id: Option<u32>,
    /// Where the proxy listens for the engine.
    pub own_inside: Address,
    /// Where the proxy listens for the peer's proxy.
    pub own_outside: Address,
    /// Where the peer's proxy listens.
    pub peer_outside: Address,
    /// Where the engine listens.
    pub own: Address,
    /// Options and plugins, inherited ones included.
    pub options: ProxyOptions,
}

impl Resource {
    /// The proxied paths whose proxy on one side runs on `me`.
    ///
    /// # Errors
    /// What keeps the resource from being expanded, and what [`Resource::command_checks`] finds.
    pub fn proxies(&self, me: &HostIdentity) -> Result<Vec<ProxyView>, Error> {
        self.command_checks(me)?;
        let body = self.expanded.as_ref().map_err(Clone::clone)?;
        let paths = body.connections.iter().flat_map(|connection| &connection.paths);
        Ok(paths
            .filter_map(|path| {
                let [a, b] = path.endpoints.as_slice() else { return None };
                let here = |end: &Endpoint| {
                    let hosts = end.proxy.iter().flat_map(|proxy| &proxy.hosts);
                    hosts.into_iter().any(|name| hostnames_equal(name, &me.name))
                };
                let (own, peer) = if here(a) { (a, b) } else { (b, a) };
                here(own).then(|| self.proxy_view(own, peer, &body.hosts)).flatten()
            })
            .collect())
    }

    fn proxy_view(&self, own: &Endpoint, peer: &Endpoint, hosts: &[Host]) -> Option<ProxyView> {
        let (own_host, peer_host) = (hosts.get(own.host?)?, hosts.get(peer.host?)?);
        let (own_proxy, peer_proxy) = (own.proxy.as_ref()?, peer.proxy.as_ref()?);
        Some(ProxyView {
            resource: self.name.clone(),
            name: format!("{}-{}-{}", self.name, peer_host.joined("_"), own_host.joined("_")),
            peer_names: peer_host.names(),
            peer_node_id: peer_host.node_id,
            own_inside: own_proxy.inside.clone(),
            own_outside: own_proxy.outside.clone(),
            peer_outside: peer_proxy.outside.clone(),
            own: own.address.clone()?,
            options: own_proxy.options.clone(),
        })
    }
}
