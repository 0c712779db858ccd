//! The edge's metrics. Labels come from the configuration and from closed sets, never from a client.

use forebay_observe::MetricError;
use forebay_observe::metrics::{
    HistogramVec, IntCounter, IntCounterVec, IntGauge, LATENCY_BUCKETS, Registry,
};

/// Route label of a request that matched none, or was refused before.
pub(crate) const NO_ROUTE: &str = "none";

pub(crate) struct Metrics {
    pub(crate) requests: IntCounterVec,
    pub(crate) seconds: HistogramVec,
    pub(crate) first_byte_seconds: HistogramVec,
    pub(crate) sent_bytes: IntCounterVec,
    pub(crate) received_bytes: IntCounter,
    pub(crate) connections: IntGauge,
    pub(crate) in_flight: IntGauge,
    pub(crate) streams: IntGauge,
    pub(crate) llm_in_flight: IntGauge,
    pub(crate) refused: IntCounterVec,
}

impl Metrics {
    pub(crate) fn new(registry: &Registry) -> Result<Self, MetricError> {
        Ok(Self {
            requests: registry.counters(
                "forebay_edge_requests_total",
                "Requests, by route and class of status; 499 is a client that left before the answer.",
                &["route", "code"],
            )?,
            seconds: registry.histograms(
                "forebay_edge_request_seconds",
                "From the request's head to the end of the answer.",
                LATENCY_BUCKETS,
                &["route"],
            )?,
            first_byte_seconds: registry.histograms(
                "forebay_edge_first_byte_seconds",
                "From the request's head to the first byte of the answer's body.",
                LATENCY_BUCKETS,
                &["route"],
            )?,
            sent_bytes: registry.counters(
                "forebay_edge_sent_bytes_total",
                "Bytes of response bodies.",
                &["route"],
            )?,
            received_bytes: registry
                .counter("forebay_edge_received_bytes_total", "Bytes of request bodies.")?,
            connections: registry.gauge("forebay_edge_connections", "Open client connections.")?,
            in_flight: registry
                .gauge("forebay_edge_requests_in_flight", "Requests not yet answered in full.")?,
            streams: registry
                .gauge("forebay_edge_streams_in_flight", "Event streams of LLM replies being sent.")?,
            llm_in_flight: registry.gauge(
                "forebay_edge_llm_requests_in_flight",
                "Requests to the LLM stack not yet answered in full: the number that /load tells.",
            )?,
            refused: registry.counters(
                "forebay_edge_refused_total",
                "Connections and requests refused at the edge, by reason.",
                &["reason"],
            )?,
        })
    }

    pub(crate) fn refuse(&self, reason: &str) {
        self.refused.with_label_values(&[reason]).inc();
    }
}

pub(crate) fn code_class(status: u16) -> &'static str {
    match status {
        499 => "499",
        100..200 => "1xx",
        200..300 => "2xx",
        300..400 => "3xx",
        400..500 => "4xx",
        _ => "5xx",
    }
}

/// Counts as one while it lives.
pub(crate) struct Counted(IntGauge);

impl Counted {
    pub(crate) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
