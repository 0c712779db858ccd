//! Causal attention over the paged cache, with grouped queries.
//!
//! Online softmax (Milakov and Gimelshein; FlashAttention's form) over segments of [`SEGMENT`] tokens at fixed
//! places of the sequence: within a segment a plain softmax, segments merged oldest first. What is added to what
//! depends on a query's position only, so its result has the same bits alone or in a batch, prefilled in one
//! piece or many, and wherever its blocks lie.
//!
//! A unit of work is a few queries of one sequence and one KV head; its queries, times the heads that share
//! that KV head, are the rows of the micro-tiles, so keys and values are loaded once for several of them.

mod full;
mod tile;

use std::cell::RefCell;
use std::ops::Range;

use crate::Pool;
use crate::buffer::SharedMut;
use crate::kv_cache::KvCache;
use crate::simd::{LANES, Simd, WithSimd};

pub use full::{FullShape, full_attention};

/// Tokens that are one softmax before merging. 256 scores of a row are 1 KiB; keys and values of a segment, at 64
/// dimensions, 64 KiB: they stay in the L2 cache while all rows of a unit pass over them.
const SEGMENT: usize = 256;
/// Query-head rows of a unit: enough to use each load of keys eight times over.
const UNIT_ROWS: usize = 48;
/// Rows of a micro-tile.
const ROWS_MAX: usize = 6;
/// Vectors that a micro-tile is wide, where registers suffice ([`Simd::ATTENTION_VECTORS`]); else 1.
const WIDE: usize = 4;

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

    let pass = Pass { cache, layer, shape, rows, q, out: SharedMut::new(out) };
    let items = pass.units() * cache.kv_heads();
    let segments = rows.iter().map(|row| (row.position + row.queries.len()).div_ceil(SEGMENT)).max();
    match segments {
        // Long sequences but few of them: threads would be left without work.
        Some(segments @ 2..) if items < 4 * pool.threads() && pool.threads() > 1 => {
            pass.run_split(pool, segments)
        }
        _ => pool.run(items, &|item| {
            let unit = pass.unit(item);
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.begin(&unit);
                cache.isa().run(Run { unit: &unit, scratch, segments: unit.segments() });
                let sums = scratch.sums.chunks_exact(cache.value_dim());
                for (row, (state, sums)) in scratch.state.iter().zip(sums).enumerate() {
                    unit.finish(row, state.weight, sums);
                }
            });
        }),
    }
}

/// Everything about one call.
struct Pass<'a> {
    cache: &'a KvCache,
    layer: usize,
    shape: AttnShape,
    rows: &'a [AttnRow<'a>],
    q: &'a [f32],
    out: SharedMut<f32>,
}

impl<'a> Pass<'a> {
    fn group(&self) -> usize {
        self.shape.heads / self.cache.kv_heads()
    }

    fn unit_queries(&self) -> usize {
        (UNIT_ROWS / self.group()).max(1)
    }

    fn units(&self) -> usize {
        self.rows.iter().map(|row| row.queries.len().div_ceil(self.unit_queries())).sum()
    }

    /// Item `i` of units times KV heads. No two items share a row and head of `out`.
    fn unit(&self, item: usize) -> Unit<'a> {
        let (mut index, kv_head) = (item / self.cache.kv_heads(), item % self.cache.kv_heads());
        for row in self.rows {
            let count = row.queries.len().div_ceil(self.unit_queries());
            if index < count {
                // The last queries see most tokens: first, lest the region end with one long unit.
                let first = (count - 1 - index) * self.unit_queries();
                return Unit {
                    cache: self.cache,
                    layer: self.layer,
                    shape: self.shape,
                    kv_head,
                    group: self.group(),
                    blocks: row.block_table,
                    first_query: row.queries.start + first,
                    queries: self.unit_queries().min(row.queries.len() - first),
                    position: row.position + first,
                    q: self.q,
                    out: self.out,
                };
            }
            index -= count;
        }
        unreachable!("item {item} of {}", self.units() * self.cache.kv_heads())
    }

    /// Segments in parallel too, then merged in the same order as always. Takes memory for the parts.
    fn run_split(&self, pool: &Pool, segments: usize) {
        let items = self.units() * self.cache.kv_heads();
        let rows = self.unit_queries() * self.group();
        let value_dim = self.cache.value_dim();
        let mut sums = vec![0.0_f32; items * segments * rows * value_dim];
        let mut states = vec![State::default(); items * segments * rows];
        let (all_sums, all_states) = (SharedMut::new(&mut sums), SharedMut::new(&mut states));
        pool.run(items * segments, &|part| {
            let unit = self.unit(part / segments);
            // SAFETY: every part has its own `rows` rows, and both vectors outlive the region.
            let sums = unsafe { all_sums.slice(part * rows * value_dim, rows * value_dim) };
            // SAFETY: as above.
            let states = unsafe { all_states.slice(part * rows, rows) };
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.begin(&unit);
                let segment = part % segments;
                self.cache.isa().run(Run { unit: &unit, scratch, segments: segment..segment + 1 });
                sums[..scratch.sums.len()].copy_from_slice(&scratch.sums);
                states[..scratch.state.len()].copy_from_slice(&scratch.state);
            });
        });
        pool.run(items, &|item| {
            let at = item * segments * rows;
            let sums = &sums[at * value_dim..][..segments * rows * value_dim];
            let states = &states[at..][..segments * rows];
            self.cache.isa().run(Merge { unit: self.unit(item), rows, sums, states });
        });
    }
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

