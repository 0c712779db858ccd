//! From an HTTP answer to a [`Reply`]: SSE frame by frame, or one JSON body.

use std::time::Duration;

use bytes::Bytes;
use forebay_flow::{ChunkStream, Reply, ReplyForm};
use forebay_types::{Blame, Class, Classify, Code, Fault, Retry};
use forebay_wire::{Chunk, FrameInfo, FrameUsage, Relabel, SseSplitter, parse_error, scan_body, scan_frame};
use http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;

use crate::client::collect;
use crate::fault::{MESSAGE_CHARS_MAX, refused};
use crate::pool::ResponseBody;
use crate::upstream::{CallInfo, StreamUsage, Timeouts};
use crate::{UpstreamError, UpstreamFault};

/// Largest JSON answer of a generation. 128 choices of 8,000 tokens with 20 log-probabilities each stay below it.
const JSON_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Largest error body that is read; what is longer is an HTML page.
const ERROR_BYTES_MAX: usize = 64 * 1024;
const ERROR_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a finished stream may take to end on the wire before its connection is given up.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The body of a refusal, as far as it can be had.
pub(crate) async fn read_error(body: ResponseBody, authority: &str) -> Bytes {
    match tokio::time::timeout(ERROR_TIMEOUT, collect(body, ERROR_BYTES_MAX, authority)).await {
        Ok(Ok(body)) => body,
        Ok(Err(_)) | Err(_) => Bytes::new(),
    }
}

/// Waits for the first event and turns the answer into a reply. The time limit of the first event is the caller's.
pub(crate) async fn into_reply(
    headers: &HeaderMap,
    body: ResponseBody,
    call: CallInfo,
    timeouts: Timeouts,
    authority: &str,
) -> Result<Reply, UpstreamFault> {
    let relabel = Relabel::new(call.model.as_str());
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    if !kind.trim_start().to_ascii_lowercase().starts_with("text/event-stream") {
        // Also where a stream was asked for: some servers answer a short or cached one with plain JSON.
        let body = collect_json(body, timeouts.between_chunks, authority).await?;
        let usage = scan_body(&body);
        let chunk = Chunk::Verbatim { bytes: relabel.body(body), usage, deltas: 0 };
        return Ok(Reply::new(ReplyForm::Json, Box::pin(futures_util::stream::iter([Ok(chunk)]))));
    }
    if !call.stream {
        let source = "an event stream where JSON was asked for".into();
        return Err(UpstreamError::Protocol { authority: authority.to_owned(), source }.into());
    }
    let mut frames = Frames {
        body: Some(body),
        over: false,
        splitter: SseSplitter::new(),
        between_chunks: timeouts.between_chunks,
        relabel,
        usage: call.usage,
        unseen_usage: None,
        authority: authority.to_owned(),
    };
    // Comments before the first event (`: ping`) don't commit us to this upstream, and are dropped.
    let first = loop {
        match frames.next().await? {
            Some((frame, _)) if frame.starts_with(b":") => {}
            Some((frame, info)) if info.error => {
                let body = data_of(&frame);
                let status = StatusCode::INTERNAL_SERVER_ERROR;
                return Err(refused(error_status(body).unwrap_or(status), headers, body, authority));
            }
            Some(first) => break first,
            None => return Err(frames.cut().into()),
        }
    };
    Ok(Reply::new(ReplyForm::Sse, frames.into_chunks(first)))
}

async fn collect_json(
    body: ResponseBody,
    between_chunks: Duration,
    authority: &str,
) -> Result<Bytes, UpstreamError> {
    match tokio::time::timeout(between_chunks, collect(body, JSON_BYTES_MAX, authority)).await {
        Ok(body) => body,
        Err(_) => Err(UpstreamError::IdleTimeout { authority: authority.to_owned(), after: between_chunks }),
    }
}

struct Frames {
    /// `None` once it has ended or failed.
    body: Option<ResponseBody>,
    /// `[DONE]` or an error was passed on: nothing follows.
    over: bool,
    splitter: SseSplitter,
    between_chunks: Duration,
    relabel: Relabel,
    usage: StreamUsage,
    /// The last frame whose usage was hidden from a client that is to see it at the end.
    unseen_usage: Option<Bytes>,
    authority: String,
}

