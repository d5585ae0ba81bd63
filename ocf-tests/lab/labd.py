#!/usr/bin/python3
"""Lab supervisor: one process per lab, outside the nodes.

Started by `lab up` as:  labd.py RUN_DIRECTORY READY_FD
It owns the switch (a network namespace with one bridge per network), the disks, and the
power of every node, and serves two kinds of sockets in RUN_DIRECTORY: control.sock for the
`lab` command and fence-NODE.sock, one per node, for the fence_lab agent inside that node.
Nodes die with the supervisor (parent death signal); loop devices detach by themselves.
"""

import heapq
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time

import labsys

HERE = os.path.dirname(os.path.abspath(__file__))
CLONE_FLAGS = (labsys.CLONE_NEWNS | labsys.CLONE_NEWUTS | labsys.CLONE_NEWIPC |
               labsys.CLONE_NEWPID | labsys.CLONE_NEWNET)
BOOT_TIMEOUT = 30
SYSTEMD_POWEROFF = signal.SIGRTMIN + 4  # see systemd(1), SIGNALS
SYSTEMD_REBOOT_EXIT = 133               # exit status of a systemd that wants its container rebooted


class LabError(Exception):
    """An operation cannot be done; the text goes to the caller."""


def run(argv, text=None):
    result = subprocess.run(argv, input=text, text=True, capture_output=True, check=False)
    if result.returncode:
        raise LabError(f"{' '.join(argv)}: {result.stderr.strip()}")
    return result.stdout


def parse_rate(rate):
    """Bits per second of a tc rate such as 100mbit."""
    units = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
    for unit, factor in units.items():
        if rate.endswith(unit):
            return float(rate[:-len(unit)]) * factor
    raise LabError(f"rate must look like 512kbit, 100mbit or 1gbit, not {rate}")


class Node:
    """State of one node as the supervisor sees it."""

    def __init__(self, conf, lab, state):
        self.conf = conf
        self.name = conf["name"]
        self.directory = f"{state}/nodes/{self.name}"
        self.cgroup = labsys.Cgroup(lab, self.name)
        self.pid = None
        self.started = None
        self.frozen = False
        self.plugged = False
        self.last_exit = None
        self.disks = []
        self.devices = None        # descriptor of its /dev while it is on
        self.boot_ticket = None    # set while the node is between power-on and its boot
        self.on_off = []           # callbacks waiting for the node to be off
        self.fence = {"mode": "ok", "delay": 0.0}

    def disk_numbers(self):
        return {disk["number"] for disk in self.disks if "number" in disk}

    def watch_devices(self):
        """Keep the node's /dev within reach until after its death."""
        self.devices = os.open(f"/proc/{self.pid}/root/dev", os.O_RDONLY | os.O_DIRECTORY)

    def detach_loops(self):
        """Detach what programs of the dead node had attached to loop devices."""
        if self.devices is None:
            return
        labsys.loop_detach(index for index in labsys.loop_nodes(f"/proc/self/fd/{self.devices}")
                           if f"{labsys.LOOP_MAJOR}:{index}" not in self.disk_numbers())
        os.close(self.devices)
        self.devices = None

    def port(self, network):
        return f"{self.name}-{network}"

    @property
    def power(self):
        if self.pid:
            return "on"
        return "booting" if self.boot_ticket else "off"


