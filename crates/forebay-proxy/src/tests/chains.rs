use std::time::Duration;

use forebay_flow::Stage;
use forebay_types::Code;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::script::{Act, completion, text};
use super::{Bench, config};

/// A model `m` over the fleets `a`, `b` and `c`, with more settings.
fn chain(fleets: &[&str], settings: Value) -> crate::ProxyConfig {
    let links: Vec<Value> = fleets.iter().map(|fleet| json!({"fleet": fleet})).collect();
    let mut yaml = json!({"models": [{"name": "m", "deployments": links}]});
    for (key, value) in settings.as_object().expect("an object") {
        yaml[key] = value.clone();
    }
    config(yaml)
}

#[tokio::test(start_paused = true)]
async fn the_next_takes_over_where_that_can_help() {
    // What `a` fails with, and whether `b` is asked.
    let check = async |code: Code, falls_back: bool| {
        let bench = Bench::new(Some(&chain(&["a", "b"], json!({}))));
        bench.router.will("a", [Act::Fail(code)]);
        match bench.proxy.call(completion("m")).await {
            Ok(reply) => {
                assert!(falls_back, "{code:?}");
                assert_eq!(reply.headers["x-forebay-deployment"], "fleet/b");
                assert_eq!(reply.headers["x-forebay-attempts"], "2");
                assert_eq!(text(reply).await, "from b");
                assert_eq!(bench.router.asked(), "a b");
                assert_eq!(bench.metric("forebay_proxy_fallbacks_total"), [r#"{model="m"} 1"#]);
            }
            Err(fault) => {
                assert!(!falls_back, "{code:?}");
                assert_eq!(fault.class.code, code);
                assert_eq!(bench.router.asked(), "a");
            }
        }
    };
    for code in [
        Code::ContextLengthExceeded,
        // Of a feature that our engine lacks.
        Code::NotSupported,
        Code::Overloaded,
        Code::ModelUnavailable,
        Code::ShuttingDown,
        Code::UpstreamFailed,
        Code::UpstreamTimeout,
        Code::Internal,
    ] {
        check(code, true).await;
    }
    for code in [Code::BadRequest, Code::BodyTooLarge] {
        check(code, false).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_last_failure_is_the_clients() {
    let bench = Bench::new(Some(&chain(&["a", "b", "c"], json!({}))));
    bench.router.will("a", [Act::Fail(Code::UpstreamFailed)]);
    bench.router.will("b", [Act::Fail(Code::ContextLengthExceeded)]);
    bench.router.will("c", [Act::Fail(Code::Overloaded)]);
    let flow = completion("m");
    let trace = flow.origin.trace.clone();
    let fault = bench.proxy.call(flow).await.expect_err("all fail");
    assert_eq!(fault.class.code, Code::Overloaded);
    assert_eq!(bench.router.asked(), "a b c");
    let whys: Vec<String> = trace.spans().into_iter().map(|span| span.why).collect();
    assert_eq!(
        whys,
        [
            "m: fleet/a, fleet/b, fleet/c",
            "fleet/a failed: UpstreamFailed",
            "fleet/b failed: ContextLengthExceeded",
            "fleet/c failed: Overloaded",
        ]
    );
    assert_eq!(
        bench.metric("forebay_proxy_requests_total"),
        [
            r#"{deployment="fleet/a",model="m",outcome="upstream_failed"} 1"#,
            r#"{deployment="fleet/b",model="m",outcome="context_length_exceeded"} 1"#,
            r#"{deployment="fleet/c",model="m",outcome="overloaded"} 1"#,
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_slow_fleet_gives_way_and_the_last_may_take_its_time() {
    let bench = Bench::new(Some(&chain(&["a", "b"], json!({"first-byte-timeout": "7s"}))));
    bench.router.will("a", [Act::Hang]);
    let begun = Instant::now();
    let reply = bench.proxy.call(completion("m")).await.expect("b answers");
    assert_eq!(begun.elapsed(), Duration::from_secs(7));
    assert_eq!(reply.headers["x-forebay-attempts"], "2");

    bench.router.will("a", [Act::Hang]);
    bench.router.will("b", [Act::Hang]);
    let patience = Duration::from_secs(3600);
    tokio::time::timeout(patience, bench.proxy.call(completion("m"))).await.expect_err("b is waited for");

    // Unless the model says otherwise.
    let mut config = chain(&["a"], json!({}));
    config.models[0].first_byte_timeout = Some(forebay_config::HumanDuration::from_secs(3));
    let bench = Bench::new(Some(&config));
    bench.router.will("a", [Act::Hang]);
    let fault = bench.proxy.call(completion("m")).await.expect_err("too slow");
    assert_eq!(fault.class.code, Code::UpstreamTimeout);
    assert_eq!(fault.message, "`m` did not begin to answer within 3 s");
}

#[tokio::test(start_paused = true)]
async fn a_failing_deployment_is_left_out_for_a_while() {
    let settings = json!({"cooldown": {"failures": 2, "time": "30s"}});
    let bench = Bench::new(Some(&chain(&["a", "b"], settings)));
    let ask = async || {
        bench.proxy.call(completion("m")).await.expect("somebody answers");
        bench.router.asked()
    };
    let fail = || bench.router.will("a", [Act::Fail(Code::UpstreamFailed)]);
    fail();
    assert_eq!(ask().await, "a b");
    fail();
    assert_eq!(ask().await, "a b");
    assert_eq!(bench.metric("forebay_proxy_cooldowns_total"), [r#"{deployment="fleet/a",model="m"} 1"#]);
    assert_eq!(ask().await, "b");
    tokio::time::advance(Duration::from_millis(29_999)).await;
    assert_eq!(ask().await, "b");
    tokio::time::advance(Duration::from_millis(1)).await;
    // Half open: one failure is enough, one success closes it.
    fail();
    assert_eq!(ask().await, "a b");
    assert_eq!(ask().await, "b");
    tokio::time::advance(Duration::from_secs(30)).await;
    assert_eq!(ask().await, "a");
    fail();
    assert_eq!(ask().await, "a b");
    assert_eq!(ask().await, "a");
}

#[tokio::test(start_paused = true)]
async fn with_everybody_cooling_everybody_is_asked() {
    let settings = json!({"cooldown": {"failures": 1, "time": "30s"}});
    let bench = Bench::new(Some(&chain(&["a", "b"], settings)));
    bench.router.will("a", [Act::Fail(Code::UpstreamFailed)]);
    bench.router.will("b", [Act::Fail(Code::UpstreamFailed)]);
    bench.proxy.call(completion("m")).await.expect_err("both fail");
    bench.router.asked();
    bench.proxy.call(completion("m")).await.expect("a is back");
    assert_eq!(bench.router.asked(), "a");
}

#[tokio::test(start_paused = true)]
async fn a_full_fleet_is_not_left_out() {
    let settings = json!({"cooldown": {"failures": 1, "time": "30s"}});
    let bench = Bench::new(Some(&chain(&["a", "b"], settings)));
    bench.router.will("a", [Act::Fail(Code::Overloaded)]);
    bench.proxy.call(completion("m")).await.expect("b answers");
    bench.router.asked();
    bench.proxy.call(completion("m")).await.expect("a answers");
    assert_eq!(bench.router.asked(), "a");
}

#[tokio::test(start_paused = true)]
async fn no_attempt_is_begun_after_the_deadline() {
    let settings = json!({"first-byte-timeout": "10s", "attempts-deadline": "15s"});
    let bench = Bench::new(Some(&chain(&["a", "b", "c"], settings)));
    bench.router.will("a", [Act::Hang]);
    bench.router.will("b", [Act::Hang]);
    let begun = Instant::now();
    let fault = bench.proxy.call(completion("m")).await.expect_err("too late for c");
    assert_eq!(fault.class.code, Code::UpstreamTimeout);
    assert_eq!((begun.elapsed(), bench.router.asked().as_str()), (Duration::from_secs(20), "a b"));
}
