//! Prompts to token ids, and the two tokenizer endpoints. Pure CPU work.

use std::sync::Arc;
use std::time::SystemTime;

use forebay_flow::{PromptIds, Reply};
use forebay_tokens::{ChatPrompt, CivilTime, Special, TextModel};
use forebay_types::{Fault, TokenId};
use forebay_wire::{
    Api, ChatMessage, Content, Detokenize, Generate, Prompt, Tokenize, TokenizeInput, TruncationSide,
    render_detokenized, render_tokenized,
};
use serde_json::{Map, Value};

use super::checks::COMPLETION_TOKENS_DEFAULT;

/// The ids of a call's prompts, cut off where it asks for it. `model_len`: tokens that prompt and output may have.
pub(super) fn encode(text: &TextModel, call: &Generate, model_len: u32) -> Result<PromptIds, Fault> {
    let keep = tokens_kept(call, model_len)?;
    let cut = |mut ids: Vec<TokenId>| -> Arc<[TokenId]> {
        if let Some(over) = keep.and_then(|keep| ids.len().checked_sub(keep)) {
            match call.truncation_side {
                TruncationSide::Left => drop(ids.drain(..over)),
                TruncationSide::Right => ids.truncate(ids.len() - over),
            }
        }
        ids.into()
    };
    let prompts: Vec<Arc<[TokenId]>> = match &call.prompt {
        Prompt::Chat { messages, tools, add_generation_prompt, chat_template_kwargs } => {
            let prompt = ChatPrompt {
                add_generation_prompt: *add_generation_prompt,
                continue_final_message: call.continue_final_message,
                kwargs: chat_template_kwargs.as_ref(),
                ..ChatPrompt::new(&[])
            };
            vec![cut(chat(text, messages, tools.as_ref(), prompt, call.add_special_tokens)?)]
        }
        Prompt::Text(texts) => texts
            .iter()
            // A raw prompt may write control tokens, as with OpenAI and vLLM.
            .map(|one| {
                let special = Special { add: call.add_special_tokens.unwrap_or(true), ..Special::ALL };
                Ok(cut(text.encode_text(one, special)?))
            })
            .collect::<Result<_, Fault>>()?,
        Prompt::Tokens(prompts) => prompts.iter().map(|ids| cut(ids.clone())).collect(),
    };
    Ok(PromptIds::Exact { tokenizer: text.tokenizer().id(), prompts })
}

/// How many tokens of each prompt stay; `None` is all.
fn tokens_kept(call: &Generate, model_len: u32) -> Result<Option<usize>, Fault> {
    let Some(asked) = call.truncate_prompt_tokens else { return Ok(None) };
    let output = match call.api {
        Api::Completions => call.max_tokens.unwrap_or(COMPLETION_TOKENS_DEFAULT),
        Api::ChatCompletions | Api::Tokens => call.max_tokens.unwrap_or(1),
    };
    let fits = model_len.saturating_sub(output.max(1));
    match u32::try_from(asked) {
        Ok(asked) if asked > fits => {
            let message = format!(
                "truncate_prompt_tokens={asked} cannot be greater than max_model_len - max_tokens = {fits}. Please request a \
                 smaller truncation size."
            );
            Err(Fault::bad_request(message).param("truncate_prompt_tokens"))
        }
        Ok(asked) => Ok(Some(asked as usize)),
        Err(_) if fits == 0 => Ok(None), // refused with its lengths later
        Err(_) => Ok(Some(fits as usize)),
    }
}

/// The ids of a conversation. `special` puts what the model wants around a text on top of what the template writes.
fn chat(
    text: &TextModel,
    messages: &[ChatMessage],
    tools: Option<&Value>,
    prompt: ChatPrompt<'_>,
    special: Option<bool>,
) -> Result<Vec<TokenId>, Fault> {
    let messages: Vec<Value> = messages.iter().map(message_json).collect();
    let prompt = ChatPrompt {
        messages: &messages,
        tools: tools.and_then(Value::as_array).map(Vec::as_slice),
        now: CivilTime::from(SystemTime::now()),
        ..prompt
    };
    let ids = text.encode_chat(&prompt)?;
    Ok(if special.unwrap_or(false) { text.tokenizer().with_special(&ids) } else { ids })
}

/// A message as templates read it. Text parts are joined by a line break, as vLLM does for string templates.
fn message_json(message: &ChatMessage) -> Value {
    let mut json = Map::with_capacity(message.extra.len() + 2);
    json.insert("role".into(), message.role.as_str().into());
    let content = match &message.content {
        Content::None => Value::Null,
        Content::Text(text) => text.as_str().into(),
        Content::Parts(parts) => parts.join("\n").into(),
    };
    json.insert("content".into(), content);
    json.extend(message.extra.iter().map(|(key, value)| (key.clone(), value.clone())));
    Value::Object(json)
}

pub(super) fn tokenize(text: &TextModel, call: &Tokenize, model_len: u32) -> Result<Reply, Fault> {
    let ids = match &call.input {
        TokenizeInput::Prompt(prompt) => {
            let special = Special { add: call.add_special_tokens.unwrap_or(true), parse: true };
            text.encode_text(prompt, special)?
        }
        TokenizeInput::Messages {
            messages,
            tools,
            add_generation_prompt,
            continue_final_message,
            chat_template_kwargs,
        } => {
            let prompt = ChatPrompt {
                add_generation_prompt: *add_generation_prompt,
                continue_final_message: *continue_final_message,
                kwargs: chat_template_kwargs.as_ref(),
                ..ChatPrompt::new(&[])
            };
            chat(text, messages, tools.as_ref(), prompt, call.add_special_tokens)?
        }
    };
    let tokenizer = text.tokenizer();
    let strings: Option<Vec<String>> = call
        .return_token_strs
        .then(|| ids.iter().map(|&id| tokenizer.token_piece(id).unwrap_or_default().to_owned()).collect());
    Ok(Reply::json(render_tokenized(&ids, model_len, strings.as_deref())))
}

pub(super) fn detokenize(text: &TextModel, call: &Detokenize) -> Result<Reply, Fault> {
    let vocab = text.tokenizer().vocab_size();
    if let Some(id) = call.tokens.iter().find(|&&id| id as usize >= vocab) {
        let message = format!("token id {id} is out of the vocabulary of {vocab} tokens");
        return Err(Fault::bad_request(message).param("tokens"));
    }
    Ok(Reply::json(render_detokenized(&text.tokenizer().decode(&call.tokens, false))))
}
