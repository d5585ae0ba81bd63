//! Who synchronises to whom, carried out: gathers the facts for `tables::split_brain::negotiate` and does what it says
//! to bitmaps and identifiers (`spec/state-machine.md` §9.5).

use crate::connection::Veto;
use crate::core::{AfterHandler, Core};
use crate::io::{HandlerCall, LogLevel};
use crate::state::Options;
use crate::tables::compare::{Compare, Side};
use crate::tables::quorum::QuorumOption;
use crate::tables::split_brain::{Action, LostPrimary, Negotiation, Phase, Policies, negotiate};
use crate::tables::strategy::Strategy;
use crate::tables::uuid::{UuidSet, is_generation, is_just_created, same};
use crate::types::{NodeId, VolumeNr};
use palisade_metadata::DeviceFlags;
use palisade_wire::UuidFlags;
use palisade_wire::enums::{DiskState, ReplState, Role};

/// Result of the handshake of one volume.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HandshakeResult {
    pub repl: ReplState,
    pub pdsk: Option<DiskState>,
    pub own_disk: Option<DiskState>,
}

impl HandshakeResult {
    fn established() -> Self {
        Self { repl: ReplState::Established, pdsk: None, own_disk: None }
    }
}

impl Core {
    /// Compares and prepares; the caller makes the result the state of the volume.
    pub(crate) fn sync_handshake(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        pdsk: DiskState,
        connecting: bool,
    ) -> Result<HandshakeResult, Veto> {
        let own = self.st.disk(v);
        let has_disk = self.devs.get(&v).is_some_and(|d| d.ldev.is_some()) && own >= DiskState::Negotiating;
        if !has_disk {
            return self.diskless_handshake(n, v, pdsk);
        }
        if pdsk <= DiskState::Failed {
            return Ok(HandshakeResult::established());
        }
        let demoted = None;
        self.compare_and_go(n, v, pdsk, connecting, demoted)
    }

    fn compare_and_go(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        pdsk: DiskState,
        connecting: bool,
        demoted: Option<bool>,
    ) -> Result<HandshakeResult, Veto> {
        let Some((shown, flags, bits)) = self.presented(n, v) else {
            return Ok(HandshakeResult::established());
        };
        let (Some(p), Some(c)) = (self.pds.get(&(n, v)), self.conns.get(&n)) else {
            return Err(Veto::Retry);
        };
        let Some(u) = p.uuids.clone() else { return Err(Veto::Retry) };
        let l = self.devs.get(&v).and_then(|d| d.ldev.as_ref());
        let mut own = self.st.disk(v);
        if own == DiskState::Negotiating {
            let f = l.map(|l| l.sb.flags).unwrap_or_default();
            own = crate::state::disk_state_from_md(
                f.contains(DeviceFlags::CONSISTENT),
                f.contains(DeviceFlags::WAS_UP_TO_DATE),
                true,
            );
        }
        let peer_role = if connecting { c.peer_role_hint } else { self.st.peer_role(n) };
        // Only what both have named makes both sides decide alike.
        let lost_primary = match (c.position_named, c.position_received) {
            (Some((lost, my_position)), Some((other, peer_position))) if connecting && lost == other => {
                Some(LostPrimary { named_by_peer: true, named_by_me: true, my_position, peer_position })
            }
            _ => None,
        };
        // The peer saw what was sent to it; a change since then would make the two sides disagree.
        let changed = connecting
            && p.sent.is_some_and(|(cur, slot, b)| {
                !same(cur, shown.current) || !same(slot, shown.bitmap[n.idx()]) || b != bits
            });
        let negotiation = Negotiation {
            compare: Compare {
                me: Side {
                    node_id: self.me.get(),
                    role: self.st.role,
                    disk: own,
                    uuids: &shown,
                    bits,
                    flags,
                    missed_end: p.missed_end_source,
                    quorate: self.st.devs.get(&v).is_some_and(|d| d.quorum),
                },
                peer: Side {
                    node_id: n.get(),
                    role: peer_role,
                    disk: pdsk,
                    uuids: &u.set,
                    bits: u.dirty_bits,
                    flags: u.flags,
                    missed_end: p.missed_end_target,
                    quorate: self.st.pds.get(&(n, v)).is_some_and(|p| p.peer_quorum),
                },
                apv: c.apv,
                features: c.features,
                protocol: c.net.protocol,
                resolve_conflicts: c.resolve_conflicts,
                connecting,
                changed_since_sent: changed,
            },
            policies: Policies {
                after_sb_0pri: c.net.after_sb_0pri,
                after_sb_1pri: c.net.after_sb_1pri,
                after_sb_2pri: c.net.after_sb_2pri,
                always_asbp: c.net.always_asbp,
                rr_conflict: c.net.rr_conflict,
                quorum_enabled: self.cfg.resource.quorum != QuorumOption::Off,
                tentative: c.tentative,
            },
            phase: if connecting {
                Phase::Connect
            } else if self.st.disk(v) == DiskState::Negotiating || pdsk == DiskState::Negotiating {
                Phase::Attach
            } else {
                Phase::Again
            },
            attaching: self.st.disk(v) == DiskState::Negotiating,
            lost_primary,
            demoted,
        };
        let out = negotiate(&negotiation);
        let scope = self.scope(Some(n), Some(v));
        self.log(LogLevel::Info, &scope, format!(
            "drbd_sync_handshake: self {:016X}:{:016X} bits:{bits} flags:{:X} peer {:016X}:{:016X} bits:{} flags:{:X}",
            shown.current, shown.bitmap[n.idx()], flags.0, u.set.current, u.set.bitmap[self.me.idx()], u.dirty_bits, u.flags.0
        ));
        for line in &out.log {
            self.log(LogLevel::Info, &scope, line.clone());
        }
        for h in &out.handlers {
            let call = HandlerCall {
                name: h.name(),
                vnr: Some(v),
                peer: Some(n),
                cstate: Some(self.st.cstate(n).name()),
                up_to_date_nodes: None,
            };
            self.run_handler(call, AfterHandler::Nothing);
        }
        match out.action {
            Action::Retry => Err(Veto::Retry),
            Action::Disconnect | Action::NoResult => Err(Veto::Disconnect),
            Action::Demote(tag) => {
                let ok = self.change(tag, Options::default(), |s| s.role = Role::Secondary).is_ok();
                self.compare_and_go(n, v, pdsk, connecting, Some(ok))
            }
            Action::Go(repl) => {
                if let Some(c) = self.conns.get(&n)
                    && c.tentative
                {
                    return Err(Veto::Disconnect);
                }
                if out.clear_slot {
                    self.clear_slot(n, v);
                }
                self.prepare_bitmap(n, v, out.verdict.strategy, out.verdict.copy_from, &u.set);
                let mut peer_disk = pdsk;
                if u.flags.contains(UuidFlags::INCONSISTENT) && pdsk == DiskState::Negotiating {
                    peer_disk = DiskState::Inconsistent;
                }
                // Generations that differ, left alone because one side is unstable: no attach makes such data current.
                let apart = repl == ReplState::Established && !same(shown.current, u.set.current);
                let attaching = self.st.disk(v) == DiskState::Negotiating;
                let own_disk = (apart && attaching).then_some(own.min(DiskState::Outdated));
                Ok(HandshakeResult { repl, pdsk: Some(peer_disk), own_disk })
            }
        }
    }

