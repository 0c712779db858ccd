//! What a request may ask of this model: lengths, counts and ids.

use std::sync::Arc;

use forebay_types::{Blame, Class, Code, Fault, TokenId};
use forebay_wire::{Api, Generate, Prompt};

use super::engine::Engine;
use super::submission::PromptAsk;

/// Prompts (times choices) of one request: OpenAI's limit of `n`, and of a batch of prompts.
const CHOICES_MAX: usize = 2048;
/// Log-probabilities of prompts in one reply: each is some 100 bytes until the reply is rendered.
const PROMPT_LOGPROBS_MAX: u64 = 1 << 20;
/// `max_tokens` of the completions API where the request has none.
pub(super) const COMPLETION_TOKENS_DEFAULT: u32 = 16;

impl Engine {
    /// Refuses prompts that can't fit, by their size alone. One that passes may still be too long.
    pub fn fits(&self, prompt: &Prompt) -> Result<(), Fault> {
        let param = if matches!(prompt, Prompt::Chat { .. }) { "messages" } else { "prompt" };
        self.fit_bytes(prompt.bytes_max(), param)
    }

    pub(super) fn fit_bytes(&self, bytes: usize, param: &str) -> Result<(), Fault> {
        let (tokens, limit) = (self.model_len, self.prompt_bytes_max());
        if bytes <= limit {
            return Ok(());
        }
        let message = format!(
            "This model's maximum context length is {tokens} tokens, which is {limit} bytes of text at most. However, your \
             {param} resulted in {bytes} bytes. Please reduce the length of the {param}."
        );
        Err(Fault::new(Class::new(Code::ContextLengthExceeded, Blame::Client), message).param(param))
    }

    /// Checks each prompt against the model and fixes how much may be generated for it.
    pub(super) fn prompt_asks(
        &self,
        call: &Generate,
        prompts: Vec<Arc<[TokenId]>>,
    ) -> Result<Vec<PromptAsk>, Fault> {
        let sampled = if call.api == Api::ChatCompletions { "top_logprobs" } else { "logprobs" };
        let wanted =
            [(sampled, "sample", call.logprobs), ("prompt_logprobs", "prompt", call.prompt_logprobs)];
        for (param, of, asked) in wanted {
            let Some(asked) = asked.filter(|asked| *asked > self.max_logprobs) else { continue };
            let message = format!(
                "Requested {of} logprobs of {asked}, which is greater than max allowed: {} (`engine.max-logprobs`)",
                self.max_logprobs
            );
            return Err(Fault::bad_request(message).param(param));
        }
        let choices = prompts.len().saturating_mul(call.n as usize);
        if choices > CHOICES_MAX {
            let message = format!(
                "the request asks for {choices} choices (prompts times `n`); the limit is {CHOICES_MAX}"
            );
            return Err(Fault::bad_request(message).param("n"));
        }
        check_scores(call, prompts.iter().map(|ids| ids.len() as u64).sum())?;
        let param = match call.api {
            Api::ChatCompletions => "messages",
            Api::Completions => "prompt",
            Api::Tokens => "token_ids",
        };
        prompts
            .into_iter()
            .enumerate()
            .map(|(p, ids)| {
                if let Some(id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) {
                    let message = format!("token id {id} is out of the vocabulary of {} tokens", self.vocab_size);
                    return Err(Fault::bad_request(message).param(param));
                }
                if ids.is_empty() {
                    return Err(Fault::bad_request("the prompt is empty: it has no tokens").param(param));
                }
                let prompt_tokens = ids.len() as u32;
                let left = self.model_len.saturating_sub(prompt_tokens);
                let max_tokens = match (call.max_tokens, call.api) {
                    (Some(asked), _) if asked <= left => asked,
                    (None, Api::Completions) if left > 0 => COMPLETION_TOKENS_DEFAULT.min(left),
                    (None, Api::ChatCompletions | Api::Tokens) if left > 0 => left,
                    (asked, _) => return Err(self.too_long(prompt_tokens, asked, param)),
                };
                // As in vLLM, a model's own limit shortens every answer.
                let max_tokens = self.generation.max_new_tokens.map_or(max_tokens, |cap| cap.min(max_tokens));
                if call.min_tokens > max_tokens {
                    let message = format!(
                        "min_tokens is {}, but only {max_tokens} tokens may be generated; raise max_tokens or lower it",
                        call.min_tokens
                    );
                    return Err(Fault::bad_request(message).param("min_tokens"));
                }
                let echo = call.echo.then(|| self.echo(&call.prompt, p, &ids, call.truncate_prompt_tokens.is_some()));
                Ok(PromptAsk { ids, max_tokens, echo })
            })
            .collect()
    }

