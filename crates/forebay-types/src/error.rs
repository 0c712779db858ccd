//! What an error means to a caller: a closed set of codes, who is to blame, and whether to try again.
//!
//! Layers have their own error enums; each says its [`Class`] by one exhaustive `match` ([`Classify`]). Between
//! layers a [`Fault`] travels: the class and the message, and nothing that would tempt a caller to parse text.
//! `forebay-wire` is the one place that turns a class into a status and a body.

use std::fmt;
use std::time::Duration;

/// What went wrong, as a client may know it. One code, one HTTP status, one OpenAI `type` and `code`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// The request is malformed or a value is not allowed.
    BadRequest,
    /// Prompt and `max_tokens` don't fit the model.
    ContextLengthExceeded,
    /// No key, or one that nobody has.
    InvalidApiKey,
    /// The key is good, but not for this model.
    ModelDenied,
    /// Nobody here serves this model.
    ModelNotFound,
    /// No route at this path.
    RouteNotFound,
    MethodNotAllowed,
    /// The client was too slow to send its request.
    RequestTimeout,
    BodyTooLarge,
    HeadersTooLarge,
    UnsupportedMediaType,
    /// Requests per minute.
    RequestsRateLimited,
    /// Tokens per minute.
    TokensRateLimited,
    /// More than the consumer may ever have; trying again doesn't help.
    InsufficientQuota,
    /// A queue is full.
    Overloaded,
    /// Known model, but nothing healthy to serve it.
    ModelUnavailable,
    /// The process is draining.
    ShuttingDown,
    /// The upstream refused, failed or broke off.
    UpstreamFailed,
    UpstreamTimeout,
    /// Known to the API, not supported here.
    NotSupported,
    /// A defect of ours.
    Internal,
}

/// Who has to change something for the request to succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blame {
    Client,
    Us,
    Upstream,
}

impl Blame {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Us => "us",
            Self::Upstream => "upstream",
        }
    }
}

/// Whether the same request may be sent again, decided where it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Retry {
    /// It would fail again, or it may already have had an effect.
    Never,
    /// Nothing reached the client and nothing was computed that a retry would double: try another replica now.
    Elsewhere,
    /// Later, not before this long.
    After(Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Class {
    pub code: Code,
    pub blame: Blame,
    pub retry: Retry,
}

impl Class {
    pub fn new(code: Code, blame: Blame) -> Self {
        Self { code, blame, retry: Retry::Never }
    }

    pub fn retry(self, retry: Retry) -> Self {
        Self { retry, ..self }
    }
}

/// Says what an error means to a caller. Implemented beside each error enum, by one exhaustive `match`.
pub trait Classify: fmt::Display {
    fn class(&self) -> Class;

    /// The request field at fault (`messages`, `max_tokens`), as OpenAI's `param`.
    fn param(&self) -> Option<&str> {
        None
    }
}

/// An error on its way up to the client.
///
/// The message goes to the client: it names the limit and what to do, and holds no secret, path or address.
/// `detail` stays in our logs.
#[derive(Debug, Clone)]
pub struct Fault {
    pub class: Class,
    pub message: String,
    pub param: Option<String>,
    /// For the log only.
    pub detail: Option<String>,
    /// Extra response headers (`x-ratelimit-*`), lower-case names.
    pub headers: Vec<(&'static str, String)>,
}

impl Fault {
    pub fn new(class: Class, message: impl Into<String>) -> Self {
        Self { class, message: message.into(), param: None, detail: None, headers: Vec::new() }
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(Class::new(Code::BadRequest, Blame::Client), message)
    }

    pub fn internal(detail: impl Into<String>) -> Self {
        Self::new(
            Class::new(Code::Internal, Blame::Us),
            "internal error; the log has the details under this request id",
        )
        .detail(detail)
    }

    pub fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    pub fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

impl<E: Classify> From<E> for Fault {
    fn from(error: E) -> Self {
        let mut fault = Self::new(error.class(), error.to_string());
        fault.param = error.param().map(str::to_owned);
        fault
    }
}

/// Not `std::error::Error` on purpose: a `Fault` is already classified, and a blanket `From` must not wrap it again.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
