//! The `router` section.

use forebay_config::{HumanDuration, Secret};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::kv_events::FleetKvEvents;

/// Where requests run: fleets of replicas, and how long to wait for them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct RouterConfig {
    /// Fleets, one per model. Without any there is one fleet per engine of this process.
    pub fleets: Vec<FleetConfig>,
    /// Uncached prompt tokens a replica may have waiting before it is skipped; lower it for a shorter wait and more refusals.
    pub queued_tokens_max: u64,
    /// How long an HTTP replica may take to send its first byte (for a stream: its first token); raise it for long prompts.
    pub first_byte_timeout: HumanDuration,
    /// How long an HTTP replica may pause within a reply; raise it for slow models.
    pub chunk_timeout: HumanDuration,
    /// Replicas tried for one request, the first included; 1 turns failover off.
    pub attempts_max: u32,
    /// Tokens of a KV block (vLLM's `--block-size`), the unit in which cached prefixes are compared.
    pub block_size: u32,
    /// KV blocks remembered per replica, about 40 bytes each; at least the blocks that a replica's KV cache holds.
    pub prefix_blocks_max: u32,
    /// How HTTP replicas are watched.
    pub health: HealthConfig,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            fleets: Vec::new(),
            queued_tokens_max: 262_144,
            first_byte_timeout: HumanDuration::from_secs(120),
            chunk_timeout: HumanDuration::from_secs(60),
            attempts_max: 3,
            block_size: 16,
            prefix_blocks_max: 131_072,
            health: HealthConfig::default(),
        }
    }
}

/// One model and the replicas that serve it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FleetConfig {
    /// The fleet's name, which a deployment of the proxy names.
    pub model: String,
    /// `engine` for the one in this process, or the base URL of a server with vLLM's HTTP API.
    pub replicas: Vec<ReplicaTarget>,
    /// The model's name at the HTTP replicas (vLLM's `--served-model-name`), where it is not the fleet's.
    #[serde(default)]
    pub served_name: Option<String>,
    /// The key that the HTTP replicas ask for (vLLM's `--api-key`), as `env:NAME` or `file:PATH`.
    #[serde(default)]
    pub api_key: Option<Secret>,
    /// Where the HTTP replicas publish what their KV caches hold; without it that is guessed from what was sent to them.
    #[serde(default)]
    pub kv_events: Option<FleetKvEvents>,
}

/// How a replica that is reached over HTTP is watched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct HealthConfig {
    /// Time between two probes of a replica.
    pub interval: HumanDuration,
    /// How long a probe may take before it counts as failed.
    pub timeout: HumanDuration,
    /// The path that is asked; any 2xx is healthy.
    pub path: String,
    /// Failed probes in a row after which a replica is down; a refused connection of a request counts as all of them.
    pub unhealthy_after: u32,
    /// Good probes in a row after which a replica is up again.
    pub healthy_after: u32,
    /// Failed answers in a row (5xx, 429, too late or broken off before the first byte) after which a replica gets nothing for `cool-off`; 0 turns this off.
    pub cool_off_after: u32,
    /// How long a replica that keeps failing gets nothing, unless no other is left; after that one more failure is enough.
    pub cool_off: HumanDuration,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            interval: HumanDuration::from_secs(5),
            timeout: HumanDuration::from_secs(2),
            path: "/health".to_owned(),
            unhealthy_after: 3,
            healthy_after: 1,
            cool_off_after: 5,
            cool_off: HumanDuration::from_secs(10),
        }
    }
}

/// One entry of `replicas`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum ReplicaTarget {
    /// The engine in this process.
    Engine,
    /// A base URL without a slash at its end.
    Http(String),
}

/// Why a text names no replica.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseReplicaError {
    #[error("a replica is `engine` or a base URL like `http://127.0.0.1:8001`")]
    NotAUrl,
    #[error("only http:// and https:// replicas can be reached")]
    Scheme,
    #[error("a replica's URL has no user or password; use the fleet's `api-key`")]
    UserInfo,
    #[error("a replica's URL ends before `?`")]
    Query,
}

