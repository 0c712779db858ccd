//! Admission: who starts, and with how much of its prompt.

use std::time::Duration;

use crate::Scheduler;
use crate::queue::Standing;
use crate::seq::{Phase, Seq};

/// Waiting sequences looked at in one step beyond those admitted: bounds the step when many wait for one prefix.
const LOOKED_AT_MAX: usize = 64;

/// Waiting sequences of one tenant that are compared by what they find in the cache.
const COMPARED_MAX: usize = 16;

impl Scheduler {
    /// Admits in the queue's order while there are tokens, places and blocks.
    ///
    /// A sequence is admitted when its whole prompt fits, now, beside the output to be expected: otherwise it would hold
    /// blocks and be preempted before it brings anything. The first that doesn't fit ends admission, else small ones would
    /// pass it for ever. One whose next block is being computed by another is passed over instead; it waits as long as the
    /// other prefills. So is one that wants its prompt's logits while others take all that a step may want.
    pub(crate) fn admit(&mut self, now: Duration) {
        let waits = self.admit_below(now, u32::MAX);
        self.prefix_waits += waits;
    }

    /// Admits like [`Scheduler::admit`], as long as the next has fewer than `missing` tokens to compute: before the running
    /// prefills have their rows.
    pub(crate) fn admit_shorter(&mut self, now: Duration, missing: u32) {
        for i in 0..self.running.len() {
            let slot = self.running[i];
            if self.seqs[slot as usize].missing() > 1 {
                self.push_frontier(slot);
            }
        }
        self.admit_below(now, missing);
    }

    /// Returns how many were passed over as they wait for a prefix.
    fn admit_below(&mut self, now: Duration, missing_max: u32) -> u64 {
        let (mut passed_over, mut waits) = (0, 0);
        self.waiting.begin_step();
        self.growth = self.running_growth();
        while self.running.len() < self.config.running_max as usize && passed_over < LOOKED_AT_MAX {
            let standing = |slot: u32| {
                let seq = &self.seqs[slot as usize];
                Standing { priority: seq.priority, waited: now.saturating_sub(seq.info.arrived) }
            };
            let Some(slot) = self.waiting.next(self.config.ageing, standing) else {
                break;
            };
            let awaits = self.awaits_prefix(slot);
            if awaits || self.awaits_logits(slot) || self.seqs[slot as usize].at_limit() {
                self.waiting.pass_over(self.seqs[slot as usize].tenant);
                passed_over += 1;
                waits += u64::from(awaits);
                continue;
            }
            let slot = self.longest_cached(slot, now);
            if self.missing(slot) >= missing_max || !self.try_admit(slot, now) {
                break;
            }
        }
        waits
    }

    /// Tokens that a waiting sequence would have to compute.
    fn missing(&mut self, slot: u32) -> u32 {
        let cached = self.see_cached(slot) * self.config.block_size;
        self.seqs[slot as usize].tokens().saturating_sub(cached)
    }

    /// Blocks that the running sequences will probably need beyond those that they have.
    fn running_growth(&self) -> u32 {
        if !self.config.reserve_output || self.waiting.is_empty() {
            return 0;
        }
        let growth = |&slot: &u32| self.seqs[slot as usize].growth(self.output_mean, self.config.block_size);
        self.running.iter().map(growth).fold(0, u32::saturating_add)
    }

    /// Whether somebody is computing the first block that this sequence doesn't find in the cache.
    fn awaits_prefix(&mut self, slot: u32) -> bool {
        if self.frontiers.is_empty() {
            return false;
        }
        let seen = self.see_cached(slot);
        let hashes = usable(&self.seqs[slot as usize], self.config.block_size);
        hashes.get(seen as usize).is_some_and(|hash| self.frontiers.contains(hash))
    }

    /// Whether this step may want no more logits of prompts, and the sequence has some to come.
    fn awaits_logits(&self, slot: u32) -> bool {
        self.logits_left == 0 && self.seqs[slot as usize].logits_from().is_some()
    }