impl Frames {
    /// The next whole frame; `None` at the end of the body. A last frame without its blank line counts: some servers
    /// end with a bare `data: [DONE]`.
    async fn next(&mut self) -> Result<Option<(Bytes, FrameInfo)>, UpstreamError> {
        loop {
            let authority = || self.authority.clone();
            let frame = self.splitter.next_frame();
            let frame = frame
                .map_err(|error| UpstreamError::Protocol { authority: authority(), source: error.into() })?;
            if let Some(frame) = frame {
                let info = scan_frame(&frame);
                return Ok(Some((frame, info)));
            }
            let Some(body) = &mut self.body else { return Ok(None) };
            match tokio::time::timeout(self.between_chunks, body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.splitter.push(data);
                    }
                }
                Ok(Some(Err(error))) => return Err(error),
                Ok(None) => {
                    self.body = None;
                    let Some(rest) = std::mem::take(&mut self.splitter).finish() else { return Ok(None) };
                    self.splitter.push([&rest, b"\n\n".as_slice()].concat().into());
                }
                Err(_) => {
                    return Err(UpstreamError::IdleTimeout {
                        authority: authority(),
                        after: self.between_chunks,
                    });
                }
            }
        }
    }

    fn cut(&self) -> UpstreamError {
        let source = "the event stream ended before `[DONE]`".into();
        UpstreamError::Reset { authority: self.authority.clone(), unsent: false, source }
    }

    fn into_chunks(self, first: (Bytes, FrameInfo)) -> ChunkStream {
        Box::pin(futures_util::stream::unfold((self, Some(first)), |(mut frames, first)| async move {
            let next = match first {
                Some(first) => Ok(Some(first)),
                None if frames.over => return None,
                None => frames.next().await,
            };
            let mut later = None;
            let item = match next {
                Ok(Some((frame, info))) if info.error => Err(frames.broke(&frame)),
                Ok(Some((frame, info))) => {
                    if info.done {
                        frames.drain();
                    }
                    match frames.unseen_usage.take_if(|_| info.done) {
                        // A server that counts as it goes, but has no frame for the sum.
                        Some(last) => {
                            later = Some((frame, info));
                            let bytes = frames.relabel.usage_frame(&last);
                            Ok(Chunk::Verbatim { bytes, usage: None, deltas: 0 })
                        }
                        None => Ok(frames.chunk(frame, info)),
                    }
                }
                Ok(None) => Err(broken(&frames.cut())),
                Err(error) => Err(broken(&error)),
            };
            if item.is_err() {
                frames.over = true;
                frames.body = None;
            }
            Some((item, (frames, later)))
        }))
    }

    fn chunk(&mut self, frame: Bytes, info: FrameInfo) -> Chunk {
        let shown = match self.usage {
            StreamUsage::Verbatim => Some(FrameUsage::Keep),
            StreamUsage::Hidden if info.usage_only => None,
            StreamUsage::Hidden => Some(FrameUsage::Remove),
            StreamUsage::AtTheEnd if info.usage_only => {
                self.unseen_usage = None;
                Some(FrameUsage::Keep)
            }
            StreamUsage::AtTheEnd => {
                if info.usage.is_some() {
                    self.unseen_usage = Some(frame.clone());
                }
                Some(FrameUsage::Null)
            }
        };
        let bytes = shown.map(|usage| self.relabel.frame(frame, usage)).unwrap_or_default();
        Chunk::Verbatim { bytes, usage: info.usage, deltas: info.deltas }
    }

    /// An error event in the middle: the client gets ours in its place.
    fn broke(&self, frame: &[u8]) -> Fault {
        let said = parse_error(data_of(frame)).map(|error| error.message).unwrap_or_default();
        let said: String = said.chars().take(MESSAGE_CHARS_MAX).collect();
        Fault::new(
            Class::new(Code::UpstreamFailed, Blame::Upstream),
            "the upstream failed in the middle of its answer",
        )
        .detail(format!("{}: error event: {said}", self.authority))
    }

    /// After `[DONE]` only the end of the body is left. Reading it gives the connection back to the pool; the client
    /// must not wait for it.
    fn drain(&mut self) {
        self.over = true;
        let Some(mut body) = self.body.take() else { return };
        tokio::spawn(async move {
            let end = async { while let Some(Ok(_)) = body.frame().await {} };
            // Late or not, the connection is then either in the pool or closed by the drop.
            let _ = tokio::time::timeout(DRAIN_TIMEOUT, end).await;
        });
    }
}

/// A failure after the first event: whatever the cause, the answer can't be started again elsewhere.
fn broken(error: &UpstreamError) -> Fault {
    let class = error.class().retry(Retry::Never);
    Fault::new(class, error.to_string()).detail(error.detail())
}

/// The data lines of a frame, where there is only one (all LLM servers): without `data:`.
fn data_of(frame: &[u8]) -> &[u8] {
    let line = frame.strip_prefix(b"data:").unwrap_or(frame);
    line.trim_ascii()
}

/// The status that an error event carries in `error.code` as a number (vLLM).
fn error_status(body: &[u8]) -> Option<StatusCode> {
    let code: u16 = parse_error(body)?.code?.parse().ok()?;
    StatusCode::from_u16(code).ok().filter(|s| s.is_client_error() || s.is_server_error())
}
