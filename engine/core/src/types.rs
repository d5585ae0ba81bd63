//! Small newtypes that must not be mixed, and the time and entropy a caller hands in.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

/// Number of node ids in a cluster (`spec/wire-protocol.md` §1.1, `DRBD_PEERS_MAX`).
pub const NODES_MAX: usize = 32;
/// Bytes in a sector; sectors are the unit of positions on the wire and in the metadata.
pub const SECTOR: u64 = 512;
/// Largest payload of one read or write, bytes (`spec/wire-protocol.md` §1.1).
pub const BIO_SIZE_MAX: u32 = 1 << 20;
/// Largest discard or write-zeroes, bytes (`spec/wire-protocol.md` §1.1).
pub const BATCH_SIZE_MAX: u32 = 128 << 20;
/// log2 of the sectors in an activity-log extent of 4 MiB.
pub const AL_EXTENT_SHIFT: u32 = 13;

/// A node of the resource, 0..=31.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u8);

impl NodeId {
    /// The id, or `None` when it is not in 0..=31.
    #[must_use]
    pub const fn new(id: u8) -> Option<Self> {
        if (id as usize) < NODES_MAX { Some(Self(id)) } else { None }
    }

    /// The same from a number of any origin.
    #[must_use]
    pub fn from_u32(id: u32) -> Option<Self> {
        u8::try_from(id).ok().and_then(Self::new)
    }

    /// The number, 0..=31.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The number as an index into arrays of `NODES_MAX` entries.
    #[must_use]
    pub const fn idx(self) -> usize {
        self.0 as usize
    }

    /// The mask with only this node's bit.
    #[must_use]
    pub const fn mask(self) -> NodeMask {
        NodeMask(1 << self.0)
    }

    /// Every node id, ascending.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..NODES_MAX as u8).map(Self)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A set of nodes: bit n is node n. Masks of the wire may name more than 32 bits (complements do).
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct NodeMask(pub u64);

impl NodeMask {
    /// No node.
    pub const EMPTY: Self = Self(0);

    /// Whether the node is in the set.
    #[must_use]
    pub const fn has(self, n: NodeId) -> bool {
        self.0 & (1 << n.0) != 0
    }
    /// The set with the node.
    #[must_use]
    pub const fn with(self, n: NodeId) -> Self {
        Self(self.0 | (1 << n.0))
    }
    /// The set without the node.
    #[must_use]
    pub const fn without(self, n: NodeId) -> Self {
        Self(self.0 & !(1 << n.0))
    }
    /// Union.
    #[must_use]
    pub const fn or(self, o: Self) -> Self {
        Self(self.0 | o.0)
    }
    /// Intersection.
    #[must_use]
    pub const fn and(self, o: Self) -> Self {
        Self(self.0 & o.0)
    }
    /// Complement, over all 64 bits.
    #[must_use]
    pub const fn not(self) -> Self {
        Self(!self.0)
    }
    /// Whether no bit is set.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
    /// The nodes of the set, ascending; bits above 31 are skipped.
    pub fn iter(self) -> impl Iterator<Item = NodeId> {
        NodeId::all().filter(move |n| self.has(*n))
    }
}

impl fmt::Debug for NodeMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A volume of the resource, 0..=65534.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeNr(pub u16);

impl fmt::Debug for VolumeNr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

impl fmt::Display for VolumeNr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A moment on the caller's monotonic clock, nanoseconds since any fixed origin.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash, Debug)]
pub struct Time(pub u64);

impl Time {
    /// Time passed since `earlier`; zero when that is in the future.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Time {
    type Output = Self;
    fn add(self, d: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Duration> for Time {
    type Output = Self;
    fn sub(self, d: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)))
    }
}

/// Tenths of a second, the unit of many options.
#[must_use]
pub const fn deciseconds(n: u32) -> Duration {
    Duration::from_millis(n as u64 * 100)
}

/// Random numbers from a seed the caller chose: the operating system's entropy in production, the
/// run's seed in the simulator.
#[derive(Debug)]
pub struct Entropy(rand_chacha::ChaCha12Rng);

impl Entropy {
    /// A generator that depends on nothing but the seed.
    #[must_use]
    pub fn new(seed: [u8; 32]) -> Self {
        use rand_chacha::rand_core::SeedableRng;
        Self(rand_chacha::ChaCha12Rng::from_seed(seed))
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        use rand_chacha::rand_core::RngCore;
        self.0.next_u64()
    }

    /// A random number in `0..=max`.
    pub fn up_to(&mut self, max: u64) -> u64 {
        if max == u64::MAX { self.next_u64() } else { self.next_u64() % (max + 1) }
    }

    /// A random transaction id: not zero.
    pub fn tid(&mut self) -> u32 {
        ((self.next_u64() >> 32) as u32).max(1)
    }

    /// Fills the slice.
    pub fn fill(&mut self, out: &mut [u8]) {
        use rand_chacha::rand_core::RngCore;
        self.0.fill_bytes(out);
    }
}
