//! Clusters of engines on this machine: one process per node, own loopback address, file as backing device.

#![allow(clippy::unwrap_used, clippy::panic)]

use palisade_control::{
    Client, Command, ConnectionStatus, Endpoint, MetaIndex, Options, Payload, Reply, ResourceStatus,
    RunningResource,
};
use palisade_metadata::image::create_md;
use palisade_metadata::{Geometry, Kind, Layout, Superblock, Version};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

pub const LIMIT: Duration = Duration::from_secs(15);
const CALL: Duration = Duration::from_secs(40);
static PORT_NEXT: AtomicU16 = AtomicU16::new(0);

/// Looks until `done` gives something.
pub fn until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(found) = done() {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub struct Node {
    pub id: u8,
    pub dir: PathBuf,
    pub disk: PathBuf,
    pub port: u16,
    /// Intentionally diskless.
    pub client: bool,
    quorum: &'static str,
    pub name: String,
    pub minor: u32,
    /// `/dev/drbdN` is made.
    device: bool,
    child: Option<Child>,
    control: Option<Client>,
}

pub struct Cluster {
    _dir: tempfile::TempDir,
    pub nodes: Vec<Node>,
    pub net: Options,
}

/// What a test may vary.
pub struct Setup {
    pub nodes: u8,
    pub bytes: u64,
    /// Node ids without a disk.
    pub clients: &'static [u8],
    pub quorum: &'static str,
    pub name: String,
    pub minor: u32,
    /// Make `/dev/drbdN`: name and minor must be this test's alone.
    pub device: bool,
    pub net: Vec<(&'static str, &'static str)>,
}

impl Default for Setup {
    fn default() -> Self {
        let net =
            vec![("cram-hmac-alg", "sha256"), ("shared-secret", "sesame"), ("socket-check-timeout", "1")];
        Self {
            nodes: 2,
            bytes: 64 << 20,
            clients: &[],
            quorum: "off",
            name: "r0".into(),
            minor: MINOR,
            device: false,
            net,
        }
    }
}

fn options(pairs: &[(&str, &str)]) -> Options {
    pairs.iter().copied().collect()
}

impl Cluster {
    /// Nodes with disks, connected to each other, Secondary.
    pub fn start(setup: &Setup) -> Self {
        let cluster = Self::prepare(setup);
        let mut cluster = cluster;
        for n in 0..cluster.nodes.len() {
            cluster.up(n);
        }
        cluster
    }

    /// Disks with metadata, no process yet.
    pub fn prepare(setup: &Setup) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Different from every other test of this run and of other runs on this machine.
        let base = 20_000 + (std::process::id() % 20_000) as u16;
        let port = base + PORT_NEXT.fetch_add(1, Ordering::Relaxed);
        let nodes = (0..setup.nodes)
            .map(|id| {
                let home = dir.path().join(format!("n{id}"));
                std::fs::create_dir(&home).unwrap();
                let disk = home.join("disk");
                let file = File::options().read(true).write(true).create_new(true).open(&disk).unwrap();
                file.set_len(setup.bytes).unwrap();
                let layout = Layout::compute(Kind::Internal, setup.bytes, None, Geometry::new(4)).unwrap();
                create_md(&file, &layout, &Superblock::fresh(Version::V09, &layout)).unwrap();
                let client = setup.clients.contains(&id);
                Node {
                    id,
                    dir: home,
                    disk,
                    port,
                    client,
                    quorum: setup.quorum,
                    name: setup.name.clone(),
                    minor: setup.minor,
                    device: setup.device,
                    child: None,
                    control: None,
                }
            })
            .collect();
        Self { _dir: dir, nodes, net: options(&setup.net) }
    }

    pub fn up(&mut self, n: usize) {
        let count = self.nodes.len();
        let net = self.net.clone();
        let clients: Vec<bool> = self.nodes.iter().map(|n| n.client).collect();
        let node = &mut self.nodes[n];
        node.spawn();
        node.configure();
        for peer in (0..count).filter(|p| *p != n) {
            node.peer(peer as u8, net.clone());
            if clients[peer] {
                node.ok(Command::PeerDeviceOptions {
                    peer_node_id: peer as u8,
                    volume: 0,
                    options: options(&[("bitmap", "no")]),
                    set_defaults: false,
                });
            }
        }
        if !node.client {
            node.attach();
        }
        for peer in (0..count).filter(|p| *p != n) {
            node.connect(peer as u8);
        }
    }

    /// Waits until all nodes are connected to each other.
    pub fn connected(&mut self) {
        for n in 0..self.nodes.len() {
            for p in (0..self.nodes.len()).filter(|p| *p != n) {
                until(&format!("{n} connected to {p}"), || {
                    let c = self.nodes[n].connection(p);
                    (c.connection_state.as_str() == "Connected").then_some(())
                });
            }
        }
    }

    /// Waits until all disks are UpToDate.
    pub fn in_sync(&mut self) {
        for n in (0..self.nodes.len()).filter(|n| !self.nodes[*n].client).collect::<Vec<_>>() {
            until(&format!("disk of {n} UpToDate"), || {
                let s = self.nodes[n].status();
                (s.devices[0].disk_state.as_str() == "UpToDate").then_some(())
            });
        }
    }

    /// A cluster whose disks are all UpToDate without a resync; node 0 is Primary.
    pub fn ready(setup: &Setup) -> Self {
        let mut cluster = Self::start(setup);
        cluster.connected();
        cluster.nodes[0].ok(Command::NewCurrentUuid {
            minor: setup.minor,
            clear_bitmap: true,
            force_resync: false,
        });
        cluster.in_sync();
        cluster.nodes[0].ok(Command::Primary { force: false });
        cluster
    }

    /// The data areas of all nodes.
    pub fn images_equal(&self) -> bool {
        let read = |n: &Node| {
            let all = std::fs::read(&n.disk).unwrap();
            let data = all.len() - (1 << 20);
            all[..data].to_vec()
        };
        let images: Vec<Vec<u8>> = self.nodes.iter().filter(|n| !n.client).map(read).collect();
        images.windows(2).all(|pair| pair[0] == pair[1])
    }
}

