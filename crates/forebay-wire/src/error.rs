//! The one place that turns a class of error into a status, a body, headers or an SSE frame, in OpenAI's dialect or vLLM's.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use forebay_types::{Code, Fault, Retry};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde::{Deserialize, Serialize};

/// Whose form an error has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dialect {
    /// `error.type` and `error.code` are OpenAI's words; a stream that broke has no `[DONE]`.
    #[default]
    OpenAi,
    /// `error.type` is the name of vLLM's class of error, `error.code` the status as a number, what is missing is 501, and
    /// `[DONE]` follows the error of a stream.
    Vllm,
}

/// How one [`Code`] looks on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorRow {
    pub code: Code,
    /// Our own short name, for metrics labels and audit records.
    pub name: &'static str,
    pub status: u16,
    /// `error.type`
    pub kind: &'static str,
    /// `error.code`; `None` is `null`.
    pub wire_code: Option<&'static str>,
}

const CODES: [Code; 21] = [
    Code::BadRequest,
    Code::ContextLengthExceeded,
    Code::NotSupported,
    Code::InvalidApiKey,
    Code::ModelDenied,
    Code::ModelNotFound,
    Code::RouteNotFound,
    Code::MethodNotAllowed,
    Code::RequestTimeout,
    Code::BodyTooLarge,
    Code::UnsupportedMediaType,
    Code::HeadersTooLarge,
    Code::RequestsRateLimited,
    Code::TokensRateLimited,
    Code::InsufficientQuota,
    Code::Internal,
    Code::UpstreamFailed,
    Code::Overloaded,
    Code::ModelUnavailable,
    Code::ShuttingDown,
    Code::UpstreamTimeout,
];

/// Every code with its status, type and wire code, by status: what the error reference is generated from.
pub fn error_rows() -> impl Iterator<Item = ErrorRow> {
    CODES.into_iter().map(error_row)
}

/// How a code looks on the wire.
///
/// Types and codes are OpenAI's where OpenAI has the case (`slow_down`, `unknown_url`, `method_not_supported`
/// included), else the names that gateways use. A feature that is known but missing is 400 and not 501: SDKs retry
/// every 5xx, and a retry would not help.
pub fn error_row(code: Code) -> ErrorRow {
    const INVALID: &str = "invalid_request_error";
    const SERVER: &str = "server_error";
    let (name, status, kind, wire_code) = match code {
        Code::BadRequest => ("bad_request", 400, INVALID, None),
        Code::ContextLengthExceeded => {
            ("context_length_exceeded", 400, INVALID, Some("context_length_exceeded"))
        }
        Code::NotSupported => ("not_supported", 400, INVALID, Some("not_supported")),
        Code::InvalidApiKey => ("invalid_api_key", 401, INVALID, Some("invalid_api_key")),
        Code::ModelDenied => ("model_denied", 403, "permission_error", Some("model_access_denied")),
        Code::ModelNotFound => ("model_not_found", 404, INVALID, Some("model_not_found")),
        Code::RouteNotFound => ("route_not_found", 404, INVALID, Some("unknown_url")),
        Code::MethodNotAllowed => ("method_not_allowed", 405, INVALID, Some("method_not_supported")),
        Code::RequestTimeout => ("request_timeout", 408, "timeout_error", Some("request_timeout")),
        Code::BodyTooLarge => ("body_too_large", 413, INVALID, Some("request_too_large")),
        Code::UnsupportedMediaType => {
            ("unsupported_media_type", 415, INVALID, Some("unsupported_media_type"))
        }
        Code::HeadersTooLarge => ("headers_too_large", 431, INVALID, Some("headers_too_large")),
        Code::RequestsRateLimited => ("requests_rate_limited", 429, "requests", Some("rate_limit_exceeded")),
        Code::TokensRateLimited => ("tokens_rate_limited", 429, "tokens", Some("rate_limit_exceeded")),
        Code::InsufficientQuota => {
            ("insufficient_quota", 429, "insufficient_quota", Some("insufficient_quota"))
        }
        Code::Internal => ("internal", 500, SERVER, Some("internal_error")),
        Code::UpstreamFailed => ("upstream_failed", 502, SERVER, Some("upstream_failed")),
        Code::Overloaded => ("overloaded", 503, SERVER, Some("slow_down")),
        Code::ModelUnavailable => ("model_unavailable", 503, SERVER, Some("no_healthy_upstream")),
        Code::ShuttingDown => ("shutting_down", 503, SERVER, Some("shutting_down")),
        Code::UpstreamTimeout => ("upstream_timeout", 504, "timeout_error", Some("timeout")),
    };
    ErrorRow { code, name, status, kind, wire_code }
}

