//! Bytes on their way out: small headers gathered, payloads passed on by reference.

use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;

/// A queue of chunks in stream order.
#[derive(Debug, Default)]
pub(super) struct Output {
    chunks: VecDeque<Bytes>,
    tail: BytesMut,
    len: usize,
}

impl Output {
    /// Appends header fields.
    pub fn header(&mut self, fill: impl FnOnce(&mut BytesMut)) {
        let before = self.tail.len();
        fill(&mut self.tail);
        self.len += self.tail.len() - before;
    }

    /// Appends a payload without a copy.
    pub fn payload(&mut self, data: Bytes) {
        self.seal();
        self.len += data.len();
        self.chunks.push_back(data);
    }

    /// Bytes waiting.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Everything that waits, in order.
    pub fn take(&mut self) -> Vec<Bytes> {
        self.seal();
        self.len = 0;
        self.chunks.drain(..).collect()
    }

    /// Forgets everything: the peer is gone.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.chunks.push_back(self.tail.split().freeze());
        }
    }
}
