//! Small random models, written as a GGUF file in memory. For tests: any seed gives a model that runs.

use half::{bf16, f16};

use crate::gguf::ElementType;
use crate::gguf::write::Writer;

/// Shape of a random llama (or Gemma) model.
#[derive(Debug, Clone)]
pub struct TinyLlama {
    pub layers: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    /// Even.
    pub head_dim: usize,
    pub ffn_dim: usize,
    pub vocab_size: usize,
    pub context_len: usize,
    /// Of the matrices within layers; K-quants want every row to have whole blocks of 256.
    pub weights: ElementType,
    /// Of the embedding matrix, which is the head too.
    pub embeddings: ElementType,
    /// Makes it a `gemma3`, of which every second layer sees only this many tokens.
    pub window: Option<usize>,
    pub seed: u64,
}

impl Default for TinyLlama {
    fn default() -> Self {
        Self {
            layers: 2,
            q_heads: 4,
            kv_heads: 2,
            head_dim: 16,
            ffn_dim: 160,
            vocab_size: 256,
            context_len: 1024,
            weights: ElementType::F32,
            embeddings: ElementType::F32,
            window: None,
            seed: 1,
        }
    }
}

impl TinyLlama {
    /// The model as the bytes of a GGUF file, without a tokenizer.
    pub fn to_gguf(&self) -> Vec<u8> {
        self.writer().finish()
    }

    /// As [`Self::to_gguf`], not finished, so that a test can add keys and tensors.
    pub fn writer(&self) -> Writer {
        let dim = self.q_heads * self.head_dim;
        let kv_dim = self.kv_heads * self.head_dim;
        let mut random = Random(self.seed);
        let mut file = Writer::new();
        let family = if self.window.is_some() { "gemma3" } else { "llama" };
        file.put_text("general.architecture", family).put_text("general.name", "tiny random llama");
        for (key, size) in [
            ("block_count", self.layers),
            ("context_length", self.context_len),
            ("embedding_length", dim),
            ("feed_forward_length", self.ffn_dim),
            ("attention.head_count", self.q_heads),
            ("attention.head_count_kv", self.kv_heads),
            ("rope.dimension_count", self.head_dim),
            ("vocab_size", self.vocab_size),
        ] {
            file.put_u32(&format!("{family}.{key}"), size as u32);
        }
        if let Some(window) = self.window {
            file.put_u32("gemma3.attention.sliding_window", window as u32)
                .put_u32("gemma3.attention.sliding_window_pattern", 2)
                .put_f32("gemma3.rope.freq_base_swa", 1000.0);
        }
        file.put_f32(&format!("{family}.rope.freq_base"), 10_000.0)
            .put_f32(&format!("{family}.attention.layer_norm_rms_epsilon"), 1e-5);
        let mut matrix = |name: &str, cols: usize, rows: usize, element: ElementType| {
            let bytes = random.matrix(cols, rows, element);
            (name.to_owned(), [cols, rows], element, bytes)
        };
        let mut tensors = vec![matrix("token_embd.weight", dim, self.vocab_size, self.embeddings)];
        for nth in 0..self.layers {
            for (part, cols, rows) in [
                ("attn_q", dim, dim),
                ("attn_k", dim, kv_dim),
                ("attn_v", dim, kv_dim),
                ("attn_output", dim, dim),
                ("ffn_gate", dim, self.ffn_dim),
                ("ffn_up", dim, self.ffn_dim),
                ("ffn_down", self.ffn_dim, dim),
            ] {
                tensors.push(matrix(&format!("blk.{nth}.{part}.weight"), cols, rows, self.weights));
            }
        }
        for (name, shape, element, bytes) in tensors {
            file.tensor(&name, &shape, element, bytes);
        }
        let mut norm = |name: String, len: usize| {
            let values: Vec<f32> = (0..len).map(|_| 1.0 + 0.2 * random.signed()).collect();
            file.tensor_f32(&name, &[len], &values);
        };
        norm("output_norm.weight".to_owned(), dim);
        for nth in 0..self.layers {
            norm(format!("blk.{nth}.attn_norm.weight"), dim);
            norm(format!("blk.{nth}.ffn_norm.weight"), dim);
            if self.window.is_some() {
                norm(format!("blk.{nth}.post_attention_norm.weight"), dim);
                norm(format!("blk.{nth}.post_ffw_norm.weight"), dim);
                norm(format!("blk.{nth}.attn_q_norm.weight"), self.head_dim);
                norm(format!("blk.{nth}.attn_k_norm.weight"), self.head_dim);
            }
        }
        file
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From -1 up to 1.
    fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 * (2.0 / (1u64 << 24) as f32) - 1.0
    }

    /// A matrix whose entries have a standard deviation of about `1.5 / sqrt(cols)`: the residual stream neither
    /// dies out nor explodes, and attention is not uniform.
    fn matrix(&mut self, cols: usize, rows: usize, element: ElementType) -> Vec<u8> {
        let spread = 1.5 / (cols as f32).sqrt();
        let mut out = Vec::new();
        if matches!(element, ElementType::F32 | ElementType::F16 | ElementType::BF16) {
            for _ in 0..rows * cols {
                // Uniform in ±a has the deviation a / sqrt(3).
                let value = self.signed() * spread * 3f32.sqrt();
                match element {
                    ElementType::F16 => out.extend(f16::from_f32(value).to_le_bytes()),
                    ElementType::BF16 => out.extend(bf16::from_f32(value).to_le_bytes()),
                    _ => out.extend(value.to_le_bytes()),
                }
            }
            return out;
        }
        // Quants are uniform; the scale makes their range ±sqrt(3) deviations.
        let range = spread * 3f32.sqrt();
        let block_len = element.block_len();
        assert!(cols.is_multiple_of(block_len), "rows of {cols} entries are no blocks of {element}");
        for _ in 0..rows * cols / block_len {
            let wobble = 1.0 + 0.3 * self.signed();
            let range = range * wobble;
            match element {
                ElementType::Q8_0 => self.block(&mut out, &[range / 127.0], 32),
                ElementType::Q4_0 => self.block(&mut out, &[range / 8.0], 16),
                ElementType::Q4_1 => self.block(&mut out, &[range / 7.5, -range], 16),
                ElementType::Q5_0 => self.block(&mut out, &[range / 16.0], 20),
                ElementType::Q5_1 => self.block(&mut out, &[range / 15.5, -range], 20),
                // The scales of their parts are random bytes as well: 6 bits, 31.5 in the mean, and as much the minimum's.
                ElementType::Q4_K => {
                    let scale = range / (7.5 * 31.5);
                    self.block(&mut out, &[scale, 7.5 * scale], 12 + 128);
                }
                ElementType::Q5_K => {
                    let scale = range / (15.5 * 31.5);
                    self.block(&mut out, &[scale, 15.5 * scale], 12 + 32 + 128);
                }
                // Here the scales are signed bytes, and the block's scale stands at its end.
                ElementType::Q6_K => {
                    self.block(&mut out, &[], 128 + 64 + 16);
                    self.block(&mut out, &[range / (32.0 * 74.0)], 0);
                }
                other => panic!("a tiny model of {other} cannot be made"),
            }
        }
        out
    }

    fn block(&mut self, out: &mut Vec<u8>, scales: &[f32], quants: usize) {
        for &scale in scales {
            out.extend(f16::from_f32(scale).to_le_bytes());
        }
        for _ in 0..quants {
            out.push((self.next() >> 32) as u8);
        }
    }
}
