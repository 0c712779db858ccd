//! AVX2 with FMA and F16C: two registers per vector.

use std::arch::x86_64::*;

use super::{LANES, Simd, WithSimd};

/// Proof that this CPU has the features of [`Avx2::enter`].
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self(()))
    }

    #[inline]
    pub(crate) fn enter<K: WithSimd>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn inner<K: WithSimd>(simd: Avx2, kernel: K) -> K::Output {
            kernel.with(simd)
        }
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { inner(self, kernel) }
    }
}

/// Methods whose bodies are intrinsics.
macro_rules! ops {
    ($(fn $name:ident(self $(, $a:ident: $t:ty)*) $(-> $r:ty)? { $body:expr })*) => {$(
        #[inline(always)]
        fn $name(self $(, $a: $t)*) $(-> $r)? {
            // SAFETY: `self` exists only where `detect` found the features; references to arrays of the
            // vector's size are valid for unaligned loads and stores; prefetching may take any address.
            unsafe { $body }
        }
    )*};
}

type F = [__m256; 2];
type I = [__m256i; 2];

impl Simd for Avx2 {
    type F = F;
    type I = I;
    type B = I;

    // 2 rows × 4 registers of integer accumulators leave 8 for weights, activations and constants.
    const TILE_ROWS: usize = 2;
    // 6 rows × 2 registers of accumulators, 2 of keys, one broadcast.
    const ATTENTION_ROWS: usize = 6;
    const ATTENTION_VECTORS: usize = 1;
    const DOT_FULL_IS_OFFSET: bool = false;

    ops! {
        fn splat(self, x: f32) -> F { [_mm256_set1_ps(x); 2] }
        fn load(self, x: &[f32; LANES]) -> F { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
        fn store(self, to: &mut [f32; LANES], x: F) {{
            _mm256_storeu_ps(to.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), x[1]);
        }}
        fn load_f32(self, x: &[u8; 64]) -> F {
            [_mm256_loadu_ps(x.as_ptr().cast()), _mm256_loadu_ps(x.as_ptr().add(32).cast())]
        }
        fn load_f16(self, x: &[u8; 32]) -> F {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().add(16).cast())),
            ]
        }
        fn store_f16(self, to: &mut [u8; 32], x: F) {{
            _mm_storeu_si128(to.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[0]));
            _mm_storeu_si128(to.as_mut_ptr().add(16).cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[1]));
        }}
        fn add(self, a: F, b: F) -> F { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        fn sub(self, a: F, b: F) -> F { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
        fn mul(self, a: F, b: F) -> F { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        fn div(self, a: F, b: F) -> F { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
        fn max(self, a: F, b: F) -> F { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
        fn min(self, a: F, b: F) -> F { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
        fn fma(self, a: F, b: F, c: F) -> F {
            [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
        }
        fn round_to_i(self, a: F) -> I { [_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1])] }
        fn i_to_f(self, a: I) -> F { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
        fn exp2_i(self, a: I) -> F {{
            let bias = _mm256_set1_epi32(127);
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(a[0], bias))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(a[1], bias))),
            ]
        }}
        fn i_splat(self, x: i32) -> I { [_mm256_set1_epi32(x); 2] }
        fn i_store(self, to: &mut [i32; LANES], x: I) {{
            _mm256_storeu_si256(to.as_mut_ptr().cast(), x[0]);
            _mm256_storeu_si256(to.as_mut_ptr().add(8).cast(), x[1]);
        }}
        fn b_load(self, x: &[u8; 64]) -> I {
            [_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(32).cast())]
        }
        fn b_low(self, x: I) -> I {{
            let mask = _mm256_set1_epi8(15);
            [_mm256_and_si256(x[0], mask), _mm256_and_si256(x[1], mask)]
        }}
        fn b_high(self, x: I) -> I {{
            let mask = _mm256_set1_epi8(15);
            [
                _mm256_and_si256(_mm256_srli_epi16::<4>(x[0]), mask),
                _mm256_and_si256(_mm256_srli_epi16::<4>(x[1]), mask),
            ]
        }}
        // Pairs add up to at most 2 · 127 · 127 = 32258, which an i16 holds.
        fn dot(self, acc: I, w: I, x: i32) -> I {{
            let (x, ones) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1));
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(_mm256_maddubs_epi16(w[0], x), ones)),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(_mm256_maddubs_epi16(w[1], x), ones)),
            ]
        }}
        // |w| ≤ 128 unsigned times x with w's sign: pairs add up to at most 2 · 128 · 127 = 32512.
        fn dot_full(self, acc: I, w: I, x: i32) -> I {{
            let (x, ones, flip) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1), _mm256_set1_epi8(-128));
            let w = [_mm256_xor_si256(w[0], flip), _mm256_xor_si256(w[1], flip)];
            let pairs = [
                _mm256_maddubs_epi16(_mm256_abs_epi8(w[0]), _mm256_sign_epi8(x, w[0])),
                _mm256_maddubs_epi16(_mm256_abs_epi8(w[1]), _mm256_sign_epi8(x, w[1])),
            ];
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(pairs[0], ones)),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(pairs[1], ones)),
            ]
        }}
        fn dot_bf16(self, acc: F, w: I, x: u32) -> F {{
            let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            let x = _mm256_set1_epi32(x.cast_signed());
            let x = [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)),
                _mm256_castsi256_ps(_mm256_and_si256(x, high)),
            ];
            let w0 = w.map(|w| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w)));
            let w1 = w.map(|w| _mm256_castsi256_ps(_mm256_and_si256(w, high)));
            [
                _mm256_fmadd_ps(w0[0], x[0], _mm256_fmadd_ps(w1[0], x[1], acc[0])),
                _mm256_fmadd_ps(w0[1], x[0], _mm256_fmadd_ps(w1[1], x[1], acc[1])),
            ]
        }}
        fn prefetch(self, p: *const u8) { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}
