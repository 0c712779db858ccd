//! Times of many requests in bounded memory, and their percentiles.

use std::time::Duration;

use rand_core::{Rng as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;

/// Kept at most per series: 8 MiB.
const KEPT_MAX: usize = 1 << 20;

/// Durations as they come in.
///
/// Up to 2^20 of them percentiles are exact; beyond that they are those of a uniform sample of that size (Vitter's
/// algorithm R, seeded), which puts a p99 within about 0.02 percentile points. Count, mean, deviation and extremes
/// are always exact.
#[derive(Debug, Clone)]
pub struct Samples {
    nanos: Vec<u64>,
    kept_max: usize,
    count: u64,
    min: u64,
    max: u64,
    mean: f64,
    /// Sum of squared distances from the mean.
    spread: f64,
    rng: Pcg64Mcg,
}

/// A series in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    pub mean: f64,
    pub std: f64,
    pub min: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
}

impl Default for Samples {
    fn default() -> Self {
        Self::keeping(KEPT_MAX)
    }
}

impl Samples {
    fn keeping(kept_max: usize) -> Self {
        Self {
            nanos: Vec::new(),
            kept_max,
            count: 0,
            min: u64::MAX,
            max: 0,
            mean: 0.0,
            spread: 0.0,
            rng: Pcg64Mcg::seed_from_u64(0),
        }
    }

    pub fn push(&mut self, sample: Duration) {
        let nanos = u64::try_from(sample.as_nanos()).unwrap_or(u64::MAX);
        self.count += 1;
        self.min = self.min.min(nanos);
        self.max = self.max.max(nanos);
        // Welford: stable also where the deviation is tiny against the mean.
        let distance = nanos as f64 - self.mean;
        self.mean += distance / self.count as f64;
        self.spread += distance * (nanos as f64 - self.mean);
        if self.nanos.len() < self.kept_max {
            self.nanos.push(nanos);
        } else {
            // Each of the `count` samples stays with the same chance; the bias of `%` is count / 2^64.
            let place = self.rng.next_u64() % self.count;
            if let Some(kept) = usize::try_from(place).ok().and_then(|place| self.nanos.get_mut(place)) {
                *kept = nanos;
            }
        }
    }

    /// All samples ever pushed.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether percentiles are of all samples.
    pub fn is_exact(&self) -> bool {
        self.count as usize == self.nanos.len()
    }

    /// `None` without samples. O(n log n).
    pub fn summary(&self) -> Option<Summary> {
        let mut sorted = self.nanos.clone();
        sorted.sort_unstable();
        let last = sorted.len().checked_sub(1)?;
        let ms = |nanos: f64| nanos / 1e6;
        // numpy's default, which vLLM's benchmark uses: linear between the two nearest ranks.
        let at = |percent: f64| {
            let rank = percent / 100.0 * last as f64;
            let below = sorted[rank.floor() as usize] as f64;
            let above = sorted[rank.ceil() as usize] as f64;
            ms(below + (above - below) * rank.fract())
        };
        Some(Summary {
            mean: ms(self.mean),
            std: ms((self.spread / self.count as f64).sqrt()),
            min: ms(self.min as f64),
            p50: at(50.0),
            p90: at(90.0),
            p95: at(95.0),
            p99: at(99.0),
            max: ms(self.max as f64),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(kept_max: usize, ms: impl IntoIterator<Item = u64>) -> Samples {
        let mut samples = Samples::keeping(kept_max);
        for ms in ms {
            samples.push(Duration::from_millis(ms));
        }
        samples
    }

    /// Expected values are numpy's: `numpy.percentile([...], p)`.
    #[test]
    fn percentiles() {
        let check = |ms: &[u64], p50: f64, p90: f64, p99: f64| {
            let s = of(100, ms.iter().copied()).summary().expect("there are samples");
            for (found, expect) in [(s.p50, p50), (s.p90, p90), (s.p99, p99)] {
                assert!((found - expect).abs() < 1e-9, "{ms:?}: {found} is not {expect}");
            }
        };
        check(&[7], 7.0, 7.0, 7.0);
        check(&[2, 1], 1.5, 1.9, 1.99);
        check(&[1, 2, 3, 4, 100], 3.0, 61.6, 96.16);
        check(&[10, 9, 8, 7, 6, 5, 4, 3, 2, 1], 5.5, 9.1, 9.91);
    }

    #[test]
    fn mean_deviation_and_extremes() {
        let s = of(100, [2, 4, 4, 4, 5, 5, 7, 9]).summary().expect("there are samples");
        assert_eq!((s.mean, s.min, s.max), (5.0, 2.0, 9.0));
        assert!((s.std - 2.0).abs() < 1e-9, "{}", s.std);
        assert_eq!(of(100, []).summary(), None);
    }

    #[test]
    fn beyond_the_limit_the_sample_is_uniform_and_the_rest_exact() {
        let samples = of(1000, 0..100_000);
        assert!(!samples.is_exact());
        assert_eq!((samples.nanos.len(), samples.count()), (1000, 100_000));
        let s = samples.summary().expect("there are samples");
        assert!((s.mean - 49_999.5).abs() < 1e-6, "{}", s.mean);
        assert_eq!((s.min, s.max), (0.0, 99_999.0));
        // Seeded, so always the same; the standard error of the median is 1.6 %.
        assert!((s.p50 - 50_000.0).abs() < 4_000.0, "{}", s.p50);
        assert!((s.p99 - 99_000.0).abs() < 1_000.0, "{}", s.p99);
    }

    proptest! {
        #[test]
        fn percentiles_are_ordered_and_within_the_extremes(ms in prop::collection::vec(0_u64..100_000, 1..200)) {
            let s = of(1000, ms).summary().expect("there are samples");
            let order = [s.min, s.p50, s.p90, s.p95, s.p99, s.max];
            prop_assert!(order.windows(2).all(|pair| pair[0] <= pair[1] + 1e-9), "{order:?}");
            prop_assert!(s.min <= s.mean + 1e-9 && s.mean <= s.max + 1e-9);
        }
    }
}
