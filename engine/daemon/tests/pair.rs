//! Engines as processes: what an administrator and a client see.

mod support;

use palisade_control::{Command, code};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use support::{Cluster, Leftovers, MINOR, Setup, carriers, map, until};

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|n| (n as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

#[test]
fn written_on_one_node_is_read_on_the_other() {
    let mut cluster = Cluster::ready(&Setup::default());
    let mut nbd = cluster.nodes[0].nbd();
    let large = pattern(1, 3 << 20);
    nbd.write(0, &large).unwrap();
    for n in 0..50_u64 {
        nbd.write((8 << 20) + n * 4096, &pattern(n as u8, 4096)).unwrap();
    }
    nbd.write(5 << 20, &pattern(9, 512)).unwrap();
    nbd.flush().unwrap();
    assert_eq!(nbd.read(0, 3 << 20).unwrap(), large);
    let refused = cluster.nodes[0].refused(Command::Secondary { force: false });
    assert_eq!(refused.code, code::DEVICE_IN_USE);
    assert!(refused.info[0].contains("NBD client"), "{refused:?}");
    drop(nbd);
    until("demotion", || {
        let reply = cluster.nodes[0].call(Command::Secondary { force: false });
        matches!(reply, palisade_control::Reply::Ok { .. }).then_some(())
    });
    assert!(!cluster.nodes[0].nbd_path().exists());
    cluster.nodes[1].ok(Command::Primary { force: false });
    let mut nbd = cluster.nodes[1].nbd();
    assert_eq!(nbd.read(0, 3 << 20).unwrap(), large);
    for n in 0..50_u64 {
        assert_eq!(nbd.read((8 << 20) + n * 4096, 4096).unwrap(), pattern(n as u8, 4096));
    }
    assert_eq!(nbd.read(5 << 20, 512).unwrap(), pattern(9, 512));
    drop(nbd);
    for node in &mut cluster.nodes {
        until("openers gone", || (node.status().devices[0].open == Some(false)).then_some(()));
        node.down();
    }
    assert!(cluster.images_equal());
}

#[test]
fn a_killed_primary_loses_nothing_and_comes_back() {
    let mut cluster = Cluster::ready(&Setup::default());
    let mut nbd = cluster.nodes[0].nbd();
    for n in 0..40_u64 {
        nbd.write(n * 65536, &pattern(n as u8, 4096)).unwrap();
    }
    cluster.nodes[0].kill();
    let lost = |c: &mut Cluster| c.nodes[1].connection(0).connection_state.as_str() != "Connected";
    until("loss noticed", || lost(&mut cluster).then_some(()));
    cluster.nodes[1].ok(Command::Primary { force: true });
    let mut survivor = cluster.nodes[1].nbd();
    for n in 0..40_u64 {
        assert_eq!(survivor.read(n * 65536, 4096).unwrap(), pattern(n as u8, 4096));
    }
    for n in 0..10_u64 {
        survivor.write((20 << 20) + n * 4096, &pattern(100 + n as u8, 4096)).unwrap();
    }
    let refused = {
        let node = &mut cluster.nodes[0];
        node.spawn();
        node.configure();
        let attach = node.attach_command();
        node.refused(attach)
    };
    assert_eq!(refused.code, code::MD_UNCLEAN, "{refused:?}");
    cluster.nodes[0].kill();
    cluster.nodes[0].apply_al();
    cluster.up(0);
    cluster.connected();
    cluster.in_sync();
    until("resync finished", || {
        let c = cluster.nodes[1].connection(0);
        let pd = &c.peer_devices[0];
        (pd.replication_state.as_str() == "Established" && pd.out_of_sync == 0).then_some(())
    });
    survivor.flush().unwrap();
    drop(survivor);
    until("openers gone", || (cluster.nodes[1].status().devices[0].open == Some(false)).then_some(()));
    for node in &mut cluster.nodes {
        node.down();
    }
    assert!(cluster.images_equal());
}

#[test]
fn three_nodes_hold_the_same() {
    let mut cluster = Cluster::ready(&Setup { nodes: 3, bytes: 32 << 20, ..Setup::default() });
    let mut nbd = cluster.nodes[0].nbd();
    for n in 0..30_u64 {
        nbd.write(n * 200_704, &pattern(n as u8, 8192)).unwrap();
    }
    nbd.flush().unwrap();
    drop(nbd);
    until("openers gone", || (cluster.nodes[0].status().devices[0].open == Some(false)).then_some(()));
    for node in &mut cluster.nodes {
        node.down();
    }
    assert!(cluster.images_equal());
}

#[test]
fn a_diskless_primary_works_through_its_peers() {
    let setup = Setup { nodes: 3, bytes: 32 << 20, clients: &[2], quorum: "majority", ..Setup::default() };
    let mut cluster = Cluster::start(&setup);
    cluster.connected();
    cluster.nodes[0].ok(Command::NewCurrentUuid { minor: MINOR, clear_bitmap: true, force_resync: false });
    cluster.in_sync();
    let device = cluster.nodes[2].status().devices[0].clone();
    assert!(device.client && device.disk_state.as_str() == "Diskless", "{device:?}");
    for n in 0..2 {
        let seen = cluster.nodes[n].connection(2).peer_devices[0].clone();
        assert!(seen.peer_client && seen.peer_disk_state.as_str() == "Diskless", "{seen:?}");
        assert!(!cluster.nodes[n].status().devices[0].client);
    }
    let shown = cluster.nodes[2].running();
    assert!(shown.volumes[0].client && shown.volumes[0].device_options.is_empty(), "{shown:?}");

    cluster.nodes[2].ok(Command::Primary { force: false });
    let mut nbd = cluster.nodes[2].nbd();
    let large = pattern(1, 3 << 20);
    nbd.write(0, &large).unwrap();
    nbd.write(5 << 20, &pattern(9, 512)).unwrap();
    nbd.flush().unwrap();
    assert_eq!(nbd.read(0, 3 << 20).unwrap(), large);
    assert_eq!(nbd.read(5 << 20, 512).unwrap(), pattern(9, 512));
    assert!(cluster.nodes[2].status().devices[0].quorum);

    // One server dies: one server and the diskless node go on.
    cluster.nodes[0].kill();
    for n in 0..20_u64 {
        nbd.write((8 << 20) + n * 4096, &pattern(n as u8, 4096)).unwrap();
    }
    nbd.flush().unwrap();
    let lost = |c: &mut Cluster| c.nodes[2].connection(0).connection_state.as_str() != "Connected";
    until("loss noticed", || lost(&mut cluster).then_some(()));
    nbd.write(6 << 20, &pattern(7, 8192)).unwrap();
    assert!(cluster.nodes[2].status().devices[0].quorum);
    assert_eq!(nbd.read(0, 3 << 20).unwrap(), large);
    for n in 0..20_u64 {
        assert_eq!(nbd.read((8 << 20) + n * 4096, 4096).unwrap(), pattern(n as u8, 4096));
    }
    // The last disk cannot leave.
    let refused = cluster.nodes[1].refused(Command::Down);
    assert!(refused.code == code::CW_FAILED_BY_PEER && refused.info.len() == 1, "{refused:?}");

    // It comes back and is resynced; the refused command had given up the link that was lost anyway.
    cluster.nodes[1].connect(0);
    cluster.nodes[0].apply_al();
    cluster.up(0);
    cluster.connected();
    cluster.in_sync();
    until("resync finished", || {
        let pd = cluster.nodes[1].connection(0).peer_devices[0].clone();
        (pd.replication_state.as_str() == "Established" && pd.out_of_sync == 0).then_some(())
    });
    drop(nbd);
    until("openers gone", || (cluster.nodes[2].status().devices[0].open == Some(false)).then_some(()));
    for node in cluster.nodes.iter_mut().rev() {
        node.down();
    }
    assert!(cluster.images_equal());
}

#[test]
fn a_volume_becomes_diskless_and_diskful_again() {
    let mut cluster = Cluster::ready(&Setup::default());
    let mut nbd = cluster.nodes[0].nbd();
    nbd.write(0, &pattern(3, 8192)).unwrap();
    cluster.nodes[0].ok(Command::Detach { minor: MINOR, force: false, diskless: true });
    // Answered when the device is free: it can be attached elsewhere at once.
    let device = cluster.nodes[0].status().devices[0].clone();
    assert!(device.client && device.disk_state.as_str() == "Diskless", "{device:?}");
    assert_eq!(nbd.read(0, 8192).unwrap(), pattern(3, 8192));
    nbd.write(4096, &pattern(4, 8192)).unwrap();
    cluster.nodes[0].apply_al();
    cluster.nodes[0].attach();
    cluster.in_sync();
    assert!(!cluster.nodes[0].status().devices[0].client);
    assert!(!cluster.nodes[0].running().volumes[0].client);
    assert_eq!(nbd.read(4096, 8192).unwrap(), pattern(4, 8192));
    drop(nbd);
    until("openers gone", || (cluster.nodes[0].status().devices[0].open == Some(false)).then_some(()));
    for node in &mut cluster.nodes {
        node.down();
    }
    assert!(cluster.images_equal());
}

#[test]
fn up_after_a_kill_removes_the_dead_device() {
    let (name, minor) = (format!("kill-{}", std::process::id()), 500_000 + std::process::id() % 500_000);
    let setup =
        Setup { bytes: 32 << 20, name: name.clone(), minor, device: true, nodes: 1, ..Setup::default() };
    let mut cluster = Cluster::ready(&setup);
    let node = PathBuf::from(format!("/dev/drbd{minor}"));
    let link = PathBuf::from(format!("/dev/drbd/by-res/{name}/0"));
    let at = cluster.nodes[0].dir.join("mnt");
    std::fs::create_dir(&at).unwrap();
    let paths = vec![node.clone(), link.clone(), link.parent().unwrap().into()];
    let _leftovers = Leftovers { minor, mount: at.clone(), paths };
    let run = |program: &str, args: &[&Path]| {
        let out = std::process::Command::new(program).args(args).output().unwrap();
        assert!(out.status.success(), "{program} {args:?}: {out:?}");
    };
    let restart = |cluster: &mut Cluster| {
        cluster.nodes[0].kill();
        assert!(node.exists() && carriers(minor).len() == 1, "nobody cleaned up");
        cluster.nodes[0].apply_al();
        cluster.up(0);
    };
    // After a write, what makes the disk UpToDate is durable.
    let mut nbd = cluster.nodes[0].nbd();
    nbd.write(0, &pattern(1, 4096)).unwrap();
    nbd.flush().unwrap();
    drop(nbd);
    // Idle: everything is gone before anybody promotes.
    assert!(node.exists() && link.exists());
    restart(&mut cluster);
    until("the end of the dead device", || {
        (!node.exists() && link.symlink_metadata().is_err() && carriers(minor).is_empty()).then_some(())
    });
    // In use: the name is free, the device goes with its user.
    cluster.nodes[0].ok(Command::Primary { force: false });
    run("mkfs.ext4", &[Path::new("-q"), &node]);
    run("mount", &[&node, &at]);
    std::fs::write(at.join("file"), pattern(5, 1 << 20)).unwrap();
    run("sync", &[Path::new("-f"), &at]);
    restart(&mut cluster);
    // Promoted at once: the new node waits for the end of the old one.
    cluster.nodes[0].ok(Command::Primary { force: false });
    assert!(node.exists());
    assert_eq!(carriers(minor).len(), 2);
    run("umount", &[Path::new("-l"), &at]);
    until("the end of the dead device", || (carriers(minor).len() == 1).then_some(()));
    assert!(cluster.nodes[0].log().contains("still used"), "{}", cluster.nodes[0].log());
    run("mount", &[&node, &at]);
    assert_eq!(std::fs::read(at.join("file")).unwrap(), pattern(5, 1 << 20));
    run("umount", &[&at]);
    cluster.nodes[0].down();
    assert!(!node.exists() && link.symlink_metadata().is_err() && carriers(minor).is_empty());
}

#[test]
fn block_status_tells_holes_and_what_peers_lack() {
    const MIB: u64 = 1 << 20;
    let mut cluster = Cluster::ready(&Setup { bytes: 32 << 20, ..Setup::default() });
    let size = cluster.nodes[0].status().devices[0].statistics.as_ref().unwrap().size * 1024;
    let mut nbd = cluster.nodes[0].nbd();
    nbd.write(MIB, &pattern(1, 65536)).unwrap();
    nbd.write(5 * MIB + 512, &pattern(2, 512)).unwrap();
    let expected = [
        [0, MIB, 3],
        [MIB, 65536, 0],
        [MIB + 65536, 4 * MIB - 65536, 3],
        [5 * MIB, 4096, 0],
        [5 * MIB + 4096, size - 5 * MIB - 4096, 3],
    ];
    assert_eq!(map(&cluster.nodes[0], "base:allocation"), expected);
    assert_eq!(map(&cluster.nodes[0], "palisade:out-of-sync"), [[0, size, 0]]);
    let uri = format!("nbd+unix:///?socket={}", cluster.nodes[0].nbd_path().display());
    let args = ["map", "--output=json", "-f", "raw", &uri];
    let out = std::process::Command::new("qemu-img").args(args).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("\"start\": 1048576, \"length\": 65536"), "{text}");

    cluster.nodes[1].kill();
    nbd.write(8 * MIB, &pattern(3, 131_072)).unwrap();
    // The writes before may be marked too: whether the peer has them is told late.
    let lacking = map(&cluster.nodes[0], "palisade:out-of-sync");
    assert!(lacking.contains(&[8 * MIB, 131_072, 1]), "{lacking:?}");
    assert!(lacking.contains(&[8 * MIB + 131_072, size - 8 * MIB - 131_072, 0]), "{lacking:?}");
    cluster.nodes[1].apply_al();
    cluster.up(1);
    cluster.connected();
    until("resync", || (map(&cluster.nodes[0], "palisade:out-of-sync") == [[0, size, 0]]).then_some(()));
    // Without a disk nobody knows: everything counts as data.
    cluster.nodes[0].ok(Command::Detach { minor: MINOR, force: false, diskless: false });
    assert_eq!(map(&cluster.nodes[0], "base:allocation"), [[0, size, 0]]);
}

