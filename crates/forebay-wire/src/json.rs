//! Appends JSON to a buffer. Text goes through `serde_json`'s escaper, the punctuation is written as it is: no tree of
//! values on the path of a token.

use bytes::{BufMut, BytesMut};
use forebay_types::Usage;
use serde::Serialize;

/// What a log-probability of minus infinity is written as: JSON has no infinity. The value is vLLM's.
const LOGPROB_MIN: f32 = -9999.0;

/// Appends anything that serializes to JSON without fail: strings, numbers, slices of them.
pub(crate) fn put<T: Serialize + ?Sized>(out: &mut BytesMut, value: &T) {
    serde_json::to_writer(out.writer(), value).expect("plain values serialize, and a buffer grows");
}

pub(crate) fn put_raw(out: &mut BytesMut, json: &str) {
    out.extend_from_slice(json.as_bytes());
}

pub(crate) fn put_logprob(out: &mut BytesMut, logprob: f32) {
    // `max` also turns NaN into the bound.
    put(out, &logprob.max(LOGPROB_MIN));
}

pub(crate) fn put_usage(out: &mut BytesMut, usage: &Usage) {
    put_raw(out, "{\"prompt_tokens\":");
    put(out, &usage.prompt_tokens);
    put_raw(out, ",\"completion_tokens\":");
    put(out, &usage.completion_tokens);
    put_raw(out, ",\"total_tokens\":");
    put(out, &usage.total());
    put_raw(out, ",\"prompt_tokens_details\":{\"cached_tokens\":");
    put(out, &usage.cached_tokens);
    put_raw(out, "}");
    if usage.reasoning_tokens > 0 {
        put_raw(out, ",\"completion_tokens_details\":{\"reasoning_tokens\":");
        put(out, &usage.reasoning_tokens);
        put_raw(out, "}");
    }
    put_raw(out, "}");
}
