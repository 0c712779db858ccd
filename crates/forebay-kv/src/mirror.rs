//! What a cache's events have told so far, as the cache of their receiver.

use forebay_types::{BlockHash, TokenId};

use crate::map::BlockHashMap;
use crate::{CacheSalt, KvEvent};

/// The blocks that a cache holds, with all that it takes to tell of them again.
///
/// It also decides what is told: a block whose parent has not been told (it was dropped by a clearing, while the
/// sequence that holds it went on) can't be hit and means nothing to others. It is held back until its parent is
/// there again. So a receiver knows every parent, and knows exactly what a prompt can hit.
///
/// About 200 bytes per block of 16 tokens: a thousandth of the KV cache that it stands for, or less.
#[derive(Debug, Clone, Default)]
pub struct CacheMirror {
    block_size: u32,
    slots: BlockHashMap<u32>,
    blocks: Vec<Block>,
    /// `block_size` per block.
    tokens: Vec<TokenId>,
    free: Vec<u32>,
    held_back: u32,
}

#[derive(Debug, Clone)]
struct Block {
    hash: BlockHash,
    parent: Option<BlockHash>,
    cache_salt: Option<CacheSalt>,
    told: bool,
}

impl CacheMirror {
    /// Blocks that were told.
    pub fn len(&self) -> usize {
        self.slots.len() - self.held_back as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn contains(&self, hash: &BlockHash) -> bool {
        self.slots.get(hash).is_some_and(|&slot| self.blocks[slot as usize].told)
    }

    /// Takes in one event of the cache, and appends to `out` what a receiver is to be told.
    ///
    /// O(blocks in the event); O(blocks) where blocks are held back.
    pub fn apply(&mut self, event: KvEvent, out: &mut Vec<KvEvent>) {
        match event {
            KvEvent::Stored { .. } => self.on_stored(event, out),
            KvEvent::Removed { mut hashes } => {
                hashes.retain(|hash| self.remove(hash));
                if !hashes.is_empty() {
                    out.push(KvEvent::Removed { hashes });
                }
            }
            KvEvent::Cleared => {
                *self = Self::default();
                out.push(KvEvent::Cleared);
            }
        }
    }

    fn on_stored(&mut self, event: KvEvent, out: &mut Vec<KvEvent>) {
        let KvEvent::Stored { hashes, parent, tokens, block_size, cache_salt } = &event else { return };
        if self.blocks.is_empty() {
            self.block_size = *block_size;
        }
        let size = *block_size as usize;
        if size == 0 || *block_size != self.block_size || tokens.len() != hashes.len() * size {
            debug_assert!(false, "an event of another cache: {event:?}");
            return;
        }
        let told = parent.as_ref().is_none_or(|parent| self.contains(parent));
        let mut previous = *parent;
        for (n, (hash, tokens)) in hashes.iter().zip(tokens.chunks_exact(size)).enumerate() {
            let cache_salt = if n == 0 && parent.is_none() { cache_salt.clone() } else { None };
            self.add(Block { hash: *hash, parent: previous, cache_salt, told }, tokens);
            previous = Some(*hash);
        }
        if told {
            out.push(event);
            self.tell_held_back(out);
        }
    }

    /// Tells of blocks whose parents are told now, parents first.
    fn tell_held_back(&mut self, out: &mut Vec<KvEvent>) {
        while self.held_back > 0 {
            let ready = |block: &&Block| {
                let waits = !block.told && self.slots.contains_key(&block.hash);
                waits && block.parent.as_ref().is_some_and(|parent| self.contains(parent))
            };
            let Some(block) = self.blocks.iter().find(ready) else { return };
            let slot = self.slots[&block.hash];
            self.blocks[slot as usize].told = true;
            self.held_back -= 1;
            out.push(self.stored(&[slot]));
        }
    }

    fn add(&mut self, block: Block, tokens: &[TokenId]) {
        if let Some(&slot) = self.slots.get(&block.hash) {
            let known = &mut self.blocks[slot as usize];
            self.held_back -= u32::from(block.told && !known.told);
            known.told |= block.told;
            return;
        }
        self.held_back += u32::from(!block.told);
        let hash = block.hash;
        let slot = match self.free.pop() {
            Some(slot) => {
                self.blocks[slot as usize] = block;
                let at = slot as usize * tokens.len();
                self.tokens[at..at + tokens.len()].copy_from_slice(tokens);
                slot
            }
            None => {
                self.blocks.push(block);
                self.tokens.extend_from_slice(tokens);
                (self.blocks.len() - 1) as u32
            }
        };
        self.slots.insert(hash, slot);
    }

    /// Whether the block was told.
    fn remove(&mut self, hash: &BlockHash) -> bool {
        let Some(slot) = self.slots.remove(hash) else { return false };
        self.free.push(slot);
        let block = &mut self.blocks[slot as usize];
        block.cache_salt = None;
        self.held_back -= u32::from(!block.told);
        block.told
    }

    /// A chain of blocks as one event.
    fn stored(&self, slots: &[u32]) -> KvEvent {
        let first = &self.blocks[slots[0] as usize];
        let size = self.block_size as usize;
        let tokens = |&slot: &u32| &self.tokens[slot as usize * size..][..size];
        KvEvent::Stored {
            hashes: slots.iter().map(|&slot| self.blocks[slot as usize].hash).collect(),
            parent: first.parent,
            tokens: slots.iter().flat_map(tokens).copied().collect(),
            block_size: self.block_size,
            cache_salt: first.cache_salt.clone(),
        }
    }

    /// Everything that was told, parents before children, in pieces of at most `blocks_max` blocks. O(blocks).
    ///
    /// A block without its parent is left out: it can't be hit.
    pub fn into_events(self, blocks_max: usize) -> impl Iterator<Item = Vec<KvEvent>> + Send {
        Events {
            blocks_max: blocks_max.max(1),
            seen: vec![Seen::No; self.blocks.len()],
            next: 0,
            chain: Vec::new(),
            mirror: self,
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Seen {
    No,
    Told,
    /// Some block before it is missing.
    Cut,
}

/// Walks through the blocks; each one pulls those before it along.
struct Events {
    mirror: CacheMirror,
    blocks_max: usize,
    seen: Vec<Seen>,
    next: u32,
    /// Slots that are to be told next, last first.
    chain: Vec<u32>,
}

impl Events {
    /// Fills `chain` with the next block and those before it that were not told.
    fn climb(&mut self) -> bool {
        let blocks = &self.mirror.blocks;
        while (self.next as usize) < blocks.len() {
            let start = self.next;
            self.next += 1;
            let lives = self.mirror.slots.get(&blocks[start as usize].hash) == Some(&start);
            if self.seen[start as usize] != Seen::No || !lives || !blocks[start as usize].told {
                continue;
            }
            let mut at = start;
            let cut = loop {
                self.chain.push(at);
                // Until it is told, so that what has itself among its parents ends here.
                self.seen[at as usize] = Seen::Cut;
                let Some(parent) = &blocks[at as usize].parent else { break false };
                match self.mirror.slots.get(parent) {
                    Some(&slot) if self.seen[slot as usize] == Seen::Told => break false,
                    Some(&slot) if self.seen[slot as usize] == Seen::No && blocks[slot as usize].told => {
                        at = slot
                    }
                    _ => break true,
                }
            };
            if !cut {
                return true;
            }
            self.chain.clear();
        }
        false
    }
}

impl Iterator for Events {
    type Item = Vec<KvEvent>;

    fn next(&mut self) -> Option<Vec<KvEvent>> {
        let mut events = Vec::new();
        let mut room = self.blocks_max;
        while room > 0 && (!self.chain.is_empty() || self.climb()) {
            let cut = self.chain.len().saturating_sub(room);
            let mut slots = self.chain.split_off(cut);
            slots.reverse();
            slots.iter().for_each(|&slot| self.seen[slot as usize] = Seen::Told);
            room -= slots.len();
            events.push(self.mirror.stored(&slots));
        }
        (!events.is_empty()).then_some(events)
    }
}

#[cfg(test)]
mod tests;
