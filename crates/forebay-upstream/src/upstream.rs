//! [`Upstream`]: one server that speaks OpenAI's dialect, a replica of ours or a provider.

use std::time::Duration;

use bytes::Bytes;
use forebay_flow::{FAIRNESS_ID, Origin, Reply};
use forebay_types::{ConsumerName, ModelName};
use forebay_wire::{Embed, Generate};
use http::header::{self, HeaderName};
use http::{HeaderValue, Method, Request, StatusCode};
use tokio::time::Instant;

use crate::client::{Collected, HttpClient, full};
use crate::fault::refused;
use crate::reply::{into_reply, read_error};
use crate::{UpstreamError, UpstreamFault};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Largest answer to a small call (`/v1/models`, `/metrics`, `/tokenize`) in bytes.
const SMALL_ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;

/// A base URL that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BaseUrlError {
    #[error("`{url}` is not a URL; write it like http://127.0.0.1:8001")]
    Syntax { url: String },
    #[error("`{url}` must begin with http:// or https://")]
    Scheme { url: String },
    #[error("`{url}` must not have a query or a user name; keys belong into `api-key`")]
    Extra { url: String },
    /// The key itself is not repeated.
    #[error("the API key has characters that can't stand in an HTTP header")]
    Key,
}

/// What the client wants of a generation, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallInfo {
    /// The name that the client used: the answer says it, whatever the upstream calls its model.
    pub model: ModelName,
    pub stream: bool,
    /// What the client wants to see of a stream's usage. What it does not want is read for accounting and taken out.
    pub usage: StreamUsage,
    /// Whose call it is, for replicas that give turns; `None` where the upstream is somebody else's.
    pub tenant: Option<ConsumerName>,
}

/// What a client sees of the usage in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamUsage {
    Hidden,
    /// Once, in a frame of its own before `[DONE]`.
    AtTheEnd,
    /// As the upstream sends it.
    Verbatim,
}

impl CallInfo {
    /// `counts_as_it_goes`: the upstream was asked to send usage in every frame ([`forebay_wire::for_replica`]).
    pub fn new(call: &Generate, counts_as_it_goes: bool) -> Self {
        let usage = match (call.include_usage, call.continuous_usage) {
            (false, _) => StreamUsage::Hidden,
            (true, false) if counts_as_it_goes => StreamUsage::AtTheEnd,
            (true, _) => StreamUsage::Verbatim,
        };
        Self { model: call.model.clone(), stream: call.stream, usage, tenant: None }
    }

    pub fn of_tenant(self, tenant: &ConsumerName) -> Self {
        Self { tenant: Some(tenant.clone()), ..self }
    }

    /// Of a call that is answered with one JSON body.
    pub fn of_embedding(call: &Embed) -> Self {
        Self { model: call.model.clone(), stream: false, usage: StreamUsage::Hidden, tenant: None }
    }
}

/// Limits on silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// From sending to the first event of a stream, or to the head of a JSON answer (which an engine sends when the
    /// whole text is there).
    pub first_byte: Duration,
    /// Longest silence after that.
    pub between_chunks: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { first_byte: Duration::from_secs(120), between_chunks: Duration::from_secs(60) }
    }
}

/// One server with an OpenAI-shaped API. Cheap to clone.
#[derive(Clone)]
pub struct Upstream {
    client: HttpClient,
    /// `http://127.0.0.1:8001`, no slash at the end.
    base: String,
    authority: String,
    authorization: Option<HeaderValue>,
}

impl Upstream {
    /// `base_url` may have a path (`https://api.openai.com/v1`). `api_key` goes out as a bearer token.
    pub fn new(client: HttpClient, base_url: &str, api_key: Option<&str>) -> Result<Self, BaseUrlError> {
        let url = || base_url.to_owned();
        let uri: http::Uri = base_url.parse().map_err(|_| BaseUrlError::Syntax { url: url() })?;
        let authority = uri.authority().ok_or_else(|| BaseUrlError::Syntax { url: url() })?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(BaseUrlError::Scheme { url: url() });
        }
        if uri.query().is_some() || authority.as_str().contains('@') {
            return Err(BaseUrlError::Extra { url: url() });
        }
        let authorization = match api_key {
            Some(key) => {
                let mut value =
                    HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| BaseUrlError::Key)?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        let authority = authority.as_str().to_owned();
        Ok(Self { client, base: base_url.trim_end_matches('/').to_owned(), authority, authorization })
    }

    /// As configured, without a slash at the end: fit for logs and metrics.
    pub fn base_url(&self) -> &str {
        &self.base
    }

