//! `dump-superblock` and `hexdump-superblock`: the 4 KiB of the superblock as they are on the disk, whether
//! they make sense or not (`spec/metadata.md` §13.5). It interprets fields but never checks or changes them.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};

use palisade_metadata::image::BlockIo;
use palisade_metadata::{BLOCK_SIZE, HISTORY_LEN, PEERS_MAX, Version, md_offset};

use super::{EXIT_ARGUMENT, Job};
use crate::cli::{Failure, print};
use crate::system::Local;

/// Found where the metadata were before the device grew.
const EXIT_MOVED: i32 = 2;
/// Nothing valid; dumped nevertheless.
const EXIT_INVALID: i32 = 3;

/// Where the block is and what it is worth.
struct Found {
    offset: u64,
    code: i32,
}

/// What stands beside the fields.
struct Remarks<'a> {
    time: &'a str,
    host: &'a str,
    device: &'a str,
    offset: u64,
    device_bytes: u64,
    valid: bool,
}

pub fn dump_superblock(job: &mut Job) -> Result<i32, Failure> {
    match job.scanned.flag("output-format").unwrap_or("auto") {
        "auto" if std::io::stdout().is_terminal() => dump(job, hex),
        "auto" | "bin" | "binary" => dump(job, |_, block, _| {
            let mut out = std::io::stdout().lock();
            // Nobody reads any more: nothing left to do.
            let _ = out.write_all(block).and_then(|()| out.flush());
        }),
        "hex" => dump(job, hex),
        "json" => dump(job, |job, block, found| {
            let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            let host = nix::unistd::gethostname().map(|h| h.to_string_lossy().into_owned());
            print(&json(
                block,
                job.version,
                &Remarks {
                    time: &Local::utc(seconds.map_or(0, |d| d.as_secs())),
                    host: &host.unwrap_or_default(),
                    device: &job.device.path,
                    offset: found.offset,
                    device_bytes: job.device.bytes,
                    valid: found.code != EXIT_INVALID,
                },
            ));
        }),
        other => Err(Failure::new(
            EXIT_ARGUMENT,
            format!("output format '{other}' is none of auto, hex, bin, json"),
        )),
    }
}

pub fn hexdump_superblock(job: &mut Job) -> Result<i32, Failure> {
    dump(job, hex)
}

fn dump(job: &mut Job, print: fn(&Job, &[u8; BLOCK_SIZE], &Found)) -> Result<i32, Failure> {
    let found = find(job).ok_or_else(|| {
        Failure::new(EXIT_ARGUMENT, format!("{} is too small for meta data", job.device.path))
    })?;
    let mut block = [0; BLOCK_SIZE];
    job.device
        .file
        .read_at(found.offset, &mut block)
        .map_err(|e| Failure::new(EXIT_ARGUMENT, format!("{}: {e}", job.device.path)))?;
    print(job, &block, &found);
    Ok(found.code)
}

fn find(job: &Job) -> Option<Found> {
    let here = md_offset(job.kind, job.device.bytes)?;
    if matches!(job.probe(), Ok(Some(_))) {
        return Some(Found { offset: here, code: 0 });
    }
    let before = job.last_known_bytes();
    match before.and_then(|bytes| md_offset(job.kind, bytes)) {
        Some(offset) => Some(Found { offset, code: EXIT_MOVED }),
        None => Some(Found { offset: here, code: EXIT_INVALID }),
    }
}