    /// Whoever finds most of its prompt in the cache, of those who are next in `first`'s tenant and as important: what is cached
    /// now is used before it is pushed out, and sequences with one prefix run together. Nobody is passed by for longer
    /// than `ageing`; without ageing, arrival decides.
    fn longest_cached(&mut self, first: u32, now: Duration) -> u32 {
        let seq = &self.seqs[first as usize];
        let young = self.config.ageing.is_some_and(|ageing| now.saturating_sub(seq.info.arrived) < ageing);
        if !young || !self.config.prefix_cache || self.budget.tokens_left() == 0 {
            return first;
        }
        let (tenant, priority) = (seq.tenant, seq.priority);
        let mut best = (self.see_cached(first), first);
        for nth in 1..COMPARED_MAX {
            let Some(slot) = self.waiting.nth(tenant, nth) else { break };
            let seq = &self.seqs[slot as usize];
            if seq.priority == priority && !seq.at_limit() {
                let cached = self.see_cached(slot);
                if cached > best.0 && !self.awaits_logits(slot) && !self.awaits_prefix(slot) {
                    best = (cached, slot);
                }
            }
        }
        best.1
    }

    /// Leading blocks of a waiting sequence that are in the cache. It begins where it ended the last time: a cached block's
    /// predecessors are cached, too, since they are used whenever it is, and so are reused after it.
    fn see_cached(&mut self, slot: u32) -> u32 {
        let seq = &self.seqs[slot as usize];
        let hashes = usable(seq, self.config.block_size);
        let is_cached = |at: usize| hashes.get(at).is_some_and(|hash| self.pool.lookup(hash).is_some());
        let mut seen = seq.seen_cached as usize;
        if seen > 0 && !is_cached(seen - 1) {
            seen = 0;
        }
        while is_cached(seen) {
            seen += 1;
        }
        self.seqs[slot as usize].seen_cached = seen as u32;
        seen as u32
    }

    /// False, and nothing has changed, when tokens or blocks don't suffice.
    fn try_admit(&mut self, slot: u32, now: Duration) -> bool {
        let block_size = self.config.block_size;
        let seq = &self.seqs[slot as usize];
        let (mut hits, mut hits_free) = (0, 0);
        for hash in usable(seq, block_size) {
            let Some(block) = self.pool.lookup(hash) else {
                break;
            };
            hits += 1;
            hits_free += u32::from(self.pool.refs(block) == 0);
        }
        let missing = seq.tokens() - hits * block_size;
        let budget = self.budget.tokens(&self.pace, hits * block_size);
        if budget < missing.min(self.config.chunk_tokens_min) {
            return false;
        }
        let blocks_needed = seq.tokens().div_ceil(block_size) - hits;
        let growth = match self.config.reserve_output {
            true => seq.growth(self.output_mean, block_size),
            false => 0,
        };
        // Alone it can have everything, as `try_add` has checked.
        let left_free = match self.running.is_empty() {
            true => 0,
            false => u64::from(self.config.watermark_blocks()) + u64::from(self.growth) + u64::from(growth),
        };
        if u64::from(blocks_needed) + u64::from(hits_free) + left_free > u64::from(self.pool.free_blocks()) {
            return false;
        }

        self.growth = self.growth.saturating_add(growth);
        let tokens = seq.tokens();
        self.waiting.remove(seq.tenant, seq.rank, tokens);
        self.running.push(slot);
        let seq = &mut self.seqs[slot as usize];
        seq.phase = Phase::Running;
        for hash in &seq.hasher.hashes()[..hits as usize] {
            let block = self.pool.lookup(hash).expect("it was found above");
            self.pool.hold(block);
            seq.blocks.push(block);
        }
        for _ in 0..blocks_needed {
            seq.blocks.push(self.pool.try_alloc().expect("the free blocks were counted above"));
        }
        seq.computed = hits * block_size;
        seq.sealed = hits;
        if seq.info.started.is_none() {
            seq.info.started = Some(now);
            seq.info.cached_tokens = seq.computed;
            self.prefix_query_tokens += u64::from(tokens);
            self.prefix_hit_tokens += u64::from(seq.computed);
        }
        self.recomputed_tokens += u64::from(seq.computed_max.saturating_sub(seq.computed));
        let chunk = self.chunk(&self.seqs[slot as usize], budget);
        self.push_prefill(slot, chunk);
        true
    }
}

/// Blocks that a sequence may take from the cache: full ones, and never a token whose logits are wanted, as its last one.
fn usable(seq: &Seq, block_size: u32) -> &[forebay_types::BlockHash] {
    let blocks = seq.logits_from().unwrap_or(seq.tokens() - 1) / block_size;
    let hashes = seq.hasher.hashes();
    &hashes[..hashes.len().min(blocks as usize)]
}
