//! Option strings become the typed configuration of the core.
//!
//! Every option of the table in `palisade-conf` is decided here: it is used, or its default is the only
//! value taken. What would have no effect is refused by name, never ignored.

use crate::core_api::{
    AfterSb, DigestAlg, DiskConfig, Fencing, HmacAlg, NetConfig, OnIoError, OnNoData, OnNoQuorum,
    OnSuspendedPrimaryOutdated, PeerDeviceConfig, QuorumOption, RateConfig, ReadBalancing, ResourceConfig,
    RrConflict, Secret,
};
use palisade_conf::options::{Canonical, Class, find_in, nearest};
use palisade_control::{Options, Refusal, code};
use palisade_wire::enums::WireProtocol;
use std::time::Duration;

/// Options this engine acts on, whatever their value.
const USED: &[(Class, &[&str])] = &[
    (
        Class::Net,
        &[
            "protocol",
            "timeout",
            "max-epoch-size",
            "connect-int",
            "ping-int",
            "sndbuf-size",
            "rcvbuf-size",
            "ko-count",
            "allow-two-primaries",
            "cram-hmac-alg",
            "shared-secret",
            "after-sb-0pri",
            "after-sb-1pri",
            "after-sb-2pri",
            "always-asbp",
            "rr-conflict",
            "ping-timeout",
            "data-integrity-alg",
            "use-rle",
            "socket-check-timeout",
            "max-buffers",
            "allow-remote-read",
            "_name",
            // Packets of one turn of the loop leave together either way.
            "tcp-cork",
        ],
    ),
    (
        Class::Attach,
        &[
            "size",
            "on-io-error",
            "disk-flushes",
            "disk-drain",
            "md-flushes",
            "al-extents",
            "al-updates",
            "discard-zeroes-if-aligned",
            // This engine never sends WRITE_SAME.
            "disable-write-same",
        ],
    ),
    (Class::Device, &["diskless"]),
    (
        Class::PeerDevice,
        &[
            "resync-rate",
            "c-plan-ahead",
            "c-delay-target",
            "c-fill-target",
            "c-max-rate",
            "c-min-rate",
            "bitmap",
            "peer-tiebreaker",
        ],
    ),
    (
        Class::Resource,
        &[
            "on-no-data-accessible",
            "auto-promote",
            "peer-ack-window",
            "peer-ack-delay",
            "twopc-timeout",
            "twopc-retry-timeout",
            "auto-promote-timeout",
            "quorum",
            "on-no-quorum",
            "quorum-minimum-redundancy",
            "on-suspended-primary-outdated",
        ],
    ),
];

/// Values besides the default of options that are only partly supported.
const USED_VALUES: &[(Class, &str, &[&str])] = &[
    (Class::Net, "transport", &["tcp"]),
    (Class::Attach, "read-balancing", &["prefer-remote", "round-robin"]),
];

/// The options in force after `given` came: on top of `current`, or of the defaults.
#[must_use]
pub fn merge(current: &Options, given: &Options, set_defaults: bool) -> Options {
    let mut out = if set_defaults { Options::new() } else { current.clone() };
    for (name, value) in given.iter() {
        out.set(name, value);
    }
    out
}

fn refuse(why: String) -> Refusal {
    Refusal::new(code::INVALID_REQUEST).with_info(why)
}

/// Checked options of one class, with defaults.
struct Values<'a> {
    class: Class,
    options: &'a Options,
}

impl<'a> Values<'a> {
    /// Checks names, ranges, and whether the engine does what is asked for.
    fn check(class: Class, options: &'a Options) -> Result<Self, Refusal> {
        for (name, value) in options.iter() {
            let Some(spec) = find_in(class, name) else {
                let hint = nearest(name).map(|n| format!(" Did you mean '{}'?", n.name)).unwrap_or_default();
                return Err(refuse(format!("'{name}' is not an option here.{hint}")));
            };
            let given = spec.validate(value).map_err(|e| {
                let shown = if spec.is_secret() { "(hidden)" } else { value };
                refuse(format!("The value '{shown}' of option '{name}' is {e}"))
            })?;
            let used = USED.iter().any(|(c, names)| *c == class && names.contains(&name));
            let partly =
                USED_VALUES.iter().any(|(c, n, values)| *c == class && *n == name && values.contains(&value));
            if !used && !partly && given != spec.default() {
                let default = spec.default().to_string();
                let instead = if default.is_empty() {
                    "leave it out".to_owned()
                } else {
                    format!("set it to '{default}'")
                };
                return Err(refuse(format!(
                    "This engine does not support option '{name}' with value '{value}' yet; {instead}."
                )));
            }
        }
        Ok(Self { class, options })
    }

