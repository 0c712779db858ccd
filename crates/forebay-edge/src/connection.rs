//! One client connection: TLS or the HTTP/2 preface, then hyper, with the time limits hyper lacks.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::config::EdgeLimits;
use crate::guard::Refusal;
use crate::head::HeadLimits;
use crate::head_scan::{HeadScan, Passed};
use crate::metrics::Counted;
use crate::service::{Shared, serve};
use crate::stall::StreamExecutor;
use crate::transport::{Socket, Transport, Wire, Writes};

/// The first bytes of the HTTP/2 preface (RFC 9113, 3.4): no HTTP/1.1 request begins like it, as `PRI` is reserved.
const PREFACE: &[u8] = b"PRI ";

/// What a connection's requests and its time limits share.
pub(crate) struct ConnState {
    pub(crate) peer: SocketAddr,
    pub(crate) secure: bool,
    pub(crate) writes: Arc<Writes>,
    inner: Mutex<Inner>,
}

struct Inner {
    scan: HeadScan,
    /// When the first byte of an unfinished head came.
    head_since: Option<Instant>,
    /// When the last answer ended, or the connection began.
    idle_since: Instant,
    in_flight: usize,
    requests: u64,
}

impl ConnState {
    fn new(peer: SocketAddr, secure: bool, writes: Arc<Writes>, limits: &EdgeLimits) -> Self {
        let heads =
            HeadLimits { bytes_max: limits.max_header_bytes.as_usize(), headers_max: limits.max_headers };
        let inner = Inner {
            scan: HeadScan::new(heads),
            head_since: None,
            idle_since: Instant::now(),
            in_flight: 0,
            requests: 0,
        };
        Self { peer, secure, writes, inner: Mutex::new(inner) }
    }

    pub(crate) fn next_verdict(&self) -> Result<(), Refusal> {
        self.inner.lock().scan.next_verdict()
    }

    /// A head was refused; nothing is read behind it.
    pub(crate) fn is_refused(&self) -> bool {
        self.inner.lock().scan.is_refused()
    }

    /// What of bytes from the socket goes on to hyper.
    pub(crate) fn on_read(&self, bytes: &[u8]) -> Passed {
        let mut inner = self.inner.lock();
        let passed = inner.scan.push(bytes);
        inner.head_since = match (inner.scan.is_mid_head(), inner.head_since) {
            (true, None) => Some(Instant::now()),
            (true, since) => since,
            (false, _) => None,
        };
        passed
    }

    /// When this connection is to be closed if nothing happens until then, and why; `None` while a request is in
    /// flight whose client takes what there is.
    fn due(&self, limits: &EdgeLimits) -> Option<(Instant, Due)> {
        let write = self.writes.blocked_since().map(|since| (since + limits.write_timeout.get(), Due::Write));
        let inner = self.inner.lock();
        if inner.in_flight > 0 {
            return write;
        }
        let read = match inner.head_since {
            Some(since) => (since + limits.header_timeout.get(), Due::Header),
            // A client that connects and says nothing gets the shorter limit.
            None if inner.requests == 0 => (inner.idle_since + limits.header_timeout.get(), Due::Idle),
            None => (inner.idle_since + limits.idle_timeout.get(), Due::Idle),
        };
        Some(write.filter(|write| write.0 < read.0).unwrap_or(read))
    }

    fn is_fresh(&self) -> bool {
        let inner = self.inner.lock();
        inner.requests == 0 && inner.in_flight == 0 && inner.head_since.is_none()
    }
}

/// Which time limit closes a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Header,
    Idle,
    Write,
}

impl Due {
    /// The metric's label.
    fn reason(self) -> &'static str {
        match self {
            Self::Header => "header-timeout",
            Self::Idle => "idle-timeout",
            Self::Write => "write-timeout",
        }
    }
}

/// Counts a request as in flight on its connection, from its head to the end of its answer.
pub(crate) struct InFlight(pub(crate) Arc<ConnState>);

