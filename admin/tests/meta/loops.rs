//! On a block device: one that is in use, and one whose page cache is out of date. Needs root and a free
//! loop device, as `make test` has; without them there is nothing to see here.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;

use super::common::{MIB, Place};

/// A loop device over the image, gone when dropped.
struct Loop(String);

impl Loop {
    fn over(path: &PathBuf) -> Option<Self> {
        let out = Command::new("losetup").args(["-f", "--show"]).arg(path).output().ok()?;
        if !out.status.success() {
            eprintln!("no loop device: {}", String::from_utf8_lossy(&out.stderr));
            return None;
        }
        Some(Self(String::from_utf8_lossy(&out.stdout).trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_device_in_use_is_not_touched_unasked() {
    let place = Place::with_image(64 * MIB);
    let Some(device) = Loop::over(&place.path("md.img")) else { return };
    let run = |words: &str| {
        let all = ["-", "v09", &device.0, "internal"].into_iter().chain(words.split(' '));
        place.run(&all.collect::<Vec<_>>())
    };
    let (code, out, err) = run("create-md 1");
    assert_eq!((code, out.contains("successfully created")), (0, true), "{err}");
    const O_EXCL: i32 = 0o200;
    let holder = File::options().read(true).custom_flags(O_EXCL).open(&device.0).unwrap();
    let (code, out, err) = run("outdate");
    assert_eq!((code, out.as_str()), (20, "Operation canceled.\n"), "{err}");
    assert!(err.starts_with("\nExclusive open failed. Do it anyways?\n"), "{err}");
    let (code, _, err) = run("apply-al");
    assert!(code == 20 && !err.contains("Do it anyways"), "{err}");
    assert_eq!(run("dstate").0, 0);
    drop(holder);
    assert_eq!(run("apply-al").0, 0);
}

/// The kernel writes metadata past the page cache of the device.
#[test]
fn what_is_read_is_what_is_on_the_device() {
    let place = Place::with_image(64 * MIB);
    let Some(device) = Loop::over(&place.path("md.img")) else { return };
    let run = |words: &str| {
        let all = ["--force", "-", "v09", &device.0, "internal"].into_iter().chain(words.split(' '));
        place.run(&all.collect::<Vec<_>>()).1
    };
    // Somebody keeps the device open and has read it, so that its page cache stays.
    let mut holder = File::open(&device.0).unwrap();
    run("create-md 1");
    let superblock = 64 * MIB - 4096;
    holder.seek(SeekFrom::Start(superblock)).unwrap();
    holder.read_exact(&mut [0; 4096]).unwrap();
    assert_eq!(run("read-dev-uuid"), "0000000000000000\n");
    place.put(superblock + 0x30, &0xABCD_u64.to_be_bytes());
    assert_eq!(run("read-dev-uuid"), "000000000000ABCD\n");
}
