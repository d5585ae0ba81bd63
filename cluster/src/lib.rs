//! Pacemaker as seen from outside: what a program that Pacemaker runs (an OCF agent, a handler) needs
//! to know about its caller and may ask of the cluster.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`ocf`] | exit codes, the `OCF_*` environment, the exit reason |
//! | [`notify`] | the clone notification lists |
//! | [`log`] | `tracing` events in the log format of resource agents |
//! | [`child`] | running another program with a time limit |
//! | [`pacemaker`] | promotion score, location of promoted instances |
//!
//! Nothing here goes through a shell, waits without a limit, or knows anything about replication.
//! Source of the rules: `spec/ocf-agents.md` §1.
#![forbid(unsafe_code)]

pub mod child;
pub mod log;
pub mod notify;
pub mod ocf;
pub mod pacemaker;

pub use child::{ChildError, Output};
pub use notify::{Notification, NotifyOperation, NotifyPhase};
pub use ocf::{Environment, ExitCode};
pub use pacemaker::{Pacemaker, PacemakerError};