impl InFlight {
    pub(crate) fn new(state: &Arc<ConnState>) -> Self {
        let mut inner = state.inner.lock();
        inner.in_flight += 1;
        inner.requests += 1;
        drop(inner);
        Self(state.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut inner = self.0.inner.lock();
        inner.in_flight -= 1;
        inner.idle_since = Instant::now();
    }
}

/// How connections are told to end.
#[derive(Clone)]
pub(crate) struct Stop {
    /// No new requests; what is in flight is finished.
    pub(crate) drain: CancellationToken,
    /// At once.
    pub(crate) kill: CancellationToken,
}

/// Serves a connection to its end. `tls` as configured for the listener.
pub(crate) async fn serve_connection(
    shared: Arc<Shared>,
    socket: Socket,
    peer: SocketAddr,
    tls: Option<TlsAcceptor>,
    stop: Stop,
) {
    let _counted = Counted::new(&shared.metrics.connections);
    let kill = stop.kill.clone();
    let writes = Arc::new(Writes::default());
    let wire = Wire::new(socket, writes.clone());
    let served = async {
        match tls {
            Some(acceptor) => serve_tls(&shared, wire, writes, peer, acceptor, stop).await,
            None => serve_plain(&shared, wire, writes, peer, stop).await,
        }
    };
    tokio::select! {
        () = served => {}
        () = kill.cancelled() => {}
    }
}

async fn serve_tls(
    shared: &Arc<Shared>,
    wire: Wire,
    writes: Arc<Writes>,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
    stop: Stop,
) {
    let handshake = tokio::time::timeout(shared.limits.header_timeout.get(), acceptor.accept(wire));
    let stream = tokio::select! {
        stream = handshake => stream,
        () = stop.drain.cancelled() => return,
    };
    match stream {
        Ok(Ok(stream)) => {
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            let state = Arc::new(ConnState::new(peer, true, writes, &shared.limits));
            serve_http(shared, stream, Bytes::new(), state, http2, stop).await;
        }
        Ok(Err(error)) => {
            shared.metrics.refuse("tls-handshake");
            tracing::debug!(%error, peer = %peer.ip(), "TLS handshake failed");
        }
        Err(_) => shared.metrics.refuse("header-timeout"),
    }
}

async fn serve_plain(
    shared: &Arc<Shared>,
    mut wire: Wire,
    writes: Arc<Writes>,
    peer: SocketAddr,
    stop: Stop,
) {
    let first = tokio::time::timeout(shared.limits.header_timeout.get(), read_first(&mut wire));
    let first = tokio::select! {
        first = first => first,
        () = stop.drain.cancelled() => return,
    };
    match first {
        Ok(Ok(ahead)) => {
            let http2 = ahead.starts_with(PREFACE);
            let state = Arc::new(ConnState::new(peer, false, writes, &shared.limits));
            serve_http(shared, wire, ahead, state, http2, stop).await;
        }
        // The client left without a word: health checks of load balancers do that.
        Ok(Err(_)) => {}
        Err(_) => shared.metrics.refuse("header-timeout"),
    }
}

/// Reads until it is known whether this is the HTTP/2 preface.
async fn read_first(wire: &mut Wire) -> io::Result<Bytes> {
    let mut ahead = [0; PREFACE.len()];
    let mut length = 0;
    while length < ahead.len() && PREFACE.starts_with(&ahead[..length]) {
        match wire.read(&mut ahead[length..]).await? {
            0 if length == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            0 => break,
            more => length += more,
        }
    }
    Ok(Bytes::copy_from_slice(&ahead[..length]))
}

async fn serve_http<S>(
    shared: &Arc<Shared>,
    stream: S,
    ahead: Bytes,
    state: Arc<ConnState>,
    http2: bool,
    stop: Stop,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let watch = (!http2).then(|| state.clone());
    let io = TokioIo::new(Transport::new(stream, ahead, watch));
    let limits = &shared.limits;
    let service = {
        let (shared, state) = (shared.clone(), state.clone());
        hyper::service::service_fn(move |request| {
            let answer = serve(shared.clone(), state.clone(), request);
            // Boxed: the future of a request is large, and HTTP/1.1 connections hold room for one while idle.
            let answer: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(answer);
            async move { Ok::<_, Infallible>(answer.await) }
        })
    };
    let head_bytes_max = limits.max_header_bytes.as_usize();
    let result = if http2 {
        let connection = hyper::server::conn::http2::Builder::new(StreamExecutor::new(shared.clone()))
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.max_concurrent_streams)
            // Twice the limit: up to there the refusal is ours (`guard::check_size`), and has a body. hyper's has none.
            .max_header_list_size(u32::try_from(head_bytes_max.saturating_mul(2)).unwrap_or(u32::MAX))
            // Rapid reset (CVE-2023-44487) and its kin; hyper's own defaults, written down so that they stay.
            .max_pending_accept_reset_streams(20)
            .max_local_error_reset_streams(1024)
            // Per stream: a client that does not read stops its own reply's writer, not the process's memory.
            .max_send_buf_size(64 * 1024)
            .keep_alive_interval(limits.idle_timeout.get() / 2)
            .serve_connection(io, service);
        drive(Box::pin(connection), shared, &state, &stop).await
    } else {
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            // The time limit on heads is ours (`drive`): hyper's would also end idle connections.
            .header_read_timeout(None)
            // Heads come whole and within their limits (`head_scan`), so hyper's own limits, whose refusals have no
            // body, are just out of reach.
            .max_buf_size(head_bytes_max.saturating_add(8 * 1024))
            .max_headers(limits.max_headers)
            // Must stay off: it swallows hyper's own 400 and 431.
            .pipeline_flush(false)
            .serve_connection(io, service);
        drive(Box::pin(connection), shared, &state, &stop).await
    };
    if let Err(error) = result {
        if error.is_parse() && !http2 {
            // What hyper refuses and `head` let through; there should be none.
            shared.metrics.refuse("unparsable");
        }
        tracing::debug!(%error, peer = %state.peer.ip(), "connection ended");
    }
}

