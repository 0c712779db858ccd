//! The driver: sends each request when it is due, and collects the results.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use crate::arrivals::Arrivals;
use crate::error::{Failure, FailureKind, LoadError};
use crate::options::{Load, Options, Prompts, Until};
use crate::prompts::PromptMaker;
use crate::report::Report;
use crate::request::{Timing, perform};
use crate::tally::Tally;
use crate::target::Target;

/// A request of an open load that is sent later than this after it was due counts as delayed. Well above a timer's
/// millisecond, well below what a queue costs.
pub(crate) const LATE: Duration = Duration::from_millis(10);

/// Time between two calls of [`Progress::on_progress`].
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Number of the first warm-up request: no measured run gets there, so none repeats a warm-up prompt.
const WARMUP_FIRST: u64 = 1 << 62;

/// What the run is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    WarmUp,
    Measure,
}

/// How far a phase is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Snapshot {
    pub phase: Phase,
    /// Completed and failed requests of this phase.
    pub done: u64,
    pub failed: u64,
    pub in_flight: usize,
    /// Requests of this phase, where their number is what ends it.
    pub total: Option<u64>,
    pub elapsed: Duration,
    /// Of the whole phase so far, as pieces of streams.
    pub output_tokens_per_second: f64,
}

/// Told about five times a second, and at the end of each phase. Called on the driver's task: return quickly.
pub trait Progress: Send + Sync {
    fn on_progress(&self, snapshot: &Snapshot);
}

/// Shows nothing.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn on_progress(&self, _: &Snapshot) {}
}

/// Runs a load to its end. Failed requests are part of the report, also where all failed.
///
/// # Errors
/// See [`LoadError`]: the options, the server's model list, or a warm-up in which nothing worked.
///
/// Cancellation: guarded; dropping the future closes all connections.
pub async fn run(options: &Options, progress: &dyn Progress) -> Result<Report, LoadError> {
    run_until(options, progress, std::future::pending()).await
}

/// Like [`run`], but ends early when `stop` is ready: requests in flight are given up and counted as abandoned, and
/// the report is of what was done.
pub async fn run_until(
    options: &Options,
    progress: &dyn Progress,
    stop: impl Future<Output = ()> + Send,
) -> Result<Report, LoadError> {
    options.validate()?;
    let target = Target::new(options)?;
    let model = match &options.model {
        Some(model) => model.clone(),
        None => target.first_model().await?,
    };
    let tokens_per_word = match options.prompts {
        Prompts::Synthetic { .. } => target.tokens_per_word(&model, options.seed).await,
        Prompts::File(_) => None,
    };
    let prompts = PromptMaker::new(options, &model, tokens_per_word.unwrap_or(1.0))?;
    let url = target.root.clone();
    let shared = Arc::new(Shared {
        target,
        prompts,
        stream: options.stream,
        timeout: options.request_timeout,
        live_tokens: AtomicU64::new(0),
    });

    let mut stop = pin!(stop);
    let mut stopped = false;
    if options.warmup_requests > 0 {
        // At the closed load's concurrency, so that its connections are open when the measured part begins. An open
        // load's rate would make a warm-up of a few requests take long.
        let load = match options.load {
            Load::Concurrency(n) => Load::Concurrency(n),
            Load::Poisson { .. } | Load::Constant { .. } => Load::Concurrency(1),
        };
        let until = Until::Requests(options.warmup_requests);
        let warm_up =
            Part { phase: Phase::WarmUp, load, until, first_index: WARMUP_FIRST, seed: options.seed };
        let (tally, _) = drive(&shared, &warm_up, progress, stop.as_mut(), &mut stopped).await;
        if tally.completed == 0
            && let Some((kind, count)) = tally.failures.into_iter().next()
        {
            return Err(LoadError::WarmUp { failure: Failure { kind, message: count.first_message } });
        }
    }
    let measure = Part {
        phase: Phase::Measure,
        load: options.load,
        until: options.until,
        first_index: 0,
        seed: options.seed,
    };
    let (tally, duration) = drive(&shared, &measure, progress, stop.as_mut(), &mut stopped).await;
    Ok(Report::new(options, url, model, tokens_per_word, duration, stopped, tally))
}

