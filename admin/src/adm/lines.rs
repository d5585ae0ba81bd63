//! The back-end lines for configured objects (`spec/cli.md` §3).

use std::collections::BTreeMap;

use palisade_conf::MetaDisk;
use palisade_conf::options::OptionList;
use palisade_conf::view::{HostView, PathView, PeerView, VolumeView};
use palisade_control::Command;

use super::exec::Line;

/// `--name=value` of configured options.
pub fn options(list: &OptionList) -> Vec<String> {
    list.iter().map(|o| format!("--{}={}", o.name(), o.value())).collect()
}

/// Device and index of the metadata, in the words of `drbdmeta` or `drbdsetup`.
fn meta_words(volume: &VolumeView, flexible: &str) -> (String, String) {
    let disk = volume.disk.clone().unwrap_or_default();
    match &volume.meta_disk {
        None | Some(MetaDisk::Internal) => (disk, "internal".to_owned()),
        Some(MetaDisk::Flexible(device)) => (device.clone(), flexible.to_owned()),
        Some(MetaDisk::Indexed { device, index }) => (device.clone(), index.to_string()),
    }
}

/// Metadata device and the index as `sh-md-idx` prints it.
pub fn meta_device(volume: &VolumeView) -> (String, String) {
    meta_words(volume, "flexible")
}

/// A `drbdmeta` command on a volume.
pub fn drbdmeta(volume: &VolumeView, command: &str) -> Line {
    let (device, index) = meta_words(volume, "flex-external");
    Line::meta([volume.minor.to_string(), "v09".to_owned(), device, index, command.to_owned()])
}

/// A `drbdmeta` command about a node.
pub fn drbdmeta_node(volume: &VolumeView, node_id: u32, command: &str) -> Line {
    let mut line = drbdmeta(volume, command);
    let at = line.args.len().saturating_sub(1);
    line.args.insert(at, format!("--node-id={node_id}"));
    line
}

pub fn new_resource(view: &HostView) -> Line {
    Line::setup(["new-resource", &view.resource, &view.node_id.to_string()]).with(options(&view.options))
}

pub fn new_minor(view: &HostView, volume: &VolumeView) -> Line {
    let line = Line::setup(["new-minor", &view.resource, &volume.minor.to_string(), &volume.vnr.to_string()]);
    let diskless = volume.disk.is_none().then_some("--diskless");
    line.with(diskless).with(options(&volume.device_options))
}

/// The lines that attach a disk; each needs the one before.
pub fn attach(volume: &VolumeView) -> Vec<Line> {
    let (meta, index) = meta_device(volume);
    let disk = volume.disk.clone().unwrap_or_default();
    let attach = Line::setup(["attach".to_owned(), volume.minor.to_string(), disk, meta, index])
        .with(options(&volume.attach_options));
    vec![drbdmeta(volume, "repair-md"), drbdmeta(volume, "apply-al"), attach]
}

/// The lines that resize a device to `size`, or to what its disks have room for.
pub fn resize(volume: &VolumeView, size: Option<&str>) -> [Line; 2] {
    let minor = volume.minor.to_string();
    let resize = Line::setup(["resize", &minor]).with(size.map(|size| format!("--size={size}")));
    [resize, Line::setup(["check-resize", &minor])]
}

/// How long to wait for peers. A stacked resource waits for two attempts to connect only, unless it asks
/// for the timeouts (`spec/cli.md` §6).
pub fn startup(view: &HostView) -> Vec<String> {
    if view.stacked_on.is_none() || view.stacked_timeouts {
        return options(&view.startup);
    }
    let interval = view.peers.first().and_then(|peer| peer.net.value("connect-int"));
    let seconds = interval.and_then(|text| text.parse::<u64>().ok()).unwrap_or(10);
    vec!["--wfc-timeout".to_owned(), seconds.saturating_mul(2).to_string()]
}

pub fn new_peer(view: &HostView, peer: &PeerView) -> Line {
    connection("new-peer", view, peer)
        .with([format!("--_name={}", peer.connection_name)])
        .with(options(&peer.net))
}

pub fn net_options(view: &HostView, peer: &PeerView, defaults: bool) -> Line {
    let mut net = peer.net.clone();
    net.remove("transport");
    net.remove("load-balance-paths");
    connection("net-options", view, peer)
        .with(defaults.then_some("--set-defaults"))
        .with([format!("--_name={}", peer.connection_name)])
        .with(options(&net))
}

pub fn path(verb: &str, view: &HostView, peer: &PeerView, path: &PathView) -> Line {
    connection(verb, view, peer).with([path.own.to_string(), path.peer.to_string()])
}

/// `VERB RES NODE`
pub fn connection(verb: &str, view: &HostView, peer: &PeerView) -> Line {
    Line::setup([verb, &view.resource, &peer.node_id.to_string()])
}

/// `VERB RES NODE VOLUME`
pub fn peer_device(verb: &str, view: &HostView, peer: &PeerView, vnr: u32) -> Line {
    connection(verb, view, peer).with([vnr.to_string()])
}

/// What the engine runs on events.
pub fn handlers(view: &HostView, config_file: &str) -> Command {
    let mut node_names: BTreeMap<u8, String> = BTreeMap::new();
    let own = (view.node_id, view.host_names.first().cloned().unwrap_or_default());
    for (id, name) in view.peers.iter().map(|p| (p.node_id, p.host_name().to_owned())).chain([own]) {
        if let Ok(id) = u8::try_from(id) {
            node_names.insert(id, name);
        }
    }
    Command::Handlers {
        handlers: view.handlers.iter().map(|h| (h.name().to_owned(), h.value().to_owned())).collect(),
        config_file: config_file.to_owned(),
        node_names,
    }
}
