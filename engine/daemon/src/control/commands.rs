//! What each command of a client does: a change of the local configuration, a command of the core, or both.
//!
//! Local configuration changes only when the core agreed, so a refused command leaves nothing half applied.

use super::ReplyTo;
use crate::config::{LocalBacking, LocalPeer, LocalVolume};
use crate::core_api::{
    AdminError, Command as CoreCommand, Core, CoreConfig, NodeId, PeerSpec, Time, VolumeNr,
};
use crate::engine::Engine;
use crate::flow::refusal;
use crate::net::Path;
use crate::net::peers::NetPeer;
use crate::{disk, options};
use palisade_control::{
    AddressFamily, Command, Endpoint, Options, Payload, Refusal, Reply, RunningPath, TimeoutType, code,
};
use std::net::SocketAddr;
use std::time::Duration;

type Outcome = Result<(), Refusal>;

/// How long an attach waits for a device that is in use.
const CLAIM_PATIENCE: Duration = Duration::from_secs(2);
/// Time between its attempts.
const CLAIM_INTERVAL: Duration = Duration::from_millis(50);

/// An attach that waits for its devices.
#[derive(Debug)]
pub(crate) struct Claim {
    to: ReplyTo,
    minor: u32,
    local: LocalBacking,
    /// Next attempt.
    pub(crate) at: Time,
    until: Time,
}

fn refuse(code: i32, why: impl Into<String>) -> Refusal {
    Refusal::new(code).with_info(why)
}

/// The peer with that number.
fn node(id: u8) -> Result<NodeId, Refusal> {
    NodeId::new(id)
        .ok_or_else(|| refuse(code::INVALID_PEER_NODE_ID, format!("{id} is no node id (0 to 31).")))
}

impl Engine {
    /// Carries a command out; the answer may come later.
    pub(crate) fn command(&mut self, to: ReplyTo, command: Command) {
        let before_resource = matches!(
            command,
            Command::NewResource { .. }
                | Command::Down
                | Command::DelResource
                | Command::Status
                | Command::Subscribe
        );
        let result = if self.core.is_none() && !before_resource {
            Err(refuse(code::RES_NOT_KNOWN, "This engine was not told 'new-resource' yet."))
        } else {
            self.dispatch(to, command)
        };
        if let Err(refused) = result {
            self.reply(to, Reply::Refused(refused));
        }
        self.status_changed = true;
    }

