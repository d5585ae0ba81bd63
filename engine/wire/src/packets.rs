//! The fixed part of every packet (§4 to §6; L1 to L28 are the layout names of §6).
//!
//! Sectors are 512 bytes, sizes are bytes, integers big endian. "Opaque" values are echoed
//! unchanged and mean nothing to the receiver.

use std::fmt;

use bytes::{BufMut, BytesMut};

use crate::bits::bits;
use crate::body::{Body, Field, Reader, any, layout};
use crate::{
    ALG_FIELD_LEN, AfterSb, Cmd, DecodeCtx, DpFlags, Features, HISTORY_UUIDS, PEERS_MAX, SECTOR_MAX,
    StateReply, StateWord, UuidFlags, WireError, WireProtocol, max_batch_size, max_bio_size,
};

fn sector_ok(cmd: Cmd, sector: u64) -> Result<(), WireError> {
    if sector > SECTOR_MAX {
        return Err(WireError::Field { cmd, field: "sector", value: sector });
    }
    Ok(())
}

fn size_ok(cmd: Cmd, size: u32, max: u32) -> Result<(), WireError> {
    if size == 0 || !size.is_multiple_of(512) || size > max {
        return Err(WireError::Field { cmd, field: "size", value: size.into() });
    }
    Ok(())
}

bits! {
    /// conn_flags of P_PROTOCOL (§4.5).
    ConnFlags: u32 {
        /// The sender's data may be discarded.
        DISCARD_MY_DATA = 1,
        /// Only find out what a connection would do.
        DRY_RUN = 2,
    }
}

bits! {
    /// dds_flags of P_SIZES and of a resize (§4.7, §5.4).
    DdsFlags: u16 {
        /// Assume that unconnected peers have the space.
        FORCED = 1,
        /// Do not resync the new area.
        NO_RESYNC = 2,
    }
}

layout! {
    /// L1: P_DATA, P_DATA_REPLY, P_RS_DATA_REPLY. A digest (if agreed) and the data follow.
    Data: 24 bytes, pad 0, check |this, cmd, _| sector_ok(cmd, this.sector);
    {
        /// First sector.
        sector: u64,
        /// Opaque.
        block_id: u64,
        /// Number of this packet among the sender's for this device (§6.3); 0 in replies.
        seq_num: u32,
        /// Flags; 0 in replies.
        dp_flags: DpFlags,
    }
}

layout! {
    /// L2, L3: P_TRIM and P_ZEROES (nothing follows), P_WSAME (digest and one block follow).
    Trim: 28 bytes, pad 0, check |this, cmd, ctx| {
        sector_ok(cmd, this.sector)?;
        size_ok(cmd, this.size, max_batch_size(ctx.features))
    };
    {
        /// First sector.
        sector: u64,
        /// Opaque.
        block_id: u64,
        /// As in [`Data`].
        seq_num: u32,
        /// Flags.
        dp_flags: DpFlags,
        /// Affected bytes.
        size: u32,
    }
}

layout! {
    /// L4: acknowledgements and other answers about one block.
    BlockAck: 24 bytes, pad 0, check |this, cmd, _| sector_ok(cmd, this.sector);
    {
        /// First sector of the request.
        sector: u64,
        /// Echoed from the request; P_OV_RESULT: [`crate::ID_IN_SYNC`] and its siblings.
        block_id: u64,
        /// Bytes of the request.
        blksize: u32,
        /// As in [`Data`], one numbering for both streams; 0 in P_RS_DEALLOCATED_ID.
        seq_num: u32,
    }
}

layout! {
    /// L5: read, resync and verify requests. The pad is undefined on receive (8.4 leaves old bytes).
    BlockReq: 24 bytes, pad 4, check |this, cmd, ctx| {
        sector_ok(cmd, this.sector)?;
        size_ok(cmd, this.blksize, max_bio_size(ctx.apv))
    };
    {
        /// First sector.
        sector: u64,
        /// Opaque.
        block_id: u64,
        /// Bytes.
        blksize: u32,
    }
}

layout! {
    /// L6: resync and verify requests with a dagtag dependency (§10.4).
    DagtagReq: 32 bytes, pad 0, check |this, cmd, ctx| {
        sector_ok(cmd, this.sector)?;
        size_ok(cmd, this.blksize, max_bio_size(ctx.apv))
    };
    {
        /// First sector.
        sector: u64,
        /// Opaque.
        block_id: u64,
        /// Bytes.
        blksize: u32,
        /// The primary whose write must have arrived.
        dagtag_node_id: u32,
        /// That write's dagtag; 0 for none.
        dagtag: u64,
    }
}

