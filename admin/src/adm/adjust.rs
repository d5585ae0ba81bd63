//! `adjust`: the least commands from what runs to what is configured (`spec/cli.md` §5). It never takes
//! down a connection that works before the ones that can connect have done so.

use palisade_conf::ProxyView;
use palisade_conf::options::{self, Class, OptionList};
use palisade_conf::view::{PeerView, VolumeView};
use palisade_control::{
    ConnectionState, MetaIndex, Options, RunningConnection, RunningResource, RunningVolume,
};

use super::bring_up::{Parts, Queue, Stage, Work, add_peer, attach, connect, everything};
use super::exec::{Exec, Line};
use super::objects::{Resolved, Scope, resolve};
use super::request::Request;
use super::running::{canonical, endpoint, running};
use super::site::Site;
use super::{lines, proxy, verbs};
use crate::cli::{Failure, print};

/// Net options that cannot change while the connection exists.
const NET_FIXED: &[&str] = &["transport", "load-balance-paths"];

/// What is to be done.
#[derive(Default)]
struct Plan {
    queue: Queue,
    late: Vec<Late>,
}

pub fn adjust(site: &Site, found: &Resolved, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    plan(site, found, exec, request)?.run(exec, Queue::run)
}

/// As [`adjust`], with stages and resources told instead of errors.
pub fn adjust_with_progress(
    site: &Site,
    found: &Resolved,
    exec: &Exec<'_>,
    request: &Request,
) -> Result<i32, Failure> {
    let tells = request.verbose == 0 && !request.dry_run;
    let run = if tells { Queue::run_with_progress } else { Queue::run };
    plan(site, found, exec, request)?.run(exec, run)
}

/// `sh-list-adjustable`: the resources that `adjust` would do something about.
pub fn list(site: &Site, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let Some(verb) = verbs::find("adjust") else { return Ok(super::EXIT_USAGE) };
    let found = resolve(verb, site, request)?;
    let plan = plan(site, &found, exec, request)?;
    let mut names = plan.queue.resources();
    for late in plan.late {
        if !names.contains(&late.resource) {
            names.push(late.resource);
        }
    }
    print(&names.iter().map(|name| format!("{name}\n")).collect::<String>());
    Ok(found.code)
}

fn plan(site: &Site, found: &Resolved, exec: &Exec<'_>, request: &Request) -> Result<Plan, Failure> {
    let parts =
        Parts { disk: !request.scanned.is_set("skip-disk"), net: !request.scanned.is_set("skip-net") };
    let proxies = |name: &str| match site.config.resource(name) {
        Some(resource) if parts.net => {
            resource.proxies(&site.host).map_err(|e| Failure::new(i32::from(e.exit_code()), e.to_string()))
        }
        _ => Ok(Vec::new()),
    };
    let mut plan = Plan::default();
    for scope in &Scope::of(&found.targets) {
        let name = &scope.view.resource;
        match running(name)? {
            None => everything(&mut plan.queue, scope, request, parts),
            Some(running) => Adjuster { scope, running: &running, request, parts }.all(&mut plan),
        }
        let named = |proxy: &ProxyView| proxy.peer_node_id.is_none_or(|id| scope.has_peer(id));
        for proxy in proxies(name)?.iter().filter(|proxy| named(proxy)) {
            adjust_proxy(&mut plan.queue, proxy, exec)?;
        }
    }
    for name in &found.proxy_nodes {
        for proxy in &proxies(name)? {
            adjust_proxy(&mut plan.queue, proxy, exec)?;
        }
    }
    Ok(plan)
}

fn adjust_proxy(queue: &mut Queue, proxy: &ProxyView, exec: &Exec<'_>) -> Result<(), Failure> {
    let lines = proxy::adjust(proxy, exec)?;
    queue.push(Stage::NewPeer, &proxy.resource, Work::Chain(lines));
    Ok(())
}

