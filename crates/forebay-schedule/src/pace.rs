//! How long steps take, learned from those that ran: what turns a bound in milliseconds into one in tokens.
//!
//! Two numbers are followed, each as an exponentially weighted mean: what a step of decodes takes, and what a token of
//! prefill adds to it. The second grows with the context, and the mean follows a long prompt as it is computed. A
//! prompt that begins far into a cached prefix is underestimated for its first chunk.

use std::time::Duration;

/// Weight of the newest step.
const NEWEST: f64 = 0.4;
/// A step this many times longer than expected was held up by something else: the machine, not the tokens.
const OUTLIER: f64 = 4.0;

/// Seconds, `None` before the first step of its kind.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Pace {
    decodes: Option<f64>,
    prefill_token: Option<f64>,
}

impl Pace {
    /// A step of `decodes` rows of one token and `prefill_tokens` more took `elapsed`.
    pub(crate) fn learn(&mut self, decodes: usize, prefill_tokens: usize, elapsed: Duration) {
        let elapsed = elapsed.as_secs_f64();
        if prefill_tokens == 0 {
            follow(&mut self.decodes, elapsed);
        } else {
            let others = if decodes > 0 { self.decodes.unwrap_or(0.0) } else { 0.0 };
            follow(&mut self.prefill_token, (elapsed - others).max(0.0) / prefill_tokens as f64);
        }
    }

    /// Tokens of prefill that fit beside decodes into a step of `bound`; `None` where nothing is known yet.
    pub(crate) fn prefill_tokens(&self, bound: Duration) -> Option<u32> {
        let token = self.prefill_token.filter(|token| *token > 0.0)?;
        let left = bound.as_secs_f64() - self.decodes.unwrap_or(0.0);
        Some((left.max(0.0) / token) as u32)
    }
}

fn follow(mean: &mut Option<f64>, sample: f64) {
    *mean = Some(match *mean {
        None => sample,
        Some(mean) => mean + NEWEST * (sample.min(mean * OUTLIER) - mean),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_fit() {
        let ms = Duration::from_millis;
        let mut pace = Pace::default();
        assert_eq!(pace.prefill_tokens(ms(100)), None);
        pace.learn(0, 100, ms(50));
        assert_eq!(pace.prefill_tokens(ms(100)), Some(200));
        pace.learn(4, 0, ms(20));
        assert_eq!(pace.prefill_tokens(ms(100)), Some(160));
        // A bound below what decodes take leaves nothing; how much there is at least is the scheduler's to say.
        assert_eq!(pace.prefill_tokens(ms(10)), Some(0));
        // Somebody else had the processor for five seconds: noticed, not believed.
        pace.learn(4, 100, ms(5000));
        assert!(pace.prefill_tokens(ms(100)).is_some_and(|tokens| tokens > 60), "{pace:?}");
    }

    #[test]
    fn a_slower_prompt_is_followed() {
        let mut pace = Pace::default();
        for tokens in [1.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0_f64] {
            pace.learn(0, 100, Duration::from_secs_f64(0.1 * tokens));
        }
        let fits = pace.prefill_tokens(Duration::from_millis(400)).expect("is known");
        assert!((95..=115).contains(&fits), "{fits}");
    }
}
