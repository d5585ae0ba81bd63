//! The 22 recorded cases, command by command: what is printed and what is on the disk afterwards are the
//! reference's; and the packaged tool says about the result what it said about its own.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::FileExt;

use super::common::{Place, difference, plain, recorded};

type Files = BTreeMap<String, Vec<u8>>;

/// Where we differ on purpose.
fn departs(case: &str, step: &str) -> bool {
    // Nothing has to be done by hand: a node without a bitmap has no bits.
    step == "forget-peer" && case.starts_with("30")
        // The bitmap is complete, and its last extent is marked.
        || step == "dump-md-after" && case.starts_with("40")
}

#[test]
fn every_case_gives_the_recorded_output_and_image() {
    let files = recorded();
    let cases: Vec<&str> = files
        .keys()
        .filter_map(|f| f.strip_prefix("cases/")?.strip_suffix("/expected/commands.txt"))
        .collect();
    assert_eq!(cases.len(), 22);
    let mut compared = 0;
    let mut wrong = Vec::new();
    for case in cases {
        compared += replay(&files, case, &mut wrong);
    }
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
    assert!(compared == 272, "{compared}");
}

/// Runs the commands of one case; gives how many things were compared.
fn replay(files: &Files, case: &str, wrong: &mut Vec<String>) -> usize {
    let place = Place::new();
    inputs(files, &place);
    let dir = format!("cases/{case}");
    let mut done: Vec<String> = Vec::new();
    let mut compared = 0;
    for line in text(files, &format!("{dir}/expected/commands.txt")).lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[0] {
            "truncate" => resize(&place, words[2]),
            "alcraft.py" => {
                craft(files, &place, &dir);
                let image = format!("{dir}/image");
                wrong.extend(differs(files, &place, &image).map(|d| format!("{image}: {d}")));
                compared += 1;
            }
            "drbdmeta" => {
                let got = place.run(&words[1..]);
                let step = step(files, &dir, &done, &words[6..]);
                done.push(words[6..].join(" "));
                let said = format!("{}{}exit code {}\n", plain(&got.1), plain(&got.2), got.0);
                if let Some(step) = step {
                    let want = wanted(files, &dir, &step);
                    if said != want && !departs(case, &step) {
                        wrong.push(format!("{case} {step}: {line}: {}", difference(&want, &said)));
                    }
                    compared += 1;
                    compared += packaged(files, &place, &dir, &step, &words[1..], wrong);
                } else if got.0 != 0 {
                    wrong.push(format!("{case}: {line}\n{said}"));
                }
            }
            _ => {}
        }
        for image in images(&dir, &done) {
            if let Some(difference) = differs(files, &place, &image) {
                wrong.push(format!("{image} after {line}: {difference}"));
            }
            compared += 1;
        }
    }
    compared
}

fn text<'a>(files: &'a Files, path: &str) -> &'a str {
    std::str::from_utf8(files.get(path).unwrap_or_else(|| panic!("{path}"))).unwrap()
}

fn inputs(files: &Files, place: &Place) {
    for (path, bytes) in files {
        if let Some(name) = path.strip_prefix("inputs/") {
            std::fs::write(place.path(name), bytes).unwrap();
        }
    }
    let crash = text(files, "inputs/v09-crash.dump");
    let mut last = String::new();
    for line in crash.lines().take_while(|l| !l.starts_with("bitmap[0]")) {
        last += match line {
            l if l.starts_with("la-size-sect ") => "la-size-sect 262144;",
            l if l.starts_with("max-peers ") => "max-peers 1;",
            l => l,
        };
        last.push('\n');
    }
    last.push_str("bitmap[0] {\n   512 times 0x0000000000000000;\n}\n");
    std::fs::write(place.path("last.dump"), last).unwrap();
}

fn resize(place: &Place, size: &str) {
    let (digits, factor) = match size.chars().last() {
        Some('M') => (&size[..size.len() - 1], 1 << 20),
        Some('G') => (&size[..size.len() - 1], 1 << 30),
        Some('T') => (&size[..size.len() - 1], 1 << 40),
        _ => (size, 1),
    };
    let file = std::fs::File::options().create(true).append(true).open(place.path("md.img")).unwrap();
    file.set_len(digits.parse::<u64>().unwrap() * factor).unwrap();
}

/// The transactions were put in by hand: they, and a changed magic, are taken from the recorded image.
fn craft(files: &Files, place: &Place, dir: &str) {
    let layout = layout(files, &format!("{dir}/image"));
    let area = zstd::decode_all(&files[&format!("{dir}/image.zst")][..]).unwrap();
    let part = |from: u64, to: u64| {
        let at = |pos: u64| usize::try_from(pos - layout["area_offset"]).unwrap();
        place.put(from, &area[at(from)..at(to)]);
    };
    part(layout["al_offset"], layout["md_offset"]);
    part(layout["md_offset"] + 60, layout["md_offset"] + 64);
}

fn layout(files: &Files, image: &str) -> BTreeMap<String, u64> {
    let lines = text(files, &format!("{image}.layout")).lines();
    lines
        .filter_map(|l| l.split_once('='))
        .filter_map(|(k, v)| Some((k.to_owned(), v.parse().ok()?)))
        .collect()
}

