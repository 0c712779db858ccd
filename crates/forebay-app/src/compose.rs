//! The whole stack in one process, innermost first. Read bottom-up for the life of a request.
//!
//! This file alone puts layers on top of each other; `operator.rs` is the adapter from the edge's operator paths to
//! engines. **Invariant:** a layer gets the one below as a value and never asks for another; what two layers share (HTTP
//! client, metrics, the prefix view) is made here and handed to both.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use forebay_config::Environment;
use forebay_engine::{EngineConfig, EngineDeps, EngineMetrics, KvSink, ModelEngine};
use forebay_flow::{Placed, PromptEncoder, PromptIds, Stage};
use forebay_gateway::{Gateway, GatewayDeps};
use forebay_observe::Registry;
use forebay_proxy::{FleetCard, Proxy, ProxyDeps};
use forebay_router::{PrefixView, Router, RouterConfig, RouterDeps};
use forebay_types::{Fault, ModelName, ReplicaId};
use forebay_upstream::HttpClient;
use forebay_wire::{Embed, Generate, Prompt};

use crate::config::Config;
use crate::error::BuildError;
use crate::model::{self, LocalModel};
use crate::slots::Slot;

/// L2 to L5 as one value: what the edge calls.
pub type Stack<E = Slot> = Gateway<Proxy<Arc<Router<E>>>>;

/// What the layers share.
pub struct Shared<'a> {
    pub client: HttpClient,
    pub registry: &'a Registry,
    pub env: &'a dyn Environment,
}

/// A composed stack with the handles that the admin API reads.
pub struct Composed<E = Slot> {
    pub stack: Arc<Stack<E>>,
    pub router: Arc<Router<E>>,
}

/// Starts one engine of this process: loads the model, blocks until it is ready. `at` is its section.
pub fn start_engine(
    config: &EngineConfig,
    at: &str,
    model: &LocalModel,
    prefix: &PrefixView,
    metrics: &EngineMetrics,
) -> Result<ModelEngine, BuildError> {
    let deps = EngineDeps {
        metrics,
        // The engine tells the router's index what its cache holds, exactly and in order: no guessing, no scraping.
        kv_sink: Some(engine_sink(prefix, &model.name)),
        isa: None,
    };
    ModelEngine::start(config, &model.path, model.name.clone(), deps)
        .map_err(|source| BuildError::Engine { at: at.to_owned(), source })
}

/// Where the engine that serves `model` tells what it has cached.
pub fn engine_sink(prefix: &PrefixView, model: &ModelName) -> KvSink {
    prefix.sink(model, &ReplicaId::from("engine"))
}

/// The prefix view that [`start_engine`] and [`compose`] share.
pub fn prefix_view(config: &Config) -> PrefixView {
    let limit =
        config.router.as_ref().map_or(RouterConfig::default().prefix_blocks_max, |r| r.prefix_blocks_max);
    PrefixView::new(limit)
}

/// Puts the layers on top of each other. `engines` are by the model they serve; each comes with its context length,
/// where it is known.
pub fn compose<E: Stage<Placed>>(
    config: &Config,
    shared: &Shared<'_>,
    prefix: PrefixView,
    engines: HashMap<ModelName, (Arc<E>, Option<u32>)>,
    encoder: Arc<dyn PromptEncoder>,
) -> Result<Composed<E>, BuildError> {
    let Shared { client, registry, env } = shared;
    let lens: HashMap<ModelName, u32> =
        engines.iter().filter_map(|(model, (_, len))| Some((model.clone(), (*len)?))).collect();

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
        aliases: aliases(config, &fleet.model),
        model: fleet.model,
        created,
    });
    let deps = ProxyDeps { client: client.clone(), registry, fleets: fleets.collect() };
    let proxy = Proxy::new(config.proxy.as_ref(), *env, deps, router.clone())?;

    // The gateway is outermost: nothing below it runs for a caller who is not known or is over quota, and it alone
    // sees every reply to its end, which is where quotas are settled and the audit record is written.
    // It counts a prompt's tokens before the proxy sees the request, so it has to know which model is meant by none.
    let only_model = proxy.only_model().cloned().collect();
    // A port with the operator's paths is one that only routers and operators reach.
    let callers_are_routers =
        config.edge.as_ref().is_some_and(|edge| edge.operator_api == forebay_edge::Switch::On);
    let deps = GatewayDeps { encoder, registry, only_model, callers_are_routers };
    let gateway = Gateway::new(config.gateway.as_ref(), *env, deps, proxy)?;
    Ok(Composed { stack: Arc::new(gateway), router })
}

