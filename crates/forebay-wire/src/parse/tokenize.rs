//! `POST /tokenize` and `POST /detokenize`, in vLLM's shape.

use bytes::Bytes;
use serde_json::Value;

use super::chat::messages;
use super::field::Fields;
use super::tools::tools;
use super::{ParseError, model};
use crate::{Detokenize, Tokenize, TokenizeInput};

/// Ids in one request. A body of 10 MiB has fewer than twice as many.
const TOKENS_MAX: usize = 4 << 20;

pub(super) fn parse(fields: &Fields<'_>, body: &Bytes) -> Result<Tokenize, ParseError> {
    const TEMPLATE: &str = "the model's own chat template is used as it is";
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
            fields.refuse("chat_template_kwargs", &["{}"], TEMPLATE)?;
            fields.refuse("continue_final_message", &["false"], "a reply always begins a new message")?;
            let add_generation_prompt = fields.boolean("add_generation_prompt")?.unwrap_or(true);
            // They only have to be shown here, whoever can call them.
            let tools = tools(fields, &mut Vec::new())?.map(Value::Array);
            TokenizeInput::Messages { messages, tools, add_generation_prompt }
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
