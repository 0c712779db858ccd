//! The stage.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forebay_flow::{Flow, Placed, Reply, Resolved, Stage};
use forebay_observe::Layer;
use forebay_placement::{Decision, PlaceError};
use forebay_types::{Blame, Class, Classify, Code, Fault, ModelName, ReplicaId, Retry};
use forebay_upstream::{CallInfo, FaultKind, Timeouts, Upstream, UpstreamFault};
use forebay_wire::{Api, Ask, Generate, SpliceError, for_replica, with_model};
use http::{HeaderName, Method};
use tokio::time::Instant;

use crate::build::{Built, RouterBuildError, RouterDeps, build};
use crate::config::RouterConfig;
use crate::fleet::{At, Fleet, Replica};
use crate::kv_events::KvEventsStatus;
use crate::live::{InFlight, Live};
use crate::metrics::Metrics;
use crate::need::Need;
use crate::track::Tracked;
use crate::watch::Watches;

const X_FOREBAY_REPLICA: HeaderName = HeaderName::from_static("x-forebay-replica");

/// L4: gives a request to a replica of its fleet.
///
/// Requests are independent: nothing is awaited while a lock is held, and a dropped call or reply gives back all that
/// it counted for.
pub struct Router<E> {
    fleets: HashMap<ModelName, Fleet<E>>,
    config: RouterConfig,
    metrics: Metrics,
    begun: Instant,
    /// Counts up from a random start, so that several routers with the same view draw different lots.
    seed: AtomicU64,
    _watches: Watches,
}

/// Why a request could not be routed. What a replica says is passed on as it is.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    #[error("no fleet serves `{fleet}`")]
    NoFleet { fleet: ModelName },
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The request's own JSON could not be given another model name.
    #[error("the request body can't be forwarded: {0}")]
    Body(#[from] SpliceError),
    #[error("a fleet can't be asked for its models")]
    Listing,
}

impl Classify for RouteError {
    fn class(&self) -> Class {
        match self {
            Self::NoFleet { .. } => Class::new(Code::ModelNotFound, Blame::Client),
            // The proxy may have another deployment, whatever the reason here.
            Self::Place(error @ PlaceError::NoWorker { .. }) => error.class().retry(Retry::Elsewhere),
            Self::Place(error @ PlaceError::Saturated { .. }) => error.class(),
            Self::Body(_) => Class::new(Code::BadRequest, Blame::Client),
            Self::Listing => Class::new(Code::Internal, Blame::Us),
        }
    }
}

/// A fleet as it stands, for readiness and the admin API.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct FleetStatus {
    pub model: ModelName,
    pub replicas: Vec<ReplicaStatus>,
}

#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct ReplicaStatus {
    pub id: ReplicaId,
    /// The value of `x-forebay-replica`.
    pub label: String,
    pub up: bool,
    /// Its answers failed: it gets nothing for a while, unless no other is left.
    pub cooling: bool,
    /// An engine, or an HTTP replica that has answered a probe at least once.
    pub proved: bool,
    pub requests: u32,
    pub queued_tokens: u64,
    /// Learned prefill rate, `None` before the first sample.
    pub prefill_tokens_per_s: Option<f64>,
    /// How far its cache is known from its own words, where it tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_events: Option<KvEventsStatus>,
}

impl<E: Stage<Placed>> Router<E> {
    /// Builds the fleets and begins to probe HTTP replicas (which needs a tokio runtime).
    ///
    /// Without a configuration, or with one that has no fleets, there is one fleet per engine of this process.
    /// `engines` are by the model that they serve.
    pub fn new(
        config: Option<&RouterConfig>,
        deps: RouterDeps<'_>,
        engines: HashMap<ModelName, Arc<E>>,
    ) -> Result<Self, RouterBuildError> {
        let configured = config.is_some();
        let config = config.cloned().unwrap_or_default();
        let begun = Instant::now();
        let Built { fleets, watches, metrics } = build(&config, configured, &deps, engines, begun)?;
        let seed = AtomicU64::new(RandomState::new().hash_one(0));
        Ok(Self { fleets, config, metrics, begun, seed, _watches: watches })
    }

    /// Whether anything can be served: some replica is up, and has proved it.
    pub fn ready(&self) -> bool {
        self.fleets().iter().flat_map(|fleet| &fleet.replicas).any(|replica| replica.up && replica.proved)
    }

