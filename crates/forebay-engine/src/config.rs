//! The `engine` section of the configuration. Names are vLLM's where vLLM has the setting.

use forebay_config::{ByteSize, HumanDuration, OneOrMany};
use forebay_types::ModelName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::generation::{GenerationDefaults, GenerationSource};
use crate::kv_events::{HEARTBEAT_MIN, KvEventsConfig, LOAD_INTERVAL_MIN};
use crate::model::Ranks;

mod parsers;

pub use parsers::{ReasoningParser, ToolCallParser};

/// L5: the inference engine in this process.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct EngineConfig {
    /// Model to serve: a known name, a path to a GGUF file or a safetensors directory, or `hf:ORG/REPO` (a repository of GGUF files or of safetensors).
    pub model: String,
    /// Name that fleets and clients use for it, or a list: replies and metrics say the first, the others are aliases; the model's own name where absent.
    pub served_model_name: OneOrMany<String>,
    /// Load the model at the start; `false` leaves it to `POST /api/models/load` of the admin API.
    pub preload: bool,
    /// Longest prompt plus output in tokens; the model's own limit where absent, less where the KV cache is smaller (the log says so).
    pub max_model_len: Option<u32>,
    /// Memory for KV blocks; more means more and longer requests at once. Where absent, a quarter of what the machine (or container) has left beside the model, 4GiB at most; half of it where one request of `max-model-len` needs that much. Memory is taken as blocks are first used.
    pub kv_cache_memory: Option<ByteSize>,
    /// KV blocks, in place of as many as `kv-cache-memory` has room for: for tests of how a small cache behaves.
    pub num_gpu_blocks_override: Option<u32>,
    /// Tokens per KV block, a multiple of 16; smaller shares prefixes more finely, larger costs less bookkeeping.
    pub block_size: u32,
    /// Tokens computed in one step at most; beside decodes `itl-slo` cuts prefill further. Of an encoder: tokens of a batch.
    pub max_num_batched_tokens: u32,
    /// Longest step in which others decode, and so about the longest pause between two tokens: prefill is cut to fit, and to less while few prompts wait; larger raises prefill speed.
    pub itl_slo: HumanDuration,
    /// Sequences computed in one step at most; more raises throughput and memory.
    pub max_num_seqs: u32,
    /// Sequences (choices of requests) that may wait or run at a time; a request that goes over it is refused with 503.
    pub max_num_queued_reqs: u32,
    /// Prompt tokens that may wait over all requests; a request that goes over it is refused with 503.
    pub max_num_queued_tokens: u32,
    /// Where sampling values come from that a request leaves open: `auto` is the model directory's `generation_config.json`, `vllm` OpenAI's defaults, anything else the path of such a file or of its directory.
    pub generation_config: GenerationSource,
    /// Sampling values that go before those of the model, for requests that leave them open.
    pub override_generation_config: GenerationDefaults,
    /// Reuse KV blocks of equal prompt prefixes.
    pub enable_prefix_caching: bool,
    /// Publish what the KV cache holds, so that routers elsewhere can send a prompt to where its beginning is.
    pub kv_events: Option<KvEventsConfig>,
    /// How tool calls are read from the output, by vLLM's names; `none` refuses requests that want calls.
    pub tool_call_parser: ToolCallParser,
    /// How reasoning is told from the answer, by vLLM's names; `none` leaves it in the text.
    pub reasoning_parser: ReasoningParser,
    /// Chat template in place of the model's own: Jinja as text, or the path of a file.
    pub chat_template: Option<String>,
    /// Most `logprobs`, `top_logprobs` and `prompt_logprobs` that a request may ask for, 1000 at most; 0 refuses all but the chosen token's.
    pub max_logprobs: u32,
    /// Seed of requests that bring none: the same requests in the same order then get the same answers; unset is a random one each.
    pub seed: Option<u64>,
    /// Tell every stream's usage, in each of its frames, whether a request asks for it or not.
    pub enable_force_include_usage: bool,
    /// Name tokens in log-probabilities as `token_id:ID` where a request does not say.
    pub return_tokens_as_token_ids: bool,
    /// Answer `GET /tokenizer_info`, which shows the chat template and what the tokenizer's configuration says.
    pub enable_tokenizer_info_endpoint: bool,
    /// Tell metrics that vLLM has renamed under their former names too, like `vllm:gpu_cache_usage_perc`: for old dashboards. One engine that says so decides for all.
    pub show_hidden_metrics: bool,
    /// Compute threads; the machine's cores where absent.
    pub threads: Option<u32>,
    /// Ranks that compute each layer together; the model's attention heads must divide by it. Results don't depend on it.
    pub tensor_parallel_size: u32,
    /// Stages that have layers of their own, times the ranks of each; results don't depend on it.
    pub pipeline_parallel_size: u32,
    /// Longest time one step may take before it is reported as stuck and `/health` says 503; 0 turns it off. Of an encoder: one batch.
    pub watchdog: HumanDuration,
    /// Longest time one request may take from arrival to its last token.
    pub request_timeout: HumanDuration,
}

