//! What `forebay worker` says to each flag of `vllm serve` that is not its own. Names are those of vLLM 0.32 and 0.33.

/// Flags that get the same answer.
pub(super) struct Group {
    /// What is done instead, or why it can't be done.
    pub why: &'static str,
    pub what: What,
    /// Flags without a value; each has a `--no-` too.
    switches: &'static str,
    /// Flags with one value.
    values: &'static str,
    /// Flags with one value or more.
    lists: &'static str,
}

pub(super) enum What {
    /// Accepted.
    NoEffect,
    /// Refused, but for values that ask for what is done anyway.
    RefusedUnless(&'static [&'static str]),
}

/// How many values a flag takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    None,
    One,
    Many,
}

const fn idle(why: &'static str, switches: &'static str, values: &'static str) -> Group {
    Group { why, what: What::NoEffect, switches, values, lists: "" }
}

const fn refused(why: &'static str, switches: &'static str, values: &'static str) -> Group {
    Group { why, what: What::RefusedUnless(&[]), switches, values, lists: "" }
}

impl Group {
    const fn lists(self, lists: &'static str) -> Self {
        Self { lists, ..self }
    }

    const fn unless(self, values: &'static [&'static str]) -> Self {
        Self { what: What::RefusedUnless(values), ..self }
    }

    /// Each flag, and what it takes.
    pub fn flags(&self) -> impl Iterator<Item = (&'static str, Takes)> {
        let of = |names: &'static str, takes| names.split_whitespace().map(move |name| (name, takes));
        of(self.switches, Takes::None).chain(of(self.values, Takes::One)).chain(of(self.lists, Takes::Many))
    }
}

/// The flag's group, and what it takes.
pub(super) fn find(name: &str) -> Option<(&'static Group, Takes)> {
    GROUPS.iter().find_map(|group| {
        let (_, takes) = group.flags().find(|(own, _)| *own == name)?;
        Some((group, takes))
    })
}

const ZERO: &[&str] = &["0"];
const ONE: &[&str] = &["1"];
const AUTO: &[&str] = &["auto"];

