//! Resynchronisation: bitmap exchange, target, source, and how it ends
//! (`spec/state-machine.md` §11, `spec/wire-protocol.md` §8, §10).
//!
//! The target asks, the source answers. A request holds its range at the target from the asking on against writes of
//! *other* nodes, from the answer on against everybody; at the source from the read until the target's
//! acknowledgement. Each request names the position in the Primary's write stream the target had reached, and the
//! source answers only when it is as far: so resync data is never older than what it replaces.
//!
//! Here is what is known of a resync on either side, and the way of its packets; each step has its own file, in the
//! order `exchange`, `start`, `target` and `source`, `finish`.

mod exchange;
mod finish;
mod in_sync;
mod reconcile;
mod source;
mod start;
mod target;

pub(crate) use reconcile::LostPosition;

use crate::core::Core;
use crate::tables::rate::RateController;
use crate::types::{NodeId, Time, VolumeNr};
use bytes::Bytes;
use palisade_wire::enums::ConnState;
use palisade_wire::{DagtagReq, Packet};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Turns of the rate controller.
const TURN: Duration = Duration::from_millis(100);

/// How far a request of the target got.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum TargetPhase {
    Asked,
    /// Answered; waits for I/O in progress in its range.
    Received(Bytes),
    Writing,
}

/// A request of the target.
#[derive(Debug)]
pub(crate) struct TargetRequest {
    pub sector: u64,
    pub len: u32,
    pub phase: TargetPhase,
}

/// How far the end of a resync got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ending {
    No,
    /// A ping is out: a dead source must be noticed first.
    Ping,
    /// The own disk is being flushed.
    Flush,
}

/// A resync as target.
#[derive(Debug)]
pub(crate) struct TargetState {
    pub start_uuid: u64,
    /// Tells this resync's flush from an earlier one's.
    pub start_serial: u64,
    pub unstable: bool,
    pub cursor: u64,
    pub pending: BTreeMap<u64, TargetRequest>,
    pub in_flight: u64,
    pub sectors_in: u64,
    pub last_turn: Time,
    pub rate: RateController,
    pub failed: bool,
    pub ending: Ending,
    /// P_FLUSH_REQUESTS_ACKs that are awaited: (from, primary).
    pub flush_wait: BTreeSet<(NodeId, NodeId)>,
    pub flush_sequence: u64,
}

impl TargetState {
    fn new(now: Time) -> Self {
        Self {
            start_uuid: 0,
            start_serial: 0,
            unstable: false,
            cursor: 0,
            pending: BTreeMap::new(),
            in_flight: 0,
            sectors_in: 0,
            last_turn: now - TURN,
            rate: RateController::new(),
            failed: false,
            ending: Ending::No,
            flush_wait: BTreeSet::new(),
            flush_sequence: 0,
        }
    }
}

/// How far a request at the source got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SourcePhase {
    /// Waits for the start of the resync, the Primary's stream, or writes in its range.
    Waiting,
    Reading,
    /// Answered; the range is held until the acknowledgement.
    Answered,
}

/// A request at the source.
#[derive(Debug)]
pub(crate) struct SourceRequest {
    pub sector: u64,
    pub len: u32,
    pub node: NodeId,
    pub dagtag: u64,
    pub phase: SourcePhase,
    pub lock: u64,
}

impl Core {
    /// Packets of resync and verify.
    pub(crate) fn resync_packet(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        packet: &Packet,
        digest: &Bytes,
        data: Bytes,
    ) {
        match *packet {
            Packet::RsDataRequest(r) => {
                let q = DagtagReq {
                    sector: r.sector,
                    block_id: r.block_id,
                    blksize: r.blksize,
                    dagtag_node_id: 0,
                    dagtag: 0,
                };
                self.got_resync_request(n, v, &q);
            }
            Packet::RsDagtagReq(r) | Packet::RsThinDagtagReq(r) => self.got_resync_request(n, v, &r),
            Packet::RsThinReq(r) => {
                let q = DagtagReq {
                    sector: r.sector,
                    block_id: r.block_id,
                    blksize: r.blksize,
                    dagtag_node_id: 0,
                    dagtag: 0,
                };
                self.got_resync_request(n, v, &q);
            }
            Packet::RsDataReply(d) => {
                if self.digest_ok(n, digest, &data) {
                    self.got_resync_data(n, v, &d, data);
                }
            }
            Packet::RsWriteAck(a) => self.got_resync_ack(n, v, a.block_id, a.sector, a.blksize, true),
            Packet::RsNegAck(a) => self.got_resync_ack(n, v, a.block_id, a.sector, a.blksize, false),
            Packet::NegRsDreply(a) => self.resync_refused(n, v, a.block_id, true),
            Packet::RsCancel(a) | Packet::RsCancelAhead(a) => self.resync_refused(n, v, a.block_id, false),
            Packet::RsIsInSync(a) => self.got_in_sync(n, v, a.block_id),
            _ => self.drop_link(
                n,
                ConnState::ProtocolError,
                "packet for a feature that was not agreed or configured",
            ),
        }
    }
}