/// The name under which the next command's output was recorded; `None`: it was not.
fn step(files: &Files, dir: &str, done: &[String], words: &[&str]) -> Option<String> {
    let was = |verb: &str| done.iter().filter(|d| d.starts_with(verb)).count();
    let exists = |name: &str| files.contains_key(&format!("{dir}/expected/{name}.stderr"));
    let verb = words[0];
    let mut names: Vec<String> = match verb {
        "create-md" if dir.contains("/31") => {
            vec![["", "convert-to-v09", "convert-to-v08"][was(verb)].to_owned()]
        }
        "create-md" => vec!["create".to_owned()],
        "restore-md" => vec!["restore".to_owned()],
        "dump-superblock" => vec!["superblock.json".to_owned()],
        "dump-md" if was("wipe-md") > 0 => vec!["dump-md-wiped".to_owned()],
        "dump-md" if was("apply-al") + was("check-resize") > 0 => vec!["dump-md-after".to_owned()],
        "dump-md" => ["dump-md-unclean", "dump-md-moved", "dump-md-v09", "dump-md"].map(str::to_owned).into(),
        "dstate" if was("outdate") > 0 => vec!["dstate-outdated".to_owned()],
        "outdate" if was("outdate") > 0 => vec!["outdate-inconsistent".to_owned()],
        "wipe-md" if was("wipe-md") > 0 => vec!["wipe-again".to_owned()],
        "get-gi" if was("forget-peer") > 0 => vec!["get-gi-forgotten".to_owned()],
        "get-gi" if was("invalidate") > 0 => vec!["get-gi-invalidated".to_owned()],
        "get-gi" if dir.contains("/31") => vec![["get-gi-v08", "get-gi-v08-again"][was("get-gi")].to_owned()],
        "get-gi" | "show-gi" if words.len() > 1 => vec![format!("{verb}.{}", words[2])],
        other => vec![other.to_owned()],
    };
    names.retain(|name| exists(name));
    names.into_iter().next()
}

/// What was recorded: the newer tool's words, except where only the older one is right.
fn wanted(files: &Files, dir: &str, step: &str) -> String {
    let part = |end: &str| {
        let older = format!("{dir}/out-9.22/{step}.{end}");
        let path = if step == "apply-al" && files.contains_key(&older) {
            older
        } else {
            format!("{dir}/expected/{step}.{end}")
        };
        // Nothing printed on stdout was not always kept.
        plain(files.get(&path).map_or("", |text| std::str::from_utf8(text).unwrap()))
    };
    // A failure is 1 as with the older tool.
    (part("stdout") + &part("stderr")).replace("exit code 255", "exit code 1")
}

/// The packaged tool reads the image and says what it says about the reference's.
fn packaged(
    files: &Files,
    place: &Place,
    dir: &str,
    step: &str,
    words: &[&str],
    wrong: &mut Vec<String>,
) -> usize {
    let read = ["dump-md", "dstate", "get-gi", "show-gi", "read-dev-uuid"];
    // The older tool moves metadata wrongly and does not find it afterwards where it left it before.
    if !words.iter().any(|w| read.contains(w)) || step == "dump-md-moved" {
        return 0;
    }
    let (_, out, _) = place.packaged(words);
    let older = format!("{dir}/out-9.22/{step}.stdout");
    // Its own conversions and moves were wrong, and it does not know members.
    let own = files.contains_key(&older) && !dir.contains("/31") && !dir.contains("/32");
    let path = if own { older } else { format!("{dir}/expected/{step}.stdout") };
    let without_members = |text: &str| -> String {
        plain(text).lines().filter(|l| !l.starts_with("members ")).map(|l| format!("{l}\n")).collect()
    };
    let want = without_members(files.get(&path).map_or("", |text| std::str::from_utf8(text).unwrap()));
    let got = without_members(&out);
    if got != want {
        wrong.push(format!("{dir}: the packaged tool, {step}: {}", difference(&want, &got)));
    }
    1
}

/// Recorded images that the device has to equal now.
fn images(dir: &str, done: &[String]) -> Vec<String> {
    let last = done.last().map_or("", String::as_str).split(' ').next().unwrap_or_default();
    let count = |verb: &str| done.iter().filter(|d| d.starts_with(verb)).count();
    let number: u32 = dir["cases/".len().."cases/".len() + 2].parse().unwrap();
    let name = match (number, last) {
        (31, "get-gi") if count("get-gi") == 1 => "image-v08",
        (31, "dump-md") => "image-v09",
        (31, "get-gi") => "image-v08-again",
        (30, "write-dev-uuid") => "image",
        (30, "outdate") if count("outdate") == 2 => "image-invalidated",
        (20..=26 | 40, "apply-al") => "image-after",
        (32, "check-resize") => "image-after",
        (32, "restore-md") => "image",
        (20..=26 | 40 | 30..=32, _) => return Vec::new(),
        (_, "dump-md" | "get-gi") => "image",
        _ => return Vec::new(),
    };
    vec![format!("{dir}/{name}")]
}

/// How the metadata area differs from a recorded one.
fn differs(files: &Files, place: &Place, image: &str) -> Option<String> {
    let older = image.replace("/image", "/out-9.22/image");
    let last = image.contains("/40-") && files.contains_key(&format!("{older}.zst"));
    let image = if last { &older } else { image };
    let layout = layout(files, image);
    let file = place.image();
    if file.metadata().unwrap().len() != layout["device_size"] && !image.contains("/32-") {
        return Some("another size".to_owned());
    }
    let mut want = zstd::Decoder::new(&files[&format!("{image}.zst")][..]).unwrap();
    let mut pos = layout["area_offset"];
    let end = pos + layout["area_length"];
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    while pos < end {
        let len = usize::try_from((end - pos).min(1 << 20)).unwrap();
        want.read_exact(&mut a[..len]).unwrap();
        file.read_exact_at(&mut b[..len], pos).unwrap();
        if a[..len] != b[..len] {
            let at = a.iter().zip(&b).position(|(x, y)| x != y).unwrap_or_default();
            return Some(format!("byte {}: {:#x} instead of {:#x}", pos + at as u64, b[at], a[at]));
        }
        pos += len as u64;
    }
    None
}
