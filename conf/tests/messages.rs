//! What is said about wrong statements: the words and the place the reference uses (recorded with its
//! release 9.22; spec/drbd-conf.md §9), or ours where it says nothing useful.

#![allow(clippy::unwrap_used)]

use palisade_conf::{Config, Error, FileSource, HostIdentity, MemorySource, ModuleVersion, Source};

const A: &str = "on alpha { node-id 0; address 198.51.100.11:7001; }";
const B: &str = "on beta { node-id 1; address 198.51.100.12:7001; }";
const D: &str = "device minor 1; disk /dev/vg/x; meta-disk internal;";

fn load(text: &str) -> Result<Config, Error> {
    Config::load("c", &MemorySource::new().with("c", text))
}

fn message(text: &str) -> String {
    match load(text) {
        Err(error) => error.to_string(),
        Ok(config) => match config.check(&HostIdentity::from("alpha")) {
            Err(error) => error.to_string(),
            Ok(()) => "accepted".to_owned(),
        },
    }
}

/// `(body of resource x, message)`; `@` stands for a complete two-host resource.
const BODIES: &[(&str, &str)] = &[
    (
        "@ volume 0 { foo; }",
        "c:1: Parse error: 'device | disk | meta-disk | flex-meta-disk | }' expected,\n\tbut got 'foo'",
    ),
    ("@ connection { foo; }", "c:1: Parse error: 'host | net | skip | }' expected,\n\tbut got 'foo'"),
    ("@ connection { path { foo; } }", "c:1: Parse error: 'host | }' expected,\n\tbut got 'foo'"),
    ("@ connection { host alpha foo; }", "c:1: Parse error: 'address | port | ;' expected,\n\tbut got 'foo'"),
    ("@ connection { host alpha via foo; }", "c:1: Parse error: 'TK_PROXY' expected,\n\tbut got 'foo'"),
    ("@ connection { host alpha via proxy foo; }", "c:1: Parse error: 'TK_ON' expected,\n\tbut got 'foo'"),
    (
        "@ connection { host alpha; host beta; volume 0 { foo; } }",
        "c:1: Parse error: 'TK_DISK' expected,\n\tbut got 'foo'",
    ),
    (
        "@ connection { host alpha; host beta; net { } net { } }",
        "c:1: only one 'net' section per connection allowed",
    ),
    (
        "@ connection { host alpha port 70000; host beta; }",
        "c:1: port 70000 => 70000 out of range [1..65535].",
    ),
    (
        "@ connection { path { host alpha; host beta; host alpha; } }",
        "c:1: only two 'host' keywords per path allowed",
    ),
    (
        "@ connection { host alpha address 198.51.100.11:4 foo; }",
        "c:1: Parse error: 'via | ; ' expected,\n\tbut got 'foo'",
    ),
    ("@ connection { host alpha port 4 foo; }", "c:1: Parse error: 'via | ; ' expected,\n\tbut got 'foo'"),
    (
        "on internal { node-id 0; address 198.51.100.11:7001; } on protocol { node-id 1; address 198.51.100.12:7001; }",
        "accepted",
    ),
    (
        "volume 0 { device minor 1; } device minor 2; disk /a; foo",
        "c:1: mixing explicit and implicit volumes is not allowed\nc:1: mixing explicit and implicit volumes is not allowed\n\
         c:1: Parse error: 'protocol | on | disk | net | syncer | startup | handlers | connection | ignore-on | \
         stacked-on-top-of | skip' expected,\n\tbut got 'foo'",
    ),
    ("@ connection connection { }", "c:1: Parse error: '{' expected,\n\tbut got 'connection'"),
    ("@ connection 5 { }", "c:1: Parse error: '{' expected,\n\tbut got '5'"),
    (
        "@ connection { } foo",
        "c:1: connection without a single path (maybe empty?) not allowed\n\
         c:1: Parse error: 'protocol | on | disk | net | syncer | startup | handlers | connection | ignore-on | \
         stacked-on-top-of | skip' expected,\n\tbut got 'foo'",
    ),
    (
        "@ device device;",
        "c:1: conflicting use of device statement 'x:device' ...\nc:1: device statement 'x:device' first used here.",
    ),
    ("@ disk /dev/vg/y; meta-disk /dev/vg/m; flexible-meta-disk internal;", "accepted"),
    (
        "on alpha { disk /dev/a; disk 5; }",
        "c:1: conflicting use of disk statement 'x:alpha:disk' ...\nc:1: disk statement 'x:alpha:disk' first used here.",
    ),
    (
        "on alpha { address 198.51.100.11:70000; foo }",
        "c:1: port 70000 => 70000 out of range [1..65535].\nc:1: port 70000 => 70000 out of range [1..65535].\n\
         c:1: Parse error: 'disk | device | address | meta-disk | flexible-meta-disk | node-id | skip' expected,\n\
         \tbut got 'foo'",
    ),
    (
        "@ connection { host alpha address 198.51.100.11:70000; host beta; }",
        "c:1: port 70000 => 70000 out of range [1..65535].",
    ),
    ("@ connection-mesh { foo; }", "c:1: Parse error: 'hosts | net | }' expected,\n\tbut got 'foo'"),
    ("@ connection-mesh { net { } net { } }", "c:1: only one 'net' section allowed"),
    ("@ connection-mesh { hosts ; }", "c:1: Parse error: 'TK_STRING' expected,\n\tbut got ';'"),
    ("@ connection-mesh { hosts alpha { } }", "c:1: Parse error: 'TK_STRING | ';'' expected,\n\tbut got '{'"),
    (
        "stacked-on-top-of foo { bar; }",
        "c:1: Parse error: 'device | address | proxy | volume | node-id' expected,\n\tbut got 'bar'",
    ),
    ("on { }", "c:1: Parse error: 'TK_STRING' expected,\n\tbut got '{'"),
    ("on alpha disk { }", "c:1: Parse error: 'TK_STRING | '{'' expected,\n\tbut got 'disk'"),
    ("floating 1.2.3.4;", "c:1: Parse error: ':' expected,\n\tbut got ';'"),
    ("floating 1.2.3.4:1 foo", "c:1: Parse error: '{ | ;' expected,\n\tbut got 'foo'"),
    ("floating ipv6 [foo]:1;", "c:1: Parse error: 'TK_IPADDR6' expected,\n\tbut got 'foo'"),
    ("device /dev/drbd1 foo;", "c:1: Parse error: 'minor | ;' expected,\n\tbut got 'foo'"),
    ("meta-disk /dev/a foo;", "c:1: Parse error: '[ | ;' expected,\n\tbut got 'foo'"),
    ("proxy { foo; }", "c:1: expected \"{\" after \"proxy\" keyword"),
    ("proxy { plugin { foo } }", "c:1: Missing \";\" before  \"}\""),
    ("on alpha { proxy on foo { bar; } }", "c:1: Parse error: 'inside | outside' expected,\n\tbut got 'bar'"),
    ("handlers foo;", "c:1: Parse error: '{' expected,\n\tbut got 'foo'"),
    ("on alpha { node-id 1 }", "c:1: Parse error: ';' expected,\n\tbut got '}'"),
    ("@ syncer { foo 1; }", "c:1: Parse error: 'a syncer option keyword' expected,\n\tbut got 'foo'"),
    (
        "@ options { quorum 33; }",
        "c:1: Parse error: while parsing value ('33')\nfor quorum. Value is too big.",
    ),
    (
        "@ startup { wfc-timeout -1; }",
        "c:1: Parse error: while parsing value ('-1')\nfor wfc-timeout. Value is too big.",
    ),
    (
        "@ proxy { memlimit foo; }",
        "c:1: Parse error: while parsing value ('foo')\nfor memlimit. Value is not a number.",
    ),
    ("@ disk { al-extents 1; }", "accepted"),
    // The reference stores `yes` and fails when it uses the value.
    ("@ net { timeout; }", "c:1: Parse error: while parsing value ('')\nfor timeout. Value is not a number."),
    (
        "@ net { discard-my-data; }",
        "c:1: Parse error: 'an option keyword' expected,\n\tbut got 'discard-my-data'",
    ),
    (
        "@ on gamma { node-id 1; address 1.2.3.4:5; }",
        "c:1: conflicting use of node-id 'x:1' ...\nc:1: node-id 'x:1' first used here.",
    ),
    (
        "@ device minor 3;",
        "c:1: conflicting use of device statement 'x:device' ...\nc:1: device statement 'x:device' first used here.",
    ),
    ("volume 1 { device minor 1; } disk /dev/a;", "c:1: mixing explicit and implicit volumes is not allowed"),
    (
        "device minor 1; disk /dev/a; on alpha { address 1.1.1.1:1; }",
        "c:1: in resource x, on alpha { ... }: 'node-id' keyword missing.",
    ),
    (
        "device minor 1; on alpha { address 1.1.1.1:1; } on beta { address 1.1.1.1:2; }",
        "BAD LUCK, equal hashes",
    ),
    (
        "@ connection { host alpha; host alpha; }",
        "c:1: in resource x ipv4:198.51.100.11:7001 is used for both endpoints",
    ),
    (
        "@ connection { host gamma address 1.2.3.4:5; host beta; }",
        "c:1: in resource x a hostname (\"gamma\") is given\nwith a \"host\" keyword, has no \"address\" keyword, and no matching\nhost section (\"on\" keyword)",
    ),
    (
        "@ connection { host alpha; host beta; volume 7 { } }",
        "c:1: Resource x: There is a reference to a volume 7 that is not known in this resource on host alpha\nc:1: Resource x: There is a reference to a volume 7 that is not known in this resource on host beta",
    ),
    (
        "on alpha { node-id 0; } on beta { node-id 1; } connection-mesh { hosts alpha beta; }",
        "\"connection-mesh\" (for \"x\") with a host (\"alpha\") that has no \"address\" defined\n\"connection-mesh\" (for \"x\") with a host (\"beta\") that has no \"address\" defined",
    ),
    // The reference crashes.
    (
        "@ connection { address 1.2.3.4:1; address 198.51.100.12:7001; }",
        "c:1: in resource x the endpoint address ipv4:1.2.3.4:1 belongs to no host section; name the host with a \"host\" keyword or correct the address",
    ),
];

