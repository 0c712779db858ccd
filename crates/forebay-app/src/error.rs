//! Why the program can't start, and where in the file the mistake is.

use std::borrow::Cow;

use forebay_config::{Diagnostic, Loaded};

use crate::config::Config;

/// Why a stack can't be built from a configuration that is well-formed.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// `at` is the section of the engine: `engine`, or `engine[1]` where there are several.
    #[error("{source}")]
    Engine { at: String, source: forebay_engine::StartError },
    #[error(transparent)]
    Router(#[from] forebay_router::RouterBuildError),
    #[error(transparent)]
    Proxy(#[from] forebay_proxy::ProxyBuildError),
    #[error(transparent)]
    Gateway(#[from] forebay_gateway::GatewayBuildError),
    #[error("metrics can't be registered")]
    Metrics(#[from] forebay_observe::MetricError),
}

impl BuildError {
    /// Path in the configuration, where the mistake is in one place.
    pub fn at(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::Engine { at, source } => {
                let below = source.at().strip_prefix("engine").unwrap_or_default();
                Some(format!("{at}{below}").into())
            }
            Self::Router(error) => error.at().map(Cow::from),
            Self::Proxy(error) => error.at().map(Cow::from),
            Self::Gateway(error) => error.at().map(Cow::from),
            Self::Metrics(_) => None,
        }
    }

    /// The error as a diagnostic that points into the file.
    pub fn diagnostic(&self, loaded: &Loaded<Config>) -> Diagnostic {
        let message = one_line(self);
        match self.at() {
            Some(path) => loaded.error_at(&path, message),
            None => Diagnostic::error(message),
        }
    }
}

/// An error with its sources, on one line.
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some say their source in the middle of a sentence.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
