//! The NBD server protocol without I/O: fixed newstyle negotiation and transmission of one connection.
//!
//! [`Session`] neither reads nor writes: bytes go in, [`crate::BlockRequest`]s come out; replies go
//! in, bytes come out. The loop of a caller:
//!
//! 1. [`Session::take_input`] gives a buffer to receive into; after the receive,
//!    [`Session::give_input`] hands it back with the count (0 is the end of the stream). Large write
//!    payloads are received straight into page-aligned buffers of the [`crate::BufferPool`]. None means: do not
//!    receive now (too much in flight, or closed); ask again after [`Session::complete`] or
//!    [`Session::take_output`].
//! 2. [`Session::next_request`] until none; answer each with [`Session::complete`], in any order.
//!    Received requests beyond the limits wait inside the session: after [`Session::complete`] and
//!    [`Session::take_output`] ask again, before waiting for the socket.
//! 3. [`Session::take_output`]: chunks for one `writev`, in order.
//! 4. When [`Session::is_finished`], close the connection.
//!
//! Several sessions may serve one device at the same time (`CAN_MULTI_CONN`): the engine's flush
//! covers the answered writes of all of them.
//!
//! Hostile input leads to an error reply or to the end of the connection, memory stays within
//! [`Limits`]. TLS is not offered.

mod negotiate;
mod output;
pub mod proto;
mod session;
mod transmit;

pub(crate) use negotiate::transmission_flags;
pub use session::{Close, Export, InputBuf, Limits, Session};

/// Name of the metadata context with holes and zeroes.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";

/// Name of the metadata context with what is not on every replica yet (status bit 0).
pub const CONTEXT_OUT_OF_SYNC: &str = "palisade:out-of-sync";

#[cfg(test)]
mod tests;
