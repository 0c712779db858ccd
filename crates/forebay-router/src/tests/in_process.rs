use std::time::Duration;

use forebay_flow::{PromptIds, Stage};
use forebay_kv::{BlockHasher, KvEvent};
use forebay_types::{Blame, Class, Code, Fault, Retry};
use futures_util::StreamExt;
use serde_json::json;

use super::script::{Engine, completion, done, drain, request, started, token};
use super::{Bench, config};

#[tokio::test(start_paused = true)]
async fn a_request_is_counted_from_placement_to_its_end() {
    let engine = Engine::new();
    let bench = Bench::new(None, &[("m", &engine)]);
    let script = engine.will_answer();
    let flow = completion("m", 0..100);
    let trace = flow.origin.trace.clone();
    let mut reply = bench.router.call(flow).await.expect("placed");
    assert_eq!(reply.headers["x-forebay-replica"], "engine");
    assert_eq!(bench.load(0), (1, 100));

    script.send(started(100, 64)).await.expect("listening");
    assert_eq!(reply.chunks.next().await.expect("a chunk").expect("fine"), started(100, 64).expect("fine"));
    assert_eq!(bench.load(0), (1, 36));
    script.send(token()).await.expect("listening");
    reply.chunks.next().await.expect("a chunk").expect("fine");
    assert_eq!(bench.load(0), (1, 0));
    script.send(done(100, 1)).await.expect("listening");
    reply.chunks.next().await.expect("a chunk").expect("fine");
    assert_eq!(bench.load(0), (0, 0), "finished, though the stream is still held");

    let spans: Vec<_> = trace.spans().into_iter().map(|span| (span.what, span.why)).collect();
    assert_eq!(spans[0].0, "place");
    assert_eq!(spans[0].1, "engine, only: cached part of 100 tokens not looked up (one replica)");
    assert_eq!(spans[1], ("replica", "engine answers".to_owned()));
    assert_eq!(
        bench.metric("forebay_router_decisions_total"),
        [r##"{model="m",reason="only",replica="#0"} 1"##]
    );
    assert_eq!(bench.metric("forebay_router_prefix_cached_tokens_total"), [r#"{model="m"} 64"#]);
    assert_eq!(bench.metric("forebay_router_prefix_matched_tokens_total"), [r#"{model="m"} 64"#]);
    assert_eq!(bench.metric("forebay_router_in_flight"), [r##"{model="m",replica="#0"} 0"##]);
}

#[tokio::test(start_paused = true)]
async fn leaving_or_breaking_off_gives_the_load_back() {
    let engine = Engine::new();
    let bench = Bench::new(None, &[("m", &engine)]);

    let script = engine.will_answer();
    let reply = bench.router.call(completion("m", 0..100)).await.expect("placed");
    drop(reply);
    assert_eq!(bench.load(0), (0, 0));
    assert!(script.is_closed(), "the engine's stream is dropped with the reply");

    let script = engine.will_answer();
    let mut reply = bench.router.call(completion("m", 0..100)).await.expect("placed");
    script.send(Err(Fault::internal("broke"))).await.expect("listening");
    reply.chunks.next().await.expect("an item").expect_err("broken off");
    assert_eq!(bench.load(0), (0, 0));

    engine.will_fail(Fault::bad_request("no"));
    bench.router.call(completion("m", 0..100)).await.expect_err("refused");
    assert_eq!(bench.load(0), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_full_fleet_refuses_until_a_prompt_is_computed() {
    let engine = Engine::new();
    let bench = Bench::new(Some(&config(json!({"queued-tokens-max": 150}))), &[("m", &engine)]);
    let first = engine.will_answer();
    let mut reply = bench.router.call(completion("m", 0..100)).await.expect("placed");

    let fault = bench.router.call(completion("m", 0..60)).await.expect_err("full");
    assert_eq!(fault.class.code, Code::Overloaded);
    // 10 tokens over the limit, at the rate assumed of an unmeasured replica.
    assert_eq!(fault.class.retry, Retry::After(Duration::from_millis(5)));
    assert!(fault.message.contains("`router.queued-tokens-max`) is 150"), "{}", fault.message);
    assert_eq!(bench.metric("forebay_router_refused_total"), [r#"{model="m",reason="saturated"} 1"#]);

    first.send(token()).await.expect("listening");
    reply.chunks.next().await.expect("a chunk").expect("fine");
    let _second = engine.will_answer();
    let _reply = bench.router.call(completion("m", 0..60)).await.expect("there is room");
}

#[tokio::test(start_paused = true)]
async fn a_cached_prompt_is_let_in_where_an_uncached_one_is_not() {
    let engine = Engine::new();
    let bench = Bench::new(Some(&config(json!({"queued-tokens-max": 150}))), &[("m", &engine)]);
    let mut hasher = BlockHasher::new(16, None);
    hasher.extend(&(0..96).collect::<Vec<_>>());
    let stored = KvEvent::Stored {
        hashes: hasher.hashes().to_vec(),
        parent: None,
        tokens: (0..96).collect(),
        block_size: 16,
        cache_salt: None,
    };
    bench.prefix.sink(&"m".into(), &"engine".into())(&[stored]);

    let _first = engine.will_answer();
    let _reply = bench.router.call(completion("m", 1000..1100)).await.expect("placed");
    bench.router.call(completion("m", 2000..2100)).await.expect_err("full");
    let _second = engine.will_answer();
    let reply = bench.router.call(completion("m", 0..100)).await.expect("4 uncached tokens fit");
    assert_eq!(bench.load(0), (2, 104));
    drop(reply);
    assert_eq!(bench.load(0), (1, 100));
}

#[tokio::test(start_paused = true)]
async fn fleets_without_a_file_and_what_is_not_a_fleets() {
    let (a, b) = (Engine::new(), Engine::new());
    let bench = Bench::new(None, &[("b", &b), ("a", &a)]);
    assert!(bench.router.ready());
    let names: Vec<_> = bench.router.fleets().into_iter().map(|fleet| fleet.model.to_string()).collect();
    assert_eq!(names, ["a", "b"]);

    let fault = bench.router.call(completion("c", 0..1)).await.expect_err("unknown");
    assert_eq!((fault.class.code, fault.message.as_str()), (Code::ModelNotFound, "no fleet serves `c`"));
    let listing = request("a", "/v1/models", "", PromptIds::none());
    assert_eq!(bench.router.call(listing).await.expect_err("not here").class.code, Code::Internal);

    // Tokenizing goes to the engine, and no queue keeps it out.
    let script = a.will_answer();
    drop(script);
    let body = r#"{"model": "x", "prompt": "p"}"#;
    let reply = bench.router.call(request("a", "/tokenize", body, PromptIds::none())).await.expect("placed");
    assert!(drain(reply).await.is_empty());
    assert_eq!((*a.asked.lock(), *b.asked.lock()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn an_engines_own_refusal_is_passed_on() {
    let engine = Engine::new();
    let bench = Bench::new(None, &[("m", &engine)]);
    let class = Class::new(Code::Overloaded, Blame::Us).retry(Retry::After(Duration::from_secs(3)));
    engine.will_fail(Fault::new(class, "queue full"));
    let fault = bench.router.call(completion("m", 0..10)).await.expect_err("refused");
    assert_eq!((fault.class, fault.message.as_str()), (class, "queue full"));
}

#[tokio::test(start_paused = true)]
async fn mistakes_in_the_file() {
    let check = |yaml: serde_json::Value, at: Option<&str>, text: &str| {
        let engine = Engine::new();
        let config = config(yaml);
        let Err(error) = Bench::try_new(Some(&config), &[("m", &engine)]) else { panic!("{text}: built") };
        assert_eq!((error.at(), error.to_string().as_str()), (at, text));
    };
    check(
        json!({"fleets": [{"model": "m", "replicas": ["engine"]}, {"model": "m", "replicas": ["http://a"]}]}),
        Some("router.fleets[1].model"),
        "two fleets serve `m`; list all replicas in one",
    );
    check(
        json!({"fleets": [{"model": "m", "replicas": []}]}),
        Some("router.fleets[0].replicas"),
        "the fleet `m` has no replicas; `engine` is the one in this process",
    );
    check(
        json!({"fleets": [{"model": "n", "replicas": ["http://a", "engine"]}]}),
        Some("router.fleets[0].replicas[1]"),
        "no engine in this process serves `n` (there is `m`); set `engine.model`, or name a URL",
    );
    check(
        json!({"fleets": [{"model": "m", "replicas": ["http://a", "http://a/"]}]}),
        Some("router.fleets[0].replicas[1]"),
        "`http://a` is listed twice",
    );
    check(
        json!({"fleets": [{"model": "m", "replicas": ["http://a"], "api-key": "env:NOT_SET"}]}),
        Some("router.fleets[0].api-key"),
        "the fleet's key can't be read",
    );
    let nothing = config(json!({}));
    let Err(error) = Bench::try_new(Some(&nothing), &[]) else { panic!("built from nothing") };
    assert_eq!(
        error.to_string(),
        "there is neither an engine in this process nor a fleet; add an `engine` section or `router.fleets`"
    );
}
