//! The scripted surroundings of the gateway.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Mutex;
use std::thread::ThreadId;

use bytes::Bytes;
use forebay_config::{FixedEnvironment, Source, load};
use forebay_flow::ReplyForm;
use forebay_observe::{Trace, TraceContext};
use forebay_types::{Blame, Class, Code, FinishReason, Retry, TokenizerId, Usage};
use forebay_wire::{Chunk, Delta, Event, Generate, Prompt};
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Method};
use serde_json::{Value, json};

use super::super::*;

/// One token per byte. Prompts for the model `short` may have 100 of them.
#[derive(Default)]
pub(super) struct ByteEncoder {
    pub(super) threads: Mutex<Vec<ThreadId>>,
    /// Where work for the models `slow` (in `encode`) and `slow-look` (in `fits`) stops.
    pub(super) gate: Mutex<Option<Gate>>,
}

/// Says that work has come, and lets it go on when told to.
pub(super) struct Gate {
    pub(super) came: tokio::sync::mpsc::Sender<()>,
    pub(super) go: std::sync::mpsc::Receiver<()>,
}

impl ByteEncoder {
    fn pass(&self) {
        let gate = self.gate.lock().unwrap();
        let gate = gate.as_ref().expect("a gate");
        gate.came.blocking_send(()).unwrap();
        gate.go.recv().unwrap();
    }
}

impl PromptEncoder for ByteEncoder {
    fn fits(&self, model: &ModelName, prompt: &Prompt) -> Result<(), Fault> {
        if model.as_str() == "slow-look" {
            self.pass();
        }
        let bytes = prompt.bytes_max();
        if model.as_str() == "short" && bytes > 100 {
            let class = Class::new(Code::ContextLengthExceeded, Blame::Client);
            return Err(Fault::new(class, format!("{bytes} bytes")));
        }
        Ok(())
    }

    fn encode(&self, call: &Generate) -> Result<PromptIds, Fault> {
        let Generate { model, prompt, .. } = call;
        self.threads.lock().unwrap().push(std::thread::current().id());
        if model.as_str() == "slow" {
            self.pass();
        }
        let Prompt::Text(texts) = prompt else { return Ok(PromptIds::estimate(prompt)) };
        if model.as_str() == "estimated" {
            return Ok(PromptIds::Estimated { tokens: texts.iter().map(|t| t.len() as u32).sum() });
        }
        let prompts = texts.iter().map(|text| text.bytes().map(u32::from).collect()).collect();
        Ok(PromptIds::Exact { tokenizer: TokenizerId([1; 32]), prompts })
    }
}

pub(super) enum Play {
    Reply(ReplyForm, Vec<Result<Chunk, Fault>>),
    /// These, and then nothing more for ever.
    Stuck(Vec<Chunk>),
    Fault(Fault),
    /// No reply ever.
    Pending,
}

/// Plays one script per call, and keeps what it was called with.
#[derive(Default)]
pub(super) struct Script {
    pub(super) plays: Mutex<VecDeque<Play>>,
    pub(super) calls: Mutex<Vec<Admitted>>,
}

impl Stage<Admitted> for Script {
    async fn call(&self, flow: Flow<Admitted>) -> Result<Reply, Fault> {
        self.calls.lock().unwrap().push(flow.stage);
        let play = self.plays.lock().unwrap().pop_front().expect("a play per call");
        match play {
            Play::Reply(form, chunks) => Ok(Reply::new(form, Box::pin(stream::iter(chunks)))),
            Play::Stuck(chunks) => {
                let chunks = stream::iter(chunks.into_iter().map(Ok)).chain(stream::pending());
                Ok(Reply::new(ReplyForm::Sse, Box::pin(chunks)))
            }
            Play::Fault(fault) => Err(fault),
            Play::Pending => std::future::pending().await,
        }
    }
}

pub(super) const CONFIG: &str = "
consumers:
  - name: team-a
    keys: [env:A1, env:A2]
    limits: {requests-per-minute: 10, tokens-per-minute: 1000}
  - name: team-b
    keys: env:B
    models: [m, org/n]
";

pub(super) struct Rig {
    pub(super) gateway: Gateway<Arc<Script>>,
    pub(super) script: Arc<Script>,
    pub(super) encoder: Arc<ByteEncoder>,
    pub(super) registry: Registry,
    pub(super) audit: tempfile::TempDir,
}

pub(super) fn env() -> FixedEnvironment {
    FixedEnvironment::new().with_var("A1", "sk-a1").with_var("A2", "sk-a2").with_var("B", "sk-b")
}

pub(super) fn build(yaml: &str, next: Arc<Script>) -> Result<Gateway<Arc<Script>>, GatewayBuildError> {
    let config = config(yaml);
    let registry = Registry::new();
    let deps = GatewayDeps {
        encoder: Arc::new(ByteEncoder::default()),
        registry: &registry,
        only_model: Vec::new(),
        callers_are_routers: true,
    };
    Gateway::new(Some(&config), &env(), deps, next)
}

pub(super) fn config(yaml: &str) -> GatewayConfig {
    load::<GatewayConfig>(&Source::new("forebay.yaml", yaml)).unwrap_or_else(|error| panic!("{error}")).config
}

pub(super) fn rig(plays: impl IntoIterator<Item = Play>) -> Rig {
    let audit = tempfile::tempdir().unwrap();
    let mut config = config(CONFIG);
    config.audit = Some(crate::AuditConfig { dir: audit.path().to_owned(), pending_max: 64 });
    rig_of(Some(&config), audit, plays)
}

