//! Sequences' lives: arrival, tokens, end.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use forebay_kv::{BlockHasher, KvEvent};
use forebay_types::{BlockHash, ConsumerName, TokenId};

use crate::budget::PrefillBudget;
use crate::pace::{Load, Pace};
use crate::pool::FullBlock;
use crate::queue::{OUTPUT_WEIGHT, WaitingQueue, rank};
use crate::seq::{Phase, Seq};
use crate::{AddError, BlockPool, NewSeq, SchedulerConfig, SeqId, SeqInfo, StepPlan};

/// Weight of the newest output in their mean length: about the last twenty count.
const OUTPUT_NEWEST: f64 = 0.1;

/// A sequence was queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Added {
    /// Sequences of the same tenant that are before it in the queue.
    pub ahead: u32,
}

/// What a new token means for its sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenOutcome {
    /// The next step continues it.
    Continue,
    /// This was the last token that it may have: [`Scheduler::finish`] it. Until then it keeps its KV blocks.
    LengthReached,
    /// No such sequence, or it already has all its tokens; the token is dropped.
    Ignored,
}

/// Decides, step by step, which tokens of which sequences are computed, and in which KV blocks. Pure.
///
/// Contract: a plan is executed before the next [`Scheduler::plan_step`], or [`Scheduler::on_step_failed`] says that
/// it was not; plans are executed in order. Sequences may be added, finished and aborted at any time.
///
/// `now` is the time since any fixed moment that the caller chooses, and never goes back.
pub struct Scheduler {
    pub(crate) config: SchedulerConfig,
    pub(crate) pool: BlockPool,
    /// Indexed by slot; a slot is reused, with its memory, when its sequence has ended.
    pub(crate) seqs: Vec<Seq>,
    pub(crate) slots_free: Vec<u32>,
    pub(crate) slots: HashMap<SeqId, u32>,
    /// What a free slot holds: one for all, as an empty one allocates, too.
    pub(crate) no_prompt: Arc<[TokenId]>,
    pub(crate) waiting: WaitingQueue,
    /// Slots that hold blocks, in order of admission.
    pub(crate) running: Vec<u32>,
    pub(crate) plan: StepPlan,
    /// What is left for prefill; valid within one `plan_step`.
    pub(crate) budget: PrefillBudget,
    /// Logits of prompt tokens that this plan may still want.
    pub(crate) logits_left: u32,
    pub(crate) pace: Pace,
    /// Tokens of prefill in the last step that had any beside decodes.
    pub(crate) prefill_beside: u32,
    /// The next block of each sequence that is computing blocks others could use; valid within one `plan_step`.
    pub(crate) frontiers: Vec<BlockHash>,
    /// Mean output length of the sequences that finished, the latest weighing most; 0 before the first.
    pub(crate) output_mean: f64,
    /// Blocks that admission leaves to the running sequences' expected output; valid within one `plan_step`.
    pub(crate) growth: u32,
    pub(crate) arrivals: u64,
    pub(crate) preemptions: u64,
    pub(crate) prefix_query_tokens: u64,
    pub(crate) prefix_hit_tokens: u64,
    pub(crate) prefix_waits: u64,
    pub(crate) recomputed_tokens: u64,
}

impl fmt::Debug for Scheduler {
    /// Without the sequences: their tokens are the clients'.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scheduler")
            .field("config", &self.config)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// Output tokens for whose hashes there is room from the start; a longer output makes room as it comes.
const RESERVED_OUTPUT_MAX: u32 = 4096;

impl Scheduler {
    /// Values of `config` at which nothing could run are moved to the nearest at which something can.
    pub fn new(config: SchedulerConfig) -> Self {
        let config = config.normalized();
        let seqs_max = config.unfinished_max as usize;
        // Large limits are no reason to take memory now.
        let reserve = seqs_max.min(4096);
        Self {
            pool: BlockPool::new(config.blocks, config.block_size, config.kv_events && config.prefix_cache),
            seqs: Vec::with_capacity(reserve),
            slots_free: Vec::with_capacity(reserve),
            slots: HashMap::with_capacity(reserve),
            no_prompt: Arc::new([]),
            waiting: WaitingQueue::default(),
            running: Vec::with_capacity((config.running_max as usize).min(4096)),
            plan: StepPlan::with_room(config.running_max, config.step_tokens_max, config.blocks),
            budget: PrefillBudget::default(),
            logits_left: config.prompt_logits_max,
            pace: Pace::default(),
            prefill_beside: 0,
            frontiers: Vec::with_capacity((config.running_max as usize).min(4096)),
            output_mean: 0.0,
            growth: 0,
            arrivals: 0,
            preemptions: 0,
            prefix_query_tokens: 0,
            prefix_hit_tokens: 0,
            prefix_waits: 0,
            recomputed_tokens: 0,
            config,
        }
    }

    /// The limits in force.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Tokens that one sequence can have, prompt and output: `model_len_max`, or less where KV blocks are few.
    /// Whoever fills in a missing `max_tokens` uses this.
    pub fn seq_tokens_max(&self) -> u32 {
        self.config.seq_tokens_max()
    }

