//! The network between two nodes: one session of two ordered streams, cuts, delays, half-open ends.
//!
//! End 0 is the node with the lower index, end 1 the other; direction `d` is from end `d` to end `1 - d`.
//! TCP never skips: a packet lost to a cut takes everything after it along, unless the cut heals while the
//! sender is still retransmitting.

use bytes::Bytes;
use palisade_core::io::CodecCtx;
use palisade_wire::Stream;

/// A packet as it travels: header, fixed part and digest as bytes, bulk data as a handle.
#[derive(Clone, Debug)]
pub struct Wired {
    /// Stream it travels on.
    pub stream: Stream,
    /// Header, fixed part, digest.
    pub head: Bytes,
    /// Bulk data.
    pub bulk: Bytes,
}

/// What travels one way.
#[derive(Clone, Debug)]
pub enum Parcel {
    /// A packet.
    Packet(Wired),
    /// End of the stream: the other end closed it.
    End,
}

/// An established pair of streams.
#[derive(Debug)]
pub struct Session {
    /// Tells sessions apart; events of old ones are ignored.
    pub id: u64,
    /// The end has been told `LinkUp`.
    pub up: [bool; 2],
    /// The end has not closed it.
    pub open: [bool; 2],
    /// Parameters for encoding, by sending end.
    pub send: [CodecCtx; 2],
    /// Parameters for decoding, by receiving end.
    pub receive: [CodecCtx; 2],
    /// When the last packet arrives, by direction and stream: keeps each stream in order.
    pub last: [[u64; 2]; 2],
    /// Nothing arrives in this direction any more.
    pub dead: [bool; 2],
    /// Packets that wait for the cut to heal, by direction.
    pub stalled: [Vec<Parcel>; 2],
    /// Earliest time for anything to arrive, by direction: the receiver's `LinkUp`.
    pub earliest: [u64; 2],
}

/// The link of one pair of nodes.
#[derive(Debug, Default)]
pub struct Link {
    /// The end has an unanswered `Connect`.
    pub want: [bool; 2],
    /// The direction is cut.
    pub cut: [bool; 2],
    /// Counts attempts, so that old connect events are ignored.
    pub attempt: u64,
    /// A connect event is under way.
    pub connecting: bool,
    /// The session, from the first `LinkUp` until both ends closed it.
    pub session: Option<Session>,
    /// Additional delay, nanoseconds, by direction.
    pub slow: [u64; 2],
}

impl Link {
    /// Whether a connection can be made now.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.want == [true; 2] && self.cut == [false; 2] && !self.connecting && self.session.is_none()
    }
}

/// Index of a stream in arrays.
#[must_use]
pub fn stream_index(s: Stream) -> usize {
    match s {
        Stream::Data => 0,
        Stream::Control => 1,
    }
}