impl Plan {
    fn run(self, exec: &Exec<'_>, run: fn(Queue, &Exec<'_>) -> i32) -> Result<i32, Failure> {
        let mut connecting = self.queue.resources_in(Stage::Connect);
        let code = run(self.queue, exec);
        if code != 0 {
            return Ok(code);
        }
        // A connection that works is dropped only after what can connect has connected again, so that a
        // resource is never without all its peers at once.
        for Late { resource, wait, queue } in self.late {
            if let Some(wait) = wait.filter(|_| connecting.contains(&resource)) {
                let code = exec.run_quietly(&resource, &wait);
                if code != 0 && code != EXIT_WAIT_TIMEOUT {
                    return Ok(code);
                }
            }
            let code = run(queue, exec);
            if code != 0 {
                return Ok(code);
            }
            connecting.insert(resource);
        }
        Ok(0)
    }
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
    scope: &'a Scope,
    running: &'a RunningResource,
    request: &'a Request,
    parts: Parts,
}

impl Adjuster<'_> {
    fn all(&self, plan: &mut Plan) {
        let queue = &mut plan.queue;
        let name = self.name();
        if differ(Class::Resource, &self.scope.view.options, &self.running.options, &[]) {
            let line = Line::setup(["resource-options", name, "--set-defaults"]);
            queue.line(Stage::ResourceOptions, name, line.with(lines::options(&self.scope.view.options)));
        }
        let file = self.request.config_file.as_deref().unwrap_or_default();
        let wanted = lines::handlers(&self.scope.view, file);
        if let palisade_control::Command::Handlers { handlers, .. } = &wanted
            && *handlers != self.running.handlers
        {
            queue.push(Stage::ResourceOptions, name, Work::Handlers(wanted.clone()));
        }
        if self.parts.disk {
            for gone in &self.running.volumes {
                let vnr = u32::from(gone.volume);
                if self.scope.has_volume(vnr) && !self.scope.view.volumes.iter().any(|v| v.vnr == vnr) {
                    self.remove_volume(queue, gone);
                }
            }
        }
        for volume in self.scope.volumes() {
            self.volume(queue, volume);
        }
        if self.parts.net {
            self.connections(plan);
        }
    }

    fn name(&self) -> &str {
        &self.scope.view.resource
    }

    fn remove_volume(&self, queue: &mut Queue, gone: &RunningVolume) {
        let name = self.name();
        if gone.backing.is_some() {
            self.detach(queue, gone.minor);
        }
        queue.line(Stage::PrepareDisk, name, Line::setup(["del-minor", &gone.minor.to_string()]));
    }

    fn detach(&self, queue: &mut Queue, minor: u32) {
        let line = Line::setup(["detach", "--diskless", &minor.to_string()]);
        queue.line(Stage::PrepareDisk, self.name(), line);
    }

    /// The volume as it runs, unless it will be made anew.
    fn kept(&self, vnr: u32) -> Option<&RunningVolume> {
        let wanted = self.scope.view.volumes.iter().find(|v| v.vnr == vnr)?;
        let runs = self.running.volumes.iter().find(|v| u32::from(v.volume) == vnr)?;
        (runs.minor == wanted.minor || !self.parts.disk).then_some(runs)
    }

    fn volume(&self, queue: &mut Queue, wanted: &VolumeView) {
        let name = self.name();
        let Some(runs) = self.kept(wanted.vnr) else {
            if let Some(other) = self.running.volumes.iter().find(|v| u32::from(v.volume) == wanted.vnr) {
                self.remove_volume(queue, other);
            }
            queue.line(Stage::NewMinor, name, lines::new_minor(&self.scope.view, wanted));
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
            (Some(_), None) => self.detach(queue, wanted.minor),
            (Some(_), Some(_)) => self.attached(queue, wanted, runs),
        }
    }

    fn attached(&self, queue: &mut Queue, wanted: &VolumeView, runs: &RunningVolume) {
        let (Some(backing), Some(disk)) = (&runs.backing, &wanted.disk) else { return };
        let name = self.name();
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
            let chain = lines::resize(wanted, options.value("size"));
            queue.push(Stage::Attach, name, Work::Chain(chain.to_vec()));
        }
        if differ(Class::Attach, options, &backing.options, &["size"]) {
            let mut rest = options.clone();
            rest.remove("size");
            let line = Line::setup(["disk-options", &minor, "--set-defaults"]).with(lines::options(&rest));
            // Peers that get a bitmap have to find it when they are made.
            let gets_bitmap = differ_in(Class::Attach, "bitmap", options, &backing.options)
                && options.value("bitmap") != Some("no");
            let stage = if gets_bitmap { Stage::NewMinor } else { Stage::Attach };
            queue.line(stage, name, line);
        }
    }

    fn connections(&self, Plan { queue, late }: &mut Plan) {
        let name = self.name();
        for gone in &self.running.connections {
            let id = u32::from(gone.peer_node_id);
            if self.scope.has_peer(id) && !self.scope.view.peers.iter().any(|p| p.node_id == id) {
                let line = Line::setup(["del-peer", name, &gone.peer_node_id.to_string()]);
                queue.line(Stage::DelPeer, name, line);
            }
        }
        for peer in self.scope.peers() {
            match self.running.connections.iter().find(|c| u32::from(c.peer_node_id) == peer.node_id) {
                None => add_peer(queue, self.scope, peer, self.request),
                Some(runs) => {
                    let mut work = Queue::default();
                    self.connection(&mut work, peer, runs);
                    let drops = work.has(Stage::Disconnect) || work.has(Stage::DelPeer);
                    if drops && runs.connection_state == ConnectionState::Connected {
                        late.push(Late { resource: name.to_owned(), wait: self.wait(peer), queue: work });
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
        if self.scope.view.peers.len() < 2 {
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
        Some(Line::setup(["wait-connect-resource", self.name()]).with(words))
    }

    fn connection(&self, queue: &mut Queue, peer: &PeerView, runs: &RunningConnection) {
        let name = self.name();
        if NET_FIXED.iter().any(|option| differ_in(Class::Net, option, &peer.net, &runs.options)) {
            queue.line(Stage::DelPeer, name, lines::connection("del-peer", &self.scope.view, peer));
            add_peer(queue, self.scope, peer, self.request);
            return;
        }
        if differ(Class::Net, &peer.net, &runs.options, NET_FIXED) {
            queue.line(Stage::NetOptions, name, lines::net_options(&self.scope.view, peer, true));
        }
        let disconnected = self.paths(queue, peer, runs);
        self.peer_devices(queue, peer, runs);
        if disconnected || runs.connection_state == ConnectionState::StandAlone {
            connect(queue, &self.scope.view, peer, self.request);
        }
    }

    /// Whether the connection is taken down to exchange its only path.
    fn paths(&self, queue: &mut Queue, peer: &PeerView, runs: &RunningConnection) -> bool {
        let name = self.name();
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
            queue.line(Stage::Disconnect, name, lines::connection("disconnect", &self.scope.view, peer));
        }
        for path in gone {
            let line = lines::connection("del-path", &self.scope.view, peer);
            queue.line(Stage::DelPeer, name, line.with([path.local.to_string(), path.remote.to_string()]));
        }
        for (own, remote, path) in &wanted {
            let there = runs
                .paths
                .iter()
                .any(|r| own.as_ref() == Some(&r.local) && remote.as_ref() == Some(&r.remote));
            if !there {
                queue.line(Stage::NewPath, name, lines::path("new-path", &self.scope.view, peer, path));
            }
        }
        disconnect
    }

    fn peer_devices(&self, queue: &mut Queue, peer: &PeerView, runs: &RunningConnection) {
        let none = Options::new();
        for volume in peer.volumes.iter().filter(|volume| self.scope.has_volume(volume.vnr)) {
            let kept = self.kept(volume.vnr);
            if kept.is_none() && !self.parts.disk {
                continue;
            }
            let runs = kept.and_then(|v| runs.peer_devices.iter().find(|p| p.volume == v.volume));
            let known = runs.map_or(&none, |p| &p.options);
            if differ(Class::PeerDevice, &volume.options, known, &[]) {
                let line = lines::peer_device("peer-device-options", &self.scope.view, peer, volume.vnr)
                    .with(["--set-defaults"])
                    .with(lines::options(&volume.options));
                queue.line(Stage::PeerDeviceOptions, self.name(), line);
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
