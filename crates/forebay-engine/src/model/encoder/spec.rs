//! What the JSON files of an encoder's directory say.

use std::io;
use std::path::{Path, PathBuf};

use forebay_kernels::PackError;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::safetensors::DirectoryError;
use crate::small_file::{self, SmallFileError};

/// Architectures of `config.json` that can be run.
pub const ENCODERS: &[&str] = &["BertModel"];

/// The longest of these files has a few KB.
const JSON_BYTES_MAX: u64 = 1 << 20;
/// Sizes beyond these are of no encoder there is; products of them stay far from overflow.
const DIM_MAX: usize = 1 << 16;
const LAYERS_MAX: usize = 1024;
const VOCAB_MAX: usize = 1 << 24;
const POSITIONS_MAX: usize = 1 << 20;

/// Why a directory is no encoder that can be run.
#[derive(Debug, thiserror::Error)]
pub enum EncoderError {
    #[error("can't read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is longer than {JSON_BYTES_MAX} bytes, the limit", path.display())]
    TooLong { path: PathBuf },
    #[error("{} is not what it should be", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error(
        "the architecture `{found}` is not supported for embeddings; supported are {}",
        ENCODERS.join(", ")
    )]
    Architecture { found: String },
    #[error("`{key}` of {file} is {found}; {expected} expected")]
    Value { file: &'static str, key: &'static str, found: String, expected: String },
    #[error(
        "modules.json has a module of the type `{kind}`; Transformer, Pooling and Normalize are supported"
    )]
    Module { kind: String },
    #[error("the pooling of {} is not supported: {found}; mean and cls are", path.display())]
    Pooling { path: PathBuf, found: String },
    #[error(transparent)]
    Weights(#[from] DirectoryError),
    #[error("the weights have no tensor `{name}`")]
    Missing { name: String },
    #[error("tensor `{name}` has the shape {found:?}; {expected:?} expected")]
    Shape { name: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("tensor `{name}` is stored as {dtype}; F32, F16 and BF16 are supported")]
    Dtype { name: String, dtype: &'static str },
    /// Leaving out what the model was trained with would give plausible, wrong vectors.
    #[error("tensor `{name}` has no place in this architecture as it is supported here")]
    Unexpected { name: String },
    #[error("tensor `{name}` can't be packed")]
    Pack { name: String, source: PackError },
}

/// How the vectors of a text's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    Mean,
    /// The first token's.
    Cls,
}

/// An encoder as its directory describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderSpec {
    pub vocab_size: usize,
    pub dim: usize,
    pub layers: usize,
    pub heads: usize,
    pub ffn_dim: usize,
    /// Rows of the matrix of positions.
    pub positions: usize,
    /// Rows of the matrix of token types, of which the first is used.
    pub types: usize,
    pub norm_eps: f32,
    pub pooling: Pooling,
    /// Vectors get length 1 unless a request asks otherwise.
    pub normalize: bool,
    /// Tokens of a text at most, special ones included.
    pub tokens_max: usize,
    /// Texts are put into lower case before they are tokenized.
    pub lower_case: bool,
    /// Lengths to which vectors may be cut; `None` where the model was not trained for it, empty for any.
    pub matryoshka: Option<Vec<u32>>,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    architectures: Vec<String>,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "two")]
    type_vocab_size: usize,
    #[serde(default = "bert_eps")]
    layer_norm_eps: f32,
    #[serde(default = "gelu")]
    hidden_act: String,
    #[serde(default = "absolute")]
    position_embedding_type: String,
    #[serde(default)]
    is_decoder: bool,
    #[serde(default)]
    is_matryoshka: bool,
    matryoshka_dimensions: Option<Vec<u32>>,
}

fn two() -> usize {
    2
}

fn bert_eps() -> f32 {
    1e-12
}

fn gelu() -> String {
    "gelu".to_owned()
}

fn absolute() -> String {
    "absolute".to_owned()
}

#[derive(Deserialize)]
struct Architectures {
    #[serde(default)]
    architectures: Vec<String>,
}

#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct PoolingConfig {
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
    #[serde(default)]
    pooling_mode_max_tokens: bool,
    #[serde(default)]
    pooling_mode_mean_sqrt_len_tokens: bool,
    #[serde(default)]
    pooling_mode_weightedmean_tokens: bool,
    #[serde(default)]
    pooling_mode_lasttoken: bool,
}

#[derive(Deserialize, Default)]
struct SentenceConfig {
    max_seq_length: Option<usize>,
    #[serde(default)]
    do_lower_case: bool,
}

#[derive(Deserialize, Default)]
struct TokenizerLimit {
    /// Some write 10^30 for "no limit".
    model_max_length: Option<f64>,
}

/// Whether a directory's `config.json` names an encoder: decided by its architecture, nothing else is checked.
pub fn is_encoder(directory: &Path) -> bool {
    let Ok(config) = required::<Architectures>(&directory.join("config.json")) else { return false };
    config.architectures.iter().any(|name| ENCODERS.contains(&name.as_str()))
}

