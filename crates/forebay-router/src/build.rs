//! From configuration to a router.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use forebay_config::{Environment, SecretError, SecretValue};
use forebay_observe::{MetricError, Registry};
use forebay_types::{ModelName, ReplicaId};
use forebay_upstream::{BaseUrlError, HttpClient, Upstream};
use http::HeaderValue;
use tokio::time::Instant;

use crate::config::{FleetConfig, ReplicaTarget, RouterConfig};
use crate::fleet::{At, Fleet, Replica};
use crate::kv_events::{EventsView, KvSourceError, Subscription};
use crate::lengths::Lengths;
use crate::live::Live;
use crate::metrics::Metrics;
use crate::prefix::PrefixView;
use crate::watch::{Watched, Watches};

/// Replicas over all fleets: a limit on probing tasks, and far below what the prefix index can number.
const REPLICAS_MAX: usize = 1024;

/// What the router works with.
pub struct RouterDeps<'a> {
    pub client: HttpClient,
    pub registry: &'a Registry,
    /// The view whose sinks the engines of this process were started with.
    pub prefix: PrefixView,
    pub env: &'a dyn Environment,
}

/// Why a router can't be built. [`RouterBuildError::at`] says where in the file.
#[derive(Debug, thiserror::Error)]
pub enum RouterBuildError {
    #[error("two fleets serve `{model}`; list all replicas in one")]
    FleetTwice { at: String, model: ModelName },
    #[error("the fleet `{model}` has no replicas; `engine` is the one in this process")]
    NoReplicas { at: String, model: ModelName },
    #[error("`{replica}` is listed twice")]
    ReplicaTwice { at: String, replica: ReplicaId },
    #[error(
        "no engine in this process serves `{model}` (there {}); set `engine.model`, or name a URL",
        list(engines)
    )]
    NoEngine { at: String, model: ModelName, engines: Vec<ModelName> },
    #[error(
        "there is neither an engine in this process nor a fleet; add an `engine` section or `router.fleets`"
    )]
    Nothing,
    #[error("more than {REPLICAS_MAX} replicas")]
    TooManyReplicas,
    #[error("the replica's URL can't be used")]
    Url { at: String, source: BaseUrlError },
    #[error("the fleet's key can't be read")]
    Secret { at: String, source: SecretError },
    #[error("KV events can't be had so")]
    KvSource { at: String, source: KvSourceError },
    #[error("the router's metrics can't be registered")]
    Metrics(#[from] MetricError),
    #[error("HTTP replicas are probed by tasks, and there is no tokio runtime here")]
    NoRuntime,
}

fn list(engines: &[ModelName]) -> String {
    match engines {
        [] => "is none".to_owned(),
        _ => {
            let names: Vec<String> = engines.iter().map(|model| format!("`{model}`")).collect();
            format!("is {}", names.join(", "))
        }
    }
}

impl RouterBuildError {
    /// Path in the configuration (`router.fleets[0].replicas[1]`), where the mistake is in one place.
    pub fn at(&self) -> Option<&str> {
        match self {
            Self::FleetTwice { at, .. }
            | Self::NoReplicas { at, .. }
            | Self::ReplicaTwice { at, .. }
            | Self::NoEngine { at, .. }
            | Self::Url { at, .. }
            | Self::Secret { at, .. }
            | Self::KvSource { at, .. } => Some(at),
            Self::Nothing | Self::TooManyReplicas | Self::Metrics(_) | Self::NoRuntime => None,
        }
    }
}

pub(crate) struct Built<E> {
    pub(crate) fleets: HashMap<ModelName, Fleet<E>>,
    pub(crate) watches: Watches,
    pub(crate) metrics: Metrics,
}

