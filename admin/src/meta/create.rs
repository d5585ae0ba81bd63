//! `create-md`: new metadata, never over something valuable unasked (`spec/metadata.md` §13.5, §13.6).

use std::io::Read as _;
use std::process::{Command as Process, Stdio};

use palisade_metadata::image::{self, BlockIo, FoundFormat};
use palisade_metadata::{
    DeviceFlags, Geometry, Kind, Layout, PeerFlags, Superblock, UUID_JUST_CREATED, Version, gi as show,
};

use super::existing::{HEAD_BYTES, What, recognise};
use super::gi::uuid;
use super::{EXIT_ARGUMENT, EXIT_FAILED, EXIT_USAGE, Job};
use crate::cli::{Failure, print};

const EXIT_GEOMETRY: i32 = 30;
const EXIT_REFUSED: i32 = 40;
const KIB: u64 = 1024;

const WOULD_TRUNCATE: &str = "Device size would be truncated, which\nwould corrupt data and result in\n\
                              'access beyond end of device' errors.\n";
const ZERO_FIRST: &str = "If you want me to do this, you need to zero out the first part\n\
                          of the device (destroy the content).\n\
                          You should be very sure that you mean it.\n";
const REFUSED: &str = "Operation refused.\n\n";

pub fn create_md(job: &mut Job) -> Result<i32, Failure> {
    let geometry = geometry(job)?;
    let layout = Layout::compute(job.kind, job.device.bytes, None, geometry)
        .map_err(|e| Failure::new(EXIT_ARGUMENT, format!("{}: {e}", job.device.path)))?;
    let changes = Changes::of(job)?;
    let replacement = replacement(job, geometry)?;
    let Replacement::Fresh = replacement else {
        return match replacement {
            Replacement::Declined => {
                print("Operation cancelled.\n");
                Ok(EXIT_FAILED)
            }
            Replacement::Geometry => {
                eprintln!(
                    "Sorry, not yet fully implemented\nTry dump-md > dump.txt; restore-md -s x -z y dump.txt"
                );
                Ok(EXIT_GEOMETRY)
            }
            Replacement::Convert(superblock, layout) => finish(job, &layout, *superblock, &changes, false),
            Replacement::Fresh => Ok(0),
        };
    };
    if let Some(code) = check_existing_data(job, &layout)? {
        return Ok(code);
    }
    let superblock = Superblock::fresh(job.version, &layout);
    finish(job, &layout, superblock, &changes, true)
}

fn geometry(job: &Job) -> Result<Geometry, Failure> {
    const MAX_PEERS: u32 = 31;
    let max_peers = match (job.version, job.argument(0)) {
        (Version::V08, _) => 1,
        (Version::V09, None) => {
            return Err(Failure::new(
                EXIT_USAGE,
                "USAGE: drbdmeta MINOR v09 ... create-md MAX_PEERS\n\n  MAX_PEERS argument missing",
            ));
        }
        (Version::V09, Some(text)) => {
            let n: u32 = text
                .parse()
                .map_err(|_| Failure::new(EXIT_USAGE, format!("{text} is not a valid number")))?;
            if !(1..=MAX_PEERS).contains(&n) {
                return Err(Failure::new(
                    EXIT_USAGE,
                    format!("MAX_PEERS argument not in allowed range 1 .. {MAX_PEERS}."),
                ));
            }
            n
        }
    };
    let mut geometry = Geometry::new(max_peers);
    if let Some((stripes, blocks)) = al_geometry(job)? {
        (geometry.al_stripes, geometry.al_stripe_size_4k) = (stripes, blocks);
    }
    if let Some(bytes) = size_option(job, "bitmap-block-size", 1)? {
        geometry.bytes_per_bit = u32::try_from(bytes).unwrap_or(u32::MAX);
    }
    geometry.check().map_err(|e| Failure::new(EXIT_ARGUMENT, e.to_string()))?;
    Ok(geometry)
}

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
fn size_option(job: &Job, name: &str, unit: u64) -> Result<Option<u64>, Failure> {
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
struct Changes {
    peer_max_bio_size: Option<u32>,
    effective_size_sectors: Option<u64>,
    diskful_peers: Vec<usize>,
    current_uuid: Option<u64>,
    consistent: bool,
    up_to_date: bool,
}

impl Changes {
    fn of(job: &Job) -> Result<Self, Failure> {
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
        })
    }

    fn apply(&self, superblock: &mut Superblock) -> Result<(), Failure> {
        if let Some(size) = self.peer_max_bio_size {
            superblock.max_peer_bio_size = size;
        }
        if let Some(sectors) = self.effective_size_sectors {
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
            if superblock.current_uuid == UUID_JUST_CREATED {
                superblock.current_uuid = random_uuid()?;
            }
        }
        Ok(())
    }
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

