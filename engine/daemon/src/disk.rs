//! A volume's backing device: opening it exclusively, reading its metadata, and I/O through the ring.
//!
//! Block devices are opened with `O_DIRECT | O_EXCL`, files with a lock, and with `O_DIRECT` where the file
//! system has it. Durability never depends on that: a flush is `fdatasync`, a FUA write carries `RWF_DSYNC`,
//! which are right for buffered files as well.

use crate::core_api::{Backing as CoreBacking, IoError, IoId};
use crate::ring::{Fd, Op};
use crate::sys;
use bytes::Bytes;
use palisade_control::{MetaIndex, Refusal, code};
use palisade_export::{AlignedBuf, BufferPool};
use palisade_metadata::image::{BlockIo, Extent, ImageError, read_metadata};
use palisade_metadata::{DriverCheck, DriverError, INDEXED_SECTORS, Kind, SECTOR_SIZE, md_offset};
use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Memory alignment that direct I/O needs at most; payloads aligned worse are copied.
const MEMORY_ALIGN: usize = 512;
/// Bytes of one write of zeroes where nothing faster exists.
const ZERO_PIECE: usize = 1 << 20;

/// An open device or file.
#[derive(Debug)]
struct Device {
    fd: Fd,
    file: Rc<File>,
    bytes: u64,
    is_block: bool,
    direct: bool,
    logical: u32,
    physical: u32,
    number: (u64, u64),
}

/// A volume's backing device and where its metadata is.
#[derive(Debug)]
pub struct Backing {
    data: Device,
    /// None: on the data device.
    meta: Option<Device>,
    /// A write went to the metadata's device since its last flush.
    dirty: Cell<bool>,
    /// Flushes in front of metadata writes that have not completed.
    flushing: Cell<u32>,
    /// `md-flushes`.
    pub md_flushes: Cell<bool>,
    pool: BufferPool,
}

/// Reads and writes of metadata before the ring serves the device: aligned copies.
struct Direct<'a> {
    device: &'a Device,
    pool: &'a BufferPool,
}

impl BlockIo for Direct<'_> {
    fn read_at(&self, pos: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut copy = self.pool.alloc(buf.len());
        self.device.file.read_exact_at(&mut copy, pos)?;
        buf.copy_from_slice(&copy);
        Ok(())
    }

    fn write_at(&self, pos: u64, buf: &[u8]) -> io::Result<()> {
        self.device.file.write_all_at(&self.pool.copy_from(buf), pos)
    }

    fn flush(&self) -> io::Result<()> {
        self.device.file.sync_data()
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.device.bytes)
    }
}

/// How a device is claimed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// All of it.
    Whole,
    /// A slot of an indexed metadata device.
    Range { start: u64, len: u64 },
}

/// The refusals of the data device or those of the metadata device.
struct Codes {
    what: &'static str,
    open: i32,
    wrong_kind: i32,
    claimed: i32,
}

const DATA: Codes = Codes {
    what: "backing device",
    open: code::OPEN_DISK,
    wrong_kind: code::DISK_NOT_BDEV,
    claimed: code::DISK_CLAIMED,
};
const META: Codes = Codes {
    what: "metadata device",
    open: code::OPEN_MD_DISK,
    wrong_kind: code::MD_NOT_BDEV,
    claimed: code::MD_DISK_CLAIMED,
};

fn refuse(code: i32, why: String) -> Refusal {
    Refusal::new(code).with_info(why)
}