/// What all requests of a run use.
struct Shared {
    target: Target,
    prompts: PromptMaker,
    stream: bool,
    timeout: Duration,
    live_tokens: AtomicU64,
}

/// The warm-up, or the measured part.
struct Part {
    phase: Phase,
    load: Load,
    until: Until,
    first_index: u64,
    seed: u64,
}

/// Sends one part's requests and waits for the last. Gives back the results and the time from the first request to
/// the last reply.
async fn drive<Stop: Future<Output = ()> + Send>(
    shared: &Arc<Shared>,
    part: &Part,
    progress: &dyn Progress,
    mut stop: Pin<&mut Stop>,
    stopped: &mut bool,
) -> (Tally, Duration) {
    let mut tally = Tally::default();
    let mut tasks: JoinSet<Result<Timing, Failure>> = JoinSet::new();
    let mut arrivals = Arrivals::new(part.load, part.seed).peekable();
    let mut sent = 0;
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let in_flight_max = part.load.in_flight_max() as usize;
    let total = match part.until {
        Until::Requests(n) => Some(n),
        Until::Duration(_) => None,
    };
    shared.live_tokens.store(0, Ordering::Relaxed);
    let begin = Instant::now();
    let snapshot = |tally: &Tally, in_flight: usize| {
        let elapsed = begin.elapsed();
        let tokens = shared.live_tokens.load(Ordering::Relaxed) as f64;
        Snapshot {
            phase: part.phase,
            done: tally.completed + tally.failed,
            failed: tally.failed,
            in_flight,
            total,
            elapsed,
            output_tokens_per_second: tokens / elapsed.as_secs_f64().max(1e-9),
        }
    };

    loop {
        let now = Instant::now();
        let more = !*stopped
            && match part.until {
                Until::Requests(n) => sent < n,
                Until::Duration(length) => now - begin < length,
            };
        if !more && tasks.is_empty() {
            break;
        }
        // A closed load's request is due when there is room for it.
        let due = begin + arrivals.peek().copied().unwrap_or(now - begin);
        let room = tasks.len() < in_flight_max;
        if more && room && due <= now {
            arrivals.next();
            tally.delayed += u64::from(part.load.per_second().is_some() && now - due > LATE);
            let (shared, index) = (shared.clone(), part.first_index + sent);
            tasks.spawn(async move {
                let body = shared.prompts.body(index);
                perform(&shared.target, body, shared.stream, shared.timeout, &shared.live_tokens).await
            });
            sent += 1;
            tally.in_flight_peak = tally.in_flight_peak.max(tasks.len());
            continue;
        }
        // The end of a timed run is a moment too: without it, an open load would wait for an arrival after the end.
        let wake = match part.until {
            Until::Requests(_) => due,
            Until::Duration(length) => due.min(begin + length),
        };
        tokio::select! {
            Some(result) = tasks.join_next() => tally.record(flatten(result)),
            () = tokio::time::sleep_until(wake), if more && (room || wake > now) => {}
            _ = tick.tick() => progress.on_progress(&snapshot(&tally, tasks.len())),
            () = stop.as_mut(), if !*stopped => {
                *stopped = true;
                tally.abandoned = tasks.len() as u64;
                tasks.shutdown().await;
            }
        }
    }
    let duration = begin.elapsed();
    progress.on_progress(&snapshot(&tally, 0));
    (tally, duration)
}

fn flatten(result: Result<Result<Timing, Failure>, tokio::task::JoinError>) -> Result<Timing, Failure> {
    // A task ends early only by a panic of ours: it shows in the report rather than ending the run.
    result.unwrap_or_else(|error| Err(Failure::new(FailureKind::BadAnswer, &error.to_string())))
}
