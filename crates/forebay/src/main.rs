//! Forebay: the LLM serving stack in one program.
#![allow(clippy::print_stdout, clippy::print_stderr)] // A command-line program.

mod bench;
mod check;
mod cli;
mod log;
mod model;
mod out;
mod progress;
mod serve;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command.unwrap_or_else(|| Command::Serve(cli::Serve::default())) {
        Command::Serve(args) => serve::serve(&args),
        Command::Worker(args) => serve::worker(&args),
        Command::Check(args) => return check::run(&args),
        Command::Model(command) => model::run(&command),
        Command::Bench(args) => bench::run(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "forebay", &mut script);
            out::write(&String::from_utf8_lossy(&script));
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", forebay_app::one_line(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
