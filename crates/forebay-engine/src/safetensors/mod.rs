//! Reads safetensors files, one by one or as the shards of a Hugging Face directory.
//!
//! Source: the format's description in the README of huggingface/safetensors; `model.safetensors.index.json` as
//! transformers writes it. Files come from the network, so they are hostile input: every length and offset is checked
//! before it is used, and an error names the file and the tensor at fault.
//!
//! Deliberately absent: any knowledge of what a tensor is for (that is [`crate::model`]), and pickled weights
//! (`pytorch_model.bin`), which are programs.

mod directory;
mod dtype;
mod read;
#[cfg(test)]
mod tests;
pub mod write;

use std::collections::HashMap;
use std::ops::Range;

pub use directory::{Directory, DirectoryError, INDEX_FILE, TensorView, WEIGHTS_FILE};
pub use dtype::Dtype;
pub use read::{HEADER_BYTES_MAX, SafetensorsError};

/// One entry of a file's header. The bytes stay in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub dtype: Dtype,
    /// Outermost dimension first: a linear layer's weight is `[out, in]`. Empty for a scalar.
    pub shape: Vec<usize>,
    /// Where its bytes stand in the file; within the file and of exactly the size that `shape` asks for.
    pub bytes: Range<usize>,
}

/// The header of one file. Holds no reference to the file's bytes.
#[derive(Debug, Clone)]
pub struct Safetensors {
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl Safetensors {
    /// Reads the header of `file` (the whole file's bytes: the header is checked against its length).
    pub fn parse(file: &[u8]) -> Result<Self, SafetensorsError> {
        read::parse(file)
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&at| &self.tensors[at])
    }

    /// All tensors, in the order of their bytes.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }
}
