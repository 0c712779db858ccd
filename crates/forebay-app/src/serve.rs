//! Roles: what a process does from start to drain.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forebay_config::Environment;
use forebay_edge::{Edge, EdgeDeps, Health, LlmStage};
use forebay_engine::{EngineConfig, EngineMetrics};
use forebay_kv::KvEvent;
use forebay_models::{Progress, Quiet};
use forebay_observe::{RecentRequests, Registry};
use forebay_router::PrefixView;
use forebay_upstream::{ClientConfig, HttpClient};
use tokio::sync::watch;

use crate::admin::{self, AdminState};
use crate::compose::{self, EngineTokenizers, Shared, Stack};
use crate::config::Config;
use crate::error::BuildError;
use crate::model::{self, ModelError};
use crate::operator::OperatorApi;
use crate::slots::Slot;

/// This program's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// A disk that hangs must not keep the process from ending: whoever stops it kills it soon after.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the program can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Bind(#[from] forebay_edge::BindError),
    #[error(transparent)]
    Unix(#[from] forebay_edge::UnixSocketError),
    #[error("address {address} is already in use; stop the other program or set `{key}`")]
    AddressInUse { address: String, key: &'static str },
    #[error("can't listen on {address}; set `{key}` to an address of this machine")]
    Listen { address: String, key: &'static str, source: std::io::Error },
    #[error("the start-up task failed")]
    Task(#[from] tokio::task::JoinError),
}

/// A stack that is ready and bound, not yet serving.
pub struct Ready {
    edge: forebay_edge::BoundEdge,
    admin: Option<(tokio::net::TcpListener, Arc<AdminState>)>,
    draining: Arc<AtomicBool>,
    stack: Arc<Stack>,
    pub summary: Summary,
}

/// What runs, and where, for the banner.
#[derive(Debug, Clone)]
pub struct Summary {
    pub listen: Vec<SocketAddr>,
    /// A Unix socket to listen on.
    pub uds: Option<PathBuf>,
    pub tls: bool,
    pub admin: Option<SocketAddr>,
    /// Layer names and one line on each, outermost first.
    pub layers: Vec<(&'static str, String)>,
    /// A model that a client can ask for.
    pub model: Option<String>,
    /// It makes vectors of texts and does not answer.
    pub embeds: bool,
    pub needs_key: bool,
}

/// Fetches the model, builds every layer and binds the ports.
pub async fn prepare(
    config: &Config,
    env: &dyn Environment,
    progress: &dyn Progress,
) -> Result<Ready, StartError> {
    let config = &config.clone().with_store_applied();
    // Before a long download: is the port free at all?
    preflight(config).await?;
    let registry = Registry::new();
    registry.add_process().map_err(BuildError::from)?;
    let client = HttpClient::new(ClientConfig::default());
    let prefix = compose::prefix_view(config);
    let slots = slots(config, env, &client, &prefix, &registry)?;
    for (engine, slot) in config.engine.iter().zip(&slots) {
        if engine.preload {
            // With the bar that people see; what the admin API loads later is fetched quietly.
            model::obtain(engine, &model::store(env)?, &client, progress).await?;
            slot.load().await?;
        }
    }
    let encoder = Arc::new(EngineTokenizers::new(config, &slots));
    let len = |slot: &Arc<Slot>| slot.engine().map(|engine| engine.model_len());
    let by_model: HashMap<_, _> =
        slots.iter().map(|slot| (slot.model().clone(), (slot.clone(), len(slot)))).collect();
    let shared = Shared { client: client.clone(), registry: &registry, env };
    let composed = compose::compose(config, &shared, prefix, by_model, encoder)?;

    let recent = RecentRequests::new(config.admin.as_ref().map_or(0, |admin| admin.recent_requests));
    let draining = Arc::new(AtomicBool::new(false));
    let ready = {
        let (draining, slots, router) = (draining.clone(), slots.clone(), composed.router.clone());
        // A process that only routes to other services has no fleet to wait for, and one whose models can fall back
        // to a provider still answers where every fleet is down.
        let providers =
            config.proxy.iter().flat_map(|proxy| &proxy.models).flat_map(|model| &model.deployments);
        let needs_fleet = !router.fleets().is_empty() && !providers.into_iter().any(|d| d.provider.is_some());
        move || -> Result<(), String> {
            if draining.load(Ordering::Relaxed) {
                return Err("draining".into());
            }
            let dead = slots.iter().find(|slot| slot.engine().is_some_and(|engine| !engine.is_alive()));
            if let Some(slot) = dead {
                return Err(format!("the engine of `{}` has stopped", slot.model()));
            }
            let stuck = slots.iter().find(|slot| slot.engine().is_some_and(|engine| engine.is_stuck()));
            if let Some(slot) = stuck {
                return Err(format!("a step of the engine of `{}` does not come back", slot.model()));
            }
            if needs_fleet && !router.ready() {
                return Err("no replica is up".into());
            }
            Ok(())
        }
    };
    let edge_config = config.edge.clone().unwrap_or_default();
    let health = {
        let ready = ready.clone();
        move || match ready() {
            Ok(()) => Health::ready(),
            Err(why) => Health::not_ready(why),
        }
    };
    let operator = Arc::new(OperatorApi::new(slots.clone()));
    let deps = EdgeDeps {
        operator: Some(operator.clone()),
        llm: Some(LlmStage::new(composed.stack.clone())),
        client,
        registry: registry.clone(),
        recent: recent.clone(),
        version: VERSION.to_owned(),
        health: Arc::new(health),
    };
    let edge = Edge::bind(&edge_config, env, deps).await?;

    let admin = match &config.admin {
        None => None,
        Some(admin) => {
            let listener = listen(&admin.listen.to_string(), "admin.listen").await?;
            let router = composed.router.clone();
            let state = AdminState {
                registry,
                recent,
                version: VERSION,
                ready: Box::new(ready),
                fleets: Box::new(move || serde_json::json!({"fleets": router.fleets()})),
                slots: slots.clone(),
                operator,
                in_flight: Box::new(edge.llm_in_flight()),
            };
            Some((listener, Arc::new(state)))
        }
    };
    let model = first_model(config, &slots);
    let summary = Summary {
        listen: edge.local_addrs().to_vec(),
        uds: edge_config.uds.clone(),
        tls: edge_config.tls.is_some(),
        admin: admin.as_ref().and_then(|(listener, _)| listener.local_addr().ok()),
        layers: layers(config, &slots),
        embeds: model.as_deref().is_some_and(|model| embeds(config, &slots, model)),
        model,
        needs_key: config.gateway.is_some() || !edge_config.access_keys.is_empty(),
    };
    Ok(Ready { edge, admin, draining, stack: composed.stack, summary })
}

impl Ready {
    /// Serves until `shutdown` is ready, then drains: streams in flight finish, new connections are refused.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) -> forebay_edge::DrainReport {
        let (stop, stopped) = watch::channel(false);
        let admin = self.admin.map(|(listener, state)| tokio::spawn(admin::serve(listener, state, stopped)));
        let draining = self.draining;
        let report = self
            .edge
            .run(async move {
                shutdown.await;
                draining.store(true, Ordering::Relaxed);
            })
            .await;
        // The records of the last requests are on disk before the process says that it has stopped.
        if tokio::time::timeout(FLUSH_TIMEOUT, self.stack.flush_audit()).await.is_err() {
            tracing::error!(
                "the audit log could not be written within {} s; its last records are lost",
                FLUSH_TIMEOUT.as_secs()
            );
        }
        // The admin listener outlives the drain, so that /ready says `draining` and the last scrape is complete.
        let _ = stop.send(true);
        if let Some(admin) = admin {
            let _ = admin.await;
        }
        report
    }
}

/// A place for every configured model, all empty.
fn slots(
    config: &Config,
    env: &dyn Environment,
    client: &HttpClient,
    prefix: &PrefixView,
    registry: &Registry,
) -> Result<Vec<Arc<Slot>>, StartError> {
    if config.engine.is_empty() {
        return Ok(Vec::new());
    }
    let store = Arc::new(model::store(env)?);
    let metrics = Arc::new(EngineMetrics::register(registry).map_err(BuildError::from)?);
    if config.engine.iter().any(|engine| engine.show_hidden_metrics) {
        EngineMetrics::show_former_names(registry);
    }
    let slot = |(nth, engine): (usize, &EngineConfig)| {
        let name = model::name(engine).map_err(ModelError::from)?;
        let forget = {
            let sink = compose::engine_sink(prefix, &name);
            Box::new(move || sink(&[KvEvent::Cleared]))
        };
        let (engine, at) = (engine.clone(), config.engine_at(nth));
        let (store, client, prefix, metrics) =
            (store.clone(), client.clone(), prefix.clone(), metrics.clone());
        let loads = metrics.loads().clone();
        let loader = move || {
            let (engine, at) = (engine.clone(), at.clone());
            let (store, client) = (store.clone(), client.clone());
            let (prefix, metrics) = (prefix.clone(), metrics.clone());
            let load = async move {
                let local = model::obtain(&engine, &store, &client, &Quiet).await?;
                // Off the I/O threads, and with the runtime around it that publishing KV events needs.
                let runtime = tokio::runtime::Handle::current();
                let start = move || {
                    let _entered = runtime.enter();
                    compose::start_engine(&engine, &at, &local, &prefix, &metrics)
                };
                Ok(tokio::task::spawn_blocking(start).await??)
            };
            Box::pin(load) as std::pin::Pin<Box<dyn Future<Output = _> + Send>>
        };
        Ok(Arc::new(Slot::new(name, Box::new(loader), forget, loads)))
    };
    config.engine.iter().enumerate().map(slot).collect()
}

async fn preflight(config: &Config) -> Result<(), StartError> {
    if let Some(edge) = &config.edge {
        if let Some(problem) = edge.problems().into_iter().next() {
            return Err(forebay_edge::BindError::from(problem).into());
        }
        for address in edge.listen.iter() {
            listen(&address.to_string(), "edge.listen").await?;
        }
        if let Some(path) = &edge.uds {
            forebay_edge::check_unix_socket(path).await?;
        }
    }
    if let Some(admin) = &config.admin {
        listen(&admin.listen.to_string(), "admin.listen").await?;
    }
    Ok(())
}

async fn listen(address: &str, key: &'static str) -> Result<tokio::net::TcpListener, StartError> {
    tokio::net::TcpListener::bind(address).await.map_err(|source| match source.kind() {
        std::io::ErrorKind::AddrInUse => StartError::AddressInUse { address: address.to_owned(), key },
        _ => StartError::Listen { address: address.to_owned(), key, source },
    })
}

fn first_model(config: &Config, slots: &[Arc<Slot>]) -> Option<String> {
    let named = config.proxy.as_ref().and_then(|proxy| proxy.models.first()).map(|model| model.name.clone());
    let fleet =
        || config.router.as_ref().and_then(|router| router.fleets.first()).map(|fleet| fleet.model.clone());
    let loaded = || slots.iter().find(|slot| slot.engine().is_some()).or(slots.first());
    named.or_else(|| loaded().map(|slot| slot.model().to_string())).or_else(fleet)
}

/// Whether what answers under a name is an encoder of this process, as far as it is loaded.
fn embeds(config: &Config, slots: &[Arc<Slot>], model: &str) -> bool {
    let listed = config.proxy.iter().flat_map(|proxy| &proxy.models).find(|listed| listed.name == model);
    let fleet = listed.and_then(|model| model.deployments.first()?.fleet.as_deref());
    let slot = slots.iter().find(|slot| slot.model().as_str() == fleet.unwrap_or(model));
    slot.and_then(|slot| slot.engine()).is_some_and(|engine| engine.generating().is_none())
}

/// A layer in a line; an engine for each of its models.
fn layers(config: &Config, slots: &[Arc<Slot>]) -> Vec<(&'static str, String)> {
    let mut layers = Vec::new();
    for layer in crate::check::explain(config).into_iter().filter(|layer| layer.runs) {
        if layer.section != "engine" {
            layers.push((layer.section, layer.does));
            continue;
        }
        for slot in slots {
            let status = slot.status();
            let does = status.summary.unwrap_or_else(|| "not loaded; the admin API loads it".to_owned());
            layers.push((layer.section, format!("{}: {does}", status.model)));
        }
    }
    layers
}
