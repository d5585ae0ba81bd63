//! Refusals: numbers, texts and exit codes (`spec/cli.md` §16, `spec/state-machine.md` §2 and §3).

use serde::{Deserialize, Serialize};

/// Numbers of the refusals an engine gives.
#[allow(missing_docs)]
pub mod code {
    pub const UNKNOWN_ERROR: i32 = 0;
    pub const TWO_PRIMARIES: i32 = -1;
    pub const NO_UP_TO_DATE_DISK: i32 = -2;
    pub const NO_LOCAL_DISK: i32 = -4;
    pub const NO_REMOTE_DISK: i32 = -5;
    pub const CONNECTED_OUTDATES: i32 = -6;
    pub const PRIMARY_NOP: i32 = -7;
    pub const RESYNC_RUNNING: i32 = -8;
    pub const ALREADY_STANDALONE: i32 = -9;
    pub const CW_FAILED_BY_PEER: i32 = -10;
    pub const IS_DISKLESS: i32 = -11;
    pub const DEVICE_IN_USE: i32 = -12;
    pub const NO_NET_CONFIG: i32 = -13;
    pub const NO_VERIFY_ALG: i32 = -14;
    pub const NEED_CONNECTION: i32 = -15;
    pub const LOWER_THAN_OUTDATED: i32 = -16;
    pub const NOT_SUPPORTED: i32 = -17;
    pub const IN_TRANSIENT_STATE: i32 = -18;
    pub const CONCURRENT_ST_CHG: i32 = -19;
    pub const O_VOL_PEER_PRI: i32 = -20;
    pub const INTERRUPTED: i32 = -21;
    pub const PRIMARY_READER: i32 = -22;
    pub const TIMEOUT: i32 = -23;
    pub const WEAKLY_CONNECTED: i32 = -24;
    pub const NO_QUORUM: i32 = -25;
    pub const ATTACH_NO_BITMAP: i32 = -26;
    pub const HANDSHAKE_DISCONNECT: i32 = -27;
    pub const HANDSHAKE_RETRY: i32 = -28;
    pub const LOCAL_ADDR_IN_USE: i32 = 102;
    pub const REMOTE_ADDR_IN_USE: i32 = 103;
    pub const OPEN_DISK: i32 = 104;
    pub const OPEN_MD_DISK: i32 = 105;
    pub const DISK_NOT_BDEV: i32 = 107;
    pub const MD_NOT_BDEV: i32 = 108;
    pub const DISK_TOO_SMALL: i32 = 111;
    pub const MD_DISK_TOO_SMALL: i32 = 112;
    pub const DISK_CLAIMED: i32 = 114;
    pub const MD_DISK_CLAIMED: i32 = 115;
    pub const MD_IDX_INVALID: i32 = 116;
    pub const IO_MD_DISK: i32 = 118;
    pub const MD_INVALID: i32 = 119;
    pub const AUTH_ALG: i32 = 120;
    pub const NO_MEMORY: i32 = 122;
    pub const DISCARD_IMPOSSIBLE: i32 = 123;
    pub const DISK_CONFIGURED: i32 = 124;
    pub const NET_CONFIGURED: i32 = 125;
    pub const MANDATORY_TAG: i32 = 126;
    pub const MINOR_INVALID: i32 = 127;
    pub const INVALID_STATE: i32 = 128;
    pub const RESIZE_RESYNC: i32 = 130;
    pub const NO_PRIMARY: i32 = 131;
    pub const RESYNC_AFTER: i32 = 132;
    pub const RESYNC_AFTER_CYCLE: i32 = 133;
    pub const PAUSE_IS_SET: i32 = 134;
    pub const PAUSE_IS_CLEAR: i32 = 135;
    pub const PACKET_NR: i32 = 137;
    pub const NO_DISK: i32 = 138;
    pub const NOT_PROTO_C: i32 = 139;
    pub const INTEGRITY_ALG: i32 = 141;
    pub const CSUMS_ALG: i32 = 144;
    pub const VERIFY_ALG: i32 = 146;
    pub const CSUMS_RESYNC_RUNNING: i32 = 148;
    pub const VERIFY_RUNNING: i32 = 149;
    pub const DATA_NOT_CURRENT: i32 = 150;
    pub const CONNECTED: i32 = 151;
    pub const PERM: i32 = 152;
    pub const STONITH_AND_PROT_A: i32 = 154;
    pub const CONG_NOT_PROTO_A: i32 = 155;
    pub const PIC_AFTER_DEP: i32 = 156;
    pub const PIC_PEER_DEP: i32 = 157;
    pub const RES_NOT_KNOWN: i32 = 158;
    pub const RES_IN_USE: i32 = 159;
    pub const MINOR_CONFIGURED: i32 = 160;
    pub const MINOR_OR_VOLUME_EXISTS: i32 = 161;
    pub const INVALID_REQUEST: i32 = 162;
    pub const NEED_ALLOW_TWO_PRI: i32 = 164;
    pub const MD_UNCLEAN: i32 = 165;
    pub const MD_LAYOUT_CONNECTED: i32 = 166;
    pub const IMPLICIT_SHRINK: i32 = 170;
    pub const INVALID_PEER_NODE_ID: i32 = 171;
    pub const CREATE_TRANSPORT: i32 = 172;
    pub const LOCAL_AND_PEER_ADDR: i32 = 173;
    pub const ALREADY_EXISTS: i32 = 174;
    pub const APV_TOO_LOW: i32 = 175;
    pub const PATH_COLLISION: i32 = 176;
}

