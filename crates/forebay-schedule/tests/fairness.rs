//! Who is served when several tenants want more than there is.

mod sim;

use std::time::Duration;

use forebay_schedule::{NewSeq, SchedulerConfig, SeqId};
use forebay_types::ConsumerName;
use proptest::prelude::*;
use sim::{STEP, Sim, seq};

fn config() -> SchedulerConfig {
    SchedulerConfig {
        block_size: 4,
        blocks: 100,
        step_tokens_max: 64,
        running_max: 2,
        chunk_tokens_min: 1,
        ..SchedulerConfig::default()
    }
}

fn ask(tenant: &str, id: u64, tokens: u32, max_new: u32) -> NewSeq {
    let prompt: Vec<u32> = (0..tokens).map(|i| id as u32 * 1000 + i).collect();
    NewSeq { tenant: tenant.into(), ..seq(id, prompt, max_new) }
}

fn served(sim: &Sim, tenant: &str) -> u64 {
    sim.scheduler.served(&ConsumerName::from(tenant)).expect("it has asked")
}

/// Ids in the order in which they started.
fn started(sim: &mut Sim) -> Vec<u64> {
    let mut order = Vec::new();
    while !sim.alive.is_empty() {
        assert!(sim.steps < 10_000);
        for id in sim.step().seqs {
            if !order.contains(&id.0) {
                order.push(id.0);
            }
        }
    }
    order
}

#[test]
fn a_flood_does_not_delay_another_tenant() {
    let mut sim = Sim::new(SchedulerConfig { running_max: 1, ..config() });
    for id in 0..30 {
        sim.try_add(ask("flood", id, 8, 4)).unwrap();
    }
    sim.step();
    sim.now += Duration::from_secs(60); // however old the flood is by now
    for id in 100..103 {
        sim.try_add(ask("small", id, 8, 4)).unwrap();
    }
    let order = started(&mut sim);
    let last = order.iter().position(|id| *id == 102).unwrap();
    assert!(last <= 6, "they take turns: {order:?}");
}

#[test]
fn one_tenant_is_served_in_order_of_arrival() {
    let mut sim = Sim::new(SchedulerConfig { running_max: 1, ..config() });
    for id in 0..10 {
        sim.try_add(ask("one", id, 4 + id as u32 % 3, 2)).unwrap();
    }
    assert_eq!(started(&mut sim), Vec::from_iter(0..10));
}

#[test]
fn not_asking_saves_nothing_up() {
    let mut sim = Sim::new(SchedulerConfig { running_max: 1, ..config() });
    sim.try_add(ask("late", 0, 4, 1)).unwrap();
    for id in 1..20 {
        sim.try_add(ask("busy", id, 8, 4)).unwrap();
    }
    for _ in 0..40 {
        sim.step();
    }
    assert!(served(&sim, "late") < 10 && served(&sim, "busy") > 80);
    for id in 100..110 {
        sim.try_add(ask("late", id, 8, 4)).unwrap();
    }
    assert_eq!(served(&sim, "late"), served(&sim, "busy"));
}

#[test]
fn cached_and_recomputed_tokens_are_free_and_output_counts_twice() {
    let mut sim = Sim::new(config());
    sim.try_add(ask("a", 1, 21, 3)).unwrap();
    sim.run(100);
    assert_eq!(served(&sim, "a"), 21 + 2 * 3);
    let again = NewSeq { id: SeqId(2), ..ask("a", 1, 21, 3) };
    sim.try_add(again).unwrap();
    sim.run(100);
    assert_eq!(served(&sim, "a"), 21 + 2 * 3 + 1 + 2 * 3, "5 blocks of 4 were cached");

    let mut sim = Sim::new(SchedulerConfig { blocks: 8, prefix_cache: false, ..config() });
    sim.try_add(ask("a", 1, 12, 12)).unwrap();
    sim.try_add(ask("a", 2, 12, 12)).unwrap();
    let plan = sim.plan();
    assert_eq!(plan.tokens(), 24);
    sim.scheduler.on_step_failed();
    sim.run(200);
    assert!(sim.scheduler.stats().preemptions > 0);
    assert_eq!(served(&sim, "a"), 2 * (12 + 2 * 12), "the failed step and the preemption cost nothing");
}

#[test]
fn priority_goes_before_service_and_ageing_lifts_to_the_top_only() {
    let order = |ageing, wait| {
        let mut sim = Sim::new(SchedulerConfig { running_max: 1, ageing, ..config() });
        sim.try_add(ask("first", 0, 4, 1)).unwrap();
        sim.step();
        sim.try_add(NewSeq { priority: -1, ..ask("low", 1, 4, 1) }).unwrap();
        sim.now += wait;
        for id in 2..5 {
            sim.try_add(ask("high", id, 4, 1)).unwrap();
        }
        started(&mut sim)
    };
    let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3600));
    assert_eq!(order(None, hour), [2, 3, 4, 1], "strict");
    assert_eq!(order(Some(second), Duration::ZERO), [2, 3, 4, 1], "not old enough");
    assert_eq!(order(Some(second), second), [1, 2, 3, 4], "as important, served as much, and first");
}

/// A tenant of low priority against one that always has more: it starts within the time that ageing promises, and what
/// then runs.
#[test]
fn a_low_priority_tenant_waits_for_its_ageing_and_no_longer() {
    let ageing = STEP * 20;
    let mut sim = Sim::new(SchedulerConfig { ageing: Some(ageing), ..config() });
    sim.try_add(NewSeq { priority: -2, ..ask("low", 0, 8, 1) }).unwrap();
    let mut id = 1;
    while sim.alive.contains_key(&SeqId(0)) {
        while sim.scheduler.stats().waiting < 20 {
            sim.try_add(ask("high", id, 8, 4)).unwrap();
            id += 1;
        }
        sim.step();
        assert!(sim.steps <= 2 * 20 + 10, "starved");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// The paper's bound: while two tenants are backlogged, what they were given differs by at most
    /// 2 · max(longest prompt, output weight · tokens that run at once).
    #[test]
    fn backlogged_tenants_are_served_alike(
        sizes in prop::collection::vec((1u32..30, 1u32..20, 1u32..30, 1u32..20), 30..60),
        running_max in 1u32..6,
    ) {
        let mut sim = Sim::new(SchedulerConfig { running_max, blocks: 120, ..config() });
        for (i, &(a, a_new, b, b_new)) in (0..).zip(&sizes) {
            sim.try_add(ask("a", 2 * i, a, a_new)).unwrap();
            sim.try_add(ask("b", 2 * i + 1, b, b_new)).unwrap();
        }
        let bound = 2 * 2 * u64::from(running_max) * (29 + 19);
        let waiting = |sim: &Sim, odd: u64| {
            let mut ids = sim.alive.keys().filter(|id| id.0 % 2 == odd);
            ids.any(|id| sim.scheduler.info(*id).is_some_and(|info| info.started.is_none()))
        };
        while waiting(&sim, 0) && waiting(&sim, 1) {
            sim.step();
            let (a, b) = (served(&sim, "a"), served(&sim, "b"));
            prop_assert!(a.abs_diff(b) <= bound, "{a} and {b}");
        }
    }
}
