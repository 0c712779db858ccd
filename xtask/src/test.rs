//! `cargo xtask test`: everything, from unit tests to the real SDK against the real program.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::{setup, shell};

#[derive(clap::Args)]
pub struct Args {
    /// Only the Rust tests
    #[arg(long)]
    rust_only: bool,
    /// Only the end-to-end tests
    #[arg(long, conflicts_with = "rust_only")]
    e2e_only: bool,
    /// Passed to pytest: `cargo xtask test --e2e-only -- -k stream`
    #[arg(last = true)]
    pytest: Vec<String>,
}

/// Passed, failed, skipped.
#[derive(Default, Clone, Copy)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
}

/// Models that only some Rust tests want, and where these look for them.
const OTHER_MODELS: [(&str, &str); 2] =
    [("all-minilm-l6-v2", "FOREBAY_TEST_MINILM"), ("gemma-3-270m", "FOREBAY_TEST_GEMMA")];

pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut total = Tally::default();
    let mut broken = Vec::new();

    println!("== build");
    shell::run("build", shell::cargo().args(["build", "--quiet", "--bin", "forebay"]))?;
    let binary = target_dir()?.join("debug/forebay");
    println!("== model");
    let model = pull(&binary, "smollm2-135m-instruct")?;
    let model = model.context("the default model can't be fetched; see above")?;

    if !args.e2e_only {
        println!("== Rust tests");
        let mut cargo = shell::cargo();
        cargo.args(["test", "--workspace", "--no-fail-fast"]).env("FOREBAY_TEST_MODEL", &model);
        for (name, variable) in OTHER_MODELS {
            if let Some(path) = pull(&binary, name)? {
                cargo.env(variable, path);
            } else {
                println!("skipped: the tests of {name}, which can't be fetched; see above");
                total.skipped += 1;
            }
        }
        let (ok, output) = shell::run_tee("cargo test", &mut cargo)?;
        let tally = cargo_tally(&output);
        total.add(tally);
        if !ok {
            broken.push("cargo test");
            // A crate that doesn't compile has no count of its own.
            total.failed += u64::from(tally.failed == 0);
        }
    }
    if !args.rust_only {
        println!("== end-to-end tests");
        setup::programs()?;
        let python = setup::python()?;
        let mut pytest = std::process::Command::new(python);
        pytest.current_dir(shell::root().join("tests/e2e")).args([
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
        ]);
        pytest.args(&args.pytest).env("FOREBAY_BIN", &binary).env("FOREBAY_TEST_MODEL", &model);
        let (ok, output) = shell::run_tee("pytest", &mut pytest)?;
        let tally = pytest_tally(&output);
        total.add(tally);
        if !ok {
            broken.push("pytest");
            total.failed += u64::from(tally.failed == 0);
        }
    }
    println!("\n{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    if total.passed == 0 {
        bail!("no test ran");
    }
    if !broken.is_empty() {
        bail!("failed: {}", broken.join(", "));
    }
    Ok(())
}

/// The path of a model in the cache, fetched where it isn't there. `None` where it can't be fetched.
fn pull(binary: &Path, name: &str) -> anyhow::Result<Option<PathBuf>> {
    let pulled = std::process::Command::new(binary)
        .args(["model", "pull", name, "--print-path"])
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("can't run `forebay model pull`")?;
    if !pulled.status.success() {
        return Ok(None);
    }
    Ok(Some(PathBuf::from(String::from_utf8(pulled.stdout)?.trim())))
}

fn target_dir() -> anyhow::Result<PathBuf> {
    let output = shell::cargo().args(["metadata", "--format-version", "1", "--no-deps"]).output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    Ok(PathBuf::from(
        metadata["target_directory"].as_str().context("cargo metadata has no target_directory")?,
    ))
}

/// Sums the `test result:` lines of cargo's test runner.
fn cargo_tally(output: &str) -> Tally {
    let mut total = Tally::default();
    for line in output.lines().filter_map(|line| line.strip_prefix("test result: ")) {
        total.add(counts(line, &[";", "."]));
    }
    total
}

/// Reads pytest's closing line: `3 failed, 12 passed, 1 skipped in 4.56s`.
fn pytest_tally(output: &str) -> Tally {
    let closing = output.lines().rev().find(|line| {
        line.contains(" in ") && line.contains("passed") | line.contains("failed") | line.contains("error")
    });
    closing.map(|line| counts(line, &[","])).unwrap_or_default()
}

fn counts(line: &str, separators: &[&str]) -> Tally {
    let mut tally = Tally::default();
    let line = separators.iter().fold(line.to_owned(), |line, s| line.replace(s, " "));
    let words: Vec<&str> = line.split_whitespace().collect();
    for pair in words.windows(2) {
        let Ok(count) = pair[0].parse::<u64>() else { continue };
        match pair[1] {
            "passed" => tally.passed += count,
            "failed" | "error" | "errors" => tally.failed += count,
            "ignored" | "skipped" => tally.skipped += count,
            _ => {}
        }
    }
    tally
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_read() {
        let cargo = "test result: ok. 6 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s\n\
                     test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let tally = cargo_tally(cargo);
        assert_eq!((tally.passed, tally.failed, tally.skipped), (8, 3, 1));
        let tally = pytest_tally("x\n1 failed, 12 passed, 2 skipped, 1 error in 4.56s\n");
        assert_eq!((tally.passed, tally.failed, tally.skipped), (12, 2, 2));
    }
}
