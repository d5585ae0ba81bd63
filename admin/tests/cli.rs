//! The tools against a fake engine: start, configuration, queries, events, refusals.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod fake;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// Set for the process that plays the engine.
const FAKE_ENV: &str = "PALISADE_FAKE_ENGINE";

/// This test program started as `palisaded RESOURCE`; otherwise nothing to do.
#[test]
fn fake_engine_entry() {
    if let Ok(resource) = std::env::var(FAKE_ENV) {
        fake::serve(&resource);
    }
}

/// A directory with configuration, disk and a fake `palisaded`.
struct Site {
    dir: TempDir,
}

const CONF: &str = r#"
global { usage-count no; disable-ip-verification; }
resource r0 {
    options { quorum majority; }
    net { protocol C; cram-hmac-alg sha256; shared-secret "geheim"; PING }
    handlers { fence-peer "/bin/echo fencing"; }
    on alpha { node-id 0; device /dev/drbd1077 minor 1077; disk DIR/disk; meta-disk internal; address 127.0.0.1:7788; }
    on beta { node-id 1; device /dev/drbd1077 minor 1077; disk /dev/null/x; meta-disk internal; address 127.0.0.2:7788; }
}
"#;

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let daemon = dir.path().join("palisaded");
        let script = format!(
            "#!/bin/sh\n{FAKE_ENV}=\"$1\" exec {} --exact fake_engine_entry\n",
            std::env::current_exe().unwrap().display()
        );
        std::fs::write(&daemon, script).unwrap();
        std::fs::set_permissions(&daemon, PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::File::create(dir.path().join("disk")).unwrap().set_len(8 << 20).unwrap();
        let site = Self { dir };
        site.configure("");
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn configure(&self, net: &str) {
        let text = CONF.replace("DIR", &self.dir.path().display().to_string()).replace("PING", net);
        std::fs::write(self.path("drbd.conf"), text).unwrap();
    }

    fn command(&self, line: &str) -> Command {
        let mut words = line.split(' ');
        let mut command = Command::new(env!("CARGO_BIN_EXE_palisade"));
        let tool = words.next().unwrap();
        command
            .arg(tool)
            .current_dir(self.dir.path())
            .env("PALISADE_RUNTIME_DIR", self.path("run"))
            .env("PALISADE_STATE_DIR", self.path("state"))
            .env("PALISADE_CONFIG", self.path("palisade.toml"))
            .env("PALISADED", self.path("palisaded"))
            .env("__DRBD_NODE__", "alpha")
            .env("TZ", "UTC")
            .stdin(Stdio::null());
        if tool == "drbdadm" {
            command.args(["-c", "drbd.conf"]);
        }
        command.args(words);
        command
    }

    fn run(&self, line: &str) -> (i32, String, String) {
        let Output { status, stdout, stderr } = self.command(line).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let err: String = text(stderr)
            .lines()
            .filter(|l| !l.contains("__DRBD_NODE__") && !l.contains("PRETENDING") && !l.is_empty())
            .map(|l| format!("{l}\n"))
            .collect();
        (status.code().unwrap(), text(stdout), err)
    }

    fn ok(&self, line: &str) -> String {
        let (code, out, err) = self.run(line);
        assert_eq!(code, 0, "{line}\n{out}{err}");
        out
    }

    fn up(&self) {
        self.ok("drbdadm create-md r0");
        self.ok("drbdadm up r0");
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = self.command("drbdsetup down all").output();
    }
}

