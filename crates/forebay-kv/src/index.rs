//! Which replica holds how much of a prompt.
//!
//! A flat map from block to the set of replicas that hold it. A block's hash covers everything before it, so no tree
//! is needed: the longest prefix is found by looking up a prompt's blocks in order until nobody holds the next.
//!
//! Works on exact knowledge ([`PrefixIndex::apply`] of a replica's events) and on a guess ([`PrefixIndex::insert`] of
//! what was sent there). It deliberately doesn't know load, time, models or block sizes: one index per model and
//! block size, and placement decides.
//!
//! Cost: 8 B × ⌈replicas / 64⌉ and one map slot per distinct block, one map slot, 8 B key and 8 B links per block and
//! holder. A lookup is one map probe per block.

use forebay_types::BlockHash;

use crate::KvEvent;
use crate::list::IndexList;
use crate::map::LowHashMap;

/// A replica's place in the index. The caller gives numbers out, small first: holder sets are bit sets over them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lane(pub u16);

/// Blocks by the replicas that hold them.
///
/// Blocks are told apart by the low 64 bits of their hash, because that is all that vLLM's events carry by default.
/// A collision costs one bad placement, never a wrong answer: the engine compares full hashes.
#[derive(Debug, Clone)]
pub struct PrefixIndex {
    blocks_per_replica_max: u32,
    /// Words of one holder set.
    words: usize,
    rows: LowHashMap<u32>,
    /// `words` per row: bit `lane % 64` of word `lane / 64` says that the lane holds the block.
    holders: Vec<u64>,
    rows_free: Vec<u32>,
    lanes: Vec<LaneBlocks>,
}

/// The blocks of one replica, least recently stored first.
#[derive(Debug, Clone, Default)]
struct LaneBlocks {
    slots: LowHashMap<u32>,
    order: IndexList,
    keys: Vec<u64>,
    slots_free: Vec<u32>,
}

/// Result of a lookup; reuse it to keep lookups free of allocations.
#[derive(Debug, Clone, Default)]
pub struct Matches {
    blocks: Vec<u32>,
    alive: Vec<u64>,
}

impl Matches {
    /// Blocks at the start of the prompt that `lane` holds without a gap.
    pub fn blocks(&self, lane: Lane) -> u32 {
        self.blocks.get(usize::from(lane.0)).copied().unwrap_or(0)
    }

    /// Every replica that holds at least the first block.
    pub fn iter(&self) -> impl Iterator<Item = (Lane, u32)> + '_ {
        self.blocks.iter().enumerate().filter(|(_, blocks)| **blocks > 0).map(|(i, &b)| (Lane(i as u16), b))
    }

    /// Length of the longest match of any replica, in blocks.
    pub fn longest(&self) -> u32 {
        self.blocks.iter().copied().max().unwrap_or(0)
    }
}

impl PrefixIndex {
    /// Remembers at most `blocks_per_replica_max` blocks per replica, dropping the least recently stored.
    ///
    /// For a replica that sends events, give its number of KV blocks or more. For a guess, what its cache can hold.
    pub fn new(blocks_per_replica_max: u32) -> Self {
        Self {
            blocks_per_replica_max,
            words: 1,
            rows: LowHashMap::default(),
            holders: Vec::new(),
            rows_free: Vec::new(),
            lanes: Vec::new(),
        }
    }

    /// Takes in one event of a replica's cache. Storing a held block or removing an unknown one changes nothing.
    pub fn apply(&mut self, replica: Lane, event: &KvEvent) {
        match event {
            KvEvent::Stored { hashes, .. } => self.insert(replica, hashes),
            KvEvent::Removed { hashes } => {
                for hash in hashes {
                    self.remove(replica, hash.low_u64());
                }
            }
            KvEvent::Cleared => self.remove_replica(replica),
        }
    }

    /// Notes that `replica` holds a chain of blocks and has just used it.
    ///
    /// The start of the chain counts as used last: what runs over the limit is a chain's end, never its start, since
    /// an end without its start matches nothing.
    pub fn insert(&mut self, replica: Lane, hashes: &[BlockHash]) {
        let lane = self.lane_made(replica);
        let kept = hashes.len().min(self.blocks_per_replica_max as usize);
        for hash in hashes[..kept].iter().rev() {
            let key = hash.low_u64();
            if self.lanes[lane].touch(key) {
                continue;
            }
            if self.lanes[lane].order.len() >= self.blocks_per_replica_max
                && let Some(oldest) = self.lanes[lane].oldest()
            {
                self.remove(replica, oldest);
            }
            self.lanes[lane].add(key);
            self.set_holder(key, lane);
        }
    }

    /// Forgets all blocks of a replica: its cache was cleared, or it is gone and its lane is free for another.
    pub fn remove_replica(&mut self, replica: Lane) {
        let lane = usize::from(replica.0);
        if lane >= self.lanes.len() {
            return;
        }
        let blocks = std::mem::take(&mut self.lanes[lane]);
        for slot in blocks.order.iter() {
            self.unset_holder(blocks.keys[slot as usize], lane);
        }
    }

