//! KV blocks: who holds them, what is in them, and which is reused next.
//!
//! A block is free or held, and apart from that cached or not:
//!
//! - held, not cached: some sequence writes it;
//! - held and cached: full, read by one or more sequences, written by nobody;
//! - free and cached: its content waits for a new prompt with this prefix, until it is the oldest and reused;
//! - free, not cached: reused first.
//!
//! The pool knows blocks, not sequences; it never touches KV memory.

use forebay_kv::{BlockHashMap, CacheSalt, IndexList, KvEvent};
use forebay_types::{BlockHash, TokenId};

use crate::events::EventLog;
use crate::invariants::BrokenInvariant;

/// A block that has just become full, as the cache stores it.
#[derive(Clone, Copy)]
pub struct FullBlock<'a> {
    /// Hash of the block before; `None` for a sequence's first.
    pub parent: Option<BlockHash>,
    /// Its tokens, in up to two pieces.
    pub tokens: [&'a [TokenId]; 2],
    /// The sequence's salt.
    pub cache_salt: Option<&'a CacheSalt>,
}

/// A fixed number of KV blocks, named `0..blocks`. Every operation is O(1) and allocates nothing.
#[derive(Clone)]
pub struct BlockPool {
    refs: Vec<u32>,
    hashes: Vec<Option<BlockHash>>,
    /// Blocks with no reference, next to be reused first: uncached ones, then cached ones by last use.
    free: IndexList,
    cached: BlockHashMap<u32>,
    events: EventLog,
}

impl BlockPool {
    /// `record_events`: somebody drains [`BlockPool::drain_events`].
    pub fn new(blocks: u32, block_size: u32, record_events: bool) -> Self {
        let mut free = IndexList::new(blocks);
        for block in 0..blocks {
            free.push_back(block);
        }
        let mut cached = BlockHashMap::default();
        // Twice what it holds at most: only then does the table tidy up after removals in place. Fuller than half, it takes
        // new memory instead, some time or other.
        cached.reserve(blocks as usize * 2);
        Self {
            refs: vec![0; blocks as usize],
            hashes: vec![None; blocks as usize],
            free,
            cached,
            events: EventLog::new(record_events, blocks, block_size),
        }
    }

    pub fn blocks(&self) -> u32 {
        self.refs.len() as u32
    }

    /// Blocks that nobody holds, cached or not.
    pub fn free_blocks(&self) -> u32 {
        self.free.len()
    }

    /// Blocks with a hash, held or not.
    pub fn cached_blocks(&self) -> usize {
        self.cached.len()
    }

    /// The hashes that a lookup finds, in no order.
    pub fn cached_hashes(&self) -> impl Iterator<Item = &BlockHash> {
        self.cached.keys()
    }

    pub fn refs(&self, block: u32) -> u32 {
        self.refs[block as usize]
    }

    pub fn hash(&self, block: u32) -> Option<&BlockHash> {
        self.hashes[block as usize].as_ref()
    }

    /// The block with this content, held or free. [`BlockPool::hold`] it before the next `try_alloc`.
    pub fn lookup(&self, hash: &BlockHash) -> Option<u32> {
        self.cached.get(hash).copied()
    }

    /// Takes a free block with one reference, dropping what was cached in it. `None` when all are held.
    pub fn try_alloc(&mut self) -> Option<u32> {
        let block = self.free.pop_front()?;
        if let Some(hash) = self.hashes[block as usize].take() {
            self.cached.remove(&hash);
            self.events.removed(hash);
        }
        self.refs[block as usize] = 1;
        Some(block)
    }

    /// One more reference to a cached block.
    pub fn hold(&mut self, block: u32) {
        debug_assert!(self.hashes[block as usize].is_some(), "block {block} is shared, but not cached");
        let refs = &mut self.refs[block as usize];
        if *refs == 0 {
            self.free.remove(block);
        }
        *refs += 1;
    }

    /// One reference less. The last one frees the block; what is cached in it stays until it is reused.
    ///
    /// Release a sequence's blocks last first: the cache then loses the ends of prefixes before their starts.
    pub fn release(&mut self, block: u32) {
        let refs = &mut self.refs[block as usize];
        debug_assert!(*refs > 0, "block {block} is released, but not held");
        *refs -= 1;
        if *refs > 0 {
            return;
        }
        match self.hashes[block as usize] {
            Some(_) => self.free.push_back(block),
            None => self.free.push_front(block),
        }
    }

    /// Puts a full block, written by its only holder, into the cache. Returns the block to go on with: this one; or,
    /// when somebody else has computed the same block in the meantime, theirs, and this one is released.
    #[must_use = "the returned block replaces the one given"]
    pub fn seal(&mut self, block: u32, hash: BlockHash, full: &FullBlock<'_>) -> u32 {
        debug_assert_eq!(self.refs[block as usize], 1, "block {block} is written by more than one");
        if let Some(other) = self.lookup(&hash) {
            self.hold(other);
            self.release(block);
            return other;
        }
        self.hashes[block as usize] = Some(hash);
        self.cached.insert(hash, block);
        self.events.stored(hash, full);
        block
    }

    /// Forgets all cached content. Held blocks stay held, and are not shared any more.
    pub fn clear_cache(&mut self) {
        self.hashes.fill(None);
        self.cached.clear();
        self.events.cleared();
    }

    /// Appends what has happened to the cache since the last call, in order.
    pub fn drain_events(&mut self, out: &mut Vec<KvEvent>) {
        self.events.drain(out);
    }

    /// Checks everything that must hold between calls. O(blocks); for tests, simulation and debugging.
    pub fn check_invariants(&self) -> Result<(), BrokenInvariant> {
        let mut linked = vec![false; self.refs.len()];
        for block in self.free.iter() {
            linked[block as usize] = true;
        }
        for block in 0..self.blocks() {
            if linked[block as usize] != (self.refs(block) == 0) {
                return Err(BrokenInvariant::FreeList { block, refs: self.refs(block) });
            }
            if let Some(hash) = self.hash(block)
                && self.lookup(hash) != Some(block)
            {
                return Err(BrokenInvariant::HashBijection { block });
            }
        }
        let hashed = self.hashes.iter().flatten().count();
        if hashed != self.cached.len() {
            return Err(BrokenInvariant::HashCount { hashed, cached: self.cached.len() });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
