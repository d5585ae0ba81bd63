//! Blocking client of an engine's control socket.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::{
    ClientMessage, Command, EventBatch, FrameDecoder, FrameError, PROTOCOL_VERSION, Reply, ResourceStatus,
    ServerMessage, encode, runtime_dir, socket_path,
};

const READ_BYTES: usize = 16 << 10;

/// Why an engine could not be asked.
#[derive(Debug, Error)]
pub enum ClientError {
    /// No engine listens for the resource.
    #[error("no engine is running for resource '{resource}' (nothing listens on {})", path.display())]
    NotRunning {
        /// Resource name.
        resource: String,
        /// The socket tried.
        path: PathBuf,
    },
    /// The socket may only be used by root.
    #[error("not allowed to talk to the engine through {}; run this as root", path.display())]
    Denied {
        /// The socket tried.
        path: PathBuf,
    },
    /// The name cannot be a resource's.
    #[error("'{name}' is not a resource name")]
    BadName {
        /// What was given.
        name: String,
    },
    /// The engine is of another version.
    #[error(
        "the engine of resource '{resource}' (version {version}) speaks control protocol {theirs}, this \
         program speaks {PROTOCOL_VERSION}; restart the engine or install matching versions"
    )]
    Incompatible {
        /// Resource name.
        resource: String,
        /// Version of the engine.
        version: String,
        /// Its protocol.
        theirs: u32,
    },
    /// No answer in time.
    #[error("the engine of resource '{resource}' did not answer '{what}' within {} ms", limit.as_millis())]
    Timeout {
        /// Resource name.
        resource: String,
        /// What it was asked.
        what: String,
        /// How long was waited.
        limit: Duration,
    },
    /// The engine went away.
    #[error("the engine of resource '{resource}' closed the connection; see its log")]
    Closed {
        /// Resource name.
        resource: String,
    },
    /// The engine said something that does not belong here.
    #[error("the engine of resource '{resource}' broke the control protocol: {what}")]
    Protocol {
        /// Resource name.
        resource: String,
        /// What was wrong.
        what: String,
    },
    /// The socket failed.
    #[error("cannot talk to the engine of resource '{resource}': {source}")]
    Io {
        /// Resource name.
        resource: String,
        /// Why.
        source: std::io::Error,
    },
    /// A message could not be made or read.
    #[error("cannot talk to the engine of resource '{resource}': {source}")]
    Frame {
        /// Resource name.
        resource: String,
        /// Why.
        source: FrameError,
    },
}

/// A connection to the engine of one resource.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    decoder: FrameDecoder,
    resource: String,
    version: String,
    request_next: u64,
}

impl Client {
    /// Connects to the engine of `resource` and exchanges versions within `limit`.
    ///
    /// # Errors
    /// If no engine runs, it may not be asked, or it is of another version.
    pub fn connect(resource: &str, limit: Duration) -> Result<Self, ClientError> {
        if resource.is_empty() || resource.contains('/') || resource.starts_with('.') {
            return Err(ClientError::BadName { name: resource.to_owned() });
        }
        Self::connect_path(resource, &socket_path(resource), limit)
    }

