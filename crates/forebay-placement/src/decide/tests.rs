use proptest::prelude::*;

use super::*;

const NOW: Duration = Duration::from_secs(100);

fn up(requests: u32, queued_tokens: u64, rate: f64) -> ReplicaView {
    ReplicaView {
        state: ReplicaState::Up,
        load: Load { requests, queued_tokens },
        speed: Speed::measured(rate, NOW),
    }
}

fn idle() -> ReplicaView {
    up(0, 0, 1000.0)
}

fn ask(prompt_tokens: u32, matched_blocks: &[u32]) -> Ask<'_> {
    Ask { prompt_tokens, block_tokens: 16, matched_blocks, output_tokens: 100, tried: &[] }
}

fn place(replicas: &[ReplicaView], ask: &Ask<'_>, seed: u64) -> Result<Decision, PlaceError> {
    let model = ModelName::from("m");
    decide(&FleetView { model: &model, replicas, queued_tokens_max: 10_000, now: NOW }, ask, seed)
}

#[test]
fn who_is_chosen_and_why() {
    let check = |replicas: &[ReplicaView], prompt: u32, matched: &[u32], expect: usize, why: Why| {
        for seed in 0..8 {
            let decision = place(replicas, &ask(prompt, matched), seed).expect("placed");
            assert_eq!((decision.replica, decision.why), (expect, why), "{decision:?}");
        }
    };
    let down = ReplicaView { state: ReplicaState::Down, ..idle() };
    let draining = ReplicaView { state: ReplicaState::Draining, ..idle() };
    // Equal loads: who holds the prefix.
    check(&[idle(), idle(), idle()], 600, &[0, 32, 8], 1, Why::Prefix);
    // The holder is busy, but computing 512 tokens (twice 0.512 s) costs more than waiting for 500 (0.5 s).
    check(&[idle(), up(1, 500, 1000.0)], 600, &[0, 32], 1, Why::Prefix);
    // Now waiting costs more: 1.5 s and ten neighbours.
    check(&[idle(), up(10, 1500, 1000.0)], 600, &[0, 32], 0, Why::Load);
    // Nobody holds anything: the shorter queue, the smaller batch, the faster one.
    check(&[up(1, 300, 1000.0), up(1, 200, 1000.0)], 64, &[], 1, Why::Load);
    check(&[up(2, 0, 1000.0), up(1, 0, 1000.0)], 64, &[], 1, Why::Load);
    check(&[up(0, 0, 1000.0), up(0, 0, 3000.0)], 64, &[], 1, Why::Load);
    // Dead and draining ones are never chosen, whatever they hold.
    check(&[down, idle(), idle()], 600, &[37, 0, 1], 2, Why::Prefix);
    check(&[draining, idle()], 600, &[37, 0], 1, Why::Only);
}

#[test]
fn the_terms_of_the_cost() {
    let replicas = [up(3, 2000, 1000.0)];
    let decision = place(&replicas, &ask(600, &[32]), 0).expect("placed");
    let expect = Candidate {
        replica: 0,
        cached_blocks: 32,
        uncached_tokens: 88,
        wait_s: 2.0,
        prefill_s: 0.088,
        decode_s: 0.3,
    };
    assert_eq!(decision.candidates, [expect]);
    assert!((expect.cost_s() - 2.476).abs() < 1e-9);
    assert!((decision.estimated_s - 2.088).abs() < 1e-9);
    assert_eq!(
        decision.to_string(),
        "only: 512 of 600 tokens cached, first token in 2088 ms, of 1 candidate"
    );
}

#[test]
fn one_token_is_always_computed() {
    let check = |prompt: u32, matched: u32, cached: u32, uncached: u32| {
        let decision = place(&[idle()], &ask(prompt, &[matched]), 0).expect("placed");
        assert_eq!((decision.cached_tokens, decision.uncached_tokens), (cached, uncached));
    };
    check(32, 2, 31, 1);
    check(33, 2, 32, 1);
    check(40, 2, 32, 8);
    check(40, u32::MAX, 39, 1);
    check(0, 0, 0, 0);
    check(0, 3, 0, 0);
}