/// A value of the `engine` section that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`engine.{key}`: {problem}")]
pub struct EngineConfigError {
    /// Below `engine`.
    pub key: &'static str,
    pub problem: String,
}

/// More tokens per KV block would make prefix reuse useless: only whole blocks are shared.
const BLOCK_SIZE_MAX: u32 = 256;
/// What the attention kernels take at once.
const BLOCK_SIZE_STEP: u32 = 16;
/// Far above the cores of any machine: more is a slip of the pen.
const THREADS_MAX: u32 = 1024;
/// OpenAI's limit, and vLLM's default.
const LOGPROBS_MAX: u32 = 1000;
const SEQS_MAX: u32 = 16_384;
/// Bounds the memory of activations.
const STEP_TOKENS_MAX: u32 = 131_072;

impl EngineConfig {
    /// Everything that is wrong with the values, for `forebay check` and before the start. Pure.
    pub fn problems(&self) -> Vec<EngineConfigError> {
        let mut found = Vec::new();
        let mut add = |key, problem: String| found.push(EngineConfigError { key, problem });
        if !(1..=BLOCK_SIZE_MAX).contains(&self.block_size)
            || !self.block_size.is_multiple_of(BLOCK_SIZE_STEP)
        {
            add(
                "block-size",
                format!(
                    "{} is not a multiple of {BLOCK_SIZE_STEP} up to {BLOCK_SIZE_MAX}; 16 suits most",
                    self.block_size
                ),
            );
        }
        for (key, value, max) in [
            ("max-logprobs", self.max_logprobs, LOGPROBS_MAX),
            ("threads", self.threads.unwrap_or(1), THREADS_MAX),
            ("tensor-parallel-size", self.tensor_parallel_size, THREADS_MAX),
            ("pipeline-parallel-size", self.pipeline_parallel_size, THREADS_MAX),
            ("max-num-seqs", self.max_num_seqs, SEQS_MAX),
            ("max-num-batched-tokens", self.max_num_batched_tokens, STEP_TOKENS_MAX),
        ] {
            if value > max {
                add(key, format!("{value} is more than {max}, the limit; leave the key out for the default"));
            }
        }
        if let Some(threads) = self.threads.filter(|&n| n > 0 && n < self.tensor_parallel_size) {
            add(
                "threads",
                format!(
                    "{threads} can't be shared by the {} ranks of `tensor-parallel-size`; each takes one or more",
                    self.tensor_parallel_size
                ),
            );
        }
        if let Some(len @ 0..=1) = self.max_model_len {
            add(
                "max-model-len",
                format!("{len} leaves no room for a prompt and one token; leave it out for the model's own"),
            );
        }
        let names = self.served_model_name.as_slice();
        if names.iter().any(|name| name.trim().is_empty()) {
            add("served-model-name", "the name is empty; leave it out for the model's own".to_owned());
        }
        if let Some((_, twice)) = names.iter().enumerate().find(|(nth, name)| names[..*nth].contains(name)) {
            add("served-model-name", format!("`{twice}` stands here twice; remove one of the two"));
        }
        if let Some((field, value, expected)) = self.override_generation_config.problem() {
            add("override-generation-config", format!("`{field}` is {value}; {expected} expected"));
        }
        if self.kv_events.is_some() && !self.enable_prefix_caching {
            add(
                "kv-events",
                "there are none without `enable-prefix-caching`; turn it on, or leave this out".to_owned(),
            );
        }
        if let Some(events) = &self.kv_events {
            for (key, interval, min) in [
                ("kv-events.heartbeat-interval", events.heartbeat_interval, HEARTBEAT_MIN),
                ("kv-events.load-interval", events.load_interval, LOAD_INTERVAL_MIN),
            ] {
                if interval.get() < min {
                    add(key, format!("{interval} is less than {min:?}; leave the key out for the default"));
                }
            }
        }
        for (key, zero) in [
            ("num-gpu-blocks-override", self.num_gpu_blocks_override == Some(0)),
            ("max-num-batched-tokens", self.max_num_batched_tokens == 0),
            ("max-num-seqs", self.max_num_seqs == 0),
            ("max-num-queued-reqs", self.max_num_queued_reqs == 0),
            ("max-num-queued-tokens", self.max_num_queued_tokens == 0),
            ("threads", self.threads == Some(0)),
            ("tensor-parallel-size", self.tensor_parallel_size == 0),
            ("pipeline-parallel-size", self.pipeline_parallel_size == 0),
            ("itl-slo", self.itl_slo.get().is_zero()),
            ("request-timeout", self.request_timeout.get().is_zero()),
        ] {
            if zero {
                add(key, "zero would let nothing run; leave the key out for the default".to_owned());
            }
        }
        found
    }