/// Sixteen bytes a line, as hex and as characters; repeated lines are left out.
fn hex(_: &Job, block: &[u8; BLOCK_SIZE], found: &Found) {
    let mut text = String::new();
    let mut last: Option<&[u8]> = None;
    let mut skipping = false;
    for (line, bytes) in (found.offset..).step_by(16).zip(block.chunks(16)) {
        if last == Some(bytes) {
            if !skipping {
                text.push_str("*\n");
            }
            skipping = true;
            continue;
        }
        (last, skipping) = (Some(bytes), false);
        let (left, right) = bytes.split_at(8);
        let octets = |half: &[u8]| half.iter().map(|b| format!("{b:02x} ")).collect::<String>();
        let shown = |b: &u8| if b.is_ascii_graphic() || *b == b' ' { char::from(*b) } else { '.' };
        let characters: String = bytes.iter().map(shown).collect();
        let _ = writeln!(text, "{line:08x}  {} {} |{characters}|", octets(left), octets(right));
    }
    let _ = writeln!(text, "{:08x}", found.offset.saturating_add(BLOCK_SIZE as u64));
    print(&text);
}

/// Big-endian fields of the block.
struct Fields<'a>(&'a [u8; BLOCK_SIZE]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..at + N).and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; N])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.bytes(at))
    }

    fn i32(&self, at: usize) -> i32 {
        i32::from_be_bytes(self.bytes(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.bytes(at))
    }

    fn hex32(&self, at: usize) -> String {
        format!("\"0x{:08X}\"", self.u32(at))
    }

    fn hex64(&self, at: usize) -> String {
        format!("\"0x{:016X}\"", self.u64(at))
    }

    /// `count` 64-bit numbers, four in a line.
    fn table(&self, at: usize, count: usize) -> String {
        let numbers: Vec<String> = (0..count).map(|n| self.hex64(at + n * 8)).collect();
        let lines: Vec<String> = numbers.chunks(4).map(|four| format!("    {}", four.join(", "))).collect();
        lines.join(",\n")
    }

    fn peer(&self, at: usize) -> String {
        format!(
            "    {{ \"bitmap_uuid\": {},  \"bitmap_dagtag\": {},  \"flags\": {},  \"bitmap_index\": {},  \
             \"reserved_u32\": [ {}, {} ] }}",
            self.hex64(at),
            self.u64(at + 8),
            self.hex32(at + 16),
            self.i32(at + 20),
            self.hex32(at + 24),
            self.hex32(at + 28)
        )
    }

    /// The format the magic number stands for.
    fn looks_like(&self) -> &'static str {
        match self.u32(0x3c) {
            0x8374_026a => "v07",
            0x8374_026b | 0x8374_026c => "v08",
            0x8374_026d => "v09",
            _ => "unknown",
        }
    }
}

