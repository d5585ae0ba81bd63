//! May one more Primary appear, given who sees whom?
//!
//! `spec/state-machine.md` §6.5. Two Primaries that do not see each other directly are tolerable only if
//! a server between them serialises their writes.

use super::refusal::Refusal;

/// What is known when a promotion is about to be committed. All masks are of node ids.
#[derive(Clone, Copy, Debug)]
pub struct Distances {
    /// All Primaries of the partition, the candidate included.
    pub primary_nodes: u64,
    /// Nodes that do not see everyone.
    pub weak_nodes: u64,
    /// All nodes of the partition.
    pub reachable_nodes: u64,
    /// Peers that self has a connection to.
    pub connections: u64,
    /// Those whose connection has `allow-two-primaries`.
    pub two_primaries: u64,
    /// The new Primary has a local disk.
    pub new_primary_has_disk: bool,
}

/// Checks the distances between the Primaries (§6.5).
pub fn check(d: &Distances) -> Result<(), Refusal> {
    let several = d.primary_nodes.count_ones() > 1;
    let weak_primary = d.primary_nodes & d.weak_nodes != 0;
    let servers = d.reachable_nodes & !d.weak_nodes;
    let single_primary_server = d.connections & servers & !d.two_primaries != 0;
    match (several, weak_primary) {
        (false, _) => Ok(()),
        (true, _) if d.connections & d.two_primaries == 0 => Err(Refusal::TwoPrimaries),
        (true, false) => Ok(()),
        (true, true) if servers == 0 || d.new_primary_has_disk => Err(Refusal::WeaklyConnected),
        (true, true) if single_primary_server => Err(Refusal::TwoPrimaries),
        (true, true) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of §6.5. Chain 0 - 1 - 2: the ends are weak, node 1 serves both.
    #[test]
    fn table() {
        let chain = Distances {
            primary_nodes: 0b101,
            weak_nodes: 0b101,
            reachable_nodes: 0b111,
            connections: 0b010,
            two_primaries: 0b010,
            new_primary_has_disk: false,
        };
        let rows = [
            (Distances { primary_nodes: 0, ..chain }, Ok(())),
            (Distances { primary_nodes: 0b001, two_primaries: 0, ..chain }, Ok(())),
            (Distances { two_primaries: 0, ..chain }, Err(Refusal::TwoPrimaries)),
            (Distances { two_primaries: 0, weak_nodes: 0, ..chain }, Err(Refusal::TwoPrimaries)),
            (Distances { weak_nodes: 0, ..chain }, Ok(())),
            (Distances { weak_nodes: 0b010, ..chain }, Ok(())),
            (Distances { new_primary_has_disk: true, ..chain }, Err(Refusal::WeaklyConnected)),
            (chain, Ok(())),
            (Distances { connections: 0b1010, two_primaries: 0b1000, ..chain }, Err(Refusal::TwoPrimaries)),
            (Distances { weak_nodes: 0b111, ..chain }, Err(Refusal::WeaklyConnected)),
        ];
        for (distances, want) in rows {
            assert_eq!(check(&distances), want, "{distances:?}");
        }
    }
}
