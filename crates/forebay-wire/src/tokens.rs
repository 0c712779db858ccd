//! vLLM's token-in token-out API: its reply, and the request for it that `/render` answers with.

use bytes::{Bytes, BytesMut};
use forebay_types::TokenId;
use serde_json::{Value, json};

use crate::json::{put, put_logprob, put_raw};
use crate::{Constraint, Generate, TokenLogprob};

/// One request of `POST /inference/v1/generate` that generates what a call asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct TokensCall<'a> {
    pub token_ids: &'a [TokenId],
    /// What the call may generate for this prompt.
    pub max_tokens: u32,
}

/// The body of `/v1/chat/completions/render` (one object) and of `/v1/completions/render` (a list, one per prompt).
///
/// `id` is the request's, without a prefix. What is rendered is understood by [`parse`](crate::parse()) as the same call.
pub fn render_tokens_calls(id: &str, call: &Generate, prompts: &[TokensCall<'_>]) -> Bytes {
    let prefix = match call.api {
        crate::Api::ChatCompletions => "chatcmpl-",
        crate::Api::Completions | crate::Api::Tokens => "cmpl-",
    };
    let one = |(i, prompt): (usize, &TokensCall<'_>)| {
        let suffix = if prompts.len() > 1 { format!("-{i}") } else { String::new() };
        json!({
            "request_id": format!("{prefix}{id}{suffix}"),
            "token_ids": prompt.token_ids,
            "features": null,
            "sampling_params": sampling_params(call, prompt.max_tokens),
            "model": call.model.as_str(),
            "stream": call.stream,
            "stream_options": call.include_usage.then(|| json!({
                "include_usage": true,
                "continuous_usage_stats": call.continuous_usage,
            })),
            "cache_salt": call.cache_salt,
            "priority": call.priority,
            "kv_transfer_params": null,
        })
    };
    let calls: Vec<Value> = prompts.iter().enumerate().map(one).collect();
    let body = match (call.api, <[Value; 1]>::try_from(calls)) {
        (crate::Api::ChatCompletions, Ok([one])) => one,
        (_, Ok(one)) => Value::from(one.to_vec()),
        (_, Err(many)) => many.into(),
    };
    body.to_string().into()
}

/// vLLM's `SamplingParams`.
fn sampling_params(call: &Generate, max_tokens: u32) -> Value {
    let sampling = &call.sampling;
    let bias: serde_json::Map<String, Value> =
        sampling.logit_bias.iter().map(|(id, bias)| (id.to_string(), (*bias).into())).collect();
    json!({
        "n": call.n,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        // Signed, as it came.
        "seed": sampling.seed.map(u64::cast_signed),
        "stop": call.stop,
        "stop_token_ids": call.stop_token_ids,
        "bad_words": call.bad_words,
        "include_stop_str_in_output": call.include_stop_str_in_output,
        "ignore_eos": call.ignore_eos,
        "max_tokens": max_tokens,
        "min_tokens": call.min_tokens,
        "logprobs": call.logprobs,
        "prompt_logprobs": call.prompt_logprobs,
        "logprob_token_ids": Some(&call.logprob_token_ids).filter(|ids| !ids.is_empty()),
        "logit_bias": if bias.is_empty() { Value::Null } else { bias.into() },
        "allowed_token_ids": sampling.allowed_token_ids,
        "structured_outputs": call.constraint.as_ref().map(structured_outputs),
    })
}

fn structured_outputs(constraint: &Constraint) -> Value {
    match constraint {
        Constraint::JsonObject => json!({"json_object": true}),
        Constraint::JsonSchema(schema) => json!({"json": schema}),
        Constraint::Regex(regex) => json!({"regex": regex}),
        Constraint::Choice(choices) => json!({"choice": choices}),
        Constraint::Grammar(grammar) => json!({"grammar": grammar}),
    }
}

/// `null`, or `{"content":[{"token":"token_id:7","logprob":…,"bytes":null,"top_logprobs":[…]}…]}`: a token is named by
/// its id, as nothing here is text.
pub(crate) fn put_token_logprobs(out: &mut BytesMut, logprobs: &[TokenLogprob]) {
    if logprobs.is_empty() {
        return put_raw(out, "null");
    }
    for (i, entry) in logprobs.iter().enumerate() {
        put_raw(out, if i > 0 { "," } else { "{\"content\":[" });
        put_named(out, entry.token, entry.logprob.unwrap_or(0.0));
        put_raw(out, ",\"top_logprobs\":[");
        for (i, top) in entry.top.iter().enumerate() {
            put_raw(out, if i > 0 { "," } else { "" });
            put_named(out, top.token, top.logprob);
            put_raw(out, "}");
        }
        put_raw(out, "]}");
    }
    put_raw(out, "]}");
}

/// Left open.
fn put_named(out: &mut BytesMut, token: TokenId, logprob: f32) {
    put_raw(out, "{\"token\":\"token_id:");
    put(out, &token);
    put_raw(out, "\",\"logprob\":");
    put_logprob(out, logprob);
    put_raw(out, ",\"bytes\":null");
}

#[cfg(test)]
mod tests;
