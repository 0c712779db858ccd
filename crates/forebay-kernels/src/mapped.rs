//! A file in memory, read-only: weights are read in place and shared between processes by the page cache.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

/// Why a file could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    #[error("cannot open `{path}`")]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot map `{path}` into memory")]
    Map { path: PathBuf, source: io::Error },
}

/// A whole file as bytes. Pages are read on first touch.
///
/// Whoever truncates the file while it is mapped makes reads of the lost part fail with SIGBUS, as with every
/// program that maps its weights: replace model files by renaming, never by writing into them.
#[derive(Debug)]
pub struct MappedFile {
    map: Mmap,
}

impl MappedFile {
    pub fn open(path: impl AsRef<Path>) -> Result<Self, MapError> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|source| MapError::Open { path: path.to_owned(), source })?;
        // SAFETY: read-only and private to the type; a change of the file by others is documented above and
        // can change what is read, but no Rust value is ever built from it without being checked.
        let map =
            unsafe { Mmap::map(&file) }.map_err(|source| MapError::Map { path: path.to_owned(), source })?;
        Ok(Self { map })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_bytes_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        std::fs::write(&path, b"forebay").unwrap();
        assert_eq!(&*MappedFile::open(&path).unwrap(), b"forebay");
        let missing = MappedFile::open(dir.path().join("nothing"));
        assert!(matches!(missing, Err(MapError::Open { .. })));
    }
}
