//! Events to SSE frames, one frame per event: the path every token of an engine in this process takes.
//!
//! Knows nothing of HTTP: the caller sends the bytes. Frames of an upstream are not rendered, they pass as they came.

use std::sync::Arc;

use bytes::BytesMut;
use forebay_types::{FinishReason, ModelName, TokenId, Usage};

use crate::json::{put, put_raw, put_usage};
use crate::tokens::put_token_logprobs;
use crate::{Api, Delta, Event, Generate, PromptTokens, StopReason, ToolCallDelta};

mod logprobs;

pub(crate) use logprobs::{put_chat_logprobs, put_completion_logprobs, put_prompt_logprobs};

/// What rendering needs to know of the call: small enough to travel with the reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenderSpec {
    pub api: Api,
    /// The name that the client used.
    pub model: ModelName,
    /// Choices over all prompts.
    pub choices: u32,
    /// Choices of each prompt, at least 1.
    pub choices_per_prompt: u32,
    pub stream: bool,
    pub include_usage: bool,
    /// Usage so far in every frame; only with `include_usage`.
    pub continuous_usage: bool,
    /// The ids of prompt and output beside the text.
    pub token_ids: bool,
    /// Log-probabilities name tokens by their ids.
    pub tokens_as_ids: bool,
    /// What the client wants the reply's id to be made of.
    pub request_id: Option<String>,
}

impl RenderSpec {
    pub fn new(call: &Generate) -> Self {
        Self {
            api: call.api,
            model: call.model.clone(),
            choices: (call.prompt.count() as u32).saturating_mul(call.n),
            choices_per_prompt: call.n.max(1),
            stream: call.stream,
            include_usage: call.include_usage,
            continuous_usage: call.include_usage && call.continuous_usage,
            token_ids: call.return_token_ids,
            tokens_as_ids: call.tokens_as_ids.unwrap_or(false),
            request_id: call.request_id.clone(),
        }
    }
}

/// Renders one stream. `id`, `created` and `model` are the same in all of its frames.
#[derive(Debug)]
pub struct Renderer {
    api: Api,
    choices: u32,
    choices_per_prompt: u32,
    include_usage: bool,
    token_ids: bool,
    tokens_as_ids: bool,
    /// `data: {"id":…,"choices":[`, the same in every frame.
    head: String,
    /// `,"usage":null}` or `}`, and the blank line.
    tail: &'static str,
    /// What was used so far, where every frame says it.
    so_far: Option<Usage>,
    offsets: TextOffsets,
    /// Of each choice whose first frame is to come: its prompt's ids, in JSON.
    prompt_ids: Vec<(u32, Arc<str>)>,
}

impl Renderer {
    /// `id` is the request's id, without a prefix; `created_unix` in seconds.
    pub fn new(id: &str, created_unix: u64, spec: &RenderSpec) -> Self {
        let mut head = BytesMut::new();
        put_raw(&mut head, "data: {");
        put_identity(&mut head, id, created_unix, spec, true);
        put_raw(&mut head, ",\"choices\":[");
        Self {
            api: spec.api,
            choices: spec.choices,
            choices_per_prompt: spec.choices_per_prompt,
            include_usage: spec.include_usage,
            token_ids: spec.token_ids,
            tokens_as_ids: spec.tokens_as_ids,
            head: String::from_utf8(head.to_vec()).expect("JSON of strings is UTF-8"),
            tail: if spec.include_usage { ",\"usage\":null}\n\n" } else { "}\n\n" },
            so_far: spec.continuous_usage.then(Usage::default),
            offsets: TextOffsets::default(),
            prompt_ids: Vec::new(),
        }
    }

    /// Appends the frames of one event: mostly one, none for a delta that holds everything back.
    ///
    /// - `Started`: for chat, the role frame of each choice; where the prompt's ids go with it, that is at `Prompt`.
    /// - `Done`: the usage frame where it was asked for, then `[DONE]`.
    pub fn frame(&mut self, event: &Event, out: &mut BytesMut) {
        match event {
            Event::Started { prompt_tokens, cached_tokens } => {
                if let Some(usage) = &mut self.so_far {
                    (usage.prompt_tokens, usage.cached_tokens) = (*prompt_tokens, *cached_tokens);
                }
                if self.api == Api::ChatCompletions && !self.token_ids {
                    self.roles("", out);
                }
            }
            Event::Prompt(prompt) if self.token_ids => self.prompt(prompt, out),
            Event::Prompt(_) => {}
            Event::Delta(delta) => self.delta(delta, out),
            Event::Finished { choice, reason, stop } => match self.api {
                Api::ChatCompletions => {
                    self.chat_choice(out, *choice, "{}", Some((*reason, stop.as_ref())), "");
                }
                Api::Completions | Api::Tokens => {
                    put_raw(out, &self.head);
                    put_raw(out, "{\"index\":");
                    put(out, choice);
                    let nothing =
                        if self.api == Api::Tokens { ",\"token_ids\":[]" } else { ",\"text\":\"\"" };
                    put_raw(out, nothing);
                    put_raw(out, ",\"logprobs\":null");
                    put_finish(out, *reason, stop.as_ref());
                    put_raw(out, "}");
                    self.end(out, "");
                }
            },
            Event::Done { usage } => {
                if self.include_usage {
                    self.usage(usage, out);
                }
                put_raw(out, "data: [DONE]\n\n");
            }
        }
    }

