//! `drbdadm dump`: the configuration as text, byte for byte as the reference prints it, including its
//! oddities (a lone `;` after endpoints named by address, stacked sections without volumes).

use std::fmt::Write as _;

use crate::error::{Error, Problem};
use crate::lexer::{is_bare_name, is_bare_word};
use crate::model::{
    Address, Body, Common, Config, Connection, DiskOptions, Endpoint, EndpointName, Global, Host, HostKind,
    MetaDisk, Proxy, ProxyOptions, Resource, Volume,
};
use crate::options::OptionList;
use crate::view::HostIdentity;

/// Which dump to make.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DumpOptions {
    /// Everything inherited and all connections explicit (`dump -v`).
    pub expanded: bool,
}

impl Config {
    /// The whole configuration as seen on `host`: head line, `global`, `common`, resources.
    ///
    /// # Errors
    /// What [`Resource::command_checks`] and [`Resource::check_address`] find in any resource, and what
    /// keeps a resource from being expanded.
    pub fn dump(&self, host: &HostIdentity, options: DumpOptions) -> Result<String, Error> {
        self.check_for_dump(host, options)?;
        let mut out = Dump::default();
        out.line(&format!("# {}", self.file()));
        if let Some(global) = &self.global {
            out.global(global, options.expanded);
        }
        if let Some(common) = &self.common {
            out.common(common);
        }
        for resource in &self.resources {
            out.resource(resource, host, options)?;
        }
        Ok(out.text)
    }

    /// One resource as seen on `host`.
    ///
    /// # Errors
    /// [`Problem::NotDefinedHere`] for an unknown or ignored resource, otherwise as for [`Config::dump`].
    pub fn dump_resource(
        &self,
        name: &str,
        host: &HostIdentity,
        options: DumpOptions,
    ) -> Result<String, Error> {
        let mut out = Dump::default();
        out.resource(self.resource_for_dump(name, host)?, host, options)?;
        Ok(out.text)
    }

    /// What keeps the whole configuration from being dumped, the addresses of this host included.
    pub(crate) fn check_for_dump(&self, host: &HostIdentity, options: DumpOptions) -> Result<(), Error> {
        let mut problems = Vec::new();
        let mut check = |result: Result<(), Error>| {
            problems.extend(result.err().iter().flat_map(Error::problems).cloned());
        };
        for resource in &self.resources {
            check(resource.command_checks(host));
            if options.expanded {
                check(resource.expanded.as_ref().map(|_| ()).map_err(Clone::clone));
            }
            if !self.ip_verification_disabled() {
                check(resource.check_address(host));
            }
        }
        Error::check(problems)
    }

    pub(crate) fn resource_for_dump(&self, name: &str, host: &HostIdentity) -> Result<&Resource, Error> {
        let missing = || Problem::NotDefinedHere { resource: name.to_owned() };
        let resource = self.resource(name).ok_or_else(missing)?;
        resource.command_checks(host)?;
        if resource.is_ignored(host) {
            return Err(missing().into());
        }
        if !self.ip_verification_disabled() {
            resource.check_address(host)?;
        }
        Ok(resource)
    }
}

#[derive(Default)]
struct Dump {
    text: String,
    indent: usize,
    expanded: bool,
}

