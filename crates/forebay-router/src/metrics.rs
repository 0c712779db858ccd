//! `forebay_router_*`.

use forebay_observe::metrics::{
    Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, LATENCY_BUCKETS,
};
use forebay_observe::{MetricError, Registry};

use crate::kv_events::{By, Why};

/// Labels are models and replicas of the configuration, and fixed words: never what a client sent.
#[derive(Clone)]
pub(crate) struct Metrics {
    /// `model`, `replica`, `reason`
    pub(crate) decisions: IntCounterVec,
    /// `model`, `replica`
    pub(crate) in_flight: IntGaugeVec,
    /// `model`, `replica`
    pub(crate) queued_tokens: IntGaugeVec,
    /// `model`, `replica`
    pub(crate) healthy: IntGaugeVec,
    /// `model`, `replica`
    pub(crate) cool_offs: IntCounterVec,
    /// `model`
    pub(crate) prompt_tokens: IntCounterVec,
    /// `model`
    pub(crate) matched_tokens: IntCounterVec,
    /// `model`
    pub(crate) cached_tokens: IntCounterVec,
    /// `model`
    pub(crate) retries: IntCounterVec,
    /// `model`, `reason`
    pub(crate) refused: IntCounterVec,
    pub(crate) placing: Histogram,
    /// `model`, `replica`
    kv_events_connected: IntGaugeVec,
    /// `model`, `replica`
    kv_event_batches: IntCounterVec,
    /// `model`, `replica`
    kv_events_ignored: IntCounterVec,
    /// `model`, `replica`
    kv_events_in_sync: IntGaugeVec,
    /// `model`, `replica`
    kv_event_batches_lost: IntCounterVec,
    /// `model`, `replica`
    kv_event_lag: IntGaugeVec,
    /// `model`, `replica`, `why`, `by`
    kv_event_resyncs: IntCounterVec,
    /// `model`, `replica`
    reported_requests: IntGaugeVec,
    /// `model`, `replica`
    reported_queued_tokens: IntGaugeVec,
}

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Result<Self, MetricError> {
        let at = &["model", "replica"];
        Ok(Self {
            decisions: registry.counters(
                "forebay_router_decisions_total",
                "Requests given to a replica, by the reason for the choice: only, prefix, load or tie.",
                &["model", "replica", "reason"],
            )?,
            in_flight: registry.gauges(
                "forebay_router_in_flight",
                "Requests that a replica was given and has not finished.",
                at,
            )?,
            queued_tokens: registry.gauges(
                "forebay_router_queued_tokens",
                "Uncached prompt tokens that wait at a replica for their first token.",
                at,
            )?,
            healthy: registry.gauges(
                "forebay_router_healthy",
                "1 while a replica is up, 0 while it is down.",
                at,
            )?,
            cool_offs: registry.counters(
                "forebay_router_cool_offs_total",
                "Times that a replica was left out for a while because its answers failed, though its probes did not.",
                at,
            )?,
            prompt_tokens: registry.counters(
                "forebay_router_prompt_tokens_total",
                "Prompt tokens of placed requests.",
                &["model"],
            )?,
            matched_tokens: registry.counters(
                "forebay_router_prefix_matched_tokens_total",
                "Prompt tokens that the chosen replica was expected to have cached. With one replica nothing is looked up, and what it says itself is counted.",
                &["model"],
            )?,
            cached_tokens: registry.counters(
                "forebay_router_prefix_cached_tokens_total",
                "Prompt tokens that replicas said were cached: what the expectation is to be compared with.",
                &["model"],
            )?,
            retries: registry.counters(
                "forebay_router_retries_total",
                "Requests sent to another replica after one failed.",
                &["model"],
            )?,
            refused: registry.counters(
                "forebay_router_refused_total",
                "Requests that found no replica: saturated or no_replica.",
                &["model", "reason"],
            )?,
            placing: registry.histogram(
                "forebay_router_placing_seconds",
                "Time to hash a prompt's blocks, look them up and decide.",
                &placing_buckets(),
            )?,
            kv_events_connected: registry.gauges(
                "forebay_router_kv_events_connected",
                "1 while the KV events of a replica come in.",
                at,
            )?,
            kv_event_batches: registry.counters(
                "forebay_router_kv_event_batches_total",
                "Batches of KV events taken in, replayed ones included.",
                at,
            )?,
            kv_events_ignored: registry.counters(
                "forebay_router_kv_events_ignored_total",
                "KV events that say nothing that could be looked up: adapters, images, unknown memories or types, blocks after unknown ones.",
                at,
            )?,
            kv_events_in_sync: registry.gauges(
                "forebay_router_kv_events_in_sync",
                "1 while all that a replica has cached is known from its KV events.",
                at,
            )?,
            kv_event_batches_lost: registry.counters(
                "forebay_router_kv_event_batches_lost_total",
                "Batches of KV events that did not come when they were sent, whatever was done about it.",
                at,
            )?,
            kv_event_lag: registry.gauges(
                "forebay_router_kv_event_lag_batches",
                "Batches of KV events that a replica has sent, by its heartbeat, and that are being asked for.",
                at,
            )?,
            kv_event_resyncs: registry.counters(
                "forebay_router_kv_event_resyncs_total",
                "Times that a replica was asked for what it had told before, by the reason (joined, gap, restarted, incomplete) and by what brought it (snapshot, replay, nothing).",
                &["model", "replica", "why", "by"],
            )?,
            reported_requests: registry.gauges(
                "forebay_router_reported_requests",
                "Requests that a replica said it has, running and waiting, in its last load report.",
                at,
            )?,
            reported_queued_tokens: registry.gauges(
                "forebay_router_reported_queued_tokens",
                "Uncached prompt tokens that a replica said are waiting, in its last load report.",
                at,
            )?,
        })
    }

    /// For the events of one replica.
    pub(crate) fn kv_events(&self, model: &str, replica: &str) -> KvEventMetrics {
        let at = &[model, replica];
        KvEventMetrics {
            connected: self.kv_events_connected.with_label_values(at),
            batches: self.kv_event_batches.with_label_values(at),
            ignored: self.kv_events_ignored.with_label_values(at),
            in_sync: self.kv_events_in_sync.with_label_values(at),
            lost: self.kv_event_batches_lost.with_label_values(at),
            lag: self.kv_event_lag.with_label_values(at),
            resyncs: self.kv_event_resyncs.clone(),
            at: [model.to_owned(), replica.to_owned()],
        }
    }

    /// For one replica.
    pub(crate) fn replica(&self, model: &str, replica: &str) -> ReplicaMetrics {
        let at = &[model, replica];
        ReplicaMetrics {
            in_flight: self.in_flight.with_label_values(at),
            queued_tokens: self.queued_tokens.with_label_values(at),
            healthy: self.healthy.with_label_values(at),
            cool_offs: self.cool_offs.with_label_values(at),
            cached_tokens: self.cached_tokens.with_label_values(&[model]),
            reported_requests: self.reported_requests.with_label_values(at),
            reported_queued_tokens: self.reported_queued_tokens.with_label_values(at),
        }
    }
}

