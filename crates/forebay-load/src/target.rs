//! The server under test: where its endpoints are, which model it has, how it tokenizes.

use std::time::Duration;

use forebay_config::SecretValue;
use forebay_upstream::{ClientConfig, Collected, HttpClient, RequestBody, full};
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, USER_AGENT};
use http::{HeaderValue, Method, Request, Uri};
use serde_json::{Value, json};

use crate::error::{Failure, FailureKind, LoadError};
use crate::options::Options;
use crate::prompts::{self, SAMPLE_WORDS};

/// For the model list and the tokenizer, which answer at once or not at all.
const ASIDE_TIMEOUT: Duration = Duration::from_secs(15);

/// An answer that is not a stream at most.
pub(crate) const ANSWER_BYTES_MAX: usize = 64 << 20;

/// One server and how to talk to it.
pub(crate) struct Target {
    pub(crate) client: HttpClient,
    /// Scheme, host and path in front of `/v1`, without a slash at the end.
    pub(crate) root: String,
    pub(crate) endpoint: Uri,
    authorization: Option<HeaderValue>,
    secret: Option<SecretValue>,
    stream: bool,
}

impl Target {
    /// Opens no connection yet.
    pub(crate) fn new(options: &Options) -> Result<Self, LoadError> {
        let root = root_of(&options.url)?;
        let endpoint = format!("{root}{}", options.endpoint.path());
        let endpoint = endpoint.parse().map_err(|_| bad_url(&options.url, "it can't be parsed"))?;
        let authorization = match &options.api_key {
            None => None,
            Some(key) => {
                let value = HeaderValue::from_str(&format!("Bearer {}", key.expose()));
                let mut value = value.map_err(|_| LoadError::ApiKey)?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        // One connection per request in flight, all of them kept: a benchmark of a server is not one of dialling.
        let connections = options.load.in_flight_max() as usize;
        let client = HttpClient::new(ClientConfig {
            connect_timeout: options.request_timeout.min(Duration::from_secs(10)),
            idle_per_host_max: connections,
            connections_per_host_max: connections + 1,
            ..ClientConfig::default()
        });
        let secret = options.api_key.clone();
        Ok(Self { client, root, endpoint, authorization, secret, stream: options.stream })
    }

    /// A generation request.
    pub(crate) fn post(&self, body: bytes::Bytes) -> Request<RequestBody> {
        let accept = if self.stream { "text/event-stream" } else { "application/json" };
        self.request(Method::POST, self.endpoint.clone(), accept, body)
    }

    /// Makes a failure fit to be shown.
    pub(crate) fn redact(&self, failure: Failure) -> Failure {
        failure.without(self.secret.as_ref().map(SecretValue::expose))
    }

    /// The first model that the server lists.
    pub(crate) async fn first_model(&self) -> Result<String, LoadError> {
        let url = format!("{}/v1/models", self.root);
        let answer = self.aside(Method::GET, "/v1/models", bytes::Bytes::new()).await;
        let answer = answer.map_err(|failure| LoadError::Models { url: url.clone(), failure })?;
        let list: Value = serde_json::from_slice(&answer.body).map_err(|_| LoadError::Models {
            url: url.clone(),
            failure: Failure::new(FailureKind::BadAnswer, "the list is not JSON"),
        })?;
        let first = list["data"][0]["id"].as_str().map(str::to_owned);
        first.ok_or(LoadError::NoModel { url })
    }

    /// Tokens per word of a synthetic prompt, where the server has a tokenizer to ask: vLLM's `/tokenize` with
    /// `prompt`, or llama.cpp's with `content`.
    pub(crate) async fn tokens_per_word(&self, model: &str, seed: u64) -> Option<f64> {
        let text = prompts::sample_text(seed);
        let vllm = json!({"model": model, "prompt": text, "add_special_tokens": false});
        let llama_cpp = json!({"content": text, "add_special": false});
        for body in [vllm, llama_cpp] {
            let answer = self.aside(Method::POST, "/tokenize", body.to_string().into()).await;
            let Some(tokens) = answer.ok().and_then(|answer| count_of(&answer.body)) else { continue };
            let ratio = tokens as f64 / SAMPLE_WORDS as f64;
            // Less than half a token or more than a token per letter is not about our text.
            if (0.5..=8.0).contains(&ratio) {
                return Some(ratio);
            }
        }
        None
    }

    async fn aside(&self, method: Method, path: &str, body: bytes::Bytes) -> Result<Collected, Failure> {
        let uri = format!("{}{path}", self.root).parse();
        let uri = uri.map_err(|_| Failure::new(FailureKind::Connect, "the URL can't be parsed"))?;
        let request = self.request(method, uri, "application/json", body);
        let answer = self.client.exchange(request, ANSWER_BYTES_MAX, ASIDE_TIMEOUT).await;
        let answer = answer.map_err(|error| self.redact(Failure::from(&error)))?;
        match answer.status.is_success() {
            true => Ok(answer),
            false => Err(self.redact(Failure::status(answer.status, &answer.body))),
        }
    }

    fn request(
        &self,
        method: Method,
        uri: Uri,
        accept: &'static str,
        body: bytes::Bytes,
    ) -> Request<RequestBody> {
        let mut request = Request::new(full(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT, HeaderValue::from_static(accept));
        let agent = HeaderValue::from_static(concat!("forebay-bench/", env!("CARGO_PKG_VERSION")));
        headers.insert(USER_AGENT, agent);
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        request
    }
}

fn count_of(body: &[u8]) -> Option<u64> {
    let value: Value = serde_json::from_slice(body).ok()?;
    let listed = || value["tokens"].as_array().map(|tokens| tokens.len() as u64);
    value["count"].as_u64().or_else(listed).filter(|count| *count > 0)
}

fn bad_url(url: &str, why: &'static str) -> LoadError {
    // A password in a URL must not be repeated.
    let shown = match url.split_once("://").and_then(|(scheme, rest)| Some((scheme, rest.split_once('@')?.1)))
    {
        Some((scheme, rest)) => format!("{scheme}://…@{rest}"),
        None => url.to_owned(),
    };
    LoadError::Url { url: shown, why }
}

/// The part in front of `/v1`.
fn root_of(url: &str) -> Result<String, LoadError> {
    let trimmed = url.trim().trim_end_matches('/');
    let root = trimmed.strip_suffix("/v1").unwrap_or(trimmed).trim_end_matches('/');
    let parsed: Uri = root.parse().map_err(|_| bad_url(url, "it can't be parsed"))?;
    match parsed.scheme_str() {
        Some("http" | "https") => {}
        Some(_) => return Err(bad_url(url, "the scheme is neither http nor https")),
        None => return Err(bad_url(url, "begin it with http:// or https://")),
    }
    if parsed.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(bad_url(url, "it can't hold a user name; use the API key"));
    }
    if parsed.query().is_some() {
        return Err(bad_url(url, "it can't hold a query"));
    }
    Ok(root.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_urls() {
        let check = |url: &str, expect: Result<&str, &str>| {
            let found = root_of(url).map_err(|error| error.to_string());
            assert_eq!(found.as_deref().map_err(String::as_str), expect, "{url}");
        };
        check("http://127.0.0.1:8080", Ok("http://127.0.0.1:8080"));
        check("http://127.0.0.1:8080/", Ok("http://127.0.0.1:8080"));
        check("http://127.0.0.1:8080/v1", Ok("http://127.0.0.1:8080"));
        check("https://llm.example/api/v1/", Ok("https://llm.example/api"));
        check("http://host/v1beta", Ok("http://host/v1beta"));
        let no_scheme = "`127.0.0.1:8080` is not a usable base URL: begin it with http:// or https://";
        check("127.0.0.1:8080", Err(no_scheme));
        let scheme = "`ws://host` is not a usable base URL: the scheme is neither http nor https";
        check("ws://host", Err(scheme));
        let user = "`http://…@host` is not a usable base URL: it can't hold a user name; use the API key";
        check("http://me:secret@host", Err(user));
        check("http://host/?a=1", Err("`http://host/?a=1` is not a usable base URL: it can't hold a query"));
    }

    #[test]
    fn token_counts() {
        let check = |body: &str, expect| assert_eq!(count_of(body.as_bytes()), expect, "{body}");
        check(r#"{"count":3,"max_model_len":9,"tokens":[1,2,3]}"#, Some(3));
        check(r#"{"tokens":[5,6]}"#, Some(2));
        check(r#"{"tokens":[]}"#, None);
        check("nonsense", None);
    }
}
