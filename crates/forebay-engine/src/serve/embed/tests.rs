//! The engine through its stage: a tiny BERT for what it answers, a fake for when it computes.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc as blocking;

use forebay_flow::{Caller, Origin};
use forebay_observe::{Registry, Trace, TraceContext};
use forebay_quota::Ledger;
use forebay_types::ConsumerName;
use forebay_wire::{Generate, Tokenize, VectorFormat};
use futures_util::StreamExt;
use serde_json::Value;

use super::*;
use crate::metrics::EngineMetrics;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-bert")
}

struct Bench {
    engine: EmbeddingEngine,
    registry: Registry,
}

/// The model of the fixture.
fn bench(config: EngineConfig) -> Bench {
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).expect("registers once");
    let deps = EngineDeps { metrics: &metrics, kv_sink: None, isa: None };
    let engine = EmbeddingEngine::start(&config, &fixture(), "tiny".into(), deps).expect("it starts");
    Bench { engine, registry }
}

/// Says which lengths it was given, and computes nothing before it may.
struct Gate {
    seen: Arc<Mutex<Vec<Vec<usize>>>>,
    begun: blocking::Sender<()>,
    go: blocking::Receiver<()>,
    zeros: Vec<f32>,
}

impl Encoder for Gate {
    fn dim(&self) -> usize {
        36
    }

    fn encode(&mut self, sequences: &[Arc<[TokenId]>]) -> &[f32] {
        self.seen.lock().unwrap().push(sequences.iter().map(|ids| ids.len()).collect());
        let _ = self.begun.send(());
        self.go.recv().expect("the test lets it go on");
        self.zeros.resize(sequences.len() * 36, 0.0);
        &self.zeros
    }
}

struct Gated {
    bench: Bench,
    seen: Arc<Mutex<Vec<Vec<usize>>>>,
    begun: blocking::Receiver<()>,
    go: blocking::Sender<()>,
}

fn gated(config: EngineConfig) -> Gated {
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).expect("registers once");
    let spec = EncoderSpec::read(&fixture()).expect("a fixture");
    let text = text::read(&fixture()).expect("a fixture");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let ((begun, has_begun), (go, may_go)) = (blocking::channel(), blocking::channel());
    let gate = Gate { seen: seen.clone(), begun, go: may_go, zeros: Vec::new() };
    let (begin, metrics) = (Instant::now(), metrics.for_encoder("tiny", 48));
    let engine =
        EmbeddingEngine::run(&config, "tiny".into(), text, spec, gate, metrics, begin, String::new());
    Gated { bench: Bench { engine: engine.expect("a thread"), registry }, seen, begun: has_begun, go }
}

fn texts(texts: &[&str]) -> Embed {
    of(Prompt::Text(texts.iter().map(|&text| text.to_owned()).collect()))
}

fn of(input: Prompt) -> Embed {
    Embed {
        model: "alias".into(),
        input,
        format: VectorFormat::Float,
        dimensions: None,
        normalize: None,
        truncate_prompt_tokens: None,
        add_special_tokens: true,
        priority: 0,
        request_id: None,
        user: None,
        needs: Vec::new(),
        body: bytes::Bytes::new(),
    }
}

impl Bench {
    async fn call(&self, ask: Ask, ids: PromptIds) -> Result<Reply, Fault> {
        self.call_as("anonymous".into(), ask, ids).await
    }

    async fn call_as(&self, consumer: ConsumerName, ask: Ask, ids: PromptIds) -> Result<Reply, Fault> {
        let now = Instant::now();
        let origin = Origin {
            id: "r1".into(),
            received: now,
            peer: ([127, 0, 0, 1], 1).into(),
            trace: Trace::new(TraceContext::from_header(None, [1; 24]), now),
        };
        let hold = Ledger::unlimited().try_hold(Duration::ZERO, 0).expect("no limits");
        let caller = Caller { consumer, models: None };
        let placed = Placed { caller, ask, ids, held: hold.proof() };
        self.engine.call(Flow::new(Arc::new(origin), placed)).await
    }

    async fn embed(&self, call: Embed) -> Result<Value, Fault> {
        self.embed_ids(call, PromptIds::none()).await
    }

    async fn embed_ids(&self, call: Embed, ids: PromptIds) -> Result<Value, Fault> {
        let mut reply = self.call(Ask::Embed(Arc::new(call)), ids).await?;
        assert_eq!(reply.form, ReplyForm::Json);
        let Some(Ok(Chunk::Verbatim { bytes, usage, .. })) = reply.chunks.next().await else {
            panic!("one body")
        };
        assert!(reply.chunks.next().await.is_none());
        let body: Value = serde_json::from_slice(&bytes).expect("JSON");
        let tokens = usage.expect("it is accounted for").prompt_tokens;
        assert_eq!(body["usage"]["prompt_tokens"], tokens);
        Ok(body)
    }