    /// Queues a sequence, or says which limit forbids it. O(prompt): it hashes the prompt's blocks.
    pub fn try_add(&mut self, now: Duration, new: NewSeq) -> Result<Added, AddError> {
        let max_new_tokens = self.check(&new)?;
        let rank = rank(&self.config, &new, now, self.arrivals);
        self.arrivals += 1;
        let tenant = self.waiting.enter(&new.tenant);

        let slot = match self.slots_free.pop() {
            Some(slot) => slot,
            None => {
                self.seqs.push(self.blank_seq(&new, rank));
                (self.seqs.len() - 1) as u32
            }
        };
        let seq = &mut self.seqs[slot as usize];
        seq.id = new.id;
        seq.tenant = tenant;
        seq.charged = 0;
        seq.phase = Phase::Waiting;
        seq.priority = new.priority;
        seq.rank = rank;
        seq.generated.clear();
        seq.max_new_tokens = max_new_tokens;
        seq.computed_max = 0;
        seq.seen_cached = 0;
        seq.prompt_logits = new.prompt_logits;
        seq.hasher.restart(new.cache_salt);
        if self.config.prefix_cache {
            seq.hasher.reserve(new.prompt.len() + max_new_tokens.min(RESERVED_OUTPUT_MAX) as usize);
            seq.hasher.extend(&new.prompt);
        }
        seq.info = SeqInfo {
            prompt_tokens: new.prompt.len() as u32,
            generated_tokens: 0,
            cached_tokens: 0,
            preemptions: 0,
            arrived: now,
            started: None,
        };
        seq.prompt = new.prompt;
        let tokens = seq.tokens();
        self.slots.insert(new.id, slot);
        let ahead = self.waiting.insert(tenant, rank, slot, tokens) as u32;
        Ok(Added { ahead })
    }

    /// Appends a sampled token. Call it once per row of the plan that ends with the sequence's last known token, before
    /// the next plan.
    pub fn on_token(&mut self, id: SeqId, token: TokenId) -> TokenOutcome {
        let Some(&slot) = self.slots.get(&id) else {
            return TokenOutcome::Ignored;
        };
        let seq = &mut self.seqs[slot as usize];
        // A waiting sequence has nothing in flight: a token for it belongs to a plan before its preemption, whose
        // turn has passed.
        if seq.at_limit() || seq.phase == Phase::Waiting {
            return TokenOutcome::Ignored;
        }
        seq.generated.push(token);
        self.waiting.charge(seq.tenant, OUTPUT_WEIGHT);
        seq.info.generated_tokens += 1;
        if self.config.prefix_cache {
            seq.hasher.push(token);
        }
        if seq.at_limit() { TokenOutcome::LengthReached } else { TokenOutcome::Continue }
    }

    /// Ends a sequence: its blocks are free at once, its full blocks stay in the cache. `None` if there is none.
    pub fn finish(&mut self, id: SeqId) -> Option<SeqInfo> {
        let info = self.abort(id)?;
        let generated = f64::from(info.generated_tokens);
        let weight = if self.output_mean > 0.0 { OUTPUT_NEWEST } else { 1.0 };
        self.output_mean += weight * (generated - self.output_mean);
        Some(info)
    }

    /// Ends a sequence whose client has left; the next plan doesn't contain it. Its row of a plan that is being
    /// executed is computed for the cache only. `None` if there is none.
    pub fn abort(&mut self, id: SeqId) -> Option<SeqInfo> {
        let slot = self.slots.remove(&id)?;
        match self.seqs[slot as usize].phase {
            Phase::Running => {
                self.commit(slot);
                self.running.retain(|s| *s != slot);
                self.release_blocks(slot);
            }
            Phase::Waiting => {
                let seq = &self.seqs[slot as usize];
                self.waiting.remove(seq.tenant, seq.rank, seq.tokens());
            }
        }
        let seq = &mut self.seqs[slot as usize];
        self.waiting.leave(seq.tenant);
        seq.prompt = self.no_prompt.clone(); // the prompt goes now, not when the slot is reused
        self.slots_free.push(slot);
        Some(seq.info)
    }

    /// The last plan was executed, and took `elapsed`. What [`SchedulerConfig::itl_slo`] is kept by; without it, no call
    /// is needed.
    pub fn on_step_done(&mut self, elapsed: Duration) {
        if self.plan.is_empty() {
            return;
        }
        let load = Load::of(&self.plan);
        self.pace.learn(load, elapsed);
        if load.decodes > 0 && load.prefill_tokens > 0 {
            self.prefill_beside = load.prefill_tokens;
        }
    }

    /// What the last plan should take, by what earlier ones took. `None` before the first [`Scheduler::on_step_done`].
    pub fn expected_step(&self) -> Option<Duration> {
        let known = self.pace.is_known() && !self.plan.is_empty();
        known.then(|| Duration::from_secs_f64(self.pace.seconds(Load::of(&self.plan))))
    }

