//! What an administrator is told when something is refused: numbers, texts and exit statuses.
//!
//! [`Refusal`] is a state change that the rules do not allow, [`ConfigError`] a request that cannot be carried
//! out as given. Rules: `spec/state-machine.md` §2 and §3.1, texts `spec/cli.md` §16. The texts are grepped for
//! by users and test suites and therefore the reference's own, without the trailing newline some have.

/// One enum from rows of code, name, text and documentation.
macro_rules! coded {
    ($(#[$meta:meta])* $name:ident { $($code:literal $variant:ident $text:literal $doc:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
        pub enum $name {
            $(#[doc = $doc] #[error($text)] $variant,)*
        }

        impl $name {
            /// All of them, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The number shown to the user.
            pub fn code(self) -> i32 {
                match self { $(Self::$variant => $code,)* }
            }

            /// The one with this number.
            pub fn from_code(code: i32) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

coded! {
    /// Why a state change was refused.
    Refusal {
        -1 TwoPrimaries "Multiple primaries not allowed by config" "A second Primary would appear where only one is allowed.",
        -2 NoUpToDateData "Need access to UpToDate data" "A Primary would lose, or never have, access to current data.",
        -4 NoLocalDisk "Can not resync without local disk" "Resync without an own disk.",
        -5 NoRemoteDisk "Can not resync without remote disk" "Resync without a disk on the peer.",
        -6 ConnectedOutdates "Refusing to be Outdated while Connected" "Outdating a disk that a connected peer relies on.",
        -7 PrimaryNeedsFencing "Refusing to be Primary while peer is not outdated" "A peer that may have newer data is not fenced.",
        -8 ResyncRunning "Can not start OV/resync since it is already active" "A resync or verify runs already.",
        -9 AlreadyStandAlone "Can not disconnect a StandAlone device" "There is nothing to disconnect.",
        -10 RefusedByPeer "State change was refused by peer node" "A peer refused its part of the cluster-wide change.",
        -11 IsDiskless "Device is diskless, the requested operation requires a disk" "There is no disk to do it with.",
        -12 DeviceInUse "Device is held open by someone" "Somebody has the device open.",
        -13 NoNetConfig "Have no net/connection configuration" "There is no connection to do it with.",
        -14 NoVerifyAlg "Need a verify algorithm to start online verify" "The option verify-alg is not set.",
        -15 NeedConnection "State change requires a connection" "The connection is not established.",
        -16 LowerThanOutdated "Disk state is lower than outdated" "The disk is worse than Outdated already.",
        -17 NotSupported "Peer does not support protocol" "The peer is too old.",
        -18 InTransientState "In transient state, retry after next state change" "Retry as soon as any state has changed.",
        -19 ConcurrentChange "Concurrent state changes detected and aborted" "Two changes collided; retry after a random time.",
        -20 OtherVolumePrimary "Other vol primary on peer not allowed by config" "The peer is Primary on another volume.",
        -21 Interrupted "Interrupted state change" "The caller was interrupted.",
        -22 PrimaryReader "Peer may not become primary while device is opened read-only" "A read-only opener forbids the peer to become Primary.",
        -23 Timeout "Timeout in operation" "Somebody did not answer in time.",
        -24 WeaklyConnected "Primary nodes must be strongly connected among each other" "Two Primaries would not see each other.",
        -25 NoQuorum "No quorum" "Too few nodes; an explanation goes with it.",
        -26 AttachNoBitmap "Intentional diskless peer may not attach a disk" "A peer configured without a bitmap has a disk.",
        -27 HandshakeDisconnect "Disconnect chosen in handshake" "The comparison says that these nodes must not connect.",
        -28 HandshakeRetry "Retry chosen in handshake" "The comparison has to be repeated.",
    }
}

coded! {
    /// Why a configuration request was refused; the variants are explained by their texts.
    ConfigError {
        102 LocalAddressInUse "Local address(port) already in use." "Code 102.",
        103 PeerAddressInUse "Remote address(port) already in use." "Code 103.",
        104 OpenDisk "Can not open backing device." "Code 104.",
        105 OpenMetaDisk "Can not open meta device." "Code 105.",
        106 DiskInUse "Lower device already in use." "Code 106.",
        107 DiskNotBlockDevice "Lower device is not a block device." "Code 107.",
        108 MetaDiskNotBlockDevice "Meta device is not a block device." "Code 108.",
        109 OpenLowerDevice "Open of lower device failed." "Code 109.",
        110 OpenMetaDevice "Open of meta device failed." "Code 110.",
        111 DiskTooSmall "Low.dev. smaller than requested DRBD-dev. size." "Code 111.",
        112 MetaDiskTooSmall "Meta device too small." "Code 112.",
        113 NeedDiskFirst "You have to use the disk command first." "Code 113.",
        114 DiskClaimed "Lower device is already claimed. This usually means it is mounted." "Code 114.",
        115 MetaDiskClaimed "Meta device is already claimed. This usually means it is mounted." "Code 115.",
        116 MetaIndexInvalid "Lower device / meta device / index combination invalid." "Code 116.",
        118 MetaIo "IO error(s) occurred during initial access to meta-data." "Code 118.",
        119 NoMetadata "No valid meta-data signature found.\n\n==> Use 'drbdadm create-md res' to initialize meta-data area. <==" "Code 119.",
        120 CramAlgUnknown "The 'cram-hmac-alg' you specified is not known in the kernel. (Maybe you need to modprobe it, or modprobe hmac?)" "Code 120.",
        121 CramAlgNotDigest "The 'cram-hmac-alg' you specified is not a digest." "Code 121.",
        122 OutOfMemory "kmalloc() failed. Out of memory?" "Code 122.",
        123 DiscardNotAllowed "--discard-my-data not allowed when primary." "Code 123.",
        124 HasDisk "Device is attached to a disk (use detach first)" "Code 124.",
        125 HasNetConfig "Device has a net-config (use disconnect first)" "Code 125.",
        126 UnknownMandatoryTag "UnknownMandatoryTag" "Code 126.",
        127 MinorUnknown "Device minor not allocated" "Code 127.",
        128 InvalidState "Resulting device state would be invalid" "Code 128.",
        129 InterruptedBySignal "Interrupted by Signal" "Code 129.",
        130 ResizeDuringResync "Resize not allowed during resync." "Code 130.",
        131 ResizeNeedsPrimary "Need one Primary node to resize." "Code 131.",
        132 ResyncAfterInvalid "The resync-after minor number is invalid" "Code 132.",
        133 ResyncAfterCycle "This would cause a resync-after dependency cycle" "Code 133.",
        134 PauseAlreadySet "Sync-pause flag is already set" "Code 134.",
        135 PauseAlreadyCleared "Sync-pause flag is already cleared" "Code 135.",
        136 DiskLowerThanOutdated "Disk state is lower than outdated" "Code 136.",
        137 UnknownRequest "Kernel does not know how to handle your request.\nMaybe API_VERSION mismatch?" "Code 137.",
        138 NoDiskConfig "Device does not have a disk-config" "Code 138.",
        139 ProtocolCRequired "Protocol C required" "Code 139.",
        140 OutOfVirtualMemory "vmalloc() failed. Out of memory?" "Code 140.",
        141 IntegrityAlgUnknown "The 'data-integrity-alg' you specified is not known in the kernel. (Maybe you need to modprobe it, or modprobe hmac?)" "Code 141.",
        142 IntegrityAlgNotDigest "The 'data-integrity-alg' you specified is not a digest." "Code 142.",
        143 CpuMaskInvalid "Invalid cpu-mask." "Code 143.",
        144 CsumsAlgUnknown "CSUMSAlgNotAvail" "Code 144.",
        145 CsumsAlgNotDigest "CSUMSAlgNotDigest" "Code 145.",
        146 VerifyAlgUnknown "VERIFYAlgNotAvail" "Code 146.",
        147 VerifyAlgNotDigest "VERIFYAlgNotDigest" "Code 147.",
        148 CsumsResyncRunning "Can not change csums-alg while resync is in progress" "Code 148.",
        149 VerifyRunning "Can not change verify-alg while online verify runs" "Code 149.",
        150 DataNotCurrent "Can only attach to the data we lost last (see kernel log)." "Code 150.",
        151 NotStandAlone "Need to be StandAlone" "Code 151.",
        152 PermissionDenied "Permission denied. CAP_SYS_ADMIN necessary" "Code 152.",
        153 AssumeCleanNeedsProtocol93 "Protocol version 93 required to use --assume-clean" "Code 153.",
        154 StonithWithProtocolA "Fencing policy resource-and-stonith only with prot B or C allowed" "Code 154.",
        155 CongestionNotProtocolA "on-congestion policy pull-ahead only with prot A allowed" "Code 155.",
        156 PausedByDependency "Sync-pause flag is already cleared.\nNote: Resync pause caused by a local resync-after dependency." "Code 156.",
        157 PausedByPeer "Sync-pause flag is already cleared.\nNote: Resync pause caused by the peer node." "Code 157.",
        158 ResourceUnknown "Unknown resource" "Code 158.",
        159 ResourceInUse "Resource still in use (delete all minors first)" "Code 159.",
        160 MinorConfigured "Minor still configured (down it first)" "Code 160.",
        161 MinorOrVolumeExists "Minor or volume exists already (delete it first)" "Code 161.",
        162 InvalidRequest "Invalid configuration request" "Code 162.",
        163 NeedProtocol100 "Prot version 100 required in order to change\nthese network options while connected" "Code 163.",
        164 ClearTwoPrimaries "Can not clear allow_two_primaries as long as\nthere a primaries on both sides" "Code 164.",
        165 MetadataUnclean "Unclean meta-data found.\nYou need to 'drbdadm apply-al res'" "Code 165.",
        166 AlLayoutNeedsConnection "DRBD need to be connected for online MD layout change" "Code 166.",
        167 AlTooBig "Resulting AL area too big" "Code 167.",
        168 AlTooSmall "Resulting AL are too small" "Code 168.",
        169 AlDoesNotFit "Resulting AL does not fit into available meta data space" "Code 169.",
        170 ImplicitShrink "Implicit device shrinking not allowed. See kernel log." "Code 170.",
        171 InvalidPeerNodeId "Invalid peer-node-id" "Code 171.",
        172 NoTransport "Failed to create transport (drbd_transport_xxx module missing?)" "Code 172.",
        173 AddressPairInUse "Combination of local address(port) and remote address(port) already in use" "Code 173.",
        174 AlreadyExists "Already exists" "Code 174.",
        175 ProtocolTooOld "A higher DRBD protocol level is required for this operation" "Code 175.",
        176 PathCollides "Path collides with existing path" "Code 176.",
    }
}

/// Exit status of `drbdsetup` for a result code of either kind (§2).
pub fn exit_status(code: i32) -> u8 {
    match code {
        1..=4 | 101 => 0,
        102..=176 => 10,
        -2 => 17,
        -16 => 5,
        -4 => 16,
        -28..=0 => 11,
        _ => 20,
    }
}

impl Refusal {
    /// Exit status of `drbdsetup`.
    pub fn exit_status(self) -> u8 {
        exit_status(self.code())
    }

    /// The log line (§2).
    pub fn log_line(self) -> String {
        format!("State change failed: {self} ({})", self.code())
    }

    /// What the tool prints on stderr about `object` (§2).
    pub fn user_line(self, object: &str) -> String {
        format!("{object}: State change failed: ({}) {self}", self.code())
    }
}

impl ConfigError {
    /// Exit status of `drbdsetup`.
    pub fn exit_status(self) -> u8 {
        exit_status(self.code())
    }

    /// What the tool prints on stderr about `object` (§2).
    pub fn user_line(self, object: &str) -> String {
        format!("{object}: Failure: ({}) {self}", self.code())
    }
}

/// The two network options whose combinations are checked (§3.1, last paragraph).
#[derive(Clone, Copy, Debug)]
pub struct NetOptions {
    /// `protocol`.
    pub protocol: palisade_wire::enums::WireProtocol,
    /// `allow-two-primaries`.
    pub two_primaries: bool,
    /// `fencing resource-and-stonith`.
    pub stonith: bool,
    /// `on-congestion` is not `block`.
    pub congestion_policy: bool,
}

/// Checks the network options of a connection against each other (§3.1).
pub fn check_net_options(options: &NetOptions) -> Result<(), ConfigError> {
    use palisade_wire::enums::WireProtocol::{A, C};
    match options.protocol {
        protocol if options.two_primaries && protocol != C => Err(ConfigError::ProtocolCRequired),
        A if options.stonith => Err(ConfigError::StonithWithProtocolA),
        protocol if options.congestion_policy && protocol != A => Err(ConfigError::CongestionNotProtocolA),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use palisade_wire::enums::WireProtocol;

    #[test]
    fn numbers() {
        let codes: Vec<i32> = Refusal::ALL.iter().map(|r| r.code()).collect();
        let want: Vec<i32> = (1..=28).filter(|n| *n != 3).map(|n: i32| -n).collect();
        assert_eq!(codes, want, "-3 is unused");
        for refusal in Refusal::ALL {
            assert_eq!(Refusal::from_code(refusal.code()), Some(*refusal));
        }
        assert_eq!(
            (Refusal::from_code(-3), Refusal::from_code(0), Refusal::from_code(-29)),
            (None, None, None)
        );
        for error in ConfigError::ALL {
            assert_eq!(ConfigError::from_code(error.code()), Some(*error));
            assert!((102..=176).contains(&error.code()) && error.exit_status() == 10);
        }
        assert!(ConfigError::ALL.is_sorted_by_key(|e| e.code()));
        assert_eq!(ConfigError::ALL.len(), 74, "102 to 176 without 117");
    }

    #[test]
    fn texts() {
        assert_eq!(Refusal::NoQuorum.to_string(), "No quorum");
        assert_eq!(Refusal::NoQuorum.log_line(), "State change failed: No quorum (-25)");
        assert_eq!(
            Refusal::NoUpToDateData.user_line("r0"),
            "r0: State change failed: (-2) Need access to UpToDate data"
        );
        assert_eq!(
            ConfigError::NoDiskConfig.user_line("0"),
            "0: Failure: (138) Device does not have a disk-config"
        );
        assert!(ConfigError::MetadataUnclean.to_string().ends_with("You need to 'drbdadm apply-al res'"));
        for text in Refusal::ALL
            .iter()
            .map(ToString::to_string)
            .chain(ConfigError::ALL.iter().map(ToString::to_string))
        {
            assert!(!text.is_empty() && !text.ends_with('\n') && !text.contains("(nl)"), "{text}");
        }
    }

    /// The table of exit statuses in §2.
    #[test]
    fn exit_statuses() {
        let rows = [
            (101, 0),
            (102, 10),
            (176, 10),
            (177, 20),
            (100, 20),
            (-2, 17),
            (-16, 5),
            (-4, 16),
            (-1, 11),
            (-28, 11),
            (-29, 20),
            (0, 11),
            (1, 0),
            (2, 0),
            (3, 0),
            (4, 0),
            (5, 20),
        ];
        for (code, status) in rows {
            assert_eq!(exit_status(code), status, "{code}");
        }
        assert_eq!(Refusal::LowerThanOutdated.exit_status(), 5);
    }

    #[test]
    fn net_options() {
        let ok = NetOptions {
            protocol: WireProtocol::C,
            two_primaries: true,
            stonith: true,
            congestion_policy: false,
        };
        assert_eq!(check_net_options(&ok), Ok(()));
        let b = NetOptions { protocol: WireProtocol::B, ..ok };
        assert_eq!(check_net_options(&b), Err(ConfigError::ProtocolCRequired));
        assert_eq!(check_net_options(&NetOptions { two_primaries: false, ..b }), Ok(()));
        let a = NetOptions { protocol: WireProtocol::A, two_primaries: false, ..ok };
        assert_eq!(check_net_options(&a), Err(ConfigError::StonithWithProtocolA));
        let a = NetOptions { stonith: false, congestion_policy: true, ..a };
        assert_eq!(check_net_options(&a), Ok(()));
        let c = NetOptions { protocol: WireProtocol::C, ..a };
        assert_eq!(check_net_options(&c), Err(ConfigError::CongestionNotProtocolA));
    }
}
