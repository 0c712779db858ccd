//! The LLM route: what the stack gets, what the client gets, ids, records and metrics.

use super::*;
use crate::{BindError, RouteConfig};
use forebay_types::{Blame, Class, Code, FinishReason, Retry, Usage};
use forebay_wire::{Api, Delta, Event, Generate, Prompt, RenderSpec};

fn llm_at(path: &str) -> EdgeConfig {
    let route = RouteConfig {
        path: path.into(),
        host: None,
        to: "llm".into(),
        strip_prefix: false,
        waf: None,
        timeout: None,
    };
    EdgeConfig { routes: vec![route], ..EdgeConfig::default() }
}

#[tokio::test]
async fn the_stack_gets_the_request_without_its_mount() {
    let edge = Running::start(llm_at("/api/v1/chat/"), Some(echo())).await;
    let answer = edge.raw(post("/api/v1/chat/completions?x=1", "{\"a\":1}")).await;
    assert_eq!(status(&answer), 200);
    assert_eq!(header(&answer, "content-type"), Some("application/json"));
    assert_eq!(body(&answer), r#"{"method":"POST","path":"/v1/chat/completions","body":"{\"a\":1}"}"#);
    let lost = edge.raw(get("/v1/models")).await;
    assert_eq!((status(&lost), lost.contains("unknown_url")), (404, true), "{lost}");
}

#[tokio::test]
async fn health_and_version_are_the_edges_own() {
    let edge = Running::start(EdgeConfig::default(), Some(echo())).await;
    let health = edge.raw(get("/health")).await;
    assert_eq!((status(&health), body(&health)), (200, r#"{"status":"ok","reasons":[]}"#));
    let version = edge.raw(get("/version")).await;
    assert_eq!((status(&version), body(&version)), (200, r#"{"version":"1.2.3"}"#));
    let head = edge.raw("HEAD /version HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert_eq!((status(&head), header(&head, "content-length"), body(&head)), (200, Some("19"), ""));
    let wrong = edge.raw(post("/health", "")).await;
    assert_eq!((status(&wrong), header(&wrong, "allow")), (405, Some("GET, HEAD")), "{wrong}");
}

#[tokio::test]
async fn ping_is_health_for_get_and_post() {
    let edge = Running::start(EdgeConfig::default(), Some(echo())).await;
    for ask in [get("/ping"), post("/ping", ""), post("/ping", "{}")] {
        let ping = edge.raw(ask).await;
        assert_eq!((status(&ping), body(&ping)), (200, r#"{"status":"ok","reasons":[]}"#));
    }
    let wrong =
        edge.raw("PUT /ping HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!((status(&wrong), header(&wrong, "allow")), (405, Some("GET, HEAD, POST")), "{wrong}");
}

#[tokio::test]
async fn metrics_are_shown_only_where_they_are_asked_for() {
    let check = async |config: EdgeConfig, shown: bool| {
        let edge = Running::start(config, Some(echo())).await;
        let answer = edge.raw(get("/metrics")).await;
        assert_eq!(answer.contains("# TYPE forebay_edge_requests_total"), shown, "{answer}");
        assert_eq!(
            header(&answer, "content-type").is_some_and(|t| t.starts_with("text/plain")),
            shown,
            "{answer}"
        );
    };
    check(EdgeConfig::default(), false).await;
    check(EdgeConfig { metrics: crate::Switch::On, ..EdgeConfig::default() }, true).await;
    // On an LLM route and nowhere else.
    check(EdgeConfig { metrics: crate::Switch::On, ..llm_at("/api/v1/chat/") }, false).await;
}

#[tokio::test]
async fn request_ids_are_taken_or_made_and_always_echoed() {
    let edge = Running::start(EdgeConfig::default(), Some(echo())).await;
    let with = |id: &str| {
        format!("GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-request-id: {id}\r\n\r\n")
    };
    let taken = edge.raw(with("abc-1")).await;
    assert_eq!(header(&taken, "x-request-id"), Some("abc-1"));
    let made = edge.raw(with("a b")).await;
    let id = header(&made, "x-request-id").unwrap();
    assert!(id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()), "{id}");
    let refused = edge.raw("GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\nx-request-id: r\r\n\r\n").await;
    assert_eq!(header(&refused, "x-request-id"), Some("r"));
    edge.metric_becomes("forebay_edge_requests_in_flight", "0").await;
    let record = edge.recent.find("abc-1").unwrap();
    assert_eq!((record.status, record.path.as_str(), record.method.as_str()), (200, "/v1/models", "GET"));
    assert_eq!(record.bytes_sent as usize, body(&taken).len());
    assert!(record.spans.iter().any(|span| span.what == "request"), "{:?}", record.spans);
    assert_eq!(edge.metric("forebay_edge_requests_total{code=\"2xx\",route=\"/\"}").as_deref(), Some("2"));
    assert_eq!(edge.metric("forebay_edge_requests_total{code=\"4xx\",route=\"none\"}").as_deref(), Some("1"));
}

#[tokio::test]
async fn traces_are_continued() {
    let stage = script(|flow| {
        let header = flow.origin.trace.context().header();
        Box::pin(async move { Ok(Reply::json(header)) })
    });
    let edge = Running::start(EdgeConfig::default(), Some(stage)).await;
    let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let answer = edge
        .raw(format!("GET /v1/m HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntraceparent: {parent}\r\n\r\n"))
        .await;
    let ours = body(&answer);
    assert!(ours.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-"), "{ours}");
    assert!(!ours.contains("00f067aa0ba902b7"), "a span of our own: {ours}");
}

#[tokio::test]
async fn faults_become_json_before_the_first_byte() {
    let stage = script(|_| {
        Box::pin(async {
            let class = Class::new(Code::TokensRateLimited, Blame::Client);
            let fault = Fault::new(class.retry(Retry::After(Duration::from_secs(7))), "too many tokens")
                .header("x-ratelimit-limit-tokens", "9")
                .detail("a secret thought");
            Err(fault)
        })
    });
    let edge = Running::start(EdgeConfig::default(), Some(stage)).await;
    let answer = edge.raw(post("/v1/chat/completions", "{}")).await;
    assert_eq!(status(&answer), 429);
    assert_eq!(header(&answer, "retry-after"), Some("7"));
    assert_eq!(header(&answer, "x-ratelimit-limit-tokens"), Some("9"));
    assert_eq!(header(&answer, "content-type"), Some("application/json"));
    assert!(answer.contains("too many tokens") && !answer.contains("secret"), "{answer}");
}

fn events(form: ReplyForm, with_spec: bool, events: Vec<Event>) -> LlmStage {
    script(move |_| {
        let chunks: Vec<_> = events.iter().map(|event| Ok(Chunk::Event(event.clone()))).collect();
        let mut reply = Reply::new(form, Box::pin(futures_util::stream::iter(chunks)));
        if with_spec {
            let prompt = Prompt::Text(vec!["hi".into()]);
            let call = Generate::new(Api::Completions, "m".into(), prompt);
            reply.render = Some(RenderSpec { stream: form == ReplyForm::Sse, ..RenderSpec::new(&call) });
        }
        reply.headers.insert("x-ratelimit-limit-requests", http::HeaderValue::from_static("5"));
        Box::pin(async { Ok(reply) })
    })
}

fn hello() -> Vec<Event> {
    vec![
        Event::Started { prompt_tokens: 1, cached_tokens: 0 },
        Event::Delta(Delta { text: "Hello".into(), tokens: 1, ..Delta::default() }),
        Event::Finished { choice: 0, reason: FinishReason::Stop, stop: None },
        Event::Done {
            usage: Usage { prompt_tokens: 1, completion_tokens: 1, cached_tokens: 0, ..Usage::default() },
        },
    ]
}

#[tokio::test]
async fn events_are_rendered_as_frames_or_collected() {
    let edge = Running::start(EdgeConfig::default(), Some(events(ReplyForm::Sse, true, hello()))).await;
    let answer = edge.raw(post("/v1/completions", "{}")).await;
    assert_eq!(header(&answer, "content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(header(&answer, "cache-control"), Some("no-cache"));
    assert_eq!(header(&answer, "x-accel-buffering"), Some("no"));
    assert_eq!(header(&answer, "x-ratelimit-limit-requests"), Some("5"));
    assert!(answer.contains("\"text\":\"Hello\"") && answer.contains("data: [DONE]\n\n"), "{answer}");

    let edge = Running::start(EdgeConfig::default(), Some(events(ReplyForm::Json, true, hello()))).await;
    let answer = edge.raw(post("/v1/completions", "{}")).await;
    let json: serde_json::Value = serde_json::from_str(body(&answer)).unwrap();
    assert_eq!(json["choices"][0]["text"], "Hello");
    assert_eq!(header(&answer, "x-ratelimit-limit-requests"), Some("5"));
}

#[tokio::test]
async fn half_a_reply_is_never_passed_for_a_whole_one() {
    let mut cut = hello();
    cut.truncate(2);
    let edge = Running::start(EdgeConfig::default(), Some(events(ReplyForm::Sse, true, cut.clone()))).await;
    let answer = edge.raw(post("/v1/completions", "{}")).await;
    assert!(answer.contains("\"error\"") && !answer.contains("[DONE]"), "{answer}");
    let edge = Running::start(EdgeConfig::default(), Some(events(ReplyForm::Json, true, cut))).await;
    assert_eq!(status(&edge.raw(post("/v1/completions", "{}")).await), 502);
    // A composition that forgot the spec is our defect, and says so.
    let edge = Running::start(EdgeConfig::default(), Some(events(ReplyForm::Json, false, hello()))).await;
    assert_eq!(status(&edge.raw(post("/v1/completions", "{}")).await), 500);
}

#[tokio::test]
async fn bind_says_what_to_do() {
    let deps = || EdgeDeps {
        llm: None,
        operator: None,
        client: HttpClient::default(),
        registry: Registry::new(),
        recent: RecentRequests::new(1),
        version: String::new(),
        health: Arc::new(Health::ready),
    };
    let env = FixedEnvironment::new();
    let no_llm = Edge::bind(&EdgeConfig::default(), &env, deps()).await.unwrap_err();
    assert!(matches!(no_llm, BindError::NoLlm), "{no_llm}");
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = taken.local_addr().unwrap();
    let config = EdgeConfig { listen: OneOrMany::one(addr.into()), ..EdgeConfig::default() };
    let error = Edge::bind(&config, &env, EdgeDeps { llm: Some(echo()), ..deps() }).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("address {addr} is already in use; stop the other program or set `edge.listen`")
    );
}

#[tokio::test]
async fn a_mount_takes_the_api_with_and_without_v1() {
    let edge = Running::start(llm_at("/ai/"), Some(echo())).await;
    for path in ["/ai/v1/chat/completions", "/ai/chat/completions?x=1"] {
        let answer = edge.raw(post(path, "")).await;
        assert!(answer.contains("\"path\":\"/v1/chat/completions\""), "{path}: {answer}");
    }
    assert_eq!(body(&edge.raw(get("/ai/version")).await), r#"{"version":"1.2.3"}"#);
}

#[test]
fn an_address_is_listened_on_once() {
    let check = |listen: &[&str], expect: &[&str]| {
        let listen = OneOrMany::from(listen.iter().map(|a| a.parse().unwrap()).collect::<Vec<_>>());
        let config = EdgeConfig { listen, ..EdgeConfig::default() };
        let found: Vec<_> = config.problems().iter().map(ToString::to_string).collect();
        assert_eq!(found, expect);
    };
    check(&["127.0.0.1:80", "127.0.0.1:81", "127.0.0.2:80", "[::1]:80", "localhost:80"], &[]);
    check(&["127.0.0.1:0", "127.0.0.1:0"], &[]);
    check(
        &["127.0.0.1:80", "[::1]:80", "127.0.0.1:80"],
        &["`edge.listen[2]`: the address 127.0.0.1:80 is already in the list; remove one of the two"],
    );
    check(
        &["0.0.0.0:80", "127.0.0.1:80"],
        &["`edge.listen[1]`: 0.0.0.0:80 takes 127.0.0.1:80 too; remove one of the two"],
    );
    check(
        &["localhost:80", "LOCALHOST:80"],
        &["`edge.listen[1]`: localhost:80 takes LOCALHOST:80 too; remove one of the two"],
    );
}

#[test]
fn the_configuration_is_read() {
    let config: EdgeConfig = serde_json::from_value(serde_json::json!({
        "listen": ["0.0.0.0:8443", "[::]:8443"],
        "tls": {"cert": "server.pem", "key": "file:server.key"},
        "routes": [
            {"path": "/v1/", "to": "llm"},
            {"path": "/api/v1/users/", "to": "http://127.0.0.1:9000", "waf": "off", "timeout": "5s"}
        ],
        "limits": {"max-body": "20MiB"},
        "drain-timeout": "1m",
        "drain-delay": "5s",
        "access-log": "off"
    }))
    .unwrap();
    assert_eq!(config.problems(), []);
    assert_eq!(config.listen.len(), 2);
    assert_eq!(config.limits.max_body, ByteSize::mib(20));
    assert_eq!(config.limits.max_headers, 100);
    assert!(serde_json::from_str::<EdgeConfig>(r#"{"lsten": "x:1"}"#).is_err());
    let schema = serde_json::to_string(&schemars::schema_for!(EdgeConfig)).unwrap();
    assert!(schema.contains("Largest request body"), "{schema}");
}
