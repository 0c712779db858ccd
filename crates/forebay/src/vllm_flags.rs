//! Flags of `vllm serve` that `forebay worker` does not have as its own: those that mean nothing here are accepted
//! with a word on what is done instead, the rest is refused with the reason. Nothing is swallowed in silence. Pure.

/// What of vLLM's command line is left for our own parser, and what to say about the rest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sifted {
    pub args: Vec<String>,
    pub warnings: Vec<String>,
}

/// A flag of vLLM's.
struct Flag {
    name: &'static str,
    value: bool,
    what: What,
}

enum What {
    /// Accepted.
    NoEffect(&'static str),
    /// Refused, but for values that ask for what is done anyway.
    Refused { unless: &'static [&'static str], why: &'static str },
}

const fn idle(name: &'static str, value: bool, why: &'static str) -> Flag {
    Flag { name, value, what: What::NoEffect(why) }
}

const fn refused(
    name: &'static str,
    value: bool,
    unless: &'static [&'static str],
    why: &'static str,
) -> Flag {
    Flag { name, value, what: What::Refused { unless, why } }
}

const GPU: &str = "there is no GPU";
const ONE_MACHINE: &str = "a model runs on one machine";
const SLO: &str = "--itl-slo-ms bounds prefill beside decodes";
const MERGED: &str = "adapters can't be loaded; merge them into the model";
const COMPILED: &str = "nothing is compiled";
const KV_MEMORY: &str = "--kv-cache-memory-bytes is the size of the KV cache";
const LOG: &str = "set RUST_LOG";

