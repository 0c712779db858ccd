//! Events to one JSON body, for a client that did not ask for a stream.

use bytes::{Bytes, BytesMut};
use forebay_types::{Blame, Class, Classify, Code, FinishReason, TokenId, Usage};

use crate::json::{put, put_raw, put_usage};
use crate::render::{
    RenderSpec, put_call, put_chat_logprobs, put_completion_logprobs, put_finish, put_identity,
    put_prompt_ids, put_prompt_logprobs, put_reasoning, put_token_ids,
};
use crate::tokens::put_token_logprobs;
use crate::{Api, Event, PromptTokens, StopReason, TokenLogprob, ToolCallDelta};

/// Why the events make no whole reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectError {
    #[error("the reply broke off before it was finished")]
    Cut,
    #[error("the engine failed while generating")]
    EngineFailed,
    #[error("the engine answered for choice {choice}, only {choices} were asked for")]
    UnknownChoice { choice: u32, choices: u32 },
}

impl Classify for CollectError {
    fn class(&self) -> Class {
        match self {
            Self::Cut => Class::new(Code::UpstreamFailed, Blame::Us),
            Self::EngineFailed | Self::UnknownChoice { .. } => Class::new(Code::Internal, Blame::Us),
        }
    }
}

#[derive(Debug, Default)]
struct Choice {
    text: String,
    reasoning: String,
    calls: Vec<ToolCallDelta>,
    logprobs: Vec<TokenLogprob>,
    token_ids: Vec<TokenId>,
    finish: Option<(FinishReason, Option<StopReason>)>,
}

impl Choice {
    /// A piece of a call joins the pieces before it.
    fn on_call(&mut self, piece: ToolCallDelta) {
        match self.calls.iter_mut().find(|call| call.index == piece.index) {
            Some(call) => call.arguments.push_str(&piece.arguments),
            None => self.calls.push(piece),
        }
    }

    /// `"role":…,"content":…` and what else the message has. `content` is null where there are only calls.
    fn put_message(&self, out: &mut BytesMut) {
        put_raw(out, "\"role\":\"assistant\",\"content\":");
        if self.text.is_empty() && !self.calls.is_empty() {
            put_raw(out, "null");
        } else {
            put(out, &self.text);
        }
        put_raw(out, ",\"refusal\":null");
        if !self.reasoning.is_empty() {
            put_raw(out, ",");
            put_reasoning(out, &self.reasoning);
        }
        for (i, call) in self.calls.iter().enumerate() {
            put_raw(out, if i > 0 { ",{" } else { ",\"tool_calls\":[{" });
            put_call(out, call);
        }
        if !self.calls.is_empty() {
            put_raw(out, "]");
        }
    }
}

/// Folds the events of one call. Memory is bounded by what the call may generate.
#[derive(Debug)]
pub struct Collector {
    id: String,
    created_unix: u64,
    spec: RenderSpec,
    choices: Vec<Choice>,
    /// Those that came, in any order.
    prompts: Vec<PromptTokens>,
    usage: Option<Usage>,
    error: Option<CollectError>,
}

impl Collector {
    /// `id` is the request's id, without a prefix; `created_unix` in seconds.
    pub fn new(id: &str, created_unix: u64, spec: &RenderSpec) -> Self {
        Self {
            id: id.to_owned(),
            created_unix,
            spec: spec.clone(),
            choices: (0..spec.choices).map(|_| Choice::default()).collect(),
            prompts: Vec::new(),
            usage: None,
            error: None,
        }
    }

    pub fn push(&mut self, event: Event) {
        match event {
            Event::Started { .. } => {}
            Event::Prompt(prompt) => self.prompts.push(prompt),
            Event::Delta(delta) => {
                if let Some(choice) = self.choice(delta.choice) {
                    if choice.text.is_empty() {
                        choice.text = delta.text;
                    } else {
                        choice.text.push_str(&delta.text);
                    }
                    choice.reasoning.push_str(&delta.reasoning);
                    delta.tool_calls.into_iter().for_each(|piece| choice.on_call(piece));
                    choice.logprobs.extend(delta.logprobs);
                    choice.token_ids.extend(delta.token_ids);
                }
            }
            Event::Finished { choice, reason, stop } => {
                if let Some(choice) = self.choice(choice) {
                    choice.finish = Some((reason, stop));
                }
                if reason == FinishReason::Error {
                    self.error.get_or_insert(CollectError::EngineFailed);
                }
            }
            Event::Done { usage } => self.usage = Some(usage),
        }
    }

