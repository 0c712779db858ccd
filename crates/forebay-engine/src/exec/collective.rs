//! Communication between ranks that run one model together.
//!
//! Calls are over plain buffers and counts and carry no Rust values or closures, so that a library of a device (NCCL,
//! say) can stand behind the same trait, with the device's kind of buffer. [`ThreadCollective`] is for ranks that are threads of one process.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forebay_kernels::spin;

/// Why ranks could not exchange values.
///
/// All but `Peer` and `Length` end the whole group: every later call of every rank gives the first such error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CollectiveError {
    #[error("rank {rank} is gone")]
    Gone { rank: usize },
    #[error("rank {rank} waited {waited_ms} ms for the others")]
    TimedOut { rank: usize, waited_ms: u128 },
    /// Ranks called different operations, or with different counts. (NCCL would hang or corrupt memory.)
    #[error("rank {rank} does not make the same call as the others")]
    Mismatch { rank: usize },
    #[error("rank {rank} is not another of the {size} ranks")]
    Peer { rank: usize, size: usize },
    #[error("a buffer has {found} values, {expected} expected")]
    Length { found: usize, expected: usize },
}

/// One rank's end of a group. `B` is a buffer of f32 values where the ranks compute: a slice, or a device's.
///
/// The caller owns all buffers; none is used after a call returns. All ranks make the same group calls (`all_gather`,
/// `broadcast`, `barrier`) with the same counts in the same order. After an error the contents of an output buffer
/// are not specified. Calls block; cancellation: dropping any rank's end makes the others' calls fail.
pub trait Collective<B: ?Sized = [f32]>: Send {
    /// This rank, below [`Collective::size`].
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn size(&self) -> usize;

    /// `out[r * n..][..n] = part` of rank `r`, with `n = part.len()` and `out` of `size * n` values.
    fn all_gather(&mut self, part: &B, out: &mut B) -> Result<(), CollectiveError>;

    /// Gives every rank the values that `root` has.
    fn broadcast(&mut self, root: usize, values: &mut B) -> Result<(), CollectiveError>;

    /// Returns when every rank has called it.
    fn barrier(&mut self) -> Result<(), CollectiveError>;

    /// Sends to another rank. Waits while an earlier message to it has not been received.
    fn send(&mut self, to: usize, values: &B) -> Result<(), CollectiveError>;

    /// Receives from another rank a message of exactly `values.len()` values.
    fn recv(&mut self, from: usize, values: &mut B) -> Result<(), CollectiveError>;
}

/// A rank that is a thread of this process. A waiting thread spins for a moment, as ranks with equal work arrive at about
/// the same time and sleeping costs more than that, then sleeps.
pub struct ThreadCollective {
    group: Arc<Group>,
    rank: usize,
    size: usize,
    timeout: Duration,
}

struct Group {
    state: Mutex<State>,
    changed: Condvar,
    /// Counts changes of the state; for who spins.
    version: AtomicU64,
}

struct State {
    failed: Option<CollectiveError>,
    /// Group calls that are complete.
    rounds: u64,
    /// What the round's first rank called.
    call: Call,
    arrived: usize,
    /// Ranks that have not yet taken the values of the complete round.
    leaving: usize,
    /// By rank; kept for their memory.
    parts: Vec<Vec<f32>>,
    /// `mail[from * size + to]`: a message under way.
    mail: Vec<Mail>,
}

#[derive(Default)]
struct Mail {
    full: bool,
    values: Vec<f32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Gather { count: usize },
    Broadcast { root: usize, count: usize },
    Barrier,
}

impl ThreadCollective {
    /// The ends of a group of `size` ranks (at least 1), by rank. A call that waits longer than `timeout` ends the
    /// group.
    pub fn group(size: usize, timeout: Duration) -> Vec<Self> {
        let size = size.max(1);
        let state = State {
            failed: None,
            rounds: 0,
            call: Call::Barrier,
            arrived: 0,
            leaving: 0,
            parts: vec![Vec::new(); size],
            mail: (0..size * size).map(|_| Mail::default()).collect(),
        };
        let group =
            Arc::new(Group { state: Mutex::new(state), changed: Condvar::new(), version: AtomicU64::new(0) });
        (0..size).map(|rank| Self { group: Arc::clone(&group), rank, size, timeout }).collect()
    }

