//! What an administrator asks for (`spec/state-machine.md` §7, §12.3).

use crate::config::DiskConfig;
use crate::connection::Connection;
use crate::core::{AdminError, Core, Todo};
use crate::device::{Device, Ldev, MetaState};
use crate::io::{AdminId, Backing, Command, Event, LogLevel, Output, PeerSpec};
use crate::state::{ConnStates, DevStates, Options};
use crate::tables::quorum::QuorumOption;
use crate::tables::refusal::{ConfigError, Refusal};
use crate::tables::uuid::is_just_created;
use crate::twopc::{Change, Offer};
use crate::types::{NodeId, VolumeNr};
use palisade_metadata::{DeviceFlags, PeerFlags};
use palisade_wire::UuidFlags;
use palisade_wire::enums::{ConnState, DiskState, ReplState, Role};

type Answer = Result<(), AdminError>;

impl Core {
    pub(crate) fn admin(&mut self, id: AdminId, command: Command) {
        if let Some(answer) = self.command(id, command) {
            self.answer(Some(id), answer);
        }
    }

    /// Carries the command out; `None` when the answer comes later.
    fn command(&mut self, id: AdminId, command: Command) -> Option<Answer> {
        match command {
            Command::NewVolume { vnr, minor } => Some(self.new_volume(vnr, minor)),
            Command::DelVolume(v) => Some(self.del_volume(v)),
            Command::NewPeer(spec) => Some(self.new_peer(spec)),
            Command::DelPeer(n) => Some(self.del_peer(n)),
            Command::ForgetPeer(n) => Some(self.forget_peer(n)),
            Command::Attach { vnr, backing, disk } => self.attach(id, vnr, *backing, disk),
            Command::Detach { vnr, force } => self.detach(id, vnr, force),
            Command::SetClient(v) => {
                let Some(d) = self.devs.get_mut(&v) else { return Some(Err(unknown_volume())) };
                d.client = true;
                self.recalc("diskless");
                Some(Ok(()))
            }
            Command::Connect { peer, discard_my_data, tentative } => {
                Some(self.connect(peer, discard_my_data, tentative))
            }
            Command::Disconnect { peer, force } => self.disconnect(id, peer, force),
            Command::Promote { force } => {
                if self.is_primary() {
                    return Some(Ok(()));
                }
                let change = Change::Promote { up_to_date: false, outdate_peers: false };
                self.queue_operation(change, Some(id), force);
                None
            }
            Command::Demote { force } => {
                self.queue_operation(Change::Demote { force }, Some(id), force);
                None
            }
            Command::Outdate(v) => Some(self.outdate(v)),
            Command::Invalidate { vnr, from, reset_bitmap } => self.invalidate(id, vnr, from, reset_bitmap),
            Command::InvalidateRemote { vnr, peer, reset_bitmap } => {
                self.invalidate_remote(id, vnr, peer, reset_bitmap)
            }
            Command::NewCurrentUuid { vnr, clear_bitmap, force_resync } => {
                Some(self.new_current_uuid(vnr, clear_bitmap, force_resync))
            }
            Command::SuspendIo(_) => {
                self.force("suspend-io", |s| s.susp_user = true);
                Some(Ok(()))
            }
            Command::ResumeIo(v) => {
                if self.st.suspended() {
                    self.new_generation(v, false);
                }
                self.force("resume-io", |s| {
                    s.susp_user = false;
                    s.susp_nod = false;
                    s.susp_fen = false;
                });
                Some(Ok(()))
            }
            Command::PauseSync { vnr, peer } => Some(self.pause(vnr, peer, true)),
            Command::ResumeSync { vnr, peer } => Some(self.pause(vnr, peer, false)),
            Command::SetResource(r) => {
                self.cfg.resource = r;
                self.recalc("resource-options");
                self.todo(Todo::Thaw);
                Some(Ok(()))
            }
            Command::SetNet { peer, net } => {
                let Some(c) = self.conns.get_mut(&peer) else { return Some(Err(unknown_peer())) };
                c.net = *net;
                if self.st.connected(peer) {
                    self.send_protocol_update(peer);
                }
                self.recalc("net-options");
                Some(Ok(()))
            }
            Command::SetDisk { vnr, disk } => {
                let Some(d) = self.devs.get_mut(&vnr) else { return Some(Err(unknown_volume())) };
                d.cfg = disk;
                self.determine_size(vnr);
                Some(Ok(()))
            }
            Command::SetPeerDevice { vnr, peer, opts } => {
                let Some(p) = self.pds.get_mut(&(peer, vnr)) else { return Some(Err(unknown_peer())) };
                p.cfg = opts;
                Some(Ok(()))
            }
            Command::Down => {
                self.down = Some(id);
                self.queue_operation(Change::Demote { force: false }, None, false);
                self.down_step();
                None
            }
        }
    }

