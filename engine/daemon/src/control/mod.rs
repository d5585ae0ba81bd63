//! The control socket: sessions of clients, their requests and what they subscribed to.
//!
//! - here: bytes and messages;
//! - [`commands`]: what each command does;
//! - [`snapshot`]: the core's state in the model of `palisade-control`.

pub(crate) mod commands;
mod snapshot;

use crate::engine::{Engine, Token};
use crate::front::nbd::listen_unix;
use crate::ring::{Buf, Fd, Op};
use crate::sys;
use bytes::Bytes;
use palisade_control::{
    ClientMessage, Event, EventBatch, FrameDecoder, PROTOCOL_VERSION, Reply, ResourceStatus, ServerMessage,
    diff, encode,
};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Clients at a time.
const SESSIONS_MAX: usize = 128;
/// Bytes a client may leave unread; the slow subscriber is cut off.
const OUTPUT_MAX: usize = 16 << 20;
/// Bytes received at once.
const RECEIVE_LEN: usize = 16 << 10;

/// Where an answer goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ReplyTo {
    session: u64,
    request: u64,
}

struct Session {
    fd: Fd,
    decoder: FrameDecoder,
    queue: VecDeque<Bytes>,
    queued: usize,
    sending: bool,
    greeted: bool,
    /// A request is being answered; the next one waits.
    busy: bool,
    /// Nothing more is read; closed when the queue is empty.
    ending: bool,
    /// The last state told to a subscriber.
    told: Option<Option<ResourceStatus>>,
}

/// Listener and sessions.
pub(crate) struct Control {
    listener: Fd,
    path: PathBuf,
    sessions: HashMap<u64, Session>,
}

