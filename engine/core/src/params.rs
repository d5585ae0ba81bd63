//! The per-volume packets of a handshake and what they say later: sizes, UUIDs, states
//! (`spec/wire-protocol.md` §4.6–4.12, §5.2).

use crate::connection::{Negotiated, PeerUuids, Veto};
use crate::core::{Core, Todo};
use crate::io::{LogLevel, Output};
use crate::tables::finished::{self, Announce, FinishedAction};
use crate::tables::uuid::{self, Received, ReceivedCurrent, UuidSet, is_just_created, same};
use crate::types::{NodeId, NodeMask, SECTOR, VolumeNr};
use bytes::Bytes;
use palisade_metadata::{DeviceFlags, PeerFlags};
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role, WireProtocol};
use palisade_wire::{
    CurrentUuid, Dagtag, DdsFlags, Packet, QueueLimits, Sizes, StateWord, SyncParam, UuidFlags, Uuids110,
};

impl Core {
    /// The own per-volume packets of a connect attempt, once per attempt.
    pub(crate) fn send_params(&mut self, n: NodeId) {
        let Some(c) = self.conns.get_mut(&n) else { return };
        if c.params_sent {
            return;
        }
        c.params_sent = true;
        for v in self.vnrs() {
            self.send_volume_params(n, v);
        }
        self.phase_one();
    }