/// vLLM 0.33's names.
const FLAGS: &[Flag] = &[
    idle("--tokenizer-mode", true, "the model's own tokenizer is used"),
    idle("--dtype", true, "weights are computed in the precision of their file"),
    refused(
        "--load-format",
        true,
        &["auto", "safetensors", "gguf"],
        "models are GGUF files and safetensors directories",
    ),
    idle("--download-dir", true, "set FOREBAY_CACHE_DIR"),
    idle("--trust-remote-code", false, "no code of models is run"),
    idle("--chat-template-content-format", true, "templates get texts"),
    idle("--enforce-eager", false, COMPILED),
    idle("--attention-backend", true, "kernels are chosen by what the processor can"),
    idle("--distributed-executor-backend", true, "everything runs in one process"),
    idle("--gpu-memory-utilization", true, KV_MEMORY),
    idle("--device-memory-utilization", true, KV_MEMORY),
    idle("--swap-space", true, KV_MEMORY),
    idle("--prefix-caching-hash-algo", true, "blocks are hashed as `sha256_cbor`"),
    idle("--enable-chunked-prefill", false, "prefill is always chunked"),
    idle("--no-enable-chunked-prefill", false, "prefill is always chunked"),
    idle(
        "--scheduling-policy",
        true,
        "a request's `priority` always counts; equal ones take turns by tenant",
    ),
    idle("--scheduler-reserve-full-isl", false, "a prompt is admitted only where all of it fits"),
    idle("--no-scheduler-reserve-full-isl", false, "a prompt is admitted only where all of it fits"),
    idle("--watermark", true, "1 % of the blocks is kept free"),
    idle("--async-scheduling", false, "planning takes microseconds"),
    idle("--no-async-scheduling", false, "planning takes microseconds"),
    idle("--compilation-config", true, COMPILED),
    idle("-cc", true, COMPILED),
    idle("-O", true, COMPILED),
    idle("--optimization-level", true, COMPILED),
    idle("--enable-auto-tool-choice", false, "tools can always be called"),
    idle("--structured-outputs-config", true, "constraints are followed by llguidance"),
    idle("--disable-log-stats", false, "numbers are on /metrics, not in the log"),
    idle("--enable-log-requests", false, "the log level shows requests: RUST_LOG=forebay=debug"),
    idle("--disable-log-requests", false, "the log level shows requests: RUST_LOG=forebay=debug"),
    idle("--no-enable-log-requests", false, "the log level shows requests: RUST_LOG=forebay=debug"),
    idle("--uvicorn-log-level", true, LOG),
    idle("--disable-uvicorn-access-log", false, LOG),
    idle("--max-log-len", true, "prompts are not logged"),
    idle("--disable-fastapi-docs", false, "there are none"),
    idle("--enable-prompt-tokens-details", false, "`cached_tokens` is always there"),
    idle("--enable-request-id-headers", false, "`x-request-id` is always there"),
    idle("--kv-cache-metrics", false, "blocks are not sampled"),
    refused("--data-parallel-size", true, &["1"], "start more workers and list them in a router's fleet"),
    refused("-dp", true, &["1"], "start more workers and list them in a router's fleet"),
    refused("--nnodes", true, &["1"], ONE_MACHINE),
    refused("-n", true, &["1"], ONE_MACHINE),
    refused("--node-rank", true, &["0"], ONE_MACHINE),
    refused("-r", true, &["0"], ONE_MACHINE),
    idle("--master-addr", true, ONE_MACHINE),
    idle("--master-port", true, ONE_MACHINE),
    idle("--distributed-timeout-seconds", true, ONE_MACHINE),
    idle("--disable-custom-all-reduce", false, "ranks are threads of one process"),
    refused("--headless", false, &[], "every worker answers HTTP"),
    refused(
        "--api-server-count",
        true,
        &["1"],
        "one process answers, with as many threads as there are cores",
    ),
    refused("-asc", true, &["1"], "one process answers, with as many threads as there are cores"),
    refused("--config", true, &[], "give flags, or `forebay serve --config` a forebay.yaml"),
    refused("--enable-expert-parallel", false, &[], "mixtures of experts are not run"),
    refused("--device", true, &["auto", "cpu"], GPU),
    refused("--device-ids", true, &[], GPU),
    refused("--tokenizer", true, &[], "the model's own tokenizer is used"),
    refused("--revision", true, &["main"], "pull the revision's file and give its path"),
    refused("--hf-overrides", true, &["{}"], "the model's file is taken as it is"),
    refused("--quantization", true, &[], "give a file that is quantised already"),
    refused("-q", true, &[], "give a file that is quantised already"),
    refused("--kv-cache-dtype", true, &["auto", "float16"], "the KV cache has 16-bit floats"),
    refused("--kv-offloading-size", true, &[], "the KV cache is in the machine's memory already"),
    refused("--cpu-offload-gb", true, &["0"], "weights are in the machine's memory already"),
    refused("--max-num-active-seqs", true, &[], "--max-num-seqs is the limit"),
    refused("--long-prefill-token-threshold", true, &["0"], SLO),
    refused("--long-prefill-token-threshold-adaptive", false, &[], SLO),
    refused("--prefill-schedule-interval", true, &["1"], "every step may have prefill"),
    refused("--stream-interval", true, &["1"], "requests ask for `stream_interval`"),
    refused("--kv-transfer-config", true, &[], "KV blocks are not sent to other workers"),
    refused("--speculative-config", true, &[], "there is no speculative decoding"),
    refused("-sc", true, &[], "there is no speculative decoding"),
    refused("--enable-lora", false, &[], MERGED),
    refused("--lora-modules", true, &[], MERGED),
    refused("--max-loras", true, &[], MERGED),
    refused("--max-lora-rank", true, &[], MERGED),
    refused("--exclude-tools-when-tool-choice-none", false, &[], "tools are always in the prompt"),
    refused("--tool-parser-plugin", true, &[], "the forms of --tool-call-parser are built in"),
    refused("--reasoning-parser-plugin", true, &[], "the forms of --reasoning-parser are built in"),
    refused("--grpc-port", true, &[], "there is no gRPC"),
    idle("--enable-server-load-tracking", false, "/load is always right"),
    refused(
        "--otlp-traces-endpoint",
        true,
        &[],
        "traces are not exported; /api/requests of the admin port has them",
    ),
];

/// Switches of our own that are off by default; vLLM has a `--no-` to each.
const OFF: &[&str] =
    &["enable-force-include-usage", "return-tokens-as-token-ids", "enable-tokenizer-info-endpoint"];

/// Short names of flags that are our own. (A short flag of our parser has one letter.)
const SHORT: &[(&str, &str)] = &[("-tp", "--tensor-parallel-size"), ("-pp", "--pipeline-parallel-size")];

