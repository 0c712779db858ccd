//! The configuration of configurations: one section per layer, each defined beside its layer.

use forebay_config::ListenAddr;
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
    /// L5: the inference engine in this process; without it models come from `router` replicas or `proxy` providers.
    pub engine: Option<EngineConfig>,
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

impl Config {
    /// What runs without a file: everything but the gateway, on loopback, with the default model.
    pub fn without_a_file() -> Self {
        Self {
            admin: Some(AdminConfig::default()),
            edge: Some(EdgeConfig::default()),
            gateway: None,
            proxy: Some(ProxyConfig::default()),
            router: Some(RouterConfig::default()),
            engine: Some(EngineConfig::default()),
        }
    }
}
