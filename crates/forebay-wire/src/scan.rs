//! Looks into an upstream's bytes for what the accounting needs, without parsing what it does not need.
//!
//! A frame of a token costs a few searches for fixed strings. Only a frame with a `usage` that is not null, or one
//! that may be an error, is parsed.

use std::borrow::Cow;

use forebay_types::Usage;
use memchr::memmem;
use serde::Deserialize;
use serde::de::IgnoredAny;

/// What one SSE frame says besides its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FrameInfo {
    pub usage: Option<Usage>,
    /// Usage and no choices: the frame that `include_usage` adds, and that is swallowed for a client that did not ask.
    pub usage_only: bool,
    /// Pieces of text, reasoning or tool arguments in it: close to the tokens, as servers send one per token.
    pub deltas: u32,
    /// `data: [DONE]`
    pub done: bool,
    /// An error object instead of choices.
    pub error: bool,
}

#[derive(Deserialize)]
struct WireUsage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    prompt_tokens_details: Option<WireDetails>,
    completion_tokens_details: Option<WireDetails>,
}

#[derive(Deserialize)]
struct WireDetails {
    cached_tokens: Option<u64>,
    reasoning_tokens: Option<u64>,
}

impl From<WireUsage> for Usage {
    fn from(wire: WireUsage) -> Self {
        let count = |n: Option<u64>| u32::try_from(n.unwrap_or(0)).unwrap_or(u32::MAX);
        Self {
            prompt_tokens: count(wire.prompt_tokens),
            completion_tokens: count(wire.completion_tokens),
            cached_tokens: count(wire.prompt_tokens_details.and_then(|d| d.cached_tokens)),
            reasoning_tokens: count(wire.completion_tokens_details.and_then(|d| d.reasoning_tokens)),
        }
    }
}

#[derive(Deserialize)]
struct WireFrame<'a> {
    usage: Option<WireUsage>,
    error: Option<IgnoredAny>,
    choices: Option<Vec<IgnoredAny>>,
    #[serde(borrow)]
    object: Option<Cow<'a, str>>,
}

/// Looks into one SSE frame. Bytes that are not what they should be give the default: nothing was seen.
pub fn scan_frame(frame: &[u8]) -> FrameInfo {
    let mut info = FrameInfo::default();
    let data = data_of(frame);
    if data.is_empty() {
        return info;
    }
    if data.trim_ascii() == b"[DONE]" {
        info.done = true;
        return info;
    }
    info.deltas = count_deltas(&data);
    let may_be_usage = has_value(&data, b"\"usage\"", |value| !value.starts_with(b"null"));
    let may_be_error = memmem::find(&data, b"\"error\"").is_some();
    if (may_be_usage || may_be_error)
        && let Ok(wire) = serde_json::from_slice::<WireFrame<'_>>(&data)
    {
        info.usage = wire.usage.map(Usage::from);
        info.usage_only = info.usage.is_some() && wire.choices.is_some_and(|choices| choices.is_empty());
        info.error = wire.error.is_some() || wire.object.as_deref() == Some("error");
    }
    info
}

/// Usage of a JSON body that is not a stream.
pub fn scan_body(body: &[u8]) -> Option<Usage> {
    #[derive(Deserialize)]
    struct Body {
        usage: Option<WireUsage>,
    }
    memmem::find(body, b"\"usage\"")?;
    serde_json::from_slice::<Body>(body).ok()?.usage.map(Usage::from)
}

/// The frame's data: the text after `data:`, lines joined by LF. Borrowed where there is one line, as is usual.
fn data_of(frame: &[u8]) -> Cow<'_, [u8]> {
    let mut lines = frame.split(|b| *b == b'\n').filter_map(|line| {
        let data = line.strip_suffix(b"\r").unwrap_or(line).strip_prefix(b"data:")?;
        Some(data.strip_prefix(b" ").unwrap_or(data))
    });
    let Some(first) = lines.next() else { return Cow::Borrowed(&[]) };
    let mut data = Cow::Borrowed(first);
    for line in lines {
        let data = data.to_mut();
        data.push(b'\n');
        data.extend_from_slice(line);
    }
    data
}