/// Goes through the arguments behind `worker`.
///
/// As in vLLM, `--max_model_len` is `--max-model-len`. Flags that vLLM does not have are left in place.
///
/// # Errors
/// The flag and why it can't be done.
pub(crate) fn sift(args: impl IntoIterator<Item = String>) -> Result<Sifted, String> {
    let mut sifted = Sifted { args: Vec::new(), warnings: Vec::new() };
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let (name, inline) = split(&arg);
        if is_off_anyway(&name) {
            continue;
        }
        let Some(flag) = FLAGS.iter().find(|flag| flag.name == name) else {
            sifted.args.push(match inline {
                Some(value) if name.starts_with("--") => format!("{name}={value}"),
                None if name.starts_with("--") => name,
                _ => arg,
            });
            continue;
        };
        let value = match (flag.value, inline) {
            (true, None) => args.next().ok_or_else(|| format!("{name} needs a value"))?,
            (true, Some(value)) => value,
            (false, _) => String::new(),
        };
        match &flag.what {
            What::NoEffect(why) => sifted.warnings.push(format!("{name} has no effect: {why}")),
            What::Refused { unless, .. } if flag.value && unless.contains(&value.as_str()) => {}
            // Not the value: it may be a key.
            What::Refused { why, .. } => return Err(format!("{name} is not supported: {why}")),
        }
    }
    Ok(sifted)
}

/// `--no-X` where X is off by default, or is refused.
fn is_off_anyway(name: &str) -> bool {
    let is_refused = |switch: &Flag| !switch.value && matches!(switch.what, What::Refused { .. });
    name.strip_prefix("--no-").is_some_and(|on| {
        OFF.contains(&on)
            || FLAGS.iter().any(|flag| flag.name.strip_prefix("--") == Some(on) && is_refused(flag))
    })
}

