//! Where a fleet's HTTP replicas publish their KV events.

use forebay_zmtp::Endpoint;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Source;
use crate::config::{FleetConfig, ReplicaTarget};

/// KV events of a fleet's HTTP replicas (vLLM's `--kv-events-config`, our `engine.kv-events`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct FleetKvEvents {
    /// Port for events, at the host of each replica's URL.
    pub port: u16,
    /// Port for asking for missed events and snapshots (vLLM's `replay_endpoint`); without it a router that starts late, or misses some, has to guess.
    pub replay_port: Option<u16>,
    /// Only messages whose topic begins so.
    pub topic: String,
    /// Replicas that publish elsewhere.
    pub sources: Vec<KvEventSource>,
}

impl Default for FleetKvEvents {
    fn default() -> Self {
        Self { port: 5557, replay_port: None, topic: String::new(), sources: Vec::new() }
    }
}

/// Where one replica publishes, if not at the fleet's ports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct KvEventSource {
    /// The replica as `replicas` has it.
    pub replica: ReplicaTarget,
    /// Where its events come from, like `tcp://10.0.0.7:5557`.
    pub endpoint: Endpoint,
    /// Where to ask for missed ones, like `tcp://10.0.0.7:5558`.
    #[serde(default)]
    pub replay_endpoint: Option<Endpoint>,
}

/// A source that can't be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KvSourceError {
    #[error("`{0}` is not an HTTP replica of this fleet; the engine in this process needs no source")]
    NoReplica(String),
    #[error("`{0}` has two sources")]
    Twice(String),
    #[error("`{0}` is no address that can be connected to; write the replica's host in the place of `*`")]
    Wildcard(Endpoint),
}

impl FleetKvEvents {
    /// The first mistake, and its path below `kv-events`.
    pub(crate) fn problem(&self, fleet: &FleetConfig) -> Option<(String, KvSourceError)> {
        for (n, source) in self.sources.iter().enumerate() {
            let name = || String::from(source.replica.clone());
            let at = |key: &str| format!("sources[{n}].{key}");
            if source.replica == ReplicaTarget::Engine || !fleet.replicas.contains(&source.replica) {
                return Some((at("replica"), KvSourceError::NoReplica(name())));
            }
            if self.sources[..n].iter().any(|other| other.replica == source.replica) {
                return Some((at("replica"), KvSourceError::Twice(name())));
            }
            if source.endpoint.is_to_bind() {
                return Some((at("endpoint"), KvSourceError::Wildcard(source.endpoint.clone())));
            }
            if let Some(endpoint) = source.replay_endpoint.as_ref().filter(|endpoint| endpoint.is_to_bind()) {
                return Some((at("replay-endpoint"), KvSourceError::Wildcard(endpoint.clone())));
            }
        }
        None
    }

    /// Where the replica at `url` publishes.
    pub(crate) fn source(&self, url: &str) -> Option<Source> {
        let topic = self.topic.clone();
        let is_it = |source: &&KvEventSource| source.replica == ReplicaTarget::Http(url.to_owned());
        if let Some(source) = self.sources.iter().find(is_it) {
            return Some(Source {
                events: source.endpoint.clone(),
                replay: source.replay_endpoint.clone(),
                topic,
            });
        }
        let url: http::Uri = url.parse().ok()?;
        let at = |port| Some(Endpoint::new(url.host()?, port));
        Some(Source { events: at(self.port)?, replay: self.replay_port.and_then(at), topic })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet(kv_events: serde_json::Value) -> FleetConfig {
        let replicas = ["engine", "http://10.0.0.7:8000/llm", "https://[fd00::7]"];
        let fleet = serde_json::json!({"model": "m", "replicas": replicas, "kv-events": kv_events});
        serde_json::from_value(fleet).expect("a fleet")
    }

    #[test]
    fn sources() {
        let check = |kv_events: serde_json::Value, url: &str, events: &str, replay: Option<&str>| {
            let fleet = fleet(kv_events);
            let kv_events = fleet.kv_events.as_ref().expect("set");
            assert_eq!(kv_events.problem(&fleet), None);
            let source = kv_events.source(url).expect("a host");
            let replayed = source.replay.map(|endpoint| endpoint.to_string());
            assert_eq!((source.events.to_string().as_str(), replayed.as_deref()), (events, replay));
        };
        let four = "http://10.0.0.7:8000/llm";
        let six = "https://[fd00::7]";
        check(serde_json::json!({}), four, "tcp://10.0.0.7:5557", None);
        let ports = serde_json::json!({"port": 1, "replay-port": 2});
        check(ports.clone(), four, "tcp://10.0.0.7:1", Some("tcp://10.0.0.7:2"));
        // vLLM would listen at such an address; we connect to it.
        check(ports, six, "tcp://[fd00::7]:1", Some("tcp://[fd00::7]:2"));
        let own = serde_json::json!({"sources": [{"replica": four, "endpoint": "tcp://pod:3"}]});
        check(own.clone(), four, "tcp://pod:3", None);
        check(own, six, "tcp://[fd00::7]:5557", None);
    }

    #[test]
    fn mistakes() {
        let check = |sources: serde_json::Value, at: &str, error: &str| {
            let fleet = fleet(serde_json::json!({"sources": sources}));
            let (found, problem) =
                fleet.kv_events.as_ref().and_then(|kv| kv.problem(&fleet)).expect("a mistake");
            assert_eq!(found, at);
            assert!(problem.to_string().contains(error), "{problem}");
        };
        let source =
            |replica: &str, endpoint: &str| serde_json::json!({"replica": replica, "endpoint": endpoint});
        let known = "http://10.0.0.7:8000/llm";
        check(
            serde_json::json!([source("http://b", "tcp://b:1")]),
            "sources[0].replica",
            "not an HTTP replica",
        );
        check(
            serde_json::json!([source("engine", "tcp://b:1")]),
            "sources[0].replica",
            "not an HTTP replica",
        );
        let twice = serde_json::json!([source(known, "tcp://b:1"), source(known, "tcp://b:2")]);
        check(twice, "sources[1].replica", "two sources");
        check(
            serde_json::json!([source(known, "tcp://*:1")]),
            "sources[0].endpoint",
            "write the replica's host",
        );
    }
}
