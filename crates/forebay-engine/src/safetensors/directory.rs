//! The weights of a Hugging Face directory: one file, or shards with an index.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use forebay_kernels::{MapError, MappedFile};
use serde::Deserialize;

use super::{Dtype, Safetensors, SafetensorsError, TensorInfo};
use crate::small_file::{self, SmallFileError};

/// The weights of a directory that has them in one file.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Which tensor is in which shard, in a directory that has several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Real indices have some 100 bytes a tensor.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// The largest open models have fewer than 200.
const SHARDS_MAX: usize = 1024;

/// Why the weights of a directory cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    #[error("{} has no `{WEIGHTS_FILE}` and no `{INDEX_FILE}`", path.display())]
    NoWeights { path: PathBuf },
    #[error("cannot map the model's weights")]
    Map(#[from] MapError),
    #[error("{} is no safetensors file that can be used", path.display())]
    File { path: PathBuf, source: SafetensorsError },
    #[error("the index of shards cannot be read")]
    Read(#[from] SmallFileError),
    #[error("{} is not an index of shards", path.display())]
    Index { path: PathBuf, source: serde_json::Error },
    #[error("{} names {shards} shards, the limit is {SHARDS_MAX}", path.display())]
    Shards { path: PathBuf, shards: usize },
    /// A path in the index could lead out of the directory.
    #[error("{} has tensor `{tensor}` in `{file}`, which is not the name of a file beside it", path.display())]
    ShardName { path: PathBuf, tensor: String, file: String },
    #[error("tensor `{tensor}` is not in `{file}`, where `{INDEX_FILE}` has it")]
    Missing { tensor: String, file: String },
    #[error("tensor `{tensor}` stands in `{first}` and in `{second}`")]
    Twice { tensor: String, first: String, second: String },
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

/// A tensor with its bytes.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    pub dtype: Dtype,
    /// Outermost dimension first.
    pub shape: &'a [usize],
    pub data: &'a [u8],
}

/// All tensors of a directory. The files are mapped, not read: pages come in as tensors are used.
#[derive(Debug)]
pub struct Directory {
    shards: Vec<Shard>,
    /// Shard and place in it.
    by_name: HashMap<String, (usize, usize)>,
}

#[derive(Debug)]
struct Shard {
    name: String,
    backing: Backing,
    header: Safetensors,
}

#[derive(Debug)]
enum Backing {
    Mapped(MappedFile),
    Owned(Vec<u8>),
}

impl Shard {
    fn bytes(&self) -> &[u8] {
        match &self.backing {
            Backing::Mapped(file) => file,
            Backing::Owned(bytes) => bytes,
        }
    }
}

impl Directory {
    /// Maps and checks the files. `model.safetensors` goes before an index, as in transformers. The files must not be
    /// changed while they are open (replace them by renaming).
    pub fn open(path: &Path) -> Result<Self, DirectoryError> {
        let shard = |name: &str| {
            let file = path.join(name);
            let mapped = MappedFile::open(&file)?;
            let header =
                Safetensors::parse(&mapped).map_err(|source| DirectoryError::File { path: file, source })?;
            Ok(Shard { name: name.to_owned(), backing: Backing::Mapped(mapped), header })
        };
        if path.join(WEIGHTS_FILE).exists() {
            return Self::of(vec![shard(WEIGHTS_FILE)?]);
        }
        let index = path.join(INDEX_FILE);
        if !index.exists() {
            return Err(DirectoryError::NoWeights { path: path.to_owned() });
        }
        let weight_map = read_index(&index)?;
        let mut names: Vec<&String> = weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        if names.len() > SHARDS_MAX {
            return Err(DirectoryError::Shards { path: index, shards: names.len() });
        }
        let shards: Result<Vec<Shard>, DirectoryError> = names.into_iter().map(|name| shard(name)).collect();
        let all = Self::of(shards?)?;
        for (tensor, file) in &weight_map {
            if all.by_name.get(tensor).is_none_or(|at| all.shards[at.0].name != *file) {
                return Err(DirectoryError::Missing { tensor: tensor.clone(), file: file.clone() });
            }
        }
        Ok(all)
    }

    /// A single file that is already in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, SafetensorsError> {
        let header = Safetensors::parse(&bytes)?;
        let shard = Shard { name: WEIGHTS_FILE.to_owned(), backing: Backing::Owned(bytes), header };
        let by_name = shard.header.by_name.iter().map(|(name, &nth)| (name.clone(), (0, nth))).collect();
        Ok(Self { shards: vec![shard], by_name })
    }

    fn of(shards: Vec<Shard>) -> Result<Self, DirectoryError> {
        let mut by_name: HashMap<String, (usize, usize)> = HashMap::new();
        for (number, shard) in shards.iter().enumerate() {
            for (nth, tensor) in shard.header.tensors().iter().enumerate() {
                if let Some((first, _)) = by_name.insert(tensor.name.clone(), (number, nth)) {
                    return Err(DirectoryError::Twice {
                        tensor: tensor.name.clone(),
                        first: shards[first].name.clone(),
                        second: shard.name.clone(),
                    });
                }
            }
        }
        Ok(Self { shards, by_name })
    }

    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let &(shard, nth) = self.by_name.get(name)?;
        let shard = &self.shards[shard];
        let TensorInfo { dtype, shape, bytes, .. } = &shard.header.tensors()[nth];
        Some(TensorView { dtype: *dtype, shape, data: &shard.bytes()[bytes.clone()] })
    }

    /// All tensors with the number of their shard, for [`Directory::shard`].
    pub fn tensors(&self) -> impl Iterator<Item = (usize, &TensorInfo)> {
        let shards = self.shards.iter().enumerate();
        shards.flat_map(|(number, shard)| shard.header.tensors().iter().map(move |tensor| (number, tensor)))
    }

    /// The bytes of a shard's file.
    pub fn shard(&self, number: usize) -> &[u8] {
        self.shards[number].bytes()
    }

    /// Names of all tensors, shard by shard in the order of their bytes.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors().map(|(_, tensor)| tensor.name.as_str())
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes().len() as u64).sum()
    }
}

fn read_index(path: &Path) -> Result<HashMap<String, String>, DirectoryError> {
    let text = small_file::read(path, INDEX_BYTES_MAX)?;
    let Index { weight_map } = serde_json::from_slice(&text)
        .map_err(|source| DirectoryError::Index { path: path.to_owned(), source })?;
    for (tensor, file) in &weight_map {
        // One plain component, neither `..` nor absolute.
        if Path::new(file).file_name() != Some(file.as_ref()) {
            let (tensor, file) = (tensor.clone(), file.clone());
            return Err(DirectoryError::ShardName { path: path.to_owned(), tensor, file });
        }
    }
    Ok(weight_map)
}
