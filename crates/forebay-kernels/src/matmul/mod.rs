//! The product of activations and weights: what goes to which thread, in which order.
//!
//! Deliberately absent: splitting the inner dimension. Every output is one chain of fused multiply-adds over the
//! columns, first to last, whatever the number of rows or threads, so that a token's logits don't depend on
//! what else is in the batch.

mod bf16;
mod float;
mod quant;

use std::ops::Range;

use crate::activations::Activations;
use crate::buffer::SharedMut;
use crate::matrix::{Matrix, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Segment, TILE};
use crate::simd::{LANES, Simd};
use crate::{Isa, Pool, TensorType};

/// Activations of a chunk stay below this, so that they stay in the L2 cache (1 MiB and more) while the tiles of
/// the chunk pass by. (Tests cut finer here and below, so that small products take every path.)
const ROW_BLOCK_BYTES: usize = if cfg!(test) { 8 << 10 } else { 384 << 10 };
/// Rows of a chunk are a multiple of every micro-tile's (6, 2, 1), lest each chunk end in a slow partial one.
const ROW_STEP: usize = 12;
/// Work below this (some 7 µs) stays on the caller's thread: a hand-over costs about 1 µs even to a thread that
/// spins.
const PARALLEL_BYTES: usize = if cfg!(test) { 4 << 10 } else { 256 << 10 };

/// `y[r][o] = Σ_c x[r][c] · w[o][c]`, with `y: [x.rows(), w.rows()]`.
///
/// A row of `y` has the same bits whatever the other rows of `x`, the number of threads, and the instruction
/// set. Quantised weights see eight-bit activations, bf16 weights bf16 ones, f16 and f32 weights f32 ones. Runs to its end; allocates nothing.
///
/// # Panics
/// If the shapes don't agree, or `x` was prepared for another type of weights.
pub fn matmul(pool: &Pool, w: &Matrix, x: &Activations, y: &mut [f32]) {
    assert!(x.fits(w), "activations are not prepared for this matrix");
    assert_eq!(y.len(), x.rows() * w.rows(), "y is [x.rows(), w.rows()]");
    if x.rows() == 0 {
        return;
    }
    let grid = Grid::new(pool, w, x);
    let y = SharedMut::new(y);
    pool.run(grid.chunks(w), &|chunk| {
        let (segment, tiles, rows) = grid.locate(w, x.rows(), chunk);
        // Chunks have disjoint (rows, tiles) of `y`: that is what `Block` promises to the kernels.
        run(w.isa(), &Block { segment, tiles, x, rows, y, stride: w.rows() });
    });
}

/// How a product is cut into chunks: blocks of rows times runs of tiles, for each segment.
struct Grid {
    tiles_per_chunk: usize,
    rows_per_chunk: usize,
    row_chunks: usize,
}

impl Grid {
    fn new(pool: &Pool, w: &Matrix, x: &Activations) -> Self {
        let tiles: usize = w.segments().iter().map(Segment::tiles).sum();
        let rows = x.rows();
        let fit = ROW_BLOCK_BYTES / x.quantized_row_bytes().max(1);
        let rows_per_chunk = (fit / ROW_STEP * ROW_STEP).max(ROW_STEP);
        let row_chunks = rows.div_ceil(rows_per_chunk);
        // Equal blocks rather than full ones and a rest.
        let rows_per_chunk = rows.div_ceil(row_chunks).next_multiple_of(ROW_STEP);
        let row_chunks = rows.div_ceil(rows_per_chunk);
        let work = w.bytes().saturating_mul(rows.div_ceil(4));
        let tiles_per_chunk = if pool.threads() == 1 || work < PARALLEL_BYTES {
            tiles
        } else {
            (tiles * row_chunks / (pool.threads() * 8)).clamp(1, tiles)
        };
        Self { tiles_per_chunk, rows_per_chunk, row_chunks }
    }

    fn chunks(&self, w: &Matrix) -> usize {
        w.segments().iter().map(|s| s.tiles().div_ceil(self.tiles_per_chunk)).sum::<usize>() * self.row_chunks
    }

    fn locate<'a>(
        &self,
        w: &'a Matrix,
        rows: usize,
        chunk: usize,
    ) -> (&'a Segment, Range<usize>, Range<usize>) {
        let per_row_chunk = self.chunks(w) / self.row_chunks;
        let first_row = chunk / per_row_chunk * self.rows_per_chunk;
        let mut index = chunk % per_row_chunk;
        for segment in w.segments() {
            let chunks = segment.tiles().div_ceil(self.tiles_per_chunk);
            if index < chunks {
                let first = index * self.tiles_per_chunk;
                let tiles = first..(first + self.tiles_per_chunk).min(segment.tiles());
                return (segment, tiles, first_row..(first_row + self.rows_per_chunk).min(rows));
            }
            index -= chunks;
        }
        unreachable!("chunk {chunk} of {}", self.chunks(w))
    }
}

