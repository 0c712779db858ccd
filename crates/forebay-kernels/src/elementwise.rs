//! Norms, gates and sums: work that is small beside the matrix products. On the caller's thread; for many rows
//! cut them with [`crate::Pool::run_rows`].
//!
//! All have the same bits on every instruction set.

use crate::Isa;
use crate::simd::{LANES, Simd, WithSimd};

/// Root-mean-square norm of each row: `out = x / sqrt(mean(x²) + eps) · weight`.
///
/// `x` and `out` are `[rows, weight.len()]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    assert!(!weight.is_empty() && x.len().is_multiple_of(weight.len()), "whole rows");
    Isa::detect().run(RmsNorm { x, weight, eps, out });
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl WithSimd for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let cols = self.weight.len();
        for (x, out) in self.x.chunks_exact(cols).zip(self.out.chunks_exact_mut(cols)) {
            let (whole, rest) = x.as_chunks::<LANES>();
            let mut squares = s.splat(0.0);
            for x in whole {
                let x = s.load(x);
                squares = s.fma(x, x, squares);
            }
            let mut last = [0.0; LANES];
            last[..rest.len()].copy_from_slice(rest);
            let last = s.load(&last);
            let sum = s.sum(s.fma(last, last, squares));
            let by = 1.0 / (sum / cols as f32 + self.eps).sqrt();
            for ((out, &x), &w) in out.iter_mut().zip(x).zip(self.weight) {
                *out = x * by * w;
            }
        }
    }
}

/// The gate of Llama's MLP: `out = silu(gate) · up`, `silu(x) = x / (1 + e^-x)`.
///
/// `gate_up` is `[rows, 2 · width]`, each row the gates and then the ups; `out` is `[rows, width]`.
pub fn silu_mul(gate_up: &[f32], width: usize, out: &mut [f32]) {
    check_gate(gate_up, width, out);
    Isa::detect().run(Gate::<Silu> { gate_up, width, out, activation: Silu });
}

/// The gate of Gemma's MLP: like [`silu_mul`], with `gelu` in its tanh approximation.
pub fn gelu_tanh_mul(gate_up: &[f32], width: usize, out: &mut [f32]) {
    check_gate(gate_up, width, out);
    Isa::detect().run(Gate::<GeluTanh> { gate_up, width, out, activation: GeluTanh });
}

fn check_gate(gate_up: &[f32], width: usize, out: &[f32]) {
    assert_eq!(gate_up.len(), 2 * out.len());
    assert!(width > 0 && out.len().is_multiple_of(width), "whole rows");
}

trait Activation: Copy {
    fn of<S: Simd>(self, s: S, x: S::F) -> S::F;
}

#[derive(Clone, Copy)]
struct Silu;

impl Activation for Silu {
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::F) -> S::F {
        let one = s.splat(1.0);
        s.div(x, s.add(one, s.exp(s.sub(s.splat(0.0), x))))
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;

impl Activation for GeluTanh {
    /// `x/2 · (1 + tanh(u))` is `x / (1 + e^-2u)`, with `u = sqrt(2/π) · (x + 0.044715 x³)`.
    #[inline(always)]
    fn of<S: Simd>(self, s: S, x: S::F) -> S::F {
        let one = s.splat(1.0);
        let cubic = s.fma(s.mul(x, x), s.splat(0.044_715), one);
        let minus_2u = s.mul(s.mul(x, cubic), s.splat(-2.0 * 0.797_884_6));
        s.div(x, s.add(one, s.exp(minus_2u)))
    }
}

struct Gate<'a, A> {
    gate_up: &'a [f32],
    width: usize,
    out: &'a mut [f32],
    activation: A,
}