#[test]
fn a_resource_goes_up_and_down() {
    let site = Site::new();
    site.up();
    let status = "r0 role:Secondary\n  disk:Inconsistent open:no\n  beta connection:Connecting\n\n";
    assert_eq!(site.ok("drbdadm status r0"), status);
    assert_eq!(site.ok("drbdadm role r0"), "Secondary\n");
    assert_eq!(site.ok("drbdadm cstate r0"), "Connecting\n");
    assert_eq!(site.ok("drbdadm dstate r0"), "Inconsistent/DUnknown\n");
    assert_eq!(
        site.ok("drbdadm get-gi r0"),
        "0000000000000004:0000000000000000:0000000000000000:0000000000000000:1:0:0:0:0:0:0:0:0:0:0:0\n"
    );
    let json = site.ok("drbdadm status --json");
    assert!(json.contains("\"paths\": ["), "{json}");
    let show = site.ok("drbdsetup show r0");
    assert!(show.contains("    options {\n        quorum          \tmajority;\n    }\n"), "{show}");
    assert!(show.contains("_remote_host ipv4 127.0.0.2:7788;"), "{show}");
    site.ok("drbdadm down r0");
    assert!(!site.path("run/r0.sock").exists());
    site.ok("drbdadm down r0");
    assert_eq!(site.ok("drbdsetup status"), "# No currently configured DRBD found.\n");
}

#[test]
fn refusals_are_those_of_the_reference() {
    let site = Site::new();
    site.up();
    let (code, _, err) = site.run("drbdadm primary r0");
    assert_eq!(code, 17);
    assert_eq!(
        err,
        "r0: State change failed: (-2) Need access to UpToDate data\n\
         Command 'drbdsetup primary r0' terminated with exit code 17\n"
    );
    site.ok("drbdadm primary --force r0");
    assert_eq!(site.ok("drbdadm role r0"), "Primary\n");
    let (code, _, err) = site.run("drbdsetup verify r0 1 0");
    assert_eq!((code, err.as_str()), (20, "not supported by the bundled engine yet: verify\n"));
    let (code, _, err) = site.run("drbdsetup new-resource r0 0");
    assert_eq!((code, err.as_str()), (10, "r0: Failure: (174) Already exists\n"));
    let (code, _, err) = site.run("drbdsetup primary nosuch");
    assert_eq!((code, err.as_str()), (10, "nosuch: Failure: (158) Unknown resource\n"));
    let (code, _, err) = site.run("drbdsetup detach 4711");
    assert_eq!((code, err.as_str()), (10, "4711: Failure: (127) Device minor not allocated\n"));
    let (code, out, err) = site.run("drbdsetup status --json nosuch");
    assert_eq!((code, out.as_str(), err.as_str()), (10, "[\n]\n\n", "nosuch: No such resource\n"));
}

#[test]
fn adjust_does_the_least_and_nothing_twice() {
    let site = Site::new();
    site.ok("drbdadm create-md r0");
    let first = site.ok("drbdadm -v adjust r0");
    assert!(first.starts_with("drbdsetup new-resource r0 0 --quorum=majority\n"), "{first}");
    assert_eq!(site.ok("drbdadm -v adjust r0"), "");
    site.configure("ping-int 3;");
    let second = site.ok("drbdadm -v adjust r0");
    assert_eq!(
        second.lines().map(|l| l.split(' ').take(4).collect::<Vec<_>>().join(" ")).collect::<Vec<_>>(),
        ["drbdsetup net-options r0 1"]
    );
    assert_eq!(site.ok("drbdadm -v adjust r0"), "");
    site.ok("drbdadm disconnect r0");
    assert_eq!(site.ok("drbdadm -v adjust r0"), "drbdsetup connect r0 1\n");
    site.ok("drbdadm detach r0");
    let attach = site.ok("drbdadm -v adjust r0");
    let verbs: Vec<&str> = attach.lines().filter_map(|l| l.split(' ').next_back()).collect();
    assert_eq!(attach.lines().count(), 3, "{attach}");
    assert_eq!(verbs.get(..2), Some(["repair-md", "apply-al"].as_slice()), "{attach}");
}

