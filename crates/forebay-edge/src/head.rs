//! One whole HTTP/1.1 head: would hyper take it, how is its body framed, and what stands in for it if it is refused.
//! Pure.
//!
//! hyper answers a head it can't parse itself, with an empty body, no id and no log line. So heads are parsed here
//! first, by the same parser, and a refused head never reaches hyper: a small one that is valid does in its place,
//! and the request it makes is answered with the refusal.

use crate::guard::Refusal;

/// How the body after a head is framed (RFC 9112, 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    Empty,
    Length(u64),
    Chunked,
}

/// Limits on one head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadLimits {
    pub(crate) bytes_max: usize,
    pub(crate) headers_max: usize,
}

/// Longest header name that the `http` crate takes.
const NAME_BYTES_MAX: usize = u16::MAX as usize;
/// Two values above it mean something else in hyper.
const LENGTH_MAX: u64 = u64::MAX - 2;

/// Checks a whole head, the empty line at its end included.
pub(crate) fn check(head: &[u8], limits: HeadLimits) -> Result<Framing, Refusal> {
    if head.len() > limits.bytes_max {
        return Err(Refusal::HeadersTooLarge);
    }
    let (mut length, mut encoding, mut lines) = (None, false, 0);
    for line in head.split_inclusive(|b| *b == b'\n') {
        let Some(line) = line.strip_suffix(b"\r\n") else { return Err(Refusal::BareLineFeed) };
        lines += 1;
        let Some(colon) = memchr::memchr(b':', line) else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            if length.is_some() {
                return Err(Refusal::LengthRepeated);
            }
            let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
            let number = std::str::from_utf8(value).ok().filter(|_| digits).and_then(|v| v.parse().ok());
            length = Some(number.filter(|n| *n <= LENGTH_MAX).ok_or(Refusal::LengthInvalid)?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if encoding || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(Refusal::EncodingUnsupported);
            }
            encoding = true;
        }
    }
    // The request line and the empty line are no headers.
    if usize::saturating_sub(lines, 2) > limits.headers_max {
        return Err(Refusal::HeadersTooMany);
    }
    let version = parse(head, lines)?;
    match (length, encoding) {
        (Some(_), true) => Err(Refusal::LengthAndEncoding),
        // Chunks came with HTTP/1.1.
        (None, true) if version == 0 => Err(Refusal::EncodingUnsupported),
        (None, true) => Ok(Framing::Chunked),
        (None | Some(0), false) => Ok(Framing::Empty),
        (Some(left), false) => Ok(Framing::Length(left)),
    }
}

/// The minor version, of a head that hyper would take.
fn parse(head: &[u8], lines: usize) -> Result<u8, Refusal> {
    use httparse::Error as E;
    let mut headers = vec![httparse::EMPTY_HEADER; lines];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(Refusal::HeaderInvalid),
        Err(E::Token | E::Version | E::Status) => return Err(Refusal::RequestLineInvalid),
        Err(E::HeaderName | E::HeaderValue | E::NewLine | E::TooManyHeaders) => {
            return Err(Refusal::HeaderInvalid);
        }
    }
    if http::Uri::try_from(request.path.unwrap_or_default()).is_err() {
        return Err(Refusal::RequestLineInvalid);
    }
    if request.headers.iter().any(|header| header.name.len() > NAME_BYTES_MAX) {
        return Err(Refusal::HeadersTooLarge);
    }
    Ok(request.version.unwrap_or_default())
}

/// Longest path, and longest header value, that are taken over from a refused head.
const TAKEN_BYTES_MAX: usize = 256;

