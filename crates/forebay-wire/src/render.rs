//! Events to SSE frames, one frame per event: the path every token of an engine in this process takes.
//!
//! Knows nothing of HTTP: the caller sends the bytes. Frames of an upstream are not rendered, they pass as they came.

use std::borrow::Cow;

use bytes::BytesMut;
use forebay_types::{FinishReason, ModelName, Usage};

use crate::json::{put, put_logprob, put_raw, put_usage};
use crate::{Api, Delta, Event, Generate, TokenLogprob, ToolCallDelta};

/// What rendering needs to know of the call: small enough to travel with the reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenderSpec {
    pub api: Api,
    /// The name that the client used.
    pub model: ModelName,
    /// Choices over all prompts.
    pub choices: u32,
    pub stream: bool,
    pub include_usage: bool,
    /// Usage so far in every frame; only with `include_usage`.
    pub continuous_usage: bool,
}

impl RenderSpec {
    pub fn new(call: &Generate) -> Self {
        Self {
            api: call.api,
            model: call.model.clone(),
            choices: (call.prompt.count() as u32).saturating_mul(call.n),
            stream: call.stream,
            include_usage: call.include_usage,
            continuous_usage: call.include_usage && call.continuous_usage,
        }
    }
}

/// Renders one stream. `id`, `created` and `model` are the same in all of its frames.
#[derive(Debug)]
pub struct Renderer {
    api: Api,
    choices: u32,
    include_usage: bool,
    /// `data: {"id":…,"choices":[`, the same in every frame.
    head: String,
    /// `],"usage":null}` or `]}`, and the blank line.
    tail: &'static str,
    /// What was used so far, where every frame says it.
    so_far: Option<Usage>,
    offsets: TextOffsets,
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
            include_usage: spec.include_usage,
            head: String::from_utf8(head.to_vec()).expect("JSON of strings is UTF-8"),
            tail: if spec.include_usage { "],\"usage\":null}\n\n" } else { "]}\n\n" },
            so_far: spec.continuous_usage.then(Usage::default),
            offsets: TextOffsets::default(),
        }
    }

    /// Appends the frames of one event: mostly one, none for a delta that holds everything back.
    ///
    /// - `Started`: for chat, the role frame of each choice.
    /// - `Done`: the usage frame where it was asked for, then `[DONE]`.
    pub fn frame(&mut self, event: &Event, out: &mut BytesMut) {
        match event {
            Event::Started { prompt_tokens, cached_tokens } => {
                if let Some(usage) = &mut self.so_far {
                    (usage.prompt_tokens, usage.cached_tokens) = (*prompt_tokens, *cached_tokens);
                }
                if self.api == Api::ChatCompletions {
                    for choice in 0..self.choices {
                        self.chat_choice(out, choice, "{\"role\":\"assistant\",\"content\":\"\"}", None);
                    }
                }
            }
            Event::Prompt(_) => {}
            Event::Delta(delta) => self.delta(delta, out),
            Event::Finished { choice, reason } => match self.api {
                Api::ChatCompletions => self.chat_choice(out, *choice, "{}", Some(*reason)),
                Api::Completions => {
                    put_raw(out, &self.head);
                    put_raw(out, "{\"index\":");
                    put(out, choice);
                    put_raw(out, ",\"text\":\"\",\"logprobs\":null,\"finish_reason\":\"");
                    put_raw(out, reason.as_str());
                    put_raw(out, "\"}");
                    self.end(out);
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

    fn delta(&mut self, delta: &Delta, out: &mut BytesMut) {
        if let Some(usage) = &mut self.so_far {
            usage.completion_tokens = usage.completion_tokens.saturating_add(delta.tokens);
        }
        let calls = !delta.reasoning.is_empty() || !delta.tool_calls.is_empty();
        if delta.text.is_empty() && delta.logprobs.is_empty() && !calls {
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
                put_chat_logprobs(out, &delta.logprobs);
            }
            Api::Completions => {
                put_raw(out, ",\"text\":");
                put(out, &delta.text);
                put_raw(out, ",\"logprobs\":");
                put_completion_logprobs(out, &delta.logprobs, self.offsets.of(delta.choice));
            }
        }
        put_raw(out, ",\"finish_reason\":null}");
        self.end(out);
    }

    fn chat_choice(&self, out: &mut BytesMut, choice: u32, delta: &str, reason: Option<FinishReason>) {
        put_raw(out, &self.head);
        put_raw(out, "{\"index\":");
        put(out, &choice);
        put_raw(out, ",\"delta\":");
        put_raw(out, delta);
        put_raw(out, ",\"logprobs\":null,\"finish_reason\":");
        put(out, &reason.map(FinishReason::as_str));
        put_raw(out, "}");
        self.end(out);
    }

    fn usage(&self, usage: &Usage, out: &mut BytesMut) {
        put_raw(out, &self.head);
        put_tail(out, usage);
    }

    /// Behind the last choice.
    fn end(&self, out: &mut BytesMut) {
        match &self.so_far {
            Some(usage) => put_tail(out, usage),
            None => put_raw(out, self.tail),
        }
    }
}

/// `],"usage":{…}}` and the blank line.
fn put_tail(out: &mut BytesMut, usage: &Usage) {
    put_raw(out, "],\"usage\":");
    put_usage(out, usage);
    put_raw(out, "}\n\n");
}

/// `"id":…,"object":…,"created":…,"model":…`
pub(crate) fn put_identity(out: &mut BytesMut, id: &str, created_unix: u64, spec: &RenderSpec, chunk: bool) {
    let (prefix, object) = match (spec.api, chunk) {
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

/// `null`, or `{"content":[{"token","logprob","bytes","top_logprobs"}…],"refusal":null}`.
pub(crate) fn put_chat_logprobs(out: &mut BytesMut, logprobs: &[TokenLogprob]) {
    if logprobs.is_empty() {
        return put_raw(out, "null");
    }
    put_raw(out, "{\"content\":[");
    for (i, entry) in logprobs.iter().enumerate() {
        if i > 0 {
            put_raw(out, ",");
        }
        // The schema has no null here. Chat has no echo, so every token has a log-probability.
        put_token(out, &entry.text, entry.logprob.unwrap_or(0.0), &entry.bytes);
        put_raw(out, ",\"top_logprobs\":[");
        for (i, top) in entry.top.iter().enumerate() {
            if i > 0 {
                put_raw(out, ",");
            }
            put_token(out, &top.text, top.logprob, &top.bytes);
            put_raw(out, "}");
        }
        put_raw(out, "]}");
    }
    put_raw(out, "],\"refusal\":null}");
}

/// `{"token":…,"logprob":…,"bytes":…`, left open.
fn put_token(out: &mut BytesMut, text: &str, logprob: f32, bytes: &[u8]) {
    put_raw(out, "{\"token\":");
    put(out, text);
    put_raw(out, ",\"logprob\":");
    put_logprob(out, logprob);
    put_raw(out, ",\"bytes\":");
    put(out, bytes);
}

/// `null`, or `{"text_offset":[…],"token_logprobs":[…],"tokens":[…],"top_logprobs":[{token: logprob}…]}`.
///
/// `offset` is where the first of these tokens begins, and is moved behind the last. The chosen token is in
/// `top_logprobs` even where it is not among the most likely, as OpenAI documents.
pub(crate) fn put_completion_logprobs(out: &mut BytesMut, logprobs: &[TokenLogprob], offset: &mut usize) {
    if logprobs.is_empty() {
        return put_raw(out, "null");
    }
    let list = |out: &mut BytesMut, name: &str, item: &mut dyn FnMut(&mut BytesMut, &TokenLogprob)| {
        put_raw(out, name);
        for (i, entry) in logprobs.iter().enumerate() {
            put_raw(out, if i > 0 { "," } else { "[" });
            item(out, entry);
        }
        put_raw(out, "]");
    };
    list(out, "{\"text_offset\":", &mut |out, entry| {
        put(out, offset);
        *offset += entry.text.chars().count();
    });
    list(out, ",\"token_logprobs\":", &mut |out, entry| match entry.logprob {
        Some(logprob) => put_logprob(out, logprob),
        None => put_raw(out, "null"),
    });
    list(out, ",\"tokens\":", &mut |out, entry| put(out, &*completion_key(&entry.text, &entry.bytes)));
    list(out, ",\"top_logprobs\":", &mut |out, entry| match entry.logprob {
        Some(logprob) => put_top(out, entry, logprob),
        None => put_raw(out, "null"),
    });
    put_raw(out, "}");
}

/// `{text: logprob…}`. Tokens that read the same keep the first, as an object has no double keys.
fn put_top(out: &mut BytesMut, entry: &TokenLogprob, logprob: f32) {
    let TokenLogprob { token, text, bytes, top, .. } = entry;
    let chosen = (!top.iter().any(|t| t.token == *token)).then(|| (completion_key(text, bytes), logprob));
    let top = top.iter().map(|t| (completion_key(&t.text, &t.bytes), t.logprob));
    let entries: Vec<_> = chosen.into_iter().chain(top).collect();
    put_raw(out, "{");
    for (i, (text, logprob)) in entries.iter().enumerate() {
        if entries[..i].iter().any(|(earlier, _)| earlier == text) {
            continue;
        }
        if i > 0 {
            put_raw(out, ",");
        }
        put(out, &**text);
        put_raw(out, ":");
        put_logprob(out, *logprob);
    }
    put_raw(out, "}");
}

/// A token as the completions API names it, which has no `bytes` beside it: its text, or `bytes:\xe2\x80` for a part of a
/// character. The form is OpenAI's; printable ASCII stands for itself in it, so that no two tokens read the same.
fn completion_key<'t>(text: &'t str, bytes: &[u8]) -> Cow<'t, str> {
    if std::str::from_utf8(bytes).is_ok() {
        return Cow::Borrowed(text);
    }
    let mut key = String::from("bytes:");
    for &byte in bytes {
        match byte {
            b' '..=b'~' if byte != b'\\' => key.push(char::from(byte)),
            _ => key.extend(["\\x", &format!("{byte:02x}")]),
        }
    }
    Cow::Owned(key)
}

#[cfg(test)]
mod tests;