impl Scratch {
    /// Takes the unit's queries and forgets all else.
    fn begin(&mut self, unit: &Unit<'_>) {
        let dim = unit.cache.head_dim();
        self.queries.clear();
        self.state.clear();
        self.sums.clear();
        self.sums.resize(unit.rows() * unit.cache.value_dim(), 0.0);
        for row in 0..unit.rows() {
            let at = unit.offset(row, unit.shape.q_stride);
            self.queries.extend(unit.q[at..at + dim].iter().map(|x| x * unit.shape.scale));
            let Range { start, end } = unit.seen(row);
            self.state.push(State { first: start, end, ..State::default() });
        }
    }
}

/// The softmax of a row so far.
#[derive(Debug, Clone, Copy)]
struct State {
    /// The row sees tokens `first..end`.
    first: usize,
    end: usize,
    max: f32,
    weight: f32,
}

impl Default for State {
    fn default() -> Self {
        Self { first: 0, end: 0, max: f32::NEG_INFINITY, weight: 0.0 }
    }
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

    /// Those that any of its queries sees.
    fn segments(&self) -> Range<usize> {
        self.seen(0).start / SEGMENT..self.seen(self.rows() - 1).end.div_ceil(SEGMENT)
    }

    /// The tokens that a row sees.
    fn seen(&self, row: usize) -> Range<usize> {
        let end = self.position + row / self.group + 1;
        let first = self.shape.window.map_or(0, |window| end.saturating_sub(window.max(1)));
        first..end
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

    /// Writes a row's result.
    #[inline(always)]
    fn finish(&self, row: usize, weight: f32, sums: &[f32]) {
        let dim = self.cache.head_dim();
        // SAFETY: inside `out`, as `attention` checked; this query and head belong to this unit alone, and `out`
        // is borrowed until all units are done.
        let out = unsafe { self.out.slice(self.offset(row, self.shape.heads * dim), dim) };
        let by = 1.0 / weight;
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = sum * by;
        }
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

/// Some segments of a unit, one merged into the next in `scratch`.
struct Run<'a, 'b> {
    unit: &'a Unit<'b>,
    scratch: &'a mut Scratch,
    segments: Range<usize>,
}

impl WithSimd for Run<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let Self { unit, scratch, segments } = self;
        for segment in segments {
            let mut row = 0;
            while row < unit.rows() {
                let left = unit.rows() - row;
                row += tile::some_rows(s, unit, scratch, segment, row, left);
            }
        }
    }
}

/// All segments of a unit, oldest first: the same operations as [`Run`] does after each.
struct Merge<'a> {
    unit: Unit<'a>,
    /// Rows of a part; the unit may have fewer.
    rows: usize,
    /// `[segment][rows][value_dim]`
    sums: &'a [f32],
    /// `[segment][rows]`
    states: &'a [State],
}

impl WithSimd for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let dim = self.unit.cache.value_dim();
        let mut total = vec![0.0; dim];
        for row in 0..self.unit.rows() {
            let mut state = State::default();
            total.fill(0.0);
            for (part, own) in self.states.iter().enumerate().skip(row).step_by(self.rows) {
                if own.weight == 0.0 {
                    continue;
                }
                let (old, new) = tile::merge_state(s, &mut state, *own);
                let (old, new) = (s.splat(old), s.splat(new));
                let part = self.sums[part * dim..][..dim].as_chunks::<LANES>().0;
                for (total, part) in total.as_chunks_mut::<LANES>().0.iter_mut().zip(part) {
                    let merged = s.fma(s.load(total), old, s.mul(s.load(part), new));
                    s.store(total, merged);
                }
            }
            self.unit.finish(row, state.weight, &total);
        }
    }
}

#[cfg(test)]
mod tests;
