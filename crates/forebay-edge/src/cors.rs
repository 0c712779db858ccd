//! Which pages may call LLM routes from a browser: the Fetch standard's CORS protocol. Pure.
//!
//! Without credentials, as keys here are bearer tokens and not cookies: so `*` is safe to answer with.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Response, StatusCode};

/// How long a browser may remember a preflight, in seconds: Starlette's, and so vLLM's.
const MAX_AGE: &str = "600";

const METHODS: &str = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT";

/// Headers of ours that a page may read.
const EXPOSED: &str = "x-request-id, retry-after";

/// The origins that are let in.
#[derive(Debug, Default)]
pub(crate) struct Cors(Vec<String>);

impl Cors {
    pub(crate) fn new(origins: &[String]) -> Self {
        Self(origins.iter().map(|origin| origin.trim_end_matches('/').to_ascii_lowercase()).collect())
    }

    /// The value of `access-control-allow-origin` for a request.
    fn allowed(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let origin = headers.get(header::ORIGIN)?;
        if self.0.iter().any(|own| own == "*") {
            return Some(HeaderValue::from_static("*"));
        }
        let asked = origin.to_str().ok()?.to_ascii_lowercase();
        self.0.contains(&asked).then(|| origin.clone())
    }

    /// The answer to a browser that asks before it sends the request itself.
    pub(crate) fn preflight<T: Default>(&self, method: &Method, headers: &HeaderMap) -> Option<Response<T>> {
        if *method != Method::OPTIONS || !headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD) {
            return None;
        }
        self.allowed(headers)?;
        let mut answer = Response::new(T::default());
        *answer.status_mut() = StatusCode::OK;
        let own = answer.headers_mut();
        own.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(METHODS));
        own.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE));
        // All of them, as vLLM does.
        if let Some(asked) = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
            own.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
        }
        Some(answer)
    }

    /// Tells the browser that the page may read the answer.
    pub(crate) fn mark(&self, asked: &HeaderMap, answer: &mut HeaderMap) {
        if self.0.is_empty() {
            return;
        }
        // Caches must keep answers to different pages apart, also those to pages that are not let in.
        answer.append(header::VARY, HeaderValue::from_static("origin"));
        if let Some(origin) = self.allowed(asked) {
            answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            answer.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
        }
    }
}

/// `*`, or `scheme://host[:port]`.
pub(crate) fn is_origin(text: &str) -> bool {
    let Some((scheme, rest)) = text.split_once("://") else { return text == "*" };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let is_plain = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    is_plain(scheme) && is_plain(rest) && !rest.contains(['/', '?', '#', '@', '*'])
}

/// The headers that a browser sends with a request of a page.
pub(crate) const ORIGIN: HeaderName = header::ORIGIN;

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn only_listed_origins_are_let_in() {
        let check = |origins: &[&str], origin: &'static str, expect: Option<&str>| {
            let cors = Cors::new(&origins.iter().map(|&origin| origin.to_owned()).collect::<Vec<_>>());
            let mut answer = HeaderMap::new();
            cors.mark(&headers(&[(header::ORIGIN, origin)]), &mut answer);
            let told =
                answer.get(header::ACCESS_CONTROL_ALLOW_ORIGIN).map(|v| v.to_str().unwrap().to_owned());
            assert_eq!(told.as_deref(), expect, "{origins:?} {origin}");
            assert_eq!(answer.contains_key(header::VARY), !origins.is_empty());
        };
        check(&["*"], "http://a", Some("*"));
        check(&["http://a", "https://b:8"], "https://b:8", Some("https://b:8"));
        check(&["http://A/"], "http://a", Some("http://a"));
        check(&["http://a"], "http://a.evil", None);
        check(&["http://a"], "null", None);
        check(&[], "http://a", None);
    }

    #[test]
    fn a_preflight_is_answered() {
        let cors = Cors::new(&["http://a".to_owned()]);
        let ask = |origin: &'static str| {
            headers(&[
                (header::ORIGIN, origin),
                (header::ACCESS_CONTROL_REQUEST_METHOD, "POST"),
                (header::ACCESS_CONTROL_REQUEST_HEADERS, "authorization,content-type"),
            ])
        };
        let answer: Response<()> = cors.preflight(&Method::OPTIONS, &ask("http://a")).expect("is let in");
        assert_eq!(answer.headers()[header::ACCESS_CONTROL_ALLOW_HEADERS], "authorization,content-type");
        assert!(cors.preflight::<()>(&Method::OPTIONS, &ask("http://b")).is_none());
        assert!(cors.preflight::<()>(&Method::POST, &ask("http://a")).is_none());
        assert!(cors.preflight::<()>(&Method::OPTIONS, &headers(&[(header::ORIGIN, "http://a")])).is_none());
    }

    #[test]
    fn origins_have_no_path() {
        for (text, expect) in [
            ("*", true),
            ("https://app.example.org", true),
            ("http://localhost:3000/", true),
            ("https://a/b", false),
            ("app.example.org", false),
            ("https://*.example.org", false),
            ("", false),
            ("://a", false),
        ] {
            assert_eq!(is_origin(text), expect, "{text}");
        }
    }
}
