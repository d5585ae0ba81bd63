//! `ocf:palisade:drbd` as Pacemaker's own tools see it.

use palisade_ocf_tests::{Lab, Turn, must, run, staged};

const AGENT: &str = "/usr/lib/ocf/resource.d/palisade/drbd";

/// Two hosts, of which only alice runs: the tester wants one node that can be promoted alone.
const CONFIGURATION: &str = r#"
global { usage-count no; }
resource r0 {
    net { cram-hmac-alg sha256; shared-secret "of the agent's test"; }
    device /dev/drbd0 minor 0;
    disk /dev/vdb;
    meta-disk internal;
    on alice { node-id 0; address ipv4 10.43.71.11:7789; }
    on bob { node-id 1; address ipv4 10.43.71.12:7789; }
}
"#;

#[test]
fn meta_data_is_valid_and_needs_no_privilege() {
    let _turn = Turn::take().unwrap();
    let stage = staged().unwrap();
    // Not everybody may enter the build's directory: nobody runs a copy.
    let directory = must(&["mktemp", "-d", "/tmp/palisade-agent.XXXXXX"]).unwrap().trim().to_owned();
    must(&["chmod", "755", &directory]).unwrap();
    let copy = format!("{directory}/drbd");
    let agents = stage.join("usr/lib/palisade/palisade-agents").display().to_string();
    must(&["cp", &agents, &copy]).unwrap();
    let ran = run(
        &["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "env", "-i", &copy, "meta-data"],
        "",
    )
    .unwrap();
    must(&["rm", "-r", &directory]).unwrap();
    assert!(ran.success, "{}", ran.err);
    let valid =
        run(&["xmllint", "--noout", "--dtdvalid", "/usr/share/resource-agents/ra-api-1.dtd", "-"], &ran.out)
            .unwrap();
    assert!(valid.success, "{}\n{}", valid.err, ran.out);
}

#[test]
fn cluster_shells_describe_the_agent() {
    let _turn = Turn::take().unwrap();
    let lab = Lab::up(1, &staged().unwrap(), &[]).unwrap();
    let crm = lab.must_on("alice", &["crm", "ra", "info", "ocf:palisade:drbd"]).unwrap();
    assert!(crm.contains("drbd_resource") && crm.contains("Operations' defaults"), "{crm}");
    let pcs = lab.must_on("alice", &["pcs", "resource", "describe", "ocf:palisade:drbd"]).unwrap();
    assert!(pcs.contains("drbd_resource (required)") && pcs.contains("promote:"), "{pcs}");
    let list = lab.must_on("alice", &["crm_resource", "--list-agents", "ocf:palisade"]).unwrap();
    assert_eq!(list.trim(), "drbd");
}

#[test]
fn ocf_tester_has_no_complaint() {
    let _turn = Turn::take().unwrap();
    let lab = Lab::up(1, &staged().unwrap(), &["--disk-size", "64M"]).unwrap();
    lab.write("alice", "/etc/drbd.conf", CONFIGURATION).unwrap();
    lab.must_on("alice", &["palisade", "drbdadm", "create-md", "r0"]).unwrap();
    lab.must_on("alice", &["palisade", "drbdadm", "up", "r0"]).unwrap();
    lab.must_on("alice", &["palisade", "drbdadm", "primary", "--force", "r0"]).unwrap();
    lab.must_on("alice", &["palisade", "drbdadm", "secondary", "r0"]).unwrap();
    lab.must_on("alice", &["palisade", "drbdadm", "down", "r0"]).unwrap();
    let ran = lab
        .on(
            "alice",
            &[
                "env",
                "OCF_RESKEY_CRM_meta_clone_max=2",
                "OCF_RESKEY_CRM_meta_clone_node_max=1",
                "OCF_RESKEY_CRM_meta_notify=true",
                "ocf-tester",
                "-v",
                "-n",
                "drbd_r0",
                "-o",
                "drbd_resource=r0",
                "-o",
                "wfc_timeout=1",
                AGENT,
            ],
            "",
        )
        .unwrap();
    assert!(ran.success, "{}{}", ran.out, ran.err);
    assert!(ran.out.contains(&format!("{AGENT} passed all tests")), "{}", ran.out);
    let complaints: Vec<&str> = ran.out.lines().filter(|line| line.starts_with("* rc=")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    // Stopped means: no engine, no device.
    assert_eq!(lab.on("alice", &["pgrep", "-x", "palisaded"], "").unwrap().code, Some(1));
    assert!(!lab.on("alice", &["test", "-b", "/dev/drbd0"], "").unwrap().success);
}
