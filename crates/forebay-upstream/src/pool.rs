//! Connections to upstreams: one request at a time each, idle ones kept for the next, closed when a reply is dropped.
//!
//! A connection is owned by whoever uses it: first the future of the request, then the reply's body, then the pool.
//! Dropping any of them aborts the task that drives the connection, which closes the socket. There is no state in
//! which a connection that nobody owns goes on.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::error::{BoxError, UpstreamError};

/// The body of a request to an upstream.
pub type RequestBody = UnsyncBoxBody<Bytes, BoxError>;

/// Where a connection leads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    pub(crate) tls: bool,
    /// Without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// As it stands in `host` headers and in errors.
    pub(crate) authority: String,
}

/// Aborts the task that drives a connection.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An open connection in use. Dropping it closes the socket.
pub(crate) struct Connection {
    pub(crate) sender: SendRequest<RequestBody>,
    home: Arc<Host>,
    driver: Driver,
}

/// An open connection at rest. It does not own its host, which owns it: a dropped pool closes its connections.
struct Idle {
    since: Instant,
    sender: SendRequest<RequestBody>,
    driver: Driver,
}

impl Connection {
    pub(crate) fn new(sender: SendRequest<RequestBody>, driver: JoinHandle<()>, home: Arc<Host>) -> Self {
        Self { sender, home, driver: Driver(driver) }
    }

    pub(crate) fn authority(&self) -> &str {
        &self.home.place.authority
    }
}

/// Everything towards one place.
pub(crate) struct Host {
    pub(crate) place: Place,
    pub(crate) permits: Arc<Semaphore>,
    /// Newest last: the newest is reused, the oldest expires.
    idle: Mutex<Vec<Idle>>,
    limits: Limits,
    /// The pool that reaps idle connections; a host outlives it only in the hands of a reply.
    pool: Weak<PoolInner>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) connections_max: usize,
    pub(crate) idle_max: usize,
    pub(crate) idle_timeout: Duration,
}

impl Host {
    /// An idle connection that can take a request now.
    pub(crate) async fn reuse(self: &Arc<Self>) -> Option<Connection> {
        loop {
            let Idle { since, sender, driver } = self.idle.lock().pop()?;
            if since.elapsed() >= self.limits.idle_timeout || sender.is_closed() {
                continue;
            }
            let mut connection = Connection { sender, home: self.clone(), driver };
            if connection.sender.is_ready() {
                return Some(connection);
            }
            // The reply's last byte may be with us a moment before the driver has finished its turn. A connection
            // that needs longer is still writing a request whose answer came early: not worth waiting for.
            let ready = tokio::time::timeout(Duration::from_millis(2), connection.sender.ready()).await;
            if matches!(ready, Ok(Ok(()))) {
                return Some(connection);
            }
        }
    }

    fn put_back(connection: Connection) {
        if connection.sender.is_closed() {
            return;
        }
        let Connection { sender, home: host, driver } = connection;
        let mut idle = host.idle.lock();
        if idle.len() < host.limits.idle_max {
            idle.push(Idle { since: Instant::now(), sender, driver });
        }
        drop(idle);
        if let Some(pool) = host.pool.upgrade() {
            pool.reap_later();
        }
    }

    /// Closes what is idle for too long, or was closed by the other side. True when nothing is left.
    fn reap(&self) -> bool {
        let mut idle = self.idle.lock();
        idle.retain(|idle| idle.since.elapsed() < self.limits.idle_timeout && !idle.sender.is_closed());
        idle.is_empty()
    }
}

/// All hosts. They are as many as the configuration names, so the map needs no limit of its own.
#[derive(Clone)]
pub(crate) struct Pool(Arc<PoolInner>);

struct PoolInner {
    hosts: Mutex<HashMap<Place, Arc<Host>>>,
    limits: Limits,
    reaping: AtomicBool,
}

impl Pool {
    pub(crate) fn new(limits: Limits) -> Self {
        Self(Arc::new(PoolInner { hosts: Mutex::default(), limits, reaping: AtomicBool::new(false) }))
    }

    pub(crate) fn host(&self, place: &Place) -> Arc<Host> {
        let mut hosts = self.0.hosts.lock();
        if let Some(host) = hosts.get(place) {
            return host.clone();
        }
        let host = Arc::new(Host {
            place: place.clone(),
            permits: Arc::new(Semaphore::new(self.0.limits.connections_max)),
            idle: Mutex::default(),
            limits: self.0.limits,
            pool: Arc::downgrade(&self.0),
        });
        hosts.insert(place.clone(), host.clone());
        host
    }
}

impl PoolInner {
    /// Idle connections are also closed when no request comes along to notice them.
    fn reap_later(self: Arc<Self>) {
        if self.reaping.swap(true, Ordering::AcqRel) {
            return;
        }
        let (pool, every) = (Arc::downgrade(&self), self.limits.idle_timeout.max(Duration::from_millis(10)));
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                let Some(pool) = pool.upgrade() else { return };
                let hosts: Vec<_> = pool.hosts.lock().values().cloned().collect();
                // `|`, not `||`: every host is reaped.
                if hosts.iter().fold(true, |empty, host| host.reap() & empty) {
                    pool.reaping.store(false, Ordering::Release);
                    return;
                }
            }
        });
    }
}

/// The body of an upstream's answer. When it ends, its connection goes back to the pool; dropping it earlier closes
/// the connection at once.
pub struct ResponseBody {
    incoming: Incoming,
    connection: Option<InUse>,
}

struct InUse {
    connection: Connection,
    _permit: OwnedSemaphorePermit,
}

impl ResponseBody {
    pub(crate) fn new(incoming: Incoming, connection: Connection, permit: OwnedSemaphorePermit) -> Self {
        let connection = Some(InUse { connection, _permit: permit });
        let mut body = Self { incoming, connection };
        body.settle();
        body
    }

    fn settle(&mut self) {
        if self.incoming.is_end_stream() {
            self.release();
        }
    }

    fn release(&mut self) {
        if let Some(used) = self.connection.take() {
            Host::put_back(used.connection);
        }
    }
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = UpstreamError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UpstreamError>>> {
        let this = &mut *self;
        let frame = std::task::ready!(Pin::new(&mut this.incoming).poll_frame(cx));
        Poll::Ready(match frame {
            Some(Ok(frame)) => {
                this.settle();
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                let used = this.connection.take();
                let authority = used.as_ref().map_or("", |used| used.connection.authority());
                Some(Err(UpstreamError::from_hyper(authority, error, false)))
            }
            None => {
                this.release();
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl std::fmt::Debug for ResponseBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResponseBody").finish_non_exhaustive()
    }
}