impl EncoderSpec {
    /// Reads the directory's JSON files; the weights are not looked at.
    pub fn read(directory: &Path) -> Result<Self, EncoderError> {
        let config: Config = required(&directory.join("config.json"))?;
        check(&config)?;
        let (pooling, normalize) = match optional::<Vec<Module>>(&directory.join("modules.json"))? {
            Some(modules) => pooling_of(directory, &modules)?,
            // What vLLM does with a BERT that comes without.
            None => (Pooling::Cls, true),
        };
        let sentence = optional::<SentenceConfig>(&directory.join("sentence_bert_config.json"))?;
        let tokenizer = optional::<TokenizerLimit>(&directory.join("tokenizer_config.json"))?;
        // As in vLLM: the length that sentence-transformers uses goes before the tokenizer's.
        let sentence = sentence.unwrap_or_default();
        let limit = sentence
            .max_seq_length
            .or_else(|| tokenizer?.model_max_length.map(|max| max.clamp(0.0, POSITIONS_MAX as f64) as usize));
        let positions = config.max_position_embeddings;
        let tokens_max = limit.map_or(positions, |limit| limit.min(positions));
        range("sentence_bert_config.json", "max_seq_length", tokens_max, POSITIONS_MAX)?;
        Ok(Self {
            vocab_size: config.vocab_size,
            dim: config.hidden_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            ffn_dim: config.intermediate_size,
            positions,
            types: config.type_vocab_size,
            norm_eps: config.layer_norm_eps,
            pooling,
            normalize,
            tokens_max,
            lower_case: sentence.do_lower_case,
            matryoshka: match config.matryoshka_dimensions {
                Some(dimensions) => Some(dimensions),
                None => config.is_matryoshka.then(Vec::new),
            },
        })
    }

    pub fn head_dim(&self) -> usize {
        self.dim / self.heads
    }
}

fn check(config: &Config) -> Result<(), EncoderError> {
    const FILE: &str = "config.json";
    if !config.architectures.iter().any(|name| ENCODERS.contains(&name.as_str())) {
        return Err(EncoderError::Architecture { found: config.architectures.join(", ") });
    }
    for (key, value, max) in [
        ("vocab_size", config.vocab_size, VOCAB_MAX),
        ("hidden_size", config.hidden_size, DIM_MAX),
        ("num_hidden_layers", config.num_hidden_layers, LAYERS_MAX),
        ("num_attention_heads", config.num_attention_heads, DIM_MAX),
        ("intermediate_size", config.intermediate_size, DIM_MAX * 16),
        ("max_position_embeddings", config.max_position_embeddings, POSITIONS_MAX),
        ("type_vocab_size", config.type_vocab_size, VOCAB_MAX),
    ] {
        range(FILE, key, value, max)?;
    }
    let value = |key, found: String, expected: &str| {
        Err(EncoderError::Value { file: FILE, key, found, expected: expected.to_owned() })
    };
    if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
        let expected = format!("a divisor of `hidden_size` ({})", config.hidden_size);
        return value("num_attention_heads", config.num_attention_heads.to_string(), &expected);
    }
    if config.hidden_act != "gelu" {
        return value("hidden_act", format!("`{}`", config.hidden_act), "`gelu`");
    }
    if config.position_embedding_type != "absolute" {
        return value(
            "position_embedding_type",
            format!("`{}`", config.position_embedding_type),
            "`absolute`",
        );
    }
    if config.is_decoder {
        return value("is_decoder", "true".to_owned(), "false");
    }
    if !(0.0..1.0).contains(&config.layer_norm_eps) {
        return value("layer_norm_eps", config.layer_norm_eps.to_string(), "a number from 0 to 1");
    }
    Ok(())
}

fn range(file: &'static str, key: &'static str, value: usize, max: usize) -> Result<(), EncoderError> {
    if (1..=max).contains(&value) {
        return Ok(());
    }
    Err(EncoderError::Value { file, key, found: value.to_string(), expected: format!("1 to {max}") })
}

fn pooling_of(directory: &Path, modules: &[Module]) -> Result<(Pooling, bool), EncoderError> {
    let (mut pooling, mut normalize) = (None, false);
    for Module { path, kind } in modules {
        match kind.rsplit('.').next().unwrap_or_default() {
            "Transformer" => {}
            "Normalize" => normalize = true,
            "Pooling" => {
                // A path in a file from elsewhere must not lead out of the directory.
                let plain = Path::new(path).file_name() == Some(path.as_ref());
                let expected = "the name of a directory beside it".to_owned();
                if !plain {
                    let (file, found) = ("modules.json", format!("`{path}`"));
                    return Err(EncoderError::Value { file, key: "path", found, expected });
                }
                pooling = Some(pooling_in(&directory.join(path).join("config.json"))?);
            }
            _ => return Err(EncoderError::Module { kind: kind.clone() }),
        }
    }
    Ok((pooling.unwrap_or(Pooling::Cls), normalize))
}

fn pooling_in(path: &Path) -> Result<Pooling, EncoderError> {
    let config: PoolingConfig = required(path)?;
    let on: Vec<&str> = [
        ("cls", config.pooling_mode_cls_token),
        ("mean", config.pooling_mode_mean_tokens),
        ("max", config.pooling_mode_max_tokens),
        ("mean_sqrt_len", config.pooling_mode_mean_sqrt_len_tokens),
        ("weightedmean", config.pooling_mode_weightedmean_tokens),
        ("lasttoken", config.pooling_mode_lasttoken),
    ]
    .into_iter()
    .filter_map(|(name, on)| on.then_some(name))
    .collect();
    match on[..] {
        ["mean"] => Ok(Pooling::Mean),
        ["cls"] => Ok(Pooling::Cls),
        // Several are one after the other in the vector.
        _ => Err(EncoderError::Pooling { path: path.to_owned(), found: on.join(" and ") }),
    }
}

fn required<T: DeserializeOwned>(path: &Path) -> Result<T, EncoderError> {
    let text = small_file::read(path, JSON_BYTES_MAX).map_err(|error| match error {
        SmallFileError::Read { path, source } => EncoderError::Read { path, source },
        SmallFileError::TooLong { path, .. } => EncoderError::TooLong { path },
    })?;
    serde_json::from_slice(&text).map_err(|source| EncoderError::Json { path: path.to_owned(), source })
}

/// `None` where there is no such file.
fn optional<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, EncoderError> {
    match required(path) {
        Err(EncoderError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}
