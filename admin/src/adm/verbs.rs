//! The table of commands and the plain ones.

use palisade_conf::options::Class;

use super::exec::{Exec, Line};
use super::objects::Target;
use super::site::Site;
use super::{EXIT_USAGE, Request, lines, metadata, objects, sh};
use crate::cli::{Accepts, Failure, Flag, Takes};

/// What a command runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Iterates {
    Resource,
    Volume,
    /// Volumes with a local disk.
    Disk,
    Connection,
    Path,
    PeerDevice,
    /// Peer devices of volumes with a local disk.
    DiskAndPeer,
    PathOfVolume,
}

/// How a command runs.
#[derive(Clone, Copy)]
pub enum Runs {
    Once(fn(&Site, &Exec<'_>, &Request) -> Result<i32, Failure>),
    Each(fn(&Target, &Exec<'_>, &Request) -> Result<i32, Failure>),
    Up,
    Adjust,
    Dump,
}

#[derive(Clone, Copy)]
pub struct Verb {
    pub name: &'static str,
    pub iterates: Iterates,
    pub accepts: Accepts,
    pub runs: Runs,
    /// Talks to an engine, so a kernel resource is handed over.
    pub needs_engine: bool,
    /// The configured address must exist on this host.
    pub checks_address: bool,
    /// A volume may be named though the command is not about volumes.
    pub takes_volume: bool,
    /// Exactly one volume is meant.
    pub one_volume: bool,
}

type EachFn = fn(&Target, &Exec<'_>, &Request) -> Result<i32, Failure>;

const fn accepts(flags: &'static [Flag], classes: &'static [Class]) -> Accepts {
    Accepts { flags, classes, aliases: &[] }
}

const NONE: Accepts = accepts(&[], &[]);
const FORCE: Accepts = accepts(&[("force", Takes::Switch)], &[]);

const fn engine(name: &'static str, iterates: Iterates, accepts: Accepts, run: EachFn) -> Verb {
    Verb {
        name,
        iterates,
        accepts,
        runs: Runs::Each(run),
        needs_engine: true,
        checks_address: false,
        takes_volume: false,
        one_volume: false,
    }
}

const fn local(name: &'static str, iterates: Iterates, accepts: Accepts, run: EachFn) -> Verb {
    Verb { needs_engine: false, ..engine(name, iterates, accepts, run) }
}

const fn once(
    name: &'static str,
    accepts: Accepts,
    run: fn(&Site, &Exec<'_>, &Request) -> Result<i32, Failure>,
) -> Verb {
    Verb { runs: Runs::Once(run), ..local(name, Iterates::Resource, accepts, nothing) }
}

const fn addressed(verb: Verb) -> Verb {
    Verb { checks_address: true, ..verb }
}

const fn one_volume(verb: Verb) -> Verb {
    Verb { one_volume: true, ..verb }
}

const fn with_volume(verb: Verb) -> Verb {
    Verb { takes_volume: true, ..verb }
}

const CREATE_MD: Accepts = accepts(
    &[
        ("max-peers", Takes::Value),
        ("peer-max-bio-size", Takes::Value),
        ("al-stripes", Takes::Value),
        ("al-stripe-size-kB", Takes::Value),
        ("bitmap-block-size", Takes::Value),
        ("effective-size", Takes::Value),
        ("diskful-peers", Takes::Value),
        ("initial-current-uuid", Takes::Value),
        ("consistent", Takes::Switch),
        ("uptodate", Takes::Switch),
        ("force", Takes::Switch),
    ],
    &[],
);

const CONNECT: Accepts = Accepts {
    flags: &[("discard-my-data", Takes::Switch), ("tentative", Takes::Switch)],
    classes: &[],
    aliases: &[("dry-run", "tentative")],
};

const ADJUST: Accepts = accepts(
    &[
        ("discard-my-data", Takes::Switch),
        ("tentative", Takes::Switch),
        ("skip-disk", Takes::Switch),
        ("skip-net", Takes::Switch),
    ],
    &[],
);

const RESIZE: Accepts = accepts(
    &[
        ("size", Takes::Value),
        ("assume-peer-has-space", Takes::Switch),
        ("assume-clean", Takes::Switch),
        ("al-stripes", Takes::Value),
        ("al-stripe-size-kB", Takes::Value),
    ],
    &[],
);

const RESET: Accepts = accepts(&[("reset-bitmap", Takes::Switch)], &[]);
const WAIT: Accepts = accepts(&[], &[Class::Startup]);

const EVENTS: Accepts = accepts(
    &[
        ("now", Takes::Switch),
        ("timestamps", Takes::Switch),
        ("statistics", Takes::Switch),
        ("full", Takes::Switch),
        ("poll", Takes::Switch),
        ("diff", Takes::Optional),
        ("color", Takes::Optional),
        ("rcvbuf", Takes::Value),
    ],
    &[],
);

use Iterates::{Connection, Disk, DiskAndPeer, Path, PathOfVolume, PeerDevice, Resource, Volume};

pub const VERBS: &[Verb] = &[
    engine("attach", Disk, accepts(&[], &[Class::Attach]), |t, x, r| {
        let Some(v) = &t.volume else { return Ok(0) };
        let code = x.run(&t.view.resource, &lines::apply_al(v));
        if code != 0 {
            return Ok(code);
        }
        Ok(x.run(&t.view.resource, &with_extra(lines::attach(v), r)))
    }),
    engine("disk-options", Disk, accepts(&[], &[Class::Attach]), |t, x, r| {
        let Some(v) = &t.volume else { return Ok(0) };
        let line =
            Line::setup(["disk-options", &v.minor.to_string()]).with(lines::options(&v.attach_options));
        Ok(x.run(&t.view.resource, &with_extra(line, r)))
    }),
    engine("detach", Disk, accepts(&[("force", Takes::Switch), ("diskless", Takes::Switch)], &[]), on_minor),
    addressed(engine("connect", Connection, CONNECT, on_connection)),
    addressed(engine("new-peer", Connection, accepts(&[], &[Class::Net]), |t, x, r| {
        let Some(p) = &t.peer else { return Ok(0) };
        Ok(x.run(&t.view.resource, &with_extra(lines::new_peer(&t.view, p), r)))
    })),
    addressed(engine("del-peer", Connection, FORCE, on_connection)),
    addressed(engine("new-path", Path, NONE, on_path)),
    addressed(engine("del-path", Path, NONE, on_path)),
    addressed(engine("net-options", Connection, accepts(&[], &[Class::Net]), |t, x, r| {
        let Some(p) = &t.peer else { return Ok(0) };
        Ok(x.run(&t.view.resource, &with_extra(lines::net_options(&t.view, p, false), r)))
    })),
    engine("disconnect", Connection, FORCE, on_connection),
    addressed(Verb { runs: Runs::Up, ..engine("up", Resource, NONE, nothing) }),
    engine("new-resource", Resource, accepts(&[], &[Class::Resource]), |t, x, r| {
        let name = &t.view.resource;
        let code = x.run(name, &with_extra(lines::new_resource(&t.view), r));
        if code != 0 {
            return Ok(code);
        }
        let file = r.config_file.as_deref().unwrap_or_default();
        Ok(x.tell_handlers(name, lines::handlers(&t.view, file)))
    }),
    engine("resource-options", Resource, accepts(&[], &[Class::Resource]), on_resource),
    engine("new-minor", Volume, NONE, |t, x, _| {
        let Some(v) = &t.volume else { return Ok(0) };
        Ok(x.run(&t.view.resource, &lines::new_minor(&t.view, v)))
    }),
    engine("del-minor", Volume, NONE, on_minor),
    engine("peer-device-options", PeerDevice, accepts(&[], &[Class::PeerDevice]), |t, x, r| {
        let (Some(v), Some(p)) = (&t.volume, &t.peer) else { return Ok(0) };
        let set = p.volumes.iter().find(|pv| pv.vnr == v.vnr).map(|pv| lines::options(&pv.options));
        let line = lines::peer_device("peer-device-options", &t.view, p, v.vnr).with(set.unwrap_or_default());
        Ok(x.run(&t.view.resource, &with_extra(line, r)))
    }),
    engine("down", Resource, NONE, on_resource),
    engine(
        "primary",
        Resource,
        Accepts {
            flags: &[("force", Takes::Switch)],
            classes: &[],
            aliases: &[("overwrite-data-of-peer", "force")],
        },
        on_resource,
    ),
    engine("secondary", Resource, FORCE, on_resource),
    engine(
        "invalidate",
        Disk,
        accepts(
            &[
                ("force", Takes::Switch),
                ("reset-bitmap", Takes::Switch),
                ("sync-from-peer-node-id", Takes::Value),
            ],
            &[],
        ),
        metadata::invalidate,
    ),
    engine("invalidate-remote", PeerDevice, RESET, on_peer_device),
    engine("outdate", Volume, NONE, metadata::outdate),
    engine("resize", Disk, RESIZE, resize),
    engine("check-resize", Disk, NONE, resize),
    engine(
        "verify",
        PeerDevice,
        accepts(&[("start", Takes::Value), ("stop", Takes::Value)], &[]),
        on_peer_device,
    ),
    engine("pause-sync", PeerDevice, NONE, on_peer_device),
    engine("resume-sync", PeerDevice, NONE, on_peer_device),
    engine("suspend-io", Volume, NONE, on_minor),
    engine("resume-io", Volume, NONE, on_minor),
    one_volume(engine(
        "new-current-uuid",
        Volume,
        accepts(&[("clear-bitmap", Takes::Switch), ("force-resync", Takes::Switch)], &[]),
        on_minor,
    )),
    addressed(Verb { runs: Runs::Adjust, ..engine("adjust", Resource, ADJUST, nothing) }),
    addressed(with_volume(engine("wait-connect", Resource, WAIT, wait))),
    addressed(with_volume(engine("wait-sync", Resource, WAIT, wait))),
    engine("role", Resource, NONE, |t, x, _| {
        let line = match &t.peer {
            Some(p) => lines::connection("peer-role", &t.view, p),
            None => Line::setup(["role", &t.view.resource]),
        };
        Ok(x.run(&t.view.resource, &line))
    }),
    engine("cstate", Connection, NONE, on_connection),
    engine("dstate", Volume, FORCE, metadata::dstate),
    once(
        "status",
        accepts(&[("statistics", Takes::Switch), ("json", Takes::Switch), ("color", Takes::Optional)], &[]),
        status,
    ),
    once("events2", EVENTS, events),
    engine("show-gi", DiskAndPeer, FORCE, metadata::generation),
    engine("get-gi", DiskAndPeer, FORCE, metadata::generation),
    engine("create-md", Disk, CREATE_MD, metadata::create_md),
    engine("dump-md", Disk, FORCE, metadata::plain),
    engine("wipe-md", Disk, FORCE, metadata::plain),
    engine("apply-al", Disk, FORCE, metadata::plain),
    engine("forget-peer", Connection, FORCE, metadata::forget_peer),
    one_volume(engine("set-gi", DiskAndPeer, FORCE, metadata::set_gi)),
    Verb { runs: Runs::Dump, ..local("dump", Resource, NONE, nothing) },
    once("sh-nop", NONE, sh::nop),
    once("sh-resources", NONE, sh::resources),
    once("sh-mod-parms", NONE, sh::mod_parms),
    local("sh-resource", Resource, NONE, sh::resource),
    local("sh-lr-of", Resource, NONE, sh::lr_of),
    local("sh-dev", Volume, NONE, sh::dev),
    local("sh-minor", Volume, NONE, sh::minor),
    local("sh-ll-dev", Volume, NONE, sh::ll_dev),
    local("sh-md-dev", Disk, NONE, sh::md_dev),
    local("sh-md-idx", Disk, NONE, sh::md_idx),
    local("sh-ip", PathOfVolume, NONE, sh::ip),
    once("sh-udev", NONE, udev),
    handler("pri-on-incon-degr"),
    handler("pri-lost-after-sb"),
    handler("pri-lost"),
    handler("initial-split-brain"),
    handler("split-brain"),
    handler("fence-peer"),
    handler("unfence-peer"),
    handler("local-io-error"),
    handler("before-resync-target"),
    handler("after-resync-target"),
    handler("before-resync-source"),
    handler("out-of-sync"),
    handler("quorum-lost"),
    handler("disconnected"),
];

const fn handler(name: &'static str) -> Verb {
    with_volume(local(name, Resource, NONE, sh::handler))
}

/// For commands whose work is elsewhere.
fn nothing(_: &Target, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    Ok(0)
}

fn with_extra(line: Line, request: &Request) -> Line {
    line.with(request.extra.clone())
}

/// `VERB RES {options}`
fn on_resource(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    Ok(x.run(&t.view.resource, &with_extra(Line::setup([&r.verb, &t.view.resource]), r)))
}

/// `VERB MINOR {options}`
fn on_minor(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let Some(v) = &t.volume else { return Ok(0) };
    Ok(x.run(&t.view.resource, &with_extra(Line::setup([r.verb.clone(), v.minor.to_string()]), r)))
}

/// `VERB RES NODE {options}`
fn on_connection(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let Some(p) = &t.peer else { return Ok(0) };
    Ok(x.run(&t.view.resource, &with_extra(lines::connection(&r.verb, &t.view, p), r)))
}

fn on_path(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let (Some(p), Some(path)) = (&t.peer, &t.path) else { return Ok(0) };
    Ok(x.run(&t.view.resource, &lines::path(&r.verb, &t.view, p, path)))
}

/// `VERB RES NODE VOLUME {options}`
fn on_peer_device(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let (Some(v), Some(p)) = (&t.volume, &t.peer) else { return Ok(0) };
    Ok(x.run(&t.view.resource, &with_extra(lines::peer_device(&r.verb, &t.view, p, v.vnr), r)))
}

fn resize(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let Some(v) = &t.volume else { return Ok(0) };
    let minor = v.minor.to_string();
    let configured = v.attach_options.value("size").filter(|_| r.scanned.flag("size").is_none());
    let line = Line::setup(["resize", &minor]).with(configured.map(|s| format!("--size={s}")));
    let code = x.run(&t.view.resource, &with_extra(line, r));
    if code != 0 {
        return Ok(code);
    }
    Ok(x.run(&t.view.resource, &Line::setup(["check-resize", &minor])))
}

/// On a whole resource, one connection or one peer device, as named.
fn wait(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let name = &t.view.resource;
    let line = match (&t.peer, t.named_volume) {
        (Some(p), Some(vnr)) => lines::peer_device(&format!("{}-volume", r.verb), &t.view, p, vnr),
        (Some(p), None) => lines::connection(&format!("{}-connection", r.verb), &t.view, p),
        (None, _) => Line::setup([format!("{}-resource", r.verb), name.clone()]),
    };
    let mut startup = t.view.startup.clone();
    for option in r.scanned.options.iter().map(|(name, _)| name.to_owned()).collect::<Vec<_>>() {
        startup.remove(&option);
    }
    Ok(x.run(name, &with_extra(line.with(lines::options(&startup)), r)))
}

fn status(_: &Site, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let verbose = std::iter::repeat_n("--verbose".to_owned(), request.verbose);
    let names: Vec<Option<String>> = if request.objects.is_empty() {
        vec![None]
    } else {
        request.objects.iter().map(|n| Some(n.clone()).filter(|n| n != "all")).collect()
    };
    let mut worst = 0;
    for name in names {
        let line = Line::setup(["status"]).with(name).with(verbose.clone()).with(request.extra.clone());
        worst =
            worst.max(if exec.dry_run() { exec.run("all", &line) } else { crate::setup::main(&line.args) });
    }
    Ok(worst)
}

fn events(_: &Site, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let line = Line::setup(["events2"]).with(request.objects.clone()).with(request.extra.clone());
    Ok(exec.run("all", &line))
}

fn udev(site: &Site, _: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let Some(verb) = VERBS.iter().find(|v| v.name == "sh-dev") else { return Ok(EXIT_USAGE) };
    let (targets, code) = objects::resolve(verb, site, request)?;
    for target in &targets {
        sh::udev(site, target);
    }
    Ok(code)
}
