//! The load: the same for every contestant, by our own generator or by one of [`super::tools`].

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

/// Name of the environment variable that carries a made-up API key to the gateway and to the generator.
pub const KEY_VARIABLE: &str = "FOREBAY_BENCH_KEY";
/// A key for servers that live for one benchmark on loopback; it opens nothing else.
pub const KEY: &str = "bench-key-0123456789abcdef";

/// Makes requests and says how they went.
pub trait Generator {
    /// Runs a load against the server at `url`, whose model is called `model` (its first where absent).
    fn run(&self, url: &str, model: Option<&str>, work: &Work, seed: u64) -> anyhow::Result<Found>;

    /// The command line of a load, as documents show it.
    fn shown(&self, work: &Work) -> String;
}

/// `forebay bench URL … --json`
pub struct Own(pub PathBuf);

impl Generator for Own {
    fn run(&self, url: &str, model: Option<&str>, work: &Work, seed: u64) -> anyhow::Result<Found> {
        run(&self.0, url, model, work, seed)
    }

    fn shown(&self, work: &Work) -> String {
        format!("forebay bench URL {}", work.flags().join(" "))
    }
}

/// One load.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    pub name: &'static str,
    pub concurrency: u32,
    pub requests: u32,
    pub warmup: u32,
    pub prompt_tokens: u32,
    /// Of the prompt's tokens, how many at the beginning are the same in all prompts.
    pub shared_prefix_tokens: u32,
    pub output_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
}

impl Work {
    /// Flags of `forebay bench`, without URL, model and seed.
    pub fn flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        for (flag, value) in [
            ("--concurrency", self.concurrency),
            ("--requests", self.requests),
            ("--warmup", self.warmup),
            ("--prompt-tokens", self.prompt_tokens),
            ("--shared-prefix-tokens", self.shared_prefix_tokens),
            ("--output-tokens", self.output_tokens),
        ] {
            if flag == "--shared-prefix-tokens" && value == 0 {
                continue;
            }
            flags.push(flag.to_owned());
            flags.push(value.to_string());
        }
        flags.extend(
            ["--temperature", &self.temperature.to_string(), "--ignore-eos", "--json"].map(str::to_owned),
        );
        flags
    }
}

/// What the generator found.
#[derive(Debug, Clone)]
pub struct Found(pub Value);

impl Found {
    /// A number by its name in the generator's JSON; `NaN` where it is not there.
    pub fn number(&self, key: &str) -> f64 {
        self.0[key].as_f64().unwrap_or(f64::NAN)
    }
}

/// Runs a load. Any failed request is an error: numbers of a server that refuses some of its work say nothing.
pub fn run(forebay: &Path, url: &str, model: Option<&str>, work: &Work, seed: u64) -> anyhow::Result<Found> {
    let mut command = command(forebay, url, model, work, seed);
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("can't start {command:?}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("the load generator failed ({}): {command:?}\n{text}", output.status);
    }
    let found: Value =
        serde_json::from_str(text.trim()).with_context(|| format!("no JSON from {command:?}"))?;
    if found["failed"].as_u64() != Some(0) {
        bail!("{} of the requests of {command:?} failed: {}", found["failed"], found["failures"]);
    }
    Ok(Found(found))
}

fn command(forebay: &Path, url: &str, model: Option<&str>, work: &Work, seed: u64) -> Command {
    let mut command = Command::new(forebay);
    command.arg("bench").arg(url).args(work.flags()).args(["--seed", &seed.to_string()]);
    if let Some(model) = model {
        command.args(["--model", model]);
    }
    command.args(["--api-key-env", KEY_VARIABLE]).env(KEY_VARIABLE, KEY).stdin(Stdio::null());
    command
}

/// A load beside the one that is measured; dropped, it ends.
pub struct Background(Child);

impl Background {
    pub fn start(forebay: &Path, url: &str, work: &Work, seed: u64) -> anyhow::Result<Self> {
        let mut command = command(forebay, url, None, work, seed);
        let child = command.stdout(Stdio::null()).spawn();
        Ok(Self(child.with_context(|| format!("can't start {command:?}"))?))
    }

    /// An error where it has ended before it was to: what was measured beside it was not beside it.
    pub fn check_running(&mut self) -> anyhow::Result<()> {
        match self.0.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the load beside the measured one ended early ({status})"),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
