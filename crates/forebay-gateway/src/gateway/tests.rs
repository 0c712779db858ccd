//! The layer alone: a scripted next stage, a paused clock, a real audit file.

mod rig;

use forebay_config::{Source, load};
use forebay_flow::{ChunkStream, ReplyForm};
use forebay_types::{Code, Retry, Usage};
use forebay_wire::Chunk;
use futures_util::{StreamExt, stream};
use http::Method;
use serde_json::{Value, json};

use self::rig::*;
use super::*;

#[tokio::test(start_paused = true)]
async fn a_good_request_is_held_settled_and_audited() {
    let rig = rig([generation()]);
    let reply = rig.call(ask(Some("sk-a1"))).await.unwrap();
    let header = |name: &str| reply.headers[name].to_str().unwrap().to_owned();
    assert_eq!(header("x-ratelimit-limit-requests"), "10");
    assert_eq!(header("x-ratelimit-remaining-requests"), "9");
    assert_eq!(header("x-ratelimit-reset-requests"), "6s");
    assert_eq!(header("x-ratelimit-limit-tokens"), "1000");
    assert_eq!(header("x-ratelimit-remaining-tokens"), "900", "10 of prompt and 90 of output are held");
    assert_eq!(header("x-ratelimit-reset-tokens"), "6s");
    let spec = reply.render.clone().unwrap();
    assert_eq!((spec.model.as_str(), spec.choices), ("m", 1));
    assert_eq!((rig.left(), rig.holds()), ((9, 900), 1));

    let chunks = read_all(reply).await;
    assert_eq!(chunks.len(), 5, "nothing is swallowed");
    assert_eq!((rig.left(), rig.holds()), ((9, 987), 0), "13 were used");

    let call = rig.script.calls.lock().unwrap().pop().unwrap();
    assert_eq!(
        (call.caller.consumer.as_str(), call.caller.models.is_none(), call.ids.tokens()),
        ("team-a", true, 10)
    );

    let audit = rig.audit().await;
    assert_eq!(audit.len(), 1);
    assert_eq!(brief(&audit[0]), json!(["team-a", 200, "ok", 10, 3, 8, false, false]));
    assert_eq!(audit[0]["request_id"], "req-1");
    assert_eq!(audit[0]["trace_id"], "07".repeat(16));
    assert_eq!((&audit[0]["model"], &audit[0]["path"]), (&json!("m"), &json!("/v1/completions")));
    assert_eq!(audit[0]["peer"], "192.0.2.1");

    let metrics = rig.registry.render();
    for line in [
        "forebay_gateway_requests_total{consumer=\"team-a\",outcome=\"ok\"} 1",
        "forebay_gateway_tokens_total{consumer=\"team-a\",kind=\"prompt\"} 10",
        "forebay_gateway_tokens_total{consumer=\"team-a\",kind=\"completion\"} 3",
        "forebay_gateway_cached_tokens_total{consumer=\"team-a\"} 8",
        "forebay_gateway_holds 0",
        "forebay_gateway_audit_records_total 1",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line}\n{metrics}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_trace_says_who_and_how_much() {
    let rig = rig([generation()]);
    let flow = ask(Some("sk-a1"));
    let trace = flow.origin.trace.clone();
    read_all(rig.call(flow).await.unwrap()).await;
    let mut spans: Vec<_> = trace.spans().into_iter().map(|span| (span.what, span.why)).collect();
    spans.sort_unstable();
    let spans: Vec<_> = spans.iter().map(|(what, why)| format!("{what}: {why}")).collect();
    assert_eq!(
        spans,
        [
            "authenticate: consumer team-a",
            "parse: 51 bytes",
            "reserve: 100 tokens; 900 of 1000 tokens left, 9 of 10 requests left",
            "settle: ok: 13 of 100 held tokens used",
            "tokenize: 10 tokens, exact",
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_request_that_names_no_model_is_for_the_only_one() {
    let nameless = |key, path: &str, body: Value| flow(Method::POST, path, Some(key), &body.to_string());
    let completion = |key| nameless(key, "/v1/completions", json!({"prompt": "top secret", "max_tokens": 1}));
    let count = |key| nameless(key, "/tokenize", json!({"prompt": "x"}));
    let tokenized = || whole(ReplyForm::Json, vec![]);
    let rig = rig([generation(), tokenized(), generation()]).with_only_model(&["the-one", "org/n"]);
    let reply = rig.call(completion("sk-a1")).await.unwrap();
    assert_eq!(reply.render.as_ref().unwrap().model.as_str(), "the-one", "what the reply calls it");
    read_all(reply).await;
    read_all(rig.call(count("sk-a1")).await.unwrap()).await;
    // Who may use some models only knows it by a name that it may use.
    read_all(rig.call(completion("sk-b")).await.unwrap()).await;
    let calls: Vec<_> = rig
        .script
        .calls
        .lock()
        .unwrap()
        .drain(..)
        .map(|call| call.ask.model().unwrap().to_string())
        .collect();
    assert_eq!(calls, ["the-one", "the-one", "org/n"]);
    let models: Vec<_> = rig.audit().await.iter().map(|record| record["model"].clone()).collect();
    assert_eq!(models, ["the-one", "the-one", "org/n"]);

    // Not a word of a model that it may not use, nor which there are.
    for names in [&["hidden"][..], &[]] {
        let rig = self::rig([]).with_only_model(names);
        let fault = rig.call(completion("sk-b")).await.unwrap_err();
        assert_eq!((fault.class.code, fault.param.as_deref()), (Code::BadRequest, Some("model")));
        assert_eq!(fault.message, "Missing required parameter: 'model'.");
        let fault = rig.call(count("sk-b")).await.unwrap_err();
        assert!(!fault.message.contains("hidden"), "{fault}");
    }
}

#[tokio::test(start_paused = true)]
async fn strangers_are_refused_and_written_down() {
    let rig = rig([]);
    let check = |fault: Fault, code: Code, text: &str| {
        assert_eq!(fault.class.code, code);
        assert!(fault.message.starts_with(text), "{fault}");
        assert!(!format!("{fault:?}").contains("sk-secret"), "the key is never echoed");
    };
    check(rig.call(ask(None)).await.unwrap_err(), Code::InvalidApiKey, "You didn't provide an API key.");
    let wrong = rig.call(ask(Some("sk-secret"))).await.unwrap_err();
    check(wrong, Code::InvalidApiKey, "Incorrect API key provided.");
    let audit = rig.audit().await;
    assert_eq!(audit.len(), 2);
    for record in audit {
        assert_eq!(brief(&record), json!([null, 401, "invalid_api_key", 0, 0, 0, false, false]));
    }
    assert!(rig.registry.render().contains("{consumer=\"unknown\",outcome=\"invalid_api_key\"} 2"));
}

#[tokio::test(start_paused = true)]
async fn what_is_not_understood_or_not_allowed_goes_no_further() {
    let rig = rig([generation()]);
    let fault = rig.call(flow(Method::POST, "/v1/completions", Some("sk-b"), "{")).await.unwrap_err();
    assert_eq!(fault.class.code, Code::BadRequest);
    let fault = rig.call(flow(Method::GET, "/v1/completions", Some("sk-b"), "")).await.unwrap_err();
    assert_eq!(fault.headers, [("allow", "POST".to_owned())]);
    let fault = rig.call(ask_for("other", Some("sk-b"))).await.unwrap_err();
    assert_eq!((fault.class.code, fault.param.as_deref()), (Code::ModelDenied, Some("model")));
    assert_eq!(fault.message, "Consumer `team-b` is not allowed to use the model `other`.");
    let fault =
        rig.call(flow(Method::POST, "/tokenize", Some("sk-b"), r#"{"prompt":"x"}"#)).await.unwrap_err();
    assert_eq!(fault.class.code, Code::BadRequest, "the default model may be one it must not use");
    let reply = rig.call(ask_for("org/n", Some("sk-b"))).await;
    assert!(rig.script.calls.lock().unwrap().len() == 1);
    let reply = match reply {
        Ok(reply) => reply,
        Err(fault) => panic!("{fault}"),
    };
    assert!(
        !reply.headers.keys().any(|name| name.as_str().starts_with("x-ratelimit")),
        "team-b has no limits"
    );
    read_all(reply).await;
    let audit = rig.audit().await;
    let outcomes: Vec<_> = audit.iter().map(|r| (r["outcome"].clone(), r["model"].clone())).collect();
    assert_eq!(
        outcomes,
        [
            (json!("bad_request"), Value::Null),
            (json!("method_not_allowed"), Value::Null),
            (json!("model_denied"), json!("other")),
            (json!("bad_request"), Value::Null),
            (json!("ok"), json!("org/n")),
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn limits_refuse_and_refill() {
    let rig = rig((0..11).map(|_| Play::Stuck(vec![started()])));
    let mut open = Vec::new();
    for _ in 0..10 {
        // Both keys of a consumer draw on one account.
        open.push(rig.call(ask(Some(if open.len() % 2 == 0 { "sk-a1" } else { "sk-a2" }))).await.unwrap());
    }
    let fault = rig.call(ask(Some("sk-a1"))).await.unwrap_err();
    // Both limits are used up; 100 tokens and one request take 6 s each.
    assert!(matches!(fault.class.code, Code::TokensRateLimited | Code::RequestsRateLimited));
    assert_eq!(fault.class.retry, Retry::After(Duration::from_secs(6)));
    let headers: std::collections::HashMap<_, _> = fault.headers.iter().cloned().collect();
    assert_eq!(headers["x-ratelimit-remaining-tokens"], "0");
    assert_eq!(headers["x-ratelimit-remaining-requests"], "0");
    assert_eq!(headers["x-ratelimit-reset-tokens"], "1m0s");
    assert_eq!(rig.script.calls.lock().unwrap().len(), 10);

    tokio::time::advance(Duration::from_millis(5999)).await;
    assert!(rig.call(ask(Some("sk-a1"))).await.is_err());
    tokio::time::advance(Duration::from_millis(1)).await;
    open.push(rig.call(ask(Some("sk-a1"))).await.unwrap());
    let metrics = rig.registry.render();
    assert!(metrics.contains("forebay_gateway_refused_total{consumer=\"team-a\",limit="), "{metrics}");
    assert_eq!(rig.holds(), 11);
    drop(open);
    assert_eq!(rig.holds(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_request_over_the_limit_itself_says_so() {
    let rig = rig([]);
    let body = r#"{"model":"m","prompt":"x","max_tokens":300,"n":4}"#;
    let fault = rig.call(flow(Method::POST, "/v1/completions", Some("sk-a1"), body)).await.unwrap_err();
    assert_eq!((fault.class.code, fault.class.retry), (Code::TokensRateLimited, Retry::Never));
    assert!(fault.message.contains("needs 1201 tokens, the limit on tokens per minute is 1000"), "{fault}");
    assert_eq!(rig.left(), (9, 1000), "a refused request takes no tokens");
}

#[tokio::test(start_paused = true)]
async fn every_ending_settles_for_what_was_used() {
    let fails = |chunks: Vec<Chunk>| {
        Play::Reply(ReplyForm::Sse, chunks.into_iter().map(Ok).chain([Err(upstream_failed())]).collect())
    };
    let usage =
        |p, c| Some(Usage { prompt_tokens: p, completion_tokens: c, cached_tokens: 0, ..Usage::default() });
    let cases: Vec<(&str, Play, &str, u64, Value)> = vec![
        ("events", generation(), "m", 13, json!(["team-a", 200, "ok", 10, 3, 8, false, false])),
        (
            "cut by an error: the engine's own count",
            fails(vec![started(), delta(1), delta(2)]),
            "m",
            13,
            json!(["team-a", 200, "upstream_failed", 10, 3, 8, false, true]),
        ),
        (
            "events that just end",
            whole(ReplyForm::Sse, vec![started(), delta(1)]),
            "m",
            11,
            json!(["team-a", 200, "cut", 10, 1, 8, false, true]),
        ),
        (
            "an upstream's last usage counts, not the sum",
            whole(
                ReplyForm::Sse,
                vec![
                    verbatim("data: {}\n\n", usage(9, 1), 1),
                    verbatim("data: {}\n\n", usage(9, 2), 1),
                    verbatim("data: [DONE]\n\n", None, 0),
                ],
            ),
            "m",
            11,
            json!(["team-a", 200, "ok", 9, 2, 0, false, false]),
        ),
        (
            "an upstream without usage is estimated",
            whole(ReplyForm::Sse, vec![verbatim("data: {}\n\n", None, 1), verbatim("data: {}\n\n", None, 1)]),
            "estimated",
            12,
            json!(["team-a", 200, "ok", 10, 2, 0, true, false]),
        ),
        (
            "a body",
            whole(ReplyForm::Json, vec![verbatim("{}", usage(10, 4), 0)]),
            "m",
            14,
            json!(["team-a", 200, "ok", 10, 4, 0, false, false]),
        ),
        (
            "refused below: nothing is charged",
            Play::Fault(upstream_failed()),
            "m",
            0,
            json!(["team-a", 502, "upstream_failed", 0, 0, 0, false, false]),
        ),
        (
            "more than was held becomes debt",
            whole(ReplyForm::Sse, vec![started(), done(10, 190, 0)]),
            "m",
            200,
            json!(["team-a", 200, "ok", 10, 190, 0, false, false]),
        ),
    ];
    for (name, play, model, used, expect) in cases {
        let rig = rig([play]);
        if let Ok(reply) = rig.call(ask_for(model, Some("sk-a1"))).await {
            read_all(reply).await;
        }
        assert_eq!(rig.left(), (9, 1000 - used), "{name}");
        let audit = rig.audit().await;
        assert_eq!(audit.len(), 1, "{name}");
        assert_eq!(brief(&audit[0]), expect, "{name}");
        assert_eq!(rig.holds(), 0, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_before_the_reply_pays_for_its_prompt() {
    let rig = rig([Play::Pending]);
    let wait = tokio::time::timeout(Duration::from_millis(1), rig.call(ask(Some("sk-a1")))).await;
    assert!(wait.is_err());
    assert_eq!((rig.left(), rig.holds()), ((9, 990), 0));
    let audit = rig.audit().await;
    assert_eq!(audit.len(), 1);
    assert_eq!(brief(&audit[0]), json!(["team-a", 499, "cancelled", 10, 0, 0, false, false]));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_within_the_reply_pays_for_what_was_produced() {
    let rig = rig([Play::Stuck(vec![started(), delta(1), delta(4)])]);
    let mut reply = rig.call(ask(Some("sk-a1"))).await.unwrap();
    for _ in 0..3 {
        reply.chunks.next().await.unwrap().unwrap();
    }
    assert_eq!(rig.left(), (9, 900));
    drop(reply);
    assert_eq!((rig.left(), rig.holds()), ((9, 985), 0));
    let audit = rig.audit().await;
    assert_eq!(audit.len(), 1);
    assert_eq!(brief(&audit[0]), json!(["team-a", 200, "cancelled", 10, 5, 8, false, true]));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_after_the_last_chunk_has_a_whole_reply() {
    for (form, chunks) in [
        (ReplyForm::Sse, vec![started(), done(10, 0, 0)]),
        (ReplyForm::Sse, vec![verbatim("data: {}\n\n", None, 0), verbatim("data: [DONE]\n\n", None, 0)]),
        (ReplyForm::Json, vec![verbatim("{}", Some(Usage::default()), 0)]),
    ] {
        let count = chunks.len();
        let rig = rig([whole(form, chunks)]);
        let mut reply = rig.call(ask(Some("sk-a1"))).await.unwrap();
        for _ in 0..count {
            reply.chunks.next().await.unwrap().unwrap();
        }
        drop(reply);
        let audit = rig.audit().await;
        assert_eq!((audit.len(), &audit[0]["outcome"]), (1, &json!("ok")));
    }
}

#[tokio::test(start_paused = true)]
async fn after_an_error_the_layers_below_are_let_go() {
    let chunks = stream::iter([Err(upstream_failed())]).chain(stream::pending());
    let chunks: ChunkStream = Box::pin(chunks);
    let rig = rig([]);
    let slot = rig.gateway.audit_slot().await.unwrap();
    let origin = ask(None).origin;
    let account = Account::open(origin, rig.gateway.clock, rig.gateway.metrics.clone(), slot, "/");
    let mut metered = Metered::new(chunks, ReplyForm::Sse, account);
    assert!(metered.next().await.unwrap().is_err());
    assert!(metered.next().await.is_none(), "not pending: the stream below is gone");
}

#[tokio::test(start_paused = true)]
async fn a_router_says_for_whom_it_calls() {
    let tenant = async |rig: Rig, key: Option<&str>, told: &str| {
        let mut flow = flow(Method::POST, "/v1/completions", key, r#"{"model": "m", "prompt": "p"}"#);
        flow.stage.headers.insert("x-gateway-inference-fairness-id", told.parse().unwrap());
        let reply = rig.call(flow).await;
        read_all(reply.unwrap_or_else(|fault| panic!("{fault}"))).await;
        let call = rig.script.calls.lock().unwrap().pop().unwrap();
        let counted = rig.registry.render().contains("{consumer=\"team-a\"");
        (call.caller.consumer.as_str().to_owned(), counted)
    };
    let plays = || [whole(ReplyForm::Json, vec![verbatim("{}", None, 0)])];
    let open = || rig_of(None, tempfile::tempdir().unwrap(), plays());
    assert_eq!(tenant(open(), None, "team-a").await, ("team-a".into(), false), "no label that a client made");
    for useless in ["", &"x".repeat(129)] {
        assert_eq!(tenant(open(), None, useless).await.0, "anonymous");
    }
    assert_eq!(tenant(rig(plays()), Some("sk-b"), "team-a").await.0, "team-b", "who has a key is who it is");
}

/// Its only model is found by the proxy among those that the consumer may see: the request has nowhere to name one.
#[tokio::test(start_paused = true)]
async fn a_consumer_of_some_models_may_ask_for_the_tokenizer() {
    let rig = rig([whole(ReplyForm::Json, vec![verbatim("{}", None, 0)])]);
    let reply = rig.call(flow(Method::GET, "/tokenizer_info", Some("sk-b"), "")).await;
    read_all(reply.unwrap_or_else(|fault| panic!("{fault}"))).await;
    let call = rig.script.calls.lock().unwrap().pop().unwrap();
    assert!(call.caller.models.is_some(), "what it may see goes along");
}

#[tokio::test(start_paused = true)]
async fn listings_cost_a_request_and_no_tokens() {
    let rig = rig([whole(ReplyForm::Json, vec![verbatim("{\"data\":[]}", None, 0)])]);
    assert!(rig.call(flow(Method::GET, "/v1/models", None, "")).await.is_err(), "it needs a key");
    let reply = rig.call(flow(Method::GET, "/v1/models", Some("sk-a1"), "")).await.unwrap();
    assert!(reply.render.is_none());
    read_all(reply).await;
    assert_eq!(rig.left(), (9, 1000));
    let audit = rig.audit().await;
    assert_eq!(brief(&audit[1]), json!(["team-a", 200, "ok", 0, 0, 0, false, false]));
}

#[tokio::test(start_paused = true)]
async fn chats_without_max_tokens_hold_the_default() {
    let rig = rig([Play::Stuck(vec![])]);
    let body = r#"{"model":"m","messages":[{"role":"user","content":"123456789"}],"n":2}"#;
    let reply = rig.call(flow(Method::POST, "/v1/chat/completions", Some("sk-a1"), body)).await.unwrap();
    // (9 + 8 bytes) / 3.5, rounded up, and two choices of 256.
    assert_eq!(rig.left(), (9, 1000 - 5 - 512));
    drop(reply);
}

#[tokio::test(start_paused = true)]
async fn without_a_config_everybody_is_anonymous() {
    let rig = rig_of(None, tempfile::tempdir().unwrap(), [generation()]);
    let reply = rig.call(ask(None)).await.unwrap();
    assert!(reply.headers.is_empty());
    read_all(reply).await;
    let call = rig.script.calls.lock().unwrap().pop().unwrap();
    assert_eq!(call.caller.consumer.as_str(), "anonymous");
    assert!(rig.audit().await.is_empty());
    assert!(rig.registry.render().contains("{consumer=\"anonymous\",outcome=\"ok\"} 1"));
}

#[tokio::test]
async fn long_prompts_leave_the_io_thread() {
    let rig = rig([generation(), generation()]);
    let unlimited = |text: String| {
        let body = json!({"model": "m", "prompt": text}).to_string();
        flow(Method::POST, "/v1/completions", Some("sk-b"), &body)
    };
    read_all(rig.call(unlimited("x".into())).await.unwrap()).await;
    read_all(rig.call(unlimited("x".repeat(10_000))).await.unwrap()).await;
    let here = std::thread::current().id();
    let threads: Vec<_> = rig.encoder.threads.lock().unwrap().iter().map(|thread| *thread == here).collect();
    assert_eq!(threads, [true, false]);
    let calls = rig.script.calls.lock().unwrap();
    assert_eq!(calls[1].ids.tokens(), 10_000);
}

#[tokio::test]
async fn what_can_not_fit_is_refused_before_it_is_tokenized() {
    let rig = rig([]);
    let body = json!({"model": "short", "prompt": " ".repeat(10 << 20)}).to_string();
    let fault = rig.call(flow(Method::POST, "/v1/completions", Some("sk-a1"), &body)).await.unwrap_err();
    assert_eq!(fault.class.code, Code::ContextLengthExceeded, "{fault}");
    assert!(rig.encoder.threads.lock().unwrap().is_empty(), "the encoder was not asked");
    assert_eq!(rig.left(), (9, 1000));
}

#[tokio::test(start_paused = true)]
async fn a_request_is_charged_before_it_is_read() {
    let rig = rig([]);
    let bad = || rig.call(flow(Method::POST, "/v1/completions", Some("sk-a1"), "{"));
    for n in 1..=10 {
        assert_eq!(bad().await.unwrap_err().class.code, Code::BadRequest);
        assert_eq!(rig.left(), (10 - n, 1000));
    }
    assert_eq!(bad().await.unwrap_err().class.code, Code::RequestsRateLimited);
    let listing = rig.call(flow(Method::GET, "/v1/models", Some("sk-a1"), "")).await.unwrap_err();
    assert_eq!(listing.class.code, Code::RequestsRateLimited);
    assert_eq!(rig.holds(), 0);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_tokenized_for_who_has_no_tokens_left() {
    let rig = rig([
        whole(ReplyForm::Sse, vec![started(), done(10, 990, 0)]),
        whole(ReplyForm::Json, vec![verbatim("{\"data\":[]}", None, 0)]),
    ]);
    read_all(rig.call(ask(Some("sk-a1"))).await.unwrap()).await;
    assert_eq!(rig.left(), (9, 0));
    let fault = rig.call(ask(Some("sk-a1"))).await.unwrap_err();
    assert_eq!((fault.class.code, rig.left()), (Code::TokensRateLimited, (9, 0)));
    let remaining = ("x-ratelimit-remaining-requests", "9".to_owned());
    assert!(fault.headers.contains(&remaining), "{:?}", fault.headers);
    assert_eq!(rig.encoder.threads.lock().unwrap().len(), 1);
    // What needs none is not kept out.
    read_all(rig.call(flow(Method::GET, "/v1/models", Some("sk-a1"), "")).await.unwrap()).await;
}

/// A completion that is read on a thread for blocking work.
fn long(model: &str, key: &str) -> Flow<Received> {
    let body = json!({"model": model, "prompt": "x".repeat(10_000)}).to_string();
    flow(Method::POST, "/v1/completions", Some(key), &body)
}

type Calling<'a> = std::pin::Pin<Box<dyn Future<Output = Result<Reply, Fault>> + 'a>>;

async fn begin(calling: &mut Calling<'_>) {
    let begun = std::future::poll_fn(|cx| std::task::Poll::Ready(calling.as_mut().poll(cx).is_pending()));
    assert!(begun.await, "it has to wait");
}

fn slow_rig(plays: usize) -> (Rig, tokio::sync::mpsc::Receiver<()>, std::sync::mpsc::Sender<()>) {
    let config = "consumers: [{name: a, keys: env:A1}, {name: b, keys: env:B}]";
    let mut rig = rig_of(
        Some(&self::rig::config(config)),
        tempfile::tempdir().unwrap(),
        (0..plays).map(|_| generation()),
    );
    rig.gateway.reading = Arc::new(Semaphore::new(2));
    let (came, coming) = tokio::sync::mpsc::channel(8);
    let (tell, go) = std::sync::mpsc::channel();
    *rig.encoder.gate.lock().unwrap() = Some(Gate { came, go });
    (rig, coming, tell)
}

#[tokio::test]
async fn one_consumer_keeps_one_core_busy_at_most() {
    let (rig, mut coming, go) = slow_rig(3);
    let call = |model: &str, key: &str| -> Calling<'_> { Box::pin(rig.call(long(model, key))) };
    let mut first = call("slow", "sk-a1");
    begin(&mut first).await;
    coming.recv().await.unwrap();
    let (mut second, mut third) = (call("slow", "sk-a1"), call("slow", "sk-a1"));
    begin(&mut second).await;
    begin(&mut third).await;
    assert_eq!(rig.gateway.reading.available_permits(), 1, "who waits for a turn holds no core");
    read_all(call("m", "sk-b").await.unwrap()).await;
    // A client that leaves while it waits is not worked for.
    drop(second);
    go.send(()).unwrap();
    read_all(first.await.unwrap()).await;
    let (third, ()) = tokio::join!(third, async {
        coming.recv().await.unwrap();
        go.send(()).unwrap();
    });
    read_all(third.unwrap()).await;
    assert_eq!(rig.encoder.threads.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn nothing_more_is_done_for_a_client_that_has_left() {
    let (rig, mut coming, go) = slow_rig(0);
    let mut calling: Calling<'_> = Box::pin(rig.call(long("slow-look", "sk-a1")));
    begin(&mut calling).await;
    coming.recv().await.unwrap();
    drop(calling);
    assert_eq!(rig.gateway.reading.available_permits(), 1, "it is still in the work that it began");
    go.send(()).unwrap();
    let all = rig.gateway.reading.acquire_many(2).await.unwrap();
    assert!(rig.encoder.threads.lock().unwrap().is_empty(), "it was not tokenized");
    drop(all);
}

#[tokio::test(start_paused = true)]
async fn compressed_bodies_and_double_keys_are_refused() {
    let rig = rig([]);
    let mut gzipped = ask(Some("sk-a1"));
    gzipped.stage.headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    let fault = rig.call(gzipped).await.unwrap_err();
    assert_eq!(fault.class.code, Code::UnsupportedMediaType);
    assert!(fault.message.contains("content-encoding 'gzip'"), "{fault}");
    assert_eq!(fault.headers, [("accept-encoding", "identity".to_owned())]);

    let mut twice = ask(Some("sk-a1"));
    twice.stage.headers.append(header::AUTHORIZATION, HeaderValue::from_static("Bearer sk-secret"));
    let fault = rig.call(twice).await.unwrap_err();
    assert_eq!(fault.class.code, Code::BadRequest);
    assert!(fault.message.contains("'authorization' is there more than once"), "{fault}");
    assert_eq!(rig.audit().await[1]["consumer"], Value::Null);
}

#[tokio::test(start_paused = true)]
async fn what_can_not_be_audited_is_not_served() {
    let audit = tempfile::tempdir().unwrap();
    let mut config = config(CONFIG);
    config.audit = Some(crate::AuditConfig { dir: audit.path().to_owned(), pending_max: 1 });
    let rig = rig_of(Some(&config), audit, [Play::Stuck(vec![]), generation()]);
    let open = rig.call(ask(Some("sk-a1"))).await.unwrap();
    let fault = rig.call(ask(Some("sk-a1"))).await.unwrap_err();
    assert_eq!(fault.class.code, Code::Overloaded);
    assert_eq!(rig.script.calls.lock().unwrap().len(), 1);
    assert!(rig.registry.render().contains("forebay_gateway_audit_refused_total 1"));
    drop(open);
    rig.gateway.flush_audit().await;
    read_all(rig.call(ask(Some("sk-a1"))).await.unwrap()).await;
}

#[test]
fn mistakes_in_the_config_say_where() {
    let check = |yaml: &str, at: &str, message: &str| {
        let error = build(yaml, Arc::default()).err().unwrap_or_else(|| panic!("{yaml} was accepted"));
        assert_eq!((error.at(), error.to_string()), (Some(at), message.to_owned()), "{yaml}");
    };
    check(
        "consumers: []",
        "gateway.consumers",
        "`gateway.consumers` is empty, so nobody could call; add a consumer, or remove the `gateway` section",
    );
    check(
        "consumers: [{name: a, keys: []}]",
        "gateway.consumers[0].keys",
        "`gateway.consumers[0].keys` is empty; a consumer needs a key, like `env:TEAM_A_KEY`",
    );
    check(
        "consumers: [{name: a, keys: env:A1}, {name: a, keys: env:B}]",
        "gateway.consumers[1].name",
        "`gateway.consumers[1].name`: there is another consumer named `a`",
    );
    check(
        "consumers: [{name: a, keys: env:A1}, {name: b, keys: [env:B, env:A1]}]",
        "gateway.consumers[1].keys[1]",
        "`gateway.consumers[1].keys[1]`: consumer `a` has the same key; whose a request is must be certain",
    );
    check(
        "consumers: [{name: a, keys: env:A1, models: []}]",
        "gateway.consumers[0].models",
        "`gateway.consumers[0].models` is empty, which allows nothing; name models, or remove it to allow all",
    );
    check(
        "consumers: [{name: a, keys: env:NONE}]",
        "gateway.consumers[0].keys[0]",
        "`gateway.consumers[0].keys[0]`: environment variable `NONE` is not set; set it, or name another one with \
         `env:NAME`",
    );
    check(
        "{consumers: [{name: a, keys: env:A1}], key-bytes-max: 4}",
        "gateway.consumers[0].keys[0]",
        "`gateway.consumers[0].keys[0]`: the key has more than 4 bytes (`gateway.key-bytes-max`)",
    );
    check(
        "consumers: [{name: a, keys: 'with a blank'}]",
        "gateway.consumers[0].keys[0]",
        "`gateway.consumers[0].keys[0]`: the key has blanks or characters that a header can't carry",
    );
    check(
        "{consumers: [{name: a, keys: env:A1}], cache-salt: consumer, cache-salt-secret: env:B}",
        "gateway.cache-salt-secret",
        "`gateway.cache-salt-secret`: the secret has fewer than 16 bytes, so it could be guessed",
    );
    check(
        "{consumers: [{name: a, keys: env:A1}], cache-salt: consumer, cache-salt-secret: env:NONE}",
        "gateway.cache-salt-secret",
        "`gateway.cache-salt-secret`: environment variable `NONE` is not set; set it, or name another one with \
         `env:NAME`",
    );
    check(
        "{consumers: [{name: a, keys: env:A1}], cache-salt-secret: env:B}",
        "gateway.cache-salt-secret",
        "`gateway.cache-salt-secret` is for `gateway.cache-salt: consumer`; set that, or remove it",
    );
}

#[tokio::test(start_paused = true)]
async fn each_consumer_has_a_salt_of_its_own() {
    let salts = async |salted: &str| {
        let config = config(&format!("{CONFIG}{salted}"));
        let plays = std::iter::repeat_with(generation).take(4);
        let rig = rig_of(Some(&config), tempfile::tempdir().unwrap(), plays);
        let plain = r#"{"model":"m","prompt":"top secret"}"#;
        let own = r#"{"model":"m","prompt":"top secret","cache_salt":"own"}"#;
        for (key, body) in [("sk-a1", plain), ("sk-a2", plain), ("sk-b", plain), ("sk-a1", own)] {
            let flow = flow(Method::POST, "/v1/completions", Some(key), body);
            read_all(rig.call(flow).await.unwrap()).await;
        }
        let calls = rig.script.calls.lock().unwrap();
        let salt_of = |call: &Admitted| match &call.ask {
            Ask::Generate(call) => call.cache_salt.clone(),
            other => panic!("{other:?}"),
        };
        calls.iter().map(salt_of).collect::<Vec<_>>()
    };
    assert_eq!(salts("").await, [None, None, None, Some("own".to_owned())]);
    let first = salts("cache-salt: consumer").await;
    assert!(first.iter().flatten().all(|salt| salt.len() == 64), "{first:?}");
    assert_eq!(first[0], first[1], "by either key");
    assert!(first[0] != first[2] && first[0] != first[3] && first[2] != first[3], "{first:?}");
    assert_ne!(first, salts("cache-salt: consumer").await, "without a secret they are of this start only");
}

#[test]
fn zero_is_no_limit_that_can_be_set() {
    let yaml = "consumers: [{name: a, keys: env:A1, limits: {tokens-per-minute: 0}}]";
    assert!(load::<GatewayConfig>(&Source::new("forebay.yaml", yaml)).is_err());
}

#[tokio::test(start_paused = true)]
async fn embeddings_are_held_and_charged_by_their_tokens() {
    let usage = Usage { prompt_tokens: 9, completion_tokens: 0, ..Usage::default() };
    let rig = rig([whole(ReplyForm::Json, vec![verbatim("{}", Some(usage), 0)])]);
    let body = r#"{"model":"m","input":["12345","67890"]}"#;
    let reply = rig.call(flow(Method::POST, "/v1/embeddings", Some("sk-a1"), body)).await.unwrap();
    assert_eq!((rig.left(), rig.holds()), ((9, 997), 1), "the estimate of 10 bytes, and no output");
    read_all(reply).await;
    assert_eq!((rig.left(), rig.holds()), ((9, 991), 0));
    let audit = rig.audit().await;
    assert_eq!(brief(&audit[0]), json!(["team-a", 200, "ok", 9, 0, 0, false, false]));
    assert_eq!((&audit[0]["model"], &audit[0]["path"]), (&json!("m"), &json!("/v1/embeddings")));
}
