//! The engine through its stage, with an executor that has no model: order of events, accounting, refusals,
//! cancellation, failures. No model, no HTTP.

mod constrained;
mod control;
mod held;
mod leaving;
mod metrics;
mod scores;
mod token_api;
mod tokens;
mod tools;
mod watchdog;

use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_flow::{Caller, Flow, Origin, Placed, PromptIds, Reply, Stage};
use forebay_kernels::Pool;
use forebay_observe::{Registry, Trace, TraceContext};
use forebay_quota::Ledger;
use forebay_schedule::{Scheduler, SchedulerConfig};
use forebay_tokens::{TextModel, TokenType, Tokenizer, Vocab};
use forebay_types::{Blame, Code, Fault, FinishReason, Retry, Usage};
use forebay_wire::{
    Api, Ask, ChatMessage, Chunk, Constraint, Content, Event, Generate, Need, Prompt, Sampling, StopReason,
    Tokenize, TokenizeInput,
};
use futures_util::StreamExt;

use super::Engine;
use crate::config::EngineConfig;
use crate::exec::{Executor, FakeExecutor};
use crate::metrics::{EngineMetrics, KvInfo};

/// Ids 0 to 255 are the bytes; 256 ends a text.
const EOS: u32 = 256;
const VOCAB: usize = 257;

/// A vocabulary of single bytes: a text's ids are its bytes, so that scripts can be read.
pub(super) fn text_model() -> TextModel {
    text_model_with(None, &[])
}

/// With further control tokens, from 257.
fn text_model_with(template: Option<&str>, controls: &[&str]) -> TextModel {
    // GPT-2's byte alphabet: printable bytes stand for themselves, the others follow from U+0100.
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let mut tokens: Vec<String> = (0..256u32)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("in the alphabet").to_string()
        })
        .collect();
    tokens.push("<|end|>".into());
    tokens.extend(controls.iter().map(|&control| control.to_owned()));
    let mut token_types = vec![TokenType::Normal; 256];
    token_types.resize(tokens.len(), TokenType::Control);
    let vocab = Vocab {
        model: "gpt2".into(),
        pre: "default".into(),
        tokens,
        token_types,
        eos: Some(EOS),
        ..Vocab::default()
    };
    TextModel::new(Tokenizer::new(vocab).expect("a vocabulary of bytes"), template).expect("a template")
}

struct Bench {
    engine: Engine,
    registry: Registry,
}

fn bench(executor: impl Executor + 'static, change: impl FnOnce(&mut SchedulerConfig)) -> Bench {
    bench_with(executor, change, EngineConfig::default())
}

fn bench_with(
    executor: impl Executor + 'static,
    change: impl FnOnce(&mut SchedulerConfig),
    config: EngineConfig,
) -> Bench {
    bench_of(text_model(), executor, change, config)
}

fn bench_of(
    text: TextModel,
    executor: impl Executor + 'static,
    change: impl FnOnce(&mut SchedulerConfig),
    config: EngineConfig,
) -> Bench {
    let registry = Registry::new();
    let metrics = EngineMetrics::register(&registry).expect("registers once");
    let mut scheduling =
        SchedulerConfig { block_size: 4, blocks: 64, model_len_max: 128, ..SchedulerConfig::default() };
    change(&mut scheduling);
    let kv = KvInfo {
        block_size: 4,
        blocks: 64,
        blocks_override: None,
        bytes: 0,
        prefix_caching: true,
        model_len: scheduling.model_len_max,
    };
    let engine = Engine::run(
        "fake".into(),
        text,
        executor,
        Scheduler::new(scheduling),
        Arc::new(Pool::new(1)),
        metrics.for_model("fake", &kv),
        super::Sinks::default(),
        &config,
        Instant::now(),
        String::new(),
    )
    .expect("a thread");
    Bench { engine, registry }
}

fn fake() -> FakeExecutor {
    FakeExecutor::new(VOCAB, 4, 64)
}

/// Continues `after` with `answer`, then ends.
fn says(after: &str, answer: &str) -> FakeExecutor {
    let ids = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    let mut answer = ids(answer);
    answer.push(EOS);
    fake().script(&ids(after), &answer)
}