/// Status and `error.type` of a code as vLLM has them: the names of its own errors, and for what its HTTP server refuses
/// the phrase of the status.
pub fn vllm_row(code: Code) -> (StatusCode, &'static str) {
    let status = match code {
        Code::NotSupported => 501,
        _ => error_row(code).status,
    };
    let status = StatusCode::from_u16(status).expect("the table holds valid statuses");
    let kind = match code {
        Code::BadRequest | Code::ContextLengthExceeded => "BadRequestError",
        Code::NotSupported => "NotImplementedError",
        Code::ModelNotFound => "NotFoundError",
        Code::Internal => "InternalServerError",
        Code::ModelUnavailable | Code::ShuttingDown => "ServiceUnavailableError",
        Code::InvalidApiKey
        | Code::ModelDenied
        | Code::RouteNotFound
        | Code::MethodNotAllowed
        | Code::RequestTimeout
        | Code::BodyTooLarge
        | Code::UnsupportedMediaType
        | Code::HeadersTooLarge
        | Code::RequestsRateLimited
        | Code::TokensRateLimited
        | Code::InsufficientQuota
        | Code::UpstreamFailed
        | Code::Overloaded
        | Code::UpstreamTimeout => status.canonical_reason().unwrap_or("Error"),
    };
    (status, kind)
}

#[derive(Serialize)]
struct WireError<'a> {
    error: WireErrorFields<'a>,
}

#[derive(Serialize)]
struct WireErrorFields<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    code: WireCode,
}

#[derive(Serialize)]
#[serde(untagged)]
enum WireCode {
    Word(Option<&'static str>),
    Status(u16),
}

/// The status beside the body.
fn wire_error(fault: &Fault, dialect: Dialect) -> (StatusCode, WireError<'_>) {
    let code = fault.class.code;
    let param = fault.param.as_deref();
    let (status, kind, param, code) = match dialect {
        Dialect::OpenAi => {
            let row = error_row(code);
            let status = StatusCode::from_u16(row.status).expect("the table holds valid statuses");
            (status, row.kind, param, WireCode::Word(row.wire_code))
        }
        Dialect::Vllm => {
            let (status, kind) = vllm_row(code);
            let param = match code {
                Code::ContextLengthExceeded => Some("input_tokens"),
                Code::ModelNotFound => Some("model"),
                _ => param,
            };
            (status, kind, param, WireCode::Status(status.as_u16()))
        }
    };
    (status, WireError { error: WireErrorFields { message: &fault.message, kind, param, code } })
}

/// Status, headers and JSON body of an error before the first byte of a reply.
///
/// Headers: `content-type`; the fault's own; `retry-after` (whole seconds, rounded up, at least 1) and
/// `retry-after-ms` where it may be tried later; `x-should-retry: false` on a 429 or 501 that trying again can't help, which
/// the SDKs obey; `www-authenticate` on 401 (RFC 9110, 15.5.2). `fault.detail` never leaves.
pub fn render_fault(fault: &Fault, dialect: Dialect) -> (StatusCode, HeaderMap, Bytes) {
    let (status, body) = wire_error(fault, dialect);
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    for (name, value) in &fault.headers {
        // A value that is not a legal header is dropped: an error must not fail on its decoration.
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_str(value))
        {
            headers.append(name, value);
        }
    }
    match fault.class.retry {
        Retry::After(delay) => {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds_up(delay)));
            headers.insert("retry-after-ms", HeaderValue::from(millis_up(delay)));
        }
        Retry::Never if status == StatusCode::TOO_MANY_REQUESTS => {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        // Another server may have it; the same one will not.
        _ if status == StatusCode::NOT_IMPLEMENTED => {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        Retry::Never | Retry::Elsewhere => {}
    }
    if fault.class.code == Code::InvalidApiKey {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    let body = serde_json::to_vec(&body).expect("strings serialize");
    (status, headers, body.into())
}

fn seconds_up(delay: Duration) -> u64 {
    (delay.as_secs() + u64::from(delay.subsec_nanos() > 0)).max(1)
}

fn millis_up(delay: Duration) -> u64 {
    u64::try_from(delay.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX).max(1)
}

/// The frame of an error after the reply began. It is the last one: no `[DONE]` follows in OpenAI's dialect, so that a client
/// can't take a broken reply for a whole one; in vLLM's one does.
pub fn fault_frame(fault: &Fault, dialect: Dialect) -> Bytes {
    let mut out = BytesMut::with_capacity(256);
    out.extend_from_slice(b"data: ");
    let (_, error) = wire_error(fault, dialect);
    serde_json::to_writer((&mut out).writer(), &error).expect("strings serialize");
    out.extend_from_slice(b"\n\n");
    if dialect == Dialect::Vllm {
        out.extend_from_slice(b"data: [DONE]\n\n");
    }
    out.freeze()
}

/// An error as another server reported it: OpenAI's shape, or vLLM's and older ones' that differ in detail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamError {
    pub message: String,
    /// `error.type`
    pub kind: Option<String>,
    /// `error.code`, a number written as text.
    pub code: Option<String>,
    pub param: Option<String>,
}

