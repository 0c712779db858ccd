//! The weights of a model, packed for the kernels.
//!
//! Tensors keep the precision that the file has them in; q, k and v are packed into one matrix, and so are the two
//! halves of the MLP's input, so that a layer is four matrix products. The embedding matrix stays in the file and is
//! dequantised row by row on lookup (a step reads a handful of its rows).

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use forebay_kernels::{Isa, Matrix, PackError, Part, Pool, TensorType, dequantize_row};

use super::{ModelFile, ModelSpec, Shard, StoredTensor};
use crate::gguf::ElementType;

/// Why a model's weights could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("the model file has no tensor `{name}`")]
    Missing { name: String },
    #[error("tensor `{name}` has the shape {found:?}; {expected:?} expected")]
    Shape { name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("tensor `{name}` is stored as {element}, which is not supported{hint}")]
    Element { name: String, element: ElementType, hint: &'static str },
    /// Leaving out a bias or a norm that the model was trained with would give plausible, wrong text.
    #[error("tensor `{name}` has no place in this architecture as it is supported here")]
    Unexpected { name: String },
    #[error("tensor `{name}` cannot be packed")]
    Pack { name: String, source: PackError },
}

/// One transformer layer. Matrices are `[rows = outputs, cols = inputs]`; where a model is divided among ranks, a
/// rank has some rows of each, and all of what is no matrix but the bias.
pub struct Layer {
    /// `[dim]`
    pub attention_norm: Vec<f32>,
    /// `[qkv_dim, dim]`: the rows of q, then k, then v.
    pub qkv: Matrix,
    /// `[qkv_dim]`, if the model has biases there.
    pub qkv_bias: Option<Vec<f32>>,
    /// `[head_dim]`: RMS norms of each q and k head before the rotation, if the model has them.
    pub head_norms: Option<HeadNorms>,
    /// `[dim, q_heads * head_dim]`
    pub output: Matrix,
    /// `[dim]`: norms of what attention and MLP add to the residual stream, if the family has them.
    pub post_norms: Option<PostNorms>,
    /// `[dim]`
    pub ffn_norm: Vec<f32>,
    /// `[2 * ffn_dim, dim]`: the rows of gate, then up.
    pub gate_up: Matrix,
    /// `[dim, ffn_dim]`
    pub down: Matrix,
}

/// RMS norm weights after attention and after the MLP (Gemma 3).
#[derive(Debug)]
pub struct PostNorms {
    pub attention: Vec<f32>,
    pub ffn: Vec<f32>,
}

/// Per-head RMS norm weights (Qwen 3, Gemma 3).
#[derive(Debug)]
pub struct HeadNorms {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
}

/// The embedding matrix `[vocab_size, dim]`, left in the file.
#[derive(Debug)]
pub struct Embeddings {
    file: Arc<ModelFile>,
    tensor: StoredTensor,
    element: TensorType,
    row_bytes: usize,
}

impl Embeddings {
    /// Writes the embedding of `token` (below the vocabulary's size) to `out` (`[dim]`).
    pub fn lookup(&self, token: u32, out: &mut [f32]) {
        let start = token as usize * self.row_bytes;
        let row = &self.file.data(&self.tensor)[start..start + self.row_bytes];
        dequantize_row(self.element, row, out).expect("the row's size was checked when the file was read");
    }
}

/// The weights of a model, or of a rank's shard of it.
pub struct Weights {
    pub embeddings: Embeddings,
    pub layers: Vec<Layer>,
    /// `[dim]`
    pub output_norm: Vec<f32>,
    /// `[vocab_size, dim]`; only the last stage has it.
    pub head: Option<Matrix>,
    /// `[rope.dims / 2]`: what each rotation frequency is divided by (Llama 3's context extension).
    pub rope_factors: Option<Vec<f32>>,
}

