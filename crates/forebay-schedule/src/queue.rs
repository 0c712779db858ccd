//! Who is admitted next.

use std::collections::VecDeque;
use std::time::Duration;

use crate::{NewSeq, SchedulerConfig};

/// A waiting sequence's place: smaller is earlier. Fixed when the sequence arrives, so a preempted one comes back
/// to where it stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    level: i64,
    arrival_us: i64,
    /// Arrivals are numbered, so no two ranks are equal.
    number: u64,
}

/// The admission policy. Priority, then arrival; with ageing, waiting `ageing` longer weighs as much as one level.
///
/// Fairness between tenants goes here: a virtual arrival time per `seq.tenant` that advances with what the tenant
/// was served (VTC, "Fairness in Serving Large Language Models", Sheng et al. 2024).
pub(crate) fn rank(config: &SchedulerConfig, seq: &NewSeq, now: Duration, number: u64) -> Rank {
    let now_us = micros(now);
    match config.ageing {
        None => Rank { level: -i64::from(seq.priority), arrival_us: now_us, number },
        Some(ageing) => {
            let lead_us = i64::from(seq.priority).saturating_mul(micros(ageing));
            Rank { level: 0, arrival_us: now_us.saturating_sub(lead_us), number }
        }
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// Waiting sequences' slots in order of rank.
///
/// A sorted ring: arrivals go to the back and preempted ones near the front, both of which move little.
#[derive(Debug, Clone, Default)]
pub(crate) struct WaitingQueue {
    ring: VecDeque<(Rank, u32)>,
    /// Tokens to prefill of all that wait.
    tokens: u64,
}

impl WaitingQueue {
    pub(crate) fn with_capacity(seqs: usize) -> Self {
        Self { ring: VecDeque::with_capacity(seqs), tokens: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.ring.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Slot of the `i`-th in order.
    pub(crate) fn get(&self, i: usize) -> Option<u32> {
        self.ring.get(i).map(|(_, slot)| *slot)
    }

    /// Returns how many are before it.
    pub(crate) fn insert(&mut self, rank: Rank, slot: u32, tokens: u32) -> usize {
        let at = self.ring.partition_point(|(other, _)| *other < rank);
        self.ring.insert(at, (rank, slot));
        self.tokens += u64::from(tokens);
        at
    }

    /// `tokens` as at its insertion.
    pub(crate) fn remove(&mut self, rank: Rank, tokens: u32) {
        let at = self.ring.partition_point(|(other, _)| *other < rank);
        if self.ring.get(at).is_some_and(|(other, _)| *other == rank) {
            self.ring.remove(at);
            self.tokens -= u64::from(tokens);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Rank, u32)> + '_ {
        self.ring.iter().copied()
    }
}
