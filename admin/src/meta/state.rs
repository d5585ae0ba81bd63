//! Commands about the state of the data: `apply-al`, `dstate`, `outdate`, `invalidate`, `wipe-md` and the
//! device UUID.

use palisade_metadata::al::Outcome;
use palisade_metadata::image::{self, ImageError};
use palisade_metadata::{ApplyError, DeviceFlags, PeerFlags, Version, gi as show};

use super::{EXIT_ARGUMENT, EXIT_FAILED, Job, NO_METADATA, gi};
use crate::cli::{Failure, print};

const EXIT_INCONSISTENT: i32 = 5;
const EXIT_NO_LOG: i32 = 1;
const EXIT_NO_UPDATE: i32 = 2;

pub fn apply_al(job: &mut Job) -> Result<i32, Failure> {
    const KIB: u64 = 1024;
    let (superblock, layout) = job.superblock(NO_METADATA)?;
    let primary = superblock.flags.contains(DeviceFlags::PRIMARY_IND);
    let replay = image::read_log(&job.device.file, &superblock, &layout).map_err(|e| job.io_failure(&e))?;
    if replay.invalid_blocks > 0 && replay.outcome != Outcome::NoUsableLog {
        eprintln!("{} corrupt AL transactions found", replay.invalid_blocks);
    }
    let (applied, md) = image::apply_al(&job.device.file, job.kind, None).map_err(|e| match e {
        ImageError::Apply(error) => {
            let (code, line) = unusable(error);
            eprintln!("{line}");
            Failure::new(code, error.to_string())
        }
        _ => job.io_failure(&e),
    })?;
    job.remember(md.superblock.device_uuid);
    if let Some(error) = applied.ignored {
        eprintln!("{}\nError ignored, no need to apply the AL", unusable(error).1);
    }
    if !primary || replay.update_blocks == 0 {
        return Ok(0);
    }
    for extent in &applied.skipped_extents {
        eprintln!("extent {extent} beyond end of bitmap!");
    }
    if replay.hot_extents.is_empty() {
        eprintln!("Nothing to do.");
    } else {
        let size = show::pretty_kib(applied.marked_bytes / KIB);
        eprintln!("Marked additional {size} as out-of-sync based on AL.");
    }
    Ok(0)
}

/// Exit status and the reference's line about a log that cannot be used.
fn unusable(error: ApplyError) -> (i32, &'static str) {
    match error {
        ApplyError::NoUsableLog => (EXIT_NO_LOG, "No usable activity log found. Do you need to create-md?"),
        ApplyError::NoUpdate => (EXIT_NO_UPDATE, "No valid AL update transaction found."),
    }
}

pub fn wipe_md(job: &mut Job) -> Result<i32, Failure> {
    if job.probe()?.is_none() {
        eprintln!("There appears to be no drbd meta data to wipe out?");
        return Ok(0);
    }
    if !job.question.ask(&[], "Do you really want to wipe out the DRBD meta data?") {
        print("Operation cancelled.\n");
        return Ok(EXIT_FAILED);
    }
    print("Wiping meta data...\n");
    image::wipe_md(&job.device.file, job.kind).map_err(|e| job.io_failure(&e))?;
    if !job.device.file.dry_run {
        job.note.remove();
    }
    print("DRBD meta data block successfully wiped out.\n");
    Ok(0)
}

pub fn outdate(job: &mut Job) -> Result<i32, Failure> {
    let (mut superblock, layout) = job.superblock("")?;
    if !superblock.flags.contains(DeviceFlags::CONSISTENT) {
        return Err(Failure::new(EXIT_INCONSISTENT, "Device is inconsistent."));
    }
    superblock.flags.set(DeviceFlags::WAS_UP_TO_DATE, false);
    job.store(&layout, &superblock)?;
    Ok(0)
}

pub fn invalidate(job: &mut Job) -> Result<i32, Failure> {
    let (mut superblock, layout) = job.superblock("")?;
    superblock.flags.set(DeviceFlags::CONSISTENT, false);
    superblock.flags.set(DeviceFlags::WAS_UP_TO_DATE, false);
    match superblock.version {
        Version::V08 => {
            superblock.flags.set(DeviceFlags::FULL_SYNC, true);
        }
        Version::V09 => {
            for peer in &mut superblock.peers {
                peer.flags.set(PeerFlags::FULL_SYNC, true);
            }
        }
    }
    job.store(&layout, &superblock)?;
    Ok(0)
}

pub fn dstate(job: &mut Job) -> Result<i32, Failure> {
    let (superblock, _) = job.superblock(NO_METADATA)?;
    print(&format!("{}\n", show::dstate(&superblock)));
    Ok(0)
}

pub fn read_dev_uuid(job: &mut Job) -> Result<i32, Failure> {
    let (superblock, _) = job.superblock("")?;
    print(&format!("{:016X}\n", superblock.device_uuid));
    Ok(0)
}

pub fn write_dev_uuid(job: &mut Job) -> Result<i32, Failure> {
    let text = job.argument(0).ok_or_else(|| Failure::new(EXIT_ARGUMENT, "Required Argument missing"))?;
    let uuid = gi::uuid(text)
        .ok_or_else(|| Failure::new(EXIT_ARGUMENT, format!("'{text}' is not a hexadecimal number.")))?;
    let (mut superblock, layout) = job.superblock("")?;
    superblock.device_uuid = uuid;
    job.store(&layout, &superblock)?;
    Ok(0)
}
