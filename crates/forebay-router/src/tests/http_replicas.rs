use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use forebay_flow::{PromptIds, ReplyForm, Stage};
use forebay_types::{Code, Usage};
use forebay_wire::{Ask, Chunk};
use serde_json::{Value, json};

use super::script::{Engine, completion, drain, ids, request};
use super::server::{Server, json as answer, refusing, sse};
use super::{Bench, config};

pub(super) const STREAM: &str = "data: {\"choices\":[{\"index\":0,\"text\":\"Hi\"}]}\n\n\
    data: {\"choices\":[],\"usage\":{\"prompt_tokens\":100,\"completion_tokens\":7,\
    \"prompt_tokens_details\":{\"cached_tokens\":48}}}\n\ndata: [DONE]\n\n";

fn fleet(replicas: &[&str]) -> Value {
    // Probes once at the start and then never again: each test makes its own health.
    json!({
        "fleets": [{"model": "m", "replicas": replicas, "served-name": "served", "api-key": "env:KEY"}],
        "health": {"interval": "1h", "unhealthy-after": 100},
    })
}

/// Waits for something that another task is about to do.
pub(super) async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn a_call_is_forwarded_with_only_the_model_changed() {
    let server = Server::start(|_| sse(STREAM)).await;
    let bench = Bench::new(Some(&config(fleet(&[&server.url]))), &[]);
    let reply = bench.router.call(completion("m", 0..100)).await.expect("answered");
    assert_eq!(reply.headers["x-forebay-replica"], "replica-1");
    assert_eq!(reply.form, ReplyForm::Sse);
    assert_eq!(bench.load(0).0, 1);
    let chunks: Vec<Chunk> = drain(reply).await.into_iter().map(|chunk| chunk.expect("whole")).collect();
    assert_eq!(bench.load(0), (0, 0));

    // The usage frame that the client didn't ask for is swallowed, its numbers are not.
    let Chunk::Verbatim { bytes, usage, .. } = &chunks[1] else { panic!("{chunks:?}") };
    assert!(bytes.is_empty());
    assert_eq!(
        *usage,
        Some(Usage { prompt_tokens: 100, completion_tokens: 7, cached_tokens: 48, ..Usage::default() })
    );

    let seen = server.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].path, "/v1/completions");
    assert_eq!(seen[0].headers["authorization"], "Bearer sk-replica");
    assert_eq!(seen[0].headers["x-request-id"], "request-1");
    assert!(seen[0].headers.contains_key("traceparent"));
    assert_eq!(seen[0].headers["x-gateway-inference-fairness-id"], "anonymous");
    assert_eq!(
        seen[0].json(),
        json!({
            "model": "served", "prompt": "p", "stream": true, "max_tokens": 10,
            "stream_options": {"include_usage": true, "continuous_usage_stats": true},
        })
    );
    assert_eq!(bench.metric("forebay_router_prefix_cached_tokens_total"), [r#"{model="m"} 48"#]);
    assert_eq!(bench.metric("forebay_router_prompt_tokens_total"), [r#"{model="m"} 100"#]);
}

#[tokio::test]
async fn a_prefix_goes_back_to_who_has_it() {
    let (a, b) = (Server::start(|_| sse(STREAM)).await, Server::start(|_| sse(STREAM)).await);
    let bench = Bench::new(Some(&config(fleet(&[&a.url, &b.url]))), &[]);
    let mut went_to = Vec::new();
    for _ in 0..6 {
        let reply = bench.router.call(completion("m", 0..100)).await.expect("answered");
        went_to.push(reply.headers["x-forebay-replica"].to_str().expect("text").to_owned());
        drain(reply).await;
    }
    assert!(went_to.iter().all(|replica| *replica == went_to[0]), "{went_to:?}");
    // The first by lot, the others because the prefix is there.
    let decisions = bench.metric("forebay_router_decisions_total");
    let chosen = if went_to[0] == "replica-1" { 0 } else { 1 };
    assert_eq!(
        decisions,
        [
            format!(r##"{{model="m",reason="prefix",replica="#{chosen}"}} 5"##),
            format!(r##"{{model="m",reason="tie",replica="#{chosen}"}} 1"##),
        ]
    );
    // 6 whole blocks of 16, five times.
    assert_eq!(bench.metric("forebay_router_prefix_matched_tokens_total"), [r#"{model="m"} 480"#]);
}

#[tokio::test]
async fn a_salt_keeps_prefixes_apart() {
    let (a, b) = (Server::start(|_| sse(STREAM)).await, Server::start(|_| sse(STREAM)).await);
    let bench = Bench::new(Some(&config(fleet(&[&a.url, &b.url]))), &[]);
    for salt in ["s", "t", "s"] {
        let body = format!(r#"{{"model": "m", "prompt": "p", "stream": true, "cache_salt": "{salt}"}}"#);
        let reply = bench.router.call(request("m", "/v1/completions", &body, ids(0..100))).await;
        drain(reply.expect("answered")).await;
    }
    assert_eq!(bench.metric("forebay_router_prefix_matched_tokens_total"), [r#"{model="m"} 96"#]);
}

/// The gateway gives it where consumers are cached apart; the body is still the client's.
#[tokio::test]
async fn the_salt_of_a_call_goes_to_the_replica() {
    let server = Server::start(|_| sse(STREAM)).await;
    let bench = Bench::new(Some(&config(fleet(&[&server.url]))), &[]);
    let mut flow = completion("m", 0..100);
    let Ask::Generate(call) = &mut flow.stage.ask else { panic!("a completion") };
    call.cache_salt = Some("derived".into());
    drain(bench.router.call(flow).await.expect("answered")).await;
    assert_eq!(server.seen()[0].json()["cache_salt"], "derived");
}

#[tokio::test]
async fn a_dead_replica_is_replaced_unseen_and_then_left_out() {
    let ((dead, _held), alive) = (refusing(), Server::start(|_| sse(STREAM)).await);
    let bench = Bench::new(Some(&config(fleet(&[&dead, &alive.url]))), &[]);
    // Which of the two is first is drawn by lot, until the dead one was met.
    for n in 0.. {
        let prompt = n * 1000..n * 1000 + 100;
        let reply = bench.router.call(completion("m", prompt)).await.expect("answered by the other");
        assert_eq!(reply.headers["x-forebay-replica"], "replica-2");
        drain(reply).await;
        if !bench.router.fleets()[0].replicas[0].up {
            break;
        }
        assert!(n < 1000, "the dead one is never drawn");
    }
    assert_eq!(bench.metric("forebay_router_retries_total"), [r#"{model="m"} 1"#]);
    assert_eq!(bench.metric("forebay_router_healthy")[0], r##"{model="m",replica="#0"} 0"##);
    assert_eq!(bench.load(0), (0, 0));
    for n in 0..20 {
        drain(bench.router.call(completion("m", n..n + 100)).await.expect("answered")).await;
    }
    assert_eq!(bench.metric("forebay_router_retries_total"), [r#"{model="m"} 1"#], "met only once");
}

#[tokio::test]
async fn failures_before_the_first_byte() {
    // Answers of a replica, and how many replicas are asked.
    let check = async |status: u16, body: &'static str, asked: usize, code: Code| {
        let servers = [
            Server::start(move |_| answer(status, body)).await,
            Server::start(move |_| answer(status, body)).await,
        ];
        let bench = Bench::new(Some(&config(fleet(&[&servers[0].url, &servers[1].url]))), &[]);
        let fault = bench.router.call(completion("m", 0..100)).await.expect_err("refused");
        assert_eq!(fault.class.code, code, "{status}");
        assert_eq!(servers[0].seen().len() + servers[1].seen().len(), asked, "{status}");
        assert_eq!((bench.load(0), bench.load(1)), ((0, 0), (0, 0)));
        assert!(bench.router.fleets()[0].replicas.iter().all(|replica| replica.up), "{status} is not down");
    };
    check(400, r#"{"error":{"message":"no"}}"#, 1, Code::BadRequest).await;
    check(500, "{}", 2, Code::UpstreamFailed).await;
    check(503, "{}", 2, Code::Overloaded).await;
    check(404, "{}", 2, Code::ModelUnavailable).await;
}

#[tokio::test]
async fn attempts_are_limited() {
    let servers = [
        Server::start(|_| answer(500, "{}")).await,
        Server::start(|_| answer(500, "{}")).await,
        Server::start(|_| answer(500, "{}")).await,
    ];
    let urls: Vec<&str> = servers.iter().map(|server| server.url.as_str()).collect();
    let mut yaml = fleet(&urls);
    yaml["attempts-max"] = json!(2);
    let bench = Bench::new(Some(&config(yaml)), &[]);
    bench.router.call(completion("m", 0..100)).await.expect_err("all fail");
    let asked: Vec<usize> = servers.iter().map(|server| server.seen().len()).collect();
    assert_eq!(asked.iter().sum::<usize>(), 2);
    assert!(asked.iter().all(|&n| n <= 1), "never the same one twice: {asked:?}");
}

#[tokio::test]
async fn a_stream_that_is_cut_is_an_error_and_gives_the_load_back() {
    let cut = "data: {\"choices\":[{\"index\":0,\"text\":\"Hi\"}]}\n\n";
    let server = Server::start(move |_| sse(cut)).await;
    let bench = Bench::new(Some(&config(fleet(&[&server.url]))), &[]);
    let reply = bench.router.call(completion("m", 0..100)).await.expect("begun");
    let chunks = drain(reply).await;
    assert_eq!(chunks.len(), 2);
    assert_eq!(chunks[1].as_ref().expect_err("cut").class.code, Code::UpstreamFailed);
    assert_eq!(bench.load(0), (0, 0));
    assert_eq!(server.seen().len(), 1, "nothing is retried after the first byte");
}

#[tokio::test]
async fn a_cut_stream_is_counted_as_far_as_it_came_and_says_the_clients_name() {
    const CUT: &str = "data: {\"model\":\"served\",\"choices\":[{\"index\":0,\"text\":\"Hi\"}],\
        \"usage\":{\"prompt_tokens\":34,\"completion_tokens\":2}}\n\n";
    let server = Server::start(|_| sse(CUT)).await;
    let bench = Bench::new(Some(&config(fleet(&[&server.url]))), &[]);
    let chunks = drain(bench.router.call(completion("m", 0..100)).await.expect("begun")).await;
    let Ok(Chunk::Verbatim { bytes, usage, .. }) = &chunks[0] else { panic!("{chunks:?}") };
    assert_eq!(bytes, "data: {\"model\":\"alias\",\"choices\":[{\"index\":0,\"text\":\"Hi\"}]}\n\n");
    assert_eq!(
        *usage,
        Some(Usage { prompt_tokens: 34, completion_tokens: 2, cached_tokens: 0, ..Usage::default() })
    );
    chunks[1].as_ref().expect_err("cut");
}

#[tokio::test]
async fn a_replica_that_is_strict_about_options_is_asked_without() {
    let server =
        Server::start(|seen| match seen.json()["stream_options"]["continuous_usage_stats"].as_bool() {
            Some(_) => {
                answer(422, r#"{"error":{"message":"extra fields: stream_options.continuous_usage_stats"}}"#)
            }
            None => sse(STREAM),
        })
        .await;
    let bench = Bench::new(Some(&config(fleet(&[&server.url]))), &[]);
    let asked = async || {
        drain(bench.router.call(completion("m", 0..100)).await.expect("answered")).await;
        server.seen().len()
    };
    assert_eq!((asked().await, asked().await), (2, 3), "it is remembered");
    // A client that asks for it itself is told.
    let body = r#"{"model": "m", "prompt": "p", "stream": true, "stream_options":
        {"include_usage": true, "continuous_usage_stats": true}}"#;
    let fault =
        bench.router.call(request("m", "/v1/completions", body, ids(0..100))).await.expect_err("refused");
    assert_eq!(fault.class.code, Code::BadRequest);
}

/// Its probes are fine, so only its answers tell.
#[tokio::test]
async fn a_replica_that_keeps_failing_cools_off() {
    for status in [500, 429, 503] {
        let (bad, good) =
            (Server::start(move |_| answer(status, "{}")).await, Server::start(|_| sse(STREAM)).await);
        let mut yaml = fleet(&[&bad.url, &good.url]);
        yaml["health"]["cool-off-after"] = json!(2);
        yaml["health"]["cool-off"] = json!("1h");
        let bench = Bench::new(Some(&config(yaml)), &[]);
        for n in 0..200 {
            drain(bench.router.call(completion("m", n * 1000..n * 1000 + 100)).await.expect("answered"))
                .await;
        }
        assert_eq!(bad.seen().len(), 2, "{status}");
        let cooling: Vec<_> = bench.router.fleets()[0].replicas.iter().map(|r| (r.up, r.cooling)).collect();
        assert_eq!(cooling, [(true, true), (true, false)]);
        assert_eq!(bench.metric("forebay_router_cool_offs_total")[0], r##"{model="m",replica="#0"} 1"##);
        assert!(bench.metric("forebay_router_healthy").iter().all(|line| line.ends_with(" 1")));
    }
}

#[tokio::test]
async fn with_nobody_else_left_those_that_cool_off_are_tried() {
    let works = Arc::new(AtomicBool::new(false));
    let says = Arc::clone(&works);
    let server = Server::start(move |_| match says.load(Ordering::Relaxed) {
        true => sse(STREAM),
        false => answer(500, "{}"),
    })
    .await;
    let (dead, _held) = refusing();
    let mut yaml = fleet(&[&server.url, &dead]);
    yaml["health"]["cool-off-after"] = json!(1);
    yaml["health"]["cool-off"] = json!("1h");
    let bench = Bench::new(Some(&config(yaml)), &[]);
    for _ in 0..5 {
        let fault = bench.router.call(completion("m", 0..100)).await.expect_err("fails");
        assert_eq!(fault.class.code, Code::UpstreamFailed);
    }
    assert_eq!(server.seen().len(), 5);
    works.store(true, Ordering::Relaxed);
    drain(bench.router.call(completion("m", 0..100)).await.expect("answered")).await;
    assert!(!bench.router.fleets()[0].replicas[0].cooling, "a success forgets");
}

#[tokio::test]
async fn a_clients_mistakes_dont_count_against_a_replica() {
    let server = Server::start(|_| answer(400, r#"{"error":{"message":"no"}}"#)).await;
    let mut yaml = fleet(&[&server.url]);
    yaml["health"]["cool-off-after"] = json!(1);
    let bench = Bench::new(Some(&config(yaml)), &[]);
    bench.router.call(completion("m", 0..100)).await.expect_err("refused");
    assert!(!bench.router.fleets()[0].replicas[0].cooling);
}

#[tokio::test]
async fn tokenize_and_detokenize_are_forwarded() {
    let server = Server::start(|seen| match seen.path.as_str() {
        "/tokenize" => answer(200, r#"{"count": 1}"#),
        "/detokenize" => answer(200, r#"{"prompt": "p"}"#),
        _ => answer(404, "{}"),
    })
    .await;
    let bench = Bench::new(Some(&config(fleet(&[&server.url]))), &[]);
    let check = async |path: &str, body: &str, sent: Value, got: &str| {
        let reply = bench.router.call(request("m", path, body, PromptIds::none())).await.expect("answered");
        let chunks = drain(reply).await;
        let Ok(Chunk::Verbatim { bytes, .. }) = &chunks[0] else { panic!("{chunks:?}") };
        assert_eq!(bytes, got);
        assert_eq!(server.seen().last().expect("asked").json(), sent);
    };
    let sent = json!({"prompt": "p", "model": "served"});
    check("/tokenize", r#"{"prompt": "p"}"#, sent, r#"{"count": 1}"#).await;
    let sent = json!({"model": "served", "tokens": [1]});
    check("/detokenize", r#"{"model": "alias", "tokens": [1]}"#, sent, r#"{"prompt": "p"}"#).await;
}

#[tokio::test]
async fn probes_take_a_replica_out_and_bring_it_back() {
    let healthy = Arc::new(AtomicBool::new(true));
    let says = Arc::clone(&healthy);
    let server = Server::start(move |seen| match seen.path.as_str() {
        "/health" if !says.load(Ordering::Relaxed) => answer(503, "{}"),
        "/health" => answer(200, ""),
        _ => sse(STREAM),
    })
    .await;
    let yaml = json!({
        "fleets": [{"model": "m", "replicas": [server.url]}],
        "health": {"interval": "100ms", "unhealthy-after": 2, "healthy-after": 2},
    });
    let bench = Bench::new(Some(&config(yaml)), &[]);
    eventually("ready after the first good probe", || bench.router.ready()).await;
    healthy.store(false, Ordering::Relaxed);
    eventually("down", || !bench.router.ready()).await;
    let fault = bench.router.call(completion("m", 0..10)).await.expect_err("down");
    assert_eq!(
        (fault.class.code, fault.message.as_str()),
        (Code::ModelUnavailable, "no ready replica serves `m`")
    );
    assert_eq!(bench.metric("forebay_router_refused_total"), [r#"{model="m",reason="no_replica"} 1"#]);
    healthy.store(true, Ordering::Relaxed);
    eventually("up again", || bench.router.ready()).await;
    drain(bench.router.call(completion("m", 0..10)).await.expect("answered")).await;
}

#[tokio::test]
async fn an_http_replica_is_not_ready_before_it_answered_a_probe() {
    let (dead, _held) = refusing();
    let bench = Bench::new(Some(&config(fleet(&[&dead]))), &[]);
    let replica = &bench.router.fleets()[0].replicas[0];
    assert!(replica.up && !replica.proved);
    assert!(!bench.router.ready());
}

#[tokio::test]
async fn probing_ends_with_the_router() {
    let probes = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&probes);
    let server = Server::start(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
        answer(200, "")
    })
    .await;
    let yaml = json!({
        "fleets": [{"model": "m", "replicas": [server.url]}],
        "health": {"interval": "100ms"},
    });
    let bench = Bench::new(Some(&config(yaml)), &[]);
    eventually("probed", || probes.load(Ordering::Relaxed) > 0).await;
    let prefixes = Arc::downgrade(&bench.prefix.model(&"m".into()));
    drop(bench);
    // The probing task held the last reference to it.
    eventually("the task is gone", || prefixes.strong_count() == 0).await;
}

#[tokio::test]
async fn engine_and_server_in_one_fleet() {
    let engine = Engine::new();
    let server = Server::start(|_| sse(STREAM)).await;
    let bench = Bench::new(Some(&config(fleet(&["engine", &server.url]))), &[("m", &engine)]);
    // The engine has the prompt, as its own events say.
    let mut hasher = forebay_kv::BlockHasher::new(16, None);
    hasher.extend(&(0..96).collect::<Vec<_>>());
    let stored = forebay_kv::KvEvent::Stored {
        hashes: hasher.hashes().to_vec(),
        parent: None,
        tokens: (0..96).collect(),
        block_size: 16,
        cache_salt: None,
    };
    bench.prefix.sink(&"m".into(), &"engine".into())(&[stored]);
    let script = engine.will_answer();
    let reply = bench.router.call(completion("m", 0..100)).await.expect("answered");
    assert_eq!(reply.headers["x-forebay-replica"], "engine");
    drop((script, reply));

    // The engine is full, so the server gets it, though it has to compute everything.
    let class = forebay_types::Class::new(Code::Overloaded, forebay_types::Blame::Us)
        .retry(forebay_types::Retry::After(Duration::from_secs(1)));
    engine.will_fail(forebay_types::Fault::new(class, "queue full"));
    let reply = bench.router.call(completion("m", 0..100)).await.expect("answered");
    assert_eq!(reply.headers["x-forebay-replica"], "replica-2");
}

#[tokio::test]
async fn embeddings_are_forwarded_and_counted() {
    const VECTORS: &str = r#"{"object":"list","data":[],"model":"served","usage":{"prompt_tokens":100}}"#;
    let server = Server::start(|_| answer(200, VECTORS)).await;
    let bench = Bench::new(Some(&config(fleet(&[&server.url]))), &[]);
    let body = r#"{"model": "m", "input": "a", "dimensions": 8}"#;
    let reply = bench.router.call(request("m", "/v1/embeddings", body, ids(0..100))).await.expect("answered");
    assert_eq!(reply.form, ReplyForm::Json);
    let chunks: Vec<Chunk> = drain(reply).await.into_iter().map(|chunk| chunk.expect("whole")).collect();
    let Chunk::Verbatim { bytes, .. } = &chunks[0] else { panic!("{chunks:?}") };
    assert_eq!(*bytes, VECTORS.replace("served", "m"));
    assert_eq!(server.seen()[0].json(), json!({"model": "served", "input": "a", "dimensions": 8}));
    assert_eq!(bench.load(0), (0, 0));
    assert_eq!(bench.metric("forebay_router_prompt_tokens_total"), [r#"{model="m"} 100"#]);
}