/// An engine's "no": a number of `spec/cli.md` §16, its text, and lines of explanation.
///
/// Negative numbers are refused state changes, 101..176 configuration errors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The number.
    pub code: i32,
    /// The text that belongs to it.
    pub text: String,
    /// Lines printed under `additional info from kernel:`.
    #[serde(default)]
    pub info: Vec<String>,
}

impl Refusal {
    /// The refusal with that number and the reference's text.
    #[must_use]
    pub fn new(code: i32) -> Self {
        Self { code, text: text_of(code).unwrap_or("unknown error.").to_owned(), info: Vec::new() }
    }

    /// Adds a line of explanation.
    #[must_use]
    pub fn with_info(mut self, line: impl Into<String>) -> Self {
        self.info.push(line.into());
        self
    }

    /// The exit status of `drbdsetup`.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        exit_code(self.code)
    }

    /// What `drbdsetup` prints on stderr about `object` (a resource name or minor number), with a
    /// final newline.
    #[must_use]
    pub fn render(&self, object: &str) -> String {
        let mut out = match self.code {
            0 => format!("{object}: State change failed: (0) unknown error.\n"),
            c if text_of(c).is_none() => {
                format!("{object}: Error code {c} unknown.\nYou should update the drbd userland tools.\n")
            }
            c if c < 0 => format!("{object}: State change failed: ({c}) {}\n", self.text),
            c => format!("{object}: Failure: ({c}) {}\n", self.text),
        };
        if !self.info.is_empty() {
            out.push_str("additional info from kernel:\n");
            for line in &self.info {
                out.push_str(line);
                out.push('\n');
            }
        }
        out
    }
}

/// The exit status that belongs to a result number (`spec/cli.md` §16).
#[must_use]
pub const fn exit_code(code: i32) -> i32 {
    match code {
        101 | 1..=4 => 0,
        102..=176 => 10,
        -2 => 17,
        -4 => 16,
        -16 => 5,
        -28..=0 => 11,
        _ => 20,
    }
}

/// The reference's text of a result number; `None` for numbers it does not have.
#[must_use]
pub fn text_of(code: i32) -> Option<&'static str> {
    let table = if code < 0 { STATE_TEXTS } else { CONFIG_TEXTS };
    table.iter().find(|(c, _)| *c == code).map(|(_, t)| *t)
}

const STATE_TEXTS: &[(i32, &str)] = &[
    (-1, "Multiple primaries not allowed by config"),
    (-2, "Need access to UpToDate data"),
    (-4, "Can not resync without local disk"),
    (-5, "Can not resync without remote disk"),
    (-6, "Refusing to be Outdated while Connected"),
    (-7, "Refusing to be Primary while peer is not outdated"),
    (-8, "Can not start OV/resync since it is already active"),
    (-9, "Can not disconnect a StandAlone device"),
    (-10, "State change was refused by peer node"),
    (-11, "Device is diskless, the requested operation requires a disk"),
    (-12, "Device is held open by someone"),
    (-13, "Have no net/connection configuration"),
    (-14, "Need a verify algorithm to start online verify"),
    (-15, "State change requires a connection"),
    (-17, "Peer does not support protocol"),
    (-16, "Disk state is lower than outdated"),
    (-18, "In transient state, retry after next state change"),
    (-19, "Concurrent state changes detected and aborted"),
    (-20, "Other vol primary on peer not allowed by config"),
    (-22, "Peer may not become primary while device is opened read-only"),
    (-21, "Interrupted state change"),
    (-23, "Timeout in operation"),
    (-24, "Primary nodes must be strongly connected among each other"),
    (-25, "No quorum"),
    (-26, "Intentional diskless peer may not attach a disk"),
    (-27, "Disconnect chosen in handshake"),
    (-28, "Retry chosen in handshake"),
];