    /// One group call: gives `part`, waits for the others, and takes from all parts.
    fn round(&self, call: Call, part: &[f32], take: impl FnOnce(&[Vec<f32>])) -> Result<(), CollectiveError> {
        let group = &*self.group;
        let mut state = self.wait(group.lock(), |state| state.leaving == 0)?;
        if let Some(failed) = state.failed {
            return Err(failed);
        }
        if state.arrived == 0 {
            state.call = call;
        } else if state.call != call {
            return Err(group.fail(&mut state, CollectiveError::Mismatch { rank: self.rank }));
        }
        let own = &mut state.parts[self.rank];
        own.clear();
        own.extend_from_slice(part);
        state.arrived += 1;
        if state.arrived == self.size {
            (state.arrived, state.leaving) = (0, self.size);
            state.rounds += 1;
            group.notify();
        } else {
            let before = state.rounds;
            state = self.wait(state, |state| state.rounds != before)?;
        }
        take(&state.parts);
        state.leaving -= 1;
        if state.leaving == 0 {
            group.notify();
        }
        Ok(())
    }

    /// Sleeps until `ready`. What is ready is given even if the group has failed since.
    fn wait<'g>(
        &'g self,
        mut state: MutexGuard<'g, State>,
        ready: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'g, State>, CollectiveError> {
        let start = Instant::now();
        let group = &*self.group;
        let mut spun = false;
        while !ready(&state) {
            if let Some(failed) = state.failed {
                return Err(failed);
            }
            if !std::mem::replace(&mut spun, true) {
                let version = group.version.load(Ordering::Acquire);
                drop(state);
                spin(|| group.version.load(Ordering::Acquire) != version);
                state = group.lock();
                continue;
            }
            let Some(left) = self.timeout.checked_sub(start.elapsed()).filter(|left| !left.is_zero()) else {
                let waited_ms = self.timeout.as_millis();
                let failed = CollectiveError::TimedOut { rank: self.rank, waited_ms };
                return Err(group.fail(&mut state, failed));
            };
            let woken = group.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state)
    }

    fn peer(&self, rank: usize) -> Result<(), CollectiveError> {
        let other = rank < self.size && rank != self.rank;
        if other { Ok(()) } else { Err(CollectiveError::Peer { rank, size: self.size }) }
    }
}

impl Group {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The group's first error, which is `error` if there was none.
    fn fail(&self, state: &mut State, error: CollectiveError) -> CollectiveError {
        let first = *state.failed.get_or_insert(error);
        self.notify();
        first
    }

    /// Wakes who waits. Called with the state locked.
    fn notify(&self) {
        self.version.fetch_add(1, Ordering::Release);
        self.changed.notify_all();
    }
}

impl Collective for ThreadCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&mut self, part: &[f32], out: &mut [f32]) -> Result<(), CollectiveError> {
        let (count, expected) = (part.len(), part.len() * self.size);
        if out.len() != expected {
            return Err(CollectiveError::Length { found: out.len(), expected });
        }
        self.round(Call::Gather { count }, part, |parts| {
            for (rank, part) in parts.iter().enumerate() {
                out[rank * count..][..count].copy_from_slice(part);
            }
        })
    }

    fn broadcast(&mut self, root: usize, values: &mut [f32]) -> Result<(), CollectiveError> {
        if root >= self.size {
            return Err(CollectiveError::Peer { rank: root, size: self.size });
        }
        let (call, is_root) = (Call::Broadcast { root, count: values.len() }, root == self.rank);
        if is_root {
            return self.round(call, values, |_| ());
        }
        self.round(call, &[], |parts| values.copy_from_slice(&parts[root]))
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.round(Call::Barrier, &[], |_| ())
    }

    fn send(&mut self, to: usize, values: &[f32]) -> Result<(), CollectiveError> {
        self.peer(to)?;
        let place = self.rank * self.size + to;
        let mut state = self.wait(self.group.lock(), |state| !state.mail[place].full)?;
        if let Some(failed) = state.failed {
            return Err(failed);
        }
        let mail = &mut state.mail[place];
        mail.full = true;
        mail.values.clear();
        mail.values.extend_from_slice(values);
        self.group.notify();
        Ok(())
    }

    fn recv(&mut self, from: usize, values: &mut [f32]) -> Result<(), CollectiveError> {
        self.peer(from)?;
        let place = from * self.size + self.rank;
        let mut state = self.wait(self.group.lock(), |state| state.mail[place].full)?;
        if state.mail[place].values.len() != values.len() {
            return Err(self.group.fail(&mut state, CollectiveError::Mismatch { rank: self.rank }));
        }
        values.copy_from_slice(&state.mail[place].values);
        state.mail[place].full = false;
        self.group.notify();
        Ok(())
    }
}

