//! Who counts, and is that enough: the quorum arithmetic of one volume.
//!
//! One pass sorts every node into a bucket, one formula turns the buckets into an answer. Nothing here
//! remembers anything: the caller passes in whether the volume had quorum before.
//! Rules: `spec/state-machine.md` §15.1 to §15.3; texts: §3.3 rule 14.

use std::fmt;

use palisade_wire::enums::DiskState;

/// Logged when the tiebreaker keeps quorum (§15.3).
pub const TIEBREAKER_TEXT: &str = "Would lose quorum, but using tiebreaker logic to keep";

/// Value of the options `quorum` and `quorum-minimum-redundancy` (§1.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum QuorumOption {
    /// `off`: no requirement.
    #[default]
    Off,
    /// `majority`: more than half of the voters.
    Majority,
    /// `all`: every voter.
    All,
    /// `1`..`31`: that many nodes.
    Nodes(u8),
}

impl QuorumOption {
    /// The number of nodes needed out of `voters`; 0 for `off`.
    pub fn threshold(self, voters: u32) -> u32 {
        match self {
            Self::Off => 0,
            Self::Majority => voters / 2 + 1,
            Self::All => voters,
            Self::Nodes(n) => n.into(),
        }
    }
}

/// What is known about one other node, as far as it matters for counting one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerFacts {
    /// A connection to this node is configured.
    pub configured: bool,
    /// The connection is established.
    pub connected: bool,
    /// The peer's disk as self believes it; `DUnknown` for a node that is not configured.
    pub pdsk: DiskState,
    /// The peer announces that it has quorum for this volume.
    pub announces_quorum: bool,
    /// The node belongs to the present members of the partition (§15.6).
    pub member: bool,
    /// Own metadata hold a bitmap slot for it.
    pub has_slot: bool,
    /// Own metadata flag NODE_EXISTS (§1.7).
    pub exists: bool,
    /// Own metadata flag DEVICE_SEEN: it had a disk at some time (§1.7).
    pub seen_with_disk: bool,
    /// Own metadata flag OUTDATED for its slot (§1.7).
    pub outdated_flag: bool,
    /// Option `allow-remote-read` of the connection.
    pub allow_remote_read: bool,
    /// Option `bitmap no`: a configured peer that shall never have a disk.
    pub bitmap_no: bool,
    /// Option `tiebreaker` of the peer device; false for a node that is not configured.
    pub tiebreaker: bool,
}

impl Default for PeerFacts {
    /// A configured peer with a disk and a bitmap slot that was never seen: what a fresh diskful peer is.
    fn default() -> Self {
        Self {
            configured: true,
            connected: false,
            pdsk: DiskState::DUnknown,
            announces_quorum: false,
            member: true,
            has_slot: true,
            exists: false,
            seen_with_disk: false,
            outdated_flag: false,
            allow_remote_read: true,
            bitmap_no: false,
            tiebreaker: true,
        }
    }
}

impl PeerFacts {
    fn intentionally_diskless(&self) -> bool {
        if self.configured { self.bitmap_no } else { !self.seen_with_disk }
    }

    /// A node that nobody ever met and that has no slot is no voter (§15.1); a node without metadata
    /// knows its configuration only (§15.2).
    fn considered(&self, with_disk: bool) -> bool {
        if with_disk { self.has_slot || self.exists || self.seen_with_disk } else { self.configured }
    }

