//! `forebay check`: is the file right, what does each layer do, and what would break without it.
//!
//! Builds every layer but the engine from the file, without binding a port, loading a model, writing a file or
//! sending a request: a mistake that `serve` would find is found here.

use std::collections::HashMap;
use std::sync::Arc;

use forebay_config::{Diagnostic, Environment, Loaded, Source};
use forebay_engine::ModelEngine;
use forebay_flow::{Flow, Placed, PromptEncoder, PromptIds, Reply, Stage};
use forebay_models::ModelRef;
use forebay_observe::Registry;
use forebay_router::ReplicaTarget;
use forebay_types::{Fault, ModelName};
use forebay_upstream::{ClientConfig, HttpClient};
use forebay_wire::{Generate, Prompt};

use crate::compose::{self, Shared};
use crate::config::Config;

/// What was found.
pub struct Report {
    /// Errors and warnings, to be shown with the file's lines.
    pub diagnostics: forebay_config::Diagnostics,
    /// One entry per layer, outermost first; empty where the file can't be read as a configuration.
    pub layers: Vec<LayerReport>,
}

/// One layer, as the file has it.
#[derive(Debug, Clone, serde::Serialize)]
pub struct LayerReport {
    pub section: &'static str,
    pub runs: bool,
    /// What it does with this file.
    pub does: String,
    /// What would break if the section were removed; what is missing where it is not there.
    pub without_it: &'static str,
}

/// Checks a file. Blocking; needs no runtime around it.
pub fn check(source: &Source, env: &dyn Environment) -> Report {
    let loaded = match forebay_config::load::<Config>(source) {
        Ok(loaded) => loaded,
        Err(diagnostics) => return Report { diagnostics, layers: Vec::new() },
    };
    let mut found = problems(&loaded, env);
    found.extend(warnings(&loaded));
    Report { diagnostics: loaded.diagnostics(found), layers: explain(&loaded.config) }
}

/// What works, but is hardly meant so.
pub fn warnings(loaded: &Loaded<Config>) -> Vec<Diagnostic> {
    let mut found = loaded.plain_secret_warnings();
    let config = &loaded.config;
    let fleets = config.router.iter().flat_map(|router| &router.fleets);
    let mut listed = fleets.flat_map(|fleet| &fleet.replicas).peekable();
    if !config.engine.is_empty() && listed.peek().is_some() && !listed.any(|at| *at == ReplicaTarget::Engine)
    {
        found.push(
            loaded
                .warning_at("engine", "no fleet uses this engine: it is loaded and never asked")
                .help("add `engine` to the replicas of its fleet in `router.fleets`, or remove the section"),
        );
    }
    if config.proxy.as_ref().is_some_and(|proxy| !proxy.models.is_empty()) {
        let engines = config.engine.iter().enumerate();
        for (nth, _) in engines.filter(|(_, engine)| engine.aliases().next().is_some()) {
            let at = format!("{}.served-model-name", config.engine_at(nth));
            found.push(
                loaded
                    .warning_at(
                        &at,
                        "clients can't ask by the further names: `proxy.models` lists all names there are",
                    )
                    .help("add a model for each to `proxy.models`, or leave them out"),
            );
        }
    }
    found
}

/// Everything that is wrong with a well-formed file.
pub fn problems(loaded: &Loaded<Config>, env: &dyn Environment) -> Vec<Diagnostic> {
    let config = &loaded.config;
    let mut found = Vec::new();
    match &config.edge {
        Some(edge) => {
            for problem in edge.problems() {
                found.push(loaded.error_at(&format!("edge.{}", problem.key), problem.problem.clone()));
            }
            found.extend(edge_files(loaded, edge, env));
        }
        None => found.push(
            Diagnostic::error("nothing would listen: there is no `edge` section")
                .help("add `edge: {listen: 127.0.0.1:8080}`"),
        ),
    }
    if config.engine.is_empty() && config.router.is_none() && config.proxy.is_none() {
        let llm = config
            .edge
            .as_ref()
            .is_none_or(|edge| edge.routes.is_empty() || edge.routes.iter().any(|r| r.to == "llm"));
        if llm {
            found.push(
                Diagnostic::error("nothing would answer: there is neither `engine`, `router` nor `proxy`")
                    .help("add `engine: {model: smollm2-135m-instruct}`, or route to other services only"),
            );
        }
    }
    let mut engines: Vec<ModelName> = Vec::new();
    let mut taken: Vec<ModelName> = Vec::new();
    for (nth, engine) in config.engine.iter().enumerate() {
        let at = config.engine_at(nth);
        let (name, problems) = engine_model(loaded, &at, engine);
        found.extend(problems);
        let Some(name) = name else { continue };
        for name in std::iter::once(name.clone()).chain(engine.aliases()) {
            if taken.contains(&name) {
                let twice = loaded.error_at(&format!("{at}.model"), format!("two engines serve `{name}`"));
                found.push(twice.help("give one of them another `served-model-name`"));
            }
            taken.push(name);
        }
        engines.push(name);
    }
    if let (Some(edge), Some(admin)) = (&config.edge, &config.admin)
        && admin.listen.port() != 0
        && edge.listen.iter().any(|address| *address == admin.listen)
    {
        let message = format!("`edge.listen` has the address {} too", admin.listen);
        found
            .push(loaded.error_at("admin.listen", message).help("give the admin listener a port of its own"));
    }
    for secret in loaded.secret_problems(env) {
        // The edge has said it of its own already.
        if found.iter().all(|other| other.path() != secret.path()) {
            found.push(secret);
        }
    }
    if !found.is_empty() {
        // Later layers would only repeat what is wrong already.
        return found;
    }
    for (nth, engine) in config.engine.iter().enumerate() {
        found.extend(engine_file(loaded, config.engine_at(nth), engine, env));
    }
    if !found.is_empty() {
        return found;
    }
    if let Err(error) = dry_compose(config, engines, env) {
        found.push(error.diagnostic(loaded));
    }
    found
}

