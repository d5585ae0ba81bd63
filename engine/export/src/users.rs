//! Who uses a block device: mounts, swap, stacked devices and open descriptors, as `/proc` and
//! `/sys` show them. The device itself is never opened: closing it again could wait for the engine.

use crate::User;
use crate::sys::{self, DevNumber};
use std::collections::{BTreeSet, HashSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Most users that are listed; more would not help anybody.
const USERS_MAX: usize = 64;

/// The users of a device, in a stable order.
pub(crate) fn users_of(dev: DevNumber) -> io::Result<Vec<User>> {
    let mut users = BTreeSet::new();
    let mut namespaces = HashSet::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(entry) = entry else { continue };
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if users.len() >= USERS_MAX {
            break;
        }
        // Processes come and go while we look: what cannot be read is gone.
        let dir = entry.path();
        if let Ok(namespace) = fs::read_link(dir.join("ns/mnt"))
            && namespaces.insert(namespace)
        {
            users.extend(mounts(&dir, pid, dev));
        }
        if has_open(&dir, dev) {
            users.insert(User::Open { pid, process: process_name(&dir) });
        }
    }
    users.extend(holders(dev));
    if is_swap(dev) {
        users.insert(User::Swap);
    }
    Ok(users.into_iter().collect())
}

/// Mounts of a device in the mount namespace of one process, directly or, for file systems with
/// device numbers of their own (btrfs), by the source they name.
fn mounts(dir: &Path, pid: u32, dev: DevNumber) -> Vec<User> {
    let Ok(table) = fs::read(dir.join("mountinfo")) else { return Vec::new() };
    let text = String::from_utf8_lossy(&table);
    let number = dev.to_string();
    text.lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let dash = fields.iter().position(|field| *field == "-")?;
            let source = fields.get(dash + 2)?;
            let direct = fields.get(2) == Some(&number.as_str());
            if !direct && (!source.starts_with("/dev/") || device_at(&unescape(source)) != Some(dev)) {
                return None;
            }
            let path = unescape(fields.get(4)?);
            Some(User::Mount { path, pid, process: process_name(dir) })
        })
        .collect()
}

/// Undoes the octal escapes of mountinfo and swaps.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let escape = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(escape.unwrap_or(first));
        rest = if escape.is_some() { tail.get(3..).unwrap_or_default() } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

fn device_at(path: &Path) -> Option<DevNumber> {
    sys::block_device_of(&sys::c_path(path).ok()?)
}

fn has_open(dir: &Path, dev: DevNumber) -> bool {
    let Ok(fds) = fs::read_dir(dir.join("fd")) else { return false };
    fds.flatten().any(|fd| device_at(&fd.path()) == Some(dev))
}

fn process_name(dir: &Path) -> String {
    fs::read_to_string(dir.join("comm")).map_or_else(|_| "?".into(), |name| name.trim_end().into())
}

/// Devices stacked on this one: device mapper, md and the like, and loop devices over its node.
fn holders(dev: DevNumber) -> Vec<User> {
    let mut devices: Vec<String> = fs::read_dir(format!("/sys/dev/block/{dev}/holders"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        if file.starts_with("/dev/") && device_at(Path::new(file.trim_end())) == Some(dev) {
            devices.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    devices.into_iter().map(|device| User::Holder { device }).collect()
}

fn is_swap(dev: DevNumber) -> bool {
    let Ok(table) = fs::read_to_string("/proc/swaps") else { return false };
    table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .any(|path| device_at(&unescape(path)) == Some(dev))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_of_mountinfo() {
        assert_eq!(unescape(r"/mnt/a\040b\134c"), PathBuf::from(r"/mnt/a b\c"));
        assert_eq!(unescape(r"/mnt/\9x\04"), PathBuf::from(r"/mnt/\9x\04"));
    }
}
