//! One client connection: TLS or the HTTP/2 preface, then hyper, with the time limits hyper lacks.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::guard::Refusal;
use crate::head_scan::HeadScan;
use crate::metrics::Counted;
use crate::service::{Shared, serve};

/// The first bytes of the HTTP/2 preface (RFC 9113, 3.4): no HTTP/1.1 request begins like it, as `PRI` is reserved.
const PREFACE: &[u8] = b"PRI ";

/// What a connection's requests and its time limits share.
pub(crate) struct ConnState {
    pub(crate) peer: SocketAddr,
    pub(crate) secure: bool,
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
    fn new(peer: SocketAddr, secure: bool) -> Self {
        let inner = Inner {
            scan: HeadScan::new(),
            head_since: None,
            idle_since: Instant::now(),
            in_flight: 0,
            requests: 0,
        };
        Self { peer, secure, inner: Mutex::new(inner) }
    }

    pub(crate) fn next_verdict(&self) -> Result<(), Refusal> {
        self.inner.lock().scan.next_verdict()
    }

    fn on_read(&self, bytes: &[u8]) {
        let mut inner = self.inner.lock();
        inner.scan.push(bytes);
        inner.head_since = match (inner.scan.is_mid_head(), inner.head_since) {
            (true, None) => Some(Instant::now()),
            (true, since) => since,
            (false, _) => None,
        };
    }

    /// When this connection is to be closed if nothing happens until then; `None` while a request is in flight.
    fn due(&self, limits: &crate::config::EdgeLimits) -> Option<Instant> {
        let inner = self.inner.lock();
        if inner.in_flight > 0 {
            return None;
        }
        Some(match inner.head_since {
            Some(since) => since + limits.header_timeout.get(),
            // A client that connects and says nothing gets the shorter limit.
            None if inner.requests == 0 => inner.idle_since + limits.header_timeout.get(),
            None => inner.idle_since + limits.idle_timeout.get(),
        })
    }

    fn is_fresh(&self) -> bool {
        let inner = self.inner.lock();
        inner.requests == 0 && inner.in_flight == 0 && inner.head_since.is_none()
    }
}

/// Counts a request as in flight on its connection, from its head to the end of its answer.
pub(crate) struct InFlight(Arc<ConnState>);

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

/// A connection's transport: bytes that were read ahead come first, and HTTP/1.1 heads are watched.
struct Transport<S> {
    stream: S,
    ahead: Bytes,
    watch: Option<Arc<ConnState>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Transport<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let this = &mut *self;
        if this.ahead.is_empty() {
            std::task::ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
        } else {
            let length = this.ahead.len().min(buf.remaining());
            buf.put_slice(&this.ahead[..length]);
            this.ahead.advance(length);
        }
        if let Some(state) = &this.watch {
            state.on_read(&buf.filled()[before..]);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Transport<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
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
    tcp: TcpStream,
    peer: SocketAddr,
    tls: Option<TlsAcceptor>,
    stop: Stop,
) {
    let _counted = Counted::new(&shared.metrics.connections);
    // A token's frame must not wait for the ack of the one before.
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    let kill = stop.kill.clone();
    let served = async {
        match tls {
            Some(acceptor) => serve_tls(&shared, tcp, peer, acceptor, stop).await,
            None => serve_plain(&shared, tcp, peer, stop).await,
        }
    };
    tokio::select! {
        () = served => {}
        () = kill.cancelled() => {}
    }
}

async fn serve_tls(
    shared: &Arc<Shared>,
    tcp: TcpStream,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
    stop: Stop,
) {
    let handshake = tokio::time::timeout(shared.limits.header_timeout.get(), acceptor.accept(tcp));
    let stream = tokio::select! {
        stream = handshake => stream,
        () = stop.drain.cancelled() => return,
    };
    match stream {
        Ok(Ok(stream)) => {
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            serve_http(shared, stream, Bytes::new(), peer, true, http2, stop).await;
        }
        Ok(Err(error)) => {
            shared.metrics.refuse("tls-handshake");
            tracing::debug!(%error, peer = %peer.ip(), "TLS handshake failed");
        }
        Err(_) => shared.metrics.refuse("header-timeout"),
    }
}

async fn serve_plain(shared: &Arc<Shared>, mut tcp: TcpStream, peer: SocketAddr, stop: Stop) {
    let first = tokio::time::timeout(shared.limits.header_timeout.get(), read_first(&mut tcp));
    let first = tokio::select! {
        first = first => first,
        () = stop.drain.cancelled() => return,
    };
    match first {
        Ok(Ok(ahead)) => {
            let http2 = ahead.starts_with(PREFACE);
            serve_http(shared, tcp, ahead, peer, false, http2, stop).await;
        }
        // The client left without a word: health checks of load balancers do that.
        Ok(Err(_)) => {}
        Err(_) => shared.metrics.refuse("header-timeout"),
    }
}

/// Reads until it is known whether this is the HTTP/2 preface.
async fn read_first(tcp: &mut TcpStream) -> io::Result<Bytes> {
    let mut ahead = [0; PREFACE.len()];
    let mut length = 0;
    while length < ahead.len() && PREFACE.starts_with(&ahead[..length]) {
        match tcp.read(&mut ahead[length..]).await? {
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
    peer: SocketAddr,
    secure: bool,
    http2: bool,
    stop: Stop,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let state = Arc::new(ConnState::new(peer, secure));
    let watch = (!http2).then(|| state.clone());
    let io = TokioIo::new(Transport { stream, ahead, watch });
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
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.max_concurrent_streams)
            .max_header_list_size(u32::try_from(head_bytes_max).unwrap_or(u32::MAX))
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
            .max_buf_size(head_bytes_max.max(8 * 1024))
            .max_headers(limits.max_headers)
            // Must stay off: it swallows hyper's own 400 and 431.
            .pipeline_flush(false)
            .serve_connection(io, service);
        drive(Box::pin(connection), shared, &state, &stop).await
    };
    if let Err(error) = result {
        tracing::debug!(%error, peer = %peer.ip(), "connection ended");
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

impl<I, S, B> Graceful for hyper::server::conn::http2::Connection<I, S, TokioExecutor>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    S: hyper::service::HttpService<hyper::body::Incoming, ResBody = B>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S::Future: Send + 'static,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    TokioExecutor: hyper::rt::bounds::Http2ServerConnExec<S::Future, B>,
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
            () = until_due(timer.as_mut(), state, shared) => {
                let mid_head = state.inner.lock().head_since.is_some();
                shared.metrics.refuse(if mid_head { "header-timeout" } else { "idle-timeout" });
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
fn until_due(mut timer: Pin<&mut Sleep>, state: &ConnState, shared: &Shared) -> impl Future<Output = ()> {
    std::future::poll_fn(move |cx| {
        loop {
            let now = Instant::now();
            let due = state.due(&shared.limits);
            if let Some(due) = due {
                if due <= now {
                    return Poll::Ready(());
                }
                if due < timer.deadline() {
                    timer.as_mut().reset(due);
                }
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            // In flight: look again later; the end of the answer wakes the connection, and so this, anyway.
            timer.as_mut().reset(due.unwrap_or(now + shared.limits.idle_timeout.get()));
        }
    })
}
