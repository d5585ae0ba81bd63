//! Block front ends of the engine: how a machine or a client sees a replicated volume.
//!
//! Every front end delivers the same [`BlockRequest`]s and takes the same [`Reply`]s, so the engine's
//! loop treats them alike:
//!
//! - [`nbd::Session`]: the NBD server protocol without I/O; the caller moves the bytes.
//! - [`DeviceExport`]: `/dev/drbdN`, through the kernel's NBD client  or through a
//!   FUSE file under a loop device ([`BackendKind::FuseLoop`]); [`open_device`] makes one, [`BackendKind::detect`] tells what the kernel has.
//!
//! The engine is one thread. Nothing here blocks it: device backends do their blocking work on their
//! own threads and report through one event file descriptor ([`DeviceExport::event_fd`]).
//!
//! Ordering contract towards the engine: a front end never reorders or merges; a `Flush` covers the
//! writes whose replies were given before the flush was received, whichever front end or connection
//! they came through; `fua` makes that one request durable before its reply.

mod block;
mod buffer;
mod carried;
mod channel;
mod device;
mod fuse;
mod kernel_nbd;
pub mod nbd;
mod node;
mod owner;
mod sys;
mod users;

pub use block::{BlockRequest, Errno, Extent, Op, Reply};
pub use buffer::{ALIGN, AlignedBuf, BufferPool};
pub use carried::open_device;
pub use device::{BackendKind, DeviceError, DeviceEvent, DeviceExport, DeviceParams, User};
pub use sys::set_io_flusher;
