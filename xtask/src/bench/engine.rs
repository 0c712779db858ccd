//! The engine against llama.cpp's server: same GGUF file, same number of threads, same load.

use std::path::Path;
use std::process::Command;

use super::Bench;
use super::aim::{Aim, Judge, Section};
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

/// Loads that have aims.
pub const ONE: &str = "1 in flight";
pub const EIGHT: &str = "8 in flight";
pub const THIRTY_TWO: &str = "32 in flight";
const PREFILL: &str = "prefill of 512 tokens";

/// The least ratio to the peer in a load's first metric, by the load's name.
pub type Aims = &'static [(&'static str, f64)];

/// By parts of a file's name, in lower case; the first that has all of them.
const AIMS: [(&[&str], Aims); 3] = [
    (&["q4_1"], &[(ONE, 1.1), (EIGHT, 2.5), (THIRTY_TWO, 3.0), (PREFILL, 3.0)]),
    (&["q4_0"], &[(ONE, 0.95), (EIGHT, 1.7), (THIRTY_TWO, 1.4), (PREFILL, 1.2)]),
    (&["gemma", "q4_k_m"], &[(ONE, 1.0), (EIGHT, 2.0), (PREFILL, 2.0)]),
];

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

pub fn run(bench: &Bench<'_>) -> anyhow::Result<Section> {
    let peer = llama_cpp::obtain(bench.args.llama_server.as_deref())?;
    let begun = Begun::now();
    let works = works(bench);
    let threads = bench.threads;
    let mut out = format!(
        "Forebay's engine and llama.cpp's server, both with the same file and {threads} compute threads, one after the\n\
         other ({} rounds, in turns; medians). Every prompt is distinct, so neither prefix cache has more than the chat\n\
         template; every reply has exactly the tokens that were asked for. *Sampled* is at temperature 1, with what else a\n\
         server does where a request says nothing. **Ratio above 1: Forebay is better.**\n\n\
         {}\n",
        bench.args.rounds,
        begun.render(&[machine::forebay_version(&bench.forebay), peer.version.clone()], bench.args),
    );
    let mut missed = Vec::new();
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
        let mut judge = Judge::default();
        out.push_str(&format!(
            "\n### {name}\n\n{}\n{shown}\n\n{}",
            compared(&turns, &works, "llama.cpp", aims(&name), &mut judge),
            details("Every single run", &raw(&turns, &works, &sides)),
        ));
        missed.extend(judge.missed.iter().map(|figure| format!("{name}, {figure}")));
    }
    Ok(Section { text: out, missed })
}

/// None for files that no aim is set for.
fn aims(file: &str) -> Aims {
    let file = file.to_lowercase();
    let found = AIMS.iter().find(|(parts, _)| parts.iter().all(|part| file.contains(part)));
    found.map_or(&[], |&(_, aims)| aims)
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
        temperature: 0.0,
    };
    vec![
        load(ONE, 1, 20, 128, 64),
        load(EIGHT, 8, 40, 128, 64),
        Work { temperature: 1.0, ..load("8 in flight, sampled", 8, 40, 128, 64) },
        load(THIRTY_TWO, 32, 96, 128, 64),
        load(PREFILL, 1, 12, 512, 1),
    ]
}

/// One row per load and metric; the second contestant is the peer. With a column of aims, where there are any.
pub fn compared(turns: &Turns, works: &[Work], peer: &str, aims: Aims, judge: &mut Judge) -> String {
    let mut rows = Vec::new();
    for (index, work) in works.iter().enumerate() {
        let metrics: &[Metric] =
            if work.output_tokens == 1 { &[TTFT] } else { &[THROUGHPUT, TTFT, TTFT_P99, ITL, ITL_P99, TPOT] };
        let mut aim = aims.iter().find(|(load, _)| *load == work.name).map(|&(_, ratio)| Aim::AtLeast(ratio));
        for metric in metrics {
            let [ours, theirs] = [0, 1].map(|side| turns.median(side, index, metric.key));
            let name = format!("{}: {}", work.name, metric.name);
            let ratio = ratio(ours, theirs, metric.more_is_better);
            // The first metric's only.
            let aimed = judge.cell(&format!("{name}, ratio"), ratio, aim.take());
            let mut row = vec![name, shown(ours), shown(theirs), format!("{ratio:.2}")];
            if !aims.is_empty() {
                row.push(aimed);
            }
            rows.push(row);
        }
    }
    let head = ["", "Forebay", peer, "ratio", "aim"];
    table(&head[..if aims.is_empty() { 4 } else { 5 }], &rows)
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
    use serde_json::json;

    use super::*;
    use crate::bench::contest::Turn;
    use crate::bench::generator::Found;

    #[test]
    fn a_ratio_above_one_is_better() {
        assert_eq!(ratio(200.0, 100.0, true), 2.0);
        assert_eq!(ratio(5.0, 10.0, false), 2.0);
        assert_eq!(ratio(10.0, 5.0, false), 0.5);
    }

    #[test]
    fn aims_go_by_the_files_name() {
        let check = |file: &str, expect: Aims| assert_eq!(aims(file), expect, "{file}");
        check("SmolLM2-135M-Instruct.Q4_1.gguf", AIMS[0].1);
        check("smollm2-q4_0.gguf", AIMS[1].1);
        check("Gemma-3-270m-Q4_K_M.gguf", AIMS[2].1);
        check("SmolLM2-135M-Instruct.Q4_K_M.gguf", &[]);
    }

    /// Two loads, each side with one turn of each.
    fn turns() -> (Turns, [Work; 2]) {
        let work = |name, output_tokens| Work {
            name,
            concurrency: 1,
            requests: 1,
            warmup: 0,
            prompt_tokens: 1,
            shared_prefix_tokens: 0,
            output_tokens,
            temperature: 0.0,
        };
        let turn = |contestant, work, speed: f64| {
            let found = Found(json!({"output_throughput": speed, "median_ttft_ms": 100.0 / speed}));
            Turn { round: 1, contestant, work, found }
        };
        let turns = Turns(vec![turn(0, 0, 20.0), turn(1, 0, 10.0), turn(0, 1, 20.0), turn(1, 1, 10.0)]);
        (turns, [work(ONE, 64), work(PREFILL, 1)])
    }

    #[test]
    fn a_missed_aim_is_marked_and_told() {
        let (turns, works) = turns();
        let mut judge = Judge::default();
        let table = compared(&turns, &works, "peer", &[(ONE, 2.0), (PREFILL, 2.5)], &mut judge);
        assert!(table.contains("| 1 in flight: output tokens/s | 20.0 | 10.0 | 2.00 | ≥ 2 |"), "{table}");
        assert!(table.contains("| 1 in flight: TTFT p50, ms | 5.0 | 10.0 | 2.00 |  |"), "{table}");
        assert!(table.contains("| 5.0 | 10.0 | 2.00 | **≥ 2.5 missed** |"), "{table}");
        assert_eq!(judge.missed, ["prefill of 512 tokens: TTFT p50, ms, ratio: 2.000, to be ≥ 2.5"]);
    }

    #[test]
    fn without_aims_there_is_no_column_of_them() {
        let (turns, works) = turns();
        let mut judge = Judge::default();
        let table = compared(&turns, &works, "peer", &[], &mut judge);
        assert!(table.starts_with("|  | Forebay | peer | ratio |\n") && judge.missed.is_empty(), "{table}");
    }
}
