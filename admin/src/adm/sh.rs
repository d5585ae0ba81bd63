//! Commands for scripts and handlers, and dumps (`spec/cli.md` §7, §8). None of them changes anything but
//! through the text of a handler.

use std::process::{Command as Process, Stdio};

use palisade_conf::dump::DumpOptions;
use palisade_conf::{Config, HostIdentity};

use super::exec::Exec;
use super::objects::{self, Resolved, Target};
use super::request::Request;
use super::site::Site;
use super::{EXIT_FATAL, EXIT_USAGE, lines, usage, verbs};
use crate::cli::{Failure, command_line, print};

pub fn nop(_: &Site, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    Ok(0)
}

pub fn hidden_commands(_: &Site, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    print(&usage::hidden_commands());
    Ok(0)
}

pub fn dump(site: &Site, _: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    dump_as(Config::dump, Config::dump_resource, site, request)
}

pub fn dump_xml(site: &Site, _: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    dump_as(Config::dump_xml, Config::dump_xml_resource, site, request)
}

type DumpAll = fn(&Config, &HostIdentity, DumpOptions) -> Result<String, palisade_conf::Error>;
type DumpOne = fn(&Config, &str, &HostIdentity, DumpOptions) -> Result<String, palisade_conf::Error>;

fn dump_as(all: DumpAll, one: DumpOne, site: &Site, request: &Request) -> Result<i32, Failure> {
    let options = DumpOptions { expanded: request.verbose > 0 };
    let invalid = |e: palisade_conf::Error| Failure::new(i32::from(e.exit_code()), e.to_string());
    if request.objects.is_empty() || request.objects.iter().any(|o| o == "all") {
        print(&all(&site.config, &site.host, options).map_err(invalid)?);
        return Ok(0);
    }
    let mut code = 0;
    for text in &request.objects {
        match resource_of(site, request, text) {
            Ok(name) => print(&one(&site.config, &name, &site.host, options).map_err(invalid)?),
            Err(failure) => code = code.max(failure.report()),
        }
    }
    Ok(code)
}

/// The resource an object of a dump is about. A name says enough, also where nothing else can be made of
/// the resource.
fn resource_of(site: &Site, request: &Request, text: &str) -> Result<String, Failure> {
    if site.config.resource(text).is_some() {
        return Ok(text.to_owned());
    }
    let Some(verb) = verbs::find(&request.verb) else { return Err(objects::unknown(site, text)) };
    let mut found = Resolved::default();
    objects::add_named(verb, site, text, &mut found)?;
    let target = found.targets.first().ok_or_else(|| objects::unknown(site, text))?;
    Ok(target.view.resource.clone())
}

pub fn resources(site: &Site, _: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let mut names = Vec::new();
    for resource in site.config.resources() {
        if !resource.is_ignored(&site.host) && resource.is_stacked() == request.stacked {
            names.push(resource.name.clone());
        }
    }
    print(&names.iter().map(|n| format!("{n}\n")).collect::<String>());
    Ok(0)
}

/// `minor_count=N`: configured, else the number of minors and three more, 32 to 255.
pub fn mod_parms(site: &Site, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    const SPARE: usize = 3;
    let configured = site.config.global.as_ref().and_then(|g| g.options.value("minor-count"));
    let count = configured.map_or_else(
        || {
            let mine = site.config.resources().iter().filter_map(|r| r.view_as(&site.host).ok());
            let minors: usize = mine.map(|v| v.volumes.len()).sum();
            (minors + SPARE).clamp(32, 255).to_string()
        },
        str::to_owned,
    );
    print(&format!("minor_count={count}\n"));
    Ok(0)
}

pub fn resource(target: &Target, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    print(&format!("{}\n", target.view.resource));
    Ok(0)
}

/// `FILE:LINE:RESOURCE`
pub fn config_file(target: &Target, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    print(&format!("{}:{}\n", target.view.at, target.view.resource));
    Ok(0)
}

