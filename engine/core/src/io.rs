//! What goes into the core and what comes out of it: the whole contract with the world.
//!
//! The caller runs this loop and nothing else:
//!
//! 1. `core.handle(now, input)` for whatever happened;
//! 2. drain `core.poll_output()` until it is empty and carry each output out **in order per target**:
//!    packets of one stream of one link stay in order; everything else may be reordered freely;
//! 3. `core.next_timeout()` says when to call `handle(now, Input::Timer)` at the latest.
//!
//! Ordering rules (what the core relies on):
//! - an output that needs another one to be durable first is only emitted after the completion of that
//!   one came in. The caller therefore never has to order disk against network;
//! - `DiskWrite` completes when the backing device reports completion (perhaps in a volatile cache);
//!   with `fua` it completes when the data is on stable storage;
//! - `DiskFlush` completes when every write of that volume **completed before it was issued** is stable;
//! - `MetaWrite` completes when the bytes are on stable storage, and so is every *data* write of the volume that
//!   completed before the `MetaWrite` was issued (an extent leaves the journal that way);
//! - every I/O output is answered by exactly one `IoDone`, also after `DropBacking` or a crash of a link;
//! - data of overlapping writes in flight at once is undefined: the core never has two.
//!
//! Payloads are [`bytes::Bytes`] handles; the core stores and forwards them and never copies data.

use crate::config::{DiskConfig, NetConfig, PeerDeviceConfig, ResourceConfig};
use crate::types::{NodeId, Time, VolumeNr};
use bytes::Bytes;
use palisade_metadata::{Bitmap, Layout, Superblock};
use palisade_wire::Packet;
pub use palisade_wire::Stream;

/// Identifies an administrator's command; chosen by the caller, echoed in [`Output::AdminDone`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct AdminId(pub u64);

/// Identifies a front-end request; chosen by the caller, echoed in [`Output::BlockDone`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct BlockId(pub u64);

/// Identifies a disk or metadata operation; chosen by the core, echoed in [`Input::IoDone`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct IoId(pub u64);

/// Identifies a handler run; chosen by the core, echoed in [`Input::HandlerDone`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HandlerId(pub u64);

/// Why an I/O failed, as far as the core cares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoError {
    /// The device reported an error.
    Failed,
    /// The operation is not supported by the device (discards, write-zeroes).
    Unsupported,
}

/// What a front end asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BlockOp {
    /// Read `len` bytes (a multiple of 512, at most 1 MiB).
    Read {
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u32,
    },
    /// Write the payload (a multiple of 512 bytes, at most 1 MiB).
    Write {
        /// First sector.
        sector: u64,
        /// Payload.
        data: Bytes,
        /// Complete only when stable on every replica that acknowledges it.
        fua: bool,
    },
    /// Discard; the content is undefined or zero afterwards, equal on all replicas.
    Discard {
        /// First sector.
        sector: u64,
        /// Bytes, at most 128 MiB.
        len: u32,
    },
    /// Write zeroes, giving the space back if `unmap`.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// Bytes, at most 128 MiB.
        len: u32,
        /// Whether the replicas may unmap.
        unmap: bool,
    },
    /// Everything completed before is stable on every connected replica when this completes.
    Flush,
}

/// Result of a front-end request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BlockResult {
    /// Done (no data).
    Done,
    /// Data of a read.
    Data(Bytes),
    /// I/O error: no replica could serve it, or policy says to fail.
    IoError,
    /// Not Primary any more (or going away).
    NotPrimary,
    /// Outside of the device, misaligned or too large.
    Invalid,
}

/// A backing device whose metadata the caller has read; handed in with [`Command::Attach`].
#[derive(Debug)]
pub struct Backing {
    /// The superblock as it is on disk. Must be clean (activity log applied).
    pub superblock: Superblock,
    /// The bitmap, all slots.
    pub bitmap: Bitmap,
    /// Where everything is; its `usable_sectors` bounds the data.
    pub layout: Layout,
    /// Logical block size of the backing device, bytes.
    pub logical_block_size: u32,
    /// Physical block size, bytes.
    pub physical_block_size: u32,
    /// Discards are supported.
    pub discard: bool,
    /// A discarded range reads back as zeroes.
    pub discard_zeroes: bool,
}

