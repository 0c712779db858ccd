//! One request: guard, route, answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use forebay_observe::{RecentRequests, Registry};
use forebay_types::{Blame, Class, Code, Fault};
use forebay_upstream::HttpClient;
use forebay_wire::Dialect;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header};
use hyper::body::Incoming;
use tokio::sync::Semaphore;

use crate::access::Ticket;
use crate::answer::{self, AnswerBody, Content};
use crate::config::EdgeLimits;
use crate::connection::{ConnState, InFlight};
use crate::cors::Cors;
use crate::guard::{self, Refusal};
use crate::http_metrics::{self, HttpMetrics};
use crate::llm::LlmStage;
use crate::lock::{self, Lock};
use crate::metrics::{Counted, Metrics};
use crate::operator::{self, Operator};
use crate::route::{RouteTable, Target, llm_path};
use crate::{body, llm, relay};

/// Whether the stack can serve, as `/health` says it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Health {
    pub ready: bool,
    /// What is missing, for people. Never a secret or an address.
    pub reasons: Vec<String>,
}

impl Health {
    pub fn ready() -> Self {
        Self { ready: true, reasons: Vec::new() }
    }

    pub fn not_ready(reason: impl Into<String>) -> Self {
        Self { ready: false, reasons: vec![reason.into()] }
    }
}

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) routes: RouteTable,
    pub(crate) limits: EdgeLimits,
    pub(crate) llm: Option<LlmStage>,
    /// Where its paths are answered on LLM routes.
    pub(crate) operator: Option<Arc<dyn Operator>>,
    pub(crate) lock: Lock,
    pub(crate) cors: Cors,
    pub(crate) client: HttpClient,
    pub(crate) health: Arc<dyn Fn() -> Health + Send + Sync>,
    /// The body of `/version`.
    pub(crate) version: Bytes,
    pub(crate) metrics: Metrics,
    /// Where `/metrics` is answered here.
    pub(crate) http: Option<HttpMetrics>,
    /// The body of `/metrics`, where it is answered here.
    pub(crate) scraped: Option<Registry>,
    pub(crate) recent: RecentRequests,
    pub(crate) access_log: bool,
    pub(crate) heartbeat: Option<Duration>,
    /// Of errors.
    pub(crate) dialect: Dialect,
    /// How many long answers are rendered at a time, off the I/O threads.
    pub(crate) renders: Arc<Semaphore>,
    pub(crate) draining: AtomicBool,
}

/// Answers one request; never fails.
///
/// Cancellation: guarded. hyper drops the future when the client leaves.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    connection: Arc<ConnState>,
    request: Request<Incoming>,
) -> Response<AnswerBody> {
    let (parts, incoming) = request.into_parts();
    let in_flight = InFlight::new(&connection);
    let mut ticket = Ticket::new(&shared, &parts, connection.peer, in_flight);
    let verdict = match parts.version < Version::HTTP_2 {
        true => connection.next_verdict(),
        false => guard::check_size(&parts.headers, &shared.limits),
    };
    let host = match verdict.and_then(|()| guard::check_head(&parts)) {
        Ok(host) => host,
        Err(refusal) => return refuse(&shared, refusal, &parts, incoming, ticket),
    };
    let answer = match shared.routes.find(&host, parts.uri.path()) {
        None => {
            body::linger(incoming, &parts.headers);
            no_route(&shared, &parts)
        }
        Some(route) => {
            ticket.route.clone_from(&route.label);
            match (&route.target, &shared.llm) {
                (Target::Llm { mount, v1_optional }, Some(stage)) => {
                    let path = llm_path(mount, *v1_optional, parts.uri.path());
                    llm_route(&shared, stage, parts, incoming, path, &mut ticket).await
                }
                (Target::Upstream(target), _) => {
                    let secure = connection.secure;
                    relay::answer(&shared, target, parts, incoming, secure, &ticket).await
                }
                // `bind` refuses a configuration with an LLM route and no stack.
                (Target::Llm { .. }, None) => no_route(&shared, &parts),
            }
        }
    };
    answer::finish(answer, ticket)
}

