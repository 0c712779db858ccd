//! A hash map for keys that are hashes already.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use forebay_types::BlockHash;

/// Takes the last 8 bytes of the key as its hash: a block hash is SHA-256, mixing it again is wasted work.
///
/// Only for `u64` and [`BlockHash`] keys. A client that grinds SHA-256 for equal low bits pays about as many hashes
/// per colliding block as the table has buckets, and gains a longer probe: no reason for a keyed hasher.
#[derive(Debug, Clone, Copy, Default)]
pub struct PassThroughHasher(u64);

impl Hasher for PassThroughHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        let mut low = [0u8; 8];
        let tail = &bytes[bytes.len().saturating_sub(8)..];
        low[..tail.len()].copy_from_slice(tail);
        self.0 = u64::from_le_bytes(low);
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }

    /// Slices and arrays announce their length first; it is the same for every key.
    fn write_usize(&mut self, _length: usize) {}
}

/// Map from a block's full 256-bit hash.
pub type BlockHashMap<V> = HashMap<BlockHash, V, BuildHasherDefault<PassThroughHasher>>;

/// Map from the low 64 bits of a block's hash.
pub(crate) type LowHashMap<V> = HashMap<u64, V, BuildHasherDefault<PassThroughHasher>>;

#[cfg(test)]
mod tests {
    use super::*;
    use std::hash::BuildHasher;

    #[test]
    fn keys_are_their_own_hash() {
        let build = BuildHasherDefault::<PassThroughHasher>::default();
        let mut bytes = [7u8; 32];
        bytes[24..].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(build.hash_one(BlockHash(bytes)), u64::from_le_bytes([1, 2, 3, 4, 5, 6, 7, 8]));
        assert_eq!(build.hash_one(0x0123_4567_89ab_cdef_u64), 0x0123_4567_89ab_cdef);
    }
}
