//! The request and what has been proved about it.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use forebay_observe::Trace;
use forebay_quota::Reserved;
use forebay_types::{ConsumerName, Fault, ModelName, RequestId};
use forebay_wire::Ask;

use crate::{PromptIds, Reply};

/// One request, plus exactly what has been proved about it so far.
///
/// The edge makes `Flow<Received>`; only the gateway can turn that into `Flow<Admitted>`; so a composition that
/// forgets authentication does not compile.
#[derive(Debug, Clone)]
#[must_use = "a dropped flow cancels the client's request"]
pub struct Flow<S> {
    pub origin: Arc<Origin>,
    pub stage: S,
}

impl<S> Flow<S> {
    pub fn new(origin: Arc<Origin>, stage: S) -> Self {
        Self { origin, stage }
    }

    /// The same request with more proved about it.
    pub fn advance<T>(self, next: impl FnOnce(S) -> T) -> Flow<T> {
        Flow { origin: self.origin, stage: next(self.stage) }
    }
}

/// What was fixed when the first byte arrived.
#[derive(Debug)]
pub struct Origin {
    pub id: RequestId,
    pub received: Instant,
    pub peer: SocketAddr,
    pub trace: Trace,
}

/// One layer. `In` is what the layer above must have proved.
///
/// Cancellation: guarded. Dropping the future releases every hold taken on the way down.
pub trait Stage<In>: Send + Sync + 'static {
    fn call(&self, flow: Flow<In>) -> impl Future<Output = Result<Reply, Fault>> + Send;
}

impl<In: Send + 'static, S: Stage<In>> Stage<In> for Arc<S> {
    fn call(&self, flow: Flow<In>) -> impl Future<Output = Result<Reply, Fault>> + Send {
        (**self).call(flow)
    }
}

/// A whole request on the LLM route, within the edge's limits. Nothing is known about who sent it.
#[derive(Clone)]
pub struct Received {
    pub method: http::Method,
    /// The path as the LLM API knows it (`/v1/chat/completions`), any mount prefix taken off.
    pub path: String,
    pub headers: http::HeaderMap,
    pub body: Bytes,
}

/// Without headers and body: there are keys in the headers, and the body is the client's.
impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Received")
            .field("method", &self.method)
            .field("path", &self.path)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// The header in which a router tells a replica whose request it is, so that the replica's scheduler can give turns. The
/// name is the Gateway API Inference Extension's, and llm-d's.
pub const FAIRNESS_ID: &str = "x-gateway-inference-fairness-id";

/// Who is calling.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The gateway's consumer; behind a router in another process, whom that router names.
    pub consumer: ConsumerName,
    /// Models this caller may use; `None` is all.
    pub models: Option<Arc<[ModelName]>>,
}

/// The caller is known, the body understood, and quota is held for it.
#[derive(Debug, Clone)]
pub struct Admitted {
    pub caller: Caller,
    pub ask: Ask,
    /// The prompt's tokens, counted once for the whole stack.
    pub ids: PromptIds,
    /// Proof of the hold. The gateway keeps the hold itself, around the reply, and settles it there.
    pub held: Reserved,
}

/// The model name is resolved to a fleet.
#[derive(Debug, Clone)]
pub struct Resolved {
    pub caller: Caller,
    pub ask: Ask,
    pub ids: PromptIds,
    pub held: Reserved,
    /// The fleet's model. `ask.model()` is still what the client asked for, and what the reply says.
    pub fleet: ModelName,
}

/// A replica in this process was chosen.
#[derive(Debug, Clone)]
pub struct Placed {
    pub caller: Caller,
    pub ask: Ask,
    pub ids: PromptIds,
    pub held: Reserved,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_not_printed() {
        let mut headers = http::HeaderMap::new();
        headers.insert("authorization", http::HeaderValue::from_static("Bearer sk-secret"));
        let path = "/v1/models".to_owned();
        let received =
            Received { method: http::Method::GET, path, headers, body: Bytes::from_static(b"a prompt") };
        let text = format!("{received:?}");
        assert!(!text.contains("sk-secret") && !text.contains("a prompt"), "{text}");
        assert!(text.contains("/v1/models"), "{text}");
    }
}
