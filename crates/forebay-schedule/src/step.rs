//! Planning one step.
//!
//! 1. What the last plan computed becomes fact.
//! 2. Room: decoding sequences that start a new block get it, if need be by preempting others.
//! 3. Rows: one token per decoding sequence, then prefill chunks of those who run.
//! 4. Admission: newcomers fill the rest of the step, unless somebody was just preempted.
//!
//! The scheme is vLLM V1's (chunked prefill mixed with decode; preemption by recomputing), with another choice of
//! victim, and with newcomers waiting for a prefix that is being computed.

use std::cmp::Reverse;
use std::time::Duration;

use crate::queue::Standing;
use crate::seq::{Phase, Seq};
use crate::{Scheduler, StepPlan};

/// Waiting sequences looked at in one step beyond those admitted: bounds the step when many wait for one prefix.
const LOOKED_AT_MAX: usize = 64;

/// A sequence preempted this often is a victim only after all who were not: everybody gets to the end.
const PREEMPTIONS_FAIR: u32 = 2;

/// Prefill beside decodes is cut to multiples of this.
const PREFILL_STEP: u32 = 32;

impl Scheduler {
    /// Plans one forward pass. Pure: same calls before, same `now`, same plan.
    ///
    /// Rows are in this order: sequences that decode (one token each), running prefills, newcomers.
    ///
    /// Holds on return: `tokens() <= step_tokens_max`; every running sequence with something to compute has a row;
    /// a block is written by at most one row, and no row reads a block that another row of this plan writes. The plan
    /// is empty only when no sequence has anything to compute. (One that waits for its `on_token` has not.)
    ///
    /// O(R + T / B) and a constant number of waiting sequences; each admission costs O(prompt / B). Allocates nothing
    /// once its vectors have grown.
    pub fn plan_step(&mut self, now: Duration) -> &StepPlan {
        for i in 0..self.running.len() {
            self.commit(self.running[i]);
        }
        let preempted = self.make_room();
        self.plan_begin();
        self.plan_running();
        if !preempted {
            self.admit(now);
        }
        &self.plan
    }

    /// Gives every running sequence the blocks for its known tokens. Returns whether it had to preempt.
    ///
    /// It ends with everybody served: each round has one sequence less, and the last one alone fits, as `try_add`
    /// has checked.
    fn make_room(&mut self) -> bool {
        let block_size = self.config.block_size;
        let mut preempted = false;
        loop {
            let missing: u32 =
                self.running.iter().map(|&s| self.seqs[s as usize].blocks_missing(block_size)).sum();
            if missing <= self.pool.free_blocks() {
                break;
            }
            let Some(victim) = self.victim() else {
                break;
            };
            self.preempt(victim);
            preempted = true;
        }
        for i in 0..self.running.len() {
            let slot = self.running[i] as usize;
            for _ in 0..self.seqs[slot].blocks_missing(block_size) {
                let block = self.pool.try_alloc().expect("the free blocks were counted above");
                self.seqs[slot].blocks.push(block);
            }
        }
        preempted
    }

    /// Index in `running` of the sequence to preempt: the least important, then the cheapest to recompute, then the
    /// youngest.
    ///
    /// Cheapest first wastes far less work than last in, first out (vLLM RFC #54644 measures 24 to 59 % fewer wasted
    /// tokens). Twice preempted or near its end, a sequence is spared while there is another victim; with
    /// ageing this counts more than priority, so that nobody is preempted for ever.
    fn victim(&self) -> Option<usize> {
        let cost = |seq: &Seq| {
            let fair = seq.info.preemptions >= PREEMPTIONS_FAIR || seq.near_end();
            let (first, second) = match self.config.ageing {
                Some(_) => (i64::from(fair), i64::from(seq.priority)),
                None => (i64::from(seq.priority), i64::from(fair)),
            };
            (first, second, self.recompute_tokens(seq), Reverse(seq.rank))
        };
        (0..self.running.len()).min_by_key(|&i| cost(&self.seqs[self.running[i] as usize]))
    }

    /// Tokens that would have to be computed again, at worst: those in blocks that nobody else holds. Shared blocks
    /// are a sequence's first ones, so the walk ends at the last of them.
    fn recompute_tokens(&self, seq: &Seq) -> u32 {
        let own = seq.blocks.iter().rev().take_while(|block| self.pool.refs(**block) == 1).count();
        let shared = (seq.blocks.len() - own) as u32;
        seq.computed.saturating_sub(shared * self.config.block_size)
    }

    /// Back to the queue, to where it stood by its rank. Its full blocks stay cached until somebody needs them, so it
    /// often finds most of them again.
    fn preempt(&mut self, running: usize) {
        let slot = self.running.remove(running);
        self.release_blocks(slot);
        let seq = &mut self.seqs[slot as usize];
        seq.phase = Phase::Waiting;
        seq.info.preemptions += 1;
        self.waiting.insert(seq.tenant, seq.rank, slot, seq.tokens());
        self.preemptions += 1;
    }

    fn plan_begin(&mut self) {
        let plan = &mut self.plan;
        plan.seqs.clear();
        plan.token_ids.clear();
        plan.positions.clear();
        plan.row_starts.clear();
        plan.row_starts.push(0);
        plan.block_tables.clear();
        plan.table_starts.clear();
        plan.table_starts.push(0);
        plan.logit_tokens.clear();
        self.frontiers.clear();
    }

