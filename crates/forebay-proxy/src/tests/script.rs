//! Requests, and a router that does as it is told.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use forebay_flow::{Admitted, Caller, Flow, Origin, PromptIds, Reply, Resolved, Stage};
use forebay_observe::{Trace, TraceContext};
use forebay_quota::Ledger;
use forebay_types::{Blame, Class, Code, Fault, ModelName, Retry};
use forebay_wire::Chunk;
use futures_util::StreamExt;
use parking_lot::Mutex;

/// What a fleet does with one request.
pub(crate) enum Act {
    Answer,
    Fail(Code),
    Hang,
}

/// Fleets act as scripted, in turn, and answer when the script is at its end.
#[derive(Clone, Default)]
pub(crate) struct Router(Arc<Mutex<Script>>);

#[derive(Default)]
struct Script {
    acts: HashMap<ModelName, VecDeque<Act>>,
    asked: Vec<String>,
}

impl Router {
    pub(crate) fn will(&self, fleet: &str, acts: impl IntoIterator<Item = Act>) {
        self.0.lock().acts.entry(fleet.into()).or_default().extend(acts);
    }

    /// The fleets that were asked since the last time, in order.
    pub(crate) fn asked(&self) -> String {
        std::mem::take(&mut self.0.lock().asked).join(" ")
    }
}

impl Stage<Resolved> for Router {
    async fn call(&self, flow: Flow<Resolved>) -> Result<Reply, Fault> {
        let fleet = flow.stage.fleet;
        let act = {
            let mut script = self.0.lock();
            script.asked.push(fleet.to_string());
            script.acts.get_mut(&fleet).and_then(VecDeque::pop_front).unwrap_or(Act::Answer)
        };
        match act {
            Act::Answer => Ok(Reply::json(format!("from {fleet}"))),
            Act::Fail(code) => {
                Err(Fault::new(Class::new(code, Blame::Upstream).retry(Retry::Elsewhere), "scripted"))
            }
            Act::Hang => std::future::pending().await,
        }
    }
}

/// A request as the gateway would hand it down, from a caller who may use `models` (all if `None`).
pub(crate) fn request_from(models: Option<&[&str]>, path: &str, body: &str) -> Flow<Admitted> {
    let body = Bytes::copy_from_slice(body.as_bytes());
    let method = if body.is_empty() { http::Method::GET } else { http::Method::POST };
    let ask =
        forebay_wire::parse(&method, path, Some("application/json"), &body, None).expect("a valid request");
    let hold = Ledger::unlimited().try_hold(Duration::ZERO, 0).expect("no limit");
    let received = Instant::now();
    let trace = Trace::new(TraceContext::from_header(None, *b"trace-id-16-byte-span-id"), received);
    let peer = "127.0.0.1:1".parse().expect("an address");
    let origin = Origin { id: "request-1".into(), received, peer, trace };
    let models = models.map(|models| models.iter().map(|&model| ModelName::from(model)).collect());
    let caller = Caller { consumer: "anonymous".into(), models };
    Flow::new(Arc::new(origin), Admitted { caller, ask, ids: PromptIds::none(), held: hold.proof() })
}

pub(crate) fn request(path: &str, body: &str) -> Flow<Admitted> {
    request_from(None, path, body)
}

/// A completion that isn't streamed.
pub(crate) fn completion(model: &str) -> Flow<Admitted> {
    request("/v1/completions", &format!(r#"{{"model": "{model}", "prompt": "p"}}"#))
}

/// The whole body.
pub(crate) async fn text(reply: Reply) -> String {
    let mut text = String::new();
    let mut chunks = reply.chunks;
    while let Some(chunk) = chunks.next().await {
        let Chunk::Verbatim { bytes, .. } = chunk.expect("whole") else { panic!("an event") };
        text.push_str(std::str::from_utf8(&bytes).expect("text"));
    }
    text
}
