//! `tracing` events written the way resource agents log (`spec/ocf-agents.md` §1.9).
//!
//! A line carries the tag `type(instance)[pid]` and the text `PRIO: message`. It goes to standard error
//! on a terminal, else to syslog when `HA_LOGFACILITY` names a facility, else to `HA_LOGFILE`, else to
//! standard error. Debug lines appear only when `HA_debug` is above 0. An error with the field
//! `crit = true` is logged as CRIT.

use std::fmt::{self, Write as _};
use std::fs::OpenOptions;
use std::io::{IsTerminal, Write};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::ocf::Environment;

/// Longest message that is logged, in bytes; the rest is cut.
const MESSAGE_BYTES_MAX: usize = 4096;

const SYSLOG_SOCKET: &str = "/dev/log";

/// How serious a line is; the names are those of resource agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Priority {
    Crit,
    Error,
    Warning,
    Info,
    Debug,
}

impl Priority {
    const fn name(self) -> &'static str {
        match self {
            Self::Crit => "CRIT",
            Self::Error => "ERROR",
            Self::Warning => "WARNING",
            Self::Info => "INFO",
            Self::Debug => "DEBUG",
        }
    }

    /// Severity of RFC 5424 §6.2.1.
    const fn severity(self) -> u8 {
        match self {
            Self::Crit => 2,
            Self::Error => 3,
            Self::Warning => 4,
            Self::Info => 6,
            Self::Debug => 7,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    Stderr,
    Syslog { facility: u8 },
    File(PathBuf),
}

/// The subscriber that writes the log of one agent run.
#[derive(Debug)]
pub struct OcfLog {
    tag: String,
    target: Target,
    debug: bool,
}

impl OcfLog {
    /// Reads where to log to and under which name from Pacemaker's environment; `agent` is the type of
    /// the agent if the environment does not name it.
    #[must_use]
    pub fn new(environment: &Environment, agent: &str) -> Self {
        Self::with_terminal(environment, agent, std::io::stderr().is_terminal())
    }

    /// Makes this the log of the process; a log that is already there stays.
    pub fn install(self) {
        let _ = tracing::subscriber::set_global_default(self);
    }

    fn with_terminal(environment: &Environment, agent: &str, terminal: bool) -> Self {
        let agent = environment.get("OCF_RESOURCE_TYPE").filter(|name| !name.is_empty()).unwrap_or(agent);
        let facility = environment.get("HA_LOGFACILITY").and_then(facility);
        let file = environment.get("HA_LOGFILE").filter(|path| path.starts_with('/') && *path != "/dev/null");
        let target = match (terminal, facility, file) {
            (true, _, _) | (false, None, None) => Target::Stderr,
            (false, Some(facility), _) => Target::Syslog { facility },
            (false, None, Some(path)) => Target::File(path.into()),
        };
        let debug = environment.get("HA_debug").and_then(|level| level.trim().parse::<u32>().ok());
        Self {
            tag: format!("{agent}({})[{}]", environment.instance(), std::process::id()),
            target,
            debug: debug.is_some_and(|level| level > 0),
        }
    }

    fn line(&self, priority: Priority, message: &str) -> String {
        let mut end = message.len().min(MESSAGE_BYTES_MAX);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        let message = message.get(..end).unwrap_or_default().replace('\n', " ");
        format!("{}: {}: {message}", self.tag, priority.name())
    }

    /// A log that cannot be written must never fail the action, so a refused line goes to standard
    /// error, and is lost if that is closed too.
    fn write(&self, priority: Priority, message: &str) {
        let line = self.line(priority, message);
        let written = match &self.target {
            Target::Stderr => false,
            Target::Syslog { facility } => syslog(*facility, priority, &line).is_ok(),
            Target::File(path) => OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .and_then(|mut file| writeln!(file, "{} {line}", timestamp(SystemTime::now())))
                .is_ok(),
        };
        if !written {
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }
}

impl Subscriber for OcfLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let level = *metadata.level();
        level <= Level::INFO || (self.debug && level == Level::DEBUG)
    }

    fn new_span(&self, _attributes: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _span: &span::Id, _values: &span::Record<'_>) {}

    fn record_follows_from(&self, _span: &span::Id, _follows: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut message = Message::default();
        event.record(&mut message);
        let level = *event.metadata().level();
        let priority = match level {
            Level::ERROR if message.crit => Priority::Crit,
            Level::ERROR => Priority::Error,
            Level::WARN => Priority::Warning,
            Level::INFO => Priority::Info,
            _ => Priority::Debug,
        };
        self.write(priority, &message.text);
    }

    fn enter(&self, _span: &span::Id) {}

    fn exit(&self, _span: &span::Id) {}
}

#[derive(Default)]
struct Message {
    text: String,
    crit: bool,
}

impl Visit for Message {
    fn record_bool(&mut self, field: &Field, value: bool) {
        if field.name() == "crit" {
            self.crit = value;
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail.
        if field.name() == "message" {
            let _ = write!(self.text, "{value:?}");
        } else {
            let _ = write!(self.text, " {}={value:?}", field.name());
        }
    }
}

/// The time stamp is left to the daemon, which knows the local time zone.
fn syslog(facility: u8, priority: Priority, line: &str) -> std::io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    // A stuck log daemon costs lines, not the operation's time.
    socket.set_nonblocking(true)?;
    let value = u16::from(facility) * 8 + u16::from(priority.severity());
    socket.send_to(format!("<{value}>{line}").as_bytes(), SYSLOG_SOCKET)?;
    Ok(())
}

/// Numbers of RFC 5424 §6.2.1; `none` and unknown names mean that syslog is not used.
fn facility(name: &str) -> Option<u8> {
    const NAMES: [&str; 12] = [
        "kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp",
    ];
    if let Some(number) = name.strip_prefix("local") {
        return number.parse::<u8>().ok().filter(|number| *number < 8).map(|number| 16 + number);
    }
    NAMES.iter().position(|have| *have == name).and_then(|position| u8::try_from(position).ok())
}

/// Universal time, so that no time zone data are needed.
fn timestamp(now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to civil date, counted in 400-year eras from 1 March of year 0.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn log(vars: &[(&str, &str)], terminal: bool) -> OcfLog {
        OcfLog::with_terminal(&Environment::from_vars(vars.iter().copied()), "drbd", terminal)
    }

    #[test]
    fn target_follows_the_hints() {
        let facility = ("HA_LOGFACILITY", "daemon");
        let file = ("HA_LOGFILE", "/var/log/x");
        assert_eq!(log(&[facility, file], false).target, Target::Syslog { facility: 3 });
        assert_eq!(log(&[("HA_LOGFACILITY", "none"), file], false).target, Target::File("/var/log/x".into()));
        assert_eq!(log(&[file], false).target, Target::File("/var/log/x".into()));
        assert_eq!(log(&[], false).target, Target::Stderr);
        assert_eq!(log(&[facility, file], true).target, Target::Stderr);
    }

    #[test]
    fn facilities_have_their_numbers() {
        assert_eq!(facility("kern"), Some(0));
        assert_eq!(facility("authpriv"), Some(10));
        assert_eq!(facility("local0"), Some(16));
        assert_eq!(facility("local7"), Some(23));
        for none in ["none", "", "local8", "local", "DAEMON"] {
            assert_eq!(facility(none), None, "{none}");
        }
    }

    #[test]
    fn lines_look_like_those_of_resource_agents() {
        let log = log(&[("OCF_RESOURCE_INSTANCE", "p_r0"), ("OCF_RESOURCE_TYPE", "drbd")], false);
        let line = log.line(Priority::Warning, "r0 still Primary,\ndemoting.");
        assert_eq!(line, format!("drbd(p_r0)[{}]: WARNING: r0 still Primary, demoting.", std::process::id()));
        let long = log.line(Priority::Info, &"ä".repeat(MESSAGE_BYTES_MAX));
        assert!(long.len() < MESSAGE_BYTES_MAX + 100);
    }

    #[test]
    fn events_reach_the_file_with_their_level() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let vars = [("HA_LOGFILE", path.to_str().unwrap())];
        tracing::subscriber::with_default(log(&vars, false), || {
            tracing::error!(crit = true, "split {}", "brain");
            tracing::error!("error");
            tracing::warn!(volume = 3, "warning");
            tracing::info!("info");
            tracing::debug!("not shown");
        });
        let text = std::fs::read_to_string(&path).unwrap();
        let shown: Vec<&str> =
            text.lines().filter_map(|line| line.split_once("]: ")).map(|(_, m)| m).collect();
        assert_eq!(shown, ["CRIT: split brain", "ERROR: error", "WARNING: warning volume=3", "INFO: info"]);
    }

    #[test]
    fn debug_needs_the_switch() {
        assert!(!log(&[("HA_debug", "0")], false).debug);
        assert!(!log(&[("HA_debug", "x")], false).debug);
        assert!(log(&[("HA_debug", "1")], false).debug);
    }

    #[test]
    fn time_is_civil() {
        let at = |seconds| timestamp(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59Z");
    }
}
