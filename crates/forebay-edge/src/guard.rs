//! What a request must be like before any layer sees it: unambiguous, so that no two servers on its way can read it
//! differently (request smuggling), and within what the edge supports. Pure.
//!
//! hyper's parser is lenient where this is strict; what it drops before we see it (a second `content-length`) is
//! caught on the raw bytes in `head_scan`. Rules: RFC 9112 sections 3.2, 6.1 and 6.3, RFC 9110 section 7.2, and what
//! nginx rejects.

use forebay_types::{Blame, Class, Classify, Code};
use http::header::{self, HeaderMap};
use http::request::Parts;
use http::uri::Authority;
use http::{Method, Version};

use crate::config::EdgeLimits;

/// Why a request is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the request has no host header")]
    HostMissing,
    #[error("the request has more than one host header")]
    HostRepeated,
    #[error("the host header is not a valid host name with an optional port")]
    HostInvalid,
    #[error("the request's target names another host than its host header")]
    HostDiffers,
    #[error("the method is not one of upper-case letters")]
    MethodInvalid,
    #[error("the request has more than one content-length header")]
    LengthRepeated,
    #[error("the content-length header is not a number")]
    LengthInvalid,
    #[error("the request has both content-length and transfer-encoding")]
    LengthAndEncoding,
    #[error("the only transfer-encoding that is understood is a single `chunked`")]
    EncodingUnsupported,
    #[error("the lines of the request's head do not all end with CR LF")]
    BareLineFeed,
    #[error("the request's head is larger than the limit `edge.limits.max-header-bytes`")]
    HeadersTooLarge,
    #[error("the request has more header lines than the limit `edge.limits.max-headers`")]
    HeadersTooMany,
    #[error("the request does not begin with a line like `GET /path HTTP/1.1`")]
    RequestLineInvalid,
    #[error(
        "a header line is not valid: it is a name, a colon directly after it, and a value without control characters"
    )]
    HeaderInvalid,
    #[error("the request follows a body that could not be read")]
    Unframed,
    #[error("the path has `.` or `..` segments, or an invalid percent-encoding")]
    PathInvalid,
    #[error("the only expectation that is understood is `100-continue`")]
    ExpectUnknown,
    #[error("tunnels (CONNECT) are not supported")]
    ConnectUnsupported,
    #[error("protocol upgrades (websocket and others) are not supported")]
    UpgradeUnsupported,
    #[error("the request's target is not a path")]
    TargetUnsupported,
}

impl Refusal {
    /// The metric's label.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::HostMissing => "host-missing",
            Self::HostRepeated => "host-repeated",
            Self::HostInvalid => "host-invalid",
            Self::HostDiffers => "host-differs",
            Self::MethodInvalid => "method-invalid",
            Self::LengthRepeated => "length-repeated",
            Self::LengthInvalid => "length-invalid",
            Self::LengthAndEncoding => "length-and-encoding",
            Self::EncodingUnsupported => "encoding-unsupported",
            Self::BareLineFeed => "bare-line-feed",
            Self::HeadersTooLarge => "max-header-bytes",
            Self::HeadersTooMany => "max-headers",
            Self::RequestLineInvalid => "request-line-invalid",
            Self::HeaderInvalid => "header-invalid",
            Self::Unframed => "unframed",
            Self::PathInvalid => "path-invalid",
            Self::ExpectUnknown => "expect-unknown",
            Self::ConnectUnsupported => "connect-unsupported",
            Self::UpgradeUnsupported => "upgrade-unsupported",
            Self::TargetUnsupported => "target-unsupported",
        }
    }
}

impl Classify for Refusal {
    fn class(&self) -> Class {
        let code = match self {
            Self::ConnectUnsupported | Self::UpgradeUnsupported => Code::NotSupported,
            Self::HeadersTooLarge | Self::HeadersTooMany => Code::HeadersTooLarge,
            Self::HostMissing
            | Self::HostRepeated
            | Self::HostInvalid
            | Self::HostDiffers
            | Self::MethodInvalid
            | Self::LengthRepeated
            | Self::LengthInvalid
            | Self::LengthAndEncoding
            | Self::EncodingUnsupported
            | Self::BareLineFeed
            | Self::RequestLineInvalid
            | Self::HeaderInvalid
            | Self::Unframed
            | Self::PathInvalid
            | Self::ExpectUnknown
            | Self::TargetUnsupported => Code::BadRequest,
        };
        Class::new(code, Blame::Client)
    }
}

