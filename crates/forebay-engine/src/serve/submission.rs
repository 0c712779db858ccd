//! What a caller hands to the engine's thread.

use std::sync::Arc;
use std::time::Instant;

use forebay_grammar::Mask;
use forebay_tokens::StopMatcher;
use forebay_types::{ConsumerName, Fault, RequestId, TokenId, Usage};
use forebay_wire::{Event, Sampling};
use tokio::sync::mpsc;

use super::constrain::Beginning;
use super::reading::Reading;
use super::told::Told;
use super::words::BadWords;
use crate::sample::Wanted;

/// One request: prompts, and how to continue each of them.
pub(crate) struct Submission {
    pub id: RequestId,
    /// The `request_id` of its body, which replies have in place of `id`.
    pub own_id: Option<RequestId>,
    pub prompts: Vec<PromptAsk>,
    /// Choices per prompt.
    pub n: u32,
    pub how: Arc<How>,
    pub arrived: Instant,
    pub deadline: Instant,
    /// Events go out here. Its capacity holds everything the request can produce, so that a slow reader never stops
    /// the step loop; a closed channel is a client that left.
    pub events: mpsc::Sender<Result<Told, Fault>>,
}

pub(crate) struct PromptAsk {
    pub ids: Arc<[TokenId]>,
    /// New tokens per choice at most; prompt and this fit the model. 0: only the prompt is looked at.
    pub max_tokens: u32,
    /// Text to repeat before the output.
    pub echo: Option<String>,
}

/// How tokens are chosen and when a choice ends; shared by all choices of a request.
pub(crate) struct How {
    pub sampling: Sampling,
    /// Choice `i` of each prompt draws with `seed + i`: a prompt's answer is the same alone and in a list.
    pub seed: u64,
    pub include_stop: bool,
    pub stops: Vec<String>,
    /// Made once per request from `stops`; every choice has a state of its own over the shared automaton.
    pub matcher: StopMatcher,
    /// Tokens that end a choice, and may not be chosen under `min_tokens`: the model's unless the request ignores
    /// them, and the request's own.
    pub end_tokens: Vec<TokenId>,
    /// Of them, the model's end of text: the one that is no `stop_reason`.
    pub end_of_text: Option<TokenId>,
    pub min_tokens: u32,
    pub logprobs: Option<Wanted>,
    /// The most likely tokens at each place of the prompt, for `prompt_logprobs`.
    pub prompt_logprobs: Option<u32>,
    /// The same for the log-probabilities of an echo.
    pub echo_logprobs: Option<u32>,
    /// The ids of prompt and output are sent, too.
    pub token_ids: bool,
    /// Control tokens are left out of the text.
    pub skip_special: bool,
    /// Tokens per delta, except the first and the last.
    pub interval: u32,
    /// How text becomes content, reasoning and calls; `None` where all of it is content.
    pub reading: Option<Reading>,
    /// What every choice has to match, at its beginning.
    pub constrained: Option<Beginning>,
    /// Only these tokens may come, as vLLM's `allowed_token_ids`.
    pub allowed: Option<Mask>,
    pub bad_words: BadWords,
    pub cache_salt: Option<String>,
    pub priority: i32,
    pub tenant: ConsumerName,
}

impl How {
    /// How many of the most likely tokens are wanted at each place of the prompts; `None` for no log-probabilities.
    pub fn prompt_scores(&self) -> Option<u32> {
        self.prompt_logprobs.max(self.echo_logprobs)
    }
}

impl Submission {
    /// Tells the client. The channel has room for all that the request can produce, so a failure is a client that left:
    /// the next turn sees it.
    pub fn tell(&self, told: Told) {
        let _ = self.events.try_send(Ok(told));
    }

    pub fn send(&self, event: Event) {
        self.tell(Told::Event(event));
    }

    /// Ends it with a fault.
    pub fn refuse(&self, fault: Fault) {
        let _ = self.events.try_send(Err(fault));
    }

    /// Over all prompts.
    pub fn choices(&self) -> u32 {
        self.prompts.len() as u32 * self.n
    }

    /// The usage of a request for which nothing was computed.
    pub fn nothing_used(&self) -> Usage {
        let prompt_tokens = self.prompts.iter().map(|prompt| prompt.ids.len() as u32).sum();
        Usage { prompt_tokens, ..Usage::default() }
    }

    /// Events that this request can produce at most: one per token, echo and finish per choice, one per prompt, start and
    /// end.
    pub fn events_max(prompts: &[PromptAsk], n: u32) -> usize {
        let per_prompt = prompts.iter().map(|p| (p.max_tokens as usize + 3) * n as usize + 1);
        per_prompt.sum::<usize>() + 3
    }
}
