//! One behaviour per test, with numbers small enough to follow on paper: blocks of 4 tokens.

mod sim;

use std::time::Duration;

use forebay_schedule::{AddError, NewSeq, Scheduler, SchedulerConfig, SeqId, StepPlan, TokenOutcome};
use forebay_types::{Blame, Classify, Code, Retry};
use sim::{Sim, expected_output, salted, seq};

fn config() -> SchedulerConfig {
    SchedulerConfig {
        block_size: 4,
        blocks: 100,
        step_tokens_max: 16,
        running_max: 8,
        waiting_max: 100,
        model_len_max: 200,
        chunk_tokens_min: 1,
        watermark_permille: 0,
        ageing: None,
        ..SchedulerConfig::default()
    }
}

/// A prompt that shares no block with another `name`'s.
fn prompt(name: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| name * 1000 + i).collect()
}

fn rows(plan: &StepPlan) -> Vec<(u64, usize)> {
    (0..plan.rows()).map(|r| (plan.seqs[r].0, plan.row(r).len())).collect()
}

#[test]
fn decodes_come_first_and_prefill_fills_the_step() {
    let mut scheduler = Scheduler::new(config());
    scheduler.try_add(Duration::ZERO, seq(1, [10, 11, 12, 13, 14], 9)).unwrap();
    assert_eq!(
        *scheduler.plan_step(Duration::ZERO),
        StepPlan {
            seqs: vec![SeqId(1)],
            token_ids: vec![10, 11, 12, 13, 14],
            positions: vec![0, 1, 2, 3, 4],
            row_starts: vec![0, 5],
            block_tables: vec![0, 1],
            table_starts: vec![0, 2],
            logit_tokens: vec![4],
        }
    );
    assert_eq!(scheduler.on_token(SeqId(1), 15), TokenOutcome::Continue);
    scheduler.try_add(Duration::ZERO, seq(2, prompt(2, 30), 1)).unwrap();
    // 15 tokens are left for the newcomer; 12 of them fill three blocks.
    let plan = scheduler.plan_step(Duration::ZERO);
    assert_eq!(rows(plan), [(1, 1), (2, 12)]);
    assert_eq!((plan.token_ids[0], plan.positions[0]), (15, 5));
    assert_eq!(plan.block_table(1), [2, 3, 4]);
    assert_eq!(plan.logit_tokens, [0], "a chunk in the middle of a prompt has no logits");
    scheduler.on_token(SeqId(1), 16);
    assert_eq!(rows(scheduler.plan_step(Duration::ZERO)), [(1, 1), (2, 12)]);
    scheduler.on_token(SeqId(1), 17);
    let plan = scheduler.plan_step(Duration::ZERO);
    assert_eq!(rows(plan), [(1, 1), (2, 6)]);
    assert_eq!(plan.logit_tokens, [0, 6]);
    assert_eq!(scheduler.on_token(SeqId(2), 1), TokenOutcome::LengthReached);
    assert_eq!(scheduler.on_token(SeqId(2), 1), TokenOutcome::Ignored);
    assert_eq!(scheduler.on_token(SeqId(3), 1), TokenOutcome::Ignored);
    assert_eq!(scheduler.finish(SeqId(2)).unwrap().generated_tokens, 1);
    assert_eq!(scheduler.finish(SeqId(2)), None);
}

#[test]
fn a_long_prompt_may_be_passed_by_short_ones() {
    let mut sim = Sim::new(SchedulerConfig { chunk_tokens_max: 8, ..config() });
    sim.try_add(seq(1, prompt(1, 40), 1)).unwrap();
    sim.try_add(seq(2, prompt(2, 5), 2)).unwrap();
    assert_eq!(rows(&sim.step()), [(1, 8), (2, 5)]);
    assert_eq!(rows(&sim.step()), [(2, 1), (1, 8)]);
}

