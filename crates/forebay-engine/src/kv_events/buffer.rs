//! The last batches, for subscribers that missed some.

use std::collections::VecDeque;
use std::sync::Mutex;

use bytes::Bytes;

/// Also a limit on how much one replay sends.
const BYTES_MAX: usize = 64 << 20;

pub(super) struct Buffer {
    steps_max: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Of the first batch in `payloads`; the others follow without a gap.
    first: u64,
    payloads: VecDeque<Bytes>,
    bytes: usize,
}

impl Buffer {
    pub(super) fn new(steps_max: usize) -> Self {
        Self { steps_max, state: Mutex::default() }
    }

    /// Adds the next batch, and drops the oldest ones over the limits. Returns its sequence number, from 0.
    pub(super) fn push(&self, payload: Bytes) -> u64 {
        let mut state = self.state.lock().expect("nothing panics while it is held");
        let seq = state.first + state.payloads.len() as u64;
        state.bytes += payload.len();
        state.payloads.push_back(payload);
        while state.payloads.len() > self.steps_max || state.bytes > BYTES_MAX {
            let Some(oldest) = state.payloads.pop_front() else { break };
            state.bytes -= oldest.len();
            state.first += 1;
        }
        seq
    }

    /// The batches from `start` on that are still there.
    pub(super) fn since(&self, start: u64) -> Vec<(u64, Bytes)> {
        let state = self.state.lock().expect("nothing panics while it is held");
        let skip = usize::try_from(start.saturating_sub(state.first)).unwrap_or(usize::MAX);
        (state.first..).zip(&state.payloads).skip(skip).map(|(seq, payload)| (seq, payload.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_ones() {
        let buffer = Buffer::new(3);
        let seqs = |start| buffer.since(start).into_iter().map(|(seq, _)| seq).collect::<Vec<_>>();
        assert_eq!(seqs(0), [0u64; 0]);
        for seq in 0..5 {
            assert_eq!(buffer.push(vec![seq as u8].into()), seq);
        }
        assert_eq!(seqs(0), [2, 3, 4]);
        assert_eq!(seqs(3), [3, 4]);
        assert_eq!(seqs(5), [0u64; 0]);
        assert_eq!(seqs(u64::MAX), [0u64; 0]);
        assert_eq!(buffer.since(4), [(4, Bytes::from_static(&[4]))]);
    }

    #[test]
    fn is_limited_in_bytes() {
        let buffer = Buffer::new(1000);
        let large: Bytes = vec![0; BYTES_MAX / 2].into();
        for _ in 0..3 {
            buffer.push(large.clone());
        }
        assert_eq!(buffer.since(0).len(), 2);
        // What is larger than all of it is sent, but not kept.
        assert_eq!(buffer.push(vec![0; BYTES_MAX + 1].into()), 3);
        assert_eq!(buffer.since(0).len(), 0);
        assert_eq!(buffer.push(Bytes::new()), 4);
        assert_eq!(buffer.since(0), [(4, Bytes::new())]);
    }

    #[test]
    fn can_be_turned_off() {
        let buffer = Buffer::new(0);
        assert_eq!((buffer.push(Bytes::new()), buffer.push(Bytes::new())), (0, 1));
        assert!(buffer.since(0).is_empty());
    }
}
