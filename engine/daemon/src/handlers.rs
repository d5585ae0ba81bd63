//! Handlers: what the administrator wants run on events (`spec/state-machine.md` §14.1).
//!
//! The configured text goes to `/bin/sh -c` as it is; everything about the event travels in the environment
//! only. Standard streams lead to `/dev/null`, so a script that prints does not fail.

use crate::core_api::{HandlerCall, HandlerId, Input, Time};
use crate::engine::{Engine, Token};
use crate::ring::{Fd, Op};
use crate::sys;
use palisade_control::{Event, HelperPhase};
use std::collections::BTreeMap;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

/// A handler that runs longer is killed. Fencing through a cluster can take minutes.
const RUN_TIME_MAX: Duration = Duration::from_secs(600);
/// Handlers at a time.
const RUNNING_MAX: usize = 64;

struct Run {
    id: HandlerId,
    name: &'static str,
    call: HandlerCall,
    child: Child,
    until: Time,
}

/// Handlers that run.
#[derive(Default)]
pub(crate) struct Handlers {
    running: BTreeMap<u64, Run>,
}

impl Handlers {
    /// When the next one has run too long.
    pub(crate) fn deadline(&self) -> Option<Time> {
        self.running.values().map(|r| r.until).min()
    }
}

impl Engine {
    pub(crate) fn run_handler(&mut self, id: HandlerId, call: &HandlerCall) {
        let Some(text) = self.local.handlers.get(call.name).cloned() else {
            self.inbox.push_back(Input::HandlerDone { id, exit: Some(0) });
            return;
        };
        if self.handlers.running.len() >= RUNNING_MAX {
            tracing::error!("{}: too many handlers run; {} is not started", self.name, call.name);
            self.inbox.push_back(Input::HandlerDone { id, exit: None });
            return;
        }
        tracing::info!("{}: helper command: {}", self.name, call.name);
        self.publish_event(&self.helper_event(call, HelperPhase::Call));
        let started = self.handler_command(&text, call).spawn().and_then(|mut child| {
            match sys::pidfd(child.id()) {
                Ok(fd) => Ok((child, Rc::new(fd))),
                Err(e) => {
                    sys::kill_group(child.id());
                    // Killed: it ends at once.
                    let _ = child.wait();
                    Err(e)
                }
            }
        });
        match started {
            Ok((child, fd)) => {
                let fd: Fd = fd;
                let key = self.id();
                let until = self.now() + RUN_TIME_MAX;
                self.ring.push(Token::Handler(key), Op::Poll { fd });
                let run = Run { id, name: call.name, call: call.clone(), child, until };
                self.handlers.running.insert(key, run);
            }
            Err(e) => {
                tracing::error!("{}: handler {} cannot be started: {e}", self.name, call.name);
                self.inbox.push_back(Input::HandlerDone { id, exit: None });
            }
        }
    }

    pub(crate) fn handler_ended(&mut self, key: u64) {
        let Some(mut run) = self.handlers.running.remove(&key) else { return };
        let status = match run.child.try_wait() {
            Ok(Some(status)) => Some(status),
            Ok(None) | Err(_) => run.child.wait().ok(),
        };
        let exit = status.and_then(|s| s.code());
        let raw = status.map_or(-1, ExitStatusExt::into_raw);
        tracing::info!("{}: helper command: {} exit code {exit:?}", self.name, run.name);
        self.publish_event(&self.helper_event(&run.call, HelperPhase::Response { status: raw }));
        self.inbox.push_back(Input::HandlerDone { id: run.id, exit });
    }

    /// Kills what runs too long; its end is reported like any other.
    pub(crate) fn handler_timers(&mut self, now: Time) {
        for run in self.handlers.running.values_mut().filter(|r| r.until <= now) {
            tracing::error!("handler {} ran for {} s and is killed", run.name, RUN_TIME_MAX.as_secs());
            sys::kill_group(run.child.id());
            run.until = now + Duration::from_secs(60);
        }
    }

    fn helper_event(&self, call: &HandlerCall, phase: HelperPhase) -> Event {
        let name_of = |peer: u8| self.local.peers.get(&peer).map(|p| p.name.clone()).unwrap_or_default();
        let minor_of = |volume: u16| self.local.volumes.get(&volume).map_or(0, |v| v.minor);
        Event::Helper {
            phase,
            resource: self.name.clone(),
            peer: call.peer.map(|p| (i32::from(p.get()), name_of(p.get()))),
            device: call.vnr.map(|v| (v.0, minor_of(v.0))),
            helper: call.name.to_owned(),
        }
    }

    fn handler_command(&self, text: &str, call: &HandlerCall) -> Command {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(text).env_clear().envs(self.handler_environment(call)).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        sys::in_child(&mut command, sys::unblock_signals);
        command
    }

    fn handler_environment(&self, call: &HandlerCall) -> BTreeMap<String, String> {
        let mut env = BTreeMap::new();
        let mut set = |name: &str, value: String| drop(env.insert(name.to_owned(), value));
        set("HOME", "/".to_owned());
        set("TERM", "linux".to_owned());
        set("PATH", "/sbin:/usr/sbin:/bin:/usr/bin".to_owned());
        set("DRBD_RESOURCE", self.name.clone());
        set("DRBD_CONF", self.local.config_file.clone());
        if let Some(node) = self.local.node_id {
            set("DRBD_MY_NODE_ID", node.to_string());
        }
        for (node, name) in &self.local.node_names {
            set(&format!("DRBD_NODE_ID_{node}"), name.clone());
        }
        if let Some(runtime) = std::env::var_os("PALISADE_RUNTIME_DIR") {
            // Handlers talk to this engine.
            set("PALISADE_RUNTIME_DIR", runtime.to_string_lossy().into_owned());
        }
        let disks: Vec<(u16, String, String)> = self
            .local
            .volumes
            .iter()
            .filter(|(nr, _)| call.vnr.is_none_or(|v| v.0 == **nr))
            .map(|(nr, v)| {
                let disk = v.backing.as_ref().map_or_else(|| "none".to_owned(), |b| b.disk.clone());
                (*nr, v.minor.to_string(), disk)
            })
            .collect();
        let list =
            |part: fn(&(u16, String, String)) -> String| disks.iter().map(part).collect::<Vec<_>>().join(" ");
        set("DRBD_VOLUME", list(|d| d.0.to_string()));
        set("DRBD_MINOR", list(|d| d.1.clone()));
        set("DRBD_LL_DISK", list(|d| d.2.clone()));
        for (volume, minor, disk) in &disks {
            if call.vnr.is_some() {
                set("DRBD_BACKING_DEV", disk.clone());
            } else {
                set(&format!("DRBD_MINOR_{volume}"), minor.clone());
                set(&format!("DRBD_BACKING_DEV_{volume}"), disk.clone());
            }
        }
        if let Some(peer) = call.peer {
            set("DRBD_PEER_NODE_ID", peer.get().to_string());
            let local = self.local.peers.get(&peer.get());
            if let Some(path) = local.and_then(|p| p.paths.first()) {
                set("DRBD_MY_AF", path.local.family.as_str().to_owned());
                set("DRBD_MY_ADDRESS", path.local.address.to_string());
                set("DRBD_PEER_AF", path.remote.family.as_str().to_owned());
                set("DRBD_PEER_ADDRESS", path.remote.address.to_string());
            }
        }
        if let Some(cstate) = call.cstate {
            set("DRBD_CSTATE", cstate.to_owned());
        }
        if let Some(mask) = call.up_to_date_nodes {
            set("UP_TO_DATE_NODES", format!("0x{mask:08X}"));
        }
        env
    }
}
