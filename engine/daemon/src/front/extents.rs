//! NBD block status: what is allocated, as the file system of the backing file knows it, and what some peer may
//! lack, as the bitmap says.
//!
//! A file system can take its time: it is asked on a thread, and few at a time. Where nobody knows, everything is
//! data. Both answers are those of a moment; a completed write counts as data from then on.

use super::Origin;
use crate::core_api::{Core, VolumeNr};
use crate::engine::{Engine, Token};
use crate::ring::{Fd, Op};
use crate::sys;
use palisade_export::{Extent, Reply};
use palisade_wire::enums::DiskState;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

/// Runs of one answer and one question; a client asks again for the rest.
const RUNS_MAX: usize = 256;
/// Threads that look at once; what is asked beyond that is answered without them.
const LOOKING_MAX: usize = 4;
/// Holes are told in whole blocks of this many bytes.
const BLOCK: u64 = 4096;

/// Lengths in bytes from the start of a range on, and whether the run is so.
type Runs = Vec<(u64, bool)>;

/// A question on its way.
#[derive(Debug)]
pub(crate) struct Looking {
    origin: Origin,
    id: u64,
    vnr: VolumeNr,
    range: Range<u64>,
    holes: Arc<Mutex<Runs>>,
}

impl Engine {
    /// Answers a block status request, now or later.
    pub(crate) fn block_status(&mut self, origin: Origin, id: u64, vnr: VolumeNr, range: Range<u64>) {
        let looking = Looking { origin, id, vnr, range, holes: Arc::default() };
        // Only a complete disk says what reads will give.
        let complete = self.core.as_ref().is_some_and(|c| c.state().disk(vnr) == DiskState::UpToDate);
        let file = self.backings.get(&vnr).filter(|_| complete).and_then(|b| b.file()?.try_clone().ok());
        let ended = match file {
            Some(file) if self.front.looking.len() < LOOKING_MAX => look(file, &looking).ok(),
            _ => None,
        };
        match ended {
            Some(fd) => {
                let key = self.id();
                self.front.looking.insert(key, looking);
                self.ring.push(Token::Looked(key), Op::Poll { fd });
            }
            None => self.tell_status(&looking, Vec::new()),
        }
    }

    /// A thread ended.
    pub(crate) fn looked(&mut self, key: u64) {
        let Some(looking) = self.front.looking.remove(&key) else { return };
        let holes = looking.holes.lock().map(|mut h| std::mem::take(&mut *h)).unwrap_or_default();
        // The disk may have left meanwhile.
        let complete = self.core.as_ref().is_some_and(|c| c.state().disk(looking.vnr) == DiskState::UpToDate);
        self.tell_status(&looking, if complete { holes } else { Vec::new() });
    }

    fn tell_status(&mut self, looking: &Looking, holes: Runs) {
        let Range { start, end } = looking.range;
        let sectors = start / super::SECTOR..end / super::SECTOR;
        let lacking = self.core.as_ref().map(|c: &Core| c.out_of_sync(looking.vnr, sectors, RUNS_MAX));
        let lacking = lacking.unwrap_or_default().into_iter().map(|(n, l)| (n * super::SECTOR, l)).collect();
        let reply = Reply::Status(merge(end - start, holes, lacking));
        self.front_reply(looking.origin, looking.id, reply);
    }
}

/// Starts a thread; the descriptor becomes readable when it ends, however it does.
fn look(file: File, looking: &Looking) -> io::Result<Fd> {
    let (ended, end) = UnixStream::pair()?;
    let (holes, range) = (Arc::clone(&looking.holes), looking.range.clone());
    std::thread::Builder::new().name("extents".into()).spawn(move || {
        let found = holes_of(range, RUNS_MAX, |pos, data| sys::seek_allocated(file.as_fd(), pos, data));
        if let (Ok(found), Ok(mut holes)) = (found, holes.lock()) {
            *holes = found;
        }
        drop(end);
    })?;
    Ok(Rc::new(OwnedFd::from(ended)))
}

/// The holes of a range; `seek` gives the next byte that is data, or is not. Partly used blocks are data.
fn holes_of(
    range: Range<u64>,
    runs_max: usize,
    seek: impl Fn(u64, bool) -> io::Result<Option<u64>>,
) -> io::Result<Runs> {
    let mut runs = Runs::new();
    let mut at = range.start;
    while at < range.end && runs.len() < runs_max {
        let data = seek(at, true)?.unwrap_or(range.end).min(range.end);
        let data_block = if data == range.end { data } else { (data / BLOCK * BLOCK).max(at) };
        if data_block > at {
            runs.push((data_block - at, true));
        }
        at = data_block;
        if at < range.end {
            let hole = seek(data.max(at), false)?.unwrap_or(range.end).max(at + 1);
            let hole = hole.next_multiple_of(BLOCK).min(range.end);
            runs.push((hole - at, false));
            at = hole;
        }
    }
    Ok(runs)
}

/// One list of both; an answer that ends early cuts it, none at all counts as "no".
fn merge(len: u64, holes: Runs, lacking: Runs) -> Vec<Extent> {
    let whole = |runs: Runs| if runs.is_empty() { vec![(len, false)] } else { runs };
    let (mut holes, mut lacking) = (whole(holes).into_iter(), whole(lacking).into_iter());
    let (mut hole, mut lack) = (holes.next(), lacking.next());
    let mut out = Vec::new();
    while let (Some((h, is_hole)), Some((l, out_of_sync))) = (hole, lack) {
        let len = h.min(l);
        if len > 0 {
            out.push(Extent { len, hole: is_hole, zero: is_hole, out_of_sync });
        }
        hole = if h > len { Some((h - len, is_hole)) } else { holes.next() };
        lack = if l > len { Some((l - len, out_of_sync)) } else { lacking.next() };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_whole_blocks_and_end_with_the_range() {
        // Data in 5000..6000 and from 40960 on.
        let seek = |pos: u64, data: bool| {
            let is_data = |b: u64| (5000..6000).contains(&b) || b >= 40960;
            Ok((pos..50_000).find(|b| is_data(*b) == data))
        };
        let runs = holes_of(0..49_152, 9, seek).unwrap();
        assert_eq!(runs, [(4096, true), (4096, false), (32_768, true), (8192, false)]);
        assert_eq!(holes_of(0..49_152, 2, seek).unwrap(), runs[..2]);
        assert_eq!(holes_of(5120..5632, 9, seek).unwrap(), [(512, false)]);
        assert_eq!(holes_of(4608..8704, 9, seek).unwrap(), [(3584, false), (512, true)]);
        assert_eq!(
            holes_of(8192..12_288, 9, |_, data| Ok(data.then_some(0).filter(|_| false))).unwrap(),
            [(4096, true)]
        );
    }

    #[test]
    fn two_lists_become_one() {
        let states = |e: Vec<Extent>| e.iter().map(|e| (e.len, e.hole, e.out_of_sync)).collect::<Vec<_>>();
        let merged = merge(100, vec![(40, true), (60, false)], vec![(30, false), (20, true)]);
        assert_eq!(states(merged), [(30, true, false), (10, true, true), (10, false, true)]);
        assert_eq!(states(merge(100, Vec::new(), Vec::new())), [(100, false, false)]);
    }
}
