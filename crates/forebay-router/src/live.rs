//! What is known about a replica right now, and the guard of a request that it was given.

use std::sync::Arc;
use std::time::Duration;

use forebay_kv::codec::LoadStat;
use forebay_observe::metrics::IntCounter;
use forebay_placement::{Load, ReplicaState, ReplicaView, Speed};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::config::HealthConfig;
use crate::health::{Health, Outlier, Turn};
use crate::metrics::ReplicaMetrics;

/// A report older than this counts for nothing: replicas repeat theirs every second.
const REPORT_AGE_MAX: Duration = Duration::from_secs(5);

/// Health, load and speed of one replica: shared by the router, the probes and every request in flight.
pub(crate) struct Live {
    state: Mutex<State>,
    metrics: ReplicaMetrics,
    /// Where the clock of [`Speed`] begins; one for the whole router.
    begun: Instant,
}

struct State {
    health: Health,
    outlier: Outlier,
    /// It refused vLLM's `continuous_usage_stats`, and is not asked for it again until it was down.
    counts_only_at_the_end: bool,
    /// A probe was answered well at least once.
    proved: bool,
    /// Of what we gave it.
    load: Load,
    report: Option<Report>,
    speed: Speed,
}

/// What a replica said about its load: also of what others gave it.
#[derive(Debug, Clone, Copy)]
struct Report {
    at: Instant,
    load: Load,
    /// What we gave it since.
    since: Load,
}

impl State {
    /// Our own count and the replica's, whichever is more: the report knows others' requests but lags behind, and our
    /// count knows what is on its way.
    fn load(&self) -> Load {
        let Some(report) = self.report.filter(|report| report.at.elapsed() < REPORT_AGE_MAX) else {
            return self.load;
        };
        Load {
            requests: self.load.requests.max(report.load.requests.saturating_add(report.since.requests)),
            queued_tokens: self
                .load
                .queued_tokens
                .max(report.load.queued_tokens + report.since.queued_tokens),
        }
    }
}

impl Live {
    pub(crate) fn new(metrics: ReplicaMetrics, begun: Instant) -> Arc<Self> {
        metrics.healthy.set(1);
        metrics.in_flight.set(0);
        metrics.queued_tokens.set(0);
        let state = State {
            health: Health::UP,
            outlier: Outlier::default(),
            counts_only_at_the_end: false,
            proved: false,
            load: Load::default(),
            report: None,
            speed: Speed::UNKNOWN,
        };
        Arc::new(Self { state: Mutex::new(state), metrics, begun })
    }

    pub(crate) fn view(&self) -> ReplicaView {
        let state = self.state.lock();
        let up = if state.health.is_up() { ReplicaState::Up } else { ReplicaState::Down };
        ReplicaView { state: up, load: state.load(), speed: state.speed }
    }

    /// The replica says what it has to do.
    pub(crate) fn on_report(&self, load: &LoadStat) {
        let reported = Load {
            requests: u32::try_from(load.running_requests.saturating_add(load.waiting_requests))
                .unwrap_or(u32::MAX),
            // Nothing that is added to it may overflow.
            queued_tokens: load.waiting_uncached_tokens.min(u64::from(u32::MAX)),
        };
        let mut state = self.state.lock();
        state.report = Some(Report { at: Instant::now(), load: reported, since: Load::default() });
        self.metrics.reported_requests.set(i64::from(reported.requests));
        self.metrics.reported_queued_tokens.set(reported.queued_tokens as i64);
    }

    pub(crate) fn on_probe(&self, good: bool, config: &HealthConfig) -> Option<Turn> {
        let mut state = self.state.lock();
        state.proved |= good;
        let turn = state.health.on_probe(good, config);
        self.note(&mut state, turn)
    }

    pub(crate) fn on_connect_error(&self) -> Option<Turn> {
        let mut state = self.state.lock();
        let turn = state.health.on_connect_error();
        self.note(&mut state, turn)
    }

    /// Whether it is left out because it kept failing.
    pub(crate) fn is_cooling(&self) -> bool {
        self.state.lock().outlier.is_cooling(self.begun.elapsed())
    }

