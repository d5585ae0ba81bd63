//! Device nodes of this process: `/dev/drbdN` while Primary.

use super::Origin;
use crate::core_api::VolumeNr;
use crate::engine::{Engine, Token};
use crate::ring::{Fd, Op};
use palisade_export::{BackendKind, DeviceEvent, DeviceExport, DeviceParams, open_device};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;

/// Where a node is on its way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum NodeState {
    /// What a dead engine left is being removed first.
    CleaningUp,
    /// Being created.
    Attaching,
    /// Usable.
    Attached,
    /// Being removed.
    Detaching {
        /// Whether users are thrown out.
        force: bool,
    },
    /// Could not be created, or went away; the text says why.
    Failed(String),
    /// Still there, because somebody uses it; the text says who.
    Refused(String),
}

/// A device node and who serves it.
pub(crate) struct Node {
    pub(crate) export: Box<dyn DeviceExport>,
    pub(crate) state: NodeState,
    /// Requests may be waiting that were not taken.
    pub(crate) waiting: bool,
    fd: Fd,
    serial: u64,
}

impl Engine {
    pub(crate) fn node_attach(&mut self, vnr: VolumeNr, size: u64) {
        if is_unwanted() {
            return;
        }
        match self.front.nodes.get(&vnr).map(|n| &n.state) {
            // What is left of a node that did not come or go as it should makes room for a new one.
            Some(NodeState::Failed(_) | NodeState::Refused(_)) => drop(self.front.nodes.remove(&vnr)),
            Some(_) => return,
            None => {}
        }
        if let Err(e) = self.node_begin(vnr, size, NodeState::Attaching) {
            tracing::error!("{}/{vnr}: no device node: {e}", self.name);
            self.front.failure = Some(format!("No device node for volume {vnr}: {e}."));
        }
    }

    /// Begins to remove what an engine that died left of a node; a node comes only after that.
    pub(crate) fn node_clean_up(&mut self, vnr: VolumeNr) {
        if is_unwanted() || self.front.nodes.contains_key(&vnr) {
            return;
        }
        if let Err(e) = self.node_begin(vnr, 0, NodeState::CleaningUp) {
            tracing::warn!("{}/{vnr}: not looked for what a dead engine left: {e}", self.name);
        }
    }

    /// Starts what leads to a state.
    fn node_begin(&mut self, vnr: VolumeNr, size: u64, state: NodeState) -> io::Result<()> {
        let Some(volume) = self.local.volumes.get(&vnr.0) else { return Ok(()) };
        let mut params = DeviceParams::new(volume.minor, size);
        let by_res = PathBuf::from("/dev/drbd/by-res").join(&self.name).join(vnr.to_string());
        params.links = vec![by_res];
        if let Some(disk) = volume.backing.as_ref().and_then(|b| b.disk.strip_prefix("/dev/")) {
            params.links.push(PathBuf::from("/dev/drbd/by-disk").join(disk));
        }
        let mut export = open_device(BackendKind::detect(), self.pool.clone())?;
        let fd: Fd = Rc::new(export.event_fd().try_clone_to_owned()?);
        if state == NodeState::Attaching {
            export.attach(params);
        } else {
            export.clean_up(params);
        }
        let serial = self.id();
        self.ring.push(Token::Device(vnr, serial), Op::Poll { fd: Rc::clone(&fd) });
        let node = Node { export, state, waiting: false, fd, serial };
        self.front.nodes.insert(vnr, node);
        Ok(())
    }

    pub(crate) fn node_resize(&mut self, vnr: VolumeNr, size: u64) {
        if let Some(node) = self.front.nodes.get_mut(&vnr) {
            node.export.resize(size);
        }
    }

    /// Begins to remove a node.
    pub(crate) fn node_detach(&mut self, vnr: VolumeNr, force: bool) {
        if let Some(node) = self.front.nodes.get_mut(&vnr)
            && node.state != (NodeState::Detaching { force })
            && node.state != NodeState::CleaningUp
        {
            node.state = NodeState::Detaching { force };
            node.export.detach(force);
        }
    }

