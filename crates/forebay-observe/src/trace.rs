//! One trace per request over all layers: a waterfall of spans, each with the reason for its decision.
//!
//! Ids and propagation follow W3C Trace Context (`traceparent`). A trace is collected in memory and read back by the
//! admin API; exporting is not done here.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_types::hex;
use parking_lot::Mutex;

/// Spans kept per request: a limit, so that a retry loop can't grow a trace without end.
const SPANS_MAX: usize = 64;

/// The layer a span belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layer {
    Edge,
    Gateway,
    Proxy,
    Router,
    Engine,
}

/// Position in a distributed trace, as in a `traceparent` header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    pub trace_id: [u8; 16],
    /// Our own span: what an upstream gets as its parent.
    pub span_id: [u8; 8],
    /// The span of whoever called us.
    pub parent_id: Option<[u8; 8]>,
    pub sampled: bool,
}

impl TraceContext {
    /// Continues the caller's trace where the header is valid, else starts one. `random` gives 24 fresh bytes.
    ///
    /// Source: W3C Trace Context, section 3.2. Version `ff`, all-zero ids, upper case and wrong lengths are invalid.
    pub fn from_header(header: Option<&str>, random: [u8; 24]) -> Self {
        let mut trace_id = [0u8; 16];
        let mut span_id = [0u8; 8];
        trace_id.copy_from_slice(&random[..16]);
        span_id.copy_from_slice(&random[16..]);
        match header.and_then(parse_traceparent) {
            Some((trace_id, parent, sampled)) => Self { trace_id, span_id, parent_id: Some(parent), sampled },
            None => Self { trace_id, span_id, parent_id: None, sampled: true },
        }
    }

    /// The value of `traceparent` for an upstream.
    pub fn header(&self) -> String {
        format!("00-{}-{}-{:02x}", hex(&self.trace_id), hex(&self.span_id), u8::from(self.sampled))
    }

    pub fn trace_id_hex(&self) -> String {
        hex(&self.trace_id)
    }
}

fn parse_traceparent(header: &str) -> Option<([u8; 16], [u8; 8], bool)> {
    let mut parts = header.split('-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let version = unhex::<1>(version)?[0];
    // Version 00 has exactly four fields; later versions may add some.
    if version == 0xff || (version == 0 && parts.next().is_some()) {
        return None;
    }
    let (trace, parent, flags) = (unhex::<16>(trace)?, unhex::<8>(parent)?, unhex::<1>(flags)?[0]);
    if trace == [0; 16] || parent == [0; 8] {
        return None;
    }
    Some((trace, parent, flags & 1 == 1))
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let mut out = [0u8; N];
    for (byte, pair) in out.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}

/// One step of a request, for people: what was decided, why, and how long it took.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Span {
    pub layer: Layer,
    /// What happened, a short fixed text: `authenticate`, `place`, `prefill`.
    pub what: &'static str,
    /// From the first byte of the request.
    pub start_us: u64,
    pub duration_us: u64,
    /// The reason or the outcome: which key, which quota, which replica and why. Never a secret or a prompt.
    pub why: String,
}

/// The spans of one request. Cheap to clone; every clone adds to the same trace.
#[derive(Clone)]
pub struct Trace(Arc<Inner>);

struct Inner {
    context: TraceContext,
    begun: Instant,
    spans: Mutex<Vec<Span>>,
}

impl Trace {
    pub fn new(context: TraceContext, begun: Instant) -> Self {
        Self(Arc::new(Inner { context, begun, spans: Mutex::new(Vec::new()) }))
    }

    pub fn context(&self) -> &TraceContext {
        &self.0.context
    }

    /// Notes a step that began at `start` and ends now.
    pub fn note(&self, layer: Layer, what: &'static str, start: Instant, why: impl Into<String>) {
        self.note_for(layer, what, start, start.elapsed(), why);
    }

    /// Notes a step of a known duration.
    pub fn note_for(
        &self,
        layer: Layer,
        what: &'static str,
        start: Instant,
        duration: Duration,
        why: impl Into<String>,
    ) {
        let start_us = start.saturating_duration_since(self.0.begun).as_micros() as u64;
        let duration_us = duration.as_micros() as u64;
        let mut spans = self.0.spans.lock();
        if spans.len() < SPANS_MAX {
            spans.push(Span { layer, what, start_us, duration_us, why: why.into() });
        }
    }

    /// The spans so far, by start.
    pub fn spans(&self) -> Vec<Span> {
        let mut spans = self.0.spans.lock().clone();
        spans.sort_by_key(|span| span.start_us);
        spans
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Trace({})", self.0.context.trace_id_hex())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparent_is_continued_or_started() {
        let random = [7u8; 24];
        let check = |header: &str, continued: bool| {
            let context = TraceContext::from_header(Some(header), random);
            assert_eq!(context.parent_id.is_some(), continued, "{header}");
            assert_eq!(context.trace_id == [7; 16], !continued, "{header}");
            assert_eq!(context.span_id, [7; 8], "{header}");
        };
        check("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", true);
        check("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-later", true);
        check("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-extra", false);
        check("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", false);
        check("00-00000000000000000000000000000000-00f067aa0ba902b7-01", false);
        check("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", false);
        check("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", false);
        check("", false);
    }

    #[test]
    fn header_round_trips() {
        let ours = TraceContext::from_header(None, *b"abcdefghijklmnopqrstuvwx");
        let theirs = TraceContext::from_header(Some(&ours.header()), [1; 24]);
        assert_eq!(theirs.trace_id, ours.trace_id);
        assert_eq!(theirs.parent_id, Some(ours.span_id));
    }

    #[test]
    fn spans_are_bounded_and_sorted() {
        let begun = Instant::now();
        let trace = Trace::new(TraceContext::from_header(None, [1; 24]), begun);
        trace.note_for(Layer::Router, "place", begun + Duration::from_micros(9), Duration::ZERO, "");
        for _ in 0..100 {
            trace.note_for(Layer::Edge, "route", begun, Duration::from_micros(3), "");
        }
        let spans = trace.spans();
        assert_eq!(spans.len(), SPANS_MAX);
        assert_eq!(spans.last().map(|s| s.what), Some("place"));
    }
}
