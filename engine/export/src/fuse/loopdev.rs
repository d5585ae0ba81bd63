//! Loop devices over our FUSE file: find a free one, bind it, let it go, and clean up after the dead.

#![allow(unsafe_code)]

use crate::DeviceError;
use crate::node::{system, warn_of_users};
use crate::owner::{self, Owner};
use crate::sys::{self, DevNumber};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LOOP_CLR_FD: libc::c_ulong = 0x4c01;
const LOOP_SET_STATUS64: libc::c_ulong = 0x4c04;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4c07;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;

const FLAG_READ_ONLY: u32 = 1;
const FLAG_AUTOCLEAR: u32 = 4;
const FLAG_DIRECT_IO: u32 = 16;

/// Somebody else may take the free device before us.
const ATTEMPTS_MAX: u32 = 32;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232 && size_of::<Config>() == 304);

impl Info {
    fn new(flags: u32, name: &str) -> Self {
        let mut file_name = [0; 64];
        // One byte stays for the terminator.
        file_name.iter_mut().take(63).zip(name.bytes()).for_each(|(to, from)| *to = from);
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags,
            file_name,
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// One loop device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Loop {
    pub number: u32,
    pub dev: DevNumber,
    /// Where a node for a moment may be made.
    scratch: PathBuf,
}

impl Loop {
    fn find(number: u32, scratch: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/sys/block/loop{number}/dev"))?;
        let dev = DevNumber::parse(&text).ok_or_else(|| io::Error::other("the number is malformed"))?;
        Ok(Self { number, dev, scratch: scratch.into() })
    }

    /// Binds a free loop device to a file.
    pub fn bind(
        file: &File,
        name: &str,
        block: u32,
        read_only: bool,
        scratch: &Path,
    ) -> Result<Self, DeviceError> {
        let hint = "give the engine access to /dev/loop-control (module loop)";
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
            .map_err(system("opening /dev/loop-control", hint))?;
        let flags = FLAG_DIRECT_IO | if read_only { FLAG_READ_ONLY } else { 0 };
        let fd = file.as_raw_fd() as u32;
        let mut config = Config { fd, block_size: block, info: Info::new(flags, name), reserved: [0; 8] };
        let mut attempt = 0;
        loop {
            let number = sys::ioctl_number(control.as_fd(), LOOP_CTL_GET_FREE, 0)
                .map_err(system("finding a free loop device", hint))? as u32;
            let found = Self::find(number, scratch)
                .map_err(system(format!("looking for loop{number} in /sys"), "mount /sys"))?;
            let device = found.open(false).map_err(system(
                format!("opening loop device {}", found.dev),
                "allow block devices with major 7 in the container",
            ))?;
            // SAFETY: the layout is that of `struct loop_config` (checked above); only read.
            match unsafe { sys::ioctl_struct(device.as_fd(), LOOP_CONFIGURE, &mut config) } {
                Ok(_) => return Ok(found),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempt < ATTEMPTS_MAX => {
                    attempt += 1;
                }
                Err(error) => {
                    return Err(system(format!("binding loop{number}"), "see the kernel log")(error));
                }
            }
        }
    }

    /// Opens the device itself.
    pub fn open(&self, exclusive: bool) -> io::Result<File> {
        let usual = PathBuf::from(format!("/dev/loop{}", self.number));
        sys::open_block(self.dev, &usual, &self.scratch, exclusive)
    }

    /// Asks the kernel to let go of the file, now or when the last user closes the device.
    pub fn release(&self, device: &File) -> io::Result<()> {
        match sys::ioctl_number(device.as_fd(), LOOP_CLR_FD, 0) {
            Err(error) if error.raw_os_error() != Some(libc::ENXIO) => Err(error),
            _ => Ok(()),
        }
    }

    /// Lets go of a device that nobody can have used yet.
    pub fn release_or_warn(&self) {
        if let Err(error) = self.open(false).and_then(|device| self.release(&device)) {
            tracing::warn!(number = self.number, %error, "A loop device could not be released.");
        }
    }

    /// Takes [`Self::release`] back.
    pub fn keep(&self) -> io::Result<()> {
        let device = self.open(false)?;
        let mut info = Info::new(0, "");
        // SAFETY: the layout is that of `struct loop_info64` (checked above); any bytes are valid.
        unsafe { sys::ioctl_struct(device.as_fd(), LOOP_GET_STATUS64, &mut info) }?;
        info.flags &= !FLAG_AUTOCLEAR;
        // SAFETY: as above; only read.
        unsafe { sys::ioctl_struct(device.as_fd(), LOOP_SET_STATUS64, &mut info) }.map(drop)
    }

    /// Takes over the file's new size; `refresh` makes the kernel ask for it.
    ///
    /// The kernel drops an answer that overlaps with another request for the attributes (udev asks too),
    /// so what counts is the size the device has in the end.
    pub fn update_size(&self, size: u64, refresh: impl Fn() -> io::Result<()>) -> io::Result<()> {
        let device = self.open(false)?;
        for _ in 0..ATTEMPTS_MAX {
            refresh()?;
            sys::ioctl_number(device.as_fd(), LOOP_SET_CAPACITY, 0)?;
            let sectors = fs::read_to_string(format!("/sys/block/loop{}/size", self.number))?;
            if sectors.trim().parse() == Ok(size / 512) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(io::Error::other("the kernel keeps the old size"))
    }

    /// Whether the device still serves the file of that name.
    pub fn serves(&self, name: &str) -> bool {
        backing_name(self.number).is_some_and(|backing| backing == name)
    }
}

/// Last component of the path of the file a loop device serves.
fn backing_name(number: u32) -> Option<String> {
    let path = fs::read_to_string(format!("/sys/block/loop{number}/loop/backing_file")).ok()?;
    let name = path.trim_end().trim_end_matches(" (deleted)").rsplit('/').next()?;
    Some(name.into())
}

/// Loop devices of Palisade for one minor, with their owners.
fn of_minor(minor: u32) -> Vec<(u32, Owner)> {
    fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let number: u32 = entry.file_name().to_str()?.strip_prefix("loop")?.parse().ok()?;
            let owner = owner::owner_of(&backing_name(number)?, minor)?;
            Some((number, owner))
        })
        .collect()
}

/// Lets go of loop devices that a dead engine left for this minor. One that is still mounted goes when
/// its user lets it go; it has failed all I/O since its engine died.
pub(super) fn clean_up(minor: u32, scratch: &Path) {
    for (number, owner) in of_minor(minor).into_iter().filter(|(_, owner)| owner.is_dead()) {
        let released = Loop::find(number, scratch)
            .and_then(|found| found.release(&found.open(false)?).map(|()| found.dev));
        match released {
            Ok(dev) => {
                tracing::info!(number, minor, "A loop device of a dead engine was released.");
                warn_of_users(minor, dev);
            }
            Err(error) => {
                tracing::warn!(number, minor, pid = owner.pid(), %error, "A loop device of a dead engine stays.");
            }
        }
    }
}
