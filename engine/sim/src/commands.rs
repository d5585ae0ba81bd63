//! The words of scenarios.

use crate::node::{NodeConfig, VOLUME};
use crate::options;
use crate::world::{FrontOp, MS, SECOND, World};
use palisade_core::io::Command;
use palisade_core::types::NodeId;
use palisade_wire::enums::ConnState;
use std::fmt::Write as _;

/// Longest wait for the answer of a command or a request.
const ANSWER_NS: u64 = 120 * SECOND;
/// Longest `wait` for a state.
const WAIT_NS: u64 = 300 * SECOND;

type Said = Result<String, String>;

/// Carries out scenario commands on a cluster.
pub struct Runner {
    configs: Vec<NodeConfig>,
    world: Option<World>,
    trace: bool,
    /// Commands and requests issued in the background: label, node, number, whether a request.
    background: Vec<(String, usize, u64)>,
}

fn quiet() -> Said {
    Ok(String::new())
}

fn node_id(n: usize) -> NodeId {
    NodeId::from_u32(n as u32).unwrap_or_else(|| unreachable!("a cluster has at most 32 nodes"))
}

/// `4k`, `1M`, `512`: bytes.
fn bytes(s: &str) -> Result<u64, String> {
    let (digits, unit) = match s.as_bytes().last() {
        Some(b'k') => (&s[..s.len() - 1], 1 << 10),
        Some(b'M') => (&s[..s.len() - 1], 1 << 20),
        _ => (s, 1),
    };
    let n: u64 = digits.parse().map_err(|_| format!("'{s}' is no size"))?;
    Ok(n * unit)
}

/// `200ms`, `5s`: nanoseconds.
fn duration(s: &str) -> Option<u64> {
    let (digits, unit) =
        s.strip_suffix("ms").map(|d| (d, MS)).or_else(|| s.strip_suffix('s').map(|d| (d, SECOND)))?;
    digits.parse::<u64>().ok().map(|n| n * unit)
}

impl Runner {
    /// No cluster yet.
    #[must_use]
    pub fn new(trace: bool) -> Self {
        Self { configs: Vec::new(), world: None, trace, background: Vec::new() }
    }