/// Checks a parsed head. Returns the host that was asked for, in lower case and without a port.
pub(crate) fn check_head(parts: &Parts) -> Result<String, Refusal> {
    if parts.method == Method::CONNECT {
        return Err(Refusal::ConnectUnsupported);
    }
    if !parts.method.as_str().bytes().all(|b| b.is_ascii_uppercase() || b == b'-') {
        return Err(Refusal::MethodInvalid);
    }
    check_framing(&parts.headers)?;
    let host = check_host(parts)?;
    check_path(parts)?;
    for expect in parts.headers.get_all(header::EXPECT) {
        if !expect.as_bytes().eq_ignore_ascii_case(b"100-continue") {
            return Err(Refusal::ExpectUnknown);
        }
    }
    if let Some(upgrade) = parts.headers.get(header::UPGRADE)
        // An offer of HTTP/2 may be declined by not answering it (RFC 9110, 7.8); curl and Java clients make it.
        && !upgrade.as_bytes().eq_ignore_ascii_case(b"h2c")
    {
        return Err(Refusal::UpgradeUnsupported);
    }
    Ok(host)
}

/// The limits on the head of an HTTP/2 request; those of HTTP/1.1 are seen by `head_scan`.
pub(crate) fn check_size(headers: &HeaderMap, limits: &EdgeLimits) -> Result<(), Refusal> {
    if headers.len() > limits.max_headers {
        return Err(Refusal::HeadersTooMany);
    }
    // As HTTP/2 counts (RFC 9113, 6.5.2).
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
    if bytes > limits.max_header_bytes.as_usize() {
        return Err(Refusal::HeadersTooLarge);
    }
    Ok(())
}

fn check_framing(headers: &HeaderMap) -> Result<(), Refusal> {
    let mut encodings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let encoding = encodings.next();
    if let Some(encoding) = encoding
        && (!encoding.as_bytes().eq_ignore_ascii_case(b"chunked") || encodings.next().is_some())
    {
        return Err(Refusal::EncodingUnsupported);
    }
    let mut lengths = headers.get_all(header::CONTENT_LENGTH).iter();
    let Some(length) = lengths.next() else { return Ok(()) };
    if encoding.is_some() {
        return Err(Refusal::LengthAndEncoding);
    }
    if lengths.next().is_some() {
        return Err(Refusal::LengthRepeated);
    }
    if length.is_empty() || !length.as_bytes().iter().all(u8::is_ascii_digit) {
        return Err(Refusal::LengthInvalid);
    }
    Ok(())
}

fn check_host(parts: &Parts) -> Result<String, Refusal> {
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Refusal::HostRepeated);
    }
    let target = parts.uri.authority();
    let host = match (host, target) {
        (None, None) => return Err(Refusal::HostMissing),
        // HTTP/1.1 needs the header even where the target has a host (RFC 9112, 3.2); HTTP/2 does not.
        (None, Some(_)) if parts.version < Version::HTTP_2 => return Err(Refusal::HostMissing),
        (None, Some(target)) => target.clone(),
        (Some(host), target) => {
            let host = Authority::try_from(host.as_bytes()).map_err(|_| Refusal::HostInvalid)?;
            if target.is_some_and(|target| !target.as_str().eq_ignore_ascii_case(host.as_str())) {
                return Err(Refusal::HostDiffers);
            }
            host
        }
    };
    if host.as_str().contains('@') || !is_host(host.host()) {
        return Err(Refusal::HostInvalid);
    }
    // `host:` and `host:99999` parse as an authority without a port.
    if host.port_u16().is_none() && host.as_str().len() != host.host().len() {
        return Err(Refusal::HostInvalid);
    }
    Ok(host.host().to_ascii_lowercase())
}

/// A registered name, IPv4 address or bracketed IPv6 address (RFC 3986, 3.2.2), without percent-encoding, which no
/// client sends.
fn is_host(host: &str) -> bool {
    if let Some(inner) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return inner.parse::<std::net::Ipv6Addr>().is_ok();
    }
    !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}

fn check_path(parts: &Parts) -> Result<(), Refusal> {
    let path = parts.uri.path();
    if !path.starts_with('/') {
        return Err(Refusal::TargetUnsupported);
    }
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        let code = rest.as_bytes().get(at + 1..at + 3).ok_or(Refusal::PathInvalid)?;
        if !code.iter().all(u8::is_ascii_hexdigit) || code == b"00" {
            return Err(Refusal::PathInvalid);
        }
        rest = &rest[at + 3..];
    }
    // An upstream would resolve them and so leave the prefix that its route was chosen by.
    let dots = path
        .split('/')
        .any(|segment| matches!(segment, "." | "..") || (segment.contains('%') && is_dots_encoded(segment)));
    if dots { Err(Refusal::PathInvalid) } else { Ok(()) }
}

