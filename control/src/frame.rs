//! Frames of the control socket: a big-endian `u32` byte count, then that many bytes of JSON.
//!
//! The codec does no I/O: push bytes in, take messages out.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// Largest body of a frame in bytes. The status of 32 peers with 64 volumes each stays below 2 MiB.
pub const FRAME_BYTES_MAX: usize = 8 << 20;

const PREFIX_BYTES: usize = 4;

/// Why bytes are no frame. After an error the stream is unusable.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The announced or needed length is above [`FRAME_BYTES_MAX`].
    #[error("a control message of {len} bytes exceeds the limit of {FRAME_BYTES_MAX} bytes")]
    TooLong {
        /// Bytes announced.
        len: usize,
    },
    /// The body is not the JSON of the expected message.
    #[error("a control message is malformed: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// The bytes of one message, prefix included.
///
/// # Errors
/// If the message is too long or does not serialise.
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    let mut out = vec![0_u8; PREFIX_BYTES];
    serde_json::to_writer(&mut out, message)?;
    let len = out.len() - PREFIX_BYTES;
    if len > FRAME_BYTES_MAX {
        return Err(FrameError::TooLong { len });
    }
    let prefix = u32::try_from(len).map_err(|_| FrameError::TooLong { len })?.to_be_bytes();
    out.splice(..PREFIX_BYTES, prefix);
    Ok(out)
}

/// Collects bytes and yields messages.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    consumed: usize,
}

impl FrameDecoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete message, `None` if more bytes are needed.
    ///
    /// # Errors
    /// If the length is out of bounds or the body is malformed.
    pub fn next_message<M: DeserializeOwned>(&mut self) -> Result<Option<M>, FrameError> {
        let pending = self.buffer.get(self.consumed..).unwrap_or_default();
        let Some((prefix, rest)) = pending.split_first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
        let len = u32::from_be_bytes(*prefix) as usize;
        if len > FRAME_BYTES_MAX {
            return Err(FrameError::TooLong { len });
        }
        let Some(body) = rest.get(..len) else { return Ok(None) };
        let message = serde_json::from_slice(body)?;
        self.consumed += PREFIX_BYTES + len;
        Ok(Some(message))
    }

    /// Bytes held that do not make a message yet.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.buffer.len() - self.consumed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_any_cut() {
        let mut bytes = encode(&"one").unwrap();
        bytes.extend(encode(&"zwei").unwrap());
        for cut in 0..bytes.len() {
            let mut decoder = FrameDecoder::new();
            let mut got: Vec<String> = Vec::new();
            for part in [&bytes[..cut], &bytes[cut..]] {
                decoder.push(part);
                while let Some(m) = decoder.next_message().unwrap() {
                    got.push(m);
                }
            }
            assert_eq!(got, ["one", "zwei"]);
            assert_eq!(decoder.pending_bytes(), 0);
        }
    }

    #[test]
    fn a_hostile_length_is_refused_before_it_is_buffered() {
        let mut decoder = FrameDecoder::new();
        decoder.push(&[0xff, 0xff, 0xff, 0xff]);
        assert!(matches!(decoder.next_message::<String>(), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn garbage_is_refused() {
        let mut decoder = FrameDecoder::new();
        decoder.push(&[0, 0, 0, 2, b'{', b'{']);
        assert!(matches!(decoder.next_message::<String>(), Err(FrameError::Malformed(_))));
    }
}
