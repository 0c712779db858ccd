//! Fields that chat and completions share: how many, how long, how the next token is chosen.

use std::collections::BTreeMap;

use bytes::Bytes;
use forebay_types::TokenId;

use super::field::{Fields, Kind, kind_of, read};
use super::{ParseError, constraint, required_model, tokens};
use crate::{Api, Generate, LeftOpen, Need, Prompt, Sampling};

/// OpenAI's limit on `n`.
const N_MAX: i64 = 128;
/// Choices over all prompts: each is a sequence of its own in the engine.
const CHOICES_MAX: usize = 512;
/// OpenAI takes 4, vLLM any number. An upstream with a lower limit says so itself.
const STOPS_MAX: usize = 16;
/// Output as long as this is held back to find a stop string in it.
const STOP_BYTES_MAX: usize = 1024;
const STOP_IDS_MAX: usize = 256;
const LOGIT_BIAS_MAX: usize = 1024;
const ALLOWED_IDS_MAX: usize = 16_384;
const BAD_WORDS_MAX: usize = 128;
/// vLLM's limit.
const SALT_CHARS_MAX: usize = 1024;
pub(super) const LOGPROBS_MAX: i64 = 1000;

/// Fields of vLLM and OpenAI that change the answer, with the values that change nothing.
const NEEDS: &[(&str, &[&str], &str)] = &[
    ("use_beam_search", &["false"], "the engine samples, it has no beam search"),
    ("length_penalty", &["1", "1.0"], "it ranks beams, and the engine has no beam search"),
    ("thinking_token_budget", &["-1"], "limit the output with 'max_tokens'"),
    ("repetition_detection", &[], "limit the output with 'max_tokens', or 'repetition_penalty' against it"),
    ("watermarking", &["false"], "output is not watermarked"),
    ("kv_transfer_params", &[], "KV blocks are not exchanged with other engines"),
    ("ec_transfer_params", &[], "there is no encoder whose cache could be exchanged"),
    ("mm_processor_kwargs", &["{}"], "the models here read text only"),
    ("media_io_kwargs", &["{}"], "the models here read text only"),
    ("vllm_xargs", &["{}"], "there are no extensions that would read it"),
    ("return_prompt_text", &["false"], "ask for 'return_token_ids' and detokenize them"),
    ("return_token_offsets", &["false"], "tokens are returned without offsets"),
    ("routed_experts_prompt_start", &["0"], "experts are not reported"),
];

/// Everything of a call but its prompt-specific fields.
pub(super) fn parse(
    fields: &Fields<'_>,
    api: Api,
    prompt: Prompt,
    logprobs: Option<u32>,
    mut needs: Vec<Need>,
    body: &Bytes,
) -> Result<Generate, ParseError> {
    let model = required_model(fields)?;
    for (name, harmless, what) in NEEDS {
        needs.extend(fields.need(name, harmless, what));
    }
    let constraint = constraint::parse(fields, &mut needs)?;

    let n = fields.integer("n", 1..=N_MAX)?.unwrap_or(1) as u32;
    if prompt.count() * n as usize > CHOICES_MAX {
        let what =
            format!("{} prompts with {n} choices each are more than {CHOICES_MAX} choices", prompt.count());
        return Err(ParseError::value("n", what));
    }
    let echo = fields.boolean("echo")?.unwrap_or(false);
    let max_tokens = max_tokens(fields, api == Api::Completions && echo)?;
    let min_tokens = fields.integer("min_tokens", 0..=i64::from(i32::MAX))?.unwrap_or(0) as u32;
    if let Some(max) = max_tokens.filter(|max| *max < min_tokens) {
        let what = format!("Expected a value <= 'max_tokens' ({max}), but got {min_tokens} instead");
        return Err(ParseError::value("min_tokens", what));
    }
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let (include_usage, continuous_usage) = stream_options(fields, stream)?;

    let mut call = Generate {
        n,
        max_tokens,
        min_tokens,
        sampling: sampling(fields)?,
        stop: stop(fields)?,
        stop_token_ids: fields.token_ids("stop_token_ids", STOP_IDS_MAX)?.unwrap_or_default(),
        include_stop_str_in_output: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        logprobs,
        echo,
        stream,
        include_usage,
        continuous_usage,
        user: fields.string("user")?,
        cache_salt: cache_salt(fields)?,
        priority: fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.unwrap_or(0) as i32,
        constraint,
        bad_words: bad_words(fields)?,
        needs,
        body: body.clone(),
        ..Generate::new(api, model, prompt)
    };
    tokens::parse(fields, &mut call)?;
    Ok(call)
}

