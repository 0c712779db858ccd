//! The right-hand side of a matrix product: rows of activations, as f32, as bf16 and quantised to eight bits.

use crate::buffer::SharedMut;
use crate::matrix::{GROUP, Matrix};
use crate::simd::{LANES, Simd, WithSimd};
use crate::{Isa, Pool};

/// Thirty-two activations, laid out for the matrix kernels: all that they need of a block is on one cache line.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C, align(16))]
pub(crate) struct XBlock {
    /// Four signed bytes to an i32, first value in the lowest byte. Never -128.
    pub(crate) q: [i32; 8],
    pub(crate) scale: f32,
    /// `scale · Σq`, for weights with a minimum.
    pub(crate) scaled_sum: f32,
    /// `-Σq`, for weights with an offset.
    pub(crate) neg_sum: i32,
    /// The same of each half, for weights with a scale per 16.
    pub(crate) neg_half: [i16; 2],
}

/// Rows of activations, ready for [`crate::matmul()`]. Keeps its memory from one use to the next.
///
/// The eight-bit form is that of ggml's Q8_1 (`q = round(x · 127 / max|x|)` per 32 values), with f32 scales and
/// ties to even, so that quantised products agree closely with llama.cpp's.
#[derive(Debug, Default)]
pub struct Activations {
    rows: usize,
    cols: usize,
    groups: usize,
    blocks: Vec<XBlock>,
    values: Vec<f32>,
    /// Two bf16 to a word, the first in the low half; a zero beside an odd last column.
    pairs: Vec<u32>,
    has: Has,
}

/// Activations that a thread rounds at a time, about 5 µs.
const ROUND_CHUNK: usize = 16 << 10;

/// Which forms are filled in.
#[derive(Debug, Clone, Copy, Default)]
struct Has {
    quantized: bool,
    float: bool,
    bf16: bool,
}

/// The smallest activation in bf16, 2^-56, as f32. What is below becomes zero, lest a sum be subnormal: see
/// `matrix::pack`.
const BF16_MIN: u32 = (127 - 56) << 23;

impl Activations {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Takes `x: [rows, cols]` in all forms, for matrices of any type.
    ///
    /// A quantised block with an infinity or a NaN in it makes the products of its row NaN.
    ///
    /// # Panics
    /// If `x` hasn't `rows · cols` values.
    pub fn quantize(&mut self, pool: &Pool, isa: Isa, x: &[f32], rows: usize, cols: usize) {
        self.fill(pool, isa, x, rows, cols, Has { quantized: true, float: true, bf16: true });
    }

    /// Takes `x: [rows, w.cols()]` in the forms that `w` needs, and in no other. Matrices that use the same
    /// types can share it.
    ///
    /// # Panics
    /// If `x` is no whole number of rows.
    pub fn prepare(&mut self, pool: &Pool, w: &Matrix, x: &[f32]) {
        let cols = w.cols();
        assert!(x.len().is_multiple_of(cols), "whole rows");
        let has = Has { quantized: w.has_quantized(), float: w.has_float(), bf16: w.has_bf16() };
        self.fill(pool, w.isa(), x, x.len() / cols, cols, has);
    }

    fn fill(&mut self, pool: &Pool, isa: Isa, x: &[f32], rows: usize, cols: usize, has: Has) {
        assert_eq!(x.len(), rows * cols, "x is [rows, cols]");
        (self.rows, self.cols, self.groups, self.has) = (rows, cols, cols.div_ceil(GROUP), has);
        if has.float {
            self.values.clear();
            self.values.extend_from_slice(x);
        }
        if has.bf16 {
            self.round(pool, isa, x);
        }
        if !has.quantized || rows == 0 || cols == 0 {
            return;
        }
        let groups = self.groups;
        // Grown only: every block in use is overwritten below.
        if self.blocks.len() < rows * groups {
            self.blocks.resize(rows * groups, XBlock::default());
        }
        // About 10 ns a block: a chunk of 1024 blocks is 10 µs.
        let rows_per_chunk = (1024 / groups).max(1);
        let blocks = SharedMut::new(&mut self.blocks);
        pool.run(rows.div_ceil(rows_per_chunk), &|chunk| {
            let first = chunk * rows_per_chunk;
            let last = (first + rows_per_chunk).min(rows);
            for row in first..last {
                // SAFETY: chunks have disjoint rows, and `blocks` holds at least `rows · groups`.
                let blocks = unsafe { blocks.slice(row * groups, groups) };
                isa.run(QuantizeRow { x: &x[row * cols..(row + 1) * cols], blocks });
            }
        });
    }

