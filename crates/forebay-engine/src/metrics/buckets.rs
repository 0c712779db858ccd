//! vLLM's bounds of buckets.

pub(super) const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
pub(super) const ITL: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
pub(super) const REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
pub(super) const ITERATION: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
pub(super) const N: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
pub(super) const PREEMPTIONS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];

/// Counts of tokens of one request: 1, 2, 5, 10, 20, … up to what the model takes.
pub(super) fn tokens(model_len: u32) -> Vec<f64> {
    let max = f64::from(model_len);
    let decades = std::iter::successors(Some(1.0), |decade| Some(decade * 10.0));
    decades
        .flat_map(|decade| [1.0, 2.0, 5.0].map(|step| step * decade))
        .take_while(|&bound| bound <= max)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_counts_go_up_to_the_models_limit() {
        let check = |model_len, expect: &[f64]| assert_eq!(tokens(model_len), expect);
        check(0, &[]);
        check(1, &[1.0]);
        check(100, &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        check(199, &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        assert_eq!(tokens(u32::MAX).last(), Some(&2e9));
    }
}
