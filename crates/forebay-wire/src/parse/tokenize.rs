//! `POST /tokenize` and `POST /detokenize`, in vLLM's shape.

use bytes::Bytes;
use serde_json::Value;

use super::chat::{messages, template_kwargs};
use super::field::Fields;
use super::tokens::continue_final_message;
use super::tools::tools;
use super::{ParseError, model};
use crate::{Detokenize, Tokenize, TokenizeInput};

/// Ids in one request. A body of 10 MiB has fewer than twice as many.
const TOKENS_MAX: usize = 4 << 20;

pub(super) fn parse(fields: &Fields<'_>, body: &Bytes) -> Result<Tokenize, ParseError> {
    const TEMPLATE: &str = "the model's own chat template is used as it is";
    const TEXT_ONLY: &str = "the models here read text only";
    let prompt = fields.string("prompt")?;
    let mut needs = Vec::new();
    let messages = messages(fields, &mut needs)?;
    // The count would be wrong, and its reply has no place to say so.
    if let Some(need) = needs.pop() {
        return Err(ParseError::NotSupported(need));
    }
    let input = match (prompt, messages) {
        (Some(_), Some(_)) => {
            return Err(ParseError::value("messages", "'prompt' is there too. Set one of them"));
        }
        (Some(prompt), None) => TokenizeInput::Prompt(prompt),
        (None, Some(messages)) => {
            fields.refuse("chat_template", &[], TEMPLATE)?;
            for name in ["mm_processor_kwargs", "media_io_kwargs"] {
                fields.refuse(name, &["{}"], TEXT_ONLY)?;
            }
            TokenizeInput::Messages {
                messages,
                // They only have to be shown here, whoever can call them.
                tools: tools(fields, &mut Vec::new())?.map(Value::Array),
                add_generation_prompt: fields.boolean("add_generation_prompt")?.unwrap_or(true),
                continue_final_message: continue_final_message(fields)?,
                chat_template_kwargs: template_kwargs(fields)?,
            }
        }
        (None, None) => return Err(ParseError::Missing { param: "prompt".into() }),
    };
    Ok(Tokenize {
        model: model(fields)?,
        input,
        add_special_tokens: fields.boolean("add_special_tokens")?,
        return_token_strs: fields.boolean("return_token_strs")?.unwrap_or(false),
        body: body.clone(),
    })
}

pub(super) fn parse_detokenize(fields: &Fields<'_>, body: &Bytes) -> Result<Detokenize, ParseError> {
    let tokens = fields.token_ids("tokens", TOKENS_MAX)?;
    let tokens = tokens.ok_or(ParseError::Missing { param: "tokens".into() })?;
    Ok(Detokenize { model: model(fields)?, tokens, body: body.clone() })
}
