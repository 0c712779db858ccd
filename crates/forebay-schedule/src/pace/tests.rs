use std::time::Duration;

use proptest::prelude::*;

use super::{Load, Pace};

/// Microseconds of a step, of a decode, of a token of prefill; nanoseconds of a token of context.
type Machine = (u32, u32, u32, u32);

fn takes((step, decode, token, context): Machine, load: Load) -> f64 {
    f64::from(step) * 1e-6
        + f64::from(decode) * 1e-6 * f64::from(load.decodes)
        + f64::from(token) * 1e-6 * f64::from(load.prefill_tokens)
        + f64::from(context) * 1e-9 * load.prefill_context as f64
}

fn load(decodes: u32, start: u32, tokens: u32) -> Load {
    Load { decodes, ..Load::prefill(start, tokens) }
}

fn learn(pace: &mut Pace, load: Load, seconds: f64) {
    pace.learn(load, Duration::from_secs_f64(seconds));
}

/// SmolLM2 on two cores, about.
const SMALL: Machine = (2300, 710, 350, 20);

#[test]
fn the_first_step_tells_what_prefill_takes() {
    let mut pace = Pace::default();
    assert!(!pace.is_known());
    learn(&mut pace, load(0, 0, 512), 0.2);
    assert!(pace.is_known());
    let fits = pace.prefill_tokens(0, 0.05);
    assert!((110..=200).contains(&fits), "128 is a quarter of what took four times as long: {fits}");
}

#[test]
fn a_bound_below_nothing_fits_nothing() {
    let mut pace = Pace::default();
    learn(&mut pace, load(0, 0, 512), 0.2);
    assert_eq!(pace.prefill_tokens(0, -0.01), 0);
}

#[test]
fn tokens_that_take_no_time_fit_without_end() {
    let mut pace = Pace::default();
    assert_eq!(pace.prefill_tokens(0, 1.0), u32::MAX);
    learn(&mut pace, load(4, 0, 0), 0.01);
    assert_eq!(pace.prefill_tokens(100, 1.0), u32::MAX, "decodes tell nothing of prefill");
}

#[test]
fn many_decodes_do_not_erase_what_prefill_takes() {
    let mut pace = Pace::default();
    for start in (0..4000).step_by(100) {
        let load = load(2, start, 100);
        learn(&mut pace, load, takes(SMALL, load));
    }
    for step in 0..5000 {
        let load = load(1 + step % 7, 0, 0);
        learn(&mut pace, load, takes(SMALL, load));
    }
    let (found, truth) =
        (pace.prefill_seconds(2000, 128), takes((0, 0, SMALL.2, SMALL.3), load(0, 2000, 128)));
    assert!((0.9..1.1).contains(&(found / truth)), "{found} for {truth}: {pace:?}");
}

#[test]
fn who_is_held_up_once_is_not_believed() {
    let mut pace = Pace::default();
    for step in 0..200 {
        let load = load(4, 0, 64 * (step % 2));
        learn(&mut pace, load, takes(SMALL, load));
    }
    let before = pace.seconds(load(4, 0, 64));
    learn(&mut pace, load(4, 0, 64), 5.0);
    assert!(pace.seconds(load(4, 0, 64)) < 2.0 * before, "{before}: {pace:?}");
}

#[test]
fn a_machine_that_became_slower_is_followed() {
    let mut pace = Pace::default();
    let slower = (SMALL.0 * 5, SMALL.1 * 5, SMALL.2 * 5, SMALL.3 * 5);
    for step in 0..300 {
        let load = load(4, step * 16 % 4000, if step % 3 == 0 { 0 } else { 48 });
        learn(&mut pace, load, takes(if step < 250 { SMALL } else { slower }, load));
    }
    let (now, truth) = (pace.seconds(load(4, 1000, 48)), takes(slower, load(4, 1000, 48)));
    assert!((0.8..1.25).contains(&(now / truth)), "{now} for {truth}");
}

proptest! {
    /// Whatever a machine's costs are: once loads have varied, a step is foreseen to a tenth, and what is said to fit into a
    /// time does.
    #[test]
    fn what_a_step_takes_is_learned(
        machine in (10u32..20_000, 1u32..2000, 5u32..20_000, 0u32..2000),
        loads in prop::collection::vec((0u32..64, 0u32..8000, 0u32..512), 80..160),
        asked in (0u32..64, 0u32..8000, 16u32..512),
    ) {
        let mut pace = Pace::default();
        for &(decodes, start, tokens) in &loads {
            let load = load(decodes, start, tokens);
            learn(&mut pace, load, takes(machine, load));
        }
        let asked_load = load(asked.0, asked.1, asked.2);
        let ratio = pace.seconds(asked_load) / takes(machine, asked_load);
        prop_assert!((0.9..1.1).contains(&ratio), "{ratio}: {pace:?}");
        let fits = pace.prefill_tokens(asked.1, pace.prefill_seconds(asked.1, asked.2));
        prop_assert!(fits.abs_diff(asked.2) <= 1, "{fits} for {}", asked.2);
    }

    /// However steps come out, no cost is negative or not a number, and what fits grows with the time.
    #[test]
    fn nonsense_is_survived(
        steps in prop::collection::vec((0u32..64, 0u32..100_000, 0u32..5000, 0u64..10_000_000), 1..100),
        start in 0u32..100_000,
        seconds in 0.0f64..2.0,
    ) {
        let mut pace = Pace::default();
        for &(decodes, at, tokens, micros) in &steps {
            pace.learn(load(decodes, at, tokens), Duration::from_micros(micros));
            prop_assert!(pace.costs.iter().all(|cost| *cost >= 0.0 && cost.is_finite()), "{pace:?}");
        }
        prop_assert!(pace.prefill_tokens(start, seconds) <= pace.prefill_tokens(start, 2.0 * seconds));
    }
}
