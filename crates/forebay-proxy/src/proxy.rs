//! The stage.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forebay_config::Environment;
use forebay_flow::{Admitted, Flow, Reply, Resolved, Stage};
use forebay_observe::Layer;
use forebay_types::{Blame, Class, Classify, Code, Fault, ModelName, Retry};
use forebay_upstream::{CallInfo, FaultKind, Upstream, UpstreamFault};
use forebay_wire::{Api, Ask, SpliceError, error_row, for_upstream, with_model};
use http::{HeaderName, HeaderValue};
use tokio::time::Instant;

use crate::build::{Deployment, Model, Models, ProxyBuildError, ProxyDeps, Target, build};
use crate::config::ProxyConfig;
use crate::list;
use crate::metrics::Metrics;
use crate::policy::{Tried, Verdict, backoff, counts_against, verdict};

const X_FOREBAY_DEPLOYMENT: HeaderName = HeaderName::from_static("x-forebay-deployment");
const X_FOREBAY_ATTEMPTS: HeaderName = HeaderName::from_static("x-forebay-attempts");

/// L3: turns a model's name into somebody who answers.
pub struct Proxy<Next> {
    next: Next,
    pub(crate) models: Models,
    config: ProxyConfig,
    metrics: Metrics,
    begun: Instant,
    jitter: RandomState,
    jitter_count: AtomicU64,
}

/// Why nobody could be asked. What a deployment says is passed on as it is.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// OpenAI's words, which also hide whether a model exists that the caller may not use.
    #[error("The model `{model}` does not exist or you do not have access to it.")]
    NoModel { model: ModelName },
    #[error("there is not just one model here; say which in `model`, or ask the worker that has it")]
    ModelNotGiven,
    #[error("the model `{model}` runs at a provider, which has no such endpoint")]
    NotAtProviders { model: ModelName },
    #[error("`{model}` did not begin to answer within {} s", after.as_secs_f64())]
    TooSlow { model: ModelName, after: Duration },
    /// The request's own JSON could not be given another model name.
    #[error("the request body can't be forwarded: {0}")]
    Body(#[from] SpliceError),
}

impl Classify for ResolveError {
    fn class(&self) -> Class {
        match self {
            Self::NoModel { .. } => Class::new(Code::ModelNotFound, Blame::Client),
            Self::ModelNotGiven | Self::Body(_) => Class::new(Code::BadRequest, Blame::Client),
            Self::NotAtProviders { .. } => Class::new(Code::NotSupported, Blame::Client),
            Self::TooSlow { .. } => {
                Class::new(Code::UpstreamTimeout, Blame::Upstream).retry(Retry::Elsewhere)
            }
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::ModelNotGiven => Some("model"),
            Self::NoModel { .. } | Self::NotAtProviders { .. } | Self::TooSlow { .. } | Self::Body(_) => None,
        }
    }
}

impl<Next: Stage<Resolved>> Proxy<Next> {
    /// Builds the chains; opens no connection. `next` is the router.
    ///
    /// Without a configuration, or with one that lists no models, each fleet is a model under its own name. With
    /// models listed, only they can be asked for: a fleet that no deployment names is hidden.
    pub fn new(
        config: Option<&ProxyConfig>,
        env: &dyn Environment,
        deps: ProxyDeps<'_>,
        next: Next,
    ) -> Result<Self, ProxyBuildError> {
        let config = config.cloned().unwrap_or_default();
        let models = build(&config, env, &deps)?;
        let metrics = Metrics::register(deps.registry)?;
        // Series that dashboards rate() must exist before their first event.
        for model in &models.all {
            metrics.fallbacks.with_label_values(&[model.name.as_str()]);
        }
        Ok(Self {
            next,
            models,
            config,
            metrics,
            begun: Instant::now(),
            jitter: RandomState::new(),
            jitter_count: AtomicU64::new(0),
        })
    }

    /// The names that clients can ask for, in the order of the file.
    pub fn models(&self) -> impl Iterator<Item = &ModelName> {
        self.models.all.iter().map(|model| &model.name)
    }

    /// Everything that the only model can be asked for by, its own name first; nothing where there are several.
    pub fn only_model(&self) -> impl Iterator<Item = &ModelName> {
        let only = match &self.models.all[..] {
            [only] => Some(only),
            _ => None,
        };
        only.into_iter().flat_map(Model::names)
    }

    /// The fleet that a model's chain begins with: whose tokenizer counts its prompts. `None` for a model that nobody
    /// serves, and for one that begins at a provider.
    pub fn first_fleet(&self, model: &ModelName) -> Option<&ModelName> {
        match &self.model(model)?.deployments[0].target {
            Target::Fleet(fleet) => Some(fleet),
            Target::Provider { .. } => None,
        }
    }

