//! The part of the FUSE kernel protocol (version 7.31, `linux/fuse.h`) that a file system of one
//! file needs.

use bytes::BufMut;

pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 31;

pub(super) const LOOKUP: u32 = 1;
pub(super) const FORGET: u32 = 2;
pub(super) const GETATTR: u32 = 3;
pub(super) const OPEN: u32 = 14;
pub(super) const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
pub(super) const STATFS: u32 = 17;
pub(super) const RELEASE: u32 = 18;
pub(super) const FSYNC: u32 = 20;
pub(super) const FLUSH: u32 = 25;
pub(super) const INIT: u32 = 26;
pub(super) const ACCESS: u32 = 34;
pub(super) const INTERRUPT: u32 = 36;
pub(super) const DESTROY: u32 = 38;
pub(super) const BATCH_FORGET: u32 = 42;
pub(super) const FALLOCATE: u32 = 43;

const ASYNC_READ: u32 = 1;
const BIG_WRITES: u32 = 1 << 5;
const ASYNC_DIO: u32 = 1 << 15;
const MAX_PAGES: u32 = 1 << 22;

/// Page cache bypassed, and writes not serialised on the inode: order is the loop device's business.
const OPEN_FLAGS: u32 = 1 | (1 << 5) | (1 << 6);

pub(super) const ROOT: u64 = 1;
pub(super) const FILE: u64 = 2;

/// Bytes before a write's payload: request header and write arguments.
pub(super) const HEAD_LEN: usize = 80;
/// Bytes of a request header.
pub(super) const HEADER_LEN: usize = 40;
/// Largest read or write.
pub(super) const IO_MAX: usize = 1 << 20;

/// Requests the kernel may have under way; more than a loop device's queue ever holds.
const BACKGROUND_MAX: u16 = 1024;

/// A reader of host-order fields that fails instead of running over the end.
pub(super) struct Reader<'a>(pub &'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_ne_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_ne_bytes)
    }
}

/// A request's header.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
}

impl Header {
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader(bytes.get(..HEADER_LEN)?);
        Some(Self { len: r.u32()?, opcode: r.u32()?, unique: r.u64()?, node: r.u64()? })
    }
}

/// The header of a reply; `error` is a positive error number or 0.
pub(super) fn reply_header(unique: u64, error: i32, payload: usize) -> [u8; 16] {
    let mut out = [0u8; 16];
    let mut w = out.as_mut_slice();
    w.put_u32_ne(16 + payload as u32);
    w.put_i32_ne(-error);
    w.put_u64_ne(unique);
    out
}

/// The answer to INIT.
pub(super) fn init_reply(readahead: u32, offered: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    out.put_u32_ne(MAJOR);
    out.put_u32_ne(MINOR);
    out.put_u32_ne(readahead);
    out.put_u32_ne((ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES) & offered);
    out.put_u16_ne(BACKGROUND_MAX);
    out.put_u16_ne(BACKGROUND_MAX);
    out.put_u32_ne(IO_MAX as u32);
    out.put_u32_ne(1);
    out.put_u16_ne((IO_MAX / 4096) as u16);
    out.resize(64, 0);
    out
}

/// Attributes of the root or of the file, which has `size` bytes.
fn put_attributes(out: &mut Vec<u8>, node: u64, size: u64) {
    let (mode, links, size) = if node == ROOT { (0o040_500, 2, 0) } else { (0o100_600, 1, size) };
    out.put_u64_ne(node);
    out.put_u64_ne(size);
    out.put_u64_ne(size / 512);
    out.put_bytes(0, 3 * 8 + 3 * 4);
    out.put_u32_ne(mode);
    out.put_u32_ne(links);
    out.put_bytes(0, 3 * 4);
    out.put_u32_ne(4096);
    out.put_u32_ne(0);
}

/// The answer to GETATTR. Nothing is cached: the size can change.
pub(super) fn attributes_reply(node: u64, size: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(104);
    out.put_bytes(0, 16);
    put_attributes(&mut out, node, size);
    out
}

/// The answer to LOOKUP of the file.
pub(super) fn entry_reply(size: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    out.put_u64_ne(FILE);
    out.put_bytes(0, 4 * 8);
    put_attributes(&mut out, FILE, size);
    out
}

/// The answer to OPEN.
pub(super) fn open_reply() -> Vec<u8> {
    let mut out = Vec::with_capacity(16);
    out.put_u64_ne(1);
    out.put_u32_ne(OPEN_FLAGS);
    out.put_u32_ne(0);
    out
}

/// The answer to STATFS; the loop device takes its discard granularity from the block size.
pub(super) fn statfs_reply(size: u64, block: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(80);
    out.put_u64_ne(size / u64::from(block.max(1)));
    out.put_bytes(0, 2 * 8);
    out.put_u64_ne(1);
    out.put_u64_ne(0);
    out.put_u32_ne(block);
    out.put_u32_ne(255);
    out.put_u32_ne(block);
    out.resize(80, 0);
    out
}

/// The answer to WRITE.
pub(super) fn write_reply(len: u32) -> [u8; 8] {
    let mut out = [0u8; 8];
    out.as_mut_slice().put_u32_ne(len);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_have_the_sizes_of_the_header_file() {
        assert_eq!(init_reply(0, !0).len(), 64);
        assert_eq!(attributes_reply(FILE, 1).len(), 16 + 88);
        assert_eq!(entry_reply(1).len(), 40 + 88);
        assert_eq!(open_reply().len(), 16);
        assert_eq!(statfs_reply(1, 512).len(), 80);
    }
}