    /// The last plan was not executed: nothing of it counts as computed, and the next plan contains it again. Call
    /// it before finishing or aborting any of its sequences.
    pub fn on_step_failed(&mut self) {
        for &slot in &self.running {
            self.seqs[slot as usize].scheduled = 0;
        }
    }

    /// Forgets the prefix cache. Running sequences keep their blocks and go on.
    pub fn clear_cache(&mut self) {
        self.pool.clear_cache();
    }

    /// `None` if there is no such sequence.
    pub fn info(&self, id: SeqId) -> Option<SeqInfo> {
        self.slots.get(&id).map(|&slot| self.seqs[slot as usize].info)
    }

    /// Whether any sequence is queued or running.
    pub fn has_work(&self) -> bool {
        !self.slots.is_empty()
    }

    /// Appends what has happened to the prefix cache since the last call, in order. Without `kv_events`, nothing.
    pub fn drain_events(&mut self, out: &mut Vec<KvEvent>) {
        self.pool.drain_events(out);
    }

    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// What a tenant was given: prompt tokens computed for it, and twice the tokens generated. A tenant that comes back
    /// to the queue is lifted to the least served one there. `None` where it is not known, or not any more.
    pub fn served(&self, tenant: &ConsumerName) -> Option<u64> {
        self.waiting.served(tenant)
    }

    /// Returns the output tokens that the sequence may have.
    fn check(&self, new: &NewSeq) -> Result<u32, AddError> {
        let config = &self.config;
        let prompt_tokens = new.prompt.len();
        if prompt_tokens == 0 {
            return Err(AddError::EmptyPrompt);
        }
        if prompt_tokens >= config.model_len_max as usize {
            return Err(AddError::PromptTooLong { prompt_tokens, limit: config.model_len_max });
        }
        let max_new_tokens = new.max_new_tokens.clamp(1, config.model_len_max - prompt_tokens as u32);
        let tokens = prompt_tokens as u64 + u64::from(max_new_tokens);
        let kv_tokens = u64::from(config.blocks) * u64::from(config.block_size);
        if tokens - 1 > kv_tokens {
            return Err(AddError::NeverFits { tokens, limit: kv_tokens });
        }
        if self.slots.contains_key(&new.id) {
            return Err(AddError::DuplicateId { id: new.id });
        }
        if self.slots.len() >= config.unfinished_max as usize {
            return Err(AddError::QueueFull { limit: config.unfinished_max, drain_in: self.drain_in() });
        }
        let waiting = self.waiting.tokens();
        if !self.waiting.is_empty() && waiting + prompt_tokens as u64 > config.waiting_tokens_max {
            let (limit, drain_in) = (config.waiting_tokens_max, self.drain_in());
            return Err(AddError::QueueTokensFull { waiting, limit, drain_in });
        }
        Ok(max_new_tokens)
    }

    fn blank_seq(&self, new: &NewSeq, rank: crate::queue::Rank) -> Seq {
        Seq {
            id: new.id,
            phase: Phase::Waiting,
            priority: new.priority,
            rank,
            tenant: 0,
            prompt: self.no_prompt.clone(),
            generated: Vec::new(),
            max_new_tokens: 0,
            prompt_logits: false,
            hasher: BlockHasher::new(self.config.block_size as usize, None),
            blocks: Vec::new(),
            computed: 0,
            scheduled: 0,
            sealed: 0,
            seen_cached: 0,
            computed_max: 0,
            charged: 0,
            info: SeqInfo {
                prompt_tokens: 0,
                generated_tokens: 0,
                cached_tokens: 0,
                preemptions: 0,
                arrived: Duration::ZERO,
                started: None,
            },
        }
    }

    /// The last plan was executed: what it computed of this sequence counts, and blocks that became full are cached.
    pub(crate) fn commit(&mut self, slot: u32) {
        let block_size = self.config.block_size;
        let seq = &mut self.seqs[slot as usize];
        seq.computed += std::mem::take(&mut seq.scheduled);
        seq.computed_max = seq.computed_max.max(seq.computed);
        if !self.config.prefix_cache {
            return;
        }
        while (seq.sealed + 1) * block_size <= seq.computed {
            let at = seq.sealed as usize;
            let full = FullBlock {
                parent: at.checked_sub(1).map(|before| seq.hasher.hashes()[before]),
                tokens: seq.token_range(seq.sealed * block_size..(seq.sealed + 1) * block_size),
                cache_salt: seq.hasher.cache_salt(),
            };
            seq.blocks[at] = self.pool.seal(seq.blocks[at], seq.hasher.hashes()[at], &full);
            seq.sealed += 1;
        }
    }

    /// Gives back all blocks of a sequence and forgets what it has computed.
    pub(crate) fn release_blocks(&mut self, slot: u32) {
        let seq = &mut self.seqs[slot as usize];
        while let Some(block) = seq.blocks.pop() {
            self.pool.release(block);
        }
        seq.computed = 0;
        seq.scheduled = 0;
        seq.sealed = 0;
        seq.seen_cached = 0;
    }
}