const CONFIG_TEXTS: &[(i32, &str)] = &[
    (101, "No further Information available."),
    (102, "Local address(port) already in use."),
    (103, "Remote address(port) already in use."),
    (104, "Can not open backing device."),
    (105, "Can not open meta device."),
    (106, "Lower device already in use."),
    (107, "Lower device is not a block device."),
    (108, "Meta device is not a block device."),
    (109, "Open of lower device failed."),
    (110, "Open of meta device failed."),
    (111, "Low.dev. smaller than requested DRBD-dev. size."),
    (112, "Meta device too small."),
    (113, "You have to use the disk command first."),
    (114, "Lower device is already claimed. This usually means it is mounted."),
    (115, "Meta device is already claimed. This usually means it is mounted."),
    (116, "Lower device / meta device / index combination invalid."),
    (117, "Currently we only support devices up to 3.998TB.."),
    (118, "IO error(s) occurred during initial access to meta-data.\n"),
    (
        119,
        "No valid meta-data signature found.\n\n==> Use 'drbdadm create-md res' to initialize meta-data area. <==\n",
    ),
    (
        120,
        "The 'cram-hmac-alg' you specified is not known in the kernel. (Maybe you need to modprobe it, or modprobe hmac?)",
    ),
    (121, "The 'cram-hmac-alg' you specified is not a digest."),
    (122, "kmalloc() failed. Out of memory?"),
    (123, "--discard-my-data not allowed when primary."),
    (124, "Device is attached to a disk (use detach first)"),
    (125, "Device has a net-config (use disconnect first)"),
    (126, "UnknownMandatoryTag"),
    (127, "Device minor not allocated"),
    (128, "Resulting device state would be invalid"),
    (129, "Interrupted by Signal"),
    (130, "Resize not allowed during resync."),
    (131, "Need one Primary node to resize."),
    (132, "The resync-after minor number is invalid"),
    (133, "This would cause a resync-after dependency cycle"),
    (134, "Sync-pause flag is already set"),
    (135, "Sync-pause flag is already cleared"),
    (136, "Disk state is lower than outdated"),
    (137, "Kernel does not know how to handle your request.\nMaybe API_VERSION mismatch?"),
    (138, "Device does not have a disk-config"),
    (139, "Protocol C required"),
    (140, "vmalloc() failed. Out of memory?"),
    (
        141,
        "The 'data-integrity-alg' you specified is not known in the kernel. (Maybe you need to modprobe it, or modprobe hmac?)",
    ),
    (142, "The 'data-integrity-alg' you specified is not a digest."),
    (143, "Invalid cpu-mask."),
    (144, "CSUMSAlgNotAvail"),
    (145, "CSUMSAlgNotDigest"),
    (146, "VERIFYAlgNotAvail"),
    (147, "VERIFYAlgNotDigest"),
    (148, "Can not change csums-alg while resync is in progress"),
    (149, "Can not change verify-alg while online verify runs"),
    (150, "Can only attach to the data we lost last (see kernel log)."),
    (151, "Need to be StandAlone"),
    (152, "Permission denied. CAP_SYS_ADMIN necessary"),
    (153, "Protocol version 93 required to use --assume-clean"),
    (154, "Fencing policy resource-and-stonith only with prot B or C allowed"),
    (155, "on-congestion policy pull-ahead only with prot A allowed"),
    (
        156,
        "Sync-pause flag is already cleared.\nNote: Resync pause caused by a local resync-after dependency.",
    ),
    (157, "Sync-pause flag is already cleared.\nNote: Resync pause caused by the peer node."),
    (158, "Unknown resource"),
    (159, "Resource still in use (delete all minors first)"),
    (160, "Minor still configured (down it first)"),
    (161, "Minor or volume exists already (delete it first)"),
    (162, "Invalid configuration request"),
    (163, "Prot version 100 required in order to change\nthese network options while connected"),
    (164, "Can not clear allow_two_primaries as long as\nthere a primaries on both sides"),
    (165, "Unclean meta-data found.\nYou need to 'drbdadm apply-al res'\n"),
    (166, "DRBD need to be connected for online MD layout change\n"),
    (167, "Resulting AL area too big\n"),
    (168, "Resulting AL are too small\n"),
    (169, "Resulting AL does not fit into available meta data space\n"),
    (170, "Implicit device shrinking not allowed. See kernel log.\n"),
    (171, "Invalid peer-node-id\n"),
    (172, "Failed to create transport (drbd_transport_xxx module missing?)\n"),
    (173, "Combination of local address(port) and remote address(port) already in use\n"),
    (174, "Already exists\n"),
    (175, "A higher DRBD protocol level is required for this operation\n"),
    (176, "Path collides with existing path\n"),
];