/// What the engine's model will be called, and what is wrong with the section.
fn engine_model(
    loaded: &Loaded<Config>,
    at: &str,
    engine: &forebay_engine::EngineConfig,
) -> (Option<ModelName>, Vec<Diagnostic>) {
    let problems = engine.problems().into_iter();
    let mut found: Vec<_> =
        problems.map(|wrong| loaded.error_at(&format!("{at}.{}", wrong.key), wrong.problem)).collect();
    match ModelRef::parse(&engine.model) {
        Ok(reference) => {
            if let ModelRef::Path(path) = &reference
                && !path.exists()
            {
                let message = format!("there is no model file or directory at {}", path.display());
                found.push(loaded.error_at(&format!("{at}.model"), message));
            }
            let name = engine.served_name().map_or_else(|| reference.default_name(), str::to_owned);
            (Some(name.into()), found)
        }
        Err(error) => {
            found.push(loaded.error_at(&format!("{at}.model"), error.to_string()));
            (None, found)
        }
    }
}

/// What the model's file says to the configuration, where the file is on this machine already.
fn engine_file(
    loaded: &Loaded<Config>,
    at: String,
    engine: &forebay_engine::EngineConfig,
    env: &dyn Environment,
) -> Option<Diagnostic> {
    let path = match ModelRef::parse(&engine.model).ok()? {
        ModelRef::Path(path) => path,
        reference => crate::model::store(env).ok()?.cached(&reference)?,
    };
    let source = ModelEngine::inspect(engine, &path).err()?;
    let error = crate::error::BuildError::Engine { at, source };
    Some(error.diagnostic(loaded))
}

/// The files that TLS needs.
fn edge_files(
    loaded: &Loaded<Config>,
    edge: &forebay_edge::EdgeConfig,
    env: &dyn Environment,
) -> Vec<Diagnostic> {
    let Some(tls) = &edge.tls else { return Vec::new() };
    let problems = tls.problems(env).into_iter();
    problems.map(|wrong| loaded.error_at(&format!("edge.{}", wrong.key), wrong.problem)).collect()
}

/// Stands where the engine will be.
struct NotLoaded;

impl Stage<Placed> for NotLoaded {
    async fn call(&self, _: Flow<Placed>) -> Result<Reply, Fault> {
        Err(Fault::internal("a checked configuration serves nothing"))
    }
}

impl PromptEncoder for NotLoaded {
    fn fits(&self, _: &ModelName, _: &Prompt) -> Result<(), Fault> {
        Ok(())
    }

    fn encode(&self, call: &Generate) -> Result<PromptIds, Fault> {
        Ok(PromptIds::estimate(&call.prompt))
    }
}

fn dry_compose(
    config: &Config,
    engines: Vec<ModelName>,
    env: &dyn Environment,
) -> Result<(), crate::error::BuildError> {
    // Health probes are tasks: they are spawned into a runtime that never runs, so nothing is sent.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|_| crate::error::BuildError::Router(forebay_router::RouterBuildError::NoRuntime))?;
    let _entered = runtime.enter();
    let registry = Registry::new();
    let shared = Shared { client: HttpClient::new(ClientConfig::default()), registry: &registry, env };
    let mut config = config.clone();
    if let Some(gateway) = &mut config.gateway {
        // Opening the audit log would create it.
        gateway.audit = None;
    }
    let engines: HashMap<_, _> =
        engines.into_iter().map(|model| (model, (Arc::new(NotLoaded), None))).collect();
    let prefix = compose::prefix_view(&config);
    compose::compose(&config, &shared, prefix, engines, Arc::new(NotLoaded)).map(|_| ())
}

