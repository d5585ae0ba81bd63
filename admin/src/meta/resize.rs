//! `check-resize`: internal metadata follows the end of a device that has grown.

use palisade_metadata::Kind;
use palisade_metadata::image::{self, Fill};

use super::{EXIT_ARGUMENT, EXIT_FAILED, Job};
use crate::cli::{Failure, print};

pub fn check_resize(job: &mut Job) -> Result<i32, Failure> {
    if job.kind != Kind::Internal {
        return Err(Failure::new(EXIT_FAILED, "Operation only supported for >= v8 internal meta data"));
    }
    if let Some(valid) = job.probe()? {
        job.remember(valid.superblock.device_uuid);
        return Ok(0);
    }
    let last =
        job.last_known_bytes().ok_or_else(|| Failure::new(EXIT_FAILED, "no suitable meta data found :("))?;
    move_from(job, last)?;
    Ok(0)
}

/// Moves the metadata from where the device ended when it had `last` bytes.
pub fn move_from(job: &Job, last: u64) -> Result<(), Failure> {
    let rest = fill(job)?;
    eprintln!("Moving the internal meta data to its proper location");
    let (superblock, _) =
        image::move_internal(&job.device.file, last, rest).map_err(|e| job.io_failure(&e))?;
    job.remember(superblock.device_uuid);
    print("Internal drbd meta data successfully moved.\nOld meta data region zeroed.\n");
    Ok(())
}

/// What `--initialize-bitmap` wants in new bitmap space.
pub fn fill(job: &Job) -> Result<Fill, Failure> {
    match job.scanned.flag("initialize-bitmap").unwrap_or("automatic") {
        "automatic" | "zeroout" | "pwrite" => Ok(Fill::Zeros),
        "set-all" => Ok(Fill::Ones),
        "skip" => Ok(Fill::Leave),
        other => Err(Failure::new(
            EXIT_ARGUMENT,
            format!(
                "Option --initialize-bitmap: '{other}' is none of automatic, zeroout, pwrite, set-all, skip"
            ),
        )),
    }
}
