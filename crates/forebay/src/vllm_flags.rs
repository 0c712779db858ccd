//! Flags of `vllm serve` that `forebay worker` does not have as its own: those that mean nothing here are accepted
//! with a word on what is done instead, the rest is refused with the reason. Nothing is swallowed in silence. Pure.

mod table;

use table::{Group, Takes, What, find};

/// What of vLLM's command line is left for our own parser, and what to say about the rest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sifted {
    pub args: Vec<String>,
    pub warnings: Vec<String>,
}

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
    let mut args = args.into_iter().peekable();
    while let Some(arg) = args.next() {
        let (name, inline) = split(&arg);
        if name.strip_prefix("--no-").is_some_and(|switch| OFF.contains(&switch)) {
            continue;
        }
        let Some(Known { group, takes, is_no }) = known(&name) else {
            sifted.args.push(match inline {
                Some(value) if name.starts_with("--") => format!("{name}={value}"),
                None if name.starts_with("--") => name,
                _ => arg,
            });
            continue;
        };
        let values: Vec<String> = match (takes, inline) {
            (Takes::None, _) => Vec::new(),
            (Takes::One | Takes::Many, Some(value)) => vec![value],
            (Takes::One, None) => args.next().into_iter().collect(),
            (Takes::Many, None) => {
                std::iter::from_fn(|| args.next_if(|value| !value.starts_with('-'))).collect()
            }
        };
        if takes != Takes::None && values.is_empty() {
            return Err(format!("{name} needs a value"));
        }
        let why = group.why;
        match &group.what {
            What::NoEffect => sifted.warnings.push(format!("{name} has no effect: {why}")),
            // They ask for what is done anyway.
            What::RefusedUnless(_) if is_no => {}
            What::RefusedUnless(same) if values.iter().any(|value| same.contains(&value.as_str())) => {}
            // Not the value: it may be a key.
            What::RefusedUnless(_) => return Err(format!("{name} is not supported: {why}")),
        }
    }
    Ok(sifted)
}

/// A flag that has an answer in the table.
struct Known {
    group: &'static Group,
    takes: Takes,
    /// It is the `--no-` of a switch.
    is_no: bool,
}

fn known(name: &str) -> Option<Known> {
    if let Some((group, takes)) = find(name) {
        return Some(Known { group, takes, is_no: false });
    }
    let (group, takes) = find(&format!("--{}", name.strip_prefix("--no-")?))?;
    (takes == Takes::None).then_some(Known { group, takes, is_no: true })
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

    /// The worker's own flags.
    fn own() -> Vec<String> {
        let command = crate::cli::Cli::command();
        let worker = command.find_subcommand("worker").expect("is there");
        worker.get_arguments().filter_map(|arg| arg.get_long()).map(|long| format!("--{long}")).collect()
    }

    #[test]
    fn no_flag_stands_twice_and_none_is_our_own() {
        let own = own();
        let mut seen = Vec::new();
        for (name, _) in table::GROUPS.iter().flat_map(Group::flags) {
            assert!(!seen.contains(&name), "{name} twice");
            assert!(!own.iter().any(|own| own == name), "{name} is ours");
            seen.push(name);
        }
    }

    /// The list is what vLLM's own parser says of itself: how many values, and the names.
    #[test]
    fn no_flag_of_vllm_is_unknown() {
        let own = own();
        for line in include_str!("vllm_flags/vllm_serve_0.32.txt").lines() {
            let (kind, names) = line.split_once(' ').expect("a kind and names");
            let (takes, values) = match kind {
                "switch" => (Takes::None, ""),
                "value" => (Takes::One, " x"),
                _ => (Takes::Many, " x y"),
            };
            for name in names.split(' ') {
                let args = format!("{name}{values}");
                match sifted(&args) {
                    Err(error) => {
                        assert!(error.starts_with(&format!("{name} is not supported: ")), "{error}")
                    }
                    Ok(Sifted { args, warnings }) if args.is_empty() => {
                        assert!(!warnings.is_empty() || name.starts_with("--no-"), "{name} is swallowed");
                    }
                    Ok(left) => assert!(own.contains(&left.args[0]), "{name}: {left:?}"),
                }
                if let Some((_, ours)) = find(name) {
                    assert_eq!(ours, takes, "{name}");
                }
            }
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
        let own = own();
        let each = |list: &'static str| list.split(',').map(str::trim);
        for flag in each(OURS) {
            let left = sifted(flag).expect(flag);
            assert!(left.warnings.is_empty() && own.contains(&left.args[0]), "{flag}: {left:?}");
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
