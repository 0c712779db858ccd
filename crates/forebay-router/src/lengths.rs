//! How long a fleet's replies are: what placement expects of the next one.

use parking_lot::Mutex;

/// Expected before any reply was seen.
const TOKENS_PRIOR: f64 = 128.0;

/// Weight of a new reply: the mean of about the last twenty.
const ALPHA: f64 = 0.05;

/// Exponentially weighted mean of the new tokens per choice.
///
/// Clients ask for far more than they get (`max_tokens` is a limit, not a wish), so the limit alone would count every
/// decoding neighbour many times over.
pub(crate) struct Lengths(Mutex<f64>);

impl Lengths {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(TOKENS_PRIOR))
    }

    pub(crate) fn on_finished(&self, tokens: u32) {
        let mut mean = self.0.lock();
        *mean += ALPHA * (f64::from(tokens) - *mean);
    }

    /// New tokens to expect of one request with `choices` choices of at most `tokens_max` each.
    pub(crate) fn expect(&self, tokens_max: Option<u32>, choices: u32) -> u32 {
        let mean = self.0.lock().ceil() as u32;
        tokens_max.map_or(mean, |max| max.min(mean)).saturating_mul(choices)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_and_the_limit() {
        let lengths = Lengths::new();
        assert_eq!(lengths.expect(None, 1), 128);
        assert_eq!(lengths.expect(Some(4096), 1), 128);
        assert_eq!(lengths.expect(Some(16), 3), 48);
        lengths.on_finished(28);
        assert_eq!(lengths.expect(None, 1), 123);
    }
}
