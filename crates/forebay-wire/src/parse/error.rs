//! Why a request is not understood.

use forebay_types::{Blame, Class, Classify, Code, Fault};
use http::Method;

use super::field::Kind;
use crate::Need;

/// Why a request is not understood. The client's own doing, so that a retry never helps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    #[error("Unknown request URL: {method} {path}. This server answers {routes}.")]
    RouteNotFound { method: Method, path: String, routes: &'static str },
    #[error("Adapters can't be loaded at run time: merge the adapter into its model and serve that.")]
    NoAdapters,
    #[error("Not allowed to {method} on {path}: only {allow} is.")]
    MethodNotAllowed { method: Method, path: String, allow: Method },
    #[error("Unsupported content-type '{given}': send the body as 'application/json'.")]
    NotJsonType { given: String },
    #[error("The request body is empty: expected a JSON object.")]
    Empty,
    #[error("We could not parse the JSON body of your request: {what} at line {line} column {column}.")]
    BadJson { what: String, line: usize, column: usize },
    #[error("Invalid type for the request body: expected a JSON object, but got {got} instead.")]
    NotAnObject { got: Kind },
    #[error("Duplicate key '{key}' in the request body.")]
    DuplicateKey { key: String },
    #[error("Too many keys in the request body: expected at most {limit}.")]
    TooManyKeys { limit: usize },
    #[error("Missing required parameter: '{param}'.")]
    Missing { param: String },
    #[error("Invalid type for '{param}': expected {expected}, but got {got} instead.")]
    Type { param: String, expected: &'static str, got: Kind },
    #[error("Invalid '{param}': {what}.")]
    Value { param: String, what: String },
    #[error(
        "Unsupported content-encoding '{given}': send the body as it is, uncompressed and without this header."
    )]
    Encoded { given: String },
    /// Without it nobody could answer: it is in the place of something that must be there.
    #[error(transparent)]
    NotSupported(Need),
}

impl ParseError {
    pub(super) fn value(param: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Value { param: param.into(), what: what.into() }
    }

    /// The same mistake in an inner object: its field is `prefix.field`, unless the field is one of `outer`.
    pub(super) fn below(mut self, prefix: &str, outer: &[&str]) -> Self {
        if let Self::Missing { param }
        | Self::Type { param, .. }
        | Self::Value { param, .. }
        | Self::NotSupported(Need { param, .. }) = &mut self
            && !outer.contains(&param.split(['.', '[']).next().unwrap_or_default())
        {
            *param = format!("{prefix}.{param}");
        }
        self
    }

    /// With the headers that say what would be right: `allow` of a 405, which must have it (RFC 9110, 15.5.6), and
    /// `accept-encoding` of a 415 about the encoding (15.5.16). `Fault::from` has no place for them.
    pub fn into_fault(self) -> Fault {
        let header = match &self {
            Self::MethodNotAllowed { allow, .. } => Some(("allow", allow.to_string())),
            Self::Encoded { .. } => Some(("accept-encoding", "identity".to_owned())),
            _ => None,
        };
        let fault = Fault::from(self);
        match header {
            Some((name, value)) => fault.header(name, value),
            None => fault,
        }
    }
}

impl Classify for ParseError {
    fn class(&self) -> Class {
        let code = match self {
            Self::RouteNotFound { .. } | Self::NoAdapters => Code::RouteNotFound,
            Self::MethodNotAllowed { .. } => Code::MethodNotAllowed,
            Self::NotJsonType { .. } | Self::Encoded { .. } => Code::UnsupportedMediaType,
            Self::NotSupported(need) => return need.class(),
            Self::Empty
            | Self::BadJson { .. }
            | Self::NotAnObject { .. }
            | Self::DuplicateKey { .. }
            | Self::TooManyKeys { .. }
            | Self::Missing { .. }
            | Self::Type { .. }
            | Self::Value { .. } => Code::BadRequest,
        };
        Class::new(code, Blame::Client)
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Missing { param } | Self::Type { param, .. } | Self::Value { param, .. } => Some(param),
            Self::NotSupported(need) => need.param(),
            Self::RouteNotFound { .. }
            | Self::NoAdapters
            | Self::MethodNotAllowed { .. }
            | Self::NotJsonType { .. }
            | Self::Encoded { .. }
            | Self::Empty
            | Self::BadJson { .. }
            | Self::NotAnObject { .. }
            | Self::DuplicateKey { .. }
            | Self::TooManyKeys { .. } => None,
        }
    }
}
