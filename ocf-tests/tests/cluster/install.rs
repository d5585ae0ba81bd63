//! `make install`: what lies where, and that it runs from there.

use palisade_ocf_tests::{Turn, must, run, staged};
use std::fs;
use std::os::unix::fs::PermissionsExt;

#[test]
fn programs_and_links_are_in_place() {
    let _turn = Turn::take().unwrap();
    let usr = staged().unwrap().join("usr");
    for program in ["sbin/palisade", "sbin/palisaded", "lib/palisade/palisade-agents"] {
        let mode = fs::metadata(usr.join(program)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755, "{program}");
    }
    let palisade = fs::canonicalize(usr.join("sbin/palisade")).unwrap();
    for name in ["drbdadm", "drbdsetup", "drbdmeta"] {
        let link = usr.join("lib/palisade/compat").join(name);
        assert!(fs::read_link(&link).unwrap().is_relative(), "{name} must work below any DESTDIR");
        assert_eq!(fs::canonicalize(&link).unwrap(), palisade);
    }
    let agent = usr.join("lib/ocf/resource.d/palisade/drbd");
    assert_eq!(
        fs::canonicalize(agent).unwrap(),
        fs::canonicalize(usr.join("lib/palisade/palisade-agents")).unwrap()
    );
    let unit = fs::read_to_string(usr.join("lib/systemd/system/palisaded@.service")).unwrap();
    assert!(unit.contains("\nExecStart=/usr/sbin/palisaded %I\n"), "{unit}");
}

#[test]
fn the_called_name_chooses_the_tool() {
    let _turn = Turn::take().unwrap();
    let usr = staged().unwrap().join("usr");
    let palisade = usr.join("sbin/palisade").display().to_string();
    for name in ["drbdadm", "drbdsetup", "drbdmeta"] {
        let link = usr.join("lib/palisade/compat").join(name).display().to_string();
        let by_name = run(&[link.as_str(), "--help"], "").unwrap();
        let by_verb = run(&[palisade.as_str(), name, "--help"], "").unwrap();
        assert_eq!((by_name.code, &by_name.out), (by_verb.code, &by_verb.out), "{name}");
        assert!(!by_name.out.is_empty() || !by_name.err.is_empty(), "{name} --help says nothing");
    }
    let version = must(&[palisade.as_str(), "drbdadm", "--version"]).unwrap();
    assert!(version.contains("DRBDADM_VERSION"), "{version}");
}
