//! Why an upstream did not generate: the fault for the client, and what a router wants to know about the replica.

use std::time::Duration;

use forebay_types::{Blame, Class, Classify, Code, Fault, Retry};
use forebay_wire::parse_error;
use http::header::HeaderName;
use http::{HeaderMap, StatusCode, header};

use crate::UpstreamError;

/// What happened, for health and outlier decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// No connection: nothing was sent.
    Unreachable,
    /// The connection broke, or what came was not an answer.
    Broken,
    TimedOut,
    /// It answered with this status, or (200) with an error event before any content.
    Refused(StatusCode),
}

/// A generation that failed before its first byte.
///
/// `fault.class.retry` is decided for generations: they have no effect but the reply, and the connection of a failed
/// one is closed, which stops the computation. So everything that is not the request's own fault may be tried
/// elsewhere. A provider may still bill what it computed until then.
#[derive(Debug, Clone)]
pub struct UpstreamFault {
    pub kind: FaultKind,
    pub fault: Fault,
}

impl From<UpstreamFault> for Fault {
    fn from(fault: UpstreamFault) -> Self {
        fault.fault
    }
}

impl From<UpstreamError> for UpstreamFault {
    fn from(error: UpstreamError) -> Self {
        let kind = match &error {
            UpstreamError::FirstByteTimeout { .. } | UpstreamError::IdleTimeout { .. } => FaultKind::TimedOut,
            _ if error.is_unsent() => FaultKind::Unreachable,
            _ => FaultKind::Broken,
        };
        let mut class = error.class();
        if class.retry == Retry::Never && class.blame != Blame::Client {
            class = class.retry(Retry::Elsewhere);
        }
        Self { kind, fault: Fault::new(class, error.to_string()).detail(error.detail()) }
    }
}

/// Longest upstream message that is passed on or logged, in characters.
pub(crate) const MESSAGE_CHARS_MAX: usize = 512;

/// Turns a refusal into the client's fault.
///
/// The upstream's words reach the client only where they are about the client's own request (400, 413, 422, 501). Our
/// credentials, our quota with a provider and its inner failures are none of the client's business: they become
/// `UpstreamFailed` or `Overloaded`, and the words go to the log.
pub(crate) fn refused(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    authority: &str,
) -> UpstreamFault {
    let error = parse_error(body);
    let said = error.as_ref().map_or("", |error| &error.message);
    let said: String = said.chars().take(MESSAGE_CHARS_MAX).collect();
    let (said_code, param) = error.map(|error| (error.code, error.param)).unwrap_or_default();
    let us = |code| Class::new(code, Blame::Upstream).retry(Retry::Elsewhere);
    let client = |code| Class::new(code, Blame::Client);
    let later = |code| match retry_after(headers) {
        Some(after) => Class::new(code, Blame::Upstream).retry(Retry::After(after)),
        None => us(code),
    };
    let (class, message) = match status.as_u16() {
        400 | 422 => {
            // OpenAI says it with a code; vLLM only in words, unchanged since its first release.
            let too_long = said_code.as_deref() == Some("context_length_exceeded")
                || said.contains("maximum context length");
            let class = match said_code.as_deref() {
                _ if too_long => client(Code::ContextLengthExceeded),
                // Our own engine at the other end, as above.
                Some("not_supported") => client(Code::NotSupported).retry(Retry::Elsewhere),
                _ => client(Code::BadRequest),
            };
            (class, None)
        }
        413 => (client(Code::BodyTooLarge), None),
        // vLLM, and a worker of ours: somebody else may have the feature.
        501 => (client(Code::NotSupported).retry(Retry::Elsewhere), None),
        401 | 403 => (us(Code::UpstreamFailed), Some("the upstream did not accept our credentials")),
        404 => (us(Code::ModelUnavailable), Some("the upstream does not serve this model")),
        408 | 504 => (us(Code::UpstreamTimeout), Some("the upstream did not answer in time")),
        429 | 503 | 529 => (later(Code::Overloaded), Some("the upstream is at its limit; try again later")),
        _ => (us(Code::UpstreamFailed), Some("the upstream failed")),
    };
    let message = match message {
        Some(fixed) => fixed.to_owned(),
        None if said.is_empty() => {
            format!("the upstream refused the request with status {}", status.as_u16())
        }
        None => said.clone(),
    };
    let mut fault =
        Fault::new(class, message).detail(format!("{authority}: status {}: {said}", status.as_u16()));
    fault.param = param;
    UpstreamFault { kind: FaultKind::Refused(status), fault }
}

