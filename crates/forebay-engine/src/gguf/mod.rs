//! Reads GGUF files (versions 2 and 3, little endian): metadata, tensor directory, tensor bytes.
//!
//! Source: the format description in ggml's `docs/gguf.md`. A model file comes from the network, so it is hostile
//! input: every count, length and offset is checked against what is left of the file before anything is allocated,
//! and an error names the key or tensor at fault.
//!
//! Deliberately absent: big-endian files, version 1, files split in parts, and any knowledge of what a key means
//! (that is [`crate::model`]). The writer in [`mod@write`] exists for tests and tools.

mod element;
mod read;
#[cfg(test)]
mod tests;
pub mod write;

use std::collections::HashMap;
use std::ops::Range;

pub use element::ElementType;
pub use read::{GgufError, LIMITS, Limits};

/// One metadata value. Widths are not kept: a `u8` and a `u64` are both [`Value::Uint`].
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Uint(u64),
    Int(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    List(List),
}

/// An array value, one vector per element kind.
#[derive(Debug, Clone, PartialEq)]
pub enum List {
    Uints(Vec<u64>),
    Ints(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
    Lists(Vec<List>),
}

impl Value {
    /// The value as a count or id; negative numbers and other kinds give `None`.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Uint(v) => Some(*v),
            Self::Int(v) => u64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// The value as a number; integers are converted.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(v) => Some(*v),
            Self::Uint(v) => Some(*v as f64),
            Self::Int(v) => Some(*v as f64),
            _ => None,
        }
    }

    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(v) => Some(*v),
            _ => None,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(v) => Some(v),
            _ => None,
        }
    }

    pub fn as_texts(&self) -> Option<&[String]> {
        match self {
            Self::List(List::Texts(v)) => Some(v),
            _ => None,
        }
    }

    /// What kind of value it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Uint(_) => "an unsigned integer",
            Self::Int(_) => "an integer",
            Self::Float(_) => "a number",
            Self::Bool(_) => "a boolean",
            Self::Text(_) => "a string",
            Self::List(_) => "an array",
        }
    }
}

/// One entry of the tensor directory. The bytes stay in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub element: ElementType,
    /// Innermost dimension first, as GGUF writes it: a `[out, in]` matrix has `shape == [in, out]`.
    pub shape: Vec<usize>,
    /// Where its bytes stand in the file; within the file and of exactly the size that `shape` asks for.
    pub bytes: Range<usize>,
}

impl TensorInfo {
    /// Length of one row (the innermost dimension).
    pub fn cols(&self) -> usize {
        self.shape[0]
    }

    /// Number of rows: the product of all other dimensions.
    pub fn rows(&self) -> usize {
        self.shape[1..].iter().product()
    }
}

/// Metadata and tensor directory of one file. Holds no reference to the file's bytes.
#[derive(Debug, Clone)]
pub struct Gguf {
    pub version: u32,
    pub alignment: usize,
    metadata: HashMap<String, Value>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Reads the header of `file` (the whole file's bytes: the directory is checked against its length).
    pub fn parse(file: &[u8]) -> Result<Self, GgufError> {
        read::parse(file, &LIMITS)
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// All metadata, in no particular order.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&at| &self.tensors[at])
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }
}
