//! The tests over whole images: recorded ones, arbitrary ones, and those of the packaged tool.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;
mod golden_kernel;
mod golden_tool;
mod random;
mod real_tool;
