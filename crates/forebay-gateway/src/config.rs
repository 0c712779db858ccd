//! The `gateway` section of `forebay.yaml`.

use std::num::NonZeroU64;
use std::path::PathBuf;

use forebay_config::{OneOrMany, Secret};
use schemars::JsonSchema;
use serde::Deserialize;

/// L2: who may call, and how much.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct GatewayConfig {
    /// Who may call; at least one, as a gateway without consumers would refuse everybody.
    pub consumers: Vec<ConsumerConfig>,
    /// Who shares cached prompts: `none` is everybody, and `consumer` keeps each consumer's apart, so that nobody can tell by how
    /// fast an answer comes what others have asked; prompts that all begin alike are then computed once per consumer.
    pub cache_salt: SaltScope,
    /// What salts are derived from with `cache-salt: consumer`, written `env:NAME` or `file:PATH`, at least 16 bytes; without it they
    /// are random from each start on, so set it where several gateways share workers.
    pub cache_salt_secret: Option<Secret>,
    /// Where each request is written down; without it nothing is.
    pub audit: Option<AuditConfig>,
    /// Output tokens reserved per choice of a chat that names no `max_tokens`; what a reply uses beyond is charged
    /// when it ends, so raise it if consumers overshoot their limits.
    pub default_output_tokens: u32,
    /// Bytes a key may have, in this file and in a request; 512 is plenty for any key format.
    pub key_bytes_max: usize,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            consumers: Vec::new(),
            cache_salt: SaltScope::None,
            cache_salt_secret: None,
            audit: None,
            default_output_tokens: 256,
            key_bytes_max: 512,
        }
    }
}

/// Whose requests get a cache salt of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SaltScope {
    /// None but those that bring one (`cache_salt`).
    None,
    /// Each consumer's, whatever they bring.
    Consumer,
}

/// One consumer: a team, an application, a person.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConsumerConfig {
    /// Name in metrics and in the audit log.
    pub name: String,
    /// API key, or a list of keys to change them without a gap; written `env:NAME` or `file:PATH`.
    pub keys: OneOrMany<Secret>,
    /// What the consumer may have, over all of its keys; without it there is no limit.
    #[serde(default)]
    pub limits: LimitsConfig,
    /// Names of the models it may use; without it, all of them.
    #[serde(default)]
    pub models: Option<Vec<String>>,
}

/// Limits of one consumer, refilled continuously.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct LimitsConfig {
    /// Requests per minute, refused ones included, also the most that can be sent at once; unset is unlimited.
    pub requests_per_minute: Option<NonZeroU64>,
    /// Prompt and completion tokens per minute; a request that may need more than this at once is never admitted.
    pub tokens_per_minute: Option<NonZeroU64>,
}

/// The audit log.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct AuditConfig {
    /// Directory for `audit-YYYYMMDD.jsonl`, one file per day (UTC), one line per request; it is made if it is not there.
    pub dir: PathBuf,
    /// Requests in flight or not yet written at most; the next one is refused with 503, so keep it above your highest
    /// concurrency.
    #[serde(default = "default_pending_max")]
    pub pending_max: usize,
}

fn default_pending_max() -> usize {
    16_384
}
