//! One behaviour per test, with numbers small enough to follow on paper: blocks of 4 tokens.

mod sim;

use std::time::Duration;

use forebay_schedule::{AddError, NewSeq, Scheduler, SchedulerConfig, SeqId, StepPlan, TokenOutcome};
use forebay_types::{Blame, Classify, Code, Retry};
use sim::{Sim, prompt, rows, salted, seq, small as config};

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
fn a_short_prompt_does_not_wait_for_the_end_of_a_long_one() {
    let mut sim = Sim::new(config());
    sim.try_add(seq(1, prompt(1, 100), 1)).unwrap();
    assert_eq!(rows(&sim.step()), [(1, 16)]);
    sim.try_add(seq(2, prompt(2, 20), 2)).unwrap();
    assert_eq!(rows(&sim.step()), [(2, 8), (1, 8)], "half each");
    assert_eq!(rows(&sim.step()), [(2, 8), (1, 8)]);
    assert_eq!(rows(&sim.step()), [(2, 4), (1, 12)], "what it doesn't need is the other's");
    assert_eq!(rows(&sim.step()), [(2, 1), (1, 12)]);
    sim.try_add(seq(3, prompt(3, 30), 1)).unwrap();
    assert_eq!(rows(&sim.step()), [(1, 16)], "28 are left: 30 are not few");
    sim.run(100);
}

#[test]
fn a_long_prompt_has_half_of_each_step_whatever_short_ones_come() {
    let config = SchedulerConfig { blocks: 500, model_len_max: 1000, step_tokens_max: 32, ..config() };
    let mut sim = Sim::new(config);
    sim.try_add(seq(0, prompt(0, 800), 1)).unwrap();
    let (mut id, mut others) = (1, 0);
    while sim.alive.contains_key(&SeqId(0)) {
        let plan = sim.step();
        others += rows(&plan).iter().filter(|(id, _)| *id != 0).map(|(_, tokens)| tokens).sum::<usize>();
        // Half of 32 but for those who want one token; of that, what ends with a full block.
        assert!(sim.steps <= 800 / 12, "starved");
        while sim.scheduler.stats().waiting < 3 {
            sim.try_add(seq(id, prompt(id as u32, 9), 1)).unwrap();
            id += 1;
        }
    }
    assert!(others > 200, "the short ones had part of it: {others}");
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
    let full = SchedulerConfig { unfinished_max: 2, ..config() };
    let drain_in = Duration::from_secs(1); // nothing is known yet
    let busy = Retry::After(drain_in);
    check(full, 2, seq(9, [1], 1), AddError::QueueFull { limit: 2, drain_in }, Code::Overloaded, busy);
    let full = SchedulerConfig { waiting_tokens_max: 25, ..config() };
    let expect = AddError::QueueTokensFull { waiting: 20, limit: 25, drain_in };
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

/// A prompt of 50 tokens and its 10 of output take 60 ms, and 100 such wait.
#[test]
fn who_is_refused_is_told_when_half_of_the_queue_will_be_gone() {
    let mut sim = Sim::new(SchedulerConfig { running_max: 1, ..config() });
    sim.try_add(seq(0, prompt(0, 50), 10)).unwrap();
    sim.run(100);
    for id in 1..=100 {
        sim.try_add(seq(id, prompt(id as u32, 50), 10)).unwrap();
    }
    match sim.try_add(seq(101, prompt(101, 50), 10)) {
        Err(AddError::QueueFull { limit: 100, drain_in }) => {
            let seconds = drain_in.as_secs_f64();
            assert!((2.0..4.0).contains(&seconds), "{seconds}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn debug_hides_prompt_and_salt() {
    let text = format!("{:?}", salted(1, [4711, 4712], 5, "salty"));
    assert!(text.contains("prompt_tokens: 2") && !text.contains("4711") && !text.contains("salty"), "{text}");
}