impl Drop for ThreadCollective {
    fn drop(&mut self) {
        let mut state = self.group.lock();
        self.group.fail(&mut state, CollectiveError::Gone { rank: self.rank });
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// Longer than any machine needs: no test waits for it.
    const LONG: Duration = Duration::from_secs(600);

    /// `f` on every rank, each on a thread of its own; the results by rank.
    fn on_ranks<T: Send>(size: usize, f: impl Fn(ThreadCollective) -> T + Sync) -> Vec<T> {
        let f = &f;
        thread::scope(|scope| {
            let ranks = ThreadCollective::group(size, LONG).into_iter();
            let threads: Vec<_> = ranks.map(|rank| scope.spawn(move || f(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn parts_are_gathered_by_rank_in_every_round() {
        for size in 1..=4 {
            on_ranks(size, |mut rank| {
                for round in 0..200 {
                    // Counts change from round to round.
                    let part = vec![(rank.rank() * 1000 + round) as f32; round % 5];
                    let mut out = vec![-1.0; size * part.len()];
                    rank.all_gather(&part, &mut out).unwrap();
                    let of = |r: usize| vec![(r * 1000 + round) as f32; round % 5];
                    assert_eq!(out, (0..size).flat_map(of).collect::<Vec<_>>());

                    let root = round % size;
                    let mut values = [rank.rank() as f32, round as f32];
                    rank.broadcast(root, &mut values).unwrap();
                    assert_eq!(values, [root as f32, round as f32]);
                    rank.barrier().unwrap();
                }
            });
        }
    }

    #[test]
    fn messages_arrive_in_order_also_from_a_rank_that_has_left() {
        on_ranks(3, |mut rank| {
            for n in 0..100 {
                let mut value = [n as f32];
                if rank.rank() > 0 {
                    rank.recv(rank.rank() - 1, &mut value).unwrap();
                    assert_eq!(value, [n as f32]);
                }
                if rank.rank() + 1 < rank.size() {
                    rank.send(rank.rank() + 1, &value).unwrap();
                }
            }
            rank.barrier().unwrap();
        });

        let mut ranks = ThreadCollective::group(2, LONG);
        let mut last = ranks.pop().unwrap();
        ranks[0].send(1, &[7.0]).unwrap();
        drop(ranks);
        let mut value = [0.0];
        last.recv(0, &mut value).unwrap();
        assert_eq!(value, [7.0]);
        assert_eq!(last.recv(0, &mut value), Err(CollectiveError::Gone { rank: 0 }));
    }

    #[test]
    fn a_rank_that_panics_is_an_error_for_all_others() {
        let results = on_ranks(3, |mut rank| {
            if rank.rank() == 1 {
                let dies = move || {
                    let _end = rank;
                    std::panic::resume_unwind(Box::new("injected"));
                };
                assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(dies)).is_err());
                return Ok(());
            }
            rank.barrier()
        });
        let gone = Err(CollectiveError::Gone { rank: 1 });
        assert_eq!((results[0], results[2]), (gone, gone));
    }

    #[test]
    fn who_waits_too_long_ends_the_group() {
        let mut ranks = ThreadCollective::group(2, Duration::ZERO);
        let late = Err(CollectiveError::TimedOut { rank: 0, waited_ms: 0 });
        assert_eq!(ranks[0].barrier(), late);
        assert_eq!(ranks[1].recv(0, &mut [0.0]), late);
        assert_eq!(ranks[1].barrier(), late, "the first error, not one about itself");
    }

    #[test]
    fn different_calls_are_an_error_for_both() {
        let results = on_ranks(2, |mut rank| match rank.rank() {
            0 => rank.barrier(),
            _ => rank.all_gather(&[1.0], &mut [0.0; 2]),
        });
        assert!(matches!(results[0], Err(CollectiveError::Mismatch { .. })));
        assert_eq!(results[0], results[1]);
    }

    #[test]
    fn wrong_arguments_are_named_and_leave_the_group_whole() {
        let mut ranks = ThreadCollective::group(2, LONG);
        let first = &mut ranks[0];
        assert_eq!(first.send(0, &[]), Err(CollectiveError::Peer { rank: 0, size: 2 }));
        assert_eq!(first.recv(2, &mut []), Err(CollectiveError::Peer { rank: 2, size: 2 }));
        assert_eq!(first.broadcast(2, &mut []), Err(CollectiveError::Peer { rank: 2, size: 2 }));
        let length = CollectiveError::Length { found: 1, expected: 2 };
        assert_eq!(first.all_gather(&[1.0], &mut [0.0]), Err(length));
        first.send(1, &[1.0]).unwrap();
        assert_eq!(ranks[1].recv(0, &mut [0.0; 1]), Ok(()));
    }
}
