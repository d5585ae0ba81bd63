//! Commands on metadata: `create-md` and those that fall back from the engine to the disk.

use std::io::Read as _;

use super::exec::{Exec, Line};
use super::objects::Target;
use super::request::Request;
use super::{EXIT_FATAL, lines};
use crate::cli::Failure;
use crate::meta;

/// Results of the engine that are an answer, not a reason to look at the disk.
const EXIT_REFUSED: i32 = 11;
const EXIT_NEEDED: i32 = 17;
const EXIT_LOWER: i32 = 5;

pub fn create_md(target: &Target, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let Some(volume) = &target.volume else { return Ok(0) };
    let diskful: Vec<u32> = target
        .view
        .peers
        .iter()
        .filter(|p| p.volumes.iter().any(|v| !v.diskless))
        .map(|p| p.node_id)
        .collect();
    let max_peers = match request.scanned.flag("max-peers") {
        Some(text) => text.to_owned(),
        None => diskful.len().max(1).to_string(),
    };
    let mut extra: Vec<String> =
        request.extra.iter().filter(|o| !o.starts_with("--max-peers")).cloned().collect();
    if request.scanned.flag("effective-size").is_some() && request.scanned.flag("diskful-peers").is_none() {
        let ids: Vec<String> = diskful.iter().map(u32::to_string).collect();
        extra.push(format!("--diskful-peers={}", ids.join(",")));
    }
    let line = lines::drbdmeta(volume, "create-md").with([max_peers]).with(extra);
    let code = exec.run(&target.view.resource, &line);
    if code == 0 && !exec.dry_run() && request.drbdmeta.is_none() {
        identify(volume, exec, &target.view.resource)?;
    }
    Ok(code)
}

/// Gives fresh metadata a device UUID.
fn identify(
    volume: &palisade_conf::view::VolumeView,
    exec: &Exec<'_>,
    resource: &str,
) -> Result<(), Failure> {
    let read = lines::drbdmeta(volume, "read-dev-uuid");
    if meta::device_uuid(&read.args)?.is_some_and(|uuid| uuid != 0) {
        return Ok(());
    }
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .map_err(|e| Failure::new(EXIT_FATAL, format!("Cannot read /dev/urandom: {e}.")))?;
    let uuid = format!("{:016X}", u64::from_ne_bytes(bytes));
    exec.run(resource, &lines::drbdmeta(volume, "write-dev-uuid").with([uuid]));
    Ok(())
}

/// Runs `first`; if that fails, `second`. A dry run shows both.
fn or_else(exec: &Exec<'_>, resource: &str, first: &Line, second: Option<&Line>, final_codes: &[i32]) -> i32 {
    let code = exec.run_quietly(resource, first);
    let Some(second) = second else { return code };
    if exec.dry_run() || (code != 0 && !final_codes.contains(&code)) {
        let fallback = exec.run(resource, second);
        return if fallback != 0 && code == EXIT_LOWER { code } else { fallback };
    }
    code
}

pub fn invalidate(target: &Target, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let Some(volume) = &target.volume else { return Ok(0) };
    let from = target.peer.as_ref().map(|p| format!("--sync-from-peer-node-id={}", p.node_id));
    let forced: Vec<String> = request.extra.iter().filter(|o| o.as_str() == "--force").cloned().collect();
    let others = request.extra.iter().filter(|o| o.as_str() != "--force").cloned();
    let first = Line::setup(["invalidate", &volume.minor.to_string()]).with(from).with(others);
    let second = lines::drbdmeta(volume, "invalidate").with(forced);
    let codes = [EXIT_REFUSED, EXIT_NEEDED];
    Ok(or_else(exec, &target.view.resource, &first, Some(&second), &codes))
}

pub fn outdate(target: &Target, exec: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    let Some(volume) = &target.volume else { return Ok(0) };
    let first = Line::setup(["outdate", &volume.minor.to_string()]);
    let second = volume.disk.as_ref().map(|_| lines::drbdmeta(volume, "outdate"));
    Ok(or_else(exec, &target.view.resource, &first, second.as_ref(), &[EXIT_NEEDED]))
}

pub fn dstate(target: &Target, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let Some(volume) = &target.volume else { return Ok(0) };
    let first = Line::setup(["dstate", &volume.minor.to_string()]);
    let second = volume.disk.as_ref().map(|_| lines::drbdmeta(volume, "dstate").with(request.extra.clone()));
    Ok(or_else(exec, &target.view.resource, &first, second.as_ref(), &[]))
}

/// `show-gi` and `get-gi`.
pub fn generation(target: &Target, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let (Some(volume), Some(peer)) = (&target.volume, &target.peer) else { return Ok(0) };
    let first = lines::peer_device(&request.verb, &target.view, peer, volume.vnr);
    let second = lines::drbdmeta_node(volume, peer.node_id, &request.verb).with(request.extra.clone());
    Ok(or_else(exec, &target.view.resource, &first, Some(&second), &[]))
}

pub fn forget_peer(target: &Target, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let Some(peer) = &target.peer else { return Ok(0) };
    let name = &target.view.resource;
    let first = lines::connection("forget-peer", &target.view, peer);
    let code = exec.run_quietly(name, &first);
    if !exec.dry_run() && (code == 0 || [EXIT_REFUSED, EXIT_NEEDED].contains(&code)) {
        return Ok(code);
    }
    let mut worst = 0;
    for volume in target.view.volumes.iter().filter(|v| v.disk.is_some()) {
        let line = lines::drbdmeta_node(volume, peer.node_id, "forget-peer").with(request.extra.clone());
        worst = worst.max(exec.run(name, &line));
    }
    Ok(worst)
}

/// As `resize`, without complaint; then what the disk knows about its size is brought up to date.
pub fn check_resize(target: &Target, exec: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    let Some(volume) = &target.volume else { return Ok(0) };
    let name = &target.view.resource;
    let size = volume.attach_options.value("size");
    let codes = lines::resize(volume, size).map(|line| exec.run_quietly(name, &line));
    if codes.iter().all(|code| *code == 0) || volume.disk.is_none() {
        return Ok(codes.into_iter().max().unwrap_or(0));
    }
    Ok(exec.run(name, &lines::drbdmeta(volume, "check-resize")))
}

/// `dump-superblock`: JSON unless another format is asked for.
pub fn dump_superblock(target: &Target, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let Some(volume) = &target.volume else { return Ok(0) };
    let format = request.scanned.flag("output-format").is_none().then_some("--output-format=json");
    let line = lines::drbdmeta(volume, &request.verb).with(format).with(request.extra.clone());
    Ok(exec.run(&target.view.resource, &line))
}

/// `dump-md`, `wipe-md`, `apply-al`, `repair-md`.
pub fn plain(target: &Target, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let Some(volume) = &target.volume else { return Ok(0) };
    let line = lines::drbdmeta(volume, &request.verb).with(request.extra.clone());
    Ok(exec.run(&target.view.resource, &line))
}

pub fn set_gi(target: &Target, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let Some(volume) = &target.volume else { return Ok(0) };
    let node_id = target.peer.as_ref().map_or(target.view.node_id, |p| p.node_id);
    let line = lines::drbdmeta_node(volume, node_id, "set-gi")
        .with(request.words.clone())
        .with(request.extra.clone());
    Ok(exec.run(&target.view.resource, &line))
}