/// The resource a stacked one lies on.
pub fn lr_of(target: &Target, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    match &target.view.stacked_on {
        Some(lower) => {
            print(&format!("{lower}\n"));
            Ok(0)
        }
        None => Err(Failure::new(EXIT_USAGE, "sh-lower-resource only available in stacked mode")),
    }
}

/// Prints a word about each volume.
fn about_volume(target: &Target, word: impl FnOnce(&palisade_conf::view::VolumeView) -> String) -> i32 {
    if let Some(volume) = &target.volume {
        print(&format!("{}\n", word(volume)));
    }
    0
}

pub fn dev(target: &Target, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    Ok(about_volume(target, |v| format!("/dev/drbd{}", v.minor)))
}

pub fn minor(target: &Target, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    Ok(about_volume(target, |v| v.minor.to_string()))
}

pub fn ll_dev(target: &Target, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    Ok(about_volume(target, |v| v.disk.clone().unwrap_or_else(|| "none".to_owned())))
}

pub fn md_dev(target: &Target, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    Ok(about_volume(target, |v| lines::meta_device(v).0))
}

pub fn md_idx(target: &Target, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    Ok(about_volume(target, |v| lines::meta_device(v).1))
}

pub fn ip(target: &Target, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    if let Some(path) = &target.path {
        print(&format!("{}\n", path.own.host));
    }
    Ok(0)
}

/// The links udev makes.
pub fn udev(target: &Target, _: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    let Some(volume) = &target.volume else { return Ok(0) };
    let name = &target.view.resource;
    let link = if volume.has_numbered_link {
        format!("drbd/by-res/{name}/{}", volume.vnr)
    } else {
        format!("drbd/by-res/{name}")
    };
    let device = volume.device.strip_prefix("/dev/").unwrap_or(&volume.device);
    let mut text = format!("DEVICE={device}\nSYMLINK={link}\nSYMLINK_BY_RES={link}\n");
    if let Some(disk) = &volume.disk {
        let disk = disk.strip_prefix("/dev/").unwrap_or(disk);
        text.push_str(&format!("SYMLINK_BY_DISK=drbd/by-disk/{disk}\n"));
    }
    print(&text);
    Ok(0)
}

/// A handler by name: runs its text as the engine would.
pub fn handler(target: &Target, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let view = &target.view;
    let Some(text) = view.handlers.value(&request.verb) else { return Ok(0) };
    if exec.dry_run() || request.verbose > 0 {
        let words = ["/bin/sh".to_owned(), "-c".to_owned(), text.to_owned()];
        exec.show(&view.resource, &command_line(&words));
    }
    if exec.dry_run() {
        return Ok(0);
    }
    let volumes: Vec<_> =
        view.volumes.iter().filter(|v| target.named_volume.is_none_or(|n| n == v.vnr)).collect();
    let joined = |word: &dyn Fn(&palisade_conf::view::VolumeView) -> String| {
        volumes.iter().map(|v| word(v)).collect::<Vec<_>>().join(" ")
    };
    let mut process = Process::new("/bin/sh");
    process
        .args(["-c", text])
        .env("DRBD_CONF", request.config_file.as_deref().unwrap_or("/etc/drbd.conf"))
        .env("DRBD_RESOURCE", &view.resource)
        .env("DRBD_MINOR", joined(&|v| v.minor.to_string()))
        .env("DRBD_VOLUME", joined(&|v| v.vnr.to_string()))
        .env("DRBD_LL_DISK", joined(&|v| v.disk.clone().unwrap_or_else(|| "none".to_owned())))
        .env("DRBD_MY_NODE_ID", view.node_id.to_string())
        .env(format!("DRBD_NODE_ID_{}", view.node_id), view.host_names.join(" "));
    for peer in &view.peers {
        process.env(format!("DRBD_NODE_ID_{}", peer.node_id), peer.host_name());
    }
    match process.stdin(Stdio::inherit()).status() {
        Ok(status) => Ok(status.code().unwrap_or(EXIT_FATAL)),
        Err(e) => Err(Failure::new(EXIT_FATAL, format!("Cannot run /bin/sh: {e}."))),
    }
}
