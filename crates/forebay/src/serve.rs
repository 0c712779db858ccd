//! `forebay serve` and `forebay worker`: start, say what runs where, serve until told to stop.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use forebay_app::check::{problems, warnings};
use forebay_app::{AdminConfig, Config, StartError, Summary, prepare};
use forebay_config::{
    ByteSize, Environment, HumanDuration, ListenAddr, Loaded, OneOrMany, RealEnvironment, Source,
};
use forebay_edge::{EdgeConfig, ErrorForm, Switch};
use forebay_engine::{EngineConfig, GenerationSource};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::{Serve, Worker};
use crate::progress::PullProgress;

pub(crate) fn serve(args: &Serve) -> anyhow::Result<()> {
    crate::log::init(args.log);
    match &args.config {
        None => run(&Config::without_a_file(), None),
        Some(file) => {
            let loaded = load(file)?;
            run(&loaded.config, Some(&loaded))
        }
    }
}

pub(crate) fn worker(args: &Worker) -> anyhow::Result<()> {
    crate::log::init(args.log);
    let defaults = EngineConfig::default();
    if args.kv_events_config.as_ref().is_some_and(|flag| flag.is_incomplete) {
        tracing::warn!(
            "--kv-events-config publishes nothing without `\"enable_kv_cache_events\": true`, as vLLM's"
        );
    }
    let engine = EngineConfig {
        // The parser wants one of the two.
        model: args.model.clone().or_else(|| args.model_tag.clone()).unwrap_or_default(),
        served_model_name: args.served_model_name.clone().into(),
        max_model_len: args.max_model_len.and_then(|len| len.0),
        kv_cache_memory: match args.kv_cache_memory_bytes {
            Some(bytes) => Some(bytes),
            None => kv_cache_space(&RealEnvironment)?,
        },
        request_timeout: args.request_timeout.unwrap_or(defaults.request_timeout),
        block_size: args.block_size.unwrap_or(defaults.block_size),
        max_num_batched_tokens: args
            .max_num_batched_tokens
            .map_or(defaults.max_num_batched_tokens, |tokens| tokens.0),
        itl_slo: args.itl_slo_ms.map_or(defaults.itl_slo, |ms| HumanDuration::from_millis(ms.into())),
        max_num_seqs: args.max_num_seqs.unwrap_or(defaults.max_num_seqs),
        max_num_queued_reqs: args.max_num_queued_reqs.unwrap_or(defaults.max_num_queued_reqs),
        max_num_queued_tokens: args
            .max_num_queued_tokens
            .map_or(defaults.max_num_queued_tokens, |tokens| tokens.0),
        generation_config: args.generation_config.clone().map(GenerationSource::from).unwrap_or_default(),
        override_generation_config: args.override_generation_config.unwrap_or_default(),
        enable_prefix_caching: !args.no_enable_prefix_caching,
        tool_call_parser: args.tool_call_parser.unwrap_or(defaults.tool_call_parser),
        reasoning_parser: args.reasoning_parser.unwrap_or(defaults.reasoning_parser),
        num_gpu_blocks_override: args.num_gpu_blocks_override,
        chat_template: args.chat_template.clone(),
        max_logprobs: args.max_logprobs.unwrap_or(defaults.max_logprobs),
        seed: args.seed,
        enable_force_include_usage: args.enable_force_include_usage,
        return_tokens_as_token_ids: args.return_tokens_as_token_ids,
        enable_tokenizer_info_endpoint: args.enable_tokenizer_info_endpoint,
        show_hidden_metrics: args.show_hidden_metrics_for_version.is_some(),
        threads: args.threads,
        tensor_parallel_size: args.tensor_parallel_size.unwrap_or(defaults.tensor_parallel_size),
        pipeline_parallel_size: args.pipeline_parallel_size.unwrap_or(defaults.pipeline_parallel_size),
        kv_events: args.kv_events_config.clone().and_then(|flag| flag.config),
        ..defaults
    };
    let listen = |port: u16| -> anyhow::Result<ListenAddr> {
        let host = match args.host.contains(':') {
            true => format!("[{}]", args.host),
            false => args.host.clone(),
        };
        format!("{host}:{port}").parse().with_context(|| format!("--host {}", args.host))
    };
    let edge = EdgeConfig {
        listen: OneOrMany::one(listen(args.port)?),
        // Where scrapers, routers and operators look who know vLLM.
        metrics: Switch::On,
        operator_api: Switch::On,
        errors: ErrorForm::Vllm,
        ..EdgeConfig::default()
    };
    let config = Config {
        edge: Some(args.front.apply(edge, &RealEnvironment)),
        admin: match args.admin_port {
            Some(port) => Some(AdminConfig { listen: listen(port)?, ..AdminConfig::default() }),
            None => None,
        },
        engine: OneOrMany::one(engine),
        ..Config::default()
    };
    run(&config, None).map_err(|error| anyhow::anyhow!(in_flags(&forebay_app::one_line(error.as_ref()))))
}

