//! The packet table (§7): one row per packet, in the order of the specification.

use std::fmt;

use bytes::BytesMut;

use crate::body::{Body, Reader};
use crate::packets::{
    Barrier, BarrierAck, BlockAck, BlockDesc, BlockReq, CompressedBitmap, ConfirmStable, ConnectionFeatures,
    CurrentUuid, Dagtag, DagtagReq, Data, DelayProbe, EnableReplication, FlushAck, FlushForward,
    FlushRequests, PeerAck, PeerDagtag, PeersInSync, Protocol, Sizes, StateReq, SyncParam, SyncUuid, Trim,
    Uuids, Uuids110, VerifyResult,
};
use crate::{DecodeCtx, Features, StateReply, StateWord, TwopcReply, TwopcRequest, WireError};

/// One of the two TCP streams of a connection (§2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Bulk data and most commands.
    Data,
    /// Pings, acks and other small answers.
    Control,
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Data => "data",
            Self::Control => "control",
        })
    }
}

/// On which streams a packet may travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Streams {
    /// Only on the data stream.
    Data,
    /// Only on the control stream.
    Control,
    /// On either.
    Both,
}

/// What follows the fixed part of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tail {
    /// Nothing.
    Nothing,
    /// A digest of `DecodeCtx::data_digest_len` bytes, then data.
    Block,
    /// A digest of `DecodeCtx::csums_digest_len` bytes.
    CsumsDigest,
    /// A digest of `DecodeCtx::verify_digest_len` bytes.
    VerifyDigest,
    /// A digest of 1 to 64 bytes: the answer to a challenge.
    Response,
    /// The bytes of a challenge, as data.
    Challenge,
    /// Bitmap words, as data.
    Words,
    /// Bitmap code, as data.
    Code,
}

/// What the table says about a command.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) streams: Streams,
    /// First APV that has the packet.
    pub(crate) since: u32,
    /// First APV that has it no more.
    pub(crate) until: u32,
    pub(crate) feature: Features,
    pub(crate) tail: Tail,
}

macro_rules! bind {
    ($body:ident, $type:ty) => {
        $body
    };
}

macro_rules! packets {
    ($(
        $(#[$meta:meta])*
        $number:literal $variant:ident $(($type:ty))?, $name:literal, $streams:ident, $apv:expr, $feature:expr, $tail:ident;
    )*) => {
        /// Command number of a packet (§7).
        #[repr(u16)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Cmd {
            $(#[doc = concat!("`", $name, "`.")] $(#[$meta])* $variant = $number,)*
        }

        /// The fixed part of a packet (§7). Digest and bulk data travel beside it.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub enum Packet {
            $(#[doc = concat!("`", $name, "`.")] $(#[$meta])* $variant $(($type))?,)*
        }

        impl Cmd {
            /// Every command, in the order of the specification's table.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The command with this number. Reserved numbers have none (§7).
            #[must_use]
            pub const fn from_u16(number: u16) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }

            /// The specification's name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            pub(crate) fn rules(self) -> Rules {
                match self {
                    $(Self::$variant => {
                        let apv: std::ops::Range<u32> = $apv;
                        Rules {
                            streams: Streams::$streams,
                            since: apv.start,
                            until: apv.end,
                            feature: $feature,
                            tail: Tail::$tail,
                        }
                    })*
                }
            }

            /// Smallest and largest length of the fixed part.
            pub(crate) fn body_range(self, ctx: &DecodeCtx) -> (usize, usize) {
                match self {
                    $(Self::$variant => {
                        let range = (ctx, (0, 0));
                        $(let range = (ctx, <$type as Body>::len_range(self, range.0));)?
                        range.1
                    })*
                }
            }
        }

        impl Packet {
            /// The packet's command.
            #[must_use]
            pub const fn cmd(&self) -> Cmd {
                match self {
                    $(Self::$variant { .. } => Cmd::$variant,)*
                }
            }

            pub(crate) fn get(from: &mut Reader<'_>, ctx: &DecodeCtx) -> Result<Self, WireError> {
                Ok(match from.cmd {
                    $(Cmd::$variant => Self::$variant $((<$type as Body>::get(from, ctx)?))?,)*
                })
            }

            pub(crate) fn put(&self, ctx: &DecodeCtx, out: &mut BytesMut) -> Result<(), WireError> {
                match self {
                    $(Self::$variant $((bind!(body, $type)))? => {
                        $(<$type as Body>::put(body, Cmd::$variant, ctx, out)?;)?
                        Ok(())
                    })*
                }
            }
        }
    };
}

const ANY: std::ops::Range<u32> = 0..u32::MAX;