fn greedy(prompt: &str) -> Generate {
    Generate {
        max_tokens: Some(32),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        stream: true,
        include_usage: true,
        ..Generate::new(Api::Completions, "fake".into(), Prompt::Text(vec![prompt.into()]))
    }
}

fn origin() -> Origin {
    let now = Instant::now();
    Origin {
        id: "test".into(),
        received: now,
        peer: ([127, 0, 0, 1], 1).into(),
        trace: Trace::new(TraceContext::from_header(None, [1; 24]), now),
    }
}

impl Bench {
    async fn start(&self, call: Generate) -> Result<Reply, Fault> {
        self.call(Ask::Generate(Box::new(call))).await
    }

    async fn call(&self, ask: Ask) -> Result<Reply, Fault> {
        let origin = origin();
        let hold = Ledger::unlimited().try_hold(Duration::ZERO, 0).expect("no limits");
        let placed = Placed {
            caller: Caller { consumer: "anonymous".into(), models: None },
            ask,
            ids: PromptIds::none(),
            held: hold.proof(),
        };
        self.engine.call(Flow::new(Arc::new(origin), placed)).await
    }

    async fn tokenize(&self, input: TokenizeInput) -> Result<Reply, Fault> {
        self.call(Ask::Tokenize(Tokenize {
            model: None,
            input,
            add_special_tokens: None,
            return_token_strs: false,
            body: bytes::Bytes::new(),
        }))
        .await
    }

    async fn events(&self, call: Generate) -> Result<Vec<Event>, Fault> {
        let mut reply = self.start(call).await?;
        let mut events = Vec::new();
        while let Some(chunk) = reply.chunks.next().await {
            match chunk? {
                Chunk::Event(event) => events.push(event),
                other => panic!("the engine sends events, not {other:?}"),
            }
        }
        Ok(events)
    }

