//! `POST /v1/embeddings`, with the fields that vLLM adds.

use bytes::Bytes;

use super::completion::prompts;
use super::field::Fields;
use super::tokens::request_id;
use super::{ParseError, required_model, shown};
use crate::{Embed, Need, VectorFormat};

/// Inputs of one request, as OpenAI has it.
const INPUTS_MAX: usize = 2048;
/// More than any model's vectors have.
const DIMENSIONS_MAX: i64 = 1 << 20;

pub(super) fn parse(fields: &Fields<'_>, body: &Bytes) -> Result<Embed, ParseError> {
    let mut needs: Vec<Need> = [
        fields.need("messages", &[], "send the text as 'input'"),
        fields.need("embed_dtype", &["\"float32\""], "vectors are float32"),
        fields.need("endianness", &["\"native\"", "\"little\""], "vectors are little-endian"),
    ]
    .into_iter()
    .flatten()
    .collect();
    let encoding = fields.string("encoding_format")?;
    let format = match encoding.as_deref() {
        None | Some("float") => VectorFormat::Float,
        Some("base64") => VectorFormat::Base64,
        Some("bytes" | "bytes_only") => {
            let what = "ask for 'float' or 'base64'";
            needs.push(Need { param: "encoding_format".into(), what });
            VectorFormat::Float
        }
        Some(other) => {
            let what = format!("'{}' is not one of 'float' and 'base64'", shown(other));
            return Err(ParseError::value("encoding_format", what));
        }
    };
    // vLLM's newer name goes first.
    let normalize = match fields.boolean("use_activation")? {
        Some(normalize) => Some(normalize),
        None => fields.boolean("normalize")?,
    };
    Ok(Embed {
        model: required_model(fields)?,
        input: prompts(fields, "input", INPUTS_MAX)?,
        format,
        dimensions: fields.integer("dimensions", 1..=DIMENSIONS_MAX)?.map(|n| n as u32),
        normalize,
        truncate_prompt_tokens: fields
            .integer("truncate_prompt_tokens", -1..=i64::from(i32::MAX))?
            .map(|n| n as i32),
        add_special_tokens: fields.boolean("add_special_tokens")?.unwrap_or(true),
        priority: fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.unwrap_or(0) as i32,
        request_id: request_id(fields)?,
        user: fields.string("user")?,
        needs,
        body: body.clone(),
    })
}
