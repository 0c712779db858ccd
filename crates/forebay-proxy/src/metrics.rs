//! `forebay_proxy_*`.

use forebay_observe::metrics::IntCounterVec;
use forebay_observe::{MetricError, Registry};

/// Labels are models and deployments of the configuration, and fixed words: never what a client sent.
#[derive(Clone)]
pub(crate) struct Metrics {
    /// `model`, `deployment`, `outcome`
    pub(crate) requests: IntCounterVec,
    /// `model`
    pub(crate) fallbacks: IntCounterVec,
    /// `model`, `deployment`
    pub(crate) retries: IntCounterVec,
    /// `model`, `deployment`
    pub(crate) cooldowns: IntCounterVec,
    /// No labels: what was asked for is the client's word.
    pub(crate) unknown_models: forebay_observe::metrics::IntCounter,
}

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Result<Self, MetricError> {
        Ok(Self {
            requests: registry.counters(
                "forebay_proxy_requests_total",
                "Attempts at a deployment, by outcome: ok (it began to answer) or the error's name.",
                &["model", "deployment", "outcome"],
            )?,
            fallbacks: registry.counters(
                "forebay_proxy_fallbacks_total",
                "Requests that went on to the next deployment of their chain.",
                &["model"],
            )?,
            retries: registry.counters(
                "forebay_proxy_retries_total",
                "Further attempts at the same deployment.",
                &["model", "deployment"],
            )?,
            cooldowns: registry.counters(
                "forebay_proxy_cooldowns_total",
                "Times that a failing deployment was left out for a while.",
                &["model", "deployment"],
            )?,
            unknown_models: registry.counter(
                "forebay_proxy_unknown_model_total",
                "Requests for a model that nobody serves here.",
            )?,
        })
    }
}