    fn new_volume(&mut self, v: VolumeNr, minor: u32) -> Answer {
        if self.devs.contains_key(&v) {
            return Err(ConfigError::MinorOrVolumeExists.into());
        }
        self.devs.insert(v, Device::new(v, minor));
        self.st.devs.insert(v, DevStates { disk: DiskState::Diskless, quorum: false });
        for n in self.peers() {
            self.new_peer_device(n, v);
            if self.st.connected(n) {
                self.send_volume_params(n, v);
            }
        }
        self.recalc("new-minor");
        self.event(Event::Device(v));
        Ok(())
    }

    fn del_volume(&mut self, v: VolumeNr) -> Answer {
        if self.st.disk(v) != DiskState::Diskless || self.is_primary() {
            return Err(ConfigError::MinorConfigured.into());
        }
        self.devs.remove(&v);
        self.st.devs.remove(&v);
        self.pds.retain(|(_, pv), _| *pv != v);
        self.st.pds.retain(|(_, pv), _| *pv != v);
        self.event(Event::DeviceGone(v));
        self.recalc("del-minor");
        Ok(())
    }

    fn new_peer(&mut self, spec: PeerSpec) -> Answer {
        let n = spec.id;
        if n == self.me {
            return Err(ConfigError::InvalidPeerNodeId.into());
        }
        if self.conns.contains_key(&n) {
            return Err(ConfigError::AlreadyExists.into());
        }
        crate::tables::refusal::check_net_options(&crate::tables::refusal::NetOptions {
            protocol: spec.net.protocol,
            two_primaries: spec.net.two_primaries,
            stonith: spec.net.fencing == crate::config::Fencing::ResourceAndStonith,
            congestion_policy: false,
        })?;
        let diskful = spec.diskful;
        if diskful {
            for d in self.devs.values_mut() {
                if let Some(l) = &mut d.ldev
                    && !assign_slot(l, n)
                {
                    return Err(ConfigError::InvalidRequest.into());
                }
            }
        }
        self.conns.insert(n, Connection::new(spec));
        self.st.conns.insert(n, ConnStates { cstate: ConnState::StandAlone, peer_role: Role::Unknown });
        for v in self.vnrs() {
            self.new_peer_device(n, v);
            self.superblock_changed(v);
        }
        self.recalc("new-peer");
        self.event(Event::Connection(n));
        Ok(())
    }

    fn del_peer(&mut self, n: NodeId) -> Answer {
        if !self.conns.contains_key(&n) {
            return Err(unknown_peer());
        }
        if self.st.cstate(n) != ConnState::StandAlone {
            return Err(ConfigError::HasNetConfig.into());
        }
        self.conns.remove(&n);
        self.st.conns.remove(&n);
        self.pds.retain(|(m, _), _| *m != n);
        self.st.pds.retain(|(m, _), _| *m != n);
        self.operations
            .retain(|o| !matches!(o.change, Change::Connect(m) | Change::Disconnect(m, _) if m == n));
        self.event(Event::ConnectionGone(n));
        self.recalc("del-peer");
        Ok(())
    }

