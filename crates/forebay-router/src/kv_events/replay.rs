//! Asks a publisher for batches that it still has.

use std::time::Duration;

use bytes::Bytes;
use forebay_zmtp::{DialError, Endpoint, Halves, SocketType, ZmtpError, dial};

use super::LIMITS;

/// Between two batches; a publisher that is busy serves replays late.
const NEXT_TIMEOUT: Duration = Duration::from_secs(10);
/// Over vLLM's largest usual buffer; a publisher that never ends must not keep us from the live events.
const BATCHES_MAX: u32 = 1_000_000;
const END_SEQ: [u8; 8] = [0xff; 8];

/// Why a replay did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReplayError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Zmtp(#[from] ZmtpError),
    #[error("nothing came for {} s", NEXT_TIMEOUT.as_secs())]
    Timeout,
    #[error("the answer is not one of KV events")]
    NotEvents,
    #[error("it has more than {BATCHES_MAX} batches")]
    TooMany,
}

pub(super) struct Replay {
    halves: Halves,
    batches: u32,
}

impl Replay {
    /// Asks for the batches from number `start` on.
    pub(super) async fn ask(endpoint: &Endpoint, start: u64) -> Result<Self, ReplayError> {
        let mut halves = dial(endpoint, SocketType::Dealer, LIMITS).await?;
        halves.1.send(&[Bytes::new(), Bytes::copy_from_slice(&start.to_be_bytes())]).await?;
        Ok(Self { halves, batches: 0 })
    }

    /// The next batch's number and payload; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<(u64, Bytes)>, ReplayError> {
        let received = tokio::time::timeout(NEXT_TIMEOUT, self.halves.0.recv()).await;
        let message = received.map_err(|_| ReplayError::Timeout)??;
        let (seq, payload) = match &message[..] {
            [empty, _topic, seq, payload] if empty.is_empty() => (seq, payload),
            // vLLM before its pull request 45177.
            [empty, seq, payload] if empty.is_empty() => (seq, payload),
            _ => return Err(ReplayError::NotEvents),
        };
        let seq = <[u8; 8]>::try_from(&seq[..]).map_err(|_| ReplayError::NotEvents)?;
        if seq == END_SEQ {
            return Ok(None);
        }
        self.batches += 1;
        if self.batches > BATCHES_MAX {
            return Err(ReplayError::TooMany);
        }
        Ok(Some((u64::from_be_bytes(seq), payload.clone())))
    }
}
