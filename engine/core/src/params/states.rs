//! P_STATE: a peer's states in a handshake and later, and comparing again in an established connection
//! (`spec/wire-protocol.md` §4.12, §5.2, `spec/state-machine.md` §9.6).
//!
//! In a handshake a state must never count before the peer's sizes are known and the generations are compared.

use crate::connection::{Negotiated, Veto};
use crate::core::Core;
use crate::io::LogLevel;
use crate::tables::uuid::is_just_created;
use crate::types::{NodeId, VolumeNr};
use palisade_wire::enums::{DiskState, ReplState, Role};
use palisade_wire::{StateWord, UuidFlags};

impl Core {
    /// P_STATE of a volume.
    pub(super) fn got_state(&mut self, n: NodeId, v: VolumeNr, w: StateWord) {
        let (Some(role), Some(disk)) = (w.role(), w.disk()) else { return };
        let real = self.real_peer_disk(n, v, disk);
        if !self.st.connected(n) {
            self.handshake_state(n, v, w, real);
            return;
        }
        if self.st.repl(n, v) < ReplState::Established {
            // A volume that appeared here or there after the connect (`spec/wire-protocol.md` §4.12).
            self.late_volume(n, v, w, real);
            return;
        }
        let conn = ReplState::from_u8(w.conn());
        let before = self.st.repl(n, v);
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            use ReplState as R;
            let was = std::mem::replace(&mut p.peer_repl, conn.unwrap_or(R::Off));
            let done = before == R::WFBitMapS
                && conn == Some(R::Established)
                && matches!(was, R::WFBitMapT | R::SyncTarget | R::PausedSyncT);
            // What it says of its disk afterwards counts as well: the newest word is the one to remember.
            let again = before == R::WFBitMapS && conn == Some(R::Established) && p.target_done.is_some();
            if done || again {
                p.target_done = Some(real);
            }
        }
        let old_pdsk = self.st.pdsk(n, v);
        let became_primary = role == Role::Primary && self.st.peer_role(n) != Role::Primary;
        let source = matches!(before, ReplState::SyncSource | ReplState::PausedSyncS);
        let ended = source && conn == Some(ReplState::Established);
        self.force("peer-state", |s| {
            if let Some(c) = s.conns.get_mut(&n) {
                c.peer_role = role;
            }
            if let Some(p) = s.pds.get_mut(&(n, v)) {
                p.pdsk = real;
                p.pause.peer = w.aftr_isp() || w.user_isp();
                p.peer_quorum = w.quorum();
                if ended {
                    p.repl = ReplState::Established;
                } else if source && real > DiskState::Inconsistent {
                    // Old news: the resync as this side knows it is running.
                    p.pdsk = DiskState::Inconsistent;
                }
            }
        });
        let waits = self.st.repl(n, v) == ReplState::Established
            && before == ReplState::Established
            && conn.is_some_and(|c| (ReplState::StartingSyncS..=ReplState::WFBitMapT).contains(&c));
        let attaches = before == ReplState::Established
            && (disk == DiskState::Negotiating || self.st.disk(v) == DiskState::Negotiating);
        // The peer was forced to be UpToDate; its new identifiers came before, or will come and ask again.
        let forced = before == ReplState::Established
            && became_primary
            && !self.is_sync_target(v)
            && self.st.disk(v) == DiskState::Inconsistent
            && old_pdsk < DiskState::UpToDate
            && real == DiskState::UpToDate
            && self
                .pds
                .get(&(n, v))
                .and_then(|p| p.uuids.as_ref())
                .is_some_and(|u| !is_just_created(u.set.current));
        if attaches && disk == DiskState::Negotiating && old_pdsk <= DiskState::Negotiating {
            self.send_uuids(n, v, UuidFlags::NONE, 0);
            self.send_state(n, v);
        }
        if waits || attaches || forced {
            self.reconsider(n, v);
        }
        if ended {
            self.source_finished(n, v);
        }
    }

    /// The volume is, or is about to be, resynced from somebody.
    pub(super) fn is_sync_target(&self, v: VolumeNr) -> bool {
        use ReplState as R;
        self.st
            .peers_of(v)
            .any(|(_, p)| matches!(p.repl, R::WFBitMapT | R::SyncTarget | R::PausedSyncT | R::StartingSyncT))
    }

    /// INCONSISTENT tells the real disk state while the word says Negotiating.
    fn real_peer_disk(&self, n: NodeId, v: VolumeNr, disk: DiskState) -> DiskState {
        if disk != DiskState::Negotiating {
            return disk;
        }
        let flags = self.pds.get(&(n, v)).and_then(|p| p.uuids.as_ref()).map(|u| u.flags);
        if flags.is_some_and(|f| f.contains(UuidFlags::INCONSISTENT)) {
            DiskState::Inconsistent
        } else {
            DiskState::Consistent
        }
    }

    /// P_STATE inside of the connect handshake completes it for this volume.
    fn handshake_state(&mut self, n: NodeId, v: VolumeNr, w: StateWord, real: DiskState) {
        if self.conns.get(&n).is_none_or(|c| !c.params_sent) {
            return;
        }
        if let (Some(c), Some(r)) = (self.conns.get_mut(&n), w.role()) {
            c.peer_role_hint = r;
        }
        if !self.pds.get(&(n, v)).is_some_and(|p| p.sizes_received) {
            self.veto(n, v, Veto::Retry, "the peer sent its state before its sizes");
            return;
        }
        let diskful = self.conns.get(&n).is_some_and(|c| c.diskful);
        if !diskful && real > DiskState::Diskless {
            self.veto(n, v, Veto::Disconnect, "the peer is configured as diskless here, but has a disk");
            return;
        }
        self.detect_finished(n, v, true);
        match self.sync_handshake(n, v, real, true) {
            Ok(outcome) => {
                if let Some(p) = self.pds.get_mut(&(n, v)) {
                    p.negotiated = Some(Negotiated {
                        repl: outcome.repl,
                        pdsk: outcome.pdsk.unwrap_or(real),
                        own_disk: outcome.own_disk,
                        peer_pause: w.aftr_isp() || w.user_isp(),
                        peer_quorum: w.quorum(),
                    });
                }
                self.phase_one();
            }
            Err(veto) => {
                if let Some(p) = self.pds.get_mut(&(n, v)) {
                    p.veto = Some(veto);
                }
                self.phase_one();
            }
        }
    }

    /// Whether the handshake of every volume is complete.
    pub(crate) fn handshake_ready(&self, n: NodeId) -> bool {
        self.pds.iter().filter(|((m, _), _)| *m == n).all(|(_, p)| p.negotiated.is_some())
    }

    fn late_volume(&mut self, n: NodeId, v: VolumeNr, w: StateWord, real: DiskState) {
        if !self.pds.get(&(n, v)).is_some_and(|p| p.sizes_received) {
            return;
        }
        // Answer once with what this side has.
        if self.pds.get(&(n, v)).is_some_and(|p| p.sent.is_none()) {
            self.send_volume_params(n, v);
        }
        if let Ok(o) = self.sync_handshake(n, v, real, false) {
            let role = w.role();
            self.force("peer-state", |s| {
                if let (Some(c), Some(r)) = (s.conns.get_mut(&n), role) {
                    c.peer_role = r;
                }
                if let Some(p) = s.pds.get_mut(&(n, v)) {
                    p.pdsk = o.pdsk.unwrap_or(real);
                    p.repl = o.repl;
                    p.peer_quorum = w.quorum();
                }
                if let (Some(d), Some(disk)) = (s.devs.get_mut(&v), o.own_disk) {
                    d.disk = disk;
                }
            });
        }
    }

    /// Runs the comparison again in an established connection (`spec/state-machine.md` §9.6).
    pub(crate) fn reconsider(&mut self, n: NodeId, v: VolumeNr) {
        if self.st.repl(n, v) != ReplState::Established {
            return;
        }
        let pdsk = self.st.pdsk(n, v);
        if self.pds.get(&(n, v)).is_none_or(|p| p.uuids.is_none()) || pdsk < DiskState::Negotiating {
            return;
        }
        let negotiating = self.st.disk(v) == DiskState::Negotiating;
        match self.sync_handshake(n, v, pdsk, false) {
            Ok(o) => {
                if let Some(p) = self.pds.get_mut(&(n, v)) {
                    p.negotiating = false;
                }
                self.force("reconsider", |s| {
                    if let Some(p) = s.pds.get_mut(&(n, v)) {
                        p.repl = o.repl;
                        if let Some(d) = o.pdsk {
                            p.pdsk = d;
                        }
                    }
                    if let (Some(d), Some(disk)) = (s.devs.get_mut(&v), o.own_disk) {
                        d.disk = disk;
                    }
                });
            }
            Err(_) if negotiating => {
                let scope = self.scope(Some(n), Some(v));
                self.log(
                    LogLevel::Error,
                    scope,
                    "attach negotiation ended without a result; the disk is dropped",
                );
                self.force("attach", |s| {
                    if let Some(d) = s.devs.get_mut(&v) {
                        d.disk = DiskState::Detaching;
                    }
                });
            }
            Err(Veto::Disconnect) => self.disconnect_now(n),
            Err(Veto::Retry) => {}
        }
    }
}