    fn forget_peer(&mut self, n: NodeId) -> Answer {
        if self.conns.contains_key(&n) {
            return Err(ConfigError::HasNetConfig.into());
        }
        for v in self.vnrs() {
            if let Some(l) = self.ldev(v) {
                let p = &mut l.sb.peers[n.idx()];
                if let Some(s) = p.slot() {
                    l.bitmap.set_all(s);
                }
                *p = palisade_metadata::PeerSlot::default();
            }
            self.superblock_changed(v);
            self.write_bitmap(v);
        }
        self.recalc("forget-peer");
        Ok(())
    }

    fn attach(&mut self, id: AdminId, v: VolumeNr, b: Backing, disk: DiskConfig) -> Option<Answer> {
        match self.take_disk(v, b, disk) {
            Ok(true) => {
                self.queue_operation(Change::Negotiate(v), Some(id), false);
                None
            }
            Ok(false) => Some(Ok(())),
            Err(e) => {
                self.emit(Output::DropBacking(v));
                Some(Err(e))
            }
        }
    }

    /// Checks and takes the disk; true if connected peers have a say in its state.
    fn take_disk(&mut self, v: VolumeNr, mut b: Backing, disk: DiskConfig) -> Result<bool, AdminError> {
        let me = self.me;
        let Some(d) = self.devs.get(&v) else { return Err(unknown_volume()) };
        if d.ldev.is_some() || self.st.disk(v) != DiskState::Diskless {
            return Err(ConfigError::HasDisk.into());
        }
        if !b.superblock.is_clean() {
            return Err(ConfigError::MetadataUnclean.into());
        }
        if b.superblock.node_id >= 0 && b.superblock.node_id != i32::from(me.get()) {
            return Err(ConfigError::NoMetadata.into());
        }
        let usable = b.layout.usable_sectors;
        if disk.size_sectors > usable || (d.size > 0 && usable < d.size) {
            return Err(ConfigError::DiskTooSmall.into());
        }
        let consistent = b.superblock.flags.contains(DeviceFlags::CONSISTENT);
        if consistent && b.superblock.effective_size_sectors > usable {
            return Err(ConfigError::ImplicitShrink.into());
        }
        let current = b.superblock.current_uuid;
        let peer_data =
            self.st.peers_of(v).any(|(n, p)| self.st.connected(n) && p.pdsk == DiskState::UpToDate);
        if self.is_primary()
            && d.exposed_uuid != 0
            && !crate::tables::uuid::same(d.exposed_uuid, current)
            && !peer_data
        {
            return Err(ConfigError::DataNotCurrent.into());
        }
        b.superblock.node_id = me.get().into();
        let fresh = b.superblock.effective_size_sectors == 0;
        let crashed = b.superblock.flags.contains(DeviceFlags::CRASHED_PRIMARY);
        let al_disabled = b.superblock.flags.contains(DeviceFlags::AL_DISABLED);
        let primary_ind = b.superblock.flags.contains(DeviceFlags::PRIMARY_IND);
        let size = if fresh { usable } else { b.superblock.effective_size_sectors };
        if b.bitmap.sectors() != size && b.bitmap.resize(size, true).is_err() {
            return Err(ConfigError::NoMetadata.into());
        }
        let extents = u32::from(disk.al_extents).min(b.layout.al_extents_max()).max(7);
        let mut l = Ldev {
            sb: b.superblock,
            bitmap: b.bitmap,
            layout: b.layout,
            al: crate::activity_log::ActivityLog::new(u16::try_from(extents).unwrap_or(u16::MAX)),
            meta: MetaState::default(),
            logical_block_size: b.logical_block_size,
            physical_block_size: b.physical_block_size,
            discard: b.discard,
            discard_zeroes: b.discard_zeroes,
            written: None,
        };
        l.sb.al_nr_extents = extents;
        let lost_all = crashed && primary_ind && al_disabled;
        l.sb.flags.set(DeviceFlags::AL_DISABLED, !disk.al_updates);
        for slot in 0..l.bitmap.slots() {
            if fresh || lost_all {
                l.bitmap.set_all(slot);
            }
        }
        for c in self.conns.values().filter(|c| c.diskful) {
            if !assign_slot(&mut l, c.peer) {
                return Err(ConfigError::InvalidRequest.into());
            }
        }
        for n in NodeId::all().filter(|n| *n != me) {
            if l.sb.peers[n.idx()].flags.contains(PeerFlags::FULL_SYNC)
                && let Some(s) = l.slot(n)
            {
                l.bitmap.set_all(s);
                l.meta.full_sync = true;
            }
        }
        let lost_quorum = l.sb.flags.contains(DeviceFlags::PRIMARY_LOST_QUORUM);
        let restore = l.sb.flags.contains(DeviceFlags::HAVE_QUORUM)
            && l.sb.flags.contains(DeviceFlags::WAS_UP_TO_DATE)
            && l.sb.members == me.mask().0
            && self.st.connected_mask().is_empty();
        for n in self.peers() {
            let outdated = l.sb.peers[n.idx()].flags.contains(PeerFlags::OUTDATED);
            if outdated
                && !self.st.connected(n)
                && let Some(p) = self.st.pds.get_mut(&(n, v))
                && p.pdsk == DiskState::DUnknown
            {
                p.pdsk = DiskState::Outdated;
            }
            if let Some(c) = self.conns.get_mut(&n) {
                // "Connected before and nothing was restarted" is not true of this disk.
                c.was_connected = self.st.connected(n);
            }
        }
        if let Some(d) = self.devs.get_mut(&v) {
            d.cfg = disk;
            d.crashed_primary = crashed && d.exposed_uuid == 0 && !d.new_uuid_needed;
            d.crashed_replica = primary_ind && !crashed;
            d.primary_lost_quorum = lost_quorum;
            d.had_quorum |= restore;
            d.ldev = Some(l);
            d.client = false;
            d.exposed_uuid = 0;
            d.unproven.clear();
        }
        if lost_quorum {
            // Which peers missed writes is only known by the bits.
            for n in self.peers() {
                let bits = self.ldev(v).and_then(|l| l.slot(n).map(|s| l.bitmap.weight(s))).unwrap_or(0);
                if let Some(p) = self.pds.get_mut(&(n, v)) {
                    p.lost_writes = bits > 0;
                }
            }
        }
        let scope = self.scope(None, Some(v));
        self.log(LogLevel::Info, scope, format!("attached to current UUID: {current:016X}"));
        self.force("attach", |s| {
            if let Some(d) = s.devs.get_mut(&v) {
                d.disk = DiskState::Attaching;
            }
        });
        self.determine_size(v);
        self.write_bitmap(v);
        let negotiates =
            self.st.peers_of(v).any(|(n, p)| self.st.connected(n) && p.pdsk >= DiskState::Negotiating);
        if !negotiates {
            self.disk_from_metadata(v);
            for n in self.st.connected_mask().iter().collect::<Vec<_>>() {
                self.send_volume_params(n, v);
            }
        }
        Ok(negotiates)
    }

