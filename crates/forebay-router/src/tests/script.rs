//! Requests, and an engine that does as it is told.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use forebay_flow::{
    Caller, ChunkStream, Flow, Origin, Placed, PromptIds, Reply, ReplyForm, Resolved, Stage, TokenizerId,
};
use forebay_observe::{Trace, TraceContext};
use forebay_quota::Ledger;
use forebay_types::{Fault, TokenId, Usage};
use forebay_wire::{Chunk, Delta, Event};
use futures_util::StreamExt;
use parking_lot::Mutex;
use tokio::sync::mpsc;

/// What sends the chunks of one scripted reply.
pub(crate) type Script = mpsc::Receiver<Result<Chunk, Fault>>;

/// Gives out the scripted answers in turn.
#[derive(Default)]
pub(crate) struct Engine {
    answers: Mutex<VecDeque<Result<Script, Fault>>>,
    pub(crate) asked: Mutex<u32>,
}

impl Engine {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The next call is answered with what is sent here.
    pub(crate) fn will_answer(&self) -> mpsc::Sender<Result<Chunk, Fault>> {
        let (sender, script) = mpsc::channel(16);
        self.answers.lock().push_back(Ok(script));
        sender
    }

    pub(crate) fn will_fail(&self, fault: Fault) {
        self.answers.lock().push_back(Err(fault));
    }
}

impl Stage<Placed> for Engine {
    async fn call(&self, _: Flow<Placed>) -> Result<Reply, Fault> {
        *self.asked.lock() += 1;
        let mut script = self.answers.lock().pop_front().expect("no answer scripted")?;
        let chunks: ChunkStream = Box::pin(futures_util::stream::poll_fn(move |cx| script.poll_recv(cx)));
        Ok(Reply::new(ReplyForm::Sse, chunks))
    }
}

pub(crate) fn started(prompt_tokens: u32, cached_tokens: u32) -> Result<Chunk, Fault> {
    Ok(Chunk::Event(Event::Started { prompt_tokens, cached_tokens }))
}

pub(crate) fn token() -> Result<Chunk, Fault> {
    Ok(Chunk::Event(Event::Delta(Delta { tokens: 1, text: "x".into(), ..Delta::default() })))
}

pub(crate) fn done(prompt_tokens: u32, completion_tokens: u32) -> Result<Chunk, Fault> {
    let usage = Usage { prompt_tokens, completion_tokens, cached_tokens: 0, ..Usage::default() };
    Ok(Chunk::Event(Event::Done { usage }))
}

/// A request for `fleet`, as the proxy would hand it down.
pub(crate) fn request(fleet: &str, path: &str, body: &str, ids: PromptIds) -> Flow<Resolved> {
    let body = Bytes::copy_from_slice(body.as_bytes());
    let method = if body.is_empty() { http::Method::GET } else { http::Method::POST };
    let ask =
        forebay_wire::parse(&method, path, Some("application/json"), &body, None).expect("a valid request");
    let hold = Ledger::unlimited().try_hold(Duration::ZERO, 0).expect("no limit");
    let received = Instant::now();
    let trace = Trace::new(TraceContext::from_header(None, *b"trace-id-16-byte-span-id"), received);
    let peer = "127.0.0.1:1".parse().expect("an address");
    let origin = Origin { id: "request-1".into(), received, peer, trace };
    let caller = Caller { consumer: "anonymous".into(), models: None };
    Flow::new(Arc::new(origin), Resolved { caller, ask, ids, held: hold.proof(), fleet: fleet.into() })
}

pub(crate) fn ids(tokens: impl IntoIterator<Item = TokenId>) -> PromptIds {
    let prompts = vec![tokens.into_iter().collect()];
    PromptIds::Exact { tokenizer: TokenizerId([1; 32]), prompts }
}

/// A streamed completion of a prompt with these tokens.
pub(crate) fn completion(fleet: &str, tokens: impl IntoIterator<Item = TokenId>) -> Flow<Resolved> {
    let body = r#"{"model": "alias", "prompt": "p", "stream": true, "max_tokens": 10}"#;
    request(fleet, "/v1/completions", body, ids(tokens))
}

/// Everything that comes, to the end.
pub(crate) async fn drain(reply: Reply) -> Vec<Result<Chunk, Fault>> {
    reply.chunks.collect().await
}
