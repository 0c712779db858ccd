//! Request bodies: limits on size and time, whole for the LLM routes, in pieces for upstream routes.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use forebay_types::{Blame, Class, Classify, Code};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};

/// Bytes that are reserved ahead on the client's word about its body's length.
const RESERVE_BYTES_MAX: u64 = 1024 * 1024;
/// How much of a refused body is read, and for how long, so that the refusal arrives.
const LINGER_BYTES_MAX: usize = 4 * 1024 * 1024;
const LINGER: Duration = Duration::from_secs(2);

/// Why a request body could not be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("the request body is larger than {limit} bytes; the limit is `edge.limits.max-body`")]
    TooLarge { limit: u64 },
    #[error(
        "the request body did not arrive within {} s; the limit is `edge.limits.body-timeout`",
        after.as_secs_f64()
    )]
    TooSlow { after: Duration },
    /// Bad chunks, or the client left.
    #[error("the request body is not valid, or broke off")]
    Broken,
}

impl Classify for BodyError {
    fn class(&self) -> Class {
        let code = match self {
            Self::TooLarge { .. } => Code::BodyTooLarge,
            Self::TooSlow { .. } => Code::RequestTimeout,
            Self::Broken => Code::BadRequest,
        };
        Class::new(code, Blame::Client)
    }
}

impl BodyError {
    /// The metric's label.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge { .. } => "max-body",
            Self::TooSlow { .. } => "body-timeout",
            Self::Broken => "body-invalid",
        }
    }
}

/// The whole body. `timeout` is for all of it. A body of one piece is not copied.
pub(crate) async fn collect(
    body: &mut Incoming,
    bytes_max: u64,
    timeout: Duration,
) -> Result<Bytes, BodyError> {
    let too_large = || BodyError::TooLarge { limit: bytes_max };
    let announced = body.size_hint().exact();
    // Before the first byte is read, so also before `100 Continue` is sent.
    if announced.is_some_and(|length| length > bytes_max) {
        return Err(too_large());
    }
    let whole = async {
        let (mut first, mut rest) = (Bytes::new(), BytesMut::new());
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|_| BodyError::Broken)?.into_data() else { continue };
            if (first.len() + rest.len() + data.len()) as u64 > bytes_max {
                return Err(too_large());
            }
            if first.is_empty() && rest.is_empty() {
                first = data;
                continue;
            }
            if rest.is_empty() {
                rest.reserve(announced.unwrap_or(0).min(RESERVE_BYTES_MAX) as usize);
            }
            rest.extend_from_slice(&std::mem::take(&mut first));
            rest.extend_from_slice(&data);
        }
        Ok(if rest.is_empty() { first } else { rest.freeze() })
    };
    tokio::time::timeout(timeout, whole).await.unwrap_or(Err(BodyError::TooSlow { after: timeout }))
}

/// Reads on for a moment after a refusal.
///
/// A socket that is closed with unread bytes is reset, and a reset may overtake the refusal on its way to the client.
/// A client that waits for `100 Continue` sends nothing, and must not be told to.
pub(crate) fn linger(mut body: Incoming, headers: &HeaderMap) {
    if body.is_end_stream() || headers.contains_key(http::header::EXPECT) {
        return;
    }
    tokio::spawn(async move {
        let read = async {
            let mut left = LINGER_BYTES_MAX;
            while let Some(Ok(frame)) = body.frame().await {
                let length = frame.data_ref().map_or(0, Bytes::len);
                match left.checked_sub(length) {
                    Some(less) => left = less,
                    None => return,
                }
            }
        };
        // Whatever is left after that is the client's problem.
        let _ = tokio::time::timeout(LINGER, read).await;
    });
}

/// What an upstream route needs to know of a request body on its way.
#[derive(Debug)]
struct Progress {
    error: Option<BodyError>,
    moved: Instant,
    bytes: u64,
}

/// Shared view on a [`Passing`] body.
#[derive(Clone)]
pub(crate) struct Watch(Arc<Mutex<Progress>>);

impl Watch {
    #[cfg(test)]
    pub(crate) fn idle() -> Self {
        Self(Arc::new(Mutex::new(Progress { error: None, moved: Instant::now(), bytes: 0 })))
    }

    pub(crate) fn error(&self) -> Option<BodyError> {
        self.0.lock().error.clone()
    }

    /// When the last piece passed.
    pub(crate) fn moved(&self) -> Instant {
        self.0.lock().moved
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.0.lock().bytes
    }
}

/// A request body passed on as it comes, within the limits. `pause_max` is for each pause.
pub(crate) struct Passing {
    body: Incoming,
    bytes_max: u64,
    pause_max: Duration,
    timer: Pin<Box<Sleep>>,
    watch: Watch,
}

impl Passing {
    pub(crate) fn new(body: Incoming, bytes_max: u64, pause_max: Duration) -> (Self, Watch) {
        let now = Instant::now();
        let watch = Watch(Arc::new(Mutex::new(Progress { error: None, moved: now, bytes: 0 })));
        let timer = Box::pin(tokio::time::sleep(pause_max));
        (Self { body, bytes_max, pause_max, timer, watch: watch.clone() }, watch)
    }

    fn fail(&self, error: BodyError) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.watch.0.lock().error = Some(error.clone());
        Poll::Ready(Some(Err(error)))
    }
}

impl Body for Passing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                let (now, pause_max) = (Instant::now(), self.pause_max);
                self.timer.as_mut().reset(now + pause_max);
                let passed = {
                    let mut progress = self.watch.0.lock();
                    progress.moved = now;
                    progress.bytes += frame.data_ref().map_or(0, Bytes::len) as u64;
                    progress.bytes
                };
                if passed > self.bytes_max {
                    return self.fail(BodyError::TooLarge { limit: self.bytes_max });
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(_))) => self.fail(BodyError::Broken),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => match self.timer.as_mut().poll(cx) {
                Poll::Ready(()) => self.fail(BodyError::TooSlow { after: self.pause_max }),
                Poll::Pending => Poll::Pending,
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