    /// It began to answer a request.
    pub(crate) fn on_answer(&self) {
        self.state.lock().outlier.on_success();
    }

    /// It failed a request that another would not have failed. True if it is left out from now on.
    pub(crate) fn on_failed_answer(&self, config: &HealthConfig) -> bool {
        let cools = self.state.lock().outlier.on_failure(self.begun.elapsed(), config);
        if cools {
            self.metrics.cool_offs.inc();
        }
        cools
    }

    pub(crate) fn counts_as_it_goes(&self) -> bool {
        !self.state.lock().counts_only_at_the_end
    }

    pub(crate) fn on_counting_refused(&self) {
        self.state.lock().counts_only_at_the_end = true;
    }

    pub(crate) fn proved(&self) -> bool {
        self.state.lock().proved
    }

    /// Under the state's lock, so that the gauge ends up with the newest state.
    fn note(&self, state: &mut State, turn: Option<Turn>) -> Option<Turn> {
        match turn {
            Some(Turn::Up) => self.metrics.healthy.set(1),
            Some(Turn::Down) => {
                self.metrics.healthy.set(0);
                // What comes back is another process, and perhaps another version.
                state.outlier = Outlier::default();
                state.counts_only_at_the_end = false;
            }
            None => {}
        }
        turn
    }

    fn change_load(&self, change: impl FnOnce(&mut Load)) -> Load {
        let mut state = self.state.lock();
        change(&mut state.load);
        let load = state.load;
        // Under the lock, so that the gauges never end up with an older value than the state.
        self.metrics.in_flight.set(i64::from(load.requests));
        self.metrics.queued_tokens.set(load.queued_tokens as i64);
        load
    }
}

/// One request that a replica was given. Dropping it takes the request out of the replica's load.
#[must_use = "dropped at once, the request counts for nothing"]
pub(crate) struct InFlight {
    live: Arc<Live>,
    given: Instant,
    /// Uncached tokens of this request that still count as queued; 0 after its first token.
    queued: u64,
    /// Uncached tokens that had to be computed until this request's first token, its own included.
    ahead: u64,
    waiting: bool,
    /// Where nothing was looked up, nothing was expected: what the replica says is counted in its place.
    not_looked_up: Option<IntCounter>,
}

impl InFlight {
    /// Counts a request with so many uncached prompt tokens as given to the replica, now.
    pub(crate) fn begin(live: &Arc<Live>, uncached_tokens: u32) -> Self {
        let queued = u64::from(uncached_tokens);
        let load = live.change_load(|load| {
            load.requests += 1;
            load.queued_tokens += queued;
        });
        if let Some(report) = &mut live.state.lock().report {
            report.since.requests = report.since.requests.saturating_add(1);
            report.since.queued_tokens = report.since.queued_tokens.saturating_add(queued);
        }
        Self {
            live: Arc::clone(live),
            given: Instant::now(),
            queued,
            ahead: load.queued_tokens,
            waiting: true,
            not_looked_up: None,
        }
    }

    /// Nobody looked up what is cached: tokens that the replica says are count here too.
    pub(crate) fn expecting_nothing(mut self, matched_tokens: IntCounter) -> Self {
        self.not_looked_up = Some(matched_tokens);
        self
    }

    /// The replica says how much of the prompt it has cached: the guess is put right.
    pub(crate) fn on_started(&mut self, prompt_tokens: u32, cached_tokens: u32) {
        self.on_cached(cached_tokens);
        if !self.waiting {
            return;
        }
        let (was, is) = (self.queued, u64::from(prompt_tokens.saturating_sub(cached_tokens)));
        self.live.change_load(|load| load.queued_tokens = load.queued_tokens.saturating_sub(was) + is);
        self.queued = is;
        self.ahead = self.ahead.saturating_sub(was) + is;
    }

    /// The first token came: the prompt is computed, and the replica's speed is learned from how long that took.
    pub(crate) fn on_first_token(&mut self) {
        if !std::mem::take(&mut self.waiting) {
            return;
        }
        let (elapsed, now) = (self.given.elapsed(), self.live.begun.elapsed());
        self.learn(now, elapsed);
        self.release_queued();
    }

