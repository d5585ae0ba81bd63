//! What this program uses of the core, in one place.

pub use palisade_core::auth::{DigestAlg, HmacAlg, Secret};
pub use palisade_core::config::{
    AfterSb, CoreConfig, DiskConfig, Fencing, NetConfig, OnIoError, OnNoData, OnNoQuorum,
    OnSuspendedPrimaryOutdated, PeerDeviceConfig, QuorumOption, RateConfig, ReadBalancing, ResourceConfig,
    RrConflict,
};
pub use palisade_core::io::{
    AdminId, Backing, BlockId, BlockOp, BlockResult, Command, HandlerCall, HandlerId, Input, IoError, IoId,
    LinkError, LogLevel, Output, PeerSpec, Stream,
};
pub use palisade_core::types::{NodeId, Time, VolumeNr};
pub use palisade_core::{AdminError, Core};