#[test]
fn a_newcomer_waits_for_a_worthwhile_chunk() {
    let mut sim = Sim::new(SchedulerConfig { chunk_tokens_min: 8, ..config() });
    sim.try_add(seq(1, prompt(1, 10), 3)).unwrap();
    sim.try_add(seq(2, prompt(2, 20), 3)).unwrap();
    assert_eq!(rows(&sim.step()), [(1, 10)], "6 tokens are left");
    assert_eq!(rows(&sim.step()), [(1, 1), (2, 12)]);
}

#[test]
fn a_cached_prefix_is_taken_but_for_the_last_token() {
    fn check(prompt_tokens: u32, expect_cached: u32) {
        let mut sim = Sim::new(SchedulerConfig { step_tokens_max: 64, ..config() });
        for id in 0..2 {
            sim.try_add(seq(id, prompt(1, prompt_tokens), 1)).unwrap();
            sim.run(100);
        }
        assert_eq!(sim.done[&SeqId(0)].1.cached_tokens, 0);
        assert_eq!(sim.done[&SeqId(1)].1.cached_tokens, expect_cached, "prompt of {prompt_tokens}");
        let stats = sim.scheduler.stats();
        assert_eq!(stats.prefix_query_tokens, u64::from(2 * prompt_tokens));
        assert_eq!(stats.prefix_hit_tokens, u64::from(expect_cached));
    }
    check(1, 0);
    check(4, 0);
    check(5, 4);
    check(8, 4);
    check(9, 8);
    check(41, 40);
}

#[test]
fn generated_tokens_are_cached_too() {
    let mut sim = Sim::new(config());
    sim.try_add(seq(1, prompt(1, 6), 7)).unwrap();
    sim.run(100);
    // The next turn of the conversation: all but the last token of the answer was computed, 12 of 13 tokens.
    let turn = [prompt(1, 6), expected_output(&prompt(1, 6), 7), vec![1, 2, 3]].concat();
    sim.try_add(seq(2, turn, 1)).unwrap();
    sim.run(100);
    assert_eq!(sim.done[&SeqId(2)].1.cached_tokens, 12);
}

#[test]
fn salts_keep_caches_apart() {
    let mut sim = Sim::new(SchedulerConfig { step_tokens_max: 64, ..config() });
    let mut cached = |new: NewSeq| {
        let id = new.id;
        sim.try_add(new).unwrap();
        sim.run(100);
        sim.done[&id].1.cached_tokens
    };
    assert_eq!(cached(seq(1, prompt(1, 20), 1)), 0);
    assert_eq!(cached(salted(2, prompt(1, 20), 1, "a")), 0);
    assert_eq!(cached(salted(3, prompt(1, 20), 1, "b")), 0);
    assert_eq!(cached(salted(4, prompt(1, 20), 1, "a")), 16);
    assert_eq!(cached(seq(5, prompt(1, 20), 1)), 16);
}

#[test]
fn a_newcomer_waits_for_the_prefix_that_is_being_computed() {
    let mut sim = Sim::new(config());
    for id in 1..=3 {
        sim.try_add(seq(id, prompt(1, 41), 2)).unwrap();
    }
    sim.try_add(seq(4, prompt(4, 3), 1)).unwrap();
    assert_eq!(rows(&sim.step()), [(1, 16)]);
    assert_eq!(rows(&sim.step()), [(1, 16)]);
    // The stranger doesn't wait with them.
    assert_eq!(rows(&sim.step()), [(1, 9), (4, 3)]);
    assert_eq!(rows(&sim.step()), [(1, 1), (2, 1), (3, 1)]);
    sim.run(100);
    assert_eq!(sim.done[&SeqId(3)].1.cached_tokens, 40);
    assert_eq!(sim.scheduler.stats().prefix_waits, 2 * 3);
}

#[test]
fn who_waits_for_a_prefix_goes_on_when_its_maker_leaves() {
    let mut sim = Sim::new(config());
    sim.try_add(seq(1, prompt(1, 41), 2)).unwrap();
    sim.try_add(seq(2, prompt(1, 41), 2)).unwrap();
    sim.step();
    sim.step();
    sim.abort(SeqId(1));
    assert_eq!(rows(&sim.step()), [(2, 9)], "with what the other had computed");
}