    fn disk_from_metadata(&mut self, v: VolumeNr) {
        let state = self.with_facts(|f| {
            let (c, u) = f.md_consistent.get(&v).copied().unwrap_or((false, false));
            crate::state::disk_state_from_md(c, u, crate::state::may_be_up_to_date(&self.st, f, v))
        });
        self.force("attach", |s| {
            if let Some(d) = s.devs.get_mut(&v) {
                d.disk = state;
            }
        });
        self.determine_size(v);
    }

    /// The cluster agreed that this disk negotiates (`spec/wire-protocol.md` §4.12).
    /// Sizes and identifiers go first, the state (which the change itself sends) makes the peer compare.
    pub(crate) fn negotiate(&mut self, v: VolumeNr) {
        for n in self.st.connected_mask().iter().collect::<Vec<_>>() {
            self.send_sizes(n, v);
            self.send_uuids(n, v, UuidFlags::NONE, 0);
            let diskful = self.st.pdsk(n, v) >= DiskState::Negotiating;
            if let Some(p) = self.pds.get_mut(&(n, v)) {
                p.negotiating = diskful;
            }
        }
    }

    fn detach(&mut self, id: AdminId, v: VolumeNr, force: bool) -> Option<Answer> {
        if !self.devs.contains_key(&v) {
            return Some(Err(unknown_volume()));
        }
        match self.st.disk(v) {
            DiskState::Diskless => Some(Ok(())),
            _ if force => {
                self.force("detach", |s| {
                    if let Some(d) = s.devs.get_mut(&v) {
                        d.disk = DiskState::Failed;
                    }
                });
                self.todo(Todo::DiskGone(v));
                Some(Ok(()))
            }
            _ => {
                self.queue_operation(Change::Detach(v), Some(id), false);
                None
            }
        }
    }

