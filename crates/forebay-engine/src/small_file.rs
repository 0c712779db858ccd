//! Reads the small files beside a model's weights. They come from the network: none is read without a limit.

use std::io;
use std::path::{Path, PathBuf};

/// Why a file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SmallFileError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is longer than {limit} bytes, the limit", path.display())]
    TooLong { path: PathBuf, limit: u64 },
}

/// The whole file, of `limit` bytes at most.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, SmallFileError> {
    forebay_config::read_limited(path, limit).map_err(|source| match source.kind() {
        io::ErrorKind::FileTooLarge => SmallFileError::TooLong { path: path.to_owned(), limit },
        _ => SmallFileError::Read { path: path.to_owned(), source },
    })
}

/// The same; `None` where there is no such file.
pub(crate) fn read_if_there(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, SmallFileError> {
    match read(path, limit) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(SmallFileError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_limit_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        assert!(read_if_there(&path, 4).unwrap().is_none());
        assert!(matches!(read(&path, 4), Err(SmallFileError::Read { .. })));
        std::fs::write(&path, "1234").unwrap();
        assert_eq!(read_if_there(&path, 4).unwrap().unwrap(), b"1234");
        assert!(matches!(read(&path, 3), Err(SmallFileError::TooLong { limit: 3, .. })));
        // A directory is no file.
        assert!(matches!(read_if_there(dir.path(), 4), Err(SmallFileError::Read { .. })));
    }
}
