//! Generations: the commit rule, frames as they come, usage, and every way to break off.

use std::time::Instant;

use bytes::Bytes;
use forebay_flow::{Origin, Reply, ReplyForm};
use forebay_observe::{Trace, TraceContext};
use forebay_types::{Blame, Code, Fault, Retry, Usage};
use forebay_wire::Chunk;
use futures_util::StreamExt;
use http::StatusCode;

use super::*;
use crate::{BaseUrlError, CallInfo, FaultKind, HttpClient, StreamUsage, Timeouts, Upstream, UpstreamFault};

/// What a client asks for.
#[derive(Clone, Copy)]
struct Want {
    stream: bool,
    usage: StreamUsage,
}

impl Want {
    fn info(self) -> CallInfo {
        CallInfo { model: "alias".into(), stream: self.stream, usage: self.usage, tenant: None }
    }
}

const STREAM: Want = Want { stream: true, usage: StreamUsage::Hidden };
const JSON: Want = Want { stream: false, usage: StreamUsage::Hidden };
const SSE: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

fn origin() -> Origin {
    let trace = Trace::new(TraceContext::from_header(None, [7; 24]), Instant::now());
    Origin { id: "r1".into(), received: Instant::now(), peer: ([127, 0, 0, 1], 1).into(), trace }
}

fn timeouts() -> Timeouts {
    Timeouts { first_byte: Duration::from_millis(300), between_chunks: Duration::from_millis(300) }
}

/// One generation, up to its first event.
async fn generate(below: &Below, call: Want) -> Result<Reply, UpstreamFault> {
    let upstream = Upstream::new(HttpClient::default(), &below.url(""), Some("k1")).unwrap();
    let body = Bytes::from_static(b"{}");
    within(upstream.generate(&origin(), "/v1/completions", body, call.info(), timeouts())).await
}

fn chunked(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

/// A server that reads a request and answers with `head` and `pieces`, then keeps the connection.
async fn serve(below: &Below, head: &str, pieces: &[&str]) -> TcpStream {
    let mut tcp = below.accept().await;
    read_until(&mut tcp, "\r\n\r\n{}").await;
    write(&mut tcp, head).await;
    for piece in pieces {
        write(&mut tcp, &chunked(piece)).await;
    }
    tcp
}

async fn stream(below: &Below, call: Want, pieces: &[&str]) -> (Result<Reply, UpstreamFault>, TcpStream) {
    tokio::join!(generate(below, call), serve(below, SSE, pieces))
}

fn text(chunk: Option<Result<Chunk, Fault>>) -> String {
    match chunk {
        Some(Ok(Chunk::Verbatim { bytes, .. })) => String::from_utf8(bytes.to_vec()).unwrap(),
        other => panic!("{other:?}"),
    }
}

const A: &str = "data: {\"choices\":[{\"index\":0,\"text\":\"a\"}]}\n\n";
const USAGE: &str =
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2,\"total_tokens\":5}}\n\n";
const DONE: &str = "data: [DONE]\n\n";

#[tokio::test]
async fn the_request_carries_key_id_and_trace() {
    let below = Below::start().await;
    let (reply, got) = tokio::join!(generate(&below, JSON), async {
        let mut tcp = below.accept().await;
        let got = read_until(&mut tcp, "\r\n\r\n{}").await;
        let body = r#"{"usage":{"prompt_tokens":3,"completion_tokens":2}}"#;
        write(&mut tcp, &format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())).await;
        got
    });
    for part in [
        "POST /v1/completions HTTP/1.1\r\n",
        "authorization: Bearer k1\r\n",
        "content-type: application/json\r\n",
        "x-request-id: r1\r\n",
        "traceparent: 00-07070707070707070707070707070707-0707070707070707-01\r\n",
    ] {
        assert!(got.contains(part), "{part} in {got}");
    }
    let mut reply = reply.unwrap();
    assert_eq!(reply.form, ReplyForm::Json);
    let Some(Ok(Chunk::Verbatim { bytes, usage, .. })) = reply.chunks.next().await else { panic!() };
    assert_eq!(
        usage,
        Some(Usage { prompt_tokens: 3, completion_tokens: 2, cached_tokens: 0, ..Usage::default() })
    );
    assert_eq!(bytes, r#"{"usage":{"prompt_tokens":3,"completion_tokens":2}}"#);
    assert!(reply.chunks.next().await.is_none());
}

#[tokio::test]
async fn frames_pass_one_at_a_time() {
    let below = Below::start().await;
    let (reply, mut tcp) = stream(&below, STREAM, &[": ping\n\n", A]).await;
    let mut reply = reply.unwrap();
    assert_eq!(reply.form, ReplyForm::Sse);
    assert_eq!(text(reply.chunks.next().await), A);
    for _ in 0..3 {
        // Two pieces make one frame, and it is there before the next is sent.
        write(&mut tcp, &chunked(&A[..20])).await;
        write(&mut tcp, &chunked(&A[20..])).await;
        assert_eq!(text(within(reply.chunks.next()).await), A);
    }
    write(&mut tcp, &(chunked(DONE) + "0\r\n\r\n")).await;
    assert_eq!(text(within(reply.chunks.next()).await), DONE);
    assert!(within(reply.chunks.next()).await.is_none());
}

/// Every chunk that comes: its bytes for the client, and the completion tokens that it reports.
async fn seen(usage: StreamUsage, frames: &[&str]) -> Vec<(String, Option<u32>)> {
    let below = Below::start().await;
    let (reply, mut tcp) = stream(&below, Want { stream: true, usage }, frames).await;
    write(&mut tcp, "0\r\n\r\n").await;
    let chunks: Vec<_> = within(reply.unwrap().chunks.collect::<Vec<_>>()).await;
    let seen = |chunk| match chunk {
        Ok(Chunk::Verbatim { bytes, usage, .. }) => {
            (String::from_utf8(bytes.to_vec()).unwrap(), usage.map(|usage: Usage| usage.completion_tokens))
        }
        other => panic!("{other:?}"),
    };
    chunks.into_iter().map(seen).collect()
}

/// A frame with a text and this usage.
fn text_frame(model: &str, usage: &str) -> String {
    format!("data: {{\"id\":\"1\",\"model\":\"{model}\",\"choices\":[{{\"text\":\"a\"}}]{usage}}}\n\n")
}

const ONE: &str = ",\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":1}";
const TWO: &str = ",\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2}";
const NULL: &str = ",\"usage\":null";

