//! A model file on disk or in memory, with its parsed directory.

use std::path::{Path, PathBuf};

use forebay_kernels::{MapError, MappedFile};

use crate::gguf::{Gguf, GgufError, TensorInfo};

/// Why a model file could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the model file cannot be read")]
    Map(#[from] MapError),
    #[error("{} is no model file that can be used", path.display())]
    Gguf { path: PathBuf, source: GgufError },
}

#[derive(Debug)]
enum Backing {
    Mapped(MappedFile),
    Owned(Vec<u8>),
}

/// A GGUF file and its directory. The bytes are mapped, not read: pages come in as tensors are packed.
#[derive(Debug)]
pub struct ModelFile {
    backing: Backing,
    gguf: Gguf,
}

impl ModelFile {
    /// Maps and parses a file. The file must not be changed while it is open (replace it by renaming).
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let mapped = MappedFile::open(path)?;
        let gguf =
            Gguf::parse(&mapped).map_err(|source| OpenError::Gguf { path: path.to_owned(), source })?;
        Ok(Self { backing: Backing::Mapped(mapped), gguf })
    }

    /// A file that is already in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, GgufError> {
        let gguf = Gguf::parse(&bytes)?;
        Ok(Self { backing: Backing::Owned(bytes), gguf })
    }

    pub fn gguf(&self) -> &Gguf {
        &self.gguf
    }

    /// The bytes of a tensor of this file's directory.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        let bytes: &[u8] = match &self.backing {
            Backing::Mapped(file) => file,
            Backing::Owned(bytes) => bytes,
        };
        &bytes[tensor.bytes.clone()]
    }
}