    async fn vectors(&self, call: Embed) -> Vec<Vec<f32>> {
        vectors(&self.embed(call).await.expect("vectors"))
    }

    /// Waits until a line of the metrics is there: the engine's thread publishes before and after a batch.
    async fn wait_for(&self, line: &str) {
        let give_up = Instant::now() + Duration::from_secs(20);
        while !self.registry.render().lines().any(|seen| seen == line) {
            assert!(Instant::now() < give_up, "{line} did not come:\n{}", self.registry.render());
            tokio::task::yield_now().await;
        }
    }

    async fn refusal(&self, call: Embed) -> Fault {
        self.embed(call).await.expect_err("it is refused")
    }
}

fn vectors(body: &Value) -> Vec<Vec<f32>> {
    let numbers = |item: &Value| {
        let list = item["embedding"].as_array().expect("numbers").iter();
        list.map(|x| x.as_f64().expect("a number") as f32).collect()
    };
    body["data"].as_array().expect("a list").iter().map(numbers).collect()
}

#[tokio::test]
async fn texts_and_ids_get_the_vectors_of_transformers() {
    let cases: Vec<Value> =
        serde_json::from_str(include_str!("../../../tests/fixtures/tiny-bert.json")).expect("a fixture");
    let bench = bench(EngineConfig::default());
    let text = |case: &Value| case["text"].as_str().expect("a text").to_owned();
    let ids =
        |case: &Value| -> Vec<TokenId> { serde_json::from_value(case["ids"].clone()).expect("token ids") };
    let body = bench.embed(of(Prompt::Text(cases.iter().map(text).collect()))).await.expect("vectors");
    assert_eq!(
        (&body["model"], &body["object"], &body["id"]),
        (&"alias".into(), &"list".into(), &"embd-r1".into())
    );
    assert_eq!(body["usage"]["total_tokens"], cases.iter().map(|case| ids(case).len()).sum::<usize>());
    let by_text = vectors(&body);
    for (index, (ours, case)) in by_text.iter().zip(&cases).enumerate() {
        assert_eq!(body["data"][index]["index"], index);
        for (ours, theirs) in ours.iter().zip(case["mean"].as_array().expect("numbers")) {
            assert!((f64::from(*ours) - theirs.as_f64().expect("a number")).abs() < 1e-5, "{}", text(case));
        }
    }
    let all_ids: Vec<Vec<TokenId>> = cases.iter().map(ids).collect();
    assert_eq!(bench.vectors(of(Prompt::Tokens(all_ids.clone()))).await, by_text);
    // As the gateway counted them.
    let exact = bench.engine.encode(&of(Prompt::Tokens(all_ids))).expect("ids");
    let body = bench.embed_ids(texts(&["not tokenized again"]), exact).await.expect("vectors");
    assert_eq!(vectors(&body), by_text);
    let metrics = bench.registry.render();
    for line in [
        "vllm:request_success_total{engine=\"0\",finished_reason=\"stop\",model_name=\"tiny\"} 15",
        "vllm:generation_tokens_total{engine=\"0\",model_name=\"tiny\"} 0",
        "vllm:request_prompt_tokens_count{engine=\"0\",model_name=\"tiny\"} 15",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    bench.engine.stop();
}

#[tokio::test]
async fn vectors_are_cut_and_normalised_as_asked() {
    let bench = bench(EngineConfig::default());
    let length = |vector: &[f32]| vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    let vector = bench.vectors(texts(&["water"])).await.remove(0);
    assert!((length(&vector) - 1.0).abs() < 1e-6);
    let raw = bench.vectors(Embed { normalize: Some(false), ..texts(&["water"]) }).await.remove(0);
    let scale = length(&raw);
    assert!((scale - 1.0).abs() > 0.1);
    for (raw, vector) in raw.iter().zip(&vector) {
        assert!((raw / scale - vector).abs() < 1e-6);
    }
    let text = Embed { format: VectorFormat::Base64, ..texts(&["water"]) };
    let body = bench.embed(text).await.expect("vectors");
    // 36 numbers of 4 bytes.
    assert_eq!(body["data"][0]["embedding"].as_str().map(str::len), Some(36 * 4 / 3 * 4));
    // No special tokens around it: another text to the model, and two tokens fewer.
    let bare = bench.embed(Embed { add_special_tokens: false, ..texts(&["water"]) }).await.expect("vectors");
    assert_eq!(bare["usage"]["prompt_tokens"], 1);
    assert_ne!(vectors(&bare)[0], vector);
}

#[tokio::test]
async fn what_is_too_long_is_cut_only_where_asked() {
    let bench = bench(EngineConfig { max_model_len: Some(10), ..EngineConfig::default() });
    assert_eq!(bench.engine.model_len(), 10);
    let long = "water ".repeat(20);
    let fault = bench.refusal(texts(&["a", &long])).await;
    assert_eq!(fault.class.code, Code::ContextLengthExceeded);
    assert_eq!(
        fault.message,
        "This model's maximum context length is 10 tokens. However, you requested 22 tokens in the input for embedding \
         generation. Please reduce the length of the input."
    );
    let cut = |tokens| Embed { truncate_prompt_tokens: Some(tokens), ..texts(&[&long]) };
    // What Hugging Face's tokenizers leave: the first words, and the end token.
    assert_eq!(bench.vectors(cut(-1)).await, bench.vectors(texts(&["water ".repeat(8).trim()])).await);
    assert_eq!(bench.vectors(cut(5)).await, bench.vectors(texts(&["water water water"])).await);
    let body = bench.embed(cut(1)).await.expect("vectors");
    assert_eq!(body["usage"]["prompt_tokens"], 1);
    // Far more text than could ever fit: refused without a look at its tokens, and cut all the same.
    let huge = "a".repeat(10 * TOKEN_BYTES_MAX + 1);
    assert!(bench.refusal(texts(&[&huge])).await.message.contains("which is 4000 bytes of text at most"));
    let cut_huge = Embed { truncate_prompt_tokens: Some(-1), ..texts(&[&huge]) };
    assert_eq!(bench.embed(cut_huge).await.expect("vectors")["usage"]["prompt_tokens"], 3);
}

#[tokio::test]
async fn what_cannot_be_answered_is_refused() {
    let bench = bench(EngineConfig::default());
    let check = async |call: Embed, param: &str, message: &str| {
        let fault = bench.refusal(call).await;
        assert_eq!((fault.param.as_deref(), fault.class.blame), (Some(param), Blame::Client), "{fault}");
        assert!(fault.message.contains(message), "{fault}");
    };
    check(of(Prompt::Tokens(vec![vec![1], vec![97]])), "input", "token id 97 is out of the vocabulary of 97")
        .await;
    check(
        Embed { dimensions: Some(8), ..texts(&["a"]) },
        "dimensions",
        "Model \"alias\" does not support matryoshka representation",
    )
    .await;
    let cut = |n| Embed { truncate_prompt_tokens: Some(n), ..texts(&["a"]) };
    check(cut(0), "truncate_prompt_tokens", "must be -1 or at least 1").await;
    check(cut(49), "truncate_prompt_tokens", "value (49) is greater than max_model_len (48)").await;
    let empty = Embed { add_special_tokens: false, ..texts(&[""]) };
    check(empty, "input", "the input is empty").await;
    let needs = vec![forebay_wire::Need { param: "endianness".into(), what: "w" }];
    check(Embed { needs, ..texts(&["a"]) }, "endianness", "not supported here").await;
}

#[tokio::test]
async fn other_apis() {
    let bench = bench(EngineConfig::default());
    for (api, name) in [(Api::ChatCompletions, "Chat Completions"), (Api::Completions, "Completions")] {
        let call = Generate::new(api, "tiny".into(), Prompt::Text(vec!["a".into()]));
        let fault =
            bench.call(Ask::Generate(Box::new(call)), PromptIds::none()).await.expect_err("an encoder");
        assert_eq!(fault.message, format!("The model does not support {name} API"));
        assert_eq!((fault.class.code, fault.class.retry), (Code::NotSupported, Retry::Elsewhere));
    }
    let tokenize = async |input| {
        let call = Tokenize {
            model: None,
            input,
            add_special_tokens: None,
            return_token_strs: true,
            body: bytes::Bytes::new(),
        };
        let mut reply = bench.call(Ask::Tokenize(call), PromptIds::none()).await?;
        let Some(Ok(Chunk::Verbatim { bytes, .. })) = reply.chunks.next().await else { panic!("one body") };
        Ok::<Value, Fault>(serde_json::from_slice(&bytes).expect("JSON"))
    };
    let body = tokenize(TokenizeInput::Prompt("Water".into())).await.expect("tokens");
    assert_eq!(body["token_strs"], serde_json::json!(["[CLS]", "water", "[SEP]"]));
    assert_eq!(body["max_model_len"], 48);
    let messages = TokenizeInput::Messages {
        messages: Vec::new(),
        tools: None,
        add_generation_prompt: true,
        continue_final_message: false,
        chat_template_kwargs: None,
    };
    assert_eq!(tokenize(messages).await.expect_err("no template").param.as_deref(), Some("messages"));
}

/// Ids of these lengths.
fn lengths(lengths: &[usize]) -> Embed {
    of(Prompt::Tokens(lengths.iter().map(|&length| vec![5; length]).collect()))
}

#[tokio::test]
async fn batches_mix_requests_and_who_leaves_is_left_out() {
    let config = EngineConfig { max_num_batched_tokens: 8, ..EngineConfig::default() };
    let Gated { bench, seen, begun, go } = gated(config);
    let bench = Arc::new(bench);
    let ask = |consumer: &'static str, call: Embed| {
        let bench = bench.clone();
        tokio::spawn(async move {
            bench.call_as(consumer.into(), Ask::Embed(Arc::new(call)), PromptIds::none()).await
        })
    };
    let first = ask("a", lengths(&[3]));
    // It computes: what comes now waits.
    tokio::task::spawn_blocking(move || begun.recv().map(|()| begun)).await.expect("joins").expect("begun");
    let large = ask("a", lengths(&[4, 4, 4]));
    let leaves = ask("b", lengths(&[7, 7]));
    let small = ask("c", lengths(&[2]));
    // All three are in the inbox once its places are taken.
    while bench.engine.inbox.capacity() > INBOX_MAX - 3 {
        tokio::task::yield_now().await;
    }
    leaves.abort();
    assert!(leaves.await.is_err());
    (0..4).for_each(|_| go.send(()).expect("the engine waits"));
    for answered in [first, large, small] {
        answered.await.expect("joins").expect("vectors");
    }
    assert_eq!(*seen.lock().unwrap(), [vec![3], vec![4, 2], vec![4, 4]]);
    let aborted = "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"tiny\"} 2";
    assert!(bench.registry.render().contains(aborted), "{}", bench.registry.render());
}

