//! One limit: a bucket that refills continuously.

use std::collections::BTreeMap;
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
///
/// **Invariant:** `level + claimed <= full`. What is held may come back, so it counts as if it were still in the bucket:
/// refill beyond the brim takes away the oldest claims to a refund. Without that a consumer could hold much for a long
/// time, use little of it, and have all of it back at once on top of a bucket that has refilled meanwhile.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    limit: u64,
    window_ns: i128,
    /// At most `full()`; below 0 is debt.
    level: i128,
    at: Duration,
    /// What each hold may still get back, oldest first.
    claims: BTreeMap<ClaimId, i128>,
    /// Sum of `claims`.
    claimed: i128,
    next_claim: u64,
}

/// One hold's claim to a refund.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ClaimId(u64);

impl Bucket {
    /// Full at `now`. `limit` and `window` are at least 1 unit and 1 ns.
    pub(crate) fn new(limit: u64, window: Duration, now: Duration) -> Self {
        let limit = limit.clamp(1, i64::MAX as u64);
        let window_ns = i128::from(i64::try_from(window.as_nanos()).unwrap_or(i64::MAX).max(1));
        Self {
            limit,
            window_ns,
            level: i128::from(limit) * window_ns,
            at: now,
            claims: BTreeMap::new(),
            claimed: 0,
            next_claim: 0,
        }
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
        let full = self.full();
        while self.level + self.claimed > full {
            let Some(mut oldest) = self.claims.first_entry() else { break };
            let over = self.level + self.claimed - full;
            let lost = over.min(*oldest.get());
            self.claimed -= lost;
            *oldest.get_mut() -= lost;
            if *oldest.get() == 0 {
                oldest.remove();
            }
        }
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

    /// Takes units that may come back. The caller has checked that they are there.
    pub(crate) fn take(&mut self, units: u64) -> ClaimId {
        let scaled = self.scaled(units);
        self.level -= scaled;
        let id = ClaimId(self.next_claim);
        self.next_claim += 1;
        if scaled > 0 {
            self.claims.insert(id, scaled);
            self.claimed += scaled;
        }
        id
    }

    /// Ends a claim on `taken` units of which `used` were used. More than was taken becomes debt. Debt ends at one full
    /// bucket: a call that used far more than it held stops its consumer for at most two windows, and is forgiven the
    /// rest.
    pub(crate) fn settle(&mut self, claim: ClaimId, taken: u64, used: u64) {
        let claim = self.claims.remove(&claim).unwrap_or(0);
        self.claimed -= claim;
        if used > taken {
            self.level = (self.level - self.scaled(used - taken)).max(-self.full()).min(self.level);
        } else {
            self.level += self.scaled(taken - used).min(claim);
        }
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

    fn use_up(bucket: &mut Bucket, units: u64) {
        let claim = bucket.take(units);
        bucket.settle(claim, units, units);
    }

    #[test]
    fn refills_exactly_in_any_steps() {
        let mut bucket = Bucket::new(7, MINUTE, Duration::ZERO);
        use_up(&mut bucket, 7);
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
        use_up(&mut bucket, 60);
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
        let claim = bucket.take(10);
        bucket.settle(claim, 10, 1_000_000);
        assert_eq!(bucket.window(), Window { limit: 60, remaining: 0, reset: MINUTE * 2 });
        bucket.advance(MINUTE);
        assert_eq!(bucket.check(1), Err(Some(Duration::from_secs(1))));
    }

    #[test]
    fn time_that_goes_back_changes_nothing() {
        let mut bucket = Bucket::new(60, MINUTE, MINUTE);
        use_up(&mut bucket, 60);
        bucket.advance(Duration::ZERO);
        bucket.advance(MINUTE);
        assert_eq!(bucket.window().remaining, 0);
    }

    #[test]
    fn a_refund_does_not_come_on_top_of_refill() {
        let mut bucket = Bucket::new(60, MINUTE, Duration::ZERO);
        let long = bucket.take(60);
        bucket.advance(MINUTE / 2);
        let later = bucket.take(30);
        assert_eq!(bucket.window().remaining, 0);
        // The half that was refilled meanwhile was this hold's; a bucket that nothing was taken from would have spilled.
        bucket.settle(long, 60, 0);
        assert_eq!(bucket.window().remaining, 30);
        bucket.settle(later, 30, 0);
        assert_eq!(bucket.window().remaining, 60);
    }

    #[test]
    fn extremes_do_not_overflow() {
        let mut bucket = Bucket::new(u64::MAX, Duration::MAX, Duration::ZERO);
        let claims = [bucket.take(u64::MAX), bucket.take(u64::MAX)];
        bucket.advance(Duration::MAX);
        claims.into_iter().for_each(|claim| bucket.settle(claim, 0, u64::MAX));
        bucket.window();
    }
}
