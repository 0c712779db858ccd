//! `POST /v1/chat/completions`

use bytes::Bytes;
use serde_json::{Map, Value};

use super::ParseError;
use super::field::{Fields, Kind};
use super::sampling::{self, LOGPROBS_MAX};
use super::tokens::continue_final_message;
use super::tools;
use crate::{Api, ChatMessage, Content, Generate, Need, Prompt};

const MESSAGES_MAX: usize = 4096;
const PARTS_MAX: usize = 1024;
/// Fields of chats that change the answer, with the values that change nothing.
const NEEDS: &[(&str, &[&str], &str)] = &[
    ("functions", &["[]"], "write 'tools' and 'tool_choice' instead"),
    ("function_call", &["\"none\"", "\"auto\""], "write 'tools' and 'tool_choice' instead"),
    ("chat_template", &[], "the model's own chat template is used as it is"),
    ("documents", &["[]"], "put the documents into the messages"),
    ("best_of", &["1"], "every choice that is generated is returned; ask for 'n' of them"),
    ("audio", &[], TEXT_ONLY),
    ("prediction", &[], "there is no speculation from a predicted output"),
    ("web_search_options", &[], "nothing here searches the web"),
];

const TEXT_ONLY: &str = "the models here answer in text";
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

pub(super) fn parse(fields: &Fields<'_>, body: &Bytes) -> Result<Generate, ParseError> {
    let mut needs = Vec::new();
    let messages = messages(fields, &mut needs)?.ok_or(ParseError::Missing { param: "messages".into() })?;
    let tools = tools::tools(fields, &mut needs)?;
    let tool_choice = tools::choice(fields, tools.as_deref(), &mut needs)?;
    for (name, harmless, what) in NEEDS {
        needs.extend(fields.need(name, harmless, what));
    }
    needs.extend(modalities(fields)?);
    let prompt = Prompt::Chat {
        messages,
        tools: tools.map(Value::Array),
        add_generation_prompt: fields.boolean("add_generation_prompt")?.unwrap_or(true),
        chat_template_kwargs: template_kwargs(fields)?,
    };
    let call = sampling::parse(fields, Api::ChatCompletions, prompt, logprobs(fields)?, needs, body)?;
    Ok(Generate {
        tool_choice,
        parallel_tool_calls: fields.boolean("parallel_tool_calls")?.unwrap_or(true),
        include_reasoning: fields.boolean("include_reasoning")?.unwrap_or(true),
        continue_final_message: continue_final_message(fields)?,
        ..call
    })
}

fn logprobs(fields: &Fields<'_>) -> Result<Option<u32>, ParseError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    match fields.integer("top_logprobs", 0..=LOGPROBS_MAX)? {
        Some(top) if top > 0 && !wanted => {
            Err(ParseError::value("top_logprobs", "only allowed when 'logprobs' is true"))
        }
        top => Ok(wanted.then(|| top.unwrap_or(0) as u32)),
    }
}

fn modalities(fields: &Fields<'_>) -> Result<Option<Need>, ParseError> {
    let items = fields.array("modalities", 8)?.unwrap_or_default();
    let other = items.iter().any(|item| item.get() != "\"text\"");
    Ok(other.then(|| Need { param: "modalities".into(), what: TEXT_ONLY }))
}

/// `chat_template_kwargs`, and `reasoning_effort` with them.
pub(super) fn template_kwargs(fields: &Fields<'_>) -> Result<Option<Map<String, Value>>, ParseError> {
    let kwargs = match (fields.raw("chat_template_kwargs"), fields.kind("chat_template_kwargs")) {
        (Some(raw), Some(Kind::Object)) => Some(fields.read("chat_template_kwargs", raw)?),
        (Some(_), Some(got)) => {
            return Err(ParseError::Type {
                param: "chat_template_kwargs".into(),
                expected: "an object",
                got,
            });
        }
        _ => None,
    };
    // As vLLM does it: the template makes of it what it can.
    let Some(effort) = fields.string("reasoning_effort")? else { return Ok(kwargs) };
    let mut kwargs: Map<String, Value> = kwargs.unwrap_or_default();
    kwargs.entry("reasoning_effort").or_insert(effort.into());
    Ok(Some(kwargs))
}

