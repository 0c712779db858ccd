//! One sequence: a prompt, what it has generated, and where its KV is.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use forebay_kv::{BlockHasher, CacheSalt};
use forebay_types::{ConsumerName, TokenId};

use crate::SeqId;
use crate::queue::Rank;

/// A sequence to be scheduled: one choice of one request.
#[derive(Clone)]
pub struct NewSeq {
    /// Unique among the sequences that the scheduler knows.
    pub id: SeqId,
    pub prompt: Arc<[TokenId]>,
    /// Output tokens at most; 0 counts as 1, and the model's limit applies as well.
    pub max_new_tokens: u32,
    /// Shares cached prefixes only with equal salts.
    pub cache_salt: Option<CacheSalt>,
    /// Higher is more urgent; 0 is ordinary. (vLLM's request field counts the other way: negate it.)
    pub priority: i32,
    /// Who asks, for fairness between tenants.
    pub tenant: ConsumerName,
    /// The logits of every prompt token but the last are wanted too. The cached prefix is not taken then, as logits are
    /// not cached; what is computed is cached for others.
    pub prompt_logits: bool,
}

impl fmt::Debug for NewSeq {
    /// Without the prompt: it is the client's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewSeq")
            .field("id", &self.id)
            .field("prompt_tokens", &self.prompt.len())
            .field("max_new_tokens", &self.max_new_tokens)
            .field("cache_salt", &self.cache_salt)
            .field("priority", &self.priority)
            .field("tenant", &self.tenant)
            .field("prompt_logits", &self.prompt_logits)
            .finish()
    }
}

/// What a sequence has used so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeqInfo {
    pub prompt_tokens: u32,
    pub generated_tokens: u32,
    /// Prompt tokens that were not computed because their blocks were cached when the sequence first ran. What it
    /// finds again after a preemption is not counted: the client has nothing from it.
    pub cached_tokens: u32,
    pub preemptions: u32,
    /// `now` of `try_add`.
    pub arrived: Duration,
    /// `now` of the first step that computed a token of it; `None` while it has only waited.
    pub started: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Waiting,
    Running,
}

pub(crate) struct Seq {
    pub(crate) id: SeqId,
    pub(crate) phase: Phase,
    pub(crate) priority: i32,
    pub(crate) rank: Rank,
    /// The queue's number for its tenant.
    pub(crate) tenant: u32,
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) generated: Vec<TokenId>,
    pub(crate) max_new_tokens: u32,
    pub(crate) prompt_logits: bool,
    pub(crate) hasher: BlockHasher,
    /// Its KV blocks, oldest first; empty while it waits.
    pub(crate) blocks: Vec<u32>,
    /// Tokens whose KV is in `blocks`.
    pub(crate) computed: u32,
    /// Tokens that the last plan adds to `computed`.
    pub(crate) scheduled: u32,
    /// The most that `computed` has been; after a preemption, more than `computed`.
    pub(crate) computed_max: u32,
    /// Prompt tokens that its tenant has been charged for, or that were cached.
    pub(crate) charged: u32,
    /// Leading blocks that are in the prefix cache.
    pub(crate) sealed: u32,
    /// While waiting: leading blocks seen in the cache, so that looking again starts there.
    pub(crate) seen_cached: u32,
    pub(crate) info: SeqInfo,
}

impl Seq {
    /// Tokens known: prompt and generated.
    pub(crate) fn tokens(&self) -> u32 {
        (self.prompt.len() + self.generated.len()) as u32
    }

    /// Whether it has all the output that it may have, so that nothing of it needs computing.
    pub(crate) fn at_limit(&self) -> bool {
        self.generated.len() >= self.max_new_tokens as usize
    }

    /// Known tokens whose KV is not computed.
    pub(crate) fn missing(&self) -> u32 {
        if self.at_limit() { 0 } else { self.tokens() - self.computed }
    }

    /// The next prompt token whose logits are wanted: none of those before `computed_max` are, they were given already.
    pub(crate) fn logits_from(&self) -> Option<u32> {
        let from = self.computed_max.max(self.computed);
        (self.prompt_logits && from + 1 < self.prompt.len() as u32).then_some(from)
    }

    /// Blocks that it needs to compute all its known tokens, and doesn't have.
    pub(crate) fn blocks_missing(&self, block_size: u32) -> u32 {
        if self.at_limit() {
            return 0;
        }
        self.tokens().div_ceil(block_size).saturating_sub(self.blocks.len() as u32)
    }

    /// Blocks more than its known tokens need, when its output becomes `output_mean` tokens long, or what it may have.
    pub(crate) fn growth(&self, output_mean: f64, block_size: u32) -> u32 {
        let output = self.max_new_tokens.min(output_mean as u32);
        // The last token is never computed.
        let end = self.prompt.len() as u32 + output.saturating_sub(1);
        end.div_ceil(block_size).saturating_sub(self.tokens().div_ceil(block_size))
    }

    /// Whether at most a tenth of its output is missing, if it becomes as long as it may.
    pub(crate) fn near_end(&self) -> bool {
        let left = self.max_new_tokens.saturating_sub(self.generated.len() as u32);
        left <= self.max_new_tokens / 10
    }

    /// The known tokens of `range`, in two pieces: prompt, then generated.
    pub(crate) fn token_range(&self, range: Range<u32>) -> [&[TokenId]; 2] {
        let (start, end) = (range.start as usize, range.end as usize);
        let prompt = self.prompt.len();
        [
            &self.prompt[start.min(prompt)..end.min(prompt)],
            &self.generated[start.max(prompt) - prompt..end.max(prompt) - prompt],
        ]
    }
}
