//! The `engine` section of the configuration. Names are vLLM's where vLLM has the setting.

use forebay_config::{ByteSize, HumanDuration};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// L5: the inference engine in this process.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct EngineConfig {
    /// Model to serve: a known name, a path to a GGUF file, or `hf:ORG/REPO`.
    pub model: String,
    /// Name that fleets and clients use for it; the model's own name where absent.
    pub served_model_name: Option<String>,
    /// Longest prompt plus output in tokens; the model's own limit where absent, less where the KV cache is smaller.
    pub max_model_len: Option<u32>,
    /// Memory for KV blocks; more means more and longer requests at once.
    pub kv_cache_memory: ByteSize,
    /// Tokens per KV block: 16 or 32; smaller shares prefixes more finely, larger costs less bookkeeping.
    pub block_size: u32,
    /// Tokens computed in one step at most: prefill chunks are cut to it; larger raises prefill speed and the inter-token latency of others.
    pub max_num_batched_tokens: u32,
    /// Sequences computed in one step at most; more raises throughput and memory.
    pub max_num_seqs: u32,
    /// Requests that may wait; one more is refused with 503.
    pub max_num_queued_reqs: u32,
    /// Prompt tokens that may wait over all requests; a request that goes over it is refused with 503.
    pub max_num_queued_tokens: u32,
    /// Reuse KV blocks of equal prompt prefixes.
    pub enable_prefix_caching: bool,
    /// Compute threads; the machine's cores where absent.
    pub threads: Option<u32>,
    /// Longest time one request may take from arrival to its last token.
    pub request_timeout: HumanDuration,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            model: "smollm2-135m-instruct".into(),
            served_model_name: None,
            max_model_len: None,
            kv_cache_memory: ByteSize::mib(512),
            block_size: 16,
            max_num_batched_tokens: 512,
            max_num_seqs: 64,
            max_num_queued_reqs: 1024,
            max_num_queued_tokens: 1_000_000,
            enable_prefix_caching: true,
            threads: None,
            request_timeout: HumanDuration::from_secs(600),
        }
    }
}
