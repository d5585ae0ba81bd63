//! `drbdsetup status --json` in the reference's layout (`spec/cli.md` §12.2).

use std::fmt::Write as _;

use super::{ETA_NEVER, float, progress};
use crate::{ConnectionStatus, DeviceStatus, Endpoint, PathStatus, PeerDeviceStatus, ResourceStatus};

/// The JSON text of these resources with a final newline and empty line.
#[must_use]
pub fn status_json(resources: &[ResourceStatus]) -> String {
    let mut out = String::from("[\n");
    let bodies: Vec<String> = resources.iter().map(resource).collect();
    out.push_str(&bodies.join(",\n"));
    if !bodies.is_empty() {
        out.push('\n');
    }
    out.push_str("]\n\n");
    out
}

/// Collects `"key": value` lines of one object.
struct Object {
    indent: usize,
    lines: Vec<String>,
}

impl Object {
    fn new(indent: usize) -> Self {
        Self { indent, lines: Vec::new() }
    }

    fn raw(&mut self, key: &str, value: impl std::fmt::Display) -> &mut Self {
        self.lines.push(format!("{:indent$}\"{key}\": {value}", "", indent = self.indent + 2));
        self
    }

    fn string(&mut self, key: &str, value: &str) -> &mut Self {
        self.raw(key, quoted(value))
    }

    /// A list of finished objects; lists close with ` ]`.
    fn list(&mut self, key: &str, items: &[String]) -> &mut Self {
        let body = if items.is_empty() { "[ ]".to_owned() } else { format!("[\n{} ]", items.join(",\n")) };
        self.raw(key, body)
    }

