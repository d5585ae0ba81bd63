//! How much to request in the next turn of a resync or verify.
//!
//! [`RateController`] is the dynamic controller, [`SpeedMarks`] the c-min-rate throttle. Both are pure
//! bookkeeping: time and amounts are arguments. Rules: `spec/state-machine.md` §11.3, defaults §17.
//! Amounts are sectors of 512 bytes, rates KiB/s.

use std::collections::VecDeque;

/// Nominal length of a turn in milliseconds.
pub const TURN_MS: u64 = 100;
/// Distance of two speed marks in milliseconds.
pub const MARK_INTERVAL_MS: u64 = 3000;
/// Speed marks kept.
pub const MARKS: usize = 8;
/// Longest plan (`c-plan-ahead` 300).
const STEPS_MAX: u32 = 300;
/// Foreign sectors below which the backing device counts as idle.
const IDLE_SECTORS: u64 = 64;

/// Options of the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateConfig {
    /// `c-plan-ahead` in 0.1 s; 0 means the fixed rate `resync_rate`.
    pub plan_ahead: u32,
    /// `c-delay-target` in 0.1 s, used if `fill_target` is 0.
    pub delay_target: u32,
    /// `c-fill-target` in sectors.
    pub fill_target: u32,
    /// `c-max-rate` in KiB/s; 0 means no limit.
    pub max_rate: u32,
    /// `c-min-rate` in KiB/s; 0 means never throttle.
    pub min_rate: u32,
    /// `resync-rate` in KiB/s.
    pub resync_rate: u32,
}

impl Default for RateConfig {
    fn default() -> Self {
        Self {
            plan_ahead: 20,
            delay_target: 10,
            fill_target: 100,
            max_rate: 102_400,
            min_rate: 250,
            resync_rate: 250,
        }
    }
}

/// What happened since the last turn, and the limits of the next.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// Real time since the last turn.
    pub elapsed_ms: u64,
    /// Sectors of resync data, or in-sync answers, that came in since.
    pub sectors_in: u64,
    /// Sectors requested and not yet received.
    pub in_flight: u64,
    /// `max-buffers` in pages of 4 KiB.
    pub max_buffers: u32,
    /// The larger bitmap block of the two sides in sectors; requests are rounded up to it.
    pub block_sectors: u64,
}

/// The plan: a ring of corrections, one per 0.1 s ahead.
///
/// A turn plans for the next 0.1 s. Between the turns, [`Self::refill`] keeps `c-fill-target` on its way: a pipe that
/// is empty long before the next turn would otherwise stay empty, however short the plan. What was refilled counts
/// as requested by the turn.
#[derive(Clone, Debug, Default)]
pub struct RateController {
    plan: VecDeque<i64>,
    total: i64,
    /// Sectors allowed by the last turn.
    granted: u64,
    /// Sectors asked for by refilling since then.
    refilled: u64,
}

impl RateController {
    /// A controller at the start of a resync.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of sectors to request in this turn.
    pub fn turn(&mut self, config: &RateConfig, turn: &Turn) -> u64 {
        let steps = config.plan_ahead.min(STEPS_MAX);
        let wanted =
            if steps == 0 { rate_per_turn(config.resync_rate) } else { self.planned(config, turn, steps) };
        let refilled = std::mem::take(&mut self.refilled);
        let room = room(turn.max_buffers, turn.in_flight);
        self.granted = wanted.saturating_sub(refilled).min(room).next_multiple_of(turn.block_sectors.max(1));
        self.granted
    }

    /// The number of sectors to request now that some came back, before the next turn.
    pub fn refill(&self, config: &RateConfig, in_flight: u64, max_buffers: u32) -> u64 {
        if config.plan_ahead == 0 {
            return 0;
        }
        let missing = u64::from(config.fill_target).saturating_sub(in_flight);
        let allowed = match config.max_rate {
            0 => u64::MAX,
            rate => rate_per_turn(rate).saturating_sub(self.granted.saturating_add(self.refilled)),
        };
        missing.min(allowed).min(room(max_buffers, in_flight))
    }

    /// So many sectors were requested by a refill.
    pub fn refilled(&mut self, sectors: u64) {
        self.refilled = self.refilled.saturating_add(sectors);
    }

