//! The tests over real clients and real devices.

#![allow(clippy::unwrap_used, clippy::panic)]

mod device;
mod nbd_clients;
mod support;