impl Control {
    /// Listens on the resource's control socket.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub(crate) fn listen(runtime: &Path, name: &str) -> io::Result<Self> {
        let path = runtime.join(format!("{name}.sock"));
        let listener = Rc::new(listen_unix(&path)?);
        Ok(Self { listener, path, sessions: HashMap::new() })
    }

    /// Whether every answer has been sent.
    pub(crate) fn is_flushed(&self) -> bool {
        self.sessions.values().all(|s| s.queue.is_empty() && !s.sending)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Session {
    fn put(&mut self, message: &ServerMessage) {
        match encode(message) {
            Ok(bytes) => {
                self.queued += bytes.len();
                self.queue.push_back(Bytes::from(bytes));
            }
            Err(e) => {
                tracing::error!("an answer to a control client cannot be sent: {e}");
                self.ending = true;
            }
        }
    }
}

impl Engine {
    pub(crate) fn control_accept(&mut self) {
        self.ring.push(Token::ControlAccept, Op::Accept { fd: Rc::clone(&self.control.listener) });
    }

    pub(crate) fn control_accepted(&mut self, socket: Option<Fd>) {
        self.control_accept();
        let Some(fd) = socket else { return };
        if self.control.sessions.len() >= SESSIONS_MAX {
            tracing::warn!("{}: too many control clients, one was turned away", self.name);
            return;
        }
        let session = Session {
            fd,
            decoder: FrameDecoder::new(),
            queue: VecDeque::new(),
            queued: 0,
            sending: false,
            greeted: false,
            busy: false,
            ending: false,
            told: None,
        };
        let id = self.id();
        self.control.sessions.insert(id, session);
        self.control_receive(id);
    }

    fn control_receive(&mut self, id: u64) {
        if let Some(session) = self.control.sessions.get(&id) {
            let buf = Buf::Plain(vec![0; RECEIVE_LEN]);
            let op = Op::Recv { fd: Rc::clone(&session.fd), buf, all: false };
            self.ring.push(Token::ControlReceive(id), op);
        }
    }

    pub(crate) fn control_received(&mut self, id: u64, op: Op, result: &io::Result<u32>) {
        let Some(session) = self.control.sessions.get_mut(&id) else { return };
        let Op::Recv { buf: Buf::Plain(bytes), .. } = op else { return };
        match result {
            Ok(count) if *count > 0 => {
                session.decoder.push(bytes.get(..*count as usize).unwrap_or_default());
                self.control_messages(id);
                self.control_receive(id);
            }
            _ => drop(self.control.sessions.remove(&id)),
        }
    }

    /// Takes the requests that arrived, one at a time.
    fn control_messages(&mut self, id: u64) {
        while let Some(session) = self.control.sessions.get_mut(&id) {
            if session.busy || session.ending {
                // A client that goes on talking without reading answers is cut off.
                if session.decoder.pending_bytes() > palisade_control::FRAME_BYTES_MAX + 4 {
                    sys::shutdown(session.fd.as_fd());
                }
                return;
            }
            match session.decoder.next_message::<ClientMessage>() {
                Ok(None) => return,
                Ok(Some(message)) => self.control_message(id, message),
                Err(e) => {
                    tracing::warn!("{}: a control client was cut off: {e}", self.name);
                    sys::shutdown(session.fd.as_fd());
                    session.ending = true;
                }
            }
        }
    }

    fn control_message(&mut self, id: u64, message: ClientMessage) {
        let (resource, version) = (self.name.clone(), env!("CARGO_PKG_VERSION").to_owned());
        let Some(session) = self.control.sessions.get_mut(&id) else { return };
        match message {
            ClientMessage::Hello { protocol: PROTOCOL_VERSION, program } => {
                tracing::debug!("{program} connected");
                session.greeted = true;
                session.put(&ServerMessage::Hello { protocol: PROTOCOL_VERSION, resource, version });
            }
            ClientMessage::Hello { .. } => {
                session.put(&ServerMessage::Incompatible { protocol: PROTOCOL_VERSION, version });
                session.ending = true;
            }
            ClientMessage::Request { id: request, command } if session.greeted => {
                session.busy = true;
                self.command(ReplyTo { session: id, request }, command);
                self.feed();
            }
            ClientMessage::Request { .. } => {
                sys::shutdown(session.fd.as_fd());
                session.ending = true;
            }
        }
    }

    /// Answers a request; the client may have gone.
    pub(crate) fn reply(&mut self, to: ReplyTo, reply: Reply) {
        if let Some(session) = self.control.sessions.get_mut(&to.session) {
            session.put(&ServerMessage::Reply { id: to.request, reply });
            session.busy = false;
        }
    }

    fn subscribe(&mut self, to: ReplyTo) {
        let status = self.resource_status();
        self.reply(to, Reply::done());
        if let Some(session) = self.control.sessions.get_mut(&to.session) {
            let mut events = diff(None, status.as_ref(), true);
            events.push(Event::ExistsEnd);
            session.put(&ServerMessage::Events(batch(events)));
            session.told = Some(status);
            session.busy = true;
        }
    }

    /// Tells subscribers what changed in this turn.
    pub(crate) fn publish(&mut self) {
        if !std::mem::take(&mut self.status_changed) {
            return;
        }
        if self.control.sessions.values().all(|s| s.told.is_none()) {
            return;
        }
        let status = if self.exit { None } else { self.resource_status() };
        for session in self.control.sessions.values_mut() {
            let Some(told) = &mut session.told else { continue };
            let events = diff(told.as_ref(), status.as_ref(), false);
            if !events.is_empty() {
                told.clone_from(&status);
                session.put(&ServerMessage::Events(batch(events)));
            }
        }
    }

    /// Tells subscribers about one event that is no change of state.
    pub(crate) fn publish_event(&mut self, event: &Event) {
        for session in self.control.sessions.values_mut().filter(|s| s.told.is_some()) {
            session.put(&ServerMessage::Events(batch(vec![event.clone()])));
        }
    }

    pub(crate) fn flush_control(&mut self) {
        let ids: Vec<u64> = self.control.sessions.keys().copied().collect();
        for id in ids {
            self.control_messages(id);
            let Some(session) = self.control.sessions.get_mut(&id) else { continue };
            if session.queued > OUTPUT_MAX {
                tracing::warn!("{}: a control client that does not read was cut off", self.name);
                sys::shutdown(session.fd.as_fd());
                session.queue.clear();
                session.queued = 0;
                session.told = None;
                session.ending = true;
            }
            if session.sending {
                continue;
            }
            if session.queue.is_empty() {
                if session.ending {
                    sys::shutdown(session.fd.as_fd());
                }
                continue;
            }
            let count = session.queue.len().min(crate::ring::SEND_CHUNKS_MAX);
            let chunks: Vec<Bytes> = session.queue.drain(..count).collect();
            session.queued -= chunks.iter().map(Bytes::len).sum::<usize>();
            session.sending = true;
            self.ring.push(Token::ControlSend(id), Op::send(Rc::clone(&session.fd), chunks));
        }
    }

    pub(crate) fn control_sent(&mut self, id: u64, op: Op, result: io::Result<u32>) {
        let Some(session) = self.control.sessions.get_mut(&id) else { return };
        session.sending = false;
        let (Op::Send { message, .. }, Ok(count)) = (op, result) else {
            self.control.sessions.remove(&id);
            return;
        };
        for chunk in crate::ring::unsent(message.chunks, count as usize).into_iter().rev() {
            session.queued += chunk.len();
            session.queue.push_front(chunk);
        }
    }
}

fn batch(events: Vec<Event>) -> EventBatch {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    EventBatch { time_us: u64::try_from(time.as_micros()).unwrap_or(u64::MAX), events }
}