/// Reads an error body or the JSON of an error frame: `{"error": {…}}`, `{"error": "text"}`, `{"message": …}` or
/// FastAPI's `{"detail": …}`. `None` where none of these is there.
pub fn parse_error(body: &[u8]) -> Option<UpstreamError> {
    #[derive(Deserialize)]
    struct Envelope {
        error: Option<serde_json::Value>,
        message: Option<serde_json::Value>,
        detail: Option<serde_json::Value>,
    }
    let plain = |message: String| UpstreamError { message, kind: None, code: None, param: None };
    let text = |value: &serde_json::Value| match value {
        serde_json::Value::String(text) => Some(text.clone()),
        serde_json::Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    let envelope: Envelope = serde_json::from_slice(body).ok()?;
    match &envelope.error {
        Some(serde_json::Value::Object(error)) => {
            let field = |name: &str| error.get(name).and_then(text);
            return Some(UpstreamError {
                message: field("message")?,
                kind: field("type"),
                code: field("code"),
                param: field("param"),
            });
        }
        Some(serde_json::Value::String(error)) => return Some(plain(error.clone())),
        _ => {}
    }
    let message = envelope.message.or(envelope.detail)?;
    Some(plain(text(&message).unwrap_or_else(|| message.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_types::{Blame, Class};

    fn body(fault: &Fault) -> String {
        String::from_utf8(render_fault(fault, Dialect::OpenAi).2.to_vec()).unwrap()
    }

    #[test]
    fn body_is_openai_shaped() {
        let class = Class::new(Code::ModelNotFound, Blame::Client);
        let fault = Fault::new(class, "The model `x` does not exist.").detail("/secret/path");
        assert_eq!(
            body(&fault),
            r#"{"error":{"message":"The model `x` does not exist.","type":"invalid_request_error","param":null,"code":"model_not_found"}}"#
        );
        assert_eq!(
            body(&Fault::bad_request("a \"quoted\" thing").param("messages[0].role")),
            r#"{"error":{"message":"a \"quoted\" thing","type":"invalid_request_error","param":"messages[0].role","code":null}}"#
        );
    }

    #[test]
    fn headers_say_when_to_retry() {
        let check = |code, retry, after: Option<&str>, ms: Option<&str>, should: Option<&str>| {
            let fault = Fault::new(Class::new(code, Blame::Client).retry(retry), "m");
            let (_, headers, _) = render_fault(&fault, Dialect::OpenAi);
            let get = |name: &str| headers.get(name).map(|v| v.to_str().unwrap().to_owned());
            assert_eq!(get("retry-after").as_deref(), after, "{code:?} {retry:?}");
            assert_eq!(get("retry-after-ms").as_deref(), ms, "{code:?} {retry:?}");
            assert_eq!(get("x-should-retry").as_deref(), should, "{code:?} {retry:?}");
            assert_eq!(get("content-type").as_deref(), Some("application/json"));
        };
        let after = |ms| Retry::After(Duration::from_millis(ms));
        check(Code::TokensRateLimited, after(1500), Some("2"), Some("1500"), None);
        check(Code::Overloaded, after(0), Some("1"), Some("1"), None);
        check(Code::InsufficientQuota, Retry::Never, None, None, Some("false"));
        check(Code::TokensRateLimited, Retry::Never, None, None, Some("false"));
        check(Code::BadRequest, Retry::Never, None, None, None);
        check(Code::UpstreamFailed, Retry::Elsewhere, None, None, None);
        let fault = Fault::bad_request("m").header("x-ratelimit-limit-requests", "5").header("x-bad", "a\nb");
        let (_, headers, _) = render_fault(&fault, Dialect::OpenAi);
        assert_eq!(headers["x-ratelimit-limit-requests"], "5");
        assert!(!headers.contains_key("x-bad"));
    }

    #[test]
    fn table_has_every_code_once_with_a_valid_status() {
        let mut names: Vec<_> = error_rows().map(|row| row.name).collect();
        assert!(error_rows().all(|row| (400..=599).contains(&row.status)));
        assert_eq!(names.len(), CODES.len());
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CODES.len());
    }

    #[test]
    fn frame_has_no_done() {
        let class = Class::new(Code::UpstreamFailed, Blame::Upstream);
        assert_eq!(
            fault_frame(&Fault::new(class, "broke\noff"), Dialect::OpenAi),
            "data: {\"error\":{\"message\":\"broke\\noff\",\"type\":\"server_error\",\"param\":null,\"code\":\"upstream_failed\"}}\n\n"
        );
    }

    /// As vLLM 0.32 answers: `create_error_response` for its own, FastAPI's exceptions for the rest.
    #[test]
    fn errors_of_vllm() {
        let check = |code, status: u16, kind: &str, param: Option<&str>| {
            let fault = Fault::new(Class::new(code, Blame::Client), "m").param("messages");
            let (got, _, body) = render_fault(&fault, Dialect::Vllm);
            let param = serde_json::json!(param);
            let expect =
                serde_json::json!({"error": {"message": "m", "type": kind, "param": param, "code": status}});
            assert_eq!(got.as_u16(), status, "{code:?}");
            assert_eq!(serde_json::from_slice::<serde_json::Value>(&body).unwrap(), expect, "{code:?}");
        };
        let here = Some("messages");
        check(Code::BadRequest, 400, "BadRequestError", here);
        check(Code::ContextLengthExceeded, 400, "BadRequestError", Some("input_tokens"));
        check(Code::ModelNotFound, 404, "NotFoundError", Some("model"));
        check(Code::RouteNotFound, 404, "Not Found", here);
        check(Code::MethodNotAllowed, 405, "Method Not Allowed", here);
        check(Code::Internal, 500, "InternalServerError", here);
        check(Code::NotSupported, 501, "NotImplementedError", here);
        check(Code::Overloaded, 503, "Service Unavailable", here);
        check(Code::ShuttingDown, 503, "ServiceUnavailableError", here);
        let class = Class::new(Code::NotSupported, Blame::Client).retry(Retry::Elsewhere);
        let missing = Fault::new(class, "m");
        assert_eq!(render_fault(&missing, Dialect::Vllm).1["x-should-retry"], "false");
        let broke = Fault::new(Class::new(Code::Internal, Blame::Us), "broke");
        assert_eq!(
            fault_frame(&broke, Dialect::Vllm),
            "data: {\"error\":{\"message\":\"broke\",\"type\":\"InternalServerError\",\"param\":null,\"code\":500}}\n\n\
             data: [DONE]\n\n"
        );
    }

    #[test]
    fn upstream_errors_are_read() {
        let check = |body: &str, expect: Option<(&str, Option<&str>)>| {
            let error = parse_error(body.as_bytes());
            assert_eq!(error.as_ref().map(|e| (e.message.as_str(), e.code.as_deref())), expect, "{body}");
        };
        check(
            r#"{"error":{"message":"no","type":"x","param":null,"code":"model_not_found"}}"#,
            Some(("no", Some("model_not_found"))),
        );
        check(r#"{"error":{"message":"no","code":404}}"#, Some(("no", Some("404"))));
        check(r#"{"error":"Unauthorized"}"#, Some(("Unauthorized", None)));
        check(r#"{"object":"error","message":"old vLLM"}"#, Some(("old vLLM", None)));
        check(r#"{"detail":"Not Found"}"#, Some(("Not Found", None)));
        check(r#"{"detail":[{"loc":1}]}"#, Some((r#"[{"loc":1}]"#, None)));
        check("<html>", None);
        check("{}", None);
    }
}
