//! What the tests share: a disk in memory that plays the engine, an NBD server and a device around it,
//! and one suite of client programs that runs over any front end.

use palisade_export::nbd::{Export, Limits, Session};
use palisade_export::{
    BufferPool, DeviceError, DeviceEvent, DeviceExport, DeviceParams, Errno, Extent, Op, Reply, User,
};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub const BLOCK: usize = 4096;

/// A disk that remembers what was written, what was zeroed and how often it was flushed.
pub struct MemDisk {
    data: Mutex<Vec<u8>>,
    pub pool: BufferPool,
    pub flushes: AtomicUsize,
    pub zeroed: AtomicUsize,
    pub discarded: AtomicUsize,
}

impl MemDisk {
    pub fn new(size: usize) -> Arc<Self> {
        Arc::new(Self {
            data: Mutex::new(vec![0; size]),
            pool: BufferPool::new(16 << 20),
            flushes: AtomicUsize::new(0),
            zeroed: AtomicUsize::new(0),
            discarded: AtomicUsize::new(0),
        })
    }

    pub fn size(&self) -> usize {
        self.data.lock().unwrap().len()
    }

    pub fn grow(&self, size: usize) {
        self.data.lock().unwrap().resize(size, 0);
    }

    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        self.data.lock().unwrap()[offset..offset + len].to_vec()
    }

    pub fn answer(&self, op: &Op) -> Reply {
        let mut data = self.data.lock().unwrap();
        match op {
            Op::Read { offset, len } => {
                let start = *offset as usize;
                Reply::Data(self.pool.copy_from(&data[start..start + *len as usize]).freeze())
            }
            Op::Write { offset, data: payload, fua } => {
                assert_eq!(payload.as_ptr() as usize % palisade_export::ALIGN, 0, "payloads are aligned");
                self.flushes.fetch_add(usize::from(*fua), Ordering::Relaxed);
                let start = *offset as usize;
                data[start..start + payload.len()].copy_from_slice(payload);
                Reply::Done
            }
            Op::Flush => {
                self.flushes.fetch_add(1, Ordering::Relaxed);
                Reply::Done
            }
            Op::Discard { offset, len, .. } => {
                self.discarded.fetch_add(*len as usize, Ordering::Relaxed);
                data[*offset as usize..(*offset + *len) as usize].fill(0);
                Reply::Done
            }
            Op::WriteZeroes { fast: true, .. } => Reply::Error(Errno::NotSupported),
            Op::WriteZeroes { offset, len, .. } => {
                self.zeroed.fetch_add(*len as usize, Ordering::Relaxed);
                data[*offset as usize..(*offset + *len) as usize].fill(0);
                Reply::Done
            }
            Op::BlockStatus { offset, len, .. } => {
                let range = &data[*offset as usize..(*offset + *len) as usize];
                let extent = |(index, block): (usize, &[u8])| {
                    let zero = block.iter().all(|byte| *byte == 0);
                    let out_of_sync = (*offset as usize / BLOCK + index).is_multiple_of(64);
                    Extent { len: block.len() as u64, hole: zero, zero, out_of_sync }
                };
                Reply::Status(range.chunks(BLOCK).enumerate().map(extent).collect())
            }
        }
    }
}

/// An NBD server on a UNIX socket, one thread per connection.
pub struct NbdServer {
    pub socket: PathBuf,
    _dir: tempfile::TempDir,
}

pub fn export(name: &str, size: usize) -> Export {
    Export {
        name: name.into(),
        description: format!("resource {name}"),
        size: size as u64,
        block_min: 512,
        block_preferred: 4096,
        read_only: false,
        discard: true,
        rotational: false,
    }
}

impl NbdServer {
    pub fn start(disk: &Arc<MemDisk>, exports: Vec<Export>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nbd.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let exports: Arc<[Export]> = exports.into();
        let disk = Arc::clone(disk);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (disk, exports) = (Arc::clone(&disk), Arc::clone(&exports));
                let session = Session::new(exports, Limits::default(), disk.pool.clone());
                std::thread::spawn(move || serve(stream.unwrap(), session, &disk));
            }
        });
        Self { socket, _dir: dir }
    }

    pub fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket.display())
    }
}

