//! All peers of the resource: their paths, connect loops and links, and the listeners they share.

use super::dial::{Action, Dialer, Path, parse_first_packet};
use super::link::{Link, LinkId};
use crate::core_api::{Input, LinkError, NodeId, Stream, Time};
use crate::engine::{Engine, LINGER, Token};
use crate::options::Transport;
use crate::ring::{Buf, Fd, Key, Op};
use bytes::Bytes;
use palisade_wire::{DecodeCtx, Packet};
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

/// Incoming sockets whose first packet has not come yet.
const INCOMING_MAX: usize = 64;
/// How often a listener that cannot be opened is tried again.
const LISTEN_RETRY: Duration = Duration::from_secs(1);
/// After an orderly end of the control stream: how long the data stream may still deliver.
const DRAIN: Duration = Duration::from_millis(200);

pub(crate) mod listener {
    //! Which listener of a volume an NBD client came through.

    /// Kind of NBD listener.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Socket {
        /// The unix socket.
        Unix,
        /// The TCP socket.
        Tcp,
    }
}

/// A peer as the network sees it.
#[derive(Debug)]
pub(crate) struct NetPeer {
    pub paths: Vec<Path>,
    pub transport: Transport,
    dialer: Option<(u64, Dialer)>,
    link: Option<LinkId>,
    /// The path of the link.
    pub established: Option<Path>,
}

impl NetPeer {
    pub(crate) fn new(transport: Transport) -> Self {
        Self { paths: Vec::new(), transport, dialer: None, link: None, established: None }
    }

    /// Whether it tries to connect or is connected.
    pub(crate) fn is_active(&self) -> bool {
        self.dialer.is_some() || self.link.is_some()
    }
}

#[derive(Debug)]
struct Listener {
    fd: Fd,
    accept: Key,
}

#[derive(Debug)]
struct Incoming {
    fd: Fd,
    peer: u8,
    path: usize,
    until: Time,
}

/// Everything about replication sockets.
#[derive(Debug, Default)]
pub(crate) struct Net {
    pub peers: BTreeMap<u8, NetPeer>,
    links: HashMap<LinkId, Link>,
    listeners: BTreeMap<SocketAddr, Listener>,
    listen_retry: Option<Time>,
    incoming: HashMap<u64, Incoming>,
}

impl Net {
    /// When something has to happen without I/O.
    pub(crate) fn deadline(&self) -> Option<Time> {
        let dialers = self.peers.values().filter_map(|p| p.dialer.as_ref()).map(|(_, d)| d.deadline());
        let links = self.links.values().filter_map(|l| self.link_deadline(l));
        let incoming = self.incoming.values().map(|i| i.until);
        dialers.chain(links).chain(incoming).chain(self.listen_retry).min()
    }

    fn link_deadline(&self, link: &Link) -> Option<Time> {
        let stalled = self
            .peers
            .get(&link.peer)
            .and_then(|p| link.send_deadline(p.transport.timeout, p.transport.ko_count));
        [link.closing, link.control_gone, stalled].into_iter().flatten().min()
    }

    /// Whether writers should wait because a peer's stream is full.
    pub(crate) fn is_congested(&self) -> bool {
        self.links.values().any(|l| l.closing.is_none() && l.is_congested())
    }
}

impl Engine {
    /// The core wants a link.
    pub(crate) fn peer_connect(&mut self, peer: u8) {
        let (now, attempt) = (self.now(), self.id());
        let random = crate::sys::random_bytes().map_or(attempt, u64::from_ne_bytes);
        let Some(p) = self.net.peers.get_mut(&peer) else { return };
        let timing = super::Timing {
            connect_int: p.transport.connect_int,
            check: p.transport.check,
            sndbuf: p.transport.sndbuf,
            rcvbuf: p.transport.rcvbuf,
        };
        p.dialer = Some((attempt, Dialer::new(p.paths.clone(), timing, now, random)));
        self.listen();
    }

