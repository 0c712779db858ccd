//! A secret: written as a reference, resolved once at start, never shown.

use std::env::VarError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use zeroize::Zeroizing;

use crate::environment::Environment;

use super::written_as_text;

/// Where a secret is found: `env:NAME` or `file:PATH`.
///
/// Plain text is read too, so that a first try works, but [`is_plain`](Self::is_plain) tells and
/// `forebay check` warns. Nothing about a plain secret is ever shown, not by `Debug`, `Display` or `Serialize`.
/// `${NAME}` is refused: there is no interpolation.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Reference);

#[derive(Clone, PartialEq, Eq)]
enum Reference {
    Env(String),
    File(PathBuf),
    Plain(Zeroizing<String>),
}

/// Why a text is not a reference to a secret. Never holds the text itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseSecretError {
    #[error("a secret can't be empty; write `env:NAME` or `file:PATH`")]
    Empty,
    #[error("`env:` needs the name of an environment variable: letters, digits and `_`, like `env:API_KEY`")]
    BadEnvName,
    #[error("`file:` needs a path, like `file:/run/secrets/api-key`")]
    NoPath,
    #[error("variables are not filled in here; write `env:{name}`")]
    Interpolation { name: String },
}

/// Why a secret could not be resolved.
///
/// Not `Classify` on purpose: this ends a start or a reload, it never reaches a client, to whom
/// the path in the message would be none of their business.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("environment variable `{name}` is not set; set it, or name another one with `env:NAME`")]
    VarNotSet { name: String },
    #[error("environment variable `{name}` is empty; give it a value")]
    VarEmpty { name: String },
    #[error("environment variable `{name}` is not UTF-8 text")]
    VarNotText { name: String },
    #[error("secret file `{}` does not exist; create it, or correct the path", path.display())]
    FileNotFound { path: PathBuf },
    #[error("secret file `{}` can't be read; check its owner and mode", path.display())]
    FileUnreadable { path: PathBuf, source: io::Error },
    #[error("secret file `{}` is empty", path.display())]
    FileEmpty { path: PathBuf },
    #[error("secret file `{}` is not UTF-8 text", path.display())]
    FileNotText { path: PathBuf },
}

/// A resolved secret. Overwritten in memory when dropped; shown by [`expose`](Self::expose) only.
#[derive(Clone)]
pub struct SecretValue(Zeroizing<String>);

impl SecretValue {
    pub fn new(value: impl Into<String>) -> Self {
        Self(Zeroizing::new(value.into()))
    }

    /// The secret itself. Compare it in constant time, and keep it out of logs, errors and metrics.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

impl Secret {
    pub fn env(name: impl Into<String>) -> Self {
        Self(Reference::Env(name.into()))
    }

    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self(Reference::File(path.into()))
    }

    pub fn plain(value: impl Into<String>) -> Self {
        Self(Reference::Plain(Zeroizing::new(value.into())))
    }

    /// Written in plain text in the file, which deserves a warning.
    pub fn is_plain(&self) -> bool {
        matches!(self.0, Reference::Plain(_))
    }

    /// The path of a `file:` secret, for those who watch it for changes.
    pub fn file_path(&self) -> Option<&Path> {
        match &self.0 {
            Reference::File(path) => Some(path),
            Reference::Env(_) | Reference::Plain(_) => None,
        }
    }

    /// Fetches the value. Line breaks at the end of a file are not part of it; nothing else is trimmed.
    ///
    /// Blocking: reads a file of at most 256 KiB. Call it at start, and again on reload.
    pub fn resolve(&self, env: &dyn Environment) -> Result<SecretValue, SecretError> {
        match &self.0 {
            Reference::Plain(value) => Ok(SecretValue(value.clone())),
            Reference::Env(name) => match env.var(name) {
                Ok(value) if value.is_empty() => Err(SecretError::VarEmpty { name: name.clone() }),
                Ok(value) => Ok(SecretValue::new(value)),
                Err(VarError::NotPresent) => Err(SecretError::VarNotSet { name: name.clone() }),
                Err(VarError::NotUnicode(_)) => Err(SecretError::VarNotText { name: name.clone() }),
            },
            Reference::File(path) => resolve_file(path, env),
        }
    }
}

fn resolve_file(path: &Path, env: &dyn Environment) -> Result<SecretValue, SecretError> {
    let path_owned = || path.to_owned();
    let bytes = match env.read_file(path) {
        Ok(bytes) => Zeroizing::new(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(SecretError::FileNotFound { path: path_owned() });
        }
        Err(source) => return Err(SecretError::FileUnreadable { path: path_owned(), source }),
    };
    let text = std::str::from_utf8(&bytes).map_err(|_| SecretError::FileNotText { path: path_owned() })?;
    let text = text.trim_end_matches(['\r', '\n']);
    if text.is_empty() {
        return Err(SecretError::FileEmpty { path: path_owned() });
    }
    Ok(SecretValue::new(text))
}

