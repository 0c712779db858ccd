//! What lies between hyper and the socket: HTTP/1.1 heads are judged on their way in, progress on the way out is
//! watched, and a connection that is closed by us is closed so that the last answer arrives.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, Sleep};

use crate::connection::ConnState;

/// How much the kernel may hold of a connection that the client's window has no room for. Small, so that what the
/// client takes is seen soon: Linux' own limit is megabytes, and it tells us of room only when a third of it is free.
#[cfg(target_os = "linux")]
const UNSENT_BYTES_MAX: u32 = 128 * 1024;

/// How much of what follows a refused request is read, and for how long, so that the refusal arrives.
const LINGER_BYTES_MAX: usize = 4 * 1024 * 1024;
const LINGER: Duration = Duration::from_secs(2);

/// Whether a connection's client takes what is written.
#[derive(Debug, Default)]
pub(crate) struct Writes {
    /// Since when bytes wait that the client has no room for.
    blocked_since: Mutex<Option<Instant>>,
    timed_out: AtomicBool,
}

impl Writes {
    pub(crate) fn blocked_since(&self) -> Option<Instant> {
        *self.blocked_since.lock()
    }

    /// The connection is about to be given up.
    pub(crate) fn time_out(&self) {
        self.timed_out.store(true, Ordering::Release);
    }

    pub(crate) fn has_timed_out(&self) -> bool {
        self.timed_out.load(Ordering::Acquire)
    }

    fn on_write(&self, written: &Poll<io::Result<usize>>) {
        let mut blocked_since = self.blocked_since.lock();
        match written {
            Poll::Pending => *blocked_since = blocked_since.or_else(|| Some(Instant::now())),
            Poll::Ready(_) => *blocked_since = None,
        }
    }
}

/// What a client connects by.
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Runs `$call` on the stream of either kind.
macro_rules! either {
    ($socket:expr, $stream:ident => $call:expr) => {
        match $socket {
            Socket::Tcp($stream) => $call,
            Socket::Unix($stream) => $call,
        }
    };
}

/// The socket, below TLS.
pub(crate) struct Wire {
    socket: Socket,
    writes: Arc<Writes>,
}

impl Wire {
    pub(crate) fn new(socket: Socket, writes: Arc<Writes>) -> Self {
        if let Socket::Tcp(tcp) = &socket {
            // A token's frame must not wait for the ack of the one before.
            if let Err(error) = tcp.set_nodelay(true) {
                tracing::debug!(%error, "TCP_NODELAY could not be set");
            }
            #[cfg(target_os = "linux")]
            if let Err(error) = socket2::SockRef::from(tcp).set_tcp_notsent_lowat(UNSENT_BYTES_MAX) {
                tracing::debug!(%error, "TCP_NOTSENT_LOWAT could not be set");
            }
        }
        Self { socket, writes }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.writes.has_timed_out()
            && let Socket::Tcp(tcp) = &self.socket
        {
            // Or the kernel would go on offering the rest to a client that does not want it.
            let _ = tcp.set_zero_linger();
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(&mut self.socket, stream => Pin::new(stream).poll_read(cx, buf))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = either!(&mut self.socket, stream => Pin::new(stream).poll_write(cx, buf));
        self.writes.on_write(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = either!(&mut self.socket, stream => Pin::new(stream).poll_write_vectored(cx, bufs));
        self.writes.on_write(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        either!(&self.socket, stream => stream.is_write_vectored())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(&mut self.socket, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(&mut self.socket, stream => Pin::new(stream).poll_shutdown(cx))
    }
}

/// A connection as hyper sees it: bytes that were read ahead come first, and HTTP/1.1 heads come whole and judged.
pub(crate) struct Transport<S> {
    stream: S,
    /// Read ahead from the stream, not yet judged.
    ahead: Bytes,
    /// Judged, for hyper.
    passed: Bytes,
    watch: Option<Arc<ConnState>>,
    linger: Option<Linger>,
}

struct Linger {
    left: usize,
    timer: Pin<Box<Sleep>>,
}

impl<S> Transport<S> {
    /// `watch` where the connection speaks HTTP/1.1.
    pub(crate) fn new(stream: S, ahead: Bytes, watch: Option<Arc<ConnState>>) -> Self {
        Self { stream, ahead, passed: Bytes::new(), watch, linger: None }
    }
}

fn give(from: &mut Bytes, buf: &mut ReadBuf<'_>) {
    let length = from.len().min(buf.remaining());
    buf.put_slice(&from[..length]);
    from.advance(length);
}

impl<S: AsyncRead + Unpin> AsyncRead for Transport<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.passed.is_empty() {
                give(&mut this.passed, buf);
                return Poll::Ready(Ok(()));
            }
            // hyper asks for more only to learn that the client left; the refusal is on its way regardless.
            if this.watch.as_ref().is_some_and(|state| state.is_refused()) {
                return Poll::Pending;
            }
            let before = buf.filled().len();
            if this.ahead.is_empty() {
                ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
            } else {
                give(&mut this.ahead, buf);
            }
            let read = &buf.filled()[before..];
            let Some(state) = this.watch.as_ref().filter(|_| !read.is_empty()) else {
                return Poll::Ready(Ok(()));
            };
            let passed = state.on_read(read);
            if passed.lead.is_empty() && passed.tail.is_empty() {
                let end = before + passed.through.end;
                buf.set_filled(end);
                if end > before {
                    return Poll::Ready(Ok(()));
                }
            } else {
                let mut bytes = passed.lead;
                bytes.extend_from_slice(&read[passed.through]);
                bytes.extend(passed.tail);
                this.passed = bytes.into();
                buf.set_filled(before);
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Transport<S> {
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

    /// After a refusal, reads on for a moment: a socket that is closed with unread bytes is reset, and a reset may
    /// overtake the refusal on its way to the client.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
            if !this.watch.as_ref().is_some_and(|state| state.is_refused()) {
                return Poll::Ready(Ok(()));
            }
            this.linger =
                Some(Linger { left: LINGER_BYTES_MAX, timer: Box::pin(tokio::time::sleep(LINGER)) });
        }
        let Some(linger) = &mut this.linger else { return Poll::Ready(Ok(())) };
        let mut space = [0; 4096];
        loop {
            if linger.timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let mut rest = ReadBuf::new(&mut space);
            match ready!(Pin::new(&mut this.stream).poll_read(cx, &mut rest)) {
                Ok(()) if !rest.filled().is_empty() && linger.left > rest.filled().len() => {
                    linger.left -= rest.filled().len();
                }
                // The end, more than is waited for, or a client that is gone already.
                Ok(()) | Err(_) => return Poll::Ready(Ok(())),
            }
        }
    }
}