#[test]
fn a_wrong_secret_ends_in_standalone() {
    let mut cluster = Cluster::prepare(&Setup::default());
    cluster.up(0);
    cluster.net.set("shared-secret", "another");
    cluster.up(1);
    for n in 0..2 {
        until("StandAlone", || {
            let c = cluster.nodes[n].connection(1 - n);
            (c.connection_state.as_str() == "StandAlone").then_some(())
        });
        let log = cluster.nodes[n].log();
        assert!(!log.contains("sesame") && !log.contains("another"), "{log}");
    }
}

#[test]
fn hostile_bytes_on_the_port_do_nothing() {
    let mut cluster = Cluster::prepare(&Setup::default());
    cluster.up(0);
    let address = cluster.nodes[0].address();
    let header = [0x83, 0x74, 0x02, 0x67, 0xff, 0xf2, 0, 0];
    let hostile: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        header.to_vec(),
        [&header[..], &[0x86, 0x20, 0xec, 0x20, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]].concat(),
    ];
    for bytes in hostile {
        let Ok(mut stream) = TcpStream::connect(&address) else { continue };
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let _ = stream.write_all(&bytes);
        // A stranger's address is not that of the peer: closed at once.
        let mut answer = [0; 64];
        assert!(matches!(stream.read(&mut answer), Ok(0) | Err(_)));
    }
    cluster.up(1);
    cluster.connected();
    assert!(cluster.nodes[0].is_running());
}

