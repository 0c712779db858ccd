//! What a service feels beyond throughput: start, idling, cached prefixes, decodes beside a prefill, memory, and a
//! machine that is not its own.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::Bench;
use super::aim::{Aim, Judge, Section};
use super::begun::Begun;
use super::contest::{Contestant, Running};
use super::document::{median, table};
use super::engine::{self, Slots, file_name, shown};
use super::generator::{self, Work};
use super::llama_cpp;
use super::machine;
use super::server::Scratch;

/// Processes that want all of a core while we serve.
const BUSY: usize = 8;
/// How long an idle server is watched.
const IDLE: Duration = Duration::from_secs(10);
const STARTS: usize = 5;
/// From the start of a load's generator until its few short prompts are surely computed.
const DECODES_START: Duration = Duration::from_millis(700);

/// Room for every load at the peer, which divides its context among its slots.
const SLOTS: Slots = Slots { count: 8, tokens: 10_240 };

/// The loads; each is described where it is used.
const COLD: Work = load("2k prompt, cold", 1, 8, 2048, 0, 1);
const CACHED: Work = load("2k prompt, 2000 tokens cached", 1, 16, 2048, 2000, 1);
const DECODES: Work = load("4 decodes", 4, 4, 64, 0, 600);
const PREFILL: Work = load("8k prefill", 1, 1000, 7600, 0, 1);
const SHARED: Work = load("8 in flight, 768 of 1024 tokens shared", 8, 48, 1024, 768, 32);
const ALONE: Work = load("1 in flight", 1, 12, 128, 0, 64);
/// As [`ALONE`], and short: a peer whose threads wait for each other is slow beside others.
const LOADED: Work = Work { warmup: 0, ..load("1 in flight, competing load", 1, 3, 128, 0, 64) };
const FILL: Work = load("1k prompts", 1, 16, 1024, 0, 1);

const fn load(
    name: &'static str,
    concurrency: u32,
    requests: u32,
    prompt_tokens: u32,
    shared_prefix_tokens: u32,
    output_tokens: u32,
) -> Work {
    Work {
        name,
        concurrency,
        requests,
        warmup: 1,
        prompt_tokens,
        shared_prefix_tokens,
        output_tokens,
        temperature: 0.0,
    }
}

/// Figures that have an aim.
const START: &str = "start to ready, ms";
const IDLE_USE: &str = "processor use when idle, %";
const CACHED_TO_COLD: &str = "cached : cold, %";
const P99_TO_P50: &str = "its p99 : its p50, %";
const SHARE: &str = "share of what is fair under competing load, %";

/// What ours are to be. Idle is what rounds to nothing.
const AIMS: [(&str, Aim); 5] = [
    (START, Aim::AtMost(1000.0)),
    (IDLE_USE, Aim::AtMost(0.5)),
    (CACHED_TO_COLD, Aim::AtMost(10.0)),
    (P99_TO_P50, Aim::AtMost(200.0)),
    (SHARE, Aim::AtLeast(80.0)),
];

pub fn run(bench: &Bench<'_>) -> anyhow::Result<Section> {
    let model = &bench.models[0];
    let peer = llama_cpp::obtain(bench.args.llama_server.as_deref())?;
    let scratch = Scratch::new()?;
    let sides = [engine::ours(bench, model, &scratch), engine::llama(bench, model, &peer, SLOTS, &scratch)];
    let begun = Begun::now();
    let mut found = Vec::new();
    for (nth, side) in sides.iter().enumerate() {
        println!("serving: {}", side.name);
        found.push(figures(bench, side, nth == 0)?);
    }
    let mut judge = Judge::default();
    let rows = rows(&found[0], &found[1], &mut judge);
    let text = format!(
        "One server at a time with `{}` and {} compute threads. Aims are for Forebay's column.\n\n{}\n\n\
         - Decodes beside a prefill: {} streams of {} tokens, while prompts of {} tokens come one after the other.\n  \
           Not asked of the peer: with a whole batch of a prompt between any two of its tokens it would take too long.\n\
         - Competing load: {BUSY} processes that do nothing but compute; the share is what is left of the tokens per\n  \
           second, divided by the part of the cores that a fair scheduler gives {} of {} threads.\n\
         - Memory: growth of the resident memory over {} prompts of {} distinct tokens.\n\n{}",
        file_name(model),
        bench.threads,
        table(&["", "Forebay", "llama.cpp", "aim"], &rows),
        DECODES.concurrency,
        DECODES.output_tokens,
        PREFILL.prompt_tokens,
        bench.threads,
        bench.threads + BUSY,
        FILL.requests,
        FILL.prompt_tokens,
        begun.render(&[machine::forebay_version(&bench.forebay), peer.version.clone()], bench.args),
    );
    Ok(Section { text, missed: judge.missed })
}

