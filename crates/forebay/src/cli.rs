//! The command line. Flags are defined here once; help and completions come from them.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use forebay_config::{ByteSize, HumanDuration};
use forebay_engine::{GenerationDefaults, KvEventsConfig, ReasoningParser, ToolCallParser};

use crate::counts::{Count, ModelLen, TokenCount};
use crate::front::Front;

/// The LLM serving stack in one program: edge, gateway, proxy, router and inference engine.
#[derive(Parser)]
#[command(name = "forebay", version, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
}

const EXAMPLES: &str = "\
Examples:
  forebay                                   serve the default model on 127.0.0.1:8080
  forebay serve --config forebay.yaml       run the layers that the file names
  forebay check forebay.yaml                is the file right, and what does each layer do
  forebay worker --model ./m.gguf --port 8001
  forebay model pull smollm2-135m-instruct
  forebay bench http://127.0.0.1:8080 --concurrency 8";

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Run the layers that a configuration file names; without one, everything but the gateway on loopback
    Serve(Serve),
    /// Run one engine behind an OpenAI-compatible port, with vLLM's flag names
    Worker(Box<Worker>),
    /// Validate a configuration file and explain what it does
    Check(Check),
    /// Fetch and list models
    #[command(subcommand)]
    Model(Model),
    /// Measure a server: time to first token, inter-token latency, throughput
    Bench(Bench),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  forebay completions bash > /etc/bash_completion.d/forebay")]
    Completions { shell: clap_complete::Shell },
}

#[derive(Args, Default)]
pub(crate) struct Serve {
    /// Configuration file; without it: edge, proxy, router and one engine on 127.0.0.1:8080, no keys
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub log: Log,
}

#[derive(Args, Default, Clone, Copy)]
pub(crate) struct Log {
    /// Form of the log on stderr
    #[arg(long, value_enum, default_value_t, global = true)]
    pub log_format: LogFormat,
}

#[derive(ValueEnum, Clone, Copy, Default, PartialEq)]
pub(crate) enum LogFormat {
    /// One line for people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

#[derive(Args)]
#[command(
    after_help = "Examples:\n  forebay worker smollm2-135m-instruct --port 8001 --max-num-seqs 32\n  forebay worker --model ./m.gguf --kv-events-config '{\"enable_kv_cache_events\": true}'\n\nOther flags of `vllm serve` are accepted where they mean nothing here (a line says what is done instead), and else refused\nwith the reason."
)]
pub(crate) struct Worker {
    /// Known name, path to a GGUF file or a safetensors directory, or hf:ORG/REPO
    #[arg(value_name = "MODEL", required_unless_present = "model", conflicts_with = "model")]
    pub model_tag: Option<String>,
    /// The same as a flag
    #[arg(long)]
    pub model: Option<String>,
    /// Names that clients may use; replies and metrics say the first. The model's own where absent
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub served_model_name: Vec<String>,
    /// Address or host name to listen on; 0.0.0.0 to be reached from other machines and from outside a container (vLLM's
    /// default)
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Port of /ready and the admin API on the same address; off where absent
    #[arg(long, value_name = "PORT")]
    pub admin_port: Option<u16>,
    /// Longest prompt plus output, in tokens (32k is 32,000, 32K is 32,768); `auto` and -1 are what the model and the KV
    /// cache allow, and so is no value
    #[arg(long, value_name = "TOKENS", allow_negative_numbers = true)]
    pub max_model_len: Option<ModelLen>,
    /// Sequences computed in one step at most
    #[arg(long, value_name = "N")]
    pub max_num_seqs: Option<u32>,
    /// Tokens computed in one step at most
    #[arg(long, value_name = "TOKENS")]
    pub max_num_batched_tokens: Option<TokenCount>,
    /// Longest step in which others decode, in milliseconds; prefill is cut to fit
    #[arg(long, value_name = "MS")]
    pub itl_slo_ms: Option<u32>,
    /// Requests that may wait or run at a time; more are answered with 503
    #[arg(long, value_name = "N")]
    pub max_num_queued_reqs: Option<u32>,
    /// Prompt tokens that may wait; more are answered with 503
    #[arg(long, value_name = "TOKENS")]
    pub max_num_queued_tokens: Option<TokenCount>,
    /// Tokens per KV block
    #[arg(long, value_name = "TOKENS")]
    pub block_size: Option<u32>,
    /// Longest time that a request may take, with waiting
    #[arg(long, value_name = "DURATION")]
    pub request_timeout: Option<HumanDuration>,
    /// Memory for KV blocks, as bytes, like 512MiB, or like 1G; by the memory that is free where absent
    /// (VLLM_CPU_KVCACHE_SPACE, in GiB, counts too)
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub kv_cache_memory_bytes: Option<ByteSize>,
    /// Where sampling values come from that a request leaves open: the model's `generation_config.json` (auto), OpenAI's
    /// (vllm), or another such file or its directory
    #[arg(long, value_name = "auto|vllm|PATH")]
    pub generation_config: Option<String>,
    /// Sampling values that go before the model's own, as JSON: `{"temperature": 0.7, "top_k": 20}`
    #[arg(long, value_name = "JSON", value_parser = generation_defaults)]
    pub override_generation_config: Option<GenerationDefaults>,
    /// Reuse KV blocks of equal prefixes (the default)
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    pub enable_prefix_caching: bool,
    #[arg(long, overrides_with = "enable_prefix_caching")]
    pub no_enable_prefix_caching: bool,
    /// Publish KV events: vLLM's JSON with `enable_kv_cache_events` and as wanted `endpoint`, `replay_endpoint`, `topic`,
    /// `buffer_steps`
    #[arg(long, value_name = "JSON", value_parser = kv_events)]
    pub kv_events_config: Option<KvEventsFlag>,
    /// How tool calls are read: auto (by the chat template), none, hermes, llama3_json or json
    #[arg(long, value_name = "NAME")]
    pub tool_call_parser: Option<ToolCallParser>,
    /// How reasoning is told from the answer: auto (by the chat template), none, deepseek_r1 or qwen3
    #[arg(long, value_name = "NAME")]
    pub reasoning_parser: Option<ReasoningParser>,
    /// KV blocks, in place of as many as the memory has room for
    #[arg(long, value_name = "N")]
    pub num_gpu_blocks_override: Option<u32>,
    /// Chat template in place of the model's own: a file, or the template itself
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<String>,
    /// Most log-probabilities a token that a request may ask for
    #[arg(long, value_name = "N")]
    pub max_logprobs: Option<u32>,
    /// Seed of requests that bring none; random ones where absent (vLLM: 0)
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
    /// Tell every stream's usage, in each of its frames, whether a request asks for it or not
    #[arg(long)]
    pub enable_force_include_usage: bool,
    /// Name tokens in log-probabilities as `token_id:ID` where a request does not say
    #[arg(long)]
    pub return_tokens_as_token_ids: bool,
    /// Answer GET /tokenizer_info, which shows the chat template
    #[arg(long)]
    pub enable_tokenizer_info_endpoint: bool,
    /// Tell metrics under former names too, whichever version is given: those that vLLM has renamed
    #[arg(long, value_name = "VERSION")]
    pub show_hidden_metrics_for_version: Option<String>,
    /// Compute threads; the machine's cores where absent
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    /// Ranks that compute each layer together (also -tp)
    #[arg(long, value_name = "N")]
    pub tensor_parallel_size: Option<u32>,
    /// Stages that have layers of their own (also -pp)
    #[arg(long, value_name = "N")]
    pub pipeline_parallel_size: Option<u32>,
    #[command(flatten)]
    pub front: Front,
    #[command(flatten)]
    pub log: Log,
}