layout! {
    /// L7: end of a write epoch.
    Barrier: 8 bytes, pad 4, check any;
    {
        /// Opaque number of the epoch (big endian reading; kernels write host order).
        barrier: u32,
    }
}

layout! {
    /// L8: the epoch is stable.
    BarrierAck: 8 bytes, pad 0, check any;
    {
        /// Echoed from [`Barrier`].
        barrier: u32,
        /// Writes of the epoch that were not reported with [`ConfirmStable`].
        set_size: u32,
    }
}

layout! {
    /// L9: P_OUT_OF_SYNC and P_RS_DEALLOCATED. The pad is undefined on receive.
    BlockDesc: 16 bytes, pad 4, check |this, cmd, _| sector_ok(cmd, this.sector);
    {
        /// First sector.
        sector: u64,
        /// Bytes.
        blksize: u32,
    }
}

layout! {
    /// L10: P_OV_RESULT_ID.
    VerifyResult: 32 bytes, pad 4, check |this, cmd, _| sector_ok(cmd, this.sector);
    {
        /// First sector.
        sector: u64,
        /// Echoed from the request.
        block_id: u64,
        /// Bytes.
        blksize: u32,
        /// As in [`Data`].
        seq_num: u32,
        /// 0 skipped, 1 in sync, 2 out of sync.
        result: u32,
    }
}

impl VerifyResult {
    /// The block was not compared.
    pub const SKIPPED: u32 = 0;
    /// Both copies are equal.
    pub const IN_SYNC: u32 = 1;
    /// The copies differ.
    pub const OUT_OF_SYNC: u32 = 2;
}

layout! {
    /// L11: part of the running epoch is stable (§9.5).
    ConfirmStable: 24 bytes, pad 4, check any;
    {
        /// block_id of the oldest write confirmed.
        oldest_block_id: u64,
        /// block_id of the youngest write confirmed.
        youngest_block_id: u64,
        /// Writes from the oldest to the youngest, both included.
        set_size: u32,
    }
}

layout! {
    /// L12: all writes up to the dagtag are on the nodes of the mask (§9.9).
    PeerAck: 16 bytes, pad 0, check any;
    {
        /// Bit n: node n.
        mask: u64,
        /// Dagtag of one of the receiver's writes.
        dagtag: u64,
    }
}

layout! {
    /// L13: an area is identical on the nodes of the mask (§9.10).
    PeersInSync: 24 bytes, pad 4, check |this, cmd, _| sector_ok(cmd, this.sector);
    {
        /// First sector.
        sector: u64,
        /// Bit n: node n.
        mask: u64,
        /// Bytes.
        size: u32,
    }
}

layout! {
    /// L14: sets the receiver's dagtag counter of this connection.
    Dagtag: 8 bytes, pad 0, check any;
    {
        /// The new value.
        dagtag: u64,
    }
}

layout! {
    /// L15: how far the sender got with a lost node (§10.8).
    PeerDagtag: 12 bytes, pad 0, check any;
    {
        /// The sender's counter for the lost node.
        dagtag: u64,
        /// The lost node.
        node_id: u32,
    }
}

layout! {
    /// L16: P_FLUSH_REQUESTS (§10.7).
    FlushRequests: 8 bytes, pad 0, check any;
    {
        /// Non-zero.
        flush_sequence: u64,
    }
}

layout! {
    /// L17: P_FLUSH_FORWARD (§10.7).
    FlushForward: 12 bytes, pad 0, check any;
    {
        /// From [`FlushRequests`].
        flush_sequence: u64,
        /// Who sent that.
        initiator_node_id: u32,
    }
}

layout! {
    /// L18: P_FLUSH_REQUESTS_ACK (§10.7).
    FlushAck: 12 bytes, pad 0, check any;
    {
        /// From [`FlushRequests`].
        flush_sequence: u64,
        /// The primary whose writes are flushed.
        primary_node_id: u32,
    }
}

layout! {
    /// L19: P_ENABLE_REPLICATION and P_ENABLE_REPLICATION_NEXT (§10.6).
    EnableReplication: 4 bytes, pad 3, check any;
    {
        /// Whether writes are to be replicated to the sender.
        enable: bool,
    }
}

