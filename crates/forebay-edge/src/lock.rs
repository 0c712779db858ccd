//! The lock of a worker: one of a few shared keys opens what is below `/v1`, `/v2` and `/inference`, as vLLM's `--api-key`.
//!
//! Who is calling is not asked here: that is the gateway's.

use forebay_config::{Environment, Secret, SecretError};
use http::header::{self, HeaderMap};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// What vLLM guards. `/cohere` is not among our paths.
const GUARDED: [&str; 3] = ["/v1", "/v2", "/inference"];

/// The body of a 401, in vLLM's shape.
pub(crate) const UNAUTHORIZED: &str = r#"{"error":"Unauthorized"}"#;

/// Hashes of the keys, so that all comparisons are of the same length; none where everything is open.
#[derive(Default)]
pub(crate) struct Lock(Vec<[u8; 32]>);

impl Lock {
    /// Blocking: reads secret files.
    pub(crate) fn new(keys: &[Secret], env: &dyn Environment) -> Result<Self, (usize, SecretError)> {
        let hash = |(i, key): (usize, &Secret)| {
            let key = key.resolve(env).map_err(|error| (i, error))?;
            Ok(Sha256::digest(key.expose().as_bytes()).into())
        };
        keys.iter().enumerate().map(hash).collect::<Result<_, _>>().map(Self)
    }

    pub(crate) fn guards(&self, path: &str) -> bool {
        let below = |prefix: &&str| {
            path.strip_prefix(*prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        !self.0.is_empty() && GUARDED.iter().any(below)
    }

    /// Whether the request shows a key. Takes the same time whichever of the keys it is, or none.
    pub(crate) fn opens(&self, headers: &HeaderMap) -> bool {
        let mut given = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(value), None) = (given.next(), given.next()) else { return self.0.is_empty() };
        let key = value
            .as_bytes()
            .split_at_checked(7)
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
        let hash: [u8; 32] = Sha256::digest(key.map_or(&b""[..], |(_, key)| key.trim_ascii())).into();
        let found = self.0.iter().fold(Choice::from(0), |found, own| found | own.ct_eq(&hash));
        self.0.is_empty() || (key.is_some() && bool::from(found))
    }
}

#[cfg(test)]
mod tests {
    use forebay_config::FixedEnvironment;

    use super::*;

    #[test]
    fn one_of_the_keys_opens() {
        let lock = |keys: &[&str]| {
            let keys: Vec<Secret> = keys.iter().map(|&key| Secret::plain(key)).collect();
            Lock::new(&keys, &FixedEnvironment::new()).expect("plain keys")
        };
        let check = |keys: &[&str], values: &[&'static str], expect: bool| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, value.parse().unwrap());
            }
            assert_eq!(lock(keys).opens(&headers), expect, "{keys:?} {values:?}");
        };
        check(&["a", "b"], &["Bearer a"], true);
        check(&["a", "b"], &["bearer b"], true);
        check(&["a"], &["Bearer ab"], false);
        check(&["a"], &["Bearer "], false);
        check(&["a"], &["Basic a"], false);
        check(&["a"], &[], false);
        check(&["a"], &["Bearer a", "Bearer a"], false);
        check(&[], &[], true);
    }

    #[test]
    fn only_what_vllm_guards_is_guarded() {
        let lock = Lock::new(&[Secret::plain("a")], &FixedEnvironment::new()).expect("a plain key");
        for (path, expect) in [
            ("/v1", true),
            ("/v1/models", true),
            ("/v2/embed", true),
            ("/inference/v1/generate", true),
            ("/v1x", false),
            ("/health", false),
            ("/tokenize", false),
            ("/metrics", false),
        ] {
            assert_eq!(lock.guards(path), expect, "{path}");
            assert!(!Lock::default().guards(path));
        }
    }
}
