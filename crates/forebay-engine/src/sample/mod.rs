//! Chooses the next token from logits. Pure: the random source is part of a sequence's own state.
//!
//! Order of operations (vLLM's): log-probabilities are taken from the raw logits; then bias, penalties, temperature,
//! min-p, top-k, top-p, and one draw. The result depends on the logits and on the sequence's own state only, so the
//! same seed gives the same tokens whatever else is in the batch.

mod candidates;
mod largest;
mod logprobs;

use std::collections::HashMap;

use forebay_grammar::Mask;
use forebay_kernels::argmax;
use forebay_types::TokenId;
use forebay_wire::Sampling;
use rand_core::Rng;
use rand_pcg::Pcg64Mcg;

use candidates::Candidates;

pub use logprobs::{Logprobs, Wanted, rank};

/// Temperatures below this are greedy: dividing by less overflows to infinities for ordinary logits.
const GREEDY_BELOW: f32 = 1e-5;

/// Sampling state of one sequence.
pub struct Sampler {
    params: Sampling,
    rng: Pcg64Mcg,
    /// Occurrences in the output, kept only where a penalty needs them.
    output_counts: HashMap<TokenId, u32>,
    /// Distinct prompt tokens, kept only for the repetition penalty.
    prompt_tokens: Vec<TokenId>,
    candidates: Candidates,
    scratch: Vec<f32>,
}

/// A chosen token; log-probabilities where they were asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    pub token: TokenId,
    /// Of the raw distribution.
    pub logprobs: Option<Logprobs>,
}

impl Sampler {
    /// `seed` decides every draw of this sequence.
    pub fn new(params: Sampling, seed: u64, prompt: &[TokenId]) -> Self {
        let mut prompt_tokens = Vec::new();
        if params.repetition_penalty != 1.0 {
            prompt_tokens.extend_from_slice(prompt);
            prompt_tokens.sort_unstable();
            prompt_tokens.dedup();
        }
        // Spread the seed over the state: neighbouring seeds (choice 0, choice 1) must not give similar streams.
        let state = (u128::from(mix(seed)) << 64) | u128::from(mix(seed ^ 0x9e37_79b9_7f4a_7c15));
        Self {
            params,
            rng: Pcg64Mcg::new(state),
            output_counts: HashMap::new(),
            prompt_tokens,
            candidates: Candidates::default(),
            scratch: Vec::new(),
        }
    }

    /// Chooses the next token. `banned` are tokens that may not come now (end-of-sequence under `min_tokens`); with a
    /// `mask`, only its tokens may.
    ///
    /// `logprobs` are those wanted beside the chosen token's, `None` for no log-probabilities at all. O(vocabulary).
    pub fn choose(
        &mut self,
        logits: &[f32],
        banned: &[TokenId],
        mask: Option<&Mask>,
        logprobs: Option<&Wanted>,
    ) -> Choice {
        let plain = self.leaves_logits_alone() && banned.is_empty() && mask.is_none();
        let token = if plain {
            self.pick(logits)
        } else {
            let mut shaped = std::mem::take(&mut self.scratch);
            shaped.clear();
            shaped.extend_from_slice(logits);
            self.shape_logits(&mut shaped, banned, mask);
            // Where the bans leave nothing, they give way: something has to come.
            if !banned.is_empty() && shaped.iter().all(|&logit| logit == f32::NEG_INFINITY) {
                shaped.clear();
                shaped.extend_from_slice(logits);
                self.shape_logits(&mut shaped, &[], mask);
            }
            let token = self.pick(&shaped);
            self.scratch = shaped;
            token
        };
        if self.counts_output() {
            *self.output_counts.entry(token).or_default() += 1;
        }
        Choice { token, logprobs: logprobs.map(|wanted| Logprobs::of(logits, token, wanted)) }
    }

    fn leaves_logits_alone(&self) -> bool {
        self.params.logit_bias.is_empty() && !self.counts_output()
    }

    fn counts_output(&self) -> bool {
        let p = &self.params;
        p.repetition_penalty != 1.0 || p.presence_penalty != 0.0 || p.frequency_penalty != 0.0
    }

