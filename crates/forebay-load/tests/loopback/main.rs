//! Whole runs against a scripted server. Times are only compared where a script makes them differ by far more than a
//! busy machine does.

mod server;

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use forebay_config::SecretValue;
use forebay_load::{
    Endpoint, Load, LoadError, Options, Phase, Progress, Prompts, Silent, Snapshot, Until, run, run_until,
};
use serde_json::json;
use server::{Seen, Server, Step};

const TEXT: &str = r#"{"choices":[{"delta":{"content":"a"}}]}"#;

fn options(server: &Server, change: impl FnOnce(&mut Options)) -> Options {
    let mut options = Options {
        url: server.url.clone(),
        model: Some("m".into()),
        until: Until::Requests(4),
        warmup_requests: 0,
        request_timeout: Duration::from_secs(20),
        ..Options::default()
    };
    change(&mut options);
    options
}

/// Three tokens and their usage.
fn reply() -> Vec<Step> {
    let event = |data: &str| Step::Event(data.to_owned());
    let usage = r#"{"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}"#;
    vec![Step::Stream, event(TEXT), event(TEXT), event(TEXT), event(usage), event("[DONE]"), Step::End]
}

fn not_found() -> Vec<Step> {
    vec![Step::Answer(404, "{}".into())]
}

fn generations(request: &Seen, steps: impl FnOnce() -> Vec<Step>) -> Vec<Step> {
    if request.path.ends_with("completions") { steps() } else { not_found() }
}

#[tokio::test]
async fn a_run_counts_what_the_server_says() {
    let server = Server::start(|request, _| generations(request, reply)).await;
    let report = run(&options(&server, |o| o.load = Load::Concurrency(2)), &Silent).await.unwrap();
    assert_eq!((report.completed, report.failed, report.without_usage), (4, 0, 0));
    assert_eq!((report.prompt_tokens, report.cached_tokens, report.output_tokens), (36, 16, 12));
    assert_eq!(report.in_flight_peak, 2);
    assert!(report.ttft.is_some() && report.tpot.is_some() && report.itl.is_some());
    // Connections are kept: no more of them than requests in flight, and the tokenizer's.
    assert!(server.connections.load(Ordering::Relaxed) <= 3);
    let sent = server.seen("/v1/chat/completions");
    assert!(sent.iter().all(|r| r.body["stream_options"]["include_usage"] == json!(true)));
    assert!(sent.iter().all(|r| !r.head.contains("authorization")));
}

#[tokio::test]
async fn times_are_those_of_the_script() {
    let wait = |ms| Step::Wait(Duration::from_millis(ms));
    let event = |data: &str| Step::Event(data.to_owned());
    let steps = vec![
        Step::Stream,
        wait(150),
        event(TEXT),
        wait(300),
        event(TEXT),
        wait(80),
        event("[DONE]"),
        Step::End,
    ];
    let server = Server::start(move |request, _| generations(request, || steps.clone())).await;
    let report = run(&options(&server, |o| o.until = Until::Requests(1)), &Silent).await.unwrap();
    let (ttft, itl, e2e) = (report.ttft.unwrap(), report.itl.unwrap(), report.e2e.unwrap());
    assert!(ttft.min >= 145.0 && ttft.max < e2e.min, "{ttft:?}");
    assert!(itl.min >= 290.0, "{itl:?}");
    assert!((report.tpot.unwrap().p50 - itl.p50).abs() < 1e-3);
    assert!(e2e.min >= 145.0 + 290.0 + 75.0, "{e2e:?}");
    assert_eq!((report.output_tokens, report.without_usage), (2, 1));
}

