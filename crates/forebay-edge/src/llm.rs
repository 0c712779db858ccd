//! The LLM route: a whole request into the stack, and the reply out, frame by frame.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use forebay_flow::{ChunkStream, Flow, Origin, Received, Reply, ReplyForm, Stage};
use forebay_observe::Layer;
use forebay_types::{Blame, Class, Code, Fault, RequestId};
use forebay_wire::{Chunk, Collector, Dialect, Event, RenderSpec, Renderer, fault_frame};
use futures_util::StreamExt;
use http::request::Parts;
use http::{HeaderValue, Response, header};
use hyper::body::Incoming;
use tokio::time::Sleep;

use crate::access::Ticket;
use crate::answer::{self, Content, log_fault};
use crate::body;
use crate::metrics::Counted;
use crate::service::Shared;

type ReplyFuture = Pin<Box<dyn Future<Output = Result<Reply, Fault>> + Send>>;

/// The stack below the edge, its type forgotten: one allocation per request, and the edge is compiled once.
#[derive(Clone)]
pub struct LlmStage(Arc<dyn Fn(Flow<Received>) -> ReplyFuture + Send + Sync>);

impl LlmStage {
    pub fn new(stage: Arc<impl Stage<Received>>) -> Self {
        Self(Arc::new(move |flow| {
            let stage = stage.clone();
            Box::pin(async move { stage.call(flow).await })
        }))
    }
}

impl std::fmt::Debug for LlmStage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LlmStage")
    }
}

/// Largest JSON body that is put together from verbatim chunks, in bytes.
const JSON_BYTES_MAX: usize = 256 * 1024 * 1024;

/// Log-probabilities of a JSON body that is rendered on an I/O thread: about 200 µs.
const INLINE_NAMES_MAX: usize = 1000;

/// Answers one request.
///
/// Cancellation: guarded. Dropping the future, or the answer's body, drops the reply's chunks.
pub(crate) async fn answer(
    shared: &Arc<Shared>,
    stage: &LlmStage,
    parts: Parts,
    mut incoming: Incoming,
    path: String,
    ticket: &Ticket,
) -> Response<Content> {
    let limits = &shared.limits;
    let reading = Instant::now();
    let body = match body::collect(&mut incoming, limits.max_body.bytes(), limits.body_timeout.get()).await {
        Ok(body) => body,
        Err(error) => {
            shared.metrics.refuse(error.reason());
            body::linger(incoming, &parts.headers);
            let mut answer = answer::fault(&error.into(), shared.dialect);
            close(&parts, &mut answer);
            return answer;
        }
    };
    shared.metrics.received_bytes.inc_by(body.len() as u64);
    ticket.trace.note(Layer::Edge, "receive", reading, format!("{} bytes", body.len()));
    let origin = Arc::new(Origin {
        id: ticket.id.clone(),
        received: ticket.begun,
        peer: ticket.peer,
        trace: ticket.trace.clone(),
    });
    let received = Received { method: parts.method, path, headers: parts.headers, body };
    let reply = match (stage.0)(Flow::new(origin, received)).await {
        Ok(reply) => reply,
        Err(fault) => return refuse(shared, &fault, ticket),
    };
    let Reply { form, headers, render, chunks } = reply;
    let id = ticket.id.clone();
    let mut answer = match form {
        ReplyForm::Sse => {
            let events = EventBody::new(id, render, chunks, shared);
            let mut answer = Response::new(Content::Events(Box::new(events)));
            let headers = answer.headers_mut();
            headers
                .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            // nginx in front of us would else hold frames back until its buffer is full.
            headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
            answer
        }
        ReplyForm::Json => match collect_json(shared, &id, render, chunks).await {
            Ok(body) => answer::json(http::StatusCode::OK, body),
            Err(fault) => return refuse(shared, &fault, ticket),
        },
    };
    for (name, value) in &headers {
        answer.headers_mut().append(name, value.clone());
    }
    answer
}

fn refuse(shared: &Shared, fault: &Fault, ticket: &Ticket) -> Response<Content> {
    log_fault(fault, &ticket.id);
    answer::fault(fault, shared.dialect)
}

