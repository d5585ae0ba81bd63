//! `/dev/drbdN` with real file systems on it. Needs root, and `/dev/fuse` and `/dev/loop-control`; with
//! `PALISADE_TEST_BACKEND=nbd`, a kernel with its NBD client instead.

use crate::support::{Engine, MemDisk, eventually, exists, minor, run, scratch, suite, try_run};
use palisade_export::{BackendKind, BufferPool, DeviceError, DeviceParams, User, open_device};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;

const SIZE: usize = 32 << 20;

fn kind() -> BackendKind {
    match std::env::var("PALISADE_TEST_BACKEND").as_deref() {
        Ok("nbd") => BackendKind::KernelNbd,
        _ => BackendKind::FuseLoop,
    }
}

fn engine(disk: &Arc<MemDisk>) -> Engine {
    let device = open_device(kind(), BufferPool::new(16 << 20)).unwrap();
    Engine::start(device, Arc::clone(disk))
}

fn params(dir: &Path, test: u32) -> DeviceParams {
    DeviceParams { dev_dir: dir.into(), ..DeviceParams::new(minor(test), SIZE as u64) }
}

/// Kernel devices that serve, or have served, one minor.
fn carriers(minor: u32) -> Vec<String> {
    let name = format!("palisade-drbd{minor}.");
    let serves = |path: &Path| {
        let read = |file| fs::read_to_string(path.join(file)).unwrap_or_default();
        read("loop/backing_file").starts_with(&format!("/{name}"))
            || (path.join("pid").exists() && read("backend").starts_with(&name))
    };
    fs::read_dir("/sys/block")
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| serves(&entry.path()))
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

