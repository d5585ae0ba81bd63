//! `up`, and the queue of work in stages over all resources that `adjust` fills too (`spec/cli.md` §4).
//! A stage never begins before the one in front of it has succeeded.

use std::collections::BTreeSet;

use palisade_conf::view::{HostView, PeerView, VolumeView};
use palisade_control::Command;

use super::exec::{Exec, Line};
use super::objects::{Resolved, Scope};
use super::request::Request;
use super::site::Site;
use super::{EXIT_USAGE, lines};
use crate::cli::{Failure, print};

/// Order of the stages of `spec/cli.md` §4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Resource,
    ResourceOptions,
    PrepareDisk,
    NewMinor,
    Disconnect,
    DelPeer,
    NewPeer,
    NewPath,
    NetOptions,
    PeerDeviceOptions,
    Attach,
    Connect,
}

impl Stage {
    /// Whether later commands of a resource make no sense after a failure here.
    const fn is_needed(self) -> bool {
        matches!(self, Self::Resource | Self::PrepareDisk | Self::NewMinor | Self::DelPeer | Self::NewPeer)
    }

    /// What `adjust-with-progress` calls it.
    const fn title(self) -> &'static str {
        match self {
            Self::Resource => "create res",
            Self::ResourceOptions => "adjust res",
            Self::PrepareDisk | Self::NewMinor => "prepare disk",
            Self::Attach => "adjust disk",
            Self::Disconnect | Self::DelPeer | Self::NewPeer | Self::NewPath => "prepare net",
            Self::NetOptions => "adjust net",
            Self::PeerDeviceOptions => "adjust peer_devices",
            Self::Connect => "attempt to connect",
        }
    }
}

/// Something to do for a resource.
pub enum Work {
    Line(Line),
    /// Several lines of which each needs the one before.
    Chain(Vec<Line>),
    /// The engine is told its handlers.
    Handlers(Command),
}

/// Work of many resources, run stage by stage.
#[derive(Default)]
pub struct Queue {
    work: Vec<(Stage, String, Work)>,
}

impl Queue {
    pub fn push(&mut self, stage: Stage, resource: &str, work: Work) {
        self.work.push((stage, resource.to_owned(), work));
    }

    pub fn line(&mut self, stage: Stage, resource: &str, line: Line) {
        self.push(stage, resource, Work::Line(line));
    }

    /// Takes over the work of another queue.
    pub fn append(&mut self, mut other: Queue) {
        self.work.append(&mut other.work);
    }

    /// Whether there is work in a stage.
    pub fn has(&self, stage: Stage) -> bool {
        self.work.iter().any(|(s, ..)| *s == stage)
    }

    /// Resources with work in a stage.
    pub fn resources_in(&self, stage: Stage) -> BTreeSet<String> {
        self.work.iter().filter(|(s, ..)| *s == stage).map(|(_, r, _)| r.clone()).collect()
    }

    /// Names of the resources with any work, each once.
    pub fn resources(&self) -> Vec<String> {
        let mut seen = BTreeSet::new();
        self.work.iter().map(|(_, name, _)| name.clone()).filter(|name| seen.insert(name.clone())).collect()
    }

    /// Runs everything; stops after a stage with a failure.
    pub fn run(mut self, exec: &Exec<'_>) -> i32 {
        self.work.sort_by_key(|(stage, ..)| *stage);
        let mut broken: BTreeSet<String> = BTreeSet::new();
        let mut failed_in: Option<Stage> = None;
        for (stage, resource, work) in &self.work {
            if failed_in.is_some_and(|failed| failed < *stage) {
                return EXIT_USAGE;
            }
            if broken.contains(resource) {
                eprintln!("drbdadm: {} {resource}: skipped due to earlier error", work.verb());
                continue;
            }
            if work.run(resource, exec) != 0 {
                failed_in = Some(*stage);
                if stage.is_needed() {
                    broken.insert(resource.clone());
                }
            }
        }
        if failed_in.is_some() { EXIT_USAGE } else { 0 }
    }

    /// Runs everything whatever fails, and tells the stages and resources instead of the errors.
    pub fn run_with_progress(mut self, exec: &Exec<'_>) -> i32 {
        const TITLE_WIDTH: usize = 15;
        self.work.sort_by_key(|(stage, ..)| *stage);
        let mut broken: BTreeSet<String> = BTreeSet::new();
        let mut title = "";
        let mut told: Option<&str> = None;
        let mut worst = 0;
        print("[");
        for (stage, resource, work) in &self.work {
            if stage.title() != title {
                title = stage.title();
                told = None;
                print(&format!("\n{title:>TITLE_WIDTH$}:"));
            }
            if broken.contains(resource) {
                print(&format!(" [skipped:{resource}]"));
                continue;
            }
            if told != Some(resource.as_str()) {
                print(&format!(" {resource}"));
                told = Some(resource);
            }
            let code = work.run_silently(resource, exec);
            if code != 0 {
                print(&format!(":failed({}:{code})", work.verb()));
                worst = EXIT_USAGE;
                if stage.is_needed() {
                    broken.insert(resource.clone());
                }
            }
        }
        print("\n]\n");
        worst
    }
}

