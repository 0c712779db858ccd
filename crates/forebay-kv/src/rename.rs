//! From a replica's own names of its blocks to our hashes.
//!
//! A replica may hash as it likes (vLLM's default hashes a Python pickle): its hashes are taken for names only. What a
//! block *is* follows from the tokens in the event, which are hashed here as the router hashes a prompt. llm-d and
//! Dynamo do the same.

use forebay_types::BlockHash;

use crate::codec::{Medium, ReplicaEvent};
use crate::list::IndexList;
use crate::map::LowHashMap;
use crate::{ExtraKey, KvEvent, block_hash, none_hash};

/// What one replica calls its blocks, for as long as it holds them.
///
/// Remembers at most so many blocks, forgetting the one stored longest ago: what is said about it later is then
/// unknown. About 150 bytes per block.
#[derive(Debug)]
pub struct Renamer {
    block_size: u32,
    blocks_max: u32,
    slots: LowHashMap<u32>,
    order: IndexList,
    blocks: Vec<Block>,
    slots_free: Vec<u32>,
    unknown: u64,
}

#[derive(Debug)]
struct Block {
    name: u64,
    /// A replica's blocks may be longer than ours by a whole number.
    hashes: Box<[BlockHash]>,
    /// One bit per [`Medium`] that has a copy.
    media: u8,
    group: u32,
}

impl Renamer {
    /// For an index whose blocks have so many tokens; 0 counts as 1.
    pub fn new(block_size: u32, blocks_max: u32) -> Self {
        Self {
            block_size: block_size.max(1),
            blocks_max: blocks_max.max(1),
            slots: LowHashMap::default(),
            order: IndexList::default(),
            blocks: Vec::new(),
            slots_free: Vec::new(),
            unknown: 0,
        }
    }

    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Blocks known by name.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Events so far that could not be placed: their parent was stored before we listened, or their block size is not
    /// a multiple of ours.
    pub fn unknown(&self) -> u64 {
        self.unknown
    }

    /// Forgets every name: the replica has restarted.
    pub fn clear(&mut self) {
        let unknown = self.unknown;
        *self = Self { unknown, ..Self::new(self.block_size, self.blocks_max) };
    }

    /// What the event means for the index, in our hashes; `None` where that is nothing.
    ///
    /// A block counts as held until its last copy is removed. Storing again what is held is fine: replicas repeat
    /// themselves. O(tokens).
    pub fn rename(&mut self, event: &ReplicaEvent) -> Option<KvEvent> {
        match event {
            ReplicaEvent::Stored { names, tokens, medium, .. } if tokens.is_empty() => {
                self.on_copied(names, *medium);
                None
            }
            ReplicaEvent::Stored { .. } => self.on_stored(event),
            ReplicaEvent::Removed { names, medium, group } => {
                let mut hashes = Vec::with_capacity(names.len());
                for &name in names {
                    if let Some(block) = self.remove_copy(name, *medium, *group) {
                        hashes.extend_from_slice(&block);
                    }
                }
                (!hashes.is_empty()).then_some(KvEvent::Removed { hashes })
            }
            ReplicaEvent::Cleared => {
                self.clear();
                Some(KvEvent::Cleared)
            }
        }
    }

    fn on_stored(&mut self, event: &ReplicaEvent) -> Option<KvEvent> {
        let ReplicaEvent::Stored { names, parent, tokens, block_size, cache_salt, medium, group } = event
        else {
            return None;
        };
        let parent_hash = match parent {
            None => None,
            Some(name) => {
                self.slots.get(name).and_then(|&slot| self.blocks[slot as usize].hashes.last().copied())
            }
        };
        let orphan = parent.is_some() && parent_hash.is_none();
        if orphan || *block_size == 0 || !block_size.is_multiple_of(self.block_size) {
            self.unknown += 1;
            return None;
        }
        let mut previous = parent_hash.unwrap_or_else(none_hash);
        let mut hashes = Vec::with_capacity(tokens.len() / self.block_size as usize);
        for (&name, tokens) in names.iter().zip(tokens.chunks_exact(*block_size as usize)) {
            let first = hashes.len();
            for tokens in tokens.chunks_exact(self.block_size as usize) {
                let extra = match cache_salt {
                    Some(salt) if hashes.is_empty() && parent.is_none() => &[ExtraKey::CacheSalt(salt)][..],
                    _ => &[],
                };
                previous = block_hash(&previous, tokens, extra);
                hashes.push(previous);
            }
            self.add(name, &hashes[first..], *medium, *group);
        }
        Some(KvEvent::Stored {
            hashes,
            parent: parent_hash,
            tokens: tokens.clone(),
            block_size: self.block_size,
            cache_salt: cache_salt.clone(),
        })
    }

    fn on_copied(&mut self, names: &[u64], medium: Medium) {
        for name in names {
            match self.slots.get(name) {
                Some(&slot) => self.blocks[slot as usize].media |= bit(medium),
                None => self.unknown += 1,
            }
        }
    }

    fn add(&mut self, name: u64, hashes: &[BlockHash], medium: Medium, group: u32) {
        if let Some(&slot) = self.slots.get(&name) {
            let block = &mut self.blocks[slot as usize];
            // A second group's block of the same name: the first one's life decides.
            if block.group == group {
                block.media |= bit(medium);
            }
            self.order.remove(slot);
            self.order.push_back(slot);
            return;
        }
        if self.slots.len() >= self.blocks_max as usize
            && let Some(oldest) = self.order.pop_front()
        {
            self.release(oldest);
        }
        let block = Block { name, hashes: hashes.into(), media: bit(medium), group };
        let slot = match self.slots_free.pop() {
            Some(slot) => {
                self.blocks[slot as usize] = block;
                slot
            }
            None => {
                self.blocks.push(block);
                self.order.add_id()
            }
        };
        self.order.push_back(slot);
        self.slots.insert(name, slot);
    }

    /// The block's hashes, if that was its last copy.
    fn remove_copy(&mut self, name: u64, medium: Medium, group: u32) -> Option<Box<[BlockHash]>> {
        let &slot = self.slots.get(&name)?;
        let block = &mut self.blocks[slot as usize];
        if block.group != group {
            return None;
        }
        block.media &= !bit(medium);
        if block.media != 0 {
            return None;
        }
        self.order.remove(slot);
        Some(self.release(slot))
    }

    /// `slot` must be out of `order` already.
    fn release(&mut self, slot: u32) -> Box<[BlockHash]> {
        let block = &mut self.blocks[slot as usize];
        self.slots.remove(&block.name);
        self.slots_free.push(slot);
        std::mem::take(&mut block.hashes)
    }
}

fn bit(medium: Medium) -> u8 {
    match medium {
        Medium::Device => 1,
        Medium::Host => 2,
        Medium::Disk => 4,
    }
}

#[cfg(test)]
mod tests;
