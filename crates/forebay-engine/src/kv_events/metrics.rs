//! What the publisher counts.

use forebay_observe::metrics::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use forebay_observe::{MetricError, Registry};

#[derive(Clone)]
pub(crate) struct KvEventFamilies {
    sent: IntCounterVec,
    dropped: IntCounterVec,
    subscribers: IntGaugeVec,
    snapshots: IntCounterVec,
}

/// The series of one engine.
#[derive(Clone)]
pub(crate) struct KvEventMetrics {
    pub(super) sent: IntCounter,
    pub(super) dropped_queue: IntCounter,
    pub(super) dropped_subscriber: IntCounter,
    pub(super) subscribers: IntGauge,
    pub(super) snapshots: IntCounter,
}

impl KvEventFamilies {
    pub(crate) fn register(registry: &Registry) -> Result<Self, MetricError> {
        Ok(Self {
            sent: registry.counters(
                "forebay_engine_kv_event_batches_total",
                "Steps whose KV events were published.",
                &["model_name"],
            )?,
            dropped: registry.counters(
                "forebay_engine_kv_event_batches_dropped_total",
                "Times that KV events were left out: queue (the publisher stood still, and told that nothing is cached) or subscriber (one was too slow).",
                &["model_name", "reason"],
            )?,
            subscribers: registry.gauges(
                "forebay_engine_kv_event_subscribers",
                "Connections of subscribers to KV events.",
                &["model_name"],
            )?,
            snapshots: registry.counters(
                "forebay_engine_kv_event_snapshots_total",
                "Snapshots of the cache that were sent to those who had missed events.",
                &["model_name"],
            )?,
        })
    }

    pub(crate) fn for_model(&self, model: &str) -> KvEventMetrics {
        KvEventMetrics {
            sent: self.sent.with_label_values(&[model]),
            dropped_queue: self.dropped.with_label_values(&[model, "queue"]),
            dropped_subscriber: self.dropped.with_label_values(&[model, "subscriber"]),
            subscribers: self.subscribers.with_label_values(&[model]),
            snapshots: self.snapshots.with_label_values(&[model]),
        }
    }
}
