//! `drbdsetup status` (`spec/cli.md` §12.1).

use super::{backing_dev, blocked_text, done_percent, progress, rate_and_eta, yes_no};
use crate::{
    ConnectionState, ConnectionStatus, DeviceStatus, DiskState, PeerDeviceStatus, ReplicationState,
    ResourceStatus, Role,
};

/// How to print.
#[derive(Debug, Clone, Copy)]
pub struct TextOptions {
    /// Number of `--verbose` given.
    pub verbose: u8,
    /// `--statistics`.
    pub statistics: bool,
    /// Columns to wrap at.
    pub columns: usize,
    /// Output goes to a terminal (`client:` is left out then).
    pub terminal: bool,
    /// Colour states.
    pub color: bool,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self { verbose: 0, statistics: false, columns: 80, terminal: false, color: false }
    }
}

const SGR_LOCAL: Palette = Palette { good: "1;32", bad: "1;31", primary: "1;36" };
const SGR_PEER: Palette = Palette { good: "32", bad: "31", primary: "36" };

struct Palette {
    good: &'static str,
    bad: &'static str,
    primary: &'static str,
}

/// The text of these resources, each followed by an empty line, in the order given.
#[must_use]
pub fn status_text(resources: &[ResourceStatus], options: &TextOptions) -> String {
    if resources.is_empty() {
        return "# No currently configured DRBD found.\n".to_owned();
    }
    let mut out = String::new();
    for resource in resources {
        let mut writer = Writer { options, out: &mut out, indent: 0, column: 0 };
        resource_text(resource, &mut writer);
        out.push('\n');
    }
    out
}

/// Puts tokens on lines that end before the terminal does.
struct Writer<'a> {
    options: &'a TextOptions,
    out: &'a mut String,
    indent: usize,
    column: usize,
}

impl Writer<'_> {
    fn begin(&mut self, indent: usize) {
        self.indent = indent;
        self.column = 0;
    }

    fn end(&mut self) {
        if self.column > 0 {
            self.out.push('\n');
            self.column = 0;
        }
    }

    /// Continues the object on a new line.
    fn continue_line(&mut self) {
        if self.column > 0 {
            self.out.push('\n');
            self.pad(self.indent + 4);
        }
    }

    fn pad(&mut self, columns: usize) {
        self.out.extend(std::iter::repeat_n(' ', columns));
        self.column = columns;
    }

    fn token(&mut self, text: &str) {
        self.styled(text, "", None);
    }

    /// `prefix` plain, `value` in that style.
    fn styled(&mut self, prefix: &str, value: &str, sgr: Option<&str>) {
        let width = prefix.chars().count() + value.chars().count();
        if self.column == 0 {
            self.pad(self.indent);
        } else if self.column + 1 + width > self.options.columns {
            self.out.push('\n');
            self.pad(self.indent + 4);
        } else if !self.out.ends_with([' ', '\n']) {
            self.out.push(' ');
            self.column += 1;
        }
        self.out.push_str(prefix);
        match sgr.filter(|_| self.options.color) {
            Some(code) => {
                self.out.push_str("\x1b[");
                self.out.push_str(code);
                self.out.push('m');
                self.out.push_str(value);
                self.out.push_str("\x1b[0m");
            }
            None => self.out.push_str(value),
        }
        self.column += width;
    }

    fn verbose(&self) -> bool {
        self.options.verbose > 0
    }
}

