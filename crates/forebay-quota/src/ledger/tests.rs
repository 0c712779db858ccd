use super::*;
use proptest::prelude::*;

const MINUTE: Duration = Duration::from_secs(60);

fn ledger(requests: Option<u64>, tokens: Option<u64>) -> Ledger {
    Ledger::new(Limits { requests, tokens }, MINUTE, Duration::ZERO)
}

fn left(ledger: &Ledger, now: Duration) -> (Option<u64>, Option<u64>) {
    let snapshot = ledger.snapshot(now);
    (snapshot.requests.map(|w| w.remaining), snapshot.tokens.map(|w| w.remaining))
}

#[test]
fn both_or_neither() {
    let ledger = ledger(Some(2), Some(100));
    let zero = Duration::ZERO;
    let hold = ledger.try_hold(zero, 60).unwrap();
    let refused = ledger.try_hold(zero, 60).unwrap_err();
    assert_eq!(
        refused,
        Refused {
            limited: Limited::Tokens,
            limit: 100,
            remaining: 40,
            requested: 60,
            retry_after: Some(Duration::from_secs(12)),
        }
    );
    assert_eq!(
        refused.to_string(),
        "Rate limit reached on tokens per minute: limit 100, remaining 40, requested 60. Please try again in 12.000s."
    );
    assert_eq!(left(&ledger, zero), (Some(1), Some(40)), "the refused request took nothing");
    ledger.try_hold(zero, 0).unwrap().settle(zero, 0);
    let refused = ledger.try_hold(zero, 50).unwrap_err();
    assert_eq!(refused.limited, Limited::Requests, "30 s for a request, 6 s for the tokens");
    assert_eq!(refused.class().retry, Retry::After(Duration::from_secs(30)));
    drop(hold);
}

#[test]
fn waiting_as_told_is_enough() {
    let ledger = ledger(Some(7), Some(1000));
    for _ in 0..7 {
        ledger.try_hold(Duration::ZERO, 100).unwrap().settle(Duration::ZERO, 100);
    }
    let after = ledger.try_hold(Duration::ZERO, 900).unwrap_err().retry_after.unwrap();
    assert!(ledger.try_hold(after - Duration::from_nanos(1), 900).is_err());
    ledger.try_hold(after, 900).unwrap().settle(after, 900);
}

#[test]
fn more_than_the_limit_never_fits() {
    let refused = ledger(None, Some(100)).try_hold(Duration::ZERO, 101).unwrap_err();
    assert_eq!(refused.retry_after, None);
    assert_eq!(refused.class(), Class::new(Code::TokensRateLimited, Blame::Client));
    assert_eq!(
        refused.to_string(),
        "Request too large: it needs 101 tokens, the limit on tokens per minute is 100. Shorten the prompt or lower \
         max_tokens."
    );
}

#[test]
fn settlement_gives_back_or_charges() {
    let check = |held, used, expect| {
        let ledger = ledger(None, Some(100));
        ledger.try_hold(Duration::ZERO, held).unwrap().settle(Duration::ZERO, used);
        assert_eq!(left(&ledger, Duration::ZERO), (None, Some(expect)), "held {held}, used {used}");
    };
    check(80, 30, 70);
    check(80, 80, 20);
    check(80, 0, 100);
    check(80, 95, 5);
    check(80, 150, 0);
    let ledger = ledger(None, Some(100));
    ledger.try_hold(Duration::ZERO, 10).unwrap().settle(Duration::ZERO, 160);
    assert_eq!(left(&ledger, Duration::from_secs(36)), (None, Some(0)), "60 of debt take 36 s");
    assert_eq!(left(&ledger, Duration::from_secs(42)), (None, Some(10)));
}

#[test]
fn a_hold_grows_by_tokens_and_not_by_requests() {
    let ledger = ledger(Some(5), Some(100));
    let mut hold = ledger.try_hold(Duration::ZERO, 1).unwrap();
    hold.try_resize(Duration::ZERO, 80).unwrap();
    assert_eq!((hold.held(), left(&ledger, Duration::ZERO)), (80, (Some(4), Some(20))));
    // What it has already counts for it.
    hold.try_resize(Duration::ZERO, 100).unwrap();
    let refused = hold.try_resize(Duration::ZERO, 101).unwrap_err();
    assert_eq!((refused.limited, refused.requested, refused.retry_after), (Limited::Tokens, 101, None));
    assert_eq!((hold.held(), left(&ledger, Duration::ZERO)), (100, (Some(4), Some(0))), "as it was");
    hold.try_resize(Duration::ZERO, 0).unwrap();
    assert_eq!(left(&ledger, Duration::ZERO), (Some(4), Some(100)));
    hold.try_resize(Duration::ZERO, 30).unwrap();
    hold.settle(Duration::ZERO, 10);
    assert_eq!(left(&ledger, Duration::ZERO), (Some(4), Some(90)));

    let other = ledger.try_hold(Duration::ZERO, 60).unwrap();
    let mut hold = ledger.try_hold(Duration::ZERO, 1).unwrap();
    let refused = hold.try_resize(Duration::ZERO, 31).unwrap_err();
    assert_eq!((refused.remaining, refused.retry_after), (30, Some(Duration::from_millis(600))));
    drop((hold, other));
    assert_eq!(left(&ledger, Duration::ZERO), (Some(2), Some(90)));
}