layout! {
    /// L20: legacy, skipped by receivers.
    DelayProbe: 8 bytes, pad 0, check any;
    {
        /// Number of the probe.
        seq_num: u32,
        /// Microseconds.
        offset: u32,
    }
}

layout! {
    /// L21: P_SYNC_UUID (§4.11).
    SyncUuid: 8 bytes, pad 0, check any;
    {
        /// The target's new current UUID.
        uuid: u64,
    }
}

layout! {
    /// L22: P_CURRENT_UUID (§4.10).
    CurrentUuid: 16 bytes, pad 0, check any;
    {
        /// Exposed data UUID, 0 for none.
        uuid: u64,
        /// Bit n: node n does not have the new data generation.
        weak_nodes: u64,
    }
}

layout! {
    /// L24: P_STATE_CHG_REQ and P_CONN_ST_CHG_REQ, from the sender's point of view (§5.3).
    ///
    /// Disk numbers are as the peer wrote them: kernels do not translate them here (§14, point 3).
    StateReq: 8 bytes, pad 0, check any;
    {
        /// Which fields are to change.
        mask: StateWord,
        /// To what.
        val: StateWord,
    }
}

layout! {
    /// P_UUIDS (§4.8), APV < 110.
    Uuids: 48 bytes, pad 0, check any;
    {
        /// Current UUID.
        current: u64,
        /// Bitmap UUID towards the receiver.
        bitmap: u64,
        /// History, newest first.
        history: [u64; 2],
        /// Set bits in the sender's bitmap.
        dirty_bits: u64,
        /// Only bits 0 to 3.
        flags: UuidFlags,
    }
}

layout! {
    /// P_COMPRESSED_BITMAP (§8.3); the code bytes follow. See [`crate::bitmap`].
    CompressedBitmap: 1 bytes, pad 0, check |this, cmd, _| {
        if this.encoding & 0x0f != CompressedBitmap::RLE_VLI {
            return Err(WireError::Field { cmd, field: "encoding", value: this.encoding.into() });
        }
        Ok(())
    };
    {
        /// Bits 0..3 code, 4..6 pad bits at the end, 7 polarity of the first run.
        encoding: u8,
    }
}

impl CompressedBitmap {
    /// The only defined code.
    pub const RLE_VLI: u8 = 2;
}

layout! {
    /// P_CONNECTION_FEATURES (§4.1).
    ConnectionFeatures: 72 bytes, pad 52, check any;
    {
        /// Lowest protocol version accepted.
        protocol_min: u32,
        /// Features offered.
        features: Features,
        /// Highest protocol version accepted; 0 from ancient peers means `protocol_min`.
        protocol_max: u32,
        /// Node id of the sender; 0 and meaningless below APV 110.
        sender_node_id: u32,
        /// Node id of the receiver according to the sender; 0 and meaningless below APV 110.
        receiver_node_id: u32,
    }
}

/// L23: P_STATE. The codec translates the disk numbers of peers below APV 110 (§1.2).
impl Body for StateWord {
    fn len_range(_: Cmd, _: &DecodeCtx) -> (usize, usize) {
        (4, 4)
    }

    fn get(from: &mut Reader<'_>, ctx: &DecodeCtx) -> Result<Self, WireError> {
        let raw = Self(from.field("state")?);
        let word = if ctx.apv < crate::APV_V9 { raw.from_84() } else { raw };
        if word.is_state() { Ok(word) } else { Err(from.invalid("state", raw.0.into())) }
    }

    fn put(&self, cmd: Cmd, ctx: &DecodeCtx, out: &mut BytesMut) -> Result<(), WireError> {
        if !self.is_state() {
            return Err(WireError::Field { cmd, field: "state", value: self.0.into() });
        }
        let word = if ctx.apv < crate::APV_V9 { self.to_84() } else { *self };
        out.put_u32(word.0);
        Ok(())
    }
}

/// L25: P_STATE_CHG_REPLY and P_CONN_ST_CHG_REPLY.
impl Body for StateReply {
    fn len_range(_: Cmd, _: &DecodeCtx) -> (usize, usize) {
        (4, 4)
    }

    fn get(from: &mut Reader<'_>, _: &DecodeCtx) -> Result<Self, WireError> {
        from.field("retcode")
    }

