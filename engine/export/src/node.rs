//! The node `/dev/drbdN` and its links, and what all backends do around them.

use crate::owner::owner_of;
use crate::sys::{self, DevNumber};
use crate::{DeviceError, DeviceParams, User, users};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a detach waits for udev to let go of a device it is looking at.
const UDEV_PATIENCE: Duration = Duration::from_secs(2);

/// Directories below `/dev/drbd` that are searched for links.
const LINK_DEPTH_MAX: u32 = 4;

/// How long the kernel may take to let go of a device after the last user.
const RELEASE_PATIENCE: Duration = Duration::from_secs(2);

/// Builds an error about a failed system call.
pub(crate) fn system(what: impl Into<String>, hint: &'static str) -> impl FnOnce(io::Error) -> DeviceError {
    let what = what.into();
    move |source| DeviceError::System { what, source, hint }
}

/// A kernel device with our node on it.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub path: PathBuf,
    pub links: Vec<PathBuf>,
    pub dev: DevNumber,
}

impl Node {
    /// Makes the node and its links; an old node of a device that is not in use by anybody else is
    /// replaced.
    pub fn create(params: &DeviceParams, dev: DevNumber) -> Result<Self, DeviceError> {
        let node = Self { path: params.node(), links: params.links.clone(), dev };
        node.check(params.minor)?;
        node.make()?;
        Ok(node)
    }

