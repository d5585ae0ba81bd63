//! A few hundred seeds with faults hold every invariant, but for those listed in `open-seeds.txt`.
#![allow(clippy::unwrap_used)] // A test: a thread that panicked fails it.

use palisade_sim::plan::Plan;
use palisade_sim::seeds;

const SEEDS: u64 = 300;

#[test]
fn seeds_hold_the_invariants() {
    let half = |first: u64| {
        (first..=SEEDS)
            .step_by(2)
            .filter(|s| seeds::open(*s).is_none())
            .filter_map(|s| seeds::run_caught(&Plan::new(s)).failure.map(|f| format!("seed {s}: {f}")))
            .collect::<Vec<_>>()
    };
    let (mut odd, even) = std::thread::scope(|s| {
        let odd = s.spawn(|| half(1));
        let even = half(2);
        (odd.join().unwrap(), even)
    });
    odd.extend(even);
    assert!(
        odd.is_empty(),
        "{} of {SEEDS} seeds failed (palisade-sim replay SEED):\n{}",
        odd.len(),
        odd.join("\n")
    );
}

#[test]
fn a_seed_is_a_run() {
    let run = || seeds::run_caught(&Plan::new(5));
    let (a, b) = (run(), run());
    assert_eq!((a.counts, a.status, a.failure), (b.counts, b.status, b.failure));
}