fn direct(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_suite_over_a_device() {
    for block in [512, 4096] {
        let (disk, dir) = (MemDisk::new(SIZE), scratch());
        let link = dir.path().join("by-res/r0/0");
        let params =
            DeviceParams { logical_block: block, links: vec![link.clone()], ..params(dir.path(), block) };
        let node = params.node();
        let engine = engine(&disk);
        engine.attach(&params).unwrap();
        assert_eq!(run("blockdev", &["--getsize64", "--getss", text(&link)]), format!("{SIZE}\n{block}\n"));
        if block == 512 {
            let fio = ["--ioengine=libaio", "--direct=1", "--filename"].map(String::from);
            let mut fio = fio.to_vec();
            fio[2] = format!("--filename={}", node.display());
            suite(&disk, text(&node), &fio);
            assert!(engine.together.load(Ordering::Relaxed) > 4, "many requests are in flight");
        } else {
            run("qemu-io", &["-f", "raw", "--cache=none", "-c", "write -P 7 4k 2M", text(&node)]);
            assert_eq!(disk.bytes(4096, 2 << 20), vec![7; 2 << 20]);
        }
        engine.detach(false).unwrap();
        assert!(!exists(&node) && !exists(&link) && carriers(params.minor).is_empty());
    }
}

#[test]
fn a_mounted_device_stays_and_names_its_users() {
    let (disk, dir) = (MemDisk::new(SIZE), scratch());
    let params = params(dir.path(), 1);
    let node = params.node();
    let engine = engine(&disk);
    engine.attach(&params).unwrap();
    eventually("the end of udev's look at it", || engine.in_use().is_empty());
    run("mkfs.ext4", &["-q", text(&node)]);
    let at = dir.path().join("mount point");
    fs::create_dir(&at).unwrap();
    run("mount", &[text(&node), text(&at)]);
    fs::write(at.join("file"), vec![9; 3 << 20]).unwrap();
    run("sync", &["-f", text(&at)]);

    let is_mount = |user: &User| matches!(user, User::Mount { path, .. } if *path == at);
    let users = engine.in_use();
    assert!(users.iter().any(is_mount), "{users:?}");
    let error = engine.detach(false).unwrap_err();
    assert!(matches!(&error, DeviceError::InUse { users, .. } if users.iter().any(is_mount)));
    assert!(error.to_string().contains("mount point"), "{error}");
    run("umount", &[text(&at)]);

    // Attached all the time: the file is still there.
    run("mount", &[text(&node), text(&at)]);
    assert_eq!(fs::read(at.join("file")).unwrap(), vec![9; 3 << 20]);
    run("umount", &[text(&at)]);

    // A process that only has it open counts too, by name.
    let mut sleeper = Command::new("sleep").arg("60").stdin(File::open(&node).unwrap()).spawn().unwrap();
    let error = engine.detach(false).unwrap_err().to_string();
    assert!(error.contains(&format!("held open by sleep (PID {})", sleeper.id())), "{error}");
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();

    // What was written through the page cache and left there reaches the engine.
    let write = format!("printf tail | dd of={} bs=4096 seek=1000 conv=notrunc status=none", node.display());
    run("sh", &["-c", &write]);
    engine.detach(false).unwrap();
    assert_eq!(disk.bytes(4096 * 1000, 4), b"tail");
    assert!(!exists(&node) && carriers(params.minor).is_empty());

    // And it can come back.
    engine.attach(&params).unwrap();
    run("e2fsck", &["-fn", text(&node)]);
    engine.detach(false).unwrap();
}

#[test]
fn stacked_devices_count_as_users() {
    let (disk, dir) = (MemDisk::new(SIZE), scratch());
    let params = params(dir.path(), 2);
    let engine = engine(&disk);
    engine.attach(&params).unwrap();
    run("mkswap", &[text(&params.node())]);
    // Enough that the table is read rightly even where swap cannot be switched on.
    if try_run("swapon", &[text(&params.node())]).0 {
        let error = engine.detach(false).unwrap_err().to_string();
        run("swapoff", &[text(&params.node())]);
        assert!(error.contains("swap"), "{error}");
    }
    engine.detach(false).unwrap();
}

#[test]
fn it_grows_while_open() {
    let (disk, dir) = (MemDisk::new(SIZE), scratch());
    let params = params(dir.path(), 3);
    let engine = engine(&disk);
    engine.attach(&params).unwrap();
    let open = direct(&params.node());
    disk.grow(2 * SIZE);
    engine.resize(2 * SIZE as u64).unwrap();
    let size = run("blockdev", &["--getsize64", text(&params.node())]);
    assert_eq!(size.trim(), (2 * SIZE).to_string());
    drop(open);
    run("qemu-io", &["-f", "raw", "-c", &format!("write -P 5 {} 4k", 2 * SIZE - 4096), text(&params.node())]);
    assert_eq!(disk.bytes(2 * SIZE - 4096, 1), [5]);
    let error = engine.resize(1000).unwrap_err();
    assert!(matches!(error, DeviceError::Invalid { .. }), "{error}");
    engine.detach(false).unwrap();
}

#[test]
fn force_fails_what_waits() {
    let (disk, dir) = (MemDisk::new(SIZE), scratch());
    let params = params(dir.path(), 4);
    let engine = engine(&disk);
    engine.attach(&params).unwrap();
    let reader = direct(&params.node());
    engine.frozen.store(true, Ordering::Relaxed);
    engine.together.store(0, Ordering::Relaxed);
    let dd = Command::new("dd")
        .args(["if=/dev/zero", "bs=64k", "count=8", "oflag=direct", "status=none"])
        .stdout(reader.try_clone().unwrap())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("a write", || engine.together.load(Ordering::Relaxed) > 0);
    engine.detach(true).unwrap();
    let output = dd.wait_with_output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && message.contains("Input/output error"), "{message}");
    assert!(!exists(&params.node()));
    assert!(reader.read_at(&mut [0; 4096], 0).is_err(), "later requests fail too");
    drop(reader);
    eventually("the release of the device", || carriers(params.minor).is_empty());

    // An unforced detach that waits for an engine that never answers can be overtaken.
    engine.frozen.store(false, Ordering::Relaxed);
    engine.attach(&params).unwrap();
    run("sh", &["-c", &format!("printf x | dd of={} conv=notrunc status=none", params.node().display())]);
    engine.frozen.store(true, Ordering::Relaxed);
    engine.together.store(0, Ordering::Relaxed);
    engine.begin_detach(false);
    std::thread::sleep(std::time::Duration::from_millis(300));
    engine.detach(true).unwrap();
    eventually("the release of the device", || carriers(params.minor).is_empty());
}

