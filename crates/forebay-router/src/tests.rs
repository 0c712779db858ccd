//! The router alone: scripted engines on a paused clock, and tiny HTTP servers as replicas.

mod http_replicas;
mod in_process;
mod kv_events;
mod script;
mod server;

use std::collections::HashMap;
use std::sync::Arc;

use forebay_config::FixedEnvironment;
use forebay_observe::Registry;
use forebay_types::ModelName;
use forebay_upstream::{ClientConfig, HttpClient};

use crate::{PrefixView, Router, RouterBuildError, RouterConfig, RouterDeps};
use script::Engine;

/// A router with everything around it.
struct Bench {
    router: Router<Engine>,
    registry: Registry,
    prefix: PrefixView,
}

impl Bench {
    fn new(config: Option<&RouterConfig>, engines: &[(&str, &Arc<Engine>)]) -> Self {
        Self::try_new(config, engines).expect("a router")
    }

    fn try_new(
        config: Option<&RouterConfig>,
        engines: &[(&str, &Arc<Engine>)],
    ) -> Result<Self, RouterBuildError> {
        let (registry, prefix) = (Registry::new(), PrefixView::new(1000));
        let env = FixedEnvironment::new().with_var("KEY", "sk-replica");
        let deps = RouterDeps {
            client: HttpClient::new(ClientConfig::default()),
            registry: &registry,
            prefix: prefix.clone(),
            env: &env,
        };
        let engines: HashMap<ModelName, Arc<Engine>> =
            engines.iter().map(|(model, engine)| (ModelName::from(*model), Arc::clone(engine))).collect();
        let router = Router::new(config, deps, engines)?;
        Ok(Self { router, registry, prefix })
    }

    /// Requests and queued tokens of the `n`-th replica of the first fleet.
    fn load(&self, n: usize) -> (u32, u64) {
        let replica = &self.router.fleets()[0].replicas[n];
        (replica.requests, replica.queued_tokens)
    }

    /// The lines of one metric, sorted, with the replicas' URLs shortened to their position.
    fn metric(&self, name: &str) -> Vec<String> {
        let mut text = self.registry.render();
        for (n, replica) in self.router.fleets()[0].replicas.iter().enumerate() {
            text = text.replace(replica.id.as_str(), &format!("#{n}"));
        }
        let line =
            |line: &&str| line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name} "));
        let mut lines: Vec<String> =
            text.lines().filter(line).map(|line| line[name.len()..].to_owned()).collect();
        lines.sort();
        lines
    }
}

/// As the loader would read it.
fn config(yaml: serde_json::Value) -> RouterConfig {
    serde_json::from_value(yaml).expect("a valid configuration")
}