#[test]
fn what_an_aborted_waiter_had_seen_is_not_taken_over() {
    let mut sim = Sim::new(config());
    sim.try_add(seq(1, prompt(1, 81), 2)).unwrap();
    sim.try_add(seq(2, prompt(1, 81), 2)).unwrap();
    for _ in 0..3 {
        sim.step();
    }
    sim.abort(SeqId(2)); // it has seen 8 cached blocks
    sim.try_add(seq(3, [prompt(1, 81), vec![1]].concat(), 2)).unwrap();
    sim.abort(SeqId(1));
    sim.try_add(seq(4, prompt(4, 9), 2)).unwrap();
    sim.abort(SeqId(3));
    sim.try_add(seq(5, prompt(4, 9), 2)).unwrap();
    assert_eq!(rows(&sim.step()), [(4, 9)], "5 waits for what 4 computes");
    assert_eq!(rows(&sim.step()), [(4, 1), (5, 1)]);
}

#[test]
fn an_aborted_sequence_is_out_of_the_next_step_and_its_blocks_are_free() {
    let mut sim = Sim::new(config());
    sim.try_add(seq(1, prompt(1, 12), 50)).unwrap();
    sim.try_add(seq(2, prompt(2, 4), 50)).unwrap();
    sim.try_add(seq(3, prompt(3, 30), 50)).unwrap();
    sim.step();
    assert_eq!(sim.scheduler.stats().blocks_held, 4);
    sim.abort(SeqId(1));
    assert_eq!(sim.scheduler.stats().blocks_held, 1);
    sim.abort(SeqId(3)); // waits
    assert_eq!(rows(&sim.step()), [(2, 1)]);
    assert_eq!(sim.scheduler.stats().waiting_tokens, 0);
    assert_eq!(sim.scheduler.abort(SeqId(1)), None);
}

#[test]
fn higher_priority_then_earlier_arrival() {
    let mut sim = Sim::new(SchedulerConfig { running_max: 1, ..config() });
    let ask = |id, priority| NewSeq { priority, ..seq(id, prompt(id as u32, 4), 1) };
    let ahead: Vec<u32> = [(1, 0), (2, -5), (3, 0), (4, 7), (5, 7)]
        .map(|(id, priority)| sim.try_add(ask(id, priority)).unwrap().ahead)
        .into();
    assert_eq!(ahead, [0, 1, 1, 0, 1]);
    let order: Vec<u64> = std::iter::from_fn(|| sim.step().seqs.first().map(|id| id.0)).collect();
    assert_eq!(order, [4, 5, 1, 3, 2]);
}

#[test]
fn the_first_that_does_not_fit_is_not_passed() {
    let mut sim = Sim::new(SchedulerConfig { blocks: 10, step_tokens_max: 64, ..config() });
    sim.try_add(seq(1, prompt(1, 20), 4)).unwrap();
    sim.try_add(seq(2, prompt(2, 36), 1)).unwrap(); // 9 blocks, 5 are free
    sim.try_add(seq(3, prompt(3, 4), 1)).unwrap();
    assert_eq!(rows(&sim.step()), [(1, 20)]);
    assert_eq!(rows(&sim.step()), [(1, 1)]);
    sim.run(100);
}

#[test]
fn the_watermark_is_left_to_those_who_run() {
    let admitted = |watermark_permille| {
        let config = SchedulerConfig { blocks: 10, watermark_permille, step_tokens_max: 64, ..config() };
        let mut sim = Sim::new(config);
        sim.try_add(seq(1, prompt(1, 20), 4)).unwrap();
        sim.try_add(seq(2, prompt(2, 16), 4)).unwrap();
        let admitted = sim.step().rows();
        sim.run(100);
        admitted
    };
    assert_eq!(admitted(100), 2, "5 + 4 + 1 blocks");
    assert_eq!(admitted(101), 1, "2 of 10 blocks stay free");
}