impl Weights {
    /// Packs the shard's rows of every matrix. Takes seconds for a large model; reads what it packs once.
    ///
    /// Tensors of other shards' layers are left to these; so all shards together have looked at every tensor.
    pub fn load(
        file: &Arc<ModelFile>,
        spec: &ModelSpec,
        shard: &Shard,
        isa: Isa,
        pool: &Pool,
    ) -> Result<Self, WeightsError> {
        let mut loader = Loader { file, isa, pool, used: HashSet::new() };
        let dim = spec.dim;
        let heads = |all: usize, own: &Range<usize>| Rows {
            all: all * spec.head_dim,
            own: own.start * spec.head_dim..own.end * spec.head_dim,
        };
        let rows = |all: usize| Rows { all, own: shard.rows(all) };
        let (q, kv) = (heads(spec.q_heads, &shard.q_heads), heads(spec.kv_heads, &shard.kv_heads));

        let embeddings = loader.embeddings("token_embd.weight", dim, spec.vocab_size)?;
        let head = if spec.tied_embeddings { "token_embd.weight" } else { "output.weight" };
        let head = match shard.last {
            true => Some(loader.matrix(&[(head, &rows(spec.vocab_size))], dim)?),
            false => loader.leave(head),
        };
        let output_norm = loader.vector("output_norm.weight", dim)?;
        let rope_factors = match loader.optional_vector("rope_freqs.weight", spec.rope.dims / 2)? {
            Some(factors) => Some(factors),
            None => spec.rope_factors.clone(),
        };

        let (dim_rows, ffn_rows) = (rows(dim), rows(spec.ffn_dim));
        let mut layers = Vec::with_capacity(shard.layers.len());
        for nth in shard.layers.clone() {
            let name = |part: &str| format!("blk.{nth}.{part}");
            let names = [name("attn_q.weight"), name("attn_k.weight"), name("attn_v.weight")];
            let (gate, up) = (name("ffn_gate.weight"), name("ffn_up.weight"));
            layers.push(Layer {
                attention_norm: loader.vector(&name("attn_norm.weight"), dim)?,
                qkv: loader.matrix(&[(&names[0], &q), (&names[1], &kv), (&names[2], &kv)], dim)?,
                qkv_bias: loader.qkv_bias(
                    [&name("attn_q.bias"), &name("attn_k.bias"), &name("attn_v.bias")],
                    [&q, &kv, &kv],
                )?,
                head_norms: loader.head_norms(
                    &name("attn_q_norm.weight"),
                    &name("attn_k_norm.weight"),
                    spec.head_dim,
                )?,
                output: loader.matrix(&[(&name("attn_output.weight"), &dim_rows)], q.all)?,
                post_norms: match spec.family.post_norms {
                    false => None,
                    true => Some(PostNorms {
                        attention: loader.vector(&name("post_attention_norm.weight"), dim)?,
                        ffn: loader.vector(&name("post_ffw_norm.weight"), dim)?,
                    }),
                },
                ffn_norm: loader.vector(&name("ffn_norm.weight"), dim)?,
                gate_up: loader.matrix(&[(&gate, &ffn_rows), (&up, &ffn_rows)], dim)?,
                down: loader.matrix(&[(&name("ffn_down.weight"), &dim_rows)], spec.ffn_dim)?,
            });
        }
        let others = (0..spec.layers).filter(|nth| !shard.layers.contains(nth));
        let others: Vec<String> = others.map(|nth| format!("blk.{nth}.")).collect();
        let unexpected = |tensor: &&StoredTensor| {
            !loader.used.contains(tensor.name.as_str())
                && !others.iter().any(|layer| tensor.name.starts_with(layer.as_str()))
        };
        if let Some(tensor) = file.tensors().iter().find(unexpected) {
            return Err(WeightsError::Unexpected { name: file.spelt(&tensor.name) });
        }
        Ok(Self { embeddings, layers, output_norm, head, rope_factors })
    }

    /// Bytes of packed weights that one pass reads (the embedding matrix is not among them).
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter().map(|layer| {
            layer.qkv.bytes() + layer.output.bytes() + layer.gate_up.bytes() + layer.down.bytes()
        });
        layers.sum::<usize>() + self.head.as_ref().map_or(0, Matrix::bytes)
    }
}

/// Rows of a tensor, and which of them to take.
struct Rows {
    all: usize,
    own: Range<usize>,
}

struct Loader<'a> {
    file: &'a Arc<ModelFile>,
    isa: Isa,
    pool: &'a Pool,
    used: HashSet<String>,
}

