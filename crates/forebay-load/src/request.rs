//! One request: sent, read to its end, timed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forebay_types::Usage;
use forebay_upstream::{ResponseBody, UpstreamError};
use forebay_wire::{SseSplitter, scan_body, scan_frame};
use http::Response;
use http_body_util::BodyExt;
use tokio::time::Instant;

use crate::error::{Failure, FailureKind};
use crate::target::{ANSWER_BYTES_MAX, Target};

/// Gaps that are kept of one reply; later ones still count as tokens.
const GAPS_MAX: usize = 1 << 18;

/// What one good request took.
#[derive(Debug, Clone, Default)]
pub(crate) struct Timing {
    /// To the first piece of output; streams only.
    pub(crate) ttft: Option<Duration>,
    /// Between pieces of output. A server that sends several tokens in one frame has fewer and longer gaps.
    pub(crate) gaps: Vec<Duration>,
    /// From the first piece of output to the last.
    pub(crate) decode: Duration,
    pub(crate) e2e: Duration,
    pub(crate) usage: Option<Usage>,
    /// The request was sent a second time, see [`send`].
    pub(crate) reconnected: bool,
    /// Frames with output, which stand for tokens where there is no usage.
    pub(crate) pieces: u32,
}

impl Timing {
    pub(crate) fn output_tokens(&self) -> u32 {
        self.usage.map_or(self.pieces, |usage| usage.completion_tokens)
    }

    /// Time per output token after the first; needs two.
    pub(crate) fn tpot(&self) -> Option<Duration> {
        let steps = self.output_tokens().checked_sub(1).filter(|steps| *steps > 0)?;
        self.ttft.map(|_| self.decode / steps)
    }
}

/// Sends `body` and reads the reply to its end, within `timeout`. `live_tokens` counts pieces as they come.
///
/// Cancellation: guarded; dropping the future closes the connection.
pub(crate) async fn perform(
    target: &Target,
    body: bytes::Bytes,
    stream: bool,
    timeout: Duration,
    live_tokens: &AtomicU64,
) -> Result<Timing, Failure> {
    let whole = async {
        match stream {
            true => streamed(target, body, live_tokens).await,
            false => whole(target, body, live_tokens).await,
        }
    };
    match tokio::time::timeout(timeout, whole).await {
        Ok(result) => result.map_err(|failure| target.redact(failure)),
        Err(_) => Err(Failure::timeout(timeout)),
    }
}

/// Sends a request, and once more where the connection ended before any answer.
///
/// A kept connection may be closed by the server while the next request is on its way: llama.cpp's server ends each
/// one after its second stream without saying so. That is between client and server, not a failure of the request, so
/// it is counted apart. The clock runs on.
async fn send(target: &Target, body: bytes::Bytes) -> Result<(Response<ResponseBody>, bool), Failure> {
    let (result, reconnected) = match target.client.send(target.post(body.clone())).await {
        Err(UpstreamError::Stale { .. }) => (target.client.send_fresh(target.post(body)).await, true),
        result => (result, false),
    };
    result.map(|response| (response, reconnected)).map_err(|error| Failure::from(&error))
}

async fn whole(target: &Target, body: bytes::Bytes, live_tokens: &AtomicU64) -> Result<Timing, Failure> {
    let begin = Instant::now();
    let (response, reconnected) = send(target, body).await?;
    let status = response.status();
    let body = read(response.into_body(), ANSWER_BYTES_MAX).await?;
    let e2e = begin.elapsed();
    if !status.is_success() {
        return Err(Failure::status(status, &body));
    }
    if serde_json::from_slice::<&serde_json::value::RawValue>(&body).is_err() {
        return Err(Failure::new(FailureKind::BadAnswer, "the answer is not JSON"));
    }
    let usage = scan_body(&body);
    live_tokens.fetch_add(usage.map_or(0, |usage| u64::from(usage.completion_tokens)), Ordering::Relaxed);
    Ok(Timing { e2e, usage, reconnected, ..Timing::default() })
}

async fn streamed(target: &Target, body: bytes::Bytes, live_tokens: &AtomicU64) -> Result<Timing, Failure> {
    let begin = Instant::now();
    let (response, reconnected) = send(target, body).await?;
    let (head, mut body) = response.into_parts();
    if !head.status.is_success() {
        // Errors are small; of a large one the beginning would do, but an unread rest costs the connection anyway.
        let text = read(body, 1 << 20).await.unwrap_or_default();
        return Err(Failure::status(head.status, &text));
    }
    let is_sse = head.headers.get(http::header::CONTENT_TYPE).is_some_and(|value| {
        value.to_str().is_ok_and(|value| value.to_ascii_lowercase().starts_with("text/event-stream"))
    });
    if !is_sse {
        return Err(Failure::new(FailureKind::BadAnswer, "the answer is not text/event-stream"));
    }

    let mut reader = Reader::new(begin);
    let mut splitter = SseSplitter::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::from(&error))?;
        let Ok(data) = frame.into_data() else { continue };
        splitter.push(data);
        let bad = |_| Failure::new(FailureKind::BadAnswer, "a frame of the stream is too long");
        while let Some(frame) = splitter.next_frame().map_err(bad)? {
            let pieces = reader.on_frame(&frame, Instant::now())?;
            live_tokens.fetch_add(u64::from(pieces), Ordering::Relaxed);
        }
    }
    if let Some(rest) = splitter.finish() {
        reader.on_frame(&rest, Instant::now())?;
    }
    Ok(Timing { reconnected, ..reader.finish()? })
}

