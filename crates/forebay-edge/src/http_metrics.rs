//! Metrics of HTTP under the names that vLLM's server has them: those of prometheus-fastapi-instrumentator with its defaults.
//!
//! They are on where `/metrics` is on a port of the edge: a worker's. Source: prometheus-fastapi-instrumentator 8.0,
//! `metrics.default`, and the handlers that vLLM leaves out.

use std::borrow::Cow;
use std::time::Duration;

use forebay_observe::MetricError;
use forebay_observe::metrics::{Histogram, HistogramVec, IntCounterVec, Registry, Summaries};
use http::Method;

use crate::metrics::{NO_ROUTE, code_class};

const FINE_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0,
    30.0, 60.0,
];
const COARSE_BUCKETS: &[f64] = &[0.1, 0.5, 1.0];

/// Probes and scrapes are not counted: whatever has one of these in it.
const LEFT_OUT: [&str; 6] = ["/metrics", "/health", "/load", "/ping", "/version", "/server_info"];

pub(crate) struct HttpMetrics {
    requests: IntCounterVec,
    request_bytes: Summaries,
    response_bytes: Summaries,
    seconds: HistogramVec,
    seconds_fine: Histogram,
}

/// One answered request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exchange<'a> {
    pub(crate) handler: &'a str,
    pub(crate) method: &'a Method,
    pub(crate) status: u16,
    /// To the end of the answer.
    pub(crate) took: Duration,
    /// As the headers say it; nothing where they don't.
    pub(crate) request_bytes: u64,
    pub(crate) response_bytes: u64,
}

impl HttpMetrics {
    pub(crate) fn new(registry: &Registry) -> Result<Self, MetricError> {
        Ok(Self {
            requests: registry.counters(
                "http_requests_total",
                "Total number of requests by method, status and handler.",
                &["method", "status", "handler"],
            )?,
            request_bytes: registry.summaries(
                "http_request_size_bytes",
                "Content length of incoming requests by handler. Only value of header is respected.",
                &["handler"],
            )?,
            response_bytes: registry.summaries(
                "http_response_size_bytes",
                "Content length of outgoing responses by handler. Only value of header is respected.",
                &["handler"],
            )?,
            seconds: registry.histograms(
                "http_request_duration_seconds",
                "Latency with only few buckets by handler.",
                COARSE_BUCKETS,
                &["method", "handler"],
            )?,
            seconds_fine: registry.histogram(
                "http_request_duration_highr_seconds",
                "Latency with many buckets but no API specific labels.",
                FINE_BUCKETS,
            )?,
        })
    }

    pub(crate) fn on_answered(&self, exchange: &Exchange<'_>) {
        let Exchange { handler, took, .. } = *exchange;
        let (method, seconds) = (method(exchange.method), took.as_secs_f64());
        self.requests.with_label_values(&[method, status(exchange.status), handler]).inc();
        self.request_bytes.observe(&[handler], exchange.request_bytes as f64);
        self.response_bytes.observe(&[handler], exchange.response_bytes as f64);
        self.seconds_fine.observe(seconds);
        self.seconds.with_label_values(&[method, handler]).observe(seconds);
    }
}

/// The label of a path without its mount; `None` where its requests are not counted. Bounded: a path that nobody answers
/// is `none`. `has` says whether the operator answers it.
pub(crate) fn handler(path: &str, has: impl FnOnce(&str) -> bool) -> Option<Cow<'static, str>> {
    let known = forebay_wire::route_name(path);
    if LEFT_OUT.iter().any(|part| known.unwrap_or(path).contains(part)) {
        return None;
    }
    Some(match known {
        Some(name) => name.into(),
        None if has(path) => path.to_owned().into(),
        None => NO_ROUTE.into(),
    })
}

/// A client can send any word.
fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        _ => "other",
    }
}

/// vLLM has no class of its own for clients that left.
fn status(status: u16) -> &'static str {
    match code_class(status) {
        "499" => "4xx",
        class => class,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handlers_are_bounded() {
        let check = |path: &str, expect: Option<&str>| {
            assert_eq!(handler(path, |path| path == "/pause").as_deref(), expect, "{path}");
        };
        check("/v1/chat/completions", Some("/v1/chat/completions"));
        check("/v1/models", Some("/v1/models"));
        check("/v1/models/org/m", Some("/v1/models/{model}"));
        // The name of a model hides nothing.
        check("/v1/models/loader/load", Some("/v1/models/{model}"));
        check("/inference/v1/generate", Some("/inference/v1/generate"));
        check("/pause", Some("/pause"));
        check("/resume", Some("none"));
        check("/v1/whatever/a/client/thinks/of", Some("none"));
        check("/", Some("none"));
        for path in ["/metrics", "/health", "/load", "/ping", "/version", "/v1/load_lora_adapter"] {
            check(path, None);
        }
    }

    #[test]
    fn an_exchange_is_counted_as_fastapi_counts_it() {
        let registry = Registry::new();
        let metrics = HttpMetrics::new(&registry).expect("registers once");
        let exchange = Exchange {
            handler: "/tokenize",
            method: &Method::POST,
            status: 404,
            took: Duration::from_millis(300),
            request_bytes: 20,
            response_bytes: 7,
        };
        metrics.on_answered(&exchange);
        let strange = Method::from_bytes(b"BREW").expect("a word");
        metrics.on_answered(&Exchange { method: &strange, handler: "none", status: 499, ..exchange });
        let text = registry.render();
        for line in [
            "http_requests_total{handler=\"/tokenize\",method=\"POST\",status=\"4xx\"} 1",
            "http_requests_total{handler=\"none\",method=\"other\",status=\"4xx\"} 1",
            "http_request_size_bytes_sum{handler=\"/tokenize\"} 20",
            "http_response_size_bytes_count{handler=\"none\"} 1",
            "http_request_duration_seconds_bucket{handler=\"/tokenize\",method=\"POST\",le=\"0.1\"} 0",
            "http_request_duration_seconds_bucket{handler=\"/tokenize\",method=\"POST\",le=\"0.5\"} 1",
            "http_request_duration_highr_seconds_bucket{le=\"0.25\"} 0",
            "http_request_duration_highr_seconds_count 2",
        ] {
            assert!(text.lines().any(|seen| seen == line), "no {line} in\n{text}");
        }
    }
}
