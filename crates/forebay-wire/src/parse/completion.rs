//! `POST /v1/completions`

use bytes::Bytes;
use serde_json::value::RawValue;

use super::ParseError;
use super::field::{Fields, Kind, ids, kind_of, read};
use super::sampling::{self, LOGPROBS_MAX};
use crate::{Api, Generate, Need, Prompt};

const PROMPTS_MAX: usize = 256;

pub(super) fn parse(fields: &Fields<'_>, body: &Bytes) -> Result<Generate, ParseError> {
    fields.refuse("prompt_embeds", &[], "send the prompt as text or token ids")?;
    let suffix = fields.need("suffix", &["\"\""], "the models here don't fill in the middle");
    let prompt = prompts(fields, "prompt", PROMPTS_MAX)?;
    let logprobs = fields.integer("logprobs", 0..=LOGPROBS_MAX)?.map(|n| n as u32);
    let needs = suffix.into_iter().collect();
    let mut call = sampling::parse(fields, Api::Completions, prompt, logprobs, needs, body)?;
    // Choosing the best of more is not done; asking for exactly what is returned changes nothing.
    if fields.integer("best_of", 1..=i64::from(i32::MAX))?.is_some_and(|best_of| best_of != i64::from(call.n))
    {
        let what = "every choice that is generated is returned; set it to 'n' or leave it out";
        call.needs.push(Need { param: "best_of".into(), what });
    }
    Ok(call)
}

/// A string, an array of strings, an array of token ids, or an array of these.
pub(super) fn prompts(
    fields: &Fields<'_>,
    name: &'static str,
    items_max: usize,
) -> Result<Prompt, ParseError> {
    const EXPECTED: &str = "one of a string, array of strings, array of integers or array of integer arrays";
    let mistyped = |param: String, got| ParseError::Type { param, expected: EXPECTED, got };
    match fields.kind(name) {
        None => Err(ParseError::Missing { param: name.into() }),
        Some(Kind::String) => Ok(Prompt::Text(fields.string(name)?.into_iter().collect())),
        Some(Kind::Array) => {
            let raw = fields.raw(name).unwrap_or_default();
            // A long prompt of token ids must not become a list of raw values first.
            if raw[1..].trim_start().starts_with(|c: char| c.is_ascii_digit() || c == '-') {
                return Ok(Prompt::Tokens(vec![ids(name, raw)?]));
            }
            let items = fields.array(name, items_max)?.unwrap_or_default();
            let Some(first) = items.first() else {
                return Err(ParseError::value(name, format!("empty array. Expected at least one {name}")));
            };
            match kind_of(first) {
                Kind::String => each(name, &items, Kind::String, EXPECTED, read).map(Prompt::Text),
                Kind::Array => {
                    let prompts = each(name, &items, Kind::Array, EXPECTED, ids)?;
                    if let Some(i) = prompts.iter().position(Vec::is_empty) {
                        return Err(ParseError::value(
                            format!("{name}[{i}]"),
                            "empty array. Expected token ids",
                        ));
                    }
                    Ok(Prompt::Tokens(prompts))
                }
                got => Err(mistyped(format!("{name}[0]"), got)),
            }
        }
        Some(got) => Err(mistyped(name.into(), got)),
    }
}

fn each<'a, T>(
    name: &str,
    items: &[&'a RawValue],
    kind: Kind,
    expected: &'static str,
    read: impl Fn(&str, &'a str) -> Result<T, ParseError>,
) -> Result<Vec<T>, ParseError> {
    let one = |(i, raw): (usize, &&'a RawValue)| {
        let param = format!("{name}[{i}]");
        match kind_of(raw) {
            got if got != kind => Err(ParseError::Type { param, expected, got }),
            _ => read(&param, raw.get()),
        }
    };
    items.iter().enumerate().map(one).collect()
}