    /// Posts a generation, or what is answered like one that does not stream, and waits until its first event is there, so that every failure before is an `Err` that
    /// may be retried elsewhere.
    ///
    /// `path` is the API's (`/v1/chat/completions`); `body` is the JSON for this upstream, with
    /// `stream_options.include_usage` set where it streams. The reply's chunks are `Verbatim`: one SSE frame each, or
    /// the whole JSON body, with the client's model name and what it wants of usage, everything else as it came. A
    /// stream that ends without `[DONE]` ends with an `Err`.
    ///
    /// Cancellation: guarded. Dropping the future or the chunks closes the connection at once.
    pub async fn generate(
        &self,
        origin: &Origin,
        path: &str,
        body: Bytes,
        call: CallInfo,
        timeouts: Timeouts,
    ) -> Result<Reply, UpstreamFault> {
        let deadline = Instant::now() + timeouts.first_byte;
        let accept = if call.stream { "text/event-stream" } else { "application/json" };
        // A name that no header can hold is not worth a failure.
        let tenant = call.tenant.as_ref().and_then(|name| HeaderValue::from_str(name.as_str()).ok());
        let request = || {
            let mut request = self
                .request(Some(origin), Method::POST, path, accept)
                .header(header::CONTENT_TYPE, "application/json");
            if let Some(tenant) = &tenant {
                request = request.header(FAIRNESS_ID, tenant);
            }
            request.body(full(body.clone())).map_err(|_| UpstreamError::Url { why: "bad path" })
        };
        let answered = async {
            match self.client.send(request()?).await {
                // llama.cpp's server closes kept connections without a word. A generation has no effect but its
                // cost, and nothing of it has come back: it may be repeated.
                Err(UpstreamError::Stale { .. }) => self.client.send_fresh(request()?).await,
                sent => sent,
            }
        };
        let response = tokio::time::timeout_at(deadline, answered)
            .await
            .map_err(|_| self.first_byte_timeout(timeouts.first_byte))??;
        let (head, body) = response.into_parts();
        if !head.status.is_success() {
            let body = read_error(body, &self.authority).await;
            return Err(refused(head.status, &head.headers, &body, &self.authority));
        }
        match tokio::time::timeout_at(
            deadline,
            into_reply(&head.headers, body, call, timeouts, &self.authority),
        )
        .await
        {
            Ok(reply) => reply,
            Err(_) => Err(self.first_byte_timeout(timeouts.first_byte).into()),
        }
    }

    /// A small call: any method, the whole answer within `timeout`. Statuses other than 2xx are faults.
    pub async fn call(
        &self,
        origin: Option<&Origin>,
        method: Method,
        path: &str,
        body: Option<Bytes>,
        timeout: Duration,
    ) -> Result<Collected, UpstreamFault> {
        let mut request = self.request(origin, method, path, "*/*");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(full(body.unwrap_or_default()))
            .map_err(|_| UpstreamError::Url { why: "bad path" })?;
        let answer = self.client.exchange(request, SMALL_ANSWER_BYTES_MAX, timeout).await?;
        if !answer.status.is_success() {
            return Err(refused(answer.status, &answer.headers, &answer.body, &self.authority));
        }
        Ok(answer)
    }

    /// `GET` of a JSON document.
    pub async fn get_json<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        timeout: Duration,
    ) -> Result<T, UpstreamFault> {
        let answer = self.call(None, Method::GET, path, None, timeout).await?;
        serde_json::from_slice(&answer.body).map_err(|source| {
            UpstreamError::Protocol { authority: self.authority.clone(), source: source.into() }.into()
        })
    }

    /// Health check: the status of `GET path`, and how long it took.
    pub async fn probe(
        &self,
        path: &str,
        timeout: Duration,
    ) -> Result<(StatusCode, Duration), UpstreamError> {
        let begun = Instant::now();
        let request = self
            .request(None, Method::GET, path, "*/*")
            .body(full(Bytes::new()))
            .map_err(|_| UpstreamError::Url { why: "bad path" })?;
        let answer = self.client.exchange(request, SMALL_ANSWER_BYTES_MAX, timeout).await?;
        Ok((answer.status, begun.elapsed()))
    }

    fn request(
        &self,
        origin: Option<&Origin>,
        method: Method,
        path: &str,
        accept: &'static str,
    ) -> http::request::Builder {
        let mut request = Request::builder()
            .method(method)
            .uri(join(&self.base, path))
            .header(header::ACCEPT, accept)
            .header(header::USER_AGENT, concat!("forebay/", env!("CARGO_PKG_VERSION")));
        if let Some(key) = &self.authorization {
            request = request.header(header::AUTHORIZATION, key);
        }
        if let Some(origin) = origin {
            request = request
                .header(X_REQUEST_ID, origin.id.as_str())
                .header(TRACEPARENT, origin.trace.context().header());
        }
        request
    }

    fn first_byte_timeout(&self, after: Duration) -> UpstreamError {
        UpstreamError::FirstByteTimeout { authority: self.authority.clone(), after }
    }
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upstream").field("base", &self.base).finish_non_exhaustive()
    }
}

/// Both `http://host` and `http://host/v1` are common as base URLs; `/v1` is not doubled.
fn join(base: &str, path: &str) -> String {
    match path.strip_prefix("/v1/") {
        Some(rest) if base.ends_with("/v1") => format!("{base}/{rest}"),
        _ => format!("{base}{path}"),
    }
}
