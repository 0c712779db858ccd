//! One request from its head to the last byte of its answer: id, trace, and the record that is written exactly once.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use forebay_observe::{Layer, RequestRecord, Trace, TraceContext};
use forebay_types::{RequestId, hex};
use http::header::HeaderName;
use http::request::Parts;

use crate::connection::InFlight;
use crate::http_metrics::Exchange;
use crate::metrics::{Counted, NO_ROUTE, code_class};
use crate::service::Shared;
use crate::stall::StreamWatch;

pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Longest request id that is taken from a client.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// Longest path that is kept in a record.
const PATH_BYTES_MAX: usize = 256;

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Every byte was given to the connection.
    Done,
    /// The client left: before the answer (status 499), or in the middle of it.
    ClientLeft,
    /// The client took nothing of the answer for `edge.limits.write-timeout`.
    WriteTimeout,
    /// The answer broke off on our side or the upstream's.
    Broken,
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::ClientLeft => "client-left",
            Self::WriteTimeout => "write-timeout",
            Self::Broken => "broken",
        }
    }
}

/// A request under way. Its `Drop` writes the access log, the record and the metrics, whatever happened.
pub(crate) struct Ticket {
    shared: Arc<Shared>,
    pub(crate) id: RequestId,
    pub(crate) trace: Trace,
    pub(crate) begun: Instant,
    pub(crate) peer: SocketAddr,
    method: http::Method,
    path: String,
    protocol: http::Version,
    pub(crate) route: String,
    /// For vLLM's metrics of HTTP; `None` is not counted there.
    pub(crate) handler: Option<Cow<'static, str>>,
    /// As `content-length` says it.
    request_bytes: u64,
    /// Of a body that is known from the start.
    pub(crate) response_bytes: u64,
    status: u16,
    sent_bytes: u64,
    first_byte: Option<Instant>,
    outcome: Outcome,
    _counted: Counted,
    /// Of a request to the LLM stack.
    pub(crate) llm: Option<Counted>,
    in_flight: InFlight,
    /// On HTTP/2.
    stream: Option<Arc<StreamWatch>>,
}

impl Ticket {
    pub(crate) fn new(shared: &Arc<Shared>, parts: &Parts, peer: SocketAddr, in_flight: InFlight) -> Self {
        let begun = Instant::now();
        let mut random = [0u8; 40];
        getrandom::fill(&mut random).expect("the operating system has randomness");
        let given = parts.headers.get(X_REQUEST_ID).and_then(|value| valid_request_id(value.as_bytes()));
        let id = given.map_or_else(|| hex(&random[24..]).into(), RequestId::from);
        let mut trace_random = [0u8; 24];
        trace_random.copy_from_slice(&random[..24]);
        let parent = parts.headers.get(TRACEPARENT).and_then(|value| value.to_str().ok());
        let trace = Trace::new(TraceContext::from_header(parent, trace_random), begun);
        let mut path = parts.uri.path().to_owned();
        if path.len() > PATH_BYTES_MAX {
            // URIs are ASCII here: the http crate takes nothing else into a path.
            path = path.chars().take(PATH_BYTES_MAX).collect();
        }
        Self {
            shared: shared.clone(),
            id,
            trace,
            begun,
            peer,
            method: parts.method.clone(),
            path,
            protocol: parts.version,
            route: NO_ROUTE.to_owned(),
            handler: Some(NO_ROUTE.into()),
            request_bytes: content_length(parts),
            response_bytes: 0,
            // Until there is an answer: what a client sees that leaves before.
            status: 499,
            sent_bytes: 0,
            first_byte: None,
            outcome: Outcome::ClientLeft,
            _counted: Counted::new(&shared.metrics.in_flight),
            llm: None,
            in_flight,
            stream: StreamWatch::current(),
        }
    }

    pub(crate) fn answered(&mut self, status: http::StatusCode) {
        self.status = status.as_u16();
    }

