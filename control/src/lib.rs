//! The interface between everything that asks and the engine that answers.
//!
//! Here live the words both sides share: [`Command`] (what `drbdsetup` can ask), [`Reply`] with
//! its refusals, [`ResourceStatus`] (the `status --json` schema), [`Event`] (the `events2`
//! records), [`RunningResource`] (what `show` prints), the frames of the engine's control socket,
//! a blocking [`Client`] for it, and a reader of kernel resources through the installed tools.
//!
//! This crate never decides anything about replication and never parses text that a struct
//! already holds. The specification is `spec/cli.md`, `spec/netlink.md` and
//! `spec/state-machine.md` §2 and §3.
#![forbid(unsafe_code)]

mod address;
mod backend;
mod client;
mod command;
mod event;
mod frame;
mod gi;
mod kernel;
mod kernel_text;
mod options;
mod protocol;
mod refusal;
pub mod render;
mod running;
mod settings;
mod state;
mod status;

pub use address::{AddressError, AddressFamily, Endpoint};
pub use backend::{Backend, BackendError, all_status, bundled_status};
pub use client::{Client, ClientError, EventStream, running_resources};
pub use command::{Command, MetaIndex};
pub use event::{Action, Event, HelperPhase, diff};
pub use frame::{FRAME_BYTES_MAX, FrameDecoder, FrameError, encode};
pub use gi::GenerationInfo;
pub use kernel::{Kernel, KernelError, NESTED_ENV, ToolOutput};
pub use options::Options;
pub use protocol::{
    ClientMessage, EventBatch, PROTOCOL_VERSION, Payload, Reply, ServerMessage, TimeoutType, runtime_dir,
    socket_path,
};
pub use refusal::{Refusal, code, exit_code, text_of};
pub use running::{
    RunningBacking, RunningConnection, RunningPath, RunningPeerDevice, RunningResource, RunningVolume,
};
pub use settings::{Engine, ResourceSettings, Settings, SettingsError};
pub use state::{ConnectionState, DiskState, ReplicationState, Role, UnknownState, WriteOrdering};
pub use status::{
    ConnectionStatus, DeviceStatistics, DeviceStatus, PathStatus, PeerDeviceStatus, ResourceStatus,
    ResyncSuspended, SyncDetails, VerifyDetails,
};
