//! From a key to its consumer, without keeping any key.
//!
//! A key is kept as HMAC-SHA256 under a pepper that is random per process. So memory holds nothing that could be used,
//! and how long a look-up takes says nothing about how much of a key is right: an attacker can't steer the digest.

use std::collections::HashMap;

use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderMap, HeaderValue, header};
use sha2::Sha256;
use subtle::ConstantTimeEq;

use crate::error::IdentifyError;

type Digest = [u8; 32];

/// Keys of all consumers. `C` is what a key stands for.
pub(crate) struct KeyRing<C> {
    /// With the pepper in it; cloned for each key, which saves two of the four compressions.
    mac: Hmac<Sha256>,
    consumers: HashMap<Digest, C>,
    key_bytes_max: usize,
}

impl<C> KeyRing<C> {
    pub(crate) fn new(key_bytes_max: usize) -> Result<Self, getrandom::Error> {
        let mut pepper = [0u8; 32];
        getrandom::fill(&mut pepper)?;
        let mac = Hmac::new_from_slice(&pepper).expect("HMAC takes a key of any length");
        Ok(Self { mac, consumers: HashMap::new(), key_bytes_max })
    }

    fn digest(&self, key: &[u8]) -> Digest {
        let mut mac = self.mac.clone();
        mac.update(key);
        mac.finalize().into_bytes().into()
    }

    /// Adds a key, or returns whose it already is.
    pub(crate) fn add(&mut self, key: &str, consumer: C) -> Result<(), &C> {
        let digest = self.digest(key.as_bytes());
        if self.consumers.contains_key(&digest) {
            return Err(&self.consumers[&digest]);
        }
        self.consumers.insert(digest, consumer);
        Ok(())
    }

    /// Whose key the request carries.
    pub(crate) fn identify(&self, headers: &HeaderMap) -> Result<&C, IdentifyError> {
        let key = credential(headers)?.ok_or(IdentifyError::Missing)?;
        // The limit bounds the work that a stranger can cause.
        if key.len() > self.key_bytes_max {
            return Err(IdentifyError::Incorrect);
        }
        let digest = self.digest(key);
        let (stored, consumer) = self.consumers.get_key_value(&digest).ok_or(IdentifyError::Incorrect)?;
        if bool::from(stored.ct_eq(&digest)) { Ok(consumer) } else { Err(IdentifyError::Incorrect) }
    }
}

/// The key as OpenAI's (`authorization: Bearer`), Anthropic's (`x-api-key`) or Azure's (`api-key`) clients send it, in
/// this order. An empty one is none.
fn credential(headers: &HeaderMap) -> Result<Option<&[u8]>, IdentifyError> {
    let bearer = only(headers, header::AUTHORIZATION.as_str())?.and_then(|value| {
        let (scheme, key) = value.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
    });
    let named = |name| only(headers, name).map(|value| value.map(<[u8]>::trim_ascii));
    let found = [bearer, named("x-api-key")?, named("api-key")?];
    Ok(found.into_iter().flatten().find(|key| !key.is_empty()))
}

/// A header that may be there once only (RFC 9110, 5.3): of two, a proxy before us may have checked the other one.
fn only<'h>(headers: &'h HeaderMap, name: &'static str) -> Result<Option<&'h [u8]>, IdentifyError> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    match values.next() {
        Some(_) => Err(IdentifyError::Repeated { header: name }),
        None => Ok(first.map(HeaderValue::as_bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_where_clients_put_them() {
        let mut ring = KeyRing::new(16).unwrap();
        ring.add("sk-a", "a").unwrap();
        ring.add("sk-b", "b").unwrap();
        let check = |headers: &[(&'static str, &str)], expect: Result<&str, IdentifyError>| {
            let mut map = HeaderMap::new();
            headers.iter().for_each(|(name, value)| {
                map.append(*name, value.parse().unwrap());
            });
            assert_eq!(ring.identify(&map).copied(), expect, "{headers:?}");
        };
        check(&[("authorization", "Bearer sk-a")], Ok("a"));
        check(&[("authorization", "bearer  sk-b ")], Ok("b"));
        check(&[("x-api-key", "sk-a")], Ok("a"));
        check(&[("api-key", "sk-b")], Ok("b"));
        check(&[("authorization", "Basic eDp5"), ("x-api-key", "sk-a")], Ok("a"));
        check(&[("authorization", "Bearer sk-a"), ("x-api-key", "sk-b")], Ok("a"));
        check(&[], Err(IdentifyError::Missing));
        check(&[("authorization", "Bearer ")], Err(IdentifyError::Missing));
        check(&[("authorization", "sk-a")], Err(IdentifyError::Missing));
        check(&[("authorization", "Basic eDp5")], Err(IdentifyError::Missing));
        check(&[("authorization", "Bearer sk-x")], Err(IdentifyError::Incorrect));
        check(&[("authorization", "Bearer sk-a sk-b")], Err(IdentifyError::Incorrect));
        check(&[("authorization", "Bearer sk-aaaaaaaaaaaaaaaa")], Err(IdentifyError::Incorrect));
        // Which of two counts must not depend on who reads them.
        let repeated = |header| Err(IdentifyError::Repeated { header });
        check(
            &[("authorization", "Bearer sk-a"), ("authorization", "Bearer sk-b")],
            repeated("authorization"),
        );
        check(
            &[("authorization", "Bearer sk-a"), ("authorization", "Bearer sk-a")],
            repeated("authorization"),
        );
        check(
            &[("authorization", "Basic eDp5"), ("authorization", "Bearer sk-a")],
            repeated("authorization"),
        );
        check(&[("authorization", "Bearer sk-a"), ("api-key", "x"), ("api-key", "y")], repeated("api-key"));
        check(&[("x-api-key", "sk-a"), ("x-api-key", "")], repeated("x-api-key"));
        // A wrong key is not saved by a right one in another place.
        check(&[("authorization", "Bearer sk-x"), ("x-api-key", "sk-a")], Err(IdentifyError::Incorrect));
    }

    #[test]
    fn a_key_has_one_owner() {
        let mut ring = KeyRing::new(16).unwrap();
        ring.add("k", "a").unwrap();
        assert_eq!(ring.add("k", "b"), Err(&"a"));
    }

    #[test]
    fn no_key_is_kept_and_peppers_differ() {
        let mut one = KeyRing::new(64).unwrap();
        let mut two = KeyRing::new(64).unwrap();
        one.add("a-key-that-is-secret", ()).unwrap();
        two.add("a-key-that-is-secret", ()).unwrap();
        let only = |ring: &KeyRing<()>| *ring.consumers.keys().next().unwrap();
        assert_ne!(only(&one), only(&two));
    }
}
