//! L4, the router: where a request runs.
//!
//! A fleet is a model and its replicas: the engine in this process, or servers with vLLM's HTTP API. For each request
//! the router looks up who holds the prompt's prefix, asks `forebay-placement` for the replica with the lowest cost in
//! seconds, and hands the request over. A replica that fails before its first byte is replaced by another, unseen by
//! the client.
//!
//! What it deliberately does not do: model names and providers (the proxy's), queueing (a replica's own queue is
//! counted, and a fleet that is full refuses), talk to the client after the first chunk (a stream that breaks off is
//! an error in the stream).

mod build;
mod config;
mod fleet;
mod health;
mod kv_events;
mod lengths;
mod live;
mod metrics;
mod need;
mod prefix;
mod router;
mod stand_in;
mod track;
mod watch;

#[cfg(test)]
mod tests;

pub use build::{RouterBuildError, RouterDeps};
pub use config::{FleetConfig, HealthConfig, ParseReplicaError, ReplicaTarget, RouterConfig};
pub use kv_events::{By, FleetKvEvents, KvEventSource, KvEventsStatus, KvSourceError, Resync, Why};
pub use prefix::{KvSink, PrefixView};
pub use router::{FleetStatus, ReplicaStatus, RouteError, Router};