    pub(crate) fn send_volume_params(&mut self, n: NodeId, v: VolumeNr) {
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.tx_seq = 0;
        }
        let r = self.pds.get(&(n, v)).map(|p| p.cfg.rate).unwrap_or_default();
        self.send_data(
            n,
            Some(v),
            Packet::SyncParam89(SyncParam {
                resync_rate: r.resync_rate,
                c_plan_ahead: r.plan_ahead,
                c_delay_target: r.delay_target,
                c_fill_target: r.fill_target,
                c_max_rate: r.max_rate,
                ..SyncParam::default()
            }),
        );
        self.send_sizes(n, v);
        self.send_uuids(n, v, UuidFlags::NONE, 0);
        let word = self.state_word(&self.st, n, v);
        self.send_data(n, Some(v), Packet::State(word));
    }

    pub(crate) fn send_sizes(&mut self, n: NodeId, v: VolumeNr) {
        let Some(d) = self.devs.get(&v) else { return };
        let usable = d.ldev.as_ref().map_or(0, |l| l.layout.usable_sectors);
        let d_size = if d.ldev.is_none() {
            0
        } else {
            // The smallest disk this partition knows of.
            self.st
                .connected_mask()
                .iter()
                .filter_map(|m| self.pds.get(&(m, v)).map(|p| p.d_size))
                .filter(|s| *s > 0)
                .fold(usable, u64::min)
        };
        let (physical, logical, discard) = d
            .ldev
            .as_ref()
            .map_or((512, 512, false), |l| (l.physical_block_size, l.logical_block_size, l.discard));
        let sizes = Sizes {
            d_size,
            u_size: d.cfg.size_sectors,
            c_size: if d.size > 0 { d.size } else { d_size.min(nonzero_or_max(d.cfg.size_sectors)) },
            max_bio_size: crate::types::BIO_SIZE_MAX,
            queue_order_type: 0,
            dds_flags: DdsFlags::NONE,
            limits: Some(QueueLimits {
                physical_block_size: physical,
                logical_block_size: logical,
                alignment_offset: 0,
                io_min: logical,
                io_opt: 0,
                discard_enabled: u8::from(discard),
                discard_zeroes_data: 0,
                write_same_capable: 0,
                bm_block_shift: 0,
            }),
        };
        self.send_data(n, Some(v), Packet::Sizes(sizes));
    }

    /// Identifiers as this node keeps them.
    pub(crate) fn uuid_set(&self, v: VolumeNr) -> Option<UuidSet> {
        let l = self.devs.get(&v)?.ldev.as_ref()?;
        let mut s = UuidSet { current: l.sb.current_uuid, history: l.sb.history, ..UuidSet::default() };
        for (i, p) in l.sb.peers.iter().enumerate() {
            s.bitmap[i] = p.bitmap_uuid;
            s.bitmap_dagtag[i] = p.bitmap_dagtag;
        }
        Some(s)
    }

    /// Stores changed identifiers; they are on disk when the superblock is.
    pub(crate) fn store_uuids(&mut self, v: VolumeNr, s: &UuidSet) {
        if let Some(l) = self.ldev(v) {
            l.sb.current_uuid = s.current;
            l.sb.history = s.history;
            for (i, p) in l.sb.peers.iter_mut().enumerate() {
                p.bitmap_uuid = s.bitmap[i];
                p.bitmap_dagtag = s.bitmap_dagtag[i];
            }
        }
        self.superblock_changed(v);
    }

    /// Node ids with a slot or known to exist.
    fn known_nodes(&self, v: VolumeNr) -> u64 {
        let Some(l) = self.devs.get(&v).and_then(|d| d.ldev.as_ref()) else { return 0 };
        l.sb.peers
            .iter()
            .enumerate()
            .filter(|(_, p)| p.slot().is_some() || p.flags.contains(PeerFlags::NODE_EXISTS))
            .fold(0, |m, (i, _)| m | 1 << i)
    }

    /// The peer this volume is sync target of, with its current UUID.
    fn sync_source(&self, v: VolumeNr) -> Option<(NodeId, u64)> {
        use ReplState as R;
        let n = self
            .st
            .peers_of(v)
            .find(|(_, p)| matches!(p.repl, R::SyncTarget | R::PausedSyncT | R::Behind))
            .map(|x| x.0)?;
        let u = self.pds.get(&(n, v))?.uuids.as_ref()?.set.current;
        Some((n, u))
    }

    /// What a peer is shown (`spec/state-machine.md` §8.7), with the flags of §1.8.
    pub(crate) fn presented(&self, n: NodeId, v: VolumeNr) -> Option<(UuidSet, UuidFlags, u64)> {
        let d = self.devs.get(&v)?;
        // A disk that is on its way out does not speak for the volume any more.
        if matches!(self.st.disk(v), DiskState::Failed | DiskState::Detaching) {
            return None;
        }
        let set = self.uuid_set(v)?;
        let l = d.ldev.as_ref()?;
        let source = self.sync_source(v).filter(|(s, _)| *s != n);
        let targets = self.st.peers_of(v).filter(|(_, p)| {
            matches!(p.repl, ReplState::SyncTarget | ReplState::PausedSyncT | ReplState::WFBitMapT)
        });
        let target_of = targets
            .filter(|(m, _)| {
                self.pds
                    .get(&(*m, v))
                    .and_then(|p| p.uuids.as_ref())
                    .is_some_and(|u| !same(u.set.current, set.current))
            })
            .fold(0, |a, (m, _)| a | m.mask().0);
        let shown = set.presented(self.known_nodes(v), source.map(|s| s.1), target_of);
        let c = self.conns.get(&n)?;
        let disk = self.st.disk(v);
        let synchronous = c.net.protocol == WireProtocol::C;
        let lost_writes = self.pds.get(&(n, v)).is_some_and(|p| p.lost_writes);
        let inconsistent = disk == DiskState::Inconsistent
            || (matches!(disk, DiskState::Negotiating | DiskState::Attaching)
                && !l.sb.flags.contains(DeviceFlags::CONSISTENT));
        let flags = UuidFlags::NONE
            .with(UuidFlags::DISCARD_MY_DATA, c.discard_my_data)
            .with(UuidFlags::CRASHED_PRIMARY, d.crashed_primary || (d.crashed_replica && synchronous))
            .with(UuidFlags::INCONSISTENT, inconsistent)
            .with(UuidFlags::STABLE, self.st.stable())
            .with(UuidFlags::RECONNECT, c.was_connected && !self.st.connected(n) && !lost_writes)
            .with(UuidFlags::PRIMARY_LOST_QUORUM, d.primary_lost_quorum || lost_writes)
            .with(UuidFlags::SYNC_TARGET, source.is_some());
        let bits = l.slot(n).map_or(0, |s| l.bitmap.weight(s));
        Some((shown, flags, bits))
    }

    /// Sends the own identifiers (or, diskless, the exposed one) to a peer.
    pub(crate) fn send_uuids(&mut self, n: NodeId, v: VolumeNr, extra: UuidFlags, mask: u64) {
        let Some((set, flags, bits)) = self.presented(n, v) else {
            let uuid = self
                .devs
                .get(&v)
                .map_or(0, |d| if d.exposed_uuid == 0 { d.current_uuid() } else { d.exposed_uuid });
            let weak = if self.is_primary() { self.weak_mask(v) } else { 0 };
            self.send_data(n, Some(v), Packet::CurrentUuid(CurrentUuid { uuid, weak_nodes: weak }));
            return;
        };
        let flags = flags | extra;
        let node_mask = if mask != 0 {
            mask
        } else if !flags.contains(UuidFlags::STABLE) {
            self.st.primary_peers().0
        } else if self.is_primary() && !self.st.connected(n) {
            self.weak_mask(v)
        } else {
            0
        };
        let known = self.known_nodes(v);
        let bitmap_uuids: Vec<(u8, u64)> =
            (0u8..32).filter(|i| known & (1 << i) != 0).map(|i| (i, set.bitmap[i as usize])).collect();
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.sent = Some((set.current, set.bitmap[n.idx()], bits));
            p.sent_slot = set.bitmap[n.idx()];
        }
        self.send_data(
            n,
            Some(v),
            Packet::Uuids110(Uuids110 {
                current: set.current,
                dirty_bits: bits,
                flags,
                node_mask,
                bitmap_uuids,
                history: set.history.to_vec(),
            }),
        );
    }

    pub(crate) fn send_uuids_to_all(&mut self, v: VolumeNr, except: Option<NodeId>, got_stable: bool) {
        if self.devs.get(&v).is_none_or(|d| d.ldev.is_none()) {
            return;
        }
        for n in self.st.connected_mask().iter().collect::<Vec<_>>() {
            if Some(n) != except && self.st.repl(n, v) >= ReplState::Established {
                let extra = if got_stable { UuidFlags::GOT_STABLE } else { UuidFlags::NONE };
                self.send_uuids(n, v, extra, 0);
            }
        }
    }

    pub(crate) fn pdsk_array(&self, v: VolumeNr) -> [DiskState; 32] {
        let mut a = [DiskState::DUnknown; 32];
        for (n, p) in self.st.peers_of(v) {
            a[n.idx()] = p.pdsk;
        }
        a
    }

    pub(crate) fn configured_mask(&self) -> u64 {
        self.conns.keys().fold(0, |m, n| m | n.mask().0)
    }

    pub(crate) fn slot_mask(&self, v: VolumeNr) -> u64 {
        let Some(l) = self.devs.get(&v).and_then(|d| d.ldev.as_ref()) else { return 0 };
        l.sb.peers.iter().enumerate().filter(|(_, p)| p.slot().is_some()).fold(0, |m, (i, _)| m | 1 << i)
    }

    /// Nodes that are not counted as having a new generation (`spec/state-machine.md` §8.6).
    pub(crate) fn weak_mask(&self, v: VolumeNr) -> u64 {
        uuid::weak_nodes(self.me.get(), self.st.disk(v), self.configured_mask(), &self.pdsk_array(v))
    }

    /// Creates the pending generation (`spec/state-machine.md` §8.5); writes wait until it is on disk.
    pub(crate) fn new_generation(&mut self, v: VolumeNr, forced: bool) {
        let Some(d) = self.devs.get_mut(&v) else { return };
        if !d.new_uuid_needed && !forced {
            return;
        }
        if !self.is_primary() && !forced {
            return;
        }
        if self.st.devs.get(&v).is_none_or(|d| !d.quorum) {
            return;
        }
        // A peer is being told the present generation; it would compare what is gone when it commits.
        let handshaking = self.conns.values().any(|c| c.params_sent && !self.st.connected(c.peer));
        if handshaking && !forced {
            return;
        }
        if let Some(d) = self.devs.get_mut(&v) {
            d.new_uuid_needed = false;
        }
        // A disk that is on its way out does not take part in the new generation, its metadata must not say so.
        let Some(mut set) = self.uuid_set(v).filter(|_| self.st.disk(v) > DiskState::Failed) else {
            self.new_exposed_generation(v);
            return;
        };
        let pdsk = self.pdsk_array(v);
        let weak = if forced {
            let established = self
                .st
                .peers_of(v)
                .filter(|(_, p)| p.repl >= ReplState::Established)
                .fold(0, |m, (n, _)| m | n.mask().0);
            uuid::initial_resync_targets(established, &pdsk)
        } else {
            self.weak_mask(v)
        };
        let input = uuid::NewCurrent {
            own_id: self.me.get(),
            primary: self.is_primary(),
            dagtag: self.dagtag,
            configured: self.configured_mask(),
            pdsk: &pdsk,
            weak,
            has_slot: self.slot_mask(v),
            max_peers: self.devs.get(&v).and_then(|d| d.ldev.as_ref()).map_or(0, |l| l.sb.max_peers as u8),
            random: self.rng.next_u64(),
            random_initial: self.rng.next_u64(),
            forced,
        };
        let Some(g) = set.new_current(&input) else { return };
        // The generation itself tells those peers now.
        for ((n, pv), p) in &mut self.pds {
            if *pv == v && g.slots & n.mask().0 != 0 {
                p.lost_writes = false;
            }
        }
        self.store_uuids(v, &set);
        self.gate_writes_on_superblock(v);
        let scope = self.scope(None, Some(v));
        self.log(
            LogLevel::Info,
            scope,
            format!("new current UUID: {:016X} weak: {:016X}", set.current, self.weak_mask(v)),
        );
        let weak = self.weak_mask(v);
        self.when_durable(v, crate::device::Then::AnnounceGeneration { weak, forced });
    }

    /// A Primary without disk starts a generation of which only the peers keep record, if somebody could tell the
    /// difference (`spec/state-machine.md` §8.5).
    fn new_exposed_generation(&mut self, v: VolumeNr) {
        let exposed = self.devs.get(&v).map_or(0, crate::device::Device::current_uuid);
        let diskful = |i: u8| NodeId::new(i).and_then(|n| self.conns.get(&n)).is_none_or(|c| c.diskful);
        let unmarked = self.st.peers_of(v).any(|(n, p)| {
            self.st.connected(n)
                && p.pdsk == DiskState::UpToDate
                && self
                    .pds
                    .get(&(n, v))
                    .and_then(|p| p.uuids.as_ref())
                    .is_some_and(|u| (0u8..32).any(|i| i != n.get() && u.set.slot(i) == 0 && diskful(i)))
        });
        let absent_and_current = self.st.peers_of(v).any(|(n, p)| {
            let absent = (p.pdsk < DiskState::Consistent || p.repl < ReplState::Established)
                && self.conns.get(&n).is_some_and(|c| c.diskful);
            let last = self.pds.get(&(n, v)).and_then(|p| p.uuids.as_ref());
            absent
                && last.is_none_or(|u| {
                    (u.set.current == 0 || same(u.set.current, exposed))
                        && !u.flags.contains(UuidFlags::SYNC_TARGET)
                })
        });
        if !unmarked && !absent_and_current {
            return;
        }
        let uuid = self.rng.next_u64() | uuid::PRIMARY_BIT;
        let weak = self.weak_mask(v);
        if let Some(d) = self.devs.get_mut(&v) {
            d.exposed_uuid = uuid;
        }
        // Whoever takes part follows; that is what is known of it from now on.
        for ((n, pv), p) in &mut self.pds {
            if *pv == v
                && weak & n.mask().0 == 0
                && let Some(u) = &mut p.uuids
            {
                u.set.current = uuid;
            }
        }
        let scope = self.scope(None, Some(v));
        self.log(LogLevel::Info, scope, format!("new exposed current UUID: {uuid:016X} weak: {weak:016X}"));
        self.close_epoch();
        for n in self.st.connected_mask().iter().collect::<Vec<_>>() {
            self.send_data(n, Some(v), Packet::CurrentUuid(CurrentUuid { uuid, weak_nodes: weak }));
        }
    }

    /// The new generation is on disk: the peers may follow.
    pub(crate) fn announce_generation(&mut self, v: VolumeNr, weak: u64, forced: bool) {
        // Writes of the old generation end here for every replica.
        self.close_epoch();
        let extra = if forced { UuidFlags::NONE } else { UuidFlags::NEW_DATAGEN };
        for n in self.st.connected_mask().iter().collect::<Vec<_>>() {
            if self.st.repl(n, v) >= ReplState::Established {
                self.send_uuids(n, v, extra, weak);
            }
        }
        self.todo(Todo::Kick(v));
    }

    /// Clears bits and bitmap UUID towards a peer that is known to be equal.
    pub(crate) fn clear_slot(&mut self, n: NodeId, v: VolumeNr) {
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.lost_writes = false;
            if let Some(u) = &mut p.uuids {
                u.dirty_bits = 0;
            }
        }
        let me = self.me.get();
        if let Some(mut set) = self.uuid_set(v) {
            set.clear_slot(me, n.get());
            self.store_uuids(v, &set);
        }
        if let Some(l) = self.ldev(v)
            && let Some(s) = l.slot(n)
            && l.bitmap.weight(s) > 0
        {
            l.bitmap.clear_all(s);
            self.mark_open_writes(n, v);
            self.write_bitmap(v);
        }
    }

    /// What a peer tells about the past says nothing of writes on their way: whoever does not get them is behind.
    fn mark_open_writes(&mut self, n: NodeId, v: VolumeNr) {
        let open = self
            .requests
            .values()
            .filter(|r| r.vnr == v && r.submitted && !r.peers.iter().any(|l| l.node == n && !l.gone));
        let ranges: Vec<_> = open.map(|r| r.sector..r.sector + u64::from(r.len) / SECTOR).collect();
        if let Some(l) = self.ldev(v)
            && let Some(s) = l.slot(n)
        {
            for r in ranges {
                l.bitmap.set_out_of_sync(s, r);
            }
        }
    }

    /// Every packet that belongs to a volume (or is not about the connection itself).
    pub(crate) fn volume_packet(
        &mut self,
        n: NodeId,
        volume: Option<VolumeNr>,
        packet: Packet,
        digest: &Bytes,
        data: Bytes,
    ) {
        // Connection-scoped packets of the data path.
        match packet {
            Packet::Barrier(b) => return self.got_barrier(n, b.barrier),
            Packet::BarrierAck(a) => return self.got_barrier_ack(n, a.barrier, a.set_size),
            Packet::ConfirmStable(c) => return self.got_confirm_stable(n, &c),
            Packet::PeerAck(a) => return self.got_peer_ack(n, NodeMask(a.mask), a.dagtag),
            Packet::Dagtag(Dagtag { dagtag }) => {
                if let Some(c) = self.conns.get_mut(&n) {
                    c.rx_dagtag = dagtag;
                }
                return;
            }
            Packet::PeerDagtag(d) => return self.got_peer_dagtag(n, d.node_id, d.dagtag),
            Packet::FlushRequests(f) => return self.got_flush_requests(n, f.flush_sequence),
            Packet::FlushForward(f) => {
                return self.got_flush_forward(n, f.flush_sequence, f.initiator_node_id);
            }
            Packet::FlushRequestsAck(f) => return self.got_flush_ack(n, f.flush_sequence, f.primary_node_id),
            Packet::UnplugRemote | Packet::DelayProbe(_) => return,
            _ => {}
        }
        let known = volume.filter(|v| self.pds.contains_key(&(n, *v)));
        let Some(v) = known else {
            // Configuration for a volume that is not here is drained (`spec/wire-protocol.md` §7.2).
            let config = matches!(
                packet,
                Packet::SyncParam89(_)
                    | Packet::Sizes(_)
                    | Packet::Uuids110(_)
                    | Packet::State(_)
                    | Packet::CurrentUuid(_)
                    | Packet::EnableReplicationNext(_)
            );
            if !config {
                self.drop_link(n, ConnState::ProtocolError, "packet for an unknown volume");
            }
            return;
        };
        match packet {
            Packet::SyncParam89(s) => self.got_sync_param(n, &s),
            Packet::Sizes(s) => self.got_sizes(n, v, &s),
            Packet::Uuids110(u) => self.got_uuids(n, v, &u),
            Packet::CurrentUuid(u) => self.got_current_uuid(n, v, &u),
            Packet::State(w) => self.got_state(n, v, w),
            Packet::Bitmap => self.got_plain_bitmap(n, v, &data),
            Packet::CompressedBitmap(c) => self.got_compressed_bitmap(n, v, c.encoding, &data),
            other => self.data_packet(n, v, other, digest, data),
        }
    }

    fn got_sync_param(&mut self, n: NodeId, s: &SyncParam) {
        if !s.csums_alg.is_empty() && !self.st.connected(n) {
            self.veto_all(
                n,
                Veto::Disconnect,
                "the peer configures csums-alg and this node does not; make it equal",
            );
        }
    }

    fn veto(&mut self, n: NodeId, v: VolumeNr, veto: Veto, why: &str) {
        let scope = self.scope(Some(n), Some(v));
        self.log(LogLevel::Error, scope, why);
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.veto = Some(veto);
        }
        self.phase_one();
    }

    fn veto_all(&mut self, n: NodeId, veto: Veto, why: &str) {
        if let Some(v) = self.vnrs().first() {
            self.veto(n, *v, veto, why);
        }
    }

    fn got_sizes(&mut self, n: NodeId, v: VolumeNr, s: &Sizes) {
        let bogus = (s.d_size != 0 && s.c_size > s.d_size) || (s.u_size != 0 && s.c_size > s.u_size);
        let handshaking = !self.st.connected(n);
        let Some(d) = self.devs.get(&v) else { return };
        let usable_data = self.st.disk(v) >= DiskState::Consistent;
        let peer_max = if s.d_size > 0 { s.d_size } else { u64::MAX };
        if bogus {
            return self.refuse(n, v, handshaking, "the peer announces impossible sizes");
        }
        if handshaking && usable_data && d.size > 0 && peer_max < d.size {
            let text = format!("The peer's disk size is too small! ({} < {} sectors)", peer_max, d.size);
            return self.refuse(n, v, handshaking, &text);
        }
        if handshaking && d.ldev.is_some() && self.st.disk(v) >= DiskState::Consistent && s.c_size > 0 {
            let usable = d.ldev.as_ref().map_or(0, |l| l.layout.usable_sectors);
            if s.c_size > usable {
                let text = format!(
                    "The own disk is too small for the peer's data ({usable} < {} sectors)",
                    s.c_size
                );
                return self.refuse(n, v, handshaking, &text);
            }
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.d_size = s.d_size;
            p.u_size = s.u_size;
            p.c_size = s.c_size;
            p.peer_max_bio = s.max_bio_size;
            p.sizes_received = true;
        }
        self.determine_size(v);
    }

    fn refuse(&mut self, n: NodeId, v: VolumeNr, handshaking: bool, why: &str) {
        if handshaking {
            self.veto(n, v, Veto::Disconnect, why);
        } else {
            let scope = self.scope(Some(n), Some(v));
            self.log(LogLevel::Error, scope, why);
            self.disconnect_now(n);
        }
    }

    /// The size of the device: the smallest disk that counts (`spec/state-machine.md` §7.9).
    pub(crate) fn determine_size(&mut self, v: VolumeNr) {
        let Some(d) = self.devs.get(&v) else { return };
        let present: Vec<(NodeId, u64, u64, u64)> = self
            .pds
            .iter()
            .filter(|((_, pv), p)| *pv == v && p.sizes_received)
            .map(|((n, _), p)| (*n, p.d_size, p.c_size, p.u_size))
            .collect();
        let limit = present
            .iter()
            .map(|x| x.3)
            .chain([d.cfg.size_sectors])
            .filter(|s| *s > 0)
            .min()
            .unwrap_or(u64::MAX);
        let mut size;
        match &d.ldev {
            Some(l) => {
                size = l.layout.usable_sectors;
                for x in &present {
                    if x.1 > 0 {
                        size = size.min(x.1);
                    }
                }
                // A disk seen before and absent now still limits: its node could not follow a larger one.
                let absent = NodeId::all().any(|n| {
                    n != self.me
                        && l.sb.peers[n.idx()].flags.contains(PeerFlags::DEVICE_SEEN)
                        && !present.iter().any(|x| x.0 == n && x.1 > 0)
                });
                if absent && l.sb.effective_size_sectors > 0 {
                    size = size.min(l.sb.effective_size_sectors);
                }
                size = size.min(limit);
            }
            None => {
                size =
                    present.iter().flat_map(|x| [x.1, x.2, x.3]).filter(|s| *s > 0).min().unwrap_or(d.size);
            }
        }
        // Data in use never shrinks.
        if d.size > 0 && size < d.size && self.st.disk(v) >= DiskState::Consistent {
            size = d.size;
        }
        let up_to_date = self.st.disk(v) == DiskState::UpToDate
            || self.st.peers_of(v).any(|(n, p)| self.st.connected(n) && p.pdsk == DiskState::UpToDate);
        let changed = d.size != size;
        if let Some(d) = self.devs.get_mut(&v) {
            d.size = size;
            if let Some(l) = &mut d.ldev {
                if l.bitmap.sectors() != size && l.bitmap.resize(size, true).is_err() {
                    let scope = self.scope(None, Some(v));
                    self.log(LogLevel::Error, scope, "the bitmap cannot cover the device");
                    return;
                }
                if l.sb.effective_size_sectors != 0 || up_to_date {
                    l.sb.effective_size_sectors = size;
                }
            }
        }
        self.superblock_changed(v);
        let bytes = size * crate::types::SECTOR;
        if let Some(d) = self.devs.get_mut(&v)
            && d.told_size != Some(bytes)
        {
            d.told_size = Some(bytes);
            self.emit(Output::DeviceSize { vnr: v, size: bytes });
        }
        if changed {
            let scope = self.scope(None, Some(v));
            self.log(LogLevel::Info, scope, format!("size = {} KB", bytes / 1024));
            self.event(crate::io::Event::Device(v));
        }
    }

    fn got_uuids(&mut self, n: NodeId, v: VolumeNr, u: &Uuids110) {
        let mut set =
            UuidSet { current: u.current, bitmap: [uuid::NOT_MEANINGFUL; 32], ..UuidSet::default() };
        for (i, x) in &u.bitmap_uuids {
            set.bitmap[*i as usize] = *x;
        }
        for (a, b) in set.history.iter_mut().zip(&u.history) {
            *a = *b;
        }
        self.note_nodes(n, v, u);
        let got_stable = u.flags.contains(UuidFlags::GOT_STABLE);
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.peer_exposed = None;
            p.got_stable = got_stable;
            p.uuids = Some(PeerUuids {
                set: set.clone(),
                dirty_bits: u.dirty_bits,
                flags: u.flags,
                node_mask: u.node_mask,
            });
        }
        if self.st.repl(n, v) < ReplState::Established {
            return;
        }
        if u.flags.contains(UuidFlags::SKIP_INITIAL_SYNC) {
            self.skip_initial_sync(n, v, u.current);
            return;
        }
        self.follow_generation(n, v, u.current, u.flags.contains(UuidFlags::NEW_DATAGEN), u.node_mask);
        self.detect_finished(n, v, false);
        self.recalc("uuids");
        let established = self.st.repl(n, v) == ReplState::Established;
        if established && got_stable && self.st.stable() {
            self.send_uuids(n, v, UuidFlags::RESYNC, 0);
            self.reconsider(n, v);
        } else if established && u.flags.contains(UuidFlags::RESYNC) {
            self.reconsider(n, v);
        } else if established
            && self.st.disk(v) == DiskState::Inconsistent
            && self.st.pdsk(n, v) == DiskState::UpToDate
            && !self.is_sync_target(v)
        {
            // The peer was forced to be UpToDate while both were Inconsistent.
            self.reconsider(n, v);
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.got_stable = false;
        }
        self.todo(Todo::CheckResyncEnd(n, v));
    }

    /// Nodes that a peer mentions exist (`spec/metadata.md` §9.2).
    fn note_nodes(&mut self, n: NodeId, v: VolumeNr, u: &Uuids110) {
        let skip = u.flags.unallocated_slot();
        let _ = n;
        if let Some(l) = self.ldev(v) {
            for (i, _) in &u.bitmap_uuids {
                if Some(*i) == skip {
                    continue;
                }
                if let Some(p) = l.sb.peers.get_mut(*i as usize)
                    && p.slot().is_none()
                {
                    p.flags.set(PeerFlags::NODE_EXISTS, true);
                }
            }
        }
        self.superblock_changed(v);
    }

    /// A diskless peer's exposed generation, or a new one of a diskless Primary.
    fn got_current_uuid(&mut self, n: NodeId, v: VolumeNr, u: &CurrentUuid) {
        if let Some(l) = self.ldev(v)
            && l.slot(n).is_none()
        {
            l.sb.peers[n.idx()].flags.set(PeerFlags::NODE_EXISTS, true);
        }
        if let Some(p) = self.pds.get_mut(&(n, v)) {
            p.peer_exposed = Some(u.uuid);
            p.uuids = None;
        }
        self.superblock_changed(v);
        if self.st.repl(n, v) >= ReplState::Established && u.uuid != 0 {
            let primary = self.st.peer_role(n) == Role::Primary;
            self.follow_generation(n, v, u.uuid, primary, u.weak_nodes);
            self.recalc("current-uuid");
        }
    }

    /// A peer has a new current UUID (`spec/state-machine.md` §8.6).
    fn follow_generation(&mut self, n: NodeId, v: VolumeNr, current: u64, new_datagen: bool, weak: u64) {
        use ReplState as R;
        // A disk on its way out gets none of the writes of the new generation.
        let leaving = matches!(self.st.disk(v), DiskState::Detaching | DiskState::Failed);
        let Some(mut set) = self.uuid_set(v).filter(|_| !leaving) else {
            if self.st.peer_role(n) == Role::Primary
                && new_datagen
                && let Some(d) = self.devs.get_mut(&v)
            {
                d.exposed_uuid = current;
            }
            return;
        };
        let pdsk = self.pdsk_array(v);
        let sync_target = self
            .st
            .peers_of(v)
            .any(|(_, p)| matches!(p.repl, R::SyncTarget | R::PausedSyncT | R::Behind | R::WFBitMapT));
        // Only what a Primary announces as new is followed; anything else is a matter of the comparison. Nor does
        // who gets no data from it, by its own word, follow it.
        if !new_datagen || weak & self.me.mask().0 != 0 {
            return;
        }
        let sender_dagtag = self.conns.get(&n).map_or(0, |c| c.rx_dagtag);
        let r = set.receive_new_current(&ReceivedCurrent {
            own_id: self.me.get(),
            own_role: self.st.role,
            own_disk: self.st.disk(v),
            sync_target,
            sender_role: self.st.peer_role(n),
            new_datagen,
            current,
            weak,
            dagtag: sender_dagtag,
            configured: self.configured_mask(),
            pdsk: &pdsk,
            has_slot: self.slot_mask(v),
        });
        match r {
            Received::Adopted { .. } => {
                self.store_uuids(v, &set);
                self.gate_writes_on_superblock(v);
                let scope = self.scope(Some(n), Some(v));
                self.log(LogLevel::Info, scope, format!("receiver updated UUIDs to {current:016X}"));
                for m in self.st.connected_mask().iter().filter(|m| *m != n).collect::<Vec<_>>() {
                    if self.st.repl(m, v) >= R::Established {
                        self.send_uuids(m, v, UuidFlags::NONE, 0);
                    }
                }
            }
            Received::Outdated => self.force("moved-on", |s| {
                if let Some(d) = s.devs.get_mut(&v)
                    && d.disk > DiskState::Outdated
                {
                    d.disk = DiskState::Outdated;
                }
            }),
            Received::Recorded | Received::Unchanged => {}
        }
    }

    /// What a UUID packet tells about resyncs that ended (`spec/state-machine.md` §8.8).
    pub(crate) fn detect_finished(&mut self, n: NodeId, v: VolumeNr, handshaking: bool) {
        use ReplState as R;
        let Some(mut set) = self.uuid_set(v) else { return };
        let Some((shown, my_flags, my_bits)) = self.presented(n, v) else { return };
        let Some(p) = self.pds.get(&(n, v)) else { return };
        let Some(u) = p.uuids.clone() else { return };
        let syncing_with =
            self.st.peers_of(v).filter(|(_, p)| p.repl > R::Established).fold(0, |m, (x, _)| m | x.mask().0);
        let det = finished::detect_finished_resyncs(&finished::Detect {
            apv: self.conns.get(&n).map_or(0, |c| c.apv),
            own_id: self.me.get(),
            sender: n.get(),
            handshaking,
            mine: &shown,
            theirs: &u.set,
            sync_target_flag: u.flags.contains(UuidFlags::SYNC_TARGET)
                || my_flags.contains(UuidFlags::SYNC_TARGET),
            my_slot_sent: p.sent_slot,
            any_bits: my_bits > 0 || u.dirty_bits > 0,
            known: self.known_nodes(v),
            syncing_with,
        });
        if det.actions.is_empty() {
            return;
        }
        // Whoever is not equal to this node cannot tell that a third one is.
        let sender_equal = my_bits == 0 && self.st.repl(n, v) == R::Established;
        for a in &det.actions {
            match *a {
                FinishedAction::ClearBits(_) if !sender_equal => {}
                FinishedAction::MarkPeerMissedEnd => {
                    if let Some(p) = self.pds.get_mut(&(n, v)) {
                        p.missed_end_target = true;
                    }
                }
                FinishedAction::MarkSelfMissedEnd => {
                    if let Some(p) = self.pds.get_mut(&(n, v)) {
                        p.missed_end_source = true;
                    }
                }
                FinishedAction::LogMissedEnd => {}
                FinishedAction::ClearSlot(x) => set.clear_slot(self.me.get(), x),
                FinishedAction::ClearBits(x) => {
                    if let Some(x) = NodeId::new(x)
                        && let Some(l) = self.ldev(v)
                        && let Some(s) = l.slot(x)
                    {
                        l.bitmap.clear_all(s);
                        self.mark_open_writes(x, v);
                    }
                }
                FinishedAction::CopySlot { from, to } => {
                    set.copy_slot(self.me.get(), from, to);
                    if let (Some(f), Some(t)) = (NodeId::new(from), NodeId::new(to))
                        && let Some(l) = self.ldev(v)
                        && let (Some(f), Some(t)) = (l.slot(f), l.slot(t))
                    {
                        l.bitmap.copy_slot(f, t);
                    }
                }
            }
        }
        self.store_uuids(v, &set);
        self.write_bitmap(v);
        match det.announce {
            Announce::Nobody => {}
            Announce::AllButSender => {
                self.todo(Todo::SendUuids { vnr: v, except: Some(n), got_stable: false });
            }
            Announce::All => self.todo(Todo::SendUuids { vnr: v, except: None, got_stable: false }),
        }
    }

    /// The peer declared all replicas equal (`spec/state-machine.md` §7.10).
    fn skip_initial_sync(&mut self, n: NodeId, v: VolumeNr, current: u64) {
        let fresh = self.devs.get(&v).is_some_and(|d| d.ldev.is_some() && is_just_created(d.current_uuid()));
        if !fresh {
            return;
        }
        let scope = self.scope(Some(n), Some(v));
        self.log(LogLevel::Info, scope, "Accepted new current UUID, preparing to skip initial sync");
        self.declare_equal(v, current);
        self.force("skip-initial-sync", |s| {
            if let Some(d) = s.devs.get_mut(&v) {
                d.disk = DiskState::UpToDate;
            }
            if let Some(p) = s.pds.get_mut(&(n, v)) {
                p.pdsk = DiskState::UpToDate;
            }
        });
    }

    /// All bits and bitmap UUIDs cleared, one current UUID.
    pub(crate) fn declare_equal(&mut self, v: VolumeNr, current: u64) {
        let Some(mut set) = self.uuid_set(v) else { return };
        let old = set.current;
        set.current = current;
        set.bitmap = [0; 32];
        set.bitmap_dagtag = [0; 32];
        set.push_history(self.me.get(), old);
        if let Some(l) = self.ldev(v) {
            for s in 0..l.bitmap.slots() {
                l.bitmap.clear_all(s);
            }
        }
        self.store_uuids(v, &set);
        self.write_bitmap(v);
    }

    /// P_STATE of a volume.
    fn got_state(&mut self, n: NodeId, v: VolumeNr, w: StateWord) {
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
    fn is_sync_target(&self, v: VolumeNr) -> bool {
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

fn nonzero_or_max(x: u64) -> u64 {
    if x == 0 { u64::MAX } else { x }
}
