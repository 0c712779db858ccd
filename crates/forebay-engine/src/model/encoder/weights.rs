//! The weights of an encoder, packed for the kernels, in the precision that the file has them in.

use std::collections::HashSet;

use forebay_kernels::{Isa, Matrix, Part, Pool, TensorType, dequantize_row};

use super::{EncoderError, EncoderSpec};
use crate::safetensors::{Directory, Dtype, TensorView};

/// A matrix `[out, in]` with a bias `[out]`.
pub struct Linear {
    pub weight: Matrix,
    pub bias: Vec<f32>,
}

/// Layer norm, each `[dim]`.
pub struct Norm {
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
}

pub struct EncoderLayer {
    /// `[3 * dim, dim]`: the rows of q, then k, then v.
    pub qkv: Linear,
    /// `[dim, dim]`
    pub output: Linear,
    pub attention_norm: Norm,
    /// `[ffn_dim, dim]`
    pub up: Linear,
    /// `[dim, ffn_dim]`
    pub down: Linear,
    pub ffn_norm: Norm,
}

/// All weights of an encoder.
pub struct EncoderWeights {
    /// The mapped files: rows of the embedding matrix are read from them.
    directory: Directory,
    words: String,
    /// `[positions, dim]`: the embedding of each position plus that of the first token type.
    pub positions: Vec<f32>,
    pub norm: Norm,
    pub layers: Vec<EncoderLayer>,
}

/// What is in the files of BERT and has no part in an embedding: the classifier's pooler, the numbers 0, 1, 2, … and
/// the heads of its training.
const UNUSED: &[&str] = &["pooler.", "embeddings.position_ids", "cls."];

impl EncoderWeights {
    /// Packs every tensor of the directory. Reads all of its files once.
    pub fn load(
        directory: Directory,
        spec: &EncoderSpec,
        isa: Isa,
        pool: &Pool,
    ) -> Result<Self, EncoderError> {
        // Saved from a model with a head, the encoder's names begin with its place there.
        let prefix = if directory.names().any(|name| name.starts_with("bert.")) { "bert." } else { "" };
        let mut loader = Loader { directory: &directory, prefix, isa, pool, used: HashSet::new() };
        let dim = spec.dim;
        let words = loader.tensor("embeddings.word_embeddings.weight", &[spec.vocab_size, dim])?;
        loader.tensor_type(&words)?;
        let words = words.name;
        let mut positions = loader.values("embeddings.position_embeddings.weight", &[spec.positions, dim])?;
        let types = loader.values("embeddings.token_type_embeddings.weight", &[spec.types, dim])?;
        for row in positions.chunks_exact_mut(dim) {
            row.iter_mut().zip(&types).for_each(|(to, first)| *to += first);
        }
        let norm = loader.norm("embeddings.LayerNorm", dim)?;
        let mut layers = Vec::with_capacity(spec.layers);
        for nth in 0..spec.layers {
            let name = |part: &str| format!("encoder.layer.{nth}.{part}");
            let qkv = ["query", "key", "value"].map(|part| name(&format!("attention.self.{part}")));
            layers.push(EncoderLayer {
                qkv: loader.linear(&qkv.each_ref().map(String::as_str), dim, dim)?,
                output: loader.linear(&[&name("attention.output.dense")], dim, dim)?,
                attention_norm: loader.norm(&name("attention.output.LayerNorm"), dim)?,
                up: loader.linear(&[&name("intermediate.dense")], spec.ffn_dim, dim)?,
                down: loader.linear(&[&name("output.dense")], dim, spec.ffn_dim)?,
                ffn_norm: loader.norm(&name("output.LayerNorm"), dim)?,
            });
        }
        let used = loader.used;
        let is_unused = |name: &str| {
            let name = name.strip_prefix(prefix).unwrap_or(name);
            UNUSED.iter().any(|unused| name.starts_with(unused))
        };
        if let Some(name) = directory.names().find(|name| !used.contains(*name) && !is_unused(name)) {
            return Err(EncoderError::Unexpected { name: name.to_owned() });
        }
        Ok(Self { words, directory, positions, norm, layers })
    }

