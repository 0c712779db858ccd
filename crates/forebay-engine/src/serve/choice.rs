//! One choice while it is generated: sampling state, text so far, and when it ends. Pure.

use std::sync::Arc;
use std::time::Instant;

use forebay_tokens::{Detokenizer, StopMatcher, Tokenizer};
use forebay_types::{FinishReason, TokenId};
use forebay_wire::{Delta, StopReason};

use crate::sample::{Choice as Sampled, Sampler, Wanted};

use super::constrain::{Beginning, Constrained};
use super::reading::{Reader, Reading};
use super::scores::entry;
use super::submission::How;

/// State of one choice.
pub(crate) struct ChoiceState {
    /// Number of the choice in its request.
    pub number: u32,
    /// Index of its prompt.
    pub prompt: usize,
    /// Away while its row is sampled.
    pub sampler: Option<Sampler>,
    /// Where it stands in the request's constraint; away as the sampler.
    pub constrained: Option<Constrained>,
    pub generated: u32,
    /// Of them, tokens of the model's reasoning.
    pub reasoning_tokens: u32,
    reader: Option<Reader>,
    max_tokens: u32,
    /// The latest tokens, as many as the longest bad word needs.
    recent: Vec<TokenId>,
    how: Arc<How>,
    tokenizer: Tokenizer,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    /// The latest piece of text, reused.
    text: String,
    /// Not yet emitted: its text is held back.
    held: Delta,
    /// Prompt tokens that it found in the cache, once it has its first token.
    pub cached: Option<u32>,
    pub first_scheduled: Option<Instant>,
    pub first_token: Option<Instant>,
    pub last_token: Option<Instant>,
}

/// What a token did to its choice.
pub(crate) struct Advance {
    /// Worth sending: new text, or log-probabilities.
    pub delta: Option<Delta>,
    pub finished: Option<Ending>,
}

/// How a choice ended.
pub(crate) struct Ending {
    pub reason: FinishReason,
    pub stop: Option<StopReason>,
}

impl ChoiceState {
    #[allow(clippy::too_many_arguments)] // What is fixed for a choice, once, beside what its request shares.
    pub fn new(
        number: u32,
        prompt: usize,
        seed: u64,
        max_tokens: u32,
        prompt_ids: &[TokenId],
        how: Arc<How>,
        tokenizer: Tokenizer,
        stop: StopMatcher,
    ) -> Self {
        let shown = how.reading.as_ref().map(|Reading { shown, .. }| Arc::clone(shown)).unwrap_or_default();
        Self {
            number,
            prompt,
            sampler: Some(Sampler::new(how.sampling.clone(), seed, prompt_ids)),
            constrained: how.constrained.as_ref().map(Beginning::choice),
            generated: 0,
            reasoning_tokens: 0,
            reader: how.reading.as_ref().map(|reading| reading.choice(number)),
            max_tokens,
            recent: Vec::new(),
            detokenizer: Detokenizer::new(tokenizer.clone(), how.skip_special).showing(shown),
            stop,
            tokenizer,
            how,
            text: String::new(),
            held: Delta { choice: number, ..Delta::default() },
            cached: None,
            first_scheduled: None,
            first_token: None,
            last_token: None,
        }
    }

    /// Whose end tokens may not be chosen yet.
    pub fn banned_ends(&self) -> Option<&Arc<How>> {
        (self.generated < self.how.min_tokens).then_some(&self.how)
    }

    /// Tokens that would complete a bad word.
    pub fn bad_now(&self) -> Vec<TokenId> {
        let mut banned = Vec::new();
        self.how.bad_words.ban(&self.recent, &mut banned);
        banned
    }

    /// The only tokens that may come, where the request says so.
    pub fn allowed(&self) -> Option<&Arc<How>> {
        self.how.allowed.is_some().then_some(&self.how)
    }

    /// Whether the model is reasoning, to which no constraint applies: it is about the answer.
    pub fn thinks(&self) -> bool {
        self.reader.as_ref().is_some_and(Reader::thinks)
    }

    /// The token with which it may begin to reason instead of what the constraint allows.
    pub fn think_token(&self) -> Option<TokenId> {
        self.reader.as_ref().filter(|_| self.generated == 0)?.think_token()
    }

    pub fn logprobs(&self) -> Option<Wanted> {
        self.how.logprobs.clone()
    }

