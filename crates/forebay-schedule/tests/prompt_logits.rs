//! Sequences that want the logits of their prompt: every position once, and never more of them in a step than may be.
//! Blocks of 4 tokens.

mod sim;

use forebay_schedule::{NewSeq, SchedulerConfig, SeqId, StepPlan};
use sim::{Sim, seq};

fn config(prompt_logits_max: u32) -> SchedulerConfig {
    SchedulerConfig {
        block_size: 4,
        blocks: 100,
        step_tokens_max: 32,
        running_max: 8,
        chunk_tokens_min: 1,
        watermark_permille: 0,
        prompt_logits_max,
        ..SchedulerConfig::default()
    }
}

fn prompt(name: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|i| name * 1000 + i).collect()
}

fn scored(id: u64, prompt: Vec<u32>, max_new: u32) -> NewSeq {
    NewSeq { prompt_logits: true, ..seq(id, prompt, max_new) }
}

/// For each row: its sequence, its tokens, and the positions whose logits are wanted.
fn rows(plan: &StepPlan) -> Vec<(u64, usize, Vec<u32>)> {
    let wanted = |r: usize| {
        let tokens = plan.logit_tokens.iter().filter(|t| plan.row(r).contains(&(**t as usize)));
        tokens.map(|&t| plan.positions[t as usize]).collect()
    };
    (0..plan.rows()).map(|r| (plan.seqs[r].0, plan.row(r).len(), wanted(r))).collect()
}

#[test]
fn a_prompt_is_prefilled_in_chunks_of_as_many_logits_as_may_be() {
    let mut sim = Sim::new(config(8));
    sim.try_add(scored(1, prompt(1, 18), 2)).unwrap();
    assert_eq!(rows(&sim.step()), [(1, 8, (0..8).collect())]);
    assert_eq!(rows(&sim.step()), [(1, 8, (8..16).collect())]);
    assert_eq!(rows(&sim.step()), [(1, 2, vec![16, 17])], "the last is the one that is sampled");
    assert_eq!(rows(&sim.step()), [(1, 1, vec![18])]);
    assert!(sim.alive.is_empty());
}

#[test]
fn one_token_has_no_logits_before_its_last() {
    let mut sim = Sim::new(config(8));
    sim.try_add(scored(1, prompt(1, 1), 1)).unwrap();
    assert_eq!(rows(&sim.step()), [(1, 1, vec![0])]);
}

#[test]
fn the_cache_is_written_but_not_read() {
    let mut sim = Sim::new(config(100));
    let run = |sim: &mut Sim, new: NewSeq| {
        let id = new.id;
        sim.try_add(new).unwrap();
        sim.run(1000);
        sim.done[&id].1.cached_tokens
    };
    assert_eq!(run(&mut sim, seq(0, prompt(1, 17), 1)), 0);
    assert_eq!(run(&mut sim, scored(1, prompt(1, 17), 1)), 0, "logits are not cached");
    assert_eq!(run(&mut sim, scored(2, prompt(2, 17), 1)), 0);
    assert_eq!(run(&mut sim, seq(3, prompt(2, 17), 1)), 16, "what a scored prompt computed serves others");
}

#[test]
fn who_finds_no_logits_left_lets_others_pass() {
    let mut sim = Sim::new(config(8));
    sim.try_add(scored(1, prompt(1, 16), 1)).unwrap();
    sim.try_add(scored(2, prompt(2, 5), 1)).unwrap();
    sim.try_add(seq(3, prompt(3, 6), 1)).unwrap();
    assert_eq!(rows(&sim.step()), [(1, 8, (0..8).collect()), (3, 6, vec![5])]);
    assert_eq!(rows(&sim.step()), [(1, 8, (8..16).collect()), (2, 1, vec![0])]);
    assert_eq!(rows(&sim.step()), [(2, 4, (1..5).collect())]);
}

#[test]
fn after_a_preemption_only_the_missing_logits_are_wanted() {
    // Five blocks, all taken at once: the first, which matters more, starts its third while the other is half scored.
    let mut sim =
        Sim::new(SchedulerConfig { blocks: 5, reserve_output: false, chunk_tokens_max: 2, ..config(8) });
    sim.try_add(NewSeq { priority: 1, ..seq(1, prompt(1, 7), 9) }).unwrap();
    sim.try_add(scored(2, prompt(2, 12), 1)).unwrap();
    let mut wanted = Vec::new();
    while !sim.alive.is_empty() {
        assert!(sim.steps < 100);
        wanted.extend(rows(&sim.step()).into_iter().filter(|row| row.0 == 2).flat_map(|row| row.2));
    }
    assert!(sim.done[&SeqId(2)].1.preemptions > 0, "the test is about a preemption");
    assert_eq!(wanted, (0..12).collect::<Vec<_>>(), "each once");
}