#[test]
fn a_dropped_hold_charges_what_was_spent() {
    let check = |spent: &[u64], expect| {
        let ledger = ledger(Some(5), Some(100));
        let mut hold = ledger.try_hold(Duration::ZERO, 80).unwrap();
        spent.iter().for_each(|tokens| hold.spent(Duration::ZERO, *tokens));
        drop(hold);
        assert_eq!(left(&ledger, Duration::ZERO), (Some(4), Some(expect)), "{spent:?}");
    };
    check(&[], 100);
    check(&[30], 70);
    check(&[30, 20], 70);
    check(&[30, 90], 10);
}

#[test]
fn unlimited_is_held_too() {
    let ledger = Ledger::unlimited();
    let hold = ledger.try_hold(Duration::ZERO, u64::MAX).unwrap();
    let Reserved(()) = hold.proof();
    assert_eq!(left(&ledger, Duration::ZERO), (None, None));
    hold.settle(Duration::ZERO, u64::MAX);
}

#[test]
fn threads_never_overshoot() {
    let ledger = ledger(Some(1000), Some(10_000));
    let admitted = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut admitted = 0;
                    for _ in 0..500 {
                        if let Ok(hold) = ledger.try_hold(Duration::ZERO, 13) {
                            admitted += 1;
                            hold.settle(Duration::ZERO, 13);
                        }
                    }
                    admitted
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum::<u64>()
    });
    // No time passes, so exactly what fits is admitted, whatever the interleaving.
    assert_eq!(admitted, 10_000 / 13);
    assert_eq!(left(&ledger, Duration::ZERO), (Some(1000 - 769), Some(10_000 - 769 * 13)));
}

#[derive(Debug, Clone)]
enum Step {
    Wait {
        ms: u64,
    },
    Hold {
        tokens: u64,
    },
    /// Settle the oldest hold for this share of it, in percent.
    Settle {
        percent: u64,
    },
    Drop,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u64..20_000).prop_map(|ms| Step::Wait { ms }),
        (0u64..120).prop_map(|tokens| Step::Hold { tokens }),
        (0u64..=100).prop_map(|percent| Step::Settle { percent }),
        Just(Step::Drop),
    ]
}

proptest! {
    /// What was used since any earlier moment fits into a full bucket and the refill since then, and what is held now
    /// fits too: no order of holds, settlements and drops creates tokens.
    #[test]
    fn never_over_the_limit_in_any_window(steps in prop::collection::vec(step(), 1..60)) {
        const LIMIT: u64 = 100;
        let ledger = ledger(None, Some(LIMIT));
        let mut now = Duration::ZERO;
        let mut holds = std::collections::VecDeque::new();
        // (admitted at, tokens finally used)
        let mut used: Vec<(Duration, u64)> = Vec::new();
        for step in steps {
            match step {
                Step::Wait { ms } => now += Duration::from_millis(ms),
                Step::Hold { tokens } => {
                    if let Ok(hold) = ledger.try_hold(now, tokens) {
                        holds.push_back((now, hold));
                    }
                }
                Step::Settle { percent } => {
                    if let Some((at, hold)) = holds.pop_front() {
                        let tokens = hold.held() * percent / 100;
                        hold.settle(now, tokens);
                        used.push((at, tokens));
                    }
                }
                Step::Drop => {
                    if let Some((at, mut hold)) = holds.pop_front() {
                        let tokens = hold.held() / 2;
                        hold.spent(at, tokens);
                        drop(hold);
                        used.push((at, tokens));
                    }
                }
            }
            let remaining = ledger.snapshot(now).tokens.unwrap().remaining;
            prop_assert!(remaining <= LIMIT);
            let open = holds.iter().map(|(at, hold)| (*at, hold.held()));
            let all: Vec<_> = used.iter().copied().chain(open).collect();
            for (since, _) in &all {
                let total: u64 = all.iter().filter(|(at, _)| at >= since).map(|(_, tokens)| tokens).sum();
                let refill = LIMIT as f64 * (now - *since).as_secs_f64() / 60.0;
                prop_assert!((total + remaining) as f64 <= LIMIT as f64 + refill + 1e-6);
            }
        }
    }
}
