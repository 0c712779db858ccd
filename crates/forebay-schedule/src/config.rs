//! The scheduler's limits.

use std::time::Duration;

/// Limits and choices of one scheduler. The engine's config fills it in; nothing here is read from a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Tokens per KV block. Part of every block hash: replicas that share an index need the same.
    pub block_size: u32,
    /// KV blocks that exist.
    pub blocks: u32,
    /// Tokens of one forward pass, prefill and decode together. Higher: prefill is more efficient, and everybody
    /// who decodes waits longer for the next token.
    pub step_tokens_max: u32,
    /// Sequences that hold KV blocks at once; at most `step_tokens_max`, so that each gets a token every step.
    pub running_max: u32,
    /// Sequences that wait or run, as vLLM counts them. More are refused.
    pub unfinished_max: u32,
    /// Prompt tokens that wait, in all. More are refused, except that an empty queue takes any prompt that fits.
    pub waiting_tokens_max: u64,
    /// Prompt and output of one sequence, in tokens.
    pub model_len_max: u32,
    /// Reuse the KV blocks of equal prefixes.
    pub prefix_cache: bool,
    /// Record [`forebay_kv::KvEvent`]s; somebody must drain them.
    pub kv_events: bool,
    /// A newcomer starts only when it gets this many tokens in the step, or all that it misses: below that, a pass
    /// costs more than it brings.
    pub chunk_tokens_min: u32,
    /// Prefill tokens of one sequence in one step. Below `step_tokens_max` it lets short prompts pass long ones.
    pub chunk_tokens_max: u32,
    /// Logits of prompt tokens in one step, for sequences that want them ([`NewSeq::prompt_logits`](crate::NewSeq)): bounds
    /// the memory that a step's logits take. A prompt is prefilled in chunks of so many tokens, at most; a running
    /// prefill has one in every step all the same.
    pub prompt_logits_max: u32,
    /// The most that a step may take in which sequences decode: prefill beside them is cut to fit, by what earlier steps
    /// took, but not below `chunk_tokens_min` or half of what the decodes take. Where one prompt waits, steps keep well below it: 1.75 times what the
    /// decodes take, or a sixth of this. `None`: only `step_tokens_max` bounds them.
    pub itl_slo: Option<Duration>,
    /// Thousandths of the blocks that admission leaves free for those who decode already.
    pub watermark_permille: u32,
    /// Admission also leaves free what the running sequences and the newcomer will probably write: up to the mean length
    /// of outputs that ended before. Fewer preemptions, fewer sequences at once.
    pub reserve_output: bool,
    /// How long a wait outweighs one level of priority: arrivals are ordered by `arrival - priority × ageing`, so
    /// nobody starves. `None` is strict: a lower priority waits as long as a higher one has work.
    pub ageing: Option<Duration>,
}

impl Default for SchedulerConfig {
    /// A small CPU engine: 16,384 tokens of KV.
    fn default() -> Self {
        Self {
            block_size: 16,
            blocks: 1024,
            step_tokens_max: 2048,
            running_max: 128,
            unfinished_max: 8192,
            waiting_tokens_max: 1 << 20,
            model_len_max: 4096,
            prefix_cache: true,
            kv_events: false,
            chunk_tokens_min: 4,
            chunk_tokens_max: u32::MAX,
            prompt_logits_max: 256,
            itl_slo: None,
            watermark_permille: 10,
            reserve_output: true,
            ageing: Some(Duration::from_secs(5)),
        }
    }
}

impl SchedulerConfig {
    /// With every value in the range where the scheduler makes progress.
    pub(crate) fn normalized(mut self) -> Self {
        self.block_size = self.block_size.max(1);
        self.blocks = self.blocks.max(1);
        self.step_tokens_max = self.step_tokens_max.max(1);
        self.running_max = self.running_max.clamp(1, self.step_tokens_max);
        self.unfinished_max = self.unfinished_max.max(1);
        self.chunk_tokens_max = self.chunk_tokens_max.clamp(1, self.step_tokens_max);
        self.prompt_logits_max = self.prompt_logits_max.max(1);
        self.chunk_tokens_min = self.chunk_tokens_min.clamp(1, self.chunk_tokens_max);
        self.watermark_permille = self.watermark_permille.min(1000);
        self
    }

    /// Rounded up, so that a watermark that is not 0 keeps a block.
    pub(crate) fn watermark_blocks(&self) -> u32 {
        (u64::from(self.blocks) * u64::from(self.watermark_permille)).div_ceil(1000) as u32
    }

    /// Tokens that one sequence can have, prompt and output: the model's limit or what all KV blocks hold. The last
    /// output token is never computed and needs no place.
    pub(crate) fn seq_tokens_max(&self) -> u32 {
        let kv_tokens = u64::from(self.blocks) * u64::from(self.block_size);
        (kv_tokens + 1).min(u64::from(self.model_len_max)) as u32
    }
}
