//! Engines as processes: what an administrator and a client see.

mod support;

use palisade_control::{Command, code};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;
use support::{Cluster, Setup, until};

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