    fn value(&self, name: &str) -> Option<Canonical> {
        let spec = find_in(self.class, name)?;
        Some(self.options.get(name).and_then(|v| spec.validate(v).ok()).unwrap_or_else(|| spec.default()))
    }

    fn text(&self, name: &str) -> String {
        self.value(name).map(|v| v.to_string()).unwrap_or_default()
    }

    fn flag(&self, name: &str) -> bool {
        self.value(name) == Some(Canonical::Bool(true))
    }

    fn number(&self, name: &str) -> u64 {
        match self.value(name) {
            Some(Canonical::Number(n)) => n,
            _ => 0,
        }
    }

    fn small(&self, name: &str) -> u32 {
        u32::try_from(self.number(name)).unwrap_or(u32::MAX)
    }

    fn deciseconds(&self, name: &str) -> Duration {
        Duration::from_millis(100 * self.number(name))
    }

    fn seconds(&self, name: &str) -> Duration {
        Duration::from_secs(self.number(name))
    }
}

fn quorum(text: &str) -> QuorumOption {
    match text {
        "majority" => QuorumOption::Majority,
        "all" => QuorumOption::All,
        _ => text.parse().map_or(QuorumOption::Off, QuorumOption::Nodes),
    }
}

/// Resource options.
///
/// # Errors
/// An unknown, impossible or unsupported option, by name.
pub fn resource(options: &Options) -> Result<ResourceConfig, Refusal> {
    let v = Values::check(Class::Resource, options)?;
    Ok(ResourceConfig {
        quorum: quorum(&v.text("quorum")),
        quorum_minimum_redundancy: quorum(&v.text("quorum-minimum-redundancy")),
        on_no_quorum: match v.text("on-no-quorum").as_str() {
            "io-error" => OnNoQuorum::IoError,
            _ => OnNoQuorum::SuspendIo,
        },
        on_no_data: match v.text("on-no-data-accessible").as_str() {
            "suspend-io" => OnNoData::SuspendIo,
            _ => OnNoData::IoError,
        },
        on_suspended_primary_outdated: match v.text("on-suspended-primary-outdated").as_str() {
            "force-secondary" => OnSuspendedPrimaryOutdated::ForceSecondary,
            _ => OnSuspendedPrimaryOutdated::Disconnect,
        },
        auto_promote: v.flag("auto-promote"),
        auto_promote_timeout: v.deciseconds("auto-promote-timeout"),
        twopc_timeout: v.deciseconds("twopc-timeout"),
        twopc_retry_timeout: v.deciseconds("twopc-retry-timeout"),
        peer_ack_window_sectors: v.number("peer-ack-window"),
        peer_ack_delay: Duration::from_millis(v.number("peer-ack-delay")),
    })
}

/// What the transport needs from the net options.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    /// `connect-int`.
    pub connect_int: Duration,
    /// `ping-timeout`.
    pub ping_timeout: Duration,
    /// `socket-check-timeout`, or `ping-timeout` when that is 0.
    pub check: Duration,
    /// `timeout`.
    pub timeout: Duration,
    /// `ko-count`.
    pub ko_count: u32,
    /// `sndbuf-size`, bytes; 0 is the system's choice.
    pub sndbuf: u32,
    /// `rcvbuf-size`, bytes; 0 is the system's choice.
    pub rcvbuf: u32,
}

