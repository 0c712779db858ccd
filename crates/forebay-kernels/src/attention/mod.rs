//! Causal attention over the paged cache, with grouped queries.
//!
//! Online softmax (Milakov and Gimelshein; FlashAttention's form) over segments of [`SEGMENT`] tokens at fixed
//! places of the sequence: within a segment a plain softmax, segments merged oldest first. What is added to what
//! depends on a query's position only, so its result has the same bits alone or in a batch, prefilled in one
//! piece or many, and wherever its blocks lie.
//!
//! A unit of work is a few queries of one sequence and one KV head; its queries, times the heads that share
//! that KV head, are the rows of the micro-tiles, so keys and values are loaded once for several of them.

use std::cell::RefCell;
use std::ops::Range;

use crate::buffer::SharedMut;
use crate::kv_cache::KvCache;
use crate::simd::{LANES, Simd, WithSimd};
use crate::Pool;

/// Tokens that are one softmax before merging. 256 scores of a row are 1 KiB; keys and values of a segment, at 64
/// dimensions, 64 KiB: they stay in the L2 cache while all rows of a unit pass over them.
const SEGMENT: usize = 256;
/// Query-head rows of a unit: enough to use each load of keys eight times over.
const UNIT_ROWS: usize = 48;
/// Key groups (of 16 tokens) scored together: with 6 rows 24 accumulators.
const GROUPS: usize = 4;
/// Most rows of a micro-tile on any instruction set.
const ROWS_MAX: usize = 6;

/// Queries of one sequence, at consecutive positions.
#[derive(Debug, Clone)]
pub struct AttnRow<'a> {
    /// Which rows of `q` and `out` they are.
    pub queries: Range<usize>,
    /// Position of the first of them in the sequence; the query at position `p` sees tokens `0..=p`.
    pub position: usize,
    /// Blocks of the sequence, oldest first. Must hold every token up to the last query's.
    pub block_table: &'a [u32],
}

/// What all queries of a pass have in common.
#[derive(Debug, Clone, Copy)]
pub struct AttnShape {
    /// Query heads, a multiple of the cache's KV heads.
    pub heads: usize,
    /// Distance between the rows of `q`, at least `heads · head_dim`: queries can stand in a wider matrix, next
    /// to keys and values.
    pub q_stride: usize,
    /// What scores are multiplied with, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Sliding window: a query sees only the last this many tokens, itself included.
    pub window: Option<usize>,
}

