//! How fast a replica prefills, learned from the first tokens of the requests that it got.

use std::time::Duration;

/// Tokens per second assumed while no replica of a fleet was measured. Only the ratio between replicas matters for
/// placement; the absolute value shows in `retry-after` of the first seconds.
pub const PREFILL_RATE_PRIOR: f64 = 2_000.0;

/// Weight of a new sample of many tokens: the mean of about the last four.
const ALPHA: f64 = 0.25;

/// A sample of this many tokens has half the weight of a long one: below it the fixed time of a step and of the
/// network, and not the rate, decides how long the first token takes.
const SAMPLE_TOKENS_HALF: f64 = 256.0;

/// A measurement loses half of its weight in this time, so that a replica that was slow once is tried again.
const HALF_LIFE_S: f64 = 300.0;

/// Tokens per second that no accelerator leaves, so that one odd sample can't make a cost zero or infinite.
const RATE_MIN: f64 = 1.0;
const RATE_MAX: f64 = 10_000_000.0;

/// A replica's prefill rate: an exponentially weighted mean that fades with time.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Speed(Option<Measured>);

#[derive(Debug, Clone, Copy, PartialEq)]
struct Measured {
    tokens_per_s: f64,
    at: Duration,
}

impl Speed {
    /// Never measured.
    pub const UNKNOWN: Self = Self(None);

    /// Measured at `at` as exactly this. `at` counts from any fixed start, the same for the whole fleet.
    pub fn measured(tokens_per_s: f64, at: Duration) -> Self {
        Self(Some(Measured { tokens_per_s: clamp(tokens_per_s), at }))
    }

    /// The mean as last measured, tokens per second.
    pub fn last_measured(&self) -> Option<f64> {
        self.0.map(|m| m.tokens_per_s)
    }

    /// The rate to reckon with at `now`: the measurement, fading into `prior` with a half-life of five minutes.
    pub fn rate(&self, now: Duration, prior: f64) -> f64 {
        let Some(m) = self.0 else { return clamp(prior) };
        let age_s = now.saturating_sub(m.at).as_secs_f64();
        let weight = (-age_s / HALF_LIFE_S * std::f64::consts::LN_2).exp();
        clamp(weight * m.tokens_per_s + (1.0 - weight) * prior)
    }

    /// A first token came `elapsed` after a request was handed over: `tokens` uncached tokens (those before it in the
    /// queue and its own) were computed in that time.
    ///
    /// A first sample is taken as it is if it is long; a short one moves the mean little.
    #[must_use]
    pub fn on_first_token(self, now: Duration, tokens: u64, elapsed: Duration) -> Self {
        if tokens == 0 || elapsed.is_zero() {
            return self;
        }
        let tokens = tokens as f64;
        let sample = clamp(tokens / elapsed.as_secs_f64());
        let trust = tokens / (tokens + SAMPLE_TOKENS_HALF);
        match self.0 {
            None => Self::measured(trust * sample + (1.0 - trust) * PREFILL_RATE_PRIOR, now),
            Some(m) => {
                let weight = ALPHA * trust;
                Self::measured(weight * sample + (1.0 - weight) * m.tokens_per_s, now)
            }
        }
    }
}

fn clamp(rate: f64) -> f64 {
    // `f64::clamp` keeps NaN; a NaN cost would make every comparison false.
    if rate.is_nan() { PREFILL_RATE_PRIOR } else { rate.clamp(RATE_MIN, RATE_MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn samples_move_the_mean_by_their_length() {
        let check = |before: Speed, tokens: u64, elapsed: Duration, expect: f64| {
            let after = before.on_first_token(S, tokens, elapsed).last_measured().expect("measured");
            assert!(
                (after - expect).abs() < 1e-6,
                "{before:?} {tokens} {elapsed:?}: {after}, expected {expect}"
            );
        };
        // 256 tokens: trust 1/2. Unmeasured: half sample, half prior.
        check(Speed::UNKNOWN, 256, S, 0.5 * 256.0 + 0.5 * PREFILL_RATE_PRIOR);
        // Measured: weight 1/4 * 1/2.
        check(Speed::measured(1000.0, S), 256, S, 0.125 * 256.0 + 0.875 * 1000.0);
        // 768 tokens: trust 3/4.
        check(Speed::measured(1000.0, S), 768, S, 0.1875 * 768.0 + 0.8125 * 1000.0);
    }

    #[test]
    fn nothing_is_learned_from_nothing() {
        assert_eq!(Speed::UNKNOWN.on_first_token(S, 0, S), Speed::UNKNOWN);
        assert_eq!(Speed::UNKNOWN.on_first_token(S, 10, Duration::ZERO), Speed::UNKNOWN);
    }

    #[test]
    fn a_measurement_fades_into_the_prior() {
        let speed = Speed::measured(100.0, Duration::ZERO);
        let check = |age_s: u64, expect: f64| {
            let rate = speed.rate(Duration::from_secs(age_s), 1000.0);
            assert!((rate - expect).abs() < 1e-6, "after {age_s} s: {rate}, expected {expect}");
        };
        check(0, 100.0);
        check(300, 550.0);
        check(600, 775.0);
        assert_eq!(Speed::UNKNOWN.rate(S, 1000.0), 1000.0);
    }

    #[test]
    fn odd_samples_are_clamped() {
        let check = |rate: f64, expect: f64| assert_eq!(Speed::measured(rate, S).rate(S, 5.0), expect);
        check(0.0, RATE_MIN);
        check(-3.0, RATE_MIN);
        check(f64::INFINITY, RATE_MAX);
        check(f64::NAN, PREFILL_RATE_PRIOR);
    }
}
