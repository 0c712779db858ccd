//! Log-probabilities in the shapes of the three places that have them: chats, completions, and vLLM's prompts.

use std::borrow::Cow;

use bytes::BytesMut;
use forebay_types::TokenId;

use crate::json::{put, put_logprob, put_raw};
use crate::{RankedLogprob, TokenLogprob};

/// `null`, or `{"content":[{"token","logprob","bytes","top_logprobs"}…],"refusal":null}`.
pub(crate) fn put_chat_logprobs(out: &mut BytesMut, logprobs: &[TokenLogprob], as_ids: bool) {
    if logprobs.is_empty() {
        return put_raw(out, "null");
    }
    put_raw(out, "{\"content\":[");
    for (i, entry) in logprobs.iter().enumerate() {
        if i > 0 {
            put_raw(out, ",");
        }
        // The schema has no null here. Chat has no echo, so every token has a log-probability.
        let text = name(as_ids, entry.token, &entry.text);
        put_token(out, &text, entry.logprob.unwrap_or(0.0), &entry.bytes);
        put_raw(out, ",\"top_logprobs\":[");
        for (i, top) in entry.top.iter().enumerate() {
            if i > 0 {
                put_raw(out, ",");
            }
            put_token(out, &name(as_ids, top.token, &top.text), top.logprob, &top.bytes);
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
pub(crate) fn put_completion_logprobs(
    out: &mut BytesMut,
    logprobs: &[TokenLogprob],
    offset: &mut usize,
    as_ids: bool,
) {
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
    list(out, ",\"tokens\":", &mut |out, entry| {
        put(out, &*completion_key(as_ids, entry.token, &entry.text, &entry.bytes))
    });
    list(out, ",\"top_logprobs\":", &mut |out, entry| match entry.logprob {
        Some(logprob) => put_top(out, entry, logprob, as_ids),
        None => put_raw(out, "null"),
    });
    put_raw(out, "}");
}

/// `{text: logprob…}`. Tokens that read the same keep the first, as an object has no double keys.
fn put_top(out: &mut BytesMut, entry: &TokenLogprob, logprob: f32, as_ids: bool) {
    let TokenLogprob { token, text, bytes, top, .. } = entry;
    let chosen = (!top.iter().any(|t| t.token == *token))
        .then(|| (completion_key(as_ids, *token, text, bytes), logprob));
    let top = top.iter().map(|t| (completion_key(as_ids, t.token, &t.text, &t.bytes), t.logprob));
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
fn completion_key<'t>(as_ids: bool, token: TokenId, text: &'t str, bytes: &[u8]) -> Cow<'t, str> {
    if as_ids || std::str::from_utf8(bytes).is_ok() {
        return name(as_ids, token, text);
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

/// A token by its text, or as vLLM's `return_tokens_as_token_ids` has it.
fn name(as_ids: bool, token: TokenId, text: &str) -> Cow<'_, str> {
    if as_ids { Cow::Owned(format!("token_id:{token}")) } else { Cow::Borrowed(text) }
}

/// `,"prompt_logprobs":[null,{"ID":{"logprob":…,"rank":…,"decoded_token":…},…},…]`
pub(crate) fn put_prompt_logprobs(out: &mut BytesMut, logprobs: &[Vec<RankedLogprob>]) {
    put_raw(out, ",\"prompt_logprobs\":[");
    for (i, entry) in logprobs.iter().enumerate() {
        put_raw(out, if i > 0 { "," } else { "" });
        if entry.is_empty() {
            put_raw(out, "null");
            continue;
        }
        for (j, RankedLogprob { token, text, logprob, rank }) in entry.iter().enumerate() {
            put_raw(out, if j > 0 { ",\"" } else { "{\"" });
            put(out, token);
            put_raw(out, "\":{\"logprob\":");
            put_logprob(out, *logprob);
            put_raw(out, ",\"rank\":");
            put(out, rank);
            put_raw(out, ",\"decoded_token\":");
            put(out, text);
            put_raw(out, "}");
        }
        put_raw(out, "}");
    }
    put_raw(out, "]");
}