    /// Every fleet, by name.
    pub fn fleets(&self) -> Vec<FleetStatus> {
        let mut fleets: Vec<FleetStatus> = self.fleets.values().map(status).collect();
        fleets.sort_by(|a, b| a.model.cmp(&b.model));
        fleets
    }

    fn place(
        &self,
        fleet: &Fleet<E>,
        need: &Need,
        block_tokens: u32,
        tried: &[usize],
    ) -> Result<Decision, PlaceError> {
        // What computes nothing is not kept out by a queue of prompts.
        let limit = if need.prompt_tokens == 0 { u64::MAX } else { self.config.queued_tokens_max };
        let seed = self.seed.fetch_add(1, Ordering::Relaxed);
        let decision = fleet.place(need, block_tokens, limit, self.begun.elapsed(), tried, seed);
        let model = fleet.model.as_str();
        match &decision {
            Ok(decision) => {
                let replica = fleet.replicas[decision.replica].id.as_str();
                self.metrics.decisions.with_label_values(&[model, replica, decision.why.as_str()]).inc();
            }
            Err(PlaceError::NoWorker { .. }) => {
                self.metrics.refused.with_label_values(&[model, "no_replica"]).inc();
            }
            Err(PlaceError::Saturated { .. }) => {
                self.metrics.refused.with_label_values(&[model, "saturated"]).inc();
            }
        }
        decision
    }

    async fn hand_over(
        &self,
        fleet: &Fleet<E>,
        replica: &Replica<E>,
        flow: Flow<Resolved>,
        need: &Need,
    ) -> Result<Reply, Failed> {
        match &replica.at {
            At::Engine(engine) => {
                let placed =
                    flow.advance(|Resolved { caller, ask, ids, held, .. }| Placed { caller, ask, ids, held });
                engine.call(placed).await.map_err(|fault| Failed { fault, how: How::Refused })
            }
            At::Http(upstream) => {
                // Before the answer: of two equal prompts in a row, the second should find the first.
                if need.has_stand_ins() || !replica.tells_all() {
                    need.guess_cached(&fleet.prefixes, replica.lane).await;
                }
                self.forward(upstream, &replica.live, &fleet.served_name, &flow).await
            }
        }
    }

    async fn forward(
        &self,
        upstream: &Upstream,
        live: &Live,
        served_name: &str,
        flow: &Flow<Resolved>,
    ) -> Result<Reply, Failed> {
        let timeouts = self.timeouts();
        let (path, body) = match &flow.stage.ask {
            Ask::Generate(call) => {
                if call.stream && live.counts_as_it_goes() {
                    match self.generate(upstream, call, served_name, flow, true).await {
                        // Unless the client asked for it itself, in which case it is to know.
                        Err(failed) if failed.is_about_counting() && !call.continuous_usage => {
                            live.on_counting_refused();
                        }
                        answered => return answered,
                    }
                }
                return self.generate(upstream, call, served_name, flow, false).await;
            }
            Ask::Embed(call) => {
                let body = with_model(&call.body, served_name).map_err(RouteError::from)?;
                let info = CallInfo::of_embedding(call).of_tenant(&flow.stage.caller.consumer);
                return Ok(upstream.generate(&flow.origin, "/v1/embeddings", body, info, timeouts).await?);
            }
            Ask::Render(call) => {
                let path = match call.api {
                    Api::ChatCompletions => "/v1/chat/completions/render",
                    Api::Completions | Api::Tokens => "/v1/completions/render",
                };
                (path, with_model(&call.body, served_name))
            }
            Ask::TokenizerInfo => {
                let (origin, path) = (Some(&*flow.origin), "/tokenizer_info");
                let answer = upstream.call(origin, Method::GET, path, None, timeouts.first_byte).await?;
                return Ok(Reply::json(answer.body));
            }
            Ask::Tokenize(call) => ("/tokenize", with_model(&call.body, served_name)),
            Ask::Detokenize(call) => ("/detokenize", with_model(&call.body, served_name)),
            Ask::ListModels | Ask::GetModel(_) => return Err(RouteError::Listing.into()),
        };
        let body = body.map_err(RouteError::from)?;
        let answer =
            upstream.call(Some(&flow.origin), Method::POST, path, Some(body), timeouts.first_byte).await?;
        Ok(Reply::json(answer.body))
    }

