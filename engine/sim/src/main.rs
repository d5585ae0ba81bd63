//! Runs scenarios and seeds of the simulator.
#![forbid(unsafe_code)]

use palisade_sim::plan::Plan;
use palisade_sim::{scenario, seeds};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Threads that run seeds.
const THREADS: usize = 2;
/// Failing seeds that are minimised and shown; more are only counted.
const SHOWN_MAX: usize = 12;
/// Time for making one failing seed smaller.
const MINIMISE: Duration = Duration::from_secs(10);

const USAGE: &str = "usage: palisade-sim seeds FROM COUNT [--all]
       palisade-sim replay SEED [--trace] [--minimised]
       palisade-sim scenario FILE... [--trace]     (PALISADE_REWRITE=1 writes the outcome into the files)";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let flag = |f: &str| args.iter().any(|a| a == f);
    let words: Vec<&str> = args.iter().map(String::as_str).filter(|a| !a.starts_with("--")).collect();
    match words.as_slice() {
        ["seeds", from, count] => match (from.parse(), count.parse()) {
            (Ok(from), Ok(count)) => many(from, count, flag("--all")),
            _ => usage(),
        },
        ["replay", seed] => match seed.parse() {
            Ok(seed) => replay(seed, flag("--trace"), flag("--minimised")),
            Err(_) => usage(),
        },
        ["scenario", files @ ..] if !files.is_empty() => {
            let rewrite = std::env::var_os("PALISADE_REWRITE").is_some();
            let mut bad = 0u32;
            for f in files {
                if let Err(e) = scenario::run_file(Path::new(f), rewrite, flag("--trace")) {
                    println!("{e}");
                    bad += 1;
                }
            }
            println!("{} scenarios, {bad} failed", files.len());
            ExitCode::from(u8::from(bad > 0))
        }
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

fn many(from: u64, count: u64, all: bool) -> ExitCode {
    std::panic::set_hook(Box::new(|_| {}));
    let started = Instant::now();
    let next = AtomicU64::new(from);
    let failures: Mutex<Vec<(u64, String)>> = Mutex::new(Vec::new());
    let totals = Mutex::new((0u64, 0u64, 0u64, 0u64));
    std::thread::scope(|s| {
        for _ in 0..THREADS {
            s.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + count {
                        break;
                    }
                    let o = seeds::run_caught(&Plan::new(seed));
                    if let Ok(mut t) = totals.lock() {
                        *t = (
                            t.0 + o.counts.0,
                            t.1 + o.counts.1,
                            t.2 + o.counts.2,
                            t.3 + u64::from(o.administrator),
                        );
                    }
                    if let (Some(f), Ok(mut v)) = (o.failure, failures.lock()) {
                        v.push((seed, f));
                    }
                }
            });
        }
    });
    let seconds = started.elapsed().as_secs_f64();
    let mut failures = failures.into_inner().unwrap_or_default();
    failures.sort();
    let (open, failures): (Vec<_>, Vec<_>) =
        failures.into_iter().partition(|(s, _)| seeds::open(*s).is_some());
    let (steps, writes, reads, split) = totals.into_inner().unwrap_or_default();
    println!(
        "{count} seeds in {seconds:.1} s ({:.1}/s): {steps} events, {writes} acknowledged writes, {reads} reads checked, {split} split brains left to an administrator, {} failed, {} known to fail",
        count as f64 / seconds,
        failures.len(),
        open.len()
    );
    for (seed, _) in &open {
        println!("known: seed {seed}: {}", seeds::open(*seed).unwrap_or_default());
    }
    let mut kinds: Vec<(String, u64, u64, String)> = Vec::new();
    for (seed, f) in &failures {
        let kind = seeds::kind(f);
        match kinds.iter_mut().find(|k| k.0 == kind) {
            Some(k) => k.1 += 1,
            None => kinds.push((kind, 1, *seed, f.clone())),
        }
        if all {
            println!("seed {seed}: {f}");
        }
    }
    kinds.sort_by_key(|k| std::cmp::Reverse(k.1));
    for (_, times, seed, f) in &kinds {
        println!("{times} x {f}\n    first: palisade-sim replay {seed} --trace");
    }
    if !all {
        for (_, _, seed, f) in kinds.iter().take(SHOWN_MAX) {
            show_minimised(*seed, f);
        }
    }
    ExitCode::from(u8::from(!failures.is_empty()))
}

fn show_minimised(seed: u64, failure: &str) -> Plan {
    let plan = seeds::minimise(&Plan::new(seed), failure, MINIMISE);
    println!("\nseed {seed}, made smaller ({} nodes):", plan.nodes.len());
    for s in &plan.steps {
        println!("    {:>9.4} s  {:?}", s.at as f64 / 1e9, s.op);
    }
    let o = seeds::run_caught(&plan);
    println!("  {}\n{}", o.failure.unwrap_or_default(), o.status);
    plan
}

fn replay(seed: u64, trace: bool, minimised: bool) -> ExitCode {
    let mut plan = Plan::new(seed);
    if minimised && let Some(f) = seeds::run_caught(&plan).failure {
        plan = show_minimised(seed, &f);
    }
    let o = seeds::run(&plan, trace);
    println!("{}", o.status);
    match o.failure {
        None => {
            println!(
                "seed {seed}: {} events, {} writes, {} reads, no violation",
                o.counts.0, o.counts.1, o.counts.2
            );
            ExitCode::SUCCESS
        }
        Some(f) => {
            println!("seed {seed}: {f}");
            ExitCode::from(1)
        }
    }
}