#[test]
fn what_is_not_ours_stays() {
    let (disk, dir) = (MemDisk::new(SIZE), scratch());
    let params = params(dir.path(), 5);
    let engine = engine(&disk);
    fs::write(params.node(), "precious").unwrap();
    let error = engine.attach(&params).unwrap_err();
    assert!(matches!(error, DeviceError::Foreign { .. }), "{error}");
    assert_eq!(fs::read_to_string(params.node()).unwrap(), "precious");
    eventually("the release of the device", || carriers(params.minor).is_empty());
    fs::remove_file(params.node()).unwrap();
    run("mknod", &[text(&params.node()), "b", "147", "5"]);
    let error = engine.attach(&params).unwrap_err().to_string();
    assert!(error.contains("kernel's DRBD"), "{error}");
    eventually("the release of the device", || carriers(params.minor).is_empty());
    fs::remove_file(params.node()).unwrap();

    // A second engine for a minor that lives.
    engine.attach(&params).unwrap();
    let second = self::engine(&disk);
    let error = second.attach(&params).unwrap_err().to_string();
    assert!(error.contains(&format!("engine with PID {}", std::process::id())), "{error}");
    eventually("the release of the second device", || carriers(params.minor).len() == 1);
    run("qemu-io", &["-f", "raw", "-c", "write -P 5 0 4k", text(&params.node())]);

    // Released behind our back.
    let device = format!("/dev/{}", carriers(params.minor)[0]);
    match kind() {
        BackendKind::FuseLoop => run("losetup", &["-d", &device]),
        BackendKind::KernelNbd => run("nbd-client", &["-d", &device]),
    };
    assert!(!engine.lost().is_empty());
    assert!(!exists(&params.node()));
    engine.attach(&params).unwrap();
    engine.detach(false).unwrap();
}

/// Not a test: the engine that the next test kills.
#[test]
fn engine_process() {
    let Ok(dir) = std::env::var("PALISADE_TEST_ENGINE_DIR") else { return };
    let number = std::env::var("PALISADE_TEST_MINOR").unwrap().parse().unwrap();
    let disk = MemDisk::new(SIZE);
    let engine = engine(&disk);
    let params = DeviceParams { dev_dir: dir.into(), ..DeviceParams::new(number, SIZE as u64) };
    if std::env::var("PALISADE_TEST_FROZEN").is_ok() {
        // The kernel flushes while it attaches, and gets no answer.
        engine.frozen.store(true, Ordering::Relaxed);
        engine.begin_attach(&params);
        eventually("a request", || engine.together.load(Ordering::Relaxed) > 0);
        fs::write(params.dev_dir.join("waiting"), "").unwrap();
    } else {
        engine.attach(&params).unwrap();
    }
    loop {
        std::thread::park();
    }
}

fn engine_command(dir: &Path, minor: u32) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "device::engine_process"])
        .env("PALISADE_TEST_ENGINE_DIR", dir)
        .env("PALISADE_TEST_MINOR", minor.to_string())
        .stdout(Stdio::null());
    command
}

#[test]
fn a_kill_ends_an_engine_whose_thread_waits_for_it() {
    if kind() != BackendKind::FuseLoop {
        // Only a loop device waits for the engine while it attaches.
        return;
    }
    let dir = scratch();
    let params = params(dir.path(), 7);
    let mut process =
        engine_command(dir.path(), params.minor).env("PALISADE_TEST_FROZEN", "1").spawn().unwrap();
    eventually("a thread that waits in the kernel", || exists(&dir.path().join("waiting")));
    process.kill().unwrap();
    eventually("the end of the process", || process.try_wait().unwrap().is_some());
    let engine = engine(&MemDisk::new(SIZE));
    engine.attach(&params).unwrap();
    engine.detach(false).unwrap();
    assert!(carriers(params.minor).is_empty());
}

#[test]
fn after_a_kill_the_minor_is_free_again() {
    let dir = scratch();
    let params = params(dir.path(), 6);
    let node = params.node();
    let at = dir.path().join("mnt");
    fs::create_dir(&at).unwrap();
    let start = || engine_command(dir.path(), params.minor).spawn().unwrap();
    // Idle, then in use, with writes under way.
    for mounted in [false, true] {
        let mut process = start();
        eventually("the node", || exists(&node));
        if mounted {
            run("mkfs.ext4", &["-q", text(&node)]);
            run("mount", &[text(&node), text(&at)]);
            fs::write(at.join("file"), vec![1; 1 << 20]).unwrap();
        } else {
            run("sh", &["-c", &format!("head -c 8M /dev/zero | dd of={} status=none", node.display())]);
        }
        process.kill().unwrap();
        process.wait().unwrap();
        assert!(exists(&node), "nobody cleaned up");
        let stale = carriers(params.minor);
        assert_eq!(stale.len(), 1);

        let disk = MemDisk::new(SIZE);
        let engine = engine(&disk);
        engine.attach(&params).unwrap();
        run("qemu-io", &["-f", "raw", "-c", "write -P 3 0 64k", text(&node)]);
        assert_eq!(disk.bytes(0, 1), [3]);
        if mounted {
            // The dead device goes with its last user; it is not a user of the new one.
            assert_eq!(carriers(params.minor).len(), 2);
            run("umount", &["-l", text(&at)]);
            eventually("the release of the dead device", || carriers(params.minor).len() == 1);
        }
        engine.detach(false).unwrap();
        assert!(carriers(params.minor).is_empty());
    }
}
