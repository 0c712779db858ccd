//! Log-probabilities of a prompt's tokens, gathered while the prompt is prefilled.

use std::sync::Arc;

use forebay_schedule::StepPlan;
use forebay_tokens::Tokenizer;
use forebay_types::TokenId;
use forebay_wire::{PromptTokens, RankedLogprob, TokenLogprob, TopLogprob};

use super::submission::{PromptAsk, Submission};
use crate::sample::{Logprobs, Wanted, rank};

/// Memory that the logits of prompt tokens may take in one step.
const LOGITS_BYTES_MAX: usize = 64 << 20;
/// Fewer rows at a time would make prefill slow, more would not make it faster.
const ROWS: std::ops::RangeInclusive<usize> = 16..=512;

/// Prompt tokens whose logits one step may want: 341 for SmolLM2's vocabulary of 49,152, 64 for Gemma's of 262,144.
pub(super) fn rows_max(vocab_size: usize) -> u32 {
    (LOGITS_BYTES_MAX / (vocab_size.max(1) * size_of::<f32>())).clamp(*ROWS.start(), *ROWS.end()) as u32
}

/// What is known of one prompt.
pub(super) struct PromptScores {
    wanted: Wanted,
    /// Entry `i` is of the token at position `i + 1`: nothing comes before the first.
    entries: Vec<Score>,
    /// Entries there are or are being made.
    begun: usize,
}

pub(super) struct Score {
    logprobs: Logprobs,
    rank: u32,
}

/// One row of logits that a prompt's next token is looked up in.
pub(super) struct ScoreJob {
    pub request: u64,
    pub prompt: usize,
    row: usize,
    token: TokenId,
    wanted: Wanted,
    score: Option<Score>,
}

impl ScoreJob {
    pub fn score(&mut self, row: &[f32]) {
        let logprobs = Logprobs::of(row, self.token, &self.wanted);
        self.score = Some(Score { logprobs, rank: rank(row, self.token) });
    }

    pub fn row(&self) -> usize {
        self.row
    }
}

impl PromptScores {
    /// Of each prompt of a request; none where its log-probabilities are not wanted.
    pub fn of(submission: &Submission) -> Vec<Self> {
        let Some(top) = submission.how.prompt_scores() else { return Vec::new() };
        let empty = |_: &PromptAsk| Self { wanted: Wanted::Top(top), entries: Vec::new(), begun: 0 };
        submission.prompts.iter().map(empty).collect()
    }

    /// What `rows` of a plan's logits tell of the prompt `ids`: `jobs` gets those tokens that are not known yet.
    ///
    /// Every choice of a prompt computes all of it, with the same bits: what another choice told already is passed over.
    pub fn line_up(
        &mut self,
        (request, prompt): (u64, usize),
        ids: &Arc<[TokenId]>,
        plan: &StepPlan,
        rows: std::ops::Range<usize>,
        jobs: &mut Vec<ScoreJob>,
    ) {
        for row in rows {
            let position = plan.positions[plan.logit_tokens[row] as usize] as usize;
            let Some(&token) = ids.get(position + 1) else { return };
            if position == self.begun {
                self.begun += 1;
                let wanted = self.wanted.clone();
                jobs.push(ScoreJob { request, prompt, row, token, wanted, score: None });
            }
        }
    }

    pub fn take(&mut self, job: &mut ScoreJob) {
        self.entries.extend(job.score.take());
    }

    /// As vLLM's `prompt_logprobs`, with the `top` most likely of each.
    fn ranked(&self, ids: &[TokenId], top: u32, tokenizer: &Tokenizer) -> Vec<Vec<RankedLogprob>> {
        let entry = |(&token, score): (&TokenId, &Score)| {
            let named = |token: TokenId, logprob, rank| {
                let text = tokenizer.token_text(token).into_owned();
                RankedLogprob { token, text, logprob, rank }
            };
            let others = score.logprobs.others.iter().take(top as usize).zip(1..);
            let others = others.filter(|((id, _), _)| *id != token);
            let own = named(token, score.logprobs.logprob, score.rank);
            std::iter::once(own)
                .chain(others.map(|(&(id, logprob), rank)| named(id, logprob, rank)))
                .collect()
        };
        std::iter::once(Vec::new()).chain(ids.iter().skip(1).zip(&self.entries).map(entry)).collect()
    }

    /// As an echo's `logprobs`, with the `top` most likely of each.
    pub fn echoed(&self, ids: &[TokenId], top: u32, tokenizer: &Tokenizer) -> Vec<TokenLogprob> {
        let first = ids.first().map(|&id| TokenLogprob { logprob: None, ..entry(tokenizer, id, 0.0, &[]) });
        let others = ids.iter().skip(1).zip(&self.entries).map(|(&id, score)| {
            let others = &score.logprobs.others;
            entry(tokenizer, id, score.logprobs.logprob, &others[..others.len().min(top as usize)])
        });
        first.into_iter().chain(others).collect()
    }
}

/// A token with its log-probability and those of others, as clients read them.
pub(super) fn entry(
    tokenizer: &Tokenizer,
    token: TokenId,
    logprob: f32,
    others: &[(TokenId, f32)],
) -> TokenLogprob {
    let name = |token| (tokenizer.token_text(token).into_owned(), tokenizer.token_bytes(token).to_vec());
    let top = others.iter().map(|&(token, logprob)| {
        let (text, bytes) = name(token);
        TopLogprob { token, text, bytes, logprob }
    });
    let top = top.collect();
    let (text, bytes) = name(token);
    TokenLogprob { token, text, bytes, logprob: Some(logprob), top }
}

/// What the reply says of prompt `number`, beside its echo; `None` where nothing is asked for.
pub(super) fn prompt_event(
    submission: &Submission,
    number: usize,
    scores: Option<&PromptScores>,
    tokenizer: &Tokenizer,
) -> Option<PromptTokens> {
    let how = &submission.how;
    let ids = &submission.prompts[number].ids;
    let ranked = |top| scores.map(|scores| scores.ranked(ids, top, tokenizer));
    let logprobs = how.prompt_logprobs.and_then(ranked);
    let ids = if how.token_ids { ids.to_vec() } else { Vec::new() };
    (how.token_ids || logprobs.is_some()).then_some(PromptTokens { prompt: number as u32, ids, logprobs })
}
