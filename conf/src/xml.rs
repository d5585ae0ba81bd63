//! `drbdadm dump-xml`: the configuration as XML, byte for byte as the reference prints it, for scripts that
//! read that. It leaves out what the reference leaves out (`usage-count`, node ids) and keeps its oddities:
//! `template` is opened and never closed, a host without address shows `(null)`.

use std::borrow::Cow;
use std::fmt::Write as _;

use crate::dump::DumpOptions;
use crate::error::Error;
use crate::model::{
    Address, Body, Config, Connection, DiskOptions, Endpoint, EndpointName, Global, Host, HostKind, MetaDisk,
    Proxy, ProxyOptions, Resource, Volume,
};
use crate::options::OptionList;
use crate::view::HostIdentity;

impl Config {
    /// The whole configuration as XML, as seen on `host`.
    ///
    /// # Errors
    /// As for [`Config::dump`].
    pub fn dump_xml(&self, host: &HostIdentity, options: DumpOptions) -> Result<String, Error> {
        self.check_for_dump(host, options)?;
        let mut out = Xml::default();
        out.open(&format!("config file=\"{}\"", escaped(self.file())));
        if let Some(global) = &self.global {
            out.global(global);
        }
        if let Some(common) = &self.common {
            out.open("common");
            out.shared_sections(&common.body);
            out.close("common");
        }
        for resource in &self.resources {
            out.resource(resource, options)?;
        }
        out.close("config");
        Ok(out.text)
    }

    /// One resource as XML, as seen on `host`.
    ///
    /// # Errors
    /// As for [`Config::dump_resource`].
    pub fn dump_xml_resource(
        &self,
        name: &str,
        host: &HostIdentity,
        options: DumpOptions,
    ) -> Result<String, Error> {
        let mut out = Xml::default();
        out.resource(self.resource_for_dump(name, host)?, options)?;
        Ok(out.text)
    }
}

#[derive(Default)]
struct Xml {
    text: String,
    indent: usize,
}

fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(['\'', '"', '<', '>', '&']) {
        return Cow::Borrowed(text);
    }
    let entity = |c: char| match c {
        '\'' => "&apos;".to_owned(),
        '"' => "&quot;".to_owned(),
        '<' => "&lt;".to_owned(),
        '>' => "&gt;".to_owned(),
        '&' => "&amp;".to_owned(),
        c => c.to_string(),
    };
    Cow::Owned(text.chars().map(entity).collect())
}

/// `<TAG family="F" port="P">ADDRESS</TAG>`
fn located(tag: &str, address: Option<&Address>) -> String {
    let (family, port, host) = match address {
        Some(address) => (address.family.to_string(), address.port.to_string(), address.host.as_str()),
        None => ("(null)".to_owned(), "(null)".to_owned(), "(null)"),
    };
    format!("<{tag} family=\"{family}\" port=\"{port}\">{}</{tag}>", escaped(host))
}

impl Xml {
    fn line(&mut self, text: &str) {
        let _ = writeln!(self.text, "{:indent$}{text}", "", indent = self.indent);
    }

    fn open(&mut self, head: &str) {
        self.line(&format!("<{head}>"));
        self.indent += 4;
    }

    fn close(&mut self, tag: &str) {
        self.indent = self.indent.saturating_sub(4);
        self.line(&format!("</{tag}>"));
    }

    /// `<section name="NAME">` around something.
    fn section(&mut self, name: &str, content: impl FnOnce(&mut Self)) {
        self.open(&format!("section name=\"{name}\""));
        content(self);
        self.close("section");
    }

    fn option(&mut self, name: &str, value: &str) {
        self.line(&format!("<option name=\"{name}\" value=\"{}\"/>", escaped(value)));
    }

    /// An option without value.
    fn word(&mut self, name: &str) {
        self.line(&format!("<option name=\"{}\"/>", escaped(name)));
    }

