//! Messages and other client data as a template sees them.

use std::borrow::Cow;

use minijinja::Value;
use serde_json::{Map, Value as Json};

use super::{ContentFormat, TemplateError};
use crate::guard::Guard;

/// Longest role; the known ones are `system`, `developer`, `user`, `assistant`, `tool`, `function`, `ipython`.
const ROLE_BYTES_MAX: usize = 32;

/// Turns client data into template values.
#[derive(Clone, Copy)]
pub(super) struct Client<'a> {
    /// Protects every text, keys included. `None` leaves all as it is.
    pub(super) guard: Option<&'a Guard>,
    pub(super) content: ContentFormat,
}

impl Client<'_> {
    pub(super) fn messages(&self, messages: &[Json]) -> Result<Vec<Value>, TemplateError> {
        messages
            .iter()
            .enumerate()
            .map(|(index, message)| {
                let fields = message.as_object().ok_or(TemplateError::NotAMessage { index })?;
                let role =
                    fields.get("role").and_then(Json::as_str).ok_or(TemplateError::NotAMessage { index })?;
                // Templates write `'<|' + role + '|>'`: the role is the one text of a client that becomes part of
                // a control token on purpose.
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
                if role.is_empty() || role.len() > ROLE_BYTES_MAX || !role.bytes().all(plain) {
                    let role = role.chars().take(ROLE_BYTES_MAX).collect();
                    return Err(TemplateError::BadRole { index, role });
                }
                Ok(self.message(role, fields))
            })
            .collect()
    }

    fn message(&self, role: &str, fields: &Map<String, Json>) -> Value {
        let mut pairs: Vec<(String, Value)> = Vec::with_capacity(fields.len() + 1);
        for (key, value) in fields {
            let value = match (key.as_str(), value) {
                ("role", _) => Value::from(role),
                ("content", content) => self.content(content),
                ("tool_calls", Json::Array(calls)) => calls.iter().map(|call| self.tool_call(call)).collect(),
                (_, value) => self.value(value),
            };
            pairs.push((self.text(key).into_owned(), value));
        }
        if !fields.contains_key("content") {
            pairs.push(("content".to_owned(), self.content(&Json::Null)));
        }
        Value::from_pairs(pairs)
    }

    fn content(&self, content: &Json) -> Value {
        match (self.content, content) {
            (ContentFormat::Parts { text_too: false }, Json::String(text)) => {
                let part = [("type", Value::from("text")), ("text", self.string(text))];
                Value::from(vec![Value::from_pairs(part)])
            }
            (ContentFormat::Parts { text_too: false }, Json::Null) => Value::from(Vec::<Value>::new()),
            (_, Json::Null) => Value::from(""),
            (ContentFormat::Text, Json::Array(parts)) => {
                let texts: Vec<&str> = parts.iter().filter_map(part_text).collect();
                self.string(&texts.join("\n"))
            }
            (_, content) => self.value(content),
        }
    }

    /// A tool call with its `arguments` as an object: templates write them out with `tojson`, and models were
    /// trained on that, not on a string in a string. None are an empty object, as in vLLM.
    fn tool_call(&self, call: &Json) -> Value {
        let Some(Json::Object(function)) = call.get("function") else { return self.value(call) };
        let parsed = match function.get("arguments") {
            None | Some(Json::Null) => Some(Json::Object(Map::new())),
            Some(Json::String(text)) if text.is_empty() => Some(Json::Object(Map::new())),
            Some(Json::String(text)) => serde_json::from_str(text).ok().filter(Json::is_object),
            Some(_) => None,
        };
        let Some(parsed) = parsed else { return self.value(call) };
        let mut call = call.clone();
        if let Some(Json::Object(function)) = call.get_mut("function") {
            function.insert("arguments".to_owned(), parsed);
        }
        self.value(&call)
    }

    pub(super) fn value(&self, json: &Json) -> Value {
        match json {
            Json::Null => Value::from(()),
            Json::Bool(yes) => Value::from(*yes),
            Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(number), _, _) => Value::from(number),
                (None, Some(number), _) => Value::from(number),
                (None, None, Some(number)) => Value::from(number),
                (None, None, None) => Value::from(()),
            },
            Json::String(text) => self.string(text),
            Json::Array(items) => items.iter().map(|item| self.value(item)).collect(),
            Json::Object(fields) => Value::from_pairs(
                fields.iter().map(|(key, value)| (self.text(key).into_owned(), self.value(value))),
            ),
        }
    }

    fn string(&self, text: &str) -> Value {
        Value::from(self.text(text).as_ref())
    }

    fn text<'t>(&self, text: &'t str) -> Cow<'t, str> {
        match self.guard {
            Some(guard) => guard.protect(text),
            None => Cow::Borrowed(text),
        }
    }
}

/// The text of a content part; images and the like have none here.
pub(super) fn part_text(part: &Json) -> Option<&str> {
    match part {
        Json::String(text) => Some(text),
        Json::Object(fields) => ["text", "refusal"].iter().find_map(|key| fields.get(*key)?.as_str()),
        _ => None,
    }
}
