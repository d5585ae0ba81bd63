//! Command lines of the reference's `drbdadm`, recorded as dry runs, and what it printed.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Stdio};

/// Where we differ on purpose or do not have the thing yet.
fn departs(case: &str, label: &str) -> bool {
    match (case, label) {
        // The reference prints arguments its own drbdsetup refuses.
        ("v02-command-table", "outdate")
        // Usage names our version.
        | ("v02-command-table", "err-no-res")
        // Not there yet: proxies.
        | ("v13-proxy-inside-on", _)
        // A slip of the reference: a second connection of a resource counts as ignored.
        | ("v04-three-node-mesh", "disc-two")
        // Newer releases name floating hosts with '_'; so do we.
        | ("v08-floating" | "v09-floating-ipv6-and-short" | "v17-address-by-connection-address", _)
        | ("v40-four-node-mesh", "up")
        // The same lines, volumes in another order.
        | ("v20-common-inheritance", "adjust")
        // The reference drops words for the back end when it runs on all resources.
        | ("v37-kvm-mirror-recipe", "overwrite") => true,
        // To be made equal where the configuration is read: files excluded on the command line.
        ("v22-includes", "exclude") => true,
        _ => false,
    }
}

struct Outcome {
    rc: i32,
    out: String,
}

fn recorded(text: &str, label: &str) -> Option<Outcome> {
    let mut outcome = None;
    let mut ours = false;
    for line in text.lines() {
        if let Some(head) = line.strip_prefix("=== ") {
            let (name, rc) = head.split_once(" rc=").unwrap();
            ours = name == label;
            if ours {
                outcome = Some(Outcome { rc: rc.parse().unwrap(), out: String::new() });
            }
        } else if ours && let (Some(o), Some(line)) = (outcome.as_mut(), line.strip_prefix('>')) {
            o.out.push_str(line);
            o.out.push('\n');
        }
    }
    outcome
}

#[test]
fn dry_runs_print_what_the_reference_prints() {
    let dir = tempfile::tempdir().unwrap();
    let packed = include_bytes!("golden/cases.tar.zst");
    tar::Archive::new(zstd::Decoder::new(packed.as_slice()).unwrap()).unpack(dir.path()).unwrap();
    let mut total = 0;
    let mut wrong = Vec::new();
    for case in std::fs::read_dir(dir.path()).unwrap() {
        let case = case.unwrap().path();
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let expected = std::fs::read_to_string(case.join("expected")).unwrap();
        for line in std::fs::read_to_string(case.join("cmd")).unwrap().lines() {
            let mut fields = line.splitn(4, '|');
            let mut field = || fields.next().unwrap();
            let (label, node, env, args) = (field(), field(), field(), field());
            if departs(&name, label) {
                continue;
            }
            let want = recorded(&expected, label).unwrap();
            let got = run(&case, node, env, args);
            total += 1;
            if got.rc != want.rc || got.out != want.out {
                wrong.push(format!(
                    "{name} {label}: drbdadm {args}\nwant rc {}\n{}got rc {}\n{}",
                    want.rc, want.out, got.rc, got.out
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {total} differ\n{}", wrong.len(), wrong.join("\n"));
    assert!(total > 200, "{total}");
}

fn run(case: &Path, node: &str, env: &str, args: &str) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_palisade"));
    command
        .arg("drbdadm")
        .args(args.split(' '))
        .current_dir(case)
        .env("__DRBD_NODE__", node)
        .env("DRBD_DRIVER_VERSION_OVERRIDE", "9.2.0")
        .env("PALISADE_RUNTIME_DIR", case)
        .stdin(Stdio::null());
    command.envs(env.split_ascii_whitespace().filter_map(|e| e.split_once('=')));
    let output = command.output().unwrap();
    let prefix = format!("{}/", case.display());
    let out = String::from_utf8_lossy(&output.stdout).replace(&prefix, "");
    Outcome { rc: output.status.code().unwrap(), out }
}