    /// Takes the next token. A token that ends the choice counts as generated, has its log-probability, and is in the text
    /// only where a stop string would be. Where none was asked for, the token is dropped.
    pub fn on_token(&mut self, sampled: &Sampled) -> Advance {
        if self.max_tokens == 0 {
            let ending = Ending { reason: FinishReason::Length, stop: None };
            return Advance { delta: None, finished: Some(ending) };
        }
        let token = sampled.token;
        self.generated += 1;
        self.held.tokens += 1;
        self.remember(token);
        if let Some(logprobs) = &sampled.logprobs {
            self.held.logprobs.push(entry(&self.tokenizer, token, logprobs.logprob, &logprobs.others));
        }
        if self.how.token_ids {
            self.held.token_ids.push(token);
        }
        // Under a constraint an end comes only where it has to: `ignore_eos` would go on with nothing.
        let listed = self.how.end_tokens.contains(&token);
        if listed || (self.how.constrained.is_some() && self.tokenizer.is_eog(token)) {
            if self.how.include_stop {
                self.detokenize(token);
                self.feed();
            }
            let told = listed && self.how.end_of_text != Some(token);
            return self.end(FinishReason::Stop, told.then_some(StopReason::Token(token)));
        }
        let thought = self.thinks();
        self.detokenize(token);
        if self.feed() {
            return self.close(FinishReason::Stop, None);
        }
        if thought && self.thinks() {
            self.reasoning_tokens += 1;
        }
        if self.generated >= self.max_tokens {
            return self.end(FinishReason::Length, None);
        }
        let Delta { text, reasoning, tool_calls, logprobs, .. } = &self.held;
        let empty = text.is_empty() && reasoning.is_empty() && tool_calls.is_empty() && logprobs.is_empty();
        let waits = self.held.tokens < self.how.interval && self.generated > 1;
        let delta = if empty || waits { None } else { self.take() };
        Advance { delta, finished: None }
    }

    fn remember(&mut self, token: TokenId) {
        let reach = self.how.bad_words.reach();
        if reach == 0 {
            return;
        }
        if self.recent.len() == reach {
            self.recent.remove(0);
        }
        self.recent.push(token);
    }

    /// Lets go of everything held back.
    fn end(&mut self, reason: FinishReason, stop: Option<StopReason>) -> Advance {
        self.text.clear();
        self.text.push_str(self.detokenizer.finish());
        if self.feed() {
            return self.close(FinishReason::Stop, None);
        }
        read(&mut self.reader, self.stop.finish(), &mut self.held);
        self.close(reason, stop)
    }

    /// All text has come. A stop string in it is what ended it, whatever else would have.
    fn close(&mut self, mut reason: FinishReason, stop: Option<StopReason>) -> Advance {
        let hit = self.stop.hit().and_then(|hit| self.how.stops.get(hit));
        let stop = hit.map(|text| StopReason::Text(text.clone())).or(stop);
        if let Some(reader) = &mut self.reader {
            reader.finish(&mut self.held);
            reason = reader.reason(reason);
        }
        Advance { delta: self.take(), finished: Some(Ending { reason, stop }) }
    }

    /// Ends it from outside: what was held back.
    pub fn abort(&mut self) -> Option<Delta> {
        self.end(FinishReason::Abort, None).delta
    }

    fn detokenize(&mut self, token: TokenId) {
        self.text.clear();
        self.text.push_str(self.detokenizer.push(token));
    }

    /// Adds what the stop matcher lets through of `text`; true where a stop string was hit.
    fn feed(&mut self) -> bool {
        // As in vLLM, a stop string counts only where it ends in the text of tokens after the first `min_tokens`.
        if self.generated <= self.how.min_tokens {
            read(&mut self.reader, self.stop.pass(&self.text), &mut self.held);
            return false;
        }
        let piece = self.stop.push(&self.text);
        read(&mut self.reader, piece.text, &mut self.held);
        piece.hit.is_some()
    }

    fn take(&mut self) -> Option<Delta> {
        let next = Delta { choice: self.number, ..Delta::default() };
        let delta = std::mem::replace(&mut self.held, next);
        (delta.tokens > 0 || !delta.text.is_empty()).then_some(delta)
    }
}

/// Adds what `text` says to `held`.
fn read(reader: &mut Option<Reader>, text: &str, held: &mut Delta) {
    match reader {
        Some(reader) => reader.read(text, held),
        None => held.text.push_str(text),
    }
}
