//! Data only: one line per option, in the order of spec/drbd-conf.md §10 (which is the order the
//! reference lists them in when it meets an unknown one).

use super::{Class, Kind, OptionSpec, Unit};

pub(super) const TABLE: &[OptionSpec] = &[
    // Net
    OptionSpec { name: "transport", class: Class::Net, kind: Kind::Text { max_len: 63 } },
    OptionSpec { name: "load-balance-paths", class: Class::Net, kind: Kind::Bool { default: false } },
    OptionSpec {
        name: "protocol",
        class: Class::Net,
        kind: Kind::Enum { words: &["A", "B", "C"], default: "C" },
    },
    OptionSpec {
        name: "timeout",
        class: Class::Net,
        kind: Kind::Number { min: 1, max: 600, default: 60, unit: Unit::Deciseconds, clamps: false },
    },
    OptionSpec {
        name: "max-epoch-size",
        class: Class::Net,
        kind: Kind::Number { min: 1, max: 20000, default: 2048, unit: Unit::Plain, clamps: false },
    },
    OptionSpec {
        name: "connect-int",
        class: Class::Net,
        kind: Kind::Number { min: 1, max: 120, default: 10, unit: Unit::Seconds, clamps: false },
    },
    OptionSpec {
        name: "ping-int",
        class: Class::Net,
        kind: Kind::Number { min: 1, max: 120, default: 10, unit: Unit::Seconds, clamps: false },
    },
    OptionSpec {
        name: "sndbuf-size",
        class: Class::Net,
        kind: Kind::Number { min: 0, max: 134217728, default: 0, unit: Unit::Bytes, clamps: false },
    },
    OptionSpec {
        name: "rcvbuf-size",
        class: Class::Net,
        kind: Kind::Number { min: 0, max: 134217728, default: 0, unit: Unit::Bytes, clamps: false },
    },
    OptionSpec {
        name: "ko-count",
        class: Class::Net,
        kind: Kind::Number { min: 0, max: 200, default: 7, unit: Unit::Plain, clamps: false },
    },
    OptionSpec { name: "allow-two-primaries", class: Class::Net, kind: Kind::Bool { default: false } },
    OptionSpec { name: "cram-hmac-alg", class: Class::Net, kind: Kind::Text { max_len: 63 } },
    OptionSpec { name: "shared-secret", class: Class::Net, kind: Kind::Text { max_len: 63 } },
    OptionSpec {
        name: "after-sb-0pri",
        class: Class::Net,
        kind: Kind::Enum {
            words: &[
                "disconnect",
                "discard-younger-primary",
                "discard-older-primary",
                "discard-zero-changes",
                "discard-least-changes",
                "discard-local",
                "discard-remote",
            ],
            default: "disconnect",
        },
    },
    OptionSpec {
        name: "after-sb-1pri",
        class: Class::Net,
        kind: Kind::Enum {
            words: &[
                "disconnect",
                "consensus",
                "discard-secondary",
                "call-pri-lost-after-sb",
                "violently-as0p",
            ],
            default: "disconnect",
        },
    },
    OptionSpec {
        name: "after-sb-2pri",
        class: Class::Net,
        kind: Kind::Enum {
            words: &["disconnect", "call-pri-lost-after-sb", "violently-as0p"],
            default: "disconnect",
        },
    },
    OptionSpec { name: "always-asbp", class: Class::Net, kind: Kind::Bool { default: false } },
    OptionSpec {
        name: "rr-conflict",
        class: Class::Net,
        kind: Kind::Enum {
            words: &["disconnect", "call-pri-lost", "violently", "retry-connect", "auto-discard"],
            default: "disconnect",
        },
    },
    OptionSpec {
        name: "ping-timeout",
        class: Class::Net,
        kind: Kind::Number { min: 1, max: 300, default: 5, unit: Unit::Deciseconds, clamps: false },
    },
    OptionSpec { name: "data-integrity-alg", class: Class::Net, kind: Kind::Text { max_len: 63 } },
    OptionSpec { name: "tcp-cork", class: Class::Net, kind: Kind::Bool { default: true } },
    OptionSpec {
        name: "on-congestion",
        class: Class::Net,
        kind: Kind::Enum { words: &["block", "pull-ahead", "disconnect"], default: "block" },
    },
    OptionSpec {
        name: "congestion-fill",
        class: Class::Net,
        kind: Kind::Number { min: 0, max: 20971520, default: 0, unit: Unit::Sectors, clamps: false },
    },
    OptionSpec {
        name: "congestion-extents",
        class: Class::Net,
        kind: Kind::Number { min: 67, max: 65534, default: 1237, unit: Unit::Plain, clamps: false },
    },
    OptionSpec { name: "csums-alg", class: Class::Net, kind: Kind::Text { max_len: 63 } },
    OptionSpec { name: "csums-after-crash-only", class: Class::Net, kind: Kind::Bool { default: false } },
    OptionSpec { name: "verify-alg", class: Class::Net, kind: Kind::Text { max_len: 63 } },
    OptionSpec { name: "use-rle", class: Class::Net, kind: Kind::Bool { default: true } },
    OptionSpec {
        name: "socket-check-timeout",
        class: Class::Net,
        kind: Kind::Number { min: 0, max: 300, default: 0, unit: Unit::Plain, clamps: false },
    },
    OptionSpec {
        name: "fencing",
        class: Class::Net,
        kind: Kind::Enum {
            words: &["dont-care", "resource-only", "resource-and-stonith"],
            default: "dont-care",
        },
    },
    OptionSpec {
        name: "max-buffers",
        class: Class::Net,
        kind: Kind::Number { min: 32, max: 131072, default: 2048, unit: Unit::Plain, clamps: false },
    },
    OptionSpec { name: "allow-remote-read", class: Class::Net, kind: Kind::Bool { default: true } },
    OptionSpec { name: "tls", class: Class::Net, kind: Kind::Bool { default: false } },
    OptionSpec { name: "tls-keyring", class: Class::Net, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "tls-privkey", class: Class::Net, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "tls-certificate", class: Class::Net, kind: Kind::Text { max_len: 255 } },
    OptionSpec {
        name: "rdma-ctrl-rcvbuf-size",
        class: Class::Net,
        kind: Kind::Number { min: 0, max: 10485760, default: 0, unit: Unit::Plain, clamps: false },
    },
    OptionSpec {
        name: "rdma-ctrl-sndbuf-size",
        class: Class::Net,
        kind: Kind::Number { min: 0, max: 10485760, default: 0, unit: Unit::Plain, clamps: false },
    },
    OptionSpec { name: "_name", class: Class::Net, kind: Kind::Text { max_len: 63 } },
    // Attach
    OptionSpec {
        name: "size",
        class: Class::Attach,
        kind: Kind::Number { min: 0, max: 2199023255552, default: 0, unit: Unit::Sectors, clamps: false },
    },
    OptionSpec {
        name: "on-io-error",
        class: Class::Attach,
        kind: Kind::Enum { words: &["pass_on", "call-local-io-error", "detach"], default: "detach" },
    },
    OptionSpec { name: "disk-barrier", class: Class::Attach, kind: Kind::Bool { default: false } },
    OptionSpec { name: "disk-flushes", class: Class::Attach, kind: Kind::Bool { default: true } },
    OptionSpec { name: "disk-drain", class: Class::Attach, kind: Kind::Bool { default: true } },
    OptionSpec { name: "md-flushes", class: Class::Attach, kind: Kind::Bool { default: true } },
    OptionSpec { name: "resync-after", class: Class::Attach, kind: Kind::Dependency },
    OptionSpec {
        name: "al-extents",
        class: Class::Attach,
        kind: Kind::Number { min: 67, max: 65534, default: 1237, unit: Unit::Plain, clamps: true },
    },
    OptionSpec { name: "al-updates", class: Class::Attach, kind: Kind::Bool { default: true } },
    OptionSpec {
        name: "discard-zeroes-if-aligned",
        class: Class::Attach,
        kind: Kind::Bool { default: true },
    },
    OptionSpec { name: "disable-write-same", class: Class::Attach, kind: Kind::Bool { default: false } },
    OptionSpec {
        name: "disk-timeout",
        class: Class::Attach,
        kind: Kind::Number { min: 0, max: 6000, default: 0, unit: Unit::Deciseconds, clamps: false },
    },
    OptionSpec {
        name: "read-balancing",
        class: Class::Attach,
        kind: Kind::Enum {
            words: &[
                "prefer-local",
                "prefer-remote",
                "round-robin",
                "least-pending",
                "when-congested-remote",
                "32K-striping",
                "64K-striping",
                "128K-striping",
                "256K-striping",
                "512K-striping",
                "1M-striping",
            ],
            default: "prefer-local",
        },
    },
    OptionSpec {
        name: "rs-discard-granularity",
        class: Class::Attach,
        kind: Kind::Number { min: 0, max: 1048576, default: 0, unit: Unit::Bytes, clamps: false },
    },
    OptionSpec { name: "bitmap", class: Class::Attach, kind: Kind::Bool { default: true } },
    // Device
    OptionSpec {
        name: "max-bio-size",
        class: Class::Device,
        kind: Kind::Number { min: 512, max: 1048576, default: 1048576, unit: Unit::Plain, clamps: false },
    },
    OptionSpec { name: "diskless", class: Class::Device, kind: Kind::Bool { default: false } },
    OptionSpec {
        name: "block-size",
        class: Class::Device,
        kind: Kind::Number { min: 512, max: 4096, default: 512, unit: Unit::Plain, clamps: false },
    },
    OptionSpec {
        name: "discard-granularity",
        class: Class::Device,
        kind: Kind::Number { min: 0, max: 134217728, default: 4294967295, unit: Unit::Plain, clamps: false },
    },
    // PeerDevice
    OptionSpec {
        name: "resync-rate",
        class: Class::PeerDevice,
        kind: Kind::Number { min: 1, max: 8388608, default: 250, unit: Unit::KibPerSecond, clamps: false },
    },
    OptionSpec {
        name: "c-plan-ahead",
        class: Class::PeerDevice,
        kind: Kind::Number { min: 0, max: 300, default: 20, unit: Unit::Deciseconds, clamps: false },
    },
    OptionSpec {
        name: "c-delay-target",
        class: Class::PeerDevice,
        kind: Kind::Number { min: 1, max: 100, default: 10, unit: Unit::Deciseconds, clamps: false },
    },
    OptionSpec {
        name: "c-fill-target",
        class: Class::PeerDevice,
        kind: Kind::Number { min: 0, max: 1048576, default: 100, unit: Unit::Sectors, clamps: false },
    },
    OptionSpec {
        name: "c-max-rate",
        class: Class::PeerDevice,
        kind: Kind::Number { min: 0, max: 4194304, default: 102400, unit: Unit::KibPerSecond, clamps: false },
    },
    OptionSpec {
        name: "c-min-rate",
        class: Class::PeerDevice,
        kind: Kind::Number { min: 0, max: 4194304, default: 250, unit: Unit::KibPerSecond, clamps: false },
    },
    OptionSpec { name: "bitmap", class: Class::PeerDevice, kind: Kind::Bool { default: true } },
    OptionSpec {
        name: "resync-without-replication",
        class: Class::PeerDevice,
        kind: Kind::Bool { default: true },
    },
    OptionSpec { name: "peer-tiebreaker", class: Class::PeerDevice, kind: Kind::Bool { default: true } },
    // Resource
    OptionSpec { name: "cpu-mask", class: Class::Resource, kind: Kind::Text { max_len: 255 } },
    OptionSpec {
        name: "on-no-data-accessible",
        class: Class::Resource,
        kind: Kind::Enum { words: &["io-error", "suspend-io"], default: "io-error" },
    },
    OptionSpec { name: "auto-promote", class: Class::Resource, kind: Kind::Bool { default: true } },
    OptionSpec {
        name: "peer-ack-window",
        class: Class::Resource,
        kind: Kind::Number { min: 2048, max: 204800, default: 4096, unit: Unit::Sectors, clamps: false },
    },
    OptionSpec {
        name: "peer-ack-delay",
        class: Class::Resource,
        kind: Kind::Number { min: 1, max: 10000, default: 100, unit: Unit::Milliseconds, clamps: false },
    },
    OptionSpec {
        name: "twopc-timeout",
        class: Class::Resource,
        kind: Kind::Number { min: 50, max: 600, default: 300, unit: Unit::Deciseconds, clamps: false },
    },
    OptionSpec {
        name: "twopc-retry-timeout",
        class: Class::Resource,
        kind: Kind::Number { min: 1, max: 50, default: 1, unit: Unit::Deciseconds, clamps: false },
    },
    OptionSpec {
        name: "auto-promote-timeout",
        class: Class::Resource,
        kind: Kind::Number { min: 0, max: 600, default: 20, unit: Unit::Deciseconds, clamps: false },
    },
    OptionSpec {
        name: "max-io-depth",
        class: Class::Resource,
        kind: Kind::Number { min: 4, max: 4294967295, default: 8000, unit: Unit::Plain, clamps: false },
    },
    OptionSpec {
        name: "quorum",
        class: Class::Resource,
        kind: Kind::NumberOrWord { min: 1, max: 32, words: &["off", "majority", "all"], default: "off" },
    },
    OptionSpec {
        name: "on-no-quorum",
        class: Class::Resource,
        kind: Kind::Enum { words: &["io-error", "suspend-io"], default: "suspend-io" },
    },
    OptionSpec {
        name: "quorum-minimum-redundancy",
        class: Class::Resource,
        kind: Kind::NumberOrWord { min: 1, max: 32, words: &["off", "majority", "all"], default: "off" },
    },
    OptionSpec {
        name: "on-suspended-primary-outdated",
        class: Class::Resource,
        kind: Kind::Enum { words: &["disconnect", "force-secondary"], default: "disconnect" },
    },
    OptionSpec {
        name: "drbd8-api-compatibility",
        class: Class::Resource,
        kind: Kind::Bool { default: false },
    },
    // Startup
    OptionSpec {
        name: "wfc-timeout",
        class: Class::Startup,
        kind: Kind::Number { min: 0, max: 300000, default: 0, unit: Unit::Seconds, clamps: false },
    },
    OptionSpec {
        name: "degr-wfc-timeout",
        class: Class::Startup,
        kind: Kind::Number { min: 0, max: 300000, default: 0, unit: Unit::Seconds, clamps: false },
    },
    OptionSpec {
        name: "outdated-wfc-timeout",
        class: Class::Startup,
        kind: Kind::Number { min: 0, max: 300000, default: 0, unit: Unit::Seconds, clamps: false },
    },
    OptionSpec { name: "wait-after-sb", class: Class::Startup, kind: Kind::Bool { default: false } },
    // Handler
    OptionSpec { name: "pri-on-incon-degr", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "pri-lost-after-sb", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "pri-lost", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "initial-split-brain", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "split-brain", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "outdate-peer", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "fence-peer", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "unfence-peer", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "local-io-error", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "before-resync-target", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "after-resync-target", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "before-resync-source", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "out-of-sync", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "quorum-lost", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    OptionSpec { name: "disconnected", class: Class::Handler, kind: Kind::Text { max_len: 255 } },
    // Proxy
    OptionSpec {
        name: "memlimit",
        class: Class::Proxy,
        kind: Kind::Number { min: 0, max: u64::MAX, default: 0, unit: Unit::Plain, clamps: false },
    },
    OptionSpec {
        name: "read-loops",
        class: Class::Proxy,
        kind: Kind::Number { min: 0, max: u64::MAX, default: 0, unit: Unit::Plain, clamps: false },
    },
    OptionSpec {
        name: "compression",
        class: Class::Proxy,
        kind: Kind::Number { min: 0, max: u64::MAX, default: 0, unit: Unit::Plain, clamps: false },
    },
    OptionSpec {
        name: "bwlimit",
        class: Class::Proxy,
        kind: Kind::Number { min: 0, max: u64::MAX, default: 0, unit: Unit::Plain, clamps: false },
    },
    OptionSpec {
        name: "sndbuf-size",
        class: Class::Proxy,
        kind: Kind::Number { min: 0, max: 134217728, default: 0, unit: Unit::Bytes, clamps: false },
    },
    OptionSpec {
        name: "rcvbuf-size",
        class: Class::Proxy,
        kind: Kind::Number { min: 0, max: 134217728, default: 0, unit: Unit::Bytes, clamps: false },
    },
    OptionSpec {
        name: "ping-timeout",
        class: Class::Proxy,
        kind: Kind::Number { min: 1, max: 300, default: 5, unit: Unit::Deciseconds, clamps: false },
    },
    // Global
    OptionSpec {
        name: "usage-count",
        class: Class::Global,
        kind: Kind::Enum { words: &["yes", "no", "ask"], default: "ask" },
    },
    OptionSpec {
        name: "minor-count",
        class: Class::Global,
        kind: Kind::Number { min: 1, max: 255, default: 0, unit: Unit::Plain, clamps: false },
    },
    OptionSpec {
        name: "dialog-refresh",
        class: Class::Global,
        kind: Kind::Number { min: 0, max: 600, default: 1, unit: Unit::Seconds, clamps: false },
    },
    OptionSpec { name: "disable-ip-verification", class: Class::Global, kind: Kind::Bool { default: false } },
    OptionSpec { name: "udev-always-use-vnr", class: Class::Global, kind: Kind::Bool { default: false } },
    OptionSpec {
        name: "cmd-timeout-short",
        class: Class::Global,
        kind: Kind::Number { min: 0, max: 900, default: 5, unit: Unit::Seconds, clamps: false },
    },
    OptionSpec {
        name: "cmd-timeout-medium",
        class: Class::Global,
        kind: Kind::Number { min: 0, max: 900, default: 121, unit: Unit::Seconds, clamps: false },
    },
    OptionSpec {
        name: "cmd-timeout-long",
        class: Class::Global,
        kind: Kind::Number { min: 0, max: 900, default: 600, unit: Unit::Seconds, clamps: false },
    },
];