/// `max_completion_tokens` is the newer name. Both may be there if they agree. None at all may be asked for where the
/// reply has something else to show: the prompt.
fn max_tokens(fields: &Fields<'_>, or_none: bool) -> Result<Option<u32>, ParseError> {
    let read = |name| fields.integer(name, i64::from(!or_none)..=i64::from(i32::MAX));
    match (read("max_tokens")?, read("max_completion_tokens")?) {
        (Some(old), Some(new)) if old != new => Err(ParseError::value(
            "max_tokens",
            format!("{old} contradicts 'max_completion_tokens' ({new}). Set one of them"),
        )),
        (old, new) => Ok(new.or(old).map(|n| n as u32)),
    }
}

/// `include_usage` and `continuous_usage_stats`.
fn stream_options(fields: &Fields<'_>, stream: bool) -> Result<(bool, bool), ParseError> {
    let Some(options) = fields.inner("stream_options", "stream_options.")? else { return Ok((false, false)) };
    if !stream {
        return Err(ParseError::value("stream_options", "only allowed when 'stream' is enabled"));
    }
    let on = |option| Ok(options.boolean(option)?.unwrap_or(false));
    Ok((on("include_usage")?, on("continuous_usage_stats")?))
}

fn sampling(fields: &Fields<'_>) -> Result<Sampling, ParseError> {
    let default = Sampling::default();
    let temperature = fields.number("temperature", 0.0..=2.0)?;
    let top_p = fields.number("top_p", 0.0..=1.0)?;
    let min_p = fields.number("min_p", 0.0..=1.0)?;
    let repetition_penalty = fields.number("repetition_penalty", 0.0..=f32::MAX)?;
    // -1 is vLLM's other spelling of "off" for `top_k` and of "none" for `seed`.
    let top_k = fields.integer("top_k", -1..=i64::from(i32::MAX))?;
    let left_open = LeftOpen {
        temperature: temperature.is_none(),
        top_p: top_p.is_none(),
        top_k: top_k.is_none(),
        min_p: min_p.is_none(),
        repetition_penalty: repetition_penalty.is_none(),
    };
    let top_p = top_p.unwrap_or(default.top_p);
    if top_p <= 0.0 {
        return Err(ParseError::value(
            "top_p",
            "Expected a value > 0 and <= 1; for greedy output set 'temperature' to 0",
        ));
    }
    let repetition_penalty = repetition_penalty.unwrap_or(default.repetition_penalty);
    if repetition_penalty <= 0.0 {
        return Err(ParseError::value("repetition_penalty", "Expected a value > 0"));
    }
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?.filter(|seed| *seed != -1);
    Ok(Sampling {
        temperature: temperature.unwrap_or(default.temperature),
        top_p,
        top_k: top_k.unwrap_or(0).max(0) as u32,
        min_p: min_p.unwrap_or(default.min_p),
        seed: seed.map(|seed| seed as u64),
        repetition_penalty,
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(default.presence_penalty),
        frequency_penalty: fields
            .number("frequency_penalty", -2.0..=2.0)?
            .unwrap_or(default.frequency_penalty),
        logit_bias: logit_bias(fields)?,
        allowed_token_ids: allowed_token_ids(fields)?,
        left_open,
    })
}

