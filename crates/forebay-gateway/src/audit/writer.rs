//! The writer's thread: takes what is there, writes it in one go, and repeats what failed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::AuditRecord;
use crate::metrics::Metrics;

/// Records per write. A write per record would cap the whole gateway at what the disk does in system calls.
const BATCH_MAX: usize = 256;
/// Attempts after the gateway is gone: nobody is left to refuse requests meanwhile, and the process wants to end.
const LAST_ATTEMPTS: u32 = 3;

/// What is in the queue.
#[derive(Debug)]
pub(crate) enum Entry {
    Record(Box<AuditRecord>),
    /// Answered when everything before it is written.
    Flush(oneshot::Sender<()>),
}

/// Where lines go. All or none of them.
pub(crate) trait Sink: Send + 'static {
    fn append(&mut self, day: u32, lines: &[u8]) -> io::Result<()>;
}

pub(crate) struct Writer<S> {
    sink: S,
    writable: Arc<AtomicBool>,
    metrics: Metrics,
    pause: Duration,
}

/// Lines of one day, not written yet.
#[derive(Default)]
struct Batch {
    day: u32,
    lines: Vec<u8>,
    records: u64,
}

impl<S: Sink> Writer<S> {
    pub(crate) fn new(sink: S, writable: Arc<AtomicBool>, metrics: Metrics, pause: Duration) -> Self {
        Self { sink, writable, metrics, pause }
    }

    /// Until every sender is gone and the queue is empty.
    pub(crate) fn run(mut self, mut entries: mpsc::Receiver<Entry>) {
        let mut batch = Batch::default();
        while let Some(first) = entries.blocking_recv() {
            let mut next = Some(first);
            let mut taken = 0;
            while let Some(entry) = next {
                taken += 1;
                match entry {
                    Entry::Record(record) => {
                        if record.at.day() != batch.day {
                            self.write(&mut batch, &entries);
                            batch.day = record.at.day();
                        }
                        serde_json::to_writer(&mut batch.lines, &record)
                            .expect("strings and numbers serialize to memory");
                        batch.lines.push(b'\n');
                        batch.records += 1;
                    }
                    Entry::Flush(done) => {
                        self.write(&mut batch, &entries);
                        let _ = done.send(());
                    }
                }
                next = if taken < BATCH_MAX { entries.try_recv().ok() } else { None };
            }
            self.write(&mut batch, &entries);
        }
    }

    fn write(&mut self, batch: &mut Batch, entries: &mpsc::Receiver<Entry>) {
        let mut attempts_after_close = 0;
        while !batch.lines.is_empty() {
            match self.sink.append(batch.day, &batch.lines) {
                Ok(()) => {
                    self.metrics.audit_records.inc_by(batch.records);
                    batch.lines.clear();
                    batch.records = 0;
                    if !self.writable.swap(true, Ordering::AcqRel) {
                        tracing::warn!("the audit log can be written again");
                    }
                }
                Err(error) => {
                    self.metrics.audit_errors.inc();
                    // Once per outage, not once per attempt.
                    if self.writable.swap(false, Ordering::AcqRel) {
                        tracing::error!(%error, "the audit log can't be written: requests are refused until it can");
                    }
                    if entries.is_closed() {
                        attempts_after_close += 1;
                        if attempts_after_close >= LAST_ATTEMPTS {
                            tracing::error!(records = batch.records, %error, "audit records are lost at shutdown");
                            batch.lines.clear();
                            batch.records = 0;
                        }
                    }
                    std::thread::sleep(self.pause);
                }
            }
        }
    }
}
