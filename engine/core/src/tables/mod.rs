//! The decision tables of the state machine, each readable side by side with `spec/state-machine.md`.
//!
//! Everything here is a pure function or a small value: no I/O, no clock, no randomness, no policy that is
//! not in an argument. The state engine gathers the facts, asks a table, and carries out the answer.
//! Node ids are plain `u8` 0..31 and node masks plain `u64` in this folder; the engine's newtypes stay
//! outside of it.

pub mod compare;
pub mod distances;
pub mod fencing;
pub mod finished;
#[cfg(test)]
mod fixtures;
pub mod quorum;
pub mod rate;
pub mod refusal;
pub mod split_brain;
pub mod strategy;
pub mod uuid;

/// Number of node ids; a node id is always below it.
pub const NODES: usize = 32;

/// The mask with only the bit of `node`; 0 for an id that does not exist.
pub fn node_bit(node: u8) -> u64 {
    if usize::from(node) < NODES { 1 << node } else { 0 }
}