/// A quote within a JSON string is escaped, so `"content"` with both quotes is always a whole string, never text.
fn count_deltas(data: &[u8]) -> u32 {
    let texts = |key: &[u8]| {
        values(data, key)
            .filter(|value| value.first() == Some(&b'"') && value.get(1).is_some_and(|b| *b != b'"'))
            .count() as u32
    };
    // Servers name reasoning either way, and some send both with the same text.
    let reasoning = texts(b"\"reasoning_content\"").max(texts(b"\"reasoning\""));
    texts(b"\"content\"") + texts(b"\"text\"") + texts(b"\"arguments\"") + reasoning
}

fn has_value(data: &[u8], key: &[u8], wanted: impl Fn(&[u8]) -> bool) -> bool {
    values(data, key).any(wanted)
}

/// What follows each `key` and its colon.
fn values<'a>(data: &'a [u8], key: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    memmem::find_iter(data, key).filter_map(move |at| {
        let rest = data[at + key.len()..].trim_ascii_start();
        Some(rest.strip_prefix(b":")?.trim_ascii_start())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn usage(prompt: u32, completion: u32, cached: u32) -> Option<Usage> {
        Some(Usage {
            prompt_tokens: prompt,
            completion_tokens: completion,
            cached_tokens: cached,
            ..Usage::default()
        })
    }

    #[test]
    fn frames() {
        let check =
            |frame: &str, expect: FrameInfo| assert_eq!(scan_frame(frame.as_bytes()), expect, "{frame}");
        let none = FrameInfo::default();
        let text = FrameInfo { deltas: 1, ..none };
        check(": ping\n\n", none);
        check("data: [DONE]\n\n", FrameInfo { done: true, ..none });
        check("data:[DONE]\r\n\r\n", FrameInfo { done: true, ..none });
        check("data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"hi\"}}],\"usage\":null}\n\n", text);
        check("data: {\"choices\": [{\"delta\": {\"content\": \"hi\"}}], \"usage\": null}\n\n", text);
        check("data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n", none);
        check(
            "data: {\"choices\":[{\"delta\":{},\"logprobs\":{\"content\":[{\"token\":\"a\"}]}}]}\n\n",
            none,
        );
        check("data: {\"choices\":[{\"text\":\"hi\",\"index\":0}]}\n\n", text);
        check(
            "data: {\"choices\":[{\"delta\":{\"tool_calls\":[{\"function\":{\"arguments\":\"{}\"}}]}}]}\n\n",
            text,
        );
        check(
            "data: {\"choices\":[{\"delta\":{\"reasoning\":\"a\",\"reasoning_content\":\"a\"}}]}\n\n",
            text,
        );
        // Text that looks like JSON stays text.
        check("data: {\"choices\":[{\"delta\":{\"content\":\"{\\\"content\\\":\\\"x\\\"}\"}}]}\n\n", text);
        check("data: {\"choices\":[{\"delta\":{\"content\":\"\\\"error\\\"\"}}]}\n\n", text);
        check("data: {\"choices\":[{\"delta\":{\"content\":\"error\"}}]}\n\n", text);
        check(
            "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4,\"total_tokens\":7,\
             \"prompt_tokens_details\":{\"cached_tokens\":2}}}\n\n",
            FrameInfo { usage: usage(3, 4, 2), usage_only: true, ..none },
        );
        check(
            "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":{\"prompt_tokens\":3,\
             \"completion_tokens\":1,\"prompt_tokens_details\":null}}\n\n",
            FrameInfo { usage: usage(3, 1, 0), deltas: 1, ..none },
        );
        check("data: {\"error\":{\"message\":\"m\"}}\n\n", FrameInfo { error: true, ..none });
        check("data: {\"error\":null,\"choices\":[]}\n\n", none);
        check("data: {\"object\":\"error\",\"message\":\"m\"}\n\n", FrameInfo { error: true, ..none });
        check("event: error\ndata: {\"error\":\ndata: \"x\"}\n\n", FrameInfo { error: true, ..none });
        check("data: {\"usage\":{\"prompt_tokens\":\n\n", none);
    }

    #[test]
    fn bodies() {
        let body = br#"{"choices":[{"message":{"content":"\"usage\":"}}],"usage":{"prompt_tokens":9,"completion_tokens":1}}"#;
        assert_eq!(scan_body(body), usage(9, 1, 0));
        assert_eq!(scan_body(br#"{"usage":null}"#), None);
        assert_eq!(scan_body(br#"{"data":[]}"#), None);
        assert_eq!(scan_body(br#"{"usage":{"prompt_tokens":99999999999}}"#), usage(u32::MAX, 0, 0));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            scan_frame(&bytes);
            scan_body(&bytes);
        }
    }
}
