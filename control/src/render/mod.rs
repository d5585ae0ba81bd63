//! The reference's output formats: `status`, `status --json`, `events2`, `show`.

mod events;
mod json;
mod show;
mod text;

pub use events::EventPrinter;
pub use json::status_json;
pub use show::{show, show_json};
pub use text::{TextOptions, status_text};

use crate::{DeviceStatistics, DeviceStatus, PeerDeviceStatus};

/// Shown as remaining seconds when nothing moves.
const ETA_NEVER: u64 = 987_654_321;

/// Derived progress of a resync or verify (`spec/cli.md` §12.2, formulas).
struct Progress {
    done_percent: f64,
    rate_dt0: f64,
    rate_dt1: f64,
    rate_all: f64,
    /// Seconds; `None` if nothing moved.
    eta_seconds: Option<u64>,
    /// No time has passed since the start, or nothing moved: printed as `nan` in texts.
    eta_known: bool,
}

#[allow(clippy::cast_precision_loss)]
fn float(n: u64) -> f64 {
    n as f64
}

/// Sectors per millisecond in MiB/s.
fn rate(sectors: u64, ms: u64) -> f64 {
    if ms == 0 { 0.0 } else { float(sectors) / float(ms) * 1000.0 / 2048.0 }
}

fn progress(pd: &PeerDeviceStatus) -> Option<Progress> {
    let sync = pd.sync.as_ref()?;
    let left = match &sync.verify {
        Some(v) => v.ov_left,
        None => (pd.out_of_sync * 2).saturating_sub(sync.rs_failed),
    };
    let total = sync.rs_total;
    let done = total.saturating_sub(left);
    let done_percent = if total == 0 { 100.0 } else { float(done) * 100.0 / float(total) };
    let eta_seconds = (sync.rs_db1_sectors > 0).then(|| {
        let ms = u128::from(sync.rs_dt1_ms) * u128::from(left) / u128::from(sync.rs_db1_sectors);
        u64::try_from(ms / 1000).unwrap_or(ETA_NEVER)
    });
    Some(Progress {
        done_percent,
        rate_dt0: rate(sync.rs_db0_sectors, sync.rs_dt0_ms),
        rate_dt1: rate(sync.rs_db1_sectors, sync.rs_dt1_ms),
        rate_all: rate(done, sync.rs_dt_start_ms.saturating_sub(sync.rs_paused_ms)),
        eta_seconds,
        eta_known: eta_seconds.is_some(),
    })
}

/// `done:` of a peer device that syncs or verifies.
fn done_percent(pd: &PeerDeviceStatus) -> Option<f64> {
    if !pd.replication_state.is_syncing() {
        return None;
    }
    progress(pd).map(|p| p.done_percent).or(pd.resync_done_percent)
}

/// `eta:` and `dbdt1:` as texts print them.
fn rate_and_eta(p: &Progress) -> (String, String) {
    let eta = match p.eta_seconds {
        Some(s) if p.eta_known => s.to_string(),
        _ => "nan".to_owned(),
    };
    (format!("{:.2}", p.rate_dt1), eta)
}

fn yes_no(on: bool) -> &'static str {
    if on { "yes" } else { "no" }
}

fn blocked_text(s: &DeviceStatistics) -> &'static str {
    match (s.blocked_upper, s.blocked_lower) {
        (true, true) => "upper,lower",
        (true, false) => "upper",
        (false, true) => "lower",
        (false, false) => "no",
    }
}

fn backing_dev(device: &DeviceStatus) -> &str {
    device.backing_dev.as_deref().unwrap_or("none")
}
