//! The normaliser of a row of logits.

use crate::simd::{LANES, Simd, WithSimd};
use crate::{Isa, argmax};

/// Vectors whose sum is kept in f32: few enough that the rounding of their additions stays below that of `exp`.
const VECTORS: usize = 64;

/// `ln Σ exp(x)`: what to subtract from a logit to get its log-probability. Two passes, no copy; the same bits on every
/// instruction set.
///
/// `-∞` where all are, or nothing is there. NaN where any value is NaN and another is not.
pub fn log_sum_exp(x: &[f32]) -> f32 {
    let max = argmax(x).map_or(f32::NEG_INFINITY, |i| x[i]);
    if max == f32::NEG_INFINITY {
        return max;
    }
    if x.iter().fold(false, |any, x| any | x.is_nan()) {
        return f32::NAN;
    }
    max + Isa::detect().run(SumExp { x, max }).ln() as f32
}

/// `Σ exp(x - max)`
struct SumExp<'a> {
    x: &'a [f32],
    max: f32,
}

impl WithSimd for SumExp<'_> {
    type Output = f64;

    #[inline(always)]
    fn with<S: Simd>(self, s: S) -> f64 {
        let (whole, rest) = self.x.as_chunks::<LANES>();
        let max = s.splat(self.max);
        let mut total = 0.0;
        for block in whole.chunks(VECTORS) {
            let mut sum = s.splat(0.0);
            for x in block {
                sum = s.add(sum, s.exp(s.sub(s.load(x), max)));
            }
            total += f64::from(s.sum(sum));
        }
        // What fills the last vector up counts as good as nothing: e^-87.
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        total + f64::from(s.sum(s.exp(s.sub(s.load(&last), max))))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn edges() {
        let check = |x: &[f32], expect: f32| {
            let got = log_sum_exp(x);
            assert!(got == expect || (got.is_nan() && expect.is_nan()), "{x:?}: {got}");
        };
        check(&[], f32::NEG_INFINITY);
        check(&[f32::NEG_INFINITY; 3], f32::NEG_INFINITY);
        check(&[2.5], 2.5);
        check(&[f32::NEG_INFINITY, 2.5], 2.5);
        check(&[-1000.0, -1000.0], -1000.0 + 2f32.ln());
        check(&[1.0, f32::NAN], f32::NAN);
    }

    proptest! {
        #[test]
        fn equals_the_sum_in_f64(x in prop::collection::vec(-30f32..30.0, 1..3000)) {
            let max = f64::from(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let expect = max + x.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln();
            let got = f64::from(log_sum_exp(&x));
            prop_assert!((got - expect).abs() < 5e-6 + 1e-6 * expect.abs(), "{got} for {expect}");
        }

        #[test]
        fn has_the_same_bits_on_every_instruction_set(x in prop::collection::vec(-30f32..30.0, 1..300)) {
            let max = 30.0;
            let bits = |isa: Isa| isa.run(SumExp { x: &x, max }).to_bits();
            let scalar = bits(Isa::Scalar);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
                prop_assert_eq!(bits(isa), scalar, "{:?}", isa);
            }
        }
    }
}
