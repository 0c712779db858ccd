//! The log on stderr: `RUST_LOG` chooses what, `--log-format` how.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::cli::{Log, LogFormat};

/// What is logged where `RUST_LOG` is not set.
const DEFAULT_FILTER: &str = "info";

pub(crate) fn init(log: Log) {
    let filter = match std::env::var_os(EnvFilter::DEFAULT_ENV) {
        None => EnvFilter::new(DEFAULT_FILTER),
        Some(_) => EnvFilter::try_from_default_env().unwrap_or_else(|error| {
            eprintln!("warning: RUST_LOG can't be used ({error}); logging at `{DEFAULT_FILTER}`");
            EnvFilter::new(DEFAULT_FILTER)
        }),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // A second initialisation only happens in tests.
    let _ = match log.log_format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}
