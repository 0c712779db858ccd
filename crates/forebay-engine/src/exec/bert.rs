//! The forward pass of an encoder on the CPU: whole sequences in, one vector each out.
//!
//! Sequences of a batch stand one after the other, without padding; every kernel computes each token on its own, and
//! attention stays within a sequence, so a text's vector has the same bits alone and in any batch.

use std::path::Path;
use std::sync::Arc;

use forebay_kernels::{
    Activations, FullShape, Isa, Pool, add_assign, full_attention, gelu_erf_in_place, layer_norm_in_place,
    scale_in_place,
};
use forebay_types::TokenId;

use super::cpu::{add, at_least, by_rows, project};
use crate::model::{EncoderError, EncoderLayer, EncoderSpec, EncoderWeights, Linear, Norm, Pooling};
use crate::safetensors::Directory;

/// Turns sequences into vectors, one batch at a time.
pub trait Encoder: Send {
    /// Length of a vector.
    fn dim(&self) -> usize;

    /// One vector per sequence, pooled and not normalised: `[sequences.len(), dim]`.
    ///
    /// Every sequence has at least one token and at most as many as the model has positions; ids are below the
    /// vocabulary's size. Memory grows with the largest batch.
    ///
    /// # Panics
    /// If a sequence is not as said.
    fn encode(&mut self, sequences: &[Arc<[TokenId]>]) -> &[f32];
}

/// BERT with the kernels of `forebay-kernels`.
pub struct BertEncoder {
    spec: EncoderSpec,
    weights: EncoderWeights,
    isa: Isa,
    pool: Arc<Pool>,
    buffers: Buffers,
}

/// Grown to the largest batch so far, never shrunk.
#[derive(Default)]
struct Buffers {
    /// Where each sequence begins, and the end of the last.
    starts: Vec<usize>,
    /// Each token with its position.
    tokens: Vec<(TokenId, usize)>,
    /// `[T, dim]`
    x: Vec<f32>,
    /// `[T, dim]`: what a block adds.
    delta: Vec<f32>,
    /// `[T, 3 * dim]`
    qkv: Vec<f32>,
    /// `[dim, T in whole vectors]`
    turned: Vec<f32>,
    /// `[T, dim]`
    attended: Vec<f32>,
    /// `[T, ffn_dim]`
    hidden: Vec<f32>,
    /// `[sequences, dim]`
    pooled: Vec<f32>,
    inputs: Activations,
}

impl BertEncoder {
    /// Reads and packs a directory.
    pub fn open(directory: &Path, isa: Isa, pool: Arc<Pool>) -> Result<Self, EncoderError> {
        let spec = EncoderSpec::read(directory)?;
        let weights = EncoderWeights::load(Directory::open(directory)?, &spec, isa, &pool)?;
        Ok(Self { spec, weights, isa, pool, buffers: Buffers::default() })
    }

    pub fn spec(&self) -> &EncoderSpec {
        &self.spec
    }

    /// Bytes of packed weights.
    pub fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// `x = norm(word + position + type)`
    fn embed(&mut self, sequences: &[Arc<[TokenId]>]) {
        let Self { spec, weights, pool, buffers: b, .. } = self;
        let dim = spec.dim;
        b.starts.clear();
        b.starts.push(0);
        b.tokens.clear();
        for sequence in sequences {
            assert!(!sequence.is_empty() && sequence.len() <= spec.positions, "within the model's positions");
            b.tokens.extend(sequence.iter().copied().zip(0..));
            b.starts.push(b.tokens.len());
        }
        let (tokens, weights) = (&b.tokens, &*weights);
        let x = at_least(&mut b.x, tokens.len() * dim);
        by_rows(pool, x, dim, &|first, rows| {
            let mut word = vec![0.0; dim];
            for (row, &(token, position)) in rows.chunks_exact_mut(dim).zip(&tokens[first..]) {
                row.copy_from_slice(&weights.positions[position * dim..][..dim]);
                weights.add_word(token, &mut word, row);
            }
            layer_norm_in_place(rows, &weights.norm.weight, &weights.norm.bias, spec.norm_eps);
        });
    }

    /// `x = norm(x + output(attention(x))); x = norm(x + down(gelu(up(x))))`
    fn layer(&mut self, nth: usize) {
        let Self { spec, weights, isa, pool, buffers: b } = self;
        let (dim, ffn_dim, tokens) = (spec.dim, spec.ffn_dim, b.tokens.len());
        let layer: &EncoderLayer = &weights.layers[nth];
        let x = &mut b.x[..tokens * dim];
        let delta = at_least(&mut b.delta, tokens * dim);

        let qkv = at_least(&mut b.qkv, tokens * 3 * dim);
        linear(pool, &layer.qkv, x, &mut b.inputs, qkv);
        let attended = at_least(&mut b.attended, tokens * dim);
        let head_dim = spec.head_dim();
        let shape = FullShape { heads: spec.heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt() };
        full_attention(pool, *isa, shape, &b.starts, qkv, &mut b.turned, attended);
        linear(pool, &layer.output, attended, &mut b.inputs, delta);
        add(pool, x, delta, dim);
        norm(pool, x, &layer.attention_norm, spec.norm_eps);

        let hidden = at_least(&mut b.hidden, tokens * ffn_dim);
        linear(pool, &layer.up, x, &mut b.inputs, hidden);
        by_rows(pool, hidden, ffn_dim, &|_, rows| gelu_erf_in_place(rows));
        linear(pool, &layer.down, hidden, &mut b.inputs, delta);
        add(pool, x, delta, dim);
        norm(pool, x, &layer.ffn_norm, spec.norm_eps);
    }

    fn pool(&mut self) {
        let (dim, b) = (self.spec.dim, &mut self.buffers);
        let pooled = at_least(&mut b.pooled, (b.starts.len() - 1) * dim);
        for (out, pair) in pooled.chunks_exact_mut(dim).zip(b.starts.windows(2)) {
            let rows = &b.x[pair[0] * dim..pair[1] * dim];
            out.copy_from_slice(&rows[..dim]);
            if self.spec.pooling == Pooling::Mean {
                rows.chunks_exact(dim).skip(1).for_each(|row| add_assign(out, row));
                scale_in_place(out, 1.0 / (pair[1] - pair[0]) as f32);
            }
        }
    }
}

impl Encoder for BertEncoder {
    fn dim(&self) -> usize {
        self.spec.dim
    }

    fn encode(&mut self, sequences: &[Arc<[TokenId]>]) -> &[f32] {
        if sequences.is_empty() {
            return &[];
        }
        self.embed(sequences);
        for nth in 0..self.spec.layers {
            self.layer(nth);
        }
        self.pool();
        &self.buffers.pooled[..sequences.len() * self.spec.dim]
    }
}

/// `y = x · wᵀ + b`
fn linear(pool: &Pool, w: &Linear, x: &[f32], inputs: &mut Activations, y: &mut [f32]) {
    project(pool, &w.weight, x, inputs, y);
    let width = w.bias.len();
    by_rows(pool, y, width, &|_, rows| {
        rows.chunks_exact_mut(width).for_each(|row| add_assign(row, &w.bias));
    });
}

fn norm(pool: &Pool, x: &mut [f32], norm: &Norm, eps: f32) {
    by_rows(pool, x, norm.weight.len(), &|_, rows| {
        layer_norm_in_place(rows, &norm.weight, &norm.bias, eps);
    });
}
