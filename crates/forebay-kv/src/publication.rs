//! A publisher without its sockets: numbers, the last batches, and the cache as of now.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use crate::KvEvent;
use crate::codec::{Epoch, encode_batch, encode_marked};
use crate::mirror::CacheMirror;

/// Also a limit on how much one replay sends.
const BYTES_MAX: usize = 64 << 20;
/// Blocks in one message of a snapshot: about 100 KB where a block has 16 tokens.
const SNAPSHOT_BLOCKS: usize = 1024;
/// There is one cache per publisher.
const RANK: u32 = 0;

/// What one cache's publisher has sent, and what it can send again.
///
/// Batches are numbered from 0 without gaps. What is there of them is a suffix, limited in number and bytes; beside it
/// stands what they add up to, for who needs more than the suffix.
#[derive(Debug)]
pub struct Publication {
    epoch: Epoch,
    batches_max: usize,
    /// Of the first batch in `payloads`; the others follow without a gap.
    first: u64,
    payloads: VecDeque<Bytes>,
    bytes: usize,
    mirror: CacheMirror,
}

impl Publication {
    /// Keeps at most so many batches for replay. `epoch` must be a new one.
    pub fn new(epoch: Epoch, batches_max: usize) -> Self {
        Self {
            epoch,
            batches_max,
            first: 0,
            payloads: VecDeque::new(),
            bytes: 0,
            mirror: CacheMirror::default(),
        }
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Number of the next batch.
    pub fn next_seq(&self) -> u64 {
        self.first + self.payloads.len() as u64
    }

    /// Takes in what one step did to the cache, at `ts` seconds since 1970. Returns the batch to be sent and its
    /// number; `None` where there is nothing to tell.
    pub fn on_step(&mut self, ts: f64, events: impl IntoIterator<Item = KvEvent>) -> Option<(u64, Bytes)> {
        let mut told = Vec::new();
        for event in events {
            self.mirror.apply(event, &mut told);
        }
        if told.is_empty() {
            return None;
        }
        let mut payload = Vec::with_capacity(256);
        encode_batch(ts, &told, RANK, &mut payload);
        let payload = Bytes::from(payload);
        Some((self.push(payload.clone()), payload))
    }

    /// Adds the next batch, and drops the oldest ones over the limits.
    fn push(&mut self, payload: Bytes) -> u64 {
        let seq = self.next_seq();
        self.bytes += payload.len();
        self.payloads.push_back(payload);
        while self.payloads.len() > self.batches_max || self.bytes > BYTES_MAX {
            let Some(oldest) = self.payloads.pop_front() else { break };
            self.bytes -= oldest.len();
            self.first += 1;
        }
        seq
    }

    /// The batches from number `start` on that are still there.
    pub fn since(&self, start: u64) -> Vec<(u64, Bytes)> {
        let skip = usize::try_from(start.saturating_sub(self.first)).unwrap_or(usize::MAX);
        (self.first..).zip(&self.payloads).skip(skip).map(|(seq, payload)| (seq, payload.clone())).collect()
    }

    /// Payload of a heartbeat; its number is [`Self::next_seq`].
    pub fn heartbeat(&self, ts: f64, interval: Duration) -> Bytes {
        let mut payload = Vec::with_capacity(64);
        encode_marked(ts, &[], RANK, &self.epoch, Some(interval), &mut payload);
        payload.into()
    }

    /// The cache as of now: a copy, so that what comes next need not wait until it is sent.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot { epoch: self.epoch, next_seq: self.next_seq(), mirror: self.mirror.clone() }
    }
}

/// A cache at one moment.
#[derive(Debug)]
pub struct Snapshot {
    epoch: Epoch,
    next_seq: u64,
    mirror: CacheMirror,
}

impl Snapshot {
    /// Number of the first batch that is not in it, and of each of its messages.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Its messages' payloads, in order: a cleared cache, then what is stored.
    pub fn into_payloads(self, ts: f64) -> impl Iterator<Item = Bytes> + Send {
        let Self { epoch, mirror, .. } = self;
        let encode = move |events: Vec<KvEvent>| {
            let mut payload = Vec::new();
            encode_marked(ts, &events, RANK, &epoch, None, &mut payload);
            Bytes::from(payload)
        };
        std::iter::once(vec![KvEvent::Cleared]).chain(mirror.into_events(SNAPSHOT_BLOCKS)).map(encode)
    }
}

#[cfg(test)]
mod tests;
