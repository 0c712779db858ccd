use std::sync::atomic::{AtomicUsize, Ordering};

use forebay_flow::{ReplyForm, Stage};
use forebay_types::{Code, Usage};
use forebay_wire::Chunk;
use futures_util::StreamExt;
use serde_json::{Value, json};

use super::script::{completion, request, text};
use super::server::{Answer, Server, json as answer, refusing, sse};
use super::{Bench, config};
use crate::build::Target;

const DONE: &str =
    r#"{"model":"provider-model","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}"#;

fn provider(url: &str) -> Value {
    json!({"provider": "openai-compatible", "model": "provider-model", "api-key": "env:KEY", "base-url": url})
}

/// A model `m` over these links; retries wait hardly at all.
fn chain(links: &[Value], retries: u32) -> crate::ProxyConfig {
    config(json!({
        "models": [{"name": "m", "deployments": links}],
        "retries": retries,
        "retry-backoff": "2ms",
    }))
}

/// Answers with these statuses in turn, and well after the last.
async fn server(statuses: &'static [u16]) -> Server {
    let n = AtomicUsize::new(0);
    Server::start(move |_| match statuses.get(n.fetch_add(1, Ordering::Relaxed)) {
        Some(&status) => answer(status, r#"{"error":{"message":"scripted"}}"#),
        None => answer(200, DONE),
    })
    .await
}

#[tokio::test]
async fn a_call_goes_out_with_our_key_and_the_providers_model() {
    let server = server(&[]).await;
    let bench = Bench::new(Some(&chain(&[provider(&format!("{}/v1", server.url))], 0)));
    let body = r#"{"model":"m", "messages":[{"role":"user","content":"hi"}], "unknown": [1, 2]}"#;
    let reply = bench.proxy.call(request("/v1/chat/completions", body)).await.expect("answered");
    assert_eq!(reply.form, ReplyForm::Json);
    assert_eq!(reply.headers["x-forebay-deployment"], "openai-compatible/provider-model");
    assert_eq!(reply.headers["x-forebay-attempts"], "1");
    assert_eq!(
        text(reply).await,
        DONE.replace("provider-model", "m"),
        "only the model's name is the client's"
    );

    let seen = server.seen();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].path, "/v1/chat/completions");
    assert_eq!(seen[0].headers["authorization"], "Bearer sk-provider");
    assert!(seen[0].headers.contains_key("traceparent"));
    assert!(!seen[0].headers.contains_key("x-gateway-inference-fairness-id"), "who calls is none of theirs");
    assert_eq!(
        seen[0].body,
        r#"{"model":"provider-model", "messages":[{"role":"user","content":"hi"}], "unknown": [1, 2]}"#,
        "only the model's name is changed"
    );
}