    /// Rows for all that run. `running_max <= step_tokens_max`, so there is at least one token for each.
    fn plan_running(&mut self) {
        let mut prefills = 0;
        self.step_tokens = self.config.step_tokens_max;
        for i in 0..self.running.len() {
            let slot = self.running[i];
            match self.seqs[slot as usize].missing() {
                0 => {}
                1 => self.push_row(slot, 1),
                _ => prefills += 1,
            }
        }
        self.bound_prefill(prefills);
        if prefills == 0 {
            return;
        }
        for i in 0..self.running.len() {
            let slot = self.running[i];
            let seq = &self.seqs[slot as usize];
            if seq.missing() > 1 && seq.scheduled == 0 {
                prefills -= 1;
                let chunk = self.chunk(seq, self.tokens_left() - prefills);
                self.push_row(slot, chunk);
            }
        }
    }

    /// Cuts the prefill that may stand beside the decodes planned so far to what fits into the time for a step. Each of
    /// the `prefills` that run has its token whatever that is.
    fn bound_prefill(&mut self, prefills: u32) {
        let decodes = self.plan.tokens() as u32;
        let Some(slo) = self.config.itl_slo.filter(|_| decodes > 0) else { return };
        let config = &self.config;
        // Before anything is known, a cautious step brings the knowledge.
        let fits = self.pace.prefill_tokens(slo).unwrap_or(2 * config.chunk_tokens_min);
        // Whole multiples compute faster, and blocks end with them.
        let fits = fits / PREFILL_STEP * PREFILL_STEP;
        let bound = fits.max(config.chunk_tokens_min).max(prefills);
        self.step_tokens = config.step_tokens_max.min(decodes.saturating_add(bound));
    }

    fn tokens_left(&self) -> u32 {
        self.step_tokens.saturating_sub(self.plan.tokens() as u32)
    }

    /// Tokens to compute of a sequence that may have `budget` of them. A chunk that is not the last ends with a full
    /// block where that doesn't halve it: blocks then become shareable as early as possible.
    fn chunk(&self, seq: &Seq, budget: u32) -> u32 {
        let missing = seq.missing();
        let chunk = missing.min(budget).min(self.config.chunk_tokens_max);
        if chunk == missing {
            return chunk;
        }
        let aligned = (seq.computed + chunk) / self.config.block_size * self.config.block_size;
        match aligned.saturating_sub(seq.computed) {
            shorter if shorter * 2 > chunk => shorter,
            _ => chunk,
        }
    }

    /// Admits in the queue's order while there are tokens, places and blocks.
    ///
    /// A sequence is admitted when its whole prompt fits, now, beside the output to be expected: otherwise it would hold blocks and be preempted before
    /// it brings anything. The first that doesn't fit ends admission, else small ones would pass it for ever. One
    /// whose next block is being computed by another is passed over instead; it waits as long as the other prefills.
    fn admit(&mut self, now: Duration) {
        let mut passed_over = 0;
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
            if self.seqs[slot as usize].at_limit() || self.awaits_prefix(slot) {
                self.waiting.pass_over(self.seqs[slot as usize].tenant);
                passed_over += 1;
                continue;
            }
            if !self.try_admit(slot, now) {
                break;
            }
        }
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
        let seq = &self.seqs[slot as usize];
        let hashes = usable(seq, self.config.block_size);
        let mut seen = seq.seen_cached as usize;
        // Whoever computes this chain holds all of it up to there, so what was seen is still cached. Should they have
        // gone, nobody's next block matches, and admission looks again from the start.
        while hashes.get(seen).is_some_and(|hash| self.pool.lookup(hash).is_some()) {
            seen += 1;
        }
        let awaits = hashes.get(seen).is_some_and(|hash| self.frontiers.contains(hash));
        self.seqs[slot as usize].seen_cached = seen as u32;
        self.prefix_waits += u64::from(awaits);
        awaits
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
        let budget = self.tokens_left();
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
        self.push_row(slot, chunk);
        true
    }

    /// Adds the next `tokens` of a sequence to the plan.
    fn push_row(&mut self, slot: u32, tokens: u32) {
        let block_size = self.config.block_size;
        let seq = &mut self.seqs[slot as usize];
        let (start, end) = (seq.computed, seq.computed + tokens);
        seq.scheduled = tokens;
        // Neither what is computed again after a preemption nor a failed step's second try is the tenant's fault.
        let charge_to = end.min(seq.prompt.len() as u32);
        self.waiting.charge(seq.tenant, u64::from(charge_to.saturating_sub(start.max(seq.charged))));
        seq.charged = seq.charged.max(charge_to);

        let plan = &mut self.plan;
        plan.seqs.push(seq.id);
        for piece in seq.token_range(start..end) {
            plan.token_ids.extend_from_slice(piece);
        }
        plan.positions.extend(start..end);
        plan.row_starts.push(plan.token_ids.len() as u32);
        plan.block_tables.extend_from_slice(&seq.blocks[..end.div_ceil(block_size) as usize]);
        plan.table_starts.push(plan.block_tables.len() as u32);
        if end == seq.tokens() {
            plan.logit_tokens.push(plan.token_ids.len() as u32 - 1);
        }
        // Its tokens are known to the end of this block, and the block is not cached: others had better wait for it.
        if self.config.prefix_cache
            && let Some(next) = seq.hasher.hashes().get(seq.sealed as usize)
        {
            self.frontiers.push(*next);
        }
    }
}

/// Blocks that a sequence may take from the cache: full ones, and never its last token, whose logits are wanted.
fn usable(seq: &Seq, block_size: u32) -> &[forebay_types::BlockHash] {
    let blocks = (seq.tokens() - 1) / block_size;
    let hashes = seq.hasher.hashes();
    &hashes[..hashes.len().min(blocks as usize)]
}

#[cfg(test)]
mod tests;
