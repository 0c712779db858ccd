//! A step that does not come back is noticed, and its end too.

use forebay_config::HumanDuration;

use super::held::held;
use super::*;

#[tokio::test]
async fn a_step_that_hangs_is_noticed_and_so_is_its_end() {
    let (held, _begun, open) = held(says("hi", "yes"));
    let config = EngineConfig { watchdog: HumanDuration::from_millis(20), ..EngineConfig::default() };
    let bench = bench_with(held, |_| {}, config);
    assert!(!bench.engine.is_stuck());
    let watch = async {
        bench.wait_for("forebay_engine_stuck_steps_total{engine=\"0\",model_name=\"fake\"} 1").await;
        assert!(bench.engine.is_stuck());
        let named = bench.engine.watchdog.in_step();
        assert!(named.ends_with(" (sequence 0): 2 from 0"), "the prompt's two tokens: {named}");
        drop(open);
    };
    let (events, ()) = tokio::join!(bench.events(greedy("hi")), watch);
    assert_eq!(text(&events.unwrap(), 0), "yes");
    bench.wait_for("vllm:num_requests_running{engine=\"0\",model_name=\"fake\"} 0").await;
    assert!(!bench.engine.is_stuck(), "nothing is computed any more");
}

#[tokio::test]
async fn without_a_watchdog_nothing_is_stuck() {
    let (held, begun, open) = held(says("hi", "yes"));
    let config = EngineConfig { watchdog: HumanDuration::from_secs(0), ..EngineConfig::default() };
    let bench = bench_with(held, |_| {}, config);
    let watch = async {
        tokio::task::spawn_blocking(move || begun.recv()).await.expect("joins").expect("begun");
        assert!(!bench.engine.is_stuck(), "a limit of zero is none");
        bench.wait_for("forebay_engine_stuck_steps_total{engine=\"0\",model_name=\"fake\"} 0").await;
        drop(open);
    };
    let (events, ()) = tokio::join!(bench.events(greedy("hi")), watch);
    assert_eq!(text(&events.unwrap(), 0), "yes");
}