#[test]
fn admission_leaves_room_for_the_output_to_be_expected() {
    let run = |reserve_output, learn: u32, max_new| {
        let config = SchedulerConfig { blocks: 10, reserve_output, step_tokens_max: 64, ..config() };
        let mut sim = Sim::new(config);
        sim.try_add(seq(1, prompt(1, 4), learn)).unwrap();
        sim.run(100);
        sim.try_add(seq(2, prompt(2, 16), max_new)).unwrap();
        sim.try_add(seq(3, prompt(3, 16), max_new)).unwrap();
        let admitted = sim.step().rows();
        sim.run(200);
        (admitted, sim.scheduler.stats().preemptions > 0)
    };
    assert_eq!(run(false, 17, 17), (2, true), "4 + 4 of 10 blocks, and 4 + 4 more later");
    assert_eq!(run(true, 17, 17), (1, false));
    assert_eq!(run(true, 17, 5), (2, false), "no more than what it may have: 5 + 5");
    assert_eq!(run(true, 5, 17), (2, true), "what ended before was short");
}

#[test]
fn an_idle_engine_admits_whatever_fits() {
    let mut sim = Sim::new(SchedulerConfig { blocks: 10, step_tokens_max: 64, ..config() });
    sim.try_add(seq(1, prompt(1, 4), 30)).unwrap();
    sim.run(100);
    sim.try_add(seq(2, prompt(2, 36), 5)).unwrap();
    assert_eq!(rows(&sim.step()), [(2, 36)]);
    sim.run(100);
}

#[test]
fn an_aborted_output_tells_nothing_about_length() {
    let mut sim = Sim::new(SchedulerConfig { blocks: 10, step_tokens_max: 64, ..config() });
    sim.try_add(seq(1, prompt(1, 4), 30)).unwrap();
    for _ in 0..20 {
        sim.step();
    }
    sim.abort(SeqId(1));
    sim.try_add(seq(2, prompt(2, 16), 17)).unwrap();
    sim.try_add(seq(3, prompt(3, 16), 17)).unwrap();
    assert_eq!(sim.step().rows(), 2);
    sim.run(200);
}

/// Sequences that decode until they need one block more than there is; and who then had to go.
fn pressed(blocks: u32, seqs: &[NewSeq]) -> (Sim, Vec<u64>) {
    let mut sim = Sim::new(SchedulerConfig { blocks, step_tokens_max: 64, ..config() });
    for new in seqs {
        sim.try_add(new.clone()).expect("it fits alone");
    }
    while sim.scheduler.stats().preemptions == 0 {
        sim.step();
    }
    let victims =
        sim.alive.keys().filter(|id| sim.scheduler.info(**id).is_some_and(|info| info.preemptions > 0));
    let victims = victims.map(|id| id.0).collect();
    (sim, victims)
}

#[test]
fn the_victim_is_the_least_important_then_the_cheapest() {
    let ask = |id: u64, tokens, priority| NewSeq { priority, ..seq(id, prompt(id as u32, tokens), 12) };
    fn check(seqs: &[NewSeq], expect: u64) {
        let (mut sim, victims) = pressed(8, seqs);
        assert_eq!(victims, [expect], "{seqs:?}");
        sim.run(200);
        for new in seqs {
            assert_eq!(sim.done[&new.id].0, expected_output(&new.prompt, 12));
        }
    }
    check(&[ask(1, 8, 0), ask(2, 16, 0)], 1); // the cheaper, although it came first
    check(&[ask(1, 16, 0), ask(2, 8, 0)], 2);
    check(&[ask(1, 12, 0), ask(2, 12, 0)], 2); // as dear: the younger
    check(&[ask(1, 8, 1), ask(2, 16, 0)], 2); // priority before cost
    check(&[ask(1, 7, 3), ask(2, 8, 2), ask(3, 6, 2)], 3);
}