#[tokio::test]
async fn usage_is_counted_and_shown_as_asked_for() {
    use StreamUsage::{AtTheEnd, Hidden, Verbatim};
    let all = |model| [text_frame(model, NULL), text_frame(model, ONE), text_frame(model, TWO)];
    let from = all("served");
    let frames: Vec<&str> = from.iter().map(String::as_str).chain([USAGE, DONE]).collect();
    let check = async |usage, text: [String; 3], last: &str| {
        let got = seen(usage, &frames).await;
        let (texts, counts): (Vec<String>, Vec<_>) = got.into_iter().unzip();
        assert_eq!(texts, [&text[..], &[last.to_owned(), DONE.to_owned()]].concat(), "{usage:?}");
        assert_eq!(counts, [None, Some(1), Some(2), Some(2), None], "{usage:?}");
    };
    check(Hidden, [(); 3].map(|()| text_frame("alias", "")), "").await;
    check(AtTheEnd, [(); 3].map(|()| text_frame("alias", NULL)), USAGE).await;
    check(Verbatim, all("alias"), USAGE).await;
}

#[tokio::test]
async fn a_stream_without_a_usage_frame_gets_one_where_usage_was_hidden() {
    let (one, two) = (text_frame("served", ONE), text_frame("served", TWO));
    let got = seen(StreamUsage::AtTheEnd, &[&one, &two, DONE]).await;
    let made = format!("data: {{\"id\":\"1\",\"model\":\"alias\",\"choices\":[]{TWO}}}\n\n");
    let plain = text_frame("alias", NULL);
    assert_eq!(got, [(plain.clone(), Some(1)), (plain, Some(2)), (made, None), (DONE.to_owned(), None)]);
    // Nothing is made up for a server that says nothing.
    let got = seen(StreamUsage::AtTheEnd, &[A, DONE]).await;
    assert_eq!(got, [(A.to_owned(), None), (DONE.to_owned(), None)]);
}

#[tokio::test]
async fn a_body_says_the_clients_model() {
    let below = Below::start().await;
    let (reply, ()) = tokio::join!(generate(&below, JSON), async {
        let mut tcp = below.accept().await;
        read_until(&mut tcp, "\r\n\r\n{}").await;
        let body = r#"{"id": "1", "model": "served", "usage": null}"#;
        write(&mut tcp, &format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())).await;
    });
    let reply = text(reply.unwrap().chunks.next().await);
    assert_eq!(reply, r#"{"id": "1", "model": "alias", "usage": null}"#);
}