    /// Bias, penalties and bans.
    fn shape_logits(&self, logits: &mut [f32], banned: &[TokenId], mask: Option<&Mask>) {
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        let repetition = self.params.repetition_penalty;
        if repetition != 1.0 {
            // CTRL (Keskar et al. 2019), as HF and vLLM do it: over prompt and output, once per token.
            let repeated = self.output_counts.keys().filter(|t| self.prompt_tokens.binary_search(t).is_err());
            for &token in self.prompt_tokens.iter().chain(repeated) {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
                }
            }
        }
        for (&token, &count) in &self.output_counts {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= self.params.presence_penalty + self.params.frequency_penalty * count as f32;
            }
        }
        if let Some(mask) = mask {
            mask.apply(logits);
        }
        for &token in banned {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// The most likely token (the lowest id among equals), or one draw from the filtered distribution.
    fn pick(&mut self, logits: &[f32]) -> TokenId {
        if self.params.temperature < GREEDY_BELOW {
            return argmax(logits).unwrap_or_default() as TokenId;
        }
        // 53 random bits: uniform in [0, 1).
        let uniform = (self.rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
        self.candidates.draw(logits, &self.params, uniform)
    }
}

/// SplitMix64's finaliser (Steele et al. 2014): one bit of the seed changes half of the state's bits.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(params: Sampling, seed: u64) -> Sampler {
        Sampler::new(params, seed, &[])
    }

    fn logits() -> Vec<f32> {
        [0.5f32, 0.25, 0.125, 0.0625, 0.0625].iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn temperature_zero_is_greedy_and_ties_go_to_the_lowest_id() {
        let params = Sampling { temperature: 0.0, ..Sampling::default() };
        assert_eq!(sampler(params, 1).choose(&[1.0, 3.0, 3.0], &[], None, None).token, 1);
    }

    #[test]
    fn a_seed_fixes_the_draws() {
        let draws = |seed| {
            let mut s = sampler(Sampling::default(), seed);
            (0..32).map(|_| s.choose(&logits(), &[], None, None).token).collect::<Vec<_>>()
        };
        assert_eq!(draws(7), draws(7));
        assert_ne!(draws(7), draws(8));
    }

    #[test]
    fn penalties_bias_and_bans_change_the_choice() {
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let check = |params: Sampling, prompt: &[TokenId], banned: &[TokenId], expect: &[TokenId]| {
            let mut s = Sampler::new(params.clone(), 0, prompt);
            let got: Vec<_> =
                expect.iter().map(|_| s.choose(&[2.0, 1.5, 1.0], banned, None, None).token).collect();
            assert_eq!(got, expect, "{params:?}");
        };
        check(Sampling { presence_penalty: 0.7, ..greedy.clone() }, &[], &[], &[0, 1, 0, 0]);
        check(Sampling { frequency_penalty: 0.7, ..greedy.clone() }, &[], &[], &[0, 1, 0, 2]);
        check(Sampling { repetition_penalty: 3.0, ..greedy.clone() }, &[0], &[], &[1, 2, 0]);
        check(Sampling { logit_bias: vec![(2, 5.0), (99, 1.0)], ..greedy.clone() }, &[], &[], &[2]);
        check(greedy, &[], &[0], &[1]);
    }

    #[test]
    fn logprobs_are_of_the_raw_distribution() {
        let mut s =
            sampler(Sampling { temperature: 0.0, logit_bias: vec![(3, 50.0)], ..Sampling::default() }, 0);
        let choice = s.choose(&logits(), &[], None, Some(&Wanted::Top(2)));
        assert_eq!(choice.token, 3);
        let got = choice.logprobs.unwrap();
        assert!((got.logprob - 0.0625f32.ln()).abs() < 1e-5);
        assert_eq!(got.others.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
        assert!((got.others[0].1 - 0.5f32.ln()).abs() < 1e-5);
    }

    #[test]
    fn hostile_logits_do_not_panic() {
        for logits in
            [[f32::NAN; 4], [f32::INFINITY; 4], [f32::NEG_INFINITY; 4], [0.0, f32::NAN, 1.0, f32::INFINITY]]
        {
            for params in [Sampling::default(), Sampling { top_p: 0.5, top_k: 3, ..Sampling::default() }] {
                assert!(sampler(params, 3).choose(&logits, &[], None, Some(&Wanted::Top(4))).token < 4);
            }
        }
    }
}
