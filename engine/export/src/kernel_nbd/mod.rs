//! `/dev/drbdN` through the kernel's NBD client: our own NBD session at one end of a socket pair,
//! the kernel at the other.
//!
//! The kernel never times out a request: a replicated device may have to wait for a quorum. When the engine
//! dies the socket goes with it, and the kernel fails all I/O. It could be told to wait for another socket
//! (`dead_conn_timeout`, `NBD_CMD_RECONFIGURE`); that is not done, see [`DeviceExport::clean_up`].

mod netlink;
mod pump;

use crate::carried::{self, Carrier, Work};
use crate::channel::Sender;
use crate::nbd::{self, Export, Limits, Session};
use crate::node::{Node, system, warn_of_users};
use crate::owner::{Owner, owner_of, tag};
use crate::sys::{self, DevNumber};
use crate::{BackendKind, BufferPool, DeviceError, DeviceParams, Reply};
use netlink::{Connect, NbdControl};
use pump::Pump;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

type Note = carried::Note<Attachment>;

/// Whether this kernel has an NBD client that we may command.
pub(crate) fn is_available() -> bool {
    if !Path::new("/sys/module/nbd").exists() {
        let modprobe = |stdio: fn() -> Stdio| {
            Command::new("modprobe")
                .args(["-q", "nbd"])
                .stdin(stdio())
                .stdout(stdio())
                .stderr(stdio())
                .status()
        };
        if !modprobe(Stdio::null).is_ok_and(|status| status.success()) {
            return false;
        }
    }
    NbdControl::open().is_ok()
}

/// The NBD session and the thread that runs it.
#[derive(Debug)]
pub(crate) struct Nbd {
    pump: Pump,
    /// The kernel's end, until the kernel has taken it.
    kernel_end: Option<OwnedFd>,
    export: Export,
    tag: String,
}

impl Carrier for Nbd {
    const KIND: BackendKind = BackendKind::KernelNbd;
    type Attachment = Attachment;

    fn start(params: &DeviceParams, pool: &BufferPool, notes: &Sender<Note>) -> Result<Self, DeviceError> {
        let owner = Owner::current().map_err(system("reading /proc about this process", "mount /proc"))?;
        let hint = "raise the limits of the process";
        let (ours, kernel_end) = sys::socket_pair().map_err(system("making a socket pair", hint))?;
        let tag = tag(params.minor, owner);
        let export = Export {
            name: tag.clone(),
            description: String::new(),
            size: params.size,
            block_min: params.logical_block,
            block_preferred: 4096,
            read_only: params.read_only,
            discard: params.discard,
            rotational: false,
        };
        let session = Session::transmission(export.clone(), Limits::default(), pool.clone());
        let pump =
            Pump::start(ours, session, notes.clone()).map_err(system("starting the NBD thread", hint))?;
        Ok(Self { pump, kernel_end: Some(kernel_end), export, tag })
    }

    fn clean_up(params: &DeviceParams) {
        match NbdControl::open() {
            Ok(mut control) => clean_up(&mut control, params.minor),
            Err(error) => tracing::warn!(%error, "The kernel's NBD client cannot be asked for dead devices."),
        }
    }

    fn attach(&self, params: &DeviceParams) -> Work<Attachment> {
        let socket = self.kernel_end.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let (export, tag, params) = (self.export.clone(), self.tag.clone(), params.clone());
        let run = move || Attachment::create(socket, &export, tag, &params);
        Work { keep: vec![socket], run: Box::new(run) }
    }

    fn attached(&mut self) {
        // From now on the kernel's going is seen as the end of our stream.
        self.kernel_end = None;
    }

    fn resize(&self, attachment: &Attachment, size: u64) -> Work<()> {
        self.pump.set_size(size);
        let (number, tag) = (attachment.number, self.tag.clone());
        let run = move || {
            let result = NbdControl::open().and_then(|mut control| control.resize(number, &tag, size));
            result.map_err(system("changing the size of the device", "see the kernel log"))
        };
        Work { keep: Vec::new(), run: Box::new(run) }
    }

    fn complete(&self, id: u64, reply: Reply) {
        self.pump.complete(id, reply);
    }

    fn stop(self) {
        self.pump.stop();
    }
}

