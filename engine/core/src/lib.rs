//! The replicated state machine of one resource on one node: resources, connections, volumes, requests,
//! generation identifiers, two-phase commit, quorum, resync.
//!
//! It is a deterministic library. It never opens a socket or a file, reads no clock, starts no thread and makes no
//! chance of its own: time and seed are arguments. [`Core::handle`] takes what happened, [`Core::poll_output`]
//! hands out what is to be done, [`Core::next_timeout`] says when to come back. [`io`] is the whole contract,
//! with the ordering rules a caller must keep. Two types matter: [`Core`] and [`io::Input`].
//!
//! The rules are those of `spec/state-machine.md` and `spec/wire-protocol.md`; decision tables live in
//! [`tables`], each as data or one `match`.
#![forbid(unsafe_code)]

mod activity_log;
mod admin;
pub mod auth;
pub mod config;
mod connection;
mod core;
mod device;
mod effects;
mod handshake;
mod intervals;
pub mod io;
mod link;
mod meta;
mod params;
mod read;
mod replica;
mod resync;
pub mod state;
pub mod status;
pub mod tables;
mod twopc;
pub mod types;
mod watch;
mod write;

pub use crate::core::{AdminError, Core};
pub use link::{APV_MAX, APV_MIN, FEATURES};
