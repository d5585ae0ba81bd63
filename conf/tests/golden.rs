//! Cases recorded from the reference: every accepted configuration loads and dumps the same text, every
//! refused one is refused with the same words at the same place.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io::Read;

use palisade_conf::dump::DumpOptions;
use palisade_conf::{Config, HostIdentity, LoadOptions, MemorySource, MetaDisk, ModuleVersion, Notice};

type Case = BTreeMap<String, Vec<u8>>;

fn cases() -> BTreeMap<String, Case> {
    let packed = include_bytes!("golden/cases.tar.zst");
    let mut archive = tar::Archive::new(zstd::Decoder::new(packed.as_slice()).unwrap());
    let mut cases: BTreeMap<String, Case> = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let (case, file) = path.split_once('/').unwrap();
        let mut text = Vec::new();
        entry.read_to_end(&mut text).unwrap();
        cases.entry(case.to_owned()).or_default().insert(file.to_owned(), text);
    }
    cases
}

fn text(case: &Case, file: &str) -> String {
    case.get(file).map(|bytes| String::from_utf8(bytes.clone()).unwrap()).unwrap_or_default()
}

#[derive(Debug, PartialEq, Eq, Default, Clone)]
struct Outcome {
    rc: u8,
    out: Vec<String>,
    err: Vec<String>,
}

/// The recorded outcome of the newest release; opaque token numbers and the closing line of `sh-nop` are
/// left out.
fn recorded(case: &Case, label: &str) -> Outcome {
    let mut outcome = Outcome::default();
    let mut ours = false;
    let newest = if case.contains_key("expected-9.34") { "expected-9.34" } else { "expected" };
    for line in text(case, newest).lines() {
        if let Some(head) = line.strip_prefix("=== ") {
            let (name, rc) = head.split_once(" rc=").unwrap();
            ours = name == label;
            if ours {
                outcome.rc = rc.parse().unwrap();
            }
        } else if !ours {
        } else if let Some(line) = line.strip_prefix('>') {
            outcome.out.push(line.to_owned());
        } else if let Some(line) = line.strip_prefix('!')
            && !line.starts_with("command sh-nop exited")
        {
            let line = line.split_once(" (TK ").map_or(line, |(line, _)| line);
            outcome.err.push(line.to_owned());
        }
    }
    outcome
}

/// What this crate makes of a `drbdadm` command line.
fn run(case: &Case, node: &str, args: &[&str]) -> Outcome {
    let mut source = MemorySource::new();
    for (name, bytes) in case {
        source = source.with(name, bytes.clone());
    }
    let mut file = "";
    let (mut more, mut excluded) = (Vec::new(), Vec::new());
    let mut verbose = false;
    let mut command = Vec::new();
    let mut args = args.iter();
    while let Some(&arg) = args.next() {
        match arg {
            "-c" => file = args.next().unwrap(),
            "-t" => more.push(*args.next().unwrap()),
            "-E" => excluded.push(*args.next().unwrap()),
            "-v" => verbose = true,
            "-S" => {}
            _ => command.push(arg),
        }
    }
    let host = HostIdentity::from(node);
    let options =
        LoadOptions { more: &more, already_read: &excluded, module_version: Some(ModuleVersion(9, 2, 0)) };
    let mut outcome = Outcome::default();
    let told = |notices: &[Notice]| -> Vec<String> {
        let shown = notices.iter().filter(|n| verbose || !matches!(n, Notice::NoIncludeMatch { .. }));
        shown.flat_map(|n| n.to_string().lines().map(str::to_owned).collect::<Vec<_>>()).collect()
    };
    let result = Config::load_with(file, &source, &options).and_then(|config| {
        outcome.err.extend(told(&config.notices));
        if command == ["sh-nop"] {
            return config.check(&host).map(|()| String::new());
        }
        let options = DumpOptions { expanded: verbose };
        let xml = command.first() == Some(&"dump-xml");
        match (command.get(1), xml) {
            (Some(name), false) => config.dump_resource(name, &host, options),
            (Some(name), true) => config.dump_xml_resource(name, &host, options),
            (None, false) => config.dump(&host, options),
            (None, true) => config.dump_xml(&host, options),
        }
    });
    match result {
        Ok(dump) => outcome.out = dump.lines().map(str::to_owned).collect(),
        Err(error) => {
            outcome.rc = error.exit_code();
            outcome.err.extend(told(error.notices()));
            outcome.err.extend(error.to_string().lines().map(str::to_owned));
        }
    }
    outcome
}

/// Deliberate departures: where the reference is wrong.
fn departs(case: &str, args: &str) -> bool {
    match case {
        // The reference compares versions as unsigned differences (spec/drbd-conf.md §3.4).
        "e57-module-version-too-old" => true,
        "e77-module-version-operators" => {
            ["gt-9.3", "ge-9.3", "lt-9.3", "le-9.1", "le-9.3"].iter().any(|name| args.contains(name))
        }
        _ => false,
    }
}