    /// The first frame of each choice of a chat. `extra` are members of the frame, each behind a comma.
    fn roles(&self, extra: &str, out: &mut BytesMut) {
        for choice in 0..self.choices {
            self.chat_choice(out, choice, "{\"role\":\"assistant\",\"content\":\"\"}", None, extra);
        }
    }

    /// A chat has the prompt's ids in its first frames, a completion in the first frame of each choice.
    fn prompt(&mut self, prompt: &PromptTokens, out: &mut BytesMut) {
        let mut member = BytesMut::new();
        put_prompt_ids(&mut member, &prompt.ids);
        let member: Arc<str> = String::from_utf8_lossy(&member).into();
        match self.api {
            Api::ChatCompletions => self.roles(&member, out),
            Api::Completions => {
                let first = prompt.prompt * self.choices_per_prompt;
                let choices = first..first + self.choices_per_prompt;
                self.prompt_ids.extend(choices.map(|choice| (choice, member.clone())));
            }
            // They are what the client sent.
            Api::Tokens => {}
        }
    }

    fn delta(&mut self, delta: &Delta, out: &mut BytesMut) {
        if let Some(usage) = &mut self.so_far {
            usage.completion_tokens = usage.completion_tokens.saturating_add(delta.tokens);
        }
        let calls = !delta.reasoning.is_empty() || !delta.tool_calls.is_empty();
        if delta.text.is_empty() && delta.logprobs.is_empty() && delta.token_ids.is_empty() && !calls {
            return;
        }
        put_raw(out, &self.head);
        put_raw(out, "{\"index\":");
        put(out, &delta.choice);
        match self.api {
            Api::ChatCompletions => {
                put_raw(out, ",\"delta\":{");
                put_chat_delta(out, delta);
                put_raw(out, "},\"logprobs\":");
                put_chat_logprobs(out, &delta.logprobs, self.tokens_as_ids);
            }
            Api::Completions => {
                put_raw(out, ",\"text\":");
                put(out, &delta.text);
                put_raw(out, ",\"logprobs\":");
                let offset = self.offsets.of(delta.choice);
                put_completion_logprobs(out, &delta.logprobs, offset, self.tokens_as_ids);
                if let Some(at) = self.prompt_ids.iter().position(|(choice, _)| *choice == delta.choice) {
                    put_raw(out, &self.prompt_ids.swap_remove(at).1);
                }
            }
            Api::Tokens => {
                put_raw(out, ",\"logprobs\":");
                put_token_logprobs(out, &delta.logprobs);
            }
        }
        if self.token_ids {
            put_token_ids(out, &delta.token_ids);
        }
        put_raw(out, if self.api == Api::ChatCompletions { CHAT_GOES_ON } else { GOES_ON });
        put_raw(out, "}");
        self.end(out, "");
    }

    fn chat_choice(
        &self,
        out: &mut BytesMut,
        choice: u32,
        delta: &str,
        finish: Option<(FinishReason, Option<&StopReason>)>,
        extra: &str,
    ) {
        put_raw(out, &self.head);
        put_raw(out, "{\"index\":");
        put(out, &choice);
        put_raw(out, ",\"delta\":");
        put_raw(out, delta);
        put_raw(out, ",\"logprobs\":null");
        match finish {
            Some((reason, stop)) => put_finish(out, reason, stop),
            None => put_raw(out, CHAT_GOES_ON),
        }
        put_raw(out, "}");
        self.end(out, extra);
    }

    fn usage(&self, usage: &Usage, out: &mut BytesMut) {
        put_raw(out, &self.head);
        put_raw(out, "]");
        put_tail(out, usage);
    }

    /// Behind the last choice. `extra` are further members, each behind a comma.
    fn end(&self, out: &mut BytesMut, extra: &str) {
        put_raw(out, "]");
        put_raw(out, extra);
        match &self.so_far {
            Some(usage) => put_tail(out, usage),
            None => put_raw(out, self.tail),
        }
    }
}

/// `,"usage":{…}}` and the blank line.
fn put_tail(out: &mut BytesMut, usage: &Usage) {
    put_raw(out, ",\"usage\":");
    put_usage(out, usage);
    put_raw(out, "}\n\n");
}

