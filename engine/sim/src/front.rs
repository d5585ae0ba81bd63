//! What front ends wrote and may therefore read: one history of versions per sector, for the whole cluster.
//!
//! A read may return any version that was not certainly overwritten before the read was issued. A version
//! overwrites certainly if it was acknowledged and no power loss could have taken its last copy. Writes that
//! failed, or whose issuer died, may have happened or not.

/// Time that never comes.
pub const NEVER: u64 = u64::MAX;
/// A write of a dead node can still arrive elsewhere for so long, nanoseconds.
const LATE_ARRIVAL_NS: u64 = 2_000_000_000;

/// What a version's write came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// Not answered yet.
    Open,
    /// Acknowledged.
    Acked,
    /// Failed, or never to be answered.
    Lost,
}

#[derive(Clone, Copy, Debug)]
struct Version {
    stamp: u64,
    request: u64,
    issued: u64,
    /// When it was answered.
    done: u64,
    fate: Fate,
    stable: bool,
    /// A power loss may have taken it.
    optional: bool,
}

/// All versions of all sectors.
#[derive(Debug)]
pub struct History {
    /// A read is in progress: what it may return must not be forgotten.
    pub reading: bool,
    /// Even what was flushed may be lost (protocols A and B): nothing is forgotten.
    pub lossy: bool,
    sectors: Vec<Vec<Version>>,
}

impl History {
    /// All zeroes since ever.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        let first = Version {
            stamp: 0,
            request: 0,
            issued: 0,
            done: 0,
            fate: Fate::Acked,
            stable: true,
            optional: false,
        };
        Self { reading: false, lossy: false, sectors: vec![vec![first]; sectors as usize] }
    }

    fn range(&mut self, sector: u64, count: u64) -> &mut [Vec<Version>] {
        let end = (sector + count).min(self.sectors.len() as u64) as usize;
        self.sectors.get_mut(sector as usize..end).unwrap_or_default()
    }

    /// A write of `stamps` from `sector` on was issued.
    pub fn issue(&mut self, request: u64, sector: u64, stamps: &[u64], now: u64) {
        for (list, stamp) in self.range(sector, stamps.len() as u64).iter_mut().zip(stamps) {
            list.push(Version {
                stamp: *stamp,
                request,
                issued: now,
                done: NEVER,
                fate: Fate::Open,
                stable: false,
                optional: false,
            });
        }
    }

    /// It was answered. `held` says whether a running replica has a version: the last one that acknowledged it may
    /// have lost power since.
    pub fn answer(
        &mut self,
        request: u64,
        (sector, count): (u64, u64),
        now: u64,
        ok: bool,
        stable: bool,
        held: impl Fn(u64, u64) -> bool,
    ) {
        let keep = self.reading || self.lossy;
        for (s, list) in (sector..).zip(self.range(sector, count)) {
            let mut issued = None;
            for v in list.iter_mut().filter(|v| v.request == request) {
                v.optional |= ok && !stable && !held(s, v.stamp);
                v.done = now;
                v.fate = if ok { Fate::Acked } else { Fate::Lost };
                v.stable = ok && stable;
                issued = (ok && stable && !keep).then_some(v.issued);
            }
            if let Some(issued) = issued {
                list.retain(|v| v.done >= issued);
            }
        }
    }

    /// Its issuer is dead.
    pub fn orphan(&mut self, request: u64, sector: u64, count: u64, now: u64) {
        for list in self.range(sector, count) {
            for v in list.iter_mut().filter(|v| v.request == request) {
                v.done = now + LATE_ARRIVAL_NS;
                v.fate = Fate::Lost;
            }
        }
    }

    /// A flush issued at `issued` was acknowledged.
    pub fn flushed(&mut self, issued: u64) {
        for list in &mut self.sectors {
            let mut newest = None;
            for v in list.iter_mut().filter(|v| v.fate == Fate::Acked && v.done <= issued) {
                v.stable = true;
                if !v.optional {
                    newest = newest.max(Some(v.issued));
                }
            }
            if let Some(issued) = newest
                && list.len() > 1
                && !self.reading
                && !self.lossy
            {
                list.retain(|v| v.done >= issued);
            }
        }
    }

    /// A machine lost power: acknowledged but unflushed versions are not certain any more unless `held` says
    /// that a running replica has them.
    pub fn power_loss(&mut self, held: impl Fn(u64, u64) -> bool) {
        for (s, list) in self.sectors.iter_mut().enumerate() {
            for v in list.iter_mut().filter(|v| v.fate == Fate::Acked && !v.stable && !v.optional) {
                v.optional = !held(s as u64, v.stamp);
            }
        }
    }

    /// Nothing acknowledged so far is certain any more (a fail-over that gives up writes on purpose).
    pub fn give_up(&mut self) {
        for v in self.sectors.iter_mut().flatten().filter(|v| v.done > 0) {
            v.optional = true;
        }
    }

    /// Only what one replica has counts, and what may still be written.
    pub fn start_over(&mut self, current: &[u64], now: u64) {
        for (list, stamp) in self.sectors.iter_mut().zip(current) {
            list.retain(|v| v.fate == Fate::Open || v.stamp == *stamp);
            for v in list.iter_mut().filter(|v| v.stamp == *stamp && v.fate != Fate::Open) {
                *v = Version { done: now, fate: Fate::Acked, stable: true, optional: false, ..*v };
            }
            if list.is_empty() {
                list.push(Version {
                    stamp: *stamp,
                    request: 0,
                    issued: now,
                    done: now,
                    fate: Fate::Acked,
                    stable: true,
                    optional: false,
                });
            }
        }
    }

    /// Whether a read issued and answered at these times may return `stamp`; the explanation if not.
    ///
    /// # Errors
    /// What was read and what would have been right.
    pub fn check(&self, sector: u64, stamp: u64, issued: u64, done: u64) -> Result<(), String> {
        let Some(list) = self.sectors.get(sector as usize) else {
            return Err(format!("sector {sector} is outside of the device"));
        };
        let overwritten = list
            .iter()
            .filter(|v| v.fate == Fate::Acked && !v.optional && v.done < issued)
            .map(|v| v.issued)
            .max()
            .unwrap_or(0);
        let allowed = |v: &&Version| v.issued <= done && v.done >= overwritten;
        if list.iter().filter(allowed).any(|v| v.stamp == stamp) {
            return Ok(());
        }
        let right: Vec<String> = list.iter().filter(allowed).map(|v| show_stamp(v.stamp)).collect();
        let known =
            if list.iter().any(|v| v.stamp == stamp) { "overwritten" } else { "never written or older" };
        Err(format!("sector {sector} has {} ({known}), allowed: {}", show_stamp(stamp), right.join(" ")))
    }
}

