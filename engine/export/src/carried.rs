//! What all device backends have in common: the engine's side of attach, resize and detach, each run on
//! a thread of its own, one at a time.

use crate::channel::{Receiver, Sender, channel};
use crate::fuse::Fuse;
use crate::kernel_nbd::{self, Nbd};
use crate::node::{Node, remove_dead, system};
use crate::{
    BackendKind, BlockRequest, BufferPool, DeviceError, DeviceEvent, DeviceExport, DeviceParams, Reply, User,
    sys,
};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

/// A device backend without a device yet; payloads come from `pool`.
///
/// Dropping it while attached fails all I/O of the device, as the engine's death would.
///
/// # Errors
/// When the process has no descriptor left.
pub fn open_device(kind: BackendKind, pool: BufferPool) -> io::Result<Box<dyn DeviceExport>> {
    Ok(match kind {
        BackendKind::KernelNbd => Box::new(Carried::<Nbd>::new(pool)?),
        BackendKind::FuseLoop => Box::new(Carried::<Fuse>::new(pool)?),
    })
}

impl BackendKind {
    /// The best one this kernel has: its NBD client (the module is loaded if need be, which takes
    /// some milliseconds), else FUSE and loop.
    #[must_use]
    pub fn detect() -> Self {
        if kernel_nbd::is_available() { Self::KernelNbd } else { Self::FuseLoop }
    }
}

/// From a backend's threads to the engine's loop.
#[derive(Debug)]
pub(crate) enum Note<A> {
    Request(BlockRequest),
    /// Perhaps the kernel let go of the device.
    Released,
    /// The data path ended.
    Gone(String),
    Attached(Result<A, DeviceError>),
    Resized(Result<(), DeviceError>),
    Detached(Result<(), DeviceError>),
    /// Not from a thread: an operation that ended before it began.
    Refused(DeviceEvent),
}

/// Work for a thread of its own, and the descriptors it needs there.
pub(crate) struct Work<R> {
    pub keep: Vec<RawFd>,
    pub run: Box<dyn FnOnce() -> Result<R, DeviceError> + Send>,
}

/// The running data path between a kernel device and the engine.
pub(crate) trait Carrier: Send + Sized + 'static {
    const KIND: BackendKind;
    type Attachment: Attachment;

    /// Starts the data path; its thread sends requests as notes.
    fn start(
        params: &DeviceParams,
        pool: &BufferPool,
        notes: &Sender<Note<Self::Attachment>>,
    ) -> Result<Self, DeviceError>;

    /// Takes from the kernel what a dead process left for this minor.
    fn clean_up(params: &DeviceParams);

    /// Binds a kernel device to the data path and makes the node.
    fn attach(&self, params: &DeviceParams) -> Work<Self::Attachment>;

    /// The kernel device is bound.
    fn attached(&mut self) {}

    /// Gives the data path and the kernel device another size.
    fn resize(&self, attachment: &Self::Attachment, size: u64) -> Work<()>;

    fn complete(&self, id: u64, reply: Reply);

    /// Ends the data path: whatever waits in the kernel fails, now or soon.
    fn stop(self);
}

/// A kernel device with our node on it.
pub(crate) trait Attachment: Clone + Send + 'static {
    fn node(&self) -> &Node;

    /// The kernel device is still bound to our data path.
    fn is_bound(&self) -> bool;

    /// Takes the device away unless it is in use; may wait for the engine.
    fn take_away(&self) -> Result<(), DeviceError>;

    /// Takes the device away after the data path has ended.
    fn abandon(&self) -> Result<(), DeviceError>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Job {
    Attach,
    Resize,
    Detach,
}

/// The engine's side of one device.
struct Carried<C: Carrier> {
    pool: BufferPool,
    sender: Sender<Note<C::Attachment>>,
    notes: Receiver<Note<C::Attachment>>,
    params: Option<DeviceParams>,
    carrier: Option<C>,
    attachment: Option<C::Attachment>,
    job: Option<Job>,
    /// A forced detach waits for the running operation to fail.
    force: bool,
}

impl<C: Carrier> Carried<C> {
    fn new(pool: BufferPool) -> io::Result<Self> {
        let (sender, notes) = channel()?;
        let (params, carrier, attachment, job) = (None, None, None, None);
        Ok(Self { pool, sender, notes, params, carrier, attachment, job, force: false })
    }

    fn refuse(&self, event: DeviceEvent) {
        self.sender.send(Note::Refused(event));
    }

