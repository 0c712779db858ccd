//! The body of every answer, watched from its first byte to its end.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use forebay_types::{Blame, Code, Fault};
use forebay_wire::Dialect;
use http::{HeaderValue, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};

use crate::access::{Outcome, Ticket, X_REQUEST_ID};
use crate::llm::EventBody;
use crate::relay::RelayBody;
use crate::stall::StreamWatch;

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What an answer consists of, before it belongs to a request.
pub(crate) enum Content {
    /// Known bytes; empty once they are sent.
    Full(Bytes),
    Events(Box<EventBody>),
    Relay(Box<RelayBody>),
}

/// An answer's body, which hands its request's [`Ticket`] in when it ends or is dropped.
pub(crate) struct AnswerBody {
    content: Content,
    ticket: Option<Ticket>,
    /// On HTTP/2. Beside the ticket, which is handed in with the last frame: that may wait for the client, too.
    stream: Option<Arc<StreamWatch>>,
}

/// Binds an answer to its request: echoes the id, and watches the body.
pub(crate) fn finish(mut answer: Response<Content>, mut ticket: Ticket) -> Response<AnswerBody> {
    ticket.answered(answer.status());
    if let Ok(id) = HeaderValue::from_str(ticket.id.as_str()) {
        answer.headers_mut().insert(X_REQUEST_ID, id);
    }
    answer.map(|content| {
        if let Content::Full(bytes) = &content {
            // Counted now: hyper drops the body of an answer to HEAD, and an empty one, without asking for it.
            ticket.sent(bytes.len());
            ticket.response_bytes = bytes.len() as u64;
            ticket.ended(Outcome::Done);
        }
        let mut body = AnswerBody { content, stream: ticket.stream(), ticket: Some(ticket) };
        if !matches!(body.content, Content::Full(_)) && body.is_end_stream() {
            body.end(Outcome::Done);
        }
        body
    })
}

/// No body.
impl Default for Content {
    fn default() -> Self {
        Self::Full(Bytes::new())
    }
}

impl AnswerBody {
    fn end(&mut self, outcome: Outcome) {
        if let Some(mut ticket) = self.ticket.take() {
            ticket.ended(outcome);
        }
    }

    fn next_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = match &mut self.content {
            Content::Full(bytes) if bytes.is_empty() => None,
            Content::Full(bytes) => return Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Content::Events(events) => ready!(events.poll_bytes(cx)).map(|bytes| Ok(Frame::data(bytes))),
            Content::Relay(relay) => ready!(Pin::new(&mut **relay).poll_frame(cx)),
        };
        match &frame {
            Some(Ok(frame)) => {
                if let (Some(ticket), Some(data)) = (&mut self.ticket, frame.data_ref()) {
                    ticket.sent(data.len());
                }
                if self.is_end_stream() {
                    self.end(Outcome::Done);
                }
            }
            Some(Err(_)) => self.end(Outcome::Broken),
            None => {
                let broken = matches!(&self.content, Content::Events(events) if events.is_broken());
                self.end(if broken { Outcome::Broken } else { Outcome::Done });
            }
        }
        Poll::Ready(frame)
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(stream) = &self.stream {
            stream.asked();
        }
        let frame = ready!(self.next_frame(cx));
        if let Some(stream) = self.stream.as_ref().filter(|_| matches!(frame, Some(Ok(_)))) {
            stream.gave();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Full(bytes) => bytes.is_empty(),
            Content::Events(_) => false,
            Content::Relay(relay) => relay.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Events(_) => SizeHint::default(),
            Content::Relay(relay) => relay.size_hint(),
        }
    }
}

/// A JSON answer.
pub(crate) fn json(status: StatusCode, body: impl Into<Bytes>) -> Response<Content> {
    let mut answer = Response::new(Content::Full(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

/// An error before the first byte of a reply.
pub(crate) fn fault(fault: &Fault, dialect: Dialect) -> Response<Content> {
    let (status, headers, body) = forebay_wire::render_fault(fault, dialect);
    let mut answer = Response::new(Content::Full(body));
    *answer.status_mut() = status;
    *answer.headers_mut() = headers;
    answer
}

/// The one place where a fault that reaches a client is logged: an error where a person must look, else quietly.
pub(crate) fn log_fault(fault: &Fault, ticket_id: &forebay_types::RequestId) {
    let detail = fault.detail.as_deref().unwrap_or_default();
    let (code, blame) = (fault.class.code, fault.class.blame.as_str());
    match (fault.class.code, fault.class.blame) {
        (Code::Internal, _) => {
            tracing::error!(request_id = %ticket_id, ?code, blame, detail, "{}", fault.message);
        }
        (_, Blame::Client) => {
            tracing::debug!(request_id = %ticket_id, ?code, blame, detail, "{}", fault.message);
        }
        (_, Blame::Us | Blame::Upstream) => {
            tracing::warn!(request_id = %ticket_id, ?code, blame, detail, "{}", fault.message);
        }
    }
}
