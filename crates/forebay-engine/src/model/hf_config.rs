//! A Hugging Face `config.json` as metadata: values by key, those of nested objects by a path with dots.

use std::borrow::Cow;

use serde_json::{Map, Value as Json};

use super::keys::Metadata;
use crate::gguf::{List, Value};

/// The file of a model directory that says what the model is.
pub const CONFIG_FILE: &str = "config.json";

/// A parsed `config.json`.
#[derive(Debug, Clone)]
pub struct HfConfig(Map<String, Json>);

impl HfConfig {
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(json).map(Self)
    }

    fn find(&self, key: &str) -> Option<&Json> {
        let mut steps = key.split('.');
        let first = self.0.get(steps.next()?)?;
        steps.try_fold(first, |value, step| value.get(step))
    }

    pub(super) fn is_object(&self, key: &str) -> bool {
        self.find(key).is_some_and(Json::is_object)
    }

    /// Present, and `null`: not the same as absent where a key has a default.
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.find(key).is_some_and(Json::is_null)
    }

    /// The list of texts under a key; `None` if it is absent or anything else.
    pub(super) fn texts(&self, key: &str) -> Option<Vec<&str>> {
        self.find(key)?.as_array()?.iter().map(Json::as_str).collect()
    }
}

impl Metadata for HfConfig {
    fn get(&self, key: &str) -> Option<Cow<'_, Value>> {
        let value = match self.find(key)? {
            Json::Null => return None,
            Json::Bool(flag) => Value::Bool(*flag),
            Json::String(text) => Value::Text(text.clone()),
            Json::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => Value::Uint(number),
                (None, Some(number)) => Value::Int(number),
                (None, None) => Value::Float(number.as_f64()?),
            },
            // Only that it is no scalar matters: lists are read by `texts`.
            Json::Array(_) | Json::Object(_) => Value::List(List::Lists(Vec::new())),
        };
        Some(Cow::Owned(value))
    }
}