    fn put(&self, _: Cmd, _: &DecodeCtx, out: &mut BytesMut) -> Result<(), WireError> {
        Field::put(self, out);
        Ok(())
    }
}

/// Name of a hash algorithm as in the kernel's crypto API; empty for "none". At most 63 printable
/// ASCII characters (§1.1).
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct AlgName(String);

impl AlgName {
    /// The name, if it can be sent.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let printable = name.bytes().all(|byte| byte.is_ascii_graphic());
        (printable && name.len() < ALG_FIELD_LEN).then(|| Self(name.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether there is no algorithm.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Decodes a NUL terminated name; what follows the NUL is ignored.
    fn get(from: &mut Reader<'_>, len: usize, field: &'static str) -> Result<Self, WireError> {
        let cmd = from.cmd;
        let bytes = from.bytes(len)?;
        let name = bytes.split(|byte| *byte == 0).next().filter(|name| name.len() < len);
        name.and_then(|name| Self::new(std::str::from_utf8(name).ok()?)).ok_or(WireError::Name { cmd, field })
    }

    /// Encodes the name with its NUL, filled with zeroes up to `len` bytes.
    fn put(&self, len: usize, out: &mut BytesMut) {
        out.put_slice(self.0.as_bytes());
        out.put_bytes(0, len.saturating_sub(self.0.len()).max(1));
    }
}

impl fmt::Debug for AlgName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// P_PROTOCOL and P_PROTOCOL_UPDATE (§4.5): u32 protocol, after_sb_0p, _1p, _2p, conn_flags,
/// two_primaries; from APV 87 on the integrity algorithm, a string with its NUL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Protocol {
    /// A, B or C.
    pub protocol: WireProtocol,
    /// Policy for a split brain without primary.
    pub after_sb_0p: AfterSb,
    /// Policy for one primary.
    pub after_sb_1p: AfterSb,
    /// Policy for two primaries.
    pub after_sb_2p: AfterSb,
    /// Discard-my-data, dry run.
    pub conn_flags: ConnFlags,
    /// allow-two-primaries.
    pub two_primaries: bool,
    /// data-integrity-alg of the sender.
    pub integrity_alg: AlgName,
}

impl Body for Protocol {
    fn len_range(_: Cmd, ctx: &DecodeCtx) -> (usize, usize) {
        if ctx.apv < 87 { (24, 24) } else { (25, 24 + ALG_FIELD_LEN) }
    }

    fn get(from: &mut Reader<'_>, ctx: &DecodeCtx) -> Result<Self, WireError> {
        Ok(Self {
            protocol: from.field("protocol")?,
            after_sb_0p: from.field("after_sb_0p")?,
            after_sb_1p: from.field("after_sb_1p")?,
            after_sb_2p: from.field("after_sb_2p")?,
            conn_flags: from.field("conn_flags")?,
            two_primaries: from.field::<u32>("two_primaries")? != 0,
            integrity_alg: if ctx.apv < 87 {
                AlgName::default()
            } else {
                AlgName::get(from, from.remaining(), "integrity_alg")?
            },
        })
    }

    fn put(&self, _: Cmd, ctx: &DecodeCtx, out: &mut BytesMut) -> Result<(), WireError> {
        self.protocol.put(out);
        self.after_sb_0p.put(out);
        self.after_sb_1p.put(out);
        self.after_sb_2p.put(out);
        self.conn_flags.put(out);
        out.put_u32(self.two_primaries.into());
        if ctx.apv >= 87 {
            self.integrity_alg.put(0, out);
        }
        Ok(())
    }
}

/// P_SYNC_PARAM and P_SYNC_PARAM89 (§4.6). What an older version does not carry is empty or 0.
///
/// | APV | payload |
/// |---|---|
/// | < 88 | rate |
/// | 88 | rate, verify_alg as a string with NUL |
/// | 89..94 | rate, verify_alg (64 bytes), csums_alg (64 bytes) |
/// | >= 95 | the same, then c_plan_ahead, c_delay_target, c_fill_target, c_max_rate |
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SyncParam {
    /// Resync rate in KiB/s.
    pub resync_rate: u32,
    /// Hash for online verify.
    pub verify_alg: AlgName,
    /// Hash for checksum based resync.
    pub csums_alg: AlgName,
    /// Unit 0.1 s.
    pub c_plan_ahead: u32,
    /// Unit 0.1 s.
    pub c_delay_target: u32,
    /// Sectors.
    pub c_fill_target: u32,
    /// KiB/s.
    pub c_max_rate: u32,
}

impl Body for SyncParam {
    fn len_range(cmd: Cmd, ctx: &DecodeCtx) -> (usize, usize) {
        match (cmd, ctx.apv) {
            (Cmd::SyncParam, 0..=87) => (4, 4),
            (Cmd::SyncParam, _) => (5, 4 + ALG_FIELD_LEN),
            (_, 0..=94) => (132, 132),
            _ => (148, 148),
        }
    }

