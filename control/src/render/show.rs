//! `drbdsetup show` (`spec/cli.md` §14).

use std::fmt::Write as _;

use palisade_conf::options::{self, Canonical, Class, Kind, Unit};
use serde_json::{Map, Value, json};

use crate::{MetaIndex, Options, RunningBacking, RunningConnection, RunningResource, RunningVolume};

/// The text of these resources in configuration syntax.
#[must_use]
pub fn show(resources: &[RunningResource], defaults: bool) -> String {
    if resources.is_empty() {
        return "# No currently configured DRBD found.\n".to_owned();
    }
    let mut w = Writer { out: String::new(), level: 0, defaults };
    for resource in resources {
        w.resource(resource);
        w.out.push('\n');
    }
    w.out
}

struct Writer {
    out: String,
    level: usize,
    defaults: bool,
}

impl Writer {
    fn line(&mut self, text: &str) {
        let _ = writeln!(self.out, "{:width$}{text}", "", width = self.level * 4);
    }

    fn block(&mut self, head: &str, body: impl FnOnce(&mut Self)) {
        self.line(&format!("{head} {{"));
        self.level += 1;
        body(self);
        self.level -= 1;
        self.line("}");
    }

    /// A section that is left out when it has nothing to say.
    fn section(&mut self, head: &str, body: impl FnOnce(&mut Self)) {
        let before = self.out.len();
        self.line(&format!("{head} {{"));
        let inside = self.out.len();
        self.level += 1;
        body(self);
        self.level -= 1;
        if self.out.len() == inside {
            self.out.truncate(before);
        } else {
            self.line("}");
        }
    }

    fn options(&mut self, class: Class, values: &Options) {
        for spec in options::of(class).filter(|s| !s.name.starts_with('_') && s.name != "diskless") {
            if class == Class::Attach && spec.name == "bitmap" {
                continue;
            }
            let default = spec.default().to_string();
            let value = values.get(spec.name).unwrap_or(&default);
            let is_default = value == default;
            if is_default && !self.defaults {
                continue;
            }
            let unit = match spec.kind {
                Kind::Number { unit, .. } => unit_note(unit),
                _ => "",
            };
            let mut note = String::new();
            if !unit.is_empty() {
                let _ = write!(note, " # {unit}");
            }
            if is_default {
                note.push_str(if unit.is_empty() { " # default" } else { ", default" });
            }
            let shown = with_suffix(&spec.kind, value);
            self.line(&format!("{:<16}\t{shown};{note}", spec.name));
        }
    }

    fn resource(&mut self, r: &RunningResource) {
        self.block(&format!("resource \"{}\"", r.name), |w| {
            w.section("options", |w| w.options(Class::Resource, &r.options));
            w.block("_this_host", |w| {
                if r.node_id >= 0 {
                    w.line(&format!("node-id\t\t\t{};", r.node_id));
                }
                for volume in &r.volumes {
                    w.volume(volume);
                }
            });
            for connection in &r.connections {
                w.connection(connection);
            }
        });
    }

    fn volume(&mut self, v: &RunningVolume) {
        self.block(&format!("volume {}", v.volume), |w| {
            w.line(&format!("device\t\t\tminor {};", v.minor));
            match &v.backing {
                Some(b) => {
                    w.line(&format!("disk\t\t\t\"{}\";", b.disk));
                    w.line(&format!("meta-disk\t\t\t{};", meta_disk(b)));
                }
                None if v.client => w.line("disk\t\t\tnone;"),
                None => {}
            }
            w.section("disk", |w| {
                if let Some(b) = &v.backing {
                    w.options(Class::Attach, &b.options);
                }
                w.options(Class::Device, &v.device_options);
            });
        });
    }

    fn connection(&mut self, c: &RunningConnection) {
        self.block("connection", |w| {
            w.line(&format!("_peer_node_id {};", c.peer_node_id));
            for path in &c.paths {
                w.block("path", |w| {
                    let end = |e: &crate::Endpoint| format!("{} {}", e.family.as_str(), e.host_port());
                    w.line(&format!("_this_host {};", end(&path.local)));
                    w.line(&format!("_remote_host {};", end(&path.remote)));
                });
            }
            w.line(&format!("_cstate {};", c.connection_state));
            w.section("net", |w| {
                w.options(Class::Net, &c.options);
                if !c.name.is_empty() {
                    w.line(&format!("{:<16}\t\"{}\";", "_name", c.name));
                }
            });
            for peer_device in &c.peer_devices {
                w.section(&format!("volume {}", peer_device.volume), |w| {
                    w.section("disk", |w| w.options(Class::PeerDevice, &peer_device.options));
                });
            }
        });
    }
}