class Supervisor:
    """Event loop and operations."""

    def __init__(self, run_directory):
        self.run_directory = run_directory
        self.state = os.path.realpath(f"{run_directory}/state")
        with open(f"{self.state}/lab.json", encoding="utf-8") as f:
            self.conf = json.load(f)
        self.lab = self.conf["name"]
        self.networks = self.conf["networks"]
        self.nodes = {conf["name"]: Node(conf, self.lab, self.state)
                      for conf in self.conf["nodes"]}
        self.cuts = set()          # (network, from node, to node)
        self.links = {}            # (node, network) -> {"rate", "loss", "delay", "down"}
        self.delays = {}           # (node, network) -> labdelay process
        self.loop_fds = []
        self.loops_created = []
        self.timers = []
        self.sequence = itertools.count()
        self.running = True
        self.selector = selectors.DefaultSelector()
        self.events = open(f"{self.state}/events.log", "a", encoding="utf-8",  # noqa: SIM115
                           buffering=1)

    # --- bookkeeping ---

    def event(self, text):
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S") + f".{int(time.time() * 1000) % 1000:03d}"
        self.events.write(f"{stamp} {text}\n")

    def record(self):
        """Write the pids and loop devices `lab down` may have to clean up without us."""
        data = {
            "supervisor": {"pid": os.getpid(), "started": labsys.start_time(os.getpid())},
            "nodes": {node.name: {"pid": node.pid, "started": node.started}
                      for node in self.nodes.values()},
            "loops_created": self.loops_created,
        }
        path = f"{self.run_directory}/run.json"
        with open(path + ".new", "w", encoding="utf-8") as f:
            json.dump(data, f)
        os.replace(path + ".new", path)

    def after(self, seconds, function):
        heapq.heappush(self.timers, (time.monotonic() + seconds, next(self.sequence), function))

    def node(self, name):
        if name not in self.nodes:
            raise LabError(f"no such node: {name}")
        return self.nodes[name]

    def network_names(self, which):
        names = [network["name"] for network in self.networks]
        if which in (None, "all"):
            return names
        if which not in names:
            raise LabError(f"no such network: {which} (there are {', '.join(names)})")
        return [which]

    # --- set-up and tear-down ---

    def setup(self):
        labsys.mount_fuse_control()
        labsys.unshare(labsys.CLONE_NEWNET)
        commands = ["link set lo up"]
        for network in self.networks:
            commands += [f"link add {network['name']} type bridge stp_state 0 forward_delay 0 "
                         "mcast_snooping 0",
                         f"link set {network['name']} up"]
        run(["ip", "-batch", "-"], "\n".join(commands) + "\n")
        for node in self.nodes.values():
            for sub in ("root", "work", "mnt", "disks"):
                os.makedirs(f"{node.directory}/{sub}", exist_ok=True)
            node.cgroup.create()
            self.attach_disks(node)
            self.listen(f"fence-{node.name}.sock", node)
        self.listen("control.sock", None)
        self.record()

    def attach_disks(self, node):
        for index in range(self.conf["disks"]):
            path = f"{node.directory}/disks/disk{index}.img"
            if not os.path.exists(path):
                with open(path, "wb") as f:
                    f.truncate(self.conf["disk_size"])
            disk = {"file": path}
            if self.conf["disk_kind"] == "loop":
                disk["device"], fd, created = labsys.loop_attach(path)
                disk["path"] = f"/dev/vd{chr(ord('b') + index)}"
                rdev = os.fstat(fd).st_rdev
                disk["number"] = f"{os.major(rdev)}:{os.minor(rdev)}"
                self.loop_fds.append(fd)
                if created is not None:
                    self.loops_created.append(created)
            else:
                disk["path"] = f"/srv/disks/disk{index}.img"
            node.disks.append(disk)

    def listen(self, name, node):
        path = f"{self.run_directory}/{name}"
        if os.path.exists(path):
            os.unlink(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(path)
        sock.listen(64)
        sock.setblocking(False)
        self.selector.register(sock, selectors.EVENT_READ, ("accept", node))

    def teardown(self):
        for node in self.nodes.values():
            self.power_off(node)
        for process in self.delays.values():
            process.kill()
            process.wait()
        for node in self.nodes.values():
            node.cgroup.remove()
        for fd in self.loop_fds:
            os.close(fd)
        # The kernel detaches a loop device shortly after its last user is gone.
        deadline = time.monotonic() + 5
        while self.loops_created and time.monotonic() < deadline:
            for index in list(self.loops_created):
                if not os.path.exists(f"/sys/block/loop{index}/loop/backing_file"):
                    labsys.loop_remove(index)
                    self.loops_created.remove(index)
            time.sleep(0.01)
        self.record()

    # --- power ---

    def launch(self, node):
        """Start a node's first process; finish_launch() waits until it has booted."""
        if node.pid:
            raise LabError(f"{node.name} is already on")
        node.boot_ticket = None
        config = f"{node.directory}/node.json"
        addresses = node.conf["addresses"]
        conf = dict(self.conf["common"])
        conf.update({
            "lab": self.lab, "node": node.name, "machine_id": node.conf["machine_id"],
            "state": self.state, "upper": f"{node.directory}/root",
            "work": f"{node.directory}/work", "mnt": f"{node.directory}/mnt",
            "fence_agent": f"{HERE}/fence_lab",
            "fence_socket": f"{self.run_directory}/fence-{node.name}.sock",
            "disks": node.disks, "peers": self.conf["nodes"],
            "networks": [{"name": network["name"], "card": network["card"],
                          "address": addresses[network["name"]]} for network in self.networks],
        })
        with open(config, "w", encoding="utf-8") as f:
            json.dump(conf, f, indent=1)
        go_read, go_write = os.pipe()
        status_read, status_write = os.pipe()
        os.set_inheritable(go_read, True)
        os.set_inheritable(status_write, True)
        pid = labsys.clone_exec(CLONE_FLAGS, [sys.executable, "-B", f"{HERE}/labnode.py",
                                              config, str(go_read), str(status_write)])
        os.close(go_read)
        os.close(status_write)
        node.pid, node.started, node.frozen = pid, labsys.start_time(pid), False
        pidfd = os.pidfd_open(pid)
        self.selector.register(pidfd, selectors.EVENT_READ, ("exit", (node, pid)))
        try:
            node.cgroup.add(pid)
            self.plug_cables(node)
            os.write(go_write, b"g")
        except (OSError, LabError) as error:
            self.power_off(node)
            raise LabError(f"{node.name}: {error}") from error
        finally:
            os.close(go_write)
        return status_read

    def finish_launch(self, node, status_fd):
        with selectors.DefaultSelector() as selector:
            selector.register(status_fd, selectors.EVENT_READ)
            text = b"" if selector.select(BOOT_TIMEOUT) else b"timeout"
            while not text.endswith(b"timeout") and (chunk := os.read(status_fd, 65536)):
                text += chunk
        os.close(status_fd)
        if text != b"ok\n":
            self.power_off(node)
            raise LabError(f"{node.name} did not boot: "
                           f"{text.decode(errors='replace') or 'see labd.log'}")
        node.watch_devices()
        self.record()

    def start_nodes(self, nodes):
        launched = [(node, self.launch(node)) for node in nodes]
        for node, status_fd in launched:
            self.finish_launch(node, status_fd)

    def boot_later(self, node):
        """A reboot takes a while, as on real machines: peers must be able to notice it."""
        ticket = node.boot_ticket = next(self.sequence) + 1

        def boot():
            if node.boot_ticket == ticket:
                try:
                    self.start_nodes([node])
                    self.event(f"{node.name}: booted")
                except LabError as error:
                    self.event(str(error))

        self.after(self.conf["boot_delay"], boot)

    def power_off(self, node):
        """Cut the power: everything in the node stops at the same moment."""
        node.boot_ticket = None
        if not node.pid:
            return
        # Not all of it may freeze: what waits for a FUSE server of the node waits until below.
        node.cgroup.freeze(timeout=0.5)
        self.unplug_cables(node)
        labsys.abort_fuse_servers(node.cgroup.pids())
        dropped = labsys.drop_dirty_filesystems(node.pid, node.disk_numbers())
        if dropped:
            self.event(f"{node.name}: lost unwritten data of {' '.join(dropped)}")
        node.cgroup.kill()
        try:
            os.kill(node.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.reap(node)

    def reap(self, node):
        """Collect the dead first process of a node."""
        _, status = os.waitpid(node.pid, 0)
        node.last_exit = os.waitstatus_to_exitcode(status)
        for key in list(self.selector.get_map().values()):
            if key.data == ("exit", (node, node.pid)):
                self.selector.unregister(key.fileobj)
                os.close(key.fd)
        node.pid = node.started = None
        node.frozen = False
        node.detach_loops()
        self.unplug_cables(node)
        self.record()
        waiting, node.on_off = node.on_off, []
        for callback in waiting:
            callback()

    def node_ended(self, node, pid):
        """A node's first process ended without us: power off or reboot from the inside."""
        if node.pid != pid:
            return
        self.unplug_cables(node)
        node.cgroup.kill()
        self.reap(node)
        # SIGHUP stands for reboot(RB_AUTOBOOT), which a pacemaker panic ends in.
        if node.last_exit in (-signal.SIGHUP, SYSTEMD_REBOOT_EXIT):
            self.event(f"{node.name}: reboots itself")
            self.boot_later(node)
        elif node.last_exit in (0, -signal.SIGINT):
            self.event(f"{node.name}: shut down")
        else:
            self.event(f"{node.name}: went off by itself (status {node.last_exit})")

    # --- network ---

    def plug_cables(self, node):
        commands = []
        for number, network in enumerate(self.networks):
            mac = f"02:70:00:00:{number:02x}:{node.conf['id']:02x}"
            port = node.port(network["name"])
            commands += [f"link add {port} type veth peer name {network['card']} address {mac} "
                         f"netns {node.pid}",
                         f"link set {port} master {network['name']} up"]
        node.plugged = True
        run(["ip", "-batch", "-"], "\n".join(commands) + "\n")
        for network in self.networks:
            if self.links.get((node.name, network["name"])):
                self.apply_link(node, network["name"])

    def unplug_cables(self, node):
        if not node.plugged:
            return
        node.plugged = False
        for network in self.networks:
            self.stop_delay(node, network["name"])
        commands = [f"link delete {node.port(network['name'])}\n" for network in self.networks]
        subprocess.run(["ip", "-force", "-batch", "-"], input="".join(commands), text=True,
                       stderr=subprocess.DEVNULL, check=False)

    def card(self, network):
        return next(net["card"] for net in self.networks if net["name"] == network)

    def apply_link(self, node, network):
        """Make the kernel agree with the settings of one cable of a running node."""
        settings = self.links.get((node.name, network), {})
        port = node.port(network)
        inside = ["nsenter", f"--net=/proc/{node.pid}/ns/net"]
        self.stop_delay(node, network)
        rate = settings.get("rate")
        for prefix, device in (([], port), (inside, self.card(network))):
            if rate:
                burst = max(16384, int(parse_rate(rate) / 8 / 100))
                run([*prefix, "tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate",
                     rate, "burst", str(burst), "latency", "200ms"])
            else:
                subprocess.run([*prefix, "tc", "qdisc", "delete", "dev", device, "root"],
                               stderr=subprocess.DEVNULL, check=False)
        if settings.get("delay"):
            self.start_delay(node, network, settings["delay"])
        run(["ip", "link", "set", port, "down" if settings.get("down") else "up"])

    def start_delay(self, node, network, milliseconds):
        """Put a delaying forwarder between the cable and the bridge."""
        port = node.port(network)
        cable = port + "-w"
        run(["ip", "link", "set", port, "down", "nomaster"])
        run(["ip", "link", "set", port, "name", cable])
        process = subprocess.Popen([sys.executable, "-B", f"{HERE}/labdelay.py", port,
                                    cable, str(milliseconds)], stdout=subprocess.PIPE, text=True)
        self.delays[node.name, network] = process
        if process.stdout.readline() != "ready\n":
            raise LabError(f"the delay of {port} did not start")
        run(["ip", "link", "set", cable, "up"])
        run(["ip", "link", "set", port, "master", network, "up"])

    def stop_delay(self, node, network):
        process = self.delays.pop((node.name, network), None)
        if not process:
            return
        port = node.port(network)
        process.kill()
        process.wait()
        process.stdout.close()
        # The tap device named like the port went away with the forwarder.
        subprocess.run(["ip", "-batch", "-"], text=True, stderr=subprocess.DEVNULL, check=False,
                       input=f"link set {port}-w down\nlink set {port}-w name {port}\n"
                             f"link set {port} master {network} up\n")

    def apply_filter(self):
        rules = []
        for network, source, target in sorted(self.cuts):
            rules.append(f'iifname "{source}-{network}" oifname "{target}-{network}" drop')
        for (name, network), settings in sorted(self.links.items()):
            if settings.get("loss"):
                per_mille = int(settings["loss"] * 10)
                chance = f"numgen random mod 1000 < {per_mille} " if per_mille < 1000 else ""
                for side in ("iifname", "oifname"):
                    rules.append(f'{side} "{name}-{network}" {chance}drop')
        text = "\n        ".join(rules)
        run(["nft", "-f", "-"], f"""table bridge lab
delete table bridge lab
table bridge lab {{
    chain forward {{
        type filter hook forward priority 0; policy accept;
        {text}
    }}
}}
""")

    # --- operations of the control socket; each returns an answer or None to answer later ---

    def op_status(self, _request, _reply):
        return {
            "name": self.lab, "state": self.state, "pid": os.getpid(),
            "init": self.conf["common"]["init"],
            "cuts": sorted(self.cuts),
            "nodes": [{
                "name": node.name, "id": node.conf["id"], "power": node.power,
                "frozen": node.frozen, "pid": node.pid, "addresses": node.conf["addresses"],
                "disks": node.disks, "fence": node.fence,
                "links": {network: self.links[name, network] for name, network in self.links
                          if name == node.name and self.links[name, network]},
            } for node in self.nodes.values()],
        }

    def op_start(self, request, _reply):
        names = request.get("nodes") or list(self.nodes)
        nodes = [node for node in map(self.node, names) if not node.pid]
        self.start_nodes(nodes)
        for node in nodes:
            self.event(f"{node.name}: switched on")
        return {}

    def op_kill(self, request, _reply):
        for node in [self.node(name) for name in request["nodes"]]:
            if node.power != "off":
                self.event(f"{node.name}: power cut")
                self.power_off(node)
        return {}

    def op_stop(self, request, reply):
        node = self.node(request["node"])
        if not node.pid:
            return {}
        node.on_off.append(lambda: reply({}))
        systemd = self.conf["common"]["init"] == "systemd"
        os.kill(node.pid, SYSTEMD_POWEROFF if systemd else signal.SIGTERM)
        return None

    def op_cluster(self, request, _reply):
        node = self.node(request["node"])
        if not node.pid:
            raise LabError(f"{node.name} is off")
        os.kill(node.pid, signal.SIGUSR2 if request["start"] else signal.SIGUSR1)
        return {}

    def op_freeze(self, request, _reply):
        for node in [self.node(name) for name in request["nodes"]]:
            if not node.pid:
                raise LabError(f"{node.name} is off")
            if not node.cgroup.freeze():
                raise LabError(f"{node.name} did not freeze completely")
            node.frozen = True
            self.event(f"{node.name}: frozen")
        return {}

    def op_thaw(self, request, _reply):
        for node in [self.node(name) for name in request["nodes"]]:
            node.cgroup.thaw()
            node.frozen = False
            self.event(f"{node.name}: thawed")
        return {}

    def op_partition(self, request, _reply):
        groups = [[self.node(name).name for name in group] for group in request["groups"]]
        named = [name for group in groups for name in group]
        if len(set(named)) != len(named):
            raise LabError("a node can be in one group only")
        if len(groups) == 1:
            groups.append([name for name in self.nodes if name not in named])
        for network in self.network_names(request.get("network")):
            for one, other in itertools.combinations(groups, 2):
                for source, target in itertools.product(one, other):
                    self.cuts.add((network, source, target))
                    if not request.get("one_way"):
                        self.cuts.add((network, target, source))
        self.apply_filter()
        self.event(f"partition {' | '.join(','.join(group) for group in groups)} "
                   f"on {request.get('network') or 'all'}")
        return {}

    def op_heal(self, request, _reply):
        networks = self.network_names(request.get("network"))
        self.cuts = {cut for cut in self.cuts if cut[0] not in networks}
        self.apply_filter()
        self.event(f"healed {' '.join(networks)}")
        return {}

    def op_link(self, request, _reply):
        changes = request["settings"]
        if changes.get("rate"):
            parse_rate(changes["rate"])
        for node in [self.node(name) for name in request["nodes"] or list(self.nodes)]:
            for network in self.network_names(request.get("network")):
                settings = self.links.setdefault((node.name, network), {})
                if request.get("reset"):
                    settings.clear()
                settings.update(changes)
                if node.pid:
                    self.apply_link(node, network)
        self.apply_filter()
        return {}

    def op_fencing(self, request, _reply):
        for node in [self.node(name) for name in request["nodes"] or list(self.nodes)]:
            node.fence = {"mode": request["mode"], "delay": request["delay"]}
        return {}

    def op_down(self, _request, reply):
        self.running = False
        self.teardown()
        reply({})

    # --- fence device ---

    def fence(self, asker, request, reply):
        action = request.get("op")
        if action in ("list", "list-status", "monitor"):
            reply({"nodes": {node.name: "off" if node.power == "off" else "on"
                             for node in self.nodes.values()}})
            return
        target = self.node(request.get("node"))
        if action == "status":
            reply({"power": "off" if target.power == "off" else "on"})
            return
        if action not in ("on", "off", "reboot"):
            raise LabError(f"unknown fence action: {action}")
        self.event(f"{target.name}: fence {action} asked by {asker.name} "
                   f"(device mode {target.fence['mode']})")
        if target.fence["mode"] == "hang":
            return
        if target.fence["mode"] == "fail":
            raise LabError("the device refuses")
        self.after(target.fence["delay"], lambda: self.do_fence(action, target, asker, reply))

    def do_fence(self, action, target, asker, reply):
        try:
            if action in ("off", "reboot"):
                self.power_off(target)
            if action in ("on", "reboot") and target.power == "off":
                self.boot_later(target)
            self.event(f"{target.name}: fence {action} done for {asker.name}")
            reply({})
        except LabError as error:
            reply({"ok": False, "error": str(error)})

    # --- event loop ---

    def serve(self, sock, node, buffered=b""):
        """Read one request line from a connection and dispatch it."""
        try:
            data = sock.recv(1 << 20)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if b"\n" not in data:
            self.selector.unregister(sock)
            if not data:
                sock.close()
                return
            self.selector.register(sock, selectors.EVENT_READ, ("request", (node, buffered + data)))
            return
        self.selector.unregister(sock)
        line = (buffered + data).split(b"\n", 1)[0]

        def reply(answer):
            try:
                sock.setblocking(True)
                sock.sendall(json.dumps({"ok": True, **answer}).encode() + b"\n")
            except OSError:
                pass  # the asker is gone (a fenced node, for one)
            sock.close()

        try:
            request = json.loads(line)
            if node:
                self.fence(node, request, reply)
                return
            operation = getattr(self, "op_" + request["op"].replace("-", "_"), None)
            if not operation:
                raise LabError(f"unknown operation: {request['op']}")
            answer = operation(request, reply)
            if answer is not None:
                reply(answer)
        except (LabError, OSError, ValueError, KeyError) as error:
            reply({"ok": False, "error": str(error) or type(error).__name__})

    def loop(self):
        while self.running:
            timeout = None
            if self.timers:
                timeout = max(0.0, self.timers[0][0] - time.monotonic())
            for key, _ in self.selector.select(timeout):
                kind, data = key.data
                if kind == "accept":
                    connection, _ = key.fileobj.accept()
                    connection.setblocking(False)
                    self.selector.register(connection, selectors.EVENT_READ,
                                           ("request", (data, b"")))
                elif kind == "request":
                    self.serve(key.fileobj, *data)
                elif kind == "exit" and key.fd in self.selector.get_map():
                    try:
                        self.node_ended(*data)
                    except LabError as error:
                        self.event(str(error))
            while self.timers and self.timers[0][0] <= time.monotonic():
                heapq.heappop(self.timers)[2]()


def main():
    supervisor = Supervisor(sys.argv[1])
    ready_fd = int(sys.argv[2])
    os.set_inheritable(ready_fd, False)
    labsys.set_process_name("labd")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)

    def stop(_signum, _frame):
        supervisor.teardown()
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    try:
        supervisor.setup()
        supervisor.start_nodes(supervisor.nodes.values())
    except (LabError, OSError) as error:
        os.write(ready_fd, str(error).encode())
        supervisor.teardown()
        return 1
    supervisor.event("lab is up")
    os.write(ready_fd, b"ok")
    os.close(ready_fd)
    supervisor.loop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
