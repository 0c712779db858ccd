//! Any order of arrivals, cancellations, ends, failed steps and cleared caches: `Sim` checks each plan, the catalogue of
//! invariants, and that the cache as its events tell it is the cache, after every one of them.

mod sim;

use std::time::Duration;

use forebay_schedule::{NewSeq, SchedulerConfig, SeqId};
use proptest::prelude::*;
use sim::{Sim, expected_output, seq};

#[derive(Debug, Clone)]
enum Op {
    Add {
        prompt: Vec<u32>,
        max_new: u32,
        priority: i32,
        tenant: u8,
    },
    /// Of those alive, by number.
    Abort(usize),
    Finish(usize),
    Step,
    FailedStep,
    /// Its client leaves while it is computed.
    StepAndAbort(usize),
    Clear,
}

fn op() -> impl Strategy<Value = Op> {
    let piece = (0u32..3, 1usize..9).prop_map(|(token, count)| vec![token; count]);
    let add = (prop::collection::vec(piece, 1..5), 1u32..20, -1i32..2, 0u8..3).prop_map(
        |(pieces, max_new, priority, tenant)| Op::Add { prompt: pieces.concat(), max_new, priority, tenant },
    );
    prop_oneof![
        4 => add,
        1 => any::<usize>().prop_map(Op::Abort),
        1 => any::<usize>().prop_map(Op::Finish),
        8 => Just(Op::Step),
        1 => Just(Op::FailedStep),
        1 => any::<usize>().prop_map(Op::StepAndAbort),
        1 => Just(Op::Clear),
    ]
}

fn nth(sim: &Sim, n: usize) -> Option<SeqId> {
    sim.alive.keys().nth(n % sim.alive.len().max(1)).copied()
}

proptest! {
    #[test]
    fn every_block_is_accounted_for(
        ops in prop::collection::vec(op(), 1..120),
        (blocks, running_max, chunk_min) in (15u32..60, 1u32..8, 1u32..10),
        (prefix_cache, reserve_output) in (any::<bool>(), any::<bool>()),
        itl_slo in prop::option::of(1u64..60),
        ageing in prop::option::of(20u64..400),
    ) {
        let mut sim = Sim::new(SchedulerConfig {
            block_size: 4,
            blocks,
            step_tokens_max: 24,
            running_max,
            chunk_tokens_min: chunk_min,
            prefix_cache,
            reserve_output,
            itl_slo: itl_slo.map(Duration::from_millis),
            ageing: ageing.map(Duration::from_millis),
            ..SchedulerConfig::default()
        });
        let (mut id, mut work) = (0, 0);
        let mut asked = Vec::new();
        for op in ops {
            match op {
                Op::Add { prompt, max_new, priority, tenant } => {
                    let tenant = ["a", "b", "c"][usize::from(tenant)].into();
                    let new = NewSeq { priority, tenant, ..seq(id, prompt.clone(), max_new) };
                    sim.try_add(new).expect("each fits alone");
                    work += prompt.len() as u64 + u64::from(max_new);
                    asked.push((SeqId(id), prompt, max_new));
                    id += 1;
                }
                Op::Abort(n) => if let Some(id) = nth(&sim, n) { sim.abort(id) },
                Op::Finish(n) => if let Some(id) = nth(&sim, n) { sim.finish(id) },
                Op::Step => { sim.step(); }
                Op::FailedStep => {
                    sim.plan();
                    sim.fail();
                }
                Op::StepAndAbort(n) => {
                    let plan = sim.plan();
                    if let Some(id) = nth(&sim, n) {
                        let held = sim.scheduler.stats().blocks_held;
                        sim.abort(id);
                        prop_assert!(sim.scheduler.stats().blocks_held <= held);
                    }
                    sim.execute(&plan);
                }
                Op::Clear => sim.clear_cache(),
            }
        }
        let begun = sim.steps;
        sim.run(begun + 50 + 10 * work);
        let stats = sim.scheduler.stats();
        prop_assert_eq!((stats.running, stats.waiting, stats.waiting_tokens, stats.blocks_held), (0, 0, 0, 0));
        for (id, prompt, max_new) in asked {
            if let Some((output, _)) = sim.done.get(&id) {
                prop_assert_eq!(output, &expected_output(&prompt, max_new));
            }
        }
    }
}