/// Further names of the engine here that serves `model`.
fn aliases(config: &Config, model: &ModelName) -> Vec<ModelName> {
    let is_it = |engine: &&EngineConfig| model::name(engine).is_ok_and(|name| name == *model);
    config.engine.iter().filter(is_it).flat_map(EngineConfig::aliases).collect()
}

/// The tokenizers of the engines in this process, by every name that leads to them first. A model that is not loaded
/// is counted by its bytes.
pub struct EngineTokenizers(HashMap<ModelName, Counted>);

/// How the prompts of one name are counted.
struct Counted {
    slot: Arc<Slot>,
    /// Nobody else answers under this name, so that what is too long for the engine is too long.
    alone: bool,
}

impl EngineTokenizers {
    /// A model of the proxy counts with the tokenizer of the first fleet in its chain.
    pub fn new(config: &Config, slots: &[Arc<Slot>]) -> Self {
        let find = |fleet: &str| slots.iter().find(|slot| slot.model().as_str() == fleet);
        let counted = |slot: &Arc<Slot>| Counted { slot: slot.clone(), alone: true };
        let mut by_name: HashMap<ModelName, Counted> = HashMap::new();
        for (engine, slot) in config.engine.iter().zip(slots) {
            by_name.extend(engine.aliases().map(|alias| (alias, counted(slot))));
        }
        by_name.extend(slots.iter().map(|slot| (slot.model().clone(), counted(slot))));
        for model in config.proxy.iter().flat_map(|proxy| &proxy.models) {
            let fleets = || model.deployments.iter().map(|deployment| deployment.fleet.as_deref());
            if let Some(first) = fleets().flatten().next()
                && let Some(slot) = find(first)
            {
                let alone = fleets().all(|fleet| fleet == Some(first));
                by_name.insert(model.name.as_str().into(), Counted { slot: slot.clone(), alone });
            }
        }
        Self(by_name)
    }

    fn engine(&self, model: &ModelName) -> Option<(Arc<ModelEngine>, bool)> {
        let counted = self.0.get(model)?;
        Some((counted.slot.engine()?, counted.alone))
    }
}

impl PromptEncoder for EngineTokenizers {
    fn fits(&self, model: &ModelName, prompt: &Prompt) -> Result<(), Fault> {
        match self.engine(model) {
            Some((engine, true)) => engine.fits(prompt),
            // A provider with a longer context may be next.
            Some((_, false)) | None => Ok(()),
        }
    }

    fn encode(&self, call: &Generate) -> Result<PromptIds, Fault> {
        match self.engine(&call.model) {
            // The engine will not take a longer one, and then its tokens are of no use to anybody.
            Some((engine, _)) if engine.fits(&call.prompt).is_ok() => engine.encode(call),
            Some(_) | None => Ok(PromptIds::estimate(&call.prompt)),
        }
    }

    fn encode_inputs(&self, call: &Embed) -> Result<PromptIds, Fault> {
        match self.engine(&call.model) {
            Some((engine, _)) if engine.fits(&call.input).is_ok() => engine.encode_inputs(call),
            Some(_) | None => Ok(PromptIds::estimate(&call.input)),
        }
    }
}
