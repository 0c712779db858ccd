//! What a model file's metadata says about the shape of the model.

use forebay_kernels::KvCache;

use super::keys::{Keys, SIZE_MAX};
use crate::gguf::{Gguf, List, Value};

/// Which two elements of a head one rotation turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// `(2i, 2i + 1)`, ggml's "normal" layout. GGUF files of the llama family have permuted q and k weights for it.
    Interleaved,
    /// `(i, i + dims / 2)`, GPT-NeoX's.
    HalfSplit,
}

/// The function between the two halves of the gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// GELU in its tanh approximation.
    GeluTanh,
}

/// Which layers have the sliding window that the metadata names, where it names one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windowed {
    /// None: files of the family carry a window that their models were not trained to use.
    Never,
    Every,
    /// All but each `period`-th, where the file has no pattern of its own.
    AllBut {
        period: usize,
    },
}

/// What sets one architecture apart from the others, as data.
///
/// Biases on q, k and v and norms of q and k are not here: a file has the tensors or has them not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Family {
    /// `general.architecture`, and the prefix of the other keys.
    pub name: &'static str,
    pub rope: RopeLayout,
    pub activation: Activation,
    /// Embeddings are multiplied by `sqrt(dim)`.
    pub scaled_embeddings: bool,
    /// What attention and MLP give is normed before it is added to the residual stream.
    pub post_norms: bool,
    pub windowed: Windowed,
    /// Base of the rotation in windowed layers, where the file has none of its own, without the file's scaling;
    /// `None`: theirs is that of all layers.
    pub window_rope_base: Option<f32>,
}

/// What most families have.
const PLAIN: Family = Family {
    name: "",
    rope: RopeLayout::HalfSplit,
    activation: Activation::Silu,
    scaled_embeddings: false,
    post_norms: false,
    windowed: Windowed::Never,
    window_rope_base: None,
};

/// The architectures that we run.
pub const FAMILIES: &[Family] = &[
    // Also SmolLM, Mistral (the first of which has a window) and others that are converted as `llama`.
    Family { name: "llama", rope: RopeLayout::Interleaved, windowed: Windowed::Every, ..PLAIN },
    Family { name: "qwen2", ..PLAIN },
    Family { name: "qwen3", ..PLAIN },
    // The text side of Gemma 3. Its norms are `1 + weight`; the files have the 1 added already.
    Family {
        name: "gemma3",
        activation: Activation::GeluTanh,
        scaled_embeddings: true,
        post_norms: true,
        windowed: Windowed::AllBut { period: 6 },
        window_rope_base: Some(10_000.0),
        ..PLAIN
    },
];

impl Family {
    pub(super) fn find(name: &str) -> Option<Self> {
        FAMILIES.iter().find(|family| family.name == name).copied()
    }
}

/// Rotary positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub layout: RopeLayout,
    /// Elements of a head that are rotated, from the first.
    pub dims: usize,
    /// Base of the geometric series of wavelengths ("theta").
    pub base: f32,
    /// Positions are divided by this (linear scaling); 1 means none.
    pub linear_factor: f32,
}

/// What sets the attention of one layer apart from other layers'.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerAttention {
    /// A token sees only the last this many tokens, itself included. The KV cache holds all of them all the same:
    /// blocks are shared by all layers, so a window saves work and no memory.
    pub window: Option<usize>,
    pub rope: Rope,
}

/// Shape of a model. All sizes are checked to be consistent and above zero.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    pub family: Family,
    /// `general.name`, for people.
    pub name: Option<String>,
    pub layers: usize,
    /// Width of the residual stream.
    pub dim: usize,
    pub ffn_dim: usize,
    pub q_heads: usize,
    /// Divides `q_heads`.
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    /// Positions the model was trained for.
    pub context_len: usize,
    pub rms_eps: f32,
    /// Of layers without a window.
    pub rope: Rope,
    /// `[rope.dims / 2]`: what each rotation frequency is divided by, where the metadata says it (Llama 3's context
    /// extension; a GGUF has a tensor of them).
    pub rope_factors: Option<Vec<f32>>,
    /// One for each layer.
    pub attention: Vec<LayerAttention>,
    /// What scores are multiplied with before softmax.
    pub attention_scale: f32,
    /// No matrix of its own: logits are made with the embedding matrix.
    pub tied_embeddings: bool,
}

/// Why a model cannot be run, as far as its metadata says.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum SpecError {
    #[error("the model file has no `{key}`")]
    Missing { key: String },
    #[error("`{key}` is {found}; {expected} expected")]
    Kind { key: String, found: &'static str, expected: &'static str },
    #[error("`{key}` is {value}; {expected} expected")]
    Range { key: String, value: String, expected: &'static str },
    #[error("architecture `{name}` is not supported; supported: {supported}")]
    Architecture { name: String, supported: String },
    #[error("{what} is not supported")]
    Unsupported { what: String },
    #[error("the model's sizes contradict each other: {what}")]
    Inconsistent { what: String },
}

