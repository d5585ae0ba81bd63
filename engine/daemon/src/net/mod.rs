//! Two TCP streams per peer: finding each other, then moving packets (`spec/wire-protocol.md` §2).
//!
//! - [`dial`]: the connect loop of one peer, a state machine without sockets of its own thread;
//! - [`link`]: the two streams of an established connection, packets in and out;
//! - [`peers`]: all peers of the resource, their listeners, and what the engine's loop calls.
//!
//! This room knows headers and lengths; what a packet means is the core's business.

pub mod dial;
pub mod link;
pub mod peers;

pub use dial::{Path, Timing};
pub use link::LinkId;