impl<A: Activation> WithSimd for Gate<'_, A> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let rows = self.gate_up.chunks_exact(2 * self.width).zip(self.out.chunks_exact_mut(self.width));
        for (gate_up, out) in rows {
            let (gate, up) = gate_up.split_at(self.width);
            let ((gate, gate_rest), (up, up_rest)) = (gate.as_chunks::<LANES>(), up.as_chunks::<LANES>());
            let (out, out_rest) = out.as_chunks_mut::<LANES>();
            for ((gate, up), out) in gate.iter().zip(up).zip(out) {
                s.store(out, s.mul(self.activation.of(s, s.load(gate)), s.load(up)));
            }
            let (mut gate, mut up, mut result) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
            gate[..gate_rest.len()].copy_from_slice(gate_rest);
            up[..up_rest.len()].copy_from_slice(up_rest);
            s.store(&mut result, s.mul(self.activation.of(s, s.load(&gate)), s.load(&up)));
            out_rest.copy_from_slice(&result[..out_rest.len()]);
        }
    }
}

/// `to += x`, value by value.
pub fn add_assign(to: &mut [f32], x: &[f32]) {
    assert_eq!(to.len(), x.len());
    Isa::detect().run(AddAssign { to, x });
}

struct AddAssign<'a> {
    to: &'a mut [f32],
    x: &'a [f32],
}

impl WithSimd for AddAssign<'_> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, _s: S) {
        for (to, &x) in self.to.iter_mut().zip(self.x) {
            *to += x;
        }
    }
}

/// `x *= by`, value by value.
pub fn scale_in_place(x: &mut [f32], by: f32) {
    for x in x {
        *x *= by;
    }
}

/// Index of the largest value, the first of equals. NaNs are passed over; `None` if there is nothing else.
pub fn argmax(x: &[f32]) -> Option<usize> {
    let (start, max) = Isa::detect().run(LargestChunk { x });
    if max == f32::NEG_INFINITY {
        return x.iter().position(|x| !x.is_nan());
    }
    x[start..].iter().position(|&x| x == max).map(|at| start + at)
}

/// Where the first chunk begins that has the largest value, and that value: one pass at the speed of memory. `-∞` where
/// there is none larger; NaNs are passed over.
struct LargestChunk<'a> {
    x: &'a [f32],
}

