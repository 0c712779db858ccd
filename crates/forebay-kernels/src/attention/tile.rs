//! Micro-tiles: up to six query-head rows over one segment.

use std::ops::Range;

use super::{ROWS_MAX, SEGMENT, Scratch, State, Unit, WIDE};
use crate::simd::{LANES, Simd};

/// Scores of a micro-tile: `[row][token of the segment]`.
type Scores = [[f32; SEGMENT]; ROWS_MAX];

/// As many of the `left` rows from `row` on as registers hold. How many that were.
#[inline(always)]
pub(super) fn some_rows<S: Simd>(
    s: S,
    unit: &Unit<'_>,
    scratch: &mut Scratch,
    segment: usize,
    row: usize,
    left: usize,
) -> usize {
    // Sizes that an instruction set doesn't use are not even instantiated.
    if const { S::ATTENTION_ROWS == ROWS_MAX } && left > 1 {
        match left {
            2 => tile::<S, 2>(s, unit, scratch, segment, row),
            3 => tile::<S, 3>(s, unit, scratch, segment, row),
            4 => tile::<S, 4>(s, unit, scratch, segment, row),
            5 => tile::<S, 5>(s, unit, scratch, segment, row),
            _ => tile::<S, ROWS_MAX>(s, unit, scratch, segment, row),
        }
        left.min(ROWS_MAX)
    } else {
        tile::<S, 1>(s, unit, scratch, segment, row);
        1
    }
}

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
    if const { S::ATTENTION_VECTORS == WIDE } {
        while g + WIDE <= groups.end {
            score::<S, N, WIDE>(s, unit, &queries, start, g, &mut scores);
            g += WIDE;
        }
    }
    while g < groups.end {
        score::<S, N, 1>(s, unit, &queries, start, g, &mut scores);
        g += 1;
    }

    let mut own = [State::default(); N];
    for n in 0..N {
        let from = state[n].first.max(start) - start;
        let to = state[n].end.min(start + SEGMENT).saturating_sub(start);
        own[n] = weigh(s, &mut scores[n], groups.clone(), from..to);
    }

    let vectors = value_dim / LANES;
    let mut merge = [(1.0, 1.0); N];
    for n in 0..N {
        if own[n].weight == 0.0 {
            merge[n] = (1.0, 0.0);
            continue;
        }
        merge[n] = merge_state(s, &mut state[n], own[n]);
    }
    let mut v = 0;
    if const { S::ATTENTION_VECTORS == WIDE } {
        while v + WIDE <= vectors {
            weighted::<S, N, WIDE>(
                s,
                unit,
                &scores,
                start,
                first..end,
                v,
                &merge,
                &own,
                &mut scratch.sums[row * value_dim..],
            );
            v += WIDE;
        }
    }
    while v < vectors {
        weighted::<S, N, 1>(
            s,
            unit,
            &scores,
            start,
            first..end,
            v,
            &merge,
            &own,
            &mut scratch.sums[row * value_dim..],
        );
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
        return State::default();
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
    State { max, weight: s.sum(weight), ..State::default() }
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

/// Adds the softmax of a later segment, which saw at least one token. What to multiply the sums so far and the
/// segment's sums with; for the first segment exactly 0 and 1.
#[inline(always)]
pub(super) fn merge_state<S: Simd>(s: S, state: &mut State, own: State) -> (f32, f32) {
    let max = if state.max > own.max { state.max } else { own.max };
    // The exponential is clamped and never 0, so nothing has to be said to be nothing.
    let old = if state.weight == 0.0 { 0.0 } else { exp(s, state.max - max) };
    let new = exp(s, own.max - max);
    state.weight = state.weight * old + own.weight * new;
    state.max = max;
    (old, new)
}

/// The exponential of the vectors, for one number.
#[inline(always)]
fn exp<S: Simd>(s: S, x: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(&mut lanes, s.exp(s.splat(x)));
    lanes[0]
}