type Figure = (&'static str, f64);

/// One row per figure.
fn rows(ours: &[Figure], theirs: &[Figure], judge: &mut Judge) -> Vec<Vec<String>> {
    let row = |(&(name, ours), &(_, theirs)): (&Figure, &Figure)| {
        let aim = AIMS.iter().find(|(figure, _)| *figure == name).map(|&(_, aim)| aim);
        vec![name.to_owned(), shown(ours), shown(theirs), judge.cell(name, ours, aim)]
    };
    ours.iter().zip(theirs).map(row).collect()
}

/// `beside`: also the decodes beside prefills. With the peer that takes too long, as a whole batch of the prompt comes
/// between any two of its tokens.
fn figures(bench: &Bench<'_>, side: &Contestant<'_>, beside: bool) -> anyhow::Result<Vec<Figure>> {
    let mut out = Vec::new();
    let mut add = |name: &'static str, value: f64| {
        println!("  {name}: {}", shown(value));
        out.push((name, value));
    };
    let forebay = bench.forebay.as_path();

    let mut starts = Vec::new();
    for _ in 0..STARTS {
        let begin = Instant::now();
        let running = (side.start)()?;
        starts.push(begin.elapsed().as_secs_f64() * 1e3);
        drop(running);
    }
    add(START, median(&starts));

    let running = (side.start)()?;
    add(IDLE_USE, idle(&running)?);
    let fill = generator::run(forebay, &running.url, None, &Work { requests: 1, ..FILL }, 1);
    fill?;
    let before = usage(&running)?.resident;
    generator::run(forebay, &running.url, None, &FILL, 2)?;
    let grown = usage(&running)?.resident.saturating_sub(before) as f64;
    let tokens = f64::from(FILL.requests + FILL.warmup) * f64::from(FILL.prompt_tokens);
    add("memory per 1000 tokens of KV, MiB", grown / f64::from(1 << 20) / tokens * 1000.0);
    drop(running);

    let running = (side.start)()?;
    let cold = generator::run(forebay, &running.url, None, &COLD, 3)?.number("median_ttft_ms");
    let cached = generator::run(forebay, &running.url, None, &CACHED, 4)?.number("median_ttft_ms");
    add("TTFT of a 2k prompt, ms", cold);
    add("TTFT with 2000 of its tokens cached, ms", cached);
    add(CACHED_TO_COLD, cached / cold * 100.0);
    let shared = generator::run(forebay, &running.url, None, &SHARED, 5)?;
    add("shared prefixes: output tokens/s", shared.number("output_throughput"));
    add("shared prefixes: TTFT p50, ms", shared.number("median_ttft_ms"));
    drop(running);

    let running = (side.start)()?;
    let quiet = generator::run(forebay, &running.url, None, &DECODES, 6)?;
    add("4 decodes alone: ITL p50, ms", quiet.number("median_itl_ms"));
    let (p50, p99) = if beside {
        let mixed = beside_prefills(forebay, &running)?;
        (mixed.number("median_itl_ms"), mixed.number("p99_itl_ms"))
    } else {
        (f64::NAN, f64::NAN)
    };
    add("4 decodes beside 8k prefills: ITL p50, ms", p50);
    add("4 decodes beside 8k prefills: ITL p99, ms", p99);
    add(P99_TO_P50, p99 / p50 * 100.0);
    drop(running);

    let running = (side.start)()?;
    let quiet = generator::run(forebay, &running.url, None, &ALONE, 7)?.number("output_throughput");
    let busy = Busy::start(BUSY)?;
    let loaded = generator::run(forebay, &running.url, None, &LOADED, 8);
    drop(busy);
    let loaded = loaded?.number("output_throughput");
    add("1 in flight: output tokens/s", quiet);
    add("1 in flight under competing load: output tokens/s", loaded);
    let fair = fair_share(bench.threads, BUSY, machine::cores());
    add(SHARE, loaded / quiet / fair * 100.0);
    Ok(out)
}

