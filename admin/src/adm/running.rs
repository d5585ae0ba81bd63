//! The running configuration: from the engine, or from a file in the format of `drbdsetup show`.

use palisade_conf::model::{EndpointName, Volume};
use palisade_conf::options::OptionList;
use palisade_conf::{Address, Config, MetaDisk, Resource};
use palisade_control::{
    ConnectionState, Endpoint, MetaIndex, Options, RunningBacking, RunningConnection, RunningPath,
    RunningPeerDevice, RunningResource, RunningVolume,
};

use super::EXIT_FATAL;
use crate::cli::Failure;
use crate::{engines, setup};

/// What runs of a resource; `None` if nothing does.
pub fn running(resource: &str) -> Result<Option<RunningResource>, Failure> {
    if let Some(file) = std::env::var_os("FAKE_DRBDSETUP_SHOW") {
        return from_file(std::path::Path::new(&file), resource);
    }
    match engines::connect(resource) {
        Ok(_) => {}
        Err(palisade_control::ClientError::NotRunning { .. }) => return Ok(None),
        Err(e) => return Err(Failure::new(EXIT_FATAL, format!("{e}."))),
    }
    // An engine that was just started has no resource yet.
    Ok(Some(setup::running(resource)?).filter(|r| r.node_id >= 0))
}

fn from_file(file: &std::path::Path, resource: &str) -> Result<Option<RunningResource>, Failure> {
    let text = std::fs::read_to_string(file)
        .map_err(|e| Failure::new(EXIT_FATAL, format!("Cannot read {}: {e}.", file.display())))?;
    let all = Config::parse_running(&text).map_err(|e| Failure::new(EXIT_FATAL, e.to_string()))?;
    Ok(all.iter().find(|r| r.name == resource).map(convert))
}

fn convert(r: &Resource) -> RunningResource {
    let own = r.body.hosts.first();
    RunningResource {
        name: r.name.clone(),
        node_id: own.and_then(|h| h.node_id).and_then(|n| i32::try_from(n).ok()).unwrap_or(-1),
        options: canonical(&r.body.options),
        volumes: own.map(|h| h.volumes.iter().filter_map(volume).collect()).unwrap_or_default(),
        connections: r
            .body
            .connections
            .iter()
            .filter_map(|c| {
                Some(RunningConnection {
                    peer_node_id: u8::try_from(c.peer_node_id?).ok()?,
                    name: c.net.value("_name").unwrap_or_default().to_owned(),
                    connection_state: c
                        .cstate
                        .as_deref()
                        .and_then(|s| s.parse().ok())
                        .unwrap_or(ConnectionState::StandAlone),
                    paths: c.paths.iter().filter_map(path).collect(),
                    options: canonical(&c.net),
                    peer_devices: c
                        .volumes
                        .iter()
                        .filter_map(|v| {
                            let volume = u16::try_from(v.vnr).ok()?;
                            Some(RunningPeerDevice { volume, options: canonical(&v.options) })
                        })
                        .collect(),
                })
            })
            .collect(),
        handlers: std::collections::BTreeMap::new(),
    }
}

fn volume(v: &Volume) -> Option<RunningVolume> {
    let disk = v.disk.clone().filter(|_| !v.is_diskless());
    let backing = disk.map(|disk| {
        let (meta_disk, meta_index) = match &v.meta_disk {
            None | Some(MetaDisk::Internal) => (disk.clone(), MetaIndex::Internal),
            Some(MetaDisk::Flexible(device)) => (device.clone(), MetaIndex::FlexExternal),
            Some(MetaDisk::Indexed { device, index }) => {
                (device.clone(), MetaIndex::Index(u8::try_from(*index).unwrap_or(u8::MAX)))
            }
        };
        RunningBacking { disk, meta_disk, meta_index, options: canonical(&v.options.attach) }
    });
    Some(RunningVolume {
        volume: u16::try_from(v.vnr).ok()?,
        minor: v.minor?,
        client: v.disk.as_deref() == Some("none"),
        device_options: canonical(&v.options.device),
        backing,
    })
}

fn path(p: &palisade_conf::model::ConnectionPath) -> Option<RunningPath> {
    let end = |name: &EndpointName| {
        p.endpoints.iter().find(|e| e.name == *name).and_then(|e| e.address.as_ref()).and_then(endpoint)
    };
    Some(RunningPath { local: end(&EndpointName::This)?, remote: end(&EndpointName::Remote)? })
}

/// A configured address in binary form; `None` if it is a host name.
pub fn endpoint(address: &Address) -> Option<Endpoint> {
    address.to_string().parse().ok()
}

/// Options in base units, as the engine keeps them.
pub fn canonical(list: &OptionList) -> Options {
    list.iter().filter_map(|o| Some((o.name(), o.canonical().ok()?.to_string()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Printed by the reference; what it says about the connection's state is newer.
    #[test]
    fn show_is_read_and_printed_like_the_reference() {
        let recorded = include_str!("../../tests/golden/show-9.2.18.txt");
        let all: Vec<RunningResource> =
            Config::parse_running(recorded).unwrap().iter().map(convert).collect();
        let printed = palisade_control::render::show(&all, false);
        let printed: String =
            printed.split_inclusive('\n').filter(|l| !l.trim_start().starts_with("_cstate ")).collect();
        assert_eq!(printed, recorded);
        let json = palisade_control::render::show_json(&all);
        assert!(json.contains("\"resync-rate\": \"40960k\""), "{json}");
        assert!(json.contains("\"tcp-cork\": true"), "{json}");
    }
}
