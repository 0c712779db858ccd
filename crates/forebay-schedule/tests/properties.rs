//! Whatever arrives and leaves: everything finishes, in the right blocks, within the limits.

mod sim;

use std::time::Duration;

use forebay_schedule::{SchedulerConfig, SeqId};
use proptest::prelude::*;
use sim::{Sim, expected_output, salted, seq};

#[derive(Debug, Clone)]
struct Arrival {
    step: u64,
    prompt: Vec<u32>,
    max_new: u32,
    priority: i32,
    salted: bool,
    scored: bool,
    abort_after: Option<u64>,
}

/// Prompts that often begin alike: a few pieces, each from a small set.
fn arrival() -> impl Strategy<Value = Arrival> {
    let piece = (0u32..3, 1usize..9).prop_map(|(token, count)| vec![token; count]);
    (
        0u64..30,
        prop::collection::vec(piece, 1..5),
        1u32..20,
        -1i32..2,
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
        prop::option::weighted(0.2, 0u64..20),
    )
        .prop_map(|(step, pieces, max_new, priority, salted, scored, abort_after)| Arrival {
            step,
            prompt: pieces.concat(),
            max_new,
            priority,
            salted,
            scored,
            abort_after,
        })
}

fn config() -> impl Strategy<Value = SchedulerConfig> {
    (
        1u32..6,
        1u32..40,
        1u32..8,
        any::<bool>(),
        1u32..20,
        1u32..40,
        0u32..100,
        any::<bool>(),
        prop::option::of(0u64..60),
        any::<bool>(),
        1u32..20,
    )
        .prop_map(
            |(
                block_size,
                step_tokens_max,
                running_max,
                prefix_cache,
                chunk_min,
                chunk_max,
                watermark,
                ageing,
                itl_slo,
                reserve_output,
                prompt_logits_max,
            )| {
                SchedulerConfig {
                    block_size,
                    blocks: 1, // set by the test
                    step_tokens_max,
                    running_max,
                    unfinished_max: 1000,
                    waiting_tokens_max: 1_000_000,
                    model_len_max: 1000,
                    prefix_cache,
                    kv_events: true,
                    chunk_tokens_min: chunk_min,
                    chunk_tokens_max: chunk_max,
                    prompt_logits_max,
                    itl_slo: itl_slo.map(Duration::from_millis),
                    watermark_permille: watermark,
                    reserve_output,
                    ageing: ageing.then_some(Duration::from_millis(100)),
                }
            },
        )
}