    /// The core does not want a link (any more).
    pub(crate) fn peer_close(&mut self, peer: u8) {
        let until = self.now() + LINGER;
        let Some(p) = self.net.peers.get_mut(&peer) else { return };
        p.dialer = None;
        p.established = None;
        if let Some(id) = p.link.take()
            && let Some(link) = self.net.links.get_mut(&id)
        {
            link.closing = Some(until);
            link.discard();
            self.link_is_down(peer, LinkError::Closed);
        }
        self.listen();
    }

    fn link_is_down(&mut self, peer: u8, why: LinkError) {
        if let Some(peer) = NodeId::new(peer) {
            self.inbox.push_back(Input::LinkDown { peer, why });
        }
        self.status_changed = true;
    }

    /// Opens and closes listeners so that there is one per own address of every searching peer.
    fn listen(&mut self) {
        let wanted: Vec<SocketAddr> =
            self.net.peers.values().filter_map(|p| p.dialer.as_ref()).flat_map(|(_, d)| d.locals()).collect();
        let idle: Vec<SocketAddr> =
            self.net.listeners.keys().filter(|a| !wanted.contains(a)).copied().collect();
        for address in idle {
            if let Some(listener) = self.net.listeners.remove(&address) {
                self.ring.push(Token::Nobody, Op::Cancel { key: listener.accept });
                crate::sys::shutdown(std::os::fd::AsFd::as_fd(&*listener.fd));
            }
        }
        self.net.listen_retry = None;
        for address in wanted {
            if self.net.listeners.contains_key(&address) {
                continue;
            }
            match TcpListener::bind(address) {
                Ok(socket) => {
                    let fd: Fd = Rc::new(OwnedFd::from(socket));
                    let accept = self.ring.push(Token::Accept(address), Op::Accept { fd: Rc::clone(&fd) });
                    self.net.listeners.insert(address, Listener { fd, accept });
                }
                Err(e) => {
                    tracing::warn!("cannot listen on {address}: {e}; trying again");
                    self.net.listen_retry = Some(self.now() + LISTEN_RETRY);
                }
            }
        }
    }

    pub(crate) fn peer_accepted(&mut self, local: SocketAddr, socket: Option<Fd>) {
        if let Some(listener) = self.net.listeners.get_mut(&local) {
            let fd = Rc::clone(&listener.fd);
            listener.accept = self.ring.push(Token::Accept(local), Op::Accept { fd });
        }
        let Some(fd) = socket else { return };
        let Some(remote) = fd.try_clone().ok().and_then(|f| TcpStream::from(f).peer_addr().ok()) else {
            return;
        };
        let found = self.net.peers.iter().find_map(|(id, p)| {
            let path = p.dialer.as_ref()?.1.path_of(local, remote.ip())?;
            Some((*id, path, p.transport.ping_timeout))
        });
        let Some((peer, path, ping_timeout)) = found else {
            tracing::warn!("closed an unexpected connection from {remote}");
            return;
        };
        if self.net.incoming.len() >= INCOMING_MAX {
            return;
        }
        let (id, until) = (self.id(), self.now() + ping_timeout * 4);
        let buf = Buf::Plain(vec![0; 8]);
        self.ring.push(Token::First(id), Op::Recv { fd: Rc::clone(&fd), buf, all: true });
        self.net.incoming.insert(id, Incoming { fd, peer, path, until });
    }

    pub(crate) fn first_packet(&mut self, id: u64, op: Op, result: io::Result<u32>) {
        let Some(incoming) = self.net.incoming.remove(&id) else { return };
        let (Op::Recv { buf: Buf::Plain(bytes), .. }, Ok(8)) = (op, result) else { return };
        let Some(stream) = parse_first_packet(&bytes) else {
            tracing::warn!("closed a connection that did not begin with a first packet");
            return;
        };
        let now = self.now();
        let dialer = self.net.peers.get_mut(&incoming.peer).and_then(|p| p.dialer.as_mut());
        if let Some((_, dialer)) = dialer {
            let action = dialer.incoming(now, incoming.fd, incoming.path, stream);
            self.dial_action(incoming.peer, action);
        }
    }

