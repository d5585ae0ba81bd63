//! `adjust`: the least commands from what runs to what is configured (`spec/cli.md` §5).

use std::collections::BTreeSet;
use std::rc::Rc;

use palisade_conf::options::{self, Class, OptionList};
use palisade_conf::view::{HostView, PeerView, VolumeView};
use palisade_control::{
    ConnectionState, MetaIndex, Options, RunningConnection, RunningResource, RunningVolume,
};

use super::bring_up::{Parts, Queue, Stage, Work, add_peer, attach, connect, everything};
use super::exec::{Exec, Line};
use super::objects::Target;
use super::running::{canonical, endpoint, running};
use super::{Request, lines};
use crate::cli::Failure;

/// Net options that cannot change while the connection exists.
const NET_FIXED: &[&str] = &["transport", "load-balance-paths"];

pub fn adjust(targets: &[Target], exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let parts =
        Parts { disk: !request.scanned.is_set("skip-disk"), net: !request.scanned.is_set("skip-net") };
    let mut queue = Queue::default();
    let mut late = Vec::new();
    let mut seen = BTreeSet::new();
    for target in targets.iter().filter(|t| seen.insert(t.view.resource.clone())) {
        match running(&target.view.resource)? {
            None => everything(&mut queue, &target.view, request, parts),
            Some(running) => {
                let adjuster = Adjuster { view: &target.view, running: &running, request, parts };
                adjuster.all(&mut queue, &mut late);
            }
        }
    }
    let mut connecting = queue.resources_in(Stage::Connect);
    let code = queue.run(exec);
    if code != 0 {
        return Ok(code);
    }
    // A connection that works is dropped only after what can connect has connected again, so that a
    // resource is never without all its peers at once.
    for Late { resource, wait, queue } in late {
        if let Some(wait) = wait.filter(|_| connecting.contains(&resource)) {
            let code = exec.run_quietly(&resource, &wait);
            if code != 0 && code != EXIT_WAIT_TIMEOUT {
                return Ok(code);
            }
        }
        let code = queue.run(exec);
        if code != 0 {
            return Ok(code);
        }
        connecting.insert(resource);
    }
    Ok(0)
}

/// Result of a wait that ran out: reason enough to go on.
const EXIT_WAIT_TIMEOUT: i32 = 5;

/// Work that takes a working connection down.
struct Late {
    resource: String,
    /// The wait before it, if there are other connections to wait for.
    wait: Option<Line>,
    queue: Queue,
}

struct Adjuster<'a> {
    view: &'a Rc<HostView>,
    running: &'a RunningResource,
    request: &'a Request,
    parts: Parts,
}