    fn get(from: &mut Reader<'_>, ctx: &DecodeCtx) -> Result<Self, WireError> {
        let mut this = Self { resync_rate: from.field("resync_rate")?, ..Self::default() };
        if from.cmd == Cmd::SyncParam {
            if ctx.apv >= 88 {
                this.verify_alg = AlgName::get(from, from.remaining(), "verify_alg")?;
            }
            return Ok(this);
        }
        this.verify_alg = AlgName::get(from, ALG_FIELD_LEN, "verify_alg")?;
        this.csums_alg = AlgName::get(from, ALG_FIELD_LEN, "csums_alg")?;
        if ctx.apv >= 95 {
            this.c_plan_ahead = from.field("c_plan_ahead")?;
            this.c_delay_target = from.field("c_delay_target")?;
            this.c_fill_target = from.field("c_fill_target")?;
            this.c_max_rate = from.field("c_max_rate")?;
        }
        Ok(this)
    }

    fn put(&self, cmd: Cmd, ctx: &DecodeCtx, out: &mut BytesMut) -> Result<(), WireError> {
        out.put_u32(self.resync_rate);
        if cmd == Cmd::SyncParam {
            if ctx.apv >= 88 {
                self.verify_alg.put(0, out);
            }
            return Ok(());
        }
        self.verify_alg.put(ALG_FIELD_LEN, out);
        self.csums_alg.put(ALG_FIELD_LEN, out);
        if ctx.apv >= 95 {
            out.put_u32(self.c_plan_ahead);
            out.put_u32(self.c_delay_target);
            out.put_u32(self.c_fill_target);
            out.put_u32(self.c_max_rate);
        }
        Ok(())
    }
}

layout! {
    /// The 24 byte trailer of P_SIZES, `ff:WSAME` (§4.7).
    QueueLimits: 24 bytes, pad 0, check any;
    {
        /// Bytes.
        physical_block_size: u32,
        /// Bytes.
        logical_block_size: u32,
        /// Bytes; signed, as u32.
        alignment_offset: u32,
        /// Bytes.
        io_min: u32,
        /// Bytes.
        io_opt: u32,
        /// Whether discards are supported.
        discard_enabled: u8,
        /// Always 0 in current kernels.
        discard_zeroes_data: u8,
        /// 0 in current kernels.
        write_same_capable: u8,
        /// `ff:BM_BLOCK_SHIFT`: log2 of the bytes per bitmap bit, minus 12; else 0.
        bm_block_shift: u8,
    }
}

/// P_SIZES (§4.7): 32 bytes, or 56 with the limits trailer (`ff:WSAME`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Sectors of the sender's disk, 0 if diskless.
    pub d_size: u64,
    /// Configured limit in sectors, 0 for none.
    pub u_size: u64,
    /// Sectors of the sender's device, 0 if not known.
    pub c_size: u64,
    /// Largest request in bytes the sender accepts.
    pub max_bio_size: u32,
    /// 0.
    pub queue_order_type: u16,
    /// How to resize.
    pub dds_flags: DdsFlags,
    /// Sent and received exactly if `ff:WSAME` is agreed; `None` is then sent as zeroes.
    pub limits: Option<QueueLimits>,
}

impl Body for Sizes {
    fn len_range(_: Cmd, ctx: &DecodeCtx) -> (usize, usize) {
        let len = if ctx.features.contains(Features::WSAME) { 56 } else { 32 };
        (len, len)
    }

