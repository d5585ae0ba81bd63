//! Any text may come in: nothing panics, and what loads is dumped in a form that loads and dumps the same.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::LazyLock;

use palisade_conf::dump::DumpOptions;
use palisade_conf::{Config, HostIdentity, MemorySource, options};
use proptest::prelude::*;

/// Every file of the recorded cases, by `CASE/FILE`.
static FILES: LazyLock<BTreeMap<String, Vec<u8>>> = LazyLock::new(|| {
    let packed = include_bytes!("golden/cases.tar.zst");
    let mut archive = tar::Archive::new(zstd::Decoder::new(packed.as_slice()).unwrap());
    let mut files = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut text = Vec::new();
        entry.read_to_end(&mut text).unwrap();
        files.insert(path, text);
    }
    files
});

static CASES: LazyLock<Vec<&'static str>> =
    LazyLock::new(|| FILES.keys().filter_map(|path| path.strip_suffix("/input.conf")).collect());

fn source(case: &str, input: &[u8]) -> MemorySource {
    let mut source = MemorySource::new();
    for (path, text) in FILES.iter() {
        if let Some(file) = path.strip_prefix(case).and_then(|rest| rest.strip_prefix('/')) {
            source = source.with(file, text.clone());
        }
    }
    source.with("input.conf", input)
}

/// Dumps without the lines that name places.
fn dump(source: &MemorySource, expanded: bool) -> Option<String> {
    let config = Config::load("input.conf", source).ok()?;
    let host = HostIdentity::from("alpha");
    for resource in config.resources() {
        let _ = resource.view_as(&host);
        let _ = resource.resync_after_problems(&host);
        let _ = resource.check_address(&host);
    }
    let _ = config.check(&host);
    let text = config.dump(&host, DumpOptions { expanded }).ok()?;
    let text: String =
        text.lines().filter(|line| !line.starts_with("# ")).map(|line| format!("{line}\n")).collect();
    // Shown when verbose only.
    Some(text.replace("global {\n}\n\n", ""))
}

/// The reference's plain format loses the volumes of stacked sections: only the expanded dump can be read
/// again, and has to be dumped expanded again.
fn loses_volumes(dump: &str) -> bool {
    dump.contains("stacked-on-top-of")
}

fn fixpoint(case: &str, input: &[u8]) -> Result<(), TestCaseError> {
    for expanded in [false, true] {
        let Some(first) = dump(&source(case, input), expanded) else { continue };
        if loses_volumes(&first) && !expanded {
            continue;
        }
        let again = source(case, first.as_bytes());
        if let Err(error) = Config::load("input.conf", &again) {
            return Err(TestCaseError::fail(format!("the dump does not load: {error}\n{first}")));
        }
        prop_assert_eq!(dump(&again, loses_volumes(&first)), Some(first));
    }
    Ok(())
}

#[test]
fn dumps_of_recorded_cases_are_fixpoints() {
    for case in CASES.iter() {
        fixpoint(case, &FILES[&format!("{case}/input.conf")]).unwrap();
    }
}

/// Pieces of the language, right and wrong.
fn piece() -> impl Strategy<Value = String> {
    let words: Vec<&'static str> = vec![
        "{",
        "}",
        ";",
        "[",
        "]",
        ":",
        "\"",
        "\"quoted name\"",
        "\"\\\"\\\\\"",
        "\"on\"",
        "\"\"",
        "resource r",
        "common",
        "global",
        "include",
        "skip",
        "on alpha",
        "on beta",
        "floating 10.0.0.1:7;",
        "stacked-on-top-of r",
        "disk",
        "disk none;",
        "net",
        "options",
        "startup",
        "handlers",
        "proxy",
        "syncer",
        "device minor 1;",
        "device /dev/drbd_x minor 3;",
        "meta-disk /dev/m [1];",
        "volume 0",
        "volume 99999999",
        "connection",
        "connection-mesh",
        "hosts alpha beta;",
        "host alpha;",
        "path",
        "via proxy on alpha",
        "inside 10.0.0.1:1;",
        "outside 10.0.0.2:2;",
        "node-id 0;",
        "node-id 1;",
        "address 10.0.0.1:7;",
        "address ipv6 [::1]:7;",
        "timeout 60;",
        "timeout 1G;",
        "c-max-rate 1M;",
        "protocol C;",
        "al-extents 99999999;",
        "_this_host",
        "_remote_host ipv4 1.2.3.4:5;",
        "_peer_node_id 4;",
        "_unknown x;",
        "template-file input.conf;",
        "require-drbd-module-version-ge 9.0.0;",
        "resync-after r/0;",
        "99999999G",
        "é",
        "\u{0}",
        "#",
        "\n",
    ];
    let names: Vec<String> = options::table().iter().map(|spec| format!("{} yes;", spec.name)).collect();
    prop_oneof![
        3 => proptest::sample::select(words).prop_map(str::to_owned),
        1 => proptest::sample::select(names),
    ]
}

