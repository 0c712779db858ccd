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
        prompt_logits: false,
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

/// 256 sequences run, others wait, and some are preempted. Planning, tokens and ends are counted; arrivals, which
/// bring a prompt, are not.
#[test]
fn a_step_does_not_allocate_once_warm() {
    let mut scheduler = Scheduler::new(SchedulerConfig {
        blocks: 1400,
        reserve_output: false,
        running_max: 256,
        step_tokens_max: 1024,
        kv_events: true,
        ..SchedulerConfig::default()
    });
    for id in 0..300 {
        add(&mut scheduler, id, 40 + (id % 90) as u32);
    }
    let mut next_id = 300;
    // Every slot comes to its longest sequence in time.
    run(&mut scheduler, &mut next_id, 6000);
    let before = scheduler.stats();
    let mut most_running = 0;
    let mut rows = Vec::with_capacity(1024);
    for step in 0..300 {
        let (mut ended, mut planned) = (Vec::with_capacity(1024), 0);
        let counted = allocation_counter::measure(|| {
            let plan = scheduler.plan_step(Duration::from_millis(step));
            planned = plan.rows();
            rows.clear();
            let wanted = |r: &usize| plan.logit_tokens.binary_search(&(plan.row(*r).end as u32 - 1)).is_ok();
            rows.extend((0..plan.rows()).filter(wanted).map(|r| plan.seqs[r]));
            scheduler.on_step_done(Duration::from_millis(20));
            for &id in &rows {
                if scheduler.on_token(id, (id.0 % 97) as u32) != crate::TokenOutcome::Continue {
                    scheduler.finish(id).unwrap();
                    ended.push(id);
                }
            }
        });
        assert_eq!(counted.count_total, 0, "step {step}: {:?}", scheduler.stats());
        most_running = most_running.max(planned);
        for _ in ended {
            next_id += 1;
            add(&mut scheduler, next_id, 40 + (next_id % 90) as u32);
        }
        scheduler.drain_events(&mut Vec::new());
    }
    assert_eq!(most_running, 256);
    let stats = scheduler.stats();
    assert!(stats.prefix_query_tokens > before.prefix_query_tokens, "nobody was admitted: {stats:?}");
    assert!(stats.preemptions > before.preemptions, "nobody was preempted: {stats:?}");
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
