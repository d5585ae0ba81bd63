//! What can be wrong with a packet.

use thiserror::Error;

use crate::{Cmd, HeaderKind, Stream};

/// A packet that cannot be decoded or encoded. After a decode error the stream is lost: the
/// connection has to be dropped (§3, §13).
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WireError {
    /// The first bytes are no known magic number.
    #[error(
        "The peer sent {found:#010x} where a packet header should start; the stream is not (or no longer) the DRBD protocol."
    )]
    BadMagic {
        /// The four bytes found.
        found: u32,
    },
    /// The last four bytes of an h100 header are not zero.
    #[error("The peer sent a packet header with {found:#010x} in its reserved field, which must be zero.")]
    BadHeaderPad {
        /// The field's value.
        found: u32,
    },
    /// A command number without meaning.
    #[error("The peer sent the unknown command {number:#06x}.")]
    UnknownCommand {
        /// The number.
        number: u16,
    },
    /// The command does not belong on this stream.
    #[error("The peer sent {cmd} on the {stream} stream, where it is not allowed.")]
    WrongStream {
        /// The command.
        cmd: Cmd,
        /// Where it arrived.
        stream: Stream,
    },
    /// The header type does not fit the agreed protocol version.
    #[error("The peer sent {cmd} with a header of type {kind:?}, which protocol version {apv} does not use.")]
    WrongHeader {
        /// The command.
        cmd: Cmd,
        /// The header type used.
        kind: HeaderKind,
        /// The agreed protocol version.
        apv: u32,
    },
    /// The command was not agreed on.
    #[error("{cmd} is not part of what was agreed on: protocol version {apv}, feature flags {features:#x}.")]
    NotAgreed {
        /// The command.
        cmd: Cmd,
        /// The agreed protocol version.
        apv: u32,
        /// The agreed features.
        features: u32,
    },
    /// The payload length is impossible for the command.
    #[error("{cmd} has a payload of {length} bytes; {min} to {max} bytes are possible here.")]
    Length {
        /// The command.
        cmd: Cmd,
        /// The length found.
        length: u64,
        /// Smallest possible length.
        min: u64,
        /// Largest possible length.
        max: u64,
    },
    /// Fewer or more bytes were given than the header announced.
    #[error("{cmd} announces {announced} payload bytes, but {given} were handed to the decoder.")]
    Incomplete {
        /// The command.
        cmd: Cmd,
        /// Length according to the header.
        announced: u64,
        /// Bytes given.
        given: u64,
    },
    /// A field holds a value without meaning.
    #[error("{cmd} carries the invalid value {value:#x} in its field {field}.")]
    Field {
        /// The command.
        cmd: Cmd,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// An algorithm name is not terminated, too long, or not printable ASCII.
    #[error(
        "{cmd} carries a {field} that is not a name of at most 63 printable characters with a final NUL."
    )]
    Name {
        /// The command.
        cmd: Cmd,
        /// The field.
        field: &'static str,
    },
}
