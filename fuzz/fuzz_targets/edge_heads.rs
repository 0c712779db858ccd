//! The edge's watch over raw HTTP/1.1 bytes, with hyper behind it as in the edge.
//!
//! What is judged and passed on does not depend on how the bytes come. hyper takes every head that it is given, and
//! the n-th that was found good is its n-th request: a request that hid in another one's body would break that.
#![no_main]

use std::cell::RefCell;
use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use libfuzzer_sys::fuzz_target;

// Private to the edge, as they are no use to anybody else; compiled in here.
mod config {
    /// As much of the edge's as the modules below name.
    pub struct EdgeLimits {
        pub max_headers: usize,
        pub max_header_bytes: forebay_config::ByteSize,
    }
}
#[allow(dead_code)]
#[path = "../../crates/forebay-edge/src/guard.rs"]
mod guard;
#[path = "../../crates/forebay-edge/src/head.rs"]
mod head;
#[allow(dead_code)]
#[path = "../../crates/forebay-edge/src/head_scan.rs"]
mod head_scan;

use guard::{Refusal, check_head};
use head::HeadLimits;
use head_scan::HeadScan;

const LIMITS: HeadLimits = HeadLimits { bytes_max: 1000, headers_max: 10 };

/// The request lines of all whole heads, and the verdicts on them. The bytes come one by one: a verdict is there with
/// the last byte of its head.
fn judged(stream: &[u8]) -> Vec<(&[u8], Result<(), Refusal>)> {
    let mut scan = HeadScan::new(LIMITS);
    let mut heads = Vec::new();
    let mut start = None;
    for (at, byte) in stream.iter().enumerate() {
        scan.push(&[*byte]);
        let begun = start.take();
        if scan.is_mid_head() {
            // Until here it may have been an empty line.
            start = begun.or(Some(at));
        }
        let verdict = scan.next_verdict();
        if verdict != Err(Refusal::Unframed) {
            let head = &stream[begun.unwrap_or(at)..=at];
            heads.push((head.split(|byte| *byte == b'\r').next().unwrap_or(head), verdict));
        }
    }
    heads
}

#[derive(Debug)]
struct Scanned {
    verdicts: Vec<Result<(), Refusal>>,
    /// What goes on to hyper as it came.
    passed: Vec<u8>,
    /// What hyper gets in place of a refused head: it shows as much of that head as had come.
    stand_in: Vec<u8>,
}

impl PartialEq for Scanned {
    fn eq(&self, other: &Self) -> bool {
        let same = self.passed == other.passed
            // Of too many empty lines, some may have been passed on before there were too many.
            || (!self.stand_in.is_empty() && self.passed.trim_ascii_end() == other.passed.trim_ascii_end());
        self.verdicts == other.verdicts && same
    }
}

fn scan<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Scanned {
    let mut scan = HeadScan::new(LIMITS);
    let (mut passed, mut stand_in) = (Vec::new(), Vec::new());
    for piece in pieces {
        let next = scan.push(piece);
        let comes = !next.lead.is_empty() || !next.through.is_empty() || !next.tail.is_empty();
        assert!(stand_in.is_empty() || !comes, "something is passed on after a refusal");
        passed.extend(next.lead);
        passed.extend_from_slice(&piece[next.through]);
        stand_in.extend(next.tail);
    }
    let verdict = || Some(scan.next_verdict()).filter(|verdict| *verdict != Err(Refusal::Unframed));
    Scanned { verdicts: std::iter::from_fn(verdict).collect(), passed, stand_in }
}

/// A client that has sent everything and reads everything.
struct Client<'a>(&'a [u8]);

impl Read for Client<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        mut buf: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let (now, later) = self.0.split_at(self.0.len().min(buf.remaining()));
        buf.put_slice(now);
        self.0 = later;
        Poll::Ready(Ok(()))
    }
}

impl Write for Client<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Method and path of each request that hyper finds; bodies are read to their end.
fn requests(stream: &[u8]) -> Vec<(String, String)> {
    let found = Rc::new(RefCell::new(Vec::new()));
    let service = service_fn(|request: http::Request<Incoming>| {
        let (parts, body) = request.into_parts();
        found.borrow_mut().push((parts.method.to_string(), parts.uri.path().to_owned()));
        if let Ok(host) = check_head(&parts) {
            assert!(!host.is_empty() && host == host.to_ascii_lowercase());
        }
        async move {
            let _ = body.collect().await;
            Ok::<_, Infallible>(http::Response::new(Empty::<Bytes>::new()))
        }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .header_read_timeout(None)
            .max_buf_size(LIMITS.bytes_max + 8 * 1024)
            .max_headers(LIMITS.headers_max)
            .serve_connection(Client(stream), service)
    );
    let mut context = Context::from_waker(Waker::noop());
    // Nothing here waits for anything but its turn, and a turn reads at least a byte or hands out a request.
    for _ in 0..stream.len() + 16 {
        if let Poll::Ready(end) = Future::poll(connection.as_mut(), &mut context) {
            // Behind a chunked body that could not be followed, hyper may see what was not judged; no verdict is
            // there for what it makes of that.
            if let Err(error) = end
                && !stream.windows(7).any(|word| word.eq_ignore_ascii_case(b"chunked"))
            {
                assert!(!error.is_parse(), "hyper refuses a head that was passed on: {error:?}");
            }
            break;
        }
    }
    found.take()
}

fuzz_target!(|data: &[u8]| {
    let Some((&length, stream)) = data.split_first() else { return };
    let whole = scan(std::iter::once(stream));
    assert_eq!(scan(stream.chunks(usize::from(length % 64) + 1)), whole);
    assert_eq!(scan(stream.chunks(1)), whole);
    let heads = judged(stream);
    assert!(heads.iter().map(|(_, verdict)| *verdict).eq(whole.verdicts.iter().copied()));

    let requests = requests(&[whole.passed, whole.stand_in].concat());
    if let Some(refused) = heads.iter().position(|(_, verdict)| verdict.is_err()) {
        assert_eq!(refused + 1, heads.len(), "nothing is judged after a refusal");
        assert!(requests.len() <= heads.len(), "nothing is passed on after a refusal");
    }
    for ((line, verdict), (method, path)) in heads.into_iter().zip(requests) {
        if verdict.is_err() {
            break;
        }
        let line = String::from_utf8_lossy(line);
        let mut words = line.splitn(2, ' ');
        assert_eq!(words.next(), Some(method.as_str()), "hyper reads another request than was judged");
        // Of an absolute target, hyper shows the path; of one without a path, `/`.
        let target = words.next().unwrap_or_default();
        assert!(path == "/" || target.contains(&path), "hyper reads {path:?} where {target:?} was judged");
    }
});
