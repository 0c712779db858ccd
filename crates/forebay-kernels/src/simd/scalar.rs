//! The portable implementation, and the reference for the others.

use super::{LANES, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Scalar;

/// Makes sixteen lanes from one closure; a plain loop, which the compiler may vectorise.
macro_rules! lanes {
    ($i:ident => $e:expr) => {{
        let mut out = [Default::default(); LANES];
        for ($i, o) in out.iter_mut().enumerate() {
            *o = $e;
        }
        out
    }};
}

impl Simd for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type B = [u8; 64];

    const TILE_ROWS: usize = 1;
    const ATTENTION_ROWS: usize = 1;
    const ATTENTION_VECTORS: usize = 1;
    const DOT_FULL_IS_OFFSET: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], x: Self::F) {
        *to = x;
    }
    #[inline(always)]
    fn load_f32(self, x: &[u8; 64]) -> Self::F {
        lanes!(i => f32::from_le_bytes([x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]]))
    }
    #[inline(always)]
    fn load_f16(self, x: &[u8; 32]) -> Self::F {
        lanes!(i => half::f16::from_le_bytes([x[2 * i], x[2 * i + 1]]).to_f32())
    }
    #[inline(always)]
    fn store_f16(self, to: &mut [u8; 32], x: Self::F) {
        for (to, x) in to.as_chunks_mut::<2>().0.iter_mut().zip(x) {
            *to = half::f16::from_f32(x).to_le_bytes();
        }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(i => a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(i => a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(i => a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(i => a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(i => if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        lanes!(i => if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        lanes!(i => a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn round_to_i(self, a: Self::F) -> Self::I {
        lanes!(i => a[i].round_ties_even() as i32)
    }
    #[inline(always)]
    fn i_to_f(self, a: Self::I) -> Self::F {
        lanes!(i => a[i] as f32)
    }
    #[inline(always)]
    fn exp2_i(self, a: Self::I) -> Self::F {
        lanes!(i => f32::from_bits((a[i].wrapping_add(127) << 23) as u32))
    }
    #[inline(always)]
    fn i_splat(self, x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    fn i_store(self, to: &mut [i32; LANES], x: Self::I) {
        *to = x;
    }
    #[inline(always)]
    fn b_load(self, x: &[u8; 64]) -> Self::B {
        *x
    }
    #[inline(always)]
    fn b_low(self, x: Self::B) -> Self::B {
        x.map(|b| b & 15)
    }
    #[inline(always)]
    fn b_high(self, x: Self::B) -> Self::B {
        x.map(|b| b >> 4)
    }
    #[inline(always)]
    fn dot(self, mut acc: Self::I, w: Self::B, x: i32) -> Self::I {
        let x = x.to_le_bytes().map(|b| i32::from(b as i8));
        for i in 0..LANES {
            for j in 0..4 {
                acc[i] += i32::from(w[4 * i + j]) * x[j];
            }
        }
        acc
    }
    #[inline(always)]
    fn dot_full(self, acc: Self::I, w: Self::B, x: i32) -> Self::I {
        self.dot(acc, w, x)
    }
    #[inline(always)]
    fn dot_bf16(self, acc: Self::F, w: Self::B, x: u32) -> Self::F {
        let pair = |x: u32| [f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000)];
        let x = pair(x);
        lanes!(i => {
            let w = pair(u32::from_le_bytes([w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]]));
            w[0].mul_add(x[0], w[1].mul_add(x[1], acc[i]))
        })
    }
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}
}
