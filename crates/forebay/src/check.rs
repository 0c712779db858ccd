//! `forebay check FILE`.

use std::io::IsTerminal;
use std::process::ExitCode;

use forebay_app::check::{Report, check};
use forebay_config::{RealEnvironment, Source};

use crate::cli::Check;

pub(crate) fn run(args: &Check) -> ExitCode {
    let source = match Source::read(&args.file) {
        Ok(source) => source,
        Err(error) => {
            if args.json {
                crate::out::line!(
                    "{}",
                    serde_json::json!({"ok": false, "error": error.to_string(), "findings": [], "layers": []})
                );
            } else {
                eprintln!("error: {error}");
            }
            return ExitCode::FAILURE;
        }
    };
    let report = check(&source, &RealEnvironment);
    let ok = !report.diagnostics.has_errors();
    if args.json {
        let findings = report.diagnostics.to_json();
        crate::out::line!("{}", serde_json::json!({"ok": ok, "findings": findings, "layers": report.layers}));
    } else {
        print(&report, &args.file.display().to_string());
    }
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print(report: &Report, file: &str) {
    if !report.diagnostics.is_empty() {
        if std::io::stderr().is_terminal() {
            eprintln!("{}", report.diagnostics.to_ansi());
        } else {
            eprintln!("{}", report.diagnostics);
        }
    }
    if report.diagnostics.has_errors() {
        let n = report.diagnostics.errors();
        eprintln!("{file}: {n} error{}", if n == 1 { "" } else { "s" });
        return;
    }
    crate::out::line!("{file} is right. Client requests pass, from the outside in:\n");
    for layer in &report.layers {
        let mark = if layer.runs { "runs" } else { "off " };
        crate::out::line!("  {:<8} {mark}  {}", layer.section, layer.does);
        let what = if layer.runs { "without it:" } else { "so:" };
        crate::out::line!("                  {what} {}", layer.without_it);
    }
}
