//! The text dump of a whole metadata area (`spec/metadata.md` §12), byte for byte as the reference
//! tool (9.34) prints it.

use std::io::{self, Write};

use crate::{BLOCK_SIZE, Bitmap, Layout, Superblock, Version};

/// The reference reads the bitmap in pieces of this many bytes; visible only in runs across them.
const PIECE_BYTES: u64 = 32 << 20;

/// What the dump says about itself.
#[derive(Clone, Copy, Debug)]
pub struct DumpHeader<'a> {
    /// Local time, zone and unix time: `2026-11-20 16:00:00 +0000 [1795190400]`.
    pub date: &'a str,
    /// Host name.
    pub host: &'a str,
    /// The command line, beginning with `drbdmeta`.
    pub command: &'a str,
    /// Set when the metadata was found where the device ended before it grew (§10.2).
    pub moved: Option<Moved<'a>>,
}

/// Metadata at the last known location.
#[derive(Clone, Copy, Debug)]
pub struct Moved<'a> {
    /// The metadata device, as printed.
    pub device: &'a str,
    /// Its size now, bytes.
    pub current_bytes: u64,
    /// Its size when the metadata was written, bytes.
    pub last_bytes: u64,
    /// Byte position where the superblock would be expected now.
    pub expected_md_offset: u64,
}

/// Why nothing was dumped.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The activity log was not applied, and dumping was not forced.
    #[error("Found meta data is \"unclean\", please apply-al first")]
    Unclean,
    /// The output failed.
    #[error("The dump could not be written: {0}.")]
    Write(#[from] io::Error),
}

/// Writes the dump. `bitmap` is one made by [`Bitmap::with_padding`] for the last agreed size, because
/// padding is part of a dump. Unclean metadata is refused unless `force`; the result is then marked so
/// that it cannot be restored (§12.4).
pub fn dump(
    out: &mut dyn Write,
    header: &DumpHeader<'_>,
    superblock: &Superblock,
    layout: &Layout,
    bitmap: &Bitmap,
    force: bool,
) -> Result<(), DumpError> {
    let clean = superblock.is_clean();
    if !clean && !force {
        return Err(DumpError::Unclean);
    }
    let sb = superblock;
    writeln!(out, "# DRBD meta data dump\n# {}\n# {}> {}\n#\n", header.date, header.host, header.command)?;
    writeln!(out, "version \"{}\";\n", sb.version.name())?;
    if !clean {
        writeln!(out, "This_is_an_unclean_meta_data_dump._Don't_trust_the_bitmap.")?;
        writeln!(out, "# You should \"apply-al\" first, if you plan to restore this.\n")?;
    }
    if sb.version == Version::V09 {
        writeln!(out, "max-peers {};", sb.max_peers)?;
    }
    positions(out, header, sb, layout)?;
    match sb.version {
        Version::V08 => v08_body(out, sb)?,
        Version::V09 => v09_body(out, sb)?,
    }
    writeln!(out, "# al-extents {};", sb.al_nr_extents)?;
    writeln!(out, "la-size-sect {};", sb.effective_size_sectors)?;
    writeln!(out, "bm-byte-per-bit {};", sb.bm_bytes_per_bit)?;
    writeln!(out, "device-uuid 0x{:016X};", sb.device_uuid)?;
    writeln!(out, "la-peer-max-bio-size {};", sb.max_peer_bio_size)?;
    writeln!(out, "al-stripes {};", sb.al_stripes)?;
    writeln!(out, "al-stripe-size-4k {};", sb.al_stripe_size_4k)?;
    let bytes = bitmap.disk_blocks() * BLOCK_SIZE as u64;
    writeln!(out, "# bm-bytes {bytes};")?;
    let mut bits_set = 0;
    for slot in 0..bitmap.slots() {
        match sb.version {
            Version::V08 => write!(out, "bm {{")?,
            Version::V09 => write!(out, "bitmap[{slot}] {{")?,
        }
        let words = SlotWords::new(bitmap, slot);
        bits_set = words.bits_set();
        words.print(out)?;
        write!(out, "\n}}\n")?;
    }
    writeln!(out, "# bits-set {bits_set};")?;
    Ok(())
}

fn positions(
    out: &mut dyn Write,
    header: &DumpHeader<'_>,
    sb: &Superblock,
    layout: &Layout,
) -> io::Result<()> {
    writeln!(out, "# md_size_sect {}", sb.md_size_sectors)?;
    if let Some(moved) = header.moved {
        let Moved { device, current_bytes, last_bytes, expected_md_offset } = moved;
        writeln!(out, "#\n### Device seems to have been resized!")?;
        writeln!(out, "### dumping meta data from the last known position")?;
        writeln!(out, "### current size of {device}: {current_bytes} byte")?;
        writeln!(out, "### expected position of meta data:")?;
        writeln!(out, "## md_offset {expected_md_offset}\n## al_offset 0\n## bm_offset 0")?;
        writeln!(out, "### last known size of {device}: {last_bytes} byte")?;
        writeln!(out, "### adjusted position of meta data:")?;
    }
    writeln!(out, "# md_offset {}", layout.md_offset)?;
    writeln!(out, "# al_offset {}", layout.al_pos())?;
    writeln!(out, "# bm_offset {}\n", layout.bitmap_pos())
}