/// `retry-after-ms`, else `retry-after` in seconds. A date is not understood: no LLM server sends one.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");
    let number = |name: HeaderName| -> Option<f64> {
        let value: f64 = headers.get(name)?.to_str().ok()?.trim().parse().ok()?;
        // A day is longer than any client waits; the limit also keeps the conversion below in range.
        (0.0..=86_400_000.0).contains(&value).then_some(value)
    };
    if let Some(ms) = number(RETRY_AFTER_MS) {
        return Some(Duration::from_secs_f64(ms / 1000.0));
    }
    number(header::RETRY_AFTER).map(Duration::from_secs_f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuse(status: u16, headers: &[(&'static str, &str)], body: &str) -> UpstreamFault {
        let headers = headers.iter().map(|(n, v)| (HeaderName::from_static(n), v.parse().unwrap())).collect();
        refused(StatusCode::from_u16(status).unwrap(), &headers, body.as_bytes(), "h:1")
    }

    #[test]
    fn statuses_become_codes() {
        let check = |status, body: &str, code, blame, retry, message: &str| {
            let fault = refuse(status, &[], body);
            assert_eq!(fault.kind, FaultKind::Refused(StatusCode::from_u16(status).unwrap()));
            assert_eq!(fault.fault.class, Class { code, blame, retry }, "{status}");
            assert_eq!(fault.fault.message, message, "{status}");
        };
        use Blame::{Client, Upstream};
        use Retry::{Elsewhere, Never};
        let words = r#"{"error":{"message":"no","type":"x","param":"top_p","code":null}}"#;
        check(400, words, Code::BadRequest, Client, Never, "no");
        check(422, r#"{"detail":"bad"}"#, Code::BadRequest, Client, Never, "bad");
        check(
            400,
            r#"{"error":{"message":"This model's maximum context length is 8 tokens.","code":400}}"#,
            Code::ContextLengthExceeded,
            Client,
            Never,
            "This model's maximum context length is 8 tokens.",
        );
        let lacks = r#"{"error":{"message":"no","param":"tools","code":"not_supported"}}"#;
        check(400, lacks, Code::NotSupported, Client, Elsewhere, "no");
        let lacks = r#"{"error":{"message":"no","type":"NotImplementedError","param":"tools","code":501}}"#;
        check(501, lacks, Code::NotSupported, Client, Elsewhere, "no");
        check(
            400,
            "<html>",
            Code::BadRequest,
            Client,
            Never,
            "the upstream refused the request with status 400",
        );
        check(
            401,
            words,
            Code::UpstreamFailed,
            Upstream,
            Elsewhere,
            "the upstream did not accept our credentials",
        );
        check(
            403,
            words,
            Code::UpstreamFailed,
            Upstream,
            Elsewhere,
            "the upstream did not accept our credentials",
        );
        check(
            404,
            words,
            Code::ModelUnavailable,
            Upstream,
            Elsewhere,
            "the upstream does not serve this model",
        );
        check(500, words, Code::UpstreamFailed, Upstream, Elsewhere, "the upstream failed");
        check(302, words, Code::UpstreamFailed, Upstream, Elsewhere, "the upstream failed");
        check(504, "", Code::UpstreamTimeout, Upstream, Elsewhere, "the upstream did not answer in time");
        check(
            503,
            "",
            Code::Overloaded,
            Upstream,
            Elsewhere,
            "the upstream is at its limit; try again later",
        );
        assert_eq!(refuse(400, &[], words).fault.param.as_deref(), Some("top_p"));
        assert_eq!(refuse(500, &[], words).fault.detail.as_deref(), Some("h:1: status 500: no"));
    }

    #[test]
    fn retry_after_is_kept() {
        let check = |headers: &[(&'static str, &str)], retry| {
            assert_eq!(refuse(429, headers, "").fault.class.retry, retry, "{headers:?}");
        };
        check(&[("retry-after", "7")], Retry::After(Duration::from_secs(7)));
        check(&[("retry-after", "7"), ("retry-after-ms", "250")], Retry::After(Duration::from_millis(250)));
        check(&[("retry-after", "Fri, 31 Dec 1999 23:59:59 GMT")], Retry::Elsewhere);
        check(&[("retry-after", "-1")], Retry::Elsewhere);
        check(&[("retry-after", "inf")], Retry::Elsewhere);
    }
}