    fn finish(&self) -> String {
        let pad = " ".repeat(self.indent);
        // The reference leaves a blank after the comma of this one line.
        let mut body = String::new();
        let last = self.lines.len().saturating_sub(1);
        for (i, line) in self.lines.iter().enumerate() {
            body.push_str(line);
            if i != last {
                body.push(',');
                if line.trim_start().starts_with("\"connection-state\"") {
                    body.push(' ');
                }
            }
            body.push('\n');
        }
        format!("{pad}{{\n{body}{pad}}}")
    }
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if (c as u32) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn resource(r: &ResourceStatus) -> String {
    let devices: Vec<String> = r.devices.iter().map(device).collect();
    let connections: Vec<String> = r.connections.iter().map(|c| connection(r, c)).collect();
    let mut o = Object::new(0);
    o.string("name", &r.name)
        .raw("node-id", r.node_id)
        .string("role", r.role.as_str())
        .raw("suspended", r.suspended())
        .raw("suspended-user", r.suspended_user)
        .raw("suspended-no-data", r.suspended_no_data)
        .raw("suspended-fencing", r.suspended_fencing)
        .raw("suspended-quorum", r.suspended_quorum)
        .raw("force-io-failures", r.force_io_failures)
        .string("write-ordering", r.write_ordering.as_str())
        .list("devices", &devices)
        .list("connections", &connections);
    o.finish()
}

fn device(d: &DeviceStatus) -> String {
    let mut o = Object::new(4);
    o.raw("volume", d.volume)
        .raw("minor", d.minor)
        .string("disk-state", d.disk_state.as_str())
        .raw("client", d.client);
    if let Some(open) = d.open {
        o.raw("open", open);
    }
    o.raw("quorum", d.quorum);
    if let Some(s) = &d.statistics {
        o.raw("size", s.size)
            .raw("read", s.read)
            .raw("written", s.written)
            .raw("al-writes", s.al_writes)
            .raw("bm-writes", s.bm_writes)
            .raw("upper-pending", s.upper_pending)
            .raw("lower-pending", s.lower_pending);
    }
    o.finish()
}

fn connection(r: &ResourceStatus, c: &ConnectionStatus) -> String {
    let mut o = Object::new(4);
    o.raw("peer-node-id", c.peer_node_id)
        .string("name", &c.name)
        .string("connection-state", c.connection_state.as_str())
        .raw("congested", c.congested)
        .string("peer-role", c.peer_role.as_str());
    if let Some(tls) = c.tls {
        o.raw("tls", tls);
    }
    if let Some(n) = c.ap_in_flight {
        o.raw("ap-in-flight", n);
    }
    if let Some(n) = c.rs_in_flight {
        o.raw("rs-in-flight", n);
    }
    if let Some(paths) = &c.paths {
        let paths: Vec<String> = paths.iter().map(path).collect();
        o.list("paths", &paths);
    }
    let peer_devices: Vec<String> = c.peer_devices.iter().map(|p| peer_device(r, p)).collect();
    o.list("peer_devices", &peer_devices);
    o.finish()
}

fn path(p: &PathStatus) -> String {
    let host = |e: &Endpoint| {
        let mut o = Object::new(10);
        o.string("address", &e.address.to_string()).raw("port", e.port).string("family", e.family.as_str());
        o.finish().trim_start().to_owned()
    };
    let mut o = Object::new(8);
    o.raw("this_host", host(&p.this_host))
        .raw("remote_host", host(&p.remote_host))
        .raw("established", p.established);
    o.finish()
}

fn peer_device(r: &ResourceStatus, p: &PeerDeviceStatus) -> String {
    let size_kib = r.device(p.volume).and_then(|d| d.statistics).map_or(0, |s| s.size);
    let in_sync = if size_kib == 0 { 0.0 } else { 100.0 * (1.0 - float(p.out_of_sync) / float(size_kib)) };
    let details = p.sync.as_ref().filter(|_| p.replication_state.is_syncing());
    let mut o = Object::new(8);
    o.raw("volume", p.volume)
        .string("replication-state", p.replication_state.as_str())
        .string("peer-disk-state", p.peer_disk_state.as_str())
        .raw("peer-client", p.peer_client)
        .string("resync-suspended", &p.resync_suspended.to_string())
        .raw("received", p.received)
        .raw("sent", p.sent)
        .raw("out-of-sync", p.out_of_sync)
        .raw("pending", p.pending)
        .raw("unacked", p.unacked)
        .raw("has-sync-details", details.is_some())
        .raw("has-online-verify-details", details.is_some_and(|s| s.verify.is_some()))
        .raw("percent-in-sync", format_args!("{in_sync:.2}"));
    match (details, progress(p)) {
        (Some(s), Some(progress)) => {
            o.raw("rs-total", s.rs_total)
                .raw("rs-dt-start-ms", s.rs_dt_start_ms)
                .raw("rs-paused-ms", s.rs_paused_ms)
                .raw("rs-dt0-ms", s.rs_dt0_ms)
                .raw("rs-db0-sectors", s.rs_db0_sectors)
                .raw("rs-dt1-ms", s.rs_dt1_ms)
                .raw("rs-db1-sectors", s.rs_db1_sectors);
            match &s.verify {
                Some(v) => o
                    .raw("ov-start-sector", v.ov_start_sector)
                    .raw("ov-stop-sector", v.ov_stop_sector)
                    .raw("ov-position", v.ov_position)
                    .raw("ov-left", v.ov_left)
                    .raw("ov-skipped", v.ov_skipped),
                None => o.raw("rs-failed", s.rs_failed).raw("rs-same-csum", s.rs_same_csum),
            };
            o.raw("want", format_args!("{:.2}", s.want))
                .raw("db0/dt0 [MiB/s]", format_args!("{:.2}", progress.rate_dt0))
                .raw("db1/dt1 [MiB/s]", format_args!("{:.2}", progress.rate_dt1))
                .raw("estimated-seconds-to-finish", progress.eta_seconds.unwrap_or(ETA_NEVER))
                .raw("db/dt [MiB/s]", format_args!("{:.2}", progress.rate_all))
                .raw("percent-resync-done", format_args!("{:.2}", progress.done_percent));
        }
        _ => {
            if let Some(done) = p.resync_done_percent.filter(|_| p.replication_state.is_syncing()) {
                o.raw("percent-resync-done", format_args!("{done:.2}"));
            }
        }
    }
    o.finish()
}
