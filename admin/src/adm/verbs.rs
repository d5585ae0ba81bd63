//! The table of commands: name, what each runs on, what it accepts, what runs it. Data only; whatever a
//! command needs to know about itself beyond its name stands here and nowhere else.

use palisade_conf::options::Class;

use super::exec::Exec;
use super::objects::{Resolved, Target};
use super::request::Request;
use super::site::Site;
use super::{adjust, bring_up, metadata, plain, proxy, sh, waiting};
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

/// Where a command is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    Main,
    Script,
    Handler,
    Expert,
}

pub type OnceFn = fn(&Site, &Exec<'_>, &Request) -> Result<i32, Failure>;
pub type EachFn = fn(&Target, &Exec<'_>, &Request) -> Result<i32, Failure>;
pub type TogetherFn = fn(&Site, &Resolved, &Exec<'_>, &Request) -> Result<i32, Failure>;

/// How a command runs.
#[derive(Clone, Copy)]
pub enum Runs {
    /// Without objects; those given are ignored with a remark.
    Once(OnceFn),
    /// Reads its objects itself; without any it is about everything.
    Query(OnceFn),
    /// On one target after the other.
    Each(EachFn),
    /// On all targets at once.
    Together(TogetherFn),
    /// On resources with proxies that run here.
    Proxy(proxy::ProxyFn),
}

#[derive(Clone, Copy)]
pub struct Verb {
    pub name: &'static str,
    pub iterates: Iterates,
    pub accepts: Accepts,
    pub runs: Runs,
    pub group: Group,
    /// Talks to an engine, so a kernel resource is handed over.
    pub needs_engine: bool,
    /// The configured address must exist on this host.
    pub checks_address: bool,
    /// A volume may be named though the command is not about volumes.
    pub takes_volume: bool,
    /// Exactly one volume is meant.
    pub one_volume: bool,
    /// Words before the command are arguments of the back end.
    pub takes_words: bool,
    /// Also about resources of which only a proxy runs here.
    pub on_proxy_nodes: bool,
}

const fn switch(name: &'static str) -> Flag {
    (name, Takes::Switch)
}

const fn value(name: &'static str) -> Flag {
    (name, Takes::Value)
}

const fn optional(name: &'static str) -> Flag {
    (name, Takes::Optional)
}

const fn flags(flags: &'static [Flag]) -> Accepts {
    Accepts { flags, classes: &[], aliases: &[] }
}

const fn class(classes: &'static [Class]) -> Accepts {
    Accepts { flags: &[], classes, aliases: &[] }
}

const NONE: Accepts = flags(&[]);
const FORCE: Accepts = flags(&[switch("force")]);
const RESET: Accepts = flags(&[switch("reset-bitmap")]);
const WAIT: Accepts = class(&[Class::Startup]);
const ADJUST: Accepts =
    flags(&[switch("discard-my-data"), switch("tentative"), switch("skip-disk"), switch("skip-net")]);
const PRIMARY: Accepts = Accepts { aliases: &[("overwrite-data-of-peer", "force")], ..FORCE };
const CONNECT: Accepts = Accepts {
    aliases: &[("dry-run", "tentative")],
    ..flags(&[switch("discard-my-data"), switch("tentative")])
};
const INVALIDATE: Accepts =
    flags(&[switch("force"), switch("reset-bitmap"), value("sync-from-peer-node-id")]);
const RESIZE: Accepts = flags(&[
    value("size"),
    switch("assume-peer-has-space"),
    switch("assume-clean"),
    value("al-stripes"),
    value("al-stripe-size-kB"),
]);
const CREATE_MD: Accepts = flags(&[
    value("max-peers"),
    value("peer-max-bio-size"),
    value("al-stripes"),
    value("al-stripe-size-kB"),
    value("bitmap-block-size"),
    value("effective-size"),
    value("diskful-peers"),
    value("initial-current-uuid"),
    switch("consistent"),
    switch("uptodate"),
    switch("peers-outdated"),
    switch("rotate-uuids"),
    switch("force"),
]);
const EVENTS: Accepts = flags(&[
    switch("now"),
    switch("timestamps"),
    switch("statistics"),
    switch("full"),
    switch("poll"),
    optional("diff"),
    optional("color"),
    value("rcvbuf"),
]);

/// A command on the engine.
const fn engine(name: &'static str, iterates: Iterates, accepts: Accepts, run: EachFn) -> Verb {
    Verb {
        name,
        iterates,
        accepts,
        runs: Runs::Each(run),
        group: Group::Main,
        needs_engine: true,
        checks_address: false,
        takes_volume: false,
        one_volume: false,
        takes_words: false,
        on_proxy_nodes: false,
    }
}

/// A command that only looks at the configuration.
const fn local(name: &'static str, iterates: Iterates, run: EachFn) -> Verb {
    Verb { needs_engine: false, ..engine(name, iterates, NONE, run) }
}

const fn together(name: &'static str, accepts: Accepts, run: TogetherFn) -> Verb {
    addressed(Verb { runs: Runs::Together(run), ..engine(name, Resource, accepts, plain::on_resource) })
}

const fn without_targets(name: &'static str, accepts: Accepts, runs: Runs) -> Verb {
    Verb { runs, accepts, ..local(name, Resource, plain::on_resource) }
}

const fn once(name: &'static str, run: OnceFn) -> Verb {
    without_targets(name, NONE, Runs::Once(run))
}

const fn query(name: &'static str, accepts: Accepts, run: OnceFn) -> Verb {
    without_targets(name, accepts, Runs::Query(run))
}

const fn handler(name: &'static str) -> Verb {
    Verb { group: Group::Handler, ..with_volume(local(name, Resource, sh::handler)) }
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

const fn with_words(verb: Verb) -> Verb {
    Verb { takes_words: true, ..verb }
}

const fn adjusting(verb: Verb) -> Verb {
    Verb { on_proxy_nodes: true, ..with_volume(verb) }
}

const fn script(verb: Verb) -> Verb {
    Verb { group: Group::Script, ..verb }
}

const fn expert(verb: Verb) -> Verb {
    Verb { group: Group::Expert, ..verb }
}

use Iterates::{Connection, Disk, DiskAndPeer, Path, PathOfVolume, PeerDevice, Resource, Volume};

pub const VERBS: &[Verb] = &[
    engine("attach", Disk, class(&[Class::Attach]), plain::attach),
    engine("disk-options", Disk, class(&[Class::Attach]), plain::disk_options),
    engine("detach", Disk, flags(&[switch("force"), switch("diskless")]), plain::on_minor),
    addressed(engine("connect", Connection, CONNECT, plain::on_connection)),
    addressed(engine("new-peer", Connection, class(&[Class::Net]), plain::new_peer)),
    addressed(engine("del-peer", Connection, FORCE, plain::on_connection)),
    addressed(engine("new-path", Path, NONE, plain::on_path)),
    addressed(engine("del-path", Path, NONE, plain::on_path)),
    addressed(engine("net-options", Connection, class(&[Class::Net]), plain::net_options)),
    engine("disconnect", Connection, FORCE, plain::on_connection),
    together("up", NONE, bring_up::up),
    script(engine("new-resource", Resource, class(&[Class::Resource]), plain::new_resource)),
    engine("resource-options", Resource, class(&[Class::Resource]), plain::on_resource),
    expert(engine("new-minor", Volume, NONE, plain::new_minor)),
    expert(engine("del-minor", Volume, NONE, plain::on_minor)),
    engine("peer-device-options", PeerDevice, class(&[Class::PeerDevice]), plain::peer_device_options),
    engine("down", Resource, NONE, plain::on_resource),
    engine("primary", Resource, PRIMARY, plain::on_resource),
    engine("secondary", Resource, FORCE, plain::on_resource),
    engine("invalidate", Disk, INVALIDATE, metadata::invalidate),
    engine("invalidate-remote", PeerDevice, RESET, plain::on_peer_device),
    engine("outdate", Volume, NONE, metadata::outdate),
    engine("resize", Disk, RESIZE, plain::resize),
    expert(engine("check-resize", Volume, NONE, metadata::check_resize)),
    engine("verify", PeerDevice, flags(&[value("start"), value("stop")]), plain::on_peer_device),
    engine("pause-sync", PeerDevice, NONE, plain::on_peer_device),
    engine("resume-sync", PeerDevice, NONE, plain::on_peer_device),
    expert(engine("suspend-io", Volume, flags(&[switch("bdev-freeze")]), plain::on_minor)),
    expert(engine("resume-io", Volume, NONE, plain::on_minor)),
    expert(one_volume(engine(
        "new-current-uuid",
        Volume,
        flags(&[switch("clear-bitmap"), switch("force-resync")]),
        plain::on_minor,
    ))),
    adjusting(together("adjust", ADJUST, adjust::adjust)),
    adjusting(together("adjust-with-progress", ADJUST, adjust::adjust_with_progress)),
    addressed(with_volume(engine("wait-connect", Resource, WAIT, plain::wait))),
    addressed(with_volume(engine("wait-sync", Resource, WAIT, plain::wait))),
    once("wait-con-int", waiting::wait_con_int),
    engine("role", Resource, NONE, plain::role),
    engine("cstate", Connection, NONE, plain::on_connection),
    engine("dstate", Volume, FORCE, metadata::dstate),
    query("status", flags(&[switch("statistics"), switch("json"), optional("color")]), plain::status),
    query("events2", EVENTS, plain::events),
    engine("show-gi", DiskAndPeer, FORCE, metadata::generation),
    engine("get-gi", DiskAndPeer, FORCE, metadata::generation),
    engine("create-md", Disk, CREATE_MD, metadata::create_md),
    engine("dump-md", Disk, FORCE, metadata::plain),
    engine(
        "dump-superblock",
        Disk,
        flags(&[switch("force"), value("output-format")]),
        metadata::dump_superblock,
    ),
    engine("wipe-md", Disk, FORCE, metadata::plain),
    engine("apply-al", Disk, FORCE, metadata::plain),
    engine("repair-md", Disk, flags(&[switch("force"), switch("tentative")]), metadata::plain),
    engine("forget-peer", Connection, FORCE, metadata::forget_peer),
    expert(with_words(one_volume(engine("set-gi", DiskAndPeer, FORCE, metadata::set_gi)))),
    script(without_targets("proxy-up", NONE, Runs::Proxy(proxy::up))),
    script(without_targets("proxy-down", NONE, Runs::Proxy(proxy::down))),
    query("dump", NONE, sh::dump),
    query("dump-xml", NONE, sh::dump_xml),
    once("hidden-commands", sh::hidden_commands),
    script(once("sh-nop", sh::nop)),
    script(once("sh-resources", sh::resources)),
    script(once("sh-mod-parms", sh::mod_parms)),
    script(query("sh-list-adjustable", NONE, adjust::list)),
    script(local("sh-list-config-file", Resource, sh::config_file)),
    script(with_volume(local("sh-resource", Resource, sh::resource))),
    script(with_volume(local("sh-lr-of", Resource, sh::lr_of))),
    script(local("sh-dev", Volume, sh::dev)),
    script(local("sh-minor", Volume, sh::minor)),
    script(local("sh-ll-dev", Volume, sh::ll_dev)),
    script(local("sh-md-dev", Disk, sh::md_dev)),
    script(local("sh-md-idx", Disk, sh::md_idx)),
    script(local("sh-ip", PathOfVolume, sh::ip)),
    script(one_volume(local("sh-udev", Volume, sh::udev))),
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

/// The command of a name.
pub fn find(name: &str) -> Option<&'static Verb> {
    VERBS.iter().find(|verb| verb.name == name)
}