async fn read(mut body: ResponseBody, bytes_max: usize) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error: UpstreamError| Failure::from(&error))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > bytes_max {
            return Err(Failure::new(FailureKind::BadAnswer, "the answer is too large"));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

/// Reads a stream's frames as they come. Pure: it is told the time.
struct Reader {
    begin: Instant,
    first: Option<Instant>,
    last: Instant,
    /// The last frame that had choices, with or without text.
    any: Option<Instant>,
    end: Option<Instant>,
    timing: Timing,
}

impl Reader {
    fn new(begin: Instant) -> Self {
        Self { begin, first: None, last: begin, any: None, end: None, timing: Timing::default() }
    }

    /// Takes one frame; gives back the pieces of output in it.
    fn on_frame(&mut self, frame: &[u8], now: Instant) -> Result<u32, Failure> {
        let info = scan_frame(frame);
        if info.error {
            let text = String::from_utf8_lossy(frame);
            let data = text.lines().find_map(|line| line.strip_prefix("data:")).unwrap_or_default().trim();
            let message = forebay_wire::parse_error(data.as_bytes()).map(|error| error.message);
            return Err(Failure::new(FailureKind::ErrorInStream, message.as_deref().unwrap_or(data)));
        }
        if info.done {
            self.end = Some(now);
        }
        self.timing.usage = info.usage.or(self.timing.usage);
        if !info.usage_only && !info.done && !frame.starts_with(b":") {
            self.any = Some(now);
        }
        if info.deltas > 0 {
            match self.first {
                None => self.first = Some(now),
                Some(_) if self.timing.gaps.len() < GAPS_MAX => self.timing.gaps.push(now - self.last),
                Some(_) => {}
            }
            self.last = now;
            self.timing.pieces += info.deltas;
        }
        Ok(info.deltas)
    }

    fn finish(mut self) -> Result<Timing, Failure> {
        let Some(end) = self.end else {
            return Err(Failure::new(FailureKind::CutStream, "the stream ended without [DONE]"));
        };
        if self.timing.output_tokens() == 0 {
            return Err(Failure::new(FailureKind::NoTokens, "the stream had no output"));
        }
        // Tokens without text, like a lone end of sequence: the frame that says why it ended stands for them.
        let first = self.first.or(self.any).unwrap_or(end);
        self.timing.ttft = Some(first - self.begin);
        self.timing.decode = self.last.saturating_duration_since(first);
        self.timing.e2e = end - self.begin;
        Ok(self.timing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLE: &str = r#"data: {"choices":[{"delta":{"role":"assistant","content":""}}]}"#;
    const TEXT: &str = r#"data: {"choices":[{"delta":{"content":"a"}}]}"#;
    const STOP: &str = r#"data: {"choices":[{"delta":{},"finish_reason":"stop"}]}"#;
    const DONE: &str = "data: [DONE]";

    fn usage(tokens: u32) -> String {
        format!(r#"data: {{"choices":[],"usage":{{"prompt_tokens":5,"completion_tokens":{tokens}}}}}"#)
    }

    fn replay(frames: &[(u64, &str)]) -> Result<Timing, FailureKind> {
        let begin = Instant::now();
        let mut reader = Reader::new(begin);
        for (ms, frame) in frames {
            let frame = format!("{frame}\n\n");
            reader.on_frame(frame.as_bytes(), begin + Duration::from_millis(*ms)).map_err(|f| f.kind)?;
        }
        reader.finish().map_err(|failure| failure.kind)
    }

    #[test]
    fn times_of_a_stream() {
        let ms = Duration::from_millis;
        let check = |frames: &[(u64, &str)], ttft, gaps: &[u64], tpot: Option<u64>, e2e, tokens| {
            let timing = replay(frames).expect("a good stream");
            assert_eq!(timing.ttft, Some(ms(ttft)), "{frames:?}");
            assert_eq!(timing.gaps, gaps.iter().map(|gap| ms(*gap)).collect::<Vec<_>>(), "{frames:?}");
            assert_eq!(timing.tpot(), tpot.map(ms), "{frames:?}");
            assert_eq!((timing.e2e, timing.output_tokens()), (ms(e2e), tokens), "{frames:?}");
        };
        let three = [(1, ROLE), (10, TEXT), (14, TEXT), (20, TEXT), (20, STOP), (21, DONE)];
        check(&three, 10, &[4, 6], Some(5), 21, 3);
        // Usage knows better than the frames: here a frame held two tokens.
        let usage6 = usage(6);
        check(&[(10, TEXT), (20, TEXT), (21, &usage6), (22, DONE)], 10, &[10], Some(2), 22, 6);
        check(&[(10, TEXT), (11, DONE)], 10, &[], None, 11, 1);
        check(&[(3, ": ping"), (10, TEXT), (11, DONE)], 10, &[], None, 11, 1);
        // A token without text.
        let usage1 = usage(1);
        check(&[(1, ROLE), (10, STOP), (11, &usage1), (12, DONE)], 10, &[], None, 12, 1);
    }

    #[test]
    fn streams_that_fail() {
        let check = |frames: &[(u64, &str)], expect| {
            assert_eq!(replay(frames).err(), Some(expect), "{frames:?}");
        };
        check(&[], FailureKind::CutStream);
        check(&[(1, TEXT), (2, STOP)], FailureKind::CutStream);
        check(&[(1, STOP), (2, DONE)], FailureKind::NoTokens);
        check(&[(1, TEXT), (2, r#"data: {"error":{"message":"m"}}"#)], FailureKind::ErrorInStream);
    }
}
