//! Norm and activation of encoders: BERT's layer norm and the exact GELU. On the caller's thread; for many rows cut
//! them with [`crate::Pool::run_rows`].
//!
//! Both have the same bits on every instruction set.

use crate::Isa;
use crate::simd::{LANES, Simd, WithSimd};

/// Layer norm of each row, in place: `x = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias`.
///
/// `x` is `[rows, weight.len()]`.
pub fn layer_norm_in_place(x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    layer_norm(Isa::detect(), x, weight, bias, eps);
}

fn layer_norm(isa: Isa, x: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    assert!(!weight.is_empty() && x.len().is_multiple_of(weight.len()), "whole rows");
    assert_eq!(weight.len(), bias.len());
    isa.run(LayerNorm { x, weight, bias, eps });
}

struct LayerNorm<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
}

impl WithSimd for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let cols = self.weight.len();
        for row in self.x.chunks_exact_mut(cols) {
            let mean = sum_of(s, row, |x| x) / cols as f32;
            // In two passes: the difference of two large sums would lose what is small beside the mean.
            row.iter_mut().for_each(|x| *x -= mean);
            let variance = sum_of(s, row, |x| s.mul(x, x)) / cols as f32;
            let by = 1.0 / (variance + self.eps).sqrt();
            for ((x, &weight), &bias) in row.iter_mut().zip(self.weight).zip(self.bias) {
                *x = *x * by * weight + bias;
            }
        }
    }
}

/// `Σ f(x)` for an `f` with `f(0) = 0`.
#[inline(always)]
fn sum_of<S: Simd>(s: S, row: &[f32], f: impl Fn(S::F) -> S::F) -> f32 {
    let (whole, rest) = row.as_chunks::<LANES>();
    let mut last = [0.0; LANES];
    last[..rest.len()].copy_from_slice(rest);
    let mut sum = f(s.load(&last));
    for x in whole {
        sum = s.add(sum, f(s.load(x)));
    }
    s.sum(sum)
}

/// The exact GELU of each value, in place: `x = x · Φ(x)`, with an error of at most 2e-7 · (1 + |x|).
pub fn gelu_erf_in_place(x: &mut [f32]) {
    Isa::detect().run(GeluErf { x });
}

struct GeluErf<'a> {
    x: &'a mut [f32],
}

impl WithSimd for GeluErf<'_> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let (whole, rest) = self.x.as_chunks_mut::<LANES>();
        for x in whole {
            let gelu = gelu_erf(s, s.load(x));
            s.store(x, gelu);
        }
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let gelu = gelu_erf(s, s.load(&last));
        s.store(&mut last, gelu);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// `x · Φ(x)` is `max(x, 0) - |x|/2 · erfc(|x|/√2)`, which needs `erfc` on one side of zero only: Abramowitz and Stegun's
/// 7.1.26, a polynomial in `1/(1 + pz)` times `e^-z²`.
#[inline(always)]
fn gelu_erf<S: Simd>(s: S, x: S::F) -> S::F {
    let zero = s.splat(0.0);
    let size = s.max(x, s.sub(zero, x));
    let z = s.mul(size, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let one = s.splat(1.0);
    let t = s.div(one, s.fma(z, s.splat(0.327_591_1), one));
    let mut p = s.splat(1.061_405_4);
    for c in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
        p = s.fma(p, t, s.splat(c));
    }
    let erfc = s.mul(s.mul(p, t), s.exp(s.sub(zero, s.mul(z, z))));
    s.sub(s.max(x, zero), s.mul(s.mul(size, s.splat(0.5)), erfc))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::Random;

    #[test]
    fn layer_norm_is_its_formula_everywhere() {
        for cols in [1, 15, 16, 50, 384] {
            // Far from zero, where the mean is large beside the deviations.
            let x: Vec<f32> = Random(1).floats(3 * cols).iter().map(|x| x + 40.0).collect();
            let (weight, bias) = (Random(2).floats(cols), Random(3).floats(cols));
            let expect: Vec<f64> = x
                .chunks_exact(cols)
                .flat_map(|row| {
                    let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
                    let mean = row.iter().sum::<f64>() / cols as f64;
                    let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / cols as f64;
                    let by = 1.0 / (variance + 1e-12).sqrt();
                    let scaled = row.into_iter().zip(&weight).zip(&bias);
                    scaled
                        .map(move |((x, &w), &b)| (x - mean) * by * f64::from(w) + f64::from(b))
                        .collect::<Vec<_>>()
                })
                .collect();
            let mut first: Option<Vec<f32>> = None;
            for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
                let mut got = x.clone();
                layer_norm(isa, &mut got, &weight, &bias, 1e-12);
                for (got, expect) in got.iter().zip(&expect) {
                    assert!((f64::from(*got) - expect).abs() < 2e-4, "{isa}, {cols}: {got} for {expect}");
                }
                assert_eq!(first.get_or_insert(got.clone()), &got, "{isa}");
            }
        }
    }

    /// The error function by its series, which converges fast enough for |z| < 6.
    fn phi(x: f64) -> f64 {
        let z = (x / std::f64::consts::SQRT_2).clamp(-5.9, 5.9);
        let (mut term, mut sum) = (z, z);
        for n in 1..200 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        0.5 * (1.0 + sum * 2.0 / std::f64::consts::PI.sqrt())
    }

    #[test]
    fn gelu_is_its_formula_everywhere() {
        let x: Vec<f32> = (-1200..=1200).map(|i| i as f32 * 0.005).collect();
        let mut first: Option<Vec<f32>> = None;
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            let mut got = x.clone();
            isa.run(GeluErf { x: &mut got });
            for (&x, &got) in x.iter().zip(&got) {
                let expect = f64::from(x) * phi(f64::from(x));
                let error = (f64::from(got) - expect).abs();
                assert!(error <= 2e-7 * (1.0 + f64::from(x).abs()), "{isa}: gelu({x}) = {got}, not {expect}");
            }
            assert_eq!(first.get_or_insert(got.clone()), &got, "{isa}");
        }
        let mut ends = [-1e30, -200.0, 0.0, 200.0, 1e30];
        gelu_erf_in_place(&mut ends);
        assert_eq!(ends[2..], [0.0, 200.0, 1e30]);
        assert!(ends[0].abs() < 1e-6 && ends[1].abs() < 1e-30, "{ends:?}");
    }
}