enum Replacement {
    /// Nothing there, or to be overwritten.
    Fresh,
    Declined,
    /// Only another activity log was wanted.
    Geometry,
    Convert(Box<Superblock>, Layout),
}

/// What to do about metadata that is there already.
fn replacement(job: &Job, wanted: Geometry) -> Result<Replacement, Failure> {
    let found = image::find_existing(&job.device.file).map_err(|e| job.io_failure(&e))?;
    let here = palisade_metadata::md_offset(job.kind, job.device.bytes);
    let internal = job.kind == Kind::Internal;
    let Some(found) = found.into_iter().find(|f| match f.kind {
        Kind::Internal => internal,
        _ => !internal && Some(f.position) == here,
    }) else {
        return Ok(Replacement::Fresh);
    };
    let want = job.version.name();
    let have = found.version().map_or("v07", Version::name);
    let (first, second, third) = (
        format!("You want me to create a {want} style flexible-size internal meta data block."),
        format!("There appears to be a {have} flexible-size internal meta data block"),
        format!("already in place on {} at byte offset {}", job.device.path, found.position),
    );
    let context: &[&str] = if internal { &[&first, &second, &third] } else { &[] };
    let FoundFormat::Known(old) = found.format else {
        let question = format!(
            "So you want me to replace the {have} meta-data\nwith newly initialized {want} meta-data?"
        );
        let yes = job.question.ask(context, &question);
        return Ok(if yes { Replacement::Fresh } else { Replacement::Declined });
    };
    if old.version == job.version {
        let other_log =
            old.al_stripes != wanted.al_stripes || old.al_stripe_size_4k != wanted.al_stripe_size_4k;
        let mut context = context;
        if other_log {
            if job.question.ask(context, "Do you want to change the activity log stripe settings *only*?") {
                return Ok(Replacement::Geometry);
            }
            context = &[];
        }
        let question = if internal {
            "Do you really want to overwrite the existing meta-data?"
        } else {
            "Valid meta data seems to be in place.\nDo you really want to overwrite?"
        };
        return Ok(if job.question.ask(context, question) {
            Replacement::Fresh
        } else {
            Replacement::Declined
        });
    }
    if job.question.ask(context, &format!("Valid {have} meta-data found, convert to {want}?")) {
        return convert(job, &old);
    }
    let question =
        format!("So you want me to replace the {have} meta-data\nwith newly initialized {want} meta-data?");
    Ok(if job.question.ask(&[], &question) { Replacement::Fresh } else { Replacement::Declined })
}

fn convert(job: &Job, old: &Superblock) -> Result<Replacement, Failure> {
    if !old.is_clean() {
        return Err(Failure::new(
            EXIT_FAILED,
            format!(
                "Found meta data is \"unclean\", please apply-al first with format {}",
                old.version.name()
            ),
        ));
    }
    let converted = match job.version {
        Version::V09 => old.convert_to_v09(job.kind, job.device.bytes),
        Version::V08 => old.convert_to_v08(job.kind, job.device.bytes),
    };
    converted
        .and_then(|sb| {
            let layout = Layout::of_superblock(job.kind, job.device.bytes, None, &sb)?;
            Ok(Replacement::Convert(Box::new(sb), layout))
        })
        .map_err(|e| Failure::new(EXIT_FAILED, format!("{}: {e}", job.device.path)))
}

