//! What a host learns about a resource, beyond what the recorded `up` commands show.

#![allow(clippy::unwrap_used)]

use palisade_conf::options::{self, Canonical, Class};
use palisade_conf::{Config, HostIdentity, MemorySource, MetaDisk, Problem};

fn load(text: &str) -> Config {
    Config::load("c", &MemorySource::new().with("c", text)).unwrap()
}

#[test]
fn three_nodes_one_diskless() {
    let config = load(
        "common { net { protocol C; ping-int 7; } handlers { fence-peer /f; } startup { wfc-timeout 30; } }
         resource r0 {
             options { quorum majority; }
             net { cram-hmac-alg sha256; shared-secret s; ping-int 9; }
             disk { c-max-rate 100M; on-io-error detach; }
             volume 0 { device minor 10; disk /dev/a; }
             volume 1 { device /dev/drbd11; disk /dev/b; meta-disk /dev/m [3]; }
             on a.example { node-id 0; address 10.0.0.1:7; }
             on b { node-id 4; address 10.0.0.2:7; }
             on c { node-id 5; address 10.0.0.3:7; volume 0 { disk none; } volume 1 { disk none; tiebreaker no; } }
             connection-mesh { hosts a b c; }
         }",
    );
    let view = config.resource("r0").unwrap().view("A").unwrap();
    assert_eq!((view.node_id, view.volumes.len(), view.peers.len()), (0, 2, 2));
    assert_eq!(view.options.value("quorum"), Some("majority"));
    assert_eq!(view.handlers.value("fence-peer"), Some("/f"));
    assert_eq!(view.startup.value("wfc-timeout"), Some("30"));
    let volume = &view.volumes[1];
    assert_eq!(
        (volume.minor, volume.device.as_str(), volume.disk.as_deref()),
        (11, "/dev/drbd11", Some("/dev/b"))
    );
    assert_eq!(volume.meta_disk, Some(MetaDisk::Indexed { device: "/dev/m".to_owned(), index: 3 }));
    assert_eq!(view.volumes[0].meta_disk, Some(MetaDisk::Internal));
    assert_eq!(volume.attach_options.value("on-io-error"), Some("detach"));
    let [b, c] = view.peers.as_slice() else { panic!("{:?}", view.peers) };
    assert_eq!((b.node_id, b.host_name(), b.connection_name.as_str(), b.diskless), (4, "b", "b", false));
    assert_eq!(b.net.value("ping-int"), Some("9"));
    assert_eq!(b.net.value("protocol"), Some("C"));
    assert_eq!(b.paths[0].own.to_string(), "ipv4:10.0.0.1:7");
    assert_eq!(b.paths[0].peer.to_string(), "ipv4:10.0.0.2:7");
    let rate = b.volumes[0].options.get("c-max-rate").unwrap();
    assert_eq!((rate.value(), rate.canonical()), ("100M", Ok(Canonical::Number(102_400))));
    assert!(c.diskless && c.volumes.iter().all(|volume| volume.diskless));
    assert_eq!(c.volumes[0].options.value("bitmap"), Some("no"));
    assert_eq!(c.volumes[0].options.value("peer-tiebreaker"), None);
    assert_eq!(c.volumes[1].options.value("peer-tiebreaker"), Some("no"));

    let view = config.resource("r0").unwrap().view("c").unwrap();
    assert!(view.volumes.iter().all(|volume| volume.disk.is_none() && volume.meta_disk.is_none()));
    let error = config.resource("r0").unwrap().view("d").unwrap_err();
    assert_eq!(error.problems(), [Problem::NotDefinedHere { resource: "r0".to_owned() }]);
}

#[test]
fn floating_sections_belong_to_who_owns_the_address() {
    let config = load(
        "resource f { device minor 1; disk /dev/f;
             floating 10.0.0.1:7 { node-id 0; } floating ipv6 [fe80::2%eth0]:7 { node-id 1; } }",
    );
    let resource = config.resource("f").unwrap();
    let me = HostIdentity { name: "x".to_owned(), addresses: vec!["fe80::2".parse().unwrap()] };
    let view = resource.view_as(&me).unwrap();
    assert_eq!((view.node_id, view.peers[0].host_name()), (1, "10.0.0.1_7"));
    assert!(resource.check_address(&me).is_ok());
    assert!(resource.view("x").is_err());
}