fn logit_bias(fields: &Fields<'_>) -> Result<Vec<(TokenId, f32)>, ParseError> {
    let (Some(raw), Some(kind)) = (fields.raw("logit_bias"), fields.kind("logit_bias")) else {
        return Ok(Vec::new());
    };
    if kind != Kind::Object {
        let param = "logit_bias".into();
        return Err(ParseError::Type { param, expected: "an object", got: kind });
    }
    let map: BTreeMap<String, serde_json::Value> = fields.read("logit_bias", raw)?;
    if map.len() > LOGIT_BIAS_MAX {
        let what = format!("expected at most {LOGIT_BIAS_MAX} tokens, but got {}", map.len());
        return Err(ParseError::value("logit_bias", what));
    }
    map.into_iter()
        .map(|(token, bias)| {
            let token = token.parse().map_err(|_| {
                ParseError::value("logit_bias", "every key must be a token id, an integer from 0")
            })?;
            let bias = bias.as_f64().filter(|bias| bias.abs() <= 100.0).ok_or_else(|| {
                ParseError::value("logit_bias", "every value must be a number from -100 to 100")
            })?;
            Ok((token, bias as f32))
        })
        .collect()
}

fn stop(fields: &Fields<'_>) -> Result<Vec<String>, ParseError> {
    let stops = match fields.kind("stop") {
        None => return Ok(Vec::new()),
        Some(Kind::String) => fields.string("stop")?.into_iter().collect(),
        Some(Kind::Array) => {
            let items = fields.array("stop", STOPS_MAX)?.unwrap_or_default();
            let string = |(i, raw): (usize, &&serde_json::value::RawValue)| {
                let param = format!("stop[{i}]");
                match kind_of(raw) {
                    Kind::String => read(&param, raw.get()),
                    got => Err(ParseError::Type { param, expected: "a string", got }),
                }
            };
            items.iter().enumerate().map(string).collect::<Result<Vec<String>, _>>()?
        }
        Some(got) => {
            let expected = "one of a string or an array of strings";
            return Err(ParseError::Type { param: "stop".into(), expected, got });
        }
    };
    if stops.iter().any(String::is_empty) {
        return Err(ParseError::value("stop", "a stop sequence can't be an empty string"));
    }
    if stops.iter().any(|stop| stop.len() > STOP_BYTES_MAX) {
        let what = format!("a stop sequence can't be longer than {STOP_BYTES_MAX} bytes");
        return Err(ParseError::value("stop", what));
    }
    Ok(stops)
}

fn allowed_token_ids(fields: &Fields<'_>) -> Result<Option<Vec<TokenId>>, ParseError> {
    let ids = fields.token_ids("allowed_token_ids", ALLOWED_IDS_MAX)?;
    match &ids {
        Some(ids) if ids.is_empty() => {
            Err(ParseError::value("allowed_token_ids", "empty array. Expected at least one token id"))
        }
        _ => Ok(ids),
    }
}

fn bad_words(fields: &Fields<'_>) -> Result<Vec<String>, ParseError> {
    let items = fields.array("bad_words", BAD_WORDS_MAX)?.unwrap_or_default();
    let word = |(i, raw): (usize, &serde_json::value::RawValue)| {
        let param = format!("bad_words[{i}]");
        let word = match kind_of(raw) {
            Kind::String => read::<String>(&param, raw.get())?,
            got => return Err(ParseError::Type { param, expected: "a string", got }),
        };
        if word.trim().is_empty() || word.len() > STOP_BYTES_MAX {
            return Err(ParseError::value(param, format!("expected 1 to {STOP_BYTES_MAX} bytes")));
        }
        Ok(word)
    };
    items.into_iter().enumerate().map(word).collect()
}

fn cache_salt(fields: &Fields<'_>) -> Result<Option<String>, ParseError> {
    let salt = fields.string("cache_salt")?;
    match &salt {
        Some(salt) if salt.is_empty() || salt.chars().count() > SALT_CHARS_MAX => {
            Err(ParseError::value("cache_salt", format!("expected 1 to {SALT_CHARS_MAX} characters")))
        }
        _ => Ok(salt),
    }
}