    fn get(from: &mut Reader<'_>, ctx: &DecodeCtx) -> Result<Self, WireError> {
        let mut size = |name| {
            let sectors: u64 = from.field(name)?;
            if sectors > SECTOR_MAX { Err(from.invalid(name, sectors)) } else { Ok(sectors) }
        };
        Ok(Self {
            d_size: size("d_size")?,
            u_size: size("u_size")?,
            c_size: size("c_size")?,
            max_bio_size: from.field("max_bio_size")?,
            queue_order_type: from.field("queue_order_type")?,
            dds_flags: from.field("dds_flags")?,
            limits: if ctx.features.contains(Features::WSAME) {
                Some(QueueLimits::get(from, ctx)?)
            } else {
                None
            },
        })
    }

    fn put(&self, cmd: Cmd, ctx: &DecodeCtx, out: &mut BytesMut) -> Result<(), WireError> {
        for (field, value) in [("d_size", self.d_size), ("u_size", self.u_size), ("c_size", self.c_size)] {
            if value > SECTOR_MAX {
                return Err(WireError::Field { cmd, field, value });
            }
            out.put_u64(value);
        }
        out.put_u32(self.max_bio_size);
        out.put_u16(self.queue_order_type);
        self.dds_flags.put(out);
        if ctx.features.contains(Features::WSAME) {
            match &self.limits {
                Some(limits) => limits.put(cmd, ctx, out)?,
                None => out.put_bytes(0, 24),
            }
        }
        Ok(())
    }
}

/// P_UUIDS110 (§4.9): 40 bytes, then the bitmap UUIDs of the mask, then the history.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Uuids110 {
    /// Current UUID (of the sync source, if the sender is sync target of a third node).
    pub current: u64,
    /// Set bits towards the receiver.
    pub dirty_bits: u64,
    /// Flags.
    pub flags: UuidFlags,
    /// Authoritative or weak nodes, depending on the flags.
    pub node_mask: u64,
    /// (node id, bitmap UUID), decoded in ascending order of ids; ids are below 32 and unique. 0
    /// means "in sync with that node", all ones "not meaningful".
    pub bitmap_uuids: Vec<(u8, u64)>,
    /// Newest first, at most 32; kernels send 32.
    pub history: Vec<u64>,
}

impl Body for Uuids110 {
    fn len_range(_: Cmd, _: &DecodeCtx) -> (usize, usize) {
        (40, 40 + 8 * PEERS_MAX + 8 * HISTORY_UUIDS)
    }

    fn get(from: &mut Reader<'_>, _: &DecodeCtx) -> Result<Self, WireError> {
        let mut this = Self {
            current: from.field("current")?,
            dirty_bits: from.field("dirty_bits")?,
            flags: from.field("flags")?,
            node_mask: from.field("node_mask")?,
            ..Self::default()
        };
        let mask: u64 = from.field("bitmap_uuids_mask")?;
        let mask = u32::try_from(mask).map_err(|_| from.invalid("bitmap_uuids_mask", mask))?;
        for node in 0..PEERS_MAX as u8 {
            if mask >> node & 1 == 1 {
                this.bitmap_uuids.push((node, from.field("bitmap_uuids")?));
            }
        }
        if !from.remaining().is_multiple_of(8) {
            return Err(from.invalid("history length", from.remaining() as u64));
        }
        let count = (from.remaining() / 8).min(HISTORY_UUIDS);
        for _ in 0..count {
            this.history.push(from.field("history")?);
        }
        Ok(this)
    }

    fn put(&self, cmd: Cmd, _: &DecodeCtx, out: &mut BytesMut) -> Result<(), WireError> {
        let invalid = |field, value| Err(WireError::Field { cmd, field, value });
        let mut slots = [None; PEERS_MAX];
        for (node, uuid) in &self.bitmap_uuids {
            match slots.get_mut(usize::from(*node)) {
                Some(slot @ None) => *slot = Some(*uuid),
                _ => return invalid("bitmap_uuids", (*node).into()),
            }
        }
        if self.history.len() > HISTORY_UUIDS {
            return invalid("history length", self.history.len() as u64);
        }
        let mask = (0..).zip(slots).map(|(node, slot)| u64::from(slot.is_some()) << node).sum();
        out.put_u64(self.current);
        out.put_u64(self.dirty_bits);
        self.flags.put(out);
        out.put_u64(self.node_mask);
        out.put_u64(mask);
        for uuid in slots.into_iter().flatten().chain(self.history.iter().copied()) {
            out.put_u64(uuid);
        }
        Ok(())
    }
}
