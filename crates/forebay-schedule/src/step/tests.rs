use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{NewSeq, Scheduler, SchedulerConfig, SeqId};

fn add(scheduler: &mut Scheduler, id: u64, prompt_tokens: u32) {
    let prompt: Arc<[u32]> = (0..prompt_tokens).map(|i| i / 7 + id as u32 % 50).collect();
    let new = NewSeq {
        id: SeqId(id),
        prompt,
        max_new_tokens: 60,
        cache_salt: None,
        priority: 0,
        tenant: "t".into(),
    };
    scheduler.try_add(Duration::ZERO, new).unwrap();
}

/// Runs `steps` steps with as many newcomers as sequences end.
fn run(scheduler: &mut Scheduler, next_id: &mut u64, steps: usize) -> Duration {
    let mut events = Vec::new();
    let mut planning = Duration::ZERO;
    for _ in 0..steps {
        let start = Instant::now();
        let plan = scheduler.plan_step(Duration::ZERO);
        planning += start.elapsed();
        let rows: Vec<usize> =
            plan.logit_tokens.iter().map(|t| plan.row_starts.partition_point(|s| s <= t) - 1).collect();
        let seqs: Vec<SeqId> = rows.iter().map(|&r| plan.seqs[r]).collect();
        for id in seqs {
            if scheduler.on_token(id, (id.0 % 97) as u32) != crate::TokenOutcome::Continue {
                scheduler.finish(id).unwrap();
                *next_id += 1;
                add(scheduler, *next_id, 40 + (*next_id % 90) as u32);
            }
        }
        events.clear();
        scheduler.drain_events(&mut events);
    }
    planning
}

/// With no allocator to ask (that takes `unsafe`): nothing that planning writes to has grown.
#[test]
fn planning_does_not_allocate_once_warm() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        blocks: 300,
        running_max: 64,
        step_tokens_max: 256,
        kv_events: true,
        ..SchedulerConfig::default()
    });
    for id in 0..80 {
        add(&mut scheduler, id, 40 + (id % 90) as u32);
    }
    let mut next_id = 80;
    let capacities = |s: &Scheduler| {
        let p = &s.plan;
        let blocks: usize = s.seqs.iter().map(|seq| seq.blocks.capacity()).sum();
        [
            p.seqs.capacity(),
            p.token_ids.capacity(),
            p.positions.capacity(),
            p.row_starts.capacity(),
            p.block_tables.capacity(),
            p.table_starts.capacity(),
            p.logit_tokens.capacity(),
            s.frontiers.capacity(),
            s.running.capacity(),
            s.seqs.capacity(),
            s.slots_free.capacity(),
            blocks,
        ]
    };
    run(&mut scheduler, &mut next_id, 3000);
    let warm = capacities(&scheduler);
    run(&mut scheduler, &mut next_id, 1000);
    assert!(scheduler.stats().preemptions > 0, "the run was too easy: {:?}", scheduler.stats());
    assert_eq!(capacities(&scheduler), warm);
}

/// `cargo test --release -p forebay-schedule -- --ignored --nocapture`: 256 running sequences want ≤ 50 µs.
#[test]
#[ignore = "a measurement, not a check"]
fn how_long_planning_takes() {
    for running_max in [8, 64, 256] {
        let mut scheduler = Scheduler::new(SchedulerConfig {
            blocks: 8192,
            running_max,
            step_tokens_max: 2048,
            kv_events: true,
            ..SchedulerConfig::default()
        });
        for id in 0..u64::from(running_max) + 16 {
            add(&mut scheduler, id, 40 + (id % 90) as u32);
        }
        let mut next_id = 1000;
        run(&mut scheduler, &mut next_id, 500);
        let planning = run(&mut scheduler, &mut next_id, 2000);
        println!("{running_max:4} running: {:?} per step; {:?}", planning / 2000, scheduler.stats());
    }
}
