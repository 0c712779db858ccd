//! The engine against llama.cpp's server: same GGUF file, same number of threads, same load.

use std::path::Path;
use std::process::Command;

use super::Bench;
use super::begun::Begun;
use super::contest::{self, Contestant, Running, Turns};
use super::document::{details, table};
use super::generator::{Generator, Work};
use super::llama_cpp;
use super::machine;
use super::server::{Scratch, Server, free_port};

/// The peer's sequences: how many at a time, and how many tokens each may have.
#[derive(Debug, Clone, Copy)]
pub struct Slots {
    pub count: u32,
    pub tokens: u32,
}

/// The longest load here has 512 tokens and its chat template.
const SLOTS: Slots = Slots { count: 32, tokens: 1024 };

/// What every server calls its model.
pub const NAME: &str = "bench";

/// A number that is compared: its name in the generator's JSON, and whether more of it is better.
struct Metric {
    name: &'static str,
    key: &'static str,
    more_is_better: bool,
}

const THROUGHPUT: Metric = Metric { name: "output tokens/s", key: "output_throughput", more_is_better: true };
const TTFT: Metric = Metric { name: "TTFT p50, ms", key: "median_ttft_ms", more_is_better: false };
const TTFT_P99: Metric = Metric { name: "TTFT p99, ms", key: "p99_ttft_ms", more_is_better: false };
const ITL_P99: Metric = Metric { name: "ITL p99, ms", key: "p99_itl_ms", more_is_better: false };
const ITL: Metric = Metric { name: "ITL p50, ms", key: "median_itl_ms", more_is_better: false };
const TPOT: Metric = Metric { name: "TPOT mean, ms", key: "mean_tpot_ms", more_is_better: false };

pub fn run(bench: &Bench<'_>) -> anyhow::Result<String> {
    let peer = llama_cpp::obtain(bench.args.llama_server.as_deref())?;
    let begun = Begun::now();
    let works = works(bench);
    let threads = bench.threads;
    let mut out = format!(
        "Forebay's engine and llama.cpp's server, both with the same file and {threads} compute threads, one after the\n\
         other ({} rounds, in turns; medians). Every prompt is distinct, so neither prefix cache has more than the chat\n\
         template; every reply has exactly the tokens that were asked for. **Ratio above 1: Forebay is better.**\n\n\
         {}\n",
        bench.args.rounds,
        begun.render(&[machine::forebay_version(&bench.forebay), peer.version.clone()], bench.args),
    );
    for model in &bench.models {
        let scratch = Scratch::new()?;
        let sides = [ours(bench, model, &scratch), llama(bench, model, &peer, SLOTS, &scratch)];
        let generator = bench.generator(&scratch)?;
        let turns = contest::run(&*generator, bench.args.rounds, &sides, &works)?;
        let name = file_name(model);
        let shown = format!(
            "```text\nforebay worker --model {name} {}\nllama-server -m {name} {}\n{}\n```",
            our_flags(bench).join(" "),
            llama_flags(bench, SLOTS).join(" "),
            commands(&*generator, &works),
        );
        out.push_str(&format!(
            "\n### {name}\n\n{}\n{shown}\n\n{}",
            compared(&turns, &works, "llama.cpp"),
            details("Every single run", &raw(&turns, &works, &sides)),
        ));
    }
    Ok(out)
}

/// The generator's command lines, one a load.
pub fn commands(generator: &dyn Generator, works: &[Work]) -> String {
    let line = |work: &Work| format!("{}    # {}", generator.shown(work), work.name);
    works.iter().map(line).collect::<Vec<_>>().join("\n")
}

