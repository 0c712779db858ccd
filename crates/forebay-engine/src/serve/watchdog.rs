//! Sees that a step takes too long: says what the step was and of whom, counts it, and makes the engine not ready.
//!
//! The thread that computes writes what it begins and when it is done into a few atomics, and who is in the step into a list
//! that it only tries to lock; a thread of its own looks at them. Who computes waits for nobody. A step is one of the step
//! loop, or a batch of an embedding engine.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use forebay_config::HumanDuration;
use forebay_observe::metrics::IntCounter;
use forebay_types::RequestId;
use parking_lot::Mutex;

/// Steps whose times are kept.
const LAST_STEPS: usize = 4;
/// The watching thread looks a few times per limit, so that a step is noticed soon after it.
const LOOKS_PER_LIMIT: u32 = 4;
/// Sequences that are named in the log.
const NAMED_MAX: usize = 64;

/// What a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct StepShape {
    pub tokens: u64,
    pub sequences: u64,
    pub running: u64,
    pub waiting: u64,
    pub blocks_used: u64,
}

/// One sequence of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InStep {
    pub request: RequestId,
    /// The scheduler's number of it.
    pub seq: u64,
    /// How many of its tokens the step computes: one of a decode.
    pub tokens: usize,
    /// The place of the first of them.
    pub position: u32,
}

/// What a step is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    Model,
    /// Waiting for the masks of constraints.
    Masks,
    Sampling,
}

impl Phase {
    const ALL: [Self; 3] = [Self::Model, Self::Masks, Self::Sampling];
}

/// Watches one engine, until it is dropped.
pub(super) struct Watchdog {
    heartbeat: Arc<Heartbeat>,
    /// The longest that a step may take; `None` where nobody watches.
    limit: Option<Duration>,
    /// Ends the watching thread when it is dropped.
    _engine: Sender<()>,
}

impl Watchdog {
    /// A `limit` of zero is none.
    pub(super) fn start(limit: HumanDuration, model: &str, stuck_steps: IntCounter) -> io::Result<Self> {
        let heartbeat = Arc::new(Heartbeat::new());
        let limit = Some(limit.get()).filter(|limit| !limit.is_zero());
        let (watched, engine) = channel();
        if let Some(limit) = limit {
            let (heartbeat, model) = (heartbeat.clone(), model.to_owned());
            std::thread::Builder::new()
                .name("forebay-watchdog".into())
                .spawn(move || watch(&heartbeat, limit, &model, &stuck_steps, &engine))?;
        }
        Ok(Self { heartbeat, limit, _engine: watched })
    }

    /// What the thread that computes writes to.
    pub(super) fn heartbeat(&self) -> Arc<Heartbeat> {
        self.heartbeat.clone()
    }

    /// Who is in the step that is computed, or in the last one.
    #[cfg(test)]
    pub(super) fn in_step(&self) -> String {
        self.heartbeat.names()
    }

    /// Whether a step takes longer than the limit. It may still come back.
    pub(super) fn sees_stuck_step(&self) -> bool {
        self.limit.is_some_and(|limit| self.heartbeat.stuck(self.heartbeat.now(), limit).is_some())
    }
}

/// What the thread that computes is doing. Written by it alone.
#[derive(Debug)]
pub(super) struct Heartbeat {
    origin: Instant,
    /// Microseconds since `origin` at which the step began, plus 1; 0 between steps.
    begun: AtomicU64,
    phase: AtomicU8,
    in_step: Mutex<Vec<InStep>>,
    tokens: AtomicU64,
    sequences: AtomicU64,
    running: AtomicU64,
    waiting: AtomicU64,
    blocks_used: AtomicU64,
    steps: AtomicU64,
    /// Microseconds that the last steps took, by their number.
    last: [AtomicU64; LAST_STEPS],
}

/// A step that has not come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stuck {
    /// Tells one step from the next.
    begun: u64,
    since: Duration,
    phase: Phase,
    shape: StepShape,
}

