//! Every way to name what a command is about, and where options may stand, as recorded from the reference;
//! and the least that `adjust` does about one difference.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::path::Path;
use std::process::{Command, Stdio};

fn golden() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Exit status, lines of stdout, lines of stderr. `repair-md` and the closing line about an object are
/// younger than the recordings.
fn drbdadm(dir: &Path, args: &[&str], running: Option<&Path>) -> (i32, Vec<String>, Vec<String>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_palisade"));
    command
        .arg("drbdadm")
        .args(args)
        .current_dir(dir)
        .env("__DRBD_NODE__", "alpha")
        .env("PALISADE_RUNTIME_DIR", dir)
        .stdin(Stdio::null());
    if let Some(file) = running {
        command.env("FAKE_DRBDSETUP_SHOW", file);
    }
    let output = command.output().unwrap();
    let here = format!("{}/", dir.display());
    let lines = |bytes: &[u8]| -> Vec<String> {
        let text = String::from_utf8_lossy(bytes).replace(&here, "");
        let old = |line: &&str| {
            !line.is_empty() && !line.ends_with(" repair-md") && !line.contains("unexpected ctx_by_*")
        };
        text.lines().filter(old).map(str::to_owned).collect()
    };
    let mut err = lines(&output.stderr);
    err.retain(|line| !line.contains("__DRBD_NODE__") && !line.contains("PRETENDING"));
    (output.status.code().unwrap(), lines(&output.stdout), err)
}

