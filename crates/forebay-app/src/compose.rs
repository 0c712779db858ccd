//! The whole stack in one process, innermost first. Read bottom-up for the life of a request.
//!
//! The only file that names two layers. **Invariant:** a layer gets the one below as a value and never asks for
//! another; what two layers share (HTTP client, metrics, the prefix view) is made here and handed to both.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use forebay_config::Environment;
use forebay_engine::{Engine, EngineDeps, EngineMetrics};
use forebay_flow::{Placed, PromptEncoder, PromptIds, Stage};
use forebay_gateway::{Gateway, GatewayDeps};
use forebay_observe::Registry;
use forebay_proxy::{FleetCard, Proxy, ProxyDeps};
use forebay_router::{PrefixView, Router, RouterConfig, RouterDeps};
use forebay_types::{Fault, ModelName, ReplicaId};
use forebay_upstream::HttpClient;
use forebay_wire::Prompt;

use crate::config::Config;
use crate::error::BuildError;

/// L2 to L5 as one value: what the edge calls.
pub type Stack<E = Engine> = Gateway<Proxy<Arc<Router<E>>>>;

/// What the layers share.
pub struct Shared<'a> {
    pub client: HttpClient,
    pub registry: &'a Registry,
    pub env: &'a dyn Environment,
}

/// A composed stack with the handles that the admin API reads.
pub struct Composed<E = Engine> {
    pub stack: Arc<Stack<E>>,
    pub router: Arc<Router<E>>,
}

/// Starts the engine of this process: loads the model, blocks until it is ready.
///
/// It is made before everything else because all other layers want to know something about it: the router its KV
/// events, the proxy its context length, the gateway its tokenizer.
pub fn start_engine(
    config: &Config,
    model: &crate::model::LocalModel,
    prefix: &PrefixView,
    registry: &Registry,
) -> Result<Option<Arc<Engine>>, BuildError> {
    let Some(engine) = &config.engine else { return Ok(None) };
    let metrics = EngineMetrics::register(registry, crate::model::CONTEXT_TOKENS_MAX)?;
    let deps = EngineDeps {
        metrics: &metrics,
        // The engine tells the router's index what its cache holds, exactly and in order: no guessing, no scraping.
        kv_sink: Some(prefix.sink(&model.name, &ReplicaId::from("engine"))),
        isa: None,
    };
    Ok(Some(Arc::new(Engine::start(engine, &model.path, model.name.clone(), deps)?)))
}

/// The prefix view that [`start_engine`] and [`compose`] share.
pub fn prefix_view(config: &Config) -> PrefixView {
    let limit =
        config.router.as_ref().map_or(RouterConfig::default().prefix_blocks_max, |r| r.prefix_blocks_max);
    PrefixView::new(limit)
}

/// Puts the layers on top of each other. `engines` are by the model they serve; each comes with its context length.
pub fn compose<E: Stage<Placed>>(
    config: &Config,
    shared: &Shared<'_>,
    prefix: PrefixView,
    engines: HashMap<ModelName, (Arc<E>, u32)>,
    encoder: Arc<dyn PromptEncoder>,
) -> Result<Composed<E>, BuildError> {
    let Shared { client, registry, env } = shared;
    let lens: HashMap<ModelName, u32> =
        engines.iter().map(|(model, (_, len))| (model.clone(), *len)).collect();

    // The router sits above the engine's queue, not inside it: placement must see every replica, and a split
    // deployment replaces the engine by URLs without any other layer noticing.
    let engines = engines.into_iter().map(|(model, (engine, _))| (model, engine)).collect();
    let deps = RouterDeps { client: client.clone(), registry, prefix, env: *env };
    let router = Router::new(config.router.as_ref(), deps, engines)?;
    let router = Arc::new(router);

    // The proxy is above the router, so that one model name can fall back from our fleets to a provider.
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let fleets = router.fleets().into_iter().map(|fleet| FleetCard {
        max_model_len: lens.get(&fleet.model).copied(),
        model: fleet.model,
        created,
    });
    let deps = ProxyDeps { client: client.clone(), registry, fleets: fleets.collect() };
    let proxy = Proxy::new(config.proxy.as_ref(), *env, deps, router.clone())?;

    // The gateway is outermost: nothing below it runs for a caller who is not known or is over quota, and it alone
    // sees every reply to its end, which is where quotas are settled and the audit record is written.
    let deps = GatewayDeps { encoder, registry };
    let gateway = Gateway::new(config.gateway.as_ref(), *env, deps, proxy)?;
    Ok(Composed { stack: Arc::new(gateway), router })
}

/// The tokenizers of the engines in this process, by every name that leads to them first.
pub struct EngineTokenizers(HashMap<ModelName, Counted>);

/// How the prompts of one name are counted.
struct Counted {
    engine: Arc<Engine>,
    /// Nobody else answers under this name, so that what is too long for the engine is too long.
    alone: bool,
}

impl EngineTokenizers {
    /// A model of the proxy counts with the tokenizer of the first fleet in its chain.
    pub fn new(config: &Config, engines: &[Arc<Engine>]) -> Self {
        let find = |fleet: &str| engines.iter().find(|engine| engine.model().as_str() == fleet);
        let counted = |engine: &Arc<Engine>| Counted { engine: engine.clone(), alone: true };
        let mut by_name: HashMap<ModelName, Counted> =
            engines.iter().map(|engine| (engine.model().clone(), counted(engine))).collect();
        for model in config.proxy.iter().flat_map(|proxy| &proxy.models) {
            let fleets = || model.deployments.iter().map(|deployment| deployment.fleet.as_deref());
            if let Some(first) = fleets().flatten().next()
                && let Some(engine) = find(first)
            {
                let alone = fleets().all(|fleet| fleet == Some(first));
                by_name.insert(model.name.as_str().into(), Counted { engine: engine.clone(), alone });
            }
        }
        Self(by_name)
    }
}

impl PromptEncoder for EngineTokenizers {
    fn fits(&self, model: &ModelName, prompt: &Prompt) -> Result<(), Fault> {
        match self.0.get(model) {
            Some(Counted { engine, alone: true }) => engine.fits(prompt),
            // A provider with a longer context may be next.
            Some(_) | None => Ok(()),
        }
    }

    fn encode(&self, model: &ModelName, prompt: &Prompt) -> Result<PromptIds, Fault> {
        match self.0.get(model) {
            // The engine will not take a longer one, and then its tokens are of no use to anybody.
            Some(Counted { engine, .. }) if engine.fits(prompt).is_ok() => engine.encode(prompt),
            Some(_) | None => Ok(PromptIds::estimate(prompt)),
        }
    }
}
