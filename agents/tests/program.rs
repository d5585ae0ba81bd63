//! The agent as Pacemaker runs it: a process with an environment, an engine behind a socket, tools that are
//! programs. The engine and the tools are made up and keep their state in files.
// The lint's exception for tests knows functions marked as tests only, not what they call.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use palisade_control::{
    ClientMessage, FrameDecoder, PROTOCOL_VERSION, Payload, Reply, ResourceStatus, ServerMessage, encode,
};

const STATUS: &str = r#"{
    "name": "r0", "node-id": 0, "role": "ROLE",
    "devices": [ { "volume": 0, "minor": 0, "disk-state": "UpToDate", "quorum": true } ],
    "connections": [ {
        "peer-node-id": 1, "name": "bob", "connection-state": "Connected", "peer-role": "Secondary",
        "peer_devices": [ { "volume": 0, "replication-state": "Established", "peer-disk-state": "UpToDate" } ]
    } ]
}"#;

/// Stands in for `palisade drbdadm -c CONF VERB r0`.
const TOOL: &str = r#"#!/bin/sh
cd "$(dirname "$0")" && echo "$*" >>calls
case "$4" in
up) touch up ;;
primary) touch primary ;;
secondary) rm -f primary ;;
down) rm -f up primary ;;
esac
"#;

struct Host {
    root: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self { root: tempfile::tempdir().unwrap() };
        host.program("palisade", TOOL);
        host.program("attrd_updater", "#!/bin/sh\necho \"$*\" >>\"$(dirname \"$0\")/scores\"\n");
        std::fs::write(host.path("drbd.conf"), "").unwrap();
        std::fs::write(host.path("palisade.toml"), "engine = \"bundled\"\n").unwrap();
        let listener = UnixListener::bind(host.path("r0.sock")).unwrap();
        let root = host.root.path().to_owned();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(stream.unwrap(), &root);
            }
        });
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn program(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
        std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What was written to that file since the last look.
    fn lines(&self, name: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.path(name)).unwrap_or_default();
        let _ = std::fs::remove_file(self.path(name));
        text.lines().map(str::to_owned).collect()
    }

    fn agent(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_palisade-agents"));
        command
            .arg("drbd")
            .env("PATH", format!("{}:/usr/bin:/bin", self.root.path().display()))
            .env("PALISADE_ADMIN", self.path("palisade"))
            .env("PALISADE_CONFIG", self.path("palisade.toml"))
            .env("PALISADE_RUNTIME_DIR", self.root.path())
            .env("OCF_RESOURCE_INSTANCE", "p_r0")
            .env("OCF_RESOURCE_TYPE", "drbd")
            .env("OCF_EXIT_REASON_PREFIX", "ocf-exit-reason:")
            .env("OCF_RESKEY_drbd_resource", "r0")
            .env("OCF_RESKEY_drbdconf", self.path("drbd.conf"))
            .env("OCF_RESKEY_CRM_meta_notify", "true")
            .env("OCF_RESKEY_CRM_meta_on_node", "alice")
            .env("OCF_RESKEY_CRM_meta_timeout", "5000");
        command
    }

    fn run(&self, action: &str) -> i32 {
        self.agent().arg(action).output().unwrap().status.code().unwrap()
    }
}

fn serve(mut stream: UnixStream, root: &Path) {
    let mut decoder = FrameDecoder::new();
    let mut chunk = [0_u8; 4096];
    loop {
        while let Some(message) = decoder.next_message().unwrap() {
            let answer = match message {
                ClientMessage::Hello { .. } => ServerMessage::Hello {
                    protocol: PROTOCOL_VERSION,
                    resource: "r0".into(),
                    version: "0".into(),
                },
                ClientMessage::Request { id, .. } => {
                    ServerMessage::Reply { id, reply: Reply::with(Payload::Status(status(root))) }
                }
            };
            stream.write_all(&encode(&answer).unwrap()).unwrap();
        }
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(count) => decoder.push(&chunk[..count]),
        }
    }
}

fn status(root: &Path) -> Option<ResourceStatus> {
    let role = if root.join("primary").exists() { "Primary" } else { "Secondary" };
    root.join("up").exists().then(|| serde_json::from_str(&STATUS.replace("ROLE", role)).unwrap())
}

