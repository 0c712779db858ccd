use half::f16;
use proptest::prelude::*;

use super::*;
use crate::Isa;
use crate::fixtures::Random;

/// A sequence of random keys and values, in blocks at random places of a cache that was used before.
struct Scene {
    shape: AttnShape,
    dim: usize,
    block_size: usize,
    tokens: usize,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
}

impl Scene {
    fn new(
        seed: u64,
        kv_heads: usize,
        group: usize,
        dim: usize,
        tokens: usize,
        window: Option<usize>,
    ) -> Self {
        let mut random = Random(seed);
        let heads = kv_heads * group;
        let q_stride = heads * dim + 3;
        let shape = AttnShape { heads, q_stride, scale: 1.0 / (dim as f32).sqrt(), window };
        let k = random.floats(tokens * kv_heads * dim);
        let v = random.floats(tokens * kv_heads * dim);
        let q = random.floats(tokens * q_stride).iter().map(|x| x * 3.0).collect();
        Self { shape, dim, block_size: 16, tokens, k, v, q }
    }

    fn kv_heads(&self) -> usize {
        self.k.len() / self.tokens / self.dim
    }

    fn width(&self) -> usize {
        self.shape.heads * self.dim
    }

    /// Attention of all queries, prefilled in `chunks`, with blocks placed by `seed`; the neighbour's queries
    /// (the same sequence's, in other blocks) stand in the same pass if there are `copies` of it.
    fn run(&self, isa: Isa, threads: usize, chunks: &[usize], copies: usize, seed: u64) -> Vec<Vec<f32>> {
        let per_copy = self.tokens.div_ceil(self.block_size);
        let blocks = per_copy * copies + 3;
        let mut cache =
            KvCache::new(2, blocks, self.block_size, self.kv_heads(), self.dim).unwrap().with_isa(isa);
        let junk = vec![f32::NAN; self.kv_heads() * self.dim];
        for slot in 0..blocks * self.block_size {
            cache.write(1, (slot / self.block_size) as u32, slot % self.block_size, &junk, &junk);
        }
        let mut order: Vec<u32> = (0..blocks as u32).collect();
        let mut random = Random(seed);
        for i in (1..order.len()).rev() {
            order.swap(i, random.bits() as usize % (i + 1));
        }
        let pool = Pool::new(threads);
        let mut out = vec![vec![f32::NAN; self.tokens * self.width()]; copies];
        let mut first = 0;
        for &chunk in chunks {
            let per_token = self.kv_heads() * self.dim;
            for t in first..first + chunk {
                for copy in 0..copies {
                    let block = order[copy * per_copy + t / self.block_size];
                    let (k, v) = (&self.k[t * per_token..], &self.v[t * per_token..]);
                    cache.write(1, block, t % self.block_size, &k[..per_token], &v[..per_token]);
                }
            }
            let rows: Vec<AttnRow<'_>> = (0..copies)
                .map(|copy| AttnRow {
                    queries: copy * chunk..(copy + 1) * chunk,
                    position: first,
                    block_table: &order[copy * per_copy..(copy + 1) * per_copy],
                })
                .collect();
            let q = &self.q[first * self.shape.q_stride..(first + chunk) * self.shape.q_stride];
            let q = q.repeat(copies);
            let mut result = vec![f32::NAN; copies * chunk * self.width()];
            attention(&pool, &cache, 1, self.shape, &rows, &q, &mut result);
            for (copy, result) in result.chunks_exact(chunk * self.width()).enumerate() {
                out[copy][first * self.width()..][..result.len()].copy_from_slice(result);
            }
            first += chunk;
        }
        out
    }

