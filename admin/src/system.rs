//! What only the C library knows: local time and the width of the terminal.
#![allow(unsafe_code)]

use std::io::IsTerminal;
use std::os::fd::AsRawFd;

use nix::libc;

/// A moment in local time.
pub struct Local {
    date: String,
    offset_minutes: i64,
}

impl Local {
    /// The local time of that many seconds since 1970.
    pub fn at(unix_seconds: u64) -> Self {
        let seconds: libc::time_t = libc::time_t::try_from(unix_seconds).unwrap_or(0);
        // SAFETY: an all-zero `tm` is a valid value; localtime_r only writes to the `tm` it is given
        // and reads the two valid references.
        let tm = unsafe {
            let mut tm: libc::tm = std::mem::zeroed();
            libc::localtime_r(&raw const seconds, &raw mut tm);
            tm
        };
        Self { date: Self::date_of(&tm), offset_minutes: tm.tm_gmtoff / 60 }
    }

    /// `YYYY-MM-DDThh:mm:ssZ` of that many seconds since 1970.
    pub fn utc(unix_seconds: u64) -> String {
        let seconds: libc::time_t = libc::time_t::try_from(unix_seconds).unwrap_or(0);
        // SAFETY: an all-zero `tm` is a valid value; gmtime_r only writes to the `tm` it is given and
        // reads the two valid references.
        let tm = unsafe {
            let mut tm: libc::tm = std::mem::zeroed();
            libc::gmtime_r(&raw const seconds, &raw mut tm);
            tm
        };
        format!("{}Z", Self::date_of(&tm))
    }

    fn date_of(tm: &libc::tm) -> String {
        format!(
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}",
            i64::from(tm.tm_year) + 1900,
            tm.tm_mon + 1,
            tm.tm_mday,
            tm.tm_hour,
            tm.tm_min,
            tm.tm_sec
        )
    }

    /// `YYYY-MM-DDThh:mm:ss.uuuuuu+hh:mm`, as `events2 --timestamps` prints.
    pub fn iso(&self, micros: u64) -> String {
        format!("{}.{micros:06}{}", self.date, self.offset(":"))
    }

    /// `YYYY-MM-DD hh:mm:ss +hhmm`, as in the head of a metadata dump.
    pub fn spaced(&self) -> String {
        format!("{} {}", self.date.replace('T', " "), self.offset(""))
    }

    fn offset(&self, separator: &str) -> String {
        let sign = if self.offset_minutes < 0 { '-' } else { '+' };
        let minutes = self.offset_minutes.abs();
        format!("{sign}{:02}{separator}{:02}", minutes / 60, minutes % 60)
    }
}

/// Columns of the terminal on stdout; 80 if it is none.
pub fn columns() -> usize {
    const DEFAULT: usize = 80;
    let out = std::io::stdout();
    if !out.is_terminal() {
        return DEFAULT;
    }
    // SAFETY: an all-zero `winsize` is a valid value; TIOCGWINSZ writes one `winsize` through the valid
    // pointer and nothing else.
    let (result, size) = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        let result = libc::ioctl(out.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size);
        (result, size)
    };
    if result == 0 && size.ws_col > 0 { usize::from(size.ws_col) } else { DEFAULT }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_signed() {
        let l = Local { date: "2026-11-20T16:00:00".into(), offset_minutes: -210 };
        assert_eq!(l.iso(7), "2026-11-20T16:00:00.000007-03:30");
        assert_eq!(l.spaced(), "2026-11-20 16:00:00 -0330");
        assert_eq!(Local::utc(1_000_000_000), "2001-09-09T01:46:40Z");
    }
}