/// vLLM's older way to say how large the KV cache is, in whole GiB.
fn kv_cache_space(env: &dyn Environment) -> anyhow::Result<Option<ByteSize>> {
    const NAME: &str = "VLLM_CPU_KVCACHE_SPACE";
    let Some(text) = env.var(NAME).ok().filter(|text| !text.is_empty()) else { return Ok(None) };
    match text.trim().parse::<u64>().ok().filter(|&gib| gib > 0 && gib < 1 << 30) {
        Some(gib) => Ok(Some(ByteSize::new(gib << 30))),
        None => anyhow::bail!("{NAME} is `{text}`; a number of GiB is expected, like 4"),
    }
}

/// A message with the worker's flags in the place of the configuration keys that they set.
fn in_flags(message: &str) -> String {
    const FLAGS: &[(&str, &str)] = &[
        ("edge.listen", "--port"),
        ("admin.listen", "--admin-port"),
        ("engine.kv-cache-memory", "--kv-cache-memory-bytes"),
        ("engine.max-model-len", "--max-model-len"),
        ("engine.model", "--model"),
        ("engine.served-model-name", "--served-model-name"),
        ("engine.block-size", "--block-size"),
        ("engine.max-num-batched-tokens", "--max-num-batched-tokens"),
        ("engine.max-num-seqs", "--max-num-seqs"),
        ("engine.max-num-queued-reqs", "--max-num-queued-reqs"),
        ("engine.max-num-queued-tokens", "--max-num-queued-tokens"),
        ("engine.threads", "--threads"),
        ("engine.tensor-parallel-size", "--tensor-parallel-size"),
        ("engine.pipeline-parallel-size", "--pipeline-parallel-size"),
        ("engine.tool-call-parser", "--tool-call-parser"),
        ("engine.itl-slo", "--itl-slo-ms"),
        ("engine.kv-events", "--kv-events-config"),
        ("engine.num-gpu-blocks-override", "--num-gpu-blocks-override"),
        ("engine.chat-template", "--chat-template"),
        ("engine.max-logprobs", "--max-logprobs"),
        ("engine.request-timeout", "--request-timeout"),
        ("engine.override-generation-config", "--override-generation-config"),
        ("engine.generation-config", "--generation-config"),
        ("engine.generation-config: vllm", "--generation-config vllm"),
        ("engine.reasoning-parser", "--reasoning-parser"),
        ("edge.access-keys[0]", "--api-key"),
        ("edge.cors-origins", "--allowed-origins"),
        ("edge.cors-origins[0]", "--allowed-origins"),
        ("edge.uds", "--uds"),
        ("edge.tls.cert", "--ssl-certfile"),
        ("edge.tls.key", "--ssl-keyfile"),
    ];
    FLAGS
        .iter()
        .fold(message.to_owned(), |text, (key, flag)| text.replace(&format!("`{key}`"), &format!("`{flag}`")))
}

/// Reads and checks a file; what is wrong is printed with its lines.
fn load(file: &Path) -> anyhow::Result<Loaded<Config>> {
    let source = Source::read(file)?;
    let loaded = match forebay_config::load::<Config>(&source) {
        Ok(loaded) => loaded,
        Err(diagnostics) => {
            eprintln!("{diagnostics}");
            anyhow::bail!("{} can't be used", file.display());
        }
    };
    let mut found = problems(&loaded, &RealEnvironment);
    let broken = !found.is_empty();
    found.extend(warnings(&loaded));
    if !found.is_empty() {
        eprintln!("{}", loaded.diagnostics(found));
    }
    anyhow::ensure!(!broken, "{} can't be used", file.display());
    Ok(loaded)
}

fn run(config: &Config, loaded: Option<&Loaded<Config>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("forebay-io")
        .enable_all()
        .build()
        .context("the I/O threads can't be started")?;
    let served = runtime.block_on(async {
        // Before the long start-up: as process 1 of a container we would not even be ended by an unhandled signal.
        let mut signals = StopSignals::new().context("signals can't be handled")?;
        let progress = PullProgress::default();
        let prepared = tokio::select! {
            prepared = prepare(config, &RealEnvironment, &progress) => prepared,
            () = signals.next() => {
                progress.finish();
                anyhow::bail!("stopped before it was ready");
            }
        };
        progress.finish();
        let ready = match (prepared, loaded) {
            (Ok(ready), _) => ready,
            (Err(StartError::Build(error)), Some(loaded)) => {
                eprintln!("{}", loaded.diagnostics([error.diagnostic(loaded)]));
                anyhow::bail!("{} can't be used", loaded.source().name);
            }
            (Err(error), _) => return Err(error.into()),
        };
        banner(&ready.summary);
        let report = ready.run(stop(signals)).await;
        tracing::info!(
            open = report.open,
            cut = report.cut,
            took_ms = report.took.as_millis() as u64,
            "stopped"
        );
        Ok(())
    });
    // Nothing that still runs (a model being loaded, a prompt being tokenized) is wanted any more.
    runtime.shutdown_background();
    served
}