#[test]
fn objects_and_options_in_every_form() {
    let recorded = include_str!("golden/forms-9.22.txt");
    let mut wrong = Vec::new();
    let commands: Vec<&str> = recorded.split("$ ").skip(1).collect();
    for command in &commands {
        let (line, rest) = command.split_once('\n').unwrap();
        let pick = |prefix: &str| -> Vec<String> {
            rest.lines().filter_map(|l| l.strip_prefix(prefix)).map(str::to_owned).collect()
        };
        let code = pick("exit: ").first().unwrap().parse().unwrap();
        let mut args = vec!["-c", "forms.conf"];
        args.extend(line.split(' '));
        let (got, want) = (drbdadm(&golden(), &args, None), (code, pick("out: "), pick("err: ")));
        if got != want {
            wrong.push(format!("drbdadm {line}\nwant {want:#?}\ngot {got:#?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {} differ\n{}", wrong.len(), commands.len(), wrong.join("\n"));
    assert!(commands.len() >= 95, "{}", commands.len());
}

/// One difference between what runs and what is configured: how to make it, and what the reference does.
const DIFFERENCES: &[(&str, &str, &str)] = &[
    ("timeout 50", "timeout 50", ""),
    ("30720k", "30M", ""),
    ("\"/dev/vg/md\" [ 2 ]", "\"/dev/vg/md\" [ 3 ]", ""),
    (
        "timeout 50",
        "timeout 51",
        "drbdsetup net-options r 1 --set-defaults --_name=beta --max-buffers=4000 --timeout=50 --protocol=C",
    ),
    (
        "c-max-rate 30720k",
        "c-max-rate 1M",
        "drbdsetup peer-device-options r 1 0 --set-defaults --c-max-rate=30M",
    ),
    (
        "quorum majority",
        "quorum off",
        "drbdsetup resource-options r --set-defaults --quorum=majority --auto-promote=no",
    ),
    (
        "minor 10",
        "minor 99",
        "drbdsetup detach --diskless 99\ndrbdsetup del-minor 99\ndrbdsetup new-minor r 10 0\n\
         drbdsetup peer-device-options r 1 0 --set-defaults --c-max-rate=30M\n\
         drbdsetup peer-device-options r 2 0 --set-defaults --c-max-rate=30M\n\
         drbdmeta 10 v09 /dev/vg/a internal apply-al\n\
         drbdsetup attach 10 /dev/vg/a /dev/vg/a internal --size=1G --al-extents=997",
    ),
    (
        "\"/dev/vg/md\" [ 2 ]",
        "\"/dev/vg/mdx\" [ 2 ]",
        "drbdsetup detach --diskless 11\ndrbdmeta 11 v09 /dev/vg/md 2 apply-al\n\
         drbdsetup attach 11 /dev/vg/b /dev/vg/md 2 --al-extents=997",
    ),
    ("size 2097152s", "size 4194304s", "drbdsetup resize 10 --size=1G\ndrbdsetup check-resize 10"),
    ("al-extents 997", "al-extents 1001", "drbdsetup disk-options 10 --set-defaults --al-extents=997"),
    ("disk none", "disk \"/dev/vg/n\"; meta-disk internal", "drbdsetup detach --diskless 12"),
    (
        "203.0.113.12",
        "203.0.113.99",
        "drbdsetup del-path r 1 ipv4:203.0.113.11:7700 ipv4:203.0.113.99:7700\n\
         drbdsetup new-path r 1 ipv4:203.0.113.11:7700 ipv4:203.0.113.12:7700",
    ),
    (
        "198.51.100.13:7700",
        "198.51.100.13:7701",
        "drbdsetup disconnect r 2\n\
         drbdsetup del-path r 2 ipv4:198.51.100.11:7700 ipv4:198.51.100.13:7701\n\
         drbdsetup new-path r 2 ipv4:198.51.100.11:7700 ipv4:198.51.100.13:7700\n\
         drbdsetup connect r 2",
    ),
    (
        "transport \"tcp\"",
        "transport \"rdma\"",
        "drbdsetup del-peer r 1\n\
         drbdsetup new-peer r 1 --_name=beta --max-buffers=4000 --timeout=50 --protocol=C --transport=tcp\n\
         drbdsetup new-path r 1 ipv4:198.51.100.11:7700 ipv4:198.51.100.12:7700\n\
         drbdsetup new-path r 1 ipv4:203.0.113.11:7700 ipv4:203.0.113.12:7700\n\
         drbdsetup peer-device-options r 1 0 --set-defaults --c-max-rate=30M\n\
         drbdsetup peer-device-options r 1 1 --set-defaults --c-max-rate=30M\n\
         drbdsetup peer-device-options r 1 2 --set-defaults --c-max-rate=30M --bitmap=no\n\
         drbdsetup connect r 1",
    ),
    ("_cstate Connecting", "_cstate StandAlone", "drbdsetup connect r 1"),
];

#[test]
fn adjust_does_the_least_about_each_difference() {
    let dir = tempfile::tempdir().unwrap();
    let running = include_str!("golden/adjust-running.txt");
    let file = dir.path().join("running.txt");
    let conf = golden().join("adjust.conf");
    for (from, to, expected) in DIFFERENCES {
        assert!(running.contains(from), "{from}");
        std::fs::write(&file, running.replacen(from, to, 1)).unwrap();
        let got = drbdadm(dir.path(), &["-c", conf.to_str().unwrap(), "-d", "adjust", "r"], Some(&file));
        let want: Vec<String> = expected.lines().map(str::to_owned).collect();
        assert_eq!(got, (0, want, Vec::new()), "{from} -> {to}");
    }
}

/// A connection that works is given up only when the others have had their time to come back.
#[test]
fn adjust_keeps_a_peer_while_it_changes_another() {
    let dir = tempfile::tempdir().unwrap();
    let running = include_str!("golden/adjust-running.txt")
        .replacen("_cstate Connecting", "_cstate StandAlone", 1)
        .replacen("_cstate Connecting", "_cstate Connected", 1)
        .replace("198.51.100.13:7700", "198.51.100.13:7701");
    let file = dir.path().join("running.txt");
    std::fs::write(&file, running).unwrap();
    let conf = golden().join("adjust.conf");
    let (code, out, err) =
        drbdadm(dir.path(), &["-c", conf.to_str().unwrap(), "-d", "adjust", "r"], Some(&file));
    assert_eq!((code, err), (0, Vec::new()));
    assert_eq!(
        out,
        [
            "drbdsetup connect r 1",
            "drbdsetup wait-connect-resource r --wfc-timeout=1 --degr-wfc-timeout=1 --outdated-wfc-timeout=1",
            "drbdsetup disconnect r 2",
            "drbdsetup del-path r 2 ipv4:198.51.100.11:7700 ipv4:198.51.100.13:7701",
            "drbdsetup new-path r 2 ipv4:198.51.100.11:7700 ipv4:198.51.100.13:7700",
            "drbdsetup connect r 2",
        ]
    );
}
