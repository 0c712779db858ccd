//! Log-probabilities of one row of logits, without a copy of the vocabulary.

use std::sync::Arc;

use forebay_kernels::log_sum_exp;
use forebay_types::TokenId;

use super::largest::{by_logit, largest};

/// Which log-probabilities are wanted beside that of the token itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The so many most likely.
    Top(u32),
    /// Those of these tokens, in this order.
    Ids(Arc<[TokenId]>),
}

/// Of one token in one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    pub logprob: f32,
    /// The wanted others (the token itself may be one of them); the most likely come most likely first, ties by id.
    pub others: Vec<(TokenId, f32)>,
}

impl Logprobs {
    /// Of `token` in the raw distribution. O(vocabulary).
    pub fn of(logits: &[f32], token: TokenId, wanted: &Wanted) -> Self {
        let log_sum = log_sum_exp(logits);
        let at = |id: TokenId| logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY) - log_sum;
        let others = match wanted {
            Wanted::Top(k) => {
                top_k(logits, *k as usize).into_iter().map(|(id, logit)| (id, logit - log_sum)).collect()
            }
            Wanted::Ids(ids) => ids.iter().map(|&id| (id, at(id))).collect(),
        };
        Self { logprob: at(token), others }
    }
}

/// The place of a token among all, from 1: as many as are more likely (of equals, those with lower ids) are before it.
pub fn rank(logits: &[f32], token: TokenId) -> u32 {
    let (before, after) = logits.split_at((token as usize).min(logits.len()));
    let Some((&own, after)) = after.split_first() else { return logits.len() as u32 + 1 };
    let count = |part: &[f32], is_before: fn(f32, f32) -> bool| -> u32 {
        part.iter().map(|&logit| u32::from(is_before(logit, own))).sum()
    };
    1 + count(before, |logit, own| logit >= own) + count(after, |logit, own| logit > own)
}

/// The `k` largest logits, largest first, ties by id. NaNs are passed over.
fn top_k(logits: &[f32], k: usize) -> Vec<(TokenId, f32)> {
    let mut best = Vec::new();
    largest(logits, k, &mut best);
    best.sort_unstable_by(by_logit);
    best
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn by_probability(logits: &[f32]) -> Vec<(TokenId, f32)> {
        let mut all: Vec<_> = logits.iter().enumerate().map(|(id, &logit)| (id as TokenId, logit)).collect();
        all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
        all
    }

    proptest! {
        /// Few values, so that many are equal.
        #[test]
        fn top_and_rank_are_those_of_a_sorted_list(
            logits in prop::collection::vec((-40i8..40).prop_map(|x| f32::from(x) * 0.25), 1..500),
            k in 0usize..25,
        ) {
            let sorted = by_probability(&logits);
            prop_assert_eq!(&top_k(&logits, k)[..], &sorted[..k.min(sorted.len())]);
            for (place, &(id, _)) in sorted.iter().enumerate() {
                prop_assert_eq!(rank(&logits, id), place as u32 + 1);
            }
        }

        #[test]
        fn all_together_are_one(logits in prop::collection::vec(-20f32..20.0, 1..300)) {
            let all = Logprobs::of(&logits, 0, &Wanted::Top(logits.len() as u32));
            let sum: f64 = all.others.iter().map(|&(_, logprob)| f64::from(logprob).exp()).sum();
            prop_assert!((sum - 1.0).abs() < 1e-4, "{sum}");
            let of_first = all.others.iter().find(|(id, _)| *id == 0).map(|&(_, logprob)| logprob);
            prop_assert_eq!(of_first, Some(all.logprob));
        }
    }

    #[test]
    fn chosen_ids_come_as_they_were_named() {
        let logits = [0.5f32, 0.25, 0.25].map(f32::ln);
        let got = Logprobs::of(&logits, 0, &Wanted::Ids([2, 0, 9].into()));
        let expect = [(2, 0.25f32.ln()), (0, 0.5f32.ln()), (9, f32::NEG_INFINITY)];
        for (&(id, logprob), (expect_id, expect)) in got.others.iter().zip(expect) {
            assert_eq!(id, expect_id);
            assert!(logprob == expect || (logprob - expect).abs() < 1e-5, "{id}: {logprob} for {expect}");
        }
    }

    #[test]
    fn not_a_number_is_never_likely() {
        let logits = [f32::NAN, 1.0, f32::NAN, 2.0];
        assert_eq!(top_k(&logits, 4), [(3, 2.0), (1, 1.0)]);
        assert_eq!((rank(&logits, 3), rank(&logits, 1), rank(&logits, 7)), (1, 2, 5));
        assert!(Logprobs::of(&logits, 3, &Wanted::Top(4)).logprob.is_nan());
    }
}
