//! Attention in which every token sees every token of its sequence: encoders. All in f32, nothing is cached.
//!
//! Keys are turned once, so that sixteen tokens share a vector of scores; then every query is on its own: scores, a
//! softmax over the whole sequence, the weighted values, each one chain of operations over the sequence's tokens in
//! order. A row's result therefore has the same bits whatever else is in the batch.

use std::cell::RefCell;
use std::ops::Range;

use crate::simd::{LANES, Simd, WithSimd};
use crate::{Isa, Pool};

/// Queries that share each load of keys and values.
const ROWS: usize = 4;
/// Queries of a chunk of work.
const CHUNK_ROWS: usize = 16;

/// What all sequences of a pass have in common.
#[derive(Debug, Clone, Copy)]
pub struct FullShape {
    pub heads: usize,
    pub head_dim: usize,
    /// What scores are multiplied with, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl FullShape {
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// `out[q] = Σ_t softmax_t(scale · q·k_t) v_t` over all tokens of the query's sequence.
///
/// `qkv` is `[T, 3 · heads · head_dim]`: queries, keys and values of each token. Sequence `r` is the tokens
/// `starts[r]..starts[r + 1]`. `out` is `[T, heads · head_dim]`. `turned` is memory for the keys, kept from call to call.
///
/// # Panics
/// If shapes don't agree or `starts` does not ascend from 0 to `T`.
pub fn full_attention(
    pool: &Pool,
    isa: Isa,
    shape: FullShape,
    starts: &[usize],
    qkv: &[f32],
    turned: &mut Vec<f32>,
    out: &mut [f32],
) {
    let width = shape.width();
    assert!(width > 0 && out.len().is_multiple_of(width), "whole rows");
    let tokens = out.len() / width;
    assert_eq!(qkv.len(), tokens * 3 * width, "qkv is [T, 3 · heads · head_dim]");
    assert!(starts.first() == Some(&0) && starts.last() == Some(&tokens), "starts cover the tokens");
    assert!(starts.is_sorted(), "starts ascend");
    if tokens == 0 {
        return;
    }
    // Every sequence begins at a whole vector.
    let mut columns = Vec::with_capacity(starts.len());
    columns.push(0);
    for pair in starts.windows(2) {
        let last = columns[columns.len() - 1];
        columns.push(last + (pair[1] - pair[0]).next_multiple_of(LANES));
    }
    let stride = columns[columns.len() - 1];
    if turned.len() < width * stride {
        turned.resize(width * stride, 0.0);
    }
    let turned = &mut turned[..width * stride];
    pool.run_rows(turned, stride, 8, &|first, rows| {
        for (row, at) in rows.chunks_exact_mut(stride).zip(width + first..) {
            for (pair, &column) in starts.windows(2).zip(&columns) {
                let len = pair[1] - pair[0];
                let to = &mut row[column..column + len.next_multiple_of(LANES)];
                for (to, token) in to.iter_mut().zip(pair[0]..pair[1]) {
                    *to = qkv[token * 3 * width + at];
                }
                to[len..].fill(0.0);
            }
        }
    });
    let pass = Pass { shape, starts, columns: &columns, stride, keys: turned, qkv };
    pool.run_rows(out, width, CHUNK_ROWS, &|first, rows| {
        SCRATCH.with_borrow_mut(|scratch| isa.run(Chunk { pass: &pass, first, out: rows, scratch }));
    });
}

thread_local! {
    /// Grows to the longest sequence of this thread and stays.
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

#[derive(Default)]
struct Scratch {
    /// `[ROWS][head_dim]`, scaled.
    queries: Vec<f32>,
    /// `[ROWS][tokens of the sequence, whole vectors]`
    scores: Vec<f32>,
}

struct Pass<'a> {
    shape: FullShape,
    starts: &'a [usize],
    /// Where each sequence begins in a row of `keys`.
    columns: &'a [usize],
    stride: usize,
    /// `[heads · head_dim, stride]`
    keys: &'a [f32],
    qkv: &'a [f32],
}

/// Some queries at consecutive rows.
struct Chunk<'a, 'b> {
    pass: &'a Pass<'b>,
    first: usize,
    out: &'a mut [f32],
    scratch: &'a mut Scratch,
}

impl WithSimd for Chunk<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let Self { pass, first, out, scratch } = self;
        let end = first + out.len() / pass.shape.width();
        for head in 0..pass.shape.heads {
            let mut row = first;
            while row < end {
                let sequence = pass.starts.partition_point(|&start| start <= row) - 1;
                let left = end.min(pass.starts[sequence + 1]) - row;
                let out = &mut out[(row - first) * pass.shape.width()..];
                let at = At { sequence, head, row };
                row += match left {
                    1 => tile::<S, 1>(s, pass, at, scratch, out),
                    2 => tile::<S, 2>(s, pass, at, scratch, out),
                    3 => tile::<S, 3>(s, pass, at, scratch, out),
                    _ => tile::<S, ROWS>(s, pass, at, scratch, out),
                };
            }
        }
    }
}