    /// For every replica the length of the longest prefix of `hashes` that it holds, in blocks.
    pub fn matched_blocks(&self, hashes: &[BlockHash]) -> Matches {
        let mut matches = Matches::default();
        self.matched_blocks_into(hashes, &mut matches);
        matches
    }

    /// [`Self::matched_blocks`] into memory used before. One walk, ending where nobody holds the next block:
    /// O(longest match × replicas / 64).
    pub fn matched_blocks_into(&self, hashes: &[BlockHash], out: &mut Matches) {
        out.blocks.clear();
        out.blocks.resize(self.lanes.len(), 0);
        out.alive.clear();
        out.alive.resize(self.words, u64::MAX);
        let mut depth = 0;
        for hash in hashes {
            let Some(&row) = self.rows.get(&hash.low_u64()) else {
                break;
            };
            let holders = &self.holders[row as usize * self.words..][..self.words];
            let mut any = 0;
            for (word, &holders) in holders.iter().enumerate() {
                let alive = out.alive[word];
                out.ended(word, alive & !holders, depth);
                out.alive[word] = alive & holders;
                any |= alive & holders;
            }
            if any == 0 {
                return;
            }
            depth += 1;
        }
        for word in 0..self.words {
            out.ended(word, out.alive[word], depth);
        }
    }

    /// Blocks that `replica` is known to hold.
    pub fn blocks_held(&self, replica: Lane) -> u32 {
        self.lanes.get(usize::from(replica.0)).map_or(0, |lane| lane.order.len())
    }

    pub fn holds(&self, replica: Lane, hash: &BlockHash) -> bool {
        self.lanes.get(usize::from(replica.0)).is_some_and(|lane| lane.slots.contains_key(&hash.low_u64()))
    }

    /// Distinct blocks held by anybody.
    pub fn blocks(&self) -> usize {
        self.rows.len()
    }

    /// Index of `replica` in `lanes`, which grows to hold it.
    fn lane_made(&mut self, replica: Lane) -> usize {
        let lane = usize::from(replica.0);
        if lane >= self.lanes.len() {
            self.lanes.resize_with(lane + 1, LaneBlocks::default);
        }
        let words = self.lanes.len().div_ceil(64);
        if words > self.words {
            let mut wider = vec![0; self.holders.len() / self.words * words];
            for (old, new) in self.holders.chunks_exact(self.words).zip(wider.chunks_exact_mut(words)) {
                new[..old.len()].copy_from_slice(old);
            }
            self.holders = wider;
            self.words = words;
        }
        lane
    }

    fn remove(&mut self, replica: Lane, key: u64) {
        let lane = usize::from(replica.0);
        if self.lanes.get_mut(lane).is_some_and(|blocks| blocks.forget(key)) {
            self.unset_holder(key, lane);
        }
    }

    fn set_holder(&mut self, key: u64, lane: usize) {
        let row = *self.rows.entry(key).or_insert_with(|| {
            self.rows_free.pop().unwrap_or_else(|| {
                let row = (self.holders.len() / self.words) as u32;
                self.holders.resize(self.holders.len() + self.words, 0);
                row
            })
        });
        self.holders[row as usize * self.words + lane / 64] |= 1 << (lane % 64);
    }

    /// `lane` must be a holder of `key`.
    fn unset_holder(&mut self, key: u64, lane: usize) {
        let Some(&row) = self.rows.get(&key) else {
            return;
        };
        let holders = &mut self.holders[row as usize * self.words..][..self.words];
        holders[lane / 64] &= !(1 << (lane % 64));
        if holders.iter().all(|word| *word == 0) {
            self.rows.remove(&key);
            self.rows_free.push(row);
        }
    }
}

impl Matches {
    /// The lanes of `lanes` (bits of word `word`) end their match at `depth` blocks.
    fn ended(&mut self, word: usize, mut lanes: u64, depth: u32) {
        if depth == 0 {
            return; // the bits may name lanes that don't exist
        }
        while lanes != 0 {
            self.blocks[word * 64 + lanes.trailing_zeros() as usize] = depth;
            lanes &= lanes - 1;
        }
    }
}

impl LaneBlocks {
    /// Makes `key` the most recent. False when the lane doesn't hold it.
    fn touch(&mut self, key: u64) -> bool {
        let Some(&slot) = self.slots.get(&key) else {
            return false;
        };
        self.order.remove(slot);
        self.order.push_back(slot);
        true
    }

    fn add(&mut self, key: u64) {
        let slot = self.slots_free.pop().unwrap_or_else(|| {
            self.keys.push(0);
            self.order.add_id()
        });
        self.keys[slot as usize] = key;
        self.order.push_back(slot);
        self.slots.insert(key, slot);
    }

    /// False when the lane didn't hold it.
    fn forget(&mut self, key: u64) -> bool {
        let Some(slot) = self.slots.remove(&key) else {
            return false;
        };
        self.order.remove(slot);
        self.slots_free.push(slot);
        true
    }

    fn oldest(&self) -> Option<u64> {
        self.order.iter().next().map(|slot| self.keys[slot as usize])
    }
}

#[cfg(test)]
mod tests;
