//! The commands that stand for one line, or for a few that follow from their target. They plan lines and
//! hand them to [`Exec`]; what a command is called and what it accepts is the table's business.

use super::exec::{Exec, Line};
use super::objects::Target;
use super::request::Request;
use super::site::Site;
use super::{bring_up, lines};
use crate::cli::Failure;

fn with_extra(line: Line, request: &Request) -> Line {
    line.with(request.extra.clone())
}

/// `VERB RES {options}`
pub fn on_resource(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    Ok(x.run(&t.view.resource, &with_extra(Line::setup([&r.verb, &t.view.resource]), r)))
}

/// `VERB MINOR {options}`
pub fn on_minor(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let Some(v) = &t.volume else { return Ok(0) };
    Ok(x.run(&t.view.resource, &with_extra(Line::setup([r.verb.clone(), v.minor.to_string()]), r)))
}

/// `VERB RES NODE {options}`
pub fn on_connection(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let Some(p) = &t.peer else { return Ok(0) };
    Ok(x.run(&t.view.resource, &with_extra(lines::connection(&r.verb, &t.view, p), r)))
}

/// `VERB RES NODE OWN PEER`
pub fn on_path(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let (Some(p), Some(path)) = (&t.peer, &t.path) else { return Ok(0) };
    Ok(x.run(&t.view.resource, &lines::path(&r.verb, &t.view, p, path)))
}

/// `VERB RES NODE VOLUME {options}`
pub fn on_peer_device(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let (Some(v), Some(p)) = (&t.volume, &t.peer) else { return Ok(0) };
    Ok(x.run(&t.view.resource, &with_extra(lines::peer_device(&r.verb, &t.view, p, v.vnr), r)))
}

pub fn attach(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let Some(v) = &t.volume else { return Ok(0) };
    let mut chain = lines::attach(v);
    if let Some(last) = chain.pop() {
        chain.push(with_extra(last, r));
    }
    Ok(bring_up::chain(&t.view.resource, &chain, x))
}

pub fn disk_options(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let Some(v) = &t.volume else { return Ok(0) };
    let line = Line::setup(["disk-options", &v.minor.to_string()]).with(lines::options(&v.attach_options));
    Ok(x.run(&t.view.resource, &with_extra(line, r)))
}

pub fn new_peer(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let Some(p) = &t.peer else { return Ok(0) };
    Ok(x.run(&t.view.resource, &with_extra(lines::new_peer(&t.view, p), r)))
}

pub fn net_options(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let Some(p) = &t.peer else { return Ok(0) };
    Ok(x.run(&t.view.resource, &with_extra(lines::net_options(&t.view, p, false), r)))
}

pub fn new_resource(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let name = &t.view.resource;
    let code = x.run(name, &with_extra(lines::new_resource(&t.view), r));
    if code != 0 {
        return Ok(code);
    }
    let file = r.config_file.as_deref().unwrap_or_default();
    Ok(x.tell_handlers(name, lines::handlers(&t.view, file)))
}

pub fn new_minor(t: &Target, x: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    let Some(v) = &t.volume else { return Ok(0) };
    Ok(x.run(&t.view.resource, &lines::new_minor(&t.view, v)))
}

pub fn peer_device_options(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let (Some(v), Some(p)) = (&t.volume, &t.peer) else { return Ok(0) };
    let set = p.volumes.iter().find(|pv| pv.vnr == v.vnr).map(|pv| lines::options(&pv.options));
    let line = lines::peer_device("peer-device-options", &t.view, p, v.vnr).with(set.unwrap_or_default());
    Ok(x.run(&t.view.resource, &with_extra(line, r)))
}

pub fn role(t: &Target, x: &Exec<'_>, _: &Request) -> Result<i32, Failure> {
    let line = match &t.peer {
        Some(p) => lines::connection("peer-role", &t.view, p),
        None => Line::setup(["role", &t.view.resource]),
    };
    Ok(x.run(&t.view.resource, &line))
}

pub fn resize(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let Some(v) = &t.volume else { return Ok(0) };
    let configured = v.attach_options.value("size").filter(|_| r.scanned.flag("size").is_none());
    let [resize, check] = lines::resize(v, configured);
    Ok(bring_up::chain(&t.view.resource, &[with_extra(resize, r), check], x))
}

/// On a whole resource, one connection or one peer device, as named.
pub fn wait(t: &Target, x: &Exec<'_>, r: &Request) -> Result<i32, Failure> {
    let name = &t.view.resource;
    let line = match (&t.peer, t.named_volume) {
        (Some(p), Some(vnr)) => lines::peer_device(&format!("{}-volume", r.verb), &t.view, p, vnr),
        (Some(p), None) => lines::connection(&format!("{}-connection", r.verb), &t.view, p),
        (None, _) => Line::setup([format!("{}-resource", r.verb), name.clone()]),
    };
    let mut startup = lines::startup(&t.view);
    for (option, _) in r.scanned.options.iter() {
        startup.retain(|word| !word.starts_with(&format!("--{option}=")));
    }
    Ok(x.run(name, &with_extra(line.with(startup), r)))
}

pub fn status(_: &Site, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let verbose = std::iter::repeat_n("--verbose".to_owned(), request.verbose);
    let names: Vec<Option<String>> = if request.objects.is_empty() {
        vec![None]
    } else {
        request.objects.iter().map(|n| Some(n.clone()).filter(|n| n != "all")).collect()
    };
    let mut worst = 0;
    for name in names {
        let line = Line::setup(["status"]).with(name).with(verbose.clone()).with(request.extra.clone());
        // `-v` asks for more about the resources here, not for the line.
        worst = worst.max(if exec.dry_run() { exec.run("all", &line) } else { exec.run_unshown(&line) });
    }
    Ok(worst)
}

pub fn events(_: &Site, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let line = Line::setup(["events2"]).with(request.objects.clone()).with(request.extra.clone());
    Ok(exec.run("all", &line))
}
