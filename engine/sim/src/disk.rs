//! Virtual devices: a data device with a volatile cache and a metadata device.
//!
//! A data sector holds a *stamp*, the number of the write that put it there (0: zeroes). A completed write sits
//! in the cache until a flush that was issued after its completion, or forced unit access, makes it stable. At
//! power loss every cached sector falls back to any of the contents it had since the last stable one, and every
//! sector of a write in flight may or may not have arrived. The metadata device is stable on completion and
//! tears at 512 bytes.

use crate::rng::Rng;
use bytes::Bytes;
use palisade_metadata::image::BlockIo;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// The bytes of a sector with this stamp: the stamp in front, its complement at the end.
fn fill(stamp: u64, out: &mut Vec<u8>) {
    let at = out.len();
    out.resize(at + SECTOR, 0);
    if stamp != 0 {
        out[at..at + 8].copy_from_slice(&stamp.to_le_bytes());
        out[at + SECTOR - 8..].copy_from_slice(&(!stamp).to_le_bytes());
    }
}

/// The bytes of sectors with these stamps.
#[must_use]
pub fn to_bytes(stamps: &[u64]) -> Bytes {
    let mut out = Vec::with_capacity(stamps.len() * SECTOR);
    for s in stamps {
        fill(*s, &mut out);
    }
    Bytes::from(out)
}

/// The stamps of a payload; `None` when a sector is no stamped sector.
#[must_use]
pub fn to_stamps(data: &[u8]) -> Option<Vec<u64>> {
    let mut out = Vec::with_capacity(data.len() / SECTOR);
    if !data.len().is_multiple_of(SECTOR) {
        return None;
    }
    for sector in data.chunks(SECTOR) {
        let head = u64::from_le_bytes(*sector.first_chunk::<8>()?);
        let tail = u64::from_le_bytes(*sector.last_chunk::<8>()?);
        if head == 0 {
            if tail != 0 {
                return None;
            }
        } else if tail != !head {
            return None;
        }
        out.push(head);
    }
    Some(out)
}

/// The data device.
#[derive(Clone, Debug)]
pub struct DataDisk {
    /// What a read returns.
    pub current: Vec<u64>,
    stable: Vec<u64>,
    /// By sector: contents since the stable one, with the sequence number of their completion.
    cached: BTreeMap<u64, Vec<(u64, u64)>>,
    sequence: u64,
}

impl DataDisk {
    /// All zeroes.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        let empty = vec![0; sectors as usize];
        Self { current: empty.clone(), stable: empty, cached: BTreeMap::new(), sequence: 0 }
    }

    /// Sectors.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.current.len() as u64
    }

    /// Number of the last completed write: what a flush issued now makes stable.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// A write completed.
    pub fn write(&mut self, sector: u64, stamps: &[u64], fua: bool) {
        self.sequence += 1;
        for (s, stamp) in (sector..).zip(stamps) {
            self.put(s, *stamp, fua);
        }
    }

    fn put(&mut self, s: u64, stamp: u64, fua: bool) {
        let Some(place) = self.current.get_mut(s as usize) else { return };
        *place = stamp;
        if fua {
            self.stable[s as usize] = stamp;
            self.cached.remove(&s);
        } else {
            self.cached.entry(s).or_default().push((self.sequence, stamp));
        }
    }

    /// A flush completed that was issued when [`DataDisk::sequence`] was `upto`.
    pub fn flushed(&mut self, upto: u64) {
        let stable = &mut self.stable;
        self.cached.retain(|s, versions| {
            let done = versions.partition_point(|(q, _)| *q <= upto);
            if let Some((_, stamp)) = done.checked_sub(1).and_then(|i| versions.get(i)) {
                stable[*s as usize] = *stamp;
            }
            versions.drain(..done);
            !versions.is_empty()
        });
    }

    /// A part of a write in flight arrived before the process or the machine died.
    pub fn arrived_partly(&mut self, rng: &mut Rng, sector: u64, stamps: &[u64]) {
        self.sequence += 1;
        let mode = rng.below(3);
        for (s, stamp) in (sector..).zip(stamps) {
            if mode == 0 || (mode == 1 && rng.chance(50)) {
                self.put(s, *stamp, false);
            }
        }
    }

    /// The machine lost power: the cache is lost, in any subset.
    pub fn power_loss(&mut self, rng: &mut Rng) {
        let mode = rng.below(3);
        for (s, versions) in std::mem::take(&mut self.cached) {
            let keep = match mode {
                0 => 0,
                1 => versions.len(),
                _ => rng.below(versions.len() as u64 + 1) as usize,
            };
            if let Some((_, stamp)) = keep.checked_sub(1).and_then(|i| versions.get(i)) {
                self.stable[s as usize] = *stamp;
            }
        }
        self.current.clone_from(&self.stable);
    }

    /// Stamps of a range.
    #[must_use]
    pub fn read(&self, sector: u64, len: u32) -> Vec<u64> {
        let first = sector as usize;
        let end = first + len as usize / SECTOR;
        self.current.get(first..end.min(self.current.len())).unwrap_or_default().to_vec()
    }
}

