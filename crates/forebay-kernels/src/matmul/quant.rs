//! Micro-tiles of quantised weights: `N` rows of activations × 32 outputs, in registers over all columns.
//!
//! Per block of 32 columns an exact integer sum, then one fused multiply-add into the f32 accumulator with the
//! product of both scales, and one more where the type has minima: the scheme of ggml's `vec_dot`.

use std::marker::PhantomData;

use super::{Block, for_micro_tiles};
use crate::activations::XBlock;
use crate::matrix::Quant;
use crate::simd::{Simd, WithSimd};

/// How far ahead of a lone row the weights are asked for: the hardware prefetcher stops at page borders and
/// starts anew with every tile.
const PREFETCH_BYTES: usize = 2560;

pub(super) struct Kernel<'a, Q> {
    block: &'a Block<'a>,
    quant: PhantomData<Q>,
}

impl<'a, Q: Quant> Kernel<'a, Q> {
    pub(super) fn new(block: &'a Block<'a>) -> Self {
        Self { block, quant: PhantomData }
    }
}

impl<Q: Quant> WithSimd for Kernel<'_, Q> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let block = self.block;
        for_micro_tiles!(S, block, |weights, tile, row| micro::<S, Q>(s, block, weights, tile, row));
    }
}

#[inline(always)]
fn micro<S: Simd, Q: Quant, const N: usize>(s: S, to: &Block<'_>, weights: &[u8], tile: usize, row: usize) {
    let layout = const { Q::LAYOUT };
    let x: [&[XBlock]; N] = std::array::from_fn(|n| to.x.quantized_row(row + n));
    let mut acc = [[s.splat(0.0); 2]; N];
    for (b, block) in weights.chunks_exact(const { Q::LAYOUT.block_bytes() }).enumerate() {
        if N == 1 {
            for line in (0..layout.block_bytes()).step_by(64) {
                s.prefetch(block.as_ptr().wrapping_add(PREFETCH_BYTES + line));
            }
        }
        for half in 0..layout.halves {
            let sums = integer_sums::<S, Q, N>(s, block, &x, b, half);
            let scales = numbers::<S, Q>(s, block, half);
            for n in 0..N {
                let xs = s.splat(x[n][b].scale);
                for v in 0..2 {
                    acc[n][v] = s.fma(s.i_to_f(sums[n][v]), s.mul(scales[v], xs), acc[n][v]);
                }
            }
        }
        if layout.min {
            let minima = numbers::<S, Q>(s, block, layout.halves);
            for n in 0..N {
                let sum = s.splat(x[n][b].scaled_sum);
                for v in 0..2 {
                    acc[n][v] = s.fma(minima[v], sum, acc[n][v]);
                }
            }
        }
    }
    for (n, acc) in acc.iter().enumerate() {
        to.store(s, row + n, tile, acc);
    }
}

/// `Σ (code - offset) · q` over the columns of `half` of the block.
#[inline(always)]
fn integer_sums<S: Simd, Q: Quant, const N: usize>(
    s: S,
    block: &[u8],
    x: &[&[XBlock]; N],
    b: usize,
    half: usize,
) -> [[S::I; 2]; N] {
    let layout = const { Q::LAYOUT };
    let full = layout.offset == 128;
    let mut sums = [[s.i_splat(0); 2]; N];
    if layout.offset > 0 && (!full || S::DOT_FULL_IS_OFFSET) {
        for n in 0..N {
            let neg = if layout.halves == 1 { x[n][b].neg_sum } else { i32::from(x[n][b].neg_half[half]) };
            sums[n] = [s.i_splat(neg * i32::from(layout.offset)); 2];
        }
    }
    if layout.nibbles {
        for g in 0..4 {
            let w = [s.b_load(at(block, g * 128)), s.b_load(at(block, g * 128 + 64))];
            let low = [s.b_low(w[0]), s.b_low(w[1])];
            let high = [s.b_high(w[0]), s.b_high(w[1])];
            for n in 0..N {
                let q = &x[n][b].q;
                for v in 0..2 {
                    sums[n][v] = s.dot(sums[n][v], low[v], q[g]);
                    sums[n][v] = s.dot(sums[n][v], high[v], q[g + 4]);
                }
            }
        }
    } else {
        let groups = 8 / layout.halves;
        for g in half * groups..(half + 1) * groups {
            let w = [s.b_load(at(block, g * 128)), s.b_load(at(block, g * 128 + 64))];
            for n in 0..N {
                let q = x[n][b].q[g];
                for v in 0..2 {
                    sums[n][v] =
                        if full { s.dot_full(sums[n][v], w[v], q) } else { s.dot(sums[n][v], w[v], q) };
                }
            }
        }
    }
    sums
}

/// The `index`th run of 32 scales or minima after the codes.
#[inline(always)]
fn numbers<S: Simd, Q: Quant>(s: S, block: &[u8], index: usize) -> [S::F; 2] {
    let layout = const { Q::LAYOUT };
    let first = layout.code_bytes() + index * layout.scale_bytes();
    if layout.wide {
        [s.load_f32(at(block, first)), s.load_f32(at(block, first + 64))]
    } else {
        [s.load_f16(at(block, first)), s.load_f16(at(block, first + 32))]
    }
}

/// `L` bytes of a block, whose size the compiler knows: no check remains.
#[inline(always)]
fn at<const L: usize>(block: &[u8], start: usize) -> &[u8; L] {
    block[start..].first_chunk().expect("inside the block")
}
