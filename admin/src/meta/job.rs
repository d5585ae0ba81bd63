//! One command with the device it works on: finding the superblock, storing it, remembering its place.

use palisade_metadata::image::{self, BlockIo, Extent, ImageError};
use palisade_metadata::{Kind, Layout, Superblock, Version};

use super::device::{Device, Question};
use super::note::Note;
use super::{EXIT_ARGUMENT, EXIT_FAILED};
use crate::cli::{self, Failure, print};

/// A command with its device.
pub struct Job {
    pub note: Note,
    pub device: Device,
    pub kind: Kind,
    pub version: Version,
    pub scanned: cli::Scanned,
    pub command_line: String,
    pub question: Question,
}

/// A superblock that is valid where it is.
pub struct Valid {
    pub superblock: Superblock,
    pub layout: Layout,
    /// The last agreed size as stored, if it was too big.
    pub clamped_from: Option<u64>,
}

impl Job {
    /// Arguments behind the command word.
    pub fn argument(&self, index: usize) -> Option<&str> {
        const COMMAND_WORDS: usize = 5;
        self.scanned.words.get(COMMAND_WORDS + index).map(String::as_str)
    }

    pub fn node_id(&self) -> usize {
        let given = self.scanned.flag("node-id").and_then(|n| n.parse().ok());
        // v08 has one peer.
        given.filter(|_| self.version == Version::V09).unwrap_or(0)
    }

    /// How often `--verbose` was given.
    pub fn verbose(&self) -> usize {
        self.scanned.count("verbose")
    }

    /// The superblock of the wanted version, if there is one; an invalid one is explained on stderr.
    pub fn probe(&self) -> Result<Option<Valid>, Failure> {
        let why = match image::read_superblock(&self.device.file, self.kind, None) {
            Ok((superblock, layout, clamped_from)) if superblock.version == self.version => {
                return Ok(Some(Valid { superblock, layout, clamped_from }));
            }
            Ok((other, ..)) => format!("The metadata is of format {}.", other.version.name()),
            Err(e @ ImageError::NoMetadata(_)) => e.to_string(),
            Err(e @ (ImageError::Invalid(_) | ImageError::Layout(_))) => {
                eprintln!("{}: {e}", self.device.path);
                return Ok(None);
            }
            Err(e) => return Err(self.io_failure(&e)),
        };
        if self.verbose() > 0 {
            eprintln!("{}: {why}", self.device.path);
        }
        Ok(None)
    }

    /// The superblock of the wanted version; `text` for stderr if there is none.
    pub fn superblock(&self, text: &str) -> Result<(Superblock, Layout), Failure> {
        let valid = self.probe()?.ok_or_else(|| Failure::new(EXIT_FAILED, text))?;
        report_clamp(valid.clamped_from, &valid.superblock);
        Ok((valid.superblock, valid.layout))
    }

    /// Writes the superblock durably and remembers where it is.
    pub fn store(&self, layout: &Layout, superblock: &Superblock) -> Result<(), Failure> {
        image::write_superblock(&self.device.file, layout, superblock)
            .and_then(|()| {
                self.device.file.flush().map_err(|source| ImageError::Io {
                    what: "superblock",
                    action: "flushed",
                    pos: layout.md_offset,
                    source,
                })
            })
            .map_err(|e| self.io_failure(&e))?;
        self.remember(superblock.device_uuid);
        Ok(())
    }

    /// Keeps the place of internal metadata for the day the device has grown. Not being able to is no
    /// reason to fail.
    pub fn remember(&self, device_uuid: u64) {
        if self.device.file.dry_run {
            return;
        }
        if self.kind != Kind::Internal {
            return self.note.remove();
        }
        let uuid = Some(device_uuid).filter(|u| *u != 0);
        if let Err(e) = self.note.write(&self.device.path, self.device.bytes, uuid) {
            let note = self.note.path().display();
            eprintln!("cannot remember the place of the metadata in {note}: {e}");
        }
    }

    /// The size the device had when its metadata was last written, if that is another one and leads to
    /// metadata of this device.
    pub fn last_known_bytes(&self) -> Option<u64> {
        if self.kind != Kind::Internal {
            return None;
        }
        let seen = self.note.read().filter(|seen| seen.bytes < self.device.bytes)?;
        let found = image::read_moved(&self.device.file, seen.bytes, Extent::Exact).ok()?.superblock;
        let same = seen.uuid.is_none_or(|u| u == found.device_uuid) || self.question.force;
        (same && found.version == self.version).then_some(seen.bytes)
    }

    pub fn io_failure(&self, e: &ImageError) -> Failure {
        Failure::new(EXIT_ARGUMENT, format!("{}: {e}", self.device.path))
    }
}

/// Says that a last agreed size was too big.
pub fn report_clamp(clamped_from: Option<u64>, superblock: &Superblock) {
    if let Some(before) = clamped_from {
        let now = superblock.effective_size_sectors;
        print(&format!("# la-size-sect was too big ({before}), truncated ({now})!\n"));
    }
}
