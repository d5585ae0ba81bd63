//! What is on a device before metadata is put there (`spec/metadata.md` §13.6). Pure.

/// Bytes at the head of the device that are looked at.
pub const HEAD_BYTES: usize = 68 << 10;

/// What was recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Swap space.
    Swap,
    /// LVM physical volume; its size is known to `pvs` only.
    Lvm,
    /// A file system of that size.
    Filesystem {
        /// As printed.
        name: &'static str,
        /// Bytes it uses.
        bytes: u64,
    },
    /// Something.
    Data,
}

impl What {
    /// As printed behind `Found`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Swap => "swap space signature",
            Self::Lvm => "LVM2 physical volume signature",
            Self::Filesystem { name, .. } => name,
            Self::Data => "some data",
        }
    }
}

/// Recognises what the head of a device belongs to; `None` if it is all zero.
pub fn recognise(head: &[u8]) -> Option<What> {
    if head.iter().all(|b| *b == 0) {
        return None;
    }
    Some(
        swap(head).or_else(|| lvm(head)).or_else(|| ext(head)).or_else(|| others(head)).unwrap_or(What::Data),
    )
}

fn at(head: &[u8], offset: usize, text: &[u8]) -> bool {
    head.get(offset..offset + text.len()) == Some(text)
}

fn bytes<const N: usize>(head: &[u8], offset: usize) -> [u8; N] {
    head.get(offset..).and_then(|h| h.first_chunk::<N>()).copied().unwrap_or([0; N])
}

fn le16(head: &[u8], offset: usize) -> u64 {
    u64::from(u16::from_le_bytes(bytes(head, offset)))
}

fn le32(head: &[u8], offset: usize) -> u64 {
    u64::from(u32::from_le_bytes(bytes(head, offset)))
}

fn swap(head: &[u8]) -> Option<What> {
    const PAGES: [usize; 2] = [4096, 8192];
    const SIGNATURE_BYTES: usize = 10;
    let signed = PAGES.iter().any(|page| {
        at(head, page - SIGNATURE_BYTES, b"SWAP-SPACE") || at(head, page - SIGNATURE_BYTES, b"SWAPSPACE2")
    });
    signed.then_some(What::Swap)
}

fn lvm(head: &[u8]) -> Option<What> {
    at(head, 0x218, b"LVM2").then_some(What::Lvm)
}

fn ext(head: &[u8]) -> Option<What> {
    const MAGIC: u64 = 0xEF53;
    const HAS_JOURNAL: u64 = 4;
    const LOG_BLOCK_SIZE_MAX: u64 = 16;
    if le16(head, 0x438) != MAGIC {
        return None;
    }
    let name = if le32(head, 0x45c) & HAS_JOURNAL == 0 { "ext2 filesystem" } else { "ext3 filesystem" };
    let log = le32(head, 0x418).min(LOG_BLOCK_SIZE_MAX);
    let blocks = le32(head, 0x404) | ext4_blocks_high(head);
    Some(What::Filesystem { name, bytes: blocks.saturating_mul(1024 << log) })
}

/// Upper half of the block count of large ext4; without it a file system of 16 TiB and more would look
/// small enough to fit.
fn ext4_blocks_high(head: &[u8]) -> u64 {
    const INCOMPAT_64BIT: u64 = 0x80;
    if le32(head, 0x460) & INCOMPAT_64BIT == 0 { 0 } else { le32(head, 0x550) << 32 }
}

fn others(head: &[u8]) -> Option<What> {
    if at(head, 0, b"XFSB") {
        let blocks = u64::from_be_bytes(bytes(head, 8));
        let size = u64::from(u32::from_be_bytes(bytes(head, 4)));
        return Some(What::Filesystem { name: "xfs filesystem", bytes: blocks.saturating_mul(size) });
    }
    if at(head, 0x8000, b"JFS1") {
        let blocks = u64::from_le_bytes(bytes(head, 0x8008));
        let size = le32(head, 0x8018);
        return Some(What::Filesystem { name: "JFS filesystem", bytes: blocks.saturating_mul(size) });
    }
    if at(head, 0x10034, b"ReIsErFs") || at(head, 0x10034, b"ReIsEr2Fs") {
        let bytes = le32(head, 0x10000).saturating_mul(le16(head, 0x1002c));
        return Some(What::Filesystem { name: "reiser filesystem", bytes });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head_with(parts: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        for (offset, text) in parts {
            head[*offset..offset + text.len()].copy_from_slice(text);
        }
        head
    }

    #[test]
    fn signatures() {
        assert_eq!(recognise(&head_with(&[])), None);
        assert_eq!(recognise(&head_with(&[(4086, b"SWAPSPACE2")])), Some(What::Swap));
        assert_eq!(recognise(&head_with(&[(0x218, b"LVM2 001")])), Some(What::Lvm));
        assert_eq!(recognise(&head_with(&[(100, b"x")])), Some(What::Data));
        let xfs = head_with(&[(0, b"XFSB\0\0\x10\0\0\0\0\0\0\0\x10\0")]);
        assert_eq!(recognise(&xfs), Some(What::Filesystem { name: "xfs filesystem", bytes: 4096 * 4096 }));
    }

    #[test]
    fn ext_sizes_count_64_bit_blocks() {
        let parts: &[(usize, &[u8])] = &[
            (0x438, b"\x53\xef"),
            (0x404, b"\0\0\0\x10"),
            (0x418, b"\x02\0\0\0"),
            (0x45c, b"\x04\0\0\0"),
            (0x460, b"\x80\0\0\0"),
            (0x550, b"\x01\0\0\0"),
        ];
        let blocks = 0x1_1000_0000_u64;
        let expected = What::Filesystem { name: "ext3 filesystem", bytes: blocks * 4096 };
        assert_eq!(recognise(&head_with(parts)), Some(expected));
    }
}
