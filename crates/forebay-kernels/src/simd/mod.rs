//! Vectors of sixteen lanes, on every instruction set with the same results.
//!
//! A kernel is a [`WithSimd`] whose `with` is generic over [`Simd`]; [`crate::Isa::run`] instantiates it inside
//! a function that has the CPU features switched on, and everything `#[inline(always)]` below it is compiled
//! with them. The tokens ([`Avx512`], [`Avx2`], [`Scalar`]) can be made only where detection found the CPU
//! features, so the operations on values are safe. (The pattern is that of the `pulp` and `memchr` crates.)
//!
//! Deliberately absent: operations whose result differs between instruction sets (approximate reciprocals,
//! `min`/`max` of NaN, saturation on conversion). Horizontal sums have one fixed order.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use scalar::Scalar;

/// Lanes of every vector here: one AVX-512 register, two of AVX2.
pub(crate) const LANES: usize = 16;

/// A kernel, to be instantiated for one instruction set. `with` must be `#[inline(always)]`.
pub(crate) trait WithSimd {
    type Output;
    fn with<S: Simd>(self, simd: S) -> Self::Output;
}

/// The operations. Every method is `#[inline(always)]` in every implementation.
pub(crate) trait Simd: Copy {
    /// 16 × f32.
    type F: Copy;
    /// 16 × i32.
    type I: Copy;
    /// 64 × u8.
    type B: Copy;

    /// Rows of activations that a matrix micro-tile (two vectors wide) holds in registers.
    const TILE_ROWS: usize;
    /// Rows of an attention micro-tile: 6 or 1.
    const ATTENTION_ROWS: usize;
    /// Vectors that an attention micro-tile is wide: 4 or 1.
    const ATTENTION_VECTORS: usize;
    /// Whether [`Self::dot_full`] multiplies weights as stored (offset by 128), so that the kernel takes
    /// `128 · Σx` off; otherwise it takes the offset off itself.
    const DOT_FULL_IS_OFFSET: bool;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, to: &mut [f32; LANES], x: Self::F);
    /// Little-endian f32, at any address.
    fn load_f32(self, x: &[u8; 64]) -> Self::F;
    /// Little-endian f16, at any address; exact.
    fn load_f16(self, x: &[u8; 32]) -> Self::F;
    /// Rounds to little-endian f16, ties to even.
    fn store_f16(self, to: &mut [u8; 32], x: Self::F);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// The larger; `b` if either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; `b` if either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// To the nearest integer, ties to even. Meaningful for |a| < 2^31.
    fn round_to_i(self, a: Self::F) -> Self::I;
    fn i_to_f(self, a: Self::I) -> Self::F;
    /// `2^a` for -126 ≤ a ≤ 127.
    fn exp2_i(self, a: Self::I) -> Self::F;

    fn i_splat(self, x: i32) -> Self::I;
    fn i_store(self, to: &mut [i32; LANES], x: Self::I);

    fn b_load(self, x: &[u8; 64]) -> Self::B;
    /// The low four bits of every byte.
    fn b_low(self, x: Self::B) -> Self::B;
    /// The high four bits of every byte.
    fn b_high(self, x: Self::B) -> Self::B;
    /// Lane `i` gets `acc[i] + Σ_j w[4i+j] · x[j]`, `x` being four signed bytes; exact for `w ≤ 127`.
    fn dot(self, acc: Self::I, w: Self::B, x: i32) -> Self::I;
    /// The same for any `w`, which stand for `w - 128`; see [`Self::DOT_FULL_IS_OFFSET`]. `x` may not be -128.
    fn dot_full(self, acc: Self::I, w: Self::B, x: i32) -> Self::I;

    /// Lane `i` gets `fma(w[2i], x[0], fma(w[2i+1], x[1], acc))`, the second pair of bf16 first: what VDPBF16PS
    /// does. Exact like [`Self::fma`] as long as nothing is or becomes subnormal; VDPBF16PS takes that for zero.
    fn dot_bf16(self, acc: Self::F, w: Self::B, x: u32) -> Self::F;

    /// Asks for the cache line at `p`. Any address is fine.
    fn prefetch(self, p: *const u8);

    /// Sum of the lanes, as a balanced tree: (0+8), (1+9), ... then halves of that.
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, x);
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// Largest lane. No lane may be NaN.
    #[inline(always)]
    fn max_lane(self, x: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, x);
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] = if lanes[i] > lanes[i + width] { lanes[i] } else { lanes[i + width] };
            }
            width /= 2;
        }
        lanes[0]
    }

    /// `e^x`, relative error below 2e-7; inputs are clamped to [-87, 88], so that 0 and infinity don't occur.
    ///
    /// Range reduction by ln 2 in two parts and a degree-5 polynomial: Cephes' `expf`.
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        let x = self.min(self.max(x, self.splat(-87.0)), self.splat(88.0));
        let n = self.round_to_i(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        let nf = self.i_to_f(n);
        let r = self.fma(nf, self.splat(-0.693_359_4), x);
        let r = self.fma(nf, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = self.fma(p, r, self.splat(c));
        }
        let y = self.add(self.fma(p, self.mul(r, r), r), self.splat(1.0));
        self.mul(y, self.exp2_i(n))
    }
}
