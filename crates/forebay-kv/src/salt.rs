//! The cache salt: keeps one tenant's prefix cache apart from another's.

use std::fmt;
use std::sync::Arc;

/// Mixed into a sequence's first block hash: prefixes are shared only between equal salts.
///
/// It guards against learning from response times what others have asked (vLLM's `cache_salt`), so `Debug` hides it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CacheSalt(Arc<str>);

impl CacheSalt {
    pub fn new(salt: impl Into<Arc<str>>) -> Self {
        Self(salt.into())
    }

    /// The salt itself, for hashing and for the KV-event codec; not for logs.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for CacheSalt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CacheSalt(..)")
    }
}