#[test]
fn resource_bodies() {
    let mut wrong = Vec::new();
    for (body, expected) in BODIES {
        let text = format!("resource x {{ {} }}", body.replace('@', &format!("{D} {A} {B}")));
        let got = message(&text);
        if got != *expected {
            wrong.push(format!("{body}\n  got  {got:?}\n  want {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files() {
    for (text, expected) in [
        ("resource", "c:1: Parse error: 'TK_STRING' expected,\n\tbut got ''"),
        ("resource x\n", "c:2: Parse error: '{' expected,\n\tbut got ''"),
        ("resource on { }", "c:1: Parse error: 'TK_STRING' expected,\n\tbut got 'on'"),
        ("resource \"\" { }", "Resource name is empty."),
        (
            "common { } common { }",
            "c:1: conflicting use of resource section 'common' ...\nc:1: resource section 'common' first used here.",
        ),
        ("skip ;", "c:1: reached eof while parsing this skip block."),
        ("common { template-file t; }", "c:1: Failed to open template file 't'."),
        ("include c;", "accepted"),
        ("include d;", "c:1: Failed to open include file 'd'."),
        ("include \"d*\";", "accepted"),
        (
            "require-drbd-module-version-lt 9.0.0;",
            "c:1: Validation error: drbd-module-version 9.3.0 < 9.0.0 not true",
        ),
        ("resource x {", "accepted"),
        ("resource \"caf\u{e9}\" { }", "accepted"),
        (
            "\u{feff}global { }",
            "c:1: Parse error: 'global | common | resource | skip | include |\n\trequire-drbd-module-version-{eq,ne,gt,ge,lt,le}' expected,\n\tbut got '\u{feff}'",
        ),
    ] {
        assert_eq!(message(text), expected, "{text}");
    }
    let error =
        Config::load("c", &MemorySource::new().with("c", b"resource \"\xff\" { }".to_vec())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "c:1: text in double quotes is not UTF-8; save the file in UTF-8 encoding."
    );
    assert_eq!(load("resource \"\" { }").unwrap_err().exit_code(), 1);
    assert_eq!(load("x").unwrap_err().exit_code(), 10);
    let missing = Config::load("absent", &MemorySource::new()).unwrap_err();
    assert_eq!((missing.to_string().as_str(), missing.exit_code()), ("Can not open 'absent'.", 20));
    let folder = Config::load(env!("CARGO_MANIFEST_DIR"), &FileSource).unwrap_err();
    assert_eq!(folder.exit_code(), 20);
    assert!(folder.to_string().starts_with("Cannot parse directory '"));
}

#[test]
fn include_loops_and_chains_end() {
    let loops = MemorySource::new().with("a", "include b;").with("b", "include a; include b;");
    assert!(Config::load("a", &loops).is_ok());
    let mut chain = MemorySource::new();
    for index in 0..200 {
        chain = chain.with(&format!("f{index}"), format!("include f{};", index + 1));
    }
    let error = Config::load("f0", &chain).unwrap_err();
    assert!(error.to_string().contains("nested deeper than 64 levels"), "{error}");
    assert!(chain.read("f3").is_ok());
}

/// Sizes that would hurt are refused, and soon.
#[test]
fn enormous_input_is_refused() {
    let started = std::time::Instant::now();
    let many = |piece: &str, count: usize| format!("resource x {{ {D} {A} {B} {} }}", piece.repeat(count));
    for text in [
        many(&format!("net {{ {} }}", "timeout 5; ".repeat(300_000)), 1),
        many("connection-mesh { hosts alpha beta; } ", 50_000),
        many("connection { host alpha; host beta; } ", 50_000),
        many(&"skip { ".repeat(500_000), 1),
        format!(
            "resource x {{ {} {A} {B} }}",
            (0..50_000).fold(String::new(), |t, n| t + &format!("volume {n} {{ device minor {n}; }} "))
        ),
        format!("resource x {{ on {} {{ }} }}", "a ".repeat(500_000)),
        "[".repeat(2_000_000),
        "global { }".repeat(100_000),
        "#".repeat(5 << 20),
    ] {
        assert!(load(&text).is_err());
    }
    assert!(started.elapsed().as_secs() < 10, "{:?}", started.elapsed());
}

#[test]
fn secrets_stay_out_of_debug_output() {
    let long = "s3cret".repeat(40);
    for text in [
        format!("resource x {{ {D} {A} {B} net {{ shared-secret s3cret; }} }}"),
        "resource x { net { shared-secret s3cret; } connection { } }".to_owned(),
        format!("resource x {{ net {{ shared-secret \"{long}\"; }} }}"),
        format!("resource x {{ net {{ shared-secret \"{long}{long}\"; }} }}"),
        "resource x { net { shared-secret my s3cret; } }".to_owned(),
        "resource x { net { shared-secret \"s3cret; } }".to_owned(),
        format!(
            "common {{ net {{ shared-secret s3cretA; }} }} resource x {{ {D} {A} {B} connection-mesh {{ hosts alpha beta; net {{ shared-secret s3cretB; }} }} }}"
        ),
    ] {
        let loaded = load(&text);
        let checked = loaded.as_ref().map(|config| config.check(&HostIdentity::from("alpha")));
        assert!(!format!("{loaded:?} {checked:?}").contains("s3cret"), "{text}");
    }
}

#[test]
fn suggestions_for_unknown_words() {
    let error = load("resource x { net { ping-timeuot 5; } }").unwrap_err();
    assert_eq!(error.problems()[0].suggestion().map(|spec| spec.name), Some("ping-timeout"));
    assert_eq!(ModuleVersion(9, 2, 1).to_string(), "9.2.1");
}
