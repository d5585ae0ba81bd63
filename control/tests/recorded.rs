//! What real kernels' tools printed, read and printed again.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use palisade_control::render::{TextOptions, status_json, status_text};
use palisade_control::{Kernel, ResourceStatus};

fn sections(dir: &str) -> Vec<(String, String, Option<String>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(dir);
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let all = std::fs::read_to_string(&path).unwrap();
        let mut text = None;
        let mut json = None;
        for part in all.split("==== ").skip(1) {
            let (command, output) = part.split_once('\n').unwrap();
            // The recorder put an empty line of its own behind each output.
            if command.ends_with("--json") {
                json = Some(output.to_owned());
            } else {
                text = Some(output.to_owned());
            }
        }
        out.push((path.file_name().unwrap().to_string_lossy().into_owned(), text.unwrap_or_default(), json));
    }
    assert!(!out.is_empty());
    out.sort();
    out
}

/// Reads a text with the reader for 8.4, through a fake `drbdsetup`.
fn read_text(text: &str) -> Vec<ResourceStatus> {
    // A program that another thread is just starting holds the script open for writing for a moment, and
    // then nobody can run it.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("out"), text).unwrap();
    std::fs::write(dir.path().join("proc"), "version: 8.4.11 (api:1/proto:86-101)\n").unwrap();
    let tool = dir.path().join("drbdsetup");
    std::fs::write(&tool, format!("#!/bin/sh\ncat {}/out\n", dir.path().display())).unwrap();
    std::fs::set_permissions(&tool, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    Kernel::find_in(std::iter::once(dir.path().to_owned()))
        .unwrap()
        .with_version_file(dir.path().join("proc"))
        .status(None, std::time::Duration::from_secs(20))
        .unwrap()
}

const FULL: TextOptions =
    TextOptions { verbose: 1, statistics: true, columns: 80, terminal: false, color: false };

/// Values that change between the two commands of a snapshot.
fn moving(line: &str) -> bool {
    ["received:", "in-flight:", "congested:", "size:", "done:", "eta:", "lower-pending:"]
        .iter()
        .any(|w| line.contains(w))
}

#[test]
fn json_comes_back_byte_for_byte() {
    let mut bad = Vec::new();
    for (name, _, json) in sections("snap") {
        let json = json.unwrap();
        let all: Vec<ResourceStatus> = serde_json::from_str(&json).unwrap();
        if status_json(&all) != json {
            bad.push(name);
        }
    }
    assert!(bad.is_empty(), "{bad:?}");
}

#[test]
fn text_comes_back_byte_for_byte() {
    let mut bad = Vec::new();
    for (name, text, _) in sections("snap") {
        let all = read_text(&text);
        // Rates are computed from details the text does not carry.
        if text.contains("dbdt1:") {
            continue;
        }
        if status_text(&all, &FULL) != text {
            bad.push(name);
        }
    }
    assert!(bad.is_empty(), "{bad:?}");
}

#[test]
fn json_and_text_of_a_snapshot_agree() {
    for (name, text, json) in sections("snap") {
        if text.contains("dbdt1:") {
            continue;
        }
        let mut all: Vec<ResourceStatus> = serde_json::from_str(&json.unwrap()).unwrap();
        let other = read_text(&text);
        for (r, o) in all.iter_mut().zip(&other) {
            for (d, od) in r.devices.iter_mut().zip(&o.devices) {
                d.backing_dev.clone_from(&od.backing_dev);
            }
        }
        let ours = status_text(&all, &FULL);
        for (a, b) in ours.lines().zip(text.lines()).filter(|(a, b)| !moving(a) && !moving(b)) {
            assert_eq!(a, b, "{name}");
        }
    }
}

#[test]
fn text_of_8_4_is_understood() {
    for (name, text, _) in sections("snap84") {
        let all = read_text(&text);
        assert_eq!(all.len(), 1, "{name}");
        let r = &all[0];
        assert_eq!((r.name.as_str(), r.node_id), ("r0", -1), "{name}");
        assert!(!r.devices.is_empty(), "{name}");
        let connected = text.contains("connection:");
        assert_eq!(r.connections.len(), usize::from(connected), "{name}");
        if !connected {
            continue;
        }
        assert_eq!(r.connections[0].peer_devices.len(), r.devices.len(), "{name}");
        for word in text.split_ascii_whitespace() {
            match word.split_once(':') {
                Some(("done", done)) => {
                    let ours = r.connections[0].peer_devices.iter().find_map(|p| p.resync_done_percent);
                    assert_eq!(ours, done.parse().ok(), "{name}");
                }
                Some(("peer-disk", disk)) => {
                    assert!(r.connections[0].peer_devices.iter().any(|p| p.peer_disk_state.as_str() == disk));
                }
                Some(("suspended", list)) => assert_eq!(r.suspended_text(), list, "{name}"),
                _ => {}
            }
        }
    }
}