#[test]
fn dumps_and_refusals_are_those_of_the_reference() {
    let (mut total, mut wrong) = (0, Vec::new());
    for (name, case) in &cases() {
        for line in text(case, "cmd").lines().filter(|line| !line.starts_with('#')) {
            let fields: Vec<&str> = line.splitn(4, '|').collect();
            let &[label, node, _, args] = fields.as_slice() else { panic!("{name}: {line}") };
            let words: Vec<&str> = args.split(' ').collect();
            let mine = words.iter().any(|word| matches!(*word, "dump" | "dump-xml" | "sh-nop"));
            if !mine || departs(name, args) {
                continue;
            }
            let (expected, got) = (recorded(case, label), run(case, node, &words));
            total += 1;
            if got != expected {
                wrong.push(format!("{name} {label}\nwant {expected:#?}\ngot {got:#?}"));
            }
        }
    }
    println!("{total} dumps and refusals");
    assert!(wrong.is_empty(), "{} of {total} differ\n{}", wrong.len(), wrong.join("\n"));
    assert!(total > 300, "{total}");
}

#[test]
fn running_descriptions_parse() {
    for (name, text) in &cases()["v46-adjust-against-running"] {
        if name.starts_with("running") {
            let resources = Config::parse_running(std::str::from_utf8(text).unwrap()).unwrap();
            assert!(name.contains("empty") || resources.len() == 1, "{name}");
        }
    }
}

/// The low-level commands that a view stands for, in the order of `drbdadm up all`.
fn commands(config: &Config, host: &HostIdentity) -> Vec<String> {
    let arguments = |options: &palisade_conf::options::OptionList| -> String {
        options.iter().map(|option| format!(" --{}={}", option.name(), option.value())).collect()
    };
    let mut groups: [Vec<String>; 7] = Default::default();
    for resource in config.resources() {
        if resource.is_ignored(host) || resource.is_proxy_node(host) {
            continue;
        }
        let view = resource.view_as(host).unwrap();
        if view.stacked_on.is_some() {
            continue;
        }
        let name = &view.resource;
        groups[0].push(format!("new-resource {name} {}{}", view.node_id, arguments(&view.options)));
        for volume in &view.volumes {
            let diskless = if volume.disk.is_none() { " --diskless" } else { "" };
            let options = arguments(&volume.device_options);
            groups[1].push(format!("new-minor {name} {} {}{diskless}{options}", volume.minor, volume.vnr));
            let (Some(disk), Some(meta)) = (&volume.disk, &volume.meta_disk) else { continue };
            let (device, index) = match meta {
                MetaDisk::Internal => (disk, "internal".to_owned()),
                MetaDisk::Flexible(device) => (device, "flexible".to_owned()),
                MetaDisk::Indexed { device, index } => (device, index.to_string()),
            };
            let options = arguments(&volume.attach_options);
            groups[5].push(format!("attach {} {disk} {device} {index}{options}", volume.minor));
        }
        for peer in &view.peers {
            let id = peer.node_id;
            groups[2].push(format!(
                "new-peer {name} {id} --_name={}{}",
                peer.connection_name,
                arguments(&peer.net)
            ));
            for path in &peer.paths {
                groups[3].push(format!("new-path {name} {id} {} {}", path.own, path.peer));
            }
            for volume in &peer.volumes {
                if !volume.options.is_empty() {
                    let options = arguments(&volume.options);
                    groups[4].push(format!("peer-device-options {name} {id} {}{options}", volume.vnr));
                }
            }
            groups[6].push(format!("connect {name} {id}"));
        }
    }
    groups.concat().into_iter().map(|command| format!("drbdsetup {command}")).collect()
}

/// The reference protects special characters from the shell.
fn unescaped(line: &str) -> String {
    let mut out = String::new();
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap() } else { c });
    }
    out
}

#[test]
fn views_say_what_up_does() {
    let (mut total, mut same) = (0, 0);
    for (name, case) in &cases() {
        for line in
            text(case, "cmd").lines().filter(|line| line.ends_with(" up all") && !line.contains(" -S "))
        {
            let fields: Vec<&str> = line.split('|').collect();
            let expected = recorded(case, fields[0]);
            if expected.rc != 0 || departs(name, "") {
                continue;
            }
            let mut source = MemorySource::new();
            for (file, bytes) in case {
                source = source.with(file, bytes.clone());
            }
            let config = Config::load("input.conf", &source).unwrap();
            let got = commands(&config, &HostIdentity::from(fields[1]));
            let wanted: Vec<String> = expected
                .out
                .iter()
                .filter(|line| !line.starts_with("drbdmeta"))
                .map(|line| unescaped(line))
                .collect();
            total += 1;
            same += usize::from(got == wanted);
            if got != wanted {
                println!("--- {name} {}", fields[0]);
                for line in got.iter().filter(|line| !wanted.contains(line)) {
                    println!("got  {line}");
                }
                for line in wanted.iter().filter(|line| !got.contains(line)) {
                    println!("want {line}");
                }
            }
        }
    }
    println!("{same} of {total} views give the recorded commands");
    assert!(same == total && total >= 68, "{same} of {total}");
}
