//! A fleet and its replicas.

use std::sync::Arc;
use std::time::Duration;

use forebay_kv::Lane;
use forebay_placement::{Ask, Decision, FleetView, PlaceError, ReplicaState, ReplicaView, decide};
use forebay_types::{ModelName, ReplicaId};
use forebay_upstream::Upstream;
use http::HeaderValue;

use crate::config::HealthConfig;
use crate::kv_events::EventsView;
use crate::lengths::Lengths;
use crate::live::Live;
use crate::need::Need;
use crate::prefix::ModelPrefixes;

pub(crate) struct Fleet<E> {
    pub(crate) model: ModelName,
    /// The model's name at HTTP replicas.
    pub(crate) served_name: String,
    pub(crate) replicas: Vec<Replica<E>>,
    pub(crate) prefixes: Arc<ModelPrefixes>,
    pub(crate) lengths: Arc<Lengths>,
}

pub(crate) struct Replica<E> {
    pub(crate) id: ReplicaId,
    /// What the client may know: `engine`, or `replica-N` by its position in the file. Not the URL: addresses inside
    /// are none of the client's business.
    pub(crate) label: HeaderValue,
    pub(crate) at: At<E>,
    pub(crate) lane: Lane,
    pub(crate) live: Arc<Live>,
    /// Where it tells what it has cached, if it does.
    pub(crate) events: Option<Arc<EventsView>>,
}

impl<E> Replica<E> {
    /// What it has cached is known, and need not be guessed.
    pub(crate) fn tells_all(&self) -> bool {
        self.events.as_ref().is_some_and(|events| events.is_complete())
    }
}

pub(crate) enum At<E> {
    Engine(Arc<E>),
    Http(Upstream),
}

impl<E> Fleet<E> {
    /// Chooses a replica for what is needed, leaving out those in `tried`.
    pub(crate) fn place(
        &self,
        need: &Need,
        block_tokens: u32,
        queued_tokens_max: u64,
        now: Duration,
        tried: &[usize],
        seed: u64,
    ) -> Result<Decision, PlaceError> {
        let mut views: Vec<ReplicaView> = self.replicas.iter().map(|replica| replica.live.view()).collect();
        // A guess about the future must not turn a request away: with nobody else left, those that cool off are tried.
        let cools = |n: usize| self.replicas[n].live.is_cooling();
        let is_left = |n: usize| views[n].state == ReplicaState::Up && !tried.contains(&n);
        if (0..views.len()).any(|n| is_left(n) && !cools(n)) {
            (0..views.len()).filter(|&n| cools(n)).for_each(|n| views[n].state = ReplicaState::Down);
        }
        let ask = Ask {
            prompt_tokens: need.prompt_tokens,
            block_tokens,
            matched_blocks: &need.matched,
            output_tokens: self.lengths.expect(need.tokens_max, need.choices),
            tried,
        };
        decide(&FleetView { model: &self.model, replicas: &views, queued_tokens_max, now }, &ask, seed)
    }

    /// A request could not connect to a replica: it gets no more until a probe succeeds.
    pub(crate) fn on_unreachable(&self, replica: &Replica<E>, why: &str) {
        if let Some(turn) = replica.live.on_connect_error() {
            turn.log(&self.model, &replica.id, why);
            // What restarts has an empty cache. Where events come, they say so themselves.
            if !replica.events.as_ref().is_some_and(|events| events.is_connected()) {
                self.prefixes.forget(replica.lane);
            }
        }
    }

    /// A replica failed a request that it might have answered.
    pub(crate) fn on_failed_answer(&self, replica: &Replica<E>, why: &str, config: &HealthConfig) {
        if replica.live.on_failed_answer(config) {
            tracing::warn!(model = %self.model, replica = %replica.id, why, "replica keeps failing and is left out for a while");
        }
    }

    /// The replicas' places in the prefix index.
    pub(crate) fn lanes(&self) -> Vec<Lane> {
        self.replicas.iter().map(|replica| replica.lane).collect()
    }

    /// Whether knowing the prompt's blocks can change anything: with one replica only whether it is full.
    pub(crate) fn needs_blocks(&self, need: &Need, queued_tokens_max: u64) -> bool {
        match &self.replicas[..] {
            [only] => only.live.view().load.queued_tokens + u64::from(need.prompt_tokens) > queued_tokens_max,
            _ => true,
        }
    }
}
