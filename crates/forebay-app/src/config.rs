//! The configuration of configurations: one section per layer, each defined beside its layer.

use std::path::PathBuf;

use forebay_config::{ListenAddr, OneOrMany};
use forebay_edge::EdgeConfig;
use forebay_engine::EngineConfig;
use forebay_gateway::GatewayConfig;
use forebay_proxy::ProxyConfig;
use forebay_router::RouterConfig;
use schemars::JsonSchema;
use serde::Deserialize;

/// `forebay.yaml`: a section that is there runs, a section that is not there does not.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Config {
    /// Metrics, health, readiness and the last requests, on a listener of its own.
    pub admin: Option<AdminConfig>,
    /// L1: the front door: TLS, routes, limits, streaming.
    pub edge: Option<EdgeConfig>,
    /// L2: who is calling: API keys, quotas, audit; without it everybody is `anonymous` and unlimited.
    pub gateway: Option<GatewayConfig>,
    /// L3: what is asked: model names, fallback chains, providers; without it each fleet is a model under its own name.
    pub proxy: Option<ProxyConfig>,
    /// L4: where it runs: fleets of replicas; without it the engine in this process is the only replica.
    pub router: Option<RouterConfig>,
    /// Where this process keeps what must survive it.
    pub store: Option<StoreConfig>,
    /// L5: the inference engine in this process, or a list of them for several models; without it models come from `router` replicas or `proxy` providers.
    pub engine: OneOrMany<EngineConfig>,
}

/// The admin listener. It has no authentication: keep it on loopback or on a private network.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct AdminConfig {
    /// Address of `/metrics`, `/health`, `/ready` and the admin API.
    pub listen: ListenAddr,
    /// Finished requests that are kept with their waterfalls, for `/api/requests`.
    pub recent_requests: usize,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self { listen: std::net::SocketAddr::from(([127, 0, 0, 1], 9901)).into(), recent_requests: 256 }
    }
}

/// Where state is kept. So far that is the audit log.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct StoreConfig {
    /// Directory that relative directories of other sections (`gateway.audit.dir`) stand in.
    pub dir: PathBuf,
}

impl Config {
    /// Where the `nth` engine stands in the file.
    pub fn engine_at(&self, nth: usize) -> String {
        if self.engine.len() == 1 { "engine".to_owned() } else { format!("engine[{nth}]") }
    }

    /// With relative directories of other sections put below `store.dir`. Done once, before layers are built.
    pub fn with_store_applied(mut self) -> Self {
        if let (Some(store), Some(gateway)) = (&self.store, &mut self.gateway)
            && let Some(audit) = &mut gateway.audit
        {
            // An absolute path stays what it is.
            audit.dir = store.dir.join(&audit.dir);
        }
        self
    }

    /// What runs without a file: everything but the gateway, on loopback, with the default model.
    pub fn without_a_file() -> Self {
        Self {
            admin: Some(AdminConfig::default()),
            edge: Some(EdgeConfig::default()),
            gateway: None,
            proxy: Some(ProxyConfig::default()),
            router: Some(RouterConfig::default()),
            store: None,
            engine: OneOrMany::one(EngineConfig::default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use forebay_config::{Source, load};

    use super::*;

    #[test]
    fn relative_directories_stand_below_the_store() {
        let check = |dir: &str, expect: &str| {
            let text = format!("gateway: {{audit: {{dir: {dir}}}}}\nstore: {{dir: data}}");
            let config = load::<Config>(&Source::new("f.yaml", text)).expect("well-formed").config;
            let audit = config.with_store_applied().gateway.and_then(|gateway| gateway.audit);
            assert_eq!(audit.map(|audit| audit.dir), Some(PathBuf::from(expect)));
        };
        check("audit", "data/audit");
        check("/var/log/audit", "/var/log/audit");
    }
}