#[tokio::test]
async fn a_request_is_aborted_by_its_own_id() {
    let Gated { bench, seen, begun, go } = gated(EngineConfig::default());
    let bench = Arc::new(bench);
    let ask = |request_id: Option<&str>, call: Embed| {
        let (bench, request_id) = (bench.clone(), request_id.map(str::to_owned));
        tokio::spawn(async move { bench.embed(Embed { request_id, ..call }).await })
    };
    let first = ask(Some("mine"), lengths(&[3]));
    tokio::task::spawn_blocking(move || begun.recv().map(|()| begun)).await.expect("joins").expect("begun");
    let second = ask(Some("yours"), lengths(&[2]));
    while bench.engine.inbox.capacity() > INBOX_MAX - 1 {
        tokio::task::yield_now().await;
    }
    bench.engine.abort(&Aborted::ids(["nobody".into(), "embd-yours".into()]));
    let fault = second.await.expect("joins").expect_err("aborted");
    assert_eq!((fault.class.code, fault.class.retry), (Code::BadRequest, Retry::Never));
    (0..2).for_each(|_| go.send(()).expect("the engine waits"));
    assert_eq!(first.await.expect("joins").expect("vectors")["id"], "embd-mine");
    assert_eq!(*seen.lock().unwrap(), [vec![3]], "what was aborted is not computed");
}