/// Net options. `tiebreaker` comes from the peer-device options.
///
/// # Errors
/// An unknown, impossible or unsupported option, by name.
pub fn net(options: &Options, tiebreaker: bool) -> Result<(NetConfig, Transport), Refusal> {
    let v = Values::check(Class::Net, options)?;
    let (alg, secret) = (v.text("cram-hmac-alg"), v.text("shared-secret"));
    let auth = if alg.is_empty() {
        None
    } else {
        HmacAlg::parse(&alg).map_err(|e| Refusal::new(code::AUTH_ALG).with_info(e.to_string()))?;
        if secret.is_empty() {
            return Err(refuse(
                "'cram-hmac-alg' is set without 'shared-secret'; set both or none.".to_owned(),
            ));
        }
        Some((alg, Secret::new(secret)))
    };
    let integrity = Some(v.text("data-integrity-alg")).filter(|a| !a.is_empty());
    if let Some(alg) = &integrity {
        DigestAlg::parse(alg).map_err(|e| Refusal::new(code::INTEGRITY_ALG).with_info(e.to_string()))?;
    }
    let ping_timeout = v.deciseconds("ping-timeout");
    let check = v.deciseconds("socket-check-timeout");
    let transport = Transport {
        connect_int: v.seconds("connect-int"),
        ping_timeout,
        check: if check.is_zero() { ping_timeout } else { check },
        timeout: v.deciseconds("timeout"),
        ko_count: v.small("ko-count"),
        sndbuf: v.small("sndbuf-size"),
        rcvbuf: v.small("rcvbuf-size"),
    };
    let config = NetConfig {
        protocol: match v.text("protocol").as_str() {
            "A" => WireProtocol::A,
            "B" => WireProtocol::B,
            _ => WireProtocol::C,
        },
        auth,
        integrity_alg: integrity,
        two_primaries: v.flag("allow-two-primaries"),
        after_sb_0pri: after_sb(&v.text("after-sb-0pri")),
        after_sb_1pri: after_sb(&v.text("after-sb-1pri")),
        after_sb_2pri: after_sb(&v.text("after-sb-2pri")),
        always_asbp: v.flag("always-asbp"),
        rr_conflict: match v.text("rr-conflict").as_str() {
            "retry-connect" => RrConflict::RetryConnect,
            "call-pri-lost" => RrConflict::CallPriLost,
            "violently" => RrConflict::Violently,
            "auto-discard" => RrConflict::AutoDiscard,
            _ => RrConflict::Disconnect,
        },
        fencing: Fencing::DontCare,
        ping_int: v.seconds("ping-int"),
        ping_timeout,
        timeout: transport.timeout,
        ko_count: transport.ko_count,
        connect_int: transport.connect_int,
        max_epoch_size: v.small("max-epoch-size"),
        max_buffers: v.small("max-buffers"),
        use_rle: v.flag("use-rle"),
        allow_remote_read: v.flag("allow-remote-read"),
        tiebreaker,
    };
    Ok((config, transport))
}

fn after_sb(text: &str) -> AfterSb {
    match text {
        "discard-younger-primary" => AfterSb::DiscardYoungerPrimary,
        "discard-older-primary" => AfterSb::DiscardOlderPrimary,
        "discard-zero-changes" => AfterSb::DiscardZeroChanges,
        "discard-least-changes" => AfterSb::DiscardLeastChanges,
        "discard-local" => AfterSb::DiscardLocal,
        "discard-remote" => AfterSb::DiscardRemote,
        "consensus" => AfterSb::Consensus,
        "discard-secondary" => AfterSb::DiscardSecondary,
        "call-pri-lost-after-sb" => AfterSb::CallPriLostAfterSb,
        "violently-as0p" => AfterSb::ViolentlyAs0p,
        _ => AfterSb::Disconnect,
    }
}

/// Disk options, and `md-flushes`.
///
/// # Errors
/// An unknown, impossible or unsupported option, by name.
pub fn disk(options: &Options) -> Result<(DiskConfig, bool), Refusal> {
    let v = Values::check(Class::Attach, options)?;
    let config = DiskConfig {
        size_sectors: v.number("size"),
        on_io_error: match v.text("on-io-error").as_str() {
            "pass_on" => OnIoError::PassOn,
            "call-local-io-error" => OnIoError::CallLocalIoError,
            _ => OnIoError::Detach,
        },
        disk_flushes: v.flag("disk-flushes"),
        disk_drain: v.flag("disk-drain"),
        al_extents: u16::try_from(v.number("al-extents").clamp(67, 65534)).unwrap_or(65534),
        al_updates: v.flag("al-updates"),
        discard_zeroes_if_aligned: v.flag("discard-zeroes-if-aligned"),
        read_balancing: match v.text("read-balancing").as_str() {
            "prefer-remote" => ReadBalancing::PreferRemote,
            "round-robin" => ReadBalancing::RoundRobin,
            _ => ReadBalancing::PreferLocal,
        },
    };
    Ok((config, v.flag("md-flushes")))
}

/// Device options: whether the volume is intentionally diskless.
///
/// # Errors
/// An unknown, impossible or unsupported option, by name.
pub fn device(options: &Options) -> Result<bool, Refusal> {
    Values::check(Class::Device, options).map(|v| v.flag("diskless"))
}

