//! Keys and values of all tokens, in blocks that sequences share and give back.
//!
//! Stored as f16. Keys stand transposed in groups of 16 tokens, `[head_dim][16]`, so that the attention kernel
//! scores sixteen tokens per vector without horizontal sums; values stand `[token][head_dim]`.
//!
//! Deliberately absent: who owns a block. The scheduler's allocator says which blocks a sequence may write.

use crate::Isa;
use crate::buffer::Buffer;
use crate::simd::{LANES, Simd, WithSimd};

/// Largest f16. Values beyond are stored as this: an infinity would turn masked weights of 0 into NaN.
const F16_MAX: f32 = 65504.0;

/// Why a cache could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KvError {
    #[error("a KV block of {block_size} tokens is no multiple of 16")]
    BlockSize { block_size: usize },
    #[error("no memory for {bytes} bytes of KV cache; lower the number of blocks")]
    Memory { bytes: usize },
}

/// `layers × blocks` blocks of `block_size` tokens. Memory is taken page by page as blocks are first written.
pub struct KvCache {
    isa: Isa,
    layers: usize,
    blocks: usize,
    block_size: usize,
    kv_heads: usize,
    head_dim: usize,
    /// `head_dim` rounded up to whole vectors; what is added stays zero.
    value_dim: usize,
    /// `[layer][block][kv_head][group of 16][head_dim][16]` f16
    keys: Buffer,
    /// `[layer][block][kv_head][token][value_dim]` f16
    values: Buffer,
}

impl KvCache {
    /// `block_size` is a multiple of 16.
    pub fn new(
        layers: usize,
        blocks: usize,
        block_size: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<Self, KvError> {
        if block_size == 0 || !block_size.is_multiple_of(LANES) {
            return Err(KvError::BlockSize { block_size });
        }
        let value_dim = head_dim.next_multiple_of(LANES);
        let zeroed = |dim: usize| {
            let bytes = [layers, blocks, block_size, kv_heads, dim]
                .iter()
                .fold(2_usize, |product, &n| product.saturating_mul(n));
            Buffer::zeroed(bytes).ok_or(KvError::Memory { bytes })
        };
        Ok(Self {
            isa: Isa::detect(),
            layers,
            blocks,
            block_size,
            kv_heads,
            head_dim,
            value_dim,
            keys: zeroed(head_dim)?,
            values: zeroed(value_dim)?,
        })
    }

    /// Runs attention over this cache with another instruction set.
    pub fn with_isa(self, isa: Isa) -> Self {
        Self { isa, ..self }
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    pub fn blocks(&self) -> usize {
        self.blocks
    }

    pub fn block_size(&self) -> usize {
        self.block_size
    }

    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Memory of the whole cache once every block has been used.
    pub fn bytes(&self) -> usize {
        self.keys.len() + self.values.len()
    }

    /// Memory of one block over all layers.
    pub fn block_bytes(layers: usize, block_size: usize, kv_heads: usize, head_dim: usize) -> usize {
        2 * layers * block_size * kv_heads * (head_dim + head_dim.next_multiple_of(LANES))
    }

    /// Stores one token's keys and values, both `[kv_heads, head_dim]`, at `offset` of a block.
    ///
    /// # Panics
    /// If there is no such layer, block or offset, or a length is wrong.
    pub fn write(&mut self, layer: usize, block: u32, offset: usize, k: &[f32], v: &[f32]) {
        assert!(layer < self.layers && (block as usize) < self.blocks && offset < self.block_size);
        assert!(k.len() == self.kv_heads * self.head_dim && v.len() == k.len(), "one token");
        let isa = self.isa;
        isa.run(Write { cache: self, layer, block: block as usize, offset, k, v });
    }

    /// Copies a block in all layers: copy-on-write of a shared block.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        for layer in 0..self.layers {
            for (buffer, dim) in [(&mut self.keys, self.head_dim), (&mut self.values, self.value_dim)] {
                let len = self.kv_heads * self.block_size * dim * 2;
                let at = |block: u32| (layer * self.blocks + block as usize) * len;
                buffer.copy_within(at(from)..at(from) + len, at(to));
            }
        }
    }

    /// Keys of 16 tokens of a block, `[head_dim][16]` f16.
    #[inline(always)]
    pub(crate) fn key_group(&self, layer: usize, block: u32, kv_head: usize, group: usize) -> &[u8] {
        let len = self.head_dim * LANES * 2;
        let at = self.head_index(layer, block, kv_head) * (self.block_size / LANES) + group;
        &self.keys[at * len..(at + 1) * len]
    }

    /// Values of 16 tokens of a block, `[16][value_dim]` f16.
    #[inline(always)]
    pub(crate) fn value_group(&self, layer: usize, block: u32, kv_head: usize, group: usize) -> &[u8] {
        let len = self.value_dim * LANES * 2;
        let at = self.head_index(layer, block, kv_head) * (self.block_size / LANES) + group;
        &self.values[at * len..(at + 1) * len]
    }

    pub(crate) fn value_dim(&self) -> usize {
        self.value_dim
    }

    fn head_index(&self, layer: usize, block: u32, kv_head: usize) -> usize {
        (layer * self.blocks + block as usize) * self.kv_heads + kv_head
    }
}

struct Write<'a> {
    cache: &'a mut KvCache,
    layer: usize,
    block: usize,
    offset: usize,
    k: &'a [f32],
    v: &'a [f32],
}

impl WithSimd for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn with<S: Simd>(self, s: S) {
        let cache = self.cache;
        let (dim, value_dim) = (cache.head_dim, cache.value_dim);
        let (group, lane) = (self.offset / LANES, self.offset % LANES);
        for head in 0..cache.kv_heads {
            let index = (self.layer * cache.blocks + self.block) * cache.kv_heads + head;
            let at = (index * (cache.block_size / LANES) + group) * dim * LANES * 2;
            let keys = &mut cache.keys[at..at + dim * LANES * 2];
            let k = &self.k[head * dim..(head + 1) * dim];
            for (k, keys) in k.chunks(LANES).zip(keys.chunks_mut(LANES * LANES * 2)) {
                let halves = to_f16(s, k);
                for (key, half) in keys.chunks_exact_mut(LANES * 2).zip(halves.as_chunks::<2>().0) {
                    key[lane * 2..lane * 2 + 2].copy_from_slice(half);
                }
            }
            let at = (index * cache.block_size + self.offset) * value_dim * 2;
            let values = &mut cache.values[at..at + value_dim * 2];
            let v = &self.v[head * dim..(head + 1) * dim];
            for (v, values) in v.chunks(LANES).zip(values.as_chunks_mut::<{ LANES * 2 }>().0) {
                *values = to_f16(s, v);
            }
        }
    }
}

#[inline(always)]
fn to_f16<S: Simd>(s: S, x: &[f32]) -> [u8; 2 * LANES] {
    let mut padded = [0.0; LANES];
    padded[..x.len()].copy_from_slice(x);
    let x = s.load(&padded);
    // In this order a NaN stays one: it must be seen, not become a number.
    let x = s.max(s.splat(-F16_MAX), s.min(s.splat(F16_MAX), x));
    let mut out = [0; 2 * LANES];
    s.store_f16(&mut out, x);
    out
}