fn resource_text(r: &ResourceStatus, w: &mut Writer<'_>) {
    w.begin(0);
    w.token(&r.name);
    if w.verbose() && r.node_id >= 0 {
        w.token(&format!("node-id:{}", r.node_id));
    }
    role(w, r.role, &SGR_LOCAL);
    if w.verbose() || r.suspended() {
        w.token(&format!("suspended:{}", r.suspended_text()));
    }
    if r.force_io_failures || (w.verbose() && r.node_id >= 0) {
        w.token(&format!("force-io-failures:{}", yes_no(r.force_io_failures)));
    }
    if w.options.statistics && w.verbose() {
        w.continue_line();
        w.token(&format!("write-ordering:{}", r.write_ordering.as_str()));
    }
    w.end();
    let single = r.devices.len() == 1 && r.devices.iter().all(|d| d.volume == 0);
    for device in &r.devices {
        device_text(device, single, w);
    }
    for connection in &r.connections {
        connection_text(connection, single, w);
    }
}

fn device_text(d: &DeviceStatus, single: bool, w: &mut Writer<'_>) {
    w.begin(2);
    if w.verbose() || !single {
        w.token(&format!("volume:{}", d.volume));
    }
    if w.verbose() {
        w.token(&format!("minor:{}", d.minor));
    }
    let sgr = match d.disk_state {
        DiskState::Diskless if d.client => Some(SGR_LOCAL.good),
        s => disk_sgr(s, &SGR_LOCAL),
    };
    w.styled("disk:", d.disk_state.as_str(), sgr);
    if d.disk_state == DiskState::Diskless && !w.options.terminal {
        w.token(&format!("client:{}", yes_no(d.client)));
    }
    if w.verbose() {
        w.token(&format!("backing_dev:{}", backing_dev(d)));
    }
    if w.verbose() || !d.quorum {
        let sgr = (!d.quorum).then_some(SGR_LOCAL.bad);
        w.styled("quorum:", yes_no(d.quorum), sgr);
    }
    if let Some(open) = d.open {
        w.token(&format!("open:{}", yes_no(open)));
    }
    if let Some(s) = &d.statistics {
        if !w.options.statistics {
            if w.verbose() || s.blocked_upper || s.blocked_lower {
                w.token(&format!("blocked:{}", blocked_text(s)));
            }
        } else if w.verbose() {
            w.continue_line();
            for (name, value) in [
                ("size", s.size),
                ("read", s.read),
                ("written", s.written),
                ("al-writes", s.al_writes),
                ("bm-writes", s.bm_writes),
                ("upper-pending", s.upper_pending),
                ("lower-pending", s.lower_pending),
            ] {
                w.token(&format!("{name}:{value}"));
            }
            w.token(&format!("al-suspended:{}", yes_no(s.al_suspended)));
            w.token(&format!("blocked:{}", blocked_text(s)));
        } else {
            if s.blocked_upper || s.blocked_lower {
                w.token(&format!("blocked:{}", blocked_text(s)));
            }
            w.continue_line();
            w.token(&format!("read:{}", s.read));
            w.token(&format!("written:{}", s.written));
        }
    }
    w.end();
}

fn connection_text(c: &ConnectionStatus, single: bool, w: &mut Writer<'_>) {
    let connected = c.connection_state == ConnectionState::Connected;
    w.begin(2);
    let unnamed = format!("_peer_node_id:{}", c.peer_node_id);
    w.token(if c.name.is_empty() { &unnamed } else { &c.name });
    if w.verbose() && c.peer_node_id >= 0 {
        w.token(&format!("node-id:{}", c.peer_node_id));
    }
    if w.verbose() || !connected {
        let bad = matches!(c.connection_state, ConnectionState::StandAlone | ConnectionState::Connecting);
        w.styled("connection:", c.connection_state.as_str(), bad.then_some(SGR_PEER.bad));
    }
    if w.verbose() || connected {
        role(w, c.peer_role, &SGR_PEER);
    }
    if let Some(tls) = c.tls
        && (tls || w.verbose())
    {
        w.token(&format!("tls:{}", yes_no(tls)));
    }
    if w.verbose() || c.congested {
        w.token(&format!("congested:{}", yes_no(c.congested)));
    }
    if w.verbose() {
        for (name, value) in [("ap-in-flight", c.ap_in_flight), ("rs-in-flight", c.rs_in_flight)] {
            if let Some(value) = value {
                w.token(&format!("{name}:{value}"));
            }
        }
    }
    w.end();
    if connected || w.verbose() || w.options.statistics {
        for peer_device in &c.peer_devices {
            peer_device_text(peer_device, single, w);
        }
    }
}