/// What `--kv-events-config` says.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct KvEventsFlag {
    /// `None` where the JSON does not turn them on.
    pub config: Option<KvEventsConfig>,
    /// It says how, but not that: nothing is published, as by vLLM.
    pub is_incomplete: bool,
}

/// vLLM's `KVEventsConfig`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct VllmKvEvents {
    enable_kv_cache_events: Option<bool>,
    publisher: Option<String>,
    #[serde(default = "vllm_endpoint")]
    endpoint: String,
    replay_endpoint: Option<String>,
    #[serde(default)]
    topic: String,
    buffer_steps: Option<u32>,
    /// ZeroMQ's high-water mark and the queue before it: ours are fixed.
    #[serde(rename = "hwm")]
    _hwm: Option<u32>,
    #[serde(rename = "max_queue_size")]
    _max_queue_size: Option<u32>,
}

fn vllm_endpoint() -> String {
    "tcp://*:5557".to_owned()
}

fn kv_events(text: &str) -> Result<KvEventsFlag, String> {
    let given: VllmKvEvents = serde_json::from_str(text).map_err(|error| error.to_string())?;
    match given.publisher.as_deref() {
        None | Some("zmq") => {}
        Some("null") => return Ok(KvEventsFlag::default()),
        Some(other) => return Err(format!("publisher `{other}` is not known; `zmq` and `null` are")),
    }
    // The section's own reader knows which endpoints are good.
    let mut section = serde_json::json!({"endpoint": given.endpoint, "topic": given.topic});
    if let Some(replay) = given.replay_endpoint {
        section["replay-endpoint"] = replay.into();
    }
    if let Some(steps) = given.buffer_steps {
        section["buffer-steps"] = steps.into();
    }
    let config: KvEventsConfig = serde_json::from_value(section).map_err(|error| error.to_string())?;
    let enabled = given.enable_kv_cache_events;
    Ok(KvEventsFlag { config: (enabled == Some(true)).then_some(config), is_incomplete: enabled.is_none() })
}

fn generation_defaults(text: &str) -> Result<GenerationDefaults, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

/// vLLM's numbers first; people write 512MiB.
fn bytes(text: &str) -> Result<ByteSize, String> {
    match text.parse() {
        Ok(Count(bytes)) => Ok(ByteSize::new(bytes)),
        Err(_) => text.parse::<ByteSize>().map_err(|error| error.to_string()),
    }
}