fn v08_body(out: &mut dyn Write, sb: &Superblock) -> io::Result<()> {
    let uuids = [sb.current_uuid, sb.peers[0].bitmap_uuid, sb.history[0], sb.history[1]];
    write!(out, "uuid {{\n   ")?;
    for uuid in uuids {
        write!(out, " 0x{uuid:016X};")?;
    }
    writeln!(out, "\n    flags 0x{:08X};\n}}", sb.flags.0)
}

fn v09_body(out: &mut dyn Write, sb: &Superblock) -> io::Result<()> {
    writeln!(out, "node-id {};", sb.node_id)?;
    writeln!(out, "current-uuid 0x{:016X};", sb.current_uuid)?;
    writeln!(out, "flags 0x{:08X};", sb.flags.0)?;
    writeln!(out, "members 0x{:016X};", sb.members)?;
    for (n, peer) in sb.peers.iter().enumerate() {
        writeln!(out, "peer[{n}] {{")?;
        writeln!(out, "    bitmap-index {};", peer.bitmap_index)?;
        writeln!(out, "    bitmap-uuid 0x{:016X};", peer.bitmap_uuid)?;
        writeln!(out, "    bitmap-dagtag 0x{:016X};", peer.bitmap_dagtag)?;
        write!(out, "    flags 0x{:08X};", peer.flags.0)?;
        if peer.flags.0 != 0 {
            write!(out, " # {}", peer.flags.dump_names())?;
        }
        writeln!(out, "\n}}")?;
    }
    writeln!(out, "history-uuids {{")?;
    for line in sb.history.chunks(4) {
        write!(out, "       ")?;
        for uuid in line {
            write!(out, " 0x{uuid:016X};")?;
        }
        writeln!(out)?;
    }
    writeln!(out, "}}")
}

/// One slot's 32-bit words, as far as the on-disk blocks hold them.
struct SlotWords<'a> {
    words: &'a [u64],
    len: u64,
    slot: u64,
    slots: u64,
}

impl<'a> SlotWords<'a> {
    fn new(bitmap: &'a Bitmap, slot: usize) -> Self {
        let slots = bitmap.slots() as u64;
        let on_disk = bitmap.disk_blocks() * (BLOCK_SIZE as u64 / 4);
        let len = on_disk.saturating_sub(slot as u64).div_ceil(slots);
        Self { words: bitmap.words(slot), len, slot: slot as u64, slots }
    }

    fn word(&self, w: u64) -> u32 {
        let word = self.words.get((w / 2) as usize).copied().unwrap_or(0);
        (if w.is_multiple_of(2) { word } else { word >> 32 }) as u32
    }

    fn bits_set(&self) -> u64 {
        let whole = (self.len / 2) as usize;
        let mut sum: u64 = self.words.iter().take(whole).map(|w| u64::from(w.count_ones())).sum();
        if self.len % 2 == 1 {
            sum += u64::from(self.word(self.len - 1).count_ones());
        }
        sum
    }

    /// Words from `w` on that equal the first one, at least up to `limit`.
    fn equal_until(&self, w: u64, limit: u64) -> u64 {
        let first = self.word(w);
        let double = u64::from(first) << 32 | u64::from(first);
        let mut at = w;
        while at < limit {
            // Two words at a time where they share a 64-bit word.
            let whole = at.is_multiple_of(2) && at + 1 < limit;
            if whole && self.words.get((at / 2) as usize).copied().unwrap_or(0) == double {
                at += 2;
                continue;
            }
            if self.word(at) != first {
                break;
            }
            at += 1;
        }
        at
    }

    /// Length of the run starting at `w`, rounded down to whole lines of 8 words (§12.3).
    fn run(&self, w: u64) -> u64 {
        let unit = BLOCK_SIZE as u64 * self.slots;
        let per_piece = PIECE_BYTES / unit * unit / 4 / self.slots;
        let piece_end = ((w / per_piece + 1) * per_piece).min(self.len);
        let end = self.equal_until(w, piece_end);
        // Only a run that is worth printing continues in the next piece.
        let end = if end == piece_end && end - w >= 16 { self.equal_until(w, self.len) } else { end };
        (end - w) / 8 * 8
    }

    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let printed = self.len / 2 * 2;
        let mut w = 0;
        // A trailing odd half word is not shown, but its line is begun.
        while w < self.len {
            let i = w * self.slots + self.slot;
            writeln!(out)?;
            if i & 63 == self.slot {
                writeln!(out, "   # at {}kB", 128 * (i - self.slot))?;
            }
            write!(out, "   ")?;
            let run = self.run(w);
            if run > 8 {
                let word = self.word(w);
                write!(out, " {} times 0x{word:08X}{word:08X};", run / 2)?;
                w += run;
                continue;
            }
            for at in (w..(w + 8).min(printed)).step_by(2) {
                let word = u64::from(self.word(at + 1)) << 32 | u64::from(self.word(at));
                write!(out, " 0x{word:016X};")?;
            }
            w += 8;
        }
        Ok(())
    }
}