    /// The first violated invariant.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.world.as_ref()?.failure.clone()
    }

    /// The states now.
    #[must_use]
    pub fn status(&self) -> String {
        self.world.as_ref().map(World::status).unwrap_or_default()
    }

    fn index(&self, name: &str) -> Result<usize, String> {
        self.configs.iter().position(|c| c.name == name).ok_or_else(|| format!("there is no node '{name}'"))
    }

    /// One node, several separated by commas, or `all`.
    fn several(&self, names: &[&str]) -> Result<Vec<usize>, String> {
        if names.is_empty() || names == ["all"] {
            return Ok((0..self.configs.len()).collect());
        }
        names.iter().map(|n| self.index(n)).collect()
    }

    fn world(&mut self) -> &mut World {
        let trace = self.trace;
        let configs = &self.configs;
        self.world.get_or_insert_with(|| {
            let mut w = World::new(7, configs.clone());
            w.trace = trace;
            w.steady = true;
            for n in 0..w.nodes.len() {
                if let Err(e) = w.nodes[n].create_md() {
                    w.fail(format!("create-md: {e}"));
                }
            }
            w
        })
    }

    /// Carries out one line; returns what it prints.
    ///
    /// # Errors
    /// The line is no command.
    pub fn command(&mut self, line: &str) -> Said {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((verb, args)) = words.split_first() else { return quiet() };
        if args.last() == Some(&"&") {
            return self.in_background(line, verb, &args[..args.len() - 1]);
        }
        match *verb {
            "nodes" => {
                let count = args.len();
                self.configs = args.iter().map(|n| NodeConfig::new(n, count, 4 << 11)).collect();
                quiet()
            }
            "diskless" => self.configure(args, |c| c.sectors = 0),
            "size" => {
                let (size, names) = args.split_last().ok_or("which size?")?;
                let sectors = bytes(size)? / 512;
                self.configure(names, |c| c.sectors = sectors)
            }
            "slots" => {
                let (n, names) = args.split_last().ok_or("how many?")?;
                let n = n.parse().map_err(|_| "no number")?;
                self.configure(names, |c| c.max_peers = n)
            }
            "option" => self.option(args),
            "handler" => {
                let [node, name, exit] = args else { return Err("handler NODE NAME EXIT".into()) };
                let exit: i32 = exit.parse().map_err(|_| "no exit status")?;
                for n in self.several(&[*node])? {
                    self.configs[n].handlers.insert((*name).into(), exit);
                    if let Some(w) = &mut self.world {
                        w.nodes[n].config.handlers.insert((*name).into(), exit);
                    }
                }
                quiet()
            }
            "unchecked" => {
                let w = self.world();
                w.check_reads = false;
                w.check_writers = false;
                quiet()
            }
            "wait" => self.wait(args),
            "run" => {
                let ns = args.first().and_then(|a| duration(a)).ok_or("how long?")?;
                self.world().run_for(ns);
                quiet()
            }
            "status" => self.show_status(args),
            "cut" | "cut-one-way" | "heal" | "reset" | "slow" => self.network(verb, args),
            "crash" | "kill" | "restart" | "up" | "start" => self.machine(verb, args),
            "check" => {
                let w = self.world();
                w.dirty = true;
                w.compare_replicas();
                if w.idle() { quiet() } else { Ok("busy\n".into()) }
            }
            "uuids" => self.uuids(args),
            "resync" => self.resync(args),
            "handlers" => self.handlers(args),
            "pending" => {
                let n = self.index(args.first().ok_or("which node?")?)?;
                Ok(format!("{} requests pending\n", self.world().nodes[n].requests.len()))
            }
            "fail-disk" | "repair-disk" => {
                let n = self.index(args.first().ok_or("which node?")?)?;
                self.world().nodes[n].failing = *verb == "fail-disk";
                quiet()
            }
            "recreate-md" => {
                let n = self.index(args.first().ok_or("which node?")?)?;
                self.world().nodes[n].create_md()?;
                quiet()
            }
            "set-current-uuid" => self.set_current_uuid(args),
            "open" | "close" => {
                let n = self.index(args.first().ok_or("which node?")?)?;
                let rw = u32::from(*verb == "open");
                self.world().openers(n, rw);
                quiet()
            }
            "result" => self.results(),
            "load" => self.load(args),
            _ => {
                let issued = self.issue(verb, args)?;
                let mut out = String::new();
                for (n, id) in issued {
                    out += &self.answer(verb, n, id);
                }
                Ok(out)
            }
        }
    }

    fn configure(&mut self, names: &[&str], f: impl Fn(&mut NodeConfig)) -> Said {
        if self.world.is_some() {
            return Err("that must come before the first node is started".into());
        }
        for n in self.several(names)? {
            f(&mut self.configs[n]);
        }
        quiet()
    }

    fn option(&mut self, args: &[&str]) -> Said {
        let [node, key, value] = args else { return Err("option NODE KEY VALUE".into()) };
        for n in self.several(&[*node])? {
            options::set(&mut self.configs[n], key, value)?;
            let config = self.configs[n].clone();
            let Some(w) = &mut self.world else { continue };
            w.nodes[n].config = config.clone();
            if w.nodes[n].core.is_none() {
                continue;
            }
            w.command(n, Command::SetResource(config.resource));
            w.command(n, Command::SetDisk { vnr: VOLUME, disk: config.disk });
            for m in (0..w.nodes.len()).filter(|m| *m != n) {
                let net = Box::new(config.net[m].clone());
                w.command(n, Command::SetNet { peer: node_id(m), net });
            }
        }
        quiet()
    }

    fn in_background(&mut self, line: &str, verb: &str, args: &[&str]) -> Said {
        let label = line.trim_end_matches('&').trim().to_string();
        for (n, id) in self.issue(verb, args)? {
            self.background.push((label.clone(), n, id));
        }
        quiet()
    }

    fn results(&mut self) -> Said {
        let mut out = String::new();
        for (label, n, id) in std::mem::take(&mut self.background) {
            let node = &mut self.world().nodes[n];
            let state = if node.requests.contains_key(&id) || node.commands.contains_key(&id) {
                self.background.push((label.clone(), n, id));
                "pending".to_string()
            } else {
                match node.answers.remove(&id) {
                    Some(Ok(())) | None => "ok".to_string(),
                    Some(Err(e)) => e.to_string(),
                }
            };
            let _ = writeln!(out, "{label}: {state}");
        }
        Ok(out)
    }

    /// Issues a command or a request; node and number of each.
    fn issue(&mut self, verb: &str, args: &[&str]) -> Result<Vec<(usize, u64)>, String> {
        let (first, rest) = args.split_first().ok_or_else(|| format!("{verb}: which node?"))?;
        let n = self.index(first)?;
        let has = |w: &str| rest.contains(&w);
        let force = has("force");
        let peer = |i: usize| rest.get(i).ok_or_else(|| format!("{verb}: which peer?"));
        let vnr = VOLUME;
        let c = match verb {
            "promote" => Command::Promote { force },
            "demote" => Command::Demote { force },
            "detach" => Command::Detach { vnr, force },
            "outdate" => Command::Outdate(vnr),
            "down" => Command::Down,
            "suspend-io" => Command::SuspendIo(vnr),
            "resume-io" => Command::ResumeIo(vnr),
            "disconnect" => Command::Disconnect { peer: node_id(self.index(peer(0)?)?), force },
            "pause-sync" => Command::PauseSync { vnr, peer: node_id(self.index(peer(0)?)?) },
            "resume-sync" => Command::ResumeSync { vnr, peer: node_id(self.index(peer(0)?)?) },
            "del-peer" => Command::DelPeer(node_id(self.index(peer(0)?)?)),
            "forget-peer" => Command::ForgetPeer(node_id(self.index(peer(0)?)?)),
            "invalidate" => {
                let from = rest.iter().position(|w| *w == "from").and_then(|i| rest.get(i + 1));
                let from = from.map(|m| self.index(m)).transpose()?.map(node_id);
                Command::Invalidate { vnr, from, reset_bitmap: !has("keep-bitmap") }
            }
            "invalidate-remote" => Command::InvalidateRemote {
                vnr,
                peer: node_id(self.index(peer(0)?)?),
                reset_bitmap: !has("keep-bitmap"),
            },
            "new-current-uuid" => Command::NewCurrentUuid {
                vnr,
                clear_bitmap: has("clear-bitmap"),
                force_resync: has("force-resync"),
            },
            "attach" => {
                let w = self.world();
                return match w.attach(n) {
                    0 => Err("the backing device is still in use".into()),
                    id => Ok(vec![(n, id)]),
                };
            }
            "connect" => {
                let m = self.index(peer(0)?)?;
                let discard = has("discard-my-data");
                let w = self.world();
                let mut out = vec![(n, w.connect(n, m, discard))];
                if !has("one-side")
                    && w.core(m).is_some_and(|c| c.state().cstate(node_id(n)) == ConnState::StandAlone)
                {
                    out.push((m, w.connect(m, n, false)));
                }
                return Ok(out);
            }
            "write" | "read" | "discard" | "zero" | "flush" => return self.request(verb, n, rest),
            _ => return Err("unknown command".into()),
        };
        let w = self.world();
        Ok(vec![(n, w.command(n, c))])
    }

    fn request(&mut self, verb: &str, n: usize, rest: &[&str]) -> Result<Vec<(usize, u64)>, String> {
        let position = |i: usize| rest.get(i).ok_or("position and length?").map_err(String::from);
        let op = if verb == "flush" {
            FrontOp::Flush
        } else {
            let (sector, count) = (bytes(position(0)?)? / 512, bytes(position(1)?)? / 512);
            match verb {
                "write" => FrontOp::Write { sector, count, fua: rest.contains(&"fua") },
                "read" => FrontOp::Read { sector, count },
                _ => FrontOp::Zero { sector, count, discard: verb == "discard" },
            }
        };
        // Large transfers go in pieces of a megabyte, as block layers do.
        let mut ops = vec![op];
        if let FrontOp::Write { sector, count, fua } = op
            && count > 2048
        {
            ops = (sector..sector + count)
                .step_by(2048)
                .map(|s| FrontOp::Write { sector: s, count: 2048.min(sector + count - s), fua })
                .collect();
        }
        let w = self.world();
        if w.nodes[n].core.is_none() {
            return Err("the node is down".into());
        }
        Ok(ops.into_iter().map(|op| (n, w.request(n, op))).collect())
    }

    /// Runs until the command or request is answered.
    fn answer(&mut self, verb: &str, n: usize, id: u64) -> String {
        let w = self.world();
        let end = w.now + ANSWER_NS;
        while w.nodes[n].commands.contains_key(&id) || w.nodes[n].requests.contains_key(&id) {
            if !w.step(end) {
                return format!("{verb}: no answer\n");
            }
        }
        match w.nodes[n].answers.remove(&id) {
            Some(Err(e)) => format!("{verb}: {e}\n"),
            _ => match w.results.remove(&id) {
                Some(false) => format!("{verb}: I/O error\n"),
                _ => String::new(),
            },
        }
    }

    fn load(&mut self, args: &[&str]) -> Said {
        let [node, count] = args else { return Err("load NODE COUNT".into()) };
        let n = self.index(node)?;
        let count: u64 = count.parse().map_err(|_| "no number")?;
        let w = self.world();
        let sectors = w.nodes[n].size / 512;
        for _ in 0..count {
            let len = w.rng.range(1, 16);
            let sector = w.rng.below(sectors.saturating_sub(len));
            w.request(n, FrontOp::Write { sector, count: len, fua: false });
            let think = w.rng.range(0, 300_000);
            w.run_for(think);
        }
        quiet()
    }

    fn wait(&mut self, args: &[&str]) -> Said {
        let (what, rest) = args.split_first().ok_or("wait for what?")?;
        let nodes = rest.iter().map(|n| self.index(n)).collect::<Result<Vec<_>, _>>()?;
        let known = ["uptodate", "answered", "settled", "connected", "resync"];
        if !known.contains(what) {
            return Err(format!("wait for {}?", known.join(", ")));
        }
        let w = self.world();
        let end = w.now + WAIT_NS;
        let mut settled_since = w.now;
        let mut last = String::new();
        loop {
            w.run_for(20 * MS);
            if w.failure.is_some() {
                return quiet();
            }
            let done = match *what {
                "uptodate" => w.all_up_to_date(),
                "answered" => w.all_answered(),
                "connected" => pairs(&nodes, w.nodes.len()).all(|(a, b)| {
                    w.core(a).is_some_and(|c| c.state().connected(node_id(b)))
                        && w.core(b).is_some_and(|c| c.state().connected(node_id(a)))
                }),
                "resync" => {
                    let [a, b] = nodes[..] else { return Err("wait resync A B".into()) };
                    w.core(a).is_some_and(|c| {
                        c.state().repl(node_id(b), VOLUME) > palisade_wire::ReplState::Established
                    })
                }
                _ => {
                    let s = w.status();
                    if s != last {
                        last = s;
                        settled_since = w.now;
                    }
                    w.now - settled_since >= 30 * SECOND
                }
            };
            if done {
                w.compare_replicas();
                return quiet();
            }
            if w.now >= end {
                return Ok(format!("wait {}: never\n{}", args.join(" "), w.status()));
            }
        }
    }

    fn show_status(&mut self, args: &[&str]) -> Said {
        let all = self.world().status();
        if args.is_empty() {
            return Ok(all);
        }
        let mut out = String::new();
        let mut on = false;
        for line in all.lines() {
            if !line.starts_with(' ') {
                on = line.split(' ').next().is_some_and(|n| args.contains(&n));
            }
            if on {
                out.push_str(line);
                out.push('\n');
            }
        }
        Ok(out)
    }

    fn network(&mut self, verb: &str, args: &[&str]) -> Said {
        if verb == "heal" && args.is_empty() {
            let w = self.world();
            for (a, b) in w.links.keys().copied().collect::<Vec<_>>() {
                w.set_cut(a, b, false);
                w.set_cut(b, a, false);
            }
            return quiet();
        }
        let a = self.index(args.first().ok_or("which node?")?)?;
        let rest = args.get(1..).unwrap_or_default();
        let peers = match (verb, rest.first()) {
            ("slow", Some(b)) => vec![self.index(b)?],
            (_, Some(_)) => rest.iter().map(|b| self.index(b)).collect::<Result<_, _>>()?,
            _ => (0..self.configs.len()).filter(|b| *b != a).collect(),
        };
        let slow = rest.get(1).and_then(|d| duration(d)).unwrap_or(0);
        let w = self.world();
        for b in peers {
            match verb {
                "cut" | "heal" => {
                    w.set_cut(a, b, verb == "cut");
                    w.set_cut(b, a, verb == "cut");
                }
                "cut-one-way" => w.set_cut(a, b, true),
                "reset" => w.reset_link(a, b),
                _ => {
                    if let Some(l) = w.links.get_mut(&(a.min(b), a.max(b))) {
                        l.slow[usize::from(a > b)] = slow;
                    }
                }
            }
        }
        quiet()
    }

    fn machine(&mut self, verb: &str, args: &[&str]) -> Said {
        let nodes = self.several(args)?;
        let w = self.world();
        for n in &nodes {
            match verb {
                "crash" => w.stop(*n, true),
                "kill" => w.stop(*n, false),
                "start" => w.start(*n, true, false),
                _ => w.restart(*n),
            }
        }
        if verb != "crash" && verb != "kill" {
            let mut out = String::new();
            for n in nodes {
                for id in w.nodes[n].commands.keys().copied().collect::<Vec<_>>() {
                    let end = w.now + 10 * SECOND;
                    while w.nodes[n].commands.contains_key(&id) && w.step(end) {}
                }
                for (_, r) in std::mem::take(&mut w.nodes[n].answers) {
                    if let Err(e) = r {
                        let _ = writeln!(out, "{verb} {}: {e}", w.name(n));
                    }
                }
            }
            return Ok(out);
        }
        quiet()
    }

    fn uuids(&mut self, args: &[&str]) -> Said {
        let mut out = String::new();
        let nodes = self.several(args)?;
        let w = self.world();
        // Names in order of appearance: the values are random.
        let mut seen: Vec<u64> = Vec::new();
        let mut show = |u: u64| match u & !1 {
            0 => "0".to_string(),
            4 => "new".to_string(),
            u => {
                let i = seen.iter().position(|s| *s == u).unwrap_or_else(|| {
                    seen.push(u);
                    seen.len() - 1
                });
                format!("U{i}")
            }
        };
        for n in nodes {
            let Some(c) = w.core(n) else { continue };
            for d in c.status().devices {
                let _ = write!(out, "{} current {}", w.name(n), show(d.current_uuid));
                for (m, u) in d.bitmap_uuids.iter().enumerate().filter(|(_, u)| **u != 0) {
                    let name = w.nodes.get(m).map_or("day0", |n| n.config.name.as_str());
                    let _ = write!(out, " bitmap:{name} {}", show(*u));
                }
                let history: Vec<String> =
                    d.history_uuids.iter().filter(|u| **u != 0).map(|u| show(*u)).collect();
                if !history.is_empty() {
                    let _ = write!(out, " history {}", history.join(" "));
                }
                out.push('\n');
            }
        }
        Ok(out)
    }

    fn resync(&mut self, args: &[&str]) -> Said {
        let [a, b] = args else { return Err("resync A B".into()) };
        let (x, y) = (self.index(a)?, self.index(b)?);
        let p = self.world().peer_device(x, y).ok_or("there is no such connection")?;
        Ok(format!("{a} {b} resync of {} KiB, {} KiB transferred\n", p.resync_total_kib, p.resync_done_kib))
    }

    fn handlers(&mut self, args: &[&str]) -> Said {
        let nodes = self.several(args)?;
        let w = self.world();
        let mut out = String::new();
        for n in nodes {
            let run = std::mem::take(&mut w.nodes[n].handlers_run);
            let _ = writeln!(out, "{} ran: {}", w.name(n), run.join(" "));
        }
        Ok(out)
    }

    fn set_current_uuid(&mut self, args: &[&str]) -> Said {
        let [node, value, state] = args else { return Err("set-current-uuid NODE HEX STATE".into()) };
        let n = self.index(node)?;
        let value = u64::from_str_radix(value, 16).map_err(|_| "no number")?;
        use palisade_metadata::DeviceFlags as F;
        let flags = match *state {
            "uptodate" => F::CONSISTENT | F::WAS_UP_TO_DATE,
            "inconsistent" => F::NONE,
            _ => return Err("uptodate or inconsistent?".into()),
        };
        let w = self.world();
        let sectors = w.nodes[n].config.sectors;
        w.nodes[n].edit_superblock(|sb| {
            sb.current_uuid = value;
            sb.flags |= flags;
            sb.effective_size_sectors = sectors;
        })?;
        quiet()
    }
}

/// All pairs among the nodes named, or among all.
fn pairs(nodes: &[usize], count: usize) -> impl Iterator<Item = (usize, usize)> {
    let all: Vec<usize> = if nodes.is_empty() { (0..count).collect() } else { nodes.to_vec() };
    let mut out = Vec::new();
    for (i, a) in all.iter().enumerate() {
        for b in &all[i + 1..] {
            out.push((*a, *b));
        }
    }
    out.into_iter()
}
