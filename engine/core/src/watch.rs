//! What must not stay as it is: states in which a peer device waits for something that nobody is working on.
//!
//! Two nodes can disagree about a resync after packets crossed in an unlucky way. The reference leaves such states to the
//! administrator (`spec/weaknesses.md`); here a look every few seconds finds those which did not move since the last one
//! and starts them anew, by means every peer understands: a new comparison, or a new connection.

use crate::core::Core;
use crate::io::LogLevel;
use crate::tables::uuid::same;
use crate::types::{NodeId, Time, VolumeNr};
use palisade_wire::UuidFlags;
use palisade_wire::enums::{ConnState, DiskState, ReplState};
use std::collections::BTreeMap;
use std::time::Duration;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_secs(5);

/// Looks that a running resync may be without progress: a slow disk or link may need them.
const RESYNC_LOOKS: u32 = 4;

/// A state that should pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Passing {
    /// A bitmap exchange, with so many bitmap packets received.
    Exchange(u64),
    /// An attached disk waits for this peer's comparison.
    Negotiating,
    /// The own disk is not UpToDate, this peer's is, and nothing is resynced.
    Behind(DiskState),
    /// Both UpToDate, and so many bits set here and, as it said, at the peer.
    Bits(u64, u64),
    /// Both UpToDate without a Primary, at different generations.
    Apart,
    /// A running resync, with so many bits left and sectors done.
    Resync(u64, u64),
}

/// What was seen at the last look.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    next: Option<Time>,
    seen: BTreeMap<(NodeId, VolumeNr), (Passing, u32)>,
}

impl Core {
    pub(crate) fn watch_deadline(&self) -> Option<Time> {
        if self.st.connected_mask().is_empty() { None } else { self.watch.next }
    }

    pub(crate) fn watch_timer(&mut self) {
        let next = *self.watch.next.get_or_insert(self.now + INTERVAL);
        if self.now < next {
            return;
        }
        self.watch.next = Some(self.now + INTERVAL);
        let seen = std::mem::take(&mut self.watch.seen);
        let now: Vec<_> =
            self.pds.keys().filter_map(|(n, v)| self.passing(*n, *v).map(|p| ((*n, *v), p))).collect();
        for (k, p) in now {
            let looks = seen.get(&k).filter(|(q, _)| *q == p).map_or(0, |(_, looks)| looks + 1);
            let patience = if matches!(p, Passing::Resync(..)) { RESYNC_LOOKS } else { 1 };
            self.watch.seen.insert(k, (p, looks));
            if looks >= patience {
                self.move_on(k.0, k.1, p);
            }
        }
    }

    fn passing(&self, n: NodeId, v: VolumeNr) -> Option<Passing> {
        use DiskState as D;
        use ReplState as R;
        let p = self.pds.get(&(n, v))?;
        let s = self.st.pds.get(&(n, v))?;
        if !self.st.connected(n) {
            return None;
        }
        let disk = self.st.disk(v);
        let resyncing = self.st.peers_of(v).any(|(_, p)| p.repl > R::Established);
        match s.repl {
            R::WFBitMapS | R::WFBitMapT => Some(Passing::Exchange(p.bitmap.packets)),
            // Two sources disagree about whose data counts: that is not for a new connection to decide.
            R::SyncSource | R::SyncTarget
                if !matches!(p.peer_repl, R::SyncSource | R::PausedSyncS | R::WFBitMapS)
                    || s.repl == R::SyncTarget =>
            {
                let l = self.devs.get(&v)?.ldev.as_ref()?;
                Some(Passing::Resync(l.bitmap.weight(l.slot(n)?), p.resync_done_sectors))
            }
            R::Established if disk == D::Negotiating && p.negotiating => Some(Passing::Negotiating),
            R::Established
                if (D::Inconsistent..D::UpToDate).contains(&disk) && s.pdsk == D::UpToDate && !resyncing =>
            {
                Some(Passing::Behind(disk))
            }
            R::Established
                if disk == D::UpToDate && (s.pdsk == D::UpToDate || s.pdsk == D::Outdated) && !resyncing =>
            {
                let l = self.devs.get(&v)?.ldev.as_ref()?;
                let bits = l.bitmap.weight(l.slot(n)?);
                let theirs = p.uuids.as_ref().map_or(0, |u| u.dirty_bits);
                let idle = !self.requests.values().any(|r| r.vnr == v);
                let own = self.devs.get(&v)?.current_uuid();
                let apart = p.uuids.as_ref().is_some_and(|u| !same(u.set.current, own));
                if apart && s.pdsk == D::UpToDate && self.st.stable() {
                    return Some(Passing::Apart);
                }
                (bits + theirs > 0 && idle).then_some(Passing::Bits(bits, theirs))
            }
            _ => None,
        }
    }

    fn move_on(&mut self, n: NodeId, v: VolumeNr, p: Passing) {
        let scope = self.scope(Some(n), Some(v));
        match p {
            Passing::Exchange(_) => {
                self.drop_link(
                    n,
                    ConnState::NetworkFailure,
                    "the bitmap exchange does not go on; connecting anew",
                );
            }
            Passing::Resync(..) => {
                self.drop_link(n, ConnState::NetworkFailure, "the resync does not go on; connecting anew");
            }
            Passing::Negotiating => {
                self.drop_link(
                    n,
                    ConnState::NetworkFailure,
                    "the attach negotiation does not go on; connecting anew",
                );
            }
            Passing::Behind(disk) => {
                self.log(LogLevel::Info, scope, format!("{disk} beside an UpToDate peer: comparing again"));
                if let Some(p) = self.pds.get_mut(&(n, v)) {
                    p.got_stable = true;
                }
                self.recalc("compare-again");
                if let Some(p) = self.pds.get_mut(&(n, v)) {
                    p.got_stable = false;
                }
                if self.st.disk(v) < DiskState::UpToDate {
                    self.send_uuids(n, v, UuidFlags::RESYNC, 0);
                    self.reconsider(n, v);
                }
            }
            Passing::Apart => {
                let text = "UpToDate at another generation than an UpToDate peer: comparing again";
                self.log(LogLevel::Info, scope, text);
                self.send_uuids(n, v, UuidFlags::RESYNC, 0);
                self.reconsider(n, v);
            }
            Passing::Bits(mine, theirs) => {
                let text = format!("{mine} bits set here and {theirs} there between UpToDate replicas");
                self.log(LogLevel::Info, scope, text);
                // Only one side may have them, and not be the one that starts the resync.
                self.send_uuids(n, v, UuidFlags::NONE, 0);
                self.established(n, v);
            }
        }
    }
}
