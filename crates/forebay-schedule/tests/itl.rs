//! Decoding beside prefill, on machines whose steps take what a formula says: pauses stay even and short, and prompts get on.

mod sim;

use std::time::Duration;

use forebay_schedule::{Scheduler, SchedulerConfig, SeqId, StepPlan};
use sim::{sampled, seq};

/// What a step takes, in milliseconds; per thousand where tokens are counted by their context.
#[derive(Debug, Clone, Copy)]
struct Machine {
    step: f64,
    decode: f64,
    token: f64,
    /// Per token and 1000 tokens of context.
    context: f64,
    /// Per row and 1000 tokens of its context: its KV is read once. The scheduler's formula doesn't know this.
    row: f64,
    /// Every step takes between this much less and this much more.
    noise: f64,
}

/// SmolLM2 135M on two cores, about: 3 ms for one decode, 2500 tokens of prefill a second at first, 300 at context 7000.
const SMALL: Machine = Machine { step: 2.3, decode: 0.7, token: 0.38, context: 0.4, row: 0.8, noise: 0.0 };
/// A model fifty times as large on more cores.
const LARGE: Machine = Machine { step: 90.0, decode: 6.0, token: 5.0, context: 0.05, row: 1.0, noise: 0.0 };
/// A model of that size on an accelerator: a step costs much, a token next to nothing.
const FAST: Machine = Machine { step: 9.0, decode: 0.05, token: 0.03, context: 0.001, row: 0.05, noise: 0.0 };

impl Machine {
    fn seconds(&self, plan: &StepPlan, random: &mut u32) -> f64 {
        let mut ms = self.step;
        for row in (0..plan.rows()).map(|row| plan.row(row)) {
            let positions = &plan.positions[row];
            ms += self.row * f64::from(positions[positions.len() - 1]) / 1000.0;
            match positions.len() {
                1 => ms += self.decode,
                tokens => {
                    let context: f64 = positions.iter().map(|&position| f64::from(position)).sum();
                    ms += self.token * tokens as f64 + self.context * context / 1000.0;
                }
            }
        }
        *random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let noise = f64::from(*random >> 8) / f64::from(1 << 23) - 1.0;
        ms * (1.0 + self.noise * noise) / 1000.0
    }
}

/// What steps took, in seconds.
#[derive(Debug, Default)]
struct Seen {
    /// Decodes alone, before the prompt came.
    alone: Vec<f64>,
    /// Decodes beside its prefill.
    beside: Vec<f64>,
    /// Taken divided by expected, of the latter.
    foreseen: Vec<f64>,
    /// From its arrival to its first token.
    ttft: f64,
}

fn quantile(steps: &[f64], q: f64) -> f64 {
    let mut sorted = steps.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}

fn config(itl_slo_ms: Option<u64>) -> SchedulerConfig {
    SchedulerConfig {
        blocks: 4000,
        step_tokens_max: 512,
        model_len_max: 16_000,
        itl_slo: itl_slo_ms.map(Duration::from_millis),
        ..SchedulerConfig::default()
    }
}

/// `decodes` sequences decode, then a prompt of 8,000 tokens comes.
fn run(machine: Machine, itl_slo_ms: Option<u64>, decodes: u64) -> Seen {
    const LONG: SeqId = SeqId(1000);
    let mut scheduler = Scheduler::new(config(itl_slo_ms));
    let mut seen = Seen::default();
    let (mut now, mut arrived, mut random) = (0.0, 0.0, 1);
    for id in 0..decodes {
        let prompt: Vec<u32> = (0..20).map(|i| i + 100 * id as u32).collect();
        scheduler.try_add(Duration::ZERO, seq(id, prompt, 10_000)).expect("is admitted");
    }
    for step in 0..20_000 {
        if step == 100 {
            arrived = now;
            let prompt: Vec<u32> = (0..8000).map(|i| i * 7 + 1_000_000).collect();
            scheduler.try_add(Duration::from_secs_f64(now), seq(LONG.0, prompt, 1)).expect("is admitted");
        }
        let plan = scheduler.plan_step(Duration::from_secs_f64(now)).clone();
        let expected = scheduler.expected_step();
        let taken = machine.seconds(&plan, &mut random);
        now += taken;
        let done = sampled(&plan).contains(&LONG);
        if step >= 100 {
            seen.beside.push(taken);
            seen.foreseen.extend(expected.map(|expected| taken / expected.as_secs_f64()));
        } else if step > 10 {
            seen.alone.push(taken);
        }
        if done {
            seen.ttft = now - arrived;
            return seen;
        }
        scheduler.on_step_done(Duration::from_secs_f64(taken));
        for id in sampled(&plan) {
            scheduler.on_token(id, 1);
        }
    }
    panic!("the prompt was never done: {:?}", scheduler.stats());
}