#[test]
fn hostile_bytes_from_the_peers_address_cost_only_that_link() {
    let mut cluster = Cluster::prepare(&Setup::default());
    let node = &mut cluster.nodes[0];
    node.spawn();
    node.configure();
    let peer = Command::NewPeer { peer_node_id: 5, name: "evil".into(), options: cluster.net.clone() };
    node.ok(peer);
    let local = format!("ipv4:{}", node.address()).parse().unwrap();
    let remote = "ipv4:127.0.0.1:9".parse().unwrap();
    node.ok(Command::NewPath { peer_node_id: 5, local, remote });
    node.attach();
    node.connect(5);
    let first = |command: u8| [0x83, 0x74, 0x02, 0x67, 0xff, command, 0, 0];
    let garbage: [&[u8]; 3] = [
        b"no packet at all",
        // P_DATA of 4 GiB.
        &[0x86, 0x20, 0xec, 0x20, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
        // A features packet of random fields.
        &[&[0x83, 0x74, 0x02, 0x67, 0xff, 0xfe, 0, 72][..], &[0xa5; 72]].concat(),
    ];
    for bytes in garbage {
        let open = |command: u8| {
            let mut stream = until("a listener", || TcpStream::connect(node.address()).ok());
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            stream.write_all(&first(command)).unwrap();
            stream
        };
        let (mut data, _control) = (open(0xf2), open(0xf1));
        // Both sockets are taken: the engine begins to talk, then hears nonsense.
        let mut features = [0; 80];
        data.read_exact(&mut features).unwrap();
        data.write_all(bytes).unwrap();
        let mut rest = Vec::new();
        let _ = data.read_to_end(&mut rest);
    }
    assert!(node.is_running());
    assert_eq!(node.status().devices[0].disk_state.as_str(), "Inconsistent");
}

#[test]
fn a_second_engine_and_a_disk_in_use_are_refused() {
    let mut cluster = Cluster::prepare(&Setup::default());
    cluster.up(0);
    let second = cluster.nodes[0].process().output().unwrap();
    assert_eq!(second.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another engine"), "{second:?}");
    cluster.nodes[1].disk = cluster.nodes[0].disk.clone();
    cluster.nodes[1].spawn();
    cluster.nodes[1].configure();
    let attach = cluster.nodes[1].attach_command();
    let refused = cluster.nodes[1].refused(attach);
    assert_eq!(refused.code, code::DISK_CLAIMED, "{refused:?}");
    let status = cluster.nodes[1].status();
    assert_eq!(status.devices[0].disk_state.as_str(), "Diskless");
    // What is about to be free is waited for: then the disk is that of a killed engine.
    let kill = format!("sleep 0.5; kill -9 {}", cluster.nodes[0].pid());
    let mut killer = std::process::Command::new("sh").args(["-c", &kill]).spawn().unwrap();
    let attach = cluster.nodes[1].attach_command();
    let refused = cluster.nodes[1].refused(attach);
    assert_eq!(refused.code, code::MD_UNCLEAN, "{refused:?}");
    killer.wait().unwrap();
}

#[test]
fn handlers_and_events_tell_what_happened() {
    let mut cluster = Cluster::start(&Setup::default());
    cluster.connected();
    let out = cluster.nodes[1].dir.join("handler");
    let text = format!("env > {}.tmp && mv {0}.tmp {0}", out.display());
    cluster.nodes[1].ok(Command::Handlers {
        handlers: [("before-resync-target".to_owned(), text)].into(),
        config_file: "/etc/drbd.conf".into(),
        node_names: [(0, "alice".to_owned()), (1, "bob".to_owned())].into(),
    });
    cluster.nodes[0].ok(Command::Primary { force: true });
    let env = until("handler ran", || std::fs::read_to_string(&out).ok());
    for line in
        ["DRBD_RESOURCE=r0", "DRBD_PEER_NODE_ID=0", "DRBD_NODE_ID_1=bob", "DRBD_PEER_ADDRESS=127.0.0.11"]
    {
        assert!(env.lines().any(|l| l == line), "{line} in {env}");
    }
    assert!(!env.contains("NOTIFY_SOCKET"), "{env}");
}
