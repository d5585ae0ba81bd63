//! The options the core acts on, typed, with the reference's defaults (`spec/state-machine.md` §17,
//! `spec/drbd-conf.md`). The daemon translates the option strings of the command line into these.

use crate::auth::Secret;
use crate::types::{NodeId, deciseconds};
use palisade_wire::enums::WireProtocol;
use std::time::Duration;

pub use crate::tables::quorum::QuorumOption;
pub use crate::tables::rate::RateConfig;
pub use crate::tables::split_brain::{AfterSb, RrConflict};

/// `on-no-quorum` (`spec/state-machine.md` §15.4).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnNoQuorum {
    /// Fail I/O.
    IoError,
    /// Freeze I/O.
    #[default]
    SuspendIo,
}

/// `on-no-data-accessible` (`spec/state-machine.md` §4.8).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnNoData {
    /// Fail I/O.
    #[default]
    IoError,
    /// Freeze I/O.
    SuspendIo,
}

/// `on-suspended-primary-outdated` (`spec/state-machine.md` §15.5).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnSuspendedPrimaryOutdated {
    /// Refuse the connection, stay frozen.
    #[default]
    Disconnect,
    /// Forced demotion.
    ForceSecondary,
}

/// `fencing` (`spec/state-machine.md` §14.3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Fencing {
    /// Do nothing.
    #[default]
    DontCare,
    /// Call the handler.
    ResourceOnly,
    /// Freeze I/O and call the handler.
    ResourceAndStonith,
}

/// `on-io-error` (`spec/state-machine.md` §13.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnIoError {
    /// Mark the block out of sync, pass the error on if no peer can help.
    PassOn,
    /// Call the handler, then detach.
    CallLocalIoError,
    /// Detach.
    #[default]
    Detach,
}

/// Options of the resource.
#[derive(Clone, Debug)]
pub struct ResourceConfig {
    /// `quorum`.
    pub quorum: QuorumOption,
    /// `quorum-minimum-redundancy`.
    pub quorum_minimum_redundancy: QuorumOption,
    /// `on-no-quorum`.
    pub on_no_quorum: OnNoQuorum,
    /// `on-no-data-accessible`.
    pub on_no_data: OnNoData,
    /// `on-suspended-primary-outdated`.
    pub on_suspended_primary_outdated: OnSuspendedPrimaryOutdated,
    /// `auto-promote`: a writer's open promotes.
    pub auto_promote: bool,
    /// `auto-promote-timeout`.
    pub auto_promote_timeout: Duration,
    /// `twopc-timeout`.
    pub twopc_timeout: Duration,
    /// `twopc-retry-timeout`, the base of the random back-off.
    pub twopc_retry_timeout: Duration,
    /// `peer-ack-window`, sectors.
    pub peer_ack_window_sectors: u64,
    /// `peer-ack-delay`.
    pub peer_ack_delay: Duration,
}

impl Default for ResourceConfig {
    fn default() -> Self {
        Self {
            quorum: QuorumOption::Off,
            quorum_minimum_redundancy: QuorumOption::Off,
            on_no_quorum: OnNoQuorum::default(),
            on_no_data: OnNoData::default(),
            on_suspended_primary_outdated: OnSuspendedPrimaryOutdated::default(),
            auto_promote: true,
            auto_promote_timeout: deciseconds(20),
            twopc_timeout: deciseconds(300),
            twopc_retry_timeout: deciseconds(1),
            peer_ack_window_sectors: 4096,
            peer_ack_delay: Duration::from_millis(100),
        }
    }
}

/// Options of a connection.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// `protocol`.
    pub protocol: WireProtocol,
    /// `cram-hmac-alg` and `shared-secret`; both or none.
    pub auth: Option<(String, Secret)>,
    /// `data-integrity-alg`.
    pub integrity_alg: Option<String>,
    /// `allow-two-primaries`.
    pub two_primaries: bool,
    /// `after-sb-0pri`.
    pub after_sb_0pri: AfterSb,
    /// `after-sb-1pri`.
    pub after_sb_1pri: AfterSb,
    /// `after-sb-2pri`.
    pub after_sb_2pri: AfterSb,
    /// `always-asbp`.
    pub always_asbp: bool,
    /// `rr-conflict`.
    pub rr_conflict: RrConflict,
    /// `fencing`.
    pub fencing: Fencing,
    /// `ping-int`.
    pub ping_int: Duration,
    /// `ping-timeout`.
    pub ping_timeout: Duration,
    /// `timeout`.
    pub timeout: Duration,
    /// `ko-count`; 0 switches the request timeout off.
    pub ko_count: u32,
    /// `connect-int`.
    pub connect_int: Duration,
    /// `max-epoch-size`, writes.
    pub max_epoch_size: u32,
    /// `max-buffers`, pages of 4 KiB.
    pub max_buffers: u32,
    /// `use-rle`.
    pub use_rle: bool,
    /// `allow-remote-read`.
    pub allow_remote_read: bool,
    /// `tiebreaker`: a diskless peer counts as tiebreaker.
    pub tiebreaker: bool,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            protocol: WireProtocol::C,
            auth: None,
            integrity_alg: None,
            two_primaries: false,
            after_sb_0pri: AfterSb::Disconnect,
            after_sb_1pri: AfterSb::Disconnect,
            after_sb_2pri: AfterSb::Disconnect,
            always_asbp: false,
            rr_conflict: RrConflict::Disconnect,
            fencing: Fencing::DontCare,
            ping_int: Duration::from_secs(10),
            ping_timeout: deciseconds(5),
            timeout: deciseconds(60),
            ko_count: 7,
            connect_int: Duration::from_secs(10),
            max_epoch_size: 2048,
            max_buffers: 2048,
            use_rle: true,
            allow_remote_read: true,
            tiebreaker: true,
        }
    }
}

/// Options of a volume's disk.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// `size` limit in sectors, 0 = none.
    pub size_sectors: u64,
    /// `on-io-error`.
    pub on_io_error: OnIoError,
    /// `disk-flushes`: flush between epochs (write ordering "flush"); else drain only.
    pub disk_flushes: bool,
    /// `disk-drain`.
    pub disk_drain: bool,
    /// `al-extents`.
    pub al_extents: u16,
    /// `al-updates`.
    pub al_updates: bool,
    /// `discard-zeroes-if-aligned`.
    pub discard_zeroes_if_aligned: bool,
    /// `read-balancing`.
    pub read_balancing: ReadBalancing,
}

/// `read-balancing` (`spec/state-machine.md` §13.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ReadBalancing {
    /// Never remote while the own disk is UpToDate.
    #[default]
    PreferLocal,
    /// Remote whenever possible.
    PreferRemote,
    /// Alternating.
    RoundRobin,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            size_sectors: 0,
            on_io_error: OnIoError::default(),
            disk_flushes: true,
            disk_drain: true,
            al_extents: 1237,
            al_updates: true,
            discard_zeroes_if_aligned: true,
            read_balancing: ReadBalancing::default(),
        }
    }
}

/// Options of one volume towards one peer.
#[derive(Clone, Debug, Default)]
pub struct PeerDeviceConfig {
    /// The resync controller.
    pub rate: RateConfig,
}

/// What a core is made from.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// Resource name, for log lines.
    pub name: String,
    /// Own node id.
    pub node_id: NodeId,
    /// Resource options.
    pub resource: ResourceConfig,
    /// Seed of all random numbers (UUIDs, transaction ids, challenges). From the operating system in production.
    pub seed: [u8; 32],
}
