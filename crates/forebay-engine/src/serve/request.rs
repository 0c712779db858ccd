//! A request while any of its choices runs, as the step loop knows it.

use std::time::Instant;

use forebay_schedule::{Scheduler, SeqId};
use forebay_types::{FinishReason, Usage};

use super::choice::ChoiceState;
use super::scores::PromptScores;
use super::submission::Submission;
use crate::metrics::{ModelMetrics, RequestRecord};

pub(super) struct Request {
    pub submission: Submission,
    pub seqs: Vec<SeqId>,
    /// Choices that are not finished.
    pub open: usize,
    pub started: bool,
    prompts: Vec<Progress>,
    /// Per prompt, where its log-probabilities are wanted.
    pub scores: Vec<PromptScores>,
    pub completion_tokens: u32,
    pub reasoning_tokens: u32,
}

/// How far the choices of one prompt are: what is a request in vLLM.
struct Progress {
    /// Prompt tokens that its first choice to have a token found in the cache.
    cached: Option<u32>,
    /// Choices that are not finished.
    open: u32,
    /// Tokens of the longest that is.
    most_generated: u32,
}

impl Request {
    /// `seqs` are its choices, which are queued.
    pub fn new(submission: Submission, seqs: Vec<SeqId>) -> Self {
        let progress = |_| Progress { cached: None, open: submission.n, most_generated: 0 };
        Self {
            open: seqs.len(),
            seqs,
            started: false,
            prompts: submission.prompts.iter().map(progress).collect(),
            scores: PromptScores::of(&submission),
            completion_tokens: 0,
            reasoning_tokens: 0,
            submission,
        }
    }

    /// A choice of `prompt` has its first token, and found so many of the prompt's cached. True for the prompt's first.
    pub fn on_first_token(&mut self, prompt: usize, cached: u32) -> bool {
        let known = &mut self.prompts[prompt].cached;
        let is_first = known.is_none();
        known.get_or_insert(cached);
        is_first
    }

    /// Counts a choice that has ended, and its prompt with the last of them. `scheduler` still knows its sequence.
    pub fn on_choice_ended(
        &mut self,
        seq: SeqId,
        choice: &ChoiceState,
        reason: FinishReason,
        scheduler: &Scheduler,
        metrics: &ModelMetrics,
    ) {
        let preemptions = scheduler.info(seq).map_or(0, |info| info.preemptions);
        metrics.on_finished(&self.record(choice, preemptions, reason));
        let prompt = &mut self.prompts[choice.prompt];
        prompt.open -= 1;
        prompt.most_generated = prompt.most_generated.max(choice.generated);
        if prompt.open == 0 {
            metrics.on_prompt_finished(self.submission.n, prompt.most_generated);
        }
    }

    pub fn usage(&self) -> Usage {
        Usage {
            completion_tokens: self.completion_tokens,
            reasoning_tokens: self.reasoning_tokens,
            cached_tokens: self.prompts.iter().filter_map(|prompt| prompt.cached).sum(),
            ..self.submission.nothing_used()
        }
    }

    fn record(&self, choice: &ChoiceState, preemptions: u32, reason: FinishReason) -> RequestRecord {
        let now = Instant::now();
        let arrived = self.submission.arrived;
        let since = |later: Option<Instant>, earlier: Option<Instant>| {
            Some(later?.saturating_duration_since(earlier?))
        };
        let prompt = &self.submission.prompts[choice.prompt];
        RequestRecord {
            e2e: now.saturating_duration_since(arrived),
            queue: since(choice.first_scheduled, Some(arrived)),
            prefill: since(choice.first_token, choice.first_scheduled),
            decode: since(choice.last_token, choice.first_token),
            prompt_tokens: prompt.ids.len() as u32,
            cached_tokens: choice.cached,
            generation_tokens: choice.generated,
            max_tokens: Some(prompt.max_tokens),
            preemptions,
            reason,
        }
    }
}