fn peer_device_text(p: &PeerDeviceStatus, single: bool, w: &mut Writer<'_>) {
    let everything = w.verbose() || w.options.statistics;
    let repl = p.replication_state;
    w.begin(4);
    if w.verbose() || !single {
        w.token(&format!("volume:{}", p.volume));
    }
    if w.verbose() || repl > ReplicationState::Established {
        let bad = matches!(
            repl,
            ReplicationState::SyncSource | ReplicationState::SyncTarget | ReplicationState::PausedSyncT
        );
        w.styled("replication:", repl.as_str(), bad.then_some(SGR_PEER.bad));
    }
    if everything || repl != ReplicationState::Off || p.peer_disk_state != DiskState::DUnknown {
        let sgr = match p.peer_disk_state {
            DiskState::Diskless if p.peer_client => Some(SGR_PEER.good),
            s => disk_sgr(s, &SGR_PEER),
        };
        w.styled("peer-disk:", p.peer_disk_state.as_str(), sgr);
        if p.peer_disk_state == DiskState::Diskless && !w.options.terminal {
            w.token(&format!("peer-client:{}", yes_no(p.peer_client)));
        }
    }
    if let Some(done) = done_percent(p) {
        w.token(&format!("done:{done:.2}"));
    }
    if w.verbose() || p.resync_suspended.any() {
        w.token(&format!("resync-suspended:{}", p.resync_suspended));
    }
    if w.options.statistics {
        peer_device_statistics(p, w);
    }
    w.end();
}

fn peer_device_statistics(p: &PeerDeviceStatus, w: &mut Writer<'_>) {
    w.continue_line();
    w.token(&format!("received:{}", p.received));
    w.token(&format!("sent:{}", p.sent));
    if w.verbose() || p.out_of_sync > 0 {
        w.token(&format!("out-of-sync:{}", p.out_of_sync));
    }
    if !w.verbose() {
        return;
    }
    w.token(&format!("pending:{}", p.pending));
    w.token(&format!("unacked:{}", p.unacked));
    let (Some(sync), Some(progress), true) = (&p.sync, progress(p), p.replication_state.is_syncing()) else {
        return;
    };
    let (dbdt1, eta) = rate_and_eta(&progress);
    if w.options.verbose > 1 {
        for (name, value) in [
            ("rs-total", sync.rs_total),
            ("rs-dt-start-ms", sync.rs_dt_start_ms),
            ("rs-paused-ms", sync.rs_paused_ms),
            ("rs-dt0-ms", sync.rs_dt0_ms),
            ("rs-db0-sectors", sync.rs_db0_sectors),
            ("rs-dt1-ms", sync.rs_dt1_ms),
            ("rs-db1-sectors", sync.rs_db1_sectors),
        ] {
            w.token(&format!("{name}:{value}"));
        }
        let counters: &[(&str, u64)] = match &sync.verify {
            Some(v) => &[
                ("ov-start-sector", v.ov_start_sector),
                ("ov-stop-sector", v.ov_stop_sector),
                ("ov-position", v.ov_position),
                ("ov-left", v.ov_left),
                ("ov-skipped", v.ov_skipped),
            ],
            None => &[("rs-failed", sync.rs_failed), ("rs-same-csum", sync.rs_same_csum)],
        };
        for (name, value) in counters {
            w.token(&format!("{name}:{value}"));
        }
        if sync.want > 0.0 {
            w.token(&format!("want:{:.2}", sync.want));
        }
        w.token(&format!("dbdt:{:.2}", progress.rate_all));
        w.token(&format!("dbdt0:{:.2}", progress.rate_dt0));
    }
    w.token(&format!("dbdt1:{dbdt1}"));
    w.token(&format!("eta:{eta}"));
}