#[tokio::test]
async fn a_last_frame_without_its_blank_line_counts() {
    let below = Below::start().await;
    let (reply, mut tcp) = stream(&below, STREAM, &[A, "data: [DONE]"]).await;
    write(&mut tcp, "0\r\n\r\n").await;
    let chunks: Vec<_> = within(reply.unwrap().chunks.collect::<Vec<_>>()).await;
    assert_eq!(chunks.len(), 2);
    assert_eq!(text(chunks.into_iter().nth(1)), DONE);
}

#[tokio::test]
async fn a_finished_stream_gives_its_connection_back() {
    let below = Below::start().await;
    let upstream = Upstream::new(HttpClient::default(), &below.url(""), None).unwrap();
    let origin = origin();
    let ask = || {
        upstream.generate(&origin, "/v1/completions", Bytes::from_static(b"{}"), STREAM.info(), timeouts())
    };
    let (reply, mut tcp) = tokio::join!(ask(), serve(&below, SSE, &[A, DONE]));
    let mut reply = reply.unwrap();
    reply.chunks.next().await;
    assert_eq!(text(reply.chunks.next().await), DONE);
    // As a reader does that knows `[DONE]`.
    drop(reply);
    write(&mut tcp, "0\r\n\r\n").await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let (probe, got) = tokio::join!(upstream.probe("/health", Duration::from_secs(5)), async {
        let got = read_until(&mut tcp, "\r\n\r\n").await;
        write(&mut tcp, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        got
    });
    assert!(got.starts_with("GET /health HTTP/1.1\r\n"), "{got}");
    assert_eq!(probe.unwrap().0, StatusCode::OK);
}

#[tokio::test]
async fn dropping_the_chunks_closes_the_connection() {
    let below = Below::start().await;
    let (reply, mut tcp) = stream(&below, STREAM, &[A]).await;
    drop(reply.unwrap());
    closed(&mut tcp).await;
}

#[tokio::test]
async fn before_the_first_event_everything_is_an_err_to_retry() {
    let below = Below::start().await;
    let check = |fault: UpstreamFault, kind, code| {
        assert_eq!((fault.kind, fault.fault.class.code), (kind, code), "{fault:?}");
        assert_eq!(fault.fault.class.retry, Retry::Elsewhere, "{fault:?}");
        assert_ne!(fault.fault.class.blame, Blame::Client, "{fault:?}");
        assert!(!fault.fault.message.contains("127.0.0.1"), "{fault:?}");
    };
    // The head is there, the first event never comes.
    let (reply, _tcp) = stream(&below, STREAM, &[": ping\n\n"]).await;
    check(reply.unwrap_err(), FaultKind::TimedOut, Code::UpstreamTimeout);
    let cut = async {
        drop(serve(&below, SSE, &[": ping\n\n"]).await);
    };
    let (reply, ()) = tokio::join!(generate(&below, STREAM), cut);
    check(reply.unwrap_err(), FaultKind::Broken, Code::UpstreamFailed);
    let ended = async {
        write(&mut serve(&below, SSE, &[]).await, "0\r\n\r\n").await;
    };
    let (reply, ()) = tokio::join!(generate(&below, STREAM), ended);
    check(reply.unwrap_err(), FaultKind::Broken, Code::UpstreamFailed);
    let error = "data: {\"error\":{\"message\":\"out of blocks\",\"code\":503}}\n\n";
    let (reply, _tcp) = stream(&below, STREAM, &[error]).await;
    check(reply.unwrap_err(), FaultKind::Refused(StatusCode::SERVICE_UNAVAILABLE), Code::Overloaded);
    let (reply, _tcp) = stream(&below, JSON, &[A]).await;
    check(reply.unwrap_err(), FaultKind::Broken, Code::UpstreamFailed);
    let refusal = "HTTP/1.1 401 No\r\ncontent-length: 34\r\n\r\n{\"error\":{\"message\":\"Bad key k1\"}}";
    let (reply, _tcp) = tokio::join!(generate(&below, STREAM), serve(&below, refusal, &[]));
    check(reply.unwrap_err(), FaultKind::Refused(StatusCode::UNAUTHORIZED), Code::UpstreamFailed);
    let url = below.url("");
    drop(below);
    let upstream = Upstream::new(HttpClient::default(), &url, None).unwrap();
    let reply =
        upstream.generate(&origin(), "/v1/completions", Bytes::new(), STREAM.info(), timeouts()).await;
    check(reply.unwrap_err(), FaultKind::Unreachable, Code::UpstreamFailed);
}

#[tokio::test]
async fn after_the_first_event_a_failure_ends_the_stream() {
    let below = Below::start().await;
    let last = async |pieces: &[&str], then_close: bool| {
        let (reply, tcp) = stream(&below, STREAM, pieces).await;
        let tcp = (!then_close).then_some(tcp);
        let mut chunks: Vec<_> = within(reply.unwrap().chunks.collect::<Vec<_>>()).await;
        drop(tcp);
        assert_eq!(text(chunks.drain(..1).next()), A);
        assert_eq!(chunks.len(), 1, "{chunks:?}");
        let fault = chunks.pop().unwrap().unwrap_err();
        assert_eq!(fault.class.retry, Retry::Never);
        fault
    };
    assert_eq!(last(&[A, "data: {\"half"], true).await.class.code, Code::UpstreamFailed);
    assert_eq!(last(&[A], false).await.class.code, Code::UpstreamTimeout);
    let broke = last(&[A, "data: {\"error\":{\"message\":\"secret words\"}}\n\n", DONE], false).await;
    assert_eq!(broke.class.code, Code::UpstreamFailed);
    assert!(!broke.message.contains("secret") && broke.detail.unwrap().contains("secret"));
}

#[tokio::test]
async fn small_calls() {
    let below = Below::start().await;
    let upstream = Upstream::new(HttpClient::default(), &below.url("/v1"), None).unwrap();
    let ask = async |answer: &str| {
        let answer = format!("HTTP/1.1 {answer}");
        let get = upstream.get_json::<serde_json::Value>("/v1/models", Duration::from_secs(5));
        tokio::join!(get, async {
            let mut tcp = below.accept().await;
            let got = read_until(&mut tcp, "\r\n\r\n").await;
            assert!(got.starts_with("GET /v1/models HTTP/1.1\r\n"), "{got}");
            write(&mut tcp, &answer).await;
        })
        .0
    };
    assert_eq!(
        ask("200 OK\r\nconnection: close\r\ncontent-length: 3\r\n\r\n[1]").await.unwrap(),
        serde_json::json!([1])
    );
    let not_json = ask("200 OK\r\nconnection: close\r\ncontent-length: 1\r\n\r\n[").await.unwrap_err();
    assert_eq!(not_json.kind, FaultKind::Broken);
    let refused = ask("500 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await.unwrap_err();
    assert_eq!(refused.kind, FaultKind::Refused(StatusCode::INTERNAL_SERVER_ERROR));
}

#[test]
fn base_urls_are_checked_and_keys_kept_secret() {
    let new = |url: &str, key: Option<&str>| Upstream::new(HttpClient::default(), url, key);
    assert!(matches!(new("127.0.0.1", None), Err(BaseUrlError::Syntax { .. } | BaseUrlError::Scheme { .. })));
    assert!(matches!(new("ftp://a", None), Err(BaseUrlError::Scheme { .. })));
    assert!(matches!(new("http://u:p@a", None), Err(BaseUrlError::Extra { .. })));
    assert!(matches!(new("http://a?key=x", None), Err(BaseUrlError::Extra { .. })));
    assert_eq!(new("http://a", Some("k\n")).unwrap_err(), BaseUrlError::Key);
    let upstream = new("https://api.example/v1/", Some("sk-1")).unwrap();
    assert_eq!(upstream.base_url(), "https://api.example/v1");
    assert!(!format!("{upstream:?}").contains("sk-1"));
}

/// llama.cpp's server does this: it closes a kept connection when the next request comes.
#[tokio::test]
async fn a_kept_connection_that_closes_instead_of_answering_is_replaced() {
    const ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
    let below = Below::start().await;
    let upstream = Upstream::new(HttpClient::default(), &below.url(""), None).unwrap();
    let origin = origin();
    let generate = async || {
        let body = Bytes::from_static(b"{}");
        let reply =
            within(upstream.generate(&origin, "/v1/completions", body, JSON.info(), timeouts())).await;
        reply.unwrap().chunks.next().await
    };
    let (first, kept) = tokio::join!(generate(), async {
        let mut tcp = below.accept().await;
        read_until(&mut tcp, "\r\n\r\n{}").await;
        write(&mut tcp, ANSWER).await;
        tcp
    });
    assert_eq!(text(first), "{}");
    let (second, ()) = tokio::join!(generate(), async {
        let mut kept = kept;
        read_until(&mut kept, "\r\n\r\n{}").await;
        drop(kept);
        let mut fresh = below.accept().await;
        read_until(&mut fresh, "\r\n\r\n{}").await;
        write(&mut fresh, ANSWER).await;
    });
    assert_eq!(text(second), "{}");
}