#[test]
fn ties_are_drawn_by_the_seed() {
    let replicas = [idle(), up(1, 100, 1000.0), idle(), idle()];
    let draw = |seed| {
        let decision = place(&replicas, &ask(64, &[]), seed).expect("placed");
        assert_eq!(decision.why, Why::Tie);
        decision.replica
    };
    let lots: Vec<usize> = (0..12).map(draw).collect();
    assert_eq!(lots, (0..12).map(draw).collect::<Vec<_>>(), "the same seed draws the same lot");
    // Exactly what SplitMix64 gives for seeds 0 to 11, of the three idle ones.
    assert_eq!(lots, [2, 3, 2, 0, 2, 3, 3, 0, 2, 2, 2, 0]);
}

#[test]
fn an_unmeasured_replica_is_tried() {
    let new = ReplicaView { speed: Speed::UNKNOWN, ..idle() };
    // As fast as the fastest, so it is a tie with that one and beats the slower.
    let replicas = [up(0, 0, 4000.0), up(0, 0, 500.0), new];
    let chosen: std::collections::BTreeSet<usize> =
        (0..32).map(|seed| place(&replicas, &ask(64, &[]), seed).expect("placed").replica).collect();
    assert_eq!(chosen.into_iter().collect::<Vec<_>>(), [0, 2]);
}

#[test]
fn tried_ones_are_left_out() {
    let replicas = [idle(), up(5, 900, 1000.0)];
    let ask = Ask { tried: &[0], ..ask(64, &[4, 0]) };
    assert_eq!(place(&replicas, &ask, 0).expect("placed").replica, 1);
    let ask = Ask { tried: &[0, 1], ..ask };
    assert_eq!(place(&replicas, &ask, 0), Err(PlaceError::NoWorker { model: "m".into() }));
}

#[test]
fn a_full_fleet_says_when_it_has_drained() {
    let check = |replicas: &[ReplicaView], prompt: u32, expect: Result<usize, (u64, f64)>| {
        let got = place(replicas, &ask(prompt, &[]), 0);
        match (got, expect) {
            (Ok(decision), Ok(expect)) => assert_eq!(decision.replica, expect),
            (Err(PlaceError::Saturated { queued, limit, drain_in, .. }), Err((at_least, seconds))) => {
                assert_eq!((queued, limit), (at_least, 10_000));
                assert!((drain_in.as_secs_f64() - seconds).abs() < 1e-6, "{drain_in:?}, expected {seconds}");
            }
            (got, expect) => panic!("{got:?}, expected {expect:?}"),
        }
    };
    // Exactly at the limit is still in.
    check(&[up(1, 9_000, 1000.0)], 1_000, Ok(0));
    // 1 token over, at 1000 per second.
    check(&[up(1, 9_001, 1000.0)], 1_000, Err((9_001, 0.001)));
    // The soonest of the two, and the smaller queue.
    check(&[up(1, 9_500, 1000.0), up(1, 9_900, 2000.0)], 1_000, Err((9_500, 0.45)));
    // A prompt over the limit goes to whoever has nothing waiting, and else waits for the whole queue.
    check(&[up(1, 1, 1000.0), idle()], 20_000, Ok(1));
    check(&[up(1, 500, 1000.0)], 20_000, Err((500, 0.5)));
    // A dead replica has no room.
    let down = ReplicaView { state: ReplicaState::Down, ..idle() };
    check(&[up(1, 10_000, 1000.0), down], 1_000, Err((10_000, 1.0)));
}

