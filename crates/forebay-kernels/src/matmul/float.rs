//! Micro-tiles of f32 and f16 weights: stored as they are, multiplied in f32.

use std::marker::PhantomData;

use super::{Block, for_micro_tiles};
use crate::matrix::TILE;
use crate::simd::{Simd, WithSimd};

/// A storage format of sixteen-lane vectors.
pub(super) trait Element {
    /// Bytes of 32 weights.
    const BYTES: usize;
    fn load<S: Simd>(s: S, weights: &[u8]) -> [S::F; 2];
}

pub(super) struct F32;
pub(super) struct F16;

impl Element for F32 {
    const BYTES: usize = TILE * 4;
    #[inline(always)]
    fn load<S: Simd>(s: S, weights: &[u8]) -> [S::F; 2] {
        [s.load_f32(at(weights, 0)), s.load_f32(at(weights, 64))]
    }
}

impl Element for F16 {
    const BYTES: usize = TILE * 2;
    #[inline(always)]
    fn load<S: Simd>(s: S, weights: &[u8]) -> [S::F; 2] {
        [s.load_f16(at(weights, 0)), s.load_f16(at(weights, 32))]
    }
}

pub(super) struct Kernel<'a, E> {
    block: &'a Block<'a>,
    element: PhantomData<E>,
}

impl<'a, E: Element> Kernel<'a, E> {
    pub(super) fn new(block: &'a Block<'a>) -> Self {
        Self { block, element: PhantomData }
    }
}

impl<E: Element> WithSimd for Kernel<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let block = self.block;
        for_micro_tiles!(S, block, |weights, tile, row| micro::<S, E>(s, block, weights, tile, row));
    }
}

#[inline(always)]
fn micro<S: Simd, E: Element, const N: usize>(s: S, to: &Block<'_>, weights: &[u8], tile: usize, row: usize) {
    let x: [&[f32]; N] = std::array::from_fn(|n| to.x.float_row(row + n));
    let mut acc = [[s.splat(0.0); 2]; N];
    for (k, weights) in weights.chunks_exact(E::BYTES).enumerate() {
        let w = E::load(s, weights);
        for n in 0..N {
            let x = s.splat(x[n][k]);
            for v in 0..2 {
                acc[n][v] = s.fma(w[v], x, acc[n][v]);
            }
        }
    }
    for (n, acc) in acc.iter().enumerate() {
        to.store(s, row + n, tile, acc);
    }
}

#[inline(always)]
fn at<const L: usize>(weights: &[u8], start: usize) -> &[u8; L] {
    weights[start..].first_chunk().expect("inside the vector")
}
