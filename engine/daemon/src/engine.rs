//! The loop: completions in, core in the middle, operations out.
//!
//! One turn: wait; hand every completion to the part it belongs to, which turns it into inputs of the core;
//! after each input, carry out what the core wants (operations are queued, not yet submitted); flush the
//! queues of all streams; submit everything at once with the next wait.

use crate::config::Local;
use crate::control::commands::Claim;
use crate::control::{Control, ReplyTo};
use crate::core_api::{
    AdminError, AdminId, Command, Core, Input, IoError, LogLevel, NodeId, Output, Stream, Time, VolumeNr,
};
use crate::disk::{Backing, Job, Outcome};
use crate::flow::Flow;
use crate::front::Front;
use crate::handlers::Handlers;
use crate::net::LinkId;
use crate::net::peers::{Net, listener::Socket};
use crate::process::Notifier;
use crate::ring::{Done, Fd, Op, Ring};
use crate::sys;
use bytes::Bytes;
use palisade_control::Reply;
use palisade_export::BufferPool;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

/// Unused payload memory kept for later.
const POOL_IDLE_BYTES: usize = 64 << 20;

/// What a completion is about.
#[derive(Debug)]
pub enum Token {
    /// A disk operation.
    Disk(Job),
    /// A replication listener got a connection.
    Accept(SocketAddr),
    /// The first packet of an incoming replication socket.
    First(u64),
    /// An outgoing replication socket is connected, or not.
    Dial {
        /// Peer.
        peer: u8,
        /// Which connect loop.
        attempt: u64,
        /// Which attempt of it.
        serial: u64,
    },
    /// Bytes of a peer.
    Receive(LinkId, Stream),
    /// Bytes to a peer.
    Send(LinkId, Stream),
    /// A control client.
    ControlAccept,
    /// Bytes of a control client.
    ControlReceive(u64),
    /// Bytes to a control client.
    ControlSend(u64),
    /// An NBD client of a volume.
    NbdAccept(VolumeNr, Socket),
    /// Bytes of an NBD client.
    NbdReceive(u64),
    /// Bytes to an NBD client.
    NbdSend(u64),
    /// A device node has something to say.
    Device(VolumeNr, u64),
    /// What a file has allocated is known.
    Looked(u64),
    /// A handler ended.
    Handler(u64),
    /// A signal came.
    Signal,
    /// Nobody waits for it.
    Nobody,
}

/// What to do when the core answered a command.
pub type Continuation = Box<dyn FnOnce(&mut Engine, Result<(), AdminError>)>;

/// The process's whole state.
pub struct Engine {
    /// Resource name.
    pub name: String,
    /// Directory of sockets.
    pub runtime: PathBuf,
    pub(crate) ring: Ring<Token>,
    /// None before `new-resource`.
    pub(crate) core: Option<Core>,
    pub(crate) inbox: VecDeque<Input>,
    pub(crate) pool: BufferPool,
    pub(crate) local: Local,
    pub(crate) backings: BTreeMap<VolumeNr, Rc<Backing>>,
    /// Attaches that wait for their devices.
    pub(crate) claims: Vec<Claim>,
    /// Who waits for the end of a detach.
    pub(crate) detaching: Vec<(VolumeNr, ReplyTo)>,
    pub(crate) net: Net,
    pub(crate) front: Front,
    pub(crate) control: Control,
    pub(crate) handlers: Handlers,
    pub(crate) flow: Option<Flow>,
    pub(crate) status_changed: bool,
    pub(crate) exit: bool,
    pending: HashMap<u64, Continuation>,
    id_next: u64,
    /// When the core's timers last ran.
    timer_at: Time,
    signal: Fd,
    notifier: Notifier,
}

impl Engine {
    /// An engine without resource that listens on its control socket.
    ///
    /// # Errors
    /// The ring or the socket cannot be made.
    pub fn new(name: &str, runtime: PathBuf, notifier: Notifier) -> io::Result<Self> {
        let signal = Rc::new(sys::signal_fd()?);
        let control = Control::listen(&runtime, name)?;
        let mut engine = Self {
            name: name.to_owned(),
            runtime,
            ring: Ring::new()?,
            core: None,
            inbox: VecDeque::new(),
            pool: BufferPool::new(POOL_IDLE_BYTES),
            local: Local::default(),
            backings: BTreeMap::new(),
            claims: Vec::new(),
            detaching: Vec::new(),
            net: Net::default(),
            front: Front::default(),
            control,
            handlers: Handlers::default(),
            flow: None,
            status_changed: false,
            exit: false,
            pending: HashMap::new(),
            id_next: 1,
            timer_at: Time(0),
            signal,
            notifier,
        };
        engine.ring.push(Token::Signal, Op::Poll { fd: Rc::clone(&engine.signal) });
        engine.control_accept();
        Ok(engine)
    }

