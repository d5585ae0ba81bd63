//! `wait-con-int`: waits for the peers of all resources while somebody may type `yes` to go on without them
//! (`spec/cli.md` §6). It ends well in any case; it never holds up a boot longer than its waiters.

use std::io::{IsTerminal, Read};
use std::os::fd::AsFd;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout};

use super::exec::{Exec, Line, Tool, own_tool};
use super::lines;
use super::objects::views;
use super::request::Request;
use super::site::Site;
use crate::cli::{Failure, print};

/// Nobody is asked before this.
const QUIET_SECONDS: u64 = 10;

pub fn wait_con_int(site: &Site, exec: &Exec<'_>, request: &Request) -> Result<i32, Failure> {
    let views = views(site, request.stacked)?;
    let mut waiters = Vec::new();
    for view in &views {
        let line = Line::setup(["wait-connect-resource", &view.resource]).with(lines::startup(view));
        exec.show_if_asked(&view.resource, &line);
        if !exec.dry_run() {
            waiters.push(spawn(&line)?);
        }
    }
    let seconds = |name: &str| {
        let view = views.first();
        view.and_then(|view| view.startup.value(name)).unwrap_or("0").to_owned()
    };
    let refresh = site.config.global.as_ref().and_then(|global| global.options.value("dialog-refresh"));
    let refresh = refresh.and_then(|text| text.parse().ok()).unwrap_or(1);
    ask_while(&mut waiters, refresh, &seconds("degr-wfc-timeout"), &seconds("wfc-timeout"));
    for waiter in &mut waiters {
        let _ = waiter.kill();
        let _ = waiter.wait();
    }
    Ok(0)
}

fn spawn(line: &Line) -> Result<Child, Failure> {
    own_tool(Tool::Drbdsetup, &line.args)
        .and_then(|mut process| process.stdin(std::process::Stdio::null()).spawn())
        .map_err(|e| Failure::new(super::EXIT_FATAL, format!("Cannot start a waiter: {e}.")))
}

/// Returns when all waiters have ended or somebody typed `yes`.
fn ask_while(waiters: &mut [Child], refresh: u64, degraded: &str, healthy: &str) {
    let start = Instant::now();
    let terminal = std::io::stdin().is_terminal();
    let mut typed = String::new();
    for second in 1_u64.. {
        if waiters.iter_mut().all(|waiter| matches!(waiter.try_wait(), Ok(Some(_)) | Err(_))) {
            return;
        }
        if second <= QUIET_SECONDS {
            print(".");
        } else if second == QUIET_SECONDS + 1 {
            print(&explanation(degraded, healthy));
            if !terminal {
                print(&format!("To abort waiting type: kill {}\n", std::process::id()));
            }
        }
        let asking = terminal && second > QUIET_SECONDS;
        if asking && (second == QUIET_SECONDS + 1 || (refresh > 0 && second.is_multiple_of(refresh))) {
            let elapsed = start.elapsed().as_secs();
            print(&format!("\r To abort waiting enter 'yes' [{elapsed:4}]: {typed}"));
        }
        if asking && answered(&mut typed) {
            return;
        }
        let next = Duration::from_secs(second);
        std::thread::sleep(next.saturating_sub(start.elapsed()));
    }
}

fn explanation(degraded: &str, healthy: &str) -> String {
    let limit = |seconds: &str| {
        if seconds == "0" { "no limit".to_owned() } else { format!("{seconds} seconds") }
    };
    format!(
        "\n***************************************************************\n \
         DRBD's startup script waits for the peer node(s) to appear.\n \
         - If this node was already a degraded cluster before the\n   \
         reboot, the timeout is {} (degr-wfc-timeout).\n \
         - If the peer was available before the reboot, the timeout\n   \
         is {} (wfc-timeout).\n",
        limit(degraded),
        limit(healthy)
    )
}

/// Takes what was typed during about a second; whether a line says `yes`.
fn answered(typed: &mut String) -> bool {
    const LONGEST: usize = 64;
    let stdin = std::io::stdin();
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    let ready = nix::poll::poll(&mut fds, PollTimeout::from(900_u16));
    if !matches!(ready, Ok(1)) {
        return false;
    }
    let mut bytes = [0; LONGEST];
    // A terminal that went away cannot answer any more: the waiters decide.
    let count = stdin.lock().read(&mut bytes).unwrap_or(0);
    typed.push_str(&String::from_utf8_lossy(bytes.get(..count).unwrap_or_default()));
    let yes = typed.lines().any(|line| line == "yes");
    if typed.contains('\n') || typed.len() > LONGEST {
        typed.clear();
    }
    yes
}
