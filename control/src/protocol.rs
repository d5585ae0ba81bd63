//! Conversation on the control socket.
//!
//! The client speaks first with [`ClientMessage::Hello`]; the engine answers with
//! [`ServerMessage::Hello`], or with [`ServerMessage::Incompatible`] and closes. Then requests
//! and replies alternate, each reply with the number of its request. After a
//! [`Command::Subscribe`] was granted only [`ServerMessage::Events`] follow until either side
//! closes. Messages travel in the frames of `frame.rs`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Command, Event, GenerationInfo, Refusal, ResourceStatus, RunningResource};

/// Version of this conversation. Only equal versions talk to each other.
pub const PROTOCOL_VERSION: u32 = 1;

/// What a client sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientMessage {
    /// The first message.
    Hello {
        /// [`PROTOCOL_VERSION`] of the client.
        protocol: u32,
        /// Program name, for the engine's log.
        program: String,
    },
    /// A question.
    Request {
        /// Number chosen by the client, repeated in the reply.
        id: u64,
        /// The question.
        command: Command,
    },
}

/// What an engine sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServerMessage {
    /// Answer to the client's hello.
    Hello {
        /// [`PROTOCOL_VERSION`] of the engine.
        protocol: u32,
        /// Name of the resource it serves.
        resource: String,
        /// Version of the engine, for people.
        version: String,
    },
    /// The engine speaks another version and closes.
    Incompatible {
        /// [`PROTOCOL_VERSION`] of the engine.
        protocol: u32,
        /// Version of the engine, for people.
        version: String,
    },
    /// Answer to a request.
    Reply {
        /// Number of the request.
        id: u64,
        /// The answer.
        reply: Reply,
    },
    /// Something happened (only after a granted subscription).
    Events(EventBatch),
}

/// Events of one state change, in the order of `spec/cli.md` §13.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventBatch {
    /// Microseconds since 1970, engine's clock.
    pub time_us: u64,
    /// The events. The first batch holds only `exists` events and ends with [`Event::ExistsEnd`].
    pub events: Vec<Event>,
}

/// Answer to a command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Done.
    Ok {
        /// What was asked for.
        payload: Payload,
        /// Lines printed under `warnings from kernel:`.
        #[serde(default)]
        warnings: Vec<String>,
    },
    /// Not done.
    Refused(Refusal),
    /// This engine does not have the command yet.
    Unsupported {
        /// The verb.
        verb: String,
    },
}

impl Reply {
    /// Done, nothing to tell.
    #[must_use]
    pub const fn done() -> Self {
        Self::Ok { payload: Payload::None, warnings: Vec::new() }
    }

    /// Done, with an answer.
    #[must_use]
    pub const fn with(payload: Payload) -> Self {
        Self::Ok { payload, warnings: Vec::new() }
    }

    /// Refused with that number (`refusal::code`).
    #[must_use]
    pub fn refused(code: i32) -> Self {
        Self::Refused(Refusal::new(code))
    }

    /// The command does not exist in this engine.
    #[must_use]
    pub fn unsupported(command: &Command) -> Self {
        Self::Unsupported { verb: command.verb().to_owned() }
    }
}

/// What a granted command returns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Payload {
    /// Nothing.
    None,
    /// To [`Command::Status`]. Absent before `new-resource`.
    Status(Option<ResourceStatus>),
    /// To [`Command::Show`].
    Running(RunningResource),
    /// To [`Command::GetGi`].
    GenerationInfo(GenerationInfo),
    /// To [`Command::TimeoutType`].
    Timeout(TimeoutType),
}

/// Which start-up timeout applies to a peer device (`spec/cli.md` §11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimeoutType {
    /// `wfc-timeout`.
    Default,
    /// `degr-wfc-timeout`: the cluster was degraded before.
    Degraded,
    /// `outdated-wfc-timeout`: the peer was outdated.
    Outdated,
}

/// The directory of the control sockets: `$PALISADE_RUNTIME_DIR`, else `/run/palisade`.
#[must_use]
pub fn runtime_dir() -> PathBuf {
    std::env::var_os("PALISADE_RUNTIME_DIR")
        .filter(|v| !v.is_empty())
        .map_or_else(|| PathBuf::from("/run/palisade"), PathBuf::from)
}

/// The control socket of a resource: `RESOURCE.sock` in [`runtime_dir`].
///
/// The name must be a valid resource name; a name with a slash has no socket.
#[must_use]
pub fn socket_path(resource: &str) -> PathBuf {
    runtime_dir().join(format!("{resource}.sock"))
}