struct At {
    sequence: usize,
    head: usize,
    row: usize,
}

/// `N` queries of one sequence and head. Gives `N`.
#[inline(always)]
fn tile<S: Simd, const N: usize>(
    s: S,
    pass: &Pass<'_>,
    at: At,
    scratch: &mut Scratch,
    out: &mut [f32],
) -> usize {
    let FullShape { head_dim: dim, scale, .. } = pass.shape;
    let width = pass.shape.width();
    let tokens = pass.starts[at.sequence]..pass.starts[at.sequence + 1];
    let padded = tokens.len().next_multiple_of(LANES);
    scratch.queries.clear();
    for n in 0..N {
        let query = &pass.qkv[(at.row + n) * 3 * width + at.head * dim..][..dim];
        scratch.queries.extend(query.iter().map(|x| x * scale));
    }
    if scratch.scores.len() < N * padded {
        scratch.scores.resize(N * padded, 0.0);
    }
    let scores = &mut scratch.scores[..N * padded];
    for group in 0..padded / LANES {
        let column = pass.columns[at.sequence] + group * LANES;
        let mut acc = [s.splat(0.0); N];
        for d in 0..dim {
            let keys = vector(&pass.keys[(at.head * dim + d) * pass.stride + column..]);
            let keys = s.load(keys);
            for (n, acc) in acc.iter_mut().enumerate() {
                *acc = s.fma(s.splat(scratch.queries[n * dim + d]), keys, *acc);
            }
        }
        for (n, acc) in acc.iter().enumerate() {
            s.store(vector_mut(&mut scores[n * padded + group * LANES..]), *acc);
        }
    }
    let mut by = [s.splat(0.0); N];
    for (n, by) in by.iter_mut().enumerate() {
        *by = s.splat(1.0 / softmax(s, &mut scores[n * padded..][..padded], tokens.len()));
    }
    for from in (0..dim).step_by(LANES) {
        let len = LANES.min(dim - from);
        let mut acc = [s.splat(0.0); N];
        for (t, values) in values(pass, at.head, tokens.clone()).enumerate() {
            let values = &values[from..];
            let values = match values.first_chunk::<LANES>() {
                Some(values) => s.load(values),
                None => {
                    let mut last = [0.0; LANES];
                    last[..len].copy_from_slice(values);
                    s.load(&last)
                }
            };
            for (n, acc) in acc.iter_mut().enumerate() {
                *acc = s.fma(s.splat(scores[n * padded + t]), values, *acc);
            }
        }
        for (n, (acc, by)) in acc.iter().zip(by).enumerate() {
            let mut result = [0.0; LANES];
            s.store(&mut result, s.mul(*acc, by));
            out[n * width + at.head * dim + from..][..len].copy_from_slice(&result[..len]);
        }
    }
    N
}

/// The values of one head, token after token.
#[inline(always)]
fn values<'a>(pass: &Pass<'a>, head: usize, tokens: Range<usize>) -> impl Iterator<Item = &'a [f32]> {
    let (width, dim, qkv) = (pass.shape.width(), pass.shape.head_dim, pass.qkv);
    tokens.map(move |token| &qkv[token * 3 * width + 2 * width + head * dim..][..dim])
}

