//! The edge's watch over raw HTTP/1.1 bytes, next to hyper's own parser on the same bytes.
//!
//! The verdicts don't depend on how the bytes come. And as long as every verdict is good, the n-th head that was
//! judged is the n-th request that hyper hands out: a request that hid in another one's body would break that.
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
#[allow(dead_code)]
#[path = "../../crates/forebay-edge/src/guard.rs"]
mod guard;
#[allow(dead_code)]
#[path = "../../crates/forebay-edge/src/head_scan.rs"]
mod head_scan;

use guard::{Refusal, check_head};
use head_scan::HeadScan;

struct Head<'a> {
    line: &'a [u8],
    verdict: Result<(), Refusal>,
}

/// Heads and verdicts, the bytes coming one by one: a verdict is there with the last byte of its head.
fn judged(stream: &[u8]) -> Vec<Head<'_>> {
    let mut scan = HeadScan::new();
    let mut heads = Vec::new();
    let mut start = None;
    for (at, byte) in stream.iter().enumerate() {
        scan.push(&[*byte]);
        if scan.is_mid_head() {
            start.get_or_insert(at);
        }
        let verdict = scan.next_verdict();
        if verdict != Err(Refusal::Unframed) {
            let head = &stream[start.take().unwrap_or(at)..=at];
            heads.push(Head { line: head.split(|byte| *byte == b'\n').next().unwrap_or(head), verdict });
        }
    }
    heads
}

fn verdicts<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<Result<(), Refusal>> {
    let mut scan = HeadScan::new();
    pieces.for_each(|piece| scan.push(piece));
    std::iter::from_fn(|| Some(scan.next_verdict()).filter(|verdict| *verdict != Err(Refusal::Unframed))).collect()
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
    let mut connection =
        pin!(http1::Builder::new().header_read_timeout(None).serve_connection(Client(stream), service));
    let mut context = Context::from_waker(Waker::noop());
    // Nothing here waits for anything but its turn, and a turn reads at least a byte or hands out a request.
    for _ in 0..stream.len() + 16 {
        if Future::poll(connection.as_mut(), &mut context).is_ready() {
            break;
        }
    }
    found.take()
}

fuzz_target!(|data: &[u8]| {
    let Some((&length, stream)) = data.split_first() else { return };
    let heads = judged(stream);
    let expect: Vec<_> = heads.iter().map(|head| head.verdict).collect();
    assert_eq!(verdicts(std::iter::once(stream)), expect);
    assert_eq!(verdicts(stream.chunks(usize::from(length % 64) + 1)), expect);

    for (head, (method, path)) in heads.iter().zip(requests(stream)) {
        if head.verdict.is_err() {
            break;
        }
        let line = String::from_utf8_lossy(head.line);
        let mut words = line.splitn(2, ' ');
        assert_eq!(words.next(), Some(method.as_str()), "hyper reads another request than was judged");
        // Of an absolute target, hyper shows the path; of one without a path, `/`.
        let target = words.next().unwrap_or_default();
        assert!(path == "/" || target.contains(&path), "hyper reads {path:?} where {target:?} was judged");
    }
});