impl Device {
    fn open(path: &Path, claim: Claim, codes: &Codes, pool: &BufferPool) -> Result<Self, Refusal> {
        let what = codes.what;
        let shown = path.display();
        let failed = |e: &io::Error| refuse(codes.open, format!("The {what} {shown} cannot be opened: {e}."));
        let facts = std::fs::metadata(path).map_err(|e| failed(&e))?;
        let kind = facts.file_type();
        let is_block = kind.is_block_device();
        if !is_block && !kind.is_file() {
            let why = format!("{shown} is neither a block device nor a regular file.");
            return Err(refuse(codes.wrong_kind, why));
        }
        let exclusive = if is_block && claim == Claim::Whole { libc::O_EXCL } else { 0 };
        let open = |direct: i32| {
            let flags = libc::O_CLOEXEC | exclusive | direct;
            OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
        };
        let claimed = || {
            let why = format!(
                "The {what} {shown} is in use: mounted, part of another device, or held by another engine; end \
                 that first."
            );
            refuse(codes.claimed, why)
        };
        let opened = match open(libc::O_DIRECT) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => open(0).map(|f| (f, false)),
            other => other.map(|f| (f, true)),
        };
        let (mut file, mut direct) =
            opened.map_err(|e| if e.raw_os_error() == Some(libc::EBUSY) { claimed() } else { failed(&e) })?;
        let locked = match claim {
            Claim::Whole => sys::lock_file(file.as_fd()),
            Claim::Range { start, len } => sys::lock_range(file.as_fd(), start, len),
        };
        if !locked.map_err(|e| failed(&e))? {
            return Err(claimed());
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(|e| failed(&e))?;
        let (mut logical, mut physical) = (512, 4096);
        if is_block {
            (logical, physical) = sys::block_sizes(file.as_fd()).map_err(|e| failed(&e))?;
        } else if direct {
            match sys::direct_alignment(file.as_fd()) {
                Some((_, offset)) => logical = offset.max(512),
                None if bytes >= 4096 => {
                    // Without a statement of the file system: try.
                    let mut probe = pool.alloc(512);
                    if file.read_exact_at(&mut probe, 512).is_err() {
                        logical = 4096;
                    }
                }
                None => {}
            }
        }
        if logical > 4096 {
            // No metadata block could be written on its own: let the page cache do it.
            file = open(0).map_err(|e| failed(&e))?;
            if !sys::lock_file(file.as_fd()).map_err(|e| failed(&e))? {
                return Err(claimed());
            }
            (direct, logical) = (false, 512);
        }
        let number = if is_block { (facts.rdev(), 0) } else { (facts.dev(), facts.ino()) };
        let fd = file.try_clone().map(|f| Rc::new(OwnedFd::from(f))).map_err(|e| failed(&e))?;
        Ok(Self { fd, file: Rc::new(file), bytes, is_block, direct, logical, physical, number })
    }

