//! `ocf:palisade:drbd`: a DRBD resource as a promotable clone, with the parameters, actions, exit codes and
//! promotion scores of `ocf:linbit:drbd` (`spec/ocf-agents.md` §2).
//!
//! ```text
//! Pacemaker ─ environment ─► parameters, validate      what is asked, and whether it can be done
//!                                  │
//!                               actions                start stop promote demote monitor notify reload
//!                            ┌─────┴──────┐
//!                        replicator     facts ─► score  state as a struct, changes by drbdadm; decision table
//!                            │                    │
//!                          engine             Pacemaker's attribute daemon
//! ```
//!
//! A typical configuration:
//!
//! ```text
//! primitive p_r0 ocf:palisade:drbd params drbd_resource=r0 \
//!     op monitor interval=29s role=Promoted op monitor interval=31s role=Unpromoted
//! clone ms_r0 p_r0 meta promotable=true promoted-max=1 promoted-node-max=1 clone-node-max=1 notify=true
//! ```
//!
//! An action ends by itself a little before Pacemaker's timeout and says why; it never waits to be killed.
//! A monitor asks the engine over its socket and starts one program, the one that writes the score.
//!
//! Differences from the agent it replaces, each for a reason in `spec/weaknesses.md` §2: an attaching or unknown
//! disk is never good; a diskless client without quorum has no score; a resource without volumes is no
//! client; `wfc_timeout=""` does not wait; `post/start` updates the score; only a healthy peer that is itself
//! Primary counts for the peer-primary rules, and a cluster that gives no answer is not "promoted nowhere";
//! a missing `clone-max` is Pacemaker's default; a monitor does not read the configuration.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Instant;

use palisade_cluster::log::OcfLog;
use palisade_cluster::{Environment, ExitCode as Ocf, Pacemaker, ocf};

mod actions;
mod facts;
mod metadata;
mod parameters;
mod replicator;
mod score;
#[cfg(test)]
mod tests;
mod validate;

use actions::{Agent, SystemClock};
use parameters::Parameters;
use replicator::Tools;

/// What the agent can be asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Bring the resource up, Secondary.
    Start,
    /// Take it down.
    Stop,
    /// Make it Primary.
    Promote,
    /// Make it Secondary.
    Demote,
    /// Tell its state and keep the score up to date.
    Monitor,
    /// Tell its state and do nothing else.
    Status,
    /// React to what happens elsewhere.
    Notify,
    /// Adopt a changed configuration; both names that Pacemaker has for it.
    Reload,
    /// Check configuration and host.
    ValidateAll,
}

impl Action {
    fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "start" => Self::Start,
            "stop" => Self::Stop,
            "promote" => Self::Promote,
            "demote" => Self::Demote,
            "monitor" => Self::Monitor,
            "status" => Self::Status,
            "notify" => Self::Notify,
            "reload" | "reload-agent" => Self::Reload,
            "validate-all" => Self::ValidateAll,
            _ => return None,
        })
    }
}

const USAGE: &str = "\
Usage: drbd start|stop|promote|demote|monitor|notify|reload|validate-all|status|meta-data|usage
An OCF resource agent: parameters come in OCF_RESKEY_* variables, see meta-data.";

/// Entry point: one argument, the action.
pub fn main(args: &[OsString]) -> ExitCode {
    let began = Instant::now();
    let [word] = args else {
        eprintln!("{USAGE}");
        return Ocf::Args.into();
    };
    let env = Environment::from_process();
    let word = word.to_string_lossy();
    match word.as_ref() {
        "meta-data" => {
            print(&metadata::render(&env));
            return Ocf::Success.into();
        }
        "usage" | "--help" | "-h" | "help" => {
            print(&format!("{USAGE}\n"));
            return Ocf::Success.into();
        }
        _ => {}
    }
    OcfLog::new(&env, "drbd").install();
    let Some(action) = Action::parse(&word) else {
        eprintln!("{USAGE}");
        ocf::exit_reason(&env, &format!("The action {word} is not known to this agent."));
        return Ocf::Unimplemented.into();
    };
    let params = Parameters::read(&env);
    if let Err(problem) = validate::environment(action, &env, &params) {
        ocf::exit_reason(&env, &problem.reason);
        return problem.code.into();
    }
    let replicator = Tools::find(&params.resource, &params.config);
    let pacemaker = Pacemaker::new(&env);
    let clock = SystemClock::new(began, env.timeout());
    let host_name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let own_names = host_name.into_iter().chain(env.node().map(str::to_owned)).collect();
    Agent::new(&env, &params, &replicator, &pacemaker, &clock, own_names).run(action).into()
}

/// The reader of our output may have gone; that is no failure of the action.
fn print(text: &str) {
    use std::io::Write;
    let _ = std::io::stdout().write_all(text.as_bytes());
}