/// What both of hyper's connections can.
trait Graceful: Future<Output = hyper::Result<()>> {
    fn graceful_shutdown(self: Pin<&mut Self>);
}

impl<I, S, B> Graceful for hyper::server::conn::http1::Connection<I, S>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    S: hyper::service::HttpService<hyper::body::Incoming, ResBody = B>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    B: http_body::Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    fn graceful_shutdown(self: Pin<&mut Self>) {
        Self::graceful_shutdown(self);
    }
}

impl<I, S, B> Graceful for hyper::server::conn::http2::Connection<I, S, StreamExecutor>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    S: hyper::service::HttpService<hyper::body::Incoming, ResBody = B>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S::Future: Send + 'static,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    StreamExecutor: hyper::rt::bounds::Http2ServerConnExec<S::Future, B>,
{
    fn graceful_shutdown(self: Pin<&mut Self>) {
        Self::graceful_shutdown(self);
    }
}

/// Runs a connection, tells it to drain, and ends it when it says nothing for too long.
async fn drive<C: Graceful>(
    mut connection: Pin<Box<C>>,
    shared: &Shared,
    state: &ConnState,
    stop: &Stop,
) -> hyper::Result<()> {
    let first_due = Instant::now() + shared.limits.header_timeout.get();
    let mut timer = std::pin::pin!(tokio::time::sleep_until(first_due));
    let mut draining = false;
    loop {
        tokio::select! {
            biased;
            result = connection.as_mut() => return result,
            () = stop.drain.cancelled(), if !draining => {
                draining = true;
                // hyper waits for the first request of a connection that had none.
                if state.is_fresh() {
                    return Ok(());
                }
                connection.as_mut().graceful_shutdown();
            }
            due = until_due(timer.as_mut(), state, shared) => {
                shared.metrics.refuse(due.reason());
                if due == Due::Write {
                    // Dropping the connection drops the replies, and all that is held for them below.
                    state.writes.time_out();
                    return Ok(());
                }
                // Nothing is in flight, so there is nothing to finish; HTTP/2 clients are told with a GOAWAY.
                connection.as_mut().graceful_shutdown();
                let farewell = tokio::time::timeout(std::time::Duration::from_millis(100), connection.as_mut());
                return farewell.await.unwrap_or(Ok(()));
            }
        }
    }
}

/// Resolves when the connection is due to be closed. Polled after the connection, so that it sees what has changed;
/// the timer itself is only moved when it fires or must fire earlier.
fn until_due(mut timer: Pin<&mut Sleep>, state: &ConnState, shared: &Shared) -> impl Future<Output = Due> {
    std::future::poll_fn(move |cx| {
        loop {
            let now = Instant::now();
            let due = state.due(&shared.limits);
            if let Some((due, why)) = due {
                if due <= now {
                    return Poll::Ready(why);
                }
                if due < timer.deadline() {
                    timer.as_mut().reset(due);
                }
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            // In flight: look again later; the end of the answer wakes the connection, and so this, anyway.
            timer.as_mut().reset(due.map_or(now + shared.limits.idle_timeout.get(), |due| due.0));
        }
    })
}