proptest! {
    /// KV for 1.2 times the longest sequence: constant preemption, no deadlock, everything finishes with the output
    /// that it has alone, and all blocks come back. `Sim` checks each plan and the invariants at every step.
    #[test]
    fn everything_finishes(
        arrivals in prop::collection::vec(arrival(), 1..14),
        config in config(),
        failed_steps in prop::collection::vec(0u64..100, 0..4),
        clear_at in prop::option::weighted(0.2, 0u64..30),
    ) {
        let longest = arrivals.iter().map(|a| a.prompt.len() as u32 + a.max_new - 1).max().unwrap();
        let blocks = (longest * 6).div_ceil(5).div_ceil(config.block_size);
        let mut sim = Sim::new(SchedulerConfig { blocks, ..config });
        let work: u64 = arrivals.iter().map(|a| a.prompt.len() as u64 + u64::from(a.max_new)).sum();
        // Each step of a sequence alone computes at least a token; the factor is what preemption may waste.
        let steps_max = 50 + 10 * work;

        let last = arrivals.iter().map(|a| a.step + a.abort_after.unwrap_or(0)).max().unwrap();
        while sim.steps <= last || !sim.alive.is_empty() {
            prop_assert!(sim.steps < steps_max, "starved: {:?}", sim.scheduler.stats());
            for (i, a) in arrivals.iter().enumerate() {
                let id = i as u64;
                if a.step == sim.steps {
                    let new = if a.salted {
                        salted(id, a.prompt.clone(), a.max_new, "s1")
                    } else {
                        seq(id, a.prompt.clone(), a.max_new)
                    };
                    let (priority, prompt_logits) = (a.priority, a.scored);
                    sim.try_add(forebay_schedule::NewSeq { priority, prompt_logits, ..new }).unwrap();
                }
                if a.abort_after.is_some_and(|after| a.step + after == sim.steps) {
                    sim.abort(SeqId(id));
                }
            }
            if clear_at == Some(sim.steps) {
                sim.scheduler.clear_cache();
            }
            let has_work = sim.scheduler.has_work();
            let failed = failed_steps.contains(&sim.steps);
            let plan = sim.plan();
            prop_assert_eq!(plan.is_empty(), !has_work);
            if failed {
                sim.scheduler.on_step_failed();
            } else {
                sim.execute(&plan);
            }
        }

        let stats = sim.scheduler.stats();
        prop_assert_eq!((stats.running, stats.waiting, stats.waiting_tokens), (0, 0, 0));
        prop_assert_eq!(stats.blocks_held, 0);
        for (i, a) in arrivals.iter().enumerate() {
            match sim.done.get(&SeqId(i as u64)) {
                Some((output, info)) => {
                    prop_assert_eq!(output, &expected_output(&a.prompt, a.max_new));
                    prop_assert!(info.cached_tokens < info.prompt_tokens);
                    prop_assert!((config.prefix_cache && !a.scored) || info.cached_tokens == 0);
                }
                None => prop_assert!(a.abort_after.is_some()),
            }
        }
    }

    /// Nobody arrives, everything fits: no preemption, and a step is wasted on nothing.
    #[test]
    fn without_pressure_nothing_is_preempted_or_computed_twice(
        prompts in prop::collection::vec((prop::collection::vec(0u32..3, 1..40), 1u32..10), 1..8),
    ) {
        let mut sim = Sim::new(SchedulerConfig {
            block_size: 4,
            blocks: 1000,
            step_tokens_max: 64,
            ..SchedulerConfig::default()
        });
        for (i, (prompt, max_new)) in prompts.iter().enumerate() {
            sim.try_add(seq(i as u64, prompt.clone(), *max_new)).unwrap();
        }
        let mut computed = 0;
        while !sim.alive.is_empty() {
            computed += sim.step().tokens() as u64;
        }
        let stats = sim.scheduler.stats();
        prop_assert_eq!(stats.preemptions, 0);
        let wanted: u64 = prompts.iter().map(|(p, n)| p.len() as u64 + u64::from(*n) - 1).sum();
        prop_assert_eq!(computed + stats.prefix_hit_tokens, wanted);
    }
}

/// An old, long sequence among a stream of newcomers gets through.
#[test]
fn a_stream_of_newcomers_starves_nobody() {
    for ageing in [None, Some(Duration::from_millis(200))] {
        let mut sim = Sim::new(SchedulerConfig {
            block_size: 4,
            blocks: 30,
            step_tokens_max: 32,
            running_max: 8,
            ageing,
            ..SchedulerConfig::default()
        });
        sim.try_add(seq(0, (0..60).collect::<Vec<u32>>(), 40)).unwrap();
        let mut id = 1;
        while !sim.done.contains_key(&SeqId(0)) {
            assert!(sim.steps < 600, "starved: {:?}", sim.scheduler.stats());
            let prompt: Vec<u32> = (0..10 + id as u32 % 7).map(|i| i * 31 + id as u32).collect();
            let _full = sim.try_add(seq(id, prompt, 8));
            id += 1;
            sim.step();
        }
    }
}

/// With ageing, a low priority gets through a stream that alone would take everything.
#[test]
fn ageing_lifts_a_low_priority() {
    let run = |ageing| {
        let mut sim = Sim::new(SchedulerConfig {
            block_size: 4,
            blocks: 16,
            step_tokens_max: 32,
            running_max: 2,
            ageing,
            ..SchedulerConfig::default()
        });
        let low = forebay_schedule::NewSeq { priority: -1, ..seq(0, [1, 2, 3, 4, 5], 3) };
        for id in 1..4 {
            sim.try_add(seq(id, vec![id as u32 + 10; 9], 6)).unwrap();
        }
        sim.try_add(low).unwrap();
        for id in 4..400 {
            if sim.done.contains_key(&SeqId(0)) {
                return Some(sim.steps);
            }
            let _full = sim.try_add(seq(id, vec![id as u32 + 10; 9], 6));
            sim.step();
        }
        None
    };
    assert_eq!(run(None), None, "strict priority waits for ever");
    let steps = run(Some(Duration::from_millis(500))).expect("25 steps of 20 ms outweigh one level");
    assert!(steps < 120, "{steps}");
}
