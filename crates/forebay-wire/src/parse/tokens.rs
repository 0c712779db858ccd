//! Tokens instead of text: ids in and out, log-probabilities of a prompt, how a prompt is cut. All of it vLLM's.

use super::ParseError;
use super::field::Fields;
use super::sampling::LOGPROBS_MAX;
use crate::{Generate, TruncationSide};

/// Each is looked up for every token.
const LOGPROB_IDS_MAX: usize = 128;
const REQUEST_ID_BYTES_MAX: usize = 256;

/// Reads what the rest of the call gives a meaning to.
pub(super) fn parse(fields: &Fields<'_>, call: &mut Generate) -> Result<(), ParseError> {
    let flag = |name, otherwise| Ok::<bool, ParseError>(fields.boolean(name)?.unwrap_or(otherwise));
    call.return_token_ids = flag("return_token_ids", false)?;
    call.tokens_as_ids = fields.boolean("return_tokens_as_token_ids")?;
    call.skip_special_tokens = flag("skip_special_tokens", true)?;
    // The tokenizers here put no spaces between special tokens, so there are none to leave out.
    flag("spaces_between_special_tokens", true)?;
    call.add_special_tokens = fields.boolean("add_special_tokens")?;
    call.stream_interval = fields.integer("stream_interval", 1..=i64::from(i32::MAX))?.unwrap_or(1) as u32;
    // Where related requests go is decided by what they have in common; the id adds nothing.
    fields.string("session_id")?;
    call.request_id = request_id(fields)?;
    prompt_logprobs(fields, call)?;
    logprob_token_ids(fields, call)?;
    truncation(fields, call)
}

/// What the reply's id is made of.
pub(super) fn request_id(fields: &Fields<'_>) -> Result<Option<String>, ParseError> {
    let id = fields.string("request_id")?;
    match &id {
        Some(id) if id.is_empty() || id.len() > REQUEST_ID_BYTES_MAX => {
            Err(ParseError::value("request_id", format!("expected 1 to {REQUEST_ID_BYTES_MAX} bytes")))
        }
        _ => Ok(id),
    }
}

fn prompt_logprobs(fields: &Fields<'_>, call: &mut Generate) -> Result<(), ParseError> {
    let wanted = fields.integer("prompt_logprobs", 0..=LOGPROBS_MAX)?;
    if wanted.is_some() && call.stream {
        return Err(ParseError::value("prompt_logprobs", "not available when 'stream' is enabled"));
    }
    call.prompt_logprobs = wanted.map(|n| n as u32);
    Ok(())
}

fn logprob_token_ids(fields: &Fields<'_>, call: &mut Generate) -> Result<(), ParseError> {
    let refuse = |what| Err(ParseError::value("logprob_token_ids", what));
    let Some(ids) = fields.token_ids("logprob_token_ids", LOGPROB_IDS_MAX)? else { return Ok(()) };
    if ids.is_empty() {
        return refuse("empty array. Expected at least one token id");
    }
    if call.logprobs.is_none() {
        return refuse("only allowed when 'logprobs' is set");
    }
    if call.max_tokens == Some(0) {
        return refuse("not available when 'max_tokens' is 0, as no output is generated");
    }
    call.logprob_token_ids = ids;
    Ok(())
}

fn truncation(fields: &Fields<'_>, call: &mut Generate) -> Result<(), ParseError> {
    let keep = fields.integer("truncate_prompt_tokens", -1..=i64::from(i32::MAX))?;
    if keep == Some(0) {
        let what = "0 leaves nothing of the prompt. Expected a value >= 1, or -1 for as many tokens as fit";
        return Err(ParseError::value("truncate_prompt_tokens", what));
    }
    call.truncate_prompt_tokens = keep.map(|n| n as i32);
    call.truncation_side = match fields.string("truncation_side")?.as_deref() {
        None | Some("left") => TruncationSide::Left,
        Some("right") => TruncationSide::Right,
        Some(_) => {
            return Err(ParseError::value("truncation_side", "Supported values are: 'left' and 'right'"));
        }
    };
    Ok(())
}

/// `continue_final_message`, which the prompt of an answer excludes: that would begin a message of its own.
pub(super) fn continue_final_message(fields: &Fields<'_>) -> Result<bool, ParseError> {
    let wanted = fields.boolean("continue_final_message")?.unwrap_or(false);
    if wanted && fields.boolean("add_generation_prompt")?.unwrap_or(true) {
        let what = "only allowed when 'add_generation_prompt' is false";
        return Err(ParseError::value("continue_final_message", what));
    }
    Ok(wanted)
}
