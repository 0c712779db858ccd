//! An upstream route: the request to an HTTP server and its answer back, both streamed.
//!
//! Framing is made anew on each side, hop-by-hop headers end here, and what a client says about where it comes from
//! (`x-forwarded-*`) is replaced by what the edge knows.

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use forebay_observe::Layer;
use forebay_types::{Classify, Fault};
use forebay_upstream::{RequestBody, ResponseBody, UpstreamError};
use http::header::{self, HeaderMap, HeaderName};
use http::request::Parts;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};

use crate::access::{TRACEPARENT, Ticket, X_REQUEST_ID};
use crate::answer::{self, BoxError, Content, log_fault};
use crate::body::{self, BodyError, Passing, Watch};
use crate::llm::close;
use crate::route::{UpstreamTarget, without_mount};
use crate::service::Shared;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// Headers that are about one connection (RFC 9110, 7.6.1), and framing.
const HOP_BY_HOP: [HeaderName; 10] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("http2-settings"),
];

/// Passes one request on.
///
/// Cancellation: guarded. Dropping the future or the answer's body closes the upstream connection.
pub(crate) async fn answer(
    shared: &Arc<Shared>,
    target: &UpstreamTarget,
    parts: Parts,
    incoming: Incoming,
    secure: bool,
    ticket: &Ticket,
) -> Response<Content> {
    let limits = &shared.limits;
    let bytes_max = limits.max_body.bytes();
    if incoming.size_hint().exact().is_some_and(|length| length > bytes_max) {
        let error = BodyError::TooLarge { limit: bytes_max };
        body::linger(incoming, &parts.headers);
        return refuse_body(shared, error, &parts);
    }
    let begun = std::time::Instant::now();
    let (passing, watch) = Passing::new(incoming, bytes_max, limits.body_timeout.get());
    let request = match upstream_request(target, &parts, passing, secure, ticket) {
        Ok(request) => request,
        Err(fault) => return refuse(shared, &fault, ticket),
    };
    let sent = within(shared.client.send(request), &watch, target).await;
    shared.metrics.received_bytes.inc_by(watch.bytes());
    // What broke the request is looked for at the client first: then it is not the upstream's fault.
    if let Some(error) = watch.error() {
        return refuse_body(shared, error, &parts);
    }
    let response = match sent {
        Ok(response) => response,
        Err(error) => {
            let fault = Fault::new(error.class(), error.to_string()).detail(error.detail());
            return refuse(shared, &fault, ticket);
        }
    };
    ticket.trace.note(Layer::Edge, "upstream", begun, format!("{}", response.status().as_u16()));
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let source = "101 to a request that asked for no upgrade".into();
        let error = UpstreamError::Protocol { authority: target.authority.clone(), source };
        let fault = Fault::new(error.class(), error.to_string()).detail(error.detail());
        return refuse(shared, &fault, ticket);
    }
    let (mut head, body) = response.into_parts();
    remove_hop_by_hop(&mut head.headers);
    let relay = RelayBody {
        body: Some(body),
        authority: target.authority.clone(),
        watch,
        silence_max: target.timeout,
        timer: Box::pin(tokio::time::sleep(target.timeout)),
    };
    let mut answer = Response::new(Content::Relay(Box::new(relay)));
    *answer.status_mut() = head.status;
    *answer.headers_mut() = head.headers;
    answer
}

/// Waits for the answer's head. The limit is on silence: while the request's body moves, the upstream is not late.
async fn within(
    send: impl Future<Output = Result<Response<ResponseBody>, UpstreamError>>,
    watch: &Watch,
    target: &UpstreamTarget,
) -> Result<Response<ResponseBody>, UpstreamError> {
    let mut send = std::pin::pin!(send);
    let silence_max = target.timeout;
    loop {
        let deadline = watch.moved() + silence_max;
        if let Ok(sent) = tokio::time::timeout_at(deadline, send.as_mut()).await {
            return sent;
        }
        if watch.moved() + silence_max <= Instant::now() {
            let authority = target.authority.clone();
            return Err(UpstreamError::FirstByteTimeout { authority, after: silence_max });
        }
    }
}

fn refuse_body(shared: &Shared, error: BodyError, parts: &Parts) -> Response<Content> {
    shared.metrics.refuse(error.reason());
    let mut answer = answer::fault(&error.into(), shared.dialect);
    close(parts, &mut answer);
    answer
}