    fn dispatch(&mut self, to: ReplyTo, command: Command) -> Outcome {
        match command {
            Command::NewResource { name, node_id, options } => self.new_resource(to, &name, node_id, options),
            Command::ResourceOptions { options, set_defaults } => {
                let all = options::merge(&self.local.options, &options, set_defaults);
                let config = options::resource(&all)?;
                self.ask(to, CoreCommand::SetResource(config), move |e| e.local.options = all);
                Ok(())
            }
            Command::NewMinor { minor, volume, options } => self.new_minor(to, minor, volume, &options),
            Command::DelMinor { minor } => {
                let vnr = self.volume(minor)?;
                self.ask(to, CoreCommand::DelVolume(vnr), move |e| {
                    e.local.volumes.remove(&vnr.0);
                    e.front.sizes.remove(&vnr);
                    for peer in e.local.peers.values_mut() {
                        peer.peer_devices.remove(&vnr.0);
                    }
                });
                Ok(())
            }
            Command::NewPeer { peer_node_id, name, options } => {
                self.new_peer(to, peer_node_id, name, options)
            }
            Command::DelPeer { peer_node_id, force } => self.del_peer(to, peer_node_id, force),
            Command::ForgetPeer { peer_node_id } => {
                self.ask(to, CoreCommand::ForgetPeer(node(peer_node_id)?), |_| {});
                Ok(())
            }
            Command::NewPath { peer_node_id, local, remote } => {
                self.new_path(to, peer_node_id, local, remote)
            }
            Command::DelPath { peer_node_id, local, remote } => {
                self.del_path(to, peer_node_id, local, remote)
            }
            Command::NetOptions { peer_node_id, options, set_defaults } => {
                let peer = self.peer(peer_node_id)?;
                let all = options::merge(&peer.options, &options, set_defaults);
                self.set_net(to, peer_node_id, all)
            }
            Command::PeerDeviceOptions { peer_node_id, volume, options, set_defaults } => {
                self.peer_device_options(to, peer_node_id, volume, &options, set_defaults)
            }
            Command::Attach { minor, backing_device, meta_device, meta_index, options } => {
                let backing =
                    LocalBacking { disk: backing_device, meta_disk: meta_device, meta_index, options };
                self.attach(to, minor, backing)
            }
            Command::DiskOptions { minor, options, set_defaults } => {
                self.disk_options(to, minor, &options, set_defaults)
            }
            Command::Detach { minor, force, diskless } => {
                let vnr = self.volume(minor)?;
                self.detach(to, vnr, force, diskless);
                Ok(())
            }
            Command::Verify { .. } | Command::Resize { .. } => {
                self.reply(to, Reply::unsupported(&command));
                Ok(())
            }
            Command::Handlers { handlers, config_file, node_names } => {
                self.local.handlers = handlers;
                self.local.config_file = config_file;
                self.local.node_names = node_names;
                self.reply(to, Reply::done());
                Ok(())
            }
            Command::Primary { force } => {
                self.begin_promote(force, to);
                Ok(())
            }
            Command::Secondary { force } => {
                self.begin_demote(force, to);
                Ok(())
            }
            Command::Down => {
                self.begin_down(Some(to));
                Ok(())
            }
            Command::DelResource => self.del_resource(to),
            other => self.dispatch_simple(to, other),
        }
    }

    /// Commands that only concern the core, and questions.
    fn dispatch_simple(&mut self, to: ReplyTo, command: Command) -> Outcome {
        let core = match command {
            Command::Connect { peer_node_id, discard_my_data, tentative } => {
                if self.net.peers.get(&peer_node_id).is_none_or(|p| p.paths.is_empty()) {
                    let why = format!("Node {peer_node_id} has no path; add one with 'new-path'.");
                    return Err(refuse(code::NO_NET_CONFIG, why));
                }
                CoreCommand::Connect { peer: node(peer_node_id)?, discard_my_data, tentative }
            }
            Command::Disconnect { peer_node_id, force } => {
                CoreCommand::Disconnect { peer: node(peer_node_id)?, force }
            }
            Command::Outdate { minor } => CoreCommand::Outdate(self.volume(minor)?),
            Command::Invalidate { minor, reset_bitmap, sync_from } => {
                let from = sync_from.map(node).transpose()?;
                CoreCommand::Invalidate { vnr: self.volume(minor)?, from, reset_bitmap }
            }
            Command::InvalidateRemote { peer_node_id, volume, reset_bitmap } => {
                CoreCommand::InvalidateRemote {
                    vnr: VolumeNr(volume),
                    peer: node(peer_node_id)?,
                    reset_bitmap,
                }
            }
            Command::NewCurrentUuid { minor, clear_bitmap, force_resync } => {
                CoreCommand::NewCurrentUuid { vnr: self.volume(minor)?, clear_bitmap, force_resync }
            }
            Command::SuspendIo { minor } => CoreCommand::SuspendIo(self.volume(minor)?),
            Command::ResumeIo { minor } => CoreCommand::ResumeIo(self.volume(minor)?),
            Command::PauseSync { peer_node_id, volume } => {
                CoreCommand::PauseSync { vnr: VolumeNr(volume), peer: node(peer_node_id)? }
            }
            Command::ResumeSync { peer_node_id, volume } => {
                CoreCommand::ResumeSync { vnr: VolumeNr(volume), peer: node(peer_node_id)? }
            }
            Command::Status => {
                let status = self.resource_status();
                self.reply(to, Reply::with(Payload::Status(status)));
                return Ok(());
            }
            Command::Show => {
                let running = self.local.running(&self.name, |peer| self.connection_state(peer));
                self.reply(to, Reply::with(Payload::Running(running)));
                return Ok(());
            }
            Command::GetGi { peer_node_id, volume } => {
                let info = self
                    .generation_info(peer_node_id, volume)
                    .ok_or_else(|| refuse(code::NO_DISK, format!("Volume {volume} has no disk.")))?;
                self.reply(to, Reply::with(Payload::GenerationInfo(info)));
                return Ok(());
            }
            Command::TimeoutType { peer_node_id, volume } => {
                let kind = match self.generation_info(peer_node_id, volume) {
                    Some(g) if g.peer_outdated => TimeoutType::Outdated,
                    // The node ran without this peer when it was last up.
                    Some(g) if g.primary && !g.peer_connected => TimeoutType::Degraded,
                    _ => TimeoutType::Default,
                };
                self.reply(to, Reply::with(Payload::Timeout(kind)));
                return Ok(());
            }
            Command::Subscribe => {
                self.subscribe(to);
                return Ok(());
            }
            other => {
                self.reply(to, Reply::unsupported(&other));
                return Ok(());
            }
        };
        self.ask(to, core, |_| {});
        Ok(())
    }