    /// What the model is called, unless that is its own name.
    pub fn served_name(&self) -> Option<&str> {
        self.served_model_name.as_slice().first().map(String::as_str)
    }

    /// Further names that clients may ask for it by.
    pub fn aliases(&self) -> impl Iterator<Item = ModelName> {
        self.served_model_name.iter().skip(1).map(|name| ModelName::from(name.as_str()))
    }

    /// How the model is divided.
    pub fn ranks(&self) -> Ranks {
        Ranks { tensor: self.tensor_parallel_size as usize, pipeline: self.pipeline_parallel_size as usize }
    }
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            model: "smollm2-135m-instruct".into(),
            served_model_name: OneOrMany::default(),
            preload: true,
            max_model_len: None,
            kv_cache_memory: None,
            num_gpu_blocks_override: None,
            block_size: 16,
            max_num_batched_tokens: 512,
            itl_slo: HumanDuration::from_millis(200),
            max_num_seqs: 128,
            max_num_queued_reqs: 8192,
            max_num_queued_tokens: 10_000_000,
            generation_config: GenerationSource::default(),
            override_generation_config: GenerationDefaults::default(),
            enable_prefix_caching: true,
            kv_events: None,
            tool_call_parser: ToolCallParser::Auto,
            reasoning_parser: ReasoningParser::Auto,
            chat_template: None,
            max_logprobs: 20,
            seed: None,
            enable_force_include_usage: false,
            return_tokens_as_token_ids: false,
            enable_tokenizer_info_endpoint: false,
            show_hidden_metrics: false,
            threads: None,
            tensor_parallel_size: 1,
            pipeline_parallel_size: 1,
            watchdog: HumanDuration::from_secs(60),
            request_timeout: HumanDuration::from_secs(86_400),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_at_which_nothing_runs_are_named() {
        let check = |change: fn(&mut EngineConfig), expect: &[&str]| {
            let mut config = EngineConfig::default();
            change(&mut config);
            let keys: Vec<_> = config.problems().into_iter().map(|problem| problem.key).collect();
            assert_eq!(keys, expect);
        };
        check(|_| {}, &[]);
        check(|c| c.block_size = 0, &["block-size"]);
        check(|c| c.block_size = 7, &["block-size"]);
        check(|c| c.block_size = 272, &["block-size"]);
        check(|c| (c.max_num_seqs, c.threads) = (4_000_000_000, Some(5000)), &["threads", "max-num-seqs"]);
        check(|c| c.tensor_parallel_size = 0, &["tensor-parallel-size"]);
        check(|c| c.pipeline_parallel_size = 5000, &["pipeline-parallel-size"]);
        check(|c| (c.tensor_parallel_size, c.threads) = (3, Some(2)), &["threads"]);
        check(|c| (c.tensor_parallel_size, c.threads) = (3, Some(3)), &[]);
        check(|c| c.override_generation_config.top_p = Some(0.0), &["override-generation-config"]);
        check(|c| c.max_model_len = Some(1), &["max-model-len"]);
        check(|c| c.max_model_len = Some(2), &[]);
        check(|c| c.max_logprobs = 1001, &["max-logprobs"]);
        check(|c| c.num_gpu_blocks_override = Some(0), &["num-gpu-blocks-override"]);
        let named = |config: &mut EngineConfig, names: &[&str]| {
            config.served_model_name = names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>().into();
        };
        check(|c| c.served_model_name = OneOrMany::one(" ".into()), &["served-model-name"]);
        let mut twice = EngineConfig::default();
        named(&mut twice, &["a", "b", "a"]);
        assert_eq!(
            twice.problems()[0].to_string(),
            "`engine.served-model-name`: `a` stands here twice; remove one of the two"
        );
        named(&mut twice, &["a", "b", "c"]);
        assert_eq!(twice.problems(), []);
        assert_eq!(
            (twice.served_name(), twice.aliases().collect()),
            (Some("a"), vec!["b".into(), "c".into()] as Vec<ModelName>)
        );
        check(|c| (c.max_num_seqs, c.threads) = (0, Some(0)), &["max-num-seqs", "threads"]);
        check(|c| c.request_timeout = HumanDuration::from_secs(0), &["request-timeout"]);
    }
}
