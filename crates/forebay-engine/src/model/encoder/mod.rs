//! Encoders: BERT in the layout of sentence-transformers, for embeddings.
//!
//! [`EncoderSpec`] is what the directory's JSON files say, [`EncoderWeights`] what its safetensors hold. Supported is the
//! architecture `BertModel` (BERT, MiniLM, BGE, E5, GTE's first ones): learned absolute positions, norms after each block,
//! the exact GELU. Pooling and normalisation are sentence-transformers' `modules.json` and `1_Pooling/config.json`.

mod spec;
mod weights;

pub use spec::{ENCODERS, EncoderError, EncoderSpec, Pooling, is_encoder};
pub use weights::{EncoderLayer, EncoderWeights, Linear, Norm};
