//! The proxy alone: a scripted router on a paused clock, and tiny HTTP servers as providers.

mod building;
mod chains;
mod names;
mod providers;
mod script;
mod server;

use forebay_config::FixedEnvironment;
use forebay_observe::Registry;
use forebay_upstream::{ClientConfig, HttpClient};

use crate::{FleetCard, Proxy, ProxyBuildError, ProxyConfig, ProxyDeps};
use script::Router;

/// A proxy with everything around it.
struct Bench {
    proxy: Proxy<Router>,
    router: Router,
    registry: Registry,
}

impl Bench {
    /// Over the fleets `a`, `b` and `c`.
    fn new(config: Option<&ProxyConfig>) -> Self {
        Self::try_new(config).expect("a proxy")
    }

    fn try_new(config: Option<&ProxyConfig>) -> Result<Self, ProxyBuildError> {
        Self::with_aliases(config, &[])
    }

    /// `aliases` are of the fleet `b`.
    fn with_aliases(config: Option<&ProxyConfig>, aliases: &[&str]) -> Result<Self, ProxyBuildError> {
        let card = |(n, model): (u64, &str)| FleetCard {
            aliases: aliases.iter().filter(|_| model == "b").map(|&alias| alias.into()).collect(),
            model: model.into(),
            max_model_len: Some(1000 * n as u32),
            created: n,
        };
        Self::with_fleets(config, [(1, "a"), (2, "b"), (3, "c")].map(card).to_vec())
    }

    fn with_fleets(config: Option<&ProxyConfig>, fleets: Vec<FleetCard>) -> Result<Self, ProxyBuildError> {
        let (registry, router) = (Registry::new(), Router::default());
        let env = FixedEnvironment::new().with_var("KEY", "sk-provider").with_var("BAD", "with\u{1}control");
        let deps =
            ProxyDeps { client: HttpClient::new(ClientConfig::default()), registry: &registry, fleets };
        let proxy = Proxy::new(config, &env, deps, router.clone())?;
        Ok(Self { proxy, router, registry })
    }

    /// The lines of one metric, sorted.
    fn metric(&self, name: &str) -> Vec<String> {
        let text = self.registry.render();
        let line =
            |line: &&str| line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name} "));
        let mut lines: Vec<String> =
            text.lines().filter(line).map(|line| line[name.len()..].to_owned()).collect();
        lines.sort();
        lines
    }
}

/// As the loader would read it.
fn config(yaml: serde_json::Value) -> ProxyConfig {
    serde_json::from_value(yaml).expect("a valid configuration")
}
