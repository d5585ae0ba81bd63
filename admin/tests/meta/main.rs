//! `drbdmeta` as its users see it: what the reference printed and wrote, what it does not do, and that
//! the packaged tool reads what is written here.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod cases;
mod common;
mod loops;
mod more;
mod transcript;