#[tokio::test]
async fn usage_is_always_asked_for_and_swallowed_where_the_client_did_not() {
    const STREAM: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Hi\"}}]}\n\n\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n";
    fn stream(_: &super::server::Seen) -> Answer {
        sse(STREAM)
    }
    let server = Server::start(stream).await;
    let bench = Bench::new(Some(&chain(&[provider(&server.url)], 0)));
    let check = async |options: &str, sees_usage: bool| {
        let body = format!(r#"{{"model":"m","prompt":"p","stream":true{options}}}"#);
        let reply = bench.proxy.call(request("/v1/completions", &body)).await.expect("answered");
        assert_eq!(reply.form, ReplyForm::Sse);
        let chunks: Vec<Chunk> = reply.chunks.map(|chunk| chunk.expect("whole")).collect().await;
        let Chunk::Verbatim { bytes, usage, .. } = &chunks[1] else { panic!("{chunks:?}") };
        assert_eq!(
            *usage,
            Some(Usage { prompt_tokens: 5, completion_tokens: 2, cached_tokens: 0, ..Usage::default() })
        );
        assert_eq!(!bytes.is_empty(), sees_usage);
        let sent = server.seen().last().expect("asked").json();
        assert_eq!(
            sent["stream_options"],
            json!({"include_usage": true}),
            "vLLM's own option is not for providers"
        );
    };
    check("", false).await;
    check(r#","stream_options":{"include_usage":true}"#, true).await;
}

#[tokio::test]
async fn anthropic_is_asked_in_openais_dialect() {
    let server = server(&[]).await;
    let url = format!("{}/v1", server.url);
    let anthropic =
        json!({"provider": "anthropic", "model": "provider-model", "api-key": "env:KEY", "base-url": url});
    let bench = Bench::new(Some(&chain(&[anthropic], 0)));
    let body = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;
    let reply = bench.proxy.call(request("/v1/chat/completions", body)).await.expect("answered");
    assert_eq!(reply.headers["x-forebay-deployment"], "anthropic/provider-model");
    assert_eq!(text(reply).await, DONE.replace("provider-model", "m"));
    let seen = server.seen();
    assert_eq!(
        (seen[0].path.as_str(), &seen[0].headers["authorization"]),
        ("/v1/chat/completions", &"Bearer sk-provider".parse().expect("a value"))
    );
    // There are no completions there: that is known before asking, and doesn't count against it.
    let fault = bench.proxy.call(completion("m")).await.expect_err("no such endpoint");
    assert_eq!((fault.class.code, server.seen().len()), (Code::NotSupported, 1));

    // Its own address, where none is given.
    let anthropic = json!({"provider": "anthropic", "model": "claude-sonnet-4-5", "api-key": "env:KEY"});
    let bench = Bench::new(Some(&chain(&[anthropic], 0)));
    let Target::Provider { upstream, .. } = &bench.proxy.models.all[0].deployments[0].target else {
        panic!()
    };
    assert_eq!(upstream.base_url(), "https://api.anthropic.com/v1");
}

#[tokio::test]
async fn what_is_retried_and_what_is_not() {
    // The provider's answers, retries allowed, how often it is asked, and what comes of it.
    let check = async |statuses: &'static [u16], retries: u32, asked: usize, expect: Result<(), Code>| {
        let server = server(statuses).await;
        let bench = Bench::new(Some(&chain(&[provider(&server.url)], retries)));
        let got = bench.proxy.call(completion("m")).await;
        assert_eq!(server.seen().len(), asked, "{statuses:?}");
        match (got, expect) {
            (Ok(reply), Ok(())) => {
                assert_eq!(reply.headers["x-forebay-attempts"], asked.to_string().as_str());
            }
            (Err(fault), Err(code)) => assert_eq!(fault.class.code, code, "{statuses:?}"),
            (got, expect) => panic!("{statuses:?}: {got:?}, expected {expect:?}"),
        }
    };
    check(&[500], 1, 2, Ok(())).await;
    check(&[429], 1, 2, Ok(())).await;
    check(&[503, 500, 502], 3, 4, Ok(())).await;
    check(&[500, 500], 1, 2, Err(Code::UpstreamFailed)).await;
    check(&[500], 0, 1, Err(Code::UpstreamFailed)).await;
    check(&[400], 3, 1, Err(Code::BadRequest)).await;
    // Our key, not the client's.
    check(&[401], 3, 1, Err(Code::UpstreamFailed)).await;
    check(&[404], 3, 1, Err(Code::ModelUnavailable)).await;
}

#[tokio::test]
async fn a_chain_of_providers_and_fleets() {
    let ((dead, _held), failing, good) = (refusing(), server(&[500, 500, 500]).await, server(&[]).await);
    let links = [provider(&dead), provider(&failing.url), provider(&good.url), json!({"fleet": "a"})];
    let bench = Bench::new(Some(&chain(&links, 1)));
    let reply = bench.proxy.call(completion("m")).await.expect("the third answers");
    assert_eq!(reply.headers["x-forebay-attempts"], "5", "two, two, one");
    assert_eq!(text(reply).await, DONE.replace("provider-model", "m"));
    assert_eq!((failing.seen().len(), good.seen().len()), (2, 1));
    assert_eq!(bench.router.asked(), "");

    // Down to the fleet.
    let links = [provider(&dead), json!({"fleet": "a"})];
    let bench = Bench::new(Some(&chain(&links, 0)));
    let reply = bench.proxy.call(completion("m")).await.expect("the fleet answers");
    assert_eq!(text(reply).await, "from a");
}

#[tokio::test]
async fn a_stream_that_began_is_never_repeated() {
    let cut = "data: {\"choices\":[{\"index\":0,\"text\":\"Hi\"}]}\n\n";
    let server = Server::start(move |_| sse(cut)).await;
    let bench = Bench::new(Some(&chain(&[provider(&server.url), json!({"fleet": "a"})], 3)));
    let body = r#"{"model":"m","prompt":"p","stream":true}"#;
    let reply = bench.proxy.call(request("/v1/completions", body)).await.expect("begun");
    let chunks: Vec<_> = reply.chunks.collect().await;
    assert!(chunks[0].is_ok());
    assert_eq!(chunks[1].as_ref().expect_err("cut").class.code, Code::UpstreamFailed);
    assert_eq!((server.seen().len(), bench.router.asked().as_str()), (1, ""));
}

#[tokio::test]
async fn secrets_stay_out_of_sight() {
    let failing = server(&[401]).await;
    let bench = Bench::new(Some(&chain(&[provider(&failing.url)], 0)));
    let flow = completion("m");
    let trace = flow.origin.trace.clone();
    let fault = bench.proxy.call(flow).await.expect_err("refused");
    let shown = format!("{fault:?} {:?} {}", trace.spans(), bench.registry.render());
    assert!(!shown.contains("sk-provider"), "{shown}");
    assert!(!fault.message.contains(&failing.url), "{}", fault.message);
}

#[tokio::test]
async fn embeddings_go_to_who_has_them() {
    const VECTORS: &str = r#"{"object":"list","data":[{"embedding":[0.5],"index":0}],"model":"provider-model","usage":{"prompt_tokens":5,"total_tokens":5}}"#;
    let server = Server::start(|_| answer(200, VECTORS)).await;
    let url = format!("{}/v1", server.url);
    let anthropic =
        json!({"provider": "anthropic", "model": "provider-model", "api-key": "env:KEY", "base-url": url});
    let bench = Bench::new(Some(&chain(&[anthropic.clone(), provider(&url)], 0)));
    let body = r#"{"model":"m", "input":["a","b"], "encoding_format":"base64", "unknown": 1}"#;
    let mut reply = bench.proxy.call(request("/v1/embeddings", body)).await.expect("answered");
    assert_eq!(reply.headers["x-forebay-deployment"], "openai-compatible/provider-model");
    let Some(Ok(Chunk::Verbatim { bytes, usage, .. })) = reply.chunks.next().await else {
        panic!("one body")
    };
    assert_eq!(bytes, VECTORS.replace("provider-model", "m"));
    assert_eq!(usage.map(|usage| usage.prompt_tokens), Some(5));
    let seen = server.seen();
    assert_eq!((seen.len(), seen[0].path.as_str()), (1, "/v1/embeddings"));
    assert_eq!(
        seen[0].body,
        body.replace(r#":"m""#, r#":"provider-model""#),
        "only the model's name is changed"
    );

    let bench = Bench::new(Some(&chain(&[anthropic], 0)));
    let fault = bench.proxy.call(request("/v1/embeddings", body)).await.expect_err("it has none");
    assert_eq!(fault.class.code, Code::NotSupported);
}