#[tokio::test]
async fn a_full_queue_refuses() {
    let check = async |config: EngineConfig, waiting: Embed, reason: &str, words: &str| {
        let Gated { bench, begun, go, .. } = gated(config);
        let bench = Arc::new(bench);
        let ask = |call: Embed| {
            let bench = bench.clone();
            tokio::spawn(async move { bench.embed(call).await })
        };
        let first = ask(waiting);
        tokio::task::spawn_blocking(move || begun.recv().map(|()| begun))
            .await
            .expect("joins")
            .expect("begun");
        let second = ask(lengths(&[1]));
        while bench.engine.inbox.capacity() > INBOX_MAX - 1 {
            tokio::task::yield_now().await;
        }
        (0..4).for_each(|_| go.send(()).expect("the engine waits"));
        let fault = second.await.expect("joins").expect_err("refused");
        assert_eq!(fault.class.code, Code::Overloaded);
        assert!(matches!(fault.class.retry, Retry::After(_)) && fault.message.contains(words), "{fault}");
        first.await.expect("joins").expect("what was taken is answered");
        let metrics = bench.registry.render();
        assert!(metrics.contains(&format!("reason=\"{reason}\"}} 1")), "{metrics}");
    };
    let small = || EngineConfig { max_num_batched_tokens: 4, ..EngineConfig::default() };
    check(
        EngineConfig { max_num_queued_reqs: 1, ..small() },
        lengths(&[4, 4]),
        "max_num_queued_reqs",
        "currently busy",
    )
    .await;
    check(
        EngineConfig { max_num_queued_tokens: 3, ..small() },
        lengths(&[4, 4]),
        "max_num_queued_tokens",
        "backlog",
    )
    .await;
}