    fn options<'a>(&mut self, list: impl IntoIterator<Item = &'a crate::options::SetOption>) {
        for option in list {
            self.option(option.name(), option.value());
        }
    }

    fn list(&mut self, name: &str, list: &OptionList) {
        if !list.is_empty() {
            self.section(name, |xml| xml.options(list));
        }
    }

    fn disk(&mut self, disk: &DiskOptions) {
        if !disk.is_empty() {
            self.section("disk", |xml| xml.options(disk.iter()));
        }
    }

    fn global(&mut self, global: &Global) {
        let mut lines = Vec::new();
        if global.is_set("disable-ip-verification") {
            lines.push("<disable-ip-verification/>".to_owned());
        }
        if let Some(count) = global.options.value("minor-count") {
            lines.push(format!("<minor-count count=\"{count}\"/>"));
        }
        if let Some(refresh) = global.options.value("dialog-refresh").filter(|refresh| *refresh != "1") {
            lines.push(format!("<dialog-refresh refresh=\"{refresh}\"/>"));
        }
        if !lines.is_empty() {
            self.open("global");
            lines.iter().for_each(|line| self.line(line));
            self.close("global");
        }
    }

    /// What `common` and resources have in common.
    fn shared_sections(&mut self, body: &Body) {
        self.list("options", &body.options);
        self.list("net", &body.net);
        self.disk(&body.disk);
        if !body.startup.is_empty() || body.stacked_timeouts {
            self.section("startup", |xml| {
                xml.options(&body.startup);
                if body.stacked_timeouts {
                    xml.word("stacked-timeouts");
                }
            });
        }
        if !body.proxy.is_empty() {
            self.section("proxy", |xml| {
                xml.options(&body.proxy.options);
                if !body.proxy.plugins.is_empty() {
                    xml.section("plugin", |xml| xml.plugins(&body.proxy));
                }
            });
        }
        self.list("handlers", &body.handlers);
    }

    fn plugins(&mut self, proxy: &ProxyOptions) {
        proxy.plugins.iter().for_each(|plugin| self.word(plugin));
    }

    fn resource(&mut self, resource: &Resource, options: DumpOptions) -> Result<(), Error> {
        let expanded = resource.expanded.as_ref().map_err(Clone::clone);
        let (body, connections) = if options.expanded {
            let body = expanded?;
            (body, &body.connections)
        } else {
            (&resource.body, &resource.connections)
        };
        let (name, place) = (escaped(&resource.name), resource.at.resolved().to_string());
        self.open(&format!("resource name=\"{name}\" conf-file-line=\"{}\"", escaped(&place)));
        if let Some(file) = &body.template_file {
            self.line(&format!("<template file=\"{}\">", escaped(file)));
        }
        for host in &body.hosts {
            self.host(host, resource);
        }
        for connection in connections {
            self.connection(connection, body);
        }
        self.shared_sections(body);
        self.close("resource");
        Ok(())
    }

    fn host(&mut self, host: &Host, resource: &Resource) {
        match &host.kind {
            HostKind::Floating(_) => self.open("host floating=\"1\""),
            _ => self.open(&format!("host name=\"{}\"", escaped(&host.joined(" ")))),
        }
        self.list("options", &host.options);
        for volume in &host.volumes {
            self.open(&format!("volume vnr=\"{}\"", volume.vnr));
            self.disk(&volume.options);
            self.volume(volume, host, resource);
            self.close("volume");
        }
        self.line(&located("address", host.address.as_ref()));
        self.close("host");
    }

    fn volume(&mut self, volume: &Volume, host: &Host, resource: &Resource) {
        if let Some(minor) = volume.minor {
            let device = volume.device.as_deref().unwrap_or_default();
            self.line(&format!("<device minor=\"{minor}\">{}</device>", escaped(device)));
        }
        let below = match &host.kind {
            HostKind::Stacked { lower, .. } => resource.lower_device(lower, volume.vnr),
            _ => None,
        };
        let disk = below.or(volume.disk.as_deref());
        if let Some(disk) = disk {
            self.line(&format!("<disk>{}</disk>", escaped(disk)));
        }
        match &volume.meta_disk {
            Some(MetaDisk::Indexed { device, index }) => {
                self.line(&format!("<meta-disk index=\"{index}\">{}</meta-disk>", escaped(device)));
            }
            Some(meta_disk) => {
                self.line(&format!("<meta-disk>{}</meta-disk>", escaped(&meta_disk.to_string())));
            }
            None if disk.is_some_and(|disk| disk != "none") => {
                self.line("<meta-disk>internal</meta-disk>");
            }
            None => {}
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
                self.close("path");
            }
        }
        self.list("net", &connection.net);
        self.list("disk", &connection.disk);
        for volume in &connection.volumes {
            self.open(&format!("volume vnr=\"{}\"", volume.vnr));
            self.list("disk", &volume.options);
            self.close("volume");
        }
        self.close("connection");
    }

    fn endpoint(&mut self, endpoint: &Endpoint, body: &Body) {
        let host = endpoint.host.and_then(|index| body.hosts.get(index));
        let name = match (&endpoint.name, host) {
            (EndpointName::Host(name), _) => name.clone(),
            (_, Some(host)) => host.joined("_"),
            (_, None) => String::new(),
        };
        let head = format!("host name=\"{}\"", escaped(&name));
        let address = located("address", endpoint.address.as_ref());
        match &endpoint.proxy {
            None => self.line(&format!("<{head}>{address}</host>")),
            Some(proxy) => {
                self.open(&head);
                self.line(&address);
                self.proxy(proxy);
                self.close("host");
            }
        }
    }

    fn proxy(&mut self, proxy: &Proxy) {
        self.open(&format!("proxy hostname=\"{}\"", escaped(&proxy.hosts.join(" "))));
        self.line(&located("inside", Some(&proxy.inside)));
        self.line(&located("outside", Some(&proxy.outside)));
        if !proxy.options.is_empty() {
            self.section("options", |xml| {
                xml.options(&proxy.options.options);
                xml.plugins(&proxy.options);
            });
        }
        self.close("proxy");
    }
}