/// `out[q] = Σ_t softmax_t(scale · q·k_t) v_t` over the tokens each query sees.
///
/// `q` is `[queries, q_stride]` of which the first `heads · head_dim` count, `out` is
/// `[queries, heads · head_dim]`. Rows of `out` that no `AttnRow` names are left as they are.
///
/// # Panics
/// If shapes don't agree, a block table is too short, or rows overlap.
pub fn attention(
    pool: &Pool,
    cache: &KvCache,
    layer: usize,
    shape: AttnShape,
    rows: &[AttnRow<'_>],
    q: &[f32],
    out: &mut [f32],
) {
    let width = shape.heads * cache.head_dim();
    assert!(shape.heads > 0 && shape.heads.is_multiple_of(cache.kv_heads()), "grouped heads");
    assert!(shape.q_stride >= width, "queries fit their rows");
    let mut end = 0;
    for row in rows {
        assert!(row.queries.start >= end && row.queries.end >= row.queries.start, "rows ascend");
        end = row.queries.end;
        let tokens = row.position + row.queries.len();
        assert!(row.block_table.len() * cache.block_size() >= tokens, "block table covers the queries");
    }
    assert!(q.len() >= end.saturating_sub(1) * shape.q_stride + width * end.min(1), "q has every query");
    assert!(out.len() >= end * width, "out has every query");

    let group = shape.heads / cache.kv_heads();
    let unit_queries = (UNIT_ROWS / group).max(1);
    let units = rows.iter().map(|row| row.queries.len().div_ceil(unit_queries)).sum::<usize>();
    let out = SharedMut::new(out);
    pool.run(units * cache.kv_heads(), &|chunk| {
        let (mut index, kv_head) = (chunk / cache.kv_heads(), chunk % cache.kv_heads());
        for row in rows {
            let count = row.queries.len().div_ceil(unit_queries);
            if index < count {
                // The last queries see most tokens: first, lest the region end with one long unit.
                let first = (count - 1 - index) * unit_queries;
                let unit = Unit {
                    cache,
                    layer,
                    shape,
                    kv_head,
                    group,
                    blocks: row.block_table,
                    first_query: row.queries.start + first,
                    queries: unit_queries.min(row.queries.len() - first),
                    position: row.position + first,
                    q,
                    out,
                };
                SCRATCH.with_borrow_mut(|scratch| cache.isa().run(Run { unit, scratch }));
                return;
            }
            index -= count;
        }
    });
}

thread_local! {
    /// Grows to the largest unit of this thread and stays.
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

#[derive(Default)]
struct Scratch {
    /// `[row][head_dim]`, scaled.
    queries: Vec<f32>,
    /// `[row][value_dim]`, not yet divided by the weights' sum.
    sums: Vec<f32>,
    state: Vec<State>,
}

/// The softmax of a row so far.
#[derive(Clone, Copy)]
struct State {
    /// The row sees tokens `first..end`.
    first: usize,
    end: usize,
    max: f32,
    weight: f32,
}

/// A few queries of one sequence and one KV head.
struct Unit<'a> {
    cache: &'a KvCache,
    layer: usize,
    shape: AttnShape,
    kv_head: usize,
    group: usize,
    blocks: &'a [u32],
    first_query: usize,
    queries: usize,
    position: usize,
    q: &'a [f32],
    out: SharedMut<f32>,
}

impl Unit<'_> {
    fn rows(&self) -> usize {
        self.queries * self.group
    }

    /// Where row `r` (query-major) starts in a matrix of queries with this distance between them.
    fn offset(&self, row: usize, stride: usize) -> usize {
        let head = self.kv_head * self.group + row % self.group;
        (self.first_query + row / self.group) * stride + head * self.cache.head_dim()
    }

    fn place(&self, token: usize) -> (u32, usize) {
        let size = self.cache.block_size();
        (self.blocks[token / size], token % size / LANES)
    }

    #[inline(always)]
    fn keys(&self, token: usize) -> &[u8] {
        let (block, group) = self.place(token);
        self.cache.key_group(self.layer, block, self.kv_head, group)
    }

    #[inline(always)]
    fn values(&self, token: usize) -> &[u8] {
        let (block, group) = self.place(token);
        self.cache.value_group(self.layer, block, self.kv_head, group)
    }
}

struct Run<'a> {
    unit: Unit<'a>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let Self { unit, scratch } = self;
        let (dim, value_dim) = (unit.cache.head_dim(), unit.cache.value_dim());
        scratch.queries.clear();
        scratch.state.clear();
        scratch.sums.clear();
        scratch.sums.resize(unit.rows() * value_dim, 0.0);
        for row in 0..unit.rows() {
            let at = unit.offset(row, unit.shape.q_stride);
            scratch.queries.extend(unit.q[at..at + dim].iter().map(|x| x * unit.shape.scale));
            let end = unit.position + row / unit.group + 1;
            let first = unit.shape.window.map_or(0, |window| end.saturating_sub(window.max(1)));
            scratch.state.push(State { first, end, max: f32::NEG_INFINITY, weight: 0.0 });
        }
        let (first, end) = (scratch.state[0].first, scratch.state[unit.rows() - 1].end);
        for segment in first / SEGMENT..end.div_ceil(SEGMENT) {
            let mut row = 0;
            while row < unit.rows() {
                let left = (unit.rows() - row).min(S::TILE_ROWS);
                match left {
                    1 => tile::<S, 1>(s, &unit, scratch, segment, row),
                    2 => tile::<S, 2>(s, &unit, scratch, segment, row),
                    3 => tile::<S, 3>(s, &unit, scratch, segment, row),
                    4 => tile::<S, 4>(s, &unit, scratch, segment, row),
                    5 => tile::<S, 5>(s, &unit, scratch, segment, row),
                    _ => tile::<S, 6>(s, &unit, scratch, segment, row),
                }
                row += left;
            }
        }
        for (row, (state, sums)) in scratch.state.iter().zip(scratch.sums.chunks_exact(value_dim)).enumerate() {
            let at = unit.offset(row, unit.shape.heads * dim);
            // SAFETY: inside `out` (checked by `attention`); this query and head belong to this unit alone.
            let out = unsafe { unit.out.slice(at, dim) };
            let by = 1.0 / state.weight;
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum * by;
            }
        }
    }
}

