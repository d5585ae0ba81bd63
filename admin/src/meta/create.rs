//! `create-md`: new metadata, never over something valuable unasked (`spec/metadata.md` §13.5, §13.6).

use palisade_metadata::image::{self, Fill, FoundFormat};
use palisade_metadata::{
    BYTES_PER_BIT_MIN, DeviceFlags, Geometry, Kind, Layout, Superblock, Version, gi as show,
};

use super::changes::{Changes, al_geometry, size_option};
use super::resize::{fill, move_from};
use super::sanity::check_existing_data;
use super::{EXIT_ARGUMENT, EXIT_FAILED, EXIT_USAGE, Job};
use crate::cli::{Failure, print};

const EXIT_GEOMETRY: i32 = 30;
const KIB: u64 = 1024;

pub fn create_md(job: &mut Job) -> Result<i32, Failure> {
    let geometry = geometry(job)?;
    let layout = Layout::compute(job.kind, job.device.bytes, None, geometry)
        .map_err(|e| Failure::new(EXIT_ARGUMENT, format!("{}: {e}", job.device.path)))?;
    let changes = Changes::of(job)?;
    let bitmap = fill(job)?;
    match replacement(job, geometry)? {
        Replacement::Fresh => {
            if let Some(code) = check_existing_data(job, &layout)? {
                return Ok(code);
            }
            let mut superblock = Superblock::fresh(job.version, &layout);
            changes.apply(&mut superblock, &layout)?;
            print("initializing activity log\n");
            let size = show::pretty_kib(layout.bm_area_sectors * 512 / KIB);
            match bitmap {
                Fill::Zeros => eprintln!("initializing bitmap ({size}) to all zero"),
                Fill::Ones => eprintln!("initializing bitmap ({size}) to all one"),
                Fill::Leave => eprintln!("SKIPPED initializing bitmap area"),
            }
            print("Writing meta data...\n");
            image::create_md_filled(&job.device.file, &layout, &superblock, bitmap)
                .map_err(|e| job.io_failure(&e))?;
            job.remember(superblock.device_uuid);
        }
        Replacement::Convert(mut superblock, layout) => {
            if let Some(code) = check_existing_data(job, &layout)? {
                return Ok(code);
            }
            changes.apply(&mut superblock, &layout)?;
            print("Writing meta data...\n");
            job.store(&layout, &superblock)?;
        }
        Replacement::Moved => return Ok(0),
        Replacement::Declined => {
            print("Operation cancelled.\n");
            return Ok(EXIT_FAILED);
        }
        Replacement::Geometry => {
            eprintln!(
                "Sorry, not yet fully implemented\nTry dump-md > dump.txt; restore-md -s x -z y dump.txt"
            );
            return Ok(EXIT_GEOMETRY);
        }
    }
    print("New drbd meta data block successfully created.\n");
    Ok(0)
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

enum Replacement {
    /// Nothing there, or to be overwritten.
    Fresh,
    Declined,
    /// It was where the device ended before it grew, and is at its end now.
    Moved,
    /// Only another activity log was wanted.
    Geometry,
    Convert(Box<Superblock>, Layout),
}

/// What to do about metadata that is there already.
fn replacement(job: &Job, wanted: Geometry) -> Result<Replacement, Failure> {
    if let Some(last) = job.last_known_bytes().filter(|_| !job.question.force) {
        return offer_to_move(job, last);
    }
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
        return convert(job, wanted, &old);
    }
    let question =
        format!("So you want me to replace the {have} meta-data\nwith newly initialized {want} meta-data?");
    Ok(if job.question.ask(&[], &question) { Replacement::Fresh } else { Replacement::Declined })
}

fn offer_to_move(job: &Job, last: u64) -> Result<Replacement, Failure> {
    let (path, bytes, name) = (&job.device.path, job.device.bytes, job.version.name());
    let place = palisade_metadata::md_offset(Kind::Internal, last).unwrap_or(0);
    let context: &[&str] = &[
        &format!("{path} has {bytes} bytes now and had {last} before."),
        &format!("There appears to be a {name} flexible-size internal meta data block"),
        &format!("where it ended then, at byte offset {place}"),
    ];
    if job.question.ask(context, "Move internal meta data from last-known position?") {
        move_from(job, last)?;
        return Ok(Replacement::Moved);
    }
    let question = "So you want me to ignore it and create new meta data?";
    Ok(if job.question.ask(&[], question) { Replacement::Fresh } else { Replacement::Declined })
}

fn convert(job: &Job, wanted: Geometry, old: &Superblock) -> Result<Replacement, Failure> {
    if !old.is_clean() {
        return Err(Failure::new(
            EXIT_FAILED,
            format!(
                "Found meta data is \"unclean\", please apply-al first with format {}",
                old.version.name()
            ),
        ));
    }
    if old.version == Version::V09 && old.bm_bytes_per_bit != BYTES_PER_BIT_MIN {
        return Err(Failure::new(
            EXIT_FAILED,
            format!(
                "{}: A v08 bitmap has one bit per {BYTES_PER_BIT_MIN} bytes, this one has one per {}; wipe-md \
                 and create-md make new metadata.",
                job.device.path, old.bm_bytes_per_bit
            ),
        ));
    }
    if wanted.max_peers != 1 {
        print(&format!("Warning: setting max_peers to 1 instead of {}\n", wanted.max_peers));
    }
    let converted = match job.version {
        Version::V09 => old.convert_to_v09(job.kind, job.device.bytes),
        Version::V08 => old.convert_to_v08(job.kind, job.device.bytes),
    };
    converted
        .map(|mut sb| {
            if old.max_peers > 1 {
                eprintln!(
                    "The bitmaps of {} peers cannot be kept: everything will be resynced.",
                    old.max_peers
                );
                sb.flags.set(DeviceFlags::FULL_SYNC, true);
            }
            sb
        })
        .and_then(|sb| {
            let layout = Layout::of_superblock(job.kind, job.device.bytes, None, &sb)?;
            Ok(Replacement::Convert(Box::new(sb), layout))
        })
        .map_err(|e| Failure::new(EXIT_FAILED, format!("{}: {e}", job.device.path)))
}
