//! A Unix socket to listen on: vLLM's `--uds`.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

/// Bytes that the system has room for (`sun_path`, less the zero at the end; macOS has the fewest).
pub(crate) const PATH_BYTES_MAX: usize = 103;

/// Why a Unix socket can't be listened on.
#[derive(Debug, thiserror::Error)]
pub enum UnixSocketError {
    #[error("{} is there already and is no socket; remove it, or set `edge.uds` to another path", path.display())]
    NotASocket { path: PathBuf },
    #[error("another program listens on the socket {}; stop it, or set `edge.uds` to another path", path.display())]
    InUse { path: PathBuf },
    #[error("can't listen on the socket {}; correct `edge.uds`", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// A bound socket. Dropped, its file is gone.
#[derive(Debug)]
pub(crate) struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and number of the file.
    file: Option<(u64, u64)>,
}

/// What is at a path where a socket is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A socket that nobody listens on any more: its server was killed.
    Stale,
}

/// Whether a socket could be listened on, as far as can be told without doing it. Changes nothing.
pub async fn check_unix_socket(path: &Path) -> Result<(), UnixSocketError> {
    look(path).await.map(|_| ())
}

async fn look(path: &Path) -> Result<Found, UnixSocketError> {
    let failed = |source| UnixSocketError::Io { path: path.to_owned(), source };
    let there = match std::fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(failed(error)),
    };
    if !there.file_type().is_socket() {
        return Err(UnixSocketError::NotASocket { path: path.to_owned() });
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(Found::Stale),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Found::Nothing),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(failed(error)),
        // Where its queue is full, somebody is only slow.
        Ok(_) | Err(_) => Err(UnixSocketError::InUse { path: path.to_owned() }),
    }
}

impl UnixSocket {
    /// Binds the path, in place of a socket that nobody listens on. What else is there is left alone.
    pub(crate) async fn bind(path: &Path) -> Result<Self, UnixSocketError> {
        let failed = |source| UnixSocketError::Io { path: path.to_owned(), source };
        if look(path).await? == Found::Stale {
            std::fs::remove_file(path).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        Ok(Self { listener, path: path.to_owned(), file: file_of(path) })
    }

    pub(crate) async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        // Somebody may have put another in its place.
        if self.file.is_some() && file_of(&self.path) == self.file {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn file_of(path: &Path) -> Option<(u64, u64)> {
    let there = std::fs::symlink_metadata(path).ok()?;
    Some((there.dev(), there.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_at_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = UnixSocket::bind(&path).await.unwrap();
        assert!(matches!(UnixSocket::bind(&path).await, Err(UnixSocketError::InUse { .. })));
        assert!(matches!(check_unix_socket(&path).await, Err(UnixSocketError::InUse { .. })));
        drop(first);
        assert!(!path.exists(), "the file goes with the socket");

        // Left behind by a server that was killed: std's listener does not remove its file.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        check_unix_socket(&path).await.unwrap();
        assert!(path.exists(), "a look changes nothing");
        let second = UnixSocket::bind(&path).await.unwrap();

        // Another file in its place is not its own.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "notes").unwrap();
        drop(second);
        assert!(matches!(UnixSocket::bind(&path).await, Err(UnixSocketError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"notes");

        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
        assert!(matches!(UnixSocket::bind(&link).await, Err(UnixSocketError::NotASocket { .. })));
        let nowhere = dir.path().join("no/such");
        assert!(matches!(UnixSocket::bind(&nowhere).await, Err(UnixSocketError::Io { .. })));
    }
}
