//! Forebay: the LLM serving stack in one program.
#![allow(clippy::print_stdout, clippy::print_stderr)] // A command-line program.

mod bench;
mod check;
mod cli;
mod counts;
mod front;
mod log;
mod model;
mod out;
mod progress;
mod serve;
mod vllm_flags;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use cli::{Cli, Command};

/// What clap exits with on a wrong command line.
const USAGE_ERROR: u8 = 2;

/// The command line, for `worker` without the flags of vLLM's that are not ours.
fn arguments() -> Result<Vec<OsString>, String> {
    let mut all: Vec<OsString> = std::env::args_os().collect();
    if all.get(1).is_none_or(|command| command != "worker") {
        return Ok(all);
    }
    let rest = all.split_off(2).into_iter().map(OsString::into_string).collect::<Result<Vec<_>, _>>();
    let rest = rest.map_err(|odd| format!("{} is not UTF-8", odd.to_string_lossy()))?;
    let sifted = vllm_flags::sift(rest)?;
    for warning in &sifted.warnings {
        eprintln!("warning: {warning}");
    }
    all.extend(sifted.args.into_iter().map(OsString::from));
    Ok(all)
}

fn main() -> ExitCode {
    let cli = match arguments() {
        Ok(arguments) => Cli::parse_from(arguments),
        Err(refused) => {
            eprintln!("error: {refused}");
            return ExitCode::from(USAGE_ERROR);
        }
    };
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