#[test]
fn adjust_tells_its_progress_and_names_what_it_would_touch() {
    let site = Site::new();
    site.ok("drbdadm create-md r0");
    assert_eq!(site.ok("drbdadm sh-list-adjustable"), "r0\n");
    let told = site.ok("drbdadm adjust-with-progress r0");
    let stages = [
        "     create res: r0",
        "   prepare disk: r0",
        "    prepare net: r0",
        "    adjust disk: r0",
        "attempt to connect: r0",
    ];
    assert_eq!(told, format!("[\n{}\n]\n", stages.join("\n")));
    assert_eq!(site.ok("drbdadm sh-list-adjustable"), "");
    assert_eq!(site.ok("drbdadm adjust-with-progress r0"), "[\n]\n");
    site.configure("ping-int 3;");
    assert_eq!(site.ok("drbdadm sh-list-adjustable"), "r0\n");
    assert_eq!(site.ok("drbdadm -d adjust-with-progress r0").lines().count(), 1);
}

#[test]
fn a_stage_that_fails_is_told_and_the_next_ones_go_on() {
    let site = Site::new();
    let (code, told, err) = site.run("drbdadm adjust-with-progress r0");
    assert_eq!((code, err.as_str()), (1, ""));
    assert!(told.contains("    adjust disk: r0:failed(attach:1)\n"), "{told}");
    assert!(told.ends_with("attempt to connect: r0\n]\n"), "{told}");
}

#[test]
fn waiting_with_a_way_out_ends_when_its_waiters_do() {
    let site = Site::new();
    site.up();
    std::fs::write(
        site.path("drbd.conf"),
        std::fs::read_to_string(site.path("drbd.conf"))
            .unwrap()
            .replace("handlers", "startup { wfc-timeout 1; } handlers"),
    )
    .unwrap();
    assert_eq!(site.ok("drbdadm -d wait-con-int"), "drbdsetup wait-connect-resource r0 --wfc-timeout=1\n");
    let dots = site.ok("drbdadm wait-con-int");
    assert!(!dots.is_empty() && dots.chars().all(|c| c == '.'), "{dots}");
}

#[test]
fn metadata_of_an_attached_disk_is_not_touched() {
    let site = Site::new();
    site.up();
    let (code, _, err) = site.run("drbdadm create-md --force r0");
    assert_eq!(code, 20);
    assert!(err.starts_with("Device '1077' is configured!\n"), "{err}");
    site.ok("drbdadm down r0");
    let (code, out, err) = site.run("drbdadm create-md r0");
    assert_eq!((code, out.as_str()), (1, "Operation cancelled.\n"));
    assert!(err.contains("Do you really want to overwrite the existing meta-data?"), "{err}");
    site.ok("drbdadm create-md --force r0");
}

#[test]
fn a_file_system_is_not_overwritten() {
    let site = Site::new();
    let mut head = vec![0_u8; 8192];
    head[..4].copy_from_slice(b"XFSB");
    head[4..8].copy_from_slice(&4096_u32.to_be_bytes());
    head[8..16].copy_from_slice(&2048_u64.to_be_bytes());
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::File::options().write(true).open(site.path("disk")).unwrap(),
        &head,
        0,
    )
    .unwrap();
    let before = std::fs::read(site.path("disk")).unwrap();
    let (code, out, _) = site.run("drbdadm create-md --force r0");
    assert_eq!(code, 40, "{out}");
    assert!(out.contains("Found xfs filesystem"), "{out}");
    assert!(out.ends_with("Operation refused.\n\n"), "{out}");
    assert_eq!(std::fs::read(site.path("disk")).unwrap(), before);
    head.fill(0);
    head[100] = 1;
    std::fs::write(site.path("disk"), [head, vec![0; 8 << 20]].concat()).unwrap();
    let (code, out, err) = site.run("drbdadm create-md r0");
    assert_eq!(code, 1, "{out}{err}");
    assert!(err.contains("stdin not a TTY, not waiting for confirmation"), "{err}");
}