fn json(block: &[u8; BLOCK_SIZE], version: Version, remarks: &Remarks<'_>) -> String {
    const PEERS: usize = 0x70;
    const PEER_SIZE: usize = 32;
    const HISTORY: usize = PEERS + PEERS_MAX * PEER_SIZE;
    let f = Fields(block);
    let v09 = version == Version::V09;
    let (device_uuid, stripes, padding) =
        if v09 { (0x30, 0x60, HISTORY + HISTORY_LEN * 8) } else { (0x28, 0x58, 0x64) };
    let mut text = format!(
        "{{\n  \"effective_size\": {},\n  \"current_uuid\": {},\n  \"device_uuid\": {},\n  \"flags\": {},\n  \
         \"magic\": {},\n  \"md_size_sect\": {},\n  \"al_offset\": {},\n  \"al_nr_extents\": {},\n  \
         \"bm_offset\": {},\n  \"bm_bytes_per_bit\": {},\n  \"la_peer_max_bio_size\": {},\n  \
         \"al_stripes\": {},\n  \"al_stripe_size_4k\": {},\n",
        f.u64(0),
        f.hex64(8),
        f.hex64(device_uuid),
        f.hex32(0x38),
        f.hex32(0x3c),
        f.u32(0x40),
        f.i32(0x44),
        f.u32(0x48),
        f.i32(0x4c),
        f.u32(0x50),
        f.u32(0x54),
        f.u32(stripes),
        f.u32(stripes + 4)
    );
    if v09 {
        let peers: Vec<String> = (0..PEERS_MAX).map(|id| f.peer(PEERS + id * PEER_SIZE)).collect();
        let _ = writeln!(
            text,
            "  \"peers\": [\n{}\n  ],\n  \"bm_max_peers\": {},\n  \"node_id\": {},\n  \"members\": {},\n  \
             \"reserved_u64\": [ {}, {}, {} ],\n  \"reserved_u32\": [ {}, {} ],\n  \"history_uuids\": [\n{}\n  ],",
            peers.join(",\n"),
            f.u32(0x58),
            f.i32(0x5c),
            f.hex64(0x10),
            f.hex64(0x18),
            f.hex64(0x20),
            f.hex64(0x28),
            f.hex32(0x68),
            f.hex32(0x6c),
            f.table(HISTORY, HISTORY_LEN)
        );
    } else {
        let _ = writeln!(
            text,
            "  \"peers\": [ {{ \"bitmap_uuid\": {} }} ],\n  \"history_uuids\": [\n{}\n  ],",
            f.hex64(0x10),
            f.table(0x18, 2)
        );
    }
    let odd: Vec<String> = (padding..BLOCK_SIZE)
        .filter_map(|at| block.get(at).filter(|byte| **byte != 0).map(|byte| (at, byte)))
        .map(|(at, byte)| format!("\"{at}\": \"0x{byte:02X}\""))
        .collect();
    let odd = if odd.is_empty() { String::new() } else { format!("{} ", odd.join(", ")) };
    let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    let _ = writeln!(
        text,
        "  \"padding\": {{ \"start\": {padding}, \"end\": {BLOCK_SIZE}, \"non-zero\": {{ {odd}}} }},\n  \
         \"#meta\": {{\n    \"dump_time_utc\": \"{}\",\n    \"dump_host\": \"{}\",\n    \
         \"md_device_name\": \"{}\",\n    \"dump_offset\": {},\n    \"bd_size\": {},\n    \
         \"dumped_as\": \"{}\",\n    \"looks_like\": \"{}\",\n    \"valid\": \"{}\"\n  }}\n}}",
        remarks.time,
        escaped(remarks.host),
        escaped(remarks.device),
        remarks.offset,
        remarks.device_bytes,
        version.name(),
        f.looks_like(),
        if remarks.valid { "VALID_MD_FOUND" } else { "NO_VALID_MD_FOUND" }
    );
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;

    use super::*;

    /// Superblocks of both formats and what the reference made of them.
    #[test]
    fn json_is_that_of_the_reference() {
        let packed = include_bytes!("../../tests/golden/superblocks.tar.zst");
        let mut archive = tar::Archive::new(zstd::Decoder::new(packed.as_slice()).unwrap());
        let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            files.insert(entry.path().unwrap().display().to_string(), bytes);
        }
        for version in [Version::V08, Version::V09] {
            let file = |end: &str| files[&format!("{}.{end}", version.name())].clone();
            let block: [u8; BLOCK_SIZE] = file("bin").try_into().unwrap();
            let want = String::from_utf8(file("json")).unwrap();
            let number = |key: &str| -> u64 {
                let rest = want.split(&format!("\"{key}\": ")).nth(1).unwrap();
                rest.split(',').next().unwrap().parse().unwrap()
            };
            let remarks = Remarks {
                time: "DATE",
                host: "HOST",
                device: "md.img",
                offset: number("dump_offset"),
                device_bytes: number("bd_size"),
                valid: true,
            };
            assert_eq!(json(&block, version, &remarks), want);
        }
    }

    #[test]
    fn what_should_be_zero_and_is_not_is_told() {
        let mut block = [0; BLOCK_SIZE];
        block[4095] = 0x5a;
        let remarks =
            Remarks { time: "", host: "", device: "a\"b", offset: 0, device_bytes: 0, valid: false };
        let text = json(&block, Version::V09, &remarks);
        assert!(text.contains("\"non-zero\": { \"4095\": \"0x5A\" }"), "{text}");
        assert!(text.contains("\"a\\\"b\"") && text.contains("\"looks_like\": \"unknown\""), "{text}");
    }
}
