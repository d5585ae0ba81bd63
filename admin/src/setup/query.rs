//! The verbs that only look.

use std::io::{IsTerminal, Seek, SeekFrom};

use palisade_control::render::{TextOptions, show as show_text, show_json, status_json, status_text};
use palisade_control::{
    Command, ConnectionStatus, GenerationInfo, MetaIndex, Payload, ResourceStatus, RunningResource,
    running_resources,
};

use super::verbs::node_id;
use super::{Call, EXIT_NOT_FOUND, EXIT_USAGE, ask, hand_over, resource_of_minor};
use crate::cli::{Failure, print};
use crate::engines::{self, QUERY_LIMIT, Server};
use crate::system;

/// The state of a named resource of ours, or the reference's "not found".
fn status_of(name: &str, not_found: &str) -> Result<ResourceStatus, Failure> {
    palisade_control::bundled_status(name, QUERY_LIMIT)
        .map_err(|e| Failure::new(EXIT_USAGE, format!("{e}.")))?
        .ok_or_else(|| Failure::new(EXIT_NOT_FOUND, format!("{name}: {not_found}")))
}

pub fn role(c: &Call<'_>) -> Result<i32, Failure> {
    if let Server::Kernel(kernel) = engines::server_of(c.word(0))? {
        return hand_over(&kernel, c.args);
    }
    print(&format!("{}\n", status_of(c.word(0), "Unknown resource")?.role));
    Ok(0)
}

fn connection(c: &Call<'_>, show: fn(&ConnectionStatus) -> String) -> Result<i32, Failure> {
    let name = c.word(0);
    if let Server::Kernel(kernel) = engines::server_of(name)? {
        return hand_over(&kernel, c.args);
    }
    let id = node_id(c.word(1))?;
    let status = status_of(name, "No such connection")?;
    let found = status
        .connection(i32::from(id))
        .ok_or_else(|| Failure::new(EXIT_NOT_FOUND, format!("{name}: No such connection")))?;
    print(&format!("{}\n", show(found)));
    Ok(0)
}

pub fn peer_role(c: &Call<'_>) -> Result<i32, Failure> {
    connection(c, |c| c.peer_role.to_string())
}

pub fn cstate(c: &Call<'_>) -> Result<i32, Failure> {
    connection(c, |c| c.connection_state.to_string())
}

/// `LOCAL/PEER/PEER...`
pub fn dstate(c: &Call<'_>) -> Result<i32, Failure> {
    let minor = c.minor(0)?;
    if let Server::Kernel(kernel) = engines::server_of_minor(minor)? {
        return hand_over(&kernel, c.args);
    }
    print(&format!("{}\n", dstate_of(minor)?));
    Ok(0)
}

/// The disk states of a minor of ours, own one first.
pub fn dstate_of(minor: u32) -> Result<String, Failure> {
    let not_found = || Failure::new(EXIT_NOT_FOUND, format!("{minor}: No such device"));
    let (name, volume) = engines::owner_of_minor(minor)?.ok_or_else(not_found)?;
    let status = status_of(&name, "Unknown resource")?;
    let own = status.device(volume).ok_or_else(not_found)?;
    let mut states = vec![own.disk_state.to_string()];
    let peers = status.connections.iter().flat_map(|c| &c.peer_devices).filter(|p| p.volume == volume);
    states.extend(peers.map(|p| p.peer_disk_state.to_string()));
    Ok(states.join("/"))
}

fn generation_info(c: &Call<'_>, show: fn(&GenerationInfo) -> String) -> Result<i32, Failure> {
    let name = c.word(0);
    if let Server::Kernel(kernel) = engines::server_of(name)? {
        return hand_over(&kernel, c.args);
    }
    let peer_node_id = node_id(c.word(1))?;
    let volume = c.number(2, "volume number")?;
    let status = status_of(name, "No such peer device")?;
    let known = status
        .connection(i32::from(peer_node_id))
        .is_some_and(|c| c.peer_devices.iter().any(|p| p.volume == volume));
    if !known {
        return Err(Failure::new(EXIT_NOT_FOUND, format!("{name}: No such peer device")));
    }
    if status.device(volume).is_some_and(|d| d.disk_state < palisade_control::DiskState::Negotiating) {
        return Err(Failure::new(1, "Device has no disk"));
    }
    match ask(name, name, &Command::GetGi { peer_node_id, volume })? {
        Payload::GenerationInfo(gi) => print(&show(&gi)),
        other => return Err(Failure::new(EXIT_USAGE, format!("{name}: unexpected answer {other:?}"))),
    }
    Ok(0)
}

pub fn get_gi(c: &Call<'_>) -> Result<i32, Failure> {
    generation_info(c, |gi| format!("{}\n", gi.line()))
}