/// SIGTERM (Kubernetes, systemd) and SIGINT (a person).
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Takes over both signals; from now on they end nothing by themselves.
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Ready at the first signal. A second one ends the process at once.
async fn stop(mut signals: StopSignals) {
    signals.next().await;
    tracing::info!(
        "draining: streams in flight finish, new connections are refused; signal again to stop at once"
    );
    tokio::spawn(async move {
        signals.next().await;
        tracing::warn!("stopped before the drain was complete");
        std::process::exit(130);
    });
}

/// What runs, where, and a line to try it with.
fn banner(summary: &Summary) {
    // Not `println!`, which panics where nobody reads: a server must not fail because of its greeting.
    let _ = std::io::stdout().write_all(greeting(summary).as_bytes());
}

fn greeting(summary: &Summary) -> String {
    let mut text = format!("forebay {}\n", forebay_app::VERSION);
    for (layer, does) in &summary.layers {
        text += &format!("  {layer:<8} {does}\n");
    }
    if let Some(admin) = summary.admin {
        text += &format!("  admin    http://{admin}/metrics /health /ready /api/requests\n");
    }
    let scheme = if summary.tls { "https" } else { "http" };
    let (host, socket) = match (summary.listen.first(), &summary.uds) {
        // A wildcard address is nothing to connect to.
        (Some(address), _) if address.ip().is_unspecified() => {
            (format!("localhost:{}", address.port()), String::new())
        }
        (Some(address), _) => (address.to_string(), String::new()),
        (None, Some(path)) => ("localhost".to_owned(), format!(" --unix-socket {}", path.display())),
        (None, None) => return text,
    };
    if let Some(model) = &summary.model {
        let insecure = if summary.tls { " --insecure" } else { "" };
        let key = if summary.needs_key { " -H \"authorization: Bearer $KEY\"" } else { "" };
        let (path, body) = match summary.embeds {
            true => ("embeddings", "\"input\": \"Rivers run to the sea.\""),
            false => (
                "chat/completions",
                "\"messages\": [{\"role\": \"user\", \"content\": \"Name three rivers.\"}], \"max_tokens\": 64",
            ),
        };
        text += &format!(
            "\ntry it:\n  curl{insecure}{socket} {scheme}://{host}/v1/{path} -H 'content-type: application/json'{key} \\\n"
        );
        text += &format!("    -d '{{\"model\": \"{model}\", {body}}}'\n\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_to_try_it_with() {
        let summary = Summary {
            listen: vec![([0, 0, 0, 0], 8000).into()],
            uds: None,
            tls: false,
            admin: None,
            layers: Vec::new(),
            model: Some("m".to_owned()),
            embeds: false,
            needs_key: false,
        };
        let check = |change: fn(&mut Summary), expect: &str| {
            let mut summary = summary.clone();
            change(&mut summary);
            let text = greeting(&summary);
            assert!(text.contains(expect), "{text}");
        };
        check(|_| {}, "curl http://localhost:8000/v1/chat/completions ");
        check(|_| {}, r#"{"model": "m", "messages": ["#);
        check(|s| s.embeds = true, "curl http://localhost:8000/v1/embeddings ");
        check(|s| s.embeds = true, r#"{"model": "m", "input": ""#);
        let by_socket =
            |s: &mut Summary| (s.listen, s.uds, s.needs_key) = (Vec::new(), Some("/run/s".into()), true);
        check(by_socket, "curl --unix-socket /run/s http://localhost/v1/chat/completions ");
        check(by_socket, "Bearer $KEY");
    }

    #[test]
    fn a_worker_is_told_its_own_flags() {
        assert_eq!(
            in_flags("address 127.0.0.1:8000 is already in use; stop the other program or set `edge.listen`"),
            "address 127.0.0.1:8000 is already in use; stop the other program or set `--port`"
        );
        assert_eq!(in_flags("`engine.max-model-len` is 9"), "`--max-model-len` is 9");
        assert_eq!(in_flags("`edge.access-keys[0]` can't be fetched"), "`--api-key` can't be fetched");
        assert_eq!(
            in_flags("`engine.generation-config: vllm` leaves them out"),
            "`--generation-config vllm` leaves them out"
        );
    }
}
