//! A tiny HTTP/1.1 server: answers by a function, and remembers what it was asked.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinHandle;

/// What was asked, probes left out.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) path: String,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Bytes,
}

impl Seen {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("a JSON body")
    }
}

pub(crate) type Answer = Response<Full<Bytes>>;

pub(crate) struct Server {
    pub(crate) url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    accepting: JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(answer: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (notes, answer) = (Arc::clone(&seen), Arc::new(answer));
        let accepting = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (notes, answer) = (Arc::clone(&notes), Arc::clone(&answer));
                tokio::spawn(async move {
                    let service = service_fn(|request: Request<Incoming>| {
                        let (notes, answer) = (Arc::clone(&notes), Arc::clone(&answer));
                        async move {
                            let (head, body) = request.into_parts();
                            let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
                            let seen = Seen { path: head.uri.path().to_owned(), headers: head.headers, body };
                            let answer = answer(&seen);
                            if seen.path != "/health" {
                                notes.lock().push(seen);
                            }
                            Ok::<_, Infallible>(answer)
                        }
                    });
                    let http = hyper::server::conn::http1::Builder::new();
                    // A client that goes away is part of the tests.
                    let _ = http.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Self { url, seen, accepting }
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// An address that refuses connections for as long as the socket is held: bound, but not listening.
pub(crate) fn refusing() -> (String, TcpSocket) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
    (format!("http://{}", socket.local_addr().expect("bound")), socket)
}

pub(crate) fn json(status: u16, body: &'static str) -> Answer {
    Response::builder()
        .status(status)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from_static(body.as_bytes())))
        .expect("a valid answer")
}

pub(crate) fn sse(body: &'static str) -> Answer {
    Response::builder()
        .header("content-type", "text/event-stream")
        .body(Full::new(Bytes::from_static(body.as_bytes())))
        .expect("a valid answer")
}