    /// The disk is on its way out: no new I/O for it.
    pub(crate) fn disk_leaves(&mut self, v: VolumeNr) {
        self.todo(Todo::DiskGone(v));
    }

    /// Detaching or Failed becomes Diskless when nothing is in flight any more.
    pub(crate) fn disk_gone(&mut self, v: VolumeNr) {
        let state = self.st.disk(v);
        if !matches!(state, DiskState::Failed | DiskState::Detaching) {
            return;
        }
        let Some(d) = self.devs.get_mut(&v) else { return };
        if d.disk_ios > 0 {
            return;
        }
        if state == DiskState::Detaching
            && let Some(l) = &mut d.ldev
            && l.meta.job.is_none()
            && (l.meta.sb_generation > l.meta.sb_durable || l.bitmap.dirty_count() > 0)
        {
            // Leave behind what is known.
            if l.bitmap.dirty_count() > 0 && l.meta.bm_generation == l.meta.bm_durable {
                l.meta.bm_generation += 1;
            }
            self.meta_next(v);
            return;
        }
        let current = d.current_uuid();
        d.ldev = None;
        if d.exposed_uuid == 0 {
            d.exposed_uuid = current;
        }
        d.locks.clear();
        let waiting: Vec<u64> = d.al_wait_app.drain(..).map(|x| x.1).chain(d.ready.drain(..)).collect();
        d.al_wait_peer.clear();
        d.peer_waiting.clear();
        d.stopped_writes.clear();
        // The log is gone, and every reference with it.
        for r in self.requests.values_mut().filter(|r| r.vnr == v) {
            r.al_held = false;
        }
        for r in self.peer_requests.values_mut().filter(|r| r.vnr == v) {
            r.al_held = false;
        }
        for c in self.conns.values_mut() {
            for u in c.unacked.iter_mut().filter(|u| u.vnr == v) {
                u.al = false;
            }
        }
        d.ready.extend(waiting);
        // Replicated writes that never reached the disk are refused.
        let lost: Vec<u64> =
            self.peer_requests.iter().filter(|(_, r)| r.vnr == v).map(|(id, _)| *id).collect();
        for id in lost {
            self.peer_write_done(v, id, Err(crate::io::IoError::Failed));
        }
        self.emit(Output::DropBacking(v));
        self.force("detach", |s| {
            if let Some(d) = s.devs.get_mut(&v) {
                d.disk = DiskState::Diskless;
            }
        });
        self.down_step();
    }

    fn connect(&mut self, n: NodeId, discard: bool, tentative: bool) -> Answer {
        let Some(c) = self.conns.get_mut(&n) else { return Err(unknown_peer()) };
        if discard && self.st.role == Role::Primary {
            return Err(ConfigError::DiscardNotAllowed.into());
        }
        if self.st.cstate(n) != ConnState::StandAlone {
            return if discard || tentative { Err(ConfigError::HasNetConfig.into()) } else { Ok(()) };
        }
        c.discard_my_data = discard;
        c.tentative = tentative;
        self.force("connect", |s| {
            if let Some(c) = s.conns.get_mut(&n) {
                c.cstate = ConnState::Unconnected;
            }
        });
        self.reconnect(n);
        Ok(())
    }

    fn disconnect(&mut self, id: AdminId, n: NodeId, force: bool) -> Option<Answer> {
        if !self.conns.contains_key(&n) {
            return Some(Err(unknown_peer()));
        }
        match self.st.cstate(n) {
            ConnState::StandAlone => Some(Ok(())),
            ConnState::Connected if !force => {
                self.queue_operation(Change::Disconnect(n, self.offer(n)), Some(id), false);
                None
            }
            _ => {
                self.disconnect_now(n);
                Some(Ok(()))
            }
        }
    }