pub fn file_name(model: &Path) -> String {
    model.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

pub fn our_flags(bench: &Bench<'_>) -> Vec<String> {
    let threads = bench.threads.to_string();
    ["--host", "127.0.0.1", "--threads", &threads, "--served-model-name", NAME].map(str::to_owned).to_vec()
}

fn llama_flags(bench: &Bench<'_>, slots: Slots) -> Vec<String> {
    let (threads, context) = (bench.threads.to_string(), (slots.count * slots.tokens).to_string());
    let slots = slots.count.to_string();
    let mut flags: Vec<String> =
        ["--host", "127.0.0.1", "-t", &threads, "-tb", &threads, "-np", &slots].map(str::to_owned).to_vec();
    flags.extend(["-c", &context, "--alias", NAME, "--no-webui"].map(str::to_owned));
    flags
}

/// Starts `command` on a port of its own.
pub fn start(what: &'static str, mut command: Command, scratch: &Scratch) -> anyhow::Result<Running> {
    let port = free_port()?;
    command.args(["--port", &port.to_string()]);
    let server = Server::start(what, command, port, &scratch.file(&format!("{what}.log")))?;
    Ok(Running { url: server.url.clone(), server: Some(server) })
}

/// Our engine alone, as a worker.
pub fn ours<'a>(bench: &'a Bench<'_>, model: &'a Path, scratch: &'a Scratch) -> Contestant<'a> {
    let start = move || {
        let mut command = Command::new(&bench.forebay);
        command.args(["worker", "--model"]).arg(model).args(our_flags(bench));
        start("forebay", command, scratch)
    };
    Contestant { name: "Forebay", model: Some(NAME), start: Box::new(start) }
}

/// llama.cpp's server with as many slots as the heaviest load of a suite needs.
pub fn llama<'a>(
    bench: &'a Bench<'_>,
    model: &'a Path,
    peer: &'a llama_cpp::Peer,
    slots: Slots,
    scratch: &'a Scratch,
) -> Contestant<'a> {
    let start = move || {
        let mut command = Command::new(&peer.program);
        command.arg("-m").arg(model).args(llama_flags(bench, slots));
        start("llama-server", command, scratch)
    };
    Contestant { name: "llama.cpp", model: Some(NAME), start: Box::new(start) }
}

pub fn works(bench: &Bench<'_>) -> Vec<Work> {
    let load = |name, concurrency, requests, prompt_tokens, output_tokens| Work {
        name,
        concurrency,
        requests: bench.requests(requests),
        warmup: 1,
        prompt_tokens,
        shared_prefix_tokens: 0,
        output_tokens,
    };
    vec![
        load("1 in flight", 1, 20, 128, 64),
        load("8 in flight", 8, 40, 128, 64),
        load("32 in flight", 32, 96, 128, 64),
        load("prefill of 512 tokens", 1, 12, 512, 1),
    ]
}

/// One row per load and metric; the second contestant is the peer.
pub fn compared(turns: &Turns, works: &[Work], peer: &str) -> String {
    let mut rows = Vec::new();
    for (index, work) in works.iter().enumerate() {
        let metrics: &[Metric] =
            if work.output_tokens == 1 { &[TTFT] } else { &[THROUGHPUT, TTFT, TTFT_P99, ITL, ITL_P99, TPOT] };
        for metric in metrics {
            let [ours, theirs] = [0, 1].map(|side| turns.median(side, index, metric.key));
            rows.push(vec![
                format!("{}: {}", work.name, metric.name),
                shown(ours),
                shown(theirs),
                format!("{:.2}", ratio(ours, theirs, metric.more_is_better)),
            ]);
        }
    }
    table(&["", "Forebay", peer, "ratio"], &rows)
}

/// Above 1 where ours is better.
fn ratio(ours: f64, theirs: f64, more_is_better: bool) -> f64 {
    if more_is_better { ours / theirs } else { theirs / ours }
}

pub fn raw(turns: &Turns, works: &[Work], contestants: &[Contestant<'_>]) -> String {
    let keys = [
        "output_throughput",
        "median_ttft_ms",
        "p99_ttft_ms",
        "median_itl_ms",
        "p99_itl_ms",
        "mean_tpot_ms",
        "median_e2el_ms",
        "duration",
    ];
    let head = [
        "round, load, server",
        "output tok/s",
        "TTFT p50",
        "TTFT p99",
        "ITL p50",
        "ITL p99",
        "TPOT mean",
        "E2E p50",
        "seconds",
        "prompt tokens",
        "of them cached",
        "output tokens",
    ];
    let rows: Vec<Vec<String>> = turns
        .0
        .iter()
        .map(|turn| {
            let (work, side) = (works[turn.work].name, contestants[turn.contestant].name);
            let mut row = vec![format!("{}, {work}, {side}", turn.round)];
            row.extend(keys.map(|key| shown(turn.found.number(key))));
            let per_request = |key| shown(turn.found.number(key) / turn.found.number("completed"));
            row.extend(["total_input_tokens", "total_cached_tokens", "total_output_tokens"].map(per_request));
            row
        })
        .collect();
    format!("Times in milliseconds, tokens per request.\n\n{}", table(&head, &rows))
}

/// A reply of one token has no gaps between tokens.
pub fn shown(value: f64) -> String {
    if value.is_nan() { "-".into() } else { format!("{value:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_above_one_is_better() {
        assert_eq!(ratio(200.0, 100.0, true), 2.0);
        assert_eq!(ratio(5.0, 10.0, false), 2.0);
        assert_eq!(ratio(10.0, 5.0, false), 0.5);
    }
}
