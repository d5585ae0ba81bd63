//! `/dev/drbdN` where the kernel has neither NBD nor ublk: a FUSE file system of one file, and a
//! loop device over that file.
//!
//! The file system is mounted nowhere: the loop device alone keeps it. When the engine dies, it fails all
//! I/O and nothing but the loop device is left, which the next attach of the minor releases.

mod loopdev;
mod proto;
mod server;

use crate::channel::{Receiver, Sender, channel};
use crate::node::{Node, system};
use crate::users::Owner;
use crate::{
    BackendKind, BlockRequest, BufferPool, DeviceError, DeviceEvent, DeviceExport, DeviceParams, Reply, User,
    sys,
};
use loopdev::Loop;
use server::{Connection, FileParams};
use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

/// From the threads to the engine's loop.
#[derive(Debug)]
enum Note {
    Request(BlockRequest),
    /// A descriptor of the file was closed: the loop device's, or that of a failed attach.
    Released,
    /// The file system ended.
    Gone(String),
    Attached(Result<Attachment, DeviceError>),
    Resized(Result<(), DeviceError>),
    Detached(Result<(), DeviceError>),
    /// Not from a thread: an operation that ended before it began.
    Refused(DeviceEvent),
}

/// The loop device with our node on it.
#[derive(Debug, Clone)]
struct Attachment {
    device: Loop,
    node: Node,
}

/// The file system.
#[derive(Debug)]
struct Serving {
    connection: Arc<Connection>,
    thread: JoinHandle<()>,
    /// Root of the file system; also keeps it while the loop device does not.
    mount: OwnedFd,
    file: CString,
    file_name: String,
    params: DeviceParams,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    Attach,
    Resize,
    Detach,
}

/// The FUSE and loop backend of [`DeviceExport`].
///
/// Dropping it while attached fails all I/O of the device, as the engine's death would.
#[derive(Debug)]
pub struct FuseLoop {
    pool: BufferPool,
    sender: Sender<Note>,
    notes: Receiver<Note>,
    serving: Option<Serving>,
    attachment: Option<Attachment>,
    job: Option<Job>,
    /// A forced detach waits for the running operation to fail.
    force: bool,
}

impl FuseLoop {
    /// A backend without a device yet; payloads come from `pool`.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new(pool: BufferPool) -> io::Result<Self> {
        let (sender, notes) = channel()?;
        Ok(Self { pool, sender, notes, serving: None, attachment: None, job: None, force: false })
    }

    fn refuse(&self, event: DeviceEvent) {
        self.sender.send(Note::Refused(event));
    }

    /// Runs something that may wait for the device on a thread of its own, which holds no descriptor
    /// that the device needs (see [`sys::isolate_descriptors`]).
    fn run(&mut self, job: Job, keep: Option<RawFd>, work: impl FnOnce() -> Note + Send + 'static) {
        let sender = self.sender.clone();
        let keep: Vec<RawFd> = keep.into_iter().chain([sender.event_fd().as_raw_fd()]).collect();
        let fail = move |error| {
            let error = system("preparing a thread for the device", "raise the limits of the process")(error);
            match job {
                Job::Attach => Note::Attached(Err(error)),
                Job::Resize => Note::Resized(Err(error)),
                Job::Detach => Note::Detached(Err(error)),
            }
        };
        let spawned = std::thread::Builder::new().name("device".into()).spawn(move || {
            sender.send(match sys::isolate_descriptors(&keep) {
                Ok(()) => work(),
                Err(error) => fail(error),
            });
        });
        self.job = Some(job);
        if let Err(error) = spawned {
            self.sender.send(fail(error));
        }
    }

    fn start_serving(&self, params: DeviceParams) -> Result<Serving, DeviceError> {
        params.check()?;
        let hint = "give the engine access to /dev/fuse (module fuse) and the right to mount";
        let fuse = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .map_err(system("opening /dev/fuse", hint))?;
        let owner = Owner::current().map_err(system("reading /proc about this process", "mount /proc"))?;
        let file_name = loopdev::file_name(params.minor, owner);
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
        let thread = server::spawn(&connection, self.pool.clone(), self.sender.clone())
            .map_err(system("starting the FUSE thread", "raise the limits of the process"))?;
        Ok(Serving { connection, thread, mount, file, file_name, params })
    }

    /// Ends the file system: whatever still waits in the kernel fails.
    fn stop_serving(&mut self) {
        if let Some(Serving { connection, thread, .. }) = self.serving.take() {
            connection.kill();
            if thread.join().is_err() {
                tracing::error!("The FUSE thread has panicked.");
            }
        }
    }

    /// Takes the device from the kernel after the file system has ended.
    fn begin_forced(&mut self) {
        let attachment = self.attachment.clone();
        self.run(Job::Detach, None, move || {
            Note::Detached(attachment.map_or(Ok(()), |attachment| attachment.abandon()))
        });
    }

    fn on_note(&mut self, note: Note) -> Option<DeviceEvent> {
        match note {
            Note::Request(request) => Some(DeviceEvent::Request(request)),
            Note::Refused(event) => Some(event),
            Note::Attached(result) => {
                self.job = None;
                let result = result.map(|attachment| self.attachment = Some(attachment));
                self.after_job();
                if result.is_err() {
                    self.stop_serving();
                }
                Some(DeviceEvent::Attached(result))
            }
            Note::Resized(result) => {
                self.job = None;
                self.after_job();
                Some(DeviceEvent::Resized(result))
            }
            Note::Detached(Err(error)) if self.force => {
                // The unforced attempt failed, as it should.
                self.job = None;
                self.after_job();
                tracing::debug!(%error, "A detach was overtaken by a forced one.");
                None
            }
            Note::Detached(result) => {
                self.job = None;
                self.force = false;
                // Without a file system the device cannot be "as before".
                if result.is_ok() || self.serving.is_none() {
                    self.stop_serving();
                    self.attachment = None;
                }
                Some(DeviceEvent::Detached(result))
            }
            Note::Released => self.on_lost("the loop device was released".into()),
            Note::Gone(reason) => self.on_lost(reason),
        }
    }

    /// The loop device let go of the file although nobody asked us.
    fn on_lost(&mut self, reason: String) -> Option<DeviceEvent> {
        let serves = |serving: &Serving, attachment: &Attachment| {
            attachment.device.serves(&serving.file_name) && !serving.thread.is_finished()
        };
        let (Some(serving), Some(attachment)) = (&self.serving, &self.attachment) else { return None };
        if self.job == Some(Job::Detach) || serves(serving, attachment) {
            return None;
        }
        attachment.node.remove();
        self.attachment = None;
        self.stop_serving();
        Some(DeviceEvent::Lost(reason))
    }

    fn after_job(&mut self) {
        if std::mem::take(&mut self.force) {
            self.begin_forced();
        }
    }
}