/// What the peer-device options say.
#[derive(Clone, Debug)]
pub struct PeerDevice {
    /// For the core.
    pub config: PeerDeviceConfig,
    /// `bitmap`: the peer has a disk.
    pub diskful: bool,
    /// `peer-tiebreaker`.
    pub tiebreaker: bool,
}

/// Peer-device options.
///
/// # Errors
/// An unknown, impossible or unsupported option, by name.
pub fn peer_device(options: &Options) -> Result<PeerDevice, Refusal> {
    let v = Values::check(Class::PeerDevice, options)?;
    let rate = RateConfig {
        plan_ahead: v.small("c-plan-ahead"),
        delay_target: v.small("c-delay-target"),
        fill_target: v.small("c-fill-target"),
        max_rate: v.small("c-max-rate"),
        min_rate: v.small("c-min-rate"),
        resync_rate: v.small("resync-rate"),
    };
    let (diskful, tiebreaker) = (v.flag("bitmap"), v.flag("peer-tiebreaker"));
    Ok(PeerDevice { config: PeerDeviceConfig { rate }, diskful, tiebreaker })
}

#[cfg(test)]
mod tests {
    use super::*;
    use palisade_conf::options::table;

    fn of(pairs: &[(&str, &str)]) -> Options {
        pairs.iter().copied().collect()
    }

    #[test]
    fn nothing_given_is_the_cores_default() {
        let none = Options::new();
        let debug = |x: &dyn std::fmt::Debug| format!("{x:?}");
        assert_eq!(debug(&resource(&none).unwrap()), debug(&ResourceConfig::default()));
        assert_eq!(debug(&net(&none, true).unwrap().0), debug(&NetConfig::default()));
        assert_eq!(debug(&disk(&none).unwrap().0), debug(&DiskConfig::default()));
        assert_eq!(debug(&peer_device(&none).unwrap().config), debug(&PeerDeviceConfig::default()));
    }

    #[test]
    fn every_name_of_the_lists_is_an_option() {
        for (class, names) in USED {
            for name in *names {
                assert!(find_in(*class, name).is_some(), "{name}");
            }
        }
        for spec in table() {
            let value = spec.default().to_string();
            if matches!(spec.class, Class::Net) && !value.is_empty() {
                net(&of(&[(spec.name, &value)]), true).unwrap();
            }
        }
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        for (name, value) in [
            ("verify-alg", "sha1"),
            ("csums-alg", "sha1"),
            ("on-congestion", "pull-ahead"),
            ("fencing", "resource-only"),
            ("tls", "yes"),
            ("transport", "rdma"),
            ("load-balance-paths", "yes"),
            ("timeout", "601"),
            ("timeout", "x"),
            ("no-such-option", "1"),
        ] {
            let refusal = net(&of(&[(name, value)]), true).unwrap_err();
            assert!(refusal.info[0].contains(name), "{refusal:?}");
        }
        assert!(net(&of(&[("transport", "tcp")]), true).is_ok());
        assert!(disk(&of(&[("resync-after", "3")])).is_err());
        assert!(disk(&of(&[("disk-barrier", "yes")])).is_err());
        assert!(device(&of(&[("max-bio-size", "4096")])).is_err());
        assert!(device(&of(&[("diskless", "yes")])).unwrap());
        assert!(!device(&of(&[])).unwrap());
        let secret = net(&of(&[("shared-secret", &"x".repeat(99))]), true).unwrap_err();
        assert!(!format!("{secret:?}").contains("xxx"));
    }

    #[test]
    fn values_arrive() {
        let given = of(&[("quorum", "majority"), ("on-no-quorum", "io-error"), ("twopc-timeout", "50")]);
        let r = resource(&given).unwrap();
        assert_eq!((r.quorum, r.on_no_quorum), (QuorumOption::Majority, OnNoQuorum::IoError));
        assert_eq!(r.twopc_timeout, Duration::from_secs(5));
        assert_eq!(resource(&of(&[("quorum", "2")])).unwrap().quorum, QuorumOption::Nodes(2));
        let (n, t) =
            net(&of(&[("cram-hmac-alg", "sha256"), ("shared-secret", "s"), ("ping-timeout", "7")]), true)
                .unwrap();
        assert!(n.auth.is_some());
        assert_eq!(t.check, Duration::from_millis(700));
        assert!(net(&of(&[("cram-hmac-alg", "sha256")]), true).is_err());
        assert_eq!(net(&of(&[("cram-hmac-alg", "rot13")]), true).unwrap_err().code, code::AUTH_ALG);
    }
}