#[test]
fn who_is_near_its_end_is_spared() {
    let victims = |max_new| {
        let mut sim = Sim::new(SchedulerConfig { blocks: 8, step_tokens_max: 64, ..config() });
        sim.try_add(seq(1, prompt(1, 4), max_new)).unwrap(); // the cheaper
        sim.try_add(seq(2, prompt(2, 8), 23)).unwrap();
        while sim.scheduler.stats().preemptions == 0 {
            sim.step();
        }
        let preempted = |id| sim.scheduler.info(SeqId(id)).is_some_and(|info| info.preemptions > 0);
        let victims = (preempted(1), preempted(2));
        sim.run(200);
        victims
    };
    assert_eq!(victims(20), (true, false));
    assert_eq!(victims(10), (false, true), "it has 9 of 10 tokens");
}

#[test]
fn what_others_hold_too_is_not_lost_by_preemption() {
    // 1 and 2 share three blocks; each alone would recompute 16 tokens or more, but only 4 of them are its own.
    let shared = [prompt(1, 12), vec![5, 6, 7, 8]].concat();
    let seqs = [seq(1, prompt(1, 16), 12), seq(2, shared, 12), seq(3, prompt(3, 10), 12)];
    let (mut sim, victims) = pressed(9, &seqs);
    assert_eq!(victims, [2]);
    sim.run(200);
}

#[test]
fn nobody_is_admitted_in_a_step_that_preempts() {
    let mut sim = Sim::new(SchedulerConfig { blocks: 8, running_max: 2, step_tokens_max: 64, ..config() });
    sim.try_add(seq(1, prompt(1, 16), 12)).unwrap();
    sim.try_add(seq(2, prompt(2, 14), 12)).unwrap();
    sim.step();
    // It would come first and fit into what the victim leaves; the next step takes it.
    sim.try_add(NewSeq { priority: 1, ..seq(3, prompt(3, 3), 2) }).unwrap();
    let mut plan = sim.step();
    while sim.scheduler.stats().preemptions == 0 {
        plan = sim.step();
    }
    assert_eq!(rows(&plan), [(1, 1)]);
    assert_eq!(rows(&sim.step()), [(1, 1), (3, 3)]);
    sim.run(200);
}

#[test]
fn a_low_priority_is_preempted_twice_and_then_spared() {
    let config = SchedulerConfig {
        blocks: 8,
        step_tokens_max: 64,
        reserve_output: false,                  // admit what will have to be preempted
        ageing: Some(Duration::from_millis(1)), // it comes back to the front of the queue each time
        ..config()
    };
    let mut sim = Sim::new(config);
    sim.try_add(NewSeq { priority: -1, ..seq(0, prompt(99, 4), 20) }).unwrap();
    for id in 1..60 {
        // Short enough to be admitted beside it, long enough to need more blocks later.
        let _full = sim.try_add(seq(id, prompt(id as u32, 11), 9));
        sim.step();
        sim.step();
    }
    sim.run(2000);
    assert_eq!(sim.done[&SeqId(0)].1.preemptions, 2);
}

#[test]
fn a_preempted_sequence_finds_its_blocks_again() {
    let ask = |id: u64, tokens, max_new| seq(id, prompt(id as u32, tokens), max_new);
    let (mut sim, victims) = pressed(8, &[ask(1, 11, 7), ask(2, 13, 9)]);
    assert_eq!(victims, [1]);
    sim.run(100);
    let stats = sim.scheduler.stats();
    assert_eq!(stats.preemptions, 1);
    assert!(stats.recomputed_tokens < 8, "its first blocks were still cached: {stats:?}");
    assert_eq!(sim.done[&SeqId(1)].1.cached_tokens, 0, "that is no gain for the client");
}

#[test]
fn equal_choices_share_blocks_as_they_go() {
    let mut sim = Sim::new(SchedulerConfig { step_tokens_max: 64, ..config() });
    sim.try_add(seq(1, prompt(1, 9), 20)).unwrap();
    sim.step();
    sim.try_add(seq(2, prompt(1, 9), 20)).unwrap();
    for _ in 0..10 {
        sim.step();
    }
    // Apart they would hold 5 blocks each. One token apart, they hold the same but for the last.
    assert!(sim.scheduler.stats().blocks_held <= 6, "{:?}", sim.scheduler.stats());
    sim.run(100);
}

