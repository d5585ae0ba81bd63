//! `/dev/drbdN` where the kernel has neither NBD nor ublk: a FUSE file system of one file, and a
//! loop device over that file.
//!
//! The file system is mounted nowhere: the loop device alone keeps it. When the engine dies, it fails all
//! I/O and nothing but the loop device is left, which the next attach of the minor releases.

mod loopdev;
mod proto;
mod server;

use crate::carried::{self, Carrier, Work};
use crate::channel::Sender;
use crate::node::{Node, system};
use crate::owner::{Owner, tag};
use crate::{BackendKind, BufferPool, DeviceError, DeviceParams, Reply, sys};
use loopdev::Loop;
use server::{Connection, FileParams};
use std::ffi::CString;
use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

type Note = carried::Note<Attachment>;

/// The file system and the thread that serves it.
#[derive(Debug)]
pub(crate) struct Fuse {
    connection: Arc<Connection>,
    thread: JoinHandle<()>,
    /// Root of the file system; also keeps it while the loop device does not.
    mount: OwnedFd,
    file_name: String,
    file: CString,
}

impl Carrier for Fuse {
    const KIND: BackendKind = BackendKind::FuseLoop;
    type Attachment = Attachment;

    fn start(params: &DeviceParams, pool: &BufferPool, notes: &Sender<Note>) -> Result<Self, DeviceError> {
        let hint = "give the engine access to /dev/fuse (module fuse) and the right to mount";
        let fuse = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .map_err(system("opening /dev/fuse", hint))?;
        let owner = Owner::current().map_err(system("reading /proc about this process", "mount /proc"))?;
        let file_name = tag(params.minor, owner);
        let file = CString::new(file_name.as_str())
            .map_err(|error| system("naming the file", "choose another minor")(error.into()))?;
        let file_params = FileParams {
            name: file_name.clone().into_bytes(),
            block: params.logical_block,
            read_only: params.read_only,
            discard: params.discard,
        };
        let connection = Connection::new(OwnedFd::from(fuse), file_params, params.size)
            .map_err(system("preparing /dev/fuse", hint))?;
        let mount = connection.mount().map_err(system("mounting the FUSE file system", hint))?;
        let connection = Arc::new(connection);
        let thread = server::spawn(&connection, pool.clone(), notes.clone())
            .map_err(system("starting the FUSE thread", "raise the limits of the process"))?;
        Ok(Self { connection, thread, mount, file_name, file })
    }

    fn clean_up(params: &DeviceParams) {
        loopdev::clean_up(params.minor, &params.dev_dir);
    }

    fn attach(&self, params: &DeviceParams) -> Work<Attachment> {
        let mount = self.mount.as_raw_fd();
        let (file, name, params) = (self.file.clone(), self.file_name.clone(), params.clone());
        let run = move || Attachment::create(mount, &file, name, &params);
        Work { keep: vec![mount], run: Box::new(run) }
    }

    fn resize(&self, attachment: &Attachment, size: u64) -> Work<()> {
        self.connection.set_size(size);
        let (mount, file, device) = (self.mount.as_raw_fd(), self.file.clone(), attachment.device.clone());
        let run = move || {
            let result = device.update_size(size, || sys::refresh_attributes(mount, &file).map(drop));
            result.map_err(system("changing the size of the device", "see the kernel log"))
        };
        Work { keep: vec![mount], run: Box::new(run) }
    }

    fn complete(&self, id: u64, reply: Reply) {
        self.connection.complete(id, reply);
    }

    fn stop(self) {
        let Self { connection, thread, mount, .. } = self;
        connection.kill();
        if thread.join().is_err() {
            tracing::error!("The FUSE thread has panicked.");
        }
        // First the connection, so that nothing about the mount can wait for an answer.
        drop(connection);
        drop(mount);
    }
}

/// The loop device with our node on it.
#[derive(Debug, Clone)]
pub(crate) struct Attachment {
    device: Loop,
    file_name: String,
    node: Node,
}

impl Attachment {
    /// Binds a loop device to the file below `mount` and makes the node.
    fn create(
        mount: RawFd,
        file: &CString,
        name: String,
        params: &DeviceParams,
    ) -> Result<Self, DeviceError> {
        let scratch = &params.dev_dir;
        loopdev::clean_up(params.minor, scratch);
        let open =
            sys::open_at(mount, file).map_err(system("opening the FUSE file", "see the kernel log"))?;
        let device = Loop::bind(&open, &name, params.logical_block, params.read_only, scratch)?;
        match Node::create(params, device.dev) {
            Ok(node) => Ok(Self { device, file_name: name, node }),
            Err(error) => {
                device.release_or_warn();
                Err(error)
            }
        }
    }
}

impl carried::Attachment for Attachment {
    fn node(&self) -> &Node {
        &self.node
    }

    fn is_bound(&self) -> bool {
        self.device.serves(&self.file_name)
    }

    fn take_away(&self) -> Result<(), DeviceError> {
        self.node.take_away(
            || self.device.open(true),
            |device| self.device.release(&device),
            || !self.is_bound(),
            || self.device.keep(),
        )
    }

    fn abandon(&self) -> Result<(), DeviceError> {
        self.node.remove();
        if !self.is_bound() {
            return Ok(());
        }
        // One that is still open goes when its last user closes it.
        let released = self.device.open(false).and_then(|device| self.device.release(&device));
        released.map_err(system(format!("releasing loop{}", self.device.number), "use losetup -d"))
    }
}
