//! `forebay serve` and `forebay worker`: start, say what runs where, serve until told to stop.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context;
use forebay_app::check::problems;
use forebay_app::{AdminConfig, Config, StartError, Summary, prepare};
use forebay_config::{Loaded, OneOrMany, RealEnvironment, Source};
use forebay_edge::{EdgeConfig, Switch};
use forebay_engine::EngineConfig;

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
    let engine = EngineConfig {
        model: args.model.clone(),
        served_model_name: args.served_model_name.clone(),
        max_model_len: args.max_model_len,
        kv_cache_memory: args.kv_cache_memory_bytes.unwrap_or(defaults.kv_cache_memory),
        block_size: args.block_size.unwrap_or(defaults.block_size),
        max_num_batched_tokens: args.max_num_batched_tokens.unwrap_or(defaults.max_num_batched_tokens),
        max_num_seqs: args.max_num_seqs.unwrap_or(defaults.max_num_seqs),
        max_num_queued_reqs: args.max_num_queued_reqs.unwrap_or(defaults.max_num_queued_reqs),
        max_num_queued_tokens: args.max_num_queued_tokens.unwrap_or(defaults.max_num_queued_tokens),
        enable_prefix_caching: !args.no_enable_prefix_caching,
        threads: args.threads,
        ..defaults
    };
    let listen = |port| SocketAddr::new(args.host, port).into();
    let config = Config {
        edge: Some(EdgeConfig {
            listen: OneOrMany::one(listen(args.port)),
            // Where scrapers and routers made for vLLM look.
            metrics: Switch::On,
            ..EdgeConfig::default()
        }),
        admin: args.admin_port.map(|port| AdminConfig { listen: listen(port), ..AdminConfig::default() }),
        engine: Some(engine),
        ..Config::default()
    };
    run(&config, None)
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
    found.extend(loaded.plain_secret_warnings());
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
    runtime.block_on(async {
        let progress = PullProgress::default();
        let prepared = prepare(config, &RealEnvironment, &progress).await;
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
        let report = ready.run(stop_signal()).await;
        tracing::info!(?report, "stopped");
        Ok(())
    })
}

/// SIGTERM (Kubernetes, systemd) or SIGINT (a person). A second one ends the process at once.
async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("signals can't be handled: this process won't drain");
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("draining: streams in flight finish, new connections are refused; signal again to stop at once");
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::warn!("stopped before the drain was complete");
        std::process::exit(130);
    });
}

/// What runs, where, and a line to try it with.
fn banner(summary: &Summary) {
    println!("forebay {}", forebay_app::VERSION);
    for (layer, does) in &summary.layers {
        println!("  {layer:<8} {does}");
    }
    if let Some(admin) = summary.admin {
        println!("  admin    http://{admin}/metrics /health /ready /api/requests");
    }
    let scheme = if summary.tls { "https" } else { "http" };
    let Some(address) = summary.listen.first() else { return };
    // A wildcard address is nothing to connect to.
    let host = match address.ip().is_unspecified() {
        true => format!("localhost:{}", address.port()),
        false => address.to_string(),
    };
    if let Some(model) = &summary.model {
        let insecure = if summary.tls { " --insecure" } else { "" };
        let key = if summary.needs_key { " -H \"authorization: Bearer $KEY\"" } else { "" };
        println!("\ntry it:\n  curl{insecure} {scheme}://{host}/v1/chat/completions -H 'content-type: application/json'{key} \\");
        println!("    -d '{{\"model\": \"{model}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Name three rivers.\"}}], \"max_tokens\": 64}}'\n");
    }
}
