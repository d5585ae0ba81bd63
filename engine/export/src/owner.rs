//! Whose kernel objects are whose, and whether their owner still lives.

use std::fs;
use std::io;

/// A process named so that it is recognised after its death, even if its number is used again:
/// PID namespace, PID and start time. It is part of the names of kernel objects we create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    namespace: u64,
    pid: u32,
    started: u64,
}

impl Owner {
    /// This process.
    pub fn current() -> io::Result<Self> {
        let pid = std::process::id();
        let started = started(pid).ok_or_else(|| io::Error::other("/proc/self/stat is not readable"))?.0;
        Ok(Self { namespace: namespace()?, pid, started })
    }

    pub fn pid(self) -> u32 {
        self.pid
    }

    /// The text form, `namespace.pid.started`.
    pub fn tag(self) -> String {
        format!("{}.{}.{}", self.namespace, self.pid, self.started)
    }

    pub fn parse(tag: &str) -> Option<Self> {
        let mut parts = tag.split('.');
        let owner = Self {
            namespace: parts.next()?.parse().ok()?,
            pid: parts.next()?.parse().ok()?,
            started: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(owner)
    }

    /// Certainly dead. A process of another PID namespace is beyond our sight: not certain.
    pub fn is_dead(self) -> bool {
        namespace().is_ok_and(|ours| ours == self.namespace)
            && started(self.pid).is_none_or(|(at, alive)| at != self.started || !alive)
    }
}

fn namespace() -> io::Result<u64> {
    let link = fs::read_link("/proc/self/ns/pid")?;
    let text = link.to_string_lossy();
    let number = text.trim_start_matches("pid:[").trim_end_matches(']').parse();
    number.map_err(|_| io::Error::other(format!("/proc/self/ns/pid is {text}")))
}

/// Start time of a process in clock ticks since boot, and whether it still runs.
fn started(pid: u32) -> Option<(u64, bool)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may contain anything: fields count from its end.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let alive = !matches!(*fields.first()?, "Z" | "X");
    Some((fields.get(19)?.parse().ok()?, alive))
}

/// The name of the kernel object that carries a minor: a file name or an NBD backend identifier.
pub(crate) fn tag(minor: u32, owner: Owner) -> String {
    format!("palisade-drbd{minor}.{}", owner.tag())
}

/// The owner in a [`tag`] of that minor.
pub(crate) fn owner_of(tag: &str, minor: u32) -> Option<Owner> {
    Owner::parse(tag.strip_prefix(&format!("palisade-drbd{minor}."))?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn owners_live_and_die() {
        let me = Owner::current().unwrap();
        assert_eq!(Owner::parse(&me.tag()), Some(me));
        assert!(!me.is_dead());
        assert!(Owner { started: me.started + 1, ..me }.is_dead(), "the number was used again");
        assert!(!Owner { namespace: me.namespace + 1, pid: 1, started: 0 }.is_dead(), "not ours to judge");
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (at, alive) = started(child.id()).unwrap();
        let owner = Owner { pid: child.id(), started: at, ..me };
        assert!(alive && !owner.is_dead());
        child.kill().unwrap();
        while !owner.is_dead() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        child.wait().unwrap();
        assert!(owner.is_dead());
        assert_eq!(owner_of(&tag(7, me), 7), Some(me));
        assert_eq!(owner_of(&tag(7, me), 70), None);
        assert_eq!(owner_of(&tag(70, me), 7), None);
        assert_eq!(owner_of("palisade-drbd7.1.2", 7), None);
        assert_eq!(owner_of("palisade-drbd7.1.2.3.4", 7), None);
    }
}