fn serve(mut stream: UnixStream, mut session: Session, disk: &MemDisk) {
    loop {
        // Answers in reverse order: clients must not rely on any. An answer can admit more requests.
        loop {
            let mut requests: Vec<_> = std::iter::from_fn(|| session.next_request()).collect();
            if requests.is_empty() {
                break;
            }
            requests.reverse();
            for request in requests {
                session.complete(request.id, disk.answer(&request.op));
            }
        }
        for chunk in session.take_output() {
            if stream.write_all(&chunk).is_err() {
                return;
            }
        }
        if session.is_finished() {
            return;
        }
        if let Some(mut input) = session.take_input() {
            let received = stream.read(input.as_mut_slice()).unwrap_or(0);
            session.give_input(input, received);
        }
    }
}

enum Order {
    Attach(DeviceParams),
    Resize(u64),
    Detach(bool),
    InUse,
    Stop,
}

#[derive(Debug)]
pub enum Outcome {
    Attached(Result<(), DeviceError>),
    Resized(Result<(), DeviceError>),
    Detached(Result<(), DeviceError>),
    InUse(Vec<User>),
    Lost(String),
}

/// A device backend with an engine of one thread around it.
pub struct Engine {
    orders: Sender<Order>,
    outcomes: Receiver<Outcome>,
    thread: Option<std::thread::JoinHandle<()>>,
    /// While set, requests are taken but not answered.
    pub frozen: Arc<AtomicBool>,
    /// Most requests that waited together.
    pub together: Arc<AtomicUsize>,
}

