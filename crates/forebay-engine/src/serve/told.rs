//! What the step thread tells of a request, and how it becomes events.
//!
//! Of a prompt's log-probabilities the step thread hands over ids and numbers. What the tokens are called is looked up by
//! whoever reads, where nobody waits for it: a prompt has up to a million names.

use std::ops::Range;
use std::sync::Arc;

use forebay_tokens::Tokenizer;
use forebay_types::TokenId;
use forebay_wire::{Delta, Event, PromptTokens, RankedLogprob, TokenLogprob};

use super::scores::{Score, entry};

/// On its way from the step thread.
#[derive(Debug)]
pub(crate) enum Told {
    Event(Event),
    Prompt(Box<ToldPrompt>),
}

/// One prompt, or its echo before a choice.
#[derive(Debug)]
pub(crate) struct ToldPrompt {
    pub ids: Arc<[TokenId]>,
    /// Of each token but the first, where they are wanted; and how many of the most likely are told of each.
    pub scores: Option<(Arc<Vec<Score>>, u32)>,
    /// Those that are told of: all, but for a part of an echo.
    pub tokens: Range<usize>,
    pub what: What,
}

#[derive(Debug)]
pub(crate) enum What {
    /// Prompt `number`, with its ids where `with_ids` says so.
    Prompt { number: u32, with_ids: bool },
    /// Its text, as the beginning of a choice.
    Echo { choice: u32, text: String },
}

impl Told {
    /// Tokens whose names have to be looked up, at most.
    pub fn names(&self) -> usize {
        match self {
            Self::Event(_) => 0,
            Self::Prompt(prompt) => {
                prompt.scores.as_ref().map_or(0, |(_, top)| prompt.tokens.len() * (*top as usize + 1))
            }
        }
    }

    /// As much of an echo as has `names_max` names, at least one token, and the rest of it; else everything, and no rest.
    ///
    /// An echo is told by deltas, so that it need not be one frame.
    pub fn part(self, names_max: usize) -> (Self, Option<Self>) {
        match self {
            Self::Prompt(mut prompt) => match (&prompt.what, &prompt.scores) {
                (What::Echo { choice, .. }, Some((_, top))) => {
                    let most = (names_max / (*top as usize + 1)).max(1);
                    let Range { start, end } = prompt.tokens;
                    let cut = end.min(start + most);
                    prompt.tokens = start..cut;
                    let rest = (cut < end).then(|| ToldPrompt {
                        ids: prompt.ids.clone(),
                        scores: prompt.scores.clone(),
                        tokens: cut..end,
                        what: What::Echo { choice: *choice, text: String::new() },
                    });
                    (Self::Prompt(prompt), rest.map(|rest| Self::Prompt(rest.into())))
                }
                _ => (Self::Prompt(prompt), None),
            },
            told => (told, None),
        }
    }

    /// Pure CPU work: about 100 ns a name.
    pub fn into_event(self, tokenizer: &Tokenizer) -> Event {
        let prompt = match self {
            Self::Event(event) => return event,
            Self::Prompt(prompt) => *prompt,
        };
        let ToldPrompt { ids, scores, tokens, what } = prompt;
        match what {
            What::Prompt { number, with_ids } => Event::Prompt(PromptTokens {
                prompt: number,
                logprobs: scores.map(|(scores, top)| ranked(&ids, &scores, top, tokenizer)),
                ids: if with_ids { ids.to_vec() } else { Vec::new() },
            }),
            What::Echo { choice, text } => {
                let logprobs = scores.map(|(scores, top)| echoed(&ids, &scores, tokens, top, tokenizer));
                Event::Delta(Delta {
                    choice,
                    text,
                    logprobs: logprobs.unwrap_or_default(),
                    ..Delta::default()
                })
            }
        }
    }
}

/// As vLLM's `prompt_logprobs`, with the `top` most likely of each.
fn ranked(ids: &[TokenId], scores: &[Score], top: u32, tokenizer: &Tokenizer) -> Vec<Vec<RankedLogprob>> {
    let entry = |(&token, score): (&TokenId, &Score)| {
        let named = |token: TokenId, logprob, rank| {
            let text = tokenizer.token_text(token).into_owned();
            RankedLogprob { token, text, logprob, rank }
        };
        let others = score.logprobs.others.iter().take(top as usize).zip(1..);
        let others = others.filter(|((id, _), _)| *id != token);
        let own = named(token, score.logprobs.logprob, score.rank);
        std::iter::once(own).chain(others.map(|(&(id, logprob), rank)| named(id, logprob, rank))).collect()
    };
    std::iter::once(Vec::new()).chain(ids.iter().skip(1).zip(scores).map(entry)).collect()
}

/// As an echo's `logprobs`, of `tokens` of it, with the `top` most likely of each.
fn echoed(
    ids: &[TokenId],
    scores: &[Score],
    tokens: Range<usize>,
    top: u32,
    tokenizer: &Tokenizer,
) -> Vec<TokenLogprob> {
    // Nothing is known of the first token, and less than all of a prompt that ended early.
    let entry = |at: usize| match at.checked_sub(1) {
        None => Some(TokenLogprob { logprob: None, ..entry(tokenizer, ids[at], 0.0, &[]) }),
        Some(before) => scores.get(before).map(|score| {
            let others = &score.logprobs.others;
            entry(tokenizer, ids[at], score.logprobs.logprob, &others[..others.len().min(top as usize)])
        }),
    };
    tokens.map_while(entry).collect()
}
