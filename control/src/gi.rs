//! Generation identifiers of a volume towards a peer, as `get-gi` shows them (`spec/cli.md` §15).

use serde::{Deserialize, Serialize};

/// What `drbdsetup get-gi RES NODE VOLUME` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct GenerationInfo {
    /// Current UUID.
    pub current: u64,
    /// Bitmap UUID towards the peer.
    pub bitmap: u64,
    /// The two younger history UUIDs.
    pub history: [u64; 2],
    /// Device: data is consistent.
    pub consistent: bool,
    /// Device: data was up to date.
    pub was_up_to_date: bool,
    /// Device: node was Primary.
    pub primary: bool,
    /// Device: node was a crashed Primary.
    pub crashed_primary: bool,
    /// Device: the activity log was applied.
    pub al_clean: bool,
    /// Device: the activity log was disabled.
    pub al_disabled: bool,
    /// Device: node was Primary when it lost quorum.
    pub primary_lost_quorum: bool,
    /// Peer: was connected.
    pub peer_connected: bool,
    /// Peer: disk was outdated or inconsistent.
    pub peer_outdated: bool,
    /// Peer: a fencing policy was in force.
    pub peer_fencing: bool,
    /// Peer: all blocks were being marked out of sync.
    pub peer_full_sync: bool,
    /// Peer: was seen with a disk at least once.
    pub peer_device_seen: bool,
}

impl GenerationInfo {
    /// The line of `get-gi`, without newline.
    #[must_use]
    pub fn line(&self) -> String {
        let mut out = format!(
            "{:016X}:{:016X}:{:016X}:{:016X}",
            self.current, self.bitmap, self.history[0], self.history[1]
        );
        for flag in [
            self.consistent,
            self.was_up_to_date,
            self.primary,
            self.crashed_primary,
            self.al_clean,
            self.al_disabled,
            self.primary_lost_quorum,
            self.peer_connected,
            self.peer_outdated,
            self.peer_fencing,
            self.peer_full_sync,
            self.peer_device_seen,
        ] {
            out.push_str(if flag { ":1" } else { ":0" });
        }
        out
    }

    /// The text of `show-gi`: the line framed by explanations.
    #[must_use]
    pub fn explained(&self) -> String {
        format!("{FRAME_ABOVE}{}\n{FRAME_BELOW}", self.line())
    }
}

const FRAME_ABOVE: &str = "
       +--<  Current data generation UUID  >-
       |               +--<  Bitmap's base data generation UUID  >-
       |               |                 +--<  younger history UUID  >-
       |               |                 |         +-<  older history  >-
       V               V                 V         V
";

const FRAME_BELOW: &str =
    "                                                                    ^ ^ ^ ^ ^ ^ ^ ^ ^ ^ ^ ^
                                      -<  Data consistency flag  >--+ | | | | | | | | | | |
                             -<  Data was/is currently up-to-date  >--+ | | | | | | | | | |
                                  -<  Node was/is currently primary  >--+ | | | | | | | | |
 -<  This node was a crashed primary, and has not seen its peer since  >--+ | | | | | | | |
             -<  The activity-log was applied, the disk can be attached  >--+ | | | | | | |
        -<  The activity-log was disabled, peer is completely out of sync  >--+ | | | | | |
                              -<  This node was primary when it lost quorum  >--+ | | | | |
                                          -<  Node was/is currently connected  >--+ | | | |
                              -<  The peer's disk was out-dated or inconsistent  >--+ | | |
                                 -<   A fence policy other the dont-care was used  >--+ | |
                  -<  Node was in the progress of marking all blocks as out of sync  >--+ |
                     -<  At least once we saw this node with a backing device attached >--+

";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_is_the_recorded_one() {
        let gi = GenerationInfo {
            current: 0x6B97_F101_15EE_1757,
            consistent: true,
            was_up_to_date: true,
            primary: true,
            crashed_primary: true,
            peer_connected: true,
            peer_device_seen: true,
            ..GenerationInfo::default()
        };
        assert_eq!(
            gi.line(),
            "6B97F10115EE1757:0000000000000000:0000000000000000:0000000000000000:1:1:1:1:0:0:0:1:0:0:0:1"
        );
    }
}