    /// Step 13: what the strategy does to the bitmap, before it is exchanged.
    fn prepare_bitmap(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        s: Strategy,
        copy_from: Option<u8>,
        theirs: &UuidSet,
    ) {
        match s {
            Strategy::SyncSourceCopyBitmap => {
                let from = copy_from.and_then(NodeId::new);
                // A resync clears bits long before the slot's UUID says so: such a slot does not tell any more
                // what this peer missed.
                let busy = from.is_some_and(|f| self.st.repl(f, v) > ReplState::Established);
                if let Some(l) = self.ldev(v)
                    && let Some(to) = l.slot(n)
                {
                    match from.filter(|_| !busy).and_then(|f| l.slot(f)) {
                        Some(f) => {
                            // The own slot may know of writes the other does not.
                            let words = l.bitmap.words(f).to_vec();
                            l.bitmap.or_words(to, 0, &words);
                        }
                        None => {
                            l.bitmap.set_all(to);
                        }
                    }
                }
            }
            // The reference clears the own slot here. It may be all that tells what a crash left behind.
            Strategy::SyncTargetClearBitmap => return,
            Strategy::SyncSourceSetBitmap => {
                self.set_all_bits(v, Some(n));
                // An interruption continues from the bitmap.
                if is_generation(theirs.current)
                    && !is_just_created(theirs.current)
                    && let Some(mut set) = self.uuid_set(v)
                    && !is_just_created(set.current)
                {
                    set.set_slot(n.get(), theirs.current, self.dagtag);
                    self.store_uuids(v, &set);
                }
            }
            Strategy::SyncTargetSetBitmap => {
                let fresh = self.devs.get(&v).is_some_and(|d| is_just_created(d.current_uuid()));
                let already = self.st.peers_of(v).any(|(m, p)| m != n && p.repl > ReplState::Established);
                if !(fresh && already) {
                    self.set_all_bits(v, (!fresh).then_some(n));
                }
            }
            _ => return,
        }
        self.write_bitmap(v);
    }

    /// This node has no disk (`spec/state-machine.md` §9.8).
    fn diskless_handshake(
        &mut self,
        n: NodeId,
        v: VolumeNr,
        pdsk: DiskState,
    ) -> Result<HandshakeResult, Veto> {
        let mut result = HandshakeResult::established();
        let exposed = self.devs.get(&v).map_or(0, |d| d.exposed_uuid);
        let Some(u) = self.pds.get(&(n, v)).and_then(|p| p.uuids.clone()) else { return Ok(result) };
        let theirs = u.set.current;
        if pdsk != DiskState::UpToDate {
            // The peer's own rule (§4.6): whoever has the generation a diskless Primary works on is UpToDate. A new
            // generation must not be made without it in between.
            let current = self.is_primary()
                && same(exposed, theirs)
                && pdsk >= DiskState::Outdated
                && !u.flags.contains(UuidFlags::SYNC_TARGET);
            result.pdsk = current.then_some(DiskState::UpToDate);
            return Ok(result);
        }
        if exposed == 0 || same(exposed, theirs) || !self.is_primary() {
            if let Some(d) = self.devs.get_mut(&v) {
                if !same(d.exposed_uuid, theirs) {
                    d.unproven.clear();
                }
                d.exposed_uuid = theirs;
            }
            return Ok(result);
        }
        if self.unproven_match(n, v).is_some() {
            return Ok(result);
        }
        let successor = u.set.in_history(exposed) || u.set.bitmap.iter().any(|b| same(*b, exposed));
        let scope = self.scope(Some(n), Some(v));
        if successor {
            self.log(LogLevel::Error, scope, "Remote node has more recent data");
            return Err(Veto::Retry);
        }
        self.log(
            LogLevel::Error,
            scope,
            "Current UUID of peer does not match my exposed UUID; it is taken as outdated",
        );
        result.pdsk = Some(DiskState::Outdated);
        Ok(result)
    }
}