    /// Runs until the resource is taken down.
    ///
    /// # Errors
    /// The ring broke.
    pub fn run(&mut self) -> io::Result<()> {
        self.notifier.ready(&self.name);
        while !(self.exit && self.control.is_flushed()) {
            let wait = self.deadline().map(|t| t.since(self.now()));
            self.ring.wait(wait)?;
            while let Some(done) = self.ring.next() {
                self.completed(done);
            }
            self.timers();
            self.turn_ends();
        }
        self.notifier.stopping();
        Ok(())
    }

    /// The present moment.
    pub(crate) fn now(&self) -> Time {
        Time(sys::now_ns())
    }

    /// A number never used before in this process.
    pub(crate) fn id(&mut self) -> u64 {
        self.id_next += 1;
        self.id_next
    }

    fn deadline(&self) -> Option<Time> {
        let core = self.core.as_ref().and_then(Core::next_timeout).map(|t| t.max(self.timer_at + TIMER_MIN));
        let claim = self.claims.iter().map(|c| c.at).min();
        let others = [self.net.deadline(), self.handlers.deadline(), self.notifier.deadline(), claim];
        let next = others.into_iter().chain([core]).flatten().min();
        // The core may want to go on at once; a turn of the ring lies between.
        if self.inbox.is_empty() { next } else { Some(Time(0)) }
    }

    fn timers(&mut self) {
        let now = self.now();
        self.net_timers(now);
        self.handler_timers(now);
        self.claim_timers(now);
        self.notifier.tick(now);
        if self.core.as_ref().and_then(Core::next_timeout).is_some_and(|t| t <= now) {
            self.timer_at = now;
            self.inbox.push_back(Input::Timer);
        }
        self.feed();
    }

    fn turn_ends(&mut self) {
        self.resume_receiving();
        self.flow_continues();
        self.front_resume();
        self.feed();
        self.flush_links();
        self.flush_front();
        self.publish();
        self.flush_control();
    }

    fn completed(&mut self, done: Done<Token>) {
        match done.token {
            Token::Disk(job) => self.disk_done(job.completed(done.op, done.result)),
            Token::Receive(link, stream) => self.link_received(link, stream, done.op, done.result),
            Token::Send(link, stream) => self.link_sent(link, stream, done.op, done.result),
            Token::Accept(local) => self.peer_accepted(local, done.socket),
            Token::First(id) => self.first_packet(id, done.op, done.result),
            Token::Dial { peer, attempt, serial } => {
                self.dialed(peer, attempt, serial, done.result.map(drop));
            }
            Token::ControlAccept => self.control_accepted(done.socket),
            Token::ControlReceive(id) => self.control_received(id, done.op, &done.result),
            Token::ControlSend(id) => self.control_sent(id, done.op, done.result),
            Token::NbdAccept(vnr, socket) => self.nbd_accepted(vnr, socket, done.socket),
            Token::NbdReceive(id) => self.nbd_received(id, done.op, done.result),
            Token::NbdSend(id) => self.nbd_sent(id, done.op, &done.result),
            Token::Device(vnr, serial) => self.device_ready(vnr, serial),
            Token::Looked(key) => self.looked(key),
            Token::Handler(id) => self.handler_ended(id),
            Token::Signal => self.signalled(),
            Token::Nobody => {}
        }
        self.feed();
    }

    fn signalled(&mut self) {
        self.ring.push(Token::Signal, Op::Poll { fd: Rc::clone(&self.signal) });
        while let Some(signal) = sys::take_signal(self.signal.as_fd()) {
            tracing::info!("signal {signal}: taking the resource down");
            self.begin_down(None);
        }
    }

    /// Gives the core everything that waits for it and carries out what it wants.
    pub(crate) fn feed(&mut self) {
        while let Some(input) = self.inbox.pop_front() {
            let now = self.now();
            let Some(core) = &mut self.core else { continue };
            core.handle(now, input);
            while let Some(output) = self.core.as_mut().and_then(Core::poll_output) {
                self.output(output);
            }
        }
    }