/// A valid head in place of a refused one, with what of it is good for the log and the answer: method, path, ids.
pub(crate) fn stand_in(head: &[u8]) -> Vec<u8> {
    let mut lines = head.split(|b| *b == b'\n').map(<[u8]>::trim_ascii_end);
    let mut words = lines.next().unwrap_or_default().split(|b| *b == b' ');
    let method = words.next().and_then(|word| std::str::from_utf8(word).ok());
    let method = method.filter(|m| {
        let is_name = (1..=16).contains(&m.len()) && m.bytes().all(|b| b.is_ascii_uppercase() || b == b'-');
        // Without an authority it would be another error.
        is_name && *m != "CONNECT"
    });
    // What is behind a `#` is not looked at by `Uri`, but by the parser of heads.
    let path = words.next().map(|word| word.split(|b| matches!(b, b'?' | b'#')).next().unwrap_or_default());
    let path = path.map(|path| &path[..path.len().min(TAKEN_BYTES_MAX)]);
    let path = path.filter(|path| path.starts_with(b"/") && http::Uri::try_from(*path).is_ok());
    let path = path.and_then(|path| std::str::from_utf8(path).ok());
    let mut made = format!("{} {} HTTP/1.1\r\nhost: -\r\n", method.unwrap_or("GET"), path.unwrap_or("/"));
    let mut wanted = vec!["x-request-id", "traceparent"];
    for line in lines {
        let Some(colon) = memchr::memchr(b':', line) else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        let Some(at) = wanted.iter().position(|wanted| name.eq_ignore_ascii_case(wanted.as_bytes())) else {
            continue;
        };
        let name = wanted.swap_remove(at);
        if let Ok(value) = std::str::from_utf8(value)
            && value.len() <= TAKEN_BYTES_MAX
            && value.bytes().all(|b| b.is_ascii_graphic())
        {
            made.push_str(&format!("{name}: {value}\r\n"));
        }
    }
    made.push_str("\r\n");
    made.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: HeadLimits = HeadLimits { bytes_max: 200, headers_max: 4 };

    #[test]
    fn heads_that_hyper_would_refuse_are_refused_here() {
        let raw = |head: &[u8], expect| {
            let shown = String::from_utf8_lossy(head).into_owned();
            assert_eq!(check(head, LIMITS), expect, "{shown:?}");
        };
        let head = |lines: &str, expect| {
            raw(format!("POST / HTTP/1.1\r\nhost: a\r\n{lines}\r\n").as_bytes(), expect);
        };
        head("", Ok(Framing::Empty));
        head("content-length: 3\r\n", Ok(Framing::Length(3)));
        head("transfer-encoding: chunked\r\n", Ok(Framing::Chunked));
        head("content-length: abc\r\n", Err(Refusal::LengthInvalid));
        head("content-length: 4, 4\r\n", Err(Refusal::LengthInvalid));
        head("content-length: 18446744073709551615\r\n", Err(Refusal::LengthInvalid));
        head("a: 1\r\nb: 2\r\nc: 3\r\n", Ok(Framing::Empty));
        head("a: 1\r\nb: 2\r\nc: 3\r\nd: 4\r\n", Err(Refusal::HeadersTooMany));
        head(&format!("a: {}\r\n", "x".repeat(200)), Err(Refusal::HeadersTooLarge));
        head("a : 1\r\n", Err(Refusal::HeaderInvalid));
        head(" folded\r\n", Err(Refusal::HeaderInvalid));
        head("a: \x01\r\n", Err(Refusal::HeaderInvalid));
        head("no colon\r\n", Err(Refusal::HeaderInvalid));
        raw(b"GET /a b HTTP/1.1\r\nhost: a\r\n\r\n", Err(Refusal::RequestLineInvalid));
        raw(b"GET / HTTP/9.9\r\nhost: a\r\n\r\n", Err(Refusal::RequestLineInvalid));
        raw(b"GET /\r\n\r\n", Err(Refusal::RequestLineInvalid));
        raw(b"G@T / HTTP/1.1\r\n\r\n", Err(Refusal::RequestLineInvalid));
        raw(b"GET a/b HTTP/1.1\r\n\r\n", Err(Refusal::RequestLineInvalid));
        raw(b"GET / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n", Err(Refusal::EncodingUnsupported));
        raw(b"GET / HTTP/1.0\r\n\r\n", Ok(Framing::Empty));
    }

    #[test]
    fn a_stand_in_keeps_what_is_good() {
        let check = |head: &str, expect: &str| {
            assert_eq!(String::from_utf8(stand_in(head.as_bytes())).unwrap(), expect, "{head:?}");
        };
        check("GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nhost: -\r\n\r\n");
        check(
            "POST /v1/x?key=1 HTTP/1.1\r\nX-Request-Id: r1\r\nx-request-id: r2\r\ntraceparent: 00-a\r\n\r\n",
            "POST /v1/x HTTP/1.1\r\nhost: -\r\nx-request-id: r1\r\ntraceparent: 00-a\r\n\r\n",
        );
        check("GET /a#\x08 HTTP/1.1\r\n\r\n", "GET /a HTTP/1.1\r\nhost: -\r\n\r\n");
        check("CONNECT a:1 HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nhost: -\r\n\r\n");
        check("\x16\x03\x01", "GET / HTTP/1.1\r\nhost: -\r\n\r\n");
        check("get \x7f HTTP/1.1\r\nx-request-id: a b\r\n", "GET / HTTP/1.1\r\nhost: -\r\n\r\n");
    }

    proptest! {
        #[test]
        fn a_stand_in_is_always_a_good_head(
            head in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..300),
                "[A-Z]{0,20} [/a-z%?#\"]{0,300} HTTP/1.1\r\n(x-request-id:[ -~]{0,9}\r\n){0,3}".prop_map(String::into_bytes),
            ],
        ) {
            let limits = HeadLimits { bytes_max: 2000, headers_max: 3 };
            prop_assert_eq!(check(&stand_in(&head), limits), Ok(Framing::Empty));
        }
    }
}
