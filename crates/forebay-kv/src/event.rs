//! What happened to the blocks of one KV cache.

use forebay_types::{BlockHash, TokenId};

use crate::CacheSalt;

/// One change of a replica's prefix cache, in the order in which the cache made it.
///
/// The shape is vLLM's (`BlockStored`, `BlockRemoved`, `AllBlocksCleared`). Applying all events of a cache, from an
/// empty start, gives exactly the set of blocks that a new prompt can hit there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvEvent {
    /// `hashes` are now cached: a chain, each the parent of the next.
    Stored {
        hashes: Vec<BlockHash>,
        /// The block before `hashes[0]`; `None` when that is a sequence's first block.
        parent: Option<BlockHash>,
        /// `block_size` tokens per hash, in order.
        tokens: Vec<TokenId>,
        block_size: u32,
        /// Set only where `parent` is `None`: later blocks carry it through the chain.
        cache_salt: Option<CacheSalt>,
    },
    /// `hashes` can no longer be hit.
    Removed { hashes: Vec<BlockHash> },
    /// Nothing is cached any more.
    Cleared,
}
