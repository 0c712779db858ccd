//! The audit log: one line of JSON per request, refused ones included.
//!
//! What can't be audited is not done (fail closed). A request takes a slot of the bounded queue before anything else
//! happens to it, so that its record always has a place, also when it is written by `Drop`. If no slot is free for
//! [`SLOT_WAIT`], or the last write failed, the request is refused with 503. The writer repeats a failed write until it
//! succeeds; a record is lost only if the process ends before.
//!
//! Not here: no prompts, no completions, no keys; no signatures; no deletion of old files.

mod file;
mod writer;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forebay_types::{Blame, Class, Classify, Code, ConsumerName, ModelName, RequestId, Retry};
use tokio::sync::{mpsc, oneshot};

use crate::clock::UtcTime;
use crate::metrics::Metrics;
use crate::{AuditConfig, GatewayBuildError};

pub(crate) use file::FileSink;
use writer::{Entry, Sink, Writer};

/// How long a request waits for a slot. Long enough for a slow disk, short enough for a client.
const SLOT_WAIT: Duration = Duration::from_millis(250);
/// Between attempts of a write that failed.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// One request, as it is written down.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct AuditRecord {
    /// When it came in.
    pub(crate) at: UtcTime,
    pub(crate) request_id: RequestId,
    pub(crate) trace_id: String,
    /// Whoever connected: the last proxy before us, if there is one.
    pub(crate) peer: IpAddr,
    /// `null` where the key was missing or wrong.
    pub(crate) consumer: Option<ConsumerName>,
    pub(crate) model: Option<ModelName>,
    pub(crate) path: String,
    pub(crate) status: u16,
    /// `ok`, `cancelled`, or the name of the error.
    pub(crate) outcome: String,
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) cached_tokens: u32,
    /// The tokens were counted here, as no usage was reported.
    pub(crate) estimated: bool,
    pub(crate) duration_ms: u64,
    /// The reply began and did not end.
    pub(crate) cut: bool,
}

/// Why a request could not be audited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AuditError {
    #[error(
        "too many requests are waiting for the audit log (`gateway.audit.pending-max` is {limit}); try again later"
    )]
    Full { limit: usize },
    #[error("the audit log can't be written, so no request is served; the operator must make room for it")]
    Unwritable,
}

impl Classify for AuditError {
    fn class(&self) -> Class {
        match self {
            Self::Full { .. } | Self::Unwritable => {
                Class::new(Code::Overloaded, Blame::Us).retry(Retry::After(Duration::from_secs(1)))
            }
        }
    }
}

/// The right to write one record.
#[derive(Debug)]
pub(crate) enum AuditSlot {
    /// There is no audit log.
    Off,
    Reserved(mpsc::OwnedPermit<Entry>),
}

impl AuditSlot {
    /// Never waits and never fails: the place is reserved.
    pub(crate) fn write(self, record: impl FnOnce() -> AuditRecord) {
        match self {
            Self::Off => {}
            Self::Reserved(permit) => {
                permit.send(Entry::Record(Box::new(record())));
            }
        }
    }
}

/// The queue before the writer's thread.
#[derive(Debug)]
pub(crate) struct AuditLog {
    queue: mpsc::Sender<Entry>,
    /// Whether the last write succeeded.
    writable: Arc<AtomicBool>,
    limit: usize,
}

impl AuditLog {
    /// Makes the directory and starts the writer's thread, which ends when the log and all slots are gone.
    pub(crate) fn start(config: &AuditConfig, metrics: &Metrics) -> Result<Self, GatewayBuildError> {
        let sink = FileSink::open(&config.dir)
            .map_err(|source| GatewayBuildError::AuditDir { path: config.dir.clone(), source })?;
        Self::start_with(sink, config.pending_max, RETRY_PAUSE, metrics)
    }

    fn start_with(
        sink: impl Sink,
        pending_max: usize,
        pause: Duration,
        metrics: &Metrics,
    ) -> Result<Self, GatewayBuildError> {
        if pending_max == 0 {
            return Err(GatewayBuildError::NoAuditRoom);
        }
        let limit = pending_max.min(tokio::sync::Semaphore::MAX_PERMITS);
        let (queue, entries) = mpsc::channel(limit);
        let writable = Arc::new(AtomicBool::new(true));
        let writer = Writer::new(sink, Arc::clone(&writable), metrics.clone(), pause);
        std::thread::Builder::new()
            .name("forebay-audit".into())
            .spawn(move || writer.run(entries))
            .map_err(GatewayBuildError::AuditThread)?;
        Ok(Self { queue, writable, limit })
    }

    /// Takes a slot. Cancellation: guarded, a slot that is not used goes back.
    pub(crate) async fn slot(&self) -> Result<AuditSlot, AuditError> {
        if !self.writable.load(Ordering::Acquire) {
            return Err(AuditError::Unwritable);
        }
        if let Ok(permit) = self.queue.clone().try_reserve_owned() {
            return Ok(AuditSlot::Reserved(permit));
        }
        match tokio::time::timeout(SLOT_WAIT, self.queue.clone().reserve_owned()).await {
            Ok(Ok(permit)) => Ok(AuditSlot::Reserved(permit)),
            Ok(Err(_closed)) => Err(AuditError::Unwritable),
            Err(_elapsed) => Err(AuditError::Full { limit: self.limit }),
        }
    }

    /// Waits until every record that was handed over before is written.
    pub(crate) async fn flush(&self) {
        let (done, written) = oneshot::channel();
        if self.queue.send(Entry::Flush(done)).await.is_ok() {
            // An error is a writer that ended: it has logged what it lost.
            let _ = written.await;
        }
    }
}

#[cfg(test)]
mod tests;