/// Scores to weights that are not yet divided by their sum, which is returned. What is beyond `len` becomes 0.
#[inline(always)]
fn softmax<S: Simd>(s: S, scores: &mut [f32], len: usize) -> f32 {
    scores[len..].fill(f32::NEG_INFINITY);
    let (groups, _) = scores.as_chunks_mut::<LANES>();
    let mut max = s.splat(f32::NEG_INFINITY);
    for group in &*groups {
        max = s.max(s.load(group), max);
    }
    let max = s.splat(s.max_lane(max));
    for group in &mut *groups {
        let weights = s.exp(s.sub(s.load(group), max));
        s.store(group, weights);
    }
    scores[len..].fill(0.0);
    let mut sum = s.splat(0.0);
    for group in scores.as_chunks::<LANES>().0 {
        sum = s.add(sum, s.load(group));
    }
    s.sum(sum)
}

#[inline(always)]
fn vector(x: &[f32]) -> &[f32; LANES] {
    x.first_chunk().expect("whole vectors")
}

#[inline(always)]
fn vector_mut(x: &mut [f32]) -> &mut [f32; LANES] {
    x.first_chunk_mut().expect("whole vectors")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::Random;

    fn naive(shape: FullShape, starts: &[usize], qkv: &[f32]) -> Vec<f64> {
        let (width, dim) = (shape.width(), shape.head_dim);
        let at = |token: usize, part: usize, head: usize, d: usize| {
            f64::from(qkv[token * 3 * width + part * width + head * dim + d])
        };
        let mut out = Vec::new();
        for pair in starts.windows(2) {
            for query in pair[0]..pair[1] {
                for head in 0..shape.heads {
                    let score = |t| (0..dim).map(|d| at(query, 0, head, d) * at(t, 1, head, d)).sum::<f64>();
                    let weights: Vec<f64> =
                        (pair[0]..pair[1]).map(|t| (score(t) * f64::from(shape.scale)).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    out.extend((0..dim).map(|d| {
                        let values = (pair[0]..pair[1]).map(|t| at(t, 2, head, d));
                        values.zip(&weights).map(|(v, w)| v * w).sum::<f64>() / sum
                    }));
                }
            }
        }
        out
    }

    fn run(isa: Isa, threads: usize, shape: FullShape, starts: &[usize], qkv: &[f32]) -> Vec<f32> {
        // Memory that a longer pass has used before.
        let mut turned = vec![7.0; 100];
        let mut out = vec![f32::NAN; qkv.len() / 3];
        full_attention(&Pool::new(threads), isa, shape, starts, qkv, &mut turned, &mut out);
        out
    }

    #[test]
    fn agrees_with_the_formula_on_every_instruction_set() {
        for (heads, head_dim) in [(1, 1), (2, 12), (3, 16), (2, 40), (12, 32)] {
            let shape = FullShape { heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
            let starts = [0, 1, 18, 18, 50, 67];
            let qkv: Vec<f32> = Random(5).floats(67 * 3 * heads * head_dim).iter().map(|x| x * 4.0).collect();
            let expect = naive(shape, &starts, &qkv);
            let first = run(Isa::Scalar, 1, shape, &starts, &qkv);
            for (got, expect) in first.iter().zip(&expect) {
                assert!((f64::from(*got) - expect).abs() < 1e-5, "{heads} x {head_dim}: {got} for {expect}");
            }
            for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
                for threads in [1, 3] {
                    assert_eq!(run(isa, threads, shape, &starts, &qkv), first, "{isa}, {threads} threads");
                }
            }
        }
    }

    #[test]
    fn a_sequence_has_the_same_bits_alone_and_in_a_batch() {
        let shape = FullShape { heads: 2, head_dim: 20, scale: 0.3 };
        let row = 3 * shape.width();
        let starts = [0, 7, 40, 45];
        let qkv = Random(6).floats(45 * row);
        let together = run(Isa::detect(), 2, shape, &starts, &qkv);
        for pair in starts.windows(2) {
            let alone =
                run(Isa::detect(), 1, shape, &[0, pair[1] - pair[0]], &qkv[pair[0] * row..pair[1] * row]);
            assert_eq!(alone, together[pair[0] * shape.width()..pair[1] * shape.width()]);
        }
    }

    #[test]
    fn large_scores_stay_numbers() {
        let shape = FullShape { heads: 1, head_dim: 1, scale: 1.0 };
        // Scores of 0 and 90,000: the second token takes all of the weight.
        let out = run(Isa::detect(), 1, shape, &[0, 2], &[300.0, 0.0, 5.0, 300.0, 300.0, 9.0]);
        assert_eq!(out, [9.0, 9.0]);
        assert!(run(Isa::detect(), 1, shape, &[0], &[]).is_empty());
    }
}