#[test]
fn a_failed_step_is_planned_again() {
    let mut sim = Sim::new(config());
    sim.try_add(seq(1, prompt(1, 12), 5)).unwrap();
    sim.step();
    sim.try_add(seq(2, prompt(2, 20), 5)).unwrap();
    let failed = sim.plan();
    assert_eq!(rows(&failed), [(1, 1), (2, 12)]);
    sim.scheduler.on_step_failed();
    assert_eq!(sim.scheduler.stats().blocks_cached, 3, "nothing of the failed step is cached");
    assert_eq!(sim.step(), failed);
    sim.run(100);
}

#[test]
fn a_cleared_cache_hits_nothing() {
    let mut sim = Sim::new(SchedulerConfig { step_tokens_max: 64, ..config() });
    sim.try_add(seq(1, prompt(1, 20), 9)).unwrap();
    sim.step();
    sim.step();
    sim.scheduler.clear_cache();
    sim.run(100);
    sim.try_add(seq(2, prompt(1, 20), 1)).unwrap();
    sim.run(100);
    assert_eq!(sim.done[&SeqId(2)].1.cached_tokens, 0);
}

#[test]
fn the_same_calls_give_the_same_plans() {
    let plans = || {
        let mut sim = Sim::new(SchedulerConfig { blocks: 12, ..config() });
        for id in 0..6 {
            sim.try_add(seq(id, prompt(id as u32 % 4, 5 + 3 * id as u32), 9)).unwrap();
        }
        std::iter::from_fn(|| Some(sim.step()).filter(|plan| !plan.is_empty())).collect::<Vec<_>>()
    };
    assert_eq!(plans(), plans());
}

#[test]
fn refusals_name_the_limit() {
    fn check(config: SchedulerConfig, queued: u32, new: NewSeq, expect: AddError, code: Code, retry: Retry) {
        let mut scheduler = Scheduler::new(config);
        for id in 0..queued {
            scheduler.try_add(Duration::ZERO, seq(u64::from(id), prompt(id, 10), 1)).unwrap();
        }
        let before = scheduler.stats();
        let error = scheduler.try_add(Duration::ZERO, new).unwrap_err();
        assert_eq!(error, expect);
        assert_eq!((error.class().code, error.class().retry), (code, retry), "{error}");
        assert_eq!(error.class().blame == Blame::Client, retry == Retry::Never && code != Code::Internal);
        assert_eq!(scheduler.stats(), before);
        assert_eq!(scheduler.check_invariants(), Ok(()));
    }
    let full = SchedulerConfig { waiting_max: 2, ..config() };
    let busy = Retry::Elsewhere;
    check(full, 2, seq(9, [1], 1), AddError::QueueFull { limit: 2 }, Code::Overloaded, busy);
    let full = SchedulerConfig { waiting_tokens_max: 25, ..config() };
    let expect = AddError::QueueTokensFull { waiting: 20, limit: 25 };
    check(full.clone(), 2, seq(9, [1; 6], 1), expect, Code::Overloaded, busy);

    let (long, never) = (Code::ContextLengthExceeded, Retry::Never);
    let expect = AddError::PromptTooLong { prompt_tokens: 200, limit: 200 };
    check(config(), 0, seq(9, [1; 200], 1), expect, long, never);
    let small = SchedulerConfig { blocks: 5, ..config() };
    let expect = AddError::NeverFits { tokens: 22, limit: 20 };
    check(small.clone(), 0, seq(9, [1; 12], 10), expect, long, never);
    check(config(), 0, seq(9, [], 1), AddError::EmptyPrompt, Code::BadRequest, never);
    let expect = AddError::DuplicateId { id: SeqId(1) };
    check(config(), 2, seq(1, [1], 1), expect, Code::Internal, never);

    // Just inside the limits; output is cut to the model's length.
    let mut scheduler = Scheduler::new(full);
    scheduler.try_add(Duration::ZERO, seq(1, [1; 100], 1)).expect("an empty queue takes any prompt");
    let mut sim = Sim::new(small);
    assert_eq!(sim.scheduler.seq_tokens_max(), 21);
    sim.try_add(seq(1, [1; 12], 9)).unwrap();
    sim.run(100);
    let mut sim = Sim::new(config());
    assert_eq!(sim.scheduler.seq_tokens_max(), 200);
    sim.try_add(seq(1, [1; 190], u32::MAX)).unwrap();
    sim.run(100);
    assert_eq!(sim.done[&SeqId(1)].1.generated_tokens, 10);
}