const fn since(apv: u32) -> std::ops::Range<u32> {
    apv..u32::MAX
}

const NONE: Features = Features::NONE;
const THIN: Features = Features::THIN_RESYNC;
const DAGTAG: Features = Features::RESYNC_DAGTAG;
const NO_REPL: Features = Features::RESYNC_WITHOUT_REPLICATION;

packets! {
    /// A write.
    0x00 Data(Data), "P_DATA", Data, ANY, NONE, Block;
    /// Answer to P_DATA_REQUEST.
    0x01 DataReply(Data), "P_DATA_REPLY", Data, ANY, NONE, Block;
    /// Resync data from source to target.
    0x02 RsDataReply(Data), "P_RS_DATA_REPLY", Data, ANY, NONE, Block;
    /// End of a write epoch.
    0x03 Barrier(Barrier), "P_BARRIER", Data, ANY, NONE, Nothing;
    /// Plain bitmap words; empty: end of a plain transfer.
    0x04 Bitmap, "P_BITMAP", Data, ANY, NONE, Words;
    /// Hint: submit queued I/O.
    0x07 UnplugRemote, "P_UNPLUG_REMOTE", Data, ANY, NONE, Nothing;
    /// Read request.
    0x08 DataRequest(BlockReq), "P_DATA_REQUEST", Data, ANY, NONE, Nothing;
    /// Resync request.
    0x09 RsDataRequest(BlockReq), "P_RS_DATA_REQUEST", Data, ANY, NONE, Nothing;
    /// Resync parameters, old form.
    0x0a SyncParam(SyncParam), "P_SYNC_PARAM", Data, 0..89, NONE, Nothing;
    /// Connection parameters, in the handshake.
    0x0b Protocol(Protocol), "P_PROTOCOL", Data, ANY, NONE, Nothing;
    /// Generation identifiers below APV 110.
    0x0c Uuids(Uuids), "P_UUIDS", Data, 0..110, NONE, Nothing;
    /// Sizes and limits.
    0x0d Sizes(Sizes), "P_SIZES", Data, ANY, NONE, Nothing;
    /// The sender's state.
    0x0e State(StateWord), "P_STATE", Data, ANY, NONE, Nothing;
    /// New current UUID of a sync target.
    0x0f SyncUuid(SyncUuid), "P_SYNC_UUID", Data, 0..110, NONE, Nothing;
    /// Challenge; its bytes are the bulk data.
    0x10 AuthChallenge, "P_AUTH_CHALLENGE", Data, ANY, NONE, Challenge;
    /// Response; its bytes are the digest.
    0x11 AuthResponse, "P_AUTH_RESPONSE", Data, ANY, NONE, Response;
    /// State change request for a device.
    0x12 StateChgReq(StateReq), "P_STATE_CHG_REQ", Data, 0..110, NONE, Nothing;
    /// Are you there?
    0x13 Ping, "P_PING", Control, ANY, NONE, Nothing;
    /// Yes.
    0x14 PingAck, "P_PING_ACK", Control, ANY, NONE, Nothing;
    /// Write received (protocol B).
    0x15 RecvAck(BlockAck), "P_RECV_ACK", Control, ANY, NONE, Nothing;
    /// Write completed (protocol C).
    0x16 WriteAck(BlockAck), "P_WRITE_ACK", Control, ANY, NONE, Nothing;
    /// Resync block written; below APV 122 also an application write "and set in sync".
    0x17 RsWriteAck(BlockAck), "P_RS_WRITE_ACK", Control, ANY, NONE, Nothing;
    /// Dual-primary: the write was overwritten.
    0x18 Superseded(BlockAck), "P_SUPERSEDED", Control, ANY, NONE, Nothing;
    /// Write failed.
    0x19 NegAck(BlockAck), "P_NEG_ACK", Control, ANY, NONE, Nothing;
    /// Read failed.
    0x1a NegDreply(BlockAck), "P_NEG_DREPLY", Control, ANY, NONE, Nothing;
    /// Resync or verify read failed.
    0x1b NegRsDreply(BlockAck), "P_NEG_RS_DREPLY", Control, ANY, NONE, Nothing;
    /// The epoch is stable.
    0x1c BarrierAck(BarrierAck), "P_BARRIER_ACK", Control, ANY, NONE, Nothing;
    /// Answer to P_STATE_CHG_REQ.
    0x1d StateChgReply(StateReply), "P_STATE_CHG_REPLY", Control, 0..110, NONE, Nothing;
    /// Verify request.
    0x1e OvRequest(BlockReq), "P_OV_REQUEST", Data, since(88), NONE, Nothing;
    /// Digest of a verified block.
    0x1f OvReply(BlockReq), "P_OV_REPLY", Data, since(88), NONE, VerifyDigest;
    /// Result of comparing a block.
    0x20 OvResult(BlockAck), "P_OV_RESULT", Control, 88..122, NONE, Nothing;
    /// Resync request with the digest of the target's block.
    0x21 CsumRsRequest(BlockReq), "P_CSUM_RS_REQUEST", Data, since(89), NONE, CsumsDigest;
    /// The block is equal already.
    0x22 RsIsInSync(BlockAck), "P_RS_IS_IN_SYNC", Control, since(89), NONE, Nothing;
    /// Resync parameters.
    0x23 SyncParam89(SyncParam), "P_SYNC_PARAM89", Data, since(89), NONE, Nothing;
    /// Compressed bitmap.
    0x24 CompressedBitmap(CompressedBitmap), "P_COMPRESSED_BITMAP", Data, since(90), NONE, Code;
    /// Legacy, to be skipped.
    0x27 DelayProbe(DelayProbe), "P_DELAY_PROBE", Both, ANY, NONE, Nothing;
    /// Set bits towards the sender.
    0x28 OutOfSync(BlockDesc), "P_OUT_OF_SYNC", Data, since(96), NONE, Nothing;
    /// Resync or verify request not served.
    0x29 RsCancel(BlockAck), "P_RS_CANCEL", Control, ANY, NONE, Nothing;
    /// State change request for the connection.
    0x2a ConnStChgReq(StateReq), "P_CONN_ST_CHG_REQ", Data, 100..110, NONE, Nothing;
    /// Answer to P_CONN_ST_CHG_REQ.
    0x2b ConnStChgReply(StateReply), "P_CONN_ST_CHG_REPLY", Control, 100..110, NONE, Nothing;
    /// Dual-primary: submit the write again.
    0x2c RetryWrite(BlockAck), "P_RETRY_WRITE", Control, since(100), NONE, Nothing;
    /// Connection parameters changed.
    0x2d ProtocolUpdate(Protocol), "P_PROTOCOL_UPDATE", Data, since(100), NONE, Nothing;
    /// Two-phase commit: is this state change possible?
    0x2e TwopcPrepare(TwopcRequest), "P_TWOPC_PREPARE", Data, since(110), NONE, Nothing;
    /// Two-phase commit: forget it.
    0x2f TwopcAbort(TwopcRequest), "P_TWOPC_ABORT", Data, since(110), NONE, Nothing;
    /// Sets the receiver's dagtag counter.
    0x30 Dagtag(Dagtag), "P_DAGTAG", Data, since(110), NONE, Nothing;
    /// A discard.
    0x31 Trim(Trim), "P_TRIM", Data, ANY, Features::TRIM, Nothing;
    /// Resync request that may be answered with "deallocated".
    0x32 RsThinReq(BlockReq), "P_RS_THIN_REQ", Data, ANY, THIN, Nothing;
    /// The block is all zero.
    0x33 RsDeallocated(BlockDesc), "P_RS_DEALLOCATED", Data, 0..122, THIN, Nothing;
    /// One block, written many times.
    0x34 Wsame(Trim), "P_WSAME", Data, ANY, Features::WSAME, Block;
    /// Two-phase commit: is this resize possible?
    0x35 TwopcPrepRsz(TwopcRequest), "P_TWOPC_PREP_RSZ", Data, since(112), NONE, Nothing;
    /// Write zeroes.
    0x36 Zeroes(Trim), "P_ZEROES", Data, ANY, Features::WZEROES, Nothing;
    /// Which nodes have all writes up to a dagtag.
    0x40 PeerAck(PeerAck), "P_PEER_ACK", Control, since(110), NONE, Nothing;
    /// Which nodes have an area in sync.
    0x41 PeersInSync(PeersInSync), "P_PEERS_IN_SYNC", Control, since(110), NONE, Nothing;
    /// Generation identifiers.
    0x42 Uuids110(Uuids110), "P_UUIDS110", Data, since(110), NONE, Nothing;
    /// How far the sender got with a lost node.
    0x43 PeerDagtag(PeerDagtag), "P_PEER_DAGTAG", Data, since(110), NONE, Nothing;
    /// Current UUID of a diskless node.
    0x44 CurrentUuid(CurrentUuid), "P_CURRENT_UUID", Data, since(110), NONE, Nothing;
    /// Two-phase commit: possible.
    0x45 TwopcYes(TwopcReply), "P_TWOPC_YES", Control, since(110), NONE, Nothing;
    /// Two-phase commit: refused.
    0x46 TwopcNo(TwopcReply), "P_TWOPC_NO", Control, since(110), NONE, Nothing;
    /// Two-phase commit: do it.
    0x47 TwopcCommit(TwopcRequest), "P_TWOPC_COMMIT", Data, since(110), NONE, Nothing;
    /// Two-phase commit: busy.
    0x48 TwopcRetry(TwopcReply), "P_TWOPC_RETRY", Control, since(110), NONE, Nothing;
    /// Part of the running epoch is stable.
    0x49 ConfirmStable(ConfirmStable), "P_CONFIRM_STABLE", Control, since(114), NONE, Nothing;
    /// As P_RS_CANCEL, and stop requesting.
    0x4a RsCancelAhead(BlockAck), "P_RS_CANCEL_AHEAD", Control, since(115), NONE, Nothing;
    /// Become StandAlone.
    0x4b Disconnect, "P_DISCONNECT", Data, since(118), NONE, Nothing;
    /// As P_RS_DATA_REQUEST, with a dagtag.
    0x4c RsDagtagReq(DagtagReq), "P_RS_DAGTAG_REQ", Data, since(110), DAGTAG, Nothing;
    /// As P_CSUM_RS_REQUEST, with a dagtag.
    0x4d RsCsumDagtagReq(DagtagReq), "P_RS_CSUM_DAGTAG_REQ", Data, since(110), DAGTAG, CsumsDigest;
    /// As P_RS_THIN_REQ, with a dagtag.
    0x4e RsThinDagtagReq(DagtagReq), "P_RS_THIN_DAGTAG_REQ", Data, since(110), DAGTAG, Nothing;
    /// As P_OV_REQUEST, with a dagtag.
    0x4f OvDagtagReq(DagtagReq), "P_OV_DAGTAG_REQ", Data, since(110), DAGTAG, Nothing;
    /// As P_OV_REPLY, with a dagtag.
    0x50 OvDagtagReply(DagtagReq), "P_OV_DAGTAG_REPLY", Data, since(110), DAGTAG, VerifyDigest;
    /// Write completed, both sides clear the bits.
    0x51 WriteAckInSync(BlockAck), "P_WRITE_ACK_IN_SYNC", Control, since(122), NONE, Nothing;
    /// Resync write failed.
    0x52 RsNegAck(BlockAck), "P_RS_NEG_ACK", Control, since(122), NONE, Nothing;
    /// Result of comparing a block.
    0x53 OvResultId(VerifyResult), "P_OV_RESULT_ID", Control, since(122), NONE, Nothing;
    /// The block is all zero.
    0x54 RsDeallocatedId(BlockAck), "P_RS_DEALLOCATED_ID", Data, since(122), THIN, Nothing;
    /// Flush before finishing a resync: to a primary.
    0x55 FlushRequests(FlushRequests), "P_FLUSH_REQUESTS", Data, since(123), NONE, Nothing;
    /// Flush before finishing a resync: to other nodes.
    0x56 FlushForward(FlushForward), "P_FLUSH_FORWARD", Control, since(123), NONE, Nothing;
    /// Flush before finishing a resync: back to the target.
    0x57 FlushRequestsAck(FlushAck), "P_FLUSH_REQUESTS_ACK", Data, since(123), NONE, Nothing;
    /// Whether to replicate during the next resync.
    0x58 EnableReplicationNext(EnableReplication), "P_ENABLE_REPLICATION_NEXT", Data, since(110), NO_REPL, Nothing;
    /// Whether to replicate from now on.
    0x59 EnableReplication(EnableReplication), "P_ENABLE_REPLICATION", Data, since(110), NO_REPL, Nothing;
    /// First packet of a control stream.
    0xfff1 InitialMeta, "P_INITIAL_META", Control, ANY, NONE, Nothing;
    /// First packet of a data stream.
    0xfff2 InitialData, "P_INITIAL_DATA", Data, ANY, NONE, Nothing;
    /// Versions and features.
    0xfffe ConnectionFeatures(ConnectionFeatures), "P_CONNECTION_FEATURES", Data, ANY, NONE, Nothing;
}

impl Cmd {
    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// On which streams the packet may travel.
    #[must_use]
    pub fn streams(self) -> Streams {
        self.rules().streams
    }

    /// What follows the fixed part.
    #[must_use]
    pub fn tail(self) -> Tail {
        self.rules().tail
    }

    /// Whether the packet may be sent under what was agreed.
    #[must_use]
    pub fn is_agreed(self, ctx: &DecodeCtx) -> bool {
        let rules = self.rules();
        (rules.since..rules.until).contains(&ctx.apv) && ctx.features.contains(rules.feature)
    }
}

impl fmt::Display for Cmd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