    fn bucket(&self, with_disk: bool, had_quorum: bool) -> Bucket {
        let intentional = self.intentionally_diskless();
        let diskless = self.pdsk == DiskState::Diskless && (intentional || !with_disk);
        match self.connected {
            _ if !self.considered(with_disk) => Bucket::Skipped,
            _ if self.configured && !self.allow_remote_read => Bucket::Skipped,
            _ if intentional && !self.tiebreaker => Bucket::Skipped,
            false if intentional => Bucket::MissingDiskless,
            false if self.pdsk <= DiskState::Outdated || self.outdated_flag => Bucket::Outdated,
            false if had_quorum && !self.member => Bucket::Quorumless,
            false => Bucket::Unknown,
            true if diskless => Bucket::Diskless,
            true if self.pdsk == DiskState::UpToDate => Bucket::UpToDate,
            true => Bucket::Present,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bucket {
    Skipped,
    MissingDiskless,
    Outdated,
    Quorumless,
    Unknown,
    Diskless,
    UpToDate,
    Present,
}

/// How many nodes, self included, fell into each bucket of §15.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Counts {
    /// Gone, and known to be older than what is here.
    pub outdated: u32,
    /// Gone, and known to be without quorum itself.
    pub quorumless: u32,
    /// Gone, and nothing is known.
    pub unknown: u32,
    /// Here, with current data.
    pub uptodate: u32,
    /// Here, with a disk that is not current.
    pub present: u32,
    /// Here, and never meant to have a disk.
    pub diskless: u32,
    /// Gone, and never meant to have a disk.
    pub missing_diskless: u32,
    /// UpToDate peers that announce quorum; counted only while self has no disk (§15.2).
    pub quorate_peers: u32,
}

impl Counts {
    fn add(&mut self, bucket: Bucket) {
        match bucket {
            Bucket::Skipped => {}
            Bucket::MissingDiskless => self.missing_diskless += 1,
            Bucket::Outdated => self.outdated += 1,
            Bucket::Quorumless => self.quorumless += 1,
            Bucket::Unknown => self.unknown += 1,
            Bucket::Diskless => self.diskless += 1,
            Bucket::UpToDate => self.uptodate += 1,
            Bucket::Present => self.present += 1,
        }
    }

    /// Nodes with a disk that can be reached, self included.
    pub fn visible(&self) -> u32 {
        self.uptodate + self.present
    }

    fn absent(&self) -> u32 {
        self.outdated + self.quorumless + self.unknown
    }
}

/// Everything the decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct QuorumInput<'a> {
    /// Own disk.
    pub own_disk: DiskState,
    /// Self is configured without a disk for this volume.
    pub self_intentionally_diskless: bool,
    /// Option `quorum`.
    pub quorum: QuorumOption,
    /// Option `quorum-minimum-redundancy`.
    pub minimum_redundancy: QuorumOption,
    /// [`Quorum::real`] of the previous evaluation.
    pub had_quorum: bool,
    /// Every other node id that is configured or known to the metadata.
    pub peers: &'a [PeerFacts],
}

/// Why there is no quorum; the text is the user-visible one (§3.3 rule 14).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Explanation {
    /// Self has no disk and depends on the peers' opinion.
    NoQuoratePeer,
    /// Too few nodes are reachable.
    Visible {
        /// Reachable nodes with a disk, self included.
        visible: u32,
        /// All that count.
        voters: u32,
        /// Needed.
        need: u32,
    },
    /// Enough nodes, but too few of them with current data.
    Redundancy {
        /// UpToDate nodes, self included.
        uptodate: u32,
        /// All that count.
        voters: u32,
        /// Needed.
        need: u32,
    },
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoQuoratePeer => f.write_str("no UpToDate peer with quorum"),
            Self::Visible { visible, voters, need } => {
                write!(f, "{visible} of {voters} nodes visible, need {need} for quorum")
            }
            Self::Redundancy { uptodate, voters, need } => {
                write!(
                    f,
                    "{uptodate} of {voters} nodes up_to_date, need {need} for quorum-minimum-redundancy"
                )
            }
        }
    }
}

/// The answer for one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quorum {
    /// The volume is to be treated as quorate; always true with `quorum off`.
    pub have: bool,
    /// What the arithmetic says. With `quorum off` it is computed as for `majority`, so that switching the
    /// option on later starts with a value that means something.
    pub real: bool,
    /// Only the tiebreaker keeps `real` true; log [`TIEBREAKER_TEXT`] when this becomes true.
    pub tiebreaker_used: bool,
    /// The buckets, after quorumless nodes were moved to unknown where that rule applied.
    pub counts: Counts,
    /// Nodes that count.
    pub voters: u32,
    /// Nodes needed.
    pub threshold: u32,
    /// UpToDate nodes needed.
    pub redundancy: u32,
    /// Why not, if `real` is false.
    pub explanation: Option<Explanation>,
}