/// A name or value, in quotes where the bare word would not survive.
pub(crate) fn quoted(text: &str) -> String {
    if is_bare_word(text) {
        return text.to_owned();
    }
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Like [`quoted`], for places where a keyword or a number would be misread. The reference leaves those
/// bare and then cannot read its own output.
fn quoted_name(text: &str) -> String {
    if is_bare_name(text) || !is_bare_word(text) { quoted(text) } else { format!("\"{text}\"") }
}

impl Dump {
    fn line(&mut self, text: &str) {
        let _ = writeln!(self.text, "{:indent$}{text}", "", indent = self.indent);
    }

    fn open(&mut self, head: &str) {
        self.line(&format!("{head} {{"));
        self.indent += 4;
    }

    fn close(&mut self) {
        self.indent = self.indent.saturating_sub(4);
        self.line("}");
    }

    /// `NAME    VALUE;`: the value starts at a column that shrinks with the depth.
    fn statement(&mut self, name: &str, value: &str) {
        let width = 24_usize.saturating_sub(self.indent);
        self.line(&format!("{name:width$} {value};"));
    }

    /// Statements whose column does not depend on the depth.
    fn fixed(&mut self, name: &str, value: &str) {
        self.line(&format!("{name:16} {value};"));
    }

    fn options(&mut self, list: &OptionList) {
        for option in list {
            self.statement(option.name(), &format!("{:>3}", quoted(option.value())));
        }
    }

    fn section(&mut self, name: &str, list: &OptionList) {
        if !list.is_empty() {
            self.open(name);
            self.options(list);
            self.close();
        }
    }

    fn disk_section(&mut self, disk: &DiskOptions) {
        if !disk.is_empty() {
            self.open("disk");
            self.options(&disk.attach);
            self.options(&disk.device);
            self.options(&disk.peer_device);
            self.close();
        }
    }

    fn global(&mut self, global: &Global, verbose: bool) {
        let value = |name: &str, default: &str| {
            global.options.value(name).filter(|value| *value != default).map(str::to_owned)
        };
        let minor_count = value("minor-count", "");
        let dialog_refresh = value("dialog-refresh", "1");
        let usage_count = value("usage-count", "ask");
        let no_check = global.is_set("disable-ip-verification");
        if !verbose && !no_check && minor_count.is_none() && dialog_refresh.is_none() && usage_count.is_none()
        {
            return;
        }
        self.open("global");
        if no_check {
            self.line("disable-ip-verification;");
        }
        for (name, value) in
            [("minor-count", minor_count), ("dialog-refresh", dialog_refresh), ("usage-count", usage_count)]
        {
            if let Some(value) = value {
                self.line(&format!("{name} {value};"));
            }
        }
        self.close();
        self.text.push('\n');
    }

    fn common(&mut self, common: &Common) {
        self.open("common");
        self.shared_sections(&common.body);
        self.close();
        self.text.push('\n');
    }

    /// What `common` and resources have in common.
    fn shared_sections(&mut self, body: &Body) {
        self.section("options", &body.options);
        self.section("net", &body.net);
        self.disk_section(&body.disk);
        if !body.startup.is_empty() || body.stacked_timeouts {
            self.open("startup");
            self.options(&body.startup);
            if body.stacked_timeouts {
                self.line("stacked-timeouts;");
            }
            self.close();
        }
        self.proxy_options("proxy", &body.proxy);
        self.section("handlers", &body.handlers);
    }

    fn proxy_options(&mut self, head: &str, proxy: &ProxyOptions) {
        if proxy.is_empty() {
            return;
        }
        self.open(head);
        self.options(&proxy.options);
        if !proxy.plugins.is_empty() {
            self.open("plugin");
            for plugin in &proxy.plugins {
                let words: Vec<String> = plugin.split(' ').map(quoted).collect();
                self.line(&format!("{};", words.join(" ")));
            }
            self.close();
        }
        self.close();
    }

    fn resource(
        &mut self,
        resource: &Resource,
        host: &HostIdentity,
        options: DumpOptions,
    ) -> Result<(), Error> {
        let body =
            if options.expanded { resource.expanded.as_ref().map_err(Clone::clone)? } else { &resource.body };
        self.expanded = options.expanded;
        let ignored = if resource.is_ignored(host) { "ignored" } else { "not ignored" };
        let stacked = if resource.is_stacked() { "stacked" } else { "not stacked" };
        let name = quoted_name(&resource.name);
        self.line(&format!("# resource {name} on {}: {ignored}, {stacked}", host.name));
        self.line(&format!("# defined at {}", resource.at.resolved()));
        self.open(&format!("resource {name}"));
        if let Some(file) = &body.template_file {
            self.line(&format!("template-file {};", quoted_name(file)));
        }
        self.volumes(&body.volumes, false);
        for host in &body.hosts {
            self.host(host);
        }
        for connection in &body.connections {
            self.connection(connection, body);
        }
        for mesh in &body.meshes {
            self.open("connection-mesh");
            // The reference prints `hosts;` for an empty mesh, which nobody can read again.
            if !mesh.hosts.is_empty() {
                let hosts: String = mesh.hosts.iter().map(|host| format!(" {}", quoted_name(host))).collect();
                self.line(&format!("hosts{hosts};"));
            }
            self.section("net", &mesh.net);
            self.close();
        }
        self.shared_sections(body);
        self.close();
        self.text.push('\n');
        Ok(())
    }

    fn host(&mut self, host: &Host) {
        match &host.kind {
            HostKind::On(names) => {
                let names: String = names.iter().map(|name| format!(" {}", quoted_name(name))).collect();
                self.open(&format!("on{names}"));
            }
            HostKind::Floating(address) => self.open(&format!("{:16} {}", "floating", address.configured())),
            HostKind::Stacked { lower, hosts, .. } => {
                self.open(&format!("stacked-on-top-of {}", quoted_name(lower)));
                let names: String = hosts.iter().map(|name| format!("{name} ")).collect();
                self.line(&format!("# on {names}"));
            }
            HostKind::This => self.open("_this_host"),
        }
        if let Some(id) = host.node_id {
            self.line(&format!("node-id {id};"));
        }
        self.section("options", &host.options);
        let stacked = matches!(host.kind, HostKind::Stacked { .. });
        if self.expanded || !stacked {
            self.volumes(&host.volumes, true);
        }
        if let (Some(address), false) = (&host.address, matches!(host.kind, HostKind::Floating(_))) {
            self.fixed("address", &address.configured());
        }
        if let Some(proxy) = &host.proxy {
            self.proxy("proxy", proxy);
        }
        self.close();
    }

    fn volumes(&mut self, volumes: &[Volume], in_host: bool) {
        let expanded = self.expanded;
        for volume in volumes.iter().filter(|volume| expanded || !volume.from_resource.volume) {
            if volume.implicit {
                self.volume(volume, in_host);
            } else {
                self.open(&format!("volume {}", volume.vnr));
                self.volume(volume, in_host);
                self.close();
            }
        }
    }

    fn volume(&mut self, volume: &Volume, in_host: bool) {
        self.disk_section(&volume.options);
        let from = volume.from_resource;
        if let (Some(minor), true) = (volume.minor, self.expanded || !from.device) {
            match &volume.device {
                Some(device) => self.statement("device", &format!("{} minor {minor}", quoted(device))),
                None => self.statement("device", &format!("minor {minor}")),
            }
        }
        // The reference shows an inherited disk beside a `disk { }` section.
        let show_disk = self.expanded || !from.disk || (in_host && volume.has_disk_section);
        if let (Some(disk), true) = (&volume.disk, show_disk) {
            self.statement("disk", &format!("{:>3}", quoted_name(disk)));
        }
        if !self.expanded && from.meta_disk {
            return;
        }
        match &volume.meta_disk {
            Some(MetaDisk::Internal) if self.expanded && volume.disk.is_none() => {}
            Some(MetaDisk::Internal) => self.statement("meta-disk", "internal"),
            Some(MetaDisk::Flexible(device)) => self.fixed("meta-disk", &quoted_name(device)),
            Some(MetaDisk::Indexed { device, index }) => {
                self.fixed("meta-disk", &format!("{} [{index}]", quoted_name(device)));
            }
            None => {}
        }
        if let (Some(tiebreaker), false) = (volume.tiebreaker, volume.implicit) {
            self.statement("tiebreaker", if tiebreaker { "yes" } else { "no" });
        }
    }

    fn connection(&mut self, connection: &Connection, body: &Body) {
        self.open("connection");
        for path in &connection.paths {
            if !path.implicit {
                self.open("path");
            }
            for endpoint in &path.endpoints {
                self.endpoint(endpoint, body);
            }
            if !path.implicit {
                self.close();
            }
        }
        self.section("net", &connection.net);
        self.section("disk", &connection.disk);
        for volume in &connection.volumes {
            self.open(&format!("volume {}", volume.vnr));
            self.section("disk", &volume.options);
            self.close();
        }
        self.close();
    }

    fn endpoint(&mut self, endpoint: &Endpoint, body: &Body) {
        let pad = format!("{:indent$}", "", indent = self.indent);
        let part = |name: &str, address: &Address| format!("{pad}{name:16} {}", address.configured());
        let mut text = match (&endpoint.name, &endpoint.address) {
            (EndpointName::Host(name), Some(address)) => {
                format!("host {}{}", quoted_name(name), part(" address", address))
            }
            (EndpointName::Host(name), None) => match endpoint.port {
                Some(port) => format!("host {} port {port}", quoted_name(name)),
                None => format!("host {}", quoted_name(name)),
            },
            (_, Some(address)) => {
                let host = endpoint.host.and_then(|index| body.hosts.get(index));
                let name = host.map(|host| host.joined("_")).unwrap_or_default();
                format!("{:16} {}; # on {name}\n{pad}", "address", address.configured())
            }
            _ => String::new(),
        };
        // After an endpoint named by address the reference's semicolon stands alone in its line.
        if text.ends_with(&format!("\n{pad}")) {
            text.truncate(text.len() - pad.len());
        }
        if let Some(outside) = &endpoint.outside {
            text.push_str(&part(" via outside-address", outside));
        }
        match &endpoint.proxy {
            Some(proxy) => self.proxy(&format!("{text}{pad} via proxy"), proxy),
            None => self.line(&format!("{text};")),
        }
    }

    fn proxy(&mut self, head: &str, proxy: &Proxy) {
        let hosts: String = proxy.hosts.iter().map(|host| format!(" {}", quoted_name(host))).collect();
        self.open(&format!("{head} on{hosts}"));
        self.fixed("inside", &proxy.inside.configured());
        self.fixed("outside", &proxy.outside.configured());
        self.proxy_options("options", &proxy.options);
        self.close();
    }
}