    fn round(&mut self, pool: &Pool, isa: Isa, x: &[f32]) {
        let (cols, stride) = (self.cols, self.cols.div_ceil(2));
        if stride == 0 {
            return;
        }
        // Grown only, like the blocks.
        if self.pairs.len() < self.rows * stride {
            self.pairs.resize(self.rows * stride, 0);
        }
        let rows_per_chunk = (ROUND_CHUNK / cols).max(1);
        pool.run_rows(&mut self.pairs[..self.rows * stride], stride, rows_per_chunk, &|first, out| {
            let x = x[first * cols..].chunks_exact(cols);
            for (out, x) in out.chunks_exact_mut(stride).zip(x) {
                isa.run(RoundRow { x, out });
            }
        });
    }

    /// The row in pairs of bf16.
    #[inline(always)]
    pub(crate) fn bf16_row(&self, row: usize) -> &[u32] {
        debug_assert!(self.has.bf16, "not prepared for bf16");
        let stride = self.cols.div_ceil(2);
        &self.pairs[row * stride..(row + 1) * stride]
    }

    /// The quantised row, one block per 32 columns.
    #[inline(always)]
    pub(crate) fn quantized_row(&self, row: usize) -> &[XBlock] {
        debug_assert!(self.has.quantized, "prepared for a float matrix only");
        &self.blocks[row * self.groups..(row + 1) * self.groups]
    }

    #[inline(always)]
    pub(crate) fn float_row(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..(row + 1) * self.cols]
    }

    /// Whether `w` finds here what it needs.
    pub(crate) fn fits(&self, w: &Matrix) -> bool {
        self.cols == w.cols()
            && (self.has.quantized || !w.has_quantized())
            && (self.has.float || !w.has_float())
            && (self.has.bf16 || !w.has_bf16())
    }

    /// Bytes that one quantised row takes; the kernels cut rows so that they stay in the L2 cache.
    pub(crate) fn quantized_row_bytes(&self) -> usize {
        self.groups * size_of::<XBlock>()
    }
}

struct RoundRow<'a> {
    x: &'a [f32],
    out: &'a mut [u32],
}

impl WithSimd for RoundRow<'_> {
    type Output = ();

    /// Integer arithmetic, which the compiler makes vectors of.
    #[inline(always)]
    fn with<S: Simd>(self, _: S) {
        let (pairs, rest) = self.x.as_chunks::<2>();
        for (out, x) in self.out.iter_mut().zip(pairs) {
            *out = round_bf16(x[0]) | round_bf16(x[1]) << 16;
        }
        if let (Some(out), &[x]) = (self.out.get_mut(pairs.len()), rest) {
            *out = round_bf16(x);
        }
    }
}

/// The nearest bf16, ties to even, in the low half.
#[inline(always)]
fn round_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let size = bits & !(1 << 31);
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 1 << 6;
    let kept = if size > f32::INFINITY.to_bits() { quiet } else { rounded };
    if size < BF16_MIN { 0 } else { kept }
}

struct QuantizeRow<'a> {
    x: &'a [f32],
    blocks: &'a mut [XBlock],
}

impl WithSimd for QuantizeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let (whole, rest) = self.x.as_chunks::<GROUP>();
        for (block, x) in self.blocks.iter_mut().zip(whole) {
            *block = quantize_block(s, x);
        }
        if let Some(block) = self.blocks.get_mut(whole.len()) {
            let mut x = [0.0; GROUP];
            x[..rest.len()].copy_from_slice(rest);
            *block = quantize_block(s, &x);
        }
    }
}