pub(super) fn rig_of(
    config: Option<&GatewayConfig>,
    audit: tempfile::TempDir,
    plays: impl IntoIterator<Item = Play>,
) -> Rig {
    let script = Arc::new(Script { plays: Mutex::new(plays.into_iter().collect()), ..Script::default() });
    let encoder = Arc::new(ByteEncoder::default());
    let registry = Registry::new();
    let deps = GatewayDeps {
        encoder: Arc::clone(&encoder) as _,
        registry: &registry,
        only_model: Vec::new(),
        callers_are_routers: true,
    };
    let gateway = Gateway::new(config, &env(), deps, Arc::clone(&script)).unwrap();
    Rig { gateway, script, encoder, registry, audit }
}

pub(super) fn flow(method: Method, path: &str, key: Option<&str>, body: &str) -> Flow<Received> {
    let begun = Instant::now();
    let trace = Trace::new(TraceContext::from_header(None, [7; 24]), begun);
    let peer = ([192, 0, 2, 1], 5000).into();
    let origin = Arc::new(Origin { id: "req-1".into(), received: begun, peer, trace });
    let mut headers = HeaderMap::new();
    if let Some(key) = key {
        headers.insert(header::AUTHORIZATION, format!("Bearer {key}").parse().unwrap());
    }
    let body = Bytes::copy_from_slice(body.as_bytes());
    Flow::new(origin, Received { method, path: path.into(), headers, body })
}

/// A completion with a prompt of 10 tokens and at most 90 of output.
pub(super) fn ask(key: Option<&str>) -> Flow<Received> {
    ask_for("m", key)
}

pub(super) fn ask_for(model: &str, key: Option<&str>) -> Flow<Received> {
    let body = json!({"model": model, "prompt": "top secret", "max_tokens": 90});
    flow(Method::POST, "/v1/completions", key, &body.to_string())
}

impl Rig {
    /// Where there is one model, of these names.
    pub(super) fn with_only_model(mut self, names: &[&str]) -> Self {
        self.gateway.only_model = names.iter().map(|&name| name.into()).collect();
        self
    }

    pub(super) async fn call(&self, flow: Flow<Received>) -> Result<Reply, Fault> {
        self.gateway.call(flow).await
    }

    pub(super) async fn audit(&self) -> Vec<Value> {
        self.gateway.flush_audit().await;
        audit_lines(self.audit.path())
    }

    /// What team-a has left: requests, tokens.
    pub(super) fn left(&self) -> (u64, u64) {
        let Access::Keys(keys) = &self.gateway.access else { panic!() };
        let mut headers = HeaderMap::new();
        headers.insert("x-api-key", "sk-a1".parse().unwrap());
        let snapshot = keys.identify(&headers).unwrap().ledger.snapshot(self.gateway.clock.now());
        (snapshot.requests.unwrap().remaining, snapshot.tokens.unwrap().remaining)
    }

    pub(super) fn holds(&self) -> i64 {
        self.gateway.metrics.holds.get()
    }
}

pub(super) fn audit_lines(dir: &Path) -> Vec<Value> {
    let mut text = String::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        text += &std::fs::read_to_string(entry.unwrap().path()).unwrap();
    }
    assert!(!text.contains("secret"), "no prompt, completion or key in the audit log: {text}");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// (consumer, status, outcome, prompt, completion, cached, estimated, cut)
pub(super) fn brief(record: &Value) -> Value {
    json!([
        record["consumer"],
        record["status"],
        record["outcome"],
        record["prompt_tokens"],
        record["completion_tokens"],
        record["cached_tokens"],
        record["estimated"],
        record["cut"],
    ])
}

pub(super) async fn read_all(reply: Reply) -> Vec<Result<Chunk, Fault>> {
    reply.chunks.collect().await
}

pub(super) fn started() -> Chunk {
    Chunk::Event(Event::Started { prompt_tokens: 10, cached_tokens: 8 })
}

pub(super) fn delta(tokens: u32) -> Chunk {
    Chunk::Event(Event::Delta(Delta { text: "secret".into(), tokens, ..Delta::default() }))
}

pub(super) fn done(prompt: u32, completion: u32, cached: u32) -> Chunk {
    let usage = Usage {
        prompt_tokens: prompt,
        completion_tokens: completion,
        cached_tokens: cached,
        ..Usage::default()
    };
    Chunk::Event(Event::Done { usage })
}

pub(super) fn finished() -> Chunk {
    Chunk::Event(Event::Finished { choice: 0, reason: FinishReason::Stop, stop: None })
}

pub(super) fn verbatim(bytes: &'static str, usage: Option<Usage>, deltas: u32) -> Chunk {
    Chunk::Verbatim { bytes: Bytes::from_static(bytes.as_bytes()), usage, deltas }
}

pub(super) fn whole(form: ReplyForm, chunks: Vec<Chunk>) -> Play {
    Play::Reply(form, chunks.into_iter().map(Ok).collect())
}

pub(super) fn generation() -> Play {
    whole(ReplyForm::Sse, vec![started(), delta(1), delta(2), finished(), done(10, 3, 8)])
}

pub(super) fn upstream_failed() -> Fault {
    Fault::new(
        Class::new(Code::UpstreamFailed, Blame::Upstream).retry(Retry::Elsewhere),
        "upstream broke off",
    )
}
