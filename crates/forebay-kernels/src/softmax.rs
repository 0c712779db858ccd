//! Rows of logits: their exponentials, and what normalises them.

use crate::simd::{LANES, Simd, WithSimd};
use crate::{Isa, argmax};

/// Vectors whose sum is kept in f32: few enough that the rounding of their additions stays below that of `exp`.
const VECTORS: usize = 64;

/// Values of which [`exp_sums`] gives one sum.
pub const SUMMED: usize = VECTORS * LANES;

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
    if max == f32::INFINITY {
        return max;
    }
    let mut total = 0.0;
    exp_sums(x, max, 1.0, |sum| total += sum);
    max + total.ln() as f32
}

/// The weights of a softmax: `e^((x - max)·by)` in the place of every `x`, the same bits on every instruction set.
///
/// `max` is the largest of the row and finite. What is below `e^-87` is nothing, and so are NaNs.
pub fn exp_in_place(x: &mut [f32], max: f32, by: f32) {
    Isa::detect().run(ExpInPlace { x, scale: Scale { max, by } });
}

/// Sums of the weights that [`exp_in_place`] would give: of the first [`SUMMED`] values, of the next, and so on.
pub fn exp_sums(x: &[f32], max: f32, by: f32, each: impl FnMut(f64)) {
    Isa::detect().run(ExpSums { x, scale: Scale { max, by }, each });
}

#[derive(Clone, Copy)]
struct Scale {
    max: f32,
    by: f32,
}

impl Scale {
    /// [`Simd::exp`] clamps at e^-87: subtracting that makes it nothing, and changes no weight above e^-70.
    #[inline(always)]
    fn exp<S: Simd>(self, s: S, x: S::F) -> S::F {
        let least = s.exp(s.splat(f32::NEG_INFINITY));
        let exp = s.exp(s.mul(s.sub(x, s.splat(self.max)), s.splat(self.by)));
        s.max(s.sub(exp, least), s.splat(0.0))
    }
}

struct ExpInPlace<'a> {
    x: &'a mut [f32],
    scale: Scale,
}

impl WithSimd for ExpInPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let (whole, rest) = self.x.as_chunks_mut::<LANES>();
        for x in whole {
            let exp = self.scale.exp(s, s.load(x));
            s.store(x, exp);
        }
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let exp = self.scale.exp(s, s.load(&last));
        s.store(&mut last, exp);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

struct ExpSums<'a, F> {
    x: &'a [f32],
    scale: Scale,
    each: F,
}

impl<F: FnMut(f64)> WithSimd for ExpSums<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(mut self, s: S) {
        for block in self.x.chunks(SUMMED) {
            let (whole, rest) = block.as_chunks::<LANES>();
            let mut sum = s.splat(0.0);
            for x in whole {
                sum = s.add(sum, self.scale.exp(s, s.load(x)));
            }
            let mut last = [f32::NEG_INFINITY; LANES];
            last[..rest.len()].copy_from_slice(rest);
            sum = s.add(sum, self.scale.exp(s, s.load(&last)));
            (self.each)(f64::from(s.sum(sum)));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Edges, and what is far below them.
    fn value() -> impl Strategy<Value = f32> {
        prop_oneof![
            16 => -30f32..30.0,
            2 => -1000f32..-50.0,
            1 => Just(f32::NEG_INFINITY),
            1 => Just(f32::NAN),
        ]
    }

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
        check(&[1.0, f32::INFINITY], f32::INFINITY);
    }

    #[test]
    fn what_is_no_weight_is_nothing() {
        let mut x = [3.0, f32::NEG_INFINITY, f32::NAN, 3.0 - 87.0, -1e30, 3.0 - 86.0];
        exp_in_place(&mut x, 3.0, 1.0);
        assert_eq!(x[..5], [1.0, 0.0, 0.0, 0.0, 0.0]);
        assert!(x[5] > 0.0);
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
        fn weights_and_their_sums_are_their_formulas(
            x in prop::collection::vec(value(), 1..3000),
            by in 0.1f32..5.0,
        ) {
            let max = x.iter().copied().filter(|x| !x.is_nan()).fold(f32::NEG_INFINITY, f32::max);
            prop_assume!(max.is_finite());
            let mut weights = x.clone();
            exp_in_place(&mut weights, max, by);
            for (&x, &weight) in x.iter().zip(&weights) {
                let scaled = f64::from((x - max) * by);
                let expect = if scaled > -87.0 { scaled.exp() } else { 0.0 };
                prop_assert!((f64::from(weight) - expect).abs() <= 3e-7 * expect + 2e-38, "{x}: {weight} for {expect}");
            }
            let mut sums = Vec::new();
            exp_sums(&x, max, by, |sum| sums.push(sum));
            prop_assert_eq!(sums.len(), x.len().div_ceil(SUMMED));
            for (&sum, weights) in sums.iter().zip(weights.chunks(SUMMED)) {
                let expect: f64 = weights.iter().copied().map(f64::from).sum();
                prop_assert!((sum - expect).abs() <= 1e-6 * expect, "{sum} for {expect}");
            }
        }

        #[test]
        fn has_the_same_bits_on_every_instruction_set(
            x in prop::collection::vec(value(), 1..3000),
            by in 0.1f32..5.0,
        ) {
            let scale = Scale { max: 30.0, by };
            let bits = |isa: Isa| {
                let (mut weights, mut bits) = (x.clone(), Vec::new());
                isa.run(ExpInPlace { x: &mut weights, scale });
                isa.run(ExpSums { x: &x, scale, each: |sum: f64| bits.push(sum.to_bits()) });
                bits.extend(weights.iter().map(|weight| u64::from(weight.to_bits())));
                bits
            };
            let scalar = bits(Isa::Scalar);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
                prop_assert_eq!(&bits(isa), &scalar, "{:?}", isa);
            }
        }
    }
}