    pub(crate) fn dialed(&mut self, peer: u8, attempt: u64, serial: u64, result: io::Result<()>) {
        let now = self.now();
        let dialer = self.net.peers.get_mut(&peer).and_then(|p| p.dialer.as_mut());
        if let Some((current, dialer)) = dialer
            && *current == attempt
        {
            let action = dialer.dialed(now, serial, result);
            self.dial_action(peer, action);
        }
    }

    fn dial_action(&mut self, peer: u8, action: Option<Action>) {
        match action {
            None => {}
            Some(Action::Dial { fd, to, serial }) => {
                let attempt = self.net.peers.get(&peer).and_then(|p| p.dialer.as_ref()).map_or(0, |d| d.0);
                self.ring.push(Token::Dial { peer, attempt, serial }, Op::connect(fd, to));
            }
            Some(Action::Up { data, control, resolve_conflicts }) => {
                let id = self.id();
                let pool = self.pool.clone();
                let Some(p) = self.net.peers.get_mut(&peer) else { return };
                p.established = p.dialer.take().and_then(|(_, d)| d.established_path());
                p.link = Some(id);
                self.net.links.insert(id, Link::new(peer, data, control, pool));
                self.listen();
                if let Some(node) = NodeId::new(peer) {
                    self.inbox.push_back(Input::LinkUp { peer: node, resolve_conflicts });
                }
                self.status_changed = true;
                // The core's codec and features come before the first byte is looked at.
                self.feed();
                self.receive_more(id);
            }
        }
    }

