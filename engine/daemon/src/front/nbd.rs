//! NBD clients of this process: a unix socket per volume, and TCP where it is asked for.

use super::Origin;
use crate::core_api::{Input, VolumeNr};
use crate::engine::{Engine, Token};
use crate::net::peers::listener::Socket;
use crate::ring::{Buf, Fd, Key, Op, SEND_CHUNKS_MAX};
use crate::sys;
use bytes::Bytes;
use palisade_export::Errno;
use palisade_export::nbd::{Export, Limits, Session};
use std::collections::VecDeque;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

/// Connections of one process.
const CLIENTS_MAX: usize = 64;

/// Listening sockets of a volume.
pub(crate) struct Listeners {
    sockets: Vec<(Socket, Fd, Key)>,
    path: PathBuf,
}

/// One connection.
pub(crate) struct Client {
    pub(crate) session: Session,
    pub(crate) vnr: VolumeNr,
    fd: Fd,
    receiving: bool,
    sending: bool,
    queue: VecDeque<Bytes>,
    opened: bool,
}

impl Engine {
    /// The path of a volume's unix socket.
    fn nbd_path(&self, vnr: VolumeNr) -> PathBuf {
        self.runtime.join(format!("{}.{vnr}.nbd", self.name))
    }

    pub(crate) fn nbd_listen(&mut self, vnr: VolumeNr) {
        if self.front.listeners.contains_key(&vnr) {
            return;
        }
        let path = self.nbd_path(vnr);
        let mut sockets: Vec<(Socket, OwnedFd)> = Vec::new();
        match listen_unix(&path) {
            Ok(fd) => sockets.push((Socket::Unix, fd)),
            Err(e) => tracing::error!("cannot serve NBD on {}: {e}", path.display()),
        }
        let address = std::env::var("PALISADE_NBD_LISTEN").ok().filter(|a| !a.is_empty() && vnr.0 == 0);
        if let Some(address) = address {
            match TcpListener::bind(&address) {
                Ok(listener) => sockets.push((Socket::Tcp, listener.into())),
                Err(e) => tracing::error!("cannot serve NBD on {address}: {e}"),
            }
        }
        let sockets = sockets
            .into_iter()
            .map(|(kind, fd)| {
                let fd: Fd = Rc::new(fd);
                let key = self.ring.push(Token::NbdAccept(vnr, kind), Op::Accept { fd: Rc::clone(&fd) });
                (kind, fd, key)
            })
            .collect();
        self.front.listeners.insert(vnr, Listeners { sockets, path });
    }

    /// Ends all clients of a volume.
    pub(crate) fn nbd_withdraw(&mut self, vnr: VolumeNr) {
        if let Some(listeners) = self.front.listeners.remove(&vnr) {
            for (_, fd, key) in listeners.sockets {
                self.ring.push(Token::Nobody, Op::Cancel { key });
                sys::shutdown(fd.as_fd());
            }
            // Gone already is as good.
            let _ = std::fs::remove_file(listeners.path);
        }
        for client in self.front.clients.values_mut().filter(|c| c.vnr == vnr) {
            client.session.withdraw();
            client.session.fail_all(Errno::Shutdown);
        }
    }

    /// Clients that have the volume open.
    pub(crate) fn nbd_openers(&self, vnr: VolumeNr) -> u32 {
        let open = self.front.clients.values().filter(|c| c.vnr == vnr && c.opened).count();
        u32::try_from(open).unwrap_or(u32::MAX)
    }

    pub(crate) fn nbd_accepted(&mut self, vnr: VolumeNr, kind: Socket, socket: Option<Fd>) {
        let Some(listeners) = self.front.listeners.get_mut(&vnr) else { return };
        if let Some((_, fd, key)) = listeners.sockets.iter_mut().find(|s| s.0 == kind) {
            *key = self.ring.push(Token::NbdAccept(vnr, kind), Op::Accept { fd: Rc::clone(fd) });
        }
        let Some(fd) = socket else { return };
        let size = self.front.sizes.get(&vnr).copied().unwrap_or(0);
        if self.front.clients.len() >= CLIENTS_MAX || self.is_vanishing() || size == 0 {
            tracing::warn!("an NBD client of volume {vnr} was turned away");
            return;
        }
        if kind == Socket::Tcp {
            sys::tune_link(fd.as_fd(), true);
        }
        let export = Export {
            name: format!("{}/{vnr}", self.name),
            description: format!("volume {vnr} of resource {}", self.name),
            size,
            block_min: 512,
            block_preferred: 4096,
            read_only: false,
            discard: true,
            rotational: false,
        };
        let session = Session::new(Arc::new([export]), Limits::default(), self.pool.clone());
        let client = Client {
            session,
            vnr,
            fd,
            receiving: false,
            sending: false,
            queue: VecDeque::new(),
            opened: false,
        };
        let id = self.id();
        self.front.clients.insert(id, client);
        self.nbd_receive(id);
    }