    fn model(&self, name: &ModelName) -> Option<&Model> {
        self.models.by_name.get(name).map(|&n| &self.models.all[n])
    }

    fn resolve(&self, flow: &Flow<Admitted>) -> Result<&Model, ResolveError> {
        let caller = &flow.stage.caller;
        let Some(name) = flow.stage.ask.model() else {
            let mut seen =
                self.models.all.iter().filter(|model| model.names().any(|name| list::may_see(caller, name)));
            return match (seen.next(), seen.next()) {
                (Some(only), None) => Ok(only),
                _ => Err(ResolveError::ModelNotGiven),
            };
        };
        self.model(name).filter(|_| list::may_see(caller, name)).ok_or_else(|| {
            self.metrics.unknown_models.inc();
            ResolveError::NoModel { model: name.clone() }
        })
    }

    /// The chain for one request: links that can answer it, without those that are cooling. If all are cooling, all
    /// are tried: a guess about the future must not turn a request away.
    fn chain<'a>(&self, model: &'a Model, ask: &Ask) -> Result<Vec<&'a Deployment>, ResolveError> {
        let is_able = |link: &&Deployment| match (&link.target, ask) {
            (Target::Fleet(_), _) => true,
            (Target::Provider { provider, .. }, Ask::Generate(call)) => provider.has(call.api),
            (Target::Provider { provider, .. }, Ask::Embed(_)) => provider.has_embeddings(),
            (Target::Provider { .. }, _) => false,
        };
        let able: Vec<&Deployment> = model.deployments.iter().filter(is_able).collect();
        if able.is_empty() {
            return Err(ResolveError::NotAtProviders { model: model.name.clone() });
        }
        let now = self.begun.elapsed();
        let fit: Vec<&Deployment> =
            able.iter().copied().filter(|link| !link.cooldown.lock().is_cooling(now)).collect();
        Ok(if fit.is_empty() { able } else { fit })
    }

    async fn run(&self, model: &Model, flow: Flow<Admitted>) -> Result<Reply, Fault> {
        let chain = self.chain(model, &flow.stage.ask)?;
        let trace = flow.origin.trace.clone();
        let deadline = Instant::now() + self.config.attempts_deadline.get();
        let mut flow = Some(flow);
        let mut attempts = 0u32;
        let mut position = 0;
        let mut retries = 0;
        loop {
            let link = chain[position];
            let is_last_link = position + 1 == chain.len();
            let may_retry = retries < model.retries && matches!(link.target, Target::Provider { .. });
            // The last attempt takes the request itself; the prompt is copied only while another may follow.
            let this = if is_last_link && !may_retry { flow.take() } else { flow.clone() }
                .expect("taken by the last attempt only");
            attempts += 1;
            let begun = std::time::Instant::now();
            let (fault, tried) = match self.attempt(model, link, is_last_link, this).await {
                Ok(mut reply) => {
                    link.cooldown.lock().on_success();
                    self.count(model, link, "ok");
                    trace.note(Layer::Proxy, "deployment", begun, format!("{} answers", link.label()));
                    reply.headers.insert(X_FOREBAY_DEPLOYMENT, link.label.clone());
                    reply.headers.insert(X_FOREBAY_ATTEMPTS, HeaderValue::from(attempts));
                    return Ok(reply);
                }
                Err(failed) => failed,
            };
            self.on_fault(model, link, &fault, tried);
            // The code and not the words: those may quote the prompt.
            let why = format!("{} failed: {:?}", link.label(), fault.class.code);
            trace.note(Layer::Proxy, "deployment", begun, why);

            let now = Instant::now();
            let wait = match verdict(&fault, tried) {
                Verdict::Stop => return Err(fault),
                Verdict::Again { not_before } if may_retry => Some(self.backoff(retries).max(not_before)),
                Verdict::Again { .. } | Verdict::Next => None,
            };
            // A retry that would come too late gives way to the next link.
            let wait = wait.filter(|wait| now + *wait < deadline);
            if now >= deadline || (wait.is_none() && is_last_link) {
                return Err(fault);
            }
            match wait {
                Some(wait) => {
                    retries += 1;
                    self.metrics.retries.with_label_values(&[model.name.as_str(), link.label()]).inc();
                    tokio::time::sleep(wait).await;
                }
                None => {
                    position += 1;
                    retries = 0;
                    self.metrics.fallbacks.with_label_values(&[model.name.as_str()]).inc();
                }
            }
        }
    }

    async fn attempt(
        &self,
        model: &Model,
        link: &Deployment,
        is_last_link: bool,
        flow: Flow<Admitted>,
    ) -> Result<Reply, (Fault, Tried)> {
        match &link.target {
            Target::Fleet(fleet) => {
                let fleet = fleet.clone();
                let resolved = flow.advance(|Admitted { caller, ask, ids, held }| Resolved {
                    caller,
                    ask,
                    ids,
                    held,
                    fleet,
                });
                let call = self.next.call(resolved);
                // With nobody after it, giving up early would only lose the place in the queue.
                let bound = !is_last_link || model.first_byte_is_own;
                let result = if bound {
                    let after = model.timeouts.first_byte;
                    let too_slow = || ResolveError::TooSlow { model: model.name.clone(), after };
                    tokio::time::timeout(after, call).await.unwrap_or_else(|_| Err(too_slow().into()))
                } else {
                    call.await
                };
                result.map_err(|fault| (fault, Tried::Fleet))
            }
            Target::Provider { upstream, model: name, .. } => provider(upstream, name, model, &flow)
                .await
                .map_err(|UpstreamFault { kind, fault }| (fault, Tried::Provider(kind))),
        }
    }

    fn on_fault(&self, model: &Model, link: &Deployment, fault: &Fault, tried: Tried) {
        self.count(model, link, error_row(fault.class.code).name);
        if !counts_against(fault, tried) {
            return;
        }
        let retry_after = match fault.class.retry {
            Retry::After(after) => Some(after),
            Retry::Elsewhere | Retry::Never => None,
        };
        let now = self.begun.elapsed();
        if link.cooldown.lock().on_failure(now, retry_after, &self.config.cooldown) {
            self.metrics.cooldowns.with_label_values(&[model.name.as_str(), link.label()]).inc();
            let detail = fault.detail.as_deref().unwrap_or(&fault.message);
            tracing::warn!(model = %model.name, deployment = link.label(), detail, "deployment is left out for a while");
        }
    }

    fn count(&self, model: &Model, link: &Deployment, outcome: &str) {
        self.metrics.requests.with_label_values(&[model.name.as_str(), link.label(), outcome]).inc();
    }

    fn backoff(&self, n: u32) -> Duration {
        let random = self.jitter.hash_one(self.jitter_count.fetch_add(1, Ordering::Relaxed));
        backoff(self.config.retry_backoff.get(), n, random)
    }
}

