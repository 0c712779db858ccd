//! The forward pass on the CPU.
//!
//! One pass over the layers for all tokens of a plan together; every kernel computes each token's values on their
//! own, so a token's result has the same bits whatever else is in the plan. Activations are f32 between kernels,
//! K and V are f16 in the cache. Logits are computed for the wanted tokens only: the head is a third of the work of
//! a small model, and a prefill wants one token of hundreds.

use std::sync::Arc;

use forebay_kernels::{
    Activations, AttnRow, AttnShape, Isa, KvCache, KvError, Matrix, Pool, RopeStyle, add_assign, attention,
    gelu_tanh_mul, matmul, rms_norm, rope_in_place, scale_in_place, silu_mul,
};
use forebay_schedule::StepPlan;

use super::check::{Bounds, check_plan};
use super::links::Links;
use super::ropes::RopeTables;
use super::{CollectiveError, ExecError, Executor};
use crate::model::{
    Activation, HEAD_DIM_MAX, HeadNorms, Layer, ModelFile, ModelSpec, RanksError, RopeLayout, Shard,
    SpecError, Weights, WeightsError,
};

/// How to run a model.
#[derive(Debug, Clone)]
pub struct CpuOptions {
    pub isa: Isa,
    /// Compute threads; the caller of `execute` is one of them.
    pub threads: usize,
    /// Tokens per KV block; a multiple of 16.
    pub block_size: usize,
    /// KV blocks; [`ModelSpec::blocks_for_memory`] says how many fit.
    pub blocks: usize,
    /// Longest sequence to allow for, in tokens; the model's own limit applies besides.
    pub positions_max: usize,
}

