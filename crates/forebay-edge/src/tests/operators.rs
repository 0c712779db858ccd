//! What is answered for the process itself, and who may ask: keys, pages, load.

use std::sync::atomic::{AtomicBool, Ordering};

use forebay_config::Secret;

use super::*;
use crate::{OperatorAsk, OperatorFuture, OperatorLoad, Switch};

/// Says what it was asked.
#[derive(Default)]
struct Scripted {
    aborted: Arc<AtomicBool>,
    /// It does not come back from an abort.
    hangs: bool,
}

impl Operator for Scripted {
    fn answer(&self, ask: OperatorAsk) -> OperatorFuture<Result<Option<serde_json::Value>, Fault>> {
        let body = String::from_utf8_lossy(&ask.body).into_owned();
        Box::pin(async move {
            match ask.query.as_deref() {
                Some("nothing") => Ok(None),
                Some("wrong") => Err(Fault::bad_request("no")),
                query => Ok(Some(serde_json::json!({"query": query, "body": body}))),
            }
        })
    }

    fn load(&self) -> Option<OperatorLoad> {
        Some(OperatorLoad { kv_cache_usage: 0.25, requests_waiting: 3 })
    }

    fn abort_all(&self) -> OperatorFuture<bool> {
        self.aborted.store(true, Ordering::Release);
        if self.hangs {
            return Box::pin(std::future::pending());
        }
        Box::pin(std::future::ready(true))
    }
}

fn open() -> EdgeConfig {
    EdgeConfig { operator_api: Switch::On, ..EdgeConfig::default() }
}

async fn start(config: EdgeConfig, llm: LlmStage) -> Running {
    let operator: Arc<dyn Operator> = Arc::new(Scripted::default());
    Running::start_with(config, Some(llm), Some(operator), &FixedEnvironment::new()).await
}

fn with_headers(method: &str, path: &str, headers: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{headers}content-length: 0\r\n\r\n")
}

