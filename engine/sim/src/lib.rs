//! Simulator and scenario runner: many cores on virtual disks, links and time.
//!
//! Nothing here is real but the cores, the packet codec and the metadata code: time is a number, chance comes from
//! a seed, disks lose their cache, links delay, stall and break. Two ways in:
//!
//! - a *scenario* ([`scenario`]) is a text of commands and the states that must follow;
//! - a *seed* ([`plan`], [`seeds`]) is a random cluster with random faults whose run must hold the invariants of
//!   [`world`] and the checks of replicas and reads ([`front`]).
//!
//! `palisade-sim replay SEED --minimised --trace` shows what happened in a failing seed.
#![forbid(unsafe_code)]

mod check;
pub mod commands;
pub mod disk;
pub mod front;
pub mod link;
mod machines;
mod network;
pub mod node;
pub mod options;
pub mod plan;
pub mod rng;
pub mod scenario;
pub mod seeds;
pub mod world;