/// Scores of a micro-tile: `[row][token of the segment]`.
type Scores = [[f32; SEGMENT]; ROWS_MAX];

/// `N` rows over one segment.
#[inline(always)]
fn tile<S: Simd, const N: usize>(s: S, unit: &Unit<'_>, scratch: &mut Scratch, segment: usize, row: usize) {
    let start = segment * SEGMENT;
    let (dim, value_dim) = (unit.cache.head_dim(), unit.cache.value_dim());
    let state = &mut scratch.state[row..row + N];
    // Tokens of the segment that any row sees; rows ascend in both bounds.
    let first = state[0].first.max(start) - start;
    let end = state[N - 1].end.min(start + SEGMENT).saturating_sub(start);
    if first >= end {
        return;
    }
    let queries: [&[f32]; N] =
        std::array::from_fn(|n| &scratch.queries[(row + n) * dim..(row + n + 1) * dim]);
    let mut scores: Scores = [[0.0; SEGMENT]; ROWS_MAX];
    let groups = first / LANES..end.div_ceil(LANES);
    let mut g = groups.start;
    while g + GROUPS <= groups.end {
        score::<S, N, GROUPS>(s, unit, &queries, start, g, &mut scores);
        g += GROUPS;
    }
    while g < groups.end {
        score::<S, N, 1>(s, unit, &queries, start, g, &mut scores);
        g += 1;
    }

    let mut own = [State { first: 0, end: 0, max: 0.0, weight: 0.0 }; N];
    for n in 0..N {
        let from = state[n].first.max(start) - start;
        let to = state[n].end.min(start + SEGMENT).saturating_sub(start);
        own[n] = weigh(s, &mut scores[n], groups.clone(), from..to);
    }

    let mut partial = [[0.0_f32; LANES]; N];
    let vectors = value_dim / LANES;
    let mut merge = [(1.0, 1.0); N];
    for n in 0..N {
        if own[n].weight == 0.0 {
            merge[n] = (1.0, 0.0);
            continue;
        }
        let max = if state[n].max > own[n].max { state[n].max } else { own[n].max };
        merge[n] = (exp(s, state[n].max - max), exp(s, own[n].max - max));
        if state[n].weight == 0.0 {
            merge[n].0 = 0.0;
        }
        state[n].weight = state[n].weight * merge[n].0 + own[n].weight * merge[n].1;
        state[n].max = max;
    }
    let _ = &mut partial;
    let mut v = 0;
    while v + 4 <= vectors {
        weighted::<S, N, 4>(s, unit, &scores, start, first..end, v, &merge, &own, &mut scratch.sums[row * value_dim..]);
        v += 4;
    }
    while v < vectors {
        weighted::<S, N, 1>(s, unit, &scores, start, first..end, v, &merge, &own, &mut scratch.sums[row * value_dim..]);
        v += 1;
    }
}

/// Scores of `N` rows against `G` groups of 16 tokens, from group `g` of the segment on.
#[inline(always)]
fn score<S: Simd, const N: usize, const G: usize>(
    s: S,
    unit: &Unit<'_>,
    queries: &[&[f32]; N],
    start: usize,
    g: usize,
    scores: &mut Scores,
) {
    let dim = unit.cache.head_dim();
    let keys: [&[[u8; 2 * LANES]]; G] =
        std::array::from_fn(|i| unit.keys(start + (g + i) * LANES).as_chunks().0);
    let mut acc = [[s.splat(0.0); G]; N];
    for d in 0..dim {
        let mut k = [s.splat(0.0); G];
        for i in 0..G {
            k[i] = s.load_f16(&keys[i][d]);
        }
        for n in 0..N {
            let q = s.splat(queries[n][d]);
            for i in 0..G {
                acc[n][i] = s.fma(k[i], q, acc[n][i]);
            }
        }
    }
    for n in 0..N {
        let (out, _) = scores[n].as_chunks_mut::<LANES>();
        for i in 0..G {
            s.store(&mut out[g + i], acc[n][i]);
        }
    }
}