    /// Connects to the engine that listens on `path`.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_path(resource: &str, path: &Path, limit: Duration) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| match source.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                ClientError::NotRunning { resource: resource.to_owned(), path: path.to_owned() }
            }
            ErrorKind::PermissionDenied => ClientError::Denied { path: path.to_owned() },
            _ => ClientError::Io { resource: resource.to_owned(), source },
        })?;
        let mut client = Self {
            stream,
            decoder: FrameDecoder::new(),
            resource: resource.to_owned(),
            version: String::new(),
            request_next: 1,
        };
        let deadline = Instant::now() + limit;
        let program = std::env::args_os()
            .next()
            .and_then(|a| Path::new(&a).file_name().map(|n| n.to_string_lossy().into_owned()))
            .unwrap_or_default();
        client.send(&ClientMessage::Hello { protocol: PROTOCOL_VERSION, program }, deadline)?;
        match client.receive("hello", limit, Some(deadline))? {
            ServerMessage::Hello { protocol, resource: theirs, version } if protocol == PROTOCOL_VERSION => {
                if theirs != client.resource {
                    return Err(client.broken(format!("it serves resource '{theirs}'")));
                }
                client.version = version;
                Ok(client)
            }
            ServerMessage::Hello { protocol, version, .. }
            | ServerMessage::Incompatible { protocol, version } => {
                Err(ClientError::Incompatible { resource: client.resource, version, theirs: protocol })
            }
            other => Err(client.broken(format!("unexpected {}", kind_of(&other)))),
        }
    }

    /// Version of the engine, for people.
    #[must_use]
    pub fn engine_version(&self) -> &str {
        &self.version
    }

    /// Name of the resource served.
    #[must_use]
    pub fn resource(&self) -> &str {
        &self.resource
    }

    /// Asks and waits for the answer, at most `limit`. After an error the client is unusable.
    ///
    /// # Errors
    /// If the engine does not answer in time or goes away. A refusal is no error but a [`Reply`].
    pub fn call(&mut self, command: Command, limit: Duration) -> Result<Reply, ClientError> {
        let id = self.request_next;
        self.request_next += 1;
        let verb = command.verb();
        let deadline = Instant::now() + limit;
        self.send(&ClientMessage::Request { id, command }, deadline)?;
        match self.receive(verb, limit, Some(deadline))? {
            ServerMessage::Reply { id: theirs, reply } if theirs == id => Ok(reply),
            other => Err(self.broken(format!("unexpected {}", kind_of(&other)))),
        }
    }

    /// The state of the resource; `None` before `new-resource`.
    ///
    /// # Errors
    /// As [`Client::call`], and if the engine refuses.
    pub fn status(&mut self, limit: Duration) -> Result<Option<ResourceStatus>, ClientError> {
        match self.call(Command::Status, limit)? {
            Reply::Ok { payload: crate::Payload::Status(status), .. } => Ok(status.map(|mut s| {
                s.sort();
                s
            })),
            _ => Err(self.broken("no status in the answer to 'status'".to_owned())),
        }
    }

    /// Turns the connection into a stream of events, beginning with the present state.
    ///
    /// # Errors
    /// As [`Client::call`], and if the engine refuses.
    pub fn subscribe(mut self, limit: Duration) -> Result<EventStream, ClientError> {
        match self.call(Command::Subscribe, limit)? {
            Reply::Ok { .. } => Ok(EventStream { client: self }),
            _ => Err(self.broken("it refused to send events".to_owned())),
        }
    }

    fn send(&mut self, message: &ClientMessage, deadline: Instant) -> Result<(), ClientError> {
        let bytes = encode(message)
            .map_err(|source| ClientError::Frame { resource: self.resource.clone(), source })?;
        let remaining = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.set_write_timeout(Some(remaining)).and_then(|()| self.stream.write_all(&bytes)).map_err(
            |source| match source.kind() {
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                    ClientError::Closed { resource: self.resource.clone() }
                }
                _ => ClientError::Io { resource: self.resource.clone(), source },
            },
        )
    }

    fn receive<M: DeserializeOwned>(
        &mut self,
        what: &str,
        limit: Duration,
        deadline: Option<Instant>,
    ) -> Result<M, ClientError> {
        let mut chunk = vec![0_u8; READ_BYTES];
        loop {
            if let Some(message) = self
                .decoder
                .next_message()
                .map_err(|source| ClientError::Frame { resource: self.resource.clone(), source })?
            {
                return Ok(message);
            }
            let timeout =
                || ClientError::Timeout { resource: self.resource.clone(), what: what.to_owned(), limit };
            let remaining = match deadline {
                None => None,
                Some(d) => {
                    let left = d.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(timeout());
                    }
                    Some(left)
                }
            };
            let io = |source| ClientError::Io { resource: self.resource.clone(), source };
            self.stream.set_read_timeout(remaining).map_err(io)?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(ClientError::Closed { resource: self.resource.clone() }),
                Ok(n) => self.decoder.push(chunk.get(..n).unwrap_or_default()),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Err(timeout());
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => {
                    return Err(ClientError::Closed { resource: self.resource.clone() });
                }
                Err(e) => return Err(io(e)),
            }
        }
    }

    fn broken(&self, what: String) -> ClientError {
        ClientError::Protocol { resource: self.resource.clone(), what }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Events of one resource, in order.
#[derive(Debug)]
pub struct EventStream {
    client: Client,
}

impl EventStream {
    /// The next batch; waits at most `limit`, for ever without.
    ///
    /// # Errors
    /// [`ClientError::Timeout`] if nothing came, [`ClientError::Closed`] when the engine ended. After
    /// a time-out the stream is still usable.
    pub fn next_batch(&mut self, limit: Option<Duration>) -> Result<EventBatch, ClientError> {
        let deadline = limit.map(|l| Instant::now() + l);
        match self.client.receive("events2", limit.unwrap_or_default(), deadline)? {
            ServerMessage::Events(batch) => Ok(batch),
            other => Err(self.client.broken(format!("unexpected {}", kind_of(&other)))),
        }
    }

    /// The batches that have arrived, without waiting, and whether the engine is still there. For
    /// callers that poll the descriptor.
    ///
    /// # Errors
    /// If the engine broke the protocol or the socket failed.
    pub fn arrived(&mut self) -> Result<(Vec<EventBatch>, bool), ClientError> {
        let client = &mut self.client;
        let io = |source| ClientError::Io { resource: client.resource.clone(), source };
        client.stream.set_nonblocking(true).map_err(io)?;
        let mut chunk = vec![0_u8; READ_BYTES];
        let mut open = true;
        loop {
            match client.stream.read(&mut chunk) {
                Ok(0) => {
                    open = false;
                    break;
                }
                Ok(n) => client.decoder.push(chunk.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => {
                    open = false;
                    break;
                }
            }
            if client.decoder.pending_bytes() > crate::FRAME_BYTES_MAX {
                break;
            }
        }
        let io = |source| ClientError::Io { resource: client.resource.clone(), source };
        client.stream.set_nonblocking(false).map_err(io)?;
        let mut batches = Vec::new();
        while let Some(message) = client
            .decoder
            .next_message()
            .map_err(|source| ClientError::Frame { resource: client.resource.clone(), source })?
        {
            match message {
                ServerMessage::Events(batch) => batches.push(batch),
                other => return Err(client.broken(format!("unexpected {}", kind_of(&other)))),
            }
        }
        Ok((batches, open))
    }

    /// Name of the resource.
    #[must_use]
    pub fn resource(&self) -> &str {
        &self.client.resource
    }
}

impl AsFd for EventStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.client.stream.as_fd()
    }
}

/// Names of the resources that have a control socket, sorted. Whether an engine listens shows only
/// when connecting.
///
/// # Errors
/// If the runtime directory exists but cannot be read.
pub fn running_resources() -> std::io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(runtime_dir()) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut names: Vec<String> = entries
        .filter_map(Result::ok)
        .filter_map(|e| e.file_name().to_str().and_then(|n| n.strip_suffix(".sock")).map(str::to_owned))
        .collect();
    names.sort();
    Ok(names)
}

fn kind_of(message: &ServerMessage) -> &'static str {
    match message {
        ServerMessage::Hello { .. } => "hello",
        ServerMessage::Incompatible { .. } => "incompatible",
        ServerMessage::Reply { .. } => "reply",
        ServerMessage::Events(_) => "events",
    }
}