/// The number does not matter where no device node is made.
pub const MINOR: u32 = 900;

impl Node {
    fn ip(id: u8) -> String {
        format!("127.0.0.{}", 11 + id)
    }

    fn endpoint(&self, id: u8) -> Endpoint {
        format!("ipv4:{}:{}", Self::ip(id), self.port).parse().unwrap()
    }

    pub fn address(&self) -> String {
        format!("{}:{}", Self::ip(self.id), self.port)
    }

    pub fn process(&self) -> Process {
        let mut process = Process::new(env!("CARGO_BIN_EXE_palisaded"));
        process.arg(&self.name).env("PALISADE_RUNTIME_DIR", &self.dir);
        if !self.device {
            process.env("PALISADE_DEVICE", "none");
        }
        process.stdin(Stdio::null());
        process
    }

    pub fn spawn(&mut self) {
        let log = File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let child = self.process().stderr(log).spawn().unwrap();
        self.child = Some(child);
        let (name, path) = (self.name.clone(), self.dir.join(format!("{}.sock", self.name)));
        let client = until("control socket", || Client::connect_path(&name, &path, LIMIT).ok());
        self.control = Some(client);
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    pub fn configure(&mut self) {
        let node_id = self.id;
        self.ok(Command::NewResource {
            name: self.name.clone(),
            node_id,
            options: options(&[
                ("quorum", self.quorum),
                ("on-no-quorum", "io-error"),
                ("auto-promote", "no"),
            ]),
        });
        let device = if self.client { options(&[("diskless", "yes")]) } else { Options::new() };
        self.ok(Command::NewMinor { minor: self.minor, volume: 0, options: device });
    }

    pub fn peer(&mut self, peer: u8, net: Options) {
        self.ok(Command::NewPeer { peer_node_id: peer, name: format!("n{peer}"), options: net });
        let (local, remote) = (self.endpoint(self.id), self.endpoint(peer));
        self.ok(Command::NewPath { peer_node_id: peer, local, remote });
    }

    pub fn attach(&mut self) {
        let command = self.attach_command();
        self.ok(command);
    }

    pub fn attach_command(&self) -> Command {
        let disk = self.disk.to_str().unwrap().to_owned();
        Command::Attach {
            minor: self.minor,
            backing_device: disk.clone(),
            meta_device: disk,
            meta_index: MetaIndex::Internal,
            options: Options::new(),
        }
    }

    /// Applies the activity log, as `drbdadm up` does before it attaches.
    pub fn apply_al(&self) {
        use palisade_metadata::image;
        let file = File::options().read(true).write(true).open(&self.disk).unwrap();
        image::apply_al(&file, Kind::Internal, None).unwrap();
    }

    pub fn connect(&mut self, peer: u8) {
        self.ok(Command::Connect { peer_node_id: peer, discard_my_data: false, tentative: false });
    }

    pub fn call(&mut self, command: Command) -> Reply {
        let log = self.dir.join("log");
        let client = self.control.as_mut().expect("a running engine");
        client.call(command, CALL).unwrap_or_else(|e| {
            panic!("{e}\n{}", std::fs::read_to_string(log).unwrap_or_default());
        })
    }

    pub fn ok(&mut self, command: Command) {
        let what = format!("{command:?}");
        let reply = self.call(command);
        assert!(matches!(reply, Reply::Ok { .. }), "node {}: {what}: {reply:?}\n{}", self.id, self.log());
    }

    pub fn refused(&mut self, command: Command) -> palisade_control::Refusal {
        match self.call(command) {
            Reply::Refused(r) => r,
            other => panic!("not refused: {other:?}"),
        }
    }

    pub fn status(&mut self) -> ResourceStatus {
        self.control.as_mut().expect("a running engine").status(LIMIT).unwrap().expect("a resource")
    }

    pub fn running(&mut self) -> RunningResource {
        match self.call(Command::Show) {
            Reply::Ok { payload: Payload::Running(running), .. } => running,
            other => panic!("{other:?}"),
        }
    }

    pub fn connection(&mut self, peer: usize) -> ConnectionStatus {
        self.status().connection(peer as i32).expect("a connection").clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a running engine").id()
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        self.control = None;
    }

    pub fn down(&mut self) {
        self.ok(Command::Down);
        let status = self.child.take().unwrap().wait().unwrap();
        assert!(status.success(), "{status}\n{}", self.log());
        self.control = None;
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|c| c.try_wait().unwrap().is_none())
    }