    /// Sends a command to the core; `then` runs with the answer.
    pub(crate) fn admin(
        &mut self,
        command: Command,
        then: impl FnOnce(&mut Self, Result<(), AdminError>) + 'static,
    ) {
        let id = self.id();
        self.pending.insert(id, Box::new(then));
        self.inbox.push_back(Input::Admin(AdminId(id), command));
    }

    fn output(&mut self, output: Output) {
        match output {
            Output::Send { peer, stream, volume, packet, digest, data } => {
                self.link_send(peer.get(), stream, volume, &packet, &digest, data);
            }
            Output::SetCodec { peer, receive, ctx } => self.link_codec(peer.get(), receive, ctx),
            Output::DiskWrite { id, vnr, sector, data, fua } => match self.backings.get(&vnr) {
                Some(b) => self.start_disk(b.write(id, sector, data, fua)),
                None => self.disk_done(Backing::missing(id)),
            },
            Output::DiskRead { id, vnr, sector, len } => match self.backings.get(&vnr) {
                Some(b) => self.start_disk(b.read(id, sector, len)),
                None => self.disk_done(Backing::missing(id)),
            },
            Output::DiskFlush { id, vnr } => match self.backings.get(&vnr) {
                Some(b) => self.start_disk(b.flush(id)),
                None => self.disk_done(Backing::missing(id)),
            },
            Output::MetaWrite { id, vnr, pos, data } => match self.backings.get(&vnr) {
                Some(b) => self.start_disk(b.write_meta(id, pos, data)),
                None => self.disk_done(Backing::missing(id)),
            },
            Output::DiskZero { id, vnr, sector, len, unmap, discard } => {
                match self.backings.get(&vnr).map(|b| b.zero(id, sector, len, unmap, discard)) {
                    Some(Some(job)) => self.start_disk(job),
                    Some(None) => self.disk_done(Outcome::Done(id, Err(IoError::Unsupported))),
                    None => self.disk_done(Backing::missing(id)),
                }
            }
            Output::DropBacking(vnr) => self.drop_backing(vnr),
            Output::BlockDone(id, result) => self.block_done(id, result),
            Output::AdminDone(id, result) => {
                if let Some(then) = self.pending.remove(&id.0) {
                    then(self, result);
                }
            }
            Output::Connect(peer) => self.peer_connect(peer.get()),
            Output::CloseLink(peer) => self.peer_close(peer.get()),
            Output::DeviceSize { vnr, size } => self.device_size(vnr, size),
            Output::FrontEnd { present } => self.front_end(present),
            Output::RunHandler { id, call } => self.run_handler(id, &call),
            Output::Event(_) => self.status_changed = true,
            Output::Log { level, scope, text } => log(level, &scope, &text),
        }
    }

    fn start_disk(&mut self, (job, op): (Job, Op)) {
        self.ring.push(Token::Disk(job), op);
    }

    fn disk_done(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::More(job, op) => self.start_disk((job, op)),
            Outcome::Done(id, result) => self.inbox.push_back(Input::IoDone { id, result }),
        }
    }

    fn drop_backing(&mut self, vnr: VolumeNr) {
        // The device is closed with the last operation on it.
        self.backings.remove(&vnr);
        if let Some(volume) = self.local.volumes.get_mut(&vnr.0) {
            volume.backing = None;
        }
        let (ended, others) = std::mem::take(&mut self.detaching).into_iter().partition(|(v, _)| *v == vnr);
        self.detaching = others;
        let ended: Vec<(VolumeNr, ReplyTo)> = ended;
        for (_, to) in ended {
            self.reply(to, Reply::done());
        }
        self.status_changed = true;
    }

    /// Whether the core wants packets of that peer's data stream now.
    pub(crate) fn may_receive(&self, peer: u8) -> bool {
        match (&self.core, NodeId::new(peer)) {
            (Some(core), Some(peer)) => core.may_receive(peer),
            _ => true,
        }
    }
}

fn log(level: LogLevel, scope: &str, text: &str) {
    match level {
        LogLevel::Error => tracing::error!("{scope}: {text}"),
        LogLevel::Warn => tracing::warn!("{scope}: {text}"),
        LogLevel::Info => tracing::info!("{scope}: {text}"),
        LogLevel::Debug => tracing::debug!("{scope}: {text}"),
    }
}

/// Time between two runs of the core's timers at least.
const TIMER_MIN: Duration = Duration::from_millis(1);
/// How long a closed link may still send what was queued.
pub(crate) const LINGER: Duration = Duration::from_secs(2);
/// An empty payload.
pub(crate) const NOTHING: Bytes = Bytes::new();