    /// Whether ranges can be unmapped so that they read as zeroes.
    fn can_unmap(&self) -> bool {
        if !self.is_block {
            return true;
        }
        let (major, minor) = (libc::major(self.number.0), libc::minor(self.number.0));
        let base = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
        let limit = |name: &str| {
            // A partition's limits are those of its disk.
            [base.join("queue").join(name), base.join("../queue").join(name)]
                .iter()
                .find_map(|p| std::fs::read_to_string(p).ok()?.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        limit("discard_max_bytes") > 0 && limit("write_zeroes_max_bytes") > 0
    }
}

impl From<MetaIndexKind> for Kind {
    fn from(k: MetaIndexKind) -> Self {
        match k.0 {
            MetaIndex::Internal => Self::Internal,
            MetaIndex::FlexExternal => Self::FlexExternal,
            MetaIndex::Index(n) => Self::Indexed(n.into()),
        }
    }
}

struct MetaIndexKind(MetaIndex);

/// Opens the devices of a volume and reads its metadata.
///
/// # Errors
/// The refusal for the administrator, naming the device.
pub fn open(
    disk: &str,
    meta_disk: &str,
    index: MetaIndex,
    node_id: u8,
    pool: &BufferPool,
) -> Result<(Rc<Backing>, Box<CoreBacking>), Refusal> {
    let kind = Kind::from(MetaIndexKind(index));
    let data = Device::open(Path::new(disk), Claim::Whole, &DATA, pool)?;
    let meta = if kind.is_internal() {
        None
    } else {
        let claim = match kind {
            Kind::Indexed(n) => {
                let len = u64::from(INDEXED_SECTORS) * SECTOR_SIZE;
                Claim::Range { start: len * u64::from(n), len }
            }
            Kind::Internal | Kind::FlexExternal => Claim::Whole,
        };
        let path = Path::new(meta_disk);
        let same = std::fs::metadata(path)
            .is_ok_and(|f| data.number == if data.is_block { (f.rdev(), 0) } else { (f.dev(), f.ino()) });
        if same {
            let why = format!("{meta_disk} is the backing device itself; use 'internal' for that.");
            return Err(refuse(code::MD_IDX_INVALID, why));
        }
        Some(Device::open(path, claim, &META, pool)?)
    };
    let device = meta.as_ref().unwrap_or(&data);
    if md_offset(kind, device.bytes).is_none() {
        let why = format!("{meta_disk} has only {} bytes.", device.bytes);
        return Err(refuse(code::MD_DISK_TOO_SMALL, why));
    }
    let data_sectors = (!kind.is_internal()).then_some(data.bytes / SECTOR_SIZE);
    let read = read_metadata(&Direct { device, pool }, kind, data_sectors, Extent::Exact)
        .map_err(|e| metadata_refusal(&e, meta_disk))?;
    let superblock = read.superblock;
    let check = DriverCheck { kind, device_bytes: device.bytes, node_id: Some(node_id) };
    superblock.check_driver(&check).map_err(|e| driver_refusal(&e))?;
    let unmap = data.can_unmap();
    let core = CoreBacking {
        superblock,
        bitmap: read.bitmap,
        layout: read.layout,
        logical_block_size: data.logical,
        physical_block_size: data.physical.max(data.logical),
        discard: unmap,
        discard_zeroes: unmap,
    };
    if !data.direct {
        tracing::warn!("{disk} has no direct I/O here; the page cache is used, and flushed when it must be");
    }
    let pool = pool.clone();
    let backing = Backing {
        data,
        meta,
        dirty: Cell::new(true),
        flushing: Cell::new(0),
        md_flushes: Cell::new(true),
        pool,
    };
    Ok((Rc::new(backing), Box::new(core)))
}

fn metadata_refusal(error: &ImageError, device: &str) -> Refusal {
    let code = match error {
        ImageError::Io { .. } => code::IO_MD_DISK,
        ImageError::NoRoom(_) => code::MD_DISK_TOO_SMALL,
        _ => code::MD_INVALID,
    };
    refuse(code, format!("{device}: {error}"))
}

fn driver_refusal(error: &DriverError) -> Refusal {
    let code = i32::try_from(error.code()).unwrap_or(code::MD_INVALID);
    refuse(code, error.to_string())
}

/// One operation of the core on its way.
#[derive(Debug)]
pub struct Job {
    id: IoId,
    backing: Rc<Backing>,
    kind: JobKind,
}

#[derive(Debug)]
enum JobKind {
    Read,
    Write {
        fua: bool,
    },
    Flush,
    /// The flush in front of a metadata write.
    MetaFlush {
        pos: u64,
        data: Bytes,
    },
    MetaWrite,
    Zero(Zero),
}

/// A range being zeroed, by the best way that works.
#[derive(Debug)]
struct Zero {
    pos: u64,
    len: u64,
    /// What comes after the present way.
    next: Vec<Way>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Unmap,
    Convert,
    Write,
}

/// What a completion leads to.
#[derive(Debug)]
pub enum Outcome {
    /// Submit this.
    More(Job, Op),
    /// Tell the core.
    Done(IoId, Result<Bytes, IoError>),
}

impl Backing {
    fn meta(&self) -> &Device {
        self.meta.as_ref().unwrap_or(&self.data)
    }

    /// What the core is told for a volume without device.
    pub fn missing(id: IoId) -> Outcome {
        Outcome::Done(id, Err(IoError::Failed))
    }

    /// A read of `len` bytes.
    pub fn read(self: &Rc<Self>, id: IoId, sector: u64, len: u32) -> (Job, Op) {
        let buf = self.pool.alloc(len as usize);
        let op = Op::Read { fd: Rc::clone(&self.data.fd), pos: sector * SECTOR_SIZE, buf, start: 0 };
        (self.job(id, JobKind::Read), op)
    }

    /// A write.
    pub fn write(self: &Rc<Self>, id: IoId, sector: u64, data: Bytes, fua: bool) -> (Job, Op) {
        self.touched();
        let op = self.write_op(&self.data, sector * SECTOR_SIZE, data, fua);
        (self.job(id, JobKind::Write { fua }), op)
    }

    /// The data device, if it is a file, of which the file system knows what is allocated.
    pub fn file(&self) -> Option<&File> {
        (!self.data.is_block).then_some(&*self.data.file)
    }

    /// A flush of the data device.
    pub fn flush(self: &Rc<Self>, id: IoId) -> (Job, Op) {
        (self.job(id, JobKind::Flush), Op::Sync { fd: Rc::clone(&self.data.fd) })
    }

    /// A durable write of metadata, behind a flush of the *data* device if something was written there: an extent that
    /// leaves the activity log must not have writes in a volatile cache.
    pub fn write_meta(self: &Rc<Self>, id: IoId, pos: u64, data: Bytes) -> (Job, Op) {
        // A flush on its way counts for this write only when it has completed.
        if self.md_flushes.get() && (self.dirty.replace(false) || self.flushing.get() > 0) {
            self.flushing.set(self.flushing.get() + 1);
            let op = Op::Sync { fd: Rc::clone(&self.data.fd) };
            return (self.job(id, JobKind::MetaFlush { pos, data }), op);
        }
        let op = self.write_op(self.meta(), pos, data, true);
        (self.job(id, JobKind::MetaWrite), op)
    }

    /// Zeroes a range, or gives it back.
    pub fn zero(
        self: &Rc<Self>,
        id: IoId,
        sector: u64,
        len: u32,
        unmap: bool,
        discard: bool,
    ) -> Option<(Job, Op)> {
        self.touched();
        // Zeroes are a fine result of a discard, writing them is not worth it.
        let ways: &[Way] = match (discard, unmap) {
            (true, _) => &[Way::Unmap],
            (false, true) => &[Way::Write, Way::Convert, Way::Unmap],
            (false, false) => &[Way::Write, Way::Convert],
        };
        let zero = Zero { pos: sector * SECTOR_SIZE, len: len.into(), next: ways.to_vec() };
        self.zero_next(id, zero)
    }

    fn zero_next(self: &Rc<Self>, id: IoId, mut zero: Zero) -> Option<(Job, Op)> {
        let way = zero.next.last().copied()?;
        let (pos, len) = (zero.pos, zero.len);
        let mode = match way {
            Way::Unmap => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Way::Convert => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            Way::Write => {
                let piece = usize::try_from(len).unwrap_or(ZERO_PIECE).min(ZERO_PIECE);
                let mut buf = self.pool.alloc(piece);
                buf.fill(0);
                let op = self.write_op(&self.data, pos, buf.freeze(), false);
                return Some((self.job(id, JobKind::Zero(zero)), op));
            }
        };
        zero.next.pop();
        let op = Op::Allocate { fd: Rc::clone(&self.data.fd), pos, len, mode };
        Some((self.job(id, JobKind::Zero(zero)), op))
    }

    fn job(self: &Rc<Self>, id: IoId, kind: JobKind) -> Job {
        Job { id, backing: Rc::clone(self), kind }
    }

    fn flushed(&self) {
        self.flushing.set(self.flushing.get().saturating_sub(1));
    }

    fn touched(&self) {
        self.dirty.set(true);
    }

    fn write_op(&self, device: &Device, pos: u64, data: Bytes, dsync: bool) -> Op {
        let aligned = !device.direct || (data.as_ptr() as usize).is_multiple_of(MEMORY_ALIGN);
        let data = if aligned { data } else { self.pool.copy_from(&data).freeze() };
        Op::Write { fd: Rc::clone(&device.fd), pos, data, dsync }
    }
}

impl Job {
    /// An operation of this job completed.
    pub fn completed(self, op: Op, result: io::Result<u32>) -> Outcome {
        let Self { id, backing, kind } = self;
        let count = match result {
            Ok(count) => count as usize,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {
                return Outcome::More(Self { id, backing, kind }, op);
            }
            Err(e) => return failed(id, &backing, kind, &op, &e),
        };
        match (kind, op) {
            (JobKind::Read, Op::Read { fd, pos, buf, start }) => {
                read_more(id, backing, Op::Read { fd, pos, buf, start }, count)
            }
            (JobKind::Write { fua }, Op::Write { fd, pos, data, dsync }) => match rest(&data, count) {
                Rest::None => {
                    backing.touched();
                    Outcome::Done(id, Ok(Bytes::new()))
                }
                Rest::Stuck => Outcome::Done(id, Err(IoError::Failed)),
                Rest::Some(left) => {
                    let op = Op::Write { fd, pos: pos + count as u64, data: left, dsync };
                    Outcome::More(Self { id, backing, kind: JobKind::Write { fua } }, op)
                }
            },
            (JobKind::MetaWrite, Op::Write { fd, pos, data, dsync }) => match rest(&data, count) {
                Rest::None => Outcome::Done(id, Ok(Bytes::new())),
                Rest::Stuck => Outcome::Done(id, Err(IoError::Failed)),
                Rest::Some(left) => {
                    let op = Op::Write { fd, pos: pos + count as u64, data: left, dsync };
                    Outcome::More(Self { id, backing, kind: JobKind::MetaWrite }, op)
                }
            },
            (JobKind::MetaFlush { pos, data }, _) => {
                backing.flushed();
                let op = backing.write_op(backing.meta(), pos, data, true);
                Outcome::More(Self { id, backing, kind: JobKind::MetaWrite }, op)
            }
            (JobKind::Zero(mut zero), Op::Write { .. }) => {
                backing.touched();
                zero.pos += count as u64;
                zero.len = zero.len.saturating_sub(count as u64);
                if zero.len == 0 || count == 0 {
                    let result = if zero.len == 0 { Ok(Bytes::new()) } else { Err(IoError::Failed) };
                    return Outcome::Done(id, result);
                }
                more(backing.zero_next(id, zero), id)
            }
            (JobKind::Zero(_), _) => {
                backing.touched();
                Outcome::Done(id, Ok(Bytes::new()))
            }
            (JobKind::Flush, _) => Outcome::Done(id, Ok(Bytes::new())),
            _ => Outcome::Done(id, Err(IoError::Failed)),
        }
    }
}

fn more(next: Option<(Job, Op)>, id: IoId) -> Outcome {
    match next {
        Some((job, op)) => Outcome::More(job, op),
        None => Outcome::Done(id, Err(IoError::Unsupported)),
    }
}

fn failed(id: IoId, backing: &Rc<Backing>, kind: JobKind, op: &Op, error: &io::Error) -> Outcome {
    if matches!(kind, JobKind::MetaFlush { .. }) {
        backing.flushed();
    }
    // What was written may still be volatile.
    backing.touched();
    let unsupported = matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV));
    if unsupported && let (JobKind::Zero(zero), Op::Allocate { .. }) = (kind, op) {
        return more(backing.zero_next(id, zero), id);
    }
    let what = match op {
        Op::Read { pos, .. } => format!("read at byte {pos}"),
        Op::Write { pos, data, .. } => format!("write of {} bytes at byte {pos}", data.len()),
        Op::Sync { .. } => "flush".to_owned(),
        Op::Allocate { pos, len, .. } => format!("zeroing of {len} bytes at byte {pos}"),
        _ => "operation".to_owned(),
    };
    tracing::error!("a {what} of the backing device failed: {error}");
    Outcome::Done(id, Err(IoError::Failed))
}