#[test]
fn errors_say_what_to_do() {
    let check = |error: PlaceError, code: Code, retry: Retry, text: &str| {
        assert_eq!((error.class().code, error.class().retry), (code, retry));
        assert_eq!(error.to_string(), text);
    };
    let model = ModelName::from("m");
    check(
        PlaceError::NoWorker { model: model.clone() },
        Code::ModelUnavailable,
        Retry::Never,
        "no ready replica serves `m`",
    );
    let drain_in = Duration::from_secs(2);
    check(
        PlaceError::Saturated { model, queued: 7, limit: 5, drain_in },
        Code::Overloaded,
        Retry::After(drain_in),
        "every replica of `m` has at least 7 prompt tokens waiting, \
         the limit (`router.queued-tokens-max`) is 5",
    );
}

fn any_replica() -> impl Strategy<Value = ReplicaView> {
    let state = prop_oneof![Just(ReplicaState::Up), Just(ReplicaState::Draining), Just(ReplicaState::Down)];
    let speed = prop_oneof![
        Just(Speed::UNKNOWN),
        (1.0..20_000.0, 0u64..1000).prop_map(|(rate, at)| Speed::measured(rate, Duration::from_secs(at))),
    ];
    (state, 0u32..50, 0u64..20_000, speed).prop_map(|(state, requests, queued_tokens, speed)| ReplicaView {
        state,
        load: Load { requests, queued_tokens },
        speed,
    })
}

proptest! {
    /// The chosen one is up, was not tried, has room, and no other such replica costs less.
    #[test]
    fn the_cheapest_of_the_eligible(
        replicas in proptest::collection::vec(any_replica(), 0..20),
        matched in proptest::collection::vec(0u32..400, 0..20),
        tried in proptest::collection::vec(0usize..20, 0..4),
        prompt_tokens in 0u32..8000,
        output_tokens in 0u32..2000,
        seed: u64,
    ) {
        let ask = Ask { prompt_tokens, block_tokens: 16, matched_blocks: &matched, output_tokens, tried: &tried };
        let got = place(&replicas, &ask, seed);
        prop_assert_eq!(&got, &place(&replicas, &ask, seed));

        let prior = replicas.iter().filter_map(|r| r.speed.last_measured()).fold(f64::NEG_INFINITY, f64::max);
        let prior = if prior.is_finite() { prior } else { PREFILL_RATE_PRIOR };
        // The cost once more, in plain words.
        let cost = |i: usize| {
            let r = &replicas[i];
            let rate = r.speed.rate(NOW, prior);
            let cached = (matched.get(i).copied().unwrap_or(0) * 16).min(prompt_tokens.saturating_sub(1));
            let uncached = f64::from(prompt_tokens - cached);
            (r.load.queued_tokens as f64 + 2.0 * uncached + f64::from(r.load.requests) * f64::from(output_tokens)) / rate
        };
        let uncached = |i: usize| {
            let cached = (matched.get(i).copied().unwrap_or(0) * 16).min(prompt_tokens.saturating_sub(1));
            u64::from(prompt_tokens - cached)
        };
        let up = |i: &usize| replicas[*i].state == ReplicaState::Up && !tried.contains(i);
        let room = |i: &usize| {
            let queued = replicas[*i].load.queued_tokens;
            queued == 0 || queued + uncached(*i) <= 10_000
        };
        let eligible: Vec<usize> = (0..replicas.len()).filter(up).filter(room).collect();
        match got {
            Ok(decision) => {
                prop_assert!(eligible.contains(&decision.replica));
                prop_assert_eq!(decision.candidates.len(), eligible.len());
                let chosen = cost(decision.replica);
                for other in eligible {
                    prop_assert!(chosen <= cost(other) * (1.0 + 1e-6) + 1e-9);
                }
                prop_assert_eq!(decision.cached_tokens + decision.uncached_tokens, prompt_tokens);
                prop_assert!(decision.estimated_s.is_finite());
            }
            Err(PlaceError::NoWorker { .. }) => prop_assert_eq!((0..replicas.len()).filter(up).count(), 0),
            Err(PlaceError::Saturated { .. }) => {
                prop_assert!(eligible.is_empty());
                prop_assert!((0..replicas.len()).filter(up).count() > 0);
            }
        }
    }
}
