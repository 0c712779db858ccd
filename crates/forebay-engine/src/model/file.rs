//! A model on disk or in memory, with its parsed directory of tensors: a GGUF file, or a directory of safetensors as
//! Hugging Face's libraries write it.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use forebay_kernels::{MapError, MappedFile};

use super::{CONFIG_FILE, Family, HfConfig, ModelSpec, SpecError, hf_names, hf_spec};
use crate::gguf::{ElementType, Gguf, GgufError};
use crate::safetensors::{Directory, DirectoryError, Dtype};
use crate::small_file::{self, SmallFileError};

/// Real ones have a few kilobytes.
const CONFIG_BYTES_MAX: u64 = 16 << 20;

/// Why a model file could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the model file cannot be read")]
    Map(#[from] MapError),
    #[error("{} is no model file that can be used", path.display())]
    Gguf { path: PathBuf, source: GgufError },
    #[error("{} is no model directory: it has no `{CONFIG_FILE}`", path.display())]
    NoConfig { path: PathBuf },
    #[error("the model's directory cannot be read")]
    Read(#[from] SmallFileError),
    #[error("{} is not valid JSON", path.display())]
    Config { path: PathBuf, source: serde_json::Error },
    #[error("the model in {} can't be run", path.display())]
    Spec { path: PathBuf, source: SpecError },
    #[error("the model's weights cannot be read")]
    Weights(#[from] DirectoryError),
    #[error("the model's weights cannot be used")]
    Tensors(#[from] TensorsError),
}

/// Why the tensors of a directory are not those of a model of ours.
#[derive(Debug, thiserror::Error)]
pub enum TensorsError {
    #[error("tensor `{name}` is stored as {dtype}, which is not supported; F32, F16 and BF16 are")]
    Dtype { name: String, dtype: Dtype },
    #[error("tensor `{name}` is a single number, which no model has")]
    Scalar { name: String },
}

/// One tensor of a model. The bytes stay in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// What we know it by: ggml's name.
    pub name: String,
    pub element: ElementType,
    /// Innermost dimension first: a `[out, in]` matrix has `shape == [in, out]`.
    pub shape: Vec<usize>,
    /// Which of the model's files has it, and where.
    file: usize,
    bytes: Range<usize>,
}

#[derive(Debug)]
enum Kind {
    Gguf { backing: Backing, gguf: Gguf },
    Hf { path: PathBuf, weights: Directory, spec: ModelSpec },
}

#[derive(Debug)]
enum Backing {
    Mapped(MappedFile),
    Owned(Vec<u8>),
}

/// A model and its directory of tensors. The bytes are mapped, not read: pages come in as tensors are packed.
#[derive(Debug)]
pub struct ModelFile {
    kind: Kind,
    tensors: Vec<StoredTensor>,
    by_name: HashMap<String, usize>,
}

impl ModelFile {
    /// Maps and parses a GGUF file, or the files of a directory. They must not be changed while they are open (replace
    /// them by renaming).
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        if path.is_dir() {
            return Self::open_directory(path);
        }
        let mapped = MappedFile::open(path)?;
        let gguf =
            Gguf::parse(&mapped).map_err(|source| OpenError::Gguf { path: path.to_owned(), source })?;
        Ok(Self::from_gguf(Backing::Mapped(mapped), gguf))
    }

    /// A GGUF file that is already in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, GgufError> {
        let gguf = Gguf::parse(&bytes)?;
        Ok(Self::from_gguf(Backing::Owned(bytes), gguf))
    }

    fn from_gguf(backing: Backing, gguf: Gguf) -> Self {
        let tensor = |tensor: &crate::gguf::TensorInfo| StoredTensor {
            name: tensor.name.clone(),
            element: tensor.element,
            shape: tensor.shape.clone(),
            file: 0,
            bytes: tensor.bytes.clone(),
        };
        let tensors = gguf.tensors().iter().map(tensor).collect();
        Self::with(Kind::Gguf { backing, gguf }, tensors)
    }

    fn open_directory(path: &Path) -> Result<Self, OpenError> {
        let file = path.join(CONFIG_FILE);
        let Some(config) = small_file::read_if_there(&file, CONFIG_BYTES_MAX)? else {
            return Err(OpenError::NoConfig { path: path.to_owned() });
        };
        let config = HfConfig::parse(&config).map_err(|source| OpenError::Config { path: file, source })?;
        let spec =
            hf_spec::read(&config).map_err(|source| OpenError::Spec { path: path.to_owned(), source })?;
        Ok(Self::from_hf(path, Directory::open(path)?, spec)?)
    }

    /// The tensors of a directory under our names. `path` is where the directory's other files are.
    pub fn from_hf(path: &Path, weights: Directory, spec: ModelSpec) -> Result<Self, TensorsError> {
        let mut tensors = Vec::new();
        for (file, tensor) in weights.tensors() {
            // A tied model's head is its embedding matrix; some files have a copy.
            if hf_names::is_leftover(&tensor.name) || spec.tied_embeddings && tensor.name == "lm_head.weight"
            {
                continue;
            }
            let element = match tensor.dtype {
                Dtype::F32 => ElementType::F32,
                Dtype::F16 => ElementType::F16,
                Dtype::BF16 => ElementType::BF16,
                dtype => return Err(TensorsError::Dtype { name: tensor.name.clone(), dtype }),
            };
            if tensor.shape.is_empty() {
                return Err(TensorsError::Scalar { name: tensor.name.clone() });
            }
            tensors.push(StoredTensor {
                // A name that we don't know stays as it is; the loader reports that it has no place.
                name: hf_names::ours(&tensor.name, &spec.family).unwrap_or_else(|| tensor.name.clone()),
                element,
                shape: tensor.shape.iter().rev().copied().collect(),
                file,
                bytes: tensor.bytes.clone(),
            });
        }
        Ok(Self::with(Kind::Hf { path: path.to_owned(), weights, spec }, tensors))
    }

    fn with(kind: Kind, tensors: Vec<StoredTensor>) -> Self {
        let by_name = tensors.iter().enumerate().map(|(nth, tensor)| (tensor.name.clone(), nth)).collect();
        Self { kind, tensors, by_name }
    }

    /// Metadata and directory of a GGUF file; `None` for a directory.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.kind {
            Kind::Gguf { gguf, .. } => Some(gguf),
            Kind::Hf { .. } => None,
        }
    }

    /// Where the other files of a Hugging Face directory are; `None` for a GGUF file.
    pub fn directory(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Gguf { .. } => None,
            Kind::Hf { path, .. } => Some(path),
        }
    }

    /// The shape of the model.
    pub fn spec(&self) -> Result<ModelSpec, SpecError> {
        match &self.kind {
            Kind::Gguf { gguf, .. } => ModelSpec::from_gguf(gguf),
            Kind::Hf { spec, .. } => Ok(spec.clone()),
        }
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> &[StoredTensor] {
        &self.tensors
    }

    pub fn tensor(&self, name: &str) -> Option<&StoredTensor> {
        self.by_name.get(name).map(|&at| &self.tensors[at])
    }

    /// The bytes of a tensor of this model.
    pub fn data(&self, tensor: &StoredTensor) -> &[u8] {
        let file: &[u8] = match &self.kind {
            Kind::Gguf { backing: Backing::Mapped(file), .. } => file,
            Kind::Gguf { backing: Backing::Owned(bytes), .. } => bytes,
            Kind::Hf { weights, .. } => weights.shard(tensor.file),
        };
        &file[tensor.bytes.clone()]
    }

    /// A tensor's name as the file spells it, for messages.
    pub(super) fn spelt(&self, name: &str) -> String {
        match &self.kind {
            Kind::Gguf { .. } => name.to_owned(),
            Kind::Hf { spec, .. } => hf_names::theirs(name, &spec.family).unwrap_or_else(|| name.to_owned()),
        }
    }

    /// What norms multiply by is this plus the stored weight. llama.cpp's converter has added it in its files.
    pub(super) fn norm_offset(&self) -> f32 {
        match &self.kind {
            Kind::Hf { spec: ModelSpec { family: Family { post_norms: true, .. }, .. }, .. } => 1.0,
            _ => 0.0,
        }
    }

    /// Bytes of all files of weights.
    pub fn bytes(&self) -> u64 {
        match &self.kind {
            Kind::Gguf { backing: Backing::Mapped(file), .. } => file.len() as u64,
            Kind::Gguf { backing: Backing::Owned(bytes), .. } => bytes.len() as u64,
            Kind::Hf { weights, .. } => weights.bytes(),
        }
    }
}