    /// Asks the core; `then` runs when it agreed, before the client is told.
    fn ask(&mut self, to: ReplyTo, command: CoreCommand, then: impl FnOnce(&mut Self) + 'static) {
        self.admin(command, move |engine, result: Result<(), AdminError>| {
            let reply = match result {
                Ok(()) => {
                    then(engine);
                    Reply::done()
                }
                Err(e) => Reply::Refused(refusal(e)),
            };
            engine.status_changed = true;
            engine.reply(to, reply);
        });
    }

    fn volume(&self, minor: u32) -> Result<VolumeNr, Refusal> {
        let found = self.local.volume_of(minor).map(VolumeNr);
        found.ok_or_else(|| {
            refuse(code::MINOR_INVALID, format!("This resource has no volume with minor {minor}."))
        })
    }

    fn peer(&self, id: u8) -> Result<&LocalPeer, Refusal> {
        let found = self.local.peers.get(&id);
        found.ok_or_else(|| {
            refuse(code::INVALID_REQUEST, format!("This resource has no connection to node {id}."))
        })
    }

    fn new_resource(&mut self, to: ReplyTo, name: &str, node_id: u8, options: Options) -> Outcome {
        if self.core.is_some() {
            return Err(refuse(code::ALREADY_EXISTS, format!("Resource {name} exists already.")));
        }
        if name != self.name {
            let why = format!("This engine was started for resource {}, not {name}.", self.name);
            return Err(refuse(code::INVALID_REQUEST, why));
        }
        let resource = options::resource(&options)?;
        let seed = crate::sys::random_bytes()
            .map_err(|e| refuse(code::NO_MEMORY, format!("The system gives no random numbers: {e}.")))?;
        let config = CoreConfig { name: name.to_owned(), node_id: node(node_id)?, resource, seed };
        self.core = Some(Core::new(config));
        self.local.node_id = Some(node_id);
        self.local.options = options;
        self.reply(to, Reply::done());
        Ok(())
    }

    /// The volume is meant to be without a disk from now on.
    fn set_client(&mut self, vnr: VolumeNr) {
        if let Some(volume) = self.local.volumes.get_mut(&vnr.0) {
            volume.client = true;
        }
        self.admin(CoreCommand::SetClient(vnr), |_, _| {});
    }

