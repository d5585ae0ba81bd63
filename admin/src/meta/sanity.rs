//! The check for data that new metadata would destroy, as it talks to the administrator (`spec/metadata.md`
//! §13.6). What is there is recognised in `existing.rs`.

use std::process::{Command as Process, Stdio};

use palisade_metadata::image::BlockIo;
use palisade_metadata::{Kind, Layout};

use super::existing::{HEAD_BYTES, What, recognise};
use super::{EXIT_ARGUMENT, EXIT_FAILED, Job};
use crate::cli::{Failure, print};

const EXIT_REFUSED: i32 = 40;
const KIB: u64 = 1024;

const WOULD_TRUNCATE: &str = "Device size would be truncated, which\nwould corrupt data and result in\n\
                              'access beyond end of device' errors.\n";
const ZERO_FIRST: &str = "If you want me to do this, you need to zero out the first part\n\
                          of the device (destroy the content).\n\
                          You should be very sure that you mean it.\n";
const REFUSED: &str = "Operation refused.\n\n";

/// The exit status if the data that is there forbids to go on.
pub fn check_existing_data(job: &Job, layout: &Layout) -> Result<Option<i32>, Failure> {
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
