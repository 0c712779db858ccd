//! The block hash: vLLM's `sha256_cbor` chain, bit for bit.
//!
//! `hash[i] = SHA-256(CBOR([hash[i - 1] or none_hash, [tokens…], extra or null]))`, canonical CBOR (RFC 8949, 4.2.1:
//! shortest heads, definite lengths). Being byte-compatible lets real vLLM replicas started with
//! `--prefix-caching-hash-algo sha256_cbor` and ours stand in one index. (vLLM's default `sha256` hashes a Python
//! pickle; nothing outside Python can follow that.)

use std::fmt;

use forebay_types::{BlockHash, TokenId};
use sha2::{Digest, Sha256};

use crate::CacheSalt;

/// vLLM's seed where `PYTHONHASHSEED` is not set.
pub const DEFAULT_SEED: &str = "vllm-none-hash";

/// `none_hash_from_seed(DEFAULT_SEED)`, which a test compares.
const NONE_HASH: BlockHash = BlockHash([
    0x9b, 0xd9, 0x6a, 0x48, 0x5a, 0xd8, 0x4e, 0xfd, 0xaf, 0xb7, 0x2e, 0xe4, 0x8a, 0x1d, 0x7a, 0x69, 0xbc,
    0xea, 0xd0, 0xf8, 0xf0, 0x43, 0x31, 0x73, 0x94, 0x1b, 0x27, 0x6b, 0x95, 0x81, 0xee, 0xf0,
]);

/// What, besides its tokens, makes a block's KV different. Order within a block: LoRA, then salt.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum ExtraKey<'a> {
    /// On every block of a sequence that runs with an adapter.
    Lora { name: &'a str, path: &'a str },
    /// On a sequence's first block only; the chain carries it on.
    CacheSalt(&'a CacheSalt),
}

/// The parent of every first block.
pub fn none_hash() -> BlockHash {
    NONE_HASH
}

/// The parent of every first block in a vLLM that runs with `PYTHONHASHSEED=seed`.
pub fn none_hash_from_seed(seed: &str) -> BlockHash {
    let mut cbor = CborHash::new();
    cbor.text(seed);
    cbor.finish()
}

/// Hash of one full block. Allocates nothing; about 0.3 µs for 16 tokens with SHA instructions.
///
/// `parent` is the hash of the block before, [`none_hash`] for the first.
pub fn block_hash(parent: &BlockHash, tokens: &[TokenId], extra: &[ExtraKey<'_>]) -> BlockHash {
    let mut cbor = CborHash::new();
    cbor.array(3);
    cbor.bytes(&parent.0);
    cbor.array(tokens.len());
    for &token in tokens {
        cbor.unsigned(u64::from(token));
    }
    if extra.is_empty() {
        cbor.null();
    } else {
        cbor.array(extra.len());
        for key in extra {
            match key {
                ExtraKey::Lora { name, path } => {
                    cbor.array(3);
                    cbor.text("lora");
                    cbor.text(name);
                    cbor.text(path);
                }
                ExtraKey::CacheSalt(salt) => {
                    cbor.array(2);
                    cbor.text("cache_salt");
                    cbor.text(salt.expose());
                }
            }
        }
    }
    cbor.finish()
}

/// Hashes a growing sequence block by block: each token is hashed once, over the sequence's whole life.
#[derive(Clone)]
pub struct BlockHasher {
    block_size: usize,
    cache_salt: Option<CacheSalt>,
    hashes: Vec<BlockHash>,
    /// Tokens after the last full block, fewer than `block_size`.
    partial: Vec<TokenId>,
}

impl fmt::Debug for BlockHasher {
    /// Without the tokens: they are the client's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockHasher").field("tokens", &self.tokens()).field("hashes", &self.hashes).finish()
    }
}

impl BlockHasher {
    /// `block_size` is in tokens; 0 counts as 1.
    pub fn new(block_size: usize, cache_salt: Option<CacheSalt>) -> Self {
        let block_size = block_size.max(1);
        Self { block_size, cache_salt, hashes: Vec::new(), partial: Vec::with_capacity(block_size) }
    }

    /// Appends one token. Returns the hash of the block that it completes, if it does.
    pub fn push(&mut self, token: TokenId) -> Option<BlockHash> {
        self.partial.push(token);
        if self.partial.len() < self.block_size {
            return None;
        }
        let block = std::mem::take(&mut self.partial);
        let hash = self.complete(&block);
        self.partial = block;
        self.partial.clear();
        Some(hash)
    }

    /// Appends tokens.
    pub fn extend(&mut self, mut tokens: &[TokenId]) {
        self.hashes.reserve((self.partial.len() + tokens.len()) / self.block_size);
        while !self.partial.is_empty() && !tokens.is_empty() {
            self.push(tokens[0]);
            tokens = &tokens[1..];
        }
        let mut blocks = tokens.chunks_exact(self.block_size);
        for block in &mut blocks {
            self.complete(block);
        }
        self.partial.extend_from_slice(blocks.remainder());
    }