/// The kernel's NBD device with our node on it.
#[derive(Debug, Clone)]
pub(crate) struct Attachment {
    number: u32,
    tag: String,
    /// Where a node for a moment may be made.
    scratch: PathBuf,
    node: Node,
}

impl Attachment {
    fn create(
        socket: RawFd,
        export: &Export,
        tag: String,
        params: &DeviceParams,
    ) -> Result<Self, DeviceError> {
        let hint = "load the kernel module nbd";
        let mut control = NbdControl::open().map_err(system("opening the NBD client's netlink", hint))?;
        clean_up(&mut control, params.minor);
        let connect = Connect {
            socket,
            size: export.size,
            block: export.block_min,
            flags: nbd::transmission_flags(export),
            identifier: &tag,
        };
        let number = control
            .connect(&connect)
            .map_err(system("connecting an NBD device", "free one, or load nbd with a larger nbds_max"))?;
        let undo = |error, control: &mut NbdControl| {
            if let Err(failure) = control.disconnect(number) {
                tracing::warn!(number, error = %failure, "An NBD device could not be disconnected.");
            }
            Err(error)
        };
        let dev = match device_number(number) {
            Ok(dev) => dev,
            Err(error) => {
                return undo(
                    system(format!("looking for nbd{number} in /sys"), "mount /sys")(error),
                    &mut control,
                );
            }
        };
        match Node::create(params, dev) {
            Ok(node) => Ok(Self { number, tag, scratch: params.dev_dir.clone(), node }),
            Err(error) => undo(error, &mut control),
        }
    }

    fn open(&self) -> io::Result<File> {
        let usual = PathBuf::from(format!("/dev/nbd{}", self.number));
        sys::open_block(self.node.dev, &usual, &self.scratch, true)
    }

    fn disconnect(&self) -> io::Result<()> {
        NbdControl::open()?.disconnect(self.number)
    }
}

impl carried::Attachment for Attachment {
    fn node(&self) -> &Node {
        &self.node
    }

    fn is_bound(&self) -> bool {
        // Before Linux 5.14 there is no identifier to tell our connection from another one.
        is_connected(self.number) && backend(self.number).is_none_or(|backend| backend == self.tag)
    }

    fn take_away(&self) -> Result<(), DeviceError> {
        // The kernel disconnects at once, whoever looks on: there is no way back and no need for one.
        self.node.take_away(
            || self.open(),
            |device| {
                self.disconnect()?;
                drop(device);
                Ok(())
            },
            || !self.is_bound(),
            || Err(io::Error::from_raw_os_error(libc::EBUSY)),
        )
    }

    fn abandon(&self) -> Result<(), DeviceError> {
        self.node.remove();
        if !self.is_bound() {
            return Ok(());
        }
        self.disconnect().map_err(system(format!("disconnecting nbd{}", self.number), "use nbd-client -d"))
    }
}

fn device_number(number: u32) -> io::Result<DevNumber> {
    let text = fs::read_to_string(format!("/sys/block/nbd{number}/dev"))?;
    DevNumber::parse(&text).ok_or_else(|| io::Error::other("the number is malformed"))
}

fn is_connected(number: u32) -> bool {
    Path::new(&format!("/sys/block/nbd{number}/pid")).exists()
}

fn backend(number: u32) -> Option<String> {
    let text = fs::read_to_string(format!("/sys/block/nbd{number}/backend")).ok()?;
    Some(text.trim_end().into())
}

/// Disconnects what a dead engine left for this minor.
fn clean_up(control: &mut NbdControl, minor: u32) {
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.strip_prefix("nbd")?.parse().ok());
        let Some(number) = number else { continue };
        let owner = backend(number).and_then(|backend| owner_of(&backend, minor));
        if owner.is_some_and(Owner::is_dead) && is_connected(number) {
            match control.disconnect(number) {
                Ok(()) => {
                    tracing::info!(number, minor, "An NBD device of a dead engine was disconnected.");
                    if let Ok(dev) = device_number(number) {
                        warn_of_users(minor, dev);
                    }
                }
                Err(error) => tracing::warn!(number, minor, %error, "An NBD device of a dead engine stays."),
            }
        }
    }
}
