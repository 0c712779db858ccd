//! The largest of a row of logits, found at the speed of memory.

use std::cmp::Ordering;

use forebay_types::TokenId;

/// Logits that are looked at more closely only if one of them beats the floor.
const CHUNK: usize = 64;

/// The `k` largest logits, in no order; of equals at the end, those with the lowest ids. NaNs are passed over.
///
/// O(n + k log(n / k)) for logits in a random order: at most twice as many as wanted are kept, and half of them dropped when
/// they are, which raises the floor that others have to beat.
pub fn largest(logits: &[f32], k: usize, into: &mut Vec<(TokenId, f32)>) {
    into.clear();
    if k == 0 {
        return;
    }
    let full = 2 * k.min(logits.len()) + CHUNK;
    into.reserve(full);
    let mut floor = None;
    for (i, chunk) in logits.chunks(CHUNK).enumerate() {
        match floor {
            // Ids ascend, so an equal logit is behind those that are there.
            Some(floor) => collect(chunk, i * CHUNK, |logit| logit > floor, into),
            None => collect(chunk, i * CHUNK, |logit| !logit.is_nan(), into),
        }
        if into.len() > full - CHUNK {
            into.select_nth_unstable_by(k - 1, by_logit);
            into.truncate(k);
            floor = into.last().map(|&(_, least)| least);
        }
    }
    if into.len() > k {
        into.select_nth_unstable_by(k - 1, by_logit);
        into.truncate(k);
    }
}

/// All logits that are not below the floor, by id.
pub fn at_least(logits: &[f32], floor: f32, into: &mut Vec<(TokenId, f32)>) {
    into.clear();
    for (i, chunk) in logits.chunks(CHUNK).enumerate() {
        collect(chunk, i * CHUNK, |logit| logit >= floor, into);
    }
}

/// The largest first, ties by id. For logits that are not NaN.
pub fn by_logit(a: &(TokenId, f32), b: &(TokenId, f32)) -> Ordering {
    b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0))
}

#[inline(always)]
fn collect(chunk: &[f32], first: usize, wanted: impl Fn(f32) -> bool, into: &mut Vec<(TokenId, f32)>) {
    if chunk.iter().fold(false, |any, &logit| any | wanted(logit)) {
        let ids = chunk.iter().enumerate().filter(|&(_, &logit)| wanted(logit));
        into.extend(ids.map(|(i, &logit)| ((first + i) as TokenId, logit)));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Few values, so that many are equal.
        #[test]
        fn they_are_the_first_of_a_sorted_list(
            logits in prop::collection::vec(
                prop_oneof![9 => (-40i8..40).prop_map(|x| f32::from(x) * 0.25), 1 => Just(f32::NAN)],
                0..1500,
            ),
            k in 0usize..400,
            floor in -12f32..12.0,
        ) {
            let mut all: Vec<_> = logits.iter().enumerate().map(|(id, &logit)| (id as TokenId, logit)).collect();
            all.retain(|(_, logit)| !logit.is_nan());
            let above: Vec<_> = all.iter().copied().filter(|&(_, logit)| logit >= floor).collect();
            let mut found = Vec::new();
            at_least(&logits, floor, &mut found);
            prop_assert_eq!(&found, &above);
            all.sort_by(by_logit);
            all.truncate(k);
            largest(&logits, k, &mut found);
            found.sort_by(by_logit);
            prop_assert_eq!(found, all);
        }
    }
}
