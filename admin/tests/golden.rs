//! Every recorded command line of the reference's `drbdadm`: output, messages and exit status are the same,
//! but for the deviations that `docs/deviations.md` lists.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};

const CASES: &[u8] = include_bytes!("../../conf/tests/golden/cases.tar.zst");
const DEVIATIONS: &str = include_str!("../../docs/deviations.md");

#[derive(Debug, Default, PartialEq)]
struct Outcome {
    rc: i32,
    out: Vec<String>,
    err: Vec<String>,
}

/// Rows `| case | label | reason |` of the table of recorded commands.
fn deviations() -> BTreeSet<(String, String)> {
    let rows = DEVIATIONS.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.filter_map(|row| {
        let (case, rest) = row.split_once("` | `")?;
        let (label, _) = rest.split_once("` |")?;
        Some((case.to_owned(), label.to_owned()))
    })
    .collect()
}

/// Numbers of tokens change with every release.
fn without_token_number(line: &str) -> String {
    match line.split_once(" (TK ").and_then(|(head, rest)| Some((head, rest.split_once(')')?.1))) {
        Some((head, tail)) => format!("{head}{tail}"),
        None => line.to_owned(),
    }
}

fn recorded(text: &str, label: &str) -> Option<Outcome> {
    let mut found: Option<Outcome> = None;
    let mut ours = false;
    for line in text.lines() {
        if let Some((name, rc)) = line.strip_prefix("=== ").and_then(|head| head.split_once(" rc=")) {
            ours = name == label;
            if ours {
                found = Some(Outcome { rc: rc.parse().unwrap(), ..Outcome::default() });
            }
        } else if let (true, Some(outcome)) = (ours, found.as_mut()) {
            if let Some(line) = line.strip_prefix('>') {
                outcome.out.push(without_token_number(line));
            } else if let Some(line) = line.strip_prefix('!') {
                outcome.err.push(without_token_number(line));
            }
        }
    }
    found
}

fn run(case: &Path, node: &str, env: &str, args: &str) -> Outcome {
    let output = Command::new(env!("CARGO_BIN_EXE_palisade"))
        .arg("drbdadm")
        .args(args.split(' '))
        .current_dir(case)
        .env("__DRBD_NODE__", node)
        .env("DRBD_DRIVER_VERSION_OVERRIDE", "9.2.0")
        .env("PALISADE_RUNTIME_DIR", case)
        .envs(env.split_ascii_whitespace().filter_map(|setting| setting.split_once('=')))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let here = case.display().to_string();
    let lines = |bytes: &[u8]| -> Vec<String> {
        let text = String::from_utf8_lossy(bytes).replace(&format!("{here}/"), "");
        let text = text.replace(&format!("{here}'"), ".'").replace(&format!("{here}:"), ".:");
        text.lines().map(normal).collect()
    };
    let mut err = lines(&output.stderr);
    assert!(err.get(1).is_some_and(|line| line.contains("__DRBD_NODE__")), "{err:?}");
    err.drain(..4);
    Outcome { rc: output.status.code().unwrap(), out: lines(&output.stdout), err }
}

/// What depends on the release is as the recordings have it.
fn normal(line: &str) -> String {
    if line.starts_with("Version: ") {
        return "Version: @VERSION@".to_owned();
    }
    if line.starts_with("GIT-hash: ") {
        return "@BUILDTAG@".to_owned();
    }
    without_token_number(line)
}

#[test]
fn every_recorded_command_gives_what_the_reference_gives() {
    let dir = tempfile::tempdir().unwrap();
    tar::Archive::new(zstd::Decoder::new(CASES).unwrap()).unpack(dir.path()).unwrap();
    let root = std::fs::canonicalize(dir.path()).unwrap();
    let deviations = deviations();
    let (mut total, mut same) = (0, 0);
    let (mut wrong, mut departed) = (Vec::new(), BTreeSet::new());
    let mut cases: Vec<_> = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    for case in &cases {
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let newest = std::fs::read_to_string(case.join("expected-9.34"));
        let expected = newest.or_else(|_| std::fs::read_to_string(case.join("expected"))).unwrap();
        let commands = std::fs::read_to_string(case.join("cmd")).unwrap();
        for line in commands.lines().filter(|line| !line.starts_with('#')) {
            let fields: Vec<&str> = line.splitn(4, '|').collect();
            let &[label, node, env, args] = fields.as_slice() else { panic!("{name}: {line}") };
            let want = recorded(&expected, label).unwrap();
            let got = run(case, node, env, args);
            total += 1;
            if got == want {
                same += 1;
            } else if deviations.contains(&(name.clone(), label.to_owned())) {
                departed.insert((name.clone(), label.to_owned()));
            } else {
                wrong.push(format!("{name} {label}: drbdadm {args}\nwant {want:#?}\ngot {got:#?}"));
            }
        }
    }
    println!("{same} of {total} commands in {} cases", cases.len());
    assert!(wrong.is_empty(), "{} of {total} differ\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(departed, deviations, "a listed deviation is none any more");
    assert_eq!((cases.len(), total), (133, 658));
}
