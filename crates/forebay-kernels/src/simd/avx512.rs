//! AVX-512 with VNNI: one register per vector. With or without BF16, which Zen 4, Cooper Lake and Sapphire Rapids
//! brought.

use std::arch::x86_64::*;

use super::{LANES, Simd, WithSimd};

/// Proof that this CPU has the features of [`Avx512::enter`], and AVX512_BF16 if `BF16`.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool = false>(());

impl Avx512<true> {
    #[inline]
    pub(crate) fn detect_bf16() -> Option<Self> {
        (Avx512::detect().is_some() && is_x86_feature_detected!("avx512bf16")).then_some(Self(()))
    }

    #[inline]
    pub(crate) fn enter<K: WithSimd>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma,f16c")]
        fn inner<K: WithSimd>(simd: Avx512<true>, kernel: K) -> K::Output {
            kernel.with(simd)
        }
        // SAFETY: `self` exists only where `detect_bf16` found these features.
        unsafe { inner(self, kernel) }
    }
}

impl Avx512 {
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self(()))
    }

    #[inline]
    pub(crate) fn enter<K: WithSimd>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
        fn inner<K: WithSimd>(simd: Avx512, kernel: K) -> K::Output {
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

impl<const BF16: bool> Simd for Avx512<BF16> {
    type F = __m512;
    type I = __m512i;
    type B = __m512i;

    // 6 rows × 2 vectors are 12 integer and 12 float accumulators; 8 registers remain for weights and scales.
    const TILE_ROWS: usize = 6;
    // 6 rows × 4 registers of accumulators, 4 of keys, one broadcast.
    const ATTENTION_ROWS: usize = 6;
    const ATTENTION_VECTORS: usize = 4;
    const DOT_FULL_IS_OFFSET: bool = true;

    ops! {
        fn splat(self, x: f32) -> __m512 { _mm512_set1_ps(x) }
        fn load(self, x: &[f32; LANES]) -> __m512 { _mm512_loadu_ps(x.as_ptr()) }
        fn store(self, to: &mut [f32; LANES], x: __m512) { _mm512_storeu_ps(to.as_mut_ptr(), x) }
        fn load_f32(self, x: &[u8; 64]) -> __m512 { _mm512_loadu_ps(x.as_ptr().cast()) }
        fn load_f16(self, x: &[u8; 32]) -> __m512 { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
        fn store_f16(self, to: &mut [u8; 32], x: __m512) {
            _mm256_storeu_si256(to.as_mut_ptr().cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x))
        }
        fn add(self, a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(self, a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(self, a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(self, a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn max(self, a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        fn min(self, a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn round_to_i(self, a: __m512) -> __m512i { _mm512_cvtps_epi32(a) }
        fn i_to_f(self, a: __m512i) -> __m512 { _mm512_cvtepi32_ps(a) }
        fn exp2_i(self, a: __m512i) -> __m512 {
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(a, _mm512_set1_epi32(127))))
        }
        fn i_splat(self, x: i32) -> __m512i { _mm512_set1_epi32(x) }
        fn i_store(self, to: &mut [i32; LANES], x: __m512i) { _mm512_storeu_si512(to.as_mut_ptr().cast(), x) }
        fn b_load(self, x: &[u8; 64]) -> __m512i { _mm512_loadu_si512(x.as_ptr().cast()) }
        fn b_low(self, x: __m512i) -> __m512i { _mm512_and_si512(x, _mm512_set1_epi8(15)) }
        fn b_high(self, x: __m512i) -> __m512i {
            _mm512_and_si512(_mm512_srli_epi16::<4>(x), _mm512_set1_epi8(15))
        }
        fn dot(self, acc: __m512i, w: __m512i, x: i32) -> __m512i {
            _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x))
        }
        fn dot_full(self, acc: __m512i, w: __m512i, x: i32) -> __m512i {
            _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x))
        }
        fn dot_bf16(self, acc: __m512, w: __m512i, x: u32) -> __m512 {{
            let x = _mm512_set1_epi32(x.cast_signed());
            if BF16 {
                let pairs = |x: __m512i| std::mem::transmute::<__m512i, __m512bh>(x);
                _mm512_dpbf16_ps(acc, pairs(w), pairs(x))
            } else {
                let first = |x: __m512i| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x));
                let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
                let second = |x: __m512i| _mm512_castsi512_ps(_mm512_and_si512(x, high));
                _mm512_fmadd_ps(first(w), first(x), _mm512_fmadd_ps(second(w), second(x), acc))
            }
        }}
        fn prefetch(self, p: *const u8) { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}
