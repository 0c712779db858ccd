//! The admin listener: metrics, health, readiness, the last requests with their waterfalls, and the models of this
//! process.
//!
//! On a port of its own, so that it can stay private while the edge is public. HTTP/1.1, JSON, no authentication:
//! whoever reaches it may read it, and load and unload models. A page in somebody's browser may not: what changes
//! anything must come as `application/json`, which no page can send here without being asked first.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_observe::{RecentRequests, Registry};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use forebay_edge::{OPERATOR_PATHS, Operator, OperatorAsk, operator_method};
use forebay_wire::error_row;

use crate::slots::{Slot, SlotError};

/// Scrapers and people: far more than both ever need.
const CONNECTIONS_MAX: usize = 128;
/// A client that sends no request is let go.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// What is read here, beside [`OPERATOR_PATHS`].
const PATHS: [&str; 11] = [
    "/metrics",
    "/health",
    "/ready",
    "/version",
    "/load",
    "/api/fleets",
    "/api/models",
    "/api/models/load",
    "/api/models/unload",
    "/api/requests",
    "/api/requests/{id}",
];
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
    /// The models of this process.
    pub slots: Vec<Arc<Slot>>,
    /// vLLM's endpoints for operators.
    pub operator: Arc<dyn Operator>,
    /// Requests to the LLM stack that are not yet answered in full.
    pub in_flight: Box<dyn Fn() -> u64 + Send + Sync>,
}

/// Bytes of a request's body: a model's name, or ids of requests, in JSON.
const BODY_BYTES_MAX: usize = 1024 * 1024;
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

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
                async move { Ok::<_, Infallible>(answer(request, &state).await) }
            });
            let mut http = hyper::server::conn::http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
            // A broken connection concerns nobody but the one who broke it.
            let _ = http.serve_connection(TokioIo::new(socket), service).await;
            drop(permit);
        });
    }
}

async fn answer(request: Request<Incoming>, state: &AdminState) -> Response<Full<Bytes>> {
    let change = match request.uri().path() {
        "/api/models/load" => Some(Change::Load),
        "/api/models/unload" => Some(Change::Unload),
        _ => None,
    };
    match (request.method(), change) {
        (&Method::POST, Some(change)) => match asked_model(request).await {
            Ok(model) => on_model(change, &model, state).await,
            Err((status, why)) => json(status, &serde_json::json!({"error": why})),
        },
        (_, None) if operator_method(request.uri().path()).is_some() => operate(request, state).await,
        (&(Method::GET | Method::HEAD), None) => read(&request, state),
        (_, Some(_)) => json(StatusCode::METHOD_NOT_ALLOWED, &serde_json::json!({"error": "only POST here"})),
        (_, None) => json(StatusCode::METHOD_NOT_ALLOWED, &serde_json::json!({"error": "only GET here"})),
    }
}

/// What to do with a model.
#[derive(Clone, Copy)]
enum Change {
    Load,
    Unload,
}

/// vLLM's endpoints for operators, with the errors of this listener.
async fn operate(request: Request<Incoming>, state: &AdminState) -> Response<Full<Bytes>> {
    const SHAPE: &str = "send it as application/json";
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let query = request.uri().query().map(str::to_owned);
    let body = match method {
        Method::GET => Ok(Bytes::new()),
        _ => json_body(request, SHAPE).await,
    };
    let body = match body {
        Ok(body) => body,
        Err((status, why)) => return json(status, &serde_json::json!({"error": why})),
    };
    match state.operator.answer(OperatorAsk { method, path, query, body }).await {
        Ok(Some(body)) => json(StatusCode::OK, &body),
        Ok(None) => json(StatusCode::OK, &serde_json::json!({})),
        Err(fault) => {
            let status = StatusCode::from_u16(error_row(fault.class.code).status).unwrap_or_default();
            json(status, &serde_json::json!({"error": fault.message}))
        }
    }
}

/// A body that no page in a browser can send here without asking.
async fn json_body(request: Request<Incoming>, shape: &str) -> Result<Bytes, (StatusCode, String)> {
    let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let is_json = content_type.is_some_and(|given| {
        given.split(';').next().is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"))
    });
    if !is_json {
        return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, shape.to_owned()));
    }
    let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect();
    match tokio::time::timeout(BODY_TIMEOUT, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(_)) => Err((StatusCode::BAD_REQUEST, shape.to_owned())),
        Err(_) => Err((StatusCode::REQUEST_TIMEOUT, "the body did not come".to_owned())),
    }
}

/// `{"model": NAME}`
async fn asked_model(request: Request<Incoming>) -> Result<String, (StatusCode, String)> {
    const SHAPE: &str = "send {\"model\": NAME} as application/json";
    let body = json_body(request, SHAPE).await?;
    let body: serde_json::Value = serde_json::from_slice(&body)
        .map_err(|error| (StatusCode::BAD_REQUEST, format!("{error}; {SHAPE}")))?;
    let model = body.get("model").and_then(serde_json::Value::as_str);
    model.map(str::to_owned).ok_or_else(|| (StatusCode::BAD_REQUEST, SHAPE.to_owned()))
}

/// Answers when it is done: an unload waits for the requests that run.
async fn on_model(change: Change, model: &str, state: &AdminState) -> Response<Full<Bytes>> {
    let Some(slot) = state.slots.iter().find(|slot| slot.model().as_str() == model) else {
        let known: Vec<&str> = state.slots.iter().map(|slot| slot.model().as_str()).collect();
        let body = serde_json::json!({"error": "no engine of this process has this model", "models": known});
        return json(StatusCode::NOT_FOUND, &body);
    };
    let task = {
        let slot = slot.clone();
        // Goes on where the caller does not wait for it.
        tokio::spawn(async move {
            match change {
                Change::Load => slot.try_load().await,
                Change::Unload => slot.try_unload().await,
            }
        })
    };
    match task.await {
        Ok(Ok(())) => json(StatusCode::OK, &serde_json::json!(slot.status())),
        Ok(Err(error @ SlotError::Busy { .. })) => {
            json(StatusCode::CONFLICT, &serde_json::json!({"error": error.to_string()}))
        }
        Ok(Err(error @ SlotError::Failed { .. })) => {
            json(StatusCode::UNPROCESSABLE_ENTITY, &serde_json::json!({"error": error.to_string()}))
        }
        Err(error) => {
            json(StatusCode::INTERNAL_SERVER_ERROR, &serde_json::json!({"error": error.to_string()}))
        }
    }
}

fn read(request: &Request<Incoming>, state: &AdminState) -> Response<Full<Bytes>> {
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
        "/load" => json(StatusCode::OK, &serde_json::json!({"server_load": (state.in_flight)()})),
        "/api/fleets" => json(StatusCode::OK, &(state.fleets)()),
        "/api/models" => {
            let models: Vec<_> = state.slots.iter().map(|slot| slot.status()).collect();
            json(StatusCode::OK, &serde_json::json!({"models": models}))
        }
        "/api/requests" => {
            let n = query(request.uri().query(), "n").unwrap_or(LISTED_DEFAULT);
            json(StatusCode::OK, &serde_json::json!({"requests": state.recent.last(n)}))
        }
        _ => match path.strip_prefix("/api/requests/").and_then(|id| state.recent.find(id)) {
            Some(record) => json(StatusCode::OK, &serde_json::json!(record)),
            None => {
                let operators = OPERATOR_PATHS.iter().map(|(path, _)| path);
                let paths: Vec<&str> = PATHS.iter().chain(operators).copied().collect();
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