    /// One hash per full block so far, first block first.
    pub fn hashes(&self) -> &[BlockHash] {
        &self.hashes
    }

    /// Tokens appended so far.
    pub fn tokens(&self) -> usize {
        self.hashes.len() * self.block_size + self.partial.len()
    }

    pub fn block_size(&self) -> usize {
        self.block_size
    }

    pub fn cache_salt(&self) -> Option<&CacheSalt> {
        self.cache_salt.as_ref()
    }

    /// Starts another sequence, keeping the memory.
    pub fn restart(&mut self, cache_salt: Option<CacheSalt>) {
        self.cache_salt = cache_salt;
        self.hashes.clear();
        self.partial.clear();
    }

    /// Makes room for a sequence of so many tokens, so that its later tokens allocate nothing.
    pub fn reserve(&mut self, tokens: usize) {
        self.hashes.reserve((tokens / self.block_size).saturating_sub(self.hashes.len()));
    }

    fn complete(&mut self, block: &[TokenId]) -> BlockHash {
        let hash = match (self.hashes.last(), &self.cache_salt) {
            (Some(parent), _) => block_hash(parent, block, &[]),
            (None, None) => block_hash(&NONE_HASH, block, &[]),
            (None, Some(salt)) => block_hash(&NONE_HASH, block, &[ExtraKey::CacheSalt(salt)]),
        };
        self.hashes.push(hash);
        hash
    }
}

/// Canonical CBOR straight into SHA-256, through a buffer: one update per 256 bytes instead of one per token.
struct CborHash {
    sha: Sha256,
    buffer: [u8; 256],
    used: usize,
}

impl CborHash {
    /// The longest head: type byte and a 64-bit argument.
    const HEAD_MAX: usize = 9;

    fn new() -> Self {
        Self { sha: Sha256::new(), buffer: [0; 256], used: 0 }
    }

    fn unsigned(&mut self, value: u64) {
        self.head(0, value);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.head(2, bytes.len() as u64);
        self.raw(bytes);
    }

    fn text(&mut self, text: &str) {
        self.head(3, text.len() as u64);
        self.raw(text.as_bytes());
    }

    fn array(&mut self, items: usize) {
        self.head(4, items as u64);
    }

    fn null(&mut self) {
        self.raw(&[0xf6]);
    }

    fn head(&mut self, major: u8, argument: u64) {
        if self.used + Self::HEAD_MAX > self.buffer.len() {
            self.flush();
        }
        let major = major << 5;
        let at = &mut self.buffer[self.used..];
        self.used += match argument {
            0..=23 => {
                at[0] = major | argument as u8;
                1
            }
            24..=0xff => {
                at[0] = major | 24;
                at[1] = argument as u8;
                2
            }
            0x100..=0xffff => {
                at[0] = major | 25;
                at[1..3].copy_from_slice(&(argument as u16).to_be_bytes());
                3
            }
            0x1_0000..=0xffff_ffff => {
                at[0] = major | 26;
                at[1..5].copy_from_slice(&(argument as u32).to_be_bytes());
                5
            }
            _ => {
                at[0] = major | 27;
                at[1..9].copy_from_slice(&argument.to_be_bytes());
                9
            }
        };
    }