/// Why a model could not be made ready to run.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    #[error("the model cannot be run")]
    Spec(#[from] SpecError),
    #[error("the model's weights cannot be loaded")]
    Weights(#[from] WeightsError),
    #[error("the KV cache cannot be made")]
    Kv(#[from] KvError),
    #[error("the model cannot be divided among ranks")]
    Ranks(#[from] RanksError),
    #[error("no thread for a rank")]
    Thread(#[source] std::io::Error),
}

/// Values that one chunk of elementwise work handles: some 5 µs, several times what handing it over costs.
const CHUNK_VALUES: usize = 16 << 10;

/// Runs a model, or as one of several ranks a shard of it, with the kernels of `forebay-kernels`.
pub struct CpuExecutor {
    spec: ModelSpec,
    shard: Shard,
    links: Links,
    weights: Weights,
    pool: Arc<Pool>,
    cache: KvCache,
    ropes: RopeTables,
    bounds: Bounds,
    buffers: Buffers,
    /// Empty between passes; kept for its memory.
    attention_rows: Vec<AttnRow<'static>>,
}

/// Grown to the largest pass so far, never shrunk.
#[derive(Default)]
struct Buffers {
    /// `[T, dim]`: the residual stream.
    x: Vec<f32>,
    /// `[T, dim]`
    normed: Vec<f32>,
    /// `[T, dim]`: what a block adds to the stream.
    delta: Vec<f32>,
    /// `[T, qkv_dim]` of the own heads.
    qkv: Vec<f32>,
    /// `[T, q_heads * head_dim]`
    attended: Vec<f32>,
    /// `[T, 2 * ffn_dim]` of the own rows.
    gate_up: Vec<f32>,
    /// `[T, ffn_dim]`
    hidden: Vec<f32>,
    /// `[S, vocab]`
    logits: Vec<f32>,
    inputs: Activations,
}

impl CpuExecutor {
    /// Packs the weights (seconds for a large model, on all threads) and reserves the KV cache.
    pub fn new(file: &Arc<ModelFile>, options: &CpuOptions) -> Result<Self, BuildError> {
        Self::with_pool(file, options, Arc::new(Pool::new(options.threads)))
    }

    /// As [`CpuExecutor::new`], with compute threads that others (the sampler) use between passes.
    pub fn with_pool(
        file: &Arc<ModelFile>,
        options: &CpuOptions,
        pool: Arc<Pool>,
    ) -> Result<Self, BuildError> {
        let spec = file.spec()?;
        let (shard, packing) = (Shard::whole(&spec), Arc::clone(&pool));
        Self::rank(file, spec, shard, Links::none(), options, pool, &packing)
    }

    /// One rank of several. `packing`: threads to pack the weights with.
    pub(super) fn rank(
        file: &Arc<ModelFile>,
        spec: ModelSpec,
        shard: Shard,
        links: Links,
        options: &CpuOptions,
        pool: Arc<Pool>,
        packing: &Pool,
    ) -> Result<Self, BuildError> {
        let weights = Weights::load(file, &spec, &shard, options.isa, packing)?;
        let (layers, kv_heads) = (shard.layers.len(), shard.kv_heads.len());
        let cache = KvCache::new(layers, options.blocks, options.block_size, kv_heads, spec.head_dim)?
            .with_isa(options.isa);
        let positions_max = options.positions_max.min(spec.context_len);
        let ropes = RopeTables::new(&spec, weights.rope_factors.as_deref(), positions_max);
        let bounds = Bounds {
            vocab: spec.vocab_size,
            block_size: options.block_size,
            blocks: options.blocks,
            positions_max,
        };
        let (buffers, attention_rows) = (Buffers::default(), Vec::new());
        Ok(Self { spec, shard, links, weights, pool, cache, ropes, bounds, buffers, attention_rows })
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Bytes of packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }
}

impl Executor for CpuExecutor {
    fn vocab_size(&self) -> usize {
        self.bounds.vocab
    }

    fn block_size(&self) -> usize {
        self.bounds.block_size
    }

    fn blocks(&self) -> usize {
        self.bounds.blocks
    }

    fn positions_max(&self) -> usize {
        self.bounds.positions_max
    }

    fn execute(&mut self, plan: &StepPlan) -> Result<&[f32], ExecError> {
        self.check(plan)?;
        if plan.is_empty() {
            return Ok(&[]);
        }
        self.compute(plan)?;
        Ok(self.logits(plan))
    }
}

impl CpuExecutor {
    pub(super) fn check(&self, plan: &StepPlan) -> Result<(), ExecError> {
        Ok(check_plan(plan, &self.bounds)?)
    }

    /// One pass of a plan that is not empty and was checked.
    pub(super) fn compute(&mut self, plan: &StepPlan) -> Result<(), CollectiveError> {
        let mut rows = reuse(std::mem::take(&mut self.attention_rows));
        rows.extend((0..plan.rows()).map(|row| {
            let queries = plan.row(row);
            AttnRow {
                position: plan.positions[queries.start] as usize,
                queries,
                block_table: plan.block_table(row),
            }
        }));
        let mut pass = Pass {
            spec: &self.spec,
            shard: &self.shard,
            links: &mut self.links,
            pool: &self.pool,
            ropes: &self.ropes,
            cache: &mut self.cache,
            plan,
            attention_rows: &rows,
            buffers: &mut self.buffers,
        };
        pass.run(&self.weights)?;
        self.attention_rows = reuse(rows);
        Ok(())
    }

    /// What the last pass, of this plan, has made; only the last stage has logits.
    pub(super) fn logits(&self, plan: &StepPlan) -> &[f32] {
        &self.buffers.logits[..plan.logit_tokens.len() * self.spec.vocab_size]
    }
}

/// The vector, empty, for rows of another lifetime. Collecting an emptied vector's iterator keeps its memory.
fn reuse<'b>(mut rows: Vec<AttnRow<'_>>) -> Vec<AttnRow<'b>> {
    rows.clear();
    rows.into_iter().map(|row| AttnRow { block_table: &[], ..row }).collect()
}

/// One forward pass.
struct Pass<'a> {
    spec: &'a ModelSpec,
    shard: &'a Shard,
    links: &'a mut Links,
    pool: &'a Pool,
    ropes: &'a RopeTables,
    cache: &'a mut KvCache,
    plan: &'a StepPlan,
    attention_rows: &'a [AttnRow<'a>],
    buffers: &'a mut Buffers,
}