    fn planned(&mut self, config: &RateConfig, turn: &Turn, steps: u32) -> u64 {
        self.resize(steps);
        let (sectors_in, elapsed_ms) = normalized(turn);
        let want = if turn.in_flight == 0 && sectors_in == 0 {
            rate_per_turn(config.resync_rate).saturating_mul(steps.into())
        } else if config.fill_target != 0 {
            config.fill_target.into()
        } else {
            sectors_in.saturating_mul(u64::from(config.delay_target) * TURN_MS) / elapsed_ms
        };
        let correction = signed(want) - signed(turn.in_flight) - self.total;
        let per_step = correction / i64::from(steps);
        for entry in &mut self.plan {
            *entry += per_step;
        }
        self.total += per_step * i64::from(steps);
        let now = self.plan.pop_front().unwrap_or(0);
        self.plan.push_back(0);
        self.total -= now;
        let request = u64::try_from(signed(sectors_in) + now).unwrap_or(0);
        if config.max_rate == 0 { request } else { request.min(rate_per_turn(config.max_rate)) }
    }

    /// A changed `c-plan-ahead` starts with an empty plan.
    fn resize(&mut self, steps: u32) {
        if self.plan.len() != steps as usize {
            self.plan = std::iter::repeat_n(0, steps as usize).collect();
            self.total = 0;
        }
    }
}

/// Whether requests may be sent: not while more than half of the socket's send buffer is in use.
pub fn send_buffer_allows(used_bytes: u64, size_bytes: u64) -> bool {
    used_bytes <= size_bytes / 2
}

/// Sectors that still may be requested before the peer has no buffers for the answers.
fn room(max_buffers: u32, in_flight: u64) -> u64 {
    (u64::from(max_buffers) * 8).saturating_sub(in_flight)
}

/// Sectors per turn at a rate in KiB/s.
fn rate_per_turn(kib_per_s: u32) -> u64 {
    u64::from(kib_per_s) * 2 * TURN_MS / 1000
}

/// A short turn is scaled up to what a nominal one would have brought.
fn normalized(turn: &Turn) -> (u64, u64) {
    let elapsed_ms = turn.elapsed_ms.clamp(1, 1000);
    if elapsed_ms < TURN_MS {
        (turn.sectors_in.saturating_mul(TURN_MS) / elapsed_ms, TURN_MS)
    } else {
        (turn.sectors_in, elapsed_ms)
    }
}

/// Amounts of one device; 2^60 sectors are more than any, and sums of them do not overflow.
fn signed(sectors: u64) -> i64 {
    sectors.min(1 << 60) as i64
}

/// Whether the application uses the device: a write holds activity-log references, or the backing device
/// moved more than 64 sectors since the last check that are not resync's own.
pub fn application_is_active(al_in_use: bool, sectors_moved: u64, own_sectors: u64) -> bool {
    al_in_use || sectors_moved.saturating_sub(own_sectors) > IDLE_SECTORS
}

/// The recent progress of one resync or verify.
#[derive(Clone, Copy, Debug)]
pub struct SpeedMarks {
    marks: [Mark; MARKS],
    last: usize,
}

#[derive(Clone, Copy, Debug)]
struct Mark {
    time_ms: u64,
    bits_left: u64,
}

impl SpeedMarks {
    /// Starts at `now_ms` with `bits_left` to go.
    pub fn new(now_ms: u64, bits_left: u64) -> Self {
        Self { marks: [Mark { time_ms: now_ms, bits_left }; MARKS], last: 0 }
    }

    /// Sets the next mark if the last one is old enough. A pause must not look like slow progress: after
    /// one, start anew.
    pub fn advance(&mut self, now_ms: u64, bits_left: u64) {
        let due =
            self.marks.get(self.last).is_none_or(|m| now_ms.saturating_sub(m.time_ms) >= MARK_INTERVAL_MS);
        let next = (self.last + 1) % MARKS;
        if let (true, Some(mark)) = (due, self.marks.get_mut(next)) {
            *mark = Mark { time_ms: now_ms, bits_left };
            self.last = next;
        }
    }

    /// Progress in KiB/s since the mark before the last one; `None` if the number of bits did not shrink.
    /// `block_bytes` is what one bit stands for.
    pub fn speed(&self, now_ms: u64, bits_left: u64, block_bytes: u64) -> Option<u64> {
        let mark = self.marks.get((self.last + MARKS - 1) % MARKS)?;
        let bits = mark.bits_left.checked_sub(bits_left).filter(|bits| *bits > 0)?;
        let seconds = (now_ms.saturating_sub(mark.time_ms) / 1000).max(1);
        Some(bits.saturating_mul(block_bytes) / 1024 / seconds)
    }

