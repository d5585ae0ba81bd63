//! Commands that need the front ends before or after the core: promote, demote, down.
//!
//! A promotion is answered when the device nodes exist. A demotion first removes the nodes, which fails
//! while somebody uses them, and only then asks the core.

use crate::control::ReplyTo;
use crate::core_api::{AdminError, Command, VolumeNr};
use crate::engine::Engine;
use crate::front::device::NodeState;
use palisade_control::{Refusal, Reply, code};
use palisade_wire::enums::Role;

/// What is being done, one at a time.
#[derive(Debug)]
pub(crate) struct Flow {
    goal: Goal,
    stage: Stage,
    reply: Option<ReplyTo>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Goal {
    Promote,
    Demote { force: bool },
    Down,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// The core decides.
    Core,
    /// Device nodes come.
    Appear,
    /// Device nodes go.
    Vanish,
    /// The nodes of a promotion did not come: it is taken back.
    Back,
}

/// A core's refusal as clients see it.
pub(crate) fn refusal(e: AdminError) -> Refusal {
    Refusal { code: e.code, text: e.text, info: e.info }
}

impl Engine {
    /// Whether front ends are being taken away by a command.
    pub(crate) fn is_vanishing(&self) -> bool {
        self.flow.as_ref().is_some_and(|f| f.goal != Goal::Promote || f.stage == Stage::Back)
    }

    fn is_primary(&self) -> bool {
        self.core.as_ref().is_some_and(|c| c.state().role == Role::Primary)
    }

    /// Refuses a second one of these commands while one runs.
    fn begin(&mut self, goal: Goal, stage: Stage, reply: Option<ReplyTo>) -> bool {
        if self.flow.is_some() {
            let busy = Refusal::new(code::IN_TRANSIENT_STATE)
                .with_info("Another promote, demote or down is still running.");
            self.answer(reply, Reply::Refused(busy));
            return false;
        }
        self.flow = Some(Flow { goal, stage, reply });
        true
    }

    pub(crate) fn answer(&mut self, to: Option<ReplyTo>, reply: Reply) {
        match to {
            Some(to) => self.reply(to, reply),
            None => {
                if let Reply::Refused(r) = reply {
                    tracing::error!("{}: refused: {} {}", self.name, r.text, r.info.join(" "));
                }
            }
        }
    }

    fn finish(&mut self, reply: Reply) {
        if let Some(flow) = self.flow.take() {
            self.answer(flow.reply, reply);
        }
        self.status_changed = true;
    }

    pub(crate) fn begin_promote(&mut self, force: bool, reply: ReplyTo) {
        if !self.begin(Goal::Promote, Stage::Core, Some(reply)) {
            return;
        }
        self.admin(Command::Promote { force }, |engine, result| match result {
            Ok(()) => engine.stage(Stage::Appear),
            Err(e) => engine.finish(Reply::Refused(refusal(e))),
        });
    }

    pub(crate) fn begin_demote(&mut self, force: bool, reply: ReplyTo) {
        let primary = self.is_primary();
        if self.begin(Goal::Demote { force }, Stage::Vanish, Some(reply)) && primary {
            self.vanish(force);
        }
    }

    /// Takes everything down; the process ends then.
    pub(crate) fn begin_down(&mut self, reply: Option<ReplyTo>) {
        if self.core.is_none() {
            self.answer(reply, Reply::done());
            self.exit = true;
            return;
        }
        let primary = self.is_primary();
        if self.begin(Goal::Down, Stage::Vanish, reply) && primary {
            self.vanish(false);
        }
    }

    fn stage(&mut self, stage: Stage) {
        if let Some(flow) = &mut self.flow {
            flow.stage = stage;
        }
    }

    /// Begins to remove the front ends of all volumes, unless NBD clients use one.
    fn vanish(&mut self, force: bool) {
        let volumes: Vec<VolumeNr> = self.local.volumes.keys().map(|v| VolumeNr(*v)).collect();
        let used: Vec<String> = volumes
            .iter()
            .filter_map(|v| match self.nbd_openers(*v) {
                0 => None,
                n => Some(format!("Volume {v} is used by {n} NBD client(s).")),
            })
            .collect();
        if !force && !used.is_empty() {
            let refused = used.into_iter().fold(Refusal::new(code::DEVICE_IN_USE), Refusal::with_info);
            self.finish(Reply::Refused(refused));
            return;
        }
        for vnr in volumes {
            self.node_detach(vnr, force);
        }
    }

    /// Looks whether what a running command waits for has happened; called once per turn.
    pub(crate) fn flow_continues(&mut self) {
        self.feed();
        let Some(Flow { goal, stage, .. }) = &self.flow else { return };
        match (goal, stage) {
            (_, Stage::Appear) => self.appeared(),
            (goal, Stage::Vanish) => {
                let goal = *goal;
                self.vanished(goal);
            }
            (_, Stage::Core | Stage::Back) => {}
        }
    }

    fn appeared(&mut self) {
        let states = || self.front.nodes.values().map(|n| &n.state);
        let failed = states().find_map(|s| match s {
            NodeState::Failed(why) => Some(why.clone()),
            _ => None,
        });
        let failed = failed.or(self.front.failure.take());
        if let Some(why) = failed {
            self.stage(Stage::Back);
            self.front.nodes.retain(|_, n| !matches!(n.state, NodeState::Failed(_)));
            self.admin(Command::Demote { force: true }, move |engine, _| {
                let refused = Refusal::new(code::UNKNOWN_ERROR).with_info(why);
                engine.finish(Reply::Refused(refused));
            });
        } else if !self.front.present || states().all(|s| *s == NodeState::Attached) {
            self.finish(Reply::done());
        }
    }

    fn vanished(&mut self, goal: Goal) {
        self.front.nodes.retain(|_, n| !matches!(n.state, NodeState::Failed(_)));
        let going = self.front.nodes.values().any(|n| matches!(n.state, NodeState::Detaching { .. }));
        if going {
            return;
        }
        let users: Vec<String> = self
            .front
            .nodes
            .values()
            .filter_map(|n| match &n.state {
                NodeState::Refused(why) => Some(why.clone()),
                _ => None,
            })
            .collect();
        if !users.is_empty() {
            self.restore();
            let refused = users.into_iter().fold(Refusal::new(code::DEVICE_IN_USE), Refusal::with_info);
            self.finish(Reply::Refused(refused));
            return;
        }
        self.stage(Stage::Core);
        let (command, down) = match goal {
            Goal::Demote { force } => (Command::Demote { force }, false),
            Goal::Promote | Goal::Down => (Command::Down, true),
        };
        self.admin(command, move |engine, result| match result {
            Ok(()) => {
                engine.exit = down;
                engine.finish(Reply::done());
            }
            Err(e) => {
                engine.finish(Reply::Refused(refusal(e)));
                engine.restore();
            }
        });
    }

    /// Puts nodes back after a refused demotion.
    fn restore(&mut self) {
        for node in self.front.nodes.values_mut() {
            if matches!(node.state, NodeState::Refused(_)) {
                node.state = NodeState::Attached;
            }
        }
        if self.front.present {
            let volumes: Vec<VolumeNr> = self.local.volumes.keys().map(|v| VolumeNr(*v)).collect();
            for vnr in volumes {
                self.volume_appears(vnr);
            }
        }
    }
}
