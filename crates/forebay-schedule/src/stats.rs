//! What a scheduler says about itself.

use std::time::Duration;

use crate::Scheduler;
use crate::pace::Load;

/// A refused client is not told to come back sooner, or later, than this.
const DRAIN_MIN: Duration = Duration::from_secs(1);
const DRAIN_MAX: Duration = Duration::from_secs(60);

/// Counts and gauges at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SchedulerStats {
    pub running: u32,
    pub waiting: u32,
    /// Tokens to prefill of all that wait, cached or not.
    pub waiting_tokens: u64,
    pub blocks: u32,
    /// Blocks that running sequences hold.
    pub blocks_held: u32,
    /// Blocks that a prompt could hit, held or not.
    pub blocks_cached: u32,
    /// Since the start, as all below.
    pub preemptions: u64,
    /// Prompt tokens of sequences that started.
    pub prefix_query_tokens: u64,
    /// Those of them that were cached.
    pub prefix_hit_tokens: u64,
    /// Steps in which a sequence waited for a prefix that another was computing.
    pub prefix_waits: u64,
    /// Tokens planned that had been computed before, but were lost by preemption.
    pub recomputed_tokens: u64,
}

impl SchedulerStats {
    /// Part of the KV blocks that is held, 0 to 1.
    pub fn kv_usage(&self) -> f64 {
        f64::from(self.blocks_held) / f64::from(self.blocks.max(1))
    }
}

impl Scheduler {
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            running: self.running.len() as u32,
            waiting: self.waiting.len() as u32,
            waiting_tokens: self.waiting.tokens(),
            blocks: self.pool.blocks(),
            blocks_held: self.pool.blocks() - self.pool.free_blocks(),
            blocks_cached: self.pool.cached_blocks() as u32,
            preemptions: self.preemptions,
            prefix_query_tokens: self.prefix_query_tokens,
            prefix_hit_tokens: self.prefix_hit_tokens,
            prefix_waits: self.prefix_waits,
            recomputed_tokens: self.recomputed_tokens,
        }
    }

    /// When half of the queue will probably be gone, by what steps took and how long outputs were: when there is room again for
    /// all who are refused now.
    pub(crate) fn drain_in(&self) -> Duration {
        let waiting = self.waiting.len() as f64;
        let prompt_tokens = (self.waiting.tokens() as f64 / waiting.max(1.0)) as u32;
        let decodes = (self.running.len() as u32).max(1);
        let decode = self.pace.seconds(Load { decodes, ..Load::default() }) / f64::from(decodes);
        let each = self.pace.prefill_seconds(0, prompt_tokens) + decode * self.output_mean;
        let half = Duration::try_from_secs_f64(waiting * each / 2.0).unwrap_or(DRAIN_MAX);
        half.clamp(DRAIN_MIN, DRAIN_MAX)
    }
}