    fn nbd_receive(&mut self, id: u64) {
        let Some(client) = self.front.clients.get_mut(&id) else { return };
        if client.receiving {
            return;
        }
        if let Some(input) = client.session.take_input() {
            client.receiving = true;
            // A payload comes as a whole; a socket gives it in pieces of its buffer.
            let all = input.is_payload();
            let op = Op::Recv { fd: Rc::clone(&client.fd), buf: Buf::Nbd(input), all };
            self.ring.push(Token::NbdReceive(id), op);
        }
    }

    pub(crate) fn nbd_received(&mut self, id: u64, op: Op, result: io::Result<u32>) {
        let Some(client) = self.front.clients.get_mut(&id) else { return };
        client.receiving = false;
        let Op::Recv { buf: Buf::Nbd(input), .. } = op else { return };
        client.session.give_input(input, result.map_or(0, |n| n as usize));
        self.nbd_pull(id);
    }

    /// Takes the requests of a client and asks for more of its bytes.
    pub(crate) fn nbd_pull(&mut self, id: u64) {
        if self.net.is_congested() {
            return;
        }
        loop {
            let Some(client) = self.front.clients.get_mut(&id) else { return };
            let vnr = client.vnr;
            if !client.opened && client.session.export().is_some() {
                client.opened = true;
                self.openers_changed(vnr);
                continue;
            }
            let Some(request) = client.session.next_request() else { break };
            self.front_request(Origin::Nbd(id), vnr, request);
        }
        self.nbd_receive(id);
    }

    fn openers_changed(&mut self, vnr: VolumeNr) {
        let rw = self.nbd_openers(vnr);
        self.inbox.push_back(Input::Openers { vnr, rw, ro: 0 });
        self.status_changed = true;
    }

    pub(crate) fn nbd_flush(&mut self, id: u64) {
        let Some(client) = self.front.clients.get_mut(&id) else { return };
        if client.session.output_len() > 0 {
            client.queue.extend(client.session.take_output());
        }
        if !client.sending && !client.queue.is_empty() {
            let count = client.queue.len().min(SEND_CHUNKS_MAX);
            let chunks: Vec<Bytes> = client.queue.drain(..count).collect();
            client.sending = true;
            self.ring.push(Token::NbdSend(id), Op::send(Rc::clone(&client.fd), chunks));
        }
        let idle = !client.sending && client.queue.is_empty();
        if client.session.is_finished() && idle {
            sys::shutdown(client.fd.as_fd());
            self.nbd_gone(id);
        }
    }

    pub(crate) fn nbd_sent(&mut self, id: u64, op: Op, result: &io::Result<u32>) {
        let Some(client) = self.front.clients.get_mut(&id) else { return };
        client.sending = false;
        let Op::Send { message, .. } = op else { return };
        match result {
            Ok(count) => {
                for chunk in crate::ring::unsent(message.chunks, *count as usize).into_iter().rev() {
                    client.queue.push_front(chunk);
                }
                self.nbd_pull(id);
            }
            Err(_) => {
                sys::shutdown(client.fd.as_fd());
                self.nbd_gone(id);
            }
        }
    }

    /// A connection ended; answers to its requests find nobody.
    fn nbd_gone(&mut self, id: u64) {
        let Some(client) = self.front.clients.remove(&id) else { return };
        if let Some(why) = client.session.closed() {
            tracing::debug!("{why}");
        }
        if client.opened {
            self.openers_changed(client.vnr);
        }
    }
}

/// A unix socket that only its owner may use; a dead one in its place is replaced.
pub(crate) fn listen_unix(path: &std::path::Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mask = sys::set_umask(0o177);
    let listener = UnixListener::bind(path);
    sys::set_umask(mask);
    listener.map(OwnedFd::from)
}