/// The metadata device.
#[derive(Debug)]
pub struct MetaDisk(RefCell<Vec<u8>>);

impl MetaDisk {
    /// All zeroes.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self(RefCell::new(vec![0; bytes]))
    }

    /// A write completed.
    pub fn write(&self, pos: u64, data: &[u8]) -> bool {
        self.write_at(pos, data).is_ok()
    }

    /// Power loss while the write was in flight.
    pub fn torn(&self, rng: &mut Rng, pos: u64, data: &[u8]) {
        let mode = rng.below(3);
        for (i, sector) in data.chunks(SECTOR).enumerate() {
            if mode == 0 || (mode == 1 && rng.chance(50)) {
                self.write(pos + (i * SECTOR) as u64, sector);
            }
        }
    }

    /// The bytes of a range.
    #[must_use]
    pub fn read(&self, pos: u64, len: usize) -> Vec<u8> {
        let all = self.0.borrow();
        all.get(pos as usize..pos as usize + len).map(<[u8]>::to_vec).unwrap_or_default()
    }
}

fn outside() -> io::Error {
    io::Error::other("The position is outside of the virtual device; this is a fault of the caller.")
}

impl BlockIo for MetaDisk {
    fn read_at(&self, pos: u64, buf: &mut [u8]) -> io::Result<()> {
        let all = self.0.borrow();
        let from = all.get(pos as usize..).and_then(|a| a.get(..buf.len())).ok_or_else(outside)?;
        buf.copy_from_slice(from);
        Ok(())
    }

    fn write_at(&self, pos: u64, buf: &[u8]) -> io::Result<()> {
        let mut all = self.0.borrow_mut();
        let to = all.get_mut(pos as usize..).and_then(|a| a.get_mut(..buf.len())).ok_or_else(outside)?;
        to.copy_from_slice(buf);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.borrow().len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_completed_before_the_flush_was_issued_is_stable() {
        let mut d = DataDisk::new(8);
        d.write(0, &[1, 1], false);
        let upto = d.sequence();
        d.write(1, &[2], false);
        d.flushed(upto);
        let mut seen = [false; 3];
        for seed in 0..50 {
            let mut x = d.clone();
            x.power_loss(&mut Rng::new(seed));
            assert_eq!(x.current[0], 1);
            seen[x.current[1] as usize] = true;
        }
        assert_eq!(seen, [false, true, true]);
    }

    #[test]
    fn forced_unit_access_is_not_undone_by_an_older_cached_write() {
        let mut d = DataDisk::new(1);
        d.write(0, &[1], false);
        d.write(0, &[2], true);
        for seed in 0..20 {
            let mut x = d.clone();
            x.power_loss(&mut Rng::new(seed));
            assert_eq!(x.current, [2]);
        }
    }

    #[test]
    fn a_payload_that_is_not_stamped_is_seen() {
        assert_eq!(to_stamps(&to_bytes(&[0, 7])), Some(vec![0, 7]));
        let mut bad = to_bytes(&[7]).to_vec();
        bad[511] ^= 1;
        assert_eq!(to_stamps(&bad), None);
    }
}
