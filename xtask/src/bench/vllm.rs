//! The engine against vLLM on this processor: the same model, ours from GGUF and vLLM's from safetensors (Forebay reads
//! no safetensors yet), the same number of threads.

use std::path::Path;
use std::process::Command;

use anyhow::Context;

use super::Bench;
use super::contest::{self, Contestant};
use super::document::details;
use super::engine::{self, Begun, compared, file_name, raw};
use super::machine;
use super::server::Scratch;

/// KV cache of the peer, in GiB: room for the heaviest load, and no more than a small machine has.
const KV_GIB: u32 = 2;

pub fn run(bench: &Bench<'_>) -> anyhow::Result<String> {
    let needs =
        "the suite `vllm` needs --vllm-python and --vllm-model (CONTRIBUTING.md says how to get both)";
    let python = bench.args.vllm_python.as_deref().context(needs)?;
    let model = std::path::absolute(bench.args.vllm_model.as_deref().context(needs)?)?;
    let version = version(python)?;
    let scratch = Scratch::new()?;
    let sides = [engine::ours(bench, &bench.models[0], &scratch), peer(bench, python, &model, &scratch)];
    let works = engine::works(bench);
    let begun = Begun::now();
    let turns = contest::run(&bench.forebay, bench.args.rounds, &sides, &works)?;
    Ok(format!(
        "Forebay's engine with `{}` and vLLM with `{}`, each in the precision of its files (**not the same one**) and with\n\
         {} compute threads, one after the other ({} rounds, in turns; medians). Loads as above. **Ratio above 1: Forebay is\n\
         better.**\n\n{}\n{}\n\n\
         ```text\nVLLM_CPU_KVCACHE_SPACE={KV_GIB} vllm serve DIR {}\n```\n\n{}",
        file_name(&bench.models[0]),
        file_name(&model),
        bench.threads,
        bench.args.rounds,
        compared(&turns, &works, "vLLM"),
        begun.render(&[machine::forebay_version(&bench.forebay), version], bench),
        PEER_FLAGS.join(" "),
        details("Every single run", &raw(&turns, &works, &sides)),
    ))
}

const PEER_FLAGS: [&str; 8] = [
    "--host",
    "127.0.0.1",
    "--served-model-name",
    "bench",
    "--max-model-len",
    "2048",
    "--max-num-seqs",
    "32",
];

fn peer<'a>(bench: &'a Bench<'_>, python: &'a Path, model: &'a Path, scratch: &'a Scratch) -> Contestant<'a> {
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
    Contestant { name: "vLLM", model: None, start: Box::new(start) }
}

fn version(python: &Path) -> anyhow::Result<String> {
    let output = Command::new(python).args(["-c", "import vllm; print(vllm.__version__)"]).output();
    let output = output.with_context(|| format!("can't start {}", python.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.lines().last().filter(|_| output.status.success());
    Ok(format!("vLLM {}", version.context("that Python has no vLLM")?.trim()))
}
