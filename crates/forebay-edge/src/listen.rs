//! [`Edge`]: binds the addresses, accepts, and drains.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forebay_config::{Environment, ListenAddr, SecretError};
use forebay_observe::{MetricError, RecentRequests, Registry};
use forebay_upstream::HttpClient;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{EdgeConfig, EdgeConfigError, Switch};
use crate::connection::{Stop, serve_connection};
use crate::cors::Cors;
use crate::http_metrics::HttpMetrics;
use crate::llm::LlmStage;
use crate::lock::Lock;
use crate::metrics::Metrics;
use crate::operator::Operator;
use crate::route::RouteTable;
use crate::service::{Health, Shared};
use crate::tls::{TlsError, server_config};
use crate::transport::Socket;
use crate::unix::{UnixSocket, UnixSocketError};

/// Pause after a failed accept: out of file descriptors is not over a microsecond later.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long replies may take to be ended, and clients for their last frames.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What the edge needs from the composition.
pub struct EdgeDeps {
    /// The stack; `None` where only upstream routes are configured.
    pub llm: Option<LlmStage>,
    /// Answers for the process; used on LLM routes where `edge.operator-api` is on, and at the end of a drain.
    pub operator: Option<Arc<dyn Operator>>,
    pub client: HttpClient,
    pub registry: Registry,
    pub recent: RecentRequests,
    /// For `/version`.
    pub version: String,
    /// For `/health`; called per request, so cheap.
    pub health: Arc<dyn Fn() -> Health + Send + Sync>,
}

/// Why the edge can't start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error(transparent)]
    Config(#[from] EdgeConfigError),
    #[error(
        "a route of `edge.routes` goes to `llm`, but no layer serves it; add `engine`, `router`, `proxy` or \
         `gateway`, or send the route to a URL"
    )]
    NoLlm,
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Unix(#[from] UnixSocketError),
    #[error("address {address} is already in use; stop the other program or set `edge.listen`")]
    InUse { address: String },
    #[error("address {address} needs privileges; use a port from 1024 up in `edge.listen`")]
    Forbidden { address: String },
    #[error("can't listen on {address}; correct `edge.listen`")]
    Listen { address: String, source: io::Error },
    #[error("`edge.access-keys[{nth}]` can't be fetched")]
    AccessKey { nth: usize, source: SecretError },
    #[error(transparent)]
    Metric(#[from] MetricError),
}

/// How a drain went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrainReport {
    /// Connections that were open when the listeners closed.
    pub open: usize,
    /// Of these, closed by force at the end of `drain-timeout`.
    pub cut: usize,
    /// From the stop, `drain-delay` included.
    pub took: Duration,
}

/// L1. See [`Edge::bind`].
#[derive(Debug)]
pub struct Edge;

/// Listening, not yet accepting: clients that connect wait.
pub struct BoundEdge {
    listeners: Vec<Listener>,
    addrs: Vec<SocketAddr>,
    tls: Option<TlsAcceptor>,
    shared: Arc<Shared>,
    operator: Option<Arc<dyn Operator>>,
    drain_delay: Duration,
    drain_timeout: Duration,
}

impl std::fmt::Debug for BoundEdge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BoundEdge").field("addrs", &self.addrs).finish_non_exhaustive()
    }
}

impl Edge {
    /// Reads certificates, binds all addresses and registers the metrics; or does none of it.
    pub async fn bind(
        config: &EdgeConfig,
        env: &dyn Environment,
        deps: EdgeDeps,
    ) -> Result<BoundEdge, BindError> {
        if let Some(problem) = config.problems().into_iter().next() {
            return Err(problem.into());
        }
        let routes = RouteTable::new(config);
        if routes.has_llm() && deps.llm.is_none() {
            return Err(BindError::NoLlm);
        }
        let tls = match &config.tls {
            Some(tls) => Some(TlsAcceptor::from(server_config(tls, env)?)),
            None => None,
        };
        let mut listeners = Vec::new();
        for address in &config.listen {
            listeners.push(listen(address).await?);
        }
        let addrs = listeners.iter().map(TcpListener::local_addr).collect::<io::Result<Vec<_>>>();
        let addrs =
            addrs.map_err(|source| BindError::Listen { address: config.listen.to_string(), source })?;
        let mut listeners: Vec<Listener> = listeners.into_iter().map(Listener::Tcp).collect();
        if let Some(path) = &config.uds {
            listeners.push(Listener::Unix(UnixSocket::bind(path).await?));
        }
        let metrics = Metrics::new(&deps.registry)?;
        let is_scraped = config.metrics == Switch::On;
        let http = is_scraped.then(|| HttpMetrics::new(&deps.registry)).transpose()?;
        // A family is there from the start, not from its first request.
        for label in routes.labels() {
            metrics.requests.with_label_values(&[label, "2xx"]);
        }
        let lock = Lock::new(&config.access_keys, env)
            .map_err(|(nth, source)| BindError::AccessKey { nth, source })?;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let shared = Arc::new(Shared {
            operator: deps.operator.clone().filter(|_| config.operator_api == Switch::On),
            lock,
            cors: Cors::new(&config.cors_origins),
            routes,
            limits: config.limits.clone(),
            llm: deps.llm,
            client: deps.client,
            health: deps.health,
            version: serde_json::json!({ "version": deps.version }).to_string().into(),
            metrics,
            http,
            scraped: is_scraped.then_some(deps.registry),
            recent: deps.recent,
            access_log: config.access_log == Switch::On,
            heartbeat: config.stream_heartbeat.map(|every| every.get()),
            dialect: config.errors.into(),
            // Half of the cores, as others compute meanwhile.
            renders: Arc::new(Semaphore::new((cores / 2).max(1))),
            draining: AtomicBool::new(false),
        });
        Ok(BoundEdge {
            listeners,
            addrs,
            tls,
            shared,
            operator: deps.operator,
            drain_delay: config.drain_delay.get(),
            drain_timeout: config.drain_timeout.get(),
        })
    }
}