/// Parameters of a new peer.
#[derive(Clone, Debug)]
pub struct PeerSpec {
    /// The peer's node id.
    pub id: NodeId,
    /// Connection name, normally the peer's host name.
    pub name: String,
    /// Network options.
    pub net: NetConfig,
    /// Whether the peer is configured to have a disk (`bitmap yes`).
    pub diskful: bool,
}

/// What an administrator (or the daemon on her behalf) can ask for.
#[derive(Debug)]
pub enum Command {
    /// Add a volume, diskless.
    NewVolume {
        /// Volume number.
        vnr: VolumeNr,
        /// Device minor, for handlers and status.
        minor: u32,
    },
    /// Remove a volume (must be diskless and unused).
    DelVolume(VolumeNr),
    /// Add a peer; the connection is StandAlone.
    NewPeer(PeerSpec),
    /// Remove a peer (must be StandAlone).
    DelPeer(NodeId),
    /// Drop the bitmap slot of a removed peer.
    ForgetPeer(NodeId),
    /// Attach a disk.
    Attach {
        /// Volume.
        vnr: VolumeNr,
        /// The device and its metadata.
        backing: Box<Backing>,
        /// Disk options.
        disk: DiskConfig,
    },
    /// Detach the disk.
    Detach {
        /// Volume.
        vnr: VolumeNr,
        /// Do not wait, do not ask.
        force: bool,
    },
    /// The volume is meant to be without a disk: a client of its peers, until a disk is attached.
    SetClient(VolumeNr),
    /// Start connecting.
    Connect {
        /// Peer.
        peer: NodeId,
        /// Become sync target if a split brain is found.
        discard_my_data: bool,
        /// Only tell what would happen.
        tentative: bool,
    },
    /// Stop the connection.
    Disconnect {
        /// Peer.
        peer: NodeId,
        /// Do not ask the peer.
        force: bool,
    },
    /// Become Primary.
    Promote {
        /// Consider local data as UpToDate, unreachable peers as Outdated.
        force: bool,
    },
    /// Become Secondary.
    Demote {
        /// Fail pending I/O and ignore openers.
        force: bool,
    },
    /// Mark own data as superseded.
    Outdate(VolumeNr),
    /// Make own data the target of a resync.
    Invalidate {
        /// Volume.
        vnr: VolumeNr,
        /// Only this peer may be the source.
        from: Option<NodeId>,
        /// Set all bits first (a full resync).
        reset_bitmap: bool,
    },
    /// Make the peer's data the target of a resync.
    InvalidateRemote {
        /// Volume.
        vnr: VolumeNr,
        /// Peer.
        peer: NodeId,
        /// Set all bits first (a full resync).
        reset_bitmap: bool,
    },
    /// Start a new data generation.
    NewCurrentUuid {
        /// Volume.
        vnr: VolumeNr,
        /// Declare all replicas equal.
        clear_bitmap: bool,
        /// Make this node the source of a full resync.
        force_resync: bool,
    },
    /// Freeze I/O.
    SuspendIo(VolumeNr),
    /// Thaw I/O.
    ResumeIo(VolumeNr),
    /// Pause a resync.
    PauseSync {
        /// Volume.
        vnr: VolumeNr,
        /// Peer.
        peer: NodeId,
    },
    /// Continue a paused resync.
    ResumeSync {
        /// Volume.
        vnr: VolumeNr,
        /// Peer.
        peer: NodeId,
    },
    /// Change resource options.
    SetResource(ResourceConfig),
    /// Change network options of a peer.
    SetNet {
        /// Peer.
        peer: NodeId,
        /// New options, complete.
        net: Box<NetConfig>,
    },
    /// Change disk options.
    SetDisk {
        /// Volume.
        vnr: VolumeNr,
        /// New options, complete.
        disk: DiskConfig,
    },
    /// Change the resync controller's options of one peer and volume.
    SetPeerDevice {
        /// Volume.
        vnr: VolumeNr,
        /// Peer.
        peer: NodeId,
        /// New options, complete.
        opts: PeerDeviceConfig,
    },
    /// Demote, disconnect and detach everything; answered when all of it happened.
    Down,
}