#[inline(always)]
fn quantize_block<S: Simd>(s: S, x: &[f32; GROUP]) -> XBlock {
    // As integers, sizes of floats order like the floats, and NaN comes last: it is not lost in a comparison.
    let max = f32::from_bits(x.iter().fold(0, |max, x| max.max(x.to_bits() & !(1 << 31))));
    if !max.is_finite() {
        return XBlock { scale: f32::NAN, scaled_sum: f32::NAN, ..XBlock::default() };
    }
    // Below this the reciprocal would overflow; such a block is all zeros for any practical purpose.
    let inverse = if max > 1e-36 { 127.0 / max } else { 0.0 };
    let (halves, _) = x.as_chunks::<LANES>();
    let (a, b) = (s.load(&halves[0]), s.load(&halves[1]));
    let by = s.splat(inverse);
    let mut q = [[0; LANES]; 2];
    s.i_store(&mut q[0], s.round_to_i(s.mul(a, by)));
    s.i_store(&mut q[1], s.round_to_i(s.mul(b, by)));
    let scale = max / 127.0;
    let half = q.map(|q| q.iter().sum::<i32>());
    let sum = half[0] + half[1];
    let mut block = XBlock {
        scale,
        scaled_sum: scale * sum as f32,
        neg_sum: -sum,
        // At most 16 · 127 in size.
        neg_half: half.map(|h| -h as i16),
        ..XBlock::default()
    };
    for (packed, q) in block.q.iter_mut().zip(q.as_flattened().as_chunks::<4>().0) {
        *packed = q[0] & 255 | (q[1] & 255) << 8 | (q[2] & 255) << 16 | q[3] << 24;
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantize(isa: Isa, x: &[f32]) -> Vec<XBlock> {
        let mut a = Activations::new();
        a.quantize(&Pool::new(1), isa, x, 1, x.len());
        a.quantized_row(0).to_vec()
    }

    #[test]
    fn a_block_reads_back_to_half_a_step() {
        let x: Vec<f32> = (0..70).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            let blocks = quantize(isa, &x);
            assert_eq!(blocks.len(), 3);
            for (i, block) in blocks.iter().enumerate() {
                let q: Vec<i8> = block.q.iter().flat_map(|q| q.to_le_bytes()).map(|b| b as i8).collect();
                for (j, &q) in q.iter().enumerate() {
                    let want = x.get(i * 32 + j).copied().unwrap_or(0.0);
                    assert!((f32::from(q) * block.scale - want).abs() <= 0.501 * block.scale);
                }
                let sum: i32 = q.iter().map(|&q| i32::from(q)).sum();
                assert_eq!(block.neg_sum, -sum);
                assert_eq!(i32::from(block.neg_half[0]) + i32::from(block.neg_half[1]), -sum);
            }
            assert_eq!(blocks, quantize(Isa::Scalar, &x), "{isa}");
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even_and_keeps_what_is_no_number() {
        let pool = Pool::new(2);
        let mut random = crate::fixtures::Random(5);
        let mut x =
            vec![0.0, -0.0, 1.0, 1.003_906_2, 1.011_718_8, 3.4e38, f32::MAX, f32::MIN, f32::INFINITY, 1e-16];
        x.extend(random.floats(40_001));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            for cols in [1, 2, 3, x.len()] {
                let x = &x[..x.len() / cols * cols];
                let mut a = Activations::new();
                a.quantize(&pool, isa, x, x.len() / cols, cols);
                let rows = (0..a.rows()).flat_map(|row| {
                    let halves = a.bf16_row(row).iter().flat_map(|&pair| [pair as u16, (pair >> 16) as u16]);
                    halves.take(cols)
                });
                for (got, &x) in rows.zip(x) {
                    let expect = if x == 0.0 { 0 } else { half::bf16::from_f32(x).to_bits() };
                    assert_eq!(got, expect, "{x} {isa} {cols}");
                }
            }
        }
        for (x, expect) in [(f32::NAN, true), (f32::from_bits(0x7f80_0001), true), (f32::NEG_INFINITY, false)]
        {
            let found = half::bf16::from_bits(round_bf16(x) as u16);
            assert_eq!((found.is_nan(), found.is_infinite()), (expect, !expect));
        }
        assert_eq!((round_bf16(1e-17), round_bf16(-1e-40)), (0, 0));
    }

    #[test]
    fn zeros_tiny_values_and_no_numbers_have_a_defined_form() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            assert_eq!(quantize(isa, &[0.0; 32])[0], XBlock::default());
            assert_eq!(quantize(isa, &[1e-40; 32])[0].q, [0; 8]);
            for bad in [f32::INFINITY, f32::NAN] {
                let block = quantize(isa, &[&[bad][..], &[1.0; 31]].concat())[0];
                assert!(block.scale.is_nan() && block.scaled_sum.is_nan());
            }
        }
    }
}
