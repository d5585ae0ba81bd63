//! The options scenarios may set, by their names in drbd.conf.

use crate::node::NodeConfig;
use palisade_core::auth::Secret;
use palisade_core::config::{
    AfterSb, Fencing, NetConfig, OnIoError, OnNoData, OnNoQuorum, OnSuspendedPrimaryOutdated, QuorumOption,
    ReadBalancing, RrConflict,
};
use palisade_wire::enums::WireProtocol;
use std::time::Duration;

fn number(v: &str) -> Result<u32, String> {
    v.parse().map_err(|_| format!("'{v}' is no number"))
}

fn yes(v: &str) -> Result<bool, String> {
    match v {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err(format!("'{v}' is neither yes nor no")),
    }
}

fn one<T: Copy>(v: &str, all: &[(&str, T)]) -> Result<T, String> {
    all.iter().find(|(n, _)| *n == v).map(|x| x.1).ok_or_else(|| format!("'{v}' is not possible here"))
}

fn quorum(v: &str) -> Result<QuorumOption, String> {
    Ok(match v {
        "off" => QuorumOption::Off,
        "majority" => QuorumOption::Majority,
        "all" => QuorumOption::All,
        n => QuorumOption::Nodes(number(n)? as u8),
    })
}

fn after_sb(v: &str) -> Result<AfterSb, String> {
    (0..=20u8)
        .filter_map(AfterSb::from_u8)
        .find(|a| a.name() == v)
        .ok_or_else(|| format!("'{v}' is no after-split-brain policy"))
}

/// Sets an option.
///
/// # Errors
/// Unknown name or value.
pub fn set(c: &mut NodeConfig, key: &str, value: &str) -> Result<(), String> {
    let seconds = |v: &str| number(v).map(|n| Duration::from_secs(n.into()));
    let tenths = |v: &str| number(v).map(|n| Duration::from_millis(u64::from(n) * 100));
    match key {
        "quorum" => c.resource.quorum = quorum(value)?,
        "quorum-minimum-redundancy" => c.resource.quorum_minimum_redundancy = quorum(value)?,
        "on-no-quorum" => {
            c.resource.on_no_quorum =
                one(value, &[("io-error", OnNoQuorum::IoError), ("suspend-io", OnNoQuorum::SuspendIo)])?;
        }
        "on-no-data-accessible" => {
            c.resource.on_no_data =
                one(value, &[("io-error", OnNoData::IoError), ("suspend-io", OnNoData::SuspendIo)])?;
        }
        "on-suspended-primary-outdated" => {
            c.resource.on_suspended_primary_outdated = one(
                value,
                &[
                    ("disconnect", OnSuspendedPrimaryOutdated::Disconnect),
                    ("force-secondary", OnSuspendedPrimaryOutdated::ForceSecondary),
                ],
            )?;
        }
        "twopc-timeout" => c.resource.twopc_timeout = tenths(value)?,
        "twopc-retry-timeout" => c.resource.twopc_retry_timeout = tenths(value)?,
        "auto-promote" => c.resource.auto_promote = yes(value)?,
        "al-extents" => c.disk.al_extents = number(value)? as u16,
        "al-updates" => c.disk.al_updates = yes(value)?,
        "disk-flushes" => c.disk.disk_flushes = yes(value)?,
        "on-io-error" => {
            c.disk.on_io_error = one(
                value,
                &[
                    ("pass_on", OnIoError::PassOn),
                    ("call-local-io-error", OnIoError::CallLocalIoError),
                    ("detach", OnIoError::Detach),
                ],
            )?;
        }
        "read-balancing" => {
            c.disk.read_balancing = one(
                value,
                &[
                    ("prefer-local", ReadBalancing::PreferLocal),
                    ("prefer-remote", ReadBalancing::PreferRemote),
                    ("round-robin", ReadBalancing::RoundRobin),
                ],
            )?;
        }
        "c-max-rate" => c.peer_device.rate.max_rate = number(value)?,
        "c-min-rate" => c.peer_device.rate.min_rate = number(value)?,
        "resync-rate" => {
            c.peer_device.rate.plan_ahead = 0;
            c.peer_device.rate.resync_rate = number(value)?;
        }
        _ => {
            for net in &mut c.net {
                set_net(net, key, value, &seconds, &tenths)?;
            }
        }
    }
    Ok(())
}

fn set_net(
    net: &mut NetConfig,
    key: &str,
    value: &str,
    seconds: &dyn Fn(&str) -> Result<Duration, String>,
    tenths: &dyn Fn(&str) -> Result<Duration, String>,
) -> Result<(), String> {
    match key {
        "protocol" => {
            net.protocol =
                one(value, &[("A", WireProtocol::A), ("B", WireProtocol::B), ("C", WireProtocol::C)])?;
        }
        "shared-secret" => net.auth = Some(("sha256".into(), Secret::new(value))),
        "data-integrity-alg" => net.integrity_alg = Some(value.into()),
        "allow-two-primaries" => net.two_primaries = yes(value)?,
        "after-sb-0pri" => net.after_sb_0pri = after_sb(value)?,
        "after-sb-1pri" => net.after_sb_1pri = after_sb(value)?,
        "after-sb-2pri" => net.after_sb_2pri = after_sb(value)?,
        "always-asbp" => net.always_asbp = yes(value)?,
        "rr-conflict" => {
            net.rr_conflict = one(
                value,
                &[
                    ("disconnect", RrConflict::Disconnect),
                    ("retry-connect", RrConflict::RetryConnect),
                    ("call-pri-lost", RrConflict::CallPriLost),
                    ("violently", RrConflict::Violently),
                    ("auto-discard", RrConflict::AutoDiscard),
                ],
            )?;
        }
        "fencing" => {
            net.fencing = one(
                value,
                &[
                    ("dont-care", Fencing::DontCare),
                    ("resource-only", Fencing::ResourceOnly),
                    ("resource-and-stonith", Fencing::ResourceAndStonith),
                ],
            )?;
        }
        "ping-int" => net.ping_int = seconds(value)?,
        "ping-timeout" => net.ping_timeout = tenths(value)?,
        "timeout" => net.timeout = tenths(value)?,
        "ko-count" => net.ko_count = number(value)?,
        "max-epoch-size" => net.max_epoch_size = number(value)?,
        "max-buffers" => net.max_buffers = number(value)?,
        "use-rle" => net.use_rle = yes(value)?,
        "allow-remote-read" => net.allow_remote_read = yes(value)?,
        "tiebreaker" => net.tiebreaker = yes(value)?,
        _ => return Err(format!("there is no option '{key}' here")),
    }
    Ok(())
}