impl Work {
    fn verb(&self) -> &str {
        let line = match self {
            Self::Line(line) => Some(line),
            Self::Chain(lines) => lines.last(),
            Self::Handlers(_) => None,
        };
        line.and_then(|l| l.args.first()).map_or("handlers", String::as_str)
    }

    fn run(&self, resource: &str, exec: &Exec<'_>) -> i32 {
        match self {
            Self::Line(line) => exec.run(resource, line),
            Self::Chain(lines) => chain(resource, lines, exec),
            Self::Handlers(command) => exec.tell_handlers(resource, command.clone()),
        }
    }

    fn run_silently(&self, resource: &str, exec: &Exec<'_>) -> i32 {
        let lines = match self {
            Self::Line(line) => std::slice::from_ref(line),
            Self::Chain(lines) => lines.as_slice(),
            Self::Handlers(command) => return exec.tell_handlers(resource, command.clone()),
        };
        lines.iter().map(|line| exec.run_silently(line)).find(|code| *code != 0).unwrap_or(0)
    }
}

/// Runs lines of which each needs the one before; the first failure ends them.
pub fn chain(resource: &str, lines: &[Line], exec: &Exec<'_>) -> i32 {
    lines.iter().map(|line| exec.run(resource, line)).find(|code| *code != 0).unwrap_or(0)
}

pub fn up(_: &Site, found: &Resolved, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let mut queue = Queue::default();
    for scope in Scope::of(&found.targets) {
        everything(&mut queue, &scope, request, Parts { disk: true, net: true });
    }
    Ok(queue.run(exec))
}

/// What of a resource is set up.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    pub disk: bool,
    pub net: bool,
}

/// All commands for a resource that does not run.
pub fn everything(queue: &mut Queue, scope: &Scope, request: &Request, parts: Parts) {
    let view = &scope.view;
    let name = &view.resource;
    queue.line(Stage::Resource, name, lines::new_resource(view));
    let file = request.config_file.clone().unwrap_or_default();
    queue.push(Stage::Resource, name, Work::Handlers(lines::handlers(view, &file)));
    for volume in scope.volumes() {
        queue.line(Stage::NewMinor, name, lines::new_minor(view, volume));
        if parts.disk && volume.disk.is_some() {
            attach(queue, name, volume);
        }
    }
    if parts.net {
        for peer in scope.peers() {
            add_peer(queue, scope, peer, request);
        }
    }
}

pub fn attach(queue: &mut Queue, resource: &str, volume: &VolumeView) {
    queue.push(Stage::Attach, resource, Work::Chain(lines::attach(volume)));
}

/// All commands for a connection that does not exist.
///
/// `adjust` goes by volume number and resets the options it does not give; `up` has nothing to reset.
pub fn add_peer(queue: &mut Queue, scope: &Scope, peer: &PeerView, request: &Request) {
    let view = &scope.view;
    let name = &view.resource;
    queue.line(Stage::NewPeer, name, lines::new_peer(view, peer));
    for path in &peer.paths {
        queue.line(Stage::NewPath, name, lines::path("new-path", view, peer, path));
    }
    let adjusts = request.verb != "up";
    let mut volumes: Vec<_> =
        peer.volumes.iter().filter(|v| !v.options.is_empty() && scope.has_volume(v.vnr)).collect();
    if adjusts {
        volumes.sort_by_key(|volume| volume.vnr);
    }
    for volume in volumes {
        let defaults = adjusts.then_some("--set-defaults");
        let line = lines::peer_device("peer-device-options", view, peer, volume.vnr).with(defaults);
        queue.line(Stage::PeerDeviceOptions, name, line.with(lines::options(&volume.options)));
    }
    connect(queue, view, peer, request);
}

pub fn connect(queue: &mut Queue, view: &HostView, peer: &PeerView, request: &Request) {
    let flags = ["discard-my-data", "tentative"].iter().filter(|f| request.scanned.is_set(f));
    let line = lines::connection("connect", view, peer).with(flags.map(|f| format!("--{f}")));
    queue.line(Stage::Connect, &view.resource, line);
}

/// Handlers run in another directory than this program.
pub fn absolute(file: &str) -> String {
    if file.is_empty() || file == "-" {
        return file.to_owned();
    }
    std::path::absolute(file)
        .ok()
        .and_then(|p| p.to_str().map(str::to_owned))
        .unwrap_or_else(|| file.to_owned())
}