#[tokio::test]
async fn a_request_has_a_deadline() {
    let timeout = forebay_config::HumanDuration::from_millis(0);
    let bench = gated(EngineConfig { request_timeout: timeout, ..EngineConfig::default() }).bench;
    // The configuration refuses 0 at the start; here it makes the deadline certain.
    let fault = bench.refusal(lengths(&[1])).await;
    assert_eq!(fault.class.code, Code::UpstreamTimeout);
}

#[test]
fn what_means_nothing_for_an_encoder_is_refused() {
    let check = |config: EngineConfig, expect: Option<&str>| {
        let at = EmbeddingEngine::inspect(&config, &fixture()).err().map(|error| error.at().to_owned());
        assert_eq!(at.as_deref(), expect);
    };
    check(EngineConfig::default(), None);
    check(EngineConfig { max_model_len: Some(48), ..EngineConfig::default() }, None);
    check(EngineConfig { max_model_len: Some(49), ..EngineConfig::default() }, Some("engine.max-model-len"));
    check(
        EngineConfig { tensor_parallel_size: 2, ..EngineConfig::default() },
        Some("engine.tensor-parallel-size"),
    );
    check(EngineConfig { block_size: 7, ..EngineConfig::default() }, Some("engine"));
    let missing = EmbeddingEngine::inspect(&EngineConfig::default(), Path::new("/no/such"));
    assert_eq!(missing.err().map(|error| error.at()), Some("engine.model"));
}

#[tokio::test]
async fn a_batch_that_hangs_is_noticed_and_so_is_its_end() {
    let watchdog = forebay_config::HumanDuration::from_millis(20);
    let Gated { bench, begun, go, .. } = gated(EngineConfig { watchdog, ..EngineConfig::default() });
    let bench = Arc::new(bench);
    assert!(!bench.engine.is_stuck());
    let ask = tokio::spawn({
        let bench = bench.clone();
        async move { bench.embed(lengths(&[3, 4])).await }
    });
    tokio::task::spawn_blocking(move || begun.recv().map(|()| begun)).await.expect("joins").expect("begun");
    bench.wait_for("forebay_engine_stuck_steps_total{engine=\"0\",model_name=\"tiny\"} 1").await;
    assert!(bench.engine.is_stuck());
    go.send(()).expect("the engine waits");
    ask.await.expect("joins").expect("vectors");
    bench.wait_for("vllm:num_requests_running{engine=\"0\",model_name=\"tiny\"} 0").await;
    assert!(!bench.engine.is_stuck(), "nothing is computed any more");
}

#[tokio::test]
async fn queue_and_batches_are_counted() {
    let config = EngineConfig { max_num_batched_tokens: 8, ..EngineConfig::default() };
    let Gated { bench, begun, go, .. } = gated(config);
    let bench = Arc::new(bench);
    let ask = tokio::spawn({
        let bench = bench.clone();
        async move { bench.embed(lengths(&[4, 4, 5, 6])).await }
    });
    tokio::task::spawn_blocking(move || begun.recv().map(|()| begun)).await.expect("joins").expect("begun");
    let labels = "{engine=\"0\",model_name=\"tiny\"}";
    bench.wait_for(&format!("forebay_engine_embed_queued_tokens{labels} 11")).await;
    bench.wait_for(&format!("vllm:num_requests_running{labels} 2")).await;
    bench.wait_for(&format!("vllm:num_requests_waiting{labels} 2")).await;
    (0..3).for_each(|_| go.send(()).expect("the engine waits"));
    ask.await.expect("joins").expect("vectors");
    bench.wait_for(&format!("forebay_engine_embed_queued_tokens{labels} 0")).await;
    // Two texts, then one and one: 5 and 6 tokens are more than a batch has.
    for line in [
        format!("forebay_engine_embed_batch_texts_count{labels} 3"),
        format!("forebay_engine_embed_batch_texts_sum{labels} 4"),
        format!("vllm:iteration_tokens_total_sum{labels} 19"),
        format!("vllm:request_params_n_count{labels} 4"),
        format!("vllm:request_params_max_tokens_count{labels} 0"),
        format!("vllm:prompt_tokens_total{labels} 19"),
    ] {
        bench.wait_for(&line).await;
    }
}