    pub fn nbd(&self) -> Nbd {
        let path = self.nbd_path();
        until("NBD client", || Nbd::open(&path).ok())
    }

    pub fn nbd_path(&self) -> PathBuf {
        self.dir.join(format!("{}.0.nbd", self.name))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- node {}\n{}", self.id, self.log());
        }
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The least of an NBD client: one request at a time.
pub struct Nbd {
    stream: UnixStream,
}

const WRITE: u16 = 1;
const READ: u16 = 0;
const FLUSH: u16 = 3;

impl Nbd {
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        stream.write_all(&3_u32.to_be_bytes())?;
        // NBD_OPT_EXPORT_NAME with the empty name.
        stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0")?;
        let mut answer = [0; 10];
        stream.read_exact(&mut answer)?;
        Ok(Self { stream })
    }

    pub fn request(&mut self, kind: u16, offset: u64, len: u32, data: &[u8]) -> std::io::Result<()> {
        let mut head = Vec::new();
        head.extend(0x2560_9513_u32.to_be_bytes());
        head.extend(0_u16.to_be_bytes());
        head.extend(kind.to_be_bytes());
        head.extend(7_u64.to_be_bytes());
        head.extend(offset.to_be_bytes());
        head.extend(len.to_be_bytes());
        head.extend(data);
        self.stream.write_all(&head)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        match u32::from_be_bytes(reply[4..8].try_into().unwrap()) {
            0 => Ok(()),
            errno => Err(std::io::Error::from_raw_os_error(errno as i32)),
        }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.request(WRITE, offset, data.len() as u32, data)
    }

    pub fn flush(&mut self) -> std::io::Result<()> {
        self.request(FLUSH, 0, 0, &[])
    }

    pub fn read(&mut self, offset: u64, len: u32) -> std::io::Result<Vec<u8>> {
        self.request(READ, offset, len, &[])?;
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }
}

/// Removes what a failed test left.
pub struct Leftovers {
    pub minor: u32,
    pub mount: PathBuf,
    pub paths: Vec<PathBuf>,
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        let quiet = |program: &str, args: &[&Path]| {
            let _ = Process::new(program).args(args).stderr(Stdio::null()).status();
        };
        quiet("umount", &[Path::new("-l"), &self.mount]);
        for device in carriers(self.minor).iter().filter(|d| d.starts_with("/dev/loop")) {
            quiet("losetup", &[Path::new("-d"), device]);
        }
        for path in &self.paths {
            let _ = std::fs::remove_file(path).or_else(|_| std::fs::remove_dir(path));
        }
    }
}

/// Loop and NBD devices of a minor, as far as they still serve something.
pub fn carriers(minor: u32) -> Vec<PathBuf> {
    let name = format!("palisade-drbd{minor}.");
    let serves = |dir: &Path| {
        let read = |file| std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        read("loop/backing_file").contains(&name)
            || (dir.join("pid").exists() && read("backend").starts_with(&name))
    };
    let devices = std::fs::read_dir("/sys/block").unwrap().map(|e| e.unwrap());
    devices.filter(|e| serves(&e.path())).map(|e| Path::new("/dev").join(e.file_name())).collect()
}

/// Offset, length and state of each run that `nbdinfo --map` shows.
pub fn map(node: &Node, context: &str) -> Vec<[u64; 3]> {
    let uri = format!("nbd+unix:///?socket={}", node.nbd_path().display());
    let map = format!("--map={context}");
    let out = Process::new("nbdinfo").args([map.as_str(), uri.as_str()]).output().unwrap();
    assert!(out.status.success(), "{out:?}");
    let text = String::from_utf8(out.stdout).unwrap();
    let run = |line: &str| {
        let mut words = line.split_whitespace().map(|w| w.parse().unwrap_or(u64::MAX));
        std::array::from_fn(|_| words.next().unwrap_or(u64::MAX))
    };
    text.lines().map(run).collect()
}