impl BoundEdge {
    /// Requests to the LLM stack that are not yet answered in full.
    pub fn llm_in_flight(&self) -> impl Fn() -> u64 + Send + Sync + use<> {
        let gauge = self.shared.metrics.llm_in_flight.clone();
        move || u64::try_from(gauge.get()).unwrap_or(0)
    }

    /// The TCP addresses as bound: a configured port 0 has become a real one.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    /// Serves until `shutdown` resolves, then drains: `/health` says 503 at once, and for `drain-delay` that is all;
    /// then the listeners close, connections are told to close (`connection: close`, GOAWAY) and finish what is in
    /// flight, up to `drain-timeout`. What an engine here still generates then ends with the finish reason `abort`.
    ///
    /// Cancellation: dropping the future closes everything at once.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> DrainReport {
        let stop = Stop { drain: CancellationToken::new(), kill: CancellationToken::new() };
        // If this future is dropped, so are all connections.
        let _kill = stop.kill.clone().drop_guard();
        let connections = TaskTracker::new();
        let accepting = TaskTracker::new();
        let permits = Arc::new(Semaphore::new(self.shared.limits.max_connections));
        for listener in self.listeners {
            let (shared, tls, stop) = (self.shared.clone(), self.tls.clone(), stop.clone());
            let (connections, permits) = (connections.clone(), permits.clone());
            accepting.spawn(accept(listener, shared, tls, stop, connections, permits));
        }
        shutdown.await;
        let begun = Instant::now();
        self.shared.draining.store(true, Ordering::Release);
        // Whoever sends requests here learns of the stop by asking, or from somebody who does; until then a closed
        // port would be an error for his users.
        tokio::time::sleep(self.drain_delay).await;
        stop.drain.cancel();
        accepting.close();
        // Listeners are closed when this returns, and no connection is added any more.
        accepting.wait().await;
        connections.close();
        let open = connections.len();
        let in_time = tokio::time::timeout(self.drain_timeout, connections.wait()).await;
        if in_time.is_err()
            && let Some(operator) = &self.operator
        {
            let last_words = async {
                if operator.abort_all().await {
                    // Streams get their last frames.
                    connections.wait().await;
                }
            };
            // An engine whose step hangs takes no message: the drain ends all the same.
            let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
        }
        let cut = connections.len();
        if cut > 0 {
            tracing::warn!(cut, "connections were closed at the end of `edge.drain-timeout`");
            stop.kill.cancel();
            connections.wait().await;
        }
        DrainReport { open, cut, took: begun.elapsed() }
    }
}

async fn listen(address: &ListenAddr) -> Result<TcpListener, BindError> {
    let bound = match address.socket_addr() {
        Some(addr) => TcpListener::bind(addr).await,
        None => TcpListener::bind((address.host(), address.port())).await,
    };
    bound.map_err(|source| {
        let address = address.to_string();
        match source.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse { address },
            io::ErrorKind::PermissionDenied => BindError::Forbidden { address },
            _ => BindError::Listen { address, source },
        }
    })
}

/// Where clients connect.
enum Listener {
    Tcp(TcpListener),
    Unix(UnixSocket),
}

impl Listener {
    async fn accept(&self) -> io::Result<(Socket, SocketAddr)> {
        /// Who connects to a Unix socket is on this machine.
        const HERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
        match self {
            Self::Tcp(listener) => listener.accept().await.map(|(tcp, peer)| (Socket::Tcp(tcp), peer)),
            Self::Unix(socket) => socket.accept().await.map(|stream| (Socket::Unix(stream), HERE)),
        }
    }
}

async fn accept(
    listener: Listener,
    shared: Arc<Shared>,
    tls: Option<TlsAcceptor>,
    stop: Stop,
    connections: TaskTracker,
    permits: Arc<Semaphore>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.drain.cancelled() => return,
            () = stop.kill.cancelled() => return,
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            // The client was faster to leave than we to accept.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => {
                shared.metrics.refuse("accept-failed");
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = permits.clone().try_acquire_owned() else {
            shared.metrics.refuse("max-connections");
            continue;
        };
        let (shared, tls, stop) = (shared.clone(), tls.clone(), stop.clone());
        connections.spawn(async move {
            serve_connection(shared, socket, peer, tls, stop).await;
            drop(permit);
        });
    }
}