/// Everything that can happen to a core.
#[derive(Debug)]
pub enum Input {
    /// A command.
    Admin(AdminId, Command),
    /// A request of a front end.
    Block {
        /// Echoed in the completion.
        id: BlockId,
        /// Volume.
        vnr: VolumeNr,
        /// What to do.
        op: BlockOp,
    },
    /// The number of front-end openers of a volume changed (used for demotion and promotion rules).
    Openers {
        /// Volume.
        vnr: VolumeNr,
        /// Open for writing.
        rw: u32,
        /// Open read-only.
        ro: u32,
    },
    /// Both sockets to the peer are up; answers [`Output::Connect`].
    LinkUp {
        /// Peer.
        peer: NodeId,
        /// This node accepted the control socket (`RESOLVE_CONFLICTS`, `spec/wire-protocol.md` §2.3).
        resolve_conflicts: bool,
    },
    /// The link broke, or bytes came that are no packet. Also the answer to [`Output::CloseLink`].
    LinkDown {
        /// Peer.
        peer: NodeId,
        /// What happened.
        why: LinkError,
    },
    /// A decoded packet. Only delivered between `LinkUp` and `LinkDown`.
    Packet {
        /// Peer.
        peer: NodeId,
        /// Stream it came on.
        stream: Stream,
        /// Volume of the header.
        volume: Option<u16>,
        /// Fixed part.
        packet: Packet,
        /// Digest between fixed part and data.
        digest: Bytes,
        /// Bulk data.
        data: Bytes,
    },
    /// A disk or metadata operation is finished.
    IoDone {
        /// From the output.
        id: IoId,
        /// `Ok(data)` for reads, `Ok(empty)` otherwise.
        result: Result<Bytes, IoError>,
    },
    /// A handler ended.
    HandlerDone {
        /// From the output.
        id: HandlerId,
        /// Exit status; `None` if it could not be started, was killed or timed out.
        exit: Option<i32>,
    },
    /// Time passed.
    Timer,
}

/// Why a link ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkError {
    /// Closed by the peer or reset.
    BrokenPipe,
    /// Undecodable bytes.
    Protocol,
    /// Closed because the core asked for it.
    Closed,
    /// Could not send for too long.
    SendTimeout,
}

/// Parameters the packet codec needs; they change in the middle of a stream, so every change is an output
/// which takes effect for the packets after it ([`Output::SetCodec`]).
pub type CodecCtx = palisade_wire::DecodeCtx;