    /// What stands before the output. Of a chat, the text of its last message, where the answer goes on in it.
    fn echo(&self, prompt: &Prompt, number: usize, ids: &[TokenId], cut: bool) -> String {
        match prompt {
            Prompt::Text(texts) if !cut => texts.get(number).cloned().unwrap_or_default(),
            Prompt::Text(_) | Prompt::Tokens(_) => self.text.tokenizer().decode(ids, false),
            Prompt::Chat { messages, .. } => {
                let last = messages.last().filter(|message| message.role == "assistant");
                last.map(|message| message.content.to_text().into_owned()).unwrap_or_default()
            }
        }
    }

    /// A bias on a token that isn't there would do nothing, silently.
    pub(super) fn check_ids(&self, call: &Generate) -> Result<(), Fault> {
        let biased = call.sampling.logit_bias.iter().map(|(id, _)| (*id, "logit_bias"));
        let allowed = call.sampling.allowed_token_ids.iter().flatten().map(|id| (*id, "allowed_token_ids"));
        let scored = call.logprob_token_ids.iter().map(|id| (*id, "logprob_token_ids"));
        let unknown = biased.chain(allowed).chain(scored).find(|(id, _)| *id as usize >= self.vocab_size);
        unknown.map_or(Ok(()), |(id, param)| {
            let message = format!("token id {id} is out of the vocabulary of {} tokens", self.vocab_size);
            Err(Fault::bad_request(message).param(param))
        })
    }

    fn too_long(&self, prompt_tokens: u32, asked: Option<u32>, param: &str) -> Fault {
        let limit = self.model_len;
        let message = match asked {
            Some(asked) if prompt_tokens < limit => format!(
                "This model's maximum context length is {limit} tokens. However, you requested {} tokens ({prompt_tokens} in \
                 the {param}, {asked} in the completion). Please reduce the length of the {param} or completion.",
                u64::from(prompt_tokens) + u64::from(asked),
            ),
            // vLLM's words.
            _ if prompt_tokens > limit => format!(
                "This model's maximum context length is {limit} tokens. However, your {param} contains {prompt_tokens} input \
                 tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt."
            ),
            _ => format!(
                "This model's maximum context length is {limit} tokens. However, your {param} contains {prompt_tokens} input \
                 tokens, which leaves no room for output tokens. Please reduce the length of the input prompt."
            ),
        };
        Fault::new(Class::new(Code::ContextLengthExceeded, Blame::Client), message).param(param)
    }
}

/// Refuses log-probabilities of prompts that would take too much memory: an echo has them once per choice.
fn check_scores(call: &Generate, prompt_tokens: u64) -> Result<(), Fault> {
    let echoed = call.logprobs.filter(|_| call.echo && call.api == Api::Completions);
    let asked = [("prompt_logprobs", call.prompt_logprobs, 1), ("logprobs", echoed, call.n)];
    for (param, top, times) in asked {
        let Some(top) = top else { continue };
        let entries = prompt_tokens.saturating_mul(u64::from(top) + 1).saturating_mul(u64::from(times));
        if entries > PROMPT_LOGPROBS_MAX {
            let message = format!(
                "{prompt_tokens} prompt tokens with {top} log-probabilities beside their own make {entries} entries; the limit is \
                 {PROMPT_LOGPROBS_MAX}. Send fewer prompts in a request, or ask for fewer log-probabilities."
            );
            return Err(Fault::bad_request(message).param(param));
        }
    }
    Ok(())
}
