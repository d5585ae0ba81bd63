//! The writer's side of the data path: front-end requests, epochs, acknowledgements, peer-acks
//! (`spec/wire-protocol.md` §9, `spec/state-machine.md` §12.1, §13, §16).
//!
//! A write goes: waits for frozen I/O, a new generation, overlapping writes; takes its range and its extents; waits
//! until the extents are hot; is submitted to the local disk and to every peer at once; completes to the
//! front end when every leg its protocol asks for has answered; is forgotten when every peer has acknowledged the
//! barrier of its epoch, which is also when its extents may cool down.
//!
//! Here are its types; each step has its own file, in the order `admit`, `submit`, `complete`, `epochs`. Payloads are
//! handles and must never be copied.

mod admit;
mod barrier;
mod complete;
mod epochs;
mod flush;
mod submit;

use crate::io::BlockId;
use crate::types::{NodeId, NodeMask, Time, VolumeNr};
use bytes::Bytes;
use std::collections::BTreeMap;

/// What a write does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Payload {
    Data { data: Bytes, fua: bool },
    Discard,
    Zeroes { unmap: bool },
}

/// One leg of a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Leg {
    /// Asked, not answered.
    Pending,
    /// On the peer (protocol A: on its way), or on the local disk.
    Ok,
    /// The peer or the disk could not write it.
    Failed,
    /// The link went away first.
    Lost,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerLeg {
    pub node: NodeId,
    pub leg: Leg,
    /// What counts for completion: nothing (A), receipt (B), the write (C).
    pub needed: bool,
    /// The barrier of the epoch (or the loss of the link) settled it.
    pub settled: bool,
    /// The link it went over is gone.
    pub gone: bool,
    /// The peer's disk was UpToDate: its success alone makes the write good.
    pub up_to_date: bool,
}

/// A write of the front end.
#[derive(Debug)]
pub(crate) struct Request {
    pub block: BlockId,
    pub vnr: VolumeNr,
    pub sector: u64,
    pub len: u32,
    pub payload: Payload,
    pub local: Option<Leg>,
    /// The own disk was UpToDate: its success alone makes the write good.
    pub local_up_to_date: bool,
    pub peers: Vec<PeerLeg>,
    pub dagtag: u64,
    pub epoch: u32,
    pub submitted: bool,
    pub completed: bool,
    pub al_held: bool,
}

/// A flush of the front end.
#[derive(Debug)]
pub(crate) struct FlushRequest {
    pub block: BlockId,
    pub vnr: VolumeNr,
    pub local_pending: bool,
    /// Somebody with current data made it stable: the local disk, or an UpToDate peer by its barrier
    /// acknowledgement.
    pub good: bool,
    /// Peers that have not acknowledged the barrier of this epoch yet.
    pub peers: BTreeMap<NodeId, u32>,
}

/// A submitted write in dagtag order, until its peer-ack is decided.
#[derive(Debug)]
pub(crate) struct TransferLogEntry {
    pub dagtag: u64,
    pub id: u64,
    /// Set when the write is settled everywhere: nodes that have it, nodes it was sent to.
    pub settled: Option<(NodeMask, NodeMask)>,
    pub sectors: u64,
}

/// Peer-acks that are still being merged (`spec/wire-protocol.md` §9.9).
#[derive(Debug, Default)]
pub(crate) struct PeerAckBatch {
    pub mask: NodeMask,
    pub sectors: u64,
    pub last: BTreeMap<NodeId, u64>,
    pub since: Option<Time>,
}

pub(crate) fn digest_of(alg: &str, data: &[u8]) -> Bytes {
    crate::auth::DigestAlg::parse(alg).map_or_else(|_| Bytes::new(), |a| crate::auth::digest(a, data).into())
}