/// One chunk: some tiles of a segment times some rows of activations.
///
/// Whoever makes one promises that no other thread uses these rows and columns of `y` meanwhile, and that `y` is
/// `[x.rows(), stride]` and still borrowed.
struct Block<'a> {
    segment: &'a Segment,
    tiles: Range<usize>,
    x: &'a Activations,
    rows: Range<usize>,
    y: SharedMut<f32>,
    stride: usize,
}

impl Block<'_> {
    /// Writes the 32 outputs of a tile for one row, or fewer in the last tile.
    #[inline(always)]
    fn store<S: Simd>(&self, s: S, row: usize, tile: usize, values: &[S::F; 2]) {
        let col = tile * TILE;
        let width = TILE.min(self.segment.rows - col);
        let at = row * self.stride + self.segment.first_row + col;
        // SAFETY: by the promise of whoever made the block; `row` and `tile` are in its ranges.
        let out = unsafe { self.y.slice(at, width) };
        // Straight from the registers where that can be: a copy of so few bytes is a call all the same.
        let mut part = [[0.0; LANES]; 2];
        let whole = width == TILE;
        let to = if whole { out.as_chunks_mut().0 } else { &mut part[..] };
        for (to, &values) in to.iter_mut().zip(values) {
            s.store(to, values);
        }
        if !whole {
            out.copy_from_slice(&part.as_flattened()[..width]);
        }
    }
}

fn run(isa: Isa, block: &Block<'_>) {
    match block.segment.ty {
        TensorType::F32 => isa.run(float::Kernel::<float::F32>::new(block)),
        TensorType::F16 => isa.run(float::Kernel::<float::F16>::new(block)),
        TensorType::BF16 => isa.run_bf16(bf16::Kernel { block }),
        TensorType::Q4_0 => isa.run(quant::Kernel::<Q4_0>::new(block)),
        TensorType::Q4_1 => isa.run(quant::Kernel::<Q4_1>::new(block)),
        TensorType::Q5_0 => isa.run(quant::Kernel::<Q5_0>::new(block)),
        TensorType::Q5_1 => isa.run(quant::Kernel::<Q5_1>::new(block)),
        TensorType::Q8_0 => isa.run(quant::Kernel::<Q8_0>::new(block)),
        TensorType::Q4K => isa.run(quant::Kernel::<Q4K>::new(block)),
        TensorType::Q5K => isa.run(quant::Kernel::<Q5K>::new(block)),
        TensorType::Q6K => isa.run(quant::Kernel::<Q6K>::new(block)),
    }
}

/// Calls `$micro::<N>` for each tile of the block and runs of `N` rows: as few micro-tiles as the rows need, of sizes as
/// equal as can be (8 rows are 4 + 4, not 6 + 2: a small tile is bound by latency).
macro_rules! for_micro_tiles {
    ($S:ident, $block:ident, |$weights:ident, $tile:ident, $row:ident| $micro:ident::<$($t:ty),*>($($arg:expr),*)) => {
        for $tile in $block.tiles.clone() {
            let $weights = $block.segment.tile($tile);
            let mut $row = $block.rows.start;
            while $row < $block.rows.end {
                let left = $block.rows.end - $row;
                let n = left.div_ceil(left.div_ceil($S::TILE_ROWS));
                // Sizes that an instruction set doesn't use are not even instantiated: half the build time.
                if const { $S::TILE_ROWS >= 6 } && n == 6 {
                    $micro::<$($t,)* 6>($($arg),*);
                } else if const { $S::TILE_ROWS >= 5 } && n == 5 {
                    $micro::<$($t,)* 5>($($arg),*);
                } else if const { $S::TILE_ROWS >= 4 } && n == 4 {
                    $micro::<$($t,)* 4>($($arg),*);
                } else if const { $S::TILE_ROWS >= 3 } && n == 3 {
                    $micro::<$($t,)* 3>($($arg),*);
                } else if const { $S::TILE_ROWS >= 2 } && n == 2 {
                    $micro::<$($t,)* 2>($($arg),*);
                } else {
                    debug_assert_eq!(n, 1);
                    $micro::<$($t,)* 1>($($arg),*);
                }
                $row += n;
            }
        }
    };
}
use for_micro_tiles;

#[cfg(test)]
mod tests;