impl Pass<'_> {
    fn run(&mut self, weights: &Weights) -> Result<(), CollectiveError> {
        let tokens = self.plan.tokens();
        let x = at_least(&mut self.buffers.x, tokens * self.spec.dim);
        if !self.links.receive(x)? {
            self.embed(weights);
        }
        let (last, others) = weights.layers.split_last().expect("a shard has layers: `Ranks::check` says so");
        for (nth, layer) in others.iter().enumerate() {
            self.attend(nth, layer)?;
            self.mix(layer, tokens)?;
        }
        self.attend(others.len(), last)?;
        let Some(head) = &weights.head else {
            self.mix(last, tokens)?;
            return self.links.hand_on(&self.buffers.x[..tokens * self.spec.dim]);
        };
        // After the last attention nothing flows between tokens: go on with those whose logits are wanted.
        self.keep_wanted();
        self.mix(last, self.plan.logit_tokens.len())?;
        self.head(head, &weights.output_norm)
    }

    /// `x = embedding of each token`, scaled where the family wants it
    fn embed(&mut self, weights: &Weights) {
        let (dim, plan) = (self.spec.dim, self.plan);
        let scale = self.spec.family.scaled_embeddings.then(|| (dim as f32).sqrt());
        let x = at_least(&mut self.buffers.x, plan.tokens() * dim);
        by_rows(self.pool, x, dim, &|first, rows| {
            for (row, token) in rows.chunks_exact_mut(dim).zip(&plan.token_ids[first..]) {
                weights.embeddings.lookup(*token, row);
                if let Some(scale) = scale {
                    scale_in_place(row, scale);
                }
            }
        });
    }

    /// `attended = attention(norm(x))`; writes the tokens' K and V. `nth` counts the shard's layers.
    fn attend(&mut self, nth: usize, layer: &Layer) -> Result<(), CollectiveError> {
        let Self { spec, shard, pool, plan, .. } = *self;
        let of_model = shard.layers.start + nth;
        let (rope, window) = (self.ropes.of(of_model), spec.attention[of_model].window);
        let b = &mut *self.buffers;
        let tokens = plan.tokens();
        // Of the own heads.
        let (q_dim, kv_dim) = (shard.q_heads.len() * spec.head_dim, shard.kv_heads.len() * spec.head_dim);
        let qkv_dim = q_dim + 2 * kv_dim;

        let normed = at_least(&mut b.normed, tokens * spec.dim);
        norm(pool, &b.x[..tokens * spec.dim], &layer.attention_norm, spec.rms_eps, normed);
        let qkv = at_least(&mut b.qkv, tokens * qkv_dim);
        project(pool, &layer.qkv, normed, &mut b.inputs, qkv);
        let style = match spec.rope.layout {
            RopeLayout::Interleaved => RopeStyle::Interleaved,
            RopeLayout::HalfSplit => RopeStyle::HalfSplit,
        };
        by_rows(pool, qkv, qkv_dim, &|first, rows| {
            for (row, &position) in rows.chunks_exact_mut(qkv_dim).zip(&plan.positions[first..]) {
                if let Some(bias) = &layer.qkv_bias {
                    add_assign(row, bias);
                }
                let (q, kv) = row.split_at_mut(q_dim);
                let k = &mut kv[..kv_dim];
                if let Some(HeadNorms { q: q_norm, k: k_norm }) = &layer.head_norms {
                    norm_heads(q, q_norm, spec.rms_eps);
                    norm_heads(k, k_norm, spec.rms_eps);
                }
                rope_in_place(rope, style, q, spec.head_dim, position as usize);
                rope_in_place(rope, style, k, spec.head_dim, position as usize);
            }
        });

        let block_size = self.cache.block_size();
        for row in self.attention_rows {
            for (token, position) in row.queries.clone().zip(row.position..) {
                let (k, v) = qkv[token * qkv_dim + q_dim..(token + 1) * qkv_dim].split_at(kv_dim);
                self.cache.write(nth, row.block_table[position / block_size], position % block_size, k, v);
            }
        }
        let heads = shard.q_heads.len();
        let shape = AttnShape { heads, q_stride: qkv_dim, scale: spec.attention_scale, window };
        let attended = at_least(&mut b.attended, tokens * spec.q_heads * spec.head_dim);
        self.links.fill(attended, tokens, |own| {
            attention(pool, self.cache, nth, shape, self.attention_rows, qkv, own);
        })
    }

    /// `x += output(attended); x += mlp(norm(x))` for the first `tokens` rows. A family with post norms norms what
    /// is added.
    fn mix(&mut self, layer: &Layer, tokens: usize) -> Result<(), CollectiveError> {
        let Self { spec, pool, .. } = *self;
        let (dim, own_ffn) = (spec.dim, self.shard.rows(spec.ffn_dim).len());
        let b = &mut *self.buffers;
        let x = &mut b.x[..tokens * dim];
        let delta = at_least(&mut b.delta, tokens * dim);
        let normed = at_least(&mut b.normed, tokens * dim);
        let post = layer.post_norms.as_ref();
        let attended = &b.attended[..tokens * spec.q_heads * spec.head_dim];

        let inputs = &mut b.inputs;
        self.links.fill(delta, tokens, |own| project(pool, &layer.output, attended, inputs, own))?;
        add(pool, x, post_normed(pool, post.map(|p| &p.attention), spec.rms_eps, delta, normed), dim);
        norm(pool, x, &layer.ffn_norm, spec.rms_eps, normed);
        let gate_up = at_least(&mut b.gate_up, tokens * 2 * own_ffn);
        project(pool, &layer.gate_up, normed, inputs, gate_up);
        let hidden = at_least(&mut b.hidden, tokens * spec.ffn_dim);
        let gate_up = &*gate_up;
        self.links.fill(hidden, tokens, |own| {
            by_rows(pool, own, own_ffn, &|first, rows| {
                let gate_up = &gate_up[first * 2 * own_ffn..][..2 * rows.len()];
                match spec.family.activation {
                    Activation::Silu => silu_mul(gate_up, own_ffn, rows),
                    Activation::GeluTanh => gelu_tanh_mul(gate_up, own_ffn, rows),
                }
            });
        })?;
        self.links.fill(delta, tokens, |own| project(pool, &layer.down, hidden, inputs, own))?;
        add(pool, x, post_normed(pool, post.map(|p| &p.ffn), spec.rms_eps, delta, normed), dim);
        Ok(())
    }

    /// Moves the rows of the wanted tokens to the front of `x` and `attended`.
    fn keep_wanted(&mut self) {
        let (dim, q_dim) = (self.spec.dim, self.spec.q_heads * self.spec.head_dim);
        for (to, &from) in self.plan.logit_tokens.iter().enumerate() {
            // Ascending: nothing is overwritten before it was moved.
            let from = from as usize;
            self.buffers.x.copy_within(from * dim..(from + 1) * dim, to * dim);
            self.buffers.attended.copy_within(from * q_dim..(from + 1) * q_dim, to * q_dim);
        }
    }

    /// `logits = head(norm(x))` for the rows that [`Self::keep_wanted`] left.
    fn head(&mut self, head: &Matrix, output_norm: &[f32]) -> Result<(), CollectiveError> {
        let Self { spec, pool, .. } = *self;
        let b = &mut *self.buffers;
        let wanted = self.plan.logit_tokens.len();
        let normed = at_least(&mut b.normed, wanted * spec.dim);
        norm(pool, &b.x[..wanted * spec.dim], output_norm, spec.rms_eps, normed);
        let logits = at_least(&mut b.logits, wanted * spec.vocab_size);
        self.links.fill(logits, wanted, |own| project(pool, head, normed, &mut b.inputs, own))
    }
}

