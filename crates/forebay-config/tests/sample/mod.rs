//! A configuration with one of everything, in the shape of the real one.

#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use forebay_config::{ByteSize, HumanDuration, ListenAddr, OneOrMany, Secret};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// All layers. A section that is there runs.
#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Sample {
    /// The front door.
    pub edge: Option<Edge>,
    pub gateway: Option<Gateway>,
    pub proxy: Option<Proxy>,
    /// Where requests run.
    pub router: Option<Router>,
    pub store: Option<Store>,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Edge {
    /// Addresses to listen on.
    pub listen: OneOrMany<ListenAddr>,
    /// Certificate and key; without it the edge speaks plain HTTP.
    pub tls: Option<Tls>,
    pub routes: Vec<Route>,
    /// Largest request body. Images need more than the default.
    pub body_max: ByteSize,
    /// How long a client may be silent.
    pub idle_timeout: HumanDuration,
}

/// A certificate and its key.
#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Tls {
    /// PEM file with the chain, leaf first.
    pub cert: String,
    /// The private key in PEM.
    pub key: Secret,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Route {
    pub path: String,
    /// `llm`, or the base URL of another service.
    pub to: String,
    #[serde(default)]
    pub waf: bool,
}

#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Gateway {
    pub consumers: Vec<Consumer>,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Consumer {
    pub name: String,
    /// Keys this consumer may show.
    pub keys: Vec<Secret>,
    /// Limits by name, per minute.
    #[serde(default)]
    pub limits: BTreeMap<String, NonZeroU32>,
}

#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Proxy {
    pub backends: Vec<Backend>,
}

/// Internally tagged, to see what becomes of positions.
#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(tag = "provider", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Backend {
    Openai {
        model: String,
        #[serde(rename = "api-key")]
        api_key: Secret,
    },
    Anthropic {
        model: String,
        retries: Option<u8>,
    },
}

#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Router {
    pub fleets: Vec<Fleet>,
    /// Uncached prompt tokens a worker may have waiting before it is skipped. Raise it for long prompts.
    pub queued_tokens_max: u32,
    /// Picks among equals.
    pub policy: Policy,
    /// Share of new requests to try first, 0 to 1.
    pub canary: f64,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Fleet {
    /// Model that every replica serves.
    pub model: String,
    /// `engine` or base URLs.
    #[serde(default)]
    pub replicas: OneOrMany<String>,
    /// First and last port.
    pub ports: Option<(u16, u16)>,
}

#[derive(Debug, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// The longest cached prefix.
    #[default]
    PrefixCache,
    RoundRobin,
}

#[derive(Debug, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Store {
    /// A directory of this machine.
    Dir(String),
    /// A server.
    Redis(Secret),
    Memory,
}

impl Default for Edge {
    fn default() -> Self {
        Self {
            listen: OneOrMany::default(),
            tls: None,
            routes: Vec::new(),
            body_max: ByteSize::mib(10),
            idle_timeout: HumanDuration::from_secs(60),
        }
    }
}