    /// The definition, in f64, with keys and values rounded as the cache rounds them.
    fn reference(&self) -> Vec<f32> {
        let (dim, kv_heads) = (self.dim, self.kv_heads());
        let group = self.shape.heads / kv_heads;
        let at = |x: &[f32], t: usize, h: usize, d: usize| {
            f64::from(f16::from_f32(x[(t * kv_heads + h) * dim + d]).to_f32())
        };
        let mut out = Vec::new();
        for t in 0..self.tokens {
            for head in 0..self.shape.heads {
                let first = self.shape.window.map_or(0, |w| (t + 1).saturating_sub(w));
                let q = &self.q[t * self.shape.q_stride + head * dim..][..dim];
                let weights: Vec<f64> = (first..=t)
                    .map(|u| {
                        let dot: f64 =
                            (0..dim).map(|d| f64::from(q[d]) * at(&self.k, u, head / group, d)).sum();
                        (dot * f64::from(self.shape.scale)).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..dim {
                    let value: f64 = weights
                        .iter()
                        .enumerate()
                        .map(|(i, w)| w * at(&self.v, first + i, head / group, d))
                        .sum();
                    out.push((value / sum) as f32);
                }
            }
        }
        out
    }
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.supported())
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn agrees_with_the_definition_on_every_isa() {
    for (kv_heads, group, dim, tokens, window) in [
        (1, 1, 16, 1, None),
        (3, 3, 64, 70, None),
        (2, 4, 80, 40, None),
        (1, 2, 8, 300, None),
        (2, 7, 32, 33, None),
        (1, 50, 16, 20, None),
        (1, 3, 64, 600, None),
        (1, 3, 64, 600, Some(100)),
        (2, 1, 24, 300, Some(1)),
    ] {
        let scene = Scene::new(tokens as u64, kv_heads, group, dim, tokens, window);
        let expect = scene.reference();
        let mut first: Option<Vec<f32>> = None;
        for isa in isas() {
            let out = scene.run(isa, 2, &[tokens], 1, 1).remove(0);
            for (i, (a, b)) in out.iter().zip(&expect).enumerate() {
                assert!((a - b).abs() < 2e-5, "{isa} {kv_heads}x{group}x{dim}, {tokens} at {i}: {a} for {b}");
            }
            assert!(bits(first.get_or_insert_with(|| out.clone())) == bits(&out), "{isa} differs");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_query_has_the_same_bits_however_it_is_computed(
        seed: u64,
        kv_heads in 1_usize..3,
        group in 1_usize..5,
        dim in proptest::sample::select(&[8_usize, 16, 64, 80][..]),
        tokens in 1_usize..560,
        cuts in proptest::collection::vec(1_usize..200, 0..5),
        copies in 1_usize..3,
        threads in 1_usize..4,
        window in proptest::option::of(1_usize..300),
    ) {
        let scene = Scene::new(seed, kv_heads, group, dim, tokens, window);
        let mut chunks = Vec::new();
        for cut in cuts {
            let left = tokens - chunks.iter().sum::<usize>();
            chunks.push(cut.min(left));
        }
        chunks.push(tokens - chunks.iter().sum::<usize>());
        chunks.retain(|&chunk| chunk > 0);
        for isa in isas().filter(|&isa| isa != Isa::Scalar) {
            let whole = scene.run(isa, 1, &[tokens], 1, 0).remove(0);
            prop_assert!(whole.iter().all(|x| x.is_finite()));
            for out in scene.run(isa, threads, &chunks, copies, seed) {
                prop_assert!(bits(&out) == bits(&whole), "{}", isa);
            }
        }
    }
}

#[test]
fn one_token_at_a_time_is_the_same_as_all_at_once() {
    let scene = Scene::new(5, 1, 3, 16, 290, None);
    for isa in isas() {
        let whole = scene.run(isa, 1, &[290], 1, 0);
        let single = scene.run(isa, 2, &[1; 290], 1, 9);
        assert!(bits(&whole[0]) == bits(&single[0]), "{isa}");
    }
}

#[test]
fn values_beyond_f16_stay_finite() {
    let mut cache = KvCache::new(1, 1, 16, 1, 16).unwrap();
    cache.write(0, 0, 0, &[1e9; 16], &[-1e9; 16]);
    let mut out = [0.0; 16];
    let shape = AttnShape { heads: 1, q_stride: 16, scale: 1.0, window: None };
    let row = AttnRow { queries: 0..1, position: 0, block_table: &[0] };
    attention(&Pool::new(1), &cache, 0, shape, &[row], &[0.0; 16], &mut out);
    assert_eq!(out, [-65504.0; 16]);
}

#[test]
fn a_copied_block_attends_like_its_original() {
    let mut cache = KvCache::new(2, 3, 16, 2, 16).unwrap();
    let mut random = Random(4);
    for layer in 0..2 {
        for t in 0..16 {
            let (k, v) = (random.floats(32), random.floats(32));
            cache.write(layer, 2, t, &k, &v);
        }
    }
    cache.copy_block(2, 0);
    let q = random.floats(64);
    let shape = AttnShape { heads: 4, q_stride: 64, scale: 0.25, window: None };
    let attend = |layer, block: u32| {
        let mut out = [0.0; 64];
        let row = AttnRow { queries: 0..1, position: 15, block_table: &[block] };
        attention(&Pool::new(1), &cache, layer, shape, &[row], &q, &mut out);
        out
    };
    for layer in 0..2 {
        assert_eq!(attend(layer, 0), attend(layer, 2));
        assert_ne!(attend(layer, 0), attend(1 - layer, 0));
    }
}

#[test]
#[should_panic(expected = "block table covers the queries")]
fn a_short_block_table_is_refused() {
    let cache = KvCache::new(1, 1, 16, 1, 16).unwrap();
    let shape = AttnShape { heads: 1, q_stride: 16, scale: 1.0, window: None };
    let row = AttnRow { queries: 0..1, position: 16, block_table: &[0] };
    attention(&Pool::new(1), &cache, 0, shape, &[row], &[0.0; 16], &mut [0.0; 16]);
}