impl<'a> Loader<'a> {
    /// The tensor called `name`, if there is one; of that shape (innermost dimension first), or it is an error.
    fn optional(&mut self, name: &str, shape: &[usize]) -> Result<Option<&'a StoredTensor>, WeightsError> {
        let Some(tensor) = self.file.tensor(name) else { return Ok(None) };
        if tensor.shape != shape {
            return Err(WeightsError::Shape {
                name: self.file.spelt(name),
                found: tensor.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        self.used.insert(name.to_owned());
        Ok(Some(tensor))
    }

    fn required(&mut self, name: &str, shape: &[usize]) -> Result<&'a StoredTensor, WeightsError> {
        self.optional(name, shape)?.ok_or_else(|| WeightsError::Missing { name: self.file.spelt(name) })
    }

    fn optional_vector(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>, WeightsError> {
        let Some(tensor) = self.optional(name, &[len])? else { return Ok(None) };
        let element = self.element(tensor)?;
        // Norms and biases are F32 in every file that ggml's tools write, and of the model's type in others.
        if element.is_quantized() {
            let hint = " there; F32, F16 or BF16 expected";
            return Err(WeightsError::Element { name: self.file.spelt(name), element: tensor.element, hint });
        }
        let mut values = vec![0.0; len];
        dequantize_row(element, self.file.data(tensor), &mut values)
            .expect("the tensor's size was checked when the file was read");
        if name.ends_with("norm.weight") {
            let offset = self.file.norm_offset();
            values.iter_mut().for_each(|value| *value += offset);
        }
        Ok(Some(values))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, WeightsError> {
        self.optional_vector(name, len)?.ok_or_else(|| WeightsError::Missing { name: self.file.spelt(name) })
    }

    fn head_norms(&mut self, q: &str, k: &str, len: usize) -> Result<Option<HeadNorms>, WeightsError> {
        match self.optional_vector(q, len)? {
            // A k norm alone stays unused and is reported as unexpected.
            None => Ok(None),
            Some(q) => Ok(Some(HeadNorms { q, k: self.vector(k, len)? })),
        }
    }

    fn qkv_bias(&mut self, names: [&str; 3], rows: [&Rows; 3]) -> Result<Option<Vec<f32>>, WeightsError> {
        let Some(q) = self.optional_vector(names[0], rows[0].all)? else { return Ok(None) };
        let mut bias = q[rows[0].own.clone()].to_vec();
        for part in 1..3 {
            bias.extend(&self.vector(names[part], rows[part].all)?[rows[part].own.clone()]);
        }
        Ok(Some(bias))
    }

    /// A matrix that another stage has.
    fn leave(&mut self, name: &str) -> Option<Matrix> {
        self.used.insert(name.to_owned());
        None
    }

    fn element(&self, tensor: &StoredTensor) -> Result<TensorType, WeightsError> {
        TensorType::from_ggml(tensor.element.ggml()).ok_or_else(|| WeightsError::Element {
            name: self.file.spelt(&tensor.name),
            element: tensor.element,
            hint: "",
        })
    }

    /// The own output rows of several `[rows, cols]` matrices, one after the other.
    fn matrix(&mut self, parts: &[(&str, &Rows)], cols: usize) -> Result<Matrix, WeightsError> {
        let mut packed = Vec::with_capacity(parts.len());
        for &(name, rows) in parts {
            let tensor = self.required(name, &[cols, rows.all])?;
            let (ty, own) = (self.element(tensor)?, &rows.own);
            let row_bytes = ty.row_bytes(cols);
            let data = &self.file.data(tensor)[own.start * row_bytes..own.end * row_bytes];
            packed.push(Part { ty, rows: own.len(), data });
        }
        Matrix::pack(&packed, cols, self.isa, self.pool)
            .map_err(|source| WeightsError::Pack { name: self.file.spelt(parts[0].0), source })
    }

    fn embeddings(&mut self, name: &str, cols: usize, rows: usize) -> Result<Embeddings, WeightsError> {
        let tensor = self.required(name, &[cols, rows])?;
        let element = self.element(tensor)?;
        Ok(Embeddings {
            file: Arc::clone(self.file),
            row_bytes: element.row_bytes(cols),
            tensor: tensor.clone(),
            element,
        })
    }
}