    /// Whether to hold back because the application needs the device (c-min-rate): the requester skips this
    /// turn, the source waits [`TURN_MS`] before serving.
    pub fn throttle(
        &self,
        config: &RateConfig,
        application_active: bool,
        now_ms: u64,
        bits_left: u64,
        block_bytes: u64,
    ) -> bool {
        config.min_rate != 0
            && application_active
            && self.speed(now_ms, bits_left, block_bytes).is_some_and(|speed| speed > config.min_rate.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAN: RateConfig = RateConfig {
        plan_ahead: 20,
        delay_target: 10,
        fill_target: 0,
        max_rate: 0,
        min_rate: 250,
        resync_rate: 250,
    };

    fn turn(sectors_in: u64, in_flight: u64) -> Turn {
        Turn { elapsed_ms: 100, sectors_in, in_flight, max_buffers: 1 << 20, block_sectors: 8 }
    }

    #[test]
    fn fixed_rate() {
        let config = RateConfig { plan_ahead: 0, ..LAN };
        assert_eq!(
            RateController::new().turn(&config, &turn(0, 0)),
            56,
            "250 KiB/s in 0.1 s, rounded up to 4 KiB"
        );
        let config = RateConfig { plan_ahead: 0, resync_rate: 102_400, ..LAN };
        assert_eq!(RateController::new().turn(&config, &turn(9999, 9999)), 20_480);
    }

    /// The pseudo code of §11.3, done by hand for two turns.
    #[test]
    fn by_hand() {
        let mut c = RateController::new();
        // want 50*20 = 1000, correction 1000, 50 per step; now = 50.
        assert_eq!(c.turn(&LAN, &turn(0, 0)), 56);
        assert_eq!(c.total, 950);
        // want 100*1000/100 = 1000, correction 1000-0-950 = 50, 2 per step; head 52; total 950+40-52.
        assert_eq!(c.turn(&LAN, &turn(100, 0)), 152);
        assert_eq!(c.total, 938);
        // Too much in flight: correction (100*10) - 2000 - 938 = -1938, -96 per step; head 52-96 = -44.
        assert_eq!(c.turn(&LAN, &turn(100, 2000)), 56);
        assert_eq!(c.total, 938 - 96 * 20 + 44);
        // Never negative.
        assert_eq!(c.turn(&LAN, &turn(0, 100_000)), 0);
    }

    #[test]
    fn fill_target_wins_over_delay() {
        let config = RateConfig { fill_target: 100, ..LAN };
        let mut c = RateController::new();
        c.turn(&config, &turn(8, 8));
        // correction 100-8 = 92, 4 per step; total 80-4.
        assert_eq!(c.total, 76);
    }

    #[test]
    fn limits() {
        let config = RateConfig { max_rate: 100, resync_rate: 1_000_000, ..LAN };
        assert_eq!(RateController::new().turn(&config, &turn(1 << 30, 0)), 24, "100 KiB/s: 20 sectors");
        let small = Turn { max_buffers: 10, in_flight: 64, ..turn(1 << 30, 0) };
        assert_eq!(RateController::new().turn(&LAN, &small), 16, "80 sectors of buffers, 64 in use");
        let full = Turn { in_flight: 81, ..small };
        assert_eq!(RateController::new().turn(&LAN, &full), 0);
        let coarse = Turn { block_sectors: 128, ..turn(0, 0) };
        assert_eq!(RateController::new().turn(&LAN, &coarse), 128);
        let extreme = Turn {
            elapsed_ms: 0,
            sectors_in: u64::MAX,
            in_flight: u64::MAX,
            max_buffers: u32::MAX,
            block_sectors: 0,
        };
        let mut c = RateController::new();
        for _ in 0..1000 {
            c.turn(&RateConfig { plan_ahead: u32::MAX, fill_target: u32::MAX, ..LAN }, &extreme);
        }
    }

    #[test]
    fn short_turns_are_scaled_up() {
        assert_eq!(normalized(&Turn { elapsed_ms: 50, ..turn(10, 0) }), (20, 100));
        assert_eq!(normalized(&Turn { elapsed_ms: 0, ..turn(10, 0) }), (1000, 100));
        assert_eq!(normalized(&Turn { elapsed_ms: 200, ..turn(10, 0) }), (10, 200));
        assert_eq!(normalized(&Turn { elapsed_ms: 5000, ..turn(10, 0) }), (10, 1000));
    }

    #[test]
    fn plan_stays_consistent() {
        let mut c = RateController::new();
        for n in 0..200u64 {
            let config = RateConfig { plan_ahead: if n < 100 { 20 } else { 7 }, ..LAN };
            c.turn(&config, &turn(n * 37 % 500, n * 91 % 3000));
            assert_eq!(c.plan.iter().sum::<i64>(), c.total);
        }
        assert_eq!(c.plan.len(), 7);
    }

    #[test]
    fn refilling() {
        let config = RateConfig { fill_target: 100, ..LAN };
        let mut c = RateController::new();
        assert_eq!(c.turn(&config, &turn(0, 0)), 56);
        assert_eq!(c.refill(&config, 30, 1 << 20), 70, "up to the target");
        assert_eq!(c.refill(&config, 100, 1 << 20), 0);
        assert_eq!(c.refill(&config, 30, 5), 10, "40 sectors of buffers");
        assert_eq!(c.refill(&LAN, 0, 1 << 20), 0, "no fill target");
        assert_eq!(c.refill(&RateConfig { plan_ahead: 0, ..config }, 0, 1 << 20), 0, "a fixed rate");
        // 500 KiB/s are 100 sectors per turn, of which 56 are used.
        let slow = RateConfig { max_rate: 500, ..config };
        assert_eq!(c.refill(&slow, 0, 1 << 20), 44);
        c.refilled(40);
        assert_eq!(c.refill(&slow, 0, 1 << 20), 4);
        // What was refilled is not asked for once more by the turn.
        let with = c.clone().turn(&config, &turn(96, 0));
        c.refilled = 0;
        assert_eq!(c.turn(&config, &turn(96, 0)), with + 40);
    }

    /// A link that delivers 1000 sectors per turn, 3 turns late, converges to its capacity.
    #[test]
    fn converges() {
        let mut c = RateController::new();
        let mut pipe = VecDeque::from([0u64; 3]);
        let (mut backlog, mut in_flight, mut received) = (0u64, 0u64, 0u64);
        for n in 0..300 {
            let sectors_in = pipe.pop_front().unwrap_or(0);
            in_flight -= sectors_in;
            if n >= 200 {
                received += sectors_in;
            }
            let request = c.turn(&LAN, &turn(sectors_in, in_flight));
            in_flight += request;
            backlog += request;
            let sent = backlog.min(1000);
            backlog -= sent;
            pipe.push_back(sent);
        }
        assert!((80_000..=100_000).contains(&received), "{received} of 100000 sectors");
    }

    #[test]
    fn send_buffer() {
        assert!(send_buffer_allows(0, 0) && send_buffer_allows(50, 100) && !send_buffer_allows(51, 100));
    }

    #[test]
    fn marks() {
        let mut m = SpeedMarks::new(0, 1000);
        m.advance(2999, 900);
        assert_eq!(m.last, 0, "a mark every three seconds");
        for n in 1..=20 {
            m.advance(n * 3000, 1000 - n * 10);
        }
        // Last mark at 60 s (800 bits), the one before at 57 s (810 bits); now 62 s, 760 bits.
        assert_eq!(m.speed(62_000, 760, 4096), Some(40), "50 bits of 4 KiB in 5 s");
        assert_eq!(m.speed(57_000, 760, 4096), Some(200), "at least one second");
        assert_eq!(m.speed(62_000, 810, 4096), None);
        assert_eq!(m.speed(62_000, 900, 4096), None, "bits were added meanwhile");
    }

    #[test]
    fn throttling() {
        let m = SpeedMarks::new(0, 10_000);
        let fast = |config: &RateConfig, active| m.throttle(config, active, 1000, 9_900, 4096);
        assert!(fast(&LAN, true), "400 KiB/s is more than 250");
        assert!(!fast(&LAN, false), "nobody else needs the device");
        assert!(!fast(&RateConfig { min_rate: 0, ..LAN }, true));
        assert!(!fast(&RateConfig { min_rate: 400, ..LAN }, true), "not above c-min-rate");
        assert!(!m.throttle(&LAN, true, 1000, 10_000, 4096), "no progress");
        assert!(application_is_active(true, 0, 0) && application_is_active(false, 165, 100));
        assert!(!application_is_active(false, 164, 100) && !application_is_active(false, 0, 100));
    }

    #[test]
    fn defaults() {
        let d = RateConfig::default();
        let got = (d.plan_ahead, d.delay_target, d.fill_target, d.max_rate, d.min_rate, d.resync_rate);
        assert_eq!(got, (20, 10, 100, 102_400, 250, 250));
    }
}