/// Placing takes microseconds; the usual latency buckets begin at half a millisecond.
fn placing_buckets() -> Vec<f64> {
    let below = [5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4];
    below.iter().chain(LATENCY_BUCKETS).copied().filter(|&seconds| seconds <= 0.1).collect()
}

#[derive(Clone)]
pub(crate) struct ReplicaMetrics {
    pub(crate) in_flight: IntGauge,
    pub(crate) queued_tokens: IntGauge,
    pub(crate) healthy: IntGauge,
    pub(crate) cool_offs: IntCounter,
    pub(crate) cached_tokens: IntCounter,
    pub(crate) reported_requests: IntGauge,
    pub(crate) reported_queued_tokens: IntGauge,
}

pub(crate) struct KvEventMetrics {
    pub(crate) connected: IntGauge,
    pub(crate) batches: IntCounter,
    pub(crate) ignored: IntCounter,
    pub(crate) in_sync: IntGauge,
    pub(crate) lost: IntCounter,
    pub(crate) lag: IntGauge,
    resyncs: IntCounterVec,
    at: [String; 2],
}

impl KvEventMetrics {
    pub(crate) fn on_resync(&self, why: Why, by: By) {
        let [model, replica] = &self.at;
        self.resyncs.with_label_values(&[model, replica, why.as_str(), by.as_str()]).inc();
    }
}