fn meta_disk(b: &RunningBacking) -> String {
    match b.meta_index {
        MetaIndex::Internal => "internal".to_owned(),
        MetaIndex::FlexExternal => format!("\"{}\"", b.meta_disk),
        MetaIndex::Index(n) => format!("\"{}\" [ {n} ]", b.meta_disk),
    }
}

fn unit_note(unit: Unit) -> &'static str {
    match unit {
        Unit::Plain => "",
        Unit::Deciseconds => "1/10 seconds",
        Unit::Seconds => "seconds",
        Unit::Milliseconds => "milliseconds",
        Unit::Bytes | Unit::Sectors => "bytes",
        Unit::KibPerSecond => "bytes/second",
        Unit::Nodes => "nodes",
    }
}

/// Numbers whose base unit is not the documented one carry the suffix; texts are quoted.
fn with_suffix(kind: &Kind, value: &str) -> String {
    match kind {
        Kind::Number { unit: Unit::Sectors, .. } => format!("{value}s"),
        Kind::Number { unit: Unit::KibPerSecond, .. } => format!("{value}k"),
        Kind::Text { .. } => format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"")),
        _ => value.to_owned(),
    }
}

/// `show --json`: booleans as such, everything else as strings; defaults included.
#[must_use]
pub fn show_json(resources: &[RunningResource]) -> String {
    let all: Vec<Value> = resources.iter().map(resource_json).collect();
    let mut text = serde_json::to_string_pretty(&all).unwrap_or_default();
    text.push('\n');
    text
}

fn options_json(classes: &[Class], values: &[&Options]) -> Value {
    let mut map = Map::new();
    for (class, values) in classes.iter().zip(values) {
        for spec in options::of(*class).filter(|s| !s.name.starts_with('_') && s.name != "diskless") {
            let default = spec.default();
            let value = match (values.get(spec.name), default) {
                (Some(v), Canonical::Bool(_)) => Value::Bool(v == "yes"),
                (None, Canonical::Bool(b)) => Value::Bool(b),
                (Some(v), _) => Value::String(json_text(&spec.kind, v)),
                (None, default) => Value::String(json_text(&spec.kind, &default.to_string())),
            };
            map.insert(spec.name.to_owned(), value);
        }
    }
    Value::Object(map)
}

fn json_text(kind: &Kind, value: &str) -> String {
    if matches!(kind, Kind::Text { .. }) { value.to_owned() } else { with_suffix(kind, value) }
}

fn resource_json(r: &RunningResource) -> Value {
    let volumes: Vec<Value> = r
        .volumes
        .iter()
        .map(|v| {
            let mut o = json!({ "volume_nr": v.volume, "device_minor": v.minor });
            if let Value::Object(map) = &mut o {
                match &v.backing {
                    Some(b) => {
                        map.insert("backing-disk".into(), json!(b.disk));
                        map.insert(
                            "meta-disk".into(),
                            json!(if b.meta_index == MetaIndex::Internal {
                                "internal"
                            } else {
                                &b.meta_disk
                            }),
                        );
                        if let MetaIndex::Index(n) = b.meta_index {
                            map.insert("meta-disk-index".into(), json!(n.to_string()));
                        }
                    }
                    None => {
                        map.insert("disk".into(), json!("none"));
                    }
                }
                if let Some(b) = &v.backing {
                    map.insert(
                        "disk".into(),
                        options_json(&[Class::Attach, Class::Device], &[&b.options, &v.device_options]),
                    );
                }
            }
            o
        })
        .collect();
    let connections: Vec<Value> = r
        .connections
        .iter()
        .map(|c| {
            let paths: Vec<Value> = c
                .paths
                .iter()
                .map(|p| {
                    let end = |e: &crate::Endpoint| format!("{} {}", e.family.as_str(), e.host_port());
                    json!({ "this_host": end(&p.local), "remote_host": end(&p.remote) })
                })
                .collect();
            let peer_devices: Vec<Value> = c
                .peer_devices
                .iter()
                .map(|p| {
                    json!({
                        "volume_nr": p.volume,
                        "disk": options_json(&[Class::PeerDevice], &[&p.options]),
                    })
                })
                .collect();
            let mut net = options_json(&[Class::Net], &[&c.options]);
            if let Value::Object(map) = &mut net {
                map.insert("_name".into(), json!(c.name));
            }
            json!({
                "paths": paths,
                "_is_standalone": c.connection_state == crate::ConnectionState::StandAlone,
                "_cstate": c.connection_state.as_str(),
                "net": net,
                "volumes": peer_devices,
                "_peer_node_id": c.peer_node_id,
            })
        })
        .collect();
    json!({
        "resource": r.name,
        "options": options_json(&[Class::Resource], &[&r.options]),
        "_this_host": { "node-id": r.node_id.to_string(), "volumes": volumes },
        "connections": connections,
    })
}