pub(super) static GROUPS: &[Group] = &[
    // The model.
    idle("the model's own tokenizer is used", "", "--tokenizer-mode"),
    refused("the model's own tokenizer is used", "--skip-tokenizer-init", "--tokenizer --tokenizer-revision"),
    idle("weights are computed in the precision of their file", "", "--dtype"),
    refused("models are GGUF files and safetensors directories", "", "--load-format")
        .unless(&["auto", "safetensors", "gguf"]),
    idle("the form of the files is told by themselves", "", "--config-format --model-impl"),
    idle("what a model does is told by its files", "", "--runner --convert"),
    idle("set FOREBAY_CACHE_DIR", "", "--download-dir"),
    refused("set HF_TOKEN", "", "--hf-token"),
    idle(
        "files are mapped into memory as they are",
        "--use-tqdm-on-load",
        "--safetensors-load-strategy --safetensors-prefetch-num-threads --safetensors-prefetch-block-size \
         --model-loader-extra-config --pt-load-map-location --max-parallel-loading-workers",
    )
    .lists("--ignore-patterns"),
    idle("no code of models is run", "--trust-remote-code", "--code-revision"),
    refused("pull the revision's file and give its path", "", "--revision").unless(&["main"]),
    refused("the model's files are taken as they are", "", "--hf-overrides --model-class-overrides --hf-config-path")
        .unless(&["{}"]),
    refused("sliding windows are part of the model", "--disable-sliding-window", ""),
    refused("give a file that is quantised already", "", "--quantization -q --quantization-config"),
    idle("give a file that is quantised already", "--allow-deprecated-quantization", ""),
    refused("a directory's own pooling is used", "", "--pooler-config"),
    refused("prompts are texts and token ids", "--enable-prompt-embeds", "--io-processor-plugin"),
    refused("log-probabilities are those of the raw logits", "--return-sampling-mask", "--logprobs-mode")
        .unless(&["raw_logprobs"]),
    refused("logits are changed by fields of requests only", "", "").lists("--logits-processors"),
    idle(
        "models here read text only",
        "--language-model-only --enable-mm-embeds --mm-encoder-only --interleave-mm-strings --skip-mm-profiling \
         --mm-device-do-normalize --trust-request-mm-kwargs --disable-chunked-mm-input",
        "--limit-mm-per-prompt --media-io-kwargs --mm-processor-kwargs --mm-processor-cache-gb --mm-processor-cache-type \
         --mm-hasher-algorithm --mm-shm-cache-max-object-size-mb --mm-encoder-tp-mode --mm-encoder-attn-backend \
         --mm-encoder-attn-dtype --mm-encoder-fp8-scale-path --mm-encoder-fp8-scale-save-path \
         --mm-encoder-fp8-scale-save-margin --video-pruning-rate --video-pruning-method --mm-tensor-ipc \
         --mm-processor-device --mm-ipc-gpu-memory-gb --allowed-local-media-path --ec-transfer-config \
         --ec-manager-config",
    )
    .lists("--allowed-media-domains"),
    idle(
        "models here have no such layers",
        "--enable-mamba-cache-stochastic-rounding --enable-mamba-shared-prefix-checkpoint --use-replayssm",
        "--mamba-backend --mamba-ssu-algorithm --mamba-cache-philox-rounds --mamba-cache-dtype --mamba-ssm-cache-dtype \
         --mamba-block-size --mamba-cache-mode --replayssm-buffer-len --gdn-prefill-backend --kda-prefill-backend \
         --kda-decode-backend --diffusion-config -dc --engram-config",
    ),
    refused(
        "adapters can't be loaded; merge them into the model",
        "--enable-lora",
        "--max-loras --max-lora-rank --default-mm-loras",
    )
    .lists("--lora-modules"),
    idle(
        "adapters can't be loaded; merge them into the model",
        "--enable-tower-connector-lora --fully-sharded-loras --specialize-active-lora --enable-mixed-moe-lora-format \
         --enable-moe-shared-loras",
        "--lora-dtype --max-cpu-loras --max-lora-cls-labels",
    )
    .lists("--lora-target-modules"),
    // The machine.
    refused("there is no GPU", "", "--device-ids"),
    refused("there is no GPU", "", "--device").unless(&["auto", "cpu"]),
    idle(
        "nothing is compiled",
        "--enforce-eager --enable-layerwise-nvtx-tracing --jit-monitor-verbose --cudagraph-metrics",
        "--compilation-config -cc -O --optimization-level --performance-mode --max-cudagraph-capture-size \
         --jit-monitor-mode",
    )
    .lists("--cudagraph-capture-sizes"),
    idle(
        "kernels are chosen by what the processor can",
        "--disable-cascade-attn --use-fp64-gumbel --enable-flashinfer-autotune --enable-flash-late-interaction",
        "--attention-backend --attention-config -ac --moe-backend --linear-backend --kernel-config --ir-op-priority \
         --sparse-indexer-topk-backend --additional-config",
    ),
    idle(
        "everything runs in one process",
        "--disable-custom-all-reduce --numa-bind --enable-shm-tensor-arena --ray-workers-use-nsight \
         --enable-nccl-comm-suspend --enable-cumem-allocator --enable-batch-sharded-sampling --enable-hc-sp \
         --fail-on-environ-validation",
        "--distributed-executor-backend --worker-cls --worker-extension-cls --renderer-num-workers",
    )
    .lists("--numa-bind-nodes --numa-bind-cpus"),
    idle(
        "a model runs on one machine",
        "",
        "--master-addr --master-port --distributed-timeout-seconds --cpu-distributed-timeout-seconds",
    ),
    refused("a model runs on one machine", "", "--nnodes -n").unless(ONE),
    refused("a model runs on one machine", "", "--node-rank -r").unless(ZERO),
    refused("a context is not divided among ranks", "", "--decode-context-parallel-size -dcp --prefill-context-parallel-size -pcp")
        .unless(ONE),
    idle(
        "a context is not divided among ranks",
        "--dcp-q-replicate",
        "--dcp-comm-backend --dcp-kv-cache-interleave-size --cp-kv-cache-interleave-size",
    ),
    refused("start more workers and list them in a router's fleet", "", "--data-parallel-size -dp").unless(ONE),
    refused(
        "start more workers and list them in a router's fleet",
        "--data-parallel-hybrid-lb -dph --data-parallel-external-lb -dpe --data-parallel-multi-port-external-lb -dpm",
        "--data-parallel-rank -dpn --data-parallel-start-rank -dpr --data-parallel-size-local -dpl",
    ),
    idle(
        "start more workers and list them in a router's fleet",
        "--disable-nccl-for-dp-synchronization --enable-fault-tolerance",
        "--data-parallel-address -dpa --data-parallel-rpc-port -dpp --data-parallel-backend -dpb --dp-sync-interval \
         --data-parallel-supervisor-port --dp-supervisor-probe-interval-s --dp-supervisor-probe-timeout-s \
         --dp-supervisor-probe-failure-threshold --fault-tolerance-config",
    ),
    refused("mixtures of experts are not run", "--enable-expert-parallel -ep --enable-return-routed-experts", ""),
    idle(
        "mixtures of experts are not run",
        "--enable-ep-weight-filter --enable-dbo --enable-elastic-ep --enable-eplb",
        "--all2all-backend --ubatch-size --elastic-ep-max-dp-size --dbo-decode-token-threshold \
         --dbo-prefill-token-threshold --eplb-config --expert-placement-strategy",
    ),
    refused("the admin API unloads models: /api/models/unload", "--enable-sleep-mode", "--weight-transfer-config"),
    idle("the admin API unloads models: /api/models/unload", "--sleep-mode-offload-cudagraph", "")
        .lists("--sleep-preserve-parameter-names"),
    // The KV cache.
    idle(
        "--kv-cache-memory-bytes is the size of the KV cache",
        "",
        "--gpu-memory-utilization --device-memory-utilization --swap-space",
    ),
    idle("blocks are hashed as `sha256_cbor`", "", "--prefix-caching-hash-algo"),
    idle(
        "a block stays until its memory is needed",
        "--swa-bounded-replay --disable-hybrid-kv-cache-manager",
        "--prefix-cache-retention-interval --prefix-match-unit",
    ),
    refused("the KV cache has 16-bit floats", "", "--kv-cache-dtype").unless(&["auto", "float16"]),
    idle("the KV cache has 16-bit floats", "--kv-sharing-fast-prefill", "").lists("--kv-cache-dtype-skip-layers"),
    refused("the KV cache is in the machine's memory already", "", "--kv-offloading-size"),
    refused("weights are in the machine's memory already", "", "--cpu-offload-gb").unless(ZERO),
    idle(
        "weights are in the machine's memory already",
        "",
        "--kv-offloading-backend --offload-backend --offload-group-size --offload-num-in-group --offload-prefetch-step",
    )
    .lists("--cpu-offload-params --offload-params"),
    refused("KV blocks are not sent to other workers", "", "--kv-transfer-config"),
    // The scheduler.
    idle("prefill is always chunked", "--enable-chunked-prefill", ""),
    idle("a request's `priority` always counts; equal ones take turns by tenant", "", "--scheduling-policy"),
    idle("a prompt is admitted only where all of it fits", "--scheduler-reserve-full-isl", ""),
    idle("1 % of the blocks is kept free", "", "--watermark"),
    idle("planning takes microseconds", "--async-scheduling", ""),
    refused("--max-num-seqs is the limit", "", "--max-num-active-seqs"),
    refused("--max-num-batched-tokens is the limit", "", "--max-num-scheduled-tokens"),
    refused("--itl-slo-ms bounds prefill beside decodes", "--long-prefill-token-threshold-adaptive", ""),
    refused("--itl-slo-ms bounds prefill beside decodes", "", "--long-prefill-token-threshold").unless(ZERO),
    refused("every step may have prefill", "", "--prefill-schedule-interval").unless(ONE),
    refused("the scheduler is built in", "", "--scheduler-cls"),
    refused("requests ask for `stream_interval`", "", "--stream-interval").unless(ONE),
    refused("there is no speculative decoding", "", "--speculative-config -sc --spec-method --spec-model --spec-tokens"),
    refused("output is not watermarked", "", "--watermark-config"),
    // What clients see.
    idle("templates get texts", "", "--chat-template-content-format"),
    refused("--chat-template sets it for all requests", "--trust-request-chat-template", ""),
    refused("requests bring `chat_template_kwargs`", "", "--default-chat-template-kwargs").unless(&["{}"]),
    refused("answers are the assistant's", "", "--response-role").unless(&["assistant"]),
    idle("tools can always be called", "--enable-auto-tool-choice", ""),
    refused("tools are always in the prompt", "--exclude-tools-when-tool-choice-none", ""),
    refused("the forms of --tool-call-parser are built in", "", "--tool-parser-plugin"),
    refused("the forms of --reasoning-parser are built in", "", "--reasoning-parser-plugin"),
    refused("calls are held to their schemas where `tool_choice` wants them", "", "--tool-strict-level").unless(AUTO),
    refused("tools are called by clients", "", "--tool-server"),
    idle("constraints are followed by llguidance", "", "--structured-outputs-config"),
    idle("reasoning is not limited", "", "--reasoning-config"),
    idle("`cached_tokens` is always there", "--enable-prompt-tokens-details", ""),
    idle("`x-request-id` is always there", "--enable-request-id-headers", ""),
    idle("replies have no `system_fingerprint`", "", "--fingerprint-mode --fingerprint-value"),
    refused("/api/requests of the admin port has them", "--enable-per-request-metrics", ""),
    idle("/load is always right", "--enable-server-load-tracking", ""),
    idle("these endpoints are always there", "--enable-scale-out", ""),
    refused("the other endpoints are always there", "--tokens-only", ""),
    idle(
        "there is no such endpoint",
        "--cohere-is-reasoning-model",
        "--cohere-format --anthropic-disabled-thinking-effort",
    ),
    // The server.
    refused("every worker answers HTTP", "--headless", ""),
    refused("there is no gRPC", "--grpc", "--grpc-port"),
    refused("one process answers, with as many threads as there are cores", "", "--api-server-count -asc").unless(ONE),
    refused("give flags, or `forebay serve --config` a forebay.yaml", "", "--config"),
    refused("clients show keys, not certificates", "", "--ssl-ca-certs"),
    refused("clients show keys, not certificates", "", "--ssl-cert-reqs").unless(ZERO),
    refused("ciphers are those of rustls", "", "--ssl-ciphers"),
    refused("a new certificate is read at the next start", "--enable-ssl-refresh", ""),
    refused("keys are bearer tokens, not cookies", "--allow-credentials", ""),
    refused("every origin of --allowed-origins may send all methods and headers", "", "--allowed-methods --allowed-headers")
        .unless(&["[\"*\"]"]),
    refused("no code of others is run", "", "--middleware"),
    idle("heads have limits of their own", "", "--h11-max-incomplete-event-size --h11-max-header-count"),
    idle("there are none", "--disable-fastapi-docs --enable-offline-docs", ""),
    // Logs and numbers.
    idle("numbers are on /metrics, not in the log", "--disable-log-stats --aggregate-engine-logging", ""),
    idle(
        "the log level shows requests: RUST_LOG=forebay=debug",
        "--enable-log-requests --disable-log-requests --enable-logging-iteration-details",
        "",
    ),
    idle("prompts and answers are not logged", "--enable-log-outputs --enable-log-deltas", "--max-log-len"),
    idle(
        "set RUST_LOG",
        "--disable-uvicorn-access-log --log-error-stack",
        "--uvicorn-log-level --disable-access-log-for-endpoints --logging-config --log-level --log-config-file",
    ),
    idle("blocks are not sampled", "--kv-cache-metrics", "--kv-cache-metrics-sample"),
    idle("there are no such numbers", "--enable-mfu-metrics", "--per-request-spec-decode-metrics"),
    refused("buckets are vLLM's own", "", "--custom-histogram-buckets"),
    refused(
        "traces are not exported; /api/requests of the admin port has them",
        "",
        "--otlp-traces-endpoint",
    )
    .lists("--collect-detailed-traces"),
    refused("steps are profiled from outside, by `perf`", "--enable-trace-replay", "--profiler-config --aux-output-config"),
];