/// Of the speed that `threads` have alone on `cores`, the part that is left them beside `others` that are as busy.
fn fair_share(threads: usize, others: usize, cores: usize) -> f64 {
    let alone = threads.min(cores) as f64;
    let wanted = (threads + others) as f64;
    let shared = threads as f64 * (cores as f64 / wanted).min(1.0);
    shared / alone
}

fn usage(running: &Running) -> anyhow::Result<super::server::Usage> {
    running.server.as_ref().context("nothing was started")?.usage()
}

/// Percent of one core.
fn idle(running: &Running) -> anyhow::Result<f64> {
    // What the start left to do is not idling.
    std::thread::sleep(Duration::from_secs(1));
    let before = usage(running)?.cpu_seconds;
    std::thread::sleep(IDLE);
    Ok((usage(running)?.cpu_seconds - before) / IDLE.as_secs_f64() * 100.0)
}

/// The decodes, while one prefill follows another without a pause. They run alone for less than a second, a quarter or so
/// of their tokens, so that median and p99 are both of tokens beside a prefill.
fn beside_prefills(forebay: &Path, running: &Running) -> anyhow::Result<generator::Found> {
    std::thread::scope(|scope| {
        let decodes =
            scope.spawn(|| generator::run(forebay, &running.url, None, &Work { warmup: 0, ..DECODES }, 9));
        // The decodes are to be running: a prompt that comes first would be computed before they start.
        std::thread::sleep(DECODES_START);
        let work = Work { warmup: 0, ..PREFILL };
        let mut prefills = generator::Background::start(forebay, &running.url, &work, 100)?;
        let found = decodes.join().expect("the thread does not panic")?;
        prefills.check_running()?;
        Ok(found)
    })
}

/// Processes that use all they get, until dropped.
struct Busy(Vec<Child>);

impl Busy {
    fn start(n: usize) -> anyhow::Result<Self> {
        let mut busy = Self(Vec::new());
        for _ in 0..n {
            let mut command = Command::new("sh");
            command.args(["-c", "while :; do :; done"]).stdin(Stdio::null());
            busy.0.push(command.spawn().context("can't start a shell")?);
        }
        Ok(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aims_are_for_ours() {
        let mut judge = Judge::default();
        let ours = vec![(START, 800.0), (CACHED_TO_COLD, 12.0), ("other", 5.0)];
        let theirs = vec![(START, 2000.0), (CACHED_TO_COLD, 5.0), ("other", 6.0)];
        let expect = [
            [START, "800.0", "2000.0", "≤ 1000"],
            [CACHED_TO_COLD, "12.0", "5.0", "**≤ 10 missed**"],
            ["other", "5.0", "6.0", ""],
        ];
        assert_eq!(rows(&ours, &theirs, &mut judge), expect);
        assert_eq!(judge.missed, ["cached : cold, %: 12.000, to be ≤ 10"]);
    }

    #[test]
    fn shares() {
        let check = |threads, others, cores, expect: f64| {
            assert!((fair_share(threads, others, cores) - expect).abs() < 1e-9, "{threads} {others} {cores}");
        };
        check(2, 8, 2, 0.2);
        check(1, 1, 2, 1.0);
        check(4, 4, 2, 0.5);
        check(2, 0, 2, 1.0);
    }
}