#[test]
fn a_life_in_the_cluster() {
    let host = Host::new();
    let conf = host.path("drbd.conf").display().to_string();
    let call = |verb: &str| vec![format!("drbdadm -c {conf} {verb} r0")];
    let good = ["--name master-p_r0 --update 10000 --node alice"];

    assert_eq!(host.run("monitor"), 7);
    assert!(host.lines("calls").is_empty() && host.lines("scores").is_empty(), "a probe leaves no trace");

    assert_eq!(host.run("start"), 0);
    assert_eq!(host.lines("calls"), [call("dump"), call("up")].concat());
    assert_eq!(host.lines("scores"), good);

    assert_eq!(host.run("monitor"), 0);
    assert_eq!((host.lines("calls").len(), host.lines("scores").len()), (0, 1), "one child per monitor");

    assert_eq!(host.run("promote"), 0);
    assert_eq!(host.lines("calls"), call("primary"));
    assert_eq!(host.run("monitor"), 8);
    assert_eq!(host.run("status"), 8);
    assert_eq!(host.run("notify"), 0);
    assert_eq!(host.run("demote"), 0);
    assert_eq!(host.lines("calls"), call("secondary"));
    assert_eq!(host.run("reload"), 0);
    assert_eq!(host.run("reload-agent"), 0);
    assert_eq!(host.run("validate-all"), 0);
    host.lines("calls");
    host.lines("scores");

    assert_eq!(host.run("promote"), 0);
    assert_eq!(host.run("stop"), 0);
    assert_eq!(host.lines("calls"), [call("primary"), call("secondary"), call("down")].concat());
    assert_eq!(host.lines("scores"), ["--name master-p_r0 --delete --node alice"]);
    assert_eq!(host.run("stop"), 0);
    assert_eq!(host.run("monitor"), 7);
    assert_eq!(host.run("demote"), 7);
}

#[test]
fn exit_codes_of_wrong_calls() {
    let host = Host::new();
    let code = |args: &[&str]| host.agent().args(args).output().unwrap().status.code().unwrap();
    assert_eq!(code(&[]), 2);
    assert_eq!(code(&["monitor", "now"]), 2);
    assert_eq!(code(&["migrate_to"]), 3);
    assert_eq!(code(&["usage"]), 0);
    let nameless = host.agent().arg("monitor").env_remove("OCF_RESKEY_drbd_resource").output().unwrap();
    assert_eq!(nameless.status.code(), Some(6));
    let absent =
        host.agent().arg("validate-all").env("OCF_RESKEY_drbdconf", "/nonexistent").output().unwrap();
    assert_eq!(absent.status.code(), Some(5));
    for name in ["unknown", "un/known"] {
        let code = |action: &str| {
            let output = host.agent().arg(action).env("OCF_RESKEY_drbd_resource", name).output();
            output.unwrap().status.code()
        };
        assert_eq!((code("monitor"), code("stop")), (Some(7), Some(0)), "{name}");
    }
}

#[test]
fn an_exit_reason_is_one_prefixed_line() {
    let host = Host::new();
    host.program("palisade", "#!/bin/sh\necho 'no such\nthing' >&2\nexit 1\n");
    let output = host.agent().arg("start").output().unwrap();
    assert_eq!(output.status.code(), Some(5));
    let stderr = String::from_utf8(output.stderr).unwrap();
    let reasons: Vec<&str> =
        stderr.lines().filter_map(|line| line.strip_prefix("ocf-exit-reason:")).collect();
    let conf = host.path("drbd.conf").display().to_string();
    assert_eq!(reasons, [format!("DRBD resource r0 not found in configuration file {conf}.")]);
    assert!(output.stdout.is_empty());
}

#[test]
fn a_tool_that_hangs_is_ended_before_pacemaker_ends_us() {
    let host = Host::new();
    host.program("palisade", "#!/bin/sh\n[ \"$4\" = dump ] || sleep 60\n");
    let begun = std::time::Instant::now();
    let output = host.agent().arg("start").env("OCF_RESKEY_CRM_meta_timeout", "1500").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(begun.elapsed().as_millis() < 1500, "{:?}", begun.elapsed());
    assert!(String::from_utf8(output.stderr).unwrap().contains("was killed"));
}

/// The document type as the package resource-agents installs it.
const DTD: &str = "/usr/share/resource-agents/ra-api-1.dtd";

#[test]
fn meta_data_are_valid() {
    let host = Host::new();
    for version in ["0", "1"] {
        let output = host.agent().arg("meta-data").env_clear().env("OCF_RA_VERSION_MINOR", version).output();
        let output = output.unwrap();
        assert!(output.status.success() && output.stderr.is_empty());
        std::fs::write(host.path("meta.xml"), &output.stdout).unwrap();
        let checked =
            Command::new("xmllint").args(["--noout", "--dtdvalid", DTD]).arg(host.path("meta.xml")).output();
        match checked {
            Ok(checked) if Path::new(DTD).exists() => {
                assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
            }
            _ => eprintln!("xmllint or {DTD} is not installed: validity was not checked"),
        }
    }
}