    /// Runs something that may wait for the device on a thread of its own, which holds no descriptor
    /// that the device needs (see [`sys::isolate_descriptors`]).
    fn run<R: 'static>(
        &mut self,
        job: Job,
        work: Work<R>,
        note: impl Fn(Result<R, DeviceError>) -> Note<C::Attachment> + Copy + Send + 'static,
    ) {
        let sender = self.sender.clone();
        let Work { mut keep, run } = work;
        keep.push(sender.event_fd().as_raw_fd());
        let fail = system("preparing a thread for the device", "raise the limits of the process");
        let spawned = std::thread::Builder::new().name("device".into()).spawn(move || {
            let result = match sys::isolate_descriptors(&keep) {
                Ok(()) => run(),
                Err(error) => Err(fail(error)),
            };
            sender.send(note(result));
        });
        self.job = Some(job);
        if let Err(error) = spawned {
            let fail = system("starting a thread for the device", "raise the limits of the process");
            self.sender.send(note(Err(fail(error))));
        }
    }

    fn stop(&mut self) {
        if let Some(carrier) = self.carrier.take() {
            carrier.stop();
        }
    }

    /// Takes the device from the kernel after the data path has ended.
    fn begin_forced(&mut self) {
        let attachment = self.attachment.clone();
        let run = Box::new(move || attachment.map_or(Ok(()), |attachment| attachment.abandon()));
        self.run(Job::Detach, Work { keep: Vec::new(), run }, Note::Detached);
    }

    fn after_job(&mut self) {
        self.job = None;
        if std::mem::take(&mut self.force) {
            self.begin_forced();
        }
    }

    fn on_note(&mut self, note: Note<C::Attachment>) -> Option<DeviceEvent> {
        match note {
            Note::Request(request) => Some(DeviceEvent::Request(request)),
            Note::Refused(event) => Some(event),
            Note::Attached(result) => {
                let result = result.map(|attachment| self.attachment = Some(attachment));
                match (&result, &mut self.carrier) {
                    (Ok(()), Some(carrier)) => carrier.attached(),
                    _ => self.stop(),
                }
                self.after_job();
                Some(DeviceEvent::Attached(result))
            }
            Note::Resized(result) => {
                self.after_job();
                Some(DeviceEvent::Resized(result))
            }
            Note::Detached(Err(error)) if self.force => {
                // The unforced attempt failed, as it should.
                tracing::debug!(%error, "A detach was overtaken by a forced one.");
                self.after_job();
                None
            }
            Note::Detached(result) => {
                self.job = None;
                self.force = false;
                // Without a data path the device cannot be "as before".
                if result.is_ok() || self.carrier.is_none() {
                    self.stop();
                    self.attachment = None;
                }
                Some(DeviceEvent::Detached(result))
            }
            // A descriptor of a failed attach looks the same.
            Note::Released if self.attachment.as_ref().is_some_and(Attachment::is_bound) => None,
            Note::Released => self.on_lost("the kernel released the device".into()),
            Note::Gone(reason) => self.on_lost(reason),
        }
    }

    /// The kernel let go of the device although nobody asked us.
    fn on_lost(&mut self, reason: String) -> Option<DeviceEvent> {
        let (Some(_), Some(attachment)) = (&self.carrier, &self.attachment) else { return None };
        if self.job == Some(Job::Detach) {
            return None;
        }
        attachment.node().remove();
        self.attachment = None;
        self.stop();
        Some(DeviceEvent::Lost(reason))
    }
}

impl<C: Carrier> DeviceExport for Carried<C> {
    fn kind(&self) -> BackendKind {
        C::KIND
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
        if let Some(carrier) = &self.carrier {
            carrier.complete(id, reply);
        }
    }

    fn attach(&mut self, params: DeviceParams) {
        if self.carrier.is_some() || self.job.is_some() {
            let error = DeviceError::Busy("it is attached, or another operation runs");
            return self.refuse(DeviceEvent::Attached(Err(error)));
        }
        match params.check().and_then(|()| C::start(&params, &self.pool, &self.sender)) {
            Err(error) => self.refuse(DeviceEvent::Attached(Err(error))),
            Ok(carrier) => {
                let work = carrier.attach(&params);
                self.carrier = Some(carrier);
                self.params = Some(params);
                self.run(Job::Attach, work, Note::Attached);
            }
        }
    }

    fn clean_up(&mut self, params: DeviceParams) {
        if self.carrier.is_some() || self.job.is_some() {
            let error = DeviceError::Busy("it is attached, or another operation runs");
            return self.refuse(DeviceEvent::Detached(Err(error)));
        }
        let run = Box::new(move || {
            // First the name: nobody new finds the dead device.
            remove_dead(&params);
            C::clean_up(&params);
            Ok(())
        });
        self.run(Job::Detach, Work { keep: Vec::new(), run }, Note::Detached);
    }

    fn resize(&mut self, size: u64) {
        let (Some(carrier), Some(attachment), Some(params), None) =
            (&self.carrier, &self.attachment, &mut self.params, self.job)
        else {
            let error = DeviceError::Busy("it is not attached, or another operation runs");
            return self.refuse(DeviceEvent::Resized(Err(error)));
        };
        let wanted = DeviceParams { size, ..params.clone() };
        if let Err(error) = wanted.check() {
            return self.refuse(DeviceEvent::Resized(Err(error)));
        }
        *params = wanted;
        let work = carrier.resize(attachment, size);
        self.run(Job::Resize, work, Note::Resized);
    }

    fn in_use(&self) -> io::Result<Vec<User>> {
        self.attachment.as_ref().map_or(Ok(Vec::new()), |attachment| attachment.node().users())
    }

    fn detach(&mut self, force: bool) {
        if force && self.carrier.is_some() {
            // From here on every wait in the kernel ends with an error, that of a running job too.
            self.stop();
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
        let (Some(_), Some(attachment)) = (&self.carrier, self.attachment.clone()) else {
            return self.refuse(DeviceEvent::Detached(Ok(())));
        };
        let run = Box::new(move || attachment.take_away());
        self.run(Job::Detach, Work { keep: Vec::new(), run }, Note::Detached);
    }
}

impl<C: Carrier> Drop for Carried<C> {
    fn drop(&mut self) {
        self.stop();
    }
}
