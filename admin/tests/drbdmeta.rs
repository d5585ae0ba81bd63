//! The reference's `drbdmeta`, recorded: arguments, questions, existing data, exit codes.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

/// What happens to the device before the next command.
enum Before {
    Fresh(u64),
    Bytes(u64, &'static [u8]),
    /// The fields of an ext3 superblock that are looked at: this many blocks of 4 KiB.
    Ext(u32),
}

const MIB: u64 = 1 << 20;

/// Preparations before the n-th recorded command (counted from 0).
fn before(n: usize) -> Vec<Before> {
    use Before::{Bytes, Ext, Fresh};
    let fresh = || Fresh(64 * MIB);
    match n {
        0 => vec![fresh()],
        41 => vec![fresh(), Ext(16384)],
        43 => vec![fresh(), Ext(15360)],
        44 => vec![fresh(), Bytes(4086, b"SWAPSPACE2")],
        46 => vec![fresh(), Bytes(0, b"XFSB\0\0\x10\0\0\0\0\0\0\0\x10\0")],
        47 => vec![fresh(), Bytes(32768, b"JFS1\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10\0\0")],
        48 => vec![fresh(), Bytes(0x10034, b"ReIsEr2Fs")],
        49 => vec![fresh(), Bytes(0, b"hello")],
        50 => vec![fresh(), Ext(16384)],
        53 => vec![Fresh(60 << 10)],
        54 => vec![Fresh(68 << 10)],
        55 => vec![Fresh(72 << 10)],
        _ => Vec::new(),
    }
}

/// Where we differ on purpose.
fn departs(n: usize, args: &str) -> bool {
    // Plain files are taken without --force: the bundled engine serves them too.
    args.starts_with("- v09 md.img internal dump-md")
        // Usage texts.
        || args.contains("--ignored")
        // The message names the word instead of '(null)'.
        || args.ends_with("set-gi --node-id 1 zz")
        // The whole bitmap area of external metadata is zeroed and its size is told.
        || args == "--force --ignore-sanity-checks - v09 md.img flex-external create-md 1"
        || args == "--force - v09 md.img flex-external create-md 7"
        || (args == "--force - v09 md.img flex-external create-md 1" && n == 52)
}

#[test]
fn the_transcript_is_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("md.img");
    let transcript = include_str!("golden/drbdmeta-transcript.txt");
    let mut wrong = Vec::new();
    let commands: Vec<&str> = transcript.split("$ drbdmeta ").skip(1).collect();
    for (n, recorded) in commands.iter().enumerate() {
        for step in before(n) {
            prepare(&image, &step);
        }
        let (args, rest) = recorded.split_once('\n').unwrap();
        let pick = |prefix: &str| -> String {
            rest.lines()
                .take_while(|l| !l.starts_with("## "))
                .filter_map(|l| l.strip_prefix(prefix))
                .filter(|l| !l.ends_with("to all zero using pwrite"))
                .map(|l| format!("{l}\n"))
                .collect()
        };
        let want = (pick("exit: "), pick("out: "), pick("err: "));
        let got = run(dir.path(), args);
        if !departs(n, args) && got != want {
            wrong.push(format!("{n}: drbdmeta {args}\nwant {want:#?}\ngot {got:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(commands.len(), 56);
}

fn prepare(image: &std::path::Path, step: &Before) {
    let open = || std::fs::File::options().write(true).open(image).unwrap();
    match step {
        Before::Fresh(bytes) => std::fs::File::create(image).unwrap().set_len(*bytes).unwrap(),
        Before::Bytes(at, bytes) => open().write_all_at(bytes, *at).unwrap(),
        Before::Ext(blocks) => {
            let file = open();
            file.write_all_at(&blocks.to_le_bytes(), 0x404).unwrap();
            file.write_all_at(&2_u32.to_le_bytes(), 0x418).unwrap();
            file.write_all_at(&0xEF53_u16.to_le_bytes(), 0x438).unwrap();
            file.write_all_at(&4_u32.to_le_bytes(), 0x45c).unwrap();
        }
    }
}

fn run(dir: &std::path::Path, args: &str) -> (String, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_palisade"))
        .arg("drbdmeta")
        .args(args.split(' '))
        .current_dir(dir)
        .env("PALISADE_RUNTIME_DIR", dir.join("run"))
        .env("PALISADE_STATE_DIR", dir.join("state"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (format!("{}\n", output.status.code().unwrap()), text(&output.stdout), text(&output.stderr))
}