impl TryFrom<String> for ReplicaTarget {
    type Error = ParseReplicaError;

    fn try_from(text: String) -> Result<Self, ParseReplicaError> {
        if text == "engine" {
            return Ok(Self::Engine);
        }
        let url: http::Uri = text.parse().map_err(|_| ParseReplicaError::NotAUrl)?;
        let (Some(scheme), Some(authority)) = (url.scheme_str(), url.authority()) else {
            return Err(ParseReplicaError::NotAUrl);
        };
        if scheme != "http" && scheme != "https" {
            return Err(ParseReplicaError::Scheme);
        }
        if authority.as_str().contains('@') {
            return Err(ParseReplicaError::UserInfo);
        }
        if url.query().is_some() {
            return Err(ParseReplicaError::Query);
        }
        Ok(Self::Http(text.trim_end_matches('/').to_owned()))
    }
}

impl From<ReplicaTarget> for String {
    fn from(target: ReplicaTarget) -> Self {
        match target {
            ReplicaTarget::Engine => "engine".to_owned(),
            ReplicaTarget::Http(url) => url,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas() {
        let check = |text: &str, expect: Result<ReplicaTarget, ParseReplicaError>| {
            assert_eq!(ReplicaTarget::try_from(text.to_owned()), expect, "{text}");
        };
        let http = |url: &str| Ok(ReplicaTarget::Http(url.to_owned()));
        check("engine", Ok(ReplicaTarget::Engine));
        check("http://127.0.0.1:8001", http("http://127.0.0.1:8001"));
        check("https://gpu-1.example/llm/", http("https://gpu-1.example/llm"));
        check("engin", Err(ParseReplicaError::NotAUrl));
        check("127.0.0.1:8001", Err(ParseReplicaError::NotAUrl));
        check("grpc://127.0.0.1:8001", Err(ParseReplicaError::Scheme));
        check("http://me:secret@host", Err(ParseReplicaError::UserInfo));
        check("http://host/?x=1", Err(ParseReplicaError::Query));
    }

    fn load(text: &str) -> Result<RouterConfig, String> {
        let source = forebay_config::Source::new("forebay.yaml", text);
        forebay_config::load(&source).map(|loaded| loaded.config).map_err(|found| found.to_string())
    }

    #[test]
    fn the_file() {
        let config = load(
            "fleets:\n  - model: smollm2-135m-instruct\n    replicas: [engine, \"http://127.0.0.1:8001\"]\n\
             queued-tokens-max: 10\nhealth: {interval: 1s}\n",
        );
        let expect = RouterConfig {
            fleets: vec![FleetConfig {
                model: "smollm2-135m-instruct".to_owned(),
                replicas: vec![
                    ReplicaTarget::Engine,
                    ReplicaTarget::Http("http://127.0.0.1:8001".to_owned()),
                ],
                served_name: None,
                api_key: None,
                kv_events: None,
            }],
            queued_tokens_max: 10,
            health: HealthConfig { interval: HumanDuration::from_secs(1), ..HealthConfig::default() },
            ..RouterConfig::default()
        };
        assert_eq!(config, Ok(expect));
    }

    #[test]
    fn mistakes_point_at_themselves() {
        let check = |text: &str, expect: &[&str]| {
            let shown = load(text).expect_err("a mistake");
            for part in expect {
                assert!(shown.contains(part), "{shown}");
            }
        };
        check("queued-token-max: 10\n", &["forebay.yaml:1:1", "did you mean `queued-tokens-max`?"]);
        check(
            "fleets:\n  - model: m\n    replicas: [engin]\n",
            &["forebay.yaml:3:16", "a replica is `engine` or a base URL like `http://127.0.0.1:8001`"],
        );
    }

    #[test]
    fn an_error_never_repeats_a_password() {
        let error = ReplicaTarget::try_from("http://me:secret@host".to_owned()).expect_err("user info");
        assert!(!error.to_string().contains("secret"));
    }
}
