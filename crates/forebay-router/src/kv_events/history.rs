//! Asks a publisher for what it can tell again: batches that it still has, or its whole cache.

use std::time::Duration;

use bytes::Bytes;
use forebay_kv::codec::{END_SEQ, SNAPSHOT_REQUEST};
use forebay_zmtp::{DialError, Endpoint, Halves, SocketType, ZmtpError, dial};

use super::LIMITS;

/// Between two messages; a publisher that is busy serves replays late.
const NEXT_TIMEOUT: Duration = Duration::from_secs(10);
/// Over vLLM's largest usual buffer; a publisher that never ends must not keep us from the live events.
const MESSAGES_MAX: u32 = 1_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The batches from this number on.
    Since(u64),
    /// The cache as of now.
    Snapshot,
}

/// Why what was asked for did not come.
#[derive(Debug, thiserror::Error)]
pub(super) enum HistoryError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Zmtp(#[from] ZmtpError),
    #[error("nothing came for {} s", NEXT_TIMEOUT.as_secs())]
    Timeout,
    #[error("the answer is not one of KV events")]
    NotEvents,
    #[error("it has more than {MESSAGES_MAX} messages")]
    TooMany,
    #[error("a part of the snapshot can't be read")]
    Unreadable,
    #[error("it comes from another cache than the events; do both endpoints belong to the same replica?")]
    OtherEpoch,
}

/// Who can be asked.
pub(super) trait History {
    type Answer: Answer;

    fn ask(&self, wanted: Wanted) -> impl Future<Output = Result<Self::Answer, HistoryError>> + Send;
}

pub(super) trait Answer: Send {
    /// The next message's number and payload; `None` at the end.
    fn next(&mut self) -> impl Future<Output = Result<Option<(u64, Bytes)>, HistoryError>> + Send;
}

/// A publisher's replay socket.
pub(super) struct ReplaySocket(pub(super) Endpoint);

pub(super) struct SocketAnswer {
    halves: Halves,
    messages: u32,
}

impl History for ReplaySocket {
    type Answer = SocketAnswer;

    async fn ask(&self, wanted: Wanted) -> Result<SocketAnswer, HistoryError> {
        let mut halves = dial(&self.0, SocketType::Dealer, LIMITS).await?;
        let request = match wanted {
            Wanted::Since(seq) => seq.to_be_bytes(),
            Wanted::Snapshot => *SNAPSHOT_REQUEST,
        };
        halves.1.send(&[Bytes::new(), Bytes::copy_from_slice(&request)]).await?;
        Ok(SocketAnswer { halves, messages: 0 })
    }
}

impl Answer for SocketAnswer {
    async fn next(&mut self) -> Result<Option<(u64, Bytes)>, HistoryError> {
        let received = tokio::time::timeout(NEXT_TIMEOUT, self.halves.0.recv()).await;
        let message = received.map_err(|_| HistoryError::Timeout)??;
        let (seq, payload) = match &message[..] {
            [empty, _topic, seq, payload] if empty.is_empty() => (seq, payload),
            // vLLM before its pull request 45177.
            [empty, seq, payload] if empty.is_empty() => (seq, payload),
            _ => return Err(HistoryError::NotEvents),
        };
        let seq = <[u8; 8]>::try_from(&seq[..]).map_err(|_| HistoryError::NotEvents)?;
        if seq == END_SEQ {
            return Ok(None);
        }
        self.messages += 1;
        if self.messages > MESSAGES_MAX {
            return Err(HistoryError::TooMany);
        }
        Ok(Some((u64::from_be_bytes(seq), payload.clone())))
    }
}