fn refuse(shared: &Shared, fault: &Fault, ticket: &Ticket) -> Response<Content> {
    log_fault(fault, &ticket.id);
    answer::fault(fault, shared.dialect)
}

fn upstream_request(
    target: &UpstreamTarget,
    parts: &Parts,
    body: Passing,
    secure: bool,
    ticket: &Ticket,
) -> Result<Request<RequestBody>, Fault> {
    let path = without_mount(&target.strip, parts.uri.path());
    let uri = match parts.uri.query() {
        Some(query) => format!("{}{path}?{query}", target.base),
        None => format!("{}{path}", target.base),
    };
    let uri: http::Uri = uri.parse().map_err(|_| Fault::bad_request("the path can't be passed on"))?;
    let mut headers = parts.headers.clone();
    remove_hop_by_hop(&mut headers);
    let host = headers.remove(header::HOST);
    let host = host.or_else(|| HeaderValue::from_str(parts.uri.authority()?.as_str()).ok());
    headers.remove(header::FORWARDED);
    headers.remove(header::EXPECT);
    headers.insert(X_FORWARDED_FOR, peer_value(ticket.peer.ip()));
    headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(if secure { "https" } else { "http" }));
    match host {
        Some(host) => headers.insert(X_FORWARDED_HOST, host),
        None => headers.remove(X_FORWARDED_HOST),
    };
    if let Ok(id) = HeaderValue::from_str(ticket.id.as_str()) {
        headers.insert(X_REQUEST_ID, id);
    }
    if let Ok(trace) = HeaderValue::from_str(&ticket.trace.context().header()) {
        headers.insert(TRACEPARENT, trace);
    }
    let mut request = Request::new(body.map_err(BoxError::from).boxed_unsync());
    *request.method_mut() = parts.method.clone();
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    Ok(request)
}

fn peer_value(ip: IpAddr) -> HeaderValue {
    // A dual-stack socket shows IPv4 clients as `::ffff:1.2.3.4`.
    HeaderValue::from_str(&ip.to_canonical().to_string()).expect("an address is ASCII")
}

/// Takes off what belongs to the connection it came over, also what `connection` names. `content-length` goes too:
/// hyper writes it from the body.
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// The upstream's answer on its way to the client.
pub(crate) struct RelayBody {
    /// `None` after an error: the connection is closed at once.
    body: Option<ResponseBody>,
    /// Of the upstream, for the log.
    authority: String,
    /// Of the request's body: a client that still uploads keeps the answer alive.
    watch: Watch,
    silence_max: Duration,
    timer: Pin<Box<Sleep>>,
}

impl Body for RelayBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        match Pin::new(body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.timer.as_mut().reset(Instant::now() + this.silence_max);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.body = None;
                tracing::debug!(detail = error.detail(), "an upstream's answer broke off");
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => loop {
                if this.timer.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                let deadline = this.watch.moved() + this.silence_max;
                if deadline <= Instant::now() {
                    this.body = None;
                    let after = this.silence_max;
                    let authority = std::mem::take(&mut this.authority);
                    let error = UpstreamError::IdleTimeout { authority, after };
                    tracing::debug!(detail = error.detail(), "an upstream's answer broke off");
                    return Poll::Ready(Some(Err(error.into())));
                }
                this.timer.as_mut().reset(deadline);
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hop_by_hop_headers_end_here() {
        let mut headers: HeaderMap = [
            ("connection", "close, X-Secret"),
            ("x-secret", "1"),
            ("keep-alive", "5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("accept", "*/*"),
        ]
        .into_iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
        .collect();
        remove_hop_by_hop(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["accept"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_upstream_is_named_in_the_log_only() {
        let target = UpstreamTarget {
            base: "http://127.0.0.1:9000/base".into(),
            authority: "127.0.0.1:9000".into(),
            strip: String::new(),
            timeout: Duration::from_secs(1),
        };
        let error = within(std::future::pending(), &Watch::idle(), &target).await.unwrap_err();
        assert_eq!(error.detail(), "127.0.0.1:9000: the upstream did not answer within 1000 ms");
        assert_eq!(error.to_string(), "the upstream did not answer within 1000 ms");
    }
}