#[tokio::test]
async fn operators_are_answered_only_where_it_is_configured() {
    let edge = start(open(), echo()).await;
    let answer = edge.raw(post("/pause?mode=keep", "hi")).await;
    assert_eq!((status(&answer), body(&answer)), (200, r#"{"query":"mode=keep","body":"hi"}"#));
    let empty = edge.raw(post("/pause?nothing", "")).await;
    assert_eq!((status(&empty), body(&empty)), (200, ""));
    assert_eq!(status(&edge.raw(post("/pause?wrong", "")).await), 400);
    assert_eq!(body(&edge.raw(get("/load")).await), r#"{"server_load":0}"#);

    let edge = start(EdgeConfig::default(), echo()).await;
    for path in ["/pause", "/load"] {
        let passed = edge.raw(get(path)).await;
        assert!(body(&passed).contains(&format!("\"path\":\"{path}\"")), "{passed}");
    }
}

#[tokio::test]
async fn load_counts_requests_until_their_last_byte() {
    let (stage, mut fed) = streaming();
    let edge = start(open(), stage).await;
    let mut tcp = edge.connect().await;
    tcp.write_all(post("/v1/completions", "{}").as_bytes()).await.unwrap();
    let feed = fed.recv().await.unwrap();
    assert_eq!(body(&edge.raw(get("/load")).await), r#"{"server_load":1}"#);
    drop(feed);
    read_to_end(&mut tcp).await;
    edge.metric_becomes("forebay_edge_llm_requests_in_flight", "0").await;
    assert_eq!(body(&edge.raw(get("/load")).await), r#"{"server_load":0}"#);
}

#[tokio::test]
async fn who_asks_for_the_load_is_told_with_the_answer() {
    let edge = start(open(), echo()).await;
    let told = async |format: &str| {
        let headers = format!("endpoint-load-metrics-format: {format}\r\n");
        let answer = edge.raw(with_headers("POST", "/v1/completions", &headers)).await;
        header(&answer, "endpoint-load-metrics").map(str::to_owned)
    };
    let text = "TEXT named_metrics.kv_cache_usage_perc=0.25, named_metrics.num_requests_waiting=3.0";
    assert_eq!(told("TEXT").await.as_deref(), Some(text));
    assert_eq!(told("other").await, None);
    assert_eq!(header(&edge.raw(post("/v1/completions", "")).await, "endpoint-load-metrics"), None);
}

#[tokio::test]
async fn a_key_opens_what_is_behind_it() {
    let keys = vec![Secret::plain("k1"), Secret::env("K2")];
    let config = EdgeConfig { access_keys: keys, ..open() };
    let operator: Arc<dyn Operator> = Arc::new(Scripted::default());
    let env = FixedEnvironment::new().with_var("K2", "k2");
    let edge = Running::start_with(config, Some(echo()), Some(operator), &env).await;
    let check = async |method: &str, path: &str, key: &str, expect: u16| {
        let headers = if key.is_empty() { String::new() } else { format!("authorization: Bearer {key}\r\n") };
        let answer = edge.raw(with_headers(method, path, &headers)).await;
        assert_eq!(status(&answer), expect, "{method} {path} {key:?}: {answer}");
        if expect == 401 {
            assert_eq!(body(&answer), r#"{"error":"Unauthorized"}"#);
            assert_eq!(header(&answer, "www-authenticate"), Some("Bearer"));
            assert_eq!(header(&answer, "connection"), Some("close"), "the body may be unread");
        }
    };
    check("POST", "/v1/completions", "", 401).await;
    check("POST", "/v1/completions", "k1", 200).await;
    check("GET", "/v1/models", "k2", 200).await;
    check("GET", "/v1/models", "k3", 401).await;
    check("POST", "/inference/v1/generate", "", 401).await;
    // As in vLLM.
    check("POST", "/tokenize", "", 200).await;
    check("GET", "/health", "", 200).await;
    check("GET", "/load", "", 200).await;
    // Stricter than vLLM.
    check("POST", "/pause", "", 401).await;
    check("POST", "/pause", "k1", 200).await;
}

#[tokio::test]
async fn pages_are_let_in_where_their_origin_is_listed() {
    let config = EdgeConfig {
        cors_origins: vec!["http://app".into()],
        access_keys: vec![Secret::plain("k")],
        ..open()
    };
    let edge = start(config, echo()).await;
    let ask = "origin: http://app\r\naccess-control-request-method: POST\r\naccess-control-request-headers: authorization\r\n";
    let preflight = edge.raw(with_headers("OPTIONS", "/v1/completions", ask)).await;
    assert_eq!(status(&preflight), 200, "without a key, which browsers don't send with it");
    assert_eq!(header(&preflight, "access-control-allow-origin"), Some("http://app"));
    assert_eq!(header(&preflight, "access-control-allow-headers"), Some("authorization"));
    let own = "origin: http://app\r\nauthorization: Bearer k\r\n";
    let answer = edge.raw(with_headers("POST", "/v1/completions", own)).await;
    assert_eq!((status(&answer), header(&answer, "access-control-allow-origin")), (200, Some("http://app")));
    let strange = ask.replace("http://app", "http://evil");
    let refused = edge.raw(with_headers("OPTIONS", "/v1/completions", &strange)).await;
    assert_eq!((status(&refused), header(&refused, "access-control-allow-origin")), (401, None));
    // A page can send this without asking first.
    let pause = edge.raw(with_headers("POST", "/pause", own)).await;
    assert_eq!(status(&pause), 403, "{pause}");
}

#[tokio::test]
async fn what_runs_at_the_end_of_a_drain_is_aborted() {
    let (stage, mut fed) = streaming();
    let operator = Scripted::default();
    let aborted = operator.aborted.clone();
    let config = EdgeConfig { drain_timeout: HumanDuration::from_millis(20), ..EdgeConfig::default() };
    let operator: Arc<dyn Operator> = Arc::new(operator);
    let mut edge = Running::start_with(config, Some(stage), Some(operator), &FixedEnvironment::new()).await;
    let mut tcp = edge.connect().await;
    tcp.write_all(post("/v1/completions", "{}").as_bytes()).await.unwrap();
    let feed = fed.recv().await.unwrap();
    edge.shut_down();
    within(async {
        while !aborted.load(Ordering::Acquire) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    // As an engine does that is told to end its requests.
    feed.send(verbatim("data: last words\n\n")).await.unwrap();
    drop(feed);
    assert!(read_to_end(&mut tcp).await.contains("last words"));
    assert_eq!(edge.drained().await.cut, 0);
}

#[tokio::test]
async fn a_drain_has_an_end_where_an_abort_hangs() {
    let (stage, mut fed) = streaming();
    let operator: Arc<dyn Operator> = Arc::new(Scripted { hangs: true, ..Scripted::default() });
    let config = EdgeConfig { drain_timeout: HumanDuration::from_millis(20), ..EdgeConfig::default() };
    let edge = Running::start_with(config, Some(stage), Some(operator), &FixedEnvironment::new()).await;
    let mut tcp = edge.connect().await;
    tcp.write_all(post("/v1/completions", "{}").as_bytes()).await.unwrap();
    let _feed = fed.recv().await.unwrap();
    // Nothing is sent any more: only time passes.
    tokio::time::pause();
    assert_eq!(edge.drained().await.cut, 1);
}
