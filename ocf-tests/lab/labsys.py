"""Thin wrappers over the kernel interfaces the lab needs (Python standard library only)."""

import ctypes
import errno
import fcntl
import os
import platform
import signal
import stat
import struct
import time

libc = ctypes.CDLL(None, use_errno=True)

# mount(2)
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MNT_DETACH = 0x2

# clone(2)
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
# Capabilities that act on the whole machine whatever namespace their holder is in.
MACHINE_CAPABILITIES = {"sys_module": 16, "sys_time": 25, "syslog": 34,
                        "wake_alarm": 35}

# loop(4)
LOOP_MAJOR = 7
LOOP_CONFIGURE = 0x4C0A
LOOP_CLR_FD = 0x4C01
LOOP_CTL_REMOVE = 0x4C81
LOOP_CTL_GET_FREE = 0x4C82
LO_FLAGS_AUTOCLEAR = 4

FS_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)
FS_SHUTDOWN_NOLOGFLUSH = 2

_SYSCALLS = {
    "x86_64": {"clone": 56, "pivot_root": 155},
    "aarch64": {"clone": 220, "pivot_root": 41},
}


def _check(result, what):
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _syscall(name, *args):
    number = _SYSCALLS[platform.machine()][name]
    return _check(libc.syscall(ctypes.c_long(number), *args), name)


def mount(source, target, fstype=None, flags=0, data=None):
    def enc(value):
        return None if value is None else os.fsencode(value)

    _check(libc.mount(enc(source), enc(target), enc(fstype),
                      ctypes.c_ulong(flags), enc(data)),
           f"mount {source} on {target}")


def umount(target, flags=0):
    _check(libc.umount2(os.fsencode(target), flags), f"umount {target}")


def pivot_root_here():
    """Make the current directory the root and drop the old root."""
    dot = ctypes.c_char_p(b".")
    _syscall("pivot_root", dot, dot)
    umount(".", MNT_DETACH)
    os.chdir("/")


def unshare(flags):
    _check(libc.unshare(flags), "unshare")


def prctl(option, value):
    _check(libc.prctl(option, value, 0, 0, 0), "prctl")


def drop_machine_capabilities():
    """Programs executed from here on cannot load modules or set the machine's clock."""
    for number in MACHINE_CAPABILITIES.values():
        prctl(PR_CAPBSET_DROP, number)


def set_process_name(name):
    buf = ctypes.create_string_buffer(os.fsencode(name)[:15] + b"\0")
    libc.prctl(PR_SET_NAME, buf, 0, 0, 0)


def clone_exec(flags, argv):
    """clone() into new namespaces and exec argv there; returns the pid seen from here."""
    zero = ctypes.c_ulong(0)
    pid = _syscall("clone", ctypes.c_ulong(flags | signal.SIGCHLD), zero, zero, zero, zero)
    if pid == 0:
        try:
            os.execv(argv[0], argv)
        finally:
            os._exit(127)
    return pid


def start_time(pid):
    """Start time of a process in clock ticks (guards against pid reuse), or None."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            fields = f.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def is_running(pid, started):
    return bool(pid) and started is not None and start_time(pid) == started


def kill_recorded(pid, started, sig=signal.SIGKILL, timeout=10.0):
    """Signal a process only if it is still the one recorded, and wait for its end."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        if not is_running(pid, started):
            return True
        signal.pidfd_send_signal(fd, sig)
        deadline = time.monotonic() + timeout
        while is_running(pid, started):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True
    except ProcessLookupError:
        return True
    finally:
        os.close(fd)


# --- loop devices ---------------------------------------------------------------------------

def loop_attach(path):
    """Attach a file to a free loop device with autoclear.

    Returns (device path, open fd, index when this call created the device or None).  The
    device detaches by itself once the returned fd and every other opener are gone.
    """
    backing = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(64):
            before = set(os.listdir("/sys/block"))
            with open("/dev/loop-control", "rb") as control:
                index = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
            device = f"/dev/loop{index}"
            created = None if f"loop{index}" in before else index
            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            info = struct.pack("=QQQQQIIII64s64s32s2Q", 0, 0, 0, 0, 0, 0, 0, 0,
                               LO_FLAGS_AUTOCLEAR, os.fsencode(path)[-63:], b"", b"", 0, 0)
            config = struct.pack("=II", backing, 0) + info + bytes(64)
            try:
                fcntl.ioctl(fd, LOOP_CONFIGURE, config)
                return device, fd, created
            except OSError as error:
                os.close(fd)
                if error.errno != errno.EBUSY:  # lost a race for this index: try the next
                    raise
        raise OSError(errno.EBUSY, "no free loop device")
    finally:
        os.close(backing)


def loop_remove(index):
    """Remove a loop device that loop_attach created; harmless if someone else uses it now."""
    try:
        with open("/dev/loop-control", "rb") as control:
            fcntl.ioctl(control, LOOP_CTL_REMOVE, index)
    except OSError:
        pass


def loop_nodes(directory):
    """The indices of the loop devices that have a device node below a directory."""
    found = set()
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                status = os.lstat(f"{parent}/{name}")
            except OSError:
                continue
            if stat.S_ISBLK(status.st_mode) and os.major(status.st_rdev) == LOOP_MAJOR:
                found.add(os.minor(status.st_rdev))
    return found


