//! When each request of an open load is due. Pure: a seed in, times out.

use std::time::Duration;

use rand_core::{Rng as _, SeedableRng as _};
use rand_pcg::Pcg64Mcg;

use crate::options::Load;

/// Times after the beginning of the run, never decreasing. Empty for a closed load, where a request is due as soon as
/// there is room.
pub(crate) struct Arrivals {
    load: Load,
    rng: Pcg64Mcg,
    count: u64,
    /// Seconds. Summed up in `f64`: an error of 1e-16 per arrival is far below a timer's.
    at: f64,
}

impl Arrivals {
    pub(crate) fn new(load: Load, seed: u64) -> Self {
        // Another stream than the prompts', which use the same seed.
        Self { load, rng: Pcg64Mcg::seed_from_u64(seed ^ 0x6172_7269_7661_6c73), count: 0, at: 0.0 }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    /// The first is due at once, so that a run's length is that of its load and not one pause more.
    fn next(&mut self) -> Option<Duration> {
        match self.load {
            Load::Concurrency(_) => return None,
            Load::Constant { per_second, .. } => self.at = self.count as f64 / per_second,
            Load::Poisson { .. } if self.count == 0 => {}
            // Inverse transform: pauses of a Poisson process are exponential, -ln(U)/rate with U in (0, 1].
            Load::Poisson { per_second, .. } => self.at += -unit(&mut self.rng).ln() / per_second,
        }
        self.count += 1;
        // A year is longer than any run; it keeps the conversion from overflowing.
        Some(Duration::from_secs_f64(self.at.min(365.0 * 86_400.0)))
    }
}

/// Uniform in (0, 1]: 53 bits, as many as an `f64` holds.
fn unit(rng: &mut Pcg64Mcg) -> f64 {
    ((rng.next_u64() >> 11) + 1) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(load: Load, seed: u64, n: usize) -> Vec<Duration> {
        Arrivals::new(load, seed).take(n).collect()
    }

    #[test]
    fn a_closed_load_has_no_times() {
        assert_eq!(take(Load::Concurrency(4), 0, 3), []);
    }

    #[test]
    fn constant_arrivals_are_at_equal_distances() {
        let millis = |n| Duration::from_millis(n);
        let load = Load::Constant { per_second: 20.0, in_flight_max: 1 };
        assert_eq!(take(load, 7, 4), [millis(0), millis(50), millis(100), millis(150)]);
    }

    #[test]
    fn poisson_arrivals_come_from_the_seed() {
        let load = Load::Poisson { per_second: 10.0, in_flight_max: 1 };
        assert_eq!(take(load, 1, 100), take(load, 1, 100));
        assert_ne!(take(load, 1, 100), take(load, 2, 100));
        assert_eq!(take(load, 1, 1), [Duration::ZERO]);
    }

    /// Fixed seed: the numbers are always the same, so the tolerance can't flake.
    #[test]
    fn poisson_pauses_have_the_mean_and_spread_of_an_exponential() {
        let n = 20_000;
        let times = take(Load::Poisson { per_second: 10.0, in_flight_max: 1 }, 3, n + 1);
        let pauses: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = pauses.iter().sum::<f64>() / n as f64;
        let variance = pauses.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / n as f64;
        assert!((mean - 0.1).abs() < 0.002, "{mean}");
        assert!((variance.sqrt() - 0.1).abs() < 0.003, "{}", variance.sqrt());
    }
}