/// `"id":…,"object":…,"created":…,"model":…`; of the tokens API `"request_id":…,"created":…,"model":…`.
pub(crate) fn put_identity(out: &mut BytesMut, id: &str, created_unix: u64, spec: &RenderSpec, chunk: bool) {
    let id = spec.request_id.as_deref().unwrap_or(id);
    let (prefix, object) = match (spec.api, chunk) {
        (Api::Tokens, _) => {
            put_raw(out, "\"request_id\":");
            put(out, &format!("generate-tokens-{id}"));
            put_raw(out, ",\"created\":");
            put(out, &created_unix);
            put_raw(out, ",\"model\":");
            return put(out, spec.model.as_str());
        }
        (Api::ChatCompletions, true) => ("chatcmpl-", "chat.completion.chunk"),
        (Api::ChatCompletions, false) => ("chatcmpl-", "chat.completion"),
        (Api::Completions, _) => ("cmpl-", "text_completion"),
    };
    put_raw(out, "\"id\":");
    put(out, &format!("{prefix}{id}"));
    put_raw(out, ",\"object\":\"");
    put_raw(out, object);
    put_raw(out, "\",\"created\":");
    put(out, &created_unix);
    put_raw(out, ",\"model\":");
    put(out, spec.model.as_str());
}

/// What a frame before a choice's last one says of its end. As in vLLM, `stop_reason` comes with the last frame of a chat and
/// with every frame of the others.
const CHAT_GOES_ON: &str = ",\"finish_reason\":null";
const GOES_ON: &str = ",\"finish_reason\":null,\"stop_reason\":null";

/// `,"finish_reason":"stop","stop_reason":"END"`
pub(crate) fn put_finish(out: &mut BytesMut, reason: FinishReason, stop: Option<&StopReason>) {
    put_raw(out, ",\"finish_reason\":\"");
    put_raw(out, reason.as_str());
    put_raw(out, "\",\"stop_reason\":");
    put(out, &stop);
}

/// `,"prompt_token_ids":[…]`
pub(crate) fn put_prompt_ids(out: &mut BytesMut, ids: &[TokenId]) {
    put_raw(out, ",\"prompt_token_ids\":");
    put(out, ids);
}

/// `,"token_ids":[…]`
pub(crate) fn put_token_ids(out: &mut BytesMut, ids: &[TokenId]) {
    put_raw(out, ",\"token_ids\":");
    put(out, ids);
}

/// The members of a chat delta. `content` is there unless only reasoning or calls are new.
fn put_chat_delta(out: &mut BytesMut, delta: &Delta) {
    let mut comma = "";
    if !delta.reasoning.is_empty() {
        put_reasoning(out, &delta.reasoning);
        comma = ",";
    }
    if !delta.text.is_empty() || (delta.reasoning.is_empty() && delta.tool_calls.is_empty()) {
        put_raw(out, comma);
        put_raw(out, "\"content\":");
        put(out, &delta.text);
        comma = ",";
    }
    if !delta.tool_calls.is_empty() {
        put_raw(out, comma);
        put_raw(out, "\"tool_calls\":[");
        for (i, call) in delta.tool_calls.iter().enumerate() {
            put_raw(out, if i > 0 { ",{\"index\":" } else { "{\"index\":" });
            put(out, &call.index);
            put_raw(out, ",");
            put_call(out, call);
        }
        put_raw(out, "]");
    }
}

/// `"reasoning":…,"reasoning_content":…`: the second is the name that DeepSeek's API and older vLLM have for it.
pub(crate) fn put_reasoning(out: &mut BytesMut, reasoning: &str) {
    put_raw(out, "\"reasoning\":");
    put(out, reasoning);
    put_raw(out, ",\"reasoning_content\":");
    put(out, reasoning);
}

/// `"id":…,"type":"function","function":{"name":…,"arguments":…}}`; what the piece doesn't have is left out.
pub(crate) fn put_call(out: &mut BytesMut, call: &ToolCallDelta) {
    if let Some(id) = &call.id {
        put_raw(out, "\"id\":");
        put(out, id);
        put_raw(out, ",\"type\":\"function\",");
    }
    put_raw(out, "\"function\":{");
    if let Some(name) = &call.name {
        put_raw(out, "\"name\":");
        put(out, name);
        put_raw(out, ",");
    }
    put_raw(out, "\"arguments\":");
    put(out, &call.arguments);
    put_raw(out, "}}");
}

/// Where the next token's text begins, per choice, in characters of that choice's output. As in vLLM, it counts the
/// tokens' texts.
#[derive(Debug, Default)]
struct TextOffsets(Vec<(u32, usize)>);

impl TextOffsets {
    fn of(&mut self, choice: u32) -> &mut usize {
        let at = self.0.iter().position(|(c, _)| *c == choice).unwrap_or_else(|| {
            self.0.push((choice, 0));
            self.0.len() - 1
        });
        &mut self.0[at].1
    }
}

#[cfg(test)]
mod tests;