def loop_detach(indices):
    """Detach files from loop devices; from those in use when their last user is gone."""
    for index in indices:
        try:
            fd = os.open(f"/dev/loop{index}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.ioctl(fd, LOOP_CLR_FD, 0)
        except OSError:
            pass  # nothing is attached
        finally:
            os.close(fd)


# --- cgroups: freeze and kill a whole node ---------------------------------------------------

def _find_cgroup2():
    for path in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        if os.path.exists(f"{path}/cgroup.procs") and os.path.exists(f"{path}/cgroup.controllers"):
            return path
    return None


class Cgroup:
    """A cgroup for one node: version 2 when there is one, else the version 1 freezer."""

    def __init__(self, lab, node):
        root = _find_cgroup2()
        self.v2 = root is not None
        self.parent = f"{root or '/sys/fs/cgroup/freezer'}/lab-{lab}"
        self.path = f"{self.parent}/{node}"

    def create(self):
        os.makedirs(self.path, exist_ok=True)

    def add(self, pid, below=""):
        """Put a process in the cgroup, or in one below it (made when missing)."""
        if below:
            os.makedirs(f"{self.path}/{below}", exist_ok=True)
        self._write(f"{below}/cgroup.procs", str(pid))

    def pids(self):
        found = []
        for directory, _, _ in os.walk(self.path):
            try:
                with open(f"{directory}/cgroup.procs", encoding="ascii") as f:
                    found += [int(line) for line in f]
            except OSError:
                pass
        return found

    def freeze(self, timeout=2.0):
        self._write(*(("cgroup.freeze", "1") if self.v2 else ("freezer.state", "FROZEN")))
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.frozen():
                return True
            time.sleep(0.002)
        return False

    def frozen(self):
        name, mark = ("cgroup.events", "frozen 1") if self.v2 else ("freezer.state", "FROZEN")
        try:
            with open(f"{self.path}/{name}", encoding="ascii") as f:
                return mark in f.read()
        except OSError:
            return False

    def thaw(self):
        self._write(*(("cgroup.freeze", "0") if self.v2 else ("freezer.state", "THAWED")))

    def kill(self):
        """SIGKILL everything in the cgroup; works on a frozen one."""
        if self.v2 and os.path.exists(f"{self.path}/cgroup.kill"):
            self._write("cgroup.kill", "1")
        else:
            for pid in self.pids():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        self.thaw()

    def remove(self, timeout=5.0):
        deadline = time.monotonic() + timeout
        while os.path.isdir(self.path):
            try:
                for directory, _, _ in os.walk(self.path, topdown=False):
                    os.rmdir(directory)
            except OSError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
        try:
            os.rmdir(self.parent)
        except OSError:
            pass

    def _write(self, name, value):
        with open(f"{self.path}/{name}", "w", encoding="ascii") as f:
            f.write(value)


# --- file systems at power loss ---------------------------------------------------------------

FUSE_CONTROL = "/sys/fs/fuse/connections"


def mount_fuse_control():
    """Give this process a private view of the FUSE control files; they can end a connection."""
    unshare(CLONE_NEWNS)
    mount(None, "/", None, MS_SLAVE | MS_REC)
    if os.path.isdir(FUSE_CONTROL) and not os.listdir(FUSE_CONTROL):
        try:
            mount("fusectl", FUSE_CONTROL, "fusectl")
        except OSError:
            pass  # mounted already, or a kernel without FUSE


def abort_fuse_servers(pids):
    """End the FUSE connections that these processes serve: they will not answer again.

    What is above (a loop device over a FUSE file, a file system on it) then gets errors instead
    of waiting, and nothing of its cache is written back.  Kernels that do not name the
    connection in fdinfo end it a moment later, when the server is killed.
    """
    for pid in pids:
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for descriptor in descriptors:
            try:
                if os.readlink(f"/proc/{pid}/fd/{descriptor}") != "/dev/fuse":
                    continue
                with open(f"/proc/{pid}/fdinfo/{descriptor}", encoding="ascii") as f:
                    numbers = [line.split()[1] for line in f if line.startswith("fuse_connection:")]
                for number in numbers:
                    with open(f"{FUSE_CONTROL}/{number}/abort", "w", encoding="ascii") as f:
                        f.write("1")
            except OSError:
                continue


def drop_dirty_filesystems(pid, devices):
    """Shut down the file systems a node has mounted from its own disks, without flushing.

    Without this the kernel would write the dirty cache back when the dead node's mount
    namespace goes away, which a real power cut does not do.
    """
    dropped = []
    try:
        with open(f"/proc/{pid}/mountinfo", encoding="utf-8") as f:
            lines = f.read().splitlines()
    except OSError:
        return dropped
    for line in lines:
        fields = line.split()
        if fields[2] not in devices:
            continue
        point = fields[4].encode().decode("unicode_escape")
        try:
            fd = os.open(f"/proc/{pid}/root{point}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", FS_SHUTDOWN_NOLOGFLUSH))
            dropped.append(point)
        except OSError:
            pass
        finally:
            os.close(fd)
    return dropped
