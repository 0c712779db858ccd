//! The compute threads: one parallel region at a time, its chunks handed out by an atomic counter.
//!
//! Made for cores that are not ours alone (the same process terminates TLS on them): a thread that is preempted
//! delays the one chunk it holds and nothing else, nobody spins longer than [`SPIN`], and a pool without work
//! sleeps. The caller works too, so a region never waits for a thread to wake up.
//!
//! Deliberately absent: nested parallelism (a region inside a chunk runs on its own thread), work stealing,
//! futures, pinning to cores.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::buffer::SharedMut;

/// How long a thread burns CPU in the hope of work: longer than the scalar code between two regions of a
/// layer (1-10 µs), shorter than what a sleep and a wake-up cost together (about 50 µs).
const SPIN: Duration = Duration::from_micros(20);

type Panic = Box<dyn Any + Send>;

/// A persistent set of threads. Dropping it ends and joins them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held during a region. Taken by nobody else: a nested or concurrent region runs on its own thread.
    region: Mutex<()>,
}

struct Shared {
    /// `epoch << 33 | OPEN | joined`: which region this is, whether threads may still join it, how many have.
    gate: AtomicU64,
    /// What to run. Written while the gate is closed and nobody is in, read by threads that joined.
    job: UnsafeCell<Option<Job>>,
    counter: Counter,
    stop: AtomicBool,
    /// Set by the caller before it sleeps until `joined` is 0.
    caller_waits: AtomicBool,
    caller_lock: Mutex<()>,
    caller_wake: Condvar,
    panic: Mutex<Option<Panic>>,
    sleepers: Vec<Sleeper>,
}

/// On a cache line of its own: every chunk is a write to it, and spinning threads read the gate.
#[repr(align(128))]
struct Counter(AtomicUsize);

#[derive(Default)]
struct Sleeper {
    parked: AtomicBool,
    thread: OnceLock<Thread>,
}

#[derive(Clone, Copy)]
struct Job {
    chunks: usize,
    /// Lifetime erased; see the safety comments in `run`.
    f: *const (dyn Fn(usize) + Sync),
}

// SAFETY: `job` is the only field that isn't already `Sync`, and the gate orders its accesses: the caller writes
// it while the gate is closed with nobody joined, and threads read it only between joining and leaving.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is to a `Sync` closure.
unsafe impl Send for Shared {}

const OPEN: u64 = 1 << 32;
const JOINED: u64 = OPEN - 1;

