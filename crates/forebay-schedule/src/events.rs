//! KV events on their way out of the block pool.

use forebay_kv::{CacheSalt, KvEvent};
use forebay_types::{BlockHash, TokenId};

use crate::pool::FullBlock;

/// Events in three flat arrays: recording one in the middle of planning allocates nothing once they have grown.
#[derive(Clone)]
pub(crate) struct EventLog {
    recording: bool,
    block_size: u32,
    hashes_max: usize,
    entries: Vec<Entry>,
    hashes: Vec<BlockHash>,
    tokens: Vec<TokenId>,
}

#[derive(Clone)]
enum Entry {
    Stored { hashes: u32, parent: Option<BlockHash>, cache_salt: Option<CacheSalt> },
    Removed { hashes: u32 },
    Cleared,
}

impl EventLog {
    pub(crate) fn new(recording: bool, blocks: u32, block_size: u32) -> Self {
        // Four times the cache is far more than a step can change; whoever lets that pile up has stopped draining.
        let hashes_max = (blocks as usize * 4).max(1024);
        // What a large step changes, so that no later one has to make room.
        let room = if recording { (blocks as usize).min(1024) } else { 0 };
        Self {
            recording,
            block_size,
            hashes_max,
            entries: Vec::with_capacity(room),
            hashes: Vec::with_capacity(room),
            tokens: Vec::with_capacity(room * block_size as usize),
        }
    }

    pub(crate) fn stored(&mut self, hash: BlockHash, block: &FullBlock<'_>) {
        if !self.make_room() {
            return;
        }
        let chained = match (self.entries.last_mut(), block.parent) {
            (Some(Entry::Stored { hashes, .. }), Some(parent)) if self.hashes.last() == Some(&parent) => {
                *hashes += 1;
                true
            }
            _ => false,
        };
        if !chained {
            let cache_salt = if block.parent.is_none() { block.cache_salt.cloned() } else { None };
            self.entries.push(Entry::Stored { hashes: 1, parent: block.parent, cache_salt });
        }
        self.hashes.push(hash);
        for piece in block.tokens {
            self.tokens.extend_from_slice(piece);
        }
    }

    pub(crate) fn removed(&mut self, hash: BlockHash) {
        if !self.make_room() {
            return;
        }
        match self.entries.last_mut() {
            Some(Entry::Removed { hashes }) => *hashes += 1,
            _ => self.entries.push(Entry::Removed { hashes: 1 }),
        }
        self.hashes.push(hash);
    }

    /// Whatever was recorded before makes no difference any more.
    pub(crate) fn cleared(&mut self) {
        if !self.recording {
            return;
        }
        self.entries.clear();
        self.hashes.clear();
        self.tokens.clear();
        self.entries.push(Entry::Cleared);
    }

    pub(crate) fn drain(&mut self, out: &mut Vec<KvEvent>) {
        let mut hashes = self.hashes.drain(..);
        let mut tokens = self.tokens.drain(..);
        for entry in self.entries.drain(..) {
            out.push(match entry {
                Entry::Stored { hashes: count, parent, cache_salt } => KvEvent::Stored {
                    hashes: hashes.by_ref().take(count as usize).collect(),
                    parent,
                    tokens: tokens.by_ref().take((count * self.block_size) as usize).collect(),
                    block_size: self.block_size,
                    cache_salt,
                },
                Entry::Removed { hashes: count } => {
                    KvEvent::Removed { hashes: hashes.by_ref().take(count as usize).collect() }
                }
                Entry::Cleared => KvEvent::Cleared,
            });
        }
    }

    /// False when nothing is recorded. A full log starts over with `Cleared`: an index then knows less than is
    /// cached, which costs hits, and never more, which would cost wrong placements.
    fn make_room(&mut self) -> bool {
        if self.recording && self.hashes.len() >= self.hashes_max {
            self.cleared();
        }
        self.recording
    }
}