/// Counts the nodes and decides (§15.1 to §15.3).
pub fn quorum(input: &QuorumInput<'_>) -> Quorum {
    let with_disk = input.own_disk > DiskState::Attaching;
    decide(input, count(input, with_disk), with_disk)
}

fn count(input: &QuorumInput<'_>, with_disk: bool) -> Counts {
    let mut counts = Counts::default();
    counts.add(match input.own_disk {
        DiskState::UpToDate => Bucket::UpToDate,
        _ if with_disk => Bucket::Present,
        _ if input.self_intentionally_diskless => Bucket::Diskless,
        _ => Bucket::Unknown,
    });
    for peer in input.peers {
        let bucket = peer.bucket(with_disk, input.had_quorum);
        counts.add(bucket);
        if !with_disk && bucket == Bucket::UpToDate && peer.announces_quorum {
            counts.quorate_peers += 1;
        }
    }
    counts
}

fn decide(input: &QuorumInput<'_>, mut counts: Counts, with_disk: bool) -> Quorum {
    let need = match input.quorum {
        QuorumOption::Off => QuorumOption::Majority,
        other => other,
    };
    let mut voters = counts.absent() + counts.visible();
    if counts.absent() >= need.threshold(voters) {
        // Together the missing could have formed a quorum: being outside of the members proves nothing.
        counts.unknown += counts.quorumless;
        counts.quorumless = 0;
    }
    if counts.unknown == 0 {
        // Last man standing: whoever is missing is known to be unable to go on.
        voters = counts.visible();
    }
    let threshold = need.threshold(voters);
    let redundancy = input.minimum_redundancy.threshold(voters);
    let enough = counts.visible() >= threshold && counts.uptodate >= redundancy;
    let by_count = counts.quorate_peers > 0 || enough;
    let tiebreaker_used = !by_count
        && voters > 0
        && voters.is_multiple_of(2)
        && counts.visible() + 1 == threshold
        && counts.diskless > (counts.diskless + counts.missing_diskless) / 2
        && input.had_quorum;
    let real = by_count || tiebreaker_used;
    let explanation = match real {
        true => None,
        false if !with_disk => Some(Explanation::NoQuoratePeer),
        false if counts.visible() < threshold => {
            Some(Explanation::Visible { visible: counts.visible(), voters, need: threshold })
        }
        false => Some(Explanation::Redundancy { uptodate: counts.uptodate, voters, need: redundancy }),
    };
    let have = real || input.quorum == QuorumOption::Off;
    Quorum { have, real, tiebreaker_used, counts, voters, threshold, redundancy, explanation }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connected(pdsk: DiskState) -> PeerFacts {
        PeerFacts { connected: true, pdsk, seen_with_disk: true, ..PeerFacts::default() }
    }

    fn gone() -> PeerFacts {
        PeerFacts { seen_with_disk: true, ..PeerFacts::default() }
    }

    fn outdated() -> PeerFacts {
        PeerFacts { pdsk: DiskState::Outdated, ..gone() }
    }

    fn diskless(connected: bool) -> PeerFacts {
        let pdsk = if connected { DiskState::Diskless } else { DiskState::DUnknown };
        PeerFacts { connected, pdsk, bitmap_no: true, has_slot: false, exists: true, ..PeerFacts::default() }
    }

    fn majority(had_quorum: bool, peers: &[PeerFacts]) -> Quorum {
        quorum(&input(QuorumOption::Majority, had_quorum, peers))
    }

    fn input(quorum: QuorumOption, had_quorum: bool, peers: &[PeerFacts]) -> QuorumInput<'_> {
        QuorumInput {
            own_disk: DiskState::UpToDate,
            self_intentionally_diskless: false,
            quorum,
            minimum_redundancy: QuorumOption::Off,
            had_quorum,
            peers,
        }
    }

    fn up() -> PeerFacts {
        connected(DiskState::UpToDate)
    }

    /// The table "Worked examples (majority)" of §15.3, row by row.
    #[test]
    fn worked_examples() {
        let rows = [
            ("3 diskful, 1 connected, third unknown", true, vec![up(), gone()], (true, 3, 2, false)),
            ("3 diskful, alone, both unknown", true, vec![gone(), gone()], (false, 3, 2, false)),
            ("3 diskful, alone, both outdated", true, vec![outdated(), outdated()], (true, 1, 1, false)),
            ("3 diskful, one outdated, one unknown", true, vec![outdated(), gone()], (false, 3, 2, false)),
            ("2+1, diskful lost, was quorate", true, vec![gone(), diskless(true)], (true, 2, 2, true)),
            ("2+1, diskless lost", true, vec![up(), diskless(false)], (true, 2, 2, false)),
            ("2+1, booted alone with diskless", false, vec![gone(), diskless(true)], (false, 2, 2, false)),
            ("2+1, both lost", true, vec![gone(), diskless(false)], (false, 2, 2, false)),
            ("4 diskful, 2/2", true, vec![up(), gone(), gone()], (false, 4, 3, false)),
        ];
        for (name, had, peers, (have, voters, threshold, tiebreaker)) in rows {
            let q = majority(had, &peers);
            assert_eq!(
                (q.have, q.voters, q.threshold, q.tiebreaker_used),
                (have, voters, threshold, tiebreaker),
                "{name}"
            );
            assert_eq!(q.have, q.real, "{name}");
            assert_eq!(q.explanation.is_none(), q.real, "{name}");
        }
    }

    /// Every row of the bucket table of §15.1, in order.
    #[test]
    fn buckets_with_disk() {
        let base = gone();
        let unconfigured = PeerFacts { configured: false, tiebreaker: false, ..base };
        let rows = [
            (PeerFacts { has_slot: false, seen_with_disk: false, ..base }, Bucket::Skipped),
            (PeerFacts { allow_remote_read: false, ..up() }, Bucket::Skipped),
            (PeerFacts { tiebreaker: false, ..diskless(true) }, Bucket::Skipped),
            (PeerFacts { seen_with_disk: false, ..unconfigured }, Bucket::Skipped),
            (unconfigured, Bucket::Unknown),
            (PeerFacts { outdated_flag: true, ..unconfigured }, Bucket::Outdated),
            (diskless(false), Bucket::MissingDiskless),
            (outdated(), Bucket::Outdated),
            (PeerFacts { pdsk: DiskState::Diskless, ..base }, Bucket::Outdated),
            (PeerFacts { outdated_flag: true, ..base }, Bucket::Outdated),
            (PeerFacts { member: false, ..base }, Bucket::Quorumless),
            (base, Bucket::Unknown),
            (diskless(true), Bucket::Diskless),
            (up(), Bucket::UpToDate),
            (connected(DiskState::Consistent), Bucket::Present),
            (connected(DiskState::Inconsistent), Bucket::Present),
            (connected(DiskState::Diskless), Bucket::Present),
        ];
        for (facts, want) in rows {
            assert_eq!(facts.bucket(true, true), want, "{facts:?}");
        }
        let outside = PeerFacts { member: false, ..base };
        assert_eq!(outside.bucket(true, false), Bucket::Unknown, "without own quorum nobody is quorumless");
        let never_met = PeerFacts { has_slot: false, exists: false, ..diskless(false) };
        assert_eq!(never_met.bucket(true, true), Bucket::Skipped, "never connected, intentionally diskless");
        assert_eq!(PeerFacts::default().bucket(true, true), Bucket::Unknown, "a fresh diskful peer counts");
    }

    #[test]
    fn without_own_disk() {
        let quorate = PeerFacts { announces_quorum: true, ..up() };
        let mut peers = [quorate, gone()];
        let mut i = input(QuorumOption::Majority, false, &peers);
        i.own_disk = DiskState::Diskless;
        i.self_intentionally_diskless = true;
        let q = quorum(&i);
        assert!(q.have);
        assert_eq!((q.counts.diskless, q.counts.quorate_peers, q.voters), (1, 1, 2));

        peers[0].announces_quorum = false;
        let mut i = input(QuorumOption::Majority, false, &peers);
        i.own_disk = DiskState::Attaching;
        let q = quorum(&i);
        assert_eq!((q.have, q.counts.unknown, q.voters), (false, 2, 3));
        assert_eq!(q.explanation.map(|e| e.to_string()).as_deref(), Some("no UpToDate peer with quorum"));

        let temporarily =
            PeerFacts { has_slot: false, seen_with_disk: false, ..connected(DiskState::Diskless) };
        assert_eq!(
            temporarily.bucket(false, false),
            Bucket::Diskless,
            "regardless of intent, without any slot"
        );
        let stranger = PeerFacts { configured: false, ..gone() };
        assert_eq!(stranger.bucket(false, false), Bucket::Skipped);
    }

    #[test]
    fn redundancy() {
        let peers = [connected(DiskState::Inconsistent), gone()];
        let mut i = input(QuorumOption::Majority, true, &peers);
        i.minimum_redundancy = QuorumOption::Nodes(2);
        let q = quorum(&i);
        assert!(!q.have);
        let text = "1 of 3 nodes up_to_date, need 2 for quorum-minimum-redundancy";
        assert_eq!(q.explanation.map(|e| e.to_string()).as_deref(), Some(text));
        i.minimum_redundancy = QuorumOption::Nodes(1);
        assert!(quorum(&i).have);
    }

    #[test]
    fn quorumless_do_not_cost_quorum_unless_they_could_have_it() {
        let outside = PeerFacts { member: false, ..gone() };
        // 4 voters, need 3, only 2 missing: they cannot have it, so the two here stand alone.
        let q = majority(true, &[up(), outside, outside]);
        assert_eq!((q.have, q.voters, q.counts.quorumless), (true, 2, 2));
        // 3 voters, need 2, 2 missing: together they could.
        let q = majority(true, &[outside, outside]);
        assert_eq!((q.have, q.voters, q.counts.unknown, q.counts.quorumless), (false, 3, 2, 0));
    }

    #[test]
    fn tiebreaker_keeps_and_never_gives() {
        let both = [gone(), diskless(true), diskless(false)];
        assert!(!majority(true, &both).have, "1 of 2 tiebreakers is not a majority of them");
        let both = [gone(), diskless(true), diskless(true), diskless(false)];
        assert!(majority(true, &both).tiebreaker_used, "2 of 3 are");
        assert!(!majority(false, &both).have);
        assert!(!majority(true, &[gone(), gone(), diskless(true)]).have, "odd number of voters");
        let disabled = PeerFacts { tiebreaker: false, ..diskless(true) };
        assert!(!majority(true, &[gone(), disabled]).have);
    }

    #[test]
    fn option_values() {
        let peers = [up(), gone()];
        assert!(quorum(&input(QuorumOption::Nodes(2), true, &peers)).have);
        assert!(!quorum(&input(QuorumOption::Nodes(3), true, &peers)).have);
        let q = quorum(&input(QuorumOption::All, true, &peers));
        assert_eq!(
            q.explanation.map(|e| e.to_string()).as_deref(),
            Some("2 of 3 nodes visible, need 3 for quorum")
        );
        let alone = [gone(), gone()];
        let q = quorum(&input(QuorumOption::Off, true, &alone));
        assert_eq!((q.have, q.real), (true, false));
    }

    /// A tiebreaker decision is sticky: fed back, it stays; once lost, it does not come back by itself.
    #[test]
    fn sticky() {
        let peers = [gone(), diskless(true)];
        let first = majority(true, &peers);
        assert!(majority(first.real, &peers).real);
        let lost = majority(true, &[gone(), diskless(false)]);
        assert!(!majority(lost.real, &peers).real);
    }
}