/// Ends a test that would otherwise wait for a line for ever.
fn kill_later(pid: u32) {
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_secs(60));
        let _ = Command::new("kill").arg(pid.to_string()).status();
    });
}

#[test]
fn events_are_followed_from_start_to_end() {
    let site = Site::new();
    let mut child = site.command("drbdsetup events2 --timestamps").stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    kill_later(child.id());
    assert!(lines.next().unwrap().ends_with(" exists -"));
    site.up();
    let created = lines.next().unwrap();
    assert!(
        created.ends_with("create resource name:r0 role:Secondary suspended:no force-io-failures:no may_promote:no promotion_score:0"),
        "{created}"
    );
    site.ok("drbdadm primary --force r0");
    let primary = lines.by_ref().find(|l| l.contains("role:Primary")).unwrap();
    assert!(
        primary.starts_with("2026-11-20T16:00:00.000000+00:00 change resource name:r0 role:Primary"),
        "{primary}"
    );
    assert_eq!(
        site.ok("drbdsetup events2 --now r0"),
        "exists resource name:r0 role:Primary suspended:no force-io-failures:no may_promote:no promotion_score:10101\n\
         exists connection name:r0 peer-node-id:1 conn-name:beta connection:Connecting role:Unknown\n\
         exists device name:r0 volume:0 minor:1077 backing_dev:DIR/disk disk:UpToDate client:no open:no quorum:yes\n\
         exists peer-device name:r0 peer-node-id:1 conn-name:beta volume:0 replication:Off peer-disk:DUnknown peer-client:no resync-suspended:no\n\
         exists path name:r0 peer-node-id:1 conn-name:beta local:ipv4:127.0.0.1:7788 peer:ipv4:127.0.0.2:7788 established:no\n\
         exists -\n"
            .replace("DIR", &site.dir.path().display().to_string())
    );
    site.ok("drbdadm down r0");
    let ends: Vec<String> = lines
        .by_ref()
        .filter_map(|l| l.split_once(" destroy ").map(|(_, what)| what.split(' ').next().unwrap().to_owned()))
        .take(5)
        .collect();
    assert_eq!(ends, ["path", "peer-device", "connection", "device", "resource"]);
    // A second life of the same resource.
    site.ok("drbdadm up r0");
    assert!(lines.by_ref().any(|l| l.contains(" create resource name:r0 ")));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn waits_end_in_time() {
    let site = Site::new();
    site.up();
    let (code, _, err) = site.run("drbdadm wait-connect --wfc-timeout=1 r0");
    assert_eq!(code, 5, "{err}");
    site.ok("drbdadm disconnect r0");
    site.ok("drbdadm wait-connect --wfc-timeout=1 r0");
}

#[test]
fn mistakes_get_a_clear_sentence() {
    let site = Site::new();
    let (code, _, err) = site.run("drbdadm priamry r0");
    assert_eq!((code, err.as_str()), (1, "drbdadm: Unknown command 'priamry' Did you mean 'primary'?\n"));
    let (code, _, err) = site.run("drbdadm primary ro");
    assert_eq!(
        (code, err.as_str()),
        (1, "'ro' not defined in your config (for this host). Did you mean 'r0'?\n")
    );
    let (code, _, err) = site.run("drbdsetup new-peer r0 1 --protocl=C");
    assert_eq!((code, err.as_str()), (20, "unrecognized option '--protocl'. Did you mean 'protocol'?\n"));
    for (line, code, sentence) in [
        ("drbdadm proxy-up r0", 10, "There is no proxy config for the peer in resource r0.\n"),
        ("drbdadm attach r0/x", 20, "x is not a valid number\n"),
        ("drbdadm primary r0 r0", 1, "USAGE_BUG: r0 would enable an already enabled connection\n"),
        ("drbdadm disconnect r0:beta r0", 1, "USAGE_BUG: r0 would enable an already enabled connection\n"),
        ("drbdadm 1:2 primary r0", 1, "drbdadm: the primary command takes no word '1:2' for the back end\n"),
        (
            "drbdadm up r0:gamma",
            1,
            "Not a valid connection (r0:gamma) for this host\n'r0:gamma' unexpected ctx_by_* result r=-2\n",
        ),
    ] {
        let (got, _, err) = site.run(line);
        assert_eq!((got, err.as_str()), (code, sentence), "{line}");
    }
    site.configure("ping-itn 3;");
    let (code, _, err) = site.run("drbdadm up r0");
    assert_eq!(code, 10);
    assert!(err.contains("drbd.conf:5: ") && err.ends_with("Did you mean 'ping-int'?\n"), "{err}");
}

#[test]
fn secrets_are_not_printed_by_failures() {
    let site = Site::new();
    std::fs::write(site.path("palisaded"), "#!/bin/sh\nexit 3\n").unwrap();
    let (code, out, err) = site.run("drbdadm up r0");
    assert_eq!(code, 1);
    assert!(err.contains("ended at once (exit status: 3)"), "{err}");
    assert!(!out.contains("geheim") && !err.contains("geheim"), "{out}{err}");
    let (code, out, err) = site.run("drbdadm new-peer r0");
    assert_eq!(code, 10);
    assert!(err.contains("--shared-secret=\\(hidden\\)"), "{err}");
    assert!(!out.contains("geheim") && !err.contains("geheim"), "{out}{err}");
}

#[test]
fn handlers_run_by_name() {
    let site = Site::new();
    assert_eq!(site.ok("drbdadm fence-peer r0"), "fencing\n");
    assert_eq!(site.ok("drbdadm split-brain r0"), "");
}

#[test]
fn a_kernel_tool_never_calls_us() {
    let site = Site::new();
    let output = site.command("drbdsetup status").env("PALISADE_KERNEL_TOOL", "1").output().unwrap();
    assert_eq!(output.status.code(), Some(20));
}

/// Two working connections change their addresses: one after the other, with a wait between.
#[test]
fn adjust_never_drops_all_connections_at_once() {
    let site = Site::new();
    let hosts: String = ["alpha", "beta", "gamma"]
        .iter()
        .enumerate()
        .map(|(id, name)| {
            format!(
                "on {name} {{ node-id {id}; device minor 7; disk /dev/x; meta-disk internal; address 10.0.0.{id}:7000; }}\n"
            )
        })
        .collect();
    let conf = format!(
        "global {{ disable-ip-verification; }} resource r0 {{ {hosts} connection-mesh {{ hosts alpha beta gamma; }} }}\n"
    );
    std::fs::write(site.path("drbd.conf"), conf).unwrap();
    let connections: String = [1, 2]
        .iter()
        .map(|id| {
            format!(
                "connection {{ _peer_node_id {id}; path {{ _this_host ipv4 10.0.0.0:7000; _remote_host ipv4 10.9.9.{id}:7000; }} _cstate Connected; }}\n"
            )
        })
        .collect();
    let running = format!(
        "resource r0 {{ _this_host {{ node-id 0; volume 0 {{ device minor 7; disk /dev/x; meta-disk internal; }} }} {connections} }}\n"
    );
    std::fs::write(site.path("running"), running).unwrap();
    let output = site
        .command("drbdadm -d adjust r0")
        .env("FAKE_DRBDSETUP_SHOW", site.path("running"))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let verbs: Vec<&str> = text.lines().map(|l| l.split(' ').nth(1).unwrap()).collect();
    assert_eq!(
        verbs,
        [
            "disconnect",
            "del-path",
            "new-path",
            "connect",
            "wait-connect-resource",
            "disconnect",
            "del-path",
            "new-path",
            "connect"
        ],
        "{text}"
    );
    assert!(text.contains("--wfc-timeout=1 --degr-wfc-timeout=1 --outdated-wfc-timeout=1\n"), "{text}");
}
