//! Who has to go when blocks run out. Blocks of 4 tokens.

mod sim;

use std::time::Duration;

use forebay_schedule::{NewSeq, SchedulerConfig, SeqId};
use sim::{Sim, expected_output, prompt, rows, seq, small as config};

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
fn one_that_brings_all_that_is_missing_goes_before_two_that_are_each_cheaper() {
    // When 1 and 2 have filled their blocks, two are missing. 3 is the cheapest, but brings one; 1 brings its block and
    // doesn't want another.
    let (mut sim, victims) =
        pressed(4, &[seq(1, prompt(1, 4), 8), seq(2, prompt(2, 8), 8), seq(3, prompt(3, 3), 8)]);
    assert_eq!(victims, [1]);
    sim.run(200);
}
