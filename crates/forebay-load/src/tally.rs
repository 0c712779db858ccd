//! Results as they come in.

use std::collections::BTreeMap;

use crate::error::{Failure, FailureKind};
use crate::report::FailureCount;
use crate::request::Timing;
use crate::samples::Samples;

/// Counts and series of the measured requests.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    /// By kind, each with the first message.
    pub(crate) failures: BTreeMap<FailureKind, FailureCount>,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) output_tokens: u64,
    /// Completed requests whose tokens the server did not count.
    pub(crate) without_usage: u64,
    pub(crate) ttft: Samples,
    pub(crate) tpot: Samples,
    pub(crate) itl: Samples,
    pub(crate) e2e: Samples,
    /// Requests sent more than [`LATE`](crate::run::LATE) after they were due.
    pub(crate) delayed: u64,
    /// Requests in flight when the run was stopped from outside.
    pub(crate) abandoned: u64,
    /// Completed requests that were sent twice, as the server had closed a kept connection.
    pub(crate) reconnected: u64,
    pub(crate) in_flight_peak: usize,
}

impl Tally {
    pub(crate) fn record(&mut self, result: Result<Timing, Failure>) {
        let timing = match result {
            Ok(timing) => timing,
            Err(failure) => {
                self.failed += 1;
                let entry = self.failures.entry(failure.kind).or_insert_with(|| FailureCount {
                    kind: failure.kind.to_string(),
                    count: 0,
                    first_message: failure.message,
                });
                entry.count += 1;
                return;
            }
        };
        self.completed += 1;
        self.reconnected += u64::from(timing.reconnected);
        self.output_tokens += u64::from(timing.output_tokens());
        match timing.usage {
            Some(usage) => {
                self.prompt_tokens += u64::from(usage.prompt_tokens);
                self.cached_tokens += u64::from(usage.cached_tokens);
            }
            None => self.without_usage += 1,
        }
        if let Some(ttft) = timing.ttft {
            self.ttft.push(ttft);
        }
        if let Some(tpot) = timing.tpot() {
            self.tpot.push(tpot);
        }
        self.e2e.push(timing.e2e);
        for gap in timing.gaps {
            self.itl.push(gap);
        }
    }
}
