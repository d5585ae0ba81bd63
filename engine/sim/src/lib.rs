//! Simulator and scenario runner: many cores on virtual disks, links and time.
#![forbid(unsafe_code)]

mod check;
pub mod commands;
pub mod disk;
pub mod front;
pub mod link;
pub mod node;
pub mod options;
pub mod plan;
pub mod rng;
pub mod scenario;
pub mod seeds;
pub mod world;
