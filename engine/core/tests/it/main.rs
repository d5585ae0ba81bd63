//! The tests of cores that talk to each other.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod cluster;
mod epochs;
mod harness;
mod regressions;
