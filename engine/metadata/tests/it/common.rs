//! Fixtures and a sparse device in memory.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;

use palisade_metadata::image::BlockIo;
use palisade_metadata::{BLOCK_SIZE, Block, DumpHeader, Kind};

/// A device that stores only blocks that are not zero.
#[derive(Clone, Default)]
pub struct Sparse {
    pub blocks: RefCell<BTreeMap<u64, Box<Block>>>,
    pub size: u64,
    /// Writes that still succeed; `None`: all.
    pub writes_left: RefCell<Option<u32>>,
}

impl Sparse {
    pub fn new(size: u64) -> Self {
        Self { size, ..Self::default() }
    }

    /// Streams `reader` to byte position `pos`, which need not be aligned at the device's end.
    pub fn fill(&self, pos: u64, mut reader: impl Read) -> u64 {
        let mut nr = pos / BLOCK_SIZE as u64;
        assert_eq!(pos % BLOCK_SIZE as u64, 0);
        let mut total = 0;
        loop {
            let mut block = [0; BLOCK_SIZE];
            let mut have = 0;
            while have < BLOCK_SIZE {
                match reader.read(&mut block[have..]).unwrap() {
                    0 => break,
                    n => have += n,
                }
            }
            total += have as u64;
            self.store(nr, &block);
            nr += 1;
            if have < BLOCK_SIZE {
                return total;
            }
        }
    }

    fn store(&self, nr: u64, block: &Block) {
        if block.iter().any(|b| *b != 0) {
            self.blocks.borrow_mut().insert(nr, Box::new(*block));
        } else {
            self.blocks.borrow_mut().remove(&nr);
        }
    }

    /// Numbers of the blocks in which two devices differ.
    pub fn differs(&self, other: &Self) -> Vec<u64> {
        let (a, b) = (self.blocks.borrow(), other.blocks.borrow());
        let mut all: Vec<u64> = a.keys().chain(b.keys()).copied().collect();
        all.sort_unstable();
        all.dedup();
        all.retain(|nr| a.get(nr) != b.get(nr));
        all
    }
}

impl BlockIo for Sparse {
    fn read_at(&self, pos: u64, buf: &mut [u8]) -> io::Result<()> {
        assert!(pos.is_multiple_of(4096) && buf.len().is_multiple_of(4096));
        if pos + buf.len() as u64 > self.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buf.fill(0);
        let first = pos / BLOCK_SIZE as u64;
        let end = first + (buf.len() / BLOCK_SIZE) as u64;
        for (nr, block) in self.blocks.borrow().range(first..end) {
            let at = (nr - first) as usize * BLOCK_SIZE;
            buf[at..at + BLOCK_SIZE].copy_from_slice(&block[..]);
        }
        Ok(())
    }

    fn write_at(&self, pos: u64, buf: &[u8]) -> io::Result<()> {
        assert!(pos.is_multiple_of(4096) && buf.len().is_multiple_of(4096));
        if pos + buf.len() as u64 > self.size {
            return Err(io::ErrorKind::WriteZero.into());
        }
        if let Some(left) = self.writes_left.borrow_mut().as_mut() {
            *left = left.checked_sub(1).ok_or(io::ErrorKind::Other)?;
        }
        for (nr, block) in (pos / BLOCK_SIZE as u64..).zip(buf.as_chunks::<BLOCK_SIZE>().0) {
            self.store(nr, block);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }
}

/// Files of a `.tar.zst` in `tests/golden`, by path.
pub fn archive(name: &str) -> BTreeMap<String, Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let tar = zstd::decode_all(std::fs::File::open(path).unwrap()).unwrap();
    let mut files = BTreeMap::new();
    let mut rest = &tar[..];
    while let Some((header, body)) = rest.split_at_checked(512) {
        let text = |range: std::ops::Range<usize>| {
            let field = &header[range];
            let len = field.iter().position(|b| *b == 0).unwrap_or(field.len());
            String::from_utf8(field[..len].to_vec()).unwrap()
        };
        if header[0] == 0 {
            break;
        }
        let len = usize::from_str_radix(text(124..136).trim(), 8).unwrap();
        if header[156] == b'0' {
            files.insert(text(0..100).trim_start_matches("./").to_owned(), body[..len].to_vec());
        }
        rest = &body[len.next_multiple_of(512)..];
    }
    assert!(!files.is_empty());
    files
}

/// `key=value` lines.
pub fn layout(text: &[u8]) -> BTreeMap<String, String> {
    let text = String::from_utf8(text.to_vec()).unwrap();
    text.lines().filter_map(|l| l.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
}

pub fn kind(index: &str) -> Kind {
    match index {
        "internal" => Kind::Internal,
        "flex-external" => Kind::FlexExternal,
        n => Kind::Indexed(n.parse().unwrap()),
    }
}

/// A device with the tool's image `name` (path without extension) on it.
pub fn tool_image(files: &BTreeMap<String, Vec<u8>>, name: &str) -> (Sparse, Kind) {
    let layout = layout(&files[&format!("{name}.layout")]);
    let device = Sparse::new(layout["device_size"].parse().unwrap());
    let reader = zstd::Decoder::new(&files[&format!("{name}.zst")][..]).unwrap();
    let len = device.fill(layout["area_offset"].parse().unwrap(), reader);
    assert_eq!(len.to_string(), layout["area_length"]);
    (device, kind(&layout["index"]))
}

/// The header that a recorded dump has.
pub fn header(dump: &str) -> DumpHeader<'_> {
    let mut lines = dump.lines().skip(1);
    let date = lines.next().unwrap().strip_prefix("# ").unwrap();
    let (host, command) = lines.next().unwrap()[2..].split_once("> ").unwrap();
    DumpHeader { date, host, command, moved: None }
}