fn is_dots_encoded(segment: &str) -> bool {
    matches!(segment.to_ascii_lowercase().replace("%2e", ".").as_str(), "." | "..")
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    fn check(method: &str, uri: &str, headers: &[(&str, &str)], expect: Result<&str, Refusal>) {
        check_version(Version::HTTP_11, method, uri, headers, expect);
    }

    fn check_version(
        version: Version,
        method: &str,
        uri: &str,
        headers: &[(&str, &str)],
        expect: Result<&str, Refusal>,
    ) {
        let mut request = Request::builder().version(version).method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        assert_eq!(check_head(&parts), expect.map(str::to_owned), "{method} {uri} {headers:?}");
    }

    #[test]
    fn hosts() {
        let host = |value: &str, expect| check("GET", "/", &[("host", value)], expect);
        host("Example.org", Ok("example.org"));
        host("example.org:8080", Ok("example.org"));
        host("127.0.0.1:80", Ok("127.0.0.1"));
        host("[::1]:80", Ok("[::1]"));
        host("", Err(Refusal::HostInvalid));
        host("a b", Err(Refusal::HostInvalid));
        host("a/b", Err(Refusal::HostInvalid));
        host("user@a", Err(Refusal::HostInvalid));
        host("a:", Err(Refusal::HostInvalid));
        host("a:99999", Err(Refusal::HostInvalid));
        host("a,b", Err(Refusal::HostInvalid));
        host("[::x]", Err(Refusal::HostInvalid));
        check("GET", "/", &[], Err(Refusal::HostMissing));
        check("GET", "http://a/", &[], Err(Refusal::HostMissing));
        check("GET", "/", &[("host", "a"), ("host", "a")], Err(Refusal::HostRepeated));
        check("GET", "http://a/", &[("host", "b")], Err(Refusal::HostDiffers));
        check("GET", "http://a/", &[("host", "A")], Ok("a"));
        check_version(Version::HTTP_2, "GET", "http://a/", &[], Ok("a"));
        check_version(Version::HTTP_2, "GET", "http://a/", &[("host", "b")], Err(Refusal::HostDiffers));
    }

    #[test]
    fn methods_and_targets() {
        let h = &[("host", "a")];
        check("POST", "/", h, Ok("a"));
        check("M-SEARCH", "/", h, Ok("a"));
        check("get", "/", h, Err(Refusal::MethodInvalid));
        check("GE!", "/", h, Err(Refusal::MethodInvalid));
        check("CONNECT", "a:80", h, Err(Refusal::ConnectUnsupported));
        check("OPTIONS", "*", h, Err(Refusal::TargetUnsupported));
        check("GET", "/a/..b/.c/d.", h, Ok("a"));
        check("GET", "/a/../b", h, Err(Refusal::PathInvalid));
        check("GET", "/a/.", h, Err(Refusal::PathInvalid));
        check("GET", "/a/%2e%2E/b", h, Err(Refusal::PathInvalid));
        check("GET", "/a/.%2e", h, Err(Refusal::PathInvalid));
        check("GET", "/a%2fb%C3%A9", h, Ok("a"));
        check("GET", "/a%2", h, Err(Refusal::PathInvalid));
        check("GET", "/a%zz", h, Err(Refusal::PathInvalid));
        check("GET", "/a%00", h, Err(Refusal::PathInvalid));
    }

    #[test]
    fn framing() {
        let with = |headers: &[(&str, &str)], expect: Result<&str, Refusal>| {
            check("POST", "/", &[&[("host", "a")], headers].concat(), expect);
        };
        with(&[("content-length", "5")], Ok("a"));
        with(&[("content-length", "+5")], Err(Refusal::LengthInvalid));
        with(&[("content-length", "5, 5")], Err(Refusal::LengthInvalid));
        with(&[("content-length", "")], Err(Refusal::LengthInvalid));
        with(&[("content-length", "5"), ("content-length", "5")], Err(Refusal::LengthRepeated));
        with(&[("transfer-encoding", "chunked")], Ok("a"));
        with(&[("transfer-encoding", "Chunked")], Ok("a"));
        with(&[("transfer-encoding", "identity, chunked")], Err(Refusal::EncodingUnsupported));
        with(&[("transfer-encoding", "gzip")], Err(Refusal::EncodingUnsupported));
        let twice = &[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")];
        with(twice, Err(Refusal::EncodingUnsupported));
        let both = &[("transfer-encoding", "chunked"), ("content-length", "5")];
        with(both, Err(Refusal::LengthAndEncoding));
    }

    #[test]
    fn expectations_and_upgrades() {
        let with = |headers: &[(&str, &str)], expect: Result<&str, Refusal>| {
            check("POST", "/", &[&[("host", "a")], headers].concat(), expect);
        };
        with(&[("expect", "100-Continue")], Ok("a"));
        with(&[("expect", "200-ok")], Err(Refusal::ExpectUnknown));
        with(&[("upgrade", "websocket")], Err(Refusal::UpgradeUnsupported));
        with(&[("upgrade", "h2c")], Ok("a"));
    }
}