impl Pool {
    /// A pool in which `threads` threads compute, the caller of [`Pool::run`] being one of them. At least 1.
    ///
    /// Where the system refuses a thread, the pool does with fewer.
    pub fn new(threads: usize) -> Self {
        let extra = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            counter: Counter(AtomicUsize::new(0)),
            stop: AtomicBool::new(false),
            caller_waits: AtomicBool::new(false),
            caller_lock: Mutex::new(()),
            caller_wake: Condvar::new(),
            panic: Mutex::new(None),
            sleepers: (0..extra).map(|_| Sleeper::default()).collect(),
        });
        let workers = (0..extra)
            .map_while(|i| {
                let shared = Arc::clone(&shared);
                thread::Builder::new().name(format!("compute-{i}")).spawn(move || shared.work(i)).ok()
            })
            .collect();
        Self { shared, workers, region: Mutex::new(()) }
    }

    /// Threads that compute, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(0)` to `f(chunks - 1)`, each once, in any order, on any threads; returns when all have returned.
    ///
    /// For work of any size give at least 8 chunks per thread, so that a preempted thread delays little; for work
    /// below some 20 µs in all give 1, which runs here and now. If a chunk panics, chunks not yet begun are
    /// skipped and the panic goes on in the caller. Cancellation: none; chunks run to their end.
    pub fn run(&self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
        let region = if chunks > 1 && !self.workers.is_empty() { self.region.try_lock().ok() } else { None };
        let Some(_region) = region else {
            for chunk in 0..chunks {
                f(chunk);
            }
            return;
        };
        let shared = &*self.shared;
        // SAFETY: the lifetime ends before `f`'s does: below we close the gate and don't return before every
        // thread that joined has left, also when a chunk panics.
        let f_static: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(f) };
        let job = Job { chunks, f: f_static };
        let epoch = (shared.gate.load(Ordering::Relaxed) >> 33).wrapping_add(1);
        // SAFETY: the gate is closed and nobody is in (the last region saw to it), and we hold `region`.
        unsafe { *shared.job.get() = Some(job) };
        shared.counter.0.store(0, Ordering::Relaxed);
        shared.gate.store(epoch << 33 | OPEN, Ordering::SeqCst);
        for sleeper in &shared.sleepers {
            sleeper.wake();
        }
        shared.take_chunks(job);
        shared.gate.fetch_and(!OPEN, Ordering::SeqCst);
        shared.wait_until_left();
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(_region);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Cuts `out` into rows of `row_len` and these into chunks, and calls `f(first_row, rows)` for each, where
    /// `rows` is the part of `out` that begins at `first_row`. `rows_per_chunk` rows to a chunk, fewer in the last.
    pub fn run_rows<T: Send>(
        &self,
        out: &mut [T],
        row_len: usize,
        rows_per_chunk: usize,
        f: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        assert!(row_len > 0 && out.len().is_multiple_of(row_len), "whole rows");
        let rows = out.len() / row_len;
        let per_chunk = rows_per_chunk.max(1);
        let parts = SharedMut::new(out);
        self.run(rows.div_ceil(per_chunk), &|chunk| {
            let first = chunk * per_chunk;
            let count = per_chunk.min(rows - first);
            // SAFETY: chunks cover disjoint rows of `out`, which is borrowed until `run` returns.
            f(first, unsafe { parts.slice(first * row_len, count * row_len) });
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for sleeper in &self.shared.sleepers {
            sleeper.wake();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of chunks; it can't end with one.
            let _ = worker.join();
        }
    }
}

impl Sleeper {
    fn wake(&self) {
        // The load first: a swap would take the cache line from a thread that is awake.
        if self.parked.load(Ordering::SeqCst)
            && self.parked.swap(false, Ordering::SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }
}

impl Shared {
    /// Runs chunks until none is left. A panic is kept for the caller and ends the region early.
    fn take_chunks(&self, job: Job) {
        // SAFETY: we joined (or are the caller), so `Pool::run` is still waiting and `f` alive.
        let f = unsafe { &*job.f };
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let chunk = self.counter.0.fetch_add(1, Ordering::Relaxed);
                if chunk >= job.chunks {
                    return;
                }
                f(chunk);
            }
        }));
        if let Err(panic) = result {
            // Half of the range, not the end: the other threads' `fetch_add` must not wrap around.
            self.counter.0.store(usize::MAX / 2, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// The life of a worker thread.
    fn work(&self, index: usize) {
        let sleeper = &self.sleepers[index];
        sleeper.thread.get_or_init(thread::current);
        let mut done = 0;
        while let Some(epoch) = self.next_region(sleeper, done) {
            done = epoch;
            // SAFETY: we joined, so the caller has written the job and waits for us to leave.
            let job = unsafe { *self.job.get() };
            if let Some(job) = job {
                self.take_chunks(job);
            }
            let before = self.gate.fetch_sub(1, Ordering::SeqCst);
            if before & JOINED == 1 && self.caller_waits.load(Ordering::SeqCst) {
                drop(self.caller_lock.lock().unwrap_or_else(PoisonError::into_inner));
                self.caller_wake.notify_one();
            }
        }
    }

    /// Waits for a region newer than `done` and joins it. `None` when the pool is dropped.
    fn next_region(&self, sleeper: &Sleeper, done: u64) -> Option<u64> {
        loop {
            let mut joined = None;
            spin(|| {
                joined = self.try_join(done);
                joined.is_some() || self.stop.load(Ordering::Relaxed)
            });
            if joined.is_some() {
                return joined;
            }
            sleeper.parked.store(true, Ordering::SeqCst);
            // Looked at again after `parked` is visible, or a region opened in between would not wake us.
            let joined = self.try_join(done);
            if joined.is_some() || self.stop.load(Ordering::SeqCst) {
                sleeper.parked.store(false, Ordering::SeqCst);
                return joined;
            }
            while sleeper.parked.load(Ordering::SeqCst) {
                thread::park();
            }
        }
    }

    fn try_join(&self, done: u64) -> Option<u64> {
        let mut gate = self.gate.load(Ordering::SeqCst);
        while gate & OPEN != 0 && gate >> 33 != done {
            match self.gate.compare_exchange_weak(gate, gate + 1, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Some(gate >> 33),
                Err(now) => gate = now,
            }
        }
        None
    }

    fn wait_until_left(&self) {
        let left = || self.gate.load(Ordering::SeqCst) & JOINED == 0;
        if spin(left) {
            return;
        }
        let mut guard = self.caller_lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.caller_waits.store(true, Ordering::SeqCst);
        while !left() {
            guard = self.caller_wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_waits.store(false, Ordering::SeqCst);
        drop(guard);
    }
}

/// Polls for about 20 µs at most, before a thread goes to sleep. Whether `ready` was true.
pub fn spin(mut ready: impl FnMut() -> bool) -> bool {
    let mut start = None;
    loop {
        for _ in 0..64 {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.get_or_insert_with(Instant::now).elapsed() > SPIN {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    fn check_every_chunk_once(threads: usize, chunks: usize) {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads.max(1));
        for _ in 0..200 {
            let counts: Vec<AtomicU32> = (0..chunks).map(|_| AtomicU32::new(0)).collect();
            pool.run(chunks, &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn runs_every_chunk_once() {
        for (threads, chunks) in [(0, 3), (1, 0), (1, 5), (2, 0), (2, 1), (2, 2), (2, 33), (4, 7), (9, 100)] {
            check_every_chunk_once(threads, chunks);
        }
    }

    #[test]
    fn wakes_threads_that_went_to_sleep() {
        let pool = Pool::new(2);
        let sleeper = &pool.shared.sleepers[0];
        for _ in 0..20 {
            while !sleeper.parked.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            // Both chunks wait for each other: it ends only if the sleeping thread comes.
            let barrier = std::sync::Barrier::new(2);
            pool.run(2, &|_| {
                barrier.wait();
            });
        }
    }

    #[test]
    fn a_panic_in_any_chunk_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for bad in 0..8 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8, &|i| assert_ne!(i, bad, "chunk {i}"));
            }));
            let panic = result.unwrap_err();
            assert!(panic.downcast_ref::<String>().unwrap().contains(&format!("chunk {bad}")));
        }
        check_every_chunk_once(3, 10);
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn nested_and_concurrent_regions_finish() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(4, &|_| {
                            pool.run(4, &|_| {
                                sum.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 3 * 50 * 16);
    }

    #[test]
    fn rows_are_cut_without_gaps() {
        let pool = Pool::new(2);
        for rows in [0, 1, 5, 64] {
            for per_chunk in [0, 1, 3, 100] {
                let mut out = vec![0_u32; rows * 3];
                pool.run_rows(&mut out, 3, per_chunk, &|first, part| {
                    for (i, x) in part.iter_mut().enumerate() {
                        *x += (first * 3 + i) as u32 + 1;
                    }
                });
                assert!(out.iter().enumerate().all(|(i, &x)| x as usize == i + 1));
            }
        }
    }
}