enum Rest {
    None,
    Some(Bytes),
    Stuck,
}

/// What of `data` remains after `count` bytes. Direct I/O continues on block borders only.
fn rest(data: &Bytes, count: usize) -> Rest {
    match count {
        n if n >= data.len() => Rest::None,
        n if n == 0 || !n.is_multiple_of(512) => Rest::Stuck,
        n => Rest::Some(data.slice(n..)),
    }
}

fn read_more(id: IoId, backing: Rc<Backing>, op: Op, count: usize) -> Outcome {
    let Op::Read { fd, pos, buf, start } = op else { return Outcome::Done(id, Err(IoError::Failed)) };
    let buf: AlignedBuf = buf;
    let reached = start + count;
    if reached >= buf.len() {
        return Outcome::Done(id, Ok(buf.freeze()));
    }
    if count == 0 || !count.is_multiple_of(512) {
        tracing::error!("a read at byte {pos} of the backing device ended early; was it shortened?");
        return Outcome::Done(id, Err(IoError::Failed));
    }
    let op = Op::Read { fd, pos: pos + count as u64, buf, start: reached };
    Outcome::More(Job { id, backing, kind: JobKind::Read }, op)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::Ring;
    use palisade_metadata::image::create_md;
    use palisade_metadata::{Geometry, Layout, Superblock, Version};

    const BYTES: u64 = 16 << 20;

    fn image(dir: &Path, clean: bool) -> String {
        let path = dir.join("disk");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len(BYTES).unwrap();
        let layout = Layout::compute(Kind::Internal, BYTES, None, Geometry::new(1)).unwrap();
        let mut sb = Superblock::fresh(Version::V09, &layout);
        if !clean {
            sb.mark_in_use();
        }
        create_md(&file, &layout, &sb).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn run(ring: &mut Ring<Job>, job: (Job, Op)) -> Result<Bytes, IoError> {
        ring.push(job.0, job.1);
        loop {
            ring.wait(None).unwrap();
            while let Some(done) = ring.next() {
                match done.token.completed(done.op, done.result) {
                    Outcome::Done(_, result) => return result,
                    Outcome::More(job, op) => drop(ring.push(job, op)),
                }
            }
        }
    }

    #[test]
    fn everything_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), true);
        let pool = BufferPool::new(1 << 20);
        let (backing, core) = open(&path, &path, MetaIndex::Internal, 0, &pool).unwrap();
        assert!(core.layout.usable_sectors > 30_000);
        let mut ring = Ring::new().unwrap();
        let data = Bytes::from(vec![7; 8192 + 1]).slice(1..);
        let id = IoId(1);
        assert_eq!(run(&mut ring, backing.write(id, 9, data.clone(), true)), Ok(Bytes::new()));
        assert_eq!(run(&mut ring, backing.read(id, 9, 8192)), Ok(data));
        assert_eq!(run(&mut ring, backing.flush(id)), Ok(Bytes::new()));
        for (unmap, discard) in [(true, false), (false, false), (false, true)] {
            let full = Bytes::from(vec![9; 65536]);
            assert!(run(&mut ring, backing.write(id, 8, full, false)).is_ok());
            let job = backing.zero(id, 16, 8192, unmap, discard).unwrap();
            assert_eq!(run(&mut ring, job), Ok(Bytes::new()), "{unmap} {discard}");
            let back = run(&mut ring, backing.read(id, 8, 65536)).unwrap();
            let zeroes = back.iter().filter(|b| **b == 0).count();
            assert_eq!((zeroes, back[4095], back[4096]), (8192, 9, 0));
        }
        let block = Bytes::from(vec![3; 4096]);
        assert!(run(&mut ring, backing.write_meta(id, BYTES - 4096, block.clone())).is_ok());
        let mut end = vec![0; 4096];
        File::open(&path).unwrap().read_exact_at(&mut end, BYTES - 4096).unwrap();
        assert_eq!(end, block);
        assert_eq!(run(&mut ring, backing.read(id, BYTES / 512, 512)), Err(IoError::Failed));
    }

    #[test]
    fn devices_in_use_and_bad_metadata_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), true);
        let pool = BufferPool::new(1 << 20);
        let held = open(&path, &path, MetaIndex::Internal, 0, &pool).unwrap();
        let error = open(&path, &path, MetaIndex::Internal, 0, &pool).unwrap_err();
        assert_eq!(error.code, code::DISK_CLAIMED, "{error:?}");
        drop(held);
        let path = image(dir.path(), false);
        let error = open(&path, &path, MetaIndex::Internal, 0, &pool).unwrap_err();
        assert_eq!(error.code, code::MD_UNCLEAN);
        std::fs::write(&path, vec![0; BYTES as usize]).unwrap();
        let error = open(&path, &path, MetaIndex::Internal, 0, &pool).unwrap_err();
        assert_eq!(error.code, code::MD_INVALID);
        let error = open("/dev/null", "/dev/null", MetaIndex::Internal, 0, &pool).unwrap_err();
        assert_eq!(error.code, code::DISK_NOT_BDEV);
    }
}