impl DeviceExport for FuseLoop {
    fn kind(&self) -> BackendKind {
        BackendKind::FuseLoop
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.notes.event_fd()
    }

    fn next_event(&mut self) -> Option<DeviceEvent> {
        while let Some(note) = self.notes.next() {
            if let Some(event) = self.on_note(note) {
                return Some(event);
            }
        }
        None
    }

    fn complete(&mut self, id: u64, reply: Reply) {
        if let Some(serving) = &self.serving {
            serving.connection.complete(id, reply);
        }
    }

    fn attach(&mut self, params: DeviceParams) {
        if self.serving.is_some() || self.job.is_some() {
            let error = DeviceError::Busy("it is attached, or another operation runs");
            return self.refuse(DeviceEvent::Attached(Err(error)));
        }
        match self.start_serving(params) {
            Err(error) => self.refuse(DeviceEvent::Attached(Err(error))),
            Ok(serving) => {
                let (mount, file) = (serving.mount.as_raw_fd(), serving.file.clone());
                let (name, params) = (serving.file_name.clone(), serving.params.clone());
                self.serving = Some(serving);
                self.run(Job::Attach, Some(mount), move || {
                    Note::Attached(Attachment::create(mount, &file, &name, &params))
                });
            }
        }
    }

    fn resize(&mut self, size: u64) {
        let (Some(serving), Some(attachment), None) = (&mut self.serving, &self.attachment, self.job) else {
            let error = DeviceError::Busy("it is not attached, or another operation runs");
            return self.refuse(DeviceEvent::Resized(Err(error)));
        };
        let params = DeviceParams { size, ..serving.params.clone() };
        if let Err(error) = params.check() {
            return self.refuse(DeviceEvent::Resized(Err(error)));
        }
        serving.params = params;
        serving.connection.set_size(size);
        let (mount, file) = (serving.mount.as_raw_fd(), serving.file.clone());
        let device = attachment.device.clone();
        self.run(Job::Resize, Some(mount), move || {
            let result = sys::refresh_attributes(mount, &file).and_then(|_| device.update_size());
            Note::Resized(result.map_err(system("changing the size of the device", "see the kernel log")))
        });
    }

    fn in_use(&self) -> io::Result<Vec<User>> {
        self.attachment.as_ref().map_or(Ok(Vec::new()), |attachment| attachment.node.users())
    }

    fn detach(&mut self, force: bool) {
        if force && self.serving.is_some() {
            // From here on every wait in the kernel ends with an error, that of a running job too.
            self.stop_serving();
            if self.job.is_some() {
                self.force = true;
            } else {
                self.begin_forced();
            }
            return;
        }
        if self.job.is_some() {
            let error = DeviceError::Busy("another operation runs");
            return self.refuse(DeviceEvent::Detached(Err(error)));
        }
        let (Some(serving), Some(attachment)) = (&self.serving, self.attachment.clone()) else {
            return self.refuse(DeviceEvent::Detached(Ok(())));
        };
        let name = serving.file_name.clone();
        self.run(Job::Detach, None, move || Note::Detached(attachment.take_away(&name)));
    }
}

impl Drop for FuseLoop {
    fn drop(&mut self) {
        self.stop_serving();
    }
}

impl Attachment {
    /// Binds a loop device to the file below `mount` and makes the node.
    fn create(mount: RawFd, file: &CString, name: &str, params: &DeviceParams) -> Result<Self, DeviceError> {
        let scratch = &params.dev_dir;
        loopdev::clean_up(params.minor, scratch);
        let open =
            sys::open_at(mount, file).map_err(system("opening the FUSE file", "see the kernel log"))?;
        let device = Loop::bind(&open, name, params.logical_block, params.read_only, scratch)?;
        let minor = params.minor;
        let node = Node::create(params, device.dev, |dev| loopdev::may_replace(dev, minor));
        match node {
            Ok(node) => Ok(Self { device, node }),
            Err(error) => {
                device.release_or_warn();
                Err(error)
            }
        }
    }

    /// Takes the device away unless it is in use.
    fn take_away(&self, name: &str) -> Result<(), DeviceError> {
        self.node.take_away(
            || self.device.open(true),
            |device| self.device.release(&device),
            || !self.device.serves(name),
            || self.device.keep(),
        )
    }

    /// Takes the node away and lets the kernel release the loop device as soon as it can.
    fn abandon(&self) -> Result<(), DeviceError> {
        self.node.remove();
        let released = self.device.open(false).and_then(|device| self.device.release(&device));
        released.map_err(system(format!("releasing loop{}", self.device.number), "use losetup -d"))
    }
}