/// A request on an LLM route: who may ask, what is answered here, and the stack for the rest.
async fn llm_route(
    shared: &Arc<Shared>,
    stage: &LlmStage,
    parts: http::request::Parts,
    incoming: Incoming,
    path: String,
    ticket: &mut Ticket,
) -> Response<Content> {
    let asked = parts.headers.clone();
    if shared.http.is_some() {
        ticket.handler = http_metrics::handler(&path, |path| operator::has(shared, path));
    }
    // Before the lock: a browser sends no key with it.
    let mut answer = if let Some(answer) = shared.cors.preflight(&parts.method, &parts.headers) {
        answer
    } else if (shared.lock.guards(&path) || operator::needs_key(shared, &parts.method, &path))
        && !shared.lock.opens(&parts.headers)
    {
        body::linger(incoming, &parts.headers);
        let mut answer = answer::json(StatusCode::UNAUTHORIZED, lock::UNAUTHORIZED);
        answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        llm::close(&parts, &mut answer);
        answer
    } else if let Some(answer) = own_answer(shared, &parts.method, &path) {
        answer
    } else {
        match operator::answer(shared, &parts, incoming, &path).await {
            Ok(answer) => answer,
            Err(incoming) => {
                ticket.llm = Some(Counted::new(&shared.metrics.llm_in_flight));
                let mut answer = llm::answer(shared, stage, parts, incoming, path, ticket).await;
                operator::tell_load(shared, &asked, answer.headers_mut());
                answer
            }
        }
    };
    shared.cors.mark(&asked, answer.headers_mut());
    answer
}

fn refuse(
    shared: &Shared,
    refusal: Refusal,
    parts: &http::request::Parts,
    incoming: Incoming,
    ticket: Ticket,
) -> Response<AnswerBody> {
    shared.metrics.refuse(refusal.reason());
    body::linger(incoming, &parts.headers);
    let mut answer = answer::fault(&refusal.into(), shared.dialect);
    // Whatever follows on this connection may not be what it seems.
    llm::close(parts, &mut answer);
    answer::finish(answer, ticket)
}

fn no_route(shared: &Shared, parts: &http::request::Parts) -> Response<Content> {
    let message = format!("no route for {} {}", parts.method, parts.uri.path());
    answer::fault(&Fault::new(Class::new(Code::RouteNotFound, Blame::Client), message), shared.dialect)
}

/// `/health`, `/ping`, `/version` and, where it is configured, `/metrics`: what the edge answers itself on LLM routes.
///
/// `/ping` is `/health` under the name that SageMaker asks for; like vLLM's it also takes POST.
fn own_answer(shared: &Shared, method: &Method, path: &str) -> Option<Response<Content>> {
    let scraped = shared.scraped.as_ref().filter(|_| path == "/metrics");
    if !matches!(path, "/health" | "/ping" | "/version") && scraped.is_none() {
        return None;
    }
    let posted = *method == Method::POST && path == "/ping";
    if !posted && !matches!(*method, Method::GET | Method::HEAD) {
        let class = Class::new(Code::MethodNotAllowed, Blame::Client);
        let allow = if path == "/ping" { "GET, HEAD, POST" } else { "GET, HEAD" };
        let message = format!("{path} is for {allow}, not for {method}");
        return Some(answer::fault(&Fault::new(class, message).header("allow", allow), shared.dialect));
    }
    if let Some(registry) = scraped {
        let mut answer = answer::json(StatusCode::OK, registry.render());
        let text = HeaderValue::from_static(Registry::CONTENT_TYPE);
        answer.headers_mut().insert(header::CONTENT_TYPE, text);
        return Some(answer);
    }
    if path == "/version" {
        return Some(answer::json(StatusCode::OK, shared.version.clone()));
    }
    let health = if shared.draining.load(Ordering::Acquire) {
        Health::not_ready("draining")
    } else {
        (shared.health)()
    };
    let status = if health.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let word = if health.ready { "ok" } else { "unavailable" };
    let body = serde_json::json!({ "status": word, "reasons": health.reasons }).to_string();
    let mut answer = answer::json(status, body);
    answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Some(answer)
}
