//! A directory with an image in it, both programs, and the recordings.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

pub const MIB: u64 = 1 << 20;

/// Exit status, stdout, stderr.
pub type Said = (i32, String, String);

pub struct Place {
    pub dir: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// One with a fresh image of that size.
    pub fn with_image(bytes: u64) -> Self {
        let place = Self::new();
        place.fresh(bytes);
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn fresh(&self, bytes: u64) {
        File::create(self.path("md.img")).unwrap().set_len(bytes).unwrap();
        let _ = std::fs::remove_file(self.path("state/drbd-minor--1.lkbd"));
    }

    pub fn image(&self) -> File {
        File::options().read(true).write(true).open(self.path("md.img")).unwrap()
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.image().write_all_at(bytes, at).unwrap();
    }

    pub fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.image().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// `drbdmeta` with these words.
    pub fn run(&self, words: &[&str]) -> Said {
        self.run_with(words, Stdio::null())
    }

    pub fn run_with(&self, words: &[&str], input: Stdio) -> Said {
        let output = Command::new(env!("CARGO_BIN_EXE_palisade"))
            .arg("drbdmeta")
            .args(words)
            .current_dir(self.dir.path())
            .env("PALISADE_RUNTIME_DIR", self.path("run"))
            .env("PALISADE_STATE_DIR", self.path("state"))
            .env("TZ", "UTC")
            .stdin(input)
            .output()
            .unwrap();
        said(&output)
    }

    /// `drbdmeta --force - v09 md.img internal` with these words, which must succeed. Gives stdout.
    #[track_caller]
    pub fn ok(&self, words: &str) -> String {
        let all: Vec<&str> =
            ["--force", "-", "v09", "md.img", "internal"].into_iter().chain(words.split(' ')).collect();
        let (code, out, err) = self.run(&all);
        assert_eq!(code, 0, "{words}: {err}");
        out
    }

    /// The packaged tool of drbd-utils.
    pub fn packaged(&self, words: &[&str]) -> Said {
        const DRBDMETA: &str = "/usr/sbin/drbdmeta";
        let output = Command::new(DRBDMETA)
            .args(words)
            .current_dir(self.dir.path())
            .env("TZ", "UTC")
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|e| panic!("{DRBDMETA} must be installed (package drbd-utils): {e}"));
        said(&output)
    }
}

fn said(output: &Output) -> Said {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// The recorded cases and dumps, by path.
pub fn recorded() -> BTreeMap<String, Vec<u8>> {
    let packed = include_bytes!("../../../engine/metadata/tests/golden/tool.tar.zst");
    let mut archive = tar::Archive::new(zstd::Decoder::new(packed.as_slice()).unwrap());
    let mut files = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        let path = entry.path().unwrap().display().to_string();
        files.insert(path.trim_start_matches("./").to_owned(), bytes);
    }
    files
}

/// Date and host as the recordings have them, without what is said about plain files only.
pub fn plain(text: &str) -> String {
    let noise = ["BLKSSZGET", "BLKFLSBUF", "BLKZEROOUT", "O_DIRECT", "to all zero using pwrite", "100%"];
    let mut out = String::new();
    for line in text.lines().filter(|line| !noise.iter().any(|n| line.contains(n))) {
        let dated = line.starts_with("# 2") && line.contains(" +0000 [");
        let field = |name: &str| line.trim_start().starts_with(&format!("\"{name}\": "));
        if dated {
            out.push_str("# DATE");
        } else if let Some((_, command)) = line.split_once("> drbdmeta").filter(|_| line.starts_with("# ")) {
            out.push_str(&format!("# HOST> drbdmeta{command}"));
        } else if field("dump_time_utc") {
            out.push_str("    \"dump_time_utc\": \"DATE\",");
        } else if field("dump_host") {
            out.push_str("    \"dump_host\": \"HOST\",");
        } else {
            out.push_str(line);
        }
        out.push('\n');
    }
    out
}

/// The first line in which two texts differ, for the eye.
pub fn difference(want: &str, got: &str) -> String {
    let lines = want.lines().zip(got.lines()).enumerate().find(|(_, (a, b))| a != b);
    let counts = (want.lines().count(), got.lines().count());
    match lines {
        Some((n, (a, b))) => format!("line {}\nwant {a}\ngot  {b}", n + 1),
        None => format!("{} lines wanted, {} there, the last:\n{want}\n{got}", counts.0, counts.1),
    }
}