/// After a body that was not read to its end, the connection can't carry another request.
pub(crate) fn close(parts: &Parts, answer: &mut Response<Content>) {
    if parts.version < http::Version::HTTP_2 {
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
}

/// A reply of events without a word about how to render them.
fn no_spec() -> Fault {
    Fault::internal("the reply has events but no render spec")
}

fn cut() -> Fault {
    Fault::new(Class::new(Code::UpstreamFailed, Blame::Us), "the reply broke off before it was finished")
}

async fn collect_json(
    shared: &Shared,
    id: &RequestId,
    render: Option<RenderSpec>,
    mut chunks: ChunkStream,
) -> Result<Bytes, Fault> {
    let mut collector = None;
    let mut verbatim = Bytes::new();
    while let Some(chunk) = chunks.next().await {
        match chunk? {
            Chunk::Event(event) => {
                if collector.is_none() {
                    let spec = render.as_ref().ok_or_else(no_spec)?;
                    collector = Some(Collector::new(id.as_str(), now_unix(), spec));
                }
                if let Some(collector) = &mut collector {
                    collector.push(event);
                }
            }
            Chunk::Verbatim { bytes, .. } if verbatim.is_empty() => verbatim = bytes,
            Chunk::Verbatim { bytes, .. } => {
                if verbatim.len() + bytes.len() > JSON_BYTES_MAX {
                    return Err(Fault::internal("a verbatim JSON reply is larger than 256 MiB"));
                }
                verbatim = [verbatim, bytes].concat().into();
            }
        }
    }
    match collector {
        Some(collector) if collector.names() > INLINE_NAMES_MAX => {
            // A client that leaves while others are before it is forgotten.
            let permit = Arc::clone(&shared.renders).acquire_owned().await.expect("never closed");
            let rendered = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                collector.finish()
            })
            .await;
            Ok(rendered
                .map_err(|error| Fault::internal(format!("a reply could not be rendered: {error}")))??)
        }
        Some(collector) => Ok(collector.finish()?),
        None if verbatim.is_empty() => Err(cut()),
        None => Ok(verbatim),
    }
}

fn now_unix() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// An event stream: every chunk is one frame of the body, sent when it is there.
pub(crate) struct EventBody {
    chunks: ChunkStream,
    id: RequestId,
    render: Option<RenderSpec>,
    renderer: Option<Renderer>,
    frame: BytesMut,
    state: State,
    heartbeat: Option<Heartbeat>,
    dialect: Dialect,
    _counted: Counted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// Events were seen, `Done` was not.
    Rendering,
    /// `Done` was rendered.
    Done,
    /// The error frame was sent.
    Broken,
}

struct Heartbeat {
    every: Duration,
    timer: Pin<Box<Sleep>>,
}

impl EventBody {
    fn new(id: RequestId, render: Option<RenderSpec>, chunks: ChunkStream, shared: &Shared) -> Self {
        let heartbeat =
            shared.heartbeat.map(|every| Heartbeat { every, timer: Box::pin(tokio::time::sleep(every)) });
        Self {
            chunks,
            id,
            render,
            renderer: None,
            frame: BytesMut::new(),
            state: State::Open,
            heartbeat,
            dialect: shared.dialect,
            _counted: Counted::new(&shared.metrics.streams),
        }
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.state == State::Broken
    }

    /// The next bytes for the client, never empty; `None` at the end.
    pub(crate) fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            if self.state == State::Broken {
                return Poll::Ready(None);
            }
            let bytes = match self.chunks.poll_next_unpin(cx) {
                Poll::Ready(Some(Ok(Chunk::Verbatim { bytes, .. }))) => bytes,
                Poll::Ready(Some(Ok(Chunk::Event(event)))) => match self.render(&event) {
                    Ok(bytes) => bytes,
                    Err(fault) => self.break_off(&fault),
                },
                Poll::Ready(Some(Err(fault))) => self.break_off(&fault),
                Poll::Ready(None) if self.state == State::Rendering => self.break_off(&cut()),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => return self.poll_heartbeat(cx),
            };
            // Nothing to send: a frame that only counts, or text that is held back for a stop string.
            if bytes.is_empty() {
                continue;
            }
            if let Some(heartbeat) = &mut self.heartbeat {
                heartbeat.timer.as_mut().reset(tokio::time::Instant::now() + heartbeat.every);
            }
            return Poll::Ready(Some(bytes));
        }
    }

    fn render(&mut self, event: &Event) -> Result<Bytes, Fault> {
        if self.renderer.is_none() {
            let spec = self.render.as_ref().ok_or_else(no_spec)?;
            self.renderer = Some(Renderer::new(self.id.as_str(), now_unix(), spec));
        }
        if let Some(renderer) = &mut self.renderer {
            renderer.frame(event, &mut self.frame);
        }
        self.state = if matches!(event, Event::Done { .. }) { State::Done } else { State::Rendering };
        Ok(self.frame.split().freeze())
    }

    /// The last frame: the status has long been sent, so the error is told inside the stream.
    fn break_off(&mut self, fault: &Fault) -> Bytes {
        log_fault(fault, &self.id);
        self.state = State::Broken;
        // The layers below are released now, not when the client has read the frame.
        self.chunks = Box::pin(futures_util::stream::empty());
        fault_frame(fault, self.dialect)
    }

    fn poll_heartbeat(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let Some(heartbeat) = &mut self.heartbeat else { return Poll::Pending };
        if heartbeat.timer.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        heartbeat.timer.as_mut().reset(tokio::time::Instant::now() + heartbeat.every);
        // Registers the new deadline with the task.
        let _ = heartbeat.timer.as_mut().poll(cx);
        Poll::Ready(Some(Bytes::from_static(b": ping\n\n")))
    }
}