    fn check(&self, minor: u32) -> Result<(), DeviceError> {
        let foreign = |owner: String| DeviceError::Foreign { node: self.path.clone(), owner };
        match fs::symlink_metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => {
                Err(system(format!("looking at {}", self.path.display()), "check the directory")(error))
            }
            // A dead engine's node; the kernel gave us the number it had.
            Ok(found) if found.file_type().is_block_device() && sys::dev_number(&found) == self.dev => Ok(()),
            Ok(found) if found.file_type().is_block_device() => {
                may_replace(sys::dev_number(&found), minor).map_err(foreign)
            }
            Ok(found) if found.file_type().is_symlink() => {
                Err(foreign("there is a symbolic link of that name".into()))
            }
            Ok(_) => Err(foreign("there is a file of that name, which is not a block device".into())),
        }
    }

    /// Makes the node under a temporary name and puts it in place at once, then the links.
    pub fn make(&self) -> Result<(), DeviceError> {
        let fail = |what: &Path, error| {
            system(format!("creating {}", what.display()), "check that the directory is writable")(error)
        };
        let mut temporary = self.path.clone().into_os_string();
        temporary.push(".new");
        let temporary = PathBuf::from(temporary);
        let _ = fs::remove_file(&temporary);
        sys::make_block_node(&temporary, 0o660, self.dev)
            .and_then(|()| fs::rename(&temporary, &self.path))
            .map_err(|error| fail(&self.path, error))?;
        for link in &self.links {
            let parent = link.parent().unwrap_or(Path::new("/"));
            let _ = fs::create_dir_all(parent);
            if fs::symlink_metadata(link).is_ok_and(|found| found.is_symlink()) {
                let _ = fs::remove_file(link);
            }
            if let Err(error) = symlink(&self.path, link) {
                self.remove();
                return Err(fail(link, error));
            }
        }
        Ok(())
    }

    /// Removes the node and its links, as far as they are still ours.
    pub fn remove(&self) {
        for link in &self.links {
            if fs::read_link(link).is_ok_and(|target| target == self.path) {
                let _ = fs::remove_file(link);
            }
        }
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| found.file_type().is_block_device() && sys::dev_number(&found) == self.dev);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }

    pub fn users(&self) -> io::Result<Vec<User>> {
        users::users_of(self.dev)
    }

    /// Refuses when somebody uses the device. udev looks at every new device for a moment, which is
    /// waited for.
    pub fn refuse_if_used(&self) -> Result<(), DeviceError> {
        let deadline = Instant::now() + UDEV_PATIENCE;
        loop {
            let users =
                self.users().map_err(system("reading /proc for users of the device", "mount /proc"))?;
            if users.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline || !users.iter().all(is_udev) {
                return Err(self.in_use(users));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn in_use(&self, mut users: Vec<User>) -> DeviceError {
        if users.is_empty() {
            users.push(User::Unknown);
        }
        DeviceError::InUse { node: self.path.clone(), users }
    }

    /// Takes the device away unless it is in use.
    ///
    /// `release` asks the kernel to let go of it, `released` tells whether it has, and `keep` undoes the
    /// request when somebody was faster.
    pub fn take_away(
        &self,
        open: impl Fn() -> io::Result<fs::File>,
        release: impl FnOnce(fs::File) -> io::Result<()>,
        released: impl Fn() -> bool,
        keep: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), DeviceError> {
        self.refuse_if_used()?;
        // Exclusive: no mount and no stacking from here on. What a user has written through the page
        // cache and left behind must reach the engine while the device still works.
        let device = open().map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => self.in_use(self.users().unwrap_or_default()),
            _ => system(format!("opening {}", self.path.display()), "see the kernel log")(error),
        })?;
        device.sync_all().map_err(system(
            format!("writing back the cache of {}", self.path.display()),
            "see the engine's log for the failed write",
        ))?;
        self.remove();
        // Our own descriptor is in a table of this thread alone, which `/proc/PID/fd` does not show.
        if let Err(error) = self.refuse_if_used() {
            self.make()?;
            return Err(error);
        }
        release(device).map_err(system(format!("releasing device {}", self.dev), "see the kernel log"))?;
        let deadline = Instant::now() + RELEASE_PATIENCE;
        while !released() {
            if Instant::now() >= deadline {
                keep().map_err(system(format!("keeping device {}", self.dev), "detach by force"))?;
                self.make()?;
                return Err(self.in_use(self.users().unwrap_or_default()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// Removes the node of a dead engine for this minor, and the links to it.
pub(crate) fn remove_dead(params: &DeviceParams) {
    let path = params.node();
    let Ok(found) = fs::symlink_metadata(&path) else { return };
    if !found.file_type().is_block_device() || may_replace(sys::dev_number(&found), params.minor).is_err() {
        return;
    }
    let mut node = Node { links: params.links.clone(), dev: sys::dev_number(&found), path };
    find_links(&params.dev_dir.join("drbd"), &node.path, LINK_DEPTH_MAX, &mut node.links);
    node.remove();
    tracing::info!(node = %node.path.display(), "The node of a dead engine was removed.");
}

/// Symbolic links to `node` below a directory.
fn find_links(dir: &Path, node: &Path, depth: u32, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.file_type());
        if kind.as_ref().is_ok_and(fs::FileType::is_dir) && depth > 0 {
            find_links(&path, node, depth - 1, found);
        } else if kind.is_ok_and(|k| k.is_symlink()) && fs::read_link(&path).is_ok_and(|to| to == node) {
            found.push(path);
        }
    }
}

/// Tells who still uses a device of a dead engine, which goes with its last user.
pub(crate) fn warn_of_users(minor: u32, dev: DevNumber) {
    let users: Vec<String> =
        users::users_of(dev).unwrap_or_default().iter().map(ToString::to_string).collect();
    if !users.is_empty() {
        let users = users.join(", ");
        tracing::warn!(minor, %dev, users, "A device of a dead engine, which fails all I/O, is still used; end that.");
    }
}

/// Whether an existing node with this number, found under the name of this minor, may go.
fn may_replace(dev: DevNumber, minor: u32) -> Result<(), String> {
    const MAJOR_LOOP: u32 = 7;
    const MAJOR_NBD: u32 = 43;
    const MAJOR_DRBD: u32 = 147;
    let sys = PathBuf::from(format!("/sys/dev/block/{dev}"));
    let read = |name: &str| fs::read_to_string(sys.join(name)).ok();
    let carries = match dev.major {
        MAJOR_LOOP => read("loop/backing_file"),
        MAJOR_NBD => read("pid").map(|_| read("backend").unwrap_or_else(|| "a network".into())),
        MAJOR_DRBD => return Err("it is a device of the kernel's DRBD".into()),
        major => return Err(format!("it is a block device of another driver (major {major})")),
    };
    let Some(carries) = carries else { return Ok(()) };
    match owner_of(carries.trim_end().trim_start_matches('/'), minor) {
        Some(owner) if owner.is_dead() => Ok(()),
        Some(owner) => Err(format!("it is served by the engine with PID {}", owner.pid())),
        None => Err(format!("it is a device over {}", carries.trim_end())),
    }
}

fn is_udev(user: &User) -> bool {
    matches!(user, User::Open { process, .. } if process.contains("udev"))
}
