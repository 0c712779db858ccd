//! A model: its file or directory, what the metadata says ([`ModelSpec`]) and its packed weights ([`Weights`]).
//!
//! One decoder-only transformer with RMS norm, rotary positions, grouped-query attention and a gated MLP. What
//! differs between families of that shape is data in [`FAMILIES`], not code. Deliberately absent: tokenizer and
//! chat template (their metadata is read by whoever loads them), and every forward pass (that is [`crate::exec`]).

mod encoder;
mod file;
mod hf_config;
mod hf_names;
mod hf_spec;
#[cfg(test)]
mod hf_tests;
mod keys;
mod shard;
mod spec;
#[cfg(test)]
mod tests;
#[doc(hidden)]
pub mod tiny;
mod weights;

pub use encoder::{
    ENCODERS, EncoderError, EncoderLayer, EncoderSpec, EncoderWeights, Linear, Norm, Pooling, is_encoder,
};
pub use file::{ModelFile, OpenError, StoredTensor};
pub use hf_config::{CONFIG_FILE, HfConfig};
pub(crate) use shard::part;
pub use shard::{Ranks, RanksError, Shard};
pub use spec::{
    Activation, FAMILIES, Family, HEAD_DIM_MAX, LayerAttention, ModelSpec, Rope, RopeLayout, SpecError,
    Windowed,
};
pub use weights::{Embeddings, HeadNorms, Layer, PostNorms, Weights, WeightsError};