    fn new_minor(&mut self, to: ReplyTo, minor: u32, volume: u16, options: &Options) -> Outcome {
        let client = options::device(options)?;
        let options: Options = options.iter().filter(|(name, _)| *name != "diskless").collect();
        if minor >= 1 << 20 {
            return Err(refuse(code::INVALID_REQUEST, format!("{minor} is no minor number (0 to 1048575).")));
        }
        if volume == u16::MAX {
            return Err(refuse(code::INVALID_REQUEST, format!("{volume} is no volume number (0 to 65534).")));
        }
        if self.local.volume_of(minor).is_some() || self.local.volumes.contains_key(&volume) {
            return Err(Refusal::new(code::MINOR_OR_VOLUME_EXISTS));
        }
        self.ask(to, CoreCommand::NewVolume { vnr: VolumeNr(volume), minor }, move |e| {
            e.local.volumes.insert(volume, LocalVolume { minor, client: false, options, backing: None });
            if client {
                e.set_client(VolumeNr(volume));
            }
            e.node_clean_up(VolumeNr(volume));
        });
        Ok(())
    }

    fn new_peer(&mut self, to: ReplyTo, id: u8, name: String, options: Options) -> Outcome {
        let peer = node(id)?;
        let (net, transport) = options::net(&options, true)?;
        let spec = PeerSpec { id: peer, name: name.clone(), net, diskful: true };
        self.ask(to, CoreCommand::NewPeer(spec), move |e| {
            let local = LocalPeer {
                name,
                options,
                paths: Vec::new(),
                peer_devices: std::collections::BTreeMap::new(),
                diskful: true,
                tiebreaker: true,
            };
            e.local.peers.insert(id, local);
            e.net.peers.insert(id, NetPeer::new(transport));
        });
        Ok(())
    }

    fn del_peer(&mut self, to: ReplyTo, id: u8, force: bool) -> Outcome {
        let peer = node(id)?;
        self.peer(id)?;
        let remove = move |engine: &mut Self| {
            engine.ask(to, CoreCommand::DelPeer(peer), move |e| {
                e.local.peers.remove(&id);
                e.net.peers.remove(&id);
            });
        };
        if self.connection_state(id) == palisade_control::ConnectionState::StandAlone {
            remove(self);
            return Ok(());
        }
        self.admin(CoreCommand::Disconnect { peer, force }, move |engine, result| match result {
            Ok(()) => remove(engine),
            Err(e) => engine.reply(to, Reply::Refused(refusal(e))),
        });
        Ok(())
    }

    fn new_path(&mut self, to: ReplyTo, id: u8, local: Endpoint, remote: Endpoint) -> Outcome {
        self.peer(id)?;
        for end in [&local, &remote] {
            if !matches!(end.family, AddressFamily::Ipv4 | AddressFamily::Ipv6) {
                let why =
                    format!("Address family '{}' is not supported; use ipv4 or ipv6.", end.family.as_str());
                return Err(refuse(code::CREATE_TRANSPORT, why));
            }
        }
        if local.address.is_ipv4() != remote.address.is_ipv4() {
            return Err(refuse(code::INVALID_REQUEST, "Both ends of a path must be of one address family."));
        }
        let path = RunningPath { local, remote };
        if self.local.peers.values().flat_map(|p| &p.paths).any(|p| *p == path) {
            return Err(Refusal::new(code::LOCAL_AND_PEER_ADDR));
        }
        let Some(net) = self.net.peers.get_mut(&id) else {
            return Err(refuse(
                code::INVALID_REQUEST,
                format!("This resource has no connection to node {id}."),
            ));
        };
        net.paths.push(Path { local: address(&path.local), remote: address(&path.remote) });
        if let Some(peer) = self.local.peers.get_mut(&id) {
            peer.paths.push(path);
        }
        self.reply(to, Reply::done());
        Ok(())
    }

