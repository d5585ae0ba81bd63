//! The recorded errors, questions, existing data and exit codes, command by command.

use std::process::Stdio;

use super::common::{MIB, Place, Said, plain, recorded};

/// One recorded command.
#[derive(Default)]
struct Recorded<'a> {
    section: &'a str,
    /// Which of its section, from 0.
    nth: usize,
    words: &'a str,
    /// Contents of `in.dump`.
    input: Option<&'a str>,
    said: Said,
}

/// Where we differ on purpose.
fn departs(r: &Recorded<'_>) -> bool {
    // Plain files are taken without --force: the bundled engine serves them too.
    r.words.starts_with("- v09 md.img internal dump-md")
        // A similar word is suggested.
        || r.words.contains("--ignored") || r.words.contains("--nosuchoption")
        // The message names the word instead of '(null)'.
        || r.words.ends_with("set-gi --node-id 1 zz")
        // Three interleaved bitmaps are none of v08: a full sync is asked for.
        || r.section == "existing metadata" && r.words == "--force - v08 md.img internal create-md"
        // Reads and writes in other words.
        || r.words.contains("-v -v")
}

#[test]
fn the_transcript_is_repeated() {
    let place = Place::new();
    for (path, bytes) in &recorded() {
        if let Some(name) = path.strip_prefix("inputs/") {
            std::fs::write(place.path(name), bytes).unwrap();
        }
    }
    let commands = parse(include_str!("../golden/drbdmeta-transcript.txt"));
    let mut wrong = Vec::new();
    for r in &commands {
        prepare(&place, r);
        let words: Vec<&str> = r.words.split(' ').filter(|w| !w.is_empty()).collect();
        let from_stdin = r.words.ends_with(" verify-dump");
        let input = if from_stdin {
            std::fs::File::open(place.path("v09-p3-bitmap.dump")).unwrap().into()
        } else {
            Stdio::null()
        };
        let (code, out, err) = place.run_with(&words, input);
        let got = (code, plain(&out), plain(&err));
        if !departs(r) && got != r.said {
            wrong.push(format!("drbdmeta {}\nwant {:#?}\ngot {got:#?}", r.words, r.said));
        }
    }
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(commands.len(), 81);
}

fn parse(text: &str) -> Vec<Recorded<'_>> {
    let mut all: Vec<Recorded<'_>> = Vec::new();
    let (mut section, mut nth, mut input) = ("", 0, None);
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("## ") {
            (section, nth) = (name, 0);
        } else if let Some(dump) = line.strip_prefix("(in.dump: ") {
            input = dump.strip_suffix(')');
        } else if let Some(words) = line.strip_prefix("$ drbdmeta ") {
            // Answers of a terminal: `more.rs`.
            if words.contains("(terminal,") {
                break;
            }
            all.push(Recorded { section, nth, words, input: input.take(), said: Said::default() });
            nth += 1;
        } else if let Some(r) = all.last_mut() {
            let said = &mut r.said;
            let older = line.contains("truncated (0)!") || line.contains("in meta_restore_md: ");
            let formats = line == "out:   v06 minor" || line == "out:   v07 device index";
            if older || formats {
                continue;
            }
            if let Some(code) = line.strip_prefix("exit: ") {
                said.0 = match code.parse().unwrap() {
                    // A failure is 1 as with the older tool.
                    255 => 1,
                    code => code,
                };
            } else if let Some(text) = line.strip_prefix("out: ") {
                said.1 += &plain(text).replace("/dev/loopN", "md.img");
                said.1 += if text.is_empty() { "\n" } else { "" };
            } else if let Some(text) = line.strip_prefix("err: ") {
                said.2 += &plain(text).replace("/dev/loopN", "md.img");
                said.2 += if text.is_empty() { "\n" } else { "" };
            }
        }
    }
    for r in &mut all {
        if r.words.contains("/dev/loopN") {
            r.words = Box::leak(r.words.replace("/dev/loopN", "md.img").into_boxed_str());
        }
    }
    all
}

/// What happened to the image before a command.
fn prepare(place: &Place, r: &Recorded<'_>) {
    if let Some(text) = r.input {
        std::fs::write(place.path("in.dump"), text).unwrap();
    }
    let put = |at: u64, bytes: &[u8]| {
        place.fresh(64 * MIB);
        place.put(at, bytes);
    };
    let section = r.section.split([':', ',']).next().unwrap();
    let external = r.section.contains("external");
    match (section, r.nth) {
        ("arguments" | "restore and verify" | "dry run", 0) => place.fresh(64 * MIB),
        ("existing data", 0) => ext(place, 16384),
        ("existing data", 2) if !external => ext(place, 15360),
        ("existing data", 3) => put(4086, b"SWAPSPACE2"),
        ("existing data", 5) => put(0, b"XFSB\0\0\x10\0\0\0\0\0\0\0\x10\0"),
        ("existing data", 6) => put(32768, b"JFS1\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10\0\0"),
        ("existing data", 7) => put(0x10034, b"ReIsEr2Fs"),
        ("existing data", 8) => put(0, b"hello"),
        ("sizes", n) => place.fresh([60 << 10, 68 << 10, 72 << 10][n]),
        ("questions without and with a terminal (loop device needed; skipped when not available)", 0) => {
            place.fresh(64 * MIB);
            place.ok("create-md 1");
        }
        _ => {}
    }
}

/// The fields of an ext3 superblock that are looked at: this many blocks of 4 KiB.
fn ext(place: &Place, blocks: u32) {
    place.fresh(64 * MIB);
    place.put(0x404, &blocks.to_le_bytes());
    place.put(0x418, &2_u32.to_le_bytes());
    place.put(0x438, &0xEF53_u16.to_le_bytes());
    place.put(0x45c, &4_u32.to_le_bytes());
}
