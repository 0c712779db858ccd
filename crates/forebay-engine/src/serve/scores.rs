//! Log-probabilities of a prompt's tokens, gathered while the prompt is prefilled.

use std::sync::Arc;

use forebay_schedule::StepPlan;
use forebay_tokens::Tokenizer;
use forebay_types::TokenId;
use forebay_wire::{TokenLogprob, TopLogprob};

use super::submission::{PromptAsk, Submission};
use super::told::{ToldPrompt, What};
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
    /// All of them, once the prompt has its first token.
    told: Option<Arc<Vec<Score>>>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Score {
    pub logprobs: Logprobs,
    pub rank: u32,
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
        let empty =
            |_: &PromptAsk| Self { wanted: Wanted::Top(top), entries: Vec::new(), begun: 0, told: None };
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

    /// What all choices of the prompt share. Nothing is added any more.
    fn tell(&mut self) -> Arc<Vec<Score>> {
        let entries = &mut self.entries;
        self.told.get_or_insert_with(|| Arc::new(std::mem::take(entries))).clone()
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
pub(super) fn told_prompt(
    submission: &Submission,
    number: usize,
    scores: Option<&mut PromptScores>,
) -> Option<ToldPrompt> {
    let how = &submission.how;
    let scores = scores.zip(how.prompt_logprobs).map(|(scores, top)| (scores.tell(), top));
    let what = What::Prompt { number: number as u32, with_ids: how.token_ids };
    let ids = submission.prompts[number].ids.clone();
    let tokens = 0..ids.len();
    (how.token_ids || scores.is_some()).then_some(ToldPrompt { ids, scores, tokens, what })
}

/// The prompt as the beginning of `choice`; `None` where no echo is asked for.
pub(super) fn told_echo(
    submission: &Submission,
    number: usize,
    choice: u32,
    scores: Option<&mut PromptScores>,
) -> Option<ToldPrompt> {
    let prompt = &submission.prompts[number];
    let text = prompt.echo.clone()?;
    let scores = scores.zip(submission.how.echo_logprobs).map(|(scores, top)| (scores.tell(), top));
    let tokens = 0..prompt.ids.len();
    Some(ToldPrompt { ids: prompt.ids.clone(), scores, tokens, what: What::Echo { choice, text } })
}