    fn del_path(&mut self, to: ReplyTo, id: u8, local: Endpoint, remote: Endpoint) -> Outcome {
        let path = RunningPath { local, remote };
        if !self.peer(id)?.paths.contains(&path) {
            return Err(refuse(code::INVALID_REQUEST, format!("Node {id} has no such path.")));
        }
        let gone = Path { local: address(&path.local), remote: address(&path.remote) };
        let Some(net) = self.net.peers.get_mut(&id) else { return Ok(()) };
        let searching = net.is_active() && net.established.is_none();
        if net.established == Some(gone) || (searching && net.paths.len() == 1) {
            return Err(refuse(code::NET_CONFIGURED, "The path is in use; disconnect first."));
        }
        net.paths.retain(|p| *p != gone);
        if let Some(peer) = self.local.peers.get_mut(&id) {
            peer.paths.retain(|p| *p != path);
        }
        self.reply(to, Reply::done());
        Ok(())
    }

    fn set_net(&mut self, to: ReplyTo, id: u8, all: Options) -> Outcome {
        let tiebreaker = self.peer(id)?.tiebreaker;
        let (net, transport) = options::net(&all, tiebreaker)?;
        let command = CoreCommand::SetNet { peer: node(id)?, net: Box::new(net) };
        self.ask(to, command, move |e| {
            if let Some(peer) = e.local.peers.get_mut(&id) {
                peer.options = all;
            }
            if let Some(peer) = e.net.peers.get_mut(&id) {
                peer.transport = transport;
            }
        });
        Ok(())
    }

    fn peer_device_options(
        &mut self,
        to: ReplyTo,
        id: u8,
        volume: u16,
        given: &Options,
        set_defaults: bool,
    ) -> Outcome {
        let local = self.peer(id)?;
        let none = Options::new();
        let all = options::merge(local.peer_devices.get(&volume).unwrap_or(&none), given, set_defaults);
        let parsed = options::peer_device(&all)?;
        if !self.local.volumes.contains_key(&volume) {
            return Err(refuse(code::INVALID_REQUEST, format!("This resource has no volume {volume}.")));
        }
        let (net, _) = options::net(&local.options, parsed.tiebreaker)?;
        let (name, peer) = (local.name.clone(), node(id)?);
        if parsed.diskful != local.diskful {
            let unused = self.connection_state(id) == palisade_control::ConnectionState::StandAlone
                && self.local.volumes.values().all(|v| v.backing.is_none());
            if !unused {
                let why = "'bitmap' can only be changed while the connection is StandAlone and no disk is attached.";
                return Err(refuse(code::INVALID_REQUEST, why));
            }
            // The core decides about bitmap slots when it learns of a peer.
            let spec = PeerSpec { id: peer, name, net: net.clone(), diskful: parsed.diskful };
            self.admin(CoreCommand::DelPeer(peer), |_, _| {});
            self.admin(CoreCommand::NewPeer(spec), |_, _| {});
        }
        if parsed.tiebreaker != local_tiebreaker(self, id) {
            self.admin(CoreCommand::SetNet { peer, net: Box::new(net) }, |_, _| {});
        }
        let vnr = VolumeNr(volume);
        let command = CoreCommand::SetPeerDevice { vnr, peer, opts: parsed.config };
        self.ask(to, command, move |e| {
            if let Some(peer) = e.local.peers.get_mut(&id) {
                peer.peer_devices.insert(volume, all);
                peer.diskful = parsed.diskful;
                peer.tiebreaker = parsed.tiebreaker;
            }
        });
        Ok(())
    }

    fn attach(&mut self, to: ReplyTo, minor: u32, local: LocalBacking) -> Outcome {
        let until = self.now() + CLAIM_PATIENCE;
        self.attach_until(Claim { to, minor, local, at: until, until })
    }

    /// Tries again to get devices that were in use.
    pub(crate) fn claim_timers(&mut self, now: Time) {
        let (due, later) = std::mem::take(&mut self.claims).into_iter().partition(|c| c.at <= now);
        self.claims = later;
        let due: Vec<Claim> = due;
        for claim in due {
            let to = claim.to;
            if let Err(refused) = self.attach_until(claim) {
                self.reply(to, Reply::Refused(refused));
            }
        }
    }