    /// With fencing or quorum the side that stops writing offers to be outdated (`spec/state-machine.md` §7.4).
    fn offer(&self, n: NodeId) -> Offer {
        let guarded = self.cfg.resource.quorum != QuorumOption::Off
            || self.conns.get(&n).is_some_and(|c| c.net.fencing != crate::config::Fencing::DontCare);
        match (guarded, self.st.role, self.st.peer_role(n)) {
            (true, Role::Primary, Role::Secondary) => Offer::OutdatePeer,
            (true, Role::Secondary, Role::Primary) => Offer::OutdateSelf,
            _ => Offer::Nothing,
        }
    }

    fn outdate(&mut self, v: VolumeNr) -> Answer {
        if self.st.disk(v) == DiskState::Diskless {
            return Err(Refusal::IsDiskless.into());
        }
        if self.st.disk(v) == DiskState::Outdated {
            return Ok(());
        }
        self.change("outdate", Options::default(), |s| {
            if let Some(d) = s.devs.get_mut(&v) {
                d.disk = DiskState::Outdated;
            }
        })?;
        Ok(())
    }

    fn invalidate(&mut self, id: AdminId, v: VolumeNr, from: Option<NodeId>, reset: bool) -> Option<Answer> {
        if self.devs.get(&v).is_none_or(|d| d.ldev.is_none()) {
            return Some(Err(Refusal::NoLocalDisk.into()));
        }
        let source = self
            .st
            .peers_of(v)
            .filter(|(n, p)| {
                self.st.connected(*n)
                    && p.repl >= ReplState::Established
                    && p.pdsk >= DiskState::Consistent
                    && from.is_none_or(|f| f == *n)
            })
            .max_by_key(|(_, p)| p.pdsk)
            .map(|x| x.0);
        match source {
            Some(peer) => {
                let to = if reset { ReplState::StartingSyncT } else { ReplState::WFBitMapT };
                self.queue_operation(Change::Resync { peer, vnr: v, to }, Some(id), false);
                None
            }
            None if !reset || from.is_some() => Some(Err(Refusal::NeedConnection.into())),
            None => {
                let r = self.change("invalidate", Options::default(), |s| {
                    if let Some(d) = s.devs.get_mut(&v) {
                        d.disk = DiskState::Inconsistent;
                    }
                });
                if r.is_ok() {
                    self.set_all_bits(v, None);
                }
                Some(r.map(|_| ()).map_err(AdminError::from))
            }
        }
    }

    fn invalidate_remote(&mut self, id: AdminId, v: VolumeNr, n: NodeId, reset: bool) -> Option<Answer> {
        if !self.conns.contains_key(&n) {
            return Some(Err(unknown_peer()));
        }
        if self.devs.get(&v).is_none_or(|d| d.ldev.is_none()) {
            return Some(Err(Refusal::NoLocalDisk.into()));
        }
        // What is behind itself must not be given to others: they would keep the newer generation's name.
        if self.st.disk(v) < DiskState::UpToDate {
            return Some(Err(Refusal::NoUpToDateData.into()));
        }
        if self.st.connected(n) {
            let to = if reset { ReplState::StartingSyncS } else { ReplState::WFBitMapS };
            self.queue_operation(Change::Resync { peer: n, vnr: v, to }, Some(id), false);
            return None;
        }
        if !reset || !self.is_primary() {
            return Some(Err(Refusal::NeedConnection.into()));
        }
        self.set_all_bits(v, Some(n));
        self.need_generation(v);
        Some(Ok(()))
    }

