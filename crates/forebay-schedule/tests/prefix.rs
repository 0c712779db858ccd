//! Prefixes: what is found in the cache, and what is not computed twice though nobody has it yet. Blocks of 4 tokens.

mod sim;

use std::time::Duration;

use forebay_schedule::{NewSeq, SchedulerConfig, SeqId};
use sim::{Sim, expected_output, prompt, rows, salted, seq, small as config};

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
    // The stranger doesn't wait with them.
    assert_eq!(rows(&sim.step()), [(4, 3), (1, 12)]);
    assert_eq!(rows(&sim.step()), [(1, 13)]);
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

/// Several with one prefix, and what happens to the one that computes it for all.
#[test]
fn a_prefix_is_computed_once_whatever_becomes_of_its_maker() {
    let run = |meanwhile: fn(&mut Sim)| {
        let mut sim = Sim::new(config());
        for id in 1..=3 {
            sim.try_add(seq(id, [prompt(1, 40), vec![id as u32; 3]].concat(), 2)).unwrap();
        }
        let mut computed = sim.step().tokens();
        meanwhile(&mut sim);
        while !sim.alive.is_empty() {
            computed += sim.step().tokens();
        }
        computed
    };
    // 40 tokens of the prefix, and 3 of each prompt and 1 of each output's two; less where one left before its own.
    assert_eq!(run(|_| {}), 40 + 3 * 4);
    assert_eq!(run(|sim| sim.abort(SeqId(1))), 40 + 2 * 4);
    assert_eq!(run(|sim| sim.abort(SeqId(3))), 40 + 2 * 4, "it was waiting");
    let failed_step = |sim: &mut Sim| {
        assert_eq!(rows(&sim.plan()), [(1, 16)]);
        sim.fail();
    };
    assert_eq!(run(failed_step), 40 + 3 * 4, "a failed step computes nothing");
    let cleared = |sim: &mut Sim| {
        sim.step();
        sim.scheduler.clear_cache();
    };
    assert!(run(cleared) < 2 * 40 + 3 * 4, "what was computed so far is computed once more, by one of them");
}

#[test]
fn who_waits_for_a_prefix_goes_on_when_its_maker_is_preempted() {
    // 2 computes a prompt that 3 has, too; the decoding 1 is dearer to lose, and needs a block in the middle of it.
    let config = SchedulerConfig { blocks: 16, step_tokens_max: 7, reserve_output: false, ..config() };
    let mut sim = Sim::new(config);
    sim.try_add(seq(1, prompt(1, 24), 12)).unwrap();
    while sim.scheduler.info(SeqId(1)).is_some_and(|info| info.generated_tokens < 1) {
        sim.step();
    }
    sim.try_add(seq(2, prompt(2, 36), 2)).unwrap();
    sim.try_add(seq(3, prompt(2, 36), 2)).unwrap();
    sim.run(200);
    let stats = sim.scheduler.stats();
    assert!(sim.done[&SeqId(2)].1.preemptions > 0 && stats.prefix_waits > 0, "{stats:?}");
    for id in [2, 3] {
        assert_eq!(sim.done[&SeqId(id)].0, expected_output(&prompt(2, 36), 2));
    }
}

/// Ids in the order of their first rows.
fn started(sim: &mut Sim) -> Vec<u64> {
    let mut order = Vec::new();
    while !sim.alive.is_empty() {
        order.extend(sim.step().seqs.iter().map(|id| id.0));
    }
    order.dedup();
    order
}

#[test]
fn among_equals_the_longest_cached_prefix_goes_first() {
    const SECOND: Duration = Duration::from_secs(1);
    fn check(ageing: Option<Duration>, wait: Duration, priority_of_2: i32, expect: &[u64]) {
        let mut sim = Sim::new(SchedulerConfig { running_max: 1, step_tokens_max: 64, ageing, ..config() });
        sim.try_add(seq(0, prompt(9, 40), 1)).unwrap();
        sim.run(10);
        sim.try_add(seq(1, prompt(1, 9), 4)).unwrap(); // runs while the others come
        sim.step();
        sim.try_add(NewSeq { priority: priority_of_2, ..seq(2, prompt(2, 20), 1) }).unwrap();
        sim.try_add(seq(3, [prompt(9, 20), vec![1; 9]].concat(), 1)).unwrap();
        sim.try_add(seq(4, [prompt(9, 40), vec![1; 9]].concat(), 1)).unwrap();
        sim.try_add(salted(5, prompt(9, 40), 1, "its own")).unwrap();
        sim.now += wait;
        assert_eq!(started(&mut sim), [&[1], expect].concat());
    }
    check(Some(5 * SECOND), Duration::ZERO, 0, &[4, 3, 2, 5]);
    check(Some(5 * SECOND), 6 * SECOND, 0, &[2, 3, 4, 5]); // they have waited long enough
    check(Some(5 * SECOND), Duration::ZERO, 1, &[2, 4, 3, 5]); // the more important first
    check(None, Duration::ZERO, 0, &[2, 3, 4, 5]); // strict
}

/// A prompt that nobody has cached, among a stream of prompts that are.
#[test]
fn who_finds_nothing_in_the_cache_is_passed_by_for_its_ageing_and_no_longer() {
    let ageing = 50 * sim::STEP;
    let config = SchedulerConfig { running_max: 1, step_tokens_max: 64, ageing: Some(ageing), ..config() };
    let mut sim = Sim::new(config);
    sim.try_add(seq(1, prompt(1, 40), 1)).unwrap();
    sim.run(10);
    let mut id = 100;
    sim.try_add(seq(2, prompt(2, 40), 1)).unwrap();
    let (begun, mut passed) = (sim.steps, 0);
    while sim.alive.contains_key(&SeqId(2)) {
        while sim.scheduler.stats().waiting < 5 {
            sim.try_add(seq(id, [prompt(1, 40), vec![id as u32]].concat(), 1)).unwrap();
            id += 1;
        }
        passed += sim.step().rows();
        assert!(sim.steps - begun <= 52, "starved");
    }
    assert!(passed > 40, "they were first for long: {passed}");
}
