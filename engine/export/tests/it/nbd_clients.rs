//! The NBD session against the clients people use: libnbd, QEMU and fio. Fails where they are missing.

use crate::support::{MemDisk, NbdServer, export, run, scratch, suite, try_run};
use palisade_export::nbd::Export;

const SIZE: usize = 32 << 20;

#[test]
fn the_suite_over_nbd() {
    let disk = MemDisk::new(SIZE);
    let server = NbdServer::start(&disk, vec![export("r0/0", SIZE)]);
    let uri = server.uri("r0/0");
    suite(&disk, &uri, &["--ioengine=nbd".into(), format!("--uri={uri}")]);
}

#[test]
fn nbdinfo_sees_what_we_offer() {
    let disk = MemDisk::new(SIZE);
    let readonly = Export { read_only: true, block_min: 4096, ..export("r0/1", SIZE) };
    let server = NbdServer::start(&disk, vec![export("r0/0", SIZE), readonly]);
    let text = run("nbdinfo", &["--list", &server.uri("")]);
    for line in [
        "export=\"r0/0\":",
        "description: resource r0/0",
        "export-size: 33554432",
        "base:allocation",
        "palisade:out-of-sync",
        "can_flush: true",
        "can_fua: true",
        "can_trim: true",
        "can_zero: true",
        "can_fast_zero: true",
        "can_df: true",
        "can_multi_conn: true",
        "block_size_minimum: 4096",
        "block_size_preferred: 4096",
        "block_size_maximum: 33554432",
        "is_read_only: true",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
    let (ok, text) = try_run("nbdinfo", &[&server.uri("r1")]);
    assert!(!ok && text.contains("No such file or directory for export: r1"), "{text}");
}

#[test]
fn maps_show_allocation_and_replication() {
    let disk = MemDisk::new(1 << 20);
    let server = NbdServer::start(&disk, vec![export("r0/0", 1 << 20)]);
    let uri = server.uri("r0/0");
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 64k 64k", &uri]);
    let text = run("nbdinfo", &["--map", &uri]);
    let columns = |text: &str| -> Vec<Vec<u64>> {
        let numbers = |line: &str| line.split_whitespace().map_while(|word| word.parse().ok()).collect();
        text.lines().map(numbers).collect()
    };
    assert_eq!(columns(&text), [[0, 65536, 3], [65536, 65536, 0], [131_072, 917_504, 3]], "{text}");
    let text = run("nbdinfo", &["--map=palisade:out-of-sync", &uri]);
    assert_eq!(columns(&text)[..3], [[0, 4096, 1], [4096, 258_048, 0], [262_144, 4096, 1]], "{text}");
    let text = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    assert!(
        text.contains("\"start\": 65536, \"length\": 65536") && text.contains("\"zero\": false"),
        "{text}"
    );
}

#[test]
fn libnbd_with_all_its_commands() {
    let disk = MemDisk::new(SIZE);
    let server = NbdServer::start(&disk, vec![export("r0/0", SIZE)]);
    let script = r#"
import errno
h.set_strict_mode(0)
h.connect_uri(URI)
assert h.get_size() == 33554432
h.pwrite(b'a' * 1048576, 512, nbd.CMD_FLAG_FUA)
assert h.pread(1048576, 512, nbd.CMD_FLAG_DF if hasattr(nbd, 'CMD_FLAG_DF') else 0) == b'a' * 1048576
h.pwrite(b'b' * 33554432, 0)
h.trim(65536, 0)
h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE)
h.flush()
def fails(number, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as e:
        assert e.errnum == number, (e.errnum, number, arguments)
    else:
        raise AssertionError(arguments)
fails(errno.ENOTSUP, h.zero, 65536, 0, nbd.CMD_FLAG_FAST_ZERO)
fails(errno.EINVAL, h.pread, 512, 100)
fails(errno.EINVAL, h.pread, 512, 33554432)
fails(errno.ENOSPC, h.pwrite, b'c' * 512, 33554432)
fails(errno.EINVAL, h.block_status, 512, 0, lambda *a: 0)
assert h.pread(512, 65536) == bytes(512)
h.shutdown()

# Two connections see one device: what one has written and the other flushes is there.
one, two = nbd.NBD(), nbd.NBD()
for client in one, two:
    client.add_meta_context('base:allocation')
    client.connect_uri(URI)
assert one.can_multi_conn()
one.pwrite(b'd' * 4096, 8192)
two.flush()
assert two.pread(4096, 8192) == b'd' * 4096

# Hundreds in flight on one connection.
buffers = [(nbd.Buffer(65536), offset) for offset in range(0, 33554432, 65536)]
cookies = [two.aio_pread(buffer, offset) for buffer, offset in buffers]
while two.aio_in_flight() > 0:
    two.poll(-1)
assert all(two.aio_command_completed(cookie) for cookie in cookies)

# Without structured replies, and by the oldest option.
for old in 'structured', 'oldest':
    h = nbd.NBD()
    h.set_request_structured_replies(False)
    if old == 'oldest':
        h.set_handshake_flags(0)
    h.connect_uri(URI)
    assert not h.get_structured_replies_negotiated()
    assert h.pread(4096, 8192) == b'd' * 4096
    h.shutdown()
"#;
    let script = script.replace("URI", &format!("'{}'", server.uri("r0/0")));
    // The distribution's Python, whichever other comes first on the PATH.
    run("env", &["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "nbdsh", "-c", &script]);
}

#[test]
fn images_travel() {
    let disk = MemDisk::new(SIZE);
    let server = NbdServer::start(&disk, vec![export("r0/0", SIZE)]);
    let dir = scratch();
    let image = dir.path().join("image");
    let pattern: Vec<u8> =
        (0..SIZE).map(|i| if i % (5 << 20) < (1 << 20) { (i / 4096) as u8 } else { 0 }).collect();
    std::fs::write(&image, &pattern).unwrap();
    let (image, uri) = (image.to_str().unwrap(), server.uri("r0/0"));
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", image, &uri]);
    assert!(disk.bytes(0, SIZE) == pattern);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", image, &uri]);
    let copy = dir.path().join("copy");
    run("nbdcopy", &["--connections=4", &uri, copy.to_str().unwrap()]);
    assert!(std::fs::read(copy).unwrap() == pattern);
}