#[derive(Args)]
#[command(after_help = "Exit status: 0 where the file is right (warnings allowed), 1 where it is not.")]
pub(crate) struct Check {
    pub file: PathBuf,
    /// Findings and layers as one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Subcommand)]
pub(crate) enum Model {
    /// Fetch a model into the cache, or verify that it is there
    #[command(
        after_help = "Examples:\n  forebay model pull smollm2-135m-instruct\n  forebay model pull ./model.gguf\n  forebay model pull hf:ORG/REPO"
    )]
    Pull {
        /// Known name, path to a GGUF file or a safetensors directory, or hf:ORG/REPO[/FILE.gguf]
        model: String,
        /// Print the path of the file or directory on stdout and nothing else
        #[arg(long)]
        print_path: bool,
    },
    /// Known models and what is in the cache
    List {
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
#[command(after_help = "Examples:
  forebay bench http://127.0.0.1:8080 --concurrency 8 --requests 200
  forebay bench http://127.0.0.1:8080 --rate 4 --duration 60s --json
  forebay bench https://llm.example.org --api-key-env KEY --prompt-tokens 2000 --shared-prefix-tokens 1500")]
pub(crate) struct Bench {
    /// Base URL of any server with OpenAI's API, with or without /v1
    pub url: String,
    /// Model to ask for; the server's first where absent
    #[arg(long)]
    pub model: Option<String>,
    /// Environment variable that holds the API key
    #[arg(long, value_name = "NAME")]
    pub api_key_env: Option<String>,
    /// API to use
    #[arg(long, value_enum, default_value_t = Api::Chat)]
    pub endpoint: Api,
    /// Requests in flight at any time
    #[arg(short, long, default_value_t = 1, value_name = "N", conflicts_with = "rate")]
    pub concurrency: u32,
    /// Requests per second on average, whether or not earlier ones are done (Poisson arrivals)
    #[arg(long, value_name = "PER_SECOND")]
    pub rate: Option<f64>,
    /// With --rate: equal distances instead of random ones
    #[arg(long, requires = "rate")]
    pub constant: bool,
    /// Requests to measure
    #[arg(short = 'n', long, default_value_t = 100, value_name = "N")]
    pub requests: u64,
    /// Measure for this long instead (30s, 5m)
    #[arg(long, conflicts_with = "requests")]
    pub duration: Option<HumanDuration>,
    /// Requests before the measured ones
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub warmup: u64,
    /// Length of each prompt, in tokens
    #[arg(long, default_value_t = 128, value_name = "TOKENS")]
    pub prompt_tokens: u32,
    /// Of these, how many at the beginning are the same in all prompts
    #[arg(long, default_value_t = 0, value_name = "TOKENS")]
    pub shared_prefix_tokens: u32,
    /// Prompts from a file instead: one JSON string, or object with `prompt` or `messages`, per line
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// max_tokens of each request
    #[arg(long, default_value_t = 64, value_name = "TOKENS")]
    pub output_tokens: u32,
    /// Make every reply as long as --output-tokens (vLLM's field)
    #[arg(long)]
    pub ignore_eos: bool,
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Ask for whole replies; there is no TTFT and no ITL then
    #[arg(long)]
    pub no_stream: bool,
    /// Same seed, same prompts and arrivals; a random one where absent
    #[arg(long)]
    pub seed: Option<u64>,
    /// From sending a request to the end of its reply
    #[arg(long, default_value = "10m")]
    pub timeout: HumanDuration,
    /// One JSON object on stdout, with the field names of `vllm bench serve`
    #[arg(long)]
    pub json: bool,
}

#[derive(ValueEnum, Clone, Copy)]
pub(crate) enum Api {
    Chat,
    Completions,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kv_events_in_vllms_json() {
        let on = |text: &str| kv_events(text).expect("is right").config.expect("is on");
        let all = on(r#"{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:6000",
                         "replay_endpoint": "tcp://*:6001", "topic": "kv@a@m", "buffer_steps": 7, "hwm": 5}"#);
        assert_eq!((all.endpoint.to_string().as_str(), all.topic.as_str()), ("tcp://*:6000", "kv@a@m"));
        assert_eq!(
            (all.replay_endpoint.map(|at| at.to_string()), all.buffer_steps),
            (Some("tcp://*:6001".into()), 7)
        );
        let defaults = on(r#"{"enable_kv_cache_events": true}"#);
        assert_eq!(defaults.endpoint.to_string(), "tcp://*:5557");
        for off in [r#"{"enable_kv_cache_events": false}"#, r#"{"publisher": "null"}"#] {
            assert_eq!(kv_events(off), Ok(KvEventsFlag::default()), "{off}");
        }
        for incomplete in ["{}", r#"{"endpoint": "tcp://*:6000", "publisher": "zmq"}"#] {
            assert_eq!(kv_events(incomplete), Ok(KvEventsFlag { config: None, is_incomplete: true }));
        }
        for wrong in ["", "[]", r#"{"endpoint": "nowhere"}"#, r#"{"publisher": "kafka"}"#, r#"{"port": 1}"#] {
            assert!(kv_events(wrong).is_err(), "{wrong}");
        }
    }
}
