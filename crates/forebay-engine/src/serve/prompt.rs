//! Prompts to token ids, and the two tokenizer endpoints. Pure CPU work.

use std::sync::Arc;
use std::time::SystemTime;

use forebay_flow::{PromptIds, Reply};
use forebay_tokens::{ChatPrompt, CivilTime, Special, TextModel};
use forebay_types::{Fault, TokenId};
use forebay_wire::{
    ChatMessage, Content, Detokenize, Prompt, Tokenize, TokenizeInput, render_detokenized, render_tokenized,
};
use serde_json::{Map, Value};

pub(super) fn encode(text: &TextModel, prompt: &Prompt) -> Result<PromptIds, Fault> {
    let prompts: Vec<Arc<[TokenId]>> = match prompt {
        Prompt::Chat { messages, tools, add_generation_prompt, chat_template_kwargs } => {
            vec![
                chat(text, messages, tools.as_ref(), *add_generation_prompt, chat_template_kwargs.as_ref())?
                    .into(),
            ]
        }
        Prompt::Text(texts) => texts
            .iter()
            // A raw prompt may write control tokens, as with OpenAI and vLLM.
            .map(|one| Ok(text.encode_text(one, Special::ALL)?.into()))
            .collect::<Result<_, Fault>>()?,
        Prompt::Tokens(prompts) => prompts.iter().map(|ids| ids.as_slice().into()).collect(),
    };
    Ok(PromptIds::Exact { tokenizer: text.tokenizer().id(), prompts })
}

fn chat(
    text: &TextModel,
    messages: &[ChatMessage],
    tools: Option<&Value>,
    add_generation_prompt: bool,
    kwargs: Option<&Map<String, Value>>,
) -> Result<Vec<TokenId>, Fault> {
    let messages: Vec<Value> = messages.iter().map(message_json).collect();
    let prompt = ChatPrompt {
        tools: tools.and_then(Value::as_array).map(Vec::as_slice),
        add_generation_prompt,
        kwargs,
        now: CivilTime::from(SystemTime::now()),
        ..ChatPrompt::new(&messages)
    };
    Ok(text.encode_chat(&prompt)?)
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
        TokenizeInput::Messages { messages, tools, add_generation_prompt } => {
            chat(text, messages, tools.as_ref(), *add_generation_prompt, None)?
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