    /// `counting`: with usage in every frame of a stream, so that one that is cut is accounted exactly.
    async fn generate(
        &self,
        upstream: &Upstream,
        call: &Generate,
        served_name: &str,
        flow: &Flow<Resolved>,
        counting: bool,
    ) -> Result<Reply, Failed> {
        let body = for_replica(call, served_name, counting).map_err(RouteError::from)?;
        let path = match call.api {
            Api::ChatCompletions => "/v1/chat/completions",
            Api::Completions => "/v1/completions",
            Api::Tokens => "/inference/v1/generate",
        };
        let info = CallInfo::new(call, counting).of_tenant(&flow.stage.caller.consumer);
        Ok(upstream.generate(&flow.origin, path, body, info, self.timeouts()).await?)
    }

    fn timeouts(&self) -> Timeouts {
        Timeouts {
            first_byte: self.config.first_byte_timeout.get(),
            between_chunks: self.config.chunk_timeout.get(),
        }
    }
}

impl<E: Stage<Placed>> Stage<Resolved> for Router<E> {
    /// Tries replicas until one begins to answer: at most `router.attempts-max`, never the same one twice, and only
    /// while the failure says that nothing is lost by trying elsewhere.
    async fn call(&self, flow: Flow<Resolved>) -> Result<Reply, Fault> {
        let Some(fleet) = self.fleets.get(&flow.stage.fleet) else {
            return Err(RouteError::NoFleet { fleet: flow.stage.fleet.clone() }.into());
        };
        if matches!(flow.stage.ask, Ask::ListModels | Ask::GetModel(_)) {
            return Err(RouteError::Listing.into());
        }
        let placing = std::time::Instant::now();
        let block_tokens = fleet.prefixes.block_tokens(self.config.block_size);
        let mut need = Need::of(&flow.stage.ask, &flow.stage.ids);
        let mut looked_up = false;
        if let Ask::Generate(call) = &flow.stage.ask
            && fleet.needs_blocks(&need, self.config.queued_tokens_max)
        {
            looked_up = true;
            need.look_up(call, &flow.stage.ids, block_tokens, &fleet.prefixes, fleet.lanes()).await;
        }

        let attempts_max = fleet.replicas.len().min(self.config.attempts_max.max(1) as usize);
        let trace = flow.origin.trace.clone();
        let mut flow = Some(flow);
        let mut tried = Vec::new();
        let mut failure: Option<Fault> = None;
        loop {
            let begun = if tried.is_empty() { placing } else { std::time::Instant::now() };
            let decision = match self.place(fleet, &need, block_tokens, &tried) {
                Ok(decision) => decision,
                // After a failure, that failure says more than that nobody is left.
                Err(error) => {
                    trace.note(Layer::Router, "place", begun, error.to_string());
                    return Err(failure.unwrap_or_else(|| RouteError::from(error).into()));
                }
            };
            if tried.is_empty() {
                self.metrics.placing.observe(placing.elapsed().as_secs_f64());
            }
            let replica = &fleet.replicas[decision.replica];
            trace.note(Layer::Router, "place", begun, why(replica, &decision, &need, looked_up));
            tried.push(decision.replica);
            let is_last = tried.len() >= attempts_max;
            // The last attempt takes the request itself; the prompt is copied only while another may follow.
            let this =
                if is_last { flow.take() } else { flow.clone() }.expect("taken by the last attempt only");

            let handed = std::time::Instant::now();
            let mut flight = InFlight::begin(&replica.live, decision.uncached_tokens);
            if !looked_up {
                let matched = self.metrics.matched_tokens.with_label_values(&[fleet.model.as_str()]);
                flight = flight.expecting_nothing(matched);
            }
            match self.hand_over(fleet, replica, this, &need).await {
                Ok(mut reply) => {
                    replica.live.on_answer();
                    trace.note(Layer::Router, "replica", handed, format!("{} answers", replica.id));
                    let model = fleet.model.as_str();
                    let (prompt, matched) =
                        (u64::from(need.prompt_tokens), u64::from(decision.cached_tokens));
                    self.metrics.prompt_tokens.with_label_values(&[model]).inc_by(prompt);
                    self.metrics.matched_tokens.with_label_values(&[model]).inc_by(matched);
                    reply.headers.insert(X_FOREBAY_REPLICA, replica.label.clone());
                    let (form, lengths) = (reply.form, Arc::clone(&fleet.lengths));
                    return Ok(
                        reply.map_chunks(|chunks| Tracked::wrap(chunks, form, flight, lengths, need.choices))
                    );
                }
                Err(Failed { fault, how }) => {
                    drop(flight);
                    // The code and not the words: those may quote the prompt.
                    let why = format!("{} failed: {:?}", replica.id, fault.class.code);
                    trace.note(Layer::Router, "replica", handed, why);
                    let detail = fault.detail.as_deref().unwrap_or(&fault.message);
                    match how {
                        How::Unreachable => fleet.on_unreachable(replica, detail),
                        How::Failing => fleet.on_failed_answer(replica, detail, &self.config.health),
                        How::Refused => {}
                    }
                    if is_last || !may_go_elsewhere(&fault) {
                        return Err(fault);
                    }
                    self.metrics.retries.with_label_values(&[fleet.model.as_str()]).inc();
                    failure = Some(fault);
                }
            }
        }
    }
}

