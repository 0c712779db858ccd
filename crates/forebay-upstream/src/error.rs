//! What can go wrong between us and an upstream, and whether trying again is safe.

use std::time::Duration;

use forebay_types::{Blame, Class, Classify, Code, Retry};

/// Any error of a source we only report.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why an HTTP exchange with an upstream failed.
///
/// `Display` is fit for a client: it names no address. [`UpstreamError::detail`] has the address and the cause, for
/// the log.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error("the upstream address is not a usable URL: {why}")]
    Url { why: &'static str },
    /// Refused, unreachable, name not found. Nothing was sent.
    #[error("the upstream can't be reached")]
    Connect { authority: String, source: std::io::Error },
    /// The TLS handshake failed, or there are no trusted roots. Nothing was sent.
    #[error("no secure connection to the upstream could be made")]
    Tls { authority: String, source: BoxError },
    /// No connection, TLS included, within the limit. Nothing was sent.
    #[error("no connection to the upstream within {} ms", after.as_millis())]
    ConnectTimeout { authority: String, after: Duration },
    /// As many connections as allowed are in use, and none came free in time. Nothing was sent.
    #[error("all {limit} connections to the upstream are in use")]
    Busy { authority: String, limit: usize },
    /// The connection broke. `unsent` says that no byte of this request had left.
    #[error("the upstream closed the connection")]
    Reset { authority: String, unsent: bool, source: BoxError },
    /// A kept connection was closed by the other side instead of an answer: it had most likely closed it before it
    /// read this request, but that can't be known.
    #[error("the upstream closed the connection")]
    Stale { authority: String, source: BoxError },
    /// What came back is not HTTP, or not what was agreed.
    #[error("the upstream's answer could not be understood")]
    Protocol { authority: String, source: BoxError },
    /// The body of our own request failed while it was sent: whoever produces it left, or sent nonsense.
    #[error("the request body broke off")]
    RequestBody { source: BoxError },
    #[error("the upstream did not answer within {} ms", after.as_millis())]
    FirstByteTimeout { authority: String, after: Duration },
    #[error("the upstream was silent for {} ms in the middle of its answer", after.as_millis())]
    IdleTimeout { authority: String, after: Duration },
    #[error("the upstream's answer is larger than {limit} bytes")]
    AnswerTooLarge { authority: String, limit: usize },
}

impl UpstreamError {
    /// Address and cause, for the log only.
    pub fn detail(&self) -> String {
        let (authority, source): (&str, Option<&dyn std::fmt::Display>) = match self {
            Self::Url { .. } => return self.to_string(),
            Self::Connect { authority, source } => (authority, Some(source)),
            Self::Tls { authority, source }
            | Self::Reset { authority, source, .. }
            | Self::Stale { authority, source }
            | Self::Protocol { authority, source } => (authority, Some(source)),
            Self::RequestBody { source } => return format!("{self}: {source}"),
            Self::ConnectTimeout { authority, .. }
            | Self::Busy { authority, .. }
            | Self::FirstByteTimeout { authority, .. }
            | Self::IdleTimeout { authority, .. }
            | Self::AnswerTooLarge { authority, .. } => (authority, None),
        };
        match source {
            Some(source) => format!("{authority}: {self}: {source}"),
            None => format!("{authority}: {self}"),
        }
    }

    /// No byte of the request reached the upstream: any request may be sent again.
    pub fn is_unsent(&self) -> bool {
        match self {
            Self::Url { .. }
            | Self::Connect { .. }
            | Self::Tls { .. }
            | Self::ConnectTimeout { .. }
            | Self::Busy { .. } => true,
            Self::Reset { unsent, .. } => *unsent,
            Self::Stale { .. }
            | Self::Protocol { .. }
            | Self::RequestBody { .. }
            | Self::FirstByteTimeout { .. }
            | Self::IdleTimeout { .. }
            | Self::AnswerTooLarge { .. } => false,
        }
    }

    /// The same error where the request went out on a connection that had been used before.
    pub(crate) fn on_reused(self) -> Self {
        match self {
            Self::Reset { authority, unsent: false, source } => Self::Stale { authority, source },
            other => other,
        }
    }

    /// Sorts a hyper error. `unsent` is what the caller knows about the request.
    pub(crate) fn from_hyper(authority: &str, error: hyper::Error, unsent: bool) -> Self {
        let authority = authority.to_owned();
        if error.is_user() {
            return Self::RequestBody { source: error.into() };
        }
        if error.is_parse() {
            return Self::Protocol { authority, source: error.into() };
        }
        Self::Reset { authority, unsent, source: error.into() }
    }
}

impl Classify for UpstreamError {
    /// `Retry` is for a request in general, which may have had an effect once it was sent. A generation is safer to
    /// repeat: see `UpstreamFault`.
    fn class(&self) -> Class {
        let failed = Class::new(Code::UpstreamFailed, Blame::Upstream);
        let timeout = Class::new(Code::UpstreamTimeout, Blame::Upstream);
        match self {
            Self::Url { .. } => Class::new(Code::UpstreamFailed, Blame::Us),
            Self::Connect { .. } | Self::Tls { .. } => failed.retry(Retry::Elsewhere),
            Self::ConnectTimeout { .. } => timeout.retry(Retry::Elsewhere),
            Self::Busy { .. } => Class::new(Code::Overloaded, Blame::Us).retry(Retry::Elsewhere),
            Self::Reset { unsent: true, .. } => failed.retry(Retry::Elsewhere),
            Self::Reset { unsent: false, .. } | Self::Stale { .. } => failed,
            Self::Protocol { .. } | Self::AnswerTooLarge { .. } => failed,
            Self::RequestBody { .. } => Class::new(Code::BadRequest, Blame::Client),
            Self::FirstByteTimeout { .. } | Self::IdleTimeout { .. } => timeout,
        }
    }
}