/// What the same prompt takes on an idle machine.
fn ttft_alone(machine: Machine) -> f64 {
    run(machine, None, 0).ttft
}

#[test]
fn pauses_are_even_while_a_long_prompt_is_computed() {
    for machine in [SMALL, LARGE, FAST] {
        for noise in [0.0, 0.2] {
            for decodes in [1, 4, 8, 32] {
                let seen = run(Machine { noise, ..machine }, Some(200), decodes);
                let (p50, p99) = (quantile(&seen.beside, 0.5), quantile(&seen.beside, 0.99));
                assert!(p99 <= 1.7 * p50, "{machine:?}, {decodes} decodes: p50 {p50:.4}, p99 {p99:.4}");
                let most = quantile(&seen.beside, 1.0);
                assert!(most <= 2.5 * p50, "{machine:?}, {decodes} decodes: p50 {p50:.4}, most {most:.4}");
            }
        }
    }
}

#[test]
fn what_steps_take_is_foreseen() {
    for machine in [SMALL, LARGE, FAST] {
        for (noise, within) in [(0.0, 0.05), (0.2, 0.35)] {
            for decodes in [1, 4, 32] {
                let seen = run(Machine { noise, ..machine }, Some(200), decodes);
                // Of a hundred steps: the first chunks are met unprepared.
                let (p5, p95) = (quantile(&seen.foreseen, 0.05), quantile(&seen.foreseen, 0.95));
                assert!(
                    p5 >= 1.0 - within && p95 <= 1.0 + within,
                    "{machine:?}, {decodes}: {p5:.3} to {p95:.3}"
                );
            }
        }
    }
}

/// The prompt takes no more than the decodes leave it, and they leave it about half.
#[test]
fn the_long_prompt_gets_on_beside_decodes() {
    fn check(machine: Machine, decodes: u64, times: f64) {
        let (ttft, alone) = (run(machine, Some(200), decodes).ttft, ttft_alone(machine));
        assert!(ttft <= times * alone, "{machine:?}, {decodes}: {ttft:.2} s, alone {alone:.2} s");
    }
    check(SMALL, 1, 1.7);
    check(SMALL, 4, 2.0);
    check(SMALL, 32, 3.2);
    check(LARGE, 4, 3.0);
    check(LARGE, 32, 4.6);
    check(FAST, 4, 1.2);
    check(FAST, 32, 1.4);
}

#[test]
fn without_a_bound_everybody_waits_for_what_fits_by_tokens() {
    let unbound = run(SMALL, None, 4);
    assert!(quantile(&unbound.beside, 0.5) > 0.2, "{:?}", unbound.beside);
    let bound = run(SMALL, Some(200), 4);
    assert!(quantile(&bound.beside, 0.99) < 0.05, "{:?}", bound.beside);
}

#[test]
fn prefill_goes_on_under_a_bound_that_can_not_be_kept() {
    let seen = run(SMALL, Some(1), 4);
    // Half as long as the decodes, and at last the smallest chunks there are.
    let (steps, smallest) = (seen.beside.len(), config(None).chunk_tokens_min as usize);
    assert!((8000 / 32..=8000 / smallest).contains(&steps), "{steps} steps");
    let longest = quantile(&seen.beside, 1.0);
    // 32 tokens would take 0.12 s at the end.
    assert!(longest < 0.04, "{longest}");
}

/// The more prompts wait, the more of a step they get, up to the bound.
#[test]
fn many_prompts_get_more_of_a_step() {
    let steps = |prompts: u64| {
        let mut scheduler = Scheduler::new(config(Some(200)));
        let (mut now, mut random, mut beside) = (Duration::ZERO, 1, Vec::new());
        for id in 0..8 {
            scheduler.try_add(now, seq(id, vec![id as u32; 20], 10_000)).expect("is admitted");
        }
        for step in 0..100 {
            if step == 50 {
                for id in 100..100 + prompts {
                    let prompt: Vec<u32> = (0..2000).map(|i| i * 3 + id as u32 * 10_000).collect();
                    scheduler.try_add(now, seq(id, prompt, 10)).expect("is admitted");
                }
            }
            let plan = scheduler.plan_step(now).clone();
            let taken = SMALL.seconds(&plan, &mut random);
            if step > 60 {
                beside.push(taken);
            }
            now += Duration::from_secs_f64(taken);
            scheduler.on_step_done(Duration::from_secs_f64(taken));
            for id in sampled(&plan) {
                scheduler.on_token(id, 1);
            }
        }
        quantile(&beside, 0.5)
    };
    let (one, five, thirty) = (steps(1), steps(5), steps(30));
    assert!(
        one < 0.035 && five > 1.3 * one && thirty > 3.0 * five.min(0.06),
        "{one:.3}, {five:.3}, {thirty:.3}"
    );
    assert!(thirty < 0.22, "{thirty:.3}");
}
