//! The admin listener: metrics, health, readiness, and the last requests with their waterfalls.
//!
//! On a port of its own, so that it can stay private while the edge is public. HTTP/1.1, JSON, no authentication:
//! whoever reaches it may read it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_observe::{RecentRequests, Registry};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

/// Scrapers and people: far more than both ever need.
const CONNECTIONS_MAX: usize = 128;
/// A client that sends no request is let go.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests listed by `/api/requests` where the caller doesn't say.
const LISTED_DEFAULT: usize = 20;

/// What the admin API reads.
pub struct AdminState {
    pub registry: Registry,
    pub recent: RecentRequests,
    pub version: &'static str,
    /// `Ok` where traffic is welcome, else why not.
    pub ready: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// Fleets and replicas, as JSON.
    pub fleets: Box<dyn Fn() -> serde_json::Value + Send + Sync>,
}

/// Serves until `stop` turns true. Cancellation: dropping the future closes the listener and every connection.
pub async fn serve(listener: TcpListener, state: Arc<AdminState>, mut stop: watch::Receiver<bool>) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut open = tokio::task::JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return,
            Some(_) = open.join_next() => continue,
        };
        let Ok((socket, _)) = accepted else {
            // Out of file descriptors: wait for some to be closed rather than spin.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(permit) = connections.clone().try_acquire_owned() else { continue };
        let state = state.clone();
        open.spawn(async move {
            let service = service_fn(move |request| {
                let state = state.clone();
                async move { Ok::<_, Infallible>(answer(&request, &state)) }
            });
            let mut http = hyper::server::conn::http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
            // A broken connection concerns nobody but the one who broke it.
            let _ = http.serve_connection(TokioIo::new(socket), service).await;
            drop(permit);
        });
    }
}

fn answer(request: &Request<Incoming>, state: &AdminState) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return json(StatusCode::METHOD_NOT_ALLOWED, &serde_json::json!({"error": "only GET here"}));
    }
    let path = request.uri().path();
    match path {
        "/metrics" => typed(StatusCode::OK, Registry::CONTENT_TYPE, state.registry.render()),
        // Alive: the process answers. Whether it should get traffic is /ready.
        "/health" => json(StatusCode::OK, &serde_json::json!({"status": "ok"})),
        "/ready" => match (state.ready)() {
            Ok(()) => json(StatusCode::OK, &serde_json::json!({"status": "ready"})),
            Err(why) => {
                json(StatusCode::SERVICE_UNAVAILABLE, &serde_json::json!({"status": "not ready", "why": why}))
            }
        },
        "/version" => json(StatusCode::OK, &serde_json::json!({"version": state.version})),
        "/api/fleets" => json(StatusCode::OK, &(state.fleets)()),
        "/api/requests" => {
            let n = query(request.uri().query(), "n").unwrap_or(LISTED_DEFAULT);
            json(StatusCode::OK, &serde_json::json!({"requests": state.recent.last(n)}))
        }
        _ => match path.strip_prefix("/api/requests/").and_then(|id| state.recent.find(id)) {
            Some(record) => json(StatusCode::OK, &serde_json::json!(record)),
            None => {
                let paths = [
                    "/metrics",
                    "/health",
                    "/ready",
                    "/version",
                    "/api/fleets",
                    "/api/requests",
                    "/api/requests/{id}",
                ];
                let body = serde_json::json!({"error": "no such path or request", "paths": paths});
                json(StatusCode::NOT_FOUND, &body)
            }
        },
    }
}

fn query(query: Option<&str>, key: &str) -> Option<usize> {
    let pairs = query?.split('&').filter_map(|pair| pair.split_once('='));
    pairs.filter(|(name, _)| *name == key).find_map(|(_, value)| value.parse().ok())
}

fn json(status: StatusCode, body: &serde_json::Value) -> Response<Full<Bytes>> {
    typed(status, "application/json", body.to_string())
}

fn typed(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}