    /// The core says that the node must go, whoever uses it.
    pub(crate) fn node_remove(&mut self, vnr: VolumeNr) {
        if matches!(self.front.nodes.get(&vnr).map(|n| &n.state), Some(NodeState::Failed(_))) {
            self.front.nodes.remove(&vnr);
        }
        self.node_detach(vnr, true);
    }

    pub(crate) fn device_ready(&mut self, vnr: VolumeNr, serial: u64) {
        let Some(node) = self.front.nodes.get(&vnr).filter(|n| n.serial == serial) else { return };
        let fd = Rc::clone(&node.fd);
        if self.net.is_congested() {
            if let Some(node) = self.front.nodes.get_mut(&vnr) {
                node.waiting = true;
            }
            return;
        }
        self.node_take(vnr);
        if self.front.nodes.get(&vnr).is_some_and(|n| n.serial == serial) {
            self.ring.push(Token::Device(vnr, serial), Op::Poll { fd });
        }
    }

    /// Goes on with a node whose requests had to wait.
    pub(crate) fn node_pull(&mut self, vnr: VolumeNr) {
        if let Some(node) = self.front.nodes.get_mut(&vnr) {
            node.waiting = false;
            let serial = node.serial;
            self.device_ready(vnr, serial);
        }
    }

    /// Takes what a node has to say. Its own limit bounds the requests it has out.
    fn node_take(&mut self, vnr: VolumeNr) {
        while let Some(node) = self.front.nodes.get_mut(&vnr) {
            let Some(event) = node.export.next_event() else { return };
            match event {
                DeviceEvent::Request(request) => self.front_request(Origin::Device(vnr), vnr, request),
                DeviceEvent::Attached(Ok(())) => self.node_attached(vnr),
                DeviceEvent::Attached(Err(e)) => self.node_failed(vnr, &e.to_string()),
                DeviceEvent::Resized(Ok(())) => {}
                DeviceEvent::Resized(Err(e)) => {
                    tracing::error!("{}/{vnr}: the device node kept its old size: {e}", self.name);
                }
                DeviceEvent::Detached(Ok(())) => {
                    self.front.nodes.remove(&vnr);
                    // Promoted again in the meantime.
                    if self.front.present && !self.is_vanishing() {
                        self.volume_appears(vnr);
                    }
                }
                DeviceEvent::Detached(Err(e)) if node.state == NodeState::CleaningUp => {
                    tracing::warn!("{}/{vnr}: not looked for what a dead engine left: {e}", self.name);
                    self.front.nodes.remove(&vnr);
                    if self.front.present {
                        self.volume_appears(vnr);
                    }
                }
                DeviceEvent::Detached(Err(e)) => node.state = NodeState::Refused(e.to_string()),
                DeviceEvent::Lost(why) => {
                    let ours = matches!(node.state, NodeState::Detaching { .. });
                    if ours {
                        self.front.nodes.remove(&vnr);
                    } else {
                        self.node_failed(vnr, &why);
                    }
                }
            }
        }
    }

    fn node_attached(&mut self, vnr: VolumeNr) {
        let (present, size) = (self.front.present, self.front.sizes.get(&vnr).copied().unwrap_or(0));
        if let Some(node) = self.front.nodes.get_mut(&vnr) {
            match node.state {
                // Asked for in vain while the node was being made.
                NodeState::Detaching { force } => node.export.detach(force),
                _ if !present => self.node_detach(vnr, true),
                _ => {
                    node.state = NodeState::Attached;
                    tracing::info!("{}/{vnr}: device node present, {size} bytes", self.name);
                }
            }
        }
        self.status_changed = true;
    }

    fn node_failed(&mut self, vnr: VolumeNr, why: &str) {
        tracing::error!("{}/{vnr}: {why}", self.name);
        if let Some(node) = self.front.nodes.get_mut(&vnr) {
            node.state = NodeState::Failed(why.to_owned());
        }
    }
}

/// Whether this process makes no nodes at all.
fn is_unwanted() -> bool {
    std::env::var("PALISADE_DEVICE").is_ok_and(|v| v == "none")
}