/// The first `len` values of a buffer, which grows if it is shorter. What they hold is not specified.
pub(super) fn at_least(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// `f(first_row, rows)` over `out`, in chunks of about [`CHUNK_VALUES`].
pub(super) fn by_rows(pool: &Pool, out: &mut [f32], row_len: usize, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
    pool.run_rows(out, row_len, (CHUNK_VALUES / row_len).max(1), f);
}

fn norm(pool: &Pool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let dim = weight.len();
    by_rows(pool, out, dim, &|first, rows| rms_norm(&x[first * dim..][..rows.len()], weight, eps, rows));
}

/// `delta`, or its norm (in `scratch`) where there is one.
fn post_normed<'b>(
    pool: &Pool,
    weight: Option<&Vec<f32>>,
    eps: f32,
    delta: &'b [f32],
    scratch: &'b mut [f32],
) -> &'b [f32] {
    let Some(weight) = weight else { return delta };
    norm(pool, delta, weight, eps, scratch);
    scratch
}

pub(super) fn add(pool: &Pool, x: &mut [f32], delta: &[f32], dim: usize) {
    by_rows(pool, x, dim, &|first, rows| add_assign(rows, &delta[first * dim..][..rows.len()]));
}

/// `y = x · wᵀ`
pub(super) fn project(pool: &Pool, w: &Matrix, x: &[f32], inputs: &mut Activations, y: &mut [f32]) {
    inputs.prepare(pool, w, x);
    matmul(pool, w, inputs, y);
}

/// RMS norm of every head of one token, in place.
fn norm_heads(heads: &mut [f32], weight: &[f32], eps: f32) {
    // No spec has longer heads.
    let mut before = [0.0; HEAD_DIM_MAX];
    let before = &mut before[..weight.len()];
    for head in heads.chunks_exact_mut(weight.len()) {
        before.copy_from_slice(head);
        rms_norm(before, weight, eps, head);
    }
}