    pub(crate) fn on_cached(&self, cached_tokens: u32) {
        self.live.metrics.cached_tokens.inc_by(u64::from(cached_tokens));
        if let Some(matched) = &self.not_looked_up {
            matched.inc_by(u64::from(cached_tokens));
        }
    }

    fn learn(&self, now: Duration, elapsed: Duration) {
        let mut state = self.live.state.lock();
        state.speed = state.speed.on_first_token(now, self.ahead, elapsed);
    }

    fn release_queued(&mut self) {
        let queued = std::mem::take(&mut self.queued);
        self.live.change_load(|load| load.queued_tokens = load.queued_tokens.saturating_sub(queued));
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let queued = self.queued;
        self.live.change_load(|load| {
            load.requests = load.requests.saturating_sub(1);
            load.queued_tokens = load.queued_tokens.saturating_sub(queued);
        });
    }
}

#[cfg(test)]
mod tests {
    use forebay_observe::Registry;

    use super::*;
    use crate::metrics::Metrics;

    fn live() -> Arc<Live> {
        let metrics = Metrics::register(&Registry::new()).expect("registered once");
        Live::new(metrics.replica("m", "r"), Instant::now())
    }

    fn load(live: &Live) -> (u32, u64) {
        let load = live.view().load;
        (load.requests, load.queued_tokens)
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_counts_until_it_is_dropped() {
        let live = live();
        let mut first = InFlight::begin(&live, 100);
        let second = InFlight::begin(&live, 50);
        assert_eq!(load(&live), (2, 150));
        first.on_first_token();
        assert_eq!(load(&live), (2, 50));
        first.on_first_token();
        drop(first);
        assert_eq!(load(&live), (1, 50));
        drop(second);
        assert_eq!(load(&live), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn the_replica_knows_better_what_is_cached() {
        let live = live();
        let mut flight = InFlight::begin(&live, 100);
        flight.on_started(120, 112);
        assert_eq!(load(&live), (1, 8));
        flight.on_first_token();
        flight.on_started(120, 0);
        assert_eq!(load(&live), (1, 0));
    }

    /// Each line: what happens, and the load that placement sees after it.
    #[tokio::test(start_paused = true)]
    async fn a_report_tells_of_what_others_gave_it() {
        let live = live();
        let report = |running_requests, waiting_requests, waiting_uncached_tokens| {
            live.on_report(&LoadStat {
                running_requests,
                waiting_requests,
                waiting_uncached_tokens,
                ..LoadStat::default()
            });
        };
        let mine = InFlight::begin(&live, 100);
        assert_eq!(load(&live), (1, 100));
        // It has not come there yet.
        report(0, 0, 0);
        assert_eq!(load(&live), (1, 100));
        report(3, 2, 900);
        assert_eq!(load(&live), (5, 900));
        let more = InFlight::begin(&live, 50);
        assert_eq!(load(&live), (6, 950));
        report(6, 0, 0);
        assert_eq!(load(&live), (6, 150));
        drop((mine, more));
        assert_eq!(load(&live), (6, 0));
        report(u64::MAX, u64::MAX, u64::MAX);
        let _more = InFlight::begin(&live, u32::MAX);
        assert_eq!(load(&live).0, u32::MAX);
        // Nothing is heard any more.
        tokio::time::advance(REPORT_AGE_MAX).await;
        assert_eq!(load(&live), (1, u64::from(u32::MAX)));
    }

    #[tokio::test(start_paused = true)]
    async fn speed_is_learned_from_first_tokens_only() {
        let live = live();
        let before = InFlight::begin(&live, 744);
        let mut flight = InFlight::begin(&live, 1_304);
        tokio::time::advance(Duration::from_secs(2)).await;
        flight.on_first_token();
        // 2048 tokens in 2 s, 8/9 of trust, and a ninth of the prior of 2000.
        let learned = live.view().speed.last_measured().expect("measured");
        assert!((learned - (1024.0 * 8.0 + 2000.0) / 9.0).abs() < 1e-6, "{learned}");
        // A request that fails teaches nothing.
        drop(before);
        assert_eq!(live.view().speed.last_measured(), Some(learned));
    }
}