/// `--a_b=c` is `--a-b` with `c`; `-O3` is `-O` with `3`; `-tp` is `--tensor-parallel-size`.
fn split(arg: &str) -> (String, Option<String>) {
    if let Some(level) = arg.strip_prefix("-O").filter(|level| !level.is_empty()) {
        return ("-O".to_owned(), Some(level.to_owned()));
    }
    for (short, long) in SHORT {
        match arg.strip_prefix(short).map(|rest| (rest, rest.strip_prefix('='))) {
            Some(("", _)) => return ((*long).to_owned(), None),
            Some((_, Some(value))) => return ((*long).to_owned(), Some(value.to_owned())),
            _ => {}
        }
    }
    if !arg.starts_with("--") {
        return (arg.to_owned(), None);
    }
    match arg.split_once('=') {
        Some((name, value)) => (name.replace('_', "-"), Some(value.to_owned())),
        None => (arg.replace('_', "-"), None),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn sifted(args: &str) -> Result<Sifted, String> {
        sift(args.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn our_own_flags_pass() {
        let check = |args: &str, expect: &str| {
            let left = sifted(args).expect("nothing is refused");
            assert_eq!((left.args.join(" "), left.warnings), (expect.to_owned(), Vec::new()), "{args}");
        };
        check("--model m --port 8001", "--model m --port 8001");
        check("m --max_model_len=64 --max_num_seqs 4", "m --max-model-len=64 --max-num-seqs 4");
        check("--served-model-name my_model", "--served-model-name my_model");
        check("--nonsense_flag x", "--nonsense-flag x");
        check("-h", "-h");
        // They ask for what is done anyway.
        check("m -dp 1 --kv-cache-dtype=auto --stream_interval 1 --device cpu --load-format=gguf", "m");
        check(
            "m --no-enable-lora --no_enable_force_include_usage --no-long-prefill-token-threshold-adaptive",
            "m",
        );
        check("m --max-model-len -1", "m --max-model-len -1");
        check("m -tp 3 -pp=2", "m --tensor-parallel-size 3 --pipeline-parallel-size=2");
        check("-topology x", "-topology x");
    }

    #[test]
    fn what_changes_nothing_is_said() {
        let left = sifted("m --dtype bfloat16 --enforce-eager -O3 --gpu_memory_utilization=0.9 --port 1");
        let left = left.expect("nothing is refused");
        assert_eq!(left.args, ["m", "--port", "1"]);
        let starts: Vec<&str> = left.warnings.iter().filter_map(|text| text.split(" has").next()).collect();
        assert_eq!(starts, ["--dtype", "--enforce-eager", "-O", "--gpu-memory-utilization"]);
    }

    #[test]
    fn what_would_change_something_is_refused() {
        let check = |args: &str, expect: &str| {
            let error = sifted(args).expect_err("is refused");
            assert!(error.starts_with(expect), "{error}");
        };
        check("m --data-parallel-size 2", "--data-parallel-size is not supported: ");
        check("m -dp 2", "-dp is not supported: ");
        check("m --device cuda", "--device is not supported: there is no GPU");
        check("m --enable-lora", "--enable-lora is not supported: ");
        check("m --quantization", "--quantization needs a value");
        check("m --load-format dummy", "--load-format is not supported: ");
    }

    #[test]
    fn no_flag_stands_twice_and_none_is_our_own() {
        let command = crate::cli::Cli::command();
        let worker = command.find_subcommand("worker").expect("is there");
        let own: Vec<String> =
            worker.get_arguments().filter_map(|arg| arg.get_long()).map(|long| format!("--{long}")).collect();
        for (n, flag) in FLAGS.iter().enumerate() {
            assert!(FLAGS[..n].iter().all(|other| other.name != flag.name), "{} twice", flag.name);
            assert!(!own.iter().any(|own| own == flag.name), "{} is ours", flag.name);
        }
    }

    /// What people start `vllm serve` with: each flag is one of ours, has no effect and says so, or is refused with the
    /// reason. With a value that asks for something.
    #[test]
    fn every_flag_that_matters_has_an_answer() {
        const OURS: &str = "--model m,--served-model-name a,--seed 0,--max-model-len auto,--generation-config auto,\
            --override-generation-config {},--chat-template x,--max-logprobs 5,--tensor-parallel-size 2,-tp 2,\
            --pipeline-parallel-size 2,-pp 2,--block-size 16,--kv-cache-memory-bytes 1G,--num-gpu-blocks-override 9,\
            --enable-prefix-caching,--no-enable-prefix-caching,--max-num-batched-tokens 2k,--max-num-seqs 4,\
            --max-num-queued-reqs 4,--max-num-queued-tokens 4k,--kv-events-config {},--host h,--port 1,--uds s,\
            --api-key k,--ssl-keyfile f,--ssl-certfile f,--allowed-origins [],--root-path /p,--tool-call-parser hermes,\
            --reasoning-parser qwen3,--enable-force-include-usage,--return-tokens-as-token-ids,\
            --enable-tokenizer-info-endpoint,--shutdown-timeout 0,--sse-keep-alive-interval 0";
        const WITHOUT_EFFECT: &str = "--tokenizer-mode auto,--dtype auto,--download-dir d,--trust-remote-code,\
            --chat-template-content-format auto,--enforce-eager,--distributed-executor-backend mp,--master-addr a,\
            --master-port 1,--gpu-memory-utilization 0.9,--prefix-caching-hash-algo sha256,--scheduling-policy priority,\
            --enable-chunked-prefill,--no-enable-chunked-prefill,--scheduler-reserve-full-isl,\
            --no-scheduler-reserve-full-isl,--watermark 0.1,--async-scheduling,--no-async-scheduling,\
            --structured-outputs-config {},--compilation-config {},-O3,-O 3,--enable-auto-tool-choice,\
            --enable-server-load-tracking,--enable-prompt-tokens-details,--enable-request-id-headers,\
            --disable-log-stats,--enable-log-requests,--kv-cache-metrics";
        const REFUSED: &str = "--tokenizer t,--quantization awq,-q awq,--load-format dummy,--revision r,\
            --hf-overrides {\"a\":1},--data-parallel-size 2,-dp 2,--nnodes 2,--node-rank 1,--device-ids 0,\
            --kv-cache-dtype fp8,--kv-offloading-size 1,--cpu-offload-gb 1,--max-num-active-seqs 4,\
            --long-prefill-token-threshold 512,--long-prefill-token-threshold-adaptive,--prefill-schedule-interval 2,\
            --stream-interval 2,--kv-transfer-config {},--speculative-config {},--enable-lora,--max-loras 2,\
            --max-lora-rank 8,--lora-modules a=b,--otlp-traces-endpoint u,--grpc-port 1";
        let command = crate::cli::Cli::command();
        let worker = command.find_subcommand("worker").expect("is there");
        let is_own = |long: &str| worker.get_arguments().any(|arg| arg.get_long() == long.strip_prefix("--"));
        let each = |list: &'static str| list.split(',').map(str::trim);
        for flag in each(OURS) {
            let left = sifted(flag).expect(flag);
            assert!(left.warnings.is_empty() && is_own(&left.args[0]), "{flag}: {left:?}");
        }
        for flag in each(WITHOUT_EFFECT) {
            let left = sifted(flag).expect(flag);
            assert!(left.args.is_empty() && left.warnings.len() == 1, "{flag}: {left:?}");
        }
        for flag in each(REFUSED) {
            let error = sifted(flag).expect_err(flag);
            let name = flag.split(' ').next().expect("one word");
            assert!(error.starts_with(&format!("{name} is not supported: ")), "{flag}: {error}");
        }
    }
}