    /// Waits until a line of the metrics is there. The step thread publishes after each step.
    async fn wait_for(&self, line: &str) {
        let give_up = Instant::now() + Duration::from_secs(20);
        while !self.registry.render().lines().any(|l| l == line) {
            assert!(Instant::now() < give_up, "{line} did not come:\n{}", self.registry.render());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

fn text(events: &[Event], choice: u32) -> String {
    events
        .iter()
        .filter_map(|e| match e {
            Event::Delta(delta) if delta.choice == choice => Some(delta.text.as_str()),
            _ => None,
        })
        .collect()
}

fn reason(events: &[Event], choice: u32) -> Option<FinishReason> {
    events.iter().find_map(|e| match e {
        Event::Finished { choice: c, reason, .. } if *c == choice => Some(*reason),
        _ => None,
    })
}

/// vLLM's `stop_reason`.
fn stop(events: &[Event], choice: u32) -> Option<StopReason> {
    events.iter().find_map(|e| match e {
        Event::Finished { choice: c, stop, .. } if *c == choice => stop.clone(),
        _ => None,
    })
}

fn usage(events: &[Event]) -> Usage {
    match events.last() {
        Some(Event::Done { usage }) => *usage,
        other => panic!("a reply ends with Done, not {other:?}"),
    }
}

#[tokio::test]
async fn a_reply_is_started_deltas_finished_done() {
    let bench = bench(says("hi", "yes"), |_| {});
    let events = bench.events(greedy("hi")).await.unwrap();
    assert_eq!(events.first(), Some(&Event::Started { prompt_tokens: 2, cached_tokens: 0 }));
    assert_eq!((text(&events, 0).as_str(), reason(&events, 0)), ("yes", Some(FinishReason::Stop)));
    // The end token was generated too.
    assert_eq!(
        usage(&events),
        Usage { prompt_tokens: 2, completion_tokens: 4, cached_tokens: 0, ..Usage::default() }
    );
    let tokens: u32 = events.iter().map(|e| if let Event::Delta(d) = e { d.tokens } else { 0 }).sum();
    assert_eq!(tokens, 4, "deltas account for every token");
}

#[tokio::test]
async fn limits_and_stops_end_a_choice() {
    let bench = bench(says("go", "one two three"), |_| {});
    let check = async |change: fn(&mut Generate), expect: &str, why: FinishReason| {
        let mut call = greedy("go");
        change(&mut call);
        let events = bench.events(call).await.unwrap();
        assert_eq!((text(&events, 0).as_str(), reason(&events, 0)), (expect, Some(why)));
    };
    check(|c| c.max_tokens = Some(5), "one t", FinishReason::Length).await;
    check(|c| c.stop = vec![" two".into()], "one", FinishReason::Stop).await;
    check(|c| c.stop = vec!["three!".into()], "one two three", FinishReason::Stop).await;
    check(
        |c| {
            c.stop = vec![" two".into()];
            c.include_stop_str_in_output = true;
        },
        "one two",
        FinishReason::Stop,
    )
    .await;
    check(|c| c.stop_token_ids = vec![u32::from(b't')], "one ", FinishReason::Stop).await;
    check(
        |c| (c.stop_token_ids, c.include_stop_str_in_output) = (vec![u32::from(b't')], true),
        "one t",
        FinishReason::Stop,
    )
    .await;
    check(|c| (c.stop, c.min_tokens) = (vec!["o".into()], 5), "one tw", FinishReason::Stop).await;
    // It may begin in the text of the first tokens: only its end counts.
    check(|c| (c.stop, c.min_tokens) = (vec!["e two".into()], 5), "on", FinishReason::Stop).await;
    // The seventh token is one of the first seven: its text can't stop the choice.
    check(|c| (c.stop, c.min_tokens) = (vec!["o".into()], 7), "one two three", FinishReason::Stop).await;
    check(|c| c.echo = true, "goone two three", FinishReason::Stop).await;
}

#[tokio::test]
async fn what_stopped_a_choice_is_told() {
    // Two tokens end its texts: the end of text proper, and one more.
    const TURN: u32 = EOS + 1;
    let ids = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    let executor = FakeExecutor::new(VOCAB + 1, 4, 64)
        .script(&ids("go"), &[ids("one two"), vec![EOS]].concat())
        .script(&ids("on"), &[ids("and"), vec![TURN]].concat());
    let bench =
        bench_of(text_model_with(None, &["<end_of_turn>"]), executor, |_| {}, EngineConfig::default());
    let check = async |prompt: &str, change: fn(&mut Generate), expect: Option<StopReason>| {
        let mut call = greedy(prompt);
        change(&mut call);
        let events = bench.events(call).await.unwrap();
        assert_eq!(stop(&events, 0), expect, "{:?}", text(&events, 0));
    };
    let said = |text: &str| Some(StopReason::Text(text.into()));
    let token = |token: u32| Some(StopReason::Token(token));
    check("go", |_| {}, None).await;
    check("go", |c| c.max_tokens = Some(2), None).await;
    check("go", |c| c.stop = vec!["x".into(), " t".into(), "two".into()], said(" t")).await;
    check("go", |c| (c.stop, c.include_stop_str_in_output) = (vec!["two".into()], true), said("two")).await;
    // The limit is reached with the stop string's last token.
    check("go", |c| (c.stop, c.max_tokens) = (vec!["one".into()], Some(3)), said("one")).await;
    check("go", |c| c.stop_token_ids = vec![9, u32::from(b't')], token(u32::from(b't'))).await;
    let both = |c: &mut Generate| {
        (c.stop, c.stop_token_ids) = (vec![" t".into()], vec![u32::from(b't')]);
        c.include_stop_str_in_output = true;
    };
    check("go", both, said(" t")).await;
    // The model's end of text is none, unless the request alone names it.
    check("go", |c| c.stop_token_ids = vec![EOS], None).await;
    check("go", |c| (c.stop_token_ids, c.ignore_eos) = (vec![EOS], true), token(EOS)).await;
    check("on", |_| {}, token(TURN)).await;
}

#[tokio::test]
async fn eos_is_ignored_or_put_off_on_request() {
    let bench = bench(says("x", "ab"), |_| {});
    let ignoring = Generate { ignore_eos: true, max_tokens: Some(9), ..greedy("x") };
    let events = bench.events(ignoring).await.unwrap();
    assert_eq!((usage(&events).completion_tokens, reason(&events, 0)), (9, Some(FinishReason::Length)));
    let waiting = Generate { min_tokens: 6, max_tokens: Some(6), ..greedy("x") };
    let events = bench.events(waiting).await.unwrap();
    assert_eq!(usage(&events).completion_tokens, 6);
    assert!(text(&events, 0).starts_with("ab"), "{}", text(&events, 0));
    // The request's own end tokens are put off too.
    let own =
        Generate { stop_token_ids: vec![u32::from(b'b')], min_tokens: 4, max_tokens: Some(4), ..greedy("x") };
    let events = bench.events(own).await.unwrap();
    assert_eq!(usage(&events).completion_tokens, 4);
    assert!(!text(&events, 0).contains('b'), "{}", text(&events, 0));
}

#[tokio::test]
async fn choices_are_numbered_over_prompts() {
    let bench = bench(says("p", "1").script(&[u32::from(b'q')], &[u32::from(b'2'), EOS]), |_| {});
    let call = Generate { n: 2, prompt: Prompt::Text(vec!["p".into(), "q".into()]), ..greedy("") };
    let events = bench.events(call).await.unwrap();
    let texts: Vec<String> = (0..4).map(|choice| text(&events, choice)).collect();
    assert_eq!(texts, ["1", "1", "2", "2"]);
    // Each prompt counts once, each choice's tokens count.
    assert_eq!(
        usage(&events),
        Usage { prompt_tokens: 2, completion_tokens: 8, cached_tokens: 0, ..Usage::default() }
    );
}

#[tokio::test]
async fn the_same_prompt_again_comes_from_the_cache() {
    let bench = bench(fake(), |_| {});
    let prompt = "a prompt of more than one block";
    let first = bench.events(greedy(prompt)).await.unwrap();
    let second = bench.events(greedy(prompt)).await.unwrap();
    assert_eq!(text(&first, 0), text(&second, 0));
    assert_eq!(usage(&second).cached_tokens, 28, "all whole blocks but never the last token");
    let salted = Generate { cache_salt: Some("other".into()), ..greedy(prompt) };
    let third = bench.events(salted).await.unwrap();
    assert_eq!((usage(&third).cached_tokens, text(&third, 0)), (0, text(&first, 0)));
}

#[tokio::test]
async fn output_does_not_depend_on_the_batch() {
    let bench = bench(fake(), |c| c.step_tokens_max = 16);
    let call = |i: usize| Generate {
        sampling: Sampling { temperature: 1.0, top_p: 0.9, seed: Some(i as u64), ..Sampling::default() },
        ignore_eos: true,
        max_tokens: Some(20),
        ..greedy(&format!("prompt number {i} of some length"))
    };
    let mut alone = Vec::new();
    for i in 0..6 {
        alone.push(text(&bench.events(call(i)).await.unwrap(), 0));
    }
    let together = futures_util::future::join_all((0..6).map(|i| bench.events(call(i)))).await;
    let together: Vec<String> = together.into_iter().map(|events| text(&events.unwrap(), 0)).collect();
    assert_eq!(alone, together);
    assert_ne!(alone[0], alone[1]);
}

#[tokio::test]
async fn a_seeded_prompt_is_answered_the_same_alone_and_in_a_list() {
    let bench = bench(fake(), |_| {});
    let call = |prompts: &[&str]| Generate {
        prompt: Prompt::Text(prompts.iter().map(|&p| p.into()).collect()),
        sampling: Sampling { temperature: 1.0, seed: Some(7), ..Sampling::default() },
        ignore_eos: true,
        max_tokens: Some(12),
        n: 2,
        ..greedy("")
    };
    let alone = bench.events(call(&["second"])).await.unwrap();
    let listed = bench.events(call(&["first", "second"])).await.unwrap();
    assert_eq!((text(&alone, 0), text(&alone, 1)), (text(&listed, 2), text(&listed, 3)));
    assert_ne!(text(&alone, 0), text(&alone, 1));
}

#[tokio::test]
async fn prompts_that_do_not_fit_are_refused() {
    let bench = bench(fake(), |_| {});
    let check = async |change: &dyn Fn(&mut Generate), code: Code, param: &str, message: &str| {
        let mut call = greedy("x");
        change(&mut call);
        let fault = bench.events(call).await.unwrap_err();
        assert_eq!((fault.class.code, fault.param.as_deref()), (code, Some(param)), "{fault}");
        assert!(fault.message.contains(message), "{fault}");
    };
    let long = "x".repeat(128);
    check(
        &|c| c.prompt = Prompt::Text(vec![long.clone()]),
        Code::ContextLengthExceeded,
        "prompt",
        "contains 128 input tokens, which leaves no room",
    )
    .await;
    check(
        &|c| c.max_tokens = Some(128),
        Code::ContextLengthExceeded,
        "prompt",
        "you requested 129 tokens (1 in the prompt, 128 in",
    )
    .await;
    check(
        &|c| c.prompt = Prompt::Tokens(vec![vec![9999]]),
        Code::BadRequest,
        "prompt",
        "out of the vocabulary",
    )
    .await;
    check(&|c| c.prompt = Prompt::Text(vec![String::new()]), Code::BadRequest, "prompt", "empty").await;
    check(&|c| c.n = CHOICES + 1, Code::BadRequest, "n", "choices").await;
    check(&|c| c.stop = vec![String::new()], Code::BadRequest, "stop", "empty").await;
    check(&|c| c.sampling.logit_bias = vec![(1, 1.0), (9999, 1.0)], Code::BadRequest, "logit_bias", "9999")
        .await;
    check(&|c| (c.max_tokens, c.min_tokens) = (None, 17), Code::BadRequest, "min_tokens", "only 16").await;
}

const CHOICES: u32 = 2048;

#[tokio::test]
async fn texts_that_can_not_fit_are_refused_by_their_size() {
    // 128 tokens, of which `<|end|>` is the longest.
    let bench = bench(fake(), |_| {});
    let limit = bench.engine.prompt_bytes_max();
    assert_eq!(limit, 128 * "<|end|>".len());
    let text = |bytes: usize| Prompt::Text(vec!["x".into(), " ".repeat(bytes)]);
    let message = |bytes| ChatMessage {
        role: "user".into(),
        content: Content::Text(" ".repeat(bytes)),
        extra: Default::default(),
    };
    let chat = |bytes| Prompt::Chat {
        messages: vec![message(bytes)],
        tools: None,
        add_generation_prompt: true,
        chat_template_kwargs: None,
    };
    let refused = |fault: Fault, param: &str| {
        assert_eq!((fault.class.code, fault.param.as_deref()), (Code::ContextLengthExceeded, Some(param)));
        let says = format!("your {param} resulted in {} bytes", limit + 1);
        assert!(fault.message.contains(&says) && fault.message.contains("128 tokens"), "{fault}");
    };
    assert!(bench.engine.fits(&text(limit)).is_ok() && bench.engine.fits(&chat(limit)).is_ok());
    assert!(bench.engine.fits(&Prompt::Tokens(vec![vec![1; limit + 1]])).is_ok(), "the exact check's");
    refused(bench.engine.fits(&text(limit + 1)).unwrap_err(), "prompt");
    refused(bench.engine.fits(&chat(limit + 1)).unwrap_err(), "messages");
    // Also where nobody above has asked.
    refused(bench.start(Generate { prompt: text(limit + 1), ..greedy("") }).await.unwrap_err(), "prompt");
    refused(bench.tokenize(TokenizeInput::Prompt(" ".repeat(limit + 1))).await.unwrap_err(), "prompt");
    let messages = |bytes| TokenizeInput::Messages {
        messages: vec![message(bytes)],
        tools: None,
        add_generation_prompt: true,
        continue_final_message: false,
        chat_template_kwargs: None,
    };
    refused(bench.tokenize(messages(limit + 1)).await.unwrap_err(), "messages");
    assert!(bench.tokenize(messages(limit)).await.is_ok());
}

#[tokio::test]
async fn what_the_engine_lacks_is_refused_and_may_be_found_elsewhere() {
    let bench = bench(fake(), |_| {});
    let need = Need { param: "response_format".into(), what: "only text" };
    let fault = bench.start(Generate { needs: vec![need], ..greedy("x") }).await.unwrap_err();
    assert_eq!((fault.class.code, fault.class.retry), (Code::NotSupported, Retry::Elsewhere));
    assert_eq!(fault.param.as_deref(), Some("response_format"));
    assert_eq!(fault.message, "'response_format' is not supported here: only text.");
}

#[tokio::test]
async fn a_full_queue_refuses_and_counts() {
    let bench = bench(fake(), |c| (c.unfinished_max, c.running_max) = (2, 1));
    // Three choices at once for one place to run and one to wait in.
    let fault = bench.events(Generate { n: 3, ..greedy("x") }).await.unwrap_err();
    assert_eq!(fault.class.code, Code::Overloaded, "{fault}");
    assert_eq!(
        fault.message,
        "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
    );
    assert_eq!(fault.detail.as_deref(), Some("`engine.max-num-queued-reqs` is 2"), "for the log");
    assert!(matches!(fault.class.retry, Retry::After(wait) if wait >= Duration::from_secs(1)), "{fault:?}");
    let line = "vllm:admission_rejections_total{model_name=\"fake\",reason=\"max_num_queued_reqs\"} 1";
    bench.wait_for(line).await;
    // Nothing of the refused request is left behind.
    assert!(bench.events(greedy("x")).await.is_ok());
}

#[tokio::test]
async fn a_failed_step_fails_its_requests_and_no_others() {
    let bench = bench(says("again", "fine").fail_at_step(0), |_| {});
    let fault = bench.events(greedy("broken")).await.unwrap_err();
    assert_eq!(fault.class.code, Code::Internal);
    let events = bench.events(greedy("again")).await.unwrap();
    assert_eq!(text(&events, 0), "fine");
}

#[tokio::test]
async fn ranks_that_are_lost_end_the_engine_and_every_request() {
    let bench = bench(says("a", "long answer").lose_at_step(3), |_| {});
    let (fault, other) = tokio::join!(bench.events(greedy("a")), bench.events(greedy("another")));
    for fault in [fault.unwrap_err(), other.unwrap_err()] {
        assert_eq!(
            (fault.class.code, fault.message.as_str()),
            (Code::ModelUnavailable, "the engine has stopped")
        );
    }
    let late = bench.events(greedy("a")).await.unwrap_err();
    assert_eq!((late.class.code, late.class.retry), (Code::ModelUnavailable, Retry::Elsewhere));
    assert!(!bench.engine.is_alive(), "so that /health says 503");
    bench.wait_for("vllm:num_requests_running{engine=\"0\",model_name=\"fake\"} 0").await;
}

#[tokio::test]
async fn a_request_has_a_deadline() {
    let config = EngineConfig {
        request_timeout: forebay_config::HumanDuration::from_millis(0),
        ..EngineConfig::default()
    };
    let bench = bench_with(fake(), |_| {}, config);
    let fault = bench.events(greedy("too late")).await.unwrap_err();
    assert_eq!(fault.class.code, Code::UpstreamTimeout, "{fault}");
    assert!(fault.message.contains("longer than 0"), "the limit is named: {fault}");
    // It never ran: a time that it didn't have must not stand in the histograms as zero.
    bench.wait_for("vllm:request_prefill_time_seconds_count{engine=\"0\",model_name=\"fake\"} 0").await;
}

#[tokio::test]
async fn logprobs_come_with_every_token() {
    let bench = bench(says("l", "ok"), |_| {});
    let events = bench.events(Generate { logprobs: Some(3), ..greedy("l") }).await.unwrap();
    let entries: Vec<_> = events
        .iter()
        .filter_map(|e| if let Event::Delta(d) = e { Some(d.logprobs.clone()) } else { None })
        .flatten()
        .collect();
    assert_eq!(entries.iter().map(|e| e.text.as_str()).collect::<String>(), "ok<|end|>");
    for entry in &entries {
        assert_eq!(entry.top.len(), 3);
        assert_eq!(entry.top[0].token, entry.token, "greedy takes the most likely");
        assert!(entry.logprob.is_some_and(|l| l <= 0.0 && l > -0.1), "a scripted token is nearly certain");
    }
}
