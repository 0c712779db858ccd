//! One limit: a bucket that refills continuously.

use std::time::Duration;

/// A limit as `x-ratelimit-*` headers tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub limit: u64,
    /// Whole units that could be taken now; 0 in debt.
    pub remaining: u64,
    /// Until the bucket is full again, if nothing more is taken.
    pub reset: Duration,
}

/// Units at a point in time, counted in `units × window_ns`.
///
/// In this scale a nanosecond refills exactly `limit`, so that no rounding creates or loses units over months of
/// small steps. 128 bits hold 2^63 units with windows of 2^63 ns.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    limit: u64,
    window_ns: i128,
    /// At most `full()`; below 0 is debt.
    level: i128,
    at: Duration,
}

impl Bucket {
    /// Full at `now`. `limit` and `window` are at least 1 unit and 1 ns.
    pub(crate) fn new(limit: u64, window: Duration, now: Duration) -> Self {
        let limit = limit.clamp(1, i64::MAX as u64);
        let window_ns = i128::from(i64::try_from(window.as_nanos()).unwrap_or(i64::MAX).max(1));
        Self { limit, window_ns, level: i128::from(limit) * window_ns, at: now }
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    fn scaled(&self, units: u64) -> i128 {
        i128::from(units.min(i64::MAX as u64)) * self.window_ns
    }

    fn full(&self) -> i128 {
        self.scaled(self.limit)
    }

    /// Refills up to `now`. A `now` before the last one changes nothing.
    pub(crate) fn advance(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.at);
        let elapsed_ns = i128::from(i64::try_from(elapsed.as_nanos()).unwrap_or(i64::MAX));
        self.level = self.full().min(self.level + elapsed_ns * i128::from(self.limit));
        self.at = self.at.max(now);
    }

    /// `Ok` where `units` are there, else how long until they are; `None` is never.
    pub(crate) fn check(&self, units: u64) -> Result<(), Option<Duration>> {
        let missing = self.scaled(units) - self.level;
        if missing <= 0 {
            return Ok(());
        }
        Err((units <= self.limit).then(|| self.refill_time(missing)))
    }

    /// Rounded up, so that whoever waits this long finds the units.
    fn refill_time(&self, missing: i128) -> Duration {
        let limit = i128::from(self.limit);
        let ns = (missing + limit - 1) / limit;
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// Takes units without asking. Debt ends at one full bucket: a call that used far more than it held stops its
    /// consumer for at most two windows, and is forgiven the rest.
    pub(crate) fn take(&mut self, units: u64) {
        self.level = (self.level - self.scaled(units)).max(-self.full());
    }

    pub(crate) fn give_back(&mut self, units: u64) {
        self.level = self.full().min(self.level + self.scaled(units));
    }

    pub(crate) fn window(&self) -> Window {
        let remaining = u64::try_from(self.level.max(0) / self.window_ns).unwrap_or(0);
        Window { limit: self.limit, remaining, reset: self.refill_time(self.full() - self.level) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn refills_exactly_in_any_steps() {
        let mut bucket = Bucket::new(7, MINUTE, Duration::ZERO);
        bucket.take(7);
        // 7 units per minute: 1 ns steps would round to nothing in whole units.
        let step = Duration::from_nanos(333_333_333);
        for i in 1..=180 {
            bucket.advance(step * i);
        }
        assert_eq!(bucket.window().remaining, 6);
        bucket.advance(MINUTE);
        assert_eq!(bucket.window(), Window { limit: 7, remaining: 7, reset: Duration::ZERO });
    }

    #[test]
    fn says_when() {
        let mut bucket = Bucket::new(60, MINUTE, Duration::ZERO);
        bucket.take(60);
        let check = |bucket: &Bucket, units, expect| assert_eq!(bucket.check(units), expect, "{units}");
        check(&bucket, 1, Err(Some(Duration::from_secs(1))));
        check(&bucket, 60, Err(Some(MINUTE)));
        check(&bucket, 61, Err(None));
        check(&bucket, 0, Ok(()));
        bucket.advance(Duration::from_millis(500));
        check(&bucket, 1, Err(Some(Duration::from_millis(500))));
        bucket.advance(Duration::from_secs(1));
        check(&bucket, 1, Ok(()));
    }

    #[test]
    fn debt_is_bounded_and_paid_first() {
        let mut bucket = Bucket::new(60, MINUTE, Duration::ZERO);
        bucket.take(1_000_000);
        assert_eq!(bucket.window(), Window { limit: 60, remaining: 0, reset: MINUTE * 2 });
        bucket.advance(MINUTE);
        assert_eq!(bucket.check(1), Err(Some(Duration::from_secs(1))));
    }

    #[test]
    fn time_that_goes_back_changes_nothing() {
        let mut bucket = Bucket::new(60, MINUTE, MINUTE);
        bucket.take(60);
        bucket.advance(Duration::ZERO);
        bucket.advance(MINUTE);
        assert_eq!(bucket.window().remaining, 0);
    }

    #[test]
    fn extremes_do_not_overflow() {
        let mut bucket = Bucket::new(u64::MAX, Duration::MAX, Duration::ZERO);
        bucket.take(u64::MAX);
        bucket.take(u64::MAX);
        bucket.advance(Duration::MAX);
        bucket.give_back(u64::MAX);
        bucket.give_back(u64::MAX);
        bucket.window();
    }
}