fn role(w: &mut Writer<'_>, role: Role, palette: &Palette) {
    w.styled("role:", role.as_str(), (role == Role::Primary).then_some(palette.primary));
}

fn disk_sgr(state: DiskState, palette: &Palette) -> Option<&'static str> {
    match state {
        DiskState::UpToDate => Some(palette.good),
        DiskState::Diskless | DiskState::Inconsistent | DiskState::Outdated => Some(palette.bad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SyncDetails;

    /// The replayed example of `spec/cli.md` §12.1; where it lets a line grow beyond 80 columns we do as
    /// recordings of a real kernel show.
    fn example() -> ResourceStatus {
        let mut r: ResourceStatus = serde_json::from_str(
            r#"{"name":"r1","node-id":4,"role":"Secondary","devices":[{"volume":0,"minor":1000,
            "disk-state":"UpToDate","open":false,"backing_dev":"/dev/sda","size":5,"read":10,"written":15,
            "al-writes":40,"bm-writes":50,"upper-pending":60,"lower-pending":70}],"connections":[{"peer-node-id":1,
            "name":"nodeb","connection-state":"Connected","peer-role":"Primary","tls":false,"ap-in-flight":10,
            "rs-in-flight":20,"peer_devices":[{"volume":0,"replication-state":"SyncSource",
            "peer-disk-state":"Inconsistent","received":5,"sent":10,"out-of-sync":2500,"pending":30,"unacked":40}]}]}"#,
        )
        .unwrap();
        r.connections[0].peer_devices[0].sync = Some(SyncDetails {
            rs_total: 8000,
            rs_dt_start_ms: 6000,
            rs_paused_ms: 0,
            rs_dt0_ms: 1000,
            rs_db0_sectors: 500,
            rs_dt1_ms: 1000,
            rs_db1_sectors: 500,
            rs_failed: 0,
            rs_same_csum: 0,
            want: 0.0,
            verify: None,
        });
        r
    }

    #[test]
    fn the_example_of_the_specification() {
        let all = [example()];
        assert_eq!(
            status_text(&all, &TextOptions::default()),
            "r1 role:Secondary\n  disk:UpToDate open:no\n  nodeb role:Primary\n    replication:SyncSource \
             peer-disk:Inconsistent done:37.50\n\n"
        );
        let full = TextOptions { verbose: 1, statistics: true, ..TextOptions::default() };
        assert_eq!(
            status_text(&all, &full),
            "r1 node-id:4 role:Secondary suspended:no force-io-failures:no
    write-ordering:none
  volume:0 minor:1000 disk:UpToDate backing_dev:/dev/sda quorum:yes open:no
      size:5 read:10 written:15 al-writes:40 bm-writes:50 upper-pending:60
      lower-pending:70 al-suspended:no blocked:no
  nodeb node-id:1 connection:Connected role:Primary tls:no congested:no
      ap-in-flight:10 rs-in-flight:20
    volume:0 replication:SyncSource peer-disk:Inconsistent done:37.50
        resync-suspended:no
        received:5 sent:10 out-of-sync:2500 pending:30 unacked:40 dbdt1:0.24
        eta:10

"
        );
    }

    #[test]
    fn colours_do_not_count_as_columns() {
        let options = TextOptions { color: true, terminal: true, ..TextOptions::default() };
        let text = status_text(&[example()], &options);
        assert!(text.contains("disk:\x1b[1;32mUpToDate\x1b[0m open:no\n"), "{text:?}");
        assert!(text.contains("nodeb role:\x1b[36mPrimary\x1b[0m\n"), "{text:?}");
    }

    #[test]
    fn nothing_configured() {
        assert_eq!(status_text(&[], &TextOptions::default()), "# No currently configured DRBD found.\n");
    }
}
