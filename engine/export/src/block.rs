//! Requests and replies that all front ends share.

use bytes::Bytes;

/// One request from a front end to the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockRequest {
    /// Names the request in the reply; unique among the unanswered requests of one front end (one
    /// NBD session, one device).
    pub id: u64,
    /// What to do.
    pub op: Op,
}

/// What a request asks for. Offsets and lengths are in bytes, lie within the device and are
/// multiples of the logical block size; lengths are not zero (the front end has checked).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Answer with [`Reply::Data`] of exactly `len` bytes.
    Read {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u32,
    },
    /// Store `data`, whose memory is aligned to [`crate::ALIGN`].
    Write {
        /// First byte.
        offset: u64,
        /// The payload; never copied again on its way to the disk.
        data: Bytes,
        /// Durable before the reply.
        fua: bool,
    },
    /// Make every write durable that was answered before.
    Flush,
    /// The content is no longer needed; what is read afterwards is undefined but stable.
    Discard {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Durable before the reply.
        fua: bool,
    },
    /// The range must read as zeroes afterwards.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// Space may be given back to the backing device.
        may_unmap: bool,
        /// Durable before the reply.
        fua: bool,
        /// Answer [`Errno::NotSupported`] unless this is faster than writing zeroes.
        fast: bool,
    },
    /// Answer with [`Reply::Status`]: what the range consists of.
    BlockStatus {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
        /// One extent, starting at `offset`, is enough.
        one: bool,
    },
}

impl Op {
    /// Bytes of memory this request holds until it is answered: write payload or read buffer.
    #[must_use]
    pub fn payload_len(&self) -> usize {
        match self {
            Self::Read { len, .. } => *len as usize,
            Self::Write { data, .. } => data.len(),
            _ => 0,
        }
    }
}

/// The answer to one [`BlockRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Done, nothing to say: write, flush, discard, write zeroes.
    Done,
    /// The bytes of a read, as many as were asked for.
    Data(Bytes),
    /// Extents of a block status request, in order, without gaps, beginning at its offset; at least
    /// one, and they need not reach the end of the range.
    Status(Vec<Extent>),
    /// Refused or failed.
    Error(Errno),
}

/// A run of bytes with one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Number of bytes, not zero.
    pub len: u64,
    /// Not allocated on the backing device.
    pub hole: bool,
    /// Reads as zeroes.
    pub zero: bool,
    /// Marked in the bitmap of at least one peer: not on every replica yet.
    pub out_of_sync: bool,
}

/// Why a request failed, as far as a block client can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Errno {
    /// No good copy could be reached, or all of them failed.
    Io,
    /// Beyond the end of the device or its space.
    NoSpace,
    /// The request makes no sense: range, alignment or flags.
    Invalid,
    /// The engine cannot do this here.
    NotSupported,
    /// The device is going away.
    Shutdown,
    /// The device is read-only.
    Perm,
}

impl Errno {
    /// The Linux error number, as FUSE wants it (positive).
    #[must_use]
    pub const fn linux(self) -> i32 {
        match self {
            Self::Io => libc::EIO,
            Self::NoSpace => libc::ENOSPC,
            Self::Invalid => libc::EINVAL,
            Self::NotSupported => libc::EOPNOTSUPP,
            Self::Shutdown => libc::ESHUTDOWN,
            Self::Perm => libc::EPERM,
        }
    }
}