#[test]
fn debug_hides_prompt_and_salt() {
    let text = format!("{:?}", salted(1, [4711, 4712], 5, "salty"));
    assert!(text.contains("prompt_tokens: 2") && !text.contains("4711") && !text.contains("salty"), "{text}");
}

/// A machine on which a step takes 2 ms, 0.25 ms more per token, and more the longer the context is: a prompt of 8,000
/// tokens takes four times as long per token at its end as at its beginning.
fn takes(plan: &StepPlan) -> Duration {
    let context: f64 = plan.positions.iter().map(|&position| f64::from(position)).sum();
    Duration::from_secs_f64(0.002 + 0.00025 * plan.tokens() as f64 + 0.000_000_1 * context)
}

/// What steps took while four sequences decoded, alone and beside a long prefill.
fn decode_beside_prefill(itl_slo: Option<Duration>) -> (Vec<f64>, Vec<f64>) {
    let config = SchedulerConfig {
        block_size: 16,
        blocks: 2000,
        step_tokens_max: 2048,
        chunk_tokens_min: 64,
        model_len_max: 16_000,
        itl_slo,
        ..SchedulerConfig::default()
    };
    let mut scheduler = Scheduler::new(config);
    for name in 1..=4 {
        scheduler.try_add(Duration::ZERO, seq(name, prompt(name as u32, 20), 4000)).expect("is admitted");
    }
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    let mut now = Duration::ZERO;
    for step in 0..4000 {
        if step == 20 {
            scheduler.try_add(now, seq(9, prompt(9, 8000), 1)).expect("is admitted");
        }
        let plan = scheduler.plan_step(now).clone();
        let elapsed = takes(&plan);
        now += elapsed;
        scheduler.on_step_done(elapsed);
        let prefills = (0..plan.rows()).any(|row| plan.row(row).len() > 1);
        if step > 0 {
            if prefills { &mut beside } else { &mut alone }.push(elapsed.as_secs_f64());
        }
        for row in 0..plan.rows() {
            let last = plan.row(row).end as u32 - 1;
            if plan.logit_tokens.contains(&last) {
                scheduler.on_token(plan.seqs[row], 1);
            }
            if plan.seqs[row] == SeqId(9) && plan.logit_tokens.contains(&last) {
                return (alone, beside);
            }
        }
    }
    panic!("the prompt was never done: {:?}", scheduler.stats());
}

#[test]
fn prefill_beside_decodes_keeps_to_the_time_for_a_step() {
    let quantile = |steps: &[f64], q: f64| {
        let mut sorted = steps.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[((sorted.len() - 1) as f64 * q) as usize]
    };
    let slo = Duration::from_millis(80);
    let (_, beside) = decode_beside_prefill(Some(slo));
    let (p50, p99) = (quantile(&beside, 0.5), quantile(&beside, 0.99));
    assert!(p99 <= 2.0 * p50, "p50 {p50:.3}, p99 {p99:.3}");
    assert!(beside.iter().all(|&step| step <= 1.5 * slo.as_secs_f64()), "{beside:?}");
    // And the time is used.
    assert!(p50 > 0.5 * slo.as_secs_f64(), "p50 {p50:.3}");
    // Without a bound, everybody waits for what fits into a step by tokens alone.
    let (_, unbound) = decode_beside_prefill(None);
    assert!(unbound.iter().any(|&step| step > 5.0 * slo.as_secs_f64()), "{unbound:?}");
}

#[test]
fn prefill_goes_on_under_a_bound_that_can_not_be_kept() {
    let (_, beside) = decode_beside_prefill(Some(Duration::from_micros(1)));
    assert_eq!(beside.len(), 8000 / 64, "the smallest chunks there are");
}
