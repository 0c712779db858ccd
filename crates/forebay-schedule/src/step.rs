//! Planning one step.
//!
//! 1. What the last plan computed becomes fact.
//! 2. Room: decoding sequences that start a new block get it, if need be by preempting others.
//! 3. Rows: one token per decoding sequence, then prefill chunks of those who run; a newcomer with much less to compute than
//!    they have left goes before them, with half of the step.
//! 4. Admission: newcomers fill the rest of the step, unless somebody was just preempted.
//!
//! The scheme is vLLM V1's (chunked prefill mixed with decode; preemption by recomputing), with another choice of
//! victim, and with newcomers waiting for a prefix that is being computed.

use std::time::Duration;

use crate::seq::Seq;
use crate::{Scheduler, StepPlan};

impl Scheduler {
    /// Plans one forward pass. Pure: same calls before, same `now`, same plan.
    ///
    /// Rows are in this order: sequences that decode (one token each), prefills.
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
        self.plan_running(now, !preempted);
        if !preempted {
            self.admit(now);
        }
        &self.plan
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
        self.logits_left = self.config.prompt_logits_max;
    }

    /// Rows for all that run. `running_max <= step_tokens_max`, so there is at least one token for each.
    fn plan_running(&mut self, now: Duration, admitting: bool) {
        let (mut prefills, mut longest, mut shortest) = (0, 0, (u32::MAX, 0));
        for i in 0..self.running.len() {
            let slot = self.running[i];
            match self.seqs[slot as usize].missing() {
                0 => {}
                1 => self.push_row(slot, 1),
                missing => {
                    prefills += 1;
                    longest = longest.max(missing);
                    shortest = shortest.min((missing, slot));
                }
            }
        }
        self.budget = self.prefill_budget(prefills);
        if prefills == 0 {
            return;
        }
        // Who is done sooner has half: a short prompt doesn't wait for the end of a long one, and that one isn't starved.
        let overtakes = prefills > 1 && shortest.0 < longest;
        let others = prefills - u32::from(overtakes);
        let half = self.budget.split(others, self.config.chunk_tokens_min);
        let mut rest = std::mem::replace(&mut self.budget, half);
        if overtakes {
            self.plan_chunk(shortest.1, 0);
        } else if admitting {
            // Nearly as long: together, both would be done later than the first alone.
            self.admit_shorter(now, longest / 2);
        }
        rest.join(self.budget);
        self.budget = rest;
        let mut others = others;
        for i in 0..self.running.len() {
            let slot = self.running[i];
            let seq = &self.seqs[slot as usize];
            if seq.missing() > 1 && seq.scheduled == 0 {
                others -= 1;
                self.plan_chunk(slot, others);
            }
        }
    }

    /// A chunk of a running prefill, of at least a token, that leaves `others` a token each.
    fn plan_chunk(&mut self, slot: u32, others: u32) {
        let seq = &self.seqs[slot as usize];
        let tokens = self.budget.tokens(&self.pace, seq.computed).min(self.budget.tokens_left() - others);
        let chunk = self.chunk(seq, tokens.max(1));
        self.push_prefill(slot, chunk);
    }

    /// Tokens to compute of a sequence that may have `budget` of them. A chunk that is not the last ends with a full
    /// block where that doesn't halve it: blocks then become shareable as early as possible.
    pub(crate) fn chunk(&self, seq: &Seq, budget: u32) -> u32 {
        let missing = seq.missing();
        let mut chunk = missing.min(budget).min(self.config.chunk_tokens_max);
        if let Some(from) = seq.logits_from() {
            chunk = chunk.min(self.logits_left.max(1).saturating_add(from - seq.computed));
        }
        if chunk == missing {
            return chunk;
        }
        let aligned = (seq.computed + chunk) / self.config.block_size * self.config.block_size;
        match aligned.saturating_sub(seq.computed) {
            shorter if shorter * 2 > chunk => shorter,
            _ => chunk,
        }
    }

    /// Adds a chunk of prefill to the plan, and takes it out of the budget.
    pub(crate) fn push_prefill(&mut self, slot: u32, tokens: u32) {
        self.budget.spend(&self.pace, self.seqs[slot as usize].computed, tokens);
        self.push_row(slot, tokens);
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
        let last = plan.token_ids.len() as u32 - 1;
        if let Some(from) = seq.logits_from() {
            let (from, to) = (from.max(start), end.min(seq.prompt.len() as u32 - 1));
            plan.logit_tokens.extend((from..to).map(|position| last + 1 - (end - position)));
            self.logits_left = self.logits_left.saturating_sub(to.saturating_sub(from));
        }
        if end == seq.tokens() {
            plan.logit_tokens.push(last);
        }
        self.push_frontier(slot);
    }

    /// The block that this sequence computes next, where its tokens are known to the end of it: others had better wait for
    /// it.
    pub(crate) fn push_frontier(&mut self, slot: u32) {
        let seq = &self.seqs[slot as usize];
        if self.config.prefix_cache
            && let Some(next) = seq.hasher.hashes().get(seq.sealed as usize)
        {
            self.frontiers.push(*next);
        }
    }
}

#[cfg(test)]
mod tests;