#[tokio::test]
async fn failures_are_counted_by_kind() {
    let server = Server::start(|request, n| {
        generations(request, || match n {
            0 => vec![Step::Answer(429, r#"{"error":{"message":"slow down"}}"#.into())],
            1 => vec![Step::Answer(500, "oops".into())],
            2 => vec![Step::Stream, Step::Event(TEXT.into()), Step::End],
            3 => vec![Step::Stream, Step::Event(TEXT.into()), Step::Close],
            4 => vec![Step::Stream, Step::Event(r#"{"error":{"message":"boom"}}"#.into()), Step::End],
            5 => vec![Step::Answer(200, "{}".into())],
            6 => vec![Step::Stream, Step::Event("[DONE]".into()), Step::End],
            7 => vec![Step::Answer(429, r#"{"error":{"message":"second"}}"#.into())],
            _ => reply(),
        })
    })
    .await;
    let report = run(&options(&server, |o| o.until = Until::Requests(10)), &Silent).await.unwrap();
    let found: Vec<_> =
        report.failures.iter().map(|f| (f.kind.as_str(), f.count, f.first_message.as_str())).collect();
    let at = |kind: &str| found.iter().find(|f| f.0 == kind).map(|f| (f.1, f.2));
    assert_eq!((report.completed, report.failed), (2, 8), "{found:?}");
    assert_eq!(at("status_429"), Some((2, "slow down")));
    assert_eq!(at("status_500"), Some((1, "oops")));
    assert_eq!(at("cut_stream"), Some((1, "the stream ended without [DONE]")));
    assert_eq!(at("disconnect").map(|f| f.0), Some(1), "{found:?}");
    assert_eq!(at("error_in_stream"), Some((1, "boom")));
    assert_eq!(at("bad_answer").map(|f| f.0), Some(1));
    assert_eq!(at("no_tokens").map(|f| f.0), Some(1));
    // Failed requests leave no times behind.
    assert_eq!(report.output_tokens, 6);
}

/// Closing a kept connection is a server's right; closing every one is a failure.
#[tokio::test]
async fn a_closed_connection_is_made_anew_once() {
    let server = Server::start(|request, n| {
        generations(request, || if [1, 4, 5].contains(&n) { vec![Step::Close] } else { reply() })
    })
    .await;
    let report = run(&options(&server, |_| {}), &Silent).await.unwrap();
    assert_eq!((report.completed, report.failed, report.reconnected), (3, 1, 1));
    assert_eq!(report.failures[0].kind, "disconnect");
}

#[tokio::test]
async fn a_stalled_server_times_out() {
    let stall = || vec![Step::Stream, Step::Event(TEXT.into()), Step::Wait(Duration::from_secs(3600))];
    let server =
        Server::start(move |request, n| generations(request, || if n == 1 { stall() } else { reply() }))
            .await;
    let options = options(&server, |o| o.request_timeout = Duration::from_millis(400));
    let report = run(&options, &Silent).await.unwrap();
    assert_eq!((report.completed, report.failed), (3, 1));
    assert_eq!(report.failures[0].kind, "timeout");
    assert!(report.duration >= Duration::from_millis(400) && report.duration < Duration::from_secs(15));
}

#[tokio::test]
async fn nobody_there() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let mut options = Options { url, warmup_requests: 1, ..Options::default() };
    let error = run(&options, &Silent).await.unwrap_err();
    assert!(matches!(error, LoadError::Models { .. }), "{error}");
    options.model = Some("m".into());
    let error = run(&options, &Silent).await.unwrap_err();
    assert!(
        error.to_string().starts_with("every warm-up request failed, the first with: connect: "),
        "{error}"
    );
    options.warmup_requests = 0;
    options.until = Until::Requests(3);
    let report = run(&options, &Silent).await.unwrap();
    assert_eq!((report.completed, report.failed, report.failures[0].kind.as_str()), (0, 3, "connect"));
}

#[tokio::test]
async fn the_first_model_is_taken_and_the_key_is_sent_and_hidden() {
    let server = Server::start(|request, _| match request.path.as_str() {
        "/v1/models" => vec![Step::Answer(200, r#"{"data":[{"id":"one"},{"id":"two"}]}"#.into())],
        _ => generations(request, || {
            vec![Step::Answer(401, r#"{"error":{"message":"bad key sk-123"}}"#.into())]
        }),
    })
    .await;
    let options = options(&server, |o| {
        (o.model, o.api_key) = (None, Some(SecretValue::new("sk-123")));
        o.url.push_str("/v1/");
    });
    let report = run(&options, &Silent).await.unwrap();
    assert_eq!(report.model, "one");
    assert_eq!(report.failures[0].first_message, "bad key <key>");
    let sent = server.seen("/v1/chat/completions");
    assert_eq!(sent.len(), 4);
    assert!(sent.iter().all(|r| r.head.contains("authorization: bearer sk-123")));
    assert!(sent.iter().all(|r| r.body["model"] == json!("one")));
}

#[tokio::test]
async fn prompts_are_calibrated_where_there_is_a_tokenizer() {
    let check = async |tokenizer: fn(&Seen) -> Vec<Step>, expect_words, expect_ratio| {
        let server = Server::start(move |request, _| match request.path.as_str() {
            "/tokenize" => tokenizer(request),
            _ => generations(request, reply),
        })
        .await;
        let options = options(&server, |o| {
            o.prompts = Prompts::Synthetic { prompt_tokens: 60, shared_prefix_tokens: 0 };
        });
        let report = run(&options, &Silent).await.unwrap();
        let sent = &server.seen("/v1/chat/completions")[0].body["messages"][0]["content"];
        assert_eq!(sent.as_str().unwrap().split(' ').count(), expect_words);
        assert_eq!(report.tokens_per_word, expect_ratio);
    };
    // vLLM's: `prompt` in, `count` out. Here every word has one and a half tokens.
    let vllm = |request: &Seen| {
        let count = request.body["prompt"].as_str().map_or(0, |text| text.split(' ').count()) * 3 / 2;
        vec![Step::Answer(200, json!({"count": count, "tokens": []}).to_string())]
    };
    check(vllm, 40, Some(1.5)).await;
    // llama.cpp's: `content` in, a list out, and an empty one for a body without it.
    let llama_cpp = |request: &Seen| {
        let count = request.body["content"].as_str().map_or(0, |text| text.split(' ').count()) * 2;
        vec![Step::Answer(200, json!({"tokens": vec![0; count]}).to_string())]
    };
    check(llama_cpp, 30, Some(2.0)).await;
    check(|_| not_found(), 60, None).await;
}

#[tokio::test]
async fn warm_up_requests_are_not_counted_and_not_repeated() {
    let server = Server::start(|request, _| generations(request, reply)).await;
    let report = run(&options(&server, |o| o.warmup_requests = 3), &Silent).await.unwrap();
    assert_eq!((report.completed, report.output_tokens), (4, 12));
    let sent = server.seen("/v1/chat/completions");
    let prompts: std::collections::HashSet<_> =
        sent.iter().map(|r| r.body["messages"][0]["content"].to_string()).collect();
    assert_eq!((sent.len(), prompts.len()), (7, 7));
}

#[tokio::test]
async fn without_streaming_only_the_whole_is_timed() {
    let answer = r#"{"choices":[{"text":"a b"}],"usage":{"prompt_tokens":2,"completion_tokens":5}}"#;
    let server =
        Server::start(move |request, _| generations(request, || vec![Step::Answer(200, answer.into())]))
            .await;
    let options = options(&server, |o| (o.stream, o.endpoint) = (false, Endpoint::Completions));
    let report = run(&options, &Silent).await.unwrap();
    assert_eq!((report.completed, report.output_tokens), (4, 20));
    assert!(report.ttft.is_none() && report.itl.is_none() && report.tpot.is_none() && report.e2e.is_some());
    let sent = &server.seen("/v1/completions")[0].body;
    assert!(sent["prompt"].is_string() && sent["stream"] == json!(false));
}

#[tokio::test]
async fn an_open_load_does_not_wait_for_replies_but_for_its_limit() {
    let slow = || {
        let mut steps = reply();
        steps.insert(0, Step::Wait(Duration::from_millis(200)));
        steps
    };
    let server = Server::start(move |request, _| generations(request, slow)).await;
    let rate = |in_flight_max| Load::Constant { per_second: 1000.0, in_flight_max };
    let report = run(&options(&server, |o| (o.load, o.until) = (rate(64), Until::Requests(20))), &Silent)
        .await
        .unwrap();
    assert_eq!(report.completed, 20);
    assert!(report.in_flight_peak > 5, "{}", report.in_flight_peak);
    let report =
        run(&options(&server, |o| (o.load, o.until) = (rate(2), Until::Requests(6))), &Silent).await.unwrap();
    assert_eq!((report.completed, report.in_flight_peak), (6, 2));
    // The four without room; a busy machine may be late with the first two as well.
    assert!(report.delayed >= 4, "{}", report.delayed);
}

#[tokio::test]
async fn a_timed_run_ends() {
    let server = Server::start(|request, _| generations(request, reply)).await;
    let length = Duration::from_millis(300);
    let closed = run(&options(&server, |o| o.until = Until::Duration(length)), &Silent).await.unwrap();
    assert!(closed.completed > 1 && closed.duration >= length && closed.duration < Duration::from_secs(10));
    // The next arrival would be after the end.
    let load = Load::Constant { per_second: 0.01, in_flight_max: 1 };
    let open = run(&options(&server, |o| (o.load, o.until) = (load, Until::Duration(length))), &Silent).await;
    let open = open.unwrap();
    assert_eq!(open.completed, 1);
    assert!(open.duration < Duration::from_secs(10));
}

#[derive(Default)]
struct Log(Mutex<Vec<Snapshot>>);

impl Progress for Log {
    fn on_progress(&self, snapshot: &Snapshot) {
        self.0.lock().expect("no panic").push(*snapshot);
    }
}

#[tokio::test]
async fn progress_is_told_and_a_run_can_be_stopped() {
    let log = Log::default();
    let stall = || vec![Step::Stream, Step::Event(TEXT.into()), Step::Wait(Duration::from_secs(3600))];
    let server =
        Server::start(move |request, n| generations(request, || if n < 3 { reply() } else { stall() })).await;
    let options = options(&server, |o| (o.warmup_requests, o.until) = (1, Until::Requests(100)));
    let stop = async {
        while server.seen("/v1/chat/completions").len() < 4 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let report = run_until(&options, &log, stop).await.unwrap();
    assert!(report.stopped);
    assert_eq!((report.completed, report.failed, report.abandoned), (2, 0, 1));
    let snapshots = log.0.into_inner().unwrap();
    let last = |phase| snapshots.iter().rfind(|s| s.phase == phase).map(|s| (s.done, s.total));
    assert_eq!(last(Phase::WarmUp), Some((1, Some(1))));
    assert_eq!(last(Phase::Measure), Some((2, Some(100))));
}