/// Turns scores of tokens `seen` into weights `e^(score - max)`, and all others of `groups` into 0.
#[inline(always)]
fn weigh<S: Simd>(s: S, scores: &mut [f32; SEGMENT], groups: Range<usize>, seen: Range<usize>) -> State {
    if seen.is_empty() {
        scores[groups.start * LANES..groups.end * LANES].fill(0.0);
        return State { first: 0, end: 0, max: f32::NEG_INFINITY, weight: 0.0 };
    }
    let all = groups.start * LANES..groups.end * LANES;
    // Before the maximum, since blocks may hold anything where nothing was written yet.
    scores[all.start..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..all.end].fill(f32::NEG_INFINITY);
    let (vectors, _) = scores.as_chunks_mut::<LANES>();
    let mut max = s.splat(f32::NEG_INFINITY);
    for vector in &vectors[groups.clone()] {
        max = s.max(s.load(vector), max);
    }
    let max = s.max_lane(max);
    let shift = s.splat(max);
    for vector in &mut vectors[groups.clone()] {
        let e = s.exp(s.sub(s.load(vector), shift));
        s.store(vector, e);
    }
    scores[all.start..seen.start].fill(0.0);
    scores[seen.end..all.end].fill(0.0);
    let (vectors, _) = scores.as_chunks::<LANES>();
    let mut weight = s.splat(0.0);
    for vector in &vectors[groups] {
        weight = s.add(weight, s.load(vector));
    }
    State { first: 0, end: 0, max, weight: s.sum(weight) }
}

/// Merges `Σ_t weight_t · v_t` into `sums`, for `D` vectors of the value dimension from `first_vector` on.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "one inlined kernel")]
fn weighted<S: Simd, const N: usize, const D: usize>(
    s: S,
    unit: &Unit<'_>,
    weights: &Scores,
    start: usize,
    tokens: Range<usize>,
    first_vector: usize,
    merge: &[(f32, f32); N],
    own: &[State; N],
    sums: &mut [f32],
) {
    let vectors = unit.cache.value_dim() / LANES;
    let mut acc = [[s.splat(0.0); D]; N];
    let mut t = tokens.start;
    while t < tokens.end {
        let (values, _) = unit.values(start + t).as_chunks::<{ 2 * LANES }>();
        let group_end = (t / LANES + 1) * LANES;
        for t in t..group_end.min(tokens.end) {
            let values = &values[t % LANES * vectors + first_vector..][..D];
            let mut v = [s.splat(0.0); D];
            for i in 0..D {
                v[i] = s.load_f16(&values[i]);
            }
            for n in 0..N {
                let w = s.splat(weights[n][t]);
                for i in 0..D {
                    acc[n][i] = s.fma(v[i], w, acc[n][i]);
                }
            }
        }
        t = group_end;
    }
    for n in 0..N {
        if own[n].weight == 0.0 {
            continue;
        }
        let (old, new) = (s.splat(merge[n].0), s.splat(merge[n].1));
        let (sums, _) = sums[n * vectors * LANES..].as_chunks_mut::<LANES>();
        for i in 0..D {
            let sum = &mut sums[first_vector + i];
            // `+ 0.0` makes -0 a 0: tokens beyond a row's own last, seen by its neighbours in the tile, have
            // added `0 · v`, which changes nothing else.
            let part = s.mul(s.add(acc[n][i], s.splat(0.0)), new);
            s.store(sum, s.fma(s.load(sum), old, part));
        }
    }
}

/// The exponential of the vectors, for one number.
#[inline(always)]
fn exp<S: Simd>(s: S, x: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(&mut lanes, s.exp(s.splat(x)));
    lanes[0]
}

#[cfg(test)]
mod tests;