    /// The kernel lets go of what a killed engine had open some time after that is gone: until then, wait.
    fn attach_until(&mut self, claim: Claim) -> Outcome {
        let Claim { to, minor, ref local, until, .. } = claim;
        let vnr = self.volume(minor)?;
        let (config, md_flushes) = options::disk(&local.options)?;
        if self.backings.contains_key(&vnr) {
            return Err(Refusal::new(code::DISK_CONFIGURED));
        }
        let node_id = self.local.node_id.unwrap_or_default();
        let opened = disk::open(&local.disk, &local.meta_disk, local.meta_index, node_id, &self.pool);
        let claimed = |e: &Refusal| matches!(e.code, code::DISK_CLAIMED | code::MD_DISK_CLAIMED);
        let now = self.now();
        if opened.as_ref().is_err_and(claimed) && now < until {
            self.claims.push(Claim { at: now + CLAIM_INTERVAL, ..claim });
            return Ok(());
        }
        let (backing, core) = opened?;
        let local = claim.local;
        backing.md_flushes.set(md_flushes);
        self.backings.insert(vnr, backing);
        let command = CoreCommand::Attach { vnr, backing: core, disk: config };
        // Known at once, so that what the core does on the way finds it; a refusal drops the backing device.
        if let Some(volume) = self.local.volumes.get_mut(&vnr.0) {
            volume.backing = Some(local);
        }
        self.ask(to, command, move |e| {
            if let Some(volume) = e.local.volumes.get_mut(&vnr.0) {
                volume.client = false;
            }
        });
        Ok(())
    }

    /// Answered when the backing device is free again; by force, at once.
    fn detach(&mut self, to: ReplyTo, vnr: VolumeNr, force: bool, diskless: bool) {
        self.admin(CoreCommand::Detach { vnr, force }, move |engine, result| {
            if let Err(e) = result {
                return engine.reply(to, Reply::Refused(refusal(e)));
            }
            if diskless {
                engine.set_client(vnr);
            }
            engine.status_changed = true;
            if force || !engine.backings.contains_key(&vnr) {
                engine.reply(to, Reply::done());
            } else {
                engine.detaching.push((vnr, to));
            }
        });
    }

    fn disk_options(&mut self, to: ReplyTo, minor: u32, given: &Options, set_defaults: bool) -> Outcome {
        let vnr = self.volume(minor)?;
        let attached = self.local.volumes.get(&vnr.0).and_then(|v| v.backing.as_ref());
        let Some(backing) = attached else { return Err(Refusal::new(code::NO_DISK)) };
        let all = options::merge(&backing.options, given, set_defaults);
        let (config, md_flushes) = options::disk(&all)?;
        let (old, _) = options::disk(&backing.options)?;
        if old.al_extents != config.al_extents || old.al_updates != config.al_updates {
            let why =
                "'al-extents' and 'al-updates' take effect when a disk is attached; detach and attach again.";
            return Err(refuse(code::INVALID_REQUEST, why));
        }
        self.ask(to, CoreCommand::SetDisk { vnr, disk: config }, move |e| {
            if let Some(b) = e.backings.get(&vnr) {
                b.md_flushes.set(md_flushes);
            }
            if let Some(b) = e.local.volumes.get_mut(&vnr.0).and_then(|v| v.backing.as_mut()) {
                b.options = all;
            }
        });
        Ok(())
    }

    fn del_resource(&mut self, to: ReplyTo) -> Outcome {
        if !self.local.volumes.is_empty() {
            return Err(Refusal::new(code::RES_IN_USE));
        }
        if !self.local.peers.is_empty() {
            return Err(refuse(
                code::NET_CONFIGURED,
                "The resource still has connections; delete them first.",
            ));
        }
        self.reply(to, Reply::done());
        self.exit = true;
        Ok(())
    }
}

fn local_tiebreaker(engine: &Engine, id: u8) -> bool {
    engine.local.peers.get(&id).is_none_or(|p| p.tiebreaker)
}

fn address(end: &Endpoint) -> SocketAddr {
    SocketAddr::new(end.address, end.port)
}