/// Sends a generation, or texts to embed, to a provider.
async fn provider(
    upstream: &Upstream,
    name: &str,
    model: &Model,
    flow: &Flow<Admitted>,
) -> Result<Reply, UpstreamFault> {
    let broken = |fault: Fault| UpstreamFault { kind: FaultKind::Broken, fault };
    let (path, body, info) = match &flow.stage.ask {
        Ask::Generate(call) => {
            let path = match call.api {
                Api::ChatCompletions => "/v1/chat/completions",
                Api::Completions => "/v1/completions",
                Api::Tokens => "/inference/v1/generate",
            };
            (path, for_upstream(call, name), CallInfo::new(call, false))
        }
        Ask::Embed(call) => ("/v1/embeddings", with_model(&call.body, name), CallInfo::of_embedding(call)),
        Ask::Render(_)
        | Ask::Tokenize(_)
        | Ask::Detokenize(_)
        | Ask::TokenizerInfo
        | Ask::ListModels
        | Ask::GetModel(_) => {
            return Err(broken(ResolveError::NotAtProviders { model: model.name.clone() }.into()));
        }
    };
    let body = body.map_err(|error| broken(ResolveError::from(error).into()))?;
    upstream.generate(&flow.origin, path, body, info, model.timeouts).await
}

impl<Next: Stage<Resolved>> Stage<Admitted> for Proxy<Next> {
    async fn call(&self, flow: Flow<Admitted>) -> Result<Reply, Fault> {
        if let Ask::ListModels = flow.stage.ask {
            return Ok(list::list(&self.models.all, &flow.stage.caller));
        }
        let begun = std::time::Instant::now();
        let model = self.resolve(&flow)?;
        if let Ask::GetModel(name) = &flow.stage.ask {
            return Ok(list::card(model, name));
        }
        let names: Vec<&str> = model.deployments.iter().map(Deployment::label).collect();
        flow.origin.trace.note(
            Layer::Proxy,
            "resolve",
            begun,
            format!("{}: {}", model.name, names.join(", ")),
        );
        self.run(model, flow).await
    }
}
