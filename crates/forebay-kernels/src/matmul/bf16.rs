//! Micro-tiles of bf16 weights with bf16 activations, added up in f32.
//!
//! VDPBF16PS multiplies twice as many numbers at a time as an f32 FMA. The product of two bf16 is exact in f32, so
//! that it rounds as often as two FMAs do, and instruction sets without it do just these.

use super::{Block, for_micro_tiles};
use crate::matrix::TILE;
use crate::simd::{Simd, WithSimd};

pub(super) struct Kernel<'a> {
    pub(super) block: &'a Block<'a>,
}

impl WithSimd for Kernel<'_> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let block = self.block;
        for_micro_tiles!(S, block, |weights, tile, row| micro::<S>(s, block, weights, tile, row));
    }
}

#[inline(always)]
fn micro<S: Simd, const N: usize>(s: S, to: &Block<'_>, weights: &[u8], tile: usize, row: usize) {
    let x: [&[u32]; N] = std::array::from_fn(|n| to.x.bf16_row(row + n));
    let mut acc = [[s.splat(0.0); 2]; N];
    for (k, weights) in weights.as_chunks::<{ TILE * 4 }>().0.iter().enumerate() {
        let (halves, _) = weights.as_chunks::<64>();
        let w = [s.b_load(&halves[0]), s.b_load(&halves[1])];
        for n in 0..N {
            let x = x[n][k];
            for v in 0..2 {
                acc[n][v] = s.dot_bf16(acc[n][v], w[v], x);
            }
        }
    }
    for (n, acc) in acc.iter().enumerate() {
        to.store(s, row + n, tile, acc);
    }
}