/// Sizes of attention that depend on each other.
pub(super) struct Heads {
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Heads {
    /// Checks them, and fills in what is absent.
    pub(super) fn of(
        dim: usize,
        q_heads: usize,
        kv_heads: Option<usize>,
        head_dim: Option<usize>,
    ) -> Result<Self, SpecError> {
        let kv_heads = kv_heads.unwrap_or(q_heads);
        let head_dim = match head_dim {
            Some(head_dim) => head_dim,
            None if dim.is_multiple_of(q_heads) => dim / q_heads,
            None => {
                return Err(SpecError::Inconsistent {
                    what: format!("an embedding length of {dim} does not divide into {q_heads} heads"),
                });
            }
        };
        if head_dim > HEAD_DIM_MAX {
            return Err(SpecError::Unsupported { what: format!("a head of {head_dim} elements") });
        }
        if !q_heads.is_multiple_of(kv_heads) {
            return Err(SpecError::Inconsistent {
                what: format!("{q_heads} query heads do not divide into {kv_heads} KV heads"),
            });
        }
        Ok(Self { kv_heads, head_dim })
    }
}

/// Longest attention head, in elements; real models have at most 256.
pub const HEAD_DIM_MAX: usize = 512;

fn names(families: &[Family]) -> String {
    families.iter().map(|family| family.name).collect::<Vec<_>>().join(", ")
}

impl ModelSpec {
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, SpecError> {
        let name = Keys { metadata: gguf, prefix: String::new() }.text("general.architecture")?;
        let Some(family) = Family::find(&name) else {
            return Err(SpecError::Architecture { name, supported: names(FAMILIES) });
        };
        let keys = Keys { metadata: gguf, prefix: format!("{}.", family.name) };

        // Some dense files say "0 experts".
        if let Some(experts) = keys.get("expert_count").1.and_then(|value| value.as_u64()).filter(|&n| n > 0)
        {
            return Err(SpecError::Unsupported { what: format!("a mixture of {experts} experts") });
        }
        let dim = keys.size("embedding_length")?;
        let q_heads = keys.size("attention.head_count")?;
        let kv_heads = keys.optional_size("attention.head_count_kv")?;
        let heads = Heads::of(dim, q_heads, kv_heads, keys.optional_size("attention.key_length")?)?;
        let Heads { kv_heads, head_dim } = heads;
        if let Some(value_len) = keys.optional_size("attention.value_length")?
            && value_len != head_dim
        {
            return Err(SpecError::Unsupported {
                what: format!("a value length ({value_len}) other than the key length ({head_dim})"),
            });
        }
        keys.no_soft_cap("final_logit_softcapping", "logits")?;
        let layers = keys.layers("block_count")?;
        let rope = rope(&keys, family.rope, head_dim)?;
        let attention = attention(&keys, &family, layers, &rope)?;
        // Gemma 3 27B alone divides by the width of a head that its embedding would give it. No key says so;
        // llama.cpp knows it by its layers, too.
        let scale_dim = if family.name == "gemma3" && layers == 62 { dim / q_heads } else { head_dim };
        Ok(Self {
            family,
            name: gguf.get("general.name").and_then(Value::as_str).map(str::to_owned),
            layers,
            dim,
            ffn_dim: keys.size("feed_forward_length")?,
            q_heads,
            kv_heads,
            head_dim,
            vocab_size: vocab_size(gguf)?,
            context_len: keys.size("context_length")?,
            rms_eps: keys.positive("attention.layer_norm_rms_epsilon")?,
            rope,
            rope_factors: None,
            attention,
            attention_scale: 1.0 / (scale_dim as f32).sqrt(),
            tied_embeddings: gguf.tensor("output.weight").is_none(),
        })
    }