/// `None` where there is no `messages`. Parts that are no text are needs, and left out of what is read here.
pub(super) fn messages(
    fields: &Fields<'_>,
    needs: &mut Vec<Need>,
) -> Result<Option<Vec<ChatMessage>>, ParseError> {
    let Some(items) = fields.array("messages", MESSAGES_MAX)? else { return Ok(None) };
    if items.is_empty() {
        let what = "empty array. Expected an array with minimum length 1, but got an empty array instead";
        return Err(ParseError::value("messages", what));
    }
    let read = |(i, raw): (usize, &serde_json::value::RawValue)| {
        let param = format!("messages[{i}]");
        message(&param, super::field::read(&param, raw.get())?, needs)
    };
    items.into_iter().enumerate().map(read).collect::<Result<_, _>>().map(Some)
}

fn message(param: &str, value: Value, needs: &mut Vec<Need>) -> Result<ChatMessage, ParseError> {
    let Value::Object(mut fields) = value else {
        let got = Kind::of_value(&value);
        return Err(ParseError::Type { param: param.into(), expected: "an object", got });
    };
    let role = match fields.shift_remove("role") {
        Some(Value::String(role)) => role,
        None | Some(Value::Null) => return Err(ParseError::Missing { param: format!("{param}.role") }),
        Some(other) => {
            let got = Kind::of_value(&other);
            return Err(ParseError::Type { param: format!("{param}.role"), expected: "a string", got });
        }
    };
    // Templates write the role as it is, so a free text here could fake the end of a message.
    if !ROLES.contains(&role.as_str()) {
        let what = "Supported values are: 'system', 'developer', 'user', 'assistant', 'tool' and 'function'";
        return Err(ParseError::value(format!("{param}.role"), what));
    }
    tools::check_message(param, &role, &fields, needs)?;
    let at = || format!("{param}.content");
    let content = match fields.shift_remove("content") {
        Some(Value::String(text)) => Content::Text(text),
        Some(Value::Array(parts)) => Content::Parts(text_parts(&at(), parts, needs)?),
        None | Some(Value::Null) if role == "assistant" => Content::None,
        None => return Err(ParseError::Missing { param: at() }),
        Some(other) => {
            let got = Kind::of_value(&other);
            return Err(ParseError::Type {
                param: at(),
                expected: "one of a string or array of objects",
                got,
            });
        }
    };
    Ok(ChatMessage { role, content, extra: fields })
}

fn text_parts(param: &str, parts: Vec<Value>, needs: &mut Vec<Need>) -> Result<Vec<String>, ParseError> {
    if parts.len() > PARTS_MAX {
        let what = format!("expected at most {PARTS_MAX} parts, but got {}", parts.len());
        return Err(ParseError::value(param, what));
    }
    let mut lack = |param: String, what| {
        // One is enough to refuse for; thousands would only cost memory.
        if !needs.iter().any(|need| need.what == what) {
            needs.push(Need { param, what });
        }
        Ok(None)
    };
    let read = |(j, part): (usize, Value)| {
        let param = format!("{param}[{j}]");
        let Value::Object(mut part) = part else {
            let got = Kind::of_value(&part);
            return Err(ParseError::Type { param, expected: "an object", got });
        };
        match part.get("type").and_then(Value::as_str) {
            Some("text") => match part.shift_remove("text") {
                Some(Value::String(text)) => Ok(Some(text)),
                None => Err(ParseError::Missing { param: format!("{param}.text") }),
                Some(other) => {
                    let (param, got) = (format!("{param}.text"), Kind::of_value(&other));
                    Err(ParseError::Type { param, expected: "a string", got })
                }
            },
            Some("image_url" | "image" | "input_image") => {
                lack(param, "the models here read text, not images")
            }
            Some("input_audio" | "audio_url" | "video_url" | "file") => {
                lack(param, "the models here read text, not audio, video or files")
            }
            Some("refusal") => lack(param, "earlier refusals are not read apart; send them as text"),
            Some(_) => Err(ParseError::value(format!("{param}.type"), "the supported value is 'text'")),
            None => Err(ParseError::Missing { param: format!("{param}.type") }),
        }
    };
    parts.into_iter().enumerate().map(read).filter_map(Result::transpose).collect()
}
