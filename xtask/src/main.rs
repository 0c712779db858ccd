//! Repository tasks: `cargo xtask test | tidy | docs | bench`.
#![allow(clippy::print_stdout, clippy::print_stderr)] // A command-line tool for developers.

mod bench;
mod setup;
mod shell;
mod test;
mod tidy;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Repository tasks")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what the tests need where it is missing, then run every test
    Test(test::Args),
    /// Check the dependency law and the repository's conventions
    Tidy,
    /// Regenerate docs/config.md, docs/forebay.schema.json, docs/metrics.md and docs/errors.md
    Docs,
    /// Measure the engine against its peer and what the layers add; rewrite BENCHMARKS.md
    Bench(bench::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().task {
        Task::Test(args) => test::run(&args),
        Task::Tidy => tidy::run(),
        Task::Bench(args) => bench::run(&args),
        Task::Docs => {
            let mut cargo = shell::cargo();
            cargo
                .args(["test", "--quiet", "-p", "forebay-app", "--test", "docs"])
                .env("FOREBAY_UPDATE_DOCS", "1");
            shell::run("regenerate documents", &mut cargo)
        }
    }
}