/// A replica that did not begin to answer.
struct Failed {
    fault: Fault,
    how: How,
}

/// What a failure says about the replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// It could not be connected to.
    Unreachable,
    /// It is there and does not do its work.
    Failing,
    /// Nothing: the request is at fault, or our own limits, or an engine in this process, whose state is known.
    Refused,
}

impl Failed {
    /// Some servers are strict about options that they don't know.
    fn is_about_counting(&self) -> bool {
        const OPTION: &str = "continuous_usage_stats";
        let Fault { class, message, param, .. } = &self.fault;
        let named = message.contains(OPTION) || param.as_deref().is_some_and(|param| param.contains(OPTION));
        named && class.code == Code::BadRequest
    }
}

impl From<UpstreamFault> for Failed {
    fn from(UpstreamFault { kind, fault }: UpstreamFault) -> Self {
        let how = match kind {
            // Our own limit on connections is also met before anything is sent.
            FaultKind::Unreachable if fault.class.code == Code::Overloaded => How::Refused,
            FaultKind::Unreachable => How::Unreachable,
            FaultKind::Broken | FaultKind::TimedOut if fault.class.blame == Blame::Client => How::Refused,
            FaultKind::Broken | FaultKind::TimedOut => How::Failing,
            FaultKind::Refused(status) if status.is_server_error() || status.as_u16() == 429 => How::Failing,
            FaultKind::Refused(_) => How::Refused,
        };
        Self { fault, how }
    }
}

impl From<RouteError> for Failed {
    fn from(error: RouteError) -> Self {
        Self { fault: error.into(), how: How::Refused }
    }
}

/// For a trace. Without a look-up the decision's counts are no more than "all of it, at worst".
fn why<E>(replica: &Replica<E>, decision: &Decision, need: &Need, looked_up: bool) -> String {
    if looked_up || need.prompt_tokens == 0 {
        return format!("{}, {decision}", replica.id);
    }
    let (why, tokens) = (decision.why.as_str(), need.prompt_tokens);
    format!("{}, {why}: cached part of {tokens} tokens not looked up (one replica)", replica.id)
}

/// A replica that is full or draining refused before it computed anything: another one may have room now, whatever
/// it says about later.
fn may_go_elsewhere(fault: &Fault) -> bool {
    fault.class.retry == Retry::Elsewhere || matches!(fault.class.code, Code::Overloaded | Code::ShuttingDown)
}

fn status<E>(fleet: &Fleet<E>) -> FleetStatus {
    let replica = |replica: &Replica<E>| {
        let (view, proved) = (replica.live.view(), replica.live.proved());
        ReplicaStatus {
            id: replica.id.clone(),
            label: replica.label.to_str().unwrap_or_default().to_owned(),
            up: view.state == forebay_placement::ReplicaState::Up,
            cooling: replica.live.is_cooling(),
            proved: proved || matches!(replica.at, At::Engine(_)),
            requests: view.load.requests,
            queued_tokens: view.load.queued_tokens,
            prefill_tokens_per_s: view.speed.last_measured(),
            kv_events: replica.events.as_ref().map(|events| KvEventsStatus {
                cached_blocks: fleet.prefixes.blocks_held(replica.lane),
                ..events.status()
            }),
        }
    };
    FleetStatus { model: fleet.model.clone(), replicas: fleet.replicas.iter().map(replica).collect() }
}
