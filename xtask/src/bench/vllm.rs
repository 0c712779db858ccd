//! The engine against vLLM on this processor: the same directory of bf16 safetensors, the same number of threads.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use super::Bench;
use super::aim::{Judge, Section};
use super::begun::Begun;
use super::contest::{self, Contestant};
use super::document::details;
use super::engine::{self, Aims, EIGHT, ONE, THIRTY_TWO, compared, file_name, raw};
use super::machine;
use super::server::Scratch;

/// KV cache of the peer, in GiB: room for the heaviest load, and no more than a small machine has.
const KV_GIB: u32 = 2;

const AIMS: Aims = &[(ONE, 2.0), (EIGHT, 2.0), (THIRTY_TWO, 2.0)];

pub fn run(bench: &Bench<'_>) -> anyhow::Result<Section> {
    let (python, model) = needs(bench)?;
    let version = version(python)?;
    let scratch = Scratch::new()?;
    let sides = [engine::ours(bench, &model, &scratch), peer(bench, python, &model, &scratch)];
    let works = engine::works(bench);
    let generator = bench.generator(&scratch)?;
    let begun = Begun::now();
    let turns = contest::run(&*generator, bench.args.rounds, &sides, &works)?;
    let mut judge = Judge::default();
    let text = format!(
        "Forebay's engine and vLLM, both with the same directory of bf16 safetensors (`{}`) and {} compute threads, one after\n\
         the other ({} rounds, in turns; medians). Loads of the sizes above; the commands\n\
         below say who made them. **Ratio above 1: Forebay is better.**\n\n{}\n{}\n\n\
         ```text\nforebay worker --model DIR {}\nVLLM_CPU_KVCACHE_SPACE={KV_GIB} vllm serve DIR {}\n{}\n```\n\n{}",
        file_name(&model),
        bench.threads,
        bench.args.rounds,
        compared(&turns, &works, "vLLM", AIMS, &mut judge),
        begun.render(&[machine::forebay_version(&bench.forebay), version], bench.args),
        engine::our_flags(bench).join(" "),
        PEER_FLAGS.join(" "),
        engine::commands(&*generator, &works),
        details("Every single run", &raw(&turns, &works, &sides)),
    );
    Ok(Section { text, missed: judge.missed })
}

/// The environment with vLLM and the directory that both sides serve.
pub fn needs<'a>(bench: &Bench<'a>) -> anyhow::Result<(&'a Path, PathBuf)> {
    let needs = "this suite needs --vllm-python and --vllm-model (CONTRIBUTING.md says how to get both)";
    let python = bench.args.vllm_python.as_deref().context(needs)?;
    Ok((python, std::path::absolute(bench.args.vllm_model.as_deref().context(needs)?)?))
}

const PEER_FLAGS: [&str; 8] = [
    "--host",
    "127.0.0.1",
    "--served-model-name",
    engine::NAME,
    "--max-model-len",
    "2048",
    "--max-num-seqs",
    "32",
];

pub fn peer<'a>(
    bench: &'a Bench<'_>,
    python: &'a Path,
    model: &'a Path,
    scratch: &'a Scratch,
) -> Contestant<'a> {
    let start = move || {
        let mut command = Command::new(python);
        command.args(["-m", "vllm.entrypoints.openai.api_server", "--model"]).arg(model).args(PEER_FLAGS);
        command
            .env("VLLM_CPU_KVCACHE_SPACE", KV_GIB.to_string())
            .env("OMP_NUM_THREADS", bench.threads.to_string())
            .env("HF_HUB_OFFLINE", "1")
            .env("VLLM_NO_USAGE_STATS", "1");
        engine::start("vllm", command, scratch)
    };
    Contestant { name: "vLLM", model: Some(engine::NAME), start: Box::new(start) }
}

pub fn version(python: &Path) -> anyhow::Result<String> {
    let output = Command::new(python).args(["-c", "import vllm; print(vllm.__version__)"]).output();
    let output = output.with_context(|| format!("can't start {}", python.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.lines().last().filter(|_| output.status.success());
    Ok(format!("vLLM {}", version.context("that Python has no vLLM")?.trim()))
}