    pub(crate) fn sent(&mut self, bytes: usize) {
        self.sent_bytes += bytes as u64;
        if self.first_byte.is_none() && bytes > 0 {
            self.first_byte = Some(Instant::now());
        }
    }

    pub(crate) fn ended(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }

    pub(crate) fn stream(&self) -> Option<Arc<StreamWatch>> {
        self.stream.clone()
    }

    /// Connection or stream were given up, so this was dropped; it only looks as if the client had left.
    fn has_timed_out(&self) -> bool {
        self.in_flight.0.writes.has_timed_out()
            || self.stream.as_ref().is_some_and(|stream| stream.has_timed_out())
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.outcome == Outcome::ClientLeft && self.has_timed_out() {
            self.outcome = Outcome::WriteTimeout;
        }
        let duration = self.begun.elapsed();
        let first_byte = self.first_byte.map(|at| at.saturating_duration_since(self.begun));
        let metrics = &self.shared.metrics;
        let route = self.route.as_str();
        metrics.requests.with_label_values(&[route, code_class(self.status)]).inc();
        metrics.seconds.with_label_values(&[route]).observe(duration.as_secs_f64());
        metrics.sent_bytes.with_label_values(&[route]).inc_by(self.sent_bytes);
        if let Some(first_byte) = first_byte {
            metrics.first_byte_seconds.with_label_values(&[route]).observe(first_byte.as_secs_f64());
        }
        if let (Some(http), Some(handler)) = (&self.shared.http, &self.handler) {
            http.on_answered(&Exchange {
                handler,
                method: &self.method,
                status: self.status,
                took: duration,
                request_bytes: self.request_bytes,
                response_bytes: self.response_bytes,
            });
        }
        let why = format!("{} {}, {} bytes", self.status, self.outcome.as_str(), self.sent_bytes);
        self.trace.note_for(Layer::Edge, "request", self.begun, duration, why);
        let trace_id = self.trace.context().trace_id_hex();
        if self.shared.access_log {
            tracing::info!(
                target: "forebay::access",
                request_id = %self.id,
                trace_id = %trace_id,
                peer = %self.peer.ip(),
                method = %self.method,
                path = %self.path,
                protocol = ?self.protocol,
                route = %route,
                status = self.status,
                outcome = self.outcome.as_str(),
                bytes = self.sent_bytes,
                duration_ms = duration.as_secs_f64() * 1e3,
                first_byte_ms = first_byte.map(|d| d.as_secs_f64() * 1e3),
                "request"
            );
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = now.saturating_sub(duration).as_millis() as f64 / 1e3;
        self.shared.recent.push(RequestRecord {
            request_id: self.id.clone(),
            trace_id,
            at,
            method: self.method.as_str().to_owned(),
            path: std::mem::take(&mut self.path),
            status: self.status,
            duration_us: duration.as_micros() as u64,
            bytes_sent: self.sent_bytes,
            spans: self.trace.spans(),
        });
    }
}

fn content_length(parts: &Parts) -> u64 {
    let length = parts.headers.get(http::header::CONTENT_LENGTH);
    length.and_then(|value| value.to_str().ok()?.parse().ok()).unwrap_or(0)
}

/// Visible ASCII: it goes into logs, headers and file names of others.
fn valid_request_id(value: &[u8]) -> Option<&str> {
    let valid = (1..=REQUEST_ID_BYTES_MAX).contains(&value.len()) && value.iter().all(u8::is_ascii_graphic);
    std::str::from_utf8(value).ok().filter(|_| valid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_visible_ascii() {
        let check = |value: &[u8], valid: bool| assert_eq!(valid_request_id(value).is_some(), valid);
        check(b"abc-123", true);
        check(&[b'x'; 128], true);
        check(&[b'x'; 129], false);
        check(b"", false);
        check(b"a b", false);
        check("é".as_bytes(), false);
        check(b"a\tb", false);
    }
}
