//! `forebay_gateway_*`. Labels are consumers of the configuration and fixed words, never what a client sends.

use forebay_observe::metrics::{IntCounter, IntCounterVec, IntGauge};
use forebay_observe::{MetricError, Registry};
use forebay_quota::Limited;
use forebay_types::Usage;

/// The consumer label of a request whose sender is not known.
pub(crate) const UNKNOWN: &str = "unknown";

#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    requests: IntCounterVec,
    tokens: IntCounterVec,
    cached: IntCounterVec,
    refused: IntCounterVec,
    pub(crate) holds: IntGauge,
    pub(crate) audit_records: IntCounter,
    pub(crate) audit_errors: IntCounter,
    pub(crate) audit_refused: IntCounter,
}

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Result<Self, MetricError> {
        Ok(Self {
            requests: registry.counters(
                "forebay_gateway_requests_total",
                "Requests by how they ended: ok, cancelled, or the name of the error.",
                &["consumer", "outcome"],
            )?,
            tokens: registry.counters(
                "forebay_gateway_tokens_total",
                "Tokens charged, by kind: prompt or completion.",
                &["consumer", "kind"],
            )?,
            // Apart from the above, so that a sum over kinds counts nothing twice.
            cached: registry.counters(
                "forebay_gateway_cached_tokens_total",
                "Prompt tokens, charged as such, that came from a prefix cache.",
                &["consumer"],
            )?,
            refused: registry.counters(
                "forebay_gateway_refused_total",
                "Requests refused by a limit: requests or tokens per minute.",
                &["consumer", "limit"],
            )?,
            holds: registry
                .gauge("forebay_gateway_holds", "Requests with quota held and not settled yet.")?,
            audit_records: registry
                .counter("forebay_gateway_audit_records_total", "Records written to the audit log.")?,
            audit_errors: registry.counter(
                "forebay_gateway_audit_write_errors_total",
                "Failed attempts to write the audit log; each is repeated until it succeeds.",
            )?,
            audit_refused: registry.counter(
                "forebay_gateway_audit_refused_total",
                "Requests refused because they could not have been audited.",
            )?,
        })
    }

    pub(crate) fn request(&self, consumer: &str, outcome: &str) {
        self.requests.with_label_values(&[consumer, outcome]).inc();
    }

    pub(crate) fn refuse(&self, consumer: &str, limited: Limited) {
        self.refused.with_label_values(&[consumer, limited.as_str()]).inc();
    }

    pub(crate) fn charge(&self, consumer: &str, usage: &Usage) {
        for (kind, tokens) in [("prompt", usage.prompt_tokens), ("completion", usage.completion_tokens)] {
            self.tokens.with_label_values(&[consumer, kind]).inc_by(u64::from(tokens));
        }
        self.cached.with_label_values(&[consumer]).inc_by(u64::from(usage.cached_tokens));
    }
}