impl WithSimd for LargestChunk<'_> {
    type Output = (usize, f32);

    #[inline(always)]
    fn with<S: Simd>(self, s: S) -> (usize, f32) {
        // Four vectors of maxima, so that one need not wait for the last.
        const WIDE: usize = 4;
        const CHUNK: usize = 16 * WIDE * LANES;
        let mut best = (0, f32::NEG_INFINITY);
        for (i, chunk) in self.x.chunks(CHUNK).enumerate() {
            let (whole, rest) = chunk.as_chunks::<LANES>();
            let (wide, narrow) = whole.as_chunks::<WIDE>();
            let none = s.splat(f32::NEG_INFINITY);
            let mut max = [none; WIDE];
            for x in wide {
                for (max, x) in max.iter_mut().zip(x) {
                    *max = s.max(s.load(x), *max);
                }
            }
            let mut last = [f32::NEG_INFINITY; LANES];
            last[..rest.len()].copy_from_slice(rest);
            for x in narrow.iter().chain([&last]) {
                max[0] = s.max(s.load(x), max[0]);
            }
            let max = s.max_lane(s.max(s.max(max[0], max[1]), s.max(max[2], max[3])));
            if max > best.1 {
                best = (i * CHUNK, max);
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::Random;

    fn check(name: &str, got: &[f32], expect: impl Iterator<Item = f64>, tolerance: f64) {
        let mut count = 0;
        for (i, (got, expect)) in got.iter().zip(expect).enumerate() {
            let error = (f64::from(*got) - expect).abs() / (1e-3 + expect.abs());
            assert!(error < tolerance, "{name} at {i}: {got} for {expect}");
            count += 1;
        }
        assert_eq!(count, got.len());
    }

    #[test]
    fn rms_norm_is_its_formula() {
        for cols in [1, 15, 16, 50, 576] {
            let (x, weight) = (Random(1).floats(3 * cols), Random(2).floats(cols));
            let mut out = vec![0.0; x.len()];
            rms_norm(&x, &weight, 1e-5, &mut out);
            let expect = x.chunks_exact(cols).flat_map(|x| {
                let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / cols as f64;
                let by = 1.0 / (mean + 1e-5).sqrt();
                x.iter().zip(&weight).map(move |(&x, &w)| f64::from(x) * by * f64::from(w))
            });
            check("rms_norm", &out, expect, 1e-6);
        }
    }

    #[test]
    fn gates_are_their_formulas() {
        for width in [1, 16, 37] {
            let x: Vec<f32> = Random(3).floats(2 * 2 * width).iter().map(|x| x * 30.0).collect();
            let pairs = || {
                x.chunks_exact(2 * width).flat_map(|row| {
                    row[..width].iter().zip(&row[width..]).map(|(&g, &u)| (f64::from(g), f64::from(u)))
                })
            };
            let mut out = vec![0.0; 2 * width];
            silu_mul(&x, width, &mut out);
            check("silu", &out, pairs().map(|(g, u)| g / (1.0 + (-g).exp()) * u), 1e-6);
            gelu_tanh_mul(&x, width, &mut out);
            let gelu =
                |g: f64| 0.5 * g * (1.0 + (0.797_884_560_802_865_4 * (g + 0.044_715 * g.powi(3))).tanh());
            check("gelu", &out, pairs().map(|(g, u)| gelu(g) * u), 1e-5);
        }
    }

    #[test]
    fn gates_hold_at_the_ends_of_the_range() {
        let mut out = [0.0; 4];
        silu_mul(&[-1e30, -200.0, 200.0, 1e30, 1.0, 1.0, 1.0, 1.0], 4, &mut out);
        assert!(out[0].is_finite() && out[1].abs() < 1e-30);
        assert_eq!(out[2..], [200.0, 1e30]);
    }

    #[test]
    fn add_assign_adds() {
        let mut to = vec![1.0; 19];
        add_assign(&mut to, &[0.5; 19]);
        assert_eq!(to, [1.5; 19]);
        scale_in_place(&mut to, 2.0);
        assert_eq!(to, [3.0; 19]);
    }

    #[test]
    fn argmax_takes_the_first_of_the_largest() {
        let check = |x: &[f32], expect| assert_eq!(argmax(x), expect, "{x:?}");
        check(&[], None);
        check(&[f32::NAN], None);
        check(&[f32::NAN, -3.0], Some(1));
        check(&[f32::NEG_INFINITY; 3], Some(0));
        check(&[1.0, 3.0, 2.0, 3.0], Some(1));
        let mut x = Random(9).floats(1000);
        (x[130], x[700]) = (5.0, 5.0);
        check(&x, Some(130));
        let mut x = Random(10).floats(3000);
        (x[1500], x[2900], x[2999]) = (f32::NAN, 5.0, 5.0);
        check(&x, Some(2900));
        x[2900] = f32::INFINITY;
        check(&x, Some(2900));
    }

    #[test]
    fn exp_is_exact_to_two_units_and_the_same_everywhere() {
        struct Exp(f32);
        impl WithSimd for Exp {
            type Output = [f32; LANES];
            #[inline(always)]
            fn with<S: Simd>(self, s: S) -> Self::Output {
                let mut out = [0.0; LANES];
                s.store(&mut out, s.exp(s.splat(self.0)));
                out
            }
        }
        for i in -8700..=8800 {
            let x = i as f32 * 0.01;
            let expect = f64::from(x).exp();
            for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
                let got = isa.run(Exp(x));
                assert_eq!(got, Isa::Scalar.run(Exp(x)));
                assert!(
                    (f64::from(got[7]) - expect).abs() <= 2e-7 * expect,
                    "e^{x}: {} for {expect}",
                    got[7]
                );
            }
        }
    }
}