/// The exit status if the data that is there forbids to go on.
fn check_existing_data(job: &Job, layout: &Layout) -> Result<Option<i32>, Failure> {
    let mut head = vec![0; HEAD_BYTES];
    job.device
        .file
        .read_at(0, &mut head)
        .map_err(|e| Failure::new(EXIT_ARGUMENT, format!("{} cannot be read: {e}.", job.device.path)))?;
    let Some(what) = recognise(&head) else { return Ok(None) };
    print(&format!(
        "md_offset {}\nal_offset {}\nbm_offset {}\n\nFound {}\n",
        layout.md_offset,
        layout.al_pos(),
        layout.bitmap_pos(),
        what.name()
    ));
    // A file system that does not say how large it is may be as large as the device.
    let unsized_there = job.kind == Kind::Internal && matches!(what, What::Filesystem { bytes: 0, .. });
    if what == What::Data || unsized_there {
        print("\n ==> This might destroy existing data! <==\n");
        return Ok(proceed(job));
    }
    if job.kind != Kind::Internal {
        print("\nThis would corrupt existing data.\n");
        return Ok(refuse(job, ZERO_FIRST));
    }
    let usable = layout.usable_sectors * 512;
    let used = match what {
        What::Filesystem { bytes, .. } => Some(bytes),
        What::Lvm => pv_bytes(&job.device.path),
        What::Swap | What::Data => None,
    };
    if let Some(used) = used {
        print(&format!("{:>12} kB data area apparently used\n", used / KIB));
    }
    print(&format!("{:>12} kB left usable by current configuration\n", usable / KIB));
    match used {
        None => {
            print(WOULD_TRUNCATE);
            Ok(refuse(job, ZERO_FIRST))
        }
        Some(used) if used > usable => {
            print(&format!(
                "\n{WOULD_TRUNCATE}You need to either\n   * use external meta data (recommended)\n   * shrink that \
                 filesystem first\n   * zero out the device (destroy the filesystem)\n{REFUSED}"
            ));
            Ok(Some(EXIT_REFUSED))
        }
        Some(_) => {
            print(
                "\nEven though it looks like this would place the new meta data into\nunused space, you still need \
                 to confirm, as this is only a guess.\n",
            );
            Ok(proceed(job))
        }
    }
}

fn refuse(job: &Job, advice: &str) -> Option<i32> {
    if job.scanned.is_set("ignore-sanity-checks") {
        print("\nIgnoring sanity check on user request.\n\n");
        return None;
    }
    print(&format!("{advice}{REFUSED}"));
    Some(EXIT_REFUSED)
}

fn proceed(job: &Job) -> Option<i32> {
    if job.question.ask(&[], "Do you want to proceed?") {
        return None;
    }
    print("Operation canceled.\n");
    Some(EXIT_FAILED)
}

/// Size of an LVM physical volume.
fn pv_bytes(path: &str) -> Option<u64> {
    let out = Process::new("pvs")
        .args(["--noheadings", "--nosuffix", "--units", "b", "-o", "pv_size", path])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|o| o.status.success())?;
    String::from_utf8_lossy(&out.stdout).trim().parse().ok()
}

fn finish(
    job: &Job,
    layout: &Layout,
    mut superblock: Superblock,
    changes: &Changes,
    fresh: bool,
) -> Result<i32, Failure> {
    changes.apply(&mut superblock)?;
    if fresh {
        print("initializing activity log\n");
        let size = show::pretty_kib(layout.bm_area_sectors * 512 / KIB);
        eprintln!("initializing bitmap ({size}) to all zero");
        print("Writing meta data...\n");
        image::create_md(&job.device.file, layout, &superblock).map_err(|e| job.io_failure(&e))?;
        job.remember(superblock.device_uuid);
    } else {
        print("Writing meta data...\n");
        job.store(layout, &superblock)?;
    }
    print("New drbd meta data block successfully created.\n");
    Ok(0)
}
