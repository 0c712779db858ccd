//! L3, the proxy: what is asked, and who can answer it.
//!
//! A model is a name that clients use; behind it stands a chain of deployments, each a fleet of the router or a
//! provider elsewhere. The first that begins to answer wins; one that fails before its first byte is retried where
//! that makes sense, and else the next takes over, unseen by the client.
//!
//! Names: the events of an engine in this process are rendered with the name that the client asked for. The reply of a
//! provider or of an HTTP replica passes byte for byte, and so keeps the model string that the upstream wrote into it.
//!
//! What it deliberately does not do: choose a replica (the router's), count tokens or hold quota (the gateway's),
//! translate between dialects (only providers that speak OpenAI's are supported), or touch a reply after its first
//! byte. No cache, no guardrails, no prices yet.

mod build;
mod config;
mod cooldown;
mod list;
mod metrics;
mod policy;
mod proxy;

#[cfg(test)]
mod tests;

pub use build::{FleetCard, ProxyBuildError, ProxyDeps};
pub use config::{CooldownConfig, DeploymentConfig, ModelConfig, Provider, ProxyConfig};
pub use proxy::{Proxy, ResolveError};