    /// Tokens that the body names for their log-probabilities: what makes it long to render.
    pub fn names(&self) -> usize {
        let prompts = self.prompts.iter().flat_map(|prompt| prompt.logprobs.iter().flatten()).map(Vec::len);
        let choices =
            self.choices.iter().flat_map(|choice| &choice.logprobs).map(|entry| entry.top.len() + 1);
        prompts.chain(choices).sum()
    }

    /// What is to be said of a prompt: members, each behind a comma. A chat has them beside its choices, a completion in
    /// each of the prompt's choices.
    fn put_prompt(&self, out: &mut BytesMut, prompt: u32) {
        let Some(prompt) = self.prompts.iter().find(|seen| seen.prompt == prompt) else { return };
        if let Some(logprobs) = &prompt.logprobs {
            put_prompt_logprobs(out, logprobs);
        }
        if self.spec.token_ids {
            put_prompt_ids(out, &prompt.ids);
        }
    }

    fn choice(&mut self, choice: u32) -> Option<&mut Choice> {
        let choices = self.spec.choices;
        let found = self.choices.get_mut(choice as usize);
        if found.is_none() {
            self.error.get_or_insert(CollectError::UnknownChoice { choice, choices });
        }
        found
    }

    /// The body, choices in order.
    ///
    /// # Errors
    /// `Cut` without a `Done` or with a choice that did not finish: half a reply is never passed for a whole one.
    pub fn finish(self) -> Result<Bytes, CollectError> {
        if let Some(error) = self.error {
            return Err(error);
        }
        let usage = self.usage.ok_or(CollectError::Cut)?;
        let text_bytes: usize = self.choices.iter().map(|c| c.text.len()).sum();
        let mut out = BytesMut::with_capacity(512 + text_bytes + text_bytes / 8);
        put_raw(&mut out, "{");
        put_identity(&mut out, &self.id, self.created_unix, &self.spec, false);
        for (index, choice) in self.choices.iter().enumerate() {
            let (reason, stop) = choice.finish.as_ref().ok_or(CollectError::Cut)?;
            put_raw(&mut out, if index > 0 { ",{\"index\":" } else { ",\"choices\":[{\"index\":" });
            put(&mut out, &index);
            match self.spec.api {
                Api::ChatCompletions => {
                    put_raw(&mut out, ",\"message\":{");
                    choice.put_message(&mut out);
                    put_raw(&mut out, "},\"logprobs\":");
                    put_chat_logprobs(&mut out, &choice.logprobs, self.spec.tokens_as_ids);
                }
                Api::Completions => {
                    put_raw(&mut out, ",\"text\":");
                    put(&mut out, &choice.text);
                    put_raw(&mut out, ",\"logprobs\":");
                    put_completion_logprobs(&mut out, &choice.logprobs, &mut 0, self.spec.tokens_as_ids);
                    self.put_prompt(&mut out, index as u32 / self.spec.choices_per_prompt);
                }
                Api::Tokens => {
                    put_raw(&mut out, ",\"logprobs\":");
                    put_token_logprobs(&mut out, &choice.logprobs);
                }
            }
            if self.spec.token_ids {
                put_token_ids(&mut out, &choice.token_ids);
            }
            put_finish(&mut out, *reason, stop.as_ref());
            put_raw(&mut out, "}");
        }
        put_raw(&mut out, "],\"usage\":");
        put_usage(&mut out, &usage);
        if self.spec.api == Api::Tokens {
            match self.prompts.first().and_then(|prompt| prompt.logprobs.as_ref()) {
                Some(logprobs) => put_prompt_logprobs(&mut out, logprobs),
                None => put_raw(&mut out, ",\"prompt_logprobs\":null"),
            }
            put_raw(&mut out, ",\"kv_transfer_params\":null");
        }
        if self.spec.api == Api::ChatCompletions {
            self.put_prompt(&mut out, 0);
        }
        put_raw(&mut out, "}");
        Ok(out.freeze())
    }
}
