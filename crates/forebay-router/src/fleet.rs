//! A fleet and its replicas.

use std::sync::Arc;
use std::time::Duration;

use forebay_kv::Lane;
use forebay_placement::{Ask, Decision, FleetView, PlaceError, ReplicaView, decide};
use forebay_types::{ModelName, ReplicaId};
use forebay_upstream::Upstream;
use http::HeaderValue;

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
        let views: Vec<ReplicaView> = self.replicas.iter().map(|replica| replica.live.view()).collect();
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
            // What restarts has an empty cache.
            self.prefixes.forget(replica.lane);
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
