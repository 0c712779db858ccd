//! What operators and routers ask a process, in vLLM's shape: its load, its KV events, aborts and pauses.
//!
//! The edge knows no engine: the composition says what there is to say. Here is only how it looks over HTTP.

use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;
use forebay_types::{Blame, Class, Code, Fault};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, Response, StatusCode};
use hyper::body::Incoming;

use crate::answer::{self, Content};
use crate::service::Shared;
use crate::{body, cors, llm};

/// The header by which a client asks for the load of whoever answers: ORCA, as gateways for inference do.
const LOAD_FORMAT: HeaderName = HeaderName::from_static("endpoint-load-metrics-format");
const LOAD: HeaderName = HeaderName::from_static("endpoint-load-metrics");

/// Bytes of a body with request ids.
const BODY_BYTES_MAX: u64 = 1024 * 1024;

/// A request to the process itself.
#[derive(Debug, Clone)]
pub struct OperatorAsk {
    pub method: Method,
    /// Without a mount.
    pub path: String,
    pub query: Option<String>,
    pub body: Bytes,
}

/// How much there is to do, over all engines of the process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OperatorLoad {
    /// Of the fullest KV cache, from 0 to 1.
    pub kv_cache_usage: f64,
    pub requests_waiting: u64,
}

pub type OperatorFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What an [`Operator`] answers: paths, and the method of each. `/load` stands beside them; the listener answers it.
pub static OPERATOR_PATHS: [(&str, Method); 5] = [
    ("/kv_event_sources", Method::GET),
    ("/is_paused", Method::GET),
    ("/abort_requests", Method::POST),
    ("/pause", Method::POST),
    ("/resume", Method::POST),
];

/// The method of an operator's path.
pub fn operator_method(path: &str) -> Option<Method> {
    OPERATOR_PATHS.iter().find(|(own, _)| *own == path).map(|(_, method)| method.clone())
}

/// Answers for the process.
pub trait Operator: Send + Sync + 'static {
    /// One of [`OPERATOR_PATHS`], by whatever method. `None` is an answer without a body.
    fn answer(&self, ask: OperatorAsk) -> OperatorFuture<Result<Option<serde_json::Value>, Fault>>;

    /// `None` where no engine is in this process.
    fn load(&self) -> Option<OperatorLoad>;

    /// The end of a drain: whatever still runs is ended in a way that its client understands. False where nothing is.
    fn abort_all(&self) -> OperatorFuture<bool>;
}

/// Answers a path of the operator's, where that is configured; else gives the request back.
pub(crate) async fn answer(
    shared: &Shared,
    parts: &http::request::Parts,
    incoming: Incoming,
    path: &str,
) -> Result<Response<Content>, Incoming> {
    let Some(operator) = &shared.operator else { return Err(incoming) };
    if path == "/load" && parts.method == Method::GET {
        let load = serde_json::json!({ "server_load": shared.metrics.llm_in_flight.get() });
        return Ok(answer::json(StatusCode::OK, load.to_string()));
    }
    if operator_method(path).is_none() {
        return Err(incoming);
    }
    // A page in somebody's browser can send a POST here without asking; nothing is changed on its behalf.
    if parts.method != Method::GET && parts.headers.contains_key(cors::ORIGIN) {
        body::linger(incoming, &parts.headers);
        let class = Class::new(Code::ModelDenied, Blame::Client);
        let mut answer =
            answer::fault(&Fault::new(class, "pages can't change how this process works"), shared.dialect);
        llm::close(parts, &mut answer);
        return Ok(answer);
    }
    let mut incoming = incoming;
    let body = body::collect(&mut incoming, BODY_BYTES_MAX, shared.limits.body_timeout.get()).await;
    let body = match body {
        Ok(body) => body,
        Err(error) => {
            shared.metrics.refuse(error.reason());
            body::linger(incoming, &parts.headers);
            let mut answer = answer::fault(&error.into(), shared.dialect);
            llm::close(parts, &mut answer);
            return Ok(answer);
        }
    };
    let ask = OperatorAsk {
        method: parts.method.clone(),
        path: path.to_owned(),
        query: parts.uri.query().map(str::to_owned),
        body,
    };
    Ok(match operator.answer(ask).await {
        Ok(Some(body)) => answer::json(StatusCode::OK, body.to_string()),
        Ok(None) => Response::new(Content::Full(Bytes::new())),
        Err(fault) => answer::fault(&fault, shared.dialect),
    })
}

/// Whether a path is the operator's, where that is configured.
pub(crate) fn has(shared: &Shared, path: &str) -> bool {
    shared.operator.is_some() && operator_method(path).is_some()
}

/// Whether a path changes how the process works, so that it takes a key where there is one. vLLM leaves these open.
pub(crate) fn needs_key(shared: &Shared, method: &Method, path: &str) -> bool {
    *method != Method::GET && has(shared, path)
}

/// Adds the load to an answer whose client asked for it.
pub(crate) fn tell_load(shared: &Shared, asked: &HeaderMap, answer: &mut HeaderMap) {
    let Some(format) = asked.get(LOAD_FORMAT) else { return };
    let Some(load) = shared.operator.as_ref().and_then(|operator| operator.load()) else { return };
    if let Some(value) = render_load(format.as_bytes(), &load) {
        answer.insert(LOAD, value);
    }
}

/// vLLM's `endpoint-load-metrics`; `None` for a format that it does not have.
fn render_load(format: &[u8], load: &OperatorLoad) -> Option<HeaderValue> {
    let OperatorLoad { kv_cache_usage, requests_waiting } = *load;
    let waiting = requests_waiting as f64;
    let text = if format.eq_ignore_ascii_case(b"text") {
        format!(
            "TEXT named_metrics.kv_cache_usage_perc={kv_cache_usage:?}, named_metrics.num_requests_waiting={waiting:?}"
        )
    } else if format.eq_ignore_ascii_case(b"json") {
        format!(
            "JSON {{\"named_metrics\": {{\"kv_cache_usage_perc\": {kv_cache_usage:?}, \"num_requests_waiting\": {waiting:?}}}}}"
        )
    } else {
        return None;
    };
    HeaderValue::from_str(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_told_as_vllm_does() {
        let load = OperatorLoad { kv_cache_usage: 0.4, requests_waiting: 2 };
        let check = |format: &str, expect: Option<&str>| {
            let told = render_load(format.as_bytes(), &load);
            assert_eq!(told.as_ref().map(|value| value.to_str().unwrap()), expect, "{format}");
        };
        let text = "TEXT named_metrics.kv_cache_usage_perc=0.4, named_metrics.num_requests_waiting=2.0";
        check("TEXT", Some(text));
        check("text", Some(text));
        let json = r#"JSON {"named_metrics": {"kv_cache_usage_perc": 0.4, "num_requests_waiting": 2.0}}"#;
        check("JSON", Some(json));
        let value: serde_json::Value = serde_json::from_str(json.trim_start_matches("JSON ")).unwrap();
        assert_eq!(value["named_metrics"]["num_requests_waiting"], 2.0);
        check("BIN", None);
        check("", None);
    }
}
