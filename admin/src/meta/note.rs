//! The note of where internal metadata was last seen, so that it is found again on a device that has
//! grown (`spec/metadata.md` §10.2). It is a help, never a proof: what it leads to is checked.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

/// A note is two short lines.
const NOTE_BYTES_MAX: u64 = 4096;

/// What a note says.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    /// Size of the device then.
    pub bytes: u64,
    /// Its device UUID, if it had one.
    pub uuid: Option<u64>,
}

/// The note about one minor.
#[derive(Debug)]
pub struct Note(PathBuf);

impl Note {
    /// `minor` is `None` for a device without one, which all such devices share.
    pub fn of(directory: Option<&str>, minor: Option<u32>) -> Self {
        let directory = directory
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("PALISADE_STATE_DIR").filter(|v| !v.is_empty()).map(PathBuf::from));
        let directory = directory.unwrap_or_else(|| PathBuf::from("/var/lib/drbd"));
        let minor = minor.map_or(-1, i64::from);
        Self(directory.join(format!("drbd-minor-{minor}.lkbd")))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, device: &str, bytes: u64, uuid: Option<u64>) -> std::io::Result<()> {
        if let Some(directory) = self.0.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let mut text = format!("{bytes}\t{device}\n");
        if let Some(uuid) = uuid {
            text.push_str(&format!("uuid:\t{uuid:016X}\n"));
        }
        let fresh = self.0.with_extension("lkbd.new");
        let mut file = File::create(&fresh)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&fresh, &self.0)
    }

    /// `None` if there is no note, or none that can be read.
    pub fn read(&self) -> Option<Seen> {
        let mut text = String::new();
        File::open(&self.0).ok()?.take(NOTE_BYTES_MAX).read_to_string(&mut text).ok()?;
        let (bytes, _) = text.lines().next()?.split_once('\t')?;
        let uuid = text.lines().nth(1).and_then(|l| l.strip_prefix("uuid:"));
        Some(Seen {
            bytes: bytes.parse().ok()?,
            uuid: uuid.and_then(|u| u64::from_str_radix(u.trim(), 16).ok()),
        })
    }

    fn resized(&self, device: &str, bytes: u64) -> std::io::Result<()> {
        self.write(device, bytes, self.read().and_then(|seen| seen.uuid))
    }

    pub fn remove(&self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Notes where the metadata of a minor is that an engine attached. Its UUID is kept: that does not change
/// while it is attached.
pub fn remember_location(minor: u32, device: &str, bytes: u64) -> std::io::Result<()> {
    Note::of(None, Some(minor)).resized(device, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let note = Note::of(dir.path().to_str(), None);
        assert!(note.path().ends_with("drbd-minor--1.lkbd"));
        assert_eq!(note.read(), None);
        note.write("/dev/x", 4096, Some(0x1_0000_00AB)).unwrap();
        assert_eq!(std::fs::read_to_string(note.path()).unwrap(), "4096\t/dev/x\nuuid:\t00000001000000AB\n");
        assert_eq!(note.read(), Some(Seen { bytes: 4096, uuid: Some(0x1_0000_00AB) }));
        note.resized("/dev/x", 8192).unwrap();
        assert_eq!(note.read(), Some(Seen { bytes: 8192, uuid: Some(0x1_0000_00AB) }));
        note.write("/dev/x", 7, None).unwrap();
        assert_eq!(note.read(), Some(Seen { bytes: 7, uuid: None }));
        std::fs::write(note.path(), "much\t/dev/x\n").unwrap();
        assert_eq!(note.read(), None);
        note.remove();
        assert!(!note.path().exists());
    }
}