    /// Time for connect loops, blocked sends, and sockets nobody wants.
    pub(crate) fn net_timers(&mut self, now: Time) {
        if self.net.deadline().is_none_or(|t| t > now) {
            return;
        }
        self.net.incoming.retain(|_, i| {
            let keep = i.until > now;
            if !keep {
                crate::sys::shutdown(std::os::fd::AsFd::as_fd(&*i.fd));
            }
            keep
        });
        if self.net.listen_retry.is_some_and(|t| t <= now) {
            self.listen();
        }
        let peers: Vec<u8> = self.net.peers.keys().copied().collect();
        for peer in peers {
            let action =
                self.net.peers.get_mut(&peer).and_then(|p| p.dialer.as_mut()).and_then(|(_, d)| d.tick(now));
            self.dial_action(peer, action);
        }
        let due: Vec<LinkId> = self
            .net
            .links
            .iter()
            .filter(|(_, l)| self.net.link_deadline(l).is_some_and(|t| t <= now))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            let Some(link) = self.net.links.get(&id) else { continue };
            if link.closing.is_some() {
                link.abort();
                self.net.links.remove(&id);
            } else if link.control_gone.is_some_and(|t| t <= now) {
                self.link_failed(id, LinkError::BrokenPipe);
            } else {
                self.link_failed(id, LinkError::SendTimeout);
            }
        }
    }

    fn link_failed(&mut self, id: LinkId, why: LinkError) {
        let Some(link) = self.net.links.remove(&id) else { return };
        link.abort();
        if let Some(p) = self.net.peers.get_mut(&link.peer)
            && p.link == Some(id)
        {
            p.link = None;
            p.established = None;
            self.link_is_down(link.peer, why);
        }
    }

    fn link_of(&mut self, peer: u8) -> Option<(LinkId, &mut Link)> {
        let id = self.net.peers.get(&peer)?.link?;
        Some((id, self.net.links.get_mut(&id)?))
    }

    pub(crate) fn link_send(
        &mut self,
        peer: u8,
        stream: Stream,
        volume: Option<u16>,
        packet: &Packet,
        digest: &[u8],
        data: Bytes,
    ) {
        let Some((id, link)) = self.link_of(peer) else { return };
        if let Err(e) = link.send(stream, volume, packet, digest, data) {
            tracing::error!("a packet for node {peer} cannot be sent: {e}");
            self.link_failed(id, LinkError::Protocol);
        }
    }

    pub(crate) fn link_codec(&mut self, peer: u8, receive: bool, ctx: DecodeCtx) {
        if let Some((_, link)) = self.link_of(peer) {
            link.set_codec(receive, ctx);
        }
    }

    /// Starts the sends that are due on all links; closes links that have nothing left to say.
    pub(crate) fn flush_links(&mut self) {
        let now = self.now();
        let mut finished = Vec::new();
        for (id, link) in &mut self.net.links {
            for stream in [Stream::Control, Stream::Data] {
                if let Some(op) = link.next_send(stream, now) {
                    self.ring.push(Token::Send(*id, stream), op);
                }
            }
            if link.closing.is_some() && link.is_flushed() && !link.finished {
                link.finish_sending();
                link.finished = true;
            }
            if link.closing.is_some() && link.ended(Stream::Data) && link.ended(Stream::Control) {
                finished.push(*id);
            }
        }
        for id in finished {
            if let Some(link) = self.net.links.remove(&id) {
                link.abort();
            }
        }
    }

    pub(crate) fn link_sent(&mut self, id: LinkId, stream: Stream, op: Op, result: io::Result<u32>) {
        let Some(link) = self.net.links.get_mut(&id) else { return };
        if !link.sent(stream, op, result) && link.closing.is_none() {
            // What arrived before may still be read; a reset shows there as well.
            link.control_gone.get_or_insert(Time(crate::sys::now_ns()) + DRAIN);
        }
    }

    pub(crate) fn link_received(&mut self, id: LinkId, stream: Stream, op: Op, result: io::Result<u32>) {
        let now = self.now();
        let Some(link) = self.net.links.get_mut(&id) else { return };
        let good = link.received(stream, op, result);
        if link.closing.is_some() {
            link.discard();
        } else if !good {
            let both = link.ended(Stream::Data) && link.ended(Stream::Control);
            if stream == Stream::Control && !both {
                link.control_gone = Some(now + DRAIN);
            } else {
                // Packets that came before the end still count, if the core takes them at once.
                self.deliver(id);
                self.link_failed(id, LinkError::BrokenPipe);
                return;
            }
        }
        self.receive_more(id);
    }

    /// Delivers what has arrived and asks for more.
    fn receive_more(&mut self, id: LinkId) {
        self.deliver(id);
        let Some(peer) = self.net.links.get(&id).map(|l| l.peer) else { return };
        let may = self.may_receive(peer);
        let Some(link) = self.net.links.get_mut(&id) else { return };
        link.paused = !may && link.closing.is_none();
        for stream in [Stream::Control, Stream::Data] {
            if stream == Stream::Data && link.paused {
                continue;
            }
            if let Some(op) = link.next_receive(stream) {
                self.ring.push(Token::Receive(id, stream), op);
            }
        }
    }

    /// Gives the core one packet after the other: what a packet changes holds for the next one.
    fn deliver(&mut self, id: LinkId) {
        for stream in [Stream::Control, Stream::Data] {
            loop {
                let Some(link) = self.net.links.get_mut(&id) else { return };
                let peer = link.peer;
                if stream == Stream::Data && !self.may_receive(peer) {
                    break;
                }
                let Some(link) = self.net.links.get_mut(&id) else { return };
                match link.next_packet(stream) {
                    Ok(None) => break,
                    Ok(Some(r)) => {
                        let Some(peer) = NodeId::new(peer) else { return };
                        self.inbox.push_back(Input::Packet {
                            peer,
                            stream,
                            volume: r.volume,
                            packet: r.packet,
                            digest: r.digest,
                            data: r.data,
                        });
                        self.feed();
                    }
                    Err(e) => {
                        tracing::error!("{}: connection to node {peer}: {e}", self.name);
                        self.link_failed(id, LinkError::Protocol);
                        return;
                    }
                }
            }
        }
    }

    /// Goes on with peers whose data had to wait.
    pub(crate) fn resume_receiving(&mut self) {
        let paused: Vec<LinkId> =
            self.net.links.iter().filter(|(_, l)| l.paused).map(|(id, _)| *id).collect();
        for id in paused {
            self.receive_more(id);
        }
    }
}