impl Engine {
    pub fn start(mut device: Box<dyn DeviceExport>, disk: Arc<MemDisk>) -> Self {
        let (orders, inbox) = channel();
        let (outbox, outcomes) = channel();
        let frozen = Arc::new(AtomicBool::new(false));
        let together = Arc::new(AtomicUsize::new(0));
        let (freeze, most) = (Arc::clone(&frozen), Arc::clone(&together));
        let thread = std::thread::spawn(move || {
            let mut waiting = Vec::new();
            loop {
                let mut fd =
                    libc::pollfd { fd: device.event_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
                #[allow(unsafe_code)]
                // SAFETY: one valid entry.
                unsafe {
                    libc::poll(&raw mut fd, 1, 5)
                };
                for order in inbox.try_iter() {
                    match order {
                        Order::Attach(params) => device.attach(params),
                        Order::Resize(size) => device.resize(size),
                        Order::Detach(force) => device.detach(force),
                        Order::InUse => outbox.send(Outcome::InUse(device.in_use().unwrap())).unwrap(),
                        Order::Stop => return,
                    }
                }
                while let Some(event) = device.next_event() {
                    let outcome = match event {
                        DeviceEvent::Request(request) => {
                            waiting.push(request);
                            continue;
                        }
                        DeviceEvent::Attached(result) => Outcome::Attached(result),
                        DeviceEvent::Resized(result) => Outcome::Resized(result),
                        DeviceEvent::Detached(result) => Outcome::Detached(result),
                        DeviceEvent::Lost(reason) => Outcome::Lost(reason),
                    };
                    let _ = outbox.send(outcome);
                }
                most.fetch_max(waiting.len(), Ordering::Relaxed);
                if !freeze.load(Ordering::Relaxed) {
                    for request in waiting.drain(..).rev() {
                        device.complete(request.id, disk.answer(&request.op));
                    }
                }
            }
        });
        Self { orders, outcomes, thread: Some(thread), frozen, together }
    }

    fn outcome(&self) -> Outcome {
        self.outcomes.recv_timeout(Duration::from_secs(20)).expect("the device answers in time")
    }

    pub fn begin_attach(&self, params: &DeviceParams) {
        self.orders.send(Order::Attach(params.clone())).unwrap();
    }

    pub fn attach(&self, params: &DeviceParams) -> Result<(), DeviceError> {
        self.begin_attach(params);
        let Outcome::Attached(result) = self.outcome() else { panic!("not about attach") };
        result
    }

    pub fn resize(&self, size: u64) -> Result<(), DeviceError> {
        self.orders.send(Order::Resize(size)).unwrap();
        let Outcome::Resized(result) = self.outcome() else { panic!("not about resize") };
        result
    }

    pub fn begin_detach(&self, force: bool) {
        self.orders.send(Order::Detach(force)).unwrap();
    }

    pub fn detach(&self, force: bool) -> Result<(), DeviceError> {
        self.begin_detach(force);
        let Outcome::Detached(result) = self.outcome() else { panic!("not about detach") };
        result
    }

    pub fn lost(&self) -> String {
        let Outcome::Lost(reason) = self.outcome() else { panic!("not lost") };
        reason
    }

    pub fn in_use(&self) -> Vec<User> {
        self.orders.send(Order::InUse).unwrap();
        let Outcome::InUse(users) = self.outcome() else { panic!("not about users") };
        users
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.orders.send(Order::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Runs a program that must succeed; gives what it printed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let (ok, text) = try_run(program, arguments);
    assert!(ok, "{program} {arguments:?} failed:\n{text}");
    text
}

/// Runs a program, for at most a minute; whether it succeeded, and what it printed.
pub fn try_run(program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new("timeout")
        .args(["60", program])
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} is needed for this test: {error}"));
    assert_ne!(output.status.code(), Some(127), "{program} is needed for this test: install it");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Waits for something that happens by itself.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The suite: what clients do with any front end. `target` is a path or an NBD URI that qemu-io opens,
/// `fio` the options that make fio open it.
pub fn suite(disk: &MemDisk, target: &str, fio: &[String]) {
    let io = |commands: &[&str]| {
        let mut arguments = vec!["-f", "raw", "--cache=none"];
        if !target.contains("://") {
            arguments.push("--discard=unmap");
        }
        commands.iter().for_each(|command| arguments.extend(["-c", *command]));
        arguments.push(target);
        let text = run("qemu-io", &arguments);
        assert!(!text.contains("rror") && !text.contains("fail"), "{text}");
        text
    };
    // Small, large, unaligned in memory terms, at the very end, and read back through the client.
    io(&["write -P 0x11 0 4k", "write -P 0x22 1M 3M", "write -P 0x33 512 512", "flush"]);
    assert!(disk.flushes.load(Ordering::Relaxed) > 0, "the flush arrived");
    assert_eq!(disk.bytes(0, 512), [0x11; 512]);
    assert_eq!(disk.bytes(512, 512), [0x33; 512]);
    assert_eq!(disk.bytes(1 << 20, 3 << 20), vec![0x22; 3 << 20]);
    let last = disk.size() - 4096;
    io(&[&format!("write -P 0x44 {last} 4k"), &format!("read -P 0x44 {last} 4k")]);
    io(&["read -P 0x22 1M 3M", "read -P 0x33 512 512"]);
    let flushes = disk.flushes.load(Ordering::Relaxed);
    io(&["write -f -P 0x55 8k 8k"]);
    assert!(disk.flushes.load(Ordering::Relaxed) > flushes, "FUA or a flush arrived");
    // Zeroes read as zeroes, whichever way they take.
    io(&["write -z 1M 64k", "write -z -u 2M 1M", "read -P 0 1M 64k", "read -P 0 2M 1M"]);
    assert!(disk.zeroed.load(Ordering::Relaxed) >= (1 << 20), "zeroes need no payload");
    io(&["discard 3M 64k"]);
    assert_eq!(disk.bytes(1 << 20, 64 << 10), vec![0; 64 << 10]);
    // Many at once, random, verified.
    let verify = [
        "--name=verify",
        "--rw=randwrite",
        "--bsrange=4k-256k",
        "--blockalign=4k",
        "--size=16m",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_state_save=0",
        "--output-format=terse",
    ];
    let arguments: Vec<&str> = verify.into_iter().chain(fio.iter().map(String::as_str)).collect();
    run("fio", &arguments);
}

/// A directory for nodes and mounts, below `/tmp`.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A minor that no other test uses.
pub fn minor(test: u32) -> u32 {
    (std::process::id() % 1000) * 100 + test
}

pub fn exists(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}
