//! `POST /inference/v1/generate`, in vLLM's shape: token ids, and what the other APIs have at the top in `sampling_params`.

use bytes::Bytes;

use super::ParseError;
use super::field::Fields;
use super::sampling::{self, LOGPROBS_MAX};
use crate::{Api, Generate, Need, Prompt};

/// Ids of one prompt. A body of 10 MiB has fewer than twice as many.
const TOKENS_MAX: usize = 4 << 20;

/// What is not a matter of sampling, and so stands beside `sampling_params`.
const OUTER: [&str; 6] = ["cache_salt", "model", "priority", "request_id", "stream", "stream_options"];

/// What can't be done, with the values that ask for nothing.
const NEEDS: &[(&str, &[&str], &str)] = &[
    ("features", &[], "models here read text only"),
    ("content_parts", &[], "models here read text only"),
    ("output_mode", &["\"tokens\""], "tokens are returned; /v1/completions takes token ids and returns text"),
    ("return_token_ids", &["false"], "the prompt's token ids are those that were sent"),
    ("kv_transfer_params", &[], "KV blocks are not taken from or sent to others"),
    ("ec_transfer_params", &[], "models here read text only"),
];

pub(super) fn parse(fields: &Fields<'_>, body: &Bytes) -> Result<Generate, ParseError> {
    let ids = fields.token_ids("token_ids", TOKENS_MAX)?;
    let ids = ids.ok_or(ParseError::Missing { param: "token_ids".into() })?;
    if ids.is_empty() {
        return Err(ParseError::value("token_ids", "empty array. Expected at least one token id"));
    }
    let inner = fields.inner("sampling_params", "")?;
    let inner = inner.ok_or(ParseError::Missing { param: "sampling_params".into() })?;
    let needs: Vec<Need> =
        NEEDS.iter().filter_map(|(name, harmless, what)| fields.need(name, harmless, what)).collect();
    // One object of fields, as the other APIs have it; a mistake is told where it stands.
    let fields = inner.with(fields, &OUTER);
    let read = || {
        let logprobs = fields.integer("logprobs", 0..=LOGPROBS_MAX)?.map(|n| n as u32);
        sampling::parse(&fields, Api::Tokens, Prompt::Tokens(vec![ids]), logprobs, needs, body)
    };
    let mut call = read().map_err(|error| error.below("sampling_params", &OUTER))?;
    for need in call.needs.iter_mut().filter(|need| NEEDS.iter().all(|(name, ..)| *name != need.param)) {
        need.param = format!("sampling_params.{}", need.param);
    }
    call.return_token_ids = true;
    Ok(call)
}