/// Everything a core wants done.
#[derive(Debug)]
pub enum Output {
    /// Answer to a command.
    AdminDone(AdminId, Result<(), crate::AdminError>),
    /// Answer to a front-end request.
    BlockDone(BlockId, BlockResult),
    /// Start trying to get a link (listen and connect, `spec/wire-protocol.md` §2.3) until it is up or
    /// `CloseLink` comes.
    Connect(NodeId),
    /// Close the link (after having sent what was queued before) or stop trying. Answer with `LinkDown`
    /// when a link was up.
    CloseLink(NodeId),
    /// Send a packet.
    Send {
        /// Peer.
        peer: NodeId,
        /// Stream.
        stream: Stream,
        /// Volume for the header.
        volume: Option<u16>,
        /// Fixed part.
        packet: Packet,
        /// Digest between fixed part and data, or empty.
        digest: Bytes,
        /// Bulk data, or empty.
        data: Bytes,
    },
    /// From the next packet on, in the direction given, use these parameters.
    SetCodec {
        /// Peer.
        peer: NodeId,
        /// For packets received (`true`) or sent (`false`).
        receive: bool,
        /// Parameters.
        ctx: CodecCtx,
    },
    /// Read from the backing device.
    DiskRead {
        /// For `IoDone`.
        id: IoId,
        /// Volume.
        vnr: VolumeNr,
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u32,
    },
    /// Write to the backing device.
    DiskWrite {
        /// For `IoDone`.
        id: IoId,
        /// Volume.
        vnr: VolumeNr,
        /// First sector.
        sector: u64,
        /// Payload.
        data: Bytes,
        /// Stable when complete.
        fua: bool,
    },
    /// Discard on, or write zeroes to, the backing device.
    DiskZero {
        /// For `IoDone`.
        id: IoId,
        /// Volume.
        vnr: VolumeNr,
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u32,
        /// The range may be unmapped (the content must still read as zeroes unless `discard`).
        unmap: bool,
        /// A plain discard: the content afterwards does not matter.
        discard: bool,
    },
    /// Flush the backing device's volatile cache.
    DiskFlush {
        /// For `IoDone`.
        id: IoId,
        /// Volume.
        vnr: VolumeNr,
    },
    /// Write to the metadata device, durably.
    MetaWrite {
        /// For `IoDone`.
        id: IoId,
        /// Volume.
        vnr: VolumeNr,
        /// Absolute byte position, a multiple of 4096.
        pos: u64,
        /// A multiple of 4096 bytes.
        data: Bytes,
    },
    /// The backing device is not used any more: release it (after all its operations completed).
    DropBacking(VolumeNr),
    /// The size a front end should show changed, bytes; 0 until known.
    DeviceSize {
        /// Volume.
        vnr: VolumeNr,
        /// Bytes.
        size: u64,
    },
    /// Whether front ends may serve the volumes: this node is Primary. `present: false` means take them away now.
    FrontEnd {
        /// Primary.
        present: bool,
    },
    /// Run a handler and report its exit.
    RunHandler {
        /// For `HandlerDone`.
        id: HandlerId,
        /// What to run and its environment.
        call: HandlerCall,
    },
    /// Something visible changed; look at [`crate::Core::status`].
    Event(Event),
    /// A line for the log, in the field's words.
    Log {
        /// How important.
        level: LogLevel,
        /// What it is about, e.g. `r0/0 bob`.
        scope: String,
        /// Text.
        text: String,
    },
}

/// Importance of a log line.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum LogLevel {
    /// Something an administrator must see.
    Error,
    /// Something odd.
    Warn,
    /// State changes.
    Info,
    /// Details.
    Debug,
}

/// A handler to run (`spec/state-machine.md` §14). The daemon adds what it knows itself (configuration file,
/// host names, addresses, backing devices).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HandlerCall {
    /// `fence-peer`, `before-resync-target`, ...
    pub name: &'static str,
    /// Volume it concerns, if a single one.
    pub vnr: Option<VolumeNr>,
    /// Peer it concerns.
    pub peer: Option<NodeId>,
    /// Connection state name for `DRBD_CSTATE`.
    pub cstate: Option<&'static str>,
    /// Mask for `UP_TO_DATE_NODES`.
    pub up_to_date_nodes: Option<u32>,
}

/// What changed; the details are in the status snapshot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Event {
    /// Role, suspension, ...
    Resource,
    /// Disk state, size, quorum.
    Device(VolumeNr),
    /// Connection state or peer role.
    Connection(NodeId),
    /// Replication state, peer disk, resync progress.
    PeerDevice(NodeId, VolumeNr),
    /// A peer was removed.
    ConnectionGone(NodeId),
    /// A volume was removed.
    DeviceGone(VolumeNr),
}

/// When the core wants to be called again.
pub type Deadline = Option<Time>;