impl FromStr for Secret {
    type Err = ParseSecretError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err(ParseSecretError::Empty);
        }
        if let Some(name) = text.strip_prefix("env:") {
            if !is_variable_name(name) {
                return Err(ParseSecretError::BadEnvName);
            }
            return Ok(Self::env(name));
        }
        if let Some(path) = text.strip_prefix("file:") {
            if path.is_empty() {
                return Err(ParseSecretError::NoPath);
            }
            return Ok(Self::file(path));
        }
        // Only a whole `${NAME}`: a password may well start with a dollar sign.
        if let Some(name) = text.strip_prefix("${").and_then(|text| text.strip_suffix('}'))
            && is_variable_name(name)
        {
            return Err(ParseSecretError::Interpolation { name: name.to_owned() });
        }
        Ok(Self::plain(text))
    }
}

fn is_variable_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Reference::Env(name) => write!(f, "env:{name}"),
            Reference::File(path) => write!(f, "file:{}", path.display()),
            Reference::Plain(_) => f.write_str("<secret>"),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

written_as_text!(Secret, "Secret", "secret", "a secret: `env:NAME` or `file:PATH`", "env:API_KEY");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::{FixedEnvironment, RealEnvironment, SECRET_FILE_BYTES_MAX};

    fn env() -> FixedEnvironment {
        FixedEnvironment::new()
            .with_var("KEY", "k1")
            .with_var("NOTHING", "")
            .with_file("/run/key", "k2\r\n\n")
            .with_file("/run/spaces", " k3 \n")
            .with_file("/run/empty", "\n")
            .with_file("/run/binary", [0xff, 0xfe])
    }

    fn check(text: &str, expect: Result<&str, &str>) {
        let got = match text.parse::<Secret>() {
            Err(error) => Err(error.to_string()),
            Ok(secret) => secret.resolve(&env()).map(|v| v.expose().to_owned()).map_err(|e| e.to_string()),
        };
        assert_eq!(got, expect.map(str::to_owned).map_err(str::to_owned), "{text:?}");
    }

    #[test]
    fn resolves() {
        check("env:KEY", Ok("k1"));
        check("file:/run/key", Ok("k2"));
        check("file:/run/spaces", Ok(" k3 "));
        check("sk-plain", Ok("sk-plain"));
        check("$ecret", Ok("$ecret"));
    }

    #[test]
    fn says_what_to_do() {
        check(
            "env:GONE",
            Err("environment variable `GONE` is not set; set it, or name another one with `env:NAME`"),
        );
        check("env:NOTHING", Err("environment variable `NOTHING` is empty; give it a value"));
        check("file:/gone", Err("secret file `/gone` does not exist; create it, or correct the path"));
        check("file:/run/empty", Err("secret file `/run/empty` is empty"));
        check("file:/run/binary", Err("secret file `/run/binary` is not UTF-8 text"));
        check("", Err("a secret can't be empty; write `env:NAME` or `file:PATH`"));
        check("file:", Err("`file:` needs a path, like `file:/run/secrets/api-key`"));
        check("${KEY}", Err("variables are not filled in here; write `env:KEY`"));
        let bad_name =
            "`env:` needs the name of an environment variable: letters, digits and `_`, like `env:API_KEY`";
        check("env:", Err(bad_name));
        check("env:$KEY", Err(bad_name));
    }

    #[test]
    fn is_never_shown() {
        let secret: Secret = "sk-live-123".parse().unwrap();
        assert!(secret.is_plain());
        let value = secret.resolve(&env()).unwrap();
        let shown = format!("{secret} {secret:?} {value:?} {}", serde_json::to_string(&secret).unwrap());
        assert_eq!(shown, "<secret> <secret> <secret> \"<secret>\"");
        // A reference is no secret.
        let reference: Secret = "env:KEY".parse().unwrap();
        assert_eq!(format!("{reference} {reference:?}"), "env:KEY env:KEY");
        assert!(!reference.is_plain());
    }

    #[test]
    fn reads_real_files_up_to_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "from-disk\n").unwrap();
        assert_eq!(Secret::file(&path).resolve(&RealEnvironment).unwrap().expose(), "from-disk");

        std::fs::write(&path, "x".repeat(SECRET_FILE_BYTES_MAX as usize)).unwrap();
        assert!(Secret::file(&path).resolve(&RealEnvironment).is_ok());
        std::fs::write(&path, "x".repeat(SECRET_FILE_BYTES_MAX as usize + 1)).unwrap();
        let error = Secret::file(&path).resolve(&RealEnvironment).unwrap_err();
        assert!(matches!(error, SecretError::FileUnreadable { .. }), "{error}");
        assert!(matches!(
            Secret::file(dir.path()).resolve(&RealEnvironment),
            Err(SecretError::FileUnreadable { .. })
        ));
    }
}
