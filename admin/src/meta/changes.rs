//! What the options of `create-md` and `restore-md` say about the new metadata.

use std::io::Read as _;

use palisade_metadata::{DeviceFlags, Layout, PeerFlags, Superblock, UUID_JUST_CREATED};

use super::gi::uuid;
use super::{EXIT_ARGUMENT, Job};
use crate::cli::Failure;

const KIB: u64 = 1024;

/// Stripes of the activity log and blocks per stripe, if any of the two was given.
pub fn al_geometry(job: &Job) -> Result<Option<(u32, u32)>, Failure> {
    const AL_BYTES_MIN: u64 = 32 << 10;
    const AL_BYTES_MAX: u64 = 32 << 20;
    const BLOCK_KIB: u64 = 4;
    const STRIPE_KIB: u64 = 32;
    if job.scanned.flag("al-stripes").is_none() && job.scanned.flag("al-stripe-size-kB").is_none() {
        return Ok(None);
    }
    let stripes = size_option(job, "al-stripes", 1)?.unwrap_or(1);
    let stripe_kib = size_option(job, "al-stripe-size-kB", KIB)?.map_or(STRIPE_KIB, |bytes| bytes / KIB);
    let al_bytes = stripes.saturating_mul(stripe_kib).saturating_mul(KIB);
    if al_bytes < AL_BYTES_MIN || stripe_kib < BLOCK_KIB {
        return Err(Failure::new(EXIT_ARGUMENT, "invalid (too small) al-stripe* settings"));
    }
    if al_bytes > AL_BYTES_MAX {
        return Err(Failure::new(EXIT_ARGUMENT, "invalid (too large) al-stripe* settings"));
    }
    let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    Ok(Some((narrow(stripes), narrow(stripe_kib / BLOCK_KIB))))
}

/// A number with an optional suffix, in bytes; without suffix it counts `unit` bytes.
pub fn size_option(job: &Job, name: &str, unit: u64) -> Result<Option<u64>, Failure> {
    let Some(text) = job.scanned.flag(name) else { return Ok(None) };
    let (digits, factor) = match text.chars().last() {
        Some('s') => (text.strip_suffix('s'), 512),
        Some(c @ ('k' | 'K')) => (text.strip_suffix(c), 1 << 10),
        Some(c @ ('m' | 'M')) => (text.strip_suffix(c), 1 << 20),
        Some(c @ ('g' | 'G')) => (text.strip_suffix(c), 1 << 30),
        _ => (Some(text), unit),
    };
    digits
        .and_then(|d| d.parse::<u64>().ok())
        .and_then(|n| n.checked_mul(factor))
        .map(Some)
        .ok_or_else(|| Failure::new(EXIT_ARGUMENT, format!("{text} is not a valid number")))
}

/// What the options say about the new superblock.
pub struct Changes {
    peer_max_bio_size: Option<u32>,
    effective_size_sectors: Option<u64>,
    diskful_peers: Vec<usize>,
    current_uuid: Option<u64>,
    consistent: bool,
    up_to_date: bool,
    peers_outdated: bool,
    rotate_uuids: bool,
}

impl Changes {
    pub fn of(job: &Job) -> Result<Self, Failure> {
        const BIO_BYTES_MAX: u64 = 1 << 20;
        const SECTOR: u64 = 512;
        let wrong = |text: String| Failure::new(EXIT_ARGUMENT, text);
        let bio = size_option(job, "peer-max-bio-size", 1)?;
        if bio.is_some_and(|b| b > BIO_BYTES_MAX) {
            return Err(wrong("peer-max-bio-size out of range (0...1M)".to_owned()));
        }
        let current_uuid = match job.scanned.flag("initial-current-uuid") {
            None => None,
            Some("generate") => Some(random_uuid()?),
            Some(text) => Some(uuid(text).map(|u| u & !1).filter(|u| *u != 0).ok_or_else(|| {
                wrong(format!("Option --initial-current-uuid: '{text}' is not a usable UUID"))
            })?),
        };
        Ok(Self {
            peer_max_bio_size: bio.and_then(|b| u32::try_from(b).ok()),
            effective_size_sectors: size_option(job, "effective-size", SECTOR)?.map(|b| b / SECTOR),
            diskful_peers: job.scanned.flag("diskful-peers").map_or(Ok(Vec::new()), |text| {
                node_ids(text).ok_or_else(|| {
                    wrong(format!("Option --diskful-peers: '{text}' is no list of node ids and no mask"))
                })
            })?,
            current_uuid,
            consistent: job.scanned.is_set("consistent"),
            up_to_date: job.scanned.is_set("uptodate"),
            peers_outdated: job.scanned.is_set("peers-outdated"),
            rotate_uuids: job.scanned.is_set("rotate-uuids"),
        })
    }

    /// Changes the superblock that goes to `layout`.
    pub fn apply(&self, superblock: &mut Superblock, layout: &Layout) -> Result<(), Failure> {
        if let Some(size) = self.peer_max_bio_size {
            superblock.max_peer_bio_size = size;
        }
        if let Some(sectors) = self.effective_size_sectors {
            let usable = layout.usable_sectors;
            if sectors > usable {
                return Err(Failure::new(
                    EXIT_ARGUMENT,
                    format!(
                        "Option --effective-size: {sectors} sectors are more than the {usable} that this \
                         device has beside its metadata, or that its bitmap covers"
                    ),
                ));
            }
            superblock.effective_size_sectors = sectors;
        }
        for node_id in &self.diskful_peers {
            if let Some(peer) = superblock.peers.get_mut(*node_id) {
                peer.flags.set(PeerFlags::DEVICE_SEEN, true);
            }
        }
        if let Some(uuid) = self.current_uuid {
            superblock.current_uuid = uuid;
        }
        if self.consistent || self.up_to_date {
            superblock.flags.set(DeviceFlags::CONSISTENT, true);
            superblock.flags.set(DeviceFlags::WAS_UP_TO_DATE, self.up_to_date);
            real_uuid(superblock)?;
        }
        if self.peers_outdated {
            for peer in &mut superblock.peers {
                peer.flags.set(PeerFlags::OUTDATED, true);
            }
        }
        if self.rotate_uuids {
            real_uuid(superblock)?;
            let old = superblock.current_uuid;
            for peer in &mut superblock.peers {
                peer.bitmap_uuid = old;
            }
            superblock.history.rotate_right(1);
            superblock.history[0] = old;
            superblock.current_uuid = random_uuid()?;
        }
        Ok(())
    }
}

/// Data that is valid has an identity.
fn real_uuid(superblock: &mut Superblock) -> Result<(), Failure> {
    if superblock.current_uuid == UUID_JUST_CREATED {
        superblock.current_uuid = random_uuid()?;
    }
    Ok(())
}

/// `1,2,5` or a mask such as `0x26`.
fn node_ids(text: &str) -> Option<Vec<usize>> {
    const NODES: usize = 32;
    if let Some(mask) = text.strip_prefix("0x") {
        let mask = u32::from_str_radix(mask, 16).ok()?;
        return Some((0..NODES).filter(|n| mask >> n & 1 == 1).collect());
    }
    text.split(',').map(|n| n.parse::<usize>().ok().filter(|n| *n < NODES)).collect()
}

/// A random UUID with bit 0 clear (nobody is Primary).
fn random_uuid() -> Result<u64, Failure> {
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .map_err(|e| Failure::new(EXIT_ARGUMENT, format!("Cannot read /dev/urandom: {e}.")))?;
    Ok(u64::from_ne_bytes(bytes) & !1)
}
