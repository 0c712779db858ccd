//! How much prefill a step may have beside decodes.
//!
//! A step in which sequences decode may take `d·(1 + 0.75·P)`: `d` is what the decodes alone would take, `P` how many prompts
//! want computing. So a prompt slows those who decode down by less than half, and is slowed down by them about twice; when
//! many prompts want computing, they get more of each step, or decoding would wait for prompts all the same, as new
//! sequences, and in smaller batches. Where decodes take next to nothing, half of that would be a handful of tokens per
//! pass: a sixth of `itl_slo` is always allowed. `itl_slo` itself is the limit, but where the decodes alone come near it or are
//! above: prompts get half as long as they then, or would wait for ever. And never fewer than `chunk_tokens_min` tokens.
//!
//! Time, not tokens: a token late in a long prompt takes a multiple of an early one, and chunks that shrink as it goes
//! on keep the pauses of those who decode even.

use crate::Scheduler;
use crate::pace::{Load, Pace};

/// What one prompt may add to a step of decodes, as a part of it. Below 1, so that a step within its usual noise stays below twice
/// the decodes' time.
const PROMPT_SHARE: f64 = 0.75;

/// Always allowed: this part of `itl_slo`.
const SLO_FLOOR: f64 = 1.0 / 6.0;

/// Always allowed: this part of what the decodes take.
const DECODES_FLOOR: f64 = 0.5;

/// Prefill beside decodes is cut to multiples of this: odd rows of a micro-tile compute no faster than whole ones.
const PREFILL_MULTIPLE: u32 = 4;

/// What is left of a step for prefill.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PrefillBudget {
    tokens: u32,
    /// `None`: only tokens count.
    seconds: Option<f64>,
    /// The step's first chunk may have this many tokens however long they take, or prefill would starve.
    floor: u32,
}

impl PrefillBudget {
    pub(crate) fn tokens_left(&self) -> u32 {
        self.tokens
    }

    /// Takes half of it away, of tokens half of what is above one for each of `others`. Both halves may begin with a chunk of
    /// `floor` tokens, whatever that takes.
    pub(crate) fn split(&mut self, others: u32, floor: u32) -> Self {
        let half = Self {
            tokens: self.tokens.saturating_sub(others).div_ceil(2),
            seconds: self.seconds.map(|seconds| seconds / 2.0),
            floor: if self.seconds.is_some() { floor } else { 0 },
        };
        self.tokens -= half.tokens;
        self.seconds = half.seconds;
        half
    }

    /// Puts back what is left of a half, or what it lacks.
    pub(crate) fn join(&mut self, half: Self) {
        self.tokens += half.tokens;
        self.seconds = self.seconds.zip(half.seconds).map(|(seconds, left)| seconds + left);
    }

    /// Tokens that a chunk may have that begins at position `start`.
    pub(crate) fn tokens(&self, pace: &Pace, start: u32) -> u32 {
        let Some(seconds) = self.seconds else { return self.tokens };
        let fits = pace.prefill_tokens(start, seconds) / PREFILL_MULTIPLE * PREFILL_MULTIPLE;
        fits.max(self.floor).min(self.tokens)
    }

    pub(crate) fn spend(&mut self, pace: &Pace, start: u32, tokens: u32) {
        self.tokens = self.tokens.saturating_sub(tokens);
        self.floor = self.floor.saturating_sub(tokens);
        if let Some(seconds) = &mut self.seconds {
            *seconds -= pace.prefill_seconds(start, tokens);
        }
    }
}

impl Scheduler {
    /// The budget beside the rows planned so far, which all decode. `prefills` of the running sequences want prefill, and have a
    /// token each whatever that takes.
    pub(crate) fn prefill_budget(&self, prefills: u32) -> PrefillBudget {
        let config = &self.config;
        let decodes = self.plan.rows() as u32;
        let tokens = config.step_tokens_max - decodes;
        let Some(slo) = config.itl_slo.filter(|_| decodes > 0) else {
            return PrefillBudget { tokens, seconds: None, floor: 0 };
        };
        // No leaps: what is expected of a chunk much larger than the last may be wrong, and at the start nothing is known.
        let tokens = tokens.min((2 * self.prefill_beside.max(config.chunk_tokens_min)).max(prefills));
        let slo = slo.as_secs_f64();
        let alone = self.pace.seconds(Load { decodes, ..Load::default() });
        let places = (config.running_max as usize).saturating_sub(self.running.len());
        let prompts = prefills as usize + self.waiting.len().min(places);
        let share = PROMPT_SHARE * prompts as f64;
        let wanted = (alone * share).max(slo * SLO_FLOOR - alone);
        let seconds = wanted.min((slo - alone).max(alone * DECODES_FLOOR));
        PrefillBudget { tokens, seconds: Some(seconds), floor: config.chunk_tokens_min }
    }
}