#[test]
fn resync_after_becomes_a_minor_or_is_reported() {
    let config = load(
        "resource a { volume 0 { device minor 1; disk /dev/a; } volume 1 { device minor 2; disk /dev/b; }
             on h { node-id 0; address 1.1.1.1:1; } }
         resource b { device minor 3; disk /dev/c; disk { resync-after a/1; } on h { node-id 0; address 1.1.1.1:2; } }
         resource c { device minor 4; disk /dev/d; disk { resync-after a; } on h { node-id 0; address 1.1.1.1:3; } }
         resource d { device minor 5; disk /dev/e; disk { resync-after z; } on h { node-id 0; address 1.1.1.1:4; } }",
    );
    let me = HostIdentity::from("h");
    let option = |name: &str| {
        let view = config.resource(name).unwrap().view("h").unwrap();
        view.volumes[0].attach_options.value("resync-after").map(str::to_owned)
    };
    assert_eq!((option("b").as_deref(), option("c"), option("d")), (Some("2"), None, None));
    let problems = |name: &str| config.resource(name).unwrap().resync_after_problems(&me);
    assert!(problems("b").is_empty());
    assert!(matches!(problems("c").as_slice(), [Problem::ResyncAfterAmbiguous { volumes: 2, .. }]));
    assert!(matches!(problems("d").as_slice(), [Problem::ResyncAfterUnknown { .. }]));
}

#[test]
fn the_later_setting_wins() {
    let config = load(
        "resource a { device minor 1; disk /dev/a; net { ping-int 5; ping-int 6; no-tcp-cork; }
             on h { node-id 0; address 1.1.1.1:1; } on i { node-id 1; address 1.1.1.2:1; } }",
    );
    let view = config.resource("a").unwrap().view("h").unwrap();
    let net: Vec<String> = view.peers[0].net.iter().map(|option| format!("{option:?}")).collect();
    assert_eq!(net, ["tcp-cork=no", "ping-int=6"]);
}

#[test]
fn the_option_table_answers() {
    assert_eq!(options::find("attach", "bitmap").map(|spec| spec.class), Some(Class::Attach));
    assert_eq!(
        options::find("peer-device-options", "bitmap").map(|spec| spec.class),
        Some(Class::PeerDevice)
    );
    assert_eq!(options::find("net", "quorum"), None);
    assert_eq!(
        options::find("new-peer", "timeout").map(options::OptionSpec::default),
        Some(Canonical::Number(60))
    );
    assert_eq!(options::of(Class::Net).count(), 39);
}

/// Lines of `plugin { }` are inherited like options: missing ones go to the front.
#[test]
fn proxies_inherit_options_and_plugins() {
    let config = load(
        "common { proxy { plugin { c1; c2 x; } } }
         resource x { device minor 1; disk /dev/x; proxy { memlimit 1; plugin { zlib level 6; lz4; } }
             on a { node-id 0; address 127.0.0.1:1; proxy on a { inside 127.0.0.1:2; outside 1.1.1.1:9;
                 options { plugin { own; lz4; } } } }
             on b { node-id 1; address 127.0.0.1:1; proxy on b { inside 127.0.0.1:2; outside 1.1.1.2:9; } } }",
    );
    let view = config.resource("x").unwrap().view("a").unwrap();
    let path = &view.peers[0].paths[0];
    assert_eq!(path.peer.to_string(), "ipv4:127.0.0.1:2", "the local proxy is the target");
    let own = path.own_proxy.as_ref().unwrap();
    assert_eq!(own.options.options.value("memlimit"), Some("1"));
    assert_eq!(own.options.plugins, ["zlib level 6", "c1", "c2 x", "own", "lz4"]);
    assert_eq!(path.peer_proxy.as_ref().unwrap().options.plugins, ["lz4", "zlib level 6", "c1", "c2 x"]);
}
