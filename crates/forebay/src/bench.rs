//! `forebay bench URL`.

use std::hash::{BuildHasher, RandomState};
use std::io::IsTerminal;
use std::sync::Mutex;

use forebay_config::{Environment, RealEnvironment, SecretValue};
use forebay_load::{Endpoint, Load, Options, Phase, Progress, Prompts, Snapshot, Until, run_until};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{Api, Bench};

/// In flight at most where a rate is asked for and the server does not keep up.
const RATE_IN_FLIGHT_MAX: u32 = 1024;

pub(crate) fn run(args: &Bench) -> anyhow::Result<()> {
    let options = options(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let bar = Bar(Mutex::new(None));
    let stop = async {
        // An interrupted run still reports what it has.
        let _ = tokio::signal::ctrl_c().await;
    };
    let report = runtime.block_on(run_until(&options, &bar, stop));
    bar.finish();
    let report = report?;
    if args.json {
        crate::out::line!("{}", report.to_json());
    } else {
        crate::out::line!("{report}");
    }
    anyhow::ensure!(report.completed > 0, "no request succeeded");
    Ok(())
}

fn options(args: &Bench) -> anyhow::Result<Options> {
    let api_key = match &args.api_key_env {
        None => None,
        Some(name) => {
            let key = RealEnvironment.var(name);
            let key = key
                .map_err(|_| anyhow::anyhow!("the environment variable {name} is not set (--api-key-env)"))?;
            Some(SecretValue::new(key))
        }
    };
    let load = match args.rate {
        None => Load::Concurrency(args.concurrency),
        Some(per_second) if args.constant => Load::Constant { per_second, in_flight_max: RATE_IN_FLIGHT_MAX },
        Some(per_second) => Load::Poisson { per_second, in_flight_max: RATE_IN_FLIGHT_MAX },
    };
    let prompts = match &args.prompts {
        Some(file) => Prompts::File(file.clone()),
        None => Prompts::Synthetic {
            prompt_tokens: args.prompt_tokens,
            shared_prefix_tokens: args.shared_prefix_tokens,
        },
    };
    let seed = args.seed.unwrap_or_else(|| RandomState::new().hash_one(0));
    if args.seed.is_none() {
        // A fixed default would send the prompts of the run before, and so measure the prefix cache.
        eprintln!("--seed {seed}");
    }
    Ok(Options {
        url: args.url.clone(),
        model: args.model.clone(),
        api_key,
        endpoint: match args.endpoint {
            Api::Chat => Endpoint::Chat,
            Api::Completions => Endpoint::Completions,
        },
        load,
        until: args
            .duration
            .map_or(Until::Requests(args.requests), |duration| Until::Duration(duration.get())),
        warmup_requests: args.warmup,
        prompts,
        output_tokens: args.output_tokens,
        ignore_eos: args.ignore_eos,
        temperature: Some(args.temperature),
        stream: !args.no_stream,
        seed,
        request_timeout: args.timeout.get(),
        ..Options::default()
    })
}

/// A bar on a terminal, nothing elsewhere.
struct Bar(Mutex<Option<(Phase, ProgressBar)>>);

impl Bar {
    fn finish(&self) {
        if let Ok(mut slot) = self.0.lock()
            && let Some((_, bar)) = slot.take()
        {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Bar {
    fn on_progress(&self, now: &Snapshot) {
        if !std::io::stderr().is_terminal() {
            return;
        }
        let Ok(mut slot) = self.0.lock() else { return };
        if slot.as_ref().is_none_or(|(phase, _)| *phase != now.phase) {
            if let Some((_, old)) = slot.take() {
                old.finish_and_clear();
            }
            *slot = Some((now.phase, new_bar(now)));
        }
        if let Some((_, bar)) = &*slot {
            bar.set_position(now.done);
            bar.set_message(format!(
                "{} in flight, {} failed, {:.0} tok/s",
                now.in_flight, now.failed, now.output_tokens_per_second
            ));
        }
    }
}

fn new_bar(now: &Snapshot) -> ProgressBar {
    let what = match now.phase {
        Phase::WarmUp => "warm-up",
        Phase::Measure => "measure",
    };
    let (bar, template) = match now.total {
        Some(total) => (ProgressBar::new(total), "{prefix} {bar:40} {pos}/{len} {elapsed} {msg}"),
        None => (ProgressBar::new_spinner(), "{prefix} {spinner} {pos} requests {elapsed} {msg}"),
    };
    bar.set_prefix(what);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}