impl Heartbeat {
    fn new() -> Self {
        Self {
            origin: Instant::now(),
            begun: AtomicU64::new(0),
            phase: AtomicU8::new(Phase::Model as u8),
            in_step: Mutex::default(),
            tokens: AtomicU64::new(0),
            sequences: AtomicU64::new(0),
            running: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            blocks_used: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            last: Default::default(),
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// Says who is in the step that begins; not at all while somebody reads of the last one.
    pub(super) fn list(&self, in_step: impl Iterator<Item = InStep>) {
        if let Some(mut list) = self.in_step.try_lock() {
            list.clear();
            list.extend(in_step);
        }
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(super) fn begin(&self, now: Duration, shape: &StepShape) {
        self.enter(Phase::Model);
        self.tokens.store(shape.tokens, Ordering::Relaxed);
        self.sequences.store(shape.sequences, Ordering::Relaxed);
        self.running.store(shape.running, Ordering::Relaxed);
        self.waiting.store(shape.waiting, Ordering::Relaxed);
        self.blocks_used.store(shape.blocks_used, Ordering::Relaxed);
        self.begun.store(micros(now) + 1, Ordering::Release);
    }

    pub(super) fn end(&self, now: Duration) {
        let begun = self.begun.swap(0, Ordering::Release);
        let nth = self.steps.fetch_add(1, Ordering::Relaxed);
        let took = (micros(now) + 1).saturating_sub(begun);
        self.last[nth as usize % LAST_STEPS].store(took, Ordering::Relaxed);
    }

    /// The step that has been computed for `limit` or longer at `now`.
    fn stuck(&self, now: Duration, limit: Duration) -> Option<Stuck> {
        let begun = self.begun.load(Ordering::Acquire);
        let since = Duration::from_micros((micros(now) + 1).saturating_sub(begun));
        let shape = StepShape {
            tokens: self.tokens.load(Ordering::Relaxed),
            sequences: self.sequences.load(Ordering::Relaxed),
            running: self.running.load(Ordering::Relaxed),
            waiting: self.waiting.load(Ordering::Relaxed),
            blocks_used: self.blocks_used.load(Ordering::Relaxed),
        };
        let phase = Phase::ALL[usize::from(self.phase.load(Ordering::Relaxed))];
        (begun != 0 && since >= limit).then_some(Stuck { begun, since, phase, shape })
    }

    /// Who is in the step, for people.
    fn names(&self) -> String {
        let list = self.in_step.lock();
        let name = |InStep { request, seq, tokens, position }: &InStep| {
            format!("{request} (sequence {seq}): {tokens} from {position}")
        };
        let mut names: Vec<String> = list.iter().take(NAMED_MAX).map(name).collect();
        if list.len() > NAMED_MAX {
            names.push(format!("{} more", list.len() - NAMED_MAX));
        }
        names.join(", ")
    }

    /// What the last steps took, newest first.
    fn last_steps(&self) -> Vec<Duration> {
        let steps = self.steps.load(Ordering::Relaxed) as usize;
        let at = |back: usize| self.last[(steps - back) % LAST_STEPS].load(Ordering::Relaxed);
        (1..=steps.min(LAST_STEPS)).map(|back| Duration::from_micros(at(back))).collect()
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX - 1)
}

/// Watches until the engine is gone, which closes `engine`.
fn watch(
    heartbeat: &Heartbeat,
    limit: Duration,
    model: &str,
    stuck_steps: &IntCounter,
    engine: &Receiver<()>,
) {
    let mut told: Option<Stuck> = None;
    let pause = (limit / LOOKS_PER_LIMIT).max(Duration::from_millis(1));
    while engine.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
        let stuck = heartbeat.stuck(heartbeat.now(), limit);
        let same = |a: Stuck, b: Stuck| a.begun == b.begun;
        if let Some(before) = told
            && !stuck.is_some_and(|now| same(now, before))
        {
            tracing::warn!(model, "the step that took so long is done; the engine goes on");
            told = None;
        }
        let Some(stuck) = stuck.filter(|_| told.is_none()) else { continue };
        let StepShape { tokens, sequences, running, waiting, blocks_used } = stuck.shape;
        tracing::error!(
            model,
            since_ms = stuck.since.as_millis() as u64,
            phase = ?stuck.phase,
            tokens,
            sequences,
            running,
            waiting,
            blocks_used,
            last_steps = ?heartbeat.last_steps(),
            in_step = heartbeat.names(),
            "a step takes longer than `engine.watchdog`; the engine is not ready until it is done"
        );
        stuck_steps.inc();
        told = Some(stuck);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_step_that_is_computed_too_long_is_stuck() {
        let ms = Duration::from_millis;
        let heartbeat = Heartbeat::new();
        let shape = StepShape { tokens: 7, sequences: 2, running: 2, waiting: 1, blocks_used: 3 };
        assert_eq!(heartbeat.stuck(ms(9999), ms(10)), None, "nothing is computed");
        heartbeat.begin(ms(0), &shape);
        assert_eq!(heartbeat.stuck(ms(9), ms(10)), None);
        let stuck = heartbeat.stuck(ms(10), ms(10)).expect("it is over the limit");
        assert_eq!((stuck.since, stuck.phase, stuck.shape), (ms(10), Phase::Model, shape));
        heartbeat.enter(Phase::Sampling);
        assert_eq!(heartbeat.stuck(ms(10), ms(10)).map(|stuck| stuck.phase), Some(Phase::Sampling));
        heartbeat.end(ms(12));
        assert_eq!(heartbeat.stuck(ms(9999), ms(10)), None, "it has come back");
        for n in 1..=5u64 {
            heartbeat.begin(ms(100 * n), &shape);
            heartbeat.end(ms(100 * n + n));
        }
        assert_eq!(heartbeat.last_steps(), [ms(5), ms(4), ms(3), ms(2)]);
        assert_eq!(heartbeat.stuck(ms(9999), ms(10)), None);
        heartbeat.begin(ms(9999), &shape);
        let stuck = heartbeat.stuck(ms(99_999), ms(10)).expect("it is over the limit");
        assert_eq!(stuck.phase, Phase::Model, "a new step");
    }

    #[test]
    fn who_is_in_the_step_is_named() {
        let heartbeat = Heartbeat::new();
        let one = |n: u64| InStep { request: format!("r{n}").into(), seq: n, tokens: 1, position: 7 };
        heartbeat.list([InStep { tokens: 5, position: 0, ..one(1) }, one(2)].into_iter());
        assert_eq!(heartbeat.names(), "r1 (sequence 1): 5 from 0, r2 (sequence 2): 1 from 7");
        heartbeat.list((0..NAMED_MAX as u64 + 3).map(one));
        assert!(heartbeat.names().ends_with("r63 (sequence 63): 1 from 7, 3 more"));
        let held = heartbeat.in_step.lock();
        heartbeat.list(std::iter::empty());
        assert_eq!(held.len(), NAMED_MAX + 3, "who computes does not wait");
    }
}