/// The stamp of the `sector`'s content in a write with this number.
#[must_use]
pub fn stamp(request: u64, sector: u64) -> u64 {
    (request << 24) | (sector & 0xff_ffff)
}

/// A stamp for people: the number of the write.
#[must_use]
pub fn show_stamp(stamp: u64) -> String {
    if stamp == 0 { "zeroes".into() } else { format!("w{}@{}", stamp >> 24, stamp & 0xff_ffff) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledged_write_is_read_until_overwritten() {
        let mut h = History::new(4);
        h.issue(1, 0, &[11], 10);
        assert!(h.check(0, 0, 11, 12).is_ok());
        assert!(h.check(0, 11, 11, 12).is_ok());
        h.answer(1, (0, 1), 20, true, false, |_, _| true);
        assert!(h.check(0, 0, 21, 22).is_err());
        assert!(h.check(0, 11, 21, 22).is_ok());
        h.issue(2, 0, &[22], 30);
        h.answer(2, (0, 1), 40, false, false, |_, _| true);
        assert!(h.check(0, 11, 50, 51).is_ok());
        assert!(h.check(0, 22, 50, 51).is_ok());
    }

    #[test]
    fn power_loss_takes_only_what_nobody_holds() {
        let mut h = History::new(1);
        h.issue(1, 0, &[11], 10);
        h.answer(1, (0, 1), 20, true, false, |_, _| true);
        h.power_loss(|_, _| true);
        assert!(h.check(0, 0, 21, 22).is_err());
        h.power_loss(|_, _| false);
        assert!(h.check(0, 0, 21, 22).is_ok());
        assert!(h.check(0, 11, 21, 22).is_ok());
        h.issue(2, 0, &[22], 30);
        h.answer(2, (0, 1), 40, true, false, |_, _| true);
        h.flushed(41);
        h.power_loss(|_, _| false);
        assert!(h.check(0, 11, 50, 51).is_err());
    }
}
