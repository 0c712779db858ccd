//! Why a run can't start, and why one request failed. The first ends the run, the second is part of its result.

use std::path::PathBuf;
use std::time::Duration;

use forebay_types::{Blame, Class, Classify, Code};
use forebay_upstream::UpstreamError;

/// Why a run could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("`{url}` is not a usable base URL: {why}")]
    Url { url: String, why: &'static str },
    #[error("{option}: {why}")]
    Option { option: &'static str, why: &'static str },
    #[error("the API key has characters that no HTTP header can carry")]
    ApiKey,
    #[error("can't read prompts from {}", path.display())]
    PromptsFile { path: PathBuf, source: std::io::Error },
    #[error("line {line} of {} is no prompt: {why}", path.display())]
    PromptLine { path: PathBuf, line: usize, why: &'static str },
    #[error("{} has no prompts", path.display())]
    NoPrompts { path: PathBuf },
    #[error("can't ask {url} which models it has: {failure}; name one with `model`")]
    Models { url: String, failure: Failure },
    #[error("{url} lists no model; name one with `model`")]
    NoModel { url: String },
    #[error("every warm-up request failed, the first with: {failure}")]
    WarmUp { failure: Failure },
}

impl Classify for LoadError {
    fn class(&self) -> Class {
        match self {
            Self::Url { .. }
            | Self::Option { .. }
            | Self::ApiKey
            | Self::PromptsFile { .. }
            | Self::PromptLine { .. }
            | Self::NoPrompts { .. } => Class::new(Code::BadRequest, Blame::Client),
            Self::NoModel { .. } => Class::new(Code::ModelNotFound, Blame::Upstream),
            Self::Models { failure, .. } | Self::WarmUp { failure } => {
                let code = match failure.kind {
                    FailureKind::Timeout => Code::UpstreamTimeout,
                    _ => Code::UpstreamFailed,
                };
                Class::new(code, Blame::Upstream)
            }
        }
    }
}

/// How a request failed. Few enough kinds to be counted one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FailureKind {
    /// No connection: refused, unreachable, TLS, or too slow.
    Connect,
    /// Not done within the time that one request has.
    Timeout,
    /// Any answer but 2xx.
    Status(u16),
    /// The connection broke within the request.
    Disconnect,
    /// An answer that is not what was asked for: no HTTP, no SSE, no JSON.
    BadAnswer,
    /// An error in the stream, after a 200.
    ErrorInStream,
    /// The stream ended without `[DONE]`.
    CutStream,
    /// A good answer without a single token.
    NoTokens,
}

impl std::fmt::Display for FailureKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = match self {
            Self::Connect => "connect",
            Self::Timeout => "timeout",
            Self::Status(status) => return write!(f, "status_{status}"),
            Self::Disconnect => "disconnect",
            Self::BadAnswer => "bad_answer",
            Self::ErrorInStream => "error_in_stream",
            Self::CutStream => "cut_stream",
            Self::NoTokens => "no_tokens",
        };
        f.write_str(text)
    }
}

/// One failed request: its kind, and what the server or the network said, cut to a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

/// Of a message, in bytes.
const MESSAGE_MAX: usize = 240;

impl Failure {
    pub(crate) fn new(kind: FailureKind, message: &str) -> Self {
        let line = message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
        let mut message: String = line.chars().filter(|c| !c.is_control()).collect();
        if message.len() > MESSAGE_MAX {
            message.truncate(message.floor_char_boundary(MESSAGE_MAX));
            message.push('…');
        }
        Self { kind, message }
    }

    pub(crate) fn timeout(after: Duration) -> Self {
        Self::new(FailureKind::Timeout, &format!("not done within {} ms", after.as_millis()))
    }

    /// An answer with a status that is not a success.
    pub(crate) fn status(status: http::StatusCode, body: &[u8]) -> Self {
        let text = match forebay_wire::parse_error(body) {
            Some(error) => error.message,
            None => String::from_utf8_lossy(body).into_owned(),
        };
        Self::new(FailureKind::Status(status.as_u16()), &text)
    }

    /// Takes a secret out of the message: some servers repeat a wrong key.
    pub(crate) fn without(mut self, secret: Option<&str>) -> Self {
        if let Some(secret) = secret.filter(|secret| !secret.is_empty())
            && self.message.contains(secret)
        {
            self.message = self.message.replace(secret, "<key>");
        }
        self
    }
}

impl From<&UpstreamError> for Failure {
    fn from(error: &UpstreamError) -> Self {
        let kind = match error {
            UpstreamError::Url { .. }
            | UpstreamError::Connect { .. }
            | UpstreamError::Tls { .. }
            | UpstreamError::ConnectTimeout { .. }
            | UpstreamError::Busy { .. } => FailureKind::Connect,
            UpstreamError::FirstByteTimeout { .. } | UpstreamError::IdleTimeout { .. } => {
                FailureKind::Timeout
            }
            UpstreamError::Reset { .. } | UpstreamError::Stale { .. } | UpstreamError::RequestBody { .. } => {
                FailureKind::Disconnect
            }
            UpstreamError::Protocol { .. } | UpstreamError::AnswerTooLarge { .. } => FailureKind::BadAnswer,
        };
        Self::new(kind, &error.detail())
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.message.is_empty() {
            true => self.kind.fmt(f),
            false => write!(f, "{}: {}", self.kind, self.message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_short_line_without_the_key() {
        let check = |text: &str, expect: &str| {
            let failure = Failure::new(FailureKind::BadAnswer, text).without(Some("sk-1"));
            assert_eq!(failure.message, expect, "{text}");
        };
        check("", "");
        check("\n\n  a b\u{7}\nc", "a b");
        check("wrong key sk-1!", "wrong key <key>!");
        check(&"é".repeat(200), &format!("{}…", "é".repeat(120)));
    }

    #[test]
    fn a_status_carries_the_server_s_words() {
        let check = |body: &str, expect: &str| {
            let failure = Failure::status(http::StatusCode::TOO_MANY_REQUESTS, body.as_bytes());
            assert_eq!(failure.to_string(), expect);
        };
        check(r#"{"error":{"message":"slow down"}}"#, "status_429: slow down");
        check("<html>", "status_429: <html>");
        check("", "status_429");
    }
}