#[derive(Debug, Clone)]
enum Edit {
    Insert(String),
    Delete(usize),
    Byte(u8),
    Copy(usize, usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        4 => piece().prop_map(Edit::Insert),
        2 => (1..40_usize).prop_map(Edit::Delete),
        1 => any::<u8>().prop_map(Edit::Byte),
        2 => (any::<usize>(), 1..200_usize).prop_map(|(from, length)| Edit::Copy(from, length)),
    ]
}

fn apply(text: &mut Vec<u8>, at: usize, edit: &Edit) {
    let at = at % (text.len() + 1);
    match edit {
        Edit::Insert(piece) => {
            text.splice(at..at, format!(" {piece} ").into_bytes());
        }
        Edit::Delete(length) => {
            let end = (at + length).min(text.len());
            text.drain(at..end);
        }
        Edit::Byte(byte) => {
            if let Some(slot) = text.get_mut(at) {
                *slot = *byte;
            }
        }
        Edit::Copy(from, length) => {
            let from = from % (text.len() + 1);
            let copy = text[from..(from + length).min(text.len())].to_vec();
            text.splice(at..at, copy);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_cases_do_no_harm(
        case in any::<proptest::sample::Index>(),
        edits in proptest::collection::vec((any::<usize>(), edit()), 1..5),
    ) {
        let case = CASES[case.index(CASES.len())];
        let mut text = FILES[&format!("{case}/input.conf")].clone();
        for (at, edit) in &edits {
            apply(&mut text, *at, edit);
        }
        fixpoint(case, &text)?;
    }

    #[test]
    fn soup_does_no_harm(pieces in proptest::collection::vec(piece(), 0..60)) {
        fixpoint("v50-empty-file", pieces.join(" ").as_bytes())?;
    }

    #[test]
    fn noise_does_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        fixpoint("v50-empty-file", &bytes)?;
        let _ = Config::parse_running(&String::from_utf8_lossy(&bytes));
    }

    /// Names and values of any kind survive a dump.
    #[test]
    fn names_and_values_survive(
        names in proptest::collection::vec("[ -~é]{1,20}", 5),
        minors in proptest::collection::vec(0..1000_u32, 3),
        node_ids in (0..16_u32, 16..33_u32),
        secret in "[ -~]{0,60}",
        handler in "[ -~]{0,200}",
        timeout in 1..600_u32,
        implicit in any::<bool>(),
        mesh in any::<bool>(),
    ) {
        let quote = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        let volume = if implicit {
            format!("device minor {}; disk {};", minors[0], quote(&format!("/dev/{}", names[2])))
        } else {
            let (a, b) = (minors[0], minors[1] + 1000);
            let disk = quote(&names[2]);
            format!("volume 0 {{ device /dev/drbd{a}; disk {disk}; meta-disk {}; }} volume 7 {{ device minor {b}; disk none; }}", quote(&names[3]))
        };
        let (a, b) = (quote(&names[0]), quote(&format!("{}x", names[1])));
        let mesh = if mesh { format!("connection-mesh {{ hosts {a} {b}; }}") } else { String::new() };
        let text = format!(
            "common {{ net {{ timeout {timeout}; }} }} resource {} {{ {volume} on {a} {{ node-id {}; address 10.0.0.1:1; }} \
             on {b} {{ node-id {}; address ipv6 [fe80::1%e]:1; }} {mesh} net {{ shared-secret {}; }} handlers {{ split-brain {}; }} }}",
            quote(&names[4]), node_ids.0, node_ids.1, quote(&secret), quote(&handler),
        );
        fixpoint("v50-empty-file", text.as_bytes())?;
        let source = MemorySource::new().with("input.conf", text.clone());
        let config = match Config::load("input.conf", &source) {
            Ok(config) => config,
            Err(error) => {
                // The same disk or metadata device in two volumes.
                prop_assert!(error.to_string().contains("conflicting use"), "{}\n{}", error, text);
                return Ok(());
            }
        };
        let resource = &config.resources()[0];
        prop_assert_eq!(&resource.name, &names[4]);
        prop_assert_eq!(resource.body.net.value("shared-secret"), Some(secret.as_str()));
        prop_assert_eq!(resource.body.handlers.value("split-brain"), Some(handler.as_str()));
        if secret.len() > 5 && !text.replace(&quote(&secret), "").contains(&secret) {
            let debug = format!("{config:?}");
            prop_assert!(!debug.contains(&secret));
        }
    }
}