pub fn show_gi(c: &Call<'_>) -> Result<i32, Failure> {
    generation_info(c, GenerationInfo::explained)
}

/// The running configuration of a resource of ours.
pub fn running(name: &str) -> Result<RunningResource, Failure> {
    match ask(name, name, &Command::Show)? {
        Payload::Running(running) => Ok(running),
        other => Err(Failure::new(EXIT_USAGE, format!("{name}: unexpected answer {other:?}"))),
    }
}

pub fn show(c: &Call<'_>) -> Result<i32, Failure> {
    let wanted = c.scanned.words.first().filter(|w| *w != "all");
    let mut all = Vec::new();
    match wanted {
        Some(name) => {
            if let Server::Kernel(kernel) = engines::server_of(name)? {
                return hand_over(&kernel, c.args);
            }
            if engines::connect(name).is_err() {
                return Err(Failure::new(EXIT_NOT_FOUND, format!("{name}: No such resource")));
            }
            all.push(running(name)?);
        }
        None => {
            engines::refuse_nesting()?;
            let names = running_resources()
                .map_err(|e| Failure::new(EXIT_USAGE, format!("Cannot list the engines: {e}.")))?;
            for name in names.iter().filter(|n| engines::connect(n).is_ok()) {
                all.push(running(name)?);
            }
            if let Some(kernel) = engines::loaded_kernel()? {
                let code = hand_over(&kernel, c.args)?;
                if all.is_empty() {
                    return Ok(code);
                }
            }
        }
    }
    let text = if c.scanned.is_set("json") {
        show_json(&all)
    } else {
        show_text(&all, c.scanned.is_set("show-defaults"))
    };
    print(&text);
    Ok(0)
}

pub fn status(c: &Call<'_>) -> Result<i32, Failure> {
    let wanted = c.scanned.words.first().filter(|w| *w != "all");
    if let Some(name) = wanted
        && let Server::Kernel(kernel) = engines::server_of(name)?
    {
        return hand_over(&kernel, c.args);
    }
    engines::refuse_nesting()?;
    let mut all = match wanted {
        Some(name) => palisade_control::bundled_status(name, QUERY_LIMIT)
            .map_err(|e| Failure::new(EXIT_USAGE, format!("{e}.")))?
            .into_iter()
            .collect(),
        None => palisade_control::all_status(QUERY_LIMIT)
            .map_err(|e| Failure::new(EXIT_USAGE, format!("{e}.")))?,
    };
    for resource in &mut all {
        resource.sort();
    }
    let missing = wanted.filter(|_| all.is_empty());
    if c.scanned.is_set("json") {
        print(&status_json(&all));
    } else if missing.is_none() {
        let terminal = std::io::stdout().is_terminal();
        let color = match c.scanned.flag("color") {
            None | Some("auto") => terminal,
            Some("" | "always") => true,
            Some("never") => false,
            Some(other) => {
                return Err(Failure::new(EXIT_USAGE, format!("Option --color: invalid argument '{other}'")));
            }
        };
        let options = TextOptions {
            verbose: u8::try_from(c.scanned.count("verbose")).unwrap_or(u8::MAX),
            statistics: c.scanned.is_set("statistics"),
            columns: system::columns(),
            terminal,
            color,
        };
        print(&status_text(&all, &options));
    }
    match missing {
        Some(name) => Err(Failure::new(EXIT_NOT_FOUND, format!("{name}: No such resource"))),
        None => Ok(0),
    }
}

/// Remembers where internal metadata is, so that it is found again when the device has grown while it was
/// not attached (`spec/metadata.md` §10.2).
pub fn check_resize(c: &Call<'_>) -> Result<i32, Failure> {
    let minor = c.minor(0)?;
    if let Server::Kernel(kernel) = engines::server_of_minor(minor)? {
        return hand_over(&kernel, c.args);
    }
    let (name, volume) = resource_of_minor(minor)?;
    let running = running(&name)?;
    let backing = running.volumes.iter().find(|v| v.volume == volume).and_then(|v| v.backing.as_ref());
    let Some(backing) = backing.filter(|b| b.meta_index == MetaIndex::Internal) else { return Ok(0) };
    let unreadable = |e: std::io::Error| Failure::new(1, format!("{}: {e}", backing.disk));
    let mut device = std::fs::File::open(&backing.disk).map_err(unreadable)?;
    let bytes = device.seek(SeekFrom::End(0)).map_err(unreadable)?;
    crate::meta::remember_location(minor, &backing.disk, bytes).map_err(|e| {
        Failure::new(1, format!("{minor}: cannot remember the size of {}: {e}", backing.disk))
    })?;
    Ok(0)
}