pub(crate) fn explain(config: &Config) -> Vec<LayerReport> {
    let layer = |section, does: Option<String>, otherwise: &str, without_it| LayerReport {
        section,
        runs: does.is_some(),
        does: does.unwrap_or_else(|| otherwise.to_owned()),
        without_it,
    };
    let edge = config.edge.as_ref().map(|edge| {
        let socket = edge.uds.iter().map(|path| format!("unix:{}", path.display()));
        let listen: Vec<String> = edge.listen.iter().map(ToString::to_string).chain(socket).collect();
        let scheme = if edge.tls.is_some() { "https" } else { "http" };
        let routes = match edge.routes.len() {
            0 => "every path to the LLM stack".to_owned(),
            n => format!("{n} routes"),
        };
        format!("listens on {} ({scheme}), {routes}", listen.join(", "))
    });
    let gateway = config.gateway.as_ref().map(|gateway| {
        let audit =
            if gateway.audit.is_some() { "with an audit record per request" } else { "without an audit log" };
        let consumers = gateway.consumers.len();
        format!("{consumers} consumer{}, {audit}", if consumers == 1 { "" } else { "s" })
    });
    let proxy = config.proxy.as_ref().map(|proxy| match proxy.models.as_slice() {
        [] => "each fleet is a model under its own name".to_owned(),
        models => models
            .iter()
            .map(|model| {
                let chain: Vec<String> = model
                    .deployments
                    .iter()
                    .map(|d| match (&d.fleet, &d.provider) {
                        (Some(fleet), _) => format!("fleet {fleet}"),
                        (None, Some(provider)) => {
                            format!("{} {}", provider.as_str(), d.model.as_deref().unwrap_or("?"))
                        }
                        (None, None) => "?".to_owned(),
                    })
                    .collect();
                format!("{}: {}", model.name, chain.join(", then "))
            })
            .collect::<Vec<_>>()
            .join("; "),
    });
    let router = config.router.as_ref().map(|router| match router.fleets.as_slice() {
        [] => "one fleet: the engine in this process".to_owned(),
        fleets => fleets
            .iter()
            .map(|fleet| {
                let replicas: Vec<String> = fleet.replicas.iter().cloned().map(String::from).collect();
                format!("{} on {}", fleet.model, replicas.join(", "))
            })
            .collect::<Vec<_>>()
            .join("; "),
    });
    let engines: Vec<String> = config
        .engine
        .iter()
        .map(|engine| match engine.kv_cache_memory {
            Some(memory) => format!("serves {} with a KV cache of {memory}", engine.model),
            None => format!("serves {} with a KV cache by the memory that is free", engine.model),
        })
        .collect();
    let engine = (!engines.is_empty()).then(|| engines.join("; "));
    vec![
        layer(
            "edge",
            edge,
            "no listener",
            "no client can connect: no TLS, no routes, no limits on bodies and connections",
        ),
        layer(
            "gateway",
            gateway,
            "everybody is `anonymous`",
            "anyone who reaches the port may use every model without limit, and nothing records who used what",
        ),
        layer(
            "proxy",
            proxy,
            "each fleet is a model under its own name",
            "clients must use the fleets' own model names, and a fleet that fails has no fallback",
        ),
        layer(
            "router",
            router,
            "one fleet: the engine in this process",
            "one replica only: no second machine, no placement by cached prefix, no failover",
        ),
        layer(
            "engine",
            engine,
            "no model runs in this process",
            "tokens come from replicas and providers elsewhere only",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use forebay_config::FixedEnvironment;

    use super::*;

    #[test]
    fn mistakes_are_found_before_the_start() {
        let check = |text: &str, expect: Option<&str>| {
            let report = check(&Source::new("forebay.yaml", text), &FixedEnvironment::new());
            let found = report.diagnostics.to_string();
            match expect {
                Some(expect) => {
                    assert!(report.diagnostics.has_errors() && found.contains(expect), "{text}\n{found}")
                }
                None => assert!(!report.diagnostics.has_errors(), "{text}\n{found}"),
            }
        };
        check("edge: {}\nengine: {}", None);
        check("edge: {}", Some("nothing would answer"));
        check("engine: {}", Some("nothing would listen"));
        check("edge: {}\nengine: {block-size: 0}", Some("not a multiple of 16 up to 256"));
        check("edge: {}\nengine: {model: no-such}", Some("unknown model `no-such`"));
        let alias = "edge: {}\nengine: [{served-model-name: [a, b]}, {served-model-name: [c, b]}]";
        check(alias, Some("two engines serve `b`"));
        check("edge: {}\nengine: {served-model-name: [a, a]}", Some("`a` stands here twice"));
        check("edge: {}\nengine: {model: ./no-such.gguf}", Some("there is no model file"));
        // Without a model to serve, too.
        let relay = "edge: {routes: [{path: /, to: \"http://127.0.0.1:9\"}]}";
        check(relay, None);
        let keyed = format!("{relay}\ngateway: {{consumers: [{{name: a, keys: [\"env:NOT_SET\"]}}]}}");
        check(&keyed, Some("NOT_SET"));
    }
}
