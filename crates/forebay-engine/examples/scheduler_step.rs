//! What the scheduler takes of a step, with the fake executor in the model's place: one JSON object per number of running
//! sequences. `cargo xtask bench scheduler` runs it and writes the results down.
//!
//! ```text
//! cargo run --release -p forebay-engine --example scheduler_step -- [STEPS]
//! ```
//!
//! Counted is all that a step asks of the scheduler: planning, what was computed, a token for every sequence, and the ends of
//! those that are done. Arrivals, which bring a prompt to be hashed, are counted apart.
#![allow(clippy::print_stdout, reason = "a command-line program")]

use std::time::{Duration, Instant};

use anyhow::Context;
use forebay_engine::exec::{Executor, FakeExecutor};
use forebay_schedule::{NewSeq, Scheduler, SchedulerConfig, SeqId, TokenOutcome};

const RUNNING: [u32; 3] = [8, 64, 256];
const BLOCKS: u32 = 8192;
const BLOCK_SIZE: u32 = 16;
const VOCAB: usize = 64;
/// Every tenth prompt begins like others.
const PROMPT_TOKENS: std::ops::Range<u64> = 64..320;
const OUTPUT_TOKENS: u32 = 128;
/// Sequences that always wait.
const WAITING: u32 = 32;
/// Enough for every slot to have had its longest sequence.
const WARM_UP: usize = 5000;

fn main() -> anyhow::Result<()> {
    let steps = match std::env::args().nth(1) {
        Some(steps) => steps.parse().context("STEPS is a number")?,
        None => 5000,
    };
    for running in RUNNING {
        let mut bench = Bench::new(running);
        for _ in 0..WARM_UP {
            bench.step()?;
        }
        bench.arrivals.clear();
        let mut took = Vec::with_capacity(steps);
        let mut allocations = 0;
        for _ in 0..steps {
            let step = bench.step()?;
            took.push(step.took);
            allocations += step.allocations;
        }
        let line = serde_json::json!({
            "running": running,
            "steps": steps,
            "p50_us": quantile(&mut took, 0.5),
            "p99_us": quantile(&mut took, 0.99),
            "mean_us": took.iter().map(Duration::as_secs_f64).sum::<f64>() * 1e6 / steps as f64,
            "allocations_per_step": allocations as f64 / steps as f64,
            "arrival_p50_us": quantile(&mut bench.arrivals, 0.5),
        });
        println!("{line}");
    }
    Ok(())
}

struct Step {
    took: Duration,
    allocations: u64,
}

struct Bench {
    scheduler: Scheduler,
    executor: FakeExecutor,
    now: Duration,
    next_id: u64,
    /// What each arrival took.
    arrivals: Vec<Duration>,
}

impl Bench {
    fn new(running: u32) -> Self {
        let scheduler = Scheduler::new(SchedulerConfig {
            block_size: BLOCK_SIZE,
            blocks: BLOCKS,
            running_max: running,
            itl_slo: Some(Duration::from_millis(200)),
            kv_events: true,
            ..SchedulerConfig::default()
        });
        let executor = FakeExecutor::new(VOCAB, BLOCK_SIZE as usize, BLOCKS as usize);
        Self { scheduler, executor, now: Duration::ZERO, next_id: 0, arrivals: Vec::new() }
    }

    fn step(&mut self) -> anyhow::Result<Step> {
        while self.scheduler.stats().waiting < WAITING {
            self.add()?;
        }
        self.now += Duration::from_millis(10);
        let Self { scheduler, executor, now, .. } = self;
        let mut sampled: Vec<(SeqId, u32)> = Vec::new();
        let mut executed = Ok(());
        let mut took = Duration::ZERO;
        let counted = allocation_counter::measure(|| {
            let begin = Instant::now();
            let plan = scheduler.plan_step(*now);
            took = begin.elapsed();
            allocation_counter::opt_out(|| match executor.execute(plan) {
                Ok(logits) => {
                    let rows =
                        plan.logit_tokens.iter().map(|t| plan.row_starts.partition_point(|s| s <= t) - 1);
                    sampled.extend(rows.map(|row| plan.seqs[row]).zip(logits.chunks(VOCAB).map(greedy)));
                }
                Err(error) => executed = Err(error),
            });
            let begin = Instant::now();
            scheduler.on_step_done(Duration::from_millis(10));
            for &(seq, token) in &sampled {
                if scheduler.on_token(seq, token) != TokenOutcome::Continue {
                    scheduler.finish(seq);
                }
            }
            took += begin.elapsed();
        });
        executed?;
        scheduler.drain_events(&mut Vec::new());
        Ok(Step { took, allocations: counted.count_total })
    }

    fn add(&mut self) -> anyhow::Result<()> {
        let id = self.next_id;
        self.next_id += 1;
        let tokens = PROMPT_TOKENS.start + id * 37 % (PROMPT_TOKENS.end - PROMPT_TOKENS.start);
        let name = if id.is_multiple_of(10) { 0 } else { id };
        let new = NewSeq {
            id: SeqId(id),
            prompt: (0..tokens).map(|i| ((name + i / 3) % VOCAB as u64) as u32).collect(),
            max_new_tokens: OUTPUT_TOKENS,
            cache_salt: None,
            priority: 0,
            tenant: ["a", "b", "c", "d"][id as usize % 4].into(),
            prompt_logits: false,
        };
        let begin = Instant::now();
        self.scheduler.try_add(self.now, new)?;
        self.arrivals.push(begin.elapsed());
        Ok(())
    }
}

fn greedy(logits: &[f32]) -> u32 {
    (0..logits.len() as u32).max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize])).unwrap_or(0)
}

/// In microseconds.
fn quantile(took: &mut [Duration], q: f64) -> f64 {
    took.sort_unstable();
    let at = (took.len().saturating_sub(1) as f64 * q).round() as usize;
    took.get(at).map_or(f64::NAN, |took| took.as_secs_f64() * 1e6)
}
