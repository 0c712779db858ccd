//! Where secrets come from: environment variables and files, behind a trait so that tests need neither.

use std::collections::BTreeMap;
use std::env::VarError;
use std::io;
use std::path::{Path, PathBuf};

use crate::limited::read_limited;

/// Largest file a secret may be read from. A PEM chain is a few KiB; anything near this is a wrong path.
pub const SECRET_FILE_BYTES_MAX: u64 = 256 * 1024;

/// What the loader may see of the machine. The only place in the project that reads environment variables.
pub trait Environment {
    /// The variable's value. Errors as [`std::env::var`] does: not set, or not UTF-8.
    fn var(&self, name: &str) -> Result<String, VarError>;

    /// The whole file, at most [`SECRET_FILE_BYTES_MAX`] bytes; longer is [`io::ErrorKind::FileTooLarge`].
    fn read_file(&self, path: &Path) -> io::Result<Vec<u8>>;
}

/// The process's own environment; relative paths are relative to the working directory.
#[derive(Debug, Clone, Copy, Default)]
pub struct RealEnvironment;

impl Environment for RealEnvironment {
    fn var(&self, name: &str) -> Result<String, VarError> {
        std::env::var(name)
    }

    fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        read_limited(path, SECRET_FILE_BYTES_MAX)
    }
}

/// An environment made of two maps, for tests.
#[derive(Debug, Clone, Default)]
pub struct FixedEnvironment {
    vars: BTreeMap<String, String>,
    files: BTreeMap<PathBuf, Vec<u8>>,
}

impl FixedEnvironment {
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn with_var(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.vars.insert(name.into(), value.into());
        self
    }

    #[must_use]
    pub fn with_file(mut self, path: impl Into<PathBuf>, bytes: impl Into<Vec<u8>>) -> Self {
        self.files.insert(path.into(), bytes.into());
        self
    }
}

impl Environment for FixedEnvironment {
    fn var(&self, name: &str) -> Result<String, VarError> {
        self.vars.get(name).cloned().ok_or(VarError::NotPresent)
    }

    fn read_file(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.files.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}