    fn raw(&mut self, bytes: &[u8]) {
        if self.used + bytes.len() > self.buffer.len() {
            self.flush();
        }
        if bytes.len() > self.buffer.len() {
            self.sha.update(bytes);
            return;
        }
        self.buffer[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
    }

    fn flush(&mut self) {
        self.sha.update(&self.buffer[..self.used]);
        self.used = 0;
    }

    fn finish(mut self) -> BlockHash {
        self.flush();
        BlockHash(self.sha.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(hash: BlockHash) -> String {
        hash.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn ids(range: std::ops::Range<u32>) -> Vec<TokenId> {
        range.collect()
    }

    // The expected values of these tests come from vLLM's formula with an independent CBOR encoder in Python.

    #[test]
    fn none_hashes() {
        fn check(seed: &str, expect: &str) {
            assert_eq!(hex(none_hash_from_seed(seed)), expect, "seed {seed:?}");
        }
        check(DEFAULT_SEED, "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0");
        check("42", "9fa6eb003f14425eb9c8e6baacfbcaab26257357b829c7bfa74ffcc4f31c1780");
        assert_eq!(none_hash(), none_hash_from_seed(DEFAULT_SEED));
    }

    #[test]
    fn block_hashes() {
        fn check(parent: BlockHash, tokens: &[TokenId], extra: &[ExtraKey<'_>], expect: &str) {
            assert_eq!(hex(block_hash(&parent, tokens, extra)), expect, "tokens {tokens:?}");
        }
        let none = none_hash();
        let block0 = block_hash(&none, &ids(0..16), &[]);
        let block1 = block_hash(&block0, &ids(16..32), &[]);
        check(none, &ids(0..16), &[], "dc918a88b139e5afe60b88eda27508d4aee16c10fdc354791efea06206ac0749");
        check(block0, &ids(16..32), &[], "c300ec275d7bf08af8fc63e76cdc0086911bbc7091e03c5cf892553bef84ef0c");
        assert_eq!(block0.low_u64(), 2_233_398_808_101_521_225);
        assert_eq!(block1.low_u64(), 17_911_472_383_915_781_900);

        let salt = |text: &str| CacheSalt::new(text);
        check(
            none,
            &ids(0..16),
            &[ExtraKey::CacheSalt(&salt("s"))],
            "67e9f72522b34138a0f4be0e3a68d9d49b1e50aea0af7762f6170ad7eebbdeaf",
        );
        check(
            none,
            &ids(0..16),
            &[ExtraKey::CacheSalt(&salt("s1"))],
            "37a188ca0f395fb17edb7613ec9f0f06e16dd32556cf8209ea1772c6a9134909",
        );
        check(
            none,
            &ids(0..16),
            &[ExtraKey::Lora { name: "my-lora", path: "/p/my-lora" }],
            "5f18f116d3f6a643c29d7200936348bc0471d20b53ccb16d24c7a36c667017c3",
        );
        // A text of more than 23 bytes, and every length of an integer's head.
        check(
            block0,
            &[1, 2, 3, 4],
            &[ExtraKey::CacheSalt(&salt(&"é".repeat(20)))],
            "f7199e77741ce328f566b39e7b6c6c40d3c6d07391b7ee76d99ee8e4ece3f593",
        );
        let heads = [0, 23, 24, 255, 256, 65_535, 65_536, 151_935, u32::MAX, 0, 1, 2, 3, 4, 5, 6];
        check(block1, &heads, &[], "0acd3c0b6d259227f7557fc35f72afb04e6e331dd274c9598420b463e114418f");
    }

    #[test]
    fn a_long_block_and_a_long_salt_cross_the_buffer() {
        // 300 five-byte heads and a 700-byte text: both flushes happen. The reference is one buffer for everything.
        let tokens: Vec<TokenId> = (0..300).map(|i| 0x1_0000 + i).collect();
        let salt = "x".repeat(700);
        let mut cbor = vec![0x83, 0x58, 0x20];
        cbor.extend_from_slice(&none_hash().0);
        cbor.extend_from_slice(&[0x99, 0x01, 0x2c]);
        for token in &tokens {
            cbor.push(0x1a);
            cbor.extend_from_slice(&token.to_be_bytes());
        }
        cbor.extend_from_slice(&[0x81, 0x82, 0x6a]);
        cbor.extend_from_slice(b"cache_salt");
        cbor.extend_from_slice(&[0x79, 0x02, 0xbc]);
        cbor.extend_from_slice(salt.as_bytes());
        let expect = BlockHash(Sha256::digest(&cbor).into());
        assert_eq!(block_hash(&none_hash(), &tokens, &[ExtraKey::CacheSalt(&CacheSalt::new(salt))]), expect);
    }

    #[test]
    fn salt_changes_every_block_and_stays_out_of_debug() {
        let mut plain = BlockHasher::new(4, None);
        let mut salted = BlockHasher::new(4, Some(CacheSalt::new("tenant-secret")));
        plain.extend(&ids(0..8));
        salted.extend(&ids(0..8));
        assert_ne!(plain.hashes()[0], salted.hashes()[0]);
        assert_ne!(plain.hashes()[1], salted.hashes()[1]);
        assert!(!format!("{salted:?} {:?}", salted.cache_salt()).contains("tenant-secret"));
    }

    proptest! {
        /// However the tokens arrive, the hashes are those of the blocks, chained.
        #[test]
        fn incremental_equals_block_by_block(
            pieces in prop::collection::vec(prop::collection::vec(any::<u32>(), 0..20), 0..8),
            block_size in 1usize..9,
            salted in any::<bool>(),
            one_by_one in any::<bool>(),
        ) {
            let salt = salted.then(|| CacheSalt::new("s1"));
            let mut hasher = BlockHasher::new(block_size, salt.clone());
            for piece in &pieces {
                if one_by_one {
                    for &token in piece { hasher.push(token); }
                } else {
                    hasher.extend(piece);
                }
            }
            let tokens = pieces.concat();
            let mut parent = none_hash();
            let mut expect = Vec::new();
            for (i, block) in tokens.chunks_exact(block_size).enumerate() {
                let extra: Vec<_> = salt.iter().filter(|_| i == 0).map(ExtraKey::CacheSalt).collect();
                parent = block_hash(&parent, block, &extra);
                expect.push(parent);
            }
            prop_assert_eq!(hasher.hashes(), &expect[..]);
            prop_assert_eq!(hasher.tokens(), tokens.len());
        }
    }
}
