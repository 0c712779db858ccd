//! The text of a configuration file and positions in it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::limited::read_limited;

/// Largest file that is read. A fleet of a thousand models is about 200 KiB.
pub const FILE_BYTES_MAX: usize = 1024 * 1024;

/// A configuration file: its text, and the name to show in diagnostics.
#[derive(Clone, PartialEq, Eq)]
pub struct Source {
    pub name: String,
    pub text: String,
}

/// Without the text, which may hold plain secrets.
impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Source({:?}, {} bytes)", self.name, self.text.len())
    }
}

/// Why a configuration file could not be read. It ends a start or a reload, and never reaches a client.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("`{}` does not exist", path.display())]
    NotFound { path: PathBuf },
    #[error("`{}` can't be read", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("`{}` is larger than {} KiB", path.display(), FILE_BYTES_MAX / 1024)]
    TooLarge { path: PathBuf },
    #[error("`{}` is not UTF-8 text (byte {offset})", path.display())]
    NotText { path: PathBuf, offset: usize },
}

impl Source {
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self { name: name.into(), text: text.into() }
    }

    /// Reads a file of at most [`FILE_BYTES_MAX`] bytes. Blocking.
    pub fn read(path: &Path) -> Result<Self, SourceError> {
        let bytes = read_limited(path, FILE_BYTES_MAX as u64).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => SourceError::NotFound { path: path.to_owned() },
            io::ErrorKind::FileTooLarge => SourceError::TooLarge { path: path.to_owned() },
            _ => SourceError::Unreadable { path: path.to_owned(), source },
        })?;
        let text = String::from_utf8(bytes).map_err(|error| SourceError::NotText {
            path: path.to_owned(),
            offset: error.utf8_error().valid_up_to(),
        })?;
        Ok(Self { name: path.display().to_string(), text })
    }

    /// The line with this number, from 1, without its line break. Empty past the end.
    ///
    /// A lone carriage return breaks a line, as it does in YAML.
    pub(crate) fn line(&self, number: u32) -> &str {
        let mut rest = self.text.strip_prefix('\u{feff}').unwrap_or(&self.text);
        let mut current = 1;
        loop {
            let end = rest.find(['\n', '\r']).unwrap_or(rest.len());
            if current == number {
                return &rest[..end];
            }
            let broken = &rest[end..];
            rest = match broken.strip_prefix("\r\n").or_else(|| broken.strip_prefix(['\n', '\r'])) {
                Some(next) => next,
                None => return "",
            };
            current += 1;
        }
    }
}

/// A place in the text: line and column from 1, the column in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub line: u32,
    pub column: u32,
}

/// A piece of the text, `end` exclusive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    pub start: Position,
    pub end: Position,
}

impl Span {
    pub(crate) const START: Self =
        Self { start: Position { line: 1, column: 1 }, end: Position { line: 1, column: 1 } };

    pub(crate) fn is_empty(self) -> bool {
        self.end <= self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_lines() {
        let source = Source::new("x", "\u{feff}one\ntwo\r\nthree\rfour\n");
        let check = |number, expect| assert_eq!(source.line(number), expect, "{number}");
        check(1, "one");
        check(2, "two");
        check(3, "three");
        check(4, "four");
        check(5, "");
        check(6, "");
    }

    #[test]
    fn refuses_what_is_no_config_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("forebay.yaml");
        assert!(matches!(Source::read(&path), Err(SourceError::NotFound { .. })));
        std::fs::write(&path, b"ok\xff").unwrap();
        assert!(matches!(Source::read(&path), Err(SourceError::NotText { offset: 2, .. })));
        std::fs::write(&path, vec![b' '; FILE_BYTES_MAX + 1]).unwrap();
        assert!(matches!(Source::read(&path), Err(SourceError::TooLarge { .. })));
        std::fs::write(&path, vec![b' '; FILE_BYTES_MAX]).unwrap();
        assert!(Source::read(&path).is_ok());
    }
}