    /// Adds the embedding of `token` (below the vocabulary's size) to `out` (`[dim]`); `row` is memory for it.
    pub fn add_word(&self, token: u32, row: &mut [f32], out: &mut [f32]) {
        let words = self.directory.tensor(&self.words).expect("found when the weights were loaded");
        let element = element_of(words.dtype).expect("checked when the weights were loaded");
        let bytes = element.row_bytes(row.len());
        let start = token as usize * bytes;
        dequantize_row(element, &words.data[start..start + bytes], row).expect("its shape was checked");
        out.iter_mut().zip(row).for_each(|(to, x)| *to += *x);
    }

    /// Bytes of packed weights.
    pub fn bytes(&self) -> usize {
        let layer = |layer: &EncoderLayer| {
            [&layer.qkv, &layer.output, &layer.up, &layer.down]
                .iter()
                .map(|w| w.weight.bytes())
                .sum::<usize>()
        };
        self.layers.iter().map(layer).sum::<usize>() + self.positions.len() * 4
    }
}

fn element_of(dtype: Dtype) -> Option<TensorType> {
    [(Dtype::F32, TensorType::F32), (Dtype::F16, TensorType::F16), (Dtype::BF16, TensorType::BF16)]
        .into_iter()
        .find_map(|(theirs, ours)| (theirs == dtype).then_some(ours))
}

struct Loader<'a> {
    directory: &'a Directory,
    prefix: &'a str,
    isa: Isa,
    pool: &'a Pool,
    used: HashSet<String>,
}

struct Found<'a> {
    name: String,
    view: TensorView<'a>,
}

impl<'a> Loader<'a> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Found<'a>, EncoderError> {
        let name = format!("{}{name}", self.prefix);
        let Some(view) = self.directory.tensor(&name) else { return Err(EncoderError::Missing { name }) };
        if view.shape != shape {
            return Err(EncoderError::Shape { name, found: view.shape.to_vec(), expected: shape.to_vec() });
        }
        self.used.insert(name.clone());
        Ok(Found { name, view })
    }

    fn tensor_type(&self, found: &Found<'_>) -> Result<TensorType, EncoderError> {
        let dtype = found.view.dtype;
        element_of(dtype).ok_or_else(|| EncoderError::Dtype { name: found.name.clone(), dtype: dtype.name() })
    }

    fn values(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, EncoderError> {
        let found = self.tensor(name, shape)?;
        let element = self.tensor_type(&found)?;
        let mut out = vec![0.0; shape.iter().product()];
        dequantize_row(element, found.view.data, &mut out)
            .expect("a tensor has as many bytes as its shape says");
        Ok(out)
    }

    fn norm(&mut self, name: &str, dim: usize) -> Result<Norm, EncoderError> {
        let weight = self.values(&format!("{name}.weight"), &[dim])?;
        Ok(Norm { weight, bias: self.values(&format!("{name}.bias"), &[dim])? })
    }

    /// The output rows of several matrices of one shape, one after the other.
    fn linear(&mut self, names: &[&str], rows: usize, cols: usize) -> Result<Linear, EncoderError> {
        let (mut parts, mut bias) = (Vec::with_capacity(names.len()), Vec::new());
        for name in names {
            let found = self.tensor(&format!("{name}.weight"), &[rows, cols])?;
            parts.push(Part { ty: self.tensor_type(&found)?, rows, data: found.view.data });
            bias.extend(self.values(&format!("{name}.bias"), &[rows])?);
        }
        let pack = |source| EncoderError::Pack { name: names[0].to_owned(), source };
        Ok(Linear { weight: Matrix::pack(&parts, cols, self.isa, self.pool).map_err(pack)?, bias })
    }
}