/// `configured` is false where the defaults stand in for a missing section: then no fleet at all is right, for a
/// proxy that only knows providers.
pub(crate) fn build<E>(
    config: &RouterConfig,
    configured: bool,
    deps: &RouterDeps<'_>,
    mut engines: HashMap<ModelName, Arc<E>>,
    begun: Instant,
) -> Result<Built<E>, RouterBuildError> {
    let metrics = Metrics::register(deps.registry)?;
    let listed: Vec<FleetConfig> =
        if config.fleets.is_empty() { one_per_engine(&engines) } else { config.fleets.clone() };
    if listed.is_empty() && configured {
        return Err(RouterBuildError::Nothing);
    }
    if listed.iter().map(|fleet| fleet.replicas.len()).sum::<usize>() > REPLICAS_MAX {
        return Err(RouterBuildError::TooManyReplicas);
    }
    let mut known: Vec<ModelName> = engines.keys().cloned().collect();
    known.sort();

    let mut fleets = HashMap::new();
    let mut watches = Watches::default();
    for (n, fleet) in listed.iter().enumerate() {
        let at = format!("router.fleets[{n}]");
        let model = ModelName::from(fleet.model.as_str());
        if fleets.contains_key(&model) {
            return Err(RouterBuildError::FleetTwice { at: format!("{at}.model"), model });
        }
        if fleet.replicas.is_empty() {
            return Err(RouterBuildError::NoReplicas { at: format!("{at}.replicas"), model });
        }
        let key: Option<SecretValue> = fleet
            .api_key
            .as_ref()
            .map(|key| key.resolve(deps.env))
            .transpose()
            .map_err(|source| RouterBuildError::Secret { at: format!("{at}.api-key"), source })?;
        if let Some((below, source)) = fleet.kv_events.as_ref().and_then(|events| events.problem(fleet)) {
            return Err(RouterBuildError::KvSource { at: format!("{at}.kv-events.{below}"), source });
        }
        let prefixes = deps.prefix.model(&model);
        let mut replicas = Vec::with_capacity(fleet.replicas.len());
        let mut seen = HashSet::new();
        for (m, target) in fleet.replicas.iter().enumerate() {
            let at = format!("{at}.replicas[{m}]");
            let id = ReplicaId::from(String::from(target.clone()));
            if !seen.insert(id.clone()) {
                return Err(RouterBuildError::ReplicaTwice { at, replica: id });
            }
            let lane = prefixes.lane(&id);
            let live = Live::new(metrics.replica(model.as_str(), id.as_str()), begun);
            let mut events = None;
            let (place, label) = match target {
                ReplicaTarget::Engine => {
                    let Some(engine) = engines.remove(&model) else {
                        return Err(RouterBuildError::NoEngine { at, model, engines: known });
                    };
                    (At::Engine(engine), HeaderValue::from_static("engine"))
                }
                ReplicaTarget::Http(url) => {
                    let key = key.as_ref().map(SecretValue::expose);
                    let upstream = Upstream::new(deps.client.clone(), url, key)
                        .map_err(|source| RouterBuildError::Url { at, source })?;
                    let runtime =
                        tokio::runtime::Handle::try_current().map_err(|_| RouterBuildError::NoRuntime)?;
                    if let Some(source) = fleet.kv_events.as_ref().and_then(|events| events.source(url)) {
                        let view = Arc::new(EventsView::default());
                        events = Some(Arc::clone(&view));
                        let subscription = Subscription {
                            model: model.clone(),
                            replica: id.clone(),
                            source,
                            prefixes: Arc::clone(&prefixes),
                            lane,
                            blocks_max: config.prefix_blocks_max,
                            view,
                            live: Arc::clone(&live),
                            metrics: metrics.kv_events(model.as_str(), id.as_str()),
                        };
                        watches.follow(&runtime, subscription);
                    }
                    let watched = Watched {
                        events: events.clone(),
                        model: model.clone(),
                        id: id.clone(),
                        live: Arc::clone(&live),
                        prefixes: Arc::clone(&prefixes),
                        lane,
                    };
                    watches.add(&runtime, upstream.clone(), watched, config.health.clone());
                    let label = HeaderValue::try_from(format!("replica-{}", m + 1))
                        .expect("letters and digits are a header value");
                    (At::Http(upstream), label)
                }
            };
            replicas.push(Replica { id, label, at: place, lane, live, events });
        }
        let served_name = fleet.served_name.clone().unwrap_or_else(|| fleet.model.clone());
        let lengths = Arc::new(Lengths::new());
        fleets.insert(model.clone(), Fleet { model, served_name, replicas, prefixes, lengths });
    }
    for model in engines.keys() {
        tracing::warn!(%model, "an engine runs in this process, but no fleet lists it as `engine`");
    }
    Ok(Built { fleets, watches, metrics })
}

fn one_per_engine<E>(engines: &HashMap<ModelName, Arc<E>>) -> Vec<FleetConfig> {
    let fleet = |model: &ModelName| FleetConfig {
        model: model.as_str().to_owned(),
        replicas: vec![ReplicaTarget::Engine],
        served_name: None,
        api_key: None,
        kv_events: None,
    };
    engines.keys().map(fleet).collect()
}