    /// `spec/state-machine.md` §7.10.
    fn new_current_uuid(&mut self, v: VolumeNr, clear: bool, force_resync: bool) -> Answer {
        let Some(d) = self.devs.get(&v) else { return Err(unknown_volume()) };
        if d.ldev.is_none() {
            return Err(Refusal::NoLocalDisk.into());
        }
        let fresh = is_just_created(d.current_uuid());
        let beyond_off = self.st.peers_of(v).any(|(_, p)| p.repl > ReplState::Off);
        let beyond_established = self.st.peers_of(v).any(|(_, p)| p.repl > ReplState::Established);
        let skip = (clear || force_resync) && fresh && !beyond_established;
        if beyond_off && !skip {
            return Err(ConfigError::NotStandAlone.into());
        }
        let random = self.rng.next_u64() & !1;
        if clear {
            self.declare_equal(v, random | u64::from(self.is_primary()));
            for n in self.st.connected_mask().iter().collect::<Vec<_>>() {
                self.send_uuids(n, v, UuidFlags::SKIP_INITIAL_SYNC, 0);
            }
            self.force("new-c-uuid", |s| {
                if let Some(d) = s.devs.get_mut(&v) {
                    d.disk = DiskState::UpToDate;
                }
                for ((_, pv), p) in &mut s.pds {
                    if *pv == v && p.repl == ReplState::Established && p.pdsk >= DiskState::Inconsistent {
                        p.pdsk = DiskState::UpToDate;
                    }
                }
            });
            return Ok(());
        }
        self.new_generation(v, true);
        if force_resync {
            self.force("force-resync", |s| {
                if let Some(d) = s.devs.get_mut(&v) {
                    d.disk = DiskState::UpToDate;
                }
            });
        }
        Ok(())
    }

    fn pause(&mut self, v: VolumeNr, n: NodeId, on: bool) -> Answer {
        let Some(p) = self.st.pds.get(&(n, v)) else { return Err(unknown_peer()) };
        if p.pause.user == on {
            return Err(
                if on { ConfigError::PauseAlreadySet } else { ConfigError::PauseAlreadyCleared }.into()
            );
        }
        self.change(if on { "pause-sync" } else { "resume-sync" }, Options::default(), |s| {
            if let Some(p) = s.pds.get_mut(&(n, v)) {
                p.pause.user = on;
            }
        })?;
        Ok(())
    }

    /// The next step of taking everything down.
    pub(crate) fn down_step(&mut self) {
        if self.down.is_none() {
            return;
        }
        if self.is_primary() {
            if !self.operations.iter().any(|o| matches!(o.change, Change::Demote { .. })) {
                // The demotion was refused.
                let id = self.down.take();
                let mut e = AdminError::from(Refusal::DeviceInUse);
                e.info.push("failed to demote".to_string());
                self.answer(id, Err(e));
            }
            return;
        }
        for n in self.peers() {
            match self.st.cstate(n) {
                ConnState::StandAlone | ConnState::Disconnecting => {}
                ConnState::Connected => {
                    if !self.operations.iter().any(|o| matches!(o.change, Change::Disconnect(m, _) if m == n))
                    {
                        let offer = self.offer(n);
                        self.queue_operation(Change::Disconnect(n, offer), None, false);
                    }
                    return;
                }
                _ => {
                    self.disconnect_now(n);
                    return;
                }
            }
        }
        for v in self.vnrs() {
            match self.st.disk(v) {
                DiskState::Diskless => {}
                DiskState::Detaching | DiskState::Failed => return,
                _ => {
                    self.force("down", |s| {
                        if let Some(d) = s.devs.get_mut(&v) {
                            d.disk = DiskState::Detaching;
                        }
                    });
                    self.todo(Todo::DiskGone(v));
                    return;
                }
            }
        }
        let id = self.down.take();
        self.answer(id, Ok(()));
    }
}

/// Gives a peer a bitmap slot: the one it has, or the lowest unused. False if there is none.
fn assign_slot(l: &mut Ldev, n: NodeId) -> bool {
    if l.slot(n).is_some() {
        return true;
    }
    let Some(s) = l.sb.free_bitmap_slot() else { return false };
    l.sb.peers[n.idx()].bitmap_index = i32::try_from(s).unwrap_or(-1);
    l.sb.peers[n.idx()].flags.set(PeerFlags::HAVE_BITMAP, true);
    l.slot(n).is_some()
}

fn unknown_peer() -> AdminError {
    ConfigError::InvalidPeerNodeId.into()
}

fn unknown_volume() -> AdminError {
    ConfigError::MinorUnknown.into()
}
