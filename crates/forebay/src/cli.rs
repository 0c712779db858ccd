//! The command line. Flags are defined here once; help and completions come from them.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use forebay_config::ByteSize;

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
  forebay model pull smollm2-135m-instruct";

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Run the layers that a configuration file names; without one, everything but the gateway on loopback
    Serve(Serve),
    /// Run one engine behind an OpenAI-compatible port, with vLLM's flag names
    Worker(Worker),
    /// Validate a configuration file and explain what it does
    Check(Check),
    /// Fetch and list models
    #[command(subcommand)]
    Model(Model),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  forebay completions bash > /etc/bash_completion.d/forebay")]
    Completions {
        shell: clap_complete::Shell,
    },
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
#[command(after_help = "Example:\n  forebay worker --model smollm2-135m-instruct --port 8001 --max-num-seqs 32")]
pub(crate) struct Worker {
    /// Known name, path to a GGUF file, or hf:ORG/REPO
    #[arg(long)]
    pub model: String,
    /// Name that clients use; the model's own where absent
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Port of /metrics, /ready and the admin API on the same address; off where absent
    #[arg(long, value_name = "PORT")]
    pub admin_port: Option<u16>,
    /// Longest prompt plus output, in tokens
    #[arg(long, value_name = "TOKENS")]
    pub max_model_len: Option<u32>,
    /// Sequences computed in one step at most
    #[arg(long, value_name = "N")]
    pub max_num_seqs: Option<u32>,
    /// Tokens computed in one step at most
    #[arg(long, value_name = "TOKENS")]
    pub max_num_batched_tokens: Option<u32>,
    /// Requests that may wait
    #[arg(long, value_name = "N")]
    pub max_num_queued_reqs: Option<u32>,
    /// Prompt tokens that may wait
    #[arg(long, value_name = "TOKENS")]
    pub max_num_queued_tokens: Option<u32>,
    /// Tokens per KV block
    #[arg(long, value_name = "TOKENS")]
    pub block_size: Option<u32>,
    /// Memory for KV blocks, as bytes or like 512MiB
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub kv_cache_memory_bytes: Option<ByteSize>,
    /// Reuse KV blocks of equal prefixes (the default)
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    pub enable_prefix_caching: bool,
    #[arg(long, overrides_with = "enable_prefix_caching")]
    pub no_enable_prefix_caching: bool,
    /// Compute threads; the machine's cores where absent
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,
    #[command(flatten)]
    pub log: Log,
}

/// vLLM writes bytes, people write 512MiB.
fn bytes(text: &str) -> Result<ByteSize, String> {
    match text.parse::<u64>() {
        Ok(bytes) => Ok(ByteSize::new(bytes)),
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
    #[command(after_help = "Examples:\n  forebay model pull smollm2-135m-instruct\n  forebay model pull ./model.gguf\n  forebay model pull hf:ORG/REPO-GGUF")]
    Pull {
        /// Known name, path to a GGUF file, or hf:ORG/REPO[/FILE]
        model: String,
        /// Print the file's path on stdout and nothing else
        #[arg(long)]
        print_path: bool,
    },
    /// Known models and what is in the cache
    List {
        #[arg(long)]
        json: bool,
    },
}