impl Adjuster<'_> {
    fn all(&self, queue: &mut Queue, late: &mut Vec<Late>) {
        let name = &self.view.resource;
        if differ(Class::Resource, &self.view.options, &self.running.options, &[]) {
            let line = Line::setup(["resource-options", name, "--set-defaults"]);
            queue.line(Stage::ResourceOptions, name, line.with(lines::options(&self.view.options)));
        }
        let file = self.request.config_file.as_deref().unwrap_or_default();
        let wanted = lines::handlers(self.view, file);
        if let palisade_control::Command::Handlers { handlers, .. } = &wanted
            && *handlers != self.running.handlers
        {
            queue.push(Stage::ResourceOptions, name, Work::Handlers(wanted.clone()));
        }
        if self.parts.disk {
            for gone in &self.running.volumes {
                if !self.view.volumes.iter().any(|v| v.vnr == u32::from(gone.volume)) {
                    self.remove_volume(queue, gone);
                }
            }
        }
        for volume in &self.view.volumes {
            self.volume(queue, volume);
        }
        if self.parts.net {
            self.connections(queue, late);
        }
    }

    fn remove_volume(&self, queue: &mut Queue, gone: &RunningVolume) {
        let name = &self.view.resource;
        if gone.backing.is_some() {
            self.detach(queue, gone.minor);
        }
        queue.line(Stage::PrepareDisk, name, Line::setup(["del-minor", &gone.minor.to_string()]));
    }

    fn detach(&self, queue: &mut Queue, minor: u32) {
        let line = Line::setup(["detach", "--diskless", &minor.to_string()]);
        queue.line(Stage::PrepareDisk, &self.view.resource, line);
    }

    fn volume(&self, queue: &mut Queue, wanted: &VolumeView) {
        let name = &self.view.resource;
        let runs = self.running.volumes.iter().find(|v| u32::from(v.volume) == wanted.vnr);
        let Some(runs) = runs.filter(|v| v.minor == wanted.minor) else {
            if let Some(other) = runs {
                self.remove_volume(queue, other);
            }
            queue.line(Stage::NewMinor, name, lines::new_minor(self.view, wanted));
            if self.parts.disk && wanted.disk.is_some() {
                attach(queue, name, wanted);
            }
            return;
        };
        if !self.parts.disk {
            return;
        }
        match (&runs.backing, &wanted.disk) {
            (None, None) => {}
            (None, Some(_)) => attach(queue, name, wanted),
            (Some(_), None) => {
                let line = Line::setup(["detach", &wanted.minor.to_string()]);
                queue.line(Stage::PrepareDisk, name, line);
            }
            (Some(_), Some(_)) => self.attached(queue, wanted, runs),
        }
    }

    fn attached(&self, queue: &mut Queue, wanted: &VolumeView, runs: &RunningVolume) {
        let (Some(backing), Some(disk)) = (&runs.backing, &wanted.disk) else { return };
        let name = &self.view.resource;
        let minor = wanted.minor.to_string();
        let (meta, _) = lines::meta_device(wanted);
        let internal = matches!(wanted.meta_disk, None | Some(palisade_conf::MetaDisk::Internal));
        let same_meta = internal == (backing.meta_index == MetaIndex::Internal)
            && (internal || same_device(&meta, &backing.meta_disk));
        if !same_device(disk, &backing.disk) || !same_meta {
            self.detach(queue, wanted.minor);
            attach(queue, name, wanted);
            return;
        }
        let options = &wanted.attach_options;
        if differ_in(Class::Attach, "size", options, &backing.options) {
            let size = options.value("size").map(|s| format!("--size={s}"));
            let resize = Line::setup(["resize", &minor]).with(size);
            let chain = vec![resize, Line::setup(["check-resize", &minor])];
            queue.push(Stage::Attach, name, Work::Chain(chain));
        }
        if differ(Class::Attach, options, &backing.options, &["size"]) {
            let mut rest = options.clone();
            rest.remove("size");
            let line = Line::setup(["disk-options", &minor, "--set-defaults"]).with(lines::options(&rest));
            queue.line(Stage::Attach, name, line);
        }
    }

    fn connections(&self, queue: &mut Queue, late: &mut Vec<Late>) {
        let name = &self.view.resource;
        for gone in &self.running.connections {
            if !self.view.peers.iter().any(|p| p.node_id == u32::from(gone.peer_node_id)) {
                let line = Line::setup(["del-peer", name, &gone.peer_node_id.to_string()]);
                queue.line(Stage::DelPeer, name, line);
            }
        }
        for peer in &self.view.peers {
            match self.running.connections.iter().find(|c| u32::from(c.peer_node_id) == peer.node_id) {
                None => add_peer(queue, self.view, peer, self.request),
                Some(runs) => {
                    let mut work = Queue::default();
                    self.connection(&mut work, peer, runs);
                    let drops = work.has(Stage::Disconnect) || work.has(Stage::DelPeer);
                    if drops && runs.connection_state == ConnectionState::Connected {
                        late.push(Late { resource: name.clone(), wait: self.wait(peer), queue: work });
                    } else {
                        queue.append(work);
                    }
                }
            }
        }
    }

    /// Waits for twice the time a peer may take to answer, at least a second (`spec/cli.md` §5).
    fn wait(&self, peer: &PeerView) -> Option<Line> {
        const TENTHS: u64 = 10;
        if self.view.peers.len() < 2 {
            return None;
        }
        let net = canonical(&peer.net);
        let tenths = |name: &str| {
            options::find_in(Class::Net, name).and_then(|s| value(s, &net).parse::<u64>().ok()).unwrap_or(0)
        };
        let limit = Some(tenths("socket-check-timeout")).filter(|t| *t > 0).unwrap_or(tenths("ping-timeout"));
        let seconds = (2 * limit / TENTHS).max(1);
        let timeouts = ["wfc-timeout", "degr-wfc-timeout", "outdated-wfc-timeout"];
        let words = timeouts.iter().map(|name| format!("--{name}={seconds}"));
        Some(Line::setup(["wait-connect-resource", &self.view.resource]).with(words))
    }

    fn connection(&self, queue: &mut Queue, peer: &PeerView, runs: &RunningConnection) {
        let name = &self.view.resource;
        if NET_FIXED.iter().any(|option| differ_in(Class::Net, option, &peer.net, &runs.options)) {
            queue.line(Stage::DelPeer, name, lines::connection("del-peer", self.view, peer));
            add_peer(queue, self.view, peer, self.request);
            return;
        }
        if differ(Class::Net, &peer.net, &runs.options, NET_FIXED) {
            queue.line(Stage::NetOptions, name, lines::net_options(self.view, peer, true));
        }
        let disconnected = self.paths(queue, peer, runs);
        self.peer_devices(queue, peer, runs);
        if disconnected || runs.connection_state == ConnectionState::StandAlone {
            connect(queue, self.view, peer, self.request);
        }
    }

    /// Whether the connection is taken down to exchange its only path.
    fn paths(&self, queue: &mut Queue, peer: &PeerView, runs: &RunningConnection) -> bool {
        let name = &self.view.resource;
        let wanted: Vec<_> = peer.paths.iter().map(|p| (endpoint(&p.own), endpoint(&p.peer), p)).collect();
        let gone: Vec<_> = runs
            .paths
            .iter()
            .filter(|r| {
                !wanted
                    .iter()
                    .any(|(own, peer, _)| own.as_ref() == Some(&r.local) && peer.as_ref() == Some(&r.remote))
            })
            .collect();
        let last = gone.len() == runs.paths.len() && !gone.is_empty();
        let disconnect = last && runs.connection_state != ConnectionState::StandAlone;
        if disconnect {
            queue.line(Stage::Disconnect, name, lines::connection("disconnect", self.view, peer));
        }
        for path in gone {
            let line = lines::connection("del-path", self.view, peer);
            queue.line(Stage::DelPeer, name, line.with([path.local.to_string(), path.remote.to_string()]));
        }
        for (own, remote, path) in &wanted {
            let there = runs
                .paths
                .iter()
                .any(|r| own.as_ref() == Some(&r.local) && remote.as_ref() == Some(&r.remote));
            if !there {
                queue.line(Stage::NewPath, name, lines::path("new-path", self.view, peer, path));
            }
        }
        disconnect
    }

    fn peer_devices(&self, queue: &mut Queue, peer: &PeerView, runs: &RunningConnection) {
        let none = Options::new();
        for volume in &peer.volumes {
            let runs = runs.peer_devices.iter().find(|p| u32::from(p.volume) == volume.vnr);
            let known = runs.map_or(&none, |p| &p.options);
            if differ(Class::PeerDevice, &volume.options, known, &[]) {
                let line = lines::peer_device("peer-device-options", self.view, peer, volume.vnr)
                    .with(["--set-defaults"])
                    .with(lines::options(&volume.options));
                queue.line(Stage::PeerDeviceOptions, &self.view.resource, line);
            }
        }
    }
}

/// Whether options differ; one that is missing on a side has its default there.
fn differ(class: Class, wanted: &OptionList, runs: &Options, except: &[&str]) -> bool {
    let wanted = canonical(wanted);
    options::of(class)
        .filter(|s| !s.name.starts_with('_') && !except.contains(&s.name))
        .any(|spec| value(spec, &wanted) != value(spec, runs))
}

fn differ_in(class: Class, name: &str, wanted: &OptionList, runs: &Options) -> bool {
    let wanted = canonical(wanted);
    options::find_in(class, name).is_some_and(|spec| value(spec, &wanted) != value(spec, runs))
}

fn value(spec: &options::OptionSpec, values: &Options) -> String {
    values.get(spec.name).map_or_else(|| spec.default().to_string(), str::to_owned)
}

/// The same device, perhaps under another name.
fn same_device(a: &str, b: &str) -> bool {
    let real = |p: &str| std::fs::canonicalize(p).ok();
    a == b || real(a).is_some_and(|a| real(b) == Some(a))
}
