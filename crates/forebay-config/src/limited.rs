//! Small files, of which no more is read than they may have.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// The whole file, of `bytes_max` bytes at most; a longer one is [`io::ErrorKind::FileTooLarge`]. Blocking.
///
/// What the system says of a file's length is not asked: a pipe has none, and a file may grow meanwhile.
pub fn read_limited(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte more than allowed, so that a file of exactly the limit is told from a longer one.
    File::open(path)?.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("longer than {} KiB, the limit", bytes_max.div_ceil(1024)),
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_limit_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let kind = |path: &Path, max| read_limited(path, max).unwrap_err().kind();
        assert_eq!(kind(&path, 4), io::ErrorKind::NotFound);
        std::fs::write(&path, "1234").unwrap();
        assert_eq!(read_limited(&path, 4).unwrap(), b"1234");
        assert_eq!(read_limited(&path, u64::MAX).unwrap(), b"1234");
        assert_eq!(kind(&path, 3), io::ErrorKind::FileTooLarge);
        // A directory is no file.
        assert!(read_limited(dir.path(), 4).is_err());
    }
}
