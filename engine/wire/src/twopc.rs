//! Requests and replies of the two-phase commit (§5.4), APV >= 110.

use bytes::{BufMut, BytesMut};

use crate::body::{Body, Field, Reader};
use crate::{Cmd, DdsFlags, DecodeCtx, Features, PEERS_MAX, StateWord, TwopcFlags, WireError};

/// L26: P_TWOPC_PREPARE, P_TWOPC_ABORT, P_TWOPC_COMMIT, P_TWOPC_PREP_RSZ; 36 bytes.
///
/// | off | `ff:2PC_V2` | without |
/// |---|---|---|
/// | 0 | tid (4) | same |
/// | 4 | flags (4) | initiator (4) |
/// | 8 | zero (2), initiator (1), target (1) | target (4) |
/// | 12 | nodes_to_reach (8) | same |
/// | 20 | body (16) | same |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TwopcRequest {
    /// Random, non-zero number of the transaction.
    pub tid: u32,
    /// Sent and received with `ff:2PC_V2` only, else empty.
    pub flags: TwopcFlags,
    /// Node id of the initiator, below 32.
    pub initiator: u8,
    /// Node id of the target, below 32, if there is one.
    pub target: Option<u8>,
    /// Nodes the request has still to be forwarded to.
    pub nodes_to_reach: u64,
    /// What it is about.
    pub body: TwopcBody,
}

/// The last 16 bytes of a [`TwopcRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TwopcBody {
    /// P_TWOPC_PREPARE: a state change from the initiator's point of view. DRBD 9 disk numbers.
    State {
        /// Which fields are to change.
        mask: StateWord,
        /// To what.
        val: StateWord,
    },
    /// P_TWOPC_PREP_RSZ.
    Resize {
        /// Sectors wanted, 0 for the largest possible size.
        user_size: u64,
        /// How to resize.
        dds_flags: DdsFlags,
    },
    /// P_TWOPC_COMMIT and P_TWOPC_ABORT; the prepare with the same tid tells which meaning holds.
    Verdict {
        /// State change: primary nodes. Resize: primary nodes with a disk.
        primary_nodes: u64,
        /// State change with HAS_REACHABLE: reachable nodes. State change without: mask and val
        /// once more, see [`TwopcBody::mask_and_val`]. Resize: the new size in sectors.
        detail: u64,
    },
}

impl TwopcBody {
    /// Mask and value of a state change, from a PREPARE or from a COMMIT that repeats them.
    #[must_use]
    pub const fn mask_and_val(self) -> Option<(StateWord, StateWord)> {
        match self {
            Self::State { mask, val } => Some((mask, val)),
            Self::Verdict { detail, .. } => {
                Some((StateWord((detail >> 32) as u32), StateWord(detail as u32)))
            }
            Self::Resize { .. } => None,
        }
    }
}

impl TwopcRequest {
    /// Wire form of "no target" without `ff:2PC_V2`.
    const NO_TARGET: u32 = u32::MAX;

    /// Checks a node id from the wire.
    fn node(from: &Reader<'_>, field: &'static str, value: u32) -> Result<u8, WireError> {
        match u8::try_from(value) {
            Ok(node) if usize::from(node) < PEERS_MAX => Ok(node),
            _ => Err(from.invalid(field, value.into())),
        }
    }
}

impl Body for TwopcRequest {
    fn len_range(_: Cmd, _: &DecodeCtx) -> (usize, usize) {
        (36, 36)
    }

    fn get(from: &mut Reader<'_>, ctx: &DecodeCtx) -> Result<Self, WireError> {
        let tid = from.field("tid")?;
        let (flags, initiator, target) = if ctx.features.contains(Features::TWOPC_V2) {
            let flags = from.field("flags")?;
            from.bytes(2)?;
            let initiator = u32::from(from.field::<u8>("initiator")?);
            // Sign extension makes -1 the "no target" of the other layout.
            let target = from.field::<u8>("target")?.cast_signed() as u32;
            (flags, initiator, target)
        } else {
            (TwopcFlags::NONE, from.field("initiator")?, from.field("target")?)
        };
        let initiator = Self::node(from, "initiator", initiator)?;
        let target = match target {
            Self::NO_TARGET => None,
            node => Some(Self::node(from, "target", node)?),
        };
        let nodes_to_reach = from.field("nodes_to_reach")?;
        let body = match from.cmd {
            Cmd::TwopcPrepare => {
                from.bytes(8)?;
                TwopcBody::State { mask: from.field("mask")?, val: from.field("val")? }
            }
            Cmd::TwopcPrepRsz => {
                let user_size = from.field("user_size")?;
                let dds_flags = from.field("dds_flags")?;
                from.bytes(6)?;
                TwopcBody::Resize { user_size, dds_flags }
            }
            _ => TwopcBody::Verdict {
                primary_nodes: from.field("primary_nodes")?,
                detail: from.field("reachable_nodes")?,
            },
        };
        Ok(Self { tid, flags, initiator, target, nodes_to_reach, body })
    }

    fn put(&self, cmd: Cmd, ctx: &DecodeCtx, out: &mut BytesMut) -> Result<(), WireError> {
        for (field, node) in [("initiator", Some(self.initiator)), ("target", self.target)] {
            if let Some(node) = node.filter(|node| usize::from(*node) >= PEERS_MAX) {
                return Err(WireError::Field { cmd, field, value: node.into() });
            }
        }
        out.put_u32(self.tid);
        if ctx.features.contains(Features::TWOPC_V2) {
            self.flags.put(out);
            out.put_u16(0);
            out.put_u8(self.initiator);
            out.put_u8(self.target.unwrap_or(Self::NO_TARGET as u8));
        } else {
            out.put_u32(self.initiator.into());
            out.put_u32(self.target.map_or(Self::NO_TARGET, u32::from));
        }
        out.put_u64(self.nodes_to_reach);
        match self.body {
            TwopcBody::State { mask, val } => {
                out.put_u64(0);
                mask.0.put(out);
                val.0.put(out);
            }
            TwopcBody::Resize { user_size, dds_flags } => {
                out.put_u64(user_size);
                dds_flags.put(out);
                out.put_bytes(0, 6);
            }
            TwopcBody::Verdict { primary_nodes, detail } => {
                out.put_u64(primary_nodes);
                out.put_u64(detail);
            }
        }
        Ok(())
    }
}

crate::body::layout! {
    /// L27: P_TWOPC_YES, P_TWOPC_NO, P_TWOPC_RETRY.
    TwopcReply: 32 bytes, pad 0, check crate::body::any;
    {
        /// From the request.
        tid: u32,
        /// Node id of the initiator.
        initiator: u32,
        /// Nodes directly connected to the replier or its sub-tree, plus itself.
        reachable_nodes: u64,
        /// Primary nodes; resize: those with a disk.
        primary_nodes: u64,
        /// State change: weak nodes. Resize: the largest possible size in sectors.
        weak_nodes: u64,
    }
}

impl TwopcReply {
    /// The reply to a resize: the largest possible size in sectors, in place of the weak nodes.
    #[must_use]
    pub const fn max_possible_size(&self) -> u64 {
        self.weak_nodes
    }
}
