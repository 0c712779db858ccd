//! Probes HTTP replicas for as long as the router lives.

use std::sync::Arc;
use std::time::Duration;

use forebay_kv::Lane;
use forebay_types::{ModelName, ReplicaId};
use forebay_upstream::Upstream;
use tokio::task::AbortHandle;
use tokio::time::MissedTickBehavior;

use crate::config::HealthConfig;
use crate::health::Turn;
use crate::kv_events::{EventsView, Subscription};
use crate::live::Live;
use crate::prefix::ModelPrefixes;

/// More often than this a probe is load.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// The probing and listening tasks: two per HTTP replica at most, so as many as the configuration names. Dropping it ends them.
#[derive(Default)]
pub(crate) struct Watches(Vec<AbortHandle>);

/// What a turn of a replica's health touches.
#[derive(Clone)]
pub(crate) struct Watched {
    pub(crate) model: ModelName,
    pub(crate) id: ReplicaId,
    pub(crate) live: Arc<Live>,
    pub(crate) prefixes: Arc<ModelPrefixes>,
    pub(crate) lane: Lane,
    /// Where it tells what it has cached.
    pub(crate) events: Option<Arc<EventsView>>,
}

impl Watches {
    /// Starts one task that probes at once and then every `health.interval`.
    pub(crate) fn add(
        &mut self,
        runtime: &tokio::runtime::Handle,
        upstream: Upstream,
        watched: Watched,
        health: HealthConfig,
    ) {
        self.0.push(runtime.spawn(watch(upstream, watched, health)).abort_handle());
    }

    /// Starts one task that listens to a replica's KV events.
    pub(crate) fn follow(&mut self, runtime: &tokio::runtime::Handle, subscription: Subscription) {
        self.0.push(runtime.spawn(subscription.run()).abort_handle());
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

/// Cancellation: at any point; a probe changes nothing at the replica.
async fn watch(upstream: Upstream, watched: Watched, health: HealthConfig) {
    let mut ticks = tokio::time::interval(health.interval.get().max(INTERVAL_MIN));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let (good, why) = match upstream.probe(&health.path, health.timeout.get()).await {
            Ok((status, _)) => (status.is_success(), format!("{} answered {status}", health.path)),
            Err(error) => (false, error.detail()),
        };
        if let Some(turn) = watched.live.on_probe(good, &health) {
            turn.log(&watched.model, &watched.id, &why);
            if turn == Turn::Down && !watched.events.as_ref().is_some_and(|events| events.is_connected()) {
                // What restarts has an empty cache. Where events come, they say so themselves.
                watched.prefixes.forget(watched.lane);
            }
        }
    }
}