    /// Width of the fused q, k and v projection.
    pub fn qkv_dim(&self) -> usize {
        (self.q_heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Bytes of KV cache that one token needs: K and V of every layer, 2 bytes (f16) an element.
    pub fn kv_bytes_per_token(&self) -> usize {
        KvCache::block_bytes(self.layers, 1, self.kv_heads, self.head_dim)
    }

    /// How many KV blocks of `block_size` tokens fit into `bytes`.
    pub fn blocks_for_memory(&self, bytes: u64, block_size: usize) -> usize {
        let block = (self.kv_bytes_per_token() * block_size) as u64;
        usize::try_from(bytes / block.max(1)).unwrap_or(usize::MAX)
    }

    /// Memory for `blocks` KV blocks of `block_size` tokens, in bytes.
    pub fn memory_for_blocks(&self, blocks: usize, block_size: usize) -> u64 {
        (self.kv_bytes_per_token() * block_size) as u64 * blocks as u64
    }
}

/// Rows of the embedding matrix: `vocab_size` is missing in many files and wrong in some.
fn vocab_size(gguf: &Gguf) -> Result<usize, SpecError> {
    let embeddings = gguf
        .tensor("token_embd.weight")
        .ok_or_else(|| SpecError::Missing { key: "token_embd.weight".to_owned() })?;
    let rows = embeddings.rows();
    if rows as u64 > SIZE_MAX {
        return Err(SpecError::Range {
            key: "token_embd.weight".to_owned(),
            value: format!("{rows} rows"),
            expected: "at most 16777216",
        });
    }
    Ok(rows)
}

fn rope(keys: &Keys<'_, Gguf>, layout: RopeLayout, head_dim: usize) -> Result<Rope, SpecError> {
    let dims = keys.optional_size("rope.dimension_count")?.unwrap_or(head_dim);
    check_rotary(dims, head_dim)?;
    let scaling = keys.optional_text("rope.scaling.type")?;
    let linear_factor = match scaling.as_deref() {
        Some("none") => 1.0,
        // llama.cpp's default where only a factor is given.
        None => keys.optional_positive("rope.scaling.factor")?.unwrap_or(1.0),
        Some("linear") => keys.positive("rope.scaling.factor")?,
        Some(other) => {
            return Err(SpecError::Unsupported { what: format!("rope scaling of type `{other}`") });
        }
    };
    let base = keys.optional_positive("rope.freq_base")?.unwrap_or(10_000.0);
    Ok(Rope { layout, dims, base, linear_factor })
}

/// The table of layers. `rope` is that of layers without a window.
fn attention(
    keys: &Keys<'_, Gguf>,
    family: &Family,
    layers: usize,
    rope: &Rope,
) -> Result<Vec<LayerAttention>, SpecError> {
    let none = || Ok(vec![LayerAttention { window: None, rope: rope.clone() }; layers]);
    // Some files say "0": none.
    if keys.get("attention.sliding_window").1.is_some_and(|value| value.as_u64() == Some(0)) {
        return none();
    }
    let Some(window) = keys.optional_size("attention.sliding_window")? else { return none() };
    let windowed = match family.windowed {
        Windowed::Never => return none(),
        Windowed::Every => vec![true; layers],
        Windowed::AllBut { period } => pattern(keys, period, layers)?,
    };
    let base = keys.optional_positive("rope.freq_base_swa")?.or(family.window_rope_base);
    Ok(layer_table(&windowed, window, base, rope))
}

/// Each layer's attention, of which those `windowed` have a rotation of their own where it has a base: without scaling.
pub(super) fn layer_table(
    windowed: &[bool],
    window: usize,
    base: Option<f32>,
    rope: &Rope,
) -> Vec<LayerAttention> {
    let windowed_rope =
        base.map_or_else(|| rope.clone(), |base| Rope { base, linear_factor: 1.0, ..rope.clone() });
    let layer = |&windowed: &bool| match windowed {
        true => LayerAttention { window: Some(window), rope: windowed_rope.clone() },
        false => LayerAttention { window: None, rope: rope.clone() },
    };
    windowed.iter().map(layer).collect()
}

pub(super) fn check_rotary(dims: usize, head_dim: usize) -> Result<(), SpecError> {
    if dims == 0 || dims > head_dim || !dims.is_multiple_of(2) {
        return Err(SpecError::Inconsistent {
            what: format!("{dims} rotary dimensions in heads of {head_dim}"),
        });
    }
    Ok(())
}

/// Which layers have the window: a flag for each, or a period, in the file; else the family's period.
fn pattern(keys: &Keys<'_, Gguf>, period: usize, layers: usize) -> Result<Vec<bool>, SpecError> {
    let (key, value) = keys.get("attention.sliding_window_pattern");
    let flags = match value.as_deref() {
        Some(Value::List(List::Bools(flags))) => flags.clone(),
        Some(Value::List(List::Uints(flags))) => flags.iter().map(|&flag| flag != 0).collect(),
        Some(Value::List(List::Ints(flags))) => flags.iter().map(|&flag| flag != 0).collect(),
        Some(Value::List(_)) => {
            return Err(SpecError::Kind { key, found: "an array", expected: "a period, or flags" });
        }
        _ => {
            let period = keys.optional_size("attention.sliding_window_pattern")?.unwrap_or(period);
            return Ok((1..=layers).map(|nth| !nth.is_multiple_of(period)).collect());
        }
    };
    if flags.len() != layers {
        return Err(SpecError::Inconsistent {
            what: format!("`{key}` has {} entries for {layers} layers", flags.len()),
        });
    }
    Ok(flags)
}
